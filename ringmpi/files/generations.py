"""Generations of a checkpoint in a folder: one is complete when its manifest has appeared, and only then is used.

``DIR/00000003-RUN/`` holds a file of bytes for each rank and, last, ``manifest.json`` with the size and SHA-256 digest
of each. A generation goes when a later one of the same problem is complete, so there is always one to go on from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError, RingError, ShardError
from .new_file import new_file
from .paths import file_kind, flush_to_disk, writing

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**26
NAME = re.compile(r"([0-9]{8})-[0-9a-f]{12}")
PIECE_BYTES = 2**22            # that are written, read and digested at a time


@dataclass(frozen=True)
class Generation:
    """A complete generation.

    Attributes
    ----------
    path : path
        Its folder.
    content : dict
        What its manifest says, `shards` among it: of each rank's file the `size` and `sha256`.
    """

    path: Path
    content: dict[str, Any]

    def read(self, rank: int, arrays: Iterable[NDArray[Any]]) -> None:
        """Read the file of a rank, all of it and nothing more, into C-contiguous arrays. Local.

        Raises
        ------
        ShardError
            If it is missing, of another size than the arrays or the manifest, or damaged.
        """
        arrays = list(arrays)
        self._read(rank, _pieces(arrays), sum(x.nbytes for x in arrays))

    def verify(self, rank: int) -> None:
        """Check the file of a rank, all of it, with little memory. Local.

        Raises
        ------
        ShardError
            See `read`.
        """
        size = self._shard(rank)["size"]
        piece = memoryview(bytearray(min(size, PIECE_BYTES)))
        self._read(rank, (piece[:min(PIECE_BYTES, size - start)] for start in range(0, size, PIECE_BYTES)), size)

    def view(self, rank: int, size: int) -> NDArray[np.uint8]:
        """View the bytes of a rank's file, which are read as they are used and not checked. Local.

        Raises
        ------
        ShardError
            If it is missing, or has another size.
        """
        path = self.path / _name_of(rank)
        with _opened(path) as file:
            self._check_size(path, file, rank, size)
            return np.memmap(file, np.uint8, "r", shape=(size,))

    def _read(self, rank: int, pieces: Iterable[memoryview], size: int) -> None:
        """Fill pieces, one after the other, and check what was read."""
        path = self.path / _name_of(rank)
        sha256 = hashlib.sha256()
        with _opened(path) as file:
            self._check_size(path, file, rank, size)
            for view in pieces:
                at = 0
                while at < len(view):
                    count = file.readinto(view[at:])
                    if not count:
                        raise ShardError(f"{path}: ends before its {size:,} bytes")
                    at += count
                sha256.update(view)
        if sha256.hexdigest() != self._shard(rank)["sha256"]:
            raise ShardError(f"{path}: is damaged: it is not what was written")

    def _check_size(self, path: Path, file: FileIO, rank: int, size: int) -> None:
        there = os.fstat(file.fileno()).st_size
        if self._shard(rank)["size"] != size or there != size:
            raise ShardError(f"{path}: expected {size:,} bytes, got {there:,}")

    def _shard(self, rank: int) -> dict[str, Any]:
        shards: list[dict[str, Any]] = self.content["shards"]
        if rank >= len(shards):
            raise ShardError(f"{self.path}: has the states of {len(shards)} ranks, and none of rank {rank}")
        return shards[rank]


def newest(folder: Path) -> Generation | None:
    """Give the newest complete generation in a folder; None if there is none. Local.

    Raises
    ------
    ShardError
        If it is damaged, or of another version.
    """
    complete = [path for path in _generations(folder) if os.path.lexists(path / MANIFEST)]
    return _read(complete[-1]) if complete else None


def check_folder(folder: Path) -> None:
    """Raise `OutputError` unless generations can be made in a folder, which may yet have to be made. Local."""
    with writing(folder):
        if folder.is_symlink():
            raise OutputError(f"{folder}: refused: a symbolic link to {os.readlink(folder)}; give the folder")
        if os.path.lexists(folder) and not folder.is_dir():
            raise OutputError(f"{folder}: expected a folder, got a {file_kind(folder.stat().st_mode)}")
        there = folder if folder.is_dir() else folder.parent
        if not there.is_dir():
            raise OutputError(f"{folder}: can't be written: no such folder: {there}")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"{folder}: can't be written: no permission to write in {there}")


class NewGeneration:
    """A generation in the making. Local; between its steps the caller makes the ranks agree.

    Parameters
    ----------
    path : path
        Its folder, which `prepare` made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def prepare(cls, folder: Path, run: str) -> NewGeneration:
        """Make the folder of a generation after all that are there, and `folder` if need be. One rank.

        Raises
        ------
        OutputError
            If it can't be made.
        """
        check_folder(folder)
        with writing(folder):
            folder.mkdir(exist_ok=True)
            number = 1 + max((int(path.name[:8]) for path in _generations(folder)), default=0)
            made = folder / f"{number:08d}-{run}"
            made.mkdir()
            flush_to_disk(folder)
        return cls(made)

    def write(self, rank: int, arrays: Iterable[NDArray[Any]]) -> dict[str, Any]:
        """Write the file of a rank, and say its size and digest. Each rank.

        Raises
        ------
        OutputError
            If it can't be written; nothing is left of it.
        """
        sha256 = hashlib.sha256()
        size = 0
        with new_file(self.path / _name_of(rank)) as file:
            for view in _pieces(arrays):
                file.write(view)
                file.check()
                sha256.update(view)
                size += len(view)
        return {"size": size, "sha256": sha256.hexdigest()}

    def publish(self, content: Mapping[str, Any]) -> None:
        """Write the manifest: then the generation is complete, and earlier ones of the same problem go. One rank.

        Raises
        ------
        OutputError
            If it can't be written, or a file of a rank is gone.
        """
        for rank, shard in enumerate(content["shards"]):
            path = self.path / _name_of(rank)
            with writing(path):
                if not path.is_file() or path.stat().st_size != shard["size"]:
                    raise OutputError(f"{path}: is gone; did something remove it?")
        text = json.dumps({"format": FORMAT, **content}).encode()
        with new_file(self.path / MANIFEST) as file:
            file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        self._clear_earlier(content["problem"])

    def _clear_earlier(self, problem: Any) -> None:
        """Remove earlier generations, but for complete ones that are not of this problem."""
        for path in _generations(self.path.parent):
            if path.name[:8] >= self.path.name[:8]:
                continue
            with suppress(ShardError):        # a damaged one says nothing of its problem, and stays
                if not os.path.lexists(path / MANIFEST) or _read(path).content["problem"] == json.loads(
                        json.dumps(problem)):
                    remove(path)

    def discard(self, rank: int) -> None:
        """Remove what this rank wrote, and the folder if it is empty. Each rank, if nobody published."""
        with suppress(OSError):
            (self.path / _name_of(rank)).unlink(missing_ok=True)
        with suppress(OSError):               # not empty: another rank is yet to come
            self.path.rmdir()


