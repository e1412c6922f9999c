"""The `triton` backend: one Triton kernel for CUDA and ROCm, and for the CPU under TRITON_INTERPRET=1.

Names and rounding are those of `ops.fused_step`, the contract, and of `ops.reference`, the definition of right.

One compilation serves every size, row and slot: a variant is the dtypes, the operands present, the rounding,
the form of guidance and the alignment class (16-byte accesses, or single elements). Nothing else specialises.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import cuda_driver
from .fused_step import FROM_UNGUIDED, PROMOTE, ROUNDED, WEIGHTED, Operands, check_overlap, dense, is_keys
from .triton_launcher import Launcher
from .triton_normals import normals, words

#: Elements of a block without 16-byte accesses, and threads of every block.
_SCALAR_BLOCK = 512
THREADS = 128


def launch_options(warp_size: int = 64 if torch.version.hip else 32, threads: int = THREADS) -> dict[str, object]:
    """How to compile for a device with warps of 32 threads (NVIDIA) or 64 (AMD's CDNA).

    128 threads either way, each of which makes one 16-byte access an operand. Rounding stays as written only
    without contraction: said here, since Triton's default for it has changed before.
    """
    return {"num_warps": threads // warp_size, "enable_fp_fusion": False}


_LAUNCH_OPTIONS = launch_options()

_WEIGHTED, _FROM_UNGUIDED = tl.constexpr(WEIGHTED), tl.constexpr(FROM_UNGUIDED)

_PROMOTE, _ROUNDED = tl.constexpr(PROMOTE), tl.constexpr(ROUNDED)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Not one argument may specialise: by value (1, multiples of 16) or by address a launch would compile again.
_RUNTIME_ARGUMENTS = (
    "out",
    "base",
    "v",
    "u",
    "h1",
    "h2",
    "h3",
    "coefficients",
    "trajectory",
    "history",
    "strength",
    "row",
    "numel",
    "sample",
    "slots",
    "slot",
    "span",
)


@triton.jit
def _to_bfloat16(x):
    """float32 to bfloat16, to nearest even; one `cvt.rn` where compiled.

    Triton's interpreter truncates (507 of 1,000 random values differ), so there it is rounded by integers.
    """
    if _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(tl.bfloat16)
    return y


@triton.jit
def _from_bfloat16(x):
    """bfloat16 to float32, exactly; one `cvt` where compiled. Triton's interpreter gets 254 denormals wrong."""
    if _INTERPRETED:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """float32 or float64 x, rounded to DTYPE; a float64 goes to 16 bits by way of float32, as in PyTorch."""
    if DTYPE == tl.bfloat16:
        y = _to_bfloat16(x.to(tl.float32))
    elif DTYPE == tl.float16:
        y = x.to(tl.float32).to(tl.float16)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def _widened(x, DTYPE: tl.constexpr):
    """x in the wider float32 or float64, exactly; 16 bits go by way of float32."""
    if x.dtype == tl.bfloat16:
        y = _from_bfloat16(x).to(DTYPE)
    elif x.dtype == tl.float16:
        y = x.to(tl.float32).to(DTYPE)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def _product(b, h, A: tl.constexpr, DTYPE: tl.constexpr):
    """b*h, multiplied in A, rounded to DTYPE, in A."""
    return _widened(_rounded(b * _widened(h, A), DTYPE), A)


@triton.jit
def _sum(x, product, A: tl.constexpr, DTYPE: tl.constexpr):
    """x + product, added in A, rounded to DTYPE. 16-bit operands may be added as such: the bits agree."""
    return _rounded(_widened(x, A) + product, DTYPE)


@triton.jit
def _as_entered(b, V: tl.constexpr, A: tl.constexpr, rounding: tl.constexpr):
    """b_k as it enters the product: rounded to the velocity's dtype first with ROUNDED."""
    if rounding == _ROUNDED:
        b = _widened(_rounded(b, V), A)
    return b


@triton.jit
def _plus(x, product, b, own_rows: tl.constexpr, A: tl.constexpr, DTYPE: tl.constexpr):
    """x + product; with rows of their own x alone where b, the term's coefficient, is 0."""
    y = _sum(x, product, A, DTYPE)
    if own_rows:
        y = tl.where(b != 0, y, x)
    return y


@triton.jit
def _elements(pointer, offset, VECTOR: tl.constexpr):
    """Addresses of the elements at `offset`; the hint says that VECTOR of them make one aligned access.

    16 bytes over the widest dtype, for every operand: then each thread holds the same elements of all of
    them, and none goes through shared memory to meet another.
    """
    pointers = pointer + offset
    if VECTOR > 1:
        width: tl.constexpr = VECTOR * pointer.dtype.element_ty.primitive_bitwidth // 8
        pointers = tl.multiple_of(tl.max_contiguous(pointers, VECTOR), width)
    return pointers


@triton.jit
def _quotients(start, size, BLOCK: tl.constexpr):
    """(start + j) // size for this block's elements j, as that of `start` and how much more each is.

    One 64-bit division a block and none an element: with k elements of the first part of that size before `start`,
    element j is q = (j + k) // size parts further. For j + k < 2^11 and a divisor D <= 2^10 that is
    ((j + k) * ceil(2^21 / D)) >> 21 in 32 bits: the quotient is too large by less than 2^-10 <= 1/D.
    """
    tl.static_assert(BLOCK <= 1024)
    first = start // size
    left = size - (start - first * size)  # of the first part, from `start` on
    # A part longer than a block ends in it at most once: as if it were as long as the block.
    divisor = tl.minimum(size, BLOCK).to(tl.uint32)
    before = divisor - tl.minimum(left, BLOCK).to(tl.uint32)
    inverse = ((1 << 21) + divisor - 1) // divisor
    q = ((tl.arange(0, BLOCK).to(tl.uint32) + before) * inverse) >> 21
    return first, q


@triton.jit
def _trajectory_offset(start, sample, slots, slot, BLOCK: tl.constexpr):
    """Where this block's elements stand in trajectory[:, slot]: i + (i // sample * (slots-1) + slot) * sample."""
    sample = sample.to(tl.int64)  # the interpreter passes a small integer as int32, whatever the annotation
    first, q = _quotients(start, sample, BLOCK)
    stride = (slots - 1) * sample
    return (start + slot * sample + first * stride) + (q.to(tl.int64) * stride + tl.arange(0, BLOCK))


@triton.jit
def drawn(keys, start, numel, sample, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Normals of this block's elements by keys [numel / sample, 3]: `ops.keyed_noise`, evaluation 0.

    A thread makes what it needs: of a counter's four normals with VECTOR 4 or 8 all, with 2 two, with 1 one. So none
    goes through shared memory.
    """
    sample = sample.to(tl.int64)
    # Elements for which a thread computes one counter.
    EACH: tl.constexpr = 4 if VECTOR > 2 else VECTOR
    first, q = _quotients(start // EACH, sample // EACH, BLOCK // EACH)
    q = q.to(tl.int64)
    i = start + tl.arange(0, BLOCK // EACH) * EACH
    within = i < numel
    number = first + tl.where(within, q, 0)
    element = i - number * sample
    w0, w1, w2, w3 = words(keys + number * 3, element // 4, 0, within)
    if EACH == 4:
        z0, z1 = normals(w0, w1)
        z2, z3 = normals(w2, w3)
        z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        later = element % 4 >= 2
        z0, z1 = normals(tl.where(later, w2, w0), tl.where(later, w3, w1))
        z = tl.interleave(z0, z1) if EACH == 2 else tl.where(element % 2 == 0, z0, z1)
    return z


@triton.jit(do_not_specialize=_RUNTIME_ARGUMENTS)
def fused_step_kernel(
    out,
    base,
    v,
    u,
    h1,
    h2,
    h3,
    coefficients,
    trajectory,
    history,
    strength,
    row: tl.int64,
    numel: tl.int64,
    sample: tl.int64,
    slots: tl.int64,
    slot: tl.int64,
    span: tl.int64,
    rounding: tl.constexpr,
    guidance: tl.constexpr,
    sum_first: tl.constexpr,
    own_rows: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of `ops.fused_step`; names agree.

    Bytes moved per element are the least possible: |S| for base and |V| for v read, |S| for out written;
    |V| more read for u, |A| for each of h1..h3; |S| more written for trajectory, |A| for history. Float32
    with a bfloat16 velocity: 10, guided 12, guided with a trajectory 16. Once a block, the coefficients used.

    Args:
        out: OUT[numel]; may be base.
        base: B[numel]; S is the dtype that B and OUT promote to, most often both.
        v, u: V[numel]; u may be None.
        h1, h2, h3: A[numel], or None; A is the coefficients' dtype. Or h1 is keys of noise, int64[numel / sample, 3].
        coefficients: A[rows, 8], or with rows of their own A[rows, numel / span, 8].
        trajectory: OUT[numel / sample, slots, sample], or None.
        history: A[numel], or None; may be one of h1..h3.
        strength: OUT[numel], or None.
        row, slot: Which row of coefficients, the first of several, and which slot of the trajectory.
        numel, sample, slots: Elements of the state, elements of one sample, slots of the trajectory. With keys and
            VECTOR more than 1, sample is a multiple of four.
        span: With rows of their own, the elements that each covers: with VECTOR more than 1 a multiple of it.
        rounding: What products b_k*h_k are rounded to: PROMOTE, EXACT or ROUNDED.
        guidance: How u and v are combined: WEIGHTED, FROM_UNGUIDED or FROM_GUIDED.
        sum_first: The terms are added before they are multiplied, by a and c.
        own_rows: The elements have rows of their own: each loads its coefficients, most often from the L1 cache.
        VECTOR: The alignment class: elements of one access, or 1. With more than 1, numel and sample are
            multiples of VECTOR, and each pointer of VECTOR elements.
        BLOCK: Elements of a block, a power of two up to 1024.
    """
    OUT: tl.constexpr = out.dtype.element_ty
    B: tl.constexpr = base.dtype.element_ty
    V: tl.constexpr = v.dtype.element_ty
    A: tl.constexpr = coefficients.dtype.element_ty
    S: tl.constexpr = OUT if OUT == B else tl.float32
    P: tl.constexpr = S if rounding == _PROMOTE else V

    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64: a state may hold over 2^31 elements
    offset = start + tl.arange(0, BLOCK)
    mask = offset < numel
    if VECTOR > 1:
        mask = tl.max_constancy(mask, VECTOR)

    # Every load is issued before the first result is waited for. v and u are dead after their read: out of the
    # cache first. The state stays, the model reads it next; so does the history: k1 of rk4 is read again by its
    # last row, and Adams-Bashforth's velocities by the next steps.
    x = tl.load(_elements(base, offset, VECTOR), mask)
    h0 = tl.load(_elements(v, offset, VECTOR), mask, eviction_policy="evict_first")
    row_of = coefficients + row.to(tl.int64) * 8  # a, b0..b3, w0, w1, c
    if own_rows:
        first, q = _quotients(start, span.to(tl.int64), BLOCK)
        row_of += (first + tl.where(mask, q, 0).to(tl.int64)) * 8
    a = tl.load(row_of)
    b0 = tl.load(row_of + 1)
    if u is not None:
        h0_unguided = tl.load(_elements(u, offset, VECTOR), mask, eviction_policy="evict_first")
        w1 = tl.load(row_of + 6)
        if guidance == _WEIGHTED:
            w0 = tl.load(row_of + 5)
    if strength is not None:
        factor = tl.load(_elements(strength, offset, VECTOR), mask)
    if h1 is not None:
        if h1.dtype.element_ty == tl.int64:
            h1_ = drawn(h1, start, numel, sample, VECTOR, BLOCK).to(A)
        else:
            h1_ = tl.load(_elements(h1, offset, VECTOR), mask)
        b1 = tl.load(row_of + 2)
    if h2 is not None:
        h2_ = tl.load(_elements(h2, offset, VECTOR), mask)
        b2 = tl.load(row_of + 3)
    if h3 is not None:
        h3_ = tl.load(_elements(h3, offset, VECTOR), mask)
        b3 = tl.load(row_of + 4)
    if history is not None or sum_first:
        c = tl.load(row_of + 7)
    if trajectory is not None:  # its two divisions pass while the loads are on their way
        place = _trajectory_offset(start, sample, slots, slot, BLOCK)

    if u is not None:
        # Weights in the velocity's own arithmetic dtype: float32 for a float32 velocity of a float64 state.
        W: tl.constexpr = tl.float64 if V == tl.float64 else tl.float32
        if guidance == _WEIGHTED:
            h0 = _sum(_product(w0.to(W), h0_unguided, W, V), _product(w1.to(W), h0, W, V), W, V)
        else:
            difference = _rounded(_widened(h0, W) - _widened(h0_unguided, W), V)
            from_ = h0_unguided if guidance == _FROM_UNGUIDED else h0
            h0 = _sum(from_, _product(w1.to(W), difference, W, V), W, V)

    if sum_first:
        if h3 is not None:
            result = _rounded(b3 * h3_, S)
            pair = _rounded(h2_ + h1_, S)
            result = _sum(result, _product(b1, pair, A, S), A, S)
        elif h2 is not None:
            result = _rounded(b2 * h2_, S)
            result = _sum(result, _product(b1, h1_, A, S), A, S)
        elif h1 is not None:
            result = _rounded(b1 * h1_, S)
        newest = _product(b0, h0, A, S)
        result = _rounded(newest, S) if h1 is None else _sum(result, newest, A, S)
        result = _sum(x, _product(c, _rounded(a * _widened(result, A), S), A, S), A, S)
    else:
        result = _rounded(a * _widened(x, A), S)
        newest = _product(_as_entered(b0, V, A, rounding), h0, A, P)
        if strength is not None:
            newest = _product(newest, factor, A, S)
        result = _plus(result, newest, b0, own_rows, A, S)
        if h1 is not None:
            result = _plus(result, _product(_as_entered(b1, V, A, rounding), h1_, A, P), b1, own_rows, A, S)
        if h2 is not None:
            result = _plus(result, _product(_as_entered(b2, V, A, rounding), h2_, A, P), b2, own_rows, A, S)
        if h3 is not None:
            result = _plus(result, _product(_as_entered(b3, V, A, rounding), h3_, A, P), b3, own_rows, A, S)
    if OUT != S:
        result = _rounded(_widened(result, A), OUT)

    tl.store(_elements(out, offset, VECTOR), result, mask)
    if trajectory is not None:
        tl.store(_elements(trajectory, place, VECTOR), result, mask, eviction_policy="evict_first")
    if history is not None:
        # h0 alone where c is 0: 0*base is NaN where base is infinite, and h0 + 0 loses -0.0.
        remembered = _widened(h0, A)
        if not sum_first:
            remembered = tl.where(c != 0, remembered + c * _widened(x, A), remembered)
        tl.store(_elements(history, offset, VECTOR), remembered, mask)


def block(vector: int) -> int:
    """Elements of a block: one 16-byte access of the widest operand for each of 128 threads."""
    return THREADS * vector if vector > 1 else _SCALAR_BLOCK


def elements_per_access(dtypes: list[torch.dtype | None]) -> int:
    """16 bytes over the widest dtype of the operands: the coefficients', which do not count, then theirs.

    Keys count as what they draw, which has the coefficients' dtype.
    """
    arithmetic, *others = dtypes
    widths = [arithmetic if dtype == torch.int64 else dtype for dtype in others]
    return 16 // max(dtype.itemsize for dtype in widths if dtype is not None)


_launcher = Launcher(fused_step_kernel, _LAUNCH_OPTIONS)

#: `elements_per_access` by dtypes, rounding and form of guidance: everything in a variant but the alignment class.
_vectors: dict[object, int] = {}

#: The same by the keys of csrc/tensor_row.cpp.
_vectors_of_keys: dict[int, int] = {}


def fused_step_(o: Operands) -> None:
    """`ops.fused_step` in Triton, one launch on the current stream of out's device.

    Only v and u may be non-contiguous: each costs one copy. Of the contract, overlaps alone are checked.

    Raises:
        ValueError: operands overlap that may not, as `check_overlap` says.
    """
    check_overlap(o)
    launch(o)


def launch(o: Operands, key: int | None = None) -> None:
    """`fused_step_` unchecked: for operands that are checked already, or that the caller made.

    Args:
        o: The operands.
        key: By which `compiled` finds from now on what was launched here.
    """
    out, base, v, u, h1, h2, h3, coefficients, row = o[:9]
    rounding, guidance, sum_first, strength, trajectory, slot, history = o[9:]
    numel = sample = base.numel()
    if numel == 0:
        return
    v, slots = dense(v), 1
    # Each operand is asked once for its dtype and once for its address.
    dtypes: list[torch.dtype | None] = [coefficients.dtype, out.dtype, base.dtype, v.dtype]
    addresses = out.data_ptr() | base.data_ptr() | v.data_ptr()
    if u is None:
        guidance = WEIGHTED
    else:
        u = dense(u)
    own_rows, span = coefficients.dim() == 3, numel
    if own_rows:
        R = coefficients.shape[1]
        span, row = numel // R, row * R
    keyed = is_keys(h1)
    if trajectory is not None or keyed:
        sample = numel // base.shape[0]
    if trajectory is not None:
        slots = trajectory.shape[1]
    for optional in (u, h1, h2, h3, trajectory, history, strength):
        if optional is None:
            dtypes.append(None)
        else:
            dtypes.append(optional.dtype)
            addresses |= 0 if keyed and optional is h1 else optional.data_ptr()
    operands: object = (*dtypes, rounding, guidance, sum_first, own_rows)
    vector = _vectors.get(operands)
    if vector is None:
        vector = _vectors[operands] = elements_per_access(dtypes)
    if key is not None:
        _vectors_of_keys[key], operands = vector, key
    # numel is a multiple of sample and of span, and sample of span.
    if addresses % 16 or (span if own_rows else sample) % vector or (keyed and sample % 4):
        vector = 1
    block_size = block(vector)
    variant, blocks = (operands, vector), -(-numel // block_size)
    arguments = (
        *(out, base, v, u, h1, h2, h3, coefficients, trajectory, history, strength),
        *(row, numel, sample, slots, slot, span),
        *(rounding, guidance, sum_first, own_rows, vector, block_size),
    )
    device = out.get_device()  # -1: the CPU
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launcher(variant, blocks, arguments)
    else:
        _launcher(variant, blocks, arguments)


def compiled(key: int, device: int, aligned: bool, sample: int) -> tuple[Any, ...] | None:
    """What launches again what `launch` has launched with this key, for csrc/tensor_row.cpp; None: nothing yet.

    Args:
        key: Equal for two launches only where `launch` would launch the same kernel for both, but for alignments.
        device: The index of the operands' device, -1 for the CPU.
        aligned: The operands' addresses, but for the coefficients' and keys', are multiples of 16; and with keys a
            sample's elements a multiple of four.
        sample: The kernel's argument, or its `span` where it has one.

    Returns:
        VECTOR, BLOCK; stream, run, function, packed_metadata and threads of `triton_launcher.Known`; and the address of
        cuLaunchKernel, or 0.
    """
    vector = _vectors_of_keys.get(key)
    if vector is None:
        return None
    if not aligned or sample % vector:
        vector = 1
    known = _launcher.known((key, vector), None if device < 0 else device)
    return None if known is None else (vector, block(vector), *known[:5], cuda_driver.launch_kernel())
