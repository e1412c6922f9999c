"""`integrations.diffusers` against diffusers itself, to the last bit."""

import copy
import inspect
import itertools
import pickle

import numpy
import pytest
import torch
from operands import assert_same_bits, values

diffusers = pytest.importorskip("diffusers", reason="the oracle is diffusers itself, of the test extra")

from flowmatch_kernels import FlowMatching, solvers  # noqa: E402
from flowmatch_kernels.integrations import diffusers as ours_module  # noqa: E402
from flowmatch_kernels.integrations.diffusers import FlowMatchEulerDiscreteScheduler as Ours  # noqa: E402
from flowmatch_kernels.integrations.diffusers import FlowMatchSolverScheduler  # noqa: E402
from flowmatch_kernels.ops import dispatch, native  # noqa: E402

Theirs = diffusers.FlowMatchEulerDiscreteScheduler
NARROW = [torch.float32, torch.bfloat16, torch.float16]
CONFIGS = [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"invert_sigmas": True}, {"use_karras_sigmas": True}]


@pytest.fixture
def launches(monkeypatch):
    """How often the fused step ran."""
    seen = []
    of = dispatch.BACKENDS["cpu"]

    def counted(o):
        seen.append(o)
        native.fused_step_(o)

    monkeypatch.setitem(dispatch.BACKENDS, "cpu", of._replace(load=lambda: counted))
    return seen


def both(**config):
    made = [kind(**config) for kind in (Ours, Theirs)]
    for scheduler in made:
        scheduler.set_timesteps(7, **({"mu": 0.8} if config.get("use_dynamic_shifting") else {}))
    return made


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_step(config, launches):
    """Nine pairs of dtypes; both return types; the published loop's own calls."""
    if native.cpu_unavailable():
        pytest.skip("without the extension no backend is counted")
    generator = torch.Generator().manual_seed(0)
    for sample_dtype, velocity_dtype in itertools.product(NARROW, repeat=2):
        ours, theirs = both(**config)
        x = y = values((2, 4, 9), sample_dtype, generator, special=False)
        for t, their_t in zip(ours.timesteps, theirs.timesteps, strict=True):
            v = values((2, 4, 9), velocity_dtype, generator)
            kept = x.clone()
            got = ours.step(v, t, x)
            wanted = theirs.step(v, their_t, y, return_dict=False)
            assert type(got) is type(theirs.step.__globals__["FlowMatchEulerDiscreteSchedulerOutput"](wanted[0]))
            assert_same_bits(got.prev_sample, wanted[0], f"{sample_dtype} {velocity_dtype}")
            assert_same_bits(x, kept)
            x, y = got.prev_sample.to(sample_dtype), wanted[0].to(sample_dtype)
        assert ours.step_index == theirs.step_index == 7
    assert len(launches) == 9 * 7
    ours, theirs = both(**config)
    with dispatch.use_backend("reference"):  # in the middle of a schedule
        ours.step(v, ours.timesteps[0], x)
    assert len(launches) == 9 * 7
    ours.step(v, ours.timesteps[1], x)
    assert len(launches) == 9 * 7 + 1
    ours, theirs = both(**config)
    (got,) = ours.step(v, ours.timesteps[0], x, return_dict=False)
    assert_same_bits(got, theirs.step(v, theirs.timesteps[0], y)[0])


def test_step_guided(launches):
    generator = torch.Generator().manual_seed(0)
    for dtype, scale in itertools.product(NARROW, (1.0, 3.5, 7)):
        ours, theirs = both(shift=3.0)
        x = y = values((2, 4, 9), torch.float32, generator, special=False)
        for t in theirs.timesteps:
            scale += 0.5  # a guidance that changes from step to step is followed
            cond, uncond = values((4, 4, 9), dtype, generator).chunk(2)
            x = ours.step_guided(cond, uncond, scale, t, x, return_dict=False)[0]
            y = theirs.step(uncond + scale * (cond - uncond), t, y)[0]
            assert_same_bits(x, y, f"{dtype} {scale}")
    if native.cpu_unavailable() is None:
        assert len(launches) == 9 * 7
    with pytest.raises(TypeError, match="guidance_scale must be a number"):
        ours.step_guided(x, x, torch.ones(1), t, x)


