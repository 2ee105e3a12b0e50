"""The steps of some ranks one event after the other, as their carrier says them: the model at its most exact.

What is sent comes from `Carrier.steps`, and threads share cores moment by moment: a rank that waits leaves its core to
the others of its node. For some tens of ranks; `ringmpi.simulation.rounds` does the same for many.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .case import Case
from .exchanges import all_bytes, exchange, exchanged_bytes
from .outcome import Outcome
from .parcels import Parcel, parcels_of

MOST_RANKS = 64              # for which it takes seconds


class Task(NamedTuple):
    """What a rank is at.

    Attributes
    ----------
    account : str
        What its time counts as: "compute", "copied", "wait", or none of these.
    seconds : float
        To work, alone on the cores.
    until : callable, optional
        It waits, and this says until when, as far as that is known.
    """

    account: str
    seconds: float = 0.0
    until: Callable[[], float] | None = None


@dataclass(eq=False)
class _Rank:
    """A rank: what it will do, what it is at, and what it has done."""

    life: Iterator[Task]
    node: int
    task: Task | None
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ended: float = 0.0

    @property
    def works(self) -> bool:
        """Whether it needs its cores."""
        return self.task is not None and self.task.until is None


def simulate_events(case: Case) -> Outcome:
    """Simulate a forward pass. Local."""
    events = _Events(case)
    events.run()
    ranks = [events.ranks[rank] for rank in case.ranks.ravel().tolist()]
    ended = np.array([rank.ended for rank in ranks]).reshape(case.ranks.shape)
    compute, copied, wait = (np.array([rank.spent[name] for rank in ranks]).reshape(case.ranks.shape)
                             for name in ("compute", "copied", "wait"))
    sizes = exchanged_bytes(case)
    carried, sent = np.zeros(ended.shape), np.full(ended.shape, all_bytes(case))
    place = {rank: at for at, rank in enumerate(case.ranks.ravel().tolist())}
    for parcel in events.parcels:
        carried.flat[place[parcel.dest]] += parcel.taken
        sent.flat[place[parcel.source]] += parcel.nbytes
    home, _ = exchange(case, "queries", sizes["states"], ended)
    ended, _ = exchange(case, "heads", sizes["results"], home)
    return Outcome(case, ended, compute, copied, wait, carried, sent,
                   case.schedule.keys)


class _Events:
    """A simulation under way."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.now = 0.0
        sizes = exchanged_bytes(case)
        begun, _ = exchange(case, "heads", sizes["heads"], np.full(case.ranks.shape, case.call_seconds))
        self._heard, self._start = exchange(case, "queries", sizes["queries"], begun)

        # What each rank posts at the beginning of a step, awaits at its end, and copies meanwhile.
        self.parcels = list(parcels_of(case))
        self._posted: dict[tuple[int, int], float] = {}
        self._posts: dict[tuple[int, int], list[Parcel]] = defaultdict(list)
        self._due: dict[tuple[int, int], list[Parcel]] = defaultdict(list)
        self._copying: dict[tuple[int, int], float] = defaultdict(float)
        for parcel in self.parcels:
            for rank, step in zip((parcel.source, parcel.dest), parcel.due, strict=True):
                self._posts[rank, parcel.posted].append(parcel)
                self._due[rank, step].append(parcel)
            self._copying[parcel.dest, parcel.due[1]] += parcel.copying / case.machine.threads
        self.ranks: dict[int, _Rank] = {}
        for at in np.ndindex(case.ranks.shape):
            rank = int(case.ranks[at])
            self.ranks[rank] = _Rank(self._live(*at), rank // case.machine.ranks_per_node, Task(""))

    def run(self) -> None:
        """Let all ranks live to their ends."""
        alive = list(self.ranks.values())
        while alive:
            speeds = self._speeds(alive)
            moments = [self._moment(rank, speeds[rank.node]) for rank in alive]
            step = max(0.0, min(moments) - self.now)
            self.now += step
            for rank, moment in zip(alive, moments, strict=True):
                task = rank.task or Task("")
                rank.spent[task.account] += step
                if rank.works:
                    rank.task = task._replace(seconds=max(0.0, task.seconds - step * speeds[rank.node]))
                if moment <= self.now:
                    rank.task = next(rank.life, None)
                    rank.ended = self.now
            alive = [rank for rank in alive if rank.task is not None]

    def _speeds(self, alive: list[_Rank]) -> dict[int, float]:
        """Say by node how fast its ranks work, whose threads share the cores."""
        machine = self.case.machine
        working = Counter(rank.node for rank in alive if rank.works)
        return {rank.node: 1.0 if machine.on_gpu else min(1.0, machine.cores / max(1, working[rank.node])
                                                          / machine.threads) for rank in alive}

    def _moment(self, rank: _Rank, speed: float) -> float:
        """Say when a rank goes on to its next task; infinite if that is not known."""
        task = rank.task or Task("")
        return max(self.now, task.until()) if task.until else self.now + task.seconds / speed

    def _live(self, group: int, place: int) -> Iterator[Task]:
        """Give the tasks of a rank, one after the other."""
        case = self.case
        rank = int(case.ranks[group, place])
        keys = case.schedule.keys
        yield Task("", until=lambda: float(self._start[group, place]))
        if case.schedule.carrier == "window":
            yield Task("copied", float(case.put_seconds[group, place]) / case.machine.threads)
        for step in range(-1, keys):
            if step >= 0:
                yield Task("", case.step_alone)
            self._post(rank, step)
            if step >= 0:
                seconds = float(case.seconds_alone(step)[group, place])
                if step == 0:
                    own = case.own_share
                    yield Task("compute", seconds * own)
                    yield Task("", until=lambda: float(self._heard[group, place]))
                    seconds *= 1 - own
                yield Task("compute", seconds)
                yield Task("copied", self._copying[rank, step])
                if case.schedule.carrier == "window" and step < keys - 1:
                    yield Task("copied", case.notice_seconds / case.machine.threads)
            yield Task("wait", until=functools.partial(_last, self._due[rank, step]))

    def _post(self, rank: int, step: int) -> None:
        """Let a rank ask for what it is sent or sends from a step on; what becomes of it is known once both have."""
        self._posted[rank, step] = self.now
        ready = self._posts[rank, step]
        while ready:
            parcel = ready.pop()
            both = [self._posted.get((end, parcel.posted), math.inf) for end in (parcel.source, parcel.dest)]
            begun = max(*both, *(other.done for other in parcel.after))
            if math.isfinite(begun) and math.isinf(parcel.done):
                parcel.done = begun + parcel.delay + parcel.taken
                ready += parcel.before


def _last(parcels: list[Parcel]) -> float:
    """Say when the last of some messages is there."""
    return max((parcel.done for parcel in parcels), default=0.0)
