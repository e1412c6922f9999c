"""The function of CUDA's driver that launches a kernel, for csrc/tensor_row.cpp to call."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def launch_kernel() -> int:
    """The address of cuLaunchKernel; 0 without a driver, or where this thread has no CUDA context yet.

    PyTorch and Triton's launcher make a context current; cuLaunchKernel needs one.
    """
    library = _library()
    if library is None:
        return 0
    context = ctypes.c_void_p()
    if library.cuCtxGetCurrent(ctypes.byref(context)) != 0 or context.value is None:
        return 0
    return ctypes.cast(library.cuLaunchKernel, ctypes.c_void_p).value or 0
