"""Files that appear under their name whole or not at all, and no error of the system that goes unheard.

Every file of this package is written through `new_file`: under a temporary name beside its own, flushed to disk,
and only then given its name. What is there and no regular file (a device, a pipe, a symbolic link) is never replaced.
"""

from __future__ import annotations

import errno
import json
import os
import select
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError, RingError

NAME_BYTES = 230               # of a file's name: 255 is the most that file systems take, the temporary one is longer
PIPE_SECONDS = 30.0            # that the reader of a pipe may let it stand full
STANDARD_OUTPUT = Path("-")
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
NO_FOLDER_FLUSH = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EISDIR, errno.EROFS}


class NewFile:
    """A file under a temporary name, open to read and write as HDF5 does it. Local.

    It never fails while it is written: the first error is kept and `finish` raises it. HDF5 can't close a file that
    it can't write, forgets the error if that was in a cache, and dies when the process ends; so it is told that
    all is well, and closes what will be thrown away.

    Parameters
    ----------
    path : path
        The name it will have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        self.failure: OSError | None = None
        self._descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._identity = _identity(os.fstat(self._descriptor))
        self._at = 0
        self._size = 0

    def check(self) -> None:
        """Raise the first error so far, if there was one."""
        if self.failure is not None:
            raise OutputError(f"{self.path}: can't be written: {self.failure}") from self.failure

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, as in `io.RawIOBase`."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """Give the place."""
        return self._at

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes from here."""
        data = bytearray(size)
        return bytes(data[:self.readinto(data)])

    def readinto(self, buffer: Any) -> int:
        """Read what was written, from here on."""
        view = memoryview(buffer).cast("B")
        done = 0
        with self._noting():
            while done < len(view) and (count := os.preadv(self._descriptor, [view[done:]], self._at + done)):
                done += count
        self._at += done
        return done

    def write(self, buffer: Any) -> int:
        """Write all of `buffer` here, or keep the error."""
        view = memoryview(buffer).cast("B")
        done = 0
        with self._noting():
            while done < len(view) and self.failure is None:
                done += os.pwrite(self._descriptor, view[done:], self._at + done)
        self._at += len(view)
        self._size = max(self._size, self._at)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size, to here if it is not given."""
        self._size = self._at if size is None else size
        with self._noting():
            if self.failure is None:
                os.ftruncate(self._descriptor, self._size)
        return self._size

    def flush(self) -> None:
        """Nothing is buffered; `finish` flushes to disk."""

    def finish(self) -> None:
        """Flush to disk and close, once; raise what went wrong here or before.

        Raises
        ------
        OutputError
            If any byte could not be written.
        """
        with self._noting():
            if self._descriptor >= 0 and self.failure is None:
                os.fsync(self._descriptor)
        self._close()
        self.check()

    def appear(self, force: bool) -> None:
        """Give the file its name; `force` replaces a file of that name. Nothing fails after that.

        Without it the name is taken by a hard link, which replaces nothing on any file system, NFS included, however
        many do it at once; where there are none, an empty file takes the name first. A network file system may say
        that it failed when it did not, having asked twice: what is there then decides.

        Raises
        ------
        OutputError
            If something else has the name meanwhile, or it can't be given.
        """
        check_writable(self.path, force)
        try:
            if force:
                self.temporary.replace(self.path)
            else:
                self._take_name()
        except OSError as error:
            if not self._is_there():
                if isinstance(error, FileExistsError):
                    raise OutputError(_exists(self.path)) from error
                raise
        self.remove()
        with suppress(Exception):         # the file is there; whether its name is on disk, the system won't say
            flush_to_disk(self.path.parent)

    def remove(self) -> None:
        """Close, and take the temporary name away. Nothing fails."""
        with suppress(Exception):
            self._close()
        with suppress(Exception):
            self.temporary.unlink(missing_ok=True)

    def _take_name(self) -> None:
        try:
            os.link(self.temporary, self.path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            try:
                self.temporary.replace(self.path)
            except OSError:
                if not self._is_there():
                    self.path.unlink()
                raise

    def _is_there(self) -> bool:
        try:
            return _identity(os.lstat(self.path)) == self._identity
        except OSError:
            return False

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        with self._noting():
            if descriptor >= 0:
                os.close(descriptor)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error


@contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[NewFile]:
    """Write a file that appears under its name when the block ends without an error; else nothing is left. Local.

    Raises
    ------
    OutputError
        If `path` exists and not `force`, is no regular file, or can't be written.
    """
    check_writable(path, force)
    with writing(path):
        file = NewFile(path)
        try:
            yield file
            file.finish()
            file.appear(force)
        finally:
            file.remove()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors of a block that writes `path` into `OutputError`. Local."""
    try:
        yield
    except RingError:
        raise
    except OSError as error:
        name = "standard output" if path == STANDARD_OUTPUT else path
        raise OutputError(f"{name}: can't be written: {error}") from error


