"""What `distributed.sample` adds to a rank's own sampling, on two gloo ranks of this machine.

    python -m bench.distributed [--ranks 2] [--rounds 200]

Each rank runs, in turns, `fm.sample` of its own slice, and `distributed.sample` of the batch as shards and gathered.
The ranks meet before each turn. Figures of rank 0, with a velocity that costs nothing, since what is added does not
depend on it: medians of the process's CPU time, gloo's threads included, and the smallest wall time, which other
programs lengthen most. An all-reduce of 24 bytes stands beside them: each call makes two. The results are compared
with one process first, to the bit; exits with 1 where they differ.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from flowmatch_kernels import FlowMatching, KeyedNoise, distributed

from .report import table as markdown

STEPS = 10
#: The batch of all ranks, and x_dims.
SHAPES = ((12, 64, 2), (2, 50, 32), (512, 50, 32), (16, 4, 128, 128))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description="the cost of a rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        given = (chosen.ranks, chosen.rounds, str(Path(folder, "store")))
        ranks = [context.Process(target=_rank, args=(rank, *given)) for rank in range(chosen.ranks)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    return int(any(rank.exitcode for rank in ranks))


def _rank(rank: int, world: int, rounds: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    rows = [_row(shape, rounds) for shape in SHAPES]
    if rank == 0:
        cells = ("own slice", "all-reduce", "added as shards", "added gathered")
        print(markdown(["batch", *(f"{kind} us: {cell}" for kind in ("CPU", "wall") for cell in cells)], rows))
    dist.destroy_process_group()


def _row(shape: tuple[int, ...], rounds: int) -> list[str]:
    batch_size, *x_dims = shape
    fm, mine = FlowMatching(x_dims, num_inference_steps=STEPS), distributed.local_slice(batch_size)
    key, its = KeyedNoise(0), KeyedNoise(0, first=mine.start)

    def run(gather: bool) -> torch.Tensor:
        return distributed.sample(fm, _step_fn, batch_size, noise=key, gather=gather)

    whole = fm.sample(batch_size, _step_fn, noise=key)
    assert torch.equal(run(True), whole) and torch.equal(run(False), whole[mine])
    words = torch.zeros(3, dtype=torch.int64)
    contestants = (
        lambda: fm.sample(mine.stop - mine.start, _step_fn, noise=its),
        *(lambda: dist.all_reduce(words), lambda: run(False), lambda: run(True)),
    )
    times = [[_timed(contestant) for contestant in contestants] for _ in range(rounds)]
    cells = []
    for shown in (lambda turns: statistics.median(cpu for cpu, _ in turns), lambda turns: min(w for _, w in turns)):
        own, reduced, *more = map(shown, zip(*times, strict=True))
        cells += [f"{1e6 * one:.0f}" for one in (own, reduced, *(it - own for it in more))]
    return [str(list(shape)), *cells]


def _step_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x


def _timed(function: Callable[[], object]) -> tuple[float, float]:
    """CPU time and wall time, in seconds."""
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    sys.exit(main())
