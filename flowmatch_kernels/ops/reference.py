"""The `reference` backend: plain PyTorch, any device. It is the definition of right."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused_step import FROM_UNGUIDED, WEIGHTED, Operands, arithmetic_dtype, check_overlap

#: Tensor.copy_, which asks for the device even of a FakeTensor, without that question.
copy_ = torch.ops.aten.copy_.default


def unavailable() -> str | None:
    """Why this backend cannot run: it always can."""
    return None


class Columns(NamedTuple):
    """One row of coefficients, each [1, ..., 1] and not 0-dim, so that none is rounded to a tensor's dtype unasked."""

    a: Tensor | None
    """None: it is known to be 1."""
    b: tuple[Tensor, ...]
    """b0..b3."""
    w0: Tensor
    w1: Tensor
    c: Tensor | None
    """None: it is known to be 0."""

    @classmethod
    def of(cls, coefficients: Tensor, row: int, dims: int) -> Columns:
        """A row's columns, for states of so many dimensions."""
        a, b0, b1, b2, b3, w0, w1, c = coefficients.select(0, row).view(8, *[1] * max(dims, 1)).unbind()
        return cls(a, (b0, b1, b2, b3), w0, w1, c)


def fused_step(base: Tensor, *operands: Any, **named: Any) -> Tensor:
    """a*base + b0*h0 + b1*h1 + b2*h2 + b3*h3, rounded as `ops.fused_step` says; a new tensor.

    Takes the operands of the functional op. Moves each operand once for every elementary operation, as eager PyTorch
    does.
    """
    o = Operands(base, base, *operands, **named)
    columns = Columns.of(o.coefficients, o.row, base.dim())
    h0 = velocity(o.v, o.u, columns, o.guidance)
    return combine(base, (h0, o.h1, o.h2, o.h3), columns, o.v.dtype if o.velocity_rounding else None)


def fused_step_(o: Operands) -> None:
    """`fused_step` into `out`, which may be `base`; writes the trajectory's slot and the history too.

    Raises:
        ValueError: operands overlap that may not, as `check_overlap` says.
    """
    check_overlap(o)
    columns = Columns.of(o.coefficients, o.row, o.base.dim())
    h0 = velocity(o.v, o.u, columns, o.guidance)
    result = combine(o.base, (h0, o.h1, o.h2, o.h3), columns, o.v.dtype if o.velocity_rounding else None)
    if o.history is not None:
        copy_(o.history, remember(o.base, h0, columns))
    copy_(o.out, result)
    if o.trajectory is not None:
        copy_(o.trajectory.select(1, o.slot), result)


def velocity(v: Tensor, u: Tensor | None, columns: Columns, guidance: int) -> Tensor:
    """h0, in the velocity's dtype V: v, or two velocities combined with three roundings to V."""
    if u is None:
        return v
    V = v.dtype
    w0, w1 = columns.w0, columns.w1
    if (arithmetic := arithmetic_dtype(V)) is not w0.dtype:
        w0, w1 = w0.to(arithmetic), w1.to(arithmetic)
    if guidance == WEIGHTED:
        h0 = (w0 * u).to(V) + (w1 * v).to(V)
    else:
        h0 = (u if guidance == FROM_UNGUIDED else v) + (w1 * (v - u)).to(V)
    return h0 if v.dim() else h0.reshape(v.shape)


def combine(
    base: Tensor, terms: tuple[Tensor | None, ...], columns: Columns, product_dtype: torch.dtype | None = None
) -> Tensor:
    """a*base + b0*h0 + ..., left to right; each product rounded to `product_dtype`, by default the state's."""
    S = base.dtype
    if S is arithmetic_dtype(S) and product_dtype is None:  # nothing is rounded by a cast
        out = base if columns.a is None else columns.a * base
        for b, term in zip(columns.b, terms, strict=True):
            if term is not None:
                out = out + b * term
    else:
        A = arithmetic_dtype(S)
        out = base if columns.a is None else (columns.a * base).to(S)
        for b, term in zip(columns.b, terms, strict=True):
            if term is not None:
                entered = b if product_dtype is None else b.to(product_dtype).to(A)
                product = (entered * term.to(A)).to(product_dtype or S)
                out = (out.to(A) + product.to(A)).to(S)
    return out if base.dim() and out.is_contiguous() else out.reshape(base.shape).contiguous()


def remember(base: Tensor, h0: Tensor, columns: Columns) -> Tensor:
    """h0 + c*base, or h0 alone where c is 0, in the arithmetic dtype: what a history buffer takes; a new tensor."""
    A = columns.w0.dtype
    if columns.c is None:
        return h0.to(A, copy=True)
    h0 = h0.to(A)
    return torch.where(columns.c != 0, h0 + columns.c * base.to(A), h0).reshape(base.shape)
