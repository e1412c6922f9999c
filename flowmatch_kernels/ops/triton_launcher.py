"""Launches a Triton kernel; from a variant's second launch on without `JITFunction.run`, by what that would launch.

`JITFunction.run` binds and specialises every argument, writes the result as text and looks that up: more than half of
what a launch costs the host. The caller knows its variant, so the kernel that was compiled for it is kept here.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction
from triton.runtime.driver import driver

logger = logging.getLogger("flowmatch_kernels")

#: Triton releases whose `JITFunction.run` was read: how it finds its kernel, and what it passes to its launcher.
#: tests/test_triton_launcher.py holds the installed one to that.
KNOWN = ("3.6", "3.7", "3.8", "3.9")


class Known(NamedTuple):
    """What a variant's first launch compiled, and what launches it again, as `run(x, y, z, stream(), ...)`."""

    stream: Callable[[], int | None]
    """The current stream; None where only Triton itself may launch now."""
    run: Callable[..., None]
    function: Any
    packed_metadata: Any
    threads: int
    """Of a block, where a launch is cuLaunchKernel with the arguments and two null pointers, and no more; else 0."""
    kernel: CompiledKernel
    """Owns the function."""


class Launcher:
    """Launches of one kernel.

    Args:
        kernel: The JIT function.
        options: How it is compiled, the same for every variant.
    """

    def __init__(self, kernel: Any, options: dict[str, object]) -> None:
        self._kernel, self._options = kernel, options
        self._known: dict[tuple[int, Hashable], Known] = {}
        self._lock = threading.RLock()
        #: Triton's interpreter compiles nothing.
        self._direct = isinstance(kernel, JITFunction)

    def __call__(self, variant: Hashable, blocks: int, arguments: Sequence[Any]) -> None:
        """Launches on the current stream of the current device.

        Args:
            variant: Equal for two launches only where Triton would launch the same kernel for both.
            blocks: The grid.
            arguments: The kernel's, in order, all of them.
        """
        known = self.known(variant)
        stream = None if known is None else known.stream()
        if known is not None and stream is not None:
            # No launch metadata and no hooks: with a hook set the launch is Triton's own.
            known.run(blocks, 1, 1, stream, known.function, known.packed_metadata, None, None, None, *arguments)
        elif not self._direct or _watched(self._kernel):
            self._kernel[(blocks,)](*arguments, **self._options)
        else:
            # One thread at a time: Triton lets a second one have a kernel that the first is about to load.
            with self._lock:
                self._first(driver.active.get_current_device(), variant, blocks, arguments)

    def known(self, variant: Hashable, device: int | None = None) -> Known | None:
        """What launches a variant on the current device, which must be `device` if that is given; else None."""
        if not self._direct:
            return None
        current = driver.active.get_current_device()
        return self._known.get((current, variant)) if device in (None, current) else None

    def _first(self, device: int, variant: Hashable, blocks: int, arguments: Sequence[Any]) -> None:
        compiled = self._kernel[(blocks,)](*arguments, **self._options)
        if not isinstance(compiled, CompiledKernel):  # compiled in the background, or a hook has refused it
            return
        caches = self._kernel.device_caches[device]
        reason = _unknown(self._kernel, caches[2].backend, compiled, arguments)
        if reason is not None:
            self._direct = False
            logger.info("the Triton kernel is launched by Triton's JIT, which costs the host more: %s", reason)
            return
        kernel = self._kernel

        def stream() -> int | None:
            active = driver.active
            # Once Triton's caches are dropped, the kernel is compiled anew.
            if _watched(kernel) or caches is not kernel.device_caches.get(device):
                return None
            return int(active.get_current_stream(device)) if active.get_current_device() == device else None

        self._known[device, variant] = Known(
            stream, compiled.run, compiled.function, compiled.packed_metadata, _threads(compiled.metadata), compiled
        )


def _watched(kernel: Any) -> bool:
    """Whether something is set that sees launches (a profiler), or that Triton compiles a kernel of its own for."""
    runtime = knobs.runtime
    enter, exit_ = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)  # a chain of hooks, or what was put in its place
        or getattr(exit_, "calls", exit_)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    )


def _threads(metadata: Any) -> int:
    """See `Known.threads`: what the launchers of the releases in KNOWN do beside cuLaunchKernel, this kernel lacks."""
    more = (
        *("shared", "global_scratch_size", "profile_scratch_size"),
        *("launch_cooperative_grid", "launch_pdl", "tensordesc_meta"),
    )
    if metadata.num_ctas != 1 or any(getattr(metadata, name, None) for name in more):
        return 0
    return 32 * metadata.num_warps


def unknown_release() -> str | None:
    """Why no kernel of this Triton is launched other than by Triton itself, or None."""
    return _unknown_release(triton.__version__)


@functools.cache
def _unknown_release(version: str) -> str | None:
    known = ".".join(version.split(".")[:2]) in KNOWN
    return None if known else f"Triton {version} is not one of those known, {', '.join(KNOWN)}"


def _unknown(kernel: Any, backend: str, compiled: CompiledKernel, arguments: Sequence[Any]) -> str | None:
    """Why the compiled kernel cannot be launched with these arguments other than by Triton itself, or None."""
    if backend != "cuda":
        return f"the launcher of Triton's {backend!r} backend is not known"
    if reason := unknown_release():
        return reason
    text = compiled.asm.get("ptx") or ""
    entry = re.search(rf"\.entry\s+{re.escape(compiled.name)}\s*\(([^)]*)\)", text)
    found = re.findall(r"\.param\s+(\.\w+(?:\s+\.ptr)?)", entry[1]) if entry else []
    given = [x for x, p in zip(arguments, kernel.params, strict=True) if not p.is_constexpr and x is not None]
    # Pointers and 64-bit integers, as they are given; last two pointers to memory for the kernel's own use.
    wanted = [".u64" if isinstance(x, int) else ".u64 .ptr" for x in given] + [".u64 .ptr"] * 2
    if [" ".join(one.split()) for one in found] != wanted:
        return f"Triton {triton.__version__} compiled a kernel with other parameters: {found} instead of {wanted}"
    return None
