"""Operands for the Triton kernel's exactness tests: guarded buffers, hostile values, and the comparison.

No test here: tests/triton_interpreter_cases.py runs them, in a process of its own.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from flowmatch_kernels.ops import reference
from flowmatch_kernels.ops.fused_step import (
    COLUMNS,
    EXACT,
    FROM_GUIDED,
    FROM_UNGUIDED,
    HELD,
    PROMOTE,
    ROUNDED,
    VELOCITY_DTYPES,
    WEIGHTED,
    Operands,
    arithmetic_dtype,
)

PAIRS = [(state, velocity) for state, velocities in VELOCITY_DTYPES.items() for velocity in velocities]
#: state and velocity dtypes that may have out in the velocity's
TAKEN = [
    (state, velocity)
    for state, velocity in product((torch.float32, torch.bfloat16, torch.float16), repeat=2)
    if state != velocity
]
FORMS = (WEIGHTED, FROM_UNGUIDED, FROM_GUIDED)
PRIME = 100_003
_CANARY = 0xA5
_MARGIN = 8192  # bytes of canary on each side: more than a block, so that a lost mask is no crash
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Case(NamedTuple):
    """One point of the exactness matrix."""

    state: torch.dtype
    velocity: torch.dtype
    guidance: int | None
    """How v and u are combined; None: there is no u."""
    terms: int
    """History terms read: h1..h3."""
    trajectory: bool
    history: bool
    """Is the history written?"""
    rounding: int
    numel: int
    aligned: bool
    sum_first: bool = False
    taken: bool = False
    """out has the velocity's dtype."""
    strength: bool = False
    """Is b0*h0 multiplied by a tensor?"""
    own_rows: bool = False
    """Has each sample its row of coefficients, or each of its tokens?"""
    keyed: bool = False
    """Is h1 noise, drawn by keys?"""

    def __str__(self) -> str:
        items = self._asdict().items()
        later = "own_rows", "keyed"  # than the seeds of the operands, which these words are
        named = [(name, value) for name, value in items if name not in later or value]
        return " ".join(f"{name}={value}".replace("torch.", "") for name, value in named)


def combinations(state: torch.dtype, velocity: torch.dtype, numel: int, aligned: bool) -> Iterator[Case]:
    """80 sets of operands for these dtypes and this size.

    All without guidance and with its weighted form; the two forms by differences take turns at what is written.
    """
    for guidance, *switches, to_velocity in product((None, *FORMS), range(4), *[(False, True)] * 3):
        turn = (switches[0] + (guidance or 0)) % 4
        rounding = (EXACT, ROUNDED)[(turn + switches[1]) % 2] if to_velocity else PROMOTE
        case = Case(state, velocity, guidance, *switches, rounding, numel, aligned)
        if guidance in (None, WEIGHTED) or (case.trajectory, case.history) == (turn % 2 == 1, turn > 1):
            yield case


