"""Hooks of sample(): constraint, inpaint, callback."""

import io
import itertools
import threading
import warnings

import eager_loops
import pytest
import torch
from operands import assert_same_bits, same_bits, values
from small_problem import BATCH, DIMS, EVERY_SOLVER, STEPS, TIMES, eager, field, sampler, start

from flowmatch_kernels import FlowMatching, Sample, inpaint, solvers

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

every_solver = pytest.mark.parametrize("solver", eager_loops.SOLVERS)


# ---- constraints ----
# Each makes a constraint (x, t) -> x, of its own for each run.


def clamped():
    return lambda x, t: x.clamp(-0.5, 0.5)


def clamped_in_place():
    return lambda x, t: x.clamp_(-0.5, 0.5)


def on_a_sphere():
    """Projection on a manifold: each of the five rows of length 1."""
    return lambda x, t: (x / x.double().norm(dim=-1, keepdim=True).clamp(min=1e-6)).to(x.dtype)


def of_time():
    return lambda x, t: (x * t).to(x.dtype)


def unchanged():
    return lambda x, t: x


def a_view_of_x():
    return lambda x, t: x.flip(1).view_as(x)


def x_by_another_name():
    return lambda x, t: x.view(-1).view_as(x).detach()


def transposed():
    return lambda x, t: (x * 0.5).transpose(0, 2).contiguous().transpose(0, 2)


def every_other():
    return lambda x, t: torch.stack([x, -x], dim=-1)[..., 0]


def expanded():
    return lambda x, t: x[:, :1].expand_as(x)


def negative():
    return lambda x, t: x.mul(0.5) if x.dtype.itemsize == 2 else (x * -1j).conj().imag


def a_parameter():
    return lambda x, t: torch.nn.Parameter(x * 0.5)


def with_a_gradient():
    weight = torch.ones(3, requires_grad=True)

    @torch.enable_grad()
    def constraint(x, t):
        return (x * weight).to(x.dtype)

    return constraint


def one_buffer():
    """The same tensor each time, as a replayed graph returns it."""
    kept = []

    def constraint(x, t):
        if not kept:
            kept.append(torch.empty_like(x))
        return kept[0].copy_(x).mul_(0.5)

    return constraint


def a_tensor_of_another_mode():
    def constraint(x, t):
        with torch.inference_mode():
            return x * 0.5

    return constraint


CONSTRAINTS = {f.__name__: f for f in (
    clamped, clamped_in_place, on_a_sphere, of_time, unchanged, a_view_of_x, x_by_another_name, transposed,
    every_other, expanded, negative, a_parameter, with_a_gradient, one_buffer, a_tensor_of_another_mode,
)}  # fmt: skip
every_constraint = pytest.mark.parametrize("make", CONSTRAINTS.values(), ids=CONSTRAINTS)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@every_constraint
def test_constraint_is_the_eager_loop(backend, make, mode):
    for solver in eager_loops.SOLVERS:
        noise = start()
        wanted = eager(solver, noise, constraint=make())
        with mode():
            fm = sampler(solver, backend)
            last = fm.sample(BATCH, field, noise=noise, constraint=make())
            states, times = fm.sample(BATCH, field, noise=noise, constraint=make(), return_all_steps=True)
            assert_same_bits(states, wanted, solver)
            assert_same_bits(last, wanted[:, -1], solver)
            assert_same_bits(times, TIMES)
            assert states.is_contiguous() and type(last) is torch.Tensor and not last.requires_grad
        assert same_bits(noise, start())


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@every_constraint
def test_constraint_with_other_states(backend, make, dtype):
    for solver in eager_loops.SOLVERS:
        wanted = eager(solver, start(dtype), constraint=make())
        states = sampler(solver, backend).sample(
            BATCH, field, noise=start(dtype), constraint=make(), return_all_steps=True
        )[0]
        assert_same_bits(states, wanted, solver)


@pytest.mark.parametrize("all_steps", [False, True], ids=["last", "all"])
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_when_a_constraint_is_called(backend, solver, all_steps):
    """Once a step, by position, with the committed state and the time it is at; not with the noise."""
    calls = []

    def constraint(x, t):
        calls.append((x.clone(), t.clone(), t.shape))
        return x.clamp(-0.5, 0.5)

    fm = sampler(solver, backend)
    plain, times = fm.sample(BATCH, field, noise=start(), return_all_steps=True)
    out = fm.sample(BATCH, field, noise=start(), constraint=constraint, return_all_steps=all_steps)
    assert len(calls) == STEPS
    assert_same_bits(calls[0][0], plain[:, 1], "the first state is the solver's own")
    for (x, t, shape), time in zip(calls, times[1:], strict=True):
        assert shape == (BATCH, 1, 1)
        assert t.dtype == torch.float32 and (t == time).all()
        assert x.shape == (BATCH, *DIMS)
    states = out[0] if all_steps else torch.stack([start(), out], dim=1)
    assert_same_bits(states[:, 0], start())
    assert_same_bits(states[:, -1], calls[-1][0].clamp(-0.5, 0.5))
    if all_steps:
        for slot, (x, _, _) in enumerate(calls, start=1):
            assert_same_bits(states[:, slot], x.clamp(-0.5, 0.5))


