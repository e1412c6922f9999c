"""sample() with times of each token, against the same state with each token as a sample of its own: a table of cases.

The velocities are pointwise, so that both give a token the same ones. No test here: tests/test_own_rows.py runs the
cases, tests/triton_interpreter_cases.py under Triton's interpreter, and tests/test_gpu.py on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from operands import assert_same_bits
from torch import Tensor

from flowmatch_kernels import FlowMatching
from flowmatch_kernels.solvers import SOLVERS

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
B, L, N = 2, 3, 4
#: The options of sample() with numbers that each token may have its own of.
OWN = ("time_steps", "step_sizes", "inference_guidance_weight")


def draw(*shape: int) -> Tensor:
    """float64, between 0 and 1."""
    return torch.rand(shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


def field(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(5 * t).to(x.dtype) - x * (0.3 + t).to(x.dtype)


def other(x: Tensor, t: Tensor) -> Tensor:
    return torch.cos(3 * x) * (1 - t).to(x.dtype)


def both(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([other(x, t), field(x, t)])


def cast(step_fn: Any, dtype: torch.dtype, x: Tensor, t: Tensor) -> Tensor:
    return step_fn(x, t).to(dtype)


def grids(*sizes: int) -> Tensor:
    """[*sizes, N + 1], from 0 to 1: a grid for each, none of which has a step of length 0."""
    return (torch.linspace(0, 1, N + 1, dtype=F64) ** (0.6 + 1.7 * draw(*sizes, 1))).float()


def held(before: int, after: int) -> Tensor:
    """[B, L, N + 1]: token (0, 1) is held so many steps before its first and after its last, token (1, 0) at all."""
    t = grids(B, L)
    t[0, 1] = torch.cat([torch.zeros(before), torch.linspace(0, 1, N + 1 - before - after), torch.ones(after)])
    t[1, 0] = 0.4
    return t


def between() -> Tensor:
    """[B, L, N + 1], with a step of length 0 between others."""
    t = grids(B, L)
    t[1, 2, 2] = t[1, 2, 1]
    return t


class Case(NamedTuple):
    """One call of sample()."""

    name: str
    constructor: dict[str, Any]
    options: dict[str, Any]
    state: torch.dtype = F32
    velocity: torch.dtype | None = None
    """What step_fn returns; None: the state's."""
    sizes: tuple[int, ...] = (B, L)
    """The first sizes of the state, of which each has rows of its own."""
    rest: tuple[int, ...] = (5,)
    """The others."""


def cases() -> Iterator[Case]:
    for solver in SOLVERS:
        named = {"int_method": solver}
        yield Case(solver, named, {"time_steps": grids(B, L)})
        yield Case(f"{solver} from 1", named | {"noise_at": 1}, {"time_steps": (1 - grids(B, L)).tolist()})
        yield Case(f"{solver} after", named, {"time_steps": held(0, 2)})
        if solver != "ab3":
            yield Case(f"{solver} before, after", named, {"time_steps": held(2, 1)})
        if solver in ("euler", "midpoint", "heun", "rk4", "rk4_classic"):
            yield Case(f"{solver} between", named, {"time_steps": between()})
    for solver in ("euler", "heun", "ab2", "unipc"):
        for state, velocity in ((F64, F64), (F64, F32), (F32, BF16), (BF16, BF16), (F16, F16)):
            named = {"int_method": solver}
            yield Case(f"{solver} {state} {velocity}", named, {"time_steps": held(1, 1)}, state, velocity)
    for rounding in ("exact", "rounded"):
        yield Case(rounding, {"step_rounding": rounding}, {"time_steps": grids(B, L)}, F32, BF16)
    for prediction in ("data", "noise"):
        for solver in ("euler", "heun", "dpmpp_2m", "rk4", "sde"):
            named = {"int_method": solver, "prediction_type": prediction}
            noise = {"step_noise": draw(B, N, L, 5).float()} if solver == "sde" else {}
            yield Case(f"{solver} {prediction}", named, {"time_steps": grids(B, L) * 0.8 + 0.1} | noise)
    for solver in ("sde", "cps", "dance", "renoise"):
        options = {"time_steps": held(2, 1) * 0.8 + 0.1, "step_noise": draw(B, N, L, 5).float()}
        yield Case(solver, {"int_method": solver}, options)
    yield Case("euler_at_final", {"int_method": "heun", "euler_at_final": True}, {"time_steps": grids(B, L)})
    yield Case("strength", {}, {"time_steps": held(1, 1), "velocity_strength": draw(5).float()})
    # Sizes of 1, fewer and more of the first sizes; times for samples and step sizes for tokens, or the other way.
    yield Case("one for all samples", {}, {"time_steps": grids(1, L)})
    yield Case("one for all tokens", {}, {"time_steps": grids(B, 1).tolist()})
    yield Case("one for all", {}, {"time_steps": grids(1, 1)})
    yield Case("one token", {}, {"time_steps": grids(B, 1)}, sizes=(B, 1))
    yield Case("one sample", {"int_method": "heun"}, {"time_steps": grids(1, L)}, sizes=(1, L))
    yield Case("two sizes of tokens", {"int_method": "ab2"}, {"time_steps": grids(B, L, 2)}, sizes=(B, L, 2))
    yield Case("each element", {"int_method": "rk4"}, {"time_steps": grids(B, L)}, rest=())
    for solver in ("euler", "ab2"):
        named, sizes = {"int_method": solver}, draw(B, L, N) + 0.5
        yield Case(f"{solver} step sizes", named, {"time_steps": grids(B, L), "step_sizes": sizes})
        yield Case(f"{solver} step sizes, one grid", named, {"time_steps": grids(1)[0], "step_sizes": sizes.tolist()})
        yield Case(f"{solver} step sizes of samples", named, {"time_steps": grids(B, L), "step_sizes": sizes[:, 0]})
        yield Case(f"{solver} times of samples", named, {"time_steps": grids(B), "step_sizes": sizes})
    for form in ("interpolate", "from_unguided", "from_guided", "extrapolate"):
        named = {"int_method": "heun", "guidance_form": form, "use_classifier_free_guidance": True}
        guided = {"unguided_step_fn": other}
        weights = {
            "[B, L, N]": draw(B, L, N) * 3,
            "[B, L, 1], nested lists": (draw(B, L, 1) * 3).tolist(),
            "[B, N]": draw(B, N) * 3,
            "[1, L, 1]": draw(1, L, 1) * 3,
            "[N]": draw(N).tolist(),
            "a number": 1.5,
            "of t": lambda t: 1 + 2 * t,
        }
        for name, weight in weights.items():
            options = guided | {"inference_guidance_weight": weight}
            yield Case(f"{form} {name}", named, options | {"time_steps": held(1, 0)})
            if not callable(weight):
                yield Case(f"{form} {name}, times of samples", named, options | {"time_steps": grids(B)})
        options = guided | {"inference_guidance_weight": weights["[B, L, N]"]}
        yield Case(f"{form} one grid", named, options | {"time_steps": grids(1)[0]})
    named = {"use_classifier_free_guidance": True}
    options = {"time_steps": grids(B, L), "inference_guidance_weight": draw(B, L, 1) * 3}
    yield Case("combined", named, options | {"step_fn": both, "combined_guidance": True})
    half = functools.partial(cast, other, BF16)
    yield Case("two dtypes of velocities", named, options | {"unguided_step_fn": half})
    number = {"unguided_step_fn": lambda x, t: torch.tensor(0.3, device=x.device)}
    yield Case("a number beside a velocity", named, options | number, F32, BF16)


