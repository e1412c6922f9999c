"""F5-TTS: its Euler steps on the sway grid, with guidance, as one launch a step.

    python examples/f5_tts.py

F5-TTS calls torchdiffeq's odeint with a velocity that calls its transformer twice, with the condition and without, and
combines both; here guidance is part of the step. The bits are those of that loop: tests/test_examples.py compares them.
The network is a stand-in with random weights.

Source: F5-TTS, arXiv 2410.06885, sections 3.2 (sway sampling) and 4 (guidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowmatch_kernels import FlowMatching, StepFunction

Transformer = Callable[..., Tensor]


def sway(steps: int, coefficient: float = -1.0) -> Tensor:
    """The time grid t + s*(cos(pi/2*t) - 1 + t): more steps near the noise for s < 0."""
    t = torch.linspace(0, 1, steps + 1)
    return t + coefficient * (torch.cos(torch.pi / 2 * t) - 1 + t)


def sample(
    transformer: Transformer, noise: Tensor, cond: Tensor, steps: int = 32, strength: float = 2.0, sway_by: float = -1.0
) -> Tensor:
    """Mel frames, [B, T, mels]; `transformer(x=, cond=, time=, drop=)` takes time as a 0-dim tensor."""
    fm = FlowMatching(
        noise.shape[1:],
        use_classifier_free_guidance=True,
        guidance_form="from_guided",  # pred + strength * (pred - null_pred)
        inference_guidance_weight=strength,
    )

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return transformer(x=x, cond=cond, time=t, drop=False)

    def unguided(x: Tensor, t: Tensor) -> Tensor:
        return transformer(x=x, cond=cond, time=t, drop=True)

    return fm.sample(
        noise.shape[0],
        StepFunction(guided, time_as="scalar"),
        unguided_step_fn=StepFunction(unguided, time_as="scalar"),
        noise=noise,
        time_steps=sway(steps, sway_by),
    )


def stand_in(mels: int, seed: int = 0) -> Transformer:
    """A transformer's place: one layer with random weights."""
    random = torch.Generator().manual_seed(seed)
    w, w_cond = (torch.randn(mels, mels, generator=random) / math.sqrt(mels) for _ in range(2))

    def transformer(x: Tensor, cond: Tensor, time: Tensor, drop: bool) -> Tensor:
        return torch.tanh(x @ w + (0 if drop else cond @ w_cond) + time)

    return transformer


if __name__ == "__main__":
    torch.manual_seed(0)
    mel = sample(stand_in(100), torch.randn(1, 40, 100), torch.randn(1, 40, 100))
    print(f"{list(mel.shape)}, mean {mel.mean():.4f}, deviation {mel.std():.4f}")
