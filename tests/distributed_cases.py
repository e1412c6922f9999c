"""distributed.sample() on forked gloo ranks, against fm.sample() in one process.

As a program it runs all cases, and prints a JSON object of what went wrong: a text for each, "" where nothing did. One
process for all: its imports take longer than they do.
"""

import contextlib
import datetime
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback

import pytest
import torch
import torch.distributed as dist
from operands import assert_same_bits
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from flowmatch_kernels import DDIM, DDPM, FlowMatching, KeyedNoise, StepFunction, distributed

SHAPE, STEPS = (3, 2, 2), 3
#: Seconds, of a process group's timeout; and after which a rank ends: a hang is an error too.
LIMIT, ALARM = 60, 120


def run(world, function, ended=0):
    """Runs function(rank) on each of `world` forked gloo ranks, which must all end with this status.

    Args:
        world: How many ranks.
        function: What a rank does. An exception is status 1.
        ended: The status; or one for each rank, as os.waitstatus_to_exitcode gives it.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os._exit(_rank(rank, world, os.path.join(folder, "store"), function))
            children.append(child)
        found = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert found == ([ended] * world if isinstance(ended, int) else ended), found


def _rank(rank, world, store, function):
    signal.alarm(ALARM)
    torch.set_num_threads(1)
    try:
        limit = datetime.timedelta(seconds=LIMIT)
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=limit)
        function(rank)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


# ---- The same bits ----


def field(x, t):
    return (torch.sin(3 * x) * (1 + t)).to(x.dtype)


def other(x, t):
    return torch.cos(2 * x)


def start(batch_size):
    return torch.randn(batch_size, *SHAPE, generator=torch.Generator().manual_seed(3))


def seeded():
    """No noise is given, and the default generator draws."""
    torch.manual_seed(11)
    return {}


def guided(batch_size):
    return {"unguided_step_fn": other, "use_classifier_free_guidance": True, "inference_guidance_weight": 1.5}


def held(batch_size, dtype=torch.float32):
    """Times of each sample, some of which wait before their first step."""
    starts = torch.arange(batch_size, dtype=dtype).view(-1, 1) / 5
    return torch.linspace(0, 1, STEPS + 1, dtype=dtype).clamp(min=starts)


def tokens(batch_size):
    """Times of each token, [B, 3, STEPS + 1], the first of which are held."""
    powers = torch.arange(1, 3 * batch_size + 1).view(batch_size, 3, 1) / 4
    times = torch.linspace(0, 1, STEPS + 1) ** powers
    times[:, 0] = 0.5
    return times


#: By name: what fm is, the batch size, and the options as a function of it, made anew for each sampler, since
#: generators are used up.
FM, SDE = (
    FlowMatching(SHAPE, num_inference_steps=STEPS),
    FlowMatching(SHAPE, "sde", STEPS, int_method_options={"eta": 0.5}),
)
GRID = [0.1, 0.3, 0.6, 0.9]
CASES = {
    "keys": (FM, 7, lambda b: {"noise": KeyedNoise(5, first=2, stream=1)}),
    "at the last key": (FM, 3, lambda b: {"noise": KeyedNoise(5, first=2**48 - 3)}),
    "a list of keys": (FM, 5, lambda b: {"noise": [KeyedNoise(k % 3, first=k) for k in range(b)]}),
    "one sample": (FM, 1, lambda b: {"noise": KeyedNoise(5)}),
    "no sample": (FM, 0, lambda b: {"noise": KeyedNoise(5), "return_all_steps": True}),
    "a tensor": (FM, 4, lambda b: {"noise": start(b), "temperature": 0.8}),
    "channels last": (FM, 5, lambda b: {"noise": start(b).to(memory_format=torch.channels_last)}),
    "channels last, all steps": (
        *(FM, 5),
        lambda b: {"noise": start(b).to(memory_format=torch.channels_last), "return_all_steps": True},
    ),
    "generators": (FM, 5, lambda b: {"noise": [torch.Generator().manual_seed(k) for k in range(b)]}),
    "the default draw": (FM, 5, lambda b: seeded()),
    "bfloat16": (FM, 3, lambda b: {"dtype": torch.bfloat16, **seeded()}),
    "a generator": (FM, 6, lambda b: {"generator": torch.Generator().manual_seed(4), "dtype": torch.float64}),
    "heun, all steps": (FM, 7, lambda b: {"noise": KeyedNoise(1), "int_method": "heun", "return_all_steps": True}),
    "guided": (FM, 5, lambda b: {"noise": KeyedNoise(1), **guided(b)}),
    "a weight for each sample": (
        *(FM, 5),
        lambda b: {"noise": KeyedNoise(1), **guided(b), "inference_guidance_weight": torch.arange(b).view(b, 1) / 2},
    ),
    "a weight for each sample, of the constructor": (
        *(FlowMatching(SHAPE, num_inference_steps=STEPS, inference_guidance_weight=[[0.5], [1.5]]), 2),
        lambda b: {"noise": KeyedNoise(1), "unguided_step_fn": other, "use_classifier_free_guidance": True},
    ),
    "times of each sample": (
        *(FM, 5),
        lambda b: {"noise": KeyedNoise(1), "time_steps": held(b, torch.float64), "return_all_steps": True},
    ),
    "times of each sample, two samples": (
        *(FM, 2),
        lambda b: {"noise": KeyedNoise(1), "time_steps": held(b).tolist(), "return_all_steps": True},
    ),
    "step sizes of each sample": (
        *(FM, 2),
        lambda b: {
            **{"noise": KeyedNoise(1), "step_sizes": torch.full((b, STEPS), 0.2) + torch.arange(b).view(b, 1) / 9},
            "return_all_steps": True,
        },
    ),
    "times and weights of each token": (
        *(FM, 5),
        lambda b: {
            **{"noise": KeyedNoise(1), **guided(b), "time_steps": tokens(b), "return_all_steps": True},
            "inference_guidance_weight": torch.arange(b * 3).view(b, 3, 1) / 4,
        },
    ),
    "times of each element in lists": (
        *(FM, 2),
        lambda b: {
            **{"noise": start(b), "return_all_steps": True},
            "time_steps": tokens(b).view(b, 3, 1, 1, -1).expand(-1, -1, 2, 2, -1).tolist(),
        },
    ),
    "times of each token, channels last": (
        *(FM, 5),
        lambda b: {"noise": start(b).to(memory_format=torch.channels_last), "time_steps": tokens(b)},
    ),
    "weights of each token that are not used, channels last": (
        *(FM, 5),
        lambda b: {
            **{"noise": start(b).to(memory_format=torch.channels_last)},
            "inference_guidance_weight": torch.ones(b, 3, 1),
        },
    ),
    "step sizes of each token, one grid": (
        *(FM, 5),
        lambda b: {
            **{"noise": KeyedNoise(1), "time_steps": GRID, "return_all_steps": True},
            "step_sizes": torch.arange(b * 3.0).view(b, 3, 1).expand(-1, -1, STEPS) / 30,
        },
    ),
    "times of each token, for all samples": (
        *(FM, 5),
        lambda b: {"noise": KeyedNoise(1), "time_steps": tokens(1), "return_all_steps": True},
    ),
    "one row of times": (FM, 2, lambda b: {"noise": KeyedNoise(1), "time_steps": [GRID], "return_all_steps": True}),
    "constraint": (FM, 5, lambda b: {"noise": KeyedNoise(1), "constraint": lambda x, t: x.clamp(-0.3, 0.3)}),
    "strength": (FM, 5, lambda b: {"noise": KeyedNoise(1), "velocity_strength": start(b)[:, :1]}),
    "one strength": (FM, 5, lambda b: {"noise": KeyedNoise(1), "velocity_strength": start(1)}),
    "sde by keys": (SDE, 5, lambda b: {"noise": KeyedNoise(1), "time_steps": GRID, "return_log_prob": True}),
    "sde, the default draw": (SDE, 5, lambda b: {"return_all_steps": True, **seeded()}),
    "sde, all": (
        *(SDE, 5),
        lambda b: {
            **{"noise": start(b), "generator": torch.Generator().manual_seed(4), "time_steps": GRID},
            **{"return_all_steps": True, "return_log_prob": True},
        },
    ),
    "sde, times of each sample, log-probabilities": (
        *(SDE, 5),
        lambda b: {
            **{"noise": KeyedNoise(1), "time_steps": held(b) * 0.8 + 0.1},
            **{"return_all_steps": True, "return_log_prob": True},
        },
    ),
    "sde, noise given": (
        *(SDE, 5),
        lambda b: {"noise": start(b), "step_noise": torch.stack([start(b) / (1 + k) for k in range(STEPS)], dim=1)},
    ),
    "ddim": (DDIM(SHAPE, num_inference_steps=STEPS), 5, lambda b: {"noise": KeyedNoise(1), "return_all_steps": True}),
    "ddpm": (DDPM(SHAPE, num_inference_steps=STEPS), 5, lambda b: seeded()),
}


def _equal(got, wanted, case):
    got, wanted = (x if isinstance(x, tuple) else (x,) for x in (got, wanted))
    assert len(got) == len(wanted), case
    for its, plain in zip(got, wanted, strict=True):
        assert its.stride() == plain.stride(), f"{case}: {its.stride()}, {plain.stride()}"
        assert_same_bits(its, plain, case)


def same_bits(world):
    """Every case on so many ranks, evenly split, with sizes given, and as shards."""

    def check(rank):
        torch.manual_seed(rank)  # cases that draw seed for themselves
        for case, (fm, batch_size, options) in CASES.items():
            whole = fm.sample(batch_size, field, **options(batch_size))
            _equal(distributed.sample(fm, field, batch_size, **options(batch_size)), whole, case)
            sizes = [0] * world
            sizes[-1] = batch_size  # the first ranks have none
            if batch_size > 2 and world > 1:
                sizes[0], sizes[-1] = 1, batch_size - 1
            _equal(
                distributed.sample(fm, field, batch_size, sizes=sizes, **options(batch_size)), whole, f"{case}, sizes"
            )
            shard = distributed.sample(fm, field, batch_size, gather=False, **options(batch_size))
            mine = distributed.local_slice(batch_size)
            first, wanted = (x[0] if isinstance(x, tuple) else x for x in (shard, whole))
            assert_same_bits(first, wanted[mine], f"{case}, shard")
        _conditions(rank, world)

    run(world, check)


def _conditions(rank, world):
    """What step_fn closes over, a mesh, a group, a bar, a callback, and a state of one rank's own."""
    features = torch.rand(5, *SHAPE)  # every rank has seeded differently
    dist.broadcast(features, 0)
    keys, mesh = KeyedNoise(3), init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    whole = FM.sample(5, lambda x, t: x * features, noise=keys)
    mine = features[distributed.local_slice(5, mesh)]
    for place in (mesh, mesh.get_group(), dist.group.WORLD):
        seen = []

        def model(x, t, seen=seen):
            seen.append(len(x))
            return x * mine

        assert_same_bits(distributed.sample(FM, model, 5, noise=keys, mesh=place), whole)
        assert seen == ([len(mine)] * STEPS if len(mine) else [])
    numbered = StepFunction(lambda x, t, step: x * step, time_as="scalar")
    assert_same_bits(distributed.sample(FM, numbered, 2, noise=keys), FM.sample(2, numbered, noise=keys))
    got = distributed.sample(FM, field, 5, noise=keys, gather=False, callback=lambda step, t, x: step == 1)
    assert not len(mine) or got.stopped
    assert_same_bits(FM.sample(5, field, noise=KeyedNoise(3)), distributed.sample(FM, field, 5, noise=keys))
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        assert_same_bits(distributed.sample(FM, field, 5, noise=keys, mesh=mesh["dp"]), FM.sample(5, field, noise=keys))
        for place, wanted in ((mesh, "one dimension"), (dist.new_group([0]), "not in the process group")):
            if place is mesh or rank:
                _raises(ValueError, wanted, lambda place=place: distributed.sample(FM, field, 5, mesh=place))


