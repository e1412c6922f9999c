"""The published loop beside fitted solvers and the best with a name: bits, times, and the samples' quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .. import FittedSolver, FlowMatching, SolverComparison, StepFn
from ..solver_comparison import most_steps
from . import published_loop
from .distance import sliced_wasserstein
from .flights import Flights, IncrementScaling
from .plan import SIZES, Sizes
from .timing import medians_in_turn, network_share

FITTED = (3, 4, 6)
"""Evaluations of the fitted solvers."""
PUBLISHED = (10, 20, 40)
"""Steps of the published loop."""
NAMED = ("ab2", "ab3")
"""The solvers with a name that the best is chosen of."""
NAMED_EVALUATIONS = 10
"""At which it is chosen."""
EVALUATIONS = (4, 6, 10, 20, 40)
"""At which solvers with a name are measured: those of the two above among them."""
FLOOR_DRAWS = 10
"""Draws of a subset of train for the floor; one draw's distance differs by about 0.4 km from another's."""
NOISE_SEED = 1
"""Added to the seed of the noise to measure on: the fit, which draws with seed 0, has not seen it."""


class Line(NamedTuple):
    """A line of the table."""

    name: str
    evaluations: int
    milliseconds: float
    distance: float
    """Of the samples to the held-out flights, km."""
    error: float
    """RMS distance to the converged flights, km."""


class Comparison:
    """Samples as many trajectories as are held out, with the published loop and with ours.

    Args:
        flow_matching: The sampler; its backend is the one compared.
        network: The velocity.
        scaling: From states to positions.
        flights: The data.
        device: Where to sample.
        seed: Of the noise, and of the subsets for the floor.
        sizes: How much is measured.
    """

    def __init__(
        self,
        flow_matching: FlowMatching,
        network: StepFn,
        scaling: IncrementScaling,
        flights: Flights,
        device: torch.device,
        seed: int,
        sizes: Sizes = SIZES[0],
    ) -> None:
        self.flow_matching = flow_matching
        self.network = network
        self.scaling = scaling
        self.flights = flights
        self.device = device
        self.seed = seed
        self.sizes = sizes
        self.count = len(flights.test)

    def fit(self) -> list[FittedSolver]:
        """The fitted solvers."""
        fitted: list[FittedSolver] = self.flow_matching.fit_solver(
            self.network,
            FITTED,
            batch_size=self.sizes.fit_samples,
            device=self.device,
            reference_steps=self.sizes.fit_reference_steps,
            progress=True,
        )
        return fitted

    def published(self, steps: int) -> Tensor:
        """States [N, 64, 2] from the published loop."""
        torch.manual_seed(self.seed)
        return published_loop.sample(self.flow_matching.x_dims, self.count, self.network, self.device, steps)

    def ours(self, solver: str | FittedSolver, steps: int | None = None) -> Tensor:
        """States [N, 64, 2] from `FlowMatching.sample`."""
        return self._sample(self.network, solver, steps)

    def _sample(self, step_fn: StepFn, solver: str | FittedSolver, steps: int | None) -> Tensor:
        torch.manual_seed(self.seed)
        states = self.flow_matching.sample(self.count, step_fn, self.device, inference_step=steps, int_method=solver)
        assert isinstance(states, Tensor)
        return states

    def positions(self, solver: str | FittedSolver, steps: int | None = None) -> Tensor:
        """Sampled trajectories, [N, 64, 2], km."""
        return self.scaling.positions(self.ours(solver, steps))

    def distance(self, states: Tensor) -> float:
        """The sliced Wasserstein distance of states to the held-out flights, km: the mean over the draws."""
        draws = self.scaling.positions(states).split(self.count)
        return sum(sliced_wasserstein(draw, self.flights.test) for draw in draws) / len(draws)

    def error(self, states: Tensor, converged: Tensor) -> float:
        """RMS distance of the positions to those of the converged states, over waypoints and trajectories, km."""
        difference = self.scaling.positions(states) - self.scaling.positions(converged)
        return float(difference.square().sum(dim=-1).mean().sqrt())

    def solvers(self, solvers: Sequence[str | FittedSolver]) -> SolverComparison:
        """Solvers on this network, by their distance to the held-out flights and to the converged ones, km."""
        return self.flow_matching.compare_solvers(
            self.network,
            EVALUATIONS,
            solvers,
            batch_size=self.sizes.draws * self.count,
            device=self.device,
            reference_steps=self.sizes.reference_steps,
            generator=torch.Generator().manual_seed(self.seed + NOISE_SEED),
            error=self.error,
            quality=self.distance,
        )

    @cached_property
    def floor(self) -> float:
        """The distance to the held-out of as many random training pieces, km: the mean of 10 draws."""
        generator = torch.Generator().manual_seed(self.seed)
        train = self.flights.train
        draws = [torch.randperm(len(train), generator=generator)[: self.count] for _ in range(FLOOR_DRAWS)]
        return sum(sliced_wasserstein(train[draw], self.flights.test) for draw in draws) / FLOOR_DRAWS

    def lines(self, measured: SolverComparison, fitted: Sequence[FittedSolver]) -> list[Line]:
        """The table: the published loop, the best solver with a name, and the fitted ones."""
        flow_matching, named = self.flow_matching, best_named(measured)
        steps = most_steps(flow_matching, named, NAMED_EVALUATIONS)
        sides: dict[tuple[str, int], Callable[[], object]] = {}
        for n in PUBLISHED:
            sides["euler", n] = lambda n=n: self.published(n)  # type: ignore[misc]
        sides[named, flow_matching.nfe(steps, named)] = lambda: self.ours(named, steps)
        for solver in reversed(fitted):
            sides["fitted", solver.evaluations] = lambda solver=solver: self.ours(solver)  # type: ignore[misc]
        times = medians_in_turn(list(sides.values()), self.device, self.sizes.rounds)
        names = {"euler": "published loop, Euler", named: f"best with a name, {named}", "fitted": "fitted"}
        points = {(point.solver, point.evaluations): point for point in measured.points}
        lines = []
        for (name, n), milliseconds in zip(sides, times, strict=True):
            point = points[name, n]
            assert point.quality is not None
            lines.append(Line(names[name], n, milliseconds, point.quality, point.error))
        return lines

    def network_share(self) -> float:
        """The share, from 0 to 1, of one sample() with 10 Euler steps that is spent in the network."""
        return network_share(lambda step_fn: self._sample(step_fn, "euler", 10), self.network, self.device)

    def same_bits(self) -> bool:
        """Whether ours has the bits of the published loop, for each of its step counts."""
        return all(same_bits(self.published(steps), self.ours("euler", steps)) for steps in PUBLISHED)


def best_named(measured: SolverComparison) -> str:
    """The solver with a name whose samples are nearest to the held-out ones at 10 evaluations."""
    points = [p for p in measured.points if p.solver in NAMED and p.budget == NAMED_EVALUATIONS]
    return min(points, key=lambda point: point.quality or 0.0).solver


def table(lines: Sequence[Line]) -> str:
    """The lines as text."""
    shown = [f"  {'':28} evaluations   one sample()   distance to held-out   error"]
    for line in lines:
        shown.append(
            f"  {line.name:28} {line.evaluations:11}   {line.milliseconds:9.2f} ms   {line.distance:17.2f} km"
            f"   {line.error:5.2f} km"
        )
    return "\n".join(shown)


def gains(lines: Sequence[Line]) -> list[str]:
    """For each fitted solver, the most steps of the published loop whose samples are no nearer, and how much faster."""
    published = [line for line in lines if line.name.startswith("published")]
    said = []
    for line in lines:
        reached = [other for other in published if other.distance >= line.distance]
        if line.name == "fitted" and reached:
            most = max(reached, key=lambda other: other.evaluations)
            said.append(
                f"{line.evaluations} fitted evaluations: the quality of the published loop with {most.evaluations}, "
                f"{most.milliseconds / line.milliseconds:.1f} times faster."
            )
    return said


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two contiguous tensors agree in shape, dtype and every bit."""
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    )
