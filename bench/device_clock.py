"""The clock of a GPU: events, cold and warm L2, CUDA graphs, the host's time, kernels launched, peak memory.

Each function takes the CPU too, where the host's clock stands for events, so that all of this runs without a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType

Function = Callable[[], object]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def seconds(function: Function, device: torch.device, budget: float, before: Function | None = None) -> float:
    """The median duration of a call on the device: calls are launched one after another, and none is waited for.

    Args:
        function: What is timed.
        device: By events on a GPU; on the CPU by the host's clock.
        budget: Seconds to spend, roughly.
        before: Launched before each call, and not timed.
    """
    for _ in range(3):
        function()
    wait(device)
    started = time.perf_counter()
    for call in (before, function):
        if call is not None:
            call()
    wait(device)
    calls = min(max(int(budget / max(time.perf_counter() - started, 1e-6)), 5), 1000)
    span = _host_span if device.type == "cpu" else _recorded
    spans: list[Any] = []
    for _ in range(calls):
        if before is not None:
            before()
        spans.append(span(function))
    wait(device)
    return statistics.median(s if isinstance(s, float) else s[0].elapsed_time(s[1]) / 1e3 for s in spans)


def _host_span(function: Function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _recorded(function: Function) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    stop.record()
    return start, stop


def flush(device: torch.device) -> Function:
    """Writes twice as much as the L2 cache holds: what comes next finds nothing of its own there."""
    size = 1 << 20
    if device.type != "cpu":
        size = 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 128 << 20)
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def host_seconds(function: Function, device: torch.device, budget: float) -> float:
    """The median time until a call is back, the device idle before: what the host does, if nothing waits."""
    function()
    spans: list[float] = []
    started = time.perf_counter()
    while len(spans) < 5 or (len(spans) < 1000 and time.perf_counter() - started < budget):
        wait(device)
        spans.append(_host_span(function))
    wait(device)
    return statistics.median(spans)


def graphed(function: Callable[[], Tensor], device: torch.device) -> Callable[[], tuple[None, Tensor]]:
    """A replay of `function`, captured in a CUDA graph; returns None and what the function returned, written anew."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()
    return lambda: (graph.replay(), kept)


def copy_bandwidth(device: torch.device, size: int, budget: float) -> float:
    """Bytes per second that a plain copy of `size` bytes reads and writes: what this device can do."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, budget)


class Launches(NamedTuple):
    """What a call gave the device, as the profiler saw it."""

    kernels: int
    copies_from_host: int
    other_copies: int
    """Within the device or to the host, and memory set."""


def launches(names: Iterable[str]) -> Launches:
    """Sorts the profiler's names of what ran on a device."""
    names = list(names)
    moved = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    from_host = [name for name in moved if name.startswith("Memcpy HtoD")]
    return Launches(len(names) - len(moved), len(from_host), len(moved) - len(from_host))


def profiled(function: Function, device: torch.device) -> Launches | None:
    """What one warm call gives the device; None: there is no device."""
    if device.type == "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # a profiler's first run is not like the others
        with torch.profiler.profile(activities=activities) as profile:
            function()
            wait(device)
    return launches(event.name for event in profile.events() if event.device_type == DeviceType.CUDA)


def peak_bytes(function: Function, device: torch.device) -> int | None:
    """The memory that a call adds at its highest, its result included, as torch's allocator counts; None: no device."""
    if device.type == "cpu":
        return None
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = function()
    peak = torch.cuda.max_memory_allocated(device)
    del kept
    return peak - before
