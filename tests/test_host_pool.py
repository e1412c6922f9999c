"""Blocks of host memory: counted exactly, reused, bounded; and safe in threads, after a fork and at the end."""

import gc
import os
import pickle
import subprocess
import sys
import threading

import numpy
import pytest
import torch
from operands import assert_same_bits
from test_ownership import WAYS

from flowmatch_kernels import FlowMatching, empty_cache
from flowmatch_kernels.ops import native

MIB = 1 << 20
DIMS = (50, 1024)
BATCH = 6  # 1.2 MB a state


def velocity(x, t):
    return torch.sin(x) * t - x


@pytest.fixture(autouse=True, scope="module")
def _small_heap():
    """What other tests have imported stays: each collection here would go through it, for half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def empty():
    gc.collect()
    empty_cache()
    limit = native.host_pool().limit
    yield
    native._C.set_pool_limit(limit)


def in_use():
    gc.collect()
    return native.host_pool().in_use


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_hold_a_state_is_counted(way):
    """While it is held, its memory is in use and nobody else's; let go, it is not: no count is lost or too many."""
    before, held = in_use(), []

    def step_fn(x, t):
        if not held:
            held.append(WAYS[way](x))
        return velocity(x, t)

    out = FlowMatching(DIMS).sample(BATCH, step_fn, noise=torch.randn(BATCH, *DIMS))
    moved_or_dropped = ("weak_reference", "saved_file", "shared_memory", "weak_reference_in_a_cycle")
    state = out.numel() * 4
    assert in_use() - before >= state * (1 if way in moved_or_dropped else 2)
    held.pop()()  # a thread that waits ends when it is read
    if way == "class_attribute":
        WAYS[way].__globals__["CLASS_ATTRIBUTE"].states.clear()
    assert state <= in_use() - before < 2 * state
    del out
    assert in_use() == before


def test_a_trajectory_is_reused_when_it_is_dropped():
    fm, noise = FlowMatching(DIMS), torch.randn(BATCH, *DIMS)
    states, _ = fm.sample(BATCH, velocity, return_all_steps=True, noise=noise)
    address, wanted = states.data_ptr(), states.clone()
    view = states[1]
    del states
    kept, _ = fm.sample(BATCH, velocity, return_all_steps=True, noise=-noise)
    assert kept.data_ptr() != address, "a view still holds the first trajectory"
    assert_same_bits(view, wanted[1])
    del view
    again, _ = fm.sample(BATCH, velocity, return_all_steps=True, noise=noise)
    assert again.data_ptr() == address
    assert_same_bits(again, wanted)


