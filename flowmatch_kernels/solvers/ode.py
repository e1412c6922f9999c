"""The solvers for dx/dt = v(x, t): each turns the steps of a time grid into stages."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .fitted import FittedSolver
from .stages import Earlier, Segment, Solver, Stage, Steps, part


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

    def of(x: Tensor, steps: Steps, ago: int = 0) -> Tensor:
        begin = max(steps.first - ago, 0)
        return part(x, begin, begin + steps.n)

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

#: Those that compute with the time itself, and not with differences of times alone.
ABSOLUTE = frozenset({"dpmpp_2m"})


IntMethod = str | os.PathLike[str] | FittedSolver
"""A solver as users name it."""


def solver(int_method: IntMethod) -> Solver:
    """A fitted solver as it is, or the solver of that name.

    Raises:
        ValueError: there is none.
    """
    if isinstance(int_method, FittedSolver):
        return int_method
    if not isinstance(int_method, str) or int_method not in SOLVERS:
        raise ValueError(
            f"Invalid integration method: {int_method} (known: {', '.join(SOLVERS)}; or a FittedSolver, or the path of "
            "its file, which ends in .json)"
        )
    return SOLVERS[int_method]


def loaded(int_method: IntMethod) -> str | FittedSolver:
    """A solver's name, or a fitted solver, read from its file where a path is given.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no fitted solver, or there is no solver of that name.
    """
    if isinstance(int_method, os.PathLike) or (isinstance(int_method, str) and int_method.endswith(".json")):
        return FittedSolver.load(int_method)
    solver(int_method)
    return int_method
