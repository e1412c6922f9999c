"""Which backend runs: the one place where that is decided."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import tracing
from . import keyed_noise as noise_contract
from . import native, reference, reference_log_prob, reference_noise, subclasses
from . import step_log_prob as log_prob_contract
from .fused_step import Operands, backward, check_operands, check_overlap, keep_for_backward, library

logger = logging.getLogger("flowmatch_kernels")

ENVIRONMENT_VARIABLE = "FLOWMATCH_KERNELS_BACKEND"


class Backend(NamedTuple):
    """One implementation of `ops.fused_step`."""

    name: str
    devices: tuple[str, ...]
    """Device types it serves; empty: any."""
    unavailable: Callable[[str], str | None]
    """Why it cannot serve tensors of this device type, or None. That there is no GPU is no reason."""
    load: Callable[[], Callable[[Operands], None]]
    """Its fused_step_; unchecked, where its checks would cost a step."""
    load_launch: Callable[[], Any] = lambda: None
    """How `native.TensorRows` launches without Python, given to it as it is; None: by fused_step_."""
    load_noise: Callable[[], Callable[[Tensor, Tensor, int], None]] = lambda: reference_noise.keyed_noise_
    """Its keyed_noise_, of out, keys and the evaluation; unchecked."""
    load_log_prob: Callable[[], Callable[..., None]] = lambda: reference_log_prob.step_log_prob_
    """Its step_log_prob_, of out and the op's operands; unchecked."""
    costly: Callable[[str], str | None] = lambda device_type: None
    """Why "auto" rather takes the next kernel that can serve; None: it does not. With no other it takes this one."""


_TRITON = f"{__package__}.triton"


def _triton() -> Any:
    """The module of the `triton` backend. importlib's own look at what is imported costs 3 us."""
    return sys.modules.get(_TRITON) or importlib.import_module(_TRITON)


def _triton_unavailable(device_type: str) -> str | None:
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "it runs on the CPU only under TRITON_INTERPRET=1"
    try:
        module = _triton()
    except Exception as error:  # a broken Triton may raise anything, and is only worth its reason
        return _not_imported(error)
    if device_type == "cpu" and not module._INTERPRETED.value:
        return "TRITON_INTERPRET=1 was set after the kernel was made: set it before the first use"
    return _triton_cannot_start() if device_type == "cuda" else None


@functools.cache
def _triton_cannot_start() -> str | None:
    """Why Triton cannot load what it compiles, or None: it builds a C module for that, as a slim image cannot.

    On a GPU its driver is started, as the first launch would: it may have the module in its cache, without a compiler.
    """
    missing = _no_c_compiler()
    if not torch.cuda.is_available():
        return missing
    try:
        utils = importlib.import_module("triton.runtime").driver.active.utils
    except Exception as error:  # a failed compiler, a library that is missing
        return f"Triton cannot start its driver: {missing or error}"
    # Before Triton 3.7 each kernel's launcher is a C module of its own.
    return None if hasattr(utils, "launch") else missing


def _triton_costly(device_type: str) -> str | None:
    if device_type != "cuda":
        return None
    reason: str | None = importlib.import_module(f"{__package__}.triton_launcher").unknown_release()
    return reason and f"{reason}: it would be launched by Triton's JIT, which costs the host more"


def _no_c_compiler() -> str | None:
    """What is missing to build a C module of Python, looked for as `triton.runtime.build` does; None: nothing."""
    if getattr(importlib.import_module("triton.knobs").build, "impl", None) is not None:
        return None
    if os.environ.get("CC") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "there is no C compiler, which Triton needs when it runs: install gcc or clang, or set CC"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own, which names another folder
    header = os.path.join(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    return None if os.path.exists(header) else f"there is no {header}, which Triton needs when it runs: install it"


def _cuda_unavailable() -> str | None:
    reason = native.cuda_unavailable()  # which loads it
    if reason is not None or not torch.cuda.is_available():
        return reason
    capability = torch.cuda.get_device_capability()
    built = native.cuda_architectures()
    if built is None or native.runs_on(built, capability):
        return None
    return f"it is built for {built}, and the GPU is of compute capability {'.'.join(map(str, capability))}"


def _not_imported(error: Exception) -> str:
    return f"Triton cannot be imported: {type(error).__name__}: {error}"


def _triton_broken() -> str | None:
    """Why an installed Triton cannot be imported, or None. It makes no kernel, which would settle TRITON_INTERPRET."""
    try:
        importlib.import_module("triton").knobs.runtime  # noqa: B018  # what the kernel reads of it at import
    except Exception as error:
        return _not_imported(error)
    return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "triton",
            ("cuda", "cpu"),
            _triton_unavailable,
            lambda: _triton().launch,
            lambda: _triton().compiled,
            lambda: importlib.import_module(f"{__package__}.triton_noise").keyed_noise_,
            lambda: importlib.import_module(f"{__package__}.triton_log_prob").step_log_prob_,
            _triton_costly,
        ),
        Backend(
            "cuda",
            ("cuda",),
            lambda device_type: _cuda_unavailable(),
            lambda: native.fused_step_,
            native.launch_cuda,
            lambda: native.keyed_noise_,
            lambda: native.step_log_prob_,
        ),
        Backend(
            "cpu",
            ("cpu",),
            lambda device_type: native.cpu_unavailable(),
            lambda: native.fused_step_,
            load_noise=lambda: native.keyed_noise_,
            load_log_prob=lambda: native.step_log_prob_,
        ),
        Backend("reference", (), lambda device_type: reference.unavailable(), lambda: reference.fused_step_),
    )
}

