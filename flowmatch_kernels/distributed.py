"""sample() on several processes with torch.distributed: the bits of one process, for any number of ranks.

Each rank integrates a slice of the batch. The noise of a sample does not depend on the rank: it is drawn by key, or cut
out of the one draw that every rank makes. What passes between the ranks of a call, in this order:

    agreement       an all-reduce of 24 bytes: has preparing failed, and a hash of what is asked for
    outcome         an all-reduce of 24 bytes: has sampling failed, and a hash of the shapes that are to be gathered
    the samples     gather=True: one all-gather for each tensor of the result, shards padded to the largest

Where a rank has failed, or the hashes differ, the ranks exchange texts, and every rank raises.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import layouts, solvers
from . import noise as noises
from .arguments import available_device, count, flag, integer, own_dims, shown
from .base import BaseDiffusion, StepFn
from .noise import KeyedNoise, PartOfDraw
from .ops import subclasses
from .ops.keyed_noise import INDEXES
from .solvers import FittedSolver, StochasticSolver
from .step_functions import no_velocity

Mesh = DeviceMesh | dist.ProcessGroup
Group = dist.ProcessGroup | None
"""As torch.distributed's functions take it; None: the default group."""


class RankError(RuntimeError):
    """Another rank failed, or did not answer."""


def sample(
    fm: BaseDiffusion,
    step_fn: StepFn,
    batch_size: int,
    *,
    noise: Tensor | KeyedNoise | Sequence[KeyedNoise] | Sequence[torch.Generator] | None = None,
    generator: torch.Generator | None = None,
    mesh: Mesh | None = None,
    gather: bool = True,
    sizes: Sequence[int] | None = None,
    **options: Any,
) -> Any:
    """`fm.sample` of a batch that is split over the ranks; every rank of the mesh calls it, with equal arguments.

    The result has the bits of `fm.sample(batch_size, step_fn, noise=noise, ...)` in one process, for every number of
    ranks and every split, as far as step_fn gives a sample the same bits in every batch: the noise, the solver and the
    step do. A matrix product may not; see the page on distributed sampling.

    Args:
        fm: The sampler: `FlowMatching`, `DDIM` or `DDPM`.
        step_fn: The velocity, called with this rank's samples: x [b, *x_dims], b being the size of its slice. What it
            closes over has a slice of its own: `features[local_slice(batch_size)]`. A rank without samples does not
            call it.
        batch_size: B, of all ranks together.
        noise: As for `fm.sample`, for the whole batch. A `KeyedNoise` is best: no rank draws for another. Of a tensor
            and of a list each rank reads its own slice alone. None: every rank makes PyTorch's one draw of the whole
            batch, from a generator whose state is equal on all ranks, and keeps its slice.
        generator: For the draw.
        mesh: A DeviceMesh of one dimension (of a larger one a part, as mesh["dp"]), or a process group. None: all
            ranks.
        gather: Every rank returns the whole batch. False: its slice; then a callback and differentiable=True can be
            used too.
        sizes: How many samples each rank takes, B in all. None: evenly, the first ranks one more where B does not
            divide.
        **options: Of `fm.sample`, for the whole batch: velocity_strength, step_noise, and times, step sizes and weights
            that are given for each sample or token, are sliced as the noise is. A constraint is called with this rank's
            samples. A bar of progress is shown by the first rank alone.

    Returns:
        As `fm.sample`, of the whole batch or, with gather=False, of this rank's slice.

    Raises:
        TypeError: an argument is of the wrong type, or noise is a DTensor, which `fm.sample` itself takes.
        ValueError: an argument has a value that cannot be used, torch.distributed is not initialized, this process is
            not in the mesh, or arguments differ between ranks: the message names them.
        RankError: another rank raised, and this is its message; or a rank did not answer: it ended, or the process
            group's timeout passed. A rank that raised an exception of its own raises that one.

    Example:
        >>> import torch
        >>> from flowmatch_kernels import FlowMatching, KeyedNoise, distributed
        >>> step_fn = lambda x, t: torch.sin(4 * t) - x
        >>> def main():  # started by: torchrun --nproc-per-node 2 script.py
        ...     torch.distributed.init_process_group("gloo")
        ...     return distributed.sample(FlowMatching((64, 2)), step_fn, 7, noise=KeyedNoise(0))
    """
    group = _group(mesh)
    ranks = _Ranks(group)
    failure: Exception | None = None
    facts: dict[str, str] = {}
    try:
        call = _Call(fm, step_fn, batch_size, noise, generator, gather, sizes, options, ranks)
        facts = call.facts()
    except Exception as error:
        failure = error
    ranks.agree(failure, facts)
    facts = {}
    try:
        result = call.run()
        facts = call.outcome(result)
    except Exception as error:
        failure = error
    ranks.agree(failure, facts)
    return call.gathered(result) if gather else result


