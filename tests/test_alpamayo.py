"""Ours in the place of the sampler of Alpamayo R1, 1.5 and 2: one line, the same bits.

Runs with their packages where they are installed, else with the stand-ins of `alpamayo_packages`.
"""

import copy
import inspect
import pathlib
import sys
import warnings

import alpamayo_packages
import published
import pytest
import torch
from operands import assert_same_bits
from test_package import fresh

from flowmatch_kernels import flow_matching
from flowmatch_kernels.integrations import alpamayo
from flowmatch_kernels.integrations.alpamayo import FlowMatching

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "alpamayo.yaml"
GENERATIONS = tuple(alpamayo_packages.PACKAGES)


def field(x, t):
    return torch.sin(3 * x) + t


def other(x, t):
    return torch.cos(x) * t


@pytest.fixture(params=GENERATIONS)
def generation(request):
    return request.param


@pytest.fixture
def theirs(generation, monkeypatch):
    """The module of that generation that defines FlowMatching."""
    return alpamayo_packages.install(generation, monkeypatch)


def drawn(call):
    torch.manual_seed(3)
    return call()


def test_sample_by_keyword(theirs, backend):
    """As each generation's model calls it."""
    for settings in ({}, {"num_inference_steps": 7}):
        samplers = [cls(x_dims=[16, 2], **settings) for cls in (theirs.FlowMatching, FlowMatching)]
        samplers[1].backend = backend
        for extra in ({}, {"inference_step": 4}, {"inference_step": None, "int_method": None}):
            wanted, got = (
                drawn(lambda s=s, extra=extra: s.sample(batch_size=6, step_fn=field, device="cpu", **extra))
                for s in samplers
            )
            assert_same_bits(got, wanted)
        (wanted, wanted_times), (got, times) = (
            drawn(lambda s=s: s.sample(5, field, return_all_steps=True)) for s in samplers
        )
        assert_same_bits(got, wanted)
        assert_same_bits(times, wanted_times)


