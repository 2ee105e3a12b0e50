"""HDF5 files opened to read, with errors that say what is wrong with them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import h5py

from ..errors import RingError, ShardError
from ..phases import phase
from .paths import as_path, file_kind

H5PY_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError)      # its ways to say: damaged
LOCKED = {errno.EAGAIN, errno.EWOULDBLOCK}


def explain(error: Exception) -> str:
    """Say why h5py or the system could not read a file. Local."""
    code = getattr(error, "errno", None)
    if code in LOCKED:
        return "is locked: another program has it open to write; wait until that has closed it"
    if code:
        return (f"can't be read: {os.strerror(code)} (error {code} of the system: look at the permissions and the "
                f"storage first, the file may be whole)")
    return f"can't be read, it is truncated, damaged or no HDF5 file: {error}"


@contextmanager
def reading(path: Any) -> Iterator[None]:
    """Turn h5py's errors of a block that only reads into `ShardError`. Local."""
    try:
        yield
    except RingError:
        raise
    except H5PY_ERRORS as error:
        raise ShardError(f"{path}: {explain(error)}") from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise `ShardError` unless there is a regular file at `path`, or a link to one. Local."""
    if not isinstance(path, (str, os.PathLike)):          # an integer would be taken for an open file
        path = as_path(path)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: {explain(error)}") from error
    if not stat.S_ISREG(mode):
        raise ShardError(f"{path}: no such file: this is a {file_kind(mode)}")


@contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open an HDF5 file to read. Local.

    Raises
    ------
    ShardError
        If it is missing, locked, no HDF5 file, truncated or damaged.
    """
    check_regular(path)
    with phase(f"reading {path}"), _opened(path) as file:
        yield file


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    with reading(path):
        # By its real name: HDF5 looks for virtual sources beside the name that it was given.
        file = h5py.File(os.path.realpath(path), "r", locking="best-effort")
    try:
        yield file
    except BaseException:
        with suppress(*H5PY_ERRORS):
            file.close()
        raise
    with reading(path):
        file.close()
