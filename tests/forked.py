"""Python code run as `python -c` runs it, in forks of a process that has imported torch: it takes 2 s to import.

The process imports torch, its extension builder and setuptools, nothing of this package, and starts no thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Forks:
    """The process. Its environment is the one of torch's import.

    Args:
        environment: Its environment variables.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, cwd: str | Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """What becomes of the code, in a fork with this folder, these environment variables and PYTHONPATH's folders.

        Handlers of `atexit` are not called.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"code": code, "cwd": str(cwd), "environment": dict(environment)}) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks has ended, with {process.wait()}")
        return subprocess.CompletedProcess(["-c", code], **json.loads(answer))

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def _in_child(request: Mapping[str, Any]) -> int:
    """Runs the code, and returns the exit status."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["-c"]
    sys.path[0:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]  # for this file's folder
    try:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)  # noqa: T201
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _fork(request: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error, open(os.devnull, "rb") as nothing:
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                for number, file in enumerate((nothing, out, error)):
                    os.dup2(file.fileno(), number)
                status = _in_child(request)
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        error.seek(0)
        return {"returncode": status, "stdout": out.read().decode(), "stderr": error.read().decode()}


def _serve() -> None:
    """Answers each line of standard input."""
    import setuptools  # noqa: F401  # before torch's builder, which changes it
    import torch.utils.cpp_extension  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)  # noqa: T201


if __name__ == "__main__":
    _serve()
