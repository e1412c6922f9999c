"""Classifier-free guidance: two models, one model that returns both velocities, and guidance in the middle only."""

import torch

from flowmatch_kernels import FlowMatching


def guided(*, x, t):
    """The model with its condition."""
    return 1 - x


def unguided(*, x, t):
    """The model without."""
    return -x


def both(*, x, t):
    """One call for both, [2 * B, 64, 2]."""
    return torch.cat([unguided(x=x, t=t), guided(x=x, t=t)])


fm = FlowMatching((64, 2), use_classifier_free_guidance=True, inference_guidance_weight=1.5)
noise = torch.randn(6, 64, 2)
two_calls = fm.sample(6, guided, unguided_step_fn=unguided, noise=noise)
one_call = fm.sample(6, both, combined_guidance=True, noise=noise)
assert torch.equal(two_calls, one_call)

in_the_middle = fm.sample(
    6,
    guided,
    unguided_step_fn=unguided,
    noise=noise,
    skip_irrelevant_model=True,
    inference_guidance_weight=lambda t: 3.0 if 0.2 < t < 0.8 else 1.0,
)
print(f"means: guided {two_calls.mean():.3f}, guided in the middle only {in_the_middle.mean():.3f}")
