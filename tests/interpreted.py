"""Runs a file of cases under Triton's interpreter."""

import os
import subprocess
import sys

import pytest


def run(cases):
    """What the file prints, in a process of its own: TRITON_INTERPRET=1 must be set before a kernel is decorated."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernel is not tested")
    path = os.pathsep.join([str(cases.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    ended = subprocess.run([sys.executable, str(cases)], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
