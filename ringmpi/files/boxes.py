"""Boxes of a dataset, a range of each axis, read bit for bit; those of a virtual dataset from its own sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import ShardError
from .item_types import bits, memory_type
from .links import resolve_path
from .opening import H5PY_ERRORS, explain, open_file
from .rows import box_of, row_ranges, select_box
from .virtual import source_path, within_source

Array = NDArray[Any]


def read_box(dataset: h5py.Dataset, start: Sequence[int], x: Array) -> None:
    """Read the box from `start` on into a contiguous array of its shape and the dataset's dtype, bit for bit. Local.

    A virtual dataset is read from its sources: HDF5 itself reads a source that it can't open, for whatever reason, as
    zeros.

    Raises
    ------
    ShardError
        If a checksum does not match or the file can't be read.
    """
    if not dataset.is_virtual:
        read_box_as_shown(dataset, start, x)
        return
    for source in dataset.virtual_sources():
        box = box_of(source.vspace, dataset.shape) or ()
        wanted = tuple((max(first, begin), min(last, begin + count))
                       for (first, last), begin, count in zip(box, start, x.shape, strict=True))
        if any(first >= last for first, last in wanted):
            continue
        inside = zip(wanted, start, strict=True)
        target = x[tuple(slice(first - begin, last - begin) for (first, last), begin in inside)]
        rows = target if target.flags.c_contiguous else np.empty(target.shape, x.dtype)
        with open_file(source_path(dataset, source.file_name)) as file:
            stored = resolve_path(file, source.dset_name)
            first, shape = within_source(box, wanted, box_of(source.src_space, stored.shape) or ())
            read_box_as_shown(stored, first, rows.reshape(shape))
        if rows is not target:
            target.view(f"u{x.itemsize}")[...] = rows.view(f"u{x.itemsize}")


def read_box_as_shown(dataset: h5py.Dataset, start: Sequence[int], x: Array) -> None:
    """Read a box as any reader of HDF5 sees it: that of a virtual dataset through it. Local.

    Raises
    ------
    ShardError
        If a checksum does not match or the file can't be read.
    """
    try:
        item = memory_type(dataset, x.dtype)
        for first, last in row_ranges(x.shape, x.dtype):
            part = x[first:last]
            dataset.id.read(*select_box(dataset, (start[0] + first, *start[1:]), part.shape), bits(part), item)
    except H5PY_ERRORS as error:
        where = f"{dataset.file.filename}: dataset {dataset.name!r}, {_describe(dataset, start, x.shape)}"
        why = explain(error) if getattr(error, "errno", None) else f"damaged or unreadable: {error}"
        raise ShardError(f"{where}: {why}") from error


def _describe(dataset: h5py.Dataset, start: Sequence[int], shape: Sequence[int]) -> str:
    """Say which items a box has: rows, or a range of each axis."""
    ranges = [f"{begin}..{begin + count}" for begin, count in zip(start, shape, strict=True)]
    return f"rows {ranges[0]}" if tuple(shape[1:]) == dataset.shape[1:] else f"items [{', '.join(ranges)}]"
