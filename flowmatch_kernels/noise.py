"""The noise that sample() starts from, where it is neither given nor one draw of PyTorch's."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from . import tracing
from .arguments import available_device, check_dense, count, elsewhere, integer, listed, shown
from .ops import dispatch
from .ops.fused_step import VELOCITY_DTYPES, arithmetic_dtype
from .ops.keyed_noise import EVALUATIONS, INDEXES, STREAMS, at_evaluations

if TYPE_CHECKING:
    from .solvers import Table


@dataclasses.dataclass(frozen=True)
class KeyedNoise:
    """Standard normal noise that depends on its key and on nothing else.

    z[i, element] = Normal(Philox4x32-10(key = seed, counter = (element, first + i, stream)))

    Sample i of a batch has the index first + i. A sample has the same bits alone, in any batch, at any place, on any
    device, by every backend, in eager mode and compiled: so a batch can be split, reordered or spread over ranks, each
    of which starts at its own `first`. `flowmatch_kernels.ops.keyed_noise` gives the layout of the counter and what
    the bits are.

    Args:
        seed: An int in [0, 2^64).
        first: The index of a batch's first sample: an int in [0, 2^48).
        stream: An int in [0, 2^16), for draws that must not be the same for one seed, as of two models.

    Raises:
        TypeError: an argument is no int.
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from flowmatch_kernels import FlowMatching, KeyedNoise
        >>> fm = FlowMatching(x_dims=(64, 2))
        >>> step_fn = lambda x, t: torch.sin(4 * t) - x
        >>> whole = fm.sample(6, step_fn, noise=KeyedNoise(7))
        >>> part = fm.sample(2, step_fn, noise=KeyedNoise(7, first=4))
        >>> torch.equal(whole[4:], part)
        True

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """

    seed: int
    first: int = 0
    stream: int = 0
    _bits: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, end, wanted in (("seed", 1 << 64, "2^64"), ("first", INDEXES, "2^48"), ("stream", STREAMS, "2^16")):
            value = getattr(self, name)
            if type(value) is not int:
                value = _int(value, name)
                object.__setattr__(self, name, value)
            if not 0 <= value < end:
                raise ValueError(f"{name} must be in [0, {wanted}), got {value}")
        # The seed's 64 bits as int64 holds them: made here, since a compiler's symbolic integers are int64.
        object.__setattr__(self, "_bits", self.seed - (1 << 64) if self.seed >= 1 << 63 else self.seed)

    def draw(
        self,
        batch_size: int,
        x_dims: int | Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        evaluation: int = 0,
        backend: str = "auto",
    ) -> Tensor:
        """The noise of samples first to first + batch_size - 1.

        Args:
            batch_size: B.
            x_dims: The shape of one sample: an int or a sequence of ints.
            device: Where to draw.
            dtype: float32, float64, bfloat16 or float16; None: torch's default. The same normals, widened or rounded.
            evaluation: An int in [0, 2^16); 0 is what sample() starts from.
            backend: "auto", "triton", "cuda", "cpu" or "reference".

        Returns:
            [B, *x_dims], contiguous.

        Raises:
            TypeError: dtype is none of these, or an argument is of the wrong type.
            ValueError: an argument is out of its range.
            RuntimeError: the device is not available, or the backend was asked for by name and cannot be used.

        Example:
            >>> from flowmatch_kernels import KeyedNoise
            >>> KeyedNoise(7).draw(2, (64, 2)).shape
            torch.Size([2, 64, 2])
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        batch_size, evaluation = count(batch_size, "batch_size"), integer(evaluation, "evaluation")
        shape = [count(size, "x_dims") for size in listed(x_dims)]
        return _normals(keys(self, batch_size, available_device(device)), shape, dtype, evaluation, backend)


def _int(value: Any, name: str) -> int:
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {shown(value)}") from None


@dataclasses.dataclass(frozen=True)
class KeyRows:
    """Keys that are on the device already: a buffer of a CUDA graph."""

    rows: Tensor
    """[B, 3], as `keys` returns them."""


def keys(source: KeyedNoise | KeyRows | Sequence[KeyedNoise], batch_size: int, device: torch.device) -> Tensor:
    """Rows of keys, [B, 3]: of one `KeyedNoise` made on the device, of a list copied to it."""
    if isinstance(source, KeyRows):
        return source.rows
    if not isinstance(source, KeyedNoise):
        rows = [[one._bits, one.first, one.stream] for one in source]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 3).to(device)
    if source.first + batch_size > INDEXES:
        raise ValueError(f"first + batch_size must be at most 2^48, got {source.first} + {batch_size}")
    index = torch.arange(batch_size, dtype=torch.int64, device=device) + source.first
    seed, stream = torch.full_like(index, source._bits), torch.full_like(index, source.stream)
    return torch.stack([seed, index, stream], dim=1)


