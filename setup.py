"""Builds the extension flowmatch_kernels._C; everything else is in pyproject.toml.

FLOWMATCH_KERNELS_NO_EXT=1       install pure Python
FLOWMATCH_KERNELS_REQUIRE_EXT=1  fail where the extension cannot be built, instead of installing without it
FORCE_CUDA=1                     build CUDA in, or fail
TORCH_CUDA_ARCH_LIST             the GPU architectures; the default ends in PTX, so that newer GPUs run too
CXX, CUDA_HOME, MAX_JOBS         the C++ compiler, where nvcc is, how many compilers at once
"""

import os
import re
import shlex
import shutil
import subprocess
import warnings
from glob import glob
from pathlib import Path

from setuptools import setup

NAME = "flowmatch_kernels._C"
# No FMA, ever; selects may be computed without a branch, so that loops vectorise.
CXX_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Xcompiler=-fvisibility=hidden"]
ROOT = Path(__file__).resolve().parent
# Within one major architecture, what is built for the first runs on all. The PTX of 8.0 is for the embedded
# ones (Orin, Thor), which do not run the others' binaries.
ARCHITECTURES = ("7.5", "8.0+PTX", "9.0", "10.0", "12.0")


def flag(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def prefix_maps() -> list[str]:
    """Flags that keep this machine's folders out of what is built: __FILE__ is in messages of torch's headers."""
    import torch

    folders = {ROOT: ".", Path(torch.__file__).parent: "torch"}
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]


def find_toolkit() -> None:
    """Sets CUDA_HOME, if it is not set, to where nvcc says it lives: `nvcc` on PATH may be a wrapper elsewhere."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    commands = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    if top := re.search(r"^#\$ TOP=(.+)$", commands, re.MULTILINE):
        os.environ["CUDA_HOME"] = os.path.normpath(top[1].strip())


def cuda_architectures() -> str | None:
    """The GPU architectures to build CUDA for, or None to build for the CPU only. Never asks for a GPU.

    Raises:
        RuntimeError: FORCE_CUDA=1, and CUDA cannot be built in; says why.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    def nvcc(option: str) -> str:
        return subprocess.run([compiler, option], check=True, capture_output=True, text=True).stdout

    compiler = Path(CUDA_HOME or "", "bin", "nvcc")
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is not a CUDA build"
    elif CUDA_HOME is None or not compiler.exists():
        reason = "nvcc is not found: put it on PATH, or set CUDA_HOME"
    elif (found := re.search(r"release (\d+)", nvcc("--version"))[1]) != torch.version.cuda.split(".")[0]:
        reason = f"{compiler} is of CUDA {found}, and torch of CUDA {torch.version.cuda}: the major must agree"
    else:
        known = nvcc("--list-gpu-arch").split()
        default = [a for a in ARCHITECTURES if f"compute_{a.split('+')[0].replace('.', '')}" in known]
        return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(default) + "+PTX"
    if flag("FORCE_CUDA"):
        raise RuntimeError(f"FORCE_CUDA=1 is set, and CUDA cannot be built in: {reason}")
    return None


def extension() -> dict:
    """The arguments of setup() that build the extension; none under FLOWMATCH_KERNELS_NO_EXT=1."""
    if flag("FLOWMATCH_KERNELS_NO_EXT"):
        return {}
    find_toolkit()  # before PyTorch's module, which reads CUDA_HOME at import
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

    class BuildOrExplain(BuildExtension):
        """Where the extension cannot be built, a module in its place says why when it is imported."""

        def run(self) -> None:
            explanation = Path(self.get_ext_fullpath(NAME)).with_name("_C.py")
            explanation.unlink(missing_ok=True)
            try:
                compiler = shlex.split(get_cxx_compiler())[0]
                if shutil.which(compiler) is None:
                    raise RuntimeError(f"there is no C++ compiler {compiler!r} (CXX names another)")
                super().run()
            except Exception as error:
                if flag("FORCE_CUDA") or flag("FLOWMATCH_KERNELS_REQUIRE_EXT"):
                    raise
                reason = f"it was not built: {error}; FLOWMATCH_KERNELS_REQUIRE_EXT=1 shows all of it"
                explanation.parent.mkdir(parents=True, exist_ok=True)
                explanation.write_text(f"raise ImportError({reason!r})\n")
                warnings.warn(f"flowmatch_kernels is installed without its C++ extension: {reason}", stacklevel=1)

    sources = sorted(glob("csrc/*.cpp"))
    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # the stable ABI of torch 2.10
    architectures = cuda_architectures()
    if architectures is not None:
        sources.append("csrc/fused_step_cuda.cu")
        macros.append(("FLOWMATCH_KERNELS_CUDA", f'"{architectures}"'))
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures  # where BuildExtension reads it
    module = (CppExtension if architectures is None else CUDAExtension)(
        NAME,
        sources,
        depends=["setup.py", *glob("csrc/*.h")],
        include_dirs=[pybind11.get_include()],
        define_macros=macros,
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *prefix_maps()],
            "nvcc": [*NVCC_FLAGS, *[f"-Xcompiler={flag}" for flag in prefix_maps()]],
        },
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildOrExplain}}


setup(**extension())
