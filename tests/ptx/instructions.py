"""What each instruction that the kernels use does, as a function on the registers of many threads.

A register is an array of unsigned integers, its bits, one for each thread, or a single one where all threads hold the
same; a predicate is an array of booleans. What is not known here is refused, with the line it stands on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arithmetic
from .arithmetic import HALVES
from .memory import UNSIGNED, AccessError, ConflictError
from .parser import Address, Constant, Entry, Operand, Parameter, Register, Shared, Special, Statement, UnsupportedError

if TYPE_CHECKING:
    from .executor import Threads

Values = np.ndarray
Source = Callable[["Threads"], Values]

TYPES = {"f32": np.float32, "f64": np.float64, "f16": np.uint16, "bf16": np.uint16, "f16x2": np.uint32}
TYPES |= {"bf16x2": np.uint32, "f32x2": np.uint64}
TYPES |= {f"{kind}{8 * size}": np.dtype(f"u{size}").type for kind in "bu" for size in UNSIGNED}
TYPES |= {f"s{8 * size}": np.dtype(f"i{size}").type for size in UNSIGNED}
FLOATS = ("f32", "f64", *HALVES)
PAIRS = ("f32x2", "f16x2", "bf16x2")

#: Caching, which changes no value; "L2::cache_hint" brings an operand more.
CACHING = {"nc", "cs", "wb", "L1::evict_first", "L2::cache_hint"}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _high(x: Values, y: Values) -> Values:
    """The upper 64 bits of a product of unsigned 64-bit integers."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    p, q = x0 * y1, x1 * y0
    carry = (((x0 * y0) >> half) + (p & low) + (q & low)) >> half
    return x1 * y1 + (p >> half) + (q >> half) + carry


def _divide(x: Values, y: Values) -> Values:
    """Towards zero; all ones where y is 0, as the hardware has it."""
    divisor = np.where(y == 0, y.dtype.type(1), y)
    quotient = x // divisor if x.dtype.kind == "u" else (x - np.fmod(x, divisor)) // divisor
    return np.where(y == 0, ~np.zeros(1, x.dtype), quotient)


def _shift(function: np.ufunc) -> Callable[[Values, Values], Values]:
    def shift(x: Values, by: Values) -> Values:
        return function(x, np.minimum(by, np.uint32(8 * x.itemsize)).astype(x.dtype))

    return shift


#: On two integers of one type.
INTEGERS = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "div": _divide}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
SHIFTS = {"shl": _shift(np.left_shift), "shr": _shift(np.right_shift)}


