"""NVIDIA Isaac GR00T N1.6 and N1.7: the sampling loop of the action head, replaced by one line.

    from flowmatch_kernels.integrations import gr00t
    gr00t.accelerate(policy)

GR00T's step is `actions + dt * velocity * strength`, where real-time chunking has a strength of its own for each entry:
0 for the actions that are being executed already, then a ramp, then 1. Here that is one launch a step
(`sample(velocity_strength=)`), and without real-time chunking the plain one.

Source: github.com/NVIDIA/Isaac-GR00T, gr00t/model/gr00t_n1d6/gr00t_n1d6.py (040fccf) and
gr00t/model/gr00t_n1d7/gr00t_n1d7.py (2d1e82f).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..flow_matching import FlowMatching
from ..step_functions import StepFunction
from .euler import euler, is_plain
from .replacement import check_known

logger = logging.getLogger("flowmatch_kernels")

_METHOD = "get_action_with_features"


class Chunking(NamedTuple):
    """Real-time chunking: the start of a chunk of actions is the one before it, and is not free to move."""

    actions: Tensor
    """[B, overlap, action_dim]: what the first actions start from, instead of noise."""
    overlap: int
    """The actions that the two chunks share."""
    frozen: int
    """The first of them, which stay as they are."""
    ramp_rate: float
    """How fast the strength of the others rises."""


def _n1d6(head: Any, given: Mapping[str, Any]) -> Chunking | None:
    overlap, action_input = head.inference_rtc_overlap_steps, given["action_input"]
    if overlap is None:
        return None
    if "action" not in action_input.keys():  # noqa: SIM118  # a BatchFeature, asked as GR00T asks it
        logger.warning("real-time chunking is on, and there is no action in the input: it is left out, as by GR00T")
        return None
    return Chunking(action_input["action"][:, :overlap], overlap, head.inference_rtc_frozen_steps, head.rtc_ramp_rate)


def _n1d7(head: Any, given: Mapping[str, Any]) -> Chunking | None:
    action_input, options = given["action_input"], given.get("options") or {}
    if "action" not in action_input:
        return None
    names = "action_horizon", "rtc_overlap_steps", "rtc_frozen_steps", "rtc_ramp_rate"
    missing = [name for name in names if name not in options]
    if missing:
        raise ValueError(f"real-time chunking needs {', '.join(missing)} in options: got {options!r:.60}")
    horizon, overlap, frozen, rate = (options[name] for name in names)
    return Chunking(action_input["action"][:, horizon - overlap : horizon], overlap, frozen, rate)


KNOWN: dict[str, tuple[str, Callable[[Any, Mapping[str, Any]], Chunking | None]]] = {
    "4a08eacf690b733a": ("N1.6 (040fccf)", _n1d6),
    "4efcbe70d8c2bcdd": ("N1.7 (2d1e82f)", _n1d7),
}
"""The versions of `get_action_with_features` that `accelerate` replaces: `fingerprint` to what it is called, and where
it finds its real-time chunking."""


def rtc_strength(like: Tensor, overlap: int, frozen: int, ramp_rate: float) -> Tensor:
    """The strength of real-time chunking, for `FlowMatching.sample(velocity_strength=)`.

    Args:
        like: The actions, [B, action_horizon, action_dim]; its shape, dtype and device.
        overlap: The first actions, which the chunk before has too.
        frozen: How many of them stay as they are; up to overlap.
        ramp_rate: r: over the others the strength is (1 - exp(-r*s)) / (1 - exp(-r)), s rising from 0 to 1.

    Raises:
        ValueError: frozen is not in [0, overlap], or overlap not in [0, action_horizon].

    Returns:
        0 for the frozen actions, the ramp, and 1 for the rest.

    Example:
        >>> import torch
        >>> from flowmatch_kernels.integrations import gr00t
        >>> gr00t.rtc_strength(torch.zeros(1, 5, 1), 3, 2, 5.0).flatten()
        tensor([0.0000, 0.0000, 0.9241, 1.0000, 1.0000])
    """
    if not 0 <= frozen <= overlap <= like.shape[1]:
        raise ValueError(
            f"wanted 0 <= frozen <= overlap <= {like.shape[1]} actions, got frozen {frozen} and overlap {overlap}"
        )
    strength = torch.ones_like(like)
    strength[:, :frozen] = 0.0
    rise = 1 - torch.exp(-ramp_rate * torch.linspace(0.0, 1.0, overlap - frozen + 2, device=like.device))
    strength[:, frozen:overlap] = (rise / rise[-1].clamp_min(1e-8))[1:-1, None]
    return strength


def accelerate(policy: Any, **options: Any) -> Any:
    """Replaces the sampling loop of a GR00T policy, model or action head by ours: the same actions, to the last bit.

    Args:
        policy: A `Gr00tPolicy`, its model, or the model's action head. Changed in place.
        **options: Of `FlowMatching`, as int_method="ab2" or backend="cuda". Real-time chunking needs "euler".

    Returns:
        The policy.

    Raises:
        TypeError: there is no action head with `get_action_with_features`.
        ValueError: an option has a value that cannot be used.
        RuntimeError: the action head is a version that is not known here; the message names those that are.

    Example:
        >>> from flowmatch_kernels.integrations import gr00t
        >>> gr00t.accelerate(policy).get_action(observation)  # doctest: +SKIP
    """
    head = _head(policy)
    method = getattr(type(head), _METHOD)
    found = check_known(type(head), _METHOD, KNOWN, (name for name, _ in KNOWN.values()), "GR00T's")
    sampler = FlowMatching((head.config.action_horizon, head.action_dim), **{"step_rounding": "exact"} | options)
    setattr(head, _METHOD, _loop(head, method, sampler, not options, KNOWN[found][1]))
    return policy


def restore(policy: Any) -> Any:
    """Puts back the loop that `accelerate` replaced; nothing, where it replaced none.

    Args:
        policy: As for `accelerate`. Changed in place.

    Returns:
        The policy.

    Raises:
        TypeError: there is no action head with `get_action_with_features`.
    """
    vars(_head(policy)).pop(_METHOD, None)
    return policy


def _loop(
    head: Any,
    method: Callable[..., Any],
    sampler: FlowMatching,
    plain_steps: bool,
    chunking: Callable[[Any, Mapping[str, Any]], Chunking | None],
) -> Callable[..., Any]:
    plain: Any = inspect.unwrap(method)
    signature, batch_feature = inspect.signature(plain), plain.__globals__["BatchFeature"]
    parameters = {name: p.default is p.empty for name, p in list(signature.parameters.items())[1:]}
    needed = {name for name, is_needed in parameters.items() if is_needed}

    @torch.no_grad()
    def get_action_with_features(*arguments: Any, **named: Any) -> Any:
        """The actions, [B, action_horizon, action_dim], in "action_pred"; see GR00T's method of this name."""
        given: Mapping[str, Any] = named
        if arguments or not needed <= named.keys() <= parameters.keys():
            given = signature.bind(head, *arguments, **named).arguments
        features = given["backbone_features"]
        size = features.shape[0], head.config.action_horizon, head.action_dim
        actions = torch.randn(size=size, dtype=features.dtype, device=features.device)
        chunk, strength = chunking(head, given), None
        if chunk is not None:
            actions[:, : chunk.overlap] = chunk.actions
            strength = rtc_strength(actions, chunk.overlap, chunk.frozen, chunk.ramp_rate)
        steps, buckets, velocity = head.num_inference_timesteps, head.num_timestep_buckets, _velocity(head, given)
        if plain_steps and is_plain(actions):
            times = _buckets(steps, buckets, actions.device)
            actions = euler(lambda x, t, step: velocity(x, t), actions, times, 1.0 / steps, strength)
        else:
            actions = sampler.sample(
                size[0],
                # GR00T's int(k / N * buckets), in double
                StepFunction(velocity, time_as="batch", time_scale=buckets, time_dtype=torch.int64),
                features.device,
                noise=actions,
                time_steps=torch.arange(steps + 1, dtype=torch.float64) / steps,
                step_sizes=[1.0 / steps] * steps,
                velocity_strength=strength,
            )
        return batch_feature(
            data={
                "action_pred": actions,
                "backbone_features": features,
                "state_features": given["state_features"],
            }
        )

    return get_action_with_features


