"""Telling polls that have moved data from idle ones, by the processor time that they took.

MPI does not say whether a poll has moved anything. But an idle poll takes next to nothing, and always about the same,
while one that copies 16 KiB, the least that MPICH moves at a time within a node, takes two or three times as much.
"""

from __future__ import annotations

import math

IDLE = 2e-5                       # processor seconds that a set of idle polls is taken to need until measured
MOVING = 1.75                     # sets that need this many times the processor time of idle ones have moved data
SLOWER = 3.0                      # how many times slower than ever before a machine is believed to have become
LATELY = 20_000                   # sets, of which some are idle in any transfer: a fraction of a second without a pause


class Movement:
    """What idle polls cost, by number of requests, learnt from the polls themselves. Local."""

    def __init__(self) -> None:
        self._idle: dict[int, float] = {}
        self._lately: dict[int, tuple[int, float]] = {}         # sets, and the seconds of the quickest

    def seen(self, count: int, seconds: float) -> bool:
        """Say whether a set of polls of so many requests that took so many processor seconds has moved data."""
        return seconds > MOVING * self._idle_seconds(count)

    def learn(self, count: int, seconds: float) -> None:
        """Take the quickest sets for idle ones.

        If no set has been as quick for long, it is the machine that is slower now: a wait in which nothing moves must
        not be taken for one that moves, and keep a core busy.
        """
        number, quickest = self._lately.get(count, (0, math.inf))
        number, quickest = number + 1, min(quickest, seconds)
        idle = self._idle_seconds(count)
        if number == LATELY:
            idle = max(idle, quickest) if quickest < SLOWER * idle else idle
            number, quickest = 0, math.inf
        self._lately[count] = number, quickest
        self._idle[count] = min(idle, seconds)

    def _idle_seconds(self, count: int) -> float:
        return self._idle.get(count) or IDLE * (1 + count / 8)
