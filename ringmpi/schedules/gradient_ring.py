"""The gradients of K and V on their way home, behind the blocks of a ring.

Each rank computes its own share of a block's gradient in the step in which the block is there, while the sum of the
ranks before it comes in; then it adds the two and passes the sum on. The owner keeps its own share. The last rank that
computes with a block sends the sum straight home, so that a block of a causal mask does not go all the way round in
vain. Sums travel in the accumulator's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..mpi.comm import Comm
from ..trace import Step
from .base import TAGS, largest
from .cargo import NOTHING, Cargo
from .group import Group
from .links import Array, Link, Peer, Transfer


class GradientRing:
    """Sums that go from rank to rank behind the blocks of a `Lane`, which drives this.

    Parameters
    ----------
    comm : Comm
    group : Group
    new_link : callable
        Makes a link of the kind that the ring has.
    clear : callable
        Fills an array with zeros.
    add : callable
        Adds the second array to the first.
    tag : int
        The first of those that are its own.

    Attributes
    ----------
    passed_on, coming_home : Link
        What goes from neighbour to neighbour, and home from the last rank; and what comes home.
    """

    def __init__(self, comm: Comm, group: Group, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None], tag: int = 0) -> None:
        self._comm = comm
        self._group = group
        self._clear = clear
        self._add = add
        self._tag = tag
        self.passed_on = new_link()
        self.coming_home = new_link()

    def reserve(self, sizes: Sequence[Sequence[int]]) -> None:
        """Make the buffers, for gradients of blocks whose arrays have `sizes` bytes. Local.

        Slot n % 3 takes this member's share of step n, while (n + 1) % 3 takes the sum coming in, and (n - 1) % 3, of
        the step before, goes out.
        """
        if self._group.size > 1:
            self.passed_on.reserve([largest(sizes)] * 3)
            self.coming_home.reserve([sum(sizes[self._group.index])])

    def bind(self, gradients: Cargo, first: Sequence[int], last: Sequence[int]) -> None:
        """Take what the next pass is about. Local.

        Parameters
        ----------
        gradients : Cargo
            The gradient of this member's block, which its own share and then those of the others are added to.
        first, last : for each rank, where the first and the last other rank that computes with its block is
            See `Route`.
        """
        self._gradients = gradients
        self._sizes = gradients.sizes
        self._first = first
        self._last = last
        if self._group.size > 1:
            self.reserve(self._sizes)
            self.passed_on.begin()
            self.coming_home.begin()

    def begin_step(self, step: Step) -> tuple[Array, ...]:
        """Give the arrays that this member's share of a step is added to; the sum so far starts to come in. Local."""
        group, number = self._group, step.step
        source = group.upstream(number)
        if 0 < number == self._last[group.index]:       # in this step the last member computes with this one's block
            self.coming_home.receive(0, self._sizes[group.index], self._peer(
                "Irecv", group.downstream(number), 2 * TAGS, "for its own gradients to come home"))
        if number == 0:
            return tuple(self._gradients.own)
        share = self._gradients.views(self.passed_on, number, source)
        for x in share:
            self._clear(x)
        if self._comes(number, source):
            what = f"for the gradients of rank {group.ranks[source]}'s block from rank {group.ranks[group.upstream(1)]}"
            self.passed_on.receive(number + 1, self._sizes[source],
                                   self._peer("Irecv", group.upstream(1), TAGS + (number - 1) % TAGS, what))
        return share

    def to_wait_for(self) -> list[Transfer]:
        """Give what must be done before a step can end. Local."""
        return self.passed_on.transfers

    def end_step(self, step: Step, leaves: bool) -> None:
        """Add what came in to this member's share, when both are there, and pass the sum on, or home. Local.

        If all ranks leave the pass after this step, nobody will ask for a sum that is passed on.
        """
        group, number = self._group, step.step
        source = group.upstream(number)
        if number and self._comes(number, source):
            views = [self._gradients.views(self.passed_on, slot, source) for slot in (number, number + 1)]
            for share, others in zip(*views, strict=True):
                self._add(share, others)
        self.passed_on.end_step()
        home = number == self._last[source]
        if number and self._first[source] <= number and (home or (number < self._last[source] and not leaves)):
            step.gradient_bytes_sent += sum(self._sizes[source])
            taker = source if home else group.downstream(1)
            tag = 2 * TAGS if home else TAGS + number % TAGS
            what = f"for rank {group.ranks[taker]} to take the gradients of a block"
            self.passed_on.send(number, self._sizes[source], self._peer("Isend", taker, tag, what), written=True)

    def finish(self) -> None:
        """Add what has come home; let go of the arrays. Local."""
        self.passed_on.end_step()           # of what the last step sent
        if self.coming_home.incoming:
            own = self._gradients.own
            theirs = self.coming_home.views(0, [x.shape for x in own], [x.dtype for x in own])
            for x, y in zip(own, theirs, strict=True):
                self._add(x, y)
        self.coming_home.end_step()
        self.forget()

    def forget(self) -> None:
        """Let go of the arrays. Local."""
        self._gradients = NOTHING

    def _comes(self, number: int, source: int) -> bool:
        return self._first[source] < number <= self._last[source]

    def _peer(self, call: str, member: int, tag: int, what: str) -> Peer:
        rank = self._group.ranks[member]
        return Peer(rank, self._comm.message_starter(call, rank, self._tag + tag), what)