@functools.cache  # one that is dropped might be in use on a stream
def _buckets(steps: int, buckets: int, device: torch.device) -> Tensor:
    """GR00T's time of each step, int64 [N]."""
    with torch.inference_mode(False):
        return torch.tensor([int(k / steps * buckets) for k in range(steps)], device=device)


def _velocity(head: Any, given: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The network of the action head: velocity(x, t), with t the time's bucket, int64 [B]."""
    state_features, embodiment = given["state_features"], given["embodiment_id"]
    features, backbone_output = given["backbone_features"], given["backbone_output"]
    masks = {}
    if head.config.use_alternate_vl_dit:
        masks = {
            "image_mask": backbone_output.image_mask,
            "backbone_attention_mask": backbone_output.backbone_attention_mask,
        }

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        embedded = head.action_encoder(x, t, embodiment)
        if head.config.add_pos_embed:
            positions = torch.arange(embedded.shape[1], dtype=torch.long, device=embedded.device)
            embedded = embedded + head.position_embedding(positions).unsqueeze(0)
        hidden = torch.cat((state_features, embedded), dim=1)
        output = head.model(hidden_states=hidden, encoder_hidden_states=features, timestep=t, **masks)
        decoded: Tensor = head.action_decoder(output, embodiment)
        return decoded[:, -head.action_horizon :]

    return velocity


def _head(policy: Any) -> Any:
    """The action head of a policy or a model, or the head itself.

    Raises:
        TypeError: there is none.
    """
    model = getattr(policy, "model", None)
    for head in (policy, getattr(policy, "action_head", None), getattr(model, "action_head", None)):
        if isinstance(head, nn.Module) and hasattr(type(head), _METHOD):
            return head
    raise TypeError(
        "wanted a GR00T policy, its model or its action head (N1.6 or N1.7), got a "
        f"{type(policy).__module__}.{type(policy).__qualname__}"
    )
