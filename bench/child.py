"""Another Python process: this revision's benchmark, with a package of one's choice, with or without its extension."""

from __future__ import annotations

import sys
from pathlib import Path


def command(statement: str, *folders: Path, extension: bool = True) -> list[str]:
    """What starts it.

    Args:
        statement: What it runs.
        folders: Where it looks for the package and the benchmark first, wherever Python would look else.
        extension: False: the C++ extension cannot be imported, as where it was never built.
    """
    without = "" if extension else "sys.modules['flowmatch_kernels._C'] = None; "
    return [sys.executable, "-c", f"import sys; sys.path[:1] = {list(map(str, folders))!r}; {without}{statement}"]
