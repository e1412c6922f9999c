"""Solvers that add noise, and the log-probability of their steps."""

import itertools
import math

import pytest
import torch

from flowmatch_kernels import FlowMatching, KeyedNoise
from flowmatch_kernels.solvers import STOCHASTIC

EXACT = {"rtol": 0, "atol": 0}
DIMS, BATCH, STEPS = (5, 3), 4, 6
ETA = {"sde": 0.7, "cps": 0.6, "dance": 0.3, "renoise": None}


def options(name):
    return {} if ETA[name] is None else {"eta": ETA[name]}


def sampler(name, noise_at=0, **more):
    return FlowMatching(DIMS, name, STEPS, int_method_options=options(name), noise_at=noise_at, **more)


def step_fn(x, t):
    return (torch.sin(3 * t) - 0.5 * x).to(x.dtype)


def mean_and_std(name, x, v, sigma, after, second):
    """One step as the papers write it: v = noise - data, sigma the distance in time from the data."""
    eta, d = ETA[name], after - sigma
    data, noise = x - sigma * v, x + (1 - sigma) * v
    if name == "sde":
        s = eta * math.sqrt(sigma / (1 - (second if sigma == 1 else sigma)))
        mean = x * (1 + s**2 / (2 * sigma) * d) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * d
        return mean, s * math.sqrt(-d)
    if name == "dance":
        score = -(x - (1 - sigma) * data) / sigma**2
        return x + d * v - eta**2 / 2 * score * d, eta * math.sqrt(-d)
    if name == "cps":
        std = after * math.sin(eta * math.pi / 2)
        return (1 - after) * data + math.sqrt(after**2 - std**2) * noise, std
    return (1 - after) * data, after


def published(name, noise, z, grid, noise_at):
    """The whole run, in noise's dtype."""
    sigmas = [abs(1 - noise_at - t) for t in grid]
    x, states, log_probs = noise, [noise], []
    for k in range(len(grid) - 1):
        t = torch.full((len(x), 1, 1), grid[k], dtype=x.dtype)
        v = step_fn(x, t) if noise_at else -step_fn(x, t)
        mean, std = mean_and_std(name, x, v, sigmas[k], sigmas[k + 1], sigmas[1])
        x = mean + std * z[:, k]
        states.append(x)
        if std:
            log_prob = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
            log_probs.append(log_prob.mean(dim=(1, 2)))
    return torch.stack(states, 1), log_probs


def drawn(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, *DIMS, dtype=dtype, generator=generator), torch.randn(
        BATCH, STEPS, *DIMS, dtype=dtype, generator=generator
    )


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_steps_are_the_papers(name):
    # float32: some 40 roundings of states of size 4, and of coefficients. float64 first with times of float32, which
    # bound it; then with its own: some 100 roundings.
    for noise_at, dtype, backend in itertools.product((0, 1), (torch.float64, torch.float32), ("auto", "reference")):
        noise, z = drawn(dtype)
        fm = sampler(name, noise_at, backend=backend)
        x, grid = fm.sample(BATCH, step_fn, noise=noise, step_noise=z, return_all_steps=True)
        wanted, _ = published(name, noise.double(), z.double(), grid.double().tolist(), noise_at)
        bound = 4 * 40 * torch.finfo(torch.float32).eps if dtype is torch.float32 else 4e-6
        torch.testing.assert_close(x.double(), wanted, rtol=0, atol=bound)
    noise, z = drawn()
    grid = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    x = sampler(name).sample(BATCH, step_fn, noise=noise, step_noise=z, time_steps=grid)
    wanted, _ = published(name, noise, z, grid.tolist(), 0)
    torch.testing.assert_close(x, wanted[:, -1], rtol=0, atol=100 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_each_step_is_within_8_ulp_of_eager_float32(name):
    """Of the largest of x, v, the noise and the next state: eager PyTorch rounds each term of the expression."""
    largest = 0.0
    for noise_at, seed in itertools.product((0, 1), range(20)):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(BATCH, *DIMS, generator=generator)
        z = torch.randn(BATCH, STEPS, *DIMS, generator=generator)
        times = torch.rand(STEPS + 1, generator=generator, dtype=torch.float64).sort(descending=bool(noise_at)).values
        times = times * 0.98 + 0.01
        states, grid = sampler(name, noise_at).sample(
            BATCH, step_fn, noise=noise, step_noise=z, time_steps=times, return_all_steps=True
        )
        sigmas = [abs(1 - noise_at - t) for t in grid.tolist()]
        for k in range(STEPS):
            x, v = states[:, k], step_fn(states[:, k], grid[k])
            mean, std = mean_and_std(name, x, v if noise_at else -v, sigmas[k], sigmas[k + 1], sigmas[1])
            after = mean + std * z[:, k]
            scale = torch.stack([x, v, std * z[:, k], after]).abs().amax(0)
            ulp = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(scale))
            largest = max(largest, ((states[:, k + 1] - after).abs() / ulp).max().item())
    assert 0 < largest <= 8, largest  # some six roundings of eager's, and three of ours