class Instruction:
    """A statement, ready to run.

    Attributes:
        run: Takes the threads and which of them are active (None: all), and returns a value for each destination.
        destinations: Registers that it writes.
        target: The statement that a branch goes to; `leaves` instead where a thread ends here.
    """

    def __init__(self, entry: Entry, statement: Statement) -> None:
        self.statement = statement
        self.predicate, self.negated = statement.predicate, statement.negated
        self.run: Callable[[Threads, Values | None], list[Values]] = lambda threads, active: []
        self.destinations: list[int] = []
        self.target: int | None = None
        self.leaves = False
        root, *modifiers = statement.opcode.split(".")
        self._modifiers = re.findall(r"L[12]::\w+|[\w]+", ".".join(modifiers))
        self._types = [m for m in self._modifiers if m in TYPES or m == "pred"]
        self._operands = statement.operands
        translate = getattr(self, f"_{root}", None)
        if root in INTEGERS | BITWISE | SHIFTS or root == "fma":
            translate = self._two_operands
        if translate is None:
            raise self._unsupported()
        if root == "bra":
            self.target = entry.labels[statement.label]
        else:
            translate()

    def _unsupported(self) -> UnsupportedError:
        return UnsupportedError(f"PTX line {self.statement.line}: `{self.statement.text}` is not supported")

    def _only(self, *known: str) -> None:
        """Refuses a modifier that nothing here gives a meaning to, such as .ftz or .approx."""
        if set(self._modifiers) - set(self._types) - set(known):
            raise self._unsupported()

    # ---- operands ----

    def _source(self, operand: Operand, dtype: type) -> Source:
        """Reads an operand as this type."""
        kind = np.dtype(dtype)
        unsigned = UNSIGNED[kind.itemsize]
        if isinstance(operand, Register) and operand.size == kind.itemsize:
            return lambda threads: threads.registers[operand.index].view(kind)
        if isinstance(operand, Register) and operand.size:
            return lambda threads: threads.registers[operand.index].astype(unsigned).view(kind)
        if isinstance(operand, Constant):
            value = np.array([operand.bits & ((1 << 8 * kind.itemsize) - 1)], unsigned).view(kind)
            return lambda threads: value
        if isinstance(operand, Parameter | Shared):  # its address: where it stands in parameter or in shared memory
            place = np.array([operand.offset], unsigned).view(kind)
            return lambda threads: place
        if isinstance(operand, Special):
            return lambda threads: threads.special(operand.name).astype(unsigned).view(kind)
        raise self._unsupported()

    def _values(self, operand: Operand, kind: str) -> Source:
        """Reads an operand; floats of 16 bits as the float32 values that they are."""
        source = self._source(operand, TYPES[kind])
        return (lambda threads: arithmetic.widened(source(threads), kind)) if kind in HALVES else source

    def _predicate(self, operand: Operand) -> Source:
        if not isinstance(operand, Register) or operand.size:
            raise self._unsupported()
        return lambda threads: threads.registers[operand.index]

    def _results(self, targets: list[Operand], function: Callable[..., list[Values]]) -> None:
        """`function(threads, active)` goes into these registers, its bits extended or cut to their size."""
        wanted = [j for j, target in enumerate(targets) if target != Special("_")]
        kinds = []
        for j in wanted:
            target = targets[j]
            if not isinstance(target, Register):
                raise self._unsupported()
            kinds.append(UNSIGNED.get(target.size))
            self.destinations.append(target.index)

        def fitted(value: Values, kind: type | None) -> Values:
            if kind is None or value.itemsize == np.dtype(kind).itemsize:
                return value if kind is None else value.view(kind)
            signed = value.dtype.kind == "i"  # sign-extended
            return value.astype(np.dtype(f"{'i' if signed else 'u'}{np.dtype(kind).itemsize}")).view(kind)

        def run(threads: Threads, active: Values | None) -> list[Values]:
            values = function(threads, active)
            return [fitted(values[j], kind) for j, kind in zip(wanted, kinds, strict=True)]

        self.run = run

    def _result(self, function: Callable[..., Values], *sources: Source) -> None:
        """function(*values) goes into the first operand."""
        self._results(self._operands[:1], lambda threads, active: [function(*(read(threads) for read in sources))])

    # ---- arithmetic ----

    def _two_operands(self) -> None:
        name, kind, operands = self.statement.opcode.partition(".")[0], self._types[-1], self._operands[1:]
        if kind in (*FLOATS, *PAIRS):
            self._float(name)
            return
        self._only()
        if kind == "pred":
            self._result(BITWISE[name], *map(self._predicate, operands))
        elif name in SHIFTS:
            self._result(SHIFTS[name], self._source(operands[0], TYPES[kind]), self._source(operands[1], np.uint32))
        else:
            function = (INTEGERS | BITWISE)[name]
            self._result(function, *(self._source(operand, TYPES[kind]) for operand in operands))

    def _float(self, name: str) -> None:
        """add, sub, mul, div, fma; of two elements at once where the type is a pair."""
        self._only("rn")
        operands, kinds = self._operands[1:], self._types
        if len(operands) != (3 if name == "fma" else 2) or len(kinds) > 2:
            raise self._unsupported()
        base = kinds[0].removesuffix("x2")
        try:
            function = arithmetic.operation(name, base)
        except KeyError:
            raise self._unsupported() from None
        if len(kinds) == 2:  # add.rn.f32.bf16: float32, of which the first operand has 16 bits
            if kinds[0] != "f32" or kinds[1] not in HALVES:
                raise self._unsupported()
            self._result(function, self._values(operands[0], kinds[1]), *(self._values(x, "f32") for x in operands[1:]))
        elif kinds[0] not in PAIRS:
            self._result(function, *(self._values(operand, kinds[0]) for operand in operands))
        else:
            self._pair(function, base)

    def _pair(self, function: Callable[..., Values], base: str) -> None:
        word, element = TYPES[f"{base}x2"], UNSIGNED[np.dtype(TYPES[base]).itemsize]
        bits = word(8 * np.dtype(element).itemsize)

        def value(x: Values) -> Values:
            half = x.astype(element)
            return arithmetic.widened(half, base) if base in HALVES else half.view(np.float32)

        def both(*words: Values) -> Values:
            low, high = function(*map(value, words)), function(*(value(x >> bits) for x in words))
            return low.view(element).astype(word) | (high.view(element).astype(word) << bits)

        self._result(both, *(self._source(operand, word) for operand in self._operands[1:]))

    def _product(self, name: str) -> tuple[Callable[..., Values], type, np.dtype]:
        """An integer product, its operands' type, and its own."""
        self._only("lo", "hi", "wide")
        kind = np.dtype(TYPES[self._types[-1]])
        if "wide" in self._modifiers:
            wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
            return lambda x, y: x.astype(wide) * y.astype(wide), kind.type, wide
        if "hi" in self._modifiers:
            if kind == np.uint64:
                return _high, kind.type, kind
            if kind != np.uint32:
                raise self._unsupported()
            return lambda x, y: (x.astype(np.uint64) * y >> np.uint64(32)).astype(np.uint32), kind.type, kind
        return np.multiply, kind.type, kind

    def _mul(self) -> None:
        if self._types[-1] in (*FLOATS, *PAIRS):
            self._float("mul")
            return
        product, kind, _ = self._product("mul")
        self._result(product, *(self._source(operand, kind) for operand in self._operands[1:]))

    def _mad(self) -> None:
        product, kind, result = self._product("mad")
        x, y, z = self._operands[1:]
        addend = self._source(z, result.type)
        self._result(lambda a, b, c: product(a, b) + c, self._source(x, kind), self._source(y, kind), addend)

    def _neg(self) -> None:
        self._only()
        sign = {"f32": np.uint32(1 << 31), "f64": np.uint64(1 << 63), "f16": np.uint16(1 << 15)}
        sign["bf16"] = sign["f16"]
        kind = self._types[-1]
        if kind in ("s32", "s64"):
            self._result(np.negative, self._source(self._operands[1], TYPES[kind]))
            return
        if kind not in sign:
            raise self._unsupported()
        self._result(lambda x: x ^ sign[kind], self._source(self._operands[1], type(sign[kind])))

    def _not(self) -> None:
        self._only()
        source, kind = self._operands[1], self._types[-1]
        self._result(np.invert, self._predicate(source) if kind == "pred" else self._source(source, TYPES[kind]))

    def _sqrt(self) -> None:
        """Correctly rounded, as numpy's is."""
        self._only("rn")
        if "rn" not in self._modifiers or self._types[-1] not in ("f32", "f64"):
            raise self._unsupported()
        self._result(np.sqrt, self._source(self._operands[1], TYPES[self._types[-1]]))

    # ---- moves and comparisons ----

    def _mov(self) -> None:
        self._only()
        target, source = self._operands
        if self._types[-1] == "pred":
            given = np.array([isinstance(source, Constant) and source.bits != 0])
            self._result(lambda p: p, (lambda threads: given) if given[0] else self._predicate(source))
            return
        word = UNSIGNED[np.dtype(TYPES[self._types[-1]]).itemsize]
        if isinstance(target, list):  # { %r1, %r2 } from one register, the lowest bits first
            size = np.dtype(word).itemsize // len(target)
            read = self._source(source, word)
            shifts = [word(8 * size * j) for j in range(len(target))]
            self._results(target, lambda threads, active: [(read(threads) >> s).astype(UNSIGNED[size]) for s in shifts])
        elif isinstance(source, list):
            size = np.dtype(word).itemsize // len(source)
            reads = [self._source(part, UNSIGNED[size]) for part in source]

            def packed(*parts: Values) -> Values:
                return sum(part.astype(word) << word(8 * size * j) for j, part in enumerate(parts))

            self._result(packed, *reads)
        else:
            self._result(lambda x: x, self._source(source, word))

    def _cvta(self) -> None:
        """Generic addresses are global ones here: what kernels use of shared memory they name."""
        self._only("to", "global")
        self._result(lambda x: x, self._source(self._operands[1], np.uint64))

    def _bfe(self) -> None:
        """bfe.u32: so many bits from a position on, both modulo 256; zeros beyond the last."""
        self._only()
        if self._types != ["u32"]:
            raise self._unsupported()

        def field(x: Values, position: Values, length: Values) -> Values:
            begin, bits = position & np.uint32(255), length & np.uint32(255)
            wide = np.where(begin < 32, x.astype(np.uint64) >> np.minimum(begin, 31).astype(np.uint64), np.uint64(0))
            mask = (np.uint64(1) << np.minimum(bits, 32).astype(np.uint64)) - np.uint64(1)
            return (wide & mask).astype(np.uint32)

        self._result(field, *(self._source(operand, np.uint32) for operand in self._operands[1:]))

    def _selp(self) -> None:
        self._only()
        word = UNSIGNED[np.dtype(TYPES[self._types[-1]]).itemsize]
        x, y, chosen = self._operands[1:]
        self._result(
            lambda p, a, b: np.where(p, a, b), self._predicate(chosen), *(self._source(s, word) for s in (x, y))
        )

    def _setp(self) -> None:
        comparison, kind = self._modifiers[0], self._types[-1]
        self._only(comparison)
        x, y = (self._values(operand, kind) for operand in self._operands[1:])
        if comparison in ("neu", "equ", "leu", "geu", "ltu", "gtu"):  # true of NaN
            ordered = COMPARISONS[comparison[:-1]]
            self._result(lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b), x, y)
        elif comparison == "ne" and kind in FLOATS:
            self._result(lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b), x, y)
        elif comparison in COMPARISONS:
            self._result(COMPARISONS[comparison], x, y)
        else:
            raise self._unsupported()

    def _cvt(self) -> None:
        self._only("rn")
        to, source = self._types
        if to in PAIRS:  # cvt.rn.bf16x2.f32 d, high, low
            if source != "f32":
                raise self._unsupported()
            base = to.removesuffix("x2")

            def packed(high: Values, low: Values) -> Values:
                bits = [arithmetic.rounded(x.astype(np.float64), base).astype(np.uint32) for x in (high, low)]
                return bits[0] << np.uint32(16) | bits[1]

            self._result(packed, *(self._source(x, np.float32) for x in self._operands[1:]))
        elif to in FLOATS and source in FLOATS:
            read = self._values(self._operands[1], source)
            self._result(lambda x: arithmetic.rounded(x.astype(np.float64), to), read)
        elif source not in FLOATS and (to not in FLOATS or (to in ("f32", "f64") and "rn" in self._modifiers)):
            self._result(lambda x: x.astype(TYPES[to]), self._source(self._operands[1], TYPES[source]))
        else:
            raise self._unsupported()

    # ---- memory ----

    def _access(self) -> tuple[str, int, type]:
        """Space, words and type of an access."""
        self._only("param", "global", "shared", "v2", "v4", "v8", *CACHING)
        space = next((m for m in self._modifiers if m in ("param", "global", "shared")), "")
        count = next((int(m[1]) for m in self._modifiers if m in ("v2", "v4", "v8")), 1)
        if not space:
            raise self._unsupported()
        return space, count, UNSIGNED[np.dtype(TYPES[self._types[-1]]).itemsize]

    def _address(self, operand: Operand) -> Source:
        if not isinstance(operand, Address) or not isinstance(operand.base, Register | Shared):
            raise self._unsupported()
        base, offset = self._source(operand.base, np.int64), np.int64(operand.offset)
        return lambda threads: base(threads) + offset

    def _checked(self, access: Callable[[], Any]) -> Any:
        try:
            return access()
        except (AccessError, ConflictError) as fault:
            where = f"PTX line {self.statement.line}: `{self.statement.text}`"
            raise type(fault)(f"{where}: {fault}") from None

    def _ld(self) -> None:
        space, count, word = self._access()
        targets = self._operands[0] if isinstance(self._operands[0], list) else [self._operands[0]]
        source, size, opcode = self._operands[1], np.dtype(word).itemsize, self.statement.opcode
        if len(targets) != count:
            raise self._unsupported()
        if space == "param":
            if not isinstance(source, Address):
                raise self._unsupported()
            known = isinstance(source.base, Parameter)
            base = None if known else self._address(source)

            def parameter(threads: Threads, active: Values | None) -> list[Values]:
                if base is None:
                    first = source.base.offset + source.offset
                else:  # every thread's address is the same: a parameter's, from mov
                    at = np.broadcast_to(base(threads), threads.count)[threads.lanes(active)]
                    first = int(at[0])
                    if (at != first).any() or not 0 <= first <= len(threads.parameters) - count * size:
                        raise self._unsupported()
                starts = [first + j * size for j in range(count)]
                return [np.frombuffer(threads.parameters, word, 1, start) for start in starts]

            self._results(targets, parameter)
            return
        address = self._address(source)

        def load(threads: Threads, active: Values | None) -> list[Values]:
            lanes = threads.lanes(active)
            at = np.broadcast_to(address(threads), threads.count)[lanes]
            if space == "shared":
                got = self._checked(lambda: threads.shared.load(at, size, count, threads.places[lanes]))
            else:
                got = self._checked(lambda: threads.memory.load(opcode, at, size, count, threads.index[lanes]))
            values = [np.zeros(threads.count, word) for _ in range(count)]
            for value, part in zip(values, got, strict=True):
                value[lanes] = part
            return values

        self._results(targets, load)

    def _st(self) -> None:
        space, count, word = self._access()
        given = self._operands[1] if isinstance(self._operands[1], list) else [self._operands[1]]
        if space not in ("global", "shared") or len(given) != count:
            raise self._unsupported()
        address, opcode = self._address(self._operands[0]), self.statement.opcode
        reads = [self._source(operand, word) for operand in given]

        def store(threads: Threads, active: Values | None) -> list[Values]:
            lanes = threads.lanes(active)
            at = np.broadcast_to(address(threads), threads.count)[lanes]
            values = [np.broadcast_to(read(threads), threads.count)[lanes] for read in reads]
            if space == "shared":
                self._checked(lambda: threads.shared.store(at, values, threads.places[lanes]))
            else:
                self._checked(lambda: threads.memory.store(opcode, at, values, threads.index[lanes]))
            return []

        self.run = store

    def _createpolicy(self) -> None:
        """A hint for the cache."""

    # ---- between threads ----

    def _bar(self) -> None:
        """bar.sync 0: all threads of a block."""
        self._only("sync")
        if self._modifiers != ["sync"] or self._operands != [Constant(0)]:
            raise self._unsupported()

        def meet(threads: Threads, active: Values | None) -> list[Values]:
            self._checked(lambda: threads.meet(active))
            return []

        self.run = meet

    def _shfl(self) -> None:
        """shfl.sync.bfly of a whole warp: each lane gets the value of the lane whose number differs in these bits."""
        self._only("sync", "bfly")
        source, mask, clamp, members = self._operands[1:]
        if "bfly" not in self._modifiers or clamp != Constant(31) or members != Constant(-1):
            raise self._unsupported()
        value, bits = self._source(source, np.uint32), self._source(mask, np.uint32)

        def exchange(threads: Threads, active: Values | None) -> list[Values]:
            self._checked(lambda: threads.meet(active, warp=True))
            return [np.broadcast_to(value(threads), threads.count)[threads.places ^ bits(threads)]]

        self._results(self._operands[:1], exchange)

    # ---- control ----

    def _bra(self) -> None:
        """Where it goes is known from its label."""

    def _ret(self) -> None:
        self.leaves = True
