"""The small problem that the tests of hooks and of time grids sample, and the eager loop on it."""

import eager_loops
import torch

from flowmatch_kernels import FlowMatching, solvers

DIMS, BATCH, STEPS = (5, 3), 4, 6
TIMES = torch.linspace(0, 1, STEPS + 1)
EVERY_SOLVER = sorted(solvers.SOLVERS)


def field(x, t):
    return (torch.sin(3 * x) + t * x - (1 - t)).to(x.dtype)


def start(dtype=torch.float32, batch_size=BATCH):
    return torch.randn(batch_size, *DIMS, generator=torch.Generator().manual_seed(3)).to(dtype)


def sampler(solver="euler", backend="auto", steps=STEPS, **keywords):
    return FlowMatching(DIMS, solver, steps, backend=backend, **keywords)


def eager(solver, noise, times=TIMES, **hooks):
    return eager_loops.sample(solver, lambda x, t, i: field(x, t), noise, times, **hooks)
