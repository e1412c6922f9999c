"""The log-probability of a step: bits on every backend and in any batch, accuracy, gradients, what watches, errors."""

import itertools
import math
from pathlib import Path

import interpreted
import pytest
import torch
from log_prob_operands import PAIRS, SIZES, alone, drawn, own_tables, tables
from operands import LAYOUTS, Guarded, assert_same_bits, laid_out
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from bench import static
from flowmatch_kernels import use_backend
from flowmatch_kernels.ops import dispatch, native
from flowmatch_kernels.ops.fused_step import VELOCITY_DTYPES, dense
from flowmatch_kernels.ops.reference_log_prob import step_log_prob as reference
from flowmatch_kernels.ops.step_log_prob import LANES

CASES = Path(__file__).with_name("log_prob_interpreter_cases.py")
BACKENDS = ["cpu", "reference"]
OP = torch.ops.flowmatch_kernels.step_log_prob

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
one_row_or_own = pytest.mark.parametrize("own_rows", [False, True], ids=["one row", "own rows"])


def by_definition(base, v, next, coefficients, densities, row):
    """The contract, element by element, in Python's floats: float64 only."""
    own_rows = coefficients.dim() == 3
    out = []
    for b, (x, h, y) in enumerate(zip(*(t.reshape(t.shape[0], -1).tolist() for t in (base, v, next)), strict=True)):
        a, b0, *_ = (coefficients[row, b] if own_rows else coefficients[row]).tolist()
        scale, offset = (densities[row, b] if own_rows else densities[row]).tolist()
        lanes = [0.0] * LANES
        for i in range(len(x)):
            d = 0.0 if own_rows and scale == 0.0 else y[i] - (a * x[i] + b0 * h[i])
            lanes[i % LANES] = lanes[i % LANES] + d * d
        width = LANES
        while width > 1:
            width //= 2
            lanes = [lanes[j] + lanes[j + width] for j in range(width)]
        out.append(lanes[0] / len(x) * scale + offset)
    return torch.tensor(out, dtype=torch.float64)


# ---- the bits ----


@on_each_backend
@one_row_or_own
def test_definition(backend, own_rows):
    for n in SIZES:
        operands = drawn([3, n], torch.float64, torch.float64, seed=n, own_rows=own_rows)
        assert_same_bits(dispatch.step_log_prob(*operands, 1, backend), by_definition(*operands, 1), n)


@pytest.mark.parametrize("level", [0, 1, 2], ids=["SSE2", "AVX2", "AVX-512"])
@pytest.mark.parametrize("state, velocity", PAIRS, ids=str)
def test_instruction_sets(state, velocity, level):
    """Each loop of csrc/step_log_prob_cpu.cpp, into guarded NaN; a machine without one takes the next narrower."""
    for n in SIZES:
        for samples in (1, 2, 5):
            for special, own_rows in ((False, False), (True, False), (True, True)):
                base, v, next, coefficients, densities = drawn([samples, n], state, velocity, special, n, own_rows)
                out = Guarded([samples], coefficients.dtype)
                addresses = (x.data_ptr() for x in (out.tensor, base, v, next, coefficients[1], densities[1]))
                dtypes = native.DTYPES[state], native.DTYPES[velocity]
                native._C.step_log_prob(*addresses, *dtypes, samples, n, own_rows, level=level)
                assert out.intact()
                wanted = reference(base, v, next, coefficients, densities, 1)
                assert_same_bits(out.tensor, wanted, f"{samples} x {n}, special={special}, own_rows={own_rows}")


@on_each_backend
def test_infinite_coefficients(backend):
    """What stands behind a sample's last element does not count, not even as a product with 0."""
    base, v, next, coefficients, densities = drawn([2, 5], torch.float32, torch.float32)
    coefficients[0, 0] = math.inf
    got = dispatch.step_log_prob(base, v, next, coefficients, densities, 0, backend)
    assert_same_bits(got, torch.full([2], -math.inf))


