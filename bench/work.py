"""What is sampled, and which of it a run covers.

The whole cross product would take hours. A full run covers each axis from one base point (float32, ten steps, a free
step_fn, the noise passed in):

- every shape with every task;
- every shape, final and guided, with a bfloat16 velocity;
- 1, 5, 20 and 50 steps, final, for one small and one large state;
- a small real network, final, trajectory and midpoint, for the three shapes such a network suits;
- own time grids, one of each sample among them, a FlowMatching built for each call, and the package without its
  extension: Alpamayo's shape, final;
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
OF_SAMPLES = "tensor of each sample"  # [B, N + 1]
GRIDS = (
    "tensor",
    "new tensor",
    "list",
    OF_SAMPLES,
)  # how a time grid of one's own is passed: one tensor, one a call, floats


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
    grid: str = ""
    """Of `GRIDS`: the time grid is passed in, from 1 to 0 as in lerobot; else it is the uniform one from 0 to 1."""
    step_sizes: bool = False
    """The dt of each step is passed in too, in the form of the grid."""
    built: bool = False
    """Ours builds its FlowMatching in each call; else it is built once."""
    extension: bool = True
    """Ours has its C++ extension; else the work is done by a process in which it cannot be imported."""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Work:
        """The work of what `json` returned, with or without more entries."""
        known = {name: row[name] for name in cls._fields if name in row}
        return cls(**known | {"shape": tuple(row["shape"]), "velocity": getattr(torch, row["velocity"])})

    @property
    def special(self) -> bool:
        """About ours alone, or its arguments: held against the loops that people write, not against every peer."""
        return bool(self.grid) or self.built or not self.extension

    @property
    def of_samples(self) -> bool:
        """Each sample has times of its own."""
        return self.grid == OF_SAMPLES

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
        return self.title([str(list(self.shape)), self.task], f"{self.steps} step{'s' * (self.steps > 1)}")

    def title(self, parts: list[str], steps: str = "") -> str:
        """These parts, how many steps where they are not ten, and what else is special."""
        parts = parts + [steps] * (self.steps != 10 and bool(steps))
        if self.velocity != torch.float32:
            parts.append(str(self.velocity).removeprefix("torch.") + " velocity")
        parts += ["network"] * self.network + ["noise drawn"] * self.drawn
        if self.grid:
            parts.append(f"time_steps{'= and step_sizes' * self.step_sizes}= a {self.grid}")
        parts += ["FlowMatching built"] * self.built + ["without the extension"] * (not self.extension)
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
        own = torch.linspace(1.0, 0.0, work.steps + 1)
        if work.of_samples:
            own = own ** torch.linspace(0.8, 1.6, work.shape[0]).view(-1, 1)
        self.time_steps: Tensor | list[float] | None = _passed(own, work.grid) if work.grid else None
        self.step_sizes = _passed(torch.diff(own), work.grid) if work.step_sizes else None
        v, u = random(work.velocity), random(work.velocity)
        self.step_fn: Callable[..., Tensor] = lambda x, t: v
        self.unguided_step_fn: Callable[..., Tensor] = lambda x, t: u
        if work.network:
            self.step_fn = network(work.shape[1:], device)

    def start(self) -> Tensor:
        """The first state, not to be written to: the noise that was passed in, or a draw."""
        return torch.randn(self.work.shape, device=self.device) if self.noise is None else self.noise

    def times(self) -> Tensor | list[float] | None:
        """The time grid as sample() is given it."""
        return self.time_steps.clone() if self.work.grid == "new tensor" else self.time_steps

    def grid(self) -> Tensor:
        """The time grid as a loop reads it."""
        if self.time_steps is None:
            return torch.linspace(0.0, 1.0, self.work.steps + 1, device=self.device)
        return torch.as_tensor(self.times(), device=self.device)

    def own(self) -> Tensor:
        """The first state, to be written to."""
        return self.start() if self.noise is None else self.noise.clone()


def _passed(entries: Tensor, grid: str) -> Tensor | list[float]:
    """In the form that a grid of one's own takes. The floats are float32's, so that all forms mean the same dt."""
    return entries.tolist() if grid == "list" else entries


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
    whole: bool = True
    """False: some of the works were chosen, and nothing else is measured."""


def ours(shape: tuple[int, ...]) -> list[Work]:
    """What is about ours alone, or its arguments."""
    grids = [Work(shape, grid=grid) for grid in GRIDS]
    grids += [Work(shape, grid=grid, step_sizes=True) for grid in ("tensor", "list")]
    return [*grids, Work(shape, built=True), Work(shape, extension=False)]


def full() -> Plan:
    """Under ten minutes on two cores."""
    shapes = (ALPAMAYO, POLICY, IMAGES, LATENTS, VIDEO)
    works = [Work(shape, task) for task in TASKS for shape in shapes]
    works += [Work(shape, task, velocity=torch.bfloat16) for task in ("final", "guided") for shape in shapes]
    works += [Work(shape, steps=steps) for shape in (ALPAMAYO, LATENTS) for steps in (1, 5, 20, 50)]
    networks = (ALPAMAYO, POLICY, IMAGES)
    works += [Work(shape, task, network=True) for task in ("final", "trajectory", "midpoint") for shape in networks]
    works += [Work(ALPAMAYO, drawn=True), *ours(ALPAMAYO)]
    compiled = [Work(shape, task) for shape in (ALPAMAYO, VIDEO) for task in ("final", "trajectory", "guided")]
    compiled.append(Work(ALPAMAYO, network=True))
    return Plan(works, compiled, ALPAMAYO, VIDEO, 1 << 22, (1, 10, 100, 1000), seconds=2.0, least_runs=5)


def quick() -> Plan:
    """Every path of a full run but the compiler's, in seconds, on small states: its times say nothing."""
    small, large = ALPAMAYO, (2, 4, 3, 10, 13)
    works = [Work(shape, task) for task in TASKS for shape in (small, large)]
    works += [Work(small, task, velocity=torch.bfloat16) for task in ("final", "guided")]
    works += [Work(small, steps=3), Work(small, network=True), Work((2, 3, 8, 8), "midpoint", network=True)]
    works += [Work(small, drawn=True), *ours(small)]
    return Plan(works, [], small, large, 1 << 14, (1, 5, 10), seconds=0.0, least_runs=3)
