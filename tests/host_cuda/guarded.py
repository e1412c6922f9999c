"""Buffers that AddressSanitizer guards."""

from __future__ import annotations

import torch


class Guarded:
    """A tensor that ends where its memory ends, for AddressSanitizer; off by one element, between canaries.

    torch takes a tensor's memory from the heap that AddressSanitizer guards, by the byte.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        margin = 0 if aligned else 64
        start = margin + (0 if aligned else dtype.itemsize)
        self.bytes = torch.full((start + size + margin,), 0xA5, dtype=torch.uint8)
        self._inside = slice(start, start + size)
        self.tensor = self.bytes[self._inside].view(dtype).view(shape)
        assert size == 0 or (self.tensor.data_ptr() % 16 == 0) == aligned

    def touched(self) -> bool:
        outside = self.bytes.clone()
        outside[self._inside] = 0xA5
        return bool((outside != 0xA5).any())
