"""Solvers: each turns a time grid into a table, one row for each evaluation of the velocity field.

A row says: call `step_fn(x=state, t=t)`, then combine, with `base` the state at the start of the step,

    out = a*base + b0*h0 + b1*h1 + b2*h2 + b3*h3

where h0 is the newest velocity and h1..h3 are earlier ones. The last row of a step commits: `out` is the
next base, and a state of the trajectory; before that it is only the next state to evaluate at.

A solver is a function that returns the stages of its steps, with the columns of all steps at once. To add
one, write such a function and enter it in `SOLVERS`: no kernel changes, and not the loop.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import guidance, time_grids
from .guidance import Form, Weight
from .ops.fused_step import COLUMNS

# ---- what a solver takes and returns ----


class Steps(NamedTuple):
    """Consecutive steps of a time grid; every tensor is [n]."""

    first: int
    """The number of the first of them."""
    start: Tensor
    """t at each step's start, in the grid's dtype."""
    end: Tensor
    """t at each step's end, in the grid's dtype."""
    dt: Tensor
    """The step sizes: end - start in the grid's dtype, or what the caller gave instead."""
    noise_at: int = 0
    """The end of time at which the noise is: 0, or 1."""

    @property
    def n(self) -> int:
        """How many steps."""
        return self.dt.numel()

    @property
    def h(self) -> Tensor:
        """The step sizes in float64, to compute coefficients with."""
        return self.dt.double()

    def at(self, fraction: float) -> Tensor:
        """t at a fraction of each step, in the grid's dtype."""
        return self.start + (self.dt * fraction).to(self.start.dtype)

    def part(self, first: int, last: int) -> Steps:
        """Steps `first` up to `last` of these, as many as there are."""
        last = max(min(last, self.n), 0)
        first = max(min(first, last), 0)
        start, end, dt = (_part(tensor, first, last) for tensor in (self.start, self.end, self.dt))
        return Steps(self.first + first, start, end, dt, self.noise_at)


def _part(x: Tensor, first: int, last: int, dim: int = 0) -> Tensor:
    # Not x[first:last], which asks for the device even of a FakeTensor.
    return x.narrow(dim, first, last - first)


class Earlier(NamedTuple):
    """What an earlier evaluation remembered: of a stage of this step, or of the first stage, steps ago."""

    b: Tensor
    """Its coefficient, [n]."""
    stage: int = 0
    ago: int = 0


class Stage(NamedTuple):
    """One evaluation of each step. Columns are float64, [n]."""

    time: Tensor
    """Where to evaluate: [n], in the grid's dtype."""
    b0: Tensor
    """The coefficient of the velocity evaluated here."""
    earlier: tuple[Earlier, ...] = ()
    a: Tensor | float = 1.0
    """The coefficient of base."""
    c: Tensor | float = 0.0
    """What this evaluation remembers is its velocity + c*base."""


class Segment(NamedTuple):
    """Steps with the same stages. A solver is one segment, or a few where its start or end differs."""

    steps: Steps
    stages: tuple[Stage, ...]


Solver = Callable[[Steps], list[Segment]]

# ---- the solvers ----


def euler(steps: Steps) -> list[Segment]:
    """x' = x + dt*v(x, t). Order 1, one evaluation a step."""
    return [Segment(steps, (Stage(steps.start, steps.h),))]


def midpoint(steps: Steps) -> list[Segment]:
    """The velocity half-way, reached by Euler. Order 2, two evaluations a step."""
    return [Segment(steps, (Stage(steps.start, steps.h / 2), Stage(steps.at(1 / 2), steps.h)))]


def heun(steps: Steps) -> list[Segment]:
    """The mean of the velocities at both ends. Order 2, two evaluations a step."""
    h = steps.h
    return [Segment(steps, (Stage(steps.start, h), Stage(steps.end, h / 2, (Earlier(h / 2),))))]


def rk4(steps: Steps) -> list[Segment]:
    """Kutta's 3/8 rule, which torchdiffeq calls rk4. Order 4, four evaluations a step."""
    h = steps.h
    stages = (
        Stage(steps.start, h / 3),
        Stage(steps.at(1 / 3), h, (Earlier(-h / 3),)),
        Stage(steps.at(2 / 3), h, (Earlier(h), Earlier(-h, stage=1))),
        Stage(steps.end, h / 8, (Earlier(h / 8), Earlier(3 * h / 8, stage=1), Earlier(3 * h / 8, stage=2))),
    )
    return [Segment(steps, stages)]


