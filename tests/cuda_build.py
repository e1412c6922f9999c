"""Checks a CUDA build on a machine without GPU or driver; `make cuda-build` runs it in that build's own environment.

    python tests/cuda_build.py

Imports the package that Python finds, and prints what `info` prints. Exits with 1, and why, where something is wrong.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

HIDE = {"triton": "sys.modules['triton'] = None", "the extension": "sys.modules['flowmatch_kernels._C'] = None"}
CHOICE = """
import sys
{hidden}
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flowmatch_kernels import FlowMatching
from flowmatch_kernels.ops import dispatch

taken = []
choose = dispatch.choose
dispatch.choose = lambda *arguments: taken.append(choose(*arguments)) or taken[-1]
fm = FlowMatching((64, 2))  # torch checks the arguments of its Beta distribution by value
with FakeTensorMode():
    x, times = fm.sample(6, lambda x, t: x * t, "cuda", True)
assert x.device.type == "cuda" and tuple(x.shape) == (6, 11, 64, 2), x
assert len({{backend.name for backend in taken}}) == 1, taken
print(taken[0].name)
"""


def python(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "FLOWMATCH_KERNELS_BACKEND"}
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def compiled_for(extension: str) -> set[str]:
    """What the extension holds code for, as TORCH_CUDA_ARCH_LIST writes it: {"8.0", "9.0", "9.0+PTX"}."""
    import triton

    beside = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    tool = shutil.which("cuobjdump", path=os.pathsep.join([beside, os.environ["PATH"]]))
    assert tool is not None, "cuobjdump is in Triton's wheel, and in the CUDA toolkit"
    found = set()
    for option, suffix in (("--list-elf", ""), ("--list-ptx", "+PTX")):
        listed = subprocess.run([tool, option, extension], capture_output=True, text=True)
        if listed.returncode and "does not contain device code" not in listed.stdout + listed.stderr:
            raise RuntimeError(f"{tool} {option} {extension} failed:\n{listed.stdout}{listed.stderr}")
        found |= {f"{major}.{minor}{suffix}" for major, minor in re.findall(r"\.sm_(\d+)(\d)[a-z]?\.", listed.stdout)}
    return found


def main() -> None:
    import torch

    import flowmatch_kernels
    from flowmatch_kernels.ops import native

    sys.stdout.write(f"package   {os.path.dirname(flowmatch_kernels.__file__)}\n")
    sys.stdout.write(f"torch     {torch.__version__}, CUDA {torch.version.cuda}\n")
    assert torch.version.cuda is not None, "this is no CUDA build of torch"
    assert not torch.cuda.is_available(), "there is a GPU: run `make gpu`"
    assert native.cuda_unavailable() is None, native.cuda_unavailable()
    assert native._C is not None

    info = subprocess.run(
        [sys.executable, "-m", "flowmatch_kernels", "info"], check=True, capture_output=True, text=True
    )
    sys.stdout.write(info.stdout + "\n")
    line = next(line for line in info.stdout.splitlines() if line.strip().startswith("cuda "))
    assert native._C.cuda_archs in line, f"info does not say what cuda is built for: {line}"
    assert "no CUDA or ROCm device" in line, f"info does not say why cuda cannot run: {line}"

    cuda_half = sys.modules["flowmatch_kernels._C_cuda"]
    assert compiled_for(native._C.__file__) == set(), "GPU code belongs to the CUDA half"
    inside, named = compiled_for(cuda_half.__file__), native._C.cuda_archs.replace(" ", ";").split(";")
    sys.stdout.write(f"code inside the extension: {' '.join(sorted(inside))}\n")
    assert inside == {arch.removesuffix("+PTX") for arch in named} | {arch for arch in named if "+" in arch}

    for hidden, wanted in (((), "triton"), (("triton",), "cuda"), (("triton", "the extension"), "reference")):
        code = CHOICE.format(hidden="\n".join(HIDE[name] for name in hidden))
        chosen = python(code)
        sys.stdout.write(f"on a FakeTensor on cuda{', without ' + ' and '.join(hidden) if hidden else ''}: {chosen}\n")
        assert chosen == wanted, f"wanted {wanted}"
    assert not torch.cuda.is_initialized()


if __name__ == "__main__":
    main()
