"""lerobot: the Euler loop that its policies pi0, pi05, smolvla and eo1 share, replaced by one line.

    from flowmatch_kernels.integrations import lerobot
    lerobot.patch()

`lerobot.policies.common.flow_matching.euler_integrate` is imported by name in each of those policies' modules; `patch`
replaces it in all of them, loaded or not.

Source: github.com/huggingface/lerobot, src/lerobot/policies/common/flow_matching.py (0.6.1, and 7427f31 with the hard
prefix of real-time chunking).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tracing
from ..flow_matching import FlowMatching
from ..step_functions import StepFunction
from .euler import euler, is_plain
from .replacement import Replacement, is_installed

MODULE = "lerobot.policies.common.flow_matching"
"""Where lerobot defines the function."""


def euler_integrate(
    denoise_fn: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    num_steps: int,
    *,
    rtc_processor: Any = None,
    rtc_enabled: bool = False,
    inference_delay: int | None = None,
    prev_chunk_left_over: Tensor | None = None,
    execution_horizon: int | None = None,
    hard_prefix: Tensor | None = None,
    hard_prefix_mask: Tensor | None = None,
) -> Tensor:
    """Integrates a velocity field from the noise at t = 1 to actions at t = 0 by Euler steps, as lerobot's function.

    The signature, the calls and the bits are lerobot's: with dt = -1 / num_steps, a Python float, step k is
    x' = x + dt * v(x, 1 + k * dt). Gradients follow the steps where grad mode is on.

    Args:
        denoise_fn: Called as denoise_fn(x, t) with x [B, ...] and t float32 [B], or [B, T] with a hard prefix; returns
            the velocity, in x's shape, in its dtype or a narrower one.
        noise: [B, T, A] or any [B, ...] of two dimensions or more; floating point. Not written.
        num_steps: Steps, 1 or more.
        rtc_processor: For real-time chunking: what has denoise_step(), track() and is_debug_enabled(). With debugging
            on, track(time=, x_t=, v_t=) is called after each step, also where rtc_enabled is False.
        rtc_enabled: Evaluate the velocity by rtc_processor.denoise_step().
        inference_delay, prev_chunk_left_over, execution_horizon: Handed on to rtc_processor.denoise_step().
        hard_prefix: The actions that are fixed; what expands to noise. They are put in place before the first step and
            after each, and their time is 0.
        hard_prefix_mask: bool, what expands to noise, [B, T, 1] or [B, T, A]: where hard_prefix is taken. Of its last
            dimension the first entry says whose time is 0.

    Returns:
        The actions, [B, ...], in noise's dtype.

    Raises:
        ValueError: hard_prefix is given without hard_prefix_mask, or the velocity has another shape or device.
        TypeError: the velocity is of a dtype wider than noise's, or no tensor.
        ZeroDivisionError: num_steps is 0.

    Example:
        >>> import torch
        >>> from flowmatch_kernels.integrations.lerobot import euler_integrate
        >>> euler_integrate(lambda x, t: x - 1, torch.randn(2, 50, 32), 10).shape
        torch.Size([2, 50, 32])
    """
    times, dt = _times(num_steps)
    clamp = None
    if hard_prefix is not None:
        if hard_prefix_mask is None:
            raise ValueError("hard_prefix_mask is required with hard_prefix: where the prefix is taken")
        prefix, mask = hard_prefix, hard_prefix_mask
        noise = torch.where(mask, prefix, noise)

        def clamp(x: Tensor, t: Tensor) -> Tensor:
            return torch.where(mask, prefix, x)

    v: Any = None

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        nonlocal v
        if hard_prefix_mask is not None and hard_prefix is not None:
            t = t[:, None].expand(-1, x.shape[1]).masked_fill(hard_prefix_mask[..., 0], 0.0)
        if rtc_enabled:
            v = rtc_processor.denoise_step(
                x_t=x,
                prev_chunk_left_over=prev_chunk_left_over,
                inference_delay=inference_delay,
                time=times[step],
                original_denoise_step_partial=lambda x: denoise_fn(x, t),
                execution_horizon=execution_horizon,
            )
        else:
            v = denoise_fn(x, t)
        return v

    def track(step: int, t: Tensor, x: Tensor) -> None:
        if rtc_processor.is_debug_enabled():
            rtc_processor.track(time=times[step], x_t=x, v_t=v)

    tracked = rtc_processor is not None and rtc_processor.is_debug_enabled()
    if clamp is None and not tracked and type(num_steps) is int and num_steps > 0 and is_plain(noise):
        return euler(velocity, noise, _times_on(num_steps, noise.device), dt)
    x = _sampler(tuple(noise.shape[1:])).sample(
        noise.shape[0],
        StepFunction(velocity, time_as="batch"),
        noise.device,
        noise=noise,
        time_steps=torch.tensor(times, dtype=torch.float32),
        step_sizes=[dt] * num_steps,
        step_rounding="exact",
        constraint=clamp,
        callback=track if tracked else None,
        differentiable=tracing.keeps_derivatives(),
    )
    return x.x if tracked else x


def _times(num_steps: int) -> tuple[list[float], float]:
    """The times, [N + 1], and the step size, as lerobot computes them."""
    dt = -1.0 / num_steps
    return [1.0 + step * dt for step in range(num_steps + 1)], dt


@functools.cache  # one that is dropped might be in use on a stream
def _times_on(num_steps: int, device: torch.device) -> Tensor:
    """Those that are evaluated at, [N]."""
    with torch.inference_mode(False):
        return torch.tensor(_times(num_steps)[0][:-1], dtype=torch.float32, device=device)


def _sampler(x_dims: tuple[int, ...]) -> FlowMatching:
    return FlowMatching(x_dims) if torch.compiler.is_compiling() else _kept_sampler(x_dims)


@functools.lru_cache(maxsize=16)
def _kept_sampler(x_dims: tuple[int, ...]) -> FlowMatching:
    return FlowMatching(x_dims)


def patch() -> Replacement:
    """Replaces lerobot's `euler_integrate` by ours, in the module that defines it and in each that imported it.

    Before that both are run on a small field, and must agree to the last bit.

    Returns:
        A `Replacement`: call its undo(), or use it in a with statement; `modules` names the modules.

    Raises:
        ImportError: lerobot is not installed, or is a version without that function.
        RuntimeError: the installed version computes something else, or takes other arguments.

    Example:
        >>> from flowmatch_kernels.integrations import lerobot
        >>> with lerobot.patch():  # doctest: +SKIP
        ...     action = policy.select_action(batch)
    """
    if not is_installed("lerobot"):
        raise ImportError("lerobot is not installed: pip install 'lerobot>=0.6.1'")
    try:
        module = importlib.import_module(MODULE)
        theirs = module.euler_integrate
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not MODULE.startswith(error.name or "-"):
            raise
        raise ImportError(
            f"lerobot {_version()} has no {MODULE}.euler_integrate: lerobot 0.6.1 has it, and older versions have a "
            "loop in each policy"
        ) from None
    if theirs is not euler_integrate:
        _check(theirs)
    return Replacement().replace(module, "euler_integrate", euler_integrate)


def _version() -> str:
    try:
        return importlib.metadata.version("lerobot")
    except importlib.metadata.PackageNotFoundError:
        return "(of unknown version)"


def _check(theirs: Callable[..., Tensor]) -> None:
    """Raises where a lerobot's function is not what ours replaces."""
    unknown = set(inspect.signature(theirs).parameters) - set(inspect.signature(euler_integrate).parameters)
    if unknown:
        raise RuntimeError(
            f"euler_integrate of lerobot {_version()} takes {', '.join(sorted(unknown))}: not known here"
        )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 5, 3, generator=generator)
    prefix = torch.randn(2, 5, 3, generator=generator)
    mask = torch.arange(5).view(1, 5, 1).expand(2, 5, 1) < 2
    settings: list[dict[str, Any]] = [{}]
    if "hard_prefix" in inspect.signature(theirs).parameters:
        settings.append({"hard_prefix": prefix, "hard_prefix_mask": mask})
    for keywords in settings:
        if not torch.equal(*(integrate(_field, noise, 7, **keywords) for integrate in (theirs, euler_integrate))):
            raise RuntimeError(
                f"euler_integrate of lerobot {_version()} computes something else than ours: this version is not known"
            )


def _field(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x) + (t.unsqueeze(-1) if t.dim() == 2 else t[:, None, None]) * x
