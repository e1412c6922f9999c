"""torchdiffeq: one import changes, and a fixed-step method takes one kernel launch for each evaluation."""

import torch
import torchdiffeq

from flowmatch_kernels.integrations.torchdiffeq import odeint


def func(t, x):
    """dx/dt, with torchdiffeq's order of arguments."""
    return torch.sin(3 * x) * t


noise, times = torch.randn(6, 64, 2), torch.linspace(0, 1, 11)
for method in ("euler", "midpoint", "rk4"):
    assert torch.equal(odeint(func, noise, times, method=method), torchdiffeq.odeint(func, noise, times, method=method))
print("the bits of torchdiffeq's euler, midpoint and rk4")
