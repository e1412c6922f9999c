"""The time of a step of each integration beside the project's own, with a velocity that costs nothing.

    python -m bench.integrations [--seconds 30] [--shape 1 50 32]

Both run the same whole sampling of STEPS steps without gradients, and their results are compared first: to the bit, or,
where the project rounds otherwise, within a bound that its row states. They take turns in one run, on one thread; the
times are its own CPU time, as in bench/host.py. A project that is not installed has no row. The loops of lerobot,
GR00T, openpi and Alpamayo are those of the tests, written from facts. Exits with 1 where a result differs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .host import in_turn
from .machine import ROOT
from .measure import Timing
from .report import table as markdown
from .work import POLICY

STEPS = 10


class Row(NamedTuple):
    """One integration and what it replaces."""

    name: str
    theirs: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    eps: float = 0.0
    """How far apart the results may be, in eps of the largest entry; 0: no bit."""


def rows(shape: tuple[int, ...]) -> Iterator[Row]:
    """The rows of the projects that are installed, for a float32 state of this shape."""
    random = torch.Generator().manual_seed(0)
    x, v = (torch.randn(shape, generator=random) for _ in range(2))
    if importlib.util.find_spec("diffusers"):
        yield from _diffusers(x, v)
    if importlib.util.find_spec("torchdiffeq"):
        yield from _torchdiffeq(x, v)
    if importlib.util.find_spec("flow_matching"):
        yield from _flow_matching(x, v)
    yield from _alpamayo(x, v)
    yield from _lerobot(x, v)
    if x.dim() == 3:  # [B, actions, numbers]
        yield from _openpi(x, v)
        yield from _gr00t(x, v)


def _diffusers(x: Tensor, v: Tensor) -> Iterator[Row]:
    import diffusers
    import numpy

    from flowmatch_kernels.integrations import diffusers as ours

    sigmas = numpy.linspace(0.999, 1 / STEPS, STEPS)  # below 1, or UniPC takes another first one than Euler

    def run(scheduler: Any, guided: bool = False, fused: bool = False) -> Callable[[], Tensor]:
        def sample() -> Tensor:
            scheduler.set_timesteps(sigmas=sigmas.copy())  # some write to it
            state = x
            for t in scheduler.timesteps:
                if fused:
                    state = scheduler.step_guided(v, u, 3.5, t, state, return_dict=False)[0]
                else:
                    output = u + 3.5 * (v - u) if guided else v
                    state = scheduler.step(output, t, state, return_dict=False)[0]
            return state

        return sample

    u = v.flip(0) / 2
    theirs, replaced = diffusers.FlowMatchEulerDiscreteScheduler(), ours.FlowMatchEulerDiscreteScheduler()
    yield Row("diffusers, Euler", run(theirs), run(replaced))
    yield Row("diffusers, Euler, guided", run(theirs, guided=True), run(replaced, fused=True))
    theirs = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    yield Row("diffusers, UniPC", run(theirs), run(ours.FlowMatchSolverScheduler(int_method="unipc")), eps=4 + STEPS)


def _torchdiffeq(x: Tensor, v: Tensor) -> Iterator[Row]:
    import torchdiffeq

    from flowmatch_kernels.integrations import torchdiffeq as ours

    grid = torch.linspace(0, 1, STEPS + 1)
    for method in ("euler", "midpoint", "rk4"):
        both = [
            lambda odeint=odeint, method=method: odeint(lambda t, x: v, x, grid, method=method)[-1]
            for odeint in (torchdiffeq.odeint, ours.odeint)
        ]
        yield Row(f"torchdiffeq, {method}", *both)


def _flow_matching(x: Tensor, v: Tensor) -> Iterator[Row]:
    from flow_matching.solver import ODESolver

    from flowmatch_kernels.integrations import flow_matching as ours

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return v

    both = [
        lambda solver=solver: solver.sample(x, 1 / STEPS, method="midpoint")
        for solver in (ODESolver(velocity_model=velocity), ours.ODESolver(velocity_model=velocity))
    ]
    yield Row("flow_matching, midpoint", *both)


def _alpamayo(x: Tensor, v: Tensor) -> Iterator[Row]:
    from flowmatch_kernels.integrations import alpamayo

    published, ours = _oracle("published").sample, alpamayo.FlowMatching(x_dims=x.shape[1:], num_inference_steps=STEPS)
    batch = x.shape[0]

    def step_fn(x: Tensor, t: Tensor) -> Tensor:
        return v

    def seeded(sample: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            torch.default_generator.manual_seed(0)  # both draw the noise; torch.manual_seed costs 500 us
            return sample()

        return run

    theirs = seeded(lambda: published(batch, step_fn, x.shape[1:], STEPS))
    yield Row("Alpamayo", theirs, seeded(lambda: ours.sample(batch_size=batch, step_fn=step_fn)))


def _lerobot(x: Tensor, v: Tensor) -> Iterator[Row]:
    from flowmatch_kernels.integrations import lerobot as ours

    both = [
        lambda integrate=integrate: integrate(lambda x, t: v, x, STEPS)
        for integrate in (_oracle("lerobot_loop").euler_integrate, ours.euler_integrate)
    ]
    yield Row("lerobot, Euler", *both)
    yield Row("lerobot, Euler, grad mode", *map(torch.enable_grad(), both))


@contextlib.contextmanager
def _known(versions: dict[str, Any], method: Callable[..., Any], what: Any) -> Iterator[None]:
    """A stand-in's method counts as a version that `accelerate` knows."""
    from flowmatch_kernels.integrations.replacement import fingerprint

    key = fingerprint(method)
    before = dict(versions)
    versions[key] = what
    try:
        yield
    finally:
        versions.clear()
        versions.update(before)


