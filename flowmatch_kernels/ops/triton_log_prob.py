"""The log-probability of a stochastic step in Triton, for CUDA and ROCm, and for the CPU under TRITON_INTERPRET=1.

`ops.step_log_prob` is the contract, `ops.reference_log_prob` the definition; names agree. Two compilations a pair of
dtypes serve every size: operands whose accesses can be of 16 bytes, and others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_step import dense
from .step_log_prob import LANES
from .triton import _elements, _widened, launch_options

#: Of a block. A thread has four lanes: with eight, of single elements, it took 128 registers, and spilled on sm_120.
THREADS = 256
_LAUNCH_OPTIONS = launch_options(threads=THREADS)

_RUNTIME_ARGUMENTS = ("out", "base", "v", "next", "coefficients", "densities", "row", "elements", "own_rows")


@triton.jit(do_not_specialize=_RUNTIME_ARGUMENTS)
def step_log_prob_kernel(
    out,
    base,
    v,
    next,
    coefficients,
    densities,
    row: tl.int64,
    elements: tl.int64,
    own_rows: tl.int64,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One sample of `ops.step_log_prob`.

    Bytes moved per element: |S| for each of base and next, |V| for v, read.

    Args:
        out: A[samples].
        base, next: S[samples, elements].
        v: V[samples, elements].
        coefficients: A[rows, 8], or with rows of their own A[rows, samples, 8].
        densities: A[rows, 2], or A[rows, samples, 2].
        row: Which row of both, the first of several.
        elements: Of one sample, at least 1.
        own_rows: 1: each sample has rows of its own; 0: one row for all.
        VECTOR: Elements of one access, or 1. With more than 1, elements is a multiple of VECTOR, and each pointer of
            VECTOR elements.
        LANES: Partial sums, 2^LEVELS.
    """
    A: tl.constexpr = coefficients.dtype.element_ty
    # The interpreter passes a small integer as int32.
    row, elements, own_rows = row.to(tl.int64), elements.to(tl.int64), own_rows.to(tl.int64)
    sample = tl.program_id(0).to(tl.int64)
    start = sample * elements
    row += sample * own_rows
    a = tl.load(coefficients + row * 8)
    b0 = tl.load(coefficients + row * 8 + 1)
    lane = tl.arange(0, LANES)
    lanes = tl.zeros([LANES], A)
    for i in range(0, elements, LANES):
        mask = i + lane < elements
        if VECTOR > 1:
            mask = tl.max_constancy(mask, VECTOR)
        offset = start + i + lane
        x = _widened(tl.load(_elements(base, offset, VECTOR), mask, other=0.0), A)
        h0 = _widened(tl.load(_elements(v, offset, VECTOR), mask, other=0.0), A)
        y = _widened(tl.load(_elements(next, offset, VECTOR), mask, other=0.0), A)
        d = y - (a * x + b0 * h0)
        lanes += tl.where(mask, d * d, 0.0)  # an infinite a times 0 is NaN
    # Halves: each sum has two terms, so that it has no order of its own.
    for k in tl.static_range(1, LEVELS + 1):
        lanes = tl.sum(tl.reshape(lanes, [2, LANES >> k]), axis=0)
    scale = tl.load(densities + row * 2)
    lanes = tl.where((own_rows != 0) & (scale == 0), 0.0, lanes)
    count = elements.to(A)
    mean = tl.div_rn(lanes, count) if A == tl.float32 else lanes / count
    tl.store(out + sample + tl.arange(0, 1), mean * scale + tl.load(densities + row * 2 + 1))


def step_log_prob_(
    out: Tensor, base: Tensor, v: Tensor, next: Tensor, coefficients: Tensor, densities: Tensor, row: int
) -> None:
    """`ops.step_log_prob` in Triton: one launch on out's current stream, a program for each sample.

    base, v and next may be non-contiguous: each costs one copy.
    """
    samples = out.shape[0]
    if samples == 0:
        return
    base, v, next = dense(base), dense(v), dense(next)
    elements = base.numel() // samples
    aligned = (base.data_ptr() | v.data_ptr() | next.data_ptr()) % 16 == 0 and elements % vector(base.dtype) == 0
    own_rows = coefficients.dim() == 3
    first = row * samples if own_rows else row
    arguments = out, base, v, next, coefficients, densities, first, elements, int(own_rows)
    with torch.cuda.device(out.get_device()):  # -1, the CPU, changes nothing
        step_log_prob_kernel[(samples,)](*arguments, **constants(base.dtype, aligned), **_LAUNCH_OPTIONS)


def vector(state: torch.dtype) -> int:
    """Elements of one access: 16 bytes of a state, or a thread's lanes where they are fewer."""
    return min(16 // state.itemsize, LANES // THREADS)


def constants(state: torch.dtype, aligned: bool) -> dict[str, int]:
    """The kernel's constants; `aligned`: samples are of whole accesses, and on their boundary."""
    return {"VECTOR": vector(state) if aligned else 1, "LANES": LANES, "LEVELS": LANES.bit_length() - 1}
