"""What only a GPU can show, marked `gpu`; each test's body runs on the CPU too, in every run, unchanged.

A place is a device and a backend. On the CPU what a GPU alone has (streams, graphs, kernels to count) is a stand-in
of tests/gpu_operands.py, so that nothing here meets its first GPU with a slip in it. What a test claims of the GPU is
claimed by its `gpu` half only.

FLOWMATCH_KERNELS_REQUIRE_GPU=1: for want of a device each test fails; for want of a backend one does, and the others
skip with the reason.
"""

from __future__ import annotations

import itertools

import log_prob_operands
import published
import pytest
import token_cases
import torch
from gpu_operands import (
    Place,
    assert_all_same,
    busy,
    captured,
    free_memory,
    kernels,
    no_synchronisation,
    on_second_device,
    run,
)
from operands import FORMS, FORMULAS, LAYOUTS, assert_same_bits, bits, combinations, laid_out, values

from flowmatch_kernels import FittedSolver, FlowMatching, KeyedNoise, available_backends, use_backend
from flowmatch_kernels.graphs import GraphCaptureError
from flowmatch_kernels.noise import keys as noise_keys
from flowmatch_kernels.ops import dispatch, reference, reference_log_prob
from flowmatch_kernels.ops.fused_step import (
    COLUMNS,
    FROM_UNGUIDED,
    PROMOTE,
    ROUNDED,
    VELOCITY_DTYPES,
    WEIGHTED,
    Operands,
    arithmetic_dtype,
)
from flowmatch_kernels.solvers import STOCHASTIC

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
PLACES = [("cpu", "cpu"), ("cpu", "reference"), ("cuda", "triton"), ("cuda", "cuda"), ("cuda", "reference")]
FUSED = [("cpu", "cpu"), ("cuda", "triton"), ("cuda", "cuda")]
PAIRS = [(state, velocity) for state, narrower in VELOCITY_DTYPES.items() for velocity in narrower]
PRIME = 1_000_003

# Which operands there are, with shapes whose slots are on 16-byte boundaries, and shapes whose are not.
COMBINATIONS = list(combinations())
ALIGNED, UNALIGNED = [(4, 64), (2, 1024), (16, 8, 2)], [(3, 43), (5, 257), (1, 1023)]
SHAPES = [(0,), (1,), (31,), (1023,), (1024,), (1025,), (PRIME,), (0, 3), (6, 64, 2), (3, 5, 7, 11), (2, 1, 3, 1, 5)]


def name(parameter):
    return str(parameter).replace("torch.", "").replace(" ", "")


def placed(places):
    """Runs a test at each of these places; those with a GPU are marked so."""
    parameters = [pytest.param(x, marks=gpu if x[0] == "cuda" else (), id="-".join(x)) for x in places]
    return pytest.mark.parametrize("place", parameters, indirect=True)


@pytest.fixture
def place(request):
    device, backend = request.param
    reason = available_backends()[backend]
    if reason is not None:
        (pytest.fail if device == "cpu" else pytest.skip)(f"backend {backend}: {reason}")
    return Place(torch.device(device, 0) if device == "cuda" else torch.device(device), backend)


@pytest.fixture
def device(request):
    return torch.device(request.param)


on_each_device = pytest.mark.parametrize("device", DEVICES, indirect=True)


# ---- the exactness matrix: a backend against reference, on the device and on the CPU ----


def check(place, *arguments, **keywords):
    got = run(place.fused_step_, place.device, *arguments, **keywords)
    wanted = run(reference.fused_step_, place.device, *arguments, **keywords)
    assert_all_same(got, wanted, f"{place} {arguments} {keywords}")
    if place.gpu:
        there = run(reference.fused_step_, torch.device("cpu"), *arguments, **keywords)
        assert_all_same(wanted, there, f"reference on {place.device} and on the CPU, {arguments} {keywords}")


def check_combinations(place, state, velocity, chosen):
    for seed in chosen:
        n = seed + seed // len(COMBINATIONS)  # the second time round each combination meets other circumstances
        aligned, rounding, in_place = n % 4 != 0, n // 4 % 3, n % 7 == 0
        check(
            place,
            (ALIGNED if aligned else UNALIGNED)[n % 3],
            state,
            velocity,
            rounding,
            COMBINATIONS[seed % len(COMBINATIONS)],
            seed=seed,
            aligned=aligned,
            in_place=in_place,
        )


@placed(PLACES)
@pytest.mark.parametrize("state, velocity", PAIRS, ids=name)
def test_combinations(place, state, velocity):
    """Every fifth combination, each pair of dtypes beginning with another: Triton compiles nearly each anew."""
    first = PAIRS.index((state, velocity)) % 5
    check_combinations(place, state, velocity, range(first, len(COMBINATIONS), 5 if place.gpu else 25))


@pytest.mark.full
@placed(PLACES)
@pytest.mark.parametrize("state, velocity", PAIRS, ids=name)
def test_every_combination(place, state, velocity):
    """Each ten times: aligned and not, with each rounding, in place and not."""
    check_combinations(place, state, velocity, range(len(COMBINATIONS) * (10 if place.gpu else 1)))


@placed(PLACES)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_sizes_and_ranks(place, shape):
    if not place.gpu:  # where every size is tested by tests/test_exactness.py
        shape = tuple(min(size, 5003) for size in shape)
    pairs = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)]
    for state, velocity in pairs:
        for seed, combination in enumerate([(None, 0, None, None, True), (FROM_UNGUIDED, 1, 3, "new", True)]):
            for aligned in (True, False):
                check(place, shape, state, velocity, False, combination, seed=seed, aligned=aligned)


@placed(PLACES)
def test_stochastic_solvers(place):
    """States and log-probabilities: the bits of the reference on the CPU, and of each sample alone."""

    def step_fn(x, t):
        return (0.5 * x - t * x).to(x.dtype)

    for solver, dtype in itertools.product(sorted(STOCHASTIC), (torch.float32, torch.bfloat16, torch.float64)):
        given = {"noise": KeyedNoise(3), "dtype": dtype, "return_all_steps": True, "return_log_prob": True}
        given["time_steps"] = [0.0, 0.2, 0.5, 0.9]
        fm = FlowMatching((33, 5) if dtype is torch.bfloat16 else (64, 2), solver)  # whole fours of elements, and not
        wanted = fm.sample(3, step_fn, backend="reference", **given)
        got = fm.sample(3, step_fn, place.device, backend=place.backend, **given)
        for one, other in zip(got, wanted, strict=True):
            assert_same_bits(one.cpu(), other)
        given["noise"] = KeyedNoise(3, first=2)
        alone = fm.sample(1, step_fn, place.device, backend=place.backend, **given)
        assert_same_bits(alone[0].cpu(), wanted[0][2:])
        assert_same_bits(alone[2].cpu(), wanted[2][2:])
        given |= {
            "noise": KeyedNoise(3),
            "time_steps": [[0.3, 0.3, 0.5, 0.9], [0.0, 0.1, 0.5, 0.5], [0.2, 0.5, 0.6, 0.8]],
        }
        wanted = fm.sample(3, step_fn, backend="reference", **given)
        got = fm.sample(3, step_fn, place.device, backend=place.backend, **given)
        for one, other in zip(got, wanted, strict=True):
            assert_same_bits(one.cpu(), other)
        assert got[2][0, 0] == got[2][1, 2] == 0


