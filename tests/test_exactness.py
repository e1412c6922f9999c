"""`cpu` equals `reference`, and `reference` equals eager PyTorch as users write it, to the last bit."""

import ctypes
import itertools
import os
import platform
import random
import re
import subprocess
import sys

import numpy
import pytest
import torch
import triton_cases
from operands import (
    FORMS,
    FORMULAS,
    LAYOUTS,
    Guarded,
    assert_same_bits,
    bits,
    coefficients,
    combinations,
    laid_out,
    remembered,
    special_values,
    values,
)

from flowmatch_kernels.ops import native, reference, reference_noise
from flowmatch_kernels.ops.fused_step import (
    EXACT,
    PROMOTE,
    ROUNDED,
    VELOCITY_DTYPES,
    WEIGHTED,
    Operands,
    arithmetic_dtype,
    check_operands,
)

PAIRS = [(state, velocity) for state, narrower in VELOCITY_DTYPES.items() for velocity in narrower]
NARROW = [*itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2)]
SHAPES = [(0,), (1,), (31,), (1023,), (1024,), (1025,), (0, 3), (6, 0), (1, 7), (6, 64, 2), (3, 5, 7, 11)]
SHAPES += [(3, 700), (2, 1025), (2, 1, 3, 1, 5), (5, 3, 2, 2, 2, 3)]
PRIME = 1_000_003


def name(parameter):
    return re.sub(r"torch\.", "", str(parameter)).replace(" ", "") if parameter is not None else "none"


def run(step, shape, state, velocity, rounding, combination, row=1, slot=None, layouts=("contiguous",) * 2,
        in_place=False, seed=0):  # fmt: skip
    """Everything a backend writes for one set of operands: out, trajectory, history; all guarded."""
    guidance, terms, slots, history, c = combination
    guided = guidance is not None
    generator = torch.Generator().manual_seed(seed)
    arithmetic = arithmetic_dtype(state)
    base = Guarded(shape, state, values(shape, state, generator))
    v = laid_out(values(shape, velocity, generator), layouts[0])
    u = laid_out(values(shape, velocity, generator), layouts[1]) if guided else None
    h = [Guarded(shape, arithmetic, values(shape, arithmetic, generator)) for _ in range(terms)]
    table = coefficients(arithmetic, generator, c=c)
    before = [bits(x) for x in (base.tensor, v, *([u] if guided else []), *[x.tensor for x in h], table)]

    out = base if in_place else Guarded(shape, state)
    trajectory = None if slots is None else Guarded([shape[0], slots, *shape[1:]], state)
    kept = None
    if history is not None:
        kept = Guarded(shape, arithmetic) if history == "new" else h[history]
    slot = 0 if slots is None else slots - 1 if slot is None else slot
    operands = Operands(
        out.tensor,
        base.tensor,
        v,
        u,
        *[x.tensor for x in h],
        *[None] * (3 - terms),
        table,
        row,
        rounding,
        guidance if guided else FORMS[seed % 3],  # without u it counts for nothing
        False,
        None,
        None if trajectory is None else trajectory.tensor,
        slot,
        None if kept is None else kept.tensor,
    )
    step(operands)
    for buffer in (base, out, *h, *[x for x in (trajectory, kept) if x is not None]):
        assert buffer.intact(), "written outside a buffer"
    after = [bits(x) for x in (base.tensor, v, *([u] if guided else []), *[x.tensor for x in h], table)]
    written = {0} if in_place else set()
    if isinstance(history, int):
        written.add(2 + guided + history)
    for k, (x, y) in enumerate(zip(before, after, strict=True)):
        assert k in written or torch.equal(x, y), f"operand {k} is only read, and changed"
    results = {"out": out.tensor}
    if trajectory is not None:
        results["trajectory"] = trajectory.tensor
        assert_same_bits(trajectory.tensor[:, slot], out.tensor, "slot")
        for other in range(slots):
            assert other == slot or trajectory.tensor[:, other].isnan().all(), f"slot {other} is not ours"
    if kept is not None:
        results["history"] = kept.tensor
    return results


