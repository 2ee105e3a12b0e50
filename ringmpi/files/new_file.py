"""Files that appear under their name whole or not at all, and no error of the system that goes unheard.

Every result of this package is written through `new_file`: under a temporary name beside its own, flushed to disk,
and only then given its name. A device, a pipe or a symbolic link that has the name is never replaced.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .paths import check_writable, flush_to_disk, say_exists, writing

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class NewFile:
    """A file under a temporary name, open to read and write as HDF5 does it. Local.

    Writing never fails: the first error is kept, and `finish` raises it. HDF5 can't close a file that it can't write,
    forgets the error if that was in a cache, and dies when the process ends; so it is told that all is well, and closes
    a file that will be thrown away.

    Parameters
    ----------
    path : path
        The name it will have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = _temporary_name(path)
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
        with self._keep_error():
            while done < len(view) and (count := os.preadv(self._descriptor, [view[done:]], self._at + done)):
                done += count
        self._at += done
        return done

    def write(self, buffer: Any) -> int:
        """Write all of `buffer` here, or keep the error."""
        view = memoryview(buffer).cast("B")
        done = 0
        with self._keep_error():
            while done < len(view) and self.failure is None:
                done += os.pwrite(self._descriptor, view[done:], self._at + done)
        self._at += len(view)
        self._size = max(self._size, self._at)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size, to here if it is not given."""
        self._size = self._at if size is None else size
        with self._keep_error():
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
        with self._keep_error():
            if self._descriptor >= 0 and self.failure is None:
                os.fsync(self._descriptor)
        self._close()
        self.check()

    def appear(self, force: bool) -> None:
        """Give the file its name; `force` replaces a file of that name. Nothing fails after that.

        Without `force` a hard link takes the name: it replaces nothing on any file system, NFS included, however many
        processes try at once. Where there are no hard links, an empty file takes the name first. A network file system
        that has asked its server twice may report a failure that was none, so what has the name then decides.

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
            if not self.is_there():
                if isinstance(error, FileExistsError):
                    raise OutputError(say_exists(self.path)) from error
                raise
        self.remove()
        with suppress(Exception):         # the file is there, whether or not the system can flush its name
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
                if not self.is_there():
                    self.path.unlink()
                raise

    def is_there(self) -> bool:
        """Say whether the file has its name. Local."""
        try:
            return _identity(os.lstat(self.path)) == self._identity
        except OSError:
            return False

    def _close(self) -> None:
        descriptor = self._descriptor
        self._descriptor = -1
        with self._keep_error():
            if descriptor >= 0:
                os.close(descriptor)

    @contextmanager
    def _keep_error(self) -> Iterator[None]:
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


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all, as a cache needs it. Local.

    It is not flushed to disk: a crash of the system may leave it empty.

    Raises
    ------
    OSError
        If it can't be written; a file that had the name is still there.
    """
    temporary = _temporary_name(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_name(path: Path) -> Path:
    """Give a name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def not_what_was_written(path: Path) -> str:
    """Say that a file reads otherwise than it was written. Local."""
    return f"{path}: can't be written: what was read back is not what was written; is the storage sound?"
