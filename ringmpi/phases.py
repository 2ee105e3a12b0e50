"""What this process is doing now: said where it begins, heard by whoever listens.

The command line listens: its watchdog can say where a process died, and its display what is going on. In a library
nobody does, and saying it costs next to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LOGGER = logging.getLogger("ringmpi.phase")
_DOING = ContextVar("doing", default="preparing")


@contextmanager
def phase(doing: str, limit: float | None = None) -> Iterator[None]:
    """Say what this process does within a block; after it, it does what it did before. Local.

    Parameters
    ----------
    doing : str
        Ends a sentence that begins with "rank 3 died while": ``"reading in.h5"``.
    limit : float, optional
        Seconds that it may take: for calls in which Python can't look at a clock or a signal, such as MPI_Init.
    """
    before = _DOING.get()
    _DOING.set(doing)
    LOGGER.debug("%s", doing, extra={"limit": limit})
    try:
        yield
    finally:
        _DOING.set(before)
        LOGGER.debug("%s", before)
