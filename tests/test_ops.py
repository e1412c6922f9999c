"""The two registered ops: opcheck, fakes, compile, export, gradients, and what they refuse."""

import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from operands import FORMS, assert_same_bits, remembered, values
from torch._subclasses.fake_tensor import FakeTensorMode

from flowmatch_kernels import use_backend
from flowmatch_kernels.ops import dispatch, native, reference
from flowmatch_kernels.ops.fused_step import (
    EXACT,
    FROM_GUIDED,
    FROM_UNGUIDED,
    PROMOTE,
    READ,
    ROUNDED,
    VELOCITY_DTYPES,
    WEIGHTED,
    Operands,
    arithmetic_dtype,
)

OP, OP_ = torch.ops.flowmatch_kernels.fused_step, torch.ops.flowmatch_kernels.fused_step_
ORDER = [argument.name for argument in OP_.default._schema.arguments]
COMPILERS = ["aot_eager", "inductor"]


def operands(state=torch.float32, velocity=None, guidance=WEIGHTED, terms=3, shape=(2, 3, 5), **replaced):
    """What the ops take, by name; `guidance` None is no u; `replaced` puts another value in the place of one."""
    generator = torch.Generator().manual_seed(0)
    velocity, arithmetic = velocity or state, arithmetic_dtype(state)

    def draw(dtype):
        return values(shape, dtype, generator, special=False)

    table = torch.randn(3, 8, generator=generator, dtype=arithmetic)
    names = {"base": draw(state), "v": draw(velocity), "u": None if guidance is None else draw(velocity)}
    names |= {f"h{k + 1}": draw(arithmetic) if k < terms else None for k in range(3)}
    names |= {
        "coefficients": table,
        "row": 1,
        "rounding": PROMOTE,
        "guidance": guidance or WEIGHTED,
        "sum_first": False,
        "strength": None,
    }
    return names | replaced


def written(state=torch.float32, shape=(2, 3, 5), slots=4, history=True, **replaced):
    """What fused_step_ writes, and where."""
    arithmetic = arithmetic_dtype(state)
    names = {
        "out": torch.full(shape, float("nan"), dtype=state),
        "trajectory": torch.zeros(shape[0], slots, *shape[1:], dtype=state) if slots else None,
        "slot": 2 if slots else 0,
        "history": torch.zeros(shape, dtype=arithmetic) if history else None,
    }
    return names | replaced


def call_(names):
    """fused_step_ by position."""
    return OP_(*[names[name] for name in ORDER])


PAIRS = [(state, velocity) for state, narrower in VELOCITY_DTYPES.items() for velocity in narrower]


SETS = [(None, 0), (WEIGHTED, 3), (FROM_UNGUIDED, 1), (FROM_GUIDED, 0)]
#: Each dtype, as the state's and as the velocity's, with every set of operands; two dtypes that differ with two of the
#: four sets, with all of them by `make test-full`.
OPCHECKED = [
    pytest.param(*pair, *chosen, marks=pytest.mark.full if pair[0] != pair[1] and (k + j) % 2 else [])
    for (k, pair), (j, chosen) in itertools.product(enumerate(PAIRS), enumerate(SETS))
]


@pytest.mark.parametrize("state, velocity, guidance, terms", OPCHECKED, ids=str)
def test_opcheck_functional(state, velocity, guidance, terms):
    names = operands(state, velocity, guidance, terms)
    torch.library.opcheck(OP.default, tuple(names.values()))


@pytest.mark.parametrize(
    "guidance, terms", [(None, 0), (WEIGHTED, 3), (WEIGHTED, 1), (FROM_UNGUIDED, 1), (FROM_GUIDED, 3)]
)
def test_opcheck_with_gradients(guidance, terms):
    names = operands(guidance=guidance, terms=terms)
    for name in ("base", "v", "u", "h1", "h2", "h3"):
        if names[name] is not None:
            names[name].requires_grad_()
    torch.library.opcheck(OP.default, tuple(names.values()))


