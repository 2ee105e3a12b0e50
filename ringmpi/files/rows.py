"""Rows of a dataset: cut into ranges, and selected in a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

TRANSFER_BYTES = 2**28         # of one read or write: far below the 2 GiB where MPI-IO and HDF5 had bugs


def row_ranges(shape: tuple[int, ...], dtype: np.dtype[Any], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut the rows of an array into ranges of at most 256 MiB, or `most`, or one row: (start, stop). Local."""
    row = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
    step = max(1, (TRANSFER_BYTES if most is None else most) // row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def select_rows(dataset: h5py.Dataset, start: int, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Give the HDF5 dataspaces, in memory and in the file, of an array of `shape` from row `start` on. Local."""
    space = dataset.id.get_space()
    space.select_hyperslab((start, *[0] * (len(shape) - 1)), shape)
    return h5py.h5s.create_simple(shape), space


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
