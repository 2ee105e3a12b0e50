"""Members of a group send each other arrays, each its own to each: tokens for heads, queries, and results home."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..mpi.comm import Comm
from ..trace import Exchange, Trace
from .group import Group
from .links import Array, Link, Shape, Transfer, assign
from .mover import Mover

Kinds = Sequence[tuple[Shape, np.dtype[Any]]]        # of some arrays, one after the other


class GroupExchange(Mover):
    """An exchange of arrays among all members of a group; see `Mover`.

    What is sent is packed into a slot of the link, and what has come is read there, so neither side's arrays need be
    contiguous.

    Parameters
    ----------
    comm : Comm
    group : Group
    new_link : callable
        Makes a `Link`, of the same kind on every rank.
    """

    def __init__(self, comm: Comm, group: Group, new_link: Callable[[], Link]) -> None:
        super().__init__(comm, group)
        self._link = new_link()
        self._arriving: dict[int, Transfer] = {}         # what comes from each member that sends anything
        self._kinds: Sequence[Kinds] = ()
        self._record = Exchange("")

    @property
    def links(self) -> list[Link]:
        """Every link that may have something under way."""
        return [self._link]

    @property
    def others(self) -> list[int]:
        """The other members, in the order in which they are heard."""
        return [self.group.upstream(hop) for hop in range(1, self.group.size)]

    def start(self, what: str, outgoing: Sequence[Sequence[Array]], incoming: Sequence[Kinds], trace: Trace) -> None:
        """Start to send each member its arrays. Collective over the group.

        Parameters
        ----------
        what : str
            Is exchanged: "queries".
        outgoing : for each member, arrays of any strides
            Or the arrays for all of them alike, as the only entry, which are packed once. They may change as soon as
            this returns, or on a GPU once what is on its stream is done.
        incoming : for each member, the shapes and dtypes of its arrays
        trace : Trace
            An `Exchange` is added.
        """
        group = self.group
        link = self._link
        self._record = Exchange(what, trace.now())
        if group.size > 1:
            trace.exchanges.append(self._record)
        self.comm.place = f", exchange of {what}"
        self._kinds = incoming
        self._arriving = {}
        alike = len(outgoing) == 1
        self._reserve(outgoing, incoming)
        link.begin()
        for hop in range(1, group.size):
            source, dest = group.upstream(hop), group.downstream(hop)
            nbytes = _nbytes(incoming[source])
            if nbytes:
                link.receive(hop - 1, [nbytes], self._peer("Irecv", source, 0, f"for {nbytes} bytes from rank {{}}"))
                self._arriving[source] = link.incoming[-1]
                self._record.bytes_received += nbytes

            arrays = outgoing[0 if alike else dest]
            slot = group.size - 1 + (0 if alike else hop - 1)
            nbytes = sum(x.nbytes for x in arrays)
            if not nbytes:
                continue
            if hop == 1 or not alike:
                self._pack(slot, arrays)
            taker = self._peer("Isend", dest, 0, f"for rank {{}} to take {nbytes} bytes")
            link.send(slot, [nbytes], taker, written=True)
            self._record.bytes_sent += nbytes

    def _reserve(self, outgoing: Sequence[Sequence[Array]], incoming: Sequence[Kinds]) -> None:
        """Make a slot for what comes from each member, as it is heard, and then for what goes to each, or to all."""
        group = self.group
        dests = [0] if len(outgoing) == 1 else [group.downstream(hop) for hop in range(1, group.size)]
        self._link.reserve([*(_nbytes(incoming[member]) for member in self.others),
                            *(sum(x.nbytes for x in outgoing[dest]) for dest in dests)])

    def _pack(self, slot: int, arrays: Sequence[Array]) -> None:
        """Write arrays into a slot, one after the other."""
        views = self._link.views(slot, [x.shape for x in arrays], [x.dtype for x in arrays])
        for view, x in zip(views, arrays, strict=True):
            assign(view, x)

    def take(self, member: int) -> tuple[Array, ...]:
        """Wait for the arrays of another member; they are there until `end`. Local, but for the wait."""
        hop = (self.group.index - member) % self.group.size
        if member in self._arriving:
            self._record.wait_seconds += self._wait([self._arriving[member]])
        shapes = [shape for shape, _ in self._kinds[member]]
        return self._link.views(hop - 1, shapes, [dtype for _, dtype in self._kinds[member]])

    def end(self) -> None:
        """Wait until all has been taken; what `take` gave has been read. Local, but for the wait."""
        if self.group.size == 1:
            return
        self._record.wait_seconds += self._wait(self._link.transfers)
        self._link.end_step()
        self._arriving = {}

    def cancel(self) -> None:
        """Give up what is under way; see `Mover.cancel`. Local."""
        super().cancel()
        self._arriving = {}

    def _where(self) -> str:
        return f"{self.comm.name()}, exchange of {self._record.what}"


def _nbytes(kinds: Kinds) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds)
