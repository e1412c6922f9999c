"""What setup.py builds and refuses, and what an install whose extension cannot be loaded says of itself."""

import importlib
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import build_cache
import pytest
import torch
from forked import Forks

from bench import static_cuda
from flowmatch_kernels.ops import native

ROOT = Path(__file__).parent.parent
BOTH = ["flowmatch_kernels._C", "flowmatch_kernels._C_cuda"]
CPU = BOTH[:1]
VARIABLES = ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")
BUILT = native._C is not None
needs_extension = pytest.mark.skipif(not BUILT, reason="the extension is not built")


_forks: Forks  # of this module, by the fixture


def neutral():
    """The environment without the variables that choose a build."""
    return {k: v for k, v in os.environ.items() if k not in VARIABLES and not k.startswith("FLOWMATCH_KERNELS")}


def run(*command, **environment):
    """Runs a command in the neutral environment with these variables."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=neutral() | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module", autouse=True)
def forks():
    """One process that has imported torch, for all that import it: 22 imports took half of this file's time."""
    global _forks
    _forks = Forks(neutral())
    yield
    _forks.close()


def run_code(code, cwd=ROOT, **environment):
    """Runs Python code in the neutral environment with these variables, in a process of its own."""
    return _forks.run(code, cwd, neutral() | environment)


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit whose nvcc says which it is, and cannot compile."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '  --version) echo "Cuda compilation tools, release 12.8, V12.8.0";;\n'
        "  --list-gpu-arch) echo compute_80; echo compute_90;;\n"
        '  *) echo "no kernel today" >&2; exit 1;;\n'
        "esac\n"
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return nvcc.parent.parent


#: Runs setup.py with a torch that says it is of this CUDA, or of none.
SETUP = """
import os, runpy, sys, torch, torch.utils.cpp_extension
torch.version.cuda = {cuda!r}
torch.utils.cpp_extension.CUDA_HOME = os.environ.get("CUDA_HOME")  # which a CPU build of torch does not look for
sys.argv = ["setup.py", *{arguments!r}]
if {capture}:
    import setuptools
    setuptools.setup = lambda **given: print(*[m.name for m in given.get("ext_modules", [])])
runpy.run_path("setup.py", run_name="__main__")
"""


def setup(cuda, *arguments, capture=False, cwd=ROOT, **environment):
    return run_code(SETUP.format(cuda=cuda, arguments=arguments, capture=capture), cwd, **environment)


@pytest.mark.parametrize(
    "cuda, environment, wanted",
    [
        ("12.8", {}, BOTH),
        ("12.6", {}, BOTH),
        ("13.0", {}, CPU),
        (None, {}, CPU),
        ("12.8", {"FLOWMATCH_KERNELS_NO_CUDA": "1"}, CPU),
        ("12.8", {"FLOWMATCH_KERNELS_NO_CUDA": "0"}, BOTH),
        ("12.8", {"FLOWMATCH_KERNELS_NO_EXT": "1"}, []),
        ("12.8", {"FORCE_CUDA": "1"}, BOTH),
        ("13.0", {"FORCE_CUDA": "1"}, "is of CUDA 12, and torch of CUDA 13.0: the major must agree"),
        (None, {"FORCE_CUDA": "1"}, "is not a CUDA build"),
        ("12.8", {"FORCE_CUDA": "1", "FLOWMATCH_KERNELS_NO_CUDA": "1"}, "FLOWMATCH_KERNELS_NO_CUDA=1 is set too"),
    ],
    ids=str,
)
def test_what_is_built(cuda, environment, wanted, toolkit):
    done = setup(cuda, capture=True, CUDA_HOME=str(toolkit), **environment)
    if isinstance(wanted, list):
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == wanted
    else:
        assert done.returncode != 0
        assert "FORCE_CUDA=1 is set, and CUDA cannot be built in: " in done.stderr
        assert wanted in done.stderr


MODULE = """
#include <Python.h>
static PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{name}", 0, -1, 0, 0, 0, 0, 0}};
PyMODINIT_FUNC PyInit_{name}() {{ return PyModule_Create(&module); }}
"""


