"""Float arithmetic of PTX on numpy arrays: one rounding an instruction, to nearest even.

Values of 16 bits are held as float32, in which every one of them is exact, and come back as bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

HALVES = ("f16", "bf16")


def widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """The float32 values of 16-bit floats, exactly."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _two_sum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x + y, rounded, and what the rounding lost (Knuth)."""
    total = x + y
    t = total - x
    return total, (x - (total - t)) + (y - t)


def add_to_odd(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y in float64, rounded to odd: a later rounding to fewer bits is then that of the exact sum."""
    total, lost = _two_sum(x, y)
    bits = total.view(np.int64)
    inexact = (lost != 0) & ((bits & 1) == 0) & np.isfinite(total) & np.isfinite(lost)
    return np.where(inexact, bits + np.where((lost > 0) == (total > 0), 1, -1), bits).view(np.float64)


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Float32 values, rounded to bfloat16."""
    bits = x.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """Float64 values, rounded once to `kind`: float values, or bits where it has 16 of them."""
    if kind == "f64":
        return x
    if kind == "f32":
        return x.astype(np.float32)
    if kind == "f16":
        return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))
    # By way of a float32 that is rounded to odd.
    near = x.astype(np.float32)
    lost = np.where(np.isinf(x), 0, x - near.astype(np.float64))
    inward = np.where((lost < 0) & (near > 0) | (lost > 0) & (near < 0), np.nextafter(near, np.float32(0)), near)
    odd = inward.view(np.uint32) | ((inward.astype(np.float64) != x) & ~np.isnan(x))
    return bfloat16_bits(odd.astype(np.uint32).view(np.float32))


def _fma_float32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    product = x.astype(np.float64) * y.astype(np.float64)  # exact
    return add_to_odd(product, z.astype(np.float64)).astype(np.float32)


_NATIVE = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
_IN_FLOAT64 = {"add": add_to_odd, "sub": lambda x, y: add_to_odd(x, -y), "mul": np.multiply}


def operation(name: str, kind: str) -> Callable[..., np.ndarray]:
    """add, sub, mul, div or fma of one type: on values, to values, or to bits where the type has 16.

    Raises:
        KeyError: there is no such operation here.
    """
    if kind == "f32" and name == "fma":
        return _fma_float32
    if kind not in HALVES:
        return _NATIVE[name]
    exact = _IN_FLOAT64[name]
    return lambda *values: rounded(exact(*(x.astype(np.float64) for x in values)), kind)
