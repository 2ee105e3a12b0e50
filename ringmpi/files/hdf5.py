"""HDF5 datasets read with care and written whole: inputs are data, not code.

An HDF5 file can point outside itself (external links and storage, virtual sources), can ask for filter
plugins, and can read as zeros what was never written. Each of these is refused with its reason.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..dtypes import BFLOAT16
from ..environment import virtual_prefix
from ..errors import DtypeError, OutputError, RingError, ShapeError, ShardError
from ..phases import phase
from .new_file import kind, new_file, not_what_was_written
from .stored import check_storage, file_type, follow, memory_type, row_pieces, stored_dtype, whole_rows

H5PY_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError)      # its ways to say: damaged
CHUNK_BYTES = 2**20            # of what this package writes: one checksum each
READ_BACK_BYTES = 2**24        # at a time: besides what a job holds
LOCKED = {errno.EAGAIN, errno.EWOULDBLOCK}


def reason(error: Exception) -> str:
    """Say why h5py or the system could not read. Local."""
    code = getattr(error, "errno", None)
    if code in LOCKED:
        return "is locked: another program has it open to write; wait until that has closed it"
    if code:
        return (f"can't be read: {os.strerror(code)} (error {code} of the system: look at the permissions and the "
                f"storage first, the file may be whole)")
    return f"can't be read, it is truncated, damaged or no HDF5 file: {error}"


@contextmanager
def reading(path: Any) -> Iterator[None]:
    """Turn h5py's errors of a block that only reads into `ShardError`. Local."""
    try:
        yield
    except RingError:
        raise
    except H5PY_ERRORS as error:
        raise ShardError(f"{path}: {reason(error)}") from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise `ShardError` unless there is a regular file at `path`, or a link to one. Local."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: {reason(error)}") from error
    if not stat.S_ISREG(mode):
        raise ShardError(f"{path}: no such file: this is a {kind(mode)}")


@contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open an HDF5 file to read. Local.

    Raises
    ------
    ShardError
        If it is missing, locked, no HDF5 file, truncated or damaged.
    """
    check_regular(path)
    with phase(f"reading {path}"), _opened(path) as file:
        yield file


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    with reading(path):
        # by its real name: HDF5 looks for virtual sources beside the name it was given
        file = h5py.File(os.path.realpath(path), "r", locking="best-effort")
    try:
        yield file
    except BaseException:
        with suppress(*H5PY_ERRORS):
            file.close()
        raise
    with reading(path):
        file.close()


def open_dataset(file: h5py.File, name: str, raw: str | None = None) -> h5py.Dataset:
    """Find a dataset of floats and check that all of its data is in place. Local.

    Parameters
    ----------
    file : h5py.File
        Opened to read.
    name : str
        Path of the dataset in the file.
    raw : str, optional
        What plain 16-bit items are, see `stored_dtype`.

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
        dataset = follow(file, name)
        if not isinstance(dataset, h5py.Dataset):
            raise ShardError(f"{where}: expected a dataset, got a {type(dataset).__name__.lower()}")
        dtype = stored_dtype(dataset, raw)
        check_storage(dataset, where)
        if dataset.is_virtual:
            _check_sources(dataset, where, dtype, raw)
    return dataset


def read_integers(file: h5py.File, name: str, most: int = 2**20) -> NDArray[np.int64]:
    """Read a one-dimensional dataset of at most `most` integers, with the checks of `open_dataset`. Local.

    Raises
    ------
    ShardError, DtypeError, ShapeError
        If it is not there, not to be trusted, not of integers, too long or not one-dimensional.
    """
    where = f"{file.filename}: dataset {name!r}"
    with reading(where):
        dataset = follow(file, name)
        if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual:
            raise ShardError(f"{where}: expected a plain dataset")
        if dataset.dtype.kind not in "iu":
            raise DtypeError(f"{where}: expected integers, got {dataset.dtype}")
        check_axes(dataset, ("offsets",))
        if len(dataset) > most:
            raise ShapeError(f"{where}: expected at most {most:,} integers, got {len(dataset):,}")
        check_storage(dataset, where)
        return np.asarray(dataset[...], np.int64)