@placed(PLACES)
@pytest.mark.parametrize("dtype", VELOCITY_DTYPES, ids=name)
def test_keyed_noise(place, dtype):
    """The bits of the reference on the CPU; and a sample's alone are those it has in the batch."""
    noise = KeyedNoise(0x9234567887654321, first=2**32 - 2, stream=40000)
    for x_dims in [(1,), (7,), (64, 2), (511,), (1025,), (PRIME if place.gpu else 5003,)]:
        wanted = noise.draw(5, x_dims, dtype=dtype, backend="reference")
        got = noise.draw(5, x_dims, place.device, dtype, backend=place.backend)
        assert_same_bits(got.cpu(), wanted)
        alone = KeyedNoise(noise.seed, noise.first + 4, noise.stream)
        assert_same_bits(alone.draw(1, x_dims, place.device, dtype, backend=place.backend).cpu(), wanted[4:])
        fm = FlowMatching(x_dims, num_inference_steps=0, backend=place.backend)
        keys = [KeyedNoise(noise.seed, noise.first + i, noise.stream) for i in (3, 0)]
        assert_same_bits(fm.sample(2, torch.add, place.device, noise=keys, dtype=dtype).cpu(), wanted[[3, 0]])


@placed(PLACES)
def test_step_log_prob(place):
    """The bits of the reference on the CPU: every pair of dtypes, sizes around the lanes, hostile values."""
    sizes = log_prob_operands.SIZES if place.gpu else (31, 1025)  # the CPU's: tests/test_step_log_prob.py
    for state, velocity in log_prob_operands.PAIRS:
        for n, (special, own_rows) in itertools.product(sizes, ((False, False), (True, False), (True, True))):
            operands = log_prob_operands.drawn([3, n], state, velocity, special, own_rows=own_rows)
            there = [x.to(place.device) for x in operands]
            there[1] = torch.cat([there[1].flatten()[:1], there[1].flatten()])[1:].view(there[1].shape)  # off 16 bytes
            for given in ([x.to(place.device) for x in operands], there):
                got = dispatch.step_log_prob(*given, 1, place.backend)
                assert_same_bits(got.cpu(), reference_log_prob.step_log_prob(*operands, 1), f"{n} {state} {velocity}")


@placed(PLACES)
@pytest.mark.parametrize("shape", [(7,), (6, 64), (2, 3, 5, 7)], ids=name)
def test_layouts_of_the_velocity(place, shape):
    for layouts in itertools.product(LAYOUTS, LAYOUTS):
        if any(laid_out(torch.zeros(shape), layout) is None for layout in layouts):
            continue
        combination = (FORMS[sum(map(LAYOUTS.index, layouts)) % 3], 1, 3, "new", True)
        check(place, shape, torch.float32, torch.bfloat16, False, combination, layouts=layouts)


# ---- the exactness matrix: a backend against eager PyTorch's own expressions on the same device ----

DTS = [0.1, 1 / 3, -0.1, 0.02, 1e-30]


def drawn(device, dtype, seed, shape=(97, 31)):
    return values(shape, dtype, torch.Generator().manual_seed(seed)).to(device)


def row(dtype, device, **columns):
    """[1, 8]: a = 1, and these."""
    table = torch.zeros(1, len(COLUMNS), dtype=dtype)
    for column, value in ({"a": 1.0} | columns).items():
        table[0, COLUMNS.index(column)] = value
    return table.to(device)


def stepped(place, base, v, table, u=None, h=(), rounding=PROMOTE, guidance=WEIGHTED):
    out = torch.full_like(base, torch.nan)
    terms = [*h, *[None] * (3 - len(h))]
    place.fused_step_(Operands(out, base, v, u, *terms, table, 0, rounding, guidance, False, None, None, 0, None))
    return out.cpu()


@placed(PLACES)
@pytest.mark.parametrize("state, velocity", [p for p in PAIRS if p[0].itemsize > 2], ids=name)
def test_eager_plain(place, state, velocity):
    """x + dt*v, dt a tensor of dim >= 1: the product is rounded to the state's dtype, and no FMA."""
    x, v = drawn(place.device, state, 1), drawn(place.device, velocity, 2)
    for dt in DTS:
        step = torch.tensor([[dt]], dtype=state, device=place.device)
        assert_same_bits(stepped(place, x, v, row(state, place.device, b0=dt)), (x + step * v).cpu(), f"dt {dt}")
    fma = (x.double() + torch.tensor([[0.1]], dtype=state, device=place.device).double() * v.double()).to(state)
    if state == velocity == torch.float32:
        plain = stepped(place, x, v, row(state, place.device, b0=0.1))
        assert (bits(plain) != bits(fma.cpu())).any(), "these operands cannot tell an FMA"


@placed(PLACES)
@pytest.mark.parametrize("dtype", VELOCITY_DTYPES, ids=name)
def test_eager_python_float(place, dtype):
    """x + dt*v, dt a Python float, as GR00T has it: in 16 bits, each product and each sum is rounded."""
    x, v = drawn(place.device, dtype, 1), drawn(place.device, dtype, 2)
    for dt in DTS:
        table = row(arithmetic_dtype(dtype), place.device, b0=dt)
        assert_same_bits(stepped(place, x, v, table), (x + dt * v).cpu(), f"dt {dt}")


@placed(PLACES)
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("state, velocity", PAIRS, ids=name)
def test_eager_guidance(place, state, velocity, formula):
    """The four published formulas in the velocity's dtype, with Python floats as weights: each rounds as written."""
    combined, guidance, weights = FORMULAS[formula]
    x, v, u = drawn(place.device, state, 1), drawn(place.device, velocity, 2), drawn(place.device, velocity, 3)
    arithmetic = arithmetic_dtype(state)
    for w in (0.0, 1.0, 1.5, 7.1, -0.3, 1 / 3):
        guided, (w0, w1) = combined(u, v, w), weights(w)
        step = torch.tensor([[0.1]], dtype=arithmetic, device=place.device)
        wanted = x + 0.1 * guided if state == velocity else x + step * guided
        table = row(arithmetic, place.device, b0=0.1, w0=w0, w1=w1)
        assert_same_bits(stepped(place, x, v, table, u, guidance=guidance), wanted.cpu(), f"w {w}")


