"""Sharded output: one file a rank, one file that shows them as a whole, and the manifest that makes it true.

``OUT.h5`` holds virtual datasets `out` and `lse` over ``OUT.h5.shards/*.h5`` and a manifest with the size and
SHA-256 digest of each shard file. It is written last: an interrupted run leaves no OUT.h5. As HDF5 reads a
missing source as fill values without an error, the fill value is NaN, and this package's own readers trust
the manifest, never the bare view.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
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
    row_pieces,
    stored_dtype,
    write_file,
    write_rows,
)

Array = NDArray[Any]


@dataclass(frozen=True)
class Shard:
    """One line of the manifest: rows start..stop are in `file`, of `size` bytes with digest `sha256`."""

    file: str
    start: int
    stop: int
    size: int
    sha256: str


class Output:
    """An ``OUT.h5`` in the making. Local; the job agrees between the steps.

    Parameters
    ----------
    path : path
        Of OUT.h5.
    run : str
        A name for this run, the same on every rank and different from other runs': shards of a result that
        is being replaced stay whole until the new one is.
    force : bool
        Replace an OUT.h5 that exists.
    """

    def __init__(self, path: str | os.PathLike[str], run: str, force: bool) -> None:
        self.path = Path(path)
        self.folder = self.path.with_name(self.path.name + ".shards")
        self.run = run
        self.force = force

    def prepare(self) -> None:
        """Check that output can be written, make the folder, clear out what interrupted runs left. One rank.

        Raises
        ------
        OutputError
            If OUT.h5 exists and not `force`, or the folder can't be written.
        """
        check_writable(self.path, self.force)
        try:
            self.folder.mkdir(exist_ok=True)
            listed = {self.folder.parent / shard.file for shard in self._replaced()}
            for file in self.folder.glob("*.h5*"):
                if file not in listed:
                    file.unlink()
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
        path = self.folder / f"{self.run}-{rank:05d}.h5"
        with write_file(path) as file:
            for name, rows in (("out", out), ("lse", lse)):
                write_rows(create_dataset(file, name, rows.shape, rows.dtype), 0, rows)
            file.attrs.update(rank=rank, start=start, stop=start + len(out))
        return Shard(f"{self.folder.name}/{path.name}", start, start + len(out), path.stat().st_size, digest(path))

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
            If it can't be written.
        """
        shards = list(shards)
        replaced = self._replaced()
        manifest = json.dumps({"shards": [asdict(shard) for shard in shards], "record": record})
        with write_file(self.path, self.force) as file:
            for name, (shape, dtype) in shapes.items():
                _create_view(file, name, shape, dtype, shards)
            file["manifest"] = manifest
            file.attrs["manifest_sha256"] = hashlib.sha256(manifest.encode()).hexdigest()
            for name, value in record.items():
                file.attrs[name] = value if isinstance(value, (str, int, float)) else json.dumps(value)
        for shard in replaced:
            (self.path.parent / shard.file).unlink(missing_ok=True)

    def discard(self) -> None:
        """Take away what this run wrote; the folder too if nothing else is in it. Each rank, after a failure."""
        for file in self.folder.glob(f"*{self.run}-*"):
            file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _replaced(self) -> list[Shard]:
        """Shards of the OUT.h5 that is being replaced, as far as it can be read."""
        try:
            return read_manifest(self.path)[0]
        except ShardError:
            return []


def digest(path: Path) -> str:
    """SHA-256 of a file, as ``sha256sum`` prints it. Local."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def read_manifest(path: str | os.PathLike[str]) -> tuple[list[Shard], dict[str, Any]]:
    """Read the manifest of an OUT.h5: its shards, and the record of how it was made. Local.

    Raises
    ------
    ShardError
        If the file is missing, damaged, not finished or not one of ours.
    """
    with open_file(path) as file:
        try:
            text = file["manifest"][()].decode()
            expected = file.attrs["manifest_sha256"]
        except (KeyError, AttributeError, TypeError):
            raise ShardError(f"{path}: has no manifest: expected the output of `ringmpi attend`") from None
        if not file.attrs.get("complete", False) or hashlib.sha256(text.encode()).hexdigest() != expected:
            raise ShardError(f"{path}: its manifest is damaged")
    content = json.loads(text)
    return [Shard(**shard) for shard in content["shards"]], content["record"]


def verify(path: str | os.PathLike[str]) -> tuple[list[Shard], dict[str, Any]]:
    """Read the manifest of an OUT.h5 and check every byte of every shard against it. Local.

    Raises
    ------
    ShardError
        If a shard is missing, has another size or another digest, or lies outside the folder of OUT.h5.
    """
    shards, record = read_manifest(path)
    folder = Path(path).resolve().parent
    for shard in shards:
        file = folder / shard.file
        if not file.resolve().is_relative_to(folder):
            raise ShardError(f"{path}: refused: shard {shard.file} is outside its folder")
        if not file.is_file():
            raise ShardError(f"{path}: shard {shard.file} (rows {shard.start}..{shard.stop}) is missing")
        if file.stat().st_size != shard.size or digest(file) != shard.sha256:
            raise ShardError(f"{path}: shard {shard.file} (rows {shard.start}..{shard.stop}) is damaged: it is not "
                             "what was written")
    return shards, record


def merge(path: str | os.PathLike[str], single: str | os.PathLike[str], force: bool = False) -> None:
    """Copy a sharded output, checked, into one plain file. Local.

    Raises
    ------
    ShardError
        If a shard is missing or damaged.
    OutputError
        If `single` exists and not `force`, or can't be written.
    """
    shards, _ = verify(path)
    if Path(single).resolve() == Path(path).resolve():
        raise OutputError(f"{single}: expected another file than the one to merge")
    with open_file(path) as view, write_file(Path(single), force) as file:
        for name in ("out", "lse"):
            target = create_dataset(file, name, view[name].shape, stored_dtype(view[name]))
            for shard in shards:
                _copy_rows(Path(path).parent / shard.file, name, target, shard.start)
        for name, value in view.attrs.items():
            if name not in ("complete", "manifest_sha256"):
                file.attrs[name] = value


def _copy_rows(path: Path, name: str, target: h5py.Dataset, start: int) -> None:
    with open_file(path) as file:
        source = open_dataset(file, name)
        for at, stop in row_pieces(source.shape, stored_dtype(source)):
            write_rows(target, start + at, read_rows(source, at, stop))


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
