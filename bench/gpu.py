"""Everything a person with a GPU should run once: `make gpu`, under ten minutes, one JSON file.

    python -m bench.gpu [--output FILE] [--tests EXPRESSION] [--device cuda]

Tests (those marked `gpu`, in a pytest of their own), versions, device, and timings by CUDA events: the published loop,
the best eager PyTorch that gives its bits, and each backend; launched from Python, and captured in a CUDA graph. What
is timed is first checked against the published loop, to the last bit. step_fn is free: it returns one and the same v.

`--device cpu --tests ''` goes the same way without a GPU, to see that it works.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flowmatch_kernels
from flowmatch_kernels import FlowMatching, available_backends
from flowmatch_kernels.diagnostics import self_test
from flowmatch_kernels.ops.dispatch import BACKENDS

ROOT = Path(__file__).parent.parent
OUTPUT = Path("bench", "results", "gpu.json")
STEPS = 10
WEIGHT = 1.5
TESTS_LIMIT = 420  # seconds: the timings take about one minute more


class Case(NamedTuple):
    """What is sampled."""

    name: str
    batch_size: int
    x_dims: tuple[int, ...]
    velocity: torch.dtype
    guided: bool = False
    trajectory: bool = False

    @property
    def bytes(self) -> int:
        """The least bytes that one evaluation moves: float32 state read and written, v and u read, slot written."""
        numel = self.batch_size * math.prod(self.x_dims)
        return numel * (4 * (2 + self.trajectory) + self.velocity.itemsize * (1 + self.guided))


def cases(small: bool = False) -> Iterator[Case]:
    """Alpamayo's shape, and one far beyond any L2; `small`: no larger than a CPU finishes at once."""
    for name, batch_size, x_dims in (("alpamayo", 6, (64, 2)), ("large", 64, (64,) if small else (1 << 19,))):
        yield Case(name, batch_size, x_dims, torch.float32)
        for guided in (False, True):
            for trajectory in (False, True):
                yield Case(name, batch_size, x_dims, torch.bfloat16, guided, trajectory)


# ---- what is timed ----


