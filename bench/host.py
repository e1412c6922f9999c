"""What a row costs the host on a GPU's way, without a GPU: drivers that do nothing take the launches.

    python -m bench.host [--seconds 5]

The tensors lie on the CPU and are small, so that eager PyTorch's operators cost their dispatch and little else; on a
GPU each of them launches a kernel too, which is left out on both sides. All take turns in one run: what is to be read
are the ratios of the medians, the times are of the machine. They are the thread's own CPU time: nothing here waits, and
other processes on the machine count for less.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import operator
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from flowmatch_kernels import FlowMatching
from flowmatch_kernels.ops import cuda_driver, dispatch, native
from flowmatch_kernels.ops.fused_step import PROMOTE, WEIGHTED, Operands
from flowmatch_kernels.rows import Fresh, Setting
from flowmatch_kernels.sampling import integrate
from flowmatch_kernels.velocities import Velocities, model

from .machine import ROOT
from .measure import Timing
from .measure import timing as timing_of

STEPS = 50
SHAPE = (1, 64)


class IdleDriver:
    """Stands where Triton's CUDA driver would: kernels are compiled, and launches do nothing."""

    def __init__(self) -> None:
        self.has_launch_kernel = True
        self._nothing = ctypes.cast(ctypes.CDLL("libm.so.6").fegetround, ctypes.c_void_p).value or 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 16},
            load_binary=lambda name, binary, shared, device: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
            launch=lambda *arguments: None,
            build_signature_metadata=lambda signature: None,
        )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Triton's own, but for the C function at its end, which needs the driver's library."""
        from triton.backends.nvidia import driver

        in_c = dict.fromkeys(("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"), dict)
        with mock.patch.multiple(driver, create=True, **in_c):
            launcher: Callable[..., None] = driver.CudaLauncher(source, metadata)
        return launcher

    def launch_kernel(self) -> int:
        """For cuLaunchKernel: a C function that does nothing and returns 0, whatever it is given; or none."""
        return self._nothing if self.has_launch_kernel else 0


@contextlib.contextmanager
def idle() -> Iterator[Any]:
    """Within this context Triton launches nothing, and `triton` serves every device; yields the backend's module."""
    from triton.runtime import driver

    from flowmatch_kernels.ops import triton as backend

    caches = backend.fused_step_kernel.device_caches
    kept = dict(caches)
    caches.clear()
    serving = dispatch.BACKENDS["triton"]._replace(devices=(), unavailable=lambda device_type: None)
    try:
        with (
            mock.patch.object(driver, "_active", IdleDriver()) as idle_driver,
            mock.patch.object(cuda_driver, "launch_kernel", idle_driver.launch_kernel),
            mock.patch.dict(dispatch.BACKENDS, triton=serving),
        ):
            yield backend
    finally:
        caches.clear()
        caches.update(kept)


