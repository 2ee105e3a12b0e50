"""What this process is doing now: said where it begins, heard by whoever listens.

The command line listens: its watchdog can say where a process died, and its display what is going on. In a library
nobody does, and saying it costs next to nothing.
"""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("ringmpi.phase")


def enter(doing: str, limit: float | None = None) -> None:
    """Say what this process does from now on. Local.

    Parameters
    ----------
    doing : str
        Ends a sentence that begins with "rank 3 died while": ``"reading in.h5"``.
    limit : float, optional
        Seconds that it may take: for calls in which Python can't look at a clock or a signal, as MPI_Init.
    """
    LOGGER.debug(doing, extra={"limit": limit})
