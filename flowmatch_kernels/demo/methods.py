"""DDPM, DDIM and flow matching beside each other: the quality of their samples against evaluations of the network."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import DDIM, DDPM, FlowMatching, StepFn
from ..solver_comparison import most_steps
from .comparison import NOISE_SEED, Comparison

EVALUATIONS = {
    "DDPM": (10, 20, 50, 100, 250, 1000),
    "DDIM": (5, 10, 20, 50, 100),
    "flow matching, euler": (5, 10, 20, 50),
    "flow matching, ab3": (5, 10, 20, 50),
}
"""At which each method is measured. DDPM and DDIM sample from the same network."""
TITLES = {"DDPM": "DDPM", "DDIM": "DDIM", "flow matching, ab3": "ab3"}
"""Of the methods whose flights are drawn."""
SETTINGS: Mapping[str, Any] = {"timestep_spacing": "trailing", "prediction_type": "v"}
"""Of DDPM and DDIM; the rest is as published: 1000 timesteps, linear betas. Trailing, so that any number of steps
starts where nothing but noise is left. There a prediction of the noise says little of the data: after 3,000 steps of
training the network here is wrong by an RMS of 3.7 at the last timestep, of data with an RMS of 0.5. DDIM adds no noise
that would hide it, and ends at 16 km; at 5 to 10 km where it clips the data to the largest entry of the flights."""
SHOWN = 10
"""Their evaluations."""
NEAR = 1.1
"""Within so many times the best distance of all, a method has reached it."""


class Point(NamedTuple):
    """What a method gives for a number of evaluations."""

    evaluations: int
    distances: tuple[float, ...]
    """To the held-out flights, km, of each draw of the noise."""

    @property
    def distance(self) -> float:
        """Their mean, km."""
        return statistics.fmean(self.distances)


class Measured(NamedTuple):
    """The points of each method."""

    points: Mapping[str, Sequence[Point]]
    floor: float
    """The distance of training flights, km."""
    shown: Mapping[str, Tensor]
    """Sampled flights by their title, [N, 64, 2], km: of DDPM, DDIM and flow matching, at the same evaluations."""

    @property
    def deviation(self) -> float:
        """The standard deviation of one draw's distance, km: over all points, each about its own mean."""
        spreads = [statistics.variance(point.distances) for points in self.points.values() for point in points]
        return statistics.fmean(spreads) ** 0.5

    @property
    def best(self) -> float:
        """The least distance of all, km."""
        return min(point.distance for points in self.points.values() for point in points)

    def reached(self, method: str) -> int | None:
        """The fewest evaluations measured whose distance is within 10% of the best of all; None: none is."""
        near = (point.evaluations for point in self.points[method] if point.distance <= NEAR * self.best)
        return min(near, default=None)

    def __str__(self) -> str:
        columns = sorted({point.evaluations for points in self.points.values() for point in points})
        lines = ["".join([f"  {'evaluations':22}", *(f"{n:>8}" for n in columns), "   within 10% of the best"])]
        for name, points in self.points.items():
            cells = {point.evaluations: f"{point.distance:.2f}" for point in points}
            reached = self.reached(name)
            said = "not reached" if reached is None else f"from {reached}"
            lines.append("".join([f"  {name:22}", *(f"{cells.get(n, '-'):>8}" for n in columns), f"   {said}"]))
        return "\n".join([*lines, f"  {'floor: training flights':22} {self.floor:.2f}"])


def compare(comparison: Comparison, diffusion: DDPM, prediction: StepFn) -> Measured:
    """Samples with each method.

    Args:
        comparison: Flow matching with its network, and what samples are measured by.
        diffusion: Of `diffusion_of`.
        prediction: Its network, of which DDIM samples too.
    """
    flow_matching, velocity = comparison.flow_matching, comparison.network
    implicit = DDIM(flow_matching.x_dims, backend=flow_matching.backend, **SETTINGS)

    def diffused(method: DDPM | DDIM) -> Callable[[int], Tensor]:
        return lambda n: method.sample(comparison.count, prediction, comparison.device, inference_step=n)

    def flowed(solver: str) -> Callable[[int], Tensor]:
        return lambda n: flow_matching.sample(
            *(comparison.count, velocity, comparison.device),
            inference_step=most_steps(flow_matching, solver, n),
            int_method=solver,
        )

    samplers = {
        "DDPM": diffused(diffusion),
        "DDIM": diffused(implicit),
        "flow matching, euler": flowed("euler"),
        "flow matching, ab3": flowed("ab3"),
    }
    points: dict[str, list[Point]] = {}
    shown = {}
    for name, evaluations in EVALUATIONS.items():
        points[name] = []
        for n in evaluations:
            distances = []
            for draw in range(comparison.sizes.method_draws):
                torch.manual_seed(comparison.seed + NOISE_SEED + draw)
                states = samplers[name](n)
                distances.append(comparison.distance(states))
            points[name].append(Point(n, tuple(distances)))
            if n == SHOWN and name in TITLES:
                shown[f"{TITLES[name]}, {n} evaluations"] = comparison.scaling.positions(states)
    return Measured(points, comparison.floor, shown)


def diffusion_of(flow_matching: FlowMatching) -> DDPM:
    """DDPM for the same states, which trains the network too."""
    return DDPM(flow_matching.x_dims, backend=flow_matching.backend, **SETTINGS)