@on_each_backend
def test_layouts(backend):
    """base, v and next each in every layout, as the values they hold."""
    for shape in ((4, 31), (2, 3, 8, 9)):
        operands = drawn(shape, torch.float32, torch.bfloat16)
        for layout in LAYOUTS:
            for k in range(3):
                given = list(operands)
                given[k] = laid_out(given[k], layout)
                if given[k] is None:
                    continue
                wanted = list(operands)
                wanted[k] = given[k].clone(memory_format=torch.contiguous_format)
                assert_same_bits(dispatch.step_log_prob(*given, 0, backend), reference(*wanted, 0), layout)


@on_each_backend
def test_negative_bit_and_zero_tensors(backend):
    base, v, next, *table = drawn([3, 40], torch.float32, torch.float32)
    wanted = reference(base, -v, next, *table, 0)
    negative = torch.complex(base, v).conj().imag
    assert negative.is_neg()
    assert_same_bits(dispatch.step_log_prob(base, negative, next, *table, 0, backend), wanted)
    zero = torch._efficientzerotensor(v.shape)
    wanted = reference(base, torch.zeros_like(v), next, *table, 0)
    assert_same_bits(dispatch.step_log_prob(base, zero, next, *table, 0, backend), wanted)
    assert dense(zero).data_ptr()


@on_each_backend
@pytest.mark.parametrize("dtype", VELOCITY_DTYPES, ids=str)
def test_a_sample_is_the_same_everywhere(backend, dtype):
    """Alone, in any batch, at any place; so is its gradient."""
    for n in (5, LANES + 1, 3 * LANES):
        operands = [x.requires_grad_(x.shape[1] == n) for x in drawn([7, n], dtype, dtype)]
        whole = dispatch.step_log_prob(*operands, 1, backend)
        gradients = torch.autograd.grad(whole.sum(), operands[:3])
        for part in (slice(0, 1), slice(6, 7), slice(2, 5), [5, 0, 5, 3]):
            some = [*(x.detach()[part].requires_grad_() for x in operands[:3]), *operands[3:]]
            got = dispatch.step_log_prob(*some, 1, backend)
            assert_same_bits(got.detach(), whole.detach()[part])
            for one, other in zip(torch.autograd.grad(got.sum(), some[:3]), gradients, strict=True):
                assert_same_bits(one, other[part])


@on_each_backend
@pytest.mark.parametrize("state, velocity", PAIRS, ids=str)
def test_own_rows_are_separate_calls(backend, state, velocity):
    """Values and gradients: each sample's as alone, with its row as the one for all; any part of a batch too."""
    for shape in ((5, 7), (4, 3, LANES // 3 + 1), (3,)):
        operands = drawn(shape, state, velocity, seed=shape[0], own_rows=True)
        given = [*(x.requires_grad_() for x in operands[:3]), *operands[3:]]
        whole = dispatch.step_log_prob(*given, 1, backend)
        gradients = torch.autograd.grad(whole.sum(), given[:3])
        assert_same_bits(whole[1], torch.zeros_like(whole[1]), "held, with a velocity that is NaN")
        assert all(gradient[1].eq(0).all() for gradient in gradients)
        for b in [b for b in range(shape[0]) if b != 1]:
            one = [x.detach() for x in alone(operands, b)]
            got = dispatch.step_log_prob(*(x.requires_grad_() for x in one[:3]), *one[3:], 1, backend)
            assert_same_bits(whole[b : b + 1].detach(), got.detach(), f"sample {b}")
            for mine, its in zip(torch.autograd.grad(got.sum(), one[:3]), gradients, strict=True):
                assert_same_bits(mine, its[b : b + 1], f"sample {b}")
        part = [2, 1, 2]
        some = [*(x.detach()[part] for x in operands[:3]), *(table[:, part].contiguous() for table in operands[3:])]
        assert_same_bits(dispatch.step_log_prob(*some, 1, backend), whole.detach()[part])


@on_each_backend
def test_held(backend):
    """Scale 0 leaves the offset alone, +0.0 of HELD, whatever is NaN; with one row for all it is a factor."""
    bad = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [-0.0, 1.0]])
    coefficients = torch.tensor([[1.0, *[0.0] * 7]])
    for k in range(3):
        for scale, offset in ((0.0, 0.0), (-0.0, 0.0), (-0.0, -0.0), (0.0, 1.5)):
            given = [torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2)]
            given[k] = bad.clone()
            densities = torch.tensor([[scale, offset]])
            own = (table.unsqueeze(1).repeat(1, 4, 1) for table in (coefficients, densities))
            got = dispatch.step_log_prob(*given, *own, 0, backend)
            wanted = torch.tensor([scale]) * 0.0 + torch.tensor([offset])
            assert_same_bits(got, wanted.expand(4), f"{k} {scale} {offset}")
            for_all = dispatch.step_log_prob(*given, coefficients, densities, 0, backend)
            assert for_all[: 3 if k != 1 else 0].isnan().all()


