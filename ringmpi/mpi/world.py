"""COMM_WORLD, from MPI's start to its end: what only the command line needs of MPI.

No other module touches COMM_WORLD.
"""

from __future__ import annotations

import functools
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from ..environment import fault_tolerant, launched_sizes, launched_together
from ..errors import LaunchError, RankLost, RingTimeout
from ..phases import phase
from .comm import TIMEOUT, release, revoke
from .library import load

LEAVE_TAG = 32766             # of the only messages on COMM_WORLD itself: calls have communicators of their own
PAUSE = 1e-3                  # seconds between two polls at the end
INFO_TIMEOUT = 60.0           # seconds for MPI to start, for commands without a --timeout


@functools.cache
def _survived() -> list[Any]:
    """Give the list of communicators of survivors, one for each time that ranks were lost."""
    return []


def world() -> Any:
    """Give COMM_WORLD, or what is left of it. Local."""
    return _survived()[-1] if _survived() else load().COMM_WORLD


def world_rank() -> int | None:
    """Give this process's rank in COMM_WORLD, or in what is left of it; None unless MPI is up. Local."""
    mpi = sys.modules.get("mpi4py.MPI")
    up = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()
    return int(world().Get_rank()) if up else None


def start(timeout: float) -> Any:
    """Start MPI, and give ``mpi4py.MPI``. Local.

    A rank that waits there for others for more than `timeout` seconds is killed by its watchdog.

    Raises
    ------
    LaunchError
        If there is no MPI.
    """
    with phase("starting MPI", limit=timeout):
        return load()


def library() -> str:
    """Name the MPI library and its version. Local."""
    lines = str(load().Get_library_version()).replace("\0", "").splitlines()      # Open MPI's ends in a NUL
    return " ".join(lines[0].split())


def describe() -> str:
    """Describe the MPI library, its ranks and its thread level; say if the launcher started more ranks. Local."""
    size = start(INFO_TIMEOUT).COMM_WORLD.Get_size()
    apart = find_apart()
    return f"{library()}; {size} rank(s), thread level {thread_level()}" + (apart and f"; {apart}")


def thread_level() -> str:
    """Name the thread level that MPI was initialised with. Local."""
    mpi = load()
    levels = {mpi.THREAD_SINGLE: "single", mpi.THREAD_FUNNELED: "funneled", mpi.THREAD_SERIALIZED: "serialized",
              mpi.THREAD_MULTIPLE: "multiple"}
    return levels[mpi.Query_thread()]


def find_apart() -> str:
    """Say whether ranks that were started together do not know each other; empty if they do. Local."""
    return _apart(load().COMM_WORLD.Get_size(), launched_sizes()) if launched_together() else ""


def comm_world(timeout: float = TIMEOUT, expect_ranks: int | None = None) -> Any:
    """Start MPI, and give COMM_WORLD after checking that it has all ranks. Local.

    If the launcher belongs to another MPI than the library, each rank is alone, and would do the whole job.

    Raises
    ------
    LaunchError
        If there is no MPI, or the number of ranks is not `expect_ranks` or, if that is None, not what all variables
        of the launcher say.
    """
    comm = start(timeout).COMM_WORLD
    size = comm.Get_size()
    expected = launched_sizes() if expect_ranks is None else {"--expect-ranks": expect_ranks}
    if apart := _apart(size, expected):
        raise LaunchError(f"{apart}; use the launcher of that library, or say --expect-ranks {size} if it is meant")
    return comm


def check_survival() -> None:
    """Raise `LaunchError` unless ranks can outlive others here. Local."""
    if not fault_tolerant() or "Open MPI" not in library():
        raise LaunchError("--survive: expected Open MPI 5, started by mpiexec --with-ft ulfm, got "
                          f"{library()}{'' if fault_tolerant() else ', started otherwise'}; without it a rank that "
                          "dies ends the job")


def has_survived() -> bool:
    """Say whether this rank goes on without others that were lost. Local."""
    return bool(_survived())


def is_loss(error: BaseException) -> bool:
    """Say whether an error is of a rank that died. Local."""
    mpi = load()
    if isinstance(error, mpi.Exception):
        return error.Get_error_class() in (mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED)
    return isinstance(error, RankLost)


