"""The loop: for each row of a table, evaluate the velocity and take one fused step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .base import StepFn
from .ops import native, reference
from .ops.dispatch import Backend, entry, is_eager
from .ops.fused_step import VELOCITY_DTYPES, arithmetic_dtype
from .solvers import Evaluation, Table

NO_TERMS = (None, None, None)


def integrate(
    table: Table,
    state: Tensor,
    times: Sequence[Tensor],
    step_fn: StepFn,
    backend: Backend,
    return_all_steps: bool = False,
    unguided_step_fn: StepFn | None = None,
    weight: float = 1.0,
    over: Callable[[Sequence[Evaluation]], Iterable[Evaluation]] = iter,
) -> tuple[Tensor, Tensor | None]:
    """Integrates dx/dt = v(x, t) along a table.

    Args:
        table: The solver's rows on the time grid.
        state: The noise, [B, *x_dims], contiguous; its memory is used again if the caller does not hold it.
        times: For each entry of `table.times` the time as step_fn sees it, [B, 1, ..., 1].
        step_fn: The velocity; with guidance the guided one, which is called first.
        backend: What takes the steps.
        return_all_steps: Keep the states.
        unguided_step_fn: The unguided velocity, or None: no guidance.
        weight: The guidance weight, as in the table.
        over: Wraps the evaluations (a progress bar).

    Returns:
        The last state, [B, *x_dims]; and with `return_all_steps` the trajectory, [B, N + 1, *x_dims].
    """
    fused_step_, fused_step = entry(backend, state)
    state = state.detach()  # an object of our own: whoever saw the draw keeps what it saw
    velocity = Velocity(state)
    buffers = StateBuffers(state)
    coefficients, fits = table.coefficients, velocity.fits
    history: list[Tensor] = []
    if fused_step_ is not None:
        dtype = arithmetic_dtype(state.dtype)
        history = [torch.empty_like(state, dtype=dtype) for _ in range(table.buffers)]
    else:
        history = [state] * table.buffers  # places, filled before they are read

    trajectory: Tensor | None = None  # one tensor, written slot by slot
    states: list[Tensor] | None = None  # where steps are functional: the states, stacked at the end
    if return_all_steps and fused_step_ is not None:
        trajectory = native.huge_pages(state.new_empty((state.shape[0], table.steps + 1, *state.shape[1:])))
        trajectory.select(1, 0).copy_(state)
    elif return_all_steps:
        states = [state]

    base, slot = state, 0
    shared = unguided_step_fn is not None  # until the two velocities are seen in two buffers
    for row, (time, commit, read, write) in enumerate(over(table.evaluations)):
        version = state._version if trajectory is not None else 0
        t = times[time]
        v = step_fn(x=state.detach(), t=t)
        u = None
        if unguided_step_fn is None:
            if not fits(v):
                v = velocity.shaped(v)
        else:
            pair = SharedBuffer(v, state)
            if shared and isinstance(v, Tensor) and not pair.of_x:  # one replayed graph may write both to one buffer
                v = v.clone()
            u = unguided_step_fn(x=state.detach(), t=t)
            shared = pair.holds(u, copied=shared)
            del pair
            if not (fits(v) and fits(u) and v.dtype is u.dtype):
                v, u = velocity.shaped_pair(v, u, weight)
        if trajectory is not None and state._version != version and state is base:
            trajectory.select(1, slot).copy_(state)  # step_fn wrote to x, which is a state of the trajectory

        terms: tuple[Tensor | None, ...] = NO_TERMS
        if read:
            terms = (*(history[k] for k in read), *NO_TERMS)[:3]
        slot += commit
        if fused_step_ is not None and type(v) is Tensor and (u is None or type(u) is Tensor):
            into = None if write is None else history[write]
            out = buffers.next(state, base, commit)
            slots = trajectory if commit else None
            fused_step_(out, base, v, u, *terms, coefficients, row, False, slots, slot, into)
        else:  # a tensor subclass, a mode, a transform or a compiler: nothing is written
            fused_step_ = None
            if trajectory is not None:
                states, trajectory = list(trajectory.unbind(1)[: slot + 1 - commit]), None
            out = fused_step(base, v, u, *terms, coefficients, row, False)
            if write is not None:
                history[write] = reference.remember(base, v, u, coefficients, row)
            if states is not None and commit:
                states.append(out)
        del v, u
        state = out
        if commit:
            base = out
    if states is not None:
        trajectory = torch.stack(states, dim=1)
    return state, trajectory


class SharedBuffer:
    """Tells whether the two velocities of guidance come in one buffer, as from one replayed graph."""

    def __init__(self, v: object, state: Tensor) -> None:
        plain = v if is_eager() and type(v) is Tensor and v.layout is torch.strided else None
        if plain is not None and (plain.is_nested or plain._is_zerotensor()):
            plain = None
        #: v is x, or a view of it: a later write to x shows in v, as it does in the published loop.
        self.of_x = plain is not None and _address(plain) == _address(state)
        self._v = None if self.of_x else plain
        self._version = _version(self._v)

    def holds(self, u: object, copied: bool) -> bool:
        """Whether v has to be copied before the next u; what cannot be told stays as it was.

        Args:
            u: What unguided_step_fn returned.
            copied: v was copied before.

        Raises:
            RuntimeError: v was overwritten, and was not copied, being in a buffer of its own so far.
        """
        v = self._v
        if v is None or v.is_inference() or type(u) is not Tensor or u.layout is not torch.strided:
            return copied
        written = _version(v) != self._version
        shared = v.numel() > 0 and v.data_ptr() == u.data_ptr()
        # The same tensor twice is no harm where nothing was written; on a GPU a replay's write leaves no trace.
        if not copied and (written or (shared and v.device.type != "cpu")):
            raise RuntimeError(
                "unguided_step_fn wrote to the buffer that step_fn had returned, and had not done so before: the "
                "guided velocity is overwritten. Return a clone from step_fn"
            )
        return shared or written


def _address(x: Tensor) -> int | None:
    return x.untyped_storage().data_ptr() if type(x) is Tensor else None


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version


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
            and not v.is_nested
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
        if v.layout is not torch.strided or v.is_nested:
            kind = "nested" if v.is_nested else str(v.layout)
            raise TypeError(f"{name} returned a tensor of layout {kind}; wanted {wanted}")
        if v.dtype not in VELOCITY_DTYPES:
            raise TypeError(f"{name} returned {v.dtype}: cast it; wanted {wanted}")
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
        if type(v).__torch_dispatch__ is Tensor.__torch_dispatch__:  # a Parameter, a tensor with a name tag
            v = v.as_subclass(Tensor)
        return v.detach().expand(self.shape)


def _described(value: object) -> str:
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"


class StateBuffers:
    """Hands out the tensor that the next state is written to: on the CPU the last one, if nobody can tell.

    Fresh memory is the main cost of a large state on the CPU. A buffer is written again only when no
    tensor, storage object, array, view or graph but the loop's own holds its memory; a step_fn may keep
    what it was given. On a GPU the caching allocator makes fresh tensors cheap, and streams hide holders.
    """

    def __init__(self, state: Tensor) -> None:
        self._reuse = is_eager() and type(state) is Tensor and state.device.type == "cpu" and _UNHELD is not None
        self._spare: Tensor | None = None

    def next(self, state: Tensor, base: Tensor, commit: bool) -> Tensor:
        """A tensor like `state`, perhaps `state` itself; not `base` while the step goes on."""
        if not self._reuse:
            return torch.empty_like(state)
        if (commit or state is not base) and _holders(state) == _UNHELD:
            out = state
        elif self._spare is not None and _holders(self._spare) == _UNHELD:
            out = self._spare
        else:  # an ordinary tensor even under inference mode: it counts the writes of a step_fn
            with torch.inference_mode(False):
                out = native.huge_pages(torch.empty_like(state))
        self._spare = base if commit and out is not base else None
        return out


def _holders(tensor: Tensor) -> tuple[int, int, bool]:
    """Who holds a tensor's memory: uses of its storage, of the storage's Python object, other processes."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage), storage.is_shared()


# What _holders says of a tensor that nobody else holds; None where it cannot be asked.
_UNHELD = _holders(torch.empty(1)) if hasattr(torch._C, "_storage_Use_Count") else None
