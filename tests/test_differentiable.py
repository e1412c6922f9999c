"""The derivative of sample(): that of the loop where it is asked for, an error where it would be lost in silence."""

import itertools

import pytest
import torch
from operands import assert_same_bits
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from flowmatch_kernels import DDIM, DDPM, FlowMatching, StepFunction, inpaint, solvers

STEPS = 4
Z, W = torch.randn(3, 2), torch.randn(2, 2)


def loop(z, w, guidance=None):
    """The published loop."""
    t, x = torch.linspace(0, 1, STEPS + 1), z
    for k in range(STEPS):
        v = torch.tanh(x @ w) * (1 - t[k])
        if guidance is not None:
            v = (1 - guidance) * -x + guidance * v
        x = x + (t[k + 1] - t[k]).view(1, 1) * v
    return x


def sampled(z, w, guidance=None, differentiable=True, **arguments):
    if guidance is not None:
        arguments |= {"unguided_step_fn": lambda x, t: -x, "use_classifier_free_guidance": True}
        arguments |= {"inference_guidance_weight": guidance}
    return FlowMatching(2, num_inference_steps=STEPS).sample(
        z.shape[0],
        lambda x, t: torch.tanh(x @ w) * (1 - t),
        noise=z,
        differentiable=differentiable,
        **arguments,
    )


DERIVATIVES = {
    "grad": lambda f: grad(lambda z: f(z, W).square().sum())(Z),
    "jacrev": lambda f: jacrev(lambda z: f(z, W))(Z),
    "jacfwd": lambda f: jacfwd(lambda z: f(z, W))(Z),
    "hessian": lambda f: hessian(lambda z: f(z, W).square().sum())(Z),
    "jvp": lambda f: jvp(lambda z: f(z, W), (Z,), (Z + 1,))[1],
    "of parameters": lambda f: grad(lambda w: f(Z, w).square().sum())(W),
    "jvp of parameters": lambda f: jvp(lambda w: f(Z, w), (W,), (W + 1,))[1],
    "vmap of grad": lambda f: vmap(grad(lambda z: f(z[None], W).sum()))(Z),
    "compiled": lambda f: torch.compile(grad(lambda z: f(z, W).sum()), backend="eager", fullgraph=True)(Z),
    "compiled, jvp": lambda f: torch.compile(lambda z: jvp(lambda z: f(z, W), (z,), (z,))[1], backend="eager")(Z),
}


@pytest.mark.filterwarnings("ignore")  # a performance warning of vmap
@pytest.mark.parametrize("guidance", [None, 1.5])
def test_torch_func(guidance):
    for name, derivative in DERIVATIVES.items():
        torch._dynamo.reset()
        wanted = derivative(lambda z, w: loop(z, w, guidance))
        assert wanted.any(), name
        assert_same_bits(derivative(lambda z, w: sampled(z, w, guidance)), wanted)
        # A result that is asked to be a constant has none.
        assert not derivative(lambda z, w: sampled(z, w, guidance, differentiable=False)).any(), name


@pytest.mark.parametrize("name", DERIVATIVES)
def test_no_zero_in_silence(name):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"differentiable=True|raised exception ValueError"):
        DERIVATIVES[name](lambda z, w: sampled(z, w, differentiable=None))


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_autograd(backend, guidance):
    """With respect to the noise and the model, for every backend; in the caller's grad mode."""
    gradients = []
    for function in (loop, lambda *arguments: sampled(*arguments, backend=backend)):
        z, w = Z.clone().requires_grad_(), W.clone().requires_grad_()
        function(z, w, guidance).square().sum().backward()
        gradients.append((z.grad, w.grad))
    for wanted, got in zip(*gradients, strict=True):
        assert_same_bits(got, wanted)
    with torch.no_grad():
        assert not sampled(Z.clone().requires_grad_(), W, guidance, backend=backend).requires_grad


@pytest.mark.parametrize("int_method", sorted(solvers.SOLVERS))
def test_every_solver(backend, int_method):
    """Against finite differences; the gradient of a backend has the bits of that of plain PyTorch."""
    fm = FlowMatching(2, int_method, num_inference_steps=STEPS)

    def all_steps(z, backend):
        # Away from t = 1, where dpmpp_2m remembers v / (1 - t).
        step_fn = lambda x, t: torch.tanh(x @ W.to(x.dtype)) * (1 - 0.9 * t)  # noqa: E731
        return fm.sample(3, step_fn, noise=z, differentiable=True, backend=backend, return_all_steps=True)[0]

    assert torch.autograd.gradcheck(lambda z: all_steps(z, backend), Z.double().requires_grad_())
    gradients = []
    for name in (backend, "reference"):
        z = Z.clone().requires_grad_()
        all_steps(z, name).square().sum().backward()
        gradients.append(z.grad)
    assert_same_bits(*gradients)