def compare(*arguments, **keywords):
    got = run(native.fused_step_, *arguments, **keywords)
    wanted = run(reference.fused_step_, *arguments, **keywords)
    for key in wanted:
        assert_same_bits(got[key], wanted[key], f"{key} of {arguments} {keywords}")


def check_every_combination(turn, parts, turned=False):
    """A part of the sets of operands, each with out in a tensor of its own or in base's, by lot."""
    for k, ((state, velocity), rounding) in enumerate(itertools.product(PAIRS, (PROMOTE, EXACT, ROUNDED))):
        lot = random.Random(k)
        for seed, combination in enumerate(combinations()):
            in_place = (lot.random() < 0.5) != turned
            if (seed + k + turn) % parts == 0:
                compare((3, 43), state, velocity, rounding, combination, row=seed % 3, in_place=in_place, seed=seed)


def test_every_combination():
    """Half of the sets of operands by each pair of dtypes and rounding, the other half by the next."""
    check_every_combination(0, 2)


@pytest.mark.full
def test_every_combination_full():
    check_every_combination(1, 2)
    check_every_combination(0, 1, turned=True)


def test_sizes_and_ranks():
    """Every 13th combination, each shape and dtype beginning with another."""
    for (j, shape), (k, (state, velocity)) in itertools.product(enumerate(SHAPES), enumerate(PAIRS)):
        for seed, combination in itertools.islice(enumerate(combinations()), (j + 4 * k) % 13, None, 13):
            compare(shape, state, velocity, seed % 3 == 0, combination, in_place=bool(seed % 2), seed=seed)


@pytest.mark.parametrize("shape", [(), (7,), (6, 64), (3, 5, 7), (2, 3, 5, 7), (2, 1, 3, 2, 5)], ids=str)
def test_layouts_of_the_velocity(shape):
    for state, velocity in PAIRS:
        tried = 0
        for layouts in itertools.product(LAYOUTS, LAYOUTS):
            if any(laid_out(torch.zeros(shape), layout) is None for layout in layouts):
                continue
            slots = 3 if shape else None
            guidance = FORMS[sum(map(LAYOUTS.index, layouts)) % 3]
            compare(shape, state, velocity, False, (guidance, 1, slots, "new", True), layouts=layouts)
            tried += 1
        assert tried >= 4


def test_layouts_are_what_they_say():
    x = torch.arange(2.0 * 3 * 5 * 7).view(2, 3, 5, 7)
    for layout in LAYOUTS:
        y = laid_out(x, layout)
        assert y.is_contiguous() == (layout in ("contiguous", "misaligned"))
        assert torch.equal(x, y) or layout == "expanded"
    assert laid_out(x, "misaligned").data_ptr() % 16
    assert laid_out(x, "channels_last").is_contiguous(memory_format=torch.channels_last)


def test_slots():
    for shape in [(1, 5), (6, 64, 2), (3, 1025), (1025, 1), (40, 1000)]:
        for slots, slot in [(1, 0), (2, 0), (2, 1), (11, 0), (11, 4), (11, 10)]:
            compare(shape, torch.float32, torch.bfloat16, False, (None, 0, slots, None, True), slot=slot)


def check_large(threads, *shapes):
    torch.set_num_threads(threads)
    whole, samples = shapes
    for k, (state, velocity) in enumerate(PAIRS):
        compare(whole, state, velocity, velocity == torch.bfloat16, (FORMS[k % 3], 1, None, "new", True))
        compare(samples, state, velocity, False, (None, 0, 2, None, True), in_place=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_threaded(threads):
    """A prime of elements over four times what one thread is given; a million by `make test-full`, and one below."""
    check_large(threads, (131_101,), (17, 7723))


@pytest.mark.full
@pytest.mark.parametrize("threads", [1, 2])
def test_large_and_threaded(threads):
    check_large(threads, (PRIME,), (17, 58_823))


def test_threads_give_one_result():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(native.fused_step_, (PRIME,), torch.float32, torch.float16, False,
                           (WEIGHTED, 3, 1, 2, True)))  # fmt: skip
    wanted = run(reference.fused_step_, (PRIME,), torch.float32, torch.float16, False, (WEIGHTED, 3, 1, 2, True))
    for key in wanted:
        assert_same_bits(results[0][key], wanted[key], key)
        assert_same_bits(results[1][key], results[0][key], key)


