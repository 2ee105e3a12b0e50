"""Sharded output: one file a rank, one file that shows them as a whole, and a manifest to check them by.

``OUT.h5`` holds virtual datasets `out` and `lse` over ``OUT.h5.shards/RUN/*.h5``, and a manifest with the size and
SHA-256 digest of each shard. It is written last: an interrupted run leaves no OUT.h5. HDF5 reads a missing source as
fill values without an error, so the fill value is NaN; this package's own readers go by the manifest, and check that
the view shows the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..environment import virtual_prefix
from ..errors import OutputError, ShardError
from . import single as single_file
from .axes import Axes, axes_of_results
from .dimensions import describe_results
from .hdf5 import OutputDataset, create_dataset, write_file, write_rows
from .item_types import file_type
from .manifest import Manifest, Shard, check_view, probe, read_manifest
from .opening import check_regular, open_file, reading
from .paths import check_writable, flush_to_disk, writing
from .rows import row_ranges
from .sealed import write_sealed
from .single import Range

Array = NDArray[Any]


class Output:
    """An ``OUT.h5`` in the making. Local; between its steps the job makes the ranks agree.

    Parameters
    ----------
    path : path
        Of OUT.h5.
    run : str
        A name for this run, the same on every rank and different from other runs': its shards lie in a folder of
        that name, so that no run touches those of another.
    force : bool
        Replace an OUT.h5 that exists.
    axes : Axes, optional
        Of `out`, and of `lse` without dim; by default (tokens, heads, dim).
    """

    def __init__(self, path: str | os.PathLike[str], run: str, force: bool, axes: Axes | None = None) -> None:
        self.path = Path(path)
        self.axes = axes or Axes()
        self.folder = folder_of_shards(self.path) / run
        self.force = force
        self._replaced: Manifest | None = None
        self._made: list[Path] = []           # what this rank has written, and nothing refers to
        self._shown: set[str] = set()         # what OUT.h5 shows, once it is there

    def prepare(self) -> None:
        """Check that output can be written, make this run's folder, and note what would be replaced. One rank.

        Raises
        ------
        OutputError
            If OUT.h5 exists and not `force`, is no regular file, or the folder can't be written.
        """
        check_writable(self.path, self.force)
        parent = self.folder.parent
        if parent.is_symlink():
            raise OutputError(f"{parent}: refused: a symbolic link; shards must lie beside {self.path.name}")
        try:
            with writing(self.folder):
                self._make_folder()
        except OutputError:
            with suppress(OSError):           # unless it holds other runs
                parent.rmdir()
            raise
        self._replaced = shown_by(self.path)

    def _make_folder(self, tries: int = 4) -> None:
        self.folder.parent.mkdir(exist_ok=True)
        try:
            self.folder.mkdir(exist_ok=True)
        except FileNotFoundError:             # another run has just removed the parent, which was empty
            if not tries:
                raise
            self._make_folder(tries - 1)

    def write(self, rank: int, start: int, out: Array, lse: Array) -> Shard:
        """Write this rank's shard: rows from `start`. Each rank.

        Parameters
        ----------
        out : array of shape (tokens, [batch,] heads, dim_v)
        lse : array of shape (tokens, [batch,] heads)

        Raises
        ------
        OutputError
            If it can't be written; nothing is left of it.
        """
        like = {name: (rows.shape[1:], rows.dtype) for name, rows in (("out", out), ("lse", lse))}
        with self.new_shard(rank, start, start + len(out), like) as shard:
            shard.write(0, out, lse)
        return shard.made

    @contextmanager
    def new_shard(self, number: int, start: int, stop: int, like: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
                  ) -> Iterator[NewShard]:
        """Write a shard in a block, some rows at a time; after the block it is there, and has a digest. Each rank.

        Parameters
        ----------
        number : int
            Its own in this run.
        start, stop : int
            Its rows.
        like : mapping
            Shape and dtype of a row of `out` and of `lse`.

        Raises
        ------
        OutputError
            If it can't be written; nothing is left of it.
        """
        path = self._shard(number)
        with writing(path):
            self._make_folder()               # again, if `ringmpi clean` took it, empty, for one that was left
        digests: list[str] = []
        with write_file(path, beside=lambda temporary: digests.append(digest(temporary))) as file:
            shard = NewShard({name: create_dataset(file, name, (stop - start, *shape), dtype, axes)
                              for (name, (shape, dtype)), axes in
                              zip(like.items(), axes_of_results(self.axes).values(), strict=True)})
            describe_results(file, self.axes)
            yield shard
            file.attrs.update(rank=number, start=start, stop=stop)
        self._made.append(path)
        name = path.relative_to(self.path.parent).as_posix()
        with writing(path):
            for folder in (self.folder, self.folder.parent):
                flush_to_disk(folder)
            size = path.stat().st_size
        shard.made = Shard(name, start, stop, size, digests[0])

    def keep(self, shards: Iterable[Shard] = ()) -> None:
        """Let what this rank has written stay when the output is discarded: a checkpoint refers to it. Each rank.

        Parameters
        ----------
        shards : iterable of Shard
            That are in use, of this run and of others: `ringmpi clean` takes none of a folder that was just touched.
        """
        self._made = []
        for folder in {(self.path.parent / shard.file).parent for shard in shards}:
            with suppress(OSError):
                os.utime(folder)

    def publish(self, shards: Iterable[Shard], shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
                record: Mapping[str, Any]) -> None:
        """Write OUT.h5 over the shards: then the result exists. One rank, when all shards are written.

        Parameters
        ----------
        shards : iterable of Shard
        shapes : mapping
            Shape, in memory, and dtype of `out` and of `lse` as a whole.
        record : mapping
            How the result was made; plain values.

        Raises
        ------
        OutputError
            If it can't be written, or a shard is gone.
        """
        shards = list(shards)
        self._check_shards(shards)
        self._shown = {shard.file for shard in shards}
        manifest = json.dumps({
            "shards": [asdict(shard) for shard in shards], "shapes": {n: s for n, (s, _) in shapes.items()},
            "dtypes": {n: str(d) for n, (_, d) in shapes.items()}, "axes": self.axes.names, "record": record}).encode()
        with write_file(self.path, self.force, check=_check_written) as file:
            for name, axes in axes_of_results(self.axes).items():
                _create_view(file, name, *shapes[name], axes, shards)
            describe_results(file, self.axes)
            write_sealed(file, "manifest", manifest)
            set_attributes(file, record)

    def _check_shards(self, shards: list[Shard]) -> None:
        for shard in shards:
            file = self.path.parent / shard.file
            with writing(self.path):
                if not file.is_file() or file.stat().st_size != shard.size:
                    raise OutputError(f"{self.path}: not written: shard {shard.file} is gone; did something remove it?")

    def is_published(self) -> bool:
        """Say whether OUT.h5 is there and shows the shards of this run. Local."""
        with suppress(Exception):             # none, another's, or a damaged one
            return all(shard.file.split("/")[1] == self.folder.name for shard in read_manifest(self.path).shards)
        return False

    def clear_replaced(self) -> None:
        """Remove the shards of the OUT.h5 that was replaced. The rank that published, when all ranks know that."""
        remove_shards(self.path, self._replaced, self._shown)
        with suppress(OSError):               # not empty, but where runs before this one had written all
            self.folder.rmdir()

    def discard(self) -> None:
        """Remove what this rank wrote, and the folders if they are empty. Each rank, if nobody published."""
        self._remove(self._made)

    def discard_of_all(self) -> None:
        """Remove what any rank wrote, and the folders. One rank, when the others do nothing more for this run."""
        with suppress(OSError):               # it is gone
            self._remove(self.folder.iterdir())

    def _remove(self, files: Iterable[Path]) -> None:
        for path in files:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for folder in (self.folder, self.folder.parent):
            with suppress(OSError):           # not empty, or another rank was quicker
                folder.rmdir()

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:05d}.h5"


class NewShard:
    """A shard in the making: see `Output.new_shard`.

    Attributes
    ----------
    made : Shard
        Once it is there.
    """

    made: Shard

    def __init__(self, datasets: Mapping[str, OutputDataset]) -> None:
        self._datasets = datasets

    def write(self, at: int, out: Array, lse: Array) -> None:
        """Write rows from the row `at` of this shard on. Local."""
        for name, rows in (("out", out), ("lse", lse)):
            write_rows(self._datasets[name], at, rows)


def shown_by(path: Path) -> Manifest | None:
    """Give the manifest of an OUT.h5 that may be replaced; None if it is no output of ours, or damaged. Local."""
    with suppress(Exception):
        return read_manifest(path)
    return None


def remove_shards(path: Path, replaced: Manifest | None, shown: Container[str] = ()) -> None:
    """Remove the shards that the file of that name showed before it was replaced, and does not now. Local."""
    for shard in replaced.shards if replaced else ():
        file = path.parent / shard.file
        # Others belong to an output that was renamed.
        if shard.file not in shown and file.parent.parent == folder_of_shards(path):
            with suppress(OSError):
                file.unlink()
                file.parent.rmdir()
    if replaced is not None:
        with suppress(OSError):               # it holds other runs
            folder_of_shards(path).rmdir()


def folder_of_shards(path: Path) -> Path:
    """Give the folder in which the shards of an OUT.h5 lie, each run's in one of its own. Local."""
    return path.parent / f"{path.name}.shards"


