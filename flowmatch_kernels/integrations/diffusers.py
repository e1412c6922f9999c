"""diffusers: the flow-matching Euler scheduler with a fused step.

    from flowmatch_kernels.integrations.diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

Needs diffusers: `pip install flowmatch_kernels[diffusers]`.

Source: github.com/huggingface/diffusers, src/diffusers/schedulers/scheduling_flow_match_euler_discrete.py.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import tracing
from ..ops import dispatch
from ..ops.fused_step import COLUMNS, EXACT, FROM_UNGUIDED, ROUNDED, WEIGHTED, Operands, dense
from ..rows import ordinary, terms
from ..solvers import Evaluation, FittedSolver, Grid, IntMethod, Table, build, check_finite, loaded, of_the_ode, titled
from .replacement import needed

_published = needed("diffusers.schedulers.scheduling_flow_match_euler_discrete", "diffusers", ">= 0.32")


def _check_version(scheduler: type) -> None:
    """Raises ImportError for diffusers' scheduler of a version with other steps (0.29) or fewer settings."""
    if "invert_sigmas" not in inspect.signature(scheduler.__init__).parameters:  # type: ignore[misc]
        version = importlib.import_module("diffusers").__version__
        raise ImportError(
            f"flowmatch_kernels.integrations.diffusers needs diffusers >= 0.32, and {version} is installed: "
            "pip install flowmatch_kernels[diffusers]"
        )


_check_version(_published.FlowMatchEulerDiscreteScheduler)

if TYPE_CHECKING:
    _Published = Any