# ---- A state that is sharded over the sequence ----


def over_the_sequence(world):
    """Context parallel: fm.sample() of a DTensor steps each rank's shards, with no collective and the same bits."""

    def check(rank):
        shape = (2, 7, 3)  # [B, sequence, channels]: of two ranks and of four, shards of two sizes
        noise = KeyedNoise(3).draw(*shape[:1], shape[1:])
        mesh, placements = init_device_mesh("cpu", (world,)), [Shard(1)]
        if world == 4:  # data parallel too
            mesh, placements = init_device_mesh("cpu", (2, 2)), [Shard(0), Shard(1)]
        sharded = distribute_tensor(noise, mesh, placements)

        def beside(x, t):
            return field(x, DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False))

        for solver in ("ab2", "heun"):
            fm = FlowMatching(shape[1:], solver, STEPS)
            for options in ({}, guided(2), {"constraint": lambda x, t: x.clamp(-0.4, 0.4)}, {"return_all_steps": True}):
                whole = fm.sample(2, field, noise=noise, **options)
                got = fm.sample(2, beside, noise=sharded, **options)
                with CommDebugMode() as seen:
                    watched = fm.sample(2, beside, noise=sharded, **options)
                assert seen.get_total_counts() == 0, (solver, options, seen.get_comm_counts())
                for x in (got, watched):
                    x, plain = (one[0] if isinstance(one, tuple) else one for one in (x, whole))
                    assert x.device_mesh == mesh
                    if not options.get("return_all_steps"):
                        assert list(x.placements) == placements
                    assert_same_bits(x.full_tensor(), plain, f"{solver}, {options}")
        with CommDebugMode() as seen:  # it counts
            sharded.full_tensor()
        assert seen.get_total_counts() > 0

    run(world, check)


