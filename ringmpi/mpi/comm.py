"""The library's communicator on a caller's: made once, cached on it, and freed with it.

COMM_WORLD is the affair of `world`. How ranks wait is in `waiting`, what they agree on in `exchange`.
"""

from __future__ import annotations

import functools
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..environment import affinity, boot_id
from ..errors import CommError, RingError
from .agreement import digest_of
from .exchange import Exchange, Telling
from .library import check_intracomm, load
from .notices import Notices
from .waiting import Waiter, stranded

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["TIMEOUT", "Comm", "digest_of", "load", "private_comm", "release"]

TIMEOUT = 1800.0                  # seconds; a step of a long sequence on CPUs can take minutes
FREE_SECONDS = 5.0                # to wait for the other ranks to free a communicator with this one


class Comm(Exchange):
    """The library's private communicator on a caller's communicator.

    One is cached on each communicator and serves every call and object on it. Calls on it are collective and complete
    their messages before they return, so objects that share it do not disturb each other. It is freed when the caller
    frees the communicator it belongs to.

    Attributes
    ----------
    comm : MPI.Intracomm
        A duplicate of the caller's; ranks as there.
    rank, size, calls : int
        See `Exchange`.
    nodes : list of int
        For each rank, the lowest rank on its node.
    leader : int
        The lowest rank on this rank's node.
    local_rank, local_size : int
        This rank's place among the ranks of the communicator on its node, in their order, and their number.
    threads : int
        The cores this rank may run on, shared fairly with the ranks of the communicator on its node.
    cores : int
        The cores that the ranks of a node may run on, on the node that has fewest; the same on all ranks.
    shared : dict
        What objects on this communicator share; it is closed when the communicator goes.
    prepared : set
        What has been compiled by, or for, all ranks.
    agreed : dict
        What all ranks have agreed on for as long as the communicator lives.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        super().__init__(comm)
        self.nodes = [0] * self.size
        self.leader = self.rank
        self.local_rank = 0
        self.local_size = 1
        self.threads = 1
        self.cores = 1
        self.shared: dict[Any, Any] = {}
        self.prepared: set[Any] = set()
        self.agreed: dict[Any, Any] = {}
        self._objects = 0
        self._turn = threading.Lock()

    def connect(self, timeout: float, exclusive: bool) -> None:
        """Duplicate the caller's communicator, and see which rank is where. Collective over *comm*.

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
        notices = self._duplicate(timeout, exclusive)
        mine = [socket.gethostname(), boot_id(), sorted(affinity())]
        nodes = [json.loads(text) for text in self.allgather_text(json.dumps(mine), timeout)]
        notices.hosts = [host for host, _, _ in nodes]
        machines = [node[:2] for node in nodes]
        self.nodes = [machines.index(machine) for machine in machines]
        self.leader = self.nodes[self.rank]
        here = [rank for rank, node in enumerate(self.nodes) if node == self.leader]
        self.local_rank = here.index(self.rank)
        self.local_size = len(here)
        cores: dict[int, set[int]] = {}
        for node, (_, _, theirs) in zip(self.nodes, nodes, strict=True):
            cores.setdefault(node, set()).update(theirs)
        self.cores = min(map(len, cores.values()))
        # a core that k ranks of this node may run on counts 1/k for each of them
        users = Counter(core for rank in here for core in nodes[rank][2])
        self.threads = max(1, int(sum(1 / users[core] for core in mine[2]) + 1e-9))

    def _duplicate(self, timeout: float, exclusive: bool) -> Notices:
        """Duplicate the caller's communicator, with a deadline; return the notices of the duplicate."""
        mpi = load()
        waiter = self._waiter
        if exclusive:
            waiter.notices = Notices(mpi, self.comm, [""] * self.size)
        duplicate, request = self.comm.Idup()
        unknown = "" if exclusive else "; who is missing can be told only once a first call has come through"
        waiter.wait([request], timeout, lambda: f"{self.name()} waited for {waiter.others()} to make "
                                                f"{'its' if self.size == 2 else 'their'} first call{unknown}")
        duplicate.Set_errhandler(mpi.ERRORS_RETURN)
        self.comm = duplicate
        waiter.notices = Notices(mpi, duplicate, [""] * self.size)
        return waiter.notices

    def free(self) -> None:
        """Free the communicator, unless messages are stranded in it. Collective over the caller's comm."""
        for workspace in self.shared.values():
            workspace.close()
        if not self.lost:
            with suppress(RingError):
                self._read_all_notices()
        if not self.lost:
            self.comm.Free()
            self._waiter.lost = "the caller has freed the communicator it belongs to"

    def _read_all_notices(self) -> None:
        """Read the notices that nobody has waited for, so that none is left in a communicator that goes."""
        waiter = self._waiter
        notices = waiter.notices
        if notices is None or self.size == 1:
            return
        int64 = load().INT64_T
        expected = np.zeros(1, np.int64)
        request = self.comm.Ireduce_scatter_block([notices.sent, int64], [expected, int64])
        waiter.wait([request], FREE_SECONDS,
                    lambda: f"{self.name()} waited for {waiter.others()} to free a communicator")
        waiter.wait([], FREE_SECONDS, lambda: f"{self.name()} waited for notices",
                    lambda: notices.received >= expected[0])

    @property
    def lost(self) -> str:
        """Why the communicator can't be used any more; empty while it can."""
        return self._waiter.lost

    @property
    def place(self) -> str:
        """Where in a call this rank is, for those who wait for it: ``", ring step 2 of 4"``."""
        return self._waiter.place

    @place.setter
    def place(self, place: str) -> None:
        self._waiter.place = place

    def name(self) -> str:
        """Name this rank and its node. Local."""
        return self._waiter.name()

    def one_call(self) -> OneCall:
        """Run a block that is a call, the only one on this communicator; see `OneCall`. Local."""
        return OneCall(self._waiter, self._turn)

    def next_object(self) -> int:
        """Give the number of an object that all ranks make now: 1, 2, ... Local."""
        self._objects += 1
        return self._objects

    def message_starter(self, call: str, peer: int, tag: int) -> Callable[..., Any]:
        """Give a function that starts an ``"Isend"`` or ``"Irecv"`` of a buffer and returns its request. Local.

        Its second argument is another call, if need be: ``"Issend"``.
        """
        comm, byte = self.comm, self._byte

        def start(buffer: Any, call: str = call) -> Any:
            return getattr(comm, call)([buffer, byte], peer, tag)

        return start

    def wait(self, requests: list[Any], timeout: float, describe: Callable[[], str],
             advance: Callable[[], bool] | None = None, peers: Callable[[], Sequence[int]] = tuple) -> float:
        """Poll `requests` until all are done; return the seconds it took. See `Waiter.wait`. Local."""
        return self._waiter.wait(requests, timeout, describe, advance, peers)

    def progress(self, requests: list[Any], describe: Callable[[], str], advance: Callable[[], bool]) -> None:
        """Let MPI move messages, a fraction of a millisecond at most. See `Waiter.progress`. Local."""
        self._waiter.progress(requests, describe, advance)

    def heed_notices(self) -> None:
        """Read what other ranks have to say, and answer them; raise `RankLost` if one gave up. Local."""
        self._waiter.heed_notices()

    def give_up(self, error: BaseException, requests: Sequence[Any] = ()) -> None:
        """Give the communicator up because of `error`, and tell the other ranks. See `Waiter.give_up`. Local."""
        self._waiter.give_up(error, requests)

    def keep_alive(self, buffers: Sequence[Any]) -> None:
        """Keep, to the end of the process, what MPI or a GPU may still write to after a failure. Local."""
        stranded().extend(buffers)

    def node_leader_first(self, work: Callable[[], object], timeout: float) -> None:
        """Run `work` on one rank of each node, and then on the others; all raise or none. Collective over *comm*."""
        for leaders in (True, False):
            with self.raise_on_all(timeout):
                if leaders is (self.rank == self.leader):
                    work()

    def report_progress(self, done: int, total: int) -> None:
        """Say how much of this rank's work is done; rank 0 is told twice a second at most. Local."""
        notices = self._waiter.notices
        if notices is not None:
            notices.report(done, total)
            if self.rank == 0:
                self._waiter.heed_notices()

    def progress_of_all(self) -> tuple[int, int]:
        """Give, on rank 0, the sums over all ranks of what they last reported: (done, total). Local."""
        notices = self._waiter.notices
        return notices.progress() if notices is not None else (0, 0)


