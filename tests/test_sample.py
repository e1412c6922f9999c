"""`FlowMatching.sample` equals the published loop, in bits, in the draws it takes, and in what step_fn sees."""

import contextlib
import copy
import io
import itertools
import pickle
import warnings

import published
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import assert_same_bits, manual_seed, same_bits, values
from torch._subclasses.fake_tensor import FakeTensorMode

from flowmatch_kernels import BaseDiffusion, FlowMatching, solvers, use_backend

DIMS = [(2,), (64, 2), (3, 5, 2), (2, 3, 1, 4)]
NARROW = [torch.float32, torch.bfloat16, torch.float16]


def field(dtype=None, weight=0.7, seen=None):
    """A velocity that is neither linear nor symmetric; `seen` keeps what it was called with."""

    def step_fn(*, x, t):
        if seen is not None:
            seen.append((x.clone(), t.clone(), t.shape))
        v = torch.sin(3 * x) * weight + t * x - (1 - t)
        return v.to(dtype or x.dtype)

    return step_fn


def both(dims, batch_size, steps, *, fns, seed=0, fm=None, weight=None, return_all_steps=False, **keywords):
    """What sample() and the published loop give from one seed, and the generator's state after each."""
    fm = fm or FlowMatching(dims)
    guided = len(fns) == 2
    manual_seed(seed)
    got = fm.sample(
        batch_size,
        fns[0],
        return_all_steps=return_all_steps,
        inference_step=steps,
        unguided_step_fn=fns[1] if guided else None,
        use_classifier_free_guidance=guided,
        inference_guidance_weight=weight,
        **keywords,
    )
    drawn = torch.get_rng_state()
    manual_seed(seed)
    wanted = published.sample(
        batch_size,
        fns[0],
        dims,
        steps,
        return_all_steps=return_all_steps,
        unguided_step_fn=fns[1] if guided else None,
        weight=weight,
    )
    assert torch.equal(drawn, torch.get_rng_state()), "other draws than the published loop's"
    return got, wanted


def assert_both_same(got, wanted):
    if not isinstance(wanted, tuple):
        return assert_same_bits(got, wanted)
    assert isinstance(got, tuple)
    assert len(got) == 2
    assert_same_bits(got[0], wanted[0], "trajectory")
    assert_same_bits(got[1], wanted[1], "time steps")
    assert got[0].is_contiguous()


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("return_all_steps", [False, True], ids=["last", "all"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_plain(backend, dims, return_all_steps, default):
    torch.set_default_dtype(default)
    fm = FlowMatching(dims, backend=backend)
    sizes = [(6, steps) for steps in (1, 4, 5, 10, 20, 50)] + [(batch_size, 5) for batch_size in (0, 1, 64)]
    for seed, (batch_size, steps) in enumerate(sizes):
        for fns in ([field()], [field(torch.bfloat16)]):
            got, wanted = both(dims, batch_size, steps, fns=fns, seed=seed, fm=fm, return_all_steps=return_all_steps)
            assert_both_same(got, wanted)


def check_guided(backend, dims, turns):
    """For each weight and dtype so many, one to four, of the sizes, other ones by turns, and for each all the rest."""
    fm = FlowMatching(dims, backend=backend)
    sizes = ((0, 4), (1, 10), (6, 10), (64, 5))
    for k, (weight, dtype) in enumerate(itertools.product([0.0, 0.9, 1.5, -0.3, 3], NARROW)):
        fns = [field(dtype), field(dtype, weight=-0.2)]
        for j, (default, all_steps) in enumerate(itertools.product((torch.float32, torch.float64), (False, True))):
            torch.set_default_dtype(default)
            for turn in range(turns):
                batch_size, steps = sizes[(k + j + turn) % 4]
                got, wanted = both(dims, batch_size, steps, fns=fns, fm=fm, weight=weight, return_all_steps=all_steps)
                assert_both_same(got, wanted)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_guided(backend, dims):
    check_guided(backend, dims, 1)


@pytest.mark.full
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_guided_full(backend, dims):
    check_guided(backend, dims, 4)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(NARROW, 2)), ids=str)
def test_guided_with_two_dtypes(backend, dtypes):
    fns = [field(dtypes[0]), field(dtypes[1], weight=-0.2)]
    fm = FlowMatching((64, 2), backend=backend)
    got, wanted = both((64, 2), 6, 10, fns=fns, fm=fm, weight=1.7)
    assert_same_bits(got, wanted)


def test_large(backend):
    """Over the grain: several threads, and no GIL."""
    torch.set_num_threads(2)
    dims = (50_021, 3)
    fm = FlowMatching(dims, backend=backend)
    for fns in ([field()], [field(torch.bfloat16), field(torch.bfloat16, weight=0.1)]):
        got, wanted = both(dims, 2, 3, fns=fns, fm=fm, weight=2.0, return_all_steps=True)
        assert_both_same(got, wanted)


