"""Some ranks of a communicator, in an order: those that a block goes round, or that share something."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..mpi.comm import Comm


@dataclass(frozen=True)
class Group:
    """Some ranks, seen from one of them. Members are numbered by their place in the order.

    Attributes
    ----------
    ranks : tuple of int
        In order: a block goes from each to the next, and from the last to the first.
    rank : int
        The one that this is seen from.
    """

    ranks: tuple[int, ...]
    rank: int

    @classmethod
    def everyone(cls, comm: Comm) -> Group:
        """Give the group of all ranks, in their order. Local."""
        return cls(tuple(range(comm.size)), comm.rank)

    @cached_property
    def index(self) -> int:
        """The number of this member."""
        return self.ranks.index(self.rank)

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.ranks)

    def upstream(self, hops: int) -> int:
        """Give the number of the member whose blocks come here in so many hops. Local."""
        return (self.index - hops) % self.size

    def downstream(self, hops: int) -> int:
        """Give the number of the member that this one's blocks reach in so many hops. Local."""
        return (self.index + hops) % self.size
