"""Runs tests/host_cuda's cases: the CUDA kernels' own source on the host, under the sanitizers.

AddressSanitizer must be in a process from its start, and a mistake that it finds ends the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("host_cuda")))
import host_cuda

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded, as Linux can")

#: Two parts of about the same length, so that two cores share them; with the fewest tests each must pass.
PARTS = {"float64": ("float64", 60), "others": ("not float64", 120)}


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Both processes, side by side."""
    running = {name: host_cuda.start("kernel_cases.py", "not full", part) for name, (part, _) in PARTS.items()}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("part", PARTS)
def test_cuda_kernel_on_the_host(part: str, parts: dict[str, subprocess.Popen[str]]) -> None:
    host_cuda.finish(parts[part], PARTS[part][1])


def test_noise_and_log_prob_on_the_host() -> None:
    host_cuda.finish(host_cuda.start("noise_and_log_prob_cases.py", "not full", source=host_cuda.OTHERS), 20)


@pytest.mark.full
def test_cuda_kernel_on_the_host_full() -> None:
    running = [host_cuda.start("kernel_cases.py", "full", part) for part, _ in PARTS.values()]
    try:
        for process in running:
            host_cuda.finish(process, 30)
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("numel", "shift", "told"),
    [(1024, 0, "heap-buffer-overflow"), (1020, 1, "misaligned address")],
    ids=["outside", "off its boundary"],
)
def test_the_sanitizers_see(numel: int, shift: int, told: str) -> None:
    """A launch beyond the end of torch's memory, or with a vector off its boundary, ends the process."""
    code = """
import sys
import torch, host_cuda
numel, shift = map(int, sys.argv[1:])
host = host_cuda.load()
x, v, row = torch.zeros(1023), torch.zeros(1024), torch.zeros(1, 8)
out = torch.zeros(1026)
if shift:
    host.load_word(v.data_ptr() + 4)
host.fused_step_cuda(out.data_ptr(), x.data_ptr(), v.data_ptr(), 0, 0, 0, 0, row.data_ptr(), 0, 0, 0, 0, 0, 0, False,
                     0, 1, 0, 0, 0, numel, numel, 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(numel), str(shift)],
        env=host_cuda.environment() | {"PYTHONPATH": os.pathsep.join([str(host_cuda.HERE), str(host_cuda.ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (98, 99), done.stderr
    assert told in done.stderr