def test_step_fn_sees_the_published_arguments(backend):
    """x and t by keyword; t is [B, 1, ..., 1], stride 0 over the batch, and equal to the last bit."""
    dims, batch_size, steps = (3, 5), 4, 10
    records = [], []

    def recorder(record):
        def step_fn(**arguments):
            assert sorted(arguments) == ["t", "x"]
            x, t = arguments["x"], arguments["t"]
            record.append((x.clone(), t.clone(), t.shape, t.stride(0), x.is_contiguous(), t.requires_grad))
            return x * t

        return step_fn

    fm = FlowMatching(dims, backend=backend)
    manual_seed(3)
    fm.sample(batch_size, recorder(records[0]), inference_step=steps)
    manual_seed(3)
    published.sample(batch_size, recorder(records[1]), dims, steps)
    assert len(records[0]) == len(records[1]) == steps
    for got, wanted in zip(*records, strict=True):
        assert_same_bits(got[0], wanted[0], "x")
        assert_same_bits(got[1], wanted[1], "t")
        assert got[2:] == wanted[2:]


def test_guided_is_called_first(backend):
    calls = []

    def named(name):
        def step_fn(x, t):
            calls.append((name, x.clone()))
            return x

        return step_fn

    FlowMatching(2, backend=backend).sample(
        3, named("guided"), inference_step=2, unguided_step_fn=named("un"), use_classifier_free_guidance=True
    )
    assert [name for name, _ in calls] == ["guided", "un"] * 2
    assert same_bits(calls[0][1], calls[1][1])
    assert same_bits(calls[2][1], calls[3][1])


def test_no_steps(backend):
    """0 and None mean the default; a default of 0 steps returns the noise, and calls nothing."""
    seen = []
    fm = FlowMatching((3, 2), num_inference_steps=0, backend=backend)
    noise = torch.randn(4, 3, 2)
    for steps in (0, None):
        x = fm.sample(4, field(seen=seen), inference_step=steps, noise=noise)
        assert same_bits(x, noise)
        assert x.data_ptr() != noise.data_ptr()
        states, times = fm.sample(4, field(seen=seen), True and "cpu", True, steps, noise=noise)
        assert same_bits(states, noise[:, None])
        assert same_bits(times, torch.linspace(0, 1, 1))
    assert seen == []
    default = FlowMatching((3, 2), num_inference_steps=7)
    for steps in (0, None):
        assert default.sample(1, field(), return_all_steps=True, inference_step=steps)[1].numel() == 8
    assert default.sample(1, field(), return_all_steps=True, inference_step=2)[1].numel() == 3


def test_by_position():
    """The order of Alpamayo R1 and 2: batch_size, step_fn, device, return_all_steps, inference_step, int_method."""
    fm = FlowMatching((3, 2))
    manual_seed(1)
    states, times = fm.sample(2, field(), torch.device("cpu"), True, 4, "euler")
    manual_seed(1)
    assert_both_same((states, times), published.sample(2, field(), (3, 2), 4, return_all_steps=True))


@pytest.mark.parametrize("velocity", ["nan", "specials", "x", "huge"])
def test_special_values(backend, velocity):
    generator = torch.Generator().manual_seed(5)
    dims, batch_size = (64, 3), 6
    noise = values((batch_size, *dims), torch.float32, generator)
    rows = [values((batch_size, *dims), torch.float32, generator) for _ in range(5)]
    for dtype in NARROW:
        calls = iter(rows * 2)

        def step_fn(x, t, dtype=dtype, calls=calls):
            v = {
                "nan": torch.full_like(x, float("nan")),
                "x": x,
                "huge": torch.full_like(x, 3e38),
                "specials": None,
            }[velocity]
            return (next(calls) if v is None else v).to(dtype)

        fm = FlowMatching(dims, backend=backend)
        got = fm.sample(batch_size, step_fn, inference_step=5, noise=noise, return_all_steps=True)
        wanted = published.sample(batch_size, step_fn, dims, 5, noise=noise, return_all_steps=True)
        assert_both_same(got, wanted)