@placed(PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_eager_diffusers(place, dtype):
    """FlowMatchEulerDiscreteScheduler.step with sigmas on the GPU: dt, 0-dim and there, is rounded to 16 bits first."""
    sample, v = drawn(place.device, dtype, 1), drawn(place.device, dtype, 2)
    for dt in DTS:
        step = torch.tensor(dt, device=place.device)
        wanted = (sample.float() + (step * v)).to(dtype)
        table = row(torch.float32, place.device, b0=dt)
        got = stepped(place, sample.float(), v, table, rounding=ROUNDED).to(dtype)
        assert_same_bits(got, wanted.cpu(), f"dt {dt}")


@placed(PLACES)
@pytest.mark.parametrize("state", VELOCITY_DTYPES, ids=name)
def test_eager_history(place, state):
    """Left to right, each product and each partial sum rounded to the state's dtype."""
    arithmetic = arithmetic_dtype(state)
    x, v = drawn(place.device, state, 1), drawn(place.device, state, 2)
    h = [drawn(place.device, arithmetic, 3 + k) for k in range(3)]
    table = row(arithmetic, place.device, a=0.7, b0=0.3, b1=-1.1, b2=0.9, b3=1 / 3)
    a, *b = table[0, :5, None, None].unbind()
    for terms in range(4):
        wanted = (a * x).to(state) + (b[0] * v).to(state)
        for k in range(terms):
            wanted = wanted + (b[k + 1] * h[k]).to(state)
        assert_same_bits(stepped(place, x, v, table, h=h[:terms]), wanted.cpu(), f"{terms} terms")


@placed(PLACES)
@pytest.mark.parametrize("state", VELOCITY_DTYPES, ids=name)
def test_rows_of_samples_and_tokens(place, state):
    """[16, 8, 6] has whole vectors for a row and [5, 3, 7] has not: a step by eager PyTorch, but where dt is 0."""
    arithmetic = arithmetic_dtype(state)
    for shape, k in itertools.product([(16, 8, 6), (5, 3, 7)], (1, 2)):
        x, v = drawn(place.device, state, 1, shape), drawn(place.device, state, 2, shape)
        dt = drawn(place.device, arithmetic, 3, shape[:k]).nan_to_num(0.0, 0.5, -0.5)
        table = row(arithmetic, place.device).repeat(dt.numel(), 1)
        table[:, 1] = dt.flatten()
        dt = dt.view(*shape[:k], *[1] * (3 - k))
        wanted = torch.where(dt == 0, x, x + (dt * v).to(state))
        assert_same_bits(stepped(place, x, v, table[None]), wanted.cpu(), f"{shape} {k}")


@placed(PLACES)
def test_times_of_tokens(place):
    """sample() with a grid for each token has the bits that it has with each token as a sample of its own."""
    for case in list(token_cases.cases())[::4]:
        token_cases.check(case, place.backend, place.device)


# ---- the 0-dim table of numerics.md: what eager PyTorch itself does ----

# scalar, tensor's device, scalar on the left, is the scalar rounded to the tensor's dtype before the product?
ZERO_DIM = [
    ("Python float", "cpu", True, False),
    ("Python float", "cpu", False, False),
    ("0-dim on the CPU", "cpu", True, True),
    ("0-dim on the CPU", "cpu", False, False),
    ("Python float", "cuda", True, False),
    ("Python float", "cuda", False, False),
    ("0-dim on the GPU", "cuda", True, True),
    ("0-dim on the GPU", "cuda", False, True),
    ("0-dim on the CPU", "cuda", True, False),
    ("0-dim on the CPU", "cuda", False, False),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize(
    "scalar, device, left, rounded",
    [
        pytest.param(*case, marks=gpu if case[1] == "cuda" else (), id=f"{case[1]}: {case[0]}, left={case[2]}")
        for case in ZERO_DIM
    ],
)
def test_scalar_times_tensor(scalar, device, left, rounded, dtype):
    v = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    for dt in (0.1, 1 / 3, -0.02):
        exact = torch.tensor(dt)
        first, unrounded = ((s * v.float()).to(dtype) for s in (exact.to(dtype).float(), exact))
        assert not torch.equal(first, unrounded), "these operands cannot tell the two roundings apart"
        factor = {
            "Python float": dt,
            "0-dim on the CPU": torch.tensor(dt),
            "0-dim on the GPU": torch.tensor(dt, device=device),
        }[scalar]
        on_device = v.to(device)
        product = factor * on_device if left else on_device * factor
        assert_same_bits(product.cpu(), first if rounded else unrounded, f"dt {dt}")


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_one_dim_times_tensor(device, dtype):
    """A float32 tensor of dim >= 1 is not rounded, and the product is float32."""
    v = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    dt = torch.tensor([[0.1]])
    wanted = dt * v.float()
    for product in (dt.to(device) * v.to(device), v.to(device) * dt.to(device)):
        assert_same_bits(product.cpu(), wanted)


# ---- sample() against the published loop on the same device ----


def field(dtype=torch.float32, weight=0.7):
    def step_fn(*, x, t):
        return (torch.sin(3 * x) * weight + t * x - (1 - t)).to(dtype)

    return step_fn


def random_state(device):
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def assert_sampled_as_published(place, dims, batch_size, steps, fns, *, weight=1.7, return_all_steps=False, **keywords):
    guided = len(fns) == 2
    torch.manual_seed(7)
    got = FlowMatching(dims, backend=place.backend).sample(
        batch_size,
        fns[0],
        place.device,
        return_all_steps,
        steps,
        unguided_step_fn=fns[1] if guided else None,
        use_classifier_free_guidance=guided,
        inference_guidance_weight=weight,
        **keywords,
    )
    state = random_state(place.device)
    torch.manual_seed(7)
    wanted = published.sample(
        batch_size,
        fns[0],
        dims,
        steps,
        return_all_steps=return_all_steps,
        unguided_step_fn=fns[1] if guided else None,
        weight=weight,
        device=place.device,
        **keywords,
    )
    assert torch.equal(state, random_state(place.device)), "other draws than the published loop's"
    got, wanted = (x if isinstance(x, tuple) else (x,) for x in (got, wanted))
    assert len(got) == len(wanted)
    for x, y in zip(got, wanted, strict=True):
        assert x.device == y.device
        assert x.is_contiguous()
        assert_same_bits(x.cpu(), y.cpu())
    return got


@placed(PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("return_all_steps", [False, True], ids=["last", "trajectory"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dims", [(64, 2), (3, 5, 1), (1021,)], ids=name)
def test_sample(place, dims, guided, return_all_steps, dtype):
    fns = [field(dtype), field(dtype, weight=-0.2)][: 1 + guided]
    for batch_size, steps in ((0, 3), (1, 10), (6, 10), (6, 50), (64, 5)) if place.gpu else ((6, 10),):
        assert_sampled_as_published(place, dims, batch_size, steps, fns, return_all_steps=return_all_steps)


@placed(PLACES)
def test_sample_in_float64_and_bfloat16(place):
    """A float64 default; and GR00T's bfloat16 state with dt a Python float."""
    torch.set_default_dtype(torch.float64)
    assert_sampled_as_published(place, (64, 2), 6, 10, [field(torch.float64)], return_all_steps=True)
    torch.set_default_dtype(torch.float32)
    noise = torch.randn(6, 64, 32).to(place.device, torch.bfloat16)
    grid = (torch.arange(5) / 4).to(place.device)
    arguments = {"noise": noise, "time_steps": grid, "step_sizes": [0.25] * 4, "return_all_steps": True}
    step_fn = field(torch.bfloat16)
    got, _ = FlowMatching((64, 32), backend=place.backend).sample(6, step_fn, place.device, **arguments)
    assert_same_bits(got.cpu(), published.sample_on_grid(step_fn, noise, grid, [0.25] * 4).cpu())


@placed(PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
def test_torchdiffeq(place, dtype):
    """torchdiffeq's own loop on the device, whose dt, a 0-dim tensor there, is rounded to a state of 16 bits."""
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="the oracle is torchdiffeq itself, of the test extra")
    from flowmatch_kernels.integrations import torchdiffeq as ours

    y0, t = torch.randn(64, 32).to(place.device, dtype), torch.linspace(0, 1, 6, device=place.device)
    with torch.no_grad(), use_backend(place.backend):
        for method in ours.METHODS:
            wanted, got = (
                f(lambda t, y: t * y - y * y, y0, t, method=method) for f in (torchdiffeq.odeint, ours.odeint)
            )
            assert_same_bits(got.cpu(), wanted.cpu(), method)


@placed(PLACES)
def test_fitted_solver(place):
    """Fitted on the device, its bits are those of the CPU's reference; its converged states may be kept on the CPU."""
    fm, step_fn = FlowMatching((8, 4)), field(torch.float32)
    solver = fm.fit_solver(
        step_fn, 4, batch_size=64, device=place.device, backend=place.backend, trajectory_device="cpu"
    )
    assert solver.errors["fitted"] <= solver.errors["euler"]
    noise = torch.randn(64, 8, 4)
    # A velocity without a transcendental function: those of two devices differ by a bit.
    arguments = {"int_method": solver, "return_all_steps": True}
    linear = lambda x, t: x * t - x  # noqa: E731
    wanted, _ = fm.sample(64, linear, noise=noise, backend="reference", **arguments)
    noise = noise.to(place.device)
    got, _ = fm.sample(64, linear, place.device, noise=noise, backend=place.backend, **arguments)
    assert_same_bits(got.cpu(), wanted)


@placed(PLACES)
@pytest.mark.parametrize("velocity", ["x itself", "a view of x", "one buffer", "kept x", "not contiguous", "writes x"])
def test_step_fns(place, velocity):
    """What real step_fns do with x and with what they return."""
    dims, kept = (6, 8), []
    buffer = torch.empty(4, *dims, device=place.device)

    def step_fn(x, t):
        if velocity == "x itself":
            return x
        if velocity == "a view of x":
            return x.flip(0).transpose(1, 2).transpose(1, 2)
        if velocity == "one buffer":
            return buffer.copy_(torch.sin(x) * (1 + t))
        if velocity == "kept x":
            kept.append((x, x.clone()))
        if velocity == "writes x":
            return x.mul_(0.5).clone()
        return torch.cos(x).transpose(1, 2).contiguous().transpose(1, 2)

    for return_all_steps in (False, True):
        assert_sampled_as_published(place, dims, 4, 5, [step_fn], return_all_steps=return_all_steps)
    if velocity == "one buffer":  # both velocities of guidance in it, as a replayed graph leaves them
        got = FlowMatching(dims, backend=place.backend).sample(
            4,
            step_fn,
            place.device,
            unguided_step_fn=lambda x, t: buffer.copy_(torch.cos(x)),
            use_classifier_free_guidance=True,
            inference_guidance_weight=1.5,
            noise=buffer.new_ones(buffer.shape),
        )
        copies = [lambda x, t: torch.sin(x) * (1 + t), lambda x, t: torch.cos(x)]
        wanted = published.sample(
            *(4, copies[0], dims, 10),
            unguided_step_fn=copies[1],
            weight=1.5,
            noise=buffer.new_ones(buffer.shape),
            device=place.device,
        )
        assert_same_bits(got.cpu(), wanted.cpu())
    for x, copy in kept:
        assert_same_bits(x.cpu(), copy.cpu(), "a state that step_fn kept")


@placed(PLACES)
def test_generators(place):
    """One on the CPU draws there, and the noise is moved; one on the device draws on the device."""
    fm = FlowMatching((64, 2), backend=place.backend)
    for where in {torch.device("cpu"), place.device}:
        generator = torch.Generator(where).manual_seed(3)
        noise = torch.randn(6, 64, 2, generator=torch.Generator(where).manual_seed(3), device=where)
        got = fm.sample(6, field(), place.device, generator=generator)
        assert got.device == place.device
        wanted = published.sample(6, field(), (64, 2), 10, noise=noise.to(place.device), device=place.device)
        assert_same_bits(got.cpu(), wanted.cpu(), f"generator on {where}")


@placed(PLACES)
def test_another_device_is_refused(place):
    other = "cpu" if place.gpu else "meta"
    fm = FlowMatching((3, 2), backend=place.backend)
    with pytest.raises(ValueError, match=other):
        fm.sample(2, lambda x, t: x.to(other), place.device)


# ---- streams, devices, graphs ----


@placed(PLACES)
@pytest.mark.parametrize("return_all_steps", [False, True], ids=["last", "trajectory"])
def test_another_stream(place, return_all_steps):
    """All of it runs on the current stream: that one is kept busy before it writes the noise, NaN until then."""
    dims, batch_size = (64, 2), 6
    fm = FlowMatching(dims, backend=place.backend)
    source = torch.randn(batch_size, *dims, device=place.device)
    wanted = published.sample(
        batch_size, field(), dims, 10, noise=source, device=place.device, return_all_steps=return_all_steps
    )
    fm.sample(batch_size, field(), place.device, noise=source, return_all_steps=return_all_steps)  # compiles
    noise = torch.full_like(source, torch.nan)
    place.module.synchronize()
    stream = place.module.Stream()
    with place.module.stream(stream):
        busy(place.device, 50)
        noise.copy_(source)
        got = fm.sample(batch_size, field(), place.device, return_all_steps, noise=noise)
    place.module.synchronize()
    for x, y in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, wanted)), strict=True):
        assert_same_bits(x.cpu(), y.cpu())


@placed(PLACES)
def test_another_stream_builds_the_table(place):
    """A table first built on one stream is right on another that does not wait for it."""
    fm, noise = FlowMatching((64, 2), backend=place.backend), torch.randn(6, 64, 2, device=place.device)
    fm.sample(6, field(), place.device, noise=noise)
    place.module.synchronize()
    with place.module.stream(place.module.Stream()):
        busy(place.device, 50)
        fm.sample(6, field(), place.device, noise=noise, inference_step=13)
    with place.module.stream(place.module.Stream()):
        got = fm.sample(6, field(), place.device, noise=noise, inference_step=13)
    place.module.synchronize()
    wanted = published.sample(6, field(), (64, 2), 13, noise=noise, device=place.device)
    assert_same_bits(got.cpu(), wanted.cpu())


def draw_and_log_prob(place, keys, operands):
    z = dispatch.keyed_noise(keys, (64, 2), torch.float32, 3, place.backend)
    return z, dispatch.step_log_prob(*operands, 1, place.backend)


def keys_and_operands(device):
    operands = log_prob_operands.drawn([6, 64, 2], torch.float32, torch.bfloat16)
    return noise_keys(KeyedNoise(7), 6, device), [x.to(device) for x in operands]


@placed(PLACES)
def test_noise_and_log_prob_on_another_stream(place):
    """On the current one, which is kept busy before it writes what both read."""
    given, operands = keys_and_operands(place.device)
    wanted = draw_and_log_prob(place, given, operands)  # compiles
    late, later = torch.zeros_like(given), [torch.zeros_like(x) for x in operands]
    place.module.synchronize()
    with place.module.stream(place.module.Stream()):
        busy(place.device, 50)
        for target, source in zip([late, *later[:3]], [given, *operands[:3]], strict=True):
            target.copy_(source)
        got = draw_and_log_prob(place, late, [*later[:3], *operands[3:]])
    place.module.synchronize()
    for x, y in zip(got, wanted, strict=True):
        assert_same_bits(x.cpu(), y.cpu())


@placed(PLACES)
def test_noise_and_log_prob_on_a_second_device(place):
    second, current = on_second_device(place), place.module.current_device()
    got = draw_and_log_prob(second, *keys_and_operands(second.device))
    assert place.module.current_device() == current
    cpu = torch.device("cpu")
    for x, y in zip(got, draw_and_log_prob(Place(cpu, "reference"), *keys_and_operands(cpu)), strict=True):
        assert_same_bits(x.cpu(), y)


@placed(PLACES)
def test_second_device(place):
    """On a device that is not the current one, which stays the current one."""
    second = on_second_device(place)
    current = place.module.current_device()
    for return_all_steps in (False, True):
        fns = [field(torch.bfloat16), field(torch.bfloat16, weight=0.1)]
        assert_sampled_as_published(second, (64, 2), 6, 10, fns, return_all_steps=return_all_steps)
        assert place.module.current_device() == current


@placed(PLACES)
@pytest.mark.parametrize("return_all_steps", [False, True], ids=["last", "trajectory"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_graph(place, guided, return_all_steps):
    """A whole sample(), the model included, captured once and replayed on other noise."""
    dims, batch_size = (64, 2), 6
    fns = [field(torch.bfloat16), field(torch.bfloat16, weight=-0.2)][: 1 + guided]
    fm = FlowMatching(dims, backend=place.backend)
    noise = torch.randn(batch_size, *dims, device=place.device)

    def sample():
        got = fm.sample(
            batch_size,
            fns[0],
            place.device,
            return_all_steps,
            noise=noise,
            unguided_step_fn=fns[1] if guided else None,
            use_classifier_free_guidance=guided,
            inference_guidance_weight=1.7,
        )
        return got if return_all_steps else (got,)

    results, replay = captured(sample, place.device)
    for seed in range(3):
        noise.copy_(torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed)))
        wanted = published.sample(
            *(batch_size, fns[0], dims, 10),
            return_all_steps=return_all_steps,
            unguided_step_fn=fns[1] if guided else None,
            weight=1.7,
            noise=noise,
            device=place.device,
        )
        wanted = wanted if return_all_steps else (wanted,)
        for result in results:
            result.fill_(torch.nan)
        replay()
        place.module.synchronize()
        for x, y in zip(results, wanted, strict=True):
            assert_same_bits(x.cpu(), y.cpu(), f"replay {seed}")
    if place.gpu and place.backend != "reference":
        launches = [kernel for kernel in kernels(replay, place.device) if "fused_step" in kernel]
        assert len(launches) == 10
    assert_sampled_as_published(place, dims, batch_size, 10, fns, return_all_steps=True)  # eager, afterwards


@placed(PLACES)
def test_graph_of_every_table(place):
    """Tables that are made on the host: a grid with a name or as a list, weights, predictions, a fitted solver."""
    guided = {"use_classifier_free_guidance": True, "unguided_step_fn": lambda x, t: -x}
    configurations = [
        ({"time_grid": "shifted", "time_grid_options": {"shift": 3.0}}, {}),
        ({"time_grid": "cosine", "int_method": "ab3"}, {}),
        ({"prediction_type": "data"}, {}),
        ({"int_method": "heun", "euler_at_final": True}, {"time_steps": [0.0, 0.1, 0.5, 1.0]}),
        ({}, guided | {"inference_guidance_weight": [1.0, 2.0, 3.0], "inference_step": 3}),
        ({"int_method": FittedSolver((0.0, 0.4, 1.0), ((1.0, 0.4), (1.0, 0.7, -0.1)))}, {}),
    ]
    noise = torch.randn(6, 64, 2, device=place.device)
    for constructor, arguments in configurations:
        fm = FlowMatching((64, 2), backend=place.backend, **constructor)

        def sample(fm=fm, arguments=arguments):
            # A velocity without a transcendental function: those of two devices differ by a bit.
            return (fm.sample(6, lambda x, t: x * t - x, place.device, noise=noise, **arguments),)

        results, replay = captured(sample, place.device)
        for seed in range(2):
            noise.copy_(torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed)))
            results[0].fill_(torch.nan)
            replay()
            place.module.synchronize()
            assert_same_bits(results[0], sample()[0], f"{constructor}, replay {seed}")


