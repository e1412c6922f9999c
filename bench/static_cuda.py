"""The C++ CUDA kernel's rows of `bench.static`: compiled by nvcc, its machine code read; no GPU is needed.

One file holds every instantiation, so that an architecture is compiled once, in about six seconds, and each
specialisation picks its kernel as the launcher does. What a launch without trajectory or history jumps over
is left out of its accesses; instructions are counted as they stand.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock  # which torch itself needs

from flowmatch_kernels.ops.fused_step import PROMOTE, arithmetic_dtype

from .machine_code import Access, Code, Machine, Specialisation, sass_accesses

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc" / "fused_step_cuda.cu"
#: The other ops, a file each.
OTHERS = {name: ROOT / "csrc" / f"{name}_cuda.cu" for name in ("keyed_noise", "step_log_prob")}


def of_setup(name: str) -> tuple[str, ...]:
    """A list of flags, or of sources, as setup.py spells it: the one place where they stand."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id == name:
                return tuple(ast.literal_eval(node.value))
    raise KeyError(f"setup.py has no {name}")


FLAGS = of_setup("NVCC_FLAGS")
_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
}


def found(name: str, *packages: str) -> str | None:
    """Path of a CUDA tool: on PATH, in CUDA_HOME, or in a package from pip."""
    places = [Path(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    for package in packages:
        top, _, inside = package.partition("/")
        spec = importlib.util.find_spec(top)
        for folder in (spec and spec.submodule_search_locations) or []:
            places += sorted(Path(folder).glob(f"{inside}/bin"))
    return shutil.which(name) or next((str(p / name) for p in places if (p / name).exists()), None)


def tools() -> dict[str, str | None]:
    """Where nvcc, cuobjdump and c++filt are."""
    return {
        "nvcc": found("nvcc", "nvidia/cu*", "nvidia/cuda_nvcc"),
        "cuobjdump": found("cuobjdump", "triton/backends/nvidia", "nvidia/cu*", "nvidia/cuda_cuobjdump"),
        "c++filt": found("c++filt"),
    }


def unavailable() -> str | None:
    """Why the kernel cannot be compiled and read here, or None."""
    missing = [name for name, path in tools().items() if path is None]
    return f"not found: {', '.join(missing)}" if missing else None


class Instantiation(NamedTuple):
    """One kernel of a compiled file."""

    title: str
    """Its template arguments, as C++ writes them: "Element<float, BFloat16, float, (Terms)0>, Known<true, 0>, 4"."""
    sass: str
    ptx: str
    usage: dict[str, int]
    """REG, STACK, SHARED, LOCAL."""


def _run(*command: str | None, text: str | None = None) -> str:
    done = subprocess.run([str(part) for part in command], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout


def built(arch: str, kind: str, source: Path) -> Path:
    """A compiled file, "cubin" or "ptx", from build/cubin where nothing has changed.

    One compilation makes both, with other processes that ask for them held off.
    """
    nvcc = tools()["nvcc"]
    digest = hashlib.sha256("\0".join([*FLAGS, _run(nvcc, "--version")]).encode())
    for file in [source, *sorted(source.parent.glob("*.h"))]:
        digest.update(file.read_bytes())
    path = ROOT / "build" / "cubin" / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}.{kind}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            new = Path(scratch, f"{source.stem}.cubin")
            keep = "--keep", f"--keep-dir={scratch}"  # the PTX that the machine code is made of
            _run(nvcc, *FLAGS, *keep, "-Werror=all-warnings", f"-arch={arch}", "-cubin", "-o", str(new), str(source))
            for made in (new.with_suffix(".ptx"), new):
                made.replace(path.with_suffix(made.suffix))
    return path


@functools.cache
def instantiations(arch: str, source: Path = SOURCE) -> dict[str, Instantiation]:
    """Every kernel of one op for one architecture, by title."""
    cubin = str(built(arch, "cubin", source))
    dump = _run(tools()["cuobjdump"], "-sass", cubin).split("Function : ")[1:]
    usage = dict(re.findall(r"Function (\S+):\s+(REG:.*)", _run(tools()["cuobjdump"], "-res-usage", cubin)))
    entries = re.split(r"\.entry (?=\w+\()", built(arch, "ptx", source).read_text())[1:]
    ptx = {entry.partition("(")[0]: entry for entry in entries}
    names = [sass.split()[0] for sass in dump]
    plain = _run(tools()["c++filt"], text="\n".join(names))
    read = {}
    for name, line, sass in zip(names, plain.splitlines(), dump, strict=True):
        line = re.sub(r"flowmatch_kernels::|\(anonymous namespace\)::", "", line)
        match = re.search(rf"{source.stem.removesuffix('_cuda')}_kernel<(.*)>\(", line)
        assert match, line
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[name])}
        read[match[1]] = Instantiation(match[1], sass, ptx[name], numbers)
    return read