def test_without_noise_sde_is_euler():
    for dtype, noise_at in itertools.product((torch.float64, torch.float32, torch.bfloat16), (0, 1)):
        noise, _ = drawn(dtype)
        given = {"noise": noise, "return_all_steps": True}
        wanted = FlowMatching(DIMS, "euler", STEPS, noise_at=noise_at).sample(BATCH, step_fn, **given)
        for name in ("sde", "dance"):
            fm = FlowMatching(DIMS, name, STEPS, noise_at=noise_at, int_method_options={"eta": 0})
            torch.testing.assert_close(fm.sample(BATCH, step_fn, **given), wanted, **EXACT)


@pytest.mark.parametrize("name", ["sde", "dance"])
def test_marginals(name):
    """A mixture of two normals and its exact velocity: the samples have its distribution, in every step count tried."""
    means, spread, weights = torch.tensor([-1.5, 1.0]), 0.3, torch.tensor([0.3, 0.7])

    def velocity(x, t):
        variance = t**2 * spread**2 + (1 - t) ** 2
        log = torch.log(weights) - (x - t * means) ** 2 / (2 * variance)
        share = torch.softmax(log, dim=-1)
        centre = x - t * means
        data = means + t * spread**2 / variance * centre
        noise = (1 - t) / variance * centre
        return (share * (data - noise)).sum(-1, keepdim=True)

    count = 40000
    fm = FlowMatching(1, name, 200, int_method_options=options(name))
    x = fm.sample(count, velocity, noise=KeyedNoise(5)).flatten().double().sort().values
    cdf = sum(w * torch.special.ndtr((x - m) / spread) for w, m in zip(weights.double(), means.double(), strict=True))
    distance = (cdf - torch.arange(count) / count).abs().max().item()
    # Kolmogorov's 1e-4 quantile is 2.2/sqrt(count) = 0.011; beside it the error of 200 steps of order 1 (of euler
    # without noise: 0.004). Without the noise term, or with a wrong sign of the score's, it is above 0.04.
    assert distance < 0.02, distance


