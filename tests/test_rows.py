"""`rows.Fresh` and `rows.FreshInPython`: the states of a backend that writes to fresh memory, as on a GPU."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from operands import assert_same_bits

from flowmatch_kernels import FlowMatching, KeyedNoise, flow_matching, noise, rows, solvers
from flowmatch_kernels.ops import dispatch, native, reference, reference_noise
from flowmatch_kernels.solvers import Evaluation

SHAPE = (3, 5, 2)
EULER = Evaluation(0, True, (), None)


@pytest.fixture(params=["C++", "Python"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """`triton` is a function of ours on the CPU; yields weak references to the rows that sample() makes."""
    if request.param == "Python":
        monkeypatch.setattr(native, "TensorRows", None)
    elif native.TensorRows is None:
        pytest.skip("the extension is not built")
    serving = dispatch.Backend("triton", (), lambda _: None, lambda: lambda o: reference.fused_step_(o))
    monkeypatch.setitem(dispatch.BACKENDS, "triton", serving)
    made: list[Any] = []
    make = flow_matching.rows_for

    def kept(*arguments: Any) -> Any:
        its_rows = make(*arguments)
        made.append(weakref.ref(its_rows))
        return its_rows

    monkeypatch.setattr(flow_matching, "rows_for", kept)
    yield made
    wanted = rows.Fresh if request.param == "C++" else rows.FreshInPython
    assert all(one is wanted for one in kinds)
    kinds.clear()


kinds: list[type] = []


@pytest.fixture(autouse=True)
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    init = rows._Fresh.__init__

    def counted(self: Any, *arguments: Any) -> None:
        kinds.append(type(self))
        init(self, *arguments)

    monkeypatch.setattr(rows._Fresh, "__init__", counted)


def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.cos(3 * x) - x * t


def written(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    x.mul_(0.5)
    return torch.cos(3 * x) - x * t


def replaced(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    x.data = x * 0.5
    return torch.cos(3 * x) - x * t


def transposed(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return velocity(x, t).transpose(0, 2).contiguous().transpose(0, 2)


def test_whole_loops(kind: list[Any]) -> None:
    """Every solver, with guidance, with a trajectory, with models that write to x, replace it or return strides."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for solver, model, guided, all_steps in product(
        sorted(solvers.SOLVERS), (velocity, written, replaced, transposed), (False, True), (False, True)
    ):
        found = []
        for backend in ("triton", "reference"):
            fm = FlowMatching(SHAPE[1:], solver, 3, backend=backend)
            found.append(
                fm.sample(
                    *(SHAPE[0], model),
                    noise=noise,
                    return_all_steps=all_steps,
                    use_classifier_free_guidance=guided,
                    unguided_step_fn=(lambda x, t: torch.sin(x)) if guided else None,
                )
            )
        for got, wanted in zip(*(one if all_steps else (one,) for one in found), strict=True):
            assert_same_bits(got, wanted)
    assert len(kinds) == len(solvers.SOLVERS) * 4 * 2 * 2


