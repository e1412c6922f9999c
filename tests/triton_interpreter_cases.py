"""The Triton kernel under Triton's interpreter, against ops.reference, to the last bit.

Not collected by name: tests/test_triton_interpreter.py runs this file in a process of its own, since
TRITON_INTERPRET=1 must be set before the kernel is decorated.
"""

from __future__ import annotations

import functools
import inspect
import mmap
import os
import random
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import token_cases
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton_cases import (
    FORMS,
    PAIRS,
    PRIME,
    Case,
    combinations,
    differing,
    eighth,
    failures,
    half,
    keyed,
    own_rows,
    quarter,
    special,
    values,
)

from flowmatch_kernels import FlowMatching
from flowmatch_kernels.ops import reference
from flowmatch_kernels.ops import triton as backend
from flowmatch_kernels.ops.fused_step import PROMOTE, Operands

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("run tests/test_triton_interpreter.py: this file needs TRITON_INTERPRET=1 from the start")


@functools.cache
def _names_of_builtins(of: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(of) if tl.core.is_builtin(member)]


def _builtins(of: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(of, name)) for name in _names_of_builtins(of)]


# At each launch, and again at each call from one Triton function to another, the interpreter goes through all of
# triton.language for the functions to replace: half of the time of this file. Which they are does not change.
interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": _builtins})


@functools.cache
def _languages(function: Callable[..., Any]) -> list[Any]:
    """The modules that the interpreter replaces functions in, for one Triton function."""
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


_patch_lang = interpreter._patch_lang


def _patched_once(function: Callable[..., Any]) -> interpreter._LangPatchScope:
    replaced = not any(tl.core.is_builtin(language.load) for language in _languages(function))
    return interpreter._LangPatchScope() if replaced else _patch_lang(function)


# A call from one Triton function to another finds them replaced by the launch, and replaces them all again: half of
# the time that was left.
interpreter._patch_lang = _patched_once

NAMES = [f"{str(s).removeprefix('torch.')}-{str(v).removeprefix('torch.')}" for s, v in PAIRS]
every_pair = pytest.mark.parametrize(("state", "velocity"), PAIRS, ids=NAMES)


def check(cases: Iterable[Case]) -> None:
    """Fails with every case that is not right, up to ten of them."""
    cases = list(cases)
    found = [failure for case in cases for failure in failures(backend.fused_step_, case)]
    assert cases
    assert not found, f"{len(found)} failures in {len(cases)} cases:\n" + "\n".join(found[:10])


# ---- the exactness matrix ----


@every_pair
@pytest.mark.parametrize("numel", [0, 1, 31])
def test_small(state: torch.dtype, velocity: torch.dtype, numel: int) -> None:
    """Every set of operands at each size, by at least one of the nine pairs of dtypes."""
    check(eighth(combinations(state, velocity, numel, aligned=False), PAIRS.index((state, velocity)) + numel))


@every_pair
def test_aligned(state: torch.dtype, velocity: torch.dtype) -> None:
    """Every set of operands, by at least two of the nine pairs of dtypes; test_whole_matrix has them by all."""
    check(quarter(combinations(state, velocity, 1024, aligned=True), PAIRS.index((state, velocity))))


@every_pair
def test_around_a_block(state: torch.dtype, velocity: torch.dtype) -> None:
    """1023, 1024 and 1025, aligned or not, by lot: every set of operands, by one of the pairs of dtypes at least."""
    choose = random.Random(0)
    sizes = [(1023, True), (1025, True), (1023, False), (1024, False), (1025, False)]
    check(
        case._replace(numel=numel, aligned=aligned)
        for case in eighth(combinations(state, velocity, 0, aligned=False), PAIRS.index((state, velocity)) + 2)
        for numel, aligned in [choose.choice(sizes)]
    )


@pytest.mark.parametrize(("numel", "aligned"), [(31, False), (1024, True)])
def test_sum_first_and_out_of_the_velocity_dtype(numel: int, aligned: bool) -> None:
    check(half(special(numel, aligned), aligned))


