"""The CUDA kernel's own source, run on the host thread by thread, against ops.reference, to the last bit.

Not collected by name: tests/test_cuda_host.py runs this file in a process of its own, under AddressSanitizer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import host_cuda
import published
import pytest
import torch
import triton_cases as cases
from guarded import Guarded
from torch import Tensor
from triton_cases import (
    FORMS,
    PAIRS,
    PRIME,
    Case,
    combinations,
    copied,
    differing,
    failures,
    half,
    keyed,
    operands,
    own_rows,
    special,
)

from flowmatch_kernels import FlowMatching
from flowmatch_kernels.ops import dispatch, native, reference
from flowmatch_kernels.ops.fused_step import (
    FROM_GUIDED,
    FROM_UNGUIDED,
    PROMOTE,
    WEIGHTED,
    Operands,
    arithmetic_dtype,
    dense,
    is_keys,
)

_host = host_cuda.load()
Run = _host.Double.Run

NAMES = [f"{str(s).removeprefix('torch.')}-{str(v).removeprefix('torch.')}" for s, v in PAIRS]
every_pair = pytest.mark.parametrize(("state", "velocity"), PAIRS, ids=NAMES)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch):
    """The double of CUDA, as new."""
    monkeypatch.setattr(cases, "Guarded", Guarded)
    return _host.fresh()


def step(o: Operands) -> None:
    """What csrc/python_operands.cpp makes of a step on a GPU, with the kernel that runs on the host."""
    numel, sample, slots = o.base.numel(), o.base.numel(), 1
    if numel == 0:
        return
    if o.trajectory is not None:
        sample, slots = numel // o.base.shape[0], o.trajectory.shape[1]
    R, rows = 1, 0
    if o.coefficients.dim() == 3:
        R, sample = o.coefficients.shape[1], numel // o.base.shape[0]
        rows = R // o.base.shape[0]
    if is_keys(o.h1):
        sample = numel // o.base.shape[0]
    v, u = dense(o.v), None if o.u is None else dense(o.u)
    tensors = (o.out, o.base, v, u, o.h1, o.h2, o.h3, o.coefficients)
    _host.fused_step_cuda(
        *(0 if x is None else x.data_ptr() for x in tensors),
        *(o.row * R, *(native.DTYPES[x.dtype] for x in (o.base, v, o.out)), o.rounding, o.guidance, o.sum_first),
        *(0 if o.trajectory is None else o.trajectory.data_ptr(), slots, o.slot),
        *(0 if x is None else x.data_ptr() for x in (o.history, o.strength)),
        *(numel, sample, 0, 0, rows, is_keys(o.h1)),
    )


def check(cases: Iterable[Case]) -> None:
    """Fails with every case that is not right, up to ten of them."""
    cases = list(cases)
    found = [failure for case in cases for failure in failures(step, case)]
    assert cases
    assert not found, f"{len(found)} failures in {len(cases)} cases:\n" + "\n".join(found[:10])


# ---- the exactness matrix ----


@every_pair
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("numel", [0, 1, 31])
def test_small(state: torch.dtype, velocity: torch.dtype, numel: int, aligned: bool) -> None:
    """Every set of operands by each pair of dtypes at each size, one half of them aligned and the other not."""
    turn = PAIRS.index((state, velocity)) + aligned
    check(half(combinations(state, velocity, numel, aligned), turn))


@every_pair
@pytest.mark.parametrize("aligned", [False, True])
def test_around_a_block(state: torch.dtype, velocity: torch.dtype, aligned: bool) -> None:
    """All sets of operands, one half of them aligned and the other not, the size 1023, 1024 or 1025 by lot."""
    choose = random.Random(0)
    turn = PAIRS.index((state, velocity)) + aligned
    check(
        case._replace(numel=choose.choice([1023, 1024, 1024, 1025]))
        for case in half(combinations(state, velocity, 0, aligned), turn)
    )


@every_pair
@pytest.mark.parametrize("aligned", [False, True])
def test_prime(state: torch.dtype, velocity: torch.dtype, aligned: bool) -> None:
    choose = random.Random(str((state, velocity, aligned)))
    check([choose.choice(list(combinations(state, velocity, PRIME, aligned)))])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("numel", [1, 1024, 1025])
def test_sum_first_and_out_of_the_velocity_dtype(numel: int, aligned: bool) -> None:
    check(special(numel, aligned))


def test_rows_of_their_own(double) -> None:
    """A thread moves vectors where rows cover whole ones: two kernels for each set of dtypes."""
    check(own_rows(31, False))
    assert len({launch.kernel for launch in double.launches}) == 20
    check([*own_rows(1024, True), *own_rows(3072, True), *own_rows(1025, False)])
    assert len({launch.kernel for launch in double.launches}) == 40


def test_noise_by_keys(double) -> None:
    """A thread moves vectors where samples are whole fours: two kernels for each set of dtypes."""
    check(keyed(31, False))
    assert len({launch.kernel for launch in double.launches}) == 14
    check([*keyed(1024, True), *keyed(3072, True), *keyed(1028, False), *keyed(1028, True)])
    assert len({launch.kernel for launch in double.launches}) == 28


@pytest.mark.full
@every_pair
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("numel", [1, 31, 1023, 1024, 1025, PRIME])
def test_whole_matrix(state: torch.dtype, velocity: torch.dtype, numel: int, aligned: bool) -> None:
    check(combinations(state, velocity, numel, aligned))


@every_pair
def test_last_thread_first(state: torch.dtype, velocity: torch.dtype, double) -> None:
    """No thread reads what another has written."""
    double.run = Run.BACKWARD
    choose = random.Random(0)
    check(choose.sample(list(combinations(state, velocity, 1025, True)), 8))
    check(choose.sample(list(combinations(state, velocity, 1024, True)), 8))


@every_pair
@pytest.mark.parametrize(
    "odd", ["out", "base", "v", "u", "h1", "h2", "h3", "trajectory", "history", "coefficients", "strength"]
)
def test_one_operand_off_by_one(state: torch.dtype, velocity: torch.dtype, odd: str) -> None:
    """Each operand's alignment is asked for: all others stand on 16 bytes."""
    form, scaled = FORMS[PAIRS.index((state, velocity)) % 3], odd == "strength"
    case = Case(state, velocity, form, 0 if scaled else 3, True, True, PROMOTE, 1024, True, strength=scaled)
    given, _ = operands(case)
    given = given._replace(**{name: getattr(given, name).clone() for name in ("out", "history")})
    wrong = getattr(given, odd)
    shifted = torch.empty(wrong.numel() + 1, dtype=wrong.dtype)[1:].view(wrong.shape).copy_(wrong)
    given = given._replace(**{odd: shifted})
    expected = copied(given)
    reference.fused_step_(expected)
    step(given)
    for name in ("out", "trajectory", "history"):
        assert differing(getattr(given, name), getattr(expected, name)) == 0, name


