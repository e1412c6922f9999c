"""sample() with each of its arguments, under what watches code: compilers, tracers, transforms, modes."""

import itertools
import warnings

import pytest
import torch
from operands import assert_same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from flowmatch_kernels import FittedSolver, FlowMatching, solvers, tracing
from flowmatch_kernels.ops import fused_step
from flowmatch_kernels.solvers import grid

GRID = [0.0, 0.1, 0.35, 0.8, 1.0]
FITTED = FittedSolver((0.0, 0.3, 0.7, 1.0), ((1.0, 0.3), (1.0, 0.5, -0.1), (0.9, 0.4, -0.1, 0.05)))


def velocity(x, t):
    return (torch.sin(x) * (1 - t)).to(x.dtype) - x


def unguided(x, t):
    return -x


def jumping(t):
    """A weight that Python must be able to branch on."""
    return 1.5 if t < 0.5 else 1 + t


def jump_from(weight):
    return lambda t: weight if t < 0.5 else t


def cases():
    """name -> (arguments of the constructor, arguments of sample())."""
    guided = {"use_classifier_free_guidance": True, "unguided_step_fn": unguided}
    made = {f"solver {name}": ({"int_method": name}, {}) for name in solvers.SOLVERS}
    made |= {
        "fitted": ({"int_method": FITTED}, {}),
        "euler at final": ({"int_method": "heun", "euler_at_final": True}, {}),
        "list": ({}, {"time_steps": GRID}),
        "tensor": ({}, {"time_steps": torch.tensor(GRID)}),
        "list, step sizes": ({}, {"time_steps": GRID, "step_sizes": [0.1, 0.2, 0.3, 0.4]}),
        "tensor, step sizes": ({}, {"time_steps": torch.tensor(GRID), "step_sizes": torch.full((4,), 0.3)}),
        "ab3, tensor": ({"int_method": "ab3"}, {"time_steps": torch.tensor(GRID)}),
        "dpmpp_2m, list": ({"int_method": "dpmpp_2m"}, {"time_steps": GRID}),
        "dpmpp_2m, tensor": ({"int_method": "dpmpp_2m"}, {"time_steps": torch.tensor(GRID)}),
        "function": ({"time_grid": lambda n: torch.linspace(0, 1, n + 1) ** 2}, {}),
        "function, list": ({"time_grid": lambda n: [(k / n) ** 2 for k in range(n + 1)]}, {}),
        "shifted": ({"time_grid": "shifted", "time_grid_options": {"shift": 2.0}}, {}),
        "noise_at": ({"noise_at": 1}, {}),
        "weight": ({}, guided | {"inference_guidance_weight": 1.5}),
        "weight, list": ({}, guided | {"inference_guidance_weight": [1.5, 1.2, 0.5, 2.0]}),
        "weight, tensor": ({}, guided | {"inference_guidance_weight": torch.tensor(1.5)}),
        "weight, function": ({"int_method": "midpoint"}, guided | {"inference_guidance_weight": jumping}),
        "weight, function, shifted": (
            {"time_grid": "shifted", "noise_at": 1},
            guided | {"inference_guidance_weight": jumping},
        ),
        **{
            f"weight, function, {name} at final": (
                {"int_method": name, "euler_at_final": True},
                guided | {"inference_guidance_weight": jumping},
            )
            for name in ("heun", "rk4", "rk4_classic")
        },
        "weight, function, list": ({}, guided | {"inference_guidance_weight": jumping, "time_steps": GRID}),
        "weight, function, fitted": ({"int_method": FITTED}, guided | {"inference_guidance_weight": jumping}),
        "data": ({"prediction_type": "data"}, {}),
        "data, ab2": ({"prediction_type": "data", "int_method": "ab2"}, {}),
        "noise": ({"prediction_type": "noise"}, {"time_steps": [0.001, 0.2, 0.5, 0.999]}),
        "noise, tensor": ({"prediction_type": "noise"}, {"time_steps": torch.tensor([0.001, 0.2, 0.5, 0.999])}),
        "temperature": ({}, {"temperature": 0.3}),
        "temperature, tensor": ({}, {"temperature": torch.tensor(0.3), "dtype": torch.bfloat16}),
        "constraint": ({}, {"constraint": lambda x, t: x.clamp(-1, 1)}),
        "callback": ({}, {"callback": lambda step, t, x: None}),
        "trajectory": ({}, {"return_all_steps": True}),
        "bfloat16": ({"int_method": "ab2"}, {"dtype": torch.bfloat16}),
    }
    return made


