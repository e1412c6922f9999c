"""Two revisions in one run: the other is built in a worktree of its own, and each is sampled in a process of its own.

The processes take turns, a run of one work at a time, so that a slow spell of the machine hits both; while one runs the
other waits for its next order. Both are driven by this revision's benchmark, and must give the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import child, measure, report
from .contestants import ours
from .machine import ROOT, head
from .work import Plan, Problem, Work

RUNS = 25


def serve() -> None:
    """The other end of a `Side`: reads orders, a JSON a line, and answers each with a JSON."""
    functions: dict[int, Callable[[], Tensor]] = {}
    for line in sys.stdin:
        order = json.loads(line)
        number = order["number"]
        if "work" in order:
            problem = Problem(Work.of(order["work"]), torch.device("cpu"))
            function = functions[number] = ours("auto", problem)
            torch.manual_seed(0)
            digest = hashlib.sha256(function().contiguous().view(torch.uint8).numpy()).hexdigest()
            answer = {"bits": digest, "calls": measure.calls_of_a_run(function)}
        else:
            answer = {"seconds": measure.run(functions[number], order["calls"])}
        print(json.dumps(answer), flush=True)


class Side:
    """A process that samples with the package of one folder, with or without its extension."""

    def __init__(self, package: Path, extension: bool = True) -> None:
        command = child.command("from bench import compare; compare.serve()", package, ROOT, extension=extension)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Gives an order and waits for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process ended with {self.process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exception: object) -> None:
        with self.process:  # closes its input, at which it ends, and waits
            pass


@contextlib.contextmanager
def built(revision: str) -> Iterator[Path]:
    """A folder that holds the package of a revision, built as this machine builds it; removed in the end."""
    with tempfile.TemporaryDirectory(prefix="flowmatch_kernels-") as folder:
        tree, library = Path(folder, "tree"), Path(folder, "library")
        _run("git", "worktree", "add", "--detach", str(tree), revision, cwd=ROOT)
        try:
            arguments = ("build", "--build-base", str(Path(folder, "build")), "--build-lib", str(library))
            _run(sys.executable, "setup.py", "--quiet", *arguments, cwd=tree)
            yield library
        finally:
            _run("git", "worktree", "remove", "--force", str(tree), cwd=ROOT)


def _run(*command: str, cwd: Path) -> None:
    environment = os.environ | {"FLOWMATCH_KERNELS_REQUIRE_EXT": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def compared(base: Side, this: Side, works: list[Work], runs: int) -> list[dict[str, Any]]:
    """A row for each work: both timings, the ratio of medians, and whether the bits are the same."""
    rows = []
    for number, work in enumerate(works):
        ready = [side.ask(number=number, work=work.json()) for side in (base, this)]
        calls = ready[0]["calls"]
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(runs):
            for k in (turn % 2, 1 - turn % 2):
                seconds[k].append((base, this)[k].ask(number=number, calls=calls)["seconds"])
        before, after = (measure.timing(spans, calls) for spans in seconds)
        rows.append(
            {
                "work": str(work),
                "base": before.json(),
                "this": after.json(),
                "ratio": round(after.median / before.median, 3),
                "same_bits": ready[0]["bits"] == ready[1]["bits"],
            }
        )
        print(f"{rows[-1]['ratio']:6.2f}  {work}", flush=True)
    return rows


def markdown(found: dict[str, Any]) -> str:
    """The comparison as a table."""
    rows = (
        (
            row["work"],
            *(
                f"{row[side]['median_us']:,} [{row[side]['low_us']:,}–{row[side]['high_us']:,}]"
                for side in ("base", "this")
            ),
            row["ratio"],
            "" if row["same_bits"] else "**other bits**",
        )
        for row in found["rows"]
    )
    head = "\n".join(f"- {name}: {value}" for name, value in found["head"].items())
    return (
        f"# Against {found['base']}\n\n{head}\n\n{report.table(('work', 'base, us', 'this, us', 'ratio', ''), rows)}\n"
    )


def run(revision: str, plan: Plan, output: Path) -> int:
    """Compares, writes JSON and Markdown; returns 1 where the bits differ."""
    rows: list[dict[str, Any]] = []
    with built(revision) as library:
        for extension in (True, False):
            works = [work for work in plan.works if not work.network and work.extension == extension]
            with Side(library, extension) as base, Side(ROOT, extension) as this:
                rows += compared(base, this, works, max(RUNS if plan.seconds else plan.least_runs, 2))
    found = {"format": 1, "head": head(), "base": revision, "rows": rows}
    output.write_text(json.dumps(found, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(found))
    print(f"\n{output.with_suffix('.md')}")
    return int(not all(row["same_bits"] for row in rows))
