"""Communicators, agreement and deadlines: what the library asks of MPI besides moving blocks.

Works on a caller's communicator; COMM_WORLD is the affair of `world`. Every wait for another rank polls, so that it
has a deadline and does not take a core from other ranks; only Split_type and Create_cart, which have no such form, are
called when all ranks have met.
"""

from __future__ import annotations

import functools
import hashlib
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import errors
from .environment import cores, debian_mpich
from .errors import CommError, LaunchError, OptionError, RankLost, RingError, RingTimeout

if TYPE_CHECKING:
    from mpi4py import MPI

TIMEOUT = 1800.0                  # seconds; a step of a long sequence on CPUs can take minutes
FAILED_TAG = 32767                # the largest tag that every MPI has; others use those below
LONGEST_PAUSE = 5e-4              # seconds between two polls of a long wait
LONGEST_TEXT = 1500               # characters of an error or option that travel to the other ranks


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
    """The library's private ring communicator on a caller's communicator.

    One is cached on each communicator, so that any number of calls and objects make one. Calls on it are
    collective and complete their messages before they return; so objects that share it do not disturb each
    other. It is freed when the caller frees the communicator it belongs to.

    Attributes
    ----------
    ring : MPI.Cartcomm
        Periodic, one-dimensional; ranks as in the caller's communicator.
    rank, size : int
    source, dest : int
        The neighbours blocks come from and go to.
    leader : int
        The lowest rank on this rank's node.
    local_rank, local_size : int
        This rank's place among the ranks of the communicator on its node, in their order, and their number.
    threads : int
        The cores this rank may run on, shared fairly with the ranks of the communicator on its node.
    lost : str
        Why the communicator can't be used any more; empty while it can.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.source = self.dest = self.leader = self.rank
        self.local_rank, self.local_size = 0, 1
        self.threads = 1
        self.lost = ""
        self._connected = False

    def connect(self, comm: MPI.Intracomm, timeout: float) -> None:
        """Make a periodic Cartesian ring on a duplicate of the caller's communicator. Collective over *comm*.

        Dup, Split_type and Create_cart block without a deadline, so the ranks meet in calls that have one, Idup and
        an exchange, and only then make the ring. A rank that comes too late finds the others gone, and is not stuck.

        Raises
        ------
        RingTimeout
            If not all ranks come within `timeout` seconds. The communicator is lost then.
        """
        duplicate, request = comm.Idup()
        self.wait([request], timeout, lambda: f"rank {self.rank} on {socket.gethostname()} waited for the other "
                                              f"{self.size - 1} ranks to make their first call")
        self.ring = duplicate
        self._connected = True
        self.share([0], timeout)
        self.leader, self.local_rank, self.local_size = _on_node(duplicate)
        self.threads = self._fair_threads(timeout)
        self.ring = duplicate.Create_cart([self.size], periods=[True], reorder=False)
        self.source, self.dest = self.ring.Shift(0, 1)
        duplicate.Free()

    def _fair_threads(self, timeout: float) -> int:
        """Share the cores that this rank may run on: one that k ranks of this node may use counts 1/k."""
        mine = cores()
        everyone = [json.loads(text) for text in self.share_text(json.dumps([self.leader, sorted(mine)]), timeout)]
        users = Counter(core for leader, theirs in everyone if leader == self.leader for core in theirs)
        return max(1, int(sum(1 / users[core] for core in mine) + 1e-9))

    def free(self) -> None:
        """Free the communicator, unless messages are stranded in it. Collective over the caller's comm."""
        if self._connected and not self.lost:
            self.progress_of_all()
            self.ring.Free()
            self.lost = "the caller has freed the communicator it belongs to"

    def wait(self, requests: list[Any], timeout: float, describe: Callable[[], str],
             advance: Callable[[], bool] | None = None) -> float:
        """Poll `requests` until all are done; return the seconds it took. Local.

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

        Raises
        ------
        RingTimeout
            After `timeout` seconds; the text begins with that of `describe`.
        RankLost
            If MPI or another rank says that a rank is gone. After either the communicator is lost.
        """
        start = time.perf_counter()
        pause = 0.0
        try:
            while not self.test(requests, describe, advance):
                seconds = time.perf_counter() - start
                if seconds > timeout:
                    raise RingTimeout(f"{describe()} for {seconds:.1f} s (timeout {timeout:g} s): a rank is lost, "
                                      "stopped or far behind")
                time.sleep(pause)
                pause = min(pause + 1e-5, LONGEST_PAUSE)
        except BaseException as error:        # an interrupt too: nobody will wait for these messages any more
            self.fail(error, requests)
            raise
        return time.perf_counter() - start

    def starter(self, call: str, peer: int, tag: int) -> Callable[[Any], Any]:
        """Give what starts a message of a buffer and gives its request; `call` is ``"Isend"`` or ``"Irecv"``. Local."""
        start, byte = getattr(self.ring, call), load().BYTE
        return lambda buffer: start([buffer, byte], peer, tag)

    def test(self, requests: list[Any], describe: Callable[[], str],
             advance: Callable[[], bool] | None = None) -> bool:
        """Let MPI move messages; say whether all `requests` are done, and what `advance` looks after. Local.

        Raises
        ------
        RankLost
            If MPI or another rank says that a rank is gone.
        """
        mpi = load()
        statuses: list[Any] = []
        try:
            nothing_else = advance is None or advance()
            if mpi.Request.Testall(requests, statuses) and nothing_else:
                return True
            told = self._told() if self._connected and self.size > 1 else ""
        except mpi.Exception as error:
            codes = {status.Get_error() for status in statuses} - {mpi.SUCCESS, mpi.ERR_PENDING, mpi.ERR_IN_STATUS}
            reason = ", ".join(mpi.Get_error_string(code).splitlines()[-1] for code in codes) or str(error)
            lost = RankLost(f"{describe()}; MPI reports: {reason}")
            self.fail(lost, requests)
            raise lost from error
        if told:
            self._lose(told, requests)
            raise RankLost(f"{describe()}; {told}")
        return False

    def fail(self, error: BaseException, requests: list[Any]) -> None:
        """Give the communicator up because of `error`, and tell the other ranks; one rank alone goes on. Local."""
        if not self.lost and self.size > 1:
            text = f"rank {self.rank} gave up: {str(error) or type(error).__name__}"
            self._lose(text, requests)
            mpi = load()
            message = np.frombuffer(text.encode(errors="backslashreplace")[:LONGEST_TEXT], np.uint8)
            for rank in range(self.size if self._connected else 0):
                if rank != self.rank:
                    with suppress(mpi.Exception):      # to a dead rank
                        _stranded().append(self.ring.Isend([message, mpi.BYTE], rank, FAILED_TAG))

    def _lose(self, reason: str, requests: list[Any]) -> None:
        """Refuse all further use. MPI may still write to the requests' buffers: they are kept for good."""
        self.lost = self.lost or reason
        _stranded().extend(requests)

    def keep(self, buffers: list[Any]) -> None:
        """Keep for good what MPI or a GPU may still write to, after a failure. Local."""
        _stranded().extend(buffers)

    def _told(self) -> str:
        """Read what a rank that gave up says; empty as long as none did."""
        mpi = load()
        status = mpi.Status()
        if not self.ring.Iprobe(mpi.ANY_SOURCE, FAILED_TAG, status):
            return ""
        message = np.empty(status.Get_count(mpi.BYTE), np.uint8)
        self.ring.Recv([message, mpi.BYTE], status.Get_source(), FAILED_TAG)
        return message.tobytes().decode(errors="replace")

    def share(self, record: ArrayLike, timeout: float) -> NDArray[Any]:
        """Gather one small array from every rank on every rank. Collective over *comm*.

        Parameters
        ----------
        record : array of shape (n,)
            The same n and dtype on every rank.
        timeout : float
            Seconds to wait for the others.

        Returns
        -------
        array of shape (size, n)

        Raises
        ------
        RingTimeout, RankLost
            If a rank does not come in time, or is gone.
        """
        if load().Is_finalized():
            raise CommError("MPI is finalized: no communicator can be used any more")
        if self.lost:
            raise CommError(f"this communicator can't be used after an earlier failure ({self.lost}); make a new one")
        mine = np.ascontiguousarray(record)
        everyone = np.empty((self.size, *mine.shape), mine.dtype)
        byte = load().BYTE
        request = self.ring.Iallgather([mine.view(np.uint8), byte], [everyone.view(np.uint8), byte])
        self.wait([request], timeout, lambda: f"rank {self.rank} on {socket.gethostname()} waited for the other "
                                              f"{self.size - 1} ranks to make the same call")
        return everyone

    def share_text(self, text: str, timeout: float) -> list[str]:
        """Gather a text from every rank on every rank. Collective over *comm*."""
        data = text.encode(errors="backslashreplace")
        length = int(self.share([len(data)], timeout).max())
        padded = np.frombuffer(data.ljust(length + 1), np.uint8)
        return [row.tobytes().decode(errors="ignore").rstrip() for row in self.share(padded, timeout)]

    def agree(self, error: BaseException | None, timeout: float) -> None:
        """Raise the same error on every rank if any rank brings one. Collective over *comm*.

        The lowest failing rank's error is raised; its text says which ranks failed.
        """
        if self.share([error is not None], timeout).any():
            self.raise_agreed(error, timeout)

    def raise_agreed(self, error: BaseException | None, timeout: float) -> NoReturn:
        """Raise the error of the lowest rank that has one, on every rank. Collective over *comm*."""
        kind, text = "", ""
        if error is not None:
            known = isinstance(error, RingError)
            kind = type(error).__name__ if known else "RingError"
            text = str(error) if known else f"{type(error).__name__}: {error}"
        reports = [json.loads(report) for report in self.share_text(json.dumps([kind, text[:LONGEST_TEXT]]), timeout)]
        failed = [rank for rank, (kind, _) in enumerate(reports) if kind]
        kind, text = reports[failed[0]]
        also = f" [also on rank {', '.join(map(str, failed[1:9]))}{' ...' if len(failed) > 9 else ''}]"
        raise getattr(errors, kind)(f"rank {failed[0]}: {text}{also if failed[1:] else ''}") from error

    def agree_on(self, options: Mapping[str, Any], timeout: float) -> None:
        """Raise `OptionError` on every rank unless all bring the same options. Collective over *comm*."""
        mine = json.dumps({name: _short(str(value)) for name, value in options.items()})
        everyone = [json.loads(text) for text in self.share_text(mine, timeout)]
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise OptionError(f"rank {rank}: expected the same options on every rank; {name} is "
                                      f"{theirs.get(name)} here and {value} on rank 0")

    @contextmanager
    def together(self, timeout: float) -> Iterator[None]:
        """Run a block that may fail on some ranks; on leaving, all ranks raise or none. Collective over *comm*."""
        failure: Exception | None = None
        try:
            yield
        except (RingTimeout, RankLost):
            raise
        except Exception as error:        # noqa: BLE001 (whatever it is, the other ranks must hear of it)
            failure = error
        except BaseException as error:    # an interrupt: the other ranks must not wait for this one
            self.fail(error, [])
            raise
        self.agree(failure, timeout)

    def by_turns(self, work: Callable[[], object], timeout: float) -> None:
        """Run `work` on one rank of each node, and then on the others; all raise or none. Collective over *comm*."""
        for turn in (True, False):
            with self.together(timeout):
                if turn is (self.rank == self.leader):
                    work()

    def report_progress(self, done: int, total: int) -> None:
        """Say how much of this rank's work is done; rank 0 is told twice a second at most. Local."""
        state = self.__dict__.setdefault("_progress", {})
        state[self.rank] = done, total
        now = time.perf_counter()
        if self.rank and (now - self.__dict__.get("_reported", 0.0) > 0.5 or done >= total):
            self._reported = now
            message = np.array([done, total], np.int64)
            _stranded().append(self.ring.Isend([message, load().BYTE], 0, FAILED_TAG - 2))

    def progress_of_all(self) -> tuple[int, int]:
        """Give, on rank 0, the sums over all ranks of what they last reported: (done, total). Local."""
        state = self.__dict__.setdefault("_progress", {})
        mpi = load()
        status = mpi.Status()
        while self.ring.Iprobe(mpi.ANY_SOURCE, FAILED_TAG - 2, status):
            message = np.empty(2, np.int64)
            self.ring.Recv([message, mpi.BYTE], status.Get_source(), FAILED_TAG - 2)
            state[status.Get_source()] = int(message[0]), int(message[1])
        return sum(done for done, _ in state.values()), sum(total for _, total in state.values())


