"""What ranks tell each other beside the work: who gave up, who waits and where, and how far each has got.

Notices are small messages with a tag of their own, sent when a rank has waited for long, and read whenever a rank
polls. They cost nothing as long as nobody waits, and a rank that does not answer is stopped, lost, or busy outside this
library.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOTICE_TAG = 32767            # the largest tag that every MPI has; other messages have smaller ones
LONGEST_NOTICE = 1500         # characters of the text of a rank that gives up
REPORT_SECONDS = 0.5          # between two reports of a rank's progress
GAVE_UP, QUESTION, ANSWER, PROGRESS = b"!", b"?", b"=", b"%"
NAMED = 4                     # ranks at most that a text names one by one
State = tuple[str, "Sequence[int] | None"]      # where a rank is, and whom it waits for: () is all, None nobody


class Notices:
    """Sends and reads the notices of one rank on one communicator. Local.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : MPI.Intracomm
        On which nobody else uses `NOTICE_TAG`.
    hosts : list of str
        The name of each rank's node; empty if it is not known yet.

    Attributes
    ----------
    sent : int64 array of shape (size,)
        Notices sent to each rank.
    received : int
        Notices read.
    """

    def __init__(self, mpi: Any, comm: Any, hosts: Sequence[str]) -> None:
        self._mpi = mpi
        self._comm = comm
        self.hosts = list(hosts)
        self._rank = int(comm.Get_rank())
        self._size = int(comm.Get_size())
        self._status = mpi.Status()
        self._requests: list[Any] = []
        self._heard: dict[int, tuple[float, State]] = {}      # when each rank was last heard from, and its state then
        self._asked = 0.0                                     # when this rank asked last
        self._progress = np.zeros((self._size, 2), np.int64)
        self._reported = 0.0
        self.sent = np.zeros(self._size, np.int64)
        self.received = 0

    def name(self, rank: int) -> str:
        """Name a rank and its node."""
        return f"rank {rank} on {self.hosts[rank]}" if self.hosts[rank] else f"rank {rank}"

    def give_up(self, text: str) -> list[Any]:
        """Tell all ranks that this one gives up; return the requests of messages that nobody will wait for."""
        self._tell_all(GAVE_UP, text[:LONGEST_NOTICE])
        return self._requests

    def ask(self, state: State) -> None:
        """Tell all ranks where this one is, and ask where they are."""
        self._asked = time.perf_counter()
        self._tell_all(QUESTION, json.dumps(state))

    def read(self, state: Callable[[], State]) -> str:
        """Read what has come, and answer questions; return the text of a rank that gave up, empty if none did.

        Parameters
        ----------
        state : callable
            Says where this rank is, and which ranks it waits for.
        """
        while self._comm.Iprobe(self._mpi.ANY_SOURCE, NOTICE_TAG, self._status):
            message = np.empty(self._status.Get_count(self._mpi.BYTE), np.uint8)
            rank = self._status.Get_source()
            self._comm.Recv([message, self._mpi.BYTE], rank, NOTICE_TAG)
            self.received += 1
            told = self._take(rank, message, state)
            if told:
                return told
        return ""

    def missing(self, start: float, peers: Sequence[int]) -> str:
        """Say who is missing in a wait for `peers`, or all if that is empty, that began at `start`.

        A rank that does not answer is missing. One that answers and waits itself is not, but those it waits for may be.
        If all answer, the text says where the ranks are that do not wait.
        """
        # those that do not answer, or else those that do not wait
        now = time.perf_counter()
        needed = self._needed(peers)
        silent = [rank for rank in needed if not self._answers(rank)]
        busy = [rank for rank in needed if self._answers(rank) and self._heard[rank][1][1] is None]
        if silent:
            said = [self._silence(rank, start, now) for rank in silent]
        else:
            said = [f"{self.name(rank)} is {self._heard[rank][1][0]}" for rank in busy or needed]
        # the first of them one by one
        more = f"; and {len(said) - NAMED} more" if len(said) > NAMED else ""
        return ("no word from " if silent else "") + "; ".join(said[:NAMED]) + more

    def lowest_waiting(self) -> int:
        """Give the lowest rank that is known to wait, which may be this one: it writes to the log."""
        return min([self._rank] + [rank for rank, (_, (_, peers)) in self._heard.items()
                                  if peers is not None and self._answers(rank)])

    def _answers(self, rank: int) -> bool:
        return rank in self._heard and self._heard[rank][0] >= self._asked

    def _needed(self, peers: Sequence[int]) -> list[int]:
        """Give the other ranks that a wait for `peers` depends on: them, those that they wait for, and so on."""
        everyone = range(self._size)
        found: set[int] = set()
        ahead = list(peers or everyone)
        while ahead:
            rank = ahead.pop()
            if rank != self._rank and rank not in found:
                found.add(rank)
                theirs = self._heard[rank][1][1] if self._answers(rank) else None
                ahead += everyone if theirs is not None and not theirs else theirs or ()
        return sorted(found)

    def report(self, done: int, total: int) -> None:
        """Note how much of this rank's work is done, and tell rank 0, at most every `REPORT_SECONDS`."""
        now = time.perf_counter()
        self._progress[self._rank] = done, total
        if self._rank and (now - self._reported > REPORT_SECONDS or done >= total):
            self._reported = now
            self._send(PROGRESS + self._progress[self._rank].tobytes(), 0)

    def progress(self) -> tuple[int, int]:
        """Give, on rank 0, the sums over all ranks of (done, total) as last reported."""
        done, total = self._progress.sum(axis=0).tolist()
        return done, total

    def _take(self, rank: int, message: NDArray[np.uint8], state: Callable[[], State]) -> str:
        """Take one notice in; return its text if its sender gave up."""
        kind, content = message[:1].tobytes(), message[1:].tobytes()
        if kind == PROGRESS:
            self._progress[rank] = np.frombuffer(content, np.int64)
            return ""
        text = content.decode(errors="replace")
        if kind == GAVE_UP:
            return text
        try:
            where, peers = json.loads(text)
        except ValueError:                # whatever it is, it is no reason to give up
            return ""
        self._heard[rank] = time.perf_counter(), (where, peers)
        if kind == QUESTION:
            self._send(ANSWER + json.dumps(state()).encode(), rank)
        return ""

    def _silence(self, rank: int, start: float, now: float) -> str:
        heard, (said, _) = self._heard.get(rank, (0.0, ("", None)))
        if not heard:
            return f"{self.name(rank)} for {now - start:.1f} s"
        return f"{self.name(rank)} for {now - max(heard, start):.1f} s, which was {said} {now - heard:.1f} s ago"

    def _tell_all(self, kind: bytes, text: str) -> None:
        message = kind + text.encode(errors="backslashreplace")
        for rank in range(self._size):
            if rank != self._rank:
                self._send(message, rank)

    def _send(self, message: bytes, rank: int) -> None:
        with suppress(self._mpi.Exception):           # to a dead rank
            self._requests = [request for request in self._requests if not request.Test()]
            self._requests.append(self._comm.Isend([np.frombuffer(message, np.uint8), self._mpi.BYTE], rank,
                                                   NOTICE_TAG))
            self.sent[rank] += 1