def local_slice(batch_size: int, mesh: Mesh | None = None, sizes: Sequence[int] | None = None) -> slice:
    """The samples of this rank, for what step_fn closes over: features[local_slice(batch_size)].

    Args:
        batch_size, mesh, sizes: As for `sample`.

    Raises:
        TypeError, ValueError: as `sample`.
    """
    group = _group(mesh)
    first, size = _split(batch_size, dist.get_world_size(group), sizes)[dist.get_rank(group)]
    return slice(first, first + size)


class _Call:
    """What one call of `sample` does on this rank."""

    def __init__(
        self,
        fm: BaseDiffusion,
        step_fn: StepFn,
        batch_size: int,
        noise: Any,
        generator: torch.Generator | None,
        gather: bool,
        sizes: Sequence[int] | None,
        options: dict[str, Any],
        ranks: _Ranks,
    ) -> None:
        if not isinstance(fm, BaseDiffusion):
            raise TypeError(f"fm must be a FlowMatching, a DDIM or a DDPM, got {shown(fm)}")
        if not callable(step_fn):
            raise TypeError(f"step_fn must be callable, got {shown(step_fn)}")
        self._given = {"batch_size": batch_size, "noise": noise, "gather": flag(gather, "gather"), "sizes": sizes}
        self._given |= options
        if gather:
            _check_gathered(options)
        self._fm, self._ranks = fm, ranks
        self._parts = _split(batch_size, ranks.world, sizes)
        batch_size = sum(size for _, size in self._parts)
        first, self._size = self._parts[ranks.rank]
        self._device = available_device(options.get("device", "cpu"))
        self._draw: PartOfDraw | None = None
        source, whole = noises.source(noise, batch_size, generator)
        noises.state_dtype(options.get("dtype"), whole, (batch_size, *fm.x_dims), self._device)
        if source is None or isinstance(source, torch.Generator):
            source = self._draw = PartOfDraw(source, batch_size, first)
        options = dict(options)
        cut = functools.partial(_cut, batch_size=batch_size, first=first, size=self._size)
        if self._draw is None or whole is not None:
            options["noise"] = cut(noise, "noise")
        if self._draw is not None:
            options["generator"] = self._draw
        if options.get("step_noise") is not None:
            options["step_noise"] = cut(options["step_noise"], "step_noise")
        strength = options.get("velocity_strength")
        if isinstance(strength, Tensor) and strength.dim() > len(fm.x_dims) and strength.shape[0] != 1:
            options["velocity_strength"] = cut(strength, "velocity_strength")
        self._own_times, own = self._cut_numbers(options, cut)
        self._layout = layouts.of(noise, own) if isinstance(noise, Tensor) else None
        if options.get("progress") is True:
            options["progress"] = ranks.rank == 0
        if not self._size:
            step_fn = no_velocity
            if callable(options.get("unguided_step_fn")):
                options["unguided_step_fn"] = no_velocity
            if callable(options.get("constraint")):
                options["constraint"] = None
        self._run = functools.partial(fm.sample, self._size, step_fn, **options)

    def _cut_numbers(self, options: dict[str, Any], cut: Callable[[Any, str], Any]) -> tuple[int, int]:
        """Cuts numbers that are given for each sample. A rank without samples gets others.

        Returns:
            Of how many first sizes of the state the times have a row for each, and of how many anything has.
        """
        dims = {}
        guided = options.get("use_classifier_free_guidance")
        guided = getattr(self._fm, "use_classifier_free_guidance", False) if guided is None else guided
        for name in ("time_steps", "step_sizes", *["inference_guidance_weight"] * (guided is True)):
            value: Any = options.get(name)
            if value is None and name == "inference_guidance_weight":
                value = getattr(self._fm, name, None)
            dims[name] = own_dims(value)
            if not dims[name]:
                continue
            options[name] = value if len(value) == 1 else cut(value, name)
            if not self._size and name == "time_steps" and len(value):  # of as many steps, and in their dtype
                row = value
                for _ in range(dims[name]):
                    row = row[0]
                at = (0.75, 0.25) if getattr(self._fm, "noise_at", 0) else (0.25, 0.75)
                options[name] = torch.linspace(*at, len(row), dtype=getattr(value, "dtype", None), device=self._device)
            elif not self._size:
                options[name] = None if name == "step_sizes" else 1.0
        return max(dims["time_steps"], dims["step_sizes"]), max(dims.values())

    def facts(self) -> dict[str, str]:
        """What must be equal on all ranks, in words."""
        facts = {"torch's default dtype": str(torch.get_default_dtype())}
        facts["fm"] = type(self._fm).__name__
        for name, value in vars(self._fm).items():
            computed = isinstance(getattr(type(self._fm), name, None), functools.cached_property)
            if not name.startswith("_") and not computed and name != "training":
                facts[f"fm.{name}"] = _fact(value)
        signature = _signature(type(self._fm))
        for name, value in self._given.items():
            if name in signature and signature[name].default is not inspect.Parameter.empty and value is None:
                continue  # left out, or None: the same
            facts[name] = _fact(_loaded(value) if name == "int_method" else value, name in _PER_SAMPLE)
        facts["device"] = self._device.type
        if self._draw is not None and self._given["noise"] is None:
            facts[_GENERATOR] = _digest(self._draw.state(self._device))
        return facts

    def run(self) -> Any:
        """This rank's slice of the result."""
        return self._run()

    def outcome(self, result: Any) -> dict[str, str]:
        """What must be equal on all ranks after sampling: the draws, and what is to be gathered."""
        facts = {}
        if self._draw is not None:
            facts[_GENERATOR] = _digest(b"".join(self._draw.states))
        if self._given["gather"]:
            tensors, times = self._tensors(result)
            facts["the shape of the result"] = str([(tuple(x.shape[1:]), x.dtype) for x in tensors])
            facts["the time grid"] = _fact(times.dtype if self._own_times and times is not None else times)
        return facts

    def gathered(self, result: Any) -> Any:
        """The whole result."""
        sizes = [size for _, size in self._parts]
        (x, *rest), times = self._tensors(result)
        layout = None if times is not None else self._layout  # a trajectory is contiguous
        whole = self._ranks.gathered(x if layout is None else layout.stored(x), sizes)
        found = [whole if layout is None else layout.seen(whole, differentiable=False)]
        if times is not None and self._own_times:  # a row for each sample
            between = self._fm.x_dims[: self._own_times - 1]
            own = times if self._size else times.new_empty(0, *between, times.shape[-1])
            times = self._ranks.gathered(own, sizes)
        if times is not None:
            found.append(times)
        found += [self._ranks.gathered(one, sizes) for one in rest]
        return tuple(found) if len(found) > 1 else found[0]

    def _tensors(self, result: Any) -> tuple[list[Tensor], Tensor | None]:
        """What has a row for each sample, and the times of a trajectory."""
        if isinstance(result, Tensor):
            return [result], None
        found = list(result)
        times = found.pop(1) if self._given.get("return_all_steps") else None
        return found, times