def _normals(
    found: Tensor,
    x_dims: Sequence[int],
    dtype: torch.dtype,
    evaluation: int,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    """The noise of these keys, a constant to torch.jit.trace, which cannot record a view of bits."""
    with tracing.unrecorded():
        return dispatch.keyed_noise(found, x_dims, dtype, evaluation, backend, out)


class PartOfDraw:
    """PyTorch's one draw for a larger batch, of which the samples from `first` on are kept.

    Args:
        generator: As for sample().
        batch_size: Of the larger batch.
        first: The first sample that is kept.
    """

    def __init__(self, generator: torch.Generator | None, batch_size: int, first: int) -> None:
        self._generator, self._batch_size, self._first = generator, batch_size, first
        self.states: list[bytes] = []
        """The state of the generator before each draw so far."""

    def state(self, device: torch.device) -> bytes:
        """The state of the generator now."""
        if self._generator is not None:
            state = self._generator.get_state()
        elif device.type == "cpu":
            state = torch.get_rng_state()
        else:
            state = torch.get_device_module(device).get_rng_state(device)
        return bytes(state.tolist())

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The noise of the samples that are kept, [B, *x_dims], memory of its own."""
        self.states.append(self.state(device))
        whole = drawn(self._generator, (self._batch_size, *shape[1:]), dtype, device, "auto", None)
        return whole[self._first : self._first + shape[0]].clone()


Source = Union[KeyedNoise, KeyRows, "list[KeyedNoise | torch.Generator]", PartOfDraw]
"""What noise is drawn from: one key for all samples, or a key or a generator for each, or a part of PyTorch's draw."""


def source(
    noise: Any, batch_size: int, generator: torch.Generator | PartOfDraw | None
) -> tuple[Source | torch.Generator | None, Tensor | None]:
    """What these arguments of sample() say to draw from, None being the default generator; and the noise, where given.

    Raises:
        TypeError: generator is none, or a sequence holds something else, or both kinds.
        ValueError: a sequence has not batch_size entries, or there is a generator too.
    """
    if generator is not None and not isinstance(generator, (torch.Generator, PartOfDraw)):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r:.60}")
    if isinstance(noise, (KeyedNoise, KeyRows)):
        found: Source = noise
    elif isinstance(noise, (list, tuple)):
        kinds = KeyedNoise, torch.Generator
        if not any(all(isinstance(one, kind) for one in noise) for kind in kinds):
            other = next((one for one in noise if not isinstance(one, kinds)), None)
            got = "both" if other is None else shown(other)
            raise TypeError(
                "noise must be a tensor, a KeyedNoise, or a list that holds KeyedNoise only, or torch.Generator only; "
                f"got {got} in {shown(noise)}"
            )
        if len(noise) != batch_size:
            raise ValueError(f"noise must have an entry for each sample, {batch_size}; got {len(noise)}")
        found = list(noise)
    else:
        return generator, noise
    if generator is not None:
        raise ValueError("noise says what to draw from, and so does generator: leave one of them out")
    return found, None


def is_keyed(source: Any) -> bool:
    """Whether what `source` returned are keys. An empty list has none."""
    return isinstance(source[0] if isinstance(source, list) and source else source, (KeyedNoise, KeyRows))