# ---- cost: launches, copies, waiting ----


def kernels_of_a_step(place, **keywords):
    """Kernels and copies per step: what 20 more steps add. step_fn is free."""
    fm = FlowMatching((64, 2), backend=place.backend)
    v = torch.randn(6, 64, 2, device=place.device)
    v = keywords.pop("velocity", lambda v: v)(v)
    names = {}
    for steps in (10, 30):

        def sample(steps=steps):
            fm.sample(6, lambda x, t: v, place.device, inference_step=steps, **keywords)

        sample()  # compiles, and fills the cache of tables
        kernels(sample, place.device)  # a profiler's first run is not like the others
        names[steps] = kernels(sample, place.device)
    more = len(names[30]) - len(names[10])
    assert more % 20 == 0, f"{more} kernels more for 20 more steps: {names}"
    return more // 20, names[30]


@placed(FUSED)
@pytest.mark.parametrize("return_all_steps", [False, True], ids=["last", "trajectory"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_one_launch_an_evaluation(place, guided, return_all_steps):
    keywords = {"return_all_steps": return_all_steps}
    if guided:
        u = torch.randn(6, 64, 2, device=place.device)
        keywords |= {"unguided_step_fn": lambda x, t: u, "use_classifier_free_guidance": True}
        keywords |= {"inference_guidance_weight": 1.5}
    each, names = kernels_of_a_step(place, **keywords)
    assert each == int(place.gpu), names
    own = [kernel for kernel in names if "fused_step" in kernel]
    assert len(own) == (30 if place.gpu else 0), names
    # C++ names its kernel with its namespace, Triton does not.
    assert all(("flowmatch_kernels" in kernel) == (place.backend == "cuda") for kernel in own), own


@placed(FUSED)
def test_one_launch_of_a_draw_and_of_a_log_prob(place):
    given, operands = keys_and_operands(place.device)
    draw_and_log_prob(place, given, operands)  # compiles
    kernels(lambda: None, place.device)  # a profiler's first run is not like the others
    names = kernels(lambda: draw_and_log_prob(place, given, operands), place.device)
    wanted = ["keyed_noise", "step_log_prob"] if place.gpu else []
    assert [[op in n for op in wanted] for n in names] == [[True, False], [False, True]][: len(wanted)], names
    assert all(("flowmatch_kernels" in n) == (place.backend == "cuda") for n in names), names


@placed(FUSED)
def test_a_stochastic_step_draws_its_noise(place):
    """One launch a step, and one draw, of the start."""
    fm, v = FlowMatching((64, 2), "sde", 30, backend=place.backend), torch.randn(6, 64, 2, device=place.device)

    def sample():
        fm.sample(6, lambda x, t: v, place.device, noise=KeyedNoise(7))

    sample()  # compiles, and fills the cache of tables
    kernels(sample, place.device)  # a profiler's first run is not like the others
    names = kernels(sample, place.device)
    counts = [sum(op in kernel for kernel in names) for op in ("fused_step", "keyed_noise")]
    assert counts == ([30, 1] if place.gpu else [0, 0]), names


@placed(FUSED)
def test_one_copy_of_a_velocity_that_is_not_contiguous(place):
    each, names = kernels_of_a_step(place, velocity=lambda v: v.transpose(1, 2).contiguous().transpose(1, 2))
    assert each == 2 * place.gpu, names


@placed(FUSED)
@pytest.mark.parametrize("return_all_steps", [False, True], ids=["last", "trajectory"])
def test_nothing_waits_for_the_device(place, return_all_steps):
    """With the stream kept busy for a second, sample() is back before it is idle: nothing at all waited."""
    fm, v = FlowMatching((64, 2), backend=place.backend), torch.randn(6, 64, 2, device=place.device)

    def sample():
        return fm.sample(
            *(6, lambda x, t: v, place.device, return_all_steps),
            unguided_step_fn=lambda x, t: -v,
            use_classifier_free_guidance=True,
            inference_guidance_weight=1.5,
        )

    sample()
    with no_synchronisation(place.device):
        sample()
    if not place.gpu:
        return
    idle = torch.cuda.Event()
    busy(place.device, 1000)
    idle.record()
    sample()
    assert not idle.query(), "sample() came back only when the stream was idle"
    torch.cuda.synchronize()


# ---- graphed samplers: on the CPU the same object runs sample() ----


def features(place, seed):
    return torch.randn(6, 1, 2, generator=torch.Generator().manual_seed(seed)).to(place.device)


def with_features(x, t, features):
    return torch.sin(3 * x) * features + t * x


def without_condition(x, t, features):
    return (1 - t) * x


GRAPHED_GUIDED = {"use_classifier_free_guidance": True, "unguided_step_fn": without_condition}


def graphed(place, step_fn=with_features, constructor=None, **options):
    fm = FlowMatching((64, 2), backend=place.backend, **constructor or {})
    return fm, fm.graphed(step_fn, 6, place.device, inputs={"features": features(place, 0)}, **options)


def assert_graphed(place, sampler, fm, step_fn, seed, captures=1, options=None, **more):
    """A call gives sample()'s bits from the same state of the generator, and leaves it as sample() does."""
    options = dict(options or {}) | more
    torch.manual_seed(seed)
    got = sampler(features=features(place, seed), **more)
    after = random_state(place.device)

    def bound(function):
        return lambda x, t: function(x, t, features(place, seed))

    if options.get("unguided_step_fn") is not None:
        options["unguided_step_fn"] = bound(options["unguided_step_fn"])
    torch.manual_seed(seed)
    wanted = fm.sample(6, bound(step_fn), place.device, **options)
    for x, y in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, wanted)), strict=True):
        assert_same_bits(x.cpu(), y.cpu(), f"seed {seed}, {more}")
    assert torch.equal(after, random_state(place.device))
    assert sampler.stats.captures == (captures if place.gpu else 0), sampler.stats
    assert not (place.gpu and sampler.stats.eager), sampler.stats
    return got