class _Ranks:
    """The ranks of a group, and what passes between them."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        # As "cpu:gloo,cuda:nccl": the kinds of device whose tensors the group can send.
        self._kinds = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
        self._messages = "cpu" if "cpu" in self._kinds else self._kinds[0]

    def agree(self, failure: Exception | None, facts: Mapping[str, str]) -> None:
        """Returns on every rank, or raises on every rank.

        Args:
            failure: What this rank raised.
            facts: What must be equal on all ranks, by name.

        Raises:
            Exception: this rank's failure.
            RankError: another rank's failure, or a rank that does not answer.
            ValueError: facts differ.
        """
        word = int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=7).digest(), "big")
        # The largest word is the smallest where all are equal. An all-gather would be of as many words as ranks.
        words = torch.tensor([failure is not None, word, -word], dtype=torch.int64, device=self._messages)
        try:
            self._collective(functools.partial(dist.all_reduce, op=dist.ReduceOp.MAX), words)
            failed, largest, smallest = words.tolist()
            if not failed and largest == -smallest:
                return
            texts: list[Any] = [None] * self.world
            text = None if failure is None else "".join(traceback.format_exception_only(failure)).strip()
            self._collective(dist.all_gather_object, texts, (text, dict(facts)))
        except RankError:
            if failure is not None:
                raise failure from None
            raise
        if failure is not None:
            raise failure
        raised = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(texts) if text is not None]
        if raised:
            raise RankError("sample() ended, since another rank raised. " + "; ".join(raised))
        raise ValueError("sample() must be called alike on all ranks; " + _differences([facts for _, facts in texts]))

    def gathered(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all ranks, [sum of sizes, ...], of which this rank has x, [sizes[rank], ...]."""
        shape = sum(sizes), *x.shape[1:]
        row, largest = x[:1].new_empty(x.shape[1:]).numel() * x.element_size(), max(sizes)
        if not row or not largest:
            return x.new_empty(shape)
        device = x.device.type if x.device.type in self._kinds else self._messages
        # As bytes: gloo does not take every dtype. Padded: it takes no shards of unequal size.
        mine = x.detach().contiguous().to(device).view(-1).view(torch.uint8)
        if len(mine) < largest * row:
            mine = torch.cat([mine, mine.new_zeros(largest * row - len(mine))])
        found = mine.new_empty(self.world * largest * row)
        self._collective(_all_gather, found, mine)
        if min(sizes) < largest:
            shards = found.view(self.world, -1)
            found = torch.cat([shard[: size * row] for shard, size in zip(shards, sizes, strict=True)])
        return found.view(x.dtype).view(shape).to(x.device)

    def _collective(self, collective: Callable[..., Any], *arguments: Any) -> None:
        try:
            collective(*arguments, group=self._group)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} waited for the others, and one did not answer: it ended, or its link is cut, or it "
                f"took longer than the timeout of the process group (init_process_group(timeout=...)). {error}"
            ) from error


