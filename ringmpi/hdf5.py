"""HDF5 datasets read with care and written whole: inputs are data, not code.

An HDF5 file can point outside itself (external links and storage, virtual sources), can ask for filter
plugins, and can read as zeros what was never written. Each of these is refused with its reason.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .environment import virtual_prefix
from .errors import DtypeError, OutputError, RingError, ShapeError, ShardError
from .phases import phase
from .softmax import BFLOAT16, DTYPES

FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
H5PY_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError)      # its ways to say: damaged
PIECE_BYTES = 2**28            # of one read or write: far below the 2 GiB where MPI-IO and HDF5 had bugs
CHUNK_BYTES = 2**20            # of what this package writes: one checksum each
BFLOAT16_FIELDS = (15, 7, 8, 0, 7)     # sign, exponent position and size, mantissa position and size


@contextmanager
def reading(path: Any) -> Iterator[None]:
    """Turn h5py's errors of a block that only reads into `ShardError`. Local."""
    try:
        yield
    except RingError:
        raise
    except H5PY_ERRORS as error:
        raise ShardError(f"{path}: can't be read, it is truncated, damaged or no HDF5 file: {error}") from error


@contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open an HDF5 file to read. Local.

    Raises
    ------
    ShardError
        If it is missing, no HDF5 file, truncated or damaged.
    """
    if not os.path.isfile(path):
        raise ShardError(f"{path}: no such file")
    with phase(f"reading {path}"), _opened(path) as file:
        yield file


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    with reading(path):
        # by its real name: HDF5 looks for virtual sources beside the name it was given
        file = h5py.File(os.path.realpath(path), "r", locking="best-effort")
    with file:
        yield file


def open_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Find a dataset of floats and check that all of its data is in place. Local.

    Parameters
    ----------
    file : h5py.File
        Opened to read.
    name : str
        Path of the dataset in the file.

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
        dataset = _follow(file, name)
        if not isinstance(dataset, h5py.Dataset):
            raise ShardError(f"{where}: expected a dataset, got a {type(dataset).__name__.lower()}")
        stored_dtype(dataset)
        _check_storage(dataset, where)
        if dataset.is_virtual:
            _check_sources(dataset, where)
    return dataset


def read_integers(file: h5py.File, name: str) -> NDArray[np.int64]:
    """Read a one-dimensional dataset of integers, with the checks of `open_dataset`. Local.

    Raises
    ------
    ShardError, DtypeError, ShapeError
        If it is not there, not to be trusted, not of integers or not one-dimensional.
    """
    where = f"{file.filename}: dataset {name!r}"
    with reading(where):
        dataset = _follow(file, name)
        if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual:
            raise ShardError(f"{where}: expected a plain dataset")
        if dataset.dtype.kind not in "iu":
            raise DtypeError(f"{where}: expected integers, got {dataset.dtype}")
        check_axes(dataset, ("offsets",))
        _check_storage(dataset, where)
        return np.asarray(dataset[...], np.int64)


def read_floats(file: h5py.File, name: str) -> NDArray[np.float64]:
    """Read a one-dimensional dataset of floats, one for each head, with the checks of `open_dataset`. Local.

    Raises
    ------
    ShardError, DtypeError, ShapeError
        If it is not there, not to be trusted, not of finite floats or not one-dimensional.
    """
    dataset = open_dataset(file, name)
    check_axes(dataset, ("heads",))
    numbers = read_rows(dataset, 0, len(dataset)).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ShardError(f"{file.filename}: dataset {name!r}: expected finite numbers, got {numbers}")
    return numbers


def stored_dtype(dataset: h5py.Dataset) -> np.dtype[Any]:
    """Give the NumPy dtype of a dataset's floats, bfloat16 included. Local.

    Raises
    ------
    DtypeError
        If they are not float64, float32, bfloat16 or float16.
    """
    kind = dataset.id.get_type()
    if isinstance(kind, h5py.h5t.TypeFloatID):
        if kind.get_size() == 2 and kind.get_fields() == BFLOAT16_FIELDS and kind.get_ebias() == 127:
            return BFLOAT16
        native: np.dtype[Any] = np.dtype(dataset.dtype.newbyteorder("="))
        if native in DTYPES.values():
            return native
    raise DtypeError(f"{dataset.file.filename}: dataset {dataset.name!r}: expected items of {', '.join(DTYPES)}, "
                     f"got {dataset.dtype}")


def file_type(dtype: np.dtype[Any]) -> Any:
    """Give the HDF5 type that `dtype` is stored as, little-endian. Local.

    bfloat16 is the type that HDF5 2.0 calls H5T_FLOAT_BFLOAT16LE, built by hand so that older libraries
    write and read it too.
    """
    if dtype != BFLOAT16:
        return h5py.h5t.py_create(dtype.newbyteorder("<"))
    kind = h5py.h5t.IEEE_F16LE.copy()
    kind.set_fields(*BFLOAT16_FIELDS)
    kind.set_ebias(127)
    return kind


def read_rows(dataset: h5py.Dataset, start: int, stop: int) -> NDArray[Any]:
    """Read rows start..stop of a dataset as native floats, bit for bit. Local.

    Raises
    ------
    ShardError
        If a checksum does not match or the file can't be read.
    """
    rows = np.empty((stop - start, *dataset.shape[1:]), stored_dtype(dataset))
    read_rows_into(dataset, start, rows)
    return rows


def read_rows_into(dataset: h5py.Dataset, start: int, rows: NDArray[Any]) -> None:
    """Read rows from `start` on into a contiguous array of the dataset's dtype and row shape, bit for bit. Local.

    Raises
    ------
    ShardError
        If a checksum does not match or the file can't be read.
    """
    try:
        for first, last in row_pieces(rows.shape, rows.dtype):
            piece = rows[first:last]
            dataset.id.read(*_spaces(dataset, start + first, piece), _bits(piece), file_type(rows.dtype))
    except H5PY_ERRORS as error:
        raise ShardError(f"{dataset.file.filename}: dataset {dataset.name!r}, rows {start}..{start + len(rows)}: "
                         f"damaged or unreadable: {error}") from error


def create_dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> h5py.Dataset:
    """Make a dataset for floats, in chunks of about 1 MiB with a Fletcher32 checksum each. Local."""
    row = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
    chunks = (min(shape[0], max(1, CHUNK_BYTES // row)), *shape[1:]) if 0 not in shape else None
    return file.create_dataset(name, shape, file_type(dtype), chunks=chunks, fletcher32=bool(chunks))


def write_rows(dataset: h5py.Dataset, start: int, rows: NDArray[Any]) -> None:
    """Write `rows` from row `start` of a dataset of the same dtype, bit for bit. Local."""
    for first, last in row_pieces(rows.shape, rows.dtype):
        piece = np.ascontiguousarray(rows[first:last])
        dataset.id.write(*_spaces(dataset, start + first, piece), _bits(piece), file_type(rows.dtype))


@contextmanager
def write_file(path: Path, force: bool = False) -> Iterator[h5py.File]:
    """Write an HDF5 file that appears under its name only when it is whole. Local.

    It is written under a temporary name beside it; the attribute `complete` comes last; then the file is
    flushed to disk and renamed. After an error nothing is left.

    Raises
    ------
    OutputError
        If `path` exists and not `force`, or can't be written.
    """
    check_writable(path, force)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        # v110: the oldest format with checksummed metadata and virtual datasets; HDF5 1.10 reads it.
        with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
            yield file
            file.flush()
            file.attrs["complete"] = True
        flush_to_disk(temporary)
        temporary.replace(path)
    except RingError:
        raise
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path}: can't be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):           # the file is there; some file systems can't flush a folder
        flush_to_disk(path.parent)


def check_writable(path: Path, force: bool) -> None:
    """Raise `OutputError` unless a file can be made at `path`; `force` allows to replace one. Local."""
    if path.is_dir():
        raise OutputError(f"{path}: expected a file name, got a folder")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists; choose another name or allow to replace it with --force")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: can't be written: no such folder: {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: can't be written: no permission to write in {path.parent}")


def flush_to_disk(path: Path) -> None:
    """Make a file or a folder durable (fsync). Local."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bits(x: NDArray[Any]) -> NDArray[Any]:
    return x.view(np.uint16) if x.dtype == BFLOAT16 else x


