"""The solvers for dx/dt = v(x, t): each turns the steps of a time grid into stages."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from .fitted import FittedSolver, titled
from .stages import Earlier, Segment, Solver, Stage, Steps, part
from .stochastic import STOCHASTIC, Loaded, StochasticSolver, of_the_ode, stochastic


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
    left, h = _to_data(steps)
    first, now, last = steps.part(0, 1), steps.part(1, steps.n - 1), steps.part(max(steps.n - 1, 1), steps.n)
    g = _of(h, now) / _of(h, now, ago=1) / 2
    b = now.h / _of(left, now)
    later = Stage(
        now.start,
        now.h * (1 + g),
        (Earlier(-b * g * _of(left, now, ago=1), ago=1),),
        a=1 + b * g,
        c=1 / _of(left, now),
    )
    start = Stage(first.start, first.h, c=1 / _of(left, first))
    return [Segment(first, (start,)), Segment(now, (later,)), *euler(last)]


def unipc(steps: Steps) -> list[Segment]:
    """UniPC-2 (bh2, data prediction) for flow: alpha = t, sigma = 1 - t. One evaluation a step.

    With D_k = x_k + (1 - t_k)*v_k the predicted data, h_k the step in log(alpha / sigma), w_k = dt_k / (1 - t_k) and
    g_k = h_k / h_(k-1) / 2, a step corrects the state that it begins at, and predicts the next one from there:

        y_k     = x_k + w_(k-1) * (rho*(D_k - D_(k-1)) + g_(k-1)*(2*rho_1 - 1)*(D_(k-1) - D_(k-2)))
        x_(k+1) = (1 - w_k)*y_k + w_k*((1 + g_k)*D_k - g_k*D_(k-1))

    Both x_k and y_k come from y_(k-1): written as their difference, the correction needs no y, and a step is one row.
    The states of a trajectory are x_k, before it. The first and the last prediction are of order 1, as in diffusers,
    and so is the correction after the first: order 2 in all. What it remembers is D / (1 - t).

    Source: UniPC, arXiv 2302.04867, algorithms 1 and 2, with B(h) = exp(h) - 1.
    """
    left, h = _to_data(steps)
    first, second, last = steps.part(0, 1), steps.part(1, min(2, steps.n - 1)), steps.part(max(steps.n - 1, 1), steps.n)

    def corrected(now: Steps, corrector: int, predictor: int) -> Segment:
        w, w1 = now.h / _of(left, now), _of(steps.h / left, now, ago=1)
        g = _of(h, now) / _of(h, now, ago=1) / 2 if predictor == 2 else torch.zeros_like(w)
        rho, bend = torch.full_like(w, 0.5), None
        if corrector == 2:
            h1, h2 = _of(h, now, ago=1), _of(h, now, ago=2)
            bound = _langevin(h1)
            rho_1 = bound / (h1 + h2)
            rho, bend = (1 + bound) / 2 - rho_1, h1 / h2 / 2 * (2 * rho_1 - 1)
        scale = (1 - w) * w1
        newest, before = scale * rho + w * (1 + g), -scale * rho - w * g
        earlier: tuple[Earlier, ...] = ()
        if bend is not None:
            before = before + scale * bend
            earlier = (Earlier(-scale * bend * _of(left, now, ago=2), ago=2),)
        stage = Stage(
            now.start,
            newest * _of(left, now),
            (Earlier(before * _of(left, now, ago=1), ago=1), *earlier),
            a=1 - w + newest,
            c=1 / _of(left, now),
        )
        return Segment(now, (stage,))

    return [
        Segment(first, (Stage(first.start, first.h, c=1 / _of(left, first)),)),
        corrected(second, 1, 2),
        corrected(steps.part(2, steps.n - 1), 2, 2),
        corrected(last, 1 if steps.n == 2 else 2, 1),
    ]


def _langevin(h: Tensor) -> Tensor:
    """coth(h/2) - 2/h, to which UniPC's integrals of exp come down; a series where the difference would lose digits."""
    series = h / 6 - h**3 / 360 + h**5 / 15120 - h**7 / 604800 + h**9 / 23950080
    return torch.where(h < 0.3, series, 1 / torch.tanh(h / 2) - 2 / h)


def _to_data(steps: Steps) -> tuple[Tensor, Tensor]:
    """The signed time from each step's start to the data, and each step's size in log(alpha / sigma)."""
    data, t, t_next = 1 - steps.noise_at, steps.start.double(), steps.end.double()
    left = data - t
    log_snr = torch.log((t - steps.noise_at).abs() / left.abs())
    log_next = torch.log((t_next - steps.noise_at).abs() / (data - t_next).abs())
    return left, log_next - log_snr


def _of(x: Tensor, steps: Steps, ago: int = 0) -> Tensor:
    """Those entries of a column of all steps that belong to some of them, or to as many steps before."""
    begin = max(steps.first - ago, 0)
    return part(x, begin, begin + steps.n)


SOLVERS: dict[str, Solver] = {
    solver.__name__: solver for solver in (euler, midpoint, heun, rk4, rk4_classic, ab2, ab3, dpmpp_2m, unipc)
}

#: Those that compute with the time itself, and not with differences of times alone.
ABSOLUTE = frozenset({"dpmpp_2m", "unipc"})


IntMethod = str | os.PathLike[str] | FittedSolver | StochasticSolver
"""A solver as users name it."""


def solver(int_method: IntMethod) -> Solver:
    """A fitted solver as it is, or the solver of that name.

    Raises:
        ValueError: there is none.
    """
    if isinstance(int_method, (FittedSolver, StochasticSolver)):
        return int_method
    if isinstance(int_method, str) and int_method in STOCHASTIC:
        of_the_ode(stochastic(int_method, None))  # which raises
    if not isinstance(int_method, str) or int_method not in SOLVERS:
        raise ValueError(
            f"Invalid integration method: {int_method} (known: {', '.join((*SOLVERS, *STOCHASTIC))}; "
            "or a FittedSolver, or the path of its file, which ends in .json)"
        )
    return SOLVERS[int_method]


def loaded(int_method: IntMethod, options: Mapping[str, float] | None = None) -> Loaded:
    """A solver's name; or a fitted solver, read from its file where a path is given; or a stochastic one.

    Args:
        int_method: The solver as users name it.
        options: Of a stochastic solver.

    Raises:
        OSError: the file cannot be read.
        TypeError: the solver has no such option.
        ValueError: the file holds no fitted solver, there is no solver of that name, or an option is out of its range.
    """
    if not options and isinstance(int_method, str) and int_method in SOLVERS:
        return int_method
    if isinstance(int_method, str) and int_method in STOCHASTIC:
        return stochastic(int_method, options)
    if options:
        raise TypeError(f"int_method {titled(int_method)} takes no options, got {', '.join(map(repr, options))}")
    if isinstance(int_method, os.PathLike) or (isinstance(int_method, str) and int_method.endswith(".json")):
        return FittedSolver.load(int_method)
    solver(int_method)
    return int_method
