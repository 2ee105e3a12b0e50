"""HDF5 datasets read with care and written whole: inputs are data, not code.

An HDF5 file can point outside itself (external links and storage, virtual sources), can ask for filter plugins, and
can read as zeros where nothing was written. Each of these is refused with its reason.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import DtypeError, OutputError, RingError, ShapeError, ShardError
from .axes import Axes
from .boxes import read_box
from .filters import OWN, Filters
from .item_types import bits, file_type, stored_dtype
from .links import resolve_path
from .new_file import NewFile, new_file, not_what_was_written
from .opening import open_file, reading
from .paths import as_path
from .rows import row_ranges, select_box
from .storage import check_storage
from .tokens import Tokens
from .virtual import check_sources

CHUNK_BYTES = 2**20            # of what this package writes: one checksum each
READ_BACK_BYTES = 2**24        # at a time: on top of what a job holds


def open_dataset(file: h5py.File, name: str, raw: str | None = None, filters: Filters = OWN) -> h5py.Dataset:
    """Find a dataset of floats and check that all of its data is in place. Local.

    Parameters
    ----------
    file : h5py.File
        Opened to read.
    name : str
        Path of the dataset in the file.
    raw : str, optional
        What plain 16-bit items are, see `stored_dtype`.
    filters : mapping
        That it may be compressed by, see `ringmpi.files.filters`.

    Raises
    ------
    ShardError
        If there is no such dataset, if it leads outside the file's folder, needs an unknown filter, or was
        never written in full.
    DtypeError
        If its items are not float64, float32, bfloat16 or float16.
    """
    where = f"{file.filename}: dataset {name!r}"
    with reading(where):
        dataset = resolve_path(file, name)
        if not isinstance(dataset, h5py.Dataset):
            raise ShardError(f"{where}: expected a dataset, got a {type(dataset).__name__.lower()}")
        dtype = stored_dtype(dataset, raw)
        check_storage(dataset, where, filters)
        if dataset.is_virtual:
            check_sources(dataset, where, dtype, raw, filters)
    return dataset


def check_axes(dataset: h5py.Dataset, axes: tuple[str, ...]) -> None:
    """Raise `ShapeError` unless a dataset has as many axes as are named. Local."""
    if dataset.ndim != len(axes):
        raise ShapeError(f"{dataset.file.filename}: dataset {dataset.name!r}: expected shape ({', '.join(axes)}), "
                         f"got {dataset.shape}")


def read_integers(file: h5py.File, name: str, most: int = 2**20, axes: tuple[str, ...] = ("offsets",),
                  booleans: bool = False, filters: Filters = OWN) -> NDArray[np.int64]:
    """Read a dataset of at most `most` integers along its first axis, with the checks of `open_dataset`. Local.

    Parameters
    ----------
    axes : tuple of str
        What the axes are called; pairs have the second one.
    booleans : bool
        Whether they may be booleans too, for 0 and 1.
    filters : mapping
        See `open_dataset`.

    Raises
    ------
    ShardError, DtypeError, ShapeError
        If it is not there, not to be trusted, not of integers, too long or of other axes.
    """
    where = f"{file.filename}: dataset {name!r}"
    with reading(where):
        dataset = resolve_path(file, name)
        if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual:
            raise ShardError(f"{where}: expected a plain dataset")
        if dataset.dtype.kind not in ("biu" if booleans else "iu"):
            raise DtypeError(f"{where}: expected integers{' or booleans' * booleans}, got {dataset.dtype}")
        check_axes(dataset, axes)
        if dataset.shape[1:] not in ((), (2,)):
            raise ShapeError(f"{where}: expected pairs of integers, got shape {dataset.shape}")
        if len(dataset) > most:
            raise ShapeError(f"{where}: expected at most {most:,} integers, got {len(dataset):,}")
        check_storage(dataset, where, filters)
        numbers = dataset[...]
        if numbers.max(initial=0) > np.iinfo(np.int64).max:
            raise ShardError(f"{where}: expected integers below 2^63, got {numbers.max()}")
        return np.asarray(numbers, np.int64)


def read_floats(file: h5py.File, name: str, heads: int, filters: Filters = OWN) -> NDArray[np.float64]:
    """Read a dataset of floats of shape (heads,), with the checks of `open_dataset`. Local.

    Raises
    ------
    ShardError, DtypeError, ShapeError
        If it is not there, not to be trusted, not of finite floats or not of that shape.
    """
    dataset = open_dataset(file, name, filters=filters)
    if dataset.shape != (heads,):
        raise ShapeError(f"{file.filename}: dataset {name!r}: expected shape ({heads},), one number for each head, "
                         f"got {dataset.shape}")
    numbers = read_rows(dataset, 0, len(dataset)).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ShardError(f"{file.filename}: dataset {name!r}: expected finite numbers, got {numbers}")
    return numbers


def read_rows(dataset: h5py.Dataset, start: int, stop: int, raw: str | None = None) -> NDArray[Any]:
    """Read rows start..stop of a dataset as native floats, bit for bit. Local.

    Raises
    ------
    ShardError
        If a checksum does not match or the file can't be read.
    """
    rows = np.empty((stop - start, *dataset.shape[1:]), stored_dtype(dataset, raw))
    read_rows_into(dataset, start, rows)
    return rows


def read_rows_into(dataset: h5py.Dataset, start: int, rows: NDArray[Any]) -> None:
    """Read rows from `start` on into a contiguous array of the dataset's dtype and row shape, bit for bit. Local.

    Rows of a virtual dataset are read from its sources, see `read_box`.

    Raises
    ------
    ShardError
        If a checksum does not match or the file can't be read.
    """
    read_box(dataset, (start, *[0] * (rows.ndim - 1)), rows)


class Written(NamedTuple):
    """What was written, to be read back: rows of that shape from `start` on, or a whole dataset if that is None."""

    name: str
    checksum: int
    start: int | None = None
    shape: tuple[int, ...] = ()
    axes: Axes = Axes()


class OutputFile(h5py.File):  # type: ignore[misc]
    """An HDF5 file in the making, which remembers what was written to read it back."""

    def __init__(self, disk: NewFile) -> None:
        # v110: the oldest format with checksummed metadata and virtual datasets; HDF5 1.10 reads it.
        super().__init__(disk, "w", libver=("v110", "v110"))
        self.disk = disk
        self.written: list[Written] = []


class OutputDataset(h5py.Dataset):  # type: ignore[misc]
    """A dataset of an `OutputFile`, whose rows are written in the order of its axes."""

    def __init__(self, identifier: Any, output: OutputFile, axes: Axes) -> None:
        super().__init__(identifier)
        self.output = output
        self.axes = axes


def create_dataset(file: OutputFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any],
                   axes: Axes | None = None) -> OutputDataset:
    """Make a dataset for floats or int64, in chunks of about 1 MiB with a Fletcher32 checksum each. Local.

    Parameters
    ----------
    file : OutputFile
    name : str
    shape : tuple of int
        In memory, where rows come first.
    dtype : dtype
    axes : Axes, optional
        In the order of the file; without, as in memory.
    """
    axes = axes or Axes.plain(len(shape))
    row = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
    chunks = None
    if 0 not in shape:
        chunks = axes.shape_in_file((min(shape[0], max(1, CHUNK_BYTES // row)), *shape[1:]))
    made = file.create_dataset(name, axes.shape_in_file(shape), file_type(dtype), chunks=chunks,
                               fletcher32=bool(chunks))
    return OutputDataset(made.id, file, axes)


def write_rows(dataset: OutputDataset, start: int, rows: NDArray[Any]) -> None:
    """Write `rows` from row `start` of a dataset of the same dtype, bit for bit. Local.

    Raises
    ------
    OutputError
        If the system has refused a write by then.
    """
    axes = dataset.axes
    item = file_type(rows.dtype)
    for first, last in row_ranges(rows.shape, rows.dtype):
        part = np.ascontiguousarray(rows[first:last])
        box = axes.to_file(part)
        dataset.id.write(*select_box(dataset, axes.start_of(start + first), box.shape), bits(box), item)
        dataset.output.disk.check()
        dataset.output.written.append(Written(dataset.name, _checksum(part), start + first, part.shape, axes))


def write_array(file: OutputFile, name: str, values: NDArray[Any] | np.bytes_) -> None:
    """Write a small array as a dataset of its own. Local."""
    file[name] = values
    file.written.append(Written(name, _checksum(np.ascontiguousarray(values))))


@contextmanager
def write_file(path: Path, force: bool = False, check: Callable[[Path], None] | None = None,
               beside: Callable[[Path], None] | None = None) -> Iterator[OutputFile]:
    """Write an HDF5 file that appears under its name only when it is whole. Local.

    It is written under a temporary name beside its own, the attribute `complete` last; then it is flushed to disk,
    opened anew, read back, compared with what was written, and given its name. After an error nothing is left.
    Reading back finds what HDF5 or the file system lost. A file system may answer from memory, so only `ringmpi check`
    finds what the disk loses later.

    Parameters
    ----------
    path : path
    force : bool
        Replace a file of that name.
    check : callable, optional
        Looks at the finished file, under its temporary name; what it raises keeps the file from appearing.
    beside : callable, optional
        Does so too, in a thread, while the file is flushed and read back: a digest takes as long as that.

    Raises
    ------
    OptionError
        If `path` is no path.
    OutputError
        If it exists and not `force`, is no regular file, or can't be written.
    """
    path = as_path(path)
    with new_file(path, force) as disk:
        try:
            with OutputFile(disk) as file:
                yield file
                file.flush()
                file.attrs["complete"] = True
                file.flush()
        except (OSError, RuntimeError) as error:
            if isinstance(error, RingError):
                raise
            disk.check()              # what the system said first, in place of what HDF5 makes of it
            raise OutputError(f"{path}: can't be written: {error}") from error
        try:
            with _beside(beside, disk.temporary):
                disk.finish()
                _read_back(disk.temporary, file.written)
            if check is not None:
                check(disk.temporary)
        except ShardError as error:
            raise OutputError(f"{not_what_was_written(path)} ({error})") from error


@contextmanager
def _beside(look: Callable[[Path], None] | None, path: Path) -> Iterator[None]:
    """Let something look at a file in a thread while a block runs; raise what it raises, unless the block does."""
    if look is None:
        yield
        return
    with ThreadPoolExecutor(1, "ringmpi-digest") as pool:
        looked = pool.submit(look, path)
        yield
        looked.result()


def _read_back(path: Path, written: list[Written]) -> None:
    """Raise `ShardError` unless a file reads as it was written."""
    with open_file(path) as file:
        for each in written:
            with reading(path):
                data = file[each.name]
                found = (_checksum(np.ascontiguousarray(data[()])) if each.start is None
                         else _checksum_in_file(data, each.start, each.shape, each.axes))
            if found != each.checksum:
                raise ShardError(f"{path}: dataset {each.name!r}: reads otherwise")


def _checksum_in_file(dataset: h5py.Dataset, start: int, shape: tuple[int, ...], axes: Axes) -> int:
    """Give the checksum of rows that are in a file, with little memory."""
    checksum = 0
    dtype = np.dtype(np.int64) if dataset.dtype.kind == "i" else stored_dtype(dataset)
    tokens = Tokens(dataset, axes, dtype, shape[1:])
    for first, last in row_ranges(shape, dtype, READ_BACK_BYTES):
        checksum = _checksum(tokens.read(start + first, start + last), checksum)
    return checksum


def _checksum(x: NDArray[Any], before: int = 0) -> int:
    return zlib.crc32(x.reshape(-1).view(np.uint8).data, before)
