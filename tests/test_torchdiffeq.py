"""`integrations.torchdiffeq.odeint` against torchdiffeq's, to the last bit."""

import itertools

import pytest
import torch
from operands import assert_same_bits

torchdiffeq = pytest.importorskip("torchdiffeq", reason="the oracle is torchdiffeq itself, of the test extra")

from flowmatch_kernels.integrations import torchdiffeq as ours  # noqa: E402
from flowmatch_kernels.ops import dispatch  # noqa: E402

F32, F64 = torch.float32, torch.float64
TIMES = {
    "even": torch.linspace(0, 1, 6),
    "down": torch.linspace(1, 0.2, 6),
    "uneven": torch.tensor([0.0, 0.1, 0.35, 0.8, 1.0]),
    "two": torch.tensor([0.0, 1.0]),
    "two down": torch.tensor([1.0, 0.0]),
}


def func(t, y):
    assert t.dim() == 0
    assert t.dtype == y.dtype
    return torch.sin(3 * y) * 1.3 + t * y - (1 - t)


def same(y0, t, method, options=None, function=func):
    seen = [[], []]

    def watched(k):
        def call(t, y):
            seen[k].append((t.clone(), y.clone()))
            return function(t, y)

        return call

    got = ours.odeint(watched(0), y0, t, method=method, options=options)
    wanted = torchdiffeq.odeint(watched(1), y0, t, method=method, options=options)
    what = f"{method} {options} {t.tolist()}"
    assert_same_bits(got, wanted, what)
    assert got.is_contiguous()
    for mine, their in zip(*seen, strict=True):
        for x, y in zip(mine, their, strict=True):
            assert_same_bits(x, y, what)
    return got


def halved(t):
    """Each interval of t in two."""
    return torch.cat([torch.stack([t[:-1], (t[:-1] + t[1:]) / 2], 1).flatten(), t[-1:]])


@pytest.mark.parametrize("method", ours.METHODS)
def test_bits(method, monkeypatch):
    """States, and what func is called with: shapes, dtypes, times up and down, and step sizes."""
    monkeypatch.setattr(ours, "_published", None)
    sizes = [None, {"step_size": 0.05}, {"step_size": 0.13}, {"grid_constructor": lambda f, y, t: halved(t)}]
    cases = [*itertools.product([(5, 3), (2, 3, 4), (0, 3)], [F32, F64])]
    cases += itertools.product([(5, 3), (1,)], [torch.bfloat16, torch.float16])
    for shape, dtype in cases:
        y0 = torch.randn(shape, dtype=dtype)
        kept = y0.clone()
        for t, options, its in itertools.product(TIMES.values(), sizes, [F32, F64]):
            same(y0, t.to(its), method, options)
        assert_same_bits(y0, kept)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends(backend):
    if reason := dispatch.BACKENDS[backend].unavailable("cpu"):
        pytest.skip(reason)
    with dispatch.use_backend(backend), torch.no_grad():
        for method in ours.METHODS:
            for dtype in (F32, torch.bfloat16, torch.float16):
                same(torch.randn(4, 6, dtype=dtype), TIMES["even"], method)
            same(torch.randn(40_000), TIMES["two"], method, {"step_size": 0.25})


@pytest.mark.parametrize("method", ours.METHODS)
def test_gradients(method):
    """Of y0 and of a parameter, float64, against torchdiffeq's own and against finite differences."""
    weight = torch.tensor(0.7, dtype=F64, requires_grad=True)
    gradients = []
    y0 = torch.randn(3, 2, dtype=F64, requires_grad=True)
    for odeint in (ours.odeint, torchdiffeq.odeint):
        result = odeint(lambda t, y: weight * torch.sin(y) + t, y0, TIMES["even"].double(), method=method)
        gradients.append(torch.autograd.grad((result**2).sum(), (y0, weight)))
    for got, wanted in zip(*gradients, strict=True):  # the order in which a derivative is summed is not the contract's
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda y: ours.odeint(lambda t, x: weight.detach() * torch.sin(x) + t, y, TIMES["two"].double(), method=method),
        y0,
    )


def test_handed_on(monkeypatch):
    """What is torchdiffeq's to do is done by it, and nothing else."""
    calls = []

    def spy(*arguments, **keywords):
        calls.append(arguments)
        return torchdiffeq.odeint(*arguments, **keywords)

    monkeypatch.setattr(ours, "_published", type("Spy", (), {"odeint": staticmethod(spy)}))
    y, t = torch.randn(3, 2), TIMES["even"]

    class Watching(torch.nn.Module):
        def forward(self, t, y):
            return -y

        def callback_step(self, t, y, dt):
            pass

    needing = t.clone().requires_grad_()
    handed = [
        lambda odeint: odeint(func, y, t),
        lambda odeint: odeint(func, y, t, method="dopri5"),
        lambda odeint: odeint(func, y[0, 0], t, method="euler"),
        lambda odeint: odeint(func, y, t, method="explicit_adams"),
        lambda odeint: odeint(lambda t, y: -y, y + 1j, t, method="euler").imag,
        lambda odeint: odeint(lambda t, y: (-y[0],), (y,), t, method="rk4")[0],
        lambda odeint: odeint(func, y, t, method="rk4", options={"interp": "cubic", "step_size": 0.15}),
        lambda odeint: odeint(func, y, t, method="rk4", options={"perturb": True}),
        lambda odeint: odeint(Watching(), y, t, method="euler"),
        lambda odeint: odeint(func, y, needing, method="euler").detach(),
        lambda odeint: odeint(lambda t, y: func(t, y).bfloat16(), y, t, method="rk4"),
    ]
    for k, call in enumerate(handed, start=1):
        assert_same_bits(call(ours.odeint), call(torchdiffeq.odeint))
        assert len(calls) == k
    ours.odeint(func, y, t, method="euler")
    assert len(calls) == len(handed)


def test_errors():
    y, t = torch.randn(3, 2), TIMES["even"]
    with pytest.raises(TypeError, match=r"func returned torch.bfloat16; wanted y0's dtype, torch.float32"):
        ours.odeint(lambda t, y: y.bfloat16() if t else y, y, t, method="rk4")
    with pytest.raises(ValueError, match="step_size and grid_constructor are both given"):
        ours.odeint(func, y, t, method="rk4", options={"step_size": 0.1, "grid_constructor": lambda f, y, t: t})
    with pytest.raises(ValueError, match="grid_constructor must begin and end with t"):
        ours.odeint(func, y, t, method="rk4", options={"grid_constructor": lambda f, y, t: t[1:]})
    with pytest.raises(ValueError, match="returned a tensor of shape"):
        ours.odeint(lambda t, y: y[:, :1].expand(3, 7), y, t, method="euler")
    with pytest.raises(AssertionError, match="strictly"):  # torchdiffeq's own
        ours.odeint(func, y, torch.tensor([0.0, 0.5, 0.3]), method="euler")


def test_other_names_are_torchdiffeqs():
    assert ours.odeint is not torchdiffeq.odeint
    assert ours.odeint_adjoint is torchdiffeq.odeint_adjoint
    assert ours.odeint_event is torchdiffeq.odeint_event
    with pytest.raises(AttributeError, match="no_such_name"):
        ours.no_such_name  # noqa: B018
