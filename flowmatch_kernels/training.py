"""Training pairs: what is checked, the loss, and where on the path from noise to data a network is trained most.

Time runs from the noise at t = 0 to the data at t = 1. Each sampler takes the batch size and a device, draws once from
the device's default generator, and returns [B] in torch's default dtype. To add one, write such a function and enter it
in `TIME_SAMPLERS`. "beta", which keeps a distribution, is in `FlowMatching`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import check_dense, shown


def uniform(batch_size: int, device: torch.device) -> Tensor:
    """t = u, with u uniform over [0, 1).

    Args:
        batch_size: B.
        device: Where t is drawn.

    Returns:
        [B], in [0, 1).

    Source: Flow Matching for Generative Modeling, arXiv 2210.02747, eq. 5.
    """
    return torch.rand((batch_size,), device=device)


def logit_normal(batch_size: int, device: torch.device) -> Tensor:
    """t = 1 / (1 + exp(-z)), with z normal: most in the middle, little at the ends.

    Args:
        batch_size: B.
        device: Where t is drawn.

    Returns:
        [B], in (0, 1).

    Source: Scaling Rectified Flow Transformers, arXiv 2403.03206, sec. 3.1, eq. 19, with m = 0 and s = 1: symmetric, so
    the same whichever end is the noise.
    """
    return torch.sigmoid(torch.randn((batch_size,), device=device))


def cosine(batch_size: int, device: torch.device) -> Tensor:
    """t = 1 - 1 / (tan(pi*u/2) + 1), with u uniform over [0, 1): density 2 / (pi - 2*pi*t + 2*pi*t^2).

    The noise levels of a cosine schedule; twice as many in the middle as at the ends.

    Args:
        batch_size: B.
        device: Where t is drawn.

    Returns:
        [B], in [0, 1].

    Source: Scaling Rectified Flow Transformers, arXiv 2403.03206, sec. 3.1, eq. 21 ("CosMap"): symmetric too.
    """
    u = torch.rand((batch_size,), device=device)
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


TIME_SAMPLERS: dict[str, Callable[[int, torch.device], Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "cosine": cosine,
}


def check_data(x: Tensor) -> None:
    """Raises where no training pair can be made of x.

    Raises:
        TypeError: x is no floating-point tensor, or is sparse or nested.
        ValueError: x has no dimension.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else shown(x)
        raise TypeError(f"x must be a floating-point tensor [B, *x_dims], got {got}")
    check_dense(x, "x")
    if x.dim() == 0:
        raise ValueError("x must be [B, *x_dims], got a tensor of no dimension")


def mean_squared_error(pred: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared error of a prediction, in its dtype.

    Raises:
        ValueError: the two differ in shape.
    """
    if pred.shape != wanted.shape:
        raise ValueError(f"pred must have x's shape {list(wanted.shape)}, got {list(pred.shape)}")
    return torch.nn.functional.mse_loss(wanted.to(pred.dtype), pred)


def check_time_sampler(name: str) -> str:
    """The name of a sampler, "beta" included.

    Raises:
        ValueError: there is none of that name.
    """
    if name != "beta" and name not in TIME_SAMPLERS:
        names = ", ".join(map(repr, ("beta", *TIME_SAMPLERS)))
        raise ValueError(f"train_timestep_sampler must be one of {names}, got {name!r}")
    return name
