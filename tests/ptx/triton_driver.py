"""A Triton driver whose launches execute the PTX that Triton has compiled."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton_recorder import Launch, RecordingDriver, installed

from . import operand_memory
from .executor import Kernel

_functions = itertools.count(1)

_DTYPES = {"*fp32": torch.float32, "*fp64": torch.float64, "*bf16": torch.bfloat16, "*fp16": torch.float16}
#: The operands' shapes, by the kernel's other arguments.
_SHAPES: dict[str, Callable[[dict[str, Any]], tuple[int, ...]]] = {
    **dict.fromkeys(
        ("out", "base", "v", "u", "h1", "h2", "h3", "history", "strength"), lambda given: (given["numel"],)
    ),
    "coefficients": lambda given: (given["row"] + 1, 8),
    "trajectory": lambda given: (given["numel"] // given["sample"], given["slots"], given["sample"]),
}


def _at(address: int, kind: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor over memory that a launch got the address of."""
    dtype = _DTYPES[kind]
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class ExecutingDriver(RecordingDriver):
    """Stands where Triton's CUDA driver would: key, grid, arguments and PTX are Triton's own.

    Args:
        kernel: The JIT function whose launches come here.
        arch: The compute capability that it is compiled for: 90 for sm_90.
        first: Which operands leave the cache first, as of `operand_memory.check`.

    Attributes:
        launches: All launches, as of `RecordingDriver`.
    """

    def __init__(self, kernel: Any, arch: int, first: Mapping[str, Container[str]]) -> None:
        super().__init__(arch)
        self._jit, self._first = kernel, first
        self._kernels: dict[int, Kernel] = {}
        # A number of its own for each compiled kernel, by which a launch names it.
        self.utils.load_binary = lambda name, binary, shared, device: (1, next(_functions), 0, 0, 1024)

    def _kernel(self, function: int) -> Kernel:
        if function not in self._kernels:
            (ptx,) = {
                compiled.asm["ptx"]
                for cache in self._jit.device_caches.values()
                for compiled in cache[0].values()
                if compiled.function == function
            }
            self._kernels[function] = Kernel(ptx)
        return self._kernels[function]

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names
        runtime = [name for name in names if source.signature[name] != "constexpr"]

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            arguments = dict(zip(names, rest[-len(names) :], strict=True))
            options = {"enable_fp_fusion": metadata.enable_fp_fusion, "num_warps": metadata.num_warps}
            self.launches.append(Launch(self.device, stream, (x, y, z), arguments, options, function))
            kernel = self._kernel(function)
            assert kernel.threads == 32 * metadata.num_warps
            pointers = {
                name: value
                for name in runtime
                if isinstance(value := arguments[name], Tensor) or (value is not None and name in _SHAPES)
            }
            tensors = {
                name: value
                if isinstance(value, Tensor)
                else _at(value, source.signature[name], _SHAPES[name](arguments))
                for name, value in pointers.items()
            }
            memory = operand_memory.of(tensors)
            values = [arguments[name] for name in runtime]
            values = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
            kernel.launch((x, y, z), memory, values, metadata.shared)
            operand_memory.check(memory, tensors, self._first)

        return launch


@contextmanager
def executing(
    kernel: Any, arch: int, first: Mapping[str, Container[str]] = operand_memory.EVICTED_FIRST
) -> Iterator[ExecutingDriver]:
    """Within this context Triton launches execute PTX; `kernel`'s compilations start from none."""
    driver = ExecutingDriver(kernel, arch, first)
    with installed(kernel, driver):
        yield driver
