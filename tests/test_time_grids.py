"""Time grids: exact ends, strictly monotonic, the equations, and what is refused."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from flowmatch_kernels import FlowMatching, time_grids
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


@pytest.fixture(autouse=True)
def float64():
    """Grids in float64, so that their equations can be compared closely; conftest puts the default back."""
    torch.set_default_dtype(torch.float64)


every_grid = pytest.mark.parametrize("name, options, equation", GRIDS)


def test_every_grid_is_here():
    assert {name for name, _, _ in GRIDS} == set(TIME_GRIDS)
    assert all(time_grids.time_grid(name) is grid for name, grid in TIME_GRIDS.items())


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


@pytest.mark.parametrize("noise_at", [0, 1])
@every_grid
def test_no_steps_is_the_noise(name, options, equation, noise_at):
    assert TIME_GRIDS[name](0, noise_at=noise_at, **options).tolist() == [noise_at]


def test_more_steps_near_the_noise():
    for noise_at in (0, 1):
        even = torch.diff(uniform(10, noise_at=noise_at)).abs()
        for grid in (shifted(10, noise_at=noise_at), cosine(10, noise_at=noise_at), power(10, noise_at=noise_at)):
            first, *_, last = torch.diff(grid).abs()
            assert first < even[0] and last > even[-1]
        first, *_, last = torch.diff(shifted(10, shift=1 / 3, noise_at=noise_at)).abs()
        assert first > even[0] and last < even[-1]


@pytest.mark.parametrize("noise_at", [0, 1])
def test_uniform_is_linspace(noise_at):
    for steps in (1, 4, 10, 50):
        want = torch.linspace(noise_at, 1 - noise_at, steps + 1, dtype=torch.float64)
        assert torch.equal(uniform(steps, noise_at=noise_at), want)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(uniform(10), torch.linspace(0, 1, 11))  # the published loop's


def test_neutral_options_are_uniform():
    exact = torch.tensor([k / 7 for k in range(8)], dtype=torch.float64)
    assert torch.equal(shifted(7, shift=1.0), exact)
    assert torch.equal(power(7, power=1.0), exact)


def test_shifts_compose():
    # Shifting by 2 what is shifted by 3 is shifting by 6; so direction and parameter are those of one group.
    t = shifted(9, shift=3.0)
    torch.testing.assert_close(t / (2 - t), shifted(9, shift=6.0), rtol=0, atol=2**-52)


def test_cosine_is_sway_sampling():
    u = uniform(32)
    sway = u - (torch.cos(math.pi / 2 * u) - 1 + u)  # F5-TTS, coefficient -1
    torch.testing.assert_close(cosine(32), sway, rtol=0, atol=2**-51)


def test_cosine_keeps_its_digits_near_the_noise():
    steps = 10**5
    first = cosine(steps)[1].item()
    # pi^2 u^2 / 8 to 1e-11 here; 1 - cos has 6 digits left.
    assert first == pytest.approx(math.pi**2 / 8 / steps**2, rel=1e-10, abs=0)


@every_grid
def test_callers_get_their_own(name, options, equation):
    TIME_GRIDS[name](5, **options).fill_(7)
    assert TIME_GRIDS[name](5, **options)[0] == 0


@every_grid
def test_sample_takes_it(name, options, equation):
    for noise_at in (0, 1):
        fm = FlowMatching(2, "midpoint", noise_at=noise_at)
        grid = TIME_GRIDS[name](8, noise_at=noise_at, dtype=torch.float32, **options)
        towards = 1 - 2 * noise_at
        noise = torch.zeros(3, 2, dtype=torch.float32)
        x = fm.sample(3, lambda x, t, k=towards: torch.full_like(x, k), noise=noise, time_steps=grid)
        torch.testing.assert_close(x, torch.ones_like(noise), rtol=0, atol=1e-6)  # eight roundings of float32


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


def test_entries_that_meet_in_float32_only():
    power(8000, noise_at=1)
    with pytest.raises(ValueError, match=r"8000 steps so close together that torch.float32 cannot"):
        power(8000, noise_at=1, dtype=torch.float32)


def test_examples_run():
    assert doctest.testmod(time_grids) == (0, 2)


# ---- errors ----


@every_grid
def test_steps_and_noise_end(name, options, equation):
    grid = TIME_GRIDS[name]
    for wrong in (2.0, "4", None, True):
        with pytest.raises(TypeError, match=f"steps must be an int, got {wrong!r}"):
            grid(wrong, **options)
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        grid(-1, **options)
    for wrong in (2, -1, "0", None):
        with pytest.raises(ValueError, match=f"noise_at must be 0 or 1, got {wrong!r}"):
            grid(4, noise_at=wrong, **options)


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


def test_unknown_names():
    for wrong in ("karras", 3, None, ["uniform"]):
        with pytest.raises(ValueError, match=r"Invalid time grid: .*\(known: uniform, shifted, cosine, power\)"):
            time_grids.time_grid(wrong)
