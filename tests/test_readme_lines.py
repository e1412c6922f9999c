"""Each line of the README's table, run as it stands there: the project's own result, to the last bit."""

import importlib
import re
import types
from pathlib import Path

import alpamayo_packages
import gr00t_loop
import published
import pytest
import test_gr00t
import test_openpi
import torch
from operands import assert_same_bits
from test_lerobot import field as policy_field
from test_lerobot import module as lerobot_module  # noqa: F401  # a fixture

from flowmatch_kernels import FlowMatching, KeyedNoise
from flowmatch_kernels.integrations import gr00t, openpi, replacement

README = (Path(__file__).parent.parent / "README.md").read_text()
LINES = dict(re.findall(r"^\| (.+?) \| `(.+)` \|$", README.partition("## The line to change")[2], re.MULTILINE))
X_DIMS, BATCH = (16, 2), 3


def field(x, t):
    return torch.sin(3 * x) + t


def drawn(call):
    torch.manual_seed(3)
    return call()


def run(project, **names):
    """Runs the line with what its user has; returns all names after it."""
    exec(LINES[project], names)
    return names


@pytest.fixture(params=alpamayo_packages.PACKAGES)
def published_sampler(request, monkeypatch):
    return alpamayo_packages.install(request.param, monkeypatch).FlowMatching(x_dims=X_DIMS)


def test_alpamayo_by_configuration(published_sampler):
    module, _, name = LINES["Alpamayo R1, 1.5, 2: configuration"].removeprefix("_target_: ").rpartition(".")
    ours = getattr(importlib.import_module(module), name)(x_dims=X_DIMS)
    got, wanted = (drawn(lambda s=s: s.sample(BATCH, field)) for s in (ours, published_sampler))
    assert_same_bits(got, wanted)


def test_alpamayo_by_a_loaded_model(published_sampler):
    wanted = drawn(lambda: published_sampler.sample(BATCH, field))
    model = torch.nn.Module()
    model.diffusion = published_sampler
    run("Alpamayo R1, 1.5, 2: a loaded model", model=model)
    assert model.diffusion is not published_sampler
    assert_same_bits(drawn(lambda: model.diffusion.sample(BATCH, field)), wanted)


def denoised(scheduler, x):
    """As a pipeline calls it."""
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        x = scheduler.step(field(x, t / 1000), t, x, return_dict=False)[0]
    return x


def test_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="the oracle is diffusers itself, of the test extra")
    pipe, x = types.SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)), torch.randn(2, 5)
    wanted = denoised(pipe.scheduler, x)
    second = "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
    assert f"With diffusers, `{second}` follows" in README
    names = run("diffusers: SD3, Flux and others", pipe=pipe)
    exec(second, names)
    assert type(pipe.scheduler) is names["FlowMatchEulerDiscreteScheduler"]
    assert_same_bits(denoised(pipe.scheduler, x), wanted)


def test_diffusers_with_another_solver():
    """diffusers has no ab2 for flow matching: the bits of sample() on its sigmas."""
    diffusers = pytest.importorskip("diffusers", reason="the scheduler is a subclass of diffusers'")
    from flowmatch_kernels.integrations.diffusers import FlowMatchSolverScheduler

    pipe, x = types.SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)), torch.randn(2, 5)
    pipe.scheduler.set_timesteps(10)
    sigmas = pipe.scheduler.sigmas
    run("diffusers, another solver than Euler", pipe=pipe, FlowMatchSolverScheduler=FlowMatchSolverScheduler)
    wanted = FlowMatching(5, "ab2", noise_at=1).sample(
        2, lambda x, t: field(x, t * 1000 / 1000), noise=x, time_steps=sigmas
    )
    assert_same_bits(denoised(pipe.scheduler, x), wanted)


def test_diffusers_wan():
    """Within 4 + N eps of the largest entry: theirs is some 20 roundings a step, ours one row."""
    diffusers = pytest.importorskip("diffusers", reason="the oracle is diffusers itself, of the test extra")
    from flowmatch_kernels.integrations.diffusers import FlowMatchSolverScheduler

    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    )
    pipe, x = types.SimpleNamespace(scheduler=scheduler), torch.randn(2, 5)
    wanted = denoised(pipe.scheduler, x)
    run("diffusers: Wan, with UniPC", pipe=pipe, FlowMatchSolverScheduler=FlowMatchSolverScheduler)
    error = (denoised(pipe.scheduler, x) - wanted).abs().max() / wanted.abs().max()
    assert float(error) <= (4 + 10) * torch.finfo(torch.float32).eps


