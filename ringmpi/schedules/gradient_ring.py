"""The gradients of K and V on their way home.

Each rank computes its own share of a block's gradient in the step in which the block is there, while the sum of the
ranks before it comes in; then it adds the two and passes them on. The owner keeps its own share. The last rank that
computes with a block sends the sum straight home, so that a block of a causal mask does not go round in vain: one
message for each block but from neighbour to neighbour. Sums travel in the accumulator's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..mpi.comm import Comm
from ..mpi.notices import NOTICE_TAG
from ..trace import Step
from .links import HostLink, Transfer

TAGS = NOTICE_TAG // 3      # of blocks, of sums, and then one of sums that come home
Array = Any                 # of NumPy, or of a device


def first_hops(needed: NDArray[np.bool_]) -> list[int]:
    """Say how far each block is from its owner when another rank first computes with it; 0 if none does. Local.

    Parameters
    ----------
    needed : bool array of shape (size, size)
        ``needed[rank, source]``: rank computes with the block of source.
    """
    size = len(needed)
    return [min((hop for hop in range(1, size) if needed[(source + hop) % size, source]), default=0)
            for source in range(size)]


def block_sizes(shapes: Sequence[Sequence[tuple[int, ...]]], dtype: np.dtype[Any]) -> list[list[int]]:
    """Give the bytes of each array of each rank's block, from the shapes of the arrays. Local."""
    return [[math.prod(shape) * dtype.itemsize for shape in theirs] for theirs in shapes]


class Homeward:
    """Sums that go from rank to rank behind the blocks of a `Ring`, which drives this.

    Parameters
    ----------
    comm : Comm
    new_link : callable
        Makes a link of ``(slots, written)``; of the kind that the ring has.
    clear : callable
        Fills an array with zeros.
    add : callable
        Adds the second array to the first.
    """

    def __init__(self, comm: Comm, new_link: Callable[[int, bool], HostLink], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None]) -> None:
        self._comm, self._clear, self._add = comm, clear, add
        self._arrays: Sequence[Array] = ()
        self._taker = self._last = comm.rank      # who takes the sum going out, and who sends this rank's own home
        # Slot n % 3 takes this rank's share of step n, while (n + 1) % 3 takes the sum coming in, and (n - 1) % 3, of
        # the step before, goes out.
        self._chain, self._home = new_link(3, True), new_link(1, False)

    @property
    def links(self) -> tuple[HostLink, HostLink]:
        """What goes from neighbour to neighbour, and what comes home."""
        return self._chain, self._home

    def reserve(self, nbytes: int) -> None:
        """Make the buffers for the sums of blocks, of up to `nbytes` bytes. Local."""
        if self._comm.size > 1:
            self._chain.reserve(nbytes)
            self._home.reserve(nbytes)

    def take(self, arrays: Sequence[Array], shapes: Sequence[Sequence[tuple[int, ...]]], hops: Sequence[int],
             firsts: Sequence[int]) -> None:
        """Take what the next pass over all blocks is about. Local.

        Parameters
        ----------
        arrays : sequence of arrays, all of one dtype
            The gradient of this rank's block, which its own share and then those of the others are added to.
        shapes : for each rank, the shapes of its arrays
        hops, firsts : for each rank, where the last and the first other rank that computes with its block is
            See `ring.travel` and `first_hops`.
        """
        self._arrays, self._shapes, self._hops, self._firsts = arrays, shapes, hops, firsts
        self._sizes = block_sizes(shapes, arrays[0].dtype)

    def begin(self) -> None:
        """Begin the pass: be ready for what comes home. Local."""
        comm, hops = self._comm, self._hops
        if comm.size > 1:
            self.reserve(max(map(sum, self._sizes)))
            self._chain.begin()
            self._home.begin()
            if hops[comm.rank]:
                self._last = (comm.rank + hops[comm.rank]) % comm.size
                self._home.receive(0, self._sizes[comm.rank], comm.message_starter("Irecv", self._last, 2 * TAGS))

    def open(self, step: Step) -> tuple[Array, ...]:
        """Give the arrays that this rank's share of a step is added to; the sum so far starts to come in. Local."""
        number, source = step.step, step.source
        if number == 0:
            return tuple(self._arrays)
        share = self._views(number, source)
        for x in share:
            self._clear(x)
        if self._comes(number, source):
            self._chain.receive(number + 1, self._sizes[source], self._comm.message_starter("Irecv", self._comm.source,
                                                                                   TAGS + (number - 1) % TAGS))
        return share

    def close(self, step: Step) -> None:
        """Add what came in to this rank's share, when both are there, and pass the sum on, or home. Local."""
        number, source, comm = step.step, step.source, self._comm
        if number and self._comes(number, source):
            for share, others in zip(self._views(number, source), self._views(number + 1, source), strict=True):
                self._add(share, others)
        self._chain.settle()
        if number and self._firsts[source] <= number <= self._hops[source]:
            step.gradient_bytes_sent = sum(self._sizes[source])
            home = number == self._hops[source]
            self._taker = source if home else comm.dest
            tag = 2 * TAGS if home else TAGS + number % TAGS
            self._chain.send(number, self._sizes[source], comm.message_starter("Isend", self._taker, tag))

    def finish(self) -> None:
        """Add what has come home; let go of the arrays. Local."""
        self._chain.settle()           # of what the last step sent
        if self._comm.size > 1 and self._hops[self._comm.rank]:
            theirs = self._home.views(0, self._shapes[self._comm.rank], self._arrays[0].dtype)
            for x, y in zip(self._arrays, theirs, strict=True):
                self._add(x, y)
        self._home.settle()
        self._arrays = ()

    def ways(self, step: Step, last: bool) -> list[tuple[Transfer | None, str, int]]:
        """Give what is waited for in a step, and after the last one: in words, and with the other end's rank. Local."""
        source, taker = self._comm.source, self._taker
        ways = [(self._chain.incoming, f"for the gradients of rank {step.source}'s block from rank {source}", source),
                (self._chain.outgoing, f"for rank {taker} to take the gradients of a block", taker)]
        return [*ways, (self._home.incoming, "for its own gradients to come home", self._last)] if last else ways

    def _comes(self, number: int, source: int) -> bool:
        return self._firsts[source] < number <= self._hops[source]

    def _views(self, number: int, source: int) -> tuple[Array, ...]:
        return self._chain.views(number, self._shapes[source], self._arrays[0].dtype)