def test_starts_in_the_middle():
    """img2img: a begin index, or the schedule's own search; a schedule changed in place or set anew is followed."""
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    for begin in (None, 3):
        ours, theirs = both()
        for scheduler in (ours, theirs):
            if begin is not None:
                scheduler.set_begin_index(begin)
        for k in range(3, 7):
            assert_same_bits(ours.step(v, ours.timesteps[k], x)[0], theirs.step(v, theirs.timesteps[k], x)[0])
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
        scheduler.step(v, scheduler.timesteps[0], x)
        scheduler.sigmas.mul_(0.5)
    assert_same_bits(ours.step(v, ours.timesteps[1], x)[0], theirs.step(v, theirs.timesteps[1], x)[0])
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    assert_same_bits(ours.step(v, ours.timesteps[0], x)[0], theirs.step(v, theirs.timesteps[0], x)[0])


def test_handed_on(launches):
    """What diffusers' own step takes: per-token times, stochastic sampling, gradients, float64, other layouts."""
    x, v = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)

    def same(x, v, config=None, **keywords):
        ours, theirs = both(**config or {})
        results = []
        for scheduler in (ours, theirs):
            torch.manual_seed(0)
            results.append(scheduler.step(v, scheduler.timesteps[0], x, **keywords)[0])
        assert results[0].stride() == results[1].stride()
        assert_same_bits(results[0].detach(), results[1].detach())
        return results[0]

    if "stochastic_sampling" in Theirs().config:  # 0.33 and later
        same(x, v, {"stochastic_sampling": True})
    same(x.double(), v.double())
    same(x.to(memory_format=torch.channels_last), v)
    same(x, v[:1])
    assert same(x, v.clone().requires_grad_()).requires_grad
    if "per_token_timesteps" in inspect.signature(Theirs.step).parameters:
        tokens = torch.full((2, 5), 800.0)
        same(torch.randn(2, 5, 3), torch.randn(2, 5, 3), per_token_timesteps=tokens)
    assert not launches
    same(x, v.transpose(1, 2))
    ours, _ = both()
    for integer in (3, torch.tensor(3)):
        with pytest.raises(ValueError, match="integer indices"):
            ours.step(v, integer, x)


@pytest.mark.parametrize("ours", [Ours, FlowMatchSolverScheduler])
def test_steps_that_the_schedule_does_not_have(ours):
    """They raise, as diffusers' do past the end, and read nothing outside the rows."""
    scheduler, x = ours(), torch.ones(2, 4)
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        scheduler.step(-x, t, x)
    for begin in (None, 3, 7, -1):
        if begin is not None:
            scheduler.set_timesteps(3)
            scheduler.set_begin_index(begin)
        for step in (scheduler.step, lambda v, t, x: scheduler.step_guided(v, x, 1.5, t, x)):
            with pytest.raises(IndexError, match=f"step {3 if begin is None else begin} of a schedule of 3"):
                step(-x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("made", [lambda: Ours(), lambda: FlowMatchSolverScheduler(int_method="euler")])
def test_samples_that_are_not_their_memory(made):
    """With the negative bit, as of z.conj().imag, or without memory, as autograd's zero tensors."""
    x = torch.randn(2, 8)
    for sample, same in ((torch._neg_view(x), -x), (torch._efficientzerotensor(2, 8), torch.zeros(2, 8))):
        for guided in (False, True):
            results = []
            for given in (sample, same):
                scheduler = made()
                scheduler.set_timesteps(3)
                t = scheduler.timesteps[0]
                found = scheduler.step_guided(x, 2 * x, 1.5, t, given) if guided else scheduler.step(x, t, given)
                results.append(found.prev_sample)
            torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    "made", [lambda: Ours(), *(lambda m=m: FlowMatchSolverScheduler(int_method=m) for m in ("euler", "ab2"))]
)
def test_inference_mode(made):
    """At set_timesteps, at the first steps, at the last one; and a write to sigmas counts there too."""
    noise = torch.randn(2, 4)

    def sampled(*modes, guided, written):
        scheduler, x = made(), noise
        with torch.inference_mode(modes[0]):
            scheduler.set_timesteps(4)
        for k, t in enumerate(scheduler.timesteps):
            with torch.no_grad(), torch.inference_mode(modes[1 if k < 2 else 2]):
                if written and k == 0:
                    scheduler.sigmas[3] = 0.3
                step = scheduler.step_guided(-x, x / 2, 1.5 + k, t, x) if guided else scheduler.step(-x, t, x)
                x = step.prev_sample
        return x.clone()

    for guided, written in itertools.product((False, True), repeat=2):
        wanted = sampled(False, False, False, guided=guided, written=written)
        for modes in itertools.product((False, True), repeat=3):
            torch.testing.assert_close(sampled(*modes, guided=guided, written=written), wanted, rtol=0, atol=0)
    assert not written or not torch.equal(wanted, sampled(False, False, False, guided=guided, written=False))


