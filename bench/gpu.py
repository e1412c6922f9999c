"""Everything a person with a GPU should run once: `make gpu`, ten minutes or so, one JSON file, one in Markdown.

    python -m bench --gpu        (or python -m bench.gpu [--output FILE]) [--tests EXPRESSION] [--device cuda]

Tests (those marked `gpu`, in a pytest of their own), versions, device, and timings by device events: the published
loop, the best by hand, and each backend; launched from Python, and the whole loop in a CUDA graph; with the L2 cache
as the last call left it (warm), and with nothing of the call in it (cold). Beside them the host's time, what the
profiler saw launched, and peak memory. What is timed is first checked against the published loop, as in
`bench.contestants`. step_fn is free: it returns one and the same v. With a small network there are two contestants
more: step_fn in a graph of its own, and the whole solver in one, `FlowMatching.graphed`.

The file is written anew whenever there is more to write: a run that is cut short keeps what it has, and says that it
did not finish. The tests' outcomes are shown as they come, and count where the tests are stopped at their limit.

`--device cpu --tests ''` goes the same way without a GPU, to see that it works.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import flowmatch_kernels
from flowmatch_kernels import available_backends
from flowmatch_kernels.diagnostics import self_test

from . import device_clock, report
from .contestants import Contestant, contestants, difference, graphed, published
from .device_clock import Launches
from .machine import ROOT, revision
from .work import ALPAMAYO, POLICY, Problem, Work

OUTPUT = Path("bench", "results", "gpu.json")
KINDS = ("published", "hand", "ours", "graphed")
#: Seconds. With a cold cache the tests compile Triton's kernel 331 times, 0.1 to 0.7 s each on a core of 2.5 GHz, up
#: to 230 s before anything runs; the timings take about two minutes more. A limit is there for a test that hangs.
TESTS_LIMIT = 900


def works(small: bool = False) -> Iterator[Work]:
    """Alpamayo's shape, and one far beyond any L2, with a free step_fn; two of policies with a network.

    `small`: no larger than a CPU finishes at once.
    """
    for shape in (ALPAMAYO, (64, 64) if small else (64, 1 << 19)):
        yield Work(shape)
        for task in ("final", "trajectory", "guided", "guided trajectory"):
            yield Work(shape, task, velocity=torch.bfloat16)
    for shape in (ALPAMAYO, POLICY):  # by a small network: eager, its step_fn in a graph, the whole solver in one
        yield Work(shape, network=True)


# ---- the parts of the file ----


def timing(
    work: Work,
    contestant: str,
    bandwidth: float,
    spans: dict[str, float | str],
    host: float | None = None,
    launched: Launches | None = None,
    peak: int | None = None,
) -> dict[str, Any]:
    """One row.

    Args:
        work, contestant: What was timed.
        bandwidth: Bytes per second of a plain copy.
        spans: "eager warm", "eager cold", "graph warm", "graph cold": seconds of a whole call, or what went wrong.
        host: Seconds until a call is back.
        launched: What it gave the device.
        peak: Bytes it added at its highest.
    """
    row: dict[str, Any] = work.json() | {"contestant": contestant, "error": None}
    row["least_bytes_per_step"] = work.step_bytes
    for name, span in spans.items():
        if isinstance(span, str):
            row["error"] = f"{name}: {span}"
            continue
        key, moved = name.replace(" ", "_"), work.step_bytes * work.steps / span
        row[f"{key}_us_per_step"] = round(span / work.steps * 1e6, 3)
        row[f"{key}_gb_per_s"] = round(moved / 1e9, 1)
        row[f"{key}_percent_of_copy"] = round(100 * moved / bandwidth, 1)
    if host is not None:
        row["host_us_per_step"] = round(host / work.steps * 1e6, 3)
    if launched is not None:
        row |= launched._asdict()
    row["peak_bytes"] = peak
    return row


def timings(
    device: torch.device, bandwidth: float, small: bool, budget: float, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Every work by every contestant."""
    for work in works(small):
        problem = Problem(work, device)
        wanted = published(problem)
        for contestant in (*contestants(device), *graphed()):
            if contestant.kind not in KINDS or not contestant.computes(work):
                continue
            try:
                function = contestant.bind(problem)
                told = difference(contestant, problem, function, wanted)
                if told is None:
                    row = _timed(work, contestant, function, device, bandwidth, budget)
            except Exception as error:  # one contestant's failure is a row, not the end
                told = f"{type(error).__name__}: {error}"
            if told is not None:
                row = timing(work, contestant.name, bandwidth, {"eager": told})
            tell(line(row))
            yield row


