"""The all-gather: every rank is sent all the blocks that it needs at once, and computes with one after the other.

More memory than the ring, a buffer for each block; fewer messages one after the other: right where blocks are small
and latency counts. Made of Isend and Irecv, so that a block goes only to the ranks that need it (causal masks, windows,
documents), and a wait says for whom. Blocks are taken in the order of the ring, so results are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..mpi.comm import Comm
from ..trace import Step, Trace
from .base import TAGS, Blocks, Carrier, Message, Route, Work
from .group import Group
from .links import Array, Link, Transfer


class Gather(Carrier):
    """Blocks that go straight from their owners to the members that need them; see `Carrier`."""

    name = "gather"
    path_text = "to {} ranks"

    def __init__(self, comm: Comm, group: Group, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None]) -> None:
        super().__init__(comm, group, new_link, clear, add)
        self._blocks = new_link()
        self._shares = new_link()             # this member's, of the gradients of other members' blocks
        self._coming_home = new_link()        # the others', of the gradients of this member's block

    @property
    def links(self) -> list[Link]:
        """Every link that may have something under way."""
        return [self._blocks, self._shares, self._coming_home]

    def reserve(self, route: Route, sizes: Sequence[Sequence[int]],
                gradient_sizes: Sequence[Sequence[int]] | None = None) -> None:
        """Make the buffers of a pass; see `Carrier.reserve`. Local.

        A slot for each block that this member needs, in the order of the steps; for gradients one for each block of
        another, and one for each that needs this member's.
        """
        if self.group.size > 1:
            index, others = self.group.index, self._sources(route)
            own = [index] * self._blocks.own_slots
            self._blocks.reserve([sum(sizes[source]) for source in [*own, *others]])
            if gradient_sizes:
                self._shares.reserve([sum(gradient_sizes[source]) for source in others])
                self._coming_home.reserve([sum(gradient_sizes[index])] * len(self._users(route)))

    def _run(self, blocks: Blocks, gradients: Blocks | None, route: Route, trace: Trace,
             stop: Callable[[], int] | None) -> Iterator[Work]:
        group = self.group
        link = self._blocks
        slots = {source: link.own_slots + slot for slot, source in enumerate(self._sources(route))}
        users = {user: slot for slot, user in enumerate(self._users(route))}

        # Begin: buffers, what the caller has put on the GPU's stream, and all blocks that travel.
        self.reserve(route, blocks.sizes, gradients.sizes if gradients else None)
        for each in self.links:
            each.begin()
        own = link.put_own_block(blocks.own) if group.size > 1 else tuple(blocks.own)
        arriving = self._exchange_blocks(blocks.sizes, route, slots)

        for step in self._steps(trace, stop):
            number, source = step.step, group.upstream(step.step)
            self._count(step, route, blocks.sizes)
            shares = self._begin_gradients(step, gradients, slots, users) if gradients else ()
            if route.needed[group.index, source]:
                arrays = link.views(slots[source], blocks.shapes[source], blocks.dtypes) if number else own
                yield self._work(step, route, arrays, shares)
            if gradients:
                self._send_share(step, gradients, slots)

            # The step ends when the next block is there; nothing else is waited for until the last.
            step.wait_start = trace.now()
            following = group.upstream(number + 1)
            if following in arriving:
                step.wait_seconds = self._wait([arriving[following]])
                link.forget(arriving.pop(following))
            else:
                step.wait_seconds = self._wait([])

        step.wait_seconds += self._wait([transfer for each in self.links for transfer in each.transfers])
        if gradients and not self.stopped:
            self._add_shares(route, gradients)
        for each in self.links:
            each.end_step()

    def _exchange_blocks(self, sizes: Sequence[Sequence[int]], route: Route,
                         slots: dict[int, int]) -> dict[int, Transfer]:
        """Ask for every block that this member needs, and send its own to every rank that does; give what arrives."""
        group = self.group
        link = self._blocks
        arriving = {}
        for hop in range(1, group.size):
            source, dest = group.upstream(hop), group.downstream(hop)
            if source in slots:
                what = f"for {sum(sizes[source])} bytes from rank {{}}"
                link.receive(slots[source], sizes[source], self._peer("Irecv", source, 0, what))
                arriving[source] = link.incoming[-1]
            if route.needed[dest, group.index]:
                what = f"for rank {{}} to take {sum(sizes[group.index])} bytes"
                link.send_own(self._peer("Isend", dest, 0, what))
        return arriving

    def _count(self, step: Step, route: Route, sizes: Sequence[Sequence[int]]) -> None:
        """Count a block in the step before the one in which it is needed, as a ring would move it."""
        group, hop = self.group, step.step + 1
        if hop < group.size:
            source, dest = group.upstream(hop), group.downstream(hop)
            step.bytes_received = sum(sizes[source]) if route.needed[group.index, source] else 0
            step.bytes_sent = sum(sizes[group.index]) if route.needed[dest, group.index] else 0

    def _begin_gradients(self, step: Step, gradients: Blocks, slots: dict[int, int],
                         users: dict[int, int]) -> tuple[Array, ...]:
        """Start to receive a rank's share of this member's gradients; give zeroed arrays for this member's share."""
        source = self.group.upstream(step.step)
        if step.step == 0:
            return tuple(gradients.own)
        user = self.group.downstream(step.step)
        if user in users:
            self._coming_home.receive(users[user], gradients.sizes[self.group.index], self._peer(
                "Irecv", user, 2 * TAGS, "for the gradients of its own block from rank {}"))
        if source not in slots:
            return ()
        share = self._shares.views(slots[source] - self._blocks.own_slots, gradients.shapes[source], gradients.dtypes)
        for x in share:
            self._clear(x)
        return share

    def _send_share(self, step: Step, gradients: Blocks, slots: dict[int, int]) -> None:
        """Send this member's share of the gradients of a block to its owner."""
        source = self.group.upstream(step.step)
        if source in slots:
            step.gradient_bytes_sent = sum(gradients.sizes[source])
            taker = self._peer("Isend", source, 2 * TAGS, "for rank {} to take the gradients of a block")
            self._shares.send(slots[source] - self._blocks.own_slots, gradients.sizes[source], taker, written=True)

    def _add_shares(self, route: Route, gradients: Blocks) -> None:
        """Add up what has come home, in the order of a ring."""
        index = self.group.index
        shares = [self._coming_home.views(slot, gradients.shapes[index], gradients.dtypes)
                  for slot in range(len(self._users(route)))]
        for share in shares[1:]:
            for x, y in zip(shares[0], share, strict=True):
                self._add(x, y)
        for x, y in zip(gradients.own, *shares[:1], strict=True) if shares else ():
            self._add(x, y)

    def _sources(self, route: Route) -> list[int]:
        """Give the other members whose blocks this one needs, in the order of the steps."""
        group = self.group
        sources = (group.upstream(hop) for hop in range(1, group.size))
        return [source for source in sources if route.needed[group.index, source]]

    def _users(self, route: Route) -> list[int]:
        """Give the other members that need this one's block, in the order of the steps."""
        group = self.group
        users = (group.downstream(hop) for hop in range(1, group.size))
        return [user for user in users if route.needed[user, group.index]]

    @staticmethod
    def steps(route: Route, sizes: Sequence[Sequence[int]],
              gradient_sizes: Sequence[Sequence[int]] | None = None) -> list[list[Message]]:
        """Say what all ranks send at each step; see `Carrier.steps`. Local, and without MPI.

        All blocks are sent at once; each counts in the step before the one in which it is needed.
        """
        size = len(sizes)
        messages: list[list[Message]] = [[] for _ in range(size)]
        for hop in range(1, size):
            for owner in range(size):
                user = (owner + hop) % size
                if route.needed[user, owner]:
                    messages[hop - 1].append(Message(owner, user, owner, sum(sizes[owner])))
                    if gradient_sizes:
                        messages[hop].append(Message(user, owner, owner, sum(gradient_sizes[owner]), True))
        return messages

    @staticmethod
    def buffer_blocks(ranks: int, on_gpu: bool) -> int:
        """Say how many blocks of K and V a rank has buffers for in a forward pass, at most. Local."""
        return ranks - 1 + (on_gpu and ranks > 1)
