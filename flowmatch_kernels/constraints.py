"""Ready-made constraints for `FlowMatching.sample(constraint=...)`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import check_dense, end_of_time, expands


def inpaint(known: Tensor, mask: Tensor, noise: Tensor, noise_at: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """Holds the entries under a mask on their own straight path, x = (1 - t)*noise + t*known, which ends at `known`.

    For inpainting, and for a prefix that is already fixed (real-time chunking: the actions under way). Pass the
    same `noise` to sample(), so that they start on their path too; with a temperature, pass temperature * noise here.

    Args:
        known: What expands to the state, [B, *x_dims]; read where `mask` is True. There x ends exactly at it, if
            the time grid ends at the data.
        mask: bool, what expands to [B, *x_dims]; True: known.
        noise: The noise that sample() starts from, [B, *x_dims].
        noise_at: The end of time at which the noise is. It must be the sampler's: with another one the known entries
            end at the noise.

    Returns:
        constraint(x, t) -> x, of x's dtype; the path is computed in float32, or float64 where a tensor is.

    Raises:
        TypeError: mask is not bool, known or noise is not floating point, or one of them is sparse or nested.
        ValueError: noise_at is neither 0 nor 1; and, when called, a tensor does not expand to the state's shape or is
            on another device.

    Example:
        >>> import torch
        >>> from flowmatch_kernels import FlowMatching, inpaint
        >>> noise, plan = torch.randn(1, 50, 7), torch.zeros(1, 50, 7)
        >>> mask = (torch.arange(50) < 10).view(50, 1)  # the first ten actions are under way
        >>> fm = FlowMatching((50, 7))
        >>> x = fm.sample(1, lambda x, t: -x, noise=noise, constraint=inpaint(plan, mask, noise))
        >>> bool((x[:, :10] == plan[:, :10]).all())
        True
    """
    for name, tensor in (("known", known), ("noise", noise)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else f"{tensor!r:.60}"
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else f"{mask!r:.60}"
        raise TypeError(f"mask must be a bool tensor, True where known, got {got}")
    for name, tensor in (("known", known), ("mask", mask), ("noise", noise)):
        check_dense(tensor, name)
    noise_at = end_of_time(noise_at)

    def constraint(x: Tensor, t: Tensor) -> Tensor:
        for name, tensor in (("known", known), ("mask", mask), ("noise", noise)):
            if not expands(tensor.shape, x.shape):
                raise ValueError(f"{name} must expand to the state {list(x.shape)}, got {list(tensor.shape)}")
            if tensor.device != x.device:
                raise ValueError(f"{name} must be on the state's device {x.device}, got {tensor.device}")
        wide = torch.promote_types(torch.promote_types(known.dtype, noise.dtype), torch.float32)
        s = t.to(wide)
        left, come = (s, 1 - s) if noise_at else (1 - s, s)
        path = left * noise.to(wide) + come * known.to(wide)
        # Where no noise is left the path is `known` itself: 0 * noise + known would lose -0.0.
        path = torch.where(left == 0, known.to(wide), path)
        return torch.where(mask, path.to(x.dtype), x)

    return constraint