def test_the_pool_is_bounded_and_can_be_emptied():
    fm = FlowMatching(DIMS)
    fm.sample(BATCH, velocity)
    assert native.host_pool().idle >= BATCH * 50 * 1024 * 4
    empty_cache()
    assert native.host_pool().idle == 0
    native._C.set_pool_limit(MIB // 2)  # less than a state
    fm.sample(BATCH, velocity)
    assert native.host_pool().idle <= MIB // 2
    native._C.set_pool_limit(8 * MIB)
    kept = [fm.sample(BATCH, velocity) for _ in range(20)]
    assert native.host_pool().in_use >= 20 * BATCH * 50 * 1024 * 4
    kept.clear()
    assert 4 * MIB < native.host_pool().idle <= 8 * MIB
    native._C.set_pool_limit(MIB * 2)
    assert native.host_pool().idle <= 2 * MIB


def test_results_are_ordinary_tensors(tmp_path):
    out = FlowMatching(DIMS).sample(BATCH, velocity)
    wanted = out.clone()
    assert out.is_leaf and not out.requires_grad and out._version == 0 and type(out) is torch.Tensor
    assert_same_bits(pickle.loads(pickle.dumps(out)), wanted)
    assert_same_bits(torch.from_numpy(out.numpy()), wanted)
    assert_same_bits(torch.from_dlpack(out), wanted)
    torch.save(out, tmp_path / "out.pt")
    assert_same_bits(torch.load(tmp_path / "out.pt"), wanted)
    parameter = torch.nn.Parameter(out)
    (parameter**2).sum().backward()
    assert_same_bits(parameter.grad, 2 * wanted)
    out.share_memory_()
    assert out.is_shared()
    assert_same_bits(out, wanted)


def test_what_such_memory_refuses_is_refused_with_a_clear_error():
    out = FlowMatching(DIMS).sample(BATCH, velocity)
    with pytest.raises(RuntimeError, match="resiz"):
        out.resize_(2 * BATCH, *DIMS)
    with pytest.raises(RuntimeError):
        torch._lazy_clone(out)


@pytest.mark.parametrize("way", ["data", "shared", "written and shared"])
def test_a_state_that_is_moved_counts_with_its_new_values(way):
    noise, calls = torch.randn(BATCH, 4), []

    def step_fn(x, t):
        calls.append(None)
        if way == "data":
            x.data = torch.full_like(x, len(calls))
        else:
            x.share_memory_()
            if way != "shared":
                x.mul_(0.5)
        return -x

    got, _ = FlowMatching(4).sample(BATCH, step_fn, noise=noise, return_all_steps=True, inference_step=3)
    calls.clear()
    x, states, times = noise.clone(), [noise], torch.linspace(0, 1, 4)
    for i in range(3):
        v = step_fn(x, times[i])
        states[-1] = x
        x = x + (times[i + 1] - times[i]).view(1, 1) * v
        states.append(x)
    assert_same_bits(got[:, -1], x)
    assert_same_bits(got[:, 1], states[1])


def test_a_state_that_becomes_another_shape_is_an_error():
    def step_fn(x, t):
        v = -x
        x.data = torch.zeros(3)
        return v

    with pytest.raises(ValueError, match="replaced in place by a tensor of another shape"):
        FlowMatching(4).sample(BATCH, step_fn)


def test_threads_take_and_give_back():
    before, failures = in_use(), []
    fm, noise = FlowMatching((257,)), torch.randn(3, 257)
    wanted = fm.sample(3, velocity, noise=noise, return_all_steps=True)[0].clone()

    def work():
        kept = []
        try:
            for k in range(60):
                got = fm.sample(3, velocity, noise=noise, return_all_steps=True)[0]
                assert_same_bits(got, wanted)
                kept.append(got)
                if k % 7 == 0:
                    kept.clear()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    threads.clear()
    assert in_use() == before


SCRIPTS = {
    "fork": """
import os, threading, torch
from flowmatch_kernels import FlowMatching
fm = FlowMatching((50, 1024))
noise = torch.randn(2, 50, 1024)
wanted = fm.sample(2, lambda x, t: -x, noise=noise)
stop = False
def churn():
    while not stop:
        fm.sample(1, lambda x, t: -x)
thread = threading.Thread(target=churn)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        ok = torch.equal(fm.sample(2, lambda x, t: -x, noise=noise), wanted)
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
thread.join()
print("done")
""",
    "exit with tensors alive": """
import sys, threading, time, torch
from flowmatch_kernels import FlowMatching
fm = FlowMatching((50, 1024))
kept = [fm.sample(2, lambda x, t: -x) for _ in range(3)]
sys.kept = fm.sample(2, lambda x, t: -x, return_all_steps=True)
torch.kept = kept[0][1]
def hold(x):
    time.sleep(60)
threading.Thread(target=hold, args=(kept[1],), daemon=True).start()
print("done")
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_in_a_process_of_its_own(name):
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPTS[name]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


@pytest.mark.parametrize("value, wanted", [("0", 0), ("1048576", MIB), ("many", None), ("-1", None), ("1e9", None)])
def test_the_limit_is_read_from_the_environment(value, wanted, monkeypatch):
    if wanted is None:
        with pytest.raises(ValueError, match=f"FLOWMATCH_KERNELS_HOST_POOL_BYTES must be .* got '{value}'"):
            native._set_limit(value)
    else:
        native._set_limit(value)
        assert native.host_pool().limit == wanted


def test_sizes_of_many_kinds_come_out_right():
    """One pool serves all: a block is at least as large as what it holds, whatever it held before."""
    generator = numpy.random.default_rng(0)
    for _ in range(300):
        batch, size = int(generator.integers(1, 5)), int(generator.integers(1, 5000))
        noise = torch.randn(batch, size)
        got = FlowMatching(size, "ab2").sample(batch, velocity, noise=noise, inference_step=3)
        wanted = FlowMatching(size, "ab2", backend="reference").sample(batch, velocity, noise=noise, inference_step=3)
        assert_same_bits(got, wanted)
