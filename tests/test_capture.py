"""What sample() does while a CUDA graph is captured, seen on fake CUDA tensors: no GPU is needed."""

import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowmatch_kernels import DDIM, DDPM, FlowMatching, KeyedNoise, diffusion, inpaint, solvers, tracing

GRID = [0.0, 0.1, 0.35, 0.8, 1.0]
GUIDED = {
    "use_classifier_free_guidance": True,
    "unguided_step_fn": lambda x, t: -x,
    "inference_guidance_weight": 1.5,
}
#: name -> (arguments of the constructor, arguments of sample()): what is said to be capturable.
CAPTURABLE = {f"solver {name}": ({"int_method": name}, {}) for name in solvers.SOLVERS} | {
    "trajectory": ({}, {"return_all_steps": True}),
    "guided": ({}, GUIDED),
    "weights": ({}, GUIDED | {"inference_guidance_weight": [1.0, 2.0, 3.0, 4.0]}),
    "skip": ({}, GUIDED | {"inference_guidance_weight": 1.0, "skip_irrelevant_model": True}),
    "combined": ({}, GUIDED | {"unguided_step_fn": None, "combined_guidance": True}),
    "shifted": ({"time_grid": "shifted", "time_grid_options": {"shift": 3.0}}, {}),
    "cosine": ({"time_grid": "cosine"}, {}),
    "power": ({"time_grid": "power", "noise_at": 1}, {}),
    "data": ({"prediction_type": "data"}, {}),
    "noise": ({"prediction_type": "noise"}, {"time_steps": [0.1, 0.5, 0.7, 0.8, 0.9]}),
    "list": ({"int_method": "ab3"}, {"time_steps": GRID}),
    "ints in a list": ({}, {"time_steps": [0, 0.1, 0.35, 0.8, 1]}),
    "step sizes": ({}, {"time_steps": GRID, "step_sizes": [0.1, 0.2, 0.3, 0.4]}),
    "temperature": ({}, {"temperature": 0.5}),
    "bfloat16": ({}, {"dtype": torch.bfloat16}),
    "callback": ({}, {"callback": lambda step, t, x: None}),
    "euler_at_final": ({"int_method": "heun", "euler_at_final": True}, {}),
    "keyed noise": ({}, {"noise": KeyedNoise(7)}),
    "steps that add noise by keys": ({"int_method": "sde"}, {"noise": KeyedNoise(7), "time_steps": GRID[:-1]}),
    "own times and weights": (
        {},
        GUIDED
        | {
            "time_steps": [[0.1 * b, 0.5, 0.9] for b in range(6)],
            "inference_guidance_weight": [[0.5 * b] for b in range(6)],
        },
    ),
    "DDIM": (DDIM((64, 2), 4), {}),
    "DDIM, clipped": (DDIM((64, 2), 4, clip_sample_range=1.0), {}),
    "DDPM": (DDPM((64, 2), 4), {"noise": KeyedNoise(7)}),
    "log_prob": ({"int_method": "dance"}, {"return_log_prob": True}),
    "log_prob, own times": (
        {"int_method": "dance"},
        {"time_steps": [[0.1 * b, 0.5, 0.9] for b in range(6)], "return_log_prob": True},
    ),
}


class Refused(TorchDispatchMode):
    """Notes what a capture refuses: a blocking copy from the host, a read of a device's value."""

    def __init__(self, device="cuda"):
        super().__init__()
        self.device, self.seen = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sources = [leaf.device.type for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        on_device = isinstance(result, Tensor) and result.device.type == self.device
        if on_device and "cpu" in sources and not (kwargs or {}).get("non_blocking"):
            self.seen.append(str(func))
        if "local_scalar" in str(func) or "nonzero" in str(func):
            self.seen.append(str(func))
        return result


def velocity(x, t):
    return (x * t).to(x.dtype)


def twice(x, t):
    return torch.cat([x, x * t])


def run(case):
    constructor, arguments = CAPTURABLE[case]
    fm = FlowMatching((64, 2), num_inference_steps=4, **constructor) if isinstance(constructor, dict) else constructor
    return fm.sample(6, twice if arguments.get("combined_guidance") else velocity, "cuda", **arguments)


def warm(monkeypatch):
    """Keeps the tables that are made on fake tensors, as the warm-up's eager call keeps them."""
    for kind in (solvers.Request, diffusion._Request):

        def kept(self, check=False, make=kind.make):
            table = make(self, check)
            solvers.cache._tables[self.key()] = table, tuple(map(weakref.ref, self.tensors()))
            return table

        monkeypatch.setattr(kind, "make", kept)


@pytest.mark.parametrize("case", CAPTURABLE)
def test_nothing_that_a_capture_refuses(monkeypatch, case):
    """After a warm-up; and the table that it finds is held for as long as the graph may be replayed."""
    monkeypatch.setattr(solvers.cache, "_pinned", {})
    with FakeTensorMode():
        with monkeypatch.context() as patch:
            warm(patch)
            run(case)
        monkeypatch.setattr(tracing, "is_capturing", lambda: True)
        with Refused() as refused:
            run(case)
    assert refused.seen == []
    (pinned,) = solvers.cache._pinned.values()
    assert pinned.coefficients.device.type == "cuda"
    solvers.cache.clear()
    assert list(solvers.cache._pinned.values()) == [pinned]


def test_the_lint_sees():
    """Both kinds of what is refused; meta tensors stand for CUDA's."""
    with Refused("meta") as refused:
        torch.ones(2, device="meta").copy_(torch.ones(2))
        torch.ones(2, device="meta") + 1
        torch.ones(2)[0].item()
    assert refused.seen == ["aten.copy_.default", "aten._local_scalar_dense.default"]


@pytest.mark.parametrize("case", CAPTURABLE)
def test_without_a_warm_up(monkeypatch, case):
    monkeypatch.setattr(tracing, "is_capturing", lambda: True)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="call it once with the same arguments before the capture"):
        run(case)
    assert not solvers.cache._tables, "what a capture makes is in the graph's memory, and no table for others"