def test_stages_are_not_constrained(backend):
    """heun's predicted state is evaluated at as it is."""
    seen = []

    def step_fn(x, t):
        seen.append(x.clone())
        return torch.full_like(x, 10.0)

    sampler("heun", backend).sample(BATCH, step_fn, noise=torch.zeros(BATCH, *DIMS), constraint=clamped())
    assert all((x.abs() <= 0.5).all() for x in seen[2::2])
    assert all((x > 0.5).all() for x in seen[1::2])


@every_solver
def test_a_kept_tensor_stays_apart(backend, solver):
    """The constraint's own tensor: what step_fn writes to x does not reach it, nor its later changes the state."""
    kept, history = torch.empty(BATCH, *DIMS), []

    def constraint(x, t):
        kept.copy_(x).clamp_(-0.5, 0.5)
        history.append(kept.clone())
        return kept

    def step_fn(x, t):
        v = field(x, t)
        if history:
            assert same_bits(kept, history[-1]) or kept.isnan().all()
            kept.fill_(float("nan"))  # the state was taken over
        x.add_(0.25)
        return v

    def plain(x, t, i):
        v = field(x, t)
        x.add_(0.25)
        return v

    wanted = eager_loops.sample(solver, plain, start(), TIMES, constraint=clamped())
    for all_steps in (False, True):
        history.clear()
        got = sampler(solver, backend).sample(
            BATCH, step_fn, noise=start(), constraint=constraint, return_all_steps=all_steps
        )
        kept.fill_(7.0)
        if all_steps:  # step_fn wrote to x, which is a state of the trajectory, as in the published loop
            got = got[0]
            assert_same_bits(got[:, -1], wanted[:, -1])
        else:
            assert_same_bits(got, wanted[:, -1])


