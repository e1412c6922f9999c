"""Every Python block of README.md and docs runs, every link inside the repository leads somewhere."""

import ast
import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import flowmatch_kernels

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
NEEDS = "# needs: "
"""The first line of a block that cannot run here: what is missing. It is compiled, and its names are looked up."""

OF_THE_TEST_EXTRA = ("diffusers", "flow_matching", "torchdiffeq")
"""`make test` installs them; another environment may lack them."""


class Block(NamedTuple):
    """A Python block of a page."""

    page: Path
    line: int
    """Where its code begins, from 1."""
    code: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def needs(self):
        first = self.code.lstrip().split("\n", 1)[0]
        return first.removeprefix(NEEDS).strip() if first.startswith(NEEDS) else None


def fences(text):
    """(line of its code, language, code) of each fenced block."""
    found, inside = [], None
    for number, line in enumerate(text.split("\n"), start=1):
        fence = re.match(r"^\s*(```+|:::+)\s*(.*)$", line)
        if inside is None and fence and fence.group(1).startswith("```"):
            inside = (number + 1, fence.group(2).strip(), [])
        elif inside is not None and fence and fence.group(1).startswith("```"):
            found.append((inside[0], inside[1], "\n".join(inside[2])))
            inside = None
        elif inside is not None:
            inside[2].append(line)
    assert inside is None, f"the block at line {inside[0]} is not closed"
    return found


def without_code(text):
    """The page's prose: what looks like a link or a heading in code is none."""
    lines, inside = [], False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            lines.append(re.sub(r"`[^`]*`", "", line))
    return "\n".join(lines)


def anchors(text):
    """The anchors that GitHub and MyST make of a page's headings."""
    headings, inside = [], False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside and (heading := re.match(r"#{1,6} +(.*)", line)):
            headings.append(heading.group(1))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


BLOCKS = [
    Block(page, line, code)
    for page in PAGES
    for line, language, code in fences(page.read_text())
    if language.split(" ")[0] in ("python", "py", "python3", "{code-block} python")
]


def test_there_are_blocks():
    pages = {str(block.page.relative_to(ROOT)) for block in BLOCKS}
    assert {"README.md", "docs/tutorial.md", "docs/solvers.md", "docs/integrations.md"} <= pages
    assert len([block for block in BLOCKS if block.needs is None]) >= 15
    assert not [block for block in BLOCKS if block.needs == ""], "a block that needs something says what"
    readme = [block for block in BLOCKS if block.page.name == "README.md"]
    assert [block for block in readme if block.needs] == [], "the README's blocks run everywhere"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs is None], ids=str)
def test_block_runs(block, tmp_path, monkeypatch):
    """As typed: by itself, in an empty folder, and without a warning."""
    monkeypatch.chdir(tmp_path)
    for name in OF_THE_TEST_EXTRA:
        if re.search(rf"^(from|import) (flowmatch_kernels\.integrations\.)?{name}\b", block.code, re.MULTILINE):
            pytest.importorskip(name, reason=f"the block uses {name}, of the test extra")
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec", dont_inherit=True)
    grad = torch.is_grad_enabled()
    exec(code, {"__name__": "__main__"})
    assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs is not None], ids=str)
def test_block_that_needs_something_compiles(block):
    """It is Python, and what it imports from this package and calls there exists."""
    tree = ast.parse(block.code)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flowmatch_kernels":
            for name in node.names:
                names[name.asname or name.name] = imported(node.module, name.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            assert hasattr(names[node.value.id], node.attr), f"{block}: {node.value.id}.{node.attr}"


def imported(module, name):
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        if "flowmatch_kernels" in (error.name or ""):
            raise
        pytest.skip(f"{module} needs a package that is not installed: {error}")
    return getattr(found, name) if hasattr(found, name) else importlib.import_module(f"{module}.{name}")


def targets(text):
    prose = without_code(text)
    found = re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose)
    return found + re.findall(r"^\[[^\]]+\]:\s+(\S+)", prose, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """Files and headings that a page links to exist; nothing is linked by a path of one machine."""
    broken = []
    for target in targets(page.read_text()):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        outside = os.path.relpath(file, ROOT).startswith("..")
        if (
            path.startswith("/")
            or outside
            or not file.exists()
            or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()))
        ):
            broken.append(target)
    assert broken == []


def test_what_the_readme_promises():
    """The two commands, the order in which a stranger reads, and no line that a terminal wraps."""
    text = (ROOT / "README.md").read_text()
    assert all(f"\nmake {target} " in text for target in ("demo", "test"))
    assert ".venv/bin/python -m flowmatch_kernels info" in text
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[:3] == ["The line to change", "Install", "Check it on your model"]
    assert [line for line in text.split("\n") if len(line) > 122 and not line.startswith("|")] == []


def integration_modules():
    folder = ROOT / "flowmatch_kernels" / "integrations"
    return sorted(file.stem for file in folder.glob("*.py") if file.stem not in ("__init__", "euler", "replacement"))


@pytest.mark.parametrize("module", integration_modules())
def test_every_integration_has_a_line_in_the_readme_and_a_section(module):
    assert f"integrations.{module}" in (ROOT / "README.md").read_text().replace("integrations import ", "integrations.")
    assert f"integrations.{module}" in (ROOT / "docs" / "integrations.md").read_text().replace(
        "integrations import ", "integrations."
    )


def test_every_make_target_that_a_page_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = {
        name for page in PAGES for name in re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE)
    }
    assert len(named) > 5
    assert {name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)} == set()


def test_every_page_is_in_the_site():
    """Sphinx says so too, in `make docs`; here without Sphinx."""
    entries = set(re.findall(r"^[\w/-]+$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} == entries - {"generated/results"}


def test_the_reference_names_what_exists_and_every_public_name():
    page, scope, found = (ROOT / "docs" / "api.md").read_text(), "flowmatch_kernels", set()
    directives = r"^\.\. (currentmodule|automodule|autoclass|autofunction):: ([\w.]+)"
    for directive, name in re.findall(directives, page, re.MULTILINE):
        if directive in ("currentmodule", "automodule"):  # for what follows
            scope = name
            continue
        module, _, attribute = (name if "." in name else f"{scope}.{name}").rpartition(".")
        project = module.rpartition(".")[2]
        if project in OF_THE_TEST_EXTRA and importlib.util.find_spec(project) is None:
            continue
        assert hasattr(importlib.import_module(module), attribute), name
        found.add(attribute)
    assert set(flowmatch_kernels.__all__) <= found
