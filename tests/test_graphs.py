"""FlowMatching.graphed: on the CPU, with an emulation of capture and replay (tests/emulated_graph.py).

What is compared is compared with sample() of the same arguments, bit for bit.
"""

import contextlib
import functools
import gc
import logging
import runpy
import threading
import weakref
from pathlib import Path

import pytest
import torch
from emulated_graph import Graph, capturing, emulated
from operands import assert_same_bits, manual_seed
from test_capture import Refused
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flowmatch_kernels import FittedSolver, FlowMatching, KeyedNoise, StepFunction, graphs, inpaint, solvers, tracing
from flowmatch_kernels.graphs import GraphCaptureError
from flowmatch_kernels.integrations import alpamayo

aten = torch.ops.aten
DIMS, BATCH = (5, 3), 4
GRID = [0.0, 0.1, 0.35, 0.8, 1.0]
OTHER_GRID = [0.0, 0.4, 0.5, 0.6, 1.0]
#: [BATCH, 5, 5]: the first tokens are held.
TOKENS = torch.tensor(GRID).pow(torch.arange(1, 21).view(BATCH, 5, 1) / 8)
TOKENS[:, :2] = 0.75


def velocity(x, t, features):
    return torch.sin(features * x + t).to(x.dtype)


def unguided(x, t, features):
    return ((features - x) * t).to(x.dtype)


def both(x, t, features):
    return torch.cat([unguided(x, t, features), velocity(x, t, features)])


GUIDED = {"use_classifier_free_guidance": True, "unguided_step_fn": unguided, "inference_guidance_weight": 1.7}
#: name -> (arguments of the constructor, options of sample()).
CASES = {f"solver {name}": ({"int_method": name}, {}) for name in solvers.SOLVERS} | {
    "trajectory": ({}, {"return_all_steps": True}),
    "trajectory of rk4": ({"int_method": "rk4"}, {"return_all_steps": True}),
    "fitted": ({"int_method": FittedSolver((0.0, 0.4, 1.0), ((1.0, 0.4), (1.0, 0.7, -0.1)))}, {}),
    "guided": ({}, GUIDED),
    "guided trajectory": ({"int_method": "heun"}, GUIDED | {"return_all_steps": True}),
    "from_guided": ({"guidance_form": "from_guided"}, GUIDED),
    "weights": ({}, GUIDED | {"inference_guidance_weight": [1.0, 2.0, 3.0, 4.0]}),
    "weight of t": ({}, GUIDED | {"inference_guidance_weight": lambda t: 1 + t}),
    "skip": ({}, GUIDED | {"inference_guidance_weight": [1.0, 2.0, 0.0, 4.0], "skip_irrelevant_model": True}),
    "combined": ({}, {"use_classifier_free_guidance": True, "combined_guidance": True}),
    "combined, guided first": ({}, {"use_classifier_free_guidance": True, "combined_guidance": "guided_first"}),
    "shifted": ({"time_grid": "shifted", "time_grid_options": {"shift": 3.0}}, {}),
    "function": ({"time_grid": lambda n: torch.linspace(0, 1, n + 1) ** 2}, {}),
    "data": ({"prediction_type": "data"}, {}),
    "noise at one": ({"noise_at": 1, "time_grid": "power"}, {}),
    "list": ({"int_method": "ab3"}, {"time_steps": GRID}),
    "step sizes": ({}, {"time_steps": GRID, "step_sizes": [0.1, 0.2, 0.3, 0.4]}),
    "temperature": ({}, {"temperature": 0.3}),
    "bfloat16": ({}, {"dtype": torch.bfloat16}),
    "float64": ({"int_method": "ab2"}, {"dtype": torch.float64}),
    "strength": ({}, {"velocity_strength": torch.linspace(0, 1, 5).view(5, 1)}),
    "rounded": ({"step_rounding": "rounded"}, {}),
    "euler_at_final": ({"int_method": "heun", "euler_at_final": True}, {}),
    "constraint": ({}, {"constraint": lambda x, t: x.clamp(-1, 1)}),
    "no steps": ({"num_inference_steps": 0}, {}),
    "times of each sample": (
        {"int_method": "heun"},
        {"time_steps": [[0.1 * b, 0.2 + 0.1 * b, 0.9, 0.9 + 0.1 * (b % 2), 1.0] for b in range(BATCH)]}
        | {"return_all_steps": True},
    ),
    "times and weights of each token": (
        {"int_method": "ab2"},
        GUIDED
        | {"time_steps": TOKENS, "inference_guidance_weight": torch.arange(20.0).view(BATCH, 5, 1) / 8}
        | {"return_all_steps": True},
    ),
}
ROWS = ("C++", "Python", "reference")


def features(seed):
    return torch.randn(BATCH, 1, 3, generator=torch.Generator().manual_seed(100 + seed))


def flow(**constructor):
    steps = {} if isinstance(constructor.get("int_method"), FittedSolver) else {"num_inference_steps": 4}
    return FlowMatching(DIMS, **steps | constructor)


def sampled(fm, step_fn, inputs, **options):
    """What sample() returns, where each function gets the inputs."""
    bound = {
        name: (lambda x, t, one=one: one(x, t, **inputs)) if name == "unguided_step_fn" else one
        for name, one in options.items()
    }
    return fm.sample(bound.pop("batch_size", BATCH), lambda x, t: step_fn(x, t, **inputs), **bound)


def assert_equal(got, wanted, what=""):
    got, wanted = (one if isinstance(one, tuple) else (one,) for one in (got, wanted))
    for x, y in zip(got, wanted, strict=True):
        assert_same_bits(x, y, what)
        assert x.stride() == y.stride(), what


def check(sampler, fm, step_fn, inputs, what="", seed=0, **options):
    """A call gives the bits of sample(), from the same state of the default generator, and leaves it in the same."""
    drawn_from = {name: options[name] for name in ("generator", "noise", "step_noise") if name in options}
    options = {name: value for name, value in options.items() if name not in drawn_from}

    def sources():
        return {
            name: [torch.Generator().manual_seed(k) for k in range(BATCH)]
            if value == "generators"
            else torch.Generator().manual_seed(value)
            if isinstance(value, int)
            else value
            for name, value in drawn_from.items()
        }

    manual_seed(seed)
    got = sampler(**inputs, **sources(), **options)
    after = torch.random.get_rng_state()
    manual_seed(seed)
    wanted = sampled(fm, step_fn, inputs, **sampler._options | options | sources())
    assert_equal(got, wanted, what)
    assert torch.equal(after, torch.random.get_rng_state()), what
    return got


@pytest.fixture(autouse=True)
def no_tables_of_others():
    solvers.cache.clear()


@pytest.mark.parametrize("rows", ROWS)
def test_bits_of_eager(monkeypatch, rows):
    """Every configuration, over seeds, inputs and noise; the graph is captured once, when the sampler is made."""
    emulated(monkeypatch, rows)
    for name, (constructor, options) in CASES.items():
        fm = flow(**constructor)
        step_fn = both if options.get("combined_guidance") else velocity
        sampler = fm.graphed(step_fn, BATCH, inputs={"features": features(0)}, **options)
        assert sampler.stats[:2] == (1, 0), name
        for seed in range(3):
            check(sampler, fm, step_fn, {"features": features(seed)}, f"{name}, seed {seed}", seed)
        assert sampler.stats == (1, 3, {}, 1), name
        noise = torch.randn(BATCH, *DIMS, dtype=options.get("dtype", torch.float32))
        before = noise.clone()
        for factor in (1, 2):
            check(sampler, fm, step_fn, {"features": features(7)}, f"{name}, noise", noise=noise.mul_(factor))
        assert torch.equal(noise, before * 2), "the caller's noise has changed"
        assert sampler.stats.captures == 1