@placed(PLACES)
def test_graphed(place):
    """sample() in a graph: solvers, guidance, trajectory, dtypes; new inputs, noise and seeds at each call."""
    weights = GRAPHED_GUIDED | {"inference_guidance_weight": [1.0, 2.0, 3.0], "inference_step": 3}
    configurations = [
        ({}, {}),
        ({"int_method": "ab3"}, {"return_all_steps": True}),
        ({"int_method": "rk4"}, {"temperature": 0.5}),
        ({"int_method": "dpmpp_2m"}, {"dtype": torch.bfloat16}),
        ({"int_method": FittedSolver((0.0, 0.4, 1.0), ((1.0, 0.4), (1.0, 0.7, -0.1)))}, {}),
        ({"time_grid": "shifted", "time_grid_options": {"shift": 3.0}}, weights | {"return_all_steps": True}),
        ({"int_method": "sde"}, {"return_log_prob": True}),
    ]
    for constructor, options in configurations:

        def step_fn(x, t, features):
            return with_features(x, t, features).to(x.dtype)

        fm, sampler = graphed(place, step_fn, constructor, **options)
        kept = []
        for seed in range(3):
            got = assert_graphed(place, sampler, fm, step_fn, seed, options=options)
            x = got[0] if isinstance(got, tuple) else got
            kept.append((x, x.clone()))
        assert all(torch.equal(x, before) for x, before in kept), "a later call changed a result"
        assert sampler.stats.replays == (3 if place.gpu else 0)


