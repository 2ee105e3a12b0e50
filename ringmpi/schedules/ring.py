"""The ring: K and V pass from neighbour to neighbour while every rank computes on the block it has.

A block that no later rank needs is not sent on (causal masks, windows, documents).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..mpi.comm import Comm
from ..trace import Step, Trace
from .base import Blocks, Carrier, Message, Route, Work
from .cargo import Cargo
from .group import Group
from .lane import Lane, lane_steps
from .links import Array, Link


class Ring(Carrier):
    """Blocks that pass from member to member; see `Carrier`. A block makes ``size - 1`` hops at most."""

    name = "ring"
    path_text = "in {} hops"

    def __init__(self, comm: Comm, group: Group, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None]) -> None:
        super().__init__(comm, group, new_link, clear, add)
        self._lanes = [Lane(comm, group, new_link, clear, add)]

    def _forget(self) -> None:
        for lane in self._lanes:
            lane.forget()

    @property
    def links(self) -> list[Link]:
        """Every link that may have something under way."""
        return [link for lane in self._lanes for link in lane.links]

    def reserve(self, route: Route, sizes: Sequence[Sequence[int]],
                gradient_sizes: Sequence[Sequence[int]] | None = None) -> None:
        """Make the buffers of a pass; see `Carrier.reserve`. Local."""
        self._lanes[0].reserve(sizes, gradient_sizes)

    def _run(self, blocks: Blocks, gradients: Blocks | None, route: Route, trace: Trace,
             stop: Callable[[], int] | None) -> Iterator[Work]:
        lanes = self._lanes
        self._begin(blocks, gradients, route)
        for step in self._steps(trace, stop):

            # The next blocks come in and those of this step go on, while this member computes.
            shares = [lane.begin_step(step) for lane in lanes]
            if step.step > 0:
                yield from self._works(step, route, shares)
            elif route.needed[self.group.index, self.group.index]:
                yield self._work(step, route, tuple(blocks.own), tuple(gradients.own) if gradients else ())

            # The step ends when the next are there, those of this one have been taken, and so has the last step's sum.
            step.wait_start = trace.now()
            step.wait_seconds = self._wait([transfer for lane in lanes for transfer in lane.to_wait_for()])
            for lane in lanes:
                lane.end_step(step, self._leaves())

        # At last the sums that were sent in the last step, and what comes home.
        if gradients:
            step.wait_seconds += self._wait([transfer for link in self.links for transfer in link.transfers])
            for lane in lanes:
                lane.finish()
        self._forget()

    def _begin(self, blocks: Blocks, gradients: Blocks | None, route: Route) -> None:
        """Let the lanes take what the pass is about."""
        self._lanes[0].begin(route, Cargo.whole(blocks), Cargo.whole(gradients) if gradients else None)

    def _works(self, step: Step, route: Route, shares: Sequence[tuple[Array, ...]]) -> Iterator[Work]:
        """Yield the work of a step after the first.

        Parameters
        ----------
        step : Step
        route : Route
        shares : for each lane, arrays
            For this member's share of gradients, in a backward pass.
        """
        if route.needed[self.group.index, self.group.upstream(step.step)]:
            yield self._work(step, route, self._lanes[0].arrays(step.step), shares[0])

    @staticmethod
    def steps(route: Route, sizes: Sequence[Sequence[int]],
              gradient_sizes: Sequence[Sequence[int]] | None = None) -> list[list[Message]]:
        """Say what all ranks send at each step; see `Carrier.steps`. Local, and without MPI."""
        return lane_steps(route, list(map(sum, sizes)), list(map(sum, gradient_sizes)) if gradient_sizes else None)

    @staticmethod
    def buffer_blocks(ranks: int, on_gpu: bool) -> int:
        """Say how many blocks of K and V a rank has buffers for in a forward pass, at most. Local.

        On the host its own is sent from where it is.
        """
        return min(ranks, 2) if on_gpu and ranks > 1 else min(ranks - 1, 2)
