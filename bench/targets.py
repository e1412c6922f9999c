"""The targets: what ours must reach on two cores, ten steps, a free step_fn; ratios of medians of one run."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from flowmatch_kernels.ops import reference_log_prob, reference_noise
from flowmatch_kernels.ops.dispatch import BACKENDS, choose
from flowmatch_kernels.ops.fused_step import COLUMNS, Operands

from . import host
from .contestants import ours
from .measure import Timing, in_turn, peak_bytes
from .work import OF_SAMPLES, Plan, Problem, Work

CPU = torch.device("cpu")


class Target(NamedTuple):
    """One row of the table."""

    work: str
    against: str
    at_most: float
    measured: float | None
    """The ratio; None: it could not be measured."""
    how: str = ""

    def json(self) -> dict[str, Any]:
        """As the results hold it; `met` is None where nothing was measured."""
        measured = None if self.measured is None else round(self.measured, 3)
        return self._asdict() | {"measured": measured, "met": None if measured is None else measured <= self.at_most}


class Ratio(NamedTuple):
    """A target that is a ratio of times of the run: ours against the fastest contestant of a kind."""

    work: Work
    kind: str
    """Of `AGAINST`."""
    at_most: float


AGAINST = {
    "published": "published loop",
    "loop": "faster of lerobot's float loop and the 0-dim loop",
    "sample loop": "eager loop with times of each sample",
    "hand": "best by hand",
    "bare": "bare loop: draw, grid, calls",
}


def ratios(plan: Plan) -> list[Ratio]:
    """The table of ratios. The first call, which makes tables and takes memory, is not timed."""
    small, large = plan.small, plan.large
    return [
        Ratio(Work(small), "published", 0.26),
        Ratio(Work(small), "hand", 1.1),
        Ratio(Work(small, "trajectory"), "published", 1 / 5),
        Ratio(Work(small, "guided"), "published", 0.30),
        Ratio(Work(small, drawn=True), "bare", 3.2),
        Ratio(Work(small, grid="tensor"), "loop", 0.4),
        Ratio(Work(small, grid="list"), "loop", 0.4),
        Ratio(Work(small, grid="tensor", step_sizes=True), "loop", 0.4),
        Ratio(Work(small, grid="list", step_sizes=True), "loop", 0.4),
        Ratio(Work(small, grid=OF_SAMPLES), "sample loop", 0.4),
        Ratio(Work(small, grid=OF_SAMPLES), "hand", 1.1),
        Ratio(Work(small, built=True), "published", 0.8),
        Ratio(Work(small, extension=False), "published", 1.1),
        Ratio(Work(large), "published", 1 / 3),
        Ratio(Work(large), "hand", 1.05),
        Ratio(Work(large, "trajectory"), "published", 0.45),
        Ratio(Work(large, "trajectory"), "hand", 0.5),
        Ratio(Work(large, "guided"), "published", 1 / 3),
        Ratio(Work(large, "midpoint"), "hand", 1.1),
        Ratio(Work(large, "rk4"), "hand", 1.1),
    ]


def works(plan: Plan) -> list[Work]:
    """The works that ratios name, each once."""
    return list(dict.fromkeys(ratio.work for ratio in ratios(plan)))


def table(plan: Plan, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target; ratios are of the run's own `rows`, the last eight are measured here.

    Of a plan that is not whole the ratios of its works alone.
    """
    found = [measured(ratio, rows) for ratio in ratios(plan) if plan.whole or ratio.work in plan.works]
    if plan.whole:
        found += [
            *triad(plan),
            keyed_noise(plan),
            step_log_prob(plan),
            trajectory_memory(plan.large),
            cost_per_step(plan),
        ]
        found += host_on_a_gpu(plan)
    return [target.json() for target in found]