@placed(PLACES)
def test_graphed_sources_of_noise(place):
    """Keys are drawn in the graph, from their buffer; all else outside, as sample() draws it."""
    fm, sampler = graphed(place, noise=KeyedNoise(0), max_graphs=8)
    for seed, first in ((0, 0), (2**64 - 1, 5), (7, 9)):
        assert_graphed(place, sampler, fm, with_features, 1, noise=KeyedNoise(seed, first))
    assert_graphed(place, sampler, fm, with_features, 1, noise=[KeyedNoise(k) for k in range(6)])
    noise = torch.randn(6, 2, 64, device=place.device).transpose(1, 2)
    got = assert_graphed(place, sampler, fm, with_features, 1, captures=2, noise=noise)
    assert got.stride() == noise.stride()
    for device in ("cpu", place.device):
        own = [torch.Generator(device).manual_seed(3) for _ in range(2)]
        x = sampler(features=features(place, 1), generator=own[0], noise=None)
        wanted = fm.sample(6, lambda x, t: with_features(x, t, features(place, 1)), place.device, generator=own[1])
        assert_same_bits(x.cpu(), wanted.cpu())
    fm, sampler = graphed(place, constructor={"int_method": "dance"}, max_graphs=8)
    assert_graphed(place, sampler, fm, with_features, 1, captures=2, noise=KeyedNoise(3))  # its steps' noise too
    given = torch.randn(6, 10, 64, 2, device=place.device)
    assert_graphed(place, sampler, fm, with_features, 1, captures=3, step_noise=given)


