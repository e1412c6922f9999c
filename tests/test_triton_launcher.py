"""Launches without Triton's JIT are the JIT's own: the same kernel, grid, stream and arguments."""

from __future__ import annotations

import ctypes
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernel is not tested")

import triton
from triton_cases import PAIRS
from triton_recorder import Launch, recording

from flowmatch_kernels import FlowMatching
from flowmatch_kernels.ops import cuda_driver, dispatch, native, triton_launcher
from flowmatch_kernels.ops import triton as backend
from flowmatch_kernels.ops.fused_step import (
    EXACT,
    FROM_GUIDED,
    FROM_UNGUIDED,
    PROMOTE,
    ROUNDED,
    WEIGHTED,
    Operands,
    arithmetic_dtype,
)
from flowmatch_kernels.ops.triton_launcher import Launcher

SIZES = (1, 15, 16, 17, 4096)
F32, BF16 = torch.float32, torch.bfloat16
KERNEL = backend.fused_step_kernel


def operands(
    numel: int = 4096,
    state: torch.dtype = F32,
    velocity: torch.dtype = F32,
    present: tuple[str, ...] = (),
    shifted: tuple[str, ...] = (),
    **given: Any,
) -> Operands:
    """Operands of [1, numel]; those `shifted` begin one element after a multiple of 16 bytes."""
    arithmetic = arithmetic_dtype(state)
    dtypes = {"out": state, "base": state, "v": velocity, "u": velocity, "h1": arithmetic, "h2": arithmetic}
    dtypes |= {"h3": arithmetic, "history": arithmetic, "trajectory": state}
    tensors: dict[str, Any] = dict.fromkeys(("u", "h1", "h2", "h3"))
    for name, dtype in dtypes.items():
        if name in ("out", "base", "v", *present):
            shape = (1, 17, numel) if name == "trajectory" else (1, numel)
            elements = torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype)
            tensors[name] = elements[name in shifted :][: elements.numel() - 1].view(shape)
    return Operands(**{"coefficients": torch.zeros(17, 8, dtype=arithmetic), "row": 0} | tensors | given)


HISTORY = ((), ("h1",), ("h1", "h2"), ("h1", "h2", "h3"))
#: Every set of operands.
PRESENT = [
    (*u, *terms, *trajectory, *history)
    for u, terms, trajectory, history in product(((), ("u",)), HISTORY, ((), ("trajectory",)), ((), ("history",)))
]
INTEGERS = [{"row": row, "slot": slot} for row, slot in product((0, 1, 16), (0, 1, 16))]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    launcher = Launcher(KERNEL, backend.launch_options(32))
    monkeypatch.setattr(backend, "_launcher", launcher)
    return launcher