_NAMES = ("auto", *BACKENDS)

#: What "auto" tries, in this order. On a GPU: Triton, where it can compile and load, and its direct launch is known for
#: this release; else CUDA, where the extension holds code for that GPU; else Triton by its ordinary launch.
PREFERENCE = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}

_override: ContextVar[str | None] = ContextVar("flowmatch_kernels_backend", default=None)
_logged: set[tuple[str, str]] = set()


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with None where it can run on this machine, else the reason why not.

    Imports Triton where it is installed: whether it can be imported shows in no other way.
    """
    reasons = {}
    for name, backend in BACKENDS.items():
        reason: str | None = None
        if "cuda" in backend.devices and not torch.cuda.is_available():
            reason = "there is no CUDA or ROCm device"
            if name == "triton" and os.environ.get("TRITON_INTERPRET", "0") == "1":
                reason = backend.unavailable("cpu")
            elif name == "triton" and importlib.util.find_spec("triton") is None:
                reason += ", and Triton is not installed"
            elif name == "triton":
                reason = _triton_broken() or reason
            elif name == "cuda":
                reason = native.cuda_unavailable() or f"it is built for {native.cuda_architectures()}, and {reason}"
        else:
            reason = backend.unavailable(backend.devices[0] if backend.devices else "cpu")
        reasons[name] = reason
    return reasons


def check_name(name: str) -> str:
    """Returns `name` if it is "auto" or a backend's.

    Raises:
        ValueError: it is neither.
    """
    if name not in _NAMES:
        raise ValueError(f"unknown backend {name!r} (known: auto, {', '.join(BACKENDS)})")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context (of this thread or task), `backend="auto"` means `name`.

    Raises:
        ValueError: there is no such backend.

    Example:
        >>> import flowmatch_kernels
        >>> with flowmatch_kernels.use_backend("reference"):
        ...     x = flowmatch_kernels.FlowMatching(x_dims=2).sample(3, lambda x, t: x)
    """
    token = _override.set(check_name(name))
    try:
        yield
    finally:
        _override.reset(token)


def override() -> str | None:
    """What `use_backend` says here: who keeps what `choose` returned asks whether it still holds."""
    return _override.get()


def choose(name: str, device_type: str) -> Backend:
    """The backend for tensors of this device type.

    Args:
        name: A backend's name, or "auto": then `use_backend`, then FLOWMATCH_KERNELS_BACKEND decide, and
            last the order of `PREFERENCE`.
        device_type: "cpu", "cuda" (ROCm too), ...

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend was asked for by name and cannot serve; says why.
    """
    return BACKENDS[_resolve(name, device_type)]


def _resolve(name: str, device_type: str) -> str:
    if name == "auto":
        name = _override.get() or os.environ.get(ENVIRONMENT_VARIABLE) or name
    if name != "auto":
        reason = _cannot_serve(BACKENDS[check_name(name)], device_type)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} was asked for and cannot be used: {reason}")
        return name
    order = PREFERENCE.get(device_type, ("reference",))
    for place, candidate in enumerate(order):
        reason = _cannot_serve(BACKENDS[candidate], device_type)
        if reason is None:
            reason = BACKENDS[candidate].costly(device_type)
            kernels = order[place + 1 : -1]
            if reason is None or all(_cannot_serve(BACKENDS[other], device_type) is not None for other in kernels):
                return candidate
        if (candidate, reason) not in _logged:
            _logged.add((candidate, reason))
            remedy = " Steps run as eager PyTorch expressions, the slow path; " + native.REMEDY
            last = candidate == PREFERENCE[device_type][-2] and not tracing.is_transforming()
            logger.warning("backend %r is skipped on %s: %s.%s", candidate, device_type, reason, remedy if last else "")
    raise AssertionError("the reference backend serves every device")


