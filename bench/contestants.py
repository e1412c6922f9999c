"""Who takes part: each contestant is a function that samples a problem as its users would write it.

Whatever depends on the call is done within it: the time grid, its views, the host's step sizes. What a user does once
is not: a FlowMatching, a compilation. Every function returns the samples [B, *x_dims], or all states
[B, N + 1, *x_dims]; torchdiffeq and flow_matching keep theirs as [N + 1, B, *x_dims], of which they return a view.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowmatch_kernels import FlowMatching, available_backends
from flowmatch_kernels.ops.dispatch import BACKENDS

from . import device_clock
from .work import TASKS, WEIGHT, Problem, Work

# ---- the published loop ----


def update(x: Tensor, dt: Tensor, v: Tensor) -> Tensor:
    """One published step."""
    return x + dt * v


def guided_update(x: Tensor, dt: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """One published step with guidance."""
    return x + dt * ((1 - WEIGHT) * u + WEIGHT * v)


def published(
    p: Problem, update: Callable[..., Tensor] = update, guided: Callable[..., Tensor] = guided_update
) -> Tensor:
    """Alpamayo's loop, its guided form, and its recipes' midpoint; for rk4, torchdiffeq's formula in such a loop.

    Step sizes that are passed in take the place of the grid's differences.
    """
    work, step_fn, unguided_step_fn = p.work, p.step_fn, p.unguided_step_fn
    batch_size, ones = work.shape[0], [1] * (len(work.shape) - 1)
    x = p.start()
    states = [x]
    time_steps = p.grid().T if work.of_samples else p.grid()
    for i in range(work.steps):
        if p.step_sizes is None:
            dt = (time_steps[i + 1] - time_steps[i]).view(-1, *ones).expand(batch_size, *ones)
        else:
            dt = p.step_sizes[i]
        t = time_steps[i].view(-1, *ones).expand(batch_size, *ones)
        v = step_fn(x=x, t=t)
        if work.guided:
            x = guided(x, dt, v, unguided_step_fn(x=x, t=t))
        elif work.task == "midpoint":
            x = x + dt * step_fn(x=x + v * dt / 2, t=t + dt / 2)
        elif work.task == "rk4":
            k2 = step_fn(x=x + dt * v / 3, t=t + dt / 3)
            k3 = step_fn(x=x + dt * (k2 - v / 3), t=t + dt * 2 / 3)
            k4 = step_fn(x=x + dt * (v - k2 + k3), t=t + dt)
            x = x + (v + 3 * (k2 + k3) + k4) * dt * 0.125
        else:
            x = update(x, dt, v)
        if work.trajectory:
            states.append(x)
    return torch.stack(states, dim=1) if work.trajectory else x


# ---- the loops that projects write on grids of their own ----


def float_loop(p: Problem) -> Tensor:
    """As lerobot's policies sample (pi0, smolvla): from 1 to 0, dt and time Python floats, t [B] made for each call.

    It makes its grid itself, of which dt is 1/N for all steps, and has no use for one that is passed in.
    """
    work, x = p.work, p.start()
    dt = -1.0 / work.steps
    for i in range(work.steps):
        t = torch.tensor(1.0 + i * dt, dtype=torch.float32, device=p.device).expand(work.shape[0])
        x = x + dt * p.step_fn(x=x, t=t)
    return x


def scalar_loop(p: Problem) -> Tensor:
    """Over a grid tensor: t and dt are its entries and their differences, 0-dim; or dt is what was passed in."""
    x, grid = p.start(), p.grid()
    for i in range(p.work.steps):
        dt = grid[i + 1] - grid[i] if p.step_sizes is None else p.step_sizes[i]
        x = x + dt * p.step_fn(x=x, t=grid[i])
    return x


def sample_loop(p: Problem) -> Tensor:
    """Over a grid of each sample, [B, N + 1], as users write it."""
    x, grid = p.start(), p.grid()
    ones, dt = [1] * (x.dim() - 1), torch.diff(grid)
    for i in range(p.work.steps):
        x = x + dt[:, i].view(-1, *ones) * p.step_fn(x=x, t=grid[:, i].view(-1, *ones))
    return x


# ---- the best by hand ----


def clock(p: Problem) -> tuple[list[float], tuple[Tensor, ...]]:
    """The step sizes as host floats, without waiting for a device, and t of every step."""
    grid = torch.linspace(0.0, 1.0, p.work.steps + 1)
    dt = [after - before for before, after in pairwise(grid.tolist())]
    if p.device.type != "cpu":
        grid = torch.linspace(0.0, 1.0, p.work.steps + 1, device=p.device)
    ones = [1] * (len(p.work.shape) - 1)
    return dt, grid.view(-1, 1, *ones).expand(-1, p.work.shape[0], *ones).unbind()[:-1]


def by_hand(p: Problem) -> Tensor:
    """A new tensor a step, and the stack."""
    work, x = p.work, p.start()
    states = [x]
    for dt, t in zip(*clock(p), strict=True):
        v = p.step_fn(x=x, t=t)
        if work.guided:
            v = torch.lerp(p.unguided_step_fn(x=x, t=t), v, WEIGHT)
        x = torch.add(x, v, alpha=dt)
        if work.trajectory:
            states.append(x)
    return torch.stack(states, dim=1) if work.trajectory else x


def by_hand_in_place(p: Problem) -> Tensor:
    """One state, written to; with guidance one velocity; slots of the trajectory are copied to."""
    work, step_fn, x = p.work, p.step_fn, p.own()
    states = _slots(p, x) if work.trajectory else None
    guided = torch.empty_like(x, dtype=work.velocity) if work.guided else None
    for i, (dt, t) in enumerate(zip(*clock(p), strict=True), start=1):
        v = step_fn(x=x, t=t)
        if guided is not None:
            v = torch.lerp(p.unguided_step_fn(x=x, t=t), v, WEIGHT, out=guided)
        x.add_(v, alpha=dt)
        if states is not None:
            states[:, i] = x
    return x if states is None else states


def by_hand_two_adds(p: Problem) -> Tensor:
    """Guidance without a buffer: each velocity is added with its share of the weight."""
    x = p.own()
    for dt, t in zip(*clock(p), strict=True):
        v, u = p.step_fn(x=x, t=t), p.unguided_step_fn(x=x, t=t)
        x.add_(u, alpha=dt * (1 - WEIGHT)).add_(v, alpha=dt * WEIGHT)
    return x


def by_hand_out(p: Problem) -> Tensor:
    """Each state is computed into its slot of the trajectory, and read there."""
    work, x = p.work, p.start()
    states = _slots(p, x)
    x, *slots = states.unbind(1)
    guided = torch.empty(work.shape, dtype=work.velocity, device=p.device) if work.guided else None
    for dt, t, slot in zip(*clock(p), slots, strict=True):
        v = p.step_fn(x=x, t=t)
        if guided is not None:
            v = torch.lerp(p.unguided_step_fn(x=x, t=t), v, WEIGHT, out=guided)
        x = torch.add(x, v, alpha=dt, out=slot)
    return states


def by_hand_midpoint(p: Problem) -> Tensor:
    """One state and one middle."""
    x = p.own()
    middle = torch.empty_like(x)
    for dt, t in zip(*clock(p), strict=True):
        torch.add(x, p.step_fn(x=x, t=t), alpha=dt / 2, out=middle)
        x.add_(p.step_fn(x=middle, t=t + dt / 2), alpha=dt)
    return x


def by_hand_rk4(p: Problem) -> Tensor:
    """One state and one stage."""
    x = p.own()
    y = torch.empty_like(x)
    for dt, t in zip(*clock(p), strict=True):
        k1 = p.step_fn(x=x, t=t)
        k2 = p.step_fn(x=torch.add(x, k1, alpha=dt / 3, out=y), t=t + dt / 3)
        k3 = p.step_fn(x=torch.add(x, k1, alpha=-dt / 3, out=y).add_(k2, alpha=dt), t=t + dt * 2 / 3)
        k4 = p.step_fn(x=torch.add(x, k1, alpha=dt, out=y).add_(k2, alpha=-dt).add_(k3, alpha=dt), t=t + dt)
        x.add_(k1, alpha=dt / 8).add_(k2, alpha=dt * 3 / 8).add_(k3, alpha=dt * 3 / 8).add_(k4, alpha=dt / 8)
    return x


def by_hand_same_bits(p: Problem) -> Tensor:
    """The published loop's bits with the fewest launches that eager PyTorch allows."""
    work, x = p.work, p.own()
    product = torch.empty_like(x)
    states = _slots(p, x) if work.trajectory else None
    ones = [1] * (x.dim() - 1)
    grid = torch.linspace(0.0, 1.0, work.steps + 1, device=p.device)
    times = grid.view(-1, 1, *ones).expand(-1, x.shape[0], *ones).unbind()
    for i, dt in enumerate(torch.diff(grid).view(-1, 1, *ones).unbind()):
        v = p.step_fn(x=x, t=times[i])
        if work.guided:
            v = ((1 - WEIGHT) * p.unguided_step_fn(x=x, t=times[i])).add_(WEIGHT * v)
        x.add_(torch.mul(dt, v, out=product))
        if states is not None:
            states[:, i + 1] = x
    return x if states is None else states


