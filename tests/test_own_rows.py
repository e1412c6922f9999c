"""Rows of their own: the op with coefficients [E, R, 8], and sample() with times or weights of each sample or token.

What one call returns has the bits of the calls by which each sample is taken alone; with times of each token, those of
the call in which each token is a sample.
"""

from __future__ import annotations

import itertools
import re
from typing import Any
from unittest import mock

import pytest
import token_cases
import torch
from operands import assert_same_bits, values
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap

from flowmatch_kernels import FittedSolver, FlowMatching, KeyedNoise, StepFunction, inpaint, solvers
from flowmatch_kernels.ops import native, reference
from flowmatch_kernels.ops.fused_step import HELD, arithmetic_dtype
from flowmatch_kernels.solvers import SOLVERS, requests

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKENDS = ["reference", *(["cpu"] if native._C is not None else [])]
B, DIMS, N = 4, (3, 5), 6


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


# ---- sample() ----


def field(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(5 * t).to(x.dtype) - x * (0.3 + t).to(x.dtype)


def other(x: Tensor, t: Tensor) -> Tensor:
    return torch.cos(3 * x) * (1 - t).to(x.dtype)


def grids(noise_at: int = 0, dtype: torch.dtype = F32) -> Tensor:
    """[B, N + 1]: four grids, each of its own, none of which has a step of length 0."""
    t = torch.linspace(0, 1, N + 1, dtype=F64) ** torch.tensor([[1.0], [1.4], [0.7], [2.1]], dtype=F64)
    return (1 - t if noise_at else t).to(dtype)


def held(before: int, after: int = 0) -> Tensor:
    """[B, N + 1]: sample 1 is held so many steps before its first and after its last, sample 3 at all of them."""
    t = grids()
    t[1] = torch.cat([t[1, :1].repeat(before), torch.linspace(0, 1, N + 1 - before - after), torch.ones(after)])
    t[3] = 0.4
    return t


def alone(b: int, x: Tensor, times: Tensor | list[float], sizes: Any = None, **named: Any) -> Any:
    """Sample b by a call of its own, without its steps of length 0; with the states of all steps."""
    times = torch.as_tensor(times)
    kept = [k for k in range(len(times) - 1) if times[k] != times[k + 1]]
    if not kept:
        return x[b : b + 1].unsqueeze(1).expand(-1, len(times), *x.shape[1:])
    own = times[[*kept, kept[-1] + 1]]
    fm = named.pop("fm")
    weight = named.pop("weight", None)
    if isinstance(weight, list):
        weight = [weight[k] for k in kept]
    if weight is not None:
        named["inference_guidance_weight"] = weight
    states, _ = fm.sample(
        1, named.pop("step_fn", field), noise=x[b : b + 1], time_steps=own, return_all_steps=True,
        step_sizes=None if sizes is None else [sizes[k] for k in kept], **named,
    )  # fmt: skip
    places = list(itertools.accumulate([0] + [int(k in kept) for k in range(len(times) - 1)]))
    return states[:, places]


def compare(
    fm: FlowMatching, times: Any, x: Tensor, what: str = "", weights: Any = None, sizes: Any = None, **named: Any
) -> None:
    """One call, with a trajectory and without, against a call for each sample."""
    given = {} if weights is None else {"inference_guidance_weight": weights}
    given |= {} if sizes is None else {"step_sizes": sizes}
    step_fn = named.pop("step_fn", field)
    batch = x.shape[0]
    states, t = fm.sample(batch, step_fn, noise=x, time_steps=times, return_all_steps=True, **given, **named)
    last = fm.sample(batch, step_fn, noise=x, time_steps=times, **given, **named)
    assert_same_bits(last, states[:, -1], what)
    wanted_times = torch.as_tensor(times)
    assert_same_bits(t, wanted_times.expand(batch, -1) if t.dim() == 2 else wanted_times, f"{what}: times")
    for b in range(batch):
        weight = None if weights is None else (weights if callable(weights) else weights[b].tolist())
        if isinstance(weight, list) and len(weight) == 1:
            (weight,) = weight
        its = None if sizes is None else list(sizes[b])
        wanted = alone(b, x, t[b] if t.dim() == 2 else t, its, fm=fm, step_fn=step_fn, weight=weight, **named)
        assert_same_bits(states[b : b + 1], wanted.contiguous(), f"{what}, sample {b}")


def writes(x: Tensor, t: Tensor) -> Tensor:
    """A model that writes to its times."""
    t.add_(0.125)
    return x * t


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sample_as_alone(backend: str) -> None:
    """Every solver, dtypes, predictions, both ends of time, guidance and its weights, step sizes, steps of length 0."""
    x = torch.randn(B, *DIMS, generator=generator())
    for solver in SOLVERS:
        compare(FlowMatching(DIMS, solver, backend=backend), grids(), x, solver)
        compare(FlowMatching(DIMS, solver, backend=backend, noise_at=1), grids(1).tolist(), x, f"{solver} from 1")
        one_step = solver in ("euler", "midpoint", "heun", "rk4", "rk4_classic")
        for before, after in [(0, 2), *([] if solver == "ab3" else [(1, 0), (2, 3), (5, 0), (0, 5)])]:
            compare(FlowMatching(DIMS, solver, backend=backend), held(before, after), x, f"{solver} {before} {after}")
        if one_step:  # steps of length 0 between others
            t = grids()
            t[2, 3] = t[2, 2]
            compare(FlowMatching(DIMS, solver, backend=backend), t, x, f"{solver} between")
    for state, velocity in [(F64, F64), (F64, F32), (F32, BF16), (BF16, BF16), (F16, F16)]:
        y = x.to(state)
        for solver in ("euler", "heun", "ab2"):
            fm = FlowMatching(DIMS, solver, backend=backend)
            compare(fm, held(1, 1), y, f"{solver} {state}", step_fn=lambda x, t, v=velocity: field(x, t).to(v))
    for rounding in ("exact", "rounded"):
        fm = FlowMatching(DIMS, backend=backend, step_rounding=rounding)
        compare(fm, grids(), x, rounding, step_fn=lambda x, t: field(x, t).bfloat16())
    for prediction in ("data", "noise"):
        t = grids() * 0.8 + 0.1
        for solver in ("euler", "heun", "dpmpp_2m", "rk4"):
            fm = FlowMatching(DIMS, solver, prediction_type=prediction, backend=backend)
            compare(fm, t, x, f"{solver} {prediction}")
    compare(FlowMatching(DIMS, "heun", euler_at_final=True, backend=backend), grids(), x, "euler_at_final")
    sizes = torch.rand(B, N, generator=generator()) + 0.5
    for solver in ("euler", "ab2"):
        fm = FlowMatching(DIMS, solver, backend=backend)
        compare(fm, grids(), x, f"{solver} sizes", sizes=sizes.tolist())
        compare(fm, grids()[0], x, f"{solver} sizes, one grid", sizes=sizes)
    weights = torch.rand(B, N, generator=generator(), dtype=F64) * 3
    for form in ("interpolate", "from_unguided", "from_guided", "extrapolate"):
        fm = FlowMatching(DIMS, "heun", backend=backend, guidance_form=form, use_classifier_free_guidance=True)
        for w, name in [(weights, "[B, N]"), (weights[:, :1], "[B, 1]"), (lambda t: 1 + 2 * t, "of t")]:
            compare(fm, held(1), x, f"{form} {name}", weights=w, unguided_step_fn=other)
            if not callable(w):
                compare(fm, grids()[0], x, f"{form} {name}, one grid", weights=w, unguided_step_fn=other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_held(backend: str) -> None:
    """A step of length 0 leaves the bits of a sample, whatever it holds and whatever its velocity is."""
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    for solver, state, velocity in itertools.product(SOLVERS, (F32, BF16, F64), (F32, BF16)):
        if velocity == F32 and state == BF16:
            continue
        x = values((B, *DIMS), state, generator())

        def step_fn(x: Tensor, t: Tensor, velocity: torch.dtype = velocity) -> Tensor:
            v = field(x, t).to(velocity)
            v[3] = bad[torch.arange(DIMS[1]) % 4].to(velocity)
            return v

        fm = FlowMatching(DIMS, solver, backend=backend)
        states, _ = fm.sample(B, step_fn, noise=x, time_steps=held(0, 2), return_all_steps=True)
        assert_same_bits(states[3], x[3].expand(N + 1, *DIMS).contiguous(), f"{solver} {state} {velocity}")
        assert_same_bits(states[1, -3:], states[1, -3].expand(3, *DIMS).contiguous(), f"{solver} {state} after")
        assert not torch.equal(states[1, 3], states[1, 4])


STOCHASTIC = sorted(solvers.STOCHASTIC)


def test_stochastic() -> None:
    """Noise of each step; a held step has its own, unused."""
    x, z = torch.randn(B, *DIMS, generator=generator()), torch.randn(B, N, *DIMS, generator=generator())
    t = held(2, 1) * 0.8 + 0.1
    keys = [KeyedNoise(9, first=b) for b in range(B)]
    for solver in STOCHASTIC:
        fm = FlowMatching(DIMS, solver)
        states, _ = fm.sample(B, field, noise=x, step_noise=z, time_steps=t, return_all_steps=True)
        keyed = fm.sample(B, field, noise=x, step_noise=KeyedNoise(9), time_steps=grids() * 0.9 + 0.01)
        assert_same_bits(states[3], x[3].expand(N + 1, *DIMS).contiguous(), f"{solver}, held")
        for b in (0, 1, 2):
            kept = [k for k in range(N) if t[b, k] != t[b, k + 1]]
            its, _ = fm.sample(
                1, field, noise=x[b : b + 1], step_noise=z[b : b + 1, kept], time_steps=t[b, [*kept, kept[-1] + 1]],
                return_all_steps=True,
            )  # fmt: skip
            assert_same_bits(states[b : b + 1, [*kept, kept[-1] + 1]], its, f"{solver}, sample {b}")
            one = fm.sample(
                1, field, noise=x[b : b + 1], step_noise=[keys[b]], time_steps=(grids() * 0.9 + 0.01)[b]
            )  # fmt: skip
            assert_same_bits(keyed[b : b + 1], one, f"{solver}, keyed, sample {b}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state, velocity", [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F32)], ids=str)
def test_log_prob(backend: str, state: torch.dtype, velocity: torch.dtype) -> None:
    """Each sample's as alone, 0.0 where it is held; the same from the trajectory: a log-ratio of exactly 0.0."""
    x = torch.randn(B, *DIMS, generator=generator()).to(state)
    z = torch.randn(B, N, *DIMS, generator=generator())
    t = held(2, 1) * 0.8 + 0.1
    t[2, 3] = t[2, 2]  # between others

    def step_fn(x: Tensor, t: Tensor) -> Tensor:
        v = field(x, t).to(velocity)
        v[3] = torch.nan  # held in every step: it does not count
        return v

    for solver, eta in itertools.product(STOCHASTIC, (None, 0.4)):
        if solver == "renoise" and eta is not None:
            continue
        fm = FlowMatching(DIMS, solver, backend=backend)
        options = {} if eta is None else {"int_method_options": {"eta": eta}}
        given = options | {"return_all_steps": True}
        states, times, log_prob = fm.sample(
            B, step_fn, noise=x, step_noise=z, time_steps=t, return_log_prob=True, **given
        )
        plain, _ = fm.sample(B, step_fn, noise=x, step_noise=z, time_steps=t, **given)
        assert_same_bits(states, plain, solver)
        assert log_prob.shape == (B, N)
        holds = t[:, 1:] == t[:, :-1]
        assert_same_bits(log_prob[holds], torch.zeros_like(log_prob[holds]), solver)
        assert log_prob[~holds].ne(0).all()
        for k in range(N):
            v = step_fn(states[:, k], times[:, k].view(B, 1, 1))
            for grid in (t, t.tolist()):
                again = fm.step_log_prob(states[:, k], v, states[:, k + 1], k, time_steps=grid, **options)
                assert_same_bits(again, log_prob[:, k], f"{solver}, step {k}")
            part = [2, 0]
            some = states[part, k], v[part], states[part, k + 1]
            again = fm.step_log_prob(*some, k, time_steps=t[part], **options)
            assert_same_bits(again, log_prob[part, k], f"{solver}, step {k}, a part of the batch")
        for b in (0, 1, 2):
            kept = [k for k in range(N) if not holds[b, k]]
            _, _, its = fm.sample(
                1, lambda x, t: field(x, t).to(velocity), noise=x[b : b + 1], step_noise=z[b : b + 1, kept],
                time_steps=t[b, [*kept, kept[-1] + 1]], return_log_prob=True, **given,
            )  # fmt: skip
            assert_same_bits(log_prob[b : b + 1, kept], its, f"{solver}, sample {b}")


def test_log_prob_with_what_goes_with_it() -> None:
    """Guidance with weights of each sample, one grid too; a format; a derivative; one row of times for all."""
    x = torch.randn(B, *DIMS, generator=generator())
    t, w = held(1, 1) * 0.8 + 0.1, torch.rand(B, N, generator=generator(), dtype=F64) * 3
    fm = FlowMatching(DIMS, "sde", use_classifier_free_guidance=True)
    key = KeyedNoise(5)
    given = {"noise": x, "step_noise": key, "unguided_step_fn": other, "return_log_prob": True}
    for grid in (t, t[0]):
        _, log_prob = fm.sample(B, field, time_steps=grid, inference_guidance_weight=w, **given)
        for b in range(3):
            own = grid if grid.dim() == 1 else grid[b : b + 1]
            one = given | {"noise": x[b : b + 1], "step_noise": KeyedNoise(5, first=b)}
            _, its = fm.sample(1, field, time_steps=own, inference_guidance_weight=w[b].tolist(), **one)
            assert_same_bits(log_prob[b : b + 1], its, f"{grid.dim()}, sample {b}")
    one_row = fm.sample(B, field, time_steps=t[:1], inference_guidance_weight=1.5, **given)[1]
    assert_same_bits(one_row, fm.sample(B, field, time_steps=t[0], inference_guidance_weight=1.5, **given)[1])

    image = torch.randn(B, 4, 2, 3).contiguous(memory_format=torch.channels_last)
    plain = FlowMatching((4, 2, 3), "sde")
    options = {"step_noise": key, "time_steps": t, "return_log_prob": True}
    for got, wanted in zip(
        plain.sample(B, field, noise=image, **options),
        plain.sample(B, field, noise=image.contiguous(), **options),
        strict=True,
    ):
        assert_same_bits(got, wanted)

    options |= {"differentiable": True, "noise": x}
    gradients = []
    for backend in BACKENDS:
        factor = torch.tensor(0.7, requires_grad=True)
        sampler = FlowMatching(DIMS, "sde", backend=backend)
        _, log_prob = sampler.sample(B, lambda x, t, factor=factor: factor * field(x, t), **options)
        gradients.append(torch.autograd.grad(log_prob.sum(), factor)[0])
        total = []
        for b in range(B - 1):
            _, its = sampler.sample(
                1, lambda x, t, factor=factor: factor * field(x, t), noise=x[b : b + 1], time_steps=t[b : b + 1],
                step_noise=KeyedNoise(5, first=b), return_log_prob=True, differentiable=True,
            )  # fmt: skip
            total.append(torch.autograd.grad(its.sum(), factor)[0])
        # autograd adds over the batch in another order
        torch.testing.assert_close(gradients[-1], sum(total, torch.tensor(0.0)), rtol=1e-5, atol=1e-5)


def test_log_prob_compiled() -> None:
    """By torch.compile, with times in lists: one graph; under FakeTensorMode."""
    torch._dynamo.reset()
    fm = FlowMatching(DIMS, "sde")
    x, t = torch.randn(B, *DIMS, generator=generator()), (held(1, 1) * 0.8 + 0.1).tolist()

    def sampled(x: Tensor) -> Any:
        return fm.sample(B, field, noise=x, step_noise=KeyedNoise(3), time_steps=t, return_log_prob=True)

    compiled = torch.compile(sampled, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(x), sampled(x), strict=True):
        assert_same_bits(got, wanted)
    with FakeTensorMode():
        assert sampled(torch.empty(B, *DIMS))[1].shape == (B, N)


def test_no_log_prob_without_noise() -> None:
    """A real step without noise raises, and says whose; before the model is called."""
    t, x, calls = held(1), torch.zeros(B, *DIMS), []
    for solver, steps, message in (
        ("cps", N - 1, "steps [5] add no noise to sample 0"),
        ("renoise", N - 1, "steps [5] add no noise to sample 0"),
        ("sde", 2, "steps [0, 1, 2, 3, 4, 5] add no noise to sample 0"),
    ):
        options = {"time_steps": t} | ({"int_method_options": {"eta": 0.0}} if solver == "sde" else {})
        fm = FlowMatching(DIMS, solver)
        with pytest.raises(ValueError, match=re.escape(message)):
            fm.sample(B, lambda x, t: calls.append(1) or x, return_log_prob=True, **options)
        with pytest.raises(ValueError, match=f"step {steps} adds no noise to sample 0, so it has no density"):
            fm.step_log_prob(x, x, x, steps, **options)
    ends = grids() * 0.9
    ends[2, -1] = 1.0
    with pytest.raises(ValueError, match=r"steps \[5\] add no noise to sample 2"):
        FlowMatching(DIMS, "cps").sample(B, field, time_steps=ends, return_log_prob=True)
    with pytest.raises(ValueError, match=r"a row for each of the 3 samples.*got 4"):
        FlowMatching(DIMS, "sde").step_log_prob(x[:3], x[:3], x[:3], 0, time_steps=t)
    assert not calls


def test_what_goes_with_it() -> None:
    """A callback that stops, a constraint, step functions, a format, strength, a derivative, writes to t."""
    x, t = torch.randn(B, *DIMS, generator=generator()), grids()
    fm = FlowMatching(DIMS, "heun")
    seen: list[Tensor] = []

    def callback(step: int, time: Tensor, x: Tensor) -> bool:
        seen.append(time)
        return step == 3

    stopped = fm.sample(B, field, noise=x, time_steps=t, callback=callback)
    assert stopped.stopped
    assert_same_bits(stopped.time_steps, t[:, :5].contiguous())
    assert_same_bits(stopped.x, fm.sample(B, field, noise=x, time_steps=t, return_all_steps=True)[0][:, 4])
    assert [list(time.shape) for time in seen] == [[B, 1, 1]] * 4
    assert_same_bits(seen[2].flatten(), t[:, 3])

    plan, mask = torch.randn(B, *DIMS), torch.arange(5) < 2
    known = lambda b: inpaint(plan[b], mask, x[b])  # noqa: E731
    whole = fm.sample(B, field, noise=x, time_steps=t, constraint=known(slice(None)))
    for b in range(B):
        part = slice(b, b + 1)
        assert_same_bits(whole[part], fm.sample(1, field, noise=x[part], time_steps=t[b], constraint=known(part)))

    def model(x: Tensor, t: Tensor, step: int) -> Tensor:
        times.append(t)
        return x * 0.1

    for form, shape in (("batch", [B]), ("column", [B, 1, 1])):
        times: list[Tensor] = []
        FlowMatching(DIMS).sample(B, StepFunction(model, time_as=form, time_scale=1000), noise=x, time_steps=t)
        assert_same_bits(torch.stack(times).view(N, B), t.T[:N] * 1000)
        assert list(times[0].shape) == shape
    with pytest.raises(ValueError, match="time_as='scalar' is one time for all samples"):
        FlowMatching(DIMS).sample(B, StepFunction(model, time_as="scalar"), time_steps=t)

    image = torch.randn(B, 4, 2, 3).contiguous(memory_format=torch.channels_last)
    kept = FlowMatching((4, 2, 3), "ab2").sample(B, field, noise=image, time_steps=t)
    assert kept.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(kept, FlowMatching((4, 2, 3), "ab2").sample(B, field, noise=image.contiguous(), time_steps=t))

    strength = torch.rand(*DIMS)
    compare(FlowMatching(DIMS), held(1, 1), x, "strength", velocity_strength=strength)

    y = x.clone().requires_grad_()
    gradients = []
    for backend in BACKENDS:
        out = FlowMatching(DIMS, "ab2", backend=backend).sample(
            B, field, noise=y, time_steps=held(1, 1), differentiable=True
        )
        gradients.append(torch.autograd.grad(out.square().sum(), y)[0])
        separate = torch.cat(
            [alone(b, y, held(1, 1)[b], fm=FlowMatching(DIMS, "ab2"), differentiable=True)[:, -1] for b in range(B)]
        )
        wanted = torch.autograd.grad(separate.square().sum(), y)[0]
        torch.testing.assert_close(gradients[-1], wanted, rtol=1e-5, atol=1e-5)  # autograd adds in another order

    before = t.clone()
    _, written = FlowMatching(DIMS).sample(B, writes, noise=x, time_steps=t, return_all_steps=True)
    assert_same_bits(t, before)
    assert_same_bits(written[:, :N], (t + 0.125)[:, :N].contiguous())


def test_two_dtypes_of_guidance() -> None:
    """Combined in eager PyTorch's promotion, each sample with its weight; weights that make a model irrelevant."""
    x, t = torch.randn(B, *DIMS, generator=generator()), grids()
    w = torch.tensor([[1.0], [0.3], [2.5], [0.0]], dtype=F64)
    fm = FlowMatching(DIMS, use_classifier_free_guidance=True)
    half = lambda x, t: other(x, t).bfloat16()  # noqa: E731
    compare(fm, t, x, "dtypes", weights=w, unguided_step_fn=half)
    number = lambda x, t: torch.tensor(0.3)  # noqa: E731 - which does not widen a velocity of 16 bits
    compare(fm, t, x, "a number", weights=w, unguided_step_fn=number, step_fn=lambda x, t: field(x, t).bfloat16())
    calls: list[int] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return other(x, t)

    options = {"noise": x, "time_steps": t, "unguided_step_fn": counted, "skip_irrelevant_model": True}
    fm.sample(B, field, inference_guidance_weight=torch.ones(B, 1), **options)
    assert not calls
    fm.sample(B, field, inference_guidance_weight=w, **options)
    assert len(calls) == N


def test_shapes_tell_weights_apart() -> None:
    """With as many steps as samples too."""
    x, t = torch.randn(B, *DIMS, generator=generator()), torch.linspace(0, 1, B + 1)
    fm = FlowMatching(DIMS, use_classifier_free_guidance=True)
    w = [0.5, 1.5, 2.0, 3.0]

    def sampled(weight: Any) -> Tensor:
        return fm.sample(B, field, noise=x, time_steps=t, unguided_step_fn=other, inference_guidance_weight=weight)

    by_step = sampled(w)
    assert_same_bits(by_step, sampled(torch.tensor([w])))
    assert_same_bits(by_step, sampled([w] * B))
    by_sample = sampled([[one] for one in w])
    assert_same_bits(by_sample, sampled(torch.tensor(w).view(B, 1)))
    assert not torch.equal(by_step, by_sample)
    for b in range(B):
        assert_same_bits(by_sample[b], sampled(w[b])[b])


def test_tables_are_kept() -> None:
    """Equal numbers make no second table; grids that several samples share are built once."""
    solvers.cache.clear()
    fm = FlowMatching(DIMS)
    for _ in range(2):
        for grid in (grids(), grids().tolist()):
            fm.sample(B, field, time_steps=grid)
    assert len(solvers.cache._tables) == 2
    fm.sample(B, field, time_steps=grids().double())
    assert len(solvers.cache._tables) == 3


# ---- times of each token ----


def token_grids() -> Tensor:
    """[B, L, N + 1], for DIMS = (L, 5): the first token is clean, held at 0.9, and others are held for a step."""
    t = grids().unsqueeze(1).repeat(1, DIMS[0], 1)
    t[:, 0] = 0.9
    t[:, 1, 1] = t[:, 1, 0]
    return t


def by_token(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_as_a_sample(backend: str) -> None:
    for case in token_cases.cases():
        token_cases.check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_held_tokens(backend: str) -> None:
    """A clean prefix keeps its bits, whatever it holds and whatever its velocity is."""
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, torch.nan])
    for solver, state in itertools.product(SOLVERS, (F32, BF16, F64)):
        x = values((B, *DIMS), state, generator())

        def step_fn(x: Tensor, t: Tensor) -> Tensor:
            v = field(x, t)
            v[:, 0] = bad.to(v.dtype)
            return v

        t = token_grids()
        t[:, 1] = t[:, 2]  # no step of length 0 before others, which not every solver takes
        fm = FlowMatching(DIMS, solver, backend=backend)
        states, _ = fm.sample(B, step_fn, noise=x, time_steps=t, return_all_steps=True)
        assert_same_bits(states[:, :, 0], x[:, None, 0].expand(-1, N + 1, -1).contiguous(), f"{solver} {state}")
        assert not torch.equal(states[:, 0, 1], states[:, -1, 1])