# ---- Errors ----


def _raises(kind, wanted, function):
    with pytest.raises(kind, match=re.escape(wanted)) as raised:
        function()
    assert raised.type is kind


class SceneError(Exception):
    """What a step_fn raises."""


def failing(world):
    """A rank that raises ends all, whatever step it is at; the next call is right."""

    def check(rank):
        def model(x, t):
            if rank == 1 and t[0, 0, 0, 0] > 0.5:
                raise SceneError("no such scene")
            return field(x, t)

        keys = KeyedNoise(1)
        kind, wanted = (SceneError, "no such scene") if rank == 1 else (distributed.RankError, "rank 1: ")
        for gather in (True, False):
            call = lambda gather=gather: distributed.sample(FM, model, 5, noise=keys, gather=gather)  # noqa: E731
            _raises(kind, wanted, call)
            _raises(kind, "no such scene", call)
        # Arguments that one rank alone gets wrong, before a step: each rank raises, and none waits.
        noise = torch.zeros(5, *SHAPE, dtype=torch.int64) if rank == 1 else start(5)
        kind = TypeError if rank == 1 else distributed.RankError
        _raises(kind, "noise must be floating point", lambda: distributed.sample(FM, field, 5, noise=noise))
        kind = ValueError if rank == 1 else distributed.RankError
        noise = start(4 if rank == 1 else 5)
        _raises(kind, "= [5, 3, 2, 2], got [4, 3, 2, 2]", lambda: distributed.sample(FM, field, 5, noise=noise))
        assert_same_bits(distributed.sample(FM, field, 5, noise=keys), FM.sample(5, field, noise=keys))

    run(world, check)


