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

from .mpi import FAILED_TAG, Comm, load
from .trace import Step, Trace

TAGS = FAILED_TAG          # of the ring, from 0; messages of one pair keep their order anyway
MESSAGE_BYTES = 2**28      # Open MPI 5 counts bytes in 32 bits; smaller messages also give finer timeouts


@dataclass(frozen=True)
class Block:
    """What is at this rank at a step: the arrays of rank `source`."""

    step: Step
    source: int
    arrays: tuple[NDArray[Any], ...]


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
    """Two buffers and the messages between them.

    Parameters
    ----------
    comm : Comm
    timeout : float
        Seconds after which a wait for a neighbour is an error.
    """

    def __init__(self, comm: Comm, timeout: float) -> None:
        self.comm = comm
        self.timeout = timeout
        self._buffers: list[NDArray[np.uint8]] = []
        self._incoming: list[Any] = []
        self._outgoing: list[Any] = []
        self._step = Step(0, comm.rank)

    def reserve(self, nbytes: int) -> None:
        """Make the two buffers, unless those there are large enough. Local.

        Parameters
        ----------
        nbytes : int
            Size of the largest block of any rank; one rank alone needs no buffer.
        """
        if self.comm.size > 1 and (not self._buffers or len(self._buffers[0]) < nbytes):
            self._buffers = [np.empty(nbytes, np.uint8) for _ in range(2)]

    def progress(self) -> None:
        """Let MPI move what is on its way; call it every few milliseconds while computing. Local.

        Raises
        ------
        RankLost
            If a neighbour is gone.
        """
        if self._incoming or self._outgoing:
            self.comm.test(self._incoming + self._outgoing, self._describe)

    def abandon(self, error: BaseException) -> None:
        """Leave the ring in mid-way because of an error on this rank; the other ranks are told. Local."""
        self.comm.fail(error, [*self._incoming, *self._outgoing, self._buffers])
        self._buffers, self._incoming, self._outgoing = [], [], []

    def circulate(self, arrays: Sequence[NDArray[Any]], shapes: Sequence[Sequence[tuple[int, ...]]],
                  hops: Sequence[int], trace: Trace) -> Iterator[Block]:
        """Yield this rank's block, then those of the ranks before it, each while the next is on its way.

        Collective over *comm*: every rank must take all its blocks, or say `abandon`. At most ``size - 1`` hops.

        Parameters
        ----------
        arrays : sequence of C-contiguous arrays, all of one dtype
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
        size, rank = self.comm.size, self.comm.rank
        dtype = arrays[0].dtype
        sizes = [sum(math.prod(shape) for shape in theirs) * dtype.itemsize for theirs in shapes]
        self.reserve(max(sizes))
        here = self._load(arrays)
        for number in range(size):
            source, following = (rank - number) % size, (rank - number - 1) % size
            step = self._step = Step(number, source)
            trace.steps.append(step)
            if hops[following] > number:
                step.bytes_received = sizes[following]
                self._incoming = self._post("Irecv", number + 1, sizes[following], self.comm.source, number)
            if hops[source] > number:
                step.bytes_sent = sizes[source]
                self._outgoing = self._post("Isend", number, sizes[source], self.comm.dest, number)
            if hops[source] >= number:
                yield Block(step, source, here if number == 0 else self._views(number, shapes[source], dtype))
            step.wait_seconds = self.comm.wait(self._incoming + self._outgoing, self.timeout, self._describe)
            self._incoming, self._outgoing = [], []

    def _load(self, arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        if self.comm.size == 1:
            return tuple(arrays)
        views = self._views(0, [a.shape for a in arrays], arrays[0].dtype)
        for view, array in zip(views, arrays, strict=True):
            view[...] = array
        return views

    def _views(self, number: int, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]) -> tuple[NDArray[Any], ...]:
        views, start = [], 0
        for shape in shapes:
            stop = start + math.prod(shape) * dtype.itemsize
            views.append(self._buffers[number % 2][start:stop].view(dtype).reshape(shape))
            start = stop
        return tuple(views)

    def _post(self, call: str, number: int, nbytes: int, peer: int, tag: int) -> list[Any]:
        buffer = self._buffers[number % 2]
        start, byte = getattr(self.comm.ring, call), load().BYTE
        return [start([buffer[at:min(at + MESSAGE_BYTES, nbytes)], byte], peer, tag % TAGS)
                for at in range(0, nbytes, MESSAGE_BYTES)]

    def _describe(self) -> str:
        comm, step = self.comm, self._step
        parts = {f"for {step.bytes_received} bytes from rank {comm.source}": self._incoming,
                 f"for rank {comm.dest} to take {step.bytes_sent} bytes": self._outgoing}
        late = [text for text, requests in parts.items() if any(requests)]      # one that is done is null, so false
        return (f"rank {comm.rank} on {socket.gethostname()}, ring step {step.step} of {comm.size}: waited "
                f"{' and '.join(late or parts)}")
