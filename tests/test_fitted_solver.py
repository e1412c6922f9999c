"""A fitted solver as a solver: its bits on every backend, its file, and what contradicts it."""

import json
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from eager_loops import GUIDED
from operands import same_bits
from small_problem import BATCH, DIMS, field, start

from flowmatch_kernels import FittedSolver, FlowMatching

TIMES = (0.0, 0.140625, 0.5, 0.6875, 0.84375, 1.0)
COEFFICIENTS = (
    (1.01, 0.13),
    (0.97, 0.4, -0.11),
    (1.03, 0.31, -0.2, 0.07),
    (0.999, 0.21, -0.1, 0.06, -0.013),
    (1.0, 0.156),  # a row that fell back to Euler reads no history
)
SOLVER = FittedSolver(TIMES, COEFFICIENTS)
BACKWARD = FittedSolver(tuple(1 - t for t in TIMES), COEFFICIENTS, noise_at=1)


def eager(solver, noise, velocity=field, constraint=None):
    """The states, [B, N + 1, ...], of the definition in plain PyTorch with Python floats."""
    x, vs, states = noise.clone(), [], [noise]
    ones = [1] * (noise.dim() - 1)
    times = torch.tensor(solver.times)
    for i, (a, *b) in enumerate(solver.coefficients):
        t = times[i].view(1, *ones).expand(len(x), *ones)
        vs.insert(0, velocity(x=x, t=t))
        out = a * x
        for coefficient, v in zip(b, vs, strict=False):
            out = out + coefficient * v
        x = out
        if constraint is not None:
            x = constraint(x, times[i + 1].view(1, *ones).expand(len(x), *ones))
        states.append(x)
    return torch.stack(states, 1)