#: By the name that the error gives: the arguments of rank 0, and of the others.
DIFFERENT = {
    "batch_size": ({"batch_size": 4}, {"batch_size": 5}),
    "int_method": ({"int_method": "midpoint"}, {"int_method": "heun"}),
    "int_method_options": (
        {"int_method": "sde", "int_method_options": {"eta": 0.1}},
        {"int_method": "sde", "int_method_options": {"eta": 0.2}},
    ),
    "inference_step": ({"inference_step": 3}, {"inference_step": 4}),
    "dtype": ({"dtype": torch.float64}, {}),
    "noise": ({"noise": KeyedNoise(1)}, {"noise": KeyedNoise(2)}),
    "step_noise": (
        {"int_method": "sde", "step_noise": KeyedNoise(1)},
        {"int_method": "sde", "step_noise": KeyedNoise(2)},
    ),
    "time_steps": ({"time_steps": torch.tensor([0.0, 0.5, 1.0])}, {"time_steps": torch.tensor([0.0, 0.6, 1.0])}),
    "inference_guidance_weight": ({"inference_guidance_weight": 1.5}, {"inference_guidance_weight": 2.5}),
    "temperature": ({"temperature": 0.5}, {}),
    "return_all_steps": ({"return_all_steps": True}, {}),
    "gather": ({"gather": False}, {}),
    "sizes": ({"sizes": [5, 0]}, {"sizes": [4, 1]}),
    "step_rounding": ({"step_rounding": "exact"}, {}),
    "fm.int_method": ({"fm": FlowMatching(SHAPE, "heun", STEPS)}, {}),
    "fm.num_inference_steps": ({"fm": FlowMatching(SHAPE, num_inference_steps=9)}, {}),
    "fm.noise_at": ({"fm": FlowMatching(SHAPE, num_inference_steps=STEPS, noise_at=1)}, {}),
    "the state of the generator": ({"noise": None}, {"noise": None}),
    "the state of the generator that draws": (
        {"int_method": "sde", "noise": start(5)},
        {"int_method": "sde", "noise": start(5)},
    ),
    "the time grid": (
        {
            "fm": FlowMatching(SHAPE, num_inference_steps=2, time_grid=lambda n: torch.tensor([0, 0.2, 1])),
            **{"return_all_steps": True},
        },
        {
            "fm": FlowMatching(SHAPE, num_inference_steps=2, time_grid=lambda n: torch.tensor([0, 0.3, 1])),
            **{"return_all_steps": True},
        },
    ),
}
#: Of a draw that only sampling makes, and of grids that are functions.
AFTERWARDS = ("the state of the generator that draws", "the time grid")


