"""lerobot's `euler_integrate`, ours in its place: the same calls and bits, with real-time chunking.

The oracle is lerobot's own function where it is installed, else the loop of `lerobot_loop`.
"""

import importlib
import importlib.util
import inspect
import sys
import types

import lerobot_loop
import pytest
import torch
from operands import assert_same_bits
from test_package import fresh

from flowmatch_kernels.integrations import lerobot
from flowmatch_kernels.integrations.lerobot import euler_integrate

CALLERS = ("pi0", "pi05", "smolvla", "eo1")


@pytest.fixture
def module(monkeypatch):
    """The module that defines lerobot's function, and one for each policy that imported it by name."""
    if importlib.util.find_spec("lerobot") is not None:
        return importlib.import_module(lerobot.MODULE)
    parts = lerobot.MODULE.split(".")
    for k in range(len(parts)):
        name = ".".join(parts[: k + 1])
        found = types.ModuleType(name)
        found.__path__, found.__spec__ = [], importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, found)
    function = types.FunctionType(lerobot_loop.euler_integrate.__code__, vars(lerobot_loop))
    function.__kwdefaults__ = lerobot_loop.euler_integrate.__kwdefaults__
    found.euler_integrate = function
    for policy in CALLERS:
        name = f"lerobot.policies.{policy}.modeling_{policy}"
        user = types.ModuleType(name)
        user.euler_integrate = function
        monkeypatch.setitem(sys.modules, name, user)
    return found


def field(x, t):
    return torch.sin(3 * x) * 2 + (t[..., None] if t.dim() == 2 else t[:, None, None]) * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_bits(module, steps, dtype):
    noise = torch.randn(3, 50, 32).to(dtype)
    kept = noise.clone()

    for velocity in (dtype, torch.bfloat16) if dtype.itemsize > 2 else (dtype,):

        def denoise(x, t, velocity=velocity):
            return field(x, t).to(velocity)

        wanted = module.euler_integrate(denoise, noise, steps)
        got = euler_integrate(denoise, noise, steps)
        assert_same_bits(got, wanted)
    assert_same_bits(noise, kept)


def test_either_way(module):
    """By its own table and by sample(): noise in another layout; and a model that writes to its time, twice."""

    def writes(x, t):
        t.mul_(2)
        return x * t[:, None, None]

    for batch_size, transposed in ((1, False), (3, False), (3, True)):
        noise = torch.randn(batch_size, 5, 4)
        noise = noise.transpose(1, 2) if transposed else noise
        wanted = module.euler_integrate(lambda x, t: x * (2 * t)[:, None, None], noise, 7)
        for _ in range(2):
            assert_same_bits(euler_integrate(lambda x, t: x * (2 * t)[:, None, None], noise, 7), wanted)
            if not transposed:
                assert_same_bits(euler_integrate(writes, noise, 7), wanted)
    with pytest.raises(ValueError, match=r"returned a tensor of shape \[3, 2\]"):
        euler_integrate(lambda x, t: x[:, 0, :2], noise.contiguous(), 7)


@pytest.mark.parametrize("steps", [10, 23, 1000])
def test_times(module, steps):
    """float32 [B], the bits of 1 + k*dt computed in Python."""
    seen = []
    for integrate in (module.euler_integrate, euler_integrate):
        seen.append([])
        integrate(lambda x, t: seen[-1].append(t.clone()) or x, torch.randn(2, 3, 4), steps)
    for got, wanted in zip(*seen, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("debug", [False, True], ids=["quiet", "debug"])
@pytest.mark.parametrize("left_over", [False, True], ids=["first chunk", "guided"])
def test_real_time_chunking(module, left_over, debug):
    noise, before = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    results = []
    for integrate in (module.euler_integrate, euler_integrate):
        processor = lerobot_loop.Processor(debug)
        with torch.no_grad():
            x = integrate(
                field,
                noise,
                7,
                rtc_processor=processor,
                rtc_enabled=True,
                inference_delay=3,
                prev_chunk_left_over=before if left_over else None,
                execution_horizon=25,
            )
        results.append((x, processor))
    (wanted, theirs), (got, ours) = results
    assert_same_bits(got, wanted)
    assert len(ours.calls) == 7
    for a, b in zip(ours.calls, theirs.calls, strict=True):
        assert_same_bits(a[0], b[0])
        assert a[1:] == b[1:]
    check_tracked(ours, theirs, 7 if debug else 0)


def check_tracked(ours, theirs, steps):
    assert len(ours.tracked) == steps
    for a, b in zip(ours.tracked, theirs.tracked, strict=True):
        assert a[0] == b[0]
        assert_same_bits(a[1], b[1])
        assert_same_bits(a[2], b[2])


def test_debug_tracking_without_guidance(module):
    noise, results = torch.randn(2, 6, 4), []
    for integrate in (module.euler_integrate, euler_integrate):
        processor = lerobot_loop.Processor(debug=True)
        results.append((integrate(field, noise, 4, rtc_processor=processor), processor))
    (wanted, theirs), (got, ours) = results
    assert_same_bits(got, wanted)
    assert not ours.calls
    check_tracked(ours, theirs, 4)
    assert_same_bits(ours.tracked[-1][1], got)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("debug", [False, True], ids=["quiet", "debug"])
def test_hard_prefix(module, debug, width):
    if "hard_prefix" not in inspect.signature(module.euler_integrate).parameters:
        pytest.skip("this lerobot has no hard prefix")
    noise, prefix = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    mask = (torch.arange(6) < torch.tensor([[0], [2], [6]])).unsqueeze(-1).expand(3, 6, width)
    results = []
    for integrate in (module.euler_integrate, euler_integrate):
        seen, processor = [], lerobot_loop.Processor(debug)

        def denoise(x, t, seen=seen):
            seen.append((x.clone(), t.clone()))
            return field(x, t)

        x = integrate(denoise, noise, 5, hard_prefix=prefix, hard_prefix_mask=mask, rtc_processor=processor)
        results.append((x, processor, seen))
    (wanted, theirs, wanted_seen), (got, ours, seen) = results
    assert_same_bits(got, wanted)
    assert torch.equal(got[2], prefix[2])
    for (x, t), (wanted_x, wanted_t) in zip(seen, wanted_seen, strict=True):
        assert_same_bits(x, wanted_x)
        assert_same_bits(t, wanted_t)
    check_tracked(ours, theirs, 5 if debug else 0)
    with pytest.raises(ValueError, match="hard_prefix_mask is required"):
        euler_integrate(field, noise, 5, hard_prefix=prefix)


def test_gradients(module):
    """In the caller's grad mode, as the loop's."""
    gradients = []
    for integrate in (module.euler_integrate, euler_integrate):
        noise = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(5)).requires_grad_()
        weight = torch.full((4,), 0.5, requires_grad=True)
        x = integrate(lambda x, t, w=weight: field(x, t) * w, noise, 3)
        gradients.append(torch.autograd.grad(x.square().sum(), (noise, weight)))
        with torch.no_grad():
            assert not integrate(lambda x, t, w=weight: x * w, noise.detach(), 3).requires_grad
            w = weight.detach()  # forward mode has no grad mode
            run = lambda x, integrate=integrate, w=w: integrate(lambda x, t: field(x, t) * w, x, 3)  # noqa: E731
            gradients[-1] += torch.func.jvp(run, (noise.detach(),), (noise.detach(),))
    for got, wanted in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # sums in another order


