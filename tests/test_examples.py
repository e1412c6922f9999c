"""Every program in examples runs, but those that have a test file of their own, test_<its name>.py."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(
    path for path in (ROOT / "examples").glob("*.py") if not (ROOT / "tests" / f"test_{path.stem}.py").exists()
)


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
