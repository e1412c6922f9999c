"""Tries the package that is installed, on the CPU; `make wheels` runs it in each clean environment.

    python tests/installed.py [pure]

Needs torch only. `pure`: the package was installed without its extension. Exits with 1 where something is wrong.
"""

import subprocess
import sys
import sysconfig

import published  # beside this file
import torch

import flowmatch_kernels
from flowmatch_kernels import FlowMatching, available_backends


def step_fn(x, t):
    return torch.sin(3 * x) + t


def main(pure):
    assert flowmatch_kernels.__file__.startswith(sysconfig.get_path("purelib")), flowmatch_kernels.__file__
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
    sys.stdout.write(f"flowmatch_kernels {flowmatch_kernels.__version__}: sample() equals the published loop\n")


if __name__ == "__main__":
    main("pure" in sys.argv[1:])
