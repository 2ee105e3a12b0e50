"""What this process is doing now: announced where it begins, heard by whoever listens.

The command line listens, so that its watchdog can say where a process died, and its display what is going on. In a
program that uses the library nobody does, and announcing a phase costs next to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LOGGER = logging.getLogger("ringmpi.phase")
_DOING = ContextVar("doing", default="preparing")


@contextmanager
def phase(doing: str, limit: float | None = None, whole: bool = False) -> Iterator[None]:
    """Announce what this process does within a block; after the block it does again what it did before. Local.

    Parameters
    ----------
    doing : str
        Completes a sentence that begins with "rank 3 died while": ``"reading in.h5"``.
    limit : float, optional
        Seconds that it may take, for calls in which Python sees neither a clock nor a signal, such as MPI_Init.
    whole : bool
        Let a signal wait for the end of the block, which other ranks take part in, and not end the process at once.
    """
    before = _DOING.get()
    _DOING.set(doing)
    LOGGER.debug("%s", doing, extra={"limit": limit, "whole": whole})
    try:
        yield
    finally:
        _DOING.set(before)
        LOGGER.debug("%s", before)


class Listener(logging.Handler):
    """Hears the phases of this process from `start` to `stop`.

    Parameters
    ----------
    hear : callable
        Gets what is done from now on, the seconds that it may take, None for no limit, and whether signals wait for it.
    """

    def __init__(self, hear: Callable[[str, float | None, bool], None]) -> None:
        super().__init__()
        self._hear = hear
        self._level = LOGGER.level

    def start(self) -> None:
        """Begin to listen. Local."""
        self._level = LOGGER.level
        LOGGER.addHandler(self)
        LOGGER.setLevel(logging.DEBUG)

    def stop(self) -> None:
        """Listen no more, and leave the logger as it was. Local."""
        LOGGER.removeHandler(self)
        LOGGER.setLevel(self._level)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on one phase."""
        self._hear(record.getMessage(), getattr(record, "limit", None), getattr(record, "whole", False))
