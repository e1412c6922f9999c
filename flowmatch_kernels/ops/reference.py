"""The `reference` backend: plain PyTorch, any device. It is the definition of right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference_noise
from .fused_step import (
    FROM_UNGUIDED,
    PROMOTE,
    ROUNDED,
    WEIGHTED,
    Operands,
    arithmetic_dtype,
    check_overlap,
    covered,
    is_keys,
)

#: Tensor.copy_, which asks for the device even of a FakeTensor, without that question.
copy_ = torch.ops.aten.copy_.default


def unavailable() -> str | None:
    """Why this backend cannot run: it always can."""
    return None


class Columns(NamedTuple):
    """One row of coefficients, each [1, ..., 1] and not 0-dim, so that none is rounded to a tensor's dtype unasked.

    With rows of their own one row of each, [B, 1, ..., 1], or [B, tokens, 1, ..., 1].
    """

    a: Tensor | None
    """None: it is known to be 1."""
    b: tuple[Tensor, ...]
    """b0..b3."""
    w0: Tensor
    w1: Tensor
    c: Tensor | None
    """None: it is known to be 0."""
    own: bool = False
    """They are rows of their own."""

    @classmethod
    def of(cls, coefficients: Tensor, row: int, dims: int, sizes: Sequence[int] = ()) -> Columns:
        """A row's columns, for states of so many dimensions.

        Args:
            coefficients, row: Which.
            dims: Of the states.
            sizes: The first sizes of the states, which rows of their own have one row for; (): the samples.
        """
        of_row, own = coefficients.select(0, row), coefficients.dim() == 3
        if own:
            sizes = sizes or of_row.shape[:1]
            of_row = of_row.T.contiguous()
        else:
            sizes = ()
        a, b0, b1, b2, b3, w0, w1, c = of_row.view(8, *sizes, *[1] * (max(dims, 1) - len(sizes))).unbind()
        return cls(a, (b0, b1, b2, b3), w0, w1, c, own)


def fused_step(base: Tensor, *operands: Any, **named: Any) -> Tensor:
    """a*base + b0*h0 + b1*h1 + b2*h2 + b3*h3, rounded as `ops.fused_step` says; a new tensor.

    Takes the operands of the functional op. Moves each operand once for every elementary operation, as eager PyTorch
    does.
    """
    return _result(Operands(base, base, *operands, **named))[0]


def fused_step_(o: Operands) -> None:
    """`fused_step` into `out`, which may be `base`; writes the trajectory's slot and the history too.

    Raises:
        ValueError: operands overlap that may not, as `check_overlap` says.
    """
    check_overlap(o)
    result, h0, columns = _result(o)
    if o.history is not None:
        copy_(o.history, remember(o.base, h0, columns, o.sum_first))
    copy_(o.out, result)
    if o.trajectory is not None:
        copy_(o.trajectory.select(1, o.slot), result)


def _result(o: Operands) -> tuple[Tensor, Tensor, Columns]:
    sizes = covered(o.base.shape, o.coefficients.shape[1]) if o.coefficients.dim() == 3 else None
    columns = Columns.of(o.coefficients, o.row, o.base.dim(), sizes or ())
    h0 = velocity(o.v, o.u, columns, o.guidance)
    h1 = o.h1
    if h1 is not None and is_keys(h1):
        h1 = reference_noise.keyed_noise(h1, o.base.shape[1:], arithmetic_dtype(o.base.dtype))
    terms = h0, h1, o.h2, o.h3
    return combine(o.base, terms, columns, o.rounding, o.sum_first, o.out.dtype, o.strength), h0, columns


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
    base: Tensor,
    terms: Sequence[Tensor | None],
    columns: Columns,
    rounding: int = PROMOTE,
    sum_first: bool = False,
    out_dtype: torch.dtype | None = None,
    strength: Tensor | None = None,
) -> Tensor:
    """a*base + b0*h0 + ..., left to right, or the sum first; rounded as `ops.fused_step` says.

    Args:
        base: The state at the start of the step.
        terms: h0, h1, h2, h3.
        columns: The row.
        rounding, sum_first: The fused step's arguments.
        out_dtype: None: base's.
        strength: None, or what b0*h0 is multiplied by.
    """
    S = base.dtype
    if out_dtype is not None and out_dtype is not S:
        S = torch.promote_types(S, out_dtype)
    A = arithmetic_dtype(S)
    assert terms[0] is not None
    velocity_dtype = terms[0].dtype
    if sum_first:
        out = _sum_first(base, terms, columns)
    elif S is A and base.dtype is S is (out_dtype or S) and (rounding == PROMOTE or velocity_dtype is S):
        # Nothing is rounded by a cast.
        out = base if columns.a is None else columns.a * base
        for k, (b, term) in enumerate(zip(columns.b, terms, strict=True)):
            if term is not None:
                product = b * term
                out = _plus(out, product if strength is None or k else product * strength, b, columns)
    else:
        product_dtype = S if rounding == PROMOTE else velocity_dtype
        out = base.to(S) if columns.a is None else (columns.a * base.to(A)).to(S)
        for k, (b, term) in enumerate(zip(columns.b, terms, strict=True)):
            if term is not None:
                entered = b.to(product_dtype).to(A) if rounding == ROUNDED else b
                product = (entered * term.to(A)).to(product_dtype)
                if strength is not None and k == 0:
                    product = (product.to(A) * strength.to(A)).to(S)
                out = _plus(out, product, b, columns, A)
        if out_dtype is not None:
            out = out.to(out_dtype)
    return out if base.dim() and out.is_contiguous() else out.reshape(base.shape).contiguous()


def _plus(out: Tensor, term: Tensor, b: Tensor, columns: Columns, A: torch.dtype | None = None) -> Tensor:
    """out + term, added in A and rounded to out's dtype; with rows of their own out alone where b, the term's, is 0."""
    added = out + term if A is None else (out.to(A) + term.to(A)).to(out.dtype)
    return torch.where(b != 0, added, out) if columns.own else added


def _sum_first(base: Tensor, terms: Sequence[Tensor | None], columns: Columns) -> Tensor:
    """base + ((b2*h2 + b1*h1 + b0*h0) * a) * c; with h3 the sum is b3*h3 + b1*(h2 + h1) + b0*h0."""
    S = base.dtype
    A = arithmetic_dtype(S)
    present = [(b, term.to(A)) for b, term in zip(columns.b, terms, strict=True) if term is not None]
    if len(present) == 4:
        first, second, third, fourth = present
        present = [first, (second[0], (third[1] + second[1]).to(S).to(A)), fourth]
    *newer, (b, oldest) = present
    out = (b * oldest).to(S)
    for b, term in reversed(newer):
        out = (out.to(A) + (b * term).to(S).to(A)).to(S)
    for factor in (columns.a, columns.c):
        if factor is not None:
            out = (factor * out.to(A)).to(S)
    return (base.to(A) + out.to(A)).to(S)


def remember(base: Tensor, h0: Tensor, columns: Columns, sum_first: bool = False) -> Tensor:
    """h0 + c*base, or h0 alone where c is 0, in the arithmetic dtype: what a history buffer takes; a new tensor."""
    A = columns.w0.dtype
    if columns.c is None or sum_first:
        return h0.to(A, copy=True)
    h0 = h0.to(A)
    return torch.where(columns.c != 0, h0 + columns.c * base.to(A), h0).reshape(base.shape)
