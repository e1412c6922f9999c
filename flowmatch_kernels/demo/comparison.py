"""The published loop beside `FlowMatching.sample`: bits, times, and the samples' quality."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .. import FlowMatching, StepFn
from . import published_loop
from .distance import sliced_wasserstein
from .flights import Flights, IncrementScaling
from .timing import medians_in_turn, network_share

FLOOR_DRAWS = 10
"""Draws of a subset of train for the floor; one draw's distance differs by about 0.4 km from another's."""


class Comparison:
    """Samples as many trajectories as are held out, with both loops, from the same seed.

    Args:
        flow_matching: The sampler; its backend is the one compared.
        network: The velocity.
        scaling: From states to positions.
        flights: The data.
        device: Where to sample.
        seed: Of the noise, and of the subsets for the floor.
    """

    def __init__(
        self,
        flow_matching: FlowMatching,
        network: StepFn,
        scaling: IncrementScaling,
        flights: Flights,
        device: torch.device,
        seed: int,
    ) -> None:
        self.flow_matching = flow_matching
        self.network = network
        self.scaling = scaling
        self.flights = flights
        self.device = device
        self.seed = seed
        self.count = len(flights.test)

    def published(self, steps: int) -> Tensor:
        """States [N, 64, 2] from the published loop."""
        torch.manual_seed(self.seed)
        return published_loop.sample(self.flow_matching.x_dims, self.count, self.network, self.device, steps)

    def ours(self, steps: int, network: StepFn | None = None) -> Tensor:
        """States [N, 64, 2] from `FlowMatching.sample`."""
        torch.manual_seed(self.seed)
        states = self.flow_matching.sample(self.count, network or self.network, self.device, inference_step=steps)
        assert isinstance(states, Tensor)
        return states

    def way(self, steps: int) -> tuple[Tensor, Tensor]:
        """The positions at each step from noise to trajectory, [N, steps + 1, 64, 2], km, and the times."""
        torch.manual_seed(self.seed)
        states, times = self.flow_matching.sample(
            self.count, self.network, self.device, return_all_steps=True, inference_step=steps
        )
        return self.scaling.positions(states), times.cpu()

    def distance(self, positions: Tensor) -> float:
        """The sliced Wasserstein distance of positions [N, 64, 2] to those held out, km."""
        return sliced_wasserstein(positions, self.flights.test)

    @cached_property
    def floor(self) -> float:
        """The distance to the held-out of as many random training pieces, km: the mean of 10 draws."""
        generator = torch.Generator().manual_seed(self.seed)
        train = self.flights.train
        draws = [torch.randperm(len(train), generator=generator)[: self.count] for _ in range(FLOOR_DRAWS)]
        return sum(self.distance(train[draw]) for draw in draws) / FLOOR_DRAWS

    def print_table(self, step_counts: Sequence[int]) -> bool:
        """Prints a row for each count of steps, and what the numbers are.

        Returns:
            Whether both loops gave the same bits for every count.
        """
        print(f"\nSampling {self.count} trajectories with the published loop and with ours, in turn:\n")
        print("  steps   published loop          ours   same bits   distance to held-out")
        all_same = True
        for steps in step_counts:
            theirs, states = self.published(steps), self.ours(steps)
            same = same_bits(theirs, states)
            all_same = all_same and same
            distance = self.distance(self.scaling.positions(states))
            theirs_ms, ours_ms = medians_in_turn(
                [lambda n=steps: self.published(n), lambda n=steps: self.ours(n)],  # type: ignore[misc]
                self.device,
            )
            print(
                f"  {steps:5}   {theirs_ms:11.2f} ms   {ours_ms:8.2f} ms   {'yes' if same else 'NO':>9}"
                f"   {distance:17.2f} km",
                flush=True,
            )
        print(f"  floor: as many training pieces                       {self.floor:19.2f} km\n")
        most = step_counts[-1]
        share = network_share(lambda step_fn: self.ours(most, step_fn), self.network, self.device)
        print(
            f"Times are medians for one sample(). With {most} steps the network takes {share:.1%} of ours.\n"
            "Distances are sliced 2-Wasserstein distances of the positions to those held out. The floor is\n"
            f"that of {self.count} of the {len(self.flights.train):,} training pieces, drawn at random: "
            f"the mean of {FLOOR_DRAWS} draws."
        )
        return all_same


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two contiguous tensors agree in shape, dtype and every bit."""
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    )
