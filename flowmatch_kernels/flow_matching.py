"""`FlowMatching`: the sampler that users call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import guidance, solvers, time_grids
from .arguments import count, number
from .base import BaseDiffusion, StepFn
from .guidance import Weight
from .ops import dispatch
from .ops.fused_step import VELOCITY_DTYPES, arithmetic_dtype
from .sampling import Clock, Guided, integrate
from .solvers import Evaluation, Request, Table


class Sample(NamedTuple):
    """What sample() returns where a callback was given, which may have stopped it."""

    x: Tensor
    """[B, *x_dims]; with return_all_steps, the states so far, [B, steps taken + 1, *x_dims]."""
    time_steps: Tensor
    """[steps taken + 1]: the time grid as far as it came; x, or its last state, stands at the last entry."""
    stopped: bool
    """The callback returned True, and steps were left out."""


class FlowMatching(BaseDiffusion):
    r"""Flow matching: learns a velocity field v(x, t), samples by integrating dx/dt = v.

    Time runs from noise at t = 0 to data at t = 1, or the other way round with noise_at=1. One Euler step is
    x' = x + dt * v(x, t), and every backend gives the bits of the eager PyTorch loop.

    Args:
        x_dims: The shape of one sample: an int or a sequence of ints.
        int_method: The solver; see `flowmatch_kernels.solvers`.
        num_inference_steps: Steps on the time grid; 0 returns the noise.
        train_timestep_sampler: "beta" (t = 0.999 - 0.999 * Beta(1.5, 1), as in pi-zero) or "uniform".
        train_ignore_guidance_rate: How often training drops the condition, with guidance on.
        inference_guidance_weight: w in v = (1 - w) * v_unguided + w * v_guided, or the weight of another form: one
            for all steps, one for each, or a function of t (a float, at each evaluation).
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
        int_method: str = "euler",
        num_inference_steps: int = 10,
        *,
        train_timestep_sampler: str = "beta",
        train_ignore_guidance_rate: float = 0.1,
        inference_guidance_weight: float | Sequence[float] | Callable[[float], float] = 1.0,
        use_classifier_free_guidance: bool = False,
        guidance_form: str = "interpolate",
        time_grid: str | Callable[[int], Tensor] = "uniform",
        time_grid_options: Mapping[str, float] | None = None,
        prediction_type: str = "velocity",
        noise_at: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(x_dims)
        if prediction_type not in ("velocity", "data", "noise"):
            raise ValueError(f"prediction_type must be 'velocity', 'data' or 'noise', got {prediction_type!r}")
        if noise_at not in (0, 1):
            raise ValueError(f"noise_at must be 0 or 1, got {noise_at!r}")
        self.prediction_type = prediction_type
        self.noise_at = int(noise_at)
        solvers.solver(int_method)
        self.int_method = int_method
        self.num_inference_steps = count(num_inference_steps, "num_inference_steps")
        if train_timestep_sampler not in ("beta", "uniform"):
            raise ValueError(f"train_timestep_sampler must be 'beta' or 'uniform', got {train_timestep_sampler!r}")
        self.train_timestep_sampler = train_timestep_sampler
        self.train_ignore_guidance_rate = train_ignore_guidance_rate
        self.inference_guidance_weight = inference_guidance_weight
        self.use_classifier_free_guidance = use_classifier_free_guidance
        guidance.form(guidance_form)
        self.guidance_form = guidance_form
        self.time_grid = time_grid
        if not isinstance(time_grid_options, (Mapping, type(None))):
            raise TypeError(f"time_grid_options must be a dict, got {time_grid_options!r:.60}")
        self.time_grid_options = {name: number(option, name) for name, option in (time_grid_options or {}).items()}
        if not callable(time_grid):
            known = time_grids.options(time_grid)
            if unknown := [name for name in self.time_grid_options if name not in known]:
                wanted = " and ".join(known) or "no options"
                raise TypeError(f"time_grid {time_grid!r} takes {wanted}, got {', '.join(map(repr, unknown))}")
            time_grids.time_grid(time_grid)(1, noise_at=self.noise_at, **self.time_grid_options)
        elif self.time_grid_options:
            raise ValueError("time_grid_options are for a time_grid with a name: bind them to your function instead")
        self.backend = dispatch.check_name(backend)
        if train_timestep_sampler == "beta":
            # On the CPU, in float32, whatever the defaults are while a model is being built.
            self.beta_dist = torch.distributions.Beta(
                torch.tensor(1.5, dtype=torch.float32, device="cpu"),
                torch.tensor(1.0, dtype=torch.float32, device="cpu"),
            )
            self.beta_scale_constant = 0.999

    def sample(
        self,
        batch_size: int,
        step_fn: StepFn,
        device: torch.device | str = "cpu",
        return_all_steps: bool = False,
        inference_step: int | None = None,
        int_method: str | None = None,
        *,
        unguided_step_fn: StepFn | None = None,
        use_classifier_free_guidance: bool | None = None,
        inference_guidance_weight: float | Sequence[float] | Callable[[float], float] | None = None,
        guidance_form: str | None = None,
        combined_guidance: bool = False,
        skip_irrelevant_model: bool = False,
        temperature: float = 1.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        time_steps: Tensor | Sequence[float] | None = None,
        step_sizes: Tensor | Sequence[float] | None = None,
        constraint: Callable[[Tensor, Tensor], Tensor] | None = None,
        callback: Callable[[int, Tensor, Tensor], bool | None] | None = None,
        progress: bool = False,
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
                narrower one. It may keep x, write to it, or return it.
            device: Where to sample.
            return_all_steps: Return the trajectory too.
            inference_step: Steps; None or 0: num_inference_steps.
            int_method: The solver; None: the constructor's.
            unguided_step_fn: The velocity without the condition; called after step_fn.
            use_classifier_free_guidance: None: the constructor's. Without it, what else belongs to guidance is
                ignored, as upstream does.
            inference_guidance_weight: w: a number, [N] of them, or a function of t; None: the constructor's. A
                function is asked before the first step, on the host (one synchronisation on a GPU), with t as a
                float: the grid's 0.2 is 0.2000000030 where the grid is float32.
            guidance_form: None: the constructor's.
            combined_guidance: step_fn returns both velocities, cat([unguided, guided]), [2 * B, *x_dims], in one
                call; read where they are. No unguided_step_fn then.
            skip_irrelevant_model: Where the weight makes one of the two models irrelevant (the unguided: w = 1,
                s = 1, s = 0 or r = 0, by form; the guided: w = 0, s = 0, s = -1 or r = -1), do not call it, and take
                the other's velocity as it is.
            temperature: Multiplies the noise.
            noise: [B, *x_dims], floating point, on `device`: the start, instead of a draw. Never written.
            generator: For the draw. A CPU generator with a GPU device draws on the CPU and moves.
            dtype: The state's: float32, float64, bfloat16 or float16. None: the noise's, or torch's default.
                A bfloat16 state rounds each product and each sum to bfloat16.
            time_steps: [T], strictly monotonic, up or down, instead of the constructor's time grid; step_fn sees
                its dtype.
            step_sizes: [T - 1], the dt of each step, instead of the differences of the time grid.
            constraint: Called as constraint(x, t) with each committed state x and its time t [B, 1, ..., 1];
                what it returns, of x's shape and dtype, takes x's place. It may write to x and return it.
                See `flowmatch_kernels.inpaint`.
            callback: Called as callback(step, t, x) after each step, 0 the first, with the state reached, a copy
                that is the callback's own, and its time [B, 1, ..., 1]. Returning True ends the sampling.
            progress: Show a bar over the evaluations (needs tqdm).
            backend: None: the constructor's. A backend asked for by name runs or raises.

        Returns:
            The samples [B, *x_dims]; with `return_all_steps`, all states [B, T, *x_dims], contiguous, of
            which the first is the noise, and the time steps [T]. With a callback a `Sample`, which says how far
            it came.

        Raises:
            TypeError: an argument, or what a function given returns, is of the wrong type or dtype.
            ValueError: a value, shape or device is wrong; or the time grid cannot be used.
            RuntimeError: the backend asked for by name cannot be used.
            ImportError: progress without tqdm.
        """
        if callable(device) or isinstance(device, torch.nn.Module):
            raise TypeError(
                "device must be a torch.device or a string, got a function: pass unguided_step_fn= by name "
                "(it is not the third positional argument here, as it is in Alpamayo 1.5)"
            )
        batch_size = count(batch_size, "batch_size")
        device = _resolved(device)
        if not callable(step_fn):
            raise TypeError(f"step_fn must be callable, got {step_fn!r:.60}")
        if guidance_form is None:
            guidance_form = self.guidance_form
        form = guidance.form(guidance_form)
        guided = weight = None
        if self.use_classifier_free_guidance if use_classifier_free_guidance is None else use_classifier_free_guidance:
            if not combined_guidance and unguided_step_fn is None:
                raise ValueError("unguided_step_fn is required when using classifier free guidance")
            if combined_guidance and (unguided_step_fn is not None or skip_irrelevant_model):
                other = "skip_irrelevant_model" if unguided_step_fn is None else "an unguided_step_fn"
                raise ValueError(f"combined_guidance, where step_fn returns both velocities, and {other}: pass one")
            if not combined_guidance and not callable(unguided_step_fn):
                raise TypeError(f"unguided_step_fn must be callable, got {unguided_step_fn!r:.60}")
            guided = Guided(form, unguided_step_fn, skip_irrelevant_model)
            if inference_guidance_weight is None:
                inference_guidance_weight = self.inference_guidance_weight
            weight = guidance.checked(inference_guidance_weight)
        elif combined_guidance:
            raise ValueError(
                "combined_guidance needs use_classifier_free_guidance=True: step_fn returns both velocities"
            )
        temperature = number(temperature, "temperature")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {generator!r:.60}")
        if constraint is not None and not callable(constraint):
            raise TypeError(f"constraint must be callable, got {constraint!r:.60}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r:.60}")
        over = _progress_bar() if progress else iter
        eager = dispatch.is_eager()
        cached = eager and not (device.type == "cuda" and dispatch.is_capturing())
        dtype = self._state_dtype(dtype, noise, batch_size, device)
        chosen = dispatch.choose(backend or self.backend, device.type)
        table = self._table(
            int_method or self.int_method,
            inference_step,
            time_steps,
            step_sizes,
            dtype,
            device,
            guidance_form,
            weight,
            cached,
        )

        clock = Clock.of(table, batch_size, len(self.x_dims), reuse=cached)
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # a context manager takes ten times as long
        try:
            state, trajectory, taken = integrate(
                table,
                # No name keeps it; and .data has no tangent, which would not follow the steps.
                self._noise(
                    batch_size,
                    device,
                    dtype,
                    noise.data if eager and noise is not None else noise,
                    generator,
                    temperature,
                ),
                clock.views,
                step_fn,
                chosen,
                eager,
                return_all_steps,
                guided,
                constraint,
                callback,
                over,
            )
        finally:
            torch._C._set_grad_enabled(grad)
        x = state if trajectory is None else trajectory
        if trajectory is None and callback is None:
            clock.back(table)
            return x
        time_steps = clock.times if len(clock.views) == taken + 1 else clock.times.narrow(0, 0, taken + 1)
        time_steps = time_steps.clone()
        clock.back(table)
        return (x, time_steps) if callback is None else Sample(x, time_steps, stopped=taken < table.steps)

    def nfe(self, inference_step: int | None = None, int_method: str | None = None, guided: bool | None = None) -> int:
        """The model calls that one sample() spends: evaluations, twice as many with guidance.

        Args:
            inference_step: Steps, as for sample(); of a time grid, one fewer than its entries.
            int_method: The solver, as for sample().
            guided: With guidance by two models; None: use_classifier_free_guidance. What skip_irrelevant_model
                saves is not known here; a step_fn that returns both velocities is one call: guided=False.

        Raises:
            TypeError: inference_step is not an int.
            ValueError: inference_step is negative, or there is no such solver.
        """
        steps = count(inference_step, "inference_step") if inference_step is not None else 0
        steps = steps or count(self.num_inference_steps, "num_inference_steps")
        guided = self.use_classifier_free_guidance if guided is None else guided
        return solvers.evaluations(int_method or self.int_method, steps) * (2 if guided else 1)

    def construct_training_data(self, x: Tensor) -> dict[str, Any]:
        """The training pair of conditional flow matching: noisy_x = t*x + (1 - t)*noise.

        Draws t, then the noise, then, with guidance, which conditions to drop; each from the default
        generator of its device ("beta": t on the CPU).

        Args:
            x: Data, [B, *x_dims].

        Returns:
            "x"; "noisy_x" [B, *x_dims]; "timesteps" [B, 1, ..., 1]; "noise" [B, *x_dims];
            "is_drop_guidance": bool [B] with use_classifier_free_guidance, else None.

        Source: arXiv 2210.02747, eq. 22, with sigma_min = 0.
        """
        if self.train_timestep_sampler == "uniform":
            t = torch.rand((x.shape[0],), device=x.device)
        else:
            t = self.beta_dist.sample((x.shape[0],)).to(x.device)
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
        if self.use_classifier_free_guidance:
            data["is_drop_guidance"] = torch.rand(x.shape[0], device=x.device) < self.train_ignore_guidance_rate
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
        x, noise = training_data["x"], training_data["noise"]
        if pred.shape != x.shape:
            raise ValueError(f"pred must have x's shape {list(x.shape)}, got {list(pred.shape)}")
        return torch.nn.functional.mse_loss((x - noise).to(pred.dtype), pred)

    def _state_dtype(
        self, dtype: torch.dtype | None, noise: Tensor | None, batch_size: int, device: torch.device
    ) -> torch.dtype:
        """The state's dtype, with `noise` checked against it, the batch and the device."""
        if noise is not None:
            if not isinstance(noise, Tensor):
                raise TypeError(f"noise must be a tensor {[batch_size, *self.x_dims]}, got {noise!r:.60}")
            if not noise.is_floating_point():
                raise TypeError(f"noise must be floating point, got {noise.dtype}")
            if noise.shape != (batch_size, *self.x_dims):
                wanted = [batch_size, *self.x_dims]
                raise ValueError(f"noise must be [batch_size, *x_dims] = {wanted}, got {list(noise.shape)}")
            if noise.device != device and (device.index is not None or noise.device.type != device.type):
                raise ValueError(f"noise is on {noise.device}, and device is {device}: move one to the other")
        if dtype is None:
            dtype = torch.get_default_dtype() if noise is None else noise.dtype
        if dtype not in VELOCITY_DTYPES:
            raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
        return dtype

    def _table(
        self,
        int_method: str,
        inference_step: int | None,
        time_steps: Tensor | Sequence[float] | None,
        step_sizes: Tensor | Sequence[float] | None,
        dtype: torch.dtype,
        device: torch.device,
        form: str,
        weight: Weight | None,
        cached: bool,
    ) -> Table:
        """The solver's table on the grid that the arguments describe, with the weights of guidance."""
        solvers.solver(int_method)
        steps = count(inference_step, "inference_step") if inference_step is not None else 0
        steps = steps or count(self.num_inference_steps, "num_inference_steps")
        arithmetic = arithmetic_dtype(dtype)
        predicts = None
        if self.prediction_type != "velocity":
            predicts = self.noise_at if self.prediction_type == "noise" else 1 - self.noise_at
        # A weight that is a function is asked at each sample(), and what it says is not kept.
        request = Request(
            int_method,
            self.time_grid if isinstance(self.time_grid, str) else "uniform",
            tuple(self.time_grid_options.items()) if self.time_grid_options else (),
            steps,
            torch.get_default_dtype(),
            arithmetic,
            device,
            self.noise_at,
            predicts,
            *(() if weight is None or callable(weight) else (form, weight, solvers.signs(weight))),
        )
        if time_steps is None and step_sizes is None and isinstance(self.time_grid, str):
            table = solvers.named(request, cached and request.is_itself())
            return table.guided(guidance.form(form), weight) if callable(weight) else table

        if time_steps is not None:
            grid = _grid(time_steps, "time_steps")
            if inference_step and steps != grid.numel() - 1:
                raise ValueError(
                    f"inference_step is {steps}, and time_steps has {grid.numel()} entries, "
                    f"{grid.numel() - 1} steps: pass one of them"
                )
        elif callable(self.time_grid) and steps:
            grid = _grid(self.time_grid(steps), "what time_grid returned")
            if grid.numel() != steps + 1:
                raise ValueError(f"time_grid returned {grid.numel()} entries for {steps} steps; wanted {steps + 1}")
        else:
            grid = request.grid()
        dt = torch.diff(grid) if step_sizes is None else _step_sizes(step_sizes, grid.numel() - 1).to(grid.device)
        table = solvers.build(int_method, grid, dt, arithmetic, device, self.noise_at, predicts)
        solvers.check_finite(table, int_method, self.noise_at)
        return table if weight is None else table.guided(guidance.form(form), weight)

    def _noise(
        self,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        noise: Tensor | None,
        generator: torch.Generator | None,
        temperature: float,
    ) -> Tensor:
        """The first state: contiguous, and nobody else's."""
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # an ordinary tensor: it counts the writes of a step_fn
                return self._noise(batch_size, device, dtype, noise, generator, temperature)
        if noise is not None and noise.dtype is dtype:
            state = noise.clone(memory_format=torch.contiguous_format)
        elif noise is not None:
            state = noise.to(dtype, memory_format=torch.contiguous_format)
        else:
            where = device if generator is None else generator.device
            state = torch.randn(batch_size, *self.x_dims, dtype=dtype, device=where, generator=generator)
            state = state.detach().to(device)  # whoever saw the draw keeps what it saw
        return state if temperature == 1.0 else state * temperature


_CPU = torch.device("cpu")


def _resolved(device: torch.device | str) -> torch.device:
    """The device, with its index: "cuda" means the current one, which may change later."""
    if device == "cpu":
        return _CPU
    if isinstance(device, int):
        raise TypeError(f"device must be a torch.device or a string, got {device}: pass inference_step= by name")
    try:
        device = torch.device(device)
    except TypeError:
        raise TypeError(f"device must be a torch.device or a string, got {device!r:.60}") from None
    except RuntimeError as error:
        raise ValueError(f"device must name a device, got {device!r:.60}: {str(error).splitlines()[0]}") from None
    if device.type != "cpu" and device.index is None:
        device = torch.empty(0, device=device).device
    return device


def _grid(time_steps: Tensor | Sequence[float], name: str) -> Tensor:
    try:
        grid = torch.as_tensor(time_steps).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor or a sequence of floats, got {time_steps!r:.60}") from None
    if not grid.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {grid.dtype}")
    if grid.dim() != 1 or grid.numel() < 2:
        raise ValueError(f"{name} must be 1-D with two or more entries, got shape {list(grid.shape)}")
    differences = torch.diff(grid)
    if not ((differences > 0).all() or (differences < 0).all()) or not grid.isfinite().all():
        raise ValueError(
            f"{name} must be finite and strictly monotonic, up or down, without NaN, got {grid.tolist()!s:.200}"
        )
    return grid


def _step_sizes(step_sizes: Tensor | Sequence[float], steps: int) -> Tensor:
    if not isinstance(step_sizes, Tensor):
        try:
            step_sizes = torch.tensor(step_sizes, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"step_sizes must be a tensor or a sequence of floats, got {step_sizes!r:.60}") from None
    if not step_sizes.is_floating_point():
        raise TypeError(f"step_sizes must be floating point, got {step_sizes.dtype}")
    if list(step_sizes.shape) != [steps]:
        raise ValueError(
            f"step_sizes must hold {steps} entries, one fewer than the time grid, got shape {list(step_sizes.shape)}"
        )
    if not step_sizes.isfinite().all():
        raise ValueError(f"step_sizes must be finite, got {step_sizes.tolist()!s:.200}")
    return step_sizes.detach()


def _progress_bar() -> Callable[[Sequence[Evaluation]], Iterable[Evaluation]]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return tqdm
