"""The ring: K and V pass from neighbour to neighbour while every rank computes on the block it has.

A block that no later rank needs is not sent on (causal masks, windows, documents).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..mpi.comm import Comm
from ..trace import Step, Trace
from .base import TAGS, Blocks, Carrier, Message, Route, Work, largest
from .gradient_ring import GradientRing
from .group import Group
from .links import Array, Link


class Ring(Carrier):
    """Blocks that pass from member to member; see `Carrier`. A block makes ``size - 1`` hops at most."""

    name = "ring"
    path_text = "in {} hops"

    def __init__(self, comm: Comm, group: Group, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None]) -> None:
        super().__init__(comm, group, new_link, clear, add)
        self._blocks = new_link()
        self._gradients = GradientRing(comm, group, new_link, clear, add)

    def _forget(self) -> None:
        self._gradients.forget()

    @property
    def links(self) -> list[Link]:
        """Every link that may have something under way."""
        return [self._blocks, self._gradients.passed_on, self._gradients.coming_home]

    def reserve(self, route: Route, sizes: Sequence[Sequence[int]],
                gradient_sizes: Sequence[Sequence[int]] | None = None) -> None:
        """Make the buffers of a pass; see `Carrier.reserve`. Local.

        Slot n % 2 has the block of step n, while (n + 1) % 2 takes the next; the gradients have slots of their own.
        """
        if self.group.size > 1:
            self._blocks.reserve([largest(sizes)] * min(2, self.group.size - 1 + self._blocks.own_slots))
            if gradient_sizes:
                self._gradients.reserve(gradient_sizes)

    def forward(self, blocks: Blocks, route: Route, trace: Trace,
                stop: Callable[[], bool] | None = None) -> Iterator[Work]:
        """Yield this member's work with every block that it needs; see `Carrier.forward`. Collective over *comm*."""
        return self._circulate(blocks, None, route, trace, stop)

    def backward(self, blocks: Blocks, gradients: Blocks, route: Route, trace: Trace,
                 stop: Callable[[], bool] | None = None) -> Iterator[Work]:
        """Yield this member's work, and bring gradients home; see `Carrier.backward`. Collective over *comm*."""
        return self._circulate(blocks, gradients, route, trace, stop)

    def _circulate(self, blocks: Blocks, gradients: Blocks | None, route: Route, trace: Trace,
                   stop: Callable[[], bool] | None) -> Iterator[Work]:
        group = self.group
        link = self._blocks
        sums = self._gradients
        sizes = blocks.sizes

        # Begin: buffers, what the caller has put on the GPU's stream, this member's own block.
        self.reserve(route, sizes)
        link.begin()
        if gradients:
            sums.bind(gradients, route.first, route.last)
        own = link.put_own_block(blocks.own) if group.size > 1 else tuple(blocks.own)

        for step in self._steps(trace, stop):
            number, source = step.step, group.upstream(step.step)

            # The next block comes in and this one goes on, while this member computes.
            self._pass_on(step, route, sizes)
            shares = sums.begin_step(step) if gradients else ()
            if route.needed[group.index, source]:
                arrays = own if number == 0 else link.views(number, blocks.shapes[source], blocks.dtypes)
                yield self._work(step, route, arrays, shares)

            # The step ends when the next block is there, this one has been taken, and so has the last step's sum.
            step.wait_start = trace.now()
            step.wait_seconds = self._wait([*link.transfers, *(sums.to_wait_for() if gradients else ())])
            link.end_step()
            if gradients:
                sums.end_step(step, self._leaves())

        # At last the sums that were sent in the last step, and what comes home.
        if gradients:
            step.wait_seconds += self._wait([transfer for link in self.links for transfer in link.transfers])
            sums.finish()

    def _pass_on(self, step: Step, route: Route, sizes: Sequence[Sequence[int]]) -> None:
        """Ask for the next block, and send this one on, as far as somebody needs them."""
        group, number = self.group, step.step
        source, following = group.upstream(number), group.upstream(number + 1)
        if route.last[following] > number:
            step.bytes_received = sum(sizes[following])
            what = f"for {step.bytes_received} bytes from rank {{}}"
            sender = self._peer("Irecv", group.upstream(1), number % TAGS, what)
            self._blocks.receive(number + 1, sizes[following], sender)
        if route.last[source] > number:
            step.bytes_sent = sum(sizes[source])
            what = f"for rank {{}} to take {step.bytes_sent} bytes"
            taker = self._peer("Isend", group.downstream(1), number % TAGS, what)
            if number == 0:
                self._blocks.send_own(taker)
            else:
                self._blocks.send(number, sizes[source], taker)

    @staticmethod
    def steps(route: Route, sizes: Sequence[Sequence[int]],
              gradient_sizes: Sequence[Sequence[int]] | None = None) -> list[list[Message]]:
        """Say what all ranks send at each step; see `Carrier.steps`. Local, and without MPI."""
        size = len(sizes)
        messages: list[list[Message]] = [[] for _ in range(size)]
        for owner in range(size):
            for number in range(route.last[owner]):
                rank = (owner + number) % size
                messages[number].append(Message(rank, (rank + 1) % size, owner, sum(sizes[owner])))
            if not gradient_sizes or not route.first[owner]:
                continue
            for number in range(route.first[owner], route.last[owner] + 1):
                rank = (owner + number) % size
                dest = owner if number == route.last[owner] else (rank + 1) % size
                messages[number].append(Message(rank, dest, owner, sum(gradient_sizes[owner]), True))
        return messages

    @staticmethod
    def buffer_blocks(ranks: int, on_gpu: bool) -> int:
        """Say how many blocks of K and V a rank has buffers for in a forward pass, at most. Local.

        On the host its own is sent from where it is.
        """
        return min(ranks, 2) if on_gpu and ranks > 1 else min(ranks - 1, 2)
