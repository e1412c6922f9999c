"""The package as a process sees it: imports, forks, threads, public names, and life without the extension."""

import doctest
import inspect
import io
import os
import re
import subprocess
import sys

import pytest
import torch

import flowmatch_kernels
from flowmatch_kernels import (
    arguments,
    base,
    constraints,
    diagnostics,
    distributed,
    flow_matching,
    graphs,
    guidance,
    noise,
    sampling,
    solvers,
    step_functions,
    time_grids,
)
from flowmatch_kernels.__main__ import main
from flowmatch_kernels.integrations import alpamayo, gr00t, lerobot, openpi, ray, replacement
from flowmatch_kernels.ops import dispatch, fused_step, native, reference

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TESTS = os.path.join(ROOT, "tests")

# An import hook that hides the extension, as in a package that was installed without a compiler.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "flowmatch_kernels._C":
            raise ModuleNotFoundError("No module named 'flowmatch_kernels._C'", name=name)
sys.meta_path.insert(0, Hide())
"""


def fresh(code, timeout=120, **environment):
    """Runs code in a process of its own; what it prints."""
    path = os.pathsep.join([ROOT, TESTS])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLOWMATCH", "TRITON"))} | environment
    ended = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:flowmatch_kernels", "-c", code],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def test_import_is_light():
    """No Triton, no CUDA, no tqdm, no warning, nothing printed; not at the first sample() either.

    available_backends() may import Triton, to say whether that works, and makes no kernel.
    """
    code = """
import sys, torch
before = set(sys.modules)
import flowmatch_kernels
told = [name for name in ("triton", "tqdm", "matplotlib", "flowmatch_kernels.ops.triton", "flowmatch_kernels.demo")
        if name in sys.modules and name not in before]
assert not torch.cuda.is_initialized()
flowmatch_kernels.FlowMatching(2).sample(1, lambda x, t: x)
told += [name for name in ("triton", "flowmatch_kernels.ops.triton") if name in sys.modules and name not in before]
flowmatch_kernels.available_backends()
assert not torch.cuda.is_initialized()
told += [name for name in ("flowmatch_kernels.ops.triton",) if not torch.cuda.is_available() and name in sys.modules]
print("told", told)
"""
    assert fresh(code) == "told []\n"


def test_import_is_quick():
    """Beside torch's own import: less than 0.5 s, which leaves room for a busy machine (0.03 s on a free one)."""
    code = """
import time, torch, torch.utils._python_dispatch, torch.distributions, torch._subclasses.fake_tensor
begin = time.process_time()
import flowmatch_kernels
print(time.process_time() - begin)
"""
    assert min(float(fresh(code)) for _ in range(2)) < 0.5


def test_survives_fork():
    code = """
import os, torch
import published
from flowmatch_kernels import FlowMatching
torch.set_num_threads(1)
fm = FlowMatching(3)
step = lambda x, t: torch.sin(x)
noise = torch.randn(2, 3)
wanted = fm.sample(2, step, noise=noise)
assert torch.equal(wanted, published.sample(2, step, (3,), 10, noise=noise))
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        ok = torch.equal(fm.sample(2, step, noise=noise), wanted)
        ok = ok and torch.equal(FlowMatching(3, backend="reference").sample(2, step, noise=noise), wanted)
        os._exit(0 if ok else 7)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    assert fresh(code) == "[0, 0, 0]\n"


def test_without_the_extension():
    """All that needs no C++ works: the same bits, the ops, opcheck; and the reason is told, not raised."""
    code = (
        HIDE
        + """
import logging
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger("flowmatch_kernels").addHandler(Keep())
import torch
import published
import flowmatch_kernels
from flowmatch_kernels import FlowMatching, available_backends
reason = available_backends()["cpu"]
assert "_C" in reason and "No module" in reason, reason
assert not records, records
fm = FlowMatching((3, 2))
step, other = (lambda x, t: torch.sin(x) * t), (lambda x, t: torch.cos(x))
for guided in (False, True):
    noise = torch.randn(4, 3, 2)
    got = fm.sample(4, step, noise=noise, return_all_steps=True, unguided_step_fn=other if guided else None,
                    use_classifier_free_guidance=guided, inference_guidance_weight=1.5)
    wanted = published.sample(4, step, (3, 2), 10, noise=noise, return_all_steps=True,
                              unguided_step_fn=other if guided else None, weight=1.5)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
