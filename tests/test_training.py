"""The training pair and the loss equal upstream's in bits, and in the draws they take from the generators."""

import published
import pytest
import torch
from operands import assert_same_bits

from flowmatch_kernels import FlowMatching

SHAPES = [(1, 2), (6, 64, 2), (0, 3), (64, 3, 5, 2), (5, 2, 3, 1, 4), (7,)]


def pair(shape, sampler, keywords=None, dtype=torch.float32, seed=0, rate=None):
    results = []
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = FlowMatching(shape[1:] or 1, train_timestep_sampler=sampler, **(keywords or {}))
    for side in (ours, published.Training(sampler, rate)):
        torch.manual_seed(seed)
        data = side.construct_training_data(x)
        results.append((side, data, torch.get_rng_state()))
    return x, *results


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("drop", [False, True], ids=["all conditions", "dropped conditions"])
@pytest.mark.parametrize("sampler", ["beta", "uniform"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_pair(shape, sampler, drop, guided, default):
    """Guidance alone draws nothing: what is dropped is drawn where it is asked for."""
    torch.set_default_dtype(default)
    keywords = {"use_classifier_free_guidance": guided, "train_ignore_guidance_rate": 0.4}
    if drop:
        keywords["train_drop_guidance"] = True
    for seed, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16)):
        x, (_, got, got_state), (_, wanted, wanted_state) = pair(
            shape, sampler, keywords, dtype, seed, 0.4 if drop else None
        )
        assert torch.equal(got_state, wanted_state), "other draws than upstream's"
        assert list(got) == ["x", "noisy_x", "timesteps", "noise", "is_drop_guidance"]
        assert got["x"] is x
        for key in ("noisy_x", "timesteps", "noise"):
            assert_same_bits(got[key], wanted[key], key)
        if drop:
            assert got["is_drop_guidance"].dtype == torch.bool
            assert torch.equal(got["is_drop_guidance"], wanted["is_drop_guidance"])
        else:
            assert got["is_drop_guidance"] is None


@pytest.mark.parametrize("sampler", ["beta", "uniform"])
@pytest.mark.parametrize("prediction", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_loss(sampler, prediction):
    for shape in ((1, 2), (6, 64, 2), (64, 3, 5, 2)):
        _, (ours, got, _), (theirs, wanted, _) = pair(shape, sampler)
        pred = torch.randn(shape, dtype=prediction)
        losses, gradients = [], []
        for side, data in ((ours, got), (theirs, wanted)):
            leaf = pred.clone().requires_grad_()
            loss = side.compute_loss_from_pred(data, leaf)
            losses.append(loss.detach())
            gradients.append(torch.autograd.grad(loss, leaf)[0])
        assert_same_bits(losses[0], losses[1])
        assert_same_bits(gradients[0], gradients[1])


def test_timesteps_are_where_they_belong():
    """Beta(1.5, 1), turned round: from 0 to 0.999, and denser near the noise; uniform: evenly over [0, 1)."""
    x = torch.zeros(20_000, 1)
    beta = FlowMatching(1).construct_training_data(x)["timesteps"]
    assert beta.shape == (20_000, 1)
    assert 0 <= beta.min()
    assert beta.max() <= 0.999
    assert abs(beta.mean().item() - 0.999 * 0.4) < 0.01
    uniform = FlowMatching(1, train_timestep_sampler="uniform").construct_training_data(x)["timesteps"]
    assert abs(uniform.mean().item() - 0.5) < 0.01


#: The share of times below t, by the closed form of each sampler's density.
CUMULATIVE = {
    "beta": lambda t: 1 - ((0.999 - t) / 0.999).clamp(0, 1) ** 1.5,
    "uniform": lambda t: t,
    "logit_normal": lambda t: torch.special.ndtr(torch.logit(t)),
    "cosine": lambda t: 0.5 + torch.atan(2 * t - 1) / (torch.pi / 2),
}


@pytest.mark.parametrize("sampler", list(CUMULATIVE))
def test_density_of_the_times(sampler):
    """The empirical distribution of 100,000 times is within the Kolmogorov-Smirnov bound for one in a million."""
    x = torch.zeros(100_000, 1)
    t = FlowMatching(1, train_timestep_sampler=sampler).construct_training_data(x)["timesteps"]
    assert t.shape == (100_000, 1)
    assert t.dtype == torch.float32
    assert t.min() >= 0
    assert t.max() <= 1
    found = t.flatten().double().sort().values
    share = torch.arange(1, 100_001, dtype=torch.float64) / 100_000
    assert (CUMULATIVE[sampler](found) - share).abs().max() < 2.7 / 100_000**0.5


@pytest.mark.parametrize("sampler", ["logit_normal", "cosine"])
def test_sd3_times(sampler):
    """By the formulas, of one draw before the noise's; the rest of the pair as ever."""
    x = torch.randn(6, 4, 2)
    torch.manual_seed(0)
    data = FlowMatching((4, 2), train_timestep_sampler=sampler).construct_training_data(x)
    torch.manual_seed(0)
    cosine = sampler == "cosine"
    t = 1 - 1 / (torch.tan(torch.pi / 2 * torch.rand(6)) + 1) if cosine else torch.sigmoid(torch.randn(6))
    t, noise = t.view(6, 1, 1), torch.randn_like(x)
    assert_same_bits(data["timesteps"], t)
    assert_same_bits(data["noise"], noise)
    assert_same_bits(data["noisy_x"], t * x + (1 - t) * noise)


def test_cosine_at_the_ends(monkeypatch):
    """The largest float32 below 1, where tan is negative, and 0."""
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor([0.0, 1 - 2**-24, 1 - 2**-23]))
    t = FlowMatching(1, train_timestep_sampler="cosine").construct_training_data(torch.zeros(3, 1))["timesteps"]
    assert t[0] == 0
    assert (t <= 1).all()
    assert (t[1:] > 0.999999).all()


