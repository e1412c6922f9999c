"""Classifier-free guidance: how the velocities with and without the condition become one.

With c the guided velocity and u the unguided one, four forms are in use. They round differently, so each is
computed as its users write it:

    interpolate      (1 - w)*u + w*c      Guided Flows, arXiv 2311.13443, eq. 6; Alpamayo. The default
    from_unguided    u + s*(c - u)        s = w; diffusers' image pipelines
    from_guided      c + s*(c - u)        s = w - 1
    extrapolate      (1 + r)*c - r*u      r = w - 1; Classifier-Free Diffusion Guidance, arXiv 2207.12598, eq. 6

The kernel knows three of them: extrapolate is its weighted sum, with the weights -r and 1 + r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import BYTES, finite, held, own_dims, shown, spread, tensor, unread
from .ops.fused_step import FROM_GUIDED, FROM_UNGUIDED, WEIGHTED, covered
from .tracing import is_readable

#: A weight for all evaluations, for each step, or as a function of t. While tracing a number may be symbolic, or a
#: 0-dim tensor.
OfSteps = float | tuple[float, ...] | Callable[[float], float]
#: Or of each sample: [B, 1], or [B, N]; or each token, [B, L, 1] or [B, L, N]: tuples, nested as deep.
Weight = OfSteps | tuple[Any, ...]

WANTED = (
    "a number, a number for each step, one for each sample ([B, 1] or [B, N]) or token ([B, L, 1] or [B, L, N]), or a "
    "function of t"
)


class Form(NamedTuple):
    """One way to combine the two velocities."""

    kernel: int
    """The fused step's argument `guidance`."""
    weights: Callable[[Any], tuple[Any, Any]]
    """The weight as the user gives it -> w0, w1 of the kernel, taken in double, as eager Python does."""
    eager: Callable[[float, Tensor, Tensor], Tensor]
    """(weight, u, c) -> the velocity, as users write it."""
    guided_alone: float
    """The weight at which only the guided velocity counts."""
    unguided_alone: float
    """The weight at which only the unguided velocity counts."""


FORMS = {
    "interpolate": Form(WEIGHTED, lambda w: (1 - w, w), lambda w, u, c: (1 - w) * u + w * c, 1.0, 0.0),
    "from_unguided": Form(FROM_UNGUIDED, lambda s: (0.0, s), lambda s, u, c: u + s * (c - u), 1.0, 0.0),
    "from_guided": Form(FROM_GUIDED, lambda s: (0.0, s), lambda s, u, c: c + s * (c - u), 0.0, -1.0),
    "extrapolate": Form(WEIGHTED, lambda r: (-r, 1 + r), lambda r, u, c: (1 + r) * c - r * u, 0.0, -1.0),
}


