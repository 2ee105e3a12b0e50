"""Virtual datasets: each source is opened and checked, since HDF5 silently reads one that is missing as zeros.

A source stands for a box of the dataset, a range of each axis: some tokens of it, as shards are, or some heads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..environment import virtual_prefix
from ..errors import ShardError
from .filters import OWN, Filters
from .item_types import stored_dtype
from .links import resolve_path
from .opening import open_file
from .rows import Box, box_of
from .storage import check_storage

MOST_CELLS = 2**22             # into which the edges of all sources cut a dataset


def source_path(dataset: h5py.Dataset, name: str) -> Path:
    """Give the file of a virtual source, by the name that the dataset has for it. Local."""
    own = Path(dataset.file.filename).resolve()
    return own if name == "." else (own.parent / name).resolve()


def within_source(box: Box, wanted: Box, source: Box) -> tuple[list[int], list[int]]:
    """Say where in a source, which stands for a box of a dataset, a box within that is: start and shape. Local.

    Raises
    ------
    ShardError
        If the source has not the items of the box, in their order.
    """
    if _lengths(box) != _lengths(source) or not source:
        raise ShardError("a virtual source no longer holds what is taken from it")
    wide = iter([(first - begin, last - first) for (begin, end), (first, last) in zip(box, wanted, strict=True)
                 if end - begin != 1])
    parts = [(begin, 0, 1) if end - begin == 1 else (begin, *next(wide)) for begin, end in source]
    return [begin + skipped for begin, skipped, _ in parts], [count for *_, count in parts]


def check_sources(dataset: h5py.Dataset, where: str, dtype: np.dtype[Any], raw: str | None,
                  filters: Filters = OWN) -> None:
    """Check that the sources of a virtual dataset are there, beside it, and give each number once. Local.

    Raises
    ------
    ShardError
        If they are not.
    """
    if virtual_prefix() is not None:
        raise ShardError(f"{where}: refused: HDF5_VDS_PREFIX leads virtual sources elsewhere; unset it")
    boxes = [_check_source(dataset, source, where, dtype, raw, filters) for source in dataset.virtual_sources()]
    if not _tile(boxes, dataset.shape):
        raise ShardError(f"{where}: refused: its virtual sources leave numbers out or give them twice, or are too many")


def _check_source(dataset: h5py.Dataset, source: Any, where: str, dtype: np.dtype[Any], raw: str | None,
                  filters: Filters) -> Box:
    """Check one source; give the box that it stands for."""
    name = source.file_name
    path = source_path(dataset, name)
    folder = Path(dataset.file.filename).resolve().parent
    if "%" in name or os.path.isabs(name) or not path.is_relative_to(folder):
        raise ShardError(f"{where}: refused: its virtual source {name!r} is outside the file's folder")

    # The source itself must be a plain dataset that is stored in full.
    with open_file(path) as file:
        target = resolve_path(file, source.dset_name)
        if not isinstance(target, h5py.Dataset) or target.is_virtual:
            raise ShardError(f"{where}: refused: its virtual source {name!r} holds no plain dataset "
                             f"{source.dset_name!r}")
        check_storage(target, f"{path}: dataset {source.dset_name!r}", filters)
        if stored_dtype(target, raw) != dtype:
            raise ShardError(f"{where}: its virtual source {name!r} has dtype {target.dtype}")
        shape = target.shape
        box = box_of(source.vspace, dataset.shape)
        inside = box_of(source.src_space, shape)

    # A box of it must stand for a box of the dataset, item for item.
    if box is None or inside is None or _lengths(box) != _lengths(inside):
        raise ShardError(f"{where}: refused: its virtual source {name!r}, of shape {shape}, does not hold the range of "
                         "each axis that is taken from it; copy the dataset into a plain one (h5repack)")
    return box


def _lengths(box: Box) -> list[int]:
    """Give the lengths of a box; axes of one item are of no account to the order of items."""
    return [stop - start for start, stop in box if stop - start != 1]


def _tile(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Say whether boxes cover an array, and no item twice."""
    edges = [np.unique([0, size, *(edge for box in boxes for edge in box[axis])]) for axis, size in enumerate(shape)]
    cells = [len(found) - 1 for found in edges]
    if math.prod(cells) > MOST_CELLS:
        return False
    covered = np.zeros(cells, bool)
    for box in boxes:
        part = covered[tuple(slice(*np.searchsorted(found, ends)) for found, ends in zip(edges, box, strict=True))]
        if part.any():
            return False
        part[...] = True
    return bool(covered.all())
