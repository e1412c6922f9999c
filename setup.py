"""Builds the extension, flowmatch_kernels._C and for CUDA flowmatch_kernels._C_cuda; all else is in pyproject.toml.

FLOWMATCH_KERNELS_NO_EXT=1       install pure Python
FLOWMATCH_KERNELS_NO_CUDA=1      build for the CPU only
FLOWMATCH_KERNELS_REQUIRE_EXT=1  fail where the extension cannot be built, instead of installing without it
FORCE_CUDA=1                     build CUDA in, or fail
TORCH_CUDA_ARCH_LIST             the GPU architectures; the default ends in PTX, so that newer GPUs run too
CXX, CUDA_HOME, MAX_JOBS         the C++ compiler, where nvcc is, how many compilers at once
"""

import contextlib
import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import setuptools
from setuptools import setup

if (
    int(setuptools.__version__.split(".")[0]) < 77
):  # which does not know pyproject.toml's license, and says so at length
    raise SystemExit(
        f"flowmatch_kernels needs setuptools >= 77 to build, and this is {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    )

NAME, CUDA_NAME = "flowmatch_kernels._C", "flowmatch_kernels._C_cuda"
# No FMA, ever; selects and square roots without a branch, so that loops vectorise.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-g0",
]
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Xcompiler=-fvisibility=hidden"]
CUDA_SOURCES = [
    "csrc/launch_cuda.cpp",
    "csrc/fused_step_cuda.cu",
    "csrc/keyed_noise_cuda.cu",
    "csrc/step_log_prob_cuda.cu",
]
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
    if flag("FLOWMATCH_KERNELS_NO_CUDA"):
        reason = "FLOWMATCH_KERNELS_NO_CUDA=1 is set too"
    elif torch.version.cuda is None:
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

    def explanation(place: Path) -> Path:
        return place.with_name(f"{place.name.split('.')[0]}.py")

    @contextlib.contextmanager
    def compilers_output(shown: bool) -> Iterator[None]:
        """Without `shown`, what ninja and the compilers print is kept, and comes on stderr where they fail."""
        if shown:
            yield
            return
        sys.stdout.flush()
        stdout = os.dup(1)
        with tempfile.TemporaryFile() as kept:
            os.dup2(kept.fileno(), 1)
            try:
                yield
            except BaseException:
                sys.stdout.flush()
                kept.seek(0)
                os.write(2, kept.read())
                raise
            finally:
                sys.stdout.flush()
                os.dup2(stdout, 1)
                os.close(stdout)

    class BuildOrExplain(BuildExtension):
        """Where a module cannot be built, one in its place says why when it is imported.

        One module after the other: what CUDA's needs must not take the CPU's with it.
        """

        def run(self) -> None:
            modules, compiler, inplace = self.extensions, self.compiler, self.inplace
            places = {name: Path(self.get_ext_fullpath(name)) for name in (NAME, CUDA_NAME)}
            for name, place in places.items():  # what an earlier build left does not go with this one
                explanation(place).unlink(missing_ok=True)
                if name not in [module.name for module in modules]:
                    place.unlink(missing_ok=True)
            for module in modules:
                self.extensions, self.compiler, self.inplace = [module], compiler, inplace
                if not self._build(module.name, places[module.name]):
                    break
            self.extensions = modules

        def _build(self, name: str, place: Path) -> bool:
            try:
                compiler = shlex.split(get_cxx_compiler())[0]
                if shutil.which(compiler) is None:
                    raise RuntimeError(f"there is no C++ compiler {compiler!r} (CXX names another)")
                with compilers_output(bool(self.distribution.verbose)):  # 0 with --quiet
                    super().run()
            except Exception as error:
                if flag("FORCE_CUDA") or flag("FLOWMATCH_KERNELS_REQUIRE_EXT"):
                    raise
                reason = f"it was not built: {error}; FLOWMATCH_KERNELS_REQUIRE_EXT=1 shows all of it"
                place.unlink(missing_ok=True)
                place.parent.mkdir(parents=True, exist_ok=True)
                explanation(place).write_text(f"raise ModuleNotFoundError({reason!r})\n")
                what = "CUDA half" if name == CUDA_NAME else "C++ extension"
                warnings.warn(f"flowmatch_kernels is installed without its {what}: {reason}", stacklevel=1)
                return False
            return True

    import torch

    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # the stable ABI of torch 2.10
    options = {
        "depends": ["setup.py", *glob("csrc/*.h")],
        "include_dirs": [pybind11.get_include()],
        "extra_compile_args": {
            "cxx": [*CXX_FLAGS, *prefix_maps()],
            "nvcc": [*NVCC_FLAGS, *[f"-Xcompiler={flag}" for flag in prefix_maps()]],
        },
    }
    architectures, cuda = cuda_architectures(), []
    if architectures is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures  # where BuildExtension reads it
        cuda = [CUDAExtension(CUDA_NAME, CUDA_SOURCES, define_macros=[*macros], **copy.deepcopy(options))]
        macros += [
            ("FLOWMATCH_KERNELS_CUDA", f'"{architectures}"'),
            ("FLOWMATCH_KERNELS_CUDA_VERSION", f'"{torch.version.cuda}"'),
        ]
    sources = sorted({*glob("csrc/*.cpp")} - {*CUDA_SOURCES})
    modules = [CppExtension(NAME, sources, define_macros=macros, **copy.deepcopy(options)), *cuda]
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildOrExplain}}


setup(**extension())