def _openpi(x: Tensor, v: Tensor) -> Iterator[Row]:
    from flowmatch_kernels.integrations import openpi as ours

    stand_in = _oracle("openpi_loop").Model

    class Free(stand_in):  # type: ignore[misc, valid-type]
        def denoise_step(self, *given: Any) -> Tensor:
            return v

    models = [Free(horizon=x.shape[1], dim=x.shape[2]) for _ in range(2)]
    with _known(ours.KNOWN, stand_in.sample_actions, "the stand-in"):
        ours.accelerate(models[1])
    observation = types.SimpleNamespace(state=x[..., 0])
    yield Row("openpi", *(lambda model=model: model.sample_actions("cpu", observation, x, STEPS) for model in models))


def _gr00t(x: Tensor, v: Tensor) -> Iterator[Row]:
    from flowmatch_kernels.integrations import gr00t as ours

    loops = _oracle("gr00t_loop")

    class Free(torch.nn.Module):
        def forward(self, *given: Any, **named: Any) -> Tensor:
            return v

    heads = [loops.N1d7(x.dtype) for _ in range(2)]
    for head in heads:
        head.config.action_horizon, head.action_horizon, head.action_dim = x.shape[1], x.shape[1], x.shape[2]
        head.config.add_pos_embed, head.num_inference_timesteps = False, STEPS
        head.action_encoder, head.model, head.action_decoder = Free(), Free(), Free()
    with _known(ours.KNOWN, loops.N1d7.get_action_with_features, ("the stand-in", ours._n1d7)):
        ours.accelerate(heads[1])
    features, state = torch.zeros(x.shape[0], 1, 1), torch.zeros(x.shape[0], 1, x.shape[2])
    # The strength of real-time chunking, as the heads take it from the actions of the chunk before.
    names = {"rtc_overlap_steps": 2, "action_horizon": x.shape[1], "rtc_frozen_steps": 1, "rtc_ramp_rate": 6.0}

    def run(head: Any, before: dict[str, Tensor]) -> Callable[[], Tensor]:
        def sample() -> Tensor:
            torch.default_generator.manual_seed(0)  # the head draws the noise; torch.manual_seed costs 500 us
            found = head.get_action_with_features(
                backbone_features=features,
                state_features=state,
                embodiment_id=None,
                backbone_output=None,
                action_input=before,
                options=names,
            )
            return found["action_pred"]

        return sample

    yield Row("GR00T N1.7", *(run(head, {}) for head in heads))
    yield Row("GR00T N1.7, real-time chunking", *(run(head, {"action": x}) for head in heads))


def _oracle(name: str) -> Any:
    """A module of the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def difference(row: Row) -> str | None:
    """What our result is other than theirs."""
    wanted, got = row.theirs(), row.ours()
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return f"{row.name}: {got.dtype} {list(got.shape)}, wanted {wanted.dtype} {list(wanted.shape)}"
    if not row.eps:
        return None if torch.equal(got, wanted) else f"{row.name}: other bits"
    error = float((got - wanted).abs().max() / wanted.abs().max()) / torch.finfo(got.dtype).eps
    return None if error <= row.eps else f"{row.name}: {error:.1f} eps apart, wanted {row.eps}"


@torch.no_grad()
def measured(shape: tuple[int, ...], seconds: float) -> dict[str, tuple[Timing, Timing]]:
    """Timings of a whole sampling by theirs and by ours, in turn.

    Raises:
        ValueError: a result differs.
    """
    made = list(rows(shape))
    if failures := [failure for failure in map(difference, made) if failure is not None]:
        raise ValueError("; ".join(failures))
    functions = {(row.name, whose): getattr(row, whose) for row in made for whose in ("theirs", "ours")}
    timings = in_turn(functions, seconds, 3)
    return {row.name: (timings[row.name, "theirs"], timings[row.name, "ours"]) for row in made}


def table(found: dict[str, tuple[Timing, Timing]]) -> str:
    """Microseconds of a step, median and quartiles, and ours over theirs."""

    def cell(timing: Timing) -> str:
        median, low, high = (seconds / STEPS * 1e6 for seconds in timing[:3])
        return f"{median:.1f} ({low:.1f} to {high:.1f})"

    lines = ((name, cell(a), cell(b), f"{b.median / a.median:.2f}") for name, (a, b) in found.items())
    return markdown(("us a step", "theirs", "ours", "ours / theirs"), lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.integrations", description="a step of each integration")
    parser.add_argument("--seconds", type=float, default=30, help="for all measurements together")
    parser.add_argument("--shape", type=int, nargs="+", default=POLICY)
    given = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        print(table(measured(tuple(given.shape), given.seconds)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
