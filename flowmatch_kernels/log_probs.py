"""The log-probability of each step of a stochastic solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import dispatch, reference
from .solvers import Table
from .velocities import Model, Velocities


class LogProbs:
    """Takes the log-probability of each step as it is made: in the place of `Hooks`, which do not go with it.

    Args:
        table: The solver's, with densities.
        velocities: The checks, for states as they are stored.
        guidance: The fused step's argument.
        backend: Its name.
        seen: A state as users see it.
    """

    def __init__(
        self,
        table: Table,
        velocities: Velocities,
        guidance: int,
        backend: str,
        seen: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._table, self._velocities, self._guidance, self._backend = table, velocities, guidance, backend
        self._seen = seen
        self._before: Any = None
        self._values: list[Tensor] = []

    def watched(self, model: Model) -> Model:
        """The model, whose state and velocities are kept for the step that follows."""

        def evaluate(rows: Any, state: Any, time: int, row: int) -> tuple[Any, Any]:
            v, u = model(rows, state, time, row)
            self._before = rows.tensor(state), v, u, row
            return v, u

        return evaluate

    def constrained(self, rows: Any, state: Any, step: int) -> tuple[Any, Any]:
        """As `Hooks.constrained`: takes the step from the state that was evaluated, and changes nothing."""
        (x, v, u, row), self._before = self._before, None
        after = rows.tensor(state)
        v, u = self._velocities.checked(v, u, row)
        if u is not None:
            columns = reference.Columns.of(self._table.coefficients, row, x.dim())
            v = reference.velocity(v, u, columns, self._guidance)
        if self._seen is not None:
            x, v, after = self._seen(x), self._seen(v), self._seen(after)
        self._values.append(step_log_prob(self._table, x, v, after, row, self._backend))
        return rows, state

    def stop(self, rows: Any, state: Any, step: int) -> bool:
        """As `Hooks.stop`."""
        return False

    def result(self) -> Tensor:
        """[B, N]."""
        return torch.stack(self._values, dim=1)


def step_log_prob(table: Table, x: Tensor, v: Tensor, after: Tensor, row: int, backend: str) -> Tensor:
    """The log-probability of one row of a stochastic table, [B]."""
    assert table.densities is not None
    return dispatch.step_log_prob(x, v, after, table.coefficients, table.densities, row, backend)
