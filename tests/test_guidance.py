"""Guidance: four forms, weights that change, models that are left out, and both velocities from one call."""

import itertools

import eager_loops
import numpy
import pytest
import torch
from operands import assert_same_bits, same_bits, values

from flowmatch_kernels import FlowMatching, guidance, solvers
from flowmatch_kernels.ops import dispatch

DIMS, BATCH, STEPS = (5, 3), 4, 6
FORMS = tuple(eager_loops.GUIDED)
# (state, velocity)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
NARROW = (torch.float32, torch.bfloat16, torch.float16)
TIMES = torch.linspace(0, 1, STEPS + 1)

every_form = pytest.mark.parametrize("form", FORMS)
every_solver = pytest.mark.parametrize("solver", eager_loops.SOLVERS)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x)[6:] for x in d))


def models(dtype=torch.float32):
    """A guided and an unguided velocity, neither linear nor symmetric."""

    def conditional(x, t):
        return (torch.sin(3 * x) * 0.7 + t * x - (1 - t)).to(dtype)

    def unconditional(x, t):
        return (torch.cos(2 * x) * 1.1 - t * x * x).to(dtype)

    return conditional, unconditional


def start(dtype=torch.float32, batch_size=BATCH):
    return torch.randn(batch_size, *DIMS, generator=torch.Generator().manual_seed(3)).to(dtype)


def ours(form, weight, fns, noise, solver="euler", fm=None, **keywords):
    """sample() with guidance: the trajectory, which sample() without it is seen to end at."""
    fm = fm or FlowMatching(noise.shape[1:], num_inference_steps=STEPS)
    keywords = {
        "int_method": solver,
        "noise": noise,
        "unguided_step_fn": fns[1] if len(fns) == 2 else None,
        "use_classifier_free_guidance": True,
        "guidance_form": form,
        "inference_guidance_weight": weight,
    } | keywords
    states, times = fm.sample(len(noise), fns[0], return_all_steps=True, **keywords)
    last = fm.sample(len(noise), fns[0], **keywords)
    assert_same_bits(last, states[:, -1], "without the trajectory")
    assert_same_bits(times, keywords.get("time_steps", TIMES), "times")
    return states


def eager(form, weight, fns, noise, solver="euler", times=TIMES):
    weight = weight if callable(weight) else lambda i, t, w=weight: w
    return eager_loops.sample(solver, eager_loops.guided(form, weight, *fns), noise, times)


# ---- forms ----


@every_dtype
@every_form
def test_every_form_is_the_eager_loop(backend, form, dtypes):
    state, velocity = dtypes
    fns, noise = models(velocity), start(state)
    for solver, weight in itertools.product(eager_loops.SOLVERS, (1.7, -1.0, 3)):
        wanted = eager(form, weight, fns, noise, solver)
        got = ours(form, weight, fns, noise, solver, backend=backend)
        assert_same_bits(got, wanted, f"{solver}, w = {weight}")


@every_dtype
@every_form
def test_special_values(backend, form, dtypes):
    """Infinities, NaN, -0.0 and denormals; a weight that overflows, and for float64 one that is infinite in float32."""
    state, velocity = dtypes
    generator = torch.Generator().manual_seed(5)
    noise = values((3, 64), state, generator)
    rows = [values((3, 64), velocity, generator) for _ in range(2 * STEPS)]
    large = 1e39 if state is torch.float64 else 3e38
    for solver, weight in itertools.product(("euler", "ab2"), (1.7, 0.0, large)):
        taken = {"calls": iter(())}

        def step_fn(x, t, taken=taken):
            return next(taken["calls"])

        fm = FlowMatching(64, solver, STEPS, backend=backend, use_classifier_free_guidance=True)
        keywords = {"noise": noise, "unguided_step_fn": step_fn, "guidance_form": form}
        taken["calls"] = iter(rows)
        states, _ = fm.sample(3, step_fn, return_all_steps=True, inference_guidance_weight=weight, **keywords)
        taken["calls"] = iter(rows)
        last = fm.sample(3, step_fn, inference_guidance_weight=weight, **keywords)
        taken["calls"] = iter(rows)
        wanted = eager(form, weight, (step_fn, step_fn), noise, solver)
        assert_same_bits(states, wanted, f"{solver}, w = {weight}")
        assert_same_bits(last, wanted[:, -1], f"{solver}, w = {weight}")


