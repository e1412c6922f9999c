"""Time grids: where a solver's steps begin and end, from the noise to the data.

A grid of N steps is a tensor [N + 1] on the CPU that nobody else holds, computed in float64 and rounded once. It is
strictly monotonic and its ends are exact: 0.0 to 1.0 with the noise at 0; 1.0 to 0.0 with the noise at 1, where its
entries are the noise levels sigma of SD3, Flux and Wan. The grid of 0 steps is the one entry at the noise. Every grid
takes `dtype`, which step_fn will see in t: None means torch's default.

To add one, write a function of the same form and enter it in `TIME_GRIDS`.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import count, end_of_time, number

TimeGrid = Callable[..., Tensor]
"""Called as (steps, *, noise_at=0, dtype=None, ...), with options of its own."""

# ---- the grids ----


def uniform(steps: int, *, noise_at: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """t_k = k/N, by torch.linspace in `dtype`: in float32 the published loop's grid.

    Args:
        steps: N, 0 or more.
        noise_at: The end of time at which the noise is: 0, or 1.
        dtype: Of the grid; None: torch's default.

    Returns:
        [N + 1], on the CPU.

    Raises:
        TypeError: steps is not an int.
        ValueError: steps is negative, or noise_at neither 0 nor 1.
    """
    n, end = count(steps, "steps"), end_of_time(noise_at)
    return torch.linspace(float(end), 1.0 - end, n + 1, dtype=dtype, device="cpu")


def shifted(steps: int, *, shift: float = 3.0, noise_at: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """sigma' = s*sigma / (1 + (s - 1)*sigma), so t' = t / (s - (s - 1)*t): s > 1 takes more steps near the noise.

    sigma = 1 - t is the noise level, uniform before the shift. The shift s is 3.0 in SD3, 5.0 (720p) or 3.0 (480p)
    in Wan 2.1, and exp(mu), with mu from the image's size, in Flux. With noise_at=1 these are the sigmas of diffusers'
    FlowMatchEulerDiscreteScheduler after set_timesteps(sigmas=linspace(1, 1/N, N)), to float32's rounding. Without
    sigmas= it takes others: for N = 28 its last before 0 is 0.009, here it is 0.1. Pass its own as time_steps.

    Args:
        steps: N, 0 or more.
        shift: s > 0; 1 is uniform, s < 1 takes more steps near the data.
        noise_at: The end of time at which the noise is: 0 gives t', 1 gives sigma'.
        dtype: Of the grid; None: torch's default.

    Returns:
        [N + 1], on the CPU.

    Raises:
        TypeError: steps is not an int, or shift not a number.
        ValueError: steps is negative, shift not above 0 and finite, noise_at neither 0 nor 1; or `dtype` cannot tell
            all entries apart.

    Example:
        >>> shifted(4, shift=3.0, dtype=torch.float64).tolist()
        [0.0, 0.1, 0.25, 0.5, 1.0]
        >>> shifted(4, shift=3.0, noise_at=1, dtype=torch.float64).tolist()
        [1.0, 0.9, 0.75, 0.5, 0.0]

    Source: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv 2403.03206, eq. 23, whose
        sqrt(m / n) is s.
    """
    n, end, s = count(steps, "steps"), end_of_time(noise_at), _positive(shift, "shift")

    def entry(k: int) -> float:
        data, noise = k, s * (n - k)
        return (noise if end else data) / (data + noise)

    return _grid(n, end, entry, dtype, f"shift={s}")


def cosine(steps: int, *, noise_at: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """t = 1 - cos(pi*u/2), sigma = cos(pi*u/2), u = k/N: more steps near the noise, where the first is 1.2/N^2.

    CosyVoice's grid, and F5-TTS's sway sampling, u + s*(cos(pi*u/2) - 1 + u), with its default coefficient s = -1.

    Args:
        steps: N, 0 or more.
        noise_at: The end of time at which the noise is: 0 gives t, 1 gives sigma.
        dtype: Of the grid; None: torch's default.

    Returns:
        [N + 1], on the CPU.

    Raises:
        TypeError: steps is not an int.
        ValueError: steps is negative, or noise_at neither 0 nor 1; or `dtype` cannot tell all entries apart.

    Sources: CosyVoice, arXiv 2407.05407. F5-TTS, arXiv 2410.06885.
    """
    n, end = count(steps, "steps"), end_of_time(noise_at)

    def entry(k: int) -> float:
        if end:
            return math.sin(math.pi * (n - k) / (2 * n))
        # 1 - cos in a form that loses no digits where it is small.
        return 2 * math.sin(math.pi * k / (4 * n)) ** 2

    return _grid(n, end, entry, dtype, "a cosine")


def power(steps: int, *, power: float = 2.0, noise_at: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """t = u^p, sigma = 1 - u^p, u = k/N: p > 1 takes more steps near the noise, p < 1 near the data.

    Args:
        steps: N, 0 or more.
        power: p > 0; 1 is uniform.
        noise_at: The end of time at which the noise is: 0 gives t, 1 gives sigma.
        dtype: Of the grid; None: torch's default.

    Returns:
        [N + 1], on the CPU.

    Raises:
        TypeError: steps is not an int, or power not a number.
        ValueError: steps is negative, power not above 0 and finite, noise_at neither 0 nor 1; or `dtype` cannot tell
            all entries apart.
    """
    n, end, p = count(steps, "steps"), end_of_time(noise_at), _positive(power, "power")

    def entry(k: int) -> float:
        t = (k / n) ** p
        return 1 - t if end else t

    return _grid(n, end, entry, dtype, f"power={p}")


TIME_GRIDS: dict[str, TimeGrid] = {grid.__name__: grid for grid in (uniform, shifted, cosine, power)}


def time_grid(name: str) -> TimeGrid:
    """The time grid of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in TIME_GRIDS:
        tensor = "; a tensor is passed to sample() as time_steps" if isinstance(name, Tensor) else ""
        raise ValueError(f"Invalid time grid: {name!s:.60} (known: {', '.join(TIME_GRIDS)}){tensor}")
    return TIME_GRIDS[name]


def options(name: str) -> tuple[str, ...]:
    """What the grid of that name takes beside steps, noise_at and dtype."""
    return tuple(p for p in inspect.signature(time_grid(name)).parameters if p not in ("steps", "noise_at", "dtype"))


# ---- what they share ----


def _grid(n: int, noise_at: int, entry: Callable[[int], float], dtype: torch.dtype | None, what: str) -> Tensor:
    """[n + 1]: exact ends, and between them entry(1) to entry(n - 1).

    Python's floats: libm gives an entry the same bits on every machine and at every place, torch's vectorised
    functions do not; and there is nothing here that tracing or a fake tensor would trip over.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    entries = [float(noise_at), *map(entry, range(1, n)), 1.0 - noise_at][: n + 1]
    up = entries if noise_at == 0 else entries[::-1]
    eps = torch.finfo(dtype).eps  # one or two steps of dtype; NaN fails too
    if not all(after - before > eps * after for before, after in itertools.pairwise(up)):
        raise ValueError(f"{what} puts entries of {n} steps so close together that {dtype} cannot tell them apart")
    return torch.tensor(entries, dtype=dtype, device="cpu")


def _positive(value: Any, name: str) -> float:
    positive = number(value, name)
    if not 0 < positive < math.inf:
        raise ValueError(f"{name} must be finite and greater than 0, got {positive}")
    return positive