#: The newer name of two, of which torch 2.13 deprecates the older.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: Arguments of which each rank has a slice: their contents may differ where another rank reads.
_PER_SAMPLE = ("noise", "step_noise", "velocity_strength")
_GENERATOR = "the state of the generator that draws the noise (seed it alike on all ranks, or pass a KeyedNoise)"


def _group(mesh: Any) -> Group:
    """The process group.

    Raises:
        TypeError: mesh is neither a DeviceMesh nor a process group.
        ValueError: torch.distributed is not initialized, the mesh has several dimensions, or this process is not in it.
    """
    outside = mesh is dist.GroupMember.NON_GROUP_MEMBER  # what new_group() returns to who is not in the group
    if mesh is not None and not outside and not isinstance(mesh, (DeviceMesh, dist.ProcessGroup)):
        raise TypeError(f"mesh must be a DeviceMesh or a process group, got {shown(mesh)}")
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialized: call torch.distributed.init_process_group(...) first")
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh must have one dimension, over which the samples are split, got {mesh.ndim}: {mesh}; pass the "
                'part of it, as mesh["dp"]'
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"rank {dist.get_rank()} is not in the mesh: only its ranks call sample()")
        return mesh.get_group()
    if outside or (mesh is not None and dist.get_rank(mesh) < 0):
        raise ValueError(f"rank {dist.get_rank()} is not in the process group: only its ranks call sample()")
    return mesh


