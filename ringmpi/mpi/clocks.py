"""How far the clocks of ranks are apart: what a timeline of several ranks needs."""

from __future__ import annotations

import time

import numpy as np

from .comm import Comm

PINGS = 8            # to and fro, to compare two clocks


def clock_offset(comm: Comm, timeout: float) -> float:
    """Give what `time.perf_counter` of rank 0 is ahead of this rank's, in seconds. Collective over *comm*.

    Each rank in turn sends rank 0 a message and gets its clock back, some times; the quickest answer counts, and is
    taken to have been given half way (Cristian 1989, *Probabilistic clock synchronization*).

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
    """Ask rank 0 for its clock: the seconds that it took, and what that clock is ahead."""
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
