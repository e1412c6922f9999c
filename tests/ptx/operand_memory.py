"""What a kernel may touch of an op's operands, and how it must have moved them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping

from torch import Tensor

from flowmatch_kernels.ops.fused_step import WRITTEN, is_keys

from .memory import Memory

READ = ("base", "v", "u", "h1", "h2", "h3", "strength", "next", "coefficients", "densities", "keys")
#: Read by every thread; so is h1 that is keys.
TABLES = ("coefficients", "densities", "keys")
#: Read once and then dead, or not read before sampling ends: the first to leave the cache.
EVICTED_FIRST = {"load": {"v", "u"}, "store": {"trajectory"}}
#: Of the ops other than fused_step, whose operands are read again: by the gradient, or by the step that follows.
NOTHING_FIRST: dict[str, set[str]] = {"load": set(), "store": set()}
HINTS = ("evict_first", ".cs.")


def of(operands: Mapping[str, Tensor | None]) -> Memory:
    """The memory of these tensors and nothing else: what is only written is poisoned, what is only read is guarded."""
    there = {name: tensor for name, tensor in operands.items() if tensor is not None and tensor.numel()}
    written = {there[name].data_ptr() for name in WRITTEN if name in there}
    memory = Memory()
    for name in (*READ, *WRITTEN):  # a tensor that is both is known by what is read
        if name in there:
            tensor = there[name]
            extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            memory.add(
                name,
                tensor.data_ptr(),
                extent * tensor.element_size(),
                poisoned=name in WRITTEN,
                read_only=tensor.data_ptr() not in written,
            )
    return memory


def check(
    memory: Memory, operands: Mapping[str, Tensor | None], first: Mapping[str, Container[str]] = EVICTED_FIRST
) -> None:
    """Each operand's bytes moved once, of a trajectory one slot's; and `first` are what leaves the cache first."""
    known: dict[int, str] = {}
    wanted = Counter[tuple[str, str]]()
    for name in (*READ, *WRITTEN):
        tensor = operands.get(name)
        if tensor is not None:
            kind = "store" if name in WRITTEN else "load"
            numel = operands["base"].numel() if name == "trajectory" else tensor.numel()
            wanted[kind, known.setdefault(tensor.data_ptr(), name)] += numel * tensor.element_size()
    moved = Counter[tuple[str, str]]()
    for (kind, name, opcode), count in memory.moved.items():
        moved[kind, name] += count
        hinted = any(hint in opcode for hint in HINTS)
        assert hinted == (name in first[kind]), f"a {kind} of {name} is {opcode}"
    for table in (*TABLES, *["h1"] * is_keys(operands.get("h1"))):
        assert bool(wanted.pop(("load", table), 0)) == bool(moved.pop(("load", table), 0)), f"{table} is not read"
    assert moved == wanted, f"bytes moved {moved}, wanted {wanted}"
