"""The two-way ring: one half of each block goes round one way, the other half the other way.

Both directions of a link that is full-duplex are used, so a hop takes half as long where links are what it waits for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from ..mpi.comm import Comm
from ..trace import Step
from .base import TAGS, Blocks, Message, Route, Work
from .cargo import Cargo, halves
from .group import Group
from .lane import Lane, lane_steps
from .links import Array, Link
from .ring import Ring


class TwoWay(Ring):
    """Halves of blocks that pass from member to member, one each way; see `Carrier`.

    In step n a member has the first half of the block of the member n hops upstream, and the second half of that of the
    member n hops downstream. The second lane has the members in the opposite order.
    """

    name = "two-way"
    path_text = "in {} hops, half of each block either way"

    def __init__(self, comm: Comm, group: Group, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None]) -> None:
        super().__init__(comm, group, new_link, clear, add)
        self._lanes.append(Lane(comm, Group(group.ranks[::-1], group.rank), new_link, clear, add, 3 * TAGS))
        self._columns: tuple[Sequence[slice], Sequence[slice]] = (), ()

    def reserve(self, route: Route, sizes: Sequence[Sequence[int]],
                gradient_sizes: Sequence[Sequence[int]] | None = None) -> None:
        """Make the buffers of a pass; see `Carrier.reserve`. Local."""
        first, second = _halved(route.tokens, sizes)
        sums = _halved(route.tokens, gradient_sizes)
        self._lanes[0].reserve(_each(first), _each(sums[0]))
        self._lanes[1].reserve(_each(second[::-1]), _each(sums[1][::-1]))

    def _begin(self, blocks: Blocks, gradients: Blocks | None, route: Route) -> None:
        """Let the lanes take what the pass is about."""
        index = self.group.index
        self._columns = halves([shapes[0][1] for shapes in blocks.shapes])
        first, second = (Cargo.some(blocks, index, columns) for columns in self._columns)
        sums = [Cargo.some(gradients, index, columns) if gradients else None for columns in self._columns]
        self._lanes[0].begin(route, first, sums[0])
        self._lanes[1].begin(_mirrored(route), second.reversed(), sums[1] and sums[1].reversed())

    def _works(self, step: Step, route: Route, shares: Sequence[tuple[Array, ...]]) -> Iterator[Work]:
        """Yield the work of a step after the first; see `Ring._works`."""
        later = self._sources_from(step.step)
        for lane, columns, share in zip(self._lanes, self._columns, shares, strict=True):
            source = next(later)
            if route.needed[self.group.index, source]:
                later, others = itertools.tee(later)
                yield Work(step, source, lane.arrays(step.step), share, columns[source],
                           self._next_needed(route, others))

    def _sources_from(self, number: int) -> Iterator[int]:
        """Give the members whose blocks come by from a step on; see `Carrier._sources_from`."""
        group = self.group
        return (source for hop in range(number, group.size) for source in (group.upstream(hop), group.downstream(hop)))

    @staticmethod
    def steps(route: Route, sizes: Sequence[Sequence[int]],
              gradient_sizes: Sequence[Sequence[int]] | None = None) -> list[list[Message]]:
        """Say what all ranks send at each step; see `Carrier.steps`. Local, and without MPI."""
        last = len(sizes) - 1
        first, second = _halved(route.tokens, sizes)
        sums = _halved(route.tokens, gradient_sizes)
        there = lane_steps(route, first, sums[0])
        back = lane_steps(_mirrored(route), second[::-1], sums[1][::-1])
        return [[*one, *(x._replace(source=last - x.source, dest=last - x.dest, owner=last - x.owner) for x in other)]
                for one, other in zip(there, back, strict=True)]


def _mirrored(route: Route) -> Route:
    """Give a route for the members in the opposite order."""
    return Route(route.needed[::-1, ::-1], route.tokens[::-1])


def _halved(tokens: Sequence[int], sizes: Sequence[Sequence[int]] | None) -> tuple[list[int], list[int]]:
    """Give the bytes of the halves of each member's block, or of its gradients; nothing if there are none."""
    if not sizes:
        return [], []
    columns, _ = halves(tokens)
    first = [sum(theirs) // max(n, 1) * part.stop for n, theirs, part in zip(tokens, sizes, columns, strict=True)]
    return first, [sum(theirs) - nbytes for theirs, nbytes in zip(sizes, first, strict=True)]


def _each(sizes: Sequence[int]) -> list[list[int]]:
    return [[nbytes] for nbytes in sizes]
