"""The whole of sample() as one CUDA graph: a call copies its inputs in, replays the graph, and copies the result out.

`FlowMatching.graphed` makes a `GraphedSampler`. What is captured is a call of sample() itself, on buffers that stay
where they are: the noise (or the keys that it is drawn from), the noise of a stochastic solver's steps, the inputs of
step_fn, and the table of the solver. What may differ between two calls is either in one of these buffers, which each
call writes, or in the signature, and another signature is another graph. So no replay can use a value of an earlier
call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from . import layouts, tracing
from . import noise as noises
from .arguments import available_device, check_dense, count, elsewhere, finite, flag, held, shown
from .flow_matching import FlowMatching
from .ops import dispatch
from .ops.fused_step import arithmetic_dtype
from .solvers import ADDING, Table
from .step_functions import StepFunction

logger = logging.getLogger("flowmatch_kernels")

FALLBACKS = ("error", "eager")
_one_capture = threading.Lock()
"""PyTorch captures one graph at a time in a process."""
_REASONS = 64
"""How many signatures that cannot be captured are remembered."""

#: Options of sample(): what each call writes to a buffer, what the table's numbers and its form are made from, and what
#: a graph is captured with.
_WRITTEN = ("noise", "generator", "step_noise", "temperature", "dtype")
_GRIDS = ("time_steps", "step_sizes", "inference_guidance_weight", "int_method_options")
_SOLVERS = ("inference_step", "int_method")
_CAPTURED = (
    *("return_all_steps", "unguided_step_fn", "use_classifier_free_guidance", "guidance_form", "combined_guidance"),
    *("skip_irrelevant_model", "velocity_strength", "constraint", "step_rounding", "backend", "return_log_prob"),
)
_OPTIONS = frozenset((*_WRITTEN, *_GRIDS, *_SOLVERS, *_CAPTURED))
#: Options of sample() that a graph cannot have, and why.
_REFUSED = {
    "callback": "it is Python code that runs after each step, and a replay runs no Python",
    "progress": "a replay is one launch",
    "differentiable": "a graph keeps no derivative",
}
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
_RESERVED = ("x", "t", "step", "batch_size", "copy_output")

#: What the text of an error says about its cause, and what to look for in step_fn.
_HINTS = (
    (
        ("generator", "philox", "offset increment"),
        "a torch.Generator of step_fn's own, which the graph must know: pass it to graphed(generators=[...])",
    ),
    (
        ("pinned", "pageable", "cannot copy between cpu"),
        "memory of the host that is copied to the device: torch.tensor(...), torch.as_tensor(...), .to(device), "
        ".cuda(). Make such tensors before, or pass them as inputs",
    ),
    (
        ("unjoined", "isolation", "uncaptured", "another stream"),
        "work on another stream that is not joined: let the current stream wait for it within step_fn",
    ),
)
_HINT = (
    "what makes the host wait for the device or read from it: .item(), .cpu(), .tolist(), float(x), print(x), "
    "`if x.any():`, nonzero(), x[mask], torch.cuda.synchronize(); what copies from the host: torch.tensor(...), "
    ".to(device); a second CUDA graph or torch.compile(mode='reduce-overhead') within step_fn; or a library that "
    "allocates with cudaMalloc or launches on a stream of its own"
)


class GraphCaptureError(RuntimeError):
    """step_fn did something that a CUDA graph cannot hold. Its `__cause__` is what PyTorch or CUDA raised."""


class Stats(NamedTuple):
    """What a `GraphedSampler` has done so far."""

    captures: int
    """Graphs captured, those that were dropped since included."""
    replays: int
    """Calls that replayed a graph."""
    eager: dict[str, int]
    """Calls that ran sample() instead, by the reason."""
    graphs: int
    """Graphs held now."""


class CudaGraphs:
    """Captures and replays on a CUDA device. All graphs of one share a memory pool, and are replayed one at a time.

    Args:
        device: With its index.
        generators: Generators on the device that step_fn draws from, beside the default one, which CUDA graphs know.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self._device, self._generators = device, generators
        self._stream: Any = None
        self._pool: Any = None
        self._last: Any = None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Within it the device is the current one, and its current stream waits for the call before, on any stream."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
            yield

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Compiles and loads every kernel, and lets libraries allocate: a capture allows neither."""
        stream = torch.cuda.current_stream()
        side = self._side()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        stream.wait_stream(side)

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        """What the function returns, in memory that a replay writes again; and the graph, with replay() and reset()."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side, first = self._side(), None
        # thread_local: what other threads do in the meantime, as to load data, is no error.
        captured = torch.cuda.graph(graph, self._pool, stream=side, capture_error_mode="thread_local")
        try:
            # The outer context puts the stream back also where the end of a broken capture raises.
            with torch.cuda.stream(side), captured:
                try:
                    return function(), graph
                except BaseException as error:
                    first = error
                    raise
        except BaseException as last:
            self._pool = None  # in which a broken capture may have left blocks
            if first is not None and first is not last:  # its end raises too, and says less
                raise first from last
            raise

    def drop(self, graphs: Sequence[Any]) -> None:
        """Frees graphs, once the device has run them."""
        torch.cuda.synchronize(self._device)
        for graph in graphs:
            graph.reset()

    def _side(self) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream


