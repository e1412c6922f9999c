"""Keyed noise in Triton, for CUDA and ROCm, and for the CPU under TRITON_INTERPRET=1.

`ops.keyed_noise` is the contract, `ops.reference_noise` the definition; names agree. Two compilations a dtype serve
every size: samples whose elements are a multiple of four, and others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton import _LAUNCH_OPTIONS, _elements, _rounded
from .triton_normals import normals, words

#: Counters of a block: one for each thread, of four elements.
BLOCK = 128


@triton.jit(do_not_specialize=("out", "keys", "elements", "counters", "evaluation"))
def keyed_noise_kernel(
    out, keys, elements: tl.int64, counters: tl.int64, evaluation: tl.int64, FOURS: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of counters of `ops.keyed_noise`.

    Bytes moved per element: the result written, and 24 read for the key of a sample.

    Args:
        out: [samples, elements].
        keys: int64 [samples, 3].
        elements: Of one sample.
        counters: samples * ceil(elements / 4).
        evaluation: In [0, 2^16).
        FOURS: elements is a multiple of four, and out of four elements' bytes: then a thread's four are one access.
        BLOCK: Counters of a block, a power of two.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    elements, counters = elements.to(tl.int64), counters.to(tl.int64)  # the interpreter passes a small one as int32
    blocks = (elements + 3) // 4
    start = tl.program_id(0).to(tl.int64) * BLOCK
    j = tl.arange(0, BLOCK)
    mask = start + j < counters
    # Sample first + q: one division of 64 bits a block of the grid, and one of 32 an element.
    first = start // blocks
    left = start - first * blocks
    divisor = tl.minimum(blocks, BLOCK).to(tl.uint32)  # a longer sample ends in it at most once
    q = ((j.to(tl.uint32) + (divisor - tl.minimum(blocks - left, BLOCK).to(tl.uint32))) // divisor).to(tl.int64)
    block = left + j - q * blocks
    w0, w1, w2, w3 = words(keys + (first + q) * 3, block, evaluation.to(tl.int64), mask)
    z0, z1 = normals(w0, w1)
    z2, z3 = normals(w2, w3)
    if FOURS:
        z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
        offset = start * 4 + tl.arange(0, 4 * BLOCK)
        within = tl.max_constancy(offset < counters * 4, 4)
        tl.store(_elements(out, offset, 4), _rounded(z, DTYPE), within)
    else:
        element = block * 4
        place = out + (first + q) * elements + element
        tl.store(place, _rounded(z0, DTYPE), mask)
        tl.store(place + 1, _rounded(z1, DTYPE), mask & (element + 1 < elements))
        tl.store(place + 2, _rounded(z2, DTYPE), mask & (element + 2 < elements))
        tl.store(place + 3, _rounded(z3, DTYPE), mask & (element + 3 < elements))


def keyed_noise_(out: Tensor, keys: Tensor, evaluation: int) -> None:
    """Writes normals to out, [B, *x_dims], contiguous, by keys [B, 3]; one launch on out's current stream."""
    if out.numel() == 0:
        return
    elements = out.numel() // out.shape[0]
    counters = out.shape[0] * ((elements + 3) // 4)
    fours = elements % 4 == 0 and out.data_ptr() % (4 * out.element_size()) == 0
    arguments = out, keys, elements, counters, evaluation, fours, BLOCK
    with torch.cuda.device(out.get_device()):  # -1, the CPU, changes nothing
        keyed_noise_kernel[(triton.cdiv(counters, BLOCK),)](*arguments, **_LAUNCH_OPTIONS)
