"""The time as a model wants it, and the number of the step, in every way that a row is taken."""

import functools
import threading

import pytest
import torch
from operands import assert_same_bits

from flowmatch_kernels import FlowMatching, StepFunction
from flowmatch_kernels.ops import native

TIME_AS = ("column", "batch", "scalar")


@pytest.fixture(params=["counted", "fresh", "functional"])
def rows(request, monkeypatch):
    """The backend, for each way to take a row."""
    if request.param == "fresh":
        monkeypatch.setattr(native, "Rows", None)
    return "reference" if request.param == "functional" else "cpu"


def field(x, t):
    return torch.sin(3 * x) * (1 + t)


class Seen:
    """A model that keeps what it is called with."""

    def __init__(self):
        self.times, self.steps = [], []

    def __call__(self, x, t, step):
        self.times.append(t)
        self.steps.append(step)
        return -x


@pytest.mark.parametrize("time_as", TIME_AS)
def test_time_as(rows, time_as):
    """The values and shapes of the published loops' times."""
    seen = Seen()
    FlowMatching((4, 2), backend=rows).sample(3, StepFunction(seen, time_as=time_as))
    wanted = torch.linspace(0, 1, 11)[:-1]
    shape = {"column": (3, 1, 1), "batch": (3,), "scalar": ()}[time_as]
    for t, value in zip(seen.times, wanted, strict=True):
        assert_same_bits(t, value.expand(shape))
    assert seen.steps == list(range(10))


def test_same_samples(rows):
    """As a function that changes t itself."""
    noise = torch.randn(3, 4, 2)

    def by_hand(x, t):
        return field(x, t.view(3)[:, None, None] * 1000)

    fm = FlowMatching((4, 2), backend=rows)
    wanted = fm.sample(3, by_hand, noise=noise)
    model = StepFunction(lambda x, t: field(x, t[:, None, None]), time_as="batch", time_scale=1000)
    assert_same_bits(fm.sample(3, model, noise=noise), wanted)


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_scaled_time(rows, steps):
    """Buckets and floats as loops compute them, from float64 times and from the float32 grid."""
    exact = torch.arange(steps + 1, dtype=torch.float64) / steps
    grid = torch.linspace(0, 1, steps + 1)
    for times, dtype, wanted in (
        (exact, torch.int64, [int(k / steps * 1000) for k in range(steps)]),
        (exact, torch.float32, [torch.tensor(k / steps * 1000).item() for k in range(steps)]),
        (exact, None, [k / steps * 1000 for k in range(steps)]),
        (grid, torch.int64, (grid * 1000).long()[:-1].tolist()),
        (grid, None, (grid * 1000)[:-1].tolist()),
    ):
        seen = Seen()
        step_fn = StepFunction(seen, time_as="batch", time_scale=1000, time_dtype=dtype)
        x = FlowMatching(2, backend=rows).sample(3, step_fn, time_steps=times)
        assert x.dtype == torch.float32
        assert [t.tolist() for t in seen.times] == [[value] * 3 for value in wanted]
        assert {t.dtype for t in seen.times} == {dtype or times.dtype}


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_loop_of_gr00t(rows, steps):
    """A bfloat16 state, dt a Python float, t an integer bucket computed in Python: int(k / N * 1000), [B]."""
    noise = torch.randn(3, 16, 8).bfloat16()
    weight = torch.randn(8, 8).bfloat16() / 4

    def model(x, t):
        assert (t.dtype, t.shape) == (torch.int64, (3,))
        return torch.sin(x @ weight) + (t.to(x.dtype) / 1000)[:, None, None]

    x = noise
    for k in range(steps):
        buckets = torch.full((3,), int(k / float(steps) * 1000))
        x = x + (1.0 / steps) * model(x, buckets)
    got = FlowMatching((16, 8), backend=rows).sample(
        3,
        StepFunction(model, time_as="batch", time_scale=1000, time_dtype=torch.int64),
        noise=noise,
        time_steps=torch.arange(steps + 1, dtype=torch.float64) / steps,
        step_sizes=[1.0 / steps] * steps,
    )
    assert_same_bits(got, x)


def test_rounds_down():
    seen = Seen()
    step_fn = StepFunction(seen, time_as="scalar", time_dtype=torch.int32)
    FlowMatching(2).sample(1, step_fn, time_steps=[-1.5, -0.5, 0.5, 1.5])
    assert [t.item() for t in seen.times] == [-2, -1, 0]


@pytest.mark.parametrize("solver, evaluations", [("heun", 8), ("ab3", 5), ("rk4", 16)])
def test_number_of_the_evaluation(rows, solver, evaluations):
    seen = Seen()
    fm = FlowMatching(2, solver, 4, backend=rows)
    fm.sample(3, StepFunction(seen))
    assert seen.steps == list(range(evaluations)) == list(range(fm.nfe()))


