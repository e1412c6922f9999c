"""Runs tests/host_cuda/launcher_cases.py: the host's side of a CUDA launch, with a double in the place of CUDA."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("host_cuda")))
import host_cuda

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded, as Linux can")


def test_cuda_launcher() -> None:
    host_cuda.finish(host_cuda.start("launcher_cases.py", "not full"), 42)
