"""Replacing a function or a class by name in every module that imported it, until it is undone; and which it is."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType, TracebackType
from typing import Any


class Replacement:
    """A name that stands for another object in the modules of a package.

    The name is replaced in the module that defines it and in every loaded module that holds the same object under the
    same name (`from module import name`). Modules that are imported later get the new object from the defining module.

    Also a context manager: leaving it undoes the replacement.

    Example:
        >>> import types, sys
        >>> module = types.ModuleType("a_package.sampling"); sys.modules["a_package.sampling"] = module
        >>> module.integrate = old = lambda: "old"
        >>> with Replacement():
        ...     pass
        >>> with Replacement().replace(module, "integrate", lambda: "new"):
        ...     module.integrate()
        'new'
        >>> module.integrate()
        'old'
        >>> del sys.modules["a_package.sampling"]
    """

    def __init__(self) -> None:
        self._done: list[tuple[ModuleType, str, Any, Any, list[ModuleType]]] = []

    def replace(self, module: ModuleType, name: str, new: Any) -> Replacement:
        """Replaces `name`, which `module` defines; nothing, where it already is `new`.

        Args:
            module: The module that defines the name.
            name: The attribute.
            new: What takes its place.

        Raises:
            AttributeError: the module has no such name.

        Returns:
            This object.
        """
        old = getattr(module, name)
        if old is new:
            return self
        holders = [found for found in _modules() if vars(found).get(name) is old]
        for holder in holders:
            setattr(holder, name, new)
        self._done.append((module, name, old, new, holders))
        return self

    def undo(self) -> None:
        """Puts back what was there, also in the modules of the same package that were imported since."""
        while self._done:
            module, name, old, new, holders = self._done.pop()
            package = module.__name__.partition(".")[0]
            later = [found for found in _modules() if found.__name__.partition(".")[0] == package]
            for holder in {id(found): found for found in (*holders, *later)}.values():
                if vars(holder).get(name) is new:
                    setattr(holder, name, old)

    @property
    def modules(self) -> list[str]:
        """The names of the modules in which a name was replaced."""
        return sorted({holder.__name__ for *_, holders in self._done for holder in holders})

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def fingerprint(function: Callable[..., Any]) -> str:
    """What is equal for two functions of the same source, but for comments and layout: 16 hexadecimal digits.

    Raises:
        OSError: the source cannot be read.
    """
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = " ".join(token.string for token in tokens if token.type not in _LAYOUT)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def check_known(kind: type, name: str, known: Mapping[str, Any], names: Iterable[str], project: str) -> str:
    """The fingerprint of a method of a project, if it is known.

    Args:
        kind: A class of the project.
        name: The method's.
        known: By fingerprint.
        names: What the known versions are called.
        project: And of what they are.

    Raises:
        RuntimeError: it is not; the message names the versions that are.
    """
    found = fingerprint(getattr(kind, name))
    if found not in known:
        raise RuntimeError(
            f"{name} of {kind.__module__}.{kind.__qualname__} is a version that is not known here ({found}); "
            f"known are {project} {', '.join(names)}"
        )
    return found


def needed(module: str, project: str, versions: str = "") -> Any:
    """A module of a project that an integration cannot do without.

    Args:
        module: Its name.
        project: The project, by which the integration and the extra are called too.
        versions: Those that have the module, for the message.

    Raises:
        ImportError: it cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"flowmatch_kernels.integrations.{project} needs {f'{project} {versions}'.strip()} ({error}): "
            f"pip install flowmatch_kernels[{project}]"
        ) from error


def is_installed(package: str) -> bool:
    """Whether a top-level package is loaded, or could be; imports nothing."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _modules() -> list[ModuleType]:
    return [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
