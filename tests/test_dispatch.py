"""Which backend runs: by argument, by context, by environment, by itself; and what is said when it cannot."""

import asyncio
import importlib
import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flowmatch_kernels import FlowMatching, available_backends, flow_matching, tracing, use_backend
from flowmatch_kernels.ops import dispatch, native
from flowmatch_kernels.ops.fused_step import Operands

NAMES = ["triton", "cuda", "cpu", "reference"]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("FLOWMATCH_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def used(monkeypatch):
    """The names of the backends that took the steps of each sample(), in order."""
    used = []
    taken = flow_matching.rows_for

    def spy(setting, noise):
        used.append(setting.backend.name)
        return taken(setting, noise)

    monkeypatch.setattr(flow_matching, "rows_for", spy)
    return used


@pytest.fixture
def hidden(monkeypatch):
    """The extension cannot be imported."""
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_import_error", "flowmatch_kernels._C cannot be imported: no such file")


def step(fm=None, **keywords):
    return (fm or FlowMatching(2)).sample(3, lambda x, t: x, inference_step=1, **keywords)


def test_available_backends():
    available = available_backends()
    assert list(available) == NAMES
    assert available["cpu"] is None
    assert available["reference"] is None
    if not torch.cuda.is_available():
        for name in ("triton", "cuda"):
            assert isinstance(available[name], str)
            assert len(available[name]) > 10
    for name, reason in available.items():
        if reason is None and name in ("cpu", "reference"):
            step(backend=name)
    available["cpu"] = "mine"
    assert available_backends()["cpu"] is None


def test_auto_takes_cpu(used):
    step()
    assert used == ["cpu"]


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_by_argument(used, name):
    step(backend=name)
    step(FlowMatching(2, backend=name))
    step(FlowMatching(2, backend="reference" if name == "cpu" else "cpu"), backend=name)
    assert used == [name] * 3


def test_by_context(used):
    with use_backend("reference"):
        step()
        with use_backend("cpu"):
            step()
        step()
    step()
    assert used == ["reference", "cpu", "reference", "cpu"]


def test_context_ends_with_an_exception(used):
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    step()
    assert used == ["cpu"]


def test_a_name_is_stronger_than_the_context(used):
    with use_backend("reference"):
        step(backend="cpu")
        step(FlowMatching(2, backend="cpu"))
        step(backend="auto")
    assert used == ["cpu", "cpu", "reference"]


def test_context_is_of_one_thread(used):
    inside, outside = threading.Event(), threading.Event()
    names = []

    def other():
        inside.wait(10)
        names.append(dispatch.choose("auto", "cpu").name)
        outside.set()

    thread = threading.Thread(target=other)
    thread.start()
    with use_backend("reference"):
        inside.set()
        assert outside.wait(10)
        names.append(dispatch.choose("auto", "cpu").name)
    thread.join()
    assert names == ["cpu", "reference"]


def test_context_is_of_one_task():
    async def task(name, others):
        with use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                others.append((name, dispatch.choose("auto", "cpu").name))

    async def main():
        seen = []
        await asyncio.gather(task("cpu", seen), task("reference", seen))
        return seen

    seen = asyncio.run(main())
    assert len(seen) == 6
    assert all(wanted == got for wanted, got in seen)


def test_by_environment(used, monkeypatch):
    monkeypatch.setenv("FLOWMATCH_KERNELS_BACKEND", "reference")
    step()
    step(backend="cpu")
    with use_backend("cpu"):
        step()
    monkeypatch.setenv("FLOWMATCH_KERNELS_BACKEND", "auto")
    step()
    monkeypatch.setenv("FLOWMATCH_KERNELS_BACKEND", "")
    step()
    assert used == ["reference", "cpu", "cpu", "cpu", "cpu"]


def test_unknown_in_the_environment(monkeypatch):
    monkeypatch.setenv("FLOWMATCH_KERNELS_BACKEND", "gpu")
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"'gpu'.*known: auto, triton, cuda, cpu, reference"):
        step()
    assert torch.equal(before, torch.get_rng_state())
    step(backend="cpu")