@pytest.mark.parametrize("guidance", FORMS)
def test_weights_are_cast_to_the_velocity_dtype(guidance: int) -> None:
    """Float64 state, float32 velocity: 0.1 in double and 0.1f give different products."""
    x, v, u = torch.zeros(64, dtype=F64), torch.randn(64), torch.randn(64)
    coefficients = torch.tensor([[1.0, 1.0, 0, 0, 0, 1 - 7.1, 7.1, 0]], dtype=F64)
    out = torch.empty_like(x)
    step(Operands(out, x, v, u, None, None, None, coefficients, 0, PROMOTE, guidance))
    expected = ((1 - 7.1) * u + 7.1 * v, u + 7.1 * (v - u), v + 7.1 * (v - u))[guidance]
    assert torch.equal(out, expected.double())


@pytest.mark.parametrize("guided", [False, True])
def test_noncontiguous_velocity(guided: bool) -> None:
    base, v = torch.randn(3, 8, 5), torch.randn(5, 8, 3).permute(2, 1, 0)
    u = torch.randn(1, 8, 1).expand(3, 8, 5) if guided else None
    coefficients, out = torch.randn(1, 8), torch.full_like(base, torch.nan)
    step(Operands(out, base, v, u, None, None, None, coefficients, 0))
    assert torch.equal(out, reference.fused_step(base, v, u, None, None, None, coefficients, 0))


# ---- bytes moved, and indexes ----


