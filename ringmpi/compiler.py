"""Kernels compiled by NVRTC for an architecture by name, kept on disk beside CuPy's with a digest of each.

CuPy's own compiler takes an architecture by its number, which leaves out what sm_90a has. What is damaged on disk is
made anew, never loaded.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .environment import kernel_cache
from .errors import BackendError
from .files.new_file import replace_file


def binary_of(nvrtc: Any, path: Path, name: str, options: Sequence[str]) -> tuple[Path, str]:
    """Compile one kernel of a file of CUDA C++, unless the cache has it. Local.

    Parameters
    ----------
    nvrtc : module
        CuPy's interface to NVRTC.
    path : path
    name : str
        The kernel's name in C++, with its template arguments.
    options : sequence of str
        The first one names the architecture.

    Returns
    -------
    path
        Of the binary.
    str
        The kernel's name in it.

    Raises
    ------
    BackendError
        If it does not compile.
    """
    source = path.read_text()
    key = hashlib.sha256(repr(("digest", nvrtc.getVersion(), tuple(options), name, source)).encode()).hexdigest()
    binary = kernel_cache() / f"ringmpi-{key}.cubin"
    lowered = _kept_name(binary)
    if lowered is None:
        lowered, content = _compiled(nvrtc, source, path.name, name, options)
        _keep(binary, lowered, content)
    return binary, lowered


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


def _compiled(nvrtc: Any, source: str, file: str, name: str, options: Sequence[str]) -> tuple[str, bytes]:
    """Give the kernel's name in the binary, and the binary."""
    program = nvrtc.createProgram(source, file, (), ())
    try:
        nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, options)
        lowered = str(nvrtc.getLoweredName(program, name))
        return lowered, nvrtc.getCUBIN(program) + b"\0"            # the last byte, which CuPy leaves out
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise BackendError(f"{file}, {name}, {options[0]}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _keep(binary: Path, name: str, content: bytes) -> None:
    """Write a binary, and beside it the name of the kernel in it, and a digest."""
    binary.parent.mkdir(parents=True, exist_ok=True)
    replace_file(binary.with_suffix(".name"), f"{name}\n{hashlib.sha256(content).hexdigest()}".encode())
    replace_file(binary, content)


def _kept_name(binary: Path) -> str | None:
    """Give the kernel's name in a file of the cache; None if it is not there, or damaged, which is removed."""
    names = binary.with_suffix(".name")
    if not (binary.exists() and names.exists()):
        return None
    lowered, _, digest = names.read_bytes().decode(errors="replace").partition("\n")
    if hashlib.sha256(binary.read_bytes()).hexdigest() == digest:
        return lowered
    for path in (binary, names):
        path.unlink(missing_ok=True)
    warnings.warn(f"the kernel cache is damaged, a kernel is compiled anew: {binary} was removed", RuntimeWarning,
                  stacklevel=3)
    return None

