"""The `cpu` and `cuda` backends: the C++ extension `flowmatch_kernels._C`, called directly."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused_step import Operands

#: csrc/fused_step.h, Dtype
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_C: ModuleType | None = None
_import_error: str | None = None
try:
    _C = importlib.import_module("flowmatch_kernels._C")
except ImportError as error:  # reported when the backend is asked for, never at import
    _import_error = f"the extension flowmatch_kernels._C cannot be imported: {error}"


#: What to do where there is no extension.
REMEDY = "a C++ compiler and `pip install --no-build-isolation --force-reinstall --no-deps .` build the extension"


def cpu_unavailable() -> str | None:
    """Why the `cpu` backend cannot run, or None."""
    return None if _C is not None else _import_error


def cuda_unavailable() -> str | None:
    """Why the `cuda` backend is not built, or None. Whether there is a GPU is not asked here."""
    if _C is None:
        return _import_error
    if not hasattr(_C, "cuda_archs"):
        return "the extension was built without CUDA (FORCE_CUDA=1 says why it cannot be)"
    return None


def cuda_architectures() -> str | None:
    """The GPU architectures that the `cuda` backend is built for, as in TORCH_CUDA_ARCH_LIST; None: not built."""
    return None if _C is None or cuda_unavailable() is not None else str(_C.cuda_archs)


def instruction_set() -> str | None:
    """The instruction set the `cpu` backend uses on this machine."""
    return None if _C is None else _C.instruction_set()


def fused_step_(operands: Operands) -> None:
    """`ops.fused_step` in C++, for the CPU and CUDA. Only v and u may be non-contiguous: each costs one copy."""
    if _C is None:
        raise RuntimeError(_import_error)
    _C.fused_step_(operands)


#: The states of one sample() on the CPU, in counted memory: csrc/row.cpp. None where this torch cannot make a tensor
#: over memory of ours, or there is no extension: then `rows.Fresh` or `rows.Functional` serves.
Rows: Callable[..., Any] | None = getattr(_C, "Rows", None)


def rows_unavailable() -> str | None:
    """Why the CPU's states are not kept in counted memory, or None."""
    if _C is None:
        return _import_error
    return None if Rows is not None else f"torch {torch.__version__} has no DLPack exchange API: torch >= 2.11 has it"


def _apart(v: Any, u: Any) -> bool:
    if not all(type(x) is Tensor and x.layout is torch.strided and not x.is_nested for x in (v, u)):
        return False
    return not (v._is_zerotensor() or u._is_zerotensor()) and v.data_ptr() != u.data_ptr()


#: (v, u) -> whether two tensors lie in memory at different addresses; unknown counts as no.
apart: Callable[[Any, Any], bool] = _apart if _C is None else _C.apart


class HostPool(NamedTuple):
    """Host memory for states and trajectories on the CPU, in bytes."""

    limit: int
    """The most that is kept for reuse."""
    idle: int
    """What is kept now."""
    in_use: int
    """What states, results and trajectories hold."""


#: How much host memory is kept for reuse, in bytes; 0 keeps none.
POOL_VARIABLE = "FLOWMATCH_KERNELS_HOST_POOL_BYTES"


def host_pool() -> HostPool | None:
    """The pool's sizes; None without the extension, which owns it."""
    return None if _C is None else HostPool(*_C.pool_sizes())


def empty_cache() -> None:
    """Frees the host memory that is kept for later calls of sample(); what a tensor holds stays.

    The counterpart of `torch.cuda.empty_cache` for this package's memory on the CPU. The limit of what is kept is
    FLOWMATCH_KERNELS_HOST_POOL_BYTES, read at import: 512 MiB by default, 0 keeps nothing.
    """
    if _C is not None:
        _C.empty_pool()


def _set_limit(value: str) -> None:
    if not value.isdecimal() or int(value) >= 1 << 63:
        raise ValueError(f"{POOL_VARIABLE} must be a number of bytes, got {value!r}")
    if _C is not None:
        _C.set_pool_limit(int(value))


if POOL_VARIABLE in os.environ:
    _set_limit(os.environ[POOL_VARIABLE])
