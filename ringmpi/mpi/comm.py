"""Communicators, agreement and deadlines: what the library asks of MPI besides moving blocks.

Works on a caller's communicator; COMM_WORLD is the affair of `world`. Every wait for another rank polls, so that it
has a deadline and names the rank that is missing; nothing that blocks without one is called.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import errors
from ..environment import boot_id, cores, debian_mpich
from ..errors import CommError, InternalError, LaunchError, OptionError, RankLost, ResourceError, RingError, RingTimeout
from .notices import Notices, State

if TYPE_CHECKING:
    from mpi4py import MPI

TIMEOUT = 1800.0                  # seconds; a step of a long sequence on CPUs can take minutes
LONGEST_TEXT = 1500               # characters of an error or option that travel to the other ranks
LONGEST_TRACEBACK = 6000          # of an error of our own

ROUNDS = 8                        # of polls in which a rank that computes lets messages move, at most
POLLS = 8                         # of MPI between two looks at the clock
SPIN = 1e-4                       # seconds without movement after which a wait sleeps between polls ...
LONGEST_PAUSE = 2e-3              # ... for an eighth of the time that nothing has moved, this long at most
STOPPED = 1.0                     # seconds between two polls that do not count: nobody was here to wait
IDLE = 1e-5                       # processor seconds of `POLLS` polls at most, until they have been measured
MOVING = 3.0                      # polls that take so many times the processor time of idle ones have moved data
ASK_SECONDS = 5.0                 # of waiting before the other ranks are asked where they are; twice, four times it
LOG_SECONDS = 60.0                # of waiting before the log says so; then twice, four times it
FREE_SECONDS = 5.0                # to wait for the other ranks to free a communicator with this one

CALL, OPTIONS, FAILED, NBYTES = range(4)      # int64 numbers at the head of what an exchange brings
HEADER_BYTES = 32
RECORD_BYTES = 256                # of the first message of an exchange, with a payload that fits
NOTHING = np.empty(0, np.uint8)

log = logging.getLogger("ringmpi")


def load() -> Any:
    """Import and return ``mpi4py.MPI``, which initialises MPI if nobody has. Local.

    Raises
    ------
    LaunchError
        If there is no MPI library to load.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LaunchError(f"no MPI library: {reason}; load your site's MPI module, or pip install 'ringmpi[mpich]'"
                          f"{_debian_mpich()}") from error
    return MPI


def _debian_mpich() -> str:
    """Say how Debian's MPICH, if it is here, can be found: mpi4py's wheels look for it by the name all others give."""
    library = debian_mpich()
    return library and (f"; to take {library}, which has a name of its own in Debian and Ubuntu: mkdir -p ~/mpich && "
                        f"ln -s {library} ~/mpich/libmpi.so.12 && export LD_LIBRARY_PATH=~/mpich")