@pytest.mark.parametrize("make", [clamped, clamped_in_place, unchanged, one_buffer], ids=lambda f: f.__name__)
@every_solver
def test_kept_states_never_change(backend, solver, make):
    """What the constraint and step_fn were given, and kept."""
    kept, inner = [], make()

    def constraint(x, t):
        y = inner(x, t)
        kept.append((x, x.clone()))
        return y

    def step_fn(x, t):
        kept.append((x, x.clone()))
        return field(x, t)

    wanted = eager(solver, start(), constraint=make())
    for all_steps in (False, True):
        out = sampler(solver, backend).sample(
            BATCH, step_fn, noise=start(), constraint=constraint, return_all_steps=all_steps
        )
        assert_same_bits(out[0] if all_steps else out, wanted if all_steps else wanted[:, -1])
        assert all(same_bits(x, copy) for x, copy in kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_constraint
def test_step_fn_writes_to_a_constrained_state(backend, make, mode):
    """It writes to a state of the trajectory, which shows it, as in a loop that keeps its states in a list."""

    def step_fn(x, t):
        v = field(x, t)
        x.add_(0.25)
        return v

    x, states, constraint = start(), [], make()
    for t, after in itertools.pairwise(TIMES):
        v = step_fn(x, t)
        states.append(x)
        with torch.no_grad():
            x = constraint(x + (after - t).view(1, 1, 1) * v, after.view(1, 1, 1)).detach().clone()
    states.append(x)
    with mode():
        last = sampler("euler", backend).sample(BATCH, step_fn, noise=start(), constraint=make())
        got, _ = sampler("euler", backend).sample(
            BATCH, step_fn, noise=start(), constraint=make(), return_all_steps=True
        )
        assert_same_bits(last, x)
        assert_same_bits(got, torch.stack(states, dim=1))


def test_a_constraint_that_writes_to_time():
    """At B = 1 t is an ordinary view: what is cached stays."""
    fm = sampler()
    fm.sample(1, field, constraint=lambda x, t: (t.fill_(7.0), x)[1])
    assert_same_bits(fm.sample(BATCH, field, noise=start()), eager("euler", start())[:, -1])


def test_constraint_with_guidance(backend):
    velocity = eager_loops.guided("from_unguided", lambda i, t: 1.7, field, lambda x, t: torch.cos(x))
    wanted = eager_loops.sample("ab2", velocity, start(), TIMES, constraint=clamped())
    keywords = {"use_classifier_free_guidance": True, "guidance_form": "from_unguided", "noise": start()}
    keywords |= {"inference_guidance_weight": 1.7, "return_all_steps": True, "constraint": clamped()}
    fm = sampler("ab2", backend)
    got = fm.sample(BATCH, field, unguided_step_fn=lambda x, t: torch.cos(x), **keywords)[0]
    assert_same_bits(got, wanted)
    both = fm.sample(BATCH, lambda x, t: torch.cat([torch.cos(x), field(x, t)]), combined_guidance=True, **keywords)[0]
    assert_same_bits(both, wanted)


def test_projection_on_a_sphere():
    """The flow along a great circle, with each state projected: it stays on the sphere, and comes nearer the end."""
    axis = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    x0 = torch.nn.functional.normalize(torch.randn(8, 3, dtype=torch.float64), dim=-1)
    exact = torch.linalg.matrix_exp(torch.tensor([[0, -2, 0], [2, 0, 0], [0, 0, 0]], dtype=torch.float64))
    wanted = x0 @ exact.T  # a turn by 2 radians about the axis
    step_fn = lambda x, t: 2 * torch.linalg.cross(axis.expand_as(x), x)  # noqa: E731
    free = FlowMatching(3).sample(8, step_fn, noise=x0)
    projected, _ = FlowMatching(3).sample(
        8, step_fn, noise=x0, return_all_steps=True,
        constraint=lambda x, t: torch.nn.functional.normalize(x, dim=-1),
    )  # fmt: skip
    assert (projected.norm(dim=-1) - 1).abs().max() < 1e-14 and (free.norm(dim=-1) - 1).abs().max() > 0.01
    assert (projected[:, -1] - wanted).abs().max() < (free - wanted).abs().max() / 2


V = torch.zeros(BATCH, *DIMS)
STATE = r"wanted a tensor \[4, 5, 3\], torch.float32, on cpu"
NO_STATE = {
    "None": (lambda x: None, TypeError, "None"),
    "a number": (lambda x: 1.0, TypeError, r"1\.0 \(float\)"),
    "an array": (lambda x: x.numpy(), TypeError, "ndarray"),
    "a pair": (lambda x: (x, x), TypeError, "tuple"),
    "float64": (lambda x: x.double(), TypeError, "torch.float64"),
    "bfloat16": (lambda x: x.bfloat16(), TypeError, "torch.bfloat16"),
    "int64": (lambda x: x.long(), TypeError, "torch.int64"),
    "bool": (lambda x: x > 0, TypeError, "torch.bool"),
    "complex": (lambda x: x * 1j, TypeError, "torch.complex64"),
    "sparse": (lambda x: x.to_sparse(), TypeError, "sparse"),
    "one row": (lambda x: x[:1], ValueError, r"\[1, 5, 3\]"),
    "what would expand": (lambda x: x[:, :1], ValueError, r"\[4, 1, 3\]"),
    "0-dim": (lambda x: x.sum(), ValueError, r"\[\]"),
    "flat": (lambda x: x.flatten(), ValueError, r"\[60\]"),
    "transposed": (lambda x: x.mT, ValueError, r"\[4, 3, 5\]"),
    "larger": (lambda x: torch.cat([x, x]), ValueError, r"\[8, 5, 3\]"),
    "a rank more": (lambda x: x[None], ValueError, r"\[1, 4, 5, 3\]"),
    "another device": (lambda x: x.to("meta"), ValueError, "on meta"),
}


@pytest.mark.parametrize("case", NO_STATE)
def test_what_is_no_state(backend, case):
    make, error, words = NO_STATE[case]
    calls = []

    def constraint(x, t):
        calls.append(x)
        return make(x) if len(calls) == 3 else x

    fm = sampler("heun", backend)
    for all_steps in (False, True):
        calls.clear()
        with pytest.raises(error, match=rf"(?s)^constraint returned .*{words}.*{STATE}"):
            fm.sample(BATCH, field, noise=start(), constraint=constraint, return_all_steps=all_steps)
        assert len(calls) == 3
    assert_same_bits(fm.sample(BATCH, field, noise=start()), eager("heun", start())[:, -1])


def test_a_constraint_narrower_than_the_state():
    with pytest.raises(TypeError, match=r"constraint returned a tensor of torch.float32; wanted .*torch.bfloat16"):
        sampler().sample(BATCH, field, noise=start(torch.bfloat16), constraint=lambda x, t: x.float())


class OwnError(Exception):
    pass


@pytest.mark.parametrize("hook", ["constraint", "callback"])
@pytest.mark.parametrize("when", [1, STEPS])
def test_a_hook_that_raises(backend, hook, when):
    calls = []

    def raising(*arguments):
        calls.append(arguments)
        if len(calls) == when:
            raise OwnError
        return arguments[0] if hook == "constraint" else None

    fm = sampler("ab2", backend)
    for all_steps in (False, True):
        calls.clear()
        with pytest.raises(OwnError):
            fm.sample(BATCH, field, noise=start(), return_all_steps=all_steps, **{hook: raising})
        assert len(calls) == when
        assert_same_bits(fm.sample(BATCH, field, noise=start()), eager("ab2", start())[:, -1])


def test_a_constraint_on_a_large_state(backend):
    """Over the grain, with two threads; memory that is used again is not the constraint's."""
    torch.set_num_threads(2)
    noise = values((2, 30_011, 3), torch.float32, torch.Generator().manual_seed(4), special=False)
    kept = []

    def constraint(x, t):
        kept.append((x, x[0, ::1009].clone()))
        return x.clamp(-1, 1) if len(kept) % 2 else x.clamp_(-1, 1)

    got = FlowMatching((30_011, 3), backend=backend).sample(
        2, field, noise=noise, inference_step=3, constraint=constraint
    )
    times = torch.linspace(0, 1, 4)
    assert_same_bits(got, eager("euler", noise, times, constraint=lambda x, t: x.clamp(-1, 1))[:, -1])
    for k, (x, copy) in enumerate(kept):
        assert_same_bits(x[0, ::1009], copy if k % 2 == 0 else copy.clamp(-1, 1))


def test_constraint_and_compile():
    """Traced; and what it says of itself is not asked for in a graph."""
    torch._dynamo.reset()
    fm = sampler("ab2", steps=3)

    def run(noise):
        return fm.sample(BATCH, field, noise=noise, return_all_steps=True, constraint=clamped())[0]

    cached = len(solvers.cache._tables)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(start())
    assert len(solvers.cache._tables) == cached
    assert_same_bits(compiled, run(start()))


def test_callback_and_compile():
    torch._dynamo.reset()
    fm = sampler("heun", steps=4)

    def run(noise):
        return fm.sample(BATCH, field, noise=noise, callback=lambda step, t, x: step == 1)

    compiled, wanted = torch.compile(run, backend="aot_eager", fullgraph=True)(start()), run(start())
    assert compiled.stopped and wanted.stopped
    assert_same_bits(compiled.x, wanted.x)
    assert_same_bits(compiled.time_steps, wanted.time_steps)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fake_and_meta_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for fm in (
        sampler("heun"),
        sampler("ab3", time_grid="cosine"),
        sampler("dpmpp_2m", time_grid="shifted", noise_at=1),
    ):
        with torch.no_grad() if device == "meta" else FakeTensorMode():
            got, times = fm.sample(BATCH, field, device, True, constraint=clamped())
            ended = fm.sample(BATCH, field, device, True, constraint=clamped(), callback=lambda step, t, x: step == 2)
        for states, t, entries in ((got, times, STEPS + 1), (*ended[:2], 4)):
            assert states.shape == (BATCH, entries, *DIMS) and t.shape == (entries,)
            assert states.device.type == device and states.dtype == torch.float32
        assert ended.stopped
    fm = sampler("ab2")
    assert_same_bits(fm.sample(BATCH, field, noise=start()), eager("ab2", start())[:, -1])


@pytest.mark.parametrize("make", [clamped, unchanged, lambda: lambda x, t: torch.ones(BATCH, *DIMS)],
                         ids=["clamped", "unchanged", "no batch"])  # fmt: skip
def test_vmap(make):
    noises = torch.stack([start(), -start()])
    for hooks in ({"constraint": make()}, {"constraint": make(), "callback": lambda step, t, x: step == 3}):

        def run(noise, hooks=hooks):
            out = sampler("ab2").sample(BATCH, field, noise=noise, **hooks)
            return out.x if isinstance(out, Sample) else out

        assert_same_bits(torch.func.vmap(run)(noises), torch.stack([run(noise) for noise in noises]))


@pytest.mark.parametrize("when", ["always", "from the second"])
@pytest.mark.parametrize("all_steps", [False, True], ids=["last", "all"])
def test_a_constraint_that_returns_a_subclass(backend, when, all_steps):
    """While step_fn returns plain tensors, and while it does not."""
    from torch.testing._internal.two_tensor import TwoTensor

    calls = []

    def inner(x):
        return x.a if isinstance(x, TwoTensor) else x

    def constraint(x, t):
        calls.append(t)
        y = inner(x).clamp(-0.5, 0.5)
        return TwoTensor(y, y.clone()) if when == "always" or len(calls) > 1 else y

    for step_fn in (lambda x, t: field(inner(x), t), lambda x, t: field(x, t)):
        calls.clear()
        got = sampler("ab2", backend).sample(
            BATCH, step_fn, noise=start(), constraint=constraint, return_all_steps=all_steps
        )
        got = inner(got[0] if all_steps else got)
        wanted = eager("ab2", start(), constraint=clamped())
        assert_same_bits(got, wanted if all_steps else wanted[:, -1])


# ---- inpaint ----


def straight_path(known, noise, t, noise_at=0):
    return t * noise + (1 - t) * known if noise_at else (1 - t) * noise + t * known


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_solver
def test_inpaint_is_the_eager_loop(backend, solver, dtype, noise_at):
    """Known entries on their own path at each entry of the grid, the unknown as the loop has them."""
    times = TIMES.flip(0) if noise_at else TIMES
    noise, known = start(dtype), start(dtype).flip(0) * 3
    known[0, :2] = -0.0
    mask = torch.rand(BATCH, *DIMS, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0, :2] = True

    def constraint(x, t):
        left = t if noise_at else 1 - t
        path = straight_path(known, noise, t.to(dtype), noise_at)
        return torch.where(mask, known if (left == 0).all() else path, x)

    wanted = eager(solver, noise, times, constraint=constraint)
    fm = sampler(solver, backend, noise_at=noise_at)
    got, got_times = fm.sample(
        BATCH, field, noise=noise, return_all_steps=True, constraint=inpaint(known, mask, noise, noise_at)
    )
    assert_same_bits(got_times, torch.linspace(noise_at, 1 - noise_at, STEPS + 1))
    if noise_at:  # linspace(1, 0) is not linspace(0, 1) turned round, to the last bit
        wanted = eager(solver, noise, got_times, constraint=constraint)
    assert_same_bits(got, wanted)
    assert_same_bits(got[:, -1][mask], known[mask], "ends at known")
    for k, t in enumerate(got_times):
        path = straight_path(known, noise, t.to(dtype).view(1, 1, 1), noise_at)
        if 0 < k < STEPS:
            assert_same_bits(got[:, k][mask], path[mask], f"at t = {t}")
    assert (got[:, -1][~mask] != known[~mask]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inpaint_with_narrow_states(backend, dtype):
    """The path is taken in float32 and rounded once."""
    noise, known = start(dtype), start(dtype) * 3
    mask = torch.arange(5).view(5, 1) < 2

    def constraint(x, t):
        path = straight_path(known.float(), noise.float(), t).to(dtype)
        return torch.where(mask, known if (t == 1).all() else path, x)

    got = sampler("heun", backend).sample(
        BATCH, field, noise=noise, return_all_steps=True, constraint=inpaint(known, mask, noise)
    )[0]
    assert_same_bits(got, eager("heun", noise, constraint=constraint))
    assert_same_bits(got[:, -1, :2], known[:, :2])


def test_inpaint_with_tensors_of_other_dtypes():
    """Wider tensors for a narrow state, and the other way round: the end is `known`, rounded to the state."""
    mask = torch.tensor([True, False, True])
    for state in DTYPES:
        for wide in DTYPES:
            known = start(wide) / 3
            got = sampler().sample(BATCH, field, noise=start(state), constraint=inpaint(known, mask, start(state)))
            assert_same_bits(got[..., mask], known[..., mask].to(state))


EXPANDING = {
    "a row of x": (torch.full((3,), 2.0), torch.tensor([True, False, False])),
    "a prefix": (torch.full((5, 3), 2.0), (torch.arange(5) < 2).view(5, 1)),
    "one sample": (torch.full((1, 5, 3), 2.0), torch.tensor(True).view(1, 1, 1)),
    "samples": (torch.full((4, 1, 1), 2.0), torch.tensor([True, False, True, False]).view(4, 1, 1)),
    "numbers": (torch.tensor(2.0), torch.tensor(True)),
    "nothing": (torch.tensor(2.0), torch.tensor(False)),
}


@pytest.mark.parametrize("case", EXPANDING)
def test_inpaint_with_what_expands(case):
    known, mask = EXPANDING[case]
    full = known.expand(BATCH, *DIMS).contiguous(), mask.expand(BATCH, *DIMS).contiguous()
    runs = [sampler().sample(BATCH, field, noise=start(), return_all_steps=True, constraint=inpaint(k, m, start()))[0]
            for k, m in ((known, mask), full)]  # fmt: skip
    assert_same_bits(*runs)
    assert (runs[0][:, -1][full[1]] == 2.0).all()
    free = sampler().sample(BATCH, field, noise=start())
    # field is element by element: what is unknown never sees what is known.
    assert_same_bits(runs[0][:, -1][~full[1]], free[~full[1]])


def test_inpaint_looks_under_the_mask_only():
    """What is unknown may be anything."""
    mask = torch.zeros(BATCH, *DIMS, dtype=torch.bool)
    mask[:, 1:3] = True
    known = torch.where(mask, 1.5, torch.nan)
    x = sampler().sample(BATCH, field, noise=start(), constraint=inpaint(known, mask, start()))
    assert x.isfinite().all() and (x[:, 1:3] == 1.5).all()


@pytest.mark.parametrize("special", [-0.0, 0.0, float("inf"), float("nan"), 3.4e38, 1e-45])
@pytest.mark.parametrize("noise_value", [1.0, float("inf"), float("nan"), -0.0])
def test_inpaint_ends_at_any_value(special, noise_value):
    known, noise = torch.full((2, 3), special), torch.full((2, 3), noise_value)
    for noise_at, solver in ((0, "euler"), (1, "euler"), (0, "ab2")):
        fm = FlowMatching(3, solver, noise_at=noise_at)
        x = fm.sample(2, field, noise=noise, constraint=inpaint(known, torch.tensor(True), noise, noise_at))
        assert_same_bits(x, known)


@pytest.mark.parametrize("grid", [{"time_grid": "shifted"}, {"time_grid": "cosine", "noise_at": 1},
                                  {"time_grid": lambda n: torch.linspace(0, 1, n + 1).double() ** 2}],
                         ids=["shifted", "cosine", "double"])  # fmt: skip
def test_inpaint_on_other_grids(grid):
    noise_at = grid.get("noise_at", 0)
    known, mask = torch.full((3,), -0.0), torch.tensor([True, False, False])
    got, times = sampler(**grid).sample(
        BATCH, field, noise=start(), return_all_steps=True, constraint=inpaint(known, mask, start(), noise_at)
    )
    for k, t in enumerate(times.float()[1:-1], start=1):
        assert_same_bits(got[:, k, :, 0], straight_path(-0.0, start(), t.view(1, 1, 1), noise_at)[..., 0])
    assert_same_bits(got[:, -1, :, 0], torch.full((BATCH, 5), -0.0))


def test_inpaint_stopped_early_is_on_its_path():
    noise, known = start(), start() * 2
    out = sampler().sample(
        BATCH, field, noise=noise, constraint=inpaint(known, torch.tensor(True), noise),
        callback=lambda step, t, x: step == 2,
    )  # fmt: skip
    assert out.stopped
    assert_same_bits(out.x, straight_path(known, noise, out.time_steps[-1].view(1, 1, 1)))


def test_inpaint_leaves_its_tensors_alone():
    known, mask, noise = start(), torch.rand(BATCH, *DIMS) < 0.5, start() * 2
    copies = known.clone(), mask.clone(), noise.clone()

    def step_fn(x, t):
        return x.mul_(0.5)

    for all_steps in (False, True):
        for solver in EVERY_SOLVER:
            sampler(solver).sample(BATCH, step_fn, noise=noise, return_all_steps=all_steps,
                                   constraint=inpaint(known, mask, noise))  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip((known, mask, noise), copies, strict=True))


INPAINT = {
    "known a list": ({"known": [1.0]}, TypeError, r"known must be a floating-point tensor, got \[1\.0\]"),
    "known None": ({"known": None}, TypeError, "known must be a floating-point tensor, got None"),
    "known integers": ({"known": V.long()}, TypeError, "known must be .*got torch.int64"),
    "noise a number": ({"noise": 0.5}, TypeError, r"noise must be a floating-point tensor, got 0\.5"),
    "noise complex": ({"noise": V * 1j}, TypeError, "noise must be .*got torch.complex64"),
    "mask a list": ({"mask": [True]}, TypeError, r"mask must be a bool tensor.*got \[True\]"),
    "mask float": ({"mask": V}, TypeError, "mask must be a bool tensor.*got torch.float32"),
    "mask uint8": ({"mask": V.byte()}, TypeError, "mask must be a bool tensor.*got torch.uint8"),
    "noise_at": ({"noise_at": 2}, ValueError, "noise_at must be 0 or 1, got 2"),
    "noise_at None": ({"noise_at": None}, ValueError, "noise_at must be 0 or 1, got None"),
}
INPAINT_CALLED = {
    "known": ({"known": torch.zeros(5)}, r"known must expand to the state \[4, 5, 3\], got \[5\]"),
    "known enlarges": ({"known": torch.zeros(2, 4, 5, 3)}, r"known must expand .*got \[2, 4, 5, 3\]"),
    "known for more samples": ({"known": torch.zeros(8, 5, 3)}, r"known must expand .*got \[8, 5, 3\]"),
    "mask": ({"mask": torch.tensor([True, False])}, r"mask must expand to the state \[4, 5, 3\], got \[2\]"),
    "noise": ({"noise": torch.zeros(4, 3, 5)}, r"noise must expand to the state \[4, 5, 3\], got \[4, 3, 5\]"),
    "device": ({"known": V.to("meta")}, "known must be on the state's device cpu, got meta"),
    "mask's device": ({"mask": (V > 0).to("meta")}, "mask must be on the state's device cpu, got meta"),
}
GOOD = {"known": V, "mask": V > 0, "noise": V}


@pytest.mark.parametrize("case", INPAINT)
def test_inpaint_with_bad_input(case):
    keywords, error, words = INPAINT[case]
    with pytest.raises(error, match=words):
        inpaint(**(GOOD | keywords))


@pytest.mark.parametrize("case", INPAINT_CALLED)
def test_inpaint_with_another_state(case):
    keywords, words = INPAINT_CALLED[case]
    constraint = inpaint(**(GOOD | keywords))
    with pytest.raises(ValueError, match=words):
        sampler().sample(BATCH, field, noise=start(), constraint=constraint)


# ---- callbacks ----


@pytest.mark.parametrize("all_steps", [False, True], ids=["last", "all"])
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_callback_sees_each_committed_state(backend, solver, all_steps):
    """(0, t1, x1) to (N - 1, tN, xN), by position; what it is given never changes, and is its own."""
    seen = []

    def callback(*arguments):
        step, t, x = arguments
        seen.append((step, t.clone(), t.shape, x, x.clone()))

    def step_fn(x, t):
        v = field(x, t)
        x.mul_(0.5)  # what step_fn writes to x, it writes to the sampler's
        return v

    def checked(x, t):
        assert all(same_bits(kept, copy) for *_, kept, copy in seen)
        return step_fn(x, t)

    fm = sampler(solver, backend)
    states, times = fm.sample(BATCH, field, noise=start(), return_all_steps=True)
    out = fm.sample(BATCH, field, noise=start(), return_all_steps=all_steps, callback=callback)
    assert isinstance(out, Sample) and isinstance(out, tuple) and not out.stopped
    assert_same_bits(out.x, states if all_steps else states[:, -1])
    assert_same_bits(out.time_steps, times)
    assert [step for step, *_ in seen] == list(range(STEPS))
    for (step, t, shape, x, _), time in zip(seen, times[1:], strict=True):
        assert type(step) is int and shape == (BATCH, 1, 1) and (t == time).all()
        assert_same_bits(x, states[:, step + 1])
    wanted = fm.sample(BATCH, step_fn, noise=start())
    seen.clear()
    out = fm.sample(BATCH, checked, noise=start(), return_all_steps=all_steps, callback=callback)
    assert_same_bits(out.x[:, -1] if all_steps else out.x, wanted)
    out.x.fill_(7.0)
    assert all(same_bits(kept, copy) for *_, kept, copy in seen)
    pointers = {x.data_ptr() for *_, x, _ in seen}
    assert len(pointers) == STEPS and out.x.data_ptr() not in pointers


@pytest.mark.parametrize("constraint", [None, clamped, clamped_in_place], ids=["free", "clamped", "in place"])
@every_solver
def test_writing_to_x_in_a_callback(backend, solver, constraint):
    """Neither that, nor writing later to what was kept, changes the sampling."""
    kept = []

    def callback(step, t, x):
        kept.append(x)
        for state in kept:
            state.fill_(float("nan"))

    hooks = {} if constraint is None else {"constraint": constraint()}
    wanted = eager(solver, start(), **hooks)
    for all_steps in (False, True):
        for mode in (torch.no_grad, torch.inference_mode):
            kept.clear()
            with mode():
                out = sampler(solver, backend).sample(
                    BATCH, field, noise=start(), return_all_steps=all_steps, callback=callback, **hooks
                )
                assert_same_bits(out.x, wanted if all_steps else wanted[:, -1])


def test_a_callback_sees_the_constrained_state(backend):
    seen = []
    states = eager("heun", start(), constraint=clamped())
    sampler("heun", backend).sample(
        BATCH, field, noise=start(), constraint=clamped(), callback=lambda step, t, x: seen.append(x)
    )
    assert_same_bits(torch.stack([start(), *seen], dim=1), states)


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_true_stops(backend, solver, after):
    """After so many steps: no more calls, and the result is as long as it says."""
    calls = []

    def step_fn(x, t):
        calls.append(t)
        return field(x, t)

    fm = sampler(solver, backend)
    evaluations = fm.nfe(after) if solver != "ab3" else after + 1
    for dtype, hooks in ((torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"constraint": clamped()})):
        noise = start(dtype)
        states, times = fm.sample(BATCH, field, noise=noise, return_all_steps=True, **hooks)
        for all_steps in (False, True):
            calls.clear()
            out = fm.sample(
                BATCH, step_fn, noise=noise, return_all_steps=all_steps,
                callback=lambda step, t, x: step + 1 == after, **hooks,
            )  # fmt: skip
            assert out.stopped is True
            assert len(calls) == evaluations
            assert_same_bits(out.time_steps, times[: after + 1])
            assert_same_bits(out.x, states[:, : after + 1] if all_steps else states[:, after])
            assert out.x.is_contiguous() and out.time_steps.is_contiguous()
            if all_steps:  # and holds no more memory than that
                assert out.x.untyped_storage().nbytes() == out.x.numel() * out.x.element_size()


