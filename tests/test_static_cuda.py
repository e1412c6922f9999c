"""Bounds on the CUDA kernel's rows of bench.static, for every set of operands that there can be."""

from __future__ import annotations

from itertools import product

import build_cache
import pytest

from bench import static, static_cuda
from flowmatch_kernels.ops.fused_step import FROM_GUIDED, FROM_UNGUIDED, PROMOTE, VELOCITY_DTYPES, WEIGHTED

reason = static_cuda.unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"the CUDA kernel is not compiled: {reason}")

ARCHS = ["sm_90", *[pytest.param(a, marks=pytest.mark.full) for a in static.CUDA_ARCHS if a != "sm_90"]]


SPECIALISATIONS = [
    static.Specialisation(state, velocity, *operands)
    for state, velocities in VELOCITY_DTYPES.items()
    for velocity in velocities
    # guidance, terms, trajectory, history, rounding, aligned, sum_first, strength
    for operands in [
        *product((None, WEIGHTED), range(4), *[(False, True)] * 2, (PROMOTE,), (False, True), (False,), (False,)),
        *product((None, WEIGHTED), (0,), (False, True), (False,), (PROMOTE,), (False, True), (False,), (True,)),
    ]
]


@pytest.fixture
def arch(request: pytest.FixtureRequest) -> str:
    """An architecture that the kernel has been compiled for."""
    with build_cache.lock(f"nvcc-{request.param}"):  # tests/test_cuda_compiled.py asks for it too
        static_cuda.instantiations(request.param)
    return request.param


@pytest.mark.parametrize("arch", ARCHS, indirect=True)
def test_rows(arch: str) -> None:
    """The least bytes, nothing local, shared or waited for, and registers for 5 or 6 blocks."""
    for row in [static.measure("cuda", arch, s) for s in SPECIALISATIONS]:
        assert row.bytes_per_element == row.least_bytes_per_element, row
        assert (row.local_bytes, row.shared_bytes, row.barriers) == (0, 0, 0), row
        assert row.registers <= (64 if arch == "sm_75" else 48 if row.state == "float64" else 40), row
        if row.aligned:
            assert "x16" in row.loads, row


def test_a_kernel_holds_every_form_of_guidance() -> None:
    """No form is compiled on its own: it is a field of the operands, which all threads read alike."""
    assert static.KERNELS["cuda"].forms == (WEIGHTED,)
    for specialisation in SPECIALISATIONS:
        if specialisation.guided:
            others = {specialisation._replace(guidance=form) for form in (FROM_UNGUIDED, FROM_GUIDED)}
            assert {static_cuda.picked(s) for s in others} == {static_cuda.picked(specialisation)}


@pytest.mark.parametrize("arch", ARCHS, indirect=True)
def test_rows_of_their_own(arch: str) -> None:
    """Two kernels for each set of dtypes, without spills: 4 blocks of vectors, 5 or 6 of single elements."""
    own = {title: kernel for title, kernel in static_cuda.instantiations(arch).items() if "Tested<true>" in title}
    assert len(own) == 40
    for title, kernel in own.items():
        usage, single = kernel.usage, title.endswith(", 1")
        most = 64 if arch == "sm_75" or not single else 48 if "<double" in title else 40
        assert usage["STACK"] + usage["LOCAL"] + usage["SHARED"] == 0, (title, usage)
        assert usage["REG"] <= most, (title, usage)
        wide = any(access.width == 16 for access in static.sass_accesses(kernel.sass, lambda i: False) if access.store)
        assert wide != single, title


@pytest.mark.parametrize("arch", ARCHS, indirect=True)
def test_no_contraction_in_ptx(arch: str) -> None:
    kernels = static_cuda.instantiations(arch).values()
    assert len(kernels) == 284
    for kernel in kernels:
        assert not static.contractions(kernel.ptx), kernel.title
        assert ".ftz" not in kernel.ptx, kernel.title
        assert ".approx" not in kernel.ptx, kernel.title
