"""How a row of a table is taken: where the states live, and what writes them.

`Counted` keeps the states of the `cpu` backend in memory that counts who holds it (csrc/row.cpp), and writes it again
when nobody does. `Fresh` lets a backend write each state to fresh memory (csrc/tensor_row.cpp), as on a GPU, whose
caching allocator makes that cheap; `FreshInPython` is the same without the extension. `Functional` writes nothing: the
registered op, which modes, transforms and compilers see through, or plain PyTorch. All have the same methods. From the
first velocity on that is no plain tensor, the loop goes on with `functional()` of the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import StepFn
from .noise import StepNoise
from .ops import dispatch, native, reference, subclasses
from .ops.dispatch import Backend
from .ops.fused_step import Operands, arithmetic_dtype, dense
from .solvers import Evaluation, Table
from .velocities import Velocities


class Setting(NamedTuple):
    """What the states of one sample() are."""

    table: Table
    velocities: Velocities
    """The checks of what a model returned; and the states' shape, dtype and device."""
    backend: Backend
    eager: bool
    """Plain eager mode."""
    return_all_steps: bool
    rounding: int
    """The fused step's argument, as is guidance."""
    guidance: int
    constrained: bool
    """A committed state changes after its step."""
    requested: str = "auto"
    """The name of the backend that was asked for."""
    strength: Tensor | None = None
    """The fused step's operand."""


def rows_for(setting: Setting, noise: Tensor | None) -> Any:
    """The way to take rows: in place for a backend and plain tensors in eager mode, else functional."""
    plain = noise is None or type(noise) is Tensor or type(noise) is torch.nn.Parameter
    if not plain:
        coefficients = subclasses.replicated(setting.table.coefficients, noise)
        if coefficients is not setting.table.coefficients:
            setting = setting._replace(table=setting.table._replace(coefficients=coefficients, views=None))
    differentiable = setting.velocities.differentiable
    if not setting.eager or not plain or (differentiable and noise is not None and noise.requires_grad):
        return Functional(_of_derivative(setting) if setting.eager and plain else setting)
    fused_step_ = setting.backend.load()
    if fused_step_ is reference.fused_step_:  # nothing is saved by writing in place
        return Functional(setting)
    rows: Any
    if fused_step_ is native.fused_step_ and setting.backend.name == "cpu" and native.Rows is not None:
        rows = Counted(setting, native.Rows)
    elif native.TensorRows is None or setting.velocities.device.type == "meta":  # which has no memory to look at
        rows = FreshInPython(setting)
    else:
        rows = Fresh(setting, native.TensorRows)
    if differentiable:
        rows.step = _until_derivative(rows.step)
    return rows


def _of_derivative(setting: Setting) -> Setting:
    """With plain PyTorch on a CPU: it has the same bits, and its derivative costs half of what the op's does there."""
    if setting.velocities.differentiable and setting.requested == "auto" and setting.velocities.device.type == "cpu":
        return setting._replace(backend=dispatch.BACKENDS["reference"])
    return setting