def test_a_solver_whose_last_step_differs_stops_on_its_way():
    """dpmpp_2m stopped after three of six steps is at the third state of six, not at the last of three."""
    fm = sampler("dpmpp_2m")
    states, _ = fm.sample(BATCH, field, noise=start(), return_all_steps=True)
    out = fm.sample(BATCH, field, noise=start(), callback=lambda step, t, x: step == 2)
    assert_same_bits(out.x, states[:, 3])


@pytest.mark.parametrize("answer", [None, False])
def test_going_on(answer):
    out = sampler().sample(BATCH, field, noise=start(), callback=lambda step, t, x: answer)
    assert out.stopped is False
    assert_same_bits(out.x, eager("euler", start())[:, -1])
    assert_same_bits(out.time_steps, TIMES)


def test_true_at_the_last_step_is_not_stopping():
    for all_steps in (False, True):
        out = sampler().sample(
            BATCH, field, noise=start(), return_all_steps=all_steps, callback=lambda step, t, x: step == STEPS - 1
        )
        assert out.stopped is False
        wanted = eager("euler", start())
        assert_same_bits(out.x, wanted if all_steps else wanted[:, -1])
        assert_same_bits(out.time_steps, TIMES)


def test_no_steps_call_no_hook():
    fm = FlowMatching(DIMS, num_inference_steps=0)
    out = fm.sample(BATCH, field, noise=start(), constraint=lambda x, t: 1 / 0, callback=lambda *a: 1 / 0)
    assert out.stopped is False and out.time_steps.tolist() == [0.0]
    assert_same_bits(out.x, start())
    out = fm.sample(BATCH, field, noise=start(), return_all_steps=True, callback=lambda *a: 1 / 0)
    assert_same_bits(out.x, start()[:, None])


