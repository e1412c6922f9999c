"""flow_matching (facebookresearch): its ODESolver, with one launch for each evaluation.

    from flowmatch_kernels.integrations.flow_matching import ODESolver      # was: from flow_matching.solver

Needs flow_matching: `pip install flowmatch_kernels[flow_matching]`.

Source: github.com/facebookresearch/flow_matching, flow_matching/solver/ode_solver.py (1.0.10).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .replacement import needed

_published = needed("flow_matching.solver", "flow_matching")

from .torchdiffeq import odeint  # noqa: E402  # which needs torchdiffeq, as flow_matching does

if TYPE_CHECKING:
    _Published = Any
else:
    _Published = _published.ODESolver

_TIME_GRID: Tensor = inspect.signature(_Published.sample).parameters["time_grid"].default


class ODESolver(_Published):
    """flow_matching's class of this name; `sample` runs `integrations.torchdiffeq.odeint`, with the same bits.

    `compute_likelihood` is theirs. What that `odeint` hands on (adaptive methods, as dopri5), torchdiffeq integrates.

    Example:
        >>> from flowmatch_kernels.integrations.flow_matching import ODESolver
        >>> solver = ODESolver(velocity_model=lambda x, t: -x)
        >>> solver.sample(torch.randn(6, 2), step_size=0.1, method="midpoint").shape
        torch.Size([6, 2])
    """

    def sample(
        self,
        x_init: Tensor,
        step_size: float | None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor | None = None,
        return_intermediates: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> Tensor:
        """Integrates the velocity model along a time grid.

        Args:
            x_init: [B, ...], the state at time_grid[0].
            step_size: The steps between; None: those of time_grid, and for adaptive methods.
            method: A name of torchdiffeq's.
            atol, rtol: For adaptive methods.
            time_grid: [T], up or down; None: from 0 to 1.
            return_intermediates: Return the states at each entry of time_grid.
            enable_grad: Keep the derivative.
            **model_extras: Passed to velocity_model, beside x and t.

        Returns:
            The last state, in x_init's shape; or [T, *x_init.shape].
        """
        grid = _TIME_GRID if time_grid is None else time_grid
        with torch.set_grad_enabled(enable_grad):
            states: Tensor = odeint(
                lambda t, x: self.velocity_model(x=x, t=t, **model_extras),
                x_init,
                grid.to(x_init.device),
                method=method,
                options={} if step_size is None else {"step_size": step_size},
                atol=atol,
                rtol=rtol,
            )
        return states if return_intermediates else states[-1]
