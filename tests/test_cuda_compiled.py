"""What the CUDA kernel becomes: compiled by nvcc, without a GPU, and its machine code read."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import NamedTuple

import pytest

from bench import static, static_cuda
from bench.static import Instruction, instructions

BYTES = {"float": 4, "double": 8, "BFloat16": 2, "Float16": 2}
#: Pairs of dtypes with products rounded to the state's; to the velocity's; sums first; out of the velocity's dtype.
ELEMENTS = 5 + 9 + 4 + 6
#: Kernels of one of them: with and without u, 0 to 3 history terms, and the scalar one.
SETS = 2 * 4 + 1
#: Without history terms, guided and not, where out has base's dtype and the sum is not first.
WITH_STRENGTH = 2 * 14
#: Rows of their own, where the sum is not first: by vectors and singly.
OWN_ROWS = 2 * (ELEMENTS - 4)
#: Noise by keys, with rows of their own or not, where out has base's dtype and the sum is not first.
DRAWN = 2 * 14


reason = static_cuda.unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"the CUDA kernel is not compiled: {reason}")

full = pytest.mark.full
ARCHS = ["sm_90", *[pytest.param(f"sm_{k}", marks=full) for k in (75, 80, 86, 89, 100, 120, 121)]]
every_arch = pytest.mark.parametrize("arch", ARCHS)


class Kernel(NamedTuple):
    """One instantiation, and what it became."""

    state: str
    velocity: str
    out: str
    terms_added: int
    """csrc/fused_step.h, Terms."""
    guided: bool | None
    """None where operands are tested by the kernel: the one that moves elements singly, and those of own rows."""
    terms: int
    vector: int
    strength: bool
    own_rows: bool
    drawn: bool
    """h1 is noise, by keys; there may be rows of their own."""
    registers: int
    stack: int
    shared: int
    local: int
    code: list[Instruction]
    ptx: str

    @property
    def title(self) -> str:
        operands = "tested" if self.guided is None else f"{'guided' if self.guided else 'plain'}+{self.terms}"
        operands += "+strength" * self.strength + "+own rows" * self.own_rows + "+noise" * self.drawn
        return f"{self.state} {self.velocity} {self.out} {self.terms_added} {operands} vector={self.vector}"

    @property
    def arithmetic(self) -> int:
        return 8 if self.state == "double" else 4

    def widths(self, of: str) -> Counter[int]:
        """Bytes of each load of an operand, load of coefficients, or store."""
        names = [i.name for i in self.code]
        if of == "stores":
            chosen = [n for n in names if re.match(r"STG?\b", n)]
        else:
            chosen = [n for n in names if re.match(r"LDG?\b", n) and (".CONSTANT" in n) == (of == "coefficients")]
        return Counter(map(_width, chosen))


WIDTHS = [("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)]


def _width(name: str) -> int:
    """Bytes of a load or store."""
    return next((b for s, b in WIDTHS if f".{s}" in name), 4)


@functools.cache
def kernels(arch: str) -> list[Kernel]:
    """Every kernel for one architecture."""
    read = []
    for title, kernel in static_cuda.instantiations(arch).items():
        types = r"Element<(\w+), (\w+), (\w+), \(Terms\)(\d)>"
        match = re.fullmatch(rf"{types}, (?:Known<(\w+), (\d), (\w+)>|Tested<(\w+), (\w+)>), (\d)", title)
        assert match, title
        state, velocity, out, terms_added, guided, terms, strength, own_rows, drawn, vector = match.groups()
        read.append(
            Kernel(
                state,
                velocity,
                out,
                int(terms_added),
                None if guided is None else guided == "true",
                int(terms or 3),
                int(vector),
                # Where operands are tested, it is one of them, but with the sum first or out of another dtype.
                strength == "true" if strength else terms_added != "2" and state == out,
                own_rows == "true",
                drawn == "true",
                *[kernel.usage[name] for name in ("REG", "STACK", "SHARED", "LOCAL")],
                instructions(kernel.sass),
                kernel.ptx,
            )
        )
    return read


def wrong(arch: str, names: str, allowed: str = r"(?!)") -> list[str]:
    """Instructions whose name matches, in every kernel, but for those that are allowed."""
    return [
        f"{kernel.title}: {i.name} {i.operands}"
        for kernel in kernels(arch)
        for i in kernel.code
        if re.match(names, i.name) and not re.search(allowed, f"{i.name} {i.operands}")
    ]


@every_arch
def test_every_kernel_is_there(arch: str) -> None:
    """Some are not compiled twice, nor left out: the number of instantiations stays in the hundreds."""
    there = kernels(arch)
    assert len({k.title for k in there}) == len(there) == ELEMENTS * SETS + WITH_STRENGTH + OWN_ROWS + DRAWN
    assert sum(k.drawn for k in there) == DRAWN
    assert sum(k.own_rows for k in there) == OWN_ROWS + DRAWN
    for k in there:
        operands = [BYTES[k.state], BYTES[k.velocity], *[k.arithmetic] * (k.terms > 0)]
        sizes = {16 // max(operands)} if k.guided is not None else {1, 16 // k.arithmetic} if k.own_rows else {1}
        assert k.vector in sizes, k.title


@every_arch
def test_no_contraction(arch: str) -> None:
    """No multiply-add on floats; HFMA2 of two zeros is how ptxas loads a constant.

    Noise has two square roots to nearest, which ptxas makes of multiply-adds: of it the PTX is read.
    """
    found = wrong(arch, r"(F|D|H)FMA|FSWZ", r"HFMA2\S* \w+, -RZ, RZ, ")
    assert not [one for one in found if "+noise" not in one]
    for k in kernels(arch):
        products = sum(i.name.startswith(("FMUL", "DMUL")) for i in k.code)
        assert products >= 2 * k.vector, f"{k.title}: {products} products"
        if k.drawn:
            assert not static.contractions(k.ptx), k.title
            assert not re.search(r"\.ftz|\.approx|\b(add|sub|mul|div|sqrt)\.(full\.)?f(32|64)", k.ptx), k.title
            assert k.ptx.count("sqrt.rn.f32") == (2 if k.vector == 4 else 1), k.title


@every_arch
def test_no_flush_and_nothing_approximate(arch: str) -> None:
    found = wrong(arch, r".*\.FTZ|MUFU|.*\.(RZ|RM|RP)\b")
    # Which row an element lies in is a quotient of integers: ptxas makes it of these, and corrects it.
    quotient = re.compile(r"\+own rows.*: (U?I2F\.U\d+\.RP|MUFU\.RCP|F2I\.FTZ\.U\d+\.TRUNC\S*) ")
    assert not [one for one in found if not quotient.search(one) and "+noise" not in one]


@every_arch
def test_no_local_memory(arch: str) -> None:
    assert not wrong(arch, r"LDL|STL")
    assert not [one for one in wrong(arch, r"CALL") if "+noise" not in one]  # of a square root's rare values
    assert not [f"{k.title}: {k.stack} {k.local}" for k in kernels(arch) if k.stack or k.local]


@every_arch
def test_no_shared_memory_and_no_barrier(arch: str) -> None:
    assert not wrong(arch, r"LDS|STS|LDGSTS|BAR\b|ATOM|RED\b|MEMBAR")
    assert not [k.title for k in kernels(arch) if k.shared]


@every_arch
def test_registers(arch: str) -> None:
    """40 leave 6 blocks to a multiprocessor; float64 operands are twice as wide, and sm_75 holds 4 blocks.

    So do those with rows of their own, which hold the row of a thread beside all operands, and float64 ones with all.
    """
    for k in kernels(arch):
        every_double = k.state == "double" and k.guided and k.terms == 3
        bound = 64 if arch == "sm_75" or k.own_rows or every_double else 48 if k.state == "double" else 40
        assert k.registers <= bound, f"{k.title}: {k.registers} registers"


@every_arch
def test_accesses(arch: str) -> None:
    """16 bytes for the widest operand, the others in proportion; none is moved twice, none is left out.

    Each kernel holds the vector and, for elements left over, the same accesses singly. Rows of their own leave none.
    """
    for k in kernels(arch):
        sizes = {k.vector} if k.own_rows else {k.vector, 1}
        reads = [BYTES[k.state], *[BYTES[k.velocity]] * (2 if k.guided is not False else 1)]
        reads += [k.arithmetic] * (k.terms - k.drawn) + [BYTES[k.state]] * k.strength
        writes = [BYTES[k.out]] * 2 + [k.arithmetic]  # out, trajectory, history
        loads, stores = Counter[int](), Counter[int]()
        for size in sizes:
            loads.update(width for x in reads for width in _words(size * x))
            stores.update(width for x in writes for width in _words(size * x))
        assert k.widths("loads") == loads, f"{k.title}: loads {k.widths('loads')}, wanted {loads}"
        assert k.widths("stores") == stores, f"{k.title}: stores {k.widths('stores')}, wanted {stores}"


@every_arch
def test_only_what_is_dead_leaves_the_cache_first(arch: str) -> None:
    """v and u, which nobody reads again, and the trajectory's slot, not read before sampling ends; no history."""
    for k in kernels(arch):
        velocities = 1 if k.guided is False else 2
        first = [i.name for i in k.code if re.match(r"(LDG?|STG?)\b.*\.EF\b", i.name)]
        sizes = {k.vector} if k.own_rows else {k.vector, 1}
        wanted = {"LD": velocities * len(sizes), "ST": len(sizes)}
        assert Counter(name[:2] for name in first) == wanted, k.title
        narrow = min(16, k.vector * BYTES[k.velocity])
        assert sum(re.match("LD", name) is not None and _width(name) == narrow for name in first) >= velocities, k.title