@pytest.mark.parametrize("answer", [1, 0, "stop", 0.0, torch.tensor(True), [], StopIteration], ids=repr)
def test_another_answer(backend, answer):
    fm, calls = sampler(backend=backend), []
    with pytest.raises(TypeError, match=r"callback must return True to stop, or None or False to go on, got .*\("):
        fm.sample(BATCH, field, noise=start(), callback=lambda *a: (calls.append(a), answer)[1])
    assert len(calls) == 1
    assert_same_bits(fm.sample(BATCH, field, noise=start()), eager("euler", start())[:, -1])


def test_a_result_by_any_name():
    """Sample unpacks like the pair that return_all_steps gives without a callback, and one entry more."""
    x, time_steps, stopped = sampler().sample(BATCH, field, callback=lambda *a: None)
    assert x.shape == (BATCH, *DIMS) and time_steps.shape == (STEPS + 1,) and stopped is False
    assert Sample._fields == ("x", "time_steps", "stopped")
    assert isinstance(sampler().sample(BATCH, field), torch.Tensor)
    assert type(sampler().sample(BATCH, field, return_all_steps=True)) is tuple


def test_sampling_within_a_callback(backend):
    """And within a constraint and a step_fn: no shared state."""
    inner = []

    def callback(step, t, x):
        inner.append(sampler("ab2", backend).sample(BATCH, field, noise=start(), callback=lambda s, t, x: s == 2).x)

    def constraint(x, t):
        sampler("heun", backend).sample(BATCH, field, noise=x, constraint=clamped_in_place())
        return x.clamp(-0.5, 0.5)

    out = sampler("ab2", backend).sample(
        BATCH, field, noise=start(), return_all_steps=True, constraint=constraint, callback=callback
    )
    assert_same_bits(out.x, eager("ab2", start(), constraint=clamped()))
    for x in inner:
        assert_same_bits(x, eager("ab2", start())[:, 3])


