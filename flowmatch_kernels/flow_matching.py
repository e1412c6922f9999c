"""`FlowMatching`: the sampler that users call."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import solvers
from .base import BaseDiffusion, StepFn
from .ops import dispatch
from .ops.fused_step import VELOCITY_DTYPES, arithmetic_dtype
from .sampling import integrate
from .solvers import Evaluation, Table


class FlowMatching(BaseDiffusion):
    r"""Flow matching: learns a velocity field v(x, t), samples by integrating dx/dt = v.

    Time runs from noise at t = 0 to data at t = 1. One Euler step is x' = x + dt * v(x, t), and every
    backend gives the bits of the eager PyTorch loop.

    Args:
        x_dims: The shape of one sample: an int or a sequence of ints.
        int_method: The solver; see `flowmatch_kernels.solvers`.
        num_inference_steps: Steps on the uniform grid; 0 returns the noise.
        train_timestep_sampler: "beta" (t = 0.999 - 0.999 * Beta(1.5, 1), as in pi-zero) or "uniform".
        train_ignore_guidance_rate: How often training drops the condition, with guidance on.
        inference_guidance_weight: w in v = (1 - w) * v_unguided + w * v_guided.
        use_classifier_free_guidance: Sample with guidance by default.
        prediction_type: What step_fn returns: the "velocity", the "data" x1, or the "noise" x0. Of the straight
            path x = (1 - t)*x0 + t*x1, v = (x1 - x) / (1 - t) = (x - x0) / t; folded into the table.
        noise_at: The end of time at which the noise is: 0, or 1, where the uniform grid runs from 1 to 0.
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
        inference_guidance_weight: float = 1.0,
        use_classifier_free_guidance: bool = False,
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
        self.num_inference_steps = _count(num_inference_steps, "num_inference_steps")
        if train_timestep_sampler not in ("beta", "uniform"):
            raise ValueError(f"train_timestep_sampler must be 'beta' or 'uniform', got {train_timestep_sampler!r}")
        self.train_timestep_sampler = train_timestep_sampler
        self.train_ignore_guidance_rate = train_ignore_guidance_rate
        self.inference_guidance_weight = inference_guidance_weight
        self.use_classifier_free_guidance = use_classifier_free_guidance
        self.backend = dispatch.check_name(backend)
        if train_timestep_sampler == "beta":
            # On the CPU, in float32, whatever the defaults are while a model is being built.
            self.beta_dist = torch.distributions.Beta(
                torch.tensor(1.5, dtype=torch.float32, device="cpu"),
                torch.tensor(1.0, dtype=torch.float32, device="cpu"),
            )
            self.beta_scale_constant = 0.999

    @torch.no_grad()
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
        inference_guidance_weight: float | None = None,
        temperature: float = 1.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        time_steps: Tensor | Sequence[float] | None = None,
        step_sizes: Tensor | Sequence[float] | None = None,
        progress: bool = False,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
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
            use_classifier_free_guidance: None: the constructor's.
            inference_guidance_weight: w; None: the constructor's.
            temperature: Multiplies the noise.
            noise: [B, *x_dims], floating point, on `device`: the start, instead of a draw. Never written.
            generator: For the draw. A CPU generator with a GPU device draws on the CPU and moves.
            dtype: The state's: float32, float64, bfloat16 or float16. None: the noise's, or torch's default.
                A bfloat16 state rounds each product and each sum to bfloat16.
            time_steps: [T], strictly monotonic, up or down, instead of the uniform grid; step_fn sees
                its dtype.
            step_sizes: [T - 1], the dt of each step, instead of the differences of the time grid.
            progress: Show a bar over the evaluations (needs tqdm).
            backend: None: the constructor's. A backend asked for by name runs or raises.

        Returns:
            The samples [B, *x_dims]; with `return_all_steps`, all states [B, T, *x_dims], contiguous, of
            which the first is the noise, and the time steps [T].

        Raises:
            TypeError: an argument, or what step_fn returns, is of the wrong type or dtype.
            ValueError: a value, shape or device is wrong.
            RuntimeError: the backend asked for by name cannot be used.
            ImportError: progress without tqdm.
        """
        if callable(device) or isinstance(device, torch.nn.Module):
            raise TypeError(
                "device must be a torch.device or a string, got a function: pass unguided_step_fn= by name "
                "(it is not the third positional argument here, as it is in Alpamayo 1.5)"
            )
        batch_size = _count(batch_size, "batch_size")
        device = _resolved(device)
        if not callable(step_fn):
            raise TypeError(f"step_fn must be callable, got {step_fn!r:.60}")
        if use_classifier_free_guidance is None:
            use_classifier_free_guidance = self.use_classifier_free_guidance
        weight = None
        if use_classifier_free_guidance:
            if unguided_step_fn is None:
                raise ValueError("unguided_step_fn is required when using classifier free guidance")
            if not callable(unguided_step_fn):
                raise TypeError(f"unguided_step_fn must be callable, got {unguided_step_fn!r:.60}")
            weight = self.inference_guidance_weight if inference_guidance_weight is None else inference_guidance_weight
            weight = _number(weight, "inference_guidance_weight")
        else:
            unguided_step_fn = None
        temperature = _number(temperature, "temperature")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {generator!r:.60}")
        over = _progress_bar() if progress else iter
        dtype = self._state_dtype(dtype, noise, batch_size, device)
        chosen = dispatch.choose(backend or self.backend, device.type)
        table = self._table(
            int_method or self.int_method, inference_step, time_steps, step_sizes, dtype, device, weight
        )

        clock = table.times.clone()  # step_fn may write to t, and the caller to what is returned
        ones = [1] * len(self.x_dims)
        times = clock.view(-1, 1, *ones).expand(-1, batch_size, *ones).unbind()
        state, trajectory = integrate(
            table,
            self._noise(batch_size, device, dtype, noise, generator, temperature),  # and no name keeps it
            times,
            step_fn,
            chosen,
            return_all_steps,
            unguided_step_fn,
            1.0 if weight is None else weight,
            over,
        )
        return state if trajectory is None else (trajectory, clock.narrow(0, 0, table.steps + 1))

    def nfe(self, inference_step: int | None = None, int_method: str | None = None, guided: bool | None = None) -> int:
        """The model calls that one sample() spends: evaluations, twice as many with guidance.

        Args:
            inference_step: Steps, as for sample(); of a time grid, one fewer than its entries.
            int_method: The solver, as for sample().
            guided: With guidance; None: use_classifier_free_guidance.
        """
        steps = _count(inference_step, "inference_step") if inference_step is not None else 0
        steps = steps or _count(self.num_inference_steps, "num_inference_steps")
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
            shape = [batch_size, *self.x_dims]
            if not isinstance(noise, Tensor):
                raise TypeError(f"noise must be a tensor {shape}, got {noise!r:.60}")
            if not noise.is_floating_point():
                raise TypeError(f"noise must be floating point, got {noise.dtype}")
            if list(noise.shape) != shape:
                raise ValueError(f"noise must be [batch_size, *x_dims] = {shape}, got {list(noise.shape)}")
            same = noise.device.type == device.type
            if not same or (device.type != "cpu" and device.index not in (None, noise.device.index)):
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
        weight: float | None,
    ) -> Table:
        """The solver's table on the grid that the arguments describe."""
        solvers.solver(int_method)
        steps = _count(inference_step, "inference_step") if inference_step is not None else 0
        steps = steps or _count(self.num_inference_steps, "num_inference_steps")
        arithmetic = arithmetic_dtype(dtype)
        predicts = {"velocity": None, "data": 1 - self.noise_at, "noise": self.noise_at}[self.prediction_type]
        if time_steps is None and step_sizes is None:
            return solvers.uniform(
                int_method,
                steps,
                torch.get_default_dtype(),
                arithmetic,
                device,
                weight,
                self.noise_at,
                predicts,
                dispatch.may_cache(),
            )
        if time_steps is None:
            grid = torch.linspace(float(self.noise_at), 1.0 - self.noise_at, steps + 1, device=device)
        else:
            grid = _grid(time_steps)
            if inference_step and steps != grid.numel() - 1:
                raise ValueError(
                    f"inference_step is {steps}, and time_steps has {grid.numel()} entries, "
                    f"{grid.numel() - 1} steps: pass one of them"
                )
        dt = torch.diff(grid) if step_sizes is None else _step_sizes(step_sizes, grid.numel() - 1).to(grid.device)
        return solvers.build(int_method, grid, dt, arithmetic, device, weight, self.noise_at, predicts)

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
        # An ordinary tensor even under inference mode: it counts the writes of a step_fn.
        inferring = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if inferring else contextlib.nullcontext():
            if noise is None:
                where = device if generator is None else generator.device
                state = torch.randn(batch_size, *self.x_dims, dtype=dtype, device=where, generator=generator)
                state = state.to(device)
            else:
                state = noise.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
            return state if temperature == 1.0 else state * temperature