def _split(batch_size: int, world: int, sizes: Sequence[int] | None) -> list[tuple[int, int]]:
    """The first sample of each rank, and how many it has.

    Raises:
        TypeError: an argument is no int, or sizes no sequence of ints.
        ValueError: one is negative, or sizes has not an entry for each rank, or another sum than batch_size.
    """
    batch_size = count(batch_size, "batch_size")
    if sizes is None:
        each, more = divmod(batch_size, world)
        found = [each + (rank < more) for rank in range(world)]
    else:
        if not isinstance(sizes, (list, tuple)):
            raise TypeError(f"sizes must be a list of ints, one for each rank, got {shown(sizes)}")
        found = [integer(size, "sizes", "a list of ints") for size in sizes]
        if len(found) != world or min(found) < 0 or sum(found) != batch_size:
            raise ValueError(
                f"sizes must have an entry for each of {world} ranks, none negative, {batch_size} in all; got "
                f"{shown(sizes)}"
            )
    return list(zip(itertools.accumulate(found, initial=0), found, strict=False))


def _cut(value: Any, name: str, batch_size: int, first: int, size: int) -> Any:
    """The slice of an argument that has a row for each sample. What it cannot be is for `fm.sample` to say.

    Raises:
        TypeError: it is a DTensor.
        ValueError: it has not batch_size rows.
    """
    if isinstance(value, KeyedNoise):
        if value.first + batch_size > INDEXES:
            raise ValueError(f"first + batch_size of {name} must be at most 2^48, got {value.first} + {batch_size}")
        return KeyedNoise(value.seed, value.first + (first if size else 0), value.stream)
    if subclasses.is_dtensor(value):
        raise TypeError(f"{name} is a DTensor, which is sharded already: fm.sample itself takes it, shard by shard")
    if not isinstance(value, (Tensor, list, tuple)):
        return value
    if isinstance(value, Tensor) and not value.dim():
        raise ValueError(f"{name} must have a row for each of {batch_size} samples, got a tensor of no dimension")
    if len(value) != batch_size:
        raise ValueError(
            f"{name} must have an entry for each sample of the whole batch, {batch_size}; got {len(value)}"
        )
    return value[first : first + size]


def _check_gathered(options: Mapping[str, Any]) -> None:
    """Raises ValueError where the result of an option cannot be gathered."""
    refused = {
        "callback": "a callback may stop the ranks at different steps",
        "differentiable": "a gathered result keeps no derivative",
    }
    for name, reason in refused.items():
        if options.get(name) not in (None, False):
            raise ValueError(f"{name} needs gather=False: {reason}")


@functools.cache
def _signature(kind: type[BaseDiffusion]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.sample).parameters


def _loaded(int_method: Any) -> Any:
    """A solver as it is, where int_method is the name of a file."""
    return int_method if isinstance(int_method, StochasticSolver) else solvers.loaded(int_method)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _fact(value: Any, per_sample: bool = False) -> str:
    """A value in words that are equal on two ranks where the value is. Functions and modules all look alike.

    Args:
        value: Any argument.
        per_sample: Of a tensor or a list the contents do not count.
    """
    if isinstance(value, Tensor):
        said = f"a tensor {list(value.shape)} of {value.dtype}"
        if per_sample:
            return said
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).tolist()
        return f"{said} with the contents {_digest(bytes(content))}"
    if isinstance(value, FittedSolver):
        return f"a fitted solver {_digest(value.bits())}"
    if isinstance(value, (list, tuple)):
        if per_sample:
            return f"{len(value)} of {type(value[0]).__name__ if value else 'nothing'}"
        return f"[{', '.join(map(_fact, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{name!r}: {_fact(item)}' for name, item in value.items()))}}}"
    if isinstance(value, torch.device):
        return value.type
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, KeyedNoise, StochasticSolver)):
        return repr(value)
    return f"a {type(value).__name__}" if not inspect.isroutine(value) else "a function"


def _differences(facts: Sequence[Mapping[str, str]]) -> str:
    """Which facts differ between ranks, and where."""
    said = []
    for name in dict.fromkeys(itertools.chain(*facts)):
        by_value: dict[str, list[int]] = {}
        for rank, its in enumerate(facts):
            by_value.setdefault(its.get(name, "not given"), []).append(rank)
        if len(by_value) > 1:
            where = "; ".join(f"{value:.100} on rank {', '.join(map(str, on))}" for value, on in by_value.items())
            said.append(f"{name} differs: {where}")
    return ". ".join(said) or "they ask for different things"