def by_hand_of_samples(p: Problem) -> Tensor:
    """With times of each sample: one state, written to, and one launch a step."""
    x, grid = p.own(), p.grid().T
    ones = [1] * (x.dim() - 1)
    times, sizes = (rows.contiguous().view(*rows.shape, *ones).unbind() for rows in (grid, torch.diff(grid, dim=0)))
    for dt, t in zip(sizes, times[:-1], strict=True):
        x.addcmul_(dt, p.step_fn(x=x, t=t))
    return x


def _slots(p: Problem, x: Tensor) -> Tensor:
    states = x.new_empty((x.shape[0], p.work.steps + 1, *x.shape[1:]))
    states[:, 0] = x
    return states


def bare(p: Problem) -> Tensor:
    """What no sampler can leave out: the draw, the grid, and the calls of step_fn. It takes no step."""
    x = p.start()
    ones = [1] * (x.dim() - 1)
    grid = torch.linspace(0.0, 1.0, p.work.steps + 1, device=p.device)
    for t in grid.view(-1, 1, *ones).expand(-1, x.shape[0], *ones).unbind()[:-1]:
        p.step_fn(x=x, t=t)
    return x


# ---- under torch.compile ----


def compiled_update(p: Problem) -> Callable[[], Tensor]:
    """The published loop with its update compiled: one kernel a step."""
    compiled = [torch.compile(function, dynamic=False, fullgraph=True) for function in (update, guided_update)]
    return lambda: published(p, *compiled)


