"""Draws the plots from a run's JSON: `python -m bench.plot bench/results/bench.json`, PNG files beside it.

bench.png: for each task and shape, each contestant's time as a share of the published loop's, with the number at the
bar's end; steps.png: time by steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .work import Work

Row = dict[str, Any]

PUBLISHED = "published loop"

#: What is drawn, in this order, and its colour. Of those by hand, and of ours, the fastest.
SERIES = {
    "torchdiffeq": "#8c6bb1",
    "flow_matching": "#b59fd1",
    "diffusers": "#d9a441",
    "compiled update": "#7fbf9b",
    "hand-written loop": "#2b8cbe",
    "ours": "#d7301f",
}
RATIOS = (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5)
TASKS = ("final", "trajectory", "guided", "guided trajectory", "midpoint", "rk4")


def fastest(rows: list[Row]) -> dict[str, float]:
    """The microseconds of each series, of the rows of one work."""
    found: dict[str, float] = {}
    for row in rows:
        if "median_us" not in row:
            continue
        name = {"hand": "hand-written loop", "ours": "ours"}.get(row["kind"], row["contestant"])
        found[name] = min(row["median_us"], found.get(name, row["median_us"]))
    return found


def plain(rows: list[Row]) -> list[Row]:
    """Rows of the base point: float32, a free step_fn, the noise passed in."""
    works = [Work.of(row) for row in rows]
    return [r for r, work in zip(rows, works, strict=True) if work == Work(work.shape, work.task, work.steps)]


def by_task(rows: list[Row]) -> Figure:
    """A panel for each task, a group of bars for each shape: above or below the published loop's time, which is 1."""
    rows = [row for row in plain(rows) if row["steps"] == 10]
    figure = Figure(figsize=(15, 9), layout="constrained")
    for axes, task in zip(figure.subplots(2, 3, sharey=True).flat, TASKS, strict=True):
        group = [row for row in rows if row["task"] == task]
        shapes = list(dict.fromkeys(tuple(row["shape"]) for row in group))
        for place, shape in enumerate(shapes):
            spans = fastest([row for row in group if tuple(row["shape"]) == shape])
            for k, (name, colour) in enumerate(SERIES.items()):
                if name in spans:
                    share = spans[name] / spans[PUBLISHED]
                    at = place + (k - 2.5) * 0.14
                    axes.bar(at, share - 1, 0.13, bottom=1, color=colour)
                    axes.annotate(
                        f"{share:.2f}",
                        (at, share),
                        xytext=(0, 2 if share >= 1 else -2),
                        textcoords="offset points",
                        ha="center",
                        va="bottom" if share >= 1 else "top",
                        rotation=90,
                        fontsize=6,
                    )
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(title=task, yscale="log", xticks=range(len(shapes)))
        axes.minorticks_off()
        axes.set_yticks(RATIOS, labels=[f"{ratio:g}" for ratio in RATIOS])
        axes.margins(y=0.12)  # for the numbers
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.set_xticklabels([textwrap.fill(str(list(shape)), 12) for shape in shapes], fontsize=8)
    figure.supylabel("time of one call / published loop's (line at 1); down is faster")
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in SERIES.items()],
        loc="outside lower center",
        ncols=len(SERIES),
        title=legend_of_bars(rows),
        title_fontsize=9,
        frameon=False,
    )
    return figure


def legend_of_bars(rows: list[Row]) -> str:
    """What a bar is, and why one is missing."""
    there = {name for row in rows for name in fastest([row])}
    absent = [name for name in SERIES if name not in there]
    text = (
        "A bar begins at the published loop's time and ends at the contestant's; the number is their ratio. Of several "
        "hand-written loops, and of ours, the fastest.\nNo bar: the contestant has no such task (diffusers has Euler "
        "and no trajectory), or is timed for some works only (compiled update)."
    )
    return text + (f" Not timed in this run, as not installed: {', '.join(absent)}." if absent else "")


def by_steps(rows: list[Row]) -> Figure | None:
    """A panel for each shape that was timed at several counts of steps, final states only; None if there is none."""
    rows = [row for row in plain(rows) if row["task"] == "final"]
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows if row["steps"] != 10))
    if not shapes:
        return None
    figure = Figure(figsize=(4.5 * len(shapes), 3.6), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False).flat, shapes, strict=True):
        group = [row for row in rows if tuple(row["shape"]) == shape]
        counts = sorted({row["steps"] for row in group})
        spans = [fastest([row for row in group if row["steps"] == n]) for n in counts]
        for name, colour in {PUBLISHED: "black", **SERIES}.items():
            points = [(n, span[name]) for n, span in zip(counts, spans, strict=True) if name in span]
            if len(points) > 1:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=name)
        axes.set(title=str(list(shape)), xscale="log", yscale="log", xlabel="steps", ylabel="microseconds")
        axes.set_xticks(counts, labels=map(str, counts), minor=False)
        axes.minorticks_off()
        axes.legend(fontsize=7, frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description="plots from the JSON of a run")
    parser.add_argument("results", type=Path, help="bench.json")
    chosen = parser.parse_args(arguments)
    found = json.loads(chosen.results.read_text())
    machine = f"{found['head']['CPU']}, torch {found['head']['torch'].split(',')[0]}, {found['head']['when'][:10]}"
    for name, draw in (("bench", by_task), ("steps", by_steps)):
        figure = draw(found["results"])
        if figure is None:
            print("no steps.png: each state was timed at one number of steps")
            continue
        figure.suptitle(
            f"ten steps, a step_fn that costs nothing; {machine}" if name == "bench" else machine, fontsize=9
        )
        path = chosen.results.with_name(f"{name}.png")
        figure.savefig(path, dpi=150)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