CASES = cases()


def sampler(case):
    """(sample as a function of the noise and of its arguments that are tensors, these arguments)."""
    constructor, arguments = CASES[case]
    fm = FlowMatching((3, 2), num_inference_steps=3 if constructor.get("int_method") is FITTED else 4, **constructor)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in arguments.items() if name not in tensors}

    def sample(noise, tensors):
        result = fm.sample(noise.shape[0], velocity, noise=noise, **others, **tensors)
        return result[0] if isinstance(result, tuple) else result

    return sample, tensors


def compiled(sample, noise, tensors):
    torch._dynamo.reset()
    return torch.compile(sample, fullgraph=True, backend="eager")(noise, tensors)


def fake(sample, noise, tensors):
    with FakeTensorMode() as mode:
        return sample(mode.from_tensor(noise), {name: mode.from_tensor(value) for name, value in tensors.items()})


def fx(sample, noise, tensors):
    return make_fx(sample)(noise + 1, tensors)(noise, tensors)


def exported(sample, noise, tensors):
    """With any batch: traced with six samples, called with as many as there are."""

    class Module(torch.nn.Module):
        def forward(self, noise, tensors):
            return sample(noise, tensors)

    shapes = {0: torch.export.Dim("batch", min=2, max=64)}, dict.fromkeys(tensors)
    program = torch.export.export(Module(), (torch.ones(6, 3, 2), tensors), dynamic_shapes=shapes, strict=False)
    return program.module()(noise, tensors)


def vmapped(sample, noise, tensors):
    return torch.func.vmap(lambda one: sample(one[None], tensors)[0])(noise)


def jit_traced(sample, noise, tensors):
    names = list(tensors)

    def flat(noise, *values):
        return sample(noise, dict(zip(names, values, strict=True)))

    values = (noise, *tensors.values())
    return torch.jit.trace(flat, (noise + 1, *tensors.values()), check_trace=False)(*values)


def default_device(sample, noise, tensors):
    with torch.device("meta"):
        return sample(noise, tensors)


def autocast(sample, noise, tensors):
    """In the other 16-bit dtype."""
    with torch.autocast("cpu", dtype=torch.float16):
        return sample(noise, tensors)


MODES = (compiled, fake, fx, exported, vmapped, jit_traced, default_device, autocast)
#: What takes a second for each case runs on these, and on all with `make test-full`.
FEW = {
    compiled: ("solver midpoint", "list, step sizes", "weight, function", "data, ab2"),
    exported: ("ab3, tensor", "function, list", "weight", "weight, function"),
}


#: Two tracers that run the same Python once, on values: each of the cases under one of them.
TURNS = {fx: [*CASES][::2], jit_traced: [*CASES][1::2]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore")  # a tracer says what it unrolls
def test_every_argument(mode):
    every_argument(mode, (FEW | TURNS).get(mode, CASES))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [*FEW, *TURNS])
def test_every_argument_in_slow_modes(mode):
    every_argument(mode, CASES)


def every_argument(mode, cases):
    """The bits of eager mode, for every argument; under FakeTensorMode the shape and the dtype."""
    noise = torch.randn(4, 3, 2)
    for case in cases:
        if mode is default_device and case == "function":  # which the default device is for
            continue
        sample, tensors = sampler(case)
        wanted = sample(noise, tensors)
        kept = len(solvers.cache._tables)
        try:
            got = mode(sample, noise, tensors)
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        if mode is fake:
            assert (got.shape, got.dtype, got.device) == (wanted.shape, wanted.dtype, wanted.device), case
        else:
            assert_same_bits(got, wanted)
        if mode not in (default_device, autocast):
            assert len(solvers.cache._tables) == kept, "the cache holds what a tracer made"


@pytest.mark.parametrize("mode", MODES[:6])
@pytest.mark.filterwarnings("ignore")
def test_a_weight_of_times_that_cannot_be_read(mode):
    """The grid is a tensor of the tracer, and the weight a function of its values: an error that says what to pass."""
    fm = FlowMatching((3, 2), use_classifier_free_guidance=True, inference_guidance_weight=jumping)

    def sample(noise, tensors):
        return fm.sample(noise.shape[0], velocity, noise=noise, unguided_step_fn=unguided, **tensors)

    if mode is vmapped:
        run = lambda: torch.func.vmap(lambda grid: sample(torch.ones(4, 3, 2), {"time_steps": grid}))(  # noqa: E731
            torch.tensor([GRID, GRID])
        )
    else:
        run = lambda: mode(sample, torch.ones(4, 3, 2), {"time_steps": torch.tensor(GRID)})  # noqa: E731
    with pytest.raises(Exception, match=r"pass the\s+grid as a list of floats|raised exception ValueError"):
        run()