def test_sigmas_that_are_written_after_set_timesteps():
    """As Cosmos pipelines write the last one: the same bits as diffusers', also with a solver that evaluates once."""
    noise = torch.randn(2, 4)

    def sampled(scheduler, write):
        scheduler.set_timesteps(5)
        write(scheduler)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(-x, t, x).prev_sample
        return x

    def in_place(scheduler):
        scheduler.sigmas[-1] = scheduler.sigmas[-2] / 2

    def replaced(scheduler):
        scheduler.sigmas = scheduler.sigmas * 0.9

    def moved(scheduler):
        scheduler.sigmas = scheduler.sigmas.clone()

    for write in (in_place, replaced, moved):
        wanted = sampled(Theirs(), write)
        assert_same_bits(sampled(Ours(), write), wanted)
        euler = FlowMatchSolverScheduler(int_method="euler")
        assert_same_bits(sampled(euler, write), wanted)
        assert_same_bits(sampled(euler, moved), sampled(Theirs(), moved))
        ab2 = FlowMatchSolverScheduler(int_method="ab2")
        assert torch.equal(sampled(ab2, write), sampled(ab2, lambda scheduler: None)) == (write is moved)
    for int_method, before in (("ab2", 1), ("heun", 0)):
        scheduler = FlowMatchSolverScheduler(int_method=int_method)
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps[:before]:
            scheduler.step(noise, t, noise)
        in_place(scheduler)
        with pytest.raises(ValueError, match="sigmas were changed after set_timesteps"):
            scheduler.step(noise, scheduler.timesteps[before], noise)


@pytest.mark.parametrize("made", [lambda: Ours(), lambda: FlowMatchSolverScheduler(int_method="ab2")])
def test_copies(made):
    """By copy and pickle after set_timesteps, as LTX pipelines make them; also under inference mode."""
    x = torch.ones(2, 4)
    for mode in (False, True):
        with torch.inference_mode(mode):
            scheduler = made()
            scheduler.set_timesteps(4)
            results = []
            for copied in (
                scheduler,
                copy.deepcopy(scheduler),
                copy.copy(scheduler),
                pickle.loads(pickle.dumps(scheduler)),
            ):
                y = x
                for t in copied.timesteps:
                    y = copied.step(-y, t, y).prev_sample
                results.append(y)
                scheduler = made()
                scheduler.set_timesteps(4)
            for result in results[1:]:
                assert_same_bits(result, results[0])


def test_a_begin_index_that_is_a_tensor():
    for made in (Ours, Theirs, lambda: FlowMatchSolverScheduler(int_method="euler")):
        results = []
        for begin in (1, torch.tensor(1)):
            scheduler, x = made(), torch.ones(2, 4)
            scheduler.set_timesteps(4)
            scheduler.set_begin_index(begin)
            for t in scheduler.timesteps[1:]:
                x = scheduler.step(-x, t, x).prev_sample
            results.append(x)
        assert_same_bits(*results)


def test_configuration(tmp_path):
    """from_config of a pipeline's scheduler, and a round trip through a folder."""
    theirs = Theirs(shift=3.0, num_train_timesteps=500)
    ours = Ours.from_config(theirs.config)
    assert ours.config.shift == 3.0
    ours.save_pretrained(tmp_path)
    for kind in (Ours, Theirs):
        again = kind.from_pretrained(tmp_path)
        assert type(again) is kind
        assert again.config.num_train_timesteps == 500
    assert isinstance(ours, Theirs)
    theirs = list(inspect.signature(Theirs.step).parameters)  # without per_token_timesteps before 0.33
    assert [name for name in inspect.signature(Ours.step).parameters if name in theirs] == theirs
    assert set(inspect.signature(Ours.step).parameters) - set(theirs) <= {"per_token_timesteps"}
    assert inspect.signature(FlowMatchSolverScheduler.set_timesteps) == inspect.signature(Theirs.set_timesteps)


