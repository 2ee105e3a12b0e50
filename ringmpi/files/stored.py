"""Where a dataset is and how it is stored: the dtype of its items, and whether all of its data is there.

What was never written reads as zeros, and some ways to store take more memory to read than the file has. Both are
refused with their reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..dtypes import BFLOAT16, DTYPES
from ..errors import DtypeError, ShardError

FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
PIECE_BYTES = 2**28            # of one read or write: far below the 2 GiB where MPI-IO and HDF5 had bugs
CHUNK_BYTES = 2**28            # of a filtered chunk that is read: it comes to memory as a whole
BFLOAT16_FIELDS = (15, 7, 8, 0, 7)     # sign, exponent position and size, mantissa position and size
SHOWN_NAMES = 20               # of a file, in an error
RAW_DTYPE = "bfloat16"         # what 16-bit items that are no floats may be said to be


def follow(file: h5py.File, path: str) -> Any:
    """Walk to an object, link by link; never leave the file, follow at most ten soft links. Local."""
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
            raise ShardError(f"{where}: no such dataset; the file has {_names(file)}")
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


def _names(file: h5py.File) -> str:
    names = sorted(itertools.islice(file, SHOWN_NAMES))
    return ", ".join(names) + (" ..." if len(file) > SHOWN_NAMES else "") or "none"


def _split(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def stored_dtype(dataset: h5py.Dataset, raw: str | None = None) -> np.dtype[Any]:
    """Give the NumPy dtype of a dataset's floats, bfloat16 included. Local.

    A file is accepted as it is if its bfloat16 is the floating-point type that HDF5 2.0 calls
    H5T_FLOAT_BFLOAT16LE. `ringmpi.files.hdf5` writes it, with any HDF5 there is::

        with write_file(Path("in.h5")) as file:
            for name, x in {"q": q, "k": k, "v": v}.items():       # NumPy arrays of ml_dtypes.bfloat16
                write_rows(create_dataset(file, name, x.shape, x.dtype), 0, x)

    An array of torch is brought there by ``x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)``.

    Parameters
    ----------
    dataset : h5py.Dataset
    raw : str, optional
        ``"bfloat16"``: take plain 16-bit items (unsigned, signed or opaque) for the bits of bfloat16; opaque ones
        are little-endian.

    Raises
    ------
    DtypeError
        If they are not float64, float32, bfloat16 or float16.
    """
    where = f"{dataset.file.filename}: dataset {dataset.name!r}"
    identifier = dataset.id.get_type()
    if isinstance(identifier, h5py.h5t.TypeFloatID):
        if (identifier.get_size() == 2 and identifier.get_fields() == BFLOAT16_FIELDS
                and identifier.get_ebias() == 127):
            return BFLOAT16
        native: np.dtype[Any] = np.dtype(dataset.dtype.newbyteorder("="))
        if native in DTYPES.values():
            return native
    is_raw = identifier.get_size() == 2 and isinstance(identifier, h5py.h5t.TypeIntegerID | h5py.h5t.TypeOpaqueID)
    if is_raw and raw == RAW_DTYPE:
        return BFLOAT16
    remedy = ("; if these are the bits of bfloat16, say --raw-dtype bfloat16, or write HDF5's own bfloat16 as "
              "ringmpi.files.hdf5.write_rows does") if is_raw else ""
    raise DtypeError(f"{where}: expected items of {', '.join(DTYPES)}, got {dataset.dtype}{remedy}")


def file_type(dtype: np.dtype[Any]) -> Any:
    """Give the HDF5 type that `dtype` is stored as, little-endian. Local.

    bfloat16 is the type that HDF5 2.0 calls H5T_FLOAT_BFLOAT16LE, built by hand so that older libraries
    write and read it too.
    """
    if dtype != BFLOAT16:
        return h5py.h5t.py_create(dtype.newbyteorder("<"))
    identifier = h5py.h5t.IEEE_F16LE.copy()
    identifier.set_fields(*BFLOAT16_FIELDS)
    identifier.set_ebias(127)
    return identifier


def memory_type(dataset: h5py.Dataset, dtype: np.dtype[Any]) -> Any:
    """Give the HDF5 type by which a dataset's items come to memory as `dtype`, bit for bit. Local."""
    identifier = dataset.id.get_type()
    if isinstance(identifier, h5py.h5t.TypeOpaqueID):
        return identifier
    if dtype == BFLOAT16 and isinstance(identifier, h5py.h5t.TypeIntegerID):
        signed = identifier.get_sign() == h5py.h5t.SGN_2
        return h5py.h5t.NATIVE_INT16 if signed else h5py.h5t.NATIVE_UINT16
    return file_type(dtype)


def row_pieces(shape: tuple[int, ...], dtype: np.dtype[Any], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut the rows of an array into pieces of at most 256 MiB, or `most`, or one row: (start, stop). Local."""
    row = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
    step = max(1, (PIECE_BYTES if most is None else most) // row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def check_storage(dataset: h5py.Dataset, where: str) -> None:
    """Check that a dataset's data is in its file, all of it, and takes no more memory to read than it has. Local.

    HDF5 can tell where it has made no place for data: there nothing was written. It can't tell what was written into
    a place that it has made: a contiguous dataset gets all of its place with its first row, a compact one or one with
    early allocation (as parallel programs have it) when it is created. So rows that are left out of these can't be
    told from zeros; of the last two, it is refused if *all* has the fill value.

    Raises
    ------
    ShardError
        If it is external, filtered by what this package does not know, in compressed chunks above 256 MiB, or was never
        written in full.
    """
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
    item = dataset.id.get_type().get_size()
    if dataset.chunks is None:
        if dataset.id.get_storage_size() < dataset.size * item:
            raise ShardError(f"{where}: its data was never written (it would read as zeros)")
    else:
        _check_chunks(dataset, where, int(np.prod(dataset.chunks, dtype=object)) * item, properties.get_nfilters())
    early = properties.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY or properties.get_layout() == h5py.h5d.COMPACT
    if early and _is_all_fill(dataset):
        raise ShardError(f"{where}: all of it has the fill value, and it got its place before it was written (it is "
                         "compact or allocated early): it can't be told from data that was never written; if it is "
                         "meant, store it with late allocation")


def _check_chunks(dataset: h5py.Dataset, where: str, size: int, filters: int) -> None:
    chunks = int(np.prod([-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)], dtype=object))
    written = dataset.id.get_num_chunks()
    if written < chunks:
        raise ShardError(f"{where}: only {written} of {chunks} chunks were written (the rest would read as zeros); "
                         "was its writer killed?")
    if filters and size > CHUNK_BYTES:
        raise ShardError(f"{where}: refused: each of its chunks, of shape {dataset.chunks}, takes {size / 2**20:,.0f} "
                         f"MiB of memory to read; copy it into chunks of at most {CHUNK_BYTES // 2**20} MiB")


def _is_all_fill(dataset: h5py.Dataset) -> bool:
    fill = dataset.fillvalue
    for start, stop in row_pieces(dataset.shape, dataset.dtype) if dataset.ndim else [(0, 1)]:
        piece: NDArray[Any] = np.asarray(dataset[start:stop] if dataset.ndim else dataset[()])
        if ((piece != fill) & ((piece == piece) | (fill == fill))).any():
            return False
    return True


def whole_rows(space: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Give the rows start, stop that a selection holds in full; (None, None) if it is anything else. Local."""
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
