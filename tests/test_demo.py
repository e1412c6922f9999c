"""The demo: its distance, its data, and a run of the whole command on a few training steps."""

import argparse
import functools
import itertools
import math
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

# The demo is an extra; `make test` installs it, so that there nothing is skipped.
np = pytest.importorskip("numpy", reason="the demo needs pip install .[demo]")
pytest.importorskip("matplotlib", reason="the demo needs pip install .[demo]")
pytest.importorskip("tqdm", reason="the demo needs pip install .[demo]")

import torch  # noqa: E402

from flowmatch_kernels import FlowMatching, SolverComparison  # noqa: E402
from flowmatch_kernels.demo import command, comparison, methods, network, picture, plan, published_loop, timing  # noqa: E402
from flowmatch_kernels.demo.comparison import Comparison, Line, gains, same_bits  # noqa: E402
from flowmatch_kernels.demo.distance import sliced_wasserstein  # noqa: E402
from flowmatch_kernels.demo.flights import Flights, IncrementScaling, total_turn  # noqa: E402
from flowmatch_kernels.demo.network import VelocityNetwork, step_seconds, train  # noqa: E402
from flowmatch_kernels.solver_comparison import Point  # noqa: E402
from flowmatch_kernels.solvers import SOLVERS  # noqa: E402


@pytest.fixture(scope="module")
def flights():
    return Flights.load()


