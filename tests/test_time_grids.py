"""Time grids: exact ends, strictly monotonic, the equations, and what is refused; and sampling on them."""

from __future__ import annotations

import contextlib
import doctest
import functools
import itertools
import math

import eager_loops
import pytest
import torch
from operands import assert_same_bits
from small_problem import BATCH, DIMS, EVERY_SOLVER, STEPS, TIMES, eager, field, sampler, start

from flowmatch_kernels import FittedSolver, FlowMatching, solvers, time_grids
from flowmatch_kernels.time_grids import TIME_GRIDS, cosine, power, shifted, uniform

# name -> options, t of u = k/N
GRIDS = [
    ("uniform", {}, lambda u: u),
    ("shifted", {}, lambda u: u / (3 - 2 * u)),
    ("shifted", {"shift": 5.0}, lambda u: u / (5 - 4 * u)),
    ("shifted", {"shift": 0.25}, lambda u: u / (0.25 + 0.75 * u)),
    ("cosine", {}, lambda u: 1 - math.cos(math.pi * u / 2)),
    ("power", {}, lambda u: u * u),
    ("power", {"power": 0.5}, math.sqrt),
    ("power", {"power": 3}, lambda u: u * u * u),
]


@pytest.fixture
def float64():
    """Grids in float64, so that their equations can be compared closely; conftest puts the default back."""
    torch.set_default_dtype(torch.float64)


every_grid = pytest.mark.parametrize("name, options, equation", GRIDS)
in_float64 = pytest.mark.usefixtures("float64")


@in_float64
def test_every_grid_is_here():
    assert {name for name, _, _ in GRIDS} == set(TIME_GRIDS)
    assert all(time_grids.time_grid(name) is grid for name, grid in TIME_GRIDS.items())


@in_float64
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 50, 1000])
@pytest.mark.parametrize("noise_at", [0, 1])
@every_grid
def test_the_equation(name, options, equation, noise_at, steps):
    grid = TIME_GRIDS[name](steps, noise_at=noise_at, **options)
    assert grid.dtype == torch.float64 and grid.device.type == "cpu" and grid.shape == (steps + 1,)
    assert grid[0] == noise_at and grid[-1] == 1 - noise_at
    assert (torch.diff(grid) * (1 - 2 * noise_at) > 0).all()
    t = torch.tensor([equation(k / steps) for k in range(steps + 1)], dtype=torch.float64)
    # Other forms of the same equations, that cancel: 1 - cos and 1 - t, each a few roundings of 2^-53.
    torch.testing.assert_close(grid, 1 - t if noise_at else t, rtol=0, atol=2**-51)


@in_float64
@pytest.mark.parametrize("noise_at", [0, 1])
@every_grid
def test_no_steps_is_the_noise(name, options, equation, noise_at):
    assert TIME_GRIDS[name](0, noise_at=noise_at, **options).tolist() == [noise_at]


@in_float64
def test_more_steps_near_the_noise():
    for noise_at in (0, 1):
        even = torch.diff(uniform(10, noise_at=noise_at)).abs()
        for grid in (shifted(10, noise_at=noise_at), cosine(10, noise_at=noise_at), power(10, noise_at=noise_at)):
            first, *_, last = torch.diff(grid).abs()
            assert first < even[0] and last > even[-1]
        first, *_, last = torch.diff(shifted(10, shift=1 / 3, noise_at=noise_at)).abs()
        assert first > even[0] and last < even[-1]


@in_float64
@pytest.mark.parametrize("noise_at", [0, 1])
def test_uniform_is_linspace(noise_at):
    for steps in (1, 4, 10, 50):
        want = torch.linspace(noise_at, 1 - noise_at, steps + 1, dtype=torch.float64)
        assert torch.equal(uniform(steps, noise_at=noise_at), want)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(uniform(10), torch.linspace(0, 1, 11))  # the published loop's