def measured(ratio: Ratio, rows: list[dict[str, Any]]) -> Target:
    """One ratio, of the run's rows; where a kind has several contestants, `how` names the fastest."""
    best, against = fastest(rows, ratio.work, ratio.kind)
    _, mine = fastest(rows, ratio.work, "ours")
    value = None if mine is None or against is None else mine / against
    how = best if best is not None and ratio.kind in ("hand", "loop") else ""
    return Target(str(ratio.work), AGAINST[ratio.kind], ratio.at_most, value, how)


def fastest(rows: list[dict[str, Any]], work: Work, kind: str) -> tuple[str | None, float | None]:
    """The fastest of this kind, and its median in microseconds; of ours the backend that `auto` means there."""
    name = f"ours, {choose('auto', 'cpu').name if work.extension else 'reference'}"
    found = [row for row in _of(rows, work, kind) if kind != "ours" or row["contestant"] == name]
    best = min(found, key=lambda row: row["median_us"], default=None)
    return (None, None) if best is None else (best["contestant"], best["median_us"])


def _of(rows: list[dict[str, Any]], work: Work, kind: str) -> list[dict[str, Any]]:
    wanted = work.json()
    return [r for r in rows if r["kind"] == kind and "median_us" in r and all(r[k] == v for k, v in wanted.items())]


def triad(plan: Plan) -> list[Target]:
    """The kernel itself, called directly, against `torch.add(a, b, alpha=s, out=c)`: 12 bytes a float each.

    Both read two buffers and write a third, or, in place, write the first; all three warm, and filled.
    """
    backend = choose("auto", "cpu").name
    fused_step_ = BACKENDS[backend].load()
    a, b, c = (torch.randn(plan.triad) for _ in range(3))
    coefficients = torch.zeros(1, len(COLUMNS))
    coefficients[0, :2] = torch.tensor([1.0, 1e-3])
    nothing = (None,) * 4
    timings = in_turn(
        {
            "step": lambda: fused_step_(Operands(c, a, b, *nothing, coefficients, 0)),
            "triad": lambda: torch.add(a, b, alpha=1e-3, out=c),
            "step in place": lambda: fused_step_(Operands(c, c, b, *nothing, coefficients, 0)),
            "triad in place": lambda: c.add_(b, alpha=1e-3),
        },
        3 * plan.seconds,
        plan.least_runs,
    )
    work = f"one fused step, {plan.triad} floats, nothing optional"
    rate = 12e-9 * plan.triad / timings["triad"].median
    return [
        Target(work, "triad, same bytes", 1.1, _ratio(timings, "step", "triad"), f"{backend}; triad {rate:.1f} GB/s"),
        Target(f"{work}, in place", "triad in place", 1.1, _ratio(timings, "step in place", "triad in place"), backend),
    ]


