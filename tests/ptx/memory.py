"""The bytes that a kernel may read and write, at the addresses they have in this process.

An access must lie inside one region, on a multiple of its size. What a kernel reads of a poisoned region it must have
written first; a read-only region it must not write; and no byte that one thread writes may another read or write.
"""

from __future__ import annotations

import bisect
import ctypes
from collections import defaultdict
from typing import NamedTuple

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class AccessError(RuntimeError):
    """An access that a GPU would refuse, or that reads what nobody wrote."""


class OutOfBoundsError(AccessError):
    pass


class MisalignedError(AccessError):
    pass


class PoisonReadError(AccessError):
    pass


class ReadOnlyError(AccessError):
    pass


class ConflictError(RuntimeError):
    """Two threads meet at one byte, and one of them writes it; or not all come to where they should meet."""


class _Access(NamedTuple):
    offsets: np.ndarray
    size: int
    threads: np.ndarray


def _bytes_at(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


class Region:
    """Bytes from `begin` to `end`."""

    def __init__(self, name: str, begin: int, size: int, poisoned: bool, read_only: bool) -> None:
        self.name, self.begin, self.end, self.read_only = name, begin, begin + size, read_only
        self._data = _bytes_at(begin, size)
        self._written = np.zeros(size, np.uint8) if poisoned else None  # 1 for each byte that has been written
        self.reads: list[_Access] = []
        self.writes: list[_Access] = []

    def _words(self, array: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """The array as aligned words, and where the first begins."""
        shift = -self.begin % size
        count = max(0, (len(array) - shift) // size)
        return array[shift : shift + count * size].view(UNSIGNED[size]), shift

    def load(self, addresses: np.ndarray, size: int, count: int, threads: np.ndarray) -> list[np.ndarray]:
        offsets = addresses - self.begin
        words, shift = self._words(self._data, size)
        index = (offsets - shift) // size
        if self._written is not None:
            written, _ = self._words(self._written, size)
            for j in range(count):
                unwritten = written[index + j] != UNSIGNED[size](int("01" * size, 16))
                if unwritten.any():
                    at = int(offsets[unwritten.argmax()]) + j * size
                    raise PoisonReadError(f"reads {self.name}+{at} before it is written")
        self.reads.append(_Access(offsets, size * count, threads))
        return [words[index + j] for j in range(count)]

    def store(self, addresses: np.ndarray, values: list[np.ndarray], threads: np.ndarray) -> None:
        if self.read_only:
            raise ReadOnlyError(f"writes {self.name}, which is only read")
        size = values[0].itemsize
        offsets = addresses - self.begin
        words, shift = self._words(self._data, size)
        index = (offsets - shift) // size
        for j, value in enumerate(values):
            words[index + j] = value
            if self._written is not None:
                self._words(self._written, size)[0][index + j] = UNSIGNED[size](int("01" * size, 16))
        self.writes.append(_Access(offsets, size * len(values), threads))

    def conflicts(self) -> list[str]:
        """What two threads do to one byte, if one of them writes: in any order, for there is no barrier."""
        if not self.writes:
            return []
        unit = min(access.size for access in (*self.writes, *self.reads))
        owner = np.zeros(-(-(self.end - self.begin) // unit) + 1, np.int64)  # thread + 1

        def units(access: _Access) -> list[tuple[np.ndarray, np.ndarray]]:
            first = (access.offsets + self.begin % unit) // unit
            return [(first + j, access.threads + 1) for j in range(access.size // unit)]

        found = []
        written = [pair for access in self.writes for pair in units(access)]
        for at, thread in written:
            earlier = owner[at]
            owner[at] = thread
            if ((earlier != 0) & (earlier != thread)).any() or (owner[at] != thread).any():
                found.append(f"{self.name}: two threads write one byte")
        for at, thread in [pair for access in self.reads for pair in units(access)]:
            other = (owner[at] != 0) & (owner[at] != thread)
            if other.any():
                byte = int(at[other.argmax()]) * unit
                found.append(f"{self.name}+{byte}: thread {int(thread[other.argmax()]) - 1} reads what another writes")
        return found


class Memory:
    """All regions of one launch."""

    def __init__(self) -> None:
        self._regions: dict[tuple[int, int], Region] = {}
        self._sorted: list[Region] = []
        self._begins: list[int] = []
        #: Bytes moved, by "load" or "store", region, and the instruction's opcode.
        self.moved: dict[tuple[str, str, str], int] = defaultdict(int)

    def add(self, name: str, begin: int, size: int, *, poisoned: bool = False, read_only: bool = False) -> None:
        """Makes bytes known; those that are known already keep what was said of them first, their name too."""
        if size == 0 or (begin, size) in self._regions:
            return
        region = Region(name, begin, size, poisoned, read_only)
        self._regions[begin, size] = region
        self._sorted = sorted(self._regions.values(), key=lambda known: known.begin)
        self._begins = [known.begin for known in self._sorted]
        for before, after in zip(self._sorted, self._sorted[1:], strict=False):
            assert before.end <= after.begin, f"{before.name} overlaps {after.name}"

    def _split(self, addresses: np.ndarray, size: int) -> list[tuple[Region, np.ndarray | None]]:
        """The regions of these accesses, each with which accesses are its own (None: all)."""
        misaligned = addresses % size != 0
        if misaligned.any():
            at = int(addresses[misaligned.argmax()])
            raise MisalignedError(f"misaligned {size}-byte access at {self._where(at)}")
        first, last = int(addresses.min()), int(addresses.max())
        i = bisect.bisect_right(self._begins, first) - 1
        if i >= 0 and last + size <= self._sorted[i].end:
            return [(self._sorted[i], None)]
        index = np.searchsorted(np.array(self._begins, np.int64), addresses, "right") - 1
        ends = np.array([region.end for region in self._sorted] or [0], np.int64)
        outside = (index < 0) | (addresses + size > ends[index])
        if outside.any():
            at = int(addresses[outside.argmax()])
            raise OutOfBoundsError(f"out-of-bounds {size}-byte access at {self._where(at)}")
        return [(self._sorted[j], (index == j).nonzero()[0]) for j in np.unique(index)]

    def _where(self, address: int) -> str:
        i = bisect.bisect_right(self._begins, address) - 1
        if i < 0:
            return "a null pointer" if 0 <= address < 1 << 20 else "an address below all operands"
        region = self._sorted[i]
        return f"{region.name}+{address - region.begin} ({region.end - region.begin} bytes)"

    def load(self, opcode: str, addresses: np.ndarray, size: int, count: int, threads: np.ndarray) -> list[np.ndarray]:
        """`count` words of `size` bytes from each address."""
        values = [np.zeros(len(addresses), UNSIGNED[size]) for _ in range(count)]
        for region, mine in self._split(addresses, size * count):
            chosen = slice(None) if mine is None else mine
            for value, part in zip(values, region.load(addresses[chosen], size, count, threads[chosen]), strict=True):
                value[chosen] = part
            self.moved["load", region.name, opcode] += len(addresses[chosen]) * size * count
        return values

    def store(self, opcode: str, addresses: np.ndarray, values: list[np.ndarray], threads: np.ndarray) -> None:
        size = values[0].itemsize * len(values)
        for region, mine in self._split(addresses, size):
            chosen = slice(None) if mine is None else mine
            region.store(addresses[chosen], [value[chosen] for value in values], threads[chosen])
            self.moved["store", region.name, opcode] += len(addresses[chosen]) * size

    def conflicts(self) -> list[str]:
        return [conflict for region in self._sorted for conflict in region.conflicts()]


class SharedMemory:
    """The shared memory of the blocks that run at once, from address 0 on in each.

    What one thread writes another may read, and what one has touched another may write, only after a barrier of their
    block: on a GPU threads run in any order, though here in lockstep.

    Args:
        blocks: How many run.
        size: Bytes of each.
        threads: Of a block.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self._threads = threads
        self._bytes = np.zeros((blocks, size), np.uint8)
        self._written = np.zeros((blocks, size), bool)
        # Since the last barrier: the thread, from 1 on; 0: none; -1: several.
        self._writer = np.zeros((blocks, size), np.int64)
        self._reader = np.zeros((blocks, size), np.int64)

    def _at(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the bytes of each access stand."""
        addresses = addresses & 0xFFFFFFFF  # they have 32 bits
        if (addresses % size != 0).any():
            raise MisalignedError(f"misaligned {size}-byte access of shared memory")
        if (addresses < 0).any() or (addresses + size > self._bytes.shape[1]).any():
            at = int(addresses.max())
            raise OutOfBoundsError(f"out-of-bounds {size}-byte access at {at} of {self._bytes.shape[1]} shared bytes")
        return (threads // self._threads)[:, None], addresses[:, None] + np.arange(size)

    def _check(self, others: np.ndarray, threads: np.ndarray, does: str) -> None:
        wrong = (others != 0) & (others != threads)
        if wrong.any():
            thread = int(np.broadcast_to(threads, others.shape)[wrong][0]) - 1
            raise ConflictError(f"thread {thread % self._threads} {does} without a barrier between")

    def load(self, addresses: np.ndarray, size: int, count: int, threads: np.ndarray) -> list[np.ndarray]:
        at = self._at(addresses, size * count, threads)
        if not self._written[at].all():
            raise PoisonReadError("reads shared memory before it is written")
        me = threads[:, None] + 1
        self._check(self._writer[at], me, "reads what another has written")
        before = self._reader[at]
        mine = np.where((before == 0) | (before == me), me, -1)
        self._reader[at] = mine
        self._reader[at] = np.where(self._reader[at] == mine, mine, -1)
        return list(np.ascontiguousarray(self._bytes[at]).view(UNSIGNED[size]).T)

    def store(self, addresses: np.ndarray, values: list[np.ndarray], threads: np.ndarray) -> None:
        size = values[0].itemsize
        at = self._at(addresses, size * len(values), threads)
        me = threads[:, None] + 1
        self._check(self._reader[at], me, "writes what another has read")
        self._check(self._writer[at], me, "writes what another has written")
        self._writer[at] = np.broadcast_to(me, at[1].shape)
        self._check(self._writer[at], me, "writes what another writes")
        self._bytes[at] = np.ascontiguousarray(np.stack(values, axis=1)).view(np.uint8)
        self._written[at] = True

    def barrier(self, blocks: np.ndarray) -> None:
        """All threads of these blocks have come to one."""
        self._writer[blocks] = 0
        self._reader[blocks] = 0
