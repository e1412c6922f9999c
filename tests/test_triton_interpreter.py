"""Runs tests/triton_interpreter_cases.py under Triton's interpreter, in two processes of their own.

TRITON_INTERPRET=1 must be set before the kernel is decorated, and would leave the other tests without a compiler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernel is not tested")

CASES = Path(__file__).with_name("triton_interpreter_cases.py")
#: Two halves of about the same length, so that two cores share them; with the fewest tests each must pass.
HALVES = {"float64": ("float64", 20), "others": ("not float64", 60)}
FULL_HALVES = {"float64": ("float64", 50), "others": ("not float64", 60)}


def start(expression: str, marked: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "--no-header", "-p", "no:cacheprovider"]
    return subprocess.Popen(
        [*command, "-k", expression, "-m", marked],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        cwd=CASES.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], fewest: int) -> None:
    """Fails with the other process's own words unless all its tests, `fewest` or more, ran and passed."""
    output, _ = process.communicate()
    summary = output.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert process.returncode == 0, output
    assert not re.search(r"skipped|xfailed|xpassed", summary), output
    assert passed, output
    assert int(passed[1]) >= fewest, output


@pytest.fixture(scope="module")
def halves() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Both processes, side by side."""
    running = {half: start(expression, "not full") for half, (expression, _) in HALVES.items()}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("half", HALVES)
def test_triton_interpreter(half: str, halves: dict[str, subprocess.Popen[str]]) -> None:
    finish(halves[half], HALVES[half][1])


@pytest.mark.full
def test_triton_interpreter_full() -> None:
    running = [(start(expression, "full"), fewest) for expression, fewest in FULL_HALVES.values()]
    try:
        for process, fewest in running:
            finish(process, fewest)
    finally:
        for process, _ in running:
            process.kill()
            process.wait()
