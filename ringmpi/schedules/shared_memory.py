"""Memory of a rank that the other ranks of its node read and write where it is.

It has no name in any file system, so none is left behind however a process ends: others open it through /proc, by the
process and the file descriptor of its owner. The system takes it back when nobody has it open or mapped any more.
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

HANDLE_SHAPE = (5,)                     # process, file descriptor, device, inode, bytes
PAGE = mmap.PAGESIZE

Bytes = NDArray[np.uint8]
Handle = NDArray[np.uint64]


class Segment:
    """Shared memory of this rank, which only grows. Local.

    Attributes
    ----------
    memory : uint8 array
        All of it.

    Raises
    ------
    OSError
        If there can be none.
    """

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memfd_create, as Linux has")
        self._file = os.memfd_create("ringmpi")
        weakref.finalize(self, os.close, self._file).atexit = False
        self.memory: Bytes = np.empty(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        """Grow to so many bytes, unless it is as large. Local."""
        nbytes = -(-max(nbytes, 1) // PAGE) * PAGE
        if self.memory.nbytes < nbytes:
            os.ftruncate(self._file, nbytes)
            self.memory = _mapped(self._file, nbytes)

    def handle(self) -> Handle:
        """Give what others open it by. Local."""
        status = os.fstat(self._file)
        return np.array([os.getpid(), self._file, status.st_dev, status.st_ino, self.memory.nbytes], np.uint64)


class Windows:
    """The segments of other ranks, mapped into this process; one of each is kept. Local."""

    def __init__(self) -> None:
        self._mapped: dict[int, tuple[list[int], Bytes]] = {}

    def keep(self, owners: list[int]) -> None:
        """Let go of the segments of all but some ranks. Local."""
        self._mapped = {owner: kept for owner, kept in self._mapped.items() if owner in owners}

    def memory(self, owner: int, handle: Handle) -> Bytes:
        """Give the segment of a rank, by its handle. Local.

        Raises
        ------
        OSError
            If it can't be opened, or what is there is something else: the rank is in another container, say.
        """
        wanted: list[int] = handle.tolist()
        kept, memory = self._mapped.get(owner, ([], np.empty(0, np.uint8)))
        if kept != wanted:
            self._mapped.pop(owner, None)
            memory = _opened(wanted)
            self._mapped[owner] = wanted, memory
        return memory


class LockedMemory:
    """Page-locked segments of this rank and of others of its node, for the copies of a GPU. Local.

    To lock pages takes longer than to copy into them, so they are kept for the life of the process, as CuPy keeps
    other memory that is page-locked.

    Parameters
    ----------
    device : Device
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._free: list[Segment] = []
        self._mapped: dict[tuple[int, ...], Bytes] = {}

    @classmethod
    def of(cls, device: Any) -> LockedMemory:
        """Give that of a GPU. Local."""
        if cls not in device.cache:
            device.cache[cls] = cls(device)
        memory: LockedMemory = device.cache[cls]
        return memory

    def take(self, nbytes: int) -> Segment:
        """Take a segment of so many bytes at least, to be given back when no GPU reads or writes it. Local.

        Raises
        ------
        OSError, BackendError
            If there is no memory to share, or it can't be page-locked.
        """
        segment = self._free.pop() if self._free else Segment()
        before = segment.memory.nbytes
        segment.reserve(nbytes)
        if segment.memory.nbytes > before:
            self._device.lock_pages(segment.memory)
        return segment

    def give_back(self, segment: Segment) -> None:
        """Let a segment be taken again. Local."""
        self._free.append(segment)

    def there(self, handle: Handle) -> Bytes:
        """Give the segment of another rank, by its handle. Local.

        Raises
        ------
        OSError, BackendError
            If it can't be opened or page-locked.
        """
        *owner, nbytes = handle.tolist()
        memory = self._mapped.get(tuple(owner))
        if memory is None or memory.nbytes != nbytes:
            self._mapped.pop(tuple(owner), None)
            memory = None                      # the old one goes first
            memory = _opened([*owner, nbytes])
            self._device.lock_pages(memory)
            self._mapped[tuple(owner)] = memory
        return memory


def _opened(handle: list[int]) -> Bytes:
    process, number, device, inode, nbytes = handle
    file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    try:
        status = os.fstat(file)
        if (status.st_dev, status.st_ino) != (device, inode):
            raise OSError(f"/proc/{process}/fd/{number} is not its memory; is it in another container?")
        return _mapped(file, nbytes)
    finally:
        os.close(file)


def _mapped(file: int, nbytes: int) -> Bytes:
    return np.frombuffer(mmap.mmap(file, nbytes), np.uint8)