LOOK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@LOOK
@given(
    dims=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    batch_size=st.integers(0, 7),
    steps=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
    weight=st.none() | st.floats(-20, 20) | st.floats(width=32),
    dtypes=st.tuples(*[st.sampled_from(NARROW)] * 2),
    double=st.booleans(),
    return_all_steps=st.booleans(),
    name=st.sampled_from(["cpu", "reference"]),
    layout=st.sampled_from(["contiguous", "sliced", "first", "scalar"]),
)
def test_look_for_a_difference(dims, batch_size, steps, seed, weight, dtypes, double, return_all_steps, name, layout):
    torch.set_default_dtype(torch.float64 if double else torch.float32)

    def shaped(step_fn):
        def other(x, t):
            v = step_fn(x=x, t=t)
            if layout == "sliced":
                v = torch.stack([v, v], dim=-1)[..., 0]
            elif layout == "first":
                v = v[..., :1]
            elif layout == "scalar":
                v = t.flatten()[0] if t.numel() else t.new_zeros(())
            return v

        return other

    fns = [shaped(field(dtypes[0]))]
    if weight is not None:
        fns.append(shaped(field(dtypes[1], weight=0.3)))
    try:
        got, wanted = both(
            tuple(dims), batch_size, steps, fns=fns, seed=seed, weight=weight, backend=name,
            return_all_steps=return_all_steps,
        )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    assert_both_same(got, wanted)


