"""Tries the package that is installed, on the CPU; `make wheels` runs it in each clean environment.

    python tests/installed.py [pure] [target]

Needs torch only. `pure`: the package was installed without its extension. `target`: it was installed into the
folder that PYTHONPATH names (pip install --no-deps --target FOLDER), and not into the environment. Exits with 1 where
something is wrong.
"""

import os
import subprocess
import sys
import sysconfig

import published  # beside this file
import torch

import flowmatch_kernels
from flowmatch_kernels import FlowMatching, available_backends


def step_fn(x, t):
    return torch.sin(3 * x) + t


def main(pure, target):
    folder = os.environ["PYTHONPATH"] if target else sysconfig.get_path("purelib")
    assert flowmatch_kernels.__file__.startswith(folder), flowmatch_kernels.__file__
    subprocess.run([sys.executable, "-m", "flowmatch_kernels", "info"], check=True)
    backends = available_backends()
    assert (backends["cpu"] is None) is not pure, backends
    for backend in ("auto", "reference") if pure else ("auto", "cpu", "reference"):
        torch.manual_seed(0)
        got = FlowMatching((64, 2), backend=backend).sample(6, step_fn, return_all_steps=True)
        torch.manual_seed(0)
        wanted = published.sample(6, step_fn, (64, 2), 10, return_all_steps=True)
        for x, y in zip(got, wanted, strict=True):
            assert torch.equal(x, y), f"{backend} is not equal to the published loop"
    versions = f"flowmatch_kernels {flowmatch_kernels.__version__}, torch {torch.__version__}"
    sys.stdout.write(f"{versions}: sample() equals the published loop\n")


if __name__ == "__main__":
    main("pure" in sys.argv[1:], "target" in sys.argv[1:])
