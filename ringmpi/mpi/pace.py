"""The pace of one wait: how long it has lasted, what is due meanwhile, and how long to sleep between two polls."""

from __future__ import annotations

import os
import time

SPIN = 1e-4                       # seconds without movement after which a wait sleeps between polls ...
SHARE = 16                        # ... for a sixteenth of the time that nothing has moved, so that what another rank
                                  # copies in one poll of its own takes no longer than by that share ...
LONGEST_PAUSE = 2e-3              # ... and this long at most
NEXT = 1e-3                       # seconds without a pause in which the next of many messages, which GPUs copy, comes
STOPPED = 1.0                     # seconds between two polls from which on this process was stopped, not waiting
ASK_SECONDS = 5.0                 # after which a wait asks the other ranks where they are; then twice, four times it
LOG_SECONDS = 60.0                # after which a wait is logged; then twice, four times it


class Pace:
    """The pace of one wait. Local.

    Parameters
    ----------
    timeout : float
        Seconds that the wait may last.

    Attributes
    ----------
    start : float
        When it began, by `time.perf_counter`, later by the seconds in which this process was stopped.
    """

    __slots__ = ("_ask_at", "_log_at", "_moved", "_now", "_slept", "start")

    def __init__(self, timeout: float) -> None:
        self.start = self._now = self._moved = time.perf_counter()
        self._ask_at = min(ASK_SECONDS, timeout / 4)
        self._log_at = LOG_SECONDS
        self._slept = False

    def tick(self) -> float:
        """Give the seconds of the wait, without those in which this process, and others perhaps, was stopped."""
        now = time.perf_counter()
        if now - self._now > STOPPED:
            self.start += now - self._now
        self._now = now
        return now - self.start

    def is_time_to_ask(self, seconds: float) -> bool:
        """Say whether the other ranks are to be asked now where they are."""
        due = seconds > self._ask_at
        if due:
            self._ask_at *= 2
        return due

    def is_time_to_log(self, seconds: float) -> bool:
        """Say whether the wait is to be logged now."""
        due = seconds > self._log_at
        if due:
            self._log_at *= 2
        return due

    def expect_more(self) -> None:
        """Take note that a message of a transfer has come about, or its first one will: the next one comes soon."""
        self._moved = self._now + NEXT
        self._slept = False

    def rest(self, moving: bool) -> None:
        """Sleep if nothing has moved for a while; otherwise only yield the core."""
        if moving and not self._slept:        # right after a sleep polls are slow for want of a warm cache: look again
            self._moved = max(self._moved, self._now)
        pause = (self._now - self._moved - SPIN) / SHARE
        self._slept = pause > 0 and not (moving and self._slept)
        if self._slept:
            time.sleep(min(pause, LONGEST_PAUSE))
        else:
            os.sched_yield()