@pytest.mark.parametrize("generation", ["1.5", "2"])
def test_guidance_and_temperature(theirs):
    samplers = [
        cls(x_dims=(8, 2), inference_guidance_weight=1.7, use_classifier_free_guidance=True)
        for cls in (theirs.FlowMatching, FlowMatching)
    ]
    for extra in (
        {},
        {"temperature": 0.6},
        {"inference_guidance_weight": 0.3},
        {"use_classifier_free_guidance": False},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that unguided_step_fn is not called
            wanted, got = (
                drawn(lambda s=s, extra=extra: s.sample(batch_size=3, step_fn=field, unguided_step_fn=other, **extra))
                for s in samplers
            )
        assert_same_bits(got, wanted, str(extra))


@pytest.mark.parametrize("generation", ["1.5"])
def test_positional_order_of_1_5(theirs):
    """Of the constructor, and of sample(), where the third is a function or None."""
    samplers = [cls("euler", 6, 1.7, (8, 2), True) for cls in (theirs.FlowMatching, FlowMatching)]
    assert samplers[1].num_inference_steps == 6
    for arguments in (
        (other,),
        (other, "cpu"),
        (other, torch.device("cpu"), False, 4, "euler", True, 0.3, 0.8),
        (None, "cpu", False, 4, "euler", False),
    ):
        wanted, got = (drawn(lambda s=s, a=arguments: s.sample(3, field, *a)) for s in samplers)
        assert_same_bits(got, wanted, str(arguments))


@pytest.mark.parametrize("generation", ["R1", "2"])
def test_positional_order_of_r1_and_2(theirs):
    samplers = [cls(x_dims=(8, 2)) for cls in (theirs.FlowMatching, FlowMatching)]
    for arguments in ((), ("cpu",), (torch.device("cpu"), False, 4, "euler")):
        wanted, got = (drawn(lambda s=s, a=arguments: s.sample(3, field, *a)) for s in samplers)
        assert_same_bits(got, wanted, str(arguments))


def test_positional_arguments_that_cannot_be_meant():
    with pytest.raises(TypeError, match=r"'beta'.*R1 and 2"):
        FlowMatching("euler", "beta", 10, 0.1, 1.0, (8, 2))
    with pytest.raises(TypeError, match=r"x_dims is missing"):
        FlowMatching()
    fm = FlowMatching(x_dims=2)
    with pytest.raises(TypeError, match=r"device both by position and by name"):
        fm.sample(1, field, "cpu", device="cpu")
    with pytest.raises(ValueError, match=r"unguided_step_fn is required"):
        fm.sample(1, field, None, "cpu", False, 4, "euler", True)


def test_unknown_arguments_are_ignored_with_one_warning(generation, monkeypatch):
    """A checkpoint's configuration with keys of another version loads, as it does upstream."""
    theirs = alpamayo_packages.install(generation, monkeypatch)
    theirs.FlowMatching(x_dims=2, num_train_steps=5, sigma_min=0.0)
    with pytest.warns(UserWarning, match=r"FlowMatching does not know num_train_steps, sigma_min: ignored") as told:
        fm = FlowMatching(x_dims=2, num_train_steps=5, sigma_min=0.0)
    assert len(told) == 1
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match=r"sample\(\) does not know") as told:
        got = [drawn(lambda: fm.sample(2, field, "cpu", False, 4, "euler", 5, eta=1.0)) for _ in range(3)][-1]
    assert [str(one.message) for one in told] == [
        "sample() does not know the positional argument 5, eta: ignored, as Alpamayo's own sampler does"
    ]
    assert told[0].filename == __file__
    assert_same_bits(got, drawn(lambda: published.sample(2, field, (2,), 4)))
    # What only this package knows is known.
    fm = FlowMatching(x_dims=2, backend="reference", time_grid="shifted", time_grid_options={"shift": 3.0})
    assert fm.time_grid == "shifted"
    fm.sample(2, field, noise=torch.randn(2, 2))


def test_is_an_instance_of_their_base(theirs, generation):
    base = sys.modules[f"{alpamayo_packages.PACKAGES[generation]}.diffusion.base"].BaseDiffusion
    fm = FlowMatching(x_dims=2)
    assert isinstance(fm, base)
    assert isinstance(fm, flow_matching.FlowMatching)
    assert not isinstance(torch.nn.Linear(1, 1), base)


def test_imports_nothing():
    code = """
import sys, flowmatch_kernels
assert not [name for name in sys.modules if name.startswith("flowmatch_kernels.integrations")]
from flowmatch_kernels.integrations import alpamayo
fm = alpamayo.FlowMatching(x_dims=2)
fm.sample(1, lambda x, t: x)
print([name for name in sys.modules if name.startswith(("alpamayo", "hydra", "flowmatch_kernels.integrations."))])
"""
    loaded = "['flowmatch_kernels.integrations.replacement', 'flowmatch_kernels.integrations.alpamayo']\n"
    assert fresh(code) == loaded


def test_made_as_from_pretrained_makes_it():
    """Under a 16-bit default dtype and on the meta device; and cast with the model's modules."""
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            fm = FlowMatching(x_dims=(8, 2), num_inference_steps=5)
    finally:
        torch.set_default_dtype(torch.float32)
    fm = fm.to(dtype=torch.bfloat16).eval()
    assert not fm.state_dict()
    assert_same_bits(drawn(lambda: fm.sample(3, field)), drawn(lambda: published.sample(3, field, (8, 2), 5)))
    data = fm.construct_training_data(torch.randn(4, 8, 2))
    assert data["timesteps"].dtype == torch.float32


