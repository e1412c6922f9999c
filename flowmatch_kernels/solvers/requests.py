"""What sample() asks of the solvers: a table, which is kept for the next request that is the same."""

from __future__ import annotations

import ctypes
import math
import struct
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import guidance, time_grids, tracing
from ..arguments import own_dims, row_name, tensor
from ..guidance import Weight
from ..ops.fused_step import dense
from ..tracing import is_readable
from .fitted import FittedSolver, titled
from .grid import Grid, check_absolute, checked_grid, checked_sizes, named_entries, on_host
from .ode import ABSOLUTE
from .per_sample import Row, grouped, rows_of, side_by_side, stacked, with_name, without_holds
from .stages import part
from .stochastic import Loaded, StochasticSolver
from .table import Table, build

Numbers = Tensor | Sequence[float]


class Request(NamedTuple):
    """What describes a table."""

    int_method: Loaded
    steps: int
    """N of a named grid; without meaning where time_steps are given, or a fitted solver brings its own times."""
    dtype: torch.dtype
    """Of the coefficients."""
    device: torch.device
    noise_at: int
    predicts: int | None
    """The end of time whose state step_fn predicts; None: it predicts the velocity."""
    euler_at_final: bool
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
    sizes: tuple[int, ...] = ()
    """The first sizes of the state that time_steps, step_sizes or the weight have a row for each of: (B,) for samples,
    (B, L) for tokens; (): one table row serves all."""

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
        return (solver, *self[1:8], options, self.grid_dtype, grid, sizes, self.form, weight, self.sizes)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that its key names by identity."""
        given = (self.time_steps, self.step_sizes)
        return tuple(x for x in given if isinstance(x, Tensor) and x.device.type != "cpu")

    def make(self, check: bool = False) -> Table:
        """The table; `check`: each segment's weights too, and that the coefficients of a named grid are finite.

        Raises:
            TypeError: time_steps or step_sizes is no floating-point tensor or list of floats.
            ValueError: their shape or a value is wrong, or the solver cannot use the grid.
        """
        if own_times := max(own_dims(self.time_steps), own_dims(self.step_sizes)):
            table = self._stacked(self.sizes[:own_times], check)
            return self._guided(table, lambda: table.times.flatten(1).tolist())
        grid, sizes = self._checked()
        return self._guided(self._built(grid, sizes, check), lambda: self._times(grid.entries))

    def _checked(self) -> tuple[Grid, Grid | None]:
        """The time grid, and the step sizes where they are given."""
        grid, sizes = self._grid(), None
        if self.step_sizes is not None:
            sizes = checked_sizes(self.step_sizes, grid.tensor.shape[0] - 1, self.device)
        if self._is_own and (
            self.predicts is not None or isinstance(self.int_method, StochasticSolver) or self.int_method in ABSOLUTE
        ):
            who = str(self.int_method) if self.predicts is None else "prediction_type"
            check_absolute(grid, sizes, self.noise_at, who)
        return grid, sizes

    @property
    def _is_own(self) -> bool:
        """The grid or its step sizes are a user's numbers."""
        return self.time_steps is not None or self.step_sizes is not None or callable(self.time_grid)

    def _built(self, grid: Grid, sizes: Grid | None, check: bool) -> Table:
        """The table on a grid, or those on several side by side."""
        table = build(
            self.int_method,
            grid,
            sizes,
            self.dtype,
            self.device,
            self.noise_at,
            self.predicts,
            self.euler_at_final,
            check,
        )
        if self._is_own or check:
            check_finite(table, self.int_method, self.noise_at)
        return table

    def _guided(self, table: Table, times: Callable[[], Any]) -> Table:
        if self.form is None:
            return table
        return table.guided(guidance.form(self.form), self.weight, times, self.sizes)

    def _stacked(self, sizes: tuple[int, ...], check: bool) -> Table:
        """The table where each of the first sizes of the state has its own times, without weights.

        Samples and tokens with the same grid share a row of it, and what rows that hold in the same steps have is
        computed at once.
        """
        R = math.prod(sizes)
        if not R:
            raise ValueError(f"time_steps of each sample need a batch of one sample or more, got {list(sizes)}")
        if own_dims(self.time_steps):
            times = rows_of(self.time_steps, sizes, "time_steps")
        else:
            times = [on_host(self._grid().tensor)] * R
        its_sizes: Sequence[Any] = [self.step_sizes] * R
        if own_dims(self.step_sizes):
            its_sizes = rows_of(self.step_sizes, sizes, "step_sizes")
        cpu = torch.device("cpu")
        plain = self._replace(form=None, weight=0.0, sizes=(), device=cpu, time_grid="uniform", options=())
        rows: list[Row] = []
        known: dict[Hashable, int] = {}

        def numbered(r: int) -> int:
            """Of `rows` the one with this grid, made where it is new."""
            key = content(times[r]), content(its_sizes[r])
            if None not in key and key in known:
                return known[key]
            name = row_name(r, sizes)
            own = without_holds(times[r], its_sizes[r], name)
            checked: tuple[Grid | None, Grid | None] = (None, None)
            if own.times is not None:
                checked = with_name(name, plain._replace(time_steps=own.times, step_sizes=own.sizes)._checked)
            rows.append(Row(name, _row(times[r], self.grid_dtype), own.steps, *checked))
            known[key] = len(rows) - 1
            return known[key]

        which = [numbered(r) for r in range(R)]

        def table_of(group: Sequence[Row]) -> Table:
            own = plain._replace(time_steps=())  # each row brings its own
            try:
                return own._built(*side_by_side(group), check)
            except ValueError:
                for row in group:
                    with_name(row.name, own._built, row.grid, row.sizes, check)
                raise

        groups = grouped(rows)
        tables = [table_of(group) if group[0].steps else None for group in groups]
        steps = rows[0].times.shape[0] - 1
        structure = next((t for t in tables if t is not None and t.steps == steps), None)
        if structure is None:  # the evaluations of so many steps, whatever their times
            ends = (0.75, 0.25) if self.noise_at else (0.25, 0.75)
            uniform = torch.linspace(*ends, steps + 1, dtype=torch.float64, device="cpu")
            structure = plain._replace(time_steps=uniform, step_sizes=None).make()
        table = stacked(structure, groups, tables, [rows[number] for number in which], sizes)
        return table._replace(
            coefficients=table.coefficients.to(self.device),
            times=table.times.to(self.device),
            densities=None if table.densities is None else table.densities.to(self.device),
        )

    def _grid(self) -> Grid:
        """The time grid."""
        if isinstance(self.int_method, FittedSolver):
            return Grid(self.int_method.grid(self.grid_dtype), self.int_method.times)
        if self.time_steps is not None:
            return checked_grid(self.time_steps, "time_steps", self.device)
        if callable(self.time_grid) and self.steps:
            grid = checked_grid(self.time_grid(self.steps), "what time_grid returned", self.device)
            if (entries := grid.tensor.shape[0]) != self.steps + 1:
                raise ValueError(
                    f"time_grid returned {entries} entries for {self.steps} steps; wanted {self.steps + 1}"
                )
            return grid
        if callable(self.time_grid) or self.time_grid == "uniform":  # as the published loop takes it, to the bit
            first = float(self.noise_at)
            tensor = torch.linspace(first, 1.0 - first, self.steps + 1, dtype=self.grid_dtype, device=self.device)
        else:
            make = time_grids.time_grid(self.time_grid)
            tensor = make(self.steps, noise_at=self.noise_at, dtype=self.grid_dtype, **dict(self.options))
        return Grid(tensor, named_entries(self.steps, self.noise_at))

    def _times(self, entries: tuple[float, ...] | None) -> tuple[float, ...]:
        """The table's times as numbers, where the table's tensor cannot be read.

        Args:
            entries: Those of the time grid, as far as they are known.

        Raises:
            ValueError: they are not known.
        """
        if entries is None:
            raise ValueError(
                "inference_guidance_weight is a function of t, and the time grid is a tensor whose values cannot be "
                "read under a compiler, a tracer or vmap: pass the grid as a list of floats, or a weight for each step"
            )
        method, options, known = self.int_method, self.options, None
        name = self.time_grid if isinstance(self.time_grid, str) else "uniform"
        if isinstance(method, FittedSolver):
            method, known = "euler", entries  # at the start of each step, as it
        elif self.time_steps is not None or callable(self.time_grid):
            known = entries
        if known is not None:
            name, options, known = "uniform", (), tuple(map(_plain, known))
        rest = self.grid_dtype, self.device, known
        times = _computed_times(method, self.steps, self.noise_at, self.euler_at_final, name, options, *rest)
        return tuple(map(_plain, times))  # of an entry as it comes from the call above Dynamo cannot ask the type


