"""Times of each sample, or each token: the tables of their own grids side by side, [E, R, 8]."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import as_tensor, check_dense, number, row_name, shown, spread
from ..ops.fused_step import HELD
from ..ops.step_log_prob import HELD as HELD_DENSITY
from ..tracing import is_readable
from .grid import Grid, on_host
from .table import Table


def rows_of(numbers: Any, sizes: Sequence[int], name: str) -> list[Any]:
    """What is given for each sample or token, as one row for each of `sizes`: tensors on the CPU, or lists.

    Args:
        numbers: As for `arguments.spread`, NumPy arrays too.
        sizes: The first sizes of the state.
        name: The argument's.

    Raises:
        TypeError: it is no dense floating-point tensor, nor lists of lists.
        ValueError: sizes are others, rows differ in length, or they cannot be read.
    """
    if not isinstance(numbers, (list, tuple)):
        try:
            numbers = numbers if isinstance(numbers, Tensor) else as_tensor(numbers)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be a tensor or lists of floats, got {shown(numbers)}") from None
        if not numbers.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {numbers.dtype}")
        check_dense(numbers, name)
        if not is_readable(numbers):
            raise ValueError(
                f"{name} of each sample is a tensor whose values cannot be read under a compiler, a tracer or vmap, or "
                "on the meta device: pass lists of floats"
            )
        numbers = on_host(numbers.detach())
    rows = spread(numbers, sizes, name)
    lengths = [len(row) if hasattr(row, "__len__") else 0 for row in rows]
    for row, length in enumerate(lengths):
        if length != lengths[0]:
            raise ValueError(
                f"{name}: {row_name(row, sizes)} has {length} entries, and {row_name(0, sizes)} has {lengths[0]}"
            )
    return rows


class Own(NamedTuple):
    """The grid of one row without its steps of length 0."""

    steps: tuple[int, ...]
    """The numbers of the others."""
    times: Any
    """[len(steps) + 1]; None where all steps have length 0."""
    sizes: Any
    """[len(steps)]; None: the differences of `times`."""


def without_holds(times: Any, sizes: Any, name: str) -> Own:
    """The grid of one row without its steps of length 0, which hold the sample or token as it is.

    Args:
        times: [T], a tensor on the CPU, or a list of numbers.
        sizes: [T - 1] likewise, or None.
        name: What it is the grid of, for messages: "sample 2".

    Raises:
        TypeError: an entry is no number.
        ValueError: an entry is not finite, or a step of length 0 has a step size that is not 0.
    """
    entries = [number(entry, f"time_steps of {name}, entry {k},") for k, entry in enumerate(_numbers(times))]
    given = None if sizes is None else _numbers(sizes)
    if not all(abs(entry) < inf for entry in entries):
        raise ValueError(f"time_steps of {name} must be finite, got {entries!s:.200}")
    steps = tuple(k for k in range(len(entries) - 1) if entries[k] != entries[k + 1])
    if len(steps) == len(entries) - 1:
        return Own(steps, times, sizes)
    if given is not None and len(given) == len(entries) - 1:  # else who checks step sizes says so
        for k in set(range(len(entries) - 1)) - set(steps):
            if given[k] != 0:
                raise ValueError(
                    f"{name} has a step of length 0, step {k}, at time {entries[k]}: wanted 0 for its size in "
                    f"step_sizes, got {given[k]}"
                )
    if not steps:
        return Own(steps, None, None)
    kept = [*steps, steps[-1] + 1]
    return Own(steps, _picked(times, kept), None if sizes is None else _picked(sizes, steps))


def _numbers(row: Any) -> list[Any]:
    return row.tolist() if isinstance(row, Tensor) else list(row)


def _picked(row: Any, which: Sequence[int]) -> Any:
    return row[list(which)] if isinstance(row, Tensor) else [row[k] for k in which]


class Row(NamedTuple):
    """What all samples or tokens with the same times and step sizes share."""

    name: str
    """Of the first that has it, for messages."""
    times: Tensor
    """[T], on the CPU."""
    steps: tuple[int, ...]
    """The numbers of its steps that are longer than 0."""
    grid: Grid | None
    """The grid of those steps alone; None: there are none."""
    sizes: Grid | None
    """Their sizes, where they are given."""


def with_name(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function, whose errors then say whose numbers they are about."""
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that have steps of the same numbers: one table can be made of them."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.steps, []).append(row)
    return list(groups.values())


def side_by_side(group: Sequence[Row]) -> tuple[Grid, Grid | None]:
    """The grids and step sizes of a group with steps of its own, [., R]."""

    def columns(grids: Sequence[Grid]) -> Grid:
        each = tuple(grid.entries for grid in grids if grid.entries is not None)
        return Grid(torch.stack([grid.tensor for grid in grids], dim=1), None, each)

    sizes = [row.sizes for row in group if row.sizes is not None]
    return columns([row.grid for row in group if row.grid is not None]), columns(sizes) if sizes else None