@in_float64
def test_neutral_options_are_uniform():
    exact = torch.tensor([k / 7 for k in range(8)], dtype=torch.float64)
    assert torch.equal(shifted(7, shift=1.0), exact)
    assert torch.equal(power(7, power=1.0), exact)


@in_float64
def test_shifts_compose():
    # Shifting by 2 what is shifted by 3 is shifting by 6; so direction and parameter are those of one group.
    t = shifted(9, shift=3.0)
    torch.testing.assert_close(t / (2 - t), shifted(9, shift=6.0), rtol=0, atol=2**-52)


@in_float64
def test_cosine_is_sway_sampling():
    u = uniform(32)
    sway = u - (torch.cos(math.pi / 2 * u) - 1 + u)  # F5-TTS, coefficient -1
    torch.testing.assert_close(cosine(32), sway, rtol=0, atol=2**-51)


@in_float64
def test_cosine_keeps_its_digits_near_the_noise():
    steps = 10**5
    first = cosine(steps)[1].item()
    # pi^2 u^2 / 8 to 1e-11 here; 1 - cos has 6 digits left.
    assert first == pytest.approx(math.pi**2 / 8 / steps**2, rel=1e-10, abs=0)


@in_float64
@every_grid
def test_callers_get_their_own(name, options, equation):
    TIME_GRIDS[name](5, **options).fill_(7)
    assert TIME_GRIDS[name](5, **options)[0] == 0


@in_float64
@every_grid
def test_sample_takes_it(name, options, equation):
    for noise_at in (0, 1):
        fm = FlowMatching(2, "midpoint", noise_at=noise_at)
        grid = TIME_GRIDS[name](8, noise_at=noise_at, dtype=torch.float32, **options)
        towards = 1 - 2 * noise_at
        noise = torch.zeros(3, 2, dtype=torch.float32)
        x = fm.sample(3, lambda x, t, k=towards: torch.full_like(x, k), noise=noise, time_steps=grid)
        torch.testing.assert_close(x, torch.ones_like(noise), rtol=0, atol=1e-6)  # eight roundings of float32


@in_float64
@every_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_once_to_a_dtype(name, options, equation, dtype):
    want = TIME_GRIDS[name](5, **options).to(dtype)
    with torch.device("meta"):
        got = TIME_GRIDS[name](5, **options, dtype=dtype)
        torch.set_default_dtype(dtype)
        assert torch.equal(TIME_GRIDS[name](5, **options), got)
    assert got.device.type == "cpu" and got.dtype == dtype
    if name == "uniform":
        want = torch.linspace(0, 1, 6, dtype=dtype, device="cpu")
    assert torch.equal(got, want)


@in_float64
def test_entries_that_meet_in_float32_only():
    power(8000, noise_at=1)
    with pytest.raises(ValueError, match=r"8000 steps so close together that torch.float32 cannot"):
        power(8000, noise_at=1, dtype=torch.float32)


@in_float64
def test_examples_run():
    assert doctest.testmod(time_grids) == (0, 2)


# ---- errors ----


@in_float64
@every_grid
def test_steps_and_noise_end(name, options, equation):
    grid = TIME_GRIDS[name]
    for wrong in (2.0, "4", None, True):
        with pytest.raises(TypeError, match=f"steps must be an int, got {wrong!r}"):
            grid(wrong, **options)
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        grid(-1, **options)
    for wrong in (2, -1, "0", None, True, False, 1.0, 0.0):
        with pytest.raises(ValueError, match=f"noise_at must be 0 or 1, got {wrong!r}"):
            grid(4, noise_at=wrong, **options)


