"""distributed.sample(): the bits of one process for every number of ranks, and errors on all of them, in time."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from flowmatch_kernels import FlowMatching, distributed

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not hasattr(os, "fork"), reason="torch is built without torch.distributed, or no fork"
)
HERE = os.path.dirname(__file__)


def ran(*cases):
    """Runs cases of distributed_cases.py in one process, which imports torch once and forks the ranks."""
    code = "; ".join(["import distributed_cases", *(f"distributed_cases.{case}" for case in cases)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, os.path.dirname(HERE)])}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_bits_of_one_process():
    ran(*(f"same_bits({world})" for world in (1, 2, 3, 4)))


def test_errors():
    ran("failing(3)", "differing(2)", "refused(2)", "killed(4)", "silent(2)")


def test_without_a_process_group():
    with pytest.raises(ValueError, match=r"init_process_group"):
        distributed.sample(FlowMatching(2), lambda x, t: x, 1)
    with pytest.raises(ValueError, match=r"init_process_group"):
        distributed.local_slice(1)
