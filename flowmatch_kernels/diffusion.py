"""DDIM and DDPM: the samplers that flow matching is compared with, as tables of the same fused step.

With abar the running product of alpha = 1 - beta, x = sqrt(abar)*data + sqrt(1 - abar)*noise. What a network predicts
gives both ends of that line as linear functions of x and the prediction, and a step is linear in them: one row.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import noise as noises
from . import tracing
from .arguments import LARGEST, available_device, count, finite, flag, keeps_derivative
from .base import BaseDiffusion, StepFn
from .flow_matching import Sample
from .hooks import hooks_of
from .noise import KeyedNoise
from .ops import dispatch
from .ops.fused_step import COLUMNS, PROMOTE, arithmetic_dtype
from .sampling import solve
from .solvers import Evaluation, Table, table_for
from .step_functions import Bound, bound
from .training import check_data, mean_squared_error
from .velocities import Velocities

BETA_SCHEDULES = ("linear", "scaled_linear", "cosine")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("noise", "data", "v")
VARIANCES = ("fixed_small", "fixed_large")

Pair = tuple[Tensor, Tensor]  # the coefficients of x and of the prediction, [N]


class _Ends(NamedTuple):
    """The line that each of N steps begins on, and where the step ends."""

    now: Tensor
    """abar where it begins, [N]."""
    after: Tensor
    """abar where it ends, [N]."""
    data: Pair
    """The data in x and the prediction."""
    noise: Pair
    """The noise in x and the prediction."""


class _Step(NamedTuple):
    """x' = data*(predicted data) + noise*(predicted noise) + x*x + std*z, each [N]."""

    data: Tensor
    noise: Tensor
    x: Tensor
    std: Tensor


class _Clipped:
    """The network of one sample(), which returns clip(data) - kept*data, with data = a*x + b*prediction.

    A step clips the predicted data, and takes the predicted noise as it was, (x - sqrt(abar)*data)/sqrt(1 - abar). So
    the second term is the data's part in that noise, and the step is linear in x and in what this returns.

    Args:
        step_fn: Predicts what prediction_type says.
        velocities: Checks it.
        factors: a, b and kept, of each step.
        most: Clips to [-most, most].
    """

    def __init__(
        self, step_fn: StepFn, velocities: Velocities, factors: Sequence[tuple[float, float, float]], most: float
    ) -> None:
        self.step_fn = step_fn
        self.velocities = velocities
        self.factors = iter(factors)
        self.most = most

    def __call__(self, *, x: Tensor, t: Tensor) -> Tensor:
        prediction = self.step_fn(x=x, t=t)
        self.velocities.check(prediction, "step_fn")
        a, b, kept = next(self.factors)
        wide = arithmetic_dtype(x.dtype)
        data = a * x.to(wide) + b * prediction.to(wide)
        return (data.clamp(-self.most, self.most) - kept * data).to(x.dtype)