def test_threads():
    """Samples shared out to threads; sizes where one is a thread's share, and where many are."""
    before = torch.get_num_threads()
    for shape, own_rows in itertools.product(((301, 1001), (3, 70001), (40, 40000)), (False, True)):
        operands = drawn(shape, torch.float32, torch.float32, own_rows=own_rows)
        wanted = reference(*operands, 0)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                assert_same_bits(dispatch.step_log_prob(*operands, 0, "cpu"), wanted)
            finally:
                torch.set_num_threads(before)


@on_each_backend
def test_shapes(backend):
    for shape in ((4,), (4, 1, 1), (2, 3, 5, 7)):
        operands = drawn(shape, torch.float32, torch.float32)
        flat = [x.reshape(shape[0], -1) for x in operands[:3]]
        assert_same_bits(dispatch.step_log_prob(*operands, 1, backend), reference(*flat, *operands[3:], 1))
    empty = dispatch.step_log_prob(*drawn((0, 3), torch.bfloat16, torch.bfloat16), 0, backend)
    assert empty.shape == (0,) and empty.dtype == torch.float32


def test_triton_interpreter():
    assert interpreted.run(CASES) == "114 cases\n"


@pytest.mark.parametrize("aligned", [False, True])
def test_triton_does_not_contract(aligned):
    """The PTX: each operation rounded to nearest, no FMA; where it can be, one load of 16 bytes of each operand."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernel is not tested")
    ptx = static.compile_step_log_prob(torch.float32, torch.float32, aligned, "sm_90").assembly
    assert ptx.count("div.rn.f32") == 1 and ptx.count("sub.rn.f32") == 4  # of 1024 / 256 elements of a thread
    assert ptx.count("mul.rn.f32") == 13 and ptx.count("add.rn.f32") > 13
    for wrong in ("fma", ".ftz", ".approx", "mul.f32", "add.f32", "sub.f32", "div.full", ".local", "f64"):
        assert wrong not in ptx, wrong
    assert ptx.count("ld.global.v4.b32") == (3 if aligned else 0)


# ---- accuracy ----


@pytest.mark.parametrize("state, velocity", PAIRS, ids=str)
def test_accuracy(state, velocity):
    """sum(d*d)/n within (ceil(n/LANES) + 16) u, relative, of exact arithmetic on the same d; measured in float64."""
    if state == torch.float64:
        pytest.skip("the yardstick is float64 itself: test_definition has every bit")
    for n in (1, 31, LANES, 5 * LANES + 1, 300 * LANES):
        operands = drawn([2, n], state, velocity, seed=n)
        got = dispatch.step_log_prob(*operands, 0, "cpu").double()
        base, v, next, coefficients, densities = operands
        a, b0 = coefficients[0, :2]
        d = (next.float() - (a * base.float() + b0 * v.float())).double()  # as it is rounded
        scale, offset = densities[0].double()
        mean = (d * d).flatten(1).mean(1)
        u = 2.0**-24
        bound = (math.ceil(n / LANES) + 16) * u * mean * scale.abs() + u * (mean * scale + offset).abs()
        assert ((got - (mean * scale + offset)).abs() <= bound).all(), n


def test_density():
    """What the table says: the mean of the normal's log-density, as torch.distributions has it."""
    std = 0.3
    base, v, next, *table = drawn([4, 5, 6], torch.float64, torch.float64)
    a, b0 = table[0][0, :2]
    wanted = torch.distributions.Normal(a * base + b0 * v, std).log_prob(next).mean((1, 2))
    got = dispatch.step_log_prob(base, v, next, *table, 0)
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=0)  # another expression, some 30 roundings of 1e-16


