"""Looking for a checkpoint of a call to go on from: the newest complete one, the same on all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError, RingError, ShardError
from ..files.generations import generations_of, newest
from ..files.paths import as_path
from ..files.states import Generation, read_manifest
from ..mpi.comm import Comm
from .identity import difference, problem_name

RESUME = ("auto", "never", "require")


@dataclass(frozen=True)
class Keeping:
    """Where checkpoints of a call are kept. The same on all ranks.

    Attributes
    ----------
    folder : path
    every : float, optional
        Seconds after which one is written, at the end of a step; None: only at the end of a call that is left.
    resume : {"auto", "never", "require"}
        Whether to go on from one that is there; ``"auto"``: if it is of this call, and whole.
    """

    folder: Path
    every: float | None = None
    resume: str = "require"


class Search:
    """What there is for a call to go on from. Rank 0 looks, once: on a shared file system others may see it later.

    Parameters
    ----------
    comm : Comm
    timeout : float
        Seconds to wait for other ranks.
    keeping : Keeping, optional

    Attributes
    ----------
    content : dict
        What has been found out of the call: its `problem`, and its `placement`; see `identity`.
    """

    def __init__(self, comm: Comm, timeout: float, keeping: Keeping | None) -> None:
        self._comm = comm
        self._timeout = timeout
        self._keeping = keeping
        self._found: list[Generation | RingError | None] = []
        self.content: dict[str, Any] = {}

    def generation(self, describe: Callable[[], Mapping[str, Any]]) -> Generation | None:
        """Give the newest complete generation of this call; None if there is none, or none is to be used.

        Collective over *comm*.

        Parameters
        ----------
        describe : callable
            Says, collectively, what the call is about; it is asked if there is anything.

        Raises
        ------
        ShardError, OptionError
            If there is something else, or it is damaged, or there is nothing and something is required; the same on
            every rank.
        """
        if not self._found:
            try:
                self._found = [self._look(describe)]
            except (ShardError, OptionError) as error:
                self._found = [error]
        found = self._found[0]
        if isinstance(found, RingError):
            raise found
        return found

    def _look(self, describe: Callable[[], Mapping[str, Any]]) -> Generation | None:
        keeping = self._keeping
        if keeping is None or keeping.resume == "never":
            return None
        folder = keeping.folder
        if not self._ask_rank_0(keeping, lambda: next(iter(generations_of(folder)), None)):
            return None
        problem = describe()                # even if none is complete: those of this call go when its result is there
        name = self._ask_rank_0(keeping, lambda: newest(folder, problem_name(problem)) or newest(folder))
        if not name:
            return None
        path = folder / name
        generation: Generation | None = None
        with self._comm.noting() as failures:
            generation = read_manifest(path)
        self._comm.exchange("", self._timeout, failures=failures,
                            options={"the digest of a checkpoint": generation and generation.digest})
        why = difference(generation.content["problem"], problem) if generation else ""
        if why:
            raise OptionError(f"{path}: expected a checkpoint of this call: {why}")
        return generation

    def _ask_rank_0(self, keeping: Keeping, look: Callable[[], Path | None]) -> str:
        """Give the name of what rank 0 finds; empty if that is nothing, and nothing is required."""
        name = ""
        with self._comm.noting() as failures:
            if self._comm.rank == 0:
                found = look()
                if found is None and keeping.resume == "require":
                    raise nothing_in(keeping.folder)
                name = found.name if found else ""
        rows = self._comm.exchange("", self._timeout, np.frombuffer(name.encode(), np.uint8), failures=failures)
        return rows[0].tobytes().decode()


@contextmanager
def unless_required(keeping: Keeping, comm: Comm, timeout: float) -> Iterator[None]:
    """Run a block that goes on from a checkpoint; where it can't, warn that all is computed. Collective over *comm*.

    Raises
    ------
    ShardError, OptionError
        What the block raises, the same on every rank, if a checkpoint is required.
    """
    try:
        yield
    except (ShardError, OptionError) as error:
        if keeping.resume == "require":
            raise
        with comm.raise_on_all(timeout):           # where warnings are errors, all ranks raise it
            if comm.rank == 0:
                warnings.warn(f"no checkpoint is used, and all is computed: {error}", stacklevel=4)


def find(comm: Comm, timeout: float, path: Any) -> Keeping:
    """Say what to go on from, if there is a complete generation of anything. Collective over *comm*."""
    with comm.one_call():
        folder = Path()
        with comm.noting() as failures:
            folder = as_path(path)
            if comm.rank == 0 and newest(folder) is None:
                raise nothing_in(folder)
        comm.exchange("RingAttention.restore", timeout, failures=failures, options={"path": str(folder)})
        return Keeping(folder)


def nothing_in(folder: Path) -> ShardError:
    """Give the error for a folder in which there is nothing to go on from. Local."""
    return ShardError(f"{folder}: has no complete checkpoint to go on from")
