"""torchdiffeq: `odeint` for the methods with fixed steps, one launch for each evaluation.

    from flowmatch_kernels.integrations.torchdiffeq import odeint      # was: from torchdiffeq import odeint

    t = torch.tensor([0.0, 1.0])
    x = odeint(lambda t, x: model(x, t), noise, t, method="midpoint", options={"step_size": 0.05})[-1]

All other names of torchdiffeq are here as they are, so that one line serves code that uses more of them:

    import flowmatch_kernels.integrations.torchdiffeq as torchdiffeq   # was: import torchdiffeq

Needs torchdiffeq: `pip install flowmatch_kernels[torchdiffeq]`.

Source: github.com/rtqichen/torchdiffeq, torchdiffeq/_impl/fixed_grid.py and rk_common.py (0.2.5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tracing
from ..ops.fused_step import COLUMNS, PROMOTE, VELOCITY_DTYPES, arithmetic_dtype
from ..sampling import solve
from ..solvers import Evaluation, Table
from .replacement import needed

_published = needed("torchdiffeq", "torchdiffeq")


def __getattr__(name: str) -> Any:
    """odeint_adjoint, odeint_event and what else torchdiffeq has."""
    return getattr(_published, name)


class _Stage(NamedTuple):
    """One evaluation of a step: y0 + (sum of weights * velocities) * (dt * part) * factor."""

    at: float | None
    """Where in the step, t0 + dt * at; None: at the next time itself."""
    weights: tuple[float, ...]
    """Of the velocity here, then of those before it, the latest first."""
    factor: float = 1.0
    part: float = 1.0
    velocity_first: bool = False
    """torchdiffeq writes v * dt here, and dt * v elsewhere. PyTorch rounds dt, a 0-dim tensor, to the dtype of a 16-bit
    v; on the CPU only where dt is the first factor."""


#: The methods of torchdiffeq that are taken here, as it writes them.
METHODS = {
    "euler": (_Stage(0.0, (1.0,)),),
    "midpoint": (_Stage(0.0, (1.0,), part=0.5, velocity_first=True), _Stage(0.5, (1.0,))),
    "heun2": (_Stage(0.0, (1.0,)), _Stage(1.0, (0.5, 0.5))),
    "heun3": (
        _Stage(0.0, (1.0,), factor=1 / 3),
        _Stage(1 / 3, (2 / 3, 0.0)),
        _Stage(2 / 3, (3 / 4, 0.0, 1 / 4)),
    ),
    "rk4": (
        _Stage(0.0, (1.0,), factor=1 / 3),
        _Stage(1 / 3, (1.0, -1 / 3)),
        _Stage(2 / 3, (1.0, -1.0, 1.0)),
        _Stage(None, (1.0, 3.0, 3.0, 1.0), factor=0.125, velocity_first=True),
    ),
}


class _OtherDtypeError(Exception):
    """The first velocity is not of the state's dtype."""


_OPTIONS = {"step_size", "grid_constructor", "interp", "perturb"}
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def odeint(
    func: Callable[[Tensor, Tensor], Tensor],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Any = None,
) -> Any:
    """Integrates dy/dt = func(t, y), as torchdiffeq's function of this name and with its bits.

    Taken here: euler, midpoint, heun2, heun3 and rk4 for a tensor y0 of float32, float64, bfloat16 or float16 that has
    dimensions, with step_size or grid_constructor and linear interpolation, differentiable in y0 and in what func uses.
    All else is handed on to torchdiffeq: adaptive and implicit methods, tuples, complex states, events, callbacks,
    perturb, cubic interpolation, times that require grad, torch.func transforms, and a func that returns another dtype
    than y0's, as under autocast: it is then evaluated at t[0] once more.

    Memory: with more than two times and a grid of their own all states of the grid are kept, and then interpolated.

    Args:
        func: Called as func(t, y) with t 0-dim in y0's dtype and y of y0's shape; returns y0's shape and dtype.
        y0: The state at t[0]. Not written.
        t: [T], increasing or decreasing: the times wanted.
        rtol, atol: For adaptive methods.
        method: A name of torchdiffeq's; None: dopri5.
        options: step_size, grid_constructor, interp, perturb and what torchdiffeq takes.
        event_fn: Handed on.

    Returns:
        The states at t, [T, *y0.shape]; what torchdiffeq returns where it is handed on.

    Raises:
        TypeError: func returns y0's dtype first, and another later.
        ValueError: func returns another shape or device, or step_size and grid_constructor are both given.

    Example:
        >>> from flowmatch_kernels.integrations.torchdiffeq import odeint
        >>> odeint(lambda t, y: -y, torch.ones(3), torch.linspace(0, 1, 5), method="rk4").shape
        torch.Size([5, 3])
    """
    given = options or {}
    if event_fn is not None or method not in METHODS or not _taken(func, y0, t, given):
        return _published.odeint(
            *(func, y0, t), rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
        )
    if given.get("step_size") is not None and given.get("grid_constructor") is not None:
        raise ValueError("step_size and grid_constructor are both given: pass one")
    grid = _grid(func, y0, t, given)
    own = grid is not t
    try:
        states = _integrated(func, y0, grid, METHODS[method], trajectory=not own or len(t) > 2)
    except _OtherDtypeError:
        return _published.odeint(func, y0, t, rtol=rtol, atol=atol, method=method, options=options)
    if not own or len(t) == 2:
        return states
    return _interpolated(states, y0, grid, t)