assert len(records) == 1 and "'cpu'" in records[0] and "No module" in records[0], records
try:
    fm.sample(4, step, backend="cpu")
except RuntimeError as error:
    assert "No module" in str(error)
else:
    raise AssertionError("cpu was asked for and is missing")
table = torch.randn(2, 8)
x = torch.randn(4, 3, 2)
op = torch.ops.flowmatch_kernels.fused_step
torch.library.opcheck(op.default, (x, x, x, None, None, None, table, 1, False))
out, slots = torch.empty_like(x), torch.zeros(4, 2, 3, 2)
torch.ops.flowmatch_kernels.fused_step_(out, x, x, x, None, None, None, table, 1, 0, 0, False, None, slots, 1, None)
assert torch.equal(out, op(x, x, x, None, None, None, table, 1, False)) and torch.equal(slots[:, 1], out)
for bad in ((x, x.double()), (x, x[0]), (x.int(), x)):
    try:
        op(*bad, None, None, None, None, table, 1, False)
    except (TypeError, ValueError):
        continue
    raise AssertionError("a bad operand was taken")
print("ok")
"""
    )
    assert fresh(code) == "ok\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime():
    """Threads come from torch's own pool, and as many as torch.set_num_threads says."""
    code = """
import os, re, torch
from flowmatch_kernels import FlowMatching
def runtimes():
    with open("/proc/self/maps") as file:
        return {os.path.basename(p) for p in re.findall(r"/\\S*(?:libgomp|libomp|libiomp)\\S*", file.read())}
def threads():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
before, count = runtimes(), threads()
FlowMatching(1_000_000).sample(1, lambda x, t: x, inference_step=3)
assert threads() == count, (threads(), count)
torch.set_num_threads(2)
FlowMatching(1_000_000).sample(1, lambda x, t: x, inference_step=3)
assert runtimes() == before, (before, runtimes())
assert threads() <= count + 1, (threads(), count)
print("ok")
"""
    assert fresh(code) == "ok\n"


def test_import_under_inference_mode_and_a_default_device():
    code = """
import torch
torch.set_default_device("meta")
with torch.inference_mode():
    from flowmatch_kernels import FlowMatching
torch.set_default_device(None)
import published
noise = torch.randn(2, 3)
step = lambda x, t: torch.sin(x)
assert torch.equal(FlowMatching(3).sample(2, step, noise=noise), published.sample(2, step, (3,), 10, noise=noise))
print("ok")
"""
    assert fresh(code) == "ok\n"


def test_public_names():
    wanted = ["BaseDiffusion", "FittedSolver", "FlowMatching", "Sample", "SolverComparison", "StepFn"]
    wanted += ["DDIM", "DDPM", "KeyedNoise", "StepFunction"]
    wanted += ["available_backends", "empty_cache", "inpaint", "use_backend"]
    assert sorted(flowmatch_kernels.__all__) == sorted(wanted)
    for name in wanted:
        assert getattr(flowmatch_kernels, name).__doc__
    assert flowmatch_kernels.__version__


