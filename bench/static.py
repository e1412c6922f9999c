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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowmatch_kernels.ops.fused_step import FROM_GUIDED, FROM_UNGUIDED, VELOCITY_DTYPES, WEIGHTED, arithmetic_dtype
from flowmatch_kernels.ops.step_log_prob import LANES
from flowmatch_kernels.solvers import SOLVERS, Grid, build

from . import static_cuda
from .machine_code import Access, Code, Machine, Specialisation, amd_accesses, disassembled, instructions, sass_accesses
from .machine_code import Instruction as Instruction  # for those who read on from here
from .machine_code import contractions as contractions

#: The forms of guidance, by name.
GUIDANCE = {WEIGHTED: "weighted", FROM_UNGUIDED: "from unguided", FROM_GUIDED: "from guided"}


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
    """None where the instructions do not tell (AMD: scalar loads, as for the kernel's arguments). Of keys and densities
    too."""
    bytes_per_element: float | None
    """None where a loop moves them, of which the code tells once; tests/ptx counts them."""
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
        for evaluation in build(name, Grid(grid, None), None, torch.float32, grid.device).evaluations
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


def _operands(code: Code) -> list[Access]:
    return [access for access in code.machine.accesses if not access.coefficient]


def _of_code(code: Code, arch: str) -> dict[str, Any]:
    """The entries of a row that the code alone gives."""
    operands = _operands(code)
    return {
        "registers": code.machine.registers,
        "local_bytes": code.machine.local_bytes,
        "shared_bytes": code.shared_bytes,
        "barriers": len(re.findall(r"\bbar\.|\bbarrier\.|\bs_barrier", code.assembly)),
        "loads": _by_width(access.width for access in operands if not access.store),
        "stores": _by_width(access.width for access in operands if access.store),
        "coefficient_loads": None if arch.startswith("gfx") else len(code.machine.accesses) - len(operands),
        "instructions_per_element": len(instructions(code.machine.text)) / code.elements,
    }


def measure(kernel: str, arch: str, specialisation: Specialisation) -> Row:
    """Compiles one kernel for one architecture and reads what it became."""
    code = KERNELS[kernel].compile(specialisation, arch)
    return Row(
        kernel=kernel,
        arch=arch,
        state=_name(specialisation.state),
        velocity=_name(specialisation.velocity),
        guidance=_form(specialisation.guidance, KERNELS[kernel].forms),
        operands=specialisation.operands,
        aligned=specialisation.aligned,
        **_of_code(code, arch),
        bytes_per_element=sum(access.width for access in _operands(code)) / code.elements,
        least_bytes_per_element=sum(specialisation.reads) + sum(specialisation.writes),
    )


