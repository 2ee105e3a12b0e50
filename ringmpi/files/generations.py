"""Generations of a checkpoint in a folder: one is complete when its manifest has appeared, and only then is used.

``DIR/PROBLEM-00000003-RUN/`` holds a file of bytes for each rank and, last, ``manifest.json`` with the size and SHA-256
digest of each. A generation goes when a later one of the same problem is complete, so there is always one to go on
from; those of other problems stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import OutputError, RingError
from .new_file import new_file
from .paths import file_kind, flush_to_disk, writing
from .states import FORMAT, MANIFEST, MANIFEST_BYTES, pieces_of, reading_bytes, state_file

NAME = re.compile(r"([0-9a-f]{16})-([0-9]{8,15})-[0-9a-f]{12}")
TRIES = 5                      # to make a folder in one that another job removes, as it has become empty


def generations_of(folder: Path, problem: str = "") -> list[Path]:
    """Give the folders of all generations, or of those of a problem, complete or not, in their order. Local.

    Raises
    ------
    ShardError
        If `folder` can't be read.
    """
    with reading_bytes(folder):
        if not os.path.lexists(folder):
            return []
        found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.name.startswith(problem)
                 and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: (_number(path), path.name))


def newest(folder: Path, problem: str = "") -> Path | None:
    """Give the folder of the newest complete generation in a folder, of a problem or of any; None if there is none.

    Local.

    Raises
    ------
    ShardError
        If `folder` can't be read.
    """
    complete = [path for path in generations_of(folder, problem) if _is_complete(path)]
    return complete[-1] if complete else None


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
    def prepare(cls, folder: Path, problem: str, run: str) -> NewGeneration:
        """Make the folder of a generation after all that are there, and `folder` if need be. One rank.

        Parameters
        ----------
        folder : path
        problem : str
            What it is of: 16 digits of a digest, in hexadecimal.
        run : str
            12 such digits, which no other generation has.

        Raises
        ------
        OutputError
            If it can't be made.
        """
        check_folder(folder)
        with writing(folder):
            folder.mkdir(exist_ok=True)
            number = 1 + max(map(_number, generations_of(folder, problem)), default=0)
            made = folder / f"{problem}-{number:08d}-{run}"
            if not NAME.fullmatch(made.name):
                raise OutputError(f"{folder}: can't be written: the generation before it has the highest number that "
                                  "there is; remove it")
            _make(made)
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
        with new_file(self.path / state_file(rank)) as file:
            for view in pieces_of(arrays):
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
            If it can't be written, or a file of a rank is gone. When it is there nothing fails any more.
        """
        for rank, shard in enumerate(content["shards"]):
            path = self.path / state_file(rank)
            with writing(path):
                if not path.is_file() or path.stat().st_size != shard["size"]:
                    raise OutputError(f"{path}: is gone; did something remove it?")
        text = json.dumps({"format": FORMAT, **content}).encode()
        sealed = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
        if len(sealed) > MANIFEST_BYTES:
            raise OutputError(f"{self.path}: can't be written: the manifest would have {len(sealed):,} bytes, "
                              f"{MANIFEST_BYTES:,} at most")
        with new_file(self.path / MANIFEST) as file:
            file.write(sealed)
        with suppress(RingError):
            for path in generations_of(self.path.parent, self.path.name.partition("-")[0]):
                if _number(path) < _number(self.path):
                    remove(path)

    def discard(self, rank: int) -> None:
        """Remove what this rank wrote, and the folder if it is empty, unless it is complete. Each rank."""
        if _is_complete(self.path):
            return
        with suppress(OSError):
            (self.path / state_file(rank)).unlink(missing_ok=True)
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


def clear(folder: Path, problem: str) -> None:
    """Remove all generations of a problem, whole or not, and the folder if nothing is left in it. Local."""
    with suppress(RingError):
        for path in generations_of(folder, problem):
            remove(path)
    with suppress(OSError):                   # others are there, or something else
        folder.rmdir()


def _number(generation: Path) -> int:
    return int(generation.name.split("-")[1])


def _is_complete(generation: Path) -> bool:
    return os.path.lexists(generation / MANIFEST)


def _make(generation: Path) -> None:
    """Make the folder of a generation, and the one that it is in."""
    for left in reversed(range(TRIES)):
        generation.parent.mkdir(exist_ok=True)
        try:
            generation.mkdir()
        except FileNotFoundError:             # another job has just removed the parent, which was empty
            if not left:
                raise
        else:
            return
