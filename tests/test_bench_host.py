"""bench/host.py, and what a row on a GPU's way does not do on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptx import cuda_runtime

from flowmatch_kernels import FlowMatching
from flowmatch_kernels.ops import dispatch, reference


def test_rows() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its launches are not timed")
    from bench import host

    lines = {line["what"]: line for line in host.table(host.measured(0.2))}
    assert len(lines) == 7 + 2 * (cuda_runtime.unavailable() is None)
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
