"""The PTX executor of tests/ptx itself: what each instruction computes, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from operands import special_values
from ptx.executor import ConflictError, ContractionError, Kernel
from ptx.memory import Memory, MisalignedError, OutOfBoundsError, PoisonReadError, ReadOnlyError
from ptx.parser import UnsupportedError
from torch import Tensor

THREADS = 64
MODULE = """
.version 9.0
.target sm_90
.visible .entry kernel(.param .u64 .ptr .global .align 1 in, .param .u64 out) .maxntid {threads}, 1, 1
{{
    .reg .pred %p<4>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<9>; .reg .f64 %d<9>;
    ld.param.u64 %rd0, [in]; ld.param.u64 %rd1, [out];
    mov.u32 %r0, %tid.x;  // the thread's word of `in`: %rd2, and of `out`: %rd3
    mul.wide.u32 %rd2, %r0, {stride}; add.s64 %rd3, %rd2, %rd1; add.s64 %rd2, %rd2, %rd0;
    {body}
    ret;
}}
"""


def kernel(body: str, stride: int = 4) -> Kernel:
    return Kernel(MODULE.format(body=body, stride=stride, threads=THREADS))


def run(body: str, given: Tensor, out: Tensor, stride: int = 4, **of_input: bool) -> Tensor:
    memory = Memory()
    memory.add("in", given.data_ptr(), given.nbytes, **of_input)
    if out is not given:
        memory.add("out", out.data_ptr(), out.nbytes, poisoned=True)
    kernel(body, stride).launch((1, 1, 1), memory, [given.data_ptr(), out.data_ptr()])
    return out


def numbers(dtype: torch.dtype, count: int = THREADS) -> Tensor:
    """Special values, normal ones far apart, denormals."""
    spread = torch.randn(count, dtype=torch.float64) * torch.exp2(torch.randint(-30, 12, (count,)).double())
    special = special_values(dtype)
    x = spread.to(dtype)
    x[: len(special)] = special
    return x[torch.randperm(count)]


# ---- floats: as PyTorch rounds them ----

REGISTER = {torch.float32: "f", torch.float64: "d", torch.bfloat16: "h", torch.float16: "h"}
KIND = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
OPERATIONS = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}


@pytest.mark.parametrize("dtype", KIND, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_float_operations(name: str, dtype: torch.dtype) -> None:
    x = torch.stack([numbers(dtype), numbers(dtype)], dim=1)
    size, r = dtype.itemsize, REGISTER[dtype]
    word = f"b{8 * size}"
    body = f"ld.global.v2.{word} {{%{r}1, %{r}2}}, [%rd2]; {name}.rn.{KIND[dtype]} %{r}3, %{r}1, %{r}2;"
    body += f"st.global.{word} [%rd3], %{r}3;"
    out = run(body, x, torch.empty_like(x), 2 * size)[:, 0]
    wanted = OPERATIONS[name](*x.double().unbind(1)).to(dtype) if size < 4 else OPERATIONS[name](*x.unbind(1))
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit() & ~out.isnan(), wanted.signbit() & ~wanted.isnan())


def test_quotients_roots_and_integers_as_floats() -> None:
    """Correctly rounded: by exact fractions, for a root its square between those of the neighbours' midpoints."""
    x, y = 1 + torch.rand(THREADS), 1 + torch.rand(THREADS)
    both = torch.stack([x, y], dim=1)
    load, store = "ld.global.v2.f32 {%f1, %f2}, [%rd2];", "st.global.f32 [%rd3], %f3;"
    quotient, root = (
        run(f"{load} {body}; {store}", both, torch.empty_like(both), 8)[:, 0].tolist()
        for body in ("div.rn.f32 %f3, %f1, %f2", "sqrt.rn.f32 %f3, %f1")
    )
    halves = [Fraction(float(np.spacing(np.float32(z)))) / 2 for z in (*quotient, *root)]
    for a, b, q, r, h, k in zip(x.tolist(), y.tolist(), quotient, root, halves, halves[THREADS:], strict=False):
        assert abs(Fraction(q) - Fraction(a) / Fraction(b)) <= h
        assert (Fraction(r) - k) ** 2 <= Fraction(a) <= (Fraction(r) + k) ** 2
    given = torch.randint(-(2**31), 2**31, (THREADS,), dtype=torch.int64).to(torch.int32)
    for kind, wanted in (("s32", given.double()), ("u32", given.double() % 2**32)):
        body = f"ld.global.b32 %r1, [%rd2]; cvt.rn.f32.{kind} %f1, %r1; st.global.f32 [%rd3], %f1;"
        assert torch.equal(run(body, given, torch.empty(THREADS)), wanted.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_pairs_of_16_bits(name: str, dtype: torch.dtype) -> None:
    """Two at once, as each alone: float64 holds the exact result of these operands."""
    x, y = torch.randn(2 * THREADS).to(dtype), torch.randn(2 * THREADS).to(dtype)
    both = torch.stack([x.view(-1, 2), y.view(-1, 2)], dim=1).contiguous()
    body = f"ld.global.v2.b32 {{%r1, %r2}}, [%rd2]; {name}.rn.{KIND[dtype]}x2 %r3, %r1, %r2; st.global.b32 [%rd3], %r3;"
    out = run(body, both, torch.empty_like(both), 8)[:, 0].flatten()
    assert torch.equal(out, OPERATIONS[name](x.double(), y.double()).to(dtype))


@pytest.mark.parametrize("name", OPERATIONS)
def test_pairs_of_float32(name: str) -> None:
    x, y = torch.randn(2 * THREADS), torch.randn(2 * THREADS)
    both = torch.stack([x.view(-1, 2), y.view(-1, 2)], dim=1).contiguous()
    body = f"ld.global.v2.b64 {{%rd4, %rd5}}, [%rd2]; {name}.rn.f32x2 %rd6, %rd4, %rd5; st.global.b64 [%rd3], %rd6;"
    out = run(body, both, torch.empty_like(both), 16)[:, 0].flatten()
    assert torch.equal(out, OPERATIONS[name](x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sum_of_float32_and_16_bits(dtype: torch.dtype) -> None:
    x, y = numbers(dtype), torch.randn(THREADS)
    both = torch.stack([x.float(), y], dim=1)
    body = f"ld.global.v2.f32 {{%f1, %f2}}, [%rd2]; cvt.rn.{KIND[dtype]}.f32 %h1, %f1;"
    body += f"add.rn.f32.{KIND[dtype]} %f3, %h1, %f2; st.global.f32 [%rd3], %f3;"
    out = run(body, both, torch.empty_like(both), 8)[:, 0]
    torch.testing.assert_close(out, x.float() + y, rtol=0, atol=0, equal_nan=True)


def test_multiply_add_rounds_once() -> None:
    """Which a product and a sum do not: what a contraction would change shows."""
    x = torch.randn(THREADS, 4) * torch.tensor([1.0, 1.0, 2.0**-6, 1.0])
    body = "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd2]; fma.rn.f32 %f5, %f1, %f2, %f3; st.global.f32 [%rd3], %f5;"
    out = run(body, x, torch.empty_like(x), 16)[:, 0]
    a, b, c, _ = x.unbind(1)
    for got, *operands in zip(out.tolist(), a.tolist(), b.tolist(), c.tolist(), strict=True):
        exact = Fraction(operands[0]) * Fraction(operands[1]) + Fraction(operands[2])
        near = np.float32(got)
        neighbours = [np.nextafter(near, np.float32(side * np.inf)) for side in (-1, 1)]
        assert all(abs(Fraction(float(near)) - exact) <= abs(Fraction(float(n)) - exact) for n in neighbours)
    assert not torch.equal(out, a * b + c)


@pytest.mark.parametrize(
    ("source", "target"),
    [(s, t) for s in KIND for t in KIND if s != t and {s.itemsize, t.itemsize} not in ({2}, {2, 8})],
    ids=str,
)
def test_conversions_of_floats(source: torch.dtype, target: torch.dtype) -> None:
    """All to nearest even, in one rounding; ties too."""
    x = numbers(source)
    if target.itemsize < source.itemsize:  # halfway between two values of the target
        ulp = torch.finfo(target).eps
        x[: THREADS // 2] = (1 + ulp * (torch.arange(THREADS // 2).double() + 0.5)).to(source)
    s, t = REGISTER[source], REGISTER[target]
    rounding = ".rn" if target.itemsize < source.itemsize else ""
    body = f"ld.global.b{8 * source.itemsize} %{s}1, [%rd2]; cvt{rounding}.{KIND[target]}.{KIND[source]} %{t}2, %{s}1;"
    body += f"st.global.b{8 * target.itemsize} [%rd3], %{t}2;"
    stride = max(source.itemsize, target.itemsize)
    given = torch.zeros(THREADS, stride // source.itemsize, dtype=source)
    given[:, 0] = x
    out = run(body, given, torch.empty(THREADS, stride // target.itemsize, dtype=target), stride)[:, 0]
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_conversion(dtype: torch.dtype) -> None:
    """The first source goes into the upper half."""
    x = torch.stack([numbers(torch.float32), numbers(torch.float32)], dim=1)
    body = (
        f"ld.global.v2.f32 {{%f1, %f2}}, [%rd2]; cvt.rn.{KIND[dtype]}x2.f32 %r1, %f2, %f1; st.global.b32 [%rd3], %r1;"
    )
    out = run(body, x, torch.empty(THREADS, 4, dtype=dtype), 8)[:, :2]
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- integers, predicates, control: one line of PTX, and the same in Python ----

SIGNED = 1 << 31
INTEGERS = {
    "add.s32 %r3, %r1, %r2": lambda x, y: x + y,
    "sub.s32 %r3, %r1, %r2": lambda x, y: x - y,
    "mul.lo.s32 %r3, %r1, %r2": lambda x, y: x * y,
    "mad.lo.s32 %r3, %r1, %r2, 5": lambda x, y: x * y + 5,
    "min.s32 %r3, %r1, %r2": min,
    "max.s32 %r3, %r1, %r2": max,
    "min.u32 %r3, %r1, %r2": lambda x, y: min(x % 2**32, y % 2**32),
    "div.u32 %r3, %r1, %r2": lambda x, y: x % 2**32 // (y % 2**32),
    "div.s32 %r3, %r1, %r2": lambda x, y: abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1),
    "and.b32 %r3, %r1, %r2": lambda x, y: x & y,
    "or.b32 %r3, %r1, %r2": lambda x, y: x | y,
    "xor.b32 %r3, %r1, %r2": lambda x, y: x ^ y,
    "shl.b32 %r3, %r1, 7": lambda x, y: x << 7,
    "shl.b32 %r3, %r1, 40": lambda x, y: 0,
    "shr.s32 %r3, %r1, 7": lambda x, y: x >> 7,
    "shr.u32 %r3, %r1, 7": lambda x, y: x % 2**32 >> 7,
    "bfe.u32 %r3, %r1, 7, 13": lambda x, y: x % 2**32 >> 7 & 0x1FFF,
    "bfe.u32 %r3, %r1, 24, 40": lambda x, y: x % 2**32 >> 24,
    "bfe.u32 %r3, %r1, 32, 8": lambda x, y: 0,
    "bfe.u32 %r3, %r1, 3, 0": lambda x, y: 0,
    "neg.f32 %r3, %r1": lambda x, y: x ^ SIGNED,
    "neg.s32 %r3, %r1": lambda x, y: -x,
    "not.b32 %r3, %r1": lambda x, y: ~x,
    "mul.hi.u32 %r3, %r1, %r2": lambda x, y: (x % 2**32) * (y % 2**32) >> 32,
    "mov.pred %p1, -1; not.pred %p2, %p1; selp.b32 %r3, %r1, %r2, %p2": lambda x, y: y,
    "cvt.u64.u32 %rd4, %r1; shr.u64 %rd4, %rd4, 1; cvt.u32.u64 %r3, %rd4": lambda x, y: x % 2**32 >> 1,
    "cvt.u16.u32 %h1, %r1; cvt.u32.u16 %r3, %h1": lambda x, y: x % 2**16,
    "mul.wide.u32 %rd4, %r1, %r2; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r3, %rd4": lambda x, y: (
        (x % 2**32) * (y % 2**32) >> 32
    ),
    "mov.b64 %rd4, {%r1, %r2}; mul.hi.u64 %rd5, %rd4, %rd4; cvt.u32.u64 %r3, %rd5": lambda x, y: (
        (x % 2**32 + (y % 2**32 << 32)) ** 2 >> 64
    ),
    "mov.b64 %rd4, {%r1, %r2}; mov.b64 {_, %r3}, %rd4": lambda x, y: y,
    "mov.b32 {%h1, %h2}, %r1; mov.b32 %r3, {%h2, %h1}": lambda x, y: x >> 16 & 0xFFFF | (x & 0xFFFF) << 16,
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r3, %r1, %r2, %p1": min,
    "setp.ge.s32 %p1, %r1, 0; setp.ne.s32 %p2, %r2, -7; and.pred %p3, %p1, %p2; selp.b32 %r3, 1, 0, %p3": lambda x, y: (
        x >= 0 and y != -7
    ),
    "mov.u32 %r3, 3; setp.eq.s32 %p1, %r2, -7; @%p1 mov.u32 %r3, 4": lambda x, y: 4 if y == -7 else 3,
    "mov.u32 %r3, 3; setp.eq.s32 %p1, %r2, -7; @!%p1 mov.u32 %r3, 4": lambda x, y: 3 if y == -7 else 4,
    "setp.lt.s32 %p1, %r1, 0; @%p1 bra L1; mov.u32 %r3, 1; bra.uni L2; L1: mov.u32 %r3, 2; L2: add.s32 %r3, %r3, %r2": (
        lambda x, y: (2 if x < 0 else 1) + y
    ),
    "mov.u32 %r3, 0; L1: add.s32 %r3, %r3, 2; setp.lt.s32 %p1, %r3, %r0; @%p1 bra L1; sub.s32 %r3, %r3, %r0": (
        lambda x, y: None
    ),
    "{ .reg .b32 %r3; mov.u32 %r3, 9; } mov.u32 %r3, %r1": lambda x, y: x,  # a scope's own register
}


@pytest.mark.parametrize("body", INTEGERS)
def test_integers_and_control(body: str) -> None:
    x = torch.randint(-(2**31), 2**31, (THREADS, 2), dtype=torch.int64).to(torch.int32)
    x[::3, 1] = -7
    load, store = "ld.global.v2.u32 {%r1, %r2}, [%rd2];", "st.global.u32 [%rd3], %r3;"
    got = run(f"{load} {body}; {store}", x, torch.empty_like(x), 8)[:, 0].tolist()
    wanted = [INTEGERS[body](a, b) for a, b in x.tolist()]
    if wanted[0] is None:  # each thread leaves the loop in its own time
        wanted = [2 if thread == 0 else thread % 2 for thread in range(THREADS)]
    assert [value % 2**32 for value in got] == [int(value) % 2**32 for value in wanted]


@pytest.mark.parametrize(("comparison", "of_nan"), [("neu", True), ("ne", False), ("gt", False), ("eq", False)])
def test_comparisons_of_nan(comparison: str, of_nan: bool) -> None:
    x = torch.full((THREADS,), torch.nan)
    body = f"ld.global.f32 %f1, [%rd2]; setp.{comparison}.f32 %p1, %f1, 0f00000000;"
    body += "selp.f32 %f2, 0f3F800000, 0f00000000, %p1; st.global.f32 [%rd3], %f2;"
    assert run(body, x, torch.empty_like(x)).tolist() == [float(of_nan)] * THREADS


def test_threads_that_left_do_nothing() -> None:
    x = torch.arange(THREADS, dtype=torch.int32)
    out = torch.full_like(x, -1)
    body = "ld.global.u32 %r1, [%rd2]; setp.ge.u32 %p1, %r1, 40; @%p1 bra L1; st.global.u32 [%rd3], %r1; L1:"
    assert run(body, x, out).tolist() == [*range(40), *[-1] * 24]


# ---- shared memory, barriers, warps ----

SHARED = ".shared .align 16 .b8 held[256]; mov.u32 %r2, held; shl.b32 %r3, %r0, 2; add.s32 %r4, %r2, %r3;"
HAND_OVER = SHARED + "ld.global.b32 %r1, [%rd2]; st.shared.b32 [%r4], %r1; {} xor.b32 %r5, %r4, 252; {}"
TAKE = "ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd3], %r6;"


def test_shared_memory() -> None:
    """The array backwards: by another thread's word, behind a barrier; addresses of 32 bits wrap."""
    x = torch.arange(THREADS, dtype=torch.int32)
    for take in (TAKE, "sub.s32 %r5, %r5, 256;" + TAKE.replace("[%r5]", "[%r5+256]")):
        assert torch.equal(run(HAND_OVER.format("bar.sync 0;", take), x, torch.empty_like(x)), x.flip(0))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (HAND_OVER.format("", TAKE), "thread 0 reads what another has written without a barrier"),
        (HAND_OVER.format("bar.sync 0;", TAKE + "st.shared.b32 [%r4], %r1;"), "writes what another has read without"),
        (HAND_OVER.format("", "st.shared.b32 [%r5], %r1;"), "writes what another has written without"),
        (SHARED + "st.shared.b32 [%r2], %r0;", "writes what another writes"),
        (SHARED + "ld.shared.b32 %r6, [%r4];", "reads shared memory before it is written"),
        (SHARED + "st.shared.b32 [%r4+4], %r0;", "out-of-bounds 4-byte access at 256 of 256 shared bytes"),
        (SHARED + "st.shared.b32 [%r4+2], %r0;", "misaligned 4-byte access of shared memory"),
        ("setp.lt.u32 %p1, %r0, 9; @%p1 bar.sync 0;", "threads of one block do not all come here"),
        (
            "setp.lt.u32 %p1, %r0, 9; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;",
            "threads of one warp do not all",
        ),
    ],
)
def test_threads_that_do_not_wait_for_each_other(body: str, told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        run(body, torch.zeros(THREADS), torch.zeros(THREADS))


def test_a_barrier_takes_no_note_of_threads_that_left() -> None:
    x = torch.zeros(THREADS, dtype=torch.int32)
    run("setp.lt.u32 %p1, %r0, 9; @%p1 ret; bar.sync 0; st.global.b32 [%rd3], %r0;", x, x)
    assert x.tolist() == [*[0] * 9, *range(9, THREADS)]


def test_lanes_exchange_within_their_warp() -> None:
    x = torch.arange(THREADS, dtype=torch.int32)
    body = "ld.global.b32 %r1, [%rd2]; shfl.sync.bfly.b32 %r2, %r1, 17, 31, -1; st.global.b32 [%rd3], %r2;"
    assert run(body, x, torch.empty_like(x)).tolist() == [lane ^ 17 for lane in range(THREADS)]


# ---- what is refused ----

COPY = "ld.global.b32 %r1, [%rd2]; st.global.b32 [%rd3], %r1;"


def test_out_of_bounds() -> None:
    x, out = torch.zeros(THREADS + 8), torch.zeros(THREADS + 8)
    with pytest.raises(OutOfBoundsError, match=r"PTX line \d+: `ld.global.b32 .*in\+252 \(252 bytes\)"):
        run(COPY, x[: THREADS - 1], out)
    with pytest.raises(OutOfBoundsError, match=r"`st.global.b32 .*out\+252"):
        run(COPY, x, out[: THREADS - 1])
    with pytest.raises(OutOfBoundsError, match="a null pointer"):
        run("mov.u64 %rd2, 0; ld.global.b32 %r1, [%rd2];", x, out)


def test_misaligned() -> None:
    x = torch.zeros(4 * THREADS + 8)
    x = x[-x.data_ptr() // 4 % 4 :]  # on 16 bytes
    body = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2];"
    run(body, x, torch.empty(THREADS), 16)
    for first in (1, 2):
        with pytest.raises(MisalignedError, match="misaligned 16-byte access at in\\+0"):
            run(body, x[first:], torch.empty(THREADS), 16)


def test_poison() -> None:
    x = torch.zeros(THREADS)
    with pytest.raises(PoisonReadError, match=r"reads in\+0 before it is written"):
        run(COPY, x, torch.empty(THREADS), poisoned=True)
    run("mov.u32 %r2, 5; st.global.b32 [%rd2], %r2;" + COPY, x, torch.empty(THREADS), poisoned=True)


def test_read_only() -> None:
    x = torch.zeros(THREADS)
    with pytest.raises(ReadOnlyError, match="writes in, which is only read"):
        run("st.global.b32 [%rd2], %r0;", x, torch.empty(THREADS), read_only=True)


def test_conflicts() -> None:
    """Two threads at one byte, in whichever order they came."""
    x = torch.zeros(THREADS + 1)
    with pytest.raises(ConflictError, match="two threads write one byte"):
        run("st.global.b32 [%rd1], %r0;", torch.zeros(THREADS), x)
    steps = ["ld.global.b32 %r1, [%rd3+4];", "setp.lt.u32 %p1, %r0, 63;", "@%p1 st.global.b32 [%rd3], %r0;"]
    for order in (" ".join(steps), " ".join([*steps[1:], steps[0]])):
        with pytest.raises(ConflictError, match="reads what another writes"):
            run(order, x, x)
    run("ld.global.b32 %r1, [%rd3]; st.global.b32 [%rd3], %r1;", x, x)


def test_what_has_been_moved() -> None:
    """By region and opcode, threads that are masked left out."""
    x, out = torch.zeros(THREADS), torch.empty(THREADS)
    memory = Memory()
    memory.add("in", x.data_ptr(), x.nbytes)
    memory.add("out", out.data_ptr(), out.nbytes)
    body = "ld.global.cs.b32 %r1, [%rd2]; setp.lt.u32 %p1, %r0, 10; @%p1 st.global.b32 [%rd3], %r1;"
    kernel(body).launch((1, 1, 1), memory, [x.data_ptr(), out.data_ptr()])
    assert memory.moved == {("load", "in", "ld.global.cs.b32"): 256, ("store", "out", "st.global.b32"): 40}


def test_contraction() -> None:
    """A product and a sum that do not say how they round may become one multiply-add."""
    body = "mul{} %f3, %f1, %f2; add{} %f4, %f3, %f1;"
    kernel(body.format(".rn.f32", ".rn.f32"))
    with pytest.raises(ContractionError, match=r"add.f32 %f4, %f3, %f1"):
        kernel(body.format(".f32", ".f32"))


@pytest.mark.parametrize(
    "text",
    [
        "add.ftz.f32 %f1, %f2, %f3",
        "mul.rz.f32 %f1, %f2, %f3",
        "rcp.approx.f32 %f1, %f2",
        "ld.local.f32 %f1, [%rd2]",
        "sqrt.approx.f32 %f1, %f2",
        "div.full.f32 %f1, %f2, %f3",
        "shfl.sync.down.b32 %r1, %r2, 1, 31, -1",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 15, -1",
        "ld.volatile.global.f32 %f1, [%rd2]",
        "bar.sync 1",
        "bar.arrive 0, 64",
        "cvt.rz.f32.s32 %f1, %r1",
        "fma.rn.f64 %d1, %d2, %d3, %d4",
        "frobnicate.b32 %r1, %r2",
    ],
)
def test_unknown(text: str) -> None:
    with pytest.raises(UnsupportedError, match=r"PTX line \d+"):
        kernel(f"{text};")


def test_the_address_of_a_parameter() -> None:
    """`mov` takes it, and ld.param reads from there; not outside of the parameters, nor at another for each thread."""
    given, out = torch.arange(THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    read = "mov.b64 %rd4, out; ld.param.u64 %rd5, [%rd4+-8]; sub.s64 %rd5, %rd5, %rd0;"  # `in` stands before `out`
    got = run(f"{read} cvt.u32.u64 %r1, %rd5; st.global.u32 [%rd3], %r1;", given, out)
    assert got.tolist() == [0] * THREADS
    for wrong in ("[%rd4+8]", "[%rd2]"):
        with pytest.raises(UnsupportedError):
            run(f"mov.b64 %rd4, out; ld.param.u64 %rd5, {wrong};", given, out)
