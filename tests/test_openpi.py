"""openpi's sampling loop replaced: the same times, the same actions, no read of a device value."""

import types

import pytest
import torch
from openpi_loop import Model, loop
from operands import assert_same_bits

from flowmatch_kernels import FlowMatching
from flowmatch_kernels.integrations import openpi, replacement


class Policy:
    """As openpi's policy: it keeps the method that it calls."""

    def __init__(self, model):
        self._model = model
        self._sample_actions = model.sample_actions

    def infer(self, observation, **keywords):
        return self._sample_actions("cpu", observation, **keywords)


@pytest.fixture
def known(monkeypatch):
    """The stand-in's method counts as a known version."""
    monkeypatch.setitem(openpi.KNOWN, replacement.fingerprint(Model.sample_actions), "the stand-in")


OBSERVATION = types.SimpleNamespace(state=torch.linspace(-1, 1, 6).view(2, 3))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10, 20, 50, 333, 1000])
def test_times(steps):
    """To the bit; and the count of steps."""
    seen = []
    x, times = loop(lambda x, t: seen.append(t) or -x, torch.ones(2, 3), steps)
    grid, sizes = openpi.time_grid(steps)
    assert len(times) == len(sizes) == steps
    assert_same_bits(grid[:-1], torch.tensor(times))
    assert_same_bits(sizes, torch.full((steps,), -1.0 / steps))
    got = FlowMatching(3).sample(2, lambda x, t: -x, noise=torch.ones(2, 3), time_steps=grid, step_sizes=sizes)
    assert_same_bits(got, x)


def test_count_of_steps_where_the_sums_err():
    grid, _ = openpi.time_grid(10_000)
    assert len(grid) - 1 == len(loop(lambda x, t: x, torch.ones(1, 1), 10_000)[1]) == 9_999


def test_bad_numbers_of_steps():
    with pytest.raises(ValueError, match=r"num_steps must be 1 or more, got 0"):
        openpi.time_grid(0)
    with pytest.raises(TypeError, match=r"num_steps must be an int"):
        openpi.time_grid(2.5)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_accelerate_a_policy(known, steps):
    policy = Policy(Model())
    noise = torch.randn(2, 5, 4)
    wanted = policy.infer(OBSERVATION, noise=noise, num_steps=steps)
    assert openpi.accelerate(policy) is policy
    assert_same_bits(policy.infer(OBSERVATION, noise=noise, num_steps=steps), wanted)
    assert policy._model.prepared == [steps, 1]
    assert openpi.restore(policy) is policy
    assert policy._sample_actions.__func__ is Model.sample_actions
    assert "sample_actions" not in vars(policy._model)
    assert_same_bits(policy.infer(OBSERVATION, noise=noise, num_steps=steps), wanted)
    openpi.restore(policy)


def test_draws_the_same_noise(known):
    model = Model()
    torch.manual_seed(7)
    wanted = model.sample_actions("cpu", OBSERVATION)
    state = torch.get_rng_state()
    openpi.accelerate(openpi.accelerate(model))
    torch.manual_seed(7)
    assert_same_bits(model.sample_actions("cpu", OBSERVATION), wanted)
    assert torch.equal(torch.get_rng_state(), state)
    assert "sample_actions" not in vars(openpi.restore(model))


def test_options(known):
    model = openpi.accelerate(Model(), int_method="midpoint", backend="reference")
    assert model.sample_actions("cpu", OBSERVATION, num_steps=3).shape == (2, 5, 4)
    with pytest.raises(ValueError, match=r"Invalid integration method: none"):
        openpi.accelerate(model, int_method="none")


def test_compiled_as_theirs(known, monkeypatch):
    """Where openpi compiled the method ours is compiled, with its mode."""
    compile, modes = torch.compile, []

    def recorded(function, mode):
        modes.append(mode)
        return compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", recorded)
    model = Model(compiled=True)
    noise = torch.randn(2, 5, 4)
    before, wanted = model.sample_actions, Model.sample_actions(model, "cpu", OBSERVATION, noise, 4)
    openpi.accelerate(model)
    assert modes == ["default", "default"]
    assert_same_bits(model.sample_actions("cpu", OBSERVATION, noise, 4), wanted)
    assert openpi.restore(model).sample_actions is before


def test_reads_no_value(known, monkeypatch):
    """Beside openpi's own `while`, which asks twice for values on the CPU: no bool(), item() or tolist()."""
    model = openpi.accelerate(Model())
    model.sample_actions("cpu", OBSERVATION)  # the table is kept
    asked = []
    for name in ("__bool__", "item", "tolist", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: asked.append(name) or False, raising=False)
    model.sample_actions("cpu", OBSERVATION, torch.randn(2, 5, 4))
    monkeypatch.undo()
    assert "item" not in asked
    assert asked.count("__bool__") <= 2


def test_refuses_what_it_does_not_know():
    class Other(Model):
        def sample_actions(self, device, observation, noise=None, num_steps=10):
            return noise

    with pytest.raises(RuntimeError, match=r"Other is a version .*; known are openpi's commits 5546575"):
        openpi.accelerate(Policy(Other()))
    with pytest.raises(TypeError, match=r"wanted an openpi policy .*, got a .*Policy, whose model is a builtins\.dict"):
        openpi.accelerate(type("Policy", (), {"_model": {}})())
    with pytest.raises(TypeError, match=r"got a builtins\.int$"):
        openpi.restore(3)


def test_fingerprint():
    """Comments and layout do not count; code does."""

    class One:
        def function(self, x):
            # a comment
            return [x,  2]  # fmt: skip

    class Two:
        @torch.no_grad()
        def function(self, x):
            return [x, 2]

    class Three:
        def function(self, x):
            return [x, 2]

    one, two, three = (replacement.fingerprint(cls.function) for cls in (One, Two, Three))
    assert one == three
    assert one != two