def cuda_half() -> Any:
    """The tests' double of CUDA's runtime under the extension's own CUDA half, whose launches do nothing.

    None where nvcc is not found, or the extension is not built.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from ptx import cuda_runtime  # type: ignore[import-not-found, unused-ignore]
    finally:
        sys.path.pop(0)
    if cuda_runtime.unavailable() is not None:
        return None
    half = cuda_runtime.CudaHalf(device=0)
    half.double.double_set_launch(None)
    half.on_cuda = cuda_runtime.OnCuda
    return half


def cuda_launch(half: Any) -> Callable[[], object]:
    """One launch of the plain step: from `Operands` to cudaLaunchKernel; the tensors say that they are on `cuda`."""
    x, coefficients = torch.zeros(SHAPE), torch.zeros(STEPS, 8)
    kept = [half.on_cuda(tensor, 0) for tensor in (torch.empty_like(x), x, torch.zeros(SHAPE), coefficients)]
    out, base, velocity, rows = (one.tensor for one in kept)
    given = Operands(out, base, velocity, None, None, None, None, rows, 1, guidance=WEIGHTED)

    def run(kept: object = (half, kept)) -> None:
        native.fused_step_(given)

    return run


def cuda_rows(half: Any) -> Callable[[], object]:
    """The rows of a whole sample() by `cuda`: all but its start.

    A new state is one of a few tensors that say that they are on `cuda`; the allocation that is timed for it is one on
    the CPU.
    """
    kept = [half.on_cuda(torch.zeros(SHAPE), 0) for _ in range(6)]
    noise, v, *states = (one.tensor for one in kept)
    host, device = torch.zeros(SHAPE), torch.device("cuda", 0)
    # Of C functions alone, which cost next to nothing beside the allocation: next(..., x), x being its unused default.
    allocated = zip(map(torch.empty_like, itertools.repeat(host)), itertools.cycle(states), strict=True)
    empty_like = functools.partial(next, map(operator.itemgetter(1), allocated))
    coefficients = half.on_cuda(torch.zeros(STEPS, 8), 0)
    solver = FlowMatching(SHAPE[1:])._table(None, STEPS, None, None, host.dtype, host.device, None, 0.0, True, SHAPE[0])
    table = solver._replace(coefficients=coefficients.tensor)
    velocities = Velocities(SHAPE, host.dtype, device)
    serving = dispatch.BACKENDS["cuda"]._replace(load_launch=lambda: half.capsule)
    setting = Setting(table, velocities, serving, True, False, PROMOTE, WEIGHTED, False)

    def tensor_rows(*given: Any) -> Any:
        *before, _, launch, fused_step_, changed = given
        return native.TensorRows(*before, empty_like, launch, fused_step_, changed)

    def step_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return v

    def run(kept: object = (half, kept, coefficients)) -> object:
        rows = Fresh(setting, tensor_rows)
        return integrate(table, rows, rows.start(noise, drawn=True), model(step_fn, velocities, True))

    return run


def launches(backend: Any, half: Any) -> dict[str, Callable[[], object]]:
    """One launch of the plain step by Triton's JIT, without it, and of `cuda`; and eager PyTorch's two operators."""
    x, v, coefficients = torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(STEPS, 8)
    given = Operands(torch.empty_like(x), x, v, None, None, None, None, coefficients, 1, guidance=WEIGHTED)
    dt = torch.tensor(0.1)
    found: dict[str, Callable[[], object]] = {
        "eager, two operators": lambda: x + dt * v,
        "launch, Triton's JIT": _by_jit(backend, lambda: backend.launch(given)),
        "launch, direct": lambda: backend.launch(given),
    }
    return found if half is None else found | {"launch, cuda": cuda_launch(half)}


def rows(backend: Any, half: Any) -> dict[str, Callable[[], object]]:
    """A whole sample() of STEPS rows, with a model that returns what it holds; and the loop written by hand."""
    fm, v, dt = FlowMatching(SHAPE[1:]), torch.zeros(SHAPE), torch.tensor(1 / STEPS)
    times = [t.expand(SHAPE[0], 1) for t in torch.linspace(0, 1, STEPS + 1)]

    def step_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return v

    def by_hand() -> torch.Tensor:
        x = torch.randn(SHAPE)
        for k in range(STEPS):
            x = x + dt * step_fn(x=x, t=times[k])
        return x

    def ours() -> torch.Tensor:
        return fm.sample(SHAPE[0], step_fn, inference_step=STEPS, backend="triton")

    def by_its_launcher() -> torch.Tensor:
        from triton.runtime import driver

        driver.active.has_launch_kernel = False
        try:
            return ours()
        finally:
            driver.active.has_launch_kernel = True

    found = {
        "eager loop": by_hand,
        "sample(), Triton's JIT": _by_jit(backend, ours),
        "sample(), its launcher": by_its_launcher,
        "sample(), direct": ours,
    }
    return found if half is None else found | {"rows, cuda": cuda_rows(half)}


def _by_jit(backend: Any, function: Callable[[], object]) -> Callable[[], object]:
    launcher = backend._launcher

    def run() -> object:
        launcher._direct = False
        try:
            return function()
        finally:
            launcher._direct = True

    return run


def in_turn(functions: dict[str, Callable[[], object]], seconds: float, calls: int) -> dict[str, Timing]:
    """Runs of so many calls, one of each function in every round; the first round only warms up."""
    spans: dict[str, list[float]] = {name: [] for name in functions}
    order, started, rounds = list(functions), time.perf_counter(), 0
    while rounds < 10 or time.perf_counter() - started < seconds:
        for name in order:
            begun = time.thread_time()
            for _ in range(calls):
                functions[name]()
            spans[name].append((time.thread_time() - begun) / calls)
        order.append(order.pop(0))
        rounds += 1
    return {name: timing_of(span[1:], calls) for name, span in spans.items()}


def measured(seconds: float) -> dict[str, dict[str, Timing]]:
    """Timings of one call of each, of a launch and of a sample()."""
    half = cuda_half()
    with idle() as backend:
        return {
            "launch": in_turn(launches(backend, half), seconds / 2, 200),
            "sample": in_turn(rows(backend, half), seconds / 2, 4),
        }


def table(found: dict[str, dict[str, Timing]]) -> list[dict[str, Any]]:
    """A row for each: microseconds of a row of the table, and the ratio to eager PyTorch and to Triton's JIT."""
    lines = []
    for what, timings in found.items():
        steps = STEPS if what == "sample" else 1
        eager, jit, *_ = (timing.median for timing in timings.values())
        for name, timing in timings.items():
            microseconds = {q: round(getattr(timing, q) / steps * 1e6, 3) for q in ("low", "median", "high")}
            over = {"of_eager": round(timing.median / eager, 3), "of_jit": round(timing.median / jit, 3)}
            lines.append({"what": name} | microseconds | over)
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description="the host's cost of a row")
    parser.add_argument("--seconds", type=float, default=5, help="for all measurements together")
    lines = table(measured(parser.parse_args(arguments).seconds))
    print(f"{'us a row':<26}{'median':>9}{'quartiles':>20}{'of eager':>10}{'of the JIT':>12}")
    for line in lines:
        quartiles = f"{line['low']:.2f} to {line['high']:.2f}"
        print(
            f"{line['what']:<26}{line['median']:>9.2f}{quartiles:>20}{line['of_eager']:>10.2f}{line['of_jit']:>12.2f}"
        )


if __name__ == "__main__":
    main()