@pytest.mark.parametrize(
    ("constructor", "arguments"),
    [
        ({"time_grid": lambda n: torch.linspace(0, 1, n + 1)}, {}),
        ({}, GUIDED | {"inference_guidance_weight": lambda t: t}),
    ],
)
def test_functions_are_refused(monkeypatch, constructor, arguments):
    """Their numbers would be those of the capture."""
    monkeypatch.setattr(tracing, "is_capturing", lambda: True)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        FlowMatching((64, 2), **constructor).sample(6, velocity, "cuda", **arguments)


def test_a_pinned_table_is_not_dropped(monkeypatch):
    """However many tables come after it; and the cache itself keeps no more than before."""
    monkeypatch.setattr(solvers.cache, "_pinned", {})
    cpu = torch.device("cpu")

    def request(steps):
        grid = ("uniform", (), torch.float32)
        return solvers.Request("euler", steps, torch.float32, cpu, 0, None, False, *grid)

    with pytest.raises(RuntimeError, match="once with the same arguments"):
        solvers.cache.captured(request(3))
    table = solvers.cache.get(request(3))
    assert solvers.cache.captured(request(3)) is table
    assert solvers.cache.captured(request(3)) is table
    for steps in range(4, 5 + solvers.cache.capacity):
        solvers.cache.get(request(steps))
    assert len(solvers.cache._tables) == solvers.cache.capacity
    assert list(solvers.cache._pinned.values()) == [table]


def test_a_table_is_finished_before_another_stream_can_find_it(monkeypatch):
    """It is waited for before it is in the cache; and every stream that gets it is told to the allocator.

    Else a second stream reads coefficients that are not there yet, or a table that left the cache is overwritten
    under a launch that reads it. Doubles note the calls: fake tensors have no streams.
    """
    events, streams = [], ["first", "second"]
    second_device = torch.device("cuda", 1)

    class Stream:
        def __init__(self, name):
            self.name = name

        def synchronize(self):
            events.append(f"{self.name} synchronised, {len(solvers.cache._tables)} in the cache")

    def current_stream(of):
        assert of == second_device
        return Stream(streams[0])

    class OnDevice:
        is_cuda, device = True, second_device

        def __init__(self, name):
            self.name = name

        def record_stream(self, stream):
            events.append(f"{self.name} used on {stream.name}")

    class Made:
        coefficients, times, densities = OnDevice("coefficients"), OnDevice("times"), OnDevice("densities")

        def readable(self):
            return self

    def make(self, check=False):
        events.append("made")
        return Made()

    monkeypatch.setattr(solvers.Request, "make", make)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    grid = ("uniform", (), torch.float32)
    request = solvers.Request(
        "euler", 2, torch.float32, second_device, 0, None, False, *grid, time_steps=[0.0, 0.5, 1.0]
    )
    table = solvers.cache.get(request)
    assert events == [
        "made",
        "first synchronised, 0 in the cache",
        "coefficients used on first",
        "times used on first",
        "densities used on first",
    ]
    events.clear()
    del streams[0]
    assert solvers.cache.get(request) is table
    assert events == ["coefficients used on second", "times used on second", "densities used on second"]


def test_inpaint(monkeypatch):
    with FakeTensorMode():
        known, noise = torch.ones(6, 64, 2, device="cuda"), torch.ones(6, 64, 2, device="cuda")
        constraint = inpaint(known, torch.ones(64, 1, dtype=torch.bool, device="cuda"), noise)
        fm = FlowMatching((64, 2))
        with monkeypatch.context() as patch:
            warm(patch)
            fm.sample(6, velocity, "cuda", noise=noise, constraint=constraint)
        monkeypatch.setattr(tracing, "is_capturing", lambda: True)
        with Refused() as refused:
            fm.sample(6, velocity, "cuda", noise=noise, constraint=constraint)
    assert refused.seen == []
