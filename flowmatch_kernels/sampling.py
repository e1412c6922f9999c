"""The loop: for each row of a table, evaluate the velocity and take one fused step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import expands
from .base import StepFn
from .guidance import Form
from .ops import native, reference
from .ops.dispatch import Backend, functional, in_place, is_eager
from .ops.fused_step import VELOCITY_DTYPES, WEIGHTED, arithmetic_dtype
from .solvers import Evaluation, Table


class Guided(NamedTuple):
    """How sample() was asked to guide."""

    form: Form
    unguided_step_fn: StepFn | None
    """None: step_fn returns both velocities, cat([unguided, guided])."""
    skip: bool = False
    """Do not call a model that the weight makes irrelevant."""


class Path(NamedTuple):
    """What `integrate` returns."""

    state: Tensor
    """The last state, [B, *x_dims]."""
    trajectory: Tensor | None
    """The committed states, [B, taken + 1, *x_dims], where they were asked for."""
    taken: int
    """Steps taken: fewer than the table's if the callback stopped them."""


def integrate(
    table: Table,
    state: Tensor,
    times: Sequence[Tensor],
    step_fn: StepFn,
    backend: Backend,
    eager: bool = True,
    return_all_steps: bool = False,
    guided: Guided | None = None,
    constraint: Callable[[Tensor, Tensor], Tensor] | None = None,
    callback: Callable[[int, Tensor, Tensor], bool | None] | None = None,
    over: Callable[[Sequence[Evaluation]], Iterable[Evaluation]] = iter,
) -> Path:
    """Integrates dx/dt = v(x, t) along a table.

    Args:
        table: The solver's rows on the time grid.
        state: The noise, [B, *x_dims], contiguous; its memory is used again if the caller does not hold it.
        times: For each entry of `table.times` the time as step_fn sees it, [B, 1, ..., 1].
        step_fn: The velocity; with guidance the guided one, which is called first, or both.
        backend: What takes the steps.
        eager: Plain eager mode, where steps are taken in place.
        return_all_steps: Keep the states.
        guided: Combine the velocities of two models; None: there is one.
        constraint: (x, t) -> what a committed state x becomes.
        callback: (step, t, x), called after each committed step; True ends the sampling.
        over: Wraps the evaluations (a progress bar).
    """
    fused_step_ = in_place(backend, state) if eager else None
    if fused_step_ is None:
        state = state.detach()  # an object of our own: whoever saw the draw keeps what it saw
    velocities = Velocities(state, step_fn, guided, table.weights)

    step = None  # takes a step in place; where that cannot be, steps are functional
    history = [state] * table.buffers  # places, filled before they are read
    trajectory: Tensor | None = None  # one tensor, written slot by slot
    states: list[Tensor] | None = [state] if return_all_steps else None  # of functional steps: stacked at the end
    if fused_step_ is not None:
        if return_all_steps:
            trajectory = native.huge_pages(state.new_empty((state.shape[0], table.steps + 1, *state.shape[1:])))
            states = None
        if table.buffers:
            dtype = arithmetic_dtype(state.dtype)
            history = [torch.empty_like(state, dtype=dtype) for _ in range(table.buffers)]
        own = native.Stepper if fused_step_ is native.cpu_fused_step_ else None
        stepper = (own or Stepper)(fused_step_, velocities, state, table.coefficients, trajectory, constraint is None)
        step = stepper.step

    base, slot, out = state, 0, None
    try:
        for row, evaluation in enumerate(over(table.evaluations)):
            if step is not None:
                out = step(state, base, times, row, evaluation, slot, history)
            if out is None:  # a tensor subclass, a mode, a transform or a compiler: nothing is written
                time, _, read, write = evaluation
                v, u = velocities(state, times[time], row) if step is None else stepper.left
                step = None
                if trajectory is not None:
                    states, trajectory = list(trajectory.unbind(1)[: slot + 1]), None
                if not velocities.fit(v, u):
                    v, u = velocities.shaped(v, u, row)
                operands = (base, v, u, *terms(history, read), table.coefficients, row)
                out = functional(backend, state)(*operands, False, velocities.guidance)
                if write is not None:
                    history[write] = reference.remember(base, v, u, table.coefficients, row, velocities.guidance)
                del v, u, operands
            state, out = out, None
            if not evaluation.commit:
                continue
            slot += 1
            if constraint is not None:
                state = constrained(constraint, state, times[slot], in_place=step is not None)
                if type(state) is not Tensor and trajectory is not None:
                    states, trajectory = list(trajectory.unbind(1)[:slot]), None
                if type(state) is not Tensor:
                    step = None
                if trajectory is not None:
                    rewrite(trajectory, slot, state)
            if states is not None:
                states.append(state)
            base = state
            if callback is not None and stops(callback(slot - 1, times[slot], state.clone())):
                break
    finally:  # the garbage collector does not see into them, and an exception keeps this frame
        stepper = step = None
    if states is not None:
        trajectory = torch.stack(states, dim=1)
    elif trajectory is not None and slot < table.steps:
        trajectory = trajectory.narrow(1, 0, slot + 1).contiguous()
    return Path(state, trajectory, slot)