def rk4_classic(steps: Steps) -> list[Segment]:
    """The classic method of Runge and Kutta. Order 4, four evaluations a step."""
    h = steps.h
    stages = (
        Stage(steps.start, h / 2),
        Stage(steps.at(1 / 2), h / 2),
        Stage(steps.at(1 / 2), h),
        Stage(steps.end, h / 6, (Earlier(h / 6), Earlier(h / 3, stage=1), Earlier(h / 3, stage=2))),
    )
    return [Segment(steps, stages)]


def ab2(steps: Steps) -> list[Segment]:
    """Adams-Bashforth with two velocities; starts with euler. Order 2, one evaluation a step.

    The weights follow uneven grids: the integral over the step of the line through both velocities.
    """
    now = steps.part(1, steps.n)
    h, h1 = now.h, steps.part(0, steps.n - 1).h
    r = h / h1
    later = Stage(now.start, h * (1 + r / 2), (Earlier(-h * r / 2, ago=1),))
    return [*euler(steps.part(0, 1)), Segment(now, (later,))]


def ab3(steps: Steps) -> list[Segment]:
    """Adams-Bashforth with three velocities; starts with heun, then ab2. Order 3, one evaluation a step.

    The weights follow uneven grids: the integral over the step of the parabola through the velocities.
    """
    now = steps.part(2, steps.n)
    h, h1, h2 = now.h, steps.part(1, steps.n - 1).h, steps.part(0, steps.n - 2).h
    # v_n + s*[v_n, v_n-1] + s*(s + h1)*[v_n, v_n-1, v_n-2], integrated over s from 0 to h.
    slope = h**2 / 2 / h1
    bend = (h**3 / 3 + h1 * h**2 / 2) / (h1 + h2)
    later = Stage(
        now.start,
        h + slope + bend / h1,
        (Earlier(-slope - bend / h1 - bend / h2, ago=1), Earlier(bend / h2, ago=2)),
    )
    second = ab2(steps.part(0, 2))[1]
    return [*heun(steps.part(0, 1)), second, Segment(now, (later,))]


def dpmpp_2m(steps: Steps) -> list[Segment]:
    """DPM-Solver++(2M) for flow: alpha = t, sigma = 1 - t. One evaluation a step.

    x' = A*x + B*((1 + g)*D - g*D_before), with D = x + (1 - t)*v the predicted data. Order 2 between a first
    and a last step of first order: log(alpha / sigma), its exponential variable, has no end at 0 and 1.
    What it remembers is D / (1 - t).

    Source: DPM-Solver++, arXiv 2211.01095, algorithm 2.
    """
    data = 1 - steps.noise_at
    t, t_next = steps.start.double(), steps.end.double()
    left = data - t  # signed time to the data
    log_snr = torch.log((t - steps.noise_at).abs() / left.abs())
    first, now, last = steps.part(0, 1), steps.part(1, steps.n - 1), steps.part(max(steps.n - 1, 1), steps.n)
    log_next = torch.log((t_next - steps.noise_at).abs() / (data - t_next).abs())
    h = log_next - log_snr

    def of(x: Tensor, part: Steps, ago: int = 0) -> Tensor:
        begin = max(part.first - ago, 0)
        return _part(x, begin, begin + part.n)

    g = of(h, now) / of(h, now, ago=1) / 2
    b = now.h / of(left, now)
    later = Stage(
        now.start,
        now.h * (1 + g),
        (Earlier(-b * g * of(left, now, ago=1), ago=1),),
        a=1 + b * g,
        c=1 / of(left, now),
    )
    start = Stage(first.start, first.h, c=1 / of(left, first))
    return [Segment(first, (start,)), Segment(now, (later,)), *euler(last)]


SOLVERS: dict[str, Solver] = {
    solver.__name__: solver for solver in (euler, midpoint, heun, rk4, rk4_classic, ab2, ab3, dpmpp_2m)
}


def solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in SOLVERS:
        raise ValueError(f"Invalid integration method: {name} (known: {', '.join(SOLVERS)})")
    return SOLVERS[name]


def evaluations(int_method: str, steps: int) -> int:
    """How often a solver evaluates the velocity in so many steps."""
    grid = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64, device="cpu")
    segments = solver(int_method)(Steps(0, _part(grid, 0, steps), _part(grid, 1, steps + 1), torch.diff(grid)))
    return sum(segment.steps.n * len(segment.stages) for segment in segments)


# ---- predictions other than the velocity ----


