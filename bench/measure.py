"""The clock and the memory meter."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from flowmatch_kernels import empty_cache

Key = TypeVar("Key", bound=Hashable)

#: A run is as many calls as take this long, or one: shorter, and the clock and the caches of another contestant count.
RUN_SECONDS = 1e-3
MOST_RUNS = 100


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float
    """First quartile of the runs."""
    high: float
    """Third quartile."""
    runs: int
    calls: int
    """Calls of a run, one after another."""

    def json(self) -> dict[str, Any]:
        """As the results hold it, in microseconds."""
        spans = {f"{name}_us": round(getattr(self, name) * 1e6, 3) for name in ("median", "low", "high")}
        return spans | {"runs": self.runs, "calls": self.calls}


def timing(seconds: list[float], calls: int) -> Timing:
    """The median and quartiles of runs, each given in seconds of one call."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds), calls)


def in_turn(functions: Mapping[Key, Callable[[], object]], seconds: float, least_runs: int = 9) -> dict[Key, Timing]:
    """Times each function: a run of each in every round, so that a slow spell of the machine hits all.

    Each round has an order of its own, so that no function always finds in the caches what the same other one left
    there. Rounds go on until `seconds` are over.
    """
    calls = {key: calls_of_a_run(function) for key, function in functions.items()}
    spans: dict[Key, list[float]] = {key: [] for key in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    started, rounds = time.perf_counter(), 0
    while rounds < least_runs or (rounds < MOST_RUNS and time.perf_counter() - started < seconds):
        shuffle(order)
        for key in order:
            spans[key].append(run(functions[key], calls[key]))
        rounds += 1
    return {key: timing(spans[key], calls[key]) for key in functions}


def calls_of_a_run(function: Callable[[], object]) -> int:
    """How many calls make a run; the function is warm after this."""
    function()
    first = run(function, 1)
    return 1 if first >= RUN_SECONDS else max(1, round(RUN_SECONDS / run(function, 5)))


def run(function: Callable[[], object], calls: int) -> float:
    """Seconds of one of these calls. A result is dropped before the next call."""
    with _no_collection():
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - started) / calls


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def peak_bytes(function: Callable[[], object]) -> int | None:
    """The memory that a call adds to the process at its highest, its result included; None: Linux alone can tell.

    What the kernel counts as resident, so that fresh pages show and reused ones do not. The function should be warm.
    """
    try:
        # What malloc and this package keep would hide as much of the call's.
        ctypes.CDLL(None).malloc_trim(0)
        empty_cache()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts from now
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    kept = function()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))