def test_where_the_noise_comes_from():
    fm = sampler("sde")
    # torch's draws, in this order: the start, then a step after each evaluation.
    for generator in (None, 11):
        torch.manual_seed(9)
        found = fm.sample(
            BATCH, step_fn, generator=None if generator is None else torch.Generator().manual_seed(generator)
        )
        torch.manual_seed(9)
        own = None if generator is None else torch.Generator().manual_seed(generator)
        noise = torch.randn(BATCH, *DIMS, generator=own)
        z = torch.stack([torch.randn(BATCH, *DIMS, generator=own) for _ in range(STEPS)], 1)
        torch.testing.assert_close(found, fm.sample(BATCH, step_fn, noise=noise, step_noise=z), **EXACT)
    # by keys: draw k + 1 of each sample's key
    key = KeyedNoise(7, first=2)
    z = torch.stack([key.draw(BATCH, DIMS, evaluation=k + 1) for k in range(STEPS)], 1)
    wanted = fm.sample(BATCH, step_fn, noise=key.draw(BATCH, DIMS), step_noise=z)
    lists = [KeyedNoise(7, first=2 + k) for k in range(BATCH)]
    for given in ({"noise": key}, {"noise": lists}, {"noise": key.draw(BATCH, DIMS), "step_noise": key}):
        for backend in ("auto", "reference"):
            torch.testing.assert_close(fm.sample(BATCH, step_fn, backend=backend, **given), wanted, **EXACT)
    alone = torch.cat([fm.sample(1, step_fn, noise=KeyedNoise(7, first=2 + k)) for k in range(BATCH)])
    torch.testing.assert_close(alone, wanted, **EXACT)
    # a generator for each sample
    generators = lambda: [torch.Generator().manual_seed(k) for k in range(BATCH)]  # noqa: E731
    together = fm.sample(BATCH, step_fn, noise=generators())
    alone = [fm.sample(1, step_fn, noise=[one]) for one in generators()]
    torch.testing.assert_close(together, torch.cat(alone), **EXACT)


def test_ways_to_sample_agree():
    """Formats, 16-bit states, gradients, compiled code, predictions and guidance: the bits of the plain way."""
    key = KeyedNoise(1)
    fm = FlowMatching((3, 4, 2), "sde", STEPS)
    z = key.draw(BATCH, (3, 4, 2))
    step = lambda x, t: (torch.sin(t) - x).to(x.dtype)  # noqa: E731
    wanted = fm.sample(BATCH, step, noise=z, step_noise=key)
    last = z.to(memory_format=torch.channels_last)
    found = fm.sample(BATCH, step, noise=last, step_noise=key)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, wanted, **EXACT)
    given = {"step_noise": key, "return_log_prob": True}
    for one, other in zip(*(fm.sample(BATCH, step, noise=start, **given) for start in (z, last)), strict=True):
        torch.testing.assert_close(other, one, **EXACT)
    torch.testing.assert_close(fm.sample(BATCH, step, noise=z, step_noise=key, differentiable=True), wanted, **EXACT)
    compiled = torch.compile(lambda: fm.sample(BATCH, step, noise=key), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(), wanted, **EXACT)
    half = [fm.sample(BATCH, step, noise=key, dtype=torch.bfloat16, backend=b) for b in ("auto", "reference")]
    torch.testing.assert_close(*half, **EXACT)
    # v = (x1 - x)/(1 - t): the same table, with other columns
    data = FlowMatching((3, 4, 2), "sde", STEPS, prediction_type="data")
    found = data.sample(BATCH, lambda x, t: x + (1 - t) * step(x, t), noise=z, step_noise=key, dtype=torch.float32)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # divided by 1 - t and multiplied by it


def test_gradient():
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    noise, z = drawn()
    fm = sampler("sde")
    x, log_prob = fm.sample(
        BATCH, lambda x, t: w * step_fn(x, t), noise=noise, step_noise=z, differentiable=True, return_log_prob=True
    )
    (found,) = torch.autograd.grad(x.sum() + log_prob.sum(), w)
    grid = torch.linspace(0, 1, STEPS + 1).tolist()

    def loss(w):
        x, total = noise, 0.0
        for k in range(STEPS):
            t = torch.full((BATCH, 1, 1), grid[k], dtype=x.dtype)
            mean, std = mean_and_std("sde", x, -w * step_fn(x, t), 1 - grid[k], 1 - grid[k + 1], 1 - grid[1])
            x = mean + std * z[:, k]
            total = total - (((x - mean) ** 2) / (2 * std**2)).mean(dim=(1, 2)).sum()
        return x.sum() + total

    (wanted,) = torch.autograd.grad(loss(w), w)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)  # the grid's step sizes are float32
    with torch.no_grad():
        assert not fm.sample(BATCH, step_fn, noise=noise, step_noise=z).requires_grad