def predicting(segments: list[Segment], end: int) -> list[Segment]:
    """The same solver for a step_fn that predicts the state p at one end of time, instead of the velocity.

    v = (p - x) / (end - t) is linear in p and x, and so is each x a solver evaluates at; so only columns
    change. An evaluation then remembers p + c*base, with a c that takes up as much of x as it can.

    Raises:
        ValueError: an evaluation is at `end`, where p says nothing of the velocity.
    """
    for segment in segments:
        for stage in segment.stages:
            if bool((stage.time == end).any()):
                way_out = f"pass time_steps that keep away from t = {end}, as linspace(1e-3, 1 - 1e-3, N + 1) does"
                if bool(segments[0].steps.start[:1] == end) and end != segment.steps.noise_at:
                    way_out = f"the time grid begins there, and noise_at={segment.steps.noise_at} is its other end"
                elif end != segment.steps.noise_at:
                    way_out += (
                        ", or use a solver that does not evaluate at a step's end (euler, midpoint, ab2, dpmpp_2m)"
                    )
                raise ValueError(
                    f"what step_fn predicts stands at t = {end} and says nothing of the velocity there, where this "
                    f"solver evaluates: {way_out}"
                )
    # 1 / (end - t) at each step's first stage, for what earlier steps have remembered.
    firsts = torch.cat([1 / (end - segment.stages[0].time.double()) for segment in segments])
    return [_predicting(segment, end, firsts) for segment in segments]


_Combination = dict[tuple[int, int], Tensor]  # (stage, steps ago) -> coefficient of what is remembered there


def _predicting(segment: Segment, end: int, firsts: Tensor) -> Segment:
    steps = segment.steps
    one = torch.ones_like(steps.h)
    x_base, x = one, _Combination()  # the state to evaluate at, in base and what is remembered
    velocities: dict[tuple[int, int], _Combination] = {}
    stages = []
    for k, stage in enumerate(segment.stages):
        alpha = 1 / (end - stage.time.double())  # v = alpha*p - alpha*x
        base = stage.a * one - stage.b0 * alpha * x_base
        terms = {key: -stage.b0 * alpha * coefficient for key, coefficient in x.items()}
        for earlier in stage.earlier:
            key = earlier.stage, earlier.ago
            if earlier.ago:
                if earlier.stage:
                    raise NotImplementedError("a prediction, and a solver that reads an earlier step's later stages")
                before = steps.first - earlier.ago
                velocities[key] = {key: _part(firsts, before, before + steps.n)}
            for other, coefficient in velocities[key].items():
                terms[other] = terms.get(other, 0) + earlier.b * coefficient
        c = (stage.c - alpha * x_base) / alpha
        stages.append(
            Stage(
                stage.time,
                stage.b0 * alpha,
                tuple(Earlier(b, *key) for key, b in terms.items()),
                a=base,
                c=c,
            )
        )
        velocities[k, 0] = {(k, 0): alpha} | {key: -alpha * coefficient for key, coefficient in x.items()}
        x_base, x = base - stage.b0 * alpha * c, terms | {(k, 0): stage.b0 * alpha}
    return Segment(steps, tuple(stages))


# ---- the table ----


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
    clocks: list[Any]
    """Where `sampling.Clock` puts one by."""
    weights: tuple[float, ...] = ()
    """With guidance, its weight for each evaluation."""

    def guided(self, form: Form, weight: Weight) -> Table:
        """This table with guidance: its weights in the columns w0 and w1."""
        steps = [0, *itertools.accumulate(evaluation.commit for evaluation in self.evaluations)][:-1]

        def times() -> list[float]:
            on_host = self.times.tolist()
            return [on_host[evaluation.time] for evaluation in self.evaluations]

        weights = guidance.weights(weight, steps, times)
        columns = torch.tensor([form.weights(w) for w in weights], dtype=torch.float64, device="cpu").view(-1, 2)
        rows = self.coefficients
        parts = [_part(rows, 0, 5, dim=1), columns.to(rows.device, rows.dtype), _part(rows, 7, 8, dim=1)]
        return self._replace(coefficients=torch.cat(parts, dim=1), weights=weights)


def build(
    int_method: str,
    grid: Tensor,
    dt: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    noise_at: int = 0,
    predicts: int | None = None,
) -> Table:
    """The table of a solver on a grid.

    Args:
        int_method: The solver's name.
        grid: [T], the time grid.
        dt: [N], its step sizes; what is computed from them is float64, and rounded to `dtype` last.
        dtype: Of the coefficients: the arithmetic dtype of the state.
        device: Of the coefficients and times.
        noise_at: The end of time at which the noise is.
        predicts: The end of time whose state step_fn predicts; None: it predicts the velocity.

    Raises:
        ValueError: the prediction says nothing of the velocity at a time where the solver evaluates.
    """
    n = dt.numel()
    steps = Steps(0, _part(grid, 0, n), _part(grid, 1, n + 1), dt, noise_at)
    segments = [segment for segment in solver(int_method)(steps) if segment.steps.n]
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
        clocks=[],
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