@pytest.fixture
def project(tmp_path):
    """setup.py with sources that are quick to compile, and a stale CUDA half of an earlier build."""
    folder = tmp_path / "project"
    (folder / "csrc").mkdir(parents=True)
    (folder / "flowmatch_kernels").mkdir()
    (folder / "flowmatch_kernels" / "__init__.py").touch()
    shutil.copy(ROOT / "setup.py", folder)
    (folder / "csrc" / "bindings.cpp").write_text(MODULE.format(name="_C"))
    (folder / "csrc" / "launch_cuda.cpp").write_text(MODULE.format(name="_C_cuda"))
    for source in (ROOT / "csrc").glob("*.cu"):
        (folder / "csrc" / source.name).write_text("")
    (folder / "flowmatch_kernels" / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("of another build")
    return folder


def built(project):
    return sorted(path.name.split(".")[0] + path.suffix for path in (project / "flowmatch_kernels").glob("_C*"))


def test_a_cuda_half_that_fails_leaves_the_cpu_half(project, toolkit):
    """It says why, in a module in its place; nothing of an earlier build stays."""
    done = setup("12.8", "--quiet", "build_ext", "--inplace", cwd=project, CUDA_HOME=str(toolkit))
    assert done.returncode == 0, done.stderr
    assert "installed without its CUDA half: it was not built" in done.stderr
    assert built(project) == ["_C.so", "_C_cuda.py"]
    code = "import importlib\nimportlib.import_module('flowmatch_kernels._C')\nimport flowmatch_kernels._C_cuda"
    imported = run_code(code, project)
    assert "ModuleNotFoundError: it was not built" in imported.stderr, imported.stderr
    # A build for the CPU takes the explanation away.
    done = setup(None, "--quiet", "build_ext", "--inplace", cwd=project, CUDA_HOME=str(toolkit))
    assert done.returncode == 0, done.stderr
    assert built(project) == ["_C.so"]


@pytest.mark.full  # each builds an extension
@pytest.mark.parametrize("variable", ["FORCE_CUDA", "FLOWMATCH_KERNELS_REQUIRE_EXT"])
def test_a_cuda_half_that_is_required_fails_the_build(project, toolkit, variable):
    done = setup("12.8", "--quiet", "build_ext", "--inplace", cwd=project, CUDA_HOME=str(toolkit), **{variable: "1"})
    assert done.returncode != 0
    assert "no kernel today" in done.stdout + done.stderr


@pytest.mark.full  # each builds an extension
def test_a_cpu_half_that_fails_takes_both(project, toolkit):
    (project / "csrc" / "bindings.cpp").write_text("#error no compiler likes this")
    done = setup("12.8", "--quiet", "build_ext", "--inplace", cwd=project, CUDA_HOME=str(toolkit))
    assert done.returncode == 0, done.stderr
    assert "installed without its C++ extension" in done.stderr
    assert "_C.py" in built(project)
    assert "_C.so" not in built(project)


def test_the_flags_of_nvcc_stand_in_one_place():
    """setup.py; else the PTX that tests execute and read is not what users get."""
    copies = [ROOT / "CMakeLists.txt", ROOT / "Makefile", *ROOT.glob("bench/*.py"), *ROOT.glob("tests/**/*.py")]
    assert [p.name for p in copies if p != Path(__file__) and "--fmad" in p.read_text()] == []
    assert "--fmad=false" in static_cuda.FLAGS
    assert (ROOT / "setup.py").read_text().count("--fmad=false") == 1


@pytest.mark.parametrize("version, said", [("76.1.0", True), ("68.0", True), ("77.0.1", False), ("80.9.0", False)])
def test_an_old_setuptools_is_one_line(tmp_path, version, said):
    (tmp_path / "setuptools.py").write_text(f"__version__ = {version!r}\ndef setup(**given): pass\n")
    done = run(ROOT / "setup.py", PYTHONPATH=str(tmp_path), FLOWMATCH_KERNELS_NO_EXT="1")
    wanted = (
        f"flowmatch_kernels needs setuptools >= 77 to build, and this is {version}: pip install --upgrade setuptools"
    )
    assert (done.returncode, done.stderr.strip()) == ((1, wanted) if said else (0, ""))


def test_the_source_distribution_holds_what_tests_open(tmp_path):
    done = run("setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, FLOWMATCH_KERNELS_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    held = set((tmp_path / "flowmatch_kernels.egg-info" / "SOURCES.txt").read_text().split("\n"))
    wanted = {"Makefile", "CMakeLists.txt", "constraints.txt", "README.md", "pyproject.toml", "setup.py", "LICENSE"}
    wanted |= {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "flowmatch_kernels/py.typed"}
    wanted |= {"flowmatch_kernels/demo/flights.LICENSE"}
    for folder in ("flowmatch_kernels", "csrc", "tests", "bench", "docs"):
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.suffix in {".py", ".cpp", ".h", ".cu", ".md", ".npz", ".png"} and not {*parts} & {
                "results",
                "generated",
            }:
                wanted.add("/".join(parts))
    wanted -= {"flowmatch_kernels/_C.py", "flowmatch_kernels/_C_cuda.py"}
    assert wanted - held == set()


@pytest.fixture
def talking_compiler(tmp_path):
    """A C++ compiler that says a line, and makes an empty file of what it is asked for, or fails for one source."""
    script = tmp_path / "c++"
    script.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -c "*) echo "a raw compiler line";; esac\n'
        'if [ -n "$FAILS" ]; then case "$*" in *"$FAILS"*) echo "no such instruction"; exit 1;; esac; fi\n'
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


@pytest.mark.parametrize("quiet, fails", [(True, ""), (True, "launch.cpp"), (False, "")])
def test_quiet_keeps_the_compilers_lines(tmp_path, talking_compiler, quiet, fails):
    """`make` builds with --quiet: no line of ninja or a compiler, unless the build fails; then all, on stderr."""
    done = run(
        *["setup.py", *["--quiet"] * quiet, "build_ext"],
        *["--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"],
        CXX=str(talking_compiler),
        FAILS=fails,
        FLOWMATCH_KERNELS_REQUIRE_EXT="1",
        FLOWMATCH_KERNELS_NO_CUDA="1",
        TORCH_DONT_CHECK_COMPILER_ABI="1",
        MAX_JOBS="2",
    )
    assert (done.returncode != 0) == bool(fails), done.stderr
    line = "a raw compiler line"
    assert (line in done.stdout) == (not quiet)
    assert (line in done.stderr) == ("no such instruction" in done.stderr) == bool(fails)


# ---- what is installed and cannot be loaded ----

#: An import of the extension, or of a half of it, that ends as it does where a library is missing, or where there is
#: a module that says why there is none.
FAIL = """
import sys
class Fail:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise {error}
sys.meta_path.insert(0, Fail())
"""
MISSING = "ImportError('libtorch_cuda.so: cannot open shared object file: No such file or directory')"
UNDEFINED = "ImportError('_C.so: undefined symbol: aoti_torch_anything')"
NOT_BUILT = "ModuleNotFoundError('it was not built: there is no C++ compiler')"


def info(*prelude):
    code = "".join(prelude) + "import sys\nfrom flowmatch_kernels.__main__ import main\nsys.exit(main(['info']))"
    return run_code(code, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize("error", [MISSING, UNDEFINED], ids=["library", "symbol"])
def test_info_of_an_extension_that_cannot_be_loaded(error):
    done = info(FAIL.format(name=BOTH[0], error=error))
    assert done.returncode == 1, done.stdout + done.stderr
    words = error.split("'")[1]
    (cpu,) = [line for line in done.stdout.splitlines() if line.startswith("  cpu ")]
    for text in (cpu, done.stdout.partition("BROKEN: ")[2]):
        assert f"is installed and cannot be loaded: {words}" in text
        assert f"built for another torch; this is torch {torch.__version__}, {native.torch_build()}" in text
    assert "pip install --no-build-isolation --force-reinstall" in done.stdout.partition("BROKEN: ")[2]
    assert "Traceback" not in done.stderr


def test_info_of_a_pure_install():
    """No compiler is no fault."""
    done = info(FAIL.format(name=BOTH[0], error=NOT_BUILT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no C++ compiler" in done.stdout
    assert "BROKEN" not in done.stdout


#: (torch's CUDA, the extension's, what its CUDA half does) -> (the reason, whether that is a broken install)
HALVES = {
    ("13.0", "12.8", MISSING): ("was built with CUDA 12.8 and needs a torch of CUDA 12", True),
    ("12.6", "12.8", MISSING): ("_C_cuda is installed and cannot be loaded: libtorch_cuda.so", True),
    ("12.6", "12.8", NOT_BUILT): ("_C_cuda cannot be imported: it was not built", False),
    (None, "12.8", MISSING): ("was built with CUDA 12.8 and needs a torch of CUDA 12", False),
    ("12.6", None, MISSING): ("the extension was built without CUDA", False),
}


@needs_extension
@pytest.mark.parametrize("case", HALVES, ids=str)
def test_the_cpu_backend_outlives_the_cuda_half(case):
    """Whatever becomes of CUDA: `cpu` runs its self-test, and `cuda` says what is wrong."""
    (cuda, of_extension, error), (reason, broken) = case, HALVES[case]
    done = info(
        FAIL.format(name=BOTH[1], error=error),
        f"import torch\ntorch.version.cuda = {cuda!r}\n",
        "from flowmatch_kernels.ops import native\n",
        f"native._C.cuda_version = {of_extension!r}\n",
    )
    assert done.returncode == int(broken), done.stdout + done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert "exact" in lines["cpu"]
    assert reason in lines["cuda"]
    assert ("BROKEN" in done.stdout) is broken


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="links as Linux does")
@pytest.mark.full  # each builds an extension
@pytest.mark.parametrize("stream", [True, False], ids=["libtorch_cuda", "no libtorch_cuda"])
def test_the_cuda_half_is_taken_when_it_loads(stream):
    """csrc/launch_cuda.cpp itself, with a double for the kernel; torch's own CUDA library is there, or not."""
    torch_double = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }' if stream else ""
    kernel = (
        "namespace flowmatch_kernels {\n"
        "void fused_step_cuda(const Operands&, Dtypes, int, void*) {}\n"
        "void keyed_noise_cuda(const NoiseOperands&, Dtype, int, void*) {}\n"
        "void step_log_prob_cuda(const LogProbOperands&, Dtype, Dtype, int, void*) {}\n"
        "}\n"
    )
    headers = [Path(torch.__file__).parent / "include", Path(sysconfig.get_paths()["include"]), ROOT / "csrc"]
    sources = [ROOT / "csrc" / "launch_cuda.cpp", *sorted((ROOT / "csrc").glob("*.h"))]

    def make(path):
        double = path.with_suffix(".cpp")
        double.write_text(f'#include "launch_cuda.cpp"\n{kernel}{torch_double}\n')
        flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-fvisibility=hidden", *[f"-I{h}" for h in headers]]
        command = [os.environ.get("CXX", "c++"), *flags, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        subprocess.run([*command, str(double), "-o", str(path)], check=True)

    path = build_cache.built("_C_cuda.so", [kernel, torch_double, torch.__version__, sys.version, *sources], make)
    done = info(
        "import importlib.util, sys\n"
        "import torch\n"
        "torch.version.cuda = '12.8'\n"
        "from flowmatch_kernels.ops import native\n"
        "native._C.cuda_version, native._C.cuda_archs = '12.8', '9.0'\n"
        "class Find:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {BOTH[1]!r}:\n"
        f"            return importlib.util.spec_from_file_location(name, {str(path)!r})\n"
        "sys.meta_path.insert(0, Find())\n"
    )
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert "exact" in lines["cpu"]
    if stream:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "it is built for 9.0, and there is no CUDA" in lines["cuda"]
    else:
        assert done.returncode == 1, done.stdout + done.stderr
        assert "undefined symbol: aoti_torch_get_current_cuda_stream" in lines["cuda"]


@needs_extension
def test_only_its_own_capsule_is_taken():
    extension = importlib.import_module(BOTH[0])
    for wrong in (None, 3, torch.zeros(1).__dlpack__()):
        with pytest.raises((TypeError, ValueError), match="PyCapsule"):
            extension.use_cuda(wrong)
        with pytest.raises((TypeError, ValueError), match="PyCapsule"):
            extension.keyed_noise_cuda(wrong, *[0] * 7)
        with pytest.raises((TypeError, ValueError), match="PyCapsule"):
            extension.step_log_prob_cuda(wrong, *[0] * 12)
