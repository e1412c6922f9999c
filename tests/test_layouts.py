"""Noise in another dense format, as channels_last: states keep it, with the strides and the bits of the eager loop."""

import pytest
import torch
from operands import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from flowmatch_kernels import FlowMatching, inpaint, layouts

STEPS = 4
TIMES = torch.linspace(0, 1, STEPS + 1)
#: What `noise` makes: the shape, and the dimensions in the order of the memory.
FORMATS = {
    "channels_last": ((2, 3, 5, 4), (0, 2, 3, 1)),
    "one sample": ((1, 3, 5, 4), (0, 2, 3, 1)),
    "one row": ((2, 3, 1, 4), (0, 2, 3, 1)),
    "one column": ((2, 3, 5, 1), (0, 2, 3, 1)),
    "channels_last_3d": ((2, 3, 2, 5, 4), (0, 2, 3, 4, 1)),
    "transposed": ((4, 5, 3), (0, 2, 1)),
    "another order": ((2, 3, 2, 5, 4), (0, 3, 1, 4, 2)),
}
#: States contiguous, as before: contiguous to PyTorch, not dense, or not batch first.
CONTIGUOUS = {
    "one channel": lambda: noise((2, 1, 5, 4), (0, 2, 3, 1)),
    "sliced": lambda: noise((2, 3, 5, 8), (0, 2, 3, 1))[..., ::2],
    "expanded": lambda: torch.randn(2, 1, 5, 4).expand(2, 3, 5, 4),
    "batch last": lambda: noise((2, 3, 5, 4), (1, 2, 3, 0)),
    "empty": lambda: noise((0, 3, 5, 4), (0, 2, 3, 1)),
}
every_format = pytest.mark.parametrize("form", FORMATS)


def noise(shape, order, dtype=torch.float32):
    x = torch.randn([shape[k] for k in order], generator=torch.Generator().manual_seed(3)).to(dtype)
    return x.permute([order.index(k) for k in range(len(shape))])


def field(x, t):
    return torch.sin(3 * x) + t * x - (1 - t)


def other(x, t):
    return torch.cos(2 * x) - t * x


def both(x, t):
    return torch.cat([other(x, t), field(x, t)])


def eager(solver, velocity, x, constraint=None, callback=None):
    """The states as a list: `eager_loops` clones and stacks them, and so says nothing of their strides."""
    states, before = [x], None
    ones = [1] * (x.dim() - 1)
    dt = torch.diff(TIMES).double()
    for i, h in enumerate(dt):
        v = velocity(x=x, t=TIMES[i].view(1, *ones).expand(len(x), *ones))
        scaled = lambda h, v: h.to(x.dtype).view(1, *ones) * v  # noqa: B023, E731
        if solver == "euler" or i == 0:
            x = x + scaled(h, v)
        else:
            r = h / dt[i - 1]
            x = x + scaled(h * (1 + r / 2), v) + scaled(-h * r / 2, before)
        before = v
        t = TIMES[i + 1].view(1, *ones).expand(len(x), *ones)
        if constraint is not None:
            x = constraint(x, t)
        states.append(x)
        if callback is not None:
            callback(i, t, x)
    return states


class Seen:
    """A function of (x, t) that keeps the strides of x."""

    def __init__(self, function):
        self.function, self.strides = function, []

    def __call__(self, x, t):
        self.strides.append(x.stride())
        return self.function(x, t)


# Each of the noise: the arguments of sample(), those of `eager`, and what keeps the strides that it saw.
def plain(x):
    step_fn = Seen(field)
    return {"step_fn": step_fn}, {"velocity": step_fn}, [step_fn]


def guided(x):
    c, u = Seen(field), Seen(other)
    arguments = {"step_fn": c, "unguided_step_fn": u, "use_classifier_free_guidance": True}
    return arguments | {"inference_guidance_weight": 1.5}, {"velocity": lambda x, t: guide(c, u, x, t)}, [c, u]


def guide(c, u, x, t):
    v = c(x, t)
    return (1 - 1.5) * u(x, t) + 1.5 * v


def combined(x):
    fn = Seen(both)

    def velocity(x, t):
        v, u = fn(x, t).chunk(2)
        return (1 - 1.5) * u + 1.5 * v

    arguments = {"step_fn": fn, "combined_guidance": "guided_first", "use_classifier_free_guidance": True}
    return arguments | {"inference_guidance_weight": 1.5}, {"velocity": velocity}, [fn]


