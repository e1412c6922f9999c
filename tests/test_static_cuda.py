"""Bounds on the CUDA kernels' rows of bench.static, for every set of operands that there can be."""

from __future__ import annotations

import re
from itertools import product

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


@pytest.mark.parametrize("arch", ARCHS)
def test_rows(arch: str) -> None:
    """The least bytes, nothing local, shared or waited for, and registers for 6 blocks; of float64 for 5, or 4."""
    for row in [static.measure("cuda", arch, s) for s in SPECIALISATIONS]:
        assert row.bytes_per_element == row.least_bytes_per_element, row
        assert (row.local_bytes, row.shared_bytes, row.barriers) == (0, 0, 0), row
        of_float64 = 64 if row.operands.startswith("u h1 h2 h3") else 48
        assert row.registers <= (64 if arch == "sm_75" else of_float64 if row.state == "float64" else 40), row
        if row.aligned:
            assert "x16" in row.loads, row


def test_a_kernel_holds_every_form_of_guidance() -> None:
    """No form is compiled on its own: it is a field of the operands, which all threads read alike."""
    assert static.KERNELS["cuda"].forms == (WEIGHTED,)
    for specialisation in SPECIALISATIONS:
        if specialisation.guided:
            others = {specialisation._replace(guidance=form) for form in (FROM_UNGUIDED, FROM_GUIDED)}
            assert {static_cuda.picked(s) for s in others} == {static_cuda.picked(specialisation)}


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_of_their_own(arch: str) -> None:
    """Two kernels for each set of dtypes, without spills: 4 blocks of vectors, and with noise; else 5 or 6."""
    own = {title: kernel for title, kernel in static_cuda.instantiations(arch).items() if "Tested<true" in title}
    assert len(own) == 40 + 28
    for title, kernel in own.items():
        usage, single, drawn = kernel.usage, title.endswith(", 1"), "Tested<true, true>" in title
        most = 64 if arch == "sm_75" or not single or drawn else 48 if "<double" in title else 40
        assert usage["STACK"] + usage["LOCAL"] + usage["SHARED"] == 0, (title, usage)
        assert usage["REG"] <= most, (title, usage)
        wide = any(access.width == 16 for access in static.sass_accesses(kernel.sass, lambda i: False) if access.store)
        assert wide != single, title


@pytest.mark.parametrize("arch", ARCHS)
def test_no_contraction_in_ptx(arch: str) -> None:
    kernels = static_cuda.instantiations(arch).values()
    assert len(kernels) == 312
    for kernel in kernels:
        assert not static.contractions(kernel.ptx), kernel.title
        assert ".ftz" not in kernel.ptx, kernel.title
        assert ".approx" not in kernel.ptx, kernel.title


@pytest.fixture
def other_rows(request: pytest.FixtureRequest) -> list[static.Row]:
    """Of keyed noise and step_log_prob on an architecture."""
    return list(static.other_ops("cuda", [request.param]))


@pytest.mark.parametrize("other_rows", ARCHS, indirect=True)
def test_rows_of_noise_and_log_prob(other_rows: list[static.Row]) -> None:
    """Nothing local; registers for 6 and for 4 blocks; the least bytes, four elements at once where they are whole."""
    noise = [row for row in other_rows if row.kernel == "cuda keyed_noise"]
    assert len(noise) == 8
    for row in noise:
        assert (row.local_bytes, row.shared_bytes, row.barriers, row.loads) == (0, 0, 0, ""), row
        assert row.registers <= 40, row
        assert row.bytes_per_element == row.least_bytes_per_element, row
        assert row.coefficient_loads == 3, row
        size = row.least_bytes_per_element
        assert row.stores == (f"{1 + (size == 8)}x{min(16, 4 * size)}" if row.aligned else f"4x{size}"), row
    log_prob = [row for row in other_rows if row.kernel == "cuda step_log_prob"]
    assert len(log_prob) == 2 * 2 * sum(map(len, VELOCITY_DTYPES.values()))
    for row in log_prob:
        lanes = 1024 * (8 if row.state == "float64" else 4)
        # A barrier a level, unrolled; from sm_80 on CUDA keeps 1024 bytes for itself.
        assert (row.local_bytes, row.barriers) == (0, 8), row
        assert row.shared_bytes - lanes in (0, 1024), row
        assert row.registers <= 64, row
        assert row.stores == ("1x8" if row.state == "float64" else "1x4"), row
        if row.aligned and row.state in ("float32", "float64"):
            assert "x16" in row.loads, row
        if row.aligned:
            assert not {"1", "2"} & {part.partition("x")[2] for part in row.loads.split()}, row


@pytest.mark.parametrize("arch", ["sm_90"])
def test_noise_and_log_prob_round_each_operation(arch: str) -> None:
    """The PTX holds no multiply-add, and square roots and quotients to nearest."""
    kernels = {op: static_cuda.instantiations(arch, source) for op, source in static_cuda.OTHERS.items()}
    for op, there in kernels.items():
        for kernel in there.values():
            assert not static.contractions(kernel.ptx), kernel.title
            assert not re.search(r"\.ftz|\.approx|\b(add|sub|mul|div|sqrt)\.(full\.)?f(32|64)", kernel.ptx), (
                kernel.title
            )
            assert kernel.ptx.count("sqrt.rn.f32") == 2 * (op == "keyed_noise"), kernel.title
            assert len(re.findall(r"div\.rn\.f(32|64)", kernel.ptx)) == (op == "step_log_prob"), kernel.title