@pytest.mark.parametrize("int_method", sorted(solvers.SOLVERS))
def test_a_grid_for_each_sample(int_method):
    """Under vmap: the bits of a loop over the samples."""
    fm, noise = FlowMatching((3, 2), int_method), torch.randn(3, 3, 2)
    grids = torch.tensor([GRID, [0.0, 0.2, 0.4, 0.9, 1.0], [0.0, 0.5, 0.6, 0.7, 1.0]])

    def sample(noise, grid):
        return fm.sample(1, velocity, noise=noise[None], time_steps=grid)[0]

    got = torch.func.vmap(sample)(noise, grids)
    assert_same_bits(got, torch.stack([sample(*pair) for pair in zip(noise, grids, strict=True)]))


def with_arguments(arguments):
    fm = FlowMatching((3, 2))
    return lambda noise, tensors: fm.sample(noise.shape[0], velocity, noise=noise, **arguments)


def test_lists_are_checked_while_tracing():
    """As Python's numbers, in every mode."""
    noise, bad = torch.ones(4, 3, 2), {"time_steps": [0.0, 0.5, 0.5, 1.0]}
    checks = [
        (bad, "strictly monotonic"),
        ({"time_steps": [0.0, float("nan"), 1.0]}, "strictly monotonic"),
        ({"time_steps": [0.0, float("inf")]}, "finite"),
        ({"time_steps": GRID, "step_sizes": [0.1, 0.2, float("inf"), 0.4]}, "step_sizes must be finite"),
        ({"time_steps": [1.0, 0.0], "int_method": "dpmpp_2m"}, "the other way"),
    ]
    for arguments, message in checks:
        sample = with_arguments(arguments)
        for mode in (compiled, fake, fx, exported, vmapped):
            with pytest.raises(Exception, match=message):
                mode(sample, noise, {})


def test_predictions_are_checked_while_tracing():
    """Where the velocity has no value: a grid with a name begins there."""
    fm = FlowMatching((3, 2), prediction_type="noise")

    def sample(noise, tensors):
        return fm.sample(noise.shape[0], velocity, noise=noise)

    for mode in (compiled, fake, fx, exported, vmapped):
        with pytest.raises(Exception, match="says nothing of the velocity"):
            mode(sample, torch.ones(4, 3, 2), {})


SCALARS = (
    "temperature",
    "weight",
    "weight, int",
    "weight, function",
    "weights",
    "time_steps",
    "batch",
    "temperature, first 1",
    "temperature, int",
    "temperature, tensor",
    "weight, first 1",
    "weight, tensor",
    "weight, from_guided",
    "weights, int",
    "weights, tensor",
    "time_steps, int",
    "time_steps, tensor",
    "step_sizes",
)


def scalars():
    """name -> three values of one argument."""
    guided = {"use_classifier_free_guidance": True, "unguided_step_fn": unguided}

    def weights(*values, **more):
        return [guided | more | {"inference_guidance_weight": value} for value in values]

    three = (1.5, 2.5, 0.3)
    return {
        "temperature": [{"temperature": value} for value in three],
        "temperature, first 1": [{"temperature": value} for value in (1.0, 0.5, 0.7)],
        "temperature, int": [{"temperature": value} for value in (3, 2, 4)],
        "temperature, tensor": [{"temperature": torch.tensor(value)} for value in (0.5, 1.0, 0.7)],
        "weight": weights(*three),
        "weight, first 1": weights(1.0, 2.5, 0.3),
        "weight, int": weights(1, 2, 3),
        "weight, tensor": weights(*map(torch.tensor, three)),
        "weight, from_guided": weights(*three, guidance_form="from_guided"),
        "weights": weights(*([value, 2.0] for value in three)),
        "weights, int": weights(*([value, 5] for value in (3, 2, 4))),
        "weights, tensor": weights(*(torch.tensor([value, 2.0]) for value in three)),
        "weight, function": weights(*map(jump_from, three)),
        "time_steps": [{"int_method": "ab3", "time_steps": [0.0, v, 0.5, 0.7, 1.0]} for v in (0.1, 0.2, 0.3)],
        "time_steps, int": [{"time_steps": [0, v, 7]} for v in (3, 2, 4)],
        "time_steps, tensor": [{"time_steps": torch.tensor([0.0, v, 1.0])} for v in (0.1, 0.2, 0.3)],
        "step_sizes": [{"time_steps": [0.0, 0.5, 1.0], "step_sizes": [v, 0.2]} for v in (0.1, 0.2, 0.3)],
        "batch": [{"batch": value} for value in (4, 3, 2)],
    }


