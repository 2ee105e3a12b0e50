"""The broadcast: blocks 0, 1, 2, ... of the group come to every member in this order, each started one step ahead.

All members compute with the same block at the same time, and a query meets the keys in the same order wherever it is.
With queries striped and keys contiguous, that is balanced at every step under a causal mask. A block goes down a
binomial tree of those that need it, and each passes it on while it computes, as soon as it is there. Made of Isend and
Irecv, so that a block goes only where it is needed and a wait says for whom. The gradients of a block come up the same
tree while the next one is computed with, and are added in an order that the tree gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..mpi.comm import Comm
from ..trace import Exchange, Step, Trace
from .base import TAGS, Blocks, Carrier, Message, Route, Work
from .group import Group
from .links import Array, Link, Peer, Transfer, start
from .relays import InTurn, Tree, Until

COMING_UP = 2               # the slot of sums that others send; those before it take this member's shares in turns


class Broadcast(Carrier):
    """Blocks that come to all members in the order of their owners; see `Carrier`."""

    name = "broadcast"
    path_text = "down a tree to {} ranks"

    def __init__(self, comm: Comm, group: Group, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None]) -> None:
        super().__init__(comm, group, new_link, clear, add)
        self._blocks = new_link()
        self._sums = new_link()
        self._forget()

    def _forget(self) -> None:
        self._own: tuple[Array, ...] = ()
        self._coming: Transfer | None = None            # the next block
        self._rising: Transfer | None = None            # the gradients of the last block, on their way up its tree

    @property
    def links(self) -> list[Link]:
        """Every link that may have something under way."""
        return [self._blocks, self._sums]

    def source_of(self, number: int) -> int:
        """Give the member whose block step `number` is about: they come in the order of their owners. Local."""
        return number

    def reserve(self, route: Route, sizes: Sequence[Sequence[int]],
                gradient_sizes: Sequence[Sequence[int]] | None = None) -> None:
        """Make the buffers of a pass; see `Carrier.reserve`. Local.

        Slot n % 2 has block n, while (n + 1) % 2 takes the next; so it is with this member's shares of their gradients,
        and a third slot takes the sums that other members send.
        """
        group = self.group
        if group.size > 1:
            others = np.flatnonzero(route.needed[group.index]).tolist()
            if group.index in others:
                others.remove(group.index)
            own = [sum(sizes[group.index])] * self._blocks.own_slots
            self._blocks.reserve(own + _in_turns(min(2, group.size - 1), sizes, others))
            if gradient_sizes:
                coming_up = max(sum(gradient_sizes[source]) for source in [group.index, *others])
                self._sums.reserve([*_in_turns(COMING_UP, gradient_sizes, others), coming_up])

    def _run(self, blocks: Blocks, gradients: Blocks | None, route: Route, trace: Trace,
             stop: Callable[[], int] | None) -> Iterator[Work]:
        index = self.group.index
        link = self._blocks

        # Begin: buffers, and what the caller has put on the GPU's stream.
        self.reserve(route, blocks.sizes, gradients.sizes if gradients else None)
        for each in self.links:
            each.begin()
        self._forget()
        self._own = tuple(blocks.own)

        for step in self._steps(trace, stop):
            number = step.step
            if number == 0:
                self._wait_for_first(step, blocks, route, trace)

            # The next block is on its way while this member computes, and so are the gradients of the last one.
            going = list(link.outgoing)
            self._start(step, number + 1, blocks, route)
            share = self._share(number, gradients, route) if gradients else ()
            if route.needed[index, number]:
                here = self._own if number == index else link.views(self._slot(number), blocks.shapes[number],
                                                                    blocks.dtypes)
                yield self._work(step, route, here, share)
            rising = self._rising
            if gradients:
                self._raise(step, share, gradients, route)

            # The step ends when the next block is there, and what used this one's slot or the last one's is done.
            step.wait_start = trace.now()
            step.wait_seconds = self._wait([*filter(None, (self._coming, rising)), *going])
            for each in self.links:
                each.end_step()

        step.wait_seconds += self._wait([transfer for each in self.links for transfer in each.transfers])
        for each in self.links:
            each.end_step()
        self._forget()

    def _wait_for_first(self, step: Step, blocks: Blocks, route: Route, trace: Trace) -> None:
        """Start block 0, and wait until it is there: nothing is computed meanwhile."""
        self._start(step, 0, blocks, route)
        if self._coming:
            first = Exchange("the first block", trace.now())
            trace.exchanges.append(first)
            first.wait_seconds = self._wait_to_begin([self._coming])
            step.compute_start = trace.now()

    def _start(self, step: Step, number: int, blocks: Blocks, route: Route) -> None:
        """Ask for a block, if this member needs it, and have it passed on to those that get it from here."""
        group, link = self.group, self._blocks
        link.advance()              # what of the last block is still to be passed on goes first: some links take turns
        self._coming = None
        if number == group.size:
            return
        tree = Tree.of(route, number)
        if not tree.has(group.index):
            return
        sizes = blocks.sizes[number]
        nbytes = sum(sizes)
        takers = [self._peer("Isend", child, number % TAGS, f"for rank {{}} to take {nbytes} bytes")
                  for child in reversed(tree.children(group.index))]
        step.bytes_sent += len(takers) * nbytes
        if number == group.index:
            self._own = link.put_own_block(blocks.own) if takers else self._own
            for taker in takers:
                link.send_own(taker)
            return
        step.bytes_received += nbytes
        sender = self._peer("Irecv", tree.parent(group.index), number % TAGS, f"for {nbytes} bytes from rank {{}}")
        link.receive(self._slot(number), sizes, sender)
        self._coming = link.incoming[-1]
        for taker in takers:
            start(InTurn(self._relay(self._coming, self._slot(number), sizes, taker)), link.outgoing)

    def _relay(self, coming: Transfer, slot: int, sizes: Sequence[int], taker: Peer) -> Iterator[Transfer]:
        """Pass a block on as soon as it is there."""
        yield Until(coming)
        yield self._blocks.to_send(slot, sizes, taker)

    def _share(self, number: int, gradients: Blocks, route: Route) -> tuple[Array, ...]:
        """Give the arrays that this member's share of the gradients of a block is added to."""
        if number == self.group.index:
            return tuple(gradients.own)
        if not route.needed[self.group.index, number]:
            return ()
        share = self._sums.views(number % COMING_UP, gradients.shapes[number], gradients.dtypes)
        for x in share:
            self._clear(x)
        return share

    def _raise(self, step: Step, share: tuple[Array, ...], gradients: Blocks, route: Route) -> None:
        """Begin to add what others have made of the gradients of a step's block, and to send the sum up its tree."""
        number = step.step
        index = self.group.index
        tree = Tree.of(route, number)
        last, self._rising = self._rising, None
        if not tree.has(index) or (number == index and not tree.children(index)):
            return
        whose = f"the gradients of rank {self.group.ranks[number]}'s block"
        givers = [self._peer("Irecv", child, TAGS + number % TAGS, f"for {whose} from rank {{}}")
                  for child in tree.children(index)]
        taker = None
        if number != index:
            step.gradient_bytes_sent = sum(gradients.sizes[number])
            taker = self._peer("Isend", tree.parent(index), TAGS + number % TAGS, f"for rank {{}} to take {whose}")
        self._rising = InTurn(self._sum_up(number, share, gradients, givers, taker, last))
        start(self._rising, self._sums.incoming)

    def _sum_up(self, number: int, share: tuple[Array, ...], gradients: Blocks, givers: Sequence[Peer],
                taker: Peer | None, last: Transfer | None) -> Iterator[Transfer]:
        """Add the sums of the members below to this member's share, always in the same order, and send it up."""
        link = self._sums
        sizes = gradients.sizes[number]
        if last:                    # there is one slot for all sums, and some links take turns
            yield Until(last)
        for giver in givers:
            yield link.to_receive(COMING_UP, sizes, giver)
            theirs = link.views(COMING_UP, gradients.shapes[number], gradients.dtypes)
            for x, y in zip(share, theirs, strict=True):
                self._add(x, y)
            link.end_step()         # the next sum may come when these have been added
        if taker:
            yield link.to_send(number % COMING_UP, sizes, taker, written=True)

    def _slot(self, number: int) -> int:
        """Give the slot of another member's block."""
        return self._blocks.own_slots + number % min(2, self.group.size - 1)

    @staticmethod
    def steps(route: Route, sizes: Sequence[Sequence[int]],
              gradient_sizes: Sequence[Sequence[int]] | None = None) -> list[list[Message]]:
        """Say what all members send at each step; see `Carrier.steps`. Local, and without MPI.

        Before anything is computed in step 0, block 0 is sent. Sums are sent up from the end of a step on.
        """
        size = len(sizes)
        messages: list[list[Message]] = [[] for _ in range(size)]
        for owner in range(size):
            tree = Tree.of(route, owner)
            for member in tree.members[1:]:
                parent = tree.parent(member)
                messages[max(owner - 1, 0)].append(Message(parent, member, owner, sum(sizes[owner])))
                if gradient_sizes:
                    messages[owner].append(Message(member, parent, owner, sum(gradient_sizes[owner]), True))
        return messages

    @staticmethod
    def buffer_blocks(ranks: int, on_gpu: bool) -> int:
        """Say how many blocks of K and V a rank has buffers for in a forward pass, at most. Local.

        On a GPU its own block has one too.
        """
        return min(ranks - 1, 2) + (on_gpu and ranks > 1)


def _in_turns(slots: int, sizes: Sequence[Sequence[int]], sources: Sequence[int]) -> list[int]:
    """Give what each of some slots must hold if block n of `sources` takes slot n % slots. Local."""
    return [max((sum(sizes[source]) for source in sources if source % slots == slot), default=0)
            for slot in range(slots)]
