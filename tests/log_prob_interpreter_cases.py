"""step_log_prob in Triton under its interpreter, against ops.reference_log_prob, to the last bit.

Run by tests/test_step_log_prob.py in a process of its own: TRITON_INTERPRET=1 must be set before the kernel is
decorated.
"""

from __future__ import annotations

import os

import torch
from log_prob_operands import PAIRS, SIZES, drawn
from operands import Guarded, assert_same_bits

from flowmatch_kernels.ops import dispatch
from flowmatch_kernels.ops.reference_log_prob import step_log_prob

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("run tests/test_step_log_prob.py: this file needs TRITON_INTERPRET=1 from the start")

run = dispatch.choose("triton", "cpu").load_log_prob()
cases = 0
tried = [(n, torch.float32, v) for n in SIZES for v in (torch.float32, torch.bfloat16)]
for n, state, velocity in [*tried, *((n, *pair) for n in (1025, 2048) for pair in PAIRS)]:
    for special, own_rows in ((False, False), (True, False), (True, True)):
        operands = drawn([3, n], state, velocity, special, own_rows=own_rows)
        out = Guarded([3], operands[3].dtype)
        run(out.tensor, *operands, 1)
        assert out.intact()
        assert_same_bits(out.tensor, step_log_prob(*operands, 1), f"{n} {state} {velocity}")
        cases += 1
base, v, next, *tables = drawn([3, 32, 40], torch.float32, torch.float32)
v = v.transpose(1, 2).contiguous().transpose(1, 2)
assert_same_bits(dispatch.step_log_prob(base, v, next, *tables, 0, "triton"), step_log_prob(base, v, next, *tables, 0))
off = torch.empty(base.numel() + 1)[1:].view(base.shape).copy_(base)  # not on a 16-byte boundary
assert_same_bits(dispatch.step_log_prob(off, v, next, *tables, 0, "triton"), step_log_prob(base, v, next, *tables, 0))
tables[0][0, 0] = float("inf")  # times 0, where nothing stands, it would be NaN
assert_same_bits(dispatch.step_log_prob(base, v, next, *tables, 0, "triton"), torch.full([3], -float("inf")))
assert dispatch.step_log_prob(base[:0], v[:0], next[:0], *tables, 0, "triton").shape == (0,)
os.write(1, f"{cases} cases\n".encode())
