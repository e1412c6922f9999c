"""The trajectories of `flights.npz` (see README.md beside it), and the states that flow matching sees."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WAYPOINTS, AXES = 64, 2


@dataclass(frozen=True)
class Flights:
    """Pieces of real aircraft trajectories, each from the origin and heading along +x.

    Attributes:
        train: [2089, 64, 2], float32, km.
        test: [494, 64, 2], float32, km; held out: from flights of which no piece is in `train`.
        dt_seconds: Seconds between two waypoints.
    """

    train: Tensor
    test: Tensor
    dt_seconds: float

    @classmethod
    def load(cls) -> Flights:
        """Reads the package's own `flights.npz`."""
        path = importlib.resources.files(__package__).joinpath("flights.npz")
        with path.open("rb") as file, np.load(file) as arrays:
            return cls(
                torch.from_numpy(arrays["train"]),
                torch.from_numpy(arrays["test"]),
                float(arrays["dt_seconds"]),
            )


class IncrementScaling:
    """Between positions in km and states: state = STATE_STD * (increments - mean) / std.

    An increment is a waypoint less the one before it, and for the first waypoint less the origin,
    where the piece starts 8 s earlier. Mean and standard deviation are over the pieces, for each waypoint
    and axis.

    Args:
        positions: The training pieces, [N, 64, 2], km.
    """

    #: The states' standard deviation. Increments go together, so their principal components are several
    #: times wider; half the noise's deviation makes their way from noise straighter, and Euler more exact.
    STATE_STD = 0.5

    def __init__(self, positions: Tensor) -> None:
        increments = _increments(positions)
        #: Of the increments, [64, 2], km.
        self.mean = increments.mean(dim=0)
        #: Kilometres for one unit of state, [64, 2].
        self.unit = increments.std(dim=0) / self.STATE_STD

    def states(self, positions: Tensor) -> Tensor:
        """The states [N, 64, 2], no unit, of positions [N, 64, 2] in km."""
        return (_increments(positions) - self.mean) / self.unit

    def positions(self, states: Tensor) -> Tensor:
        """The positions [..., 64, 2], km, on the CPU, of states [..., 64, 2]: sums of increments."""
        return (states.cpu() * self.unit + self.mean).cumsum(dim=-2)


def _increments(positions: Tensor) -> Tensor:
    return torch.diff(positions, dim=-2, prepend=torch.zeros_like(positions[..., :1, :]))


def total_turn(positions: Tensor) -> Tensor:
    """By how many degrees each trajectory turns from its first increment to its last, left positive.

    Args:
        positions: [N, T, 2], T > 2, km.

    Returns:
        [N]: the sum of the changes of heading, each taken within +-180 degrees; two turns are 720.
    """
    steps = torch.diff(positions, dim=1)
    heading = torch.atan2(steps[..., 1], steps[..., 0])
    change = torch.diff(heading, dim=1)
    change = torch.remainder(change + torch.pi, 2 * torch.pi) - torch.pi
    return torch.rad2deg(change.sum(dim=1))
