"""What a simulation gives: seconds, and what each rank did with them."""

from __future__ import annotations

from dataclasses import dataclass

from .case import Case
from .wires import Numbers


@dataclass(frozen=True, eq=False)
class Outcome:
    """A pass as it was simulated; arrays of shape (groups, keys), as `Case.ranks`. Local.

    Attributes
    ----------
    case : Case
    ended : array
        When each rank is done.
    compute, copied, wait, carried : array
        Seconds that each computes, copies what comes, waits for others in the steps, and that blocks are on their way
        to it.
    sent : array
        Bytes that each sends: of blocks, and of all else.
    steps : int
        How many were simulated; the others were taken to be like them.
    """

    case: Case
    ended: Numbers
    compute: Numbers
    copied: Numbers
    wait: Numbers
    carried: Numbers
    sent: Numbers
    steps: int

    @property
    def seconds(self) -> float:
        """Of the slowest rank."""
        return float(self.ended.max())

    @property
    def hidden(self) -> float:
        """Share of the time that blocks are on their way to the rank with the slowest link in which ranks compute.

        1 if none travels. A rank with a fast link waits for the others.
        """
        carried = float(self.carried.max())
        return max(0.0, 1.0 - float((self.wait + self.copied).mean()) / carried) if carried else 1.0

    @property
    def busiest(self) -> int:
        """The rank that computes longest."""
        return int(self.case.ranks.flat[int(self.compute.argmax())])