def test_lerobot(lerobot_module):  # noqa: F811
    name, noise = "lerobot.policies.pi0.modeling_pi0", torch.randn(2, 50, 32)
    policy = importlib.import_module(name)
    theirs = policy.euler_integrate
    wanted = theirs(policy_field, noise, 10)
    lerobot = run("lerobot: pi0, pi05, smolvla, eo1")["lerobot"]
    try:
        assert policy.euler_integrate is lerobot.euler_integrate
        assert_same_bits(policy.euler_integrate(policy_field, noise, 10), wanted)
    finally:
        policy.euler_integrate = lerobot_module.euler_integrate = theirs


def test_openpi_policy(monkeypatch):
    policy, noise = test_openpi.Policy(test_openpi.Model()), torch.randn(2, 5, 4)
    monkeypatch.setitem(openpi.KNOWN, replacement.fingerprint(test_openpi.Model.sample_actions), "the stand-in")
    wanted = policy.infer(test_openpi.OBSERVATION, noise=noise)
    run("openpi: pi0, pi0.5 in PyTorch", policy=policy)
    assert "sample_actions" in vars(policy._model)
    assert_same_bits(policy.infer(test_openpi.OBSERVATION, noise=noise), wanted)


def test_gr00t_policy(monkeypatch):
    head = gr00t_loop.N1d7(torch.float32)
    key = replacement.fingerprint(gr00t_loop.N1d7.get_action_with_features)
    monkeypatch.setitem(gr00t.KNOWN, key, ("the stand-in", gr00t._n1d7))
    given = test_gr00t.given(head, torch.float32, chunked=True)
    wanted = drawn(lambda: head.get_action_with_features(**given))["action_pred"]
    run("Isaac GR00T N1.6, N1.7", policy=types.SimpleNamespace(model=types.SimpleNamespace(action_head=head)))
    assert "get_action_with_features" in vars(head)
    assert_same_bits(drawn(lambda: head.get_action_with_features(**given))["action_pred"], wanted)


def test_torchdiffeq():
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="the oracle is torchdiffeq itself, of the test extra")
    odeint, x, t = run("torchdiffeq: fixed steps")["odeint"], torch.randn(2, 5), torch.linspace(0, 1, 6)
    assert odeint is not torchdiffeq.odeint
    for method in ("euler", "midpoint", "rk4"):
        got, wanted = (f(lambda t, y: field(y, t), x, t, method=method) for f in (odeint, torchdiffeq.odeint))
        assert_same_bits(got, wanted)


def test_flow_matching():
    theirs = pytest.importorskip("flow_matching.solver", reason="the oracle is flow_matching itself")
    ours, x = run("flow_matching")["ODESolver"], torch.randn(2, 5)
    assert ours is not theirs.ODESolver
    got, wanted = (kind(velocity_model=field).sample(x, 0.1) for kind in (ours, theirs.ODESolver))
    assert_same_bits(got, wanted)


def test_ray_data():
    """Ray itself: test_ray.py."""

    class Dataset:
        def map_batches(self, kind, fn_constructor_args, fn_constructor_kwargs, concurrency):
            return kind(*fn_constructor_args, **fn_constructor_kwargs)({"id": torch.arange(BATCH).numpy()})

    fm = FlowMatching(X_DIMS)
    got = run("Ray Data: jobs of millions of samples", ds=Dataset(), load=lambda: (fm, field))["ds"]["sample"]
    assert_same_bits(torch.from_numpy(got), fm.sample(BATCH, field, noise=KeyedNoise(0)))


def test_your_own_loop():
    names = {"x_dims": X_DIMS, "batch_size": BATCH, "step_fn": field, "FlowMatching": FlowMatching}
    got = drawn(lambda: run("your own loop", **names))["x"]
    assert_same_bits(got, drawn(lambda: published.sample(BATCH, field, X_DIMS, 10)))


def test_every_line_is_run():
    run_here = set(re.findall(r'(?:LINES\[|run\()"(.+?)"', Path(__file__).read_text()))
    assert len(LINES) == 12 and run_here == set(LINES)
