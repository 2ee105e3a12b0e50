"""The contract of a schedule: which rank computes with which block at which step, and what travels meanwhile.

A schedule yields items of work, each while the blocks of later ones are on their way. It moves bytes, and knows
neither backend nor mask: of the mask it is told which rank needs which block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..mpi.comm import Comm
from ..mpi.notices import NOTICE_TAG
from ..trace import Step, Trace
from .links import Array, Link, Peer, Shape, Transfer
from .waits import Joined, Vote, describe

MOST_RANKS = 64             # that are told to be waited for; more count as all
TAGS = NOTICE_TAG // 3      # that many for blocks, and for gradients that are passed on; one for those that come home


@dataclass(frozen=True, eq=False)
class Route:
    """Who computes with which block, and how far away that is.

    Attributes
    ----------
    needed : bool array of shape (size, size)
        ``needed[rank, source]``: rank computes with the block of source.
    """

    needed: NDArray[np.bool_]

    @cached_property
    def first(self) -> list[int]:
        """For each rank's block, hops downstream to the first other rank that computes with it; 0 if none does."""
        hops: list[int] = self._by_hop.argmax(axis=0).tolist()
        return hops

    @cached_property
    def last(self) -> list[int]:
        """For each rank's block, hops downstream to the last other rank that computes with it; 0 if none does."""
        by_hop = self._by_hop
        hops: list[int] = np.where(by_hop.any(axis=0), len(by_hop) - 1 - by_hop[::-1].argmax(axis=0), 0).tolist()
        return hops

    @property
    def _by_hop(self) -> NDArray[np.bool_]:
        """``[hop, owner]``: the rank that many hops downstream of the owner is another one and needs its block."""
        ranks = np.arange(len(self.needed))
        by_hop: NDArray[np.bool_] = self.needed[(ranks + ranks[:, None]) % len(ranks), ranks]
        by_hop[0] = False
        return by_hop


@dataclass(frozen=True, eq=False)
class Blocks:
    """A block on each rank: arrays of one dtype, this rank's, and the shapes of all.

    Attributes
    ----------
    own : sequence of arrays
        This rank's block, in the memory of the schedule's links: C-contiguous on GPUs, on the host with any gaps.
    shapes : for each rank, the shapes of its arrays
    """

    own: Sequence[Array]
    shapes: Sequence[Sequence[Shape]]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of all arrays."""
        dtype: np.dtype[Any] = self.own[0].dtype
        return dtype

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Bytes of each array of each rank's block."""
        return block_sizes(self.shapes, self.dtype)


@dataclass(frozen=True)
class Work:
    """An item of work: the queries of a rank with the keys and values of a rank.

    Attributes
    ----------
    step : Step
        Takes the figures.
    queries : int
        The rank whose queries they are; with the schedules there are, always this one.
    source : int
        The rank whose block it is.
    arrays : tuple of arrays
        The block, valid until the next item is asked for.
    gradients : tuple of arrays
        In a backward pass, arrays to add this rank's share to before the next item is asked for.
    following : int, optional
        The `source` of this rank's next item; None after the last.
    """

    step: Step
    queries: int
    source: int
    arrays: tuple[Array, ...]
    gradients: tuple[Array, ...]
    following: int | None


class Message(NamedTuple):
    """What a rank sends to another in a step, in one message or several."""

    source: int
    dest: int
    owner: int                  # whose block, or the gradients of whose block
    nbytes: int
    gradients: bool = False


