"""The same numbers as other samplers: torchdiffeq's solvers in float64, diffusers' steps in float32, its sigmas.

Both packages are in the `test` extra: where one is missing these tests fail, and do not skip.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from test_solvers import PROBLEMS, _grid, _start, mixture
from torchdiffeq import odeint

from flowmatch_kernels import FlowMatching, time_grids

# ---- torchdiffeq ----

# ours -> torchdiffeq's
METHODS = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "rk4"}
GRIDS = {"even": _grid(20, False), "uneven": _grid(20, True), "down": _grid(20, True).flip(0)}


def _mixture():
    return lambda x, t: mixture(t, x), _start(3, -1.5, 1.5)


ALL_PROBLEMS = {name: lambda f=f: f()[:2] for name, f in PROBLEMS.items()} | {"mixture": _mixture}


def trajectories(ours, theirs, problem, grid, backend="auto"):
    """All states of both, each [T, 5, 2], and the times at which each evaluated the velocity."""
    velocity, start = ALL_PROBLEMS[problem]()
    grid, times, their_times = GRIDS[grid], [], []

    def step_fn(x, t):
        times.append(t[0, 0].item())
        return velocity(x, t)

    def field(t, x):
        their_times.append(t.item())
        return velocity(x, t)

    fm = FlowMatching(2, ours, backend=backend)
    states, _ = fm.sample(5, step_fn, noise=start, time_steps=grid, return_all_steps=True)
    # With no step size torchdiffeq's steps are the grid's, and perturb is off: it evaluates at the times themselves.
    want = odeint(field, start, grid, method=theirs)
    assert states.dtype == want.dtype == torch.float64
    return states.transpose(0, 1), want, times, their_times


def distance(got, want):
    """The largest over the trajectory, relative to values of order 1: an entry above 1 counts by its own size."""
    assert want.isfinite().all()
    return ((got - want).abs() / want.abs().clamp(min=1)).max().item()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("problem", ALL_PROBLEMS)
@pytest.mark.parametrize("name", METHODS)
def test_torchdiffeq(name, problem, grid, backend):
    got, want, times, their_times = trajectories(name, METHODS[name], problem, grid, backend)
    # Not to the bit: dt*(k1 + 3*(k2 + k3) + k4)/8 there, one product for each velocity here.
    assert distance(got, want) < 1e-12
    assert times == their_times


@pytest.mark.parametrize("problem", ALL_PROBLEMS)
@pytest.mark.parametrize(
    "ours, theirs", [("euler", "midpoint"), ("midpoint", "heun2"), ("heun", "midpoint"), ("rk4_classic", "rk4")]
)
def test_torchdiffeq_tells_solvers_apart(ours, theirs, problem):
    # What the bound above would not hide: the nearest other solver, of the same order, is 10^4 of it away.
    got, want, _, _ = trajectories(ours, theirs, problem, "uneven")
    if problem in ("rotation", "uneven_linear") and ours != "euler":
        # Of v = A x solvers of one order are one polynomial in dt*A; they differ by the times alone, or not at all.
        assert distance(got, want) < 1e-12
    else:
        assert distance(got, want) > 1e-8


# ---- diffusers ----


def _scheduler(steps, shift, sigmas, **options):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **options)
    if sigmas == "given":
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # as its Flux pipelines do
    else:
        scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("noise_at", [1, 0])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 4, 28, 50, 1000])
def test_shifted_is_diffusers_sigmas(steps, shift, noise_at):
    # invert_sigmas: 1 - sigma, from 0 to 1.
    sigmas = _scheduler(steps, shift, "given", invert_sigmas=noise_at == 0).sigmas
    grid = time_grids.shifted(steps, shift=shift, noise_at=noise_at, dtype=torch.float64)
    # They are computed in float32, in five roundings of 2^-25 at most each; seen: 2.9 * 2^-24.
    torch.testing.assert_close(grid, sigmas.double(), rtol=0, atol=4 * 2**-24)


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_shift_is_exp_of_flux_mu(mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=mu)
    grid = time_grids.shifted(28, shift=math.exp(mu), noise_at=1, dtype=torch.float64)
    torch.testing.assert_close(grid, scheduler.sigmas.double(), rtol=0, atol=4 * 2**-24)


def test_diffusers_own_choice_of_sigmas_is_another():
    # What shifted()'s docstring says of set_timesteps without sigmas: its range is shifted already.
    own, ours = _scheduler(28, 3.0, "own").sigmas, time_grids.shifted(28, shift=3.0, noise_at=1, dtype=torch.float64)
    assert own[-2].item() == pytest.approx(0.009, abs=5e-4)
    assert ours[-2].item() == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("shape", [(1,), (31,), (1025,), (16, 7, 9)])
@pytest.mark.parametrize("sigmas", ["given", "own"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_steps(shift, sigmas, shape, backend):
    """In float32 to the bit: there as here x + dt*v, two roundings, with dt the difference of the float32 sigmas."""
    scheduler = _scheduler(10, shift, sigmas)
    noise = torch.randn(3, *shape)
    model = lambda x, t: torch.sin(3 * x) * (1 + t)  # noqa: E731

    states = [noise]
    for time, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        v = model(states[-1], sigma.expand(3, *[1] * len(shape)))
        states.append(scheduler.step(v, time, states[-1], return_dict=False)[0])

    fm = FlowMatching(shape, noise_at=1, backend=backend)
    got, times = fm.sample(3, model, noise=noise, time_steps=scheduler.sigmas, return_all_steps=True)
    assert torch.equal(times, scheduler.sigmas)
    assert torch.equal(got, torch.stack(states, dim=1))
