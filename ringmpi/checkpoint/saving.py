"""Writing a generation of a checkpoint: each rank its states, and rank 0 at last what makes them one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..call import Call
from ..engine import Engine
from ..errors import CommError, RankLost, RingError, RingTimeout
from ..files.generations import NewGeneration
from ..files.states import Generation
from ..mpi.comm import Comm
from ..phases import phase
from ..plan import Plan
from ..problem import Problem
from ..softmax import State
from .folded import Folded
from .identity import describe_placement, describe_problem, problem_name
from .moved import Moved
from .plan import nothing_folded
from .resumable import on_host


class Saver:
    """Writes generations of one call.

    Parameters
    ----------
    comm : Comm
    timeout : float
        Seconds to wait for other ranks.
    problem, call, plan, engine
        Of the call.
    content : dict
        What has been found out of the call, its `problem` perhaps; more is added.

    Attributes
    ----------
    before : Folded or Moved
        What the rows had met when the call began.
    blocks : mapping or None
        The blocks that they had met, if they are of other ranks.
    share : float
        Of the pairs of all ranks, what had been computed by then.
    """

    def __init__(self, comm: Comm, timeout: float, problem: Problem, call: Call, plan: Plan, engine: Engine,
                 content: dict[str, Any]) -> None:
        self._comm = comm
        self._timeout = timeout
        self._about = problem, call, plan, engine
        self._content = content
        self._content.pop("placement", None)              # of another plan
        self.before: Folded | Moved = nothing_folded(plan, engine.backend)
        self.blocks: Mapping[str, Any] | None = None
        self.share = 0.0

    def go_on_from(self, before: Folded | Moved, generation: Generation) -> None:
        """Take note of what the call goes on from. Local."""
        self.before = before
        if isinstance(before, Moved):
            self.blocks = generation.content["placement"]["blocks"]
            self._content.pop("placement", None)

    def problem(self) -> dict[str, Any]:
        """Say what is computed, found out once. Collective over *comm*."""
        if "problem" not in self._content:
            self._content["problem"] = describe_problem(*self._about, self._comm, self._timeout)
        found: dict[str, Any] = self._content["problem"]
        return found

    def content(self) -> dict[str, Any]:
        """Say what is computed, and where, found out once. Collective over *comm*."""
        problem, call, plan, _ = self._about
        self.problem()
        if "placement" not in self._content:
            self._content["placement"] = describe_placement(problem, plan, call, self._comm, self._timeout, self.blocks)
        return self._content

    def save(self, folder: Path, states: Sequence[State], folded: Folded, pairs: tuple[int, int]) -> None:
        """Write a generation: after it a call can go on from there. Collective over *comm*.

        Parameters
        ----------
        folder : path
            The same on all ranks.
        states, folded
            Of this rank.
        pairs : (int, int)
            That this rank has done, and that it has in all.

        Raises
        ------
        OutputError
            If a rank can't write; the same on every rank. The last generation is as it was.
        """
        backend = self._about[-1].backend

        def write(made: NewGeneration) -> dict[str, Any]:
            with backend.current():
                left, groups = self.before.table(folded)
                with on_host(states, backend) as arrays:
                    mine = made.write(self._comm.rank, [*(x for state in arrays for x in state), left, groups])
            return {**mine, "pairs": list(pairs), "groups": len(left)}

        shards = write_generation(self._comm, self._timeout, folder, self.content(), write)
        done, total = (sum(pairs) for pairs in zip(*(shard["pairs"] for shard in shards), strict=True))
        self.share = done / max(1, total)


def write_generation(comm: Comm, timeout: float, folder: Path, content: Mapping[str, Any],
                     write: Callable[[NewGeneration], dict[str, Any]]) -> list[dict[str, Any]]:
    """Write a generation: after it another job can go on from there. Collective over *comm*.

    Parameters
    ----------
    content : mapping
        What the manifest says, its `problem` among it.
    write : callable
        Writes this rank's part, and says of it what the manifest is to say. Local.

    Returns
    -------
    list of dict
        What the manifest says of the part of each rank.

    Raises
    ------
    OutputError
        If a rank can't write; the same on every rank. The last generation is as it was.
    """
    with phase(f"saving a checkpoint in {folder}"):
        made = _prepare(comm, timeout, folder, problem_name(content["problem"]))
        try:
            mine: dict[str, Any] = {}
            with comm.noting() as failures:
                mine = write(made)
            rows = comm.exchange("", timeout, _encoded(json.dumps(mine)), failures=failures)
            shards = [json.loads(row.tobytes()) for row in rows]
            with comm.raise_on_all(timeout):
                if comm.rank == 0:
                    made.publish({**content, "shards": shards})
        except RingError as error:
            if not isinstance(error, (RingTimeout, RankLost, CommError)):      # all know that it is not complete
                made.discard(comm.rank)
            raise
    return shards


def _prepare(comm: Comm, timeout: float, folder: Path, problem: str) -> NewGeneration:
    """Have rank 0 make a folder for a generation."""
    name = ""
    with comm.noting() as failures:
        if comm.rank == 0:
            name = NewGeneration.prepare(folder, problem, uuid.uuid4().hex[:12]).path.name
    names = comm.exchange("", timeout, _encoded(name), failures=failures)
    return NewGeneration(folder / names[0].tobytes().decode())


def _encoded(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)
