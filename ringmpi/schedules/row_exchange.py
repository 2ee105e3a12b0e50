"""Rows that change their ranks: packed by destination, moved over a link, and put in order where they arrive."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError
from ..layout import Integers, Layout
from ..mpi.comm import Comm
from .group import Group
from .links import Array, Link
from .mover import Mover

TAG = 0
NONE: Integers = np.empty(0, np.int64)


class HostMemory:
    """The host's memory, by those methods of `Device` that moving rows takes. Local."""

    sure_bytes = 2**20            # what a rank always has memory for

    def current(self) -> AbstractContextManager[None]:
        """Do nothing: see `Device.current`."""
        return nullcontext()

    def contiguous(self, x: NDArray[Any]) -> NDArray[Any]:
        """Give `x` itself if it is C-contiguous, else a copy that is."""
        return np.ascontiguousarray(x)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Make an array, not initialised."""
        return np.empty(shape, dtype)

    def take_rows(self, target: NDArray[Any], source: NDArray[Any], rows: Integers) -> None:
        """Copy rows of a contiguous array, by their numbers, into another one."""
        np.take(source, rows, axis=0, out=target, mode="clip")       # any other mode makes a copy of `target`

    def caller_stream(self) -> None:
        """Give the stream of the host: none."""

    def record(self, stream: None) -> SimpleNamespace:
        """Mark what was done so far: all of it."""
        return SimpleNamespace(done=True)


def owned_mask(by: Layout, rank: int, positions: Integers) -> NDArray[np.bool_]:
    """Say which of `positions` are on `rank` under layout `by`. Local."""
    return by.count_below(positions + 1, rank) > by.count_below(positions, rank)


def row_numbers(layout: Layout, other: Layout, rank: int) -> list[Integers]:
    """Give the numbers of a rank's rows under a layout, for each rank those that it has under the other. Local."""
    positions = layout.positions(rank)
    return [np.flatnonzero(owned_mask(other, owner, positions)) for owner in range(layout.size)]


class RowExchange(Mover):
    """One exchange of rows between all ranks; see `Mover`. Collective over *comm*.

    Parameters
    ----------
    old, new : Layout
    comm : Comm
    timeout : float
    memory : HostMemory or Device
        Where the rows are, and go.
    link : Link
        A new one, of that memory.
    """

    def __init__(self, old: Layout, new: Layout, comm: Comm, timeout: float, memory: Any, link: Link) -> None:
        super().__init__(comm, Group.everyone(comm))
        self.timeout = timeout
        self._old = old
        self._new = new
        self._memory = memory
        self._link = link
        self._incoming: list[int] = []         # bytes from each rank, and to each
        self._outgoing: list[int] = []

    @property
    def links(self) -> list[Link]:
        """Every link that may have something under way."""
        return [self._link]

    def run(self, shard: Array) -> Array:
        """Pack the rows by destination, exchange them, put them in the order of their new positions."""
        memory = self._memory
        row_bytes = math.prod(shard.shape[1:]) * shard.dtype.itemsize
        largest = max(*self._old.counts, *self._new.counts) * row_bytes
        with memory.current():         # within it once more where ranks agree: what is raised is to be an error of ours
            with self._agreed(largest), memory.current():
                received, order = self._pack(shard, row_bytes)
                result = memory.empty(received.shape, shard.dtype)
            self._move()
            with self._agreed(0), memory.current():
                memory.take_rows(result, received, order)
                self._settle(result, received)
        return result

    def _agreed(self, nbytes: int) -> AbstractContextManager[None]:
        """Let all ranks fail if one may: memory runs out on one, and a GPU's errors come late."""
        return self.comm.raise_on_all(self.timeout) if nbytes > self._memory.sure_bytes else nullcontext()

    def _pack(self, shard: Array, row_bytes: int) -> tuple[Array, Integers]:
        """Make room for what comes in and goes out, and put into it the rows that go and those that stay.

        Returns
        -------
        received : array
            The rows of the result, those of each other rank together, then those that were here before.
        order : int array
            Which of them is which row of the result.
        """
        # Which rows go, come and stay.
        rank = self.comm.rank
        sent = row_numbers(self._old, self._new, rank)
        wanted = row_numbers(self._new, self._old, rank)
        staying, arriving = sent[rank], wanted[rank]
        sent[rank], wanted[rank] = NONE, NONE
        self._incoming, self._outgoing = ([len(rows) * row_bytes for rows in each] for each in (wanted, sent))
        going, order = np.concatenate(sent), _inverse(np.concatenate([*wanted, arriving]))

        # What stays comes last, so that it is packed straight into its place.
        pieces = self._link.reserve_exchange(self._incoming, self._outgoing, len(staying) * row_bytes)
        received, packed = (piece.view(shard.dtype).reshape((len(rows), *shard.shape[1:]))
                            for piece, rows in zip(pieces, (order, going), strict=True))
        self._memory.take_rows(packed, shard, going)
        self._memory.take_rows(received[len(order) - len(staying):], shard, staying)
        return received, order

    def _move(self) -> None:
        """Send what is packed to where it belongs, and receive the rest. Collective over *comm*."""
        group = self.group
        link = self._link
        try:
            link.begin()
            for hop in range(1, group.size):        # all in one order, as a staged link takes one after the other
                source, dest = group.upstream(hop), group.downstream(hop)
                nbytes = self._incoming[source]
                if nbytes:
                    sender = self._peer("Irecv", source, TAG, f"for {nbytes} bytes from rank {{}}")
                    link.receive(source, [nbytes], sender)
                nbytes = self._outgoing[dest]
                if nbytes:
                    taker = self._peer("Isend", dest, TAG, f"for rank {{}} to take {nbytes} bytes")
                    link.send(group.size + dest, [nbytes], taker, written=True)
            self._wait(link.transfers)
        except BaseException as error:
            self.abandon(error)
            raise

    def _settle(self, *used: Array) -> None:
        """Wait until this rank's GPU has done all, with a deadline; raise what it failed by."""
        done = self._memory.record(self._memory.caller_stream())
        failures: list[BackendError] = []

        def settled() -> bool:
            try:
                return bool(done.done)
            except BackendError as error:         # the wait is over; all ranks are to hear why
                failures.append(error)
                return True

        try:
            self.comm.wait([], self.timeout, lambda: f"{self._where()}: waited for this rank's GPU to put rows in "
                                                       "order", settled)
        except BaseException:
            self.comm.keep_alive([self._link, *used])         # to free them would mean to wait for the GPU
            raise
        for failure in failures:
            raise failure

    def _where(self) -> str:
        return f"{self.comm.name()}, redistribute"


def _inverse(order: Integers) -> Integers:
    """Give, for the numbers 0, 1, ... in any order, where each of them is."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places
