"""Keyed noise in Triton, its arithmetic: Philox, and two normals of two words.

`ops.keyed_noise` is the contract, `ops.reference_noise` the definition; names agree.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10, words in uint32."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1 = high1 ^ c1 ^ k0, low1
        c2, c3 = high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(key, block, evaluation, mask):
    """Philox's four words of a counter: of a sample's key, a pointer to its row, and element // 4."""
    seed = tl.load(key, mask, other=0)
    index = tl.load(key + 1, mask, other=0)
    stream = tl.load(key + 2, mask, other=0)
    return philox(
        block.to(tl.uint32),
        ((block >> 32) | ((index >> 32) << 16)).to(tl.uint32),
        (stream | (evaluation << 16)).to(tl.uint32),
        index.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def _sum(x, y):
    """x + y, exactly, as high and low; |x| >= |y|, or x is 0."""
    high = x + y
    return high, y - (high - x)


@triton.jit
def _halves(x):
    """The leading 12 bits of x, and the rest."""
    high = (x.to(tl.uint32, bitcast=True) & 0xFFFFF000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def minus_twice_logarithm(word):
    """-2 ln u of a word's uniform, as high and low."""
    upper = word >= 0x80000000
    distance = (tl.where(upper, word ^ 0xFFFFFFFF, word) * 2 + 1).to(tl.float32)
    bits = distance.to(tl.uint32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    exponent = (bits >> 23).to(tl.int32) - 127
    d = distance * 1.1641532182693481e-10  # 2^-33
    near = distance < 2515933696.0
    f = tl.where(upper, tl.where(near, -d, 1.0 - (d + d)), mantissa - 1.0)
    n = tl.where(upper, tl.where(near, 0, 1), 33 - exponent).to(tl.float32)

    square = f * f
    p = f * 0.06918781250715256 + -0.11794884502887726
    p = p * f + 0.1187414899468422
    p = p * f + -0.12383755296468735
    p = p * f + 0.14218482375144958
    p = p * f + -0.16669267416000366
    p = p * f + 0.20002231001853943
    p = p * f + -0.24999986588954926
    p = p * f + 0.3333331048488617
    rest = (square * 0.5 - (f * square) * p) + n * -2.1219444170128554e-4
    leading, leading_low = _sum(n * 0.693359375, -f)
    high, low = _sum(leading, leading_low + rest)
    return high + high, low + low


@triton.jit
def _remainder(x, root):
    """x - root * root, exactly; root is the square root of x, rounded."""
    a, b = _halves(root)
    return ((x - a * a) - (a + a) * b) - b * b


@triton.jit
def radius(high, low):
    """The square root, and what it leaves, by one step of Newton's from half a percent of 1/sqrt."""
    root = tl.sqrt_rn(high)
    left = _remainder(high, root) + low
    inverse = (0x5F3759DF - (high.to(tl.uint32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    inverse = inverse * (1.5 - ((high * 0.5) * inverse) * inverse)
    return root, (left * 0.5) * inverse


@triton.jit
def _product(x, x_low, y, y_low):
    """(x + x_low) * (y + y_low), rounded once but for a thousandth of an ulp."""
    high = x * y
    a, b = _halves(x)
    c, d = _halves(y)
    error = ((a * c - high) + (a * d + b * c)) + b * d
    return high + (error + (x * y_low + x_low * y))


@triton.jit
def normals(word, angle):
    """Two float32 normals of two words."""
    square, square_low = minus_twice_logarithm(word)
    root, root_low = radius(square, square_low)
    quarter = (angle + 0x20000000) >> 30
    offset = (angle - (quarter << 30)).to(tl.int32, bitcast=True)
    y = (offset * 2 + 1).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    q = y * y
    three_halves, three_halves_low = _sum(y, y * 0.5)
    p = q * 0.0001247044710908085 + -0.004664550069719553
    p = p * q + 0.07968997955322266
    p = p * q + -0.6459639668464661
    p = p * q + 0.07079632580280304
    sine, sine_low = _sum(three_halves, three_halves_low + y * p)
    one_less, one_less_low = _sum(1.0, -q)
    p = q * -0.000904374523088336 + 0.020860442891716957
    p = p * q + -0.25366926193237305
    p = p * q + 0.23370054364204407
    cosine, cosine_low = _sum(one_less, one_less_low - q * p)
    on, across = _product(root, root_low, cosine, cosine_low), _product(root, root_low, sine, sine_low)
    odd = (quarter & 1) != 0
    first, second = tl.where(odd, across, on), tl.where(odd, on, across)
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    second = tl.where((quarter & 2) != 0, -second, second)
    return first, second
