"""What the GPU kernels become, read from their machine code; no GPU is needed.

    python -m bench.static [--directory bench/results] [--arch sm_90] [--kernel triton]

Compiles every specialisation that `sample()` can pick, disassembles it, and writes one row for each to
static.md and static.json. Rows come from `measure`; a kernel takes part by an entry in `KERNELS`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from flowmatch_kernels.ops.fused_step import FROM_GUIDED, FROM_UNGUIDED, VELOCITY_DTYPES, WEIGHTED, arithmetic_dtype
from flowmatch_kernels.solvers import SOLVERS, build

#: The forms of guidance, by name.
GUIDANCE = {WEIGHTED: "weighted", FROM_UNGUIDED: "from unguided", FROM_GUIDED: "from guided"}


class Specialisation(NamedTuple):
    """What a launch is compiled for."""

    state: torch.dtype
    velocity: torch.dtype
    guidance: int | None = None
    """The form of guidance: WEIGHTED, FROM_UNGUIDED or FROM_GUIDED; None: there is no u."""
    terms: int = 0
    """History terms read: h1..h3."""
    trajectory: bool = False
    history: bool = False
    """Is the history written?"""
    velocity_rounding: bool = False
    aligned: bool = True

    @property
    def guided(self) -> bool:
        """Is u present?"""
        return self.guidance is not None

    @property
    def operands(self) -> str:
        """The optional operands present, by name."""
        present = ["u"] * self.guided + [f"h{k}" for k in (1, 2, 3) if k <= self.terms]
        present += ["trajectory"] * self.trajectory + ["history"] * self.history
        return " ".join(present) or "-"

    @property
    def reads(self) -> list[int]:
        """Bytes of an element of each operand read: base, v, u, h1..h3."""
        arithmetic = arithmetic_dtype(self.state).itemsize
        return [
            self.state.itemsize,
            *[self.velocity.itemsize] * (1 + self.guided),
            *[arithmetic] * self.terms,
        ]

    @property
    def writes(self) -> list[int]:
        """Bytes of an element of each operand written: out, trajectory, history."""
        arithmetic = arithmetic_dtype(self.state).itemsize
        return [*[self.state.itemsize] * (1 + self.trajectory), *[arithmetic] * self.history]

    @property
    def coefficients(self) -> int:
        """How many coefficients of the row are used: a, b0..b3, w0 (by WEIGHTED alone) and w1, c."""
        return 2 + self.terms + self.guided + (self.guidance == WEIGHTED) + self.history


class Access(NamedTuple):
    """One instruction that reads or writes global memory."""

    store: bool
    width: int
    """Bytes, of one thread."""
    coefficient: bool
    """Reads from the row of coefficients, not from an operand."""


class Code(NamedTuple):
    """A compiled kernel."""

    assembly: str
    """PTX, or the assembly of an AMD GPU."""
    machine: str
    """SASS; for an AMD GPU the assembly again."""
    registers: int
    local_bytes: int
    """Spills and stack, of one thread."""
    shared_bytes: int
    accesses: list[Access]
    elements: int
    """Elements of the state that one thread computes."""


class Row(NamedTuple):
    """One line of the table."""

    kernel: str
    arch: str
    state: str
    velocity: str
    guidance: str
    operands: str
    aligned: bool
    registers: int
    local_bytes: int
    shared_bytes: int
    barriers: int
    loads: str
    """Operand loads of one thread by width: "2x16 1x8"."""
    stores: str
    coefficient_loads: int | None
    """None where the instructions do not tell (AMD: scalar loads, as for the kernel's arguments)."""
    bytes_per_element: float
    least_bytes_per_element: int
    instructions_per_element: float
    """All that stand in the code, with the branch for 64-bit division that states below 2^32 elements skip."""


class Kernel(NamedTuple):
    """A kernel that can be measured."""

    archs: tuple[str, ...]
    compile: Callable[[Specialisation, str], Code]
    unavailable: Callable[[], str | None]
    """Why it cannot be compiled here, or None."""
    forms: tuple[int, ...]
    """The forms of guidance that are compilations of their own; all others are in the code of the first."""


def picked_by_sample(forms: Iterable[int] = GUIDANCE) -> list[Specialisation]:
    """Every specialisation that `sample()` can pick: all solvers, guidance, trajectory, dtypes, alignments.

    But of the forms of guidance by differences two for each dtypes and alignment, with the fewest and the most
    operands: a difference in the place of a second product changes little else.

    Args:
        forms: The forms of guidance wanted.
    """
    grid = torch.linspace(0, 1, 9)
    steps = {
        (len(evaluation.read), evaluation.write is not None, evaluation.commit and all_steps)
        for name in SOLVERS
        for evaluation in build(name, grid, torch.diff(grid), torch.float32, grid.device).evaluations
        for all_steps in (False, True)
    }
    fewest_and_most = min(steps), max(steps)
    return [
        Specialisation(state, velocity, guidance, terms, trajectory, history, aligned=aligned)
        for aligned in (True, False)
        for state, velocities in VELOCITY_DTYPES.items()
        for velocity in velocities
        for guidance in (None, *forms)
        for terms, history, trajectory in (sorted(steps) if guidance in (None, WEIGHTED) else fewest_and_most)
    ]


def measure(kernel: str, arch: str, specialisation: Specialisation) -> Row:
    """Compiles one kernel for one architecture and reads what it became."""
    code = KERNELS[kernel].compile(specialisation, arch)
    operands = [access for access in code.accesses if not access.coefficient]
    coefficient_loads = None if arch.startswith("gfx") else len(code.accesses) - len(operands)
    return Row(
        kernel=kernel,
        arch=arch,
        state=_name(specialisation.state),
        velocity=_name(specialisation.velocity),
        guidance=_form(specialisation.guidance, KERNELS[kernel].forms),
        operands=specialisation.operands,
        aligned=specialisation.aligned,
        registers=code.registers,
        local_bytes=code.local_bytes,
        shared_bytes=code.shared_bytes,
        barriers=len(re.findall(r"\bbar\.|\bbarrier\.|\bs_barrier", code.assembly)),
        loads=_by_width(access.width for access in operands if not access.store),
        stores=_by_width(access.width for access in operands if access.store),
        coefficient_loads=coefficient_loads,
        bytes_per_element=sum(access.width for access in operands) / code.elements,
        least_bytes_per_element=sum(specialisation.reads) + sum(specialisation.writes),
        instructions_per_element=len(instructions(code.machine)) / code.elements,
    )


def _form(guidance: int | None, forms: tuple[int, ...]) -> str:
    if guidance is None:
        return "-"
    return GUIDANCE[guidance] if len(forms) > 1 else "any"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_width(widths: Iterable[int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(Counter(widths).items(), reverse=True))


# ---- reading machine code ----


class Instruction(NamedTuple):
    """One instruction of SASS or of AMD assembly."""

    predicated: bool
    name: str
    operands: str


def instructions(machine: str) -> list[Instruction]:
    """Those of a disassembly, in order, without padding (NOP, and the branch to itself before it)."""
    found = []
    for line in machine.splitlines():
        sass = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line)
        amd = re.match(r"\t([sv]_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+|ds_\w+)\s*(.*)", line)
        if sass:
            found.append(Instruction(bool(sass[1]), sass[2], sass[3]))
        elif amd:
            found.append(Instruction(False, amd[1], amd[2]))
    last = max((k for k, i in enumerate(found) if i.name not in ("NOP", "BRA", "s_nop", "s_code_end")), default=-1)
    return [i for i in found[: last + 1] if i.name not in ("NOP", "s_code_end")]


def sass_accesses(sass: str, is_coefficient: Callable[[Instruction], bool]) -> list[Access]:
    """Loads and stores of global memory in SASS."""
    return [
        Access(i.name.startswith("STG"), _sass_width(i.name), not i.name.startswith("STG") and is_coefficient(i))
        for i in instructions(sass)
        if i.name.split(".")[0] in ("LDG", "STG", "LD", "ST")
    ]


def _sass_width(name: str) -> int:
    for part in name.split("."):
        if part in ("256", "128", "64"):
            return int(part) // 8
        if part in ("U16", "S16"):
            return 2
        if part in ("U8", "S8"):
            return 1
    return 4


def amd_accesses(assembly: str) -> list[Access]:
    """Vector loads and stores of global memory in AMD assembly; coefficients are scalar loads, not here."""
    widths = {"ushort": 2, "short": 2, "b16": 2, "u16": 2, "i16": 2, "dword": 4, "b32": 4}
    widths |= {"dwordx2": 8, "b64": 8, "dwordx4": 16, "b128": 16}
    found = []
    for i in instructions(assembly):
        match = re.match(r"(?:global|buffer|flat)_(load|store)_(?:d16_|short_d16_?)?(?:hi_)?(\w+)", i.name)
        if match or re.match(r"(?:global|buffer|flat)_(?:load|store)_short_d16", i.name):
            width = widths[match[2]] if match and match[2] in widths else 2
            found.append(Access("store" in i.name, width, False))
    return found


def nvidia_tool(name: str) -> str:
    """Path of a program in the Triton wheel: nvdisasm, cuobjdump, ptxas."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassembled(cubin: bytes) -> tuple[str, dict[str, int]]:
    """The SASS of a cubin that holds one kernel, and its resources: REG, STACK, SHARED, LOCAL."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            [nvidia_tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True
        ).stdout
        usage = subprocess.run(
            [nvidia_tool("cuobjdump"), "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return sass, {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def contractions(assembly: str) -> list[str]:
    """The lines of PTX or AMD assembly that hold a floating-point multiply-add.

    Three things look like one and are none. PTX for sm_80 has no addition of bfloat16 and writes x*1.0 + y, or
    y*-1.0 + x, which rounds once, as the sum and the difference do. AMD writes a float32 product that is then rounded
    to float16 as x*y + -0.0 (v_fma_mixlo_f16), and divides 64-bit integers by way of float32 reciprocals and the
    constants 2^32 and -2^32.
    """
    ones = set(re.findall(rf"mov\.b(?:16|32)\s+(%\w+), (?:{'|'.join(_ONES)});", assembly))
    found = []
    for line in assembly.splitlines():
        if addition := re.search(r"\bfma\.rn\.bf16(?:x2)?\s+%\w+, (%\w+), (%\w+), %\w+;", line):
            harmless = bool(ones & {addition[1], addition[2]})
        else:
            harmless = bool(re.search(r"0x4f800000|0xcf800000|\bv_fma_mix(?:lo|hi)_f16 .*, neg\(0\)", line))
        if _MULTIPLY_ADD.search(line) and not harmless:
            found.append(line.strip())
    return found


#: 1.0 and -1.0 in bfloat16, once and twice.
_ONES = ("0x3F80", "0x3F803F80", "16256", "1065369472", "0xBF80", "0xBF80BF80", "-16512", "-1082081408")
_MULTIPLY_ADD = re.compile(r"\bfma\.|\bmad\.(?:\w+\.)*f(?:16|32|64)|^\tv_(?:pk_|dual_)?(?:fma|mac|mad_f|mad_mix)")


# ---- Triton ----

_TRITON_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WARP_SIZES = {"gfx942": 64}


def compile_triton(specialisation: Specialisation, arch: str) -> Code:
    """The Triton kernel, compiled ahead of time just as a launch would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from flowmatch_kernels.ops import triton as backend

    state, velocity = _TRITON_TYPES[specialisation.state], _TRITON_TYPES[specialisation.velocity]
    arithmetic = _TRITON_TYPES[arithmetic_dtype(specialisation.state)]
    types: dict[str, str | None] = {"out": state, "base": state, "v": velocity, "coefficients": arithmetic}
    types["u"] = velocity if specialisation.guided else None
    types |= {f"h{k}": arithmetic if k <= specialisation.terms else None for k in (1, 2, 3)}
    types["trajectory"] = state if specialisation.trajectory else None
    types["history"] = arithmetic if specialisation.history else None
    widest = max(specialisation.reads + specialisation.writes)
    vector = 16 // widest if specialisation.aligned else 1
    constants: dict[str, object] = {name: None for name, type_ in types.items() if type_ is None}
    constants |= {
        "velocity_rounding": specialisation.velocity_rounding,
        "guidance": specialisation.guidance or WEIGHTED,
        "VECTOR": vector,
        "BLOCK": backend.block(vector),
    }
    signature = {
        name: "constexpr" if name in constants else f"*{types[name]}" if name in types else "i64"
        for name in backend.fused_step_kernel.arg_names
    }
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, _WARP_SIZES[arch])
    options = backend.launch_options(target.warp_size)
    compiled = compile(ASTSource(backend.fused_step_kernel, signature, constants), target, options)
    threads = options["num_warps"] * target.warp_size
    elements = backend.block(vector) // threads
    if nvidia:
        sass, usage = disassembled(compiled.asm["cubin"])
        return Code(
            assembly=compiled.asm["ptx"],
            machine=sass,
            registers=usage["REG"],
            local_bytes=usage["STACK"] + usage["LOCAL"],
            shared_bytes=compiled.metadata.shared,
            # Every operand's access is masked, no coefficient's is.
            accesses=sass_accesses(sass, lambda instruction: not instruction.predicated),
            elements=elements,
        )
    assembly = compiled.asm["amdgcn"]
    usage = {name: int(value) for name, value in re.findall(r"\.(\w+_(?:count|size)):\s+(\d+)", assembly)}
    return Code(
        assembly=assembly,
        machine=assembly,
        registers=usage["vgpr_count"],
        local_bytes=usage["private_segment_fixed_size"],
        shared_bytes=usage["group_segment_fixed_size"],
        accesses=amd_accesses(assembly),
        elements=elements,
    )


def _triton_unavailable() -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET=1: nothing is compiled"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def _compile_cuda(specialisation: Specialisation, arch: str) -> Code:
    from .static_cuda import compile_cuda  # which takes its types from here

    return compile_cuda(specialisation, arch)


def _cuda_unavailable() -> str | None:
    from .static_cuda import unavailable

    return unavailable()


CUDA_ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121")

KERNELS = {
    "triton": Kernel(
        ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"), compile_triton, _triton_unavailable, tuple(GUIDANCE)
    ),
    "cuda": Kernel(CUDA_ARCHS, _compile_cuda, _cuda_unavailable, (WEIGHTED,)),
}

# ---- the table ----


def rows(kernels: Iterable[str], archs: Iterable[str] | None = None, jobs: int | None = None) -> Iterator[Row]:
    """Rows for these kernels, on these architectures or on all that each kernel has."""
    work = [
        (kernel, arch, specialisation)
        for kernel in kernels
        for arch, specialisation in product(KERNELS[kernel].archs, picked_by_sample(KERNELS[kernel].forms))
        if archs is None or arch in archs
    ]
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        yield from pool.map(measure, *zip(*work, strict=True), chunksize=8)


def markdown(table: list[Row]) -> str:
    """The table, in Markdown."""
    lines = [" | ".join(name.replace("_", " ") for name in Row._fields), "|".join(["---"] * len(Row._fields))]
    lines += [" | ".join(_cell(value) for value in row) for row in table]
    return "".join(f"| {line} |\n" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path(__file__).parent / "results", help="where the tables go")
    parser.add_argument("--arch", action="append", help="only this one; may be repeated")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, help="processes; all cores by default")
    arguments = parser.parse_args()
    kernels = []
    for kernel in arguments.kernel or KERNELS:
        reason = KERNELS[kernel].unavailable()
        if reason is None:
            kernels.append(kernel)
        elif arguments.kernel:
            raise SystemExit(f"{kernel} cannot be compiled here: {reason}")
        else:
            print(f"{kernel} is left out, since it cannot be compiled here: {reason}")
    table = list(rows(kernels, arguments.arch, arguments.jobs))
    arguments.directory.mkdir(parents=True, exist_ok=True)
    (arguments.directory / "static.md").write_text(markdown(table))
    (arguments.directory / "static.json").write_text(json.dumps([row._asdict() for row in table], indent=1) + "\n")
    print(f"{len(table)} rows in {arguments.directory / 'static.md'} and static.json")


if __name__ == "__main__":
    main()
