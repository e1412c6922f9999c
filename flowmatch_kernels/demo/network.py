"""A small network, and its training."""

from __future__ import annotations

import copy
import math
import time

import torch
from torch import Tensor, nn

from .. import DDIM, DDPM, FlowMatching
from .timing import now

BATCH_SIZE = 256
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.01
AVERAGE_DECAY = 0.999


class VelocityNetwork(nn.Module):
    """A residual MLP v(x, t) over flattened states, with the time in every block.

    It predicts a velocity, or what else it is trained to predict.

    Args:
        x_dims: The shape of one state.
        width: Of the residual stream.
        blocks: How many residual blocks.
        last_time: Where the times end: 1 for flow matching, the number of training timesteps for diffusion.
    """

    FREQUENCIES = 16
    TIME_WIDTH = 64

    def __init__(self, x_dims: tuple[int, ...], width: int = 256, blocks: int = 4, last_time: float = 1.0) -> None:
        super().__init__()
        entries = math.prod(x_dims)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.arange(1, self.FREQUENCIES + 1) * (math.pi / 2) / last_time)
        self.time = nn.Sequential(
            nn.Linear(2 * self.FREQUENCIES, self.TIME_WIDTH),
            nn.SiLU(),
            nn.Linear(self.TIME_WIDTH, self.TIME_WIDTH),
            nn.SiLU(),
        )
        self.enter = nn.Linear(entries, width)
        self.blocks = nn.ModuleList(Block(width, self.TIME_WIDTH) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, entries))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity [B, *x_dims] at states x [B, *x_dims] and times t [B, 1, ..., 1]."""
        phase = t.flatten(1) * self.frequencies
        time = self.time(torch.cat([phase.sin(), phase.cos()], dim=1))
        hidden = self.enter(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, time)
        velocity: Tensor = self.leave(hidden)
        return velocity.view_as(x)


class Block(nn.Module):
    """h + B silu(A((1 + scale(t)) * norm(h) + shift(t))), the identity at the start of training."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulate = nn.Linear(time_width, 2 * width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        for layer in (self.modulate, self.down):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        """The stream [B, width] after this block; time: [B, time_width]."""
        scale, shift = self.modulate(time).chunk(2, dim=1)
        inner = nn.functional.silu(self.up(self.norm(hidden) * (1 + scale) + shift))
        changed: Tensor = hidden + self.down(inner)
        return changed


def train(
    method: FlowMatching | DDIM | DDPM,
    network: VelocityNetwork,
    states: Tensor,
    steps: int,
    seconds: float,
    *,
    progress_bar: bool = True,
) -> tuple[VelocityNetwork, int]:
    """Trains the network in place: AdamW, warm-up and cosine learning rate, a progress bar.

    The learning rate follows the steps, or the clock where that is ahead, so that training that has to
    stop early is annealed as well. Only training that ends by its steps can be repeated to the bit.

    Args:
        method: Makes the training pairs and the loss.
        network: On the device of `states`.
        states: The training set, [N, *x_dims].
        steps: Optimizer steps, each on 256 states drawn with replacement.
        seconds: After which training stops, if the steps take longer; one step is always taken.
        progress_bar: Whether it is shown.

    Returns:
        A network with the exponential moving average of the weights, frozen, in eval mode; the steps taken.
    """
    from tqdm.auto import tqdm

    average = copy.deepcopy(network).eval().requires_grad_(False)
    weights: list[Tensor] = list(network.parameters())
    averages: list[Tensor] = list(average.parameters())
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    started = time.perf_counter()
    taken = 0
    shown = None  # the loss on the bar: a moving average, read seldom, since reading it waits for the GPU
    with tqdm(range(steps), desc="training", unit="step", disable=not progress_bar) as bar:
        for step in bar:
            progress = max(step / steps, (time.perf_counter() - started) / seconds)
            if step and progress >= 1:
                break
            annealed = (1 + math.cos(math.pi * min(progress, 1))) / 2
            rate = PEAK_LEARNING_RATE * min(1, (step + 1) / WARM_UP_STEPS) * annealed
            optimizer.param_groups[0]["lr"] = rate
            batch = states[torch.randint(len(states), (BATCH_SIZE,), device=states.device)]
            pair = method.construct_training_data(batch)
            loss = method.compute_loss_from_pred(pair, network(pair["noisy_x"], pair["timesteps"]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay = min(AVERAGE_DECAY, (step + 1) / (step + 10))  # early weights are forgotten fast
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - decay)
            taken = step + 1
            shown = loss.detach() if shown is None else torch.lerp(shown, loss.detach(), 0.02)
            if step % 50 == 0 or taken == steps:
                bar.set_postfix(loss=f"{float(shown):.3f}")
    return average, taken


def step_seconds(flow_matching: FlowMatching, states: Tensor, seconds: float) -> float:
    """The seconds that one training step takes, measured for about `seconds` on a network that is thrown away.

    Draws random numbers: seed afterwards.

    Args:
        flow_matching: As for `train`.
        states: The training set, on the device to train on.
        seconds: To measure for.
    """
    network = VelocityNetwork(tuple(states.shape[1:])).to(states.device)
    train(flow_matching, network, states, 5, seconds, progress_bar=False)  # the first steps allocate and load
    began = now(states.device)
    _, taken = train(flow_matching, network, states, 1_000_000, seconds, progress_bar=False)
    return (now(states.device) - began) / taken