else:
    _Published = _published.FlowMatchEulerDiscreteScheduler

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Plan(NamedTuple):
    """How the steps of a schedule are launched, and what that holds for."""

    sigmas: Tensor
    version: int
    device: torch.device
    guidance_scale: float | None
    backend: str | None
    """What `use_backend` says."""
    coefficients: Tensor
    """float32, [N, 8], a row for each step, on the samples' device."""
    rounding: int
    launch: Callable[[Operands], None]


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

    timesteps: Tensor
    _plan: _Plan | None = None
    _sigmas: Tensor

    @property
    def sigmas(self) -> Tensor:
        """The schedule. Of a tensor made under inference mode a copy, whose version counter shows later writes."""
        sigmas = self._sigmas
        if torch.compiler.is_compiling() or not sigmas.is_inference():
            return sigmas
        self.sigmas = sigmas  # deepcopy and pickle set it without the setter
        return self._sigmas

    @sigmas.setter
    def sigmas(self, sigmas: Tensor) -> None:
        sigmas = sigmas if isinstance(sigmas, Tensor) else torch.as_tensor(sigmas)
        if sigmas.is_inference():
            with ordinary():
                sigmas = sigmas.clone()
        self._sigmas = sigmas

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

    def _fuses(self, timestep: Any, per_token_timesteps: Any, sample: Any, v: Any, u: Any = None) -> bool:
        """Whether the fused step can take these arguments."""
        return (
            per_token_timesteps is None
            and not _is_integer(timestep)
            and not self.config.get("stochastic_sampling")
            and _are_plain(sample, v, u)
            and sample.is_contiguous()
            and (torch.compiler.is_compiling() or not (sample.is_neg() or sample._is_zerotensor()))  # Dynamo cannot ask
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
        """One launch, and the index one further.

        Raises:
            IndexError: the schedule has no such step.
        """
        if self._step_index is None:
            self._init_step_index(timestep)
        steps = len(self._sigmas) - 1
        if not 0 <= self._step_index < steps:
            raise IndexError(
                f"step {self._step_index} of a schedule of {steps}: call set_timesteps before each run, "
                "and set_begin_index with one of its steps"
            )
        out = self._launched(v, u, guidance_scale, sample)
        self._step_index += 1
        return _published.FlowMatchEulerDiscreteSchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _launched(self, v: Tensor, u: Tensor | None, guidance_scale: float | None, sample: Tensor) -> Tensor:
        """The next sample."""
        plan, sigmas = self._plan, self._sigmas
        if (
            plan is None
            or plan.sigmas is not sigmas
            or plan.version != sigmas._version
            or plan.device != sample.device
            or plan.guidance_scale != guidance_scale
            or plan.backend != dispatch.override()
        ):
            plan = self._plan = self._planned(sample.device, guidance_scale)
        out = torch.empty_like(sample, dtype=v.dtype)
        guidance = WEIGHTED if u is None else FROM_UNGUIDED
        row, rounding = self._step_index, plan.rounding
        _run(plan.launch, Operands(out, sample, v, u, None, None, None, plan.coefficients, row, rounding, guidance))
        return out

    def _planned(self, device: torch.device, guidance_scale: float | None) -> _Plan:
        """The rows of the schedule as it is now."""
        sigmas, before = self.sigmas, self._plan
        if before is not None and before.device == device and len(before.coefficients) == len(sigmas) - 1:
            coefficients = before.coefficients.clone()  # the same, but for what follows
        else:
            coefficients = torch.zeros(len(sigmas) - 1, len(COLUMNS), device=device)
            coefficients.select(1, COLUMNS.index("a")).fill_(1.0)
        coefficients.select(1, COLUMNS.index("b0")).copy_(sigmas.diff())
        if guidance_scale is not None:
            coefficients.select(1, COLUMNS.index("w1")).fill_(guidance_scale)
        # A 0-dim dt on v's device is rounded to v's dtype; one on the CPU beside a GPU's v is a number.
        rounding = ROUNDED if sigmas.device == device else EXACT
        launch = dispatch.choose("auto", device.type).load()
        override = dispatch.override()
        return _Plan(sigmas, sigmas._version, device, guidance_scale, override, coefficients, rounding, launch)

    def _init_step_index(self, timestep: float | Tensor) -> None:
        timesteps = self.timesteps
        if (
            type(timestep) is Tensor
            and not timestep.is_cpu
            and not timestep.is_meta
            and timestep.dim() == 0
            and self.begin_index is None
            and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        ):
            self._step_index = (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
        else:
            super()._init_step_index(timestep)


def _are_plain(sample: Any, v: Any, u: Any) -> bool:
    """Whether the fused step can read these tensors as they are; of the sample, whether its memory holds it aside."""
    if type(sample) is not Tensor:
        return False
    shape, device = sample.shape, sample.device
    for x in (sample, v) if u is None else (sample, v, u):  # a loop: all() of a generator takes three times as long
        if (
            type(x) is not Tensor
            or x.dtype not in _DTYPES
            or x.shape != shape
            or x.device != device
            or x.layout is not torch.strided
            or x.is_nested
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return False
    return u is None or u.dtype is v.dtype


def _run(launch: Callable[[Operands], None], operands: Operands) -> None:
    """One fused step: by the backend itself, or by the registered op where something watches."""
    if tracing.is_eager():
        launch(operands)
    else:
        torch.ops.flowmatch_kernels.fused_step_(*operands)


def _is_integer(timestep: object) -> bool:
    """Whether diffusers refuses it."""
    return isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point())


class FlowMatchSolverScheduler(FlowMatchEulerDiscreteScheduler):
    """Every solver of this package behind diffusers' scheduler interface, for pipelines that know Euler alone.

        pipe.scheduler = FlowMatchSolverScheduler.from_config(pipe.scheduler.config, int_method="ab3")

    Schedules, shifts and configuration are diffusers'. `timesteps` has an entry for each evaluation: with heun two for
    each step but the last, with rk4 four, with the others one, and with ab3 one more. A solver that would evaluate at
    the end of the schedule takes an Euler step last, as diffusers' Heun does.

    A fitted solver brings its own times, in place of those that `set_timesteps` computes or is given; their number must
    be that of its evaluations. It must have been fitted with noise_at=1, as sigmas are, or with invert_sigmas
    noise_at=0. `save_pretrained` writes it into the configuration as a whole.

    The steps are taken in float32, and the result has the dtype of model_output. A start in the middle of the schedule
    (image to image) begins the solver anew on the rest of it. ab3 then begins with Euler, for its Heun needs an
    evaluation for which that schedule has no timestep. A fitted solver starts in the middle only where no row from
    there on reads an earlier velocity.

    Args:
        int_method: The solver: a name (see `flowmatch_kernels.solvers`), a `FittedSolver`, its `to_dict()`, or the path
            of its file, which ends in .json.
        use_flow_sigmas: Take the schedule of diffusers' UniPCMultistepScheduler, that of Wan's pipelines:
            linspace(1, 1 / num_train_timesteps, N + 1)[:-1], shifted, the first less 1e-6 where it is 1, then 0. Its
            timesteps are whole numbers. It is a setting of that scheduler too, and `from_config` takes it over.
        *arguments, **settings: As for diffusers' scheduler.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no such solver, the file or dict holds none, stochastic_sampling is on, or use_flow_sigmas
            and invert_sigmas are.

    Example:
        >>> from flowmatch_kernels.integrations.diffusers import FlowMatchSolverScheduler
        >>> scheduler = FlowMatchSolverScheduler(shift=3.0, int_method="ab2")
        >>> scheduler.set_timesteps(10)
        >>> x = torch.randn(1, 16, 32, 32)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(-x, t, x).prev_sample
    """

    def __init__(
        self, *arguments: Any, int_method: Any = "ab2", use_flow_sigmas: bool = False, **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        saved = isinstance(int_method, Mapping)
        self._solver = FittedSolver.from_dict(int_method) if saved else of_the_ode(loaded(int_method))
        if self.config.get("stochastic_sampling"):
            raise ValueError("stochastic_sampling and a solver: use diffusers' FlowMatchEulerDiscreteScheduler")
        if use_flow_sigmas and self.config.invert_sigmas:
            raise ValueError("use_flow_sigmas and invert_sigmas: diffusers' UniPC has no inverted sigmas")
        written = self._solver.to_dict() if isinstance(self._solver, FittedSolver) else self._solver
        self.register_to_config(int_method=written, use_flow_sigmas=use_flow_sigmas)
        self._grid: Tensor | None = None  # the steps' sigmas; `sigmas` are the evaluations'
        self._seen: tuple[Tensor, int] | None = None  # `sigmas` as they were last looked at, and their version
        self._values: Tensor | None = None  # those that the rows were made of, on the host
        self._whole: Table | None = None  # the solver's rows on them
        self._table: Table | None = None  # those from the first step that is taken on
        self._first = 0  # the evaluation that it begins with
        self._history: list[Tensor] = []
        self._guidance_scale: float | None = None  # that in its rows

    #: What from_config passes on: diffusers' own arguments, and ours.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(p for p in inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters.values()),
            inspect.Parameter("int_method", inspect.Parameter.KEYWORD_ONLY, default="ab2", annotation=IntMethod),
            inspect.Parameter("use_flow_sigmas", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),
        ]
    )

    @classmethod
    def from_config(cls, config: Any = None, *arguments: Any, **settings: Any) -> Any:
        """As diffusers' method; of a UniPC or DPM-Solver++ scheduler's configuration, flow_shift is taken as the shift.

        Raises:
            ValueError: that configuration is not one for flow matching, or does not end at 0.
        """
        if isinstance(config, dict) and "flow_shift" in config and "shift" not in config:  # else it would be dropped
            found = {"final_sigmas_type": "zero"} | config
            for name, wanted in (("use_flow_sigmas", True), ("final_sigmas_type", "zero")):
                if found.get(name) != wanted:
                    raise ValueError(f"wanted a configuration for flow matching, got one with {name}={found.get(name)}")
            settings.setdefault("shift", config["flow_shift"])
            said = ("flow_shift", "prediction_type")  # diffusers would warn that they are ignored
            config = {name: value for name, value in config.items() if name not in said}
        return super().from_config(config, *arguments, **settings)

    def set_timesteps(self, *arguments: Any, **keywords: Any) -> None:
        """Sets the schedule, as diffusers' scheduler: `sigmas` and `timesteps` for each evaluation.

        Raises:
            ValueError: a fitted solver has another number of evaluations, or was fitted from the other end of time; or
                the solver cannot use the sigmas.
        """
        if self.config.use_flow_sigmas:
            self._set_flow_sigmas(*arguments, **keywords)
        else:
            super().set_timesteps(*arguments, **keywords)
        if isinstance(self._solver, FittedSolver):
            self._set_fitted_times(self._solver)
        self._grid, self._table = self.sigmas, None
        table = self._whole = self._build(self._grid)
        check_finite(table, self._solver, self._noise_at)
        self.order = max(1, round(len(table.evaluations) / max(table.steps, 1)))
        if len(table.evaluations) != table.steps:  # else the schedule's own timesteps, which may be scaled otherwise
            at = table.times[[evaluation.time for evaluation in table.evaluations]].to(self.sigmas.device)
            self.timesteps = at * self.config.num_train_timesteps
            self.sigmas = torch.cat([at, self._grid[-1:]])
        self._keep_sigmas()

    # Pipelines look whether it takes sigmas.
    set_timesteps.__signature__ = inspect.signature(  # type: ignore[attr-defined]
        FlowMatchEulerDiscreteScheduler.set_timesteps
    )

    def _set_flow_sigmas(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **keywords: Any
    ) -> None:
        """The schedule of diffusers' UniPC."""
        published = importlib.import_module("diffusers").UniPCMultistepScheduler
        known = inspect.signature(published.__init__).parameters
        settings = {name: value for name, value in self.config.items() if name in known}
        settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": self.shift}
        scheduler = published(**settings)
        if sigmas is not None:
            keywords["sigmas"] = torch.as_tensor(sigmas, dtype=torch.float64).numpy(force=True).copy()
        scheduler.set_timesteps(num_inference_steps, device=device, **keywords)
        self.num_inference_steps = scheduler.num_inference_steps
        self.sigmas = scheduler.sigmas.to(torch.float32).to(scheduler.timesteps.device)
        self.timesteps = scheduler.timesteps.to(torch.float32)
        self._step_index = self._begin_index = None

    def _set_fitted_times(self, fitted: FittedSolver) -> None:
        """A fitted solver's times in place of the schedule's."""
        steps = len(self.sigmas) - 1
        if steps != fitted.evaluations:
            raise ValueError(
                f"wanted {steps} steps, and the fitted solver has {fitted.evaluations} evaluations: pass "
                f"num_inference_steps={fitted.evaluations}, or fit a solver to {steps}"
            )
        if fitted.noise_at != self._noise_at:
            raise ValueError(
                f"the noise is at sigma {self._noise_at}, and the solver was fitted with noise_at={fitted.noise_at}: "
                f"fit it with FlowMatching(noise_at={self._noise_at})"
            )
        self.sigmas = fitted.grid(torch.float32).to(self.sigmas.device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

    @property
    def _noise_at(self) -> int:
        return 0 if self.config.invert_sigmas else 1

    def _fuses(self, timestep: Any, per_token_timesteps: Any, sample: Any, v: Any, u: Any = None) -> bool:
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
        return u is None or (v.dtype, v.shape) == (u.dtype, u.shape)

    def _launched(self, v: Tensor, u: Tensor | None, guidance_scale: float | None, sample: Tensor) -> Tensor:
        """The state to evaluate at next.

        Raises:
            ValueError: the first step is not one at which the solver can start, or sigmas have changed.
            TypeError: v is of a dtype wider than float32.
        """
        sigmas = self.sigmas
        if self._seen is None or self._seen[0] is not sigmas or self._seen[1] != sigmas._version:
            self._follow_sigmas()
        if self._table is None:
            self._table = self._start(sample.device)
        table, row = self._table, self._step_index - self._first
        if row < 0:  # the solver starts at the next evaluation, which is at the same sigma
            return sample.to(v.dtype)
        evaluation = table.evaluations[row]
        sample = dense(sample.to(torch.float32))
        if row == 0 or table.evaluations[row - 1].commit:
            self._base = sample
        with ordinary():
            while len(self._history) < table.buffers:
                self._history.append(torch.empty_like(sample))
        if guidance_scale is not None and guidance_scale != self._guidance_scale:
            table.coefficients[:, COLUMNS.index("w1")] = self._guidance_scale = guidance_scale
        out = torch.empty_like(sample)
        h1, h2, h3 = terms(self._history, evaluation.read)
        guidance = WEIGHTED if u is None else FROM_UNGUIDED
        history = None if evaluation.write is None else self._history[evaluation.write]
        operands = Operands(
            out, self._base, v, u, h1, h2, h3, table.coefficients, row, guidance=guidance, history=history
        )
        if _are_plain(self._base, v, u):
            _run(self._launch, operands)
        else:
            torch.ops.flowmatch_kernels.fused_step_(*operands)  # which says what is wrong with them
        return out.to(v.dtype)

    def _keep_sigmas(self) -> None:
        self._seen = self.sigmas, self.sigmas._version
        self._values = self.sigmas.cpu().clone()

    def _follow_sigmas(self) -> None:
        """Takes sigmas that were written after set_timesteps, as Cosmos pipelines write the last one.

        Raises:
            ValueError: a step was taken with the others, the solver evaluates more than once a step, or it brings its
                own times.
        """
        assert self._values is not None and self._whole is not None
        if not torch.equal(self._values, self.sigmas.cpu()):
            one_a_step = len(self._whole.evaluations) == self._whole.steps
            if self._table is not None or not one_a_step or isinstance(self._solver, FittedSolver):
                raise ValueError(
                    "sigmas were changed after set_timesteps, which makes the solver's rows: pass them to set_timesteps"
                )
            self._grid = self.sigmas
            self._whole = self._build(self._grid)
            check_finite(self._whole, self._solver, self._noise_at)
        self._keep_sigmas()

    def _build(self, grid: Tensor, euler_at_start: bool = False) -> Table:
        """The solver's rows on a grid of sigmas, on the host."""
        on_host, solver = grid.cpu(), self._solver
        entries = solver.times if isinstance(solver, FittedSolver) else tuple(on_host.tolist())
        given = (Grid(on_host, entries), None, torch.float32, torch.device("cpu"), self._noise_at)
        table = build(solver, *given, euler_at_start=euler_at_start)
        if any(evaluation.time == table.steps for evaluation in table.evaluations):
            table = build(solver, *given, euler_at_start=euler_at_start, euler_at_final=True)
        return table

    def _start(self, device: torch.device) -> Table:
        """The table from the first step on, and no memory of another run."""
        assert self._grid is not None and self._whole is not None
        table, first = self._whole, int(self._step_index)
        evaluations = table.evaluations
        while first and not evaluations[first - 1].commit:
            if evaluations[first].time != evaluations[first + 1].time:
                raise ValueError(
                    f"the first step is evaluation {first} of {len(evaluations)}, which is within a step of "
                    f"{titled(self._solver)}: start at a multiple of {self.order}"
                )
            first += 1  # the end of a step, where the next begins
        if isinstance(self._solver, FittedSolver):
            self._first = 0
            if first and (missing := _missing(evaluations, first)) is not None:
                raise ValueError(
                    f"evaluation {missing} of the fitted solver reads velocities from before evaluation {first}, where "
                    "this run starts: start it at 0, or use a solver with a name"
                )
        elif first:
            self._first, rest = first, self._grid[sum(evaluation.commit for evaluation in evaluations[:first]) :]
            table = self._build(rest)
            if first + len(table.evaluations) != len(evaluations):
                table = self._build(rest, euler_at_start=True)
        else:
            self._first = 0
        self._history, self._guidance_scale = [], None
        self._launch = dispatch.choose("auto", device.type).load()
        with ordinary():  # a copy: the guidance scale is written to it
            return table._replace(coefficients=table.coefficients.to(device, copy=True))


def _missing(evaluations: Sequence[Evaluation], first: int) -> int | None:
    """The first evaluation that reads what none from `first` on has written."""
    written: set[int] = set()
    for k, evaluation in enumerate(evaluations[first:], start=first):
        if not written.issuperset(evaluation.read):
            return k
        if evaluation.write is not None:
            written.add(evaluation.write)
    return None