def digest(path: Path) -> str:
    """Give the SHA-256 digest of a file, as ``sha256sum`` prints it. Local.

    Raises
    ------
    ShardError
        If it can't be read.
    """
    with reading(path), path.open("rb") as file:
        sha256 = hashlib.sha256()
        while data := file.read(2**22):
            sha256.update(data)
    return sha256.hexdigest()


def verify(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of an OUT.h5, check every byte of every shard against it, and what OUT.h5 shows. Local.

    Raises
    ------
    ShardError
        If a shard is missing, has another size or another digest, or is a link to elsewhere; if `out` or `lse` of
        OUT.h5 are not the views of the shards that they should be.
    """
    manifest = read_manifest(path)
    if virtual_prefix() is not None:
        raise ShardError(f"{path}: refused: HDF5_VDS_PREFIX leads its views to other shards; unset it")
    probe(manifest.path)
    with open_file(manifest.path) as file:
        check_view(file, manifest)
    for shard in manifest.shards:
        verify_shard(path, manifest.path.parent, shard)
    return manifest


def verify_shard(path: str | os.PathLike[str], folder: Path, shard: Shard) -> None:
    """Check every byte of a shard. Local.

    Parameters
    ----------
    path : path
        Of what says that the shard is there, for errors.
    folder : path
        In which OUT.h5 lies or is to lie, with no symbolic link in it.
    shard : Shard
        One of those that `check_shards` has seen.

    Raises
    ------
    ShardError
        If it is missing, has another size or another digest, or is a link to elsewhere.
    """
    file = folder / shard.file
    rows = f"(rows {shard.start}..{shard.stop})"
    with reading(file):
        if not os.path.lexists(file):
            raise ShardError(f"{path}: shard {shard.file} {rows} is missing")
        if file.resolve() != file:
            raise ShardError(f"{path}: refused: shard {shard.file} {rows} is a link to {file.resolve()}")
        check_regular(file)
        if file.stat().st_size != shard.size or digest(file) != shard.sha256:
            raise ShardError(f"{path}: shard {shard.file} {rows} is damaged: it is not what was written")


def merge_shards(path: str | os.PathLike[str], single: str | os.PathLike[str], force: bool = False) -> None:
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
    if Path(os.path.realpath(single)) in {manifest.path, *(folder / shard.file for shard in manifest.shards)}:
        raise OutputError(f"{single}: expected another file than those to merge")
    digests = {}
    with write_file(Path(single), force) as file:
        for name, axes in axes_of_results(manifest.axes).items():
            shape = manifest.shapes[name]
            dtype = DTYPES[manifest.dtypes[name]]
            target = create_dataset(file, name, shape, dtype, axes)
            digests[name] = single_file.digest_rows(_copied(manifest, name, target))
        describe_results(file, manifest.axes)
        ranges = [Range(0, shape[0], **digests)]
        write_sealed(file, single_file.NAME, single_file.seal(ranges, manifest.axes, manifest.record))
        set_attributes(file, manifest.record)


def _copied(manifest: Manifest, name: str, target: OutputDataset) -> Iterator[Array]:
    """Copy the rows of `out` or `lse`, and give them, some at a time."""
    for start, stop in row_ranges(manifest.shapes[name], DTYPES[manifest.dtypes[name]]):
        rows = manifest.rows(name, start, stop)
        write_rows(target, start, rows)
        yield rows


def _check_written(path: Path) -> None:
    """Raise `ShardError` unless an OUT.h5, under its temporary name, has a sound manifest and shows its shards."""
    manifest = read_manifest(path)
    with open_file(path) as file:
        check_view(file, manifest)


def _create_view(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], axes: Axes,
                 shards: Iterable[Shard]) -> None:
    """Make a virtual dataset by the low-level interface: the high-level one has no bfloat16."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    space = h5py.h5s.create_simple(axes.shape_in_file(shape))
    filled = [shard for shard in shards if shard.stop > shard.start]
    for shard in filled:
        box = axes.shape_in_file((shard.stop - shard.start, *shape[1:]))
        space.select_hyperslab(tuple(axes.start_of(shard.start)), box)
        properties.set_virtual(space, os.fsencode(shard.file), name.encode(), h5py.h5s.create_simple(box))
    if filled:
        properties.set_fill_value(np.array(np.nan, np.float32))
    space.select_all()
    h5py.h5d.create(file.id, name.encode(), file_type(dtype), space, properties)


def set_attributes(file: h5py.File, record: Mapping[str, Any]) -> None:
    """Show the record to people who open the file; programs read it from the manifest. Local, or all ranks."""
    for name, value in record.items():
        text = value if isinstance(value, str) else json.dumps(value)
        plain = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
        file.attrs[name] = value if plain else text.encode(errors="backslashreplace").decode().replace("\0", "")