def test_what_goes_with_tokens() -> None:
    """A callback that stops, a constraint, step functions, formats, a derivative, writes to t, keyed noise."""
    x, t = torch.randn(B, *DIMS, generator=generator()), token_grids()
    flat, its = by_token(x), by_token(t)
    fm, of_tokens = FlowMatching(DIMS, "heun"), FlowMatching(DIMS[1:], "heun")
    times: list[Tensor] = []

    def callback(step: int, time: Tensor, x: Tensor) -> bool:
        times.append(time)
        return step == 3

    stopped = fm.sample(B, field, noise=x, time_steps=t, callback=callback)
    assert_same_bits(stopped.time_steps, t[..., :5].contiguous())
    assert_same_bits(stopped.x, fm.sample(B, field, noise=x, time_steps=t, return_all_steps=True)[0][:, 4])
    assert [list(time.shape) for time in times] == [[B, DIMS[0], 1]] * 4
    assert_same_bits(times[2].squeeze(-1), t[..., 3])

    plan, mask = torch.randn(B, *DIMS), torch.arange(5) < 2
    got = fm.sample(B, field, noise=x, time_steps=t, constraint=inpaint(plan, mask, x))
    wanted = of_tokens.sample(
        len(flat), field, noise=flat, time_steps=its, constraint=inpaint(by_token(plan), mask, flat)
    )
    assert_same_bits(by_token(got), wanted)

    def model(x: Tensor, t: Tensor, step: int) -> Tensor:
        times.append(t)
        return x * 0.1

    for form, shape in (("batch", [B, DIMS[0]]), ("column", [B, DIMS[0], 1])):
        times = []
        step_fn = StepFunction(model, time_as=form, time_scale=1000)
        FlowMatching(DIMS).sample(B, step_fn, noise=x, time_steps=t)
        assert_same_bits(torch.stack(times).view(N, B, DIMS[0]), t.movedim(-1, 0)[:N] * 1000)
        assert list(times[0].shape) == shape
        assert_same_bits(step_fn.time(t[..., :1]), times[0])
    scalar = StepFunction(model, time_as="scalar")
    for call in (lambda: FlowMatching(DIMS).sample(B, scalar, time_steps=t), lambda: scalar.time(t[..., :1])):
        with pytest.raises(ValueError, match="time_as='scalar' is one time for all samples"):
            call()

    # A format is kept where the sizes with times of their own are the first in memory.
    image, fm = torch.randn(B, 3, 2, 2, 4), FlowMatching((3, 2, 2, 4), "ab2")
    for order, own, keeps in [((0, 2, 3, 4, 1), 2, False), ((0, 1, 3, 4, 2), 2, True), ((0, 1, 3, 4, 2), 3, False)]:
        given = image.permute(order).contiguous().permute(*(order.index(k) for k in range(5)))
        options: dict[str, Any] = {"time_steps": token_cases.grids(*image.shape[:own])}
        for more in ({}, {"velocity_strength": torch.rand(image.shape)}):
            fm = FlowMatching((3, 2, 2, 4), "euler" if more else "ab2")
            got = fm.sample(B, field, noise=given, **options, **more)
            assert_same_bits(got, fm.sample(B, field, noise=image, **options, **more))
            assert got.is_contiguous() != keeps
            assert not keeps or got.stride() == given.stride()

    y = x.clone().requires_grad_()
    for backend in BACKENDS:
        gradients = []
        for batch, noise, grid, dims in ((B, y, t, DIMS), (B * DIMS[0], by_token(y), its, DIMS[1:])):
            fm = FlowMatching(dims, "heun", backend=backend)
            out = fm.sample(batch, field, noise=noise, time_steps=grid, differentiable=True)
            gradients.append(torch.autograd.grad(out.square().sum(), y)[0])
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # autograd adds in another order

    before = t.clone()
    _, written = FlowMatching(DIMS).sample(B, writes, noise=x, time_steps=t, return_all_steps=True)
    assert_same_bits(t, before)
    assert_same_bits(written[..., :N].contiguous(), (t + 0.125)[..., :N].contiguous())

    fm = FlowMatching(DIMS, "sde")
    grid = (grids() * 0.9 + 0.01).unsqueeze(1).expand(-1, DIMS[0], -1)
    keyed = {"noise": x, "step_noise": KeyedNoise(9)}
    assert_same_bits(fm.sample(B, field, time_steps=grid, **keyed), fm.sample(B, field, time_steps=grid[:, 0], **keyed))


