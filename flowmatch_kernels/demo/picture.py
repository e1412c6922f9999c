"""The picture: held-out and sampled trajectories side by side, and the way from noise to them."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from .flights import total_turn

NIGHT, PANEL, INK, FAINT = "#0b1020", "#111831", "#eef1f8", "#8d97b3"
TURN = LinearSegmentedColormap.from_list(
    "turn", ["#ff5d73", "#ff9f6b", "#ffe3b0", "#f6f4ee", "#a9e5f2", "#4fb6ff", "#5b7cff"]
)
MOST_TURN = 90.0
"""Degrees; the ends of the colour scale."""
PANELS = 6
"""How many states of the way from noise to trajectory are shown, at most."""


def draw(out: Path, held_out: Tensor, way: Tensor, times: Tensor, distance: float, floor: float) -> None:
    """Writes the picture as a PNG.

    Args:
        out: The file.
        held_out: [M, 64, 2], km.
        way: [N, T, 64, 2], km: the positions at every step of the sampling; the last are the samples.
        times: [T], from noise at 0 to data at 1.
        distance: Of the samples to the held-out, km.
        floor: Of training to the held-out, km.
    """
    figure = Figure(figsize=(14, 10.4), dpi=150, facecolor=NIGHT)
    rows = figure.add_gridspec(
        2, 1, height_ratios=[3.02, 1], left=0.055, right=0.975, top=0.868, bottom=0.022, hspace=0.25
    )
    large = rows[0].subgridspec(1, 2, wspace=0.06)
    steps = len(times) - 1
    limits = _limits(held_out)
    turns = total_turn(way[:, -1])

    panels = [figure.add_subplot(large[0]), figure.add_subplot(large[1])]
    titles = ["Held-out flights", f"Sampled in {_plural(steps, 'step')}"]
    for axes, title, positions, colour in zip(
        panels, titles, [held_out, way[:, -1]], [total_turn(held_out), turns], strict=True
    ):
        _trajectories(axes, positions, colour, limits, width=0.9, alpha=0.55)
        axes.set_title(title, color=INK, fontsize=15, loc="left", pad=8)
        axes.set_title(f"{len(positions)} trajectories", color=FAINT, fontsize=11, loc="right", pad=8)
        axes.set_xlabel("km, along the first heading", color=FAINT, fontsize=11)
    panels[0].set_ylabel("km, to the left", color=FAINT, fontsize=11)
    panels[1].tick_params(labelleft=False)

    shown = sorted({round(i * steps / (PANELS - 1)) for i in range(PANELS)})
    small = rows[1].subgridspec(1, len(shown), wspace=0.08)
    for i, slot in enumerate(shown):
        axes = figure.add_subplot(small[i])
        _trajectories(axes, way[:, slot], turns, limits, width=0.5, alpha=0.45)
        axes.set_title(f"t = {float(times[slot]):.2g}", color=INK, fontsize=12, pad=6)
        axes.tick_params(labelleft=False, labelbottom=False, length=0)
        if i == 0:
            box = axes.get_position()
            figure.text(box.x0, box.y1 + 0.035, "From noise to flight", color=INK, fontsize=15)

    figure.text(0.055, 0.952, "Flow matching learns to fly", color=INK, fontsize=25, weight="bold")
    figure.text(
        0.055,
        0.921,
        f"Sliced Wasserstein distance of the samples to the held-out flights: {distance:.1f} km "
        f"(training flights: {floor:.1f} km)",
        color=FAINT,
        fontsize=13,
    )
    _colour_bar(figure)
    figure.savefig(out, format="png", facecolor=NIGHT)


def _trajectories(
    axes: Axes,
    positions: Tensor,
    turns: Tensor,
    limits: tuple[float, float, float, float],
    width: float,
    alpha: float,
) -> None:
    lines = LineCollection(
        list(positions.numpy()),
        array=turns.numpy(),
        cmap=TURN,
        norm=Normalize(-MOST_TURN, MOST_TURN),
        linewidths=width,
        alpha=alpha,
        capstyle="round",
    )
    axes.add_collection(lines)
    axes.set(xlim=limits[:2], ylim=limits[2:], aspect="equal", facecolor=PANEL)
    axes.grid(color="#ffffff", alpha=0.06, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=10, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.plot(0, 0, "o", color=INK, markersize=3 if width > 0.6 else 1.8, zorder=3)


def _limits(positions: Tensor) -> tuple[float, float, float, float]:
    """The limits of x and y that hold all positions, with a margin, km."""
    low, high = positions.flatten(0, 1).amin(dim=0), positions.flatten(0, 1).amax(dim=0)
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin
    return float(low[0]), float(high[0]), float(low[1]), float(high[1])


def _colour_bar(figure: Figure) -> None:
    axes = figure.add_axes((0.755, 0.938, 0.22, 0.014))
    bar = figure.colorbar(
        ScalarMappable(Normalize(-MOST_TURN, MOST_TURN), TURN),
        cax=axes,
        orientation="horizontal",
        extend="both",
    )
    ticks = [-MOST_TURN, -MOST_TURN / 2, 0, MOST_TURN / 2, MOST_TURN]
    bar.set_ticks(ticks, labels=[f"{abs(tick):.0f}°" for tick in ticks])
    axes.spines["outline"].set_visible(False)
    axes.tick_params(colors=FAINT, labelsize=10, length=0)
    axes.set_title("turns right          total turn          turns left", color=FAINT, fontsize=11, pad=5)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