@pytest.fixture
def driver(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The recording driver; `jit` counts what Triton's JIT has launched."""
    driver: Any
    with recording(KERNEL) as driver:
        driver.jit = 0
        run = KERNEL.run

        def counted(*arguments: Any, **keywords: Any) -> Any:
            driver.jit += 1
            return run(*arguments, **keywords)

        monkeypatch.setattr(KERNEL, "run", counted)
        yield driver


def launched(driver: Any, given: Operands) -> tuple[Launch, bool]:
    """One launch, and whether the JIT made it."""
    driver.launches.clear()
    before = driver.jit
    backend.launch(given)
    (record,) = driver.launches
    return record, driver.jit > before


def check_same(got: Launch, wanted: Launch) -> None:
    assert got._replace(arguments={}) == wanted._replace(arguments={})
    assert list(got.arguments) == list(wanted.arguments)
    for name, value in wanted.arguments.items():
        other = got.arguments[name]
        assert other is value if isinstance(value, torch.Tensor) else (type(other), other) == (type(value), value)


# ---- the variant ----


def jit_key(arguments: tuple[Any, ...], binder: Any) -> str:
    """What `JITFunction.run` looks the kernel up by."""
    options = backend.launch_options(32) | {"debug": False, "instrumentation_mode": ""}
    _, specialization, rest = binder(*arguments, **options)
    return str(specialization) + str(rest)


@pytest.mark.parametrize(("state", "velocity"), PAIRS, ids=str)
def test_launches_of_one_variant_are_one_to_the_jit(
    state: torch.dtype, velocity: torch.dtype, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other way round: no variant compiles what another has compiled."""
    seen: list[tuple[Any, tuple[Any, ...]]] = []
    monkeypatch.setattr(backend, "_launcher", lambda variant, blocks, arguments: seen.append((variant, arguments)))
    binder = KERNEL.create_binder()[-1]
    keys: dict[Any, str] = {}
    for turn, (present, numel) in enumerate(product(PRESENT, SIZES)):
        forms = (WEIGHTED, FROM_UNGUIDED, FROM_GUIDED)
        for guidance, rounding, shifted in product(
            forms, (PROMOTE, EXACT, ROUNDED), ((), ("out",), (present or ("v",))[-1:])
        ):
            integers = INTEGERS[(turn + guidance) % len(INTEGERS)]
            given = {"rounding": rounding, "guidance": guidance} | integers
            backend.launch(operands(numel, state, velocity, present, shifted, **given))
            variant, arguments = seen.pop()
            key = jit_key(arguments, binder)
            assert keys.setdefault(variant, key) == key, (variant, arguments)
    # Every set of operands with each rounding and alignments; the forms of guidance are of those with u.
    assert len(keys) == len(set(keys.values())) == (16 + 16 * 3) * 3 * 2


def test_dtypes_that_break_the_contract_are_other_variants(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend does not check dtypes: a wrong one may not run a kernel that was compiled for the right one."""
    names = ("out", "base", "v", "u", "h1", "h2", "h3", "coefficients", "trajectory", "history")
    seen = []
    monkeypatch.setattr(backend, "_launcher", lambda variant, blocks, arguments: seen.append(variant))
    given = operands(present=names)
    backend.launch(given)
    for name in names:
        backend.launch(given._replace(**{name: getattr(given, name).double()}))
    assert len(set(seen)) == 1 + len(names)


# ---- the launch ----


def cases() -> Iterator[dict[str, Any]]:
    """Each value of everything, with what else is there in turn: all pairs of dtypes, operands, forms, alignments."""
    for turn, (state, velocity) in enumerate(PAIRS):
        yield {"state": state, "velocity": velocity, "present": PRESENT[turn * 7 % len(PRESENT)]}
    yield {"present": ()}
    yield {"present": ("u", "h1", "h2", "h3", "trajectory", "history"), "guidance": FROM_UNGUIDED}
    yield {"present": ("u", "trajectory"), "guidance": FROM_GUIDED, "velocity": BF16}
    yield {"present": ("trajectory",), "shifted": ("trajectory",)}
    yield {"present": ("h1", "history"), "rounding": ROUNDED}


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: " ".join(map(str, case.values())))
def test_a_direct_launch_is_the_ordinary_one(case: dict[str, Any], driver: Any, launcher: Launcher) -> None:
    """Every size, row and slot, aligned and not: function, grid, stream and arguments."""
    table = [(numel, integers) for numel, integers in product(SIZES, INTEGERS)]
    every = [operands(numel, **case | integers) for numel, integers in table]
    launcher._direct = False
    wanted = [launched(driver, given) for given in every]
    launcher._direct = True
    got = [launched(driver, given) for given in every]
    assert all(by_jit for _, by_jit in wanted)
    vectors = {record.arguments["VECTOR"] for record, _ in wanted}
    assert sum(by_jit for _, by_jit in got) == len(vectors)  # the first of each variant
    for (direct, _), (ordinary, _) in zip(got, wanted, strict=True):
        check_same(direct, ordinary)


def test_the_stream_is_the_current_one(driver: Any) -> None:
    given = operands(16)
    for stream in (7, 8, 7, 0):
        driver.stream = stream
        record, _ = launched(driver, given)
        assert record.stream == stream
    assert driver.jit == 1


def test_each_device_has_its_own_kernel(driver: Any) -> None:
    """And is launched on its own current stream, by Triton and without it."""
    given = operands(16)
    functions = []
    for device in (0, 1, 0, 1):
        driver.device = device
        record, by_jit = launched(driver, given)
        assert by_jit == (len(functions) < 2)
        assert record.stream == driver.stream + 100 * device
        functions.append(record.function)
    assert functions[:2] == functions[2:]
    assert functions[0] != functions[1]
    assert driver.jit == 2


def test_kernels_that_triton_has_dropped_are_compiled_anew(driver: Any) -> None:
    given = operands(16)
    launched(driver, given)
    before, _ = launched(driver, given)
    KERNEL.device_caches.clear()
    after, by_jit = launched(driver, given)
    assert by_jit
    assert after.function != before.function
    again, by_jit = launched(driver, given)
    assert not by_jit
    assert again.function == after.function


def test_threads(driver: Any) -> None:
    """Launches of several threads, of variants that no one has launched yet: each gets its own kernel, loaded once.

    Triton lets a thread launch what another one is still loading, with no function.
    """
    kinds = [operands(16, present=present) for present in ((), ("u",), ("h1",), ("history",))]
    ready, load = threading.Barrier(4), driver.utils.load_binary

    def slow(*binary: Any) -> tuple[int, ...]:
        time.sleep(0.05)
        return load(*binary)

    driver.utils.load_binary = slow

    def launches() -> None:
        ready.wait(60)
        for turn in range(40):
            backend.launch(kinds[turn % 4])

    threads = [threading.Thread(target=launches) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.launches) == 160
    functions = []
    for given in kinds:
        records = [record for record in driver.launches if record.arguments["v"] is given.v]
        assert len(records) == 40
        (function,) = {record.function for record in records}
        functions.append(function)
    assert sorted(functions) == [1, 2, 3, 4]


# ---- rows of sample(), csrc/tensor_row.cpp ----


@pytest.fixture
def sampled(driver: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Launch, bool]]]:
    """Runs rk4 with a trajectory; `at`, a dict, has what to call in which evaluation. The launches, and who made them.

    In C++ and by fused_step_ alone the tensors and numbers are the same.
    """
    of = dispatch.BACKENDS["triton"]
    noise = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

    def run(steps: int = 3, at: dict[int, Callable[[], object]] | None = None, cpp: bool = True, **options: Any) -> Any:
        serving = of._replace(devices=(), unavailable=lambda device_type: None)
        monkeypatch.setitem(dispatch.BACKENDS, "triton", serving if cpp else serving._replace(load_launch=lambda: None))
        calls = itertools.count()
        made: list[tuple[Launch, bool]] = []
        before = [len(driver.launches), driver.jit]

        def step_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            k = next(calls)
            if k:
                made.append((driver.launches[-1], driver.jit > before[1]))
            before[1] = driver.jit
            (at or {}).get(k, lambda: None)()
            return torch.full_like(x, float(k))

        fm = FlowMatching(8, "rk4", steps, backend="triton")
        fm.sample(3, step_fn, noise=noise, return_all_steps=True, **options)
        made.append((driver.launches[-1], driver.jit > before[1]))
        assert len(driver.launches) - before[0] == len(made) == 4 * steps
        return made

    return run


