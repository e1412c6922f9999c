"""CUDA graphs on the CPU: what a capture records, a replay runs again on the same memory, without the user's Python.

A dispatch mode sees every operator of a call, with its tensors, which it holds. A replay calls these operators again on
these very tensors; what an operator returns in memory of its own is copied to where the recorded result lies. So memory
is static, as in a graph, and whatever Python computed is frozen. Like a capture it computes nothing that may be used:
the results are filled with NaN (0 for integers) until the first replay. It refuses what a capture refuses.

Steps go through the registered operator, which the mode sees, from the rows in C++ that a GPU has: `emulated()`.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flowmatch_kernels import graphs, tracing
from flowmatch_kernels.ops import dispatch

#: What a capture refuses, and with which words PyTorch or CUDA says so.
REFUSED = {
    "aten._local_scalar_dense.default": "CUDA error: operation not permitted when stream is capturing",
    "aten.nonzero.default": "CUDA error: operation not permitted when stream is capturing",
    "aten.index.Tensor": "CUDA error: operation not permitted when stream is capturing",  # by a mask; see below
    "aten.lift_fresh.default": "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU "
    "tensor is pinned",
}


class Recorded(TorchDispatchMode):
    """Runs and records operators.

    Args:
        generators: Those that may be drawn from, beside the default one.
    """

    def __init__(self, generators=()):
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, Any]] = []
        self._generators = [torch.default_generator, *generators]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        masks = str(func) != "aten.index.Tensor" or any(i is not None and i.dtype == torch.bool for i in args[1])
        if str(func) in REFUSED and masks:
            raise RuntimeError(REFUSED[str(func)])
        generator = kwargs.get("generator")
        if generator is not None and all(generator._cdata != known._cdata for known in self._generators):
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        result = func(*args, **kwargs)
        # By memory, and not by object: another memory that an object gets later (x.data = y) is not seen.
        self.operators.append((func, *pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs, result))))
        return result

    def names(self):
        return [str(func) for func, *_ in self.operators]

    def replay(self):
        for func, args, kwargs, result in self.operators:
            if "empty" in str(func):
                continue  # memory, which is there
            again = func(*args, **kwargs)
            given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            for old, new in zip(tensors(result), tensors(again), strict=True):
                # Views, and what was written in place, are in the memory of an argument.
                if old is not new and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


def tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded: Recorded | None = recorded

    def replay(self) -> None:
        assert self.recorded is not None, "a graph that was reset is replayed"
        with torch.no_grad():
            self.recorded.replay()

    def reset(self) -> None:
        self.recorded = None


class EmulatedGraphs:
    """In the place of `graphs.CudaGraphs`."""

    def __init__(self, device, generators):
        self.device, self.generators = device, generators
        self.dropped = 0
        self.last: Graph | None = None

    @contextlib.contextmanager
    def current(self):
        yield

    def warm_up(self, function):
        for _ in range(2):
            function()

    def capture(self, function):
        with capturing(self.generators) as recorded:
            results = function()
        for x in tensors(results):
            x.fill_(torch.nan if x.is_floating_point() else 0)
        self.last = Graph(recorded)
        return results, self.last

    def drop(self, captured):
        for graph in captured:
            graph.reset()
        self.dropped += len(captured)


@contextlib.contextmanager
def capturing(generators=()):
    """What runs within is recorded; sample() takes it for a capture, in which no mode is at work."""
    is_eager, is_capturing, me = tracing.is_eager, tracing.is_capturing, threading.get_ident()
    tracing.is_eager = lambda: threading.get_ident() == me or is_eager()
    tracing.is_capturing = lambda: threading.get_ident() == me
    try:
        with Recorded(generators) as recorded:
            yield recorded
    finally:
        tracing.is_eager, tracing.is_capturing = is_eager, is_capturing


def emulated(monkeypatch, rows="C++"):
    """Graphs on the CPU. `rows`: "C++", "Python" (both make fresh tensors, as on a GPU) or "reference"."""
    monkeypatch.setattr(graphs, "recorder", EmulatedGraphs)
    step = torch.ops.flowmatch_kernels.fused_step_

    def fused_step_(operands):  # by the dispatcher, and not `native.fused_step_`: else rows would step in C++, unseen
        step(*operands)

    by_the_dispatcher = dispatch.BACKENDS["cpu"]._replace(
        load=lambda: fused_step_, load_noise=lambda: dispatch.reference_noise.keyed_noise_
    )
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", by_the_dispatcher)
    if rows == "Python":
        monkeypatch.setattr("flowmatch_kernels.ops.native.TensorRows", None)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference" if rows == "reference" else "cpu")