@LOOK
@given(
    grid=st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=8, unique=True),
    down=st.booleans(),
    grid_dtype=st.sampled_from([torch.float32, torch.float64]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_any_grid(grid, down, grid_dtype, dtype):
    grid = torch.tensor(sorted(grid, reverse=down), dtype=grid_dtype)
    noise = torch.randn(2, 3).to(dtype)

    def step_fn(x, t):
        assert t.dtype == grid_dtype
        return torch.sin(x) * t.to(x.dtype)

    wanted = sixteen_bit_loop(step_fn, noise, grid) if dtype.itemsize == 2 else None
    if wanted is None:
        wanted = published.sample_on_grid(step_fn, noise, grid)
    for name in ("cpu", "reference"):
        got, times = FlowMatching(3, backend=name).sample(
            2, step_fn, noise=noise, time_steps=grid, return_all_steps=True
        )
        assert_same_bits(got, wanted)
        assert_same_bits(times, grid)


def sixteen_bit_loop(step_fn, noise, grid):
    """x' = bf(x + bf(dt*v)), with dt a float32 that is not rounded to 16 bits."""
    x, states = noise, [noise]
    for i in range(len(grid) - 1):
        dt = (grid[i + 1] - grid[i]).to(torch.float32).view(1, 1)
        v = step_fn(x=x, t=grid[i].view(1, 1).expand(x.shape[0], 1))
        x = x + (dt * v).to(x.dtype)
        states.append(x)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_python_float_steps(backend, dtype):
    """GR00T: a bfloat16 state, and dt = 1 / 4 or any Python float."""
    for steps in (4, 10, 3):
        sizes = [1.0 / steps] * steps
        noise = torch.randn(6, 64, 32).to(dtype)
        grid = torch.arange(steps + 1, dtype=torch.float32) / steps
        step_fn = field(dtype)
        got, times = FlowMatching((64, 32), backend=backend).sample(
            6, step_fn, noise=noise, time_steps=grid, step_sizes=sizes, return_all_steps=True
        )
        assert_same_bits(got, published.sample_on_grid(step_fn, noise, grid, sizes))
        assert_same_bits(times, grid)


@pytest.mark.parametrize("return_all_steps", [False, True])
@pytest.mark.parametrize("step_rounding", ["promote", "exact", "rounded"])
def test_step_rounding(backend, step_rounding, return_all_steps):
    """In the eager loop dt is [1, 1]; a Python number; a 0-dim tensor."""
    pairs = [(torch.float32, dtype) for dtype in NARROW] + [(torch.float64, torch.bfloat16)]
    if step_rounding != "promote":
        pairs += [(dtype, dtype) for dtype in NARROW[1:]]
    for state, velocity in pairs:
        step_fn = field(velocity)
        noise = values((5, 3), state, torch.Generator().manual_seed(0), special=False)
        x, t = noise, torch.linspace(0, 1, 8)
        states = [x]
        for i in range(7):
            v, dt = step_fn(x=x, t=t[i].view(1, 1).expand(5, 1)), t[i + 1] - t[i]
            dt = {"promote": dt.to(torch.promote_types(state, torch.float32)).view(1, 1), "exact": float(dt)}.get(
                step_rounding, dt
            )
            x = (x + dt * v).to(state)
            states.append(x)
        fm = FlowMatching(3, "euler", 7, step_rounding=step_rounding, backend=backend)
        got = fm.sample(5, step_fn, noise=noise, return_all_steps=return_all_steps)
        assert_same_bits(got[0] if return_all_steps else got, torch.stack(states, 1) if return_all_steps else x)
    assert_same_bits(
        FlowMatching(3, "rk4", 7).sample(5, step_fn, noise=noise, step_rounding=step_rounding, backend=backend),
        fm.sample(5, step_fn, noise=noise, int_method="rk4", backend="reference"),
    )


def test_an_unknown_step_rounding():
    with pytest.raises(ValueError, match="step_rounding must be 'promote', 'exact', 'rounded', got 'up'"):
        FlowMatching(2, step_rounding="up")
    with pytest.raises(ValueError, match="got 3"):
        FlowMatching(2).sample(1, field(), step_rounding=3)


def test_robot_policies(backend):
    """openpi and lerobot: t from 1 to 0, dt < 0, times summed in float32 or in double."""
    noise, dt = torch.randn(4, 50, 32), -1.0 / 10
    summed, time = [], torch.tensor(1.0)
    for _ in range(11):
        summed.append(time)
        time = time + torch.tensor(dt)
    for grid in (torch.stack(summed), torch.tensor([1.0 + i * dt for i in range(11)])):
        seen = []
        got, _ = FlowMatching((50, 32), backend=backend).sample(
            4,
            field(seen=seen),
            noise=noise,
            time_steps=grid,
            step_sizes=torch.full((10,), dt),
            return_all_steps=True,
        )
        assert_same_bits(got, published.sample_on_grid(field(), noise, grid, [dt] * 10))
        for (_, t, shape), wanted in zip(seen, grid, strict=False):
            assert shape == (4, 1, 1)
            assert (t == wanted).all()
        differenced, _ = FlowMatching((50, 32), backend=backend).sample(
            4, field(), noise=noise, time_steps=grid, return_all_steps=True
        )
        assert_same_bits(differenced, published.sample_on_grid(field(), noise, grid))
    assert not same_bits(got, differenced), "this grid's differences are its step sizes"


def test_double_grid_is_differenced_in_double(backend):
    grid = torch.tensor([0.0, 1 / 3, 1 / 3 + 1e-9, 1.0], dtype=torch.float64)
    got = FlowMatching(5, backend=backend).sample(
        2, lambda x, t: torch.ones_like(x), noise=torch.zeros(2, 5), time_steps=grid, return_all_steps=True
    )[0]
    assert got.dtype == torch.float32
    assert (got[:, 2] > got[:, 1]).all() or got[0, 1, 0] + 1e-9 == got[0, 1, 0]
    wanted = published.sample_on_grid(lambda x, t: torch.ones_like(x), torch.zeros(2, 5), grid)
    assert_same_bits(got, wanted)
    tiny = torch.tensor([1.0, 1.0 + 2.0**-40], dtype=torch.float64)
    moved = FlowMatching(5, backend=backend).sample(
        2, lambda x, t: torch.ones_like(x), noise=torch.zeros(2, 5), time_steps=tiny
    )
    assert (moved == 2.0**-40).all()


@pytest.mark.parametrize("kind", ["list", "numpy", "tensor", "requires_grad", "strided"])
def test_kinds_of_grids(backend, kind):
    plain = torch.tensor([0.0, 0.3, 0.45, 1.0])
    grid = {
        "list": plain.tolist(),
        "numpy": plain.numpy(),
        "tensor": plain,
        "requires_grad": plain.clone().requires_grad_(),
        "strided": torch.stack([plain, plain], dim=1)[:, 0],
    }[kind]
    noise = torch.randn(2, 3)
    for sizes in (None, grid[1:], plain[1:]):
        with torch.no_grad():  # else what requires grad asks for a derivative
            got = FlowMatching(3, backend=backend).sample(
                2, field(), noise=noise, time_steps=grid, step_sizes=sizes, return_all_steps=True
            )
        assert not got[0].requires_grad
        if sizes is None:
            assert_same_bits(got[0], published.sample_on_grid(field(), noise, plain))
        assert_same_bits(got[1], plain)


def test_step_sizes_without_a_grid(backend):
    noise = torch.randn(2, 3)
    grid = torch.linspace(0, 1, 5)
    sizes = [0.1, 0.2, 0.3, 0.4]
    got = FlowMatching(3, backend=backend).sample(2, field(), noise=noise, step_sizes=sizes, inference_step=4)
    assert_same_bits(got, published.sample_on_grid(field(), noise, grid, sizes)[:, -1])


# ---- noise, generator, temperature, dtype ----


def test_noise(backend):
    fm = FlowMatching((3, 2), backend=backend)
    noise = torch.randn(4, 3, 2)
    for given_noise in (noise, noise.clone().requires_grad_(), torch.nn.Parameter(noise.clone())):
        before = torch.get_rng_state()
        with torch.no_grad():  # else it asks for a derivative
            got = fm.sample(4, field(), noise=given_noise)
        assert torch.equal(before, torch.get_rng_state()), "noise is given: nothing is to be drawn"
        assert type(got) is torch.Tensor
        assert not got.requires_grad
        assert_same_bits(got, published.sample(4, field(), (3, 2), 10, noise=noise))
        assert same_bits(given_noise, noise)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "negative"])
