"""What a carrier sends, as its `steps` say it, with what each message waits for and how long it takes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..schedules.base import Message, Route
from ..schedules.movers import carrier_class
from ..schedules.relays import Tree
from .case import Case
from .wires import Wave


@dataclass(eq=False)
class Parcel:
    """A message between two ranks.

    Attributes
    ----------
    source, dest : int
    nbytes : float
    posted : int
        The step at whose beginning both ends ask for it; -1: before the first.
    due : (int, int)
        The steps of the source and of the dest that end only when it is there.
    taken : float
        Seconds that it takes by itself.
    delay : float
        Seconds that it takes after others on the same links.
    copying : float
        Seconds of a core of the dest.
    after, before : list of Parcel
        Those that must be there before it begins, and those that it must be before.
    done : float
        When it is there; infinite as long as that is not known.
    """

    source: int
    dest: int
    nbytes: float
    posted: int
    due: tuple[int, int]
    taken: float
    delay: float
    copying: float
    after: list[Parcel] = field(default_factory=list)
    before: list[Parcel] = field(default_factory=list)
    done: float = math.inf


def parcels_of(case: Case) -> Iterator[Parcel]:
    """Give all that is sent in the steps. Local."""
    if carrier_class(case.schedule.carrier).in_place:
        yield from _notices(case)
    elif case.schedule.carrier == "broadcast":
        for group in range(len(case.ranks)):
            yield from _down_trees(case, group)
    else:
        yield from _stepwise(case)


def _steps(case: Case, group: int) -> list[list[Message]]:
    """Ask the carrier what the members of a group send."""
    route = Route(case.needed(group), [int(n) for n in case.tokens[group]])
    return carrier_class(case.schedule.carrier).steps(route, [[int(n)] for n in case.block_bytes[group]])


def _wave(case: Case, messages: Sequence[tuple[int, Message]]) -> Wave:
    """Say how long some messages take, each with its group."""
    sources, dests = (np.array([case.ranks[group, getattr(x, end)] for group, x in messages])
                      for end in ("source", "dest"))
    return case.wires.wave(sources, dests, np.array([x.nbytes for _, x in messages], float), None, case.least)


def _stepwise(case: Case) -> Iterator[Parcel]:
    """Give what goes round a ring, or straight from each to all."""
    last = case.schedule.keys - 1
    straight = case.schedule.carrier == "gather"
    before: dict[int, float] = defaultdict(float)          # by rank, what comes to it before on the same links
    everyone = [_steps(case, group) for group in range(len(case.ranks))]
    for number in range(last):
        messages = [(group, x) for group, steps in enumerate(everyone) for x in steps[number]]
        if not messages:
            continue
        wave = _wave(case, messages)
        for (group, x), seconds, copying in zip(messages, wave.seconds, wave.copying, strict=True):
            source, dest = (int(case.ranks[group, place]) for place in (x.source, x.dest))
            delay = before[dest] if straight else 0.0
            yield Parcel(source, dest, x.nbytes, -1 if straight else number, (last if straight else number, number),
                         float(seconds), delay, float(copying))
            before[dest] += float(seconds)


def _down_trees(case: Case, group: int) -> Iterator[Parcel]:
    """Give what goes down the trees of a group: a place sends to one after the other, once it has the block."""
    steps = _steps(case, group)
    route = Route(case.needed(group))
    for owner in range(case.schedule.keys):
        tree = Tree.of(route, owner)
        messages = [x for step in steps for x in step if x.owner == owner]
        place = {member: number for number, member in enumerate(tree.members)}
        latest: dict[int, list[Parcel]] = defaultdict(list)
        for bit in reversed(range(len(tree.members).bit_length())):
            some = [(group, x) for x in messages if place[x.dest] & -place[x.dest] == 1 << bit]
            if not some:
                continue
            wave = _wave(case, some)
            for (_, x), seconds, copying in zip(some, wave.seconds, wave.copying, strict=True):
                parcel = Parcel(int(case.ranks[group, x.source]), int(case.ranks[group, x.dest]), x.nbytes, owner - 1,
                                (owner, owner - 1), float(seconds), 0.0, float(copying), list(latest[x.source]))
                for other in parcel.after:
                    other.before.append(parcel)
                latest[x.source] = [parcel]
                latest[x.dest] = [parcel]
                yield parcel


def _notices(case: Case) -> Iterator[Parcel]:
    """Say whose block is there, to those that read it in place."""
    keys = case.schedule.keys
    latency = case.machine.rates.inside.latency
    for group in range(len(case.ranks)):
        needed = case.needed(group)
        for hop in range(1, keys):
            for place in range(keys):
                owner = (place - hop) % keys
                if needed[place, owner]:
                    yield Parcel(int(case.ranks[group, owner]), int(case.ranks[group, place]), 0.0, -1, (keys, hop - 1),
                                 0.0, latency, 0.0)