@pytest.mark.skipif(native.TensorRows is None, reason="the extension is not built")
@pytest.mark.parametrize("own", [False, True], ids=["one row for all", "rows of their own"])
def test_rows_are_launched_as_one_step_is(own: bool, sampled: Any) -> None:
    """Everything but addresses, which are those of other tensors of the same dtype: and no JIT after the first step."""
    options = {"time_steps": [[0.0, 0.1, 0.5, 1.0], [0.5, 0.5, 0.6, 1.0], [0.2, 0.3, 0.4, 0.5]]} if own else {}
    sampled(cpp=False, **options)
    wanted, got = sampled(cpp=False, **options), sampled(**options)
    assert [by_jit for _, by_jit in got] == [k < 4 for k in range(12)]  # of each key the first
    assert not any(by_jit for _, by_jit in sampled(**options))
    for launch, _ in got:
        assert (launch.arguments["own_rows"], launch.arguments["span"]) == (own, 8 if own else 24)
    assert [launch.arguments["row"] for launch, _ in got] == [k * (3 if own else 1) for k in range(12)]
    written: dict[str, Any] = {}
    for (one, _), (other, _) in zip(got, wanted, strict=True):
        assert one._replace(arguments={}) == other._replace(arguments={})
        for name, value in other.arguments.items():
            found = one.arguments[name]
            if not isinstance(value, torch.Tensor):
                assert (type(found), found) == (type(value), value), name
                continue
            address = found if isinstance(found, int) else found.data_ptr()
            if name in ("coefficients", "trajectory"):
                assert written.setdefault(name, address) == address
            assert address % 16 == 0