def test_constraint_and_temperature(backend):
    """They are part of the derivative."""
    known, mask = torch.randn(3, 2), torch.tensor([True, False])
    fm = FlowMatching(2, num_inference_steps=STEPS)

    def run(z):
        hooks = {"constraint": inpaint(known, mask, Z), "callback": lambda step, t, x: None}
        more = {"differentiable": True, "backend": backend, "temperature": 0.5}
        return fm.sample(3, lambda x, t: torch.tanh(x), noise=z, **hooks, **more)[0]

    z = Z.double().requires_grad_()
    assert torch.autograd.gradcheck(run, z)
    run(z).sum().backward()
    assert not z.grad[:, 0].any()
    assert z.grad[:, 1].all()


def test_dual_tensors():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Z, torch.ones_like(Z))
        wanted = forward_ad.unpack_dual(loop(dual, W)).tangent
        assert_same_bits(forward_ad.unpack_dual(sampled(dual, W)).tangent, wanted)
        assert forward_ad.unpack_dual(sampled(dual, W, differentiable=False)).tangent is None
        with pytest.raises(ValueError, match="differentiable=True"):
            sampled(dual, W, differentiable=None)
        with pytest.raises(ValueError, match="differentiable=True"):
            sampled(Z, forward_ad.make_dual(W, W), differentiable=None)
        with pytest.raises(RuntimeError, match="'cpu' was asked for and cannot be used"):
            sampled(dual, W, backend="cpu")


NO_DERIVATIVE = {
    "time_steps": (torch.linspace(0, 1, STEPS + 1), lambda value: {"time_steps": value}),
    "time_steps, in a list": (torch.tensor(0.3), lambda value: {"time_steps": [0.0, value, 0.5, 0.7, 1.0]}),
    "step_sizes": (torch.full((STEPS,), 0.25), lambda value: {"step_sizes": value}),
    "temperature": (torch.tensor(0.5), lambda value: {"temperature": value}),
    "inference_guidance_weight": (torch.tensor(1.5), lambda value: {"weight": value}),
    "inference_guidance_weight, in a list": (torch.tensor(1.5), lambda value: {"weight": [value, 1.0, 1.0, value]}),
    "inference_guidance_weight, in lists": (torch.tensor(1.5), lambda value: {"weight": [[value]] * len(Z)}),
    r"what inference_guidance_weight\(t\) returned": (torch.tensor(1.5), lambda value: {"weight": lambda t: t * value}),
    "eta": (torch.tensor(0.5), lambda value: {"int_method": "sde", "int_method_options": {"eta": value}}),
    "step_noise": (torch.ones(len(Z), STEPS, *Z.shape[1:]), lambda value: {"int_method": "sde", "step_noise": value}),
}


@pytest.mark.parametrize("name", NO_DERIVATIVE)
def test_what_has_no_derivative(name):
    """Of times, step sizes, weights, options and the like there is none: an error, by autograd and by torch.func."""
    value, arguments = NO_DERIVATIVE[name]

    def run(value, **options):
        given = arguments(value) | options
        return sampled(Z, W, given.pop("weight", 1.5), **given)

    assert run(value).isfinite().all()
    constant = run(value.clone().requires_grad_(), differentiable=False)
    assert not constant.requires_grad
    if name != "step_noise" and "eta" not in name:  # whose noise is drawn
        assert_same_bits(constant, run(value, differentiable=False))
    assert torch.is_grad_enabled()
    for derivative in (
        lambda value: run(value.clone().requires_grad_()),
        grad(lambda value: run(value).sum()),
        lambda value: jvp(run, (value,), (value,)),
    ):
        with pytest.raises(ValueError, match=f"{name.split(',')[0]} requires grad"):
            derivative(value)


