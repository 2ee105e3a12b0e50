"""The input of a job: an HDF5 file that is opened and checked as a whole, and read one shard a rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..attention import RingAttention
from ..checks import check_relative, check_shapes
from ..dtypes import accumulator
from ..errors import DtypeError, ShapeError, ShardError
from ..files.axes import HIDDEN, Axes
from ..files.filters import OWN, Filters, filters_of_plugins
from ..files.hdf5 import open_dataset, read_floats, read_integers, read_rows
from ..files.opening import open_file
from ..files.tokens import Tokens
from ..layout import Contiguous
from ..mask import ARRAYS, RANGES
from ..mask_base import BaseMask
from ..relative import Relative
from ..schedules.redistribution import redistribute
from .masks import make_mask
from .options import Options
from .run import Run

MOST_OFFSETS = 2**20           # of documents, however few tokens there are: 8 MiB
# Axes of datasets that a mask is made of; of others offsets.
OF_A_MASK = {**dict.fromkeys(RANGES, ("ranges", "ends")), "document_ids": ("n_k",), "key_mask": ("n_k",),
             "parents": ("n_documents",)}


@dataclass(frozen=True)
class Sizes:
    """What an input holds, all ranks together."""

    n_q: int
    n_k: int
    heads: int
    kv_heads: int
    dim: int
    dim_v: int
    dtype: str
    key_bias: int = 0             # numbers of each key: 0 without, 1, or one for each head
    batch: int | None = None      # elements of the batch, if there is such an axis
    in_keys: bool = False         # whether values are the first numbers of keys
    tables: tuple[int, ...] = ()  # numbers for each head of the tables of a bias by distance, one or for each axis

    @property
    def elements(self) -> int:
        """Elements of the batch; 1 without such an axis."""
        return 1 if self.batch is None else self.batch

    @property
    def of_batch(self) -> str:
        """How many times there is what is said: to be put before it."""
        return "" if self.batch is None else f"{self.batch} x "


@dataclass(frozen=True)
class Input:
    """An open input file whose content goes together.

    Attributes
    ----------
    path : path
    q, k, v : Tokens of shape (tokens, [batch,] heads, dim)
        v is k, if values are the first numbers of keys.
    sizes : Sizes
    mask : BaseMask
    alibi, sinks : float64 array of shape (heads,), optional
        One number for each head, if the options ask for them.
    key_bias : Tokens of shape (n_k, [batch]) or (n_k, [batch,] heads), optional
    relative : float64 array of shape (heads, 2 reach + 1), or a tuple of one for each axis of a grid, optional
    axes : Axes
        Of q, k and v in the file, and of `out`.
    filters : mapping
        That its datasets may be compressed by.
    """

    path: Path
    q: Tokens
    k: Tokens
    v: Tokens
    sizes: Sizes
    mask: BaseMask
    alibi: NDArray[np.float64] | None
    sinks: NDArray[np.float64] | None
    key_bias: Tokens | None
    relative: NDArray[np.float64] | tuple[NDArray[np.float64], ...] | None
    axes: Axes
    filters: Filters

    def by_distance(self, kind: np.dtype[Any]) -> Relative | None:
        """Give the bias by distance in a dtype, or raise an error; None if there is none. Local."""
        return None if self.relative is None else check_relative(self.relative, self.mask.axes, self.sizes.heads, kind)

    @property
    def keys(self) -> list[Tokens]:
        """What there is of each key: k, v unless that is in k, and a bias if there is one."""
        return [self.k, *([] if self.sizes.in_keys else [self.v]), *([] if self.key_bias is None else [self.key_bias])]

    def elements(self) -> Iterator[Input]:
        """Give each element of the batch as an input of its own; this one, if there is no batch axis. Local."""
        if self.sizes.batch is None:
            yield self
        for number in range(self.sizes.batch or 0):
            q, k, v = (tokens.element(number) for tokens in (self.q, self.k, self.v))
            yield replace(self, q=q, k=k, v=v, sizes=replace(self.sizes, batch=None),
                          key_bias=None if self.key_bias is None else self.key_bias.element(number))


@contextmanager
def open_input(path: Path, options: Options) -> Iterator[Input]:
    """Open an input, and check all of it but the numbers in q, k and v. Local.

    Raises
    ------
    ShardError, ShapeError, DtypeError
        If a dataset is missing, damaged or incomplete, or q, k and v do not go together.
    MaskError, OptionError
        If the options and the file's documents make no mask.
    """
    with open_file(path) as file:
        axes = axes_of(options)
        filters = filters_of_plugins() if options.hdf5plugin else OWN
        q, k, v = _open_tokens(file, axes, options, filters)
        sizes = _sizes(path, q, k, v, options)
        key_bias = None
        if options.key_bias:
            key_bias = _open_key_bias(file, axes, sizes, filters)
            sizes = replace(sizes, key_bias=1 if key_bias.shape[1:] in ((), (sizes.batch,)) else sizes.heads)
        mask = _read_mask(file, options, sizes, filters)
        alibi = read_floats(file, "alibi", sizes.heads, filters) if options.alibi else None
        sinks = read_floats(file, "sinks", sizes.heads, filters) if options.sinks else None
        relative = None
        if options.relative:
            relative = _read_relative(file, sizes, mask, filters)
            tables = relative if isinstance(relative, tuple) else (relative,)
            sizes = replace(sizes, tables=tuple(table.shape[1] for table in tables))
        yield Input(path, q, k, v, sizes, mask, alibi, sinks, key_bias, relative, axes, filters)


def axes_of(options: Options) -> Axes:
    """Give the axes of q, k and v in the file. Local.

    Raises
    ------
    OptionError
        If the options name none.
    """
    return Axes.parse(options.axes, options.query_heads)


def _open_tokens(file: h5py.File, axes: Axes, options: Options, filters: Filters) -> tuple[Tokens, Tokens, Tokens]:
    """Find q, k and v; of hidden axes keys have as many heads as the dim of the queries makes of them."""
    names = options.q, options.k, options.v if options.dim_v is None else options.k
    datasets = [open_dataset(file, name, options.raw_dtype, filters) for name in names]
    q = Tokens.of(datasets[0], axes, options.raw_dtype, options.query_heads or 0)
    k_heads = 0
    if HIDDEN in axes.names and datasets[1].ndim == len(axes.names):
        k_heads = datasets[1].shape[axes.names.index(HIDDEN)] // max(1, q.shape[-1])
    k, v = (Tokens.of(dataset, axes, options.raw_dtype, k_heads) for dataset in datasets[1:])
    return q, k, v


def _sizes(path: Path, q: Tokens, k: Tokens, v: Tokens, options: Options) -> Sizes:
    """Check that q, k and v go together; give their sizes."""
    dtypes = [tokens.dtype for tokens in (q, k, v)]
    if len(set(dtypes)) > 1:
        raise DtypeError(f"{path}: expected q, k and v of one dtype, got {', '.join(map(str, dtypes))}")
    check_shapes(*(batch_first_shape(tokens.shape) for tokens in (q, k, v)))
    if len(q.shape) == 4 and not q.shape[1]:
        raise ShapeError(f"{path}: expected a batch of one element at least, got none")
    accumulator(dtypes[0], options.accumulator)
    dim_v = v.shape[-1] if options.dim_v is None else options.dim_v
    if dim_v > v.shape[-1]:
        raise ShapeError(f"{path}: expected keys of {dim_v} numbers at least, of which the first are values, got "
                         f"{k.shape[-1]}")
    return Sizes(len(q), len(k), q.shape[-2], k.shape[-2], q.shape[-1], dim_v, str(dtypes[0]),
                 in_keys=options.dim_v is not None, batch=q.shape[1] if len(q.shape) == 4 else None)


def batch_first_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the shape for a call of q, k or v of that shape, whose batch comes second if they have one. Local."""
    return shape if len(shape) < 4 else (shape[1], shape[0], *shape[2:])