@pytest.mark.parametrize("state, velocity", PAIRS, ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["few", "every_operand"])
def test_opcheck_in_place(state, velocity, full):
    guidance = FORMS[PAIRS.index((state, velocity)) % 3] if full else None
    names = operands(state, velocity, guidance, terms=3 if full else 0)
    names |= written(state, slots=4 if full else 0, history=full)
    torch.library.opcheck(OP_.default, tuple(names[name] for name in ORDER))


@pytest.mark.parametrize("rounding", [PROMOTE, EXACT, ROUNDED])
@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_roundings(rounding, velocity):
    """The functional op with its gradient; the other with a result of the velocity's dtype, where there is one."""
    names = operands(torch.float32, velocity, FROM_UNGUIDED, terms=1) | {"rounding": rounding}
    torch.library.opcheck(OP.default, tuple(names.values()))
    into = torch.float32 if rounding == PROMOTE else velocity
    names |= written(torch.float32, slots=0, history=True) | {"out": torch.empty(names["base"].shape, dtype=into)}
    torch.library.opcheck(OP_.default, tuple(names[name] for name in ORDER))
    for name in ("base", "v", "u", "h1"):
        names[name].requires_grad_()
    torch.library.opcheck(OP.default, tuple(names[name] for name in READ))


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("terms", range(4))
def test_opcheck_sum_first(state, terms):
    names = operands(state, state, None, terms) | {"sum_first": True}
    torch.library.opcheck(OP.default, tuple(names[name] for name in READ))
    into = names | written(state, slots=4, history=True)
    torch.library.opcheck(OP_.default, tuple(into[name] for name in ORDER))
    for name in ("base", "v", *(f"h{k}" for k in range(1, terms + 1))):
        names[name].requires_grad_()
    torch.library.opcheck(OP.default, tuple(names[name] for name in READ))


def test_op_equals_reference():
    for (state, velocity), guidance in itertools.product(PAIRS, FORMS):
        names = operands(state, velocity, guidance)
        wanted = reference.fused_step(**names)
        assert_same_bits(OP(**names), wanted)
        into = written(state)
        call_(names | into)
        assert_same_bits(into["out"], wanted)
        assert_same_bits(into["trajectory"][:, 2], wanted)
        assert not into["trajectory"][:, [0, 1, 3]].any()
        read = [names[name] for name in ("base", "v", "u", "coefficients", "row", "guidance")]
        assert_same_bits(into["history"], remembered(*read))


def test_guidance_without_an_unguided_velocity():
    """It counts for nothing, for the gradient too."""
    results = []
    for guidance in FORMS:
        names = operands(guidance=None) | {"guidance": guidance}
        v = names["v"].requires_grad_()
        results.append((OP(**names).detach(), *torch.autograd.grad(OP(**names).sum(), v)))
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            assert_same_bits(got, wanted)


def test_guidance_is_weighted_by_default():
    names = operands()
    given = [x for name, x in names.items() if name != "guidance"]
    assert_same_bits(OP(*given), OP(**names))
    assert Operands._field_defaults["guidance"] == WEIGHTED


@pytest.mark.parametrize("layout", ["negative", "zero", "transposed", "expanded"])
def test_op_takes_any_velocity(layout):
    """What counts is the value of v and u, not their raw memory."""
    z = torch.randn(2, 3, 5, dtype=torch.complex64)
    v = {
        "negative": z.conj().imag,
        "zero": torch._efficientzerotensor(2, 3, 5),
        "transposed": torch.randn(5, 3, 2).transpose(0, 2),
        "expanded": torch.randn(3, 1).expand(2, 3, 5),
    }[layout]
    plain = v.clone().resolve_neg()
    assert not plain.is_neg()
    for name in ("v", "u"):
        assert_same_bits(OP(**operands(**{name: v})), OP(**operands(**{name: plain.contiguous()})))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake(device):
    def moved(names):
        return {
            k: torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, torch.Tensor) else x
            for k, x in names.items()
        }

    with FakeTensorMode():
        out = OP(**moved(operands()))
        assert out.shape == (2, 3, 5)
        assert out.device.type == device
        assert out.dtype == torch.float32
        assert call_(moved(operands() | written())) is None


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("full", [False, True], ids=["few", "every_operand"])
def test_compile(compiler, full):
    torch._dynamo.reset()
    names = operands(guidance=FROM_UNGUIDED if full else None, terms=3 if full else 0)

    def functional(base, v):
        return OP(**(names | {"base": base * 2, "v": v})) + 1

    base, v = names["base"], names["v"]
    compiled = torch.compile(functional, fullgraph=True, backend=compiler)
    assert_same_bits(compiled(base, v), functional(base, v))

    def in_place(base, v, out, trajectory, history):
        into = {"out": out, "trajectory": trajectory, "slot": 2 if full else 0, "history": history}
        call_(names | {"base": base * 2, "v": v} | into)
        return out + 1

    into = [written(slots=4 if full else 0, history=full) for _ in range(2)]
    results = []
    for function, buffers in zip(
        (in_place, torch.compile(in_place, fullgraph=True, backend=compiler)), into, strict=True
    ):
        results.append(function(base, v, buffers["out"], buffers["trajectory"], buffers["history"]))
    assert_same_bits(results[1], results[0])
    for key in ("out", "trajectory", "history") if full else ("out",):
        assert_same_bits(into[1][key], into[0][key], key)


