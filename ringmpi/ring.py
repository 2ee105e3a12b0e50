"""The ring schedule: K and V pass from neighbour to neighbour while every rank computes on what it has.

A schedule is an iterator over blocks that has already started to move the next one. It moves bytes and
knows neither backend nor mask; of the mask it is told how far each block must travel.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .link import HostLink, Post
from .mpi import FAILED_TAG, Comm, load
from .trace import Step, Trace

TAGS = FAILED_TAG          # of the ring, from 0; messages of one pair keep their order anyway


@dataclass(frozen=True)
class Block:
    """What is at this rank at a step: the arrays of rank `source`, in the memory of the ring's link."""

    step: Step
    source: int
    arrays: tuple[Any, ...]


def travel(needed: NDArray[np.bool_]) -> list[int]:
    """Say how many hops each block must travel. Local.

    Parameters
    ----------
    needed : bool array of shape (size, size)
        ``needed[rank, source]``: rank computes with the block of source.

    Returns
    -------
    list of int
        Hops to the farthest rank downstream that needs the block; 0 if none but the owner does.
    """
    size = len(needed)
    return [max((hop for hop in range(size) if needed[(source + hop) % size, source]), default=0)
            for source in range(size)]


class Ring:
    """Blocks that pass from rank to rank, over a link that has their buffers.

    Parameters
    ----------
    comm : Comm
    timeout : float
        Seconds after which a wait for a neighbour is an error.
    link : HostLink, DirectLink or StagedLink, optional
        Where blocks are and how they travel, the same kind on every rank: host memory by default. A link belongs to
        one ring.
    """

    def __init__(self, comm: Comm, timeout: float, link: HostLink | None = None) -> None:
        self.comm = comm
        self.timeout = timeout
        self._link = link or HostLink()
        self._step = Step(0, comm.rank)

    def reserve(self, nbytes: int) -> None:
        """Make the link's buffers, unless those there are large enough. Local.

        Parameters
        ----------
        nbytes : int
            Size of the largest block of any rank; one rank alone needs no buffer.
        """
        if self.comm.size > 1:
            self._link.reserve(nbytes)

    def progress(self) -> None:
        """Let MPI move what is on its way; call it every few milliseconds while computing. Local.

        Raises
        ------
        RankLost
            If a neighbour is gone.
        """
        link = self._link
        if link.incoming or link.outgoing:
            self.comm.test(link.requests, self._describe, link.advance)

    def abandon(self, error: BaseException) -> None:
        """Leave the ring in mid-way because of an error on this rank; the other ranks are told. Local."""
        self.comm.fail(error, [])
        self.comm.keep(self._link.drop())

    def circulate(self, arrays: Sequence[Any], shapes: Sequence[Sequence[tuple[int, ...]]],
                  hops: Sequence[int], trace: Trace) -> Iterator[Block]:
        """Yield this rank's block, then those of the ranks before it, each while the next is on its way.

        Collective over *comm*: every rank must take all its blocks, or say `abandon`. At most ``size - 1`` hops.

        Parameters
        ----------
        arrays : sequence of C-contiguous arrays, all of one dtype, in the memory of the link
            This rank's block (K and V). Not changed; copied once, so they need not outlive the call.
        shapes : for each rank, the shapes of its arrays
        hops : for each rank, how far its block travels
            See `travel`.
        trace : Trace
            A `Step` for each position of the ring is added.

        Yields
        ------
        Block
            Its arrays are views of a buffer, valid until the next block is asked for.

        Raises
        ------
        RingTimeout, RankLost
            If a neighbour does not send or take a block in time, or is gone. The communicator is lost then.
        """
        size, rank, link = self.comm.size, self.comm.rank, self._link
        dtype = arrays[0].dtype
        sizes = [sum(math.prod(shape) for shape in theirs) * dtype.itemsize for theirs in shapes]
        self.reserve(max(sizes))
        here = link.load(arrays) if size > 1 else tuple(arrays)
        for number in range(size):
            source, following = (rank - number) % size, (rank - number - 1) % size
            step = self._step = Step(number, source)
            trace.steps.append(step)
            if hops[following] > number:
                step.bytes_received = sizes[following]
                link.receive(number + 1, sizes[following], self._post("Irecv", self.comm.source, number))
            if hops[source] > number:
                step.bytes_sent = sizes[source]
                link.send(number, sizes[source], self._post("Isend", self.comm.dest, number))
            if hops[source] >= number:
                yield Block(step, source, here if number == 0 else link.views(number, shapes[source], dtype))
            step.wait_seconds = self.comm.wait(link.requests, self.timeout, self._describe, link.advance)
            link.settle()

    def _post(self, call: str, peer: int, tag: int) -> Post:
        start, byte = getattr(self.comm.ring, call), load().BYTE
        return lambda buffer: start([buffer, byte], peer, tag % TAGS)

    def _describe(self) -> str:
        comm, step, link = self.comm, self._step, self._link
        ways = ((link.incoming, f"for {step.bytes_received} bytes from rank {comm.source}"),
                (link.outgoing, f"for rank {comm.dest} to take {step.bytes_sent} bytes"))
        late = [f"{text} {way.obstacle()}".rstrip() for way, text in ways if way and not way.done()]
        return (f"rank {comm.rank} on {socket.gethostname()}, ring step {step.step} of {comm.size}: waited "
                f"{' and '.join(late or [text for _, text in ways])}")