def _words(size: int) -> list[int]:
    return [min(size, 16)] * max(size // 16, 1)


@every_arch
def test_coefficients_come_first(arch: str) -> None:
    """At most one load for each coefficient used, asked for before the operands.

    The source reads the row in words of 16 bytes; ptxas leaves out what is not used.
    """
    for k in kernels(arch):
        used = 2 + k.terms + 2 * (k.guided is not False) + 1 + 3 * k.drawn  # a, b0..b3, w0 and w1, c; a key
        row = sum(k.widths("coefficients").values())
        assert 2 <= row <= used, f"{k.title}: {row} loads"
        if k.terms == 3 and k.guided and k.terms_added != 2:  # with the sum first b2 is not read, nor all of its word
            assert k.widths("coefficients") == {16: 8 * k.arithmetic // 16}, k.title
        loads = [i.name for i in k.code if re.match(r"LDG?\b", i.name)]
        # Where operands are tested, each coefficient is loaded in the branch that uses it.
        assert k.guided is None or all(".CONSTANT" in name for name in loads[:row]), k.title


@every_arch
def test_operands_are_asked_for_together(arch: str) -> None:
    """Without history terms no load waits for another: all are issued before the first product.

    With them ptxas holds some back, to stay within the registers.
    """
    for k in kernels(arch):
        if k.guided is None or k.terms or (arch == "sm_75" and k.vector == 8):
            continue  # sm_75 narrows to bfloat16 by integers, and base waits for registers
        waited = False
        for i in k.code:
            if i.name == "EXIT" and not i.predicated:
                waited = False  # the code for elements left over ends, that for vectors begins
            waited |= i.name.startswith(("FMUL", "DMUL"))
            assert not (waited and re.match(r"LDG?\b", i.name)), f"{k.title}: {i.name} {i.operands}"


@pytest.mark.parametrize("state", ["BFloat16", "Float16"])
def test_narrowing_rounds_to_nearest(state: str) -> None:
    """The host runs its own conversions, so the machine's are read: cvt.rn, in PTX."""
    kernels("sm_90")
    ptx = "".join(kernel.ptx for kernel in static_cuda.instantiations("sm_90").values())
    conversions = set(re.findall(rf"cvt\.\S*\.?{'bf16' if state == 'BFloat16' else 'f16'}\.f32\b", ptx))
    assert conversions
    assert {c for c in conversions if not c.startswith("cvt.rn.")} == set()
