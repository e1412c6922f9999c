"""Operands of step_log_prob for its tests, and the cases that every backend is tried with."""

import math

import torch
from operands import values

from flowmatch_kernels.ops.fused_step import VELOCITY_DTYPES, arithmetic_dtype
from flowmatch_kernels.ops.step_log_prob import LANES

PAIRS = [(state, velocity) for state, velocities in VELOCITY_DTYPES.items() for velocity in velocities]
#: Around a lane, all lanes, and two and four strips of them.
SIZES = (1, 2, 3, 31, LANES - 1, LANES, LANES + 1, 2 * LANES, 2 * LANES + 8, 4 * LANES - 3)


def tables(dtype, rows=2, std=0.3):
    """coefficients [rows, 8] and densities [rows, 2]; columns that are not to be read are NaN."""
    coefficients = torch.full([rows, 8], math.nan, dtype=torch.float64)
    coefficients[:, 0] = 0.9 - 0.3 * torch.arange(rows)
    coefficients[:, 1] = 0.2 + 0.1 * torch.arange(rows)
    stds = std * 2.0 ** torch.arange(rows, dtype=torch.float64)
    densities = torch.stack([-1 / (2 * stds**2), -stds.log() - math.log(2 * math.pi) / 2], dim=1)
    return coefficients.to(dtype), densities.to(dtype)


def own_tables(dtype, samples):
    """coefficients [2, samples, 8] and densities [2, samples, 2]: no two alike, sample 1 held in row 1."""
    tables_of_samples = [tables(dtype, std=0.3 + 0.01 * b) for b in range(samples)]
    coefficients, densities = (torch.stack(of_samples, dim=1) for of_samples in zip(*tables_of_samples, strict=True))
    coefficients[:, :, 0] += 0.02 * torch.arange(samples)
    if samples > 1:
        coefficients[1, 1, :2], densities[1, 1] = torch.tensor([1.0, 0.0]), 0.0
    return coefficients, densities


def drawn(shape, state, velocity, special=False, seed=0, own_rows=False):
    """base, v, next, coefficients, densities; with rows of their own the velocity of sample 1 is NaN."""
    generator = torch.Generator().manual_seed(seed)
    base, next = (values(shape, state, generator, special) for _ in range(2))
    v, arithmetic = values(shape, velocity, generator, special), arithmetic_dtype(state)
    if not own_rows:
        return base, v, next, *tables(arithmetic)
    v[1:2] = math.nan
    return base, v, next, *own_tables(arithmetic, shape[0])


def alone(operands, sample):
    """The operands of one sample by itself, with one row for all, which is its own."""
    *states, coefficients, densities = operands
    own = (table[:, sample].contiguous() for table in (coefficients, densities))
    return *(x[sample : sample + 1] for x in states), *own
