"""Every program in examples runs, but those that a test file of their name runs."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def has_its_own_test(path):
    test = ROOT / "tests" / f"test_{path.stem}.py"
    return test.exists() and path.name in test.read_text()


EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if not has_its_own_test(path))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tmp_path, monkeypatch, capsys):
    """It ends, without a warning, and says what it showed."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"^import (diffusers|torchdiffeq|flow_matching)$", path.read_text(), re.MULTILINE):
        pytest.importorskip(name, reason=f"the example uses {name}, of the test extra")
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_there_are_five():
    assert len(EXAMPLES) >= 5
    assert all(len(path.read_text().splitlines()) <= 60 for path in EXAMPLES)
