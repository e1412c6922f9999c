"""What sample() asks of the solvers: a table, which is kept for the next request that is the same."""

from __future__ import annotations

import struct
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import guidance, time_grids
from ..guidance import Weight
from .fitted import FittedSolver
from .stages import part
from .table import Table, build

Numbers = Tensor | Sequence[float]


class Request(NamedTuple):
    """What describes a table."""

    int_method: str | FittedSolver
    steps: int
    """N of a named grid; without meaning where time_steps are given, or a fitted solver brings its own times."""
    dtype: torch.dtype
    """Of the coefficients."""
    device: torch.device
    noise_at: int
    predicts: int | None
    time_grid: str | Callable[[int], Numbers]
    options: tuple[tuple[str, float], ...]
    """Of the time grid."""
    grid_dtype: torch.dtype
    """A named grid is taken and differenced in this dtype, on `device`; a list becomes a tensor of it."""
    time_steps: Numbers | None = None
    step_sizes: Numbers | None = None
    form: str | None = None
    """The form of guidance."""
    weight: Weight = 0.0

    def key(self) -> Hashable:
        """What is equal for requests of the same table, to the bit; None, where that cannot be known.

        Numbers count by their content; a tensor that the host cannot read without waiting for a device, by its identity
        and version. What a function returns is not kept.
        """
        if callable(self.time_grid) and self.time_steps is None:
            return None
        grid, sizes, weight = content(self.time_steps), content(self.step_sizes), content(self.weight)
        if grid is None or sizes is None or weight is None:
            return None
        options = content(tuple(option for _, option in self.options)) if self.options else b""
        solver = self.int_method.bits() if isinstance(self.int_method, FittedSolver) else self.int_method
        return (solver, *self[1:7], options, self.grid_dtype, grid, sizes, self.form, weight)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that its key names by identity."""
        given = (self.time_steps, self.step_sizes)
        return tuple(x for x in given if isinstance(x, Tensor) and x.device.type != "cpu")

    def make(self, check: bool = False) -> Table:
        """The table; `check`: each segment's weights too, which reads values.

        Raises:
            TypeError: time_steps or step_sizes is no floating-point tensor or list of floats.
            ValueError: their shape or a value is wrong, or the solver cannot use the grid.
        """
        if isinstance(self.int_method, FittedSolver):
            grid = self.int_method.grid(self.grid_dtype, self.device)
        elif self.time_steps is not None:
            grid = checked_grid(self.time_steps, "time_steps")
        elif callable(self.time_grid) and self.steps:
            grid = checked_grid(self.time_grid(self.steps), "what time_grid returned")
            if grid.numel() != self.steps + 1:
                raise ValueError(
                    f"time_grid returned {grid.numel()} entries for {self.steps} steps; wanted {self.steps + 1}"
                )
        else:
            grid = self._named_grid()
        sizes = self.step_sizes
        given = self.time_steps is not None or sizes is not None or callable(self.time_grid)
        dt = torch.diff(grid) if sizes is None else checked_sizes(sizes, grid.numel() - 1).to(grid.device)
        if given and (self.predicts is not None or self.int_method == "dpmpp_2m"):
            check_absolute(
                grid, dt, self.noise_at, str(self.int_method) if self.predicts is None else "prediction_type"
            )
        table = build(self.int_method, grid, dt, self.dtype, self.device, self.noise_at, self.predicts, check)
        if given:
            check_finite(table, self.int_method, self.noise_at)
        return table if self.form is None else table.guided(guidance.form(self.form), self.weight)

    def _named_grid(self) -> Tensor:
        if callable(self.time_grid) or self.time_grid == "uniform":  # as the published loop takes it, to the bit
            first = float(self.noise_at)
            return torch.linspace(first, 1.0 - first, self.steps + 1, dtype=self.grid_dtype, device=self.device)
        make = time_grids.time_grid(self.time_grid)
        return make(self.steps, noise_at=self.noise_at, dtype=self.grid_dtype, **dict(self.options)).to(self.device)


def content(numbers: Any) -> Hashable:
    """Numbers as a key that tells their bits apart (-0.0 from 0.0, and NaN is itself); None, where they have none."""
    if numbers is None:
        return b""
    if type(numbers) is float:
        return struct.pack("d", numbers)
    if type(numbers) is Tensor:
        if numbers.is_sparse or (numbers.is_inference() and numbers.device.type != "cpu"):
            return None
        if numbers.device.type != "cpu":
            return id(numbers), numbers._version
        if numbers.dim() != 1 or not numbers.is_floating_point():
            return None
        return numbers.dtype, numbers.numel(), struct.pack(f"{numbers.numel()}d", *numbers.tolist())
    if isinstance(numbers, (list, tuple)) and set(map(type, numbers)) == {float}:
        return len(numbers), struct.pack(f"{len(numbers)}d", *numbers)
    return None


class _Cache:
    """The last few tables. Safe across threads and streams."""

    capacity = 64

    def __init__(self) -> None:
        self._tables: dict[Hashable, tuple[Table, tuple[weakref.ref[Tensor], ...]]] = {}
        self._lock = threading.Lock()

    def get(self, request: Request) -> Table:
        """The table of a request, kept if it can be."""
        key = request.key()
        if key is None:
            return request.make(check=True)
        table, tensors = self._tables.get(key, (None, ()))
        if tensors and not all(map(_is, tensors, request.tensors())):
            table = None  # another tensor has the address of one that is gone
        if table is None:
            # Ordinary tensors even under inference mode: who comes next may not be under it.
            with torch.inference_mode(False), torch.no_grad():
                table = request.make(check=True)
                if request.time_steps is None and request.step_sizes is None:
                    check_finite(table, request.int_method, request.noise_at)
                table = table.readable()
            if table.coefficients.is_cuda:  # another stream may be the next to read it
                torch.cuda.current_stream(table.coefficients.device).synchronize()
            with self._lock:
                self._tables[key] = table, tuple(map(weakref.ref, request.tensors()))
                while len(self._tables) > self.capacity:
                    del self._tables[next(iter(self._tables))]  # the one that is here longest
        if table.coefficients.is_cuda:  # dropped, its memory must outlive what this stream still has to do with it
            stream = torch.cuda.current_stream(table.coefficients.device)
            table.coefficients.record_stream(stream)
            table.times.record_stream(stream)
        return table

    def clear(self) -> None:
        with self._lock:
            self._tables.clear()


cache = _Cache()


def _is(reference: weakref.ref[Tensor], tensor: Tensor) -> bool:
    return reference() is tensor


def checked_grid(time_steps: Any, name: str) -> Tensor:
    """A time grid as a tensor, [T].

    Raises:
        TypeError: it is neither a floating-point tensor nor a sequence of floats.
        ValueError: it is not 1-D with two or more entries, finite and strictly monotonic.
    """
    try:
        # On the CPU, whatever the default device is: the host checks it.
        grid = (time_steps if isinstance(time_steps, Tensor) else torch.as_tensor(time_steps, device="cpu")).detach()
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


def checked_sizes(step_sizes: Any, steps: int) -> Tensor:
    """Step sizes as a tensor, [steps]; a list becomes float64.

    Raises:
        TypeError: they are neither a floating-point tensor nor a sequence of floats.
        ValueError: there is another number of them, or one is not finite.
    """
    if not isinstance(step_sizes, Tensor):
        try:
            step_sizes = torch.tensor(step_sizes, dtype=torch.float64, device="cpu")
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


def check_absolute(grid: Tensor, dt: Tensor, noise_at: int, who: str) -> None:
    """Raises where what computes with t itself, and not with differences alone, cannot use a grid or its step sizes.

    Args:
        grid: [T].
        dt: [T - 1].
        noise_at: The end of time at which the noise is.
        who: What computes so.

    Raises:
        ValueError: the grid leaves [0, 1] or runs towards the noise, or the step sizes are not its differences.
    """
    times = grid.tolist()
    wanted = f"{who} computes with the time itself, which runs from the noise at t = {noise_at} to the data at t = "
    wanted += f"{1 - noise_at}"
    if not 0 <= min(times) <= max(times) <= 1:
        raise ValueError(f"{wanted}: the time grid must stay in [0, 1], got {times!s:.200}")
    if (times[0] > times[-1]) != bool(noise_at):
        raise ValueError(f"{wanted}: the time grid runs the other way, got {times!s:.200}; is noise_at right?")
    differences, sizes = torch.diff(grid.double()), dt.double()
    if (differences - sizes).abs().max() > 1e-5:  # float32 grids, and differences of them that a user took in float64
        raise ValueError(f"{wanted}: step_sizes must be the grid's differences, got {sizes.tolist()!s:.200}")


def check_finite(table: Table, int_method: str | FittedSolver, noise_at: int) -> None:
    """Raises where a solver cannot use a time grid.

    Raises:
        ValueError: a coefficient is not finite.
    """
    rows = table.coefficients
    if not rows.is_meta and not (part(rows, 0, 5, dim=1).isfinite().all() and part(rows, 7, 8, dim=1).isfinite().all()):
        grid = part(table.times, 0, table.steps + 1).tolist()
        raise ValueError(
            f"{int_method} has no finite coefficients on this time grid, {grid!s:.200}: it needs one that runs from "
            f"the noise, at t = {noise_at}, to the data, with neither end of time inside it, entries that differ, and "
            "step_sizes, where they are given, other than 0"
        )