def form(name: str) -> Form:
    """The form of guidance of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in FORMS:
        raise ValueError(f"unknown guidance_form {name!r} (known: {', '.join(FORMS)})")
    return FORMS[name]


#: What sample()'s combined_guidance may be: whether the guided velocity comes first in what step_fn returns; None: it
#: returns one velocity.
_COMBINED = {False: None, True: False, "unguided_first": False, "guided_first": True}


def guided_first(combined: bool | str) -> bool | None:
    """Of combined_guidance, whether the guided velocity comes first; None: step_fn returns one velocity.

    Raises:
        TypeError: it is neither a bool nor a string.
        ValueError: it is another string.
    """
    if type(combined) not in (bool, str):
        raise TypeError(f"combined_guidance must be True, False, or an order's name, got {shown(combined)}")
    if combined not in _COMBINED:
        raise ValueError(f"combined_guidance must be a bool, 'unguided_first' or 'guided_first', got {combined!r:.60}")
    return _COMBINED[combined]


def checked(weight: Any, name: str = "inference_guidance_weight") -> Weight:
    """The weight as a float, a tuple of floats or the function that it is.

    Raises:
        TypeError: it is none of them, nor what can be made one.
        ValueError: a number is not finite.
    """
    if isinstance(weight, (float, int)) and not isinstance(weight, bool):
        return finite(weight, name, WANTED)
    if callable(weight):
        return weight
    if dims := own_dims(weight):
        return _of_rows(weight, dims, name)
    if isinstance(weight, Tensor) and weight.dim() < 2 and not weight.is_sparse and not is_readable(weight):
        return unread(weight, name) if weight.dim() == 0 else tuple(unread(weight, name).unbind())
    if getattr(weight, "ndim", 0) == 1 and not isinstance(weight, BYTES):  # a tensor, a NumPy array
        try:
            weight = weight.tolist()
        except RuntimeError:  # a sparse tensor, or one without values: no number either
            raise TypeError(f"{name} must be {WANTED}, got {shown(weight)}") from None
    if isinstance(weight, Sequence) and not isinstance(weight, (str, *BYTES)):
        return tuple(finite(entry, f"{name}[{k}]") for k, entry in enumerate(weight))
    return finite(weight, name, WANTED)


def _of_rows(weight: Any, dims: int, name: str) -> tuple[Any, ...]:
    """Weights of each sample, or token, as tuples of floats, nested `dims` deep."""
    if isinstance(weight, Tensor) and not is_readable(weight):
        raise ValueError(f"{name} of each sample is a tensor whose values cannot be read here: pass lists of floats")
    lengths = []

    def nested(part: Any, dims: int, name: str) -> tuple[Any, ...]:
        if not isinstance(part, (list, tuple)):
            raise TypeError(f"{name} must be a list, as the first one of its kind is, got {shown(part)}")
        if dims:
            return tuple(nested(one, dims - 1, f"{name}[{k}]") for k, one in enumerate(part))
        lengths.append(len(part))
        return tuple(finite(one, f"{name}[{k}]") for k, one in enumerate(part))

    try:
        given = weight if isinstance(weight, (list, tuple)) else weight.tolist()
    except RuntimeError:  # a sparse tensor
        raise TypeError(f"{name} must be {WANTED}, got {shown(weight)}") from None
    found = nested(given, dims, name)
    if len(set(lengths)) != 1:
        raise ValueError(f"{name} must have as many weights for each sample, got {lengths!s:.60}")
    return found


def weights_of_rows(
    weight: Weight, sizes: Sequence[int], steps: Iterable[int], times: Callable[[], Iterable[Any]], dtype: torch.dtype
) -> tuple[tuple[Any, ...], Tensor]:
    """The weights of each evaluation, a float, or where rows differ a tuple; and the same in float64, [E, R].

    Args:
        weight: As `checked` returns it: of each sample or token too.
        sizes: The first sizes of the state, of which each has a row; R is their product.
        steps, dtype: As for `weights`.
        times: As for `weights`, where the weight is a function with one for each row, [R].

    Raises:
        ValueError, TypeError: as for `weights`; or weights are given for other sizes.
    """
    steps = tuple(steps)
    if own_dims(weight):
        rows = spread(weight, sizes, "inference_guidance_weight")
        by_row = [weights(row[0] if len(row) == 1 else row, steps, times, dtype) for row in rows]
    elif callable(weight):
        by_row = [weights(weight, steps, lambda its=its: its, dtype) for its in zip(*times(), strict=True)]  # type: ignore[misc]
    else:
        by_row = [weights(weight, steps, times, dtype)] * math.prod(sizes)
    of_evaluations = tuple(zip(*by_row, strict=True))
    column = torch.stack([tensor(row, torch.float64) for row in of_evaluations]) if of_evaluations else torch.empty(0)
    return tuple(row[0] if all(w == row[0] for w in row) else row for row in of_evaluations), column


def eager_velocity(form: Form, weight: Any, u: Tensor, c: Tensor, shape: Sequence[int]) -> Tensor:
    """The two velocities combined as users write it, in eager PyTorch's own promotion.

    Args:
        form: How.
        weight: Of one evaluation: a float, or a tuple of one for each row of the state.
        u, c: The unguided and the guided velocity.
        shape: The state's.
    """
    if not isinstance(weight, tuple):
        return form.eager(weight, u, c)
    sizes = covered(shape, len(weight))
    assert sizes is not None
    rest = shape[len(sizes) :]

    def rows(x: Tensor) -> Sequence[Tensor]:
        return x.expand(shape).reshape(-1, *rest).split(1) if x.dim() else [x] * len(weight)

    parts = zip(weight, rows(u), rows(c), strict=True)
    return torch.cat([form.eager(w, its_u, its_c).expand(1, *rest) for w, its_u, its_c in parts]).view(shape)


def column(weight: Weight, weights: Sequence[float | Tensor]) -> Tensor:
    """The weights of all evaluations, [E], in float64, on the CPU where they are numbers.

    Args:
        weight: As `checked` returns it. While tracing it may be symbolic, or a 0-dim tensor: then no value is read.
        weights: That of each evaluation.
    """
    if callable(weight) or isinstance(weight, tuple):
        return tensor(weights, torch.float64)
    return tensor([weight], torch.float64).expand(len(weights))


def weights(
    weight: Weight, steps: Iterable[int], times: Callable[[], Iterable[float]], dtype: torch.dtype
) -> tuple[Any, ...]:
    """The weight of each evaluation.

    Args:
        weight: As `checked` returns it.
        steps: For each evaluation, the step it belongs to.
        times: Gives for each evaluation the time; asked only where the weight is a function of it.
        dtype: Of the coefficients.

    Raises:
        ValueError: another number of weights than of steps, the function returned one that is not finite, or one is too
            large for `dtype`.
        TypeError: the function returned no number.
    """
    steps = tuple(steps)
    if callable(weight):
        name = "what inference_guidance_weight(t) returned"
        return tuple(held(finite(weight(t), name), name, dtype) for t in times())
    for entry in weight if isinstance(weight, tuple) else (weight,):
        if type(entry) is float:
            held(entry, "inference_guidance_weight", dtype)
    if isinstance(weight, tuple):
        taken = steps[-1] + 1 if steps else 0
        if len(weight) != taken:
            raise ValueError(
                f"inference_guidance_weight must be one number, or one for each of the {taken} steps, "
                f"got {len(weight)} of them; one for each sample is [B, 1], for each token [B, L, 1]"
            )
        return tuple(weight[step] for step in steps)
    return (weight,) * len(steps)
