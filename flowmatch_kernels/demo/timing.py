"""Wall times of sampling: two sides in turn, and the network's share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .. import StepFn

MOST_ROUNDS = 15
MOST_SECONDS = 3.0


def medians_in_turn(sides: list[Callable[[], object]], device: torch.device, least_rounds: int) -> list[float]:
    """The median milliseconds of each side, all sides run once a round, so that a slow spell hits all.

    After one round to warm up: 15 rounds, or fewer, at least `least_rounds`, once 3 seconds are over. Which side
    begins changes from round to round.

    Args:
        sides: What to time; each is waited for on the device.
        device: Where the sides run.
        least_rounds: 1 or more.
    """
    times: list[list[float]] = [[] for _ in sides]
    started = time.perf_counter()
    for measured in range(-1, MOST_ROUNDS):
        if measured >= least_rounds and time.perf_counter() - started > MOST_SECONDS:
            break
        for i in range(len(sides)):
            side = (i + measured) % len(sides)
            begin = now(device)
            sides[side]()
            if measured >= 0:
                times[side].append((now(device) - begin) * 1e3)
    return [statistics.median(side) for side in times]


def network_share(sample: Callable[[StepFn], object], step_fn: StepFn, device: torch.device) -> float:
    """The share, from 0 to 1, of sample(step_fn) that is spent in step_fn: the median of three runs.

    On a GPU each call of step_fn is waited for, which the loop itself does not do.

    Args:
        sample: The sampler, given the velocity to call.
        step_fn: The velocity.
        device: Where both run.
    """
    inside = 0.0

    def clocked(*, x: Tensor, t: Tensor) -> Tensor:
        nonlocal inside
        begin = now(device)
        v = step_fn(x=x, t=t)
        inside += now(device) - begin
        return v

    shares = []
    for _ in range(3):
        inside = 0.0
        begin = now(device)
        sample(clocked)
        shares.append(inside / (now(device) - begin))
    return statistics.median(shares)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