#: One grid for each sample, which ends before the data; the second is held in its first step, the last in all.
OWN_TIMES = [[0.0, 0.2, 0.5, 0.7, 0.9], [0.1, 0.1, 0.3, 0.5, 0.8], [0.2, 0.3, 0.4, 0.6, 0.7], [0.5] * 5]
STOCHASTIC = {
    "sde": ({"int_method": "sde"}, {}),
    "sde, log_prob": ({"int_method": "sde"}, {"return_log_prob": True}),
    "dance, trajectory, log_prob": ({"int_method": "dance"}, {"return_log_prob": True, "return_all_steps": True}),
    "cps": ({"int_method": "cps"}, {"return_all_steps": True}),
    "renoise, bfloat16": ({"int_method": "renoise"}, {"dtype": torch.bfloat16}),
    "sde, float64": ({"int_method": "sde"}, {"dtype": torch.float64, "return_log_prob": True}),
    "sde, guided": ({"int_method": "sde"}, GUIDED | {"return_log_prob": True}),
    "dance, own times, log_prob": (
        {"int_method": "dance"},
        {"time_steps": OWN_TIMES, "return_all_steps": True, "return_log_prob": True},
    ),
}
STEP_SOURCES = {
    "default": {},
    "keyed": {"noise": KeyedNoise(7)},
    "keyed list": {"noise": [KeyedNoise(k, k) for k in range(BATCH)]},
    "generator": {"generator": 5},
    "generators": {"noise": "generators"},
    "keyed steps": {"step_noise": KeyedNoise(9, first=2)},
    "keyed steps, keyed start": {"noise": KeyedNoise(3), "step_noise": KeyedNoise(9)},
    "given": {"step_noise": torch.randn(BATCH, 4, *DIMS, generator=torch.Generator().manual_seed(3))},
    "given start and steps": {
        "noise": torch.randn(BATCH, *DIMS, generator=torch.Generator().manual_seed(4)),
        "step_noise": torch.randn(BATCH, 4, *DIMS, generator=torch.Generator().manual_seed(3)),
    },
    "permuted start": {"noise": torch.randn(BATCH, *DIMS[::-1]).transpose(1, 2), "generator": 6},
}


@pytest.mark.parametrize("rows", ROWS)
def test_stochastic_solvers(monkeypatch, rows):
    """Every draw is that of sample(), also where step_fn draws between them; other keys and other eta need no graph."""
    emulated(monkeypatch, rows)
    some = "default", "keyed", "given"
    cases = [(name, kind) for name in STOCHASTIC for kind in some if rows == "C++" or "log_prob" in name]
    if rows == "C++":
        cases += [("sde, log_prob", kind) for kind in STEP_SOURCES if kind not in some]
    for name, kind in cases:
        constructor, options = STOCHASTIC[name]
        source = STEP_SOURCES[kind]
        fm = flow(**constructor)
        step_fn = drawing if kind == "default" else velocity
        sampler = fm.graphed(step_fn, BATCH, inputs={"features": features(0)}, **options)
        inputs = {"features": features(1)}
        check(sampler, fm, step_fn, inputs, f"{name}, {kind}", **source)
        captures = sampler.stats.captures
        assert captures <= 2, f"{name}, {kind}"  # the constructor's draws by the default generator
        if "renoise" not in name:
            of_solver = {"int_method_options": {"eta": 0.2}}
            check(sampler, fm, step_fn, inputs, f"{name}, {kind}, eta", **source, **of_solver)
        for option, other in (("noise", KeyedNoise(8, 3)), ("step_noise", KeyedNoise(1))):
            if isinstance(source.get(option), KeyedNoise):
                check(sampler, fm, step_fn, inputs, f"{name}, {kind}", **source | {option: other})
        assert sampler.stats.captures == captures, f"{name}, {kind}"


def drawing(x, t, features):
    return velocity(x, t, features) + 0.1 * torch.randn_like(x)


def test_a_step_without_noise_has_no_log_prob(monkeypatch):
    """Also where the graph is there: another eta is the same graph, but not one that leaves no noise."""
    emulated(monkeypatch)
    sampler = flow(int_method="sde").graphed(velocity, BATCH, inputs={"features": F}, return_log_prob=True)
    with pytest.raises(ValueError, match=r"steps \[0, 1, 2, 3\] add no noise"):
        sampler(features=F, int_method_options={"eta": 0.0})
    with pytest.raises(ValueError, match=r"steps \[0, 1, 2, 3\] add no noise to sample 0"):
        sampler(features=F, int_method_options={"eta": 0.0}, time_steps=OWN_TIMES)


def test_log_prob_of_other_times_of_each_sample(monkeypatch):
    """Other grids, and other steps of length 0, are the same graph; a step without noise raises."""
    emulated(monkeypatch)
    fm = flow(int_method="cps")
    given = {"step_noise": KeyedNoise(2), "time_steps": OWN_TIMES, "return_log_prob": True}
    sampler = fm.graphed(velocity, BATCH, inputs={"features": F}, **given)
    grid = torch.linspace(0.0, 0.9, 5)
    for times in (
        OWN_TIMES,
        grid.repeat(BATCH, 1),
        torch.stack([grid.roll(-k).cummax(0).values for k in range(BATCH)]),
    ):
        check(sampler, fm, velocity, {"features": F}, "cps", **given | {"time_steps": times})
    assert sampler.stats.captures == 1
    with pytest.raises(ValueError, match=r"steps \[3\] add no noise to sample 0"):
        sampler(features=F, **given | {"time_steps": grid.repeat(BATCH, 1) / 0.9})