def test_what_has_no_derivative_elsewhere():
    """The constructor's weight and options, and the times of a log-probability."""
    w = torch.tensor(1.5, requires_grad=True)
    with pytest.raises(ValueError, match="inference_guidance_weight requires grad"):
        FlowMatching(Z.shape[1:], inference_guidance_weight=w)
    fm = FlowMatching(Z.shape[1:], use_classifier_free_guidance=True)
    fm.inference_guidance_weight = w
    with pytest.raises(ValueError, match="inference_guidance_weight requires grad"):
        fm.sample(len(Z), lambda x, t: x, unguided_step_fn=lambda x, t: -x, noise=Z, differentiable=True)
    with pytest.raises(ValueError, match="eta requires grad"):
        FlowMatching(Z.shape[1:], "sde", int_method_options={"eta": w})
    fm = FlowMatching(Z.shape[1:], "sde", 2)
    for name, made in {
        "shift": lambda: FlowMatching(Z.shape[1:], time_grid="shifted", time_grid_options={"shift": w}),
        "eta": lambda: DDIM(Z.shape[1:], eta=w / 2),
        "beta_end": lambda: DDPM(Z.shape[1:], beta_end=w / 2),
        "clip_sample_range": lambda: DDPM(Z.shape[1:], clip_sample_range=w),
        "time_scale": lambda: StepFunction(lambda x, t: x, time_scale=w),
        "what time_grid returned": lambda: FlowMatching(
            Z.shape[1:], time_grid=lambda n: torch.linspace(0, 1, n + 1) * w
        ).sample(len(Z), lambda x, t: x, noise=Z),
    }.items():
        with pytest.raises(ValueError, match=f"{name} requires grad"):
            made()
    with pytest.raises(ValueError, match="time_steps requires grad"):
        fm.step_log_prob(Z, Z, Z + 0.1, 0, time_steps=torch.tensor([0.1, 0.5, 0.9], requires_grad=True))
    for made in (DDIM(Z.shape[1:], 3, eta=1.0), DDPM(Z.shape[1:], 3)):
        z = torch.ones(len(Z), 3, *Z.shape[1:], requires_grad=True)
        with pytest.raises(ValueError, match="step_noise requires grad"):
            made.sample(len(Z), lambda x, t: x, noise=Z, step_noise=z, differentiable=True)


def test_noise_that_requires_grad():
    """With grad on it asks for a derivative; under no_grad it is a tensor like any other."""
    noise = Z.clone().requires_grad_()
    for kind in (noise, torch.nn.Parameter(Z.clone())):
        with pytest.raises(ValueError, match=r"noise requires grad.*differentiable=True"):
            sampled(kind, W, differentiable=None)
        with torch.no_grad():
            assert_same_bits(sampled(kind, W, differentiable=None), sampled(Z, W, differentiable=None))
        assert not sampled(kind, W, differentiable=False).requires_grad


def test_bits_are_those_of_a_constant(backend):
    """differentiable=True changes no value."""
    for int_method, all_steps in itertools.product(sorted(solvers.SOLVERS), (False, True)):
        arguments = {"int_method": int_method, "return_all_steps": all_steps, "backend": backend}
        got, wanted = (sampled(Z, W, 1.5, differentiable, **arguments) for differentiable in (True, False))
        if all_steps:
            got, wanted = got[0], wanted[0]
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("int_method", ["euler", "heun", "ab3"])
@pytest.mark.parametrize("start", [0, 2])
def test_a_derivative_that_begins_late(backend, int_method, start):
    """Rows that write in place go on with the op at the first velocity, or constraint, that has a derivative."""
    fm = FlowMatching(2, int_method, num_inference_steps=STEPS)

    def run(w, whose, transposed, backend, guided):
        calls, kept = [], []

        def weight(who):
            return w if who == whose and len(calls) > start else w.detach()

        def step_fn(x, t):
            calls.append(t)
            kept.append(x)
            v = torch.tanh(x @ weight("guided"))
            return v.T.contiguous().T if transposed else v  # then what is remembered is not contiguous either

        arguments = {"constraint": lambda x, t: x * weight("constraint").sum()}
        if guided:
            arguments |= {
                "unguided_step_fn": lambda x, t: -x @ weight("unguided"),
                "use_classifier_free_guidance": True,
            }
        states, _ = fm.sample(
            3, step_fn, noise=Z, differentiable=True, return_all_steps=True, backend=backend, **arguments
        )
        return states, kept

    for whose, transposed in itertools.product(("guided", "unguided", "constraint"), (False, True)):
        case, found = (whose, transposed), []
        guided = whose != "constraint"
        for name in (backend, "reference"):
            w = W.clone().requires_grad_()
            states, kept = run(w, *case, name, guided)
            states.square().sum().backward()
            found.append((states.detach(), w.grad, torch.stack([x.detach() for x in kept])))
            with torch.no_grad():
                assert_same_bits(run(w, *case, name, guided)[0], states.detach())
        for got, wanted in zip(*found, strict=True):
            assert_same_bits(got, wanted)
    constant, kept = run(W, "guided", False, backend, True)
    assert not constant.requires_grad and not any(x.requires_grad for x in kept)


