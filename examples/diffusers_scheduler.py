"""diffusers: its flow-matching Euler scheduler, replaced by one line; the loop that a pipeline runs, the same bits."""

import diffusers
import torch

from flowmatch_kernels.integrations.diffusers import FlowMatchEulerDiscreteScheduler


def denoise(scheduler, noise):
    """What a pipeline does with its scheduler; the lambda stands for the transformer."""
    transformer = lambda latents, timestep: torch.sin(3 * latents) * timestep / 1000
    scheduler.set_timesteps(20)
    latents = noise
    for timestep in scheduler.timesteps:
        latents = scheduler.step(transformer(latents, timestep), timestep, latents, return_dict=False)[0]
    return latents


noise = torch.randn(1, 16, 64, 64)
scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)  # pipe.scheduler
theirs = denoise(scheduler, noise)
scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)  # the one line
assert torch.equal(denoise(scheduler, noise), theirs)
print("the bits of diffusers' scheduler")