class Problem:
    """A case's tensors on a device, and each way to sample it: method -> a function that returns the result."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)

        def random(dtype: torch.dtype) -> Tensor:
            shape = (case.batch_size, *case.x_dims)
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)

        self.noise, self.v, self.u = random(torch.float32), random(case.velocity), random(case.velocity)
        ones = [1] * len(case.x_dims)
        grid = torch.linspace(0.0, 1.0, STEPS + 1, device=device)
        self.times = grid.view(-1, 1, *ones).expand(-1, case.batch_size, *ones).unbind()
        self.dt = torch.diff(grid).view(-1, 1, *ones).unbind()

    def step_fn(self, x: Tensor, t: Tensor) -> Tensor:
        return self.v

    def unguided_step_fn(self, x: Tensor, t: Tensor) -> Tensor:
        return self.u

    def published(self) -> Tensor:
        """The loop as Alpamayo publishes it."""
        case, x = self.case, self.noise
        ones, states = [1] * len(case.x_dims), [x]
        grid = torch.linspace(0.0, 1.0, STEPS + 1, device=self.device)
        for i in range(STEPS):
            dt = (grid[i + 1] - grid[i]).view(1, *ones).expand(case.batch_size, *ones)
            t = grid[i].view(1, *ones).expand(case.batch_size, *ones)
            v = self.step_fn(x=x, t=t)
            if case.guided:
                v = (1 - WEIGHT) * self.unguided_step_fn(x=x, t=t) + WEIGHT * v
            x = x + dt * v
            states.append(x)
        return torch.stack(states, dim=1) if case.trajectory else x

    def best_eager(self) -> Tensor:
        """The same bits with the fewest launches eager PyTorch allows: in place, dt and t ready, no stack."""
        case, x, product = self.case, self.noise.clone(), torch.empty_like(self.noise)
        states = x.new_empty(case.batch_size, STEPS + 1, *case.x_dims) if case.trajectory else None
        if states is not None:
            states[:, 0] = x
        for i in range(STEPS):
            v = self.step_fn(x=x, t=self.times[i])
            if case.guided:
                v = ((1 - WEIGHT) * self.unguided_step_fn(x=x, t=self.times[i])).add_(WEIGHT * v)
            torch.mul(self.dt[i], v, out=product)
            x.add_(product)
            if states is not None:
                states[:, i + 1] = x
        return x if states is None else states

    def sampler(self, backend: str) -> Callable[[], Tensor]:
        """FlowMatching.sample with this backend."""
        case, fm = self.case, FlowMatching(self.case.x_dims, num_inference_steps=STEPS, backend=backend)
        keywords: dict[str, Any] = {"noise": self.noise, "return_all_steps": case.trajectory}
        if case.guided:
            keywords |= {"unguided_step_fn": self.unguided_step_fn, "use_classifier_free_guidance": True}
            keywords |= {"inference_guidance_weight": WEIGHT}

        def sample() -> Tensor:
            result = fm.sample(case.batch_size, self.step_fn, self.device, **keywords)
            return result[0] if isinstance(result, tuple) else result

        return sample

    def methods(self) -> dict[str, Callable[[], Tensor]]:
        methods = {"published": self.published, "best eager": self.best_eager}
        for name, backend in BACKENDS.items():
            if available_backends()[name] is None and (not backend.devices or self.device.type in backend.devices):
                methods[name] = self.sampler(name)
        return methods


# ---- the clock ----


def seconds(function: Callable[[], object], device: torch.device, budget: float = 0.3) -> float:
    """The median duration of a call, by CUDA events on a GPU: launched one after another, nothing waited for."""
    if device.type == "cpu":
        return statistics.median(_spans(function, _host_span, budget))
    function()
    torch.cuda.synchronize()
    spans = _spans(function, _recorded, budget)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) / 1e3 for start, stop in spans)


def _spans(function: Callable[[], object], span: Callable[[Callable[[], object]], Any], budget: float) -> list[Any]:
    for _ in range(3):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    calls = budget / max(time.perf_counter() - started, 1e-6)
    return [span(function) for _ in range(min(max(int(calls), 5), 1000))]


def _host_span(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _recorded(function: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    stop.record()
    return start, stop


def graphed(function: Callable[[], Tensor], device: torch.device) -> Callable[[], object]:
    """A replay of `function`, captured in a CUDA graph."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()
    return lambda: (graph.replay(), kept)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second that a plain copy of `size` bytes reads and writes: what this device can do."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


# ---- the parts of the file ----


def timing(case: Case, method: str, eager: float | str, graph: float | str | None, bandwidth: float) -> dict[str, Any]:
    """One row. `eager`, `graph`: seconds of a whole sample(), or what went wrong; graph None: there are none here."""
    row: dict[str, Any] = {
        "case": case.name,
        "state": [case.batch_size, *case.x_dims],
        "velocity": str(case.velocity).removeprefix("torch."),
        "guided": case.guided,
        "trajectory": case.trajectory,
        "method": method,
        "error": None,
        "least_bytes_per_evaluation": case.bytes,
    }
    for name, span in (("eager", eager), ("graph", graph)):
        if isinstance(span, str):
            row["error"] = f"{name}: {span}"
        if not isinstance(span, float):
            continue
        row[f"{name}_us_per_evaluation"] = round(span / STEPS * 1e6, 3)
        row[f"{name}_percent_of_copy"] = round(100 * case.bytes * STEPS / span / bandwidth, 1)
    return row