# A compiled graph keeps the choice it was traced with. This is torch.compiler.assume_constant_result, which imports
# the whole compiler, and Triton, only to set the attribute.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cannot_serve(backend: Backend, device_type: str) -> str | None:
    if backend.devices and device_type not in backend.devices:
        return f"it serves {' and '.join(backend.devices)} tensors, got {device_type}"
    if backend.name != "reference" and tracing.is_transforming():
        return "under torch.func transforms, forward-mode AD and torch.jit.trace only the reference runs"
    return backend.unavailable(device_type)


def functional(
    backend: Backend, device_type: str, requested: str = "auto", eager: bool = False
) -> Callable[..., Tensor]:
    """The registered op, or the reference, which every mode and transform sees through, and every subclass.

    Args:
        backend: What `choose` returned.
        device_type: Of the state.
        requested: The name that `choose` was given. The reference takes the place of a backend that cannot serve a
            tensor subclass only where none was asked for by name.
        eager: In plain eager mode: plain tensors go to the backend itself. The operands must be right, unchecked.
    """
    if backend.name == "reference":
        return reference.fused_step
    op: Callable[..., Tensor] = torch.ops.flowmatch_kernels.fused_step
    if backend.name != choose("auto", device_type).name:
        op = functools.partial(_op_by, backend.name)
    # else without a context, which a compiler would have to trace
    by_op = functools.partial(_step, op, backend.name, requested)
    return functools.partial(_directly, backend.load(), by_op) if eager else by_op


def _directly(launch: Callable[[Operands], None], by_op: Callable[..., Tensor], *operands: Any) -> Tensor:
    """One step by the backend, where the op's own way costs 30 us, and with a derivative 100."""
    derived = False
    for x in operands[:6]:  # base, v, u, h1, h2, h3
        if x is not None:
            if type(x) is not Tensor:
                return by_op(*operands)
            derived = derived or x.requires_grad
    if derived and torch.is_grad_enabled():
        result: Tensor = _Differentiable.apply(launch, *operands)
        return result
    out = torch.empty_like(operands[0])
    launch(Operands(out, *operands))
    return out