def by_keys_and_by_values(backend: str, solver: str, model: Any, **options: Any) -> tuple[Any, Any]:
    """A run whose steps are given keys, and one that is given what they draw; more steps than keys made at once."""
    keys, steps = KeyedNoise(7, (1 << 32) - 2), 20
    its_keys = noise.keys(keys, SHAPE[0], torch.device("cpu"))
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack(
        [reference_noise.keyed_noise(its_keys, SHAPE[1:], torch.float32, k + 1) for k in range(steps)], dim=1
    )
    fm = FlowMatching(SHAPE[1:], solver, steps, backend=backend)
    runs = [fm.sample(SHAPE[0], model(), noise=start, step_noise=given, **options) for given in (keys, drawn)]
    return runs[0], runs[1]


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The evaluation of each draw that is not the kernel's, which plain PyTorch makes."""
    made: list[int] = []

    def draw(keys: Any, x_dims: Any, dtype: Any, evaluation: int, backend: str, out: Any = None) -> torch.Tensor:
        made.append(evaluation)
        values = reference_noise.keyed_noise(keys, x_dims, dtype, evaluation)
        return values if out is None else out.copy_(values)

    monkeypatch.setattr(noise.dispatch, "keyed_noise", lambda *given: draw(*given))
    return made


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("solver", ["sde", "renoise"])
def test_noise_by_keys(kind: list[Any], solver: str, backend: str, draws: list[int]) -> None:
    """The rows hand keys to the kernel; where a derivative appears, and plain PyTorch goes on, they are drawn."""
    if backend == "cpu" and native.Rows is None:
        pytest.skip("the extension keeps no states")

    scales: list[torch.Tensor] = []

    def late() -> Any:
        scale, calls = torch.ones((), requires_grad=True), itertools.count()
        scales.append(scale)
        return lambda x, t: velocity(x, t) * (scale if next(calls) >= 5 else scale.detach())

    for all_steps in (False, True):
        got, wanted = by_keys_and_by_values(backend, solver, lambda: velocity, return_all_steps=all_steps)
        for x, y in zip(*((one if all_steps else (one,)) for one in (got, wanted)), strict=True):
            assert_same_bits(x, y)
    assert draws == []
    got, wanted = by_keys_and_by_values(backend, solver, late, differentiable=True)
    assert_same_bits(got, wanted)
    assert draws == list(range(6, 21))
    assert_same_bits(*[torch.autograd.grad(x.sum(), scale)[0] for x, scale in zip((got, wanted), scales, strict=True)])


def test_rows_end_with_sample(kind: list[Any]) -> None:
    """No cycle keeps the states until the garbage collector runs."""
    gc.disable()
    try:
        FlowMatching(SHAPE[1:], "rk4", 3, backend="triton").sample(3, written, return_all_steps=True)
        assert [one() for one in kind] == [None]
    finally:
        gc.enable()


first_row_and_a_later_one = pytest.mark.parametrize("first", [0.0, 0.5])


