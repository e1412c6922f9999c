"""GR00T's action heads and their sampling loop, written from facts: the oracle of the tests and of the benchmark.

Knows nothing of the package.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

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
        self.to(dtype)

    def draw(self, features: Tensor) -> Tensor:
        return torch.randn(size=(features.shape[0], self.action_horizon, self.action_dim), dtype=features.dtype)


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
