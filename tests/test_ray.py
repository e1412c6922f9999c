"""integrations.ray: a row's sample depends on its key alone; a job that was killed goes on where it was."""

import importlib.util
import os
import subprocess
import sys
import time

import numpy
import pytest
import ray_job
import torch
from operands import assert_same_bits

from flowmatch_kernels import DDIM, FlowMatching, KeyedNoise
from flowmatch_kernels.integrations import ray as integration
from flowmatch_kernels.integrations.ray import Sampler, missing

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FM = FlowMatching((3, 2), num_inference_steps=3)


def field(x, t):
    return torch.sin(3 * x) * t


def batch(*indexes):
    return {"id": numpy.array(indexes, dtype=numpy.int64)}


@pytest.mark.parametrize("rows", [None, 1, 3, 8])
def test_a_sample_depends_on_its_row_alone(rows):
    """With the conditions of the row, in any batch; a call of step_fn gets `rows` rows."""
    seen = []

    def scaled(x, t, scale):
        seen.append(len(x))
        return field(x, t) * scale

    def other(x, t, scale):
        return x * scale

    guided = {"use_classifier_free_guidance": True, "inference_guidance_weight": 1.5}
    sampler = Sampler(lambda: (FM, scaled, other), seed=2, stream=1, conditions=["scale"], rows=rows, **guided)
    scale = torch.rand(7, 1, 2)
    models = ({"step_fn": lambda x, t: scaled(x, t, scale), "unguided_step_fn": lambda x, t: other(x, t, scale)},)
    whole = FM.sample(7, noise=KeyedNoise(2, stream=1), **models[0], **guided)
    for chosen in ([0, 1, 2, 3, 4, 5, 6], [5, 2], [6], []):
        del seen[:]
        got = sampler({**batch(*chosen), "scale": scale[chosen].numpy(), "kept": numpy.array(chosen)})
        assert list(got) == ["id", "scale", "kept", "sample"] and got["kept"].tolist() == chosen
        assert_same_bits(torch.from_numpy(got["sample"]), whole[chosen])
        assert set(seen) == (set() if not chosen else {rows or len(chosen)})


def test_dtypes_samplers_and_options():
    got = Sampler(lambda: (FM, lambda x, t: x), seed=2, output="x", dtype=torch.bfloat16)(batch(4))["x"]
    assert_same_bits(
        torch.from_numpy(got), FM.sample(1, lambda x, t: x, noise=KeyedNoise(2, 4), dtype=torch.bfloat16).float()
    )
    ddim = DDIM((3, 2), num_inference_steps=3)
    got = Sampler(lambda: (ddim, field), seed=2)(batch(4))["sample"]
    assert_same_bits(torch.from_numpy(got), ddim.sample(1, field, noise=KeyedNoise(2, 4)))


@pytest.mark.parametrize(
    "kind, wanted, call",
    [
        (TypeError, "load must be callable", lambda: Sampler(3, seed=0)),
        (TypeError, "load must return", lambda: Sampler(lambda: field, seed=0)),
        (ValueError, "seed must be in", lambda: Sampler(lambda: (FM, field), seed=-1)),
        (ValueError, "noise is not for a Sampler", lambda: Sampler(lambda: (FM, field), seed=0, noise=3)),
        (ValueError, "rows must be at least 1", lambda: Sampler(lambda: (FM, field), seed=0, rows=0)),
        (TypeError, "conditions must be a list", lambda: Sampler(lambda: (FM, field), seed=0, conditions="scale")),
        (ValueError, "no column 'id'; it has 'x'", lambda: Sampler(lambda: (FM, field), seed=0)({"x": numpy.ones(1)})),
        (ValueError, "no column 'c'", lambda: Sampler(lambda: (FM, field), seed=0, conditions=["c"])(batch(1))),
        (ValueError, "column 'id' already", lambda: Sampler(lambda: (FM, field), seed=0, output="id")(batch(1))),
        (TypeError, "must hold integers", lambda: Sampler(lambda: (FM, field), seed=0)({"id": numpy.ones(1)})),
        (ValueError, "first must be in", lambda: Sampler(lambda: (FM, field), seed=0)(batch(-1))),
    ],
)  # fmt: skip
def test_bad_input(kind, wanted, call):
    with pytest.raises(kind, match=wanted):
        call()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray(tmp_path):
    with pytest.raises(ImportError, match=r"integrations\.ray needs ray .*pip install flowmatch_kernels\[ray\]"):
        missing(None, str(tmp_path))


# ---- With Ray ----


@pytest.fixture(scope="module")
def ray():
    """A local Ray of two workers; its processes are this fixture's."""
    import ray as found

    paths = os.pathsep.join(filter(None, [os.path.join(ROOT, "tests"), ROOT, os.environ.get("PYTHONPATH")]))
    found.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    yield found
    found.shutdown()


def rows_of(folder):
    import ray.data

    found = ray.data.read_parquet(str(folder)).take_all()
    return sorted(found, key=lambda row: row["id"])


def assert_whole(folder):
    rows = rows_of(folder)
    assert [row["id"] for row in rows] == list(range(ray_job.ROWS))
    assert_same_bits(torch.stack([torch.from_numpy(row["sample"].copy()) for row in rows]), ray_job.wanted())


@pytest.mark.integrations
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_job_that_is_killed(ray, tmp_path):
    """Killed after some files are there, with one cut short, and started again: each row once, with the same bits."""
    output = tmp_path / "output"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, os.path.join(ROOT, "tests", "ray_job.py"), address, str(output), "0.5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 120
            while len(list(output.glob("*.parquet"))) < 4:
                assert job.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.05)
        finally:
            job.kill()
            job.wait()
    time.sleep(2)  # its actors end with it
    files = sorted(output.glob("*.parquet"))
    assert 4 <= len(files) < ray_job.BLOCKS
    files[0].write_bytes(files[0].read_bytes()[:-20])
    before = {file: file.read_bytes() for file in files[1:]}
    ray_job.run(str(output), 0.0)
    assert all(file.read_bytes() == content for file, content in before.items())  # not sampled again
    assert [file.name for file in output.glob("_*")] == [integration.INCOMPLETE + files[0].name]
    assert_whole(output)
    ray_job.run(str(output), 0.0)  # nothing is missing
    assert_whole(output)
    with pytest.raises(ValueError, match=r"has no column 'other'; it has 'id'"):
        missing(None, str(output), "other")
