"""Steps that add noise, each one row of the table.

Those of `sde` and `dance` are steps of an SDE with the marginals of dx/dt = v, which many steps come near. `cps` and
`renoise` keep the level of noise, and the share that is new does not shrink with the step: their marginals are others.

Here v = dx/dt, and the noise is at t = `noise_at`. The papers write sigma for the distance in time from the data, so
that x = (1 - sigma)*data + sigma*noise, and their velocity is dx/dsigma = noise - data: v with noise_at=1, and -v with
noise_at=0. With d = sigma' - sigma < 0, their v*d is our v*h in both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..arguments import finite
from .fitted import FittedSolver
from .stages import Segment, Stage, Steps


def sde(steps: Steps, eta: float = 0.7) -> list[Segment]:
    """The SDE with the marginals of the ODE; eta = 0 is euler, to the bit.

    s = eta*sqrt(sigma / (1 - sigma~)), with sigma~ = sigma, or at sigma = 1 the second sigma of the grid:

        x' = x*(1 + s^2/(2 sigma)*d) + v*(1 + s^2*(1 - sigma)/(2 sigma))*d + s*sqrt(-d)*z

    Source: Flow-GRPO, arXiv 2505.05470, eq. 9.
    """
    sigma, after = _sigmas(steps)
    # Of the first step alone: the second entry of the grid is where it ends.
    bounded = torch.where(sigma == 1, after, sigma)
    return _langevin(steps, eta * torch.sqrt(sigma / (1 - bounded)))


def dance(steps: Steps, eta: float = 0.3) -> list[Segment]:
    """`sde` with s = eta at all times.

    Source: DanceGRPO, arXiv 2505.07818, eq. 3 and 4.
    """
    sigma, _ = _sigmas(steps)
    return _langevin(steps, torch.full_like(sigma, eta))


def cps(steps: Steps, eta: float = 0.7) -> list[Segment]:
    """Coefficients-preserving sampling: x' keeps the share of noise that the straight path has at its time.

        x' = (1 - sigma')*(x - sigma*v) + sigma'*cos(eta*pi/2)*(x + (1 - sigma)*v) + sigma'*sin(eta*pi/2)*z

    Source: Flow-CPS, arXiv 2509.05952.
    """
    sigma, after = _sigmas(steps)
    kept = after * math.cos(eta * math.pi / 2)
    velocity = kept * (1 - sigma) - (1 - after) * sigma
    return [_added(steps, 1 - after + kept, velocity, after * math.sin(eta * math.pi / 2))]


def renoise(steps: Steps) -> list[Segment]:
    """The predicted data, with fresh noise: x' = (1 - sigma')*(x - sigma*v) + sigma'*z.

    For consistency and distilled models (LCM, arXiv 2310.04378, algorithm 3; DMD2, arXiv 2405.14867).
    """
    sigma, after = _sigmas(steps)
    return [_added(steps, 1 - after, -(1 - after) * sigma, after)]


def _langevin(steps: Steps, s: Tensor) -> list[Segment]:
    """x*(1 + s^2/(2 sigma)*d) + v*(1 + s^2*(1 - sigma)/(2 sigma))*d + s*sqrt(-d)*z."""
    sigma, _ = _sigmas(steps)
    d = -steps.h.abs()
    half = s**2 / (2 * sigma)
    stage = Stage(steps.start, (1 + half * (1 - sigma)) * steps.h, a=1 + half * d, noise=s * torch.sqrt(-d))
    return [Segment(steps, (stage,))]


def _added(steps: Steps, a: Tensor, velocity: Tensor, std: Tensor) -> Segment:
    """a*x + velocity*dx/dsigma + std*z."""
    return Segment(steps, (Stage(steps.start, velocity if steps.noise_at else -velocity, a=a, noise=std),))


def _sigmas(steps: Steps) -> tuple[Tensor, Tensor]:
    """The distance in time from the data, at each step's start and end."""
    data = 1 - steps.noise_at
    return (data - steps.start.double()).abs(), (data - steps.end.double()).abs()


STOCHASTIC: dict[str, Callable[..., list[Segment]]] = {f.__name__: f for f in (sde, cps, dance, renoise)}

#: What an argument is for, where no step adds noise; for messages.
ADDING = f"steps that add noise ({', '.join(STOCHASTIC)}), and there are none"
#: The largest value of each option; the smallest is 0.
_OPTIONS: Mapping[str, Mapping[str, float]] = {
    "sde": {"eta": math.inf},
    "cps": {"eta": 1.0},
    "dance": {"eta": math.inf},
    "renoise": {},
}


@dataclasses.dataclass(frozen=True)
class StochasticSolver:
    """A solver that adds noise, with its options: what `int_method` and `int_method_options` become."""

    name: str
    options: tuple[tuple[str, float], ...] = ()

    def __call__(self, steps: Steps) -> list[Segment]:
        """Its stages: see `solvers.stages`."""
        return STOCHASTIC[self.name](steps, **dict(self.options))

    def __str__(self) -> str:
        return self.name


Loaded = str | FittedSolver | StochasticSolver
"""A solver as tables are made of it: of the ODE by name, fitted, or one that adds noise."""


def of_the_ode(solver: Loaded) -> str | FittedSolver:
    """A solver, which must add no noise.

    Raises:
        ValueError: it does.
    """
    if isinstance(solver, StochasticSolver):
        raise ValueError(f"int_method {solver.name!r} adds noise at each step; wanted a solver of the ODE")
    return solver


def stochastic(name: str, options: Mapping[str, float] | None) -> StochasticSolver:
    """A stochastic solver with its options; those that are left out have the defaults of its function.

    Raises:
        TypeError: it has no such option, or an option is no number.
        ValueError: an option is not finite, or out of its range.
    """
    known = _OPTIONS[name]
    given = {} if options is None else dict(options)
    if unknown := [option for option in given if option not in known]:
        wanted = " and ".join(known) or "no options"
        raise TypeError(f"int_method {name!r} takes {wanted}, got {', '.join(map(repr, unknown))}")
    for option, value in given.items():
        given[option] = finite(value, option)
        if not 0 <= given[option] <= known[option]:
            wanted = "at least 0" if known[option] == math.inf else f"between 0 and {known[option]:g}"
            raise ValueError(f"{option} of int_method {name!r} must be {wanted}, got {value}")
    return StochasticSolver(name, tuple(sorted(given.items())))
