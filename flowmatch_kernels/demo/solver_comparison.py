"""The solvers beside each other, at equal evaluations of the network: quality of the samples, and solver error."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..solvers import SOLVERS
from .comparison import FLOOR_DRAWS, Comparison

BUDGETS = (5, 10, 20, 40)
"""Evaluations of the network for one trajectory."""
DRAWS = 4
"""Draws of the noise; one draw's distance differs by about 0.3 km from another's, for all solvers alike."""
CONVERGED_STEPS = 50
"""Of rk4, 200 evaluations, for the converged trajectories: within 3e-5 km, RMS, of those of 800 evaluations."""


class Point(NamedTuple):
    """What a solver gives within a budget of evaluations."""

    budget: int
    """The most evaluations allowed."""
    evaluations: int
    """Those spent: as many as whole steps can spend."""
    distance: float
    """The sliced Wasserstein distance to the held-out, km: the mean over the draws."""
    error: float
    """The distance of each trajectory to the converged one, km: root mean square over waypoints and draws."""


Curves = dict[str, list[Point]]
"""Each solver's points, the budgets rising."""


class SolverComparison:
    """Samples with every solver from the same noise: as many trajectories as are held out, in each of 4 draws.

    Args:
        comparison: The sampler, the network and the data.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        generator = torch.Generator().manual_seed(comparison.seed)
        noise = torch.randn(DRAWS * comparison.count, *comparison.flow_matching.x_dims, generator=generator)
        self.noise = noise.to(comparison.device)

    def positions(self, solver: str, steps: int) -> Tensor:
        """The trajectories of all draws, [draws * N, 64, 2], km."""
        states = self.comparison.flow_matching.sample(
            len(self.noise),
            self.comparison.network,
            self.comparison.device,
            noise=self.noise,
            inference_step=steps,
            int_method=solver,
        )
        assert isinstance(states, Tensor)
        return self.comparison.scaling.positions(states)

    def distance(self, positions: Tensor) -> float:
        """The distance to the held-out, km, of what `positions()` gave: the mean over the draws."""
        return sum(map(self.comparison.distance, positions.chunk(DRAWS))) / DRAWS

    def error(self, positions: Tensor) -> float:
        """The distance to the converged trajectories, km, of what `positions()` gave: root mean square."""
        return float((positions - self.converged).square().sum(dim=-1).mean().sqrt())

    @cached_property
    def converged(self) -> Tensor:
        """The trajectories that the network leads to, without the error of a solver: [draws * N, 64, 2], km."""
        return self.positions("rk4", CONVERGED_STEPS)

    @cached_property
    def converged_distance(self) -> float:
        """The distance of the converged trajectories to the held-out, km: the network's own."""
        return self.distance(self.converged)

    def curve(self, solver: str) -> list[Point]:
        """A point for each budget that pays for one step or more."""
        points = []
        for budget in BUDGETS:
            steps = self._steps(solver, budget)
            if steps:
                positions = self.positions(solver, steps)
                points.append(
                    Point(budget, self._evaluations(solver, steps), self.distance(positions), self.error(positions))
                )
        return points

    def _steps(self, solver: str, budget: int) -> int:
        """The most steps within a budget."""
        steps = 0
        while self._evaluations(solver, steps + 1) <= budget:
            steps += 1
        return steps

    def _evaluations(self, solver: str, steps: int) -> int:
        return self.comparison.flow_matching.nfe(steps, solver, guided=False)

    def print_tables(self) -> Curves:
        """Prints a table of distances and one of errors, a row for each solver, and what the numbers are.

        Returns:
            What was measured.
        """
        comparison, count = self.comparison, self.comparison.count
        heads = [f"{budget:8}     " for budget in BUDGETS]
        print(f"\nSampling {DRAWS} x {count} trajectories with every solver, from the same noise.\n")
        print("  Distance to held-out, km")
        print(_row("evaluations", heads))
        curves: Curves = {}
        for solver in SOLVERS:
            curves[solver] = points = self.curve(solver)
            print(_row(solver, _cells({point: f"{point.distance:.2f}" for point in points})), flush=True)
        print(f"  converged: {self.converged_distance:.2f} km; floor: {comparison.floor:.2f} km\n")

        print("  Distance to the converged trajectories, km")
        print(_row("evaluations", [*heads, "  order"]))
        for solver, points in curves.items():
            cells = _cells({point: f"{point.error:#.3g}" for point in points})
            print(_row(solver, [*cells, f"{observed_order(points):7.1f}"]))
        print(
            "\nIn brackets: the evaluations spent, where whole steps do not spend them all.\n"
            "Distances to held-out are sliced 2-Wasserstein distances of the positions, the mean of "
            f"{DRAWS} draws\n"
            f"of the noise, of {count} trajectories each. What no solver takes away, the network's own, is that\n"
            f"of the converged trajectories: rk4 with {self._evaluations('rk4', CONVERGED_STEPS)} evaluations. "
            f"The floor is that of {count} of the {len(comparison.flights.train):,}\n"
            f"training pieces, drawn at random: the mean of {FLOOR_DRAWS} draws.\n"
            "Distances to the converged trajectories are the solver's own error: root mean square, over waypoints,\n"
            "trajectories and draws, from the same noise. The order is their slope between the last two columns."
        )
        return curves


def observed_order(points: list[Point]) -> float:
    """p, where the error falls as evaluations^-p between the last two points; NaN where there are no two."""
    if len(points) < 2:
        return math.nan
    before, last = points[-2:]
    return math.log(before.error / last.error) / math.log(last.evaluations / before.evaluations)


def _cells(numbers: dict[Point, str]) -> list[str]:
    """A cell for each budget, with the evaluations spent in brackets where they are fewer."""
    cells = dict.fromkeys(BUDGETS, f"{'-':>8}     ")
    for point, number in numbers.items():
        spent = f"({point.evaluations})" if point.evaluations < point.budget else ""
        cells[point.budget] = f"{number:>8} {spent:4}"
    return list(cells.values())


def _row(head: str, cells: list[str]) -> str:
    return f"  {head:12}{''.join(cells)}".rstrip()
