"""distributed.sample(): the bits of one process for every number of ranks, and errors on all of them, in time."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch.distributed as dist

from flowmatch_kernels import FlowMatching, distributed

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not hasattr(os, "fork"), reason="torch is built without torch.distributed, or no fork"
)
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)


def ran(*cases):
    """Runs cases of distributed_cases.py in one process, which imports torch once and forks the ranks."""
    code = "; ".join(["import distributed_cases", *(f"distributed_cases.{case}" for case in cases)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, ROOT])}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_bits_of_one_process():
    ran(*(f"same_bits({world})" for world in (1, 2, 3, 4)))


def test_a_state_that_is_sharded_over_the_sequence():
    ran("over_the_sequence(2)", "over_the_sequence(4)")


def test_errors():
    ran("failing(3)", "differing(2)", "refused(2)", "killed(4)", "silent(2)")


def test_the_how_to_with_torchrun(tmp_path):
    """The program of docs/distributed.md; test_docs.py runs it on one rank."""
    page = pathlib.Path(ROOT, "docs", "distributed.md").read_text()
    (tmp_path / "script.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "script.py"]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = sorted(re.findall(r"rank \d of 3: \d of 7 samples", ended.stdout))
    assert said == [f"rank {rank} of 3: {size} of 7 samples" for rank, size in enumerate((3, 2, 2))]


def test_what_a_rank_adds():
    """bench.distributed compares before it times; one row for each shape."""
    command = [sys.executable, "-m", "bench.distributed", "--rounds", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(ended.stdout.splitlines()) == 2 + 4


def test_without_a_process_group():
    with pytest.raises(ValueError, match=r"init_process_group"):
        distributed.sample(FlowMatching(2), lambda x, t: x, 1)
    with pytest.raises(ValueError, match=r"init_process_group"):
        distributed.local_slice(1)
