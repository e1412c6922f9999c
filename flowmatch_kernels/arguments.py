"""Checks of arguments that several places take: what was got, and what was wanted."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch


def count(value: Any, name: str) -> int:
    """An int that is not negative.

    Raises:
        TypeError: it is no int.
        ValueError: it is negative.
    """
    if type(value) is int and value >= 0:
        return value
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


def expands(shape: torch.Size, wanted: Sequence[int]) -> bool:
    """Whether a tensor of this shape expands to the wanted one, which stays as it is."""
    try:
        return torch.broadcast_shapes(shape, wanted) == wanted
    except RuntimeError:
        return False