def test_accelerate_and_restore(theirs, generation):
    made = theirs.FlowMatching(x_dims=[8, 2], num_inference_steps=6)
    model = alpamayo_packages.model(generation, made).eval()
    names = [name for name, _ in model.named_modules()]
    wanted = drawn(lambda: model(3))
    assert alpamayo.accelerate(model) is model
    ours = model.expert.diffusion if generation == "2" else model.diffusion
    assert type(ours) is FlowMatching
    assert (ours.x_dims, ours.num_inference_steps, ours.int_method) == ([8, 2], 6, "euler")
    assert not ours.training
    assert [name for name, _ in model.named_modules()] == names
    assert_same_bits(drawn(lambda: model(3)), wanted)
    copied = alpamayo.restore(copy.deepcopy(model))
    assert_same_bits(drawn(lambda: copied(3)), wanted)

    alpamayo.accelerate(model, int_method="ab3", num_inference_steps=4)
    ours = model.expert.diffusion if generation == "2" else model.diffusion
    assert (ours.int_method, ours.num_inference_steps) == ("ab3", 4)
    assert alpamayo.restore(model) is model
    assert (model.expert.diffusion if generation == "2" else model.diffusion) is made
    assert alpamayo.restore(model) is model
    assert_same_bits(drawn(lambda: model(3)), wanted)


def test_accelerate_keeps_settings(theirs, generation):
    settings = {"num_inference_steps": 3, "inference_guidance_weight": 1.5}
    if generation != "R1":
        settings["use_classifier_free_guidance"] = True
    if generation != "1.5":
        settings |= {"train_timestep_sampler": "uniform", "train_ignore_guidance_rate": 0.3}
    model = alpamayo_packages.model(generation, theirs.FlowMatching(x_dims=2, **settings))
    alpamayo.accelerate(model, time_grid="shifted", time_grid_options={"shift": 2.0})
    ours = model.expert.diffusion if generation == "2" else model.diffusion
    assert {name: getattr(ours, name) for name in settings} == settings
    assert ours.time_grid == "shifted"


@pytest.mark.parametrize("generation", ["1.5"])
def test_accelerate_with_a_fitted_solver(theirs):
    """It brings its own number of steps."""
    solver = FlowMatching(x_dims=2).fit_solver(lambda x, t: torch.sin(4 * t) - x, evaluations=3, batch_size=64)
    model = alpamayo_packages.model("1.5", theirs.FlowMatching(x_dims=2))
    alpamayo.accelerate(model, int_method=solver)
    assert model.diffusion.nfe() == 3
    assert model(5).shape == (5, 2)


def test_accelerate_names_what_it_found(theirs, generation):
    with pytest.raises(TypeError, match=r"no sampler at model\.diffusion.*Sequential with the modules 0, 1"):
        alpamayo.accelerate(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU()))
    with pytest.raises(TypeError, match=r"found a builtins\.int with the modules none"):
        alpamayo.restore(3)

    class Own(theirs.FlowMatching):
        pass

    name = r"model\.expert\.diffusion" if generation == "2" else r"model\.diffusion"
    for sampler in (Own(x_dims=2), torch.nn.Linear(1, 1)):
        model = alpamayo_packages.model(generation, sampler)
        with pytest.raises(TypeError, match=rf"{name} is a .*\.{type(sampler).__name__}, and not one of alpamayo_r1"):
            alpamayo.accelerate(model)
    model = alpamayo_packages.model(generation, FlowMatching(x_dims=2))
    ours = model.expert.diffusion if generation == "2" else model.diffusion
    alpamayo.restore(alpamayo.accelerate(model))
    assert (model.expert.diffusion if generation == "2" else model.diffusion) is ours
    with pytest.raises(TypeError, match=r"is ours already: give int_method where it is made"):
        alpamayo.accelerate(model, int_method="ab3")