def special(numel: int, aligned: bool) -> Iterator[Case]:
    """The sums first, for each dtype and number of terms; out of the velocity's dtype; strength: 112 sets."""
    for k, (dtype, terms) in enumerate(product(VELOCITY_DTYPES, range(4))):
        for j in range(2):
            guidance = (None, *FORMS)[(k + terms + j) % 4]
            switches = ((k + j) % 2 == 0, (k // 2 + j) % 2 == 0)
            yield Case(dtype, dtype, guidance, terms, *switches, PROMOTE, numel, aligned, sum_first=True)
    for k, ((state, velocity), rounding, j) in enumerate(product(TAKEN, (EXACT, ROUNDED), range(4))):
        guidance, terms = (None, *FORMS)[j], (k + k // 4) % 4
        yield Case(state, velocity, guidance, terms, k % 3 > 0, k % 5 > 2, rounding, numel, aligned, taken=True)
    for k, ((state, velocity), j) in enumerate(product(PAIRS, range(4))):
        guidance, terms, rounding = (None, *FORMS)[(k + j) % 4], (0, k // 4 % 4)[j % 2], (k + k // 4) % 3
        yield Case(state, velocity, guidance, terms, k % 3 == 0, k % 5 > 2, rounding, numel, aligned, strength=True)


def own_rows(numel: int, aligned: bool) -> Iterator[Case]:
    """Rows of their own, for each pair of dtypes, and out of the velocity's: 60 sets of operands."""
    for k, ((state, velocity), j) in enumerate(product(PAIRS, range(4))):
        switches = (k % 2 == 0, k // 2 % 2 == 0)
        rounding, strength = (k + k // 4) % 3, (k + j) % 3 == 0
        case = Case(state, velocity, (None, *FORMS)[(k // 3 + j) % 4], (k + j) % 4, *switches, rounding, numel, aligned)
        yield case._replace(strength=strength, own_rows=True)
    for k, ((state, velocity), rounding, j) in enumerate(product(TAKEN, (EXACT, ROUNDED), range(2))):
        operands = (None, *FORMS)[(k + j) % 4], (k // 3 + j) % 4, k % 2 == 0, k % 4 > 1
        yield Case(state, velocity, *operands, rounding, numel, aligned, taken=True, own_rows=True)


def keyed(numel: int, aligned: bool) -> Iterator[Case]:
    """h1 is noise, for each pair of dtypes, with rows of their own and without: 72 sets of operands."""
    for k, ((state, velocity), j) in enumerate(product(PAIRS, range(8))):
        switches = (k % 2 == 0, (k // 2 + j // 4) % 2 == 0)
        form, terms, rounding = (None, *FORMS)[(k // 3 + j) % 4], 1 + (k + j) % 3, (k + k // 8) % 3
        case = Case(state, velocity, form, terms, *switches, rounding, numel, aligned, keyed=True)
        yield case._replace(strength=(k + j) % 3 == 0, own_rows=j % 2 == 1)


def eighth(cases: Iterable[Case], turn: int) -> list[Case]:
    """An eighth of the cases, by lot, which is another one in each of eight successive turns."""
    return _part(cases, turn, 8)


def quarter(cases: Iterable[Case], turn: int) -> list[Case]:
    """A quarter of the cases, by lot, which is another one in each of four successive turns."""
    return _part(cases, turn, 4)


def half(cases: Iterable[Case], turn: int) -> list[Case]:
    """A half of the cases, by lot, which is the other one in the next turn."""
    return _part(cases, turn, 2)


def _part(cases: Iterable[Case], turn: int, parts: int) -> list[Case]:
    cases = list(cases)
    random.Random(0).shuffle(cases)
    return cases[turn % parts :: parts]


class Guarded:
    """A tensor with canaries on both sides, on a 16-byte boundary or one element after it.

    Args:
        shape, dtype: The tensor's.
        aligned: Whether it begins on a multiple of 16 bytes.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        self.bytes = torch.full((size + 2 * _MARGIN + 16,), _CANARY, dtype=torch.uint8)
        start = _MARGIN + -(self.bytes.data_ptr() + _MARGIN) % 16
        start += 0 if aligned else dtype.itemsize
        self._inside = slice(start, start + size)
        self.tensor = self.bytes[self._inside].view(dtype).view(shape)
        assert size == 0 or (self.tensor.data_ptr() % 16 == 0) == aligned

    def touched(self) -> bool:
        """Whether a byte outside the tensor has changed."""
        outside = self.bytes.clone()
        outside[self._inside] = _CANARY
        return bool((outside != _CANARY).any())


def values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values, one in sixteen replaced by -0.0, 0, infinities, NaN, denormals, the largest, any bits."""
    x = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    finite = torch.finfo(dtype)
    special = torch.tensor(
        [-0.0, 0.0, torch.inf, -torch.inf, torch.nan, finite.tiny / 2, -finite.tiny / 4, finite.max, finite.tiny],
        dtype=torch.float64,
    ).to(dtype)
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    bits = _BITS[dtype.itemsize]
    anything = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator).to(bits).view(dtype)
    which = torch.rand(shape, generator=generator)
    return torch.where(which < 1 / 32, chosen, torch.where(which < 1 / 16, anything, x))


def operands(case: Case) -> tuple[Operands, dict[str, Guarded]]:
    """Operands for a case, always the same, and the guarded buffers they lie in, by name."""
    seed = zlib.crc32(str(case).encode())
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    arithmetic = arithmetic_dtype(case.state)
    batch = choose.choice([d for d in range(1, min(case.numel, 2000) + 1) if case.numel % d == 0] or [0, 3])
    if case.aligned and case.numel == 1024:  # samples of a multiple of 16 bytes, some shorter than a block
        batch = choose.choice([1, 2, 4, 8, 16, 64, 128])
    shape = (batch, case.numel // batch if case.numel else 4 - batch)
    buffers: dict[str, Guarded] = {}
    names = ["out", "base", "v", "u", "h1", "h2", "h3", "strength", "trajectory", "history"]
    shifted = {name for name in names if not case.aligned and choose.random() < 0.5}
    if not case.aligned and not shifted & {"out", "base", "v"}:
        shifted.add(choose.choice(["out", "base", "v"]))

    def buffer(name: str, dtype: torch.dtype, its_shape: tuple[int, ...] | None = None) -> Tensor:
        buffers[name] = Guarded(its_shape or shape, dtype, name not in shifted)
        return buffers[name].tensor

    def read(name: str, dtype: torch.dtype) -> Tensor:
        return buffer(name, dtype).copy_(values(shape, dtype, generator))

    h = [read(f"h{k}", arithmetic) if k <= case.terms else None for k in (1, 2, 3)]
    if case.keyed:  # the index passes 2^32; the evaluation is joined to the stream
        index = torch.arange(shape[0]) + choose.choice([0, (1 << 32) - 2, (1 << 48) - shape[0]])
        seed_bits, stream = choose.randrange(-(1 << 63), 1 << 63), choose.randrange(1 << 32)
        h[0] = torch.stack([torch.full_like(index, seed_bits), index, torch.full_like(index, stream)], dim=1)
        buffers.pop("h1")
    rows, slots = choose.randint(1, 5), choose.randint(1, 5)
    row = choose.randrange(rows)
    # A wrong row shows: the others are NaN.
    coefficients = torch.full((rows, len(COLUMNS)), torch.nan, dtype=arithmetic)
    coefficients[row] = torch.randn(len(COLUMNS), dtype=arithmetic, generator=generator)
    if choose.random() < 0.5:
        coefficients[row, COLUMNS.index("a")] = 1.0
    if choose.random() < 0.5:
        coefficients[row, COLUMNS.index("c")] = 0.0
    if case.own_rows:
        divisors = [d for d in range(1, shape[1] + 1) if shape[1] % d == 0] if case.numel else [1]
        whole = [d for d in divisors if shape[1] // d % 8 == 0] if case.numel == 1024 else []  # vectors, if aligned
        tokens = choose.choice(whole or divisors)
        shape = (batch, tokens, shape[1] // tokens)
        each = batch if choose.random() < 0.5 else batch * tokens
        one, coefficients = coefficients, torch.full((rows, each, len(COLUMNS)), torch.nan, dtype=arithmetic)
        coefficients[row] = one[row] * torch.randn(each, len(COLUMNS), dtype=arithmetic, generator=generator)
        held, left_out = (torch.rand(2, each, len(COLUMNS), generator=generator) < 0.25).unbind()
        coefficients[row, :, 1:5] = torch.where(left_out[:, 1:5], 0.0, coefficients[row, :, 1:5])
        coefficients[row] = torch.where(held[:, :1], torch.tensor(HELD, dtype=arithmetic), coefficients[row])
        h = [x if x is None or (case.keyed and k == 0) else x.view(shape) for k, x in enumerate(h)]
    out = case.velocity if case.taken else case.state
    result = Operands(
        out=buffer("out", out).fill_(torch.nan),
        base=read("base", case.state),
        v=read("v", case.velocity),
        u=None if case.guidance is None else read("u", case.velocity),
        h1=h[0],
        h2=h[1],
        h3=h[2],
        coefficients=coefficients,
        row=row,
        rounding=case.rounding,
        sum_first=case.sum_first,
        strength=read("strength", case.state) if case.strength else None,
        guidance=choose.choice(FORMS) if case.guidance is None else case.guidance,  # without u it counts for nothing
        trajectory=(buffer("trajectory", out, (shape[0], slots, *shape[1:])).fill_(-7.0) if case.trajectory else None),
        slot=choose.randrange(slots) if case.trajectory else 0,
        history=buffer("history", arithmetic).fill_(torch.nan) if case.history else None,
    )
    if case.terms > case.keyed and case.history and choose.random() < 0.5:  # the oldest gives way to the newest
        buffers.pop("history")
        result = result._replace(history=h[case.terms - 1])
    if choose.random() < 0.25 and not case.taken:
        buffers.pop("out")
        result = result._replace(out=result.base)
    return result, buffers


def copied(x: Operands) -> Operands:
    """A copy of all operands; those that are one tensor stay one."""
    copies: dict[int, Tensor] = {}

    def copy(value: Tensor) -> Tensor:
        return copies.setdefault(id(value), value.clone())

    return Operands(*[copy(value) if isinstance(value, Tensor) else value for value in x])


def differing(got: Tensor, expected: Tensor) -> int:
    """How many elements differ in bits; any NaN equals any NaN."""
    bits = _BITS[got.dtype.itemsize]
    same = (got.contiguous().view(bits) == expected.contiguous().view(bits)) | (got.isnan() & expected.isnan())
    return int((~same).sum())


def failures(fused_step_: Callable[..., None], case: Case) -> list[str]:
    """What `fused_step_` does other than `reference.fused_step_` on this case; empty where right."""
    given, buffers = operands(case)
    expected = copied(given)
    reference.fused_step_(expected)
    fused_step_(given)
    found = []
    for name in Operands._fields:
        got, want = getattr(given, name), getattr(expected, name)
        if isinstance(got, Tensor) and (count := differing(got, want)):
            found.append(f"{name}: {count} of {got.numel()} elements differ [{case}]")
    found += [f"{name}: written outside [{case}]" for name, buffer in buffers.items() if buffer.touched()]
    return found
