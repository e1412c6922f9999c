"""`FlowMatching`: the sampler that users call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import sub
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import fitting, guidance, layouts, solver_comparison, solvers, time_grids, tracing
from . import noise as noises
from .arguments import (
    LARGEST,
    available_device,
    count,
    end_of_time,
    finite,
    flag,
    held,
    keeps_derivative,
    own_dims,
    own_sizes,
    refuse_derivative,
    share,
    shown,
    strength,
    unread,
)
from .base import BaseDiffusion, StepFn
from .guidance import Weight
from .hooks import Hooks, hooks_of
from .log_probs import LogProbs, step_log_prob
from .noise import KeyedNoise
from .ops import dispatch
from .ops.fused_step import EXACT, PROMOTE, ROUNDED, WEIGHTED, arithmetic_dtype
from .progress import bar as progress_bar
from .rows import Setting, rows_for
from .sampling import integrate, noisy
from .solver_comparison import SolverComparison
from .solvers import FittedSolver, IntMethod, StochasticSolver, Table
from .step_functions import Bound, StepFunction, bound, timed
from .training import TIME_SAMPLERS, check_data, check_time_sampler, mean_squared_error
from .velocities import Guidance, Velocities, model

if TYPE_CHECKING:
    from .graphs import GraphedSampler


class Sample(NamedTuple):
    """What sample() returns where a callback was given, which may have stopped it."""

    x: Tensor
    """[B, *x_dims]; with return_all_steps, the states so far, [B, steps taken + 1, *x_dims]."""
    time_steps: Tensor
    """[steps taken + 1]: the time grid as far as it came; x, or its last state, stands at the last entry. With times of
    each sample or token, [B, steps taken + 1] or [B, L, steps taken + 1]."""
    stopped: bool
    """The callback returned True, and steps were left out."""


class FlowMatching(BaseDiffusion):
    r"""Flow matching: learns a velocity field v(x, t), samples by integrating dx/dt = v.

    Time runs from noise at t = 0 to data at t = 1, or the other way round with noise_at=1. One Euler step is
    x' = x + dt * v(x, t), and every backend gives the bits of the eager PyTorch loop.

    Args:
        x_dims: The shape of one sample: an int or a sequence of ints.
        int_method: The solver: a name (see `flowmatch_kernels.solvers`), a `FittedSolver`, or the path of its file,
            which ends in .json. A fitted solver brings its own times.
        num_inference_steps: Steps on the time grid; 0 returns the noise. None: 10, or those of a fitted solver.
        int_method_options: What a stochastic solver takes ("sde", "cps", "dance", "renoise"; see
            `flowmatch_kernels.solvers.stochastic`), as {"eta": 0.7}.
        train_timestep_sampler: How training draws its times: "beta" (t = 0.999 - 0.999 * Beta(1.5, 1), as in pi-zero,
            arXiv 2410.24164), "uniform", "logit_normal" or "cosine" (as in SD3; see `flowmatch_kernels.training`).
        train_ignore_guidance_rate: How often training drops the condition, where train_drop_guidance is True: between
            0 and 1.
        inference_guidance_weight: w in v = (1 - w) * v_unguided + w * v_guided, or the weight of another form: one
            for all steps, one for each, or a function of t (a float, at each evaluation). Finite.
        use_classifier_free_guidance: Sample with guidance by default.
        guidance_form: "interpolate" (as above), "from_unguided", "from_guided" or "extrapolate"; see
            `flowmatch_kernels.guidance`.
        time_grid: "uniform", "shifted", "cosine" or "power" (see `flowmatch_kernels.time_grids`), or a function
            that takes the number of steps N and returns [N + 1] times.
        time_grid_options: What the grid takes beside N, as {"shift": 5.0}.
        prediction_type: What step_fn returns: the "velocity", the "data" x1, or the "noise" x0. Of the straight
            path x = (1 - t)*x0 + t*x1, v = (x1 - x) / (1 - t) = (x - x0) / t; folded into the table. At that end
            itself a prediction has no velocity: "noise" needs time_steps that start after it, and "data" a solver
            that does not evaluate at a step's end (not heun, rk4, rk4_classic or ab3), or time_steps that stop before.
        noise_at: The end of time at which the noise is: 0, or 1, where a grid with a name runs from 1 to 0.
        euler_at_final: Make the last step Euler's. heun, rk4 and rk4_classic (and ab3, in one step alone) evaluate at
            the end of time, where a velocity that divides by 1 - t has no value; so the last step, and only it, does
            not. A fitted solver evaluates at no end.
        train_drop_guidance: `construct_training_data` draws which conditions to drop, as "is_drop_guidance". False:
            it draws none, as Alpamayo R1 and 2 do, whatever use_classifier_free_guidance is.
        step_rounding: What dt * v is rounded to where v has 16 bits and the state more. "promote": to the state's
            dtype, as PyTorch multiplies a dt that has dimensions, [1, 1, 1] (Alpamayo). "exact": to v's, as with a dt
            that is a Python number (lerobot, GR00T). "rounded": to v's, dt rounded to it first, as with a dt that is a
            0-dim tensor on v's device (diffusers). In a 16-bit state "promote" is "exact".
        backend: "auto", "triton", "cuda", "cpu" or "reference".

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value that cannot be used, or names something unknown.

    Example:
        >>> import torch
        >>> from flowmatch_kernels import FlowMatching
        >>> fm = FlowMatching(x_dims=(64, 2))
        >>> fm.sample(6, lambda x, t: (1 - t) - x).shape
        torch.Size([6, 64, 2])

    Sources:
        Flow Matching for Generative Modeling, arXiv 2210.02747, eq. 1 and 23.
        Guided Flows for Generative Modeling and Decision Making, arXiv 2311.13443, eq. 6.
    """

    def __init__(
        self,
        x_dims: int | Sequence[int],
        int_method: IntMethod = "euler",
        num_inference_steps: int | None = None,
        *,
        int_method_options: Mapping[str, float] | None = None,
        train_timestep_sampler: str = "beta",
        train_ignore_guidance_rate: float = 0.1,
        inference_guidance_weight: float | Sequence[float] | Callable[[float], float] = 1.0,
        use_classifier_free_guidance: bool = False,
        guidance_form: str = "interpolate",
        time_grid: str | Callable[[int], Tensor] = "uniform",
        time_grid_options: Mapping[str, float] | None = None,
        prediction_type: str = "velocity",
        noise_at: int = 0,
        euler_at_final: bool = False,
        train_drop_guidance: bool = False,
        step_rounding: str = "promote",
        backend: str = "auto",
    ) -> None:
        super().__init__(x_dims)
        if prediction_type not in ("velocity", "data", "noise"):
            raise ValueError(f"prediction_type must be 'velocity', 'data' or 'noise', got {prediction_type!r}")
        self.prediction_type = prediction_type
        self.noise_at = end_of_time(noise_at)
        self.int_method = solvers.loaded(int_method, int_method_options)
        self.euler_at_final = flag(euler_at_final, "euler_at_final")
        if num_inference_steps is None:
            num_inference_steps = self.int_method.evaluations if isinstance(self.int_method, FittedSolver) else 10
        self.num_inference_steps = count(num_inference_steps, "num_inference_steps")
        self._steps(None, None)
        self.train_timestep_sampler = check_time_sampler(train_timestep_sampler)
        self.train_ignore_guidance_rate = share(train_ignore_guidance_rate, "train_ignore_guidance_rate")
        guidance.checked(inference_guidance_weight)
        self.train_drop_guidance = flag(train_drop_guidance, "train_drop_guidance")
        self.inference_guidance_weight = inference_guidance_weight
        self.use_classifier_free_guidance = flag(use_classifier_free_guidance, "use_classifier_free_guidance")
        guidance.form(guidance_form)
        self.guidance_form = guidance_form
        self.time_grid = time_grid
        if not isinstance(time_grid_options, (Mapping, type(None))):
            raise TypeError(f"time_grid_options must be a dict, got {time_grid_options!r:.60}")
        self.time_grid_options = {name: finite(option, name) for name, option in (time_grid_options or {}).items()}
        if not callable(time_grid):
            known = time_grids.options(time_grid)
            if unknown := [name for name in self.time_grid_options if name not in known]:
                wanted = " and ".join(known) or "no options"
                raise TypeError(f"time_grid {time_grid!r} takes {wanted}, got {', '.join(map(repr, unknown))}")
            time_grids.time_grid(time_grid)(1, noise_at=self.noise_at, **self.time_grid_options)
        elif self.time_grid_options:
            raise ValueError("time_grid_options are for a time_grid with a name: bind them to your function instead")
        self.step_rounding = step_rounding
        rounding(step_rounding)
        self.backend = dispatch.check_name(backend)
        self._warned: set[str] = set()
        """Of which arguments it has warned; copies share it."""

    @functools.cached_property
    def beta_dist(self) -> torch.distributions.Beta:
        """Of which training draws its times with "beta": on the CPU, in float32, whatever the defaults are."""
        if self.train_timestep_sampler != "beta":
            raise AttributeError("beta_dist is there with train_timestep_sampler='beta'")
        return _beta_dist()

    beta_scale_constant = 0.999

    def sample(
        self,
        batch_size: int,
        step_fn: StepFn,
        device: torch.device | str = "cpu",
        return_all_steps: bool = False,
        inference_step: int | None = None,
        int_method: IntMethod | None = None,
        *,
        int_method_options: Mapping[str, float] | None = None,
        unguided_step_fn: StepFn | None = None,
        use_classifier_free_guidance: bool | None = None,
        inference_guidance_weight: float | Sequence[float] | Callable[[float], float] | None = None,
        guidance_form: str | None = None,
        combined_guidance: bool | str = False,
        skip_irrelevant_model: bool = False,
        temperature: float = 1.0,
        noise: Tensor | KeyedNoise | Sequence[KeyedNoise] | Sequence[torch.Generator] | None = None,
        generator: torch.Generator | None = None,
        step_noise: Tensor | KeyedNoise | Sequence[KeyedNoise] | Sequence[torch.Generator] | None = None,
        return_log_prob: bool = False,
        dtype: torch.dtype | None = None,
        time_steps: Tensor | Sequence[float] | None = None,
        step_sizes: Tensor | Sequence[float] | None = None,
        velocity_strength: Tensor | None = None,
        constraint: Callable[[Tensor, Tensor], Tensor] | None = None,
        callback: Callable[[int, Tensor, Tensor], bool | None] | None = None,
        progress: bool = False,
        differentiable: bool | None = None,
        step_rounding: str | None = None,
        backend: str | None = None,
    ) -> Any:
        r"""Integrates dx/dt = v(x, t) from noise to data.

        Equivalent to, bit for bit, with the defaults::

            x = torch.randn(batch_size, *x_dims, device=device)
            t = torch.linspace(0, 1, inference_step + 1, device=device)
            for i in range(inference_step):
                x = x + (t[i + 1] - t[i]).view(1, ...) * step_fn(x=x, t=t[i].view(1, ...).expand(batch_size, ...))

        Args:
            batch_size: B.
            step_fn: The velocity field, called as step_fn(x=x, t=t) with x [B, *x_dims] and t
                [B, 1, ..., 1]; returns [B, *x_dims] or what expands to it, in the state's dtype or a
                narrower one. It may keep x, write to it, or return it. For a model that wants t in another form, or
                the number of the step: `flowmatch_kernels.StepFunction`. Unless differentiable is True it runs without
                grad: a model that takes gradients itself needs torch.enable_grad().
            device: Where to sample.
            return_all_steps: Return the trajectory too.
            inference_step: Steps; None or 0: num_inference_steps, or those of a fitted solver given here.
            int_method: The solver, as for the constructor; None: the constructor's. A file is read at each call.
            int_method_options: Of a stochastic solver, as for the constructor: with int_method, or instead of the
                constructor's.
            unguided_step_fn: The velocity without the condition; called after step_fn.
            use_classifier_free_guidance: None: the constructor's. Without it, what else belongs to guidance is
                ignored, as upstream does; with a warning where that is an unguided_step_fn.
            inference_guidance_weight: w: a number, [N] of them, one for each step, or a function of t; None: the
                constructor's. In two dimensions, [B, 1] is one for each sample, and [B, N] for each and each step; in
                three, [B, L, 1] is one for each token, and [B, L, N] for each and each step. A function is asked before
                the first step, on the host (one synchronisation on a GPU), with t as a float: the grid's 0.2 is
                0.2000000030 where the grid is float32.
            guidance_form: None: the constructor's.
            combined_guidance: step_fn returns both velocities, [2 * B, *x_dims], in one call; read where they are. No
                unguided_step_fn then. True or "unguided_first": as cat([unguided, guided]), diffusers' order;
                "guided_first": as cat([guided, unguided]), CosyVoice's.
            skip_irrelevant_model: Where the weight makes one of the two models irrelevant (the unguided: w = 1,
                s = 1, s = 0 or r = 0, by form; the guided: w = 0, s = 0, s = -1 or r = -1), do not call it, and take
                the other's velocity as it is.
            temperature: Multiplies the noise. Finite, in float32 too where the state is not float64.
            noise: [B, *x_dims], floating point, dense, on `device`: the start, instead of a draw. Never written.
                Where it is batch first in another dense format than contiguous, as channels_last, each x and the result
                keep its format, as in the loop above. Other noise, and tensor subclasses, are sampled contiguous. A
                constraint that returns another format does not change it.
                Or what to draw it from: a `KeyedNoise`, whose bits depend on nothing but its key; a list of B of them,
                each for one sample, which has the index `first`; or a list of B generators, each for one sample, drawn
                by itself as diffusers does.
            generator: For the draw. A CPU generator with a GPU device draws on the CPU and moves.
            step_noise: What a stochastic solver adds: [B, steps, *x_dims], or what to draw it from, as `noise`. None:
                drawn from what the start is drawn from (from `generator` where the start is given), after each
                evaluation, in float32 unless the state is float64.
            return_log_prob: Of a stochastic solver: return the log-probability of each step too, [B, steps], the mean
                over a sample's elements. Computed again from the trajectory by `step_log_prob`, with the same
                velocities, it has the same bits. 0.0 for a step of length 0, which is no random event. Not with a
                constraint or a callback.
            dtype: The state's: float32, float64, bfloat16 or float16. None: the noise's, or torch's default.
                A bfloat16 state rounds each product and each sum to bfloat16.
            time_steps: [T], strictly monotonic, up or down, instead of the constructor's time grid; step_fn sees
                its dtype. Or [B, T], a tensor or a list of lists: each sample has its own grid, t its own values, and a
                result the bits of a call by itself. Or [B, L, T], for x_dims (L, ...): each token has its own grid, and
                t is [B, L, 1, ..., 1]. Or [B, L1, L2, T], and so on: any number of the first sizes of [B, *x_dims]
                in front of T, each of which may be 1: one for all. A step of length 0 holds a sample or token: its bits
                stay, whatever the velocity is. Which solvers take such steps where: see the page Solvers. Not with a
                fitted solver; with return_log_prob not of tokens.
            step_sizes: [T - 1], the dt of each step, instead of the differences of the time grid; or [B, T - 1], or
                [B, L, T - 1].
            velocity_strength: What expands to [B, *x_dims], of the state's dtype, on `device`: a step is
                x + (dt * v) * strength, as with the velocity mask of real-time chunking. 0 keeps an entry as it is, 1
                changes nothing. With int_method "euler" and prediction_type "velocity" alone.
            constraint: Called as constraint(x, t) with each committed state x and its time t [B, 1, ..., 1];
                what it returns, of x's shape and dtype, takes x's place. It may write to x and return it.
                See `flowmatch_kernels.inpaint`.
            callback: Called as callback(step, t, x) after each step, 0 the first, with the state reached, a copy
                that is the callback's own, and its time [B, 1, ..., 1]. Returning True ends the sampling. What a
                callback or a constraint writes to t changes the time grid, as what step_fn writes to it does.
            progress: Show a bar over the evaluations (needs tqdm).
            differentiable: True: the result has the derivative of the loop, in the caller's grad mode, with respect to
                the noise and what step_fn uses, by autograd, torch.func and forward-mode AD; with respect to times,
                step sizes, weights, options, step_noise, velocity_strength and the temperature it raises. False: the
                result is a constant. None: as False, but where a derivative is asked for (torch.func.grad, jvp, ..., or
                noise that requires grad), it raises.
            step_rounding: What dt * v is rounded to: "promote", "exact" or "rounded"; None: the constructor's.
            backend: None: the constructor's. A backend asked for by name runs or raises. With "auto", noise and
                velocities of a tensor subclass that the backends do not know, as MaskedTensor, are stepped by
                "reference"; a DTensor is stepped shard by shard, and keeps the noise's placements.

        Returns:
            The samples [B, *x_dims]; with `return_all_steps`, all states [B, T, *x_dims], contiguous (one copy more
            where the noise is not), of which the first is the noise, and the time steps [T], or of each sample [B, T],
            or of each token [B, L, T]. With a callback a
            `Sample`, which says how far it came. With return_log_prob the log-probabilities are last: x, log_prob, or
            x, time steps, log_prob.

        Raises:
            TypeError: an argument, or what a function given returns, is of the wrong type or dtype.
            ValueError: a value, shape or device is wrong; or the time grid cannot be used.
            RuntimeError: the device is not available, or the backend asked for by name cannot be used, or
                cannot step a tensor subclass.
            ImportError: progress without tqdm.

        Warns:
            UserWarning: unguided_step_fn is given and guidance is off; once for each sampler.
        """
        if differentiable is False and torch.is_grad_enabled():  # so that no argument asks for a derivative
            given = {name: value for name, value in locals().items() if name != "self"}
            with torch.no_grad():
                return FlowMatching.sample(self, **given)
        device = _device(device)
        batch_size = count(batch_size, "batch_size", most=None)
        if int_method_options is not None:
            int_method = self._with_options(int_method, int_method_options)
        if not callable(step_fn):
            raise TypeError(f"step_fn must be callable, got {step_fn!r:.60}")
        source, start = noises.source(noise, batch_size, generator)
        functions: list[Bound] = []
        if isinstance(step_fn, StepFunction) or isinstance(unguided_step_fn, StepFunction):
            step_fn, unguided_step_fn = bound(step_fn, functions), bound(unguided_step_fn, functions)
        differentiable = keeps_derivative(
            differentiable,
            start,
            step_noise=step_noise,
            time_steps=time_steps,
            step_sizes=step_sizes,
            velocity_strength=velocity_strength,
            inference_guidance_weight=_or(inference_guidance_weight, self.inference_guidance_weight),
            temperature=temperature,
        )
        if not (
            type(return_all_steps) is type(skip_irrelevant_model) is type(progress) is bool
        ):  # one expression: a call for each is 1% of a small sample()
            flag(return_all_steps, "return_all_steps")
            flag(skip_irrelevant_model, "skip_irrelevant_model")
            flag(progress, "progress")
        guided, form, weight = self._guidance(
            *(use_classifier_free_guidance, guidance_form, inference_guidance_weight),
            *(unguided_step_fn, combined_guidance, skip_irrelevant_model),
        )
        hooks = None if constraint is None and callback is None else hooks_of(constraint, callback)
        bar = progress_bar() if progress else iter
        shape = (batch_size, *self.x_dims)
        dtype = noises.state_dtype(dtype, start, shape, device)
        usual = type(temperature) is float and temperature == 1.0
        scale: float | Tensor = 1.0 if usual else _temperature(temperature, dtype)
        eager = tracing.is_eager()
        if eager and batch_size > LARGEST:
            count(batch_size, "batch_size")  # which raises; a symbolic one stays without a bound
        backend_ = dispatch.choose(_or(backend, self.backend), device.type)
        table = self._table(
            *(int_method, inference_step, time_steps, step_sizes, dtype, device, form, weight),
            cached=eager,
            batch_size=batch_size,
        )
        velocities = Velocities(shape, dtype, device, guided, table.weights, differentiable)
        kernel = WEIGHTED if guided is None else guided.form.kernel
        rounded = rounding(_or(step_rounding, self.step_rounding))
        if table.noise is not None or step_noise is not None or return_log_prob is not False:
            _check_noise(return_log_prob, hooks, rounded, table)
            drawing = noises.step_noise(step_noise, source, shape, table, device, solvers.ADDING)
        if velocity_strength is not None:
            self._check_strength(int_method, inference_step)
            velocity_strength = strength(velocity_strength, shape, dtype, device)
        layout = None if start is None or start.is_contiguous() else layouts.of(start, len(table.sizes))
        if layout is not None and start is not None:
            start = layout.stored(start)
            if velocity_strength is not None:
                velocity_strength = layout.stored(velocity_strength).contiguous()
            step_fn, velocities, hooks = layout.applied(step_fn, velocities, hooks)
        evaluate = model(step_fn, velocities, eager)
        if functions:
            evaluate = timed(evaluate, functions, table.times, shape)
        log_probs = None
        if table.noise is not None:
            stored = None if layout is None else layout.stored
            added = noises.StepNoise(*drawing, shape, arithmetic_dtype(dtype), device, backend_.name, stored)
            evaluate = noisy(evaluate, table, added)
            if return_log_prob:
                seen = None if layout is None else functools.partial(layout.seen, differentiable=differentiable)
                log_probs = LogProbs(table, velocities, kernel, backend_.name, seen)
                evaluate = log_probs.watched(evaluate)
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(grad and differentiable)  # a context manager takes ten times as long
        try:
            rows = rows_for(
                Setting(
                    table,
                    velocities,
                    backend_,
                    eager,
                    return_all_steps,
                    rounded,
                    kernel,
                    constraint is not None,
                    backend or self.backend,
                    velocity_strength,
                ),
                start,
            )
            rows, state, steps = integrate(
                table,
                rows,
                _start(rows, start, source, scale, velocities, eager, backend_.name),
                evaluate,
                log_probs or hooks,
                bar,
            )
            x = rows.trajectory(state, steps) if return_all_steps else rows.result(state)
            if layout is not None:
                x = layout.trajectory(x) if return_all_steps else layout.seen(x, differentiable)
            if callback is None and not return_all_steps:
                return x if log_probs is None else (x, log_probs.result())
            grid = rows.time_steps(steps)
            if grid.dim() > 1:
                grid = grid.movedim(0, -1).contiguous()
            if log_probs is not None:
                return x, grid, log_probs.result()
        finally:
            torch._C._set_grad_enabled(grad)
        if callback is not None:
            return Sample(x, grid, stopped=steps < table.steps)
        return x, grid

    def step_log_prob(
        self,
        x: Tensor,
        v: Tensor,
        x_next: Tensor,
        step: int,
        *,
        inference_step: int | None = None,
        int_method: IntMethod | None = None,
        int_method_options: Mapping[str, float] | None = None,
        time_steps: Tensor | Sequence[float] | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """The log-probability of a step of a stochastic solver, differentiable in x, v and x_next.

        log p = mean over a sample's elements of -(x_next - mean)^2 / (2 std^2) - log(std) - log(2 pi)/2.

        With times of each sample, it is 0.0 for a sample whose step has length 0: the step is no random event, and adds
        nothing to a sum.

        What it is for: the ratio of policies of reinforcement learning. From a stored trajectory, with the velocities
        of the same network, it has the bits that sample(..., return_log_prob=True) returned: the log-ratio is 0.0.

        Args:
            x: [B, *x_dims]: the state before the step.
            v: [B, *x_dims]: the velocity there; with guidance the combined one.
            x_next: [B, *x_dims]: the state after it.
            step: Which step, 0 the first.
            inference_step, int_method, int_method_options, backend: As for sample().
            time_steps: As for sample(); of each sample, those of the samples of x, [B, T].

        Returns:
            [B], float32, or float64 for a float64 state.

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: the solver adds no noise in this step, or a shape, a device or the step is wrong.

        Example:
            >>> import torch
            >>> from flowmatch_kernels import FlowMatching
            >>> fm = FlowMatching(x_dims=(64, 2), int_method="sde", num_inference_steps=4)
            >>> step_fn = lambda x, t: torch.sin(4 * t) - x
            >>> states, times = fm.sample(
            ...     6, step_fn, return_all_steps=True, time_steps=[0.0, 0.3, 0.6, 0.9])
            >>> x, x_next, t = states[:, 1], states[:, 2], times[1]
            >>> fm.step_log_prob(x, step_fn(x, t), x_next, 1, time_steps=[0.0, 0.3, 0.6, 0.9]).shape
            torch.Size([6])

        Source: Flow-GRPO, arXiv 2505.05470; the mean over elements, as its code has it.
        """
        for name, tensor in (("x", x), ("v", v), ("x_next", x_next)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {shown(tensor)}")
        refuse_derivative(time_steps, "time_steps")
        if int_method_options is not None:
            int_method = self._with_options(int_method, int_method_options)
        table = self._table(
            *(int_method, inference_step, time_steps, None, x.dtype, x.device, None, 0.0),
            cached=tracing.is_eager(),
            batch_size=x.shape[0] if x.dim() else 1,
        )
        if table.noise is None:
            named = solvers.titled(_or(int_method, self.int_method))
            raise ValueError(f"int_method {named} adds no noise: its steps have no density")
        step = count(step, "step")
        if step >= table.steps:
            raise ValueError(f"step must be below {table.steps}, the number of steps, got {step}")
        _refuse_tokens(table)
        if step in table.noiseless:
            whose = f" to sample {table.noiseless[step][0]}" if table.of_samples else ""
            raise ValueError(f"step {step} adds no noise{whose}, so it has no density")
        return step_log_prob(table, x, v, x_next, step, _or(backend, self.backend))

    def _with_options(self, int_method: IntMethod | None, options: Mapping[str, float]) -> Any:
        """A stochastic solver with options: the one named, or the constructor's."""
        if not isinstance(options, Mapping):
            raise TypeError(f"int_method_options must be a dict, got {options!r:.60}")
        solver = _or(int_method, self.int_method)
        return solvers.loaded(solver.name if isinstance(solver, StochasticSolver) else solver, options)

    def _guidance(
        self,
        use_classifier_free_guidance: bool | None,
        form: str | None,
        weight: Any,
        unguided_step_fn: StepFn | None,
        combined_guidance: bool | str,
        skip: bool,
    ) -> tuple[Guidance | None, str | None, Weight]:
        """How to guide, with the form's name and the weight; None without guidance."""
        guided_first = None if combined_guidance is False else guidance.guided_first(combined_guidance)
        combined = guided_first is not None
        form = _or(form, self.guidance_form)
        its_form = guidance.form(form)
        guided = _or(use_classifier_free_guidance, self.use_classifier_free_guidance)
        if unguided_step_fn is not None and not callable(unguided_step_fn):
            raise TypeError(f"unguided_step_fn must be callable, got {unguided_step_fn!r:.60}")
        if not (guided if type(guided) is bool else flag(guided, "use_classifier_free_guidance")):
            if combined:
                raise ValueError(
                    "combined_guidance needs use_classifier_free_guidance=True: step_fn returns both velocities"
                )
            if unguided_step_fn is not None and not torch.compiler.is_compiling():
                self._warn_unguided()
            return None, None, 0.0
        if not combined and unguided_step_fn is None:
            raise ValueError("unguided_step_fn is required when using classifier free guidance")
        if combined and (unguided_step_fn is not None or skip):
            other = "skip_irrelevant_model" if unguided_step_fn is None else "an unguided_step_fn"
            raise ValueError(f"combined_guidance, where step_fn returns both velocities, and {other}: pass one")
        weight = guidance.checked(_or(weight, self.inference_guidance_weight))
        return Guidance(its_form, unguided_step_fn, skip, bool(guided_first)), form, weight

    def _warn_unguided(self) -> None:
        """Warns that unguided_step_fn is not called, once for each sampler."""
        if "unguided_step_fn" not in self._warned:
            self._warned.add("unguided_step_fn")
            warnings.warn(
                "unguided_step_fn is given and guidance is off, so it is not called: "
                "use_classifier_free_guidance=True turns guidance on",
                stacklevel=4,
            )

    def nfe(
        self, inference_step: int | None = None, int_method: IntMethod | None = None, guided: bool | None = None
    ) -> int:
        """The model calls that one sample() spends: evaluations, twice as many with guidance.

        Args:
            inference_step: Steps, as for sample(); of a time grid, one fewer than its entries.
            int_method: The solver, as for sample().
            guided: With guidance by two models; None: use_classifier_free_guidance. What skip_irrelevant_model
                saves is not known here; a step_fn that returns both velocities is one call: guided=False.

        Raises:
            TypeError: inference_step is not an int, or guided not a bool.
            ValueError: inference_step is negative or contradicts a fitted solver, or there is no such solver.
        """
        solver, steps = self._steps(int_method, inference_step)
        guided = flag(_or(guided, self.use_classifier_free_guidance), "guided")
        return solvers.evaluations(solver, steps, self.euler_at_final) * (2 if guided else 1)

    def _steps(self, int_method: IntMethod | None, inference_step: int | None) -> tuple[solvers.Loaded, int]:
        """The solver and the number of steps that these arguments of sample() mean."""
        solver = solvers.loaded(self.int_method if int_method is None else int_method)
        steps = count(inference_step, "inference_step") if inference_step is not None else 0
        name = "inference_step"
        if not steps and (int_method is None or not isinstance(solver, FittedSolver)):
            steps, name = count(self.num_inference_steps, "num_inference_steps"), "num_inference_steps"
        if isinstance(solver, FittedSolver):
            if steps not in (0, solver.evaluations) or (name == "num_inference_steps" and not steps):
                raise ValueError(
                    f"{name} is {steps}, and the fitted solver has {solver.evaluations} evaluations: it was fitted to "
                    f"that many. Leave {name} out, or fit a solver to {steps}"
                )
            steps = solver.evaluations
        return solver, steps

    def graphed(
        self,
        step_fn: Callable[..., Tensor],
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        inputs: Mapping[str, Any] | None = None,
        max_graphs: int = 4,
        copy_output: bool = True,
        fallback: str = "error",
        module: torch.nn.Module | None = None,
        generators: Sequence[torch.Generator] = (),
        **sample_options: Any,
    ) -> GraphedSampler:
        """sample() as one CUDA graph, with the same bits: a call copies its inputs, replays, and copies the result.

        On a small state a GPU waits for Python and for its launches; a replay is one launch. What is captured is this
        sampler's sample(), with all calls of step_fn. A call with another signature (the shapes, strides and dtypes of
        inputs and noise, the batch size, an option, autocast) is captured too, and the `max_graphs` used last are kept.
        What has values only is copied in at each call: inputs, noise, time grid, coefficients, weights of guidance.

        Args:
            step_fn: The velocity, called as step_fn(x=x, t=t, **inputs); an unguided_step_fn gets the inputs too.
            batch_size: B.
            device: Where to sample. If it is not CUDA, each call runs sample().
            inputs: What step_fn takes beside x and t, by name: tensors on the device, in dicts, lists and tuples of any
                depth, and constants (None, bool, int, float, str, torch.dtype). The first graph is captured with these;
                each call brings its own.
            max_graphs: How many graphs are held.
            copy_output: A call returns a copy. False: the graph's own memory, which the next call overwrites.
            fallback: What happens where step_fn cannot be captured. "error": a `GraphCaptureError`. "eager": a warning
                in the log, and sample() runs for this signature.
            module: The network. A call then looks whether its parameters and buffers are where they were, and whether
                it trains as it did, and else captures anew. Without it `GraphedSampler.reset()` is yours to call.
            generators: Generators on the device that step_fn draws from, beside the default one.
            **sample_options: Options of sample(); a call may bring others. Not callback, progress and differentiable.

        Returns:
            A `flowmatch_kernels.graphs.GraphedSampler`: call it with the inputs by name.

        Raises:
            TypeError: an argument is of the wrong type, or unknown.
            ValueError: an argument has a value that cannot be used.
            GraphCaptureError: step_fn cannot be captured.
            RuntimeError: the device is not available, or as for sample().

        Example:
            >>> import torch
            >>> from flowmatch_kernels import FlowMatching
            >>> fm = FlowMatching(x_dims=(64, 2))
            >>> step_fn = lambda x, t, features: torch.sin(4 * t) - x * features
            >>> features = torch.ones(6, 1, 2)
            >>> sampler = fm.graphed(step_fn, batch_size=6, inputs={"features": features})
            >>> sampler(features=features * 2).shape
            torch.Size([6, 64, 2])
        """
        from .graphs import GraphedSampler  # which captures sample() of this class

        options = (inputs, max_graphs, copy_output, fallback, module, generators, sample_options)
        return GraphedSampler(self, step_fn, batch_size, device, *options)

    def fit_solver(
        self,
        step_fn: StepFn | None = None,
        evaluations: int | Sequence[int] | None = None,
        *,
        batch_size: int = 256,
        batches: Iterable[StepFn | Mapping[str, Any]] | None = None,
        device: torch.device | str = "cpu",
        time_steps: Tensor | Sequence[float] | None = None,
        held_out: float = 0.25,
        reference: str | None = None,
        reference_steps: int = 192,
        search_grid: int = 64,
        search_batches: int = 1,
        trajectory_device: torch.device | str | None = None,
        progress: bool = False,
        **arguments: Any,
    ) -> Any:
        """Fits a solver to a model: the error of many evaluations for a few. No training, no gradients.

        The numbers of each row are the linear least squares solution for where converged trajectories from the same
        noise go, and its times are searched on a grid; see `flowmatch_kernels.fitting`. What the solver is fitted to
        is the model with its guidance: fit again where one of them changes. It carries over to other noise and, as far
        as the batches show them, to other conditions.

        Costs `reference_steps` * 1.5 evaluations of each batch, and some 10 to 100 times N for the search.

        Memory: the first `search_batches` keep their converged states at `search_grid` + 1 times; each further batch
        keeps them at the N + 1 times chosen. Beside them, N states and N velocities of each batch.

        Args:
            step_fn: The velocity, as for sample().
            evaluations: N, those that the solver may spend; several: one solver for each, from the same converged
                trajectories. None: 4, or as many as time_steps have steps.
            batch_size: B. With more samples the error on other noise falls; a few scenes already help.
            batches: Instead of step_fn, several batches, as one for each scene or prompt: a step_fn each, or a dict
                with "step_fn" and any of "unguided_step_fn", "noise" and "batch_size".
            device: Where to sample.
            time_steps: [N + 1]: keep these times, and fit only the coefficients.
            held_out: The share of the samples that is not fitted to, between 0 and 1: it decides between a fitted row
                and a plain multistep row, and measures the errors that the solver reports.
            reference: The solver of the converged trajectories, by name. None: ab3, and with weights for each step
                midpoint, which remembers nothing across a jump; neither evaluates at the end of time.
            reference_steps: Its steps: even, and a multiple of search_grid.
            search_grid: How many steps the grid of times has; a smaller one takes less memory.
            search_batches: How many of the batches the search of times sees; the coefficients are fitted to all.
            trajectory_device: Where the converged states are kept, as "cpu"; None: `device`.
            progress: Show a bar over the tries of the search (needs tqdm).
            **arguments: What sample() takes to shape the velocity and the noise: unguided_step_fn,
                use_classifier_free_guidance, inference_guidance_weight, guidance_form, combined_guidance,
                skip_irrelevant_model, temperature, noise, generator, dtype, backend. Weights for each step, N of them,
                hold from step to step of the time grid. Without noise and generator a fixed seed draws the noise, so
                that the same call gives the same solver.

        Returns:
            A `FittedSolver`, or a list of them where evaluations is a sequence.

        Raises:
            TypeError: an argument is of the wrong type, or unknown.
            ValueError: an argument has a value that cannot be used, there are too few samples, or a velocity is not
                finite.
            RuntimeError: a device is not available.

        Warns:
            UserWarning: the reference has not converged, or a solver with a name is better at as many evaluations.

        Example:
            >>> import torch
            >>> from flowmatch_kernels import FlowMatching
            >>> fm = FlowMatching(x_dims=(64, 2))
            >>> step_fn = lambda x, t: torch.sin(4 * t) - x
            >>> solver = fm.fit_solver(step_fn, evaluations=3, batch_size=16)
            >>> fm.sample(6, step_fn, int_method=solver).shape
            torch.Size([6, 64, 2])

        Source: the form of the solver is of the family of Bespoke Non-Stationary Solvers, arXiv 2403.01329.
        """
        found = fitting.fit(
            self,
            step_fn,
            evaluations,
            batches,
            batch_size,
            device,
            time_steps,
            held_out,
            reference,
            reference_steps,
            search_grid,
            search_batches,
            trajectory_device,
            progress,
            arguments,
        )
        return found if isinstance(evaluations, Sequence) else found[0]

    def compare_solvers(
        self,
        step_fn: StepFn | None = None,
        evaluations: int | Sequence[int] = (4, 6, 8, 10),
        solvers: Iterable[IntMethod] | None = None,
        *,
        batch_size: int = 256,
        batches: Iterable[StepFn | Mapping[str, Any]] | None = None,
        device: torch.device | str = "cpu",
        reference: str = "ab3",
        reference_steps: int = 256,
        error: Callable[[Tensor, Tensor], float] | None = None,
        quality: Callable[[Tensor], float] | None = None,
        **arguments: Any,
    ) -> SolverComparison:
        """Measures solvers on a model: the distance of their samples to converged ones, from the same noise.

        Args:
            step_fn: The velocity, as for sample().
            evaluations: How many each solver may spend: one number or several.
            solvers: Names, fitted solvers and files of them; None: all with a name. A fitted solver is measured at its
                own evaluations.
            batch_size: B.
            batches: Instead of step_fn, as for `fit_solver`.
            device: Where to sample.
            reference: The solver of the converged samples, by name.
            reference_steps: Its steps, even.
            error: Called as error(samples, converged), both [all samples, *x_dims]; None: the root mean square of the
                difference of all entries.
            quality: Called as quality(samples): a measure of one's own, smaller being better, as a distance to data.
            **arguments: As for `fit_solver`; the weight of guidance is a number or a function. To measure a fitted
                solver on noise that it has not seen, pass noise or a generator.

        Returns:
            A `SolverComparison`: print it, or call its plot("solvers.png").

        Raises:
            TypeError: an argument is of the wrong type, or unknown.
            ValueError: an argument has a value that cannot be used, or a solver cannot use the time grid.
            RuntimeError: the device is not available.

        Warns:
            UserWarning: the reference has not converged.
        """
        return solver_comparison.compare(
            self,
            step_fn,
            evaluations,
            solvers,
            batches,
            batch_size,
            device,
            reference,
            reference_steps,
            error,
            quality,
            arguments,
        )

    def construct_training_data(self, x: Tensor) -> dict[str, Any]:
        """The training pair of conditional flow matching: noisy_x = t*x + (1 - t)*noise.

        Draws t, then the noise, then, with train_drop_guidance, which conditions to drop; each from the
        default generator of its device ("beta": t on the CPU). How t is drawn: train_timestep_sampler.

        Args:
            x: Data, [B, *x_dims], floating point.

        Raises:
            TypeError: x is no floating-point tensor, or is sparse or nested; or a default changed afterwards is of the
                wrong type.
            ValueError: x has no dimension, or train_ignore_guidance_rate or train_timestep_sampler, changed afterwards,
                cannot be used.

        Returns:
            "x"; "noisy_x" [B, *x_dims]; "timesteps" [B, 1, ..., 1]; "noise" [B, *x_dims];
            "is_drop_guidance": bool [B], True where the condition is to be dropped, with train_drop_guidance;
            else None.

        Source: arXiv 2210.02747, eq. 22, with sigma_min = 0.
        """
        check_data(x)
        draws = flag(self.train_drop_guidance, "train_drop_guidance")
        rate = share(self.train_ignore_guidance_rate, "train_ignore_guidance_rate")
        if check_time_sampler(self.train_timestep_sampler) != "beta":
            t = TIME_SAMPLERS[self.train_timestep_sampler](x.shape[0], x.device)
        else:
            # Fake and real tensors do not mix, and the real distribution is kept for the next call.
            distribution = _beta_dist() if tracing.is_fake() else self.beta_dist
            t = distribution.sample((x.shape[0],)).to(x.device)
            t = self.beta_scale_constant - t * self.beta_scale_constant
        t = t.view(-1, *[1] * (x.dim() - 1))
        noise = torch.randn_like(x)
        data = {
            "x": x,
            "noisy_x": t * x + (1 - t) * noise,
            "timesteps": t,
            "noise": noise,
            "is_drop_guidance": None,
        }
        if draws:
            data["is_drop_guidance"] = torch.rand(x.shape[0], device=x.device) < rate
        return data

    def compute_loss_from_pred(self, training_data: dict[str, Any], pred: Tensor) -> Tensor:
        """The mean squared error of a predicted velocity against x - noise, in pred's dtype.

        Args:
            training_data: What `construct_training_data` returned.
            pred: The predicted velocity, [B, *x_dims].

        Raises:
            ValueError: pred has another shape than x.

        Source: arXiv 2210.02747, eq. 23.
        """
        return mean_squared_error(pred, training_data["x"] - training_data["noise"])

    def _check_strength(self, int_method: IntMethod | None, inference_step: int | None) -> None:
        """Raises where velocity_strength has no meaning."""
        if self.prediction_type != "velocity" or self._steps(int_method, inference_step)[0] != "euler":
            raise ValueError(
                "velocity_strength multiplies dt * v of int_method='euler' and prediction_type='velocity': "
                f"got {solvers.titled(_or(int_method, self.int_method))} and {self.prediction_type!r}"
            )

    def _check_times(self, solver: FittedSolver, time_steps: Any, step_sizes: Any, device: torch.device) -> None:
        """Raises where arguments of sample() contradict the times of a fitted solver."""
        if solver.noise_at != self.noise_at:
            raise ValueError(f"noise_at is {self.noise_at}, and the solver was fitted with noise_at={solver.noise_at}")
        if step_sizes is not None:
            raise ValueError("step_sizes and a fitted solver: its coefficients are its step sizes. Leave them out")
        if time_steps is None:
            return
        grid, wanted = solvers.checked_grid(time_steps, "time_steps", device), solver.times
        if grid.entries is None:
            raise ValueError("time_steps and a fitted solver, which has its own: leave time_steps out")
        if len(grid.entries) != len(wanted) or max(map(abs, map(sub, grid.entries, wanted))) > 1e-6:
            raise ValueError(
                f"time_steps {list(grid.entries)!s:.100} contradict the fitted solver, which was fitted to the times "
                f"{list(solver.times)!s:.100}: leave time_steps out"
            )

    def _table(
        self,
        int_method: IntMethod | None,
        inference_step: int | None,
        time_steps: Tensor | Sequence[float] | None,
        step_sizes: Tensor | Sequence[float] | None,
        dtype: torch.dtype,
        device: torch.device,
        form: str | None,
        weight: Weight,
        cached: bool,
        batch_size: int,
    ) -> Table:
        """The solver's table on the grid that the arguments describe, with the weights of guidance."""
        solver, steps = self._steps(int_method, inference_step)
        time_grid, options = self.time_grid, self.time_grid_options
        sizes: tuple[int, ...] = ()
        own_times = (time_steps is not None and own_dims(time_steps)) or (
            step_sizes is not None and own_dims(step_sizes)
        )
        if own_times and isinstance(solver, FittedSolver):
            raise ValueError(
                "time_steps or step_sizes of each sample, and a fitted solver brings its own times: pass 1-D ones, "
                "or none"
            )
        if own_times or (type(weight) is tuple and own_dims(weight)):
            given = {"time_steps": time_steps, "step_sizes": step_sizes, "inference_guidance_weight": weight}
            sizes = own_sizes((batch_size, *self.x_dims), **given)
        if isinstance(solver, FittedSolver):
            self._check_times(solver, time_steps, step_sizes, device)
            time_grid, options, time_steps = "uniform", {}, None  # it brings its own times
        predicts = None
        if self.prediction_type != "velocity":
            predicts = self.noise_at if self.prediction_type == "noise" else 1 - self.noise_at
        request = solvers.Request(
            solver,
            steps if time_steps is None else 0,
            arithmetic_dtype(dtype),
            device,
            self.noise_at,
            predicts,
            self.euler_at_final and not isinstance(solver, FittedSolver),
            time_grid,
            tuple(options.items()) if options else (),
            torch.get_default_dtype(),
            time_steps,
            step_sizes,
            form,
            weight,
            sizes,
        )
        table = solvers.table_for(request, cached)
        if time_steps is not None and inference_step and steps != table.steps:
            raise ValueError(
                f"inference_step is {steps}, and time_steps has {table.steps + 1} entries, "
                f"{table.steps} steps: pass one of them"
            )
        return table