def test_log_prob():
    for name, guided, dtype in itertools.product(("sde", "dance"), (False, True), (torch.float32, torch.float64)):
        fm = sampler(name, use_classifier_free_guidance=guided, inference_guidance_weight=2.5)
        noise, z = drawn(dtype)
        seen = []

        def unguided(x, t):
            return 0.3 * x

        more = {"unguided_step_fn": unguided} if guided else {}
        given = {"noise": noise, "step_noise": z, "return_all_steps": True} | more
        states, grid, log_prob = fm.sample(BATCH, step_fn, return_log_prob=True, **given)
        plain, _ = fm.sample(BATCH, step_fn, **given)
        torch.testing.assert_close(states, plain, **EXACT)
        x, again = fm.sample(BATCH, step_fn, return_log_prob=True, **(given | {"return_all_steps": False}))
        torch.testing.assert_close((x, again), (states[:, -1], log_prob), **EXACT)
        assert log_prob.shape == (BATCH, STEPS)
        for k in range(STEPS):
            x, t = states[:, k].contiguous(), grid[k].expand(BATCH, 1, 1)
            v = step_fn(x, t)
            if guided:
                v = (1 - 2.5) * unguided(x, t) + 2.5 * v
            found = fm.step_log_prob(x, v, states[:, k + 1].contiguous(), k)
            torch.testing.assert_close(found, log_prob[:, k], **EXACT)  # the log-ratio of a policy with itself is 0.0
            seen.append(found)
        if not guided:
            _, wanted = published(name, noise.double(), z.double(), grid.double().tolist(), 0)
            # -z^2/2 of a mean of 15 elements, in z's own error: (x' - mean)/std loses the digits of x'/std
            torch.testing.assert_close(torch.stack(seen, 1).double(), torch.stack(wanted, 1), rtol=0, atol=2e-5)


ERRORS = [
    ("no such option", {"int_method": "sde", "int_method_options": {"beta": 1}}, TypeError, "takes eta, got 'beta'"),
    ("no options", {"int_method": "renoise", "int_method_options": {"eta": 1}}, TypeError, "takes no options"),
    ("a solver of the ODE", {"int_method": "euler", "int_method_options": {"eta": 1}}, TypeError, "takes no options"),
    ("negative", {"int_method_options": {"eta": -1}}, ValueError, "must be at least 0"),
    ("too large", {"int_method": "cps", "int_method_options": {"eta": 1.5}}, ValueError, "between 0 and 1"),
    ("no number", {"int_method_options": {"eta": "x"}}, TypeError, "eta"),
    ("no dict", {"int_method_options": 0.7}, TypeError, "must be a dict"),
    ("shape", {"step_noise": torch.zeros(BATCH, *DIMS)}, ValueError, r"step_noise must be \[batch_size, steps"),
    ("integers", {"step_noise": torch.zeros(BATCH, STEPS, *DIMS, dtype=int)}, TypeError, "floating point"),
    ("text", {"step_noise": "x"}, TypeError, "step_noise must be a tensor"),
    ("rounding", {"step_rounding": "exact"}, ValueError, "must be 'promote'"),
    (
        "the ODE's noise",
        {"int_method": "ab2", "step_noise": KeyedNoise(1)},
        ValueError,
        "step_noise is for steps that add noise",
    ),
    (
        "the ODE's density",
        {"int_method": "ab2", "return_log_prob": True},
        ValueError,
        "return_log_prob is for steps that add noise",
    ),
    ("constraint", {"return_log_prob": True, "constraint": lambda x, t: x}, ValueError, "a constraint"),
    ("callback", {"return_log_prob": True, "callback": lambda *_: None}, ValueError, "a callback"),
    ("no noise at the end", {"return_log_prob": True, "int_method": "cps"}, ValueError, r"steps \[5\] add no noise"),
    ("no noise", {"return_log_prob": True, "int_method_options": {"eta": 0.0}}, ValueError, "add no noise"),
    ("grid", {"time_steps": [1.0, 0.5, 0.0]}, ValueError, "sde computes with the time itself"),
    ("strength", {"velocity_strength": torch.ones(BATCH, *DIMS)}, ValueError, "int_method='euler'"),
]