def _plain(entry: float) -> float:
    """A number that a compiler may have made symbolic, as the float that it is now; the compiler guards it."""
    if not torch.compiler.is_compiling():
        return entry
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(entry)


def _computed_times(
    int_method: str | StochasticSolver,
    steps: int,
    noise_at: int,
    euler_at_final: bool,
    time_grid: str,
    options: tuple[tuple[str, float], ...],
    grid_dtype: torch.dtype,
    device: torch.device,
    entries: tuple[float, ...] | None,
) -> tuple[float, ...]:
    """The times of such a table, computed for real, whatever mode or tracer is at work."""
    with tracing.suspended():
        if device.type != "cuda" or not torch.cuda.is_available():
            device = torch.device("cpu")
        rest = euler_at_final, time_grid, options, grid_dtype, entries
        request = Request(int_method, steps, torch.float64, device, noise_at, None, *rest)
        return tuple(request.make().times.tolist())


_computed_times._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as dispatch._resolve


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
        if numbers.dim() > 1 and numbers.is_floating_point() and is_readable(numbers):
            memory = dense(numbers)
            return numbers.dtype, numbers.shape, ctypes.string_at(memory.data_ptr(), memory.nbytes)
        if numbers.dim() != 1 or not numbers.is_floating_point():
            return None
        return numbers.dtype, numbers.numel(), struct.pack(f"{numbers.numel()}d", *numbers.tolist())
    if isinstance(numbers, (list, tuple)) and numbers and set(map(type, numbers)) <= {float, int}:
        try:
            return len(numbers), struct.pack(f"{len(numbers)}d", *numbers)
        except OverflowError:  # an int beyond float64: `make` says so
            return None
    if isinstance(numbers, (list, tuple)) and own_dims(numbers):
        rows = tuple(map(content, numbers))
        return None if None in rows else rows
    return None


