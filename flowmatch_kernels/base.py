"""What a sampler is (`BaseDiffusion`) and what it calls (`StepFn`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .arguments import BYTES, integer, listed, shown


class StepFn(Protocol):
    """The velocity field v(x, t), usually a neural network with its conditions closed over."""

    def __call__(self, *, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Evaluates the velocity.

        Args:
            x: The state, [B, *x_dims], contiguous; from noise that is dense in another format, in that format.
            t: The time, [B, 1, ..., 1] with one 1 for each of x_dims: a stride-0 view.

        Returns:
            The velocity: a floating-point tensor that expands to [B, *x_dims], on x's device, in
            x's dtype or a narrower one.
        """
        ...


class BaseDiffusion(ABC, nn.Module):
    """A generative sampler for states of shape [B, *x_dims].

    Args:
        x_dims: The shape of one sample, without the batch: an int or a sequence of ints, all > 0.
            Kept as the list `self.x_dims`.

    Raises:
        TypeError: x_dims, or an entry of it, is not an int.
        ValueError: x_dims is empty, or an entry is not positive.
    """

    def __init__(self, x_dims: int | Sequence[int]) -> None:
        super().__init__()
        self.x_dims = _dims(x_dims)

    @abstractmethod
    def sample(
        self,
        batch_size: int,
        step_fn: StepFn,
        device: torch.device | str = "cpu",
        return_all_steps: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Draws `batch_size` samples, [B, *x_dims].

        With `return_all_steps`: all states, [B, T, *x_dims], and their time steps, [T].
        """


def _dims(x_dims: int | Sequence[int]) -> list[int]:
    wrong = f"x_dims must be an int or a sequence of ints, got {shown(x_dims)}"
    if isinstance(x_dims, (str, *BYTES, set, frozenset, dict)):
        raise TypeError(wrong)
    try:
        found = [integer(entry, "x_dims") for entry in listed(x_dims)]
    except TypeError:
        raise TypeError(wrong) from None
    if not found or min(found) <= 0:
        raise ValueError(f"x_dims must hold one or more positive ints, got {shown(x_dims)}")
    return found