def test_compile_dynamic_shapes():
    torch._dynamo.reset()
    table = torch.randn(2, 8)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(base, v):
        return OP(base, v, None, None, None, None, table, 1)

    for size in (3, 7, 64):
        base, v = torch.randn(size, 4), torch.randn(size, 4)
        assert_same_bits(step(base, v), OP(base, v, None, None, None, None, table, 1))


def test_export():
    class Step(torch.nn.Module):
        def forward(self, base, v, table):
            return OP(base, v, None, None, None, None, table, 0)

    arguments = torch.randn(4, 3), torch.randn(4, 3), torch.randn(1, 8)
    program = torch.export.export(Step(), arguments)
    assert any(node.target is OP.default for node in program.graph.nodes)
    other = torch.randn(4, 3), torch.randn(4, 3), torch.randn(1, 8)
    assert_same_bits(program.module()(*other), OP(other[0], other[1], None, None, None, None, other[2], 0))


@pytest.mark.parametrize("guidance", [None, *FORMS])
@pytest.mark.parametrize("terms", range(4))
def test_gradcheck(guidance, terms):
    names = operands(torch.float64, guidance=guidance, terms=terms)
    differentiable = [k for k in ("base", "v", "u", "h1", "h2", "h3") if names[k] is not None]
    inputs = tuple(names[k].requires_grad_() for k in differentiable)

    def step(*inputs):
        return OP(**(names | dict(zip(differentiable, inputs, strict=True))))

    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs)


@pytest.mark.parametrize("guidance, terms", [(None, 1), (FROM_UNGUIDED, 3)])
def test_derivative_of_noise_by_keys(guidance, terms):
    """Keys have none; the other operands have theirs."""
    names = operands(torch.float64, guidance=guidance, terms=terms) | {"h1": torch.arange(6).view(2, 3)}
    torch.library.opcheck(OP.default, tuple(names.values()))
    differentiable = [k for k in ("base", "v", "u", "h2", "h3") if names[k] is not None]
    inputs = tuple(names[k].requires_grad_() for k in differentiable)

    def step(*inputs):
        return OP(**(names | dict(zip(differentiable, inputs, strict=True))))

    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs)
    torch.library.opcheck(OP.default, tuple(names.values()))


@pytest.mark.parametrize("guidance", FORMS)
def test_gradient_equals_the_expression(guidance):
    """Through a narrower, guided and expanded velocity: each gradient has its operand's shape and dtype."""
    names = operands(torch.float32, torch.bfloat16, terms=1)
    table, row = names["coefficients"], 1
    base, u, h1 = (names[k].requires_grad_() for k in ("base", "u", "h1"))
    v = torch.randn(3, 1, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(2, 3, 5)
    arguments = base, v.expand(2, 3, 5), u, h1, None, None, table, row, PROMOTE, guidance
    got = torch.autograd.grad((OP(*arguments) * weights).sum(), (base, v, u, h1))
    wanted = torch.autograd.grad((reference.fused_step(*arguments) * weights).sum(), (base, v, u, h1))
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)  # each rounding counts as the identity