class _Diffusion(BaseDiffusion):
    """What `DDIM` and `DDPM` share: the noise schedule, and sample()."""

    def __init__(
        self,
        x_dims: int | Sequence[int],
        num_inference_steps: int,
        num_train_timesteps: int,
        beta_start: float,
        beta_end: float,
        beta_schedule: str,
        timestep_spacing: str,
        steps_offset: int,
        prediction_type: str,
        clip_sample_range: float | None,
        backend: str,
    ) -> None:
        super().__init__(x_dims)
        _known(beta_schedule, "beta_schedule", BETA_SCHEDULES)
        _known(timestep_spacing, "timestep_spacing", SPACINGS)
        _known(prediction_type, "prediction_type", PREDICTIONS)
        self.num_train_timesteps = count(num_train_timesteps, "num_train_timesteps")
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps must be at least 2, got {num_train_timesteps}")
        start, end = finite(beta_start, "beta_start"), finite(beta_end, "beta_end")
        if not 0 < start <= end < 1:
            raise ValueError(f"wanted 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        self.timestep_spacing = timestep_spacing
        self.steps_offset = count(steps_offset, "steps_offset")
        self.prediction_type = prediction_type
        self.clip_sample_range = None
        if clip_sample_range is not None:
            self.clip_sample_range = finite(clip_sample_range, "clip_sample_range")
            if self.clip_sample_range <= 0:
                raise ValueError(f"clip_sample_range must be above 0, got {clip_sample_range}")
        self.backend = dispatch.check_name(backend)
        self.alphas_cumprod = torch.cumprod(1 - _betas(beta_schedule, self.num_train_timesteps, start, end), 0)
        """abar at each training timestep, [num_train_timesteps], float64."""
        self.num_inference_steps = self._checked_steps(num_inference_steps, "num_inference_steps")

    def sample(
        self,
        batch_size: int,
        step_fn: StepFn,
        device: torch.device | str = "cpu",
        return_all_steps: bool = False,
        inference_step: int | None = None,
        *,
        noise: Tensor | KeyedNoise | Sequence[KeyedNoise] | Sequence[torch.Generator] | None = None,
        generator: torch.Generator | None = None,
        step_noise: Tensor | KeyedNoise | Sequence[KeyedNoise] | Sequence[torch.Generator] | None = None,
        dtype: torch.dtype | None = None,
        constraint: Callable[[Tensor, Tensor], Tensor] | None = None,
        callback: Callable[[int, Tensor, Tensor], bool | None] | None = None,
        differentiable: bool | None = None,
    ) -> Any:
        """Samples from noise to data: one evaluation and one launch a step.

        Args:
            batch_size: B.
            step_fn: The network, called as step_fn(x=x, t=t) with x [B, *x_dims] and the training timestep t
                [B, 1, ..., 1], a whole number in torch's default dtype (t.flatten().long() for an embedding); returns
                what prediction_type says, [B, *x_dims]. Guidance: combine the predictions in it. A model that wants
                the timestep otherwise, or the number of the step: `flowmatch_kernels.StepFunction`. Unless
                differentiable is True it runs without grad: one that takes gradients itself needs torch.enable_grad().
            device: Where to sample.
            return_all_steps: Return the trajectory too.
            inference_step: Steps; None or 0: num_inference_steps.
            noise, generator, step_noise, dtype, constraint, callback: As for `FlowMatching.sample`. A constraint
                changes the states; clip_sample_range clips the predicted data within each step.
            differentiable: True: keep the derivative of the loop; with respect to step_noise it raises. None: as False,
                but where a derivative is asked for (torch.func.grad, jvp, ..., or noise that requires grad), it raises.

        Returns:
            The samples [B, *x_dims]; with return_all_steps, all states [B, T, *x_dims] and the timesteps [T], of which
            the last is -1, the data. With a callback a `Sample`.

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: a value or a shape is wrong.
            RuntimeError: the device or the backend is not available.
        """
        batch_size = count(batch_size, "batch_size", most=None)
        if tracing.is_eager() and batch_size > LARGEST:
            count(batch_size, "batch_size")
        device = available_device(device)
        if not callable(step_fn):
            raise TypeError(f"step_fn must be callable, got {step_fn!r:.60}")
        hooks = hooks_of(constraint, callback)
        flag(return_all_steps, "return_all_steps")
        source, start = noises.source(noise, batch_size, generator)
        differentiable = keeps_derivative(differentiable, start, step_noise=step_noise)
        shape = (batch_size, *self.x_dims)
        dtype = noises.state_dtype(dtype, start, shape, device)
        steps = self.num_inference_steps
        if inference_step:
            steps = self._checked_steps(inference_step, "inference_step")
        table = table_for(_Request(self, steps, dtype, device), cached=tracing.is_eager())
        backend = dispatch.choose(self.backend, device.type).name
        added = None
        adding = "steps that add noise (all but the last, of DDPM, or DDIM with eta > 0), and there are none"
        drawing = noises.step_noise(step_noise, source, shape, table, device, adding)
        if table.noise is not None:
            added = noises.StepNoise(*drawing, shape, arithmetic_dtype(dtype), device, backend, None)
        if start is None:
            start = noises.drawn(source, shape, dtype, device, backend, None)
        functions: list[Bound] = []
        step_fn = bound(step_fn, functions)
        if self.clip_sample_range is not None:
            velocities = Velocities(shape, dtype, device, differentiable=differentiable)
            step_fn = _Clipped(step_fn, velocities, self._clipping(steps), self.clip_sample_range)
        rows, state, taken = solve(
            *(table, step_fn, start.to(dtype), PROMOTE, differentiable, return_all_steps),
            hooks=hooks,
            noise=added,
            backend=self.backend,
            functions=functions,
        )
        x = rows.trajectory(state, taken) if return_all_steps else rows.result(state)
        if callback is not None:
            return Sample(x, rows.time_steps(taken), stopped=taken < steps)
        return (x, rows.time_steps(taken)) if return_all_steps else x

    def construct_training_data(self, x: Tensor) -> dict[str, Any]:
        """The training pair of diffusion: noisy_x = sqrt(abar)*x + sqrt(1 - abar)*noise.

        Draws the timesteps evenly, from the CPU's default generator, then the noise, from that of x's device.

        Args:
            x: Data, [B, *x_dims], floating point.

        Returns:
            "x"; "noisy_x" [B, *x_dims]; "timesteps" [B, 1, ..., 1], whole numbers in torch's default dtype, as
            sample() passes them; "noise" [B, *x_dims]; "target" [B, *x_dims], what prediction_type says: the noise, x,
            or v = sqrt(abar)*noise - sqrt(1 - abar)*x.

        Raises:
            TypeError: x is no floating-point tensor, or is sparse or nested.
            ValueError: x has no dimension.

        Source: arXiv 2006.11239, algorithm 1; v: arXiv 2202.00512, sec. 4.
        """
        check_data(x)
        t = torch.randint(self.num_train_timesteps, (x.shape[0],), device="cpu")
        column = (-1, *[1] * (x.dim() - 1))
        bar = self.alphas_cumprod[t].view(column)
        root, rest = (part.to(x.device, x.dtype) for part in (bar.sqrt(), (1 - bar).sqrt()))
        noise = torch.randn_like(x)
        target = noise if self.prediction_type == "noise" else x
        if self.prediction_type == "v":
            target = root * noise - rest * x
        return {
            "x": x,
            "noisy_x": root * x + rest * noise,
            "timesteps": t.to(x.device, torch.get_default_dtype()).view(column),
            "noise": noise,
            "target": target,
        }

    def compute_loss_from_pred(self, training_data: dict[str, Any], pred: Tensor) -> Tensor:
        """The mean squared error of a prediction against its target, in pred's dtype.

        Args:
            training_data: What `construct_training_data` returned.
            pred: The prediction, [B, *x_dims].

        Raises:
            ValueError: pred has another shape than x.
        """
        return mean_squared_error(pred, training_data["target"])

    def timesteps(self, steps: int) -> list[int]:
        """The training timesteps that so many steps evaluate at, the noisiest first."""
        all_ = self.num_train_timesteps
        if self.timestep_spacing == "leading":
            found = [k * (all_ // steps) + self.steps_offset for k in reversed(range(steps))]
        elif self.timestep_spacing == "trailing":
            found = [round(all_ - k * all_ / steps) - 1 for k in range(steps)]
        else:
            found = [round(k * (all_ - 1) / max(steps - 1, 1)) for k in reversed(range(steps))]
            found = found if steps > 1 else [0]
        if found[0] >= all_:
            raise ValueError(f"steps_offset {self.steps_offset} leads to the timestep {found[0]}, of {all_}")
        return found

    def table(self, steps: int, dtype: torch.dtype, device: torch.device) -> Table:
        """The table of so many steps, for a state of this dtype."""
        return _Request(self, steps, dtype, device).make()

    def _made_of(self, steps: int) -> tuple[Sequence[int], _Ends, _Step]:
        """The timesteps at which so many steps begin, and the steps."""
        at = self.timesteps(steps)
        ends = self._ends(at)
        return at, ends, self._step(at, ends.now, ends.after)

    def _rows(self, steps: int) -> tuple[Sequence[int], list[list[float]]]:
        """The timesteps, and of each step a, b0 and the standard deviation of its noise."""
        with tracing.suspended():  # numbers, whatever mode is at work
            at, ends, step = self._made_of(steps)
            if self.clip_sample_range is None:
                a, b0 = (step.data * x0 + step.noise * e for x0, e in zip(ends.data, ends.noise, strict=True))
            else:  # of x and of what `_Clipped` returns
                a, b0 = step.noise / (1 - ends.now).sqrt(), step.data
            return at, torch.stack([a + step.x, b0, step.std], dim=1).tolist()

    def _clipping(self, steps: int) -> list[tuple[float, float, float]]:
        """The factors of `_Clipped`."""
        with tracing.suspended():
            _, ends, step = self._made_of(steps)
            kept = step.noise / step.data * (ends.now / (1 - ends.now)).sqrt()
            return list(zip(*(column.tolist() for column in (*ends.data, kept)), strict=True))

    def _settings(self) -> tuple[Any, ...]:
        """What a table is made of, beside alphas_cumprod and the timesteps."""
        return self.num_train_timesteps, self.prediction_type, self.clip_sample_range is not None

    def _ends(self, at: Sequence[int]) -> _Ends:
        """The steps that begin at these timesteps."""
        now = self.alphas_cumprod[at]
        before = torch.tensor(self._before(at), device="cpu")
        after = torch.where(before >= 0, self.alphas_cumprod[before.clamp(min=0)], self._last())
        root, rest = now.sqrt(), (1 - now).sqrt()
        zero, one = torch.zeros_like(now), torch.ones_like(now)
        data, noise = {
            "noise": ((1 / root, -rest / root), (zero, one)),
            "data": ((zero, one), (1 / rest, -root / rest)),
            "v": ((root, -rest), (rest, root)),
        }[self.prediction_type]
        return _Ends(now, after, data, noise)

    def _before(self, at: Sequence[int]) -> list[int]:
        """The timestep that each step ends at; below 0: the data."""
        raise NotImplementedError

    def _last(self) -> Tensor:
        """abar where a step ends at the data."""
        return torch.ones((), dtype=torch.float64, device="cpu")

    def _step(self, at: Sequence[int], now: Tensor, after: Tensor) -> _Step:
        """What each step is made of.

        Args:
            at: The timestep at which each step begins.
            now: abar where each step begins, [N].
            after: abar where it ends, [N].
        """
        raise NotImplementedError

    def _checked_steps(self, steps: int, name: str) -> int:
        steps = count(steps, name)
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"{name} must be in [1, {self.num_train_timesteps}], got {steps}")
        self.timesteps(steps)
        return steps


class _Request(NamedTuple):
    """What describes a table, for `solvers.table_for`."""

    of: _Diffusion
    steps: int
    dtype: torch.dtype
    """The state's."""
    device: torch.device

    def key(self) -> Hashable:
        """See `solvers.Request.key`."""
        bars = self.of.alphas_cumprod
        if bars.device.type != "cpu" or not bars.is_contiguous() or bars.is_neg():
            return None
        values = bars.dtype, ctypes.string_at(bars.data_ptr(), bars.nbytes)  # no op, which a mode would see
        made_of = type(self.of), *values, tuple(self.of.timesteps(self.steps)), *self.of._settings()
        return *made_of, arithmetic_dtype(self.dtype), self.device, torch.get_default_dtype()

    def tensors(self) -> tuple[Tensor, ...]:
        """See `solvers.Request.tensors`: none."""
        return ()

    def make(self, check: bool = False) -> Table:
        """The table."""
        at, rows = self.of._rows(self.steps)
        adds = [std > 0 for _, _, std in rows]
        nothing = [0.0] * (len(COLUMNS) - 3)
        coefficients = torch.tensor([row + nothing for row in rows], dtype=torch.float64, device="cpu")
        return Table(
            evaluations=tuple(Evaluation(k, True, (0,) if add else ()) for k, add in enumerate(adds)),
            times=torch.tensor([*at, -1], dtype=torch.get_default_dtype(), device="cpu").to(self.device),
            coefficients=coefficients.to(arithmetic_dtype(self.dtype)).to(self.device),
            steps=self.steps,
            buffers=int(any(adds)),
            noise=0 if any(adds) else None,
        )


class DDIM(_Diffusion):
    """Denoising diffusion implicit models, for networks that were trained on a noise schedule of discrete timesteps.

        x' = sqrt(abar')*data + sqrt(1 - abar' - std^2)*noise + std*z
        std = eta*sqrt((1 - abar')/(1 - abar))*sqrt(1 - abar/abar')

    Args:
        x_dims: The shape of one sample: an int or a sequence of ints.
        num_inference_steps: Steps.
        num_train_timesteps: How many timesteps the network was trained on.
        beta_start, beta_end: Of the schedules "linear" and "scaled_linear".
        beta_schedule: "linear"; "scaled_linear", linear in the square root (Stable Diffusion); or "cosine", of arXiv
            2102.09672.
        timestep_spacing: "leading", "trailing" or "linspace": arXiv 2305.08891, table 2.
        steps_offset: Added to the timesteps with "leading" (Stable Diffusion: 1).
        prediction_type: What step_fn predicts: the "noise", the "data", or "v" (arXiv 2202.00512).
        clip_sample_range: Each step clips the predicted data to [-clip_sample_range, clip_sample_range], and takes the
            predicted noise as it is: diffusers' clip_sample. None: no clipping.
        eta: 0: no noise is added; 1: as much as DDPM.
        set_alpha_to_one: The last step ends at abar = 1; False: at that of timestep 0 (Stable Diffusion).
        backend: "auto", "triton", "cuda", "cpu" or "reference".

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value that cannot be used.

    Example:
        >>> from flowmatch_kernels import DDIM
        >>> ddim = DDIM((64, 2), num_inference_steps=20)
        >>> ddim.sample(6, lambda x, t: 0.1 * x).shape
        torch.Size([6, 64, 2])

    A step ends num_train_timesteps // num_inference_steps before it begins, as in diffusers: where that is no whole
    share, not quite at the next timestep.

    Source: arXiv 2010.02502, eq. 12 and 16.
    """

    def __init__(
        self,
        x_dims: int | Sequence[int],
        num_inference_steps: int = 50,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        prediction_type: str = "noise",
        clip_sample_range: float | None = None,
        eta: float = 0.0,
        set_alpha_to_one: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            *(x_dims, num_inference_steps, num_train_timesteps, beta_start, beta_end, beta_schedule),
            *(timestep_spacing, steps_offset, prediction_type, clip_sample_range, backend),
        )
        self.eta = finite(eta, "eta")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {eta}")
        self.set_alpha_to_one = flag(set_alpha_to_one, "set_alpha_to_one")

    def _settings(self) -> tuple[Any, ...]:
        return *super()._settings(), float(self.eta), self.set_alpha_to_one

    def _before(self, at: Sequence[int]) -> list[int]:
        return [t - self.num_train_timesteps // len(at) for t in at]

    def _last(self) -> Tensor:
        return super()._last() if self.set_alpha_to_one else self.alphas_cumprod[0]

    def _step(self, at: Sequence[int], now: Tensor, after: Tensor) -> _Step:
        variance = self.eta**2 * (1 - after) / (1 - now) * (1 - now / after)
        return _Step(after.sqrt(), (1 - after - variance).clamp(min=0).sqrt(), torch.zeros_like(now), variance.sqrt())


class DDPM(_Diffusion):
    """Denoising diffusion probabilistic models: each step draws from the posterior.

        x' = sqrt(abar')*beta/(1 - abar)*data + sqrt(alpha)*(1 - abar')/(1 - abar)*x + std*z,  alpha = abar/abar'

    Args:
        x_dims: As for `DDIM`, and so are num_inference_steps, num_train_timesteps, beta_start, beta_end, beta_schedule,
            timestep_spacing, steps_offset, prediction_type, clip_sample_range and backend.
        variance_type: std^2 is "fixed_small", (1 - abar')/(1 - abar)*beta, or "fixed_large", beta = 1 - alpha.
            No noise is added at timestep 0.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value that cannot be used.

    Example:
        >>> from flowmatch_kernels import DDPM
        >>> ddpm = DDPM((64, 2), num_inference_steps=100)
        >>> ddpm.sample(6, lambda x, t: 0.1 * x).shape
        torch.Size([6, 64, 2])

    Source: arXiv 2006.11239, eq. 6, 7 and 11.
    """

    def __init__(
        self,
        x_dims: int | Sequence[int],
        num_inference_steps: int = 1000,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        prediction_type: str = "noise",
        clip_sample_range: float | None = None,
        variance_type: str = "fixed_small",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            *(x_dims, num_inference_steps, num_train_timesteps, beta_start, beta_end, beta_schedule),
            *(timestep_spacing, steps_offset, prediction_type, clip_sample_range, backend),
        )
        _known(variance_type, "variance_type", VARIANCES)
        self.variance_type = variance_type

    def _settings(self) -> tuple[Any, ...]:
        return *super()._settings(), self.variance_type

    def _before(self, at: Sequence[int]) -> list[int]:
        return [*at[1:], -1]

    def _step(self, at: Sequence[int], now: Tensor, after: Tensor) -> _Step:
        alpha = now / after
        beta = 1 - alpha
        variance = beta if self.variance_type == "fixed_large" else (1 - after) / (1 - now) * beta
        variance = variance * torch.tensor([float(t > 0) for t in at], dtype=torch.float64, device="cpu")
        to_data, to_x = after.sqrt() * beta / (1 - now), alpha.sqrt() * (1 - after) / (1 - now)
        return _Step(to_data, torch.zeros_like(now), to_x, variance.sqrt())


def _known(value: Any, name: str, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be {', '.join(map(repr, known))}, got {value!r:.60}")


def _betas(schedule: str, n: int, start: float, end: float) -> Tensor:
    """beta at each training timestep, [n], float64."""
    if schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float64, device="cpu")
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64, device="cpu") ** 2
    bars = [math.cos((k / n + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(n + 1)]
    return torch.tensor([min(1 - bars[k + 1] / bars[k], 0.999) for k in range(n)], dtype=torch.float64, device="cpu")
