"""The `cpu` and `cuda` backends: the C++ extension `flowmatch_kernels._C`, called directly."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .fused_step import WEIGHTED, dense

_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}  # csrc/fused_step.h, Dtype

_C: ModuleType | None = None
_import_error: str | None = None
try:
    _C = importlib.import_module("flowmatch_kernels._C")
except ImportError as error:  # told when the backend is asked for, never at import
    _import_error = f"the extension flowmatch_kernels._C cannot be imported: {error}"


def cpu_unavailable() -> str | None:
    """Why the `cpu` backend cannot run, or None."""
    return None if _C is not None else _import_error


def cuda_unavailable() -> str | None:
    """Why the `cuda` backend is not built, or None. Whether there is a GPU is not asked here."""
    if _C is None:
        return _import_error
    if not hasattr(_C, "fused_step_cuda"):
        return "the extension was built without CUDA (FORCE_CUDA=1 says why it cannot be)"
    return None


def cuda_architectures() -> str | None:
    """The GPU architectures that the `cuda` backend is built for, as in TORCH_CUDA_ARCH_LIST; None: not built."""
    return None if _C is None or cuda_unavailable() is not None else str(_C.cuda_archs)


def huge_pages(fresh: Tensor) -> Tensor:
    """`fresh`, large memory on the CPU that nobody has touched yet, with huge pages asked for."""
    if _C is not None and fresh.device.type == "cpu" and (size := fresh.numel() * fresh.element_size()) >= 1 << 22:
        _C.advise_huge_pages(fresh.data_ptr(), size)
    return fresh


def instruction_set() -> str | None:
    """The instruction set the `cpu` backend uses on this machine."""
    return None if _C is None else _C.instruction_set()


def _not_built(*operands: Any, **options: Any) -> None:
    raise RuntimeError(_import_error)


#: The `cpu` backend's fused_step_, with the signature of `reference.fused_step_`.
cpu_fused_step_: Callable[..., None] = _not_built if _C is None else _C.fused_step_cpu

#: The `cpu` backend's `sampling.Stepper`; None where this torch lacks what it needs.
Stepper: Callable[..., Any] | None = getattr(_C, "Stepper", None)

#: (times, original, views, batch_size, dims, uses) -> whether a `sampling.Clock` is as it was made; None as above.
untouched: Callable[..., bool] | None = getattr(_C, "untouched", None)


def cuda_fused_step_(
    out: Tensor,
    base: Tensor,
    v: Tensor,
    u: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    coefficients: Tensor,
    row: int,
    velocity_rounding: bool = False,
    guidance: int = WEIGHTED,
    trajectory: Tensor | None = None,
    slot: int = 0,
    history: Tensor | None = None,
) -> None:
    """`ops.fused_step` in C++ CUDA. Only v and u may be non-contiguous: each costs one copy."""
    numel = base.numel()
    if numel == 0:
        return
    assert _C is not None
    v = dense(v)
    if u is not None:
        u = dense(u)
    _C.fused_step_cuda(
        out.data_ptr(),
        base.data_ptr(),
        v.data_ptr(),
        0 if u is None else u.data_ptr(),
        0 if h1 is None else h1.data_ptr(),
        0 if h2 is None else h2.data_ptr(),
        0 if h3 is None else h3.data_ptr(),
        coefficients.data_ptr(),
        row,
        _DTYPES[base.dtype],
        _DTYPES[v.dtype],
        velocity_rounding,
        guidance,
        0 if trajectory is None else trajectory.data_ptr(),
        1 if trajectory is None else trajectory.shape[1],
        slot,
        0 if history is None else history.data_ptr(),
        numel,
        numel if trajectory is None else numel // base.shape[0],
        base.get_device(),
    )