def _timed(
    work: Work,
    contestant: Contestant,
    function: Callable[[], Any],
    device: torch.device,
    bandwidth: float,
    budget: float,
) -> dict[str, Any]:
    flush = device_clock.flush(device)
    spans: dict[str, float | str] = {
        "eager warm": device_clock.seconds(function, device, budget),
        "eager cold": device_clock.seconds(function, device, budget, flush),
    }
    if device.type != "cpu" and contestant.kind != "graphed":
        try:
            replay = device_clock.graphed(function, device)
            spans["graph warm"] = device_clock.seconds(replay, device, budget)
            spans["graph cold"] = device_clock.seconds(replay, device, budget, flush)
        except Exception as error:
            spans["graph"] = f"{type(error).__name__}: {error}"
    return timing(
        work,
        contestant.name,
        bandwidth,
        spans,
        device_clock.host_seconds(function, device, budget),
        device_clock.profiled(function, device),
        device_clock.peak_bytes(function, device),
    )


SPANS = ("eager_warm", "eager_cold", "graph_warm", "graph_cold")


def line(row: dict[str, Any]) -> str:
    """A row for the eye."""
    what = f"{row['shape']}, {row['task']}, {row['velocity']}"
    columns = [
        f"{span.replace('_', ' ')} {row[f'{span}_us_per_step']:9.2f} us {row[f'{span}_percent_of_copy']:5.1f}%"
        for span in SPANS
        if f"{span}_us_per_step" in row
    ]
    return f"{what:<44}{row['contestant']:<20}{'  '.join(columns)}{'  ' + row['error'] if row['error'] else ''}"


def markdown(found: dict[str, Any]) -> str:
    """The file in Markdown: what it was, and a table of the timings."""
    rows = []
    for row in found["timings"]:
        cells = [
            f"{row[f'{span}_us_per_step']} ({row[f'{span}_percent_of_copy']}%)" if f"{span}_us_per_step" in row else ""
            for span in SPANS
        ]
        what = f"{row['shape']}, {row['task']}, {row['velocity']}"
        counts = [row.get(name, "") for name in ("host_us_per_step", "kernels", "copies_from_host")]
        rows.append((what, row["contestant"], *cells, *counts, row["error"] or ""))
    header = ("work", "contestant", *(span.replace("_", " ") for span in SPANS), "host", "kernels", "copies in", "")
    told = [
        f"- {name}: {value}" for part in ("versions", "device", "tests") for name, value in (found[part] or {}).items()
    ]
    if found["copy_gb_per_s"] is not None:
        told.append(f"- a copy moves {found['copy_gb_per_s']} GB/s")
    told += [f"- **FAILED**: {failure}" for failure in found["failures"]]
    text = "Microseconds a step (of the bytes that a step must move: % of the copy); host: until the call is back."
    return "\n\n".join(("# On a GPU", "\n".join(told), text, report.table(header, rows))) + "\n"


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


#: A line of `pytest -v`: the test, and how it ended.
_OUTCOME = re.compile(r"(\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")


def tests_so_far(lines: list[str]) -> dict[str, Any]:
    """As `tests_of`, from what `pytest -v` has printed: there is no XML before its end."""
    result: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "not_passed": []}
    for match in filter(None, map(_OUTCOME.match, lines)):
        outcome = {"ERROR": "failed"}.get(match[2], match[2].lower())
        result[outcome] += 1
        if outcome != "passed":
            reason = "the tests were stopped before their report, which holds the reasons"
            result["not_passed"].append({"test": match[1], "outcome": outcome, "reason": reason})
    return result | {"seconds": None}


