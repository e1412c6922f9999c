"""What a GPU would be given, counted without one: launches, bytes moved, copies from the host.

Each contestant really runs, on torch's `meta` device, which stands for the GPU: every op that would launch a kernel
there is seen (views and allocations launch none), and to wait for the device would raise. Ours takes the way of a GPU
backend, with a kernel that is only counted. Bytes are what the ops must read and write; caches are not known of.
These are counts, not times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowmatch_kernels import solvers
from flowmatch_kernels.ops import dispatch
from flowmatch_kernels.ops.fused_step import Operands

from . import contestants
from .work import ALPAMAYO, Problem, Work

TASKS = ("final", "trajectory", "guided", "guided trajectory")
META = torch.device("meta")

#: Ops whose first argument is only written to.
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_"}
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Count(NamedTuple):
    """Of one call."""

    launches: int
    bytes: int
    """Read and written by these launches."""
    copies: int
    """From host to device."""


class Counter(TorchDispatchMode):
    """Counts what goes to the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = self.copies = self.fused_steps = 0

    @property
    def count(self) -> Count:
        """What was counted so far."""
        return Count(self.launches, self.bytes, self.copies)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name in _ALLOCATES:
            return result
        read = list(args)[name in _OVERWRITES :], {k: v for k, v in kwargs.items() if k != "out"}
        operands, results = _tensors(read), _tensors(result)
        if not any(tensor.device == META for tensor in results):
            return result  # the host's own work
        if any(tensor.device != META and tensor.dim() for tensor in operands):
            self.copies += 1
        else:
            self.launch(operands + results)
        return result

    def launch(self, operands: list[Tensor]) -> None:
        """One kernel that reads or writes these, each in full."""
        self.launches += 1
        self.bytes += sum(map(_bytes, operands))

    def fused_step_(self, given: Operands) -> None:
        """Stands for a GPU backend: one kernel, which reads and writes each operand once."""
        operands = [given.out, given.base, given.v, given.u, given.h1, given.h2, given.h3, given.history]
        if given.trajectory is not None:
            operands.append(given.out)  # a slot is as large
        self.fused_steps += 1
        self.launch([operand for operand in operands if operand is not None])


def _tensors(tree: Any) -> list[Tensor]:
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _bytes(tensor: Tensor) -> int:
    """Of the memory it has: an expanded dimension is read from the cache."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size


def counted(function: Callable[[], object]) -> Count:
    """What one call gives the device."""
    with Counter() as counter:
        function()
    return counter.count


def counted_ours(work: Work) -> tuple[Count, Count]:
    """What the first call of a sampler gives the device, and what each later one does.

    Raises:
        RuntimeError: other than one fused step an evaluation was seen: what is counted is not ours.
    """
    problem = Problem(work, META)
    counts = []
    solvers.cache.clear()
    # A mode would send the steps through the registered op; what is counted is the way of plain eager mode.
    with mock.patch.object(torch._C, "_len_torch_dispatch_stack", return_value=0):
        sample = None
        for _ in range(2):
            counter = Counter()
            backend = dispatch.Backend("triton", (), lambda _: None, lambda counter=counter: counter.fused_step_)
            with mock.patch.dict(dispatch.BACKENDS, triton=backend), counter:
                sample = sample or contestants.ours("triton", problem)
                sample()
            if counter.fused_steps != work.evaluations:
                raise RuntimeError(f"{counter.fused_steps} fused steps in {work.evaluations} evaluations")
            counts.append(counter.count)
    return counts[0], counts[1]


def table(steps: int = 10) -> list[dict[str, Any]]:
    """For each task: the published loop, the best by hand, ours, ours in its first call; Alpamayo's shape."""
    rows = []
    for task in TASKS:
        work = Work(ALPAMAYO, task, steps)
        problem = Problem(work, META)
        by_hand = contestants.by_hand_out if work.trajectory else contestants.by_hand_in_place
        first, later = counted_ours(work)
        for name, count in (
            ("published loop", counted(partial(contestants.published, problem))),
            ("best by hand", counted(partial(by_hand, problem))),
            ("ours", later),
            ("ours, first call", first),
        ):
            rows.append({"task": task, "shape": list(work.shape), "steps": steps, "contestant": name} | count._asdict())
    return rows