def _row(row: Any, dtype: torch.dtype) -> Tensor:
    """The grid of one row on the CPU: a list becomes a tensor of `dtype`, as in `checked_grid`."""
    return row if isinstance(row, Tensor) else tensor([float(entry) for entry in row], dtype)


class RequestLike(Protocol):
    """What describes a table: `Request`, and that of `flowmatch_kernels.diffusion`."""

    @property
    def device(self) -> torch.device:
        """Of the coefficients and times."""
        ...

    def key(self) -> Hashable:
        """What is equal for requests of the same table, to the bit; None: it is not known."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that its key names by identity."""
        ...

    def make(self, check: bool = False) -> Table:
        """The table."""
        ...


class _Cache:
    """The last few tables. Safe across threads and streams."""

    capacity = 64

    def __init__(self) -> None:
        self._tables: dict[Hashable, tuple[Table, tuple[weakref.ref[Tensor], ...]]] = {}
        self._pinned: dict[int, Table] = {}  # by id: a CUDA graph reads them whenever it is replayed
        self._lock = threading.Lock()

    def get(self, request: RequestLike) -> Table:
        """The table of a request, kept if it can be."""
        if isinstance(request, Request) and callable(request.weight):  # asked at each sample(): its values are not kept
            assert request.form is not None
            unguided = self.get(request._replace(form=None, weight=0.0))
            return unguided.guided(guidance.form(request.form), request.weight, sizes=request.sizes)
        key = request.key()
        if key is None:
            return request.make(check=True)
        table = self._kept(key, request)
        if table is None:
            # Ordinary tensors even under inference mode: who comes next may not be under it.
            with torch.inference_mode(False), torch.no_grad():
                table = request.make(check=True).readable()
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
            if table.densities is not None:
                table.densities.record_stream(stream)
        return table

    def captured(self, request: RequestLike) -> Table:
        """The table of a request while a CUDA graph is captured, which then holds it for good.

        Raises:
            RuntimeError: it is not there, and to make one would copy from the host, which a capture does not allow.
        """
        key = None if isinstance(request, Request) and callable(request.weight) else request.key()
        if key is None:
            raise RuntimeError(
                "a time_grid or an inference_guidance_weight that is a function, and a grid that is neither a list nor "
                "a plain tensor, cannot be captured in a CUDA graph, which keeps the numbers of its capture: pass "
                "time_steps as a list, and a weight for each step"
            )
        table = self._kept(key, request)
        if table is None:
            raise RuntimeError(
                "sample() within the capture of a CUDA graph needs the solver's table, which is not there yet: call it "
                "once with the same arguments before the capture, as its warm-up"
            )
        with self._lock:
            self._pinned[id(table)] = table
        return table

    def _kept(self, key: Hashable, request: RequestLike) -> Table | None:
        table, tensors = self._tables.get(key, (None, ()))
        # Another tensor may have the address of one that is gone.
        return table if all(map(_is, tensors, request.tensors())) else None

    def clear(self) -> None:
        with self._lock:
            self._tables.clear()


cache = _Cache()


def table_for(request: RequestLike, cached: bool) -> Table:
    """The table of a request; within a capture the one that a CUDA graph then holds.

    Args:
        request: What describes it.
        cached: Kept for the next request that is the same.
    """
    if request.device.type == "cuda" and tracing.is_capturing():
        return cache.captured(request)
    return cache.get(request) if cached else request.make()


def _is(reference: weakref.ref[Tensor], tensor: Tensor) -> bool:
    return reference() is tensor


def check_finite(table: Table, int_method: Loaded, noise_at: int) -> None:
    """Raises where a solver cannot use a time grid.

    Raises:
        ValueError: a coefficient is not finite.
    """
    rows = table.coefficients
    if is_readable(rows) and not (
        part(rows, 0, 5, dim=-1).isfinite().all() and part(rows, 7, 8, dim=-1).isfinite().all()
    ):
        grid = part(table.times, 0, table.steps + 1).tolist()
        raise ValueError(
            f"{titled(int_method)} has no finite coefficients on this time grid, {grid!s:.200}: it needs one that runs "
            f"from the noise, at t = {noise_at}, to the data, with neither end of time inside it, entries that differ, "
            "and step_sizes, where they are given, other than 0"
        )
