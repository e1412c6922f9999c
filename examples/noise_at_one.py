"""A loop in lerobot's and openpi's convention: noise at t = 1, v = noise - data, the time as float32 [B]."""

import torch

from flowmatch_kernels import FlowMatching, StepFunction
from flowmatch_kernels.integrations import openpi


def model(x, t):
    """The velocity, noise - data, for data at zero; t [B], from 1 to 0."""
    return torch.sin(x) * t.view(-1, 1, 1)


noise = torch.randn(2, 50, 32)
times, sizes = openpi.time_grid(10)
fm = FlowMatching((50, 32), noise_at=1)
ours = fm.sample(2, StepFunction(model, time_as="batch"), noise=noise, time_steps=times, step_sizes=sizes)

x, t, dt = noise, torch.tensor(1.0), torch.tensor(-1.0 / 10)
while t >= -dt / 2:
    x = x + dt * model(x, t.expand(2))
    t = t + dt

assert torch.equal(ours, x)
print("the bits of openpi's loop")
