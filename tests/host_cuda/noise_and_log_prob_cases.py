"""The CUDA kernels of keyed noise and step_log_prob, run on the host thread by thread, against the reference.

Not collected by name: tests/test_cuda_host.py runs this file in a process of its own, under AddressSanitizer.
"""

from __future__ import annotations

import host_cuda
import log_prob_operands
import pytest
from guarded import Guarded
from ptx import cases
from torch import Tensor

from flowmatch_kernels.ops import native
from flowmatch_kernels.ops.fused_step import VELOCITY_DTYPES, arithmetic_dtype

_host = host_cuda.load(host_cuda.OTHERS)
Run = _host.Double.Run
OUT, KEYS, BASE, V, NEXT, ROW, DENSITY = (k << 44 for k in range(1, 8))


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch):
    """The double of CUDA, as new."""
    monkeypatch.setattr(cases, "Guarded", Guarded)
    double = _host.fresh()
    double.together = True
    return double


def keyed_noise_(out: Tensor, keys: Tensor, evaluation: int) -> None:
    elements = out.numel() // len(out)
    _host.keyed_noise_cuda(out.data_ptr(), native.DTYPES[out.dtype], keys.data_ptr(), len(out), elements, evaluation)


def step_log_prob_(
    out: Tensor, base: Tensor, v: Tensor, next: Tensor, coefficients: Tensor, densities: Tensor, row: int
) -> None:
    _host.step_log_prob_cuda(
        *(x.data_ptr() for x in (out, base, v, next, coefficients[row], densities[row])),
        *(native.DTYPES[base.dtype], native.DTYPES[v.dtype], len(out), base.numel() // len(out)),
        own_rows=coefficients.dim() == 3,
    )


def test_keyed_noise(double) -> None:
    double.together = False
    assert cases.noise(keyed_noise_, native.DTYPES) == []
    assert len(double.launches) == 20


@pytest.mark.parametrize("order", [Run.FORWARD, Run.BACKWARD], ids=["first thread first", "last thread first"])
def test_step_log_prob(order, double) -> None:
    """In both orders: what no barrier separates shows in one of them."""
    double.run = order
    sizes = [3, 1023, 1025, 1032, 2048] if order == Run.FORWARD else [1032]
    assert cases.log_probs(step_log_prob_, log_prob_operands.PAIRS, sizes) == []


def test_each_element_of_noise_is_written_once(double) -> None:
    double.together, double.touch, double.record = False, False, True
    for dtype in native.DTYPES:
        for elements, off, widths in [(12, 0, 4), (12, 1, 1), (10, 0, 1)]:
            size, begin = dtype.itemsize, OUT + off * dtype.itemsize
            _host.keyed_noise_cuda(begin, native.DTYPES[dtype], KEYS, 3, elements, 0)
            width = min(16, widths * size)
            stored = sorted(access for access in double.accesses if access[0] == "w")
            assert stored == [("w", begin + i, width) for i in range(0, 3 * elements * size, width)]
            assert {access for access in double.accesses if access[0] != "w"} == {
                ("c", KEYS + 8 * k, 8) for k in range(9)
            }
            double = _host.fresh()
            double.touch, double.record = False, True


def test_each_operand_of_a_log_prob_is_read_once(double) -> None:
    double.touch, double.record = False, True
    for state, velocity in log_prob_operands.PAIRS:
        for elements, off, together in [(1028, 0, 4), (1028, 1, 1), (1030, 0, 1)]:
            begin = BASE + off * state.itemsize
            _host.step_log_prob_cuda(
                *(OUT, begin, V, NEXT, ROW, DENSITY, native.DTYPES[state], native.DTYPES[velocity], 2, elements)
            )
            wanted, size = [], arithmetic_dtype(state).itemsize
            for at, one in ((begin, state.itemsize), (V, velocity.itemsize), (NEXT, state.itemsize)):
                width = min(16, together * one)
                wanted += [("b", at + i, width) for i in range(0, 2 * elements * one, width)]
            wanted += [("w", OUT + size * k, size) for k in range(2)]
            assert sorted(access for access in double.accesses if access[0] != "c") == sorted(wanted)
            tables = {access for access in double.accesses if access[0] == "c"}
            assert tables == {("c", table + k * size, size) for table in (ROW, DENSITY) for k in range(2)}
            double = _host.fresh()
            double.together, double.touch, double.record = True, False, True


def test_rows_of_their_own(double) -> None:
    """Of the last of many samples: its row and no other, beyond 2^32 bytes."""
    samples = 2**31 - 1
    double.touch, double.record, double.run = False, True, Run.ONE
    double.one = 256 * (samples - 1)
    _host.step_log_prob_cuda(OUT, BASE, V, NEXT, ROW, DENSITY, 0, 0, samples, 1024, own_rows=True)
    first, density = ROW + (samples - 1) * 8 * 4, DENSITY + (samples - 1) * 2 * 4
    wanted = {("c", begin + 4 * k, 4) for begin in (first, density) for k in range(2)}
    assert {access for access in double.accesses if access[0] == "c"} == wanted


@pytest.mark.parametrize("elements", [2**31 + 4, 2**33 + 8])
def test_indexes(elements: int, double) -> None:
    """One thread in the third sample, at its end, on operands that are not there."""
    double.touch, double.record, double.run = False, True, Run.ONE
    blocks = elements // 4
    double.one = 3 * blocks - 1
    _host.keyed_noise_cuda(OUT, 0, KEYS, 3, elements, 0)
    assert [access for access in double.accesses if access[0] == "w"] == [("w", OUT + (3 * elements - 4) * 4, 16)]
    assert {access[1] for access in double.accesses if access[0] == "c"} == {KEYS + 48 + 8 * k for k in range(3)}
    double.one = 3 * blocks
    before = len(double.accesses)
    _host.keyed_noise_cuda(OUT, 0, KEYS, 3, elements, 0)
    assert len(double.accesses) == before, "a thread after the last counter touches memory"

    samples, elements = elements // 1024, 1024
    double = _host.fresh()
    double.touch, double.record, double.run = False, True, Run.ONE
    double.one = 256 * (samples - 1)
    _host.step_log_prob_cuda(OUT, BASE, V, NEXT, ROW, DENSITY, 0, 0, samples, elements)
    first = (samples - 1) * elements * 4
    wanted = [*(("b", at + first, 16) for at in (BASE, V, NEXT)), ("w", OUT + (samples - 1) * 4, 4)]
    assert [access for access in double.accesses if access[0] != "c"] == wanted


# ---- the launch ----

LAUNCHES = {
    "keyed_noise": lambda samples=3, elements=8, **on: _host.keyed_noise_cuda(OUT, 0, KEYS, samples, elements, 0, **on),
    "step_log_prob": lambda samples=3, elements=8, **on: _host.step_log_prob_cuda(
        OUT, BASE, V, NEXT, ROW, DENSITY, 0, 0, samples, elements, **on
    ),
}
every_op = pytest.mark.parametrize("op", LAUNCHES)


@every_op
def test_stream_and_device(op: str, double) -> None:
    double.run, double.device = Run.NONE, 1
    LAUNCHES[op](device=2, stream=0xABC0)
    (launched,) = double.launches
    assert (launched.stream, launched.device, launched.shared) == (0xABC0, 2, 0)
    assert launched.block == (256, 1, 1)
    assert double.calls == ["cudaGetDevice()", "cudaSetDevice(2)", "cudaLaunchKernel()", "cudaSetDevice(1)"]


def test_grids(double) -> None:
    double.run = Run.NONE
    for samples, elements, blocks in [
        (1, 1, 1),
        (1, 1024, 1),
        (1, 1025, 2),
        (3, 1025, 4),
        (2**31 - 1, 1024, 2**31 - 1),
    ]:
        LAUNCHES["keyed_noise"](samples, elements)
        assert double.launches[-1].grid == (blocks, 1, 1)
        LAUNCHES["step_log_prob"](samples, elements)
        assert double.launches[-1].grid == (samples, 1, 1)


@every_op
@pytest.mark.parametrize("call", ["cudaGetDevice", "cudaSetDevice", "cudaLaunchKernel"])
def test_an_error_is_told_and_cleared(op: str, call: str, double) -> None:
    double.run, double.failing, double.error = Run.NONE, call, 209
    with pytest.raises(RuntimeError, match=f"{op}: {call}: the words for error 209"):
        LAUNCHES[op](device=2)
    assert (double.launches, double.last_error, double.device) == ([], 0, 0)


@every_op
def test_nothing_to_do_and_too_large(op: str, double) -> None:
    LAUNCHES[op](0)
    assert double.calls == []
    with pytest.raises(ValueError, match=rf"{op}: a state of {2**31 * 1024} elements is too large"):
        LAUNCHES[op](2**31, 1024, device=1)
    assert (double.launches, double.device) == ([], 0)


def test_dtypes_that_do_not_go_together(double) -> None:
    pairs = [(s, v) for s in native.DTYPES for v in native.DTYPES if v not in VELOCITY_DTYPES[s]]
    assert pairs
    for state, velocity in pairs:
        with pytest.raises(ValueError, match="step_log_prob: the dtypes do not go together"):
            _host.step_log_prob_cuda(*range(6), native.DTYPES[state], native.DTYPES[velocity], 1, 4, device=1)
    assert (double.launches, double.device) == ([], 0)