def test_under_a_16_bit_default_dtype(module):
    torch.set_default_dtype(torch.bfloat16)
    noise = torch.randn(2, 6, 4, dtype=torch.float32)
    assert_same_bits(euler_integrate(field, noise, 10), module.euler_integrate(field, noise, 10))


def test_compiles(module):
    """pi0, pi05 and smolvla compile the method that calls it."""
    noise = torch.randn(2, 6, 4)
    compiled = torch.compile(lambda noise: euler_integrate(field, noise, 3), backend="eager")
    with torch.no_grad():
        assert_same_bits(compiled(noise), module.euler_integrate(field, noise, 3))


def test_signature(module):
    theirs, ours = (inspect.signature(f).parameters for f in (module.euler_integrate, euler_integrate))
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


def test_patch(module):
    theirs = module.euler_integrate
    users = [user for name in CALLERS if (user := sys.modules.get(f"lerobot.policies.{name}.modeling_{name}"))]
    with lerobot.patch() as patched:
        assert all(user.euler_integrate is euler_integrate for user in (module, *users))
        assert {user.__name__ for user in (module, *users)} == set(patched.modules)
    assert all(user.euler_integrate is theirs for user in (module, *users))
    assert lerobot.euler_integrate is euler_integrate


def test_patch_refuses_what_it_does_not_know(module, monkeypatch):
    theirs = module.euler_integrate
    monkeypatch.setattr(module, "euler_integrate", lambda *a, **k: theirs(*a, **k) * 2)
    with pytest.raises(RuntimeError, match=r"lerobot .* takes a, k: not known here"):
        lerobot.patch()

    def other(denoise_fn, noise, num_steps):
        return theirs(lambda x, t: denoise_fn(x, t + 1e-6), noise, num_steps)

    monkeypatch.setattr(module, "euler_integrate", other)
    with pytest.raises(RuntimeError, match=r"computes something else"):
        lerobot.patch()
    assert module.euler_integrate is other
    monkeypatch.delattr(module, "euler_integrate")
    with pytest.raises(ImportError, match=r"lerobot .* has no lerobot\.policies.*\.euler_integrate"):
        lerobot.patch()


def test_without_lerobot():
    code = """
import sys
from flowmatch_kernels.integrations import lerobot
assert "lerobot" not in sys.modules
sys.modules.pop("lerobot", None)
import importlib.util
importlib.util.find_spec = lambda name: None
try:
    lerobot.patch()
except ImportError as error:
    print(error)
"""
    assert fresh(code) == "lerobot is not installed: pip install 'lerobot>=0.6.1'\n"


@pytest.mark.integrations
def test_with_lerobot_itself():
    """Each policy that imports lerobot's function by name gets ours, and puts it back."""
    module = importlib.import_module(lerobot.MODULE)
    policies = [importlib.import_module(f"lerobot.policies.{name}.modeling_{name}") for name in CALLERS]
    theirs = module.euler_integrate
    with lerobot.patch():
        assert all(policy.euler_integrate is euler_integrate for policy in policies)
    assert all(policy.euler_integrate is theirs for policy in policies)