def test_noise_of_any_layout(backend, layout):
    noise = {
        "transposed": torch.randn(2, 3, 4).transpose(0, 2),
        "sliced": torch.randn(4, 3, 5)[..., 1:3],
        "expanded": torch.randn(1, 3, 1).expand(4, 3, 2),
        "negative": torch.randn(4, 3, 2, dtype=torch.complex64).conj().imag,
    }[layout]
    got = FlowMatching((3, 2), backend=backend).sample(4, field(), noise=noise, return_all_steps=True)
    plain = noise.resolve_neg().contiguous()
    assert_both_same(got, published.sample(4, field(), (3, 2), 10, noise=plain, return_all_steps=True))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype(backend, dtype):
    zero = FlowMatching((3, 2), num_inference_steps=0, backend=backend)
    manual_seed(1)
    state = zero.sample(4, field(), dtype=dtype)
    manual_seed(1)
    assert_same_bits(state, torch.randn(4, 3, 2, dtype=dtype))
    fm, noise, seen = FlowMatching((3, 2), backend=backend), torch.randn(4, 3, 2, dtype=torch.float64), []
    got = fm.sample(4, field(seen=seen), dtype=dtype, noise=noise)
    assert got.dtype == (dtype or torch.float64)
    assert {x.dtype for x, _, _ in seen} == {got.dtype}
    assert {t.dtype for _, t, _ in seen} == {torch.float32}
    assert_same_bits(seen[0][0], noise.to(got.dtype))


def test_noise_sets_the_dtype(backend):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        noise = torch.randn(2, 3).to(dtype)
        assert FlowMatching(3, backend=backend).sample(2, lambda x, t: x, noise=noise).dtype == dtype


def test_generator(backend):
    fm = FlowMatching((3, 2), backend=backend)
    before = torch.get_rng_state()
    got = fm.sample(4, field(), generator=torch.Generator().manual_seed(7))
    assert torch.equal(before, torch.get_rng_state()), "the default generator is not to be touched"
    noise = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(7))
    assert_same_bits(got, published.sample(4, field(), (3, 2), 10, noise=noise))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0, -1.3, 1 / 3, 2])
def test_temperature(backend, temperature):
    fm = FlowMatching((3, 2), backend=backend)
    noise = torch.randn(4, 3, 2)
    kept = noise.clone()
    for dtype in (torch.float32, torch.bfloat16):
        start = noise.to(dtype)
        got = fm.sample(4, field(), noise=start, temperature=temperature, return_all_steps=True)[0]
        assert_same_bits(got[:, 0], start * temperature)
    got = fm.sample(4, field(), noise=noise, temperature=temperature)
    wanted = published.sample(4, field(), (3, 2), 10, noise=noise, temperature=temperature)
    assert_same_bits(got, wanted)
    assert same_bits(noise, kept)


@pytest.mark.parametrize("weight", [0.0, -0.0, 3e38])
def test_weights_of_every_kind(backend, weight):
    """In this order: -0.0 == 0.0, and a table cached for one is no table for the other."""
    for other in (0.0, -0.0, weight):
        fns = [lambda x, t: torch.ones_like(x), lambda x, t: torch.full_like(x, -0.0)]
        noise = torch.full((2, 3), -0.0)
        got = FlowMatching(3, backend=backend).sample(
            2,
            fns[0],
            noise=noise,
            unguided_step_fn=fns[1],
            use_classifier_free_guidance=True,
            inference_guidance_weight=other,
        )
        wanted = published.sample(2, fns[0], (3,), 10, noise=noise, unguided_step_fn=fns[1], weight=other)
        assert_same_bits(got, wanted, f"w = {other}")


def test_progress(backend, capsys):
    tqdm = pytest.importorskip("tqdm", reason="progress=True is about tqdm")
    assert tqdm.__version__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm.auto, where IPython's widgets are missing
        manual_seed(0)
        got = FlowMatching(3, backend=backend).sample(2, field(), inference_step=7, progress=True)
    told = capsys.readouterr().err
    assert "7/7" in told
    manual_seed(0)
    assert_same_bits(got, FlowMatching(3, backend=backend).sample(2, field(), inference_step=7))
    assert capsys.readouterr().err == ""


# ---- modes, transforms, compilers ----


