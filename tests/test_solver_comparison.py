"""Solvers beside each other: errors, evaluations, the table, the plot, and what is refused."""

import math

import pytest
import torch

from bench.fit_problems import noise
from flowmatch_kernels import FittedSolver, FlowMatching, SolverComparison
from flowmatch_kernels.solver_comparison import most_steps
from flowmatch_kernels.solvers import SOLVERS

ONE = FittedSolver((0.0, 1.0), ((1.0, 1.0),))
TWO = FittedSolver((0.0, 0.25, 1.0), ((1.0, 0.25), (1.0, 0.75)))
FAST = {"batch_size": 16, "reference_steps": 128}


def decay(x, t):
    """dx/dt = -x, of which the end is x0 / e."""
    return -x


def test_errors_are_those_of_the_closed_form():
    fm, z = FlowMatching(3), noise(16, 3)
    comparison = fm.compare_solvers(
        decay, (4, 8), ("euler", "rk4", TWO, ONE), noise=z, reference="rk4", reference_steps=64
    )
    size = z.double().square().mean().sqrt().item()
    wanted = {
        ("euler", 4): abs((1 - 1 / 4) ** 4 - math.exp(-1)),
        ("euler", 8): abs((1 - 1 / 8) ** 8 - math.exp(-1)),
        ("rk4", 4): abs(1 - 1 + 1 / 2 - 1 / 6 + 1 / 24 - math.exp(-1)),
        ("rk4", 8): abs((1 - 1 / 2 + 1 / 8 - 1 / 48 + 1 / 384) ** 2 - math.exp(-1)),
        ("fitted", 1): math.exp(-1),
        ("fitted", 2): abs(0.75 * 0.25 - math.exp(-1)),
    }
    found = {(point.solver, point.evaluations): point.error for point in comparison.points}
    assert found.keys() == wanted.keys()
    for key, error in wanted.items():
        assert found[key] == pytest.approx(error * size, rel=1e-4, abs=1e-6), key  # float32
    assert comparison.samples == 16 and comparison.change < 1e-6 and comparison.converged_quality is None


def test_budgets_are_spent_as_far_as_whole_steps_can():
    calls = []

    def counted(x, t):
        calls.append(None)
        return -x

    fm = FlowMatching(3)
    comparison = fm.compare_solvers(counted, (1, 3, 6), None, **FAST)
    named = {name: {p.budget: p.evaluations for p in points} for name, points in comparison.curves().items()}
    assert list(named) == list(SOLVERS)
    assert named["euler"] == {1: 1, 3: 3, 6: 6}
    assert named["midpoint"] == named["heun"] == {3: 2, 6: 6}
    assert named["rk4"] == {6: 4}
    assert named["ab3"] == {3: 3, 6: 6}
    for name, spent in named.items():
        for budget, evaluations in spent.items():
            assert fm.nfe(most_steps(fm, name, budget), name) == evaluations <= budget
            assert fm.nfe(most_steps(fm, name, budget) + 1, name) > budget
    assert len(calls) == 129 + 65 + sum(evaluations for spent in named.values() for evaluations in spent.values())
    assert fm.compare_solvers(decay, 4, ["euler"], **FAST).points[0].evaluations == 4


def test_own_measures():
    """error(samples, converged) and quality(samples) see all samples of all batches, in order."""
    fm, halves = FlowMatching(3), noise(16, 3).chunk(2)
    seen = []

    def error(x, converged):
        seen.append((x, converged))
        return 7.0

    comparison = fm.compare_solvers(
        batches=[{"step_fn": decay, "noise": half} for half in halves],
        evaluations=2,
        solvers=["euler"],
        reference_steps=128,
        error=error,
        quality=lambda x: float(x.abs().max()),
    )
    (x, converged), point = seen[0], comparison.points[0]
    torch.testing.assert_close(x, torch.cat(halves) / 4, rtol=1e-6, atol=0)
    torch.testing.assert_close(converged, torch.cat(halves) / math.e, rtol=1e-5, atol=0)
    assert point.error == 7.0 and point.quality == x.abs().max()
    assert comparison.converged_quality == converged.abs().max()


def test_table():
    fm = FlowMatching(3)
    comparison = fm.compare_solvers(decay, (4, 6), ("euler", "rk4", TWO), quality=lambda x: 0.5, **FAST)
    shown = str(comparison)
    assert repr(comparison) == shown
    lines = shown.splitlines()
    assert lines[0] == "Error: distance to the converged samples, of 16 samples"
    assert lines[1].split() == ["evaluations", "2", "4", "6"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:5]}
    found = {(point.solver, point.budget): f"{point.error:.4g}" for point in comparison.points}
    assert rows["euler"] == ["-", found["euler", 4], found["euler", 6]]
    assert rows["rk4"] == ["-", found["rk4", 4], found["rk4", 6], "(4)"]
    assert rows["fitted"] == [found["fitted", 2], "-", "-"]
    assert "Quality; of the converged samples 0.5" in shown and "In brackets" in shown
    assert lines[-1].startswith("Converged: ab3 with 128 steps; half as many steps change the samples by")
    ends = {line.rstrip().rindex(line.split()[-1]) + len(line.split()[-1]) for line in lines[1:3]}
    assert len(ends) == 1  # numbers stand below the heads