@pytest.mark.full
@pytest.mark.parametrize(("numel", "aligned"), [(31, False), (1024, True)])
def test_sum_first_and_out_of_the_velocity_dtype_full(numel: int, aligned: bool) -> None:
    check(half(special(numel, aligned), not aligned))


@pytest.mark.parametrize(("numel", "aligned"), [(31, False), (1024, True)])
def test_rows_of_their_own(numel: int, aligned: bool) -> None:
    check(half(own_rows(numel, aligned), aligned))


@pytest.mark.parametrize(("numel", "aligned"), [(31, False), (1024, True), (1028, False)])
def test_noise_by_keys(numel: int, aligned: bool) -> None:
    check(quarter(keyed(numel, aligned), numel))


@every_pair
def test_prime(state: torch.dtype, velocity: torch.dtype) -> None:
    """One case for each pair of dtypes, of about 20 blocks; test_matrix_prime has ten times as many."""
    choose = random.Random(str((state, velocity)))
    switches = [s for s in combinations(state, velocity, 10_007, aligned=False) if s.terms < 3]
    check([choose.choice(switches)._replace(aligned=choose.random() < 0.5)])


@pytest.mark.full
@every_pair
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("numel", [0, 1, 31, 1023, 1024, 1025])
def test_whole_matrix(state: torch.dtype, velocity: torch.dtype, numel: int, aligned: bool) -> None:
    check(combinations(state, velocity, numel, aligned))


@pytest.mark.full
@every_pair
@pytest.mark.parametrize("aligned", [False, True])
def test_matrix_prime(state: torch.dtype, velocity: torch.dtype, aligned: bool) -> None:
    """16 of the 80 sets of operands, by lot: a case takes up to ten seconds."""
    choose = random.Random(str((state, velocity, aligned)))
    check(choose.sample(list(combinations(state, velocity, PRIME, aligned)), 16))


# ---- what the matrix does not say ----


def test_from_bfloat16() -> None:
    """All 65,536 of them."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    y = torch.empty(2**16)
    _widening_kernel[(64,)](x, y, BLOCK=1024)
    assert differing(y, x.to(torch.float32)) == 0


@triton.jit
def _widening_kernel(x, y, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offset, backend._from_bfloat16(tl.load(x + offset)))


def test_to_bfloat16() -> None:
    """Ties, what is just off a tie, denormals, what overflows, and NaN, as PyTorch casts them."""
    generator = torch.Generator().manual_seed(0)
    high = torch.randint(-(2**15), 2**15, (4096,), generator=generator) << 16
    x = torch.cat([high + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).to(torch.int32).view(torch.float32)
    x = torch.cat([x, values((8192,), torch.float32, generator)])
    y = torch.empty(x.numel(), dtype=torch.bfloat16)
    _rounding_kernel[(x.numel() // 1024,)](x, y, BLOCK=1024)
    assert x.numel() % 1024 == 0
    assert differing(y, x.to(torch.bfloat16)) == 0


@triton.jit
def _rounding_kernel(x, y, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offset, backend._to_bfloat16(tl.load(x + offset)))


@pytest.mark.parametrize("guidance", FORMS)
def test_weights_are_cast_to_the_velocity_dtype(guidance: int) -> None:
    """Float64 state, float32 velocity: 0.1 in double and 0.1f give different products."""
    x, v, u = torch.zeros(64, dtype=torch.float64), torch.randn(64), torch.randn(64)
    coefficients = torch.tensor([[1.0, 1.0, 0, 0, 0, 1 - 7.1, 7.1, 0]], dtype=torch.float64)
    out = torch.empty_like(x)
    backend.fused_step_(Operands(out, x, v, u, None, None, None, coefficients, 0, PROMOTE, guidance))
    expected = ((1 - 7.1) * u + 7.1 * v, u + 7.1 * (v - u), v + 7.1 * (v - u))[guidance]
    assert torch.equal(out, expected.double())


@pytest.mark.parametrize("guided", [False, True])
def test_noncontiguous_velocity(guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed, expanded and sliced velocities: the same result for one copy each."""
    base = torch.randn(3, 8, 5)
    layouts = [
        torch.randn(5, 8, 3).permute(2, 1, 0),
        torch.randn(1, 8, 1).expand(3, 8, 5),
        torch.randn(3, 8, 10)[..., ::2],
    ]
    coefficients = torch.randn(1, 8)
    copies = []
    contiguous = Tensor.contiguous
    monkeypatch.setattr(Tensor, "contiguous", lambda t: copies.append(t.is_contiguous()) or contiguous(t))
    for v in layouts:
        u = v.flip(0).transpose(0, 1).contiguous().transpose(0, 1) if guided else None
        copies.clear()
        out = torch.full_like(base, torch.nan)
        backend.fused_step_(Operands(out, base, v, u, None, None, None, coefficients, 0))
        assert copies.count(False) == 1 + guided
        assert torch.equal(out, reference.fused_step(base, v, u, None, None, None, coefficients, 0))


