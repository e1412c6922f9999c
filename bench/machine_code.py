"""What a compiled kernel is, and how its machine code is read: what every kernel of `bench.static` shares."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from flowmatch_kernels.ops.fused_step import PROMOTE, WEIGHTED, arithmetic_dtype


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
    rounding: int = PROMOTE
    aligned: bool = True
    sum_first: bool = False
    strength: bool = False
    own_rows: bool = False
    keyed: bool = False
    """Is h1 noise, drawn by keys?"""

    @property
    def guided(self) -> bool:
        """Is u present?"""
        return self.guidance is not None

    @property
    def operands(self) -> str:
        """The optional operands present, by name."""
        present = ["u"] * self.guided + [f"h{k}" for k in (1, 2, 3) if k <= self.terms]
        present += ["trajectory"] * self.trajectory + ["history"] * self.history
        present += ["strength"] * self.strength
        return " ".join(present) or "-"

    @property
    def reads(self) -> list[int]:
        """Bytes of an element of each operand read: base, v, u, h1..h3, strength."""
        arithmetic = arithmetic_dtype(self.state).itemsize
        return [
            self.state.itemsize,
            *[self.velocity.itemsize] * (1 + self.guided),
            *[arithmetic] * (self.terms - self.keyed),
            *[self.state.itemsize] * self.strength,
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


class Machine(NamedTuple):
    """The machine code of a kernel, and what it takes."""

    text: str
    """SASS; for an AMD GPU the assembly again."""
    registers: int
    local_bytes: int
    """Spills and stack, of one thread."""
    accesses: list[Access]


class Code:
    """A compiled kernel.

    Attributes:
        assembly: PTX, or the assembly of an AMD GPU.
        elements: Elements of the state that one thread computes.
        shared_bytes: Shared memory of a block.
    """

    def __init__(self, assembly: str, elements: int, shared_bytes: int, read: Callable[[], Machine]) -> None:
        self.assembly = assembly
        self.elements = elements
        self.shared_bytes = shared_bytes
        self._read = read

    @functools.cached_property
    def machine(self) -> Machine:
        """Read when it is first asked for: to disassemble a kernel takes as long as to compile it."""
        return self._read()


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
        # Without data-flow analysis, which labels branches and takes a third of the time.
        sass = subprocess.run(
            [nvidia_tool("nvdisasm"), "-c", "-ndf", file.name], check=True, capture_output=True, text=True
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
