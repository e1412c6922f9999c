"""A run without a GPU leaves GPU tests out and says so; FLOWMATCH_KERNELS_REQUIRE_GPU=1: that is a failure.

Pytest on files of its own.
"""

import sys
from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]

ON_GPU = "@pytest.mark.gpu\ndef test_on_gpu():\n    {}\n"
ON_CPU = "def test_on_cpu():\n    pass\n"
VARIABLE = "FLOWMATCH_KERNELS_REQUIRE_GPU"
NO_GPU_TEST_RAN = f"FAILED: {VARIABLE}=1 is set, and no GPU test ran"
NO_DEVICE = "there is no CUDA or ROCm device"
LEFT_OUT = f"GPU tests left out: {NO_DEVICE}"
#: As `make test` runs pytest: a controller and its workers.
TWO_PROCESSES = ("-n", "2", "--dist", "loadfile")
# Without plugins that take seconds at the end of every run: one collects garbage, one imports all of hypothesis.
OPTIONS = ("-ra", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:hypothesispytest")


@pytest.fixture
def outcome(pytester, monkeypatch):
    """Runs pytest, with this folder's conftest.py, on a file: its exit status, counts, and what it prints."""

    def run(tests, required, *arguments, gpu, other_tests=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setenv(VARIABLE, required)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.delitem(sys.modules, "conftest", raising=False)
        conftest = Path(__file__).with_name("conftest.py")
        # Said in the file, for the workers too, where there are any: they are processes of their own, and pytest-xdist
        # gives them the sys.path that it was imported with, in which this folder is not.
        beside = f"import sys\n\nsys.path.insert(0, {str(conftest.parent)!r})\n"
        pytester.makeconftest(f"{beside}{conftest.read_text()}\n\ntorch.cuda.is_available = lambda: {gpu}\n")
        pytester.makeini("[pytest]\nmarkers = gpu\n")
        files = {"test_it": tests} | ({} if other_tests is None else {"test_other": other_tests})
        pytester.makepyfile(**{name: "import os\nimport pytest\n\n" + text for name, text in files.items()})
        result = pytester.runpytest_inprocess(*OPTIONS, *arguments)
        return int(result.ret), result.parseoutcomes(), result.stdout.str()

    return run


@pytest.mark.parametrize("asked", ["", "0"])
def test_without_a_gpu(outcome, asked):
    status, counts, output = outcome(ON_CPU + ON_GPU.format("pass"), asked, gpu=False)
    assert status == 0
    assert counts == {"passed": 1, "deselected": 1}
    assert f"1 {LEFT_OUT}" in output
    assert "SKIPPED" not in output


def test_without_a_gpu_and_gpu_tests_alone(outcome):
    """As when each skipped: no failure. What -k leaves out is not counted."""
    tests = ON_GPU.format("pass") + ON_GPU.format("pass").replace("on_gpu", "on_another")
    status, counts, output = outcome(tests, "0", "-k", "another", gpu=False)
    assert status == 0
    assert counts == {"deselected": 2}
    assert f"1 {LEFT_OUT}" in output


def test_with_a_gpu(outcome):
    status, counts, output = outcome(ON_CPU + ON_GPU.format("pass"), "0", gpu=True)
    assert status == 0
    assert counts == {"passed": 2}
    assert LEFT_OUT not in output


def test_required_without_a_gpu(outcome):
    status, counts, output = outcome(ON_CPU + ON_GPU.format("pass"), "1", gpu=False)
    assert status == 1
    assert counts == {"passed": 1, "errors": 1}
    assert f"{VARIABLE}=1 is set, and {NO_DEVICE}" in output
    assert NO_GPU_TEST_RAN in output


def test_required_with_a_gpu(outcome):
    status, counts, output = outcome(ON_CPU + ON_GPU.format("pass"), "1", gpu=True)
    assert status == 0
    assert counts == {"passed": 2}
    assert NO_GPU_TEST_RAN not in output


def test_a_failure_is_a_run(outcome):
    status, counts, output = outcome(ON_CPU + ON_GPU.format("assert False"), "1", gpu=True)
    assert status == 1
    assert counts == {"passed": 1, "failed": 1}
    assert NO_GPU_TEST_RAN not in output


@pytest.mark.parametrize("arguments", [[], ["-k", "on_cpu"]], ids=["all_skipped", "none_selected"])
def test_none_ran(outcome, arguments):
    """With a GPU, but every GPU test skips, or none is selected: what else has passed does not help."""
    status, counts, output = outcome(ON_CPU + ON_GPU.format("pytest.skip('broken')"), "1", *arguments, gpu=True)
    assert status == 1
    assert counts["passed"] == 1
    assert NO_GPU_TEST_RAN in output


def test_none_collected(outcome):
    status, _, output = outcome(ON_CPU, "1", "-m", "gpu", gpu=True)
    assert status == 1
    assert NO_GPU_TEST_RAN in output


def test_children_are_not_asked(outcome):
    """A test that runs pytest on tests of its own, none of them a GPU test, does not fail for that."""
    status, counts, _ = outcome(ON_GPU.format(f"assert {VARIABLE!r} not in os.environ"), "1", gpu=True)
    assert status == 0
    assert counts == {"passed": 1}


# ---- in two processes ----


def test_two_processes_without_a_gpu(outcome):
    """The workers leave tests out, the controller says so: once, though each of them collects all."""
    tests = ON_CPU + ON_GPU.format("pass")
    status, counts, output = outcome(tests, "0", *TWO_PROCESSES, gpu=False, other_tests=tests)
    assert status == 0
    assert counts == {"passed": 2}
    assert output.count(LEFT_OUT) == 1
    assert f"2 {LEFT_OUT}" in output


@pytest.mark.full
def test_two_processes_required_with_a_gpu(outcome):
    """The GPU test runs in one worker; that the other ran none is no failure, nor are their children asked."""
    on_gpu = ON_GPU.format(f"assert {VARIABLE!r} not in os.environ")
    status, counts, output = outcome(on_gpu, "1", *TWO_PROCESSES, gpu=True, other_tests=ON_CPU)
    assert status == 0
    assert counts == {"passed": 2}
    assert NO_GPU_TEST_RAN not in output


def test_two_processes_required_without_a_gpu(outcome):
    """The workers are told that a GPU is required, and the controller that none of their tests ran."""
    status, counts, output = outcome(ON_GPU.format("pass"), "1", *TWO_PROCESSES, gpu=False, other_tests=ON_CPU)
    assert status == 1
    assert counts == {"passed": 1, "errors": 1}
    assert f"{VARIABLE}=1 is set, and {NO_DEVICE}" in output
    assert NO_GPU_TEST_RAN in output


@pytest.mark.full
def test_two_processes_none_ran(outcome):
    """Every GPU test skips: only the controller, which hears of the others' success, can fail the run."""
    on_gpu = ON_GPU.format("pytest.skip('broken')")
    status, counts, output = outcome(on_gpu, "1", *TWO_PROCESSES, gpu=True, other_tests=ON_CPU)
    assert status == 1
    assert counts == {"passed": 1, "skipped": 1}
    assert NO_GPU_TEST_RAN in output