def test_guidance(rows):
    """Both models are given the number, also where one is not called."""
    guided, unguided = Seen(), Seen()
    fm = FlowMatching(2, num_inference_steps=4, use_classifier_free_guidance=True, backend=rows)
    weights = [1.0, 2.0, 0.0, 3.0]
    for skip, wanted in ((False, ([0, 1, 2, 3], [0, 1, 2, 3])), (True, ([0, 1, 3], [1, 2, 3]))):
        guided.steps.clear()
        unguided.steps.clear()
        fm.sample(
            3,
            StepFunction(guided),
            unguided_step_fn=StepFunction(unguided),
            inference_guidance_weight=weights,
            skip_irrelevant_model=skip,
        )
        assert (guided.steps, unguided.steps) == wanted
    fm.sample(3, field, unguided_step_fn=StepFunction(unguided))
    assert unguided.steps[-4:] == [0, 1, 2, 3]


def test_noise_in_another_format():
    seen = Seen()
    noise = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    FlowMatching((3, 4, 5)).sample(2, StepFunction(seen, time_as="batch"), noise=noise)
    assert seen.steps == list(range(10))
    assert seen.times[3].shape == (2,)


def test_one_function_in_nested_calls_and_threads():
    """The number belongs to one sample()."""
    fm, inner = FlowMatching(2, num_inference_steps=5), []

    def model(x, t, step):
        before = step
        if x.shape[0] == 3:
            fm.sample(1, step_fn)
        else:
            inner.append(step)
        assert step == before
        return x * step

    step_fn = StepFunction(model)
    noise = torch.randn(3, 2)
    wanted = fm.sample(3, step_fn, noise=noise)
    assert inner == [0, 1, 2, 3, 4] * 5
    results = []
    threads = [threading.Thread(target=lambda: results.append(fm.sample(3, step_fn, noise=noise))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(x, wanted) for x in results)


def test_who_takes_the_step():
    class Network(torch.nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.forward = forward

    takes = lambda x, t, step: x  # noqa: E731
    without = lambda x, t: x  # noqa: E731
    swallows = lambda x, t, **kwargs: x  # noqa: E731
    assert StepFunction(takes).takes_step
    assert StepFunction(Network(takes)).takes_step
    assert StepFunction(functools.partial(lambda a, x, t, step: x, 1)).takes_step
    assert StepFunction(torch.no_grad()(takes)).takes_step
    for model in (without, swallows, Network(without), functools.partial(without), torch.add):
        assert not StepFunction(model).takes_step
    assert not StepFunction(lambda step, /, x, t: x).takes_step
    with pytest.raises(RuntimeError, match=r"sample\(\) alone knows"):
        StepFunction(takes)(x=torch.zeros(1), t=torch.zeros(1))
    t = torch.full((2, 1), 0.5)
    assert StepFunction(lambda x, t: t, time_as="scalar")(x=t, t=t) == 0.5


def test_compiles():
    noise = torch.randn(3, 4, 2)
    step_fn = StepFunction(lambda x, t, step: field(x, t[:, None, None]) * step, time_as="batch", time_scale=1000)
    fm = FlowMatching((4, 2), num_inference_steps=3)
    compiled = torch.compile(lambda noise: fm.sample(3, step_fn, noise=noise), fullgraph=True, backend="eager")
    assert_same_bits(compiled(noise), fm.sample(3, step_fn, noise=noise))


def test_is_fitted():
    """fit_solver and compare_solvers call it as sample() does."""
    fm = FlowMatching((8, 2))
    step_fn = StepFunction(lambda x, t: torch.sin(4 * t)[:, None, None] - x, time_as="batch")
    solver = fm.fit_solver(step_fn, evaluations=3, batch_size=16)
    assert fm.sample(2, step_fn, int_method=solver).shape == (2, 8, 2)


def test_bad_arguments():
    for keywords, error, message in (
        ({"time_as": "row"}, ValueError, r"time_as must be 'column', 'batch' or 'scalar', got 'row'"),
        ({"time_scale": float("inf")}, ValueError, r"time_scale"),
        ({"time_scale": "1000"}, TypeError, r"time_scale"),
        ({"time_dtype": torch.bool}, TypeError, r"time_dtype"),
        ({"time_dtype": "int64"}, TypeError, r"time_dtype"),
    ):
        with pytest.raises(error, match=message):
            StepFunction(field, **keywords)
    with pytest.raises(TypeError, match=r"model must be callable, got 3"):
        StepFunction(3)
    with pytest.raises(ValueError, match=r"a batch of one sample or more"):
        FlowMatching(2).sample(0, StepFunction(field, time_as="scalar"))