def _on_node(comm: MPI.Intracomm) -> tuple[int, int, int]:
    """Give the lowest rank of `comm` on this node, this rank's place there and their number. Collective over *comm*."""
    node = comm.Split_type(load().COMM_TYPE_SHARED)
    here, everywhere = node.Get_group(), comm.Get_group()
    lowest = int(here.Translate_ranks([0], everywhere)[0])
    place, number = node.Get_rank(), node.Get_size()
    for handle in (here, everywhere, node):
        handle.Free()
    return lowest, place, number


def _short(text: str) -> str:
    """Shorten a text so that texts that differ still do."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:200]}... (sha256 {hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()})"


@functools.cache
def _stranded() -> list[Any]:
    """Keep requests that nobody will wait for, with their buffers, to the end of the process."""
    return []


def _free_attribute(comm: Any, keyval: int, private: Comm) -> None:
    private.free()


@functools.cache
def _keyval() -> int:
    return int(load().Comm.Create_keyval(delete_fn=_free_attribute))


def private(comm: Any, timeout: float = TIMEOUT) -> Comm:
    """Give the library's communicator on `comm`, made at the first call and cached on it.

    Collective over *comm* at the first call, local after that.

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
        raise CommError(f"comm: expected an intracommunicator of mpi4py, got {comm!r}; pass comm=MPI.COMM_WORLD, say")
    cached = comm.Get_attr(_keyval())
    if cached is None:
        cached = Comm(comm)
        comm.Set_attr(_keyval(), cached)
        cached.connect(comm, timeout)
    return cached  # type: ignore[no-any-return]
