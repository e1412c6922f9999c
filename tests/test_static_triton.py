"""What the Triton kernel becomes, held to its bounds: python -m bench.static, read by tests."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernel is not tested")

from bench import static
from bench.static import Row, Specialisation, compile_triton, contractions, instructions, measure, picked_by_sample
from flowmatch_kernels.ops.fused_step import (
    FROM_GUIDED,
    FROM_UNGUIDED,
    PROMOTE,
    VELOCITY_DTYPES,
    WEIGHTED,
    arithmetic_dtype,
)

pytestmark = pytest.mark.usefixtures("kept_disassemblies")

ARCHS = static.KERNELS["triton"].archs
NVIDIA = [arch for arch in ARCHS if arch.startswith("sm_")]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def most_registers(specialisation: Specialisation) -> int:
    """40, and more for cause: history terms and float64 take more, and of single elements there are four a thread.

    Of 65,536 registers 40 leave 12 blocks of 128 threads to a multiprocessor, 48 leave 10, 56 leave 9, 64 leave 8 and
    80 leave 6. No state that a 16-byte access fits takes the path of single elements.
    """
    if specialisation.aligned:
        return 40 if specialisation.terms < 2 else 48
    if specialisation.state == F64:
        return 64 if specialisation.terms < 2 else 80
    return {0: 40, 1: 48}.get(specialisation.terms, 56)


#: Every operand there is: no row of a table asks for it today. 46 registers, 10 blocks of 128 threads.
EVERYTHING = {"guidance": WEIGHTED, "terms": 3, "trajectory": True, "history": True}

ALPAMAYO = [
    Specialisation(F32, velocity, guidance, trajectory=trajectory)
    for velocity in (F32, BF16)
    for guidance in (None, WEIGHTED, FROM_UNGUIDED)
    for trajectory in (False, True)
]


def by_width(widths: list[int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(Counter(widths).items(), reverse=True))


def check(row: Row, specialisation: Specialisation) -> None:
    """The bounds that hold for every specialisation."""
    assert (row.local_bytes, row.shared_bytes, row.barriers) == (0, 0, 0), row
    assert row.registers <= most_registers(specialisation), row
    assert row.bytes_per_element == row.least_bytes_per_element, row
    # 16 bytes of the widest operand, and of a narrower one in proportion; or single elements, four a thread.
    widest = max(specialisation.reads + specialisation.writes)
    vector, accesses = (16 // widest, 1) if specialisation.aligned else (1, 4)
    assert row.loads == by_width([size * vector for size in specialisation.reads] * accesses), row
    assert row.stores == by_width([size * vector for size in specialisation.writes] * accesses), row
    if row.coefficient_loads is not None:
        assert row.coefficient_loads == specialisation.coefficients, row


@pytest.mark.parametrize("arch", ARCHS)
def test_alpamayo(arch: str) -> None:
    """Of another architecture than sm_90 those with bfloat16 velocities; `test_all_that_sample_can_pick` has all."""
    for specialisation in ALPAMAYO:
        if arch == "sm_90" or specialisation.velocity == BF16:
            check(measure("triton", arch, specialisation), specialisation)


@pytest.mark.parametrize(
    ("arch", "aligned"), [("sm_90", True), ("sm_90", False), pytest.param("sm_100", True, marks=pytest.mark.full)]
)
def test_every_pair_of_dtypes(arch: str, aligned: bool) -> None:
    """The plain step, and the one with guidance and trajectory, for each pair of dtypes."""
    checked = 0
    for specialisation in picked_by_sample([WEIGHTED]):
        plain = not specialisation.terms and not specialisation.history
        if plain and specialisation.aligned is aligned and specialisation.guided is specialisation.trajectory:
            check(measure("triton", arch, specialisation), specialisation)
            checked += 1
    assert checked >= 18


@pytest.mark.parametrize("aligned", [True, pytest.param(False, marks=pytest.mark.full)])
def test_every_form_of_guidance(aligned: bool) -> None:
    """Each form by differences for each pair of dtypes, with the fewest operands or the most; w0 is not loaded."""
    chosen = [s for s in picked_by_sample() if s.guidance in (FROM_UNGUIDED, FROM_GUIDED) and s.aligned is aligned]
    assert len(chosen) == 9 * 2 * 2
    for turn, specialisation in enumerate(chosen):
        if turn % 4 in (0, 3):  # one form with the fewest, the other with the most
            check(measure("triton", "sm_90", specialisation), specialisation)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("state", "velocity"), [(F32, BF16), (BF16, BF16), (F64, F32)], ids=str)
def test_every_operand_at_once(state: torch.dtype, velocity: torch.dtype, arch: str) -> None:
    specialisation = Specialisation(state, velocity, **EVERYTHING)
    row = measure("triton", arch, specialisation)
    assert row.registers <= 48
    check(row._replace(registers=0), specialisation)


@pytest.mark.parametrize(("state", "velocity"), [(F32, BF16), (BF16, BF16), (F64, F32)], ids=str)
def test_rows_of_their_own(state: torch.dtype, velocity: torch.dtype) -> None:
    """The least bytes and no spills, as with one row; each element loads its coefficients, so there are registers more.

    40 for the plain step, 12 blocks of 128 threads, and 64 with every operand, 8 blocks.
    """
    for operands, registers in (({}, 40), (EVERYTHING, 64)):
        specialisation = Specialisation(state, velocity, own_rows=True, **operands)
        row = measure("triton", "sm_90", specialisation)
        assert row.registers <= registers, row
        check(row._replace(registers=0, coefficient_loads=None), specialisation)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("state", "velocity"), [(F32, BF16), (BF16, BF16), (F64, F32)], ids=str)
def test_noise_by_keys(state: torch.dtype, velocity: torch.dtype, aligned: bool) -> None:
    """Nothing of the noise moves: the other operands' bytes and 20 of a key, no spill, no shared memory, no barrier.

    64 registers are 8 blocks of 128 threads, and 96, for every operand moved singly, 5. Square roots are to nearest,
    which ptxas makes of multiply-adds.
    """
    for operands in ({"terms": 1}, EVERYTHING):
        specialisation = Specialisation(state, velocity, aligned=aligned, keyed=True, **operands)
        code = compile_triton(specialisation, "sm_90")
        assert code.machine.registers <= (64 if aligned else 96), code.machine.registers
        assert (code.machine.local_bytes, code.shared_bytes) == (0, 0)
        assert "bar." not in code.assembly
        assert not contractions(code.assembly)
        assert not re.search(r"\.ftz|\.approx|\b(div|sqrt)\.(full\.)?f(32|64)", code.assembly)
        moved = sum(access.width for access in code.machine.accesses if not access.coefficient)
        least = sum(specialisation.reads) + sum(specialisation.writes)
        keys = (8 + 8 + 4) * (1 if aligned else code.elements)  # of the third column the lower half counts
        assert moved == least * code.elements + keys, (moved, specialisation)


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHS)
def test_all_that_sample_can_pick(arch: str) -> None:
    for specialisation in picked_by_sample():
        check(measure("triton", arch, specialisation), specialisation)


@pytest.mark.parametrize("arch", ["sm_90", *[pytest.param(a, marks=pytest.mark.full) for a in ARCHS if a != "sm_90"]])
def test_rows_of_noise_and_log_prob(arch: str) -> None:
    """Nothing local; registers for 12 blocks of 128 threads, and 4 of 256; the least bytes, whole where they can be."""
    rows = list(static.other_ops("triton", [arch]))
    noise = [row for row in rows if row.kernel == "triton keyed_noise"]
    assert len(noise) == 8
    for row in noise:
        size = row.least_bytes_per_element
        # Four float64 are two accesses, which Triton shares out to threads otherwise than it computes them.
        exchanged = (128 * 4 * 4, 1) if row.aligned and size == 8 else (0, 0)
        assert (row.local_bytes, row.shared_bytes, row.barriers) == (0, *exchanged), row
        assert row.registers <= 48 if arch == "gfx942" else row.registers <= 40, row
        assert row.bytes_per_element == size, row
        assert row.stores == (f"{1 + (size == 8)}x{min(16, 4 * size)}" if row.aligned else f"4x{size}"), row
        assert row.coefficient_loads in (3, None), row
    log_prob = [row for row in rows if row.kernel == "triton step_log_prob"]
    assert len(log_prob) == 2 * sum(map(len, VELOCITY_DTYPES.values()))
    for row in log_prob:
        state, velocity = (getattr(torch, name) for name in (row.state, row.velocity))
        assert row.local_bytes == 0, row
        assert row.registers <= 64, row
        # One exchange a level that spans warps, in memory that the next reuses.
        assert row.shared_bytes <= 4096 and 0 < row.barriers <= 8, row
        assert row.stores == ("1x8" if row.state == "float64" else "1x4"), row
        vector = min(4, 16 // state.itemsize) if row.aligned else 1
        sizes = [size * vector for size in (state.itemsize, velocity.itemsize, state.itemsize)]
        if arch != "gfx942":  # there the row is among the loads
            assert (row.loads, row.coefficient_loads) == (by_width(sizes * (4 // vector)), 4), row


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize(("state", "velocity"), [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F32)], ids=str)
def test_loads_are_issued_before_one_is_waited_for(state: torch.dtype, velocity: torch.dtype, arch: str) -> None:
    """Coefficients and operands: the last load stands before the first product."""
    code = compile_triton(Specialisation(state, velocity, **EVERYTHING), arch)
    names = [instruction.name.split(".")[0] for instruction in instructions(code.machine.text)]
    loads = [k for k, name in enumerate(names) if name == "LDG"]
    products = [k for k, name in enumerate(names) if name in ("FMUL", "FMUL2", "DMUL")]
    assert len(loads) == 6 + 8
    assert max(loads) < min(products)


def test_wider_accesses_of_sm_100() -> None:
    """Triton 3.9 gives none of 32 bytes: eight float32 become two accesses of 16. If this fails, take them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from flowmatch_kernels.ops import triton as backend

    constants = dict.fromkeys(("u", "h1", "h2", "h3", "trajectory", "history", "strength"))
    constants |= {
        "rounding": PROMOTE,
        "guidance": WEIGHTED,
        "sum_first": False,
        "own_rows": False,
        "VECTOR": 8,
        "BLOCK": 1024,
    }
    signature = {
        name: "constexpr" if name in constants else "*fp32" if name in ("out", "base", "v", "coefficients") else "i64"
        for name in backend.fused_step_kernel.arg_names
    }
    source = ASTSource(backend.fused_step_kernel, signature, constants)
    ptx = compile(source, GPUTarget("cuda", 100, 32), backend.launch_options(32)).asm["ptx"]
    assert ptx.count(".v4.b32") == 6
    assert ".v8.b32" not in ptx