def recorder(device: torch.device, generators: Sequence[torch.Generator]) -> Any:
    """What captures and replays on this device; None: nothing does, and calls run sample()."""
    return CudaGraphs(device, generators) if device.type == "cuda" else None


class _Buffer:
    """Memory of a graph for a tensor of this shape, dtype and device, with its strides where they are dense.

    A dimension that is expanded (stride 0) stays expanded.

    Args:
        like: The tensor; its values are not copied.
        contiguous: In contiguous memory, whatever the strides are.
    """

    def __init__(self, like: Tensor, contiguous: bool = False) -> None:
        sizes = [] if contiguous else zip(like.shape, like.stride(), strict=True)
        self._expanded = [k for k, (size, stride) in enumerate(sizes) if stride == 0 and size > 1]
        with torch.inference_mode(False):
            memory_format = torch.contiguous_format if contiguous else torch.preserve_format
            self._memory = torch.empty_like(self._narrowed(like.detach()), memory_format=memory_format)
            #: As step_fn sees it.
            self.tensor = self._memory.expand(like.shape)

    def _narrowed(self, x: Tensor) -> Tensor:
        for k in self._expanded:
            x = x.narrow(k, 0, 1)
        return x

    def write(self, x: Tensor) -> None:
        """Copies values in."""
        if x is not self.tensor:
            self._memory.copy_(self._narrowed(x.detach()), non_blocking=True)