def fake(
    state: torch.dtype,
    velocity: torch.dtype,
    guided: bool,
    terms: int,
    trajectory: bool,
    history: bool,
    strength: bool = False,
):
    """Addresses for operands that are not there, far apart and on 16 bytes; with (size, kind) of each.

    Only v and u are dead after they are read.
    """
    arithmetic = arithmetic_dtype(state).itemsize
    sizes = {"out": (state.itemsize, "w"), "base": (state.itemsize, "b"), "v": (velocity.itemsize, "l")}
    sizes |= {"u": (velocity.itemsize, "l")} if guided else {}
    sizes |= {f"h{k}": (arithmetic, "b") for k in (1, 2, 3) if k <= terms}
    sizes |= {"trajectory": (state.itemsize, "s")} if trajectory else {}
    sizes |= {"history": (arithmetic, "w")} if history else {}
    sizes |= {"strength": (state.itemsize, "b")} if strength else {}
    return {name: (k + 1) << 44 for k, name in enumerate(sizes)}, sizes


def launch(
    addresses: dict[str, int], state: torch.dtype, velocity: torch.dtype, guidance: int = WEIGHTED, **sizes: int
) -> None:
    names = ("out", "base", "v", "u", "h1", "h2", "h3", "trajectory", "history", "strength")
    _host.fused_step_cuda(
        **{name: addresses.get(name, 0) for name in names},
        coefficients=1 << 48,
        row=2,
        base_dtype=native.DTYPES[state],
        velocity_dtype=native.DTYPES[velocity],
        out_dtype=native.DTYPES[state],
        rounding=PROMOTE,
        guidance=guidance,
        sum_first=False,
        device=0,
        **sizes,
    )


@every_pair
@pytest.mark.parametrize("numel", [1024, 1027])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "off_by_one"])
def test_each_byte_moves_once(state: torch.dtype, velocity: torch.dtype, numel: int, shift: int, double) -> None:
    """Each operand is read once, each result written once, nothing else; 16 bytes at a time for the widest."""
    double.touch, double.record = False, True
    for guidance, terms, trajectory, history, strength in [
        (None, 0, False, False, False),
        (WEIGHTED, 0, True, False, False),
        (FROM_UNGUIDED, 1, False, True, False),
        (FROM_GUIDED, 3, True, True, False),
        (None, 0, False, False, True),
        (FROM_GUIDED, 0, True, True, True),
    ]:
        addresses, sizes = fake(state, velocity, guidance is not None, terms, trajectory, history, strength)
        addresses["base"] += shift * state.itemsize
        double = _host.fresh()
        double.touch, double.record = False, True
        # A trajectory of one slot: its elements stand where the state's do.
        launch(addresses, state, velocity, guidance or WEIGHTED, slots=1, slot=0, numel=numel, sample=numel)
        whole = numel // 8 * 8 if not shift and (numel % 8 == 0 or not trajectory) else 0
        read_widest = max(size for name, (size, kind) in sizes.items() if kind in "bl")
        vector = 16 // read_widest
        expected = Counter()
        for name, (size, kind) in sizes.items():
            start, stop = addresses[name], addresses[name] + numel * size
            width = min(vector * size, 16) if whole else size
            edge = start + numel // vector * vector * size if whole else start
            expected.update((kind, address, width) for address in range(start, edge, width))
            expected.update((kind, address, size) for address in range(edge, stop, size))
        row = [access for access in double.accesses if access[0] == "c"]
        assert Counter(access for access in double.accesses if access[0] != "c") == expected
        arithmetic = arithmetic_dtype(state).itemsize
        first = (1 << 48) + 2 * 8 * arithmetic
        width = 16 if whole else arithmetic
        assert set(row) == {("c", first + k, width) for k in range(0, 8 * arithmetic, width)}


