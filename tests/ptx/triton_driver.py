"""A Triton driver whose launches execute the PTX that Triton has compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from triton_recorder import Launch, RecordingDriver, installed

from . import operand_memory
from .executor import Kernel

_functions = itertools.count(1)


class ExecutingDriver(RecordingDriver):
    """Stands where Triton's CUDA driver would: key, grid, arguments and PTX are Triton's own.

    Args:
        kernel: The JIT function whose launches come here.
        arch: The compute capability that it is compiled for: 90 for sm_90.

    Attributes:
        launches: All launches, as of `RecordingDriver`.
    """

    def __init__(self, kernel: Any, arch: int) -> None:
        super().__init__(arch)
        self._jit = kernel
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
            assert metadata.shared == 0
            assert kernel.threads == 32 * metadata.num_warps
            tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
            memory = operand_memory.of(tensors)
            values = [arguments[name] for name in runtime]
            values = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
            kernel.launch((x, y, z), memory, values)
            operand_memory.check(memory, tensors)

        return launch


@contextmanager
def executing(kernel: Any, arch: int) -> Iterator[ExecutingDriver]:
    """Within this context Triton launches execute PTX; `kernel`'s compilations start from none."""
    driver = ExecutingDriver(kernel, arch)
    with installed(kernel, driver):
        yield driver
