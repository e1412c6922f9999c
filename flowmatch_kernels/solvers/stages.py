"""What a solver takes and returns: the steps of a time grid, and the stages of each.

A solver is a function that returns the stages of its steps, with the columns of all steps at once. To add one, write
such a function and enter it in `ode.SOLVERS`: no kernel changes, and not the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tracing import is_readable


class Steps(NamedTuple):
    """Consecutive steps of a time grid; every tensor is [n], or of R grids side by side [n, R]."""

    first: int
    """The number of the first of them."""
    n: int
    """How many steps."""
    start: Tensor
    """t at each step's start, in the grid's dtype."""
    end: Tensor
    """t at each step's end, in the grid's dtype."""
    h: Tensor
    """The step sizes in float64, to compute coefficients with: end - start, taken in the grid's dtype, or what the
    caller gave instead, as of noise levels."""
    noise_at: int = 0
    """The end of time at which the noise is: 0, or 1."""

    def at(self, fraction: float) -> Tensor:
        """t at a fraction of each step, in the grid's dtype: `h`, where it is given, may be in another unit."""
        return self.start + (self.end - self.start) * fraction

    def part(self, first: int, last: int) -> Steps:
        """Steps `first` up to `last` of these, as many as there are."""
        last = max(min(last, self.n), 0)
        first = max(min(first, last), 0)
        start, end, h = (part(tensor, first, last) for tensor in (self.start, self.end, self.h))
        return Steps(self.first + first, last - first, start, end, h, self.noise_at)


def part(x: Tensor, first: int, last: int, dim: int = 0) -> Tensor:
    """Entries `first` up to `last`."""
    # Not x[first:last], which asks for the device even of a FakeTensor.
    return x.narrow(dim, first, last - first)


class Earlier(NamedTuple):
    """What an earlier evaluation remembered: of a stage of this step, or of the first stage, steps ago."""

    b: Tensor
    """Its coefficient, [n]."""
    stage: int = 0
    ago: int = 0


class Stage(NamedTuple):
    """One evaluation of each step. Columns are float64, of the shape of `Steps`."""

    time: Tensor
    """Where to evaluate: [n], in the grid's dtype."""
    b0: Tensor
    """The coefficient of the velocity evaluated here."""
    earlier: tuple[Earlier, ...] = ()
    a: Tensor | float = 1.0
    """The coefficient of base."""
    c: Tensor | float = 0.0
    """What this evaluation remembers is its velocity + c*base."""
    noise: Tensor | None = None
    """The standard deviation of the noise that is added, [n]; of a solver with one stage that remembers nothing."""


class Segment(NamedTuple):
    """Steps with the same stages. A solver is one segment, or a few where its start or end differs."""

    steps: Steps
    stages: tuple[Stage, ...]

    def evaluated(self, grid: Sequence[float]) -> tuple[float, ...]:
        """The entries of the time grid at which it evaluates: its steps' starts, and with some solvers their ends.

        Args:
            grid: [T], the whole time grid.
        """
        first, last = self.steps.first, self.steps.first + self.steps.n
        starts = any(stage.time is self.steps.start for stage in self.stages)
        ends = any(stage.time is self.steps.end for stage in self.stages)
        return (*(grid[first:last] if starts else ()), *(grid[first + 1 : last + 1] if ends else ()))

    def part(self, first: int, last: int) -> Segment:
        """Its steps `first` up to `last`."""
        steps = self.steps.part(first, last)

        def cut(column: Any) -> Any:
            if column is self.steps.start:
                return steps.start  # the same object: `build` knows an entry of the grid by that
            if column is self.steps.end:
                return steps.end
            return part(column, first, last) if isinstance(column, Tensor) else column

        stages = tuple(
            Stage(
                cut(stage.time),
                cut(stage.b0),
                tuple(earlier._replace(b=cut(earlier.b)) for earlier in stage.earlier),
                cut(stage.a),
                cut(stage.c),
                cut(stage.noise),
            )
            for stage in self.stages
        )
        return Segment(steps, stages)

    def check(self) -> None:
        """Checks that the weights of a step's velocities sum to the step, as they must for a constant velocity.

        Only of a last stage that adds to base: where `a` is a column, the step is not a sum of velocities alone. A NaN
        is not an error here: `requests.check_finite` says what is wrong with the time grid.

        Raises:
            ValueError: the weights sum to something else; the largest difference is in the message.
        """
        last = self.stages[-1]
        if isinstance(last.a, Tensor) or last.a != 1.0 or not is_readable(last.b0):
            return
        weights = torch.stack([last.b0, *(earlier.b for earlier in last.earlier)])
        error = (weights.sum(0) - self.steps.h).abs()
        if (error > 1e-12 * weights.abs().sum(0)).any():  # rounding alone
            first = self.steps.first
            raise ValueError(
                f"the weights of steps {first} to {first + self.steps.n - 1} do not sum to the step sizes: they differ "
                f"by up to {error.nan_to_num().max().item():.3g}"
            )


Solver = Callable[[Steps], list[Segment]]
