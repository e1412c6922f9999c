"""bench/host.py, and what a row on a GPU's way does not do on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptx import cuda_runtime

from flowmatch_kernels import FlowMatching
from flowmatch_kernels.ops import dispatch, native, reference


def test_rows() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its launches are not timed")
    from bench import host

    lines = {line["what"]: line for line in host.table(host.measured(0.2))}
    assert len(lines) == 6 + (cuda_runtime.unavailable() is None)
    assert all(line["low"] <= line["median"] <= line["high"] for line in lines.values())
    assert lines["launch, Triton's JIT"]["of_jit"] == 1.0


@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode_is_left_only_where_it_is_on(inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context costs the host microseconds: none is entered in a row, but under inference mode, for its state."""
    ours = lambda o: reference.fused_step_(o)  # noqa: E731  # else the loop takes the reference's own way
    serving = dispatch.Backend("triton", (), lambda _: None, lambda: ours)
    monkeypatch.setitem(dispatch.BACKENDS, "triton", serving)
    fm, entered = FlowMatching(2), []

    class Counted(torch.inference_mode):
        def __enter__(self) -> Any:
            entered.append(True)
            return super().__enter__()

    with torch.inference_mode(inference):
        noise = torch.zeros(3, 2)
        monkeypatch.setattr(torch, "inference_mode", Counted)
        counts = []
        for steps in (4, 8):
            entered.clear()
            x = fm.sample(3, lambda x, t: x, inference_step=steps, noise=noise, backend="triton")
            counts.append(len(entered))
            assert not x.is_inference()
    assert counts[1] - counts[0] == (4 if inference else 0)


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
def test_velocities_that_are_readable_at_once() -> None:
    """Plain tensors of the state's shape and device, of one dtype that is not wider; strides do not matter."""
    strided = torch.zeros(4, 3).T, torch.zeros(1, 4).expand(3, 4)
    base, bf16 = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bfloat16)

    class Subclass(torch.Tensor):
        pass

    yes = [(base, None), (base, base), (bf16, None), (bf16, bf16), strided]
    no = [base.double(), base[:2], base[None], base.int(), base.to("meta"), base.to_sparse()]
    no += [base.as_subclass(Subclass), None, 1.0, torch.nested.nested_tensor([torch.zeros(4)] * 3)]
    assert [native.readable(base, *pair) for pair in yes] == [True] * 5
    assert [native.readable(base, v, None) for v in no] == [False] * 10
    assert [native.readable(base, base, u) for u in [*no[:-3], *no[-2:], bf16]] == [False] * 10
    assert not native.readable(bf16, base, None)
    with pytest.raises(TypeError, match="takes base, v and u"):
        native.readable(base, base)


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
def test_what_is_the_same_memory_at_once() -> None:
    x = torch.zeros(3, 3)
    assert native.same_memory(x, x.detach())
    others = [x.clone(), x[:2], x.T, x.view(9), torch._neg_view(x), torch._efficientzerotensor((3, 3)), None]
    assert [native.same_memory(x, y) for y in others] == [False] * 7