# ---- the definition itself: reference against what users write ----


def plain_row(dtype=torch.float32, **columns):
    table = torch.zeros(1, 8, dtype=dtype)
    table[0, 0] = 1.0
    for column, value in columns.items():
        table[0, ("a", "b0", "b1", "b2", "b3", "w0", "w1", "c").index(column)] = value
    return table


def reference_step(base, v, table, u=None, h=(), **keywords):
    return reference.fused_step(base, v, u, *h, *[None] * (3 - len(h)), table, 0, **keywords)


def drawn(*shape, dtype=torch.float32, seed=1):
    return values(shape, dtype, torch.Generator().manual_seed(seed))


DTS = [0.1, 1 / 3, -0.1, 0.0, 1e-30, 0.30000001192092896, float("inf")]
WEIGHTS = [0.0, 1.0, 1.5, 2.0, 7.5, -0.3, 1 / 3, 1e-3]


@pytest.mark.parametrize("dt", DTS)
@pytest.mark.parametrize(
    "state, velocity", [pair for pair in PAIRS if pair[0] in (torch.float32, torch.float64)], ids=name
)
def test_definition_plain(state, velocity, dt):
    x, v = drawn(97, 31, dtype=state), drawn(97, 31, dtype=velocity, seed=2)
    step = torch.tensor([[dt]], dtype=state)
    assert_same_bits(reference_step(x, v, plain_row(state, b0=dt)), x + step * v)


@pytest.mark.parametrize("dt", DTS)
@pytest.mark.parametrize("dtype", VELOCITY_DTYPES, ids=name)
def test_definition_python_float(dtype, dt):
    """A Python float dt, as GR00T has: for a 16-bit state each product and each sum is rounded to it."""
    x, v = drawn(97, 31, dtype=dtype), drawn(97, 31, dtype=dtype, seed=2)
    assert_same_bits(reference_step(x, v, plain_row(arithmetic_dtype(dtype), b0=dt)), x + dt * v)


@pytest.mark.parametrize("formula", FORMULAS)
def test_definition_guidance(formula):
    for (state, velocity), w in itertools.product(PAIRS, WEIGHTS):
        check_definition_of_guidance(state, velocity, formula, w)


def check_definition_of_guidance(state, velocity, formula, w):
    x, v, u = drawn(97, 31, dtype=state), *(drawn(97, 31, dtype=velocity, seed=s) for s in (2, 3))
    arithmetic = arithmetic_dtype(state)
    combined, guidance, weights = FORMULAS[formula]
    w0, w1 = weights(w)
    table = plain_row(arithmetic, b0=0.1, w0=w0, w1=w1)
    guided = combined(u, v, w)
    assert guided.dtype == velocity
    step = torch.tensor([[0.1]], dtype=arithmetic)
    wanted = (x + 0.1 * guided) if state == velocity else x + step * guided
    assert_same_bits(reference_step(x, v, table, u, guidance=guidance), wanted)
    assert_same_bits(remembered(x, v, u, table, 0, guidance), guided.to(arithmetic))


def pairs_of_special_values(dtype):
    """Each of a dtype's special values, 3 and -1/3 with each other."""
    x = torch.cat([special_values(dtype), torch.tensor([3.0, -1 / 3]).to(dtype)])
    return x.repeat_interleave(len(x)), x.repeat(len(x))