def keyed_noise(plan: Plan) -> Target:
    """Keyed noise into memory that is there, against torch.randn's, on the same threads; its bits checked first."""
    backend, samples = choose("auto", "cpu"), 4
    elements = max(1, plan.triad // samples)
    keys = torch.tensor([[7, index, 0] for index in range(samples)])
    out = torch.full((samples, elements), torch.nan)
    draw = backend.load_noise()
    draw(out, keys, 0)
    wanted = reference_noise.keyed_noise(keys[:1], (elements,), torch.float32)
    assert torch.equal(out[:1], wanted), "keyed noise has other bits than the reference"
    timings = in_turn(
        {"keyed": lambda: draw(out, keys, 0), "randn": lambda: torch.randn(out.shape, out=out)},
        2 * plan.seconds,
        plan.least_runs,
    )
    work = f"keyed noise, {samples * elements} floats"
    return Target(work, "torch.randn", 1 / 4, _ratio(timings, "keyed", "randn"), backend.name)


def step_log_prob(plan: Plan) -> Target:
    """The log-probability of a step against the expression and its mean in eager PyTorch; its bits checked first."""
    backend, samples = choose("auto", "cpu"), 4
    a, b0, std = torch.tensor([0.9, 0.2, 0.3]).view(3, 1, 1)
    x, v, after = torch.randn(3, samples, max(1, plan.triad // samples))
    coefficients = torch.zeros(1, len(COLUMNS))
    coefficients[0, :2] = torch.cat([a, b0]).flatten()
    densities = torch.tensor([[-1 / (2 * std.item() ** 2), -math.log(std.item()) - math.log(2 * math.pi) / 2]])

    def eager() -> torch.Tensor:
        mean = a * x + b0 * v
        log_prob = -((after - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
        return log_prob.mean(dim=1)

    def op() -> torch.Tensor:
        return torch.ops.flowmatch_kernels.step_log_prob(x, v, after, coefficients, densities, 0)

    wanted = reference_log_prob.step_log_prob(x, v, after, coefficients, densities, 0)
    assert torch.equal(op(), wanted), "step_log_prob has other bits than the reference"
    torch.testing.assert_close(op(), eager(), rtol=1e-4, atol=1e-4)  # another order of the sum
    timings = in_turn({"op": op, "eager": eager}, 2 * plan.seconds, plan.least_runs)
    work = f"log-probability of a step, {x.numel()} floats"
    return Target(work, "the expression and its mean", 1 / 4, _ratio(timings, "op", "eager"), backend.name)


def _ratio(timings: dict[str, Timing], mine: str, other: str) -> float:
    return timings[mine].median / timings[other].median


def trajectory_memory(shape: tuple[int, ...]) -> Target:
    """The memory that a call adds at its highest, against the trajectory and two states."""
    work = Work(shape, "trajectory")
    sample = ours("auto", Problem(work, CPU))
    sample()
    peak = peak_bytes(sample)
    allowed = (work.steps + 1 + 2) * work.state_bytes
    measured = None if peak is None else round(peak / allowed, 2)  # the kernel counts pages, some of them not ours
    return Target(f"{work}: peak memory", "the trajectory and two states", 1.0, measured)


def cost_per_step(plan: Plan) -> Target:
    """The cost of one step more, between neighbouring counts of steps: the largest against the smallest.

    What a call costs once, the checks of its arguments and its noise, is not a step's.
    """
    samples: dict[int, Callable[[], object]] = {
        n: ours("auto", Problem(Work(plan.small, steps=n), CPU)) for n in plan.steps
    }
    timings = in_turn(samples, 3 * plan.seconds, plan.least_runs)
    more = {f"{m} to {n}": (timings[n].median - timings[m].median) / (n - m) * 1e6 for m, n in pairwise(plan.steps)}
    spans = ", ".join(f"{steps}: {us:.2f} us" for steps, us in more.items())
    work = f"{list(plan.small)}: one step more, {plan.steps[0]} to {plan.steps[-1]:,} steps"
    least, most = min(more.values()), max(more.values())
    return Target(work, "the cheapest", 1.1, most / least if least > 0 else None, spans)  # else all was noise


def host_on_a_gpu(plan: Plan) -> list[Target]:
    """What a launch, and a row of sample(), cost the host with drivers that do nothing: `bench.host`."""
    found: dict[str, dict[str, Timing]] = {}
    if importlib.util.find_spec("triton") is not None:
        found = host.measured(6 * plan.seconds)

    def target(part: str, name: str, against: str, work: str, at_most: float) -> Target:
        timings = found.get(part, {})
        if name not in timings:
            return Target(work, against, at_most, None)
        mine, eager = timings[name].median, timings[against].median
        steps = host.STEPS if part == "sample" else 1
        return Target(work, against, at_most, mine / eager, f"{mine / steps * 1e6:.2f} us")

    launch = "launch", "launch, cuda", "eager, two operators", "host, idle GPU driver: a launch by cuda", 1.15
    direct = "launch", "launch, direct", "eager, two operators", "host, idle GPU driver: a launch by triton", 1.9
    row = "sample", "sample(), direct", "eager loop", "host, idle GPU driver: a row of sample() by triton", 1.9
    cuda = "sample", "rows, cuda", "eager loop", "host, idle GPU driver: a row of sample() by cuda", 1.15
    return [target(*one) for one in (launch, direct, row, cuda)]
