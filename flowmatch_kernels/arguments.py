"""Checks of arguments that several places take: what was got, and what was wanted."""

from __future__ import annotations

import itertools
import math
import operator
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops.fused_step import dense, double
from .tracing import has_derivative, is_differentiating, is_tracing

_INFINITY = math.inf

LARGEST = 2**62
"""The largest count: torch's sizes are int64, and one more must be one too."""

BYTES = (bytes, bytearray, memoryview)
"""Sequences of ints that nobody means as numbers."""


def flag(value: Any, name: str) -> bool:
    """True or False.

    Raises:
        TypeError: it is neither.
    """
    if type(value) is bool:
        return value
    raise TypeError(f"{name} must be True or False, got {shown(value)}: bool(...) makes it one")


def refuse_derivative(value: Any, name: str) -> None:
    """Raises where a derivative is being taken with respect to numbers that sample() has none for.

    Args:
        value: A tensor, or lists that may hold some; anything else has no derivative.
        name: The argument's.

    Raises:
        ValueError: a derivative with respect to it is being taken.
    """
    if isinstance(value, Tensor):
        if has_derivative(value):
            raise ValueError(f"{name} requires grad, and sample() has no derivative with respect to it: detach it")
    elif isinstance(value, (list, tuple)) and not set(map(type, value)) <= {float, int}:
        for entry in value:
            refuse_derivative(entry, name)


def keeps_derivative(asked: bool | None, noise: Tensor | None, **constants: Any) -> bool:
    """Whether sample() keeps the derivative.

    Args:
        asked: The argument `differentiable` of sample().
        noise: What sampling starts from.
        **constants: What sample() has no derivative with respect to, by name.

    Raises:
        TypeError: asked is neither a bool nor None.
        ValueError: a derivative is taken, and sample() was not told what to do; or one with respect to what has none.
    """
    if asked is not None:
        flag(asked, "differentiable")
    if asked is False:
        return False
    for name, value in constants.items():
        if value is not None and type(value) is not float:  # most often; a call for each is 4% of a small sample()
            refuse_derivative(value, name)
    if asked:
        return True
    taken = None
    if isinstance(noise, Tensor) and has_derivative(noise):
        taken = "noise requires grad"
    elif is_differentiating():
        taken = "a derivative is taken, by torch.func or forward-mode AD"
    if taken is not None:
        raise ValueError(
            f"{taken}, and sample() keeps no derivative unless asked: pass differentiable=True for the derivative of "
            "the loop, or differentiable=False for a result that is a constant"
        )
    return False


def integer(value: Any, name: str, wanted: str = "an int") -> int:
    """An int, or what can stand for one, as a NumPy integer or an integer tensor of one entry.

    Raises:
        TypeError: it is none.
        ValueError: it is too large for torch.
    """
    try:
        if not _numeric(value):
            raise TypeError
        found = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}") from None
    if abs(found) > LARGEST:
        raise ValueError(f"{name} must be at most 2**62, got {shown(found)}")
    return found


def count(value: Any, name: str, most: int | None = LARGEST) -> int:
    """An int that is not negative.

    Args:
        value: What was given.
        name: The argument's.
        most: The largest allowed; None where the caller has a limit of its own: torch.export would bound a symbolic
            batch size by this one.

    Raises:
        TypeError: it is no int.
        ValueError: it is negative, or too large for torch.
    """
    if type(value) is int and value >= 0 and (most is None or value <= most):
        return value
    if isinstance(value, torch.SymInt):  # of a tracer, which records what holds for more than one size
        return value  # type: ignore[return-value]
    found = integer(value, name)
    if found < 0:
        raise ValueError(f"{name} must not be negative, got {found}")
    return found


def number(value: Any, name: str, wanted: str = "a number") -> float:
    """A number as a float; NaN and infinities are numbers.

    Raises:
        TypeError: it is none.
        ValueError: it is an int, or a fraction, too large for a float.
    """
    if type(value) is float:
        return value
    refuse_derivative(value, name)
    try:
        if not _numeric(value):
            raise TypeError
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {wanted} that a float can hold, got {shown(value)}") from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}") from None


def finite(value: Any, name: str, wanted: str = "a number") -> float:
    """A finite number as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN, infinite, or too large for a float.
    """
    # Under a compiler it may be symbolic, and stays so: a symbol is known to be finite, so that this is no guard.
    if type(value) is float and -_INFINITY < value < _INFINITY:
        return value
    found = number(value, name, wanted)
    if -_INFINITY < found < _INFINITY or torch.compiler.is_compiling():
        return found
    raise ValueError(f"{name} must be finite, got {found}")


