"""The sampling loop as Alpamayo publishes it, in plain eager PyTorch: what ours is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import StepFn


@torch.no_grad()
def sample(
    x_dims: Sequence[int], batch_size: int, step_fn: StepFn, device: torch.device, inference_step: int
) -> Tensor:
    """Euler steps from noise at t = 0 to data at t = 1.

    Args:
        x_dims: The shape of one state.
        batch_size: B.
        step_fn: The velocity, called as step_fn(x=x, t=t), x [B, *x_dims], t [B, 1, ..., 1].
        device: Where to sample.
        inference_step: N.

    Returns:
        [B, *x_dims].
    """
    ones = [1] * len(x_dims)
    x = torch.randn(batch_size, *x_dims, device=device)
    time_steps = torch.linspace(0.0, 1.0, inference_step + 1, device=device)
    for i in range(inference_step):
        dt = (time_steps[i + 1] - time_steps[i]).view(1, *ones).expand(batch_size, *ones)
        t = time_steps[i].view(1, *ones).expand(batch_size, *ones)
        v = step_fn(x=x, t=t)
        x = x + dt * v
    return x
