"""bench/gpu.py and bench/device_clock.py: the JSON from recorded data, and the way of a whole run, on the CPU."""

import json
import os
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch

from bench import contestants, device_clock, gpu
from bench.__main__ import main
from bench.device_clock import Launches
from bench.work import ALPAMAYO, Work

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

WORK = Work(ALPAMAYO, "guided trajectory", velocity=torch.bfloat16)


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
    assert Work(ALPAMAYO).step_bytes == 12 * numel
    assert Work(ALPAMAYO, velocity=torch.bfloat16).step_bytes == 10 * numel
    assert WORK.step_bytes == 16 * numel


#: Recorded as seconds of ten steps, on a device that copies 10 GB/s.
SPANS = {"eager warm": 50e-6, "eager cold": 80e-6, "graph warm": 20e-6, "graph cold": 40e-6}


def test_timing():
    row = gpu.timing(WORK, "ours, triton", 10e9, SPANS, 45e-6, Launches(12, 0, 1), 1 << 20)
    assert [row[f"{span}_us_per_step"] for span in gpu.SPANS] == [5.0, 8.0, 2.0, 4.0]
    rate = 16 * 768 / 2e-6
    # abs=0.05: the rows are rounded to one decimal.
    assert row["graph_warm_gb_per_s"] == pytest.approx(rate / 1e9, abs=0.05)
    assert row["graph_warm_percent_of_copy"] == pytest.approx(100 * rate / 10e9, abs=0.05)
    assert row["eager_cold_gb_per_s"] == pytest.approx(rate / 4e9, abs=0.05)
    assert row["host_us_per_step"] == 4.5
    assert (row["kernels"], row["copies_from_host"], row["other_copies"]) == (12, 0, 1)
    assert row["peak_bytes"] == 1 << 20
    assert row["error"] is None
    assert "graph warm      2.00 us  61.4%" in gpu.line(row)
    json.dumps(row)


def test_timing_of_what_went_wrong():
    row = gpu.timing(WORK, "ours, triton", 1e9, {"eager": "other bits than the published loop's in 3 values"})
    assert row["error"] == "eager: other bits than the published loop's in 3 values"
    assert not any("us_per_step" in key for key in row)
    row = gpu.timing(WORK, "ours, triton", 1e9, {"eager warm": 50e-6, "graph": "RuntimeError: not permitted"})
    assert row["error"] == "graph: RuntimeError: not permitted"
    assert row["eager_warm_us_per_step"] == 5.0


def test_markdown():
    rows = [
        gpu.timing(WORK, "ours, triton", 10e9, SPANS, 45e-6, Launches(12, 0, 1)),
        gpu.timing(WORK, "ours, cuda", 10e9, {"eager": "ValueError: no"}),
    ]
    text = gpu.markdown(
        report(timings=rows, versions={"torch": "2.13"}, device={"name": "a GPU"}, copy_gb_per_s=10.0, failures=["x"])
    )
    work = "[6, 64, 2], guided trajectory, bfloat16"
    assert (
        f"| {work} | ours, triton | 5.0 (24.6%) | 8.0 (15.4%) | 2.0 (61.4%) | 4.0 (30.7%) | 4.5 | 12 | 0 |  |" in text
    )
    assert f"| {work} | ours, cuda |  |  |  |  |  |  |  | eager: ValueError: no |" in text
    assert "- a copy moves 10.0 GB/s" in text
    assert "- **FAILED**: x" in text


#: As Kineto names what runs on an NVIDIA device.
NAMES = [
    "Memcpy HtoD (Pageable -> Device)",
    "void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::direct_copy>>(int)",
    "fused_step_kernel",
    "fused_step_kernel",
    "Memcpy DtoD (Device -> Device)",
    "Memset (Device)",
    "Memcpy DtoH (Device -> Pageable)",
]


def test_launches_of_recorded_names():
    assert device_clock.launches(NAMES) == Launches(kernels=3, copies_from_host=1, other_copies=3)
    assert device_clock.launches([]) == (0, 0, 0)


class Event:
    """A CUDA event of a device whose clock is the list of what was launched: 1 ms each."""

    def __init__(self, launched):
        self.launched = launched

    def record(self):
        self.at = len(self.launched)

    def elapsed_time(self, stop):
        return float(stop.at - self.at)


def test_cold_is_timed_after_the_flush(monkeypatch):
    """With recorded events: of a flush and two launches, the two launches are timed, each time after a flush."""
    launched = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(launched))
    monkeypatch.setattr(device_clock, "wait", lambda device: None)
    span = device_clock.seconds(
        lambda: launched.extend(["kernel", "kernel"]), torch.device("cuda"), 0.0, lambda: launched.append("flush")
    )
    assert span == 2e-3
    assert launched[6:] == ["flush", "kernel", "kernel"] * 6


