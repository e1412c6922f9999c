"""`velocity_strength` of sample(), x + (dt * v) * strength: against the loop in eager PyTorch, to the last bit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from operands import assert_same_bits
from torch import Tensor

from flowmatch_kernels import FlowMatching, inpaint
from flowmatch_kernels.ops import dispatch, reference
from flowmatch_kernels.ops.fused_step import VELOCITY_DTYPES

SHAPE = (3, 5, 7)
STEPS = 4


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend `fresh` writes to fresh memory, as on a GPU: `rows.Fresh`."""
    serving = dispatch.Backend("fresh", (), lambda _: None, lambda: lambda o: reference.fused_step_(o))
    monkeypatch.setitem(dispatch.BACKENDS, "fresh", serving)
    monkeypatch.setattr(dispatch, "_NAMES", (*dispatch._NAMES, "fresh"))


def ramp(dtype: torch.dtype = torch.float32) -> Tensor:
    """As real-time chunking has it: a part that stays, a ramp, and a part that moves freely; [5, 1]."""
    return torch.tensor([0.0, 0.3, 0.7, 1.0, 1.0]).view(5, 1).to(dtype)


def velocity(dtype: torch.dtype) -> Any:
    return lambda x, t: (torch.cos(3 * x.float()) - x.float() * t.float()).to(dtype)


def by_hand(noise: Tensor, step_fn: Any, strength: Tensor, factors: list[Any]) -> list[Tensor]:
    """GR00T's loop: `actions + dt * v * strength`."""
    states, times = [noise], torch.linspace(0, 1, STEPS + 1)
    for k in range(STEPS):
        t = times[k].view(1, 1, 1).expand(noise.shape[0], 1, 1)
        states.append(states[-1] + factors[k] * step_fn(x=states[-1], t=t) * strength)
    return states


@pytest.mark.parametrize("backend", ["cpu", "reference", "fresh"])
def test_the_loop(backend: str) -> None:
    """Every pair of dtypes, roundings, with a trajectory and without."""
    for (state, velocities), all_steps in product(VELOCITY_DTYPES.items(), (False, True)):
        for dtype, rounding in product(velocities, ("promote", "exact")):
            noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(state)
            times = torch.linspace(0, 1, STEPS + 1)
            sizes = [float(a) for a in times.diff()]
            wide = torch.float64 if state == torch.float64 else torch.float32
            # A step size with dimensions promotes; a number does not.
            factors: list[Any] = sizes if rounding == "exact" else [torch.tensor([a], dtype=wide) for a in sizes]
            if rounding == "promote" and state.itemsize == 2:
                continue  # there the loop has a state of float32
            wanted = by_hand(noise, velocity(dtype), ramp(state), factors)
            got = FlowMatching(SHAPE[1:], "euler", STEPS, backend=backend).sample(
                *(SHAPE[0], velocity(dtype)),
                noise=noise,
                return_all_steps=all_steps,
                step_rounding=rounding,
                velocity_strength=ramp(state),
            )
            if all_steps:
                assert_same_bits(got[0], torch.stack(wanted, 1), f"{state} {dtype} {rounding}")
            else:
                assert_same_bits(got, wanted[-1], f"{state} {dtype} {rounding}")