def test_an_older_diffusers_is_refused():
    """0.29 divides in its step, which gives other bits."""

    class Older:
        def __init__(self, num_train_timesteps=1000, shift=1.0):
            pass

    with pytest.raises(ImportError, match=rf"needs diffusers >= 0.32, and {diffusers.__version__} is installed"):
        ours_module._check_version(Older)


def test_compiled():
    """A whole step under torch.compile, in one graph, its index given before."""
    torch._dynamo.reset()
    x, v = torch.randn(2, 3), torch.randn(2, 3).bfloat16()
    ours, theirs = both()
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(0)
    step = torch.compile(lambda x, v, t: ours.step(v, t, x, return_dict=False)[0], backend="aot_eager", fullgraph=True)
    for t in theirs.timesteps[:3]:
        assert_same_bits(step(x, v, t), theirs.step(v, t, x)[0])


# ---- every solver behind the interface ----


def field(x, sigma):
    return torch.sin(3 * x) * 0.7 + sigma * x - 0.3


def run(scheduler, x, dtype=torch.float32, start=0):
    for t in scheduler.timesteps[start:]:
        x = scheduler.step(field(x, t / 1000).to(dtype), t, x).prev_sample
    return x


@pytest.mark.parametrize("int_method", solvers.SOLVERS)
def test_solver_scheduler(int_method):
    """The bits of sample() on the schedule's sigmas, an evaluation for each timestep."""
    at_end = int_method in ("heun", "rk4", "rk4_classic")
    for config in ({}, {"shift": 3.0}):
        scheduler = FlowMatchSolverScheduler.from_config(Theirs(**config).config, int_method=int_method)
        scheduler.set_timesteps(7)
        theirs = Theirs(**config)
        theirs.set_timesteps(7)
        x = torch.randn(2, 4, 9)
        fm = FlowMatching((4, 9), int_method, noise_at=1, euler_at_final=at_end)
        wanted = fm.sample(2, lambda x, t: field(x, t * 1000 / 1000), noise=x, time_steps=theirs.sigmas)
        assert_same_bits(run(scheduler, x), wanted, int_method)
        assert len(scheduler.timesteps) == len(scheduler.sigmas) - 1 == fm.nfe(7)
        assert scheduler.step_index == len(scheduler.timesteps)
        assert len(scheduler.timesteps) - 7 * scheduler.order in (0, -1, -3, 1)  # ab3 evaluates twice in its first step
        assert scheduler.sigmas[-1] == theirs.sigmas[-1]
        scheduler.set_timesteps(7)  # and again, with fewer samples: nothing is remembered
        assert_same_bits(run(scheduler, x[:1]), wanted[:1], int_method)


def test_solver_scheduler_is_better_than_euler():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    errors = {}
    exact = FlowMatchSolverScheduler(int_method="rk4")
    exact.set_timesteps(sigmas=[k / 200 for k in range(200, 0, -1)])
    wanted = run(exact, x)
    for int_method in ("euler", "ab2", "ab3", "heun"):
        scheduler = FlowMatchSolverScheduler(int_method=int_method)
        scheduler.set_timesteps(sigmas=[k / 20 for k in range(20, 0, -1)])
        errors[int_method] = float((run(scheduler, x) - wanted).abs().max())
    assert errors["ab3"] < errors["ab2"] < errors["euler"] / 4
    assert errors["heun"] < errors["euler"] / 4


