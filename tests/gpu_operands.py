"""Operands for tests/test_gpu.py, on any device: drawn on the CPU and moved, in guarded buffers, and compared there.

So the CPU, where every run executes it, and a GPU see one and the same code.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from operands import assert_same_bits, bits, coefficients, laid_out, values
from torch import Tensor
from torch.autograd import DeviceType

from flowmatch_kernels.ops.dispatch import BACKENDS
from flowmatch_kernels.ops.fused_step import WEIGHTED, Operands, arithmetic_dtype

GUARD = 64  # elements: a multiple of 16 bytes for every dtype


class Place(NamedTuple):
    """Where a test runs, and with which backend."""

    device: torch.device
    backend: str

    @property
    def fused_step_(self) -> Callable[..., None]:
        return BACKENDS[self.backend].load()

    @property
    def module(self) -> Any:
        """torch.cuda, or torch.cpu, whose streams do nothing."""
        return torch.get_device_module(self.device)

    @property
    def gpu(self) -> bool:
        return self.device.type != "cpu"


def on_second_device(place: Place) -> Place:
    """The same on the second GPU; on the CPU the same place."""
    if not place.gpu:
        return place
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: this machine has one")
    return place._replace(device=torch.device("cuda", 1))


class Guarded:
    """A contiguous tensor full of NaN on `device`, with a known pattern on both sides.

    Args:
        aligned: It begins on a multiple of 16 bytes; else one element after one.
        fill: What it holds, instead of NaN.
    """

    def __init__(
        self,
        shape: list[int],
        dtype: torch.dtype,
        device: torch.device,
        aligned: bool = True,
        fill: Tensor | None = None,
    ) -> None:
        self.start, self.stop = GUARD + (not aligned), GUARD + (not aligned) + math.prod(shape)
        self.memory = torch.full([self.stop + GUARD], -77.0, dtype=dtype, device=device)
        self.tensor = self.memory[self.start : self.stop].view(shape)
        assert self.tensor.numel() == 0 or (self.tensor.data_ptr() % 16 == 0) == aligned
        self.tensor.fill_(torch.nan)
        if fill is not None:
            self.tensor.copy_(fill)

    def intact(self) -> bool:
        return bool((self.memory[: self.start] == -77.0).all() and (self.memory[self.stop :] == -77.0).all())


def run(
    step: Callable[..., None],
    device: torch.device,
    shape: tuple[int, ...],
    state: torch.dtype,
    velocity: torch.dtype,
    rounding: bool,
    combination: tuple[int | None, int, int | None, str | int | None, bool],
    *,
    seed: int = 0,
    aligned: bool = True,
    in_place: bool = False,
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
) -> dict[str, Tensor]:
    """All that a backend writes for one of `operands.combinations()`, brought to the CPU."""
    guidance, terms, slots, history, c = combination
    generator = torch.Generator().manual_seed(seed)
    arithmetic = arithmetic_dtype(state)

    def drawn(dtype: torch.dtype) -> Guarded:
        return Guarded(list(shape), dtype, device, aligned, values(shape, dtype, generator))

    def velocity_drawn(layout: str) -> Tensor:
        v = values(shape, velocity, generator)
        if layout == "contiguous":
            return Guarded(list(shape), velocity, device, aligned, v).tensor
        moved = laid_out(v.to(device), layout)
        assert moved is not None
        return moved

    base, v = drawn(state), velocity_drawn(layouts[0])
    u = None if guidance is None else velocity_drawn(layouts[1])
    h = [drawn(arithmetic) for _ in range(terms)]
    table = coefficients(arithmetic, generator, c=c).to(device)
    read = [base.tensor, v, *[x for x in (u, table) if x is not None], *[x.tensor for x in h]]
    before = [bits(x.cpu()) for x in read]

    out = base if in_place else Guarded(list(shape), state, device, aligned)
    slot = 0 if slots is None else seed % slots
    trajectory = None if slots is None else Guarded([shape[0], slots, *shape[1:]], state, device, aligned)
    kept = None
    if history is not None:
        kept = h[history] if isinstance(history, int) else Guarded(list(shape), arithmetic, device, aligned)
    operands = Operands(
        *(out.tensor, base.tensor, v, u, *[x.tensor for x in h], *[None] * (3 - terms)),
        *(table, seed % 3, rounding, guidance or WEIGHTED, False, None),
        *(None if trajectory is None else trajectory.tensor, slot),
        None if kept is None else kept.tensor,
    )
    step(operands)
    for buffer in (base, out, *h, *[x for x in (trajectory, kept) if x is not None]):
        assert buffer.intact(), "written outside a buffer"
    written = {id(base.tensor)} if in_place else set()
    if kept is not None:
        written.add(id(kept.tensor))
    for x, was in zip(read, before, strict=True):
        assert id(x) in written or torch.equal(bits(x.cpu()), was), "an operand that is only read has changed"
    results = {"out": out.tensor.cpu()}
    if trajectory is not None:
        results["trajectory"] = trajectory.tensor.cpu()
        for other in range(slots or 0):
            if other != slot:
                assert results["trajectory"][:, other].isnan().all(), f"slot {other} is not ours"
    if kept is not None:
        results["history"] = kept.tensor.cpu()
    return results


def assert_all_same(got: dict[str, Tensor], wanted: dict[str, Tensor], what: object) -> None:
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_same_bits(got[key], value, f"{key} of {what}")


# ---- what only a GPU has, with a stand-in that lets the CPU run the same test ----


def kernels(function: Callable[[], object], device: torch.device) -> list[str]:
    """The names of the kernels and copies that `function` runs on a GPU, in order; none on the CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.get_device_module(device).synchronize()
    on_device = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    return [event.name for event in sorted(on_device, key=lambda event: event.time_range.start)]


def captured(
    function: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """What `function` returns, and a replay that writes it again: a CUDA graph; on the CPU, another call."""
    if device.type == "cpu":
        results = function()

        def again() -> None:
            for result, fresh in zip(results, function(), strict=True):
                result.copy_(fresh)

        return results, again
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # compile and load every kernel: neither is allowed in a capture
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return results, graph.replay


def busy(device: torch.device, milliseconds: int) -> None:
    """Keeps the current stream of a GPU busy for about so long (at 2 GHz)."""
    if device.type != "cpu":
        torch.cuda._sleep(2_000_000 * milliseconds)


@contextlib.contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Raises where PyTorch makes the host wait for a GPU."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated."""
    if device.type == "cpu":
        return 1 << 40  # what is asked for on the CPU is small
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
