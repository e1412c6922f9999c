"""The table: a solver on a time grid, one row for each evaluation of the velocity field.

A row says: call `step_fn(x=state, t=t)`, then combine, with `base` the state at the start of the step,

    out = a*base + b0*h0 + b1*h1 + b2*h2 + b3*h3

where h0 is the newest velocity and h1..h3 are earlier ones. The last row of a step commits: `out` is the
next base, and a state of the trajectory; before that it is only the next state to evaluate at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import guidance
from ..guidance import Form, Weight
from ..ops import reference
from ..ops.fused_step import COLUMNS, HELD
from ..tracing import is_readable
from .fitted import FittedSolver
from .grid import Grid, on_host
from .ode import euler, solver
from .predictions import predicting
from .stages import Segment, Steps, part
from .stochastic import Loaded

#: The column of the noise: a solver that adds noise remembers no velocities.
NOISE = COLUMNS.index("b1")


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
    """[T + stages]: the time grid, then the times of the stages inside its steps; of each sample, [T + stages, B]; of
    each token, [T + stages, B, L]."""
    coefficients: Tensor
    """[E, 8], the device's half of the rows: a, b0..b3, w0, w1, c; with rows of their own, [E, R, 8]."""
    steps: int
    """N."""
    buffers: int
    """How many history buffers the evaluations name."""
    sum_first: bool = False
    """The fused step's argument: its terms are added before they are multiplied."""
    noise: int | None = None
    """The history buffer that takes the noise of a step, where the solver adds noise."""
    densities: Tensor | None = None
    """[E, 2], with noise: scale and offset of each row, for `ops.step_log_prob`; of each sample, [E, B, 2]."""
    noiseless: Mapping[int, Sequence[int]] = {}
    """With noise: rows that the host knows to add none, and the samples; held ones, which have none, do not count."""
    weights: Sequence[Any] = ()
    """With guidance, its weight for each evaluation: a float, or where rows of their own differ a tuple of R."""
    units: tuple[tuple[bool, bool], ...] | None = None
    """For each row, whether a is 1, and whether c is 0; None: the host has not read them."""
    views: dict[int, tuple[reference.Columns, ...]] | None = None
    """What `columns` has made; None: it keeps nothing."""
    sizes: tuple[int, ...] = ()
    """The first sizes of the state's shape of which each has rows of its own, (B,) or (B, L); R is their product."""

    @property
    def of_samples(self) -> bool:
        """Each sample, or token, has rows of its own: coefficients [E, R, 8]."""
        return bool(self.sizes)

    def readable(self) -> Table:
        """This table, with what the host reads of its rows: one synchronisation on a GPU."""
        if not is_readable(self.coefficients):
            return self
        rows = self.coefficients.cpu()
        if not self.of_samples:
            rows = rows.unsqueeze(1)
        ones, zeros = (rows[..., 0] == 1).all(dim=1).tolist(), (rows[..., 7] == 0).all(dim=1).tolist()
        units = tuple((a, c and not self.sum_first) for a, c in zip(ones, zeros, strict=True))
        noiseless: dict[int, list[int]] = {}
        if self.noise is not None:
            held = (rows[..., :NOISE] == rows.new_tensor(HELD[:NOISE])).all(dim=-1)
            for row, sample in ((rows[..., NOISE] == 0) & ~held).nonzero().tolist():
                noiseless.setdefault(row, []).append(sample)
        return self._replace(units=units, views={}, noiseless=noiseless)

    def columns(self, dims: int) -> Sequence[reference.Columns]:
        """The rows as plain PyTorch combines states of so many dimensions with them."""
        if self.views is None or self.units is None:
            rows = range(len(self.evaluations))
            return [reference.Columns.of(self.coefficients, row, dims, self.sizes) for row in rows]
        made = self.views.get(dims)
        if made is None:
            with torch.inference_mode(False), torch.no_grad():
                made = tuple(
                    columns._replace(a=None if unit else columns.a, c=None if no_shift else columns.c)
                    for row, (unit, no_shift) in enumerate(self.units)
                    for columns in [reference.Columns.of(self.coefficients, row, dims, self.sizes)]
                )
            self.views[dims] = made
        return made

    def guided(
        self,
        form: Form,
        weight: Weight,
        times: Callable[[], Sequence[Any]] | None = None,
        sizes: tuple[int, ...] = (),
    ) -> Table:
        """This table with guidance: its weights in the columns w0 and w1.

        Args:
            form: How the velocities are combined.
            weight: As `guidance.checked` returns it.
            times: Gives the numbers of `self.times`, where that cannot be read and the weight is a function.
            sizes: The first sizes of the state's shape that weights or times are given for.
        """
        steps = [0, *itertools.accumulate(int(evaluation.commit) for evaluation in self.evaluations)][:-1]

        def evaluated() -> list[Any]:
            given = self.times.flatten(1) if self.times.dim() > 1 else self.times
            on_host = given.tolist() if times is None or is_readable(given) else times()
            return [on_host[evaluation.time] for evaluation in self.evaluations]

        rows, densities = self.coefficients, self.densities
        if sizes:
            weights, column = guidance.weights_of_rows(weight, sizes, steps, evaluated, rows.dtype)

            def spread(table: Tensor) -> Tensor:
                more = [1] * (len(sizes) - len(self.sizes))
                return table.view(-1, *self.sizes, *more, table.shape[-1]).expand(-1, *sizes, -1).flatten(1, -2)

            rows = spread(rows)
            densities = None if densities is None else spread(densities).contiguous()
        else:
            weights = guidance.weights(weight, steps, evaluated, rows.dtype)
            column = guidance.column(weight, weights)
        if not weights:
            coefficients = rows.contiguous()
            return self._replace(coefficients=coefficients, densities=densities, views=self.views and {}, sizes=sizes)
        columns = torch.stack(
            [torch.full_like(column, w) if isinstance(w, float) else w for w in form.weights(column)], dim=-1
        )
        columns = columns.to(rows.dtype).to(rows.device)
        parts = [part(rows, 0, 5, dim=-1), columns, part(rows, 7, 8, dim=-1)]
        coefficients = torch.cat(parts, dim=-1)
        return self._replace(
            coefficients=coefficients, densities=densities, weights=weights, views=self.views and {}, sizes=sizes
        )