def test_unknown_sampler_of_times():
    with pytest.raises(ValueError, match=r"one of 'beta', 'uniform', 'logit_normal', 'cosine', got 'mode'"):
        FlowMatching(1, train_timestep_sampler="mode")
    fm = FlowMatching(1)
    fm.train_timestep_sampler = "mode"
    with pytest.raises(ValueError, match=r"got 'mode'"):
        fm.construct_training_data(torch.zeros(3, 1))


def test_ends_of_the_path(monkeypatch):
    """At t = 1 the pair is the data, at t = 0 the noise."""
    fm = FlowMatching((3, 2), train_timestep_sampler="uniform")
    x = torch.randn(4, 3, 2)
    for value, key in ((0.0, "noise"), (1.0, "x")):
        monkeypatch.setattr(torch, "rand", lambda *a, value=value, **k: torch.full(a[0], value))
        data = fm.construct_training_data(x)
        assert torch.equal(data["noisy_x"], data[key])


@pytest.mark.parametrize("rate", [0.0, 1.0, 0.3])
def test_rate_of_dropped_guidance(rate):
    fm = FlowMatching(1, train_drop_guidance=True, train_ignore_guidance_rate=rate)
    dropped = fm.construct_training_data(torch.zeros(10_000, 1))["is_drop_guidance"]
    assert abs(dropped.float().mean().item() - rate) < 0.02


def test_gradient_flows_through_the_pair():
    x = torch.randn(4, 3, 2, requires_grad=True)
    fm = FlowMatching((3, 2))
    data = fm.construct_training_data(x)
    fm.compute_loss_from_pred(data, data["noisy_x"]).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_prediction_of_another_shape():
    fm = FlowMatching((3, 2))
    data = fm.construct_training_data(torch.randn(4, 3, 2))
    with pytest.raises(ValueError, match=r"\[4, 3, 2\].*\[4, 3, 1\]"):
        fm.compute_loss_from_pred(data, torch.randn(4, 3, 1))


def test_learns():
    """Trained on one point, the sampler goes there: the signs of pair, loss and loop agree."""
    point = torch.tensor([1.5, -0.5])
    fm = FlowMatching(2, num_inference_steps=20)
    data = fm.construct_training_data(point.expand(256, 2))
    exact = (point - data["noisy_x"]) / (1 - data["timesteps"])
    assert fm.compute_loss_from_pred(data, exact) < 1e-4
    x = fm.sample(100, lambda x, t: (point - x) / (1 - t))
    torch.testing.assert_close(x, point.expand(100, 2), rtol=0, atol=1e-5)  # twenty float32 roundings
