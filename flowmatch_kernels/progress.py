"""The progress bar, of tqdm."""

from __future__ import annotations

from typing import Any


def bar() -> Any:
    """The class of the bar.

    Raises:
        ImportError: tqdm is not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return tqdm
