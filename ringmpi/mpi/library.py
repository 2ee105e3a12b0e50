"""The MPI library: loading it, and whether it can still be called."""

from __future__ import annotations

from typing import Any

from ..environment import debian_mpich
from ..errors import CommError, LaunchError


def load() -> Any:
    """Import and return ``mpi4py.MPI``, which initializes MPI unless somebody else has. Local.

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
                          f"{_debian_hint()}") from error
    return MPI


def check_not_finalized() -> None:
    """Raise `CommError` if MPI has been finalized. Local."""
    if load().Is_finalized():
        raise CommError("MPI is finalized: no communicator can be used any more")


def check_intracomm(comm: Any) -> None:
    """Raise `CommError` unless `comm` is an intracommunicator with this rank as a member. Local."""
    mpi = load()
    check_not_finalized()
    if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
        null = isinstance(comm, mpi.Comm) and comm == mpi.COMM_NULL
        raise CommError("comm: expected an intracommunicator of mpi4py, got "
                        f"{'MPI.COMM_NULL: this rank is no member of it' if null else repr(comm)}; pass "
                        "comm=MPI.COMM_WORLD, say")


def _debian_hint() -> str:
    """Say how to use Debian's MPICH, if it is installed: mpi4py's wheels look for it under the usual name only."""
    library = debian_mpich()
    return library and (f"; to take {library}, which has a name of its own in Debian and Ubuntu: mkdir -p ~/mpich && "
                        f"ln -s {library} ~/mpich/libmpi.so.12 && export LD_LIBRARY_PATH=~/mpich")
