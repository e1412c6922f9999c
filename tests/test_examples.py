"""Every program in examples runs, but those that a test file of their name runs; two have their loop's bits."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from operands import assert_same_bits

ROOT = Path(__file__).parent.parent


def has_its_own_test(path):
    test = ROOT / "tests" / f"test_{path.stem}.py"
    return test.exists() and path.name in test.read_text()


EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if not has_its_own_test(path))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tmp_path, monkeypatch, capsys):
    """It ends, without a warning, and says what it showed."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"^import (diffusers|torchdiffeq|flow_matching)$", path.read_text(), re.MULTILINE):
        pytest.importorskip(name, reason=f"the example uses {name}, of the test extra")
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_there_are_five():
    assert len(EXAMPLES) >= 5
    assert all(len(path.read_text().splitlines()) <= 75 for path in EXAMPLES)


@pytest.mark.parametrize("steps", [1, 7, 32])
@pytest.mark.parametrize("sway_by", [-1.0, 0.4])
def test_f5_tts(steps, sway_by):
    """Against torchdiffeq's odeint, as F5-TTS calls it."""
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="the oracle is torchdiffeq itself, of the test extra")
    example = runpy.run_path(str(ROOT / "examples" / "f5_tts.py"))
    transformer = example["stand_in"](12)
    noise, cond = (torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(k)) for k in range(2))
    times, strength = [], 2.0

    def fn(t, x):
        times.append(t)
        guided, unguided = (transformer(x=x, cond=cond, time=t, drop=drop) for drop in (False, True))
        return guided + (guided - unguided) * strength

    t = torch.linspace(0, 1, steps + 1)
    t = t + sway_by * (torch.cos(torch.pi / 2 * t) - 1 + t)
    wanted = torchdiffeq.odeint(fn, noise, t, method="euler")[-1]
    assert len(times) == steps
    assert_same_bits(example["sample"](transformer, noise, cond, steps, strength, sway_by), wanted)


@pytest.mark.parametrize("rate", [0.7, 0.0, 1.3])
@pytest.mark.parametrize("steps", [*range(1, 33), 50, 100])
def test_cosyvoice(steps, rate):
    """Against its Euler steps, which accumulate the time, and its guidance, written from the paper."""
    example = runpy.run_path(str(ROOT / "examples" / "cosyvoice.py"))
    estimator = example["stand_in"](6)
    noise, mu = (torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(k)) for k in range(2))
    grid = 1 - torch.cos(torch.linspace(0, 1, steps + 1) * 0.5 * torch.pi)
    x, t, dt = noise, grid[0], grid[1] - grid[0]
    for step in range(1, steps + 1):
        halves = estimator(torch.cat([x, x]), torch.cat([mu, torch.zeros_like(mu)]), t.expand(4))
        guided, unguided = halves.split(2)
        x = x + dt * ((1.0 + rate) * guided - rate * unguided)
        t = t + dt
        if step < steps:
            dt = grid[step + 1] - t
    assert_same_bits(example["sample"](estimator, noise, mu, steps, rate), x)
