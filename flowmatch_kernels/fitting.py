r"""Fits a solver to a model: linear least squares for the coefficients, a search for the times. No gradients.

With converged trajectories x*(t) from the same noise, and the solver's own states and velocities so far, the numbers of
row i minimise the mean over samples and entries of

    |a*x_i + b0*v_i + b1*v_{i-1} + b2*v_{i-2} + b3*v_{i-3} - x*(t_{i+1})|^2

which is a linear problem of at most five unknowns: its normal equations are sums over samples. Row i + 1 then starts
from where row i really leads. The inner times are moved one at a time over a grid, as long as the error falls.

Learned by gradient descent through the model, such numbers are those of Bespoke Non-Stationary Solvers
(arXiv 2403.01329) and Differentiable Solver Search (arXiv 2505.21114).
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import solvers
from .arguments import available_device, count, flag, number
from .base import StepFn
from .converged import (
    NotFiniteError,
    Problem,
    Reference,
    Trajectory,
    check_converged,
    guidance_weight,
    held_weight,
    problems,
    rms,
)
from .ops import reference as reference_op
from .ops.fused_step import COLUMNS, arithmetic_dtype, double
from .progress import bar as progress_bar
from .solver_comparison import checked_evaluations, most_steps
from .solvers import FittedSolver
from .solvers.fitted import EARLIER

if TYPE_CHECKING:
    from .flow_matching import FlowMatching

RIDGE = 1e-8
"""On the diagonal of the normal equations, whose columns are scaled to 1."""
SEARCH_STEPS = (8, 4, 2, 1)
"""By how many entries of the search grid an inner time is moved."""
FIXED = ("euler", "ab2", "ab3", "dpmpp_2m")
"""The solvers with a name that a fitted one is held against."""
LEAST_EQUATIONS = 50
"""Entries to fit a row to: ten for each of its five unknowns."""
CHUNK = 1 << 22
"""Entries that are summed in float64 at once, to bound memory."""


class Batch(NamedTuple):
    """One batch to fit to."""

    problem: Problem
    trajectory: Trajectory
    held_out: Tensor
    """Bool [B], on the CPU: the samples that the fit does not see."""
    weights: tuple[float, ...] | None
    """The weight of guidance for each evaluation, where it was given as a sequence."""


class Row(NamedTuple):
    """One row of the solver."""

    coefficients: tuple[float, ...]
    name: str


class Prefix:
    """The first rows of a solver, and where they lead.

    Args:
        batches: What to fit to.
        indices: Of the times so far, in the trajectories' times; the last is the one reached.
        rows: One fewer.
        states: For each batch the state reached; None: the noise.
        before: For each batch the velocities so far, the newest first.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        indices: tuple[int, ...] = (0,),
        rows: tuple[Row, ...] = (),
        states: Sequence[Tensor] | None = None,
        before: Sequence[tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.batches, self.indices, self.rows = batches, indices, rows
        self.states = [batch.problem.noise for batch in batches] if states is None else states
        self._before = [()] * len(batches) if before is None else before

    @functools.cached_property
    def velocities(self) -> list[tuple[Tensor, ...]]:
        """For each batch the velocity here, and up to three before it."""
        found, states = [], []
        for batch, state, before in zip(self.batches, self.states, self._before, strict=True):
            times = batch.trajectory.times
            weight = {} if batch.weights is None else {"inference_guidance_weight": batch.weights[len(self.rows)]}
            v, state = batch.problem.velocity(state, times[self.indices[-1]], times[-1], **weight)
            found.append((v, *before[:EARLIER]))
            states.append(state)
        self.states = states  # as step_fn left them
        return found

    def to(self, index: int) -> Prefix:
        """One row more, to this time."""
        velocities = self.velocities
        row = self._fitted(index)
        states = [_combined(state, vs, row) for state, vs in zip(self.states, velocities, strict=True)]
        return Prefix(self.batches, (*self.indices, index), (*self.rows, row), states, velocities)

    def error(self, held_out: bool) -> float:
        """RMS distance to the converged states, of the samples held out or of the others."""
        return error(self.batches, self.states, self.indices[-1], held_out)

    def _fitted(self, index: int) -> Row:
        """The row to this time: fitted, or the multistep row that is better on the samples held out."""
        fit = self._products(index, held_out=False)
        check = self._products(index, held_out=True)
        times = [self.batches[0].trajectory.times[i] for i in (*self.indices, index)]
        plain = [Row(adams_bashforth(times, k), "euler" if k == 1 else f"ab{k}") for k in range(1, min(len(times), 4))]
        rows = [Row(least_squares(fit, plain[-1].coefficients), "fitted"), *plain]
        return min(rows, key=lambda row: squared_error(fit if check is None else check, row.coefficients))

    def _products(self, index: int, held_out: bool) -> Any:
        """Scalar products of x, v0, v1, ... and the target, over the samples held out or the others; None, of none."""
        total = None
        for batch, state, vs in zip(self.batches, self.states, self.velocities, strict=True):
            chosen = (batch.held_out if held_out else ~batch.held_out).nonzero().flatten()
            target = batch.trajectory.states[index]
            for part in chosen.split(max(CHUNK // max(state[0].numel(), 1), 1)):
                columns = [double(x[part.to(x.device)]).flatten() for x in (state, *vs, target)]
                stacked = torch.stack([column.to(columns[0].device) for column in columns])
                products = (stacked @ stacked.T).cpu()
                total = products if total is None else total + products
        return total


def error(batches: Sequence[Batch], states: Sequence[Tensor], index: int, held_out: bool) -> float:
    """RMS distance of states to the converged ones at a time, of the samples held out or of the others."""
    squares, entries = 0.0, 0
    for batch, state in zip(batches, states, strict=True):
        chosen = (batch.held_out if held_out else ~batch.held_out).nonzero().flatten()
        for part in chosen.split(max(CHUNK // max(state[0].numel(), 1), 1)):
            x, target = (double(y[part.to(y.device)]) for y in (state, batch.trajectory.states[index]))
            squares += float((x - target.to(x.device)).square().sum())
            entries += x.numel()
    return float((squares / max(entries, 1)) ** 0.5)


def squared_error(products: Tensor, coefficients: Sequence[float]) -> float:
    """|sum of coefficients * columns - target|^2, of the scalar products of the columns and the target."""
    r = _vector(coefficients, len(products))
    r[-1] = -1.0
    return float(r @ products @ r)


def _vector(numbers: Sequence[float], size: int) -> Tensor:
    """Numbers, and zeros to this size, on the CPU, whatever the default device is."""
    return torch.tensor([*numbers, *[0.0] * (size - len(numbers))], dtype=torch.float64, device="cpu")


def least_squares(products: Tensor, plain: Sequence[float]) -> tuple[float, ...]:
    """The coefficients that minimise the squared distance to the target.

    Args:
        products: [m + 1, m + 1], scalar products of the m columns and the target, float64.
        plain: At most m coefficients, which the ridge draws the solution towards.
    """
    m = len(products) - 1
    start = _vector(plain, m)
    scale = products.diagonal()[:m].sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    matrix = products[:m, :m] / scale / scale[:, None] + RIDGE * torch.eye(m, dtype=torch.float64, device="cpu")
    residual = (products[:m, m] - products[:m, :m] @ start) / scale
    return tuple((start + torch.linalg.solve(matrix, residual) / scale).tolist())


def adams_bashforth(times: Sequence[float], k: int) -> tuple[float, ...]:
    """(1, b0, ..., b_{k-1}) of the step between the last two times, by the polynomial through k velocities.

    Args:
        times: The last is where the step leads, the others are where velocities were evaluated.
        k: At most as many as velocities.
    """
    # In units of the step, from its start: sum_j b_j * s_j^p = 1 / (p + 1).
    t = _vector(times, len(times))
    h = t[-1] - t[-2]
    s = (t[:-1].flip(0)[:k] - t[-2]) / h
    powers = torch.arange(k, dtype=torch.float64, device="cpu")
    b = torch.linalg.solve(s[None, :] ** powers[:, None], 1 / (powers + 1))
    return (1.0, *(b * h).tolist())


def _combined(x: Tensor, vs: Sequence[Tensor], row: Row) -> Tensor:
    """What the sampler's row makes of a state and its velocities, to the bit."""
    a, *b = row.coefficients
    columns = dict.fromkeys(COLUMNS, 0.0) | {"a": a} | {f"b{k}": value for k, value in enumerate(b)}
    rows = _vector(list(columns.values()), len(columns))[None].to(x.device, arithmetic_dtype(x.dtype))
    terms = (*vs[: len(b)], None, None, None, None)[:4]
    return reference_op.combine(x, terms, reference_op.Columns.of(rows, 0, x.dim()))


def search(start: Prefix, evaluations: int, moved: bool, tried: Callable[[], object] | None = None) -> Prefix:
    """The best solver found: from even times, each inner time is moved while the error falls.

    Args:
        start: No rows.
        evaluations: N.
        moved: Move the times; else the even ones are kept.
        tried: Called after each try.
    """
    last = len(start.batches[0].trajectory.times) - 1
    even = tuple(round(i * last / evaluations) for i in range(evaluations + 1))
    best = _path([start], even)
    least = best[-1].error(held_out=False)
    seen = {even}
    for by in SEARCH_STEPS if moved else ():
        again = True
        while again:
            again = False
            for k in range(1, evaluations):
                for index in (best[k].indices[k] - by, best[k].indices[k] + by):
                    now = best[-1].indices
                    indices = (*now[:k], index, *now[k + 1 :])
                    if indices in seen or not now[k - 1] < index < now[k + 1]:
                        continue
                    seen.add(indices)
                    try:
                        path = _path(best[:k], indices)
                        found = path[-1].error(held_out=False)
                    except NotFiniteError:  # where these times lead; the ones before go on
                        found = math.inf
                    if tried is not None:
                        tried()
                    if found < least:
                        best, least, again = path, found, True
    return best[-1]


def _path(prefixes: Sequence[Prefix], indices: tuple[int, ...]) -> list[Prefix]:
    """Prefixes to all of these times; the first of them are there."""
    path = list(prefixes)
    for index in indices[len(path) :]:
        path.append(path[-1].to(index))
    return path


def fit(
    flow_matching: FlowMatching,
    step_fn: StepFn | None,
    evaluations: int | Sequence[int] | None,
    batches: Iterable[StepFn | Mapping[str, Any]] | None,
    batch_size: int,
    device: torch.device | str,
    time_steps: Any,
    held_out: float,
    reference: str | None,
    reference_steps: int,
    search_grid: int,
    search_batches: int,
    trajectory_device: torch.device | str | None,
    progress: bool,
    arguments: Mapping[str, Any],
) -> list[FittedSolver]:
    """`FlowMatching.fit_solver`, for each number of evaluations."""
    grid = None
    if time_steps is not None:
        grid = solvers.checked_grid(time_steps, "time_steps", available_device(device)).tensor
    search_grid, search_batches = count(search_grid, "search_grid"), count(search_batches, "search_batches")
    weight = guidance_weight(flow_matching, arguments)
    weights = weight if isinstance(weight, tuple) else None
    if evaluations is None and weights is not None:
        evaluations = len(weights)
    budgets = _budgets(evaluations, grid, search_grid)
    progress = flag(progress, "progress")
    if trajectory_device is not None:
        trajectory_device = available_device(trajectory_device, "trajectory_device")
    held_out = number(held_out, "held_out")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    if search_batches < 1:
        raise ValueError("search_batches must be 1 or more, got 0")
    jumps = grid
    if weights is not None:
        if any(n != len(weights) for n in budgets):
            raise ValueError(
                f"inference_guidance_weight has {len(weights)} entries, one for each evaluation, and evaluations is "
                f"{', '.join(map(str, budgets))}: pass a function of t, or fit one at a time"
            )
        if jumps is None:
            jumps = torch.tensor(time_grid(flow_matching, len(weights)), device="cpu")
        arguments = {**arguments, "inference_guidance_weight": held_weight(weights, jumps.tolist())}
    if reference is None:
        reference = "ab3" if weights is None else "midpoint"
    how = _reference(reference, reference_steps, search_grid, jumps, grid is None, trajectory_device)
    found = problems(flow_matching, step_fn, batches, batch_size, device, arguments)
    masks = _held_out([len(problem.noise) for problem in found], held_out)
    _check_sizes(found[:search_batches], masks[:search_batches], masks)

    made = [
        Batch(p, p.converged(how), mask, weights)
        for p, mask in zip(found[:search_batches], masks[:search_batches], strict=True)
    ]
    paths = []
    for n in budgets:
        shown = progress_bar()(desc=f"fit {n} evaluations", unit="try") if progress else None
        with contextlib.nullcontext() if shown is None else shown:
            paths.append(search(Prefix(made), n, grid is None, shown.update if shown is not None else None))
    rest = found[search_batches:]
    if rest:  # of their trajectories only what the chosen times need
        needed = {index for path in paths for index in path.indices}
        for problem, mask in zip(rest, masks[search_batches:], strict=True):
            trajectory = problem.converged(how)
            states = {index: state for index, state in trajectory.states.items() if index in needed}
            made.append(Batch(problem, trajectory._replace(states=states), mask, weights))
        paths = [_path([Prefix(made)], path.indices)[-1] for path in paths]
    change = max(batch.trajectory.change for batch in made)
    check_converged(change, how.steps, stacklevel=4)
    fitted = []
    for path in paths:  # no comprehension, whose frame the warning in it would count
        fitted.append(_solver(flow_matching, path, grid is not None, how, weight, change))
    return fitted


def _budgets(evaluations: Any, grid: Tensor | None, search_grid: int) -> list[int]:
    """Numbers of evaluations, checked."""
    if evaluations is None:
        return [4 if grid is None else len(grid) - 1]
    budgets = checked_evaluations(evaluations)
    if grid is not None and budgets != [len(grid) - 1]:
        raise ValueError(
            f"evaluations is {evaluations!r:.60}, and time_steps has {len(grid) - 1} steps: pass one of them"
        )
    if grid is None and max(budgets) > search_grid:
        raise ValueError(f"evaluations is {max(budgets)}, more than the {search_grid} steps of search_grid")
    return budgets


def _reference(
    solver: str,
    steps: int,
    search_grid: int,
    grid: Tensor | None,
    searched: bool,
    place: torch.device | str | None,
) -> Reference:
    """How to make the converged trajectories, through all times that the solver may take.

    Args:
        solver, steps: The reference's.
        search_grid: How many steps the times are searched on.
        grid: Times to pass; None: the model's own time grid.
        searched: The solver takes times between them too.
        place: Where to keep the states.
    """
    solvers.solver(solver)
    steps = count(steps, "reference_steps")
    if isinstance(solver, FittedSolver):
        raise TypeError("reference must be the name of a solver, got a FittedSolver")
    if steps < 2:
        raise ValueError(f"reference_steps must be 2 or more, got {steps}")
    if grid is None:
        if steps % 2 or search_grid < 1 or steps % search_grid:
            raise ValueError(
                f"reference_steps must be even and a multiple of search_grid, got {steps} and {search_grid}"
            )
        return Reference(solver, {"inference_step": steps}, steps // search_grid, place)
    # Of each interval as many kept states, and an even number of steps between them, of which half pass them too.
    kept = 1 if not searched else -(-search_grid // (len(grid) - 1))
    every = 2 * max(-(-steps // (2 * kept * (len(grid) - 1))), 1)
    grid = double(grid).cpu()
    fractions = torch.arange(kept * every, dtype=torch.float64, device="cpu") / (kept * every)
    start, size = grid[:-1, None], grid.diff()[:, None]
    fine = torch.cat([(start + fractions * size).flatten(), grid[-1:]]).to(torch.get_default_dtype())
    return Reference(solver, {"time_steps": fine}, every, place)


def _held_out(sizes: Sequence[int], share: float) -> list[Tensor]:
    """For each batch which samples are held out: drawn with a seed, since conditions may repeat along a batch."""
    samples = sum(sizes)
    held = int(samples * share)
    if not 0 < held < samples:
        raise ValueError(f"held_out {share:g} of {samples} samples leaves nothing to fit or nothing to check with")
    generator = torch.Generator("cpu").manual_seed(0)
    # Not the first sample: a search that sees one batch of one sample has to fit to it.
    order = 1 + torch.randperm(samples - 1, generator=generator, device="cpu")
    mask = torch.zeros(samples, dtype=torch.bool, device="cpu")
    mask[order[:held]] = True
    return list(mask.split(list(sizes)))


def _check_sizes(searched: Sequence[Problem], masks: Sequence[Tensor], all_masks: Sequence[Tensor]) -> None:
    """Raises where there is too little to fit five unknowns a row to."""
    samples = sum(int((~mask).sum()) for mask in masks)
    entries = searched[0].noise[0].numel()
    if samples * entries < LEAST_EQUATIONS:
        more = ", or a larger search_batches" if len(all_masks) > len(masks) else ""
        raise ValueError(
            f"too little to fit five numbers a row to: {samples} samples of {entries} entries; wanted "
            f"{LEAST_EQUATIONS} or more in all. Pass a larger batch_size{more}"
        )


def time_grid(flow_matching: FlowMatching, steps: int) -> list[float]:
    """The model's time grid."""
    still = torch.zeros(1, *flow_matching.x_dims, device="cpu")
    _, grid = flow_matching.sample(
        1,
        lambda x, t: still,
        noise=still,
        return_all_steps=True,
        inference_step=steps,
        int_method="euler",
        use_classifier_free_guidance=False,
        backend="reference",  # on the CPU, which the constructor's may not serve
    )
    times: list[float] = grid.tolist()
    return times


def _solver(
    flow_matching: FlowMatching, path: Prefix, kept: bool, how: Reference, weight: Any, change: float
) -> FittedSolver:
    """The solver that a path is, with what a reader wants to know of it."""
    batches = path.batches
    times = batches[0].trajectory.times
    n = len(path.rows)
    errors, diverged = {"fitted": path.error(held_out=True)}, []
    for name in FIXED:
        steps = most_steps(flow_matching, name, n)
        if steps:
            fixed = _fixed(batches, name, {"time_steps": _even(how, steps)} if kept else {"inference_step": steps})
            if fixed is not None and math.isfinite(fixed):
                errors[name] = fixed
            elif fixed is not None:
                diverged.append(name)
    better = min(errors, key=lambda name: errors[name])
    rounding = 1e-6 * max(rms(state) for state in path.states)
    if errors[better] < 0.99 * errors["fitted"] and errors["fitted"] > rounding:
        warnings.warn(
            f"with {n} evaluations {better} is better than the fitted solver on the samples held out, "
            f"{errors[better]:.3g} against {errors['fitted']:.3g}: fit to more samples, or use int_method={better!r}",
            stacklevel=4,
        )
    noise = batches[0].problem.noise
    form = batches[0].problem.options.get("guidance_form") or flow_matching.guidance_form
    samples = sum(int((~batch.held_out).sum()) for batch in batches)
    checked = sum(int(batch.held_out.sum()) for batch in batches)
    shown = "a function of t" if callable(weight) else weight
    return FittedSolver(
        tuple(times[i] for i in path.indices),
        tuple(row.coefficients for row in path.rows),
        tuple(row.name for row in path.rows),
        flow_matching.noise_at,
        errors,
        {
            "samples": samples,
            "held out": checked,
            "batches": len(batches),
            "x_dims": list(flow_matching.x_dims),
            "dtype": str(noise.dtype).removeprefix("torch."),
            "guidance": "none" if weight is None else f"{form}, weight {shown}",
            "prediction": flow_matching.prediction_type,
            "times": "as given" if kept else "searched",
            **({"diverged at as many evaluations": diverged} if diverged else {}),
            "reference": f"{how.solver} with {how.steps} steps, converged to {change:.1g} of the samples' RMS",
        },
    )


def _fixed(batches: Sequence[Batch], name: str, grid: Mapping[str, Any]) -> float | None:
    """The error of a solver with a name on the samples held out; None, where it cannot use the grid."""
    try:
        states = [batch.problem.sample(int_method=name, **grid) for batch in batches]
    except ValueError:  # dpmpp_2m needs a grid from the noise to the data; a prediction has no velocity at an end
        return None
    return error(batches, states, max(batches[0].trajectory.states), held_out=True)


def _even(how: Reference, steps: int) -> Tensor:
    """So many steps, evenly spread over the reference's times."""
    grid: Tensor = how.grid["time_steps"]
    return torch.linspace(float(grid[0]), float(grid[-1]), steps + 1, device="cpu")
