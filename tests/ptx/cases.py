"""The cases that both kernels' PTX is executed on: single steps, one operand off its boundary, whole sample() loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import log_prob_operands
import published
import torch
from torch import Tensor
from triton_cases import FORMS, PAIRS, PRIME, Case, Guarded, combinations, copied, differing, failures, values

from flowmatch_kernels import FlowMatching, KeyedNoise, solvers
from flowmatch_kernels.noise import keys as noise_keys
from flowmatch_kernels.ops import reference, reference_log_prob, reference_noise
from flowmatch_kernels.ops.fused_step import COLUMNS, WEIGHTED, Operands
from flowmatch_kernels.sampling import integrate

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FusedStep = Callable[[Operands], None]

#: Around a block, and where 16-byte accesses end: elements, and whether all operands begin on 16 bytes.
SIZES = [(1, False), (31, False), (1023, True), (1024, True), (1024, False), (1025, True), (1025, False), (2048, True)]


def steps() -> list[Case]:
    """Two complementary sets of operands for each pair of dtypes, at every size; one of 200 blocks.

    Each set is two compilations of the Triton kernel: with 16-byte accesses and without.
    """
    chosen = []
    for i, (state, velocity) in enumerate(PAIRS):
        trajectory, history, rounding = i % 2 == 0, i // 2 % 2 == 0 and i < 8, i % 3
        first = (None, *FORMS)[i % 4], i % 4, trajectory, history, rounding
        second = (None, *FORMS)[(i + 2) % 4], 3 - i % 4, not trajectory, not history, (rounding + 1) % 3
        for operands in (first, second):
            chosen += [Case(state, velocity, *operands, numel, aligned) for numel, aligned in SIZES]
    return [*chosen, chosen[0]._replace(numel=PRIME)]


def combinations_but(left_out: int) -> list[Case]:
    """All of `combinations` but one quarter, 0 to 3; sizes and alignment by turns.

    Not for a kernel that compiles each set of operands on its own.
    """
    chosen = []
    for i, (state, velocity) in enumerate(PAIRS):
        for j, case in enumerate(combinations(state, velocity, 0, aligned=False)):
            numel, aligned = SIZES[(i + j // 4 + j) % len(SIZES)]
            if j % 4 != left_out:
                chosen.append(case._replace(numel=numel, aligned=aligned))
    return chosen


def failed(fused_step_: FusedStep, cases: Iterable[Case]) -> list[str]:
    """What differs from `reference`, or is refused by the executor."""
    found = []
    for case in cases:
        try:
            found += failures(fused_step_, case)
        except (RuntimeError, AssertionError) as error:  # where a GPU would stop, or move bytes that it need not
            found.append(f"{type(error).__name__}: {error} [{case}]")
    return found


# ---- one operand off its boundary ----

NAMES = ("out", "base", "v", "u", "h1", "h2", "h3", "trajectory", "history")
#: A strength goes without the velocities before.
WITH_STRENGTH = ("out", "base", "v", "strength")


def off_boundary() -> list[tuple[str, int]]:
    """Each operand in turn, with the bytes that it begins after a multiple of 16: one element, and half an access."""
    return [(name, shift) for name in (*NAMES, "strength") for shift in (2 if name in ("v", "u") else 4, 8)]


def shifted(fused_step_: FusedStep, name: str, shift: int) -> list[str]:
    """What a step with every operand does wrong when that one alone is off its boundary."""
    batch, slots, sample = 4, 3, 256
    generator = torch.Generator().manual_seed(0)
    names, buffers = WITH_STRENGTH if name == "strength" else NAMES, {}

    def tensor(called: str, dtype: torch.dtype, shape: tuple[int, ...] = (batch, sample)) -> Tensor:
        elements = torch.Size(shape).numel()
        begin = shift // dtype.itemsize if called == name else 0
        buffers[called] = Guarded((elements + 16 // dtype.itemsize,), dtype, aligned=True)
        buffers[called].tensor.copy_(values((elements + 16 // dtype.itemsize,), dtype, generator))
        return buffers[called].tensor[begin : begin + elements].view(shape)

    given = {key: tensor(key, BF16 if key in ("v", "u") else F32) for key in names if key != "trajectory"}
    if "trajectory" in names:
        given |= {"trajectory": tensor("trajectory", F32, (batch, slots, sample)), "slot": 2}
    absent = {key: None for key in ("u", "h1", "h2", "h3") if key not in names}
    o = Operands(**given, **absent, coefficients=torch.randn(3, len(COLUMNS), generator=generator), row=1)
    expected = copied(o)
    reference.fused_step_(expected)
    try:
        fused_step_(o)
    except (RuntimeError, AssertionError) as error:
        return [f"{name} off by {shift} bytes: {type(error).__name__}: {error}"]
    pairs = [(key, getattr(o, key), getattr(expected, key)) for key in names]
    found = [f"{name} off by {shift} bytes: {key} differs" for key, got, wanted in pairs if differing(got, wanted)]
    return found + [f"{key}: written outside" for key, buffer in buffers.items() if buffer.touched()]


# ---- velocities that are not contiguous ----


def not_contiguous(fused_step_: FusedStep) -> list[str]:
    """What a guided step does wrong with v, u or both transposed, expanded, or sliced: nine steps."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base, dense, coefficients = tensor(4, 64), tensor(4, 64), tensor(1, len(COLUMNS))
    layouts = {"transposed": tensor(64, 4).T, "expanded": tensor(1, 64).expand(4, 64), "sliced": tensor(4, 128)[:, ::2]}
    found = []
    for layout, x in layouts.items():
        other = (2 * x.T).T  # of the same strides, but where x is expanded
        for which, v, u in (("v", x, dense), ("u", dense, x), ("both", x, other)):
            o = Operands(torch.full_like(base, torch.nan), base, v, u, None, None, None, coefficients, 0)
            expected = copied(o)
            reference.fused_step_(expected)
            try:
                fused_step_(o)
            except (RuntimeError, AssertionError) as error:
                found.append(f"{which} {layout}: {type(error).__name__}: {error}")
                continue
            if differing(o.out, expected.out):
                found.append(f"{which} {layout}: out differs")
    return found