def test_errors():
    fm = sampler("sde")
    for what, given, error, message in ERRORS:
        calls = []
        with pytest.raises(error, match=message):
            fm.sample(BATCH, lambda x, t, calls=calls: calls.append(1) or x, **given)
        assert not calls, what
    x = torch.zeros(BATCH, *DIMS)
    for more, message in (({"int_method": "euler"}, "adds no noise"), ({"int_method": "renoise", "step": 5}, "step 5")):
        with pytest.raises(ValueError, match=message):
            fm.step_log_prob(x, x, x, **({"step": 0} | more))
    with pytest.raises(ValueError, match="below 6"):
        fm.step_log_prob(x, x, x, 6)
    for compared in ("sde", ["euler", "cps"]):
        with pytest.raises(ValueError, match="adds noise"):
            fm.compare_solvers(step_fn, 4, compared, batch_size=2)
    with pytest.raises(ValueError, match="adds noise"):
        fm.compare_solvers(step_fn, 4, ["euler"], batch_size=2, reference="sde")


def test_partial_grids():
    """A solver that adds no noise in its last step has densities where the grid ends before the data."""
    fm = sampler("renoise")
    noise, z = drawn(torch.float32)
    grid = torch.linspace(0, 0.9, STEPS + 1)
    states, times, log_prob = fm.sample(
        BATCH, step_fn, noise=noise, step_noise=z, time_steps=grid, return_all_steps=True, return_log_prob=True
    )
    wanted, densities = published("renoise", noise.double(), z.double(), times.double().tolist(), 0)
    torch.testing.assert_close(states.double(), wanted, rtol=0, atol=1e-5)  # float32, states of size 4
    # The last std is 0.1: a state's rounding, 2e-7 of 4, is 1e-5 of it, times z of 3 or less.
    torch.testing.assert_close(log_prob.double(), torch.stack(densities, 1), rtol=0, atol=1e-4)


# The law of `cps` and `renoise` after each step, exactly: data that is a mixture of normals, and its velocity.
MEANS, SPREADS, WEIGHTS = (torch.tensor(row, dtype=torch.float64) for row in ([-1.5, 1.0], [0.3, 0.5], [0.3, 0.7]))


def posterior(x, t):
    """(E[data | x], E[noise | x]) where x = t*data + (1 - t)*noise, at x [..., 1] of any dtype, in float64."""
    variance = t**2 * SPREADS**2 + (1 - t) ** 2
    centre = x.double() - t * MEANS
    share = torch.softmax(torch.log(WEIGHTS / variance.sqrt()) - centre**2 / (2 * variance), dim=-1)
    data = (share * (MEANS + t * SPREADS**2 / variance * centre)).sum(-1, keepdim=True)
    return data, (share * (1 - t) / variance * centre).sum(-1, keepdim=True)


