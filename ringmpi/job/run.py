"""What every step of a job has at hand: the communicators, the deadline and the timer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..mpi import comm as mpi
from ..mpi.world import comm_world
from ..phases import phase


class PhaseTimer:
    """Seconds that this rank spent in each phase of a job."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, doing: str) -> Iterator[None]:
        """Add the time that a block takes to phase `name`, and say what is done in it."""
        start = time.perf_counter()
        with phase(doing):
            yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count `seconds` of phase `source` as phase `target`."""
        self.phases[source] -= seconds
        self.phases[target] = self.phases.get(target, 0.0) + seconds


@dataclass(frozen=True)
class Run:
    """A job on this rank.

    Attributes
    ----------
    world : MPI.Intracomm
        COMM_WORLD, for the library's collective functions.
    comm : Comm
        The private communicator on it.
    timeout : float
        Seconds to wait for other ranks.
    timer : PhaseTimer
    """

    world: Any
    comm: mpi.Comm
    timeout: float
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    @classmethod
    def start(cls, timeout: float, expect_ranks: int | None) -> Run:
        """Start MPI, and meet the other ranks. Collective over COMM_WORLD.

        Raises
        ------
        LaunchError
            If there are not `expect_ranks` ranks.
        """
        return cls.on(comm_world(timeout, expect_ranks), timeout)

    @classmethod
    def on(cls, world: Any, timeout: float) -> Run:
        """Meet the other ranks of COMM_WORLD, or of what is left of it. Collective over *world*."""
        return cls(world, mpi.private_comm(world, timeout, exclusive=True), timeout)

    def raise_on_all(self) -> AbstractContextManager[None]:
        """Run a block that may fail on some ranks: all raise or none. Collective over *comm*."""
        return self.comm.raise_on_all(self.timeout)

    def allgather_text(self, text: str) -> list[str]:
        """Gather a text from every rank on every rank. Collective over *comm*."""
        return self.comm.allgather_text(text, self.timeout)
