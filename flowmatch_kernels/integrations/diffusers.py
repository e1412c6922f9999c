"""diffusers: the flow-matching Euler scheduler with a fused step.

    from flowmatch_kernels.integrations.diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

Needs diffusers: `pip install flowmatch_kernels[diffusers]`.

Source: github.com/huggingface/diffusers, src/diffusers/schedulers/scheduling_flow_match_euler_discrete.py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import tracing
from ..ops import dispatch
from ..ops.fused_step import COLUMNS, EXACT, FROM_UNGUIDED, ROUNDED, WEIGHTED, Operands

try:
    _published = importlib.import_module("diffusers.schedulers.scheduling_flow_match_euler_discrete")
except ImportError as error:
    raise ImportError(
        f"flowmatch_kernels.integrations.diffusers needs diffusers >= 0.29 ({error}): "
        "pip install flowmatch_kernels[diffusers]"
    ) from error

if TYPE_CHECKING:
    _Published = Any
else:
    _Published = _published.FlowMatchEulerDiscreteScheduler

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Rows(NamedTuple):
    """The rows of a schedule, one for each step."""

    sigmas: Tensor
    version: int
    guidance_scale: float | None
    coefficients: Tensor
    """float32, [N, 8], on the samples' device."""


class FlowMatchEulerDiscreteScheduler(_Published):
    """diffusers' scheduler of this name, its step in one launch, with the same bits.

    Everything but the step is inherited: schedules, shifts, configuration, `save_pretrained`. The step is

        dt = sigmas[i + 1] - sigmas[i]                                      in float32
        prev_sample = (float32(sample) + dt * model_output).to(model_output.dtype)

    where dt * model_output has the dtype of model_output, and dt is rounded to it first if the sigmas are on its
    device. Without a begin index theirs reads the first timestep from the GPU; this one reads none that is an entry of
    `timesteps`, as a pipeline passes it. Where a timestep occurs twice, that entry then counts, and not the second.

    diffusers' own step runs instead: with per_token_timesteps, with stochastic sampling, where a gradient is asked
    for, and for tensors other than dense ones of float32, bfloat16 and float16 of one shape on one device.

    Example:
        >>> from flowmatch_kernels.integrations.diffusers import FlowMatchEulerDiscreteScheduler
        >>> scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        >>> scheduler.set_timesteps(10)
        >>> x = torch.randn(1, 16, 32, 32)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(-x, t, x).prev_sample
    """

    _rows: _Rows | None = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample one step nearer to the data.

        Args:
            model_output: The velocity that the model predicts, [B, ...].
            timestep: The entry of `timesteps` that it was evaluated at.
            sample: [B, ...].
            s_churn, s_tmin, s_tmax, s_noise: As diffusers takes them: not used.
            generator: For stochastic sampling.
            per_token_timesteps: As in diffusers.
            return_dict: False: a tuple.

        Returns:
            A FlowMatchEulerDiscreteSchedulerOutput, or a tuple: prev_sample, [B, ...], in model_output's dtype.

        Raises:
            ValueError: timestep is an integer, as in diffusers.
        """
        if per_token_timesteps is None and self._fuses(sample, model_output) and not _is_integer(timestep):
            return self._fused(model_output, None, None, timestep, sample, return_dict)
        keywords = {} if per_token_timesteps is None else {"per_token_timesteps": per_token_timesteps}
        return super().step(
            *(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise),
            generator=generator,
            return_dict=return_dict,
            **keywords,
        )

    def step_guided(
        self,
        conditional: Tensor,
        unconditional: Tensor,
        guidance_scale: float,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Classifier-free guidance and the step, in one launch; the bits of the two usual lines.

            noise_pred = unconditional + guidance_scale * (conditional - unconditional)
            latents = scheduler.step(noise_pred, t, latents)

        Args:
            conditional, unconditional: The two velocities, [B, ...], of one dtype; as views of one tensor too.
            guidance_scale: A number.
            timestep, sample, generator, return_dict: As for `step`.

        Returns:
            As `step`.

        Raises:
            TypeError: guidance_scale is not a number.
            ValueError: timestep is an integer, as in diffusers.
        """
        if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, (int, float)):
            raise TypeError(f"guidance_scale must be a number, got {guidance_scale!r:.60}")
        if self._fuses(sample, conditional, unconditional) and not _is_integer(timestep):
            return self._fused(conditional, unconditional, float(guidance_scale), timestep, sample, return_dict)
        predicted = unconditional + guidance_scale * (conditional - unconditional)
        return self.step(predicted, timestep, sample, generator=generator, return_dict=return_dict)

    def _fuses(self, sample: Any, *velocities: Any) -> bool:
        """Whether the fused step can take these tensors."""
        if self.config.get("stochastic_sampling"):
            return False
        v = velocities[0]
        tensors = (sample, *velocities)
        return all(
            type(x) is Tensor
            and x.layout is torch.strided
            and not x.is_nested
            and x.dtype in _DTYPES
            and x.shape == sample.shape
            and x.device == sample.device
            and not tracing.has_derivative(x)
            for x in tensors
        ) and bool(
            sample.is_contiguous()
            and all(x.dtype is v.dtype for x in velocities)
            and self.sigmas.dtype is torch.float32
            and not tracing.is_transforming()
        )

    def _fused(
        self,
        v: Tensor,
        u: Tensor | None,
        guidance_scale: float | None,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool,
    ) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        row = self.step_index
        # A 0-dim dt on v's device is rounded to v's dtype; one on the CPU beside a GPU's v is a number.
        rounding = ROUNDED if self.sigmas.device == sample.device else EXACT
        guidance = WEIGHTED if u is None else FROM_UNGUIDED
        out = torch.empty_like(sample, dtype=v.dtype)
        nothing = (None, None, None)
        given = Operands(
            out, sample, v, u, *nothing, self._coefficients(sample.device, guidance_scale), row, rounding, guidance
        )
        if tracing.is_eager():
            dispatch.choose("auto", sample.device.type).load()(given)
        else:
            torch.ops.flowmatch_kernels.fused_step_(*given)
        self._step_index += 1
        return _published.FlowMatchEulerDiscreteSchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _coefficients(self, device: torch.device, guidance_scale: float | None) -> Tensor:
        """The rows of the schedule as it is now."""
        rows, sigmas = self._rows, self.sigmas
        if (
            rows is None
            or rows.sigmas is not sigmas
            or rows.version != sigmas._version
            or rows.coefficients.device != device
            or rows.guidance_scale != guidance_scale
        ):
            coefficients = torch.zeros(len(sigmas) - 1, len(COLUMNS), device=device)
            coefficients[:, COLUMNS.index("a")] = 1.0
            coefficients[:, COLUMNS.index("b0")] = sigmas.diff()
            if guidance_scale is not None:
                coefficients[:, COLUMNS.index("w1")] = guidance_scale
            rows = self._rows = _Rows(sigmas, sigmas._version, guidance_scale, coefficients)
        return rows.coefficients

    def _init_step_index(self, timestep: float | Tensor) -> None:
        timesteps = self.timesteps
        if (
            self.begin_index is None
            and type(timestep) is Tensor
            and timestep.dim() == 0
            and timestep.device.type not in ("cpu", "meta")
            and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        ):
            self._step_index = (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
        else:
            super()._init_step_index(timestep)


def _is_integer(timestep: object) -> bool:
    """Whether diffusers refuses it."""
    return isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point())
