"""Which threads may call MPI."""

from __future__ import annotations

import threading

from ..errors import CommError
from .library import load


def check_thread() -> None:
    """Raise `CommError` if only the thread that initialized MPI may call it, and this is another one. Local.

    torch, for one, runs the backward pass of GPU tensors on threads of its own. Ranks do not agree on this error:
    that would take MPI.
    """
    mpi = load()
    if mpi.Is_finalized() or mpi.Is_thread_main() or mpi.Query_thread() >= mpi.THREAD_SERIALIZED:
        return
    level = "MPI_THREAD_SINGLE" if mpi.Query_thread() == mpi.THREAD_SINGLE else "MPI_THREAD_FUNNELED"
    raise CommError(f"MPI was initialised with {level}: only the thread that did it may call MPI, and this call comes "
                    f"from thread {threading.current_thread().name!r} (torch runs the backward pass of GPU tensors on "
                    "threads of its own); ask for MPI_THREAD_SERIALIZED or more, which mpi4py does unless "
                    "mpi4py.rc.thread_level or another library says otherwise")