SOURCES = {
    "generator": {"generator": 5},
    "keyed": {"noise": KeyedNoise(7)},
    "keyed, first": {"noise": KeyedNoise(2**64 - 1, first=9, stream=3)},
    "keyed list": {"noise": [KeyedNoise(k, k) for k in range(BATCH)]},
    "generators": {"noise": "generators"},
    "bfloat16 noise": {"noise": torch.randn(BATCH, *DIMS).bfloat16()},
    "permuted noise": {"noise": torch.randn(BATCH, *DIMS[::-1]).transpose(1, 2)},
    "expanded noise": {"noise": torch.randn(1, *DIMS).expand(BATCH, *DIMS)},
    "sliced noise": {"noise": torch.randn(BATCH, 5, 6)[:, :, ::2]},
    "permuted and sliced noise": {"noise": torch.randn(BATCH, 3, 10)[:, :, ::2].transpose(1, 2)},
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sources_of_noise(monkeypatch, rows, temperature):
    """Each is drawn as sample() draws it; another key, another seed and another temperature need no graph more."""
    emulated(monkeypatch, rows)
    fm = flow()
    for name, source in SOURCES.items():
        dtype = torch.float32 if name == "bfloat16 noise" else None
        sampler = fm.graphed(velocity, BATCH, inputs={"features": features(0)}, dtype=dtype, **source_default(source))
        for seed in range(2):
            inputs = {"features": features(seed)}
            got = check(sampler, fm, velocity, inputs, name, seed, temperature=temperature, **source)
        captures = sampler.stats.captures
        own = "permuted noise", "bfloat16 noise", "keyed list", *["keyed", "keyed, first"] * (temperature != 1.0)
        # The constructor's was for noise that is drawn, or for keys that are not scaled.
        assert captures == 1 + (name in own) - (name == "bfloat16 noise" and temperature != 1.0), name
        if "keyed" in name:
            others = KeyedNoise(11, 2), KeyedNoise(12)
            for other in others if "list" not in name else ([others[0]] * BATCH, list(others) * 2):
                check(sampler, fm, velocity, {"features": features(1)}, name, noise=other, temperature=temperature / 2)
            assert sampler.stats.captures <= captures + 1
        if name == "permuted noise":
            assert got.stride() == source["noise"].stride()


@pytest.mark.parametrize("name", [name for name in SOURCES if name.endswith("noise")])
def test_noise_that_a_graph_is_made_for(monkeypatch, name):
    """bfloat16 noise is scaled in the state's dtype; a format that sample() does not keep is contiguous."""
    emulated(monkeypatch)
    fm, options = flow(), SOURCES[name] | {"dtype": torch.float32, "temperature": 0.3}
    sampler = fm.graphed(velocity, BATCH, inputs={"features": F}, **options)
    assert_equal(sampler(features=F), sampled(fm, velocity, {"features": F}, **options))


def source_default(source):
    """The keys of a constructor's noise: then the first graph is one that draws from keys."""
    return source if isinstance(source.get("noise"), KeyedNoise) else {}


def test_keys_are_drawn_in_the_graph(monkeypatch):
    """Nothing of the draw runs outside: the noise is computed from the buffer of keys at each replay."""
    emulated(monkeypatch)
    fm = flow()
    sampler = fm.graphed(velocity, BATCH, inputs={"features": features(0)}, noise=KeyedNoise(1))
    names = sampler._recorder.last.recorded.names()
    assert names.index("aten.arange.start_step" if "aten.arange.start_step" in names else "aten.arange.default") < 5
    assert any("bitwise_xor" in name for name in names), "Philox's rounds"


def nested_velocity(x, t, policy, scale, flip):
    v = x * policy["cache"][0]["k"] + policy["cache"][1]["k"] * t
    return (v * scale).flip(1) if flip else v * scale


def test_nested_inputs(monkeypatch):
    """Dicts, lists and tuples of tensors; constants are part of the signature, by type and bits."""
    emulated(monkeypatch)
    fm = flow()

    def inputs(seed, scale=2.0, flip=False):
        generator = torch.Generator().manual_seed(seed)
        k = [torch.randn(BATCH, 5, 3, generator=generator) for _ in range(2)]
        return {"policy": {"cache": [{"k": k[0]}, {"k": k[1]}], "none": None}, "scale": scale, "flip": flip}

    sampler = fm.graphed(nested_velocity, BATCH, inputs=inputs(0), max_graphs=8)
    for seed in range(3):
        check(sampler, fm, nested_velocity, inputs(seed))
    assert sampler.stats.captures == 1
    for k, changed in enumerate([{"scale": 0.0}, {"scale": -0.0}, {"scale": 2}, {"flip": True}, {"flip": 1}], start=2):
        check(sampler, fm, nested_velocity, inputs(4, **changed), str(changed))
        assert sampler.stats.captures == k, changed
    with pytest.raises(TypeError, match=r"got <object.*pass the tensors that it holds"):
        sampler(policy=object(), scale=1.0, flip=False)


def test_layouts_of_inputs(monkeypatch):
    """step_fn sees the strides of the caller's tensors where they are dense or expanded; each is a signature."""
    emulated(monkeypatch)
    fm, seen = flow(), []

    def step_fn(x, t, features):
        seen.append(features.stride())
        return velocity(x, t, features)

    dense = torch.randn(BATCH, 5, 3)
    layouts = [
        dense,
        torch.randn(BATCH, 3, 5).transpose(1, 2),
        torch.randn(1, 1, 3).expand(BATCH, 5, 3),
        torch.randn(()).expand(BATCH, 5, 3),
        torch.nn.Parameter(dense.clone()),
    ]
    sampler = fm.graphed(step_fn, BATCH, inputs={"features": dense})
    for k, layout in enumerate(layouts):
        seen.clear()
        for factor in (1, 2, 3):
            given = layout * factor if k in (0, 1) else layout
            check(sampler, fm, step_fn, {"features": given}, f"layout {k}")
        assert set(seen) == {layout.stride()}
    sliced = torch.randn(BATCH, 5, 6)[:, :, ::2]
    check(sampler, fm, step_fn, {"features": sliced})
    negative = torch.randn(BATCH, 5, 3, dtype=torch.cfloat).conj().imag
    assert negative.is_neg() and negative.stride() == sliced.stride()
    check(sampler, fm, step_fn, {"features": negative})
    assert sampler.stats.captures == 5  # the parameter is as the first, the negative as the sliced


def test_other_signatures_are_other_graphs(monkeypatch):
    emulated(monkeypatch)
    fm = flow()
    f = features(0)
    sampler = fm.graphed(velocity, BATCH, inputs={"features": f}, max_graphs=20)
    changes = [
        ({}, {"return_all_steps": True}),
        ({"features": f[:1]}, {"batch_size": 2}),
        ({"features": f.double()}, {"dtype": torch.float64}),
        ({"features": f[:1]}, {}),
        ({"features": f.double()}, {}),
        ({}, {"int_method": "heun"}),
        ({}, {"int_method": "ab2"}),
        ({}, {"inference_step": 3}),
        ({}, GUIDED),
        ({}, {"constraint": lambda x, t: x.clamp(-0.1, 0.1)}),
        ({}, {"step_rounding": "exact"}),
        ({}, {"dtype": torch.bfloat16}),
    ]
    for k, (inputs, options) in enumerate(changes, start=2):
        for seed in range(2):
            check(sampler, fm, velocity, {"features": f} | inputs, str(options), seed, **options)
        assert sampler.stats.captures == k, options
    check(sampler, fm, velocity, {"features": f})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(sampler, fm, velocity, {"features": f})
    with torch.inference_mode():
        check(sampler, fm, velocity, {"features": f})
    check(sampler, fm, velocity, {"features": f})
    assert sampler.stats == (15, 28, {}, 15)


# ---- values that may not be stale ----


def test_grids_and_weights_need_no_capture(monkeypatch):
    """Neither by the setters, nor for one call, nor where the FlowMatching itself is changed."""
    emulated(monkeypatch)
    fm = flow(int_method="ab2", **{"use_classifier_free_guidance": True})
    options = {"unguided_step_fn": unguided}
    sampler = fm.graphed(velocity, BATCH, inputs={"features": features(0)}, **options)

    def same(**more):
        for seed in range(2):
            check(sampler, fm, velocity, {"features": features(seed)}, str(more), seed, **more)

    same()
    sampler.set_time_steps(GRID)
    same()
    sampler.set_time_steps(torch.tensor(OTHER_GRID))
    same()
    sampler.set_guidance_weight(2.5)
    same()
    sampler.set_guidance_weight([1.0, 0.0, -0.0, 3.0])
    same()
    sampler.set_guidance_weight(lambda t: 1 + t)
    same()
    sampler.set_time_steps(None)
    sampler.set_guidance_weight(None)
    same()
    same(time_steps=OTHER_GRID, step_sizes=[0.1, 0.2, 0.3, 0.4], inference_guidance_weight=0.25)
    same()
    fm.inference_guidance_weight = -3.0
    same()
    fm.time_grid, fm.time_grid_options = "shifted", {"shift": 2.0}
    same()
    assert sampler.stats == (1, 22, {}, 1)
    fm.num_inference_steps = 5
    same()
    sampler.set_time_steps([0.0, 0.5, 1.0])
    same()
    assert sampler.stats.captures == 3
    changes = {"guidance_form": "from_guided", "step_rounding": "exact"}
    for captures, (name, value) in enumerate(changes.items(), start=4):
        setattr(fm, name, value)
        same()
        assert sampler.stats.captures == captures, name


def test_a_function_is_asked_at_each_call(monkeypatch):
    emulated(monkeypatch)
    power = [1.0]
    fm = flow(time_grid=lambda n: torch.linspace(0, 1, n + 1) ** power[0])
    sampler = fm.graphed(velocity, BATCH, inputs={"features": features(0)})
    for power[0] in (1.0, 2.0, 0.5):
        check(sampler, fm, velocity, {"features": features(0)})
    assert sampler.stats == (1, 3, {}, 1)


@pytest.mark.parametrize("kind", ["skip", "dtypes"])
def test_weights_that_the_host_reads(monkeypatch, kind):
    """Then the graph holds their values, and another weight is another graph."""
    emulated(monkeypatch)
    fm = flow()
    step_fn = velocity
    if kind == "dtypes":  # combined by PyTorch's own promotion, with weights that are Python numbers

        def step_fn(x, t, features):
            return velocity(x, t, features).bfloat16()

    options = GUIDED | {"skip_irrelevant_model": kind == "skip"}
    sampler = fm.graphed(step_fn, BATCH, inputs={"features": features(0)}, max_graphs=8, **options)
    for weight in (1.7, 1.0, 0.0, 0.5, [1.0, 0.0, 2.0, 1.0], 1.7):
        sampler.set_guidance_weight(weight)
        for seed in range(2):
            check(sampler, fm, step_fn, {"features": features(seed)}, str(weight), seed)
    assert sampler.stats.captures == 5


def test_times_of_tokens(monkeypatch):
    """Other values need no new graph; times of samples, or of one for all tokens, are another."""
    emulated(monkeypatch)
    fm = flow(int_method="heun")
    sampler = fm.graphed(velocity, BATCH, inputs={"features": features(0)}, time_steps=TOKENS)
    for captures, grid in enumerate([TOKENS, TOKENS.flip(1), TOKENS[:, :1], TOKENS[:, 0], GRID]):
        sampler.set_time_steps(grid)
        for seed in range(2):
            check(sampler, fm, velocity, {"features": features(seed)}, f"{captures}", seed)
        assert sampler.stats.captures == max(1, captures - 1)


def test_a_setter_that_raises_changes_nothing(monkeypatch):
    emulated(monkeypatch)
    fm = flow()
    sampler = fm.graphed(velocity, BATCH, inputs={"features": features(0)})
    with pytest.raises(ValueError, match="strictly monotonic"):
        sampler.set_time_steps([0.0, 0.5, 0.5, 0.7, 1.0])
    with pytest.raises(ValueError, match=r"time_steps\[0\] must have a row for each of the 5 entries.*got 3"):
        sampler.set_time_steps(TOKENS[:, :3])
    with pytest.raises(ValueError, match="guidance is off"):
        sampler.set_guidance_weight(2.0)
    check(sampler, fm, velocity, {"features": features(0)})
    guided = fm.graphed(velocity, BATCH, inputs={"features": features(0)}, **GUIDED)
    with pytest.raises(ValueError, match="finite"):
        guided.set_guidance_weight(float("nan"))
    check(guided, fm, velocity, {"features": features(0)})


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.register_buffer("shift", torch.randn(3))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, t, features):
        return self.dropout(self.layer(x) + self.shift * t + features)


