"""openpi's sampling loop and the model around it, written from facts: the oracle of the tests and of the benchmark.

Knows nothing of the package.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def loop(denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int) -> tuple[Tensor, list[float]]:
    """openpi's loop, from facts: t and dt are float32 tensors of no dimensions, t is summed up. And its times."""
    dt = torch.tensor(-1.0 / num_steps, dtype=torch.float32)
    t, x, times = torch.tensor(1.0), noise, []
    while t >= -dt / 2:
        times.append(t.item())
        x = x + dt * denoise(x, t.expand(x.shape[0]))
        t = t + dt
    return x, times


class Model(nn.Module):
    """What ours needs of openpi's PI0Pytorch, and no more."""

    def __init__(self, compiled: bool = False, horizon: int = 5, dim: int = 4) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(action_horizon=horizon, action_dim=dim, pytorch_compile_mode="default")
        self.action_out_proj = nn.Linear(dim, dim)
        self.prepared: list[int] = []
        if compiled:
            self.sample_actions = torch.compile(self.sample_actions, mode="default")  # type: ignore[method-assign]

    def sample_noise(self, shape: tuple[int, ...], device: Any) -> Tensor:
        return torch.normal(0.0, 1.0, shape, dtype=torch.float32, device=device)

    @torch.no_grad()
    def sample_actions(self, device: Any, observation: Any, noise: Any = None, num_steps: int = 10) -> Tensor:
        if noise is None:
            horizon, dim = self.config.action_horizon, self.config.action_dim
            noise = self.sample_noise((observation.state.shape[0], horizon, dim), device)
        self.prepared.append(num_steps)
        masks, cache = torch.ones(observation.state.shape[0], 3), {"keys": observation.state.sum()}
        return loop(lambda x, t: self.denoise_step(observation.state, masks, cache, x, t), noise, num_steps)[0]

    def denoise_step(
        self, state: Tensor, prefix_pad_masks: Tensor, past_key_values: Any, x_t: Tensor, timestep: Tensor
    ) -> Tensor:
        assert timestep.shape == (x_t.shape[0],)
        assert timestep.dtype == torch.float32
        mixed = (
            torch.sin(self.action_out_proj(x_t)) + past_key_values["keys"] * prefix_pad_masks.sum() * state[:, :1, None]
        )
        return mixed + timestep[:, None, None]