@pytest.mark.parametrize("step", [native.fused_step_, reference.fused_step_], ids=["cpu", "reference"])
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("velocity", VELOCITY_DTYPES, ids=name)
def test_definition_guidance_of_special_values(velocity, formula, step):
    """-0.0 + 1*h0 is h0, for every h0: the guided velocity itself, of all special values, weights too."""
    v, u = pairs_of_special_values(velocity)
    combined, guidance, weights = FORMULAS[formula]
    arithmetic = arithmetic_dtype(velocity)
    specials = [-0.0, -1.0, float("inf"), -float("inf"), float("nan"), torch.finfo(velocity).max]
    for w in [*WEIGHTS, *specials, torch.finfo(velocity).tiny]:
        w0, w1 = weights(w)
        table = plain_row(arithmetic, b0=1.0, w0=w0, w1=w1)
        out, kept = torch.full_like(v, float("nan")), torch.full(v.shape, float("nan"), dtype=arithmetic)
        step(
            Operands(
                out,
                torch.full_like(v, -0.0),
                v,
                u,
                None,
                None,
                None,
                table,
                0,
                PROMOTE,
                guidance,
                False,
                None,
                None,
                0,
                kept,
            )
        )
        wanted = combined(u, v, w)
        assert_same_bits(out, wanted, f"w {w}")
        assert_same_bits(kept, wanted.to(arithmetic), f"w {w}")


@pytest.mark.parametrize("dtype", VELOCITY_DTYPES, ids=name)
def test_a_difference_is_a_sum(dtype):
    """a - b is a + (-b) and (-b) + a, and -(r*b) is (-r)*b: so (1+r)*v - r*u needs no form of its own."""
    special, random = pairs_of_special_values(dtype), (drawn(97, 31, dtype=dtype), drawn(97, 31, dtype=dtype, seed=2))
    for a, b in (special, random):
        assert_same_bits(a + (-b), a - b)
        assert_same_bits((-b) + a, a - b)
        for r in [*WEIGHTS, -0.0, float("inf"), torch.finfo(dtype).tiny]:
            assert_same_bits((-r) * b, -(r * b), f"r {r}")


@pytest.mark.parametrize("dtype", VELOCITY_DTYPES, ids=name)
def test_the_formulas_of_guidance_are_told_apart(dtype):
    """By bits, on the operands above; so is each from itself with an FMA, or with one rounding less."""
    v, u = (drawn(97, 31, dtype=dtype, seed=s) for s in (2, 3))
    w = 1 / 3
    results = {formula: combined(u, v, w) for formula, (combined, *_) in FORMULAS.items()}
    if dtype == torch.float64:
        wide, factor = numpy.longdouble, numpy.longdouble(w)
    else:
        wide, factor = numpy.float64, numpy.float64(torch.tensor(w).item())

    def widened(x):
        return (x if dtype == torch.float64 else x.double()).numpy().astype(wide)

    with numpy.errstate(all="ignore"):
        for formula, x in (("u+w*(v-u)", u), ("v+w*(v-u)", v)):
            fma = widened(x) + factor * widened(v - u)
            results[f"{formula}, FMA"] = torch.from_numpy(fma.astype("float64")).to(dtype)
            product = factor * (widened(v) - widened(u))
            rounded = torch.from_numpy(product.astype("float64")).to(dtype)
            results[f"{formula}, the difference not rounded"] = x + rounded
    for (one, x), (other, y) in itertools.combinations(results.items(), 2):
        assert (bits(x) != bits(y)).float().mean() > 0.005, f"{one} and {other} agree on these operands"


