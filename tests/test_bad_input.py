"""Bad input raises the right exception before anything is drawn, and says what was got and what was wanted."""

import copy
import os
import re
import traceback
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from operands import same_bits

import flowmatch_kernels
from flowmatch_kernels import FittedSolver, FlowMatching, arguments, available_backends, inpaint

SHAPE = (4, 3, 2)
V = torch.zeros(SHAPE)


def good(x, t):
    return x * t


def module():
    return torch.nn.Identity()


GRID = torch.linspace(0, 1, 5)
CONSTRUCTOR = {
    "x_dims empty": ({"x_dims": []}, ValueError, ["x_dims", "positive", r"\[\]"]),
    "x_dims empty tuple": ({"x_dims": ()}, ValueError, ["x_dims", "positive", r"\(\)"]),
    "x_dims zero": ({"x_dims": 0}, ValueError, ["x_dims", "positive", "got 0"]),
    "x_dims holds zero": ({"x_dims": (3, 0)}, ValueError, ["x_dims", "positive", r"\(3, 0\)"]),
    "x_dims negative": ({"x_dims": (-1, 2)}, ValueError, ["x_dims", "positive", r"\(-1, 2\)"]),
    "x_dims float": ({"x_dims": 2.0}, TypeError, ["x_dims", "int", r"2\.0"]),
    "x_dims holds a float": ({"x_dims": (3, 2.5)}, TypeError, ["x_dims", "int", r"2\.5"]),
    "x_dims string": ({"x_dims": "64"}, TypeError, ["x_dims", "int", "'64'"]),
    "x_dims None": ({"x_dims": None}, TypeError, ["x_dims", "int", "None"]),
    "x_dims bool": ({"x_dims": True}, TypeError, ["x_dims", "int", "True"]),
    "x_dims holds None": ({"x_dims": (3, None)}, TypeError, ["x_dims", "int", "None"]),
    "num_inference_steps negative": (
        {"num_inference_steps": -1}, ValueError, ["num_inference_steps", "negative", "-1"]
    ),
    "num_inference_steps float": ({"num_inference_steps": 10.0}, TypeError, ["num_inference_steps", "int", "10"]),
    "num_inference_steps string": ({"num_inference_steps": "10"}, TypeError, ["num_inference_steps", "int", "10"]),
    "num_inference_steps bool": ({"num_inference_steps": True}, TypeError, ["num_inference_steps", "int", "True"]),
    "int_method": ({"int_method": "eulr"}, ValueError, ["^Invalid integration method: eulr", "known.*euler"]),
    "int_method None": ({"int_method": None}, ValueError, ["Invalid integration method: None", "euler"]),
    "sampler": ({"train_timestep_sampler": "normal"}, ValueError, ["train_timestep_sampler", "uniform", "normal"]),
    "guidance_form": (
        {"guidance_form": "cfg"}, ValueError,
        ["guidance_form 'cfg'", "known: interpolate, from_unguided, from_guided, extrapolate"],
    ),
    "guidance_form None": ({"guidance_form": None}, ValueError, ["guidance_form None", "known: interpolate"]),
    "guidance_form a list": ({"guidance_form": ["interpolate"]}, ValueError, ["guidance_form", "known: interpolate"]),
    "time_grid": (
        {"time_grid": "karras"}, ValueError, ["Invalid time grid: karras", "known: uniform, shifted, cosine, power"]
    ),
    "time_grid None": ({"time_grid": None}, ValueError, ["Invalid time grid: None", "known: uniform"]),
    "time_grid a tensor": ({"time_grid": torch.rand(3)}, ValueError, ["Invalid time grid: ", "known: uniform"]),
    "another grid's option": ({"time_grid": "cosine", "time_grid_options": {"shift": 3.0}}, TypeError, ["shift"]),
    "an option of no grid": ({"time_grid_options": {"shift": 3.0}}, TypeError, ["shift"]),
    "an option misspelt": ({"time_grid": "shifted", "time_grid_options": {"shfit": 3.0}}, TypeError, ["shfit"]),
    "an option that is an argument": (
        {"time_grid": "shifted", "time_grid_options": {"noise_at": 1}}, TypeError, ["noise_at"]
    ),
    "an option's value": (
        {"time_grid": "shifted", "time_grid_options": {"shift": -3.0}}, ValueError,
        ["shift", "greater than 0", r"-3\.0"],
    ),
    "an option's type": (
        {"time_grid": "power", "time_grid_options": {"power": "2"}}, TypeError, ["power must be a number", "'2'"]
    ),
    "options for a function": (
        {"time_grid": lambda n: GRID, "time_grid_options": {"shift": 3.0}}, ValueError,
        ["time_grid_options", "bind them"],
    ),
    "prediction_type": ({"prediction_type": "score"}, ValueError, ["'velocity', 'data' or 'noise'", "'score'"]),
    "prediction_type None": ({"prediction_type": None}, ValueError, ["'velocity', 'data' or 'noise'", "None"]),
    "noise_at": ({"noise_at": 2}, ValueError, ["noise_at must be 0 or 1", "got 2"]),
    "noise_at None": ({"noise_at": None}, ValueError, ["noise_at must be 0 or 1", "None"]),
    "noise_at 0.5": ({"noise_at": 0.5}, ValueError, ["noise_at must be 0 or 1", r"0\.5"]),
    "backend": ({"backend": "cudda"}, ValueError, ["cudda", "known: auto, triton, cuda, cpu, reference"]),
    "backend None": ({"backend": None}, ValueError, ["None", "known: auto"]),
    "keyword": ({"num_steps": 3}, TypeError, ["num_steps"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTOR)
def test_constructor(case):
    keywords, error, words = CONSTRUCTOR[case]
    with pytest.raises(error) as raised:
        FlowMatching(**({"x_dims": (3, 2)} | keywords))
    assert_says(raised, words)


def assert_says(raised, words):
    for word in words:
        assert re.search(word, str(raised.value)), f"{raised.value} does not say {word}"


GUIDED = {"use_classifier_free_guidance": True, "unguided_step_fn": good}
SAMPLE = {
    "batch_size negative": ({"batch_size": -1}, ValueError, ["batch_size", "negative", "-1"]),
    "batch_size float": ({"batch_size": 4.0}, TypeError, ["batch_size", "int", r"4\.0"]),
    "batch_size string": ({"batch_size": "4"}, TypeError, ["batch_size", "int", "'4'"]),
    "batch_size None": ({"batch_size": None}, TypeError, ["batch_size", "int", "None"]),
    "batch_size bool": ({"batch_size": True}, TypeError, ["batch_size", "int", "True"]),
    "inference_step negative": ({"inference_step": -1}, ValueError, ["inference_step", "negative", "-1"]),
    "inference_step float": ({"inference_step": 5.0}, TypeError, ["inference_step", "int", r"5\.0"]),
    "inference_step string": ({"inference_step": "5"}, TypeError, ["inference_step", "int", "'5'"]),
    "inference_step bool": ({"inference_step": False}, TypeError, ["inference_step", "int", "False"]),
    "int_method": ({"int_method": "NAME"}, ValueError, ["^Invalid integration method: NAME", "known.*euler"]),
    "int_method a list": ({"int_method": ["euler"]}, ValueError, [r"Invalid integration method: \['euler'\]"]),
    "int_method number": ({"int_method": 3}, ValueError, ["Invalid integration method: 3", "euler"]),
    "backend unknown": ({"backend": "vulkan"}, ValueError, ["vulkan", "known: auto, triton, cuda, cpu, ref"]),
    "backend unusable": ({"backend": "cuda"}, RuntimeError, ["'cuda'", "cannot be used", "cpu"]),
    "backend for another device": (
        {"backend": "cpu", "device": "meta"}, RuntimeError, ["'cpu'", "cannot be used", "serves cpu", "meta"]
    ),
    "device is a function": ({"device": good}, TypeError, ["device", "function", "unguided_step_fn="]),
    "device is a module": ({"device": module()}, TypeError, ["device", "unguided_step_fn="]),
    "step_fn missing": ({"step_fn": None}, TypeError, ["step_fn", "callable", "None"]),
    "step_fn a tensor": ({"step_fn": V}, TypeError, ["step_fn", "callable", "tensor"]),
    "guidance without unguided_step_fn": (
        {"use_classifier_free_guidance": True}, ValueError, ["unguided_step_fn", "required", "guidance"]
    ),
    "unguided_step_fn no function": (
        {"use_classifier_free_guidance": True, "unguided_step_fn": 3}, TypeError, ["unguided_step_fn", "callable", "3"]
    ),
    "weight string": (
        {"use_classifier_free_guidance": True, "unguided_step_fn": good, "inference_guidance_weight": "x"},
        TypeError, ["inference_guidance_weight", "number", "'x'"],
    ),
    "weights too few": (
        GUIDED | {"inference_guidance_weight": [1.5] * 9}, ValueError,
        ["inference_guidance_weight", "one for each of the 10 steps", "got 9 of them"],
    ),
    "weights too many": (
        GUIDED | {"inference_guidance_weight": torch.ones(5), "inference_step": 4}, ValueError,
        ["inference_guidance_weight", "each of the 4 steps", "got 5 of them"],
    ),
    "weights for each evaluation": (
        GUIDED | {"inference_guidance_weight": (1.5,) * 20, "int_method": "heun"}, ValueError,
        ["each of the 10 steps", "got 20 of them"],
    ),
    "weights for a grid": (
        GUIDED | {"inference_guidance_weight": (1.5,) * 5, "time_steps": GRID}, ValueError,
        ["each of the 4 steps", "got 5 of them"],
    ),
    "no weights": (GUIDED | {"inference_guidance_weight": []}, ValueError, ["each of the 10 steps", "got 0 of them"]),
    "weights that hold a string": (
        GUIDED | {"inference_guidance_weight": [1.5, "x"] * 5}, TypeError, [r"inference_guidance_weight\[1\]", "'x'"]
    ),
    "weights that hold None": (
        GUIDED | {"inference_guidance_weight": [None] * 10}, TypeError, [r"inference_guidance_weight\[0\]", "None"]
    ),
    "weights that hold tensors": (
        GUIDED | {"inference_guidance_weight": [torch.ones(2)] * 10}, TypeError, [r"inference_guidance_weight\[0\]"]
    ),
    "weights 2-D": (
        GUIDED | {"inference_guidance_weight": torch.ones(10, 4)}, ValueError,
        ["inference_guidance_weight", "each of the 4 samples", "got 10"],
    ),
    "weights 3-D": (
        GUIDED | {"inference_guidance_weight": torch.ones(4, 10, 1)}, ValueError,
        [r"inference_guidance_weight\[0\]", "each of the 3 entries of dimension 1", "got 10"],
    ),
    "weights 5-D": (
        GUIDED | {"inference_guidance_weight": torch.ones(4, 3, 2, 1, 1)}, ValueError,
        ["inference_guidance_weight", r"first sizes of the state \[4, 3, 2\]", "got 5 dimensions"],
    ),
    "weight bool": (
        GUIDED | {"inference_guidance_weight": True}, TypeError, ["inference_guidance_weight must be a number", "True"]
    ),
    "weight complex": (
        GUIDED | {"inference_guidance_weight": 1j}, TypeError, ["inference_guidance_weight must be a number", "1j"]
    ),
    "a function that returns None": (
        GUIDED | {"inference_guidance_weight": lambda t: None}, TypeError,
        [r"inference_guidance_weight\(t\) returned must be a number", "None"],
    ),
    "a function that returns a string": (
        GUIDED | {"inference_guidance_weight": str}, TypeError, [r"inference_guidance_weight\(t\) returned", "'0.0'"]
    ),
    "a function that returns a pair": (
        GUIDED | {"inference_guidance_weight": lambda t: (t, t)}, TypeError, [r"inference_guidance_weight\(t\)"]
    ),
    "guidance_form": (
        GUIDED | {"guidance_form": "cfg"}, ValueError,
        ["guidance_form 'cfg'", "known: interpolate, from_unguided, from_guided, extrapolate"],
    ),
    "combined_guidance without guidance": (
        {"combined_guidance": True}, ValueError, ["combined_guidance needs use_classifier_free_guidance=True"]
    ),
    "combined_guidance, guidance off": (
        {"combined_guidance": True, "use_classifier_free_guidance": False, "unguided_step_fn": good}, ValueError,
        ["combined_guidance needs use_classifier_free_guidance=True"],
    ),
    "combined_guidance and unguided_step_fn": (
        GUIDED | {"combined_guidance": True}, ValueError, ["combined_guidance", "unguided_step_fn", "pass one"]
    ),
    "combined_guidance and skip_irrelevant_model": (
        {"use_classifier_free_guidance": True, "combined_guidance": True, "skip_irrelevant_model": True}, ValueError,
        ["combined_guidance", "skip_irrelevant_model", "pass one"],
    ),
    "constraint": ({"constraint": V}, TypeError, ["constraint must be callable", "tensor"]),
    "constraint a string": ({"constraint": "clamp"}, TypeError, ["constraint must be callable", "'clamp'"]),
    "callback": ({"callback": 3}, TypeError, ["callback must be callable", "3"]),
    "callback True": ({"callback": True}, TypeError, ["callback must be callable", "True"]),
    "noise shape": ({"noise": torch.zeros(4, 2, 3)}, ValueError, ["noise", r"\[4, 3, 2\]", r"\[4, 2, 3\]"]),
    "noise batch": ({"noise": torch.zeros(1, 3, 2)}, ValueError, ["noise", r"\[4, 3, 2\]", r"\[1, 3, 2\]"]),
    "noise rank": ({"noise": torch.zeros(24)}, ValueError, ["noise", r"\[4, 3, 2\]", r"\[24\]"]),
    "noise integer": ({"noise": torch.zeros(SHAPE).long()}, TypeError, ["noise", "floating point", "int64"]),
    "noise bool": ({"noise": torch.zeros(SHAPE).bool()}, TypeError, ["noise", "floating point", "bool"]),
    "noise complex": ({"noise": torch.zeros(SHAPE) * 1j}, TypeError, ["noise", "floating point", "complex64"]),
    "noise a list": ({"noise": [1.0]}, TypeError, ["noise", "tensor", r"\[1\.0\]"]),
    "noise on another device": ({"noise": V.to("meta")}, ValueError, ["noise", "meta", "cpu"]),
    "noise float8": ({"noise": V.to(torch.float8_e4m3fn)}, TypeError, ["float32, float64", "float8"]),
    "dtype integer": ({"dtype": torch.int32}, TypeError, ["dtype", "float32, float64", "int32"]),
    "dtype a string": ({"dtype": "float32"}, TypeError, ["dtype", "float32, float64", "got"]),
    "temperature string": ({"temperature": "warm"}, TypeError, ["temperature", "number", "'warm'"]),
    "temperature None": ({"temperature": None}, TypeError, ["temperature", "number", "None"]),
    "temperature per sample": ({"temperature": torch.ones(4)}, TypeError, ["temperature", "number"]),
    "time_steps 2-D": ({"time_steps": GRID.expand(3, 5)}, ValueError, ["time_steps", "each of the 4 samples", "got 3"]),
    "time_steps 3-D": (
        {"time_steps": GRID.expand(4, 5, 5)}, ValueError,
        [r"time_steps\[0\]", "each of the 3 entries of dimension 1", "got 5"],
    ),
    "time_steps 5-D": (
        {"time_steps": GRID.expand(4, 3, 2, 1, 5)}, ValueError,
        ["time_steps", r"first sizes of the state \[4, 3, 2\]", "got 5 dimensions"],
    ),
    "time_steps 0-dim": ({"time_steps": torch.tensor(0.5)}, ValueError, ["time_steps", "1-D", r"\[\]"]),
    "time_steps too short": ({"time_steps": GRID[:1]}, ValueError, ["time_steps", "two or more", r"\[1\]"]),
    "time_steps empty": ({"time_steps": []}, ValueError, ["time_steps", "two or more", r"\[0\]"]),
    "time_steps not monotonic": (
        {"time_steps": [0.0, 0.5, 0.4, 1.0]}, ValueError, ["time_steps", "strictly monotonic", r"0\.5"]
    ),
    "time_steps repeated": ({"time_steps": [0.0, 0.5, 0.5]}, ValueError, ["time_steps", "strictly monotonic"]),
    "time_steps NaN": ({"time_steps": [0.0, float("nan"), 1.0]}, ValueError, ["time_steps", "NaN", "nan"]),
    "time_steps ends in NaN": ({"time_steps": [0.0, 1.0, float("nan")]}, ValueError, ["time_steps", "NaN"]),
    "time_steps integers": ({"time_steps": torch.arange(5)}, TypeError, ["time_steps", "floating", "int64"]),
    "time_steps and inference_step": (
        {"time_steps": GRID, "inference_step": 5}, ValueError, ["inference_step is 5", "5 entries", "4 steps"]
    ),
    "step_sizes long": ({"time_steps": GRID, "step_sizes": [0.1] * 5}, ValueError, ["step_sizes", "4", r"\[5\]"]),
    "step_sizes short": ({"step_sizes": [0.1] * 9}, ValueError, ["step_sizes", "10", r"\[9\]"]),
    "step_sizes 2-D": ({"step_sizes": torch.zeros(10, 1)}, ValueError, ["step_sizes", "4 samples", "got 10"]),
    "step_sizes integers": ({"step_sizes": torch.ones(10).int()}, TypeError, ["step_sizes", "floating", "int32"]),
    "keyword": ({"steps": 3}, TypeError, ["steps"]),
    "upstream's misspelt keyword": ({"return_all_step": True}, TypeError, ["return_all_step"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE)
def test_sample(case):
    keywords, error, words = SAMPLE[case]
    if case == "backend unusable" and available_backends()["cuda"] is None:
        keywords = {"backend": "cuda", "device": "cpu"}
    calls = []

    def step_fn(x, t):
        calls.append(x)
        return x

    fm = FlowMatching((3, 2))
    generator = torch.Generator().manual_seed(5)
    before = torch.get_rng_state(), generator.get_state()
    arguments = {"batch_size": 4, "step_fn": step_fn} | keywords
    for extra in ({}, {"generator": generator}, {"return_all_steps": True}):
        with pytest.raises(error) as raised:
            fm.sample(**(arguments | extra))
        assert_says(raised, words)
    assert torch.equal(before[0], torch.get_rng_state()), "noise was drawn before the arguments were checked"
    assert torch.equal(before[1], generator.get_state()), "noise was drawn before the arguments were checked"
    assert not calls, "step_fn was called before the arguments were checked"


RETURNED_GRIDS = {
    "too few": (lambda n: torch.linspace(0, 1, n), ValueError, ["10 entries for 10 steps", "wanted 11"]),
    "too many": (lambda n: torch.linspace(0, 1, n + 2), ValueError, ["12 entries for 10 steps", "wanted 11"]),
    "not monotonic": (lambda n: torch.linspace(0, 3, n + 1).sin(), ValueError, ["strictly monotonic"]),
    "repeated": (lambda n: torch.linspace(0, 1, n + 1).clamp(max=0.5), ValueError, ["strictly monotonic"]),
    "NaN": (lambda n: torch.linspace(0, 1, n + 1).log().log(), ValueError, ["NaN", "nan"]),
    "infinite": (lambda n: torch.linspace(0, 1, n + 1).log(), ValueError, ["finite", "inf"]),
    "2-D": (lambda n: torch.linspace(0, 1, n + 1)[None], ValueError, ["1-D", r"\[1, 11\]"]),
    "one entry": (lambda n: torch.zeros(1), ValueError, ["two or more", r"\[1\]"]),
    "integers": (lambda n: torch.arange(n + 1), TypeError, ["floating point", "int64"]),
    "None": (lambda n: None, TypeError, ["tensor or a sequence", "None"]),
    "a string": (lambda n: "uniform", TypeError, ["tensor or a sequence", "uniform"]),
}


@pytest.mark.parametrize("case", RETURNED_GRIDS)
def test_time_grid_returns(case):
    grid, error, words = RETURNED_GRIDS[case]
    before, calls = torch.get_rng_state(), []
    with pytest.raises(error) as raised:
        FlowMatching((3, 2), time_grid=grid).sample(4, lambda x, t: calls.append(x))
    assert_says(raised, ["time_grid returned", *words])
    assert torch.equal(before, torch.get_rng_state()) and not calls


def test_inference_step_with_a_grid_by_name():
    """inference_step= counts, time_steps= is counted."""
    for keywords in ({"time_grid": "shifted"}, {"time_grid": lambda n: 1 / 0}):
        with pytest.raises(ValueError, match=r"inference_step is 5, and time_steps has 5 entries, 4 steps"):
            FlowMatching((3, 2), **keywords).sample(4, good, inference_step=5, time_steps=GRID)
    with pytest.raises(ValueError, match=r"step_sizes must hold 3 entries"):
        FlowMatching((3, 2), time_grid="cosine").sample(4, good, inference_step=3, step_sizes=[0.1] * 10)


def test_guidance_from_the_constructor():
    fm = FlowMatching((3, 2), use_classifier_free_guidance=True)
    with pytest.raises(ValueError, match=r"unguided_step_fn is required"):
        fm.sample(4, good)
    assert fm.sample(4, good, use_classifier_free_guidance=False).shape == SHAPE


def test_the_order_of_alpamayo_15():
    """Alpamayo 1.5 takes unguided_step_fn third: said, not taken for a device."""
    with pytest.raises(TypeError, match=r"unguided_step_fn= by name"):
        FlowMatching((3, 2)).sample(4, good, good, "cpu")


def test_a_default_changed_afterwards():
    fm = FlowMatching((3, 2))
    fm.num_inference_steps = -3
    with pytest.raises(ValueError, match=r"num_inference_steps.*-3"):
        fm.sample(4, good)


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    before = torch.get_rng_state()
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install tqdm"):
        FlowMatching((3, 2)).sample(4, good, progress=True)
    assert torch.equal(before, torch.get_rng_state())


STATE = r"\[4, 3, 2\]"
RETURNED = {
    "None": (lambda: None, TypeError, ["None", STATE]),
    "a number": (lambda: 1.0, TypeError, ["1.0", "float", STATE]),
    "a tuple": (lambda: (V, V), TypeError, ["tuple", STATE]),
    "a list": (lambda: [1.0], TypeError, ["list", STATE]),
    "a dict": (lambda: {"v": V}, TypeError, ["dict", STATE]),
    "an array": (lambda: V.numpy(), TypeError, ["ndarray", STATE]),
    "the batch missing": (lambda: torch.zeros(6, 3, 2), ValueError, [r"\[6, 3, 2\]", STATE]),
    "transposed": (lambda: torch.zeros(4, 2, 3), ValueError, [r"\[4, 2, 3\]", STATE]),
    "flat": (lambda: torch.zeros(24), ValueError, [r"\[24\]", STATE]),
    "a rank more": (lambda: torch.zeros(1, 4, 3, 2), ValueError, [r"\[1, 4, 3, 2\]", STATE]),
    "enlarging": (lambda: torch.zeros(5, 4, 3, 2), ValueError, [r"\[5, 4, 3, 2\]", STATE]),
    "empty": (lambda: torch.zeros(0, 3, 2), ValueError, [r"\[0, 3, 2\]", STATE]),
    "another device": (lambda: V.to("meta"), ValueError, ["meta", "cpu"]),
    "int64": (lambda: V.long(), TypeError, ["int64", "float32"]),
    "bool": (lambda: V.bool(), TypeError, ["bool", "float32"]),
    "complex": (lambda: V * 1j, TypeError, ["complex64", "float32"]),
    "float64": (lambda: V.double(), TypeError, ["float64", "float32", "dtype=torch.float64", "cast"]),
    "float8": (lambda: V.to(torch.float8_e4m3fn), TypeError, ["float8", "cast"]),
    "sparse": (lambda: V.to_sparse(), TypeError, ["sparse", STATE]),
    "mkldnn": (lambda: V.to_mkldnn(), TypeError, ["mkldnn", STATE]),
}


@pytest.mark.parametrize("run", ["plain", "guided", "unguided", "trajectory"])
@pytest.mark.parametrize("when", [1, 3])
@pytest.mark.parametrize("returned", RETURNED)
def test_step_fn_returns(returned, when, run):
    """Named after the function that returned it; nothing is written, and the next sample() is right."""
    make, error, words = RETURNED[returned]
    states = []

    def step_fn(x, t):
        states.append((x, x.clone()))
        return make() if len(states) == when else x * t

    guided = run in ("guided", "unguided")
    fm = FlowMatching((3, 2))
    noise = torch.ones(SHAPE)
    keywords = {"return_all_steps": run == "trajectory", "use_classifier_free_guidance": guided}
    functions = (good, step_fn) if run == "unguided" else (step_fn, good)
    with pytest.raises(error) as raised:
        fm.sample(4, functions[0], noise=noise, unguided_step_fn=functions[1] if guided else None, **keywords)
    assert_says(raised, [*words, "unguided_step_fn returned" if run == "unguided" else "^step_fn returned"])
    assert len(states) == when
    for state, clone in states:
        assert same_bits(state, clone)
    assert (noise == 1).all()
    assert same_bits(fm.sample(4, good, noise=noise), FlowMatching((3, 2)).sample(4, good, noise=noise))


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("velocity", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_step_fn_widens_the_state(state, velocity):
    def run():
        return FlowMatching((3, 2)).sample(4, lambda x, t: x.to(velocity), dtype=state)

    if state == velocity:
        assert run().dtype == state
        return
    wider = str(torch.promote_types(state, velocity))
    with pytest.raises(TypeError, match=rf"{velocity}.*widen.*{state}.*pass dtype={wider}.*cast"):
        run()


def test_fake_tensor_out_of_its_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(SHAPE)
    for functions in ((lambda x, t: fake, good), (good, lambda x, t: fake)):
        for guided in (False, True):
            if functions[0] is good and not guided:
                continue
            keywords = {"unguided_step_fn": functions[1], "use_classifier_free_guidance": True} if guided else {}
            with pytest.raises((TypeError, AssertionError, RuntimeError), match=r"(?i)fake"):
                FlowMatching((3, 2)).sample(4, functions[0], **keywords)


# ---- one kind of bad value over every argument that takes such values ----


def never(x, t):
    raise AssertionError("step_fn was called before the arguments were checked")


def sample(**keywords):
    return FlowMatching((3, 2)).sample(**({"batch_size": 4, "step_fn": never} | keywords))


def guided(**keywords):
    return sample(**GUIDED, **keywords)


def fit(**keywords):
    return FlowMatching((3, 2)).fit_solver(**({"step_fn": never, "evaluations": 3, "batch_size": 16} | keywords))


def compare(**keywords):
    return FlowMatching((3, 2)).compare_solvers(**({"step_fn": never, "batch_size": 16} | keywords))


def batches(**own):
    return {"step_fn": None, "batches": [{"step_fn": never} | own]}


def changed(attribute, value, **keywords):
    """A sampler whose default was changed after it was made."""
    fm = FlowMatching((3, 2), **keywords)
    setattr(fm, attribute, value)
    return fm


def train(fm):
    return fm.construct_training_data(V)


NAN, INFINITE = float("nan"), float("inf")
HUGE, ENDLESS = 10**400, 10**5000  # too large for a float; more digits than Python prints
META = torch.ones((), device="meta")
TYPE = [b"1", bytearray(b"1"), memoryview(b"1"), "1", True, np.True_, torch.tensor(True), 1j, np.complex64(1), object()]
TYPE += [torch.ones(2, 2, 2, dtype=torch.bool), torch.tensor(1j), META, np.array("1"), {1}]
NOT_FINITE = [NAN, INFINITE, -INFINITE, HUGE, -HUGE, ENDLESS, Decimal("inf"), Fraction(HUGE), np.float32("nan")]
NOT_FINITE += [torch.tensor(NAN), torch.tensor(INFINITE, dtype=torch.bfloat16)]


def each(values, error):
    return [(value, error) for value in values]


FINITE = each(TYPE, TypeError) + each(NOT_FINITE, ValueError)
OUTSIDE = each([-0.1, 1.1, NAN, HUGE, torch.tensor(2.0), -1], ValueError)
COUNTS = each([*TYPE, 4.0, NAN, torch.tensor(4.0), [True]], TypeError) + each([-1, HUGE, -HUGE, ENDLESS], ValueError)
FLAGS = each(
    [0, 1, 1.0, "yes", "", b"1", np.True_, torch.tensor(True), [], [True], NAN, HUGE, ENDLESS, META], TypeError
)
NO_END = each([2, -1, 0.0, 1.0, NAN, True, False, None, "0", b"0", torch.tensor(True), [0], HUGE], ValueError)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that nested tensors and sparse rows are prototypes
    NESTED = [torch.nested.nested_tensor([V[0], V[1]], layout=layout) for layout in (torch.strided, torch.jagged)]
    NESTED_MASK = torch.nested.nested_tensor([V[0] > 0])
    SPARSE = [V.to_sparse(), V[0].to_sparse_csr(), V.to_mkldnn()]
TENSORS = [*SPARSE, *NESTED, [0.0], b"1", 0.0, True, V.long(), V * 1j]
DENSE = each(TENSORS, TypeError)
NOISE = [*DENSE, (V.to("meta"), ValueError)]
GONE = [name for name in ("cuda", "mps", "xpu", "hpu", "xla", "vulkan") if name not in str(torch._C._get_accelerator())]
DEVICES = each([*GONE, *map(torch.device, GONE), "cuda:99", torch.device("cuda", 99), "xpu:7"], RuntimeError)
DEVICES += each([b"cpu", 1.5, 3, True, V, [], object()], TypeError) + each(["", "gpu", "cpu:x", "cuda:-1"], ValueError)

# "entry point: argument that the message names".
KINDS = {
    "finite": (FINITE, {
        "sample: temperature": lambda value: sample(temperature=value),
        "sample with a noise: temperature": lambda value: sample(temperature=value, noise=V),
        "sample: inference_guidance_weight": lambda value: guided(inference_guidance_weight=value),
        "sample, each step: inference_guidance_weight[3]":
            lambda value: guided(inference_guidance_weight=[1.0] * 3 + [value] + [1.0] * 6),
        "sample, a function: inference_guidance_weight(t) returned":
            lambda value: guided(inference_guidance_weight=lambda t: value if t > 0.5 else 1.0),
        "constructor: inference_guidance_weight":
            lambda value: FlowMatching((3, 2), inference_guidance_weight=value),
        "constructor, each step: inference_guidance_weight[1]":
            lambda value: FlowMatching((3, 2), inference_guidance_weight=(1.5, value)),
        "changed: inference_guidance_weight":
            lambda value: changed("inference_guidance_weight", value).sample(4, never, **GUIDED),
        "shifted: shift": lambda value: FlowMatching(2, time_grid="shifted", time_grid_options={"shift": value}),
        "power: power": lambda value: FlowMatching(2, time_grid="power", time_grid_options={"power": value}),
        "fit_solver: held_out": lambda value: fit(held_out=value),
        "fit_solver: temperature": lambda value: fit(temperature=value),
        "fit_solver: inference_guidance_weight": lambda value: fit(**GUIDED, inference_guidance_weight=value),
        "compare_solvers: temperature": lambda value: compare(temperature=value),
        "compare_solvers: inference_guidance_weight": lambda value: compare(**GUIDED, inference_guidance_weight=value),
    }),
    "a fitted solver's numbers": (each(TYPE, TypeError) + each([NAN, INFINITE, -INFINITE, HUGE], ValueError), {
        "FittedSolver: times": lambda value: FittedSolver((0.0, value, 1.0), ((1.0, 0.5), (1.0, 0.5))),
        "FittedSolver: coefficients[1]": lambda value: FittedSolver((0.0, 0.5, 1.0), ((1.0, 0.5), (1.0, value))),
        "FittedSolver: errors": lambda value: FittedSolver((0.0, 1.0), ((1.0, 1.0),), errors={"fitted": value}),
    }),
    "share": (each(TYPE, TypeError) + OUTSIDE, {
        "constructor: train_ignore_guidance_rate": lambda value: FlowMatching(2, train_ignore_guidance_rate=value),
        "changed: train_ignore_guidance_rate": lambda value: train(changed("train_ignore_guidance_rate", value)),
    }),
    "count": (COUNTS, {
        "constructor: x_dims": lambda value: FlowMatching((value, 2)),
        "constructor: num_inference_steps": lambda value: FlowMatching(2, num_inference_steps=value),
        "changed: num_inference_steps": lambda value: changed("num_inference_steps", value).sample(4, never),
        "sample: batch_size": lambda value: sample(batch_size=value),
        "sample with a noise: batch_size": lambda value: sample(batch_size=value, noise=V),
        "sample: inference_step": lambda value: sample(inference_step=value),
        "nfe: inference_step": lambda value: FlowMatching(2).nfe(value),
        "fit_solver: evaluations": lambda value: fit(evaluations=[3, value]),
        "fit_solver: batch_size": lambda value: fit(batch_size=value),
        "a batch's: batch_size": lambda value: fit(**batches(batch_size=value)),
        "fit_solver: reference_steps": lambda value: fit(reference_steps=value),
        "fit_solver: search_grid": lambda value: fit(search_grid=value),
        "fit_solver: search_batches": lambda value: fit(search_batches=value),
        "compare_solvers: evaluations": lambda value: compare(evaluations=[3, value]),
        "compare_solvers: batch_size": lambda value: compare(batch_size=value),
        "compare_solvers: reference_steps": lambda value: compare(reference_steps=value),
    }),
    "bytes as a sequence": (each([b"\x03\x02", bytearray(b"\x03\x02"), memoryview(b"\x03\x02"), "32"], TypeError), {
        "constructor: x_dims": lambda value: FlowMatching(value),
        "constructor: inference_guidance_weight": lambda value: FlowMatching(2, inference_guidance_weight=value),
        "sample: inference_guidance_weight": lambda value: guided(inference_guidance_weight=value, inference_step=2),
        "fit_solver: evaluations": lambda value: fit(evaluations=value),
        "compare_solvers: evaluations": lambda value: compare(evaluations=value),
    }),
    "weights in a tensor": (
        each([torch.tensor([True, True]), torch.tensor([1j, 1j]), torch.ones(2).to_sparse(), torch.ones(2).to("meta"),
              np.array([True, True]), np.array(["1", "1"])], TypeError)
        + each([torch.tensor([1.0, NAN]), np.array([INFINITE, 1.0])], ValueError), {
        "constructor: inference_guidance_weight": lambda value: FlowMatching(2, inference_guidance_weight=value),
        "sample: inference_guidance_weight": lambda value: guided(inference_guidance_weight=value, inference_step=2),
        "fit_solver: inference_guidance_weight":
            lambda value: fit(**GUIDED, inference_guidance_weight=value, evaluations=2),
    }),
    "flag": (FLAGS, {
        "constructor: use_classifier_free_guidance": lambda value: FlowMatching(2, use_classifier_free_guidance=value),
        "changed: use_classifier_free_guidance":
            lambda value: changed("use_classifier_free_guidance", value).sample(4, never),
        "constructor: train_drop_guidance": lambda value: FlowMatching(2, train_drop_guidance=value),
        "constructor: euler_at_final": lambda value: FlowMatching(2, euler_at_final=value),
        "changed, training: train_drop_guidance": lambda value: train(changed("train_drop_guidance", value)),
        "sample: differentiable": lambda value: sample(differentiable=value),
        "changed, nfe: guided": lambda value: changed("use_classifier_free_guidance", value).nfe(),
        "sample: use_classifier_free_guidance":
            lambda value: sample(use_classifier_free_guidance=value, unguided_step_fn=never),
        "sample: return_all_steps": lambda value: sample(return_all_steps=value),
        "sample: skip_irrelevant_model": lambda value: sample(skip_irrelevant_model=value),
        "sample, guided: skip_irrelevant_model": lambda value: guided(skip_irrelevant_model=value),
        "sample: progress": lambda value: sample(progress=value),
        "nfe: guided": lambda value: FlowMatching(2).nfe(guided=value),
        "fit_solver: progress": lambda value: fit(progress=value),
        "fit_solver: use_classifier_free_guidance": lambda value: fit(use_classifier_free_guidance=value),
        "fit_solver: skip_irrelevant_model": lambda value: fit(skip_irrelevant_model=value),
        "compare_solvers: use_classifier_free_guidance": lambda value: compare(use_classifier_free_guidance=value),
        "compare_solvers: skip_irrelevant_model": lambda value: compare(skip_irrelevant_model=value),
    }),
    "order of two velocities": (
        [(value, ValueError if isinstance(value, str) else TypeError) for value, _ in FLAGS]
        + each(["Guided_first", "guided"], ValueError), {
        "sample: combined_guidance": lambda value: sample(combined_guidance=value),
        "sample, guided: combined_guidance": lambda value: guided(combined_guidance=value),
        "fit_solver: combined_guidance": lambda value: fit(combined_guidance=value),
        "compare_solvers: combined_guidance": lambda value: compare(combined_guidance=value),
    }),
    "end of time": (NO_END, {
        "constructor: noise_at": lambda value: FlowMatching(2, noise_at=value),
        "inpaint: noise_at": lambda value: inpaint(V, V > 0, V, value),
        "FittedSolver: noise_at": lambda value: FittedSolver((0.0, 1.0), ((1.0, 1.0),), noise_at=value),
    }),
    "noise": (NOISE, {
        "sample: noise": lambda value: sample(noise=value),
        "sample, dtype: noise": lambda value: sample(noise=value, dtype=torch.float32),
        "fit_solver: noise": lambda value: fit(noise=value, batch_size=4),
        "a batch's: noise": lambda value: fit(**batches(noise=value), batch_size=4),
        "compare_solvers: noise": lambda value: compare(noise=value, batch_size=4),
    }),
    "dense": (DENSE, {
        "inpaint: noise": lambda value: inpaint(V, V > 0, value),
        "inpaint: known": lambda value: inpaint(value, V > 0, V),
        "inpaint: mask": lambda value: inpaint(V, value, V),
        "construct_training_data: x": lambda value: FlowMatching((3, 2)).construct_training_data(value),
    }),
    "sparse mask": (each([(V > 0).to_sparse(), NESTED_MASK], TypeError), {
        "inpaint: mask": lambda value: inpaint(V, value, V),
    }),
    "device": (DEVICES, {
        "sample: device": lambda value: sample(device=value),
        "sample with a noise: device": lambda value: sample(device=value, noise=V),
        "fit_solver: device": lambda value: fit(device=value),
        "fit_solver: trajectory_device": lambda value: fit(trajectory_device=value),
        "compare_solvers: device": lambda value: compare(device=value),
    }),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_bad_values(kind):
    """Each raises one error of ours, which names the argument, and before anything is drawn or computed."""
    values, entries = KINDS[kind]
    before, wrong = torch.get_rng_state(), []
    for entry, call in entries.items():
        argument = entry.partition(": ")[2]
        for value, error in values:
            try:
                call(value)
                found = "accepted"
            except Exception as raised:  # whatever it is, it goes to the list
                last = traceback.extract_tb(raised.__traceback__)[-1].filename
                ours = last.startswith(os.path.dirname(flowmatch_kernels.__file__))
                found = f"{type(raised).__name__}: {raised}"
                if ours and type(raised) is error and argument in str(raised) and len(str(raised)) < 400:
                    continue
            wrong.append(f"{entry}, {arguments.shown(value)}, wanted {error.__name__}: {found:.200}")
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong])
    assert torch.equal(before, torch.get_rng_state()), "noise was drawn before the arguments were checked"


BEYOND_FLOAT32 = {
    "temperature": lambda value: {"temperature": value},
    "temperature, with a noise": lambda value: {"temperature": value, "noise": V},
    "inference_guidance_weight": lambda value: GUIDED | {"inference_guidance_weight": value},
    "inference_guidance_weight, each step": lambda value: GUIDED | {"inference_guidance_weight": [1.5] * 9 + [value]},
    "inference_guidance_weight(t) returned": lambda value: GUIDED | {"inference_guidance_weight": lambda t: value},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entry", BEYOND_FLOAT32)
def test_numbers_beyond_float32(entry, dtype):
    """They would become infinite, and the samples NaN."""
    before = torch.get_rng_state()
    for value in (1e39, -1e39, 3.4028236e38, 10**200):
        with pytest.raises(ValueError, match=rf"{re.escape(entry.partition(',')[0])} must be a number that float32"):
            sample(dtype=dtype, **BEYOND_FLOAT32[entry](value))
    assert torch.equal(before, torch.get_rng_state())


LARGE = {"x_dims": ((2**40, 2**40), 2), "batch_size": (2, 2**61), "both": ((2**30,), 2**31), "product": (2**32, 2**32)}


@pytest.mark.parametrize("case", LARGE)
def test_states_whose_bytes_overflow(case):
    """Where counted memory was asked for so many, the process ended. The reference leaves it to PyTorch."""
    x_dims, batch_size = LARGE[case]
    for all_steps in (False, True):
        with pytest.raises(ValueError, match="batch_size and x_dims make states that are too large"):
            FlowMatching(x_dims, backend="cpu").sample(batch_size, never, return_all_steps=all_steps)
        with pytest.raises(RuntimeError, match="overflow"):
            FlowMatching(x_dims, backend="reference").sample(batch_size, never, return_all_steps=all_steps)
    with pytest.raises(ValueError, match="batch_size and x_dims make states that are too large"):
        FlowMatching(2**30, backend="cpu").sample(2**28, never, return_all_steps=True)
    assert FlowMatching((2**40, 2**40), backend="cpu").sample(0, lambda x, t: x).shape == (0, 2**40, 2**40)


def test_good_values_of_every_kind():
    """What the checks let through, as before: numbers of other types, the ends, and flags that are bools."""
    noise = torch.ones(SHAPE)
    wanted = FlowMatching((3, 2), "euler", 4).sample(4, good, noise=noise, temperature=2.0)
    for two in (2, torch.tensor(2), torch.tensor(2.0), torch.tensor([2.0]), np.float32(2), np.int64(2), Fraction(2)):
        x = FlowMatching((3, np.int64(2)), "euler", torch.tensor(4)).sample(4, good, noise=noise, temperature=two)
        assert same_bits(x, wanted)
        FlowMatching(2, inference_guidance_weight=two, time_grid="shifted", time_grid_options={"shift": two})
    for rate in (0, 1, 0.0, 1.0, torch.tensor(0.5), np.float32(0.5)):
        fm = FlowMatching(torch.tensor(2), train_ignore_guidance_rate=rate, train_drop_guidance=True)
        assert fm.x_dims == [2] and fm.construct_training_data(V)["is_drop_guidance"].dtype == torch.bool
    for weight in (-3.0, 0, 3.4028235e38, [1.5] * 4, torch.ones(4), np.ones(4), lambda t: np.float64(t), range(4)):
        FlowMatching((3, 2), num_inference_steps=4, inference_guidance_weight=weight).sample(
            4, good, unguided_step_fn=good, use_classifier_free_guidance=True
        )
    x = FlowMatching((3, 2), num_inference_steps=1).sample(
        4, good, noise=noise.double(), temperature=1e39, inference_guidance_weight=1e39, **GUIDED
    )
    assert x.isfinite().all()  # float64 holds them
    for cpu in ("cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)):
        assert FlowMatching((3, 2)).sample(4, good, cpu, noise=V).device == torch.device("cpu")
    assert FlowMatching(2, noise_at=np.int64(1)).noise_at == 1


def test_reversed_arrays_are_taken():
    """NumPy's, of which torch makes no tensor over the same memory."""
    for up in (np.linspace(0, 1, 4, dtype=np.float32), np.linspace(0, 1, 8, dtype=np.float32).reshape(4, 2).T):
        down = up[..., ::-1]
        batch = 2 if down.ndim > 1 else 3
        x = torch.ones(batch, 2)
        fm = FlowMatching(2)
        got = fm.sample(batch, lambda x, t: x * t, noise=x, time_steps=down)
        wanted = fm.sample(batch, lambda x, t: x * t, noise=x, time_steps=torch.from_numpy(down.copy()))
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    with pytest.raises(TypeError, match="time_steps must be"):
        fm.sample(2, lambda x, t: x, time_steps="none")


def test_symbolic_numbers_stay_symbolic():
    """A compiled sample() of another temperature or weight is not compiled again; and its numbers are not checked."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    noise, fm = torch.ones(SHAPE), FlowMatching((3, 2), num_inference_steps=2)
    run = torch.compile(lambda z, w: fm.sample(4, good, noise=z, temperature=w), backend=counter, fullgraph=True)
    for k, temperature in enumerate((1.7, 2.5, 3.5, 4.5)):
        got = run(noise, temperature)
        assert same_bits(got, fm.sample(4, good, noise=noise, temperature=temperature))
        assert counter.frame_count == min(k + 1, 2)
    weighted = torch.compile(lambda z, w: fm.sample(4, good, noise=z, inference_guidance_weight=w, **GUIDED),
                             backend="eager", fullgraph=True)  # fmt: skip
    for weight in (1.7, 2.5, 3.5):
        wanted = fm.sample(4, good, noise=noise, inference_guidance_weight=weight, **GUIDED)
        assert same_bits(weighted(noise, weight), wanted)


def test_unguided_step_fn_without_guidance():
    """Said once for each sampler, by whichever of its methods; not where guidance is on, nor under a compiler."""
    words = r"unguided_step_fn is given and guidance is off.*use_classifier_free_guidance=True turns guidance on"
    for keywords in ({}, {"use_classifier_free_guidance": False}):
        fm = FlowMatching((3, 2))
        with pytest.warns(UserWarning, match=words) as told:
            fm.sample(4, good, unguided_step_fn=good, **keywords)
        for again in (fm, copy.copy(fm)):  # pytest makes a warning an error
            again.sample(4, good, unguided_step_fn=good, **keywords)
        assert len(told) == 1 and told[0].filename == __file__
    with pytest.warns(UserWarning, match=words) as told:
        FlowMatching((3, 2)).compare_solvers(lambda x, t: -x, 4, ["euler"], unguided_step_fn=good, batch_size=16)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FlowMatching((3, 2)).sample(4, good, **GUIDED)
        torch._dynamo.reset()
        fm = FlowMatching((3, 2))
        torch.compile(lambda z: fm.sample(4, good, noise=z, unguided_step_fn=good), backend="eager", fullgraph=True)(V)
    with pytest.raises(TypeError, match="unguided_step_fn must be callable, got 3"):
        FlowMatching((3, 2)).sample(4, good, unguided_step_fn=3)


@pytest.mark.parametrize("sampler", ["beta", "uniform"])
def test_training_under_fake_tensors(sampler):
    """A model is laid out without memory; and what was made there is not kept for real tensors."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    keywords = {"train_timestep_sampler": sampler, "train_drop_guidance": True}
    outside = FlowMatching((3, 2), **keywords)
    torch.manual_seed(1)
    outside.construct_training_data(V)
    with FakeTensorMode():
        inside = FlowMatching((3, 2), **keywords)
        for fm in (inside, outside):
            data = fm.construct_training_data(torch.zeros(SHAPE))
            shapes = {"x": SHAPE, "noisy_x": SHAPE, "timesteps": (4, 1, 1), "noise": SHAPE, "is_drop_guidance": (4,)}
            assert {name: tuple(tensor.shape) for name, tensor in data.items()} == shapes
            assert all(type(tensor) is FakeTensor for tensor in data.values())
        for grid in ("shifted", "cosine", "power"):
            FlowMatching(2, "dpmpp_2m", time_grid=grid, noise_at=1, prediction_type="data").nfe()
    torch.manual_seed(1)
    real = outside.construct_training_data(V)
    torch.manual_seed(1)
    assert same_bits(inside.construct_training_data(V)["noisy_x"], real["noisy_x"])
