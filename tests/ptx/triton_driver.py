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
_DTYPES["*i64"] = torch.int64  # keys of noise, in the place of h1
#: The operands' shapes, by the kernel's other arguments.
_SHAPES: dict[str, Callable[[dict[str, Any]], tuple[int, ...]]] = {
    **dict.fromkeys(
        ("out", "base", "v", "u", "h1", "h2", "h3", "history", "strength"), lambda given: (given["numel"],)
    ),
    "coefficients": lambda given: (given["row"] + given["numel"] // given["span"], 8),
    "trajectory": lambda given: (given["numel"] // given["sample"], given["slots"], given["sample"]),
}


_LAUNCH_KERNEL = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)


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
        direct: There is a cuLaunchKernel too, for launches past Triton's launcher.

    Attributes:
        launches: All launches, as of `RecordingDriver`.
        by_driver: How many came by cuLaunchKernel.
        errors: What was raised in these.
    """

    def __init__(self, kernel: Any, arch: int, first: Mapping[str, Container[str]], direct: bool) -> None:
        super().__init__(arch)
        self._jit, self._first, self._direct = kernel, first, direct
        self.by_driver = 0
        self.errors: list[BaseException] = []
        self._by_driver = _LAUNCH_KERNEL(self._launched_by_driver)
        self._kernels: dict[int, Kernel] = {}
        # A number of its own for each compiled kernel, by which a launch names it.
        self.utils.load_binary = lambda name, binary, shared, device: (1, next(_functions), 0, 0, 1024)

    def _compiled(self, function: int) -> Any:
        (found,) = {
            compiled
            for cache in self._jit.device_caches.values()
            for compiled in cache[0].values()
            if compiled.function == function
        }
        return found

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            arguments = dict(zip(names, rest[-len(names) :], strict=True))
            self._execute((x, y, z), stream, function, arguments)

        return launch

    def launch_kernel(self) -> int:
        """The address of a function that takes what cuLaunchKernel takes, and executes the PTX."""
        return ctypes.cast(self._by_driver, ctypes.c_void_p).value or 0 if self._direct else 0

    def _launched_by_driver(self, function: int, *rest: Any) -> int:
        *sizes, shared, stream, parameters, extra = rest
        try:
            compiled = self._compiled(function)
            source = compiled.src
            names = source.fn.arg_names
            constants = {names[at[0]]: value for at, value in source.constants.items()}
            arguments = {name: constants.get(name) for name in names}
            runtime = [name for name in names if source.signature[name] != "constexpr"]
            for k, name in enumerate(runtime):
                arguments[name] = ctypes.cast(parameters[k], ctypes.POINTER(ctypes.c_int64)).contents.value
            own = [ctypes.cast(parameters[len(runtime) + k], ctypes.POINTER(ctypes.c_int64)) for k in range(2)]
            assert [pointer.contents.value for pointer in own] == [0, 0]
            assert (shared, bool(extra), sizes[3:]) == (0, False, [32 * compiled.metadata.num_warps, 1, 1])
            self._execute(tuple(sizes[:3]), stream, function, arguments)
        except BaseException as error:  # which ctypes would print and forget
            self.errors.append(error)
            return 719  # CUDA_ERROR_LAUNCH_FAILED
        self.by_driver += 1
        return 0

    def _execute(self, grid: tuple[int, ...], stream: int, function: int, arguments: dict[str, Any]) -> None:
        compiled = self._compiled(function)
        source, metadata = compiled.src, compiled.metadata
        options = {"enable_fp_fusion": metadata.enable_fp_fusion, "num_warps": metadata.num_warps}
        self.launches.append(Launch(self.device, stream, grid, arguments, options, function))
        if function not in self._kernels:
            self._kernels[function] = Kernel(compiled.asm["ptx"])
        kernel = self._kernels[function]
        assert kernel.threads == 32 * metadata.num_warps
        runtime = [name for name in source.fn.arg_names if source.signature[name] != "constexpr"]
        pointers = {
            name: value
            for name in runtime
            if isinstance(value := arguments[name], Tensor) or (value is not None and name in _SHAPES)
        }
        keys = {"h1": (arguments["numel"] // arguments["sample"], 3)} if source.signature.get("h1") == "*i64" else {}
        tensors = {
            name: value
            if isinstance(value, Tensor)
            else _at(value, source.signature[name], keys.get(name) or _SHAPES[name](arguments))
            for name, value in pointers.items()
        }
        memory = operand_memory.of(tensors)
        values = [arguments[name] for name in runtime]
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
        kernel.launch(grid, memory, values, metadata.shared)
        operand_memory.check(memory, tensors, self._first)


@contextmanager
def executing(
    kernel: Any, arch: int, first: Mapping[str, Container[str]] = operand_memory.EVICTED_FIRST, direct: bool = False
) -> Iterator[ExecutingDriver]:
    """Within this context Triton launches execute PTX; `kernel`'s compilations start from none."""
    driver = ExecutingDriver(kernel, arch, first, direct)
    with installed(kernel, driver):
        yield driver
    if driver.errors:
        raise driver.errors[0]