def timings(device: torch.device, small: bool, budget: float, tell: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Every case by every method."""
    bandwidth = copy_bandwidth(device, 1 << (20 if small else 28))
    for case in cases(small):
        problem = Problem(case, device)
        wanted = problem.published()
        for method, function in problem.methods().items():
            eager: float | str
            graph: float | str | None = None
            try:
                if torch.equal(function(), wanted):
                    eager = seconds(function, device, budget)
                    if device.type != "cpu":
                        graph = _graph_seconds(function, device, budget)
                else:
                    eager = "other bits than the published loop's"
            except Exception as error:  # one method's failure is a row, not the end
                eager = f"{type(error).__name__}: {error}"
            row = timing(case, method, eager, graph, bandwidth)
            tell(_line(row))
            yield row


def _graph_seconds(function: Callable[[], Tensor], device: torch.device, budget: float) -> float | str:
    try:
        return seconds(graphed(function, device), device, budget)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _line(row: dict[str, Any]) -> str:
    what = f"{row['case']}, {row['velocity']}{', guided' * row['guided']}{', trajectory' * row['trajectory']}"
    columns = [
        f"{name} {row[f'{name}_us_per_evaluation']:9.2f} us, {row[f'{name}_percent_of_copy']:5.1f}% of a copy"
        for name in ("eager", "graph")
        if f"{name}_us_per_evaluation" in row
    ]
    return f"{what:<38}{row['method']:<12}{'   '.join(columns)}{'  ' + row['error'] if row['error'] else ''}"


def tests_of(junit: str) -> dict[str, Any]:
    """The counts and whatever did not pass, from pytest's JUnit XML."""
    cases = list(ET.fromstring(junit).iter("testcase"))
    result: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "not_passed": []}
    for case in cases:
        # A test may be failed and in error too: it passes, or it is one of the others, once.
        outcomes = {child.tag: child.get("message", "") for child in case}
        outcome = "skipped" if "skipped" in outcomes else "passed"
        if outcomes.keys() & {"failure", "error"}:
            outcome = "failed"
        result[outcome] += 1
        if outcome != "passed":
            reason = next(outcomes[tag] for tag in ("failure", "error", "skipped") if tag in outcomes)
            result["not_passed"].append(
                {"test": f"{case.get('classname')}::{case.get('name')}", "outcome": outcome, "reason": reason[:2000]}
            )
    result["seconds"] = round(sum(float(case.get("time", 0)) for case in cases), 1)
    return result


def run_tests(expression: str, limit: float = TESTS_LIMIT) -> dict[str, Any]:
    """Runs the tests that this expression selects; a run in which no GPU test ran has failed."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", expression, f"--junitxml={xml}", "tests/test_gpu.py"]
        environment = os.environ | {"FLOWMATCH_KERNELS_REQUIRE_GPU": "1"}
        try:
            status: int | str = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} seconds"
        found = tests_of(xml.read_text() if xml.exists() else "<testsuites />")
    return {"expression": expression, "pytest": status} | found


def environment(device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Versions, and the device."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    try:
        import triton

        triton_version = triton.__version__
    except Exception as error:  # a broken Triton may raise anything
        triton_version = f"cannot be imported: {error}"
    versions = {
        "flowmatch_kernels": flowmatch_kernels.__version__,
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton_version,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cpu":
        return versions, {"name": platform.processor() or platform.machine(), "count": 1}
    properties = torch.cuda.get_device_properties(device)
    return versions, {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(device)),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # ROCm, or not on PATH


def failures(report: dict[str, Any]) -> list[str]:
    """What must not stay as it is; empty: all is well."""
    found = []
    tests = report["tests"]
    if tests is not None:
        if tests["pytest"] != 0:
            found.append(f"pytest: {tests['pytest']}, {tests['failed']} failed")
        if not tests["passed"]:
            found.append("no test passed")
    found += [f"self-test of {name}: {told}" for name, told in report["self_tests"].items() if "exact" not in told]
    found += [_line(row) for row in report["timings"] if row["error"]]
    return found


def measure(device: torch.device, expression: str, small: bool = False, budget: float = 0.3) -> dict[str, Any]:
    """The whole report."""
    started = time.time()
    versions, described = environment(device)
    backends = available_backends()
    tests = run_tests(expression) if expression else None
    report = {
        "format": 1,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "device": described,
        "backends": backends,
        "self_tests": {
            name: str(self_test(name)) for name, reason in backends.items() if reason is None and name != "reference"
        },
        "tests": tests,
        "timings": list(timings(device, small, budget, print)),
    }
    report["failures"] = failures(report)
    report["seconds"] = round(time.time() - started, 1)
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="tests and timings on a GPU, as one JSON")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--tests", default="gpu and not full", help="pytest's -m; empty: none")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    chosen = parser.parse_args(arguments)
    if chosen.device.type != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA or ROCm device (--device cpu --tests '' tries the same without)")
    on_cpu = chosen.device.type == "cpu"
    report = measure(chosen.device, chosen.tests, small=on_cpu, budget=0.02 if on_cpu else 0.3)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{chosen.output}: {report['seconds']} seconds, {len(report['timings'])} timings", end="")
    print("".join(f"\nFAILED: {failure}" for failure in report["failures"]) or ", all well")
    return int(bool(report["failures"]))


if __name__ == "__main__":
    sys.exit(main())