@pytest.mark.parametrize("int_method", ["ab3", "heun"])
def test_solver_scheduler_guided(int_method, launches):
    """The bits of the two usual lines, in one launch where the velocities have one dtype and shape."""
    generator = torch.Generator().manual_seed(0)
    for dtype in NARROW:
        schedulers = [FlowMatchSolverScheduler(shift=3.0, int_method=int_method) for _ in range(2)]
        for scheduler in schedulers:
            scheduler.set_timesteps(5)
        x = y = values((2, 3, 4), dtype, generator, special=False)
        scale = 1.5
        for t in schedulers[0].timesteps:
            scale += 0.5  # followed from step to step
            cond, uncond = values((4, 3, 4), dtype, generator, special=False).chunk(2)
            x = schedulers[0].step_guided(cond, uncond, scale, t, x, return_dict=False)[0]
            y = schedulers[1].step(uncond + scale * (cond - uncond), t, y)[0]
            assert x.dtype == dtype
            assert_same_bits(x, y, f"{dtype} {scale}")
    if native.cpu_unavailable() is None:
        assert [o.u is not None for o in launches] == [True, False] * (len(launches) // 2)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0]
    mixed = scheduler.step_guided(cond.float(), uncond.bfloat16(), 2.0, t, x)[0]
    scheduler.set_timesteps(5)
    assert_same_bits(mixed, scheduler.step(uncond.bfloat16() + 2.0 * (cond.float() - uncond.bfloat16()), t, x)[0])
    scheduler.set_timesteps(5)
    with pytest.raises(TypeError, match="guidance_scale must be a number"):
        scheduler.step_guided(x, x, torch.ones(1), t, x)
    with pytest.raises(ValueError, match="got the integer 3"):
        scheduler.step_guided(x, x, 2.0, 3, x)
    with pytest.raises(ValueError, match=r"v must have base's shape \[2, 3, 4\], got \[1, 3, 4\]"):
        scheduler.step(x[:1], t, x)


@pytest.mark.parametrize("int_method", ["ab2", "heun"])
def test_solver_scheduler_in_the_middle(int_method):
    """Image to image: begins anew on the rest of the schedule, by a begin index or by the timestep alone."""
    scheduler = FlowMatchSolverScheduler(shift=3.0, int_method=int_method)
    scheduler.set_timesteps(8)
    sigmas, x = Theirs(shift=3.0), torch.randn(2, 5)
    sigmas.set_timesteps(8)
    fm = FlowMatching(5, int_method, noise_at=1, euler_at_final=int_method == "heun")
    wanted = fm.sample(2, lambda x, t: field(x, t * 1000 / 1000), noise=x, time_steps=sigmas.sigmas[3:])
    start = 3 * scheduler.order
    scheduler.set_begin_index(start)
    assert_same_bits(run(scheduler, x, start=start), wanted)
    scheduler.set_timesteps(8)
    assert_same_bits(run(scheduler, x, start=start), wanted)
    noisy = scheduler.scale_noise(x, scheduler.timesteps[start : start + 1], torch.ones_like(x))
    assert_same_bits(noisy, sigmas.scale_noise(x, sigmas.timesteps[3:4], torch.ones_like(x)))
    if int_method == "heun":  # the second evaluation of a step is at the next one's start
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(start - 1)
        assert_same_bits(run(scheduler, x, start=start - 1), wanted)
    midpoint = FlowMatchSolverScheduler(int_method="midpoint")
    midpoint.set_timesteps(8)
    midpoint.set_begin_index(3)
    with pytest.raises(ValueError, match="evaluation 3 of 16, which is within a step of 'midpoint': start at"):
        midpoint.step(x, midpoint.timesteps[3], x)


def adams_bashforth(x, grid):
    """Euler, then two velocities, then three: the integral of the polynomial through them, in float64."""
    velocities, points = [], []
    for t, t_next in itertools.pairwise(grid.double().tolist()):
        velocities, points = [field(x, t), *velocities][:3], [t, *points][:3]
        powers = torch.tensor([[p**k for p in points] for k in range(len(points))], dtype=torch.float64)
        integrals = torch.tensor([(t_next ** (k + 1) - t ** (k + 1)) / (k + 1) for k in range(len(points))])
        x = x + sum(w * v for w, v in zip(torch.linalg.solve(powers, integrals.double()), velocities, strict=True))
    return x


@pytest.mark.parametrize("steps", [3, 8])
def test_ab3_in_the_middle(steps):
    """From any entry of timesteps: Euler first there, as Heun would need an evaluation more than there are timesteps.

    Within some eps a step of Adams' formula, whose weights are computed otherwise here.
    """
    scheduler, x = FlowMatchSolverScheduler(shift=3.0, int_method="ab3"), torch.randn(2, 5)
    scheduler.set_timesteps(steps)
    grid, results = scheduler.sigmas[1:], []
    for start in range(1, steps + 1):  # 0 and 1 are Heun's evaluations, of which 1 is at the second step's start
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(start)
        results.append(run(scheduler, x, start=start))
        wanted = adams_bashforth(x.double(), grid[max(start - 1, 1) :])
        assert_within(results[-1], wanted.float(), 4 * steps)
        assert scheduler.step_index == len(scheduler.timesteps)
    assert_same_bits(results[0], results[1])
    scheduler.set_timesteps(steps)
    assert_same_bits(scheduler.step(x, scheduler.timesteps[1], x)[0], FlowMatching(5).sample(
        2, lambda **_: x, noise=x, time_steps=grid[1:3]
    ))  # the timestep alone, which occurs twice, means the second  # fmt: skip


def fitted_solver(noise_at=1, history=True):
    """A solver of four evaluations; without history its third row starts anew."""
    rows = [(1.02, -0.2), (0.98, -0.31, 0.04), (1.01, -0.22), (0.99, -0.33, 0.05, *([0.02] * history))]
    times = (0.97, 0.7, 0.41, 0.2, 0.01)
    if not noise_at:
        times, rows = [1 - t for t in times], [(a, *(-b for b in others)) for a, *others in rows]
    return solvers.FittedSolver(times, rows, noise_at=noise_at)


@pytest.mark.parametrize("given", ["solver", "path", "name of a file", "dict"])
def test_fitted_solver_scheduler(given, tmp_path):
    """The bits of sample() with the fitted solver, whatever times the pipeline asks for; and after a round trip."""
    fitted, file = fitted_solver(), tmp_path / "policy.json"
    fitted.save(file)
    int_method = {"solver": fitted, "path": file, "name of a file": str(file), "dict": fitted.to_dict()}[given]
    scheduler = FlowMatchSolverScheduler.from_config(Theirs(shift=3.0).config, int_method=int_method)
    file.unlink()  # the configuration holds the solver
    x = torch.randn(2, 4, 9)
    wanted = FlowMatching((4, 9), fitted, noise_at=1).sample(2, lambda x, t: field(x, t * 1000 / 1000), noise=x)
    scheduler.save_pretrained(tmp_path)
    for again in (
        scheduler,
        FlowMatchSolverScheduler.from_pretrained(tmp_path),
        FlowMatchSolverScheduler.from_config(scheduler.config),
    ):
        for asked in ({"num_inference_steps": 4}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}):  # as SD3 does, and Flux
            again.set_timesteps(**asked)
            assert again.order == 1
            assert_same_bits(again.timesteps, fitted.grid(torch.float32)[:-1] * 1000)
            assert_same_bits(run(again, x), wanted)
    assert Theirs.from_pretrained(tmp_path).config.shift == 3.0


