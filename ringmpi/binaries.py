"""Compiled GPU kernels on disk, beside CuPy's: with a digest each; what is damaged is made anew, never loaded."""

from __future__ import annotations

import hashlib
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .environment import kernel_cache
from .errors import BackendError


def keep(binary: Path, name: str, content: bytes) -> None:
    """Write a binary, and beside it the name of the kernel in it, and a digest. Local."""
    _write(binary.with_suffix(".name"), f"{name}\n{hashlib.sha256(content).hexdigest()}".encode())
    _write(binary, content)


def kept_name(binary: Path) -> str | None:
    """Give the kernel's name in a file of the cache; None if it is not there, or damaged, which is removed. Local."""
    names = binary.with_suffix(".name")
    if not (binary.exists() and names.exists()):
        return None
    lowered, _, digest = names.read_bytes().decode(errors="replace").partition("\n")
    if hashlib.sha256(binary.read_bytes()).hexdigest() == digest:
        return lowered
    for path in (binary, names):
        path.unlink(missing_ok=True)
    warnings.warn(f"the kernel cache is damaged, a kernel is compiled anew: {binary} was removed", RuntimeWarning,
                  stacklevel=2)
    return None


@contextmanager
def usable_cache() -> Iterator[None]:
    """Say of an error of the file system which folder it is about.

    Raises
    ------
    BackendError
        In place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise BackendError(f"backend cuda: the kernel cache {kernel_cache()} can't be used: {error}; empty it, or set "
                           "CUPY_CACHE_DIR to a folder that can be read and written") from error


def _write(path: Path, content: bytes) -> None:
    """Write a file at once: other ranks may look for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{secrets.token_hex(8)}")
    temporary.write_bytes(content)
    temporary.replace(path)