def hooked(x):
    step_fn, constraint, called = Seen(field), Seen(lambda x, t: x.clamp(-0.7, 0.7)), Seen(lambda x, t: None)
    callback = lambda step, t, x: called(x, t)  # noqa: E731
    hooks = {"constraint": constraint, "callback": callback}
    return {"step_fn": step_fn} | hooks, {"velocity": step_fn} | hooks, [step_fn, constraint, called]


def constrained_in_place(x):
    step_fn, constraint = Seen(field), Seen(lambda x, t: x.clamp_(-0.7, 0.7))
    return {"step_fn": step_fn, "constraint": constraint}, {"velocity": step_fn, "constraint": constraint}, [step_fn]


def inpainted(x):
    step_fn, known = Seen(field), torch.zeros_like(x)
    constraint = inpaint(known, torch.arange(x.shape[-1]) < 1, x)
    return {"step_fn": step_fn, "constraint": constraint}, {"velocity": step_fn, "constraint": constraint}, [step_fn]


WORK = {f.__name__: f for f in (plain, guided, combined, hooked, constrained_in_place, inpainted)}


@every_format
@pytest.mark.parametrize("solver", ["euler", "ab2"])
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("all_steps", [False, True], ids=["last", "all"])
def test_strides_and_bits(form, solver, work, all_steps, backend):
    x = noise(*FORMATS[form])
    before = x.clone()
    arguments, loop, seen = WORK[work](x)
    out = FlowMatching(x.shape[1:], solver, STEPS, backend=backend).sample(
        len(x), noise=x, return_all_steps=all_steps, **arguments
    )
    got = [s.strides.copy() for s in seen]
    for s in seen:
        s.strides.clear()
    wanted = eager(solver, x=x.clone(), **loop)
    assert got == [s.strides for s in seen]
    assert len(got[0]) == STEPS
    last = out if isinstance(out, torch.Tensor) else out[0]
    if all_steps:
        assert last.is_contiguous()
        assert_same_bits(last, torch.stack(wanted, dim=1))
    else:
        assert last.stride() == wanted[-1].stride()
        assert_same_bits(last, wanted[-1])
    assert_same_bits(x, before)


@pytest.mark.parametrize("form", CONTIGUOUS)
def test_contiguous_states(form, backend):
    x = CONTIGUOUS[form]()
    assert layouts.of(x) is None
    step_fn = Seen(field)
    got = FlowMatching(x.shape[1:], "ab2", STEPS, backend=backend).sample(len(x), step_fn, noise=x)
    assert set(step_fn.strides) == {torch.empty(x.shape).stride()} == {got.stride()}
    assert_same_bits(got, eager("ab2", field, x)[-1])


VELOCITIES = {
    "contiguous": lambda x, t: field(x, t).contiguous(),
    "number": lambda x, t: x.sum(),
    "double number": lambda x, t: x.double().sum(),
    "last dimension": lambda x, t: x[0, 0, 0],
    "channels": lambda x, t: x[:1, :, :1, :1],
    "batch": lambda x, t: torch.sin(x[:, :1, :1, :1]),
    "t": lambda x, t: t,
    "x": lambda x, t: x,
    "view of x": lambda x, t: x.flip(2).flip(2).detach(),
    "writes x": lambda x, t: x.mul_(0.5).clone(),
    "parameter": lambda x, t: torch.nn.Parameter(torch.sin(x)),
    "negated": lambda x, t: torch._neg_view(torch.sin(x)),
    "zero": lambda x, t: torch._efficientzerotensor(x.shape),
    "bfloat16": lambda x, t: torch.sin(x).bfloat16(),
}