@every_pair
@pytest.mark.parametrize("edge", [2**31, 2**32, 2**33 + 64, 2**36], ids=["2^31", "2^32", "2^33", "2^36"])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "off_by_one"])
def test_indexes(state: torch.dtype, velocity: torch.dtype, edge: int, shift: int, double) -> None:
    """Single threads round 2^31, 2^32, 2^33 and 2^36 elements, on operands that are not there."""
    slots, slot = 5, 3
    numel, sample = edge + 1024, (edge + 1024) // 8
    addresses, sizes = fake(state, velocity, True, 1, True, True)
    addresses["v"] += shift * velocity.itemsize
    vector = 1 if shift else 16 // arithmetic_dtype(state).itemsize
    for element in [
        0,
        edge - vector,
        edge,
        edge + vector,
        edge + 512,
        sample - vector,
        sample,
        numel - vector,
    ]:
        double = _host.fresh()
        double.touch, double.record, double.run, double.one = False, True, Run.ONE, element // vector
        launch(addresses, state, velocity, slots=slots, slot=slot, numel=numel, sample=sample)
        element = element // vector * vector
        there = (element // sample * slots + slot) * sample + element % sample
        seen = {(kind, address) for kind, address, _ in double.accesses if kind != "c"}
        wanted = {
            (kind, addresses[name] + (there if name == "trajectory" else element) * size)
            for name, (size, kind) in sizes.items()
        }
        assert seen == wanted, f"element {element}"


@pytest.mark.parametrize("edge", [2**31, 2**32])
def test_tail_beyond_32_bits(edge: int, double) -> None:
    """The elements left over after the last whole vector."""
    numel = edge + 3
    addresses, sizes = fake(F32, F32, False, 0, False, False)
    for k in range(3):
        double = _host.fresh()
        double.touch, double.record, double.run, double.one = False, True, Run.ONE, edge // 4 + k
        launch(addresses, F32, F32, slots=1, slot=0, numel=numel, sample=numel)
        seen = {access for access in double.accesses if access[0] != "c"}
        assert seen == {(kind, addresses[name] + (edge + k) * 4, 4) for name, (_, kind) in sizes.items()}
    double.one = edge // 4 + 3
    before = len(double.accesses)
    launch(addresses, F32, F32, slots=1, slot=0, numel=numel, sample=numel)
    assert len(double.accesses) == before, "a thread after the last element touches memory"


def test_division() -> None:
    """The multiplication that divides by the elements of a sample is exact below 2^63."""
    choose = random.Random(0)
    divisors = [*range(1, 70), *[2**k + d for k in range(7, 62) for d in (-1, 0, 1)], 2**62]
    divisors += [choose.randrange(1, 2 ** choose.randint(1, 62)) for _ in range(500)]
    for divisor in divisors:
        quotients = [0, 1, 2, choose.randrange(2**20), (2**63 - 1) // divisor]
        dividends = {q * divisor + r for q in quotients for r in (-1, 0, 1, divisor - 1)}
        dividends |= {2**63 - 1, 2**31, 2**32, choose.randrange(2**63)}
        for i in dividends:
            if 0 <= i < 2**63:
                assert _host.quotient(i, divisor) == i // divisor, f"{i} / {divisor}"


# ---- sample() ----


@pytest.mark.parametrize("velocity", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("return_all_steps", [False, True], ids=["last", "trajectory"])
@pytest.mark.parametrize("x_dims", [(64, 2), (7, 3)], ids=["64x2", "7x3"])
def test_sample(
    velocity: torch.dtype,
    guided: bool,
    return_all_steps: bool,
    x_dims: tuple[int, ...],
    double,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The published loop's bits, with the kernel in the place of the `cuda` backend."""
    on_cpu = dispatch.BACKENDS["cuda"]._replace(
        devices=("cpu",), unavailable=lambda device_type: None, load=lambda: step
    )
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", on_cpu)

    def conditioned(x: Tensor, t: Tensor) -> Tensor:
        return (torch.cos(3 * x) - x * t).to(velocity)

    def unconditioned(x: Tensor, t: Tensor) -> Tensor:
        return (torch.sin(2 * x) + t).to(velocity)

    noise = torch.randn(5, *x_dims)
    guidance = {"unguided_step_fn": unconditioned} if guided else {}
    expected = published.sample(
        5, conditioned, x_dims, 10, return_all_steps=return_all_steps, noise=noise, weight=1.7, **guidance
    )
    got = FlowMatching(x_dims, backend="cuda").sample(
        5,
        conditioned,
        noise=noise,
        return_all_steps=return_all_steps,
        use_classifier_free_guidance=guided,
        inference_guidance_weight=1.7,
        **guidance,
    )
    assert len(double.launches) == 10
    if not return_all_steps:
        got, expected = (got,), (expected,)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert differing(mine, theirs) == 0
