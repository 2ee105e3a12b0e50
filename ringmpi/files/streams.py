"""Output that is no file of its own: standard output, devices and pipes. Each of its errors is heard."""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .paths import writing

STANDARD_OUTPUT = Path("-")
PIPE_SECONDS = 30.0            # that the reader of a pipe may let it stand full


class _CheckedStream:
    """A text stream whose errors are `OutputError`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with writing("standard output"):
            return int(self._stream.write(text))

    def flush(self) -> None:
        with writing("standard output"):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_output() -> Iterator[None]:
    """Raise `OutputError` if what a block prints can't reach standard output: a full disk, say. Local."""
    stream = sys.stdout
    try:
        with redirect_stdout(_CheckedStream(stream)):
            yield
            sys.stdout.flush()
    except OutputError:
        _drop_buffer(stream)
        raise


def _drop_buffer(stream: Any) -> None:
    """Let what a stream still holds go nowhere, or the interpreter tries again when it ends, and fails."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()


def is_stream(path: Path) -> bool:
    """Say whether `path` leads to a device, pipe or socket. Local."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_to_stream(path: Path, data: bytes) -> None:
    """Write into a device or pipe; a pipe that nobody reads is an error, not a wait for ever. Local.

    Raises
    ------
    OutputError
        If it can't be written, or nobody reads the pipe.
    """
    with writing(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            raise OutputError(f"{path}: can't be written: nobody has this pipe open to read") from error
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write to a descriptor that does not block; give up when nothing has moved for `PIPE_SECONDS`."""
    rest = memoryview(data)
    deadline = time.monotonic() + PIPE_SECONDS
    while rest:
        with suppress(BlockingIOError):
            rest = rest[os.write(descriptor, rest):]
            deadline = time.monotonic() + PIPE_SECONDS
            continue
        if not select.select([], [descriptor], [], max(0.0, deadline - time.monotonic()))[1]:
            raise TimeoutError(f"nobody read from it for {PIPE_SECONDS:g} s")