def test_fitted_solver_scheduler_errors():
    scheduler = FlowMatchSolverScheduler(int_method=fitted_solver())
    with pytest.raises(ValueError, match="wanted 28 steps, and the fitted solver has 4 evaluations: pass num_inf"):
        scheduler.set_timesteps(28)
    with pytest.raises(ValueError, match="the noise is at sigma 1, and the solver was fitted with noise_at=0"):
        FlowMatchSolverScheduler(int_method=fitted_solver(0)).set_timesteps(4)
    with pytest.raises(ValueError, match="the noise is at sigma 0, and the solver was fitted with noise_at=1"):
        FlowMatchSolverScheduler(int_method=fitted_solver(), invert_sigmas=True).set_timesteps(4)
    inverted, x = FlowMatchSolverScheduler(int_method=fitted_solver(0), invert_sigmas=True), torch.randn(2, 5)
    inverted.set_timesteps(4)
    wanted = FlowMatching(5, fitted_solver(0)).sample(2, lambda x, t: field(x, t * 1000 / 1000), noise=x)
    assert_same_bits(run(inverted, x), wanted)
    for broken in ({"format": "another"}, fitted_solver().to_dict() | {"times": [0.0]}):
        with pytest.raises(ValueError, match=r'it does not say "format"|times must be strictly monotonic'):
            FlowMatchSolverScheduler(int_method=broken)


