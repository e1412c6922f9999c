"""What tests compile, kept in build/test-cache: made once, for all processes of a run and for the next run.

A file's name holds a digest of all that it is made of: sources, flags, the compiler's version. What is made of
anything else has another name, so that nothing there can be out of date; `make clean` removes it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock  # which torch itself needs

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "test-cache"


def digest(parts: Iterable[str | bytes | Path]) -> str:
    """Of texts, bytes, and files: a file counts by its name and what is in it, in the order given."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            fields = [part.name.encode(), part.read_bytes()]
        else:
            fields = [part.encode() if isinstance(part, str) else part]
        for field in [type(part).__name__.encode(), *fields]:
            total.update(len(field).to_bytes(8, "little") + field)  # "ab", "c" is not "a", "bc"
    return total.hexdigest()[:32]


def built(name: str, parts: Iterable[str | bytes | Path], make: Callable[[Path], object]) -> Path:
    """The path of what `make` writes to the path it is given, from the cache where it was made before.

    Args:
        name: The file's name; the same for every version of it.
        parts: All that the result depends on.
        make: Called once, with other processes that ask for the same held off. What fails leaves nothing behind.
    """
    key = digest(parts)
    path = FOLDER / f"{key}-{name}"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with FileLock(FOLDER / f"{key}.lock"):
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
                    new = Path(folder, name)
                    make(new)
                    new.replace(path)
    return path


@functools.cache
def version(*command: str) -> str:
    """What a compiler says of itself."""
    return subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout


def disassembled(
    disassemble: Callable[[bytes], tuple[str, dict[str, int]]], cubin: bytes
) -> tuple[str, dict[str, int]]:
    """`bench.machine_code.disassembled`, kept: to read a cubin takes five times as long as to compile it."""
    from bench import machine_code

    tools = [version(machine_code.nvidia_tool(name)) for name in ("nvdisasm", "cuobjdump")]
    kept = built(
        "sass.json",
        [cubin, *tools, Path(machine_code.__file__)],  # where its flags stand
        lambda path: path.write_text(json.dumps(disassemble(cubin))),
    )
    sass, usage = json.loads(kept.read_text())
    return sass, usage
