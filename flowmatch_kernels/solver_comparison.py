"""Solvers beside each other on one model: error against evaluations, as a table and as a plot."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import solvers
from .arguments import BYTES, count, shown
from .base import StepFn
from .converged import Reference, check_converged, guidance_weight, problems, rms
from .solvers import FittedSolver, IntMethod

if TYPE_CHECKING:
    from .flow_matching import FlowMatching


class Point(NamedTuple):
    """What a solver gives for a number of evaluations."""

    solver: str
    budget: int
    """The most evaluations allowed."""
    evaluations: int
    """Those spent: as many as whole steps can spend."""
    error: float
    """The distance of the samples to the converged ones."""
    quality: float | None
    """What `quality` returned for the samples."""


@dataclasses.dataclass(frozen=True, repr=False)
class SolverComparison:
    """The error of each solver at each number of evaluations: `FlowMatching.compare_solvers` makes one.

    `str()` is a table, and `plot(path)` a picture.
    """

    points: tuple[Point, ...]
    samples: int
    """How many were compared."""
    reference: str
    """What the converged samples were made with."""
    change: float
    """RMS of the change of the converged samples with half as many steps, in parts of their own RMS."""
    converged_quality: float | None
    """What `quality` returned for the converged samples."""

    def curves(self) -> dict[str, list[Point]]:
        """The points of each solver, the evaluations rising."""
        curves: dict[str, list[Point]] = {}
        for point in self.points:
            curves.setdefault(point.solver, []).append(point)
        return curves

    def __str__(self) -> str:
        lines = [f"Error: distance to the converged samples, of {self.samples} samples", *self._table("error")]
        if self.converged_quality is not None:
            lines += ["", f"Quality; of the converged samples {self.converged_quality:.4g}", *self._table("quality")]
        if any(point.evaluations < point.budget for point in self.points):
            lines += ["", "In brackets: the evaluations spent, where whole steps do not spend them all."]
        lines += [
            f"Converged: {self.reference}; half as many steps change the samples by {self.change:.1g} of their RMS."
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _table(self, what: str) -> list[str]:
        budgets = sorted({point.budget for point in self.points})
        width = max([len("evaluations"), *map(len, self.curves())])
        lines = ["  ".join([f"{'evaluations':{width}}", *(f"{budget:>13}     " for budget in budgets)]).rstrip()]
        for name, points in self.curves().items():
            cells = dict.fromkeys(budgets, f"{'-':>13}     ")
            for point in points:
                spent = f" ({point.evaluations})" if point.evaluations < point.budget else ""
                cells[point.budget] = f"{getattr(point, what):>13.4g}{spent:5}"
            lines.append("  ".join([f"{name:{width}}", *cells.values()]).rstrip())
        return lines

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes the plot: the error against evaluations, and the quality where there is one.

        Args:
            path: The file; its ending says the format, as "solvers.png".

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from None
        shown = ["error"] if self.converged_quality is None else ["quality", "error"]
        figure = Figure(figsize=(7 * len(shown), 5.5), layout="constrained")
        for k, what in enumerate(shown, start=1):
            axes = figure.add_subplot(1, len(shown), k)
            self.draw(axes, what)
            axes.legend()
        figure.savefig(path, dpi=130)

    def draw(self, axes: Any, what: str = "error") -> None:
        """Draws into a matplotlib Axes.

        Args:
            axes: Where.
            what: "error" or "quality".
        """
        curves = {
            name: [(point.evaluations, getattr(point, what)) for point in points]
            for name, points in self.curves().items()
        }
        if what == "quality" and self.converged_quality is not None:
            axes.axhline(self.converged_quality, color="gray", linestyle="--", linewidth=1, label="converged")
        draw_curves(axes, curves, what)


def draw_curves(axes: Any, curves: Mapping[str, Sequence[tuple[int, float]]], label: str) -> None:
    """Draws values against evaluations into a matplotlib Axes, both logarithmic.

    Args:
        axes: Where.
        curves: By its name, (evaluations, value) of each point.
        label: Of the values.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    markers = "osD^vpXPh"
    for k, (name, points) in enumerate(curves.items()):
        fitted = name.startswith("fitted")
        axes.plot(
            [evaluations for evaluations, _ in points],
            [value for _, value in points],
            label=name,
            marker="*" if fitted else markers[k % len(markers)],
            markersize=13 if fitted else 6,
            linewidth=2.5 if fitted else 1.5,
            zorder=3 if fitted else 2,
        )
    ticks = sorted({evaluations for points in curves.values() for evaluations, _ in points})
    heights = [y for points in curves.values() for _, y in points if 0 < y < math.inf]
    positive = bool(heights)
    axes.set(
        xscale="log",
        yscale="log" if positive else "linear",
        xlabel="evaluations of the network for one sample",
        ylabel=label,
    )
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    if positive:
        within_a_decade = max(heights) < 10 * min(heights)
        axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10) if within_a_decade else (1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def compare(
    flow_matching: FlowMatching,
    step_fn: StepFn | None,
    evaluations: int | Sequence[int],
    compared: Iterable[IntMethod] | None,
    batches: Iterable[StepFn | Mapping[str, Any]] | None,
    batch_size: int,
    device: torch.device | str,
    reference: str,
    reference_steps: int,
    error: Callable[[Tensor, Tensor], float] | None,
    quality: Callable[[Tensor], float] | None,
    arguments: Mapping[str, Any],
) -> SolverComparison:
    """`FlowMatching.compare_solvers`."""
    budgets = checked_evaluations(evaluations)
    named = compared if compared is not None else tuple(solvers.SOLVERS)
    if isinstance(named, (str, os.PathLike, FittedSolver, solvers.StochasticSolver)):
        named = [named]
    chosen = [solvers.of_the_ode(solvers.loaded(one)) for one in named]
    steps = count(reference_steps, "reference_steps")
    if steps < 2 or steps % 2:
        raise ValueError(f"reference_steps must be even, got {steps}")
    if not isinstance(reference, str):
        raise TypeError(f"reference must be the name of a solver, got {reference!r:.60}")
    solvers.solver(reference)
    for name, measure in (("error", error), ("quality", quality)):
        if measure is not None and not callable(measure):
            raise TypeError(f"{name} must be callable, got {shown(measure)}")
    weight = guidance_weight(flow_matching, arguments)
    if isinstance(weight, tuple):
        raise ValueError(
            "inference_guidance_weight for each step fits one number of steps, and solvers differ in it: pass a number "
            "or a function of t"
        )
    found = problems(flow_matching, step_fn, batches, batch_size, device, arguments)
    trajectories = [problem.converged(Reference(reference, {"inference_step": steps})) for problem in found]
    converged = torch.cat([trajectory.states[1] for trajectory in trajectories])
    change = max(trajectory.change for trajectory in trajectories)
    check_converged(change, steps, stacklevel=4)
    points = []
    for name, solver, budget in _runs(chosen, budgets):
        taken = None if isinstance(solver, FittedSolver) else most_steps(flow_matching, solver, budget)
        if taken == 0:
            continue
        if isinstance(solver, FittedSolver):
            _check_span(solver, trajectories[0].times)
        try:
            x = torch.cat([problem.sample(int_method=solver, inference_step=taken) for problem in found])
        except ValueError as wrong:
            if compared is None:  # one that evaluates where a prediction has no velocity, as heun at the data
                continue
            raise ValueError(f"{name}: {wrong}") from wrong
        points.append(
            Point(
                name,
                budget,
                flow_matching.nfe(taken, solver, guided=False),
                rms(x - converged) if error is None else float(error(x, converged)),
                None if quality is None else float(quality(x)),
            )
        )
    return SolverComparison(
        tuple(points),
        len(converged),
        f"{reference} with {steps} steps",
        change,
        None if quality is None else float(quality(converged)),
    )


def _runs(chosen: Sequence[str | FittedSolver], budgets: Sequence[int]) -> list[tuple[str, str | FittedSolver, int]]:
    """(name, solver, budget) of each point: the named at each budget, a fitted one at its own evaluations."""
    runs: list[tuple[str, str | FittedSolver, int]] = []
    named = list(dict.fromkeys(solver for solver in chosen if isinstance(solver, str)))
    for name in named:
        runs += [(name, name, budget) for budget in sorted(set(budgets))]
    taken: dict[int, int] = {}
    fitted = []
    for solver in chosen:
        if isinstance(solver, FittedSolver):
            again = taken[solver.evaluations] = taken.get(solver.evaluations, 0) + 1
            fitted.append((f"fitted {again}" if again > 1 else "fitted", solver, solver.evaluations))
    return runs + sorted(fitted, key=lambda run: (run[0], run[2]))


def _check_span(solver: FittedSolver, times: Sequence[float]) -> None:
    """Raises where a fitted solver starts or ends at other times than the converged samples."""
    if max(abs(solver.times[0] - times[0]), abs(solver.times[-1] - times[-1])) > 1e-6:
        raise ValueError(
            f"a fitted solver runs from t = {solver.times[0]:g} to {solver.times[-1]:g}, and the converged samples "
            f"from {times[0]:g} to {times[-1]:g}: they are not to be compared"
        )


def checked_evaluations(evaluations: int | Sequence[int]) -> list[int]:
    """One number of evaluations or several, as a list of those.

    Raises:
        TypeError: one is no int.
        ValueError: one is below 1, or there is none.
    """
    several = evaluations if isinstance(evaluations, Sequence) and not isinstance(evaluations, BYTES) else [evaluations]
    budgets = [count(n, "evaluations") for n in several]
    if not budgets or min(budgets) < 1:
        raise ValueError(f"evaluations must be 1 or more, got {evaluations!r:.60}")
    return budgets


def most_steps(flow_matching: FlowMatching, solver: str, evaluations: int) -> int:
    """The most steps that spend so many evaluations, or fewer."""
    steps = 0
    while flow_matching.nfe(steps + 1, solver, guided=False) <= evaluations:
        steps += 1
    return steps
