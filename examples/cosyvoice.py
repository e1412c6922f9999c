"""CosyVoice: its Euler steps on a cosine grid, both velocities from one batch of two halves, as one launch a step.

    python examples/cosyvoice.py

CosyVoice's batch holds the guided half first, cat([guided, unguided]), and it combines (1 + r)*guided - r*unguided. The
bits are those of its loop: tests/test_examples.py compares them. The network is a stand-in with random weights.

Source: CosyVoice, arXiv 2407.05407, section 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowmatch_kernels import FlowMatching

Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]


def time_grid(steps: int) -> Tensor:
    """1 - cos(pi/2 * t), [N + 1]: more steps near the noise.

    CosyVoice sums its time up from the steps; in float32 that gives the same times and steps for each N that is used.
    """
    return 1 - torch.cos(torch.linspace(0, 1, steps + 1) * 0.5 * torch.pi)


def sample(estimator: Estimator, noise: Tensor, mu: Tensor, steps: int = 10, rate: float = 0.7) -> Tensor:
    """Mel frames, [B, mels, T]; `estimator(x, mu, t)` takes t as [2 * B] and mu, the condition, as x."""
    fm = FlowMatching(
        noise.shape[1:],
        use_classifier_free_guidance=True,
        guidance_form="extrapolate",
        inference_guidance_weight=rate,
    )
    batch = noise.shape[0]
    both_mu = torch.cat([mu, torch.zeros_like(mu)])  # guided first

    def both(x: Tensor, t: Tensor) -> Tensor:
        return estimator(torch.cat([x, x]), both_mu, t.reshape(batch).repeat(2))

    return fm.sample(batch, both, combined_guidance="guided_first", noise=noise, time_steps=time_grid(steps))


def stand_in(mels: int, seed: int = 0) -> Estimator:
    """An estimator's place: one layer with random weights."""
    random = torch.Generator().manual_seed(seed)
    w, w_mu = (torch.randn(mels, mels, generator=random) / math.sqrt(mels) for _ in range(2))
    return lambda x, mu, t: torch.tanh(w @ x + w_mu @ mu + t[:, None, None])


if __name__ == "__main__":
    torch.manual_seed(0)
    mel = sample(stand_in(80), torch.randn(1, 80, 50), torch.randn(1, 80, 50))
    print(f"{list(mel.shape)}, mean {mel.mean():.4f}, deviation {mel.std():.4f}")