def _until_derivative(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step of rows that keep no derivative: None at the first velocity that has one."""

    def stepped(state: Any, base: Any, v: Any, u: Any, row: int, evaluation: Evaluation) -> Any:
        return None if _derived(v) or _derived(u) else step(state, base, v, u, row, evaluation)

    return stepped


def _derived(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


class Functional:
    """Each step makes a new tensor; a trajectory is stacked at the end. The states are tensors.

    Args:
        setting: What the states are.
        grid: The times so far as step_fn left them; None: the table's.
        states: The committed states so far.
        history: The history buffers so far.
    """

    def __init__(
        self,
        setting: Setting,
        grid: Tensor | None = None,
        states: Sequence[Tensor] = (),
        history: Sequence[Tensor] | None = None,
    ) -> None:
        table, velocities = setting.table, setting.velocities
        self._setting = setting
        self._history: list[Any] = [None] * table.buffers if history is None else list(history)
        self._states = list(states) if setting.return_all_steps else None
        self._columns = self._fused_step = None
        if setting.backend.name == "reference":
            self._columns = table.columns(len(velocities.shape))
        else:
            self._fused_step = dispatch.functional(
                setting.backend, velocities.device.type, setting.requested, setting.eager
            )
        self._grid, self._times = times(table.times if grid is None else grid, velocities.shape)

    def empty(self) -> Tensor | None:
        """Memory to draw the noise into; None: PyTorch's."""
        return None

    def start(self, noise: Tensor, drawn: bool) -> Any:
        """The first state: the noise, in the state's dtype.

        Args:
            noise: [B, *x_dims].
            drawn: It is nobody else's, or it is `empty()`; else it is copied.
        """
        velocities = self._setting.velocities
        dtype, differentiable = velocities.dtype, velocities.differentiable
        state = subclasses.attempted(
            "a copy of the noise", [noise], lambda: drawn_or_copied(noise, drawn, dtype, differentiable)
        )
        if self._states is not None:
            self._states.append(state)
        return state

    def tensor(self, state: Any) -> Tensor:
        """A tensor over the state's memory, an object of its own."""
        return state.view_as(state) if self._setting.velocities.differentiable else state.detach()

    def time(self, k: int) -> Tensor:
        """The k-th time of the table, [B, 1, ..., 1]."""
        return self._times[k]

    def draw(self, buffer: int, noise: StepNoise, step: int) -> None:
        """Has the next step read the noise of this one, by its number, in the place of a history buffer."""
        self._history[buffer] = noise(step, None)

    def evaluate(self, step_fn: StepFn, state: Any, time: int) -> Any:
        """v = step_fn(x=state, t=time). A write to x is a write to the state, and shows in the trajectory.

        So does what takes the place of x, as x.data = y; other than in plain eager mode it is not noticed.

        Raises:
            ValueError: x was replaced by a tensor of another shape, dtype or device, or with a derivative.
        """
        x = self.tensor(state)
        v = step_fn(x=x, t=self._times[time])
        if self._setting.eager and type(state) is Tensor and not _same_memory(state, x):
            settle(state, x, self._setting.velocities.differentiable)
        return v

    def owns(self, state: Any, v: Any) -> bool:
        """Whether v is the state, or a view of it."""
        return self._setting.eager and _shares_storage(state, v)

    def step(self, state: Any, base: Any, v: Any, u: Any, row: int, evaluation: Evaluation) -> Any:
        """The next state; None, with nothing written, where the velocities need `prepare`.

        Args:
            state: The state that was evaluated.
            base: The state at the start of the step.
            v, u: What the model returned.
            row: Of the coefficients.
            evaluation: The row's other half.
        """
        table, velocities, guidance = self._setting.table, self._setting.velocities, self._setting.guidance
        v, u = velocities.checked(v, u, row)
        if not self._setting.eager and not velocities.differentiable:  # a transform's derivative, which no_grad keeps
            v, u = v.detach(), None if u is None else u.detach()
        if type(base) is not Tensor:
            v, u = subclasses.number_beside(v, base), subclasses.number_beside(u, base)
        h = terms(self._history, evaluation.read)
        if self._columns is not None:
            columns = self._columns[row]
            h0 = reference.velocity(v, u, columns, guidance)
            setting = self._setting
            out = reference.combine(base, (h0, *h), columns, setting.rounding, table.sum_first, None, setting.strength)
        else:
            assert self._fused_step is not None
            rest = self._setting.rounding, guidance, table.sum_first, self._setting.strength
            out = self._fused_step(base, v, u, *h, table.coefficients, row, *rest)
        if evaluation.write is not None:
            if self._columns is None:
                columns = reference.Columns.of(table.coefficients, row, base.dim(), table.sizes)
                h0 = reference.velocity(v, u, columns, guidance)
            remembered = reference.remember(base, h0, columns, table.sum_first)
            self._history[evaluation.write] = remembered if self._columns is not None else remembered.contiguous()
        if evaluation.commit and self._states is not None:
            self._states.append(out)
        return out

    def prepare(self, base: Any, v: Any, u: Any, row: int) -> tuple[Any, Any, Tensor, Tensor | None]:
        """The rows to go on with, base for them, and the velocities as they take them.

        Raises:
            TypeError, ValueError: as `Velocities.checked`.
        """
        raise AssertionError("functional rows take every velocity")

    def replace(self, state: Any, x: Tensor, y: Tensor) -> Any:
        """The committed state as a constraint returned it; None, where it needs `functional()`.

        Args:
            state: The state that it was called with.
            x: The tensor over that state that it was called with.
            y: What it returned: x itself, or a tensor of x's shape, dtype and device.
        """
        y = y if self._setting.velocities.differentiable else y.detach()
        state = y.clone(memory_format=torch.contiguous_format)
        if self._states is not None:
            self._states[-1] = state
        return state

    def result(self, state: Any) -> Tensor:
        """The last state, as its caller's."""
        return state

    def trajectory(self, state: Any, steps: int) -> Tensor:
        """The committed states, [B, steps + 1, *x_dims], of which `state` is the last."""
        states = self._states
        assert states is not None
        return subclasses.attempted("a trajectory", states, lambda: self._stacked(states))

    def _stacked(self, states: list[Tensor]) -> Tensor:
        device_type = self._setting.velocities.device.type
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return torch.stack(states, dim=1)
        with torch.autocast(device_type, enabled=False):  # under which stack takes no 16-bit dtype but autocast's own
            return torch.stack(states, dim=1)

    def time_steps(self, steps: int) -> Tensor:
        """The time grid as far as it came, a copy: [steps + 1], or of each sample or token [steps + 1, B, ...]."""
        return self._grid.narrow(0, 0, steps + 1).clone()


class _InPlace:
    """A backend's kernel takes the rows, and draws the noise of a step itself where it has keys."""

    _by_keys: tuple[int, StepNoise, int] | None = None

    def draw(self, buffer: int, noise: StepNoise, step: int) -> None:
        keys = noise.keys(step)
        if keys is None:
            noise(step, self._buffer(buffer))
        else:
            self._by_keys = buffer, noise, step
            self._draw(buffer, keys)

    def _buffer(self, number: int) -> Tensor:
        raise NotImplementedError

    def _draw(self, buffer: int, keys: Tensor) -> None:
        """From now on rows read what these keys draw in the place of a history buffer."""
        raise NotImplementedError

    def _buffers(self) -> list[Tensor]:
        """The history so far, with noise that only the kernel has drawn."""
        if self._by_keys is not None:
            buffer, noise, step = self._by_keys
            noise(step, self._buffer(buffer))
        return [self._buffer(k) for k in range(self._setting.table.buffers)]

    _setting: Setting


class _Fresh(_InPlace):
    """A backend writes each state, its slot and the history in one launch; each state is fresh memory."""

    def __init__(self, setting: Setting) -> None:
        table, velocities = setting.table, setting.velocities
        shape, dtype, device = velocities.shape, velocities.dtype, velocities.device
        self._setting = setting
        self._grid, self._times = times(table.times, shape)
        self._history = tuple(
            torch.empty(shape, dtype=arithmetic_dtype(dtype), device=device) for _ in range(table.buffers)
        )
        self._trajectory = None
        if setting.return_all_steps:
            self._trajectory = torch.empty((shape[0], table.steps + 1, *shape[1:]), dtype=dtype, device=device)

    def slot(self) -> int:
        """The slot of base."""
        raise NotImplementedError

    def empty(self) -> Tensor | None:
        return None

    def start(self, noise: Tensor, drawn: bool) -> Tensor:
        with ordinary():
            state = drawn_or_copied(noise, drawn and not noise.is_inference(), self._setting.velocities.dtype)
        keep(state, self._trajectory, self.slot())
        return state

    def tensor(self, state: Tensor) -> Tensor:
        return state.detach()

    def time(self, k: int) -> Tensor:
        return self._times[k]

    def _buffer(self, number: int) -> Tensor:
        return self._history[number]

    def owns(self, state: Tensor, v: Any) -> bool:
        return _shares_storage(state, v)

    def prepare(self, base: Tensor, v: Any, u: Any, row: int) -> tuple[Any, Any, Tensor, Tensor | None]:
        return _prepare(self, self._setting.velocities, base, v, u, row)

    def replace(self, state: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
        if type(y) is not Tensor or (self._setting.velocities.differentiable and y.requires_grad):
            return None
        if not _same_memory(state, y):
            with ordinary():
                state = y.detach().clone(memory_format=torch.contiguous_format)
        keep(state, self._trajectory, self.slot())
        return state

    def result(self, state: Tensor) -> Tensor:
        return state

    def trajectory(self, state: Tensor, steps: int) -> Tensor:
        assert self._trajectory is not None
        return taken(self._trajectory, steps)

    def time_steps(self, steps: int) -> Tensor:
        return self._grid.narrow(0, 0, steps + 1).clone()

    def functional(self) -> Functional:
        """What goes on from here."""
        return _functional(self._setting, self._grid, self._trajectory, self.slot(), self._buffers())


class Fresh(_Fresh):
    """In C++: csrc/tensor_row.cpp."""

    def __init__(self, setting: Setting, rows: Callable[..., Any]) -> None:
        super().__init__(setting)
        table, velocities, backend = setting.table, setting.velocities, setting.backend
        made = rows(
            *(velocities.shape, native.DTYPES[velocities.dtype], native.device(velocities.device)),
            *(table.coefficients, self._times, self._trajectory, self._history),
            *(setting.rounding, setting.guidance, table.sum_first, setting.strength, _read_once(setting)),
            *(_empty_like(), backend.load_launch(), partial(_by_operands, backend.load()), changed),
        )
        self.evaluate, self.step, self.slot = made.evaluate, made.step, made.slot  # type: ignore[method-assign]
        self._draw = made.draw  # type: ignore[method-assign]


class FreshInPython(_Fresh):
    """The same where the extension is not built."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._fused_step_, self._empty_like = setting.backend.load(), _empty_like()
        self._slot, self._at_base = 0, True  # base's; the state is base, and not one within a step
        self._read = list(self._history)

    def _draw(self, buffer: int, keys: Tensor) -> None:
        self._read[buffer] = keys

    def slot(self) -> int:
        return self._slot

    def evaluate(self, step_fn: StepFn, state: Tensor, time: int) -> Any:
        counted = self._trajectory is not None and self._at_base
        before, x = state._version if counted else 0, state.detach()
        v = step_fn(x=x, t=self._times[time])
        replaced = not _same_memory(state, x)
        if replaced or (counted and state._version != before):
            changed(state, x, replaced, self._trajectory if counted else None, self._slot)
        return v

    def step(self, state: Tensor, base: Tensor, v: Any, u: Any, row: int, evaluation: Evaluation) -> Tensor | None:
        setting, table = self._setting, self._setting.table
        if not setting.velocities.plain(v, u):
            return None
        commit, write = evaluation.commit, evaluation.write
        slot = self._slot + commit
        out = self._empty_like(base)
        trajectory = self._trajectory if commit else None
        history = None if write is None else self._history[write]
        rest = (setting.rounding, setting.guidance, table.sum_first, setting.strength, trajectory, slot, history)
        h1, h2, h3 = terms(self._read, evaluation.read)
        self._fused_step_(Operands(out, base, v, u, h1, h2, h3, table.coefficients, row, *rest))
        self._slot, self._at_base = slot, commit
        return out


class Counted(_InPlace):
    """The `cpu` backend's states, in blocks that count who holds them (csrc/row.cpp). A state is a `_C.State`."""

    def __init__(self, setting: Setting, rows: Callable[..., Any]) -> None:
        table, velocities = setting.table, setting.velocities
        self._setting = setting
        # An inference tensor does not count its writes: a slot is then written after the model has seen the state.
        deferred = setting.constrained or (setting.return_all_steps and torch.is_inference_mode_enabled())
        slots = table.steps + 1 if setting.return_all_steps else 0
        self._rows = made = rows(
            *(velocities.shape, native.DTYPES[velocities.dtype], table.coefficients, table.times),
            *(slots, table.buffers, setting.rounding, setting.guidance, table.sum_first, setting.strength, deferred),
        )
        # In C++ alone:
        self.empty, self.tensor, self.time, self.owns = made.empty, made.tensor, made.time, made.owns
        self.evaluate, self.step, self.result = made.evaluate, made.step, made.tensor
        self._buffer, self._draw = made.history, made.draw  # type: ignore[method-assign]

    def start(self, noise: Tensor, drawn: bool = False) -> Any:
        state = self._rows.start(noise)
        return self._rows.start(self._rows.empty().copy_(noise)) if state is None else state

    def prepare(self, base: Any, v: Any, u: Any, row: int) -> tuple[Any, Any, Tensor, Tensor | None]:
        return _prepare(self, self._setting.velocities, base, v, u, row)

    def replace(self, state: Any, x: Tensor, y: Tensor) -> Any:
        if type(y) is not Tensor or (self._setting.velocities.differentiable and y.requires_grad):
            return None
        self._rows.settle(state, x)
        return state if _same_memory(self._rows.tensor(state), y) else self.start(y)

    def trajectory(self, state: Any, steps: int) -> Tensor:
        return taken(self._rows.trajectory(state), steps)

    def time_steps(self, steps: int) -> Tensor:
        return self._rows.time_steps(steps + 1)

    def functional(self) -> Functional:
        """What goes on from here."""
        table, rows = self._setting.table, self._rows
        trajectory = rows.slots() if self._setting.return_all_steps else None
        return _functional(self._setting, rows.time_steps(len(table.times)), trajectory, rows.slot(), self._buffers())


def _prepare(
    rows: _Fresh | Counted, velocities: Velocities, base: Any, v: Any, u: Any, row: int
) -> tuple[Any, Any, Tensor, Tensor | None]:
    v, u = velocities.checked(v, u, row)
    if velocities.plain(v, u) and not (velocities.differentiable and (_derived(v) or _derived(u))):
        return rows, base, dense(v), None if u is None else dense(u)
    # A tensor subclass: a mode or a transform may be at work. Or a derivative.
    return rows.functional(), rows.tensor(base), v, u


def _functional(
    setting: Setting, grid: Tensor, trajectory: Tensor | None, slot: int, history: Sequence[Tensor]
) -> Functional:
    states = () if trajectory is None else trajectory.unbind(1)[: slot + 1]
    return Functional(_of_derivative(setting), grid, states, history)


def times(grid: Tensor, shape: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A copy of a table's times, and each as step_fn sees it, [B, 1, ..., 1] or [B, L, 1, ..., 1], to write to."""
    grid, ones = grid.clone(), [1] * (len(shape) + 1 - grid.dim())
    if grid.dim() > 1:
        return grid, grid.view(*grid.shape, *ones).unbind()
    return grid, grid.view(-1, *ones).expand(-1, shape[0], *ones[1:]).unbind()


def drawn_or_copied(noise: Tensor, drawn: bool, dtype: torch.dtype, differentiable: bool = False) -> Tensor:
    """The noise as a state, contiguous: an object of our own, since whoever saw the draw keeps what it saw."""
    if not drawn or noise.dtype is not dtype or not noise.is_contiguous():
        noise = noise.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return noise if differentiable else noise.detach()


def terms(history: Sequence[Any], read: Sequence[int]) -> tuple[Tensor | None, ...]:
    """h1, h2 and h3: the history buffers that a row reads."""
    return (*(history[k] for k in read), None, None, None)[:3]


def taken(trajectory: Tensor, steps: int) -> Tensor:
    """The trajectory as far as it came."""
    return trajectory if trajectory.shape[1] == steps + 1 else trajectory.narrow(1, 0, steps + 1).contiguous()


def _by_operands(fused_step_: Callable[..., None], fields: Sequence[Any], *key: int) -> None:
    fused_step_(Operands(*fields), *key)


def _read_once(setting: Setting) -> bool:
    """Whether each state is read by one call of step_fn and by the step that follows it, and by nothing else."""
    table, guidance = setting.table, setting.velocities.guidance
    two_models = guidance is not None and guidance.unguided_step_fn is not None
    return len(table.evaluations) == table.steps and not two_models


def changed(state: Tensor, x: Tensor, replaced: bool, trajectory: Tensor | None, slot: int) -> None:
    """A step_fn wrote to x, the state or a tensor over it, or replaced it: the state and its slot have its values."""
    if replaced:
        with ordinary():
            settle(state, x)
    keep(state.detach(), trajectory, slot)  # a step_fn may have asked for x's gradient


def keep(state: Tensor, trajectory: Tensor | None, slot: int) -> None:
    """Writes a state to its slot of the trajectory, if there is one."""
    if trajectory is not None:
        trajectory.select(1, slot).copy_(state)


def settle(state: Tensor, x: Tensor, differentiable: bool = False) -> None:
    """Takes the values of x, a tensor over the state that was replaced in place: x.data = y, x.transpose_().

    Raises:
        ValueError: x has another shape, dtype or device than the state, or autograd knows the state.
    """
    if type(x) is not Tensor or x.shape != state.shape or x.dtype != state.dtype or x.device != state.device:
        raise ValueError(
            "x was replaced in place by a tensor of another shape, dtype or device: return a new tensor instead"
        )
    if differentiable:
        raise ValueError("x was replaced in place, which has no derivative: return a new tensor instead")
    state.data = x.detach().clone(memory_format=torch.contiguous_format)  # who holds the old memory keeps it


def _same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether y is the contiguous x."""
    return (
        y.data_ptr() == x.data_ptr()
        and y.shape == x.shape
        and y.is_contiguous()
        and not y.is_neg()
        and not y._is_zerotensor()
    )


def _shares_storage(x: Any, y: Any) -> bool:
    for tensor in (x, y):
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_nested:
            return False
        if tensor._is_zerotensor():
            return False
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def ordinary() -> Any:
    """A context in which tensors are ordinary ones, even under inference mode: they count the writes of a step_fn."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def _empty_like() -> Callable[[Tensor], Tensor]:
    return _ordinary_empty_like if torch.is_inference_mode_enabled() else torch.empty_like


def _ordinary_empty_like(x: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty_like(x)
