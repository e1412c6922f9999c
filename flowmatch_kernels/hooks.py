"""What a user does with each committed state: a constraint, which changes it, and a callback, which may stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .velocities import described, layout, unwrapped


class Hooks(NamedTuple):
    """Both are called after each committed step."""

    constraint: Callable[[Tensor, Tensor], Tensor] | None
    """(x, t) -> what the state x becomes."""
    callback: Callable[[int, Tensor, Tensor], bool | None] | None
    """(step, t, x); True ends the sampling."""

    def constrained(self, rows: Any, state: Any, step: int) -> tuple[Any, Any]:
        """The state as the constraint leaves it, and what takes the next row.

        Raises:
            TypeError: the constraint returned no tensor, or one of another dtype or layout than x's.
            ValueError: it returned another shape, or a tensor on another device.
        """
        if self.constraint is None:
            return rows, state
        x = rows.tensor(state)
        y = self.constraint(x, rows.time(step))
        check(y, x)
        y = unwrapped(y)
        new = rows.replace(state, x, y)
        if new is None:
            rows = rows.functional()
            new = rows.replace(state, x, y)
        return rows, new

    def stop(self, rows: Any, state: Any, step: int) -> bool:
        """Whether the callback ends the sampling after so many steps.

        Raises:
            TypeError: it returned neither a bool nor None.
        """
        if self.callback is None:
            return False
        answer = self.callback(step - 1, rows.time(step), rows.tensor(state).clone())
        if answer is None or isinstance(answer, bool):
            return answer is True
        wanted = "callback must return True to stop, or None or False to go on"
        raise TypeError(f"{wanted}, got {described(answer)}: bool(...) makes it one")


def hooks_of(constraint: Any, callback: Any) -> Hooks | None:
    """The hooks that a user gave, or None.

    Raises:
        TypeError: one is not callable.
    """
    for name, hook in (("constraint", constraint), ("callback", callback)):
        if hook is not None and not callable(hook):
            raise TypeError(f"{name} must be callable, got {hook!r:.60}")
    return None if constraint is None and callback is None else Hooks(constraint, callback)


def check(y: object, x: Tensor) -> None:
    """Raises where a constraint that was called with x returned what cannot take its place; see `Hooks`."""
    wanted = f"wanted a tensor {list(x.shape)}, {x.dtype}, on {x.device}"
    if not isinstance(y, Tensor):
        raise TypeError(f"constraint returned {described(y)}; {wanted}")
    if y.layout is not torch.strided or y.is_nested:
        raise TypeError(f"constraint returned a tensor of layout {layout(y)}; {wanted}")
    if y.dtype != x.dtype:
        raise TypeError(f"constraint returned a tensor of {y.dtype}; {wanted}")
    if y.shape != x.shape:
        raise ValueError(f"constraint returned a tensor of shape {list(y.shape)}; {wanted}")
    if y.device != x.device:
        raise ValueError(f"constraint returned a tensor on {y.device}; {wanted}")
