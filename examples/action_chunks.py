"""Real-time chunking: the first actions of a chunk are under way, and the rest is sampled around them."""

import torch

from flowmatch_kernels import FlowMatching, inpaint

torch.manual_seed(0)
horizon, action_dim, under_way = 50, 7, 10
policy = torch.nn.Linear(action_dim, action_dim)


def step_fn(*, x, t):
    """The policy's velocity, data - noise, with its observation closed over."""
    return torch.tanh(policy(x)) - t * x


fm = FlowMatching((horizon, action_dim), num_inference_steps=10)
previous = fm.sample(1, step_fn)

fixed = (torch.arange(horizon) < under_way).view(horizon, 1)
plan = torch.roll(previous, -20, dims=1)  # what was planned for now, 20 actions later
noise = torch.randn(1, horizon, action_dim)
chunk = fm.sample(1, step_fn, noise=noise, constraint=inpaint(plan, fixed, noise))
assert torch.equal(chunk[:, :under_way], plan[:, :under_way])

stopped = fm.sample(1, step_fn, noise=noise, callback=lambda step, t, x: step == 4)  # no time for more
print(f"{under_way} of {horizon} actions kept; a sample that was stopped is at t = {stopped.time_steps[-1]:.1f}")
