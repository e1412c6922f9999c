"""Noise and velocities of tensor subclasses: DTensor, MaskedTensor and others, as the published loop takes them."""

import os
import subprocess
import sys

import published
import pytest
import torch
import torch.distributed as dist
from operands import assert_same_bits
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

from flowmatch_kernels import FlowMatching, use_backend
from flowmatch_kernels.ops import subclasses

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors is in prototype stage"),
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed"),
]
HERE = os.path.dirname(__file__)
SHAPE, STEPS = (4, 3, 2), 4


# ---- DTensor ----


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    import sharded_cases

    assert not dist.is_initialized()
    yield sharded_cases.ranks(0, 1, str(tmp_path_factory.mktemp("ranks") / "store"))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", range(3))
def test_one_rank(mesh, placement, backend):
    import sharded_cases

    sharded_cases.assert_sampled_as_plain(mesh, sharded_cases.PLACEMENTS[placement], backend)


def test_the_op_on_one_rank(mesh):
    import sharded_cases

    sharded_cases.assert_stepped_as_plain(mesh)


def test_two_ranks(tmp_path):
    """With shards of two sizes, and one that is moved to where the state's is."""
    command = [sys.executable, os.path.join(HERE, "sharded_cases.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, os.path.dirname(HERE)])}
    store = str(tmp_path / "store")
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", store],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=300)
            assert out == "as plain\n", error
    finally:
        for process in processes:
            process.kill()


def test_gradients_of_the_op(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    base, v, coefficients = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(1, 8)
    leaves = [base.clone().requires_grad_(), v.clone().requires_grad_()]
    sharded = [distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (base, v)]
    for operands in (leaves, sharded):
        torch.ops.flowmatch_kernels.fused_step(*operands, None, None, None, None, coefficients, 0).sum().backward()
    for x, y in zip(leaves, sharded, strict=True):
        assert_same_bits(y.grad.full_tensor(), x.grad)


def test_what_a_dtensor_cannot_be(mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor.experimental import implicit_replication

    fm, x = FlowMatching(SHAPE[1:], "ab2", STEPS), torch.randn(SHAPE)
    sharded, pending = (DTensor.from_local(x, mesh, [placement]) for placement in (Replicate(), Partial()))
    for noise, v, error in (
        (sharded, x, "v is a plain tensor.*DTensor.*all, or none"),
        (x, sharded, "base is a plain tensor.*DTensor.*all, or none"),
        (pending, sharded, "pending sum.*redistribute"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            fm.sample(4, lambda x, t, v=v: v, noise=noise)
    wanted = fm.sample(4, lambda *, t, **_: x * t, noise=x)
    with implicit_replication():  # which the loop, too, needs for plain tensors
        for noise, v in ((sharded, x), (x, sharded)):
            got = fm.sample(4, lambda *, t, v=v, **_: v * t, noise=noise)
            assert_same_bits(got.full_tensor(), wanted)
    got = fm.sample(4, lambda x, t: pending, noise=sharded)  # summed first
    assert_same_bits(got.full_tensor(), fm.sample(4, lambda **_: x, noise=x))


def test_rows_of_their_own_of_a_dtensor(mesh):
    """A replicated state is stepped on each rank as a whole; of a sharded one the rows are not known."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    subclasses.register_dtensor()
    op = torch.ops.flowmatch_kernels.fused_step
    x, table = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.randn(1, 4, 8)
    wanted = op(x, x, None, None, None, None, table, 0)
    coefficients = DTensor.from_local(table, mesh, [Replicate()])
    whole = distribute_tensor(x, mesh, [Replicate()])
    assert_same_bits(op(whole, whole, None, None, None, None, coefficients, 0).full_tensor(), wanted)
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    with pytest.raises(NotImplementedError, match="step each shard by itself, with its rows"):
        op(sharded, sharded, None, None, None, None, coefficients, 0)
    for sizes in ((4,), (4, 3)):  # of samples, and of tokens
        times = torch.linspace(0, 1, 5).expand(*sizes, 5) ** torch.rand(*sizes, 1)
        fm, x = FlowMatching((3, 2), "ab2"), torch.randn(4, 3, 2)
        wanted = fm.sample(4, lambda x, t: x * 0.5, noise=x, time_steps=times)
        whole = distribute_tensor(x, mesh, [Replicate()])
        got = fm.sample(4, lambda x, t: x * 0.5, noise=whole, time_steps=times)
        assert_same_bits(got.full_tensor(), wanted)
        with pytest.raises(NotImplementedError, match="step each shard by itself, with its rows"):
            fm.sample(4, lambda x, t: x * 0.5, noise=distribute_tensor(x, mesh, [Shard(0)]), time_steps=times)


def test_compiled_dtensor(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    fm, x = FlowMatching(SHAPE[1:], "ab2", STEPS), torch.randn(SHAPE)
    torch._dynamo.reset()
    run = torch.compile(lambda x: fm.sample(4, lambda x, t: x * 0.5, noise=x), backend="aot_eager", fullgraph=True)
    got = run(distribute_tensor(x, mesh, [Shard(2)]))
    assert got.placements == (Shard(2),)
    assert_same_bits(got.full_tensor(), fm.sample(4, lambda x, t: x * 0.5, noise=x))


@pytest.mark.parametrize("first", ["tensor", "package"])
def test_the_rule_is_made_where_dtensor_is_imported(first):
    """Importing the package does not import torch.distributed.tensor."""
    imports = ["import torch.distributed.tensor", "import flowmatch_kernels"]
    code = f"""
import sys
{(imports if first == "tensor" else imports[::-1])[0]}
before = "torch.distributed.tensor" in sys.modules
import flowmatch_kernels, torch
flowmatch_kernels.FlowMatching(2).sample(1, lambda x, t: x)
print(before, "torch.distributed.tensor" in sys.modules, flowmatch_kernels.ops.subclasses._registered)
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == ("True True True\n" if first == "tensor" else "False False False\n"), done.stderr


# ---- MaskedTensor ----


def field(x, t):
    return torch.sin(3 * x)


def other(x, t):
    return torch.cos(2 * x)


def masked():
    return torch.randn(SHAPE), torch.rand(SHAPE) > 0.3


def assert_masked(got, wanted, mask):
    """The same where the mask is True; elsewhere there is nothing to compare."""
    mask = mask.expand(got.shape) if mask.dim() == got.dim() else mask.unsqueeze(1).expand(got.shape)
    assert torch.equal(got.get_mask(), mask)
    assert_same_bits(got.get_data()[mask], wanted[mask])


@pytest.mark.parametrize("solver", ["euler", "ab2", "midpoint", "heun"])
@pytest.mark.parametrize("all_steps", [False, True], ids=["last", "all"])
def test_masked_noise(solver, all_steps):
    data, mask = masked()
    fm = FlowMatching(SHAPE[1:], solver, STEPS)
    guidance = {"unguided_step_fn": other, "use_classifier_free_guidance": True, "inference_guidance_weight": 1.5}
    for arguments in ({}, guidance, {"temperature": 0.7}, {"constraint": lambda x, t: torch.sin(x)}):
        runs = [
            fm.sample(4, field, noise=noise, return_all_steps=all_steps, **arguments)
            for noise in (masked_tensor(data, mask), data)
        ]
        got, wanted = (run[0] if all_steps else run for run in runs)
        assert_masked(got, wanted, mask)


def test_the_published_loop_takes_masked_noise():
    data, mask = masked()
    noise = masked_tensor(data, mask)
    wanted = published.sample(4, field, SHAPE[1:], STEPS, noise=noise)
    got = FlowMatching(SHAPE[1:], num_inference_steps=STEPS).sample(4, field, noise=noise)
    assert_masked(got, wanted.get_data(), mask)


@pytest.mark.parametrize("when", [0, 2])
def test_masked_velocity(when):
    """From the first call on, and from a later one."""
    data, mask = masked()
    calls = []

    def step_fn(x, t):
        calls.append(t)
        v = torch.sin(3 * data) * t
        return masked_tensor(v, mask) if len(calls) > when else v

    fm = FlowMatching(SHAPE[1:], "ab2", STEPS)
    got = fm.sample(4, step_fn, noise=data)
    assert_masked(got, fm.sample(4, lambda x, t: torch.sin(3 * data) * t, noise=data), mask)


@pytest.mark.parametrize("how", ["argument", "constructor", "context", "environment"])
def test_a_backend_by_name_cannot_serve(how, monkeypatch):
    data, mask = masked()
    fm = FlowMatching(SHAPE[1:], backend="cpu" if how == "constructor" else "auto")
    if how == "environment":
        monkeypatch.setenv("FLOWMATCH_KERNELS_BACKEND", "cpu")

    def run(noise, step_fn):
        with use_backend("cpu" if how == "context" else "auto"):
            return fm.sample(4, step_fn, noise=noise, backend="cpu" if how == "argument" else None)

    for noise, step_fn in (
        (masked_tensor(data, mask), field),
        (data, lambda x, t: masked_tensor(torch.sin(data), mask)),
    ):
        with pytest.raises(RuntimeError, match=r"backend 'cpu' was asked for and cannot be used.*MaskedTensor"):
            run(noise, step_fn)
    run(TwoTensor(data, data.clone()), field)  # it takes every op


def test_the_reference_by_name_serves():
    data, mask = masked()
    fm = FlowMatching(SHAPE[1:], backend="reference")
    assert_masked(fm.sample(4, field, noise=masked_tensor(data, mask)), fm.sample(4, field, noise=data), mask)


# ---- what cannot work ----


class Refuses(torch.Tensor):
    """A subclass without an op, by name."""

    refused = ""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == cls.refused:
            raise NotImplementedError("depths")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize(("refused", "said"), [
    ("to", "a copy of the noise is not possible with a Refuses: depths"),
    ("stack", "a trajectory is not possible with a Refuses: depths"),
    ("add", "a step in plain PyTorch is not possible with a Refuses: depths"),
])  # fmt: skip
def test_what_cannot_work_says_what(refused, said, monkeypatch):
    monkeypatch.setattr(Refuses, "refused", refused)
    fm, noise = FlowMatching(SHAPE[1:]), torch.randn(SHAPE).as_subclass(Refuses)
    with pytest.raises(TypeError, match=said):
        fm.sample(4, lambda x, t: x, noise=noise, return_all_steps=True)


def test_masks_that_differ():
    data, mask = masked()
    with pytest.raises(TypeError, match="not possible with a MaskedTensor: Input masks must match"):
        FlowMatching(SHAPE[1:]).sample(4, lambda x, t: masked_tensor(data, ~mask), noise=masked_tensor(data, mask))


def test_a_masked_velocity_for_noise_in_another_format():
    """MaskedTensor has no permute."""
    noise = torch.randn(4, 2, 3).mT
    with pytest.raises(TypeError, match="format of this noise is not possible with a MaskedTensor"):
        FlowMatching(SHAPE[1:]).sample(4, lambda x, t: masked_tensor(torch.sin(x), x > 0), noise=noise)


def test_what_is_foreign():
    class Named(torch.Tensor):
        pass

    x = torch.zeros(2)
    assert subclasses.foreign([x, None, 3, torch.nn.Parameter(x), x.as_subclass(Named)]) is None
    assert subclasses.foreign([x, x.as_subclass(Refuses)]) is Refuses
    assert subclasses.foreign([TwoTensor(x, x)]) is TwoTensor
