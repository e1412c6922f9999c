"""`python -m bench`: every path of it, quickly; what must fail fails; what is counted and computed is right."""

import json
import mmap
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import compare, contestants, counts, machine, measure, report, run, targets, work
from bench.__main__ import main
from bench.work import ALPAMAYO, TASKS, Plan, Problem, Work
from flowmatch_kernels import FlowMatching, available_backends

ROOT = Path(__file__).parent.parent
#: Where other programs hold the cores, a second thread makes small tensors a hundred times slower.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
CPU = torch.device("cpu")
FINAL = Work(ALPAMAYO, steps=3)

needs_extension = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the extension is not built")


def plan(*works):
    return Plan(list(works), [], ALPAMAYO, ALPAMAYO, 64, (1, 5), seconds=0.0, least_runs=2)


def rows_of(name, one=FINAL):
    """The row of one contestant, of a run of one work with it and the published loop alone."""
    chosen = [c for c in contestants.contestants(CPU) if c.name in (name, "published loop") and c.computes(one)]
    rows = {row["contestant"]: row for row in run.results(one, chosen, plan(one))}
    assert rows["published loop"]["problem"] is None
    return rows[name]


# ---- the command ----


def test_quick(tmp_path):
    """The command as CI runs it: with and without the peers, whichever are installed."""
    command = [sys.executable, "-m", "bench", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every contestant computed the same thing" in done.stdout
    assert "not judged" in done.stdout and "not met" not in done.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["failures"] == []
    timed = {}
    for row in found["results"]:
        assert row["problem"] is None
        assert 0 < row["low_us"] <= row["median_us"] <= row["high_us"]
        timed.setdefault(row["contestant"], set()).add(row["task"])
    wanted = {c.name for c in contestants.contestants(CPU) if c.installed() and c.kind != "compiled"}
    assert timed.keys() == wanted
    assert timed["published loop"] == timed["ours, reference"] == set(TASKS)
    assert len(found["targets"]) == 30
    assert all(row["measured"] is not None for row in found["targets"][:24])  # not peak memory, nor the cost of a step
    assert {row["contestant"] for row in found["counts"]} == {
        "published loop",
        "best by hand",
        "ours",
        "ours, first call",
    }
    text = (tmp_path / "bench.md").read_text()
    assert "not judged" in text and "not met" not in text
    for part in ("## Targets", "### rk4", "### final, steps of [6, 64, 2]", "## Peak memory", "## Counts", "- CPU: "):
        assert part in text, part

    # The package's tests do not need matplotlib; `make` installs it, so that this runs there and in CI.
    plot = pytest.importorskip("bench.plot", reason="matplotlib is not installed", exc_type=ImportError)
    assert plot.main([str(tmp_path / "bench.json")]) == 0
    assert plot.by_steps([row for row in found["results"] if row["steps"] == 10]) is None
    for name in ("bench.png", "steps.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    axes = plot.by_task(found["results"]).axes[0]
    numbers = [float(text.get_text()) for text in axes.texts]
    assert len(numbers) == len(axes.patches) > 4
    ends = [bar.get_y() + bar.get_height() for bar in axes.patches]
    assert numbers == [pytest.approx(end, abs=0.005) for end in ends]  # a bar's number has two decimals
    said = plot.legend_of_bars(found["results"])
    absent = said.partition("as not installed")[2]
    assert all((name in absent) == (name not in timed) for name in ("torchdiffeq", "diffusers"))


def test_without_the_peers(monkeypatch):
    for peer in machine.PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
        monkeypatch.setattr(machine.importlib.metadata, "version", missing)
    found = run.report(plan(FINAL), lambda line: None)
    assert {row["kind"] for row in found["results"]} == {"published", "hand", "ours"}
    assert found["failures"] == []
    assert found["head"]["torchdiffeq"] == "not installed"
    assert "- diffusers: not installed" in report.markdown(found)


def missing(package):
    raise machine.importlib.metadata.PackageNotFoundError(package)


def test_a_full_run_covers_what_its_docstring_says():
    full = work.full()
    assert len(set(full.works)) == len(full.works)
    assert set(full.compiled) <= set(full.works)
    shapes = {one.shape for one in full.works}
    assert len(shapes) == 5
    base = {(one.shape, one.task) for one in full.works if one == Work(one.shape, one.task)}
    assert len(base) == 5 * len(TASKS)
    assert {one.steps for one in full.works} == {1, 5, 10, 20, 50}
    for plan_ in (full, work.quick()):
        assert set(targets.works(plan_)) <= set(plan_.works)
        assert set(plan_.works) >= set(work.ours(plan_.small))


@pytest.mark.parametrize("options", [["--only", "no such work"], ["--targets", "--only", "[1, 50, 32]"]])
def test_no_work_is_left(options, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert "[6, 64, 2], final, time_steps= a list" in capsys.readouterr().err


def test_some_works(tmp_path, capsys):
    """Their rows and targets alone; the work without the extension is done by a process that has none."""
    options = ["--quick", "--targets", "--only", "list", "--only", "without", "--output", str(tmp_path)]
    assert main(options) == 0
    assert "every contestant computed the same thing" in capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["work"].partition("final, ")[2] for row in found["targets"]] == [
        "time_steps= a list",
        "time_steps= and step_sizes= a list",
        "without the extension",
    ]
    assert all(row["measured"] > 0 for row in found["targets"])
    assert found["counts"] == []
    without = [row["contestant"] for row in found["results"] if not row["extension"]]
    assert without == ["published loop", "ours, reference"]


def test_a_process_without_the_extension_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(run.child, "command", lambda *_, **__: [sys.executable, "-c", "raise SystemExit(3)"])
    found = run.results(FINAL._replace(extension=False), [], plan())
    assert run.failures(found) == ["[6, 64, 2], final, 3 steps, without the extension, all: the process ended with 3"]


@pytest.mark.parametrize("one", work.ours(ALPAMAYO), ids=str)
def test_a_work_is_what_its_row_says(one):
    row = json.loads(json.dumps(one.json() | {"contestant": "someone"}))
    assert Work.of(row) == one
    assert Work.of({"shape": [6, 64, 2], "velocity": "float32"}) == Work(ALPAMAYO)  # of before there were grids


@pytest.mark.parametrize("one", [one for one in work.ours(ALPAMAYO) if one.grid and not one.of_samples], ids=str)
def test_own_grids(one):
    """Every loop and ours take the grid's steps, and but for lerobot's, which has its own dt, to the last bit."""
    chosen = [contestant for contestant in contestants.contestants(CPU) if contestant.computes(one)]
    assert {contestant.kind for contestant in chosen} == {"published", "loop", "ours"}
    exact = {contestant.name for contestant in chosen if "final" in contestant.exact}
    assert {contestant.name for contestant in chosen} - exact == {"float loop, lerobot's"}
    rows = run.results(one, chosen, plan(one))
    assert all(row["problem"] is None for row in rows), rows
    p = Problem(one, CPU)
    assert isinstance(p.times(), list if one.grid == "list" else torch.Tensor)
    assert (p.times() is p.times()) == (one.grid != "new tensor")
    assert p.grid()[[0, -1]].tolist() == [1.0, 0.0]


def test_grids_of_each_sample():
    """The loop that users write, the best by hand and ours: each sample on its own grid, and no other contestant."""
    one = Work(ALPAMAYO, grid=work.OF_SAMPLES)
    assert one in work.ours(ALPAMAYO)
    chosen = [contestant for contestant in contestants.contestants(CPU) if contestant.computes(one)]
    assert {contestant.kind for contestant in chosen} == {"published", "sample loop", "hand", "ours"}
    exact = {contestant.name for contestant in chosen if "final" in contestant.exact}
    assert {contestant.name for contestant in chosen} - exact == {"by hand, addcmul"}
    rows = run.results(one, chosen, plan(one))
    assert all(row["problem"] is None for row in rows), rows
    p = Problem(one, CPU)
    assert p.grid().shape == (6, 11)
    x = contestants.published(p)
    for b, grid in enumerate(p.grid()):
        alone = p.noise[b]
        for dt in torch.diff(grid).view(-1, 1, 1):
            alone = alone + dt * p.step_fn(None, None)[b]
        assert torch.equal(x[b], alone)
    others = {contestant.name for contestant in contestants.contestants(CPU) if contestant.computes(Work(ALPAMAYO))}
    assert not others & {"loop of samples", "by hand, addcmul"}


def test_step_sizes_reach_ours():
    """With other step sizes than the grid's differences the result is another."""
    p = Problem(Work(ALPAMAYO, grid="tensor", step_sizes=True), CPU)
    p.step_sizes = p.step_sizes / 2
    sample = contestants.ours("auto", p)
    assert torch.equal(sample(), contestants.published(p))
    assert not torch.equal(sample(), contestants.published(Problem(Work(ALPAMAYO, grid="tensor"), CPU)))


def test_built_in_each_call(monkeypatch):
    built = []
    kept = contestants.FlowMatching
    monkeypatch.setattr(contestants, "FlowMatching", lambda *a, **k: built.append(a) or kept(*a, **k))
    for one, wanted in ((Work(ALPAMAYO), 1), (Work(ALPAMAYO, built=True), 4)):
        built.clear()
        sample = contestants.ours("auto", Problem(one, CPU))
        for _ in range(3):
            sample()
        assert len(built) == wanted


# ---- what fails ----


def test_a_failure_is_told_and_ends_in_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(work, "quick", lambda: plan(FINAL))
    monkeypatch.setattr(contestants, "by_hand", lambda p: contestants.published(p) + 1)
    assert main(["--quick", "--output", str(tmp_path)]) == 1
    assert "FAILED: [6, 64, 2], final, 3 steps, by hand, fresh: differs" in capsys.readouterr().out
    assert "by hand, fresh: differs" in (tmp_path / "bench.md").read_text()
    assert "| by hand, fresh | failed |" in (tmp_path / "bench.md").read_text()


def one_bit_off(p):
    x = contestants.published(p).clone()
    x.view(-1)[5] = torch.nextafter(x.view(-1)[5], torch.tensor(9.0))
    return x


def once_more(p):
    p.step_fn(x=p.noise, t=torch.zeros(()))
    return contestants.published(p)


def not_there(p):
    raise ZeroDivisionError("no such thing")


@pytest.mark.parametrize(
    ("name", "function", "told"),
    [
        ("by_hand_same_bits", one_bit_off, "other bits than the published loop's in 1 values"),
        ("by_hand_in_place", lambda p: contestants.published(p) * 1.001, "differs from the published loop by"),
        ("by_hand_in_place", lambda p: contestants.published(p) * float("nan"), "differs from the published loop by"),
        ("by_hand_in_place", lambda p: contestants.published(p)[:1], "[1, 64, 2] torch.float32 instead of [6, 64, 2]"),
        ("by_hand_in_place", once_more, "4 evaluations instead of 3"),
        ("by_hand_in_place", not_there, "ZeroDivisionError: no such thing"),
    ],
)
def test_what_is_wrong_is_not_timed(monkeypatch, name, function, told):
    monkeypatch.setattr(contestants, name, function)
    row = rows_of(name.replace("by_hand_", "by hand, ").replace("_", " "))
    assert told in row["problem"]
    assert "median_us" not in row
    assert run.failures([row])[0].endswith(row["problem"])


def test_one_bit_is_within_what_an_fma_may(monkeypatch):
    monkeypatch.setattr(contestants, "by_hand_in_place", one_bit_off)
    assert rows_of("by hand, in place")["problem"] is None


@pytest.mark.parametrize("task", TASKS)
def test_ours_promises_bits_but_for_rk4(task):
    for contestant in contestants.contestants(CPU):
        if contestant.kind == "ours":
            assert (task in contestant.exact) == (task != "rk4")


# ---- the clock and the memory meter ----


def test_timing():
    found = measure.timing([4.0, 1.0, 3.0, 2.0, 5.0], 7)
    assert found == measure.Timing(3.0, 2.0, 4.0, 5, 7)
    assert found.json() == {"median_us": 3e6, "low_us": 2e6, "high_us": 4e6, "runs": 5, "calls": 7}


def test_in_turn(monkeypatch):
    """Each round runs every function once, and each of them sometimes right after each other one."""
    monkeypatch.setattr(measure, "calls_of_a_run", lambda function: 1)
    order = []
    measure.in_turn({name: lambda name=name: order.append(name) for name in "abc"}, seconds=0.0, least_runs=40)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 40 and all(sorted(turn) == list("abc") for turn in rounds)
    assert all(any(two in turn for turn in rounds) for two in ("ab", "ba", "ac", "ca", "bc", "cb"))


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc, which Linux alone has")
def test_peak_bytes():
    # rel=0.1: the kernel counts pages, and the process has others than the tensors'.
    size = 32 << 20
    assert measure.peak_bytes(lambda: torch.ones(2 * size, dtype=torch.uint8)) == pytest.approx(2 * size, rel=0.1)

    # An earlier peak does not show; and of three blocks there is one at a time. Mapped here, not by malloc, which may
    # keep a tensor's pages in its heap when it is freed: then there are two or three.
    def three_in_turn():
        for _ in range(3):
            with mmap.mmap(-1, size) as block:
                block[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)

    peak = measure.peak_bytes(three_in_turn)
    assert peak == pytest.approx(size, rel=0.1)

    # Memory that this package keeps for its next states is no memory that is there.
    x = torch.zeros(size // 4, 1)
    sample = partial(FlowMatching(1, num_inference_steps=2).sample, len(x), lambda x, t: x, noise=x)
    sample()
    assert measure.peak_bytes(sample) >= 0.9 * size
    there = torch.ones(size, dtype=torch.uint8)
    assert measure.peak_bytes(there.zero_) < size / 10


# ---- targets ----


def row_of(one, kind, contestant, median):
    return one.json() | {"kind": kind, "contestant": contestant, "median_us": median, "problem": None}


def test_targets(monkeypatch):
    """From recorded rows: a ratio of the right works, met or not, or not measured."""
    large = (2, 3)
    small_final, large_final = Work(ALPAMAYO), Work(large)
    own_grid, without_extension = Work(ALPAMAYO, grid="list"), Work(ALPAMAYO, extension=False)
    auto = f"ours, {'cpu' if available_backends()['cpu'] is None else 'reference'}"
    rows = [
        row_of(small_final, "published", "published loop", 110.0),
        row_of(small_final, "hand", "by hand, fresh", 35.0),
        row_of(small_final, "hand", "by hand, in place", 28.0),
        row_of(small_final, "ours", auto, 30.8),
        row_of(own_grid, "published", "published loop", 10.0),
        row_of(own_grid, "loop", "float loop, lerobot's", 44.0),
        row_of(own_grid, "loop", "0-dim loop", 40.0),
        row_of(own_grid, "ours", auto, 20.0),
        row_of(without_extension, "published", "published loop", 100.0),
        row_of(without_extension, "ours", "ours, reference", 110.0),
        row_of(small_final, "ours", "ours, other", 1.0),
        row_of(small_final._replace(steps=20), "ours", auto, 1.0),
        row_of(large_final, "published", "published loop", 60.0),
        row_of(large_final, "ours", auto, 20.0) | {"problem": "other bits"},
    ]
    del rows[-1]["median_us"]
    found = targets.table(plan()._replace(large=large), rows)
    told = [(row["against"], row["at_most"], row["measured"], row["met"]) for row in found]
    assert told[0] == ("published loop", 0.26, 0.28, False)
    assert told[1] == ("best by hand", 1.1, 1.1, True)
    assert found[1]["how"] == "by hand, in place"
    at = {row["work"]: row for row in found}
    own = at["[6, 64, 2], final, time_steps= a list"]
    assert (own["measured"], own["met"], own["how"]) == (0.5, False, "0-dim loop")
    without = at["[6, 64, 2], final, without the extension"]
    assert (without["measured"], without["met"]) == (1.1, True)  # of the reference, whatever there is here
    assert at["[2, 3], final"]["measured"] is None
    some = targets.table(plan(Work(ALPAMAYO, grid="list"))._replace(whole=False), rows)
    assert some == [own]
    assert "not measured" in report.targets(found)


def test_cost_per_step(monkeypatch):
    """What a call costs once is not a step's; noise larger than a step's cost is no measurement."""
    spans = {1: 12e-6, 5: 20e-6, 10: 31e-6}
    monkeypatch.setattr(
        targets, "in_turn", lambda samples, *_: {n: measure.Timing(spans[n], 0, 0, 1, 1) for n in samples}
    )
    three = plan()._replace(steps=(1, 5, 10))
    # A ratio of differences of the recorded floats: equal to 1.1 but for their rounding (approx's 1e-6).
    assert targets.cost_per_step(three).measured == pytest.approx(1.1)
    spans[10] = 19e-6
    assert targets.cost_per_step(three).measured is None


# ---- counts ----


@pytest.mark.parametrize(
    ("task", "published", "by_hand"),
    [("final", 3, 1), ("trajectory", 3, 1), ("guided", 6, 2), ("guided trajectory", 6, 2)],
)
def test_launches_of_a_step(task, published, by_hand):
    """What ten steps more add: the published loop's launches, the best by hand's, and one of ours."""
    few, many = ({row["contestant"]: row for row in counts.table(steps) if row["task"] == task} for steps in (10, 20))
    more = {name: (many[name]["launches"] - few[name]["launches"]) / 10 for name in few}
    assert more.pop("ours, first call") <= 2  # the table's rows are built one by one
    assert more == {"published loop": published, "best by hand": by_hand, "ours": 1}
    assert all(row["copies"] == 0 for name, row in many.items() if name != "ours, first call")


def test_bytes_of_a_step():
    few, many = (counts.counted_ours(Work(ALPAMAYO, "guided trajectory", steps))[1] for steps in (10, 20))
    state = 4 * 6 * 64 * 2
    # base, v, u, out and the slot; abs=16: an entry of the clock and of what is returned, each read and written
    assert (many.bytes - few.bytes) / 10 == pytest.approx(5 * state, abs=16)


def test_counter():
    x = torch.randn(4, 8, device="meta")
    with counts.Counter() as counter:
        x.view(-1).select(0, 3).expand(2)
        torch.empty_like(x)
        assert counter.count == (0, 0, 0)
        torch.ones(3) + 1  # the host's own
        assert counter.count == (0, 0, 0)
        torch.ones(3).to("meta")
        assert counter.count == (0, 0, 1)
        x[:1].expand(4, 8) + x
        assert counter.count == (1, 32 + 128 + 128, 1)
        x.add_(x)
        x.copy_(torch.empty(8, device="meta"))
        assert counter.count == (3, 288 + 2 * 128 + 32 + 128, 1)
    with pytest.raises((NotImplementedError, RuntimeError)):
        x.sum().item()  # waits for the device


def test_what_is_counted_is_ours(monkeypatch):
    monkeypatch.setattr(contestants, "ours", lambda backend, p: lambda: contestants.published(p))
    with pytest.raises(RuntimeError, match="0 fused steps in 10 evaluations"):
        counts.counted_ours(Work(ALPAMAYO))


# ---- two revisions ----


def test_two_sides(tmp_path):
    """One side samples with another package: its other bits show, and so does its time."""
    shutil.copytree(ROOT / "flowmatch_kernels", tmp_path / "flowmatch_kernels")
    with (tmp_path / "flowmatch_kernels" / "__init__.py").open("a") as file:
        file.write(
            "import time\n"
            "_sample = FlowMatching.sample\n"
            "def _slow(self, *arguments, **keywords):\n"
            "    time.sleep(0.005)\n"
            "    return _sample(self, *arguments, **keywords) + (len(self.x_dims) == 1)\n"
            "FlowMatching.sample = _slow\n"
        )
    with compare.Side(tmp_path) as base, compare.Side(ROOT) as this:
        same, other = compare.compared(base, this, [FINAL, Work((2, 3), steps=2)], runs=2)
    assert same["same_bits"]
    assert not other["same_bits"]
    base_us, this_us = (same[side]["median_us"] for side in ("base", "this"))
    assert base_us > 5000
    assert same["ratio"] == pytest.approx(this_us / base_us, abs=1e-3)  # it is rounded to three digits
    text = compare.markdown({"base": "HEAD~1", "head": {"CPU": "some"}, "rows": [same, other]})
    assert text.count("**other bits**") == 1


@pytest.mark.full
@needs_extension
def test_base(tmp_path):
    """This revision, built in a worktree, against itself."""
    command = [sys.executable, "-m", "bench", "--quick", "--base", "HEAD", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "compare.json").read_text())
    assert all(row["same_bits"] for row in found["rows"])
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "flowmatch_kernels-" not in listed


def test_a_side_that_dies_is_told(tmp_path):
    (tmp_path / "flowmatch_kernels.py").write_text("raise SystemExit(3)\n")
    with compare.Side(tmp_path) as side, pytest.raises(RuntimeError, match="ended with 3"):
        side.ask(number=0, work=FINAL.json())


def test_published_is_the_tests_oracle():
    """The benchmark's published loop is that of tests/published.py, and so is every work's problem."""
    import published

    for task in ("final", "trajectory", "guided", "guided trajectory"):
        p = Problem(Work(ALPAMAYO, task), CPU)
        keywords = {"return_all_steps": p.work.trajectory, "noise": p.noise}
        if p.work.guided:
            keywords |= {"unguided_step_fn": p.unguided_step_fn, "weight": work.WEIGHT}
        wanted = published.sample(6, p.step_fn, (64, 2), 10, **keywords)
        assert torch.equal(contestants.published(p), wanted[0] if p.work.trajectory else wanted)
