"""The files of a generation of a checkpoint: raw bytes of each rank, and a manifest of them, read with care.

Nothing that they say is used before it is checked, and what has another digest than it was written with is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RingError, ShardError
from .paths import file_kind

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**24         # 80,000 ranks
DIGEST = re.compile(r"[0-9a-f]{64}")
PIECE_BYTES = 2**22            # that are written, read and digested at a time
MOST = 2**62                   # tokens or bytes: a larger number is no size


@dataclass(frozen=True)
class Generation:
    """A complete generation.

    Attributes
    ----------
    path : path
        Its folder.
    content : dict
        What its manifest says, `shards` among it: of each rank's file the `size` and `sha256`. Of the rest it is known
        only that `problem` and `placement` are tables.
    digest : str
        Of the manifest.
    """

    path: Path
    content: dict[str, Any]
    digest: str

    def read(self, rank: int, arrays: Iterable[NDArray[Any]]) -> None:
        """Read the file of a rank, all of it and nothing more, into C-contiguous arrays. Local.

        Raises
        ------
        ShardError
            If it is missing, of another size than the arrays or the manifest, or damaged.
        """
        arrays = list(arrays)
        self._read(rank, pieces_of(arrays), sum(x.nbytes for x in arrays))

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
        path = self.path / state_file(rank)
        with _opened(path) as file:
            self._check_size(path, file, rank, size)
            return np.memmap(file, np.uint8, "r", shape=(size,))

    def _read(self, rank: int, pieces: Iterable[memoryview], size: int) -> None:
        """Fill pieces, one after the other, and check what was read."""
        path = self.path / state_file(rank)
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


def read_manifest(path: Path) -> Generation:
    """Read the manifest of a generation, and check what it says of its files. Local.

    Raises
    ------
    ShardError
        If it is missing, damaged, or of another version.
    """
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
        right = content["format"] == FORMAT and isinstance(shards, list) and all(
            isinstance(content[name], dict) for name in ("problem", "placement")) and all(
            are_counts([shard["size"]]) and DIGEST.fullmatch(shard["sha256"]) for shard in shards)
    except (KeyError, TypeError, ValueError, RecursionError):
        right = False
    if not right:
        raise ShardError(f"{file}: is of another version of ringmpi; begin anew, or go on with that version")
    return Generation(path, content, digest.decode())


def are_counts(values: Any) -> bool:
    """Say whether something that was read is a list of whole numbers that may count something. Local."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MOST for value in values)


@contextmanager
def reading_bytes(path: Path) -> Iterator[None]:
    """Turn the system's errors of a block that reads files of bytes, or folders, into `ShardError`."""
    try:
        yield
    except RingError:
        raise
    except OSError as error:
        raise ShardError(f"{path}: can't be read: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """Open a regular file to read."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW       # a link may lead anywhere
    with reading_bytes(path), FileIO(os.open(path, flags)) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise ShardError(f"{path}: expected a regular file, got a {file_kind(mode)}")
        yield file


def state_file(rank: int) -> str:
    """Give the name of a rank's file. Local."""
    return f"{rank:05d}.state"


def pieces_of(arrays: Iterable[NDArray[Any]]) -> Iterator[memoryview]:
    """View the bytes of arrays, some at a time."""
    for x in arrays:
        view = x.reshape(-1).view(np.uint8).data
        for start in range(0, len(view), PIECE_BYTES):
            yield view[start:start + PIECE_BYTES]
