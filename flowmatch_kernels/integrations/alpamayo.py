"""Alpamayo R1, 1.5 and 2: their sampler, replaced by one line.

In a Hydra configuration, or a checkpoint's `config.json`, the one changed line::

    diffusion_cfg:
      # _target_: alpamayo1_5.diffusion.flow_matching.FlowMatching
      _target_: flowmatch_kernels.integrations.alpamayo.FlowMatching
      num_inference_steps: 10

or, for a model that is there already::

    from flowmatch_kernels.integrations import alpamayo
    alpamayo.accelerate(model)

| generation | package | where the model holds its sampler |
|---|---|---|
| R1 | alpamayo_r1 | model.diffusion |
| 1.5 | alpamayo1_5 | model.diffusion |
| 2 | alpamayo2_super | model.expert.diffusion |

Source: github.com/NVlabs/alpamayo (1cba38c), NVlabs/alpamayo1.5 (f42e594), NVlabs/alpamayo2 (054d6ef).
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import flow_matching
from ..base import StepFn
from ..solvers import FittedSolver, IntMethod, loaded
from .replacement import Replacement, is_installed

PACKAGES = ("alpamayo_r1", "alpamayo1_5", "alpamayo2_super")
"""The packages of the generations R1, 1.5 and 2."""

#: What a sampler of theirs is set to, where it has it: Alpamayo 1.5 has no training settings.
_SETTINGS = (
    "x_dims",
    "int_method",
    "num_inference_steps",
    "train_timestep_sampler",
    "train_ignore_guidance_rate",
    "inference_guidance_weight",
    "use_classifier_free_guidance",
)
#: sample()'s arguments after step_fn, in the order of Alpamayo R1 and 2, and of 1.5.
_ORDER = ("device", "return_all_steps", "inference_step", "int_method")
_ORDER_1_5 = (
    *("unguided_step_fn", "device", "return_all_steps", "inference_step", "int_method"),
    *("use_classifier_free_guidance", "inference_guidance_weight", "temperature"),
)
_CONSTRUCTOR = frozenset(inspect.signature(flow_matching.FlowMatching).parameters)
_SAMPLE = frozenset(inspect.signature(flow_matching.FlowMatching.sample).parameters) - {"self"}


class FlowMatching(flow_matching.FlowMatching):
    """`flowmatch_kernels.FlowMatching` with the calling conventions of Alpamayo's, for their `_target_` line.

    What differs from the base class: positional arguments come in Alpamayo 1.5's order; unknown arguments are ignored,
    as upstream ignores them, with one warning that names them; and an instance counts as an instance of the
    `BaseDiffusion` of each Alpamayo package that is loaded when it is made (as a registered virtual subclass).

    Args:
        int_method: The solver: "euler", as published, or any other of the base class.
        num_inference_steps: Steps; None: 10, or those of a fitted solver.
        inference_guidance_weight: w in v = (1 - w) * v_unguided + w * v_guided.
        x_dims: The shape of one sample: an int or a sequence of ints. Required.
        use_classifier_free_guidance: Sample with guidance by default.
        *args: Ignored, with a warning.
        **kwargs: What else the base class takes, by name. Unknown names are ignored, with a warning.

    Raises:
        TypeError: x_dims is missing, or an argument is of the wrong type.
        ValueError: an argument has a value that cannot be used.

    Warns:
        UserWarning: arguments were ignored; once for each instance and set of names.

    Example:
        >>> from flowmatch_kernels.integrations.alpamayo import FlowMatching
        >>> fm = FlowMatching(x_dims=[64, 2], num_inference_steps=10)
        >>> fm.sample(batch_size=6, step_fn=lambda x, t: (1 - t) - x).shape
        torch.Size([6, 64, 2])
    """

    def __init__(
        self,
        int_method: IntMethod = "euler",
        num_inference_steps: int | None = None,
        inference_guidance_weight: Any = 1.0,
        x_dims: int | Sequence[int] | None = None,
        use_classifier_free_guidance: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if x_dims is None:
            raise TypeError("x_dims is missing: the shape of one sample, an int or a sequence of ints")
        if isinstance(num_inference_steps, str):
            raise TypeError(
                f"num_inference_steps must be an int, got {num_inference_steps!r}: positional arguments come in "
                "Alpamayo 1.5's order, (int_method, num_inference_steps, inference_guidance_weight, x_dims); those of "
                "R1 and 2 differ, so pass them by name"
            )
        ignored = [*_positional(args), *(name for name in kwargs if name not in _CONSTRUCTOR)]
        super().__init__(
            x_dims,
            int_method,
            num_inference_steps,
            inference_guidance_weight=inference_guidance_weight,
            use_classifier_free_guidance=use_classifier_free_guidance,
            **{name: value for name, value in kwargs.items() if name in _CONSTRUCTOR},
        )
        self._replaced: tuple[nn.Module, ...] = ()
        """Where `accelerate` put this sampler, the one that was there; in a tuple, so that it is no submodule."""
        self._warn_ignored("FlowMatching", ignored)
        _register()

    def sample(self, batch_size: int, step_fn: StepFn, *args: Any, **kwargs: Any) -> Any:
        """As the base class's, with the calling conventions of Alpamayo's.

        The third positional argument is `device`, as in R1 and 2, or, where it is None or a function,
        `unguided_step_fn`, and the rest follows in the order of 1.5. What else differs from R1: guidance and the
        temperature, which R1 ignores, are used.

        Args:
            batch_size: B.
            step_fn: The velocity, called as step_fn(x=, t=).
            *args: device, return_all_steps, inference_step, int_method; or, as in 1.5, unguided_step_fn, device,
                return_all_steps, inference_step, int_method, use_classifier_free_guidance, inference_guidance_weight,
                temperature. More are ignored, with a warning.
            **kwargs: What the base class's sample() takes. Unknown names are ignored, with a warning.

        Raises:
            TypeError: an argument was given twice, or is of the wrong type.
            ValueError: see the base class.

        Warns:
            UserWarning: arguments were ignored; once for each instance and set of names.
        """
        order: tuple[str, ...] = _ORDER
        if args and (args[0] is None or (callable(args[0]) and not isinstance(args[0], (str, torch.device)))):
            order = _ORDER_1_5
        given = dict(zip(order, args, strict=False))
        if twice := [name for name in given if name in kwargs]:
            raise TypeError(f"sample() got {', '.join(twice)} both by position and by name")
        ignored = [*_positional(args[len(order) :]), *(name for name in kwargs if name not in _SAMPLE)]
        self._warn_ignored("sample()", ignored)
        given |= {name: value for name, value in kwargs.items() if name in _SAMPLE}
        return super().sample(batch_size, step_fn, **given)

    sample.__signature__ = inspect.signature(flow_matching.FlowMatching.sample)  # type: ignore[attr-defined]

    def _warn_ignored(self, who: str, names: list[str]) -> None:
        """Warns of ignored arguments, once for each instance and set of names."""
        if not names or torch.compiler.is_compiling():
            return
        message = f"{who} does not know {', '.join(names)}: ignored, as Alpamayo's own sampler does"
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)


def accelerate(model: nn.Module, **options: Any) -> nn.Module:
    """Replaces the sampler of an Alpamayo model by ours, with its settings.

    Looks for the sampler at `model.diffusion` (R1 and 1.5, and the expert of 2) and `model.expert.diffusion` (2). Its
    x_dims, solver, number of steps, guidance and training settings are kept. A model that was accelerated before gets a
    new sampler, from the settings of its original one; one whose configuration names ours keeps it.

    Args:
        model: The model, changed in place.
        **options: Arguments of `FlowMatching` that replace or add to the settings, as int_method="ab3". A fitted solver
            brings its own number of steps.

    Returns:
        The model.

    Raises:
        TypeError: the model has no sampler where it is looked for, or one that is not Alpamayo's own (a subclass, or
            another class), whose steps ours may not take; or options are given for a sampler that is ours already.
        ValueError: a setting or option has a value that cannot be used.

    Example:
        >>> from flowmatch_kernels.integrations import alpamayo
        >>> model = alpamayo.accelerate(Alpamayo1_5.from_pretrained("nvidia/Alpamayo-1.5-10B"))  # doctest: +SKIP
    """
    owner, name = _owner(model)
    found = owner.diffusion
    if isinstance(found, FlowMatching) and not found._replaced:
        if options:
            raise TypeError(f"{name} is ours already: give {', '.join(options)} where it is made, beside its _target_")
        return model
    theirs = found._replaced[0] if isinstance(found, FlowMatching) else found
    if not _is_published(type(theirs)):
        known = ", ".join(f"{package}.diffusion.flow_matching.FlowMatching" for package in PACKAGES)
        raise TypeError(
            f"{name} is a {type(theirs).__module__}.{type(theirs).__qualname__}, and not one of {known}: whether ours "
            "takes its steps is not known. Where it does, assign a flowmatch_kernels.integrations.alpamayo.FlowMatching"
        )
    settings = {setting: getattr(theirs, setting) for setting in _SETTINGS if hasattr(theirs, setting)}
    if "int_method" in options and isinstance(loaded(options["int_method"]), FittedSolver):
        settings.pop("num_inference_steps", None)
    ours = FlowMatching(**(settings | options)).train(theirs.training)
    ours._replaced = (theirs,)
    owner.diffusion = ours
    return model


def restore(model: nn.Module) -> nn.Module:
    """Puts back the sampler that `accelerate` replaced; nothing, where it replaced none.

    Args:
        model: The model, changed in place.

    Returns:
        The model.

    Raises:
        TypeError: the model has no sampler where `accelerate` looks for it.
    """
    owner, _ = _owner(model)
    if isinstance(owner.diffusion, FlowMatching) and owner.diffusion._replaced:
        owner.diffusion = owner.diffusion._replaced[0]
    return model


def patch() -> Replacement:
    """Lets every sampler made from now on be ours, in each Alpamayo package that is installed.

    The class `FlowMatching` is replaced in the module that defines it and in those that imported it, so that an
    unchanged `_target_` finds ours. Instances that are there already stay; see `accelerate`.

    Returns:
        A `Replacement`: call its undo(), or use it in a with statement.

    Raises:
        ImportError: no Alpamayo package is installed.

    Example:
        >>> from flowmatch_kernels.integrations import alpamayo
        >>> with alpamayo.patch():  # doctest: +SKIP
        ...     model = Alpamayo1_5.from_pretrained("nvidia/Alpamayo-1.5-10B")
    """
    modules = [importlib.import_module(f"{name}.diffusion.flow_matching") for name in PACKAGES if is_installed(name)]
    if not modules:
        raise ImportError(f"none of {', '.join(PACKAGES)} is installed: see github.com/NVlabs/alpamayo")
    replacement = Replacement()
    for module in modules:
        replacement.replace(module, "FlowMatching", FlowMatching)
    _register()
    return replacement


def _positional(args: Sequence[Any]) -> list[str]:
    """Positional arguments that are ignored, for a message."""
    return [f"the positional argument {value!r:.60}" for value in args]


def _owner(model: Any) -> tuple[Any, str]:
    """The module whose attribute `diffusion` is the sampler, and what to call that attribute.

    Raises:
        TypeError: there is none.
    """
    for owner, name in ((model, "model.diffusion"), (getattr(model, "expert", None), "model.expert.diffusion")):
        if isinstance(getattr(owner, "diffusion", None), nn.Module):
            return owner, name
    children = [name for name, _ in model.named_children()] if isinstance(model, nn.Module) else []
    raise TypeError(
        f"no sampler at model.diffusion (Alpamayo R1, 1.5) or model.expert.diffusion (2): found a "
        f"{type(model).__module__}.{type(model).__qualname__} with the modules {', '.join(children) or 'none'}"
    )


def _is_published(cls: type) -> bool:
    """Whether this is the sampler of an Alpamayo package, and no subclass of it."""
    return cls.__name__ == "FlowMatching" and cls.__module__ in [f"{p}.diffusion.flow_matching" for p in PACKAGES]


def _register() -> None:
    """Makes ours a virtual subclass of the BaseDiffusion of each package that is loaded; imports none."""
    for package in PACKAGES:
        module = sys.modules.get(f"{package}.diffusion.base")
        base = getattr(module, "BaseDiffusion", None) if isinstance(module, ModuleType) else None
        if isinstance(base, type) and not issubclass(FlowMatching, base):
            base.register(FlowMatching)  # type: ignore[attr-defined]
