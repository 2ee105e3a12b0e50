"""What all that moves bytes between ranks has in common: links, waits that say for whom, a way out after an error."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from ..mpi.comm import Comm
from .group import Group
from .links import Link, Peer, Transfer
from .waits import Joined, Vote, describe

MOST_RANKS = 64             # that are told to be waited for; more count as all


class Mover:
    """Moves blocks among the members of a group, over links. One pass at a time, and none after a failure.

    Parameters
    ----------
    comm : Comm
    group : Group

    Attributes
    ----------
    timeout : float
        Seconds after which a wait for another rank is an error.
    beside : weak set of Mover
        Others of the same call, whose links advance while this one waits: another rank may wait for those.
    """

    def __init__(self, comm: Comm, group: Group) -> None:
        self.comm = comm
        self.group = group
        self.timeout = 0.0
        self.beside: weakref.WeakSet[Mover] = weakref.WeakSet()       # no circle: buffers go when their owner does
        self._awaited: list[Transfer | Vote] = []      # what is waited for now

    @property
    def links(self) -> list[Link]:
        """Every link that may have something under way."""
        raise NotImplementedError

    def progress(self) -> None:
        """Let MPI move what is on its way; call it every few milliseconds while computing. Local.

        Raises
        ------
        RankLost
            If another rank is gone.
        """
        under_way = [transfer for link in self.links for transfer in link.transfers]
        if not under_way:
            self.comm.heed_notices()              # whoever waits for this rank may ask where it is
            return
        joined = Joined(under_way)
        self.comm.progress(joined.requests, lambda: describe(self._where(), under_way), joined.advance)

    def abandon(self, error: BaseException) -> None:
        """Leave a pass in mid-way because of an error on this rank; the other ranks are told. Local."""
        self.comm.give_up(error, [])
        self.cancel()

    def cancel(self) -> None:
        """Give up what is under way, because of an error; what MPI may still write to is kept. Local."""
        for link in self.links:
            self.comm.keep_alive(link.cancel())

    def _where(self) -> str:
        """Name this rank, and what it is at."""
        raise NotImplementedError

    def _peer(self, call: str, member: int, tag: int, what: str) -> Peer:
        """Give the other end of a transfer, a member of the group, whose rank takes the place of {} in `what`."""
        rank = self.group.ranks[member]
        return Peer(rank, self.comm.message_starter(call, rank, tag), what.format(rank))

    def _wait(self, transfers: Sequence[Transfer | Vote]) -> float:
        """Wait for some transfers, and let all advance; return the seconds it took."""
        self._awaited = list(transfers)
        joined = Joined(self._awaited, [link for mover in (self, *self.beside) for link in mover.links])
        try:
            return self.comm.wait(joined.requests, self.timeout, lambda: describe(self._where(), self._late()),
                                  joined.advance, self._late_ranks)
        finally:
            self._awaited = []                   # they refer to buffers

    def _late(self) -> list[Transfer | Vote]:
        """Give what is waited for and not done; all that is waited for, if it has been done meanwhile."""
        return [transfer for transfer in self._awaited if not transfer.done()] or self._awaited

    def _late_ranks(self) -> list[int]:
        """Give the ranks that are waited for; none means all."""
        late = self._late()
        ranks = {transfer.peer.rank for transfer in late}
        everyone = len(ranks) > MOST_RANKS or any(isinstance(transfer, Vote) for transfer in late)
        return [] if everyone else sorted(ranks)
