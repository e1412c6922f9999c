"""The Triton kernels' compiled PTX, executed through its real launch path, against the reference, to the last bit.

Triton's JIT makes key, grid, arguments and PTX; in the place of its CUDA driver stands one that executes the PTX.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernel is not tested")

import torch
from ptx import cases
from ptx.operand_memory import NOTHING_FIRST
from ptx.triton_driver import ExecutingDriver, executing
from triton_cases import keyed, own_rows, special

from flowmatch_kernels.ops import dispatch, triton_log_prob, triton_noise
from flowmatch_kernels.ops import triton as backend


@pytest.fixture(params=[90, 100], ids=["sm_90", "sm_100"])
def driver(request: pytest.FixtureRequest) -> Iterator[ExecutingDriver]:
    with executing(backend.fused_step_kernel, request.param, direct=request.param == 90) as driver:
        yield driver


def sizes(driver: ExecutingDriver) -> list[tuple[int, bool]]:
    """Sizes, and whether they are aligned; of sm_100 the vectors alone."""
    return [(31, False), (1024, True)][driver.arch == 100 :]


def accesses(driver: ExecutingDriver) -> list[int]:
    return [launch.arguments["VECTOR"] for launch in driver.launches]


def test_steps(driver: ExecutingDriver) -> None:
    """145 steps: dtypes, guidance, history, trajectory, sizes around a block, aligned or not."""
    steps = cases.steps()
    failed = cases.failed(backend.fused_step_, steps)
    assert not failed, f"{len(failed)} failures in {len(steps)} steps:\n" + "\n".join(failed[:10])
    assert len(driver.launches) == len(steps) == 145
    assert set(accesses(driver)) == {1, 2, 4, 8}


def test_sum_first_and_out_of_the_velocity_dtype(driver: ExecutingDriver) -> None:
    """One in six sets of operands: each is a compilation."""
    for turn, (numel, aligned) in enumerate(sizes(driver)):
        assert cases.failed(backend.fused_step_, list(special(numel, aligned))[turn::6]) == []


def test_rows_of_their_own(driver: ExecutingDriver) -> None:
    """One in six sets of operands: each is a compilation."""
    for turn, (numel, aligned) in enumerate(sizes(driver)):
        assert cases.failed(backend.fused_step_, list(own_rows(numel, aligned))[turn::6]) == []
    assert {launch.arguments["own_rows"] for launch in driver.launches} == {True}


def test_noise_by_keys(driver: ExecutingDriver) -> None:
    """One in nine sets of operands: each is a compilation. No normal goes through shared memory."""
    for turn, (numel, aligned) in enumerate(sizes(driver)):
        assert cases.failed(backend.fused_step_, list(keyed(numel, aligned))[turn::9]) == []
    assert set(accesses(driver)) == ({1, 2, 4} if driver.arch == 90 else {2, 4})


def test_one_operand_off_its_boundary(driver: ExecutingDriver) -> None:
    """Each of nine operands alone, by one element and by half a 16-byte access: elements are moved singly."""
    off = cases.off_boundary()
    assert [failure for name, shift in off for failure in cases.shifted(backend.fused_step_, name, shift)] == []
    assert accesses(driver) == [1] * len(off)
    assert cases.shifted(backend.fused_step_, "none", 0) == []
    assert accesses(driver)[-1] == 4


def test_velocities_that_are_not_contiguous(driver: ExecutingDriver) -> None:
    """Transposed, expanded and sliced: v, u, and both."""
    assert cases.not_contiguous(backend.fused_step_) == []
    assert len(driver.launches) == 9


def test_sample(driver: ExecutingDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole loops: every solver, guidance, trajectory, dtypes; for sm_90 by cuLaunchKernel, else by Triton's way."""
    of = dispatch.BACKENDS["triton"]
    monkeypatch.setitem(dispatch.BACKENDS, "triton", of._replace(unavailable=lambda device_type: None))
    own, failed = cases.OWN_LOOPS[:1], []
    for loop in (*cases.LOOPS, *cases.STOCHASTIC_LOOPS, *cases.STRENGTH_LOOPS, *own, *cases.KEYED_LOOPS):
        before = len(driver.launches)
        failed += cases.looped(loop, "triton")
        launches = len(driver.launches) - before
        if launches < 4 or (loop.keyed and launches > 4):
            failed.append(f"not one launch an evaluation [{loop}]")
    assert not failed, "\n".join(failed)
    assert driver.by_driver == (118 if driver.arch == 90 else 0)  # the first of a kind is Triton's
    assert len(cases.LOOPS) == 19


@pytest.mark.parametrize("arch", [90, 100], ids=["sm_90", "sm_100"])
def test_keyed_noise(arch: int) -> None:
    """Samples of whole fours and of others; one launch a draw, none for an empty one."""
    with executing(triton_noise.keyed_noise_kernel, arch, NOTHING_FIRST) as driver:
        assert cases.noise(triton_noise.keyed_noise_, [torch.float32, torch.float16]) == []
        assert [launch.arguments["FOURS"] for launch in driver.launches] == 2 * [False, False, True, False, False]
        triton_noise.keyed_noise_(torch.empty(3, 0), torch.zeros(3, 3, dtype=torch.int64), 0)
        assert len(driver.launches) == 10


@pytest.mark.parametrize("arch", [90, 100], ids=["sm_90", "sm_100"])
def test_step_log_prob(arch: int) -> None:
    """Lanes that are filled or not, over the warps of a block and its shared memory; one launch."""
    pairs = [(torch.float32, torch.bfloat16), (torch.float64, torch.float64), (torch.float16, torch.float16)]
    with executing(triton_log_prob.step_log_prob_kernel, arch, NOTHING_FIRST) as driver:
        assert cases.log_probs(triton_log_prob.step_log_prob_, pairs, [31, 1023, 2048]) == []
        assert accesses(driver) == [vector for most in (4, 2, 4) for vector in [*[1] * 6, most, 1, most]]
        assert [launch.arguments["own_rows"] for launch in driver.launches] == [0, 0, 1] * 9