class OneCall(Telling):
    """A block that is a call, the only one on a communicator; an error ends it as in `Telling`. Local.

    Raises
    ------
    CommError
        If another call is under way, in another thread or around this one.
    """

    __slots__ = ("_turn",)

    def __init__(self, waiter: Waiter, turn: threading.Lock) -> None:
        super().__init__(waiter)
        self._turn = turn

    def __enter__(self) -> None:
        if not self._turn.acquire(blocking=False):
            raise CommError("another call on this communicator is under way, in another thread or around this one (in "
                            "a progress callback, say); give each a communicator of its own, comm.Dup()")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            super().__exit__(kind, error, traceback)
        finally:
            self._turn.release()


def private_comm(comm: Any, timeout: float = TIMEOUT, exclusive: bool = False) -> Comm:
    """Give the library's communicator on `comm`, made at the first call and cached on it.

    Collective over *comm* at the first call, local after that.

    Parameters
    ----------
    comm : MPI.Intracomm
    timeout : float
        Seconds to wait for the first call of the others.
    exclusive : bool
        Nobody else sends messages on `comm`: then even the first call can name a rank that is missing.

    Raises
    ------
    CommError
        If `comm` is not an intracommunicator, or MPI has been finalized.
    RingTimeout
        If not all ranks make the first call within `timeout` seconds.
    """
    check_intracomm(comm)
    cached = comm.Get_attr(_keyval())
    if cached is None:
        cached = Comm(comm)
        comm.Set_attr(_keyval(), cached)
        cached.connect(timeout, exclusive)
    return cached  # type: ignore[no-any-return]


def revoke(comm: Any) -> None:
    """End all messages on `comm` and on the library's communicator on it, on all ranks that live, for good. Local.

    For MPI with fault tolerance (ULFM).
    """
    cached = comm.Get_attr(_keyval())
    if cached is not None:
        cached.comm.Revoke()
    comm.Revoke()


def release(comm: Any) -> None:
    """Free the library's communicator on `comm` before MPI ends, if there is one. Collective over *comm*."""
    if comm.Get_attr(_keyval()) is not None:
        comm.Delete_attr(_keyval())


@functools.cache
def _keyval() -> int:
    return int(load().Comm.Create_keyval(delete_fn=_free_attribute))


def _free_attribute(comm: Any, keyval: int, private: Comm) -> None:
    private.free()
