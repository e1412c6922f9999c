"""What is sampled, and which of it a run covers.

The whole cross product would take hours. A full run covers each axis from one base point (float32, ten steps, a free
step_fn, the noise passed in):

- every shape with every task;
- every shape, final and guided, with a bfloat16 velocity;
- 1, 5, 20 and 50 steps, final, for one small and one large state;
- a small real network, final, trajectory and midpoint, for the three shapes such a network suits;
- torch.compile, which takes longer to compile than all of the rest takes to run: the smallest and the largest shape,
  final, trajectory and guided; and one real network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALPAMAYO = (6, 64, 2)
POLICY = (1, 50, 32)
IMAGES = (64, 3, 32, 32)
LATENTS = (4, 16, 128, 128)
VIDEO = (2, 16, 21, 60, 104)

TASKS = ("final", "trajectory", "guided", "guided trajectory", "midpoint", "rk4")
STAGES = {"midpoint": 2, "rk4": 4}  # evaluations a step; one for all others, which are Euler's
WEIGHT = 1.5  # of guidance


class Work(NamedTuple):
    """One thing to sample."""

    shape: tuple[int, ...]
    """[B, *x_dims]."""
    task: str = "final"
    steps: int = 10
    velocity: torch.dtype = torch.float32
    """What step_fn returns; the state is float32."""
    network: bool = False
    """step_fn is a small network; else it is free: it returns one and the same tensor."""
    drawn: bool = False
    """The noise is drawn within the call; else it is passed in."""

    @property
    def trajectory(self) -> bool:
        """All states are kept."""
        return "trajectory" in self.task

    @property
    def guided(self) -> bool:
        """Two velocities are combined."""
        return "guided" in self.task

    @property
    def evaluations(self) -> int:
        """Calls of step_fn."""
        return self.steps * STAGES.get(self.task, 1)

    @property
    def state_bytes(self) -> int:
        """Bytes of one state."""
        return 4 * math.prod(self.shape)

    @property
    def step_bytes(self) -> int:
        """The least bytes that an Euler step moves: state read and written, velocities read, slot written."""
        return math.prod(self.shape) * (4 * (2 + self.trajectory) + self.velocity.itemsize * (1 + self.guided))

    def __str__(self) -> str:
        parts = [str(list(self.shape)), self.task]
        if self.steps != 10:
            parts.append(f"{self.steps} step{'s' * (self.steps > 1)}")
        if self.velocity != torch.float32:
            parts.append(str(self.velocity).removeprefix("torch.") + " velocity")
        parts += ["network"] * self.network + ["noise drawn"] * self.drawn
        return ", ".join(parts)

    def json(self) -> dict[str, Any]:
        """As the results hold it."""
        velocity = str(self.velocity).removeprefix("torch.")
        return self._asdict() | {"shape": list(self.shape), "velocity": velocity}


class Problem:
    """A work's tensors and functions on a device."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        generator = torch.Generator().manual_seed(0)

        def random(dtype: torch.dtype) -> Tensor:
            return torch.randn(work.shape, generator=generator).to(device, dtype)

        self.noise = None if work.drawn else random(torch.float32)
        v, u = random(work.velocity), random(work.velocity)
        self.step_fn: Callable[..., Tensor] = lambda x, t: v
        self.unguided_step_fn: Callable[..., Tensor] = lambda x, t: u
        if work.network:
            self.step_fn = network(work.shape[1:], device)

    def start(self) -> Tensor:
        """The first state, not to be written to: the noise that was passed in, or a draw."""
        return torch.randn(self.work.shape, device=self.device) if self.noise is None else self.noise

    def own(self) -> Tensor:
        """The first state, to be written to."""
        return self.start() if self.noise is None else self.noise.clone()


def network(x_dims: tuple[int, ...], device: torch.device) -> Callable[..., Tensor]:
    """A velocity field with random weights: convolutions for images [C, H, W], else a perceptron on the flat state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if len(x_dims) == 3:
            channels = x_dims[0]
            layers = torch.nn.Sequential(
                torch.nn.Conv2d(channels + 1, 16, 3, padding=1),
                torch.nn.SiLU(),
                torch.nn.Conv2d(16, channels, 3, padding=1),
            )
        else:
            size = math.prod(x_dims)
            layers = torch.nn.Sequential(torch.nn.Linear(size + 1, 256), torch.nn.SiLU(), torch.nn.Linear(256, size))
    layers = layers.to(device).requires_grad_(False)

    def step_fn(x: Tensor, t: Tensor) -> Tensor:  # t: [B, 1, ..., 1], or a number as a tensor
        if len(x_dims) == 3:
            return layers(torch.cat([x, t.expand(x.shape[0], 1, *x_dims[1:])], dim=1))
        flat = torch.cat([x.flatten(1), t.reshape(-1, 1).expand(x.shape[0], 1)], dim=1)
        return layers(flat).view(x.shape)

    return step_fn


class Plan(NamedTuple):
    """What a run covers."""

    works: list[Work]
    compiled: list[Work]
    """Those of the works for which torch.compile takes part."""
    small: tuple[int, ...]
    """The shape of the targets' small state."""
    large: tuple[int, ...]
    """The shape of the targets' large state."""
    triad: int
    """Floats of the one fused step that is held against a triad."""
    steps: tuple[int, ...]
    """Steps at which the cost per step is taken."""
    seconds: float
    """Spent on each work, once each contestant has had its least runs; three times as long on what targets name."""
    least_runs: int

    def targeted(self, work: Work) -> bool:
        """Whether a target is a ratio of this work's times."""
        return work.drawn or work in [
            Work(shape, task) for shape in (self.small, self.large) for task in ("final", "trajectory", "guided")
        ]


def full() -> Plan:
    """Under ten minutes on two cores."""
    shapes = (ALPAMAYO, POLICY, IMAGES, LATENTS, VIDEO)
    works = [Work(shape, task) for task in TASKS for shape in shapes]
    works += [Work(shape, task, velocity=torch.bfloat16) for task in ("final", "guided") for shape in shapes]
    works += [Work(shape, steps=steps) for shape in (ALPAMAYO, LATENTS) for steps in (1, 5, 20, 50)]
    networks = (ALPAMAYO, POLICY, IMAGES)
    works += [Work(shape, task, network=True) for task in ("final", "trajectory", "midpoint") for shape in networks]
    works.append(Work(ALPAMAYO, drawn=True))
    compiled = [Work(shape, task) for shape in (ALPAMAYO, VIDEO) for task in ("final", "trajectory", "guided")]
    compiled.append(Work(ALPAMAYO, network=True))
    return Plan(works, compiled, ALPAMAYO, VIDEO, 1 << 22, (1, 10, 100, 1000), seconds=2.0, least_runs=5)


def quick() -> Plan:
    """Every path of a full run but the compiler's, in seconds, on small states: its times say nothing."""
    small, large = ALPAMAYO, (2, 4, 3, 10, 13)
    works = [Work(shape, task) for task in TASKS for shape in (small, large)]
    works += [Work(small, task, velocity=torch.bfloat16) for task in ("final", "guided")]
    works += [Work(small, steps=3), Work(small, network=True), Work((2, 3, 8, 8), "midpoint", network=True)]
    works.append(Work(small, drawn=True))
    return Plan(works, [], small, large, 1 << 14, (1, 5, 10), seconds=0.0, least_runs=3)
