"""DDIM and DDPM, against diffusers' schedulers with the same settings, and against each other."""

import importlib
import inspect
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flowmatch_kernels import DDIM, DDPM, KeyedNoise, StepFunction, diffusion, solvers
from flowmatch_kernels.solvers import table_for

EXACT = {"rtol": 0, "atol": 0}
DIMS, BATCH = (5, 3), 4
PREDICTED = {"noise": "epsilon", "data": "sample", "v": "v_prediction"}


def step_fn(x, t):
    return 0.7 * torch.tanh(x) + 1e-4 * t


def draws(steps):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, *DIMS, generator=generator), torch.randn(BATCH, steps, *DIMS, generator=generator)


def theirs(scheduler, steps, noise, z, **step):
    scheduler.set_timesteps(steps)
    x, states = noise, [noise]
    for k, t in enumerate(scheduler.timesteps):
        prediction = step_fn(x, torch.full((BATCH, 1, 1), float(t)))
        x = scheduler.step(
            prediction, t, x, **{name: z[:, k] if value is None else value for name, value in step.items()}
        )
        x = x.prev_sample
        states.append(x)
    return torch.stack(states, 1)


def settings(schedule, spacing, predicted, offset):
    ours = {
        "beta_schedule": schedule,
        "timestep_spacing": spacing,
        "prediction_type": predicted,
        "steps_offset": offset,
    }
    other = dict(ours)
    other["prediction_type"] = PREDICTED[predicted]
    if schedule == "cosine":
        other["beta_schedule"] = "squaredcos_cap_v2"
    return ours, other | {"clip_sample": False}


GRID = [
    *itertools.product(("linear", "scaled_linear", "cosine"), ("trailing",), ("noise", "v"), (0,), (10,)),
    *itertools.product(("linear",), ("leading", "trailing", "linspace"), PREDICTED, (0,), (7, 50)),
    ("scaled_linear", "leading", "noise", 1, 20),
]


CLIPPED = [setting for setting in GRID if setting[-1] < 50]


def clipping(most):
    """Ours, and theirs."""
    return {"clip_sample_range": most}, {"clip_sample": most is not None, "clip_sample_range": most or 1.0}


def close(found, wanted):
    """A whole run within 5e-5 of the largest state: theirs computes its factors in float32."""
    assert (found - wanted).abs().max() <= 5e-5 * wanted.abs().max()


