"""`python -m flowmatch_kernels info | demo`, or `--version`: the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import __version__, diagnostics
from .demo import command as demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, 1 where what reads the output has closed it, as `| head -1` does."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where the error is caught; --version and --help leave by SystemExit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit fails again
        return 1


def _run(arguments: Sequence[str] | None) -> int:
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
