"""The table: a solver on a time grid, one row for each evaluation of the velocity field.

A row says: call `step_fn(x=state, t=t)`, then combine, with `base` the state at the start of the step,

    out = a*base + b0*h0 + b1*h1 + b2*h2 + b3*h3

where h0 is the newest velocity and h1..h3 are earlier ones. The last row of a step commits: `out` is the
next base, and a state of the trajectory; before that it is only the next state to evaluate at.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import guidance
from ..guidance import Form, Weight
from ..ops import reference
from ..ops.fused_step import COLUMNS
from .fitted import FittedSolver
from .ode import solver
from .predictions import predicting
from .stages import Segment, Steps, part


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
    """[T + stages]: the time grid, then the times of the stages inside its steps."""
    coefficients: Tensor
    """[E, 8], the device's half of the rows: a, b0..b3, w0, w1, c."""
    steps: int
    """N."""
    buffers: int
    """How many history buffers the evaluations name."""
    weights: tuple[float, ...] = ()
    """With guidance, its weight for each evaluation."""
    units: tuple[tuple[bool, bool], ...] | None = None
    """For each row, whether a is 1, and whether c is 0; None: the host has not read them."""
    views: dict[int, tuple[reference.Columns, ...]] | None = None
    """What `columns` has made; None: it keeps nothing."""

    def readable(self) -> Table:
        """This table, with what the host reads of its rows: one synchronisation on a GPU."""
        if self.coefficients.is_meta:
            return self
        rows = self.coefficients.tolist()
        return self._replace(units=tuple((row[0] == 1.0, row[7] == 0.0) for row in rows), views={})

    def columns(self, dims: int) -> Sequence[reference.Columns]:
        """The rows as plain PyTorch combines states of so many dimensions with them."""
        if self.views is None or self.units is None:
            return [reference.Columns.of(self.coefficients, row, dims) for row in range(len(self.evaluations))]
        made = self.views.get(dims)
        if made is None:
            with torch.inference_mode(False), torch.no_grad():
                made = tuple(
                    columns._replace(a=None if unit else columns.a, c=None if no_shift else columns.c)
                    for row, (unit, no_shift) in enumerate(self.units)
                    for columns in [reference.Columns.of(self.coefficients, row, dims)]
                )
            self.views[dims] = made
        return made

    def guided(self, form: Form, weight: Weight) -> Table:
        """This table with guidance: its weights in the columns w0 and w1."""
        steps = [0, *itertools.accumulate(evaluation.commit for evaluation in self.evaluations)][:-1]

        def times() -> list[float]:
            on_host = self.times.tolist()
            return [on_host[evaluation.time] for evaluation in self.evaluations]

        weights = guidance.weights(weight, steps, times)
        columns = torch.tensor([form.weights(w) for w in weights], dtype=torch.float64, device="cpu").view(-1, 2)
        rows = self.coefficients
        parts = [part(rows, 0, 5, dim=1), columns.to(rows.device, rows.dtype), part(rows, 7, 8, dim=1)]
        return self._replace(coefficients=torch.cat(parts, dim=1), weights=weights, views=self.views and {})


def build(
    int_method: str | FittedSolver,
    grid: Tensor,
    dt: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    noise_at: int = 0,
    predicts: int | None = None,
    check: bool = False,
) -> Table:
    """The table of a solver on a grid.

    Args:
        int_method: The solver's name, or a fitted solver.
        grid: [T], the time grid.
        dt: [N], its step sizes; what is computed from them is float64, and rounded to `dtype` last.
        dtype: Of the coefficients: the arithmetic dtype of the state.
        device: Of the coefficients and times.
        noise_at: The end of time at which the noise is.
        predicts: The end of time whose state step_fn predicts; None: it predicts the velocity.
        check: Check each segment; reads values, so not while a compiler traces.

    Raises:
        ValueError: a segment is not consistent, or the prediction says nothing of the velocity at a time where the
            solver evaluates.
    """
    n = dt.numel()
    steps = Steps(0, part(grid, 0, n), part(grid, 1, n + 1), dt, noise_at)
    segments = [segment for segment in solver(int_method)(steps) if segment.steps.n]
    if check:
        for segment in segments:
            segment.check()
    if predicts is not None:
        segments = predicting(segments, predicts)

    read = {(step, s) for step, s, _ in _reads(segments)}
    ring = max([1, *[kept for _, _, kept in _reads(segments)]])

    def buffer(step: int, stage: int) -> int:
        return stage * ring + step % ring

    evaluations, times, length = [], [grid], n + 1
    for segment in segments:
        places = []  # of the first step's times
        for stage in segment.stages:
            if stage.time is segment.steps.start:
                places.append(segment.steps.first)
            elif stage.time is segment.steps.end:
                places.append(segment.steps.first + 1)
            else:
                places.append(length)
                times.append(stage.time)
                length += segment.steps.n
        for k in range(segment.steps.n):
            step = segment.steps.first + k
            for s, stage in enumerate(segment.stages):
                evaluations.append(
                    Evaluation(
                        time=places[s] + k,
                        commit=s == len(segment.stages) - 1,
                        read=tuple(buffer(step - e.ago, e.stage) for e in stage.earlier),
                        write=buffer(step, s) if (step, s) in read else None,
                    )
                )
    rows = [_coefficients(segment) for segment in segments]
    empty = torch.empty(0, len(COLUMNS), dtype=torch.float64, device=dt.device)
    return Table(
        evaluations=tuple(evaluations),
        times=torch.cat(times).to(device),
        coefficients=torch.cat([empty, *rows]).to(device, dtype),
        steps=n,
        buffers=max([0, *[e.write + 1 for e in evaluations if e.write is not None]]),
    )


def _reads(segments: list[Segment]) -> list[tuple[int, int, int]]:
    """What is read, and so must be remembered: (step, stage, how many steps it must last)."""
    return [
        (step - earlier.ago, earlier.stage, earlier.ago + (k > earlier.stage))
        for segment in segments
        for k, stage in enumerate(segment.stages)
        for earlier in stage.earlier
        for step in range(segment.steps.first, segment.steps.first + segment.steps.n)
    ]


def _coefficients(segment: Segment) -> Tensor:
    """Rows of a segment in float64: [n * stages, 8]."""
    rows = []
    for stage in segment.stages:
        columns: dict[str, Tensor | float] = dict.fromkeys(COLUMNS, 0.0)
        columns |= {"a": stage.a, "b0": stage.b0, "c": stage.c}
        columns |= {f"b{k}": earlier.b for k, earlier in enumerate(stage.earlier, start=1)}
        filled = [
            column if isinstance(column, Tensor) else torch.full_like(stage.b0, column) for column in columns.values()
        ]
        rows.append(torch.stack(filled, dim=1))
    return torch.stack(rows, dim=1).flatten(0, 1)


def evaluations(int_method: str | FittedSolver, steps: int) -> int:
    """How often a solver evaluates the velocity in so many steps."""
    if isinstance(int_method, FittedSolver):
        return int_method.evaluations
    grid = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64, device="cpu")
    segments = solver(int_method)(Steps(0, part(grid, 0, steps), part(grid, 1, steps + 1), torch.diff(grid)))
    return sum(segment.steps.n * len(segment.stages) for segment in segments)
