"""Predictions other than the velocity: the same solver, with other columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .stages import Earlier, Segment, Stage, part


def predicting(segments: list[Segment], end: int, grids: Sequence[Sequence[float]]) -> list[Segment]:
    """The same solver for a step_fn that predicts the state p at one end of time, instead of the velocity.

    v = (p - x) / (end - t) is linear in p and x, and so is each x a solver evaluates at; so only columns
    change. An evaluation then remembers p + c*base, with a c that takes up as much of x as it can.

    Args:
        segments: The solver's, for a velocity.
        end: The end of time.
        grids: The time grids, [T], as far as their values can be read.

    Raises:
        ValueError: an evaluation is at `end`, where p says nothing of the velocity.
    """
    entries = next((grid for grid in grids for segment in segments if end in segment.evaluated(grid)), None)
    if entries is not None:
        noise_at = segments[0].steps.noise_at
        way_out = f"pass time_steps that keep away from t = {end}, as linspace(1e-3, 1 - 1e-3, N + 1) does"
        if entries[0] == end and end != noise_at:
            way_out = f"the time grid begins there, and noise_at={noise_at} is its other end"
        elif end != noise_at:
            way_out += (
                ", or use a solver that does not evaluate at a step's end (euler, midpoint, ab2, dpmpp_2m, unipc)"
            )
            way_out += ", or euler_at_final=True"
        raise ValueError(
            f"what step_fn predicts stands at t = {end} and says nothing of the velocity there, where this "
            f"solver evaluates: {way_out}"
        )
    if not segments:
        return []
    # 1 / (end - t) at each step's first stage, for what earlier steps have remembered.
    firsts = torch.cat([1 / (end - segment.stages[0].time.double()) for segment in segments])
    return [_predicting(segment, end, firsts) for segment in segments]


_Combination = dict[tuple[int, int], Tensor]  # (stage, steps ago) -> coefficient of what is remembered there


def _predicting(segment: Segment, end: int, firsts: Tensor) -> Segment:
    steps = segment.steps
    one = torch.ones_like(steps.h)
    x: _Combination
    x_base, x = one, {}  # the state to evaluate at, in base and what is remembered
    velocities: dict[tuple[int, int], _Combination] = {}
    stages = []
    for k, stage in enumerate(segment.stages):
        alpha = 1 / (end - stage.time.double())  # v = alpha*p - alpha*x
        base = stage.a * one - stage.b0 * alpha * x_base
        terms = {key: -stage.b0 * alpha * coefficient for key, coefficient in x.items()}
        for earlier in stage.earlier:
            key = earlier.stage, earlier.ago
            if earlier.ago:
                if earlier.stage:
                    raise NotImplementedError("a prediction, and a solver that reads an earlier step's later stages")
                before = steps.first - earlier.ago
                velocities[key] = {key: part(firsts, before, before + steps.n)}
            for other, coefficient in velocities[key].items():
                terms[other] = terms.get(other, 0) + earlier.b * coefficient
        c = (stage.c - alpha * x_base) / alpha
        stages.append(
            Stage(
                stage.time,
                stage.b0 * alpha,
                tuple(Earlier(b, *key) for key, b in terms.items()),
                a=base,
                c=c,
                noise=stage.noise,
            )
        )
        velocities[k, 0] = {(k, 0): alpha} | {key: -alpha * coefficient for key, coefficient in x.items()}
        x_base, x = base - stage.b0 * alpha * c, terms | {(k, 0): stage.b0 * alpha}
    return Segment(steps, tuple(stages))