@pytest.mark.parametrize("velocity", [torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("dt", [-0.1, 0.02, 1 / 3, 0.003])
def test_definition_diffusers(velocity, dt):
    """FlowMatchEulerDiscreteScheduler.step with sigmas on the GPU: dt is rounded to bfloat16 first."""
    sample, v = drawn(97, 31, dtype=velocity), drawn(97, 31, dtype=velocity, seed=2)
    step = torch.tensor(dt)
    product = step.to(velocity) * v
    wanted = (sample.float() + product).to(velocity)
    got = reference_step(sample.float(), v, plain_row(b0=dt), rounding=ROUNDED)
    assert_same_bits(got.to(velocity), wanted)
    naive = (sample.float() + step.view(1, 1) * v).to(velocity)
    assert (bits(naive) != bits(wanted)).any(), "these operands cannot tell the two roundings apart"


@pytest.mark.parametrize("state", VELOCITY_DTYPES, ids=name)
def test_definition_history(state):
    """Left to right, each product and each partial sum rounded to the state's dtype."""
    arithmetic = arithmetic_dtype(state)
    x, v = drawn(97, 31, dtype=state), drawn(97, 31, dtype=state, seed=2)
    h = [drawn(97, 31, dtype=arithmetic, seed=3 + k) for k in range(3)]
    columns = {"a": 0.7, "b0": 0.3, "b1": -1.1, "b2": 0.9, "b3": 1 / 3}
    table = plain_row(arithmetic, **columns)
    a, *b = table[0, :5, None, None].unbind()
    for terms in range(4):
        wanted = (a * x).to(state) + (b[0] * v).to(state)
        for k in range(terms):
            wanted = wanted + (b[k + 1] * h[k]).to(state)
        assert_same_bits(reference_step(x, v, table, h=h[:terms]), wanted)
    wrong = ((a * x).to(state) + (b[0] * v).to(state)) + ((b[1] * h[0]).to(state) + (b[2] * h[1]).to(state))
    assert (bits(wrong) != bits(reference_step(x, v, table, h=h[:2]))).any(), "the order cannot be told"


@pytest.mark.parametrize("state, velocity", PAIRS, ids=name)
@pytest.mark.parametrize("c", [0.0, -0.0, 0.8, float("nan")])
def test_definition_remember(state, velocity, c):
    arithmetic = arithmetic_dtype(state)
    x, v = drawn(97, 31, dtype=state), drawn(97, 31, dtype=velocity, seed=2)
    table = plain_row(arithmetic, b0=0.1, c=c)
    wanted = v.to(arithmetic)
    if c != 0:
        wanted = wanted + table[0, 7:].view(1, 1) * x.to(arithmetic)
    assert_same_bits(remembered(x, v, None, table, 0), wanted)


def test_definition_is_not_an_fma():
    """Operands for which an FMA, and torch.add's alpha, give other bits: the tests above would see it."""
    x, v = torch.randn(4096), torch.randn(4096)
    got = reference_step(x, v, plain_row(b0=0.1))
    fma = (x.double() + torch.tensor(0.1).double() * v.double()).float()
    assert 0.02 < (got != fma).float().mean() < 0.5
    assert_same_bits(got, x + torch.tensor([0.1]) * v)


# ---- conversions: every 16-bit value, and the float32 values that are hard to round ----


def all_values(dtype):
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("step", [native.fused_step_, reference.fused_step_], ids=["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_widen_every_value(dtype, step):
    """-0.0 + 1*v is v, for every v."""
    v = all_values(dtype)
    wanted = v.float()
    if dtype == torch.bfloat16:
        exact = (v.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    else:
        exact = torch.from_numpy(v.numpy().astype("float32"))
    assert_same_bits(wanted, exact)
    out = torch.full(v.shape, float("nan"))
    step(Operands(out, torch.full(v.shape, -0.0), v, None, None, None, None, plain_row(b0=1.0), 0))
    assert_same_bits(out, exact)


@pytest.mark.parametrize("step", [native.fused_step_, reference.fused_step_], ids=["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_narrow_hard_values(dtype, step):
    """Every upper half of a float32, with lower halves at, just below and just above each tie."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xFFFF]
    h = torch.cat([upper | low for low in lower]).view(torch.float32)
    zero = torch.full(h.shape, -0.0, dtype=dtype)
    out = torch.full(h.shape, float("nan"), dtype=dtype)
    step(Operands(out, zero, zero, None, h, None, None, plain_row(b0=1.0, b1=1.0), 0))
    wanted = h.to(dtype)
    if dtype == torch.float16:
        with numpy.errstate(all="ignore"):
            exact = torch.from_numpy(h.numpy().astype("float16"))
    else:  # to nearest even, by integers
        word = h.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        word = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        exact = torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16).view(dtype)
        exact = torch.where(h.isnan(), torch.tensor(float("nan"), dtype=dtype), exact)
    assert_same_bits(wanted, exact, "torch")
    assert_same_bits(out, exact)


@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16, torch.float16], ids=name)
def test_narrow_double(velocity):
    """float64 to 16 bits goes by way of float32, as in PyTorch: ties that a direct rounding breaks."""
    ties = all_values(velocity) if velocity != torch.float32 else special_values(torch.float32)
    ties = ties[ties.isfinite()].double()
    eps = torch.finfo(velocity).eps
    h = torch.cat([ties * (1 + eps / 2 + delta) for delta in (0.0, 2.0**-52, 2.0**-40, -(2.0**-52), 2.0**-26)])
    zero, v = torch.full(h.shape, -0.0, dtype=torch.float64), torch.zeros(h.shape, dtype=velocity)
    table = plain_row(torch.float64, b0=1.0, b1=1.0)
    results = []
    for step in (native.fused_step_, reference.fused_step_):
        out = torch.full(h.shape, float("nan"), dtype=torch.float64)
        step(Operands(out, zero, v, None, h, None, None, table, 0, ROUNDED))
        results.append(out)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[1], 0.0 + h.to(velocity).double())


@pytest.mark.parametrize("state, velocity", PAIRS, ids=name)
def test_coefficients_of_every_kind(state, velocity):
    """Zeros, infinities, NaN and denormals as coefficients and weights too."""
    arithmetic = arithmetic_dtype(state)
    generator = torch.Generator().manual_seed(0)
    x = values((64,), state, generator)
    v, u = (values((64,), velocity, generator) for _ in range(2))
    h = [values((64,), arithmetic, generator) for _ in range(3)]
    specials = special_values(arithmetic)
    for seed in range(64):
        table = specials[torch.randint(len(specials), (1, 8), generator=generator)]
        for rounding in (PROMOTE, EXACT, ROUNDED):
            results = []
            for step in (native.fused_step_, reference.fused_step_):
                out, kept = torch.full_like(x, float("nan")), torch.full_like(h[0], float("nan"))
                step(Operands(out, x, v, u, *h, table, 0, rounding, FORMS[seed % 3], False, None, None, 0, kept))
                results.append((out, kept))
            assert_same_bits(results[0][0], results[1][0])
            assert_same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("state, velocity", PAIRS, ids=name)
def test_flush_denormal(state, velocity):
    """torch.set_flush_denormal changes eager PyTorch and the kernel alike, on one thread."""
    torch.set_num_threads(1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    for combination in ((None, 0, None, None, True), *((guidance, 2, 3, "new", True) for guidance in FORMS)):
        compare((3, 1025), state, velocity, False, combination)


# ---- step roundings, out of the velocity's dtype, and the sums first ----


every_size = pytest.mark.parametrize(
    "numel, aligned", [(0, False), (1, False), (31, False), (1024, True), (1025, True), (40_000, True)]
)


def check_native(cases):
    """By the extension's function and by the registered op."""

    def registered(o):
        torch.ops.flowmatch_kernels.fused_step_(*o)

    for case in cases:
        assert triton_cases.failures(native.fused_step_, case) == []
        assert triton_cases.failures(registered, case) == []


@every_size
def test_sum_first_and_out_of_the_velocity_dtype(numel, aligned):
    check_native(triton_cases.special(numel, aligned))


@every_size
def test_noise_by_keys(numel, aligned):
    check_native(triton_cases.keyed(numel, aligned))


def test_noise_by_keys_is_a_draw_that_is_read():
    """The definition's own: keys give what the values that they draw give."""
    for case in triton_cases.keyed(1028, False):
        by_keys, _ = triton_cases.operands(case)
        x_dims, arithmetic = by_keys.base.shape[1:], arithmetic_dtype(case.state)
        drawn = reference_noise.keyed_noise(by_keys.h1, x_dims, arithmetic)
        by_values = triton_cases.copied(by_keys)._replace(h1=drawn)
        reference.fused_step_(by_keys)
        reference.fused_step_(by_values)
        for name in ("out", "trajectory", "history"):
            got, wanted = getattr(by_keys, name), getattr(by_values, name)
            assert got is None or triton_cases.differing(got, wanted) == 0, f"{name} [{case}]"


@pytest.mark.parametrize("dt", [0.1, -0.0343, 1 / 3])
@pytest.mark.parametrize(
    "state, velocity", [*itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2)]
)
def test_a_step_in_the_velocity_dtype_is_eager_pytorchs(state, velocity, dt):
    """float(sample) + dt * v, cast to v's dtype: dt a Python number, and a 0-dim tensor, as diffusers writes it."""
    generator = torch.Generator().manual_seed(0)
    sample, v = values((4099,), state, generator), values((4099,), velocity, generator)
    for rounding, factor in ((EXACT, dt), (ROUNDED, torch.tensor(dt))):
        wanted = (sample.float() + factor * v).to(velocity)
        for step in (native.fused_step_, reference.fused_step_):
            out = torch.full_like(v, float("nan"))
            step(Operands(out, sample, v, None, None, None, None, plain_row(b0=dt), 0, rounding))
            assert_same_bits(out, wanted, f"{rounding} {step}")


@pytest.mark.parametrize("dtype", VELOCITY_DTYPES, ids=name)
def test_the_sum_first_is_eager_pytorchs(dtype):
    """The expressions of torchdiffeq's fixed-grid methods, in their order; dt a 0-dim tensor of the state's dtype."""
    generator = torch.Generator().manual_seed(0)
    y, k1, k2, k3, k4 = (values((4099,), dtype, generator) for _ in range(5))
    dt, third = torch.tensor(0.37, dtype=dtype), 1 / 3
    arithmetic = arithmetic_dtype(dtype)
    for wanted, terms, row in (
        (y + dt * k1 * third, (k1,), {"b0": 1.0, "c": third}),
        (y + dt * (k2 - k1 * third), (k2, k1), {"b0": 1.0, "b1": -third, "c": 1.0}),
        (y + dt * (k1 - k2 + k3), (k3, k2, k1), {"b0": 1.0, "b1": -1.0, "b2": 1.0, "c": 1.0}),
        (
            y + (k1 + 3 * (k2 + k3) + k4) * dt * 0.125,
            (k4, k3, k2, k1),
            {"b0": 1.0, "b1": 3.0, "b2": float("nan"), "b3": 1.0, "c": 0.125},
        ),
        (y + dt * (k1 * 0.25 + k2 * 0.0 + k3 * 0.75), (k3, k2, k1), {"b0": 0.75, "b1": 0.0, "b2": 0.25, "c": 1.0}),
    ):
        table = plain_row(arithmetic, **row | {"a": float(dt)})
        v, *h = terms
        h = [*[term.to(arithmetic) for term in h], None, None, None][:3]
        for step in (native.fused_step_, reference.fused_step_):
            out = torch.full_like(y, float("nan"))
            step(Operands(out, y, v, None, *h, table, 0, sum_first=True))
            assert_same_bits(out, wanted, f"{row} {step}")


def test_dtypes_that_do_not_go_together():
    """Every C++ entry and the check in Python, in the same words."""
    x, y, z = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.float64)
    for out, base, v, rounding, sum_first, error, words in (
        (y, x, x, EXACT, False, TypeError, "out must be torch.float32"),
        (y, y, x, PROMOTE, False, TypeError, "wider than the state's torch.bfloat16"),
        (y, x, y, PROMOTE, False, TypeError, "out of v's dtype needs rounding 1 or 2, got 0"),
        (x, z, x, EXACT, False, TypeError, "base's dtype where base or v is torch.float64"),
        (x, x, y, EXACT, True, TypeError, "sum_first needs base, v and out of one dtype"),
        (x, x, x, 3, False, ValueError, "rounding must be 0, 1 or 2, got 3"),
    ):
        o = Operands(
            out,
            base,
            v,
            None,
            None,
            None,
            None,
            plain_row(arithmetic_dtype(base.dtype)),
            0,
            rounding,
            WEIGHTED,
            sum_first,
        )
        with pytest.raises(error, match=re.escape(words)):
            check_operands(o)
        with pytest.raises(error, match=re.escape(words)):
            torch.ops.flowmatch_kernels.fused_step_(*o)


# ---- every instruction set, though the module picks one ----

SETS = {"baseline": "", "avx2": "avx2", "avx512": "avx2 avx512f avx512bw avx512vl avx512dq"}


def instruction_set_runs(instruction_set):
    if not SETS[instruction_set]:
        return True
    with open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return all(feature in flags for feature in SETS[instruction_set].split())


@pytest.fixture
def level():
    """Sets which instruction set the extension takes, as csrc/instruction_set.h numbers them.

    Written into the variables of the extension that the other tests run: nothing is compiled for this.
    """
    native.instruction_set()  # has the variable initialised, which it would be by the first step
    path = os.path.realpath(native._C.__file__)
    with open("/proc/self/maps") as maps:
        base = min(int(line.partition("-")[0], 16) for line in maps if line.rstrip().endswith(path))
    symbols = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout
    offsets = re.findall(r"^(\w+) b _ZZ\w*instruction_set_levelEvE5level$", symbols, re.MULTILINE)
    assert offsets, f"{path} has no variable named level: is it stripped?"
    variables = [ctypes.c_int.from_address(base + int(offset, 16)) for offset in offsets]
    before = [variable.value for variable in variables]

    def choose(value):
        for variable in variables:
            variable.value = value

    yield choose
    for variable, value in zip(variables, before, strict=True):
        variable.value = value


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="one set only on this CPU")
@pytest.mark.parametrize("instruction_set", SETS)
def test_every_instruction_set(instruction_set, level):
    """By `make test-full` twice as many of the sets of operands at each shape and pair of dtypes."""
    if not instruction_set_runs(instruction_set):
        pytest.skip(f"this CPU has no {instruction_set}")
    level([*SETS].index(instruction_set))
    told = native.instruction_set().lower().replace("-", "")
    assert told.startswith({"baseline": "x8664"}.get(instruction_set, instruction_set))
    check_instruction_set(instruction_set, 38)


@pytest.mark.full
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="one set only on this CPU")
def test_every_instruction_set_full(level):
    for k, instruction_set in enumerate(SETS):
        if instruction_set_runs(instruction_set):
            level(k)
            check_instruction_set(instruction_set, 19)


def check_instruction_set(instruction_set, parts):
    """Each of `parts` parts of all sets of operands at least twice, by other dtypes, rounding and shape."""
    shapes = [(1,), (31,), (3, 700), (2, 1025)]
    for turn, ((state, velocity), rounding, shape) in enumerate(
        itertools.product(PAIRS, (PROMOTE, EXACT, ROUNDED), shapes)
    ):
        for seed, combination in itertools.islice(enumerate(combinations()), turn % parts, None, parts):
            compare(shape, state, velocity, rounding, combination, in_place=bool(seed % 2), seed=seed)
    special = [*triton_cases.special(1025, False), *triton_cases.keyed(1025, False), *triton_cases.keyed(1028, True)]
    failed = [failure for case in special for failure in triton_cases.failures(native.fused_step_, case)]
    assert failed == [], instruction_set


def test_module_uses_the_widest_set():
    wanted = "baseline"
    if platform.machine() == "x86_64":
        wanted = next(s for s in ("avx512", "avx2", "baseline") if instruction_set_runs(s))
    told = native.instruction_set().lower().replace("-", "")
    assert told.startswith(wanted) or wanted == "baseline"