def differing(world):
    """Ranks whose arguments differ are told in which, and none waits."""

    def check(rank):
        for name, arguments in DIFFERENT.items():
            torch.manual_seed(rank)
            called = []

            def model(x, t, called=called):
                called.append(t)
                return field(x, t)

            given = {"fm": FM, "step_fn": model, "batch_size": 5, "noise": KeyedNoise(1)} | arguments[rank > 0]
            wanted = f"alike on all ranks; {name}"
            _raises(ValueError, wanted, lambda given=given: distributed.sample(**given))
            assert bool(called) == (name in AFTERWARDS), name
        # Not different: None and what is left out; each rank's own function; what another rank alone reads of.
        noise = start(5)
        noise[distributed.local_slice(2) if rank else slice(5, 5)] = torch.nan
        own = {"inference_step": None} if rank else {}
        distributed.sample(FM, lambda x, t: x, 5, noise=noise, **own)

    run(world, check)


def refused(world):
    """The same error on every rank, and at once."""

    def check(rank):
        sample, keys = distributed.sample, KeyedNoise(1)
        sharded = distribute_tensor(start(4), init_device_mesh("cpu", (world,)), [Shard(0)])
        for kind, wanted, call in (
            (ValueError, "callback needs gather=False", lambda: sample(FM, field, 4, callback=print)),
            (ValueError, "differentiable needs gather=False", lambda: sample(FM, field, 4, differentiable=True)),
            (TypeError, "noise is a DTensor", lambda: sample(FM, field, 4, noise=sharded)),
            (ValueError, "2 in all; got [2, 2]", lambda: sample(FM, field, 2, noise=keys, sizes=[2, 2])),
            (ValueError, "none negative", lambda: sample(FM, field, 2, noise=keys, sizes=[3, -1])),
            (TypeError, "sizes must be a list of ints", lambda: sample(FM, field, 2, noise=keys, sizes="11")),
            (TypeError, "mesh must be", lambda: sample(FM, field, 2, mesh=3)),
            (TypeError, "fm must be", lambda: sample(field, field, 2)),
            (TypeError, "step_fn must be callable", lambda: sample(FM, None, 2)),
            (TypeError, "gather must be", lambda: sample(FM, field, 2, gather=1)),
            (TypeError, "no_such_option", lambda: sample(FM, field, 2, noise=keys, no_such_option=1)),
            (ValueError, "at most 2^48", lambda: sample(FM, field, 2, noise=KeyedNoise(1, first=2**48 - 1))),
            (TypeError, "noise must be a tensor", lambda: sample(FM, field, 2, noise=3.0)),
            (ValueError, "velocity_strength", lambda: sample(FM, field, 4, noise=keys, velocity_strength=start(3))),
            (ValueError, "batch_size", lambda: sample(FM, field, -1, noise=keys)),
        ):
            _raises(kind, wanted, call)

    run(world, check)