@pytest.mark.parametrize("name", ["Cpu", "gpu", "", None, 3, ["cpu"]])
def test_unknown_in_the_context(name):
    with pytest.raises(ValueError, match=r"known: auto, triton, cuda, cpu, reference"), use_backend(name):
        pass


def test_unusable_in_the_context_and_the_environment(monkeypatch):
    with use_backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda'.*cannot be used.*serves cuda.*got cpu"):
        step()
    monkeypatch.setenv("FLOWMATCH_KERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"'triton'.*cannot be used.*TRITON_INTERPRET=1"):
        step()


def test_hidden_extension(used, hidden, caplog):
    """auto falls to the reference and says so once; a backend asked for by name says why it cannot."""
    assert available_backends()["cpu"] == "flowmatch_kernels._C cannot be imported: no such file"
    assert "cannot be imported" in available_backends()["cuda"]
    assert native.instruction_set() is None
    with caplog.at_level(logging.WARNING, logger="flowmatch_kernels"):
        for _ in range(3):
            step()
    assert used == ["reference"] * 3
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    for word in ("'cpu'", "skipped", "cannot be imported: no such file"):
        assert word in told[0]
    with pytest.raises(RuntimeError, match=r"'cpu' was asked for and cannot be used.*no such file"):
        step(backend="cpu")
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"no such file"):
        step()


def test_nothing_is_told_when_all_is_well(used, caplog):
    with caplog.at_level(logging.DEBUG, logger="flowmatch_kernels"):
        step()
        step(backend="reference")
    assert caplog.records == []