def points(count, *dims, seed=0):
    return torch.randn(count, *dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the distance ----


def test_distance_of_a_set_to_itself_is_zero_in_any_order():
    x = points(50, 4, 2)
    assert sliced_wasserstein(x, x) == 0
    assert sliced_wasserstein(x, x.flip(0)) < 1e-12  # a product's sum may round another way in another row


@pytest.mark.parametrize("shift", [0.5, -3.0])
def test_distance_in_one_dimension_is_the_shift(shift):
    x = points(31, 1)
    assert sliced_wasserstein(x, x + shift) == pytest.approx(abs(shift), rel=1e-12)


def test_distance_in_one_dimension_is_w2_and_not_w1():
    # 0, 0 onto 1, 3: W1 = 2, W2 = sqrt((1 + 9) / 2).
    assert sliced_wasserstein(torch.zeros(2, 1), torch.tensor([[3.0], [1.0]])) == pytest.approx(math.sqrt(5))


def test_distance_of_a_shift_is_its_length_over_root_d():
    x = points(40, 64, 2)
    shift = torch.tensor([3.0, 4.0])  # 5 km at each waypoint reads 5 / sqrt(2)
    # A mean of 20,000 squared normals: its root's relative error is sqrt(2 / 20000) / 2 = 0.5%; five sigma.
    assert sliced_wasserstein(x, x + shift, projections=20_000) == pytest.approx(5 / math.sqrt(2), rel=0.025)


def test_distance_of_two_gaussians():
    # N(0, 1) and N(0, 9): W2 = |1 - 3|. The quantiles of 40,000 draws are known to about 1%.
    x, y = points(40_000, 1), 3 * points(40_000, 1, seed=1)
    assert sliced_wasserstein(x, y, projections=1) == pytest.approx(2, rel=0.03)


def test_distance_of_unequal_sizes_is_that_of_the_quantile_functions():
    x = points(20, 6)
    y = points(20, 6, seed=1)
    assert sliced_wasserstein(x, y.repeat(3, 1)) == pytest.approx(sliced_wasserstein(x, y), rel=1e-12)
    assert sliced_wasserstein(torch.zeros(7, 2), torch.zeros(3, 2)) == 0


def test_distance_is_symmetric_and_repeatable():
    x, y = points(20, 6), 1 + points(33, 6, seed=1)
    assert sliced_wasserstein(x, y) == sliced_wasserstein(y, x) == sliced_wasserstein(x, y)
    assert sliced_wasserstein(x, y, seed=1) != sliced_wasserstein(x, y, seed=2)


@pytest.mark.parametrize("shape", [(0, 4), (5, 3)])
def test_distance_of_sets_that_do_not_compare_raises(shape):
    with pytest.raises(ValueError, match="as many entries"):
        sliced_wasserstein(torch.zeros(5, 4), torch.zeros(shape))


# ---- the data ----


def test_data_is_as_its_readme_says(flights):
    assert flights.train.shape == (2089, 64, 2) and flights.test.shape == (494, 64, 2)
    assert flights.train.dtype == flights.test.dtype == torch.float32
    assert flights.dt_seconds == 8
    for positions in (flights.train, flights.test):
        assert positions.isfinite().all()
        steps = torch.diff(positions, dim=1, prepend=torch.zeros(len(positions), 1, 2))  # from the origin
        speed = steps.norm(dim=-1) / 8 * 3600
        assert 100 < speed.min() and speed.max() < 1300  # km/h
        heading = torch.atan2(steps[..., 1], steps[..., 0])
        assert heading[:, 0].abs().median() < math.radians(1)
        turn = torch.remainder(torch.diff(heading, dim=1) + math.pi, 2 * math.pi) - math.pi
        assert turn.abs().max() < 0.6


def test_states_are_normalised_and_go_back_to_positions(flights):
    scaling = IncrementScaling(flights.train)
    states = scaling.states(flights.train)
    assert states.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(states.std(0), torch.full((64, 2), scaling.STATE_STD), rtol=1e-3, atol=0)
    # 64 float32 sums of terms of a few km: 64 * 2^-24 * 130 km.
    torch.testing.assert_close(scaling.positions(states), flights.train, rtol=0, atol=5e-4)


@pytest.mark.parametrize("turn", [-400.0, -90.0, 0.0, 30.0, 720.0])
def test_total_turn(turn):
    heading = torch.linspace(0, math.radians(turn), 63)
    positions = torch.stack([heading.cos(), heading.sin()], dim=-1).cumsum(0)
    positions = torch.cat([torch.zeros(1, 2), positions])[None]
    assert total_turn(positions).item() == pytest.approx(turn, abs=0.01)


# ---- the parts ----


def test_published_loop_gives_the_bits_of_sample():
    network = VelocityNetwork((4, 2), width=8, blocks=1).requires_grad_(False)
    torch.manual_seed(5)
    theirs = published_loop.sample([4, 2], 3, network, torch.device("cpu"), 5)
    torch.manual_seed(5)
    ours = FlowMatching((4, 2)).sample(3, network, inference_step=5)
    assert same_bits(theirs, ours)
    assert not same_bits(theirs, torch.nextafter(ours, ours + 1))
    assert not same_bits(torch.zeros(1), -torch.zeros(1))


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    flow_matching = FlowMatching((4, 2))
    network = VelocityNetwork((4, 2), width=32, blocks=1)
    states = torch.full((10, 4, 2), 3.0)
    pair = flow_matching.construct_training_data(states.repeat(100, 1, 1))

    def loss(net):
        return flow_matching.compute_loss_from_pred(pair, net(pair["noisy_x"], pair["timesteps"])).item()

    before = loss(network)
    average, taken = train(flow_matching, network, states, 300, seconds=math.inf)
    assert taken == 300
    assert loss(average) < 0.2 * before
    assert not average.training and not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize(("seconds", "wanted"), [(9.5, 9), (1.5, 1), (0.5, 1), (math.inf, 20)])
def test_training_stops_with_the_clock_after_one_step_at_least(seconds, wanted, monkeypatch):
    ticks = itertools.count()  # a second passes before each step
    monkeypatch.setattr(network, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    small = VelocityNetwork((4, 2), width=8, blocks=1)
    assert train(FlowMatching((4, 2)), small, torch.zeros(10, 4, 2), 20, seconds)[1] == wanted
    assert all(p.isfinite().all() for p in small.parameters())


# ---- the comparison ----


@pytest.fixture
def comparison_of(flights):
    """Makes the comparison on a velocity, with 20 trajectories a draw."""
    few = Flights(flights.train, flights.test[:20], flights.dt_seconds)

    def make(step_fn):
        return Comparison(
            FlowMatching((64, 2)), step_fn, IncrementScaling(flights.train), few, torch.device("cpu"), seed=3
        )

    return make


def test_error_and_distance_are_in_km_of_positions(comparison_of):
    compared = comparison_of(lambda x, t: x)  # dx/dt = x: e * noise
    measured = compared.solvers(["euler"])
    generator = torch.Generator().manual_seed(compared.seed + comparison.NOISE_SEED)
    noise = torch.randn(compared.sizes.draws * 20, 64, 2, generator=generator).double()
    positions = compared.scaling.positions
    for point in measured.points:
        n = point.evaluations
        off = positions((1 + 1 / n) ** n * noise) - positions(math.e * noise)
        # The reference, and float32, are wrong by 1e-6 of a sample at most, whose errors here are 1e-2 of it or more.
        assert point.error == pytest.approx(off.norm(dim=-1).square().mean().sqrt().item(), rel=1e-4)
    draws = positions(math.e * noise).split(20)
    assert len(draws) == compared.sizes.draws and not torch.equal(draws[0], draws[1])
    mean = sum(sliced_wasserstein(draw, compared.flights.test) for draw in draws) / len(draws)
    assert measured.converged_quality == pytest.approx(mean, rel=1e-4)  # the reference is within 1e-6 of e * noise


def test_the_best_with_a_name_is_the_nearest_at_10():
    def measured(*points):
        made = (Point(name, 10, 10, 1.0, quality) for name, quality in points)
        return SolverComparison((*made, Point("ab2", 20, 20, 1.0, 0.1)), 1, "", 0.0, 1.0)

    assert comparison.best_named(measured(("euler", 1.0), ("ab2", 3.0), ("ab3", 2.0), ("fitted", 0.5))) == "ab3"
    assert comparison.best_named(measured(("ab2", 2.0), ("ab3", 3.0))) == "ab2"


def test_gains_are_computed_from_the_lines():
    lines = [
        Line("published loop, Euler", 10, 100.0, 5.0, 1.0),
        Line("published loop, Euler", 20, 210.0, 4.0, 1.0),
        Line("published loop, Euler", 40, 400.0, 3.0, 1.0),
        Line("best with a name, ab3", 10, 100.0, 2.0, 1.0),
        Line("fitted", 6, 60.0, 3.0, 1.0),
        Line("fitted", 4, 42.0, 3.5, 1.0),
        Line("fitted", 3, 30.0, 9.0, 1.0),
    ]
    assert gains(lines) == [
        "6 fitted evaluations: the quality of the published loop with 40, 6.7 times faster.",
        "4 fitted evaluations: the quality of the published loop with 20, 5.0 times faster.",
    ]
    text = comparison.table(lines)
    assert text.splitlines()[3].split() == [
        "published",
        "loop,",
        "Euler",
        "40",
        "400.00",
        "ms",
        "3.00",
        "km",
        "1.00",
        "km",
    ]


# ---- the command ----


def sizes_of(fit_samples):
    return plan.Sizes(1, 64, fit_samples, 64, rounds=1, cost=1, cost_of_solvers=1, method_draws=2, cost_of_methods=1)


@pytest.fixture
def quick(monkeypatch):
    """The whole course, with little of everything."""
    monkeypatch.setattr(timing, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(command, "CALIBRATION_SECONDS", 0.02)
    monkeypatch.setattr(plan, "SIZES", (sizes_of(fit_samples=32),))
    monkeypatch.setattr(comparison, "PUBLISHED", (3, 5))
    monkeypatch.setattr(comparison, "EVALUATIONS", (3, 4, 5, 10))
    monkeypatch.setattr(methods, "EVALUATIONS", dict.fromkeys(methods.EVALUATIONS, (5, 10)))
    few = Flights.load()
    few = Flights(few.train, few.test[:50], few.dt_seconds)
    monkeypatch.setattr(Flights, "load", lambda: few)


@pytest.fixture
def small_network(monkeypatch):
    """Where what is looked at is no number: most of the course's time is the network's."""
    monkeypatch.setattr(network, "VelocityNetwork", functools.partial(VelocityNetwork, width=16, blocks=1))


def arguments(*args):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(arg) for arg in args])


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])