def test_flush_writes_twice_the_cache(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(torch, "empty", lambda size, **keywords: asked.append(size) or SimpleNamespace(zero_="zero"))
    assert device_clock.flush(torch.device("cuda")) == "zero"
    assert asked == [100 << 20]


def test_host_seconds_starts_with_an_idle_device(monkeypatch):
    order = []
    monkeypatch.setattr(device_clock, "wait", lambda device: order.append("wait"))
    device_clock.host_seconds(lambda: order.append("call"), torch.device("cuda"), 0.0)
    assert order == ["call", *["wait", "call"] * 5, "wait"]


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
    (told,) = gpu.failures(report(timings=[gpu.timing(WORK, "ours, cuda", 1e9, {"eager": "other bits"})]))
    assert "other bits" in told


def test_other_bits_are_not_timed(monkeypatch):
    """A backend that is wrong gives a row with an error, no timing, and exit code 1."""
    right = contestants.ours
    monkeypatch.setattr(
        contestants, "ours", lambda name, p: (lambda: right(name, p)() + 1) if name == "reference" else right(name, p)
    )
    rows = list(gpu.timings(torch.device("cpu"), 1e9, small=True, budget=1e-4, tell=lambda line: None))
    wrong = [row for row in rows if row["error"]]
    assert {row["contestant"] for row in wrong} == {"ours, reference"}
    assert len(wrong) == 12
    assert not any("eager_warm_us_per_step" in row for row in wrong)
    assert all("eager_cold_us_per_step" in row for row in rows if row not in wrong)


def test_whole_run(tmp_path, capsys, monkeypatch):
    """By the one command; `python -m bench.gpu` is the same with a file of one's choice."""
    assert main(["--gpu", "--device", "cpu", "--tests", "", "--output", str(tmp_path / "new folder")]) == 0
    written = json.loads((tmp_path / "new folder" / "gpu.json").read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert written["backends"]["reference"] is None
    assert written["failures"] == []
    names = {row["contestant"] for row in written["timings"]}
    assert {"published loop", "by hand, in place", "by hand, out=", "ours, reference"} <= names
    for name in ("published loop", "by hand, same bits", "ours, reference"):
        assert sum(row["contestant"] == name for row in written["timings"]) == 12
    for name in ("ours, step_fn graphed", "ours, solver graphed"):
        assert [row["shape"] for row in written["timings"] if row["contestant"] == name] == [[6, 64, 2], [1, 50, 32]]
    assert {row["kernels"] for row in written["timings"] if "kernels" in row} == set()  # counted on a GPU alone
    assert "all well" in capsys.readouterr().out
    assert "| ours, reference |" in (tmp_path / "new folder" / "gpu.md").read_text()
    kept = []

    def cut_short(device, expression, small, budget, save):
        assert (device.type, expression, small, budget) == ("cpu", "", True, 0.02)
        grown = []
        monkeypatch.setattr(gpu, "timings", lambda *_: iter(written["timings"][:3]))
        measure(device, expression, small, budget, lambda found: grown.append(json.loads(json.dumps(found))))
        kept.extend(grown)
        save(grown[-2])
        raise KeyboardInterrupt

    measure = gpu.measure
    monkeypatch.setattr(gpu, "measure", cut_short)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--tests", "", "--output", str(tmp_path / "other" / "a.json")])
    assert json.loads((tmp_path / "other" / "a.json").read_text()) == kept[-2]
    assert [path.name for path in sorted((tmp_path / "other").iterdir())] == ["a.json", "a.md"]
    assert [len(found["timings"]) for found in kept[-5:]] == [0, 1, 2, 3, 3]
    assert kept[0]["copy_gb_per_s"] is None
    assert gpu.markdown(kept[0]).count("a copy moves") == 0
    assert {tuple(found["failures"]) for found in kept[:-1]} == {("the run did not finish",)}
    assert kept[-1]["failures"] == []


def test_tests_are_counted_as_they_come(tmp_path, monkeypatch):
    """Of a run that is stopped at its limit, what had ended; there is no XML then. Here the limit is a test's end."""

    class Limit(threading.Thread):
        def __init__(self, seconds, function):
            super().__init__(target=lambda: reached.wait(seconds) and function())

        def cancel(self):
            pass

    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest, time\n"
        "def test_a(): pass\n"
        "def test_b(): assert 0\n"
        "def test_c(): pytest.skip('no such GPU')\n"
        "def test_d(): time.sleep(600)\n"
    )
    lines, reached = [], threading.Event()

    def tell(line):
        lines.append(line)
        if "test_c SKIPPED" in line:
            reached.set()

    with monkeypatch.context() as patched:
        patched.setattr(gpu, "threading", SimpleNamespace(Timer=Limit))
        found = gpu.run_tests("not full", 300, tell, str(file))
    assert found["pytest"] == "stopped after 300 seconds"
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert [entry["test"].split("::")[1] for entry in found["not_passed"]] == ["test_b", "test_c"]
    assert any("test_a PASSED" in line for line in lines)
    file.write_text("def test_a(): pass\n")
    whole = gpu.run_tests("not full", 300, tell, str(file))
    assert (whole["pytest"], whole["passed"], whole["failed"]) == (0, 1, 0)
    assert whole["seconds"] is not None


def test_where_nvcc_is_found_make_gpu_wants_cuda_built(tmp_path):
    """Else a CUDA half that cannot be built is one backend less, in silence."""
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    for folder, wanted in ((tmp_path, True), (tmp_path / "empty", False)):
        environment = os.environ | {"PATH": f"{folder}:/usr/bin:/bin", "CUDA_HOME": "", "CUDA_PATH": ""}
        for target in ("gpu", "gpu-memory"):
            command = ["make", "--dry-run", "--always-make", target]
            done = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True, check=True)
            assert ("FORCE_CUDA=1" in done.stdout) is wanted, done.stdout


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no CUDA or ROCm device" in capsys.readouterr().err
