"""`python -m flowmatch_kernels info | demo`, or `--version`: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, diagnostics
from .demo import command as demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m flowmatch_kernels")
    parser.add_argument("--version", action="version", version=f"flowmatch_kernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run, add_arguments, summary in (
        (
            "info",
            diagnostics.run,
            diagnostics.add_arguments,
            "versions, devices, backends and their self-test, as a block to paste into an issue",
        ),
        ("demo", demo.run, demo.add_arguments, "train on real flights, sample, compare, draw"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        add_arguments(command)
        command.set_defaults(run=run)
    parsed = parser.parse_args(arguments)
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
