"""The input of a job: an HDF5 file that is opened and checked as a whole, and read one shard a rank."""

from __future__ import annotations

import math
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
from ..files.hdf5 import check_axes, open_dataset, read_floats, read_integers, read_rows, read_rows_into
from ..files.item_types import RAW_DTYPE, stored_dtype
from ..files.opening import open_file
from ..layout import Contiguous
from ..mask import ARRAYS, RANGES
from ..mask_base import BaseMask
from ..relative import Relative
from ..schedules.redistribution import redistribute
from .masks import make_mask
from .options import Options
from .run import Run

MOST_OFFSETS = 2**20           # of documents, however few tokens there are: 8 MiB


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
    in_keys: bool = False         # whether values are the first numbers of keys
    tables: tuple[int, ...] = ()  # numbers for each head of the tables of a bias by distance, one or for each axis


@dataclass(frozen=True)
class Input:
    """An open input file whose content goes together.

    Attributes
    ----------
    path : path
    q, k, v : h5py.Dataset of shape (tokens, heads, dim)
        v is k, if values are the first numbers of keys.
    sizes : Sizes
    mask : BaseMask
    alibi, sinks : float64 array of shape (heads,), optional
        One number for each head, if the options ask for them.
    key_bias : h5py.Dataset of shape (n_k,) or (n_k, heads), optional
    relative : float64 array of shape (heads, 2 reach + 1), or a tuple of one for each axis of a grid, optional
    """

    path: Path
    q: h5py.Dataset
    k: h5py.Dataset
    v: h5py.Dataset
    sizes: Sizes
    mask: BaseMask
    alibi: NDArray[np.float64] | None
    sinks: NDArray[np.float64] | None
    key_bias: h5py.Dataset | None
    relative: NDArray[np.float64] | tuple[NDArray[np.float64], ...] | None

    def by_distance(self, kind: np.dtype[Any]) -> Relative | None:
        """Give the bias by distance in a dtype, or raise an error; None if there is none. Local."""
        return None if self.relative is None else check_relative(self.relative, self.mask.axes, self.sizes.heads, kind)

    @property
    def keys(self) -> list[h5py.Dataset]:
        """What there is of each key: k, v unless that is in k, and a bias if there is one."""
        return [self.k, *([] if self.sizes.in_keys else [self.v]), *([] if self.key_bias is None else [self.key_bias])]


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
        names = options.q, options.k, options.v if options.dim_v is None else options.k
        q, k, v = (open_dataset(file, name, options.raw_dtype) for name in names)
        for dataset in (q, k, v):
            check_axes(dataset, ("tokens", "heads", "dim"))
        sizes = _sizes(path, q, k, v, options)
        key_bias = None
        if options.key_bias:
            key_bias = _open_key_bias(file, sizes)
            sizes = replace(sizes, key_bias=math.prod(key_bias.shape[1:]))
        mask = _read_mask(file, options, sizes)
        alibi = read_floats(file, "alibi", sizes.heads) if options.alibi else None
        sinks = read_floats(file, "sinks", sizes.heads) if options.sinks else None
        relative = None
        if options.relative:
            relative = _read_relative(file, sizes, mask)
            tables = relative if isinstance(relative, tuple) else (relative,)
            sizes = replace(sizes, tables=tuple(table.shape[1] for table in tables))
        yield Input(path, q, k, v, sizes, mask, alibi, sinks, key_bias, relative)


def _sizes(path: Path, q: h5py.Dataset, k: h5py.Dataset, v: h5py.Dataset, options: Options) -> Sizes:
    """Check that q, k and v go together; give their sizes."""
    dtypes = [stored_dtype(dataset, options.raw_dtype) for dataset in (q, k, v)]
    if len(set(dtypes)) > 1:
        raise DtypeError(f"{path}: expected q, k and v of one dtype, got {', '.join(map(str, dtypes))}")
    check_shapes(q.shape, k.shape, v.shape)
    accumulator(dtypes[0], options.accumulator)
    dim_v = v.shape[2] if options.dim_v is None else options.dim_v
    if dim_v > v.shape[2]:
        raise ShapeError(f"{path}: expected keys of {dim_v} numbers at least, of which the first are values, got "
                         f"{k.shape[2]}")
    return Sizes(len(q), len(k), q.shape[1], k.shape[1], q.shape[2], dim_v, str(dtypes[0]),
                 in_keys=options.dim_v is not None)


def _open_key_bias(file: h5py.File, sizes: Sizes) -> h5py.Dataset:
    """Find the bias of the keys, and check its shape."""
    dataset = open_dataset(file, "key_bias")
    shapes = (sizes.n_k,), (sizes.n_k, sizes.heads)
    if dataset.shape not in shapes:
        raise ShapeError(f"{file.filename}: dataset 'key_bias': expected shape {shapes[0]} or {shapes[1]}, got "
                         f"{dataset.shape}")
    return dataset


