"""bench/gpu.py: its JSON from recorded data, and the way of a whole run, on the CPU."""

import json

import pytest
import torch
from operands import assert_same_bits

from bench import gpu

# Recorded from pytest 9: a test that passed, two that skipped, one that failed, one in error, one in both.
JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite name="pytest" errors="2"
failures="2" skipped="2" tests="6" time="12.5">
<testcase classname="tests.test_gpu" name="test_sample[cuda-triton]" time="1.25" />
<testcase classname="tests.test_gpu" name="test_second_device[cuda-cuda]" time="0.01"><skipped type="pytest.skip"
 message="needs two GPUs: this machine has one">tests/test_gpu.py:463: needs two GPUs</skipped></testcase>
<testcase classname="tests.test_gpu" name="test_sample[cuda-cuda]" time="0"><skipped type="pytest.skip"
 message="backend cuda: the extension was built without CUDA">x</skipped></testcase>
<testcase classname="tests.test_gpu" name="test_graph[cuda-triton]" time="2"><failure
 message="AssertionError: replay 0: 3 of 768 elements differ">Traceback</failure></testcase>
<testcase classname="tests.test_gpu" name="test_auto[cuda]" time="0.5"><error
 message="failed on setup with RuntimeError">Traceback</error></testcase>
<testcase classname="tests.test_gpu" name="test_both" time="0.5"><failure message="wrong">Traceback</failure><error
 message="failed on teardown">Traceback</error></testcase>
</testsuite></testsuites>"""

CASE = gpu.Case("alpamayo", 6, (64, 2), torch.bfloat16, guided=True, trajectory=True)


def test_tests_of_recorded_junit():
    found = gpu.tests_of(JUNIT)
    assert (found["passed"], found["skipped"], found["failed"]) == (1, 2, 3)
    assert found["seconds"] == 4.3
    assert [(entry["test"].split("::")[1], entry["outcome"]) for entry in found["not_passed"]] == [
        ("test_second_device[cuda-cuda]", "skipped"),
        ("test_sample[cuda-cuda]", "skipped"),
        ("test_graph[cuda-triton]", "failed"),
        ("test_auto[cuda]", "failed"),
        ("test_both", "failed"),
    ]
    assert found["not_passed"][0]["reason"] == "needs two GPUs: this machine has one"


def test_bytes():
    """base, v and out; guided u too; trajectory the slot too."""
    numel = 6 * 64 * 2
    assert gpu.Case("", 6, (64, 2), torch.float32).bytes == 12 * numel
    assert gpu.Case("", 6, (64, 2), torch.bfloat16).bytes == 10 * numel
    assert CASE.bytes == 16 * numel


def test_timing():
    """Ten evaluations in 50 us and 20 us, on a device that copies 10 GB/s."""
    row = gpu.timing(CASE, "triton", 50e-6, 20e-6, 10e9)
    assert row["eager_us_per_evaluation"] == 5.0
    assert row["graph_us_per_evaluation"] == 2.0
    assert row["graph_percent_of_copy"] == pytest.approx(100 * 16 * 768 / 2e-6 / 10e9, abs=0.05)
    assert row["error"] is None
    assert "eager      5.00 us" in gpu._line(row)


def test_timing_of_what_went_wrong():
    row = gpu.timing(CASE, "triton", "other bits than the published loop's", None, 1e9)
    assert row["error"] == "eager: other bits than the published loop's"
    assert not any(key.endswith("per_evaluation") and "us" in key for key in row)
    row = gpu.timing(CASE, "triton", 50e-6, "RuntimeError: not permitted when stream is capturing", 1e9)
    assert row["error"].startswith("graph: RuntimeError")
    assert row["eager_us_per_evaluation"] == 5.0


def report(**parts):
    good = {
        "tests": {"pytest": 0, "passed": 9, "failed": 0},
        "self_tests": {"triton": "288 cases, exact"},
        "timings": [],
    }
    return good | parts


def test_failures():
    assert gpu.failures(report()) == []
    assert gpu.failures(report(tests=None)) == []
    (told,) = gpu.failures(report(tests={"pytest": 1, "passed": 9, "failed": 3}))
    assert "3 failed" in told
    stopped = gpu.failures(report(tests={"pytest": "stopped after 420 seconds", "passed": 0, "failed": 0}))
    assert stopped == ["pytest: stopped after 420 seconds, 0 failed", "no test passed"]
    (told,) = gpu.failures(report(self_tests={"cuda": "FAILED: 3 of 1285 values of out differ"}))
    assert told == "self-test of cuda: FAILED: 3 of 1285 values of out differ"
    (told,) = gpu.failures(report(timings=[gpu.timing(CASE, "cuda", "other bits", None, 1e9)]))
    assert "other bits" in told


@pytest.mark.parametrize("case", list(gpu.cases(small=True)), ids=str)
def test_what_is_timed_is_equal(case):
    problem = gpu.Problem(case, torch.device("cpu"))
    methods = problem.methods()
    assert {"published", "best eager", "cpu", "reference"} <= methods.keys()
    wanted = methods.pop("published")()
    for name, function in methods.items():
        assert_same_bits(function(), wanted, name)


def test_other_bits_are_not_timed(monkeypatch):
    """A backend that is wrong gives a row with an error, no timing, and exit code 1."""
    monkeypatch.setattr(gpu.Problem, "best_eager", lambda self: self.published() + 1)
    rows = list(gpu.timings(torch.device("cpu"), small=True, budget=1e-4, tell=lambda line: None))
    wrong = [row for row in rows if row["error"]]
    assert {row["method"] for row in wrong} == {"best eager"}
    assert len(wrong) == 10
    assert not any("eager_us_per_evaluation" in row for row in wrong)


def test_whole_run(tmp_path, capsys):
    file = tmp_path / "new folder" / "gpu.json"
    assert gpu.main(["--device", "cpu", "--tests", "", "--output", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert written["backends"]["cpu"] is None
    assert written["self_tests"]["cpu"].endswith("exact")
    assert written["failures"] == []
    methods = {row["method"] for row in written["timings"]}
    assert {"published", "best eager", "cpu", "reference"} <= methods
    assert len(written["timings"]) == 10 * len(methods)
    assert "all well" in capsys.readouterr().out


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no CUDA or ROCm device" in capsys.readouterr().err