@pytest.mark.skipif(native.TensorRows is None, reason="the extension is not built")
def test_rows_that_only_the_jit_may_launch(sampled: Any, driver: Any) -> None:
    """A hook that is set between two rows, caches that are dropped, another current device, another stream."""
    sampled()
    runtime, seen = triton.knobs.runtime, []
    hook = seen.append
    made = sampled(
        at={3: lambda: runtime.launch_enter_hook.add(hook), 5: lambda: runtime.launch_enter_hook.remove(hook)}
    )
    assert [k for k, (_, by_jit) in enumerate(made) if by_jit] == [3, 4]
    assert len(seen) == 2
    made = sampled(at={6: KERNEL.device_caches.clear})
    assert [k for k, (_, by_jit) in enumerate(made) if by_jit] == [6, 7, 8, 9]
    assert made[6][0].function != made[2][0].function
    made = sampled(at={5: lambda: setattr(driver, "stream", 9)})
    assert [launch.stream for launch, _ in made] == [7] * 5 + [9] * 7
    assert not any(by_jit for _, by_jit in made)
    made = sampled(at={4: lambda: setattr(driver, "device", 1)})
    assert [launch.device for launch, _ in made] == [0] * 4 + [1] * 8
    assert [by_jit for _, by_jit in made] == [False] * 4 + [True] * 4 + [False] * 4


# ---- the ordinary path ----


@pytest.fixture
def warm(driver: Any) -> Operands:
    """Operands that would be launched directly."""
    given = operands(16)
    launched(driver, given)
    assert not launched(driver, given)[1]
    return given


def test_hooks_fire(driver: Any, warm: Operands) -> None:
    """As profilers set them: added to the chain, or put in its place."""
    runtime, seen = triton.knobs.runtime, []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(hook)
        try:
            assert launched(driver, warm)[1]
        finally:
            chain.remove(hook)
        assert seen.pop() == "fused_step_kernel"
        assert not launched(driver, warm)[1]
    with runtime.scope():
        runtime.launch_enter_hook = hook
        assert launched(driver, warm)[1]
        assert seen.pop() == "fused_step_kernel"
        runtime.launch_enter_hook = None
        assert not launched(driver, warm)[1]
    assert not seen


def test_what_the_jit_compiles_otherwise_for(driver: Any, warm: Operands, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = launched(driver, warm)
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "debug", True)
        debugging, by_jit = launched(driver, warm)
        assert by_jit
        assert debugging.function != plain.function
    hooked = []
    with monkeypatch.context() as patch:
        patch.setattr(KERNEL, "pre_run_hooks", [lambda *_, **__: hooked.append(True)])
        assert launched(driver, warm)[1]
        assert hooked
    again, by_jit = launched(driver, warm)
    assert not by_jit
    assert again.function == plain.function


