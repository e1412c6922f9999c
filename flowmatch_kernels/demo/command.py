"""`python -m flowmatch_kernels demo`: its arguments and its course."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Training stops here on a slow machine, so that the whole demo stays within three minutes.
TRAINING_SECONDS = 90.0

#: Installed by `flowmatch_kernels[demo]`, and by nothing else here.
PACKAGES = ("matplotlib", "numpy", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options."""
    parser.add_argument(
        "--out", type=Path, default=Path("demo.png"), help="the picture to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of training and of sampling (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=_positive,
        nargs="+",
        default=[1, 5, 10, 20],
        metavar="N",
        help="step counts to sample with; the picture shows the largest (default: 1 5 10 20)",
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--backend", default="auto", help="auto, triton, cuda, cpu or reference (default: %(default)s)")
    parser.add_argument(
        "--train-steps",
        type=_positive,
        default=3000,
        metavar="N",
        help="optimizer steps; fewer are quicker and learn less (default: %(default)s)",
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
    if not args.out.resolve().parent.is_dir() or args.out.is_dir():
        return _refuse(f"--out {args.out}: wanted a file in a folder that exists")

    import torch

    from .. import FlowMatching
    from ..ops import dispatch
    from .comparison import Comparison
    from .flights import AXES, WAYPOINTS, Flights, IncrementScaling
    from .network import VelocityNetwork, train
    from .picture import draw

    try:
        device = _device(args.device)
        flow_matching = FlowMatching(x_dims=(WAYPOINTS, AXES), backend=args.backend)
        backend = dispatch.choose(args.backend, device.type).name
    except (RuntimeError, ValueError, AssertionError) as error:  # torch's builds without CUDA assert
        return _refuse(str(error))

    begin = time.perf_counter()
    flights = Flights.load()
    print(
        f"{len(flights.train):,} real flight pieces to learn from, {len(flights.test)} held out, "
        f"each {WAYPOINTS} waypoints {flights.dt_seconds:g} s apart.\n"
        f"Device {_described(device)}, backend {backend}, seed {args.seed}.\n",
        flush=True,
    )
    torch.manual_seed(args.seed)
    scaling = IncrementScaling(flights.train)
    network = VelocityNetwork((WAYPOINTS, AXES)).to(device)
    states = scaling.states(flights.train).to(device)
    network, taken = train(flow_matching, network, states, args.train_steps, TRAINING_SECONDS)
    if taken < args.train_steps:
        print(f"Training stopped at {TRAINING_SECONDS:.0f} s, after {taken:,} of {args.train_steps:,} steps.")

    comparison = Comparison(flow_matching, network, scaling, flights, device, args.seed)
    same = comparison.print_table(sorted(set(args.steps)))
    way, times = comparison.way(max(args.steps))
    draw(args.out, flights.test, way, times, comparison.distance(way[:, -1]), comparison.floor)
    print(f"Picture: {args.out}\nDone in {time.perf_counter() - begin:.0f} s.")
    if not same:
        print("error: the two loops did not give the same bits", file=sys.stderr)
    return 0 if same else 1


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
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number above 0, got {text}")
    return number


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2
