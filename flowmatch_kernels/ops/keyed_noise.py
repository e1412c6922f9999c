"""Keyed noise: its contract, its schema and its fake.

    words        = Philox4x32-10(key, counter)                      the four words of elements 4*k to 4*k + 3
    z[4*k + 0,1] = radius(words[0]) * (cos, sin)(angle(words[1]))    Box-Muller
    z[4*k + 2,3] = radius(words[2]) * (cos, sin)(angle(words[3]))

An element of a sample is counted in the order of contiguous memory. What it gets depends on `seed`, `stream`, the
sample's `index`, the `evaluation` (0: the start; the others are for solvers that draw at each evaluation) and
`element`, and on nothing else. The 64 bits of the key and the 128 of the counter, lowest word first:

| word | bits 0 to 15 | bits 16 to 31 |
|---|---|---|
| key 0, key 1 | the seed's lower word | and its upper word, 32 bits each |
| counter 0 | element // 4, its bits 0 to 15 | 16 to 31 |
| counter 1 | element // 4, its bits 32 to 47 | index, its bits 32 to 47 |
| counter 2 | stream | evaluation |
| counter 3 | index, its bits 0 to 15 | 16 to 31 |

So a sample has fewer than 2^50 elements, an index is below 2^48, and streams and evaluations are below 2^16.

Uniforms. The radius is sqrt(-2 ln u). u is (word + 1/2) / 2^32, its distance from the nearer of 0 and 1 being rounded
to float32: so u is never 0 or 1, the smallest distance is 2^-33, and the largest radius 6.76. The angle is
(word + 1/2) / 2^32 of a turn, its distance from the nearest quarter turn being rounded to float32.

Rounding. Integers, and float32 products, sums and square roots, each rounded by itself to nearest even, in one order.
An FMA may take the place of a product and a sum only where float32 holds the product exactly: it has the same bits
there. So every backend gives the same bits. Against the exact normal of the same u and angle the error is at
most 2 ulp, as are those of -2 ln u, of the sine and of the cosine; measured, all are below 0.9 ulp. A float64 result is
the float32 one, widened; a 16-bit one is rounded from it.

Bytes moved per element: the result, written once.

Sources: Box and Muller, Ann. Math. Statist. 29 (1958); Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3,
SC 2011.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fused_step import NAMESPACE, VELOCITY_DTYPES, library

KEYED_NOISE = (
    "keyed_noise(Tensor keys, SymInt[] x_dims, ScalarType dtype, int evaluation=0, str backend='auto') -> Tensor"
)

#: The columns of a row of keys, int64: the bits of the seed, the sample's index, the stream; and the evaluation from
#: the stream's bit 16 on, which the op's argument is joined to by `or`.
COLUMNS = ("seed", "index", "stream")

#: What the counter has room for: all are below.
INDEXES, STREAMS, EVALUATIONS, ELEMENTS = 1 << 48, 1 << 16, 1 << 16, 1 << 50


def check(keys: Tensor, x_dims: Sequence[int], dtype: torch.dtype, evaluation: int) -> None:
    """Raises where an operand breaks the contract. The values of keys, on the device, are not read.

    Args:
        keys: int64, [B, 3], contiguous: a row of `COLUMNS` for each sample.
        x_dims: The shape of one sample.
        dtype: float32, float64, bfloat16 or float16.
        evaluation: In [0, 2^16).

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a layout or the evaluation is wrong.
    """
    if keys.dtype != torch.int64:
        raise TypeError(f"keys must be torch.int64, got {keys.dtype}")
    if keys.dim() != 2 or keys.shape[1] != len(COLUMNS) or not keys.is_contiguous():
        raise ValueError(f"keys must be contiguous, [B, {len(COLUMNS)}], got {list(keys.shape)}")
    if dtype not in VELOCITY_DTYPES:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    if not 0 <= evaluation < EVALUATIONS:
        raise ValueError(f"evaluation must be in [0, {EVALUATIONS}), got {evaluation}")
    elements = 1
    for size in x_dims:
        if size < 0:
            raise ValueError(f"x_dims must not be negative, got {list(x_dims)}")
        elements *= size
    if elements >= ELEMENTS:
        raise ValueError(f"a sample must have fewer than 2^50 elements, got {elements}")


def at_evaluations(keys: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
    """The keys of the draws `first` to first + count - 1, each [B, 3], as the fused step takes them.

    Args:
        keys: int64, [B, 3].
        first: An evaluation.
        count: How many.

    Raises:
        ValueError: an evaluation is not in [0, 2^16).
    """
    if not 0 <= first <= first + count <= EVALUATIONS:
        raise ValueError(f"evaluation must be in [0, {EVALUATIONS}), got {first} to {first + count - 1}")
    evaluations = torch.arange(first << 16, (first + count) << 16, 1 << 16, device=keys.device)
    # To the stream, the last column, whose bits are below: a sum joins them.
    return (keys + torch.nn.functional.pad(evaluations.view(count, 1, 1), (2, 0))).unbind()


library.define(KEYED_NOISE, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake(f"{NAMESPACE}::keyed_noise", lib=library)
def _keyed_noise_fake(
    keys: Tensor, x_dims: Sequence[int], dtype: torch.dtype, evaluation: int = 0, backend: str = "auto"
) -> Tensor:
    check(keys, x_dims, dtype, evaluation)
    return keys.new_empty((keys.shape[0], *x_dims), dtype=dtype)