def test_demo_prints_the_table_and_writes_the_picture(tmp_path, capsys, quick):
    out = tmp_path / "picture.png"
    threads = torch.get_num_threads()
    assert command.run(arguments("--train-steps", 2, "--out", out, "--device", "cpu")) == 0
    output = capsys.readouterr().out
    assert "Device cpu (1 thread)," in output and torch.get_num_threads() == threads
    rows = [line.split() for line in output.splitlines() if line.rstrip().endswith("km") and " ms " in line]
    assert [(row[0], row[-7]) for row in rows] == [
        ("published", "3"), ("published", "5"), ("best", "10"), ("fitted", "6"), ("fitted", "4"), ("fitted", "3"),
    ]  # fmt: skip
    for row in rows:
        assert float(row[-6]) > 0 and 1 < float(row[-4]) < 50 and 0 <= float(row[-2]) < 50
    assert "Same bits as the published loop: yes" in output
    assert "converged  " in output and "floor: training flights  " in output
    width, height = png_size(out)
    assert width > 1200 and height > 900 and 50_000 < out.stat().st_size < 500_000


def test_demo_compares_the_solvers_and_writes_their_picture(tmp_path, capsys, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    assert command.run(arguments("--train-steps", 2, "--compare-solvers", "--device", "cpu")) == 0
    error, quality = capsys.readouterr().out.split("Quality; of the converged samples")
    for table in (error, quality):
        rows = {row[0]: row[1:] for row in map(str.split, table.splitlines()) if row and row[0] in (*SOLVERS, "fitted")}
        assert list(rows) == [*SOLVERS, "fitted"]
        assert len([cell for cell in rows["fitted"] if cell != "-"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["demo-solvers.png"]
    width, height = png_size(tmp_path / "demo-solvers.png")
    assert width > 1500 and height > 600 and 20_000 < (tmp_path / "demo-solvers.png").stat().st_size < 250_000


def test_demo_compares_the_methods_and_writes_their_picture(tmp_path, capsys, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    trained = []
    honest = network.train

    def train(method, *arguments, **more):
        average, taken = honest(method, *arguments, **more)
        trained.append((type(method).__name__, taken))
        return average, taken

    monkeypatch.setattr(network, "train", train)
    assert command.run(arguments("--train-steps", 3, "--compare-methods", "--device", "cpu")) == 0
    output = capsys.readouterr().out
    assert trained[-2:] == [("FlowMatching", 3), ("DDPM", 3)]
    rows = [line.split() for line in output.splitlines() if line.startswith(("  DDPM", "  DDIM", "  flow matching"))]
    names = [row[: next(k for k, cell in enumerate(row) if "." in cell)] for row in rows]
    assert [" ".join(name) for name in names] == list(methods.EVALUATIONS)
    assert "floor: training flights" in output and "2 draws of the noise, each of 50 flights" in output
    assert re.search(r"One draw's standard deviation: \d+\.\d\d km", output)
    assert [path.name for path in tmp_path.iterdir()] == ["demo-methods.png"]
    width, height = png_size(tmp_path / "demo-methods.png")
    assert width > 1200 and height > 900 and (tmp_path / "demo-methods.png").stat().st_size > 50_000
    with pytest.raises(SystemExit):
        arguments("--compare-methods", "--compare-solvers")


def test_methods_with_exact_networks_end_at_the_data(comparison_of, monkeypatch):
    """Data of a single flight: DDPM, DDIM and flow matching reach it with any number of evaluations."""
    monkeypatch.setattr(methods, "EVALUATIONS", dict.fromkeys(methods.EVALUATIONS, (5, 10)))
    data = torch.linspace(-1, 1, 128).view(64, 2)
    compared = comparison_of(lambda x, t: (data - x) / (1 - t))
    compared.sizes = sizes_of(fit_samples=1)
    diffusion = methods.diffusion_of(compared.flow_matching)

    def prediction(x, t):
        bar = diffusion.alphas_cumprod[t.long()].float()
        noise = (x - bar.sqrt() * data) / (1 - bar).sqrt()
        return bar.sqrt() * noise - (1 - bar).sqrt() * data

    measured = methods.compare(compared, diffusion, prediction)
    wanted = sliced_wasserstein(compared.scaling.positions(data[None]), compared.flights.test)
    for name, found in measured.points.items():
        assert [point.evaluations for point in found] == [5, 10], name
        for point in found:
            # Exact networks leave the float32 rounding of 10 steps, on scaled states.
            assert point.distances == pytest.approx([wanted] * 2, rel=1e-4), name
    assert [*measured.shown] == ["DDPM, 10 evaluations", "DDIM, 10 evaluations", "ab3, 10 evaluations"]
    assert measured.floor == compared.floor


def test_methods_are_summed_up_from_their_points():
    points = {
        "DDPM": [methods.Point(20, (5.0, 7.0)), methods.Point(100, (2.0, 2.2))],
        "DDIM": [methods.Point(20, (3.0, 3.0)), methods.Point(50, (2.2, 2.2))],
        "flow matching, euler": [methods.Point(5, (9.0, 9.0))],
    }
    measured = methods.Measured(points, 1.5, {})
    assert measured.best == pytest.approx(2.1)  # 2.0 and 2.2 are no binary fractions
    assert [measured.reached(name) for name in points] == [100, 50, None]
    assert measured.deviation == pytest.approx(math.sqrt((2.0 + 0.02) / 5))  # likewise
    lines = str(measured).splitlines()
    assert lines[1].split() == ["DDPM", "-", "6.00", "-", "2.10", "from", "100"]
    assert lines[3].split() == ["flow", "matching,", "euler", "9.00", "-", "-", "-", "not", "reached"]


def test_demo_says_when_training_was_cut_short_and_less_is_measured(
    tmp_path, capsys, monkeypatch, quick, small_network
):
    notes = []
    monkeypatch.setattr(picture, "draw", lambda *arguments: notes.append(arguments[-1]))
    monkeypatch.setattr(network, "step_seconds", lambda *arguments: 0.001)  # given, so that no load changes the plan
    assert command.run(arguments("--train-steps", 2, "--out", tmp_path / "p.png", "--device", "cpu")) == 0
    output = capsys.readouterr().out
    assert "\nMeasured: 1000 training steps a second. To end within three minutes: 2 of 2 steps,\n" in output
    assert notes.pop() == "" and "cut short" not in output
    # All of the time is over: a step is trained, and the least is measured.
    least = sizes_of(fit_samples=16)
    monkeypatch.setattr(plan, "SIZES", (*plan.SIZES, least))
    monkeypatch.setattr(plan, "MOST_SECONDS", 0.0)
    assert command.run(arguments("--train-steps", 50, "--out", tmp_path / "p.png", "--device", "cpu")) == 0
    (note,) = notes
    assert re.fullmatch(
        r"Training was cut short: 1 of 50 steps, \d+ s\. Measured less than on a faster machine: 1 draw of the noise "
        r"and 64 reference steps to compare, 16 samples and 64 reference steps to fit\.",
        note,
    )
    output = capsys.readouterr().out
    assert note in output.replace("\n", " ") and "This machine is slow or busy" in output
    assert "Fitted solvers with" in output


def test_the_plan_is_the_most_that_fits_into_the_time():
    most, least = plan.SIZES
    for seconds, solvers, steps, sizes in (
        (0.01, False, 3000, most),
        ((160 - 1) / 4350, False, 3000, most),  # all of it fits: 3,000 and the 1,350 of what follows
        (160 / (1350 + 1500), False, 1500, most),
        (160 / (1350 + 790), False, 1440, least),  # fewer than 800 would be left
        (160 / (1600 + 790), True, 1690, least),
        (1.0, False, 1, least),  # nothing fits: one step, and the least
    ):
        chosen = plan.plan(seconds, 160.0, 3000, plan.course(compare_solvers=solvers))
        assert (chosen.sizes, abs(chosen.steps - steps) <= 1) == (sizes, True), (seconds, chosen)
        if seconds < 1:
            cost = sizes.cost_of_solvers if solvers else sizes.cost
            assert chosen.training_seconds == 160 - seconds * cost
            assert seconds * (chosen.steps + cost) <= 160
    assert plan.plan(0.1, 136.0, 2, plan.course()) == (2, 136.0 - 135.0, most)  # as many as asked for will do
    assert plan.plan(0.1, 134.0, 0, plan.course()) == (0, 134.0 - 70.0, least)  # after training
    both = plan.course(compare_methods=True)  # two networks, and more time
    assert both.networks == 2 and both.seconds > 2 * plan.course().seconds
    after = 0.125 * most.cost_of_methods
    assert plan.plan(0.125, after + 200.0, 3000, both) == (800, 100.0, most)  # 100 s for each network


def test_the_step_is_measured_on_another_network_for_so_long():
    states = torch.zeros(10, 4, 2)
    begin = time.perf_counter()
    seconds = step_seconds(FlowMatching((4, 2)), states, 0.2)
    assert 0 < seconds < time.perf_counter() - begin


def test_the_data_is_credited_with_the_text_of_its_licence():
    folder = Path(command.__file__).parent
    assert "flights.LICENSE" in (folder / "README.md").read_text()
    text = (folder / "flights.LICENSE").read_text()
    assert text.startswith("MIT License") and "Xavier Olive" in text


def test_demo_returns_1_where_the_bits_differ(tmp_path, capsys, monkeypatch, quick, small_network):
    honest = published_loop.sample
    monkeypatch.setattr(published_loop, "sample", lambda *args: torch.nextafter(honest(*args), torch.tensor(9.0)))
    assert command.run(arguments("--train-steps", 1, "--out", tmp_path / "p.png", "--device", "cpu")) == 1
    captured = capsys.readouterr()
    assert "Same bits as the published loop: NO" in captured.out and "same bits" in captured.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--backend", "nonsense"], "nonsense"),
        (["--device", "nonsense"], "nonsense"),
        (["--device", "cpu", "--backend", "cuda"], "cuda"),
        (["--out", "no/such/folder/p.png"], "folder"),
        (["--out", "no/such/folder/p.png", "--compare-solvers"], "folder"),
    ],
)
def test_demo_refuses_before_it_trains(options, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.run(arguments(*options)) == 2
    captured = capsys.readouterr()
    assert reason in captured.err and not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["0", "-1", "x"])
def test_demo_refuses_step_counts_that_are_none(steps, capsys):
    with pytest.raises(SystemExit):
        arguments("--train-steps", steps)
    assert "--train-steps" in capsys.readouterr().err


@pytest.mark.parametrize("package", command.PACKAGES)
def test_demo_without_a_package_says_what_to_install(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert command.run(arguments()) == 2
    error = capsys.readouterr().err
    assert package in error and "pip install flowmatch_kernels[demo]" in error


def test_importing_the_command_does_not_import_matplotlib():
    code = "import sys, flowmatch_kernels.demo.command; print('matplotlib' in sys.modules)"  # torch imports tqdm
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
