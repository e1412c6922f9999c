"""Solvers: each turns a time grid into a table, one row for each evaluation of the velocity field.

A row says: call `step_fn(x=state, t=t)`, then combine, with `base` the state at the start of the step,

    out = a*base + b0*h0 + b1*h1 + b2*h2 + b3*h3

where h0 is the newest velocity and h1..h3 are earlier ones. If the row commits, `out` is the next base,
and a state of the trajectory; else it is only the next state to evaluate at.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .ops.fused_step import COLUMNS


class Evaluation(NamedTuple):
    """The host's half of a row."""

    time: int
    """Index into `Table.times` of the time to evaluate at."""
    commit: bool
    """The result is the new base, and a trajectory slot."""
    read: tuple[int, ...] = ()
    """History buffers that hold h1, h2, h3."""
    write: int | None = None
    """History buffer that takes h0 + c*base."""


class Table(NamedTuple):
    """A solver on a time grid: E evaluations, N steps, T = N + 1 grid entries."""

    evaluations: tuple[Evaluation, ...]
    """E of them, in order."""
    times: Tensor
    """[T + stages]: the time grid, then the times of the stages between its entries."""
    coefficients: Tensor
    """[E, 8], the device's half of the rows: a, b0..b3, w0, w1, c."""
    steps: int
    """N, the number of evaluations that commit."""
    buffers: int
    """How many history buffers the evaluations name."""


class Rows(NamedTuple):
    """What a solver returns. A column is a tensor [E], in the grid's dtype, or one float for all rows."""

    evaluations: list[Evaluation]
    times: Tensor
    b: tuple[Tensor, ...]
    a: Tensor | float = 1.0
    c: Tensor | float = 0.0


def euler(grid: Tensor, dt: Tensor) -> Rows:
    """x' = x + dt*v(x, t). Order 1, one evaluation a step."""
    return Rows([Evaluation(time=i, commit=True) for i in range(dt.numel())], grid, b=(dt,))


SOLVERS: dict[str, Callable[[Tensor, Tensor], Rows]] = {"euler": euler}


def solver(name: str) -> Callable[[Tensor, Tensor], Rows]:
    """The solver of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in SOLVERS:
        raise ValueError(f"Invalid integration method: {name} (known: {', '.join(SOLVERS)})")
    return SOLVERS[name]


def build(
    int_method: str, grid: Tensor, dt: Tensor, dtype: torch.dtype, device: torch.device, weight: float | None
) -> Table:
    """The table of a solver on a grid.

    Args:
        int_method: The solver's name.
        grid: [T], the time grid.
        dt: [N], its step sizes; rounded to `dtype` last.
        dtype: Of the coefficients: the arithmetic dtype of the state.
        device: Of the coefficients and times.
        weight: The guidance weight w; w0 = 1 - w is taken in double, as eager Python does.
    """
    rows = solver(int_method)(grid, dt)
    columns: dict[str, Tensor | float] = dict.fromkeys(COLUMNS, 0.0) | {"a": rows.a, "c": rows.c}
    columns |= {f"b{k}": column for k, column in enumerate(rows.b)}
    if weight is not None:
        columns |= {"w0": 1 - weight, "w1": weight}
    coefficients = torch.stack(
        [
            column.to(device, dtype)
            if isinstance(column, Tensor)
            else torch.full((len(rows.evaluations),), column, dtype=torch.float64, device=device).to(dtype)
            for column in columns.values()
        ],
        dim=1,
    )
    buffers = {e.write for e in rows.evaluations if e.write is not None}
    return Table(
        evaluations=tuple(rows.evaluations),
        times=rows.times.to(device),
        coefficients=coefficients,
        steps=sum(e.commit for e in rows.evaluations),
        buffers=len(buffers),
    )


class _Cache:
    """The last few tables, for grids that a few numbers describe. Safe across threads and streams."""

    capacity = 64

    def __init__(self) -> None:
        self._tables: OrderedDict[Hashable, Table] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Table]) -> Table:
        with self._lock:
            table = self._tables.get(key)
            if table is not None:
                self._tables.move_to_end(key)
        if table is None:
            # Ordinary tensors even under inference mode: who comes next may not be under it.
            with torch.inference_mode(False), torch.no_grad():
                table = make()
            if table.coefficients.is_cuda:  # another stream may be the next to read it
                torch.cuda.current_stream(table.coefficients.device).synchronize()
            with self._lock:
                self._tables[key] = table
                while len(self._tables) > self.capacity:
                    self._tables.popitem(last=False)
        return table

    def clear(self) -> None:
        with self._lock:
            self._tables.clear()


cache = _Cache()


def uniform(
    int_method: str,
    steps: int,
    grid_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    weight: float | None,
    cached: bool,
) -> Table:
    """The table on linspace(0, 1, steps + 1), taken and differenced on `device` in `grid_dtype`."""

    def make() -> Table:
        grid = torch.linspace(0.0, 1.0, steps + 1, dtype=grid_dtype, device=device)
        return build(int_method, grid, torch.diff(grid), dtype, device, weight)

    if not cached:
        return make()
    sign = None if weight is None else math.copysign(1.0, weight)  # -0.0 == 0.0, and weighs another way
    return cache.get((int_method, steps, grid_dtype, dtype, device, weight, sign), make)
