"""A call that may be left and gone on with: it looks for a checkpoint, attends, and says what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..call import Call
from ..engine import Engine
from ..errors import OptionError, RingError, ShardError
from ..files.generations import clear
from ..files.paths import as_path
from ..files.states import Generation
from ..forward import Progress
from ..layout import resolve as layout_of
from ..mpi.comm import Comm
from ..plan import Plan
from ..problem import Problem
from ..schedules.spec import Schedule, check_schedule, resolve
from ..softmax import State
from ..trace import Trace
from .folded import Folded
from .identity import difference, problem_name
from .moved import Before, Moved
from .plan import ResumablePlan, nothing_folded
from .resumable import Outcome, on_host, pass_of
from .saving import Saver
from .search import Keeping, Search, unless_required
from .watch import Stop, Watch


@dataclass(frozen=True)
class Kept:
    """What is kept of a call, which has no use when its result is there.

    Attributes
    ----------
    folder : path
    problem : str
        What it is of; see `identity.problem_name`.
    """

    folder: Path
    problem: str

    def clear(self) -> None:
        """Remove it. One rank."""
        clear(self.folder, self.problem)


@dataclass
class Left:
    """A call that was left in mid-way: what `RingAttention.save` writes."""

    saver: Saver
    states: Sequence[State]
    folded: Folded
    pairs: tuple[int, int]

    def save(self, folder: Path) -> None:
        """Write it. Collective over *comm*."""
        self.saver.save(folder, self.states, self.folded, self.pairs)


class ResumableCall:
    """One call. Collective over *comm*.

    Parameters
    ----------
    comm, timeout, problem, call, plan, engine
        See `Saver`.
    keeping : Keeping, optional
    search : Search

    Attributes
    ----------
    saver : Saver

    Raises
    ------
    OptionError
        If the schedule is one whose calls can't be left; the same on every rank.
    """

    def __init__(self, comm: Comm, timeout: float, problem: Problem, call: Call, plan: Plan, engine: Engine,
                 keeping: Keeping | None, search: Search) -> None:
        schedule = plan.grid.schedule
        if plan.replicated or schedule.queries > 1:
            other = Schedule(schedule.heads, 1, schedule.queries * schedule.keys)
            raise OptionError(f"stop and checkpoints: expected a schedule in which no queries travel, got {schedule}; "
                              f"{other} would do" + (", with queries that are dealt out" if plan.replicated else ""))
        self._comm = comm
        self._timeout = timeout
        self._problem = problem
        self._call = call
        self._plan = plan
        self._engine = engine
        self._keeping = keeping
        self._search = search
        self.saver = Saver(comm, timeout, problem, call, plan, engine, search.content)
        self._folded = nothing_folded(plan, self._engine.backend)
        self._pass_plan = ResumablePlan.of(plan, self._folded)
        self._goes_on = False

    def schedule(self) -> Schedule | None:
        """Give the schedule of the checkpoint to go on from, if there is one of this call. Collective over *comm*."""
        try:
            generation = self._generation()
        except (ShardError, OptionError):      # which `go_on` is to tell
            generation = None
        if generation is None:
            return None
        try:
            schedule = resolve(check_schedule(generation.content["placement"].get("schedule")), self._comm.size)
        except OptionError:                    # of another number of ranks
            return Schedule(keys=self._comm.size)
        return schedule if schedule.queries == 1 else None

    def go_on(self) -> None:
        """Take what a checkpoint has, if there is one to go on from. Collective over *comm*.

        Raises
        ------
        ShardError, OptionError
            If one is required, and there is none, it is damaged, or of another call; the same on every rank.
        """
        keeping = self._keeping
        if keeping is None or keeping.resume == "never":
            return
        with unless_required(keeping, self._comm, self._timeout):
            generation = self._generation()
            if generation is not None:
                self._take(generation)

    def attend(self, trace: Trace, progress: Progress | None, stop: Stop | None) -> tuple[Outcome, Left | None]:
        """Attend; give the results, or what was left. Collective over *comm*."""
        total = self._plan.pairs
        before = total - self._pass_plan.pairs

        def save(states: Sequence[State], folded: Folded) -> None:
            if self._keeping is not None:
                self.saver.save(self._keeping.folder, states, folded, (before + trace.pairs, total))

        watch = Watch(stop, self._keeping.every if self._keeping else None, save, self._comm.rank == 0)
        if progress is not None and before:
            progress(before, total)
        one = pass_of(self._problem.canonical)(self._call, self._pass_plan, self._engine, trace, progress,
                                               self._folded, watch, self._goes_on, total, self._problem.kv_layout)
        outcome = one.attend()
        self._plan.seen = self._pass_plan.seen
        if outcome is not None:
            return outcome, None
        self.saver.content()                       # while the caller's arrays are what they were
        states = self._engine.give_states()
        left = Left(self.saver, states, self._folded, (before + trace.pairs, total))
        self._call.states = []
        return None, left

    @property
    def kept(self) -> Kept | None:
        """What is kept of the call, as far as it knows. Local."""
        if self._keeping is None or "problem" not in self._search.content:
            return None
        return Kept(self._keeping.folder, problem_name(self._search.content["problem"]))

    def _generation(self) -> Generation | None:
        return self._search.generation(self.saver.problem)

    def _take(self, generation: Generation) -> None:
        """Take the states of this rank from a generation, and agree on which blocks are to come."""
        why = difference(generation.content["placement"], self.saver.content()["placement"])
        plan = self._plan
        before: Folded | Moved
        if why:
            plan, before = self._take_from_others(generation, why)
            folded = nothing_folded(plan, self._engine.backend)
        else:
            before = self._take_own(generation)
            folded = before.copy()
        pass_plan = ResumablePlan.of(plan, before)
        pass_plan.agree_on_route(self._comm, self._timeout)
        self._folded = folded
        self._pass_plan = pass_plan
        self._goes_on = True
        self.saver.go_on_from(before, generation)

    def _take_own(self, generation: Generation) -> Folded:
        """Take the states that this rank has written."""
        folded = nothing_folded(self._plan, self._engine.backend)
        with self._comm.raise_on_all(self._timeout), self._on_host() as states:
            groups = np.empty(self._plan.rows, np.int64)
            generation.read(self._comm.rank, [*(x for state in states for x in state), folded.left, groups])
            folded.check()
        return folded

    def _take_from_others(self, generation: Generation, why: str) -> tuple[Plan, Moved]:
        """Take the states of this rank's rows from the ranks that have written them; give a plan for their blocks."""
        comm, grid = self._comm, self._plan.grid
        kinds = {"in canonical order": self._problem.canonical, "on GPUs": self._engine.backend.device is not None,
                 "with a schedule that shares heads": grid.schedule.heads > 1}
        for kind in (kind for kind, here in kinds.items() if here):
            raise OptionError(f"{generation.path}: {kind} expected the ranks that wrote the checkpoint, with the same "
                              f"tokens and the same schedule: {why}")
        counts = comm.allgather(np.array([self._call.q.shape[1], self._call.k.shape[1]]), self._timeout).T.tolist()
        before = Before.of(generation, sum(counts[0]), sum(counts[1]))
        with comm.raise_on_all(self._timeout), self._on_host() as states:
            positions = layout_of(self._problem.layout, counts[0], "q").positions(comm.rank)
            moved = Moved(before, positions, grid.group("keys", comm.rank).ranks, comm.rank)
            moved.take(generation, states, comm.rank, comm.size)
        return moved.plan(self._plan), moved

    @contextmanager
    def _on_host(self) -> Iterator[list[tuple[NDArray[Any], ...]]]:
        """Give the states of the call, to be written."""
        plan, backend = self._plan, self._engine.backend
        heads, _, dim_v = plan.dims
        with backend.current(), on_host(self._engine.states(plan.batch, plan.rows, heads, dim_v, plan.accumulator),
                                        backend) as states:
            yield states


def save_left(comm: Comm, timeout: float, left: Left | None, path: Any) -> None:
    """Write what a call has left; see `RingAttention.save`. Collective over *comm*."""
    with comm.one_call():
        folder = Path()
        with comm.noting() as failures:
            folder = as_path(path)
            if left is None:
                raise RingError("RingAttention.save: expected a call before it that was left by its stop=, and there "
                                "is none, or a call came after it")
        comm.exchange("RingAttention.save", timeout, failures=failures, options={"path": str(folder)})
        if left is not None:
            left.save(folder)
