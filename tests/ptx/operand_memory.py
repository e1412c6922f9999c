"""What a kernel may touch of a step's operands, and how it must have moved them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from flowmatch_kernels.ops.fused_step import WRITTEN

from .memory import Memory

READ = ("base", "v", "u", "h1", "h2", "h3", "strength", "coefficients")
#: Read once and then dead, or not read before sampling ends: the first to leave the cache.
EVICTED_FIRST = {"load": {"v", "u"}, "store": {"trajectory"}}
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


def check(memory: Memory, operands: Mapping[str, Tensor | None]) -> None:
    """Each operand's bytes moved once, and only what is dead afterwards leaves the cache first."""
    numel = operands["base"].numel()
    known: dict[int, str] = {}
    wanted = Counter[tuple[str, str]]()
    for name in (*READ, *WRITTEN):
        tensor = operands.get(name)
        if tensor is not None:
            kind = "store" if name in WRITTEN else "load"
            wanted[kind, known.setdefault(tensor.data_ptr(), name)] += numel * tensor.element_size()
    moved = Counter[tuple[str, str]]()
    for (kind, name, opcode), count in memory.moved.items():
        moved[kind, name] += count
        hinted = any(hint in opcode for hint in HINTS)
        assert hinted == (name in EVICTED_FIRST[kind]), f"a {kind} of {name} is {opcode}"
    wanted.pop(("load", "coefficients"))
    moved.pop(("load", "coefficients"))
    assert moved == wanted, f"bytes moved {moved}, wanted {wanted}"