def killed(world):
    """A rank that is killed in a step: the others raise at once, each of them as its neighbour ends."""

    def check(rank):
        def model(x, t):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return field(x, t)

        begin = time.monotonic()
        _raises(
            distributed.RankError,
            "one did not answer",
            lambda: distributed.sample(FM, model, 5, noise=KeyedNoise(1)),
        )
        assert time.monotonic() - begin < LIMIT / 2

    run(world, check, ended=[-signal.SIGKILL if rank == 1 else 0 for rank in range(world)])


def silent(world):
    """A rank that does not answer within the timeout of the group: the others raise then."""

    def check(rank):
        def model(x, t):
            if rank == 1:
                time.sleep(1.5)
            return field(x, t)

        # A short timeout from here on: how long the ranks take to find each other is the machine's.
        dist.barrier()
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))
        begin = time.monotonic()
        _raises(
            distributed.RankError, "one did not answer", lambda: distributed.sample(FM, model, 5, noise=KeyedNoise(1))
        )
        assert 1 < time.monotonic() - begin < LIMIT / 2

    run(world, check)


def cost():
    """bench.distributed compares before it times; one row for each shape."""
    from bench import distributed as bench

    with tempfile.TemporaryFile("w+") as file:  # which its rank inherits
        with contextlib.redirect_stdout(file):
            assert bench.main(["--rounds", "1"]) == 0
        file.seek(0)
        assert len(file.read().splitlines()) == 2 + len(bench.SHAPES)


RUNS = {
    **{f"the bits of one process, {world} ranks": (same_bits, world) for world in (1, 2, 3, 4)},
    **{f"a state sharded over the sequence, {world} ranks": (over_the_sequence, world) for world in (2, 4)},
    "a rank fails": (failing, 3),
    "ranks differ": (differing, 2),
    "arguments are refused": (refused, 2),
    "a rank is killed": (killed, 4),
    "a rank is silent": (silent, 2),
    "what a rank adds": (cost,),
}

if __name__ == "__main__":
    found = {}
    for name, (function, *arguments) in RUNS.items():
        found[name] = ""
        try:
            function(*arguments)
        except Exception:
            found[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(found) + "\n")
