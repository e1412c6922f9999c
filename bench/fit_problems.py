"""Problems to fit solvers to: a mixture, a rotation, a pendulum, and digits with a small network."""

import math

import torch
from torch import nn

GUIDANCE = {"use_classifier_free_guidance": True, "guidance_form": "from_unguided", "inference_guidance_weight": 2.5}
"""Of the digits: u + 2.5 * (c - u)."""


def noise(count, *dims, seed=99):
    """Noise that no fit has seen: a fit draws with seed 0."""
    return torch.randn(count, *dims, generator=torch.Generator().manual_seed(seed))


def mixture(x, t):
    """The exact velocity to eight narrow Gaussian modes in the plane; stiff near t = 1.

    The modes lie irregularly, so that Euler's samples end at wrong ones.
    """
    modes = 2 * torch.randn(8, 2, generator=torch.Generator().manual_seed(2))
    sigma = 0.1
    variance = (1 - t) ** 2 + (t * sigma) ** 2
    d = x[:, None, :] - t[:, :, None] * modes
    weight = torch.softmax(-(d**2).sum(-1) / (2 * variance), 1)
    drift = (t * sigma**2 - (1 - t)) / variance
    return (weight[:, :, None] * (modes + drift[:, :, None] * d)).sum(1)


def rotation(x, t):
    """A turn by 180 degrees: linear, and fixed multistep solvers are at their weakest with few steps."""
    return math.pi * torch.stack([-x[:, 1], x[:, 0]], 1)


def pendulum(x, t):
    """A damped pendulum of (angle, speed), driven: neither linear nor autonomous."""
    angle, speed = 3 * x[:, :1], x[:, 1:]
    return torch.cat([speed, -4 * torch.sin(angle) - 0.5 * speed + torch.cos(6 * t)], 1)


class DigitNetwork(nn.Module):
    """v(x, t, class) of 8x8 digits; class 10 is none."""

    def __init__(self, width=192):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, 9) * (math.pi / 2))
        self.label = nn.Embedding(11, 32)
        self.enter = nn.Linear(64 + 16 + 32, width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.leave = nn.Linear(width, 64)

    def forward(self, x, t, label):
        phase = t.flatten(1) * self.frequencies
        hidden = nn.functional.silu(self.enter(torch.cat([x, phase.sin(), phase.cos(), self.label(label)], 1)))
        for layer in self.inner:
            hidden = hidden + nn.functional.silu(layer(hidden))
        return self.leave(hidden)


def digit_network(steps=1200, batch=256):
    """Trained on scikit-learn's digits, with the class dropped for a tenth of the samples."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DigitNetwork()
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
        for _ in range(steps):
            chosen = torch.randint(len(images), (batch,))
            x1, label = images[chosen], labels[chosen].where(torch.rand(batch) > 0.1, 10)
            t, x0 = torch.rand(batch, 1), torch.randn(batch, 64)
            loss = (network(t * x1 + (1 - t) * x0, t, label) - (x1 - x0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def digit_models(network, classes, count):
    """step_fn and unguided_step_fn for `count` samples, which go through the classes."""
    label = torch.tensor(classes).repeat(-(-count // len(classes)))[:count]
    none = torch.full((count,), 10)
    return {
        "step_fn": lambda x, t: network(x, t, label),
        "unguided_step_fn": lambda x, t: network(x, t, none),
    }