def picked(specialisation: Specialisation) -> tuple[str, int]:
    """The title of the kernel that the launcher picks, and the elements of one thread."""
    widest = max(specialisation.reads)
    vector = 16 // widest if specialisation.aligned else 1
    flags = [str(flag).lower() for flag in (specialisation.guided, specialisation.strength)]
    known = vector > 1 and not (specialisation.strength and specialisation.terms)
    present = f"Known<{flags[0]}, {specialisation.terms}, {flags[1]}>" if known else "Tested<false, false>"
    vector = vector if known else 1
    state, velocity = _TYPES[specialisation.state], _TYPES[specialisation.velocity]
    to_velocity = specialisation.rounding != PROMOTE or state == velocity
    terms = "(Terms)2" if specialisation.sum_first else f"(Terms){int(to_velocity)}"
    return f"Element<{state}, {velocity}, {state}, {terms}>, {present}, {vector}", vector


def compile_cuda(specialisation: Specialisation, arch: str) -> Code:
    """The CUDA kernel for this specialisation, and what of its code such a launch comes by."""
    title, vector = picked(specialisation)
    kernel = instantiations(arch)[title]
    machine = _machine(kernel)
    accesses = _come_by(machine.accesses, specialisation, vector)
    return Code(kernel.ptx, vector, kernel.usage["SHARED"], lambda: machine._replace(accesses=accesses))


def _machine(kernel: Instantiation) -> Machine:
    accesses = sass_accesses(kernel.sass, lambda i: ".CONSTANT" in i.name)
    local = kernel.usage["STACK"] + kernel.usage["LOCAL"]
    return Machine(kernel.sass, kernel.usage["REG"], local, accesses)


def _come_by(accesses: list[Access], specialisation: Specialisation, vector: int) -> list[Access]:
    """The accesses of one thread that takes a vector, with its operands present and no other.

    The kernel holds those of an element left over too, and all stores: out's, the trajectory's, the history's,
    in this order.
    """
    arithmetic = arithmetic_dtype(specialisation.state).itemsize
    state, velocity = specialisation.state.itemsize, specialisation.velocity.itemsize

    def words(size: int) -> list[int]:
        return [min(size, 16)] * max(size // 16, 1)

    def taken(store: bool, sizes: list[int], present: list[int]) -> list[Access]:
        """Those of the vector: all that there are less the single element's, less what is absent."""
        there = sorted(a.width for a in accesses if a.store == store and not a.coefficient)
        for size in sizes if vector > 1 else []:
            there.remove(size)
        for size in sizes:
            if size in present:
                present = [*present]
                present.remove(size)
                continue
            for width in words(vector * size):
                there.remove(width)
        return [Access(store, width, False) for width in there]

    # With operands tested, the scalar kernel holds the loads of all of them.
    scalar = vector == 1
    loads = [state, *[velocity] * (2 if specialisation.guided or scalar else 1)]
    loads += [arithmetic] * (3 if scalar else specialisation.terms)
    loads += [state] * (specialisation.strength or (scalar and not specialisation.sum_first))
    stores = [state, state, arithmetic]
    return [
        *[a for a in accesses if a.coefficient],
        *taken(False, loads, specialisation.reads),
        *taken(True, stores, specialisation.writes),
    ]


class Other(NamedTuple):
    """One kernel of another op than fused_step."""

    types: list[torch.dtype]
    """Of keyed noise the result's; of step_log_prob the state's and the velocity's."""
    own_rows: bool | None
    """Each sample has rows of its own; None: the code serves them and one row for all, or the op has no rows."""
    whole: bool
    """Whether each thread takes four elements at once."""
    code: Code


def others(op: str, arch: str) -> list[Other]:
    """Every kernel of an op of `OTHERS`."""
    dtypes = {name: dtype for dtype, name in _TYPES.items()}
    found = []
    for kernel in instantiations(arch, OTHERS[op]).values():
        *names, size = kernel.title.split(", ")
        types = [dtypes[name] for name in names if name in dtypes]
        code = Code(kernel.ptx, 4, kernel.usage["SHARED"], functools.partial(_machine, kernel))
        own_rows = names[-1] == "true" if op == "step_log_prob" else None
        found.append(Other(types, own_rows, size in ("true", "4"), code))
    return found