def _form(guidance: int | None, forms: tuple[int, ...]) -> str:
    if guidance is None:
        return "-"
    return GUIDANCE[guidance] if len(forms) > 1 else "any"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_width(widths: Iterable[int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(Counter(widths).items(), reverse=True))


# ---- Triton ----

_TRITON_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WARP_SIZES = {"gfx942": 64}


def compile_triton(specialisation: Specialisation, arch: str) -> Code:
    """The Triton kernel, compiled ahead of time just as a launch would."""
    from flowmatch_kernels.ops import triton as backend

    state, velocity = _TRITON_TYPES[specialisation.state], _TRITON_TYPES[specialisation.velocity]
    arithmetic = _TRITON_TYPES[arithmetic_dtype(specialisation.state)]
    types: dict[str, str | None] = {"out": state, "base": state, "v": velocity, "coefficients": arithmetic}
    types["u"] = velocity if specialisation.guided else None
    types |= {f"h{k}": arithmetic if k <= specialisation.terms else None for k in (1, 2, 3)}
    if specialisation.keyed:
        types["h1"] = "i64"
    types["trajectory"] = state if specialisation.trajectory else None
    types["history"] = arithmetic if specialisation.history else None
    types["strength"] = state if specialisation.strength else None
    held = [arithmetic_dtype(specialisation.state).itemsize] * specialisation.keyed
    vector = 16 // max(specialisation.reads + specialisation.writes + held) if specialisation.aligned else 1
    constants: dict[str, object] = {
        "rounding": specialisation.rounding,
        "guidance": specialisation.guidance or WEIGHTED,
        "sum_first": specialisation.sum_first,
        "own_rows": specialisation.own_rows,
        "VECTOR": vector,
        "BLOCK": backend.block(vector),
    }
    threads = backend.THREADS
    # Every operand's access is masked, no coefficient's is.
    is_coefficient = lambda i: not i.predicated  # noqa: E731
    elements = backend.block(vector) // threads
    return _compiled(backend.fused_step_kernel, types, constants, arch, threads, elements, is_coefficient)


def triton_others(op: str, arch: str) -> Iterator[static_cuda.Other]:
    """Every compilation of the Triton kernel of another op: one serves one row for all and rows of their own."""
    for whole, (state, velocities) in product((True, False), VELOCITY_DTYPES.items()):
        if op == "keyed_noise":
            yield static_cuda.Other([state], None, whole, compile_keyed_noise(state, whole, arch))
        else:
            for velocity in velocities:
                code = compile_step_log_prob(state, velocity, whole, arch)
                yield static_cuda.Other([state, velocity], None, whole, code)


def compile_keyed_noise(dtype: torch.dtype, whole: bool, arch: str) -> Code:
    """The Triton kernel of keyed noise; `whole`: samples are of whole fours, which a thread writes at once."""
    from flowmatch_kernels.ops import triton_noise

    types = {"out": _TRITON_TYPES[dtype], "keys": "i64"}
    constants = {"FOURS": whole, "BLOCK": triton_noise.BLOCK}
    # All it loads are keys; a thread has one counter, and so four elements.
    return _compiled(triton_noise.keyed_noise_kernel, types, constants, arch, triton_noise.BLOCK, 4, lambda i: True)


def compile_step_log_prob(state: torch.dtype, velocity: torch.dtype, whole: bool, arch: str) -> Code:
    """The Triton kernel of step_log_prob; `whole`: samples are of whole accesses, and on their boundary."""
    from flowmatch_kernels.ops import triton_log_prob

    types = dict.fromkeys(("base", "next"), _TRITON_TYPES[state]) | {"v": _TRITON_TYPES[velocity]}
    types |= dict.fromkeys(("out", "coefficients", "densities"), _TRITON_TYPES[arithmetic_dtype(state)])
    threads, kernel = triton_log_prob.THREADS, triton_log_prob.step_log_prob_kernel
    constants = triton_log_prob.constants(state, whole)
    # Operands are masked, the sample's row is not.
    return _compiled(kernel, types, constants, arch, threads, LANES // threads, lambda i: not i.predicated)


def _compiled(
    kernel: Any,
    types: Mapping[str, str | None],
    constants: Mapping[str, object],
    arch: str,
    threads: int,
    elements: int,
    is_coefficient: Callable[[Instruction], bool],
) -> Code:
    """A Triton kernel, compiled ahead of time just as a launch would.

    Args:
        kernel: The JIT function.
        types: What its pointers point at; None: the argument is None.
        constants: Its constants. An argument that is in neither is a 64-bit integer.
        arch: "sm_90", "gfx942", ...
        threads: Of a block.
        elements: That a thread takes; in a turn of the loop if there is one.
        is_coefficient: Which loads are those of a coefficient.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from flowmatch_kernels.ops import triton as backend

    constants = {name: None for name, type_ in types.items() if type_ is None} | dict(constants)
    signature = {
        name: "constexpr" if name in constants else f"*{types[name]}" if name in types else "i64"
        for name in kernel.arg_names
    }
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, _WARP_SIZES[arch])
    options = backend.launch_options(target.warp_size, threads)
    # As the JIT says it: then what a launch has compiled is found in Triton's cache.
    attributes: dict[tuple[int], list[object]] = {
        (k,): [] for k, name in enumerate(kernel.arg_names) if name in constants
    }
    compiled = compile(ASTSource(kernel, signature, constants, attributes), target, options)
    if nvidia:

        def disassemble() -> Machine:
            sass, usage = disassembled(compiled.asm["cubin"])
            return Machine(sass, usage["REG"], usage["STACK"] + usage["LOCAL"], sass_accesses(sass, is_coefficient))

        return Code(compiled.asm["ptx"], elements, compiled.metadata.shared, disassemble)
    assembly = compiled.asm["amdgcn"]

    def read() -> Machine:
        usage = {name: int(value) for name, value in re.findall(r"\.(\w+_(?:count|size)):\s+(\d+)", assembly)}
        local = usage["private_segment_fixed_size"]
        return Machine(assembly, usage["vgpr_count"], local, amd_accesses(assembly))

    return Code(assembly, elements, compiled.metadata.shared, read)


def _triton_unavailable() -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET=1: nothing is compiled"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


CUDA_ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121")

KERNELS = {
    "triton": Kernel(
        ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"), compile_triton, _triton_unavailable, tuple(GUIDANCE)
    ),
    "cuda": Kernel(CUDA_ARCHS, static_cuda.compile_cuda, static_cuda.unavailable, (WEIGHTED,)),
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


#: By kernel what gives the compilations of another op.
OTHERS: dict[str, Callable[[str, str], Iterable[static_cuda.Other]]] = {
    "triton": triton_others,
    "cuda": static_cuda.others,
}


def other_ops(kernel: str, archs: Iterable[str]) -> Iterator[Row]:
    """Rows for keyed noise and step_log_prob."""
    for op, arch in product(static_cuda.OTHERS, archs):
        for types, own_rows, whole, code in OTHERS[kernel](op, arch):
            sizes = [dtype.itemsize for dtype in types]
            draws = op == "keyed_noise"
            yield Row(
                kernel=f"{kernel} {op}",
                arch=arch,
                state=_name(types[0]),
                velocity="-" if draws else _name(types[1]),
                guidance="-",
                operands={True: "own rows", False: "one row", None: "-" if draws else "any rows"}[own_rows],
                aligned=whole,
                **_of_code(code, arch),
                bytes_per_element=sum(a.width for a in _operands(code) if a.store) / code.elements if draws else None,
                least_bytes_per_element=sizes[0] if draws else 2 * sizes[0] + sizes[1],
            )


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
    for kernel in kernels:
        table += other_ops(kernel, arguments.arch or KERNELS[kernel].archs)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    (arguments.directory / "static.md").write_text(markdown(table))
    (arguments.directory / "static.json").write_text(json.dumps([row._asdict() for row in table], indent=1) + "\n")
    print(f"{len(table)} rows in {arguments.directory / 'static.md'} and static.json")


if __name__ == "__main__":
    main()
