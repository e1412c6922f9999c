"""The picture: held-out and sampled trajectories side by side, and quality against evaluations."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .. import SolverComparison
from ..solver_comparison import draw_curves
from .flights import total_turn
from .methods import Measured

NIGHT, PANEL, INK, FAINT = "#0b1020", "#111831", "#eef1f8", "#8d97b3"
TURN = LinearSegmentedColormap.from_list(
    "turn", ["#ff5d73", "#ff9f6b", "#ffe3b0", "#f6f4ee", "#a9e5f2", "#4fb6ff", "#5b7cff"]
)
MOST_TURN = 90.0
"""Degrees; the ends of the colour scale."""
CURVES = {"euler": "#dfe4f2", "fitted": "#ffe14d"}
"""Colours of the solvers in the curve; the others have `OTHER`."""
METHODS = {
    "DDPM": "#ff9f6b",
    "DDIM": "#ff5d73",
    "flow matching, euler": "#dfe4f2",
    "flow matching, ab3": "#ffe14d",
}
"""Colours of the methods in the curve."""
OTHER = "#5b7cff"


def draw(
    out: Path,
    held_out: Tensor,
    sampled: Mapping[str, Tensor],
    measured: SolverComparison,
    floor: float,
    note: str = "",
) -> None:
    """Writes the picture as a PNG: flights side by side, and the quality against the evaluations.

    Args:
        out: The file.
        held_out: [M, 64, 2], km.
        sampled: By its title, [N, 64, 2], km.
        measured: The solvers, with the distance to the held-out as their quality, km.
        floor: That of training to the held-out, km.
        note: What else a reader must know, as that training was cut short.
    """
    curves = {
        name: [(point.evaluations, point.quality or 0.0) for point in points]
        for name, points in measured.curves().items()
    }
    assert measured.converged_quality is not None
    _page(
        out,
        {"Held-out flights": held_out, **sampled},
        curves,
        CURVES,
        {"converged": (measured.converged_quality, "--"), "training flights": (floor, ":")},
        "Four evaluations of the network are enough",
        "A solver fitted to the model in seconds, beside the published Euler loop: same network, same noise.\n"
        "The noise at t = 0: one normal number for each coordinate of each of a flight's 64 increments.",
        note,
        beside=True,
    )


def draw_methods(out: Path, held_out: Tensor, measured: Measured, trained: int, note: str = "") -> None:
    """Writes the picture of DDPM, DDIM and flow matching as a PNG.

    Args:
        out: The file.
        held_out: [M, 64, 2], km.
        measured: The methods.
        trained: Training steps of each network.
        note: As for `draw`.
    """
    _page(
        out,
        {"Held-out flights": held_out, **measured.shown},
        {name: [(point.evaluations, point.distance) for point in points] for name, points in measured.points.items()},
        METHODS,
        {"training flights": (measured.floor, ":")},
        "DDPM, DDIM and flow matching",
        f"The same flights, and {trained:,} training steps of the same network for both. DDPM and DDIM sample\n"
        "from the one that predicts v, flow matching from the one that predicts the velocity.",
        note,
        beside=False,
    )


def _page(
    out: Path,
    panels: Mapping[str, Tensor],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    colours: Mapping[str, str],
    levels: Mapping[str, tuple[float, str]],
    title: str,
    explained: str,
    note: str,
    *,
    beside: bool,
) -> None:
    """Writes flights side by side, and below them curves of quality against evaluations.

    Args:
        out: The file.
        panels: By its title, [N, 64, 2], km: the first sets the limits.
        curves: By its name, (evaluations, km) of each point.
        colours: Of the curves that are not `OTHER`.
        levels: By its name, the height of a horizontal line, km, and its style.
        title: Of the picture.
        explained: Two lines below it.
        note: In the last line.
        beside: Write the curves' names beside their ends; False: in a legend.
    """
    figure = Figure(figsize=(15, 9.6), dpi=110, facecolor=NIGHT)
    rows = figure.add_gridspec(
        2, 1, height_ratios=[1.0, 1.0], left=0.055, right=0.975, top=0.865, bottom=0.085, hspace=0.34
    )
    limits = _limits(next(iter(panels.values())))
    places = rows[0].subgridspec(1, len(panels), wspace=0.1)
    size = 15 if len(panels) < 4 else 12
    for k, (name, positions) in enumerate(panels.items()):
        axes = figure.add_subplot(places[k])
        _trajectories(axes, positions, total_turn(positions), limits, width=0.8, alpha=0.5)
        axes.set_title(name, color=INK, fontsize=size, loc="left", pad=8)
        axes.set_title(f"{len(positions)} flights", color=FAINT, fontsize=size - 4, loc="right", pad=8)
        axes.set_xlabel("km, along the first heading", color=FAINT, fontsize=11)
        if k == 0:
            axes.set_ylabel("km, to the left", color=FAINT, fontsize=11)
    _curve(figure.add_subplot(rows[1]), curves, colours, levels, beside)
    figure.text(0.055, 0.95, title, color=INK, fontsize=25, weight="bold")
    figure.text(0.055, 0.905, explained, color=FAINT, fontsize=13)
    figure.text(
        0.975,
        0.008,
        "Flights: samples of the Python package traffic (MIT licence, Xavier Olive), positions of the OpenSky Network",
        color=FAINT,
        fontsize=9,
        ha="right",
    )
    figure.text(0.055, 0.028, note, color=CURVES["fitted"], fontsize=10)
    _colour_bar(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor=NIGHT)
    # 256 colours are enough here, and a third of the size.
    Image.open(drawn).convert("RGB").quantize(256).save(out, format="PNG", optimize=True)


def draw_solvers(out: Path, measured: SolverComparison, trained: int) -> None:
    """Writes the picture of every solver as a PNG: quality and error, km, against the evaluations.

    Args:
        out: The file.
        measured: The solvers, with the distance to the held-out as their quality, km.
        trained: Training steps of the network.
    """
    figure = Figure(figsize=(14, 6), layout="constrained")
    labels = {
        "quality": "km to the held-out flights (sliced Wasserstein)",
        "error": "km to the converged flights (RMS)",
    }
    for axes, (what, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        measured.draw(axes, what)
        axes.set(ylabel=label, xlabel="evaluations of the network for one flight")
        axes.legend()
    figure.suptitle(
        f"The demo's network after {trained:,} training steps, {measured.samples} flights; less is better. "
        f"Converged: {measured.reference}",
        fontsize=10,
    )
    figure.savefig(out, dpi=130)


def _curve(
    axes: Axes,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    colours: Mapping[str, str],
    levels: Mapping[str, tuple[float, str]],
    beside: bool,
) -> None:
    """The distance to the held-out flights against the evaluations."""
    draw_curves(axes, curves, "km to the held-out flights\n(sliced Wasserstein)")
    axes.set_facecolor(PANEL)
    axes.set_title("Quality against evaluations", color=INK, fontsize=15, loc="left", pad=8)
    axes.set_xlabel("evaluations of the network for one flight", color=FAINT, fontsize=11)
    axes.yaxis.label.set(color=FAINT, fontsize=11)
    for line in axes.get_lines():
        name = str(line.get_label())
        line.set_color(colours.get(name, OTHER))
        line.set_alpha(1.0 if name in colours else 0.75)
    left = axes.get_xlim()[0]
    for name, (height, style) in levels.items():
        axes.axhline(height, color=FAINT, linewidth=1, linestyle=style)
        axes.annotate(
            f"{name}: {height:.1f} km",
            (left, height),
            xytext=(6, -5),
            textcoords="offset points",
            va="top",
            color=FAINT,
            fontsize=11,
        )
    axes.set_ylim(0.9 * min(height for height, _ in levels.values()), None)
    if beside:
        for name, points in curves.items():
            right = name == "fitted"
            axes.annotate(
                name,
                points[-1] if right else points[0],
                xytext=(10, 4) if right else (-10, -4),
                textcoords="offset points",
                ha="left" if right else "right",
                color=colours.get(name, OTHER),
                fontsize=12,
                weight="bold",
            )
    else:
        axes.legend(labelcolor="linecolor", frameon=False, fontsize=12)
    axes.grid(color="#ffffff", alpha=0.06, linewidth=0.8)
    axes.tick_params(colors=FAINT, labelsize=10, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


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
