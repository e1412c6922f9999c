"""The loop: for each row of a table, evaluate the velocity and take one fused step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .base import StepFn
from .ops import reference
from .ops.dispatch import is_eager
from .ops.fused_step import VELOCITY_DTYPES, arithmetic_dtype
from .solvers import Evaluation, Table


def integrate(
    table: Table,
    state: Tensor,
    times: Sequence[Tensor],
    step_fn: StepFn,
    fused_step_: Callable[..., None],
    trajectory: Tensor | None = None,
    unguided_step_fn: StepFn | None = None,
    weight: float = 1.0,
    over: Callable[[Sequence[Evaluation]], Iterable[Evaluation]] = iter,
) -> Tensor:
    """Integrates dx/dt = v(x, t) along a table.

    Args:
        table: The solver's rows on the time grid.
        state: The noise, [B, *x_dims], contiguous; written, and the loop's own from here on.
        times: For each entry of `table.times` the time as step_fn sees it, [B, 1, ..., 1].
        step_fn: The velocity; with guidance the guided one, which is called first.
        fused_step_: A backend's, or the registered op.
        trajectory: [B, N + 1, *x_dims], contiguous, or None; slots 1 to N are written.
        unguided_step_fn: The unguided velocity, or None: no guidance.
        weight: The guidance weight, as in the table.
        over: Wraps the evaluations (a progress bar).

    Returns:
        The last state, [B, *x_dims].
    """
    velocity = Velocity(state)
    buffers = StateBuffers(state)
    arithmetic = arithmetic_dtype(state.dtype)
    history = [torch.empty_like(state, dtype=arithmetic) for _ in range(table.buffers)]
    base, slot, row = state, 0, 0
    coefficients, fits = table.coefficients, velocity.fits
    shared = True  # until step_fn and unguided_step_fn are seen to return two buffers
    for evaluation in over(table.evaluations):
        t = times[evaluation.time]
        v = step_fn(x=state.detach(), t=t)
        u = None
        if unguided_step_fn is None:
            if not fits(v):
                v = velocity.shaped(v)
        else:
            first = v
            if shared and isinstance(v, Tensor):  # one replayed graph may write both to one buffer
                v = v.clone()
            u = unguided_step_fn(x=state.detach(), t=t)
            shared = shared and _same_storage(first, u)
            del first
            if not (fits(v) and fits(u) and v.dtype is u.dtype):
                v, u = velocity.shaped_pair(v, u, weight)

        commit, terms, into = evaluation.commit, NO_TERMS, None
        if evaluation.read:
            terms = (*(history[k] for k in evaluation.read), *NO_TERMS)[:3]
        if evaluation.write is not None:
            into = history[evaluation.write]
        slot += commit
        slots = trajectory if commit else None
        step = fused_step_ if type(v) is Tensor else _step_through_op
        out = buffers.next(state, None if commit else base)
        result = step(out, base, v, u, *terms, coefficients, row, False, slots, slot, into)
        del v, u
        row += 1
        state = out if result is None else result
        if commit:
            base = state
    return state


NO_TERMS = (None, None, None)


def _step_through_op(
    out: Tensor,
    base: Tensor,
    v: Tensor,
    u: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    coefficients: Tensor,
    row: int,
    velocity_rounding: bool,
    trajectory: Tensor | None,
    slot: int,
    history: Tensor | None,
) -> Tensor:
    """One step by the functional op, for a velocity that is a tensor subclass: so is the result."""
    if history is not None:
        reference.copy_(history, reference.remember(base, v, u, coefficients, row))
    result = torch.ops.flowmatch_kernels.fused_step(
        base, v, u, h1, h2, h3, coefficients, row, velocity_rounding
    )
    if trajectory is not None:
        reference.copy_(trajectory.select(1, slot), result)
    return result


class Velocity:
    """Checks what a step_fn returns against the state, and brings it to the state's shape.

    What `fits`, and nearly every velocity does, costs a fraction of a microsecond.
    """

    def __init__(self, state: Tensor) -> None:
        self.shape = state.shape
        self.device = state.device
        self.dtype = state.dtype
        self.dtypes = VELOCITY_DTYPES[state.dtype]

    def fits(self, v: Tensor) -> bool:
        """Whether a backend can take v as it is."""
        return (
            type(v) is Tensor
            and v.shape == self.shape
            and v.dtype in self.dtypes
            and v.device == self.device
            and v.layout is torch.strided
        )

    def shaped(self, v: Tensor) -> Tensor:
        """v, expanded to the state's shape.

        Raises:
            TypeError: v is no tensor, or of a dtype that cannot be a velocity for this state.
            ValueError: v's shape does not expand to the state's, or v is on another device.
        """
        self._check(v, "step_fn")
        return self._expanded(v)

    def shaped_pair(self, v: Tensor, u: Tensor, weight: float) -> tuple[Tensor, Tensor | None]:
        """The guided and the unguided velocity; or, where their dtypes differ, (1 - w)*u + w*v and None."""
        self._check(v, "step_fn")
        self._check(u, "unguided_step_fn")
        if v.dtype == u.dtype and v.dim() and u.dim():
            return self._expanded(v), self._expanded(u)
        # Eager PyTorch's own promotion, which takes a 0-dim tensor for a number.
        return self._expanded((1 - weight) * u + weight * v), None

    def _check(self, v: object, name: str) -> None:
        wanted = f"a tensor that expands to {list(self.shape)}, {self.dtype} or narrower, on {self.device}"
        if not isinstance(v, Tensor):
            raise TypeError(f"{name} returned {_described(v)}; wanted {wanted}")
        if not v.is_floating_point():
            raise TypeError(f"{name} returned a tensor of {v.dtype}; wanted {wanted}")
        if v.layout is not torch.strided:
            raise TypeError(f"{name} returned a tensor of layout {v.layout}; wanted {wanted}")
        if v.dtype not in self.dtypes and v.dim():  # a 0-dim tensor does not widen, in eager PyTorch
            raise TypeError(
                f"{name} returned {v.dtype}, which would widen the state of {self.dtype}: "
                f"pass dtype={torch.promote_types(v.dtype, self.dtype)} to sample(), or cast what "
                f"{name} returns"
            )
        if v.device != self.device:
            raise ValueError(f"{name} returned a tensor on {v.device}; wanted {wanted}")
        try:
            expands = torch.broadcast_shapes(v.shape, self.shape) == self.shape
        except RuntimeError:
            expands = False
        if not expands:
            raise ValueError(f"{name} returned a tensor of shape {list(v.shape)}; wanted {wanted}")

    def _expanded(self, v: Tensor) -> Tensor:
        if v.dtype not in self.dtypes:
            v = v.to(self.dtype)
        if not is_traceable_wrapper_subclass(v):
            v = v.as_subclass(Tensor)
        return v.detach().expand(self.shape)


def _described(value: object) -> str:
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"


def _same_storage(x: object, y: object) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    if not is_eager():  # a traced tensor has no memory yet, and a wrapper's is not its own
        return True
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


class StateBuffers:
    """Hands out the tensor that the next state is written to: on the CPU the last one, if nobody can tell.

    Fresh memory is the main cost of a large state on the CPU. A buffer is written again only when no
    tensor, storage object, array, view or graph but the loop's own holds its memory; a step_fn may keep
    what it was given. On a GPU the caching allocator makes fresh tensors cheap, and streams hide holders.
    """

    def __init__(self, state: Tensor) -> None:
        self._reuse = (
            is_eager() and type(state) is Tensor and state.device.type == "cpu" and _UNHELD is not None
        )
        self._spare: Tensor | None = None

    def next(self, state: Tensor, keep: Tensor | None) -> Tensor:
        """A tensor like `state`, perhaps `state` itself, that is not `keep` and that nobody else holds."""
        if self._reuse:
            if state is not keep:
                if _holders(state) == _UNHELD:
                    return state
            elif self._spare is not None:
                spare, self._spare = self._spare, None
                return spare
        return torch.empty_like(state)


def _holders(tensor: Tensor) -> tuple[int, int]:
    """Who holds a tensor's memory: the uses of its storage, and of the storage's Python object."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


# What _holders says of a tensor that nobody else holds; None where it cannot be asked.
_UNHELD = _holders(torch.empty(1)) if hasattr(torch._C, "_storage_Use_Count") else None
