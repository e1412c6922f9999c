"""A Triton driver without a device: it compiles for real, and records each launch instead of making it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from flowmatch_kernels.ops import cuda_driver


class Launch(NamedTuple):
    """What would have gone to the device."""

    device: int
    stream: int
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    """By the kernel's own names, compile-time constants too."""
    options: dict[str, Any]
    function: int
    """The handle of what was loaded: another one for each compilation and device."""


class RecordingDriver:
    """Stands where Triton's CUDA driver would; only what a launch asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.device = 0
        self.stream = 7  # of device 0; another one's is 100 more for each
        self.launches: list[Launch] = []
        self.loaded = itertools.count(1)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 16},
            load_binary=lambda name, binary, shared, device: (1, next(self.loaded), 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 100 * device

    def launch_kernel(self) -> int:
        """In the place of `cuda_driver.launch_kernel`: none, so that Triton's launcher launches."""
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names
        options = {"enable_fp_fusion": metadata.enable_fp_fusion, "num_warps": metadata.num_warps}

        def launcher(*given: Any) -> None:
            """Takes what Triton's own launchers take."""
            *grid, stream, function, packed, launch_metadata, enter, leave = given[:9]
            assert packed == (metadata.num_warps, metadata.num_ctas, metadata.shared)
            if enter is not None:
                enter(launch_metadata)
            named = dict(zip(names, given[9:], strict=True))
            self.launches.append(Launch(self.device, stream, tuple(grid), named, options, function))
            if leave is not None:
                leave(launch_metadata)

        return launcher


@contextmanager
def installed(kernel: Any, driver: RecordingDriver) -> Iterator[None]:
    """Within this context Triton launches go to the driver; `kernel`'s compilations start from none."""
    config = triton.runtime.driver
    before, caches = config._active, dict(kernel.device_caches)
    kernel.device_caches.clear()
    config._active = driver
    try:
        with mock.patch.object(cuda_driver, "launch_kernel", driver.launch_kernel):
            yield
    finally:
        kernel.device_caches.clear()
        kernel.device_caches.update(caches)
        config._active = before


@contextmanager
def recording(kernel: Any, arch: int = 90) -> Iterator[RecordingDriver]:
    """Within this context Triton launches go to the driver returned, as with `installed`."""
    driver = RecordingDriver(arch)
    with installed(kernel, driver):
        yield driver