# ---- gradients ----


@one_row_or_own
def test_gradcheck(own_rows):
    base, v, next, *_ = drawn([3, 4], torch.float64, torch.float64)
    table = own_tables(torch.float64, 3) if own_rows else tables(torch.float64)
    given = [x.requires_grad_() for x in (base / 8, v / 8, next / 8)]
    function = lambda *x: OP(*x, *table, 1)  # noqa: E731
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_gradients_of_what_is_held():
    """0, whatever comes back and whatever the operands hold; of the gradient too."""
    for weight in (1.0, math.inf, math.nan):
        base, v, next, *table = drawn([3, 4], torch.float64, torch.float64, own_rows=True)
        given = [x.requires_grad_() for x in (base, v, next)]
        gradients = torch.autograd.grad(OP(*given, *table, 1)[1] * weight, given, create_graph=True)
        assert all(gradient[1].eq(0).all() for gradient in gradients)
        if math.isfinite(weight):
            again = torch.autograd.grad(sum(gradient[1].sum() for gradient in gradients), given)
            assert all(gradient[1].eq(0).all() for gradient in again)
    by_name = torch.func.grad(lambda h: dispatch.step_log_prob(base.detach(), h, next.detach(), *table, 1)[1])
    assert by_name(v.detach())[1].eq(0).all()


@on_each_backend
@pytest.mark.parametrize("state, velocity", PAIRS, ids=str)
def test_gradients_as_autograd(backend, state, velocity):
    """Against autograd of the plain formula in float64: to the rounding of its result, and of d's three roundings."""
    base, v, next, *table = drawn([3, 40], state, velocity)
    a, b0 = table[0][1, :2].double()
    scale = table[1][1, 0].double()
    weight = torch.tensor([1.0, -2.0, 0.5])
    exact = [x.detach().double().clone().requires_grad_() for x in (base, v, next)]
    x, h, y = exact
    ((((y - (a * x + b0 * h)) ** 2).mean(1) * scale) * weight).sum().backward()
    for asked in ((0, 1, 2), (1,), (0,), (2,)):
        given = [t.clone().requires_grad_(k in asked) for k, t in enumerate((base, v, next))]
        (dispatch.step_log_prob(*given, *table, 1, backend) * weight).sum().backward()
        for k, t in enumerate(given):
            assert (t.grad is not None) == (k in asked)
            if k in asked:
                assert t.grad.dtype == t.dtype
                size = (a * x).abs() + (b0 * h).abs() + y.abs()  # what d may have lost digits of
                factor = (scale * 2 / 40 * weight).abs().view(-1, 1) * (a.abs(), b0.abs(), 1)[k]
                arithmetic = torch.finfo(table[0].dtype).eps
                bound = 8 * arithmetic * factor * size + torch.finfo(t.dtype).eps * exact[k].grad.abs()
                assert ((t.grad.double() - exact[k].grad).abs() <= bound + torch.finfo(t.dtype).smallest_normal).all()


def test_no_gradient_is_silently_zero():
    base, v, next, *table = drawn([3, 4], torch.float32, torch.float32)
    for k, name in enumerate(("coefficients", "densities")):
        given = [t.clone().requires_grad_(j == k) for j, t in enumerate(table)]
        with pytest.raises(NotImplementedError, match=f"no gradient for {name}: detach it"):
            dispatch.step_log_prob(base, v, next, *given, 0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(v, torch.ones_like(v))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            OP(base, dual, next, *table, 0)
    by_op = lambda h: OP(base, h, next, *table, 0)  # noqa: E731
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(by_op, (v,), (v,))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda h: by_op(h).sum())(v)