def test_second_derivative(backend):
    w = W.double().requires_grad_()
    fm = FlowMatching(2, "ab2", num_inference_steps=STEPS, backend=backend)
    run = lambda z, w: fm.sample(3, lambda x, t: torch.tanh(x @ w), noise=z, differentiable=True)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (Z.double().requires_grad_(), w))


def test_bad_flag():
    with pytest.raises(TypeError, match="differentiable must be True or False, got 'yes'"):
        sampled(Z, W, differentiable="yes")


def test_the_op_refuses_tangents():
    """Which PyTorch would drop, and say that the derivative is zero."""
    table = torch.tensor([[1.0, 0.5, 0, 0, 0, 0, 0, 0]])
    op, op_ = torch.ops.flowmatch_kernels.fused_step, torch.ops.flowmatch_kernels.fused_step_
    x, h = torch.zeros(2, 3), torch.ones(2, 3)

    def step(base=x, v=h, history=None):
        return op(base, v, None, history, None, None, table, 0)

    def step_(v):
        op_(torch.empty(2, 3), x, v, None, None, None, None, table, 0)
        return v

    def dual(function):
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(h, h))

    def compiled(function, backend):
        torch._dynamo.reset()
        return torch.compile(function, backend=backend)

    for derivative in {
        "jvp of v": lambda: jvp(lambda v: step(v=v), (h,), (h,)),
        "jvp of base": lambda: jvp(lambda base: step(base=base), (h,), (h,)),
        "jvp of history": lambda: jvp(lambda history: step(history=history), (h,), (h,)),
        "jvp of a tensor that requires grad": lambda: jvp(lambda v: step(v=v), (h.clone().requires_grad_(),), (h,)),
        "jacfwd": lambda: jacfwd(lambda v: step(v=v))(h),
        "vmap of jvp": lambda: vmap(lambda v: jvp(lambda v: step(v=v), (v,), (v,)))(torch.ones(2, 2, 3)),
        "dual": lambda: dual(lambda v: step(v=v)),
        "of a compiled function": lambda: jvp(compiled(step, "eager"), (x, h), (x, h)),
        "of a compiled function, AOT": lambda: jvp(compiled(step, "aot_eager"), (x, h), (x, h)),
        "compiled, jvp": lambda: compiled(lambda v: jvp(lambda v: step(v=v), (v,), (v,))[1], "eager")(h),
        "in place, jvp": lambda: jvp(step_, (h,), (h,)),
        "in place, of a compiled function": lambda: jvp(compiled(step_, "eager"), (h,), (h,)),
        "in place, dual": lambda: dual(step_),
    }.values():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            derivative()
    assert torch.equal(jvp(lambda w: w * step(), (h,), (h,))[1], step())  # a constant beside what is derived


@pytest.mark.parametrize("requires_grad", ["noise", "model"])
def test_plain_pytorch_on_a_cpu(requires_grad):
    """Where a derivative is kept and no backend was asked for by name. The bits: `test_every_solver`."""
    for backend, is_op in (("auto", False), ("cpu", True), ("reference", False)):
        z = torch.ones(2, 2, 3).requires_grad_(requires_grad == "noise")
        w = torch.ones(3).requires_grad_(requires_grad == "model")
        x = FlowMatching((2, 3), "ab2", backend=backend).sample(
            2, lambda x, t, w=w: w * x, noise=z, differentiable=True
        )
        assert ("_DifferentiableBackward" in graph_of(x)) == is_op, backend


def graph_of(x):
    """The names of the nodes of x's graph."""
    nodes, left = set(), [x.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            left += [one for one, _ in node.next_functions]
    return {node.name() for node in nodes}
