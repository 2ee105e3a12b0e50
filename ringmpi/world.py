"""COMM_WORLD, from its start to its end: what the command line alone asks of MPI.

The only module that touches COMM_WORLD.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from .environment import launched_sizes
from .errors import LaunchError
from .mpi import load


def world_rank() -> int | None:
    """Give this process's rank in COMM_WORLD, None while MPI is not up. Local."""
    mpi = sys.modules.get("mpi4py.MPI")
    up = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()
    return int(mpi.COMM_WORLD.Get_rank()) if mpi is not None and up else None


def library() -> str:
    """Name the MPI library and its version. Local."""
    lines = str(load().Get_library_version()).replace("\0", "").splitlines()      # Open MPI's ends in a NUL
    return lines[0].strip()


def describe() -> str:
    """Describe the MPI library, its ranks and its thread level. Local."""
    mpi = load()
    levels = {mpi.THREAD_SINGLE: "single", mpi.THREAD_FUNNELED: "funneled", mpi.THREAD_SERIALIZED: "serialized",
              mpi.THREAD_MULTIPLE: "multiple"}
    return f"{library()}; {mpi.COMM_WORLD.Get_size()} rank(s), thread level {levels[mpi.Query_thread()]}"


def comm_world(expect_ranks: int | None = None) -> Any:
    """Give COMM_WORLD after checking that the ranks know each other. Local.

    Ranks started by one launcher with another MPI's library are each alone, and would each do the whole job.

    Raises
    ------
    LaunchError
        If there is no MPI, or the number of ranks is not `expect_ranks` or, where that is None, not what every
        launcher's variable says.
    """
    comm = load().COMM_WORLD
    size = comm.Get_size()
    expected = launched_sizes() if expect_ranks is None else {"--expect-ranks": expect_ranks}
    for name, count in expected.items():
        if count != size:
            raise LaunchError(f"expected {count} ranks ({name}), got {size}: the launcher and the MPI library "
                              f"({library()}) do not belong together, or fewer ranks were started; use the launcher of "
                              f"that library, or say --expect-ranks {size} if it is meant")
    return comm


def end_job(code: int, grace: float) -> None:
    """End every rank of COMM_WORLD, if MPI is up and there are others; they get `grace` seconds to speak. Local."""
    if world_rank() is not None and load().COMM_WORLD.Get_size() > 1:
        time.sleep(grace)
        load().COMM_WORLD.Abort(code)
