"""The noise that sample() starts from, where it is neither given nor one draw of PyTorch's."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import Tensor

from .arguments import shown
from .ops import dispatch
from .ops.keyed_noise import INDEXES, STREAMS


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
        x_dims: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        evaluation: int = 0,
        backend: str = "auto",
    ) -> Tensor:
        """The noise of samples first to first + batch_size - 1.

        Args:
            batch_size: B.
            x_dims: The shape of one sample.
            device: Where to draw.
            dtype: float32, float64, bfloat16 or float16; None: torch's default. The same normals, widened or rounded.
            evaluation: An int in [0, 2^16); 0 is what sample() starts from.
            backend: "auto", "triton", "cuda", "cpu" or "reference".

        Returns:
            [B, *x_dims], contiguous.

        Raises:
            TypeError: dtype is none of these.
            ValueError: an argument is out of its range.
            RuntimeError: the backend was asked for by name and cannot be used.

        Example:
            >>> from flowmatch_kernels import KeyedNoise
            >>> KeyedNoise(7).draw(2, (64, 2)).shape
            torch.Size([2, 64, 2])
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        keys = _keys(self, batch_size, torch.device(device))
        return dispatch.keyed_noise(keys, tuple(x_dims), dtype, evaluation, backend)


def _int(value: Any, name: str) -> int:
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {shown(value)}") from None


def _keys(noise: KeyedNoise, batch_size: int, device: torch.device) -> Tensor:
    """Rows of keys, [B, 3], made on the device."""
    if noise.first + batch_size > INDEXES:
        raise ValueError(f"first + batch_size must be at most 2^48, got {noise.first} + {batch_size}")
    index = torch.arange(batch_size, dtype=torch.int64, device=device) + noise.first
    seed, stream = torch.full_like(index, noise._bits), torch.full_like(index, noise.stream)
    return torch.stack([seed, index, stream], dim=1)


Source = Union[KeyedNoise, "list[KeyedNoise | torch.Generator]"]
"""What noise is drawn from: one key for all samples, or a key for each, or a generator for each."""


def source(noise: Any, batch_size: int, generator: torch.Generator | None) -> tuple[Source | None, Any]:
    """What the argument `noise` of sample() says to draw from, or None; and, where it is None, `noise` as it is.

    Raises:
        TypeError: a sequence holds something else, or both kinds.
        ValueError: a sequence has not batch_size entries, or there is a generator too.
    """
    if isinstance(noise, KeyedNoise):
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
        return None, noise
    if generator is not None:
        raise ValueError("noise says what to draw from, and so does generator: leave one of them out")
    return found, None


def drawn(
    source: Source, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, backend: str, out: Tensor | None
) -> Tensor:
    """The noise, [B, *x_dims]: by keys, or by each sample's generator, on its device, as diffusers' randn_tensor draws.

    Keys of a list are copied to the device, which a CUDA graph cannot capture; those of one KeyedNoise are made there.

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
    if isinstance(source, KeyedNoise):
        keys = _keys(source, batch_size, device)
    else:
        rows, draws = [], []
        for one in source:
            if isinstance(one, KeyedNoise):
                rows.append([one._bits, one.first, one.stream])
            else:
                draws.append(torch.randn(1, *x_dims, dtype=dtype, device=one.device, generator=one).to(device))
        if draws:
            return torch.cat(draws)
        keys = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 3).to(device)
    return dispatch.keyed_noise(keys, x_dims, dtype, 0, backend, out)