def test_no_gradient_for_coefficients():
    names = operands()
    names["coefficients"].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"coefficients"):
        OP(**names)


@pytest.mark.parametrize("name", ["base", "v", "u", "h1", "h2", "h3", "coefficients"])
def test_in_place_refuses_gradients(name):
    names = operands() | written()
    names[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"requires grad.*detach"):
        call_(names)
    assert names["out"].isnan().all()
    with torch.no_grad():
        call_(names)
    assert not names["out"].isnan().any()


@pytest.mark.parametrize("name", ["out", "trajectory", "history"])
def test_version_counter(name):
    """Who saved what the op writes for a backward pass is told, as by every in-place operation."""
    names = operands() | written()
    before = names[name]._version
    weight = torch.ones((), requires_grad=True)
    saved = (names[name].nan_to_num() * weight).sum() if name != "out" else (names[name] * weight).sum()
    call_(names)
    assert names[name]._version > before
    if name == "out":
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
            saved.backward()


# ---- what breaks the contract is refused: by the C++ op, by the fake, by the Python router ----

SHAPE = (2, 3, 5)


BAD = {
    "base integer": lambda: {"base": torch.zeros(SHAPE, dtype=torch.int32)},
    "base float8": lambda: {"base": torch.zeros(SHAPE).to(torch.float8_e5m2)},
    "base not contiguous": lambda: {"base": torch.zeros(5, 3, 2).transpose(0, 2)},
    "base float64, the rest float32": lambda: {"base": torch.zeros(SHAPE, dtype=torch.float64)},
    "out dtype": lambda: {"out": torch.zeros(SHAPE, dtype=torch.float64)},
    "out shape": lambda: {"out": torch.zeros(2, 3, 4)},
    "out numel, other shape": lambda: {"out": torch.zeros(2, 15)},
    "out not contiguous": lambda: {"out": torch.zeros(5, 3, 2).transpose(0, 2)},
    "v wider": lambda: {"v": torch.zeros(SHAPE, dtype=torch.float64), "u": None},
    "v integer": lambda: {"v": torch.zeros(SHAPE, dtype=torch.int32), "u": None},
    "v complex": lambda: {"v": torch.zeros(SHAPE, dtype=torch.complex64), "u": None},
    "v shape": lambda: {"v": torch.zeros(3, 5)},
    "v broadcasts": lambda: {"v": torch.zeros(1, 3, 5)},
    "u dtype": lambda: {"u": torch.zeros(SHAPE, dtype=torch.bfloat16)},
    "u shape": lambda: {"u": torch.zeros(2, 3, 1)},
    "h1 dtype": lambda: {"h1": torch.zeros(SHAPE, dtype=torch.bfloat16)},
    "h2 shape": lambda: {"h2": torch.zeros(2, 5, 3)},
    "h3 not contiguous": lambda: {"h3": torch.zeros(5, 3, 2).transpose(0, 2)},
    "h1 keys of another batch": lambda: {"h1": torch.zeros(3, 3, dtype=torch.int64)},
    "h1 keys of two columns": lambda: {"h1": torch.zeros(2, 2, dtype=torch.int64)},
    "h1 keys of the state's shape": lambda: {"h1": torch.zeros(SHAPE, dtype=torch.int64)},
    "h1 keys not contiguous": lambda: {"h1": torch.zeros(3, 2, dtype=torch.int64).t()},
    "h1 keys beside sum_first": lambda: {"h1": torch.zeros(2, 3, dtype=torch.int64), "sum_first": True},
    "h2 without h1": lambda: {"h1": None},
    "h3 without h2": lambda: {"h2": None},
    "coefficients dtype": lambda: {"coefficients": torch.zeros(3, 8, dtype=torch.float64)},
    "coefficients columns": lambda: {"coefficients": torch.zeros(3, 7)},
    "coefficients one row": lambda: {"coefficients": torch.zeros(8)},
    "coefficients not contiguous": lambda: {"coefficients": torch.zeros(8, 3).t()},
    "coefficients of another R": lambda: {"coefficients": torch.zeros(3, 5, 8)},
    "coefficients of one R": lambda: {"coefficients": torch.zeros(3, 1, 8)},
    "coefficients of four dimensions": lambda: {"coefficients": torch.zeros(1, 3, 2, 8)},
    "sum_first beside rows of their own": lambda: {"coefficients": torch.zeros(3, 2, 8), "sum_first": True},
    "guidance negative": lambda: {"guidance": -1},
    "guidance beyond": lambda: {"guidance": 3},
    "row negative": lambda: {"row": -1},
    "row beyond": lambda: {"row": 3},
    "trajectory dtype": lambda: {"trajectory": torch.zeros(2, 4, 3, 5, dtype=torch.float64)},
    "trajectory shape": lambda: {"trajectory": torch.zeros(2, 4, 5, 3)},
    "trajectory rank": lambda: {"trajectory": torch.zeros(2, 4, 15)},
    "trajectory batch": lambda: {"trajectory": torch.zeros(3, 4, 3, 5)},
    "trajectory not contiguous": lambda: {"trajectory": torch.zeros(4, 2, 3, 5).transpose(0, 1)},
    "slot negative": lambda: {"slot": -1},
    "slot beyond": lambda: {"slot": 4},
    "history dtype": lambda: {"history": torch.zeros(SHAPE, dtype=torch.bfloat16)},
    "history shape": lambda: {"history": torch.zeros(2, 3)},
    "strength dtype": lambda: {"strength": torch.zeros(SHAPE, dtype=torch.bfloat16)},
    "strength shape": lambda: {"strength": torch.zeros(2, 3, 1)},
    "strength not contiguous": lambda: {"strength": torch.zeros(5, 3, 2).transpose(0, 2)},
    "strength beside sum_first": lambda: {"strength": torch.zeros(SHAPE), "sum_first": True},
    "v on another device": lambda: {"v": torch.zeros(SHAPE, device="meta")},
    "coefficients on another device": lambda: {"coefficients": torch.zeros(3, 8, device="meta")},
}


