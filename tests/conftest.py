"""What every test shares: a clean table cache, torch's defaults put back, and whether a GPU must be there."""

import functools
import gc
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))  # published.py and operands.py
sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))  # flowmatch_kernels, where it is not installed

import build_cache
import operands

# Triton's own cache, by sources, options and versions: it belongs to this clone, as all that tests compile.
os.environ.setdefault("TRITON_CACHE_DIR", str(build_cache.FOLDER / "triton"))

# torch.compile's caches belong to this clone too. Their keys hold an op's name, and neither its schema nor what it
# does: in torch's own place, one for all clones, a graph was found that calls another revision's op. So a tag.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(build_cache.FOLDER / "inductor"))
# Else the first graph starts a pool of processes, each of which imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
_ops = build_cache.digest(sorted(build_cache.ROOT.glob("flowmatch_kernels/ops/*.py")))
os.environ.setdefault("TORCH_COMPILE_CACHE_KEY_TAG", _ops)

#: Run first: a worker gets a file at a time, and one of these at the end would leave the other workers with nothing.
SLOWEST = (
    "test_cuda_host.py",
    "test_ptx_cuda.py",
    "test_exactness.py",
    "test_cuda_compiled.py",
    "test_bench.py",
    "test_triton_interpreter.py",
    "test_tracing.py",
    "test_fitting.py",
    "test_package.py",
    "test_distributed.py",
    "test_setup.py",
    "test_sample.py",
    "test_demo.py",
    "test_ops.py",
    "test_guidance.py",
    "test_differentiable.py",
    "test_subclasses.py",
    "test_static_triton.py",
)
BACKENDS = ("cpu", "reference")
REQUIRE_GPU = "FLOWMATCH_KERNELS_REQUIRE_GPU"
NO_DEVICE = "there is no CUDA or ROCm device"
_gpu_run = pytest.StashKey["GpuRun"]()


class GpuRun:
    """Which GPU tests ran, and which did not for want of a GPU.

    With pytest-xdist (`make test`) the workers collect and run the tests, and the controller judges the run: it hands
    the workers what is required, hears every report, and is told at each worker's end what that left out.
    """

    def __init__(self, config):
        self.config = config
        self.is_worker = hasattr(config, "workerinput")
        # Taken out of the environment: a test that starts pytest on some tests of its own is not asked for a GPU.
        asked = os.environ.pop(REQUIRE_GPU, "0")
        self.required = config.workerinput[REQUIRE_GPU] if self.is_worker else asked not in ("", "0")
        self.ran = 0
        self.left_out = 0

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput[REQUIRE_GPU] = self.required

    @pytest.hookimpl(trylast=True)  # what -k and -m leave
    def pytest_collection_modifyitems(self, items):
        """Tests marked `gpu` are left out where there is none, unless they are required: then each fails."""
        if self.required or torch.cuda.is_available():
            return
        left_out = [item for item in items if item.get_closest_marker("gpu") is not None]
        if left_out:
            items[:] = [item for item in items if item.get_closest_marker("gpu") is None]
            self.config.hook.pytest_deselected(items=left_out)
        self.left_out = len(left_out)

    def pytest_runtest_setup(self, item):
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            pytest.fail(f"{REQUIRE_GPU}=1 is set, and {NO_DEVICE}", pytrace=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        # An attribute of the report's own, which goes from a worker to the controller with it.
        report.ran_on_gpu = call.when == "call" and item.get_closest_marker("gpu") is not None
        return report

    def pytest_runtest_logreport(self, report):
        self.ran += getattr(report, "ran_on_gpu", False) and report.outcome != "skipped"

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        # Every worker collects all tests. One that broke down tells nothing.
        self.left_out = max(self.left_out, getattr(node, "workeroutput", {}).get("left_out", 0))

    def none_ran(self):
        return self.required and not self.ran and not self.config.option.collectonly

    def pytest_sessionfinish(self, session):
        """No GPU test run, where one is required, is a failure, whatever else has passed."""
        if self.is_worker:
            self.config.workeroutput["left_out"] = self.left_out
            return
        passed = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self.none_ran() and passed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif self.left_out and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK  # GPU tests alone were asked for

    def pytest_terminal_summary(self, terminalreporter):
        if self.left_out:
            terminalreporter.write_line(f"{self.left_out} GPU tests left out: {NO_DEVICE}")
        if self.none_ran():
            terminalreporter.write_line(f"FAILED: {REQUIRE_GPU}=1 is set, and no GPU test ran", red=True)


def pytest_collection_modifyitems(items):
    places = {name: k for k, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish():
    """What is there now stays to the end: a garbage collection, by a test or by Python, need not go through it."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    config.stash[_gpu_run] = GpuRun(config)
    config.pluginmanager.register(config.stash[_gpu_run])


@pytest.fixture
def require_gpu(request):
    """Whether a GPU test that cannot run must fail, and not skip."""
    return request.config.stash[_gpu_run].required


@pytest.fixture
def kept_disassemblies(monkeypatch):
    """What bench.static disassembles is disassembled once."""
    from bench import static

    kept = functools.partial(build_cache.disassembled, static.disassembled)
    monkeypatch.setattr(static, "disassembled", kept)


@pytest.fixture(autouse=True)
def defaults():
    """Each test starts from, and leaves behind, torch's defaults, an empty cache and nothing told."""
    from flowmatch_kernels import solvers
    from flowmatch_kernels.ops import dispatch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    solvers.cache.clear()
    dispatch._logged.clear()
    operands.manual_seed(0)
    # Where other programs hold the cores, a second thread makes small tensors a hundred times slower. The tests
    # of threads ask for two.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_flush_denormal(False)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that runs on the CPU. A build without the extension must fail here, not skip."""
    return request.param
