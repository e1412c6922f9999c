"""The `reference` backend: plain PyTorch, any device. It is the definition of right."""

from __future__ import annotations

import torch
from torch import Tensor

from .fused_step import FROM_UNGUIDED, WEIGHTED, arithmetic_dtype

#: Tensor.copy_, which asks for the device even of a FakeTensor, without that question.
copy_ = torch.ops.aten.copy_.default


def unavailable() -> str | None:
    """Why this backend cannot run: it always can."""
    return None


def fused_step(
    base: Tensor,
    v: Tensor,
    u: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    coefficients: Tensor,
    row: int,
    velocity_rounding: bool = False,
    guidance: int = WEIGHTED,
) -> Tensor:
    """a*base + b0*h0 + b1*h1 + b2*h2 + b3*h3, rounded as `ops.fused_step` says; a new tensor.

    Moves each operand once for every elementary operation, as eager PyTorch does.
    """
    state, velocity = base.dtype, v.dtype
    arithmetic = arithmetic_dtype(state)
    # [1, ..., 1] and not 0-dim, so that no coefficient is rounded to a tensor's dtype unasked.
    a, *b = coefficients.select(0, row).narrow(0, 0, 5).view(5, *[1] * max(base.dim(), 1)).unbind()
    if velocity_rounding:
        b = [coefficient.to(velocity).to(arithmetic) for coefficient in b]
    product_dtype = velocity if velocity_rounding else state

    out = (a * base).to(state)
    terms = [_velocity(v, u, coefficients, row, guidance), h1, h2, h3]
    for coefficient, term in zip(b, terms, strict=True):
        if term is not None:
            product = (coefficient * term.to(arithmetic)).to(product_dtype)
            out = (out.to(arithmetic) + product.to(arithmetic)).to(state)
    return out.reshape(base.shape).contiguous()


def fused_step_(
    out: Tensor,
    base: Tensor,
    v: Tensor,
    u: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    coefficients: Tensor,
    row: int,
    velocity_rounding: bool = False,
    guidance: int = WEIGHTED,
    trajectory: Tensor | None = None,
    slot: int = 0,
    history: Tensor | None = None,
) -> None:
    """`fused_step` into `out`, which may be `base`; writes the trajectory's slot and the history too."""
    result = fused_step(base, v, u, h1, h2, h3, coefficients, row, velocity_rounding, guidance)
    if history is not None:
        copy_(history, remember(base, v, u, coefficients, row, guidance))
    copy_(out, result)
    if trajectory is not None:
        copy_(trajectory.select(1, slot), result)


def remember(
    base: Tensor, v: Tensor, u: Tensor | None, coefficients: Tensor, row: int, guidance: int = WEIGHTED
) -> Tensor:
    """h0 + c*base, or h0 alone where c is 0, in the arithmetic dtype: what a history buffer takes."""
    h0 = _velocity(v, u, coefficients, row, guidance).to(coefficients.dtype)
    c = coefficients.select(0, row).narrow(0, 7, 1).view([1] * max(base.dim(), 1))
    return torch.where(c != 0, h0 + c * base.to(coefficients.dtype), h0).reshape(base.shape)


def _velocity(v: Tensor, u: Tensor | None, coefficients: Tensor, row: int, guidance: int) -> Tensor:
    """h0, in the velocity's dtype V: v, or two velocities combined with three roundings to V."""
    if u is None:
        return v
    arithmetic = arithmetic_dtype(v.dtype)
    w0, w1 = coefficients.select(0, row).narrow(0, 5, 2).to(arithmetic).view(2, *[1] * max(v.dim(), 1)).unbind()
    if guidance == WEIGHTED:
        h0 = (w0 * u).to(v.dtype) + (w1 * v).to(v.dtype)
    else:
        h0 = (u if guidance == FROM_UNGUIDED else v) + (w1 * (v - u)).to(v.dtype)
    return h0.reshape(v.shape)
