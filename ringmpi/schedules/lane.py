"""One way round a ring: blocks pass from neighbour to neighbour, and gradients of them come home behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..mpi.comm import Comm
from ..trace import Step
from .base import TAGS, Message, Route, largest
from .cargo import NOTHING, Cargo
from .gradient_ring import GradientRing
from .group import Group
from .links import Array, Link, Peer, Transfer


class Lane:
    """Blocks, or some columns of each, that pass from member to member; a carrier drives it.

    Parameters
    ----------
    comm : Comm
    group : Group
        In the order in which blocks go round.
    new_link, clear, add
        See `Carrier`.
    tag : int
        The first of those that are its own; it has ``3 * TAGS``.
    """

    def __init__(self, comm: Comm, group: Group, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None], tag: int = 0) -> None:
        self.group = group
        self._comm = comm
        self._tag = tag
        self._blocks = new_link()
        self._sums = GradientRing(comm, group, new_link, clear, add, tag)
        self._route = Route(np.zeros((0, 0), bool))
        self._cargo = self._gradients = NOTHING

    @property
    def links(self) -> list[Link]:
        """Every link that may have something under way."""
        return [self._blocks, self._sums.passed_on, self._sums.coming_home]

    def reserve(self, sizes: Sequence[Sequence[int]], gradient_sizes: Sequence[Sequence[int]] | None = None) -> None:
        """Make the buffers of a pass; see `Carrier.reserve`. Local.

        Slot n % 2 has the block of step n, while (n + 1) % 2 takes the next; the gradients have slots of their own.
        """
        if self.group.size > 1:
            self._blocks.reserve([largest(sizes)] * min(2, self.group.size - 1 + self._blocks.own_slots))
            if gradient_sizes:
                self._sums.reserve(gradient_sizes)

    def begin(self, route: Route, cargo: Cargo, gradients: Cargo | None) -> None:
        """Take what the next pass is about. Local."""
        self.reserve(cargo.sizes)
        self._blocks.begin()
        self._route = route
        self._cargo = cargo
        self._gradients = gradients or NOTHING
        if gradients:
            self._sums.bind(gradients, route.first, route.last)
        if self.group.size > 1:
            self._blocks.put_own_block(cargo.own)

    def begin_step(self, step: Step) -> tuple[Array, ...]:
        """Ask for the next block, and send this one on, as far as somebody needs them. Local.

        Returns
        -------
        tuple of arrays
            Zeroed, for this member's share of the gradients of a step; of no use in the first.
        """
        group, number = self.group, step.step
        route, sizes = self._route, self._cargo.sizes
        source, following = group.upstream(number), group.upstream(number + 1)
        if route.last[following] > number:
            nbytes = sum(sizes[following])
            step.bytes_received += nbytes
            sender = self._peer("Irecv", group.upstream(1), number, f"for {nbytes} bytes from rank {{}}")
            self._blocks.receive(number + 1, sizes[following], sender)
        if route.last[source] > number:
            nbytes = sum(sizes[source])
            step.bytes_sent += nbytes
            taker = self._peer("Isend", group.downstream(1), number, f"for rank {{}} to take {nbytes} bytes")
            if number == 0:
                self._blocks.send_own(taker)
            else:
                self._blocks.send(number, sizes[source], taker)
        return self._sums.begin_step(step) if self._gradients is not NOTHING else ()

    def arrays(self, number: int) -> tuple[Array, ...]:
        """Give what a step after the first computes with. Local."""
        return self._cargo.views(self._blocks, number, self.group.upstream(number))

    def to_wait_for(self) -> list[Transfer]:
        """Give what must be done before a step can end. Local."""
        return [*self._blocks.transfers, *(self._sums.to_wait_for() if self._gradients is not NOTHING else ())]

    def end_step(self, step: Step, leaves: bool) -> None:
        """Let go of the block of a step, and pass on the sum of its gradients; see `GradientRing.end_step`. Local."""
        self._blocks.end_step()
        if self._gradients is not NOTHING:
            self._sums.end_step(step, leaves)

    def finish(self) -> None:
        """End a backward pass, when nothing is under way any more: add what has come home. Local."""
        self._sums.finish()

    def forget(self) -> None:
        """Let go of what the pass was about. Local."""
        self._cargo = self._gradients = NOTHING
        self._sums.forget()

    def _peer(self, call: str, member: int, number: int, what: str) -> Peer:
        rank = self.group.ranks[member]
        return Peer(rank, self._comm.message_starter(call, rank, self._tag + number % TAGS), what.format(rank))


def lane_steps(route: Route, sizes: Sequence[int], gradient_sizes: Sequence[int] | None) -> list[list[Message]]:
    """Say what all members send at each step; see `Carrier.steps`. Local.

    Parameters
    ----------
    route : Route
    sizes, gradient_sizes
        For each member, the bytes of what goes round of its block, and of its gradients.
    """
    size = len(sizes)
    messages: list[list[Message]] = [[] for _ in range(size)]
    for owner in range(size):
        for number in range(route.last[owner]):
            rank = (owner + number) % size
            messages[number].append(Message(rank, (rank + 1) % size, owner, sizes[owner]))
        if not gradient_sizes or not route.first[owner]:
            continue
        for number in range(route.first[owner], route.last[owner] + 1):
            rank = (owner + number) % size
            dest = owner if number == route.last[owner] else (rank + 1) % size
            messages[number].append(Message(rank, dest, owner, gradient_sizes[owner], True))
    return messages