@pytest.mark.parametrize("return_all_steps", [False, True], ids=["last", "all"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_inference_mode_then_grad_mode(backend, guided, return_all_steps):
    fm = FlowMatching((3, 2), backend=backend)
    fns = [field(), field(weight=0.1)] if guided else [field()]
    for mode in (torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            got, wanted = both((3, 2), 4, 10, fns=fns, fm=fm, weight=1.5, return_all_steps=return_all_steps)
            assert_both_same(got, wanted)
    first = got[0] if return_all_steps else got
    weight = torch.ones(2, requires_grad=True)
    (first * weight).sum().backward()
    assert torch.equal(weight.grad, first.sum(dim=tuple(range(first.dim() - 1))))


def test_output_has_no_gradient():
    weight = torch.ones(2, requires_grad=True)
    x = FlowMatching(2).sample(3, lambda x, t: x * weight)
    assert not x.requires_grad

    @torch.enable_grad()
    def with_gradient(x, t):
        x = x.requires_grad_()
        return torch.autograd.grad((x**3).sum(), x, create_graph=True)[0] * weight

    got, wanted = both((2,), 3, 4, fns=[with_gradient])
    assert_same_bits(got, wanted.detach())
    assert not got.requires_grad


def compilations():
    """Every two of compiler, guidance and result meet; all three in every way by `make test-full`."""
    for compiler, guided, all_steps in itertools.product(["eager", "aot_eager"], [False, True], [False, True]):
        left_out = (compiler == "eager") + guided + all_steps
        name = f"{compiler}-{'guided' if guided else 'plain'}-{'all' if all_steps else 'last'}"
        yield pytest.param(compiler, guided, all_steps, id=name, marks=pytest.mark.full if left_out % 2 else [])


@pytest.mark.parametrize("compiler, guided, return_all_steps", list(compilations()))
def test_compile(compiler, guided, return_all_steps):
    torch._dynamo.reset()
    fm = FlowMatching((3, 2))
    noise = torch.randn(4, 3, 2)

    def run(noise):
        out = fm.sample(
            4,
            lambda x, t: torch.sin(x) * t,
            return_all_steps=return_all_steps,
            inference_step=3,
            noise=noise,
            unguided_step_fn=(lambda x, t: x) if guided else None,
            use_classifier_free_guidance=guided,
            inference_guidance_weight=1.5,
        )
        return out[0] if return_all_steps else out

    cached = len(solvers.cache._tables)
    compiled = torch.compile(run, backend=compiler, fullgraph=True)(noise)
    assert len(solvers.cache._tables) == cached, "the cache holds what a compiler traced"
    assert_same_bits(compiled, run(noise))
    assert_same_bits(torch.compile(run, backend=compiler)(noise + 1), run(noise + 1))


@pytest.mark.full
def test_compile_inductor():
    """On a grid that is given: inductor takes linspace in its own way.

    Another sample() is compiled by tests/test_velocity_strength.py in every run.
    """
    torch._dynamo.reset()
    fm, noise, grid = FlowMatching((3, 2)), torch.randn(4, 3, 2), torch.tensor([0.0, 0.25, 0.5, 1.0])

    def run(noise):
        return fm.sample(4, lambda x, t: x * t, noise=noise, time_steps=grid)

    assert_same_bits(torch.compile(run, backend="inductor")(noise), run(noise))


def test_compiled_step_fn(backend):
    torch._dynamo.reset()
    step_fn = torch.compile(field(), backend="aot_eager")
    got, wanted = both((3, 2), 4, 10, fns=[step_fn], backend=backend)
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device):
    """On a machine without a GPU too; and what was cached afterwards is real."""
    fm = FlowMatching((3, 2))
    for guided, all_steps in itertools.product((False, True), (False, True)):
        keywords = {"unguided_step_fn": field(), "use_classifier_free_guidance": True} if guided else {}
        with FakeTensorMode():
            got = fm.sample(5, field(), device, all_steps, **keywords)
        states = got[0] if all_steps else got
        assert states.device.type == device
        assert states.shape == ((5, 11, 3, 2) if all_steps else (5, 3, 2))
        assert states.dtype == torch.float32
    assert not solvers.cache._tables
    got, wanted = both((3, 2), 5, 10, fns=[field()])
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("return_all_steps", [False, True], ids=["last", "all"])
def test_vmap(return_all_steps):
    """Over the noise, and over parameters of the velocity: equal to a loop, as for the published code."""
    fm = FlowMatching((3, 2))
    noises, weights = torch.randn(4, 5, 3, 2), torch.randn(4)

    def over_noise(noise):
        out = fm.sample(5, field(), return_all_steps=return_all_steps, inference_step=3, noise=noise)
        return out[0] if return_all_steps else out

    def over_weight(weight):
        out = fm.sample(
            5,
            lambda x, t: torch.sin(x) * weight,
            return_all_steps=return_all_steps,
            inference_step=3,
            noise=noises[0],
        )
        return out[0] if return_all_steps else out

    for function, arguments in ((over_noise, noises), (over_weight, weights)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a performance warning is no error
            got = torch.func.vmap(function)(arguments)
        assert_same_bits(got, torch.stack([function(argument) for argument in arguments]))


def test_vmap_with_a_backend_that_cannot():
    """A backend asked for by name runs or raises."""
    fm = FlowMatching((3, 2), backend="cpu")
    with pytest.raises(RuntimeError, match=r"'cpu' was asked for and cannot be used.*torch.func"):
        torch.func.vmap(lambda noise: fm.sample(5, field(), noise=noise))(torch.randn(4, 5, 3, 2))


def test_jit_trace():
    """A traced sampler computes; it does not return what the trace happened to hold."""
    fm = FlowMatching((3, 2))

    def run(noise):
        return fm.sample(4, lambda x, t: torch.sin(x) * t, noise=noise, inference_step=3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TracerWarning: the loop is unrolled, as it should be
        traced = torch.jit.trace(run, (torch.randn(4, 3, 2),))
    noise = torch.randn(4, 3, 2)
    assert_same_bits(traced(noise), run(noise))


def test_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    fm, noise = FlowMatching((3, 2)), torch.randn(4, 3, 2)

    def run(noise):
        return fm.sample(4, lambda x, t: torch.sin(x) * t, noise=noise, inference_step=3)

    graph = make_fx(run)(noise)
    assert_same_bits(graph(noise + 1), run(noise + 1))


def test_modes_that_watch(backend):
    """Under a dispatch mode and a function mode (a default device is one) the bits are the same."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    for mode in (Watch(), Functions(), torch.device("cpu")):
        for fns in ([field()], [field(), field(weight=0.1)]):
            manual_seed(0)
            wanted = published.sample(
                4, fns[0], (3, 2), 10, return_all_steps=True,
                unguided_step_fn=fns[1] if fns[1:] else None, weight=1.5,
            )  # fmt: skip
            manual_seed(0)
            with mode:
                got = FlowMatching((3, 2), backend=backend).sample(
                    4,
                    fns[0],
                    return_all_steps=True,
                    unguided_step_fn=fns[1] if fns[1:] else None,
                    use_classifier_free_guidance=len(fns) == 2,
                    inference_guidance_weight=1.5,
                )
            assert_both_same(got, wanted)


@pytest.mark.parametrize("when", ["always", "first", "last", "unguided"])
def test_tensor_subclasses(when):
    """A velocity that is a wrapper subclass, on some calls or all; its result is one too."""
    from torch.testing._internal.two_tensor import TwoTensor

    calls = []

    def step_fn(x, t):
        calls.append(None)
        v = torch.sin(x.a if isinstance(x, TwoTensor) else x)
        wrapped = {"always": True, "first": len(calls) == 1, "last": len(calls) == 3, "unguided": False}[when]
        return TwoTensor(v, v.clone()) if wrapped else v

    def unguided(x, t):
        v = torch.cos(x.a if isinstance(x, TwoTensor) else x)
        return TwoTensor(v, v.clone()) if when == "unguided" else v

    noise = torch.randn(4, 3, 2)
    for guided in (False, True):
        calls.clear()
        got = FlowMatching((3, 2)).sample(
            4,
            step_fn,
            noise=noise,
            inference_step=3,
            unguided_step_fn=unguided if guided else None,
            use_classifier_free_guidance=guided,
            inference_guidance_weight=1.5,
        )
        wanted = published.sample(
            4, lambda x, t: torch.sin(x), (3, 2), 3, noise=noise,
            unguided_step_fn=(lambda x, t: torch.cos(x)) if guided else None, weight=1.5,
        )  # fmt: skip
        assert_same_bits(got.a if isinstance(got, TwoTensor) else got, wanted)


def test_meta_device():
    for all_steps in (False, True):
        got = FlowMatching((3, 2)).sample(4, field(), "meta", all_steps)
        states = got[0] if all_steps else got
        assert states.device.type == "meta"
        assert states.shape == ((4, 11, 3, 2) if all_steps else (4, 3, 2))


def test_autocast(backend):
    with torch.autocast("cpu", torch.bfloat16):
        layer = torch.nn.Linear(2, 2)
        got, wanted = both((3, 2), 4, 10, fns=[lambda x, t: layer(x)], backend=backend)
    assert got.dtype == torch.float32
    assert_same_bits(got, wanted)


# ---- a module among modules ----


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.sampler = FlowMatching((3, 2), num_inference_steps=4)


def test_module():
    model = Model()
    assert sorted(model.state_dict()) == ["layer.bias", "layer.weight"]
    assert model.sampler.state_dict() == {}
    model.sampler.load_state_dict({})
    assert list(model.sampler.parameters()) == []
    assert model.sampler.to(torch.bfloat16) is model.sampler
    model.to(torch.bfloat16).eval().requires_grad_(False)
    got, wanted = both((3, 2), 5, 4, fns=[field()], fm=model.sampler)
    assert_same_bits(got, wanted)
    assert isinstance(model.sampler, BaseDiffusion)
    assert isinstance(model.sampler, torch.nn.Module)


def test_pickle_and_copy():
    fm = FlowMatching([3, 2], num_inference_steps=4, inference_guidance_weight=2.5, backend="reference")
    buffer = io.BytesIO()
    torch.save(fm, buffer)
    buffer.seek(0)
    for other in (
        pickle.loads(pickle.dumps(fm)),
        copy.deepcopy(fm),
        copy.copy(fm),
        torch.load(buffer, weights_only=False),
    ):
        assert other.x_dims == [3, 2]
        assert other.inference_guidance_weight == 2.5
        assert other.backend == "reference"
        got, wanted = both((3, 2), 5, 4, fns=[field()], fm=other)
        assert_same_bits(got, wanted)
        other.construct_training_data(torch.randn(2, 3, 2))


ALPAMAYO_CONFIGS = {
    "R1": {"x_dims": [64, 2], "int_method": "euler", "num_inference_steps": 10},
    "1.5": {
        "x_dims": [64, 2],
        "int_method": "euler",
        "num_inference_steps": 10,
        "use_classifier_free_guidance": True,
        "inference_guidance_weight": 1.5,
    },
    "2": {
        "x_dims": [64, 2],
        "int_method": "euler",
        "num_inference_steps": 10,
        "train_timestep_sampler": "uniform",
        "train_ignore_guidance_rate": 0.2,
        "inference_guidance_weight": 1.0,
        "use_classifier_free_guidance": False,
    },
}


@pytest.mark.parametrize("generation", ALPAMAYO_CONFIGS)
def test_keywords_of_alpamayo(generation):
    config = ALPAMAYO_CONFIGS[generation]
    fm = FlowMatching(**config)
    for key, value in config.items():
        assert getattr(fm, key) == value
    guided = fm.use_classifier_free_guidance
    manual_seed(2)
    with contextlib.nullcontext() if guided else pytest.warns(UserWarning, match="use_classifier_free_guidance=True"):
        got = fm.sample(6, field(), unguided_step_fn=field(weight=0.1))
    manual_seed(2)
    wanted = published.sample(
        6, field(), (64, 2), 10, unguided_step_fn=field(weight=0.1) if guided else None,
        weight=fm.inference_guidance_weight,
    )  # fmt: skip
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("x_dims", [5, (5,), [5], torch.Size([5]), range(5, 6)], ids=repr)
def test_x_dims(x_dims):
    fm = FlowMatching(x_dims)
    assert fm.x_dims == [5]
    assert type(fm.x_dims) is list
    assert fm.sample(3, field()).shape == (3, 5)


def test_built_under_any_default():
    """transformers builds models under a meta device, and some set another default dtype."""
    with torch.device("meta"):
        fm = FlowMatching((3, 2))
    manual_seed(0)
    got = fm.construct_training_data(torch.randn(4, 3, 2))
    manual_seed(0)
    wanted = published.Training().construct_training_data(torch.randn(4, 3, 2))
    assert_same_bits(got["timesteps"], wanted["timesteps"])
    got, wanted = both((3, 2), 5, 10, fns=[field()], fm=fm)
    assert_same_bits(got, wanted)


def test_cache_is_bounded_and_private(backend):
    fm = FlowMatching(2, backend=backend)
    for steps in range(1, solvers.cache.capacity + 20):
        fm.sample(1, lambda x, t: x, inference_step=steps)
    assert len(solvers.cache._tables) == solvers.cache.capacity
    times = fm.sample(1, lambda x, t: t.mul_(0) + x, return_all_steps=True, inference_step=5)[1]
    times.fill_(7.0)
    got, wanted = both((2,), 3, 5, fns=[field()], fm=fm)
    assert_same_bits(got, wanted)
    torch.set_default_dtype(torch.float64)
    got, wanted = both((2,), 3, 5, fns=[field()], fm=fm)
    assert_same_bits(got, wanted)


def test_backends_agree():
    results = []
    for name in ("cpu", "reference"):
        manual_seed(0)
        results.append(FlowMatching((3, 2), backend=name).sample(6, field()))
        manual_seed(0)
        results.append(FlowMatching((3, 2)).sample(6, field(), backend=name))
        manual_seed(0)
        with use_backend(name):
            results.append(FlowMatching((3, 2)).sample(6, field()))
    for other in results[1:]:
        assert_same_bits(other, results[0])
