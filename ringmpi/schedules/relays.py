"""Blocks that go down a tree of members, and sums that come up it: whose turn it is, and what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .base import Route
from .links import Peer, Transfer


@dataclass(frozen=True)
class Tree:
    """The members that a block reaches: its owner and all that need it, as a binomial tree. Local.

    Place i has the parent i with its lowest bit cleared, so below each place is a range of those that follow it. As
    members stand in the order of nodes, few of the hops lead from node to node.

    Attributes
    ----------
    members : list of int
        By place: the owner, and the others in the order of the group from there.
    """

    members: list[int]

    @classmethod
    def of(cls, route: Route, owner: int) -> Tree:
        """Give the tree of a member's block. Local."""
        size = len(route.needed)
        others = ((owner + hop) % size for hop in range(1, size))
        column = route.needed[:, owner].tolist()
        return cls([owner, *(member for member in others if column[member])])

    def has(self, member: int) -> bool:
        """Say whether a member takes part. Local."""
        return member in self.members

    def parent(self, member: int) -> int:
        """Give the member that this one, not the owner, gets the block from. Local."""
        place = self.members.index(member)
        return self.members[place & (place - 1)]

    def children(self, member: int) -> list[int]:
        """Give the members that get the block from this one, the one with the fewest below it first. Local."""
        count = len(self.members)
        place = self.members.index(member)
        reach = place & -place or count             # no child of a place is as far away as its parent
        hops = (1 << bit for bit in range(count.bit_length()))
        return [self.members[place + hop] for hop in hops if hop < reach and place + hop < count]


class Until:
    """Stands for another transfer, which is under way by itself, where it must be done first; see `InTurn`.

    Parameters
    ----------
    other : Transfer
    """

    def __init__(self, other: Transfer) -> None:
        self.requests: list[Any] = []
        self._other = other

    @property
    def peer(self) -> Peer:
        """The other end of the other transfer."""
        return self._other.peer

    def advance(self) -> bool:
        """Say whether the other is done. Local."""
        return self.done()

    def done(self) -> bool:
        """Say whether the other is done. Local."""
        return self._other.done()

    def waiting_for(self) -> str:
        """Say what the other waits for. Local."""
        return self._other.waiting_for()


class InTurn:
    """Transfers one after the other, as one: each is made and started when the one before it is done.

    Parameters
    ----------
    transfers : iterator of Transfer
        Gives at least one. What it does between two of them is done between them.
    """

    def __init__(self, transfers: Iterator[Transfer]) -> None:
        self._transfers = transfers
        self._now = next(transfers)
        self._done = False

    @property
    def peer(self) -> Peer:
        """The other end of the one whose turn it is."""
        return self._now.peer

    @property
    def requests(self) -> list[Any]:
        """The messages of the one whose turn it is."""
        return self._now.requests

    def advance(self) -> bool:
        """Do what has become possible; say whether all of it has come about. Local."""
        while not self._done:
            self._now.advance()
            if not self._now.done():
                return False
            following = next(self._transfers, None)
            if following is None:
                self._done = True
            else:
                self._now = following
        return True

    def done(self) -> bool:
        """Say whether all of it has come about. Local."""
        return self._done

    def waiting_for(self) -> str:
        """Say what of this rank it waits for; empty if it waits for the peer alone. Local."""
        return self._now.waiting_for()
