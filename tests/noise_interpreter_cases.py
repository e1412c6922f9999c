"""Keyed noise in Triton under its interpreter, against ops.reference_noise, to the last bit.

Run by tests/test_noise.py in a process of its own: TRITON_INTERPRET=1 must be set before the kernel is decorated.
"""

from __future__ import annotations

import os

import torch

from flowmatch_kernels import FlowMatching, KeyedNoise

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("run tests/test_noise.py: this file needs TRITON_INTERPRET=1 from the start")

cases = 0
noise = KeyedNoise(0x9234567887654321, first=(1 << 32) - 2, stream=40000)
shapes = [(1,), (4,), (7,), (64, 2), (511,), (512,), (1025,), (3, 5, 7)]
every = [(x_dims, torch.float32) for x_dims in shapes]
every += [(x_dims, dtype) for x_dims in shapes[2:5:2] for dtype in (torch.float64, torch.bfloat16, torch.float16)]
for x_dims, dtype in [*every, ((515,), torch.bfloat16)]:
    got = noise.draw(5, x_dims, dtype=dtype, evaluation=65535, backend="triton")
    wanted = noise.draw(5, x_dims, dtype=dtype, evaluation=65535, backend="reference")
    assert torch.equal(got, wanted), (x_dims, dtype, int((got != wanted).sum()))
    cases += 1
assert noise.draw(0, (3,), backend="triton").shape == (0, 3)
assert noise.draw(3, (0,), backend="triton").shape == (3, 0)


def step_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * t


by_triton = FlowMatching(6, backend="triton").sample(3, step_fn, noise=[KeyedNoise(s) for s in (1, 2, 1 << 63)])
by_reference = FlowMatching(6, backend="reference").sample(3, step_fn, noise=[KeyedNoise(s) for s in (1, 2, 1 << 63)])
assert torch.equal(by_triton, by_reference)
os.write(1, f"{cases} cases\n".encode())
