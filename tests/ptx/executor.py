"""Runs a kernel: all threads of its grid, those of one group of blocks at once, in lockstep where they agree.

kernel = Kernel(ptx)
memory = Memory()
memory.add("x", x.data_ptr(), x.nbytes)
kernel.launch((blocks, 1, 1), memory, parameters)
"""

from __future__ import annotations

import struct

import numpy as np

from .instructions import Instruction
from .memory import UNSIGNED, ConflictError, Memory, SharedMemory
from .parser import Entry, UnsupportedError

#: Threads that run at once, about; and the statements they may execute, more of which is a loop without end.
_TOGETHER = 32768
_MOST = 100_000


class ContractionError(RuntimeError):
    """The assembler may fuse a product and a sum of this PTX into one rounding."""


class Threads:
    """What some blocks of a grid share while they run."""

    def __init__(self, kernel: Kernel, first: int, blocks: int, memory: Memory, parameters: bytes, shared: int) -> None:
        self.memory, self.parameters = memory, parameters
        self.shared = SharedMemory(blocks, kernel.entry.shared + shared, kernel.threads)
        self.count, self._in_block = blocks * kernel.threads, kernel.threads
        self.places = np.arange(self.count)
        self.running = np.ones(self.count, bool)
        self.index = self.places + first * kernel.threads
        self._special = {
            "%tid.x": self.index % kernel.threads,
            "%ctaid.x": self.index // kernel.threads,
            "%ntid.x": np.array([kernel.threads]),
        }
        # All ones in what nobody has written: a NaN, and no address.
        self.registers = [~np.zeros(1, UNSIGNED[size]) if size else np.zeros(1, bool) for size in kernel.registers]

    def special(self, name: str) -> np.ndarray:
        if name not in self._special:
            raise UnsupportedError(f"special register {name}")
        return self._special[name].astype(np.uint64)

    def lanes(self, active: np.ndarray | None) -> slice | np.ndarray:
        return slice(None) if active is None else active

    def meet(self, active: np.ndarray | None, warp: bool = False) -> None:
        """Raises unless of each block, or warp, all threads that still run are active, or none; a block's barrier."""
        here = np.ones(self.count, bool) if active is None else active
        here, running = (x.reshape(-1, 32 if warp else self._in_block) for x in (here, self.running))
        if (here.any(axis=1) & (here != running).any(axis=1)).any():
            raise ConflictError(f"threads of one {'warp' if warp else 'block'} do not all come here")
        if not warp:
            self.shared.barrier(here.any(axis=1))


class Kernel:
    """One entry of a PTX module, ready to run.

    Args:
        text, name: As of `Entry`.

    Raises:
        ContractionError: ptxas may round otherwise than the text says.
        UnsupportedError: it holds an instruction that is not known here.
    """

    def __init__(self, text: str, name: str | None = None) -> None:
        self.entry = Entry(text, name)
        if self.entry.contractable:
            raise ContractionError(f"{self.entry.name}: {self.entry.contractable[0]}")
        self.threads, self.registers = self.entry.threads, self.entry.registers
        self._program = [Instruction(self.entry, statement) for statement in self.entry.statements]

    def packed(self, arguments: list[int | bytes]) -> bytes:
        """Arguments as parameter memory: integers, or the bytes of a struct; absent ones at the end are null."""
        end = sum(self.entry.parameters[-1])
        memory = bytearray(end)
        for (offset, size), argument in zip(self.entry.parameters, arguments, strict=False):
            if isinstance(argument, int):
                argument = struct.pack("<q", argument)[:size]
            assert len(argument) == size
            memory[offset : offset + size] = argument
        return bytes(memory)

    def launch(self, grid: tuple[int, int, int], memory: Memory, arguments: list[int | bytes], shared: int = 0) -> None:
        """Runs all blocks, with `shared` bytes for an extern array of shared memory.

        Raises:
            AccessError: an access that a GPU would refuse, or a read of what nobody wrote.
            ConflictError: threads meet at one byte, or do not meet where they should.
        """
        assert grid[1:] == (1, 1)
        parameters = self.packed(arguments)
        together = max(1, _TOGETHER // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, grid[0], together):
                self._run(Threads(self, first, min(together, grid[0] - first), memory, parameters, shared))
        if conflicts := memory.conflicts():
            raise ConflictError("; ".join(conflicts[:3]))

    def _run(self, threads: Threads) -> None:
        """Of the groups of threads that stand at different statements, the one that is furthest behind goes on."""
        registers = threads.registers
        waiting: dict[int, np.ndarray] = {}  # the threads of each group, by the statement that they come to next

        def wait(at: int, group: np.ndarray) -> None:
            waiting[at] = waiting[at] | group if at in waiting else group

        wait(0, np.ones(threads.count, bool))
        steps = 0
        while waiting:
            at = min(waiting)
            group = waiting.pop(at)
            others = min(waiting, default=len(self._program) + 1)
            alone = not waiting and bool(group.all())  # registers may be replaced whole
            while at < others:
                steps += 1
                if steps > _MOST:
                    raise RuntimeError(f"{self.entry.name} does not end")
                instruction = self._program[at]
                active, every = group, True
                if instruction.predicate is not None:
                    chosen = registers[instruction.predicate]
                    active = group & (~chosen if instruction.negated else chosen)
                    every = bool((active == group).all())
                    if not active.any():
                        at += 1
                        continue
                if instruction.leaves or instruction.target is not None:
                    if instruction.target is not None:
                        wait(instruction.target, active)
                    else:
                        threads.running &= ~active
                    if not every:
                        wait(at + 1, group & ~active)
                    break
                whole = alone and every
                values = instruction.run(threads, None if whole else active)
                for index, value in zip(instruction.destinations, values, strict=True):
                    registers[index] = value if whole else np.where(active, value, registers[index])
                at += 1
            else:  # it has come to where others wait
                wait(at, group)