@in_float64
@pytest.mark.parametrize("grid, name", [(shifted, "shift"), (power, "power")])
def test_options(grid, name):
    for wrong in ("3", True, None, [3.0]):
        with pytest.raises(TypeError, match=f"{name} must be a number, got "):
            grid(4, **{name: wrong})
    for wrong in (0, -1.0, math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be finite and greater than 0, got "):
            grid(4, **{name: wrong})
    for steps in (0, 1, 4):  # whatever the steps, numbers of other kinds are taken
        assert torch.equal(grid(steps, **{name: torch.tensor(2.5)}), grid(steps, **{name: 2.5}))


@in_float64
@pytest.mark.parametrize(
    "grid, options, noise_at",
    [
        (shifted, {"shift": 1e-20}, 0),  # at the data, where t is near 1
        (shifted, {"shift": 1e20}, 1),  # at the noise, where sigma is
        (shifted, {"shift": 1e308}, 0),  # s*(N - k) overflows
        (power, {"power": 1e-18}, 0),
        (power, {"power": 1e20}, 0),
        (power, {"power": 1e20}, 1),
    ],
)
def test_entries_that_meet(grid, options, noise_at):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=1e.*4 steps so close together"):
        grid(4, noise_at=noise_at, **options)


@in_float64
def test_unknown_names():
    for wrong in ("karras", 3, None, ["uniform"]):
        with pytest.raises(ValueError, match=r"Invalid time grid: .*\(known: uniform, shifted, cosine, power\)"):
            time_grids.time_grid(wrong)


# ---- time grids of sample(), by name or function ----

NAMED_GRIDS = {
    "uniform": {},
    "shifted": {},
    "shifted by 5": {"shift": 5.0},
    "cosine": {},
    "power": {},
    "power of 0.5": {"power": 0.5},
}


def grid_of(case, steps=STEPS, noise_at=0):
    """The name, the options, and the grid as a user would round it: in torch's default dtype."""
    name = case.split()[0]
    if name == "uniform":
        grid = torch.linspace(noise_at, 1 - noise_at, steps + 1)
    else:
        grid = time_grids.TIME_GRIDS[name](steps, noise_at=noise_at, **NAMED_GRIDS[case]).to(torch.get_default_dtype())
    return {"time_grid": name, "time_grid_options": NAMED_GRIDS[case] or None, "noise_at": noise_at}, grid


@pytest.mark.parametrize("case", NAMED_GRIDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_a_grid_by_name_is_that_grid(backend, solver, case):
    """Equal to time_steps=, to a function, and to the eager loop; step_fn sees the default dtype."""
    seen = []

    def step_fn(x, t):
        seen.append(t.dtype)
        return field(x, t)

    for default, noise_at in ((torch.float32, 0), (torch.float32, 1), (torch.float64, 0)):
        torch.set_default_dtype(default)
        keywords, grid = grid_of(case, noise_at=noise_at)
        noise = start(torch.float32)
        got, times = sampler(solver, backend, **keywords).sample(BATCH, step_fn, noise=noise, return_all_steps=True)
        assert_same_bits(times, grid)
        assert grid.dtype == default and set(seen) == {default}
        other = FlowMatching(DIMS, solver, noise_at=noise_at, backend=backend)
        given, _ = other.sample(BATCH, field, noise=noise, return_all_steps=True, time_steps=grid)
        assert_same_bits(got, given, "time_steps")
        named = sampler(solver, backend, time_grid=lambda n, grid=grid: grid, noise_at=noise_at)
        assert_same_bits(named.sample(BATCH, field, noise=noise), got[:, -1], "a function")
        if solver in eager_loops.SOLVERS:
            assert_same_bits(got, eager(solver, noise, grid), "eager")
        seen.clear()


@pytest.mark.parametrize("case", NAMED_GRIDS)
def test_other_numbers_of_steps(case):
    """inference_step= takes the grid of that many steps; a default of none returns the noise."""
    for noise_at in (0, 1):
        keywords, _ = grid_of(case, noise_at=noise_at)
        fm = sampler(**keywords)
        for steps in (1, 3, STEPS, 40, 0, None):
            _, grid = grid_of(case, steps or STEPS, noise_at)
            got, times = fm.sample(BATCH, field, noise=start(), return_all_steps=True, inference_step=steps)
            assert_same_bits(times, grid)
            assert_same_bits(got, eager("euler", start(), grid))
        states, times = sampler(steps=0, **keywords).sample(BATCH, field, noise=start(), return_all_steps=True)
        assert_same_bits(states, start()[:, None])
        assert_same_bits(times, torch.tensor([float(noise_at)]))


def test_a_function_for_a_grid():
    """It is asked at each sample(), for the steps of that sample; its dtype is what step_fn sees."""
    asked, seen = [], []

    def grid(steps):
        asked.append(steps)
        return torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.5

    fm = sampler("heun", time_grid=grid)
    assert asked == []
    for steps in (None, 4, 9, 4):
        wanted = torch.linspace(0, 1, (steps or STEPS) + 1, dtype=torch.float64) ** 1.5
        got, times = fm.sample(
            BATCH, lambda x, t: (seen.append(t.dtype), field(x, t))[1], noise=start(), return_all_steps=True,
            inference_step=steps,
        )  # fmt: skip
        assert_same_bits(times, wanted)
        assert_same_bits(got, eager("heun", start(), wanted))
    assert asked == [STEPS, 4, 9, 4] and set(seen) == {torch.float64}
    # A list, a partial, a module: what can be called, and what torch takes for a tensor.
    for grid in (lambda n: [k / n for k in range(n + 1)], functools.partial(torch.linspace, 0, 1, STEPS + 1)):
        times = sampler(time_grid=lambda n, grid=grid: grid(n) if "partial" not in repr(grid) else grid()).sample(
            BATCH, field, return_all_steps=True
        )[1]  # fmt: skip
        torch.testing.assert_close(times, TIMES, rtol=0, atol=1e-7)
    noise = FlowMatching(DIMS, num_inference_steps=0, time_grid=lambda n: 1 / 0).sample(BATCH, field, noise=start())
    assert_same_bits(noise, start())


def test_a_grid_that_is_given_takes_precedence():
    fm = sampler("heun", time_grid="cosine")
    grid = torch.tensor([0.0, 0.3, 1.0])
    got, times = fm.sample(BATCH, field, noise=start(), return_all_steps=True, time_steps=grid)
    assert_same_bits(times, grid)
    assert_same_bits(got, eager("heun", start(), grid))
    fm = sampler(time_grid=lambda n: 1 / 0)
    assert_same_bits(fm.sample(BATCH, field, noise=start(), time_steps=grid), eager("euler", start(), grid)[:, -1])


def test_step_sizes_on_a_grid_with_a_name(backend):
    """The times are the grid's, the sizes are those given."""
    sizes = [0.1, 0.2, 0.05, 0.3, 0.15, 0.2]
    for keywords in (
        {"time_grid": "shifted"},
        {"time_grid": lambda n: time_grids.shifted(n).float()},
    ):
        seen = []

        def step_fn(x, t, seen=seen):
            seen.append(t.flatten()[0].clone())
            return field(x, t)

        got, times = sampler("euler", backend, **keywords).sample(
            BATCH, step_fn, noise=start(), step_sizes=sizes, return_all_steps=True
        )
        grid = time_grids.shifted(STEPS).float()
        assert_same_bits(times, grid)
        assert_same_bits(torch.stack(seen), grid[:-1])
        x = start()
        for k, h in enumerate(sizes):
            x = x + h * field(x, grid[k].view(1, 1, 1))
            assert_same_bits(got[:, k + 1], x)


@pytest.mark.parametrize("case", NAMED_GRIDS)
def test_a_cached_grid_is_never_handed_out(backend, case):
    """What step_fn, a hook and the caller are given may be written to; the next sample() is right."""
    for noise_at in (0, 1):
        keywords, grid = grid_of(case, noise_at=noise_at)
        fm = sampler("heun", backend, **keywords)
        wanted = eager("heun", start(), grid)
        for batch_size in (1, BATCH):

            def spoil(x, t, batch_size=batch_size):
                if batch_size == 1:
                    t.fill_(9.0)
                return x * 0

            def spoiling(step, t, x, batch_size=batch_size):
                x.fill_(9.0)
                if batch_size == 1:
                    t.fill_(9.0)

            out = fm.sample(
                batch_size, spoil, return_all_steps=True, callback=spoiling,
                constraint=lambda x, t: spoil(x, t) + x,
            )  # fmt: skip
            out.time_steps.fill_(9.0)
            out.x.fill_(9.0)
            fm.sample(batch_size, spoil, return_all_steps=True)[1].fill_(9.0)
            got, times = fm.sample(BATCH, field, noise=start(), return_all_steps=True)
            assert_same_bits(times, grid)
            assert_same_bits(got, wanted)


WRITES = {
    "in place": lambda t: t[:1].fill_(9.0),
    "data": lambda t: t.data[:1].fill_(9.0),
    "numpy": lambda t: t.numpy().fill(9.0),
    "dlpack": lambda t: torch.from_dlpack(t.__dlpack__())[:1].fill_(9.0),
    "another shape": lambda t: t.unsqueeze_(-1),
    "another tensor": lambda t: t.set_(torch.full_like(t, 9.0)),
    "an attribute": lambda t: setattr(t, "seen", True),
}


@pytest.mark.parametrize("by", ["step_fn", "constraint", "callback"])
@pytest.mark.parametrize("way", WRITES)
def test_writes_to_time_end_with_their_sample(backend, way, by):
    """However it is written to: also where PyTorch counts no write, and the writer keeps nothing."""
    fm, seen = sampler("heun", backend), []

    def step_fn(x, t):
        seen.append((t.clone(), t.shape, hasattr(t, "seen")))
        return x * 0.5

    def run(batch_size):
        seen.clear()
        out = fm.sample(batch_size, step_fn, noise=start()[:batch_size], return_all_steps=True)
        return [*out, *(t for t, _, _ in seen)], [rest for _, *rest in seen]

    functions = {"step_fn": step_fn} | {
        "step_fn": {"step_fn": lambda x, t: (WRITES[way](t), x)[1]},
        "constraint": {"constraint": lambda x, t: (WRITES[way](t), x)[1]},
        "callback": {"callback": lambda step, t, x: (WRITES[way](t), None)[1]},
    }[by]
    for batch_size in (1, BATCH):
        wanted = run(batch_size)
        fm.sample(batch_size, **functions)
        for got in (run(batch_size), run(batch_size)):
            for one, other in zip(got[0], wanted[0], strict=True):
                assert_same_bits(one, other)
            assert got[1] == wanted[1]


def test_grids_and_their_options_are_other_tables():
    """Whatever is in the cache."""
    cases = [(case, noise_at, steps) for case in NAMED_GRIDS for noise_at in (0, 1) for steps in (4, 5)]
    cases.append(("uniform", 0, 4))
    for solver in ("euler", "ab2"):
        for case, noise_at, steps in cases + cases[::-1]:
            keywords, grid = grid_of(case, steps, noise_at)
            got = sampler(solver, **keywords).sample(BATCH, field, noise=start(), inference_step=steps)
            assert_same_bits(got, eager(solver, start(), grid)[:, -1], f"{case}, noise_at={noise_at}")
    assert len(solvers.cache._tables) == 2 * (len(cases) - 1)


def test_options_changed_afterwards():
    options = {"shift": 3.0}
    fm = sampler(time_grid="shifted", time_grid_options=options)
    options["shift"] = 9.0
    got = fm.sample(BATCH, field, noise=start(), return_all_steps=True)[1]
    assert_same_bits(got, time_grids.shifted(STEPS, shift=3.0).float())


@pytest.mark.parametrize("inside", [
    [0.2, 0.5, 1.0, 1.4], [0.4, 0.2, 0.0, -0.5], [1.0, 0.7, 0.3], [-0.5, 0.0, 0.5, 0.9], [0.3, 1.0, 1.5, 1.9],
], ids=str)  # fmt: skip
def test_a_grid_that_dpmpp_2m_cannot_use(inside):
    """One with the data inside, the noise inside, or turned round: its exponential variable is infinite there."""
    fm = FlowMatching(DIMS, "dpmpp_2m")
    before, calls = torch.get_rng_state(), []
    for grid in (inside, torch.tensor(inside, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"dpmpp_2m computes with the time itself.*(\[0, 1\]|the other way)"):
            fm.sample(BATCH, calls.append, time_steps=grid)
    assert torch.equal(before, torch.get_rng_state()) and not calls


ROUNDED = [
    ("power", {"power": 8.0}, 1, torch.float32),  # 1 - 0.1^8 is 1 in float32
    ("shifted", {"shift": 1e9}, 1, torch.float32),
    ("shifted", {"shift": 1e-9}, 0, torch.float32),
    ("power", {"power": 4.0}, 1, torch.bfloat16),
]


@pytest.mark.parametrize("name, options, noise_at, default", ROUNDED)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_a_grid_whose_entries_meet_in_the_default_dtype(solver, name, options, noise_at, default):
    """What time_steps= refuses is no source of NaN by its name: ab2 divides by the step before."""
    torch.set_default_dtype(default)
    fm = FlowMatching(DIMS, solver, 10, time_grid=name, time_grid_options=options, noise_at=noise_at)
    grid = time_grids.TIME_GRIDS[name](10, noise_at=noise_at, dtype=torch.float64, **options).to(default)
    assert (torch.diff(grid) == 0).any()
    with pytest.raises(ValueError, match="time_steps must be finite and strictly monotonic"):
        fm.sample(BATCH, field, noise=start(), time_steps=grid)
    with contextlib.suppress(ValueError):
        assert fm.sample(BATCH, field, noise=start()).isfinite().all()


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("rk4", 4), ("ab2", 2), ("ab3", 3)])
@pytest.mark.parametrize("case", ["shifted", "shifted by 5", "cosine"])
def test_order_on_grids_with_a_name(solver, order, case):
    torch.set_default_dtype(torch.float64)
    keywords, _ = grid_of(case)
    noise = torch.rand(4, 2) * 0.8 + 0.1
    exact = noise * torch.e**3 / (1 + noise * (torch.e**3 - 1))  # of x' = 3x(1 - x)
    errors = [
        (FlowMatching(2, solver, n, **keywords).sample(4, lambda x, t: 3 * x * (1 - x), noise=noise) - exact)
        .abs().max() for n in (160, 320)
    ]  # fmt: skip
    assert abs(torch.log2(errors[0] / errors[1]) - order) < 0.15


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_grids_given_on_other_devices(device):
    """A grid lives on the CPU, and the state elsewhere."""
    for keywords in ({"time_steps": [0.0, 0.5, 1.0]}, {"time_steps": torch.tensor([0.0, 0.5, 1.0])}):
        assert FlowMatching(DIMS).sample(BATCH, field, device, **keywords).device.type == device
    fm = sampler("ab2", time_grid=lambda n: torch.linspace(0, 1, n + 1))
    assert fm.sample(BATCH, field, device).device.type == device


META_GRIDS = {
    "time_steps": lambda meta: {"time_steps": meta},
    "step_sizes": lambda meta: {"time_steps": [0.0, 0.25, 0.5, 1.0], "step_sizes": meta[1:]},
    "time_grid": lambda meta: {"time_grid": lambda n: meta},
}


@pytest.mark.parametrize("case", META_GRIDS)
@pytest.mark.parametrize("solver", ["euler", "rk4", "dpmpp_2m"])
def test_grids_on_the_meta_device(solver, case):
    """Without values they serve a state on the meta device, and no other."""
    given = META_GRIDS[case](torch.empty(4, device="meta"))
    fm = FlowMatching(DIMS, solver, 3, **{k: given.pop(k) for k in ("time_grid",) if k in given})
    with pytest.raises(ValueError, match=f"{case}.*on the meta device, where it has no values.*state is on cpu"):
        fm.sample(BATCH, field, **given)
    assert fm.sample(BATCH, field, "meta", **given).shape == (BATCH, *DIMS)


def test_a_fitted_solver_and_a_grid_on_the_meta_device():
    grid, solver = torch.empty(2, device="meta"), FittedSolver((0.0, 1.0), ((1.0, 1.0),))
    with pytest.raises(ValueError, match="time_steps is on the meta device"):
        FlowMatching(DIMS, solver).sample(BATCH, field, time_steps=grid)
    with pytest.raises(ValueError, match="time_steps is on the meta device"):
        FlowMatching(DIMS).fit_solver(field, batch_size=16, time_steps=grid)


FRACTIONS = {
    "euler": [0], "midpoint": [0, 1 / 2], "heun": [0, 1], "rk4": [0, 1 / 3, 2 / 3, 1],
    "rk4_classic": [0, 1 / 2, 1 / 2, 1], "ab2": [0],
}  # fmt: skip


@pytest.mark.parametrize("solver", FRACTIONS)
def test_times_and_step_sizes_of_different_units(solver):
    """Model times 1000 to 0 with the steps of sigma: a stage's time is start + fraction * (end - start)."""
    grid = torch.tensor([1000.0, 900.0, 600.0, 200.0, 0.0])
    sigmas = grid / 1000
    seen = []

    def velocity(x, t):
        seen.append(t.flatten()[0].item())
        return field(x, t / 1000)

    x = FlowMatching(DIMS, solver).sample(
        BATCH, velocity, noise=start(), time_steps=grid, step_sizes=torch.diff(sigmas)
    )
    wanted = [a + f * (b - a) for a, b in itertools.pairwise(grid.tolist()) for f in FRACTIONS[solver]]
    assert seen == pytest.approx(wanted, abs=1e-4)  # float32 of 1000
    plain = FlowMatching(DIMS, solver).sample(BATCH, field, noise=start(), time_steps=sigmas)
    # float32: t / 1000 is not the sigma to the bit, and its error grows by at most e^3 in four steps.
    torch.testing.assert_close(x, plain, rtol=0, atol=1e-5)


ABSOLUTE = {
    "another unit": ([0.0, 500.0, 1000.0], None, r"must stay in \[0, 1\]"),
    "the other way": ([1.0, 0.5, 0.1], None, "the other way"),
    "other step sizes": ([0.1, 0.5, 0.9], [0.1, 0.1], "step_sizes must be the grid's differences"),
    "reversed step sizes": ([0.1, 0.5, 0.9], [-0.4, -0.4], "step_sizes must be the grid's differences"),
}


@pytest.mark.parametrize("case", ABSOLUTE)
def test_what_computes_with_the_time_itself_refuses(case):
    grid, sizes, message = ABSOLUTE[case]
    for fm, who in (
        (FlowMatching(DIMS, "dpmpp_2m"), "dpmpp_2m"),
        (FlowMatching(DIMS, prediction_type="data"), "prediction_type"),
        (FlowMatching(DIMS, prediction_type="noise", noise_at=1), "prediction_type"),
    ):
        given = [1 - t for t in grid] if fm.noise_at else grid
        steps = None if sizes is None else [-h if fm.noise_at else h for h in sizes]
        with pytest.raises(ValueError, match=f"{who} computes with the time itself.*{message}"):
            fm.sample(BATCH, field, noise=start(), time_steps=given, step_sizes=steps)
    # The differences of a float32 grid, taken in float64, are its differences.
    exact = FlowMatching(DIMS, "dpmpp_2m").sample(
        BATCH, field, noise=start(), time_steps=torch.tensor([0.1, 0.5, 0.9]), step_sizes=[0.4, 0.4]
    )
    assert exact.isfinite().all()