def _taken(func: Any, y0: Any, t: Any, options: dict[str, Any]) -> bool:
    """Whether this package integrates it; torchdiffeq says what is wrong with times that it cannot use."""
    return bool(
        type(y0) in (Tensor, torch.nn.Parameter)
        and y0.dtype in VELOCITY_DTYPES
        and y0.layout is torch.strided
        and not y0.is_nested
        and y0.dim()  # dt, which is 0-dim too, would promote it
        and type(t) is Tensor
        and t.dim() == 1
        and len(t) > 1
        and t.dtype in (torch.float32, torch.float64)
        and t.device == y0.device
        and not (t.requires_grad and torch.is_grad_enabled())
        and options.keys() <= _OPTIONS
        and options.get("interp", "linear") == "linear"
        and not options.get("perturb")
        and not any(hasattr(func, name) for name in _CALLBACKS)
        and not tracing.is_transforming()
        and not torch.compiler.is_compiling()
        and ((t.diff() > 0) if t[0] < t[1] else (t.diff() < 0)).all()
    )


def _grid(func: Any, y0: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor:
    """The times of the steps; t itself where each step leads to the next of them."""
    if (constructor := options.get("grid_constructor")) is not None:
        grid: Tensor = constructor(func, y0, t)
        if grid[0] != t[0] or grid[-1] != t[-1]:
            raise ValueError(
                f"grid_constructor must begin and end with t, {t[0].item()} and {t[-1].item()}; "
                f"got {grid[0].item()} and {grid[-1].item()}"
            )
        return grid
    if (size := options.get("step_size")) is None:
        return t
    sign = 1 if t[0] < t[1] else -1
    first, last = sign * t[0], sign * t[-1]
    steps = int(torch.ceil((last - first) / size + 1).item())
    grid = torch.arange(0, steps, dtype=t.dtype, device=t.device) * size + first
    grid[-1] = last
    return sign * grid


def _table(grid: Tensor, stages: tuple[_Stage, ...], dtype: torch.dtype) -> Table:
    """The rows of a method on a grid."""
    sign = 1 if grid[0] < grid[-1] else -1  # as torchdiffeq turns a decreasing t round: its zeros have signs
    ascending = sign * grid
    start, dt = ascending[:-1], ascending.diff()
    rows, times, evaluations = [], [], []
    n, arithmetic, on_cpu = len(start), arithmetic_dtype(dtype), grid.device.type == "cpu"
    for stage in stages:
        columns = dict.fromkeys(COLUMNS, 0.0) | {f"b{k}": w for k, w in enumerate(stage.weights)} | {"c": stage.factor}
        step = sign * (dt if stage.part == 1.0 else stage.part * dt)
        if not (stage.velocity_first and on_cpu):
            step = step.to(dtype)
        step = step.to(arithmetic)
        rows.append(
            torch.stack([step if name == "a" else torch.full_like(step, x) for name, x in columns.items()], dim=1)
        )
        times.append(sign * (ascending[1:] if stage.at is None else start + dt * stage.at if stage.at else start))
    for k in range(n):
        for s in range(len(stages)):
            last = s == len(stages) - 1
            read = tuple(range(s - 1, -1, -1))[: len(stages[s].weights) - 1]
            evaluations.append(Evaluation(len(stages) * k + s, last, read, None if last else s))
    return Table(
        evaluations=tuple(evaluations),
        times=torch.stack(times, dim=1).flatten().to(dtype),
        coefficients=torch.stack(rows, dim=1).flatten(0, 1),
        steps=n,
        buffers=len(stages) - 1,
        sum_first=True,
    )


def _integrated(
    func: Callable[[Tensor, Tensor], Tensor], y0: Tensor, grid: Tensor, stages: tuple[_Stage, ...], trajectory: bool
) -> Tensor:
    """The states at the grid's times, [N + 1, *y0.shape]; or the first and the last alone."""
    table = _table(grid, stages, y0.dtype)
    times, evaluated = iter(table.times.unbind()), False

    def step_fn(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluated
        v = func(next(times), x[0])
        if isinstance(v, Tensor) and v.dtype != y0.dtype:
            if not evaluated:
                raise _OtherDtypeError
            raise TypeError(f"func returned {v.dtype}; wanted y0's dtype, {y0.dtype}, as at first")
        evaluated = True
        return v[None] if isinstance(v, Tensor) else v

    rows, state, steps = solve(table, step_fn, y0[None], PROMOTE, torch.is_grad_enabled(), trajectory)
    if trajectory:
        states: Tensor = rows.trajectory(state, steps)[0]
        return states
    return torch.stack([y0, rows.result(state)[0]])


def _interpolated(states: Tensor, y0: Tensor, grid: Tensor, t: Tensor) -> Tensor:
    """The states at t, linear between the grid's times as torchdiffeq takes them."""
    sign = 1 if t[0] < t[1] else -1
    ascending, wanted = sign * grid, sign * t
    ends = torch.searchsorted(ascending, wanted[1:]).clamp(min=1).tolist()
    found = [y0]
    for k, end in enumerate(ends, start=1):
        t0, t1, at = ascending[end - 1], ascending[end], wanted[k]
        if at == t1:
            found.append(states[end])
        elif at == t0:
            found.append(states[end - 1])
        else:
            slope = (at - t0) / (t1 - t0)
            found.append(states[end - 1] + slope * (states[end] - states[end - 1]))
    return torch.stack(found)