@placed(PLACES)
def test_graphed_values_are_not_stale(place):
    """Grids, weights of guidance, and the network's weights in place need no capture; replaced ones are noticed."""
    network = torch.nn.Linear(2, 2, device=place.device)

    def step_fn(x, t, features):
        return network(x) * features + t

    fm, sampler = graphed(place, step_fn, module=network, **GRAPHED_GUIDED)
    options = dict(GRAPHED_GUIDED)

    def check(captures=1):
        assert_graphed(place, sampler, fm, step_fn, 1, captures, options)

    check()
    grid = torch.linspace(0, 1, 11) ** 2
    sampler.set_time_steps(grid)
    options["time_steps"] = grid
    check()
    for weight in (2.5, [float(k) for k in range(10)], lambda t: 1 + t):
        sampler.set_guidance_weight(weight)
        options["inference_guidance_weight"] = weight
        check()
    with torch.no_grad():
        network.weight.mul_(1.5)
    check()
    network.weight = torch.nn.Parameter(torch.randn(2, 2, device=place.device))
    check(captures=2)
    sampler.reset()
    check(captures=3)


@placed(PLACES)
def test_graphed_random_numbers(place):
    """step_fn's own: by the default generator, and by one that is registered; from the first call on as in eager."""
    own = torch.Generator(place.device)

    def step_fn(x, t, features):
        noise = torch.randn(x.shape, device=x.device, generator=own)
        return torch.nn.functional.dropout(with_features(x, t, features), 0.5) + noise

    own.manual_seed(5)
    fm, sampler = graphed(place, step_fn, generators=[own])
    got = []
    for seed in range(2):
        torch.manual_seed(seed)
        got.append(sampler(features=features(place, seed)))
    own.manual_seed(5)
    for seed, x in enumerate(got):
        torch.manual_seed(seed)
        f = features(place, seed)
        wanted = fm.sample(6, lambda x, t, f=f: step_fn(x, t, f), place.device)
        assert_same_bits(x.cpu(), wanted.cpu(), f"call {seed}")


@placed(FUSED)
def test_graphed_waits_for_nothing(place):
    """A call, its copies and its draw: also with other keys, another grid that is known, and another weight."""
    fm, sampler = graphed(place, return_all_steps=True, noise=KeyedNoise(0), **GRAPHED_GUIDED)
    calls = [
        {"noise": KeyedNoise(3)},
        {"noise": [KeyedNoise(k) for k in range(6)]},
        {"noise": None},
        {"noise": torch.randn(6, 64, 2, device=place.device)},
        {"inference_guidance_weight": 2.0},
        {"time_steps": [k / 10 for k in range(11)]},
    ]
    f = features(place, 1)
    for call in calls:
        sampler(features=f, **call)
    with no_synchronisation(place.device):
        for call in calls:
            sampler(features=f, **call)
    names = kernels(lambda: sampler(features=f), place.device)
    assert [name for name in names if name.startswith("Memcpy HtoD")] == []
    assert len([name for name in names if "fused_step" in name]) == (10 if place.gpu else 0)
    assert_graphed(place, sampler, fm, with_features, 1, sampler.stats.captures, GRAPHED_GUIDED | {
        "return_all_steps": True, "noise": KeyedNoise(0)
    })  # fmt: skip


@placed(FUSED)
def test_graphed_streams(place):
    """A call on another stream waits for the one before, whose buffers it writes."""
    fm, sampler = graphed(place)
    noise = [torch.randn(6, 64, 2, device=place.device) for _ in range(4)]
    wanted = [fm.sample(6, lambda x, t: with_features(x, t, features(place, 1)), place.device, noise=z) for z in noise]
    f = features(place, 1)
    place.module.synchronize()
    got = []
    for z in noise:
        with place.module.stream(place.module.Stream()):
            busy(place.device, 20)
            got.append(sampler(features=f, noise=z))
    place.module.synchronize()
    for x, y in zip(got, wanted, strict=True):
        assert_same_bits(x.cpu(), y.cpu())


@placed(FUSED)
def test_graphed_on_a_second_device(place):
    """Captured and replayed there while another device is the current one."""
    second = on_second_device(place)
    current = place.module.current_device()
    fm, sampler = graphed(second)
    for seed in range(2):
        assert_graphed(second, sampler, fm, with_features, seed)
    assert place.module.current_device() == current


