"""Solvers: their orders on problems with closed forms, their tables, and one launch for each evaluation."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from operands import assert_same_bits
from small_problem import EVERY_SOLVER

from flowmatch_kernels import FlowMatching, solvers
from flowmatch_kernels.ops import native
from flowmatch_kernels.solvers import ode

# name -> order, evaluations in n steps
SOLVERS = {
    "euler": (1, lambda n: n),
    "midpoint": (2, lambda n: 2 * n),
    "heun": (2, lambda n: 2 * n),
    "rk4": (4, lambda n: 4 * n),
    "rk4_classic": (4, lambda n: 4 * n),
    "ab2": (2, lambda n: n),
    "ab3": (3, lambda n: n + 1),
    "dpmpp_2m": (2, lambda n: n),
    "unipc": (2, lambda n: n),
}
EXPONENTIAL = ("dpmpp_2m", "unipc")  # their first and last steps are of first order
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(native._C is None, reason="not built"))]


def test_every_solver_is_here():
    assert set(SOLVERS) == set(solvers.SOLVERS)


# ---- problems: velocity(x, t), start, exact end at t = 1; float64 ----


def _start(seed=0, low=-1.0, high=1.0):
    return torch.rand(5, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (high - low) + low


def rotation():
    """x' = A x, a turn by 3 radians."""
    a = torch.tensor([[0.0, -3.0], [3.0, 0.0]], dtype=torch.float64)
    x = _start()
    return lambda x, t: x @ a.T, x, lambda s: x @ torch.linalg.matrix_exp(a * s).T


def uneven_linear():
    """x' = A x with eigenvalues -4 and 1."""
    a = torch.tensor([[-4.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    x = _start(1)
    return lambda x, t: x @ a.T, x, lambda s: x @ torch.linalg.matrix_exp(a * s).T


def logistic():
    """x' = 3 x (1 - x)."""
    x = _start(2, 0.1, 0.9)
    return lambda x, t: 3 * x * (1 - x), x, lambda s: x * math.exp(3 * s) / (1 + x * (math.exp(3 * s) - 1))


PROBLEMS = {f.__name__: f for f in (rotation, uneven_linear, logistic)}


def _grid(n, uneven, low=0.0, high=1.0):
    t = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if uneven:
        t = (t + t**2 / 2) / 1.5
    return low + (high - low) * t


def observed_order(name, problem, uneven, sizes=(80, 160)):
    """log2 of the ratio of the errors at t = 1 with so many steps."""
    velocity, start, exact = PROBLEMS[problem]()
    errors = []
    for n in sizes:
        x = FlowMatching(2, name).sample(5, velocity, noise=start, time_steps=_grid(n, uneven))
        errors.append((x - exact(1.0)).abs().max().item())
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in EXPONENTIAL])
def test_order(name, problem, uneven):
    order = observed_order(name, problem, uneven)
    assert abs(order - SOLVERS[name][0]) < 0.15, order


def mixture(t, x):
    """The exact velocity of the flow from N(0, 1) to an even mixture of N(-2, 0.3^2) and N(1, 0.5^2), on each axis.

    v = E[x1 - x0 | x_t = x]; each component is Gaussian, so its part of it is linear in x.
    """
    density, velocity = 0, 0
    for mean, deviation in ((-2.0, 0.3), (1.0, 0.5)):
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        away = x - t * mean
        weight = torch.exp(-(away**2) / (2 * variance)) / torch.sqrt(variance)
        density = density + weight
        velocity = velocity + weight * (mean + (t * deviation**2 - (1 - t)) / variance * away)
    return velocity / density


def _on_mixture(name, n, low, high, uneven):
    velocity = lambda x, t: mixture(t, x)  # noqa: E731
    return FlowMatching(2, name).sample(5, velocity, noise=_start(3, -1.5, 1.5), time_steps=_grid(n, uneven, low, high))


@functools.cache
def _exact_on_mixture(low, high):
    return _on_mixture("rk4", 2000, low, high, False)


def _mixture_error(name, n, low, high, uneven):
    return (_on_mixture(name, n, low, high, uneven) - _exact_on_mixture(low, high)).abs().max().item()


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "rk4", "rk4_classic", "ab2", "ab3"])
def test_order_on_a_gaussian_mixture(name, uneven):
    errors = [_mixture_error(name, n, 0.0, 1.0, uneven) for n in (160, 320)]
    order = math.log2(errors[0] / errors[1])
    assert abs(order - SOLVERS[name][0]) < 0.15, order


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("name", "low", "high", "least"), [
    ("dpmpp_2m", 0.0, 1.0, 1.45), ("dpmpp_2m", 0.1, 0.9, 1.85), ("unipc", 0.0, 1.0, 1.9), ("unipc", 0.1, 0.9, 1.9),
])  # fmt: skip
def test_order_of_exponential_solvers(name, low, high, least, uneven):
    # Their exponential variable is singular at 0 and 1, so that dpmpp_2m's first and last step count for more there.
    errors = [_mixture_error(name, n, low, high, uneven) for n in (160, 320)]
    assert math.log2(errors[0] / errors[1]) > least


