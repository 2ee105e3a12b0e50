"""Paths that output goes to: whether a file can be made there, and what the system's errors about it mean."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OptionError, OutputError, RingError

NAME_BYTES = 230               # of a file's name: file systems take 255 at most, and temporary names are longer
NO_FOLDER_FLUSH = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EISDIR, errno.EROFS}


@contextmanager
def writing(target: Path | str) -> Iterator[None]:
    """Turn the system's errors of a block that writes to `target` into `OutputError`. Local."""
    try:
        yield
    except RingError:
        raise
    except OSError as error:
        raise OutputError(f"{target}: can't be written: {error}") from error


def as_path(path: Any) -> Path:
    """Take what a caller says is the name of a file, or raise `OptionError`. Local."""
    if isinstance(path, (str, os.PathLike)):
        name = os.fspath(path)
        if isinstance(name, str) and name and "\0" not in name:
            return Path(name)
    raise OptionError(f"path: expected the name of a file, a str or a pathlib.Path, got {path!r}")


def check_writable(path: Path, force: bool) -> None:
    """Raise `OutputError` unless a file can be made at `path`; `force` allows to replace one. Local."""
    with writing(path):
        if path.is_dir():
            raise OutputError(f"{path}: expected a file name, got a folder")
        if path.is_symlink():
            raise OutputError(f"{path}: refused: a symbolic link to {os.readlink(path)}; give the name of a file")
        if os.path.lexists(path) and not path.is_file():
            raise OutputError(f"{path}: refused: a {file_kind(path.stat().st_mode)}, expected a regular file or none")
        if path.exists() and not force:
            raise OutputError(say_exists(path))
        if not path.parent.is_dir():
            raise OutputError(f"{path}: can't be written: no such folder: {path.parent}")
        if len(os.fsencode(path.name)) > NAME_BYTES:
            raise OutputError(f"{path}: expected a name of at most {NAME_BYTES} bytes")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: can't be written: no permission to write in {path.parent}")


def say_exists(path: Path) -> str:
    """Say that a file is in the way. Local."""
    return f"{path}: exists; choose another name or allow to replace it with --force"


def file_kind(mode: int) -> str:
    """Name what `st_mode` says a file is. Local."""
    names = {stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket",
             stat.S_IFDIR: "folder", stat.S_IFREG: "regular file"}
    return names.get(stat.S_IFMT(mode), "special file")


def flush_to_disk(path: Path) -> None:
    """Make the names in a folder durable (fsync), where its file system can. Local."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise
    finally:
        os.close(descriptor)