def remove(path: Path) -> None:
    """Remove a generation, its manifest first, so that it is complete or none; what is not ours stays. Local."""
    with suppress(OSError):
        (path / MANIFEST).unlink(missing_ok=True)
        for file in path.iterdir():
            if re.fullmatch(r"\d{5,}\.state|\..*\.tmp", file.name):
                file.unlink()
        path.rmdir()


def _generations(folder: Path) -> list[Path]:
    """Give the folders of all generations, complete or not, in their order."""
    with _reading(folder):
        if not os.path.lexists(folder):
            return []
        names = sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))
    return [folder / name for name in names if not (folder / name).is_symlink()]


def _read(path: Path) -> Generation:
    """Read the manifest of a generation."""
    file = path / MANIFEST
    with _opened(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > MANIFEST_BYTES:
            raise ShardError(f"{file}: expected at most {MANIFEST_BYTES:,} bytes, got {size:,}")
        digest, _, text = opened.readall().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ShardError(f"{file}: is damaged: it is not what was written")
    try:
        content = json.loads(text)
        shards = content["shards"]
        right = content["format"] == FORMAT and all(
            isinstance(content[name], dict) for name in ("problem", "placement")) and all(
            type(shard["size"]) is int and shard["size"] >= 0 and isinstance(shard["sha256"], str) for shard in shards)
    except (KeyError, TypeError, ValueError, RecursionError):
        right = False
    if not right:
        raise ShardError(f"{file}: is of another version of ringmpi; begin anew, or go on with that version")
    return Generation(path, content)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the system's errors of a block that only reads into `ShardError`."""
    try:
        yield
    except RingError:
        raise
    except OSError as error:
        raise ShardError(f"{path}: can't be read: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """Open a regular file to read."""
    with _reading(path), FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise ShardError(f"{path}: expected a regular file, got a {file_kind(mode)}")
        yield file


def _name_of(rank: int) -> str:
    return f"{rank:05d}.state"


def _pieces(arrays: Iterable[NDArray[Any]]) -> Iterator[memoryview]:
    """View the bytes of arrays, some at a time."""
    for x in arrays:
        view = x.reshape(-1).view(np.uint8).data
        for start in range(0, len(view), PIECE_BYTES):
            yield view[start:start + PIECE_BYTES]
