"""The CUDA kernels' compiled PTX, executed through the extension's CUDA half, against the reference, to the last bit.

nvcc compiles csrc's *_cuda.cu with their host code, which is linked with csrc/launch_cuda.cpp and a double of the CUDA
runtime library; `flowmatch_kernels._C` calls it as on a GPU, and each launch executes the PTX.
"""

from __future__ import annotations

from collections.abc import Iterator

import log_prob_operands
import pytest
import torch
from ptx import cases, cuda_runtime
from triton_cases import keyed, own_rows, special

from flowmatch_kernels.ops import dispatch, native, reference_log_prob

reason = cuda_runtime.unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(scope="module")
def half() -> cuda_runtime.CudaHalf:
    return cuda_runtime.CudaHalf()


@pytest.fixture(params=cuda_runtime.ARCHS, ids=[f"sm_{arch}" for arch in cuda_runtime.ARCHS])
def cuda(half: cuda_runtime.CudaHalf, request: pytest.FixtureRequest) -> Iterator[cuda_runtime.CudaHalf]:
    half.arch = request.param
    half.launches.clear()
    yield half
    assert half.double.double_last_error() == 0


def test_every_kernel_is_registered(cuda: cuda_runtime.CudaHalf) -> None:
    """The host's code knows as many kernels as there are in the PTX."""
    assert cuda.double.double_kernel_count() == len(cuda.names()) == 312 + 8 + 36  # of fused_step, noise, log_prob


def test_steps(cuda: cuda_runtime.CudaHalf) -> None:
    """540 steps: three in four sets of operands for each pair of dtypes, sizes around a block, aligned or not.

    Each architecture leaves out another quarter.
    """
    steps = cases.combinations_but(cuda_runtime.ARCHS.index(cuda.arch))
    failed = cases.failed(cuda.fused_step_, steps)
    assert not failed, f"{len(failed)} failures in {len(steps)} steps:\n" + "\n".join(failed[:10])
    assert len(cuda.launches) == len(steps) == 540


def test_sum_first_and_out_of_the_velocity_dtype(cuda: cuda_runtime.CudaHalf) -> None:
    for numel, aligned in [(1, False), (1024, True), (1025, True)]:
        assert cases.failed(cuda.fused_step_, special(numel, aligned)) == []


def test_rows_of_their_own(cuda: cuda_runtime.CudaHalf) -> None:
    for numel, aligned in [(31, False), (1024, True), (3072, True)]:
        assert cases.failed(cuda.fused_step_, own_rows(numel, aligned)) == []
    kernels = {launch.name for launch in cuda.launches}
    assert len(kernels) == 40, "vectors and single elements, of each set of dtypes"


def test_noise_by_keys(cuda: cuda_runtime.CudaHalf) -> None:
    for numel, aligned in [(31, False), (1024, True), (3072, True)]:
        assert cases.failed(cuda.fused_step_, keyed(numel, aligned)) == []
    kernels = {launch.name for launch in cuda.launches}
    assert len(kernels) == 28, "vectors and single elements, of each set of dtypes"


def test_one_operand_off_its_boundary(cuda: cuda_runtime.CudaHalf) -> None:
    """Each of nine operands alone, by one element and by half a 16-byte access: elements are moved singly."""
    off = cases.off_boundary()
    assert [failure for name, shift in off for failure in cases.shifted(cuda.fused_step_, name, shift)] == []
    singly = [launch.grid[0] for launch in cuda.launches]
    assert cases.shifted(cuda.fused_step_, "none", 0) == []
    # Four bfloat16 are 8 bytes: v and u may begin in the middle of 16.
    assert singly == [1 if name in ("v", "u") and shift == 8 else 4 for name, shift in off]
    assert cuda.launches[-1].grid[0] == 1


def test_velocities_that_are_not_contiguous(cuda: cuda_runtime.CudaHalf) -> None:
    """Transposed, expanded and sliced: v, u, and both."""
    assert cases.not_contiguous(cuda.fused_step_) == []
    assert len(cuda.launches) == 9


def test_sample(cuda: cuda_runtime.CudaHalf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole loops: every solver, guidance, trajectory, dtypes."""
    of = dispatch.BACKENDS["cuda"]
    served = of._replace(devices=("cuda", "cpu"), unavailable=lambda device_type: None, load=lambda: cuda.fused_step_)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", served)
    added = *cases.STOCHASTIC_LOOPS, *cases.STRENGTH_LOOPS, *cases.KEYED_LOOPS, *cases.OWN_LOOPS, *cases.MORE_LOOPS
    loops, failed = [*cases.LOOPS, *added], []
    for loop in loops:
        before = len(cuda.launches)
        failed += cases.looped(loop, "cuda")
        launches = len(cuda.launches) - before
        if launches < 4 or (loop.keyed and launches > 4):
            failed.append(f"not one launch an evaluation [{loop}]")
    assert not failed, "\n".join(failed)
    assert len(loops) == 40


def test_rows(cuda: cuda_runtime.CudaHalf) -> None:
    """Whole loops by csrc/tensor_row.cpp, which launches without Python: every solver, guidance, trajectory, dtypes."""
    loops, failed = [*cases.LOOPS, *cases.OWN_LOOPS, *cases.MORE_LOOPS], []
    for loop in loops:
        before = len(cuda.launches)
        failed += cases.looped_by_rows(loop, cuda)
        if len(cuda.launches) - before < 4:
            failed.append(f"not one launch an evaluation [{loop}]")
    assert not failed, "\n".join(failed)
    assert len(loops) == 34


def test_keyed_noise(cuda: cuda_runtime.CudaHalf) -> None:
    """Every dtype: samples of whole fours and of others; one launch a draw, none for an empty one."""
    assert cases.noise(cuda.keyed_noise_, native.DTYPES) == []
    assert len(cuda.launches) == 20
    assert len({launch.name for launch in cuda.launches}) == 8
    keys = torch.zeros(3, 3, dtype=torch.int64)
    cuda.keyed_noise_(torch.empty(3, 0), keys, 0)
    out, keys = (cuda_runtime.OnCuda(x, 0) for x in (torch.empty(3, 4), keys))
    with pytest.raises(RuntimeError, match="launch_noise: the extension's CUDA half is not loaded"):
        native.keyed_noise_(out.tensor, keys.tensor, 0)


def test_step_log_prob(cuda: cuda_runtime.CudaHalf) -> None:
    """Every pair of dtypes, lanes that are filled or not; one launch, none for an empty batch."""
    assert cases.log_probs(cuda.step_log_prob_, log_prob_operands.PAIRS, [31, 1023, 1032, 2048]) == []
    assert len(cuda.launches) == 108
    assert len({launch.name for launch in cuda.launches}) == 36
    x = torch.empty(0, 4)
    cuda.step_log_prob_(torch.empty(0), x, x, x, *log_prob_operands.tables(torch.float32), 0)


def test_step_log_prob_of_strided_operands_and_of_one_sample(cuda: cuda_runtime.CudaHalf) -> None:
    """A transposed operand costs one copy; a sample has the same bits alone."""
    base, v, next, *tables = log_prob_operands.drawn([3, 32, 40], torch.float32, torch.bfloat16)
    got = torch.full([3], torch.nan)
    cuda.step_log_prob_(got, base, v.transpose(1, 2).contiguous().transpose(1, 2), next, *tables, 0)
    assert torch.equal(got, reference_log_prob.step_log_prob(base, v, next, *tables, 0))
    alone = torch.full([1], torch.nan)
    cuda.step_log_prob_(alone, base[1:2], v[1:2], next[1:2], *tables, 0)
    assert torch.equal(alone, got[1:2])