# ---- a solver like the others ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bits(backend, dtype):
    noise = start(dtype)
    wanted = eager(SOLVER, noise)
    fm = FlowMatching(DIMS, SOLVER, backend=backend)
    assert same_bits(fm.sample(BATCH, field, noise=noise), wanted[:, -1])
    states, times = fm.sample(BATCH, field, noise=noise, return_all_steps=True)
    assert same_bits(states, wanted)
    assert times.tolist() == list(TIMES)
    # The constructor's solver is another.
    assert same_bits(
        FlowMatching(DIMS, backend=backend).sample(BATCH, field, noise=noise, int_method=SOLVER), states[:, -1]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_with_guidance_hooks_and_backward_time(backend):
    noise = start()
    other = lambda x, t: torch.cos(2 * x) * t  # noqa: E731
    weights = [0.5, 1.5, 2.0, -1.0, 3.0]
    for form, combine in GUIDED.items():
        fm = FlowMatching(DIMS, use_classifier_free_guidance=True, guidance_form=form, backend=backend)
        step = iter(weights)
        wanted = eager(
            SOLVER, noise, lambda x, t, combine=combine, step=step: combine(next(step), other(x, t), field(x, t))
        )
        x = fm.sample(
            BATCH, field, noise=noise, int_method=SOLVER, unguided_step_fn=other, inference_guidance_weight=weights
        )
        assert same_bits(x, wanted[:, -1]), form
    seen = []
    x, _, stopped = FlowMatching(DIMS, backend=backend).sample(
        BATCH,
        field,
        noise=noise,
        int_method=SOLVER,
        constraint=lambda x, t: x.clamp(-1, 1) + t,
        callback=lambda step, t, x: seen.append(x) or step == 3,
    )
    wanted = eager(SOLVER, noise, constraint=lambda x, t: x.clamp(-1, 1) + t)
    assert stopped and same_bits(x, wanted[:, 4]) and same_bits(torch.stack(seen, 1), wanted[:, 1:5])
    backward = FlowMatching(DIMS, BACKWARD, noise_at=1, backend=backend)
    assert same_bits(backward.sample(BATCH, field, noise=noise), eager(BACKWARD, noise)[:, -1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_are_the_same_velocity(backend):
    """Float64 rounding apart: 5 steps of terms below 10, divided by 1 - t >= 0.15."""
    noise, clean = start(torch.float64), 0.3 * start(torch.float64).flip(0)
    data = lambda x, t: clean + 0.1 * torch.sin(x)  # noqa: E731
    fm = FlowMatching(DIMS, SOLVER, prediction_type="data", backend=backend)
    wanted = eager(SOLVER, noise, lambda x, t: (data(x, t) - x) / (1 - t.double()))
    torch.testing.assert_close(fm.sample(BATCH, data, noise=noise), wanted[:, -1], rtol=1e-12, atol=1e-12)


def test_compiled_without_a_break():
    noise = start()
    fm = FlowMatching(DIMS, SOLVER)
    compiled = torch.compile(lambda z: fm.sample(BATCH, field, noise=z), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(noise), eager(SOLVER, noise)[:, -1])


def test_evaluations_are_counted():
    calls = []
    FlowMatching(DIMS).sample(BATCH, lambda x, t: calls.append(t) or field(x, t), int_method=SOLVER)
    fm = FlowMatching(DIMS, SOLVER)
    assert len(calls) == SOLVER.evaluations == fm.nfe() == FlowMatching(DIMS).nfe(int_method=SOLVER) == 5
    assert fm.nfe(guided=True) == 10 and fm.nfe(5) == 5 and fm.num_inference_steps == 5


def test_a_table_is_kept_and_a_solver_counts_by_its_numbers():
    twin = FittedSolver(list(TIMES), [list(row) for row in COEFFICIENTS], errors={"fitted": 1.0})
    assert twin == SOLVER and hash(twin) == hash(SOLVER)
    other = FittedSolver(TIMES, (*COEFFICIENTS[:-1], (1.0, 0.15625)))
    assert other != SOLVER
    fm, noise = FlowMatching(DIMS), start()
    for solver in (SOLVER, other, twin):
        assert same_bits(fm.sample(BATCH, field, noise=noise, int_method=solver), eager(solver, noise)[:, -1])


def test_a_kept_table_tells_minus_zero_from_zero():
    fm = FlowMatching(1)
    for zero in (0.0, -0.0):
        x = fm.sample(
            1, lambda x, t: -0.0 * x, noise=torch.ones(1, 1), int_method=FittedSolver((0.0, 1.0), ((zero, 1.0),))
        )
        assert math.copysign(1.0, x.item()) == math.copysign(1.0, zero)


# ---- what contradicts it ----

CONTRADICTIONS = {
    "inference_step": ({}, {"inference_step": 4}, "inference_step is 4.*5 evaluations"),
    "constructor": ({"num_inference_steps": 10}, None, "num_inference_steps is 10.*5 evaluations"),
    "constructor with none": ({"num_inference_steps": 0}, None, "num_inference_steps is 0.*5 evaluations"),
    "time_steps": ({}, {"time_steps": [0.0, 0.1, 0.2, 0.5, 0.7, 1.0]}, "time_steps.*contradict.*leave time_steps out"),
    "other number": ({}, {"time_steps": [0.0, 0.1, 1.0]}, "time_steps.*contradict"),
    "step_sizes": ({}, {"step_sizes": [0.2] * 5}, "step_sizes and a fitted solver"),
    "noise_at": ({"noise_at": 1}, {}, "noise_at is 1.*fitted with noise_at=0"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_raise_before_anything_is_drawn(case):
    constructor, arguments, message = CONTRADICTIONS[case]
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        FlowMatching(DIMS, SOLVER, **constructor).sample(BATCH, field, **arguments)
    assert torch.equal(before, torch.get_rng_state())


def test_what_agrees_is_taken():
    noise = start()
    fm = FlowMatching(DIMS, SOLVER, 5)
    wanted = eager(SOLVER, noise)[:, -1]
    for arguments in ({"inference_step": 5}, {"time_steps": list(TIMES)}, {"time_steps": torch.tensor(TIMES)}):
        assert same_bits(fm.sample(BATCH, field, noise=noise, **arguments), wanted)
    # Of a FlowMatching built for another solver the number of steps is that solver's.
    assert same_bits(FlowMatching(DIMS, "euler", 10).sample(BATCH, field, noise=noise, int_method=SOLVER), wanted)
    assert same_bits(
        FlowMatching(DIMS, time_grid="cosine").sample(BATCH, field, noise=noise, int_method=SOLVER), wanted
    )
    fm.int_method, fm.num_inference_steps = SOLVER, 10
    with pytest.raises(ValueError, match="num_inference_steps is 10"):
        fm.sample(BATCH, field)
    with pytest.raises(ValueError, match="num_inference_steps is 10"):
        fm.nfe()


BAD = {
    "times not monotonic": ((0.0, 0.5, 0.5), ((1.0, 0.5), (1.0, 0.5)), ValueError, "strictly monotonic"),
    "times that turn": ((0.0, 0.5, 0.2), ((1.0, 0.5), (1.0, 0.5)), ValueError, "strictly monotonic"),
    "one time": ((0.0,), (), ValueError, "strictly monotonic, two or more"),
    "NaN time": ((0.0, float("nan")), ((1.0, 1.0),), ValueError, r"times\[1\] must be finite, got nan"),
    "infinite number": (
        (0.0, 1.0),
        ((1.0, float("inf")),),
        ValueError,
        r"coefficients\[0\]\[1\] must be finite, got inf",
    ),
    "a huge int": ((0.0, 1.0), ((1.0, 10**400),), ValueError, r"coefficients\[0\]\[1\] must be a number that a float"),
    "a row missing": ((0.0, 0.5, 1.0), ((1.0, 0.5),), ValueError, "a row for each of the 2 steps, got 1"),
    "no rows": ((0.0, 1.0), None, ValueError, "a row for each of the 1 steps, got None"),
    "a row too short": ((0.0, 1.0), ((1.0,),), ValueError, r"coefficients\[0\] must have 2 to 2 numbers.*got 1"),
    "history at the start": ((0.0, 1.0), ((1.0, 0.5, 0.5),), ValueError, r"coefficients\[0\] must have 2 to 2.*got 3"),
    "text": ((0.0, 1.0), (("1", "2"),), TypeError, r"coefficients\[0\]\[0\] must be a number, got '1'"),
    "a bool": ((0.0, True), ((1.0, 1.0),), TypeError, r"times\[1\] must be a number, got True"),
    "a string for times": ("01", ((1.0, 1.0),), TypeError, "times must be a sequence of numbers"),
    "bytes for times": (b"\0\1", ((1.0, 1.0),), TypeError, "times must be a sequence of numbers"),
    "a bytearray for a row": (
        (0.0, 1.0),
        (bytearray(2),),
        TypeError,
        r"coefficients\[0\] must be a sequence of numbers",
    ),
    "a memoryview for a row": ((0.0, 1.0), (memoryview(b"\1\1"),), TypeError, r"coefficients\[0\] must be a sequence"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_numbers_raise(case):
    times, coefficients, error, message = BAD[case]
    with pytest.raises(error, match=message):
        FittedSolver(times, coefficients)


def test_numbers_of_other_types():
    plain = FittedSolver((0.0, 1.0), ((1.0, 0.5),), noise_at=0, errors={"fitted": 0.25})
    other = FittedSolver(
        (0, Fraction(1)), [(np.int64(1), np.float32(0.5))], noise_at=np.int64(0), errors={"fitted": np.float16(0.25)}
    )
    assert other == plain and bits(other) == bits(plain) and other.errors == plain.errors
    assert {type(number) for number in (*other.times, *other.coefficients[0])} == {float}
    assert type(other.noise_at) is int


# ---- the file ----


def bits(solver):
    return [struct.pack("d", number) for row in (solver.times, *solver.coefficients) for number in row]


def test_file_keeps_every_bit(tmp_path):
    path = tmp_path / "policy-4.json"
    numbers = [-0.0, 5e-324, 1.7976931348623157e308, -2.2250738585072014e-308, 0.1, 1 / 3, 1e-17, -123456789.123456789]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        numbers += torch.randint(-(2**62), 2**62, (8,), generator=generator).view(torch.float64).tolist()
        finite = [x for x in numbers if abs(x) < float("inf")]
        solver = FittedSolver(
            (1.0, 0.3, 0.1),
            ((finite[-1], finite[-2]), tuple(finite[-5:-2])),
            ("fitted", "ab2"),
            1,
            {"fitted": 0.1 + 0.2, "euler": finite[-1]},
            {"x_dims": [64, 2], "guidance": "none"},
        )
        solver.save(path)
        loaded = FittedSolver.load(path)
        assert loaded == solver and bits(loaded) == bits(solver)
        assert (loaded.rows, loaded.noise_at) == (solver.rows, 1)
        assert (loaded.errors, loaded.fitted_with) == (solver.errors, solver.fitted_with)
        before = path.read_bytes()
        loaded.save(str(path))
        assert path.read_bytes() == before
    numbers = [-0.0, 5e-324]
    FittedSolver((0.0, 1.0), (tuple(numbers),)).save(path)
    assert bits(FittedSolver.load(path))[2:] == [struct.pack("d", number) for number in numbers]


def test_a_path_is_taken_for_the_solver(tmp_path):
    path = tmp_path / "policy.json"
    SOLVER.save(path)
    noise = start()
    wanted = eager(SOLVER, noise)[:, -1]
    for name in (path, str(path)):
        assert FlowMatching(DIMS, name).int_method == SOLVER
        assert same_bits(FlowMatching(DIMS, int_method=name).sample(BATCH, field, noise=noise), wanted)
        assert same_bits(FlowMatching(DIMS).sample(BATCH, field, noise=noise, int_method=name), wanted)
        assert FlowMatching(DIMS).nfe(int_method=name) == 5
    for name in ("none.json", tmp_path / "none.json"):
        with pytest.raises(FileNotFoundError, match=r"none\.json"):
            FlowMatching(DIMS, name)


def changed(**fields):
    def change(content):
        content.update(fields)
        return json.dumps(content)

    return change


def without(name):
    def change(content):
        del content[name]
        return json.dumps(content)

    return change


DAMAGED = {
    "empty": (lambda content: "", "Expecting value"),
    "cut short": (lambda content: json.dumps(content)[:-20], "Expecting|Unterminated"),
    "another file": (lambda content: '{"lr": 0.1}', r'does not say "format": "flowmatch_kernels\.FittedSolver"'),
    "a list": (lambda content: "[1, 2]", "does not say"),
    "a later version": (changed(version=2), "version 2 and this package reads 1"),
    "a version that is none": (changed(version=True), "version True and this package reads 1"),
    "no version": (without("version"), "version None"),
    "no times": (without("times"), "it has no times"),
    "no errors": (without("errors"), "it has no errors"),
    "NaN": (changed(times=[0, 0.25, float("nan"), 0.75, 0.8, 1]), r"times\[2\] must be finite, got nan"),
    "infinity": (changed(coefficients=[[1, float("inf")]] * 5), r"coefficients\[0\]\[1\] must be finite"),
    "1e999": (lambda content: json.dumps(content).replace("0.13", "1e999"), r"coefficients\[0\]\[1\] must be finite"),
    "times that turn": (changed(times=[0, 0.5, 0.25, 0.75, 0.8, 1]), "strictly monotonic"),
    "times of text": (changed(times=["0"] * 6), r"times\[0\] must be a number, got '0'"),
    "a row too many": (changed(coefficients=[[1, 0.5]] * 6), "a row for each of the 5 steps, got 6"),
    "a row too long": (changed(coefficients=[[1, 0.1, 0.1]] + [[1, 0.5]] * 4), r"coefficients\[0\] must have 2 to 2"),
    "coefficients of null": (changed(coefficients=None), "a row for each"),
    "rows": (changed(rows=["fitted"]), "rows must name each of the 5 rows"),
    "nested too deep": (lambda content: "[" * 100_000, "recursion"),
    "rows of a string": (changed(rows="abcde"), "rows must name each"),
    "rows of numbers": (changed(rows=5), "rows must name each"),
    "noise_at": (changed(noise_at=2), "noise_at must be 0 or 1, got 2"),
    "errors": (changed(errors=[]), "errors must be a dict"),
    "error values": (changed(errors={"fitted": "small"}), r"errors\['fitted'\] must be a number, got 'small'"),
    "fitted_with": (changed(fitted_with=3), "fitted_with must be a dict"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_raise_and_say_what_is_wrong(case, tmp_path):
    damage, message = DAMAGED[case]
    path = tmp_path / "policy.json"
    SOLVER.save(path)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message) as caught:
        FittedSolver.load(path)
    assert f"{path} is not a saved FittedSolver" in str(caught.value)


def test_bytes_that_are_no_text_raise(tmp_path):
    path = tmp_path / "policy.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a saved FittedSolver"):
        FittedSolver.load(path)


def test_messages_name_it_in_a_line():
    fm = FlowMatching(DIMS)
    named = f"a fitted solver with {SOLVER.evaluations} evaluations"
    with pytest.raises(TypeError, match=f"int_method {named} takes no options, got 'eta'"):
        fm.sample(BATCH, field, int_method=SOLVER, int_method_options={"eta": 1})
    with pytest.raises(ValueError, match=f"got {named} and 'velocity'"):
        fm.sample(BATCH, field, int_method=SOLVER, velocity_strength=torch.ones(1))
    x = torch.ones(BATCH, *DIMS)
    with pytest.raises(ValueError, match=f"int_method {named} adds no noise"):
        fm.step_log_prob(x, x, x, 0, int_method=SOLVER)


def test_repr_shows_the_table():
    solver = FittedSolver(
        TIMES,
        COEFFICIENTS,
        ("fitted",) * 4 + ("euler",),
        errors={"fitted": 0.0123, "ab3": 0.5},
        fitted_with={"samples": 192},
    )
    text = repr(solver)
    for number in (*TIMES, *(number for row in COEFFICIENTS for number in row)):
        assert f"{number:.6g}" in text
    assert text.startswith("FittedSolver with 5 evaluations\n")
    assert text.count("fitted\n") == 4 and "euler\n" in text
    assert "fitted 0.0123, ab3 0.5" in text and "samples: 192" in text
    assert "with 1 evaluation\n" in repr(FittedSolver((0.0, 1.0), ((1.0, 1.0),)))
