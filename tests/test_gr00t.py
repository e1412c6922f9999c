"""GR00T's sampling loop replaced: the same actions, with real-time chunking and without, to the last bit."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from operands import assert_same_bits
from torch import Tensor, nn

from flowmatch_kernels.integrations import gr00t, replacement

HORIZON, DIM, WIDTH, BUCKETS = 9, 4, 6, 1000


class BatchFeature(dict):  # type: ignore[type-arg]
    """As transformers' own."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)

    def __getattr__(self, name: str) -> Any:
        return self[name]


def loop(head: Any, x: Tensor, strength: Tensor, state: Tensor, embodiment: Tensor, features: Tensor) -> Tensor:
    """GR00T's loop, from facts: dt is a number, the bucket int(k / N * 1000), the step dt * v * strength."""
    n = head.num_inference_timesteps
    for k in range(n):
        bucket = torch.full((x.shape[0],), int(k / float(n) * head.num_timestep_buckets))
        head.seen.append(bucket.tolist())
        tokens = head.action_encoder(x, bucket, embodiment)
        if head.config.add_pos_embed:
            tokens = tokens + head.position_embedding(torch.arange(tokens.shape[1])).unsqueeze(0)
        tokens = torch.cat((state, tokens), 1)
        output = head.model(hidden_states=tokens, encoder_hidden_states=features, timestep=bucket)
        v = head.action_decoder(output, embodiment)[:, -head.action_horizon :]
        x = x + 1.0 / n * v * strength
    return x


class Encoder(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, out)

    def forward(self, x: Tensor, bucket: Tensor, embodiment: Tensor | None = None) -> Tensor:
        return torch.sin(self.layer(x)) + (bucket / BUCKETS).to(x.dtype).view(-1, 1, 1)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **masks: Tensor
    ) -> Tensor:
        assert timestep.dtype == torch.int64
        hidden = torch.cos(self.layer(hidden_states)) + encoder_hidden_states.mean(1, keepdim=True)
        return hidden * masks["image_mask"].sum() if masks else hidden


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, DIM)

    def forward(self, x: Tensor, embodiment: Tensor) -> Tensor:
        return self.layer(x)


class Head(nn.Module):
    """What ours needs of GR00T's action heads, and no more."""

    def __init__(self, dtype: torch.dtype, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = types.SimpleNamespace(action_horizon=HORIZON, add_pos_embed=True, use_alternate_vl_dit=masked)
        self.action_horizon, self.action_dim = HORIZON, DIM
        self.num_inference_timesteps, self.num_timestep_buckets = 10, BUCKETS
        self.action_encoder, self.model, self.action_decoder = Encoder(DIM, WIDTH), Transformer(), Decoder()
        self.position_embedding = nn.Embedding(HORIZON, WIDTH)
        self.seen: list[list[int]] = []
        self.to(dtype)

    def draw(self, features: Tensor) -> Tensor:
        return torch.randn(size=(features.shape[0], HORIZON, DIM), dtype=features.dtype)


class N1d6(Head):
    inference_rtc_overlap_steps: int | None = None
    inference_rtc_frozen_steps, rtc_ramp_rate = 2, 6.0

    @torch.no_grad()
    def get_action_with_features(
        self,
        backbone_features: Tensor,
        action_input: Any,
        state_features: Tensor,
        embodiment_id: Tensor,
        backbone_output: Any,
    ) -> BatchFeature:
        x, overlap = self.draw(backbone_features), self.inference_rtc_overlap_steps
        strength = torch.ones_like(x)
        if overlap is not None and "action" in action_input:
            x[:, :overlap] = action_input["action"][:, :overlap]
            strength = ramp(x, overlap, self.inference_rtc_frozen_steps, self.rtc_ramp_rate)
        x = loop(self, x, strength, state_features, embodiment_id, backbone_features)
        data = {"action_pred": x, "backbone_features": backbone_features, "state_features": state_features}
        return BatchFeature(data=data)


class N1d7(Head):
    @torch.no_grad()
    def get_action_with_features(
        self,
        backbone_features: Tensor,
        state_features: Tensor,
        embodiment_id: Tensor,
        backbone_output: Any,
        action_input: Any,
        options: dict[str, Any] | None = None,
    ) -> BatchFeature:
        x = self.draw(backbone_features)
        strength = torch.ones_like(x)
        if "action" in action_input:
            assert options is not None
            overlap, horizon = options["rtc_overlap_steps"], options["action_horizon"]
            x[:, :overlap] = action_input["action"][:, horizon - overlap : horizon]
            strength = ramp(x, overlap, options["rtc_frozen_steps"], options["rtc_ramp_rate"])
        x = loop(self, x, strength, state_features, embodiment_id, backbone_features)
        data = {"action_pred": x, "backbone_features": backbone_features, "state_features": state_features}
        return BatchFeature(data=data)


def ramp(x: Tensor, overlap: int, frozen: int, rate: float) -> Tensor:
    """0, then (1 - exp(-r*s)) / (1 - exp(-r)) without its ends, then 1."""
    strength = torch.ones_like(x)
    strength[:, :frozen] = 0.0
    s = 1 - torch.exp(-rate * torch.linspace(0.0, 1.0, overlap - frozen + 2))
    strength[:, frozen:overlap] = (s / s[-1].clamp_min(1e-8))[1:-1][None, :, None]
    return strength


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
    arguments = given(head, dtype, chunked)
    method: Any = head.get_action_with_features
    torch.manual_seed(7)
    wanted, buckets = method(**arguments), list(head.seen)
    after = torch.random.get_rng_state()
    policy = types.SimpleNamespace(model=types.SimpleNamespace(action_head=head))
    assert gr00t.accelerate(policy) is policy
    times: list[list[int]] = []
    head.action_encoder.register_forward_pre_hook(lambda _, args: times.append(args[1].tolist()))
    torch.manual_seed(7)
    method = head.get_action_with_features
    got = method(**arguments)
    assert type(got) is BatchFeature
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(got[name], value, name)
    assert times == buckets
    assert torch.equal(torch.random.get_rng_state(), after)
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
