"""Sharded output: one file a rank, one file that shows them as a whole, and the manifest that makes it true.

``OUT.h5`` holds virtual datasets `out` and `lse` over ``OUT.h5.shards/RUN/*.h5`` and a manifest with the size
and SHA-256 digest of each shard file. It is written last: an interrupted run leaves no OUT.h5. As HDF5 reads a
missing source as fill values without an error, the fill value is NaN, and this package's own readers go by the
manifest, never by the bare view.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import OutputError, ShardError
from .hdf5 import (
    check_writable,
    create_dataset,
    file_type,
    open_dataset,
    open_file,
    read_rows,
    reading,
    row_pieces,
    write_file,
    write_rows,
)
from .softmax import DTYPES

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
        Of `out` and `lse` as a whole.
    record : dict
        How it was made.
    """

    path: Path
    shards: tuple[Shard, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    record: dict[str, Any]

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Read rows start..stop of `out` or `lse` from the shards. Local.

        Raises
        ------
        ShardError
            If a shard is missing, damaged or not of the shape that the manifest says.
        """
        pieces = [np.empty((0, *self.shapes[name][1:]), DTYPES[self.dtypes[name]])]
        for shard in self.shards:
            first, last = max(start, shard.start), min(stop, shard.stop)
            if first < last:
                with open_file(self.path.parent / shard.file) as file:
                    piece = read_rows(open_dataset(file, name), first - shard.start, last - shard.start)
                if piece.shape[1:] != self.shapes[name][1:] or piece.dtype != pieces[0].dtype:
                    raise ShardError(f"{self.path}: shard {shard.file} is not of the shape that the manifest says")
                pieces.append(piece)
        return np.concatenate(pieces)


class Output:
    """An ``OUT.h5`` in the making. Local; the job agrees between the steps.

    Parameters
    ----------
    path : path
        Of OUT.h5.
    run : str
        A name for this run, the same on every rank and different from other runs': its shards lie in a folder of
        that name, so that no run touches those of another.
    force : bool
        Replace an OUT.h5 that exists.
    """

    def __init__(self, path: str | os.PathLike[str], run: str, force: bool) -> None:
        self.path = Path(path)
        self.folder = self.path.with_name(self.path.name + ".shards") / run
        self.force = force
        self._replaced: Manifest | None = None

    def prepare(self) -> None:
        """Check that output can be written, and make the folder of this run. One rank.

        Raises
        ------
        OutputError
            If OUT.h5 exists and not `force`, or the folder can't be written.
        """
        check_writable(self.path, self.force)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: can't be written: {error}") from error

    def write(self, rank: int, start: int, out: Array, lse: Array) -> Shard:
        """Write this rank's shard: rows from `start`. Each rank.

        Parameters
        ----------
        out : array of shape (tokens, heads, dim_v)
        lse : array of shape (tokens, heads)

        Raises
        ------
        OutputError
            If it can't be written; nothing is left of it.
        """
        path = self._shard(rank)
        with write_file(path) as file:
            for name, rows in (("out", out), ("lse", lse)):
                write_rows(create_dataset(file, name, rows.shape, rows.dtype), 0, rows)
            file.attrs.update(rank=rank, start=start, stop=start + len(out))
        name = path.relative_to(self.path.parent).as_posix()
        return Shard(name, start, start + len(out), path.stat().st_size, digest(path))

    def publish(self, shards: Iterable[Shard], shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
                record: Mapping[str, Any]) -> None:
        """Write OUT.h5 over the shards; from here on the result exists. One rank, when all shards are written.

        Parameters
        ----------
        shards : iterable of Shard
        shapes : mapping
            Shape and dtype of `out` and of `lse` as a whole.
        record : mapping
            How the result was made; plain values.

        Raises
        ------
        OutputError
            If it can't be written, or a shard is gone.
        """
        shards = list(shards)
        for shard in shards:
            file = self.path.parent / shard.file
            if not file.is_file() or file.stat().st_size != shard.size:
                raise OutputError(f"{self.path}: not written: shard {shard.file} is gone; did something remove it?")
        manifest = json.dumps({
            "shards": [asdict(shard) for shard in shards], "shapes": {n: s for n, (s, _) in shapes.items()},
            "dtypes": {n: str(d) for n, (_, d) in shapes.items()}, "record": record}).encode()
        with suppress(ShardError):             # none yet, or not one of ours
            self._replaced = read_manifest(self.path)
        with write_file(self.path, self.force) as file:
            for name, (shape, dtype) in shapes.items():
                _create_view(file, name, shape, dtype, shards)
            file["manifest"] = np.bytes_(manifest)
            file.attrs["manifest_sha256"] = hashlib.sha256(manifest).hexdigest()
            _set_attributes(file, record)

    def clear_replaced(self) -> None:
        """Remove the shards of the OUT.h5 that was replaced. The rank that published, when all know of it."""
        for shard in self._replaced.shards if self._replaced else ():
            file = self.path.parent / shard.file
            if file.parent.parent == self.folder.parent:      # and not of an output that was renamed
                with suppress(OSError):
                    file.unlink()
                    file.parent.rmdir()

    def discard(self, rank: int) -> None:
        """Take away what this rank wrote, and the folders if they are empty. Each rank, if nobody published."""
        with suppress(OSError):
            self._shard(rank).unlink(missing_ok=True)
        for folder in (self.folder, self.folder.parent):
            with suppress(OSError):           # not empty, or another rank was quicker
                folder.rmdir()

    def _shard(self, rank: int) -> Path:
        return self.folder / f"{rank:05d}.h5"


def digest(path: Path) -> str:
    """SHA-256 of a file, as ``sha256sum`` prints it. Local."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of an OUT.h5. Local.

    Raises
    ------
    ShardError
        If the file is missing, damaged, not finished or not one of ours, or names shards outside its folder.
    """
    real = Path(path).resolve()
    with open_file(real) as file, reading(real):
        if "manifest" not in file or "manifest_sha256" not in file.attrs:
            raise ShardError(f"{path}: has no manifest: expected the output of `ringmpi attend`")
        text = bytes(file["manifest"][()])
        expected, complete = file.attrs["manifest_sha256"], file.attrs.get("complete", False)
    if not complete or hashlib.sha256(text).hexdigest() != expected:
        raise ShardError(f"{path}: its manifest is damaged")
    try:
        content = json.loads(text)
        manifest = Manifest(real, tuple(Shard(**shard) for shard in content["shards"]),
                            {name: tuple(shape) for name, shape in content["shapes"].items()},
                            dict(content["dtypes"]), dict(content["record"]))
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{path}: its manifest makes no sense: {error}") from None
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError unless shards lie where ours lie and tile the rows."""
    at = 0
    for shard in manifest.shards:
        parts = shard.file.split("/")
        if len(parts) != 3 or not parts[0].endswith(".shards") or not set(parts).isdisjoint({"", ".", ".."}):
            raise ValueError(f"shard {shard.file!r} is outside the folder of shards")
        if shard.start != at or not isinstance(shard.stop, int) or shard.stop < at or not isinstance(shard.size, int):
            raise ValueError(f"shard {shard.file!r} does not begin at row {at}")
        at = shard.stop
    for name in ("out", "lse"):
        if manifest.dtypes[name] not in DTYPES or manifest.shapes[name][0] != at:
            raise ValueError(f"{name} has no {at} rows of a known dtype")
    if manifest.dtypes["lse"] not in ("float32", "float64") or not isinstance(manifest.record.get("options", {}), dict):
        raise ValueError("lse is no accumulator, or the options are no table")


def verify(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of an OUT.h5 and check every byte of every shard against it. Local.

    Raises
    ------
    ShardError
        If a shard is missing, has another size or another digest, or is a link to elsewhere.
    """
    manifest = read_manifest(path)
    folder = manifest.path.parent
    for shard in manifest.shards:
        file = folder / shard.file
        rows = f"(rows {shard.start}..{shard.stop})"
        if not file.is_file():
            raise ShardError(f"{path}: shard {shard.file} {rows} is missing")
        if file.resolve() != file:
            raise ShardError(f"{path}: refused: shard {shard.file} {rows} is a link to {file.resolve()}")
        if file.stat().st_size != shard.size or digest(file) != shard.sha256:
            raise ShardError(f"{path}: shard {shard.file} {rows} is damaged: it is not what was written")
    return manifest


def merge(path: str | os.PathLike[str], single: str | os.PathLike[str], force: bool = False) -> None:
    """Copy a sharded output, checked, into one plain file. Local.

    Raises
    ------
    ShardError
        If a shard is missing or damaged.
    OutputError
        If `single` exists and not `force`, or can't be written.
    """
    manifest = verify(path)
    folder = manifest.path.parent
    if Path(single).resolve() in {manifest.path, *(folder / shard.file for shard in manifest.shards)}:
        raise OutputError(f"{single}: expected another file than those to merge")
    with write_file(Path(single), force) as file:
        for name in ("out", "lse"):
            shape, dtype = manifest.shapes[name], DTYPES[manifest.dtypes[name]]
            target = create_dataset(file, name, shape, dtype)
            for start, stop in row_pieces(shape, dtype):
                write_rows(target, start, manifest.rows(name, start, stop))
        _set_attributes(file, manifest.record)


def _create_view(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any],
                 shards: Iterable[Shard]) -> None:
    """Make a virtual dataset; by the low-level interface, as the high-level one can't say bfloat16."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    space = h5py.h5s.create_simple(shape)
    filled = [shard for shard in shards if shard.stop > shard.start]
    for shard in filled:
        rows = (shard.stop - shard.start, *shape[1:])
        space.select_hyperslab((shard.start, *[0] * (len(shape) - 1)), rows)
        properties.set_virtual(space, shard.file.encode(), name.encode(), h5py.h5s.create_simple(rows))
    if filled:
        properties.set_fill_value(np.array(np.nan, np.float32))
    space.select_all()
    h5py.h5d.create(file.id, name.encode(), file_type(dtype), space, properties)


def _set_attributes(file: h5py.File, record: Mapping[str, Any]) -> None:
    for name, value in record.items():
        file.attrs[name] = value if isinstance(value, (str, int, float)) else json.dumps(value)