def test_weights_of_the_network(monkeypatch):
    """In place: seen. Replaced: not, without module=, until reset(); with it, at the next call."""
    emulated(monkeypatch)
    fm, network = flow(), Network().eval()
    one = fm.graphed(network, BATCH, inputs={"features": features(0)})
    two = fm.graphed(network, BATCH, inputs={"features": features(0)}, module=network)
    samplers = one, two

    def both_are_right():
        for sampler in samplers:
            check(sampler, fm, network, {"features": features(1)})

    both_are_right()
    with torch.no_grad():
        network.layer.weight.mul_(1.5)
        network.shift.add_(1.0)
    network.load_state_dict({name: x * 2 for name, x in network.state_dict().items()})
    both_are_right()
    assert (one.stats.captures, two.stats.captures) == (1, 1)

    changes = [
        lambda: setattr(network.layer, "weight", torch.nn.Parameter(torch.randn(3, 3))),
        lambda: setattr(network.layer.bias, "data", torch.randn(3)),
        lambda: network.load_state_dict({n: x + 1 for n, x in network.state_dict().items()}, assign=True),
        lambda: setattr(network, "layer", torch.nn.Linear(3, 3)),
        lambda: setattr(network, "shift", torch.randn(3)),
        lambda: network.train(),
    ]
    for k, change in enumerate(changes, start=2):
        change()
        manual_seed(0)
        stale = one(features=features(1))
        check(two, fm, network, {"features": features(1)}, f"change {k - 2}")
        manual_seed(0)
        assert not torch.equal(stale, two(features=features(1)))
        one.reset()
        assert one.stats.graphs == 0
        both_are_right()
        assert (one.stats.captures, two.stats.captures) == (k, k)


# ---- graphs that are kept, results, memory ----


def test_least_recent_use(monkeypatch, caplog):
    emulated(monkeypatch)
    fm = flow()

    def step_fn(x, t, features):
        return velocity(x, t, features)

    sampler = fm.graphed(step_fn, BATCH, inputs={"features": features(0)}, max_graphs=2)

    def use(batch_size):
        check(sampler, fm, step_fn, {"features": features(0)[:1]}, batch_size=batch_size)

    use(BATCH)  # features of another shape: the second graph
    use(2)  # drops the constructor's
    assert sampler.stats[::3] == (3, 2)
    use(BATCH)
    use(3)  # drops 2
    with caplog.at_level(logging.WARNING, "flowmatch_kernels"):
        use(BATCH)
        assert sampler.stats.captures == 4
        assert not caplog.records
        use(2)
    assert sampler.stats[::3] == (5, 2)
    assert sampler._recorder.dropped == 3
    assert "max_graphs=2" in caplog.text


def test_results_are_the_callers(monkeypatch):
    """A later call changes none; copy_output=False hands out the graph's memory."""
    emulated(monkeypatch)
    fm = flow()
    sampler = fm.graphed(velocity, BATCH, inputs={"features": features(0)}, return_all_steps=True)
    x, times = sampler(features=features(0))
    kept = x.clone(), times.clone()
    x2, _ = sampler(features=features(1))
    assert_equal((x, times), kept)
    x.fill_(torch.nan)
    times.fill_(torch.nan)
    x2.fill_(torch.nan)
    check(sampler, fm, velocity, {"features": features(2)})

    manual_seed(0)
    first, first_times = sampler(features=features(0), copy_output=False)
    assert_equal((first, first_times), sampled_again(sampler, fm, 0))
    second, _ = sampler(features=features(1), copy_output=False)
    assert second.data_ptr() == first.data_ptr()
    static = fm.graphed(velocity, BATCH, inputs={"features": features(0)}, copy_output=False)
    assert static(features=features(0)).data_ptr() == static(features=features(1)).data_ptr()
    assert static(features=features(0), copy_output=True).data_ptr() != static(features=features(1)).data_ptr()


def sampled_again(sampler, fm, seed):
    manual_seed(0)
    return sampled(fm, velocity, {"features": features(seed)}, **sampler._options)


def test_a_result_is_the_next_noise(monkeypatch):
    """The static buffer of a call is given to the next one, as noise and as an input."""
    emulated(monkeypatch)
    fm = flow()
    sampler = fm.graphed(velocity, BATCH, inputs={"features": torch.randn(BATCH, *DIMS)}, copy_output=False)
    noise = torch.randn(BATCH, *DIMS)
    x = sampler(features=noise, noise=noise)
    wanted = sampled(fm, velocity, {"features": noise}, noise=noise)
    assert_equal(x, wanted)
    assert_equal(sampler(features=x, noise=x), sampled(fm, velocity, {"features": wanted}, noise=wanted))


def test_inputs_are_not_written_and_not_kept(monkeypatch):
    """A step_fn that writes to its inputs writes to the graph's, from the values of the call each time."""
    emulated(monkeypatch)

    def step_fn(x, t, features):
        features.add_(1.0)
        x.mul_(1.1)
        return velocity(x, t, features)

    fm, f, noise = flow(), features(0), torch.randn(BATCH, *DIMS)
    for sampler in (fm.graphed(step_fn, BATCH, inputs={"features": f}), cpu_sampler(monkeypatch, fm, step_fn, f)):
        for seed in range(2):
            given, z = features(seed), noise + seed
            manual_seed(0)
            got = sampler(features=given, noise=z)
            assert torch.equal(given, features(seed))
            assert torch.equal(z, noise + seed)
            assert_equal(got, sampled(fm, step_fn, {"features": features(seed)}, noise=z))
    held = torch.randn(BATCH, 1, 3)
    there = weakref.ref(held)
    emulated(monkeypatch)
    sampler = fm.graphed(velocity, BATCH, inputs={"features": held})
    sampler(features=held, noise=noise)
    del held
    gc.collect()
    assert there() is None, "a graph keeps the tensors of its first call"


