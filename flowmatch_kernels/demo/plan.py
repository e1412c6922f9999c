"""How much the demo trains and measures, so that it ends in time on a slow or busy machine too."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

MOST_SECONDS = 150.0
"""For the whole course; the imports before it, and a machine that gets busier, have the rest of three minutes."""
MOST_SECONDS_OF_METHODS = 690.0
"""The same with --compare-methods, which trains two networks: of twelve minutes."""
LEAST_STEPS = 800
"""Of training, below which less is measured: they improve the samples more than a second draw does the figures."""


class Sizes(NamedTuple):
    """How much is measured after training, and what that costs."""

    draws: int
    """Of the noise, of as many flights as are held out; one draw's distance differs by about 0.3 km from another's."""
    reference_steps: int
    """Of the solver of the converged trajectories that samples are measured by."""
    fit_samples: int
    """Draws of noise that solvers are fitted to."""
    fit_reference_steps: int
    """Of the solver of those that they are fitted to."""
    rounds: int
    """At least, of the times."""
    cost: int
    """Of all that follows training, in training steps: the two share a machine's speed."""
    cost_of_solvers: int
    """The same with --compare-solvers."""
    method_draws: int
    """Of the noise with --compare-methods: each is a figure of its own."""
    cost_of_methods: int
    """`cost` with --compare-methods."""

    def __str__(self) -> str:
        draws = f"{self.draws} draw{'s' * (self.draws > 1)}"
        return (
            f"{draws} of the noise and {self.reference_steps} reference steps to compare, "
            f"{self.fit_samples} samples and {self.fit_reference_steps} reference steps to fit"
        )


SIZES = (
    Sizes(2, 256, 256, 192, rounds=3, cost=1350, cost_of_solvers=1600, method_draws=4, cost_of_methods=4500),
    Sizes(1, 128, 128, 128, rounds=1, cost=700, cost_of_solvers=700, method_draws=2, cost_of_methods=2250),
)
"""From most to least. With fewer reference steps the converged trajectories would not be converged. The costs are those
of one CPU thread, and a fifth more: they rise faster than a training step where other processes take the caches."""


class Course(NamedTuple):
    """What the demo does."""

    minutes: str
    """Within which it ends, as it is said."""
    seconds: float
    """For all of it but the imports."""
    networks: int
    """To train, each with as many steps."""
    cost: Callable[[Sizes], int]
    """Of what follows training, in steps of it."""


def course(*, compare_solvers: bool = False, compare_methods: bool = False) -> Course:
    """The demo with these options."""
    if compare_methods:
        return Course("twelve", MOST_SECONDS_OF_METHODS, 2, lambda sizes: sizes.cost_of_methods)
    return Course("three", MOST_SECONDS, 1, lambda sizes: sizes.cost_of_solvers if compare_solvers else sizes.cost)


class Plan(NamedTuple):
    """What fits into the time that is left."""

    steps: int
    """Of training, of each network."""
    training_seconds: float
    """After which training of a network is stopped, should it take longer than was measured."""
    sizes: Sizes


def plan(step_seconds: float, seconds_left: float, steps: int, chosen: Course) -> Plan:
    """The most that fits: the largest sizes that leave time for LEAST_STEPS, then as much training as there is time.

    Args:
        step_seconds: One training step takes, as measured.
        seconds_left: For training and all that follows.
        steps: Of training that were asked for; 0 if it is over.
        chosen: What the demo does.
    """
    for sizes in SIZES:
        after = step_seconds * chosen.cost(sizes)
        fit = int((seconds_left - after) / (chosen.networks * step_seconds))
        if fit >= min(steps, LEAST_STEPS):
            break
    taken = max(min(steps, fit), min(steps, 1))
    return Plan(taken, max((seconds_left - after) / chosen.networks, step_seconds), sizes)
