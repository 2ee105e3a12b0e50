"""What interrupted runs have left beside an output: folders of shards that no output shows, and temporary files."""

from __future__ import annotations

import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py

from ..errors import OutputError, ShardError
from .manifest import read_manifest
from .opening import open_file, reading
from .paths import writing

RUN = re.compile(r"[0-9a-f]{12}")                                       # as `job.attend` names its folder
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")                      # as `new_file` names files in the making
SHARD = re.compile(r"[0-9]{5,}\.h5|\.[0-9]{5,}\.h5\.[0-9a-f]{12}\.tmp")      # as `shards` and `new_file` name files


@dataclass(frozen=True)
class Leftover:
    """A folder of shards, or a file under a temporary name, that belongs to no output.

    Attributes
    ----------
    path : path
    files : tuple of path
        In it, or itself.
    nbytes : int
        Of them.
    idle : float
        Seconds since something was last written there.
    """

    path: Path
    files: tuple[Path, ...]
    nbytes: int
    idle: float

    def remove(self) -> None:
        """Remove it. Local.

        Raises
        ------
        OutputError
            If the system does not let us; what was removed before is gone.
        """
        with writing(self.path):
            for file in self.files:
                file.unlink(missing_ok=True)
            if self.path not in self.files:
                self.path.rmdir()


def find_leftovers(path: Path) -> list[Leftover]:
    """Find what runs that did not end well left beside an output, which may be there or not. Local.

    Folders in which something lies that a run does not write are none of them, nor is what an output of another name in
    the same folder shows: an OUT.h5 that was renamed still has its shards in ``OUT.h5.shards``. Where some shards of a
    folder are shown, as of a job that streamed, was killed and gone on with, the others are leftovers.

    Parameters
    ----------
    path : path
        Of OUT.h5.

    Raises
    ------
    ShardError
        If a file beside it can't be read, so that nobody knows what it shows.
    OutputError
        If its folder can't be read.
    """
    shards = path.parent / f"{path.name}.shards"
    found = []
    with writing(path.parent):
        if shards.is_symlink():
            raise OutputError(f"{shards}: refused: a symbolic link; shards lie beside {path.name}")
        shown = _shown(path) if shards.is_dir() else set()
        for folder in sorted(shards.iterdir()) if shards.is_dir() else ():
            if RUN.fullmatch(folder.name) and not folder.is_symlink() and folder.is_dir():
                files = sorted(folder.iterdir())
                ours = [file for file in files if SHARD.fullmatch(file.name) and _is_plain(file)]
                left = [file for file in ours if (folder.name, file.name) not in shown]
                if len(left) == len(files):
                    found.append(_leftover(folder, tuple(files)))
                elif len(left) < len(ours):   # a job that streamed was killed here, and one after it went on
                    found += [_leftover(file, (file,)) for file in left]
        temporary = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.tmp")
        found += [_leftover(file, (file,)) for file in sorted(path.parent.iterdir())
                  if temporary.fullmatch(file.name) and _is_plain(file)]
    return found


def remove_empty(path: Path) -> None:
    """Remove the folder of an output's shards if nothing is in it. Local."""
    with suppress(OSError):                   # there is none, or it holds a run
        (path.parent / f"{path.name}.shards").rmdir()


def _shown(path: Path) -> set[tuple[str, str]]:
    """Give the files in ``OUT.h5.shards`` that outputs beside it show, each by its folder's name and its own."""
    names = set()
    for file in sorted(path.parent.iterdir()):
        named_so = file.name == path.name or file.suffix == path.suffix != ""
        if TEMPORARY.fullmatch(file.name) or not file.is_file() or not (named_so or h5py.is_hdf5(file)):
            continue
        if _has_manifest(file):
            manifest = read_manifest(file)
            if manifest.path.parent == Path(os.path.realpath(path.parent)):      # else it shows what lies elsewhere
                parts = [shard.file.split("/") for shard in manifest.shards]
                names |= {(run, file) for folder, run, file in parts if folder == f"{path.name}.shards"}
    return names


def _has_manifest(file: Path) -> bool:
    """Say whether a file is an output of `ringmpi attend`, whole or damaged; one that can't be read may be one."""
    try:
        with open_file(file) as opened, reading(file):
            return "manifest" in opened or "manifest_sha256" in opened.attrs
    except ShardError as error:
        raise ShardError(f"{error}; nothing was removed, as it may be an output, whose shards nobody knows") from error


def _is_plain(file: Path) -> bool:
    return stat.S_ISREG(file.lstat().st_mode)


def _leftover(path: Path, files: tuple[Path, ...]) -> Leftover:
    states = [file.lstat() for file in (*files, path)]
    return Leftover(path, files, sum(state.st_size for state in states[:-1]),
                    time.time() - max(state.st_mtime for state in states))
