"""Waiting for other ranks: with a deadline, and with the name of the rank that is missing.

MPI's own waits block forever if a rank dies, so none is called: everything here polls.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import operator
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RankLost, RingTimeout
from .library import load
from .movement import Movement
from .notices import Notices, State
from .pace import Pace

POLLS = 16                        # calls of MPI between two looks at the pace, which take as long as some of them
QUICK_POLLS = 64                  # at the beginning of a wait, some ten microseconds, with no look at anything else
ROUNDS = 4                        # such sets of polls, at most, in which a rank that computes lets messages move

log = logging.getLogger("ringmpi")


class Waiter:
    """Polls messages for one rank of a communicator, and gives the communicator up when another rank is lost. Local.

    Parameters
    ----------
    rank, size : int
        This rank, and the number of ranks.

    Attributes
    ----------
    notices : Notices, optional
        Tell the ranks where each of them is. None as long as there is no communicator of our own to send them on.
    call, place : str
        The call that this rank is in, and where in it, for those who wait for this rank:
        ``"forward (call 3 on this communicator)"`` and ``", ring step 2 of 4"``.
    lost : str
        Why the communicator can't be used any more; empty while it can.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.notices: Notices | None = None
        self.call = "the first call on this communicator"
        self.place = ""
        self.lost = ""
        self._mpi = load()
        self._pace: Pace | None = None                      # of the wait that is under way
        self._peers: Callable[[], Sequence[int]] = tuple    # whom it is for
        self._movement = Movement()

    def name(self) -> str:
        """Name this rank and its node."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def others(self) -> str:
        """Name all ranks but this one: ``"the other 3 ranks"``."""
        return "the other rank" if self.size == 2 else f"the other {self.size - 1} ranks"

    def wait(self, requests: list[Any], timeout: float, describe: Callable[[], str],
             advance: Callable[[], bool] | None = None, peers: Callable[[], Sequence[int]] = tuple) -> float:
        """Poll `requests` until all are done; return the seconds it took.

        As long as messages move, which shows in the processor time of the polls, it polls without a pause, but yields
        the core to other processes, which may need it to make them move. It sleeps between polls when nothing has
        moved for a while, a sixteenth of that while at most: no transfer takes longer than by that share. Where
        `advance` changes `requests`, or has yet to, a transfer has many messages, and GPUs take next to no time for
        each: then it polls for a millisecond, as a sleep may take longer than it is meant to.

        Parameters
        ----------
        requests : list of MPI.Request
        timeout : float
            Seconds after which waiting is an error.
        describe : callable
            Says what is waited for.
        advance : callable, optional
            Called before each poll, of those in the first microseconds before the first alone, to do other work that is
            due; it may change `requests`, and returns whether that work is done. The wait ends when both are done.
        peers : callable, optional
            Gives the ranks that are waited for; none means all.

        Raises
        ------
        RingTimeout
            After `timeout` seconds; the text begins with that of `describe`, and names the ranks that do not answer.
        RankLost
            If MPI or another rank says that a rank is gone. After either error the communicator is lost.
        """
        pace = self._pace = Pace(timeout)
        self._peers = peers
        try:
            if self._done_soon(pace, requests, describe, advance):
                return time.perf_counter() - pace.start
            return self._poll_until_done(pace, requests, timeout, describe, advance)
        except BaseException as error:        # an interrupt too: nobody will wait for these messages any more
            self.give_up(error, requests)
            raise
        finally:
            self._pace = None
            self._peers = tuple               # lets go of whatever `peers` refers to

    def _done_soon(self, pace: Pace, requests: list[Any], describe: Callable[[], str],
                   advance: Callable[[], bool] | None) -> bool:
        """Poll for some microseconds, and nothing else: a small message among ranks that keep step takes no more."""
        test = self._mpi.Request.Testall
        statuses: list[Any] = []
        try:
            if advance is not None and not advance():
                pace.expect_more()
                return False
            for _ in range(QUICK_POLLS):
                if test(requests, statuses):
                    return True
        except self._mpi.Exception as error:
            raise self._lost(error, statuses, describe, requests) from error
        return False

    def _poll_until_done(self, pace: Pace, requests: list[Any], timeout: float, describe: Callable[[], str],
                         advance: Callable[[], bool] | None) -> float:
        while True:
            before = requests.copy()
            done, busy = self._poll(requests, describe, advance)
            if done:
                return time.perf_counter() - pace.start
            moving = self._movement.seen(len(requests), busy)
            if busy:
                self._movement.learn(len(requests), busy)
            # give up, or ask where the others are, or only wait
            seconds = pace.tick()
            if seconds > timeout:
                raise RingTimeout(f"{describe()} for {seconds:.1f} s (timeout {timeout:g} s): a rank is lost, "
                                  f"stopped or far behind{self._missing(pace.start)}")
            self._remind(pace, seconds, describe)
            if len(before) != len(requests) or any(map(operator.is_not, before, requests)):
                pace.expect_more()
            pace.rest(moving)

    def progress(self, requests: list[Any], describe: Callable[[], str], advance: Callable[[], bool]) -> None:
        """Let MPI move messages for as long as some move, a fraction of a millisecond at most.

        Raises
        ------
        RankLost
            If MPI or another rank says that a rank is gone.
        """
        for _ in range(ROUNDS):
            done, busy = self._poll(requests, describe, advance)
            if done:
                self._read_notices(describe, requests)       # whoever waits for this rank may ask where it is
            if done or not self._movement.seen(len(requests), busy):
                break

    def heed_notices(self) -> None:
        """Read what other ranks have to say, and answer them; raise `RankLost` if one gave up."""
        self._read_notices(lambda: f"{self.name()}{self.place}, computing", [])

    def give_up(self, error: BaseException, requests: Sequence[Any] = ()) -> None:
        """Give the communicator up because of `error`, and tell the other ranks; a rank that is alone goes on.

        MPI may still write to the buffers of `requests`: they are kept to the end of the process.
        """
        if not self.lost and self.size > 1:
            text = f"rank {self.rank} gave up: {str(error) or type(error).__name__}"
            self._mark_lost(text, requests)
            if self.notices:
                stranded().extend(self.notices.give_up(text))

    def _mark_lost(self, reason: str, requests: Sequence[Any]) -> None:
        """Refuse all further use of the communicator."""
        self.lost = self.lost or reason
        stranded().extend(requests)

    def _poll(self, requests: list[Any], describe: Callable[[], str],
              advance: Callable[[], bool] | None) -> tuple[bool, float]:
        """Poll `POLLS` times; say whether everything is done, and give the processor seconds that MPI took."""
        test = self._mpi.Request.Testall
        statuses: list[Any] = []
        try:
            nothing_else = advance is None or advance()
            start = time.thread_time()
            done = any(test(requests, statuses) for _ in range(POLLS))
            if done and nothing_else:
                return True, 0.0
            busy = 0.0 if done else time.thread_time() - start       # fewer polls can't be compared
        except self._mpi.Exception as error:
            raise self._lost(error, statuses, describe, requests) from error
        self._read_notices(describe, requests)
        return False, busy

    def _lost(self, error: Exception, statuses: list[Any], describe: Callable[[], str],
              requests: Sequence[Any]) -> RankLost:
        """Give the communicator up after an error of MPI's, with MPI's words: those of the single messages, if any."""
        mpi = self._mpi
        codes = {status.Get_error() for status in statuses} - {mpi.SUCCESS, mpi.ERR_PENDING, mpi.ERR_IN_STATUS}
        reason = ", ".join(mpi.Get_error_string(code).splitlines()[-1] for code in codes) or str(error)
        lost = RankLost(f"{describe()}; MPI reports: {reason}")
        self.give_up(lost, requests)
        return lost

    def _read_notices(self, describe: Callable[[], str], requests: Sequence[Any]) -> None:
        told = self.notices.read(self._state) if self.notices and self.size > 1 else ""
        if told:
            self._mark_lost(told, requests)
            raise RankLost(f"{describe() or self.name()}; {told}")

    def _remind(self, pace: Pace, seconds: float, describe: Callable[[], str]) -> None:
        """Ask the other ranks where they are, and log the wait, when it has lasted long enough."""
        if self.notices and pace.is_time_to_ask(seconds):
            self.notices.ask(self._state())
        if pace.is_time_to_log(seconds):
            self._log(describe(), pace.start)

    def _log(self, what: str, start: float) -> None:
        """Log what is waited for; the lowest rank that waits speaks for all."""
        if not self.notices or self.notices.lowest_waiting() == self.rank:
            log.warning("%s for %.0f s so far%s", what, time.perf_counter() - start, self._missing(start))

    def _missing(self, start: float) -> str:
        """Say who is missing in the wait that is under way."""
        missing = self.notices.missing(start, self._peers()) if self.notices else ""
        return missing and f"; {missing}"

    def _state(self) -> State:
        """Say where this rank is, and for whom it waits, for those who wait for it."""
        where = f"in {self.call}{self.place}"
        if self._pace is None:
            return f"{where}, computing", None
        return f"{where}, waiting for {time.perf_counter() - self._pace.start:.1f} s", self._peers()


@functools.cache
def stranded() -> list[Any]:
    """Give the list that keeps, to the end of the process, what MPI or a GPU may still write to after a failure.

    Python takes its objects apart before MPI ends: not this one, to which a reference is never given back.
    """
    kept: list[Any] = []
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    return kept