def cpu_sampler(monkeypatch, fm, step_fn, f):
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "recorder", lambda device, generators: None)
        return fm.graphed(step_fn, BATCH, inputs={"features": f})


# ---- what a step_fn does ----


def test_python_is_frozen(monkeypatch):
    """A counter counts the warm-up and the capture, as on a GPU; its value is that of the capture."""
    emulated(monkeypatch)
    calls = []

    def step_fn(x, t):
        calls.append(len(calls))
        return x * calls[-1]

    fm, noise = flow(), torch.ones(BATCH, *DIMS)
    sampler = fm.graphed(step_fn, BATCH, noise=noise)
    assert len(calls) == 3 * 4
    frozen = iter(range(8, 12))
    wanted = fm.sample(BATCH, lambda x, t: x * next(frozen), noise=noise)
    for _ in range(2):
        assert_equal(sampler(), wanted)
    assert len(calls) == 12


@pytest.mark.parametrize("rows", ROWS)
def test_one_output_for_both_models(monkeypatch, rows):
    """Guidance by two models that return one static buffer, as replayed graphs of their own do."""
    emulated(monkeypatch, rows)
    fm = flow()
    out = torch.empty(BATCH, *DIMS)

    def guided_step(x, t, features):
        return out.copy_(velocity(x, t, features))

    def unguided_step(x, t, features):
        return out.copy_(unguided(x, t, features))

    options = GUIDED | {"unguided_step_fn": unguided_step}
    sampler = fm.graphed(guided_step, BATCH, inputs={"features": features(0)}, **options)
    for seed in range(3):
        manual_seed(seed)
        got = sampler(features=features(seed))
        manual_seed(seed)
        assert_equal(got, sampled(fm, velocity, {"features": features(seed)}, **GUIDED))


def test_a_step_fn_with_a_graph_of_its_own(monkeypatch):
    """It copies to its own static input, replays, and returns its own static output."""
    emulated(monkeypatch)
    fm = flow()
    own_x, own_t, own_f = torch.randn(BATCH, *DIMS), torch.zeros(BATCH, 1, 1), features(0)
    with capturing() as recorded:
        own_out = velocity(own_x, own_t, own_f)
    graph = Graph(recorded)

    def step_fn(x, t, features):
        own_x.copy_(x)
        own_t.copy_(t)
        own_f.copy_(features)
        graph.replay()
        return own_out

    sampler = fm.graphed(step_fn, BATCH, inputs={"features": features(0)})
    for seed in range(2):
        manual_seed(seed)
        got = sampler(features=features(seed))
        manual_seed(seed)
        assert_equal(got, sampled(fm, velocity, {"features": features(seed)}))


def test_a_step_function_with_inputs(monkeypatch):
    """The time in another form, and the number of the step, which is a constant of each evaluation."""
    emulated(monkeypatch)

    def model(x, t, step, features):
        assert t.shape == (BATCH,)
        return torch.sin(features * x + t.view(-1, 1, 1)) * 0.5**step

    fm = flow(int_method="heun")
    step_fn = StepFunction(model, time_as="batch", time_scale=1000)
    sampler = fm.graphed(step_fn, BATCH, inputs={"features": features(0)})
    for seed in range(2):
        manual_seed(seed)
        got = sampler(features=features(seed))

        f = features(seed)

        def bound(x, t, step, f=f):
            return model(x, t, step, f)

        manual_seed(seed)
        assert_equal(got, fm.sample(BATCH, StepFunction(bound, time_as="batch", time_scale=1000)))


def test_velocity_strength(monkeypatch):
    """It is copied in at each call; another shape is another graph."""
    emulated(monkeypatch)
    fm, strength = flow(), torch.rand(5, 1)
    sampler = fm.graphed(velocity, BATCH, inputs={"features": features(0)}, velocity_strength=strength)
    for seed in range(3):
        strength.mul_(0.5)
        check(sampler, fm, velocity, {"features": features(seed)}, seed=seed)
        check(sampler, fm, velocity, {"features": features(seed)}, seed=seed, velocity_strength=torch.rand(5, 1))
    assert sampler.stats.captures == 1
    check(sampler, fm, velocity, {"features": features(0)}, velocity_strength=torch.rand(BATCH, 5, 3))
    check(sampler, fm, velocity, {"features": features(0)}, velocity_strength=None)
    assert sampler.stats.captures == 3
    with pytest.raises(ValueError, match="velocity_strength multiplies"):
        sampler(features=features(0), int_method="ab2")
    with pytest.raises(TypeError, match="velocity_strength must be"):
        sampler(features=features(0), velocity_strength=0.5)


def test_inpaint(monkeypatch):
    """A constraint reads the tensors that it refers to at each replay."""
    emulated(monkeypatch)
    fm, noise, known = flow(), torch.randn(BATCH, *DIMS), torch.randn(BATCH, *DIMS)
    constraint = inpaint(known, torch.tensor([[True], [False], [True], [False], [False]]), noise)
    sampler = fm.graphed(velocity, BATCH, inputs={"features": features(0)}, constraint=constraint, noise=noise)
    for seed in range(3):
        noise.copy_(torch.randn(BATCH, *DIMS))
        known.copy_(torch.randn(BATCH, *DIMS))
        check(sampler, fm, velocity, {"features": features(seed)}, seed=seed)
    assert sampler.stats.captures == 1


def test_random_numbers_of_step_fn(monkeypatch):
    """By the default generator, and by one that is registered: both as in eager, from the first call on."""
    emulated(monkeypatch)
    fm, own = flow(), torch.Generator()

    def dropped(x, t, features):
        return torch.nn.functional.dropout(velocity(x, t, features), 0.5)

    def noisy(x, t, features):
        return velocity(x, t, features) + torch.randn(x.shape, generator=own)

    sampler = fm.graphed(dropped, BATCH, inputs={"features": features(0)})
    for seed in range(3):
        check(sampler, fm, dropped, {"features": features(seed)}, seed=seed)

    own.manual_seed(3)
    sampler = fm.graphed(noisy, BATCH, inputs={"features": features(0)}, generators=[own])
    got = [sampler(features=features(0), noise=torch.ones(BATCH, *DIMS)) for _ in range(2)]
    own.manual_seed(3)
    for one in got:
        assert_equal(one, sampled(fm, noisy, {"features": features(0)}, noise=torch.ones(BATCH, *DIMS)))
    assert not torch.equal(*got)
    with pytest.raises(GraphCaptureError, match=r"graphed\(generators="):
        fm.graphed(noisy, BATCH, inputs={"features": features(0)})


def test_compiled_step_fn(monkeypatch):
    emulated(monkeypatch)
    fm = flow()
    compiled = torch.compile(velocity, backend="eager", dynamic=False)
    sampler = fm.graphed(compiled, BATCH, inputs={"features": features(0)})
    for seed in range(2):
        check(sampler, fm, velocity, {"features": features(seed)}, seed=seed)


def test_a_cache_that_appends_and_crops(monkeypatch, capsys):
    """examples/graphed_policy.py: as an input with room it is right; else a graph replays that of its capture."""
    emulated(monkeypatch)
    path = Path(__file__).parent.parent / "examples" / "graphed_policy.py"
    runpy.run_path(str(path), run_name="__main__")
    assert "captures=1, replays=3" in capsys.readouterr().out

    example = runpy.run_path(str(path))
    policy, fm = example["Policy"]().eval(), FlowMatching((example["HORIZON"], example["ACTION"]))
    noise = torch.randn(1, example["HORIZON"], example["ACTION"])
    with torch.no_grad():
        first, second = torch.randn(2, 1, example["PREFIX"], example["WIDTH"])
        cache = policy.encode(first)
        sampler = fm.graphed(example["before"](policy, cache), 1)
        cache[:] = policy.encode(second)
        stale = sampler(noise=noise)
        for observation, equal in ((first, True), (second, False)):
            wanted = fm.sample(1, example["before"](policy, policy.encode(observation)), noise=noise)
            assert torch.equal(stale, wanted) is equal


