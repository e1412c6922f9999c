"""The time grid of a request and its step sizes: their checks, and what the host knows of their values."""

from __future__ import annotations

import itertools
from math import inf
from operator import gt, lt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import as_tensor, check_dense, number, refuse_derivative, tensor
from ..ops.fused_step import FLOAT64_DEVICES
from ..tracing import is_readable


class Grid(NamedTuple):
    """A time grid, or step sizes; or several side by side."""

    tensor: Tensor
    """[T], or [T - 1]; of several [T, R], or [T - 1, R]."""
    entries: tuple[float, ...] | None
    """The same as numbers, for the checks of values; None: a tensor whose values cannot be read. While tracing they are
    those of the list that was given, or, of a grid with a name, those of the uniform one: the ends are the same."""
    each: tuple[tuple[float, ...], ...] = ()
    """Of several the entries of each, as far as they are known; `entries` is None."""

    @property
    def known(self) -> tuple[tuple[float, ...], ...]:
        """The entries of each grid that is here, as far as they are known."""
        return self.each if self.entries is None else (self.entries,)


def on_host(x: Tensor) -> Tensor:
    """x on the CPU, where coefficients are computed in float64; a tensor that is traced stays where float64 is sure."""
    return x.cpu() if is_readable(x) or x.device.type not in FLOAT64_DEVICES else x


def checked_grid(time_steps: Any, name: str, device: torch.device) -> Grid:
    """A time grid. Its values are checked where they can be read; those of a list always.

    Args:
        time_steps: What was given.
        name: The argument's.
        device: The state's.

    Raises:
        TypeError: it is neither a floating-point tensor nor a sequence of numbers.
        ValueError: it is not 1-D with two or more entries, finite and strictly monotonic; or it is on the meta device,
            where it has no values, and the state is not.
    """
    grid = _checked(time_steps, name, torch.get_default_dtype(), device)
    if grid.tensor.dim() != 1 or grid.tensor.shape[0] < 2:
        raise ValueError(f"{name} must be 1-D with two or more entries, got shape {list(grid.tensor.shape)}")
    entries = grid.entries
    if entries is not None and not (
        max(abs(entries[0]), abs(entries[-1])) < inf
        and (all(map(lt, entries, entries[1:])) or all(map(gt, entries, entries[1:])))
    ):
        raise ValueError(
            f"{name} must be finite and strictly monotonic, up or down, without NaN, got {list(entries)!s:.200}"
        )
    return grid


def checked_sizes(step_sizes: Any, steps: int, device: torch.device) -> Grid:
    """Step sizes, [steps]; a list becomes float64.

    Raises:
        TypeError: they are neither a floating-point tensor nor a sequence of numbers.
        ValueError: there is another number of them, or one is not finite; or as for `checked_grid`.
    """
    sizes = _checked(step_sizes, "step_sizes", torch.float64, device)
    if list(sizes.tensor.shape) != [steps]:
        raise ValueError(
            f"step_sizes must hold {steps} entries, one fewer than the time grid, got shape {list(sizes.tensor.shape)}"
        )
    if sizes.entries is not None and not all(abs(size) < inf for size in sizes.entries):
        raise ValueError(f"step_sizes must be finite, got {list(sizes.entries)!s:.200}")
    return sizes


def _checked(given: Any, name: str, dtype: torch.dtype, device: torch.device) -> Grid:
    """A floating-point tensor as it is, or a sequence of numbers as a tensor of `dtype`."""
    refuse_derivative(given, name)
    if isinstance(given, (list, tuple)) and not any(isinstance(entry, (list, tuple)) for entry in given):
        numbers = tuple(number(entry, f"{name}[{k}]") for k, entry in enumerate(given))
        grid = tensor(numbers, dtype)
        return Grid(grid, tuple(grid.tolist()) if is_readable(grid) else numbers)
    try:
        grid = (given if isinstance(given, Tensor) else as_tensor(given)).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor or a sequence of floats, got {given!r:.60}") from None
    if not grid.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {grid.dtype}")
    check_dense(grid, name)
    if grid.device.type == "meta" and device.type != "meta":
        raise ValueError(f"{name} is on the meta device, where it has no values, and the state is on {device}")
    return Grid(grid, tuple(grid.tolist()) if grid.dim() == 1 and is_readable(grid) else None)


def check_absolute(grid: Grid, sizes: Grid | None, noise_at: int, who: str) -> None:
    """Raises where what computes with t itself, and not with differences alone, cannot use a grid or its step sizes.

    Args:
        grid: The time grid.
        sizes: The step sizes; None: the grid's differences.
        noise_at: The end of time at which the noise is.
        who: What computes so.

    Raises:
        ValueError: the grid leaves [0, 1] or runs towards the noise, or the step sizes are not its differences.
    """
    times = grid.entries
    if times is None:
        return
    wanted = f"{who} computes with the time itself, which runs from the noise at t = {noise_at} to the data at t = "
    wanted += f"{1 - noise_at}"
    if not 0 <= min(times) <= max(times) <= 1:
        raise ValueError(f"{wanted}: the time grid must stay in [0, 1], got {list(times)!s:.200}")
    if (times[0] > times[-1]) != bool(noise_at):
        raise ValueError(f"{wanted}: the time grid runs the other way, got {list(times)!s:.200}; is noise_at right?")
    if sizes is None or sizes.entries is None:
        return
    differences = [after - before for before, after in itertools.pairwise(times)]
    # float32 grids, and differences of them that a user took in float64
    if max(abs(a - b) for a, b in zip(differences, sizes.entries, strict=True)) > 1e-5:
        raise ValueError(f"{wanted}: step_sizes must be the grid's differences, got {list(sizes.entries)!s:.200}")


def named_entries(steps: int, noise_at: int) -> tuple[float, ...]:
    """What is known of a grid with a name before it is made: its ends, and entries that lie between them."""
    return tuple(abs(noise_at - k / steps) for k in range(steps + 1)) if steps else (float(noise_at),)
