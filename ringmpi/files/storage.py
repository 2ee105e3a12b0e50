"""How a dataset is stored: whether all of its data is in the file, and can be read with little memory.

Data that was never written reads as zeros, and some ways to store data take more memory to read than the file has.
Both are refused with their reason.
"""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import ShardError
from .filters import OWN, Filters, refusal
from .rows import row_ranges

LARGEST_CHUNK_BYTES = 2**28    # of a filtered chunk that is read: it comes to memory as a whole


def check_storage(dataset: h5py.Dataset, where: str, filters: Filters = OWN) -> None:
    """Check that all of a dataset's data is in its file, and takes no more memory to read than it should. Local.

    HDF5 knows where it has allocated no space: nothing was written there. It does not know what was written into
    space that it has allocated. A contiguous dataset is allocated with its first row; a compact one, or one with early
    allocation (as parallel programs have it), when it is created. So rows left out of these can't be told from zeros;
    of the last two kinds, a dataset is refused if *all* of it has the fill value.

    Raises
    ------
    ShardError
        If the data is in another file, has a filter that this package does not know, is in compressed chunks above
        256 MiB, or was never written in full.
    """
    _check_readable(dataset, where, filters)
    if dataset.is_virtual or not dataset.size:
        return
    properties = dataset.id.get_create_plist()
    item = dataset.id.get_type().get_size()
    if dataset.chunks is None:
        if dataset.id.get_storage_size() < dataset.size * item:
            raise ShardError(f"{where}: its data was never written (it would read as zeros)")
    else:
        _check_chunks(dataset, where, int(np.prod(dataset.chunks, dtype=object)) * item, properties.get_nfilters())

    # Allocated before anything was written.
    early = properties.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY or properties.get_layout() == h5py.h5d.COMPACT
    if early and _is_all_fill(dataset):
        raise ShardError(f"{where}: all of it has the fill value, and it got its place before it was written (it is "
                         "compact or allocated early): it can't be told from data that was never written; if it is "
                         "meant, store it with late allocation")


def _check_readable(dataset: h5py.Dataset, where: str, filters: Filters) -> None:
    """Check that the data is in this file, and needs no filter that would have to be loaded."""
    if dataset.external:
        raise ShardError(f"{where}: refused: its data is in another file, {dataset.external[0][0]!r} (external "
                         "storage); copy it into one HDF5 file")
    properties = dataset.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        number, _, _, name = properties.get_filter(i)
        why = refusal(number, name.decode(errors="replace"), filters)
        if why:
            raise ShardError(f"{where}: refused: {why}")


def _check_chunks(dataset: h5py.Dataset, where: str, size: int, filters: int) -> None:
    """Check that all chunks were written, and that one of `size` bytes can be read."""
    chunks = int(np.prod([-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)], dtype=object))
    written = dataset.id.get_num_chunks()
    if written < chunks:
        raise ShardError(f"{where}: only {written} of {chunks} chunks were written (the rest would read as zeros); "
                         "was its writer killed?")
    if filters and size > LARGEST_CHUNK_BYTES:
        raise ShardError(f"{where}: refused: each of its chunks, of shape {dataset.chunks}, takes {size / 2**20:,.0f} "
                         f"MiB of memory to read; copy it into chunks of at most {LARGEST_CHUNK_BYTES // 2**20} MiB")


def _is_all_fill(dataset: h5py.Dataset) -> bool:
    fill = dataset.fillvalue
    for start, stop in row_ranges(dataset.shape, dataset.dtype) if dataset.ndim else [(0, 1)]:
        rows: NDArray[Any] = np.asarray(dataset[start:stop] if dataset.ndim else dataset[()])
        if ((rows != fill) & ((rows == rows) | (fill == fill))).any():        # NaN is no other value than NaN
            return False
    return True
