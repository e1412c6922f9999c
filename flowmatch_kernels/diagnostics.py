"""`python -m flowmatch_kernels info`: what is installed, which backends run here, and their self-test."""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import __version__
from .ops import native, reference
from .ops.dispatch import BACKENDS, available_backends
from .ops.fused_step import (
    COLUMNS,
    EXACT,
    FROM_GUIDED,
    FROM_UNGUIDED,
    PROMOTE,
    ROUNDED,
    VELOCITY_DTYPES,
    WEIGHTED,
    Operands,
    arithmetic_dtype,
)

#: The packages of the integrations, and what the others often turn on.
PROJECTS = (
    *("alpamayo_r1", "alpamayo1_5", "alpamayo2_super", "diffusers", "flow_matching", "lerobot", "openpi"),
    *("torchdiffeq", "numpy", "transformers", "accelerate"),
)

#: The integer dtype that shows a floating-point dtype's bits.
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`info` has none."""


def run(arguments: argparse.Namespace) -> int:
    """Prints what an issue report needs, as one block of Markdown to paste.

    Returns:
        0, or 1 where a backend's self-test failed, or where the extension is installed and cannot be loaded.
    """
    print("```text")
    for name, value in _environment().items():
        print(f"{name:<18}{value}")
    print("\nbackends")
    failed = False
    for name, reason in available_backends().items():
        if reason is not None:
            print(f"  {name:<11}unavailable: {reason}")
        elif name == "reference":
            print(f"  {name:<11}available; the definition that the others are tested against")
        else:
            result = self_test(name)
            failed |= result.failure is not None
            print(f"  {name:<11}available on {result.device}; self-test: {result}")
            costly = BACKENDS[name].costly(result.device.type)
            if costly is not None:
                print(f"  {'':<11}auto takes it last of the kernels: {costly}")
    broken = native.broken()
    for reason in broken:
        print(f"\nBROKEN: {reason}.\nTo mend it: {native.REMEDY} for the torch that is installed.")
    print("```")
    return int(failed or bool(broken))


def _environment() -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    environment = {
        "flowmatch_kernels": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {native.torch_build()}",
        "triton": triton,
        "CPU": f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "instruction set": native.instruction_set() or "none: the cpu backend is unavailable",
        "states on the CPU": _states(),
        "other packages": _versions(PROJECTS) or "none that an integration is for",
        "settings": " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if _is_setting(name))
        or "none",
    }
    if not torch.cuda.is_available():
        environment["GPU"] = "none"
    if driver := _driver():
        environment["NVIDIA driver"] = driver
    for k in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(k)
        environment[f"GPU {k}"] = f"{torch.cuda.get_device_name(k)}, compute capability {major}.{minor}"
    return environment


def _versions(packages: Iterable[str]) -> str:
    """Those that are installed, each with its version."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _is_setting(name: str) -> bool:
    """Whether an environment variable of this name changes what is computed, or where, and names no folder."""
    if name.endswith(("_DIR", "_HOME", "_PATH", "_KEY", "_TOKEN")):
        return False
    return name.startswith(("FLOWMATCH_KERNELS_", "TRITON_", "TORCH_LOGS", "TORCHDYNAMO_")) or name in (
        "CUDA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "PYTORCH_CUDA_ALLOC_CONF",
    )


def _driver() -> str:
    """The version of NVIDIA's driver, as the kernel module says it."""
    try:
        with open("/proc/driver/nvidia/version") as lines:
            found = re.search(r"Kernel Module\D*?(?:x86_64|aarch64)?\s+(\d+\.[\d.]+)", lines.read())
    except OSError:
        return ""
    return found.group(1) if found else ""


def _states() -> str:
    """How the loop keeps its states on the CPU."""
    reason, pool = native.rows_unavailable(), native.host_pool()
    if pool is None:
        return f"new tensors, eager PyTorch, the slow path: {reason}; {native.REMEDY}"
    sizes = f"{pool.idle >> 20} MiB kept for reuse of {pool.limit >> 20} at most, {pool.in_use >> 20} in use"
    return f"fresh memory for each state: {reason}" if reason is not None else f"in memory that is reused; {sizes}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class SelfTest(NamedTuple):
    """What a self-test found."""

    device: torch.device
    cases: int
    failure: str | None
    """The first case that went wrong, and how."""

    def __str__(self) -> str:
        return f"{self.cases} cases, exact" if self.failure is None else f"FAILED: {self.failure}"