def compiled_loop(p: Problem) -> Callable[[], Tensor]:
    """The whole published loop compiled, step_fn within it.

    Of a free step_fn the compiler sees that the velocity never changes, and makes one pass of all the steps: a bound,
    which no model reaches. With a network the steps stay apart.
    """
    compiled = torch.compile(published, dynamic=False, fullgraph=True)
    return lambda: compiled(p)


# ---- the peers ----


def _velocity(p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """step_fn with its guidance, as a user closes over it."""
    step_fn, unguided_step_fn = p.step_fn, p.unguided_step_fn
    if p.work.guided:
        return lambda t, x: (1 - WEIGHT) * unguided_step_fn(x=x, t=t) + WEIGHT * step_fn(x=x, t=t)
    return lambda t, x: step_fn(x=x, t=t)


def _method(work: Work) -> str:
    return work.task if work.task in ("midpoint", "rk4") else "euler"


def torchdiffeq(p: Problem) -> Callable[[], Tensor]:
    """`odeint` with a fixed grid: of all states on the trajectory's, else from 0 to 1 in steps of 1/N."""
    from torchdiffeq import odeint

    work = p.work

    def sample() -> Tensor:
        if work.trajectory:
            t = torch.linspace(0.0, 1.0, work.steps + 1, device=p.device)
            return odeint(_velocity(p), p.start(), t, method=_method(work)).transpose(0, 1)
        t = torch.tensor([0.0, 1.0], device=p.device)
        return odeint(_velocity(p), p.start(), t, method=_method(work), options={"step_size": 1 / work.steps})[-1]

    return sample


def flow_matching(p: Problem) -> Callable[[], Tensor]:
    """Meta's ODESolver: as for torchdiffeq, which it calls."""
    from flow_matching.solver import ODESolver

    work = p.work

    def sample() -> Tensor:
        velocity = _velocity(p)
        solver = ODESolver(velocity_model=lambda x, t: velocity(t, x))
        if work.trajectory:
            t = torch.linspace(0.0, 1.0, work.steps + 1, device=p.device)
            states = solver.sample(p.start(), None, _method(work), time_grid=t, return_intermediates=True)
            return states.transpose(0, 1)
        return solver.sample(p.start(), 1 / work.steps, _method(work))

    return sample


def diffusers(p: Problem) -> Callable[[], Tensor]:
    """FlowMatchEulerDiscreteScheduler as its pipelines drive it: sigma runs from 1 to 0, a velocity is noise - data.

    The sign of a free step_fn costs nothing: it returns the negative. Guidance is the pipelines', u + w*(v - u).
    """
    import numpy
    from diffusers import FlowMatchEulerDiscreteScheduler

    work, scheduler = p.work, FlowMatchEulerDiscreteScheduler()
    nothing = p.noise.new_zeros(())
    v, u = -p.step_fn(x=p.noise, t=nothing), -p.unguided_step_fn(x=p.noise, t=nothing)

    def sample() -> Tensor:
        scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / work.steps, work.steps), device=p.device)
        x = p.start()
        for t in scheduler.timesteps:
            output = u + WEIGHT * (v - u) if work.guided else v
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    return sample