# ---- what a table promises ----


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("name", SOLVERS)
def test_nfe_is_what_is_spent(name, n, guided):
    calls = []

    def step_fn(x, t):
        calls.append(t)
        return -x

    fm = FlowMatching(2, name, num_inference_steps=n, use_classifier_free_guidance=guided)
    fm.sample(3, step_fn, unguided_step_fn=step_fn if guided else None)
    evaluations = SOLVERS[name][1](n) if n else 0
    assert fm.nfe() == len(calls) == evaluations * (1 + guided)


@pytest.mark.parametrize("prediction_type", ["velocity", "data", "noise"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_one_launch_an_evaluation(name, backend, prediction_type, monkeypatch):
    from flowmatch_kernels.ops import dispatch

    kernel = dispatch.BACKENDS[backend].load()
    launches = []
    counting = dispatch.BACKENDS[backend]._replace(load=lambda: lambda o: (launches.append(o.row), kernel(o))[0])
    monkeypatch.setitem(dispatch.BACKENDS, backend, counting)
    fm = FlowMatching(2, name, num_inference_steps=6, backend=backend, prediction_type=prediction_type)
    fm.sample(3, lambda x, t: -x, return_all_steps=True, time_steps=torch.linspace(0.1, 0.9, 7))
    assert launches == list(range(fm.nfe()))


@pytest.mark.skipif(native._C is None, reason="not built")
@pytest.mark.parametrize("prediction_type", ["velocity", "data", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SOLVERS)
def test_cpu_equals_reference(name, dtype, prediction_type):
    steps = torch.linspace(0.1, 0.9, 8)
    noise = _start().to(dtype)
    got = [
        FlowMatching(2, name, prediction_type=prediction_type, backend=backend).sample(
            5, lambda x, t: torch.sin(x * 3), noise=noise, time_steps=steps, return_all_steps=True
        )[0]
        for backend in ("cpu", "reference")
    ]
    assert torch.equal(*got)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_trajectory_ends_where_sample_does_and_kept_states_stay(name, kept):
    velocity, start, _ = rotation()
    seen, copies = [], []

    def step_fn(x, t):
        if kept:
            seen.append(x)
            copies.append(x.clone())
        return velocity(x, t)

    fm = FlowMatching(2, name, num_inference_steps=9)
    last = fm.sample(5, velocity, noise=start)
    states, times = fm.sample(5, step_fn, noise=start, return_all_steps=True)
    assert states.shape == (5, 10, 2) and times.shape == (10,)
    assert torch.equal(states[:, 0], start) and torch.equal(states[:, -1], last)
    # A state of the trajectory is what fewer steps of the same grid end with.
    part = fm.sample(5, velocity, noise=start, time_steps=times[:6])
    if name not in EXPONENTIAL:
        assert torch.equal(states[:, 5], part)
    assert all(torch.equal(x, copy) for x, copy in zip(seen, copies, strict=True))


def test_midpoint_is_the_published_midpoint():
    # Alpamayo's recipes: x_mid = x + v*(t1 - t0)/2, t_mid = t0 + (t1 - t0)/2, x = x + dt*v_mid.
    weights = torch.randn(2, 2, generator=torch.Generator().manual_seed(4))
    step_fn = lambda x, t: torch.tanh(x @ weights) * (1 + t)  # noqa: E731
    torch.manual_seed(5)
    got = FlowMatching(2, "midpoint").sample(6, step_fn)
    torch.manual_seed(5)
    x, ts = torch.randn(6, 2), torch.linspace(0, 1, 11)
    for i in range(10):
        t0, t1 = (ts[k].view(1, 1).expand(6, 1) for k in (i, i + 1))
        middle = x + step_fn(x=x, t=t0) * (t1 - t0) / 2
        x = x + (t1 - t0) * step_fn(x=middle, t=t0 + (t1 - t0) / 2)
    assert torch.equal(got, x)


# ---- predictions ----


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("prediction_type", ["data", "noise"])
@pytest.mark.parametrize("name", SOLVERS)
def test_predictions_give_the_velocitys_path(name, prediction_type, noise_at):
    # Away from both ends, so that every solver and prediction can be used.
    grid = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    grid = grid.flip(0) if noise_at else grid
    end = noise_at if prediction_type == "noise" else 1 - noise_at
    velocity, start, _ = logistic()

    def prediction(x, t):
        return x + (end - t) * velocity(x, t)

    want = FlowMatching(2, name, noise_at=noise_at).sample(5, velocity, noise=start, time_steps=grid)
    fm = FlowMatching(2, name, noise_at=noise_at, prediction_type=prediction_type)
    got = fm.sample(5, prediction, noise=start, time_steps=grid)
    # Another expression of the same sum: a few roundings of float64.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["euler", "midpoint", "ab2", "dpmpp_2m", "unipc"])
def test_data_prediction_reaches_the_data(name):
    data = torch.tensor([3.0, -1.0])
    x = FlowMatching(2, name, prediction_type="data").sample(4, lambda x, t: data.expand(4, 2))
    torch.testing.assert_close(x, data.expand(4, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["heun", "rk4", "rk4_classic", "ab3"])
def test_data_prediction_has_no_velocity_at_the_data(name):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"t = 1 .*euler, midpoint"):
        FlowMatching(2, name, num_inference_steps=1, prediction_type="data").sample(4, lambda x, t: x)
    assert torch.equal(state, torch.get_rng_state())


def test_noise_prediction_has_no_velocity_at_the_noise():
    with pytest.raises(ValueError, match="t = 0 "):
        FlowMatching(2, prediction_type="noise").sample(4, lambda x, t: x)


def test_unknown_prediction_type_and_noise_end():
    with pytest.raises(ValueError, match="'velocity', 'data' or 'noise', got 'score'"):
        FlowMatching(2, prediction_type="score")
    with pytest.raises(ValueError, match="noise_at must be 0 or 1, got 2"):
        FlowMatching(2, noise_at=2)


def test_a_later_stage_may_read_an_earlier_step(monkeypatch):
    """A predictor-corrector (AB2, then the trapezium): stage 1 reads the step's own and the last step's velocity."""

    def corrector(steps):
        now, h = steps.part(1, steps.n), steps.part(1, steps.n).h
        predict = solvers.Stage(now.start, 1.5 * h, (solvers.Earlier(-0.5 * h, ago=1),))
        correct = solvers.Stage(now.end, 5 * h / 12, (solvers.Earlier(8 * h / 12), solvers.Earlier(-h / 12, ago=1)))
        return [*solvers.heun(steps.part(0, 1)), solvers.Segment(now, (predict, correct))]

    monkeypatch.setitem(solvers.SOLVERS, "corrector", corrector)
    velocity, start, exact = rotation()
    errors = [
        (FlowMatching(2, "corrector").sample(5, velocity, noise=start, time_steps=_grid(n, False)) - exact(1.0))
        .abs()
        .max()
        for n in (80, 160)
    ]
    assert math.log2(errors[0] / errors[1]) > 2.85  # order 3; with one buffer for both velocities it is 1


@pytest.mark.parametrize("time_steps", [None, [0.0, 0.1, 0.4, 1.0]])
def test_weights_that_do_not_sum_to_the_step(time_steps, monkeypatch):
    """A slip in a solver's table says so before the first evaluation; the same row, corrected, is rk4_classic's."""

    def rk4_with(last):
        def solver(steps):
            (segment,) = ode.rk4_classic(steps)
            stages = (*segment.stages[:-1], segment.stages[-1]._replace(b0=steps.h * last))
            return [segment._replace(stages=stages)]

        return solver

    monkeypatch.setitem(ode.SOLVERS, "right", rk4_with(1 / 6))
    monkeypatch.setitem(ode.SOLVERS, "wrong", rk4_with(1 / 3))
    evaluated = []

    def step_fn(x, t):
        evaluated.append(t)
        return x

    fm, noise = FlowMatching((2,), num_inference_steps=3), torch.randn(2, 2)
    run = functools.partial(fm.sample, 2, step_fn, noise=noise, time_steps=time_steps)
    torch.testing.assert_close(run(int_method="right"), run(int_method="rk4_classic"), rtol=0, atol=0)
    evaluated.clear()
    with pytest.raises(ValueError, match=r"weights of steps 0 to 2 do not sum to the step sizes: .* by up to 0\.[01]"):
        run(int_method="wrong")
    assert not evaluated


# ---- the end of time, where a velocity may have no value ----


def singular(x, t):
    """The velocity of a path to the data 0, which is 0/0 at t = 1."""
    return -x / (1 - t)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("int_method", EVERY_SOLVER)
def test_who_evaluates_at_the_end(int_method, steps):
    """docs/solvers.md says who does; euler_at_final takes that evaluation away, and changes the last step alone."""
    wanted = int_method in ("heun", "rk4", "rk4_classic") or (int_method == "ab3" and steps == 1)
    noise, results = torch.randn(3, 2), {}
    for euler_at_final in (False, True):
        seen = []
        fm = FlowMatching(2, int_method, num_inference_steps=steps, euler_at_final=euler_at_final)
        fm.sample(3, lambda x, t, seen=seen: seen.append(t.flatten()[0].item()) or -x, noise=noise)
        assert len(seen) == fm.nfe()
        assert (1.0 in seen) == (wanted and not euler_at_final)
        results[euler_at_final] = fm.sample(3, singular, noise=noise, return_all_steps=True)[0]
    assert results[True].isfinite().all()
    assert results[False].isfinite().all() != wanted
    assert_same_bits(results[True][:, :steps], results[False][:, :steps])
    before, last = results[True][:, -2], torch.linspace(0, 1, steps + 1)[-2:]
    euler = before + (last[1] - last[0]).view(1, 1) * singular(before, last[0].view(1, 1))
    assert_same_bits(results[True][:, -1], euler)


def test_euler_at_final_with_predictions():
    """A model that predicts the data: heun then works on the whole grid."""
    fm = FlowMatching(2, "heun", prediction_type="data")
    with pytest.raises(ValueError, match="euler_at_final=True"):
        fm.sample(3, lambda x, t: torch.zeros_like(x))
    fm = FlowMatching(2, "heun", prediction_type="data", euler_at_final=True)
    assert not fm.sample(3, lambda x, t: torch.zeros_like(x)).abs().gt(1e-6).any()  # rounding of the last step alone


def test_euler_at_final_is_a_flag():
    with pytest.raises(TypeError, match="euler_at_final must be True or False, got 1"):
        FlowMatching(2, euler_at_final=1)