# ---- what cannot be captured ----


def item(x, t, features):
    return velocity(x, t, features) * float(x.max().item() > 0)


def mask(x, t, features):
    return velocity(x, t, features) * (x[x > 0].numel() > 0)


def host(x, t, features):
    return velocity(x, t, features) * torch.tensor([2.0])


#: name -> (step_fn, what the error says to look for)
NOT_CAPTURABLE = {"item": (item, r"\.item\(\)"), "mask": (mask, r"x\[mask\]"), "host": (host, r"torch\.tensor\(")}


@pytest.mark.parametrize("name", NOT_CAPTURABLE)
def test_what_cannot_be_captured(monkeypatch, caplog, name):
    """An error that says what to look for; sample() and eager() run; fallback="eager" runs, and says so once."""
    emulated(monkeypatch)
    fm, (step_fn, hint) = flow(), NOT_CAPTURABLE[name]
    manual_seed(1)
    state = torch.random.get_rng_state()
    with pytest.raises(GraphCaptureError, match=hint) as raised:
        fm.graphed(step_fn, BATCH, inputs={"features": features(0)})
    assert raised.value.__cause__ is not None
    assert "fallback='eager'" in str(raised.value)
    assert torch.equal(state, torch.random.get_rng_state())
    with caplog.at_level(logging.WARNING, "flowmatch_kernels"):
        sampler = fm.graphed(step_fn, BATCH, inputs={"features": features(0)}, fallback="eager")
        for seed in range(3):
            check(sampler, fm, step_fn, {"features": features(seed)}, seed=seed)
    assert len(caplog.records) == 1
    captures, replays, eager, held = sampler.stats
    assert (captures, replays, held) == (0, 0, 0)
    ((reason, count),) = eager.items()
    assert count == 3 and "RuntimeError: " in reason

    sampler.fallback = "error"
    with pytest.raises(GraphCaptureError, match=hint):
        sampler(features=features(0))
    manual_seed(0)
    got = sampler.eager(features=features(0))
    manual_seed(0)
    assert_equal(got, sampled(fm, step_fn, {"features": features(0)}))


def test_graphs_survive_a_capture_that_fails(monkeypatch):
    """One signature cannot be captured: the graph of another goes on."""
    emulated(monkeypatch)
    fm = flow()

    def step_fn(x, t, features):
        return item(x, t, features) if x.shape[0] == 2 else velocity(x, t, features)

    sampler = fm.graphed(step_fn, BATCH, inputs={"features": features(0)[:1]}, max_graphs=1)
    with pytest.raises(GraphCaptureError):
        sampler(features=features(0)[:1], batch_size=2)
    check(sampler, fm, step_fn, {"features": features(1)[:1]})
    sampler.fallback = "eager"
    check(sampler, fm, step_fn, {"features": features(1)[:1]}, batch_size=2)
    check(sampler, fm, step_fn, {"features": features(2)[:1]})
    assert sampler.stats[:2] == (1, 2) and sampler.stats.graphs == 1


def test_what_eager_raises_a_graph_raises(monkeypatch):
    """An error of step_fn's own, and of sample()'s checks, passes through as it is; the sampler is usable after."""
    emulated(monkeypatch)
    fm = flow()

    class MyError(Exception):
        pass

    def step_fn(x, t, features):
        if x.shape[0] == 3:
            raise MyError
        return velocity(x, t, features)[:, :2] if x.shape[0] == 2 else velocity(x, t, features)

    sampler = fm.graphed(step_fn, BATCH, inputs={"features": features(0)[:1]}, fallback="eager")
    state = torch.random.get_rng_state()
    with pytest.raises(MyError):
        sampler(features=features(0)[:1], batch_size=3)
    with pytest.raises(ValueError, match="step_fn returned a tensor of shape"):
        sampler(features=features(0)[:1], batch_size=2)
    assert torch.equal(state, torch.random.get_rng_state())
    check(sampler, fm, step_fn, {"features": features(0)[:1]})


def memory_error(self, function):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_is_what_it_is(monkeypatch):
    emulated(monkeypatch)
    monkeypatch.setattr("emulated_graph.EmulatedGraphs.capture", memory_error)
    with pytest.raises(torch.OutOfMemoryError):
        flow().graphed(velocity, BATCH, inputs={"features": features(0)}, fallback="eager")


F = features(0)
#: (arguments of graphed(), error, message)
BAD = [
    ({"step_fn": None}, TypeError, "step_fn must be callable"),
    ({"inputs": [F]}, TypeError, "inputs must be a dict"),
    ({"inputs": {"x": F}}, ValueError, "cannot be named 'x'"),
    ({"inputs": {"noise": F}}, ValueError, "cannot be named 'noise'"),
    ({"inputs": {"callback": F}}, ValueError, "cannot be named 'callback'"),
    ({"inputs": {"a b": F}}, TypeError, "named by identifiers"),
    ({"inputs": {1: F}}, TypeError, "named by identifiers"),
    ({"inputs": {"features": object()}}, TypeError, "pass the tensors that it holds"),
    ({"inputs": {"features": F.to("meta")}}, ValueError, "an input or velocity_strength is on meta"),
    ({"inputs": {"features": F.to_sparse()}}, TypeError, "dense"),
    ({"inputs": {"features": F.numpy()}}, TypeError, "inputs must hold tensors"),
    ({"max_graphs": 0}, ValueError, "max_graphs must be at least 1"),
    ({"max_graphs": 1.5}, TypeError, "max_graphs must be an int"),
    ({"copy_output": 1}, TypeError, "copy_output must be True or False"),
    ({"fallback": "none"}, ValueError, "fallback must be 'error' or 'eager'"),
    ({"module": velocity}, TypeError, "module must be a torch.nn.Module"),
    ({"generators": torch.Generator()}, TypeError, "generators must be a list"),
    ({"device": "nowhere"}, ValueError, "device must name a device"),
    ({"batch_size": -1}, ValueError, "batch_size must not be negative"),
    ({"callback": lambda step, t, x: None}, ValueError, "callback cannot be used in a graph"),
    ({"progress": True}, ValueError, "progress cannot be used in a graph"),
    ({"differentiable": True}, ValueError, "differentiable cannot be used in a graph"),
    ({"step_noise": KeyedNoise(1)}, ValueError, "step_noise is for steps that add noise"),
    ({"return_log_prob": True}, ValueError, "return_log_prob is for steps that add noise"),
    ({"int_method_options": {"eta": 0.5}}, TypeError, "'euler' takes no options, got 'eta'"),
    ({"int_method": "renoise", "return_log_prob": True}, ValueError, r"steps \[3\] add no noise"),
    ({"tepmerature": 1.0}, TypeError, "'tepmerature' is neither an input"),
    ({"int_method": "oiler"}, ValueError, "oiler"),
    ({"time_steps": [0.0, 0.0]}, ValueError, "strictly monotonic"),
    ({"temperature": float("inf")}, ValueError, "temperature must be finite"),
    ({"temperature": 1e300}, ValueError, "float32 can hold"),
    ({"noise": torch.zeros(2)}, ValueError, "noise must be"),
    ({"noise": torch.zeros(BATCH, *DIMS, requires_grad=True)}, ValueError, "noise requires grad"),
    ({"noise": torch.zeros(BATCH, *DIMS).to("meta")}, ValueError, "noise is on meta"),
    ({"noise": [KeyedNoise(1)]}, ValueError, "an entry for each sample"),
    ({"noise": KeyedNoise(1), "generator": torch.Generator()}, ValueError, "leave one of them out"),
    ({"generator": 3}, TypeError, "generator must be"),
    ({"dtype": torch.int32}, TypeError, "dtype must be"),
    ({"use_classifier_free_guidance": True}, ValueError, "unguided_step_fn is required"),
    ({"backend": "none"}, ValueError, "unknown backend"),
    ({"constraint": 3}, TypeError, "constraint must be callable"),
    ({"return_all_steps": 3}, TypeError, "return_all_steps must be"),
    ({"velocity_strength": torch.ones(3), "int_method": "heun"}, ValueError, "velocity_strength multiplies"),
]


