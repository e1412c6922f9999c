"""What a model returned: evaluating it, with or without guidance, and checking the velocities against the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import expands
from .base import StepFn
from .guidance import Form, eager_velocity
from .ops import native
from .ops.fused_step import VELOCITY_DTYPES

#: (rows, state, time, row) -> the velocity and None, or the guided and the unguided one, as the models return them.
Model = Callable[[Any, Any, int, int], tuple[Any, Any]]


class Guidance(NamedTuple):
    """How sample() was asked to guide."""

    form: Form
    unguided_step_fn: StepFn | None
    """None: step_fn returns both velocities, cat([unguided, guided])."""
    skip: bool = False
    """Do not call a model that the weight makes irrelevant."""
    guided_first: bool = False
    """step_fn returns cat([guided, unguided])."""


class Velocities:
    """Checks velocities against the state that they are for.

    Args:
        shape, dtype, device: The state's.
        guidance: With guidance, its form.
        weights: With guidance, the weight of each row.
        differentiable: Keep what autograd knows of the velocities.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        guidance: Guidance | None = None,
        weights: Sequence[float] = (),
        differentiable: bool = False,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.guidance = guidance
        self.weights = weights
        self.differentiable = differentiable

    def plain(self, v: Tensor, u: Tensor | None) -> bool:
        """Whether a backend can read both: plain tensors of the state's shape, device and a dtype that is not wider."""
        return self._plain(v) and (u is None or (self._plain(u) and u.dtype is v.dtype))

    def _plain(self, v: Tensor) -> bool:
        return (
            type(v) is Tensor
            and not v.is_nested
            and v.shape == self.shape
            and v.dtype in VELOCITY_DTYPES[self.dtype]
            and v.device == self.device
            and v.layout is torch.strided
        )

    def checked(self, v: Any, u: Any, row: int) -> tuple[Tensor, Tensor | None]:
        """The velocities, expanded to the state's shape; two of different dtypes, combined, and None.

        Raises:
            TypeError: one is no tensor, or of a dtype that cannot be a velocity for this state.
            ValueError: its shape does not expand to the state's, or it is on another device.
        """
        if self.plain(v, u):
            return v, u
        self.check(v, "step_fn")
        if u is None:
            return self.expanded(v), None
        self.check(u, "unguided_step_fn")
        if v.dtype == u.dtype and v.dim() and u.dim():
            return self.expanded(v), self.expanded(u)
        # Eager PyTorch's own promotion, which takes a 0-dim tensor for a number.
        assert self.guidance is not None
        return self.expanded(eager_velocity(self.guidance.form, self.weights[row], u, v, self.shape)), None

    def expanded(self, v: Tensor) -> Tensor:
        """A velocity that was checked, in the state's shape."""
        if v.dtype not in VELOCITY_DTYPES[self.dtype]:
            v = v.to(self.dtype)
        v = unwrapped(v)
        return (v if self.differentiable else v.detach()).expand(self.shape)

    def check(self, v: object, name: str) -> None:
        """Raises where a model named `name` returned what cannot be a velocity."""
        wanted = f"a tensor that expands to {list(self.shape)}, {self.dtype} or narrower, on {self.device}"
        if not isinstance(v, Tensor):
            raise TypeError(f"{name} returned {described(v)}; wanted {wanted}")
        if not v.is_floating_point():
            raise TypeError(f"{name} returned a tensor of {v.dtype}; wanted {wanted}")
        if v.layout is not torch.strided or v.is_nested:
            raise TypeError(f"{name} returned a tensor of layout {layout(v)}; wanted {wanted}")
        if v.dtype not in VELOCITY_DTYPES:
            raise TypeError(f"{name} returned {v.dtype}: cast it; wanted {wanted}")
        if v.dtype not in VELOCITY_DTYPES[self.dtype] and v.dim():  # a 0-dim tensor does not widen, in eager PyTorch
            raise TypeError(
                f"{name} returned {v.dtype}, which would widen the state of {self.dtype}: "
                f"pass dtype={torch.promote_types(v.dtype, self.dtype)} to sample(), or cast what "
                f"{name} returns"
            )
        if v.device != self.device:
            raise ValueError(f"{name} returned a tensor on {v.device}; wanted {wanted}")
        if not expands(v.shape, self.shape):
            raise ValueError(f"{name} returned a tensor of shape {list(v.shape)}; wanted {wanted}")

    def split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The guided and the unguided velocity, two views of what step_fn returned, in the order of `guidance`.

        Raises:
            TypeError: it is no tensor.
            ValueError: it is not twice as long as the batch.
        """
        batch = self.shape[0]
        guided_first = self.guidance is not None and self.guidance.guided_first
        order = "guided, unguided" if guided_first else "unguided, guided"
        wanted = f"cat([{order}]), a doubled batch that expands to {[2 * batch, *self.shape[1:]]}"
        if not isinstance(both, Tensor) or both.layout is not torch.strided or both.is_nested:
            raise TypeError(f"step_fn returned {described(both)}; wanted {wanted}")
        if both.dtype not in VELOCITY_DTYPES[self.dtype]:
            widens = f", which would widen the state of {self.dtype}" if both.is_floating_point() else ""
            raise TypeError(f"step_fn returned {both.dtype}{widens}; wanted {wanted}, {self.dtype} or narrower")
        if both.dim() != len(self.shape) or both.shape[0] != 2 * batch:
            raise ValueError(f"step_fn returned a tensor of shape {list(both.shape)}; wanted {wanted}")
        first, second = both.narrow(0, 0, batch), both.narrow(0, batch, batch)
        return (first, second) if guided_first else (second, first)


def model(step_fn: StepFn, velocities: Velocities, eager: bool) -> Model:
    """What evaluates the velocity at each row.

    Args:
        step_fn: The model; with guidance the guided one, called first, or the one that returns both.
        velocities: The checks, which know the guidance.
        eager: Plain eager mode, where tensors can be asked for their memory.
    """
    guidance = velocities.guidance
    if guidance is None:
        return lambda rows, state, time, row: (rows.evaluate(step_fn, state, time), None)
    if guidance.unguided_step_fn is None:
        return lambda rows, state, time, row: velocities.split(rows.evaluate(step_fn, state, time))
    return TwoModels(step_fn, guidance, velocities, eager)


class TwoModels:
    """The guided velocity, then the unguided one, which may come in the same buffer, as from one replayed graph."""

    def __init__(self, step_fn: StepFn, guidance: Guidance, velocities: Velocities, eager: bool) -> None:
        assert guidance.unguided_step_fn is not None
        self._step_fn, self._unguided_step_fn = step_fn, guidance.unguided_step_fn
        self._guidance, self._velocities, self._eager = guidance, velocities, eager
        #: Until the velocities are seen in two buffers, the first is copied before the second is evaluated.
        self._one_buffer = True

    def __call__(self, rows: Any, state: Any, time: int, row: int) -> tuple[Any, Any]:
        """See `Model`."""
        guidance, velocities = self._guidance, self._velocities
        if guidance.skip:
            if velocities.weights[row] == guidance.form.guided_alone:
                return rows.evaluate(self._step_fn, state, time), None
            if velocities.weights[row] == guidance.form.unguided_alone:
                u = rows.evaluate(self._unguided_step_fn, state, time)
                velocities.check(u, "unguided_step_fn")
                return velocities.expanded(u), None
        v = rows.evaluate(self._step_fn, state, time)
        version = _version(v) if self._eager else 0
        kept = v
        if self._one_buffer and isinstance(v, Tensor) and not rows.owns(state, v):
            kept = v.clone()
        u = rows.evaluate(self._unguided_step_fn, state, time)
        if u is None:  # which elsewhere means: no guidance
            velocities.check(u, "unguided_step_fn")
        if self._eager:
            if native.apart(v, u) and _version(v) == version:
                self._one_buffer = False
            elif type(v) is Tensor and type(u) is Tensor and not rows.owns(state, v):
                self._one_buffer = self._shared(v, u, version)  # of x itself a copy would miss what u writes to x
        return kept, u

    def _shared(self, v: Tensor, u: Tensor, version: int) -> bool:
        """Whether v has to be copied before the next u; where it cannot be known, as before.

        Raises:
            RuntimeError: v was written to, or may have been where writes cannot be counted, and was not copied, since
                it was in a buffer of its own so far.
        """
        memory = all(x.layout is torch.strided and not x.is_nested for x in (v, u)) and not v._is_zerotensor()
        if not memory or v.is_inference():
            return self._one_buffer
        written = _version(v) != version
        shared = v.numel() > 0 and v.data_ptr() == u.data_ptr()
        # One memory twice is no harm where nothing was written. PyTorch counts the writes to one storage on the CPU; a
        # replay's write leaves no trace, nor does one to memory that two storages hold, as of a foreign library.
        counted = v.device.type == "cpu" and v.untyped_storage()._cdata == u.untyped_storage()._cdata
        if not self._one_buffer and (written or (shared and not counted)):
            what = "wrote to" if written else "returned, and may have written to,"
            raise RuntimeError(
                f"unguided_step_fn {what} the memory of the velocity that step_fn had returned, and had not done so "
                "before: the guided velocity may be overwritten. Return a clone from step_fn"
            )
        return shared or written


def _version(x: Any) -> int:
    """How often x was written to, as far as PyTorch counts it."""
    try:
        return x._version
    except (AttributeError, RuntimeError):  # no tensor, or an inference tensor
        return 0


def unwrapped(x: Tensor) -> Tensor:
    """A Parameter, or a tensor with a name tag, as the tensor that it is."""
    if type(x) is Tensor or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    return x.as_subclass(Tensor)


def layout(x: Tensor) -> str:
    """A tensor's layout, for a message."""
    return "nested" if x.is_nested else str(x.layout)


def described(value: object) -> str:
    """Any value, for a message."""
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"