def row_pieces(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[tuple[int, int]]:
    """Cut the rows of an array into pieces of at most 256 MiB, or of one row: (start, stop). Local."""
    row = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
    step = max(1, PIECE_BYTES // row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _spaces(dataset: h5py.Dataset, start: int, piece: NDArray[Any]) -> tuple[Any, Any]:
    space = dataset.id.get_space()
    space.select_hyperslab((start, *[0] * (piece.ndim - 1)), piece.shape)
    return h5py.h5s.create_simple(piece.shape), space


def _follow(file: h5py.File, path: str) -> Any:
    """Walk to an object, link by link; never leave the file, follow at most ten soft links."""
    here: Any = file
    where = f"{file.filename}: {path!r}"
    parts, links = _split(path), 0
    while parts:
        part = parts.pop(0)
        if not isinstance(here, h5py.Group):
            raise ShardError(f"{where}: {here.name!r} is no group")
        try:
            link = here.get(part, getlink=True)
        except (KeyError, TypeError, ValueError):
            link = None
        if link is None:
            raise ShardError(f"{where}: no such dataset; the file has {', '.join(sorted(file)) or 'none'}")
        if isinstance(link, h5py.ExternalLink):
            raise ShardError(f"{where}: refused: an external link to {link.filename!r}; inputs must not lead outside "
                             "their file")
        if isinstance(link, h5py.SoftLink):
            links += 1
            if links > 10:
                raise ShardError(f"{where}: refused: more than ten soft links")
            here = file if link.path.startswith("/") else here
            parts = _split(link.path) + parts
        else:
            here = here[part]
    return here


def _split(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _check_storage(dataset: h5py.Dataset, where: str) -> None:
    if dataset.external:
        raise ShardError(f"{where}: refused: its data is in another file, {dataset.external[0][0]!r} (external "
                         "storage); copy it into one HDF5 file")
    properties = dataset.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        number, _, _, name = properties.get_filter(i)
        if number not in FILTERS:
            raise ShardError(f"{where}: refused: unknown filter {number} ({name.decode(errors='replace')}); known are "
                             f"{', '.join(FILTERS.values())}")
    if dataset.is_virtual or not dataset.size:
        return
    if dataset.chunks is None:
        if dataset.id.get_storage_size() < dataset.nbytes:
            raise ShardError(f"{where}: its data was never written (it would read as zeros)")
        return
    chunks = int(np.prod([-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]))
    written = dataset.id.get_num_chunks()
    if written < chunks:
        raise ShardError(f"{where}: only {written} of {chunks} chunks were written (the rest would read as zeros); "
                         "was its writer killed?")


def _check_sources(dataset: h5py.Dataset, where: str) -> None:
    """Open and check each virtual source: one that is missing reads as zeros, silently."""
    if virtual_prefix() is not None:
        raise ShardError(f"{where}: refused: HDF5_VDS_PREFIX leads virtual sources elsewhere; unset it")
    folder = Path(dataset.file.filename).resolve().parent
    rows = []
    for source in dataset.virtual_sources():
        name = source.file_name
        path = (folder / name).resolve() if name != "." else Path(dataset.file.filename).resolve()
        if "%" in name or os.path.isabs(name) or not path.is_relative_to(folder):
            raise ShardError(f"{where}: refused: its virtual source {name!r} is outside the file's folder")
        with open_file(path) as file:
            target = _follow(file, source.dset_name)
            if not isinstance(target, h5py.Dataset) or target.is_virtual:
                raise ShardError(f"{where}: refused: its virtual source {name!r} holds no plain dataset "
                                 f"{source.dset_name!r}")
            stored_dtype(target)
            _check_storage(target, f"{path}: dataset {source.dset_name!r}")
            if stored_dtype(target) != stored_dtype(dataset):
                raise ShardError(f"{where}: its virtual source {name!r} has dtype {target.dtype}")
            start, stop = _whole_rows(source.vspace, dataset.shape)
            first, last = _whole_rows(source.src_space, target.shape)
        if None in (start, first) or stop - start != last - first or dataset.shape[1:] != target.shape[1:]:
            raise ShardError(f"{where}: refused: its virtual source {name!r}, of shape {target.shape}, does not hold "
                             "the whole rows that are taken from it; copy the dataset into a plain one (h5repack)")
        rows.append((start, stop))
    edges = [0, *(stop for _, stop in sorted(rows))]
    if [start for start, _ in sorted(rows)] != edges[:-1] or edges[-1] != len(dataset):
        raise ShardError(f"{where}: refused: its virtual sources leave rows out or give them twice")


def _whole_rows(space: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Give the rows start, stop that a selection holds in full; (None, None) if it is anything else."""
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return 0, shape[0]
    if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS:
        return None, None
    low, high = space.get_select_bounds()
    box = [b - a + 1 for a, b in zip(low, high, strict=True)]
    inside = len(box) == len(shape) and low[1:] == (0,) * (len(box) - 1) and tuple(box[1:]) == shape[1:]
    if not inside or high[0] >= shape[0] or int(np.prod(box)) != space.get_select_npoints():
        return None, None
    return low[0], high[0] + 1


def check_axes(dataset: h5py.Dataset, axes: tuple[str, ...]) -> None:
    """Raise `ShapeError` unless a dataset has as many axes as are named. Local."""
    if dataset.ndim != len(axes):
        raise ShapeError(f"{dataset.file.filename}: dataset {dataset.name!r}: expected shape ({', '.join(axes)}), "
                         f"got {dataset.shape}")
