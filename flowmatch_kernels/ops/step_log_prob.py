"""The log-probability of a stochastic step: its contract, its schema, its fake and its gradient.

    m   = a*base + b0*v                          the step's mean; a, b0 = coefficients[row, 0], coefficients[row, 1]
    d   = next - m
    out = sum(d*d) / n * scale + offset          over all but the batch; scale, offset = densities[row]

n is the number of elements of a sample. With scale = -1/(2 std^2) and offset = -log(std) - log(2 pi)/2 that is the mean
over a sample's elements of log N(next; m, std^2), as Flow-GRPO's code has it; its paper writes the sum over them, which
is n times that.

Rows of their own. coefficients [rows, 8] and densities [rows, 2] hold one row for all samples. [rows, B, 8] and
[rows, B, 2] hold one for each sample, which has the bits of a call by itself with its own [rows, 8] and [rows, 2].
Where a sample's scale is 0, its d counts as 0, by a choice and not by a product: NaN and infinities do not count. So a
row `HELD`, scale = offset = 0, gives 0.0. It is that of a step of length 0, which leaves the state as it is: the step
is no random event, has no density, and adds nothing to a sum of log-probabilities. With one row for all, a scale of 0
is a factor like others.

Types. S is the state's dtype (base, next), V the velocity's, not wider than S; A the arithmetic dtype (coefficients,
densities, out): float64 for a float64 state, else float32. What is read is widened to A.

Rounding. Each product, sum and quotient is rounded to A, never an FMA; n too.

Order of the sum. There are `LANES` lanes, which begin at 0. Lane j adds the squares of elements j, j + LANES,
j + 2*LANES, ... of its sample, in that order; elements are counted in the order of contiguous memory. Then lane j adds
lane j + LANES/2, for all j below LANES/2; then lane j + LANES/4; and so on down to j + 1. So the order is one of an
element's place in its sample: a sample has the same bits alone, in any batch, at any place, and in every backend.

Error. Each square has a relative error of at most 3 u beside that of d, u being half an ulp of 1; a lane of k elements
adds k - 1 roundings, the halves 10, the last line 3. So sum(d*d) / n is within (ceil(n / LANES) + 16) * u of what
exact arithmetic makes of the same d, relative to it, as long as nothing over- or underflows.

Gradient. Of base, v and next: that of the exact expression, each rounding counting as the identity; its own
derivatives too. With rows of their own it is 0 where scale is 0. Not of coefficients and densities.

Errors. TypeError: a wrong dtype. ValueError: a wrong shape, device, layout or row; a sample without elements, of which
there is no mean; coefficients with as many rows of their own as there are tokens, or any other number than B; a row of
densities on the CPU that is not finite: std = 0 has no density.

Bytes moved per element are the least possible: base, v and next are read once.

Source: Liu et al., Flow-GRPO, arXiv 2505.05470.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .fused_step import COLUMNS, NAMESPACE, arithmetic_dtype, check_dtypes, library

STEP_LOG_PROB = (
    "step_log_prob(Tensor base, Tensor v, Tensor next, Tensor coefficients, Tensor densities, int row, "
    "str backend='auto') -> Tensor"
)

#: The columns of a row of densities.
DENSITIES = ("scale", "offset")

#: A row of their own of densities for a step that leaves the state as it is: its log-probability is 0.0.
HELD = (0.0, 0.0)

#: Partial sums of a sample.
LANES = 1024


def elements(base: Tensor) -> int:
    """n: of one sample."""
    return math.prod(base.shape[1:])


def check(base: Tensor, v: Tensor, next: Tensor, coefficients: Tensor, densities: Tensor, row: int) -> None:
    """Raises where an operand breaks the contract; the values of densities are not read.

    Args:
        base: S, [B, *x_dims]: the state before the step.
        v: V, as base: the velocity there.
        next: S, as base: the state after the step.
        coefficients: A, [rows, 8] or [rows, B, 8], contiguous.
        densities: A, [rows, 2] or [rows, B, 2], as coefficients; contiguous.
        row: In [0, rows).

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a layout or the row is wrong, or a sample has no elements.
    """
    check_dtypes(base.dtype, v.dtype, base.dtype)
    if next.dtype != base.dtype:
        raise TypeError(f"next must be {base.dtype}, as base, got {next.dtype}")
    arithmetic = arithmetic_dtype(base.dtype)
    if base.dim() == 0:
        raise ValueError("base must be [B, *x_dims], got a tensor without dimensions")
    for name, tensor in (("v", v), ("next", next)):
        if tensor.shape != base.shape:
            raise ValueError(f"{name} must have base's shape {list(base.shape)}, got {list(tensor.shape)}")
        if tensor.device != base.device:
            raise ValueError(f"{name} must be on base's device {base.device}, got {tensor.device}")
    for name, table, columns in (("coefficients", coefficients, COLUMNS), ("densities", densities, DENSITIES)):
        if table.dtype != arithmetic:
            raise TypeError(f"{name} must be {arithmetic}, got {table.dtype}")
        if table.dim() not in (2, 3) or table.shape[-1] != len(columns) or not table.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, [rows, {len(columns)}] or [rows, B, {len(columns)}], "
                f"got {list(table.shape)}"
            )
        if table.dim() == 3 and table.shape[1] != base.shape[0]:
            raise ValueError(
                f"{name} [rows, B, {len(columns)}] need a row for each of the {base.shape[0]} samples of a state "
                f"{list(base.shape)}, got {list(table.shape)}"
            )
        if table.device != base.device:
            raise ValueError(f"{name} must be on base's device {base.device}, got {table.device}")
        if not 0 <= row < table.shape[0]:
            raise ValueError(f"row must be in [0, {table.shape[0]}) of {name}, got {row}")
    if coefficients.dim() != densities.dim():
        raise ValueError(
            "coefficients and densities must both have one row for all samples, or both one for each: "
            f"got {list(coefficients.shape)} and {list(densities.shape)}"
        )
    if elements(base) == 0:
        raise ValueError(f"a sample must have elements to average over, got a state {list(base.shape)}")


def check_density(densities: Tensor, row: int) -> None:
    """Raises ValueError where a row of densities, real values on the CPU, is not finite; on a device none is read."""
    if densities.device.type != "cpu":
        return
    place, of_row = f"densities[{row}]", densities[row]
    if of_row.dim() == 2:
        finite = of_row.isfinite().all(dim=1).tolist()
        if all(finite):
            return
        sample = finite.index(False)
        place, of_row = f"{place}[{sample}]", of_row[sample]
    scale, offset = of_row.tolist()
    if not (math.isfinite(scale) and math.isfinite(offset)):
        raise ValueError(
            f"{place} must be finite, got scale {scale} and offset {offset}: a step without noise, "
            "std = 0, has no density"
        )


def columns(table: Tensor, row: int, dims: int) -> tuple[Tensor, ...]:
    """A row's first two columns, for tensors of so many dimensions: [1, 1, ..., 1], or of each sample [B, 1, ..., 1].

    Not 0-dim, so that none is rounded to a tensor's dtype.
    """
    samples = table.shape[1] if table.dim() == 3 else 1
    return tuple(table.select(0, row).select(-1, k).reshape(samples, *[1] * (dims - 1)) for k in range(2))


def difference(base: Tensor, v: Tensor, next: Tensor, coefficients: Tensor, densities: Tensor, row: int) -> Tensor:
    """d = next - (a*base + b0*v), in A, or 0 as the contract says.

    Each operation is one of PyTorch's, so that eager contracts none.
    """
    A = coefficients.dtype
    a, b0 = columns(coefficients, row, base.dim())
    return _counted(next.to(A) - (a * base.to(A) + b0 * v.to(A)), densities, row)


def _counted(x: Tensor, densities: Tensor, row: int) -> Tensor:
    """x; with rows of their own 0 where scale is 0."""
    scale, _ = columns(densities, row, x.dim())
    return x if densities.dim() == 2 else torch.where(scale == 0, 0, x)


# ---- registration: schema, fake, autograd. dispatch.py adds the kernel. ----

library.define(STEP_LOG_PROB, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake(f"{NAMESPACE}::step_log_prob", lib=library)
def _step_log_prob_fake(
    base: Tensor, v: Tensor, next: Tensor, coefficients: Tensor, densities: Tensor, row: int, backend: str = "auto"
) -> Tensor:
    check(base, v, next, coefficients, densities, row)
    return base.new_empty(base.shape[:1], dtype=coefficients.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, v, next, coefficients, densities, row, _ = inputs
    for name, table in (("coefficients", coefficients), ("densities", densities)):
        if table.requires_grad:
            raise NotImplementedError(f"step_log_prob has no gradient for {name}: detach it")
    ctx.save_for_backward(base, v, next, coefficients, densities)
    ctx.row = row


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """In PyTorch's own differentiable operations, so that its derivative is right too."""
    base, v, next, coefficients, densities = ctx.saved_tensors
    a, b0 = columns(coefficients, ctx.row, base.dim())
    scale, _ = columns(densities, ctx.row, base.dim())
    factor = gradient.view(-1, *[1] * (base.dim() - 1)) * (scale * (2 / elements(base)))
    to_next = _counted(factor, densities, ctx.row) * difference(base, v, next, coefficients, densities, ctx.row)
    needed = ctx.needs_input_grad
    return (
        (-a * to_next).to(base.dtype) if needed[0] else None,
        (-b0 * to_next).to(v.dtype) if needed[1] else None,
        to_next.to(next.dtype) if needed[2] else None,
        *(None,) * 4,  # coefficients, densities, row, backend
    )


torch.library.register_autograd(f"{NAMESPACE}::step_log_prob", _backward, setup_context=_setup_context, lib=library)