@pytest.mark.parametrize("emulate", [True, False], ids=["graph", "cpu"])
def test_bad_arguments(monkeypatch, emulate):
    """The same errors where graphs are and where they are not; what is not known before a sample() runs, then."""
    if emulate:
        emulated(monkeypatch)
    fm = flow()
    for bad, error, message in BAD:
        arguments = {"step_fn": velocity, "batch_size": BATCH, "inputs": {"features": F}} | bad
        state = torch.random.get_rng_state()
        with pytest.raises(error, match=message):
            fm.graphed(**arguments)(features=F)
        assert torch.equal(state, torch.random.get_rng_state()), f"{bad}: something was drawn"


@pytest.mark.parametrize("emulate", [True, False], ids=["graph", "cpu"])
def test_bad_calls(monkeypatch, emulate):
    if emulate:
        emulated(monkeypatch)
    fm = flow()
    sampler = fm.graphed(velocity, BATCH, inputs={"features": F})
    for named, error, message in [
        ({}, TypeError, "the input 'features' is missing"),
        ({"features": F, "feature": F}, TypeError, "'feature' is neither an input"),
        ({"features": F, "callback": print}, ValueError, "callback cannot be used"),
        ({"features": F, "batch_size": 1.5}, TypeError, "batch_size must be an int"),
        ({"features": F, "copy_output": None, "noise": 3}, TypeError, "noise must be a tensor"),
        ({"features": F.to("meta")}, ValueError, "an input or velocity_strength is on meta"),
        ({"features": F, "noise": Subclass(torch.zeros(BATCH, *DIMS))}, TypeError, "noise must be a plain tensor"),
        ({"features": Subclass(F)}, TypeError, "inputs must be plain tensors"),
    ]:
        with pytest.raises(error, match=message):
            sampler(**named)
    check(sampler, fm, velocity, {"features": F})


class Subclass(torch.Tensor):
    def __new__(cls, x):
        return x.as_subclass(cls)


def test_where_a_graph_cannot_be_used(monkeypatch):
    """Within its own step_fn, another capture, a compiler, a transform: an error, and no stale buffer."""
    emulated(monkeypatch)
    fm, calls = flow(), []

    def recursive(x, t, features):
        if calls:
            calls[0](features=features)
        return velocity(x, t, features)

    sampler = fm.graphed(recursive, BATCH, inputs={"features": F})
    calls.append(sampler)
    sampler.reset()
    with pytest.raises(RuntimeError, match="step_fn calls the graphed sampler"):
        sampler(features=F)
    calls.clear()
    check(sampler, fm, velocity, {"features": F})
    with capturing(), pytest.raises(RuntimeError, match="capture of another graph"):
        sampler(features=F)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda f: sampler(features=f))(F[None])
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.jvp(lambda f: sampler(features=f), (F,), (F,))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"torch\.compile"):
        sampler(features=F)


def test_a_subclass(monkeypatch):
    """Alpamayo's FlowMatching, whose sample() has its own arguments: what is captured is that one."""
    emulated(monkeypatch)
    fm = alpamayo.FlowMatching(x_dims=DIMS, num_inference_steps=4)
    sampler = fm.graphed(velocity, BATCH, inputs={"features": F}, **GUIDED)
    for seed in range(2):
        check(sampler, fm, velocity, {"features": features(seed)}, seed=seed)
    assert sampler.stats[:2] == (1, 2)


# ---- without CUDA ----


def test_on_meta():
    """Another device that has no graphs: shapes alone."""
    sampler = flow().graphed(velocity, BATCH, "meta", inputs={"features": F.to("meta")}, return_all_steps=True)
    assert [x.shape for x in sampler(features=F.to("meta"))] == [(BATCH, 5, *DIMS), (5,)]


def test_on_the_cpu():
    """It runs sample(): the same results, options, checks and statistics; no graph."""
    for name, (constructor, options) in CASES.items():
        fm = flow(**constructor)
        step_fn = both if options.get("combined_guidance") else velocity
        sampler = fm.graphed(step_fn, BATCH, inputs={"features": F}, fallback="error", **options)
        for seed in range(2):
            got = check(sampler, fm, step_fn, {"features": features(seed)}, name, seed)
        x = got[0] if isinstance(got, tuple) else got
        kept = x.clone()
        sampler(features=features(3), noise=torch.zeros(BATCH, *DIMS, dtype=options.get("dtype")))
        assert torch.equal(x, kept)
        assert sampler.stats == (0, 0, {"cpu has no CUDA graphs": 3}, 0)
    for source in SOURCES.values():
        check(flow().graphed(velocity, BATCH, inputs={"features": F}), flow(), velocity, {"features": F}, **source)
    sampler.reset()


