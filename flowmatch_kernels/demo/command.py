"""`python -m flowmatch_kernels demo`: its arguments and its course."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from .. import FlowMatching

#: For which the speed of training is measured, before what fits into three minutes is chosen.
CALIBRATION_SECONDS = 2.0

#: Written where `--out` names no other file.
PICTURE, SOLVERS_PICTURE, METHODS_PICTURE = Path("demo.png"), Path("demo-solvers.png"), Path("demo-methods.png")

#: Installed by `flowmatch_kernels[demo]`, and by nothing else here.
PACKAGES = ("matplotlib", "numpy", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options."""
    parser.add_argument(
        "--out",
        type=Path,
        help=f"the picture to write (default: {PICTURE}, {SOLVERS_PICTURE} or {METHODS_PICTURE})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of training and of sampling (default: %(default)s)")
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument(
        "--compare-solvers",
        action="store_true",
        help="measure every solver at equal evaluations of the network, and draw the curves",
    )
    compared.add_argument(
        "--compare-methods",
        action="store_true",
        help="train DDPM and DDIM's network too, measure them beside flow matching, and draw the curves; within "
        "twelve minutes",
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--backend", default="auto", help="auto, triton, cuda, cpu or reference (default: %(default)s)")
    parser.add_argument(
        "--train-steps",
        type=_positive,
        default=3000,
        metavar="N",
        help="optimizer steps at most; a slow machine takes fewer, to end within three minutes (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains, samples, prints the table and writes the picture.

    Args:
        args: What a parser with `add_arguments` gave.

    Returns:
        0; 1 if the two loops did not give the same bits; 2 if the demo cannot start.
    """
    try:
        import matplotlib  # noqa: F401
        import numpy  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        if error.name not in PACKAGES:
            raise
        return _refuse(f"{error.name} is not installed. The demo needs: pip install flowmatch_kernels[demo]")
    default = SOLVERS_PICTURE if args.compare_solvers else METHODS_PICTURE if args.compare_methods else PICTURE
    out = args.out or default
    if not out.resolve().parent.is_dir() or out.is_dir():
        return _refuse(f"--out {out}: wanted a file in a folder that exists")

    from .. import FlowMatching
    from ..ops import dispatch
    from .flights import AXES, WAYPOINTS

    try:
        device = _device(args.device)
        flow_matching = FlowMatching(x_dims=(WAYPOINTS, AXES), backend=args.backend)
        backend = dispatch.choose(args.backend, device.type).name
    except (RuntimeError, ValueError, AssertionError) as error:  # torch's builds without CUDA assert
        return _refuse(str(error))

    with _one_thread():
        return _course(args, out, flow_matching, backend, device)


def _course(
    args: argparse.Namespace, out: Path, flow_matching: FlowMatching, backend: str, device: torch.device
) -> int:
    import torch

    from ..solvers import SOLVERS
    from . import methods, plan
    from .comparison import FITTED, NAMED, NAMED_EVALUATIONS, Comparison, gains, table
    from .flights import AXES, WAYPOINTS, Flights, IncrementScaling
    from .network import VelocityNetwork, step_seconds, train
    from .picture import draw, draw_methods, draw_solvers

    begin = time.perf_counter()
    flights = Flights.load()
    print(
        f"{len(flights.train):,} real flight pieces to learn from, {len(flights.test)} held out, "
        f"each {WAYPOINTS} waypoints {flights.dt_seconds:g} s apart.\n"
        f"Device {_described(device)}, backend {backend}, seed {args.seed}.\n",
        flush=True,
    )
    scaling = IncrementScaling(flights.train)
    states = scaling.states(flights.train).to(device)

    course = plan.course(compare_solvers=args.compare_solvers, compare_methods=args.compare_methods)
    diffusion = methods.diffusion_of(flow_matching)

    def chosen(step_seconds: float, steps: int) -> plan.Plan:
        return plan.plan(step_seconds, course.seconds - (time.perf_counter() - begin), steps, course)

    step = step_seconds(flow_matching, states, CALIBRATION_SECONDS)
    first = chosen(step, args.train_steps)
    several = f" for each of {course.networks} networks" if course.networks > 1 else ""
    print(
        f"Measured: {1 / step:.0f} training steps a second. To end within {course.minutes} minutes: "
        f"{first.steps:,} of {args.train_steps:,} steps{several},\n"
        f"about {course.networks * first.steps * step:.0f} s; {first.sizes}.",
        flush=True,
    )
    training = time.perf_counter()
    torch.manual_seed(args.seed)
    network = VelocityNetwork((WAYPOINTS, AXES)).to(device)
    network, taken = train(flow_matching, network, states, first.steps, first.training_seconds)
    if args.compare_methods:  # the same first weights, and as many steps, however long they take
        torch.manual_seed(args.seed)
        predicting = VelocityNetwork((WAYPOINTS, AXES), last_time=diffusion.num_train_timesteps).to(device)
        predicting, _ = train(diffusion, predicting, states, taken, math.inf)
    training = time.perf_counter() - training
    # Again, now that the speed is known over all of training: another process may have come or gone.
    sizes = chosen(training / (course.networks * taken), 0).sizes
    notes = []
    if taken < args.train_steps:
        notes.append(f"Training was cut short: {taken:,} of {args.train_steps:,} steps, {training:.0f} s.")
    if sizes != plan.SIZES[0]:
        notes.append(f"Measured less than on a faster machine: {sizes}.")
    if notes:
        print(*notes, "This machine is slow or busy: expect other distances than the README's.", sep="\n")
    note = " ".join(notes)

    comparison = Comparison(flow_matching, network, scaling, flights, device, args.seed, sizes)
    if args.compare_methods:
        compared = methods.compare(comparison, diffusion, predicting)
        print(
            f"\n{compared}\nSliced 2-Wasserstein distances of positions to the held-out flights, km: means of "
            f"{sizes.method_draws} draws of the noise, each of {comparison.count} flights.\n"
            f"One draw's standard deviation: {compared.deviation:.2f} km."
        )
        draw_methods(out, flights.test, compared, taken, note)
        return _done(out, begin)
    fitting = time.perf_counter()
    fitted = comparison.fit()
    print(f"\nFitted solvers with {', '.join(map(str, FITTED))} evaluations: {time.perf_counter() - fitting:.0f} s.\n")
    same = True
    if args.compare_solvers:
        measured = comparison.solvers((*SOLVERS, *fitted))
        print(f"{measured}\nErrors and distances to the held-out flights (quality) are in km.")
        draw_solvers(out, measured, taken)
    else:
        measured = comparison.solvers(("euler", *NAMED, *fitted))
        lines, same = comparison.lines(measured, fitted), comparison.same_bits()
        print(f"{table(lines)}\n  {'converged':28} {measured.converged_quality:38.2f} km")
        print(f"  {'floor: training flights':28} {comparison.floor:38.2f} km\n")
        print("\n".join(gains(lines)))
        print(
            f"\nSame bits as the published loop: {'yes' if same else 'NO'}. The network takes "
            f"{comparison.network_share():.1%} of a sample() with 10 steps.\n"
            f"Times are medians for {comparison.count} trajectories. Distances are sliced 2-Wasserstein distances of "
            "positions\nto the held-out flights; the error is the RMS distance to the converged trajectories, "
            f"{measured.reference}.\nThe best solver with a name is the one nearest to the held-out flights at "
            f"{NAMED_EVALUATIONS} evaluations."
        )
        four = fitted[FITTED.index(4)]
        sampled = {
            "Euler, 4 evaluations": comparison.positions("euler", 4),
            "Fitted, 4 evaluations": comparison.positions(four),
        }
        draw(out, flights.test, sampled, measured, comparison.floor, note)
    _done(out, begin)
    if not same:
        print("error: the two loops did not give the same bits", file=sys.stderr)
    return 0 if same else 1


def _done(out: Path, begin: float) -> int:
    print(f"Picture: {out}\nDone in {time.perf_counter() - begin:.0f} s.")
    return 0


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread for PyTorch, for the thousands of evaluations of as small a network as this one.

    On two idle cores a second thread saves less than half of 50 ms an evaluation. On two cores that six processes
    share it makes it 400 to 900 ms instead of 100: the threads wait for each other at every layer.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    torch.empty(0, device=device)  # raises here, and not after training, where there is no such device
    return device


def _described(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device} ({threads} thread{'s' * (threads > 1)})" if device.type == "cpu" else str(device)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number above 0, got {text}")
    return number


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2