@pytest.mark.parametrize("names", [SCALARS[:7], pytest.param(SCALARS[7:], marks=pytest.mark.full)], ids=["few", "rest"])
@pytest.mark.filterwarnings("ignore")
def test_scalars_compile_twice_at_most(names):
    """Three values of one argument: the bits of eager mode, and two graphs at most, the second for every value.

    Of two steps: in a graph the loop is unrolled, and each step more takes as long again.
    """
    fm, noises = FlowMatching((3, 2), num_inference_steps=2), torch.randn(4, 3, 2)

    def sample(noise, arguments):
        return fm.sample(noise.shape[0], velocity, noise=noise, **arguments)

    every = scalars()
    assert set(every) == set(SCALARS)
    for name in names:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled_sample = torch.compile(sample, fullgraph=True, backend=counter)
        for arguments in every[name]:
            arguments = dict(arguments)
            noise = noises[: arguments.pop("batch", 4)]
            assert_same_bits(compiled_sample(noise, arguments), sample(noise, arguments))
        assert 1 <= counter.frame_count <= 2, f"{name}: {counter.frame_count} graphs"


class NoFloat64(TorchDispatchMode):
    """Raises where an operator makes a float64 tensor that is not on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, Tensor) and tensor.device.type != "cpu" and tensor.dtype == torch.float64:
                raise TypeError(f"{func} makes a float64 tensor on {tensor.device}")
        return result


def test_devices_without_float64(monkeypatch):
    """Coefficients and weights are computed on the CPU. Fake CUDA tensors stand for a device that lacks float64."""
    for module in (fused_step, grid):
        monkeypatch.setattr(module, "FLOAT64_DEVICES", ("cpu",))
    with FakeTensorMode(), NoFloat64():
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2, device="cuda").double()
        for case, (constructor, arguments) in CASES.items():
            fm = FlowMatching((3, 2), num_inference_steps=3 if "fitted" in case else 4, **constructor)
            made = {
                name: torch.zeros(value.shape, device="cuda") if isinstance(value, Tensor) else value
                for name, value in arguments.items()
            }
            try:
                fm.sample(4, velocity, "cuda", **made)
            except Exception as error:
                raise AssertionError(f"{case}: {error}") from error


def test_autocast_and_16_bits(backend):
    """States, trajectories and grids of one 16-bit dtype, under autocast to the other: the bits without autocast."""
    dtypes = (torch.bfloat16, torch.float16)
    for dtype, other in (dtypes, dtypes[::-1]):
        for int_method, guided in itertools.product(solvers.SOLVERS, (False, True)):
            fm = FlowMatching((3, 2), int_method, use_classifier_free_guidance=guided)

            def sample(fm=fm, dtype=dtype):
                noise = torch.ones(2, 3, 2, dtype=dtype)
                grid = torch.linspace(0, 1, 5).to(dtype)
                more = {"unguided_step_fn": unguided} if fm.use_classifier_free_guidance else {}
                return fm.sample(
                    2, velocity, noise=noise, time_steps=grid, return_all_steps=True, backend=backend, **more
                )

            wanted = sample()
            with torch.autocast("cpu", dtype=other):
                got = sample()
            for a, b in zip(got, wanted, strict=True):
                assert_same_bits(a, b)


def test_what_is_readable():
    real = torch.ones(2)
    assert tracing.is_readable(real)
    assert not tracing.is_readable(torch.ones(2, device="meta"))
    with FakeTensorMode():
        made = torch.ones(2)
        assert not tracing.is_readable(made)
    assert not tracing.is_readable(made)
    seen = []
    torch.func.vmap(lambda x: seen.append(tracing.is_readable(x)) or x)(torch.ones(2, 2))
    torch.func.grad(lambda x: seen.append(tracing.is_readable(x)) or x.sum())(real)
    torch.func.grad(lambda x: torch.func.vmap(lambda y: seen.append(tracing.is_readable(y)) or y)(x).sum())(real)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda x: seen.append(tracing.is_readable(x)) or x + 1, (real,), check_trace=False)
    assert seen[:4] == [False, True, False, False]
    with FakeTensorMode(), tracing.suspended():
        assert torch.ones(2).tolist() == [1.0, 1.0]
