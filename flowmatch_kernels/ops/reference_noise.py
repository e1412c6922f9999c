"""Keyed noise in plain PyTorch, on any device. It is the definition of right; `ops.keyed_noise` is the contract.

A word of 32 bits is held in int64. Float32 operations stand alone, one PyTorch call each, so that eager PyTorch
contracts none of them. A compiler might: under one, noise is drawn by the registered op, which it does not look into.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .fused_step import double

_WORD = 0xFFFFFFFF

#: The polynomials, highest power first; each entry is a float32.
LOGARITHM = (
    0.06918781250715256,
    -0.11794884502887726,
    0.1187414899468422,
    -0.12383755296468735,
    0.14218482375144958,
    -0.16669267416000366,
    0.20002231001853943,
    -0.24999986588954926,
    0.3333331048488617,
)
SINE = (
    0.0001247044710908085,
    -0.004664550069719553,
    0.07968997955322266,
    -0.6459639668464661,
    0.07079632580280304,
)
COSINE = (-0.000904374523088336, 0.020860442891716957, -0.25366926193237305, 0.23370054364204407)


def keyed_noise_(out: Tensor, keys: Tensor, evaluation: int) -> None:
    """Writes normals to out, [B, *x_dims], by keys [B, 3]."""
    out.copy_(keyed_noise(keys, out.shape[1:], out.dtype, evaluation))


def keyed_noise(keys: Tensor, x_dims: Sequence[int], dtype: torch.dtype, evaluation: int = 0) -> Tensor:
    """Normals, [B, *x_dims]; a new tensor."""
    elements = 1
    for size in x_dims:
        elements *= size
    words = philox(*counters(keys, torch.arange((elements + 3) // 4, device=keys.device), evaluation))
    z = torch.stack([*normals(words[0], words[1]), *normals(words[2], words[3])], dim=-1)
    return z.flatten(1)[:, :elements].to(dtype).contiguous().view(keys.shape[0], *x_dims)


def counters(keys: Tensor, block: Tensor, evaluation: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The counter's four words and the key's two, each [B, blocks] or what expands to it; block is element // 4."""
    seed, index, stream = keys.view(-1, 3, 1).unbind(1)
    high = block >> 32 | ((index >> 32) << 16)
    return (block & _WORD, high, stream | (evaluation << 16), index & _WORD), (seed & _WORD, (seed >> 32) & _WORD)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10, words in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64, which keeps every bit of the product
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


class Twofold(NamedTuple):
    """An unevaluated sum of two float32; `low` is at most half an ulp of `high`."""

    high: Tensor
    low: Tensor


def _sum(x: Tensor, y: Tensor) -> Twofold:
    """x + y, exactly; |x| >= |y|, or x is 0."""
    high = x + y
    return Twofold(high, y - (high - x))


def _square_root(x: Tensor) -> Tensor:
    """Correctly rounded, by way of float64, which has over twice the digits.

    PyTorch's own of float32 is not on the CPU, where a vector library computes it: 1 of some 5,000 values differs.
    """
    return torch.sqrt(double(x)).to(torch.float32).to(x.device)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _halves(x: Tensor) -> Twofold:
    """The leading 12 bits of x, and the rest: products of two such parts are exact."""
    high = (_bits(x) & -4096).view(torch.float32)
    return Twofold(high, x - high)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """By Horner's rule: a product and a sum for each coefficient but the first."""
    p = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        p = p * x + c
    return p


def uniform(word: Tensor) -> tuple[Tensor, Tensor]:
    """u as float32 distance from the nearer end, times 2^33, and whether that is 1."""
    upper = word >= 1 << 31
    return (2 * torch.where(upper, _WORD - word, word) + 1).to(torch.float32), upper


def minus_twice_logarithm(word: Tensor) -> Twofold:
    """-2 ln u of a word's uniform."""
    distance, upper = uniform(word)
    # -ln u = n ln 2 - ln(1 + f), f within [sqrt(1/2) - 1, sqrt(2) - 1], exactly. Lower half: u = 2^-n (1 + f).
    bits = _bits(distance) + (0x3F800000 - 0x3F3504F3)
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).view(torch.float32)
    exponent = (bits >> 23) - 127
    # Upper half: u = 1 - d, which is 1 + f near 1, else (1 + f) / 2.
    d = distance * 2.0**-33
    near = distance < 2515933696.0  # (1 - sqrt(1/2)) * 2^33
    f = torch.where(upper, torch.where(near, -d, 1.0 - (d + d)), mantissa - 1.0)
    n = torch.where(upper, (~near).to(torch.int32), 33 - exponent).to(torch.float32)

    square = f * f
    p = _polynomial(LOGARITHM, f)
    # ln 2 in two parts, the first of 10 bits, so that n times it is exact.
    rest = (square * 0.5 - (f * square) * p) + n * -2.1219444170128554e-4
    leading = _sum(n * 0.693359375, -f)
    high, low = _sum(leading.high, leading.low + rest)
    return Twofold(high + high, low + low)


def _remainder(x: Tensor, root: Tensor) -> Tensor:
    """x - root * root, exactly; root is the square root of x, rounded."""
    part = _halves(root)
    return ((x - part.high * part.high) - (part.high + part.high) * part.low) - part.low * part.low


def radius(square: Twofold) -> Twofold:
    """The square root, and what it leaves, by one step of Newton's from half a percent of 1/sqrt."""
    high, low = square
    root = _square_root(high)
    left = _remainder(high, root) + low
    inverse = (0x5F3759DF - (_bits(high) >> 1)).view(torch.float32)
    inverse = inverse * (1.5 - ((high * 0.5) * inverse) * inverse)
    return Twofold(root, (left * 0.5) * inverse)


def angle(word: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest quarter turn, modulo 4, and the signed distance from it in quarter turns, float32 in [-1/2, 1/2]."""
    quarter = (word + 0x20000000) >> 30
    return quarter & 3, (2 * (word - (quarter << 30)) + 1).to(torch.float32) * 2.0**-31


def sine_cosine(y: Tensor) -> tuple[Twofold, Twofold]:
    """Of y quarter turns, y in [-1/2, 1/2]."""
    q = y * y
    three_halves = _sum(y, y * 0.5)
    sine = _sum(three_halves.high, three_halves.low + y * _polynomial(SINE, q))  # the last entry is pi/2 - 3/2
    one_less = _sum(torch.ones_like(q), -q)
    cosine = _sum(one_less.high, one_less.low - q * _polynomial(COSINE, q))  # the last entry is pi^2/8 - 1
    return sine, cosine


def _product(x: Twofold, y: Twofold) -> Tensor:
    """x * y, rounded once but for a thousandth of an ulp."""
    high = x.high * y.high
    a, b = _halves(x.high), _halves(y.high)
    error = ((a.high * b.high - high) + (a.high * b.low + a.low * b.high)) + a.low * b.low
    return high + (error + (x.high * y.low + x.low * y.high))


def normals(word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals of two words."""
    r = radius(minus_twice_logarithm(word))
    quarter, y = angle(angle_word)
    sine, cosine = sine_cosine(y)
    on, across = _product(r, cosine), _product(r, sine)
    # Turned by the quarters: (c, s), (-s, c), (-c, -s), (s, -c).
    odd = quarter % 2 == 1
    first, second = torch.where(odd, across, on), torch.where(odd, on, across)
    return torch.where((quarter + 1) & 2 != 0, -first, first), torch.where(quarter & 2 != 0, -second, second)
