"""GR00T's sampling loop replaced: the same actions, with real-time chunking and without, to the last bit."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from gr00t_loop import DIM, HORIZON, WIDTH, BatchFeature, Head, N1d6, N1d7
from operands import assert_same_bits
from torch.utils.flop_counter import FlopCounterMode

from flowmatch_kernels.integrations import gr00t, replacement


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins count as the versions that they stand for."""
    for kind, found in ((N1d6, gr00t._n1d6), (N1d7, gr00t._n1d7)):
        key = replacement.fingerprint(kind.get_action_with_features)
        monkeypatch.setitem(gr00t.KNOWN, key, ("the stand-in", found))


def given(head: Head, dtype: torch.dtype, chunked: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 5, WIDTH, generator=generator).to(dtype)
    before = torch.randn(2, HORIZON, DIM, generator=generator).to(dtype)
    arguments = {
        "backbone_features": features,
        "state_features": torch.randn(2, 1, WIDTH, generator=generator).to(dtype),
        "embodiment_id": torch.zeros(2, dtype=torch.long),
        "backbone_output": BatchFeature({"image_mask": torch.ones(2), "backbone_attention_mask": torch.ones(2)}),
        "action_input": BatchFeature({"action": before} if chunked else {}),
    }
    if chunked and isinstance(head, N1d6):
        head.inference_rtc_overlap_steps = 5
    elif chunked:
        names = {"action_horizon": HORIZON - 1, "rtc_overlap_steps": 5, "rtc_frozen_steps": 2, "rtc_ramp_rate": 6.0}
        arguments["options"] = names
    return arguments


@pytest.mark.parametrize("kind", [N1d6, N1d7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunked", [False, True])
def test_actions(kind: type[Head], dtype: torch.dtype, chunked: bool) -> None:
    head = kind(dtype)
    head.num_inference_timesteps = 7 if chunked else 10
    arguments = given(head, dtype, chunked)
    method: Any = head.get_action_with_features
    times: list[list[int]] = []
    head.action_encoder.register_forward_pre_hook(lambda _, args: times.append(args[1].tolist()))
    torch.manual_seed(7)
    wanted, buckets = method(**arguments), list(times)
    after = torch.random.get_rng_state()
    policy = types.SimpleNamespace(model=types.SimpleNamespace(action_head=head))
    assert gr00t.accelerate(policy) is policy
    times.clear()
    torch.manual_seed(7)
    method = head.get_action_with_features
    got = method(**arguments)
    assert type(got) is BatchFeature
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(got[name], value, name)
    assert times == buckets
    assert torch.equal(torch.random.get_rng_state(), after)
    torch.manual_seed(7)
    with FlopCounterMode(display=False):  # a mode that watches: by sample(), and the same
        assert_same_bits(method(**arguments)["action_pred"], wanted["action_pred"])
    gr00t.restore(policy)
    assert "get_action_with_features" not in vars(head)
    torch.manual_seed(7)
    method = head.get_action_with_features
    assert_same_bits(method(**arguments)["action_pred"], wanted["action_pred"])


def test_masks_reach_the_network() -> None:
    head = N1d7(torch.float32, masked=True)
    arguments = given(head, torch.float32, False)
    gr00t.accelerate(head)
    method: Any = head.get_action_with_features
    torch.manual_seed(0)
    found = method(**arguments)["action_pred"]
    arguments["backbone_output"]["image_mask"] = torch.zeros(2)
    torch.manual_seed(0)
    assert not torch.equal(method(**arguments)["action_pred"], found)


def test_another_solver_and_fewer_steps() -> None:
    head = N1d7(torch.float32)
    arguments = given(head, torch.float32, False)
    method: Any = gr00t.accelerate(head, int_method="ab2").get_action_with_features
    assert method(**arguments)["action_pred"].shape == (2, HORIZON, DIM)
    arguments = given(head, torch.float32, True)
    with pytest.raises(ValueError, match=r"velocity_strength.*'ab2'"):
        method(**arguments)


def test_errors() -> None:
    head = N1d7(torch.float32)
    arguments = given(head, torch.float32, True)
    del arguments["options"]["rtc_ramp_rate"]
    method: Any = gr00t.accelerate(head).get_action_with_features
    with pytest.raises(ValueError, match="needs rtc_ramp_rate in options"):
        method(**arguments)
    with pytest.raises(TypeError, match=r"wanted a GR00T policy.*got a builtins.int"):
        gr00t.accelerate(3)
    with pytest.raises(ValueError, match="got frozen 4 and overlap 3"):
        gr00t.rtc_strength(torch.zeros(1, 5, 1), 3, 4, 1.0)

    class Newer(N1d7):
        def get_action_with_features(self, **arguments: Any) -> Any:  # type: ignore[override]
            return arguments

    with pytest.raises(RuntimeError, match=r"not known here.*N1.6 \(040fccf\), N1.7 \(2d1e82f\)"):
        gr00t.accelerate(Newer(torch.float32))


def test_a_chunk_without_actions_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    head = N1d6(torch.float32)
    head.inference_rtc_overlap_steps = 3
    method: Any = gr00t.accelerate(head).get_action_with_features
    method(**given(head, torch.float32, False))
    assert "no action in the input" in caplog.text
