"""Checks of arguments that several places take: what was got, and what was wanted."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops.fused_step import double


def count(value: Any, name: str) -> int:
    """An int that is not negative.

    Raises:
        TypeError: it is no int.
        ValueError: it is negative.
    """
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, torch.SymInt):  # of a tracer, which records what holds for more than one size
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r:.60}") from None
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return number


def number(value: Any, name: str, wanted: str = "a number") -> float:
    """A number as a float.

    Raises:
        TypeError: it is none.
    """
    if type(value) is float:
        return value
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{name} must be {wanted}, got {value!r:.60}") from None


def unread(value: Tensor, name: str) -> Any:
    """A number in a tensor whose value cannot be read, as a compiler traces it: as it is.

    Raises:
        TypeError: it is not floating point.
    """
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number, got a tensor of {value.dtype}")
    return value.detach()


def tensor(numbers: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Numbers as a tensor, [n]: on the CPU, save where a compiler traces one that is on another device.

    A number may be a symbolic one of a compiler, or a 0-dim tensor that it traces.
    """
    if not torch.compiler.is_compiling() and not any(isinstance(value, Tensor) for value in numbers):
        return torch.tensor(numbers, dtype=dtype, device="cpu")
    # Products, so that a compiler takes a symbolic number as an input of its graph, and compiles once for all values.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([double(x) if isinstance(x, Tensor) else one * x for x in numbers]).to(dtype)


def flag(value: Any, name: str) -> bool:
    """True or False.

    Raises:
        TypeError: it is anything else.
    """
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} must be True or False, got {value!r:.60}")


def expands(shape: torch.Size, wanted: Sequence[int]) -> bool:
    """Whether a tensor of this shape expands to the wanted one, which stays as it is."""
    try:
        return torch.broadcast_shapes(shape, wanted) == wanted
    except RuntimeError:
        return False