def _resolved(device: torch.device | str) -> torch.device:
    """The device, with its index: "cuda" means the current one, which may change later."""
    try:
        device = torch.device(device)
    except TypeError:
        raise TypeError(f"device must be a torch.device or a string, got {device!r:.60}") from None
    if device.type != "cpu" and device.index is None:
        device = torch.empty(0, device=device).device
    return device


def _count(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r:.60}") from None
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {count}")
    return count


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r:.60}") from None


def _grid(time_steps: Tensor | Sequence[float]) -> Tensor:
    try:
        grid = torch.as_tensor(time_steps).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"time_steps must be a tensor or a sequence of floats, got {time_steps!r:.60}") from None
    if not grid.is_floating_point():
        raise TypeError(f"time_steps must be floating point, got {grid.dtype}")
    if grid.dim() != 1 or grid.numel() < 2:
        raise ValueError(f"time_steps must be 1-D with two or more entries, got shape {list(grid.shape)}")
    differences = torch.diff(grid)
    if not ((differences > 0).all() or (differences < 0).all()) or not grid.isfinite().all():
        raise ValueError(
            f"time_steps must be finite and strictly monotonic, up or down, without NaN, got {grid.tolist()!s:.200}"
        )
    return grid


def _step_sizes(step_sizes: Tensor | Sequence[float], steps: int) -> Tensor:
    if not isinstance(step_sizes, Tensor):
        step_sizes = torch.tensor(step_sizes, dtype=torch.float64)
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