@placed(FUSED)
def test_graphed_what_cannot_be_captured(place):
    """An error that says what to look for; after it the device, sample() and other graphs work; or a fallback."""

    def item(x, t, features):
        return with_features(x, t, features) * float(x.max().item() > -100)

    def host(x, t, features):
        return with_features(x, t, features) * torch.tensor([1.0]).to(x.device)

    other_fm, other = graphed(place)
    stream = place.module.current_stream()
    for step_fn in (item, host):
        if place.gpu:
            with pytest.raises(GraphCaptureError, match="Look for"):
                graphed(place, step_fn)
            assert place.module.current_stream() == stream
        fm, sampler = graphed(place, step_fn, fallback="eager")
        torch.manual_seed(1)
        got = sampler(features=features(place, 1))
        torch.manual_seed(1)
        wanted = fm.sample(6, lambda x, t, f=step_fn: f(x, t, features(place, 1)), place.device)
        assert_same_bits(got.cpu(), wanted.cpu())
        assert sum(sampler.stats.eager.values()) == 1
        assert_graphed(place, other, other_fm, with_features, 2)


@placed(FUSED)
def test_graphed_beside_other_graphs(place):
    """A compiled step_fn; one that replays a graph of its own, which is captured right or refused, never wrong."""
    compiled = torch.compile(with_features, backend="aot_eager", dynamic=False)
    fm, sampler = graphed(place, compiled)
    assert_graphed(place, sampler, fm, with_features, 1)

    static_x, static_t = torch.randn(6, 64, 2, device=place.device), torch.zeros(6, 1, 1, device=place.device)
    static_f = features(place, 0)
    results, replay = captured(lambda: (with_features(static_x, static_t, static_f),), place.device)

    def replayed(x, t, features):
        for static, value in ((static_x, x), (static_t, t), (static_f, features)):
            static.copy_(value)
        replay()
        return results[0]

    fm, sampler = graphed(place, replayed, fallback="eager")
    for seed in range(2):
        torch.manual_seed(seed)
        got = sampler(features=features(place, seed))
        torch.manual_seed(seed)
        f = features(place, seed)
        wanted = fm.sample(6, lambda x, t, f=f: with_features(x, t, f), place.device)
        assert_same_bits(got.cpu(), wanted.cpu(), f"{sampler.stats}")


# ---- size ----


@placed(FUSED)
@pytest.mark.parametrize("rest", [4096, 4099], ids=["aligned", "unaligned"])
def test_over_2_to_the_31(place, rest):
    """A float16 state of over 2^31 elements, with a trajectory: indexes beyond 32 bits. On the CPU a small one."""
    sample = (1 << (30 if place.gpu else 14)) + rest
    numel, part = 2 * sample, 1 << (26 if place.gpu else 12)
    needed = 2 * numel * 4 + 8 * part + (1 << 30)  # base, v, out and the slot, and the parts compared
    if (free := free_memory(place.device)) < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of device memory, {free / 1e9:.0f} GB are free")
    generator = torch.Generator(place.device).manual_seed(0)

    def random():
        return torch.randn(2, sample, dtype=torch.float16, device=place.device, generator=generator)

    base, v, out = random(), random(), torch.full((2, sample), torch.nan, dtype=torch.float16, device=place.device)
    trajectory = torch.full((2, 1, sample), torch.nan, dtype=torch.float16, device=place.device)
    table = row(torch.float32, place.device, b0=0.1)
    place.fused_step_(Operands(out, base, v, None, None, None, None, table, 0, trajectory=trajectory))
    flat = [x.view(-1) for x in (out, trajectory, base, v)]
    for start in range(0, numel, part):
        got, slot, x, velocity = (tensor[start : start + part] for tensor in flat)
        wanted = x + 0.1 * velocity
        assert torch.equal(got, wanted), f"elements from {start} on"
        assert torch.equal(slot, wanted), f"the trajectory's elements from {start} on"


# ---- choice, and the registered ops ----


@gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backend_is_there(backend, require_gpu):
    """Without it every test of this backend skips: noticed here."""
    if torch.version.hip is not None and backend == "cuda":
        pytest.skip("CUDA C++ is not for ROCm")
    reason = available_backends()[backend]
    if reason is not None:
        (pytest.fail if require_gpu else pytest.skip)(reason)


@on_each_device
def test_auto(device, monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    first = {"cpu": "cpu", "cuda": "triton"}[device.type]
    assert available_backends()[first] is None
    assert dispatch.choose("auto", device.type).name == first
    with use_backend("reference"):
        assert dispatch.choose("auto", device.type).name == "reference"
    with pytest.raises(RuntimeError, match="asked for"):
        dispatch.choose({"cpu": "cuda", "cuda": "cpu"}[device.type], device.type)


@placed(PLACES)
@pytest.mark.parametrize("guidance", FORMS)
def test_registered_ops(place, guidance):
    """fused_step and fused_step_ under PyTorch's dispatcher, checked by opcheck, compiled, and differentiated."""
    op, op_ = torch.ops.flowmatch_kernels.fused_step, torch.ops.flowmatch_kernels.fused_step_
    base, v, u, h1 = (drawn(place.device, torch.float32, seed, (6, 64, 2)).nan_to_num(0, 0, 0) for seed in range(4))
    table = row(torch.float32, place.device, b0=0.1, b1=0.3, w0=-0.7, w1=1.7)
    operands = (v, u, h1, None, None, table, 0, PROMOTE, guidance, False)
    guided = ((1 - 1.7) * u + 1.7 * v, u + 1.7 * (v - u), v + 1.7 * (v - u))[guidance]
    with use_backend(place.backend):
        wanted = reference.fused_step(base, *operands)
        assert_same_bits(op(base, *operands).cpu(), wanted.cpu())
        out, trajectory = torch.full_like(base, torch.nan), base.new_zeros(6, 3, 64, 2)
        history = torch.full_like(base, torch.nan)
        op_(out, base, *operands, None, trajectory, 1, history)
        assert_same_bits(out.cpu(), wanted.cpu())
        assert_same_bits(trajectory[:, 1].cpu(), wanted.cpu())
        assert_same_bits(history.cpu(), guided.cpu())
        torch.library.opcheck(op.default, (base, *operands))
        compiled = torch.compile(lambda x: op(x, *operands), fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(base).cpu(), wanted.cpu())
        base.requires_grad_()
        op(base, *operands).sum().backward()
    assert_same_bits(base.grad.cpu(), torch.ones(6, 64, 2))