@first_row_and_a_later_one
def test_a_velocity_without_memory(kind: list[Any], first: float) -> None:
    """A state whose storage the model has resized."""

    def resized(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if t[0, 0, 0] >= first:
            x.untyped_storage().resize_(0)
        return torch.zeros(SHAPE)

    if native.TensorRows is not None:  # Python does not look at addresses
        with pytest.raises(ValueError, match="has no memory"):
            FlowMatching(SHAPE[1:], backend="triton").sample(3, resized)


@first_row_and_a_later_one
def test_x_replaced_by_a_zero_tensor(kind: list[Any], first: float) -> None:
    """Which has no memory either, and is zeros."""

    def zeroed(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if t[0, 0, 0] >= first:
            x.data = torch._efficientzerotensor(SHAPE)
        return torch.ones(SHAPE)

    found = FlowMatching(SHAPE[1:], num_inference_steps=4, backend="triton").sample(3, zeroed)
    assert_same_bits(found, torch.full(SHAPE, 0.25))


def test_what_a_model_does_to_x_is_gone_in_the_next_row(kind: list[Any]) -> None:
    """Gradients and attributes of x, which one row reads and no other; what is kept of it keeps its values."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.enable_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def step_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert not x.requires_grad and x.is_leaf and x.grad is None and not hasattr(x, "tag")
        x.tag = "mine"  # type: ignore[attr-defined]
        x.mul_(0.5)
        x.requires_grad_()
        (x**2).sum().backward()  # type: ignore[no-untyped-call]
        kept.append((x, x.detach().clone()))
        assert x.grad is not None
        return x.grad

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    found = []
    for backend, differentiable in (("triton", False), ("triton", True), ("reference", False)):
        with torch.set_grad_enabled(differentiable):
            fm = FlowMatching(SHAPE[1:], num_inference_steps=4, backend=backend)
            found.append(fm.sample(3, step_fn, noise=noise, return_all_steps=True, differentiable=differentiable)[0])
        assert not found[-1].requires_grad
    for got in found[:2]:
        assert_same_bits(got, found[2])
    for x, values in kept:
        assert_same_bits(x.detach(), values)


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
@pytest.mark.parametrize("read_once", [False, True])
def test_a_state_that_is_read_once_is_x_itself(read_once: bool) -> None:
    """Which saves a tensor; the first state, and what is read again, is x by a tensor of its own."""
    seen: list[torch.Tensor] = []

    def step_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.ones(3, 4)

    made = rows_of(torch.zeros(3, 4), [], read_once)
    state = torch.zeros(3, 4)
    for _ in range(3):
        v = made.evaluate(step_fn, state, 0)
        made.evaluate(step_fn, state, 0)
        assert [x.data_ptr() for x in seen] == [state.data_ptr()] * 2
        assert [x is state for x in seen] == [read_once and state.tolist() == [[7.0] * 4] * 3, False]
        seen.clear()
        state = made.step(state, state, v, None, 0, EULER)
        state.fill_(7.0)


def doubled(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, -x])


GUIDED = {"use_classifier_free_guidance": True}


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
@pytest.mark.parametrize(
    ("int_method", "model", "options", "wanted"),
    [
        ("euler", velocity, {}, True),
        ("ab2", velocity, {}, True),
        ("ab3", velocity, {}, False),  # the first of its steps has two rows
        ("heun", velocity, {}, False),
        ("euler", velocity, GUIDED | {"unguided_step_fn": velocity}, False),
        ("euler", doubled, GUIDED | {"combined_guidance": True}, True),
    ],
)
def test_which_states_are_read_once(
    int_method: str, model: Any, options: dict[str, Any], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step of several rows, which read its first state again, and no second model."""
    made, given = native.TensorRows, []
    monkeypatch.setattr(native, "Rows", None)
    monkeypatch.setattr(native, "TensorRows", lambda *arguments: given.append(arguments) or made(*arguments))
    FlowMatching(4, int_method, 4, backend="cpu").sample(2, model, **options)
    ((*_, read_once, _, _, _, _),) = given
    assert read_once == wanted


def rows_of(x: torch.Tensor, steps: list[Any], read_once: bool = False) -> Any:
    """`native.TensorRows` of states like x, whose steps are appended to a list."""
    assert native.TensorRows is not None
    return native.TensorRows(
        *(tuple(x.shape), native.DTYPES[x.dtype], -1, torch.zeros(2, 8), (torch.zeros(3, 1),), None, ()),
        *(0, 0, False, None, read_once, torch.empty_like, None, steps.append, rows.changed),
    )


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
def test_unusable() -> None:
    """Velocities that are taken as they are: plain, dense, of the state's shape and device, not wider, of one dtype."""

    class Subclass(torch.Tensor):
        pass

    steps: list[Any] = []
    base, bf16 = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bfloat16)

    no = [base.double(), base[:2], base[None], base.int(), base.to("meta"), base.to_sparse()]
    no += [base.as_subclass(Subclass), None, 1.0, torch.nested.nested_tensor([torch.zeros(4)] * 3)]
    no += [torch.zeros(4, 3).T, torch._neg_view(base), torch._efficientzerotensor((3, 4))]
    made = rows_of(base, steps)
    for v, u in [(base, None), (base, base), (bf16, None), (bf16, bf16)]:
        out = made.step(base, base, v, u, 1, EULER)
        assert out.shape == base.shape
        o = steps.pop()
        assert o[0] is out
        assert o[2] is v
        assert o[3] is u
    assert [made.step(base, base, v, None, 0, EULER) for v in no] == [None] * 13
    assert [made.step(base, base, base, u, 0, EULER) for u in [*no[:7], *no[8:], bf16]] == [None] * 13
    assert rows_of(bf16, steps).step(bf16, bf16, base, None, 0, EULER) is None
    assert steps == []
    assert made.slot() == 4


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
def test_wrong_calls() -> None:
    x = torch.zeros(3, 4)
    made = rows_of(x, [])
    with pytest.raises(IndexError, match="no such time"):
        made.evaluate(velocity, x, 1)
    with pytest.raises(TypeError, match="wanted an Evaluation"):
        made.step(x, x, x, None, 0, ())
    with pytest.raises(TypeError, match="takes 6 arguments, got 1"):
        made.step(x)
    with pytest.raises(TypeError, match="wanted a shape"):
        native.TensorRows([3, 4], 0, -1, x, (), None, (), 0, 0, False, None, False, None, None, None, None)
