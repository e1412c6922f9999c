"""sample() and the op on DTensors against plain tensors; as a program, one rank of several: RANK RANKS STORE."""

import itertools
import sys

import torch
import torch.distributed as dist
from operands import assert_same_bits
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from flowmatch_kernels import FlowMatching

#: Of a state [3, 5, 3]: of two ranks, shards of two sizes.
SHAPE, PLACEMENTS = (3, 5, 3), (Shard(0), Shard(2), Replicate())
SOLVERS = ("euler", "ab2", "midpoint")


def field(x, t):
    return torch.sin(3 * x)


def other(x, t):
    return torch.cos(2 * x)


GUIDANCE = {"use_classifier_free_guidance": True, "inference_guidance_weight": 1.5}
WORK = {
    "plain": {"step_fn": field},
    "guided": {"step_fn": field, "unguided_step_fn": other, **GUIDANCE},
    "combined": {"step_fn": lambda x, t: torch.cat([other(x, t), field(x, t)]), "combined_guidance": True, **GUIDANCE},
    "narrow": {"step_fn": lambda x, t: torch.sin(x).bfloat16()},
    "expands": {"step_fn": lambda x, t: torch.sin(x[:, :1])},
    "number": {"step_fn": lambda x, t: torch.ones(())},
    "hooks": {
        "step_fn": field,
        "constraint": lambda x, t: x.clamp(-0.7, 0.7),
        "callback": lambda step, t, x: step == 2,
    },
}


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def assert_sampled_as_plain(mesh, placement, backend="auto", solvers=SOLVERS, works=tuple(WORK)):
    noise = start()
    sharded = distribute_tensor(noise, mesh, [placement])
    for solver, work, all_steps in itertools.product(solvers, works, (False, True)):
        case = f"{placement}, {solver}, {work}, {all_steps}"
        fm = FlowMatching(SHAPE[1:], solver, 4, backend=backend)
        wanted = fm.sample(3, noise=noise, return_all_steps=all_steps, **WORK[work])
        got = fm.sample(3, noise=sharded, return_all_steps=all_steps, **WORK[work])
        wanted, got = (x if isinstance(x, torch.Tensor) else x[0] for x in (wanted, got))
        assert type(got) is DTensor, case
        if not all_steps:
            assert got.placements == (placement,), case
        assert got.stride() == wanted.stride(), case
        assert_same_bits(got.full_tensor(), wanted, case)
    assert_same_bits(sharded.full_tensor(), noise)


def assert_stepped_as_plain(mesh):
    """The op itself: the result is placed as base is, wherever the velocity is."""
    base, v, coefficients = start(), torch.sin(start()), torch.rand(2, 8, generator=torch.Generator().manual_seed(1))
    step = torch.ops.flowmatch_kernels.fused_step
    for row in range(2):
        wanted = step(base, v, None, v, None, None, coefficients, row)
        for place, its in itertools.product(PLACEMENTS, PLACEMENTS):
            sharded = distribute_tensor(base, mesh, [place])
            velocity = distribute_tensor(v, mesh, [its])
            got = step(sharded, velocity, None, velocity, None, None, coefficients, row)
            assert got.placements == (place,)
            assert_same_bits(got.full_tensor(), wanted, f"{place}, {its}")


def ranks(rank, world, store):
    """The default process group, and a mesh of all its ranks."""
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    return init_device_mesh("cpu", (world,))


if __name__ == "__main__":
    torch.set_num_threads(1)
    mesh = ranks(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    for placement in PLACEMENTS:
        assert_sampled_as_plain(mesh, placement, works=("plain", "guided", "combined"))
    assert_stepped_as_plain(mesh)
    dist.destroy_process_group()
    sys.stdout.write("as plain\n")