class _Inputs:
    """Buffers for the inputs of step_fn, and for the velocity_strength.

    Args:
        leaves: Tensors, and constants, which are kept as they are.
        spec: How they are nested.
    """

    def __init__(self, leaves: Sequence[Any], spec: Any) -> None:
        self._buffers = [_Buffer(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        pairs = zip(leaves, self._buffers, strict=True)
        nested = pytree.tree_unflatten([leaf if buffer is None else buffer.tensor for leaf, buffer in pairs], spec)
        self._inputs, self._strength = nested

    def bound(self, step_fn: Any) -> Any:
        """The model with its inputs."""
        if not self._inputs:
            return step_fn
        if isinstance(step_fn, StepFunction):
            bound = copy.copy(step_fn)
            bound.model = functools.partial(step_fn.model, **self._inputs)
            return bound
        return functools.partial(step_fn, **self._inputs)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those options of sample() that decide what it runs, the second model with its inputs."""
        options = {name: given[name] for name in (*_SOLVERS, *_CAPTURED) if name in given}
        if options.get("unguided_step_fn") is not None:
            options["unguided_step_fn"] = self.bound(options["unguided_step_fn"])
        if self._strength is not None:
            options["velocity_strength"] = self._strength
        return options

    def write(self, leaves: Sequence[Any]) -> None:
        """Copies the values of the tensors in."""
        for leaf, buffer in zip(leaves, self._buffers, strict=True):
            if buffer is not None:
                buffer.write(leaf)


class _Weights(Sequence[float]):
    """A table's weights of guidance, which knows whether the host has read one: then the graph holds its value."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights, self.read = weights, False

    def __getitem__(self, k: Any) -> Any:
        self.read = True
        return self._weights[k]

    def __len__(self) -> int:
        return len(self._weights)


class _Call(NamedTuple):
    """The arguments of a call, checked."""

    batch_size: int
    source: Any
    """What the noise is drawn from, as `noise.source` returns it; of no meaning where `start` is given."""
    start: Tensor | None
    """The noise that was given."""
    steps_source: Any
    """What the noise of a stochastic solver's steps is drawn from, as `start`'s; None with other solvers."""
    steps_given: Tensor | None
    """That noise, where it was given."""
    temperature: float
    dtype: torch.dtype
    table: Table
    backend: str
    """The name of the one that runs."""
    leaves: list[Any]
    """Of the inputs and the velocity_strength: tensors and constants."""
    spec: Any
    """How they are nested."""
    options: dict[str, Any]
    """All others of sample()."""
    signature: Hashable
    """Equal for two calls only where one graph serves both, but for `table.weights` where the host reads them."""


class _Graph:
    """A captured call of sample(), and the buffers that it reads.

    Args:
        fm: The sampler whose sample() is captured.
        step_fn: The model.
        device: Where.
        call: What a graph is made for.
    """

    def __init__(self, fm: FlowMatching, step_fn: Any, device: torch.device, call: _Call) -> None:
        self._fm, self._step_fn, self._device = fm, step_fn, device
        # Without the caller's tensors; with what the signature knows by identity.
        self._call = call._replace(
            source=None,
            start=None,
            steps_source=None,
            steps_given=None,
            leaves=[],
            options={name: value for name, value in call.options.items() if name not in (*_WRITTEN, *_GRIDS)},
        )
        self._inputs = _Inputs(call.leaves, call.spec)
        shape, dtype, table = (call.batch_size, *fm.x_dims), call.dtype, call.table
        self._noise: _Buffer | None = None
        self._keys = self._temperature = self._step_keys = self._step_noise = None
        arithmetic = arithmetic_dtype(dtype)
        with torch.inference_mode(False):
            if noises.is_keyed(call.steps_source):
                self._step_keys = torch.empty(call.batch_size, 3, dtype=torch.int64, device=device)
            elif _draws_outside(call):
                self._step_noise = torch.empty(
                    call.batch_size, table.steps, *fm.x_dims, dtype=arithmetic, device=device
                )
            if noises.is_keyed(call.source):
                self._keys = torch.empty(call.batch_size, 3, dtype=torch.int64, device=device)
                self._temperature = torch.empty(1, dtype=arithmetic, device=device)
            elif call.start is not None:
                # A format that sample() does not keep is contiguous there too.
                start = call.start if call.temperature == 1.0 else call.start.to(dtype)
                self._noise = _Buffer(start, contiguous=layouts.of(start, len(table.sizes)) is None)
            else:
                self._noise = _Buffer(torch.empty(shape, dtype=dtype, device=device))
            numbers: dict[str, Any] = {name: torch.empty_like(one) for name, one in _numbers(table).items()}
        self._weights = _Weights(table.weights)
        self._static = table._replace(**numbers, weights=self._weights, units=None, views=None)
        self._written: Table | None = None
        self.result: Any = None
        self.graph: Any = None

    @property
    def weights_read(self) -> bool:
        """The host has read a weight of guidance during the capture."""
        return self._weights.read

    def function(self) -> Callable[[], Any]:
        """The call of sample() on the buffers."""
        call, device = self._call, self._device
        fm = copy.copy(self._fm)
        static = self._static
        fm._table = lambda *_, **__: static  # type: ignore[method-assign]
        options, step_fn = self._inputs.options(call.options), self._inputs.bound(self._step_fn)
        if self._step_keys is not None:
            options["step_noise"] = noises.KeyRows(self._step_keys)
        elif self._step_noise is not None:
            options["step_noise"] = self._step_noise

        def sample() -> Any:
            if self._noise is not None:
                noise = self._noise.tensor
            else:
                noise = dispatch.keyed_noise(self._keys, fm.x_dims, call.dtype, 0, call.backend)  # type: ignore[arg-type]
                if call.temperature != 1.0:
                    noise = noises.scaled(noise, self._temperature)  # type: ignore[arg-type]
            return fm.sample(call.batch_size, step_fn, device, noise=noise, dtype=call.dtype, **options)

        return sample

    def write(self, call: _Call) -> None:
        """Copies in what the call brings.

        Noise is drawn as sample() draws it, the start first, outside the graph: but for keys, and for that of steps
        from the default generator, which the graph draws, in the order in which it and step_fn come to it.
        """
        self._inputs.write(call.leaves)
        if call.table is not self._written:
            for name, one in _numbers(call.table).items():
                getattr(self._static, name).copy_(one)
            self._written = call.table
        if self._keys is not None and self._temperature is not None:
            self._write_keys(self._keys, call.source)
            self._temperature.fill_(call.temperature)
        else:
            self._write_start(call)
        if self._step_keys is not None:
            self._write_keys(self._step_keys, call.steps_source)
        elif self._step_noise is not None:
            self._write_steps(self._step_noise, call)

    def _write_keys(self, buffer: Tensor, source: Any) -> None:
        # One key becomes rows on the device; a list is pinned first, so that the host does not wait for the copy.
        single = isinstance(source, noises.KeyedNoise)
        keys = noises.keys(source, len(buffer), self._device if single else torch.device("cpu"))
        if keys.device != self._device:
            keys = keys.pin_memory()
        buffer.copy_(keys, non_blocking=True)

    def _write_start(self, call: _Call) -> None:
        assert self._noise is not None
        buffer, noise = self._noise, call.start
        if noise is None:
            shape = (call.batch_size, *self._fm.x_dims)
            noise = noises.drawn(call.source, shape, call.dtype, self._device, call.backend, buffer.tensor)
        if call.temperature != 1.0:
            noise = noises.scaled(noise.to(call.dtype), call.temperature)
        buffer.write(noise)

    def _write_steps(self, buffer: Tensor, call: _Call) -> None:
        if call.steps_given is not None:
            buffer.copy_(call.steps_given, non_blocking=True)
            return
        source, shape = call.steps_source, (call.batch_size, *self._fm.x_dims)
        for step in range(buffer.shape[1]):
            z = noises.drawn(source, shape, buffer.dtype, self._device, call.backend, None)
            buffer.select(1, step).copy_(z, non_blocking=True)


class GraphedSampler:
    """sample() of a `FlowMatching` in CUDA graphs, one for each signature. `FlowMatching.graphed` makes it.

    Call it with the inputs of step_fn by name, and with options of sample() that differ from those it was made with::

        x = sampler(features=f)                       # as fm.sample(6, step_fn with these features, ...)
        x = sampler(features=f, noise=z)              # or generator=, or noise=KeyedNoise(7)
        x = sampler(features=f, batch_size=8)         # another graph

    On a device that is not CUDA it runs sample() each time, with the same checks and the same results.
    """

    def __init__(
        self,
        fm: FlowMatching,
        step_fn: Callable[..., Any],
        batch_size: int,
        device: torch.device | str,
        inputs: Mapping[str, Any] | None,
        max_graphs: int,
        copy_output: bool,
        fallback: str,
        module: torch.nn.Module | None,
        generators: Sequence[torch.Generator],
        options: dict[str, Any],
    ) -> None:
        if not callable(step_fn):
            raise TypeError(f"step_fn must be callable, got {step_fn!r:.60}")
        if not isinstance(inputs, (Mapping, type(None))):
            raise TypeError(f"inputs must be a dict, from the names that step_fn has for them, got {shown(inputs)}")
        if not isinstance(module, (torch.nn.Module, type(None))):
            raise TypeError(f"module must be a torch.nn.Module, got {shown(module)}")
        self._fm, self._step_fn = fm, step_fn
        self._batch_size = count(batch_size, "batch_size")
        self._device = available_device(device)
        self._names = tuple(inputs or ())
        for name in self._names:
            if not isinstance(name, str) or not name.isidentifier():
                raise TypeError(f"inputs must be named by identifiers, as arguments of step_fn are, got {shown(name)}")
            if name in _OPTIONS or name in _REFUSED or name in _RESERVED:
                raise ValueError(f"an input cannot be named {name!r}: step_fn or sample() has an argument of that name")
        self._max_graphs = count(max_graphs, "max_graphs")
        if not self._max_graphs:
            raise ValueError("max_graphs must be at least 1, got 0")
        self._copy_output = flag(copy_output, "copy_output")
        self.fallback = fallback
        self._module = module
        self._generators = _checked_generators(generators, self._device)
        self._options: dict[str, Any] = {}
        self._options = self._checked_options(options)
        self._recorder = recorder(self._device, self._generators)
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()  # the longest unused first
        self._reasons: dict[Hashable, str] = {}  # why there is no graph of a signature
        self._weights_read: set[Hashable] = set()  # signatures of which the host reads the weights of guidance
        self._dropped: set[int] = set()  # hashes of the keys of graphs that made room for others
        self._parameters = None if module is None else _fingerprint(module)
        self._captures = self._replays = 0
        self._eager: dict[str, int] = {}
        self._lock = threading.Lock()
        self._thread: int | None = None
        with self._alone():
            call = self._checked(self._batch_size, dict(inputs or {}), self._options)
            if self._recorder is not None:
                self._found(call)

    # ---- what users call ----

    def __call__(self, *, batch_size: int | None = None, copy_output: bool | None = None, **named: Any) -> Any:
        """Samples: copies in, replays, copies out. A signature that is new is captured first.

        Args:
            batch_size: B; None: the one that it was made with.
            copy_output: False: return the graph's own memory, which the next call writes to. None: as it was made.
            **named: Each input of step_fn by its name, all of them; and options of sample(), as noise, generator,
                inference_guidance_weight, time_steps or return_all_steps, for this call alone.

        Returns:
            What sample() returns: [B, *x_dims], or with return_all_steps the states and the time steps.

        Raises:
            TypeError: an input is missing, unknown or neither a tensor nor a constant, or as sample() says.
            ValueError: an input is on another device, or as sample() says.
            GraphCaptureError: the signature is new, and step_fn cannot be captured. With fallback="eager" sample()
                runs instead.
            RuntimeError: within torch.compile, a torch.func transform, another capture, or its own step_fn.
        """
        with self._alone():
            copies = self._copy_output if copy_output is None else flag(copy_output, "copy_output")
            call = self._checked_names(batch_size, named)
            if self._recorder is None:
                return self._run_eager(call, f"{self._device} has no CUDA graphs")
            found = self._found(call)
            if isinstance(found, str):
                return self._run_eager(call, found)
            with self._recorder.current():
                found.write(call)
                found.graph.replay()
                self._replays += 1
                return pytree.tree_map(torch.clone, found.result) if copies else found.result

    def eager(self, *, batch_size: int | None = None, **named: Any) -> Any:
        """The same call by sample(), without a graph: to compare with. Takes and returns what a call does."""
        with self._alone():
            return self._run_eager(self._checked_names(batch_size, named), "eager() was called")

    def set_time_steps(self, time_steps: Any, step_sizes: Any = None) -> None:
        """From the next call on sample() gets these. As many steps as before need no new graph.

        Args:
            time_steps: As for sample(); None: the time grid of the `FlowMatching`.
            step_sizes: As for sample().

        Raises:
            TypeError, ValueError: as sample(); nothing is changed then.
        """
        self._set({"time_steps": time_steps, "step_sizes": step_sizes})

    def set_guidance_weight(self, weight: Any) -> None:
        """From the next call on sample() gets this inference_guidance_weight. Needs no new graph.

        But for skip_irrelevant_model and for two velocities of different dtypes: there another weight is another graph.

        Args:
            weight: As for sample(); None: that of the `FlowMatching`.

        Raises:
            TypeError, ValueError: as sample(); nothing is changed then. ValueError too: guidance is off.
        """
        self._set({"inference_guidance_weight": weight})

    @property
    def fallback(self) -> str:
        """What a call does whose capture fails: "error" or "eager". It can be set."""
        return self._fallback

    @fallback.setter
    def fallback(self, value: str) -> None:
        if value not in FALLBACKS:
            raise ValueError(f"fallback must be 'error' or 'eager', got {value!r:.60}")
        self._fallback = value

    def reset(self) -> None:
        """Drops all graphs: the next call captures anew, with what step_fn refers to by then, as other weights."""
        with self._alone():
            self._drop_all()

    @property
    def stats(self) -> Stats:
        """What it has done so far."""
        return Stats(self._captures, self._replays, dict(self._eager), len(self._graphs))

    # ---- checks ----

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time: two would write the same buffers."""
        if torch.compiler.is_compiling() or tracing.is_transforming():
            raise RuntimeError(
                "a graphed sampler cannot be called within torch.compile, torch.func or torch.jit.trace: call sample()"
            )
        if tracing.is_capturing():
            raise RuntimeError("a graphed sampler cannot be called within the capture of another graph: call sample()")
        me = threading.get_ident()
        if self._thread == me:
            raise RuntimeError("step_fn calls the graphed sampler that runs it, whose buffers are in use")
        with self._lock:
            self._thread = me
            try:
                yield
            finally:
                self._thread = None

    def _checked_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those that it was made with, and these."""
        for name, value in options.items():
            if name in _REFUSED:
                if value is not None and value is not False:
                    raise ValueError(f"{name} cannot be used in a graph: {_REFUSED[name]}. sample() takes it")
            elif name not in _OPTIONS:
                inputs = ", ".join(self._names) or "none"
                raise TypeError(
                    f"{name!r} is neither an input of graphed() (it has {inputs}) nor an option of sample()"
                )
        return self._options | {name: value for name, value in options.items() if name in _OPTIONS}

    def _checked_names(self, batch_size: int | None, named: dict[str, Any]) -> _Call:
        """The arguments of a call."""
        missing = [name for name in self._names if name not in named]
        if missing:
            raise TypeError(f"the input {missing[0]!r} is missing: each call brings {', '.join(self._names)}")
        inputs = {name: named.pop(name) for name in self._names}
        batch_size = self._batch_size if batch_size is None else count(batch_size, "batch_size")
        return self._checked(batch_size, inputs, self._checked_options(named))

    def _checked(self, batch_size: int, inputs: dict[str, Any], options: dict[str, Any]) -> _Call:
        fm, device = self._fm, self._device
        strength = options.get("velocity_strength")
        if type(strength) not in _PLAIN:  # None, or what sample() refuses
            strength = None
        copied = () if strength is None else ("velocity_strength",)
        leaves, spec = pytree.tree_flatten((inputs, strength))
        of_leaves = tuple(_leaf_signature(leaf, device) for leaf in leaves)
        source, start = noises.source(options.get("noise"), batch_size, options.get("generator"))
        dtype = noises.state_dtype(options.get("dtype"), start, (batch_size, *fm.x_dims), device)
        if start is not None:
            if type(start) not in _PLAIN:
                raise TypeError(f"noise must be a plain tensor, got a {type(start).__name__}: sample() takes it")
            if tracing.has_derivative(start):
                raise ValueError("noise requires grad, and a graph keeps no derivative: detach it, or call sample()")
        temperature = options.get("temperature", 1.0)
        temperature = finite(1.0 if temperature is None else temperature, "temperature")
        if temperature != 1.0:
            held(temperature, "temperature", dtype)
        table, form = self._table(options, dtype, batch_size)
        steps_source, steps_given = noises.step_noise(
            options.get("step_noise"), source, (batch_size, *fm.x_dims), table, device, ADDING
        )
        name = options.get("backend")
        backend = dispatch.choose(fm.backend if name is None else name, device.type).name
        call = _Call(
            *(batch_size, source, start, steps_source, steps_given, temperature, dtype, table, backend),
            *(leaves, spec, options, None),
        )
        scaled = temperature != 1.0
        if noises.is_keyed(source):
            noise: Hashable = "keys", scaled
        elif start is None:
            noise = dtype, None
        else:
            noise = dtype if scaled else start.dtype, layouts.of(start, len(table.sizes))
        plain: Hashable = None
        if options.get("velocity_strength") is not None:  # which sample() takes with these alone
            solver, _ = fm._steps(options.get("int_method"), options.get("inference_step"))
            plain = fm.prediction_type, solver == "euler"
        signature = (
            (batch_size, *fm.x_dims),
            (dtype, noise),
            (table.noise, tuple(table.noiseless), noises.is_keyed(steps_source), _draws_outside(call)),
            (spec, of_leaves),
            tuple((name, _constant(options[name])) for name in _CAPTURED if name in options and name not in copied),
            (form, fm.step_rounding, backend, plain),
            (table.evaluations, table.steps, table.buffers, table.sum_first),
            (table.times.shape, table.times.dtype, table.coefficients.shape, table.sizes),
            _settings(device.type),
        )
        return call._replace(signature=signature)

    def _table(self, options: Mapping[str, Any], dtype: torch.dtype, batch_size: int) -> tuple[Table, str | None]:
        """The table that sample() would use now, and the form of guidance: kept tables are found, functions asked."""
        fm, given = self._fm, options.get
        int_method, of_solver = given("int_method"), given("int_method_options")
        if of_solver is not None:
            int_method = fm._with_options(int_method, of_solver)
        _, form, weight = fm._guidance(
            *(given("use_classifier_free_guidance"), given("guidance_form"), given("inference_guidance_weight")),
            *(given("unguided_step_fn"), given("combined_guidance", False), given("skip_irrelevant_model", False)),
        )
        table = fm._table(
            *(int_method, given("inference_step"), given("time_steps"), given("step_sizes")),
            *(dtype, self._device, form, weight),
            cached=tracing.is_eager(),
            batch_size=batch_size,
        )
        return table, form

    def _set(self, changed: dict[str, Any]) -> None:
        with self._alone():
            options = self._options | changed
            dtype = options.get("dtype") or torch.get_default_dtype()
            _, form = self._table(options, dtype, self._batch_size)
            if form is None and "inference_guidance_weight" in changed:
                raise ValueError("guidance is off: graphed(..., use_classifier_free_guidance=True) turns it on")
            self._options = options

    # ---- graphs ----

    def _found(self, call: _Call) -> _Graph | str:
        """The graph of a call, captured now if there is none; or why there is none."""
        if self._module is not None and self._parameters != (now := _fingerprint(self._module)):
            logger.info("module= has parameters or buffers in other memory: %d graphs are dropped", len(self._graphs))
            self._drop_all()
            self._parameters = now
        key = self._key(call)
        if key not in self._graphs:
            if key in self._reasons and self.fallback == "eager":
                return self._reasons[key]
            graph = self._captured(call)
            if isinstance(graph, str):
                if len(self._reasons) == _REASONS:
                    self._reasons.clear()
                self._reasons[key] = graph
                return graph
            key = self._key(call)  # which has the weights, where they were read
            self._graphs[key] = graph
            if hash(key) in self._dropped:
                logger.warning(
                    "a graph that made room for others is captured again: more than max_graphs=%d signatures are used",
                    self._max_graphs,
                )
            while len(self._graphs) > self._max_graphs:
                dropped, oldest = self._graphs.popitem(last=False)
                self._dropped.add(hash(dropped))
                self._recorder.drop([oldest.graph])
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _key(self, call: _Call) -> Hashable:
        return (call.signature, call.table.weights) if call.signature in self._weights_read else call.signature

    def _captured(self, call: _Call) -> _Graph | str:
        graph = _Graph(self._fm, self._step_fn, self._device, call)
        sample = graph.function()
        states = [(generator, generator.get_state()) for generator in self._drawn_from()]
        try:
            with _one_capture, self._recorder.current():
                # The call's own draws come later: here the default generator draws, which is put back.
                start, steps = (one if noises.is_keyed(one) else None for one in (call.source, call.steps_source))
                graph.write(call._replace(source=start, steps_source=steps))
                self._recorder.warm_up(sample)  # what this raises, sample() raises too
                try:
                    graph.result, graph.graph = self._recorder.capture(sample)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    return self._not_captured(error)
        finally:
            for generator, state in states:  # the warm-up has drawn from them, and so may have the capture
                generator.set_state(state)
        self._captures += 1
        if graph.weights_read:
            self._weights_read.add(call.signature)
        logger.info("captured sample() for a batch of %d in a CUDA graph", call.batch_size)
        return graph

    def _not_captured(self, error: Exception) -> str:
        text, lower = str(error).partition("\n")[0], f"{error}".lower()
        hint = next((hint for words, hint in _HINTS if any(word in lower for word in words)), _HINT)
        if self.fallback == "error":
            raise GraphCaptureError(
                f"step_fn cannot be captured in a CUDA graph: {type(error).__name__}: {text:.300}. Look for {hint}. "
                "sample() runs it as it is, and so do eager() of this sampler and fallback='eager'"
            ) from error
        logger.warning("step_fn cannot be captured in a CUDA graph and runs without: %s. Look for %s", text, hint)
        return f"{type(error).__name__}: {text:.300}"

    def _drawn_from(self) -> list[torch.Generator]:
        """The generators that a step_fn may draw from."""
        default = [torch.default_generator]
        if self._device.type == "cuda":
            default.append(torch.cuda.default_generators[self._device.index])
        return [*default, *self._generators]

    def _drop_all(self) -> None:
        graphs = [graph.graph for graph in self._graphs.values()]
        self._graphs.clear()
        self._reasons.clear()
        self._weights_read.clear()
        if graphs:
            self._recorder.drop(graphs)

    def _run_eager(self, call: _Call, reason: str) -> Any:
        """By sample(), on copies of the inputs, which step_fn may write to as it may to a graph's buffers."""
        inputs = _Inputs(call.leaves, call.spec)
        inputs.write(call.leaves)
        written = {name: call.options[name] for name in (*_WRITTEN, *_GRIDS) if name in call.options}
        options = inputs.options(call.options) | written
        if options.get("temperature", 1.0) is None:
            del options["temperature"]
        x = self._fm.sample(call.batch_size, inputs.bound(self._step_fn), self._device, **options)
        self._eager[reason] = self._eager.get(reason, 0) + 1
        return x


def _numbers(table: Table) -> dict[str, Tensor]:
    """The tensors of a table, which a graph has in memory of its own."""
    found = {"times": table.times, "coefficients": table.coefficients}
    return found if table.densities is None else found | {"densities": table.densities}


def _draws_outside(call: _Call) -> bool:
    """Whether the noise of the steps is given, or drawn from a generator that the graph does not know."""
    return call.steps_given is not None or (call.steps_source is not None and not noises.is_keyed(call.steps_source))


def _checked_generators(generators: Any, device: torch.device) -> tuple[torch.Generator, ...]:
    if not isinstance(generators, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in generators):
        raise TypeError(f"generators must be a list of torch.Generator, got {shown(generators)}")
    for one in generators:
        if one.device != device:
            raise ValueError(f"generators must be on {device}, got one on {one.device}")
    return tuple(generators)


def _leaf_signature(leaf: Any, device: torch.device) -> Hashable:
    """What of an input makes another graph: of a tensor all but its values, of a constant its value.

    Raises:
        TypeError: it is neither.
        ValueError: it is a tensor on another device.
    """
    if not isinstance(leaf, Tensor):
        if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype)):
            return _constant(leaf)
        raise TypeError(
            "inputs must hold tensors, in dicts, lists and tuples, and constants (None, bool, int, float, str, "
            f"torch.dtype); got {shown(leaf)}: pass the tensors that it holds"
        )
    if type(leaf) not in _PLAIN:
        raise TypeError(f"inputs must be plain tensors, got a {type(leaf).__name__}")
    check_dense(leaf, "an input")
    if elsewhere(leaf, device):
        raise ValueError(
            f"an input or velocity_strength is on {leaf.device}, and the sampler on {device}: move it there"
        )
    return leaf.shape, leaf.stride(), leaf.dtype


def _constant(value: Any) -> Hashable:
    """A constant by its type and value, any other object by its identity: the graph keeps a reference to it."""
    if type(value) is float:
        return float, struct.pack("d", value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return type(value), value
    return object, id(value)


def _settings(device_type: str) -> tuple[Any, ...]:
    """What else of PyTorch's state decides which operations step_fn runs."""
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)  # which knows no such device
    return (
        autocast and torch.get_autocast_dtype(device_type),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )


def _fingerprint(module: torch.nn.Module) -> list[Any]:
    """Where the parameters and buffers of a module are, and which of its modules train; some 2 us a tensor."""
    found: list[Any] = []
    modules: list[Any] = [module]
    while modules:
        one = modules.pop()
        if one is None:
            continue
        found.append(one.training)
        for tensors in (one._parameters, one._buffers):
            for x in tensors.values():
                if type(x) is torch.nn.Parameter or type(x) is Tensor:
                    found += (x.data_ptr(), x.dtype, x.shape, x.stride())
                else:
                    found.append(id(x))
        modules += one._modules.values()
    return found