# ---- what watches ----


@one_row_or_own
def test_op(own_rows):
    base, v, next, *table = drawn([3, 4], torch.float32, torch.bfloat16, own_rows=own_rows)
    for backend in ("auto", *BACKENDS):
        velocity = v.clone().requires_grad_()
        torch.library.opcheck(OP.default, (base, velocity, next, *table, 1, backend))
        assert_same_bits(OP(base, v, next, *table, 1, backend), reference(base, v, next, *table, 1))


@one_row_or_own
def test_fake_and_meta(own_rows):
    base, v, next, *table = drawn([3, 4], torch.float32, torch.bfloat16, own_rows=own_rows)
    for state, wanted in ((base, torch.float32), (base.bfloat16(), torch.float32), (base.double(), torch.float64)):
        given = (state, v, next.to(state.dtype), *(t.to(wanted) for t in table))
        with FakeTensorMode() as mode:
            got = dispatch.step_log_prob(*map(mode.from_tensor, given), 0)
            assert got.shape == (3,) and got.dtype == wanted
    got = dispatch.step_log_prob(*(x.to("meta") for x in (base, v, next, *table)), 0)
    assert got.is_meta and got.shape == (3,)


@one_row_or_own
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled(compiler, own_rows):
    """One graph, which holds the op with the backend it was traced with; gradients too."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    base, v, next, *_ = drawn([3, 4], torch.float32, torch.float32)
    table = own_tables(torch.float32, 3) if own_rows else tables(torch.float32)
    for backend in BACKENDS:
        torch.compiler.reset()

        def function(h, backend=backend):
            return dispatch.step_log_prob(base, h, next, *table, 1, backend)

        compiled, h, other = torch.compile(function, backend=keep, fullgraph=True), *(v.clone() for _ in range(2))
        got, wanted = compiled(h.requires_grad_()), function(other.requires_grad_())
        assert_same_bits(got, wanted)
        (node,) = [n for n in graphs[-1].graph.nodes if "step_log_prob" in str(n.target)]
        assert node.args[-1] == backend
        for x in (got, wanted):
            x.sum().backward()
        torch.testing.assert_close(h.grad, other.grad, rtol=1e-6, atol=1e-6)  # a compiler may fuse the gradient
    with use_backend("reference"):
        assert_same_bits(torch.compile(function, backend="aot_eager")(v), function(v))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@one_row_or_own
def test_transforms(own_rows):
    """The reference, in PyTorch's own operations; the op itself under vmap is a loop over it."""
    base, v, next, *_ = drawn([3, 4], torch.float32, torch.float32)
    table = own_tables(torch.float32, 3) if own_rows else tables(torch.float32)
    many = torch.stack([v, 2 * v, -v])
    wanted = torch.stack([reference(base, h, next, *table, 0) for h in many])
    for function in (dispatch.step_log_prob, OP):
        assert_same_bits(torch.vmap(lambda h, f=function: f(base, h, next, *table, 0))(many), wanted)
    by_name = lambda h: dispatch.step_log_prob(base, h, next, *table, 0)  # noqa: E731
    h = v.clone().requires_grad_()
    by_name(h).sum().backward()
    got = torch.func.grad(lambda h: by_name(h).sum())(v)
    torch.testing.assert_close(got, h.grad, rtol=1e-6, atol=1e-6)  # the same factors in another order
    _, tangent = torch.func.jvp(by_name, (v,), (v,))
    torch.testing.assert_close(tangent, (h.grad * v).sum(1), rtol=1e-5, atol=1e-5)


# ---- errors ----