def test_ddim_is_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    cases = [
        *itertools.product(GRID, (0.0, 0.6), (True, False), (None,)),
        *itertools.product(CLIPPED, (0.6,), (True,), (0.5,)),
        *itertools.product(CLIPPED, (0.0,), (False,), (0.5,)),  # "leading": the last step does not move
    ]
    for (*setting, steps), eta, one, most in cases:
        ours, other = (a | b for a, b in zip(settings(*setting), clipping(most), strict=True))
        noise, z = draws(steps)
        scheduler = diffusers.DDIMScheduler(set_alpha_to_one=one, **other)
        wanted = theirs(scheduler, steps, noise, z, eta=eta, **({"variance_noise": None} if eta else {}))
        ddim = DDIM(DIMS, steps, eta=eta, set_alpha_to_one=one, **ours)
        given = {"step_noise": z} if eta else {}
        found, times = ddim.sample(BATCH, step_fn, noise=noise, return_all_steps=True, **given)
        assert times.tolist() == [*scheduler.timesteps.tolist(), -1], setting
        close(found, wanted)
        if most is not None and one:
            ddim.clip_sample_range = None
            assert (ddim.sample(BATCH, step_fn, noise=noise, **given) - found[:, -1]).abs().max() > 0.01, setting


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_ddim_is_diffusers_in_float64(schedule):
    """With eta = 1 too. With the cosine schedule theirs in float32 was seen to be off by 5e-4 there."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    for spacing, predicted, steps in itertools.product(("leading", "trailing", "linspace"), PREDICTED, (5, 20, 50)):
        ours, other = settings(schedule, spacing, predicted, 0)
        noise, z = (x.double() for x in draws(steps))
        ddim = DDIM(DIMS, steps, eta=1.0, **ours)
        scheduler = diffusers.DDIMScheduler(**other)
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = ddim.alphas_cumprod, torch.ones((), dtype=noise.dtype)
        wanted = theirs(scheduler, steps, noise, z, eta=1.0, variance_noise=None)
        found = ddim.sample(BATCH, step_fn, noise=noise, step_noise=z)
        # Up to 50 steps of a dozen float64 roundings, 1e-13, whose factors 1/sqrt(abar) reach 2e4 with the cosine
        # schedule and grow what is rounded before; 9e-14 was seen.
        assert (found - wanted[:, -1]).abs().max() <= 1e-10 * wanted.abs().max(), (spacing, predicted, steps)


def test_ddpm_is_diffusers(monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    module = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    cases = [
        *itertools.product(GRID, ("fixed_small", "fixed_large"), (None,)),
        *itertools.product(CLIPPED, ("fixed_small",), (0.5,)),
    ]
    for (*setting, steps), variance, most in cases:
        ours, other = (a | b for a, b in zip(settings(*setting), clipping(most), strict=True))
        noise, z = draws(steps)
        drawn = iter(z.unbind(1))
        monkeypatch.setattr(module, "randn_tensor", lambda *args, drawn=drawn, **kwargs: next(drawn))
        wanted = theirs(diffusers.DDPMScheduler(variance_type=variance, **other), steps, noise, z)
        found = DDPM(DIMS, steps, variance_type=variance, **ours).sample(BATCH, step_fn, noise=noise, step_noise=z)
        close(found, wanted[:, -1])


def test_ways_to_sample():
    """Backends, keys, models that take the number of the step, 16 bits, one sample alone, gradients, hooks."""
    clipped, ones = DDPM(DIMS, 6, clip_sample_range=2.0), [1] * len(DIMS)
    for made in (DDIM(DIMS, 6), DDIM(DIMS, 6, eta=1.0), DDPM(DIMS, 6), clipped):
        states, times = made.sample(BATCH, step_fn, noise=KeyedNoise(5), return_all_steps=True)
        assert states.shape == (BATCH, 7, *DIMS) and times.shape == (7,)
        made.backend = "reference"
        other = made.sample(BATCH, step_fn, noise=KeyedNoise(5))
        torch.testing.assert_close(other, states[:, -1], **EXACT)
        made.backend = "auto"
        alone = made.sample(1, step_fn, noise=KeyedNoise(5, first=2))
        torch.testing.assert_close(alone, states[2:3, -1], **EXACT)
        taken = []
        by_number = StepFunction(
            lambda x, t, step, taken=taken: taken.append((step, t.tolist())) or step_fn(x, t.view(-1, *ones)),
            time_as="batch",
            time_dtype=torch.int64,
        )
        torch.testing.assert_close(made.sample(BATCH, by_number, noise=KeyedNoise(5)), other, **EXACT)
        assert taken == [(k, [int(t)] * BATCH) for k, t in enumerate(times[:-1])]
        w = torch.ones((), requires_grad=True)
        for backend in ("reference", "auto"):
            made.backend = backend
            assert not made.sample(BATCH, lambda x, t, w=w: w * step_fn(x, t), noise=KeyedNoise(5)).requires_grad
        derived = made.sample(BATCH, lambda x, t, w=w: w * step_fn(x, t), noise=KeyedNoise(5), differentiable=True)
        torch.testing.assert_close(derived.detach(), states[:, -1], **EXACT)
        assert torch.autograd.grad(derived.sum(), w)[0].abs() > 1e-3
        half = made.sample(BATCH, lambda x, t: step_fn(x, t).bfloat16(), noise=KeyedNoise(5), dtype=torch.bfloat16)
        assert half.dtype is torch.bfloat16
        error = (half - states[:, -1]).abs().max() / states[:, -1].abs().max()
        assert error < 6 * 2**-8, error  # six steps, each of which rounds to 8 bits
        seen = []
        limited = made.sample(
            *(BATCH, step_fn),
            noise=KeyedNoise(5),
            constraint=lambda x, t: x.clamp(-0.5, 0.5),
            callback=lambda step, t, x, seen=seen: seen.append(x) or step == 2,
        )
        assert limited.stopped and len(seen) == 3 and limited.x.abs().max() <= 0.5
        assert limited.time_steps.tolist() == times[:4].tolist()
    torch.manual_seed(4)
    drawn = DDPM(DIMS, 6).sample(BATCH, step_fn)
    torch.manual_seed(4)
    noise = torch.randn(BATCH, *DIMS)
    z = torch.stack([*(torch.randn(BATCH, *DIMS) for _ in range(5)), torch.zeros(BATCH, *DIMS)], 1)
    torch.testing.assert_close(drawn, DDPM(DIMS, 6).sample(BATCH, step_fn, noise=noise, step_noise=z), **EXACT)


CHANGES = {
    "num_train_timesteps": 900,
    "beta_start": 2e-4,
    "beta_end": 0.03,
    "beta_schedule": "cosine",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "prediction_type": "v",
    "clip_sample_range": 0.1,
}


@pytest.mark.parametrize("kind", [DDIM, DDPM])
def test_a_table_is_kept_for_what_it_is_made_of(kind):
    """Another one for each argument of the constructor, number of steps, dtype and default dtype."""
    own = {"eta": 0.5, "set_alpha_to_one": False} if kind is DDIM else {"variance_type": "fixed_large"}
    arguments = [{}, *({name: value} for name, value in (CHANGES | own).items())]
    assert {"x_dims", "num_inference_steps", "backend", *CHANGES, *own} == set(inspect.signature(kind).parameters)
    made = {}
    for given in arguments:
        for steps, dtype, default in (
            (3, torch.float32, torch.float32),
            (4, torch.float32, torch.float32),
            (3, torch.float64, torch.float32),
            (3, torch.float32, torch.float64),
        ):
            torch.set_default_dtype(default)
            request = diffusion._Request(kind(DIMS, steps, **given), steps, dtype, torch.device("cpu"))
            table = table_for(request, cached=True)
            fresh = request.make()
            for name in ("coefficients", "times"):
                torch.testing.assert_close(getattr(table, name), getattr(fresh, name), **EXACT)
            assert table.evaluations == fresh.evaluations
            assert table_for(request, cached=True) is table
            assert made.setdefault(id(table), (given, steps, dtype, default)) == (given, steps, dtype, default)


def test_a_table_follows_its_sampler():
    """What is changed afterwards, by attribute, in the memory of alphas_cumprod, or by another `timesteps`."""

    class Own(DDIM):
        at = None

        def timesteps(self, steps):
            return self.at or super().timesteps(steps)

    ddim, x, before = Own(DIMS, 4), torch.ones(BATCH, *DIMS), None
    for change in (
        lambda: None,
        lambda: setattr(ddim, "eta", torch.tensor(0.5)),
        lambda: ddim.eta.fill_(0.9),
        lambda: setattr(ddim, "clip_sample_range", 0.1),
        lambda: setattr(ddim, "prediction_type", "v"),
        lambda: setattr(ddim, "at", [900, 300, 200, 100]),
        lambda: ddim.alphas_cumprod.mul_(0.9),
        lambda: ddim.alphas_cumprod.data.mul_(0.9),
        lambda: setattr(ddim, "alphas_cumprod", ddim.alphas_cumprod * 0.9),
    ):
        change()
        found = ddim.sample(BATCH, step_fn, noise=KeyedNoise(1))
        assert before is None or not torch.equal(found, before)
        solvers.cache.clear()
        torch.testing.assert_close(ddim.sample(BATCH, step_fn, noise=KeyedNoise(1)), found, **EXACT)
        before = found
    with FakeTensorMode():
        assert ddim.sample(BATCH, step_fn, noise=torch.empty(BATCH, *DIMS)).shape == (BATCH, *DIMS)
    assert ddim.sample(BATCH, step_fn, noise=x).isfinite().all()
    with torch.inference_mode():
        ddim = DDIM(DIMS, 4)
    request = diffusion._Request(ddim, 4, torch.float32, torch.device("cpu"))
    assert table_for(request, cached=True) is table_for(request, cached=True)


def test_no_zero_in_silence():
    """A derivative that was not asked for raises, as FlowMatching's."""
    made, x = DDIM(DIMS, 3), torch.ones(BATCH, *DIMS)

    def loss(w, **options):
        return made.sample(BATCH, lambda x, t: w * step_fn(x, t), noise=x, **options).sum()

    w = torch.tensor(0.5)
    for derivative in (
        lambda: torch.func.grad(loss)(w),
        lambda: torch.func.jvp(loss, (w,), (w,)),
        lambda: made.sample(BATCH, step_fn, noise=x.clone().requires_grad_()),
    ):
        with pytest.raises(ValueError, match="differentiable=True"):
            derivative()
    assert torch.func.grad(lambda w: loss(w, differentiable=True))(w) != 0
    assert torch.func.grad(lambda w: loss(w, differentiable=False))(w) == 0