# ---- indexes ----


@triton.jit
def _trajectory_offsets_kernel(starts, sample, slots, slot, places, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    place = backend._trajectory_offset(tl.load(starts + block), sample, slots, slot, BLOCK)
    tl.store(places + block * BLOCK + tl.arange(0, BLOCK), place)


@pytest.mark.parametrize("BLOCK", sorted({backend.block(vector) for vector in (1, 2, 4, 8)}))
def test_trajectory_offset(BLOCK: int) -> None:
    """Against i + (i // sample * (slots-1) + slot) * sample in Python's integers, up to 2^40 elements."""
    samples = [1, 3, 7, 31, 60, 128, 255, 256, 257, 511, 512, 513, 1000, 1023, 1024, 1025]
    samples += [PRIME, 2**31 - 1, 2**32 + 5, 2**40 + 3]
    near = [BLOCK, 2**31, 2**32, 2**33 + 7 * BLOCK, 2**40]
    starts = sorted({(start // BLOCK + k) * BLOCK for start in near for k in (-1, 0, 1)})
    for sample in samples:
        for slots, slot in ((1, 0), (11, 10)):
            places = torch.full((len(starts), BLOCK), -1)
            _trajectory_offsets_kernel[(len(starts),)](torch.tensor(starts), sample, slots, slot, places, BLOCK=BLOCK)
            i = torch.tensor(starts)[:, None] + torch.arange(BLOCK)
            expected = i + (i // sample * (slots - 1) + slot) * sample
            assert torch.equal(places, expected), f"sample {sample}, slots {slots}, slot {slot}"


def test_the_division_in_32_bits() -> None:
    """(x * ceil(2^21 / D)) >> 21 is x // D, without overflow, for every x < 2^11 and D <= 2^10."""
    x, d = torch.arange(2**11)[:, None], torch.arange(1, 2**10 + 1)
    scaled = x * ((2**21 + d - 1) // d)
    assert scaled.max() < 2**32
    assert torch.equal(scaled >> 21, x // d)


_MAP_NORESERVE = 0x4000  # Linux; mmap.MAP_NORESERVE from Python 3.14 on


def _virtual(numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor of which no page exists until it is touched, with 2^33 more elements before it.

    An index that wraps round in 32 bits meets zeros there, and not the end of the process.
    """
    before = 2**33
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, (before + numel) * dtype.itemsize, flags=flags), dtype=dtype)[before:]


@pytest.mark.parametrize("edge", [2**31, 2**32], ids=["2^31", "2^32"])
@pytest.mark.parametrize("aligned", [False, True])
def test_beyond_32_bits(edge: int, aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself round 2^31 and 2^32 elements: only the blocks there run, on memory that is not there."""
    vector = 8 if aligned else 1
    block = backend.block(vector)
    batch, slots, slot = 2, 2, 1
    numel = edge + block - (0 if aligned else 6)
    sample = numel // batch
    first, blocks = edge // block - 1, 2
    window = slice(first * block, numel)
    rows = torch.full((1, 8), torch.nan)
    rows[0, :2] = torch.tensor([0.75, 0.5])
    base, v, out = (_virtual(numel, torch.float16) for _ in range(3))
    trajectory = _virtual(numel * slots, torch.float16)
    base[window] = torch.randn(numel - first * block).half()
    v[window] = torch.randn(numel - first * block).half()

    def program_id(axis: int) -> interpreter.TensorHandle:
        index = interpreter.np.array([interpreter_builder.grid_idx[axis] + first], dtype=interpreter.np.int32)
        return interpreter.TensorHandle(index, tl.int32)

    interpreter_builder = interpreter.interpreter_builder
    monkeypatch.setattr(interpreter_builder, "create_get_program_id", program_id)
    backend.fused_step_kernel[(blocks,)](
        *(out, base, v, None, None, None, None, rows, trajectory, None, None),
        *(0, numel, sample, slots, slot, numel, PROMOTE, 0, False, False, vector, block),
    )
    expected = reference.fused_step(base[window], v[window], None, None, None, None, rows, 0)
    assert torch.equal(out[window], expected)
    assert expected.count_nonzero() > 500
    # trajectory[1, 1] ends with the last elements; nothing stands before them.
    assert torch.equal(trajectory[-len(expected) :], expected)
    assert not trajectory[-len(expected) - 4096 : -len(expected)].any()


# ---- sample() ----


def published_loop(
    noise: Tensor, step_fn: Callable[..., Tensor], steps: int, return_all_steps: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The eager loop of Alpamayo, as published."""
    batch, ones = noise.shape[0], [1] * (noise.dim() - 1)
    x, states = noise, [noise]
    time_steps = torch.linspace(0.0, 1.0, steps + 1)
    for i in range(steps):
        dt = (time_steps[i + 1] - time_steps[i]).view(1, *ones).expand(batch, *ones)
        t = time_steps[i].view(1, *ones).expand(batch, *ones)
        x = x + dt * step_fn(x=x, t=t)
        states.append(x)
    return (torch.stack(states, dim=1), time_steps) if return_all_steps else x


@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("return_all_steps", [False, True])
@pytest.mark.parametrize("x_dims", [(64, 2), (7, 3)], ids=["64x2", "7x3"])
def test_sample(velocity: torch.dtype, guided: bool, return_all_steps: bool, x_dims: tuple[int, ...]) -> None:
    def conditioned(x: Tensor, t: Tensor) -> Tensor:
        return (torch.cos(3 * x) - x * t).to(velocity)

    def unconditioned(x: Tensor, t: Tensor) -> Tensor:
        return (torch.sin(2 * x) + t).to(velocity)

    def combined(x: Tensor, t: Tensor) -> Tensor:
        v = conditioned(x, t)
        return (1 - 1.7) * unconditioned(x, t) + 1.7 * v

    noise = torch.randn(5, *x_dims, generator=torch.Generator().manual_seed(1))
    expected = published_loop(noise, combined if guided else conditioned, 10, return_all_steps)
    got = FlowMatching(x_dims, backend="triton").sample(
        5,
        conditioned,
        noise=noise,
        return_all_steps=return_all_steps,
        unguided_step_fn=unconditioned if guided else None,
        use_classifier_free_guidance=guided,
        inference_guidance_weight=1.7,
    )
    as_tuple = functools.partial(lambda value: value if isinstance(value, tuple) else (value,))
    for mine, published in zip(as_tuple(got), as_tuple(expected), strict=True):
        assert mine.dtype == published.dtype
        assert torch.equal(mine, published)


@pytest.mark.parametrize("first", [0, *(pytest.param(k, marks=pytest.mark.full) for k in range(1, 8))])
def test_times_of_tokens(first: int) -> None:
    """An eighth of the cases each."""
    for case in list(token_cases.cases())[first::8]:
        token_cases.check(case, "triton")
