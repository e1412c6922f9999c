"""diffusers: the flow-matching Euler scheduler with a fused step.

    from flowmatch_kernels.integrations.diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

Needs diffusers: `pip install flowmatch_kernels[diffusers]`.

Source: github.com/huggingface/diffusers, src/diffusers/schedulers/scheduling_flow_match_euler_discrete.py.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import tracing
from ..ops import dispatch
from ..ops.fused_step import COLUMNS, EXACT, FROM_UNGUIDED, ROUNDED, WEIGHTED, Operands
from ..rows import terms
from ..solvers import Table
from ..solvers.grid import Grid
from ..solvers.ode import solver
from ..solvers.table import build

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

    sigmas: Tensor
    timesteps: Tensor
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
        if self._fuses(timestep, per_token_timesteps, sample, model_output):
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
        if self._fuses(timestep, None, sample, conditional, unconditional):
            return self._fused(conditional, unconditional, float(guidance_scale), timestep, sample, return_dict)
        predicted = unconditional + guidance_scale * (conditional - unconditional)
        return self.step(predicted, timestep, sample, generator=generator, return_dict=return_dict)

    def _fuses(self, timestep: Any, per_token_timesteps: Any, sample: Any, *velocities: Any) -> bool:
        """Whether the fused step can take these arguments."""
        if per_token_timesteps is not None or _is_integer(timestep):
            return False
        if type(sample) is not Tensor or self.config.get("stochastic_sampling"):
            return False
        shape, device, differentiable = sample.shape, sample.device, torch.is_grad_enabled()
        for x in (sample, *velocities):  # a loop: all() of a generator takes three times as long
            if (
                type(x) is not Tensor
                or x.dtype not in _DTYPES
                or x.shape != shape
                or x.device != device
                or x.layout is not torch.strided
                or x.is_nested
                or (differentiable and x.requires_grad)
            ):
                return False
        one_dtype = len(velocities) == 1 or velocities[0].dtype is velocities[1].dtype
        if not (one_dtype and sample.is_contiguous() and self.sigmas.dtype is torch.float32):
            return False
        return not tracing.is_transforming()

    def _fused(
        self,
        v: Tensor,
        u: Tensor | None,
        guidance_scale: float | None,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool,
    ) -> Any:
        """One launch, and the index one further."""
        if self.step_index is None:
            self._init_step_index(timestep)
        out = self._launched(v, u, guidance_scale, sample)
        self._step_index += 1
        return _published.FlowMatchEulerDiscreteSchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _launched(self, v: Tensor, u: Tensor | None, guidance_scale: float | None, sample: Tensor) -> Tensor:
        """The next sample."""
        # A 0-dim dt on v's device is rounded to v's dtype; one on the CPU beside a GPU's v is a number.
        rounding = ROUNDED if self.sigmas.device == sample.device else EXACT
        guidance = WEIGHTED if u is None else FROM_UNGUIDED
        out = torch.empty_like(sample, dtype=v.dtype)
        nothing = (None, None, None)
        coefficients = self._coefficients(sample.device, guidance_scale)
        given = Operands(out, sample, v, u, *nothing, coefficients, self.step_index, rounding, guidance)
        if tracing.is_eager():
            dispatch.choose("auto", sample.device.type).load()(given)
        else:
            torch.ops.flowmatch_kernels.fused_step_(*given)
        return out

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


class FlowMatchSolverScheduler(FlowMatchEulerDiscreteScheduler):
    """Every solver of this package behind diffusers' scheduler interface, for pipelines that know Euler alone.

        pipe.scheduler = FlowMatchSolverScheduler.from_config(pipe.scheduler.config, int_method="ab3")

    Schedules, shifts and configuration are diffusers'. `timesteps` has an entry for each evaluation: with heun two for
    each step but the last, with rk4 four, with the others one. A solver that would evaluate at the end of the schedule
    takes an Euler step last, as diffusers' Heun does.

    The steps are taken in float32, and the result has the dtype of model_output. A start in the middle of the schedule
    (image to image) begins the solver anew there; ab3 cannot, as its first step evaluates twice.

    Args:
        int_method: The solver's name; see `flowmatch_kernels.solvers`.
        *arguments, **settings: As for diffusers' scheduler.

    Raises:
        ValueError: there is no such solver, or stochastic_sampling is on.
        TypeError: int_method is no name.

    Example:
        >>> from flowmatch_kernels.integrations.diffusers import FlowMatchSolverScheduler
        >>> scheduler = FlowMatchSolverScheduler(shift=3.0, int_method="ab2")
        >>> scheduler.set_timesteps(10)
        >>> x = torch.randn(1, 16, 32, 32)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(-x, t, x).prev_sample
    """

    def __init__(self, *arguments: Any, int_method: str = "ab2", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if not isinstance(int_method, str) or int_method.endswith(".json"):
            raise TypeError(
                f"int_method must be a solver's name, got {int_method!r:.60}: fitted solvers have own times"
            )
        solver(int_method)
        if self.config.get("stochastic_sampling"):
            raise ValueError("stochastic_sampling and a solver: use diffusers' FlowMatchEulerDiscreteScheduler")
        self.register_to_config(int_method=int_method)
        self._grid: Tensor | None = None  # the steps' sigmas; `sigmas` are the evaluations'
        self._table: Table | None = None  # from the first step that is taken on
        self._first = 0  # the evaluation that it begins with
        self._history: list[Tensor] = []
        self._guidance_scale: float | None = None  # that in its rows

    #: What from_config passes on: diffusers' own arguments, and ours.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(p for p in inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters.values()),
            inspect.Parameter("int_method", inspect.Parameter.KEYWORD_ONLY, default="ab2", annotation=str),
        ]
    )

    @classmethod
    def from_config(cls, config: Any = None, *arguments: Any, **settings: Any) -> Any:
        """As diffusers' method; of a UniPC or DPM-Solver++ scheduler's configuration, flow_shift is taken as the shift.

        Raises:
            ValueError: that configuration is not one for flow matching.
        """
        if isinstance(config, dict) and "flow_shift" in config and "shift" not in config:  # else it would be dropped
            if not config.get("use_flow_sigmas"):
                found = config.get("use_flow_sigmas")
                raise ValueError(f"wanted a configuration for flow matching, got one with use_flow_sigmas={found}")
            settings.setdefault("shift", config["flow_shift"])
            said = ("flow_shift", "use_flow_sigmas", "prediction_type")  # diffusers would warn that they are ignored
            config = {name: value for name, value in config.items() if name not in said}
        return super().from_config(config, *arguments, **settings)

    def set_timesteps(self, *arguments: Any, **keywords: Any) -> None:
        """Sets the schedule, as diffusers' scheduler: `sigmas` and `timesteps` for each evaluation."""
        super().set_timesteps(*arguments, **keywords)
        self._grid, self._table = self.sigmas, None
        table = self._whole = self._build(self._grid)
        self.order = max(1, round(len(table.evaluations) / max(table.steps, 1)))
        if len(table.evaluations) == table.steps:  # the schedule's own timesteps, which may be scaled otherwise
            return
        at = table.times[[evaluation.time for evaluation in table.evaluations]].to(self.sigmas.device)
        self.timesteps = at * self.config.num_train_timesteps
        self.sigmas = torch.cat([at, self._grid[-1:]])

    # Pipelines look whether it takes sigmas.
    set_timesteps.__signature__ = inspect.signature(  # type: ignore[attr-defined]
        FlowMatchEulerDiscreteScheduler.set_timesteps
    )

    def _fuses(self, timestep: Any, per_token_timesteps: Any, sample: Any, *velocities: Any) -> bool:
        """Whether one launch can take the velocities: always a single one, as there is no other step to hand on to.

        Raises:
            ValueError: set_timesteps was not called, timestep is an integer, or per_token_timesteps is given.
        """
        if self._grid is None:
            raise ValueError("call set_timesteps first")
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps and a solver: use FlowMatchEulerDiscreteScheduler")
        if _is_integer(timestep):
            raise ValueError(f"timestep must be an entry of timesteps, got the integer {timestep}")
        return len(velocities) == 1 or (velocities[0].dtype, velocities[0].shape) == (
            velocities[1].dtype,
            velocities[1].shape,
        )

    def _launched(self, v: Tensor, u: Tensor | None, guidance_scale: float | None, sample: Tensor) -> Tensor:
        """The state to evaluate at next.

        Raises:
            ValueError: the first step is not one at which the solver can start.
            TypeError: v is of a dtype wider than float32.
        """
        if self._table is None:
            self._table = self._start(sample.device)
        table, row = self._table, self.step_index - self._first
        evaluation = table.evaluations[row]
        sample = sample.to(torch.float32).contiguous()
        if row == 0 or table.evaluations[row - 1].commit:
            self._base = sample
        while len(self._history) < table.buffers:
            self._history.append(torch.empty_like(sample))
        if guidance_scale is not None and guidance_scale != self._guidance_scale:
            table.coefficients[:, COLUMNS.index("w1")] = self._guidance_scale = guidance_scale
        out = torch.empty_like(sample)
        torch.ops.flowmatch_kernels.fused_step_(
            *(out, self._base, v, u, *terms(self._history, evaluation.read), table.coefficients, row),
            guidance=WEIGHTED if u is None else FROM_UNGUIDED,
            history=None if evaluation.write is None else self._history[evaluation.write],
        )
        return out.to(v.dtype)

    def _build(self, grid: Tensor) -> Table:
        """The solver's rows on a grid of sigmas, on the host."""
        on_host = grid.cpu()
        noise_at = int(on_host[0] > on_host[-1])
        entries = tuple(on_host.tolist())

        def built(euler_at_final: bool) -> Table:
            cpu = torch.device("cpu")
            return build(
                *(self.config.int_method, Grid(on_host, entries), None, torch.float32, cpu, noise_at),
                euler_at_final=euler_at_final,
            )

        table = built(False)
        if any(evaluation.time == table.steps for evaluation in table.evaluations):
            table = built(True)
        return table

    def _start(self, device: torch.device) -> Table:
        """The table from the first step on, and no memory of another run."""
        assert self._grid is not None
        first, whole = self.step_index, self._whole
        if first and not whole.evaluations[first - 1].commit:
            raise ValueError(
                f"the first step is evaluation {first} of {len(whole.evaluations)}, which is within a step of "
                f"{self.config.int_method}: start at a multiple of {self.order}"
            )
        skipped = sum(evaluation.commit for evaluation in whole.evaluations[:first])
        table = self._build(self._grid[skipped:]) if skipped else whole
        if first + len(table.evaluations) != len(whole.evaluations):
            raise ValueError(
                f"{self.config.int_method} evaluates twice in its first step, for which a schedule that starts in the "
                "middle has no timestep: use ab2, dpmpp_2m, unipc or a solver of one step"
            )
        self._first, self._history, self._guidance_scale = first, [], None
        # A copy: the guidance scale is written to it.
        return table._replace(coefficients=table.coefficients.to(device, copy=True))
