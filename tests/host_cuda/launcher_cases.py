"""The host's side of a CUDA launch, through a recording double of the CUDA calls it makes.

Not collected by name: tests/test_cuda_launcher.py runs this file in a process of its own, under AddressSanitizer.
"""

from __future__ import annotations

import host_cuda
import pytest
import torch

from flowmatch_kernels.ops import native
from flowmatch_kernels.ops.fused_step import EXACT

_host = host_cuda.load()
Run = _host.Double.Run
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ROW = 1 << 48


@pytest.fixture
def double():
    """The double of CUDA, as new; launches are recorded, and no thread runs."""
    double = _host.fresh()
    double.run = Run.NONE
    return double


def launch(
    numel=1024,
    state=F32,
    velocity=F32,
    rounding=0,
    guidance=0,
    device=0,
    stream=0,
    shift=(),
    sample=None,
    **present,
):
    """A launch on operands that are not there, on 16 bytes but for those named by `shift`."""
    names = ("out", "base", "v", "u", "h1", "h2", "h3", "trajectory", "history", "strength")
    arithmetic = F64 if state == F64 else F32
    dtypes = dict.fromkeys(names, arithmetic) | {"out": state, "base": state, "trajectory": state, "strength": state}
    dtypes |= {"v": velocity, "u": velocity}
    addresses = {name: (k + 1) << 40 for k, name in enumerate(names)}
    for name in shift:
        addresses[name] += dtypes[name].itemsize
    for name in names[3:]:
        if not present.get(name):
            addresses[name] = 0
    _host.fused_step_cuda(
        **addresses,
        coefficients=ROW,
        row=0,
        base_dtype=native.DTYPES[state],
        velocity_dtype=native.DTYPES[velocity],
        out_dtype=native.DTYPES[state],
        rounding=rounding,
        guidance=guidance,
        sum_first=False,
        slots=1,
        slot=0,
        numel=numel,
        sample=sample or numel,
        device=device,
        stream=stream,
    )


@pytest.mark.parametrize(
    ("numel", "shift", "blocks"),
    [
        (1, (), 1),
        (1024, (), 1),  # 256 threads of 4 elements
        (1025, (), 2),  # and one for the element left over
        (1027, (), 2),
        (4 * 256 * 7, (), 7),
        (256, ("v",), 1),
        (257, ("v",), 2),
        (4 * 256 * (2**31 - 1), (), 2**31 - 1),
        (256 * (2**31 - 1), ("out",), 2**31 - 1),
    ],
)
def test_grid(double, numel: int, shift: tuple[str, ...], blocks: int) -> None:
    launch(numel, shift=shift)
    (launched,) = double.launches
    assert launched.grid == (blocks, 1, 1)
    assert launched.block == (256, 1, 1)
    assert launched.shared == 0


@pytest.mark.parametrize(
    ("state", "velocity", "present", "elements"),
    [
        (F32, F32, {}, 4),
        (F32, BF16, {"u": True}, 4),
        (F64, BF16, {}, 2),
        (F64, F64, {"h1": True, "history": True}, 2),
        (BF16, BF16, {}, 8),
        (F16, F16, {"u": True, "history": True}, 8),
        (F16, F16, {"h1": True}, 4),
        (F32, F16, {"h1": True, "h2": True, "h3": True, "trajectory": True}, 4),
    ],
)
def test_sixteen_bytes_of_the_widest_operand(double, state, velocity, present, elements: int) -> None:
    launch(256 * elements * 3, state, velocity, **present)
    assert double.launches[0].grid == (3, 1, 1)


@pytest.mark.parametrize(("sample", "blocks"), [(128, 4), (4, 4), (2, 16), (1, 16), (8192 // 2, 4)])
def test_samples_that_no_vector_divides(double, sample: int, blocks: int) -> None:
    """Only a trajectory needs samples of whole vectors: without one they lie end to end."""
    launch(4096, trajectory=True, sample=sample)
    launch(4096, sample=sample)
    assert [x.grid[0] for x in double.launches] == [blocks, 4]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("terms", range(4))
def test_each_set_of_operands_has_its_kernel(double, guided: bool, terms: int) -> None:
    """Operands that are not read cost nothing: one kernel for each set, whatever is written, for all of guidance."""
    present = {"u": guided} | {f"h{k + 1}": True for k in range(terms)}
    launch(**present)
    launch(4096, history=True, trajectory=True, guidance=2, **present)
    launch(u=not guided, **{f"h{k + 1}": True for k in range(terms)})
    launch(u=guided, **{f"h{k + 1}": True for k in range((terms + 1) % 4)})
    launch(velocity=BF16, **present)
    launch(velocity=BF16, rounding=EXACT, **present)
    same, also, *others = [x.kernel for x in double.launches]
    assert same == also
    assert len({same, *others}) == 5


def test_stream_and_device(double) -> None:
    double.device = 3
    launch(device=3, stream=0xABC0)
    (launched,) = double.launches
    assert launched.stream == 0xABC0
    assert launched.device == 3
    assert double.calls == ["cudaGetDevice()", "cudaLaunchKernel()"]


def test_other_device_and_back(double) -> None:
    double.device = 1
    launch(device=2)
    assert double.launches[0].device == 2
    assert double.device == 1
    assert double.calls == ["cudaGetDevice()", "cudaSetDevice(2)", "cudaLaunchKernel()", "cudaSetDevice(1)"]


@pytest.mark.parametrize("call", ["cudaGetDevice", "cudaSetDevice", "cudaLaunchKernel"])
def test_an_error_is_told_and_cleared(double, call: str) -> None:
    double.failing, double.error = call, 209
    with pytest.raises(RuntimeError, match=f"fused_step: {call}: the words for error 209"):
        launch(device=2)
    assert double.launches == []
    assert double.last_error == 0, "the next caller of cudaGetLastError would be told"
    assert double.device == 0, "the former device is current again"
    double.failing = ""
    launch(device=2)
    assert len(double.launches) == 1


def test_nothing_to_do(double) -> None:
    launch(0)
    assert double.calls == []


@pytest.mark.parametrize(("numel", "shift"), [(4 * 256 * (2**31 - 1) + 1, ()), (256 * (2**31 - 1) + 1, ("base",))])
def test_too_large_for_one_grid(double, numel: int, shift: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"a state of {numel} elements is too large"):
        launch(numel, device=1, shift=shift)
    assert double.launches == []
    assert double.device == 0


@pytest.mark.parametrize(("state", "velocity"), [(F32, F64), (BF16, F32), (BF16, F16), (F16, BF16)])
def test_a_velocity_wider_than_the_state(double, state, velocity) -> None:
    with pytest.raises(ValueError, match="the dtypes do not go together"):
        launch(state=state, velocity=velocity, device=1)
    assert double.launches == []
    assert double.device == 0
