"""The manifest of an OUT.h5, read with as much care as an input: what the file says of itself, and what it shows.

A manifest is a plain dataset of bytes, inside the file and of a limited size. Its JSON is checked value by value
before it is used, and the virtual datasets `out` and `lse` must be views of its shards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import InternalError, ShardError
from .axes import Axes, axes_of_results, axes_said
from .hdf5 import open_dataset
from .item_types import file_type, stored_dtype
from .links import resolve_path
from .opening import open_file, reading
from .rows import box_of
from .sealed import read_sealed
from .single import is_single
from .storage import check_storage
from .tokens import Tokens

MANIFEST_BYTES = 2**26         # 300,000 shards
PROBE = ("import sys; sys.path.pop(0); import h5py; "         # of no module that lies in the current folder
         "file = h5py.File(sys.argv[1], locking='best-effort'); file['out'], file['lse']")
PROBE_SECONDS = 60.0
COUNT = 2**62                  # of rows, heads or bytes: a larger number is no size

Array = NDArray[Any]


@dataclass(frozen=True)
class Shard:
    """One line of the manifest: rows start..stop are in `file`, of `size` bytes with digest `sha256`."""

    file: str
    start: int
    stop: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an OUT.h5 says of itself.

    Attributes
    ----------
    path : path
        Of OUT.h5, with no symbolic link in it.
    shards : tuple of Shard
        In the order of their rows, without gaps.
    shapes, dtypes : dict
        Of `out` and `lse` as a whole, in memory.
    record : dict
        How it was made.
    axes : Axes
        Of `out` in the files.
    """

    path: Path
    shards: tuple[Shard, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    record: dict[str, Any]
    axes: Axes

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Read rows start..stop of `out` or `lse` from the shards, and check that OUT.h5 shows the same. Local.

        Raises
        ------
        ShardError
            If a shard is missing, damaged or not of the shape that the manifest says, or OUT.h5 shows other rows.
        """
        parts = [np.empty((0, *self.shapes[name][1:]), DTYPES[self.dtypes[name]])]
        with open_file(self.path) as whole:
            for shard in self.shards:
                first, last = max(start, shard.start), min(stop, shard.stop)
                if first < last:
                    part = self._read_from_shard(shard, name, first, last)
                    shown = np.empty_like(part)
                    with reading(self.path):      # opened anew for each: HDF5 keeps sources open as long as the view
                        view = resolve_path(whole, name)
                        self._tokens(view, name).read_into(first, shown, as_shown=True)
                    if shown.tobytes() != part.tobytes():
                        raise ShardError(f"{self.path}: rows {first}..{last} of {name} are not those of {shard.file}")
                    parts.append(part)
        return np.concatenate(parts)

    def _read_from_shard(self, shard: Shard, name: str, first: int, last: int) -> Array:
        with open_file(self.path.parent / shard.file) as file:
            dataset = open_dataset(file, name)
            if dataset.shape != self.shape_in_file(name, shard.stop - shard.start) or dataset.is_virtual:
                raise ShardError(f"{self.path}: shard {shard.file} is not of the shape that the manifest says")
            if stored_dtype(dataset) != DTYPES[self.dtypes[name]]:
                raise ShardError(f"{self.path}: shard {shard.file} is not of the dtype that the manifest says")
            return self._tokens(dataset, name).read(first - shard.start, last - shard.start)

    def shape_in_file(self, name: str, rows: int) -> tuple[int, ...]:
        """Give the shape of a dataset for so many rows of `out` or `lse`. Local."""
        return axes_of_results(self.axes)[name].shape_in_file((rows, *self.shapes[name][1:]))

    def _tokens(self, dataset: h5py.Dataset, name: str) -> Tokens:
        axes = axes_of_results(self.axes)[name]
        return Tokens(dataset, axes, DTYPES[self.dtypes[name]], self.shapes[name][1:])


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of an OUT.h5. Local.

    Raises
    ------
    ShardError
        If the file is missing, damaged, unfinished or no output of ours, or names shards outside its folder.
    """
    real = Path(os.path.realpath(path))
    if is_single(real):
        raise ShardError(f"{path}: is one file already, with no shards")
    text = read_sealed(real, "manifest", MANIFEST_BYTES, "the output of `ringmpi attend`")
    try:
        content = json.loads(text)
        manifest = Manifest(real, tuple(Shard(**shard) for shard in content["shards"]),
                            {name: tuple(shape) for name, shape in content["shapes"].items()},
                            dict(content["dtypes"]), dict(content["record"]), axes_said(content))
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ShardError(f"{path}: its manifest makes no sense: {error}") from None
    return manifest


def check_shards(shards: Iterable[Shard]) -> int:
    """Raise ValueError unless shards lie where ours lie, and their rows follow each other; give how many. Local."""
    at = 0
    for shard in shards:
        parts = shard.file.split("/")
        if (len(parts) != 3 or not parts[0].endswith(".shards") or "\0" in shard.file
                or not set(parts).isdisjoint({"", ".", ".."})):
            raise ValueError(f"shard {shard.file!r} is outside the folder of shards")
        if not _are_counts(shard.start, shard.stop, shard.size) or shard.start != at or shard.stop < at:
            raise ValueError(f"shard {shard.file!r} does not begin at row {at}")
        if not isinstance(shard.sha256, str):
            raise ValueError(f"shard {shard.file!r} has no digest")
        at = shard.stop
    return at


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError unless it is one of ours."""
    at = check_shards(manifest.shards)
    out, lse = (manifest.shapes[name] for name in ("out", "lse"))
    if not _are_counts(*out, *lse) or len(out) != len(manifest.axes.in_memory) or lse != out[:-1] or out[0] != at:
        raise ValueError(f"out and lse have no {at} rows of heads")
    if manifest.dtypes["out"] not in DTYPES or manifest.dtypes["lse"] not in ("float32", "float64"):
        raise ValueError("out is of no known dtype, or lse of no accumulator's")
    if not isinstance(manifest.record.get("options", {}), dict):
        raise ValueError("the options are no table")
    if not all(name.isidentifier() for name in manifest.record):
        raise ValueError("the record has odd names")


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < COUNT for value in values)


def probe(path: Path) -> None:
    """Let another process open the views of an OUT.h5 first. Local.

    The heap where HDF5 keeps them has no checksum: over some damage to it the library crashes or never returns.

    Raises
    ------
    ShardError
        If that happens.
    """
    try:
        line = [sys.executable, "-c", PROBE, str(path)]
        done = subprocess.run(line, capture_output=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ShardError(f"{path}: is damaged: HDF5 did not open its views in {PROBE_SECONDS:g} s") from None
    if b"ModuleNotFoundError" in done.stderr:
        raise InternalError(f"the process that opens {path} first has no h5py: {done.stderr.decode(errors='replace')}")
    if done.returncode < 0:
        raise ShardError(f"{path}: is damaged: HDF5 died of it, by signal {-done.returncode}")


def check_view(file: h5py.File, manifest: Manifest) -> None:
    """Check that `out` and `lse` of an OUT.h5 are the views of its shards, no more and no less. Local.

    Raises
    ------
    ShardError
        If one is missing, of another shape or dtype, shows other rows, or would show a missing shard as numbers.
    """
    filled = [shard for shard in manifest.shards if shard.stop > shard.start]
    for name in ("out", "lse"):
        where = f"{manifest.path}: dataset {name!r}"
        with reading(where):
            dataset = resolve_path(file, name)
            if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual != bool(filled):
                raise ShardError(f"{where}: is no view of the shards")
            shape = manifest.shape_in_file(name, manifest.shapes[name][0])
            item = file_type(DTYPES[manifest.dtypes[name]])
            if dataset.shape != shape or not dataset.id.get_type().equal(item):
                raise ShardError(f"{where}: expected {manifest.dtypes[name]} of shape {shape} as the manifest says, "
                                 f"got {dataset.dtype} of {dataset.shape}")
            check_storage(dataset, where)
            if filled:
                _check_mapping(dataset, where, name, manifest, filled)


def _check_mapping(dataset: h5py.Dataset, where: str, name: str, manifest: Manifest, shards: list[Shard]) -> None:
    """Check that each source of a view is all rows of its shard, in order."""
    axes = axes_of_results(manifest.axes)[name]

    def shows(source: Any, shard: Shard) -> bool:
        shape = manifest.shape_in_file(name, shard.stop - shard.start)
        rows = tuple((start, start + count) for start, count in zip(axes.start_of(shard.start), shape, strict=True))
        return ((source.file_name, source.dset_name) == (shard.file, name)
                and box_of(source.vspace, dataset.shape) == rows
                and box_of(source.src_space, shape) == tuple((0, count) for count in shape))

    sources = dataset.virtual_sources()
    if len(sources) != len(shards) or not all(map(shows, sources, shards)):
        raise ShardError(f"{where}: does not show the shards of the manifest")
    if not np.isnan(dataset.fillvalue):
        raise ShardError(f"{where}: would show a missing shard as {dataset.fillvalue}, not as NaN")
