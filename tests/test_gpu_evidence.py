"""docs/gpu-evidence.md names tests, files and targets that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "gpu-evidence.md").read_text()
QUOTED = set(re.findall(r"`([^`\n]+)`", PAGE))


def test_tests_exist():
    sources = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    named = {quoted for quoted in QUOTED if re.fullmatch(r"test_\w+", quoted)}
    assert len(named) > 40
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_files_exist():
    named = {quoted for quoted in QUOTED if re.fullmatch(r"(tests|csrc|ops)/[\w/.]+", quoted)}
    assert len(named) > 10
    assert {n for n in named if not any((ROOT / folder / n).exists() for folder in ("", "flowmatch_kernels"))} == set()


def test_targets_exist():
    targets = {quoted.removeprefix("make ") for quoted in QUOTED if quoted.startswith("make ")} | {"gpu"}
    makefile = (ROOT / "Makefile").read_text()
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_every_gpu_test_is_named():
    """A GPU test that the page does not know of is a claim that nobody reads."""
    source = (ROOT / "tests" / "test_gpu.py").read_text()
    tests = set(re.findall(r"^def (test_\w+)\(", source, re.MULTILINE))
    unnamed = {"test_auto", "test_backend_is_there", "test_registered_ops", "test_another_device_is_refused"}
    unnamed |= {"test_sample_in_float64_and_bfloat16"}
    assert tests - QUOTED == unnamed