# ---- the other ops ----


def noise(keyed_noise_: Callable[[Tensor, Tensor, int], None], dtypes: Iterable[torch.dtype]) -> list[str]:
    """What draws of keyed noise do other than `reference_noise`: samples that end within a block, at all alignments.

    The keys have every word of the counter set, and one sample's index passes 2^32.
    """
    keys = noise_keys(
        [KeyedNoise(0x9234567887654321, (1 << 32) - 2 + i, 40000) for i in range(5)], 5, torch.device("cpu")
    )
    found = []
    for dtype in dtypes:
        for elements, aligned in [(1, True), (7, True), (128, True), (128, False), (1030, True)]:
            buffer = Guarded((5, elements), dtype, aligned)
            buffer.tensor.fill_(torch.nan)
            wanted = reference_noise.keyed_noise(keys, [elements], dtype, 65535)
            case = f"[{elements} {dtype} {aligned}]"
            found += _written(lambda out: keyed_noise_(out, keys, 65535), buffer, wanted, case)
    return found


def _written(op: Callable[[Tensor], None], out: Guarded, wanted: Tensor, case: str) -> list[str]:
    """What op(out) writes other than it should, or what the executor refuses."""
    try:
        op(out.tensor)
    except (RuntimeError, AssertionError) as error:
        return [f"{type(error).__name__}: {error} {case}"]
    count = differing(out.tensor, wanted)
    wrong = [f"{count} of {wanted.numel()} elements differ {case}"] if count else []
    return [*wrong, f"written outside {case}"] if out.touched() else wrong


def log_probs(
    step_log_prob_: Callable[..., None], pairs: Iterable[tuple[torch.dtype, torch.dtype]], sizes: Iterable[int]
) -> list[str]:
    """Where log-probabilities differ from `reference_log_prob`'s: on 16 bytes, and with one or all operands off.

    Three calls for each size: plain values, special ones with operands off, and rows of their own, one of them held.
    """
    found, odd = [], itertools.cycle(("base", "v", "next", "all"))
    for state, velocity in pairs:
        for elements in sizes:
            for special, own_rows in ((False, False), (True, False), (True, True)):
                off = next(odd) if special and not own_rows and elements % 8 == 0 else ""
                operands = log_prob_operands.drawn([3, elements], state, velocity, special, own_rows=own_rows)
                *read, coefficients, densities = operands
                given = {}
                for name, x in zip(("base", "v", "next"), read, strict=True):
                    given[name] = Guarded(tuple(x.shape), x.dtype, aligned=off not in (name, "all")).tensor
                    given[name].copy_(x)
                out = Guarded((3,), coefficients.dtype, aligned=True)
                out.tensor.fill_(torch.nan)
                case = f"[{elements} {state} {velocity} off={off!r} special={special} own_rows={own_rows}]"
                wanted = reference_log_prob.step_log_prob(*read, coefficients, densities, 1)
                operands = *given.values(), coefficients, densities, 1
                found += _written(lambda out, operands=operands: step_log_prob_(out, *operands), out, wanted, case)
    return found