def test_grids_of_tokens_are_built_once() -> None:
    """However many tokens have one; and the table is kept, for lists, tensors and weights."""
    solvers.cache.clear()
    x, t = torch.randn(B, *DIMS, generator=generator()), token_grids()
    options = {"noise": x, "unguided_step_fn": other, "use_classifier_free_guidance": True}
    built: list[Any] = []
    build = requests.build
    with mock.patch.object(requests, "build", lambda *a, **k: built.append(a) or build(*a, **k)):
        for _ in range(2):
            for grid, weight in itertools.product((t, t.tolist()), (torch.full((B, 3, 1), 0.5), lambda t: t)):
                FlowMatching(DIMS).sample(B, field, time_steps=grid, inference_guidance_weight=weight, **options)
    # Grids without a hold are one table, those with one another; for numbers in two forms; a function shares the table.
    assert len(built) == 4 * 2
    assert len(solvers.cache._tables) == 4


def test_many_grids_side_by_side() -> None:
    """Each of them has the row, in float64, that it has alone: of solvers, predictions, ends of time and dtypes."""
    R = 67  # whole vectors and a rest
    for solver, (noise_at, predicts), dtype in itertools.product(
        (*SOLVERS, *STOCHASTIC), ((0, None), (1, None), (0, 1), (1, 1)), (F32, F64)
    ):
        for n in (1, 2, 3, 10):
            times = torch.rand(R, n + 1, generator=generator(), dtype=dtype).sort(descending=bool(noise_at)).values
            request = requests.Request(
                solvers.loaded(solver),
                steps=0,
                dtype=F64,
                device=torch.device("cpu"),
                noise_at=noise_at,
                predicts=predicts,
                euler_at_final=False,
                time_grid="uniform",
                options=(),
                grid_dtype=F32,
                time_steps=times * 0.98 + 0.01,
                sizes=(R,),
            )
            whole = request.make(check=True)
            for r in (0, 1, R - 1):
                alone = request._replace(time_steps=request.time_steps[r], sizes=()).make(check=True)
                assert alone.evaluations == whole.evaluations
                for name in ("times", "coefficients", *(["densities"] if alone.densities is not None else [])):
                    assert_same_bits(getattr(whole, name)[:, r], getattr(alone, name))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "rows": ({}, {"time_steps": grids()[:3]}, ValueError, "a row for each of the 4 samples.*got 3"),
    "ragged": ({}, {"time_steps": [[0, 1], [0, 1], [0, 0.5, 1], [0, 1]]}, ValueError, "sample 2 has 3 entries"),
    "not monotonic": ({}, {"time_steps": [[0, 1, 2]] * 3 + [[0, 1, 0.5]]}, ValueError, "sample 3: time_steps must"),
    "tokens": ({}, {"time_steps": torch.rand(B, 2, N)}, ValueError, r"\[0\] must .* each of the 3 entries.*got 2"),
    "tokens in lists": (
        {},
        {"time_steps": [[[0, 1]] * 3] * 3 + [[[0, 1]] * 2]},
        ValueError,
        r"time_steps\[3\] must .* 3 entries of dimension 1 of the state, or one for all, got 2",
    ),
    "samples of tokens": ({}, {"time_steps": torch.rand(3, 3, N)}, ValueError, "each of the 4 samples.*got 3"),
    "lists not as deep": ({}, {"time_steps": [[[0, 1]] * 3] * 3 + [[0, 1, 2]]}, TypeError, r"\[3\]\[0\] must be a l"),
    "lists deeper": ({}, {"time_steps": [[0, 1]] * 3 + [[[0, 1]]]}, ValueError, "sample 3 has 1 entries"),
    "too many dimensions": ({}, {"time_steps": torch.rand(B, 3, 5, 1, 2)}, ValueError, r"\[4, 3, 5\].*got 5 dim"),
    "too many sizes of steps": ({}, {"step_sizes": torch.rand(B, 3, 5, 1, 2)}, ValueError, "step_sizes must be.*got 5"),
    "too many weights": ({}, {"weights": torch.rand(B, 3, 5, 1, 2)}, ValueError, "weight must be.*got 5 dimensions"),
    "ragged tokens": (
        {},
        {"time_steps": [[[0, 1]] * 3] * 3 + [[[0, 1], [0, 0.5, 1], [0, 1]]]},
        ValueError,
        "sample 3, token 1 has 3 entries, and sample 0, token 0 has 2",
    ),
    "a token not monotonic": (
        {},
        {"time_steps": [[[0, 1, 2]] * 3] * 3 + [[[0, 1, 2], [0, 1, 2], [0, 1, 0.5]]]},
        ValueError,
        "sample 3, token 2: time_steps must",
    ),
    "an element's NaN": ({}, {"time_steps": torch.full((B, 3, 5, 3), torch.nan)}, ValueError, r"token \[0, 0\] must"),
    "a token between": (
        {"int_method": "ab2"},
        {"time_steps": [[[0, 0.1, 0.2, 1]] * 3] * 3 + [[[0, 0.1, 0.2, 1], [0, 0.5, 0.5, 1], [0, 0.1, 0.2, 1]]]},
        ValueError,
        "sample 3, token 1 has a step of length 0, step 1, and in step 2",
    ),
    "weights of tokens": ({}, {"weights": torch.rand(B, 2, 1)}, ValueError, r"weight\[0\] must .* 3 entries.*got 2"),
    "weights of tokens' steps": (
        {},
        {"weights": torch.rand(B, 3, 3)},
        ValueError,
        r"one for each of the 10 steps, got 3.*for each token \[B, L, 1\]",
    ),
    "weights not as deep": ({}, {"weights": [[[1.0]] * 3] * 3 + [[1.0]]}, TypeError, r"weight\[3\]\[0\] must be a l"),
    "weights deeper": ({}, {"weights": [[1.0]] * 3 + [[[1.0]]]}, TypeError, r"weight\[3\]\[0\] must be"),
    "log-probabilities of tokens": (
        {"int_method": "sde"},
        {"time_steps": token_grids() * 0.9, "return_log_prob": True},
        ValueError,
        r"not for times or weights of each token: pass times \[T\] or \[B, T\]",
    ),
    "integers": ({}, {"time_steps": torch.ones(B, 3, dtype=torch.int64)}, TypeError, "floating point"),
    "words": ({}, {"time_steps": [["a", "b"]] * B}, TypeError, "time_steps of sample 0, entry 0, must be a number"),
    "one entry": ({}, {"time_steps": torch.rand(B, 1)}, ValueError, "two or more"),
    "NaN": ({}, {"time_steps": torch.tensor([[0.0, torch.nan, 1.0]] * B)}, ValueError, "sample 0 must be finite"),
    "sizes": ({}, {"time_steps": grids(), "step_sizes": torch.rand(B, N + 1)}, ValueError, "sample 0: step_sizes must"),
    "size of a hold": (
        {},
        {"time_steps": held(1), "step_sizes": torch.rand(B, N) + 1},
        ValueError,
        "sample 1 has a step of length 0, step 0.*step_sizes",
    ),
    "ab3": ({"int_method": "ab3"}, {"time_steps": held(1)}, ValueError, "sample 1 has .*, step 0, and in"),
    "ab2 between": (
        {"int_method": "ab2"},
        {"time_steps": [[0, 0.1, 0.2, 1]] * 3 + [[0, 0.5, 0.5, 1]]},
        ValueError,
        "sample 3 has a step of length 0, step 1, and in step 2",
    ),
    "euler_at_final": (
        {"int_method": "heun", "euler_at_final": True},
        {"time_steps": held(0, 1)},
        ValueError,
        "sample 1 has a step of length 0, step 5, and in step 4",
    ),
    "a prediction where it says nothing": (
        {"prediction_type": "noise"},
        {"time_steps": [[0.1, 0.5, 1]] * 2 + [[0, 0.5, 1]] + [[0.1, 0.5, 1]]},
        ValueError,
        "^sample 2: what step_fn predicts stands at t = 0",
    ),
    "not finite, the first of two": (
        {"int_method": "ab2"},
        {"time_steps": torch.tensor([[0, 0.5, 1]] * 2 + [[0, 1e-320, 1], [0, 2e-320, 1]], dtype=F64)},
        ValueError,
        r"^sample 2: 'ab2' has no finite coefficients on this time grid, \[0.0, 1e-320, 1.0\]",
    ),
    "inference_step": ({}, {"time_steps": grids(), "inference_step": 3}, ValueError, "inference_step is 3"),
    "weights": ({}, {"weights": torch.rand(3, 1)}, ValueError, "a row for each of the 4 samples"),
    "weights of steps": ({}, {"weights": torch.rand(B, 3)}, ValueError, "one for each of the 10 steps, got 3"),
    "as many weights as samples": ({}, {"weights": [1.0] * B}, ValueError, r"one for each sample is \[B, 1\]"),
    "ragged weights": ({}, {"weights": [[1.0], [1.0, 2.0], [1.0], [1.0]]}, ValueError, "as many weights"),
    "infinite weight": ({}, {"weights": [[1.0]] * 3 + [[torch.inf]]}, ValueError, r"weight\[3\]\[0\] must be finite"),
    "large weight": ({}, {"weights": [[1.0]] * 3 + [[1e300]]}, ValueError, "float32 can hold"),
    "weights of words": ({}, {"weights": [["a"]] * B}, TypeError, "inference_guidance_weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    constructor, options, kind, words = REFUSED[case]
    options = dict(options)
    if "weights" in options:
        options["inference_guidance_weight"] = options.pop("weights")
        options |= {"use_classifier_free_guidance": True, "unguided_step_fn": other}
    with pytest.raises(kind, match=words):
        FlowMatching(DIMS, **constructor).sample(B, field, **options)


def test_refused_elsewhere() -> None:
    """A fitted solver, fit_solver, and a tensor of times that a compiler cannot read."""
    fm = FlowMatching(DIMS)
    fitted = FittedSolver((0.0, 0.4, 1.0), ((1.0, 0.4), (1.0, 0.7, -0.1)))
    x = torch.zeros(B, *DIMS)
    for grid in (grids(), token_grids()):
        with pytest.raises(ValueError, match="a fitted solver brings its own times"):
            fm.sample(B, field, int_method=fitted, time_steps=grid)
    with pytest.raises(ValueError, match="not for times or weights of each token"):
        FlowMatching(DIMS, "sde").step_log_prob(x, x, x, 0, time_steps=token_grids())
    guided = {"use_classifier_free_guidance": True, "unguided_step_fn": other}
    for weight in ([[1.0]], [[[1.0]]]):
        with pytest.raises(ValueError, match="fit and compare with one for all"):
            fm.fit_solver(field, 2, inference_guidance_weight=weight, **guided)
    with pytest.raises(Exception, match="pass lists of floats"):
        torch.compile(lambda t: fm.sample(B, field, noise=x, time_steps=t), backend="eager", fullgraph=True)(grids())


def test_refused_while_compiling() -> None:
    """What the numbers of a list say, though those of the coefficients cannot be read."""
    fm = FlowMatching(DIMS, prediction_type="noise")
    times = [[0.1, 0.5, 1]] * (B - 1) + [[0, 0.5, 1]]
    sampled = torch.compile(lambda x: fm.sample(B, field, noise=x, time_steps=times), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=f"sample {B - 1}: .*what step_fn predicts stands at t = 0"):
        sampled(torch.ones(B, *DIMS))


def test_fitted_with_weights() -> None:
    fitted = FittedSolver((0.0, 0.4, 1.0), ((1.0, 0.4), (1.0, 0.7, -0.1)))
    fm = FlowMatching(DIMS, fitted, use_classifier_free_guidance=True)
    w = torch.tensor([[0.5], [1.0], [2.0], [4.0]], dtype=F64)
    options = {"noise": torch.randn(B, *DIMS, generator=generator()), "unguided_step_fn": other}
    whole = fm.sample(B, field, inference_guidance_weight=w, **options)
    for b in range(B):
        assert_same_bits(whole[b], fm.sample(B, field, inference_guidance_weight=w[b].item(), **options)[b])


def test_compiled() -> None:
    """By torch.compile, with times in lists, of samples and of tokens; under FakeTensorMode; under vmap."""
    torch._dynamo.reset()
    x = torch.randn(B, *DIMS, generator=generator())
    for solver, t in (("ab2", held(1, 1).tolist()), ("euler", token_grids().tolist())):
        fm = FlowMatching(DIMS, solver)

        def sampled(x: Tensor, fm: FlowMatching = fm, t: Any = t) -> Tensor:
            return fm.sample(B, field, noise=x, time_steps=t)

        wanted = sampled(x)
        assert_same_bits(torch.compile(sampled, backend="aot_eager", fullgraph=True)(x), wanted)
        assert_same_bits(vmap(sampled)(x.expand(2, *x.shape))[1], wanted)
        with FakeTensorMode():
            assert sampled(torch.empty(B, *DIMS)).shape == x.shape


# ---- the op ----

OP = torch.ops.flowmatch_kernels.fused_step


def of_op(dtype: torch.dtype, tokens: bool, terms: int = 2, guided: bool = True) -> dict[str, Any]:
    """Operands with rows of their own, of B samples or their tokens; the first two rows hold, the third has b1 = 0."""
    shape, arithmetic, g = (B, *DIMS), arithmetic_dtype(dtype), generator()
    R = B * (DIMS[0] if tokens else 1)
    coefficients = torch.randn(2, R, 8, generator=g, dtype=F64).to(arithmetic)
    coefficients[1, :2] = torch.tensor(HELD)
    coefficients[1, 2, 2] = 0
    x = lambda dtype: values(shape, dtype, g)  # noqa: E731
    names = {"base": x(dtype), "v": x(dtype), "u": x(dtype) if guided else None}
    names |= {f"h{k}": x(arithmetic) if k <= terms else None for k in (1, 2, 3)}
    return names | {"coefficients": coefficients, "row": 1}


@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_op_is_a_step_for_each_row(dtype: torch.dtype, tokens: bool) -> None:
    """Against the op with one row for all, which has today's bits; terms that are left out are absent there."""
    names = of_op(dtype, tokens)
    coefficients = names["coefficients"][1]
    parts = {
        k: x.reshape(len(coefficients), -1) for k, x in names.items() if isinstance(x, Tensor) and k != "coefficients"
    }
    for op in (OP, reference.fused_step):
        out = op(**names).reshape(len(coefficients), -1)
        for r, row in enumerate(coefficients):
            one: dict[str, Any] = {k: x[r] for k, x in parts.items()} | {
                "coefficients": row[None].clone(),
                "row": 0,
                "h3": None,
            }
            if r < 2:
                assert_same_bits(out[r], parts["base"][r], "held")
                continue
            if r == 2:  # h2 takes the place of h1, which is left out
                one |= {"h1": one["h2"], "h2": None}
                one["coefficients"][0, 2] = row[3]
            assert_same_bits(out[r], OP(**one), f"row {r}")


def test_op_as_an_op() -> None:
    """opcheck; derivatives against autograd of the reference; vmap is PyTorch's to refuse."""
    for tokens in (False, True):
        names = of_op(F64, tokens)
        names |= {k: x.nan_to_num(0.5, 0.5, 0.5).clamp(-9, 9) for k, x in names.items() if isinstance(x, Tensor)}
        tensors = [names[k].requires_grad_() for k in ("base", "v", "u", "h1", "h2")]
        order = ("base", "v", "u", "h1", "h2", "h3", "coefficients", "row")
        if tokens:
            torch.library.opcheck(OP.default, tuple(names[k] for k in order))
        for strength in (None, torch.rand(B, *DIMS, dtype=F64)):
            got = torch.autograd.grad(OP(**names, strength=strength).square().sum(), tensors)
            wanted = torch.autograd.grad(reference.fused_step(**names, strength=strength).square().sum(), tensors)
            for one, its in zip(got, wanted, strict=True):
                # float64, in another order of sums than autograd's own.
                torch.testing.assert_close(one, its, rtol=1e-12, atol=1e-12)
    # What is left out has no part in the gradient either, whatever comes back.
    v = torch.randn(2, 3, requires_grad=True)
    coefficients = torch.tensor([[HELD, (1.0, 0.5, *[0.0] * 6)]])
    out = OP(torch.zeros(2, 3), v, None, None, None, None, coefficients, 0)
    (gradient,) = torch.autograd.grad(out, v, torch.full((2, 3), torch.inf))
    assert gradient[0].eq(0).all()
    assert gradient[1].eq(torch.inf).all()