def test_specialisation_counts_bytes() -> None:
    """The least bytes by hand: float32 state, bfloat16 velocity, guided, with a trajectory and one history term."""
    specialisation = Specialisation(F32, BF16, WEIGHTED, terms=1, trajectory=True, history=True)
    assert specialisation.reads == [4, 2, 2, 4]
    assert specialisation.writes == [4, 4, 4]
    assert specialisation.coefficients == 6
    assert specialisation._replace(guidance=FROM_GUIDED).coefficients == 5
    assert specialisation._replace(guidance=None).coefficients == 4
    assert arithmetic_dtype(BF16) == F32


def test_command(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command writes one row a specialisation, in both formats."""
    some = [Specialisation(F32, F32), Specialisation(F32, BF16, FROM_UNGUIDED, trajectory=True)]
    monkeypatch.setattr(static, "picked_by_sample", lambda forms: some)
    monkeypatch.setattr("sys.argv", ["static", "--directory", str(tmp_path), "--arch", "sm_90", "--jobs", "1"])
    monkeypatch.setattr(static, "ProcessPoolExecutor", Serial)
    monkeypatch.setattr(static, "KERNELS", {"triton": static.KERNELS["triton"]})
    monkeypatch.setattr(static, "other_ops", lambda kernel, archs: [])
    static.main()
    table = json.loads((tmp_path / "static.json").read_text())
    assert [(row["guidance"], row["operands"]) for row in table] == [("-", "-"), ("from unguided", "u trajectory")]
    lines = (tmp_path / "static.md").read_text().splitlines()
    assert len(lines) == 4
    assert "| triton | sm_90 | float32 | bfloat16 | from unguided | u trajectory | yes |" in lines[3]


class Serial:
    """A pool of no processes."""

    def __init__(self, jobs: int | None) -> None: ...

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *raised: object) -> None: ...

    def map(self, function, *columns, chunksize: int):
        return [function(*work) for work in zip(*columns, strict=True)]