def state_dtype(
    dtype: torch.dtype | None, noise: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> torch.dtype:
    """The state's dtype, with `noise` checked against it, the shape and the device."""
    if noise is not None:
        if not isinstance(noise, Tensor):
            raise TypeError(
                f"noise must be a tensor {list(shape)}, a KeyedNoise, or a list of KeyedNoise or of torch.Generator, "
                f"one for each sample; got {shown(noise)}"
            )
        check_dense(noise, "noise")
        if not noise.is_floating_point():
            raise TypeError(f"noise must be floating point, got {noise.dtype}")
        if noise.shape != shape:
            raise ValueError(f"noise must be [batch_size, *x_dims] = {shown(list(shape))}, got {list(noise.shape)}")
        if elsewhere(noise, device):
            raise ValueError(f"noise is on {noise.device}, and device is {device}: move one to the other")
    if dtype is None:
        dtype = torch.get_default_dtype() if noise is None else noise.dtype
    if dtype not in VELOCITY_DTYPES:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    return dtype


def drawn(
    source: Source | torch.Generator | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    out: Tensor | None,
) -> Tensor:
    """The noise, [B, *x_dims]: PyTorch's one draw, or a part of it; or by keys; or by generators, on their devices.

    A generator for each sample draws as diffusers' randn_tensor does. Keys of a list are copied to the device, which a
    CUDA graph cannot capture; those of one KeyedNoise are made there.

    Args:
        source: What `source` returned.
        shape: [B, *x_dims].
        dtype: Of the result.
        device: Of the result.
        backend: For keys.
        out: Memory for the result, which may be used; or None.

    Raises:
        RuntimeError: the backend was asked for by name and cannot be used.
    """
    batch_size, *x_dims = shape
    if isinstance(source, PartOfDraw):
        return source.draw(shape, dtype, device)
    if source is None or isinstance(source, torch.Generator):
        on = device if source is None else source.device
        out = out if on == device else None
        return torch.randn(shape, dtype=dtype, device=on, generator=source, out=out).to(device)
    if isinstance(source, list) and source and not is_keyed(source):
        generators: Any = source
        draws = [torch.randn(1, *x_dims, dtype=dtype, device=one.device, generator=one) for one in generators]
        return torch.cat([one.to(device) for one in draws])
    return _normals(keys(source, batch_size, device), x_dims, dtype, 0, backend, out)  # type: ignore[arg-type]


#: Steps whose keys are made at once: 24 bytes of each sample for each.
_STEPS_AT_ONCE = 16


class StepNoise:
    """The noise that a stochastic solver adds: of each step a draw of its own, or what the user gave.

    Drawn in the arithmetic dtype, float32 unless the state is float64. By keys, step k is the draw `evaluation` k + 1.
    Then the fused step may draw it itself, by `keys`.

    Args:
        source: What `source` returned.
        given: [B, N, *x_dims], the noise of all steps, instead of draws.
        shape: [B, *x_dims].
        dtype: The arithmetic dtype.
        device: The state's.
        backend: For keys.
        stored: The noise as the state's memory lies.
    """

    def __init__(
        self,
        source: Source | torch.Generator | None,
        given: Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
        stored: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._source, self._given, self._shape, self._dtype, self._device = source, given, shape, dtype, device
        self._backend, self._stored = backend, stored
        self._keys = keys(source, shape[0], device) if given is None and is_keyed(source) else None  # type: ignore[arg-type]
        self._keys_at: tuple[Tensor, ...] = ()
        self._first = 0

    def keys(self, step: int) -> Tensor | None:
        """What the fused step draws the noise of a step by, [B, 3]; None: it has to be drawn here."""
        if self._keys is None or self._stored is not None:
            return None
        if not 0 <= step - self._first < len(self._keys_at):
            self._first = step
            self._keys_at = at_evaluations(self._keys, step + 1, max(1, min(_STEPS_AT_ONCE, EVALUATIONS - 1 - step)))
        return self._keys_at[step - self._first]

    def __call__(self, step: int, out: Tensor | None) -> Tensor:
        """The noise of a step, contiguous, as the state's memory lies; in `out`, where it is given."""
        memory = out if self._stored is None else None
        if self._given is not None:
            z = self._given.select(1, step)
        elif self._keys is not None:
            z = _normals(self._keys, self._shape[1:], self._dtype, step + 1, self._backend, memory)
        else:
            z = drawn(self._source, self._shape, self._dtype, self._device, self._backend, memory)
        if self._stored is not None:
            z = self._stored(z)
        if out is None:
            return z.to(self._dtype).contiguous()
        return z if z is out else out.copy_(z)


def step_noise(
    given: Any,
    source_: Source | torch.Generator | None,
    shape: tuple[int, ...],
    table: Table,
    device: torch.device,
    adding: str,
) -> tuple[Source | torch.Generator | None, Tensor | None]:
    """What the argument `step_noise` of sample() says to draw from; and the noise, where it is given.

    Args:
        given: The argument.
        source_: What the start is drawn from.
        shape: The state's.
        table: The solver's.
        device: The state's.
        adding: What adds noise, for a message.

    Raises:
        TypeError: it is of another type, or not floating point.
        ValueError: it has another shape, or is on another device; or the solver adds no noise.
    """
    if table.noise is None:
        if given is not None:
            raise ValueError(f"step_noise is for {adding}")
        return None, None
    if given is None:
        return source_, None
    if not isinstance(given, Tensor):
        found, rest = source(given, shape[0], None)
        if found is None:
            raise TypeError(
                "step_noise must be a tensor, a KeyedNoise, or a list of KeyedNoise or of torch.Generator, one for "
                f"each sample; got {shown(rest)}"
            )
        return found, None
    check_dense(given, "step_noise")
    if not given.is_floating_point():
        raise TypeError(f"step_noise must be floating point, got {given.dtype}")
    wanted = (shape[0], table.steps, *shape[1:])
    if given.shape != wanted:
        raise ValueError(f"step_noise must be [batch_size, steps, *x_dims] = {list(wanted)}, got {list(given.shape)}")
    if elsewhere(given, device):
        raise ValueError(f"step_noise is on {given.device}, and device is {device}: move one to the other")
    return None, given.detach()


def scaled(noise: Tensor, temperature: float | Tensor) -> Tensor:
    """noise * temperature, with the bits of a temperature that is a number."""
    if not isinstance(temperature, Tensor):
        return noise * temperature
    wide = arithmetic_dtype(noise.dtype)
    factor = temperature.to(wide).to(noise.device).view([1] * noise.dim())  # not 0-dim, which would not promote
    return (noise.to(wide) * factor).to(noise.dtype)
