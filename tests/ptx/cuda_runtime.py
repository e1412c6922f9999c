"""The extension's CUDA half, built by nvcc against cudart.c, and its launches executed.

The host's code is all real: `flowmatch_kernels._C` takes the operands, csrc/launch_cuda.cpp the current stream, and
csrc's *_cuda.cu pick the kernel and call cudaLaunchKernel. The operands say that they are on `cuda`, and lie
in the memory of the host.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import build_cache
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench import static_cuda
from flowmatch_kernels.ops import native
from flowmatch_kernels.ops.fused_step import Operands
from flowmatch_kernels.rows import times

from . import operand_memory
from .executor import Kernel
from .memory import Memory

ROOT = build_cache.ROOT
CSRC = ROOT / "csrc"
DOUBLE = Path(__file__).with_name("cudart.c")
ARCHS = (90, 100)


def unavailable() -> str | None:
    """Why the CUDA half cannot be built here, or None."""
    if static_cuda.tools()["nvcc"] is None:
        return "the CUDA kernel's PTX is not executed: nvcc is not found"
    if native._C is None:
        return f"the CUDA kernel's PTX is not executed: {native.cpu_unavailable()}"
    return None


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))} failed:\n{done.stderr[-4000:]}")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def _described(*sources: Path) -> list[str | Path]:
    """What every build depends on, with its sources and csrc's headers; names of kernels depend on the folder."""
    return [str(CSRC), build_cache.version(*_compiler()), *sources, *sorted(CSRC.glob("*.h"))]


#: The C++ that a launch comes by, and the kernels of each op.
LAUNCHER, *KERNELS = (ROOT / name for name in static_cuda.of_setup("CUDA_SOURCES"))


def _kernels(source: Path) -> Path:
    """A folder: kernel.o, the host's code with all kernels in it, and their PTX for compute_100, compute_100.ptx.

    With setup.py's flags, for a virtual architecture: the machine code would not be run. Of fused_step 20 s of a core,
    of each other op 2 s.
    """
    nvcc = static_cuda.tools()["nvcc"]
    assert nvcc is not None
    flags = [*static_cuda.FLAGS, "-Xcompiler=-fPIC", "-Xcompiler=-O0", "-gencode=arch=compute_100,code=compute_100"]

    def make(folder: Path) -> None:
        folder.mkdir()
        with tempfile.TemporaryDirectory(dir=build_cache.FOLDER) as scratch:
            _run(nvcc, *flags, f"-I{CSRC}", "--keep", f"--keep-dir={scratch}", "-c", source, "-o", folder / "kernel.o")
            Path(scratch, f"{source.stem}.ptx").rename(folder / "compute_100.ptx")

    return build_cache.built(f"{source.stem}_kernels", [*flags, build_cache.version(nvcc), *_described(source)], make)


def _ptx(source: Path, arch: int) -> Path:
    """The PTX of an op's kernels; of sm_90 what its machine code is made of, which other tests read."""
    if arch == 100:
        return _kernels(source) / "compute_100.ptx"
    return static_cuda.built(f"sm_{arch}", "ptx", source)