class Schedule:
    """What all schedules have in common. One pass at a time, and none after a failure.

    Parameters
    ----------
    comm : Comm
    new_link : callable
        Makes a `Link`, of the same kind on every rank.
    clear : callable
        Fills an array with zeros.
    add : callable
        Adds the second array to the first.

    Attributes
    ----------
    timeout : float
        Seconds after which a wait for another rank is an error.
    stopped : bool
        Whether the last pass was left before its end, because a rank asked for it.
    """

    name = ""
    path_text = ""              # how a block reaches n other ranks, for display: "in {} hops"

    def __init__(self, comm: Comm, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None]) -> None:
        self.comm = comm
        self.timeout = 0.0
        self.stopped = False
        self._clear = clear
        self._add = add
        self._step = Step(0, comm.rank)
        self._awaited: list[Transfer] = []      # what is waited for now
        self._vote: Vote | None = None

    @property
    def links(self) -> list[Link]:
        """Every link that may have something under way."""
        raise NotImplementedError

    def reserve(self, route: Route, sizes: Sequence[Sequence[int]],
                gradient_sizes: Sequence[Sequence[int]] | None = None) -> None:
        """Make the buffers of a pass, unless those there are large enough. Local.

        Parameters
        ----------
        route : Route
        sizes, gradient_sizes
            For each rank, the bytes of the arrays of its block, and of their gradients in a backward pass.
        """
        raise NotImplementedError

    def forward(self, blocks: Blocks, route: Route, trace: Trace,
                stop: Callable[[], bool] | None = None) -> Iterator[Work]:
        """Yield this rank's work with every block that it needs. Collective over *comm*.

        Every rank must take all its items, or call `abandon`.

        Parameters
        ----------
        blocks : Blocks
            K and V. Not changed.
        route : Route
        trace : Trace
            A `Step` for each step is added, idle ones included.
        stop : callable, optional
            Asked at each step, on every rank or on none: True leaves the loop after a step, the same on all ranks.
            What was yielded by then has been computed everywhere, and the communicator is as good as before.

        Raises
        ------
        RingTimeout, RankLost
            If another rank does not send or take a block in time, or is gone. The communicator is lost then.
        """
        raise NotImplementedError

    def backward(self, blocks: Blocks, gradients: Blocks, route: Route, trace: Trace,
                 stop: Callable[[], bool] | None = None) -> Iterator[Work]:
        """Yield this rank's work with every block that it needs, and bring what is added to its gradients home.

        Collective over *comm*.

        Parameters
        ----------
        blocks, route, trace
            See `forward`.
        gradients : Blocks
            The gradient of this rank's block, which the shares of all ranks are added to.
        stop : callable, optional
            See `forward`. The gradients are of no use then.

        Raises
        ------
        RingTimeout, RankLost
            See `forward`.
        """
        raise NotImplementedError

    @staticmethod
    def steps(route: Route, sizes: Sequence[Sequence[int]],
              gradient_sizes: Sequence[Sequence[int]] | None = None) -> list[list[Message]]:
        """Say what all ranks send at each step, from the sizes alone. Local, and without MPI.

        Parameters
        ----------
        route : Route
        sizes, gradient_sizes
            See `reserve`.
        """
        raise NotImplementedError

    @staticmethod
    def buffer_blocks(ranks: int, on_gpu: bool) -> int:
        """Say how many blocks of K and V a rank has buffers for in a forward pass, at most. Local."""
        raise NotImplementedError

    def progress(self) -> None:
        """Let MPI move what is on its way; call it every few milliseconds while computing. Local.

        Raises
        ------
        RankLost
            If another rank is gone.
        """
        under_way = [transfer for link in self.links for transfer in link.transfers]
        joined = Joined(under_way)
        self.comm.progress(joined.requests, lambda: describe(self._where(), under_way), joined.advance)

    def abandon(self, error: BaseException) -> None:
        """Leave a pass in mid-way because of an error on this rank; the other ranks are told. Local."""
        self.comm.give_up(error, [])
        for link in self.links:
            self.comm.keep_alive(link.cancel())
        self._forget()
        if self._vote:
            self.comm.keep_alive([self._vote])

    def _forget(self) -> None:
        """Let go of what the pass was about."""

    def _steps(self, trace: Trace, stop: Callable[[], bool] | None) -> Iterator[Step]:
        """Yield one step after the other, with the block of a rank one farther away; no more once a rank has asked.

        What `_wait` waits for at the end of a step includes the answer of all ranks.
        """
        size, rank = self.comm.size, self.comm.rank
        self.stopped = False
        for number in range(size):
            step = self._step = Step(number, (rank - number) % size, trace.now())
            trace.steps.append(step)
            self.comm.place = f", {self.name} step {number} of {size}"
            self._vote = Vote(self.comm, stop()) if stop and number < size - 1 else None
            yield step
            if self._leaves():
                self.stopped = True
                return

    def _leaves(self) -> bool:
        """Say, after the wait at the end of a step, whether it is the last because a rank asked for that."""
        return self._vote is not None and self._vote.passed

    def _work(self, step: Step, route: Route, arrays: tuple[Array, ...], gradients: tuple[Array, ...]) -> Work:
        """Make the item of work of a step."""
        size, rank = self.comm.size, self.comm.rank
        later = ((rank - number) % size for number in range(step.step + 1, size))
        following = next((source for source in later if route.needed[rank, source]), None)
        return Work(step, rank, step.source, arrays, gradients, following)

    def _peer(self, call: str, rank: int, tag: int, what: str) -> Peer:
        return Peer(rank, self.comm.message_starter(call, rank, tag), what)

    def _wait(self, transfers: Sequence[Transfer]) -> float:
        """Wait for some transfers, and let all advance; return the seconds it took."""
        self._awaited = [*transfers, *([self._vote] if self._vote else [])]
        joined = Joined(self._awaited, self.links)
        try:
            return self.comm.wait(joined.requests, self.timeout, lambda: describe(self._where(), self._late()),
                                  joined.advance, self._late_ranks)
        finally:
            self._awaited = []                   # they refer to buffers

    def _late(self) -> list[Transfer]:
        """Give what is waited for and not done; all that is waited for, if it has been done meanwhile."""
        return [transfer for transfer in self._awaited if not transfer.done()] or self._awaited

    def _late_ranks(self) -> list[int]:
        """Give the ranks that are waited for; none means all."""
        late = self._late()
        ranks = {transfer.peer.rank for transfer in late}
        return [] if self._vote in late or len(ranks) > MOST_RANKS else sorted(ranks)

    def _where(self) -> str:
        return f"{self.comm.name()}, {self.name} step {self._step.step} of {self.comm.size}"


def block_sizes(shapes: Sequence[Sequence[Shape]], dtype: np.dtype[Any]) -> list[list[int]]:
    """Give the bytes of each array of each rank's block, from the shapes of the arrays. Local."""
    return [[math.prod(shape) * dtype.itemsize for shape in theirs] for theirs in shapes]


def largest(sizes: Sequence[Sequence[int]]) -> int:
    """Give the bytes of the largest block of any rank. Local."""
    return max(map(sum, sizes))
