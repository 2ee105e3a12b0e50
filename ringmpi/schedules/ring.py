"""The ring schedule: K and V pass from neighbour to neighbour while every rank computes on what it has.

A schedule is an iterator over blocks that has already started to move the next one. It moves bytes and
knows neither backend nor mask; of the mask it is told how far each block must travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..mpi.comm import Comm
from ..trace import Step, Trace
from .gradient_ring import TAGS, Homeward, block_sizes
from .links import HostLink


@dataclass(frozen=True)
class Block:
    """What is at this rank at a step: the arrays of rank `source`, in the memory of the ring's link."""

    step: Step
    source: int
    arrays: tuple[Any, ...]
    gradients: tuple[Any, ...] = ()


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
        self._links: list[HostLink] = [self._link]
        self._homeward: Homeward | None = None
        self._draining = False         # whether all blocks are done, and gradients alone are waited for
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
        together = _Joined([link for link in self._links if link.incoming or link.outgoing])
        self.comm.progress(together.requests, self._describe, together.advance)

    def abandon(self, error: BaseException) -> None:
        """Leave the ring in mid-way because of an error on this rank; the other ranks are told. Local."""
        self.comm.give_up(error, [])
        for link in self._links:
            self.comm.keep_alive(link.drop())

    def circulate(self, arrays: Sequence[Any], shapes: Sequence[Sequence[tuple[int, ...]]],
                  hops: Sequence[int], trace: Trace, homeward: Homeward | None = None) -> Iterator[Block]:
        """Yield this rank's block, then those of the ranks before it, each while the next is on its way.

        Collective over *comm*: every rank must take all its blocks, or say `abandon`. At most ``size - 1`` hops.

        Parameters
        ----------
        arrays : sequence of C-contiguous arrays, all of one dtype, in the memory of the link
            This rank's block (K and V). Not changed.
        shapes : for each rank, the shapes of its arrays
        hops : for each rank, how far its block travels
            See `travel`.
        trace : Trace
            A `Step` for each position of the ring is added.
        homeward : Homeward, optional
            For gradients; it has taken the same shapes and hops.

        Yields
        ------
        Block
            Its arrays are views of a buffer, valid until the next block is asked for. With `homeward`, what is added
            to its gradients by then goes home.

        Raises
        ------
        RingTimeout, RankLost
            If a neighbour does not send or take a block in time, or is gone. The communicator is lost then.
        """
        size, rank, link = self.comm.size, self.comm.rank, self._link
        dtype = arrays[0].dtype
        sizes = block_sizes(shapes, dtype)
        self._draining, self._homeward, self._links = False, homeward, [link, *(homeward.links if homeward else ())]
        moving, sums = self._links[:2], self._links[1:]
        self.reserve(max(map(sum, sizes)))
        link.begin()
        if homeward:
            homeward.begin()
        here = link.load(arrays) if size > 1 else tuple(arrays)
        for number in range(size):
            source, following = (rank - number) % size, (rank - number - 1) % size
            step = self._step = Step(number, source, trace.now())
            trace.steps.append(step)
            self.comm.place = f", ring step {number} of {size}"
            if hops[following] > number:
                step.bytes_received = sum(sizes[following])
                link.receive(number + 1, sizes[following],
                             self.comm.message_starter("Irecv", self.comm.source, number % TAGS))
            if hops[source] > number:
                step.bytes_sent = sum(sizes[source])
                link.send(number, sizes[source], self.comm.message_starter("Isend", self.comm.dest, number % TAGS))
            if hops[source] >= number:
                yield Block(step, source, here if number == 0 else link.views(number, shapes[source], dtype),
                            homeward.open(step) if homeward else ())
            step.wait_start = trace.now()
            step.wait_seconds = self._wait(moving)
            link.settle()
            if homeward:
                homeward.close(step)
        if homeward:
            self._draining = True
            step.wait_seconds += self._wait(sums)
            homeward.finish()

    def _wait(self, links: Sequence[HostLink]) -> float:
        """Wait for some links, and let all advance; return the seconds it took."""
        together = _Joined(links, [link for link in self._links if link not in links])
        return self.comm.wait(together.requests, self.timeout, self._describe, together.advance,
                              lambda: [peer for _, peer in self._late()])

    def _late(self) -> list[tuple[str, int]]:
        """Give what is waited for in this step, in words, and the rank at the other end."""
        comm, step, link = self.comm, self._step, self._link
        ways = [(link.incoming, f"for {step.bytes_received} bytes from rank {comm.source}", comm.source),
                (link.outgoing, f"for rank {comm.dest} to take {step.bytes_sent} bytes", comm.dest)]
        if self._homeward:
            ways += self._homeward.ways(step, self._draining)
        late = [(f"{text} {way.obstacle()}".rstrip(), peer) for way, text, peer in ways if way and not way.done()]
        return late or [(text, peer) for _, text, peer in ways]

    def _describe(self) -> str:
        return (f"{self.comm.name()}, ring step {self._step.step} of {self.comm.size}: waited "
                f"{' and '.join(text for text, _ in self._late())}")


class _Joined:
    """Several links as one: the messages of `links`, which are waited for, and all that must advance meanwhile."""

    def __init__(self, links: Sequence[HostLink], others: Sequence[HostLink] = ()) -> None:
        self._links, self._others = links, others
        self.requests: list[Any] = []

    def advance(self) -> bool:
        """Do what has become possible; say whether nothing but `requests` is left. Local."""
        for link in self._others:
            link.advance()
        nothing_else = [link.advance() for link in self._links]
        self.requests[:] = [request for link in self._links for request in link.requests]
        return all(nothing_else)