# ---- ours ----


def ours(backend: str, p: Problem) -> Callable[[], Tensor]:
    """FlowMatching.sample with this backend."""
    work = p.work
    build = partial(
        FlowMatching,
        work.shape[1:],
        _method(work),
        work.steps,
        inference_guidance_weight=WEIGHT,
        use_classifier_free_guidance=work.guided,
        backend=backend,
    )
    sampler = build()
    more: dict[str, Any] = {"unguided_step_fn": p.unguided_step_fn} if work.guided else {}
    if p.step_sizes is not None:
        more["step_sizes"] = p.step_sizes

    def sample() -> Tensor:
        return sampler.sample(work.shape[0], p.step_fn, p.device, noise=p.noise, **more)

    def sample_all() -> Tensor:
        return sampler.sample(work.shape[0], p.step_fn, p.device, True, noise=p.noise, **more)[0]

    def sample_on_grid() -> Tensor:
        return sampler.sample(work.shape[0], p.step_fn, p.device, noise=p.noise, time_steps=p.times(), **more)

    def sample_built() -> Tensor:
        return build().sample(work.shape[0], p.step_fn, p.device, noise=p.noise, **more)

    if work.built:
        return sample_built
    if work.grid:
        return sample_on_grid
    return sample_all if work.trajectory else sample


def step_fn_graphed(p: Problem) -> Callable[[], Tensor]:
    """`ours` with a step_fn that replays a CUDA graph of its own, as policies that capture the network alone."""
    if p.device.type == "cpu":
        return ours("auto", p)
    x, t = torch.empty(p.work.shape, device=p.device), torch.zeros(p.work.shape[0], 1, 1, device=p.device)
    replay = device_clock.graphed(lambda: p.step_fn(x=x, t=t), p.device)

    def step_fn(x: Tensor, t: Tensor, static: tuple[Tensor, Tensor] = (x, t)) -> Tensor:
        static[0].copy_(x)
        static[1].copy_(t)
        return replay()[1]

    sampler = FlowMatching(p.work.shape[1:], "euler", p.work.steps)
    return lambda: sampler.sample(p.work.shape[0], step_fn, p.device, noise=p.noise)


def solver_graphed(p: Problem) -> Callable[[], Tensor]:
    """`FlowMatching.graphed`: its copies in and out too. On the CPU it runs sample()."""
    work = p.work
    sampler = FlowMatching(work.shape[1:], "euler", work.steps)
    return sampler.graphed(p.step_fn, work.shape[0], p.device, noise=p.noise)


# ---- the table ----

EULER = frozenset({"final", "trajectory", "guided", "guided trajectory"})
LAST = frozenset({"final", "guided", "midpoint", "rk4"})


class Contestant(NamedTuple):
    """One way to sample."""

    name: str
    kind: str
    """"published", "loop" (what projects write on their own grids), "sample loop" (on a grid of each sample), "hand",
    "compiled", "peer", "ours", "graphed" (in CUDA graphs: `--gpu` alone), or "bare": takes no steps, and is no
    sampler."""
    bind: Callable[[Problem], Callable[[], Tensor]]
    """What samples this problem; called once, and not timed."""
    tasks: frozenset[str]
    """What it computes."""
    exact: frozenset[str] = frozenset()
    """For which tasks it promises the published loop's bits; for the others `TOLERANCE` holds."""
    package: str | None = None
    """The package it comes from, which may be missing."""
    of_samples: bool = False
    """It takes times of each sample, and no others."""

    def computes(self, work: Work) -> bool:
        """Whether it computes the same thing."""
        if self.kind in ("published", "ours"):
            return work.task in self.tasks
        if work.of_samples or self.of_samples:
            return work.of_samples and self.of_samples and work.task in self.tasks
        if self.kind == "bare":
            return work.drawn
        if self.kind == "graphed" and not work.network:
            return False
        if self.kind == "loop":
            return bool(work.grid) and work.task in self.tasks
        if work.special:
            return False
        if self.name == "diffusers":  # casts the state to the velocity's dtype; a network would have to know its sign
            return work.task in self.tasks and not (work.network or work.drawn) and work.velocity == torch.float32
        return work.task in self.tasks

    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _plain(function: Callable[[Problem], Tensor]) -> Callable[[Problem], Callable[[], Tensor]]:
    return lambda p: partial(function, p)


