"""A solver that was fitted to a model: its own times and its own coefficients. `FlowMatching.fit_solver` makes one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import struct
from collections.abc import Mapping, Sequence
from operator import gt, lt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import BYTES, end_of_time, finite, shown
from .stages import Earlier, Segment, Stage, Steps

FORMAT = "flowmatch_kernels.FittedSolver"
VERSION = 1
EARLIER = 3
"""Earlier velocities that a row of the kernel can read."""


@dataclasses.dataclass(frozen=True, repr=False)
class FittedSolver:
    """N evaluations of the velocity, at times of their own, each followed by one linear combination.

    With v_i the velocity at (x_i, t_i)::

        x_{i+1} = a_i*x_i + b_i0*v_i + b_i1*v_{i-1} + b_i2*v_{i-2} + b_i3*v_{i-3}

    Pass it as `int_method` to `FlowMatching` or `sample()`, or pass the path of the file that it was saved to.

    Args:
        times: [N + 1], t_0 ... t_N, finite and strictly monotonic. step_fn sees them in torch's default dtype.
        coefficients: N rows (a, b0, b1, ...): row i has at most min(i, 3) earlier velocities, b1 to b3.
        rows: Of each row, "fitted", or the plain multistep row that was better on held-out samples.
        noise_at: The end of time at which the noise was, as for `FlowMatching`.
        errors: Root mean square distance to the converged samples, on samples that were not used to fit: of this
            solver ("fitted"), and of the solvers with a name at as many evaluations.
        fitted_with: What it was fitted to, for a reader: shape, dtype, guidance, samples, reference.

    Raises:
        TypeError: times or coefficients are not numbers.
        ValueError: they are not finite, the times are not monotonic, or there is another number of rows.

    Source: of the family of Bespoke Non-Stationary Solvers, arXiv 2403.01329.
    """

    times: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]
    rows: tuple[str, ...] = ()
    noise_at: int = 0
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict, compare=False)
    fitted_with: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        times = _floats(self.times, "times")
        steps = len(times) - 1
        if steps < 1 or not (all(map(lt, times, times[1:])) or all(map(gt, times, times[1:]))):
            raise ValueError(f"times must be strictly monotonic, two or more, got {list(times)!s:.200}")
        if not isinstance(self.coefficients, Sequence) or len(self.coefficients) != steps:
            found = len(self.coefficients) if isinstance(self.coefficients, Sequence) else self.coefficients
            raise ValueError(f"coefficients must have a row for each of the {steps} steps, got {found!r:.60}")
        rows = tuple(_floats(row, f"coefficients[{i}]") for i, row in enumerate(self.coefficients))
        for i, row in enumerate(rows):
            most = 2 + min(i, EARLIER)
            if not 2 <= len(row) <= most:
                raise ValueError(f"coefficients[{i}] must have 2 to {most} numbers (a, b0, b1, ...), got {len(row)}")
        noise_at = end_of_time(self.noise_at)
        names = self.rows or ("fitted",) * steps
        if (
            not isinstance(names, (list, tuple))
            or len(names) != steps
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"rows must name each of the {steps} rows, got {names!r:.60}")
        for name in ("errors", "fitted_with"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a dict, got {getattr(self, name)!r:.60}")
        errors = {key: finite(value, f"errors[{shown(key)}]") for key, value in self.errors.items()}
        values = (times, rows, tuple(names), noise_at, errors, dict(self.fitted_with))
        for name, value in zip([field.name for field in dataclasses.fields(self)], values, strict=True):
            object.__setattr__(self, name, value)

    @property
    def evaluations(self) -> int:
        """N."""
        return len(self.coefficients)

    def bits(self) -> bytes:
        """Its times and coefficients; unlike ==, they tell -0.0 from 0.0."""
        numbers = [*self.times, *itertools.chain(*self.coefficients)]
        return struct.pack(f"{len(numbers)}d", *numbers) + bytes(map(len, self.coefficients))

    def grid(self, dtype: torch.dtype) -> Tensor:
        """Its times, [N + 1], on the CPU."""
        return torch.tensor(self.times, dtype=dtype, device="cpu")

    def __call__(self, steps: Steps) -> list[Segment]:
        """Its stages, on the steps of its own times: see `solvers.stages`."""
        segments = []
        for i, row in enumerate(self.coefficients):
            step = steps.part(i, i + 1)
            a, b0, *earlier = (torch.full_like(step.h, value) for value in row)
            terms = tuple(Earlier(b, ago=ago) for ago, b in enumerate(earlier, start=1))
            segments.append(Segment(step, (Stage(step.start, b0, terms, a=a),)))
        return segments

    def to_dict(self) -> dict[str, Any]:
        """Its numbers and what they are, as plain Python values that JSON can hold: for `from_dict`."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FittedSolver:
        """The solver that `to_dict` described.

        Raises:
            TypeError, ValueError: it is no fitted solver, of another version, or damaged; the message says what is
                wrong.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise ValueError(f'it does not say "format": "{FORMAT}"')
        if type(content.get("version")) is not int or content["version"] != VERSION:
            raise ValueError(f"it has version {content.get('version')!r:.20} and this package reads {VERSION}")
        fields = {field.name for field in dataclasses.fields(cls)}
        missing = fields - content.keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        return cls(**{name: content[name] for name in fields})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON; every number keeps its bits.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FittedSolver:
        """Reads what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no fitted solver, of another version, or damaged; the message says what is wrong.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (
            ValueError,
            TypeError,
            RecursionError,
        ) as error:  # JSON and Unicode errors are ValueErrors
            raise ValueError(f"{os.fspath(path)} is not a saved FittedSolver: {error}") from error

    def __repr__(self) -> str:
        head = f"FittedSolver with {self.evaluations} evaluation{'s' * (self.evaluations > 1)}"
        columns = ["t", "a", "b0", "b1", "b2", "b3"][: 1 + max(map(len, self.coefficients))]
        lines = ["  ".join(f"{name:>10}" for name in columns) + "  row"]
        for t, row, name in zip(self.times[:-1], self.coefficients, self.rows, strict=True):
            numbers = [f"{number:10.6g}" for number in (t, *row)]
            numbers += [" " * 10] * (len(columns) - len(numbers))
            lines.append("  ".join(numbers) + f"  {name}")
        lines.append(f"{self.times[-1]:10.6g}  end")
        if self.errors:
            errors = ", ".join(f"{name} {error:.4g}" for name, error in self.errors.items())
            lines.append(f"RMS error on held-out samples at {self.evaluations} evaluations: {errors}")
        if self.fitted_with:
            lines.append("Fitted with " + ", ".join(f"{name}: {value}" for name, value in self.fitted_with.items()))
        return "\n".join([head, *lines])


def titled(solver: Any) -> str:
    """A solver in a message, in one line."""
    if not isinstance(solver, FittedSolver):
        return f"{str(solver)!r:.60}"
    return f"a fitted solver with {solver.evaluations} evaluation{'s' * (solver.evaluations > 1)}"


def _floats(values: Any, name: str) -> tuple[float, ...]:
    """A sequence of finite numbers as floats."""
    if not isinstance(values, Sequence) or isinstance(values, (str, *BYTES)):
        raise TypeError(f"{name} must be a sequence of numbers, got {shown(values)}")
    return tuple(finite(value, f"{name}[{k}]") for k, value in enumerate(values))