def test_fitted_solver_scheduler_in_the_middle():
    """From where no row reads what came before; an error elsewhere."""
    x = torch.randn(2, 5)
    for start, history, missing in ((1, True, 1), (2, True, 3), (2, False, None), (3, False, 3)):
        scheduler = FlowMatchSolverScheduler(int_method=fitted_solver(history=history))
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(start)
        if missing is not None:
            with pytest.raises(ValueError, match=f"evaluation {missing} of the fitted solver reads velocities from"):
                run(scheduler, x, start=start)
            continue
        got = run(scheduler, x, start=start)
        t = fitted_solver().grid(torch.float32)
        v = field(x, t[2])
        y = x * torch.tensor([1.01]) + torch.tensor([-0.22]) * v
        later = torch.tensor([0.99]) * y + torch.tensor([-0.33]) * field(y, t[3]) + torch.tensor([0.05]) * v
        assert_within(got, later, 4)


def test_solver_scheduler_dtypes_and_errors(tmp_path):
    scheduler = FlowMatchSolverScheduler(int_method="ab2")
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(4)
    got = run(scheduler, x.bfloat16(), torch.bfloat16)
    assert got.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="got the integer 3"):
        scheduler.step(x, 3, x)
    with pytest.raises(ValueError, match="per_token_timesteps and a solver"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=x)
    with pytest.raises(ValueError, match="Invalid integration method: euler2"):
        FlowMatchSolverScheduler(int_method="euler2")
    with pytest.raises(FileNotFoundError):
        FlowMatchSolverScheduler(int_method="policy.json")
    with pytest.raises(ValueError, match="'dpmpp_2m' has no finite coefficients on this time grid"):
        FlowMatchSolverScheduler(int_method="dpmpp_2m").set_timesteps(sigmas=[0.9, 0.0, 0.5])
    with pytest.raises(ValueError, match="use_flow_sigmas and invert_sigmas"):
        FlowMatchSolverScheduler(use_flow_sigmas=True, invert_sigmas=True)
    if "stochastic_sampling" in Theirs().config:
        with pytest.raises(ValueError, match="stochastic_sampling and a solver"):
            FlowMatchSolverScheduler(stochastic_sampling=True)
    scheduler.save_pretrained(tmp_path)
    again = FlowMatchSolverScheduler.from_pretrained(tmp_path)
    assert again.config.int_method == "ab2"
    assert Theirs.from_config(again.config).config.shift == again.config.shift


# ---- diffusers' own solvers ----


