"""The `cpu` and `cuda` backends: the C++ extension, called directly.

Two modules: `flowmatch_kernels._C`, and `flowmatch_kernels._C_cuda` for what needs torch's CUDA libraries, loaded when
the `cuda` backend is first asked for. Where the second cannot be loaded, the first serves all the same.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused_step import Operands, dense

#: csrc/fused_step.h, Dtype
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def torch_build() -> str:
    """What this torch is built for."""
    if torch.version.cuda is not None:
        return f"built for CUDA {torch.version.cuda}"
    return "built for the CPU" if torch.version.hip is None else f"built for ROCm {torch.version.hip}"


#: Which modules are installed and cannot be loaded, and why: a broken install, not one without a compiler.
_broken: dict[str, str] = {}


def _loaded(name: str) -> tuple[ModuleType | None, str | None]:
    """A module of the extension, or why it cannot be imported; kept for when its backend is asked for."""
    try:
        return importlib.import_module(f"flowmatch_kernels.{name}"), None
    except ModuleNotFoundError as error:  # not there, or a module in its place that says why it was not built
        return None, f"the extension flowmatch_kernels.{name} cannot be imported: {error}"
    except ImportError as error:
        _broken[name] = (
            f"the extension flowmatch_kernels.{name} is installed and cannot be loaded: {error}. It needs a library or "
            f"a symbol that is not here, most often because it was built for another torch; this is torch "
            f"{torch.__version__}, {torch_build()}"
        )
        return None, _broken[name]


_C, _import_error = _loaded("_C")


#: What to do where there is no extension.
REMEDY = "a C++ compiler and `pip install --no-build-isolation --force-reinstall --no-deps .` build the extension"


def broken() -> list[str]:
    """What is installed and cannot be loaded with this torch, as sentences; a missing compiler is no such thing."""
    cuda_unavailable()
    return list(_broken.values())


def cpu_unavailable() -> str | None:
    """Why the `cpu` backend cannot run, or None."""
    return None if _C is not None else _import_error


def cuda_unavailable() -> str | None:
    """Why the `cuda` backend is not built or cannot be loaded, or None. Whether there is a GPU is not asked here."""
    return _import_error if _C is None else _load_cuda()


@functools.cache
def _load_cuda() -> str | None:
    built = getattr(_C, "cuda_version", None)
    if built is None:
        return "the extension was built without CUDA (FORCE_CUDA=1 says why it cannot be)"
    if (torch.version.cuda or "").split(".")[0] != built.split(".")[0]:
        mismatch = (
            f"the extension was built with CUDA {built} and needs a torch of CUDA {built.split('.')[0]}: "
            f"this is torch {torch.__version__}, {torch_build()}"
        )
        if torch.version.cuda is not None:  # else nothing is lost: such a torch has no CUDA
            _broken["_C_cuda"] = mismatch
        return mismatch
    module, reason = _loaded("_C_cuda")
    if module is not None:
        assert _C is not None
        _C.use_cuda(module.launch)
    return reason


def launch_cuda() -> Any:
    """The capsule of csrc/launch_cuda.cpp, which `TensorRows` launches by; None where it is not loaded."""
    return getattr(_cuda_half(), "launch", None)


def _cuda_half() -> Any:
    """The module flowmatch_kernels._C_cuda; None where it is not loaded."""
    return sys.modules.get("flowmatch_kernels._C_cuda")


def _launch(name: str) -> Any:
    """A capsule of flowmatch_kernels._C_cuda, which must be loaded."""
    half = _cuda_half()
    if half is None:
        raise RuntimeError(f"{name}: the extension's CUDA half is not loaded")
    return getattr(half, name)


def cuda_architectures() -> str | None:
    """The GPU architectures that the `cuda` backend is built for, as in TORCH_CUDA_ARCH_LIST; None: not built."""
    return None if _C is None or cuda_unavailable() is not None else str(_C.cuda_archs)


#: GPUs of embedded boards, which do not run what is compiled for others of their major architecture.
_EMBEDDED = {(5, 3), (6, 2), (7, 2), (8, 7), (10, 1)}


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether what is built for these architectures runs on a GPU of this compute capability.

    Machine code runs within its major architecture, from its minor one on; PTX on every newer one. An architecture with
    an "a" runs on no other. One that has a name instead of a number counts as running.

    Args:
        architectures: As in TORCH_CUDA_ARCH_LIST: "7.5;8.0+PTX;9.0a".
        capability: As torch.cuda.get_device_capability() says.
    """
    for architecture in architectures.replace(" ", ";").split(";"):
        number, _, ptx = architecture.partition("+")
        major, _, rest = number.partition(".")
        minor = rest.rstrip("af")
        if not (major.isdecimal() and minor.isdecimal()):
            if number:
                return True
            continue
        built = int(major), int(minor)
        if built == capability:
            return True
        if rest.endswith("a") or built > capability:
            continue
        if (ptx == "PTX" and not rest.endswith("f")) or (
            built[0] == capability[0] and not {built, capability} & _EMBEDDED
        ):
            return True
    return False


