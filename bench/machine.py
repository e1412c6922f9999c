"""The head of every report: the machine, the versions, the revision, the date."""

from __future__ import annotations

import datetime
import importlib.metadata
import subprocess
from pathlib import Path

from flowmatch_kernels import diagnostics

ROOT = Path(__file__).parent.parent
PEERS = ("torchdiffeq", "flow_matching", "diffusers")


def version(package: str) -> str:
    """A package's version, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def revision() -> str:
    """The commit, and whether the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def head() -> dict[str, str]:
    """What a reader has to know of where the figures come from."""
    return {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(),
        **diagnostics._environment(),
        **{peer: version(peer) for peer in PEERS},
    }
