"""Converged samples of a model: what a solver's error is measured against, and what a solver is fitted to."""

from __future__ import annotations

import bisect
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import guidance
from .arguments import count, flag, own_dims
from .base import StepFn
from .ops.fused_step import double
from .solvers import FittedSolver

if TYPE_CHECKING:
    from .flow_matching import FlowMatching

OPTIONS = (
    "unguided_step_fn",
    "use_classifier_free_guidance",
    "inference_guidance_weight",
    "guidance_form",
    "combined_guidance",
    "skip_irrelevant_model",
    "step_rounding",
    "backend",
)
"""The arguments of sample() that shape the velocity."""

NOISE = ("noise", "temperature", "generator", "dtype")
"""Those that shape the noise."""

REFUSED = {
    "constraint": "a constraint changes the states between steps, so there is no converged trajectory to compare with. "
    "Leave it out here, and pass it to sample()",
    "callback": "pass it to sample()",
    "return_all_steps": "the last states are compared",
    "inference_step": "pass evaluations",
    "velocity_strength": "it is of Euler's step alone",
    "int_method": "pass reference, for the converged trajectory",
    "step_sizes": "the converged trajectory is an integral over time",
}
"""The others, with the reason."""

CONVERGED = 1e-3
"""By how much of their own RMS the reference's last states may change when it takes half as many steps."""


class Reference(NamedTuple):
    """How a converged trajectory is made."""

    solver: str
    grid: Mapping[str, Any]
    """What sample() takes: inference_step, or time_steps; an even number of steps."""
    every: int = 0
    """One state is kept of so many; it divides the steps. 0: only the last is kept."""
    place: torch.device | str | None = None
    """The device that the states are kept on; None: the noise's."""

    @property
    def steps(self) -> int:
        """How many."""
        grid = self.grid.get("time_steps")
        return int(self.grid["inference_step"]) if grid is None else len(grid) - 1


class Trajectory(NamedTuple):
    """A converged trajectory."""

    times: list[float]
    """K + 1 of them."""
    states: dict[int, Tensor]
    """By the index of the time, [B, *x_dims]."""
    change: float
    """RMS of the change of the last states when the reference takes half as many steps, in parts of their own RMS."""


class NotFiniteError(ValueError):
    """A velocity is infinite or NaN."""


