"""The documentation site: `make docs`."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import flowmatch_kernels

project = "flowmatch_kernels"
author = "The flowmatch_kernels contributors"
copyright = author
release = version = flowmatch_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"flowmatch_kernels {release}"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.header"]  # CHANGELOG.md and CONTRIBUTING.md are included below a heading of their own

# Docstrings are Google style with Markdown's backticks: `x` is code.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source", "Sources", ("Warns", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature would repeat what "Args" says, over ten lines
autodoc_preserve_defaults = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def markdown_to_rst(app, what, name, obj, options, lines):
    """What docstrings have of Markdown, before napoleon reads them: a star is a star, an indented paragraph code."""
    result, code, before, blank = [], None, 0, False  # code: the indent of the line before the code
    for line in lines:
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if text and code is not None and indent <= code:
            code = None
        if text and code is None and blank and indent > before and not text.startswith(">>>"):
            result += [" " * before + "::", ""]
            code = before
        if code is None and not text.startswith((">>>", "...", "*args", "**")):
            pieces = re.split(r"(`[^`]*`)", line)
            line = re.sub(r": ([A-Z])\.$", r": \\\1.", line)  # "B." would begin a list
            line = "".join(piece if k % 2 else piece.replace("*", "\\*") for k, piece in enumerate(pieces))
        if text.endswith("::"):
            code = indent
        if text:
            before = indent
        blank = not text
        result.append(line)
    # Of an attribute, napoleon takes what stands before a colon in the first line for its type: so that line is empty.
    lines[:] = ["\\", *result] if what in ("attribute", "data", "property") else result


def benchmark_results(app):
    """Writes generated/results.md from bench/results/bench.json, which `make bench` makes, or says how to make it."""
    from bench import plot, report

    folder, found = Path(__file__).parent / "generated", ROOT / "bench" / "results" / "bench.json"
    folder.mkdir(exist_ok=True)
    page = folder / "results.md"
    if not found.exists():
        page.write_text(
            "# Results on this machine\n\nThere are none yet: `make bench` measures and writes "
            "`bench/results/bench.json`. The next `make docs` shows it here, with its plots. The figures of one "
            "recorded run are on the page [Benchmark](../benchmark.md).\n"
        )
        return
    run = json.loads(found.read_text())
    pictures = []
    for name, draw in (("bench", plot.by_task), ("steps", plot.by_steps)):
        if len(run["results"]) > 50:  # a whole run: part of one leaves panels empty
            draw(run["results"]).savefig(folder / f"{name}.png", dpi=120)
            pictures.append(f"![{name}]({name}.png)")
    text = report.markdown(run).replace("# Benchmark", "# Results on this machine", 1)
    page.write_text(text.replace("\n## Targets", "\n" + "\n\n".join(pictures) + "\n\n## Targets", 1))


def setup(app):
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)
    app.connect("builder-inited", benchmark_results)
