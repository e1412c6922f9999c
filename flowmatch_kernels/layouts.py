"""Noise that is dense in another order of its dimensions, as channels_last: states that keep its format.

Eager PyTorch's x + dt * v keeps the format of x. Here the states are contiguous memory of the shape that the noise has
with its dimensions in the order of its memory, so that nothing that steps knows of formats; a model, a constraint and a
callback see them with the dimensions permuted back, and what they return is permuted likewise. That is a view both
ways: a velocity in the noise's format is read where it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import tracing
from .base import StepFn
from .hooks import Hooks, check
from .ops.subclasses import attempted
from .velocities import Velocities


class Layout(NamedTuple):
    """A dense format of a state, the batch first, other than contiguous."""

    order: tuple[int, ...]
    """The dimensions in the order of the memory: x.permute(order) is contiguous."""
    inverse: tuple[int, ...]
    """The permutation back."""

    def stored(self, x: Tensor) -> Tensor:
        """x, [B, *x_dims], as its memory lies: a view."""
        return x.permute(self.order)

    def seen(self, x: Tensor, differentiable: bool) -> Tensor:
        """A state as users see it, [B, *x_dims], in the noise's format: the same memory, and an object of its own."""
        x = x.permute(self.inverse)
        return x if differentiable else x.detach()  # detached it is no view to autograd, and its writes still count

    def settle(self, x: Tensor, seen: Tensor) -> None:
        """Gives x the place of what a user put into `seen`, as by x.data = y: `rows` notices it there."""
        if not tracing.is_eager():
            return
        now = x.permute(self.inverse)
        if (seen.data_ptr(), seen.shape, seen.stride()) != (now.data_ptr(), now.shape, now.stride()):
            x.data = self.stored(seen) if seen.dim() == x.dim() else seen

    def trajectory(self, states: Tensor) -> Tensor:
        """States [B, T, *stored dims] as [B, T, *x_dims], contiguous: a copy."""
        return states.permute(0, 1, *(k + 1 for k in self.inverse[1:])).contiguous()

    def applied(
        self, step_fn: StepFn, velocities: Velocities, hooks: Hooks | None
    ) -> tuple[StepFn, Velocities, Hooks | None]:
        """The model, its checks and the hooks for states as they are stored.

        Args:
            step_fn: The model; with guidance the guided one, or the one that returns both.
            velocities: The checks for states as users see them, which know the guidance.
            hooks: What the user does with each committed state.
        """
        guidance = velocities.guidance
        if guidance is None:
            step_fn = self._model(step_fn, velocities, "step_fn")
        elif guidance.unguided_step_fn is None:
            step_fn = self._model_of_both(step_fn, velocities)
        else:
            step_fn = self._model(step_fn, velocities, "step_fn")
            unguided = self._model(guidance.unguided_step_fn, velocities, "unguided_step_fn")
            guidance = guidance._replace(unguided_step_fn=unguided)
        shape = tuple(velocities.shape[k] for k in self.order)
        stored = Velocities(
            shape, velocities.dtype, velocities.device, guidance, velocities.weights, velocities.differentiable
        )
        return step_fn, stored, None if hooks is None else self._hooks(hooks, velocities)

    def _model(self, step_fn: StepFn, velocities: Velocities, name: str) -> StepFn:
        def model(x: Tensor, t: Tensor) -> Any:
            seen = self.seen(x, velocities.differentiable)
            v = step_fn(x=seen, t=t)
            self.settle(x, seen)
            if not velocities.plain(v, None):
                velocities.check(v, name)
                if not v.dim():  # promoted as a number, not as a tensor
                    return v
                v = v.expand(velocities.shape)
            return attempted("a velocity in the format of this noise", [v], lambda: self.stored(v))

        return model

    def _model_of_both(self, step_fn: StepFn, velocities: Velocities) -> StepFn:
        def model(x: Tensor, t: Tensor) -> Tensor:
            seen = self.seen(x, velocities.differentiable)
            both = step_fn(x=seen, t=t)
            self.settle(x, seen)
            v, _ = velocities.split(both)
            if not velocities.plain(v, None):
                velocities.check(v, "step_fn")
                both = both.expand(-1, *velocities.shape[1:])
            return self.stored(both)

        return model

    def _hooks(self, hooks: Hooks, velocities: Velocities) -> Hooks:
        constrain, call = hooks

        def constraint(x: Tensor, t: Tensor) -> Tensor:
            assert constrain is not None
            x = self.seen(x, velocities.differentiable)
            y = constrain(x, t)
            check(y, x)
            return self.stored(y)

        def callback(step: int, t: Tensor, x: Tensor) -> bool | None:
            assert call is not None
            return call(step, t, self.seen(x, velocities.differentiable))

        return Hooks(None if constrain is None else constraint, None if call is None else callback)


#: Other subclasses may have no strides of their own, or no permute.
_KEEP_A_FORMAT = (Tensor, torch.nn.Parameter, FakeTensor)


def of(noise: Tensor, own: int = 0) -> Layout | None:
    """The noise's format; None: contiguous states, also for noise that is not dense, or not batch first.

    Args:
        noise: [B, *x_dims].
        own: How many of the first dimensions have rows of their own in the table: they stay the first in memory.
    """
    if type(noise) not in _KEEP_A_FORMAT or noise.layout is not torch.strided or noise.is_contiguous():
        return None
    sizes, strides = noise.shape, noise.stride()

    def place(k: int) -> tuple[int, bool, int]:
        return -strides[k], sizes[k] == 1, k  # a size of 1 last among equal strides: it gets the stride it has

    order = (0, *sorted(range(1, noise.dim()), key=place))
    if order[:own] != tuple(range(own)) or not noise.permute(order).is_contiguous():
        return None
    return Layout(order, tuple(order.index(k) for k in range(noise.dim())))