def run_tests(
    expression: str, limit: float = TESTS_LIMIT, tell: Callable[[str], None] = print, file: str = "tests/test_gpu.py"
) -> dict[str, Any]:
    """Runs the tests that this expression selects; a run in which no GPU test ran has failed.

    Args:
        expression: pytest's -m.
        limit: Seconds, after which they are stopped.
        tell: Gets each line of pytest's as it comes.
        file: Where the tests are.
    """
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "junit.xml")
        command = [sys.executable, "-u", "-m", "pytest", "-v", "-m", expression, f"--junitxml={xml}", file]
        environment = os.environ | {"FLOWMATCH_KERNELS_REQUIRE_GPU": "1", "PYTEST_ADDOPTS": ""}
        lines: list[str] = []
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as pytest:
            stop = threading.Timer(limit, pytest.kill)
            stop.start()
            assert pytest.stdout is not None
            for told in pytest.stdout:
                lines.append(told.rstrip("\n"))
                tell(lines[-1])
            status: int | str = pytest.wait()
        stopped = not stop.is_alive()
        stop.cancel()
        if stopped and status != 0:
            status = f"stopped after {limit} seconds"
        found = tests_of(xml.read_text()) if xml.exists() else tests_so_far(lines)
    return {"expression": expression, "pytest": status} | found


def environment(device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Versions, and the device."""
    try:
        import triton

        triton_version = triton.__version__
    except Exception as error:  # a broken Triton may raise anything
        triton_version = f"cannot be imported: {error}"
    versions = {
        "flowmatch_kernels": flowmatch_kernels.__version__,
        "commit": revision(),
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
    found += [line(row) for row in report["timings"] if row["error"]]
    return found


def measure(
    device: torch.device,
    expression: str,
    small: bool = False,
    budget: float = 0.2,
    save: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """The whole report.

    Args:
        device: What is measured.
        expression: pytest's -m; empty: no tests.
        small, budget: How large the largest work is, and how many seconds a timing may take.
        save: Gets the report whenever there is more of it.
    """
    started = time.time()
    versions, described = environment(device)
    backends = available_backends()
    found: dict[str, Any] = {
        "format": 2,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "device": described,
        "backends": backends,
        "self_tests": {},
        "tests": None,
        "copy_gb_per_s": None,
        "timings": [],
    }

    def grown(finished: bool = False) -> None:
        found["failures"] = failures(found) + ([] if finished else ["the run did not finish"])
        found["seconds"] = round(time.time() - started, 1)
        save(found)

    grown()
    for name, reason in backends.items():
        if reason is None and name != "reference":
            found["self_tests"][name] = str(self_test(name))
            grown()
    if expression:
        found["tests"] = run_tests(expression)
        grown()
    bandwidth = device_clock.copy_bandwidth(device, 1 << (20 if small else 28), budget)
    found["copy_gb_per_s"] = round(bandwidth / 1e9, 1)
    for row in timings(device, bandwidth, small, budget, print):
        found["timings"].append(row)
        grown()
    grown(finished=True)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run on a GPU takes."""
    parser.add_argument("--tests", default="gpu and not full", help="on a GPU: pytest's -m; empty: none")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="on a GPU: which")


def run(parser: argparse.ArgumentParser, chosen: argparse.Namespace, output: Path) -> int:
    """Measures, and writes JSON and Markdown; returns 1 where something failed."""
    on_cpu = chosen.device.type == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        parser.error("there is no CUDA or ROCm device (--device cpu --tests '' tries the same without)")
    output.parent.mkdir(parents=True, exist_ok=True)

    def save(found: dict[str, Any]) -> None:
        for path, text in ((output, json.dumps(found, indent=1) + "\n"), (output.with_suffix(".md"), markdown(found))):
            new = path.with_name(f"{path.name}.new")  # what is there stays whole, whenever the run is cut short
            new.write_text(text)
            new.replace(path)

    found = measure(chosen.device, chosen.tests, on_cpu, 0.02 if on_cpu else 0.2, save)
    print(f"\n{output}: {found['seconds']} seconds, {len(found['timings'])} timings", end="")
    print("".join(f"\nFAILED: {failure}" for failure in found["failures"]) or ", all well")
    return int(bool(found["failures"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="tests and timings on a GPU, as one JSON")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    return run(parser, chosen, chosen.output)


if __name__ == "__main__":
    sys.exit(main())
