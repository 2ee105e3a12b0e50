"""The offsets between the clocks of ranks, which a timeline of several ranks needs."""

from __future__ import annotations

import time

import numpy as np

from .comm import Comm

PINGS = 8            # round trips, to compare two clocks


def clock_offset(comm: Comm, timeout: float) -> float:
    """Give by how many seconds rank 0's `time.perf_counter` is ahead of this rank's. Collective over *comm*.

    Each rank in turn asks rank 0 for its clock several times. The quickest round trip counts, and rank 0 is taken to
    have read its clock halfway through it (Cristian 1989, *Probabilistic clock synchronization*).

    Raises
    ------
    RingTimeout, RankLost
        If a rank does not answer in time, or is gone.
    """
    offset = 0.0
    for rank in range(1, comm.size):
        comm.exchange("", timeout)             # one after the other: rank 0 answers at once
        if comm.rank == 0:
            for _ in range(PINGS):
                _message(comm, "Irecv", np.zeros(1), rank, timeout)
                _message(comm, "Isend", np.array([time.perf_counter()]), rank, timeout)
        elif comm.rank == rank:
            offset = min(_ask(comm, timeout) for _ in range(PINGS))[1]
    return offset


def _ask(comm: Comm, timeout: float) -> tuple[float, float]:
    """Ask rank 0 for its clock; return the seconds of the round trip, and by how much that clock is ahead."""
    clock = np.zeros(1)
    start = time.perf_counter()
    _message(comm, "Isend", clock, 0, timeout)
    _message(comm, "Irecv", clock, 0, timeout)
    stop = time.perf_counter()
    return stop - start, float(clock[0]) - (start + stop) / 2


def _message(comm: Comm, call: str, clock: np.ndarray, peer: int, timeout: float) -> None:
    request = comm.message_starter(call, peer, 0)(clock.view(np.uint8))
    comm.wait([request], timeout, lambda: f"{comm.name()} waited for rank {peer} to compare clocks",
              peers=lambda: (peer,))