def constrained(constraint: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, in_place: bool) -> Tensor:
    """What a constraint makes of the state x: x itself where it wrote to it, else a tensor of our own.

    Raises:
        TypeError: it returned no tensor, or one of another dtype or layout than x's.
        ValueError: it returned another shape, or a tensor on another device.
    """
    y = constraint(x.detach(), t)
    if not isinstance(y, Tensor):
        raise TypeError(f"constraint returned {_described(y)}; {_like(x)}")
    if y.layout is not torch.strided or y.is_nested:
        raise TypeError(f"constraint returned a tensor of layout {_layout(y)}; {_like(x)}")
    if y.dtype != x.dtype:
        raise TypeError(f"constraint returned a tensor of {y.dtype}; {_like(x)}")
    if y.shape != x.shape:
        raise ValueError(f"constraint returned a tensor of shape {list(y.shape)}; {_like(x)}")
    if y.device != x.device:
        raise ValueError(f"constraint returned a tensor on {y.device}; {_like(x)}")
    y = _plain(y)
    if not in_place:
        return y.detach().clone(memory_format=torch.contiguous_format)
    if type(y) is Tensor and y.is_contiguous() and not y.is_neg() and y.data_ptr() == x.data_ptr():
        return x
    with torch.inference_mode(False):  # an ordinary tensor: it counts the writes of a step_fn
        return y.detach().clone(memory_format=torch.contiguous_format)


def _like(x: Tensor) -> str:
    return f"wanted a tensor {list(x.shape)}, {x.dtype}, on {x.device}"


def stops(answer: object) -> bool:
    """Whether a callback's answer ends the sampling.

    Raises:
        TypeError: it is neither a bool nor None.
    """
    if answer is None or isinstance(answer, bool):
        return answer is True
    wanted = "callback must return True to stop, or None or False to go on"
    raise TypeError(f"{wanted}, got {_described(answer)}: bool(...) makes it one")


class SharedBuffer:
    """Tells whether the two velocities of guidance come in one buffer, as from one replayed graph."""

    def __init__(self, v: object, state: Tensor, version: int | None = None) -> None:
        plain = v if is_eager() and type(v) is Tensor and v.layout is torch.strided else None
        if plain is not None and (plain.is_nested or plain._is_zerotensor()):
            plain = None
        #: v is x, or a view of it: a later write to x shows in v, as it does in the published loop.
        self.of_x = plain is not None and _address(plain) == _address(state)
        self._v = None if self.of_x else plain
        self._version = _version(self._v) if version is None else version

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
        if not copied and (written or (shared and (v is not u or v.device.type != "cpu"))):
            raise RuntimeError(
                "unguided_step_fn wrote to the buffer that step_fn had returned, and had not done so before: the "
                "guided velocity is overwritten. Return a clone from step_fn"
            )
        return shared or written


def _address(x: Tensor) -> int | None:
    return x.untyped_storage().data_ptr() if type(x) is Tensor else None


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version


