"""openpi: the sampling loop of its PyTorch models pi0 and pi0.5, replaced by one line.

    from flowmatch_kernels.integrations import openpi
    openpi.accelerate(policy)

openpi's loop runs t from 1 to 0 with dt = -1/N and adds dt to a float32 tensor on the device, whose value its `while`
reads before each step: a device synchronisation each. Here the same times are a grid that is known beforehand.

Source: github.com/Physical-Intelligence/openpi, src/openpi/models_pytorch/pi0_pytorch.py (15a9616).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import count
from ..flow_matching import FlowMatching
from ..step_functions import StepFunction
from .replacement import check_known

KNOWN = {"68148dc847d52b00": "5546575 (2025-08-28) to 15a9616 (2026-06-15)"}
"""The versions of `PI0Pytorch.sample_actions` that `accelerate` replaces: `fingerprint` to the commits of openpi."""

_BEFORE = "_sample_actions_before"


def time_grid(num_steps: int = 10) -> tuple[Tensor, Tensor]:
    """openpi's times and step sizes: t' = t + dt in float32, from 1, while t >= -dt/2, with dt = -1/N in float32.

    Args:
        num_steps: N, 1 or more. So many steps are taken, but where the sums err by half a step (not up to N = 5000).

    Returns:
        time_steps float32 [N + 1], of which the last is where the loop ends, about 0; and step_sizes float32 [N]. Both
        on the CPU, as `FlowMatching.sample` takes them.

    Raises:
        TypeError: num_steps is not an int.
        ValueError: num_steps is less than 1.

    Example:
        >>> from flowmatch_kernels import FlowMatching
        >>> from flowmatch_kernels.integrations import openpi
        >>> times, sizes = openpi.time_grid(10)
        >>> FlowMatching((50, 32)).sample(1, lambda x, t: -x, time_steps=times, step_sizes=sizes).shape
        torch.Size([1, 50, 32])
    """
    if count(num_steps, "num_steps") < 1:
        raise ValueError(f"num_steps must be 1 or more, got {num_steps}")
    times, sizes = _times(num_steps)
    return torch.tensor(times, dtype=torch.float32), torch.tensor(sizes, dtype=torch.float32)


@functools.lru_cache(maxsize=16)
def _times(num_steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """openpi's times and step sizes. A sum of two float32 in float64, rounded once, is their float32 sum."""
    dt = _float32(-1.0 / num_steps)
    times = [1.0]
    while times[-1] >= -dt / 2:
        times.append(_float32(times[-1] + dt))
    return tuple(times), (dt,) * (len(times) - 1)


# A compiler takes what it returns, and does not trace it. This is torch.compiler.assume_constant_result, without what
# that imports.
_times._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def accelerate(policy: Any, **options: Any) -> Any:
    """Replaces the sampling loop of an openpi policy or model by ours: the same actions, to the last bit.

    The model's `sample_actions` is replaced as a whole, on this instance. Its preparation (observation, prefix,
    key-value cache) is still openpi's own method, run for one step in whose place our loop stands. Where openpi
    compiled the method, ours is compiled with the same mode; the steps are unrolled then, so that compiling takes
    longer the more there are.

    Args:
        policy: An openpi `Policy` with a PyTorch model, or the `PI0Pytorch` itself. Changed in place.
        **options: Of `FlowMatching`, as int_method="ab2" or backend="cuda".

    Returns:
        The policy.

    Raises:
        TypeError: there is no PyTorch model with `sample_actions` and `denoise_step`.
        ValueError: an option has a value that cannot be used.
        RuntimeError: its `sample_actions` is a version that is not known here; the message names those that are.

    Example:
        >>> from flowmatch_kernels.integrations import openpi
        >>> openpi.accelerate(policy).infer(observation)["actions"]  # doctest: +SKIP
    """
    model = _model(policy)
    method = type(model).sample_actions
    check_known(type(model), "sample_actions", KNOWN, KNOWN.values(), "openpi's commits")
    sampler = FlowMatching((model.config.action_horizon, model.config.action_dim), **options)
    restore(policy)
    before = vars(model).get("sample_actions")
    sample_actions: Callable[..., Tensor] = _loop(model, method, sampler)
    if before is not None:  # compiled: openpi sets the attribute for that alone
        mode = getattr(model.config, "pytorch_compile_mode", None) or "max-autotune"
        sample_actions = torch.compile(sample_actions, mode=mode)
    vars(model)[_BEFORE] = before
    model.sample_actions = sample_actions
    if policy is not model:
        vars(policy)[_BEFORE] = policy._sample_actions
        policy._sample_actions = sample_actions
    return policy


def restore(policy: Any) -> Any:
    """Puts back the loop that `accelerate` replaced; nothing, where it replaced none.

    Args:
        policy: As for `accelerate`. Changed in place.

    Returns:
        The policy.

    Raises:
        TypeError: there is no PyTorch model with `sample_actions` and `denoise_step`.
    """
    model = _model(policy)
    if _BEFORE in vars(model):
        before = vars(model).pop(_BEFORE)
        del model.sample_actions
        if before is not None:
            model.sample_actions = before
    if policy is not model and _BEFORE in vars(policy):
        policy._sample_actions = vars(policy).pop(_BEFORE)
    return policy


class _Prepared:
    """The model as its own sample_actions sees it, with our loop in the place of the one denoise_step that it calls."""

    def __init__(self, model: nn.Module, sampler: FlowMatching, num_steps: int) -> None:
        self._model, self._sampler, self._num_steps = model, sampler, num_steps
        self.actions: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise_step(
        self, state: Tensor, prefix_pad_masks: Tensor, past_key_values: Any, x_t: Tensor, timestep: Tensor
    ) -> Tensor:
        denoise: Callable[..., Tensor] = self._model.denoise_step  # type: ignore[assignment]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return denoise(state, prefix_pad_masks, past_key_values, x, t)

        times, sizes = time_grid(self._num_steps)
        self.actions = self._sampler.sample(
            x_t.shape[0],
            StepFunction(velocity, time_as="batch"),
            x_t.device,
            noise=x_t,
            time_steps=times,
            step_sizes=sizes,
        )
        return x_t


def _loop(model: Any, method: Callable[..., Tensor], sampler: FlowMatching) -> Callable[..., Tensor]:
    @torch.no_grad()
    def sample_actions(device: Any, observation: Any, noise: Tensor | None = None, num_steps: int = 10) -> Tensor:
        """The actions, [B, action_horizon, action_dim]; see openpi's method of this name."""
        if noise is None:
            shape = (observation.state.shape[0], model.config.action_horizon, model.config.action_dim)
            noise = model.sample_noise(shape, device)
        prepared = _Prepared(model, sampler, num_steps)
        # With the noise given, the device is where openpi's method puts dt and t alone: on the CPU nothing waits.
        method(prepared, "cpu", observation, noise, 1)
        return prepared.actions

    return sample_actions


def _model(policy: Any) -> Any:
    """The PyTorch model of a policy, or the model itself.

    Raises:
        TypeError: there is none.
    """
    for model in (policy, getattr(policy, "_model", None)):
        if isinstance(model, nn.Module) and hasattr(type(model), "sample_actions") and hasattr(model, "denoise_step"):
            return model
    inner = getattr(policy, "_model", None)
    held = "" if inner is None else f", whose model is a {type(inner).__module__}.{type(inner).__qualname__}"
    raise TypeError(
        "wanted an openpi policy with a PyTorch model, or a PI0Pytorch, got a "
        f"{type(policy).__module__}.{type(policy).__qualname__}{held}"
    )
