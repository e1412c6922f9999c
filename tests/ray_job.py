"""A job of Ray Data as a program, which a test kills: ADDRESS OUTPUT SECONDS, a batch taking so many seconds."""

import functools
import sys
import time

import torch

from flowmatch_kernels import FlowMatching
from flowmatch_kernels.integrations.ray import Sampler, missing

ROWS, BLOCKS, SEED = 64, 16, 5
FM = FlowMatching((3, 2), num_inference_steps=2)


def field(x, t, scale, seconds=0.0):
    time.sleep(seconds / 2)  # two evaluations a batch
    return torch.sin(3 * x) * t * scale


def load(seconds):
    return FM, functools.partial(field, seconds=seconds)


def scaled(batch):
    return {**batch, "scale": (batch["id"] % 7 + 1.0).astype("float32").reshape(-1, 1, 1)}


def wanted():
    """What one process gives."""
    from flowmatch_kernels import KeyedNoise

    scale = torch.from_numpy(scaled({"id": torch.arange(ROWS).numpy()})["scale"])
    return FM.sample(ROWS, functools.partial(field, scale=scale), noise=KeyedNoise(SEED))


def run(output, seconds):
    import ray.data

    dataset = ray.data.range(ROWS, override_num_blocks=BLOCKS).map_batches(scaled, batch_format="numpy")
    missing(dataset, output).map_batches(
        Sampler,
        fn_constructor_args=(functools.partial(load, seconds),),
        fn_constructor_kwargs={"seed": SEED, "conditions": ["scale"], "rows": 4},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=0.5,
    ).write_parquet(output)


if __name__ == "__main__":
    import ray

    torch.set_num_threads(1)
    ray.init(address=sys.argv[1], log_to_driver=False)
    run(sys.argv[2], float(sys.argv[3]))
