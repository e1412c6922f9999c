"""The log-probability of a stochastic step in plain PyTorch, on any device. It is the definition of right.

`ops.step_log_prob` is the contract. Each operation is one of PyTorch's, which eager contracts with no other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .step_log_prob import LANES, columns, difference, elements


def step_log_prob_(
    out: Tensor, base: Tensor, v: Tensor, next: Tensor, coefficients: Tensor, densities: Tensor, row: int
) -> None:
    """Writes log-probabilities to out, [B]."""
    out.copy_(step_log_prob(base, v, next, coefficients, densities, row))


def step_log_prob(base: Tensor, v: Tensor, next: Tensor, coefficients: Tensor, densities: Tensor, row: int) -> Tensor:
    """sum(d*d) / n * scale + offset of each sample, [B], in the order of the contract; a new tensor."""
    samples, n = base.shape[0], elements(base)
    d = difference(base, v, next, coefficients, densities, row).reshape(samples, n)
    squares = torch.nn.functional.pad(d * d, (0, -n % LANES))  # x + 0 is x: no square is -0
    lanes, *others = squares.split(LANES, dim=1)
    for other in others:
        lanes = lanes + other
    while lanes.shape[1] > 1:
        lower, upper = lanes.chunk(2, dim=1)
        lanes = lower + upper
    scale, offset = columns(densities, row, 1)
    # A tensor: CUDA's division by a number is a product with its inverse.
    count = torch.full([1], n, dtype=densities.dtype, device=base.device)
    return lanes.squeeze(1) / count * scale + offset
