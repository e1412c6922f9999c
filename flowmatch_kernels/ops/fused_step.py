"""The one operation of this package: its contract, its schemas and its fakes.

    h0  = v                          unguided (u is None)
    h0  = w0*u + w1*v                guided, as the argument `guidance` says: WEIGHTED,
    h0  = u + w1*(v - u)             FROM_UNGUIDED,
    h0  = v + w1*(v - u)             FROM_GUIDED; each product, sum and difference rounded to the velocity's dtype
    out = a*base + b0*h0 + b1*h1 + b2*h2 + b3*h3       left to right, never an FMA
    out is written; so is trajectory[:, slot] = out; so is history = h0 + c*base (h0 alone where c is 0)

Types. S is the state's dtype (base, out, trajectory), V the velocity's (v, u), A the arithmetic dtype
(h1..h3, history, coefficients): float64 for a float64 state, else float32. V may not be wider than S.
The weights w0, w1 are cast to V's own arithmetic dtype first (float32 unless V is float64).

Rounding. Each product and each partial sum is rounded to S; a product b_k*h_k as the argument `rounding` says:
PROMOTE, to S, as PyTorch multiplies a step size that has dimensions;
EXACT, to V, as a step size that is a Python number;
ROUNDED, to V, b_k rounded to V first, as a step size that is a 0-dim tensor.

Out of v's dtype. With EXACT or ROUNDED, out and the trajectory may have v's dtype instead, and v any, among float32,
bfloat16 and float16: S is then the dtype that base's and out's promote to, and the last sum is rounded to out's.

Strength. With `strength`, a tensor of the state's dtype, b0*h0 is multiplied by it, element by element, and rounded to
S before it is added. It does not go with out of v's dtype, nor with `sum_first`.

Noise. h1 may be keys instead of values: int64 [B, 3], a row of `ops.keyed_noise` for each sample, whose third column
holds the evaluation too (`keyed_noise.at_evaluations`). h1 is then the noise that they draw, in A: the kernel makes it
and no memory holds it. The bits are those of a step that reads what `keyed_noise` has drawn in A. It does not go with
out of v's dtype, nor with `sum_first`.

Sum first. With `sum_first`, base, v and out being of one dtype, the terms are added before they are multiplied, from
the oldest on, as torchdiffeq does; a and c are the factors, and history is h0:

    out = base + ((b2*h2 + b1*h1 + b0*h0) * a) * c              up to two history terms
    out = base + ((b3*h3 + b1*(h2 + h1) + b0*h0) * a) * c       three

Rows of their own. `coefficients` [rows, 8] hold one row for all elements. [rows, R, 8] hold R, where R is the product
of the first sizes of the state's shape: B, one for each sample; or B times the next sizes, as one for each token. An
element uses the row that it lies in, and so its own step, weights of guidance and c. A term b_k*h_k whose b_k is 0 is
then left out, by a choice and not by a product: what h_k holds, NaN and infinities too, does not count. So a row HELD,
a = 1 and b0..b3 = 0, leaves the bits of base as they are, -0.0 too. With one row for all, 0*h_k is added as eager
PyTorch adds it. Not with `sum_first`.

Overlaps. What is written (out, the trajectory's slot, history) lies in memory of its own. Two exceptions: out may be
base, where they have one dtype, and history may be one of h1..h3, each the same memory to the byte. Whatever is only
read may overlap. A v or u that is not contiguous counts for nothing here: a backend copies it before it writes.
Everything else raises a ValueError, in every backend's `fused_step_` and in the registered op; a fake tensor has no
memory to compare.

Errors. TypeError: a wrong dtype, or no tensor. ValueError: a wrong shape, device, layout, row, slot, or an overlap.
`torch.ops` raises them too, save what torch's dispatcher refuses in its own words: tensors of two devices.

Bytes moved per element are the least possible: each operand is read once, each result written once.
Every backend gives the same bits as `reference.fused_step`, which is the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..tracing import has_tangent

NAMESPACE = "flowmatch_kernels"

#: The columns of a row of coefficients.
COLUMNS = ("a", "b0", "b1", "b2", "b3", "w0", "w1", "c")

#: A row of their own that leaves base as it is: every term is left out.
HELD = (1.0, *[0.0] * 7)

#: How the two velocities of guidance are combined: the argument `guidance`.
WEIGHTED, FROM_UNGUIDED, FROM_GUIDED = range(3)

#: What a product b_k*h_k is rounded to: the argument `rounding`.
PROMOTE, EXACT, ROUNDED = range(3)

#: state dtype -> the velocity dtypes that do not widen it
VELOCITY_DTYPES = {
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}


class Operands(NamedTuple):
    """What one fused step reads and writes. Every backend takes one; the schemas below are its fields."""

    out: Tensor
    """S or V, [B, *x_dims], contiguous; written; may be base itself, and overlaps nothing else."""
    base: Tensor
    """S, [B, *x_dims], contiguous."""
    v: Tensor
    """V, [B, *x_dims]; a backend that reads raw memory copies it where it is not contiguous."""
    u: Tensor | None
    """V, as v; with guidance."""
    h1: Tensor | None
    """A, [B, *x_dims], contiguous; h2 and h3 likewise. They fill up from h1. Or h1 is keys, int64 [B, 3]."""
    h2: Tensor | None
    h3: Tensor | None
    coefficients: Tensor
    """A, [rows, 8], contiguous; or with rows of their own [rows, R, 8]."""
    row: int
    rounding: int = PROMOTE
    guidance: int = WEIGHTED
    sum_first: bool = False
    strength: Tensor | None = None
    """S, [B, *x_dims], contiguous."""
    trajectory: Tensor | None = None
    """As out, [B, slots, *x_dims], contiguous; its slot is written, and overlaps nothing else."""
    slot: int = 0
    history: Tensor | None = None
    """A, [B, *x_dims], contiguous; written; may be one of h1..h3 itself, and overlaps nothing else."""


#: The operands that a step writes.
WRITTEN = ("out", "trajectory", "history")
#: What else they may be, to the byte; and how that is said.
_MAY_BE = {
    "out": (("base",), ", or base itself"),
    "history": (("h1", "h2", "h3"), ", or one of h1, h2, h3 itself"),
    "trajectory's slot": ((), ""),
}
_SCHEMA_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "int": "int", "bool": "bool"}


def _schema(names: Sequence[str]) -> str:
    """The operands of these names, as a schema of PyTorch spells them."""
    parts = []
    for name in names:
        kind = _SCHEMA_TYPES[Operands.__annotations__[name].__forward_arg__]
        if name in WRITTEN:
            kind = kind.replace("Tensor", f"Tensor({'abc'[WRITTEN.index(name)]}!)")
        default = f"={Operands._field_defaults[name]}" if name in Operands._field_defaults else ""
        parts.append(f"{kind} {name}{default}")
    return ", ".join(parts)


#: The operands of the functional op, which writes nothing.
READ = tuple(name for name in Operands._fields if name not in (*WRITTEN, "slot"))
FUSED_STEP = f"fused_step({_schema(READ)}) -> Tensor"
FUSED_STEP_ = f"fused_step_({_schema(Operands._fields)}) -> ()"


def arithmetic_dtype(state_dtype: torch.dtype) -> torch.dtype:
    """A, the dtype of coefficients and history: float64 for a float64 state, else float32."""
    return torch.float64 if state_dtype == torch.float64 else torch.float32


#: Device types on which float64 is sure; MPS and some XPUs have none.
FLOAT64_DEVICES = ("cpu", "cuda", "meta")


def covered(shape: Sequence[int], R: int) -> Sequence[int] | None:
    """The first sizes of a state's shape whose product is R, one or more: those that R rows of their own have one for.

    None: there are none. csrc/launch.h holds the same rule.
    """
    product = 1
    for d, size in enumerate(shape, start=1):
        product *= size
        if product == R:
            return shape[:d]
    return None


def double(x: Tensor) -> Tensor:
    """x in float64; on the CPU where the device may lack it."""
    return x.double() if x.device.type in FLOAT64_DEVICES else x.cpu().double()


def is_keys(h1: Tensor | None) -> bool:
    """Whether the operand h1 is keys of noise, and not values."""
    return h1 is not None and h1.dtype == torch.int64


def dense(v: Tensor) -> Tensor:
    """v as contiguous memory that holds its values: v itself, most often, else one copy.

    For kernels that read raw memory. A tensor may be strided; its negative bit may be set; or it may be
    one of autograd's zero tensors, which have no memory.
    """
    if not torch.compiler.is_compiling() and v._is_zerotensor():  # Dynamo cannot ask
        v = v.clone()
    return v.resolve_neg().contiguous()


def check_operands(operands: Operands) -> None:
    """Raises where an operand breaks the contract above, overlaps aside; the C++ ops hold the same checks.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a layout, the row or the slot is wrong.
    """
    out, base, v, u, h1, h2, h3, coefficients, row = operands[:9]
    rounding, guidance, sum_first, strength, trajectory, slot, history = operands[9:]
    if rounding not in (PROMOTE, EXACT, ROUNDED):
        raise ValueError(f"rounding must be {PROMOTE}, {EXACT} or {ROUNDED}, got {rounding}")
    check_dtypes(base.dtype, v.dtype, out.dtype, rounding, sum_first)
    arithmetic = arithmetic_dtype(base.dtype)
    if strength is not None and (sum_first or out.dtype != base.dtype):
        raise ValueError(f"strength needs out of base's dtype {base.dtype} and no sum_first")
    if (h2 is not None and h1 is None) or (h3 is not None and h2 is None):
        raise ValueError("history terms fill up from h1: h2 needs h1, h3 needs h2")
    keyed = is_keys(h1)
    if h1 is not None and keyed:
        if sum_first or out.dtype != base.dtype:
            raise ValueError(f"h1 of keys needs out of base's dtype {base.dtype} and no sum_first")
        if base.dim() == 0 or h1.shape != (base.shape[0], 3) or not h1.is_contiguous():
            raise ValueError(
                f"h1 of keys must be contiguous, [B, 3] for a state {list(base.shape)}, got {list(h1.shape)}"
            )
        if h1.device != base.device:
            raise ValueError(f"h1 must be on base's device {base.device}, got {h1.device}")
    if guidance not in (WEIGHTED, FROM_UNGUIDED, FROM_GUIDED):
        raise ValueError(f"guidance must be {WEIGHTED}, {FROM_UNGUIDED} or {FROM_GUIDED}, got {guidance}")
    shape, device = base.shape, base.device
    for name, tensor, dtype in (
        ("base", base, base.dtype),
        ("out", out, out.dtype),
        ("v", v, v.dtype),
        ("u", u, v.dtype),
        ("h1", None if keyed else h1, arithmetic),
        ("h2", h2, arithmetic),
        ("h3", h3, arithmetic),
        ("history", history, arithmetic),
        ("strength", strength, base.dtype),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have base's shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on base's device {device}, got {tensor.device}")
        if name not in ("v", "u") and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    if coefficients.dtype != arithmetic:
        raise TypeError(f"coefficients must be {arithmetic}, got {coefficients.dtype}")
    if coefficients.dim() not in (2, 3) or coefficients.shape[-1] != len(COLUMNS) or not coefficients.is_contiguous():
        raise ValueError(
            f"coefficients must be contiguous, [rows, {len(COLUMNS)}] or [rows, R, {len(COLUMNS)}], "
            f"got {list(coefficients.shape)}"
        )
    if coefficients.dim() == 3:
        if covered(shape, coefficients.shape[1]) is None:
            raise ValueError(
                f"coefficients [rows, R, {len(COLUMNS)}] need R to be the product of the first sizes of base's shape "
                f"{list(shape)}, got {list(coefficients.shape)}"
            )
        if sum_first:
            raise ValueError(f"sum_first needs coefficients [rows, 8], got {list(coefficients.shape)}")
    if coefficients.device != device:
        raise ValueError(f"coefficients must be on base's device {device}, got {coefficients.device}")
    if not 0 <= row < coefficients.shape[0]:
        raise ValueError(f"row must be in [0, {coefficients.shape[0]}), got {row}")
    if trajectory is not None:
        if trajectory.dtype != out.dtype:
            raise TypeError(f"trajectory must be {out.dtype}, got {trajectory.dtype}")
        if (
            base.dim() == 0
            or trajectory.dim() != base.dim() + 1
            or trajectory.shape[:1] + trajectory.shape[2:] != shape
            or not trajectory.is_contiguous()
        ):
            raise ValueError(
                f"trajectory must be contiguous, [B, slots, *x_dims] for a state {list(shape)}, "
                f"got {list(trajectory.shape)}"
            )
        if trajectory.device != device:
            raise ValueError(f"trajectory must be on base's device {device}, got {trajectory.device}")
        if not 0 <= slot < trajectory.shape[1]:
            raise ValueError(f"slot must be in [0, {trajectory.shape[1]}), got {slot}")


def check_dtypes(
    base: torch.dtype, velocity: torch.dtype, out: torch.dtype, rounding: int = PROMOTE, sum_first: bool = False
) -> None:
    """Raises where dtypes do not go together; the C++ ops hold the same checks, in the same words.

    Raises:
        TypeError: they do not, or not with this rounding.
    """
    for name, dtype in (("base", base), ("v", velocity), ("out", out)):
        if dtype not in VELOCITY_DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")
    if out not in (base, velocity):
        raise TypeError(f"out must be {base}, as base, or {velocity}, as v; got {out}")
    if out == base and velocity not in VELOCITY_DTYPES[base]:
        raise TypeError(f"v is {velocity}, wider than the state's {base}: cast v, or choose a wider state")
    if sum_first and not base == velocity == out:
        raise TypeError(f"sum_first needs base, v and out of one dtype, got {base}, {velocity} and {out}")
    if out == base:
        return
    if torch.float64 in (base, velocity):
        raise TypeError(f"out must have base's dtype where base or v is torch.float64; got {out}")
    if rounding == PROMOTE:
        raise TypeError(f"out of v's dtype needs rounding {EXACT} or {ROUNDED}, got {rounding}")


def check_overlap(operands: Operands) -> None:
    """Raises where what is written overlaps what it may not: csrc/overlap.cpp holds the same rule, in the same words.

    Compares addresses only. From the first element of the trajectory's slot to its last, all counts as written.

    Raises:
        ValueError: two operands overlap; says which, and how.
    """
    out, base, v, u, h1, h2, h3, coefficients, _, _, _, _, strength, trajectory, slot, history = operands
    numel = base.numel()
    if not numel:
        return
    regions: list[tuple[str, int, int]] = []  # name, begin, end

    def add(name: str, tensor: Tensor | None, first: int = 0, elements: int = numel) -> None:
        try:
            begin = 0 if tensor is None else tensor.data_ptr()
        except RuntimeError:  # no memory: a fake tensor, a transform's
            return
        if tensor is not None and begin:
            size = tensor.element_size()
            regions.append((name, begin + first * size, begin + (first + elements) * size))

    add("out", out)
    if trajectory is not None:
        samples, slots = trajectory.shape[:2]
        sample = numel // samples
        add("trajectory's slot", trajectory, slot * sample, numel + (slots - 1) * (numel - sample))
    add("history", history)
    written = len(regions)
    add("base", base)
    for name, velocity in (("v", v), ("u", u)):
        if velocity is not None and velocity.is_contiguous():  # else it is copied first
            add(name, velocity)
    add("h1", h1, 0, h1.numel() if h1 is not None and is_keys(h1) else numel)
    add("h2", h2)
    add("h3", h3)
    add("strength", strength)
    add("coefficients", coefficients, 0, coefficients.numel())
    for k, (name, begin, end) in enumerate(regions[:written]):
        for other, its_begin, its_end in regions[k + 1 :]:
            if end <= its_begin or its_end <= begin:
                continue
            allowed = other in _MAY_BE[name][0] and (other != "base" or out.dtype == base.dtype)
            allowed = allowed and not (other == "h1" and is_keys(h1))
            if begin != its_begin or not allowed:
                raise ValueError(
                    f"{name} overlaps {other}: it begins {abs(begin - its_begin)} bytes "
                    f"{'after' if begin >= its_begin else 'before'} {other} does; wanted memory of its own"
                    f"{_MAY_BE[name][1]}"
                )


# ---- registration: schemas, fakes, autograd. dispatch.py adds the kernels. ----

library = torch.library.Library(NAMESPACE, "DEF")
library.define(FUSED_STEP, tags=(torch.Tag.pt2_compliant_tag,))
library.define(FUSED_STEP_, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake(f"{NAMESPACE}::fused_step", lib=library)
def _fused_step_fake(base: Tensor, *operands: Any) -> Tensor:
    check_operands(Operands(base, base, *operands))
    return torch.empty_like(base)


@torch.library.register_fake(f"{NAMESPACE}::fused_step_", lib=library)
def _fused_step_inplace_fake(*operands: Any) -> None:
    check_operands(Operands(*operands))


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What `backward` needs of a step, of the functional op's operands."""
    base, v, u, h1, h2, h3, coefficients, row, _, guidance, sum_first, strength = inputs
    for name, tensor in (("coefficients", coefficients), ("strength", strength)):
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(f"fused_step has no gradient for {name}: detach it")
    ctx.save_for_backward(coefficients, strength)
    ctx.row, ctx.guidance, ctx.sum_first = row, guidance, sum_first
    ctx.dtypes = base.dtype, v.dtype
    ctx.present = u is not None, h1 is not None and not is_keys(h1), h2 is not None, h3 is not None


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the exact expression: each rounding counts as the identity."""
    coefficients, strength = ctx.saved_tensors
    state, velocity = ctx.dtypes
    guided, *history = ctx.present
    a, b0, b1, b2, b3, w0, w1, c = coefficients.select(0, ctx.row).unbind(-1)
    own = coefficients.dim() == 3
    if own:
        sizes = covered(gradient.shape, coefficients.shape[1])
        assert sizes is not None
        spans = [*sizes, *[1] * (gradient.dim() - len(sizes))]
        a, b0, b1, b2, b3, w0, w1 = (column.view(spans) for column in (a, b0, b1, b2, b3, w0, w1))

    def times(b: Tensor, gradient: Tensor) -> Tensor:
        return torch.where(b == 0, 0, b * gradient) if own else b * gradient  # a term that is left out has none

    if ctx.sum_first:
        b2 = b1 if history[2] else b2
        b0, b1, b2, b3, a = b0 * a * c, b1 * a * c, b2 * a * c, b3 * a * c, torch.ones_like(a)
    gradient = gradient.to(coefficients.dtype)
    to_h0 = times(b0, gradient if strength is None else gradient * strength)
    if ctx.guidance != WEIGHTED:  # w1*(v - u), added to one of the two
        w0, w1 = (1 - w1, w1) if ctx.guidance == FROM_UNGUIDED else (-w1, 1 + w1)
    to_history = [times(b, gradient) if present else None for b, present in zip((b1, b2, b3), history, strict=True)]
    return (
        (a * gradient).to(state),
        (w1 * to_h0 if guided else to_h0).to(velocity),
        (w0 * to_h0).to(velocity) if guided else None,
        *to_history,
        *(None,) * 6,  # coefficients, row, rounding, guidance, sum_first, strength
    )


def _refuse_tangents(operands: Sequence[Any]) -> None:
    # Dynamo compiles what a frame that it gives up calls, and would see no tangent.
    if forward_ad._current_level >= 0 and torch.compiler.disable(_any_has_tangent)(operands):
        raise NotImplementedError(
            "torch.ops.flowmatch_kernels.fused_step and fused_step_ have no forward-mode derivative: call "
            "FlowMatching.sample, which then runs in plain PyTorch"
        )


def _any_has_tangent(operands: Sequence[Any]) -> bool:
    return any(isinstance(x, Tensor) and has_tangent(x) for x in operands)


class _WithoutTangents:
    """The library for `register_autograd`, whose kernel would drop the tangents of forward-mode AD without a word."""

    @staticmethod
    def impl(name: str, kernel: Callable[..., Any], key: str, **options: Any) -> None:
        def checked(keyset: Any, *operands: Any) -> Any:
            _refuse_tangents(operands)
            return kernel(keyset, *operands)

        library.impl(name, checked, key, **options)


torch.library.register_autograd(
    f"{NAMESPACE}::fused_step",
    backward,
    setup_context=keep_for_backward,
    lib=_WithoutTangents,
)


def _fused_step_inplace_autograd(*operands: Any) -> None:
    _refuse_tangents(operands)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in operands):
        raise RuntimeError(
            "fused_step_ writes in place and has no gradient, and an operand requires grad: "
            "detach it, or call torch.ops.flowmatch_kernels.fused_step"
        )
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.flowmatch_kernels.fused_step_(*operands)
    given = Operands(*operands)
    written = [getattr(given, name) for name in WRITTEN]
    torch.autograd.graph.increment_version([x for x in written if x is not None and not x.is_inference()])


library.impl("fused_step_", _fused_step_inplace_autograd, "Autograd")
