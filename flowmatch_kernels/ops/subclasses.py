"""Tensor subclasses and the registered op: which ones it serves, and its rule for DTensor.

The op is element-wise, so a DTensor is stepped shard by shard, with no communication where all operands are sharded
alike. The rule is `torch.library.register_torch_dispatch`'s and not a sharding strategy: those are experimental, and
`register_sharding` gathers tensors whose shards are uneven. It is made where torch.distributed.tensor was imported
before this package, else by the first sample() with a DTensor.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .fused_step import NAMESPACE, READ, library

#: Those that see the op as they see PyTorch's own.
_SERVED = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)

_lock = threading.Lock()
_registered = False


def foreign(tensors: Iterable[Any]) -> type | None:
    """The type of the first tensor that the op may have no rule for."""
    for x in tensors:
        if isinstance(x, Tensor) and type(x) not in _SERVED and not _sees_through(type(x)) and not is_dtensor(x):
            return type(x)
    return None


def _sees_through(kind: type) -> bool:
    """A name tag: PyTorch's functions take such a tensor for a plain one."""
    function: Any = getattr(kind.__torch_function__, "__func__", None)  # type: ignore[attr-defined]
    plain: Any = Tensor.__torch_function__
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and function is plain.__func__  # type: ignore[attr-defined]


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor; the op then has its rule. Does not import torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or type(x) is not module.DTensor:
        return False
    register_dtensor()
    return True


def register_dtensor() -> None:
    """Gives `torch.ops.flowmatch_kernels.fused_step` its rule for DTensor, if torch.distributed.tensor is imported."""
    global _registered
    module = sys.modules.get("torch.distributed.tensor")
    if _registered or not hasattr(module, "DTensor"):
        return
    with _lock:
        if not _registered:
            torch.library.register_torch_dispatch(f"{NAMESPACE}::fused_step", module.DTensor, _by_shard, lib=library)  # type: ignore[union-attr]
            _registered = True


# A compiler calls it while it traces, and does not trace it; as `dispatch._resolve`.
register_dtensor._dynamo_marked_constant = True  # type: ignore[attr-defined]


def replicated(x: Tensor, like: Tensor | None) -> Tensor:
    """x on the device mesh of `like`, where that is a DTensor: every rank has the whole of it."""
    if not is_dtensor(like):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[union-attr]
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def number_beside(x: Any, like: Tensor) -> Any:
    """x, replicated where it is one number, expanded, beside a DTensor: PyTorch's own ops take one so."""
    if type(x) is not Tensor or any(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        return x
    return replicated(x, like)


def _by_shard(
    kind: type, op: Any, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> Tensor:
    """The op on each rank's shards. The result is placed as base is, and so are the other operands, before.

    Raises:
        TypeError: some operands are DTensors, and others plain tensors, which is for `implicit_replication` to allow,
            as in PyTorch's own ops.
        ValueError: base is a pending sum, or an operand is on another device mesh.
        NotImplementedError: base is sharded, and the coefficients are rows of their own.
    """
    DTensor: Any = kind
    operands = dict(zip(READ, args, strict=False)) | (kwargs or {})
    base = operands["base"]
    tensors = [(name, x) for name, x in operands.items() if isinstance(x, Tensor) and name != "coefficients"]
    given = next((x for _, x in tensors if isinstance(x, DTensor)), operands["coefficients"])
    implicit = getattr(DTensor._op_dispatcher, "_allow_implicit_replication", False)
    for name, x in tensors:
        if not isinstance(x, DTensor):
            if not implicit:
                raise TypeError(
                    f"{name} is a plain tensor, and another operand of the step a DTensor on {given.device_mesh}: "
                    "noise and velocities must be DTensors all, or none. distribute_tensor() makes one"
                )
            operands[name] = replicated(x, given)
        elif x.device_mesh != given.device_mesh:
            raise ValueError(f"{name} is on {x.device_mesh}, and another operand of the step on {given.device_mesh}")
    base = operands["base"]
    mesh, placements = base.device_mesh, base.placements
    if operands["coefficients"].dim() == 3 and not all(placement.is_replicate() for placement in placements):
        raise NotImplementedError(
            f"rows of their own, coefficients {list(operands['coefficients'].shape)}, need a state that each rank has "
            f"the whole of, got {placements}: step each shard by itself, with its rows"
        )
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"base is a pending sum, {placements}: redistribute it to Shard or Replicate first")
    for name, _ in tensors:
        operands[name] = operands[name].redistribute(mesh, placements).to_local().contiguous()
    if isinstance(operands["coefficients"], DTensor):
        operands["coefficients"] = operands["coefficients"].full_tensor()
    shape = base.shape
    strides = base.stride() if base.is_contiguous() else torch.empty(shape, device="meta").stride()
    return DTensor.from_local(op(**operands), mesh, placements, run_check=False, shape=shape, stride=strides)


def attempted(what: str, tensors: Iterable[Any], function: Callable[[], Tensor]) -> Tensor:
    """What the function returns; of an error that a foreign tensor's own code raises it says what was not possible.

    Raises:
        TypeError: instead of that error.
    """
    kind = foreign(tensors)
    if kind is None:
        return function()
    try:
        return function()
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TypeError(f"{what} is not possible with a {kind.__name__}: {reason[0]}") from error


register_dtensor()