# ---- whole loops ----


class Loop(NamedTuple):
    """One call of sample()."""

    solver: str = "euler"
    state: torch.dtype = F32
    velocity: torch.dtype = F32
    guided: bool = False
    trajectory: bool = False
    x_dims: tuple[int, ...] = (64, 2)
    off: int = 0
    """Every second velocity begins so many elements after a 16-byte boundary."""
    off_unguided: int = 0
    """Every second unguided velocity likewise."""
    off_strength: int = 0
    """There is a velocity_strength, which begins so many elements after one."""
    own_times: bool = False
    """Each sample has times and a weight of guidance of its own; the last is held in its first step."""
    keyed: bool = False
    """The noise of its steps is drawn by keys, in the kernel."""

    def __str__(self) -> str:
        return " ".join(map(str, self)).replace("torch.", "")


#: Few sets of operands, so that the Triton kernel is compiled seldom.
LOOPS = [
    *[Loop(solver) for solver in sorted(solvers.SOLVERS)],
    Loop(velocity=BF16),
    Loop(velocity=BF16, x_dims=(7, 3)),
    Loop(guided=True, trajectory=True),
    Loop(trajectory=True, velocity=BF16),
    Loop(guided=True, velocity=BF16, trajectory=True, x_dims=(7, 3)),
    Loop(state=F64),
    Loop(state=BF16, velocity=BF16),
    Loop(velocity=BF16, off=1),
    Loop(off=2),
    Loop(guided=True, trajectory=True, off_unguided=2),
]
#: Their noise is a history operand that no row writes.
STOCHASTIC_LOOPS = [Loop("sde"), Loop("renoise", off=1)]
STRENGTH_LOOPS = [Loop(off_strength=2)]
KEYED_LOOPS = [
    Loop("sde", keyed=True),
    Loop("renoise", velocity=BF16, trajectory=True, x_dims=(7, 3), keyed=True),
    Loop("cps", guided=True, trajectory=True, own_times=True, keyed=True),
]
OWN_LOOPS = [
    Loop("heun", guided=True, trajectory=True, own_times=True),
    Loop("ab2", velocity=BF16, x_dims=(7, 3), own_times=True),
]
MORE_LOOPS = [
    *[Loop(s, velocity=BF16, guided=True, trajectory=True, x_dims=(7, 3)) for s in sorted(solvers.SOLVERS)],
    Loop("heun", F64, F16, guided=True, trajectory=True),
    Loop("rk4", F16, F16, guided=True, x_dims=(7, 3)),
    Loop("ab3", BF16, BF16, trajectory=True),
    Loop("dpmpp_2m", F64, F32, trajectory=True),
]


def own_times() -> Tensor:
    """[5, 5]: one grid for each of five samples; the last is held in its first step."""
    t = torch.linspace(0, 1, 5) ** torch.linspace(0.6, 2, 5).view(5, 1)
    t[4, 0] = t[4, 1]
    return t


def models(loop: Loop) -> tuple[Any, Any]:
    """The guided and the unguided velocity of a loop."""

    def every_second(off: int, model: Any) -> Any:
        calls = itertools.count()

        def shifting(x: Tensor, t: Tensor) -> Tensor:
            v = model(x, t).to(loop.velocity)
            return moved(v, off) if next(calls) % 2 else v

        return shifting

    return (
        every_second(loop.off, lambda x, t: torch.cos(3 * x) - x * t),
        every_second(loop.off_unguided, lambda x, t: torch.sin(2 * x) + t),
    )