def read_floats(file: h5py.File, name: str, heads: int) -> NDArray[np.float64]:
    """Read a dataset of floats of shape (heads,), with the checks of `open_dataset`. Local.

    Raises
    ------
    ShardError, DtypeError, ShapeError
        If it is not there, not to be trusted, not of finite floats or not of that shape.
    """
    dataset = open_dataset(file, name)
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

    Those of a virtual dataset are read from its sources: HDF5 itself takes one that it can't open, for whatever
    reason, for zeros, and says nothing.

    Raises
    ------
    ShardError
        If a checksum does not match or the file can't be read.
    """
    if not dataset.is_virtual:
        read_as_shown(dataset, start, rows)
        return
    for source in dataset.virtual_sources():
        begin, end = whole_rows(source.vspace, dataset.shape)
        first, last = max(begin, start), min(end, start + len(rows))
        if first < last:
            with open_file(_source_path(dataset, source.file_name)) as file:
                target = follow(file, source.dset_name)
                skipped = whole_rows(source.src_space, target.shape)[0] + first - begin
                read_as_shown(target, skipped, rows[first - start:last - start])


def read_as_shown(dataset: h5py.Dataset, start: int, rows: NDArray[Any]) -> None:
    """Read rows as any reader of HDF5 sees them: those of a virtual dataset through it. Local.

    Raises
    ------
    ShardError
        If a checksum does not match or the file can't be read.
    """
    try:
        for first, last in row_pieces(rows.shape, rows.dtype):
            piece = rows[first:last]
            dataset.id.read(*_spaces(dataset, start + first, piece), _bits(piece), memory_type(dataset, rows.dtype))
    except H5PY_ERRORS as error:
        where = f"{dataset.file.filename}: dataset {dataset.name!r}, rows {start}..{start + len(rows)}"
        why = reason(error) if getattr(error, "errno", None) else f"damaged or unreadable: {error}"
        raise ShardError(f"{where}: {why}") from error


class OutputFile(h5py.File):  # type: ignore[misc]
    """An HDF5 file in the making, which remembers what was written to read it back."""

    def __init__(self, disk: Any) -> None:
        # v110: the oldest format with checksummed metadata and virtual datasets; HDF5 1.10 reads it.
        super().__init__(disk, "w", libver=("v110", "v110"))
        self.disk = disk
        self.written: list[tuple[str, int, int, int]] = []      # name, rows start, stop (-1: all), CRC


class OutputDataset(h5py.Dataset):  # type: ignore[misc]
    """A dataset of an `OutputFile`."""

    def __init__(self, identifier: Any, output: OutputFile) -> None:
        super().__init__(identifier)
        self.output = output


def create_dataset(file: OutputFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> OutputDataset:
    """Make a dataset for floats, in chunks of about 1 MiB with a Fletcher32 checksum each. Local."""
    row = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
    chunks = (min(shape[0], max(1, CHUNK_BYTES // row)), *shape[1:]) if 0 not in shape else None
    made = file.create_dataset(name, shape, file_type(dtype), chunks=chunks, fletcher32=bool(chunks))
    return OutputDataset(made.id, file)


def write_rows(dataset: OutputDataset, start: int, rows: NDArray[Any]) -> None:
    """Write `rows` from row `start` of a dataset of the same dtype, bit for bit. Local.

    Raises
    ------
    OutputError
        If the system has refused a write by then.
    """
    for first, last in row_pieces(rows.shape, rows.dtype):
        piece = np.ascontiguousarray(rows[first:last])
        dataset.id.write(*_spaces(dataset, start + first, piece), _bits(piece), file_type(rows.dtype))
        dataset.output.disk.check()
        dataset.output.written.append((dataset.name, start + first, start + last, _checksum(piece)))


def write_array(file: OutputFile, name: str, values: NDArray[Any] | np.bytes_) -> None:
    """Write a small array as a dataset of its own. Local."""
    file[name] = values
    file.written.append((name, -1, -1, _checksum(np.ascontiguousarray(values))))


@contextmanager
def write_file(path: Path, force: bool = False, check: Callable[[Path], None] | None = None) -> Iterator[OutputFile]:
    """Write an HDF5 file that appears under its name only when it is whole. Local.

    It is written under a temporary name beside it; the attribute `complete` comes last; then the file is flushed to
    disk, opened anew, read back and compared with what was written, and given its name. After an error nothing is left.
    Reading back finds what HDF5 or the file system lost; a file system may answer from its memory, so what a disk loses
    later is found by `ringmpi check` only.

    Parameters
    ----------
    path : path
    force : bool
        Replace a file of that name.
    check : callable, optional
        Looks at the finished file, under its temporary name; what it raises keeps the file from appearing.

    Raises
    ------
    OutputError
        If `path` exists and not `force`, is no regular file, or can't be written.
    """
    with new_file(path, force) as disk:
        try:
            with OutputFile(disk) as file:
                yield file
                file.flush()
                file.attrs["complete"] = True
                file.flush()
            disk.finish()
        except (OSError, RuntimeError) as error:
            if isinstance(error, RingError):
                raise
            disk.check()              # what the system said first, in place of what HDF5 makes of it
            raise OutputError(f"{path}: can't be written: {error}") from error
        try:
            _read_back(disk.temporary, file.written)
            if check is not None:
                check(disk.temporary)
        except ShardError as error:
            raise OutputError(f"{not_what_was_written(path)} ({error})") from error


def _read_back(path: Path, written: list[tuple[str, int, int, int]]) -> None:
    with open_file(path) as file:
        for name, start, stop, checksum in written:
            with reading(path):
                data = file[name]
                found = _checksum(np.ascontiguousarray(data[()])) if start < 0 else _stored(data, start, stop)
            if found != checksum:
                raise ShardError(f"{path}: dataset {name!r}: reads otherwise")


def _stored(dataset: h5py.Dataset, start: int, stop: int) -> int:
    """Give the checksum of rows that are in a file, with little memory."""
    checksum = 0
    for first, last in row_pieces((stop - start, *dataset.shape[1:]), stored_dtype(dataset), READ_BACK_BYTES):
        checksum = _checksum(read_rows(dataset, start + first, start + last), checksum)
    return checksum


def _checksum(x: NDArray[Any], before: int = 0) -> int:
    return zlib.crc32(x.reshape(-1).view(np.uint8).data, before)


def _bits(x: NDArray[Any]) -> NDArray[Any]:
    return x.view(np.uint16) if x.dtype == BFLOAT16 else x


def _spaces(dataset: h5py.Dataset, start: int, piece: NDArray[Any]) -> tuple[Any, Any]:
    space = dataset.id.get_space()
    space.select_hyperslab((start, *[0] * (piece.ndim - 1)), piece.shape)
    return h5py.h5s.create_simple(piece.shape), space


def _check_sources(dataset: h5py.Dataset, where: str, dtype: np.dtype[Any], raw: str | None) -> None:
    """Open and check each virtual source: one that is missing reads as zeros, silently."""
    if virtual_prefix() is not None:
        raise ShardError(f"{where}: refused: HDF5_VDS_PREFIX leads virtual sources elsewhere; unset it")
    folder = Path(dataset.file.filename).resolve().parent
    rows = []
    for source in dataset.virtual_sources():
        name = source.file_name
        path = _source_path(dataset, name)
        if "%" in name or os.path.isabs(name) or not path.is_relative_to(folder):
            raise ShardError(f"{where}: refused: its virtual source {name!r} is outside the file's folder")
        with open_file(path) as file:
            target = follow(file, source.dset_name)
            if not isinstance(target, h5py.Dataset) or target.is_virtual:
                raise ShardError(f"{where}: refused: its virtual source {name!r} holds no plain dataset "
                                 f"{source.dset_name!r}")
            check_storage(target, f"{path}: dataset {source.dset_name!r}")
            if stored_dtype(target, raw) != dtype:
                raise ShardError(f"{where}: its virtual source {name!r} has dtype {target.dtype}")
            start, stop = whole_rows(source.vspace, dataset.shape)
            first, last = whole_rows(source.src_space, target.shape)
        if None in (start, first) or stop - start != last - first or dataset.shape[1:] != target.shape[1:]:
            raise ShardError(f"{where}: refused: its virtual source {name!r}, of shape {target.shape}, does not hold "
                             "the whole rows that are taken from it; copy the dataset into a plain one (h5repack)")
        rows.append((start, stop))
    edges = [0, *(stop for _, stop in sorted(rows))]
    if [start for start, _ in sorted(rows)] != edges[:-1] or edges[-1] != len(dataset):
        raise ShardError(f"{where}: refused: its virtual sources leave rows out or give them twice")


def _source_path(dataset: h5py.Dataset, name: str) -> Path:
    own = Path(dataset.file.filename).resolve()
    return own if name == "." else (own.parent / name).resolve()


def check_axes(dataset: h5py.Dataset, axes: tuple[str, ...]) -> None:
    """Raise `ShapeError` unless a dataset has as many axes as are named. Local."""
    if dataset.ndim != len(axes):
        raise ShapeError(f"{dataset.file.filename}: dataset {dataset.name!r}: expected shape ({', '.join(axes)}), "
                         f"got {dataset.shape}")
