"""What a rank wishes for while it computes: to leave, or that a checkpoint be written, now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ..errors import OutputError
from ..schedules.waits import LEAVE, PAUSE

LOGGER = logging.getLogger("ringmpi.checkpoint")
Stop = Callable[[], object]


class Watch:
    """Asks whether to stop, and watches the clock; see `Wishes`.

    Parameters
    ----------
    stop : callable, optional
        Asked on this rank whether to stop, until it says so.
    every : float, optional
        Seconds between checkpoints.
    save : callable
        Writes a checkpoint, of what `pause` is given; collective.
    speaks : bool
        Whether this rank tells of one that could not be written.
    """

    def __init__(self, stop: Stop | None, every: float | None, save: Callable[..., None], speaks: bool) -> None:
        self._stop = stop
        self._every = every
        self._save = save
        self._speaks = speaks
        self._stops = False
        self._last = time.monotonic()

    def stop(self) -> bool:
        """Say whether to leave, at once. Local."""
        if not self._stops and self._stop is not None:
            self._stops = bool(self._stop())
        return self._stops

    def after_step(self) -> int:
        """Say what to do after a step: `LEAVE`, `PAUSE` or 0. Local."""
        if self.stop():
            return LEAVE
        return PAUSE if self._every is not None and time.monotonic() - self._last >= self._every else 0

    def pause(self, *done: Any) -> None:
        """Write a checkpoint of what has been done, if it can be written. Collective over *comm*."""
        try:
            self._save(*done)
        except OutputError as error:               # the run is worth more than one checkpoint of it
            if self._speaks:                       # not a warning, which may be an error of this rank alone
                LOGGER.warning("%s; no checkpoint was written, the last one is as it was", error)
        self._last = time.monotonic()
