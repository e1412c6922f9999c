"""What watches the code that runs: a compiler, a tracer, a transform, a mode. The one place that asks.

Under `torch.compile`, `torch.export`, `make_fx`, `torch.jit.trace`, FakeTensorMode and `torch.func.vmap` a tensor may
have no values that Python can read. Checks of values then are left out, and nothing depends on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch
_DERIVATIVES = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def is_eager() -> bool:
    """Plain eager mode: no dispatch or function mode, no transform, no compiler, no tracer."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not is_transforming()
    )


def is_transforming() -> bool:
    """Within a torch.func transform, forward-mode AD or torch.jit.trace, which see PyTorch's own ops only."""
    return (
        _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_differentiating() -> bool:
    """A derivative is taken by torch.func (grad, vjp, jvp, ...) or by forward-mode AD, of whatever runs."""
    stack = _functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(transform.key() in _DERIVATIVES for transform in stack)


# A compiler asks while it traces, within the same transforms. This is torch.compiler.assume_constant_result, which
# imports the whole compiler only to set the attribute.
is_differentiating._dynamo_marked_constant = True  # type: ignore[attr-defined]


def keeps_derivatives() -> bool:
    """Whether PyTorch's own ops keep derivatives here: grad is on, or a transform takes one."""
    if torch.is_grad_enabled():
        return True
    return True if is_differentiating() else False  # noqa: SIM210  # for Dynamo, whose constant it is


def has_derivative(x: Tensor) -> bool:
    """Whether a derivative with respect to x is being taken: x requires grad, and grad is on, or it has a tangent."""
    return (torch.is_grad_enabled() and x.requires_grad) or has_tangent(x)


def has_tangent(x: Tensor) -> bool:
    """Whether x is a dual tensor of forward-mode AD."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def is_tracing() -> bool:
    """A compiler or a tracer records what happens to tensors: no tensor's values can be read."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or any(torch._C._get_dispatch_mode(key) is not None for key in _MODES)
    )


def is_fake() -> bool:
    """Under a FakeTensorMode of the caller's, where tensors have no values; a compiler's own does not count."""
    return not torch.compiler.is_compiling() and torch._C._get_dispatch_mode(_MODES[0]) is not None


def is_capturing() -> bool:
    """Within the capture of a CUDA graph, which holds on to what is made."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_readable(x: Tensor) -> bool:
    """Whether Python can read x's values: not while tracing, nor of a meta, fake or vmapped tensor."""
    if is_tracing() or x.is_meta or hasattr(x, "fake_mode"):
        return False
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return False
        x = _functorch.get_unwrapped(x)
    return True


def unrecorded() -> contextlib.AbstractContextManager[None]:
    """Within it torch.jit.trace records nothing: what is made there of numbers alone is a constant of the trace."""
    return contextlib.nullcontext() if torch._C._get_tracing_state() is None else suspended()


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Within it tensors that are made are real: no mode and no tracer sees them."""
    from torch.utils._python_dispatch import _disable_current_modes

    set_state: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
    state = torch._C._get_tracing_state()
    set_state(None)
    try:
        with _disable_current_modes():
            yield
    finally:
        set_state(state)