X = torch.zeros(2, 3)
T, D = tables(torch.float32)
OWN, OF_TOKENS = own_tables(torch.float32, 2), own_tables(torch.float32, 6)
NO_NOISE = OWN[1].clone()
NO_NOISE[0, 1] = torch.tensor([-math.inf, math.inf])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"base": X.int()}, TypeError, "base must be float32, float64, bfloat16 or float16, got torch.int32"),
        ({"v": X.double()}, TypeError, "v is torch.float64, wider than the state's torch.float32"),
        ({"next": X.half()}, TypeError, "next must be torch.float32, as base, got torch.float16"),
        ({"coefficients": T.double()}, TypeError, "coefficients must be torch.float32, got torch.float64"),
        ({"densities": D.double()}, TypeError, "densities must be torch.float32, got torch.float64"),
        ({"v": X[:, :2]}, ValueError, r"v must have base's shape \[2, 3\], got \[2, 2\]"),
        ({"next": X[:1]}, ValueError, r"next must have base's shape \[2, 3\], got \[1, 3\]"),
        ({"next": X.to("meta")}, ValueError, "next must be on base's device cpu, got meta"),
        ({"densities": D.to("meta")}, ValueError, "densities must be on base's device cpu, got meta"),
        ({"coefficients": T[:, :7]}, ValueError, r"contiguous, \[rows, 8\] or \[rows, B, 8\], got \[2, 7\]"),
        ({"densities": T[:, :2]}, ValueError, r"contiguous, \[rows, 2\] or \[rows, B, 2\], got \[2, 2\]"),
        ({"densities": D[0]}, ValueError, r"contiguous, \[rows, 2\] or \[rows, B, 2\], got \[2\]"),
        ({"coefficients": OWN[0]}, ValueError, r"both one for each: got \[2, 2, 8\] and \[2, 2\]"),
        ({"densities": OWN[1]}, ValueError, r"both one for each: got \[2, 8\] and \[2, 2, 2\]"),
        ({"coefficients": OWN[0].mT.contiguous().mT}, ValueError, r"contiguous.*got \[2, 2, 8\]"),
        ({"coefficients": OF_TOKENS[0]}, ValueError, r"each of the 2 samples of a state \[2, 3\], got \[2, 6, 8\]"),
        ({"coefficients": OWN[0], "densities": OF_TOKENS[1]}, ValueError, r"densities.*each of the 2.*got \[2, 6, 2\]"),
        (
            {"coefficients": OWN[0], "densities": NO_NOISE},
            ValueError,
            r"densities\[0\]\[1\] must be finite, got .*-inf",
        ),
        ({"coefficients": OWN[0], "densities": OWN[1], "row": 2}, ValueError, r"row must be in \[0, 2\)"),
        ({"row": 2}, ValueError, r"row must be in \[0, 2\) of coefficients, got 2"),
        ({"row": -1}, ValueError, r"row must be in \[0, 2\) of coefficients, got -1"),
        ({"densities": D[:1], "row": 1}, ValueError, r"row must be in \[0, 1\) of densities, got 1"),
        ({"densities": tables(torch.float32, std=0)[1]}, ValueError, r"densities\[0\] must be finite, got scale -inf"),
        ({"densities": torch.full((1, 2), math.nan)}, ValueError, "std = 0, has no density"),
        (dict.fromkeys(("base", "v", "next"), X[:, :0]), ValueError, r"must have elements .* got a state \[2, 0\]"),
        (dict.fromkeys(("base", "v", "next"), X[0, 0]), ValueError, "got a tensor without dimensions"),
        ({"backend": "none"}, ValueError, "unknown backend 'none'"),
        ({"backend": "triton"}, RuntimeError, "'triton' was asked for"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(change, error, message):
    given = {"base": X, "v": X, "next": X, "coefficients": T, "densities": D, "row": 0} | change
    with pytest.raises(error, match=message):
        dispatch.step_log_prob(**given)
    on_one_device = len({x.device for x in given.values() if isinstance(x, torch.Tensor)}) == 1
    if "backend" not in change and on_one_device:  # of two, torch's dispatcher has its own words
        with pytest.raises(error, match=message):
            OP(**given)
