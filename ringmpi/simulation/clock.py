"""When each rank begins a step, and what it has done until then."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from .wires import Numbers


@dataclass
class Clock:
    """The state of all ranks: arrays of shape (groups, keys), times in seconds, sizes in bytes. Local.

    Attributes
    ----------
    now : array
        When the step begins.
    heard : array
        When the queries of other ranks are there.
    compute, copied, wait, carried, sent : arrays
        Seconds computing; seconds that its cores copy what comes; seconds waiting for blocks, and for others to take
        them; seconds that blocks were on their way here; bytes sent.
    """

    now: Numbers
    heard: Numbers
    compute: Numbers
    copied: Numbers
    wait: Numbers
    carried: Numbers
    sent: Numbers

    @classmethod
    def begin(cls, now: Numbers, heard: Numbers) -> Clock:
        """Begin then. Local."""
        return cls(now.copy(), heard, *(np.zeros(now.shape) for _ in range(5)))

    def copy(self) -> Clock:
        """Give a copy that does not go on."""
        return Clock(*(getattr(self, x.name).copy() for x in fields(self)))

    def compute_for(self, seconds: Numbers) -> None:
        """Compute for so long. Local."""
        self.compute += seconds
        self.now = self.now + seconds

    def copy_for(self, seconds: Numbers) -> None:
        """Copy for so long, and not compute. Local."""
        self.copied += seconds
        self.now = self.now + seconds

    def wait_until(self, *moments: Numbers) -> None:
        """Wait until all of that has come about. Local."""
        until = np.maximum.reduce([self.now, *moments])
        self.wait += until - self.now
        self.now = until

    def go_on(self, half: Clock, steps: int, more: int) -> None:
        """Go on for some more steps as in the last ones. Local.

        Parameters
        ----------
        half : Clock
            Before those.
        steps : int
            How many they were.
        more : int
        """
        self.now = self.now + (self.now.max() - half.now.max()) / steps * more
        for name in ("compute", "copied", "wait", "carried", "sent"):
            now = getattr(self, name)
            setattr(self, name, now + (now - getattr(half, name)) / steps * more)