def survivors(timeout: float) -> Any:
    """Give what is left of COMM_WORLD; None if nobody has died. Collective over the ranks that live.

    Ranks that still wait for others are told: their messages end with an error. (Bland et al. 2013, *Post-failure
    recovery of MPI communication capability*.)

    Parameters
    ----------
    timeout : float
        Seconds to wait for them, after which the watchdog ends this rank.
    """
    lost = world()
    with phase("going on without the ranks that were lost", limit=timeout):
        revoke(lost)
        left = lost.Shrink()
    if left.Get_size() == lost.Get_size():
        return None
    left.Set_errhandler(load().ERRORS_RETURN)
    _survived().append(left)
    return left


def _apart(size: int, expected: dict[str, int]) -> str:
    """Say why there are `size` ranks and not as many as whoever is named expects; nothing if there are."""
    for name, count in expected.items():
        if count != size:
            return (f"expected {count} ranks ({name}), got {size}: the launcher and the MPI library ({library()}) do "
                    "not belong together, or fewer ranks were started")
    return ""


def end_job(code: int, grace: float) -> None:
    """Abort COMM_WORLD if MPI is up and there are other ranks, after `grace` seconds for their last words. Local."""
    if world_rank() is not None and load().COMM_WORLD.Get_size() > 1:
        time.sleep(grace)
        load().COMM_WORLD.Abort(code)


def leave(timeout: float) -> None:
    """Wait for the other ranks, and finalize MPI. Collective over COMM_WORLD.

    MPI_Finalize waits without a deadline for ranks that are stopped or gone. So the ranks first meet by messages that
    have one; if MPI_Finalize still takes too long, their watchdogs kill them.
    Where ranks were lost it is not called, as it waits for them now and then: the others must end without it.

    Raises
    ------
    RingTimeout
        If not all ranks come within `timeout` seconds; rank 0's error names those that did not.
    RankLost
        If MPI says that one is gone.
    """
    rank = world_rank()
    if rank is None:
        return
    mpi = load()
    with phase("waiting for the other ranks to end"):
        try:
            _meet(mpi, rank, timeout)
        except mpi.Exception as error:
            raise RankLost(f"rank {rank} on {socket.gethostname()} was done, and another was lost before it said so; "
                           f"MPI reports: {error}") from error
    if has_survived():
        return
    with phase("finalizing MPI", limit=timeout):
        release(world())                        # else MPI_Finalize does, where an exception could only be printed
        mpi.Finalize()


def _meet(mpi: Any, rank: int, timeout: float) -> None:
    """Tell rank 0 that this rank is done, and wait for its word that all are."""
    everyone = world()
    others = range(1, everyone.Get_size())
    if rank == 0:
        coming = {other: everyone.Irecv([bytearray(1), mpi.BYTE], other, LEAVE_TAG) for other in others}
        _poll(coming, timeout, lambda late: f"rank {', '.join(map(str, late[:8]))} to end")
        going = {other: everyone.Isend([b"1", mpi.BYTE], other, LEAVE_TAG) for other in others}
    else:
        here = everyone.Isend([b"1", mpi.BYTE], 0, LEAVE_TAG)
        going = {0: everyone.Irecv([bytearray(1), mpi.BYTE], 0, LEAVE_TAG), rank: here}
    _poll(going, timeout + min(timeout, 2.0), lambda _: "rank 0 to say that all are done")        # after it has spoken


def _poll(requests: dict[int, Any], timeout: float, whom: Callable[[list[int]], str]) -> None:
    """Wait until the messages are done, each with the rank it is from or to."""
    begin = time.monotonic()
    while late := [rank for rank, request in requests.items() if not request.Test()]:
        seconds = time.monotonic() - begin
        if seconds > timeout:
            raise RingTimeout(f"rank {world_rank()} on {socket.gethostname()} was done, and waited for {whom(late)} "
                              f"for {seconds:.1f} s (timeout {timeout:g} s): stopped, or far behind")
        time.sleep(PAUSE)
