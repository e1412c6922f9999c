"""Builds csrc's *_cuda.cu for the host, with sanitizers, and runs tests on them in processes of their own."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent.parent))
import build_cache

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
#: All that a module could include.
INCLUDED = [*HERE.glob("*.h"), *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("*.cu")]
#: The modules: the fused step, and the other two ops, which are small.
FUSED_STEP, OTHERS = "bindings.cpp", "noise_and_log_prob.cpp"
#: -O0 compiles fastest. AddressSanitizer is asked by cuda_runtime.h at each access: instrumented by the compiler too,
#: the build takes 100 s instead of 35.
FLAGS = ["-std=c++20", "-O0", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-DFLOWMATCH_INLINE=inline"]
#: A word of 16 bytes is read where floats were written, as in CUDA.
FLAGS += [
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
]
FLAGS += ["-fsanitize=bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"]


def _compiler(*arguments: str) -> str:
    command = [*shlex.split(os.environ.get("CXX", "g++")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout.strip()


@functools.cache
def build(source: str = FUSED_STEP) -> Path:
    """A module's path; compiles it where its sources, its flags or the compiler have changed."""
    import pybind11

    includes = [HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    described = [*FLAGS, _compiler("--version"), sys.version, pybind11.__version__]
    command = [*FLAGS, *[f"-I{path}" for path in includes], str(HERE / source), "-o"]
    sources = [HERE / source, *sorted(INCLUDED)]
    return build_cache.built("host_cuda.so", [*described, *sources], lambda path: _compiler(*command, str(path)))


def load(source: str = FUSED_STEP) -> ModuleType:
    """A module, in a process that `environment` has prepared: one for each process."""
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("run tests/test_cuda_host.py: AddressSanitizer must be there from the start")
    spec = importlib.util.spec_from_file_location("_host_cuda", build(source))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    """Environment variables for a process that loads the module."""
    # libstdc++ too, or AddressSanitizer does not find the function that throws.
    libraries = [_compiler(f"-print-file-name={name}") for name in ("libasan.so", "libstdc++.so")]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=98",
        "PYTEST_ADDOPTS": "",
        "OMP_NUM_THREADS": "1",
    }


def start(cases: str, marked: str, expression: str = "", source: str = FUSED_STEP) -> subprocess.Popen[str]:
    """Runs the tests of one file in this folder, which loads the module of `source`, under the sanitizers."""
    build(source)
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE / cases),
        "-v",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--capture=sys"]  # a sanitizer writes to the file descriptor, and its process ends there
    return subprocess.Popen(
        [*command, "-m", marked, "-k", expression],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], fewest: int) -> None:
    """Fails with the other process's own words unless all its tests, `fewest` or more, ran and passed."""
    output, _ = process.communicate()
    told = "\n".join(line for line in output.splitlines() if not re.search(r" PASSED +\[", line))
    summary = output.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert process.returncode == 0, f"exit {process.returncode}\n{told}"
    assert not re.search(r"skipped|xfailed|xpassed", summary), told
    assert passed, told
    assert int(passed[1]) >= fewest, told
