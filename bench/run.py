"""A whole run: every work by every contestant, checked first, then timed in turn; the targets; the counts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from . import child, counts, targets
from .contestants import Contestant, contestants, difference, published
from .machine import ROOT, head
from .measure import in_turn, peak_bytes
from .work import Plan, Problem, Work

#: Of a smaller state the process's own memory hides the call's.
LEAST_BYTES_FOR_PEAK = 1 << 22

CPU = torch.device("cpu")


def results(work: Work, takes_part: list[Contestant], plan: Plan) -> list[dict[str, Any]]:
    """A row for each contestant: its timing, or under "problem" what keeps it from having one."""
    seconds = plan.seconds * (3 if work in targets.works(plan) else 1)
    if work.extension:
        return timed(work, takes_part, seconds, plan.least_runs)
    # The extension is there or not for a whole process: so its contestants take their turns in another one.
    order = {"work": work.json(), "seconds": seconds, "least_runs": plan.least_runs}
    command = child.command("from bench import run; run.serve()", ROOT, extension=False)
    done = subprocess.run(command, input=json.dumps(order), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return [
            work.json() | {"contestant": "all", "kind": "ours", "problem": f"the process ended with {done.returncode}"}
        ]
    return json.loads(done.stdout)


def serve() -> None:
    """The other end: does one work by all who compute it, and prints its rows."""
    order = json.load(sys.stdin)
    work = Work.of(order["work"])
    takes_part = [contestant for contestant in contestants(CPU) if contestant.computes(work)]
    json.dump(timed(work, takes_part, order["seconds"], order["least_runs"]), sys.stdout)


def timed(work: Work, takes_part: list[Contestant], seconds: float, least_runs: int) -> list[dict[str, Any]]:
    """The rows of `results`, in this process."""
    problem = Problem(work, CPU)
    torch.manual_seed(0)
    wanted = published(problem)
    rows: dict[str, dict[str, Any]] = {}
    functions: dict[str, Callable[[], object]] = {}
    torch.compiler.reset()  # else a new shape is one recompilation more, of which there is a limit
    for contestant in takes_part:
        row = rows[contestant.name] = work.json() | {"contestant": contestant.name, "kind": contestant.kind}
        try:
            function = contestant.bind(problem)
            outcome = difference(contestant, problem, function, wanted)
        except Exception as error:  # one contestant's failure is a row, not the end
            outcome = f"{type(error).__name__}: {error}"
        row["problem"] = outcome
        if outcome is None:
            functions[contestant.name] = function
    for name, timing in in_turn(functions, seconds, least_runs).items():
        rows[name] |= timing.json()
    for name, function in functions.items():
        large = work.state_bytes >= LEAST_BYTES_FOR_PEAK
        rows[name]["peak_bytes"] = peak_bytes(function) if large else None
    return list(rows.values())


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What must not stay as it is; empty: all is well."""
    return [f"{Work.of(row)}, {row['contestant']}: {row['problem']}" for row in rows if row["problem"]]


def report(plan: Plan, tell: Callable[[str], None]) -> dict[str, Any]:
    """The whole report, as the JSON holds it."""
    started = time.perf_counter()
    everyone = [contestant for contestant in contestants(CPU) if contestant.installed()]
    rows: list[dict[str, Any]] = []
    for number, work in enumerate(plan.works, start=1):
        tell(f"{number:3}/{len(plan.works)}  {time.perf_counter() - started:5.0f} s  {work}")
        takes_part = [
            contestant
            for contestant in everyone
            if contestant.computes(work) and (contestant.kind != "compiled" or work in plan.compiled)
        ]
        rows += results(work, takes_part, plan)
    tell("targets and counts" if plan.whole else "targets")
    return {
        "format": 1,
        "head": head(),
        "results": rows,
        "targets": targets.table(plan, rows),
        "counts": counts.table() if plan.whole else [],
        "failures": failures(rows),
        "quick": plan.seconds == 0.0,
        "seconds": round(time.perf_counter() - started, 1),
    }