def held(value: float, name: str, dtype: torch.dtype) -> float:
    """A finite number that float32, or float64 for a state of float64, can hold: PyTorch would make it infinite.

    Args:
        value: The number; while compiling it may be symbolic, and is not compared.
        name: The argument's.
        dtype: The state's.

    Raises:
        ValueError: it is too large.
    """
    if torch.compiler.is_compiling() or dtype is torch.float64 or -1e38 < value < 1e38:
        return value
    try:
        struct.pack("<f", value)  # rounds as a cast does; the native "f" makes it infinite
    except OverflowError:
        raise ValueError(
            f"{name} must be a number that float32 can hold, got {value}: it would be infinite; "
            "a state of dtype=torch.float64 takes it"
        ) from None
    return value


def share(value: Any, name: str) -> float:
    """A number between 0 and 1, both included.

    Raises:
        TypeError: it is no number.
        ValueError: it is outside.
    """
    found = number(value, name)
    if not 0 <= found <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {found}")
    return found


def end_of_time(value: Any, name: str = "noise_at") -> int:
    """0 or 1.

    Raises:
        ValueError: it is neither of these ints.
    """
    try:
        found = integer(value, name)
    except (TypeError, ValueError):
        found = -1
    if found not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1, got {shown(value)}")
    return found


def check_dense(tensor: Tensor, name: str) -> None:
    """Raises TypeError where a tensor is sparse, nested, or of another layout that is not strided."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {layout}")


def elsewhere(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on another device; one without an index is any of its type."""
    return tensor.device != device and (device.index is not None or tensor.device.type != device.type)


def listed(numbers: Any) -> list[Any]:
    """The entries of a sequence, an array or an iterator; one number, a 0-dim tensor too, as the only entry."""
    several = isinstance(numbers, Iterable) and getattr(numbers, "ndim", 1) > 0
    return list(numbers) if several else [numbers]


def as_tensor(numbers: Any) -> Tensor:
    """An array, as NumPy's, as a tensor on the CPU: the same memory, or a copy of a reversed one."""
    try:
        return torch.as_tensor(numbers, device="cpu")
    except ValueError:
        if not hasattr(numbers, "copy"):
            raise
        return torch.as_tensor(numbers.copy(), device="cpu")


def strength(value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """velocity_strength in the state's shape, contiguous.

    Raises:
        TypeError: it is no dense tensor of the state's dtype.
        ValueError: it does not expand to the state's shape, or is on another device.
    """
    name, wanted = "velocity_strength", f"a tensor that expands to {shown(list(shape))}, {dtype}, on {device}"
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else shown(value)
        raise TypeError(f"{name} must be {wanted}, got {got}")
    check_dense(value, name)
    if not expands(value.shape, shape):
        raise ValueError(f"{name} must be {wanted}, got {list(value.shape)}")
    if elsewhere(value, device):
        raise ValueError(f"{name} must be {wanted}, got one on {value.device}")
    return dense(value.detach().expand(shape))


_CPU = torch.device("cpu")
_available: set[torch.device] = set()
"""The devices with an index that were asked for and are there."""


def available_device(value: torch.device | str, name: str = "device") -> torch.device:
    """A device that can be used, with its index: "cuda" means the current one, which may change later.

    Raises:
        TypeError: it is neither a torch.device nor a string.
        ValueError: the string names no device.
        RuntimeError: this machine, or this build of torch, does not have it.
    """
    if type(value) is str and value == "cpu":
        return _CPU
    if not isinstance(value, (torch.device, str)):
        raise TypeError(f"{name} must be a torch.device or a string, got {shown(value)}")
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name} must name a device, got {value!r:.60}: {_first_line(error)}") from None
    if device.type == "cpu":
        return _CPU
    if device.index is not None and (torch.compiler.is_compiling() or device in _available):
        return device
    try:
        probe = torch.empty(0, device=device)
    except Exception as error:  # an AssertionError, a RuntimeError, or an ImportError, by the type of device
        raise RuntimeError(
            f"{name} {str(device)!r} is not available: {_first_line(error)}; this machine has {', '.join(_devices())}"
        ) from error
    if type(probe) is Tensor and not torch.compiler.is_compiling():  # a fake tensor's device need not be there
        _available.add(probe.device)
    return probe.device


def _devices() -> list[str]:
    """The devices of this machine, for a message."""
    names = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        names += [f"{accelerator.type}:{k}" for k in range(torch.accelerator.device_count())]
    return names


def _first_line(error: Exception) -> str:
    """The first sentence of an exception."""
    return f"{str(error).partition(chr(10))[0].partition('. ')[0] or type(error).__name__:.160}"


def shown(value: object) -> str:
    """Any value, for a message: the start of its repr."""
    try:
        return f"{value!r:.60}"
    except Exception:  # Python prints no int of more than 4300 digits, and a repr may raise anything
        return f"an object of {type(value).__name__}"