def rows(numbers: Any, sizes: tuple[int, ...]) -> Any:
    """Numbers of samples or tokens as [R, n]: one row for each token."""
    if isinstance(numbers, list):
        return rows(torch.tensor(numbers, dtype=F64), sizes).tolist()
    if not isinstance(numbers, Tensor):
        return numbers
    *given, n = numbers.shape
    if not given:
        return numbers
    return numbers.view(*given, *[1] * (len(sizes) - len(given)), n).expand(*sizes, n).reshape(-1, n)


def check(case: Case, backend: str, device: torch.device | str = "cpu") -> None:
    """Both calls, with a trajectory and without."""
    sizes, rest = case.sizes, case.rest
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.options.items()}
    step_fn = options.pop("step_fn", field)
    if case.velocity is not None:
        step_fn = functools.partial(cast, step_fn, case.velocity)
    x = (draw(*sizes, *rest) * 4 - 2).to(device, case.state)
    seen: list[Tensor] = []

    def seeing(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return step_fn(x, t)

    fm = FlowMatching((*sizes, *rest)[1:], backend=backend, **case.constructor)
    states, times = fm.sample(sizes[0], seeing, device, noise=x, return_all_steps=True, **options)
    last = fm.sample(sizes[0], step_fn, device, noise=x, **options)
    assert_same_bits(last, states[:, -1].contiguous(), case.name)

    by_token = {name: rows(value, sizes) if name in OWN else value for name, value in options.items()}
    if "step_noise" in options:
        by_token["step_noise"] = options["step_noise"].movedim(1, len(sizes)).flatten(0, len(sizes) - 1)
    flat = x.flatten(0, len(sizes) - 1)
    # The state of one entry for each row has a dimension more there: FlowMatching takes no x_dims of none.
    fm = FlowMatching(rest or (1,), backend=backend, **case.constructor)
    flat = flat if rest else flat.unsqueeze(1)
    wanted, its_times = fm.sample(len(flat), step_fn, device, noise=flat, return_all_steps=True, **by_token)
    got = states.movedim(1, len(sizes)).reshape(wanted.shape)
    assert_same_bits(got, wanted, case.name)

    own = max(torch.as_tensor(options.get(name, 0.0)).dim() - 1 for name in OWN[:2])
    assert list(times.shape) == [*sizes[:own], N + 1], case.name
    assert_same_bits(rows(times, sizes), its_times, f"{case.name}: times")
    if own > 0:
        assert {tuple(t.shape) for t in seen} == {(*sizes[:own], *[1] * (x.dim() - own))}, case.name