@pytest.mark.parametrize("unknown", ["version", "parameters", "no PTX", "backend"])
def test_unknown(
    unknown: str,
    driver: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every launch by Triton itself, and one line of log."""
    find = triton_launcher._unknown
    with caplog.at_level(logging.INFO, logger="flowmatch_kernels"):
        if unknown == "version":
            monkeypatch.setattr(triton, "__version__", "4.0.0")
        elif unknown == "backend":
            monkeypatch.setattr(triton_launcher, "_unknown", lambda kernel, _, *rest: find(kernel, "hip", *rest))
        else:
            ptx = ".visible .entry fused_step_kernel(\n.param .u64 .ptr x,\n.param .u32 y\n)"
            other = SimpleNamespace(name="fused_step_kernel", asm={} if unknown == "no PTX" else {"ptx": ptx})
            monkeypatch.setattr(
                triton_launcher, "_unknown", lambda kernel, b, compiled, arguments: find(kernel, b, other, arguments)
            )
        for given in (operands(16), operands(16, present=("u",)), operands(17)):
            for _ in range(2):
                assert launched(driver, given)[1]
    (line,) = [record.getMessage() for record in caplog.records]
    said = {"version": "4.0.0", "backend": "'hip'", "parameters": ".u32", "no PTX": "other parameters"}[unknown]
    assert said in line


def test_what_is_no_jit_function_is_called_as_it_is() -> None:
    """Triton's interpreter, which compiles nothing and has no driver."""
    calls = []

    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: calls.append((grid, arguments, options))

    launch = Launcher(Interpreted(), {"num_warps": 4})
    for _ in range(2):
        launch("variant", 3, (1, 2))
    assert calls == [((3,), (1, 2), {"num_warps": 4})] * 2


# ---- cuLaunchKernel ----


def test_address_of_cu_launch_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none without a driver, and none in a thread without a context."""

    def library(error: int, context: int) -> Any:
        def current(pointer: Any) -> int:
            pointer._obj.value = context
            return error

        return SimpleNamespace(cuCtxGetCurrent=current, cuLaunchKernel=ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0))

    for found, wanted in ((None, False), (library(0, 5), True), (library(0, 0), False), (library(3, 5), False)):
        monkeypatch.setattr(cuda_driver, "_library", lambda found=found: found)
        assert (cuda_driver.launch_kernel() != 0) == wanted
    monkeypatch.undo()
    if not torch.cuda.is_available():
        monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
        cuda_driver._library.cache_clear()
        assert cuda_driver.launch_kernel() == 0
        cuda_driver._library.cache_clear()


@pytest.mark.parametrize(
    ("more", "threads"),
    [({}, 128), ({"num_warps": 8}, 256), ({"num_ctas": 2}, 0), ({"shared": 16}, 0), ({"launch_pdl": True}, 0)]
    + [({name: 1}, 0) for name in ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid")],
)
def test_launches_that_are_more_than_cu_launch_kernel(more: dict[str, Any], threads: int) -> None:
    plain = {"num_warps": 4, "num_ctas": 1, "shared": 0, "launch_pdl": False, "tensordesc_meta": []}
    assert triton_launcher._threads(SimpleNamespace(**plain | more)) == threads


@pytest.mark.skipif(native.TensorRows is None, reason="the extension is not built")
def test_a_launch_that_fails(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cuLaunchKernel returns is raised, at the step that it is of."""
    of = dispatch.BACKENDS["triton"]
    monkeypatch.setitem(dispatch.BACKENDS, "triton", of._replace(devices=(), unavailable=lambda device_type: None))
    fails = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 701)
    monkeypatch.setattr(cuda_driver, "launch_kernel", lambda: ctypes.cast(fails, ctypes.c_void_p).value)
    calls: list[int] = []
    with pytest.raises(RuntimeError, match=r"Triton's kernel was not launched: CUDA error 701"):
        FlowMatching(4, num_inference_steps=6).sample(
            2, lambda x, t: calls.append(1) or torch.zeros_like(x), backend="triton"
        )
    assert len(calls) == 2  # the first launch is Triton's own