def _numeric(value: Any) -> bool:
    """Whether a value, or what a tensor or an array holds, may be a real number: no bool, no text, not complex."""
    if isinstance(value, Tensor):
        return value.dtype is not torch.bool and not value.is_complex()
    if isinstance(value, (bool, str, *BYTES)):
        return False
    if type(value) is int:  # also a compiler's symbol, of which no attribute can be asked
        return True
    return getattr(getattr(value, "dtype", None), "kind", "f") not in "bcmMOSU"  # NumPy's


def unread(value: Tensor, name: str) -> Any:
    """A number in a tensor whose value cannot be read, as a compiler traces it: as it is.

    Raises:
        TypeError: it is not floating point, or a meta tensor, which has no value.
    """
    if value.is_meta and not is_tracing():
        raise TypeError(f"{name} must be a number, got a meta tensor, which has no value")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number, got a tensor of {value.dtype}")
    return value.detach()


def tensor(numbers: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Numbers as a tensor, [n]: on the CPU, save where a compiler traces one that is on another device.

    A number may be a symbolic one of a compiler, or a 0-dim tensor that it traces.
    """
    if not torch.compiler.is_compiling() and not any(isinstance(value, Tensor) for value in numbers):
        return torch.tensor(numbers, dtype=dtype, device="cpu")
    # Products, so that a compiler takes a symbolic number as an input of its graph, and compiles once for all values.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([double(x) if isinstance(x, Tensor) else one * x for x in numbers]).to(dtype)


def own_dims(numbers: Any) -> int:
    """How many first sizes of the state numbers are given for: 1 of [B, n], 2 of [B, L, n]; 0: one row serves all.

    The number of dimensions alone decides, or how deep lists are nested; no size does.
    """
    dims = 0
    while isinstance(numbers, (list, tuple)) and numbers and isinstance(numbers[0], (list, tuple)):
        numbers, dims = numbers[0], dims + 1
    return dims or max(getattr(numbers, "ndim", 0) - 1, 0)


def own_sizes(shape: Sequence[int], **numbers: Any) -> tuple[int, ...]:
    """The first sizes of a state's shape that any of these numbers, by name, have a row for each of.

    Raises:
        ValueError: numbers have more dimensions than the state and one.
    """
    most = 0
    for name, given in numbers.items():
        dims = own_dims(given)
        if dims > len(shape):
            raise ValueError(
                f"{name} must be [n], or have the first sizes of the state {list(shape)} in front of n, got "
                f"{dims + 1} dimensions"
            )
        most = max(most, dims)
    return tuple(shape[:most])


def spread(numbers: Any, sizes: Sequence[int], name: str) -> list[Any]:
    """Numbers of some of the first sizes of the state as a flat list of rows, one for each of all `sizes`.

    Args:
        numbers: A tensor or nested lists, with as many of `sizes` in front of a row as `own_dims` says. Each of these
            may be 1: one for all. The others share.
        sizes: The first sizes of the state.
        name: The argument's.

    Raises:
        TypeError: lists are not nested equally deep.
        ValueError: a size is another.
    """

    def rows(part: Any, dims: int, at: int, name: str) -> list[Any]:
        if not isinstance(part, (list, tuple, Tensor)):
            raise TypeError(f"{name} must be a list, as the first one of its kind is, got {shown(part)}")
        if not dims:
            return [part] * math.prod(sizes[at:])
        if len(part) not in (1, sizes[at]):
            what = f"{sizes[at]} samples" if not at else f"{sizes[at]} entries of dimension {at} of the state"
            raise ValueError(f"{name} must have a row for each of the {what}, or one for all, got {len(part)}")
        found = [rows(one, dims - 1, at + 1, f"{name}[{k}]") for k, one in enumerate(part)]
        return list(itertools.chain(*found)) if len(found) == sizes[at] else found[0] * sizes[at]

    return rows(numbers, own_dims(numbers), 0, name)


def row_name(row: int, sizes: Sequence[int]) -> str:
    """What a row is of, for a message: "sample 2", or "sample 2, token 5"; of more sizes "sample 2, token [5, 0]"."""
    place = []
    for size in reversed(sizes):
        row, at = divmod(row, size)
        place.append(at)
    sample, *token = reversed(place)
    return f"sample {sample}" + (f", token {token[0] if len(token) == 1 else token}" if token else "")


def expands(shape: torch.Size, wanted: Sequence[int]) -> bool:
    """Whether a tensor of this shape expands to the wanted one, which stays as it is."""
    pairs = zip(reversed(shape), reversed(wanted), strict=False)  # torch.broadcast_shapes takes 40 us
    return len(shape) <= len(wanted) and all(size == its or size == 1 for size, its in pairs)