def _beta_dist() -> torch.distributions.Beta:
    alpha, beta = torch.tensor([1.5, 1.0], dtype=torch.float32, device="cpu").unbind()
    return torch.distributions.Beta(alpha, beta, validate_args=False)  # which reads values: fake tensors have none


def _or(value: Any, default: Any) -> Any:
    """An argument of sample(), or the constructor's where it is None."""
    return default if value is None else value


_ROUNDINGS = {"promote": PROMOTE, "exact": EXACT, "rounded": ROUNDED}


def rounding(name: str) -> int:
    """The fused step's argument for `step_rounding`.

    Raises:
        ValueError: there is no such rounding.
    """
    if not isinstance(name, str) or name not in _ROUNDINGS:
        raise ValueError(f"step_rounding must be {', '.join(map(repr, _ROUNDINGS))}, got {name!r:.60}")
    return _ROUNDINGS[name]


def _device(device: Any) -> torch.device:
    """The argument `device` of sample(), with a word for what other samplers take in its place.

    Raises:
        TypeError: it is neither a torch.device nor a string.
        RuntimeError: it is not available.
    """
    if type(device) is not str:
        wanted = "device must be a torch.device or a string"
        if callable(device):  # so is an nn.Module
            raise TypeError(
                f"{wanted}, got a function: pass unguided_step_fn= by name (it is not the third positional argument "
                "here, as it is in Alpamayo 1.5)"
            )
        if isinstance(device, int):
            raise TypeError(f"{wanted}, got {shown(device)}: pass inference_step= by name")
    return available_device(device)