def test_threads(monkeypatch):
    """One replay at a time: each thread gets the results of its own inputs."""
    emulated(monkeypatch)
    fm = flow()
    sampler = fm.graphed(velocity, BATCH, inputs={"features": F}, max_graphs=2)
    noise = torch.randn(BATCH, *DIMS)
    wanted = [sampled(fm, velocity, {"features": features(k)}, noise=noise) for k in range(4)]
    wrong = []

    def work(k):
        for _ in range(15):
            if not torch.equal(sampler(features=features(k), noise=noise), wanted[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sampler.stats[:2] == (2, 60) or sampler.stats[:2] == (1, 60)


# ---- nothing between two evaluations ----


@pytest.mark.parametrize("case", ["euler", "guided", "trajectory", "ab3"])
def test_one_launch_between_two_evaluations(monkeypatch, case):
    """Of what is recorded between the calls of step_fn, memory apart, there is the step and nothing else."""
    emulated(monkeypatch)
    options = {"guided": GUIDED, "trajectory": {"return_all_steps": True}}.get(case, {})
    fm = flow(int_method="ab3" if case == "ab3" else "euler")
    marks = []

    def step_fn(x, t, features):
        marks.append(len(recorded().operators))
        v = velocity(x, t, features)
        marks.append(len(recorded().operators))
        return v

    def recorded():
        found = torch.utils._python_dispatch._get_current_dispatch_mode()
        return found if found is not None else type("none", (), {"operators": []})

    if case == "guided":
        options = GUIDED | {"unguided_step_fn": step_fn}
    sampler = fm.graphed(step_fn, BATCH, inputs={"features": F}, **options)
    names = sampler._recorder.last.recorded.names()
    marks = [mark for mark in marks if mark]
    calls = fm.nfe(guided=case == "guided")
    assert len(marks) == 2 * calls
    for k, (after, before) in enumerate(zip(marks[1:-1:2], marks[2::2], strict=True)):
        launched = [name for name in names[after:before] if "empty" not in name and "detach" not in name]
        if case == "guided":  # two calls of the models, and a copy of the first velocity until they are seen apart
            wanted = ["flowmatch_kernels.fused_step_.default"] if k % 2 else ["aten.clone.default"] * (k == 0)
        else:
            wanted = ["flowmatch_kernels.fused_step_.default"]
        assert launched == wanted, f"after call {k}: {launched}"


def test_nothing_between_two_evaluations_on_the_cpu(monkeypatch):
    """A mode that raises: the rows of the CPU's own backend call no operator at all, and allocate nothing by it."""

    class Nothing(torch.utils._python_dispatch.TorchDispatchMode):
        within = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert self.within or self.calls in (0, 4), f"{func} between two evaluations"
            return func(*args, **(kwargs or {}))

        calls = 0

    mode = Nothing()

    def step_fn(x, t):
        mode.within, mode.calls = 1, mode.calls + 1
        v = torch.sin(x) * t
        mode.within = 0
        return v

    fm, noise = flow(), torch.randn(BATCH, *DIMS)
    wanted = fm.sample(BATCH, lambda x, t: torch.sin(x) * t, noise=noise, backend="cpu")
    monkeypatch.setattr(tracing, "is_eager", lambda: True)
    with mode:
        got = fm.sample(BATCH, step_fn, noise=noise, backend="cpu")
    assert mode.calls == 4
    assert_equal(got, wanted)


# ---- CudaGraphs, with doubles of torch.cuda ----


class Cuda:
    """torch.cuda as far as graphs.CudaGraphs calls it: it notes what was done where."""

    def __init__(self):
        self.log, self.stream, self.device_ = [], "default", 0
        self.pools, self.end_raises = 0, False

    def patch(self, monkeypatch):
        cuda = self

        class Stream:
            def __init__(self, device):
                self.name = f"side of {device}"

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {getattr(other, 'name', other)}")

        class Named(str):
            name = property(lambda self: str(self))

            def wait_stream(self, other):
                cuda.log.append(f"{self} waits for {other.name}")

        class Within:
            def __init__(self, attribute, value):
                self.attribute, self.value = attribute, value

            def __enter__(self):
                self.before = getattr(cuda, self.attribute)
                setattr(cuda, self.attribute, self.value)

            def __exit__(self, *_):
                setattr(cuda, self.attribute, self.before)

        class Graph:
            def register_generator_state(self, generator):
                cuda.log.append("registered")

            def reset(self):
                cuda.log.append("reset")

        class Capture:
            """As torch.cuda.graph: where the end of a capture raises, its stream stays the current one."""

            def __init__(self, graph, pool, stream, capture_error_mode):
                cuda.log.append(f"capture in {pool}, {capture_error_mode}")
                self.stream = stream

            def __enter__(self):
                self.before, cuda.stream = cuda.stream, self.stream

            def __exit__(self, *_):
                if cuda.end_raises:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                cuda.stream = self.before

        def pool():
            cuda.pools += 1
            return f"pool {cuda.pools}"

        cuda.named = Named
        cuda.stream = Named("default")
        for name, value in {
            "device": lambda device: Within("device_", device),
            "stream": lambda stream: Within("stream", stream),
            "current_stream": lambda *_: cuda.stream,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": Capture,
            "graph_pool_handle": pool,
            "synchronize": lambda device: cuda.log.append(f"synchronized {device}"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return self


def test_cuda_graphs(monkeypatch):
    """Device, streams, error mode, pool: what is called, in which order, also where a capture breaks."""
    cuda = Cuda().patch(monkeypatch)
    device = torch.device("cuda", 1)
    recorder = graphs.recorder(device, [object()])

    def function():
        cuda.log.append(f"run on {getattr(cuda.stream, 'name', cuda.stream)}, device {cuda.device_}")
        return "results"

    with recorder.current():
        assert cuda.device_ == device
        recorder.warm_up(function)
        assert recorder.capture(function)[0] == "results"
        first = recorder.capture(function)[1]
    run = "run on side of cuda:1, device cuda:1"
    capture = ["registered", "capture in pool 1, thread_local", run]
    assert cuda.log == [
        *("side of cuda:1 waits for default", run, run, "default waits for side of cuda:1"),
        *(capture * 2),
    ]
    assert (cuda.stream, cuda.device_) == ("default", 0)

    cuda.log.clear()
    cuda.end_raises = True

    def broken():
        raise ValueError("operation not permitted")

    with recorder.current(), pytest.raises(ValueError, match="not permitted") as raised:
        recorder.capture(broken)  # the first error is the one to know, and not what the end of the capture raises
    assert "previous error" in str(raised.value.__cause__)
    with recorder.current(), pytest.raises(RuntimeError, match="previous error"):
        recorder.capture(function)
    assert (cuda.stream, cuda.device_) == ("default", 0)
    cuda.end_raises = False
    with recorder.current():
        recorder.capture(function)
    assert cuda.log[-2] == "capture in pool 3, thread_local"

    cuda.log.clear()
    recorder.drop([first])
    assert cuda.log == ["synchronized cuda:1", "reset"]


def test_streams_wait_for_the_call_before(monkeypatch):
    """Only where it was on another stream: its replay may still read the buffers that this one writes."""
    cuda = Cuda().patch(monkeypatch)
    recorder = graphs.CudaGraphs(torch.device("cuda", 0), [])
    for name in ("a", "a", "b", "b", "a"):
        cuda.stream = cuda.named(name)
        with recorder.current():
            pass
    assert cuda.log == ["b waits for a", "a waits for b"]


@pytest.mark.parametrize(
    "text, hint",
    [
        ("CUDA error: operation not permitted when stream is capturing", r"\.item\(\)"),
        ("Attempt to increase offset for a CUDA generator not in capture mode", r"generators="),
        ("Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned", "host"),
        ("CUDA error: unjoined work", "another stream"),
        ("something new", "reduce-overhead"),
    ],
)
def test_hints(monkeypatch, text, hint):
    emulated(monkeypatch)

    def capture(self, function):
        raise RuntimeError(text) from RuntimeError("CUDA error: operation failed due to a previous error")

    monkeypatch.setattr("emulated_graph.EmulatedGraphs.capture", capture)
    with pytest.raises(GraphCaptureError, match=hint) as raised:
        flow().graphed(velocity, BATCH, inputs={"features": F})
    assert text in str(raised.value)


# ---- on fake CUDA tensors ----


class FakeGraphs(graphs.CudaGraphs):
    """Runs the function at a capture and does nothing at a replay, on fake CUDA tensors."""

    def current(self):
        return contextlib.nullcontext()

    def warm_up(self, function):
        function()

    def capture(self, function):
        with Refused() as refused:
            results = function()
        assert refused.seen == []
        return results, type("Graph", (), {"replay": lambda self: None})()


@pytest.mark.parametrize("case", ["solver euler", "solver ab3", "guided", "trajectory", "temperature"])
@pytest.mark.parametrize("keyed", [False, True], ids=["noise", "keyed"])
def test_nothing_that_a_capture_refuses_and_no_wait(monkeypatch, case, keyed):
    """In the capture no copy from the host and no read; and in a call, once its table is there, neither."""
    monkeypatch.setattr(graphs, "recorder", FakeGraphs)
    monkeypatch.setattr(graphs.GraphedSampler, "_drawn_from", lambda self: [])
    # Tensor.copy_ itself asks for the device, even of a fake tensor.
    monkeypatch.setattr(Tensor, "copy_", lambda x, y, non_blocking=False: aten.copy_.default(x, y, non_blocking))
    with FakeTensorMode():
        monkeypatch.setattr(FlowMatching, "_table", functools.cache(FlowMatching._table))  # in the place of its cache
        f = torch.ones(BATCH, 1, 3, device="cuda")
        noise = KeyedNoise(3) if keyed else torch.ones(BATCH, *DIMS, device="cuda")
        constructor, options = CASES[case]
        options = options | {"noise": noise}
        sampler = flow(**constructor).graphed(velocity, BATCH, "cuda", inputs={"features": f}, **options)
        with Refused() as refused:
            x = sampler(features=f)
            sampler(features=f, noise=KeyedNoise(4) if keyed else noise, temperature=0.25)
    assert refused.seen == []
    assert (x[0] if isinstance(x, tuple) else x).device.type == "cuda"
    assert sampler.stats.captures == (2 if keyed and "temperature" not in options else 1)