def _module(kernels: list[Path]) -> Path:
    """The CUDA half: the kernels' host code, csrc/launch_cuda.cpp, and the double in the place of CUDA's runtime."""
    flags = [*static_cuda.of_setup("CXX_FLAGS"), "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [CSRC, Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]

    def make(module: Path) -> None:
        with tempfile.TemporaryDirectory(dir=build_cache.FOLDER) as scratch:
            launcher, double = Path(scratch, "launcher.o"), Path(scratch, "cudart.o")
            _run(*_compiler(), *flags, *(f"-I{path}" for path in includes), "-c", LAUNCHER, "-o", launcher)
            _run(*_compiler(), "-x", "c", "-O1", "-fPIC", "-fvisibility=hidden", "-c", DOUBLE, "-o", double)
            objects = [folder / "kernel.o" for folder in kernels]
            _run(*_compiler(), "-shared", *objects, launcher, double, "-o", module)

    described = [*(folder.name for folder in kernels), *flags, torch.__version__, sysconfig.get_python_version()]
    return build_cache.built("_C_cuda.so", [*described, *_described(LAUNCHER, DOUBLE)], make)


# ---- tensors on cuda, over host memory ----


class _DLTensor(ctypes.Structure):
    """DLTensor of DLPack, dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_CUDA, _INT, _FLOAT, _BFLOAT = 2, 0, 2, 4
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


#: PyTorch looks at a tensor's description once more when the tensor goes, which may be after its `OnCuda`.
_descriptions: list[object] = []


class OnCuda:
    """A tensor that says that it is on a CUDA device, over the memory of one on the CPU.

    Attributes:
        host: The one on the CPU.
        tensor: Of which C++ sees address, sizes, dtype and device; no operation of torch's runs on it.
    """

    def __init__(self, x: Tensor, device: int) -> None:
        sizes = ctypes.c_int64 * x.dim()
        code = _BFLOAT if x.dtype == torch.bfloat16 else _FLOAT if x.is_floating_point() else _INT
        self.host = x
        self._kept = sizes(*x.shape), sizes(*x.stride())
        described = _DLTensor(
            *(x.data_ptr(), _CUDA, device, x.dim(), code, 8 * x.element_size(), 1),
            *(self._kept[0], self._kept[1], 0),
        )
        self._managed = _DLManagedTensor(described, None, None)
        _descriptions.append((self._managed, self._kept))
        with mock.patch.object(torch.cuda, "_lazy_init", return_value=None):  # which looks for a driver
            self.tensor = torch._C._from_dlpack(_new_capsule(ctypes.addressof(self._managed), b"dltensor", None))
        assert self.tensor.device == torch.device("cuda", device)
        assert self.tensor.data_ptr() == x.data_ptr()


# ---- launches ----


class _Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


_Callback = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_char_p, _Dim3, _Dim3, ctypes.POINTER(ctypes.c_void_p)),
    *(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int),
)


class Launch(NamedTuple):
    """What went to the device."""

    name: str
    grid: tuple[int, int, int]
    stream: int
    device: int


class CudaHalf:
    """The module, with every launch executed.

    Args:
        device: Where the operands are said to be; another than the current one, which is 0.

    Attributes:
        arch: Whose PTX is executed: 90 or 100.
        capsule: The module's launch, as `native.launch_cuda` returns it.
        launches: All so far.
    """

    def __init__(self, device: int = 1) -> None:
        kernels = [_kernels(source) for source in KERNELS]
        path = str(_module(kernels))
        spec = importlib.util.spec_from_file_location("_C_cuda", path)
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        native._C.use_cuda(module.launch)
        self._module, self.capsule = module, module.launch
        self.double = ctypes.CDLL(path)
        self._callback = _Callback(self._launched)
        self.double.double_set_launch(self._callback)
        self.device, self.arch = device, ARCHS[0]
        self.launches: list[Launch] = []
        self._entries = {
            arch: {name: entry for source in KERNELS for name, entry in _entries(_ptx(source, arch))} for arch in ARCHS
        }
        self._kernels: dict[tuple[int, str], Kernel] = {}
        self._operands: dict[str, Tensor] = {}
        self._memory: Memory | None = None
        self._error: BaseException | None = None

    def names(self) -> set[str]:
        """The kernels that there is PTX for."""
        return set(self._entries[self.arch])

    def _launched(
        self, name: bytes, grid: _Dim3, block: _Dim3, parameters: Any, shared: int, stream: int, device: int
    ) -> int:
        try:
            made = Launch(name.decode(), (grid.x, grid.y, grid.z), stream, device)
            self.launches.append(made)
            kernel = self._kernels.get((self.arch, made.name))
            if kernel is None:
                kernel = self._kernels[self.arch, made.name] = Kernel(self._entries[self.arch][made.name], made.name)
            assert (block.x, block.y, block.z, shared) == (kernel.threads, 1, 1, 0)
            sizes = [size for _, size in kernel.entry.parameters]
            arguments = [ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes)]
            self._memory = operand_memory.of(self._operands)
            kernel.launch(made.grid, self._memory, arguments)
            return 0
        except BaseException as error:  # goes past C++, and is raised behind it
            self._error = error
            return 719  # cudaErrorLaunchFailure

    def fused_step_(self, o: Operands) -> None:
        """`native.fused_step_` on operands that are said to be on `device`."""
        tensors = {name: value for name, value in o._asdict().items() if isinstance(value, Tensor)}
        self._executed(tensors, lambda given: native.fused_step_(o._replace(**given)), launches=o.base.numel() > 0)
        if self._memory is not None:
            operand_memory.check(self._memory, tensors)

    def keyed_noise_(self, out: Tensor, keys: Tensor, evaluation: int) -> None:
        """`native.keyed_noise_`, the same."""
        tensors = {"out": out, "keys": keys}
        self._executed(
            tensors,
            lambda given: native.keyed_noise_(given["out"], given["keys"], evaluation),
            launches=out.numel() > 0,
        )
        if self._memory is not None:
            operand_memory.check(self._memory, tensors, operand_memory.NOTHING_FIRST)

    def step_log_prob_(
        self, out: Tensor, base: Tensor, v: Tensor, next: Tensor, coefficients: Tensor, densities: Tensor, row: int
    ) -> None:
        """`native.step_log_prob_`, the same."""
        tensors = {"out": out, "base": base, "v": v, "next": next, "coefficients": coefficients, "densities": densities}
        self._executed(tensors, lambda given: native.step_log_prob_(**given, row=row), launches=len(out) > 0)
        if self._memory is not None:
            operand_memory.check(self._memory, tensors, operand_memory.NOTHING_FIRST)

    def _executed(self, tensors: dict[str, Tensor], call: Callable[[dict[str, Tensor]], None], launches: bool) -> None:
        """`call` of tensors that are said to be on `device`: one launch, or none, on that device's stream."""
        moved: dict[int, OnCuda] = {}
        for tensor in tensors.values():
            moved.setdefault(id(tensor), OnCuda(tensor, self.device))
        given = {name: moved[id(tensor)].tensor for name, tensor in tensors.items()}
        self._operands, self._memory, self._error = tensors, None, None
        before = len(self.launches)
        try:
            loaded = mock.patch.object(native, "_cuda_half", return_value=self._module)
            with _Copies(given, tensors, self.device), loaded:
                call(given)
        finally:
            if self._error is not None:
                raise self._error
        assert len(self.launches) - before == launches
        if launches:
            (made,) = self.launches[before:]
            on = made.device, made.stream
            wanted = self.device, 0x1000 * (self.device + 1)
            assert on == wanted, f"launched on device and stream {on}, wanted {wanted}"
            assert self.double.double_device() == 0, "the former device is current again"
            assert self._memory is not None


class Rows:
    """`native.TensorRows` on tensors that say that they are on `cuda`, each launch executed; for `sampling.integrate`.

    Args:
        half: What executes the launches.
        table: The solver's rows, on the CPU.
        noise: The first state, on the CPU.
        trajectory: Every state is written to one.
        guidance: The fused step's argument.

    Attributes:
        first: The first state, for `sampling.integrate`.
    """

    def __init__(self, half: CudaHalf, table: Any, noise: Tensor, trajectory: bool, guidance: int) -> None:
        self._half, self._hosts = half, dict[int, Tensor]()
        self._kept: list[OnCuda] = []
        arithmetic = table.coefficients.dtype
        buffers = [torch.full_like(noise, torch.nan, dtype=arithmetic) for _ in range(table.buffers)]
        self._coefficients, self._buffers, self._slots = table.coefficients, buffers, None
        if trajectory:
            self._slots = torch.full((noise.shape[0], table.steps + 1, *noise.shape[1:]), torch.nan, dtype=noise.dtype)
            self._slots[:, 0] = noise
        self._made = native.TensorRows(
            *(tuple(noise.shape), native.DTYPES[noise.dtype], half.device, self.on_cuda(table.coefficients)),
            times(table.times, noise.shape)[1],
            *(None if self._slots is None else self.on_cuda(self._slots), tuple(map(self.on_cuda, buffers))),
            *(0, guidance, table.sum_first, None, False, self._empty_like, half.capsule, None, None),
        )
        self.first = self.on_cuda(noise.clone())

    def on_cuda(self, host: Tensor) -> Tensor:
        self._kept.append(OnCuda(host, self._half.device))
        self._hosts[host.data_ptr()] = host
        return self._kept[-1].tensor

    def host(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor of the host whose memory one on `cuda` has."""
        return None if tensor is None else self._hosts[tensor.data_ptr()]

    def _empty_like(self, base: Tensor) -> Tensor:
        out = torch.full_like(self._hosts[base.data_ptr()], torch.nan)
        self._half._operands["out"] = out
        return self.on_cuda(out)

    def evaluate(self, step_fn: Any, state: Tensor, time: int) -> Any:
        return self._made.evaluate(step_fn, state, time)

    def step(self, state: Tensor, base: Tensor, v: Tensor, u: Tensor | None, row: int, evaluation: Any) -> Any:
        half, write = self._half, evaluation.write
        given = {"base": self.host(base), "v": self.host(v), "u": self.host(u), "coefficients": self._coefficients}
        given |= {f"h{k + 1}": self._buffers[buffer] for k, buffer in enumerate(evaluation.read)}
        given |= {"trajectory": self._slots if evaluation.commit else None}
        given |= {"history": None if write is None else self._buffers[write]}
        half._operands = {name: tensor for name, tensor in given.items() if tensor is not None}
        half._error = None
        out = self._made.step(state, base, v, u, row, evaluation)
        if half._error is not None:
            raise half._error
        operand_memory.check(half._memory, half._operands)
        return out

    def result(self, state: Tensor) -> Tensor:
        """The trajectory, or else the last state."""
        return self._hosts[state.data_ptr()] if self._slots is None else self._slots


class _Copies(TorchFunctionMode):
    """Makes the contiguous copies that C++ asks for, of which a build of torch for the CPU has none on CUDA.

    Args:
        given: What C++ gets, by the operand's name.
        tensors: The same in the host's memory; a copy takes its operand's place.
        device: Where the copies are said to be.
    """

    def __init__(self, given: Mapping[str, Tensor], tensors: dict[str, Tensor], device: int) -> None:
        super().__init__()
        self._given, self._tensors, self._device = given, tensors, device
        self._kept: list[OnCuda] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.contiguous or args[0].is_contiguous():
            return func(*args, **(kwargs or {}))
        names = [name for name, tensor in self._given.items() if tensor is args[0]]
        self._kept.append(OnCuda(self._tensors[names[0]].contiguous(), self._device))
        self._tensors.update(dict.fromkeys(names, self._kept[-1].host))
        return self._kept[-1].tensor


def _entries(module: Path) -> Iterator[tuple[str, str]]:
    """Each entry of a PTX file, by name, with what stands before the first."""
    head, *entries = re.split(r"(?=\.entry )", module.read_text())
    for entry in entries:
        yield re.match(r"\.entry\s+([\w$]+)", entry)[1], head + entry