def test_several_fitted_solvers():
    """One curve of those of different lengths; a second one of the same length gets a curve of its own."""
    again = FittedSolver((0.0, 0.5, 1.0), ((1.0, 0.5), (1.0, 0.5)))
    curves = FlowMatching(3).compare_solvers(decay, 2, (TWO, ONE, again), **FAST).curves()
    assert {name: [p.evaluations for p in points] for name, points in curves.items()} == {
        "fitted": [1, 2],
        "fitted 2": [2],
    }


def test_a_file_is_a_solver(tmp_path):
    TWO.save(tmp_path / "two.json")
    by_path = FlowMatching(3).compare_solvers(decay, 2, [str(tmp_path / "two.json")], **FAST)
    assert by_path == FlowMatching(3).compare_solvers(decay, 2, [TWO], **FAST)


def test_guidance_and_the_default_generator():
    fm = FlowMatching(3, use_classifier_free_guidance=True, inference_guidance_weight=3.0)
    before = torch.get_rng_state()
    guided = fm.compare_solvers(decay, 4, ["euler"], unguided_step_fn=lambda x, t: x, **FAST)
    assert torch.equal(before, torch.get_rng_state())
    plain = FlowMatching(3).compare_solvers(lambda x, t: -2 * x + 3 * -x, 4, ["euler"], **FAST)
    assert guided.points[0].error == pytest.approx(plain.points[0].error, rel=1e-4)


@pytest.mark.parametrize("quality", [None, lambda x: float(x.square().mean())])
def test_plot(quality, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    path = tmp_path / "solvers.png"
    comparison = FlowMatching(3).compare_solvers(decay, (4, 8), ("euler", "ab2", TWO), quality=quality, **FAST)
    comparison.plot(path)
    with Image.open(path) as image:
        pixels = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
        width, height = image.size
    assert (width > height) and (width > 1.5 * height) == (quality is not None)
    assert 0.001 < (pixels < 128).float().mean() < 0.5  # something is drawn, on white


REFUSED = {
    "evaluations 0": ({"evaluations": 0}, ValueError, "evaluations must be 1 or more, got 0"),
    "evaluations none": ({"evaluations": ()}, ValueError, r"evaluations must be 1 or more, got \(\)"),
    "evaluations float": ({"evaluations": 2.5}, TypeError, "evaluations must be an int"),
    "solver": ({"solvers": ["eulr"]}, ValueError, "Invalid integration method: eulr"),
    "solver of another kind": ({"solvers": [3]}, ValueError, "Invalid integration method: 3"),
    "reference": ({"reference": "rk5"}, ValueError, "Invalid integration method: rk5"),
    "reference fitted": ({"reference": TWO}, TypeError, "reference must be the name of a solver"),
    "reference_steps": ({"reference_steps": 9}, ValueError, "reference_steps must be even, got 9"),
    "weights for each step": (
        {"use_classifier_free_guidance": True, "unguided_step_fn": decay, "inference_guidance_weight": [1.0, 2.0]},
        ValueError, "inference_guidance_weight for each step fits one number of steps",
    ),
    "error": ({"error": 3}, TypeError, "error must be callable, got 3"),
    "quality": ({"quality": "FID"}, TypeError, "quality must be callable, got 'FID'"),
    "constraint": ({"constraint": decay}, ValueError, "constraint is not taken here"),
    "unknown": ({"nfe": 3}, TypeError, "unexpected argument 'nfe'"),
    "no model": ({"step_fn": None}, ValueError, "pass step_fn, or batches"),
    "NaN": ({"step_fn": lambda x, t: x / 0}, ValueError, "ends in values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        FlowMatching(3).compare_solvers(**({"step_fn": decay, "evaluations": 4, **FAST} | change))


def test_it_is_public():
    assert isinstance(FlowMatching(3).compare_solvers(decay, 1, ["euler"], **FAST), SolverComparison)


def test_a_fitted_solver_of_another_span_is_refused():
    short = FittedSolver((0.0, 0.25, 0.9), ((1.0, 0.25), (1.0, 0.65)))
    with pytest.raises(ValueError, match=r"from t = 0 to 0\.9, and the converged samples from 0 to 1"):
        FlowMatching(3).compare_solvers(decay, 2, [short], **FAST)


@pytest.mark.filterwarnings("ignore:the reference has not converged")
def test_solvers_that_a_prediction_rules_out():
    """Left out where all are compared, named where they are asked for."""
    fm = FlowMatching(3, prediction_type="data")
    compared = fm.compare_solvers(lambda x, t: x.tanh(), 8, **FAST).curves()
    assert "euler" in compared and not {"heun", "rk4", "rk4_classic"} & compared.keys()
    with pytest.raises(ValueError, match="heun: what step_fn predicts"):
        fm.compare_solvers(lambda x, t: x.tanh(), 8, ["heun"], **FAST)


def test_one_solver_without_a_list():
    for one in ("euler", TWO):
        assert len(FlowMatching(3).compare_solvers(decay, 2, one, **FAST).points) == 1


def test_plot_without_a_finite_error(tmp_path):
    pytest.importorskip("matplotlib")
    target = lambda x, t: (1 - x) / (1 - t)  # noqa: E731
    comparison = FlowMatching(3).compare_solvers(target, 4, ["heun"], **FAST)
    assert math.isnan(comparison.points[0].error)
    comparison.plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
