"""The picture of the solvers: quality of the samples, and solver error, against evaluations of the network."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from .picture import FAINT, INK, NIGHT, PANEL
from .solver_comparison import BUDGETS, Curves


class Look(NamedTuple):
    """How a solver is drawn."""

    colour: str
    marker: str
    size: float = 7.5


#: Told apart by colour (under red-green blindness too), by marker and by the name at the line's end.
LOOKS = {
    "euler": Look("#dfe4f2", "o"),
    "midpoint": Look("#5cc8ff", "s"),
    "heun": Look("#4a7dff", "D", 7),
    "rk4": Look("#ffe14d", "^", 8.5),
    "rk4_classic": Look("#d99a1c", "v", 8.5),
    "ab2": Look("#2fd6a3", "p", 9),
    "ab3": Look("#ff6b4a", "*", 12),
    "dpmpp_2m": Look("#e58ad6", "X", 8.5),
}
#: Of a solver that was entered in SOLVERS and not here.
OTHER_LOOK = Look("#9aa3bd", "h")

LABEL_GAP = 0.047
"""Between the middles of two labels, in heights of the panel."""

Line = Sequence[tuple[float, float]]
"""Points: evaluations, and km."""


def draw_solvers(out: Path, curves: Curves, converged: float, floor: float) -> None:
    """Writes the picture as a PNG.

    Args:
        out: The file.
        curves: Each solver's points.
        converged: The distance of the converged trajectories to the held-out, km.
        floor: That of training to the held-out, km.
    """
    figure = Figure(figsize=(14, 8.2), dpi=125, facecolor=NIGHT)
    grid = figure.add_gridspec(1, 2, left=0.052, right=0.985, top=0.79, bottom=0.078, wspace=0.11)

    distances = {name: [(p.evaluations, p.distance) for p in points] for name, points in curves.items() if points}
    axes = figure.add_subplot(grid[0])
    _panel(axes, "Quality of the samples", "km, sliced Wasserstein distance to the held-out flights", distances)
    axes.set_xlim(1.75, 46)
    axes.set_ylim(0.82 * floor, 1.15 * max(y for line in distances.values() for _, y in line))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    for height, text in [(converged, "solver converged"), (floor, "floor, training flights")]:
        axes.axhline(height, color=INK, linewidth=1.1, alpha=0.6, linestyle=(0, (5, 4)), zorder=1.5)
        axes.annotate(
            f"{text}: {height:.1f} km",
            (0.018, height),
            xycoords=("axes fraction", "data"),
            xytext=(0, -5),
            textcoords="offset points",
            va="top",
            color=INK,
            alpha=0.85,
            fontsize=11,
        )
    _names(axes, {name: line[0] for name, line in distances.items()}, left=True)

    errors = {name: [(p.evaluations, p.error) for p in points] for name, points in curves.items() if points}
    axes = figure.add_subplot(grid[1])
    _panel(
        axes, "Error of the solver alone", "km, RMS distance to the converged trajectory from the same noise", errors
    )
    axes.set_xlim(3.5, 94)
    heights = [y for line in errors.values() for _, y in line]
    axes.set_ylim(0.5 * min(heights), 1.7 * max(heights))
    _names(axes, {name: line[-1] for name, line in errors.items()}, left=False)
    _slopes(axes)

    figure.text(0.052, 0.928, "Which solver, for how many evaluations?", color=INK, fontsize=25, weight="bold")
    figure.text(
        0.052,
        0.888,
        "The same network and the same noise for every solver. Lower is better, further left is cheaper.",
        color=FAINT,
        fontsize=13,
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor=NIGHT)
    # 256 colours are enough for lines, and a third of the size.
    Image.open(drawn).convert("RGB").quantize(256).save(out, format="PNG", optimize=True)


def _panel(axes: Axes, title: str, unit: str, lines: Mapping[str, Line]) -> None:
    axes.set(xscale="log", yscale="log", facecolor=PANEL)
    axes.set_title(title, color=INK, fontsize=15, loc="left", pad=27)
    axes.text(0, 1.02, unit, transform=axes.transAxes, color=FAINT, fontsize=11)
    axes.set_xlabel("evaluations of the network for one trajectory", color=FAINT, fontsize=11)
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(color="#ffffff", alpha=0.06, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=10, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for name, line in lines.items():
        look = LOOKS.get(name, OTHER_LOOK)
        axes.plot(
            [x for x, _ in line],
            [y for _, y in line],
            color=look.colour,
            marker=look.marker,
            markersize=look.size,
            markeredgecolor=PANEL,
            markeredgewidth=0.8,
            linewidth=1.9,
            solid_capstyle="round",
        )


def _names(axes: Axes, ends: Mapping[str, tuple[float, float]], left: bool) -> None:
    """The solvers' names in a column beside the lines' ends, moved apart, each with a thin line to its end."""
    place = axes.transData + axes.transAxes.inverted()
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = [float(place.transform(ends[name])[1]) for name in order]
    edge = min(ends.values())[0] if left else max(ends.values())[0]
    column = float(place.transform((edge, 1.0))[0]) + (-0.055 if left else 0.055)
    for name, height in zip(order, spread(heights, LABEL_GAP, 0.03, 0.97), strict=True):
        colour = LOOKS.get(name, OTHER_LOOK).colour
        axes.annotate(
            name,
            ends[name],
            xytext=(column, height),
            textcoords="axes fraction",
            ha="right" if left else "left",
            va="center",
            color=colour,
            fontsize=12.5,
            weight="bold",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.5,
                "linewidth": 1,
                "relpos": (1, 0.5) if left else (0, 0.5),
                "shrinkA": 3,
                "shrinkB": 6,
            },
        )


def _slopes(axes: Axes) -> None:
    """A fan of lines, falling as errors of order 1 to 4 do."""
    place = axes.transData + axes.transAxes.inverted()
    back = place.inverted()
    x, y = (float(value) for value in back.transform((0.06, 0.33)))
    for order in (1, 2, 3, 4):
        across, down = place.transform((2 * x, y / 2**order)) - place.transform((x, y))
        length = 0.22 / math.hypot(across, down)  # of the panel, for every line
        x_end, y_end = (float(value) for value in back.transform((0.06 + length * across, 0.33 + length * down)))
        axes.plot([x, x_end], [y, y_end], color=FAINT, linewidth=1.2)
        axes.annotate(
            str(order),
            (x_end, y_end),
            xytext=(4, -5),
            textcoords="offset points",
            va="center",
            color=FAINT,
            fontsize=11,
        )
    axes.annotate("slope of order", (x, y), xytext=(-2, 9), textcoords="offset points", color=FAINT, fontsize=11)


def spread(heights: Iterable[float], gap: float, low: float, high: float) -> list[float]:
    """Rising heights, moved as little as can be (least squares) to be `gap` apart, and shifted into the limits."""
    # With i * gap taken off, "gap apart" is "not falling": the means of pooled neighbours solve that.
    pools: list[tuple[float, int]] = []
    for i, height in enumerate(heights):
        mean, size = height - i * gap, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        pools.append((mean, size))
    level = [mean for mean, size in pools for _ in range(size)]
    top = high - (len(level) - 1) * gap
    return [min(max(mean, low), max(top, low)) + i * gap for i, mean in enumerate(level)]