@pytest.mark.parametrize("with_guidance", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_velocities(velocity, with_guidance, backend):
    """What expands, what is in another format, and what is no plain memory."""
    x, function = noise(*FORMATS["channels_last"]), VELOCITIES[velocity]
    loop = (lambda x, t: guide(function, other, x, t)) if with_guidance else function
    keywords = {"unguided_step_fn": other, "use_classifier_free_guidance": True, "inference_guidance_weight": 1.5}
    for solver in ("euler", "ab2"):
        fm = FlowMatching(x.shape[1:], solver, STEPS, backend=backend)
        got = fm.sample(len(x), function, noise=x, **(keywords if with_guidance else {}))
        with torch.no_grad():
            wanted = eager(solver, loop, x.clone())[-1]
        assert got.stride() == x.stride()
        assert_same_bits(got, wanted, solver)


def test_a_velocity_in_the_format_is_not_copied():
    """Read where it is: step by step its memory is the only new one of a step that PyTorch's profiler sees."""
    x = noise(*FORMATS["channels_last"])
    velocity = torch.randn(x.shape).to(memory_format=torch.channels_last)
    fm = FlowMatching(x.shape[1:], "euler", STEPS, backend="cpu")
    fm.sample(len(x), lambda x, t: velocity, noise=x)  # makes the table
    copies = []
    for v in (velocity, velocity.contiguous()):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fm.sample(len(x), lambda x, t, v=v: v, noise=x)
        copies.append(sum(e.count for e in profile.key_averages() if e.key in ("aten::copy_", "aten::clone")))
    assert copies[0] < copies[1]


def test_kept_states():
    """Each x that a step_fn keeps is its own."""
    x, kept = noise(*FORMATS["channels_last"]), []

    def step_fn(x, t):
        kept.append((x, x.clone()))
        return field(x, t)

    FlowMatching(x.shape[1:], "ab2", STEPS).sample(len(x), step_fn, noise=x)
    for state, then in kept:
        assert_same_bits(state, then)


EXPANDS = r"; wanted a tensor that expands to \[2, 3, 5, 4\]"
WRONG = {
    "nothing": (lambda x, t: None, f"step_fn returned None{EXPANDS}"),
    "shape": (lambda x, t: torch.zeros(2, 5, 4, 3), rf"shape \[2, 5, 4, 3\]{EXPANDS}"),
    "integers": (lambda x, t: x.int(), f"torch.int32{EXPANDS}"),
    "wider": (lambda x, t: x.double(), "would widen the state"),
    "device": (lambda x, t: x.to("meta"), f"on meta{EXPANDS}"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_name_the_shape_of_the_noise(wrong, backend):
    x = noise(*FORMATS["channels_last"])
    function, said = WRONG[wrong]
    fm = FlowMatching(x.shape[1:], backend=backend)
    with pytest.raises((TypeError, ValueError), match=said):
        fm.sample(2, function, noise=x)
    with pytest.raises((TypeError, ValueError), match=f"unguided_.*{said}"):
        fm.sample(2, field, noise=x, unguided_step_fn=function, use_classifier_free_guidance=True)
    with pytest.raises((TypeError, ValueError), match=r"doubled batch|would widen|expands to"):
        fm.sample(2, function, noise=x, combined_guidance=True, use_classifier_free_guidance=True)


def test_errors_of_a_combined_velocity_and_of_a_constraint():
    x = noise(*FORMATS["channels_last"])
    fm = FlowMatching(x.shape[1:])
    with pytest.raises(ValueError, match=r"shape \[2, 5, 1, 1\]; wanted a tensor that expands to \[2, 3, 5, 4\]"):
        fm.sample(2, lambda x, t: torch.zeros(4, 5, 1, 1), noise=x, combined_guidance=True,
                  use_classifier_free_guidance=True)  # fmt: skip
    got = fm.sample(2, lambda x, t: torch.ones(4, 3, 1, 1), noise=x, combined_guidance=True,
                    use_classifier_free_guidance=True)  # fmt: skip
    assert_same_bits(got, fm.sample(2, lambda x, t: torch.ones(2, 3, 1, 1), noise=x))
    with pytest.raises(ValueError, match=r"shape \[2, 4, 3, 5\]; wanted a tensor \[2, 3, 5, 4\]"):
        fm.sample(2, field, noise=x, constraint=lambda x, t: torch.zeros(2, 4, 3, 5))


@pytest.mark.parametrize("state", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_and_temperature(state, backend):
    x = noise(*FORMATS["channels_last"])
    arguments = {"dtype": state, "temperature": 0.7}
    fm = FlowMatching(x.shape[1:], "ab2", STEPS, backend=backend)
    step_fn = lambda x, t: torch.sin(x)  # noqa: E731
    got = fm.sample(2, step_fn, noise=x, **arguments)
    wanted = fm.sample(2, step_fn, noise=x.contiguous(), **arguments)
    assert got.stride() == x.stride()
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("form", [*FORMATS, *CONTIGUOUS])
def test_a_scaled_noise(form, backend):
    """A temperature makes a new tensor with the noise's strides: the state is contiguous all the same."""
    x = noise(*FORMATS[form]) if form in FORMATS else CONTIGUOUS[form]()
    fm = FlowMatching(x.shape[1:], "ab2", STEPS, backend=backend)
    w = torch.ones((), requires_grad=True)

    def sampled(noise=x, **options):
        return fm.sample(len(x), lambda x, t: w * torch.sin(x), noise=noise, temperature=0.5, **options)

    wanted = sampled(x.contiguous())
    assert_same_bits(sampled(), wanted)
    assert sampled(inference_step=0).stride() == fm.sample(len(x), field, noise=x).stride()
    derived = sampled(differentiable=True)
    assert_same_bits(derived.detach(), wanted)
    assert len(x) == 0 or torch.autograd.grad(derived.sum(), w)[0] != 0
    torch._dynamo.reset()
    if len(x):
        assert_same_bits(torch.compile(sampled, backend="eager")(), wanted)


def test_derivatives_of_what_is_seen():
    """Of a callback's states and of log-probabilities, in each format."""
    gradients = []
    for form in (torch.contiguous_format, torch.channels_last):
        w = torch.tensor(0.7, requires_grad=True)
        x = noise(*FORMATS["channels_last"]).contiguous(memory_format=form)
        kept = []
        arguments = {"noise": x, "differentiable": True}
        fm = FlowMatching(x.shape[1:], "euler", STEPS)
        fm.sample(2, lambda x, t, w=w: w * x, callback=lambda k, t, x, kept=kept: kept.append(x), **arguments)
        fm = FlowMatching(x.shape[1:], "sde", STEPS)
        z = torch.ones(2, STEPS, *x.shape[1:])
        log_prob = fm.sample(2, lambda x, t, w=w: w * x, step_noise=z, return_log_prob=True, **arguments)[1]
        assert log_prob.requires_grad
        losses = kept[-1].sum(), kept[0].sum(), log_prob.sum()
        gradients.append([torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses])
    torch.testing.assert_close(*map(torch.stack, gradients), rtol=1e-5, atol=1e-5)  # sums in another order
    assert gradients[0][0] != 0 != gradients[0][1]


def test_the_result_is_no_view_to_autograd():
    x = noise(*FORMATS["channels_last"])
    got = FlowMatching(x.shape[1:]).sample(2, field, noise=x)
    assert not got._is_view() and not got.requires_grad
    got.mul_(torch.ones(1, requires_grad=True))  # raises for a view made where no gradients are recorded
    assert got.grad_fn is not None


@pytest.mark.parametrize("all_steps", [False, True], ids=["last", "all"])
def test_modes(all_steps):
    x = noise(*FORMATS["channels_last"])
    fm = FlowMatching(x.shape[1:], "ab2", STEPS)

    def run(x):
        out = fm.sample(2, field, x.device, noise=x, return_all_steps=all_steps)
        return out[0] if all_steps else out

    wanted = run(x)
    with torch.inference_mode():
        got = run(x)
    assert got.stride() == wanted.stride()
    assert_same_bits(got, wanted)
    with FakeTensorMode() as mode:
        got = run(mode.from_tensor(x))
    assert (got.shape, got.stride()) == (wanted.shape, wanted.stride())
    got = run(x.to("meta"))
    assert (got.shape, got.stride()) == (wanted.shape, wanted.stride())
    noises = torch.stack([x, -x])
    assert_same_bits(torch.func.vmap(run)(noises), torch.stack([run(n) for n in noises]))


#: By default the state where its format is harder to keep: where sizes and strides are symbols.
COMPILED = [
    pytest.param(False, True, id="last-dynamic"),
    pytest.param(True, False, id="all-static"),
    pytest.param(False, False, id="last-static", marks=pytest.mark.full),
    pytest.param(True, True, id="all-dynamic", marks=pytest.mark.full),
]


@pytest.mark.parametrize("all_steps, dynamic", COMPILED)
def test_compiled(all_steps, dynamic):
    x = noise(*FORMATS["channels_last"])
    fm = FlowMatching(x.shape[1:], "ab2", STEPS)

    def run(x):
        return fm.sample(2, lambda x, t: x * 0.5, noise=x, return_all_steps=all_steps)

    torch._dynamo.reset()
    wanted, got = run(x), torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)(x)
    if all_steps:
        wanted, got = wanted[0], got[0]
    assert got.stride() == wanted.stride()
    assert_same_bits(got, wanted)