def laws(name, grid, count=1601):
    """After each step, points [count] and the distribution function there, [count], by the transition densities.

    A step is x' = mean(x) + std*z, with mean rising in x: from the density p of x, that of x' is the integral of
    p(x)*N(x'; mean(x), std^2), and without noise P(x' <= mean(x)) = P(x <= x).
    """
    points = torch.linspace(-6, 6, count, dtype=torch.float64)
    width = points[1] - points[0]
    masses = torch.exp(-(points**2) / 2) * width / math.sqrt(2 * math.pi)
    found = []
    for t, after in itertools.pairwise(grid):
        data, noise = (part.squeeze(-1) for part in posterior(points[:, None], t))
        turn = ETA["cps"] * math.pi / 2 if name == "cps" else math.pi / 2
        mean, std = after * data + (1 - after) * math.cos(turn) * noise, (1 - after) * math.sin(turn)
        if std:
            masses = torch.exp(-(((points[:, None] - mean) / std) ** 2) / 2) @ masses * width
            masses /= std * math.sqrt(2 * math.pi)
            found.append((points, masses.cumsum(0) - masses / 2))
        else:
            assert (mean.diff() > 0).all()
            found.append((mean, masses.cumsum(0) - masses / 2))
    return found


@pytest.mark.parametrize("name", ["cps", "renoise"])
def test_laws(name):
    """With the exact velocity, every state has the law that the step gives it: no error of the steps is left."""
    grid, count = [0.0, 0.35, 0.6, 0.85, 1.0], 40000

    def velocity(x, t):
        data, noise = posterior(x, t[0, 0].item())
        return (data - noise).float()

    fm = FlowMatching(1, name, int_method_options=options(name))
    states, _ = fm.sample(count, velocity, noise=KeyedNoise(5), time_steps=grid, return_all_steps=True)
    for state, (points, below) in zip(states.double().squeeze(-1).unbind(1)[1:], laws(name, grid), strict=True):
        found = torch.searchsorted(state.sort().values, points, right=True) / count
        distance = (found - below).abs().max().item()
        # Kolmogorov's 1e-4 quantile is 2.2/sqrt(count) = 0.011; twice as many points change a law by less than 1e-5.
        assert distance < 0.011, distance


@pytest.mark.parametrize("name", ["cps", "renoise"])
def test_laws_of_a_normal(name):
    """Data of one normal law: each step is linear, so mean and covariance follow a recursion in closed form."""
    mean, factor = torch.tensor([0.8, -0.5]).double(), torch.tensor([[0.9, 0.0], [0.5, 0.4]]).double()
    spread, one, grid, count = factor @ factor.T, torch.eye(2).double(), [0.0, 0.3, 0.7, 0.9, 1.0], 40000

    def gains(t):
        """E[data | x] = mean + K (x - t*mean), E[noise | x] = L (x - t*mean)."""
        inverse = torch.linalg.inv(t**2 * spread + (1 - t) ** 2 * one)
        return t * spread @ inverse, (1 - t) * inverse

    def velocity(x, t):
        t = t[0, 0].item()
        to_data, to_noise = gains(t)
        return (mean + (x.double() - t * mean) @ (to_data - to_noise).T).float()

    fm = FlowMatching(2, name, int_method_options=options(name))
    states, _ = fm.sample(count, velocity, noise=KeyedNoise(8), time_steps=grid, return_all_steps=True)
    turn = (ETA["cps"] if name == "cps" else 1.0) * math.pi / 2
    at, covariance = torch.zeros(2).double(), one
    for k, (t, after) in enumerate(itertools.pairwise(grid)):
        to_data, to_noise = gains(t)
        gain = after * to_data + (1 - after) * math.cos(turn) * to_noise
        at = after * mean + gain @ (at - t * mean)
        covariance = gain @ covariance @ gain.T + ((1 - after) * math.sin(turn)) ** 2 * one
        # Whitened, mean and covariance of count normal draws: errors of 1/sqrt(count), and sqrt(2/count) on the
        # diagonal. Five of them: a number in 10^6 is further off, of some 50 here.
        white = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), (states[:, k + 1].double() - at).T, upper=False
        )
        assert (white.mean(1).abs() < 5 / math.sqrt(count)).all(), (k, white.mean(1))
        bound = 5 * torch.tensor([[math.sqrt(2), 1.0], [1.0, math.sqrt(2)]]) / math.sqrt(count)
        assert ((white @ white.T / count - one).abs() < bound).all(), (k, white @ white.T / count)