class Comm:
    """The library's private communicator on a caller's communicator.

    One is cached on each communicator, so that any number of calls and objects make one. Calls on it are
    collective and complete their messages before they return; so objects that share it do not disturb each
    other. It is freed when the caller frees the communicator it belongs to.

    Attributes
    ----------
    comm : MPI.Intracomm
        A duplicate of the caller's; ranks as there.
    rank, size : int
    source, dest : int
        The neighbours in the ring that blocks come from and go to.
    leader : int
        The lowest rank on this rank's node.
    local_rank, local_size : int
        This rank's place among the ranks of the communicator on its node, in their order, and their number.
    threads : int
        The cores this rank may run on, shared fairly with the ranks of the communicator on its node.
    lost : str
        Why the communicator can't be used any more; empty while it can.
    place : str
        Where in a call this rank is, for those who wait for it: ``", ring step 2 of 4"``.
    shared : dict
        What objects on this communicator share, and is closed when it goes.
    calls : int
        That have been made on it; the same on all ranks within a call.
    prepared : set
        What has been compiled by, or for, all ranks.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.source = (self.rank - 1) % self.size
        self.dest = (self.rank + 1) % self.size
        self.leader = self.rank
        self.local_rank, self.local_size = 0, 1
        self.threads = 1
        self.lost = ""
        self.place = ""
        self.shared: dict[Any, Any] = {}
        self.prepared: set[Any] = set()
        self._alone = 0, 0                      # progress of one rank without others
        self.comm = comm
        self._notices: Notices | None = None
        self._call = "its first call"
        self.calls = 0
        self._objects = 0
        self._turn = threading.Lock()
        self._waits_since: float | None = None
        self._peers: Callable[[], Sequence[int]] = tuple
        self._idle: dict[int, float] = {}       # by number of requests: see `_idle_seconds`
        self._mine = np.zeros(RECORD_BYTES, np.uint8)
        self._all = np.zeros((self.size, RECORD_BYTES), np.uint8)

    def connect(self, timeout: float, exclusive: bool) -> None:
        """Duplicate the caller's communicator, and see who is where. Collective over *comm*.

        The duplicate is made without blocking, so that a rank that does not come is an error here too.

        Parameters
        ----------
        timeout : float
        exclusive : bool
            Nobody else sends messages on the caller's communicator, so that ranks can tell each other who is missing.

        Raises
        ------
        RingTimeout
            If not all ranks come within `timeout` seconds. The communicator is lost then.
        """
        mpi = load()
        if exclusive and self.size > 1:
            self._notices = Notices(mpi, self.comm, [""] * self.size)
        duplicate, request = self.comm.Idup()
        unknown = "" if exclusive else "; who is missing can be told only once a first call has come through"
        self.wait([request], timeout, lambda: f"{self.name()} waited for the other {self.size - 1} ranks to make their "
                                              f"first call{unknown}")
        duplicate.Set_errhandler(mpi.ERRORS_RETURN)
        self.comm = duplicate
        self._notices = Notices(mpi, duplicate, [""] * self.size) if self.size > 1 else None
        nodes = [json.loads(text) for text in self.allgather_text(
            json.dumps([socket.gethostname(), boot_id(), sorted(cores())]), timeout, "its first call")]
        if self._notices:
            self._notices.hosts = [host for host, _, _ in nodes]
        here = [rank for rank, node in enumerate(nodes) if node[:2] == nodes[self.rank][:2]]
        self.leader = here[0]
        self.local_rank, self.local_size = here.index(self.rank), len(here)
        # a core that k ranks of this node may run on counts 1/k for each of them
        users = Counter(core for rank in here for core in nodes[rank][2])
        self.threads = max(1, int(sum(1 / users[core] for core in nodes[self.rank][2]) + 1e-9))

    def free(self) -> None:
        """Free the communicator, unless messages are stranded in it. Collective over the caller's comm."""
        for workspace in self.shared.values():
            workspace.close()
        if not self.lost:
            with suppress(RingError):
                self._read_all_notices()
        if not self.lost:
            self.comm.Free()
            self.lost = "the caller has freed the communicator it belongs to"

    def _read_all_notices(self) -> None:
        """Read the notices that nobody has waited for, so that none is left in a communicator that goes."""
        notices = self._notices
        if notices is None:
            return
        expected = np.zeros(1, np.int64)
        request = self.comm.Ireduce_scatter_block([notices.sent, load().INT64_T], [expected, load().INT64_T])
        self.wait([request], FREE_SECONDS, lambda: f"{self.name()} waited for the other ranks to free a communicator")
        self.wait([], FREE_SECONDS, lambda: f"{self.name()} waited for notices",
                  lambda: notices.received >= expected[0])

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Run a call, the only one on this communicator; tell the others if it ends half-way on this rank alone. Local.

        Raises
        ------
        CommError
            If another call is under way, in another thread or around this one.
        """
        if not self._turn.acquire(blocking=False):
            raise CommError("another call on this communicator is under way, in another thread or around this one (in "
                            "a progress callback, say); give each a communicator of its own, comm.Dup()")
        try:
            yield
        except RingError:                # agreed, or told already
            raise
        except BaseException as error:   # an interrupt between two exchanges, say
            self.give_up(error, [])
            raise
        finally:
            self._turn.release()

    def next_object(self) -> int:
        """Give the number of an object that all ranks make now: 1, 2, ... Local."""
        self._objects += 1
        return self._objects

    def name(self) -> str:
        """Name this rank and its node."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def wait(self, requests: list[Any], timeout: float, describe: Callable[[], str],
             advance: Callable[[], bool] | None = None, peers: Callable[[], Sequence[int]] = tuple) -> float:
        """Poll `requests` until all are done; return the seconds it took. Local.

        Polls without a pause, but lets other processes have the core, as long as messages move: they need it to, and
        that they do shows in the processor time that polls take. Sleeps between polls when nothing has moved for long.

        Parameters
        ----------
        requests : list of MPI.Request
        timeout : float
            Seconds after which waiting is an error.
        describe : callable
            Says what is waited for.
        advance : callable, optional
            Called before each poll to do what is due besides; it may change `requests`. All is done when it says
            True too.
        peers : callable, optional
            Gives the ranks that are waited for; none means all.

        Raises
        ------
        RingTimeout
            After `timeout` seconds; the text begins with that of `describe`, and names the ranks that do not answer.
        RankLost
            If MPI or another rank says that a rank is gone. After either the communicator is lost.
        """
        start = moved = self._waits_since = time.perf_counter()
        self._peers = peers
        ask = min(ASK_SECONDS, timeout / 4)
        slept = False
        say = LOG_SECONDS
        last = start
        try:
            while True:
                done, busy = self._poll(requests, describe, advance)
                if done:
                    return time.perf_counter() - start
                now = time.perf_counter()
                slow = busy > MOVING * self._idle_seconds(len(requests))
                if slow and not slept:          # just awake, polls are slow for want of a warm cache: look again
                    moved = now
                if busy:
                    self._idle[len(requests)] = min(self._idle_seconds(len(requests)), busy)
                if now - last > STOPPED:        # this process was stopped, and the others may have been with it
                    start += now - last
                last = now
                seconds = now - start
                if seconds > timeout:
                    raise RingTimeout(f"{describe()} for {seconds:.1f} s (timeout {timeout:g} s): a rank is lost, "
                                      f"stopped or far behind{self._missing(start)}")
                if seconds > ask and self._notices:
                    ask *= 2
                    self._notices.ask(self._state())
                if seconds > say:
                    say *= 2
                    self._log(describe(), start)
                pause = (now - moved - SPIN) / 8
                slept = pause > 0 and not (slow and slept)
                if slept:
                    time.sleep(min(pause, LONGEST_PAUSE))
                else:
                    os.sched_yield()
        except BaseException as error:        # an interrupt too: nobody will wait for these messages any more
            self.give_up(error, requests)
            raise
        finally:
            self._waits_since, self._peers = None, tuple         # what `peers` refers to may go

    def _idle_seconds(self, count: int) -> float:
        """Give the processor seconds of `POLLS` polls of so many requests that moved nothing, at least."""
        return self._idle.get(count) or IDLE * (1 + count / 8)

    def _missing(self, start: float) -> str:
        return f"; {self._notices.missing(start, self._peers())}" if self._notices else ""

    def _log(self, what: str, start: float) -> None:
        """Write to the log what is waited for; the lowest rank that waits speaks for all."""
        if not self._notices or self._notices.lowest_waiting() == self.rank:
            log.warning("%s for %.0f s so far%s", what, time.perf_counter() - start, self._missing(start))

    def _state(self) -> State:
        """Say where this rank is, and for whom it waits, for those who wait for it."""
        where = f"in {self._call}{self.place}"
        if self._waits_since is None:
            return f"{where}, computing", None
        return f"{where}, waiting for {time.perf_counter() - self._waits_since:.1f} s", self._peers()

    def message_starter(self, call: str, peer: int, tag: int) -> Callable[[Any], Any]:
        """Give what starts a message of a buffer and gives its request; `call` is ``"Isend"`` or ``"Irecv"``. Local."""
        start, byte = getattr(self.comm, call), load().BYTE
        return lambda buffer: start([buffer, byte], peer, tag)

    def test(self, requests: list[Any], describe: Callable[[], str],
             advance: Callable[[], bool] | None = None) -> bool:
        """Let MPI move messages; say whether all `requests` are done, and what `advance` looks after. Local.

        Raises
        ------
        RankLost
            If MPI or another rank says that a rank is gone.
        """
        return self._poll(requests, describe, advance)[0]

    def _poll(self, requests: list[Any], describe: Callable[[], str],
              advance: Callable[[], bool] | None) -> tuple[bool, float]:
        """Poll some times; give what `test` does, and the processor seconds that MPI took."""
        mpi = load()
        test = mpi.Request.Testall
        statuses: list[Any] = []
        try:
            nothing_else = advance is None or advance()
            start = time.thread_time()
            done = any(test(requests, statuses) for _ in range(POLLS))
            if done and nothing_else:
                return True, 0.0
            busy = 0.0 if done else time.thread_time() - start       # fewer polls say nothing
        except mpi.Exception as error:
            codes = {status.Get_error() for status in statuses} - {mpi.SUCCESS, mpi.ERR_PENDING, mpi.ERR_IN_STATUS}
            reason = ", ".join(mpi.Get_error_string(code).splitlines()[-1] for code in codes) or str(error)
            lost = RankLost(f"{describe()}; MPI reports: {reason}")
            self.give_up(lost, requests)
            raise lost from error
        self.heed(describe, requests)
        return False, busy

    def heed(self, describe: Callable[[], str], requests: Sequence[Any] = ()) -> None:
        """Read what other ranks have to say; raise `RankLost` if one gave up."""
        told = self._notices.read(self._state) if self._notices else ""
        if told:
            self._mark_lost(told, list(requests))
            raise RankLost(f"{describe() or self.name()}; {told}")

    def progress(self, requests: list[Any], describe: Callable[[], str], advance: Callable[[], bool]) -> None:
        """Let MPI move messages as long as some move, a fraction of a millisecond at most. Local.

        Raises
        ------
        RankLost
            See `test`.
        """
        for _ in range(ROUNDS):
            done, busy = self._poll(requests, describe, advance)
            if done:
                self.heed(describe)      # whoever waits for this rank may ask where it is
            if done or busy < MOVING * self._idle_seconds(len(requests)):
                break

    def give_up(self, error: BaseException, requests: list[Any]) -> None:
        """Give up the communicator because of `error`, and tell the other ranks; one rank alone goes on. Local."""
        if not self.lost and self.size > 1:
            text = f"rank {self.rank} gave up: {str(error) or type(error).__name__}"
            self._mark_lost(text, requests)
            if self._notices:
                _stranded().extend(self._notices.give_up(text))

    def _mark_lost(self, reason: str, requests: list[Any]) -> None:
        """Refuse all further use. MPI may still write to the requests' buffers: they are kept for good."""
        self.lost = self.lost or reason
        _stranded().extend(requests)

    def keep_alive(self, buffers: list[Any]) -> None:
        """Keep for good what MPI or a GPU may still write to, after a failure. Local."""
        _stranded().extend(buffers)

    def report_progress(self, done: int, total: int) -> None:
        """Say how much of this rank's work is done; rank 0 is told twice a second at most. Local."""
        if self._notices is None:
            self._alone = done, total
            return
        self._notices.report(done, total)
        if self.rank == 0:
            self.heed(lambda: "")

    def progress_of_all(self) -> tuple[int, int]:
        """Give, on rank 0, the sums over all ranks of what they last reported: (done, total). Local."""
        return self._notices.progress() if self._notices else self._alone

    def exchange(self, call: str, timeout: float, payload: NDArray[np.uint8] = NOTHING, *,
                 error: BaseException | None = None, options: Mapping[str, Any] | None = None,
                 digest: int | None = None) -> list[NDArray[np.uint8]]:
        """Meet all ranks in one exchange: agree that all is well, and give what each brings. Collective over *comm*.

        Parameters
        ----------
        call : str
            Which call this is of, the same on every rank; empty within one.
        timeout : float
            Seconds to wait for the others.
        payload : uint8 array
            Any number of bytes; more than some 200 take a second message.
        error : exception, optional
            What has failed on this rank.
        options : mapping, optional
            What must be the same on every rank.
        digest : int, optional
            `digest_of` the options, if it is known.

        Returns
        -------
        list of uint8 array
            The payload of each rank.

        Raises
        ------
        RingError
            The same on all ranks: the error of the lowest rank that brings one, its text with the ranks that failed;
            or an OptionError if ranks are in different calls, or their options differ.
        RingTimeout, RankLost
            If a rank does not come in time, or is gone.
        """
        if call:
            self.calls += 1
            self._call = f"{call} (call {self.calls} on this communicator)"
            self.place = ""
        if digest is None:
            digest = 0 if options is None else digest_of(options)
        mine = np.array((_hash(call), digest, error is not None, payload.size), np.int64)
        heads, rows = self._meet(mine, payload, timeout)
        if (heads == mine).all() and error is None:
            return rows
        if (heads[:, CALL] != heads[0, CALL]).any():
            self._refuse_calls(call, timeout)
        if heads[:, FAILED].any():
            self.raise_agreed(error, timeout)
        if (heads[:, OPTIONS] != heads[0, OPTIONS]).any():
            self._refuse_options(options or {}, timeout)
        return rows

    def _meet(self, head: NDArray[np.int64], payload: NDArray[np.uint8],
              timeout: float) -> tuple[NDArray[np.int64], list[NDArray[np.uint8]]]:
        """Exchange headers and payloads, of whatever size each is."""
        if load().Is_finalized():
            raise CommError("MPI is finalized: no communicator can be used any more")
        if self.lost:
            raise CommError(f"this communicator can't be used after an earlier failure ({self.lost}); make a new one")
        if self.size == 1:
            return head[None], [payload]
        start = HEADER_BYTES
        self._mine[:start] = head.view(np.uint8)
        fits = payload.size <= RECORD_BYTES - start
        if fits:
            self._mine[start:start + payload.size] = payload
        self._allgather(self._mine, self._all, timeout)
        heads = self._all[:, :start].copy().view(np.int64)
        sizes = heads[:, NBYTES].tolist()
        largest = max(sizes)
        if largest <= RECORD_BYTES - start:
            return heads, [row[start:start + nbytes].copy() for row, nbytes in zip(self._all, sizes, strict=True)]
        padded = np.zeros(largest, np.uint8)
        padded[:payload.size] = payload
        everyone = np.empty((self.size, largest), np.uint8)
        self._allgather(padded, everyone, timeout)
        return heads, [row[:nbytes] for row, nbytes in zip(everyone, sizes, strict=True)]

    def _allgather(self, mine: NDArray[np.uint8], everyone: NDArray[np.uint8], timeout: float) -> None:
        byte = load().BYTE
        request = self.comm.Iallgather([mine, byte], [everyone, byte])
        self.wait([request], timeout, lambda: f"{self.name()} waited for the other {self.size - 1} ranks to make the "
                                              f"same call, {self._call}")

    def allgather(self, record: ArrayLike, timeout: float, call: str = "") -> NDArray[Any]:
        """Gather one small array from every rank on every rank. Collective over *comm*.

        Parameters
        ----------
        record : array of shape (n,)
            The same n and dtype on every rank.
        timeout : float
            Seconds to wait for the others.
        call : str
            See `exchange`.

        Returns
        -------
        array of shape (size, n)

        Raises
        ------
        RingTimeout, RankLost
            If a rank does not come in time, or is gone.
        """
        mine = np.ascontiguousarray(record)
        rows = self.exchange(call, timeout, mine.view(np.uint8))
        return np.concatenate(rows).view(mine.dtype).reshape(self.size, *mine.shape)

    def allgather_text(self, text: str, timeout: float, call: str = "") -> list[str]:
        """Gather a text from every rank on every rank. Collective over *comm*."""
        data = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
        return [row.tobytes().decode(errors="ignore") for row in self.exchange(call, timeout, data)]

    def agree(self, error: BaseException | None, timeout: float) -> None:
        """Raise the same error on every rank if any rank brings one. Collective over *comm*.

        The lowest failing rank's error is raised; its text says which ranks failed.
        """
        self.exchange("", timeout, error=error)

    def raise_agreed(self, error: BaseException | None, timeout: float) -> NoReturn:
        """Raise the error of the lowest rank that has one, on every rank. Collective over *comm*."""
        kind, text = ("", "") if error is None else _failure_notice(error)
        reports = [json.loads(report) for report in self._texts(json.dumps([kind, text]), timeout)]
        failed = [rank for rank, (kind, _) in enumerate(reports) if kind]
        kind, text = reports[failed[0]]
        also = f" [also on rank {', '.join(map(str, failed[1:9]))}{' ...' if len(failed) > 9 else ''}]"
        raise getattr(errors, kind)(f"rank {failed[0]}: {text}{also if failed[1:] else ''}") from error

    def check_same_options(self, options: Mapping[str, Any], timeout: float, call: str = "") -> None:
        """Raise `OptionError` on every rank unless all bring the same options. Collective over *comm*."""
        self.exchange(call, timeout, options=options)

    def _refuse_options(self, options: Mapping[str, Any], timeout: float) -> NoReturn:
        """Say which option differs. Collective over *comm*."""
        everyone = [json.loads(text) for text in self._texts(json.dumps(_short(options)), timeout)]
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise OptionError(f"rank {rank}: expected the same options on every rank, and calls in the same "
                                      f"order; {name} is {theirs.get(name)} here and {value} on rank 0")
        raise InternalError("the options have different digests, and the same texts")

    def _refuse_calls(self, call: str, timeout: float) -> NoReturn:
        """Say who is in another call. Collective over *comm*."""
        everyone = self._texts(call or "the middle of a call", timeout)
        rank = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
        raise OptionError(f"rank {rank}: expected the same call on every rank, got {everyone[rank]} here and "
                          f"{everyone[0]} on rank 0; calls on one communicator must come in the same order everywhere")

    def _texts(self, text: str, timeout: float) -> list[str]:
        """Gather texts about an error that all ranks know of."""
        data = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
        rows = self._meet(np.array((0, 0, 0, data.size), np.int64), data, timeout)[1]
        return [row.tobytes().decode(errors="ignore") for row in rows]

    @contextmanager
    def raise_on_all(self, timeout: float) -> Iterator[None]:
        """Run a block that may fail on some ranks; on leaving, all ranks raise or none. Collective over *comm*."""
        with self.noting() as failures:
            yield
        self.agree(failures[0] if failures else None, timeout)

    @contextmanager
    def noting(self) -> Iterator[list[Exception]]:
        """Note what fails in a block, for an exchange to tell; an interrupt the other ranks are told at once. Local."""
        failures: list[Exception] = []
        try:
            yield failures
        except (RingTimeout, RankLost):
            raise
        except Exception as failure:      # noqa: BLE001 (whatever it is, the other ranks must hear of it)
            failures.append(failure)
        except BaseException as failure:  # an interrupt: the other ranks must not wait for this one
            self.give_up(failure, [])
            raise

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the other ranks at once of an interrupt within a block, wherever it comes between two calls. Local."""
        try:
            yield
        except KeyboardInterrupt as failure:
            self.give_up(failure, [])
            raise

    def node_leader_first(self, work: Callable[[], object], timeout: float) -> None:
        """Run `work` on one rank of each node, and then on the others; all raise or none. Collective over *comm*."""
        for turn in (True, False):
            with self.raise_on_all(timeout):
                if turn is (self.rank == self.leader):
                    work()


def digest_of(options: Mapping[str, Any]) -> int:
    """Give a number that tells options apart. Local."""
    return _hash(json.dumps({name: str(value) for name, value in options.items()}))


@functools.lru_cache(maxsize=256)
def _hash(text: str) -> int:
    data = hashlib.blake2b(text.encode(errors="backslashreplace"), digest_size=8).digest()
    return int.from_bytes(data, "little", signed=True)


def _failure_notice(error: BaseException) -> tuple[str, str]:
    """Give the class and the text by which the other ranks hear of an error."""
    if isinstance(error, RingError):
        return type(error).__name__, str(error)[:LONGEST_TEXT]
    if isinstance(error, MemoryError):
        return ResourceError.__name__, f"out of memory: {error}"[:LONGEST_TEXT]
    text = "".join(traceback.format_exception(error))
    return InternalError.__name__, f"{type(error).__name__}: {error}\n{text[-LONGEST_TRACEBACK:]}"


def _short(options: Mapping[str, Any]) -> dict[str, str]:
    """Shorten the texts of options so that those that differ still do."""
    texts = {name: str(value) for name, value in options.items()}
    return {name: text if len(text) <= LONGEST_TEXT else
            f"{text[:200]}... (sha256 {hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()})"
            for name, text in texts.items()}


@functools.cache
def _stranded() -> list[Any]:
    """Keep requests that nobody will wait for, with their buffers, to the end of the process."""
    return []


def _free_attribute(comm: Any, keyval: int, private: Comm) -> None:
    private.free()


@functools.cache
def _keyval() -> int:
    return int(load().Comm.Create_keyval(delete_fn=_free_attribute))


def private_comm(comm: Any, timeout: float = TIMEOUT, exclusive: bool = False) -> Comm:
    """Give the library's communicator on `comm`, made at the first call and cached on it.

    Collective over *comm* at the first call, local after that.

    Parameters
    ----------
    comm : MPI.Intracomm
    timeout : float
        Seconds to wait for the first call of the others.
    exclusive : bool
        Nobody else sends messages on `comm`: then the first call too can name a rank that is missing.

    Raises
    ------
    CommError
        If `comm` is no intracommunicator, or MPI is finalized.
    RingTimeout
        If not all ranks make the first call within `timeout` seconds.
    """
    mpi = load()
    if mpi.Is_finalized():
        raise CommError("MPI is finalized: no communicator can be used any more")
    if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
        null = isinstance(comm, mpi.Comm) and comm == mpi.COMM_NULL
        raise CommError("comm: expected an intracommunicator of mpi4py, got "
                        f"{'MPI.COMM_NULL: this rank is no member of it' if null else repr(comm)}; pass "
                        "comm=MPI.COMM_WORLD, say")
    cached = comm.Get_attr(_keyval())
    if cached is None:
        cached = Comm(comm)
        comm.Set_attr(_keyval(), cached)
        cached.connect(timeout, exclusive)
    return cached  # type: ignore[no-any-return]


def release(comm: Any) -> None:
    """Free the library's communicator on `comm` before MPI ends, if there is one. Collective over *comm*."""
    if comm.Get_attr(_keyval()) is not None:
        comm.Delete_attr(_keyval())