def test_no_two_forms_are_one():
    """Else a form that is taken for another would pass; with the weights that mean the same, too."""
    fns, noise = models(torch.bfloat16), start()
    alike = {"interpolate": 1.7, "from_unguided": 1.7, "from_guided": 0.7, "extrapolate": 0.7}
    results = {form: ours(form, weight, fns, noise) for form, weight in alike.items()}
    for one, other in itertools.combinations(FORMS, 2):
        # Both are weighted sums, and here 1 - 1.7 and -0.7 are one float32.
        sums = {one, other} == {"interpolate", "extrapolate"}
        assert same_bits(results[one], results[other]) == sums
        torch.testing.assert_close(results[one], results[other], rtol=0, atol=0.1)
        assert not same_bits(ours(one, 1.7, fns, noise), ours(other, 1.7, fns, noise))


def test_the_table_of_forms_says_what_the_forms_are():
    u, c = (values((257,), torch.float32, torch.Generator().manual_seed(seed), special=False) for seed in (1, 2))
    assert set(guidance.FORMS) == set(FORMS)
    for name, form in guidance.FORMS.items():
        for weight in (1.7, 0.0, -1.0):
            assert_same_bits(form.eager(weight, u, c), eager_loops.GUIDED[name](weight, u, c), name)
        # To rounding: at -1.0, extrapolate is 0*c + u, and from_guided c + (u - c).
        torch.testing.assert_close(form.eager(form.guided_alone, u, c), c, rtol=0, atol=1e-4)
        torch.testing.assert_close(form.eager(form.unguided_alone, u, c), u, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pair", [NARROW[:2], NARROW[1::-1], NARROW[2:0:-1]], ids=str)
@every_form
def test_models_of_two_dtypes(backend, form, pair):
    """Eager's own promotion: a product in its operand's dtype, a sum in the wider of both."""
    fns = models(pair[0])[0], models(pair[1])[1]
    for state, solver in ((torch.float32, "euler"), (torch.float32, "heun"), (torch.float64, "ab2")):
        noise = start(state)
        for weight in (1.7, 0.0):
            got = ours(form, weight, fns, noise, solver, backend=backend)
            assert_same_bits(got, eager(form, weight, fns, noise, solver), f"{solver}, w = {weight}")


NUMBERS = {
    "both": (lambda x, t: torch.tensor(0.3), lambda x, t: torch.tensor(-0.7)),
    "guided": (lambda x, t: torch.tensor(0.3), lambda x, t: torch.cos(x)),
    "unguided": (lambda x, t: torch.sin(x), lambda x, t: torch.tensor(-0.7)),
    "guided, float64": (lambda x, t: torch.tensor(1 / 3, dtype=torch.float64), lambda x, t: torch.cos(x)),
    "unguided, float64": (lambda x, t: torch.sin(x), lambda x, t: torch.tensor(1 / 3, dtype=torch.float64)),
    "both, float64": [lambda x, t, w=w: torch.tensor(w, dtype=torch.float64) for w in (1 / 3, -1 / 7)],
    "both, bfloat16": [lambda x, t: torch.tensor(0.3, dtype=torch.bfloat16)] * 2,
}


@pytest.mark.parametrize("case", NUMBERS)
@every_form
def test_0_dim_velocities(backend, form, case):
    """A 0-dim tensor is a number to eager PyTorch: it does not widen the other."""
    fns = NUMBERS[case]
    for state, solver in itertools.product((torch.float32, torch.bfloat16), eager_loops.SOLVERS):
        if case in ("both", "both, float64") and state == torch.bfloat16:
            continue  # nothing here that a wider one would be a number to
        noise = start(state)
        wanted = eager(form, 1.7, fns, noise, solver)
        if wanted.dtype == state:
            assert_same_bits(ours(form, 1.7, fns, noise, solver, backend=backend), wanted, f"{state}, {solver}")


@every_form
def test_velocities_that_expand(backend, form):
    fns = lambda x, t: torch.sin(x[:, :1]), lambda x, t: torch.cos(x[:1, :, :1])
    noise = start()
    assert_same_bits(ours(form, 1.7, fns, noise, "ab2", backend=backend), eager(form, 1.7, fns, noise, "ab2"))


@every_form
def test_one_buffer_for_both(backend, form):
    """Two models replayed as graphs that write to one buffer."""
    plain, buffer = models(), torch.empty(BATCH, *DIMS)
    fns = [lambda x, t, model=model: buffer.copy_(model(x, t)) for model in plain]
    for solver in eager_loops.SOLVERS:
        got = ours(form, 1.7, fns, start(), solver, backend=backend)
        assert_same_bits(got, eager(form, 1.7, plain, start(), solver), solver)


# ---- weights ----

PER_STEP = (1.7, 1.0, 0.3, 0.0, -0.5, 1.1)


@pytest.mark.parametrize("kind", [tuple, list, torch.tensor, lambda w: torch.tensor(w, dtype=torch.float64)],
                         ids=["tuple", "list", "tensor", "float64"])  # fmt: skip
@every_form
def test_a_weight_for_each_step(backend, form, kind):
    """Every evaluation of a step takes its step's weight."""
    fns, noise = models(), start()
    weights = kind(PER_STEP)
    taken = weights.tolist() if isinstance(weights, torch.Tensor) else PER_STEP
    for solver in eager_loops.SOLVERS:
        wanted = eager(form, lambda i, t: taken[i], fns, noise, solver)
        assert_same_bits(ours(form, weights, fns, noise, solver, backend=backend), wanted, solver)


@pytest.mark.parametrize("solver", sorted(solvers.SOLVERS))
def test_one_weight_for_each_step_is_one_weight(backend, solver):
    fns, noise = models(), start()
    wanted = ours("interpolate", 1.7, fns, noise, solver, backend=backend)
    for weight in ([1.7] * STEPS, lambda t: 1.7, lambda t: torch.tensor(1.7, dtype=torch.float64)):
        assert_same_bits(ours("interpolate", weight, fns, noise, solver, backend=backend), wanted, solver)


@pytest.mark.parametrize("number", [1.7, numpy.float64(1.7), torch.tensor(1.7, dtype=torch.float64)], ids=type)
def test_numbers_of_other_kinds(number):
    fns, noise = models(), start()
    assert_same_bits(ours("interpolate", number, fns, noise), eager("interpolate", 1.7, fns, noise))
    fm = FlowMatching(DIMS, num_inference_steps=STEPS, inference_guidance_weight=number)
    assert_same_bits(ours("interpolate", None, fns, noise, fm=fm), eager("interpolate", 1.7, fns, noise))
    per_step = [number, 2, numpy.float32(0.5), torch.tensor(0.25), 1, 0]
    taken = [1.7, 2.0, 0.5, 0.25, 1.0, 0.0]
    wanted = eager("interpolate", lambda i, t: taken[i], fns, noise)
    assert_same_bits(ours("interpolate", per_step, fns, noise), wanted)


def of_time(t):
    return 0.5 + 2.0 * t * t


@every_solver
@every_form
def test_a_function_of_time(backend, form, solver):
    """At the time of each evaluation, not of its step."""
    fns, noise = models(), start()
    for times in (TIMES, torch.tensor([0.1, 0.2, 0.45, 0.5, 0.9], dtype=torch.float64)):
        wanted = eager(form, lambda i, t: of_time(t.flatten()[0].item()), fns, noise, solver, times)
        got = ours(form, of_time, fns, noise, solver, backend=backend, time_steps=times)
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("int_method", sorted(solvers.SOLVERS))
@pytest.mark.parametrize("grid", [{}, {"time_grid": "shifted", "noise_at": 1}], ids=["uniform", "shifted"])
def test_when_a_function_is_asked(int_method, grid):
    """Once for each evaluation, with a float, at the very time that the models see; before the noise is drawn."""
    asked, seen = [], []

    def weight(t):
        asked.append(t)
        return 1.5

    def step_fn(x, t):
        seen.append(t.flatten()[0].item())
        return x

    fm = FlowMatching(2, int_method, 5, use_classifier_free_guidance=True, inference_guidance_weight=weight, **grid)
    fm.sample(3, step_fn, unguided_step_fn=lambda x, t: -x)
    assert asked == seen and len(asked) == fm.nfe(guided=False)
    assert {type(t) for t in asked} == {float}
    fm.sample(3, step_fn, unguided_step_fn=lambda x, t: -x)
    assert len(asked) == 2 * fm.nfe(guided=False), "a function may answer otherwise another time"


def test_a_function_that_raises():
    class OwnError(Exception):
        pass

    def weight(t):
        raise OwnError

    fm = FlowMatching(2, use_classifier_free_guidance=True, inference_guidance_weight=weight)
    before, calls = torch.get_rng_state(), []
    with pytest.raises(OwnError):
        fm.sample(3, calls.append, unguided_step_fn=calls.append)
    assert torch.equal(before, torch.get_rng_state()) and not calls


@pytest.mark.parametrize("weights", [PER_STEP, list(PER_STEP), torch.tensor(PER_STEP).double(), of_time], ids=type)
def test_constructor_and_argument(weights):
    """The constructor's weight and form, unless sample() is given others."""
    fns, noise = models(), start()
    fm = FlowMatching(DIMS, num_inference_steps=STEPS, inference_guidance_weight=weights, guidance_form="from_guided")
    taken = PER_STEP if not callable(weights) else [of_time(t) for t in TIMES.tolist()]
    own = [w if callable(weights) or not isinstance(weights, torch.Tensor) else float(weights[i])
           for i, w in enumerate(taken)]  # fmt: skip
    got = ours(None, None, fns, noise, fm=fm)
    assert_same_bits(got, eager("from_guided", lambda i, t: own[i], fns, noise))
    got = ours("extrapolate", None, fns, noise, fm=fm)
    assert_same_bits(got, eager("extrapolate", lambda i, t: own[i], fns, noise))
    for weight in (0.0, 0.7):  # 0.0 is a weight, not the absence of one
        got = ours(None, weight, fns, noise, fm=fm)
        assert_same_bits(got, eager("from_guided", weight, fns, noise))
    got = ours(None, None, fns, noise, fm=fm)
    assert_same_bits(got, eager("from_guided", lambda i, t: own[i], fns, noise))


def test_no_steps_take_no_weights():
    fm = FlowMatching(2, num_inference_steps=0, use_classifier_free_guidance=True)
    for weight in (1.5, [], (), torch.tensor([]), lambda t: 1 / 0):
        x = fm.sample(3, lambda x, t: x, unguided_step_fn=lambda x, t: x, noise=torch.ones(3, 2),
                      inference_guidance_weight=weight)  # fmt: skip
        assert_same_bits(x, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"each of the 0 steps, got 1 of them"):
        fm.sample(3, lambda x, t: x, unguided_step_fn=lambda x, t: x, inference_guidance_weight=[1.5])


def test_tables_of_other_forms_and_weights_are_others(backend):
    """Each combination twice, in another order: what one leaves in the cache is not served to another."""
    fns = lambda x, t: torch.sin(x), lambda x, t: torch.cos(x)
    noise = start()
    fm = FlowMatching(DIMS, num_inference_steps=3, backend=backend)
    weights = [0.0, -0.0, 1.0, 1.5, (1.5, 1.5, 1.5), (1.5, 0.0, 1.5), (1.5, -0.0, 1.5), (0.0, 1.5, 1.5)]
    asked = [*itertools.product(FORMS, weights)]
    times = torch.linspace(0, 1, 4)
    for form, weight in asked + asked[::-1] + asked[::3]:
        per_step = weight if isinstance(weight, tuple) else (weight,) * 3
        wanted = eager(form, lambda i, t, w=per_step: w[i], fns, noise, times=times)
        got = fm.sample(
            BATCH, fns[0], noise=noise, unguided_step_fn=fns[1], use_classifier_free_guidance=True,
            guidance_form=form, inference_guidance_weight=weight,
        )  # fmt: skip
        assert_same_bits(got, wanted[:, -1], f"{form}, {weight}")
        got = fm.sample(BATCH, fns[0], noise=noise)
        assert_same_bits(got, eager_loops.sample("euler", lambda x, t, i: fns[0](x, t), noise, times)[:, -1])


@every_form
def test_minus_zero_is_another_weight(backend, form):
    """-0.0 == 0.0, and a table kept for one is not the other's."""
    fns = lambda x, t: torch.ones_like(x), lambda x, t: torch.full_like(x, -0.0)
    noise = torch.full((2, 3), -0.0)
    for weight in (0.0, -0.0, 0.0, [0.0] * STEPS, [-0.0] * STEPS, [0.0] * STEPS):
        taken = weight[0] if isinstance(weight, list) else weight
        wanted = eager(form, taken, fns, noise)
        assert_same_bits(ours(form, weight, fns, noise, backend=backend), wanted, f"w = {weight}")


def test_a_weight_that_is_changed_afterwards():
    """A list, or a tensor, is read at each sample(), and is no key."""
    fns, noise = models(), start()
    for weights in (list(PER_STEP), torch.tensor(PER_STEP, dtype=torch.float64)):
        fm = FlowMatching(DIMS, num_inference_steps=STEPS, inference_guidance_weight=weights)
        for first in (1.7, -2.0, 1.7):
            weights[0] = first
            wanted = eager("interpolate", lambda i, t, w=weights: float(w[i]), fns, noise)
            assert_same_bits(ours(None, None, fns, noise, fm=fm), wanted)


# ---- a model that is irrelevant ----

ALONE = {"interpolate": (1.0, 0.0), "from_unguided": (1.0, 0.0), "from_guided": (0.0, -1.0), "extrapolate": (0.0, -1.0)}


class Counted:
    """A model that counts its calls; `poisoned`, it returns what would show in any sum."""

    def __init__(self, model, poisoned=False):
        self.model, self.poisoned, self.calls = model, poisoned, []

    def __call__(self, *, x, t):
        self.calls.append(t.flatten()[0].item())
        v = self.model(x, t)
        return torch.full_like(v, float("nan")) if self.poisoned else v


@every_solver
@every_form
def test_the_model_that_is_left_out(backend, form, solver):
    """At the weight where only one counts; the result is that model's own, to the last bit."""
    noise, plain = start(), models()
    evaluations = STEPS * (2 if solver == "heun" else 1)
    for left, weight in enumerate(reversed(ALONE[form])):  # 0: the guided is left out, 1: the unguided
        for kind in (weight, [weight] * STEPS, lambda t, w=weight: w, -0.0 if weight == 0 else weight):
            fns = [Counted(model, poisoned=k == left) for k, model in enumerate(plain)]
            keywords = {"int_method": solver, "guidance_form": form, "inference_guidance_weight": kind}
            fm = FlowMatching(DIMS, num_inference_steps=STEPS, backend=backend, use_classifier_free_guidance=True)
            got, _ = fm.sample(
                BATCH, fns[0], noise=noise, unguided_step_fn=fns[1], return_all_steps=True,
                skip_irrelevant_model=True, **keywords,
            )  # fmt: skip
            assert [len(fn.calls) for fn in fns] == [0 if k == left else evaluations for k in range(2)]
            alone = plain[1 - left]
            assert_same_bits(got, eager_loops.sample(solver, lambda x, t, i, m=alone: m(x, t), noise, TIMES))


@every_form
def test_both_are_called_by_default_and_at_other_weights(form):
    for skip, weight in [(False, w) for w in ALONE[form]] + [(True, w) for w in (2.0, -0.5, 1.0 + 2**-50, -2.0)]:
        fns = [Counted(model) for model in models()]
        FlowMatching(DIMS, num_inference_steps=STEPS).sample(
            BATCH, fns[0], unguided_step_fn=fns[1], use_classifier_free_guidance=True, guidance_form=form,
            inference_guidance_weight=weight, skip_irrelevant_model=skip,
        )  # fmt: skip
        assert [len(fn.calls) for fn in fns] == [STEPS, STEPS], (skip, weight)
        assert fns[0].calls == fns[1].calls


def test_by_default_what_is_irrelevant_still_counts(backend):
    """As in eager: 0 * inf is NaN."""
    fns = models()[0], lambda x, t: torch.full_like(x, float("inf"))
    for form in ("interpolate", "extrapolate"):
        weight = ALONE[form][0]
        got = ours(form, weight, fns, start(), backend=backend)
        assert got[:, 1:].isnan().all()
        assert_same_bits(got, eager(form, weight, fns, start()))


@every_solver
@every_form
def test_guidance_in_an_interval(backend, form, solver):
    """Guided in the middle only: the unguided model is called there only, and what is remembered is right."""
    guided_alone, unguided_alone = ALONE[form]
    noise, plain, times = start(), models(), torch.linspace(0, 1, 11)

    def within(t):
        return 3.0 if 0.2 < t < 0.8 else guided_alone

    def three_parts(t):
        return guided_alone if t < 0.3 else 2.5 if t < 0.6 else unguided_alone

    for weight in (within, three_parts):

        def velocity(x, t, i, weight=weight):
            w = weight(t.flatten()[0].item())
            c, u = (model(x, t) for model in plain)
            return c if w == guided_alone else u if w == unguided_alone else eager_loops.GUIDED[form](w, u, c)

        wanted = eager_loops.sample(solver, velocity, noise, times)
        fns = [Counted(model) for model in plain]
        fm = FlowMatching(DIMS, solver, 10, backend=backend, guidance_form=form, inference_guidance_weight=weight)
        got, _ = fm.sample(
            BATCH, fns[0], noise=noise, unguided_step_fn=fns[1], use_classifier_free_guidance=True,
            return_all_steps=True, skip_irrelevant_model=True,
        )  # fmt: skip
        assert_same_bits(got, wanted)
        ends = list(itertools.pairwise(times.tolist()))
        evaluated = itertools.chain(*ends) if solver == "heun" else [begin for begin, _ in ends]
        weights = [weight(t) for t in evaluated]
        assert len(fns[0].calls) == sum(w != unguided_alone for w in weights)
        assert len(fns[1].calls) == sum(w != guided_alone for w in weights)
        assert len(fns[1].calls) < len(weights)


def test_the_interval_of_the_docs():
    """lambda t: 3.0 if 0.2 < t < 0.8 else 1.0, on ten steps of Euler: 0.2 is float32's, a little over 0.2."""
    fns = [Counted(model) for model in models()]
    FlowMatching(DIMS).sample(
        BATCH, fns[0], unguided_step_fn=fns[1], use_classifier_free_guidance=True, skip_irrelevant_model=True,
        inference_guidance_weight=lambda t: 3.0 if 0.2 < t < 0.8 else 1.0,
    )  # fmt: skip
    within = [t for t in torch.linspace(0, 1, 11).tolist() if 0.2 < t < 0.8]
    assert len(fns[0].calls) == 10 and fns[1].calls == within


def test_a_model_that_is_left_out_may_share_a_buffer(backend):
    """The buffer check of two models is not led astray by steps of one."""
    plain, buffer = models(), torch.empty(BATCH, *DIMS)
    fns = [lambda x, t, model=model: buffer.copy_(model(x, t)) for model in plain]
    weights = (1.0, 0.0, 1.7, 1.0, 1.7, 0.0)

    def velocity(x, t, i):
        c, u = (model(x, t) for model in plain)
        return {1.0: c, 0.0: u}.get(weights[i], (1 - weights[i]) * u + weights[i] * c)

    wanted = eager_loops.sample("ab2", velocity, start(), TIMES)
    assert_same_bits(
        ours("interpolate", weights, fns, start(), "ab2", backend=backend, skip_irrelevant_model=True), wanted
    )


@pytest.mark.parametrize("weight, name", [(1.0, "step_fn"), (0.0, "unguided_step_fn")])
@pytest.mark.parametrize("returned, error", [(None, TypeError), (torch.zeros(7), ValueError), ("bad", TypeError)])
def test_the_model_that_is_left_is_checked(weight, name, returned, error):
    fm = FlowMatching(DIMS, use_classifier_free_guidance=True, inference_guidance_weight=weight)
    with pytest.raises(error, match=rf"^{name} returned .*wanted .*\[4, 5, 3\]"):
        fm.sample(BATCH, lambda x, t: returned, unguided_step_fn=lambda x, t: returned, skip_irrelevant_model=True)


def test_a_model_that_is_left_may_return_what_expands(backend):
    fns = lambda x, t: torch.sin(x[:, :1]), lambda x, t: torch.tensor(0.25)
    for weight, model in ((1.0, fns[0]), (0.0, fns[1])):
        wanted = eager_loops.sample("euler", lambda x, t, i, m=model: m(x, t), start(), TIMES)
        got = ours("interpolate", weight, fns, start(), backend=backend, skip_irrelevant_model=True)
        assert_same_bits(got, wanted)


# ---- both velocities from one call ----


def combined(fns):
    return lambda x, t: torch.cat([fns[1](x, t), fns[0](x, t)])


#: combined_guidance -> what step_fn returns, of the guided and the unguided model.
ORDERS = {True: combined, "unguided_first": combined, "guided_first": lambda fns: combined(fns[::-1])}


@every_dtype
@every_form
def test_combined_is_two_calls(backend, form, dtypes):
    state, velocity = dtypes
    fns = models(velocity)
    for solver, batch_size, weight in (("euler", 4, 1.7), ("heun", 1, -0.5), ("ab2", 3, 1.0), ("euler", 0, 2.0)):
        noise = start(state, batch_size)
        wanted = eager(form, weight, fns, noise, solver)
        for order, both in ORDERS.items():
            got = ours(form, weight, [both(fns)], noise, solver, backend=backend, combined_guidance=order)
            assert_same_bits(got, wanted, f"{solver}, B = {batch_size}, {order}")


def test_combined_with_changing_weights(backend):
    fns, noise = models(), start()
    for weight, taken in ((PER_STEP, lambda i, t: PER_STEP[i]), (of_time, lambda i, t: of_time(t.flatten()[0].item()))):
        got = ours("from_unguided", weight, [combined(fns)], noise, "heun", backend=backend, combined_guidance=True)
        assert_same_bits(got, eager("from_unguided", taken, fns, noise, "heun"))


def recorded(monkeypatch, backend):
    """What the kernel of a backend is called with."""
    kernel, calls = dispatch.BACKENDS[backend].load(), []
    counting = dispatch.BACKENDS[backend]._replace(load=lambda: lambda o: (calls.append(o), kernel(o))[1])
    monkeypatch.setitem(dispatch.BACKENDS, backend, counting)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_solver
def test_combined_is_read_where_it_is(backend, solver, dtype, monkeypatch):
    """The kernel gets both halves of step_fn's own memory: no copy is made; and one launch an evaluation."""
    calls, returned, plain = recorded(monkeypatch, backend), [], models(dtype)

    def step_fn(x, t):
        returned.append(combined(plain)(x, t))
        return returned[-1]

    fm = FlowMatching(DIMS, solver, STEPS, backend=backend, use_classifier_free_guidance=True)
    fm.sample(BATCH, step_fn, noise=start(), combined_guidance=True, inference_guidance_weight=1.7)
    assert len(calls) == len(returned) == fm.nfe(guided=False)
    for (_, _, v, u, *_), both in zip(calls, returned, strict=True):
        assert u.data_ptr() == both.data_ptr()
        assert v.data_ptr() == both[BATCH:].data_ptr() != both.data_ptr()
        assert v.shape == u.shape == (BATCH, *DIMS)


@every_solver
@every_form
def test_combined_in_one_buffer(backend, form, solver):
    """A graph that is replayed returns the same memory each time."""
    fns, buffer = models(), torch.empty(2 * BATCH, *DIMS)

    def step_fn(x, t):
        return buffer.copy_(combined(fns)(x, t))

    got = ours(form, 1.7, [step_fn], start(), solver, backend=backend, combined_guidance=True)
    assert_same_bits(got, eager(form, 1.7, fns, start(), solver))


BOTH = {
    "transposed": lambda both: both.transpose(0, 2).contiguous().transpose(0, 2),
    "sliced": lambda both: torch.stack([both, -both], dim=-1)[..., 0],
    "every other": lambda both: both.repeat_interleave(2, dim=0)[::2],
    "negative": lambda both: (both * -1j).conj().imag,
    "Parameter": lambda both: torch.nn.Parameter(both),
    "requires grad": lambda both: both.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", BOTH)
def test_combined_of_any_layout(backend, layout):
    fns = models()
    step_fn = lambda x, t: BOTH[layout](combined(fns)(x, t))  # noqa: E731
    assert_same_bits(BOTH[layout](torch.arange(24.0).view(2, 4, 3)), torch.arange(24.0).view(2, 4, 3))
    got = ours("interpolate", 1.7, [step_fn], start(), "ab2", backend=backend, combined_guidance=True)
    assert not got.requires_grad
    assert_same_bits(got, eager("interpolate", 1.7, fns, start(), "ab2"))


@pytest.mark.parametrize("cut", [(slice(None), slice(0, 1)), (..., slice(0, 1)), (slice(None), slice(0, 1), slice(1))],
                         ids=["[2B, 1, 3]", "[2B, 5, 1]", "[2B, 1, 1]"])  # fmt: skip
def test_combined_that_expands(backend, cut):
    fns = [lambda x, t, model=model: model(x, t)[cut] for model in models()]
    got = ours("from_guided", 1.7, [combined(fns)], start(), backend=backend, combined_guidance=True)
    assert_same_bits(got, eager("from_guided", 1.7, fns, start()))


def test_combined_of_x_itself(backend):
    """At B = 1 both halves may be views of the state that the step is about to write."""
    for batch_size, step_fn in ((1, lambda x, t: x.expand(2, *DIMS)), (2, lambda x, t: x[:1].expand(4, *DIMS))):
        noise = start(batch_size=batch_size)
        alone = (lambda x, t: x) if batch_size == 1 else (lambda x, t: x[:1].expand(2, *DIMS).clone())
        got = ours("from_unguided", 1.7, [step_fn], noise, "heun", backend=backend, combined_guidance=True)
        assert_same_bits(got, eager("from_unguided", 1.7, (alone, alone), noise, "heun"))


# What step_fn returns for a state [4, 5, 3] -> the exception, and what it says.
V = torch.zeros(8, 5, 3)
NOT_BOTH = {
    "odd": (V[:7], ValueError, r"\[7, 5, 3\].*\[8, 5, 3\]"),
    "one batch": (V[:4], ValueError, r"\[4, 5, 3\].*doubled batch.*\[8, 5, 3\]"),
    "three batches": (torch.zeros(12, 5, 3), ValueError, r"\[12, 5, 3\].*\[8, 5, 3\]"),
    "empty": (V[:0], ValueError, r"\[0, 5, 3\].*\[8, 5, 3\]"),
    "0-dim": (torch.tensor(1.0), ValueError, r"\[\].*\[8, 5, 3\]"),
    "a rank more": (V[None], ValueError, r"\[1, 8, 5, 3\].*\[8, 5, 3\]"),
    "a rank less": (V[:, 0], ValueError, r"\[8, 3\].*\[8, 5, 3\]"),
    "stacked": (V.view(2, 4, 5, 3), ValueError, r"\[2, 4, 5, 3\].*\[8, 5, 3\]"),
    "wrong inside": (torch.zeros(8, 5, 4), ValueError, r"\[4, 5, 4\].*\[4, 5, 3\]"),
    "float64": (V.double(), TypeError, r"float64.*widen.*float32"),
    "int64": (V.long(), TypeError, r"int64.*float32"),
    "complex": (V * 1j, TypeError, r"complex64.*float32"),
    "sparse": (V.to_sparse(), TypeError, r"doubled batch.*\[8, 5, 3\]"),
    "another device": (V.to("meta"), ValueError, r"meta.*cpu"),
    "None": (None, TypeError, r"None.*cat\(\[unguided, guided\]\).*\[8, 5, 3\]"),
    "a pair": ((V[:4], V[4:]), TypeError, r"tuple.*cat\(\[unguided, guided\]\).*\[8, 5, 3\]"),
    "an array": (V.numpy(), TypeError, r"ndarray.*\[8, 5, 3\]"),
}


@pytest.mark.parametrize("case", NOT_BOTH)
def test_what_is_no_doubled_batch(backend, case):
    returned, error, words = NOT_BOTH[case]
    calls, fns = [], models()

    def step_fn(x, t):
        calls.append(t)
        return returned if len(calls) == 3 else combined(fns)(x, t)

    fm = FlowMatching(DIMS, num_inference_steps=STEPS, backend=backend, use_classifier_free_guidance=True)
    for all_steps in (False, True):
        calls.clear()
        with pytest.raises(error, match=rf"(?s)^step_fn returned .*{words}"):
            fm.sample(BATCH, step_fn, return_all_steps=all_steps, combined_guidance=True)
        assert len(calls) == 3
    got = fm.sample(BATCH, combined(fns), noise=start(), combined_guidance=True, inference_guidance_weight=1.7)
    assert_same_bits(got, eager("interpolate", 1.7, fns, start())[:, -1])
    with pytest.raises(ValueError, match=r"wanted cat\(\[guided, unguided\]\), a doubled batch"):
        fm.sample(BATCH, lambda x, t: x, combined_guidance="guided_first")


# ---- modes and compilers ----

MODES = {
    "per step": {"inference_guidance_weight": PER_STEP[:3]},
    "skip": {"inference_guidance_weight": (1.0, 1.7, 0.0), "skip_irrelevant_model": True},
    **{form: {"inference_guidance_weight": 1.7, "guidance_form": form} for form in FORMS},
}


def run_guided(case, noise, device="cpu", fm=None, all_steps=False):
    fns = models()
    fm = fm or FlowMatching(DIMS, "ab2", 3)
    keywords = {"unguided_step_fn": fns[1]} | MODES.get(case, {"inference_guidance_weight": 1.7})
    if case == "combined":
        fns, keywords = [combined(fns[::-1])], {"combined_guidance": "guided_first", "inference_guidance_weight": 1.7}
    out = fm.sample(
        BATCH, fns[0], device, all_steps, noise=noise, use_classifier_free_guidance=True, **keywords
    )  # fmt: skip
    return out[0] if all_steps else out


@pytest.mark.parametrize("case", ["skip", "from_unguided", "combined"])
def test_compile(case):
    torch._dynamo.reset()
    fm, all_steps = FlowMatching(DIMS, "ab2", 3), case != "skip"
    run = lambda noise: run_guided(case, noise, fm=fm, all_steps=all_steps)  # noqa: E731
    assert_same_bits(torch.compile(run, backend="aot_eager", fullgraph=True)(start()), run(start()))


@pytest.mark.parametrize("case", [*MODES, "combined"])
def test_fake_tensors(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    fm = FlowMatching(DIMS, "ab2", 3)
    for device, all_steps in itertools.product(("cpu", "cuda"), (False, True)):
        with FakeTensorMode():
            got = run_guided(case, None, device, fm, all_steps)
        assert got.device.type == device and got.dtype == torch.float32
        assert got.shape == ((BATCH, 4, *DIMS) if all_steps else (BATCH, *DIMS))
    assert not solvers.cache._tables
    assert_same_bits(run_guided(case, start(), fm=fm), run_guided(case, start()))


@pytest.mark.parametrize("case", [*MODES, "combined"])
def test_inference_mode_then_grad_mode(backend, case):
    wanted = run_guided(case, start())
    fm = FlowMatching(DIMS, "ab2", 3, backend=backend)
    for mode in (torch.inference_mode, torch.enable_grad, torch.inference_mode):
        with mode():
            assert_same_bits(run_guided(case, start(), fm=fm), wanted)
            assert_same_bits(run_guided(case, start(), fm=fm, all_steps=True)[:, -1], wanted)


@pytest.mark.parametrize("case", [*MODES, "combined"])
def test_vmap(case):
    noises = torch.stack([start(), -start()])
    got = torch.func.vmap(lambda noise: run_guided(case, noise))(noises)
    assert_same_bits(got, torch.stack([run_guided(case, noise) for noise in noises]))


def test_subclasses_halfway():
    """A velocity that is a tensor subclass from the second step on; then nothing is written in place."""
    from torch.testing._internal.two_tensor import TwoTensor

    plain, calls = models(), []

    def step_fn(x, t):
        calls.append(t)
        v = combined(plain)(x.a if isinstance(x, TwoTensor) else x, t)
        return TwoTensor(v, v.clone()) if len(calls) > 1 else v

    got = FlowMatching(DIMS, "ab2", STEPS).sample(
        BATCH, step_fn, noise=start(), use_classifier_free_guidance=True, combined_guidance=True,
        inference_guidance_weight=1.7, return_all_steps=True,
    )[0]  # fmt: skip
    got = got.a if isinstance(got, TwoTensor) else got
    assert_same_bits(got, eager("interpolate", 1.7, plain, start(), "ab2"))