def _temperature(temperature: Any, dtype: torch.dtype) -> float | Tensor:
    """The argument `temperature` of sample(), which must have a value in the state's dtype."""
    if isinstance(temperature, Tensor) and temperature.dim() == 0 and not tracing.is_readable(temperature):
        return unread(temperature, "temperature")
    temperature = finite(temperature, "temperature")
    if type(temperature) is float and temperature != 1.0:
        held(temperature, "temperature", dtype)
    return temperature


def _refuse_tokens(table: Table) -> None:
    if len(table.sizes) > 1:
        raise ValueError("log-probabilities are not for times or weights of each token: pass times [T] or [B, T]")


def _check_noise(return_log_prob: bool, hooks: Hooks | None, rounded: int, table: Table) -> None:
    """Raises ValueError where an argument does not go with a stochastic solver, or needs one."""
    if table.noise is None:
        if flag(return_log_prob, "return_log_prob"):
            raise ValueError(f"return_log_prob is for {solvers.ADDING}")
        return
    if rounded != PROMOTE:
        raise ValueError("step_rounding must be 'promote' with a solver that adds noise, got 'exact' or 'rounded'")
    if not flag(return_log_prob, "return_log_prob"):
        return
    _refuse_tokens(table)
    if hooks is not None:
        what = "a callback" if hooks.constraint is None else "a constraint, which changes the state after its step"
        raise ValueError(f"return_log_prob and {what}: pass one of them")
    if table.noiseless:
        whose = next(iter(table.noiseless.values()))[0]
        raise ValueError(
            f"return_log_prob: steps {list(table.noiseless)} add no noise{f' to sample {whose}' * table.of_samples}, "
            "so they have no density; end the time grid before the data, or pass eta > 0"
        )


def _start(
    rows: Any,
    noise: Tensor | None,
    source: noises.Source | torch.Generator | None,
    temperature: float | Tensor,
    velocities: Velocities,
    eager: bool,
    backend: str,
) -> Any:
    """The first state: the noise, given or drawn, times the temperature."""
    scaled = isinstance(temperature, Tensor) or temperature != 1.0
    if noise is not None:
        if eager and not velocities.differentiable:
            noise = noise.data  # it has no tangent, which would not follow the steps
        if not scaled:
            return rows.start(noise, drawn=False)
        return rows.start(noises.scaled(noise.to(velocities.dtype), temperature), drawn=True)
    shape, dtype, device = velocities.shape, velocities.dtype, velocities.device
    noise = noises.drawn(source, shape, dtype, device, backend, rows.empty())
    return rows.start(noises.scaled(noise, temperature) if scaled else noise, drawn=True)