def test_threads_with_hooks_of_their_own(backend):
    results, fm = {}, sampler("ab2", backend)

    def run(k):
        for _ in range(10):
            results[k] = fm.sample(
                BATCH, field, noise=start(), constraint=clamped(), callback=lambda step, t, x: step == k
            )

    threads = [threading.Thread(target=run, args=(k,)) for k in range(STEPS - 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = eager("ab2", start(), constraint=clamped())
    assert len(results) == STEPS - 1
    for k, out in results.items():
        assert_same_bits(out.x, wanted[:, k + 1])
        assert out.stopped


@pytest.mark.parametrize("end", ["stop", "raise", "all"])
def test_progress_and_a_stop(end, monkeypatch, capsys):
    """The bar is closed at once, where it stood."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm.auto, where IPython's widgets are missing
        auto = pytest.importorskip("tqdm.auto", reason="progress=True is about tqdm")
    standard = pytest.importorskip("tqdm.std").tqdm
    bars, screen = [], io.StringIO()

    class Bar(standard):
        closed = 0

        def __init__(self, *arguments, **keywords):
            bars.append(self)
            super().__init__(*arguments, **(keywords | {"file": screen, "mininterval": 0}))

        def close(self):
            self.closed += 1
            super().close()

    monkeypatch.setattr(auto, "tqdm", Bar)

    def callback(step, t, x):
        if step == 2 and end == "raise":
            raise OwnError
        return step == 2 and end == "stop"

    try:
        out = sampler("heun").sample(BATCH, field, noise=start(), progress=True, callback=callback)
    except OwnError:
        assert end == "raise"
    else:
        assert end != "raise" and out.stopped is (end == "stop")
    (bar,) = bars
    assert bar.closed
    assert f"{12 if end == 'all' else 5}/12" in screen.getvalue().rsplit("\r", 1)[-1]
    assert screen.getvalue().endswith("\n")
    assert not Bar._instances
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("when", ["always", "from the second"])
@pytest.mark.parametrize("after", [1, 3])
def test_stopping_among_tensor_subclasses(when, after):
    """Where states are a list, and where a written trajectory becomes one on the way."""
    from torch.testing._internal.two_tensor import TwoTensor

    calls = []

    def step_fn(x, t):
        calls.append(t)
        v = field(x.a if isinstance(x, TwoTensor) else x, t)
        return TwoTensor(v, v.clone()) if when == "always" or len(calls) > 1 else v

    wanted = eager("ab2", start())
    for all_steps in (False, True):
        calls.clear()
        out = sampler("ab2").sample(
            BATCH, step_fn, noise=start(), return_all_steps=all_steps, callback=lambda step, t, x: step + 1 == after
        )
        x = out.x.a if isinstance(out.x, TwoTensor) else out.x
        assert out.stopped and len(calls) == after
        assert_same_bits(x, wanted[:, : after + 1] if all_steps else wanted[:, after])
