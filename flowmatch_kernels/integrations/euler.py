"""Euler steps of one size on known times, as the robot policies take them, without the checks of `sample()`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tracing
from ..ops.fused_step import EXACT, VELOCITY_DTYPES, arithmetic_dtype
from ..sampling import solve
from ..solvers import Request, table_for


def is_plain(noise: Any) -> bool:
    """Whether `euler` can start from this noise: a dense plain tensor, in plain eager mode."""
    return (
        type(noise) is Tensor
        and noise.dtype in VELOCITY_DTYPES
        and noise.layout is torch.strided
        and noise.dim() > 1
        and not noise.is_nested
        and noise.is_contiguous()
        and tracing.is_eager()
    )


def euler(
    velocity: Callable[[Tensor, Tensor, int], Tensor],
    noise: Tensor,
    times: Tensor,
    dt: float,
    strength: Tensor | None = None,
) -> Tensor:
    """x' = x + dt * v(x, t, step) * strength, with a dt that is a Python number; the derivative in the grad mode.

    Args:
        velocity: Called with x, with t, [B] in the times' dtype, and with the number of the step.
        noise: [B, ...], as `is_plain` wants it. Not written.
        times: [N], what the velocity gets as time, on noise's device. Not written.
        dt: The step size.
        strength: None, or a contiguous tensor of noise's shape, dtype and device.
    """
    table = table_for(_request(len(times), dt, arithmetic_dtype(noise.dtype), noise.device), True)
    # A copy, which the velocity may write to; `repeat` takes twice as long.
    copied = times.unsqueeze(1).expand(-1, noise.shape[0]).clone(memory_format=torch.contiguous_format)
    at = enumerate(copied.unbind())

    def step_fn(x: Tensor, t: Tensor) -> Tensor:
        step, t = next(at)
        return velocity(x, t, step)

    rows, state, _ = solve(table, step_fn, noise, EXACT, torch.is_grad_enabled(), strength=strength)
    result: Tensor = rows.result(state)
    return result


@functools.lru_cache(maxsize=16)
def _request(steps: int, dt: float, dtype: torch.dtype, device: torch.device) -> Request:
    """What describes the table, whose own times nobody sees."""
    sizes = [dt] * steps
    grid = [float(k) for k in range(steps + 1)]
    return Request("euler", 0, dtype, device, 0, None, False, "uniform", (), torch.float32, grid, sizes)