class _Cache:
    """The last few tables, for grids that a few numbers describe. Safe across threads and streams."""

    capacity = 64

    def __init__(self) -> None:
        self._tables: dict[Hashable, Table] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Table]) -> Table:
        table = self._tables.get(key)
        if table is None:
            # Ordinary tensors even under inference mode: who comes next may not be under it.
            with torch.inference_mode(False), torch.no_grad():
                table = make()
            if table.coefficients.is_cuda:  # another stream may be the next to read it
                torch.cuda.current_stream(table.coefficients.device).synchronize()
            with self._lock:
                self._tables[key] = table
                while len(self._tables) > self.capacity:
                    del self._tables[next(iter(self._tables))]  # the one that is here longest
        if table.coefficients.is_cuda:  # dropped, its memory must outlive what this stream still has to do with it
            stream = torch.cuda.current_stream(table.coefficients.device)
            table.coefficients.record_stream(stream)
            table.times.record_stream(stream)
        return table

    def clear(self) -> None:
        with self._lock:
            self._tables.clear()


cache = _Cache()


class Request(NamedTuple):
    """What describes a table on a grid that has a name: the key it is kept under."""

    int_method: str
    time_grid: str
    options: tuple[tuple[str, float], ...]
    """Of the time grid."""
    steps: int
    grid_dtype: torch.dtype
    """The grid is taken and differenced in this dtype, on `device`."""
    dtype: torch.dtype
    device: torch.device
    noise_at: int
    predicts: int | None
    form: str | None = None
    """The form of guidance, with a weight that is no function."""
    weight: float | tuple[float, ...] = 0.0
    signs: tuple[float, ...] = ()
    """Of the weights: -0.0 == 0.0, and weighs another way."""

    def is_itself(self) -> bool:
        """Whether it equals itself, as a key must: NaN does not."""
        entries = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        return not any(map(math.isnan, entries))

    def grid(self) -> Tensor:
        """The time grid, [T]."""
        if self.time_grid == "uniform":  # as the published loop takes it, to the bit
            first = float(self.noise_at)
            return torch.linspace(first, 1.0 - first, self.steps + 1, dtype=self.grid_dtype, device=self.device)
        make, options = time_grids.time_grid(self.time_grid), dict(self.options)
        return make(self.steps, noise_at=self.noise_at, dtype=self.grid_dtype, **options).to(self.device)

    def make(self) -> Table:
        """The table."""
        grid = self.grid()
        dt = torch.diff(grid)
        table = build(self.int_method, grid, dt, self.dtype, self.device, self.noise_at, self.predicts)
        return table if self.form is None else table.guided(guidance.form(self.form), self.weight)

    def make_checked(self) -> Table:
        """The table, if the solver can use its grid."""
        table = self.make()
        check_finite(table, self.int_method, self.noise_at)
        return table


def signs(weight: float | tuple[float, ...]) -> tuple[float, ...]:
    """The sign of each weight, as `Request` takes them."""
    return (
        tuple([math.copysign(1.0, w) for w in weight]) if isinstance(weight, tuple) else (math.copysign(1.0, weight),)
    )


def named(request: Request, cached: bool) -> Table:
    """The table that a request describes, perhaps from the cache.

    Raises:
        ValueError: the solver cannot use the grid (asked where the table is kept, and so in plain eager mode).
    """
    return cache.get(request, request.make_checked) if cached else request.make()


def check_finite(table: Table, int_method: str, noise_at: int) -> None:
    """Raises where a solver cannot use a time grid.

    Raises:
        ValueError: a coefficient is not finite.
    """
    rows = table.coefficients
    if not rows.is_meta and not (
        _part(rows, 0, 5, dim=1).isfinite().all() and _part(rows, 7, 8, dim=1).isfinite().all()
    ):
        grid = _part(table.times, 0, table.steps + 1).tolist()
        raise ValueError(
            f"{int_method} has no finite coefficients on this time grid, {grid!s:.200}: it needs one that runs from "
            f"the noise, at t = {noise_at}, to the data, with neither end of time inside it, entries that differ, and "
            "step_sizes, where they are given, other than 0"
        )
