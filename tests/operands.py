"""Operands for the kernel's tests: awkward values, layouts, guarded buffers, and equality of bits."""

import itertools
import math

import torch

from flowmatch_kernels.ops import reference
from flowmatch_kernels.ops.fused_step import FROM_GUIDED, FROM_UNGUIDED, WEIGHTED

INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
INTEGERS |= {torch.float16: torch.int16, torch.int64: torch.int64}
#: torch.manual_seed keeps the stack of its call for each kind of device that there is not: 0.5 ms under pytest.
manual_seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
LAYOUTS = ("contiguous", "misaligned", "sliced", "transposed", "channels_last", "expanded")
GUARD = 64
FORMS = (WEIGHTED, FROM_UNGUIDED, FROM_GUIDED)
#: Guidance as users write it, the kernel's form of it, and w0 and w1; NaN for a weight that is not to be read.
FORMULAS = {
    "(1-w)*u+w*v": (lambda u, v, w: (1 - w) * u + w * v, WEIGHTED, lambda w: (1 - w, w)),
    "(1+w)*v-w*u": (lambda u, v, w: (1 + w) * v - w * u, WEIGHTED, lambda w: (-w, 1 + w)),
    "u+w*(v-u)": (lambda u, v, w: u + w * (v - u), FROM_UNGUIDED, lambda w: (float("nan"), w)),
    "v+w*(v-u)": (lambda u, v, w: v + w * (v - u), FROM_GUIDED, lambda w: (float("nan"), w)),
}


def bits(x):
    """The bits of a tensor, with every NaN made one: which NaN is not part of the contract."""
    integers = x.detach().contiguous().view(INTEGERS[x.dtype])
    return torch.where(torch.isnan(x), torch.tensor(-1, dtype=integers.dtype), integers)


def same_bits(x, y):
    """Equal in shape, dtype and bits; -0.0 is not 0.0, and NaN is NaN."""
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(bits(x), bits(y))


def assert_same_bits(got, wanted, what=""):
    assert got.dtype == wanted.dtype, f"{what}: {got.dtype}, wanted {wanted.dtype}"
    assert got.shape == wanted.shape, f"{what}: {list(got.shape)}, wanted {list(wanted.shape)}"
    if not same_bits(got, wanted):
        differ = (bits(got) != bits(wanted)).nonzero()
        where = tuple(differ[0].tolist())
        raise AssertionError(
            f"{what}: {len(differ)} of {got.numel()} elements differ, the first at {where}: "
            f"{got[where].item()!r}, wanted {wanted[where].item()!r}"
        )


def special_values(dtype):
    """Zeros, infinities, NaN, denormals, and the least, the greatest and the next to one of a dtype."""
    info = torch.finfo(dtype)
    return torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), info.max, -info.max, info.tiny, -info.tiny]
        + [info.tiny / 2, -info.tiny / 4, info.smallest_normal * info.eps, 1.0, -1.0, 1 + info.eps],
        dtype=torch.float64,
    ).to(dtype)


def values(shape, dtype, generator, special=True):
    """Random values over many binades; one in eight is a special value, where asked."""
    shape = list(shape)
    numel = math.prod(shape)
    if numel > 1 << 16:  # a prime number of values over and over: quicker to draw, and out of step with any strip
        return values([4099], dtype, generator, special).repeat(numel // 4099 + 1)[:numel].view(shape)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.exp2(torch.randint(-6, 7, shape, generator=generator).double())
    x = x.to(dtype)
    if special:
        choices = special_values(dtype)
        chosen = choices[torch.randint(len(choices), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.125, chosen, x)
    return x


def laid_out(x, layout):
    """x's values (for "expanded": of its first entries) in another layout; None where the rank has none."""
    if layout == "contiguous":
        return x
    if layout == "misaligned":  # contiguous, but not on a 16-byte boundary
        y = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    elif layout == "sliced":
        if x.dim() == 0:
            return None
        y = x.new_empty([*x.shape[:-1], x.shape[-1] + 3])[..., 2 : 2 + x.shape[-1]]
    elif layout == "transposed":
        if x.dim() < 2:
            return None
        y = x.new_empty(x.transpose(0, -1).shape).transpose(0, -1)
    elif layout == "channels_last":
        if x.dim() != 4:
            return None
        y = torch.empty_like(x, memory_format=torch.channels_last)
    else:
        if x.dim() == 0 or x.numel() == 0:
            return None
        return x[:1].expand(x.shape) if x.shape[0] > 1 else x[..., :1].expand(x.shape)
    return y.copy_(x)


class Guarded:
    """A contiguous tensor full of NaN, with a known pattern before and behind it."""

    def __init__(self, shape, dtype, fill=None):
        numel = math.prod(shape)
        self.memory = torch.full([numel + 2 * GUARD], -77.0, dtype=dtype)
        self.tensor = self.memory[GUARD : GUARD + numel].view(list(shape))
        self.tensor.fill_(float("nan"))
        if fill is not None:
            self.tensor.copy_(fill)

    def intact(self):
        return bool((self.memory[:GUARD] == -77.0).all() and (self.memory[-GUARD:] == -77.0).all())


def coefficients(arithmetic, generator, rows=3, c=True):
    """[rows, 8] of random coefficients, the first the plain step's a = 1; w0 + w1 is about 1."""
    table = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    table[0, 0] = 1.0
    table[:, 5] = 1 - table[:, 6]
    if not c:
        table[:, 7] = 0.0
    return table.to(arithmetic)


def combinations():
    """guidance or None, history terms, slots or None, what history is (None, "new", or the h it overwrites), c.

    The two forms of guidance by differences meet every other operand but the slots, which take turns.
    """
    for guidance, terms, slots in itertools.product((None, *FORMS), range(4), (None, 1, 4)):
        if guidance in (FROM_UNGUIDED, FROM_GUIDED) and slots != (None, 1, 4)[(guidance + terms) % 3]:
            continue
        for history in (None, "new", *range(terms)):
            for c in (True, False) if history is not None else (True,):
                yield guidance, terms, slots, history, c


def remembered(base, v, u, table, row, guidance=WEIGHTED):
    """What the reference puts into a history buffer."""
    columns = reference.Columns.of(table, row, base.dim())
    return reference.remember(base, reference.velocity(v, u, columns, guidance), columns)
