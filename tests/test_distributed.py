"""distributed.sample(): the bits of one process for every number of ranks, and errors on all of them, in time."""

import json
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


CASES = (
    *(f"the bits of one process, {world} ranks" for world in (1, 2, 3, 4)),
    *(f"a state sharded over the sequence, {world} ranks" for world in (2, 4)),
    *("a rank fails", "ranks differ", "arguments are refused", "a rank is killed", "a rank is silent"),
    "what a rank adds",
)


@pytest.fixture(scope="module")
def ran():
    """What went wrong in each case of distributed_cases.py, and what its ranks printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, ROOT])}
    command = [sys.executable, os.path.join(HERE, "distributed_cases.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]), ended.stderr


@pytest.mark.parametrize("case", CASES)
def test_ranks(ran, case):
    found, printed = ran
    assert set(found) == set(CASES)
    assert found[case] == "", printed


def test_the_how_to_with_torchrun(tmp_path):
    """The program of docs/distributed.md; test_docs.py runs it on one rank."""
    page = pathlib.Path(ROOT, "docs", "distributed.md").read_text()
    (tmp_path / "script.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = sorted(re.findall(r"rank \d of 2: \d of 7 samples", ended.stdout))
    assert said == [f"rank {rank} of 2: {size} of 7 samples" for rank, size in enumerate((4, 3))]


def test_without_a_process_group():
    with pytest.raises(ValueError, match=r"init_process_group"):
        distributed.sample(FlowMatching(2), lambda x, t: x, 1)
    with pytest.raises(ValueError, match=r"init_process_group"):
        distributed.local_slice(1)