def build(
    int_method: Loaded,
    grid: Grid,
    sizes: Grid | None,
    dtype: torch.dtype,
    device: torch.device,
    noise_at: int = 0,
    predicts: int | None = None,
    euler_at_final: bool = False,
    check: bool = False,
    euler_at_start: bool = False,
) -> Table:
    """The table of a solver on a grid.

    Args:
        int_method: The solver's name, or a fitted solver.
        grid: The time grid, [T]; or several side by side, [T, R], whose coefficients are [E, R, 8].
        sizes: The step sizes, [N] or [N, R]; None: the differences, taken in the grid's dtype. What is computed from
            them is float64, on the CPU, and rounded to `dtype` last.
        dtype: Of the coefficients: the arithmetic dtype of the state.
        device: Of the coefficients and times.
        noise_at: The end of time at which the noise is.
        predicts: The end of time whose state step_fn predicts; None: it predicts the velocity.
        euler_at_final: The last step is Euler's, so that nothing is evaluated at the end of the grid.
        check: Check each segment.
        euler_at_start: The first step is Euler's, so that it evaluates once.

    Raises:
        ValueError: a segment is not consistent, or the prediction says nothing of the velocity at a time where the
            solver evaluates.
    """
    times = on_host(grid.tensor)
    if sizes is not None and sizes.tensor.is_meta:  # as the state is
        times = times.to("meta")
    n = int(times.shape[0]) - 1
    dt = torch.diff(times, dim=0) if sizes is None else sizes.tensor.to(times.device)
    steps = Steps(0, n, part(times, 0, n), part(times, 1, n + 1), dt.double(), noise_at)
    segments = _segments(int_method, steps, euler_at_final, euler_at_start)
    if check:
        for segment in segments:
            segment.check()
    if predicts is not None:
        segments = predicting(segments, predicts, grid.known)

    read = {(step, s) for step, s, _ in _reads(segments)}
    ring = max([1, *[kept for _, _, kept in _reads(segments)]])

    def buffer(step: int, stage: int) -> int:
        return stage * ring + step % ring

    memory = max([0, *(buffer(*key) + 1 for key in read)])
    noise = memory if any(stage.noise is not None for segment in segments for stage in segment.stages) else None
    assert noise is None or not read

    evaluations, all_times, length = [], [times], n + 1
    for segment in segments:
        places = []  # of the first step's times
        for stage in segment.stages:
            if stage.time is segment.steps.start:
                places.append(segment.steps.first)
            elif stage.time is segment.steps.end:
                places.append(segment.steps.first + 1)
            else:
                places.append(length)
                all_times.append(stage.time)
                length += segment.steps.n
        for k in range(segment.steps.n):
            step = segment.steps.first + k
            for s, stage in enumerate(segment.stages):
                evaluations.append(
                    Evaluation(
                        time=places[s] + k,
                        commit=s == len(segment.stages) - 1,
                        read=tuple(buffer(step - e.ago, e.stage) for e in stage.earlier)
                        + (() if stage.noise is None else (memory,)),
                        write=buffer(step, s) if (step, s) in read else None,
                    )
                )
    rows = [_coefficients(segment) for segment in segments]
    empty = times.new_empty(0, *times.shape[1:], len(COLUMNS), dtype=torch.float64)
    coefficients = torch.cat([empty, *rows])
    return Table(
        evaluations=tuple(evaluations),
        # Through float64, which is exact: under autocast, cat takes no 16-bit dtype but autocast's own.
        times=torch.cat([part.double() for part in all_times]).to(times.dtype).to(device),
        coefficients=coefficients.to(dtype).to(device),
        steps=n,
        buffers=memory + (noise is not None),
        noise=noise,
        densities=None if noise is None else _densities(coefficients).to(dtype).to(device),
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


def _densities(coefficients: Tensor) -> Tensor:
    """Scale and offset of log N(next; mean, std^2), [E, 2] or [E, R, 2]: -1/(2 std^2), -log(std) - log(2 pi)/2."""
    std = coefficients.select(-1, NOISE)
    return torch.stack([-0.5 / std**2, -torch.log(std) - math.log(2 * math.pi) / 2], dim=-1)


def _coefficients(segment: Segment) -> Tensor:
    """Rows of a segment in float64: [n * stages, 8], or [n * stages, R, 8]."""
    rows = []
    for stage in segment.stages:
        columns: dict[str, Tensor | float] = dict.fromkeys(COLUMNS, 0.0)
        columns |= {"a": stage.a, "b0": stage.b0, "c": stage.c}
        terms = [earlier.b for earlier in stage.earlier] + ([] if stage.noise is None else [stage.noise])
        columns |= {f"b{k}": b for k, b in enumerate(terms, start=1)}
        filled = [
            column if isinstance(column, Tensor) else torch.full_like(stage.b0, column) for column in columns.values()
        ]
        rows.append(torch.stack(filled, dim=-1))
    return torch.stack(rows, dim=1).flatten(0, 1)


def _segments(int_method: Loaded, steps: Steps, euler_at_final: bool, euler_at_start: bool = False) -> list[Segment]:
    """The solver's segments that have steps."""
    segments = [segment for segment in solver(int_method)(steps) if segment.steps.n]
    if euler_at_start and segments:
        first, *after = segments
        segments = [*euler(steps.part(0, 1)), first.part(1, first.steps.n), *after]
    if euler_at_final and segments:
        *before, last = segments
        segments = [*before, last.part(0, last.steps.n - 1), *euler(steps.part(steps.n - 1, steps.n))]
    return [segment for segment in segments if segment.steps.n]


def evaluations(int_method: Loaded, steps: int, euler_at_final: bool = False) -> int:
    """How often a solver evaluates the velocity in so many steps."""
    if isinstance(int_method, FittedSolver):
        return int_method.evaluations
    grid = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64, device="cpu")
    of_grid = Steps(0, steps, part(grid, 0, steps), part(grid, 1, steps + 1), torch.diff(grid))
    return sum(segment.steps.n * len(segment.stages) for segment in _segments(int_method, of_grid, euler_at_final))