def test_training_pairs():
    """On the line between data and noise, as diffusers makes them; the exact prediction has no loss."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    x = torch.randn(200, *DIMS, generator=torch.Generator().manual_seed(2))
    for schedule, (predicted, theirs_) in itertools.product(("linear", "cosine"), PREDICTED.items()):
        ours, other = settings(schedule, "leading", predicted, 0)
        scheduler = diffusers.DDPMScheduler(**other)
        made = DDPM(DIMS, **ours)
        torch.manual_seed(6)
        pair = made.construct_training_data(x)
        torch.manual_seed(6)
        t = torch.randint(1000, (200,))
        noise = torch.randn_like(x)
        assert torch.equal(pair["timesteps"], t.float().view(-1, 1, 1)) and torch.equal(pair["noise"], noise)
        # Theirs takes abar and 1 - abar, which loses its digits, in float32.
        torch.testing.assert_close(pair["noisy_x"], scheduler.add_noise(x, noise, t), rtol=0, atol=2e-5)
        wanted = {"epsilon": noise, "sample": x, "v_prediction": scheduler.get_velocity(x, noise, t)}[theirs_]
        torch.testing.assert_close(pair["target"], wanted, rtol=0, atol=2e-5)
        assert made.compute_loss_from_pred(pair, pair["target"]) == 0
        off = made.compute_loss_from_pred(pair, pair["target"] + 0.5)
        assert off.item() == pytest.approx(0.25, rel=1e-5)  # the target's entries round after + 0.5


ERRORS = [
    (lambda: DDIM(3, beta_schedule="x"), ValueError, "beta_schedule must be 'linear'"),
    (lambda: DDIM(3, timestep_spacing="x"), ValueError, "timestep_spacing"),
    (lambda: DDIM(3, prediction_type="velocity"), ValueError, "prediction_type"),
    (lambda: DDPM(3, variance_type="learned"), ValueError, "variance_type"),
    (lambda: DDIM(3, eta=1.5), ValueError, "eta must be between 0 and 1"),
    (lambda: DDIM(3, beta_start=0.5, beta_end=0.1), ValueError, "beta_start <= beta_end"),
    (lambda: DDIM(3, 1001), ValueError, "num_inference_steps must be in"),
    (lambda: DDIM(3, 0), ValueError, "num_inference_steps must be in"),
    (lambda: DDIM(3, num_train_timesteps=1), ValueError, "at least 2"),
    (lambda: DDIM(3, 1000, steps_offset=1), ValueError, "steps_offset 1 leads to the timestep 1000"),
    (lambda: DDIM(3).sample(2, None), TypeError, "step_fn must be callable"),
    (lambda: DDIM(3).sample(2, step_fn, inference_step=2000), ValueError, "inference_step must be in"),
    (lambda: DDIM(3).sample(2, step_fn, step_noise=KeyedNoise(1)), ValueError, "eta > 0"),
    (lambda: DDIM(3).sample(2, step_fn, noise=torch.zeros(3, 3)), ValueError, "noise must be"),
    (lambda: DDIM(3).sample(2, lambda x, t: x.double()), TypeError, "would widen"),
    (lambda: DDIM(3, clip_sample_range=0), ValueError, "clip_sample_range must be above 0, got 0"),
    (lambda: DDPM(3, clip_sample_range="x"), TypeError, "clip_sample_range"),
    (lambda: DDIM(3, clip_sample_range=1).sample(2, lambda x, t: x.double()), TypeError, "would widen"),
    (lambda: DDIM(3, clip_sample_range=1).sample(2, lambda x, t: None), TypeError, "step_fn returned None"),
    (lambda: DDIM(3).construct_training_data([1.0]), TypeError, "x must be a floating-point tensor"),
    (lambda: DDIM(3).compute_loss_from_pred({"target": torch.ones(2, 3)}, torch.ones(3)), ValueError, "pred must have"),
    (lambda: DDPM(3).sample(2, step_fn, constraint=1), TypeError, "constraint must be callable"),
]


def test_errors():
    for call, error, message in ERRORS:
        with pytest.raises(error, match=message):
            call()