def test_broken_triton(monkeypatch):
    """A Triton that raises anything at import is a reason, not an exception."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def broken(name, package=None):
        raise OSError("libcuda.so is a directory")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    monkeypatch.delitem(sys.modules, "flowmatch_kernels.ops.triton", raising=False)
    assert "libcuda.so is a directory" in available_backends()["triton"]
    with pytest.raises(RuntimeError, match=r"'triton'.*libcuda.so is a directory"):
        step(backend="triton")


BROKEN = """
import os, sys
sys.path.insert(0, {folder!r})
import torch
torch.cuda.is_available = lambda: False
from flowmatch_kernels.__main__ import main
from flowmatch_kernels import available_backends
print(available_backends()["triton"])
sys.exit(main(["info"]))
"""


@pytest.mark.parametrize("error", ["OSError('libcuda.so is a directory')", "ImportError('libtriton.so')", ""])
def test_broken_triton_without_a_gpu(tmp_path, error):
    """The reason is Triton's, and not that there is no GPU: with one it would not run either."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f"raise {error}" if error else "")  # or without `knobs`
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FLOWMATCH", "TRITON"))}
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = BROKEN.format(folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = error.partition("(")[2].strip("')") or "no attribute 'knobs'"
    kind = error.partition("(")[0] or "AttributeError"
    reason = done.stdout.splitlines()[0]
    assert reason.startswith(f"Triton cannot be imported: {kind}: ") and words in reason and "CUDA" not in reason
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  triton ")]
    assert line == f"  triton     unavailable: {reason}"


def test_order_on_cuda(monkeypatch, caplog):
    """triton, else cuda, else reference: each pass told once; shapes by FakeTensor."""
    reasons = {"triton": None, "cuda": None}
    for name in reasons:
        backend = dispatch.BACKENDS[name]
        unavailable = lambda device_type, name=name: reasons[name]  # noqa: E731
        always = {"unavailable": unavailable, "costly": lambda device_type: None}
        monkeypatch.setitem(dispatch.BACKENDS, name, backend._replace(**always))
    assert dispatch.choose("auto", "cuda").name == "triton"
    reasons["triton"] = "broken"
    with caplog.at_level(logging.WARNING, logger="flowmatch_kernels"):
        assert dispatch.choose("auto", "cuda").name == "cuda"
        assert dispatch.choose("auto", "cuda").name == "cuda"
        reasons["cuda"] = "not built"
        assert dispatch.choose("auto", "cuda").name == "reference"
    assert [("triton" in r.getMessage(), "cuda" in r.getMessage()) for r in caplog.records].count((True, True)) == 1
    assert len(caplog.records) == 2
    with pytest.raises(RuntimeError, match=r"'triton'.*broken"):
        dispatch.choose("triton", "cuda")
    fm = FlowMatching(2)
    with FakeTensorMode():
        assert step(fm, device="cuda").device.type == "cuda"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0, an extension with CUDA, and a Triton that can start."""
    pytest.importorskip("triton", reason="Triton is not installed: its probe is not tested")
    from triton.runtime import driver

    dispatch._triton_cannot_start.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(native, "cuda_unavailable", lambda: None)
    monkeypatch.setattr(native, "cuda_architectures", lambda: "8.0;9.0+PTX")
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=SimpleNamespace(launch=None)))
    yield driver
    dispatch._triton_cannot_start.cache_clear()


def line_of_cuda_chosen_twice(monkeypatch, caplog):
    """The one line of log, where "auto" takes cuda on a GPU."""
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.WARNING, logger="flowmatch_kernels"):
        for _ in range(2):
            assert dispatch.choose("auto", "cuda").name == "cuda"
    (line,) = [record.getMessage() for record in caplog.records]
    return line


def test_a_triton_whose_launch_is_not_known_comes_after_cuda(gpu, monkeypatch, caplog):
    """Where cuda cannot serve it is taken all the same, by its ordinary launch."""
    import triton

    monkeypatch.setattr(triton, "__version__", "9.9.0")
    line = line_of_cuda_chosen_twice(monkeypatch, caplog)
    assert "'triton' is skipped on cuda: Triton 9.9.0 is not one of those known, 3.6" in line
    assert "costs the host more" in line
    assert dispatch.choose("triton", "cuda").name == "triton"
    assert available_backends()["triton"] is None
    monkeypatch.setattr(native, "cuda_unavailable", lambda: "not built")
    assert dispatch.choose("auto", "cuda").name == "triton"


def no_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: None)


def no_header(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})


def broken_driver(monkeypatch):
    """Triton starts its driver when it is first asked for, and here that fails."""
    from triton.runtime import driver

    def create():
        raise OSError("libcuda.so cannot found!")

    monkeypatch.setattr(driver, "_active", None)
    monkeypatch.setattr(driver, "_default", None)
    monkeypatch.setattr(importlib.import_module("triton.runtime.driver"), "_create_driver", create)


def test_a_gpu_with_everything(gpu):
    assert dispatch.choose("auto", "cuda").name == "triton"
    assert [available_backends()[name] for name in ("triton", "cuda")] == [None, None]


@pytest.mark.parametrize("missing", ["compiler", "Python.h", "library"])
def test_triton_that_cannot_start_gives_way_to_cuda(missing, gpu, monkeypatch, caplog, tmp_path):
    """As in a slim image: sample() would raise, at its first step."""
    broken_driver(monkeypatch)
    if missing == "compiler":
        no_compiler(monkeypatch)
    elif missing == "Python.h":
        no_header(monkeypatch, tmp_path)
    said = {"compiler": "no C compiler", "Python.h": str(tmp_path / "Python.h"), "library": "libcuda.so"}[missing]
    line = line_of_cuda_chosen_twice(monkeypatch, caplog)
    assert "'triton' is skipped" in line
    assert said in line
    assert said in available_backends()["triton"]
    with pytest.raises(RuntimeError, match="'triton' was asked for and cannot be used"):
        dispatch.choose("triton", "cuda")


def test_triton_without_a_compiler_may_have_all_in_its_cache(gpu, monkeypatch):
    """Its driver starts; but before 3.7 there is a module to build for each kernel."""
    no_compiler(monkeypatch)
    assert available_backends()["triton"] is None
    del gpu._active.utils.launch
    dispatch._triton_cannot_start.cache_clear()
    assert "no C compiler" in available_backends()["triton"]


def test_a_c_compiler_is_found_as_triton_finds_it(gpu, monkeypatch, tmp_path):
    no_compiler(monkeypatch)
    assert "no C compiler" in dispatch._no_c_compiler()
    monkeypatch.setenv("CC", "cc")
    assert dispatch._no_c_compiler() is None
    no_header(monkeypatch, tmp_path)
    assert "Python.h" in dispatch._no_c_compiler()
    (tmp_path / "Python.h").touch()
    assert dispatch._no_c_compiler() is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: name if name == "clang" else None)
    assert dispatch._no_c_compiler() is None


def test_cuda_without_code_for_the_gpu_gives_way(gpu, monkeypatch):
    broken_driver(monkeypatch)
    monkeypatch.setattr(native, "cuda_architectures", lambda: "7.5;8.0")
    assert dispatch.choose("auto", "cuda").name == "reference"
    assert available_backends()["cuda"] == "it is built for 7.5;8.0, and the GPU is of compute capability 9.0"
    with pytest.raises(RuntimeError, match=r"built for 7\.5;8\.0, and the GPU is of compute capability 9\.0"):
        dispatch.choose("cuda", "cuda")


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (7, 5), False),
        ("7.5;8.0+PTX;9.0;10.0;12.0", (12, 1), True),
        ("7.5 8.0", (8, 9), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("8.0", (8, 7), False),  # Orin
        ("8.7", (8, 9), False),
        ("8.0+PTX", (8, 7), True),
        ("8.7", (8, 7), True),
        ("12.0", (10, 0), False),
        ("Hopper", (7, 5), True),
        ("", (8, 0), False),
    ],
)
def test_what_a_gpu_runs(architectures, capability, runs):
    assert native.runs_on(architectures, capability) is runs


@pytest.mark.parametrize("device_type", ["mps", "xpu", "meta"])
def test_other_devices_have_the_reference(device_type):
    assert dispatch.choose("auto", device_type).name == "reference"
    with pytest.raises(RuntimeError, match=rf"serves cpu tensors, got {device_type}"):
        dispatch.choose("cpu", device_type)


def test_eager_goes_straight_to_the_backend():
    """Plain tensors skip the dispatcher; modes, transforms and compilers do not."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert tracing.is_eager()
    for mode in (TorchDispatchMode(), Functions(), FakeTensorMode(), torch.device("cpu")):
        with mode:
            assert not tracing.is_eager()
        assert tracing.is_eager()
    seen = []
    torch.func.vmap(lambda x: seen.append(tracing.is_eager()) or x)(torch.zeros(2))
    torch.func.grad(lambda x: seen.append(tracing.is_eager()) or x)(torch.zeros(()))
    torch.jit.trace(lambda x: seen.append(tracing.is_eager()) or x + 1, (torch.zeros(2),), check_trace=False)
    assert seen[0] is False
    assert seen[1] is False
    assert False in seen[2:]


def test_schemas_are_the_operands():
    wanted = list(Operands._fields)
    schema = torch.ops.flowmatch_kernels.fused_step_.default._schema
    assert [argument.name for argument in schema.arguments] == wanted
    assert [argument.name for argument in torch.ops.flowmatch_kernels.fused_step.default._schema.arguments] == [
        name for name in wanted if name not in ("out", "trajectory", "slot", "history")
    ]
    mutated = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert mutated == ["out", "trajectory", "history"]


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_noise_and_log_prob_are_the_backend_s_own(name):
    """The reference gives the same bits, in hundreds of launches: only who is asked shows."""
    assert dispatch.BACKENDS[name].load_noise() is native.keyed_noise_
    assert dispatch.BACKENDS[name].load_log_prob() is native.step_log_prob_