def router(names):
    dispatch._routed_fused_step_(*[names[name] for name in ORDER])


def faked(names):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call_({k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in names.items()})


def error(bad):
    """What a direct call raises, and torch.ops too: its dispatcher passes both on."""
    kinds = ("dtype", "wider", "integer", "float8", "complex", "base float64, the rest float32")
    return TypeError if bad.endswith(kinds) else ValueError


@pytest.mark.parametrize("door", [call_, router, faked], ids=["op", "router", "fake"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_operands(bad, door):
    good = operands() | written()
    names = good | BAD[bad]()
    # Tensors of two devices never reach a kernel: torch's own dispatcher refuses them, in its own words.
    elsewhere = "another device" in bad
    with pytest.raises((RuntimeError, ValueError) if elsewhere else error(bad)) as raised:
        door(names)
    assert elsewhere or " got " in str(raised.value) or "needs" in str(raised.value) or "wider" in str(raised.value)
    assert "csrc" not in str(raised.value)
    assert bad.split()[0].rstrip(",") in str(raised.value) or "another device" in bad or "float64" in bad
    for key in ("out", "trajectory", "history"):
        if door is not faked and key not in BAD[bad]():
            fresh = written()[key]
            assert torch.equal(names[key].nan_to_num(7.0), fresh.nan_to_num(7.0)), f"{key} was written"


@pytest.mark.parametrize("door", [call_, router, faked], ids=["op", "router", "fake"])
def test_good_operands(door):
    """The list above is refused for the reason it gives: without it every door opens."""
    names = operands() | written()
    door(names)
    assert door is faked or not names["out"].isnan().any()


@pytest.mark.parametrize("bad", [b for b in BAD if not ({"out", "trajectory", "history", "slot"} & set(BAD[b]()))])
def test_bad_operands_functional(bad):
    names = operands() | BAD[bad]()
    wanted = (RuntimeError, ValueError) if "another device" in bad else error(bad)
    with pytest.raises(wanted):
        OP(**names)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(wanted):
        OP(**{k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in names.items()})


DIRECT = {
    "no operands": (lambda names: 3, TypeError, "takes one argument, the Operands, got int"),
    "too few": (lambda names: (names["out"],), TypeError, "Operands of 16 fields, got 1"),
    "v wider": (lambda names: {"v": names["v"].double()}, TypeError, "v is torch.float64, wider than.*torch.float32"),
    "base integer": (lambda names: {"base": names["base"].int()}, TypeError, "base must be float32.*got torch.int32"),
    "v integer": (lambda names: {"v": names["v"].int()}, TypeError, "v must be float32, .*got torch.int32"),
    "base a list": (lambda names: {"base": [1.0]}, TypeError, "base must be a tensor, got list"),
    "v a list": (lambda names: {"v": [1.0]}, TypeError, "v must be a tensor, got list"),
    "u a number": (lambda names: {"u": 1.0}, TypeError, "u must be a tensor, got float"),
    "out None": (lambda names: {"out": None}, TypeError, "out must be a tensor, got NoneType"),
    "h2 a string": (lambda names: {"h2": "h2"}, TypeError, "h2 must be a tensor, got str"),
    "h1 sparse": (lambda names: {"h1": names["h1"].to_sparse()}, ValueError, "h1 must be a dense tensor that has mem"),
    "history meta": (lambda names: {"history": names["base"].to("meta")}, ValueError, "history must be a dense tensor"),
    "R of the last": (lambda names: {"coefficients": torch.zeros(3, 5, 8)}, ValueError, "R to be .* got R = 5"),
    "slot beyond": (lambda names: {"slot": 4}, ValueError, r"slot must be in \[0, 4\), got 4"),
    "row a float": (lambda names: {"row": 1.0}, TypeError, "float"),
}


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
@pytest.mark.parametrize("case", DIRECT)
def test_direct_call_says_what_it_got(case):
    change, kind, words = DIRECT[case]
    names = operands() | written()
    changed = change(names)
    given = Operands(**(names | changed)) if isinstance(changed, dict) else changed
    with pytest.raises(kind, match=words):
        native._C.fused_step_(given)
    assert names["out"].isnan().all()


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
def test_no_folder_of_the_build_is_in_the_extension():
    """Messages of torch's headers name their file."""
    built = Path(native._C.__file__).read_bytes()
    for folder in (Path(__file__).parent.parent, Path(torch.__file__).parent):
        assert os.fsencode(folder) not in built


# ---- operands that overlap ----


def pooled(replace):
    """Operands, all views of one buffer, apart; then those that `replace(window, pool)` returns, by name."""
    names = operands() | written()
    tensors = [name for name, x in names.items() if isinstance(x, torch.Tensor)]
    size = sum(names[name].numel() for name in tensors)
    pool = values([size + 400], torch.float32, torch.Generator().manual_seed(5), special=False)
    at = 400
    for name in tensors:
        size = names[name].numel()
        names[name] = pool[at : at + size].view(names[name].shape)
        at += size
    return names | replace(lambda k, shape=SHAPE: pool[k : k + math.prod(shape)].view(shape), pool)


def keys_at(pool):
    """The pool's first 48 bytes as keys of noise, each (0, 0, 0): any bits are not an index below 2^48."""
    return pool[:12].zero_().view(torch.int64).view(2, 3)


TRAJECTORY = (2, 4, *SHAPE[1:])  # slot 2 of it: elements 30 to 44, and 90 to 104
LAST_OF_SLOT = 104
#: (what is written, what it overlaps, bytes from the other's begin): operands, of windows on one buffer.
OVERLAPS = {
    ("out", "base", 4): lambda at, pool: {"base": at(0), "out": at(1)},
    ("out", "base", -4): lambda at, pool: {"base": at(1), "out": at(0)},
    ("out", "base", 116): lambda at, pool: {"base": at(0), "out": at(29)},
    ("out", "v", 0): lambda at, pool: {"v": at(0), "out": at(0)},
    ("out", "v", 8): lambda at, pool: {"v": at(0), "out": at(2)},
    ("out", "v", -8): lambda at, pool: {"base": at(0), "out": at(0), "v": at(2)},
    ("out", "u", 0): lambda at, pool: {"u": at(0), "out": at(0)},
    ("out", "h1", 0): lambda at, pool: {"h1": at(0), "out": at(0)},
    ("out", "h1", 44): lambda at, pool: {"h1": keys_at(pool), "out": at(11)},
    ("history", "h1", 0): lambda at, pool: {"h1": keys_at(pool), "history": at(0)},
    ("out", "h2", 0): lambda at, pool: {"h2": at(0), "out": at(0)},
    ("out", "h3", -60): lambda at, pool: {"h3": at(15), "out": at(0)},
    ("out", "coefficients", -4): lambda at, pool: {"coefficients": at(1, (3, 8)), "out": at(0)},
    # Not the row that is read: the table would be lost all the same.
    ("out", "coefficients", -116): lambda at, pool: {"coefficients": at(29, (3, 8)), "out": at(0)},
    ("out", "history", 0): lambda at, pool: {"history": at(0), "out": at(0)},
    ("out", "history", 4): lambda at, pool: {"history": at(0), "h1": at(0), "out": at(1)},
    ("history", "base", 0): lambda at, pool: {"history": at(0), "base": at(0)},
    ("history", "v", 0): lambda at, pool: {"history": at(0), "v": at(0)},
    ("history", "u", 4): lambda at, pool: {"history": at(1), "u": at(0)},
    ("history", "h1", 4): lambda at, pool: {"history": at(1), "h1": at(0)},
    ("history", "h2", -4): lambda at, pool: {"history": at(0), "h1": at(0), "h2": at(1)},
    ("history", "h3", 80): lambda at, pool: {"history": at(20), "h3": at(0)},
    ("history", "coefficients", 0): lambda at, pool: {"history": at(0), "coefficients": at(0, (3, 8))},
    ("trajectory's slot", "base", -240): lambda at, pool: {"trajectory": at(0, TRAJECTORY), "base": at(90)},
    ("trajectory's slot", "v", 0): lambda at, pool: {"trajectory": at(0, TRAJECTORY), "v": at(30)},
    ("trajectory's slot", "u", 60): lambda at, pool: {"trajectory": at(0, TRAJECTORY), "u": at(15)},
    ("trajectory's slot", "h1", 116): lambda at, pool: {"trajectory": at(0, TRAJECTORY), "h1": at(1)},
    ("trajectory's slot", "coefficients", -296): lambda at, pool: {
        "trajectory": at(0, TRAJECTORY), "coefficients": at(LAST_OF_SLOT, (3, 8)),
    },
    ("trajectory's slot", "history", -296): lambda at, pool: {
        "trajectory": at(0, TRAJECTORY), "history": at(LAST_OF_SLOT),
    },
    ("out", "trajectory's slot", 296): lambda at, pool: {"trajectory": at(0, TRAJECTORY), "out": at(LAST_OF_SLOT)},
}  # fmt: skip
#: Which the contract names, or where nothing that is written overlaps.
MAY_OVERLAP = {
    "out is base": lambda at, pool: {"out": at(0), "base": at(0)},
    "history is h1": lambda at, pool: {"history": at(0), "h1": at(0)},
    "history is h2": lambda at, pool: {"history": at(0), "h2": at(0)},
    "history is h3, out is base": lambda at, pool: {"history": at(0), "h3": at(0), "out": at(30), "base": at(30)},
    "history is h1 and h2": lambda at, pool: {"history": at(0), "h1": at(0), "h2": at(0)},
    "v is base": lambda at, pool: {"v": at(0), "base": at(0)},
    "v is u": lambda at, pool: {"v": at(0), "u": at(0)},
    "what is read overlaps": lambda at, pool: {
        "base": at(0), "v": at(1), "u": at(2), "h1": at(3), "h2": at(3), "h3": at(5), "coefficients": at(6, (3, 8)),
    },
    "neighbours": lambda at, pool: {"base": at(0), "out": at(30), "v": at(60), "history": at(90), "h1": at(120)},
    "out after the keys": lambda at, pool: {"h1": keys_at(pool), "out": at(12)},
    "base before the slot": lambda at, pool: {"trajectory": at(0, TRAJECTORY), "base": at(0)},
    "v after the slot": lambda at, pool: {"trajectory": at(0, TRAJECTORY), "v": at(LAST_OF_SLOT + 1)},
    "v strided over out": lambda at, pool: {"out": at(0), "base": at(0), "v": at(0, (5, 3, 2)).transpose(0, 2)},
    "u expanded over out": lambda at, pool: {"out": at(0), "base": at(0), "u": at(0, (1, 1, 5)).expand(SHAPE)},
}  # fmt: skip


def direct(names):
    native.fused_step_(Operands(**names))


def by_reference(names):
    reference.fused_step_(Operands(**names))


def by_triton(names):
    triton = pytest.importorskip("flowmatch_kernels.ops.triton", reason="Triton is not installed")
    triton.fused_step_(Operands(**names))


def routed_to_reference(names):
    with use_backend("reference"):
        router(names)


OVERLAP_DOORS = {
    "op": call_,
    "router": router,
    "router to the reference": routed_to_reference,
    "direct": pytest.param(direct, marks=pytest.mark.skipif(native._C is None, reason="the extension is not built")),
    "reference": by_reference,
}
REFUSING_DOORS = OVERLAP_DOORS | {"triton": by_triton}


@pytest.mark.parametrize("door", REFUSING_DOORS.values(), ids=REFUSING_DOORS)
@pytest.mark.parametrize("overlap", OVERLAPS, ids=str)
def test_overlaps_are_refused(overlap, door):
    """A ValueError that names both, in the same words everywhere; nothing is written."""
    name, other, distance = overlap
    names = pooled(OVERLAPS[overlap])
    before = {key: x.clone() for key, x in names.items() if isinstance(x, torch.Tensor)}
    where = f"{abs(distance)} bytes {'before' if distance < 0 else 'after'} {other} does"
    with pytest.raises(ValueError, match=rf"{name} overlaps {other}: it begins {where}; wanted memory of its own"):
        door(names)
    for key, x in before.items():
        assert_same_bits(names[key], x, key)


@pytest.mark.parametrize("door", OVERLAP_DOORS.values(), ids=OVERLAP_DOORS)
@pytest.mark.parametrize("case", MAY_OVERLAP)
def test_overlaps_that_are_allowed(case, door):
    """They give what operands apart give."""
    names = pooled(MAY_OVERLAP[case])
    apart = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in names.items()}
    reference.fused_step_(Operands(**apart))
    door(names)
    assert_same_bits(names["out"], apart["out"])
    assert_same_bits(names["history"], apart["history"])
    assert_same_bits(names["trajectory"][:, 2], apart["trajectory"][:, 2])


@pytest.mark.parametrize("state, inside", [(torch.bfloat16, 31), (torch.float16, 59), (torch.float64, 29)], ids=str)
@pytest.mark.parametrize("door", [call_, by_reference], ids=["op", "reference"])
def test_overlaps_count_by_bytes(state, inside, door):
    """A state of 16 bits that ends where h1 goes on; and the first element behind h1 that is out's."""
    names = operands(state) | written(state)
    buffer = torch.zeros(1000, dtype=state)
    wide = buffer.view(arithmetic_dtype(state))
    names["h1"] = wide[:30].view(SHAPE)
    names["out"] = buffer[inside : inside + 30].view(SHAPE)
    with pytest.raises(ValueError, match="out overlaps h1"):
        door(names)
    behind = 30 * wide.element_size() // buffer.element_size()
    door(names | {"out": buffer[behind : behind + 30].view(SHAPE)})


def test_trajectory_of_one_sample_may_hold_the_base():
    """base lies in one slot, and the next one is written; in the slot itself it is refused."""
    trajectory = torch.randn(1, 4, 30)
    names = operands(shape=(1, 30)) | written(shape=(1, 30)) | {"trajectory": trajectory, "base": trajectory[:, 1]}
    wanted = reference.fused_step(**{k: names[k] for k in operands()})
    call_(names)
    assert_same_bits(trajectory[:, 2], wanted)
    with pytest.raises(ValueError, match="trajectory's slot overlaps base: it begins 0 bytes after base does"):
        call_(names | {"slot": 1})
