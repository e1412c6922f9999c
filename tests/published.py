"""The published code that this package must equal to the last bit, written out: the tests' oracle.

Knows nothing of the package. The loop is Alpamayo's (R1, 1.5 and 2), as numerics.md gives it.
"""

import torch


@torch.no_grad()
def sample(
    batch_size,
    step_fn,
    x_dims,
    steps,
    *,
    return_all_steps=False,
    unguided_step_fn=None,
    weight=1.0,
    noise=None,
    temperature=None,
    device="cpu",
):
    """Euler on linspace(0, 1): `[B, *x_dims]`, or `([B, steps + 1, *x_dims], [steps + 1])`."""
    x = torch.randn(batch_size, *x_dims, device=device) if noise is None else noise.clone()
    if temperature is not None:
        x = x * temperature
    time_steps = torch.linspace(0.0, 1.0, steps + 1, device=device)
    ones = [1] * len(x_dims)
    states = [x]
    for i in range(steps):
        dt = (time_steps[i + 1] - time_steps[i]).view(1, *ones).expand(batch_size, *ones)
        t = time_steps[i].view(1, *ones).expand(batch_size, *ones)
        v = step_fn(x=x, t=t)
        if unguided_step_fn is not None:
            u = unguided_step_fn(x=x, t=t)
            v = (1 - weight) * u + weight * v
        x = x + dt * v
        states.append(x)
    return (torch.stack(states, dim=1), time_steps) if return_all_steps else x


@torch.no_grad()
def sample_on_grid(step_fn, noise, time_steps, step_sizes=None):
    """Euler on a user's grid. Differences in the grid's dtype, rounded to the state's arithmetic last.

    `step_sizes`, Python floats, takes the place of the differences, and is multiplied as a Python float.
    """
    x, ones = noise.clone(), [1] * (noise.dim() - 1)
    states = [x]
    for i in range(len(time_steps) - 1):
        t = time_steps[i].view(1, *ones).expand(x.shape[0], *ones)
        if step_sizes is None:
            dt = (time_steps[i + 1] - time_steps[i]).to(torch.promote_types(x.dtype, torch.float32))
            x = (x + dt.view(1, *ones) * step_fn(x=x, t=t)).to(x.dtype)
        else:
            x = x + step_sizes[i] * step_fn(x=x, t=t)
        states.append(x)
    return torch.stack(states, dim=1)


class Training:
    """Alpamayo's training pair, of R1 and 2. Draws from the default generators in this order: t, noise.

    With a rate, as a published variant has it: then dropped guidance.
    """

    def __init__(self, sampler="beta", rate=None):
        self.sampler = sampler
        self.rate = rate
        self.beta_dist = torch.distributions.Beta(
            torch.tensor(1.5, dtype=torch.float32), torch.tensor(1.0, dtype=torch.float32)
        )

    def construct_training_data(self, x):
        batch_size = x.shape[0]
        if self.sampler == "uniform":
            t = torch.rand((batch_size,), device=x.device)
        else:
            t = self.beta_dist.sample((batch_size,)).to(x.device)
            t = 0.999 - t * 0.999
        while t.dim() < x.dim():
            t = t.unsqueeze(-1)
        noise = torch.randn_like(x)
        noisy_x = t * x + (1 - t) * noise
        is_drop_guidance = None
        if self.rate is not None:
            is_drop_guidance = torch.rand(batch_size, device=x.device) < self.rate
        return {
            "x": x,
            "noisy_x": noisy_x,
            "timesteps": t,
            "noise": noise,
            "is_drop_guidance": is_drop_guidance,
        }

    def compute_loss_from_pred(self, training_data, pred):
        x, noise = training_data["x"], training_data["noise"]
        return torch.nn.functional.mse_loss((x - noise).to(pred.dtype), pred)