def _read_relative(file: h5py.File, sizes: Sizes, mask: BaseMask
                   ) -> NDArray[np.float64] | tuple[NDArray[np.float64], ...]:
    """Read the table of a bias by distance, or those of the axes of a grid where there is none by positions."""
    if mask.axes and "relative" not in file:
        return tuple(_read_table(file, f"relative_{axis}", sizes.heads) for axis in range(len(mask.axes)))
    return _read_table(file, "relative", sizes.heads)


def _read_table(file: h5py.File, name: str, heads: int) -> NDArray[np.float64]:
    """Read a table of a bias by distance."""
    dataset = open_dataset(file, name)
    if dataset.ndim != 2 or len(dataset) != heads or not dataset.shape[1] % 2:
        raise ShapeError(f"{file.filename}: dataset {name!r}: expected shape ({heads}, 2 reach + 1), an odd number for "
                         f"each head, got {dataset.shape}")
    numbers = read_rows(dataset, 0, heads).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ShardError(f"{file.filename}: dataset {name!r}: expected finite numbers, got NaN or an infinity")
    return numbers


def read_key_bias(dataset: h5py.Dataset, start: int, stop: int) -> NDArray[Any]:
    """Read a bias of keys start..stop. Local.

    Raises
    ------
    ShardError
        If it is NaN or +inf somewhere.
    """
    numbers = read_rows(dataset, start, stop)
    check_key_bias_rows(dataset, start, numbers)
    return numbers


def check_key_bias_rows(dataset: h5py.Dataset, start: int, numbers: NDArray[Any]) -> None:
    """Check a bias of keys that was read, of those from `start` on; see `read_key_bias`. Local."""
    wrong = np.isnan(numbers) | (numbers == np.inf)
    if wrong.any():
        raise ShardError(f"{dataset.file.filename}: dataset 'key_bias': expected finite numbers, or -inf to leave a "
                         f"key out, got {numbers[wrong][0]} for key {start + np.argwhere(wrong)[0][0]}")


def read_bias_shard(run: Run, attention: RingAttention, dataset: h5py.Dataset | None) -> Any:
    """Read the bias of this rank's keys, in the layout of the attention, if there is one. Collective over *comm*."""
    if dataset is None:
        return None
    layout = Contiguous.even(len(dataset), run.comm.size)
    start, count = layout.starts[run.comm.rank], layout.counts[run.comm.rank]
    with run.timer.phase("read", f"reading {dataset.file.filename}"), run.raise_on_all():
        bias = read_key_bias(dataset, start, start + count)
    if attention.layout == "contiguous":
        return bias
    with run.timer.phase("redistribute", f"redistributing {dataset.name}"):
        return redistribute(bias, comm=run.world, target=attention.layout, timeout=run.timeout)


def _read_mask(file: h5py.File, options: Options, sizes: Sizes) -> BaseMask:
    """Make the mask that the options and the file's datasets describe."""
    most = max(sizes.n_q + 1, sizes.n_k + 1, MOST_OFFSETS)
    arrays = {name: read_integers(file, name, most, ("ranges", "ends") if name in RANGES else ("offsets",),
                                  booleans=name == "key_mask") for name in ARRAYS if getattr(options, name)}
    mask = make_mask(options, arrays)
    mask.check(sizes.n_q, sizes.n_k)
    return mask


def read_shard(run: Run, attention: RingAttention, dataset: h5py.Dataset) -> Any:
    """Read this rank's rows to where the backend computes, in the layout that it computes in. Collective over *comm*.

    Returns
    -------
    array of shape (tokens, heads, dim)
        On the GPU, if the backend computes there.
    """
    layout = Contiguous.even(len(dataset), run.comm.size)
    start, count = layout.starts[run.comm.rank], layout.counts[run.comm.rank]
    reading = f"reading {dataset.file.filename}"
    backend = attention.backend

    # In file order already: read straight to where the backend computes.
    if attention.layout == "contiguous":
        shape = (count, *dataset.shape[1:])
        dtype = stored_dtype(dataset, RAW_DTYPE)             # `open_input` has checked what it may be
        with run.timer.phase("read", reading), run.raise_on_all(), backend.current():
            return backend.read_rows(shape, dtype, lambda at, rows: read_rows_into(dataset, start + at, rows))

    # Any other layout: read to host memory, and exchange rows with the other ranks.
    with run.timer.phase("read", reading), run.raise_on_all():
        shard = read_rows(dataset, start, start + count, RAW_DTYPE)
    with run.timer.phase("redistribute", f"redistributing {dataset.name}"):
        shard = redistribute(shard, comm=run.world, target=attention.layout, timeout=run.timeout)
        with run.raise_on_all(), backend.current():
            return backend.to_device(shard)
