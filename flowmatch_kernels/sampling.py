"""The loop: for each row of a table, evaluate the velocity and combine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tracing
from .base import StepFn
from .hooks import Hooks
from .log_probs import LogProbs
from .noise import StepNoise
from .ops import dispatch
from .ops.fused_step import WEIGHTED
from .rows import Setting, rows_for
from .solvers import Evaluation, Table
from .step_functions import Bound, timed
from .velocities import Model, Velocities, model


class Integrated(NamedTuple):
    """What `integrate` returns."""

    rows: Any
    """What took the last row: `rows.result(state)` is its tensor."""
    state: Any
    """The last state."""
    steps: int
    """Steps taken: fewer than the table's if the callback stopped them."""


def integrate(
    table: Table,
    rows: Any,
    state: Any,
    model: Model,
    hooks: Hooks | LogProbs | None = None,
    progress: Callable[[Sequence[Evaluation]], Iterable[Evaluation]] = iter,
) -> Integrated:
    """Integrates dx/dt = v(x, t) along a table.

    Args:
        table: The solver's rows on the time grid.
        rows: How a row is taken: one of `flowmatch_kernels.rows`.
        state: The first state, of `rows.start`.
        model: Evaluates the velocity, or the two of guidance.
        hooks: What is done with each committed state: `Hooks`, or `LogProbs`.
        progress: Wraps the evaluations (a progress bar).
    """
    base, step = state, 0
    for row, evaluation in enumerate(progress(table.evaluations)):
        v, u = model(rows, state, evaluation.time, row)
        out = rows.step(state, base, v, u, row, evaluation)
        if out is None:  # a velocity to expand or to copy, or an error; or tensors that are not to be written in place
            rows, base, v, u = rows.prepare(base, v, u, row)
            out = rows.step(state, base, v, u, row, evaluation)
        state = out
        if not evaluation.commit:
            continue
        step += 1
        if hooks is not None:
            rows, state = hooks.constrained(rows, state, step)
            if hooks.stop(rows, state, step):
                break
        base = state
    return Integrated(rows, state, step)


def noisy(model: Model, table: Table, noise: StepNoise) -> Model:
    """The model, after each call of which the rows are given the noise of the step, or its keys.

    Args:
        model: Evaluates the velocity.
        table: Of a solver that adds noise.
        noise: Of each step.
    """

    def evaluate(rows: Any, state: Any, time: int, row: int) -> tuple[Any, Any]:
        velocities = model(rows, state, time, row)
        if table.noise in table.evaluations[row].read:
            rows.draw(table.noise, noise, row)
        return velocities

    return evaluate


def solve(
    table: Table,
    step_fn: StepFn,
    start: Tensor,
    rounding: int,
    differentiable: bool,
    return_all_steps: bool = False,
    strength: Tensor | None = None,
    hooks: Hooks | None = None,
    noise: StepNoise | None = None,
    backend: str = "auto",
    functions: Sequence[Bound] = (),
) -> Integrated:
    """Integrates from a given start, for who has a table of its own; unchecked, without guidance.

    Args:
        table: As for `integrate`.
        step_fn: As for `FlowMatching.sample`.
        start: [B, *x_dims], a dense tensor whose dtype a state can have, on the table's device. Not written.
        rounding: The fused step's argument.
        differentiable: Keep the derivative, in the caller's grad mode.
        return_all_steps: Keep the states for `rows.trajectory(state, steps)`.
        strength: The fused step's operand.
        hooks: As for `integrate`.
        noise: As for `noisy`.
        backend: As for `dispatch.choose`.
        functions: The step functions in step_fn, as for `timed`.
    """
    eager = tracing.is_eager()
    if start.requires_grad and not differentiable:
        start = start.detach()
    velocities = Velocities(tuple(start.shape), start.dtype, start.device, differentiable=differentiable)
    chosen = dispatch.choose(backend, start.device.type)
    constrained = hooks is not None and hooks.constraint is not None
    rest = (return_all_steps, rounding, WEIGHTED, constrained, backend, strength)
    evaluate = model(step_fn, velocities, eager)
    if functions:
        evaluate = timed(evaluate, functions, table.times, velocities.shape)
    if noise is not None:
        evaluate = noisy(evaluate, table, noise)
    with torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
        rows = rows_for(Setting(table, velocities, chosen, eager, *rest), start)
        return integrate(table, rows, rows.start(start, False), evaluate, hooks)