class Velocities:
    """Evaluates the models, checks what they return against the state, and brings it to the state's shape.

    Args:
        state: What the velocities are for.
        step_fn: The model; with guidance the guided one, called first, or the one that returns both.
        guided: The form, the unguided model, and whether to skip; or None.
        weights: With guidance, the weight of each row.
    """

    def __init__(self, state: Tensor, step_fn: StepFn, guided: Guided | None, weights: Sequence[float]) -> None:
        self.shape = state.shape
        self.device = state.device
        self.dtype = state.dtype
        self.dtypes = VELOCITY_DTYPES[state.dtype]
        self.step_fn = step_fn
        self.guided = guided
        self.guidance = WEIGHTED if guided is None else guided.form.kernel
        self.weights = weights
        #: Until the two velocities are seen in two buffers, the first is copied: one replayed graph may write both.
        self.shared = True

    def __call__(self, state: Tensor, t: Tensor, row: int) -> tuple[Tensor, Tensor | None]:
        """The guided and the unguided velocity, as the models return them; or the one that counts, and None."""
        step_fn, guided = self.step_fn, self.guided
        if guided is None:
            return step_fn(x=state.detach(), t=t), None
        unguided_step_fn = guided.unguided_step_fn
        if unguided_step_fn is None:
            return self.halves(step_fn(x=state.detach(), t=t))
        if guided.skip and self.weights[row] == guided.form.guided_alone:
            return step_fn(x=state.detach(), t=t), None
        if guided.skip and self.weights[row] == guided.form.unguided_alone:
            u = unguided_step_fn(x=state.detach(), t=t)
            self._check(u, "unguided_step_fn")
            return self._expanded(u), None
        v = step_fn(x=state.detach(), t=t)
        pair = SharedBuffer(v, state)
        if self.shared and isinstance(v, Tensor) and not pair.of_x:
            v = v.clone()
        u = unguided_step_fn(x=state.detach(), t=t)
        if u is None:  # which elsewhere means: no guidance
            self._check(u, "unguided_step_fn")
        self.shared = pair.holds(u, copied=self.shared)
        return v, u

    def met(self, v: Tensor, u: Tensor, version: int, state: Tensor, copied: bool) -> bool:
        """Two velocities that stand in one buffer, or may: what `__call__` makes of them. `_C.Stepper` asks.

        Args:
            v, u: The velocities.
            version: v's, before u was evaluated.
            state: What they were evaluated at.
            copied: v was copied before.
        """
        if u is None:
            self._check(u, "unguided_step_fn")
        return SharedBuffer(v, state, version).holds(u, copied)

    def fits(self, v: Tensor) -> bool:
        """Whether a backend can take v as it is, as nearly every velocity can be."""
        return (
            type(v) is Tensor
            and not v.is_nested
            and v.shape == self.shape
            and v.dtype in self.dtypes
            and v.device == self.device
            and v.layout is torch.strided
        )

    def fit(self, v: Tensor, u: Tensor | None) -> bool:
        """Whether a backend can take both as they are."""
        return self.fits(v) and (u is None or (self.fits(u) and u.dtype is v.dtype))

    def shaped(self, v: Tensor, u: Tensor | None, row: int) -> tuple[Tensor, Tensor | None]:
        """The velocities, expanded to the state's shape; two of different dtypes, combined, and None.

        Raises:
            TypeError: one is no tensor, or of a dtype that cannot be a velocity for this state.
            ValueError: its shape does not expand to the state's, or it is on another device.
        """
        self._check(v, "step_fn")
        if u is None:
            return self._expanded(v), None
        self._check(u, "unguided_step_fn")
        if v.dtype == u.dtype and v.dim() and u.dim():
            return self._expanded(v), self._expanded(u)
        # Eager PyTorch's own promotion, which takes a 0-dim tensor for a number.
        assert self.guided is not None
        return self._expanded(self.guided.form.eager(self.weights[row], u, v)), None

    def halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The guided and the unguided velocity of cat([unguided, guided]): two views.

        Raises:
            TypeError: it is no tensor.
            ValueError: it is not twice as long as the batch.
        """
        batch = self.shape[0]
        wanted = f"cat([unguided, guided]), a doubled batch that expands to {[2 * batch, *self.shape[1:]]}"
        if not isinstance(both, Tensor) or both.layout is not torch.strided or both.is_nested:
            raise TypeError(f"step_fn returned {_described(both)}; wanted {wanted}")
        if both.dtype not in self.dtypes:
            widens = f", which would widen the state of {self.dtype}" if both.is_floating_point() else ""
            raise TypeError(f"step_fn returned {both.dtype}{widens}; wanted {wanted}, {self.dtype} or narrower")
        if both.dim() != len(self.shape) or both.shape[0] != 2 * batch:
            raise ValueError(f"step_fn returned a tensor of shape {list(both.shape)}; wanted {wanted}")
        return both.narrow(0, batch, batch), both.narrow(0, 0, batch)

    def _check(self, v: object, name: str) -> None:
        wanted = f"a tensor that expands to {list(self.shape)}, {self.dtype} or narrower, on {self.device}"
        if not isinstance(v, Tensor):
            raise TypeError(f"{name} returned {_described(v)}; wanted {wanted}")
        if not v.is_floating_point():
            raise TypeError(f"{name} returned a tensor of {v.dtype}; wanted {wanted}")
        if v.layout is not torch.strided or v.is_nested:
            raise TypeError(f"{name} returned a tensor of layout {_layout(v)}; wanted {wanted}")
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
        if not expands(v.shape, self.shape):
            raise ValueError(f"{name} returned a tensor of shape {list(v.shape)}; wanted {wanted}")

    def _expanded(self, v: Tensor) -> Tensor:
        if v.dtype not in self.dtypes:
            v = v.to(self.dtype)
        return _plain(v).detach().expand(self.shape)


def _plain(x: Tensor) -> Tensor:
    """A Parameter, or a tensor with a name tag, as the tensor that it is."""
    if type(x) is Tensor or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    return x.as_subclass(Tensor)


def _layout(x: Tensor) -> str:
    return "nested" if x.is_nested else str(x.layout)


def _described(value: object) -> str:
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"


class Clock:
    """The times of a table as step_fn sees them, one [B, 1, ..., 1] for each: copies, since step_fn may write to t.

    Args:
        times: The table's.
        batch_size: B.
        dims: How many ones.
    """

    def __init__(self, times: Tensor, batch_size: int, dims: int) -> None:
        self.shape = batch_size, dims
        self.times = times.clone()
        ones = [1] * dims
        self.views = self.times.view(-1, 1, *ones).expand(-1, batch_size, *ones).unbind()
        self._uses: int | None = None  # of its memory, where it may serve again

    @classmethod
    def of(cls, table: Table, batch_size: int, dims: int, reuse: bool) -> Clock:
        """A clock for this table: with `reuse` the one that `back` has put by, or a new one that it may."""
        if not reuse or table.times.device.type != "cpu" or native.untouched is None:
            return cls(table.times, batch_size, dims)
        try:
            clock = table.clocks.pop()  # out of the reach of other threads, and of a sample() in this one's step_fn
            if clock.shape == (batch_size, dims):
                return clock
        except IndexError:
            pass
        with torch.inference_mode(False), torch.no_grad():
            clock = cls(table.times, batch_size, dims)
        clock._uses = torch._C._storage_Use_Count(clock.times.untyped_storage()._cdata)
        return clock

    def back(self, table: Table) -> None:
        """Puts the clock by for the next sample(), unless somebody wrote to a time, keeps one, or left a mark on it."""
        if self._uses is not None and not table.clocks:
            assert native.untouched is not None
            if native.untouched(self.times, table.times, self.views, *self.shape, self._uses):
                table.clocks.append(self)


class Stepper:
    """Evaluates the velocity and takes the step, with a backend that writes in place; each state is fresh memory.

    On a GPU the caching allocator makes that cheap, and streams hide who else holds a tensor. On the CPU, where fresh
    memory is the main cost of a large state, `_C.Stepper` does the same, and writes memory again that nobody holds.

    Args:
        fused_step_: The backend's.
        velocities: The models.
        state: The first state.
        coefficients: The table's.
        trajectory: The committed states, [B, slots, *x_dims], of which this writes slot 0; or None.
        write_slots: A step writes its slot too; else somebody else will.
    """

    def __init__(
        self,
        fused_step_: Callable[..., None],
        velocities: Velocities,
        state: Tensor,
        coefficients: Tensor,
        trajectory: Tensor | None,
        write_slots: bool,
    ) -> None:
        self._fused_step_ = fused_step_
        self._velocities = velocities
        self._coefficients = coefficients
        self._trajectory = trajectory
        self._slots = trajectory if write_slots else None
        if trajectory is not None:
            rewrite(trajectory, 0, state)
        self.left: tuple[Tensor, Tensor | None]
        """After a step that was not taken: the velocities."""

    def step(
        self,
        state: Tensor,
        base: Tensor,
        times: Sequence[Tensor],
        row: int,
        evaluation: Evaluation,
        slot: int,
        history: Sequence[Tensor],
    ) -> Tensor | None:
        """The next state; None, with nothing written, where a velocity is no plain tensor.

        Args:
            state: The state to evaluate at.
            base: The state at the start of the step.
            times: For each time of the table, the time as step_fn sees it.
            row: Of the coefficients.
            evaluation: The row's other half.
            slot: The slot of base; a step that commits writes the next one.
            history: The history buffers.
        """
        velocities, trajectory = self._velocities, self._trajectory
        time, commit, read, write = evaluation
        version = 0 if trajectory is None else state._version
        v, u = velocities(state, times[time], row)
        if trajectory is not None and state._version != version and state is base:
            rewrite(trajectory, slot, state)
        if not velocities.fit(v, u):
            v, u = velocities.shaped(v, u, row)
            if not velocities.fit(v, u):
                self.left = v, u
                return None
        out = fresh(state)
        operands = (out, base, v, u, *terms(history, read), self._coefficients, row, False, velocities.guidance)
        into = None if write is None else history[write]
        self._fused_step_(*operands, self._slots if commit else None, slot + commit, into)
        return out


def terms(history: Sequence[Tensor], read: Sequence[int]) -> tuple[Tensor | None, ...]:
    """h1, h2 and h3: the history buffers that a row reads."""
    return (*(history[k] for k in read), None, None, None)[:3]


def rewrite(trajectory: Tensor, slot: int, state: Tensor) -> None:
    """Puts the state in its slot: the first one, or one that a model has written to."""
    trajectory.select(1, slot).copy_(state)


def fresh(state: Tensor) -> Tensor:
    """A tensor like the state, to be written."""
    with torch.inference_mode(False):  # an ordinary tensor: it counts the writes of a step_fn
        return native.huge_pages(torch.empty_like(state))
