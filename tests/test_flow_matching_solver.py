"""`integrations.flow_matching.ODESolver` against flow_matching's, to the last bit."""

import pytest
import torch
from operands import assert_same_bits

solver = pytest.importorskip("flow_matching.solver", reason="the oracle is flow_matching itself, of the test extra")

from flowmatch_kernels.integrations.flow_matching import ODESolver  # noqa: E402


def velocity(x, t, scale=1.0):
    return torch.sin(3 * x) * scale + t * x


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5"])
def test_sample(method):
    ours, theirs = ODESolver(velocity_model=velocity), solver.ODESolver(velocity_model=velocity)
    assert isinstance(ours, solver.ODESolver)
    x = torch.randn(5, 3)
    adaptive = method == "dopri5"
    for size, grid, intermediates in [
        (None if adaptive else 0.07, None, False),
        (None, torch.linspace(0, 1, 6), True),
        (None, torch.tensor([1.0, 0.4, 0.0]), False),
        (None if adaptive else 0.1, torch.tensor([0.0, 0.33, 1.0]), True),
    ]:
        keywords = {} if grid is None else {"time_grid": grid}
        keywords |= {"step_size": size, "method": method, "return_intermediates": intermediates, "scale": 0.7}
        assert_same_bits(ours.sample(x, **keywords), theirs.sample(x, **keywords), f"{method} {size} {grid}")


def test_under_another_default_dtype():
    """The default grid is the one that their signature holds."""
    x = torch.randn(5, 3)
    torch.set_default_dtype(torch.float64)
    ours, theirs = ODESolver(velocity_model=velocity), solver.ODESolver(velocity_model=velocity)
    assert_same_bits(ours.sample(x, 0.1, scale=0.7), theirs.sample(x, 0.1, scale=0.7))


def test_gradients_and_likelihood():
    ours, theirs = ODESolver(velocity_model=velocity), solver.ODESolver(velocity_model=velocity)
    x = torch.randn(5, 3, requires_grad=True)
    assert not ours.sample(x, 0.1).requires_grad
    gradients = []
    for it in (ours, theirs):
        gradients += torch.autograd.grad(it.sample(x, 0.1, method="midpoint", enable_grad=True).sum(), x)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)  # a derivative is summed in another order

    def log_p0(x):
        return -(x**2).sum(1) / 2

    for got, wanted in zip(
        *(it.compute_likelihood(x.detach(), log_p0, 0.1, exact_divergence=True) for it in (ours, theirs)), strict=True
    ):
        assert_same_bits(got, wanted)


def test_a_model_of_another_dtype():
    """As under autocast: torchdiffeq integrates it, after the first evaluation."""
    calls = []

    def narrow(x, t):
        calls.append(t)
        return velocity(x, t).bfloat16()

    x = torch.randn(5, 3)
    got = ODESolver(velocity_model=narrow).sample(x, 0.1)
    assert len(calls) == 11
    assert_same_bits(got, solver.ODESolver(velocity_model=narrow).sample(x, 0.1))