def test_patch(theirs, generation, monkeypatch):
    """Instances made later are ours, also by who imported the class by name; until it is undone."""
    user = type(sys)("a_user_of_alpamayo")
    user.FlowMatching = theirs.FlowMatching
    monkeypatch.setitem(sys.modules, user.__name__, user)
    before = theirs.FlowMatching
    with alpamayo.patch() as patched:
        assert theirs.FlowMatching is user.FlowMatching is FlowMatching
        assert {theirs.__name__, user.__name__} <= set(patched.modules)
        with alpamayo.patch():
            pass  # the inner one did nothing, and undoes nothing
        assert theirs.FlowMatching is FlowMatching
        later = type(sys)(f"{alpamayo_packages.PACKAGES[generation]}.later")
        later.FlowMatching = theirs.FlowMatching
        monkeypatch.setitem(sys.modules, later.__name__, later)
    assert theirs.FlowMatching is user.FlowMatching is later.FlowMatching is before
    assert alpamayo.FlowMatching is FlowMatching
    undo = alpamayo.patch()
    assert theirs.FlowMatching is FlowMatching
    undo.undo()
    undo.undo()
    assert theirs.FlowMatching is before


def test_patch_without_alpamayo(monkeypatch):
    monkeypatch.setattr(alpamayo, "is_installed", lambda package: False)
    with pytest.raises(ImportError, match=r"none of alpamayo_r1, alpamayo1_5, alpamayo2_super is installed"):
        alpamayo.patch()


def test_hydra_example(theirs):
    """The example's configuration, instantiated as Alpamayo's models do; and an unchanged one, under patch()."""
    import hydra.utils
    from omegaconf import OmegaConf

    config = OmegaConf.load(EXAMPLE).diffusion_cfg
    unchanged = OmegaConf.merge(config, {"_target_": f"{theirs.__name__}.FlowMatching"})
    ours = hydra.utils.instantiate(config, x_dims=(64, 2))
    assert type(ours) is FlowMatching
    assert ours.x_dims == [64, 2]
    wanted = drawn(lambda: hydra.utils.instantiate(unchanged, x_dims=(64, 2)).sample(batch_size=6, step_fn=field))
    assert_same_bits(drawn(lambda: ours.sample(batch_size=6, step_fn=field)), wanted)
    with alpamayo.patch():
        assert type(hydra.utils.instantiate(unchanged, x_dims=(64, 2))) is FlowMatching
    more = {"time_grid": "shifted", "time_grid_options": {"shift": 3.0}, "inference_guidance_weight": [1.0] * 10}
    more = OmegaConf.merge(config, more | {"use_classifier_free_guidance": True})
    hydra.utils.instantiate(more, x_dims=[64, 2]).sample(2, field, other)


class TestOfAlpamayo2:
    """What Alpamayo 2's own tests assert of its sampler."""

    def test_guidance_inside_the_sampler(self):
        """From zero noise, one step of w = 2 between the fields 0 and 1 ends at 2."""
        fm = FlowMatching(
            x_dims=[2], num_inference_steps=1, use_classifier_free_guidance=True, inference_guidance_weight=2.0
        )
        x = fm.sample(
            batch_size=1,
            step_fn=lambda *, x, t: torch.ones_like(x),
            unguided_step_fn=lambda *, x, t: torch.zeros_like(x),
            temperature=0.0,
        )
        torch.testing.assert_close(x, torch.tensor([[2.0, 2.0]]))

    def test_guidance_without_unguided_step_fn(self):
        fm = FlowMatching(x_dims=[2], use_classifier_free_guidance=True)
        with pytest.raises(ValueError, match="unguided_step_fn is required"):
            fm.sample(batch_size=1, step_fn=lambda *, x, t: torch.ones_like(x))

    def test_device_is_the_third_positional_argument(self):
        names = list(inspect.signature(FlowMatching.sample).parameters)
        assert names[:4] == ["self", "batch_size", "step_fn", "device"]


def test_compiles():
    fm = FlowMatching(x_dims=(8, 2), num_inference_steps=3)
    noise = torch.randn(4, 8, 2)
    compiled = torch.compile(lambda noise: fm.sample(4, field, noise=noise), fullgraph=True, backend="eager")
    assert_same_bits(compiled(noise), fm.sample(4, field, noise=noise))
