"""Ray Data: jobs of millions of samples, each of which depends on its row alone, and that can be started again.

    from flowmatch_kernels.integrations.ray import Sampler, missing

`Sampler` is the callable class that `Dataset.map_batches` makes once in each actor; `missing` leaves the rows that are
not in the output yet. The noise of a sample is drawn by a key, of which a column of the row is the index: so it does
not matter which actor samples a row, in which batch, or whether the job was killed before.

Needs Ray Data: `pip install flowmatch_kernels[ray]`. Importing this module imports neither Ray nor pyarrow.

Source: docs.ray.io, ray.data.Dataset.map_batches and write_parquet (2.60.0).
"""

from __future__ import annotations

import functools
import logging
import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import count, shown
from ..base import BaseDiffusion, StepFn
from ..noise import KeyedNoise
from ..step_functions import no_velocity
from .replacement import needed

logger = logging.getLogger("flowmatch_kernels")

INCOMPLETE = "_incomplete-"
"""What the name of a file begins with that `missing` found unreadable. Readers of Parquet skip such names."""


class Sampler:
    """A sample for each row of a batch, drawn from the row's key.

    For `ds.map_batches(Sampler, fn_constructor_args=(load,), fn_constructor_kwargs={"seed": 0}, batch_size=256, ...)`.
    The bits of a row's sample are those of `fm.sample(1, step_fn, noise=KeyedNoise(seed, first=row[index]))`, as far as
    step_fn gives a sample the same bits in every batch; see `rows`.

    Args:
        load: Called once in each actor, without arguments; returns (fm, step_fn): a sampler, as a `FlowMatching`, and
            its velocity, called as step_fn(x=, t=), or with the conditions beside. Or with an unguided_step_fn, which
            is called likewise, third.
        seed: Of the keys.
        index: The column of the sample's index: integers in [0, 2^48), each once.
        stream: Of the keys.
        conditions: Columns that step_fn also gets, by their names, as tensors [B, ...] on the device.
        output: The new column: [*x_dims] a row, float32, float64 or float16; bfloat16 becomes float32.
        rows: How many rows a call of step_fn gets, always: a batch is cut into so many, and the last part filled up
            with copies of its last row. A network may give a row other bits in another batch size, and the batches of a
            job that was started again are others. None: the batch as it comes.
        device: Where to sample. None: the actor's GPU, or the CPU.
        **options: Of `fm.sample`, for all rows alike.

    Raises:
        TypeError: an argument is of the wrong type, load returns something else, or the index holds no integers.
        ValueError: an argument has a value that cannot be used, or a column is missing, or there already.

    Example:
        >>> import numpy, torch
        >>> from flowmatch_kernels import FlowMatching
        >>> from flowmatch_kernels.integrations.ray import Sampler
        >>> sampler = Sampler(lambda: (FlowMatching((64, 2)), lambda x, t: torch.sin(4 * t) - x), seed=0)
        >>> sampler({"id": numpy.arange(6)})["sample"].shape
        (6, 64, 2)
    """

    def __init__(
        self,
        load: Callable[[], tuple[BaseDiffusion, StepFn] | tuple[BaseDiffusion, StepFn, StepFn]],
        *,
        seed: int,
        index: str = "id",
        stream: int = 0,
        conditions: Sequence[str] = (),
        output: str = "sample",
        rows: int | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        if not callable(load):
            raise TypeError(f"load must be callable, got {shown(load)}")
        KeyedNoise(seed, 0, stream)  # which checks them
        if isinstance(conditions, str):
            raise TypeError(f"conditions must be a list of names of columns, got {shown(conditions)}")
        for name in ("noise", "generator", "step_noise", "return_all_steps", "return_log_prob", "callback"):
            if name in options:
                raise ValueError(f"{name} is not for a Sampler: the noise is drawn by the rows' keys, and a row is x")
        if rows is not None and count(rows, "rows") < 1:
            raise ValueError("rows must be at least 1, or None, got 0")
        made = load()
        if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], BaseDiffusion):
            raise TypeError(f"load must return (fm, step_fn) or (fm, step_fn, unguided_step_fn), got {shown(made)}")
        self._fm, self._models = made[0], dict(zip(("step_fn", "unguided_step_fn"), made[1:], strict=False))
        self._key = functools.partial(KeyedNoise, seed, stream=stream)
        self._index, self._conditions, self._output, self._rows = index, tuple(conditions), output, rows
        self._options = options
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the samples.

        Args:
            batch: Columns by name, each an array of B rows, as Ray passes them with batch_format="numpy".

        Raises:
            TypeError, ValueError: as the class says.
        """
        for name in (self._index, *self._conditions):
            if name not in batch:
                raise ValueError(f"the batch has no column {name!r}; it has {', '.join(map(repr, batch))}")
        if self._output in batch:
            raise ValueError(f"the batch has a column {self._output!r} already: pass another output=")
        index = batch[self._index]
        if index.dtype.kind not in "iu" or index.ndim != 1:
            raise TypeError(f"the index column {self._index!r} must hold integers, got {index.dtype} {index.shape}")
        keys = [self._key(first) for first in index.tolist()]
        given = {name: torch.as_tensor(batch[name]).to(self._device) for name in self._conditions}
        size = self._rows or max(len(keys), 1)
        parts = [self._sampled(keys[k : k + size], k, given) for k in range(0, max(len(keys), 1), size)]
        x = torch.cat(parts)
        return {**batch, self._output: (x.float() if x.dtype is torch.bfloat16 else x).cpu().numpy()}

    def _sampled(self, keys: list[KeyedNoise], first: int, conditions: Mapping[str, Tensor]) -> Tensor:
        """The samples of so many rows from the first on."""
        more = self._rows - len(keys) if self._rows and keys else 0
        noise = keys + keys[-1:] * more
        given = {name: _filled(x[first : first + len(keys)], more) for name, x in conditions.items()}
        models: dict[str, Any] = {
            name: functools.partial(model, **given) if given else model for name, model in self._models.items()
        }
        if not keys:  # Ray may ask for the schema by an empty batch
            models = dict.fromkeys(models, no_velocity)
        return self._fm.sample(len(noise), device=self._device, noise=noise, **models, **self._options)[: len(keys)]


def missing(dataset: Any, path: str, index: str = "id", filesystem: Any = None) -> Any:
    """The rows of a dataset that are not in the output yet, so that a job that was killed goes on.

    `missing(ds, path).map_batches(Sampler, ...).write_parquet(path)` may be run until `missing` leaves nothing. Rows
    are told apart by the index column. A file that is no whole Parquet file, as a killed writer leaves it, is renamed
    to begin with "_incomplete-", and its rows are sampled again. Call it while no other job writes to the folder.

    Args:
        dataset: A ray.data.Dataset with the index column.
        path: The folder of the Parquet files: a local one, or a URI that pyarrow knows; it need not exist.
        index: The column.
        filesystem: A pyarrow.fs.FileSystem; None: the path's.

    Raises:
        ImportError: Ray Data is not installed.
        ValueError: a file of the folder has no such column.
    """
    needed("ray.data", "ray")
    done = _done(path, index, filesystem)
    if not len(done):
        return dataset
    return dataset.map_batches(functools.partial(_left, index=index, done=done), batch_format="numpy")


def _done(path: str, index: str, filesystem: Any) -> Any:
    """The indexes of the rows in the files of a folder, sorted."""
    import numpy
    from pyarrow import ArrowInvalid, fs, parquet

    if filesystem is None:
        filesystem, path = fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
    found = [numpy.empty(0, dtype=numpy.int64)]
    for file in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True)):
        name = posixpath.basename(file.path)
        if not file.is_file or not name.endswith(".parquet") or name.startswith(("_", ".")):
            continue
        try:
            with filesystem.open_input_file(file.path) as stream:
                content = parquet.ParquetFile(stream)
                names = content.schema_arrow.names
                table = content.read(columns=[index]) if index in names else None
        except (ArrowInvalid, OSError) as error:
            aside = posixpath.join(posixpath.dirname(file.path), INCOMPLETE + name)
            logger.warning("%s is no whole Parquet file (%s): renamed to %s", file.path, error, aside)
            filesystem.move(file.path, aside)
            continue
        if table is None:
            raise ValueError(f"{file.path} has no column {index!r}; it has {', '.join(map(repr, names))}")
        found.append(table.column(0).to_numpy())
    return numpy.unique(numpy.concatenate(found))


def _left(batch: dict[str, Any], index: str, done: Any) -> dict[str, Any]:
    """The rows of a batch whose index is not among those that are done."""
    import numpy

    left = ~numpy.isin(batch[index], done)
    return {name: column[left] for name, column in batch.items()}


def _filled(x: Tensor, more: int) -> Tensor:
    """x with copies of its last row behind it."""
    return torch.cat([x, x[-1:].expand(more, *x.shape[1:])]) if more else x
