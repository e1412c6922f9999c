"""The report in Markdown, from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .work import Work

Row = dict[str, Any]


def markdown(report: Row) -> str:
    """The whole report: the head, what failed, targets, times, peak memory, counts."""
    parts = [
        "# Benchmark",
        "\n".join(f"- {name}: {value}" for name, value in report["head"].items()),
        _failures(report["failures"]),
        "## Targets",
        "Ratios of medians; a free `step_fn`, ten steps, the noise passed in where nothing else is said. With "
        "`--quick` the states are toys and runs are few: then these rows say only that they can be measured.",
        targets(report["targets"], judged=not report.get("quick", False)),
        "## Times",
        "Microseconds of one call: the median [first to third quartile], and its ratio to the published loop's. Every "
        "result was first compared with the published loop's: by bits, or, where a contestant does not promise them, "
        "within a tolerance (`bench/contestants.py`). A compiled loop that sees a free `step_fn` computes all steps in "
        "one pass, which no model allows.",
        *times(report["results"]),
        "## Peak memory",
        "MB that a call adds to the process at its highest, its result included; states of 4 MiB and more.",
        memory(report["results"]),
        "## Counts",
        "What a GPU would be given in one call, counted without one: no times. Bytes are what each launch must read "
        "and write.",
        counts(report["counts"]),
        f"{report['seconds']} seconds in all.",
    ]
    return "\n\n".join(parts) + "\n"


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _failures(failures: list[str]) -> str:
    if not failures:
        return "Every contestant computed the same thing."
    return "**FAILED, and not timed:**\n\n" + "\n".join(f"- {failure}" for failure in failures)


def targets(rows: list[Row], judged: bool = True) -> str:
    """Each target, what was measured, and whether it is met; not judged where the times say nothing (`--quick`)."""
    words = {True: "met", False: "**not met**", None: "not measured"}
    if not judged:
        words |= {True: "not judged", False: "not judged"}
    return table(
        ("work", "against", "at most", "measured", "", "how"),
        (
            (
                row["work"],
                row["against"],
                f"{row['at_most']:.3g}",
                "" if row["measured"] is None else row["measured"],
                words[row["met"]],
                row["how"],
            )
            for row in rows
        ),
    )


def times(rows: list[Row]) -> Iterable[str]:
    """A table for each kind of work, a row for each contestant, a column for each shape (or count of steps)."""
    for title, group in _groups(rows).items():
        published = {_column(row): row.get("median_us") for row in group if row["kind"] == "published"}
        yield f"### {title}"
        yield _by_contestant(group, lambda row, published=published: _span(row, published[_column(row)]))


def memory(rows: list[Row]) -> str:
    """Peak memory at ten steps, for what was large enough."""
    large = [row for row in rows if row.get("peak_bytes") is not None and row["steps"] == 10]
    found = {
        title: _by_contestant(group, lambda row: f"{row['peak_bytes'] / 1e6:.0f}")
        for title, group in _groups(large).items()
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in found.items()) or "Not measured."


def counts(rows: list[Row]) -> str:
    """Launches, bytes and copies."""
    return table(
        ("task", "contestant", "launches", "kB moved", "copies from the host"),
        ((r["task"], r["contestant"], r["launches"], f"{r['bytes'] / 1e3:.0f}", r["copies"]) for r in rows),
    )


def _groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by task and what else is special; the counts of steps of one shape are a group of their own."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        title = Work.of(row).title([row["task"]], f"steps of {row['shape']}")
        groups.setdefault(title, []).append(row)
    return groups


def _column(row: Row) -> str:
    return str(row["shape"]) if row["steps"] == 10 else f"{row['steps']}"


def _by_contestant(rows: list[Row], cell: Any) -> str:
    columns = list(dict.fromkeys(map(_column, rows)))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["contestant"], {})[_column(row)] = cell(row)
    return table(("", *columns), ((name, *(found.get(c, "") for c in columns)) for name, found in cells.items()))


def _span(row: Row, published: float | None) -> str:
    if row["problem"]:
        return "failed"
    span = f"{_short(row['median_us'])} [{_short(row['low_us'])}–{_short(row['high_us'])}]"
    return span if published is None or row["kind"] == "bare" else f"{span} {row['median_us'] / published:.2f}"


def _short(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:,.0f}"