def test_signatures():
    """What upstream's users and configs call, by name, by position and with these defaults."""
    assert flowmatch_kernels.FlowMatching(3).num_inference_steps == 10
    parameters = inspect.signature(flowmatch_kernels.FlowMatching).parameters
    assert {n: p.default for n, p in parameters.items()} == {
        "x_dims": inspect.Parameter.empty,
        "int_method": "euler",
        "num_inference_steps": None,  # 10; a number given may contradict a fitted solver
        "int_method_options": None,
        "train_timestep_sampler": "beta",
        "train_ignore_guidance_rate": 0.1,
        "inference_guidance_weight": 1.0,
        "use_classifier_free_guidance": False,
        # Beyond upstream's.
        "guidance_form": "interpolate",
        "time_grid": "uniform",
        "time_grid_options": None,
        "prediction_type": "velocity",
        "noise_at": 0,
        "euler_at_final": False,
        "train_drop_guidance": False,
        "step_rounding": "promote",
        "backend": "auto",
    }
    assert [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == list(parameters)[:3]
    parameters = inspect.signature(flowmatch_kernels.FlowMatching.sample).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert positional == [
        "self", "batch_size", "step_fn", "device", "return_all_steps", "inference_step", "int_method",
    ]  # fmt: skip
    assert keyword == {
        "int_method_options": None,
        "unguided_step_fn": None,
        "use_classifier_free_guidance": None,
        "inference_guidance_weight": None,
        "guidance_form": None,
        "combined_guidance": False,
        "skip_irrelevant_model": False,
        "temperature": 1.0,
        "noise": None,
        "generator": None,
        "step_noise": None,
        "return_log_prob": False,
        "dtype": None,
        "time_steps": None,
        "step_sizes": None,
        "velocity_strength": None,
        "constraint": None,
        "callback": None,
        "progress": False,
        "differentiable": None,
        "step_rounding": None,
        "backend": None,
    }


def test_signatures_of_the_rest():
    assert list(inspect.signature(flowmatch_kernels.inpaint).parameters) == ["known", "mask", "noise", "noise_at"]
    assert flowmatch_kernels.Sample._fields == ("x", "time_steps", "stopped")
    parameters = inspect.signature(flowmatch_kernels.FlowMatching.nfe).parameters
    assert {n: p.default for n, p in parameters.items() if n != "self"} == dict.fromkeys(
        ("inference_step", "int_method", "guided")
    )


def test_signatures_of_graphs():
    parameters = inspect.signature(flowmatch_kernels.FlowMatching.graphed).parameters
    assert {n: p.default for n, p in parameters.items() if p.default is not p.empty} == {
        "device": "cpu",
        "inputs": None,
        "max_graphs": 4,
        "copy_output": True,
        "fallback": "error",
        "module": None,
        "generators": (),
    }
    assert list(parameters)[:4] == ["self", "step_fn", "batch_size", "device"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[4:-1])
    assert list(parameters)[-1] == "sample_options"
    sampler = graphs.GraphedSampler
    assert list(inspect.signature(sampler.__call__).parameters) == ["self", "batch_size", "copy_output", "named"]
    assert list(inspect.signature(sampler.set_time_steps).parameters) == ["self", "time_steps", "step_sizes"]
    assert graphs.Stats._fields == ("captures", "replays", "eager", "graphs")
    # Every option of sample() has its place: copied in, part of the table, captured, or refused.
    options = set(list(inspect.signature(flowmatch_kernels.FlowMatching.sample).parameters)[4:])
    assert options == graphs._OPTIONS | set(graphs._REFUSED)


def test_signatures_of_distributed():
    parameters = inspect.signature(distributed.sample).parameters
    assert list(parameters)[:3] == ["fm", "step_fn", "batch_size"] and list(parameters)[-1] == "options"
    assert {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == {
        "noise": None,
        "generator": None,
        "mesh": None,
        "gather": True,
        "sizes": None,
    }
    assert list(inspect.signature(distributed.local_slice).parameters) == ["batch_size", "mesh", "sizes"]
    assert issubclass(distributed.RankError, RuntimeError)


def test_signature_of_the_log_probability():
    parameters = inspect.signature(dispatch.step_log_prob).parameters
    assert list(parameters) == ["base", "v", "next", "coefficients", "densities", "row", "backend"]
    schema = torch.ops.flowmatch_kernels.step_log_prob.default._schema
    assert [argument.name for argument in schema.arguments] == list(parameters)
    assert schema.arguments[-1].default_value == parameters["backend"].default == "auto"


def test_base_is_abstract():
    with pytest.raises(TypeError, match=r"abstract"):
        flowmatch_kernels.BaseDiffusion(3)

    class Own(flowmatch_kernels.BaseDiffusion):
        def sample(self, batch_size, step_fn, device="cpu", return_all_steps=False, *args, **kwargs):
            return torch.zeros(batch_size, *self.x_dims)

    assert Own([3, 2]).sample(4, None).shape == (4, 3, 2)
    with pytest.raises(ValueError, match=r"x_dims"):
        Own([])


@pytest.mark.parametrize(
    "module",
    [
        flowmatch_kernels,
        arguments,
        base,
        constraints,
        distributed,
        flow_matching,
        graphs,
        guidance,
        noise,
        sampling,
        solvers,
        step_functions,
        time_grids,
        dispatch,
        fused_step,
        native,
        reference,
        alpamayo,
        gr00t,
        lerobot,
        openpi,
        ray,
        replacement,
    ],
    ids=lambda module: module.__name__,
)
def test_examples_in_docstrings(module):
    failures, _ = doctest.testmod(module)
    assert failures == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    examples = [
        e for m in (flow_matching, dispatch, constraints, time_grids) for t in finder.find(m) for e in t.examples
    ]
    assert len(examples) >= 11


def test_version():
    """One version, in the package, in what is built and in what is cited; --version prints it."""
    with open(os.path.join(ROOT, "pyproject.toml")) as file:
        (built,) = re.findall(r'^version = "(.*)"$', file.read(), re.MULTILINE)
    with open(os.path.join(ROOT, "CITATION.cff")) as file:
        (cited,) = re.findall(r"^version: (.*)$", file.read(), re.MULTILINE)
    assert flowmatch_kernels.__version__ == built == cited
    code = "import sys; from flowmatch_kernels.__main__ import main; sys.argv = ['x', '--version']; main()"
    assert fresh(code) == f"flowmatch_kernels {built}\n"
    assert os.path.exists(os.path.join(ROOT, "flowmatch_kernels", "py.typed"))


def test_info_is_one_block_to_paste(monkeypatch, capsys):
    """Fenced, so that Markdown keeps its lines, with the settings that change results, and nobody's folders."""
    monkeypatch.setenv("FLOWMATCH_KERNELS_BACKEND", "reference")
    monkeypatch.setenv("AN_API_KEY", "secret")
    monkeypatch.setenv("TRITON_CACHE_DIR", os.path.join(ROOT, "cache"))
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert lines[0] == "```text" and lines[-1] == "```" and "```" not in "".join(lines[1:-1])
    said = {line[:18].strip(): line[18:] for line in lines[1 : lines.index("")]}
    assert {"flowmatch_kernels", "Python", "torch", "triton", "CPU", "other packages", "settings"} <= set(said)
    assert "FLOWMATCH_KERNELS_BACKEND=reference" in said["settings"]
    assert "secret" not in "\n".join(lines) and ROOT not in "\n".join(lines)


@pytest.mark.parametrize("argument", ["info", "--version"])
def test_a_reader_that_has_closed_the_output(argument):
    """`info | head -1` ends without a traceback, with the exit code that Python's documentation asks for."""
    reading, writing = os.pipe()
    os.close(reading)
    # Unbuffered, argparse's own write fails, which it ignores.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "flowmatch_kernels", argument],
            env=environment | {"PYTHONPATH": ROOT},
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize(
    "line, version",
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build", "540.4.0"),
        ("nothing known", ""),
    ],
)
def test_nvidia_driver(monkeypatch, line, version):
    monkeypatch.setattr("builtins.open", lambda *_: io.StringIO(f"{line}\nGCC version: 12.2.0\n"))
    assert diagnostics._driver() == version


def test_a_missing_project():
    """Importing its integration says what to install."""
    from flowmatch_kernels.integrations.replacement import needed

    wanted = r"integrations\.torchdiffeq needs torchdiffeq >= 9 \(.*no_such_module.*\): pip install flowmatch_kernels\["
    with pytest.raises(ImportError, match=wanted):
        needed("no_such_module", "torchdiffeq", ">= 9")