def _open_key_bias(file: h5py.File, axes: Axes, sizes: Sizes, filters: Filters) -> Tokens:
    """Find the bias of the keys, and check its shape: that of the keys without dim, with query heads or without."""
    dataset = open_dataset(file, "key_bias", filters=filters)
    batch = () if sizes.batch is None else (sizes.batch,)
    wanted = {axes.without("heads", "dim"): (sizes.n_k, *batch), axes.without("dim"): (sizes.n_k, *batch, sizes.heads)}
    for each, shape in wanted.items():
        if dataset.shape == each.shape_in_file(shape):
            return Tokens.of(dataset, each)
    shapes = [str(each.shape_in_file(shape)) for each, shape in wanted.items()]
    raise ShapeError(f"{file.filename}: dataset 'key_bias': expected shape {shapes[0]} or {shapes[1]}, got "
                     f"{dataset.shape}")


def _read_relative(file: h5py.File, sizes: Sizes, mask: BaseMask, filters: Filters
                   ) -> NDArray[np.float64] | tuple[NDArray[np.float64], ...]:
    """Read the table of a bias by distance, or those of the axes of a grid where there is none by positions."""
    if mask.axes and "relative" not in file:
        return tuple(_read_table(file, f"relative_{axis}", sizes.heads, filters) for axis in range(len(mask.axes)))
    return _read_table(file, "relative", sizes.heads, filters)