class _Differentiable(torch.autograd.Function):
    """A step by a backend, with the op's derivative."""

    @staticmethod
    def forward(ctx: Any, launch: Callable[[Operands], None], *operands: Any) -> Tensor:
        out = torch.empty_like(operands[0])
        launch(Operands(out, *operands))
        keep_for_backward(ctx, operands, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *backward(ctx, gradient)


def _step(op: Callable[..., Tensor], backend: str, requested: str, *operands: Any) -> Tensor:
    kind = subclasses.foreign(operands)
    if kind is None:
        return op(*operands)
    if requested == "auto" and not _override.get() and not os.environ.get(ENVIRONMENT_VARIABLE):
        return subclasses.attempted("a step in plain PyTorch", operands, lambda: reference.fused_step(*operands))
    try:
        return op(*operands)
    except Exception as error:
        raise RuntimeError(
            f"backend {backend!r} was asked for and cannot be used: it cannot step a {kind.__name__}, which backend "
            "'auto' or 'reference' steps in plain PyTorch"
        ) from error


def _op_by(backend: str, *operands: Any) -> Tensor:
    with use_backend(backend):
        return torch.ops.flowmatch_kernels.fused_step(*operands)


def keyed_noise(
    keys: Tensor,
    x_dims: Sequence[int],
    dtype: torch.dtype,
    evaluation: int = 0,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Normals [B, *x_dims], as `ops.keyed_noise` says: from the backend itself where nothing watches, else by the op.

    Args:
        keys: int64 [B, 3], contiguous.
        x_dims: The shape of one sample.
        dtype: Of the result.
        evaluation: Which of the draws.
        backend: As for `choose`.
        out: [B, *x_dims] of this dtype on the keys' device, contiguous, to write to; used where nothing watches.

    Raises:
        TypeError, ValueError: as `ops.keyed_noise.check` says.
        RuntimeError: the backend was asked for by name and cannot serve.
    """
    # A compiled graph keeps the choice it was traced with: the op would make its own when it runs.
    chosen = choose(backend, keys.device.type)
    if _transformed():
        noise_contract.check(keys, x_dims, dtype, evaluation)
        return reference_noise.keyed_noise(keys, x_dims, dtype, evaluation)
    if not tracing.is_eager():
        return torch.ops.flowmatch_kernels.keyed_noise(keys, x_dims, dtype, evaluation, chosen.name)
    return _drawn(chosen, keys, x_dims, dtype, evaluation, out)


def _drawn(
    backend: Backend, keys: Tensor, x_dims: Sequence[int], dtype: torch.dtype, evaluation: int, out: Tensor | None
) -> Tensor:
    noise_contract.check(keys, x_dims, dtype, evaluation)
    if out is None:
        out = torch.empty((keys.shape[0], *x_dims), dtype=dtype, device=keys.device)
    backend.load_noise()(out, keys, evaluation)
    return out


def _transformed() -> bool:
    """Within a transform, which sees PyTorch's own operations only."""
    return tracing.is_transforming()


# A compiler asks while it traces; what it made of the question itself would always be yes. As `_resolve`.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def step_log_prob(
    base: Tensor,
    v: Tensor,
    next: Tensor,
    coefficients: Tensor,
    densities: Tensor,
    row: int,
    backend: str = "auto",
) -> Tensor:
    """The mean over a sample's elements of log N(next; a*base + b0*v, std^2), for each sample.

        out = sum(d*d) / n * scale + offset,   d = next - (a*base + b0*v)

    A sample has the same bits in any batch and in every backend: `ops.step_log_prob` gives the order of the sum.
    Differentiable in base, v and next.

    Args:
        base: [B, *x_dims], float32, float64, bfloat16 or float16: the state before the step.
        v: [B, *x_dims], of base's dtype or a narrower one: the velocity there.
        next: [B, *x_dims], of base's dtype: the state after the step.
        coefficients: [rows, 8], contiguous, float64 for a float64 state, else float32; a and b0 are the row's first.
        densities: [rows, 2], contiguous, of the coefficients' dtype: scale = -1/(2 std^2) and
            offset = -log(std) - log(2 pi)/2 of each row.
        row: Which row.
        backend: As for `choose`.

    Returns:
        [B], of the coefficients' dtype.

    Raises:
        TypeError, ValueError: as `ops.step_log_prob.check` says; densities on the CPU, in eager mode, that are not
            finite, as those of std = 0.
        NotImplementedError: coefficients or densities require grad.
        RuntimeError: the backend was asked for by name and cannot serve.

    Source: Liu et al., Flow-GRPO, arXiv 2505.05470; the mean over elements, as its code has it.

    Example:
        >>> import math, torch
        >>> from flowmatch_kernels.ops import dispatch
        >>> std = 0.5
        >>> coefficients = torch.tensor([[1.0, 0.1, 0, 0, 0, 0, 0, 0]])
        >>> densities = torch.tensor([[-1 / (2 * std**2), -math.log(std) - math.log(2 * math.pi) / 2]])
        >>> x, v = torch.zeros(4, 3), torch.ones(4, 3)
        >>> dispatch.step_log_prob(x, v, x + 0.1, coefficients, densities, 0)
        tensor([-0.2258, -0.2258, -0.2258, -0.2258])
    """
    # A compiled graph keeps the choice it was traced with.
    chosen = choose(backend, base.device.type)
    if _transformed():
        log_prob_contract.check(base, v, next, coefficients, densities, row)
        return reference_log_prob.step_log_prob(base, v, next, coefficients, densities, row)
    return torch.ops.flowmatch_kernels.step_log_prob(base, v, next, coefficients, densities, row, chosen.name)


# ---- the kernels of the registered ops ----


def _routed_step_log_prob(
    base: Tensor, v: Tensor, next: Tensor, coefficients: Tensor, densities: Tensor, row: int, backend: str = "auto"
) -> Tensor:
    log_prob_contract.check(base, v, next, coefficients, densities, row)
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "torch.ops.flowmatch_kernels.step_log_prob has no forward-mode derivative: call "
            "flowmatch_kernels.ops.dispatch.step_log_prob, which then runs in plain PyTorch"
        )
    log_prob_contract.check_density(densities, row)
    out = torch.empty(base.shape[:1], dtype=coefficients.dtype, device=base.device)
    choose(backend, base.device.type).load_log_prob()(out, base, v, next, coefficients, densities, row)
    return out


library.impl("step_log_prob", _routed_step_log_prob, "CompositeExplicitAutograd")


def _routed_keyed_noise(
    keys: Tensor, x_dims: Sequence[int], dtype: torch.dtype, evaluation: int = 0, backend: str = "auto"
) -> Tensor:
    return _drawn(choose(backend, keys.device.type), keys, x_dims, dtype, evaluation, None)


library.impl("keyed_noise", _routed_keyed_noise, "CompositeExplicitAutograd")


def _routed_fused_step_(*operands: Any) -> None:
    given = Operands(*operands)
    check_operands(given)
    check_overlap(given)
    choose("auto", given.out.device.type).load()(given)


def _routed_fused_step(base: Tensor, *operands: Any) -> Tensor:
    out = torch.empty_like(base)
    _routed_fused_step_(out, base, *operands)
    return out


def _register(device_key: str) -> None:
    library.impl("fused_step", _routed_fused_step, device_key)
    library.impl("fused_step_", _routed_fused_step_, device_key)


_register("CUDA")
if native.cpu_unavailable() is not None:  # else csrc/bindings.cpp has registered C++ for the CPU
    _register("CPU")