def check_writable(path: Path, force: bool) -> None:
    """Raise `OutputError` unless a file can be made at `path`; `force` allows to replace one. Local."""
    with writing(path):
        if path.is_dir():
            raise OutputError(f"{path}: expected a file name, got a folder")
        if path.is_symlink():
            raise OutputError(f"{path}: refused: a symbolic link to {os.readlink(path)}; give the name of a file")
        if os.path.lexists(path) and not path.is_file():
            raise OutputError(f"{path}: refused: a {kind(path.stat().st_mode)}, expected a regular file or none")
        if path.exists() and not force:
            raise OutputError(_exists(path))
        if not path.parent.is_dir():
            raise OutputError(f"{path}: can't be written: no such folder: {path.parent}")
        if len(os.fsencode(path.name)) > NAME_BYTES:
            raise OutputError(f"{path}: expected a name of at most {NAME_BYTES} bytes")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: can't be written: no permission to write in {path.parent}")


def _exists(path: Path) -> str:
    return f"{path}: exists; choose another name or allow to replace it with --force"


def kind(mode: int) -> str:
    """Name what `st_mode` says a file is. Local."""
    names = {stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket",
             stat.S_IFDIR: "folder", stat.S_IFREG: "regular file"}
    return names.get(stat.S_IFMT(mode), "special file")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


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


def check_record(path: Path) -> None:
    """Raise `OutputError` unless `write_json` can write to `path`. Local."""
    if path != STANDARD_OUTPUT and not _is_stream(path):
        check_writable(path, force=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON: ``-`` is standard output; devices and pipes are written into; a file appears whole. Local.

    Raises
    ------
    OutputError
        If it can't be written, or nobody reads the pipe.
    """
    data = (json.dumps(content, indent=1, default=str) + "\n").encode()
    if path == STANDARD_OUTPUT:
        with writing(path):
            sys.stdout.write(data.decode())
            sys.stdout.flush()
    elif _is_stream(path):
        with writing(path):
            _pour(path, data)
    else:
        with new_file(path, force=True) as file:
            file.write(data)
            file.finish()
            if file.temporary.read_bytes() != data:
                raise OutputError(not_what_was_written(path))


def not_what_was_written(path: Path) -> str:
    """Say that a file reads otherwise than it was written. Local."""
    return f"{path}: can't be written: what was read back is not what was written; is the storage sound?"


class _Printed:
    """A text stream whose errors are errors of output."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with writing(STANDARD_OUTPUT):
            return int(self._stream.write(text))

    def flush(self) -> None:
        with writing(STANDARD_OUTPUT):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_output() -> Iterator[None]:
    """Let what a block prints reach standard output, or end in an `OutputError`: to a full disk, say. Local."""
    stream = sys.stdout
    try:
        with redirect_stdout(_Printed(stream)):
            yield
            sys.stdout.flush()
    except OutputError:
        _give_up(stream)
        raise


def _give_up(stream: Any) -> None:
    """Let what a stream still holds go nowhere, or the interpreter tries again when it ends, and fails."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()


def _is_stream(path: Path) -> bool:
    """Say whether `path` leads to a device, pipe or socket."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _pour(path: Path, data: bytes) -> None:
    """Write into what is there; a pipe that nobody reads ends in an error, not in a wait for ever."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OutputError(f"{path}: can't be written: nobody has this pipe open to read") from error
    try:
        rest = memoryview(data)
        deadline = time.monotonic() + PIPE_SECONDS
        while rest:
            with suppress(BlockingIOError):
                rest = rest[os.write(descriptor, rest):]
                deadline = time.monotonic() + PIPE_SECONDS
                continue
            if not select.select([], [descriptor], [], max(0.0, deadline - time.monotonic()))[1]:
                raise TimeoutError(f"nobody read from it for {PIPE_SECONDS:g} s")
    finally:
        os.close(descriptor)