class Problem:
    """One batch to integrate: a velocity field, and the noise to start from.

    Args:
        flow_matching: The sampler.
        step_fn: The velocity.
        noise: [B, *x_dims], the first states.
        options: Of sample(), some of `OPTIONS`.
    """

    def __init__(self, flow_matching: FlowMatching, step_fn: StepFn, noise: Tensor, options: Mapping[str, Any]) -> None:
        self.flow_matching, self.step_fn, self.noise, self.options = flow_matching, step_fn, noise, dict(options)

    def sample(self, noise: Tensor | None = None, **arguments: Any) -> Any:
        """Samples this problem, from its noise or another."""
        noise = self.noise if noise is None else noise
        return self.flow_matching.sample(
            len(noise), self.step_fn, noise.device, noise=noise, **(self.options | arguments)
        )

    def velocity(self, x: Tensor, time: float, end: float, **arguments: Any) -> tuple[Tensor, Tensor]:
        """The velocity at a state and a time, with guidance, or made of a prediction; and the state after the call.

        Both are [B, *x_dims], in x's dtype. The state is another one where step_fn wrote to it.

        Raises:
            NotFiniteError: the velocity is not finite.
        """
        # One row, 0*x + 1*v: the velocity as sample() checks, guides and converts it.
        once = FittedSolver((time, end), ((0.0, 1.0),), noise_at=self.flow_matching.noise_at)
        states, _ = self.sample(x, int_method=once, return_all_steps=True, **arguments)
        x, v = states.unbind(1)
        if not v.isfinite().all():
            raise NotFiniteError(f"the velocity at t = {time:g} is not finite: no solver can be fitted to it")
        return v, x

    def wide(self) -> Problem:
        """This problem with a float32 state, of which the models see what a 16-bit state would be."""
        dtype = self.noise.dtype
        if dtype.itemsize > 2:
            return self

        def narrow(step_fn: StepFn) -> StepFn:
            return lambda x, t: step_fn(x=x.to(dtype), t=t)

        options = dict(self.options)
        if options.get("unguided_step_fn") is not None:
            options["unguided_step_fn"] = narrow(options["unguided_step_fn"])
        return Problem(self.flow_matching, narrow(self.step_fn), self.noise.float(), options)

    def converged(self, reference: Reference) -> Trajectory:
        """The trajectory from the noise; of a 16-bit state in float32, where many small steps do not round to none.

        Raises:
            ValueError: its last states are not finite.
        """
        place = reference.place or self.noise.device
        wide = self.wide()
        states = {0: wide.noise.to(place)}

        def keep(step: int, t: Tensor, x: Tensor) -> None:
            if reference.every and (step + 1) % reference.every == 0:
                states[(step + 1) // reference.every] = x.to(place)

        x, grid, _ = wide.sample(int_method=reference.solver, callback=keep, **reference.grid)
        if not x.isfinite().all():
            raise ValueError(
                f"the reference, {reference.solver} with {reference.steps} steps, ends in values that are not finite. "
                "Where the velocity has no value at an end of time, a reference that does not evaluate there (ab3, "
                "midpoint), or time_steps that keep away from it, may help"
            )
        every = reference.every or reference.steps
        states[reference.steps // every] = x.to(place)
        coarse = wide.sample(int_method=reference.solver, time_steps=grid[::2])
        change = rms(x - coarse) / max(rms(x), 1e-30)
        return Trajectory(grid[::every].tolist(), states, change if change < math.inf else math.inf)  # NaN too


def problems(
    flow_matching: FlowMatching,
    step_fn: StepFn | None,
    batches: Iterable[StepFn | Mapping[str, Any]] | None,
    batch_size: int,
    device: torch.device | str,
    arguments: Mapping[str, Any],
) -> list[Problem]:
    """The problems that arguments describe: one of step_fn, or one for each batch.

    Args:
        flow_matching: The sampler.
        step_fn: The velocity; None with batches.
        batches: Each a step_fn, or a dict with "step_fn" and what differs from the other arguments: "unguided_step_fn",
            "noise", "batch_size".
        batch_size: B, where no noise is given.
        device: Where to sample.
        arguments: Others of sample(), of `OPTIONS` and `NOISE`. The weight of guidance is a number or a function.

    Raises:
        TypeError: an argument is unknown, or of the wrong type.
        ValueError: an argument is refused, or there is no batch.
    """
    for name in arguments:
        if name in REFUSED:
            raise ValueError(f"{name} is not taken here: {REFUSED[name]}")
        if name not in OPTIONS + NOISE:
            raise TypeError(f"unexpected argument {name!r} (of sample()'s: {', '.join(OPTIONS + NOISE)})")
    if (step_fn is None) == (batches is None):
        raise ValueError("pass step_fn, or batches, each with a step_fn of its own")
    if batches is not None and not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of step_fn or of dicts, got {batches!r:.60}")
    items = [step_fn] if batches is None else list(batches)
    if not items:
        raise ValueError("batches is empty")
    drawing = copy.copy(flow_matching)
    drawing.int_method, drawing.num_inference_steps = "euler", 0  # sample() then returns the noise
    generator = arguments.get("generator")
    if generator is None:  # the same noise at each call, and the default generator is left as it is
        generator = torch.Generator("cpu").manual_seed(0)
    shared = {name: arguments[name] for name in NOISE if name in arguments}
    made = []
    for item in items:
        own: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {"step_fn": item}
        if unknown := set(own) - {"step_fn", "unguided_step_fn", "noise", "batch_size"}:
            raise TypeError(f"a batch has step_fn, unguided_step_fn, noise and batch_size, got {sorted(unknown)}")
        both = {**arguments, **own}
        options = {name: both[name] for name in OPTIONS if name in both}
        noise = own.get("noise", arguments.get("noise"))
        size = own.get("batch_size", noise.size(0) if isinstance(noise, Tensor) and noise.dim() else batch_size)
        if count(size, "batch_size") == 0:
            raise ValueError("batch_size must be 1 or more, got 0")
        drawn = {"generator": generator} if noise is None else {}  # else noise says what it is drawn from
        start = drawing.sample(size, own.get("step_fn"), device, **(shared | drawn | {"noise": noise} | options))  # type: ignore[arg-type]
        made.append(Problem(flow_matching, own["step_fn"], start, options))
    return made


def guidance_weight(flow_matching: FlowMatching, arguments: Mapping[str, Any]) -> guidance.OfSteps | None:
    """The weight of guidance that arguments of sample() mean; None without guidance."""
    guided = arguments.get("use_classifier_free_guidance")
    guided = flow_matching.use_classifier_free_guidance if guided is None else guided
    if not flag(guided, "use_classifier_free_guidance"):
        return None
    weight = arguments.get("inference_guidance_weight")
    found = guidance.checked(flow_matching.inference_guidance_weight if weight is None else weight)
    if own_dims(found):
        raise ValueError("inference_guidance_weight of each sample is for sample(): fit and compare with one for all")
    return found


def held_weight(weights: Sequence[float], times: Sequence[float]) -> Callable[[float], float]:
    """Weights for each step of a time grid as a function of time: each holds from its step's start to its end."""
    ends = [(t - times[0]) / (times[-1] - times[0]) for t in times[1:-1]]

    def weight(t: float) -> float:
        return weights[bisect.bisect_right(ends, (t - times[0]) / (times[-1] - times[0]) + 1e-6)]  # float32 times

    return weight


def check_converged(change: float, steps: int, stacklevel: int) -> None:
    """Warns where a reference has not converged.

    Args:
        change: See `Trajectory`.
        steps: The reference's.
        stacklevel: Of the warning.
    """
    if not change <= CONVERGED:
        warnings.warn(
            f"the reference has not converged: with half of its {steps} steps the samples change by {change:.2g} of "
            f"their RMS, more than {CONVERGED:g}. Solvers are compared with what it gives: pass more "
            "reference_steps; or reference='midpoint' where the velocity jumps in time, as with a weight that does",
            stacklevel=stacklevel,
        )


def rms(x: Tensor) -> float:
    """The root mean square of all entries."""
    return float(double(x).square().mean().sqrt())