def stacked(
    structure: Table,
    groups: Sequence[Sequence[Row]],
    tables: Sequence[Table | None],
    which: Sequence[Row],
    sizes: tuple[int, ...],
) -> Table:
    """The tables of the groups as one, [E, R, 8], with times [., *sizes]. A step that is not a row's own holds it.

    Args:
        structure: A table of as many steps as the grids have, for its evaluations; its numbers do not count.
        groups: Rows, of `grouped`.
        tables: Of each group the table, on the CPU, of its `side_by_side`; None: it has no steps of its own.
        which: Of all R, in order, the row.
        sizes: The first sizes of the state, whose product is R.

    Raises:
        ValueError: a row's solver reads other evaluations than this structure gives it.
    """
    coefficients, densities, times = [], [], []
    for group, table in zip(groups, tables, strict=True):
        places = _places(structure, table, group[0].steps, group[0].name)
        none = 0 if table is None else len(table.evaluations)
        taken = torch.tensor([none if place is None else place for place in places], device="cpu")
        coefficients.append(_or_held(None if table is None else table.coefficients, HELD, structure, taken, len(group)))
        if structure.densities is not None:
            its_own = None if table is None else table.densities
            densities.append(_or_held(its_own, HELD_DENSITY, structure, taken, len(group)))
        # Entries of the grid; then the times of the stages.
        grid = torch.stack([row.times for row in group], dim=1)
        known = grid if table is None else torch.cat([grid, table.times])
        entries = list(range(len(structure.times)))
        step = 0
        for evaluation, place in zip(structure.evaluations, places, strict=True):
            if evaluation.time > structure.steps:
                at = step if place is None or table is None else len(grid) + table.evaluations[place].time
                entries[evaluation.time] = at
            step += evaluation.commit
        times.append(known.index_select(0, torch.tensor(entries, device="cpu")))
    place_of = {id(row): place for place, row in enumerate(itertools.chain(*groups))}
    index = torch.tensor([place_of[id(row)] for row in which], device="cpu")
    return structure._replace(
        coefficients=torch.cat(coefficients, dim=1).index_select(1, index),
        times=torch.cat(times, dim=1).index_select(1, index).view(-1, *sizes),
        densities=torch.cat(densities, dim=1).index_select(1, index) if densities else None,
        sizes=sizes,
    )


def _or_held(rows: Tensor | None, held: Sequence[float], structure: Table, taken: Tensor, R: int) -> Tensor:
    """Rows of a table, [., R, columns], by their numbers; the number after the last stands for the row `held`."""
    last = torch.tensor([[held]], dtype=structure.coefficients.dtype, device="cpu").expand(1, R, -1)
    return (last if rows is None else torch.cat([rows, last])).index_select(0, taken)


def _places(structure: Table, table: Table | None, steps: tuple[int, ...], name: str) -> list[int | None]:
    """For each evaluation of the structure the row's own evaluation there; None: none, it is held.

    Raises:
        ValueError: they do not fit.
    """
    by_step = _by_step(structure)
    places: list[int | None] = [None] * len(structure.evaluations)
    if table is None:
        return places
    wanted, found = _sources(structure, range(structure.steps)), _sources(table, steps)
    for step, own in zip(steps, _by_step(table), strict=True):
        there = by_step[step]
        fits = len(there) == len(own) and all(
            found[k] == wanted[place][: len(found[k])] for k, place in zip(own, there, strict=True)
        )
        if not fits:
            held = next(k for k in range(structure.steps) if k not in steps)
            raise ValueError(
                f"{name} has a step of length 0, step {held}, and in step {step} this solver cannot go on "
                "from there: it reads velocities of earlier steps, or its first or last step is another. euler, "
                "midpoint, heun, rk4 and rk4_classic take such steps anywhere; ab2, dpmpp_2m and unipc before a "
                "sample's own first step and after its last; ab3 after its last; euler_at_final nowhere with those "
                "that evaluate more than once a step"
            )
        for k, place in zip(own, there, strict=True):
            places[place] = k
    return places


def _by_step(table: Table) -> list[list[int]]:
    """The evaluations of each step."""
    steps: list[list[int]] = [[]]
    for k, evaluation in enumerate(table.evaluations):
        steps[-1].append(k)
        if evaluation.commit:
            steps.append([])
    return steps[:-1]


def _sources(table: Table, numbers: Sequence[int]) -> list[tuple[Any, ...]]:
    """For each evaluation, of what it reads the step, by these numbers, and the stage; or that it is noise."""
    holds: dict[int, Any] = {} if table.noise is None else {table.noise: "noise"}
    sources = []
    for step, evaluations in zip(numbers, _by_step(table), strict=True):
        for stage, k in enumerate(evaluations):
            evaluation = table.evaluations[k]
            sources.append(tuple(holds[buffer] for buffer in evaluation.read))
            if evaluation.write is not None:
                holds[evaluation.write] = step, stage
    return sources
