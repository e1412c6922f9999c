"""What fitted solvers reach, and what a fit takes: the demo's network, digits, and fields with a closed form.

    python -m bench.fitting            about six minutes: tables, and the bounds that must hold
    python -m bench.fitting --only mixture

Everything is measured on noise, and the digits on classes, that the fit has not seen. Exits with 1 where a bound does
not hold. Seconds are of one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from flowmatch_kernels import FlowMatching, SolverComparison

from .fit_problems import GUIDANCE, digit_models, digit_network, mixture, noise, pendulum, rotation

FIXED = ("euler", "midpoint", "heun", "rk4", "ab2", "ab3", "dpmpp_2m")


class Bound(NamedTuple):
    """What must hold."""

    what: str
    measured: float
    at_most: float
    why: str

    def __str__(self) -> str:
        held = "holds" if self.measured <= self.at_most else "DOES NOT HOLD"
        return f"  {self.what}: {self.measured:.4g}, at most {self.at_most:.4g} ({self.why}): {held}"


def flights() -> Iterator[Bound]:
    """The demo's network: 2,089 flights learned in 3,000 steps; errors and distances in km."""
    from flowmatch_kernels.demo.distance import sliced_wasserstein
    from flowmatch_kernels.demo.flights import AXES, WAYPOINTS, Flights, IncrementScaling
    from flowmatch_kernels.demo.network import VelocityNetwork, train

    data = Flights.load()
    scaling = IncrementScaling(data.train)
    fm = FlowMatching((WAYPOINTS, AXES))
    torch.manual_seed(0)
    network, _ = train(fm, VelocityNetwork((WAYPOINTS, AXES)), scaling.states(data.train), 3000, seconds=900.0)
    evaluations = (3, 4, 5, 6, 8)
    begin = time.perf_counter()
    four = fm.fit_solver(network, 4, batch_size=512)
    seconds = time.perf_counter() - begin
    solvers = fm.fit_solver(network, evaluations, batch_size=512)
    assert solvers[1] == four
    comparison = fm.compare_solvers(
        network,
        (*evaluations, 10, 20, 40, 80),
        ("euler", "ab2", "ab3", *solvers),
        noise=noise(4 * len(data.test), WAYPOINTS, AXES),
        error=lambda x, y: float((scaling.positions(x) - scaling.positions(y)).square().sum(-1).mean().sqrt()),
        quality=lambda x: sum(sliced_wasserstein(part, data.test) for part in scaling.positions(x).chunk(4)) / 4,
    )
    _show("flights", comparison)
    found = {point.evaluations: point for point in comparison.curves()["fitted"]}
    for n, bound in zip(evaluations, (2.5, 1.3, 0.75, 0.5, 0.25), strict=True):
        yield Bound(f"error with {n} evaluations, km", found[n].error, bound, "a trial reached it with a tenth less")
    assert found[4].quality is not None and comparison.converged_quality is not None
    ratio = found[4].quality / comparison.converged_quality
    yield Bound("distance to held-out with 4, in that of the converged", ratio, 1.06, "as good, to the eye")
    yield Bound("seconds to fit 4 evaluations", seconds, 20, "a user waits for it")


def digits() -> Iterator[Bound]:
    """Guided digits, fitted on the classes 0 to 4 and measured on 5 to 9."""
    network = digit_network()
    fm = FlowMatching(64, **GUIDANCE)
    solvers = fm.fit_solver(**digit_models(network, range(5), 512), evaluations=(4, 5, 6, 8), batch_size=512)
    unseen = digit_models(network, range(5, 10), 1000)
    budgets = (4, 5, 6, 8, 10, 20, 40)
    comparison = fm.compare_solvers(
        **unseen, evaluations=budgets, solvers=("euler", "ab2", "ab3", "dpmpp_2m", *solvers), noise=noise(1000, 64)
    )
    _show("digits", comparison)
    error = {(point.solver, point.evaluations): point.error for point in comparison.points}
    yield Bound("6 evaluations, in Euler's 20", error["fitted", 6] / error["euler", 20], 1.1, "a third of the wait")
    yield Bound("8 evaluations, in Euler's 40", error["fitted", 8] / error["euler", 40], 1.2, "a fifth of the wait")


def closed(name: str, field: Callable[..., torch.Tensor], evaluations: tuple[int, ...]) -> Iterator[Bound]:
    """A field in the plane: at most the error of the best solver with a name."""
    fm = FlowMatching(2)
    solvers = fm.fit_solver(field, evaluations, batch_size=4096)
    comparison = fm.compare_solvers(field, evaluations, (*FIXED, *solvers), noise=noise(4096, 2))
    _show(name, comparison)
    curves = comparison.curves()
    for point in curves.pop("fitted"):
        best = min((p for points in curves.values() for p in points if p.budget == point.budget), key=lambda p: p.error)
        yield Bound(f"error with {point.budget} evaluations, in {best.solver}'s", point.error / best.error, 1.0, "safe")


PROBLEMS: dict[str, Callable[[], Iterator[Bound]]] = {
    "flights": flights,
    "digits": digits,
    "mixture": lambda: closed("mixture", mixture, (4, 6, 8, 12)),
    "rotation": lambda: closed("rotation", rotation, (4, 6, 8)),
    "pendulum": lambda: closed("pendulum", pendulum, (4, 6, 8, 12)),
}


def _show(name: str, comparison: SolverComparison) -> None:
    print(f"\n{name}\n{comparison}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fitting", description="what fitted solvers reach")
    parser.add_argument("--only", choices=PROBLEMS, action="append", help="may be repeated")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    held = True
    for name in chosen.only or PROBLEMS:
        for bound in PROBLEMS[name]():
            print(bound, flush=True)
            held = held and bound.measured <= bound.at_most
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