def moved(x: Tensor, off: int) -> Tensor:
    """The same numbers, so many elements after a 16-byte boundary."""
    flat = x.flatten()
    return torch.cat([flat[:off], flat])[off:].view(x.shape)


def looped_by_rows(loop: Loop, half: Any) -> list[str]:
    """What `native.TensorRows` does on CUDA, through the extension's CUDA half, other than the reference.

    The weight of guidance is a function of time, so that each row has its own.
    """
    from .cuda_runtime import Rows

    noise = torch.randn(5, *loop.x_dims, generator=torch.Generator().manual_seed(1)).to(loop.state)
    weight = lambda t: 1 + 0.7 * t  # noqa: E731
    fm = FlowMatching(loop.x_dims, loop.solver, 4, backend="reference")
    form = fm.guidance_form if loop.guided else None
    cpu = torch.device("cpu")
    times = own_times() if loop.own_times else None
    table = fm._table(
        *(None, None, times, None, loop.state, cpu, form, weight if loop.guided else 0.0), cached=False, batch_size=5
    )
    rows = Rows(half, table, noise, loop.trajectory, WEIGHTED)

    conditioned, unconditioned = models(loop)

    def on_cuda(step_fn: Any) -> Any:
        return lambda x, t: rows.on_cuda(step_fn(rows.host(x), t))

    def evaluate(rows: Any, state: Any, time: int, row: int) -> tuple[Any, Any]:
        v = rows.evaluate(on_cuda(conditioned), state, time)
        return v, rows.evaluate(on_cuda(unconditioned), state, time) if loop.guided else None

    try:
        got = rows.result(integrate(table, rows, rows.first, evaluate).state)
    except (RuntimeError, AssertionError) as error:
        return [f"{type(error).__name__}: {error} [{loop}]"]
    guided = {"unguided_step_fn": unconditioned, "inference_guidance_weight": weight} if loop.guided else {}
    wanted: Any = fm.sample(
        *(5, conditioned),
        noise=noise,
        return_all_steps=loop.trajectory,
        use_classifier_free_guidance=loop.guided,
        time_steps=times,
        **guided,
    )
    wanted = wanted[0] if loop.trajectory else wanted
    return [f"not the reference [{loop}]"] if differing(got, wanted) or got.isnan().any() else []


def looped(loop: Loop, backend: str) -> list[str]:
    """What sample() on this backend returns other than the reference's, and than the published loop's."""
    conditioned, unconditioned = models(loop)
    noise = torch.randn(5, *loop.x_dims, generator=torch.Generator().manual_seed(1)).to(loop.state)

    added: Any = torch.randn(5, 4, *loop.x_dims, generator=torch.Generator().manual_seed(2))
    if loop.keyed:
        added = KeyedNoise(7, (1 << 32) - 2)

    strength = None
    if loop.off_strength:
        strength = moved(torch.rand(noise.shape, generator=torch.Generator().manual_seed(3)), loop.off_strength)

    def sampled(by: str) -> Any:
        return FlowMatching(loop.x_dims, loop.solver, 4, backend=by).sample(
            5,
            conditioned,
            noise=noise,
            step_noise=added if loop.solver in solvers.STOCHASTIC else None,
            dtype=loop.state,
            return_all_steps=loop.trajectory,
            unguided_step_fn=unconditioned if loop.guided else None,
            use_classifier_free_guidance=loop.guided,
            velocity_strength=strength,
            inference_guidance_weight=[[1.7 - 0.3 * b] for b in range(5)] if loop.own_times else 1.7,
            time_steps=own_times() if loop.own_times else None,
        )

    def states(result: Any) -> Tensor:
        return result[0] if loop.trajectory else result

    try:
        got = states(sampled(backend))
    except (RuntimeError, AssertionError) as error:
        return [f"{type(error).__name__}: {error} [{loop}]"]
    oracles = {"the reference": states(sampled("reference"))}
    if loop.solver == "euler" and loop.state == F32 and not loop.own_times and strength is None:
        unguided = {"unguided_step_fn": unconditioned, "weight": 1.7} if loop.guided else {}
        result = published.sample(
            5, conditioned, loop.x_dims, 4, noise=noise, return_all_steps=loop.trajectory, **unguided
        )
        oracles["the published loop"] = states(result)
    return [f"not {name} [{loop}]" for name, wanted in oracles.items() if differing(got, wanted) or got.isnan().any()]
