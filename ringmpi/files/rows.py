"""Rows of an array cut into ranges, and boxes of a dataset: a range of each axis, selected in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import numpy as np

TRANSFER_BYTES = 2**28         # of one read or write: far below the 2 GiB where MPI-IO and HDF5 had bugs
Box = tuple[tuple[int, int], ...]        # of each axis start and stop


def row_ranges(shape: tuple[int, ...], dtype: np.dtype[Any], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut the rows of an array into ranges of at most 256 MiB, or `most`, or one row: (start, stop). Local."""
    row = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
    step = max(1, (TRANSFER_BYTES if most is None else most) // row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def select_box(dataset: h5py.Dataset, start: Sequence[int], shape: Sequence[int]) -> tuple[Any, Any]:
    """Give the HDF5 dataspaces, in memory and in the file, of an array of `shape` that begins at `start`. Local."""
    space = dataset.id.get_space()
    space.select_hyperslab(tuple(start), tuple(shape))
    return h5py.h5s.create_simple(tuple(shape)), space


def box_of(space: Any, shape: Sequence[int]) -> Box | None:
    """Give the box that a selection of a dataset of `shape` is; None if it is anything else. Local."""
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return tuple((0, size) for size in shape)
    if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS:
        return None
    low, high = space.get_select_bounds()
    box = tuple((first, last + 1) for first, last in zip(low, high, strict=True))
    inside = len(box) == len(shape) and all(stop <= size for (_, stop), size in zip(box, shape, strict=True))
    if not inside or math.prod(stop - start for start, stop in box) != space.get_select_npoints():
        return None
    return box