def graphed() -> list[Contestant]:
    """Who is in CUDA graphs by itself: with a network, whose launches are what a graph saves."""
    final = frozenset({"final"})
    return [
        Contestant("ours, step_fn graphed", "graphed", step_fn_graphed, final, final),
        Contestant("ours, solver graphed", "graphed", solver_graphed, final, final),
    ]


def contestants(device: torch.device) -> list[Contestant]:
    """All that can run on this device; the published loop first."""
    every, final = frozenset(TASKS), frozenset({"final"})
    guided, trajectories = EULER & LAST - {"final"}, EULER - LAST
    backends = [
        name
        for name, reason in available_backends().items()
        if reason is None and (not BACKENDS[name].devices or device.type in BACKENDS[name].devices)
    ]
    return [
        Contestant("published loop", "published", _plain(published), every, every),
        Contestant("float loop, lerobot's", "loop", _plain(float_loop), frozenset({"final"})),
        Contestant("0-dim loop", "loop", _plain(scalar_loop), frozenset({"final"}), frozenset({"final"})),
        Contestant("loop of samples", "sample loop", _plain(sample_loop), final, final, of_samples=True),
        Contestant("by hand, fresh", "hand", _plain(by_hand), EULER),
        Contestant("by hand, in place", "hand", _plain(by_hand_in_place), EULER),
        Contestant("by hand, two adds", "hand", _plain(by_hand_two_adds), guided),
        Contestant("by hand, out=", "hand", _plain(by_hand_out), trajectories),
        Contestant("by hand, in place", "hand", _plain(by_hand_midpoint), frozenset({"midpoint"})),
        Contestant("by hand, in place", "hand", _plain(by_hand_rk4), frozenset({"rk4"})),
        Contestant("by hand, addcmul", "hand", _plain(by_hand_of_samples), final, of_samples=True),
        Contestant("by hand, same bits", "hand", _plain(by_hand_same_bits), EULER, EULER),
        Contestant("compiled update", "compiled", compiled_update, EULER),
        Contestant("compiled loop", "compiled", compiled_loop, every),
        Contestant("torchdiffeq", "peer", torchdiffeq, every, package="torchdiffeq"),
        Contestant("flow_matching", "peer", flow_matching, every, package="flow_matching"),
        Contestant("diffusers", "peer", diffusers, EULER & LAST, package="diffusers"),
        *(Contestant(f"ours, {name}", "ours", partial(ours, name), every, every - {"rk4"}) for name in backends),
        Contestant("bare loop", "bare", _plain(bare), frozenset({"final"})),
    ]


# ---- the check ----

#: Largest |got - wanted| / (1 + |wanted|) of one that does not promise bits. A float32 rounding is 6e-8 of the state,
#: of which each step has two, in up to 50 steps; grids differ by as much. A bfloat16 rounding is 4e-3 of the velocity,
#: of which guidance has three, and the time that velocities are multiplied with adds up to 1.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def difference(contestant: Contestant, p: Problem, function: Callable[[], Tensor], wanted: Tensor) -> str | None:
    """How a contestant's result, or its count of evaluations, is not the published loop's; None: it is."""
    evaluations, step_fn = 0, p.step_fn

    def counting(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return step_fn(x=x, t=t)

    # A compiler would trace the count, a replay makes no call; diffusers' free velocity is made once, for its sign.
    counted = contestant.kind not in ("compiled", "graphed") and contestant.name != "diffusers"
    if counted:
        p.step_fn = counting
    try:
        torch.manual_seed(0)
        got = function()
    finally:
        p.step_fn = step_fn
    work = p.work
    if counted and evaluations != work.evaluations:
        return f"{evaluations} evaluations instead of {work.evaluations}"
    if contestant.kind == "bare":
        return None
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{list(got.shape)} {got.dtype} instead of {list(wanted.shape)} {wanted.dtype}"
    if work.task in contestant.exact:
        same = torch.equal(got, wanted)
        return None if same else f"other bits than the published loop's in {int((got != wanted).sum())} values"
    most = ((got - wanted).abs() / (1 + wanted.abs())).max().item()
    tolerance = TOLERANCE[work.velocity]
    return None if most <= tolerance else f"differs from the published loop by {most:.1e}, and may by {tolerance:.0e}"