def _read_table(file: h5py.File, name: str, heads: int, filters: Filters) -> NDArray[np.float64]:
    """Read a table of a bias by distance."""
    dataset = open_dataset(file, name, filters=filters)
    if dataset.ndim != 2 or len(dataset) != heads or not dataset.shape[1] % 2:
        raise ShapeError(f"{file.filename}: dataset {name!r}: expected shape ({heads}, 2 reach + 1), an odd number for "
                         f"each head, got {dataset.shape}")
    numbers = read_rows(dataset, 0, heads).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ShardError(f"{file.filename}: dataset {name!r}: expected finite numbers, got NaN or an infinity")
    return numbers


def read_key_bias(tokens: Tokens, start: int, stop: int) -> NDArray[Any]:
    """Read a bias of keys start..stop. Local.

    Raises
    ------
    ShardError
        If it is NaN or +inf somewhere.
    """
    numbers = tokens.read(start, stop)
    check_key_bias_rows(tokens, start, numbers)
    return numbers


def check_key_bias_rows(tokens: Tokens, start: int, numbers: NDArray[Any]) -> None:
    """Check a bias of keys that was read, of those from `start` on; see `read_key_bias`. Local."""
    wrong = np.isnan(numbers) | (numbers == np.inf)
    if wrong.any():
        raise ShardError(f"{tokens.filename}: dataset 'key_bias': expected finite numbers, or -inf to leave a "
                         f"key out, got {numbers[wrong][0]} for key {start + np.argwhere(wrong)[0][0]}")


def read_bias_shard(run: Run, attention: RingAttention, tokens: Tokens | None) -> Any:
    """Read the bias of this rank's keys, in the layout of the attention, if there is one. Collective over *comm*."""
    if tokens is None:
        return None
    layout = Contiguous.even(len(tokens), run.comm.size)
    start, count = layout.starts[run.comm.rank], layout.counts[run.comm.rank]
    with run.timer.phase("read", f"reading {tokens.filename}"), run.raise_on_all():
        bias = read_key_bias(tokens, start, start + count)
    if attention.layout == "contiguous":
        return bias
    with run.timer.phase("redistribute", f"redistributing {tokens.name}"):
        return redistribute(bias, comm=run.world, target=attention.layout, timeout=run.timeout)


def _read_mask(file: h5py.File, options: Options, sizes: Sizes, filters: Filters) -> BaseMask:
    """Make the mask that the options and the file's datasets describe."""
    most = max(sizes.n_q + 1, sizes.n_k + 1, MOST_OFFSETS)
    arrays = {name: read_integers(file, name, most, OF_A_MASK.get(name, ("offsets",)),
                                  booleans=name == "key_mask", filters=filters)
              for name in ARRAYS if getattr(options, name)}
    mask = make_mask(options, arrays)
    mask.check(sizes.n_q, sizes.n_k)
    return mask


def read_shard(run: Run, attention: RingAttention, tokens: Tokens) -> Any:
    """Read this rank's rows to where the backend computes, in the layout that it computes in. Collective over *comm*.

    Returns
    -------
    array of shape (tokens, [batch,] heads, dim)
        On the GPU, if the backend computes there.
    """
    layout = Contiguous.even(len(tokens), run.comm.size)
    start, count = layout.starts[run.comm.rank], layout.counts[run.comm.rank]
    reading = f"reading {tokens.filename}"
    backend = attention.backend

    # In file order already: read straight to where the backend computes.
    if attention.layout == "contiguous":
        shape = (count, *tokens.shape[1:])
        with run.timer.phase("read", reading), run.raise_on_all(), backend.current():
            return backend.read_rows(shape, tokens.dtype, lambda at, rows: tokens.read_into(start + at, rows))

    # Any other layout: read to host memory, and exchange rows with the other ranks.
    with run.timer.phase("read", reading), run.raise_on_all():
        shard = tokens.read(start, start + count)
    with run.timer.phase("redistribute", f"redistributing {tokens.name}"):
        shard = redistribute(shard, comm=run.world, target=attention.layout, timeout=run.timeout)
        with run.raise_on_all(), backend.current():
            return backend.to_device(shard)