def instruction_set() -> str | None:
    """The instruction set the `cpu` backend uses on this machine."""
    return None if _C is None else _C.instruction_set()


def fused_step_(operands: Operands) -> None:
    """`ops.fused_step` in C++, for the CPU and CUDA. Only v and u may be non-contiguous: each costs one copy."""
    if _C is None:
        raise RuntimeError(_import_error)
    _C.fused_step_(operands)


def keyed_noise_(out: Tensor, keys: Tensor, evaluation: int) -> None:
    """`ops.keyed_noise` in C++, for the CPU and CUDA; out and keys contiguous."""
    if _C is None:
        raise RuntimeError(_import_error)
    if not out.numel():
        return
    samples = out.shape[0]
    given = out.data_ptr(), DTYPES[out.dtype], keys.data_ptr(), samples, out.numel() // samples, evaluation
    if out.is_cuda:
        _C.keyed_noise_cuda(_launch("launch_noise"), out.get_device(), *given)
    else:
        _C.keyed_noise(*given)


def step_log_prob_(
    out: Tensor, base: Tensor, v: Tensor, next: Tensor, coefficients: Tensor, densities: Tensor, row: int
) -> None:
    """`ops.step_log_prob` in C++, for the CPU and CUDA. base, v and next may be non-contiguous: each costs one copy."""
    if _C is None:
        raise RuntimeError(_import_error)
    samples = out.shape[0]
    if not samples:
        return
    read = [dense(x) for x in (base, v, next)]
    given = (
        out.data_ptr(),
        *[x.data_ptr() for x in read],
        *[table.data_ptr() + row * table.stride(0) * table.element_size() for table in (coefficients, densities)],
        *(DTYPES[base.dtype], DTYPES[v.dtype], samples, base.numel() // samples, coefficients.dim() == 3),
    )
    if out.is_cuda:
        _C.step_log_prob_cuda(_launch("launch_log_prob"), out.get_device(), *given)
    else:
        _C.step_log_prob(*given)


#: The states of one sample() on the CPU, in counted memory: csrc/row.cpp. None where this torch cannot make a tensor
#: over memory of ours, or there is no extension: then `rows.Fresh` or `rows.Functional` serves.
Rows: Callable[..., Any] | None = getattr(_C, "Rows", None)

#: The states of one sample() in memory that PyTorch allocates: csrc/tensor_row.cpp. None without the extension.
TensorRows: Callable[..., Any] | None = getattr(_C, "TensorRows", None)


def device(of: torch.device) -> int:
    """A device as csrc/python_tensor.h names it: -1 for the CPU, -2 for what is no GPU either."""
    if of.type == "cpu":
        return -1
    if of.type != "cuda":
        return -2
    return torch.cuda.current_device() if of.index is None else of.index


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
