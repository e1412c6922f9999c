"""Reads one entry of a PTX module: its parameters, registers, labels and instructions."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

_BITS = re.compile(r"\.[busf](8|16|32|64)\b")
_NAME = r"[%\w$]+"
_SHARED = re.compile(rf"\.shared\s+\.align\s+(\d+)\s+\.b8\s+({_NAME})\[(\d*)\]")
#: An add or sub that ptxas may fuse with a product, and a product that it may fuse: neither says how it rounds.
_FUSIBLE = re.compile(r"(add|sub|mul)\.b?f\d+(x2)?")


class UnsupportedError(NotImplementedError):
    """PTX that the kernels did not use when this was written; says which."""


class Register(NamedTuple):
    index: int
    size: int
    """Bytes; 0 for a predicate."""


class Constant(NamedTuple):
    bits: int
    """A float as its bits; an integer, negative too, as itself."""


class Special(NamedTuple):
    name: str


class Parameter(NamedTuple):
    offset: int


class Shared(NamedTuple):
    offset: int
    """Of a variable in a block's shared memory."""


class Address(NamedTuple):
    base: Register | Parameter | Shared
    offset: int


Operand = Register | Constant | Special | Parameter | Shared | Address | list  # a list: { %r1, %r2 }


class Statement(NamedTuple):
    """One instruction as it stands."""

    line: int
    text: str
    predicate: int | None
    """The register that says which threads execute it."""
    negated: bool
    opcode: str
    operands: list[Operand]
    label: str | None
    """Where a branch goes."""


class Entry:
    """One kernel of a module.

    Args:
        text: The module's PTX.
        name: The kernel's; the only one where there is no other.

    Attributes:
        parameters: Offset and size in bytes of each parameter, in order.
        threads: Threads of a block: the number, or the most.
        shared: Bytes of the block's shared memory that are declared; of an extern array, which begins after them, none.
        registers: Size in bytes of each register.
        labels: The index of the statement after each label.
        statements: Its instructions.
        contractable: Those that ptxas may fuse into a multiply-add, as by default it does.
    """

    def __init__(self, text: str, name: str | None = None) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        match = re.search(rf"\.entry\s+({name or _NAME})\s*\((.*?)\)([^{{;]*)\{{", text, re.DOTALL)
        if match is None:
            raise KeyError(f"no entry {name}")
        self.name = match[1]
        self.parameters: list[tuple[int, int]] = []
        self._parameter_offsets: dict[str, int] = {}
        for declaration in match[2].split(","):
            self._declare_parameter(declaration.strip())
        threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", match[3])
        self.threads = int(threads[1]) if threads else 1024
        self.shared = 0
        self._shared_offsets: dict[str, int] = {}
        for declared in _SHARED.finditer(text, 0, match.start()):
            self._declare_shared(declared)
        self.registers: list[int] = []
        self._scopes: list[dict[str, Register]] = [{}]
        self.labels: dict[str, int] = {}
        self.statements: list[Statement] = []
        self._read(text, match.end())
        products = [s.operands[0] for s in self.statements if re.fullmatch(_FUSIBLE, s.opcode) and s.opcode[0] == "m"]
        self.contractable = [
            s.text
            for s in self.statements
            if re.fullmatch(_FUSIBLE, s.opcode) and s.opcode[0] != "m" and any(x in products for x in s.operands[1:])
        ]

    def _declare_parameter(self, declaration: str) -> None:
        size = int(_BITS.search(declaration)[1]) // 8
        name, count = re.search(rf"({_NAME})\s*(?:\[(\d+)\])?$", declaration).groups()
        alignment = re.search(r"\.align\s+(\d+)", declaration) if ".ptr" not in declaration else None
        boundary = max(size, int(alignment[1]) if alignment else 1)
        end = sum(self.parameters[-1]) if self.parameters else 0
        offset = -(-end // boundary) * boundary
        self.parameters.append((offset, size * int(count or 1)))
        self._parameter_offsets[name] = offset

    def _declare_shared(self, declared: re.Match[str]) -> None:
        alignment, name, size = declared.groups()
        offset = -(-self.shared // int(alignment)) * int(alignment)
        self._shared_offsets[name] = offset
        self.shared = offset + int(size or 0)

    def _read(self, text: str, at: int) -> None:
        """All statements from the body's beginning to its closing brace."""
        token = re.compile(rf"\s*(?:([{{}}])|({_NAME}):(?!:)|\.(?:loc|file|pragma)\b[^\n]*|([^;{{}}]*(?:\{{[^;]*)?);)")
        while self._scopes:
            match = token.match(text, at)
            if match is None:
                raise UnsupportedError(f"PTX line {text.count(chr(10), 0, at) + 1}: {text[at : at + 80]!r}")
            line = text.count("\n", 0, match.start(3) if match[3] else at) + 1
            at = match.end()
            if match[1] == "{":
                self._scopes.append({})
            elif match[1] == "}":
                self._scopes.pop()
            elif match[2]:
                self.labels[match[2]] = len(self.statements)
            elif match[3] and match[3].startswith(".reg"):
                self._declare_registers(match[3])
            elif match[3] and (declared := _SHARED.match(match[3])):
                self._declare_shared(declared)
            elif match[3]:
                self._statement(line, " ".join(match[3].split()))

    def _declare_registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.DOTALL).groups()
        size = 0 if kind == "pred" else int(kind[1:]) // 8
        for name in re.split(r"\s*,\s*", names.strip()):
            family = re.fullmatch(rf"({_NAME})<(\d+)>", name)
            for each in [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name]:
                self._scopes[-1][each] = Register(len(self.registers), size)
                self.registers.append(size)

    def _statement(self, line: int, text: str) -> None:
        match = re.match(rf"(?:@(!?)({_NAME})\s+)?([\w.:]+)\s*(.*)$", text)
        if match is None:
            raise UnsupportedError(f"PTX line {line}: {text}")
        negated, predicate, opcode, rest = match.groups()
        index = None if predicate is None else self._operand(predicate, line).index
        if opcode.startswith("bra"):
            self.statements.append(Statement(line, text, index, bool(negated), opcode, [], rest))
            return
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        operands = [self._operand(part, line) for part in parts]
        self.statements.append(Statement(line, text, index, bool(negated), opcode, operands, None))

    def _operand(self, text: str, line: int) -> Operand:
        if text.startswith("{"):
            parts = [self._operand(part.strip(), line) for part in text[1:-1].split(",")]
            return parts[0] if len(parts) == 1 else parts
        if text.startswith("["):
            match = re.fullmatch(rf"\[\s*({_NAME})\s*(?:\+\s*(-?\d+))?\s*\]", text)
            base = self._operand(match[1], line) if match else None
            if not isinstance(base, Register | Parameter | Shared):
                raise UnsupportedError(f"PTX line {line}: address {text}")
            return Address(base, int(match[2] or 0))
        for scope in reversed(self._scopes):
            if text in scope:
                return scope[text]
        if text in self._parameter_offsets:
            return Parameter(self._parameter_offsets[text])
        if text in self._shared_offsets:
            return Shared(self._shared_offsets[text])
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
            return Constant(int(text[2:], 16))
        if re.fullmatch(r"\d+\.\d+", text):  # a float64, as PTX has it
            return Constant(int.from_bytes(struct.pack(">d", float(text)), "big"))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Constant(int(text.rstrip("U"), 0))
        if re.fullmatch(r"%\w+(\.[xyz])?|_", text):  # _: a result that nobody wants
            return Special(text)
        raise UnsupportedError(f"PTX line {line}: operand {text}")