@pytest.mark.parametrize("backend", ["cpu", "reference", "fresh"])
def test_with_guidance_a_constraint_and_channels_last(backend: str) -> None:
    noise = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    strength = torch.rand(2, 3, 4, 5)
    guided = {"use_classifier_free_guidance": True, "inference_guidance_weight": 1.7}
    guided |= {"unguided_step_fn": lambda x, t: torch.sin(x)}
    known = inpaint(torch.zeros(3, 4, 5), torch.rand(3, 4, 5) < 0.3, torch.zeros(3, 4, 5))
    results = []
    for by, start in ((backend, noise), ("reference", noise.contiguous())):
        fm = FlowMatching((3, 4, 5), backend=by)
        results.append(
            fm.sample(
                *(2, velocity(torch.float32)),
                noise=start,
                constraint=known,
                velocity_strength=strength,
                **guided,
            )
        )
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(results[0].contiguous(), results[1].contiguous())
    plain = FlowMatching((3, 4, 5), backend=backend).sample(2, velocity(torch.float32), noise=noise)
    ones = FlowMatching((3, 4, 5), backend=backend).sample(
        2, velocity(torch.float32), noise=noise, velocity_strength=torch.ones(1)
    )
    assert_same_bits(plain, ones)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compile(compiler: str) -> None:
    torch._dynamo.reset()
    fm, noise = FlowMatching(SHAPE[1:]), torch.randn(SHAPE)

    def sampled(noise: Tensor, strength: Tensor) -> Tensor:
        return fm.sample(SHAPE[0], lambda x, t: x * t - 0.5, noise=noise, velocity_strength=strength)

    compiled = torch.compile(sampled, fullgraph=True, backend=compiler)
    for strength in (ramp(), ramp() * 0.3):
        assert_same_bits(compiled(noise, strength), sampled(noise, strength))


def test_a_strength_that_is_not_its_memory() -> None:
    """With the negative bit, or one of autograd's zero tensors, which have no memory."""
    fm, noise = FlowMatching(SHAPE[1:]), torch.randn(SHAPE)
    for strength, same in (
        (torch._neg_view(ramp()), -ramp()),
        (torch._efficientzerotensor(*SHAPE), torch.zeros(SHAPE)),
    ):
        results = [
            fm.sample(SHAPE[0], lambda x, t: x * t - 0.5, noise=noise, velocity_strength=s) for s in (strength, same)
        ]
        assert_same_bits(*results)


def test_derivative() -> None:
    """Of the noise and the model, as of the loop by hand; none of the strength, which is an error."""
    noise, weight = (torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    strength = ramp(torch.float64)

    def step_fn(x: Tensor, t: Tensor) -> Tensor:
        return x * weight

    fm = FlowMatching(SHAPE[1:], "euler", STEPS)
    fm.sample(3, step_fn, noise=noise, velocity_strength=strength, differentiable=True).sum().backward()
    got = noise.grad, weight.grad
    noise.grad = weight.grad = None
    times = torch.linspace(0, 1, STEPS + 1)
    by_hand(noise, step_fn, strength, [float(a) for a in times.diff()])[-1].sum().backward()
    for mine, theirs in zip(got, (noise.grad, weight.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)  # sums in another order
    with pytest.raises(ValueError, match="velocity_strength requires grad"):
        fm.sample(3, step_fn, velocity_strength=strength.requires_grad_(), differentiable=True)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"velocity_strength": 0.5}, TypeError, r"must be a tensor that expands to \[3, 5, 7\].*got 0.5"),
        ({"velocity_strength": torch.ones(5, 1, dtype=torch.float64)}, TypeError, "got torch.float64"),
        ({"velocity_strength": torch.ones(5, 1).to_sparse()}, TypeError, "dense"),
        ({"velocity_strength": torch.ones(5)}, ValueError, r"got \[5\]"),
        ({"velocity_strength": torch.ones(2, 3, 5, 7)}, ValueError, r"got \[2, 3, 5, 7\]"),
        ({"velocity_strength": torch.ones(5, 1, device="meta")}, ValueError, "got one on meta"),
        ({"velocity_strength": torch.ones(5, 1), "int_method": "heun"}, ValueError, "got 'heun' and 'velocity'"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], words: str) -> None:
    called: list[int] = []
    with pytest.raises(error, match=words):
        FlowMatching(SHAPE[1:]).sample(3, lambda x, t: called.append(1) or x, **options)
    assert not called
    with pytest.raises(ValueError, match="'euler' and 'data'"):
        FlowMatching(SHAPE[1:], prediction_type="data").sample(3, lambda x, t: x, velocity_strength=torch.ones(5, 1))