def self_test(name: str) -> SelfTest:
    """Compares a backend with `ops.reference`, bit for bit, on random operands of every dtype.

    Args:
        name: A backend that `available_backends()` says can run.
    """
    gpu = "cuda" in BACKENDS[name].devices and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    cases = 0
    try:
        fused_step_ = BACKENDS[name].load()
        for description, operands in _cases(device):
            difference = _difference(fused_step_, operands)
            if difference is not None:
                return SelfTest(device, cases, f"{difference}, for {description}")
            cases += 1
    except Exception as error:  # a broken compiler or driver may raise anything
        return SelfTest(device, cases, f"{type(error).__name__}: {error}")
    return SelfTest(device, cases, None)


def _cases(device: torch.device) -> Iterator[tuple[str, Operands]]:
    generator = torch.Generator().manual_seed(0)
    sets: list[tuple[int, int | None, int, bool]]
    sets = [*itertools.product((PROMOTE, EXACT, ROUNDED), (None, WEIGHTED), range(4), (False, True))]
    sets += [(PROMOTE, FROM_UNGUIDED, 1, True), (PROMOTE, FROM_GUIDED, 0, True)]
    for state, velocities in VELOCITY_DTYPES.items():
        for velocity, (rounding, guidance, terms, writes) in itertools.product(velocities, sets):
            # An odd sample, so that slots are not aligned; more than a strip or a block in all.
            operands = _operands((5, 257), state, velocity, rounding, guidance, terms, writes, device, generator)
            yield (
                f"state {state}, velocity {velocity}, rounding={rounding}, "
                f"guidance={guidance}, {terms} history terms, trajectory and history written={writes}",
                operands,
            )


def _operands(
    shape: tuple[int, int],
    state: torch.dtype,
    velocity: torch.dtype,
    rounding: int,
    guidance: int | None,
    terms: int,
    writes: bool,
    device: torch.device,
    generator: torch.Generator,
) -> Operands:
    arithmetic = arithmetic_dtype(state)

    def random(dtype: torch.dtype, *size: int) -> Tensor:
        """Finite, over many powers of two; one in eight is a denormal or a zero of either sign."""
        scale = torch.exp2(torch.randint(-8, 4, size, generator=generator).double())
        scale = torch.where(torch.rand(size, generator=generator) < 0.125, torch.finfo(dtype).tiny / 4, scale)
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    def unwritten(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.full(size, torch.nan, dtype=dtype, device=device)

    history = [random(arithmetic, *shape) if k < terms else None for k in range(3)]
    coefficients = torch.randn(2, len(COLUMNS), generator=generator, dtype=torch.float64).to(arithmetic).to(device)
    return Operands(
        unwritten(state, *shape),
        random(state, *shape),
        random(velocity, *shape),
        None if guidance is None else random(velocity, *shape),
        history[0],
        history[1],
        history[2],
        coefficients,
        1,
        rounding,
        guidance or WEIGHTED,
        False,
        None,
        unwritten(state, shape[0], 3, shape[1]) if writes else None,
        1,
        unwritten(arithmetic, *shape) if writes else None,
    )


def _difference(fused_step_: Callable[..., None], operands: Operands) -> str | None:
    """How fused_step_ differs from the reference, in any operand, or None."""
    wanted, got = copy.deepcopy(operands), copy.deepcopy(operands)
    reference.fused_step_(wanted)
    fused_step_(got)
    for name, want, have in zip(Operands._fields, wanted, got, strict=True):
        if isinstance(want, Tensor) and isinstance(have, Tensor) and not torch.equal(_bits(want), _bits(have)):
            differing = _bits(want) != _bits(have)
            where = tuple(differing.nonzero()[0].tolist())
            return (
                f"{int(differing.sum())} of {want.numel()} values of {name} differ, "
                f"the first at {where}: {have[where].item()!r} instead of {want[where].item()!r}"
            )
    return None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.dtype])
