"""What every test shares: a clean table cache, torch's defaults put back, and whether a GPU must be there."""

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))  # published.py and operands.py
sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))  # flowmatch_kernels, where it is not installed

BACKENDS = ("cpu", "reference")
REQUIRE_GPU = "FLOWMATCH_KERNELS_REQUIRE_GPU"
_required = pytest.StashKey[bool]()
_ran = pytest.StashKey[list[str]]()


def pytest_configure(config):
    # Taken out of the environment: a test that starts pytest on some tests of its own is not asked for a GPU.
    config.stash[_required] = os.environ.pop(REQUIRE_GPU, "0") not in ("", "0")
    config.stash[_ran] = []


def pytest_runtest_setup(item):
    """A test marked `gpu` runs only where there is one; on a machine that is told it has one, it fails without."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if item.config.stash[_required]:
        pytest.fail(f"{REQUIRE_GPU}=1 is set, and there is no CUDA or ROCm device", pytrace=False)
    pytest.skip("there is no CUDA or ROCm device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.outcome != "skipped" and item.get_closest_marker("gpu") is not None:
        item.config.stash[_ran].append(item.nodeid)
    return report


def _no_gpu_test_ran(config):
    return config.stash[_required] and not config.stash[_ran] and not config.option.collectonly


def pytest_sessionfinish(session):
    """No GPU test run, where one is required, is a failure, whatever else has passed."""
    config = session.config
    if _no_gpu_test_ran(config) and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if _no_gpu_test_ran(config):
        terminalreporter.write_line(f"FAILED: {REQUIRE_GPU}=1 is set, and no GPU test ran", red=True)


@pytest.fixture
def require_gpu(request):
    """Whether a GPU test that cannot run must fail, and not skip."""
    return request.config.stash[_required]


@pytest.fixture(autouse=True)
def defaults():
    """Each test starts from, and leaves behind, torch's defaults, an empty cache and nothing told."""
    from flowmatch_kernels import solvers
    from flowmatch_kernels.ops import dispatch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    solvers.cache.clear()
    dispatch._logged.clear()
    torch.manual_seed(0)
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
