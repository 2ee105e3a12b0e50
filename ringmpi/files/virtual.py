"""Virtual datasets: each source is opened and checked, since HDF5 silently reads one that is missing as zeros."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..environment import virtual_prefix
from ..errors import ShardError
from .item_types import stored_dtype
from .links import resolve_path
from .opening import open_file
from .rows import whole_rows
from .storage import check_storage


def source_path(dataset: h5py.Dataset, name: str) -> Path:
    """Give the file of a virtual source, by the name that the dataset has for it. Local."""
    own = Path(dataset.file.filename).resolve()
    return own if name == "." else (own.parent / name).resolve()


def check_sources(dataset: h5py.Dataset, where: str, dtype: np.dtype[Any], raw: str | None) -> None:
    """Check that the sources of a virtual dataset are there, beside it, and give each row once. Local.

    Raises
    ------
    ShardError
        If they are not.
    """
    if virtual_prefix() is not None:
        raise ShardError(f"{where}: refused: HDF5_VDS_PREFIX leads virtual sources elsewhere; unset it")
    ranges = sorted(_check_source(dataset, source, where, dtype, raw) for source in dataset.virtual_sources())
    starts = [start for start, _ in ranges]
    edges = [0, *(stop for _, stop in ranges)]
    if starts != edges[:-1] or edges[-1] != len(dataset):
        raise ShardError(f"{where}: refused: its virtual sources leave rows out or give them twice")


def _check_source(dataset: h5py.Dataset, source: Any, where: str, dtype: np.dtype[Any], raw: str | None
                  ) -> tuple[int, int]:
    """Check one source; give the rows that it stands for."""
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
        check_storage(target, f"{path}: dataset {source.dset_name!r}")
        if stored_dtype(target, raw) != dtype:
            raise ShardError(f"{where}: its virtual source {name!r} has dtype {target.dtype}")
        shape = target.shape
        start, stop = whole_rows(source.vspace, dataset.shape)
        first, last = whole_rows(source.src_space, shape)

    # Whole rows of it must stand for whole rows of the dataset.
    if None in (start, first) or stop - start != last - first or dataset.shape[1:] != shape[1:]:
        raise ShardError(f"{where}: refused: its virtual source {name!r}, of shape {shape}, does not hold "
                         "the whole rows that are taken from it; copy the dataset into a plain one (h5repack)")
    return start, stop
