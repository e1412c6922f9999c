"""Models that want the time in another shape, scale or dtype than sample() passes it, or the step's number."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .arguments import finite
from .velocities import Model

TIMES = ("column", "batch", "scalar")


class StepFunction:
    """A step_fn for a model that wants its time in another form, or the number of the step.

    sample() calls step_fn(x=, t=) with t [B, 1, ..., 1]. This calls model(x=, t=), where t is::

        t                            time_as="column": [B, 1, ..., 1], as sample() passes it
        t.view(B)                    time_as="batch": [B]; with times of each token [B, L]
        t.view(B)[0]                 time_as="scalar": 0-dim

    multiplied by `time_scale` in its own dtype, and then cast to `time_dtype`; an integer dtype rounds down. A `model`
    that has a parameter named `step` also gets step=, the number of the evaluation, 0 the first: with euler and the
    multistep solvers that of the step.

    t has the dtype of the time grid, float32 by default, and so has the product: `(t * 1000).long()` as eager PyTorch
    computes it. Code that computes its times in Python, as int(k / N * 1000), means float64: pass the times so,
    `time_steps=torch.arange(N + 1, dtype=torch.float64) / N`. From float32 times int(t * 1000) is another bucket at 2
    of 10 steps.

    Args:
        model: A function or an nn.Module, called as model(x=, t=), or model(x=, t=, step=).
        time_as: "column", "batch" or "scalar".
        time_scale: Multiplies the time. Finite.
        time_dtype: A floating-point or integer dtype; None: the time grid's.

    Raises:
        TypeError: model is not callable, time_scale no number, or time_dtype no dtype of numbers.
        ValueError: time_as is unknown, or time_scale not finite.
        RuntimeError: when called by other code than sample(), where the model takes the step's number.

    Example:
        >>> import torch
        >>> from flowmatch_kernels import FlowMatching, StepFunction
        >>> def policy(x, t, step):
        ...     assert t.dtype == torch.int64 and t.shape == (6,)
        ...     return x * 0.5 ** step
        >>> step_fn = StepFunction(policy, time_as="batch", time_scale=1000, time_dtype=torch.int64)
        >>> times = torch.arange(5, dtype=torch.float64) / 4
        >>> FlowMatching((16, 7)).sample(6, step_fn, time_steps=times, step_sizes=[0.25] * 4).shape
        torch.Size([6, 16, 7])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        time_as: str = "column",
        time_scale: float = 1.0,
        time_dtype: torch.dtype | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, got {model!r:.60}")
        if time_as not in TIMES:
            raise ValueError(f"time_as must be 'column', 'batch' or 'scalar', got {time_as!r:.60}")
        if not isinstance(time_dtype, (torch.dtype, type(None))) or time_dtype == torch.bool:
            raise TypeError(f"time_dtype must be a floating-point or integer torch.dtype, got {time_dtype!r:.60}")
        self.model = model
        self.time_as = time_as
        self.time_scale = finite(time_scale, "time_scale")
        self.time_dtype = time_dtype
        self.takes_step = _takes_step(model)
        """Whether the model has a parameter named `step`."""

    def time(self, t: Tensor) -> Tensor:
        """The time as the model wants it.

        Args:
            t: As sample() passes it, [B, 1, ..., 1]; or of each token, [B, L, 1, ..., 1].

        Raises:
            ValueError: time_as is "scalar", and the batch is empty or t is of each token.
        """
        if self.time_as != "column":
            dims = max((d for d, size in enumerate(t.shape, start=1) if size != 1), default=1)
            t = t.view(t.shape[:dims])
        if self.time_as == "scalar":
            self._check_batch(t.shape[0], own=t.dim() > 1)
            t = t[0]
        return self._scaled(t)

    def times(self, grid: Tensor, batch_size: int, dims: int) -> tuple[Tensor, ...]:
        """`time` of each entry of a grid, [T], of each sample [T, B] or of each token [T, B, L], at once.

        A tenth of the launches.

        Raises:
            ValueError: time_as is "scalar", and the batch is empty or each sample has its own times.
        """
        if grid.dim() > 1:
            if self.time_as == "scalar":
                self._check_batch(batch_size, own=True)
            ones = [1] * (dims + 1 - grid.dim()) if self.time_as == "column" else []
            return self._scaled(grid.clone().view(*grid.shape, *ones)).unbind()
        if self.time_as == "scalar":
            self._check_batch(batch_size)
            return self._scaled(grid.clone()).unbind()
        ones = [1] * (dims - 1) if self.time_as == "column" else []
        return self._scaled(grid.clone().view(-1, 1, *ones).expand(-1, batch_size, *ones)).unbind()

    def _scaled(self, t: Tensor) -> Tensor:
        if self.time_scale != 1.0:
            t = t * self.time_scale
        if self.time_dtype is None:
            return t
        return (t if self.time_dtype.is_floating_point else t.floor()).to(self.time_dtype)

    def _check_batch(self, batch_size: int, own: bool = False) -> None:
        if own:
            raise ValueError("time_as='scalar' is one time for all samples, and time_steps has those of each")
        if not batch_size:
            raise ValueError("time_as='scalar' needs a batch of one sample or more")

    def __call__(self, *, x: Tensor, t: Tensor) -> Any:
        """The velocity of a model that does not take the step's number."""
        if self.takes_step:
            raise RuntimeError("the model takes the number of the step, which sample() alone knows")
        return self.model(x=x, t=self.time(t))


class Bound:
    """A `StepFunction` within one sample(), whose `time` and `step` are set before each call."""

    def __init__(self, function: StepFunction) -> None:
        self.function = function
        self.step = 0
        self.time: Any = None

    def __call__(self, *, x: Tensor, t: Tensor) -> Any:
        function = self.function
        if function.takes_step:
            return function.model(x=x, t=self.time, step=self.step)
        return function.model(x=x, t=self.time)


def bound(step_fn: Any, into: list[Bound]) -> Any:
    """A step_fn for one sample().

    Args:
        step_fn: Any.
        into: Gets the `Bound` that is made where step_fn is a `StepFunction`.
    """
    if not isinstance(step_fn, StepFunction):
        return step_fn
    into.append(Bound(step_fn))
    return into[-1]


def timed(model: Model, functions: Sequence[Bound], grid: Tensor, shape: Sequence[int]) -> Model:
    """The model, with the time and the number of each evaluation set in its step functions.

    Args:
        model: Evaluates them.
        functions: The step functions.
        grid: The times that evaluations name, the table's.
        shape: The state's, as users see it.
    """
    times = [(function, function.function.times(grid, shape[0], len(shape))) for function in functions]

    def evaluate(rows: Any, state: Any, time: int, row: int) -> tuple[Any, Any]:
        for function, its in times:
            function.time, function.step = its[time], row
        return model(rows, state, time, row)

    return evaluate


def _takes_step(model: Callable[..., Any]) -> bool:
    plain = type(model) is FunctionType and not (hasattr(model, "__wrapped__") or hasattr(model, "__signature__"))
    if plain:  # as below, in 1 us instead of 15
        code = model.__code__
        return "step" in code.co_varnames[code.co_posonlyargcount : code.co_argcount + code.co_kwonlyargcount]
    try:
        parameters = inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model).parameters
    except (TypeError, ValueError):  # a callable without a signature, as some that are written in C
        return False
    step = parameters.get("step")
    return step is not None and step.kind in (step.POSITIONAL_OR_KEYWORD, step.KEYWORD_ONLY)


def no_velocity(*, x: Tensor, t: Tensor) -> Tensor:
    """A step_fn for a batch of no sample, in place of a model that may not take one."""
    return torch.zeros_like(x)