def assert_within(got, wanted, eps):
    """Within so many eps of the largest entry: another order of the same sums."""
    assert got.dtype == wanted.dtype
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert error <= eps * torch.finfo(got.dtype).eps, f"{error / torch.finfo(got.dtype).eps:.1f} eps, wanted {eps}"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers 0.32 and NumPy 2
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 50])
def test_unipc_is_diffusers(n, shift):
    """Whole runs as Wan's pipelines make them; theirs are some 20 roundings a step, ours one row: within 4 + n eps."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        theirs = diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
        )
        theirs.set_timesteps(n)
        theirs.sigmas = theirs.sigmas.to(dtype)  # or theirs computes its coefficients in float32 for a float64 state
        wanted = x.to(dtype)
        for t, sigma in zip(theirs.timesteps, theirs.sigmas, strict=False):
            wanted = theirs.step(field(wanted, sigma), t, wanted, return_dict=False)[0]
        fm = FlowMatching(64, "unipc", noise_at=1)
        got = fm.sample(4, lambda x, t: field(x, t), noise=x.to(dtype), time_steps=theirs.sigmas, dtype=dtype)
        assert_within(got, wanted, 4 + n)
    ours = FlowMatchSolverScheduler.from_config(theirs.config, int_method="unipc")  # its schedule too
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(n)
    assert_within(run(ours, x.float()), run(theirs, x.float()), 4 + n)


def test_unipc_from_wans_configuration(tmp_path):
    """The shift has another name there; and a scheduler that is not for flow matching is refused."""
    theirs = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0, num_train_timesteps=500
    )
    ours = FlowMatchSolverScheduler.from_config(theirs.config, int_method="unipc")
    assert (ours.config.shift, ours.config.num_train_timesteps, ours.config.int_method) == (5.0, 500, "unipc")
    assert FlowMatchSolverScheduler.from_config(theirs.config, shift=2.0).config.shift == 2.0
    assert FlowMatchSolverScheduler.from_config(ours.config).config.shift == 5.0
    ours.save_pretrained(tmp_path)
    assert FlowMatchSolverScheduler.from_pretrained(tmp_path).config.shift == 5.0
    with pytest.raises(ValueError, match="for flow matching, got one with use_flow_sigmas=False"):
        FlowMatchSolverScheduler.from_config(diffusers.UniPCMultistepScheduler().config)
    config = {**theirs.config, "final_sigmas_type": "sigma_min"}
    with pytest.raises(ValueError, match="for flow matching, got one with final_sigmas_type=sigma_min"):
        FlowMatchSolverScheduler.from_config(config)


def wan(**settings):
    """Wan's scheduler."""
    kind = diffusers.UniPCMultistepScheduler
    return kind(**{"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0} | settings)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("settings", [
    {"flow_shift": 1.0}, {"flow_shift": 5.0}, {"num_train_timesteps": 500}, {"use_karras_sigmas": True},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"shift_terminal": 0.02},
], ids=str)  # fmt: skip
def test_wans_schedule(settings, tmp_path):
    """Its sigmas and timesteps, to the bit, by from_config alone; with sigmas and mu of the pipeline's too."""
    known = inspect.signature(diffusers.UniPCMultistepScheduler.__init__).parameters
    if not settings.keys() <= known.keys():
        pytest.skip("this diffusers' UniPC has no such setting")
    theirs = wan(**settings)
    ours = FlowMatchSolverScheduler.from_config(theirs.config, int_method="unipc")
    ours.save_pretrained(tmp_path)
    calls = [{"num_inference_steps": n} for n in (2, 10, 40)]
    if "sigmas" in inspect.signature(theirs.set_timesteps).parameters:
        calls.append({"sigmas": [1.0, 0.7, 0.3]})
    for keywords, again in itertools.product(calls, (ours, FlowMatchSolverScheduler.from_pretrained(tmp_path))):
        if settings.get("use_dynamic_shifting"):
            keywords = keywords | {"mu": 0.8}
        again.set_timesteps(**keywords)
        theirs.set_timesteps(**{k: numpy.array(v) if k == "sigmas" else v for k, v in keywords.items()})
        assert_same_bits(again.sigmas, theirs.sigmas)
        assert torch.equal(again.timesteps, theirs.timesteps.float()) and again.timesteps.dtype == torch.float32
        assert again.num_inference_steps == theirs.num_inference_steps


def test_unipc_corrects():
    """What it is for: nearer to the solution than its predictor alone, which is dpmpp_2m's."""
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def sampled(int_method, n):
        fm = FlowMatching(3, int_method, noise_at=1)
        return fm.sample(2, lambda x, t: field(x, t), noise=x, dtype=torch.float64, inference_step=n)

    exact = sampled("rk4", 200)
    errors = [float((sampled(name, 20) - exact).abs().max()) for name in ("unipc", "dpmpp_2m")]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("n", [2, 3, 10, 50])
def test_heun_is_diffusers(n, shift):
    """2n - 1 evaluations, Euler last, a cast after each.

    Theirs takes the velocity from a prediction of the data, (x - (x - v*sigma)) / sigma: up to eps / sigma of x is
    lost, of which half a step remains. With bfloat16 that is nothing beside the cast.
    """
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        theirs = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
        theirs.set_timesteps(n)
        ours = FlowMatchSolverScheduler(int_method="heun")
        ours.set_timesteps(sigmas=theirs.sigmas[[0, *range(1, 2 * n - 1, 2)]].tolist())
        assert len(ours.timesteps) == len(theirs.timesteps) == 2 * n - 1
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert ours.order == theirs.order == 2
        lost = (ours.sigmas.diff().abs() / ours.sigmas[1:])[:-2:2].sum() / 2
        assert_within(run(ours, x, dtype), run(theirs, x, dtype), n + lost if dtype == torch.float32 else 4)
