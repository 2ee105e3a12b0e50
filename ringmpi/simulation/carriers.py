"""What the ranks do in a step of each carrier, as arrays of shape (groups, places); see `ringmpi.schedules`."""

from __future__ import annotations

import numpy as np

from ..schedules.base import Route
from .alike import Alike
from .case import Case
from .clock import Clock
from .wires import Integers, Numbers, Wave


class Steps:
    """The steps of a carrier.

    Parameters
    ----------
    case : Case
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.keys = case.schedule.keys
        self.places = np.arange(self.keys)

    @property
    def constant(self) -> bool:
        """Whether all steps after the first and before the last are the same."""
        return False

    def alike(self, start: Numbers, heard: Numbers) -> Alike:
        """Say which ranks do the same, if they begin then, and hear the queries of others then. Local."""
        return Alike()

    def begin(self, clock: Clock) -> None:
        """Do what comes before the first step. Local."""

    def step(self, number: int, clock: Clock) -> None:
        """Take a step. Local."""
        clock.now = clock.now + self.case.step_seconds
        self._step(number, clock)

    def _step(self, number: int, clock: Clock) -> None:
        raise NotImplementedError

    def _compute(self, number: int, clock: Clock, seconds: Numbers) -> None:
        """Compute: in the first step with a rank's own queries, and then with those that have come meanwhile."""
        if number == 0:
            own = self.case.own_share
            clock.compute_for(seconds * own)
            clock.now = np.maximum(clock.now, clock.heard)
            seconds = seconds * (1 - own)
        clock.compute_for(seconds)

    def _upstream(self, hops: int) -> Integers:
        """Give for each place the one that many hops upstream."""
        return (self.places - hops) % self.keys


class RingSteps(Steps):
    """A ring, or two with half of each block, one each way."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._ways = (1,) if case.schedule.carrier == "ring" else (1, -1)
        two = len(self._ways) > 1
        self._shares = [case.first_half, 1 - case.first_half] if two else [np.ones(case.tokens.shape)]
        self._last = np.full((len(self._ways), *case.ranks.shape), self.keys - 1)
        for group in range(0 if case.is_even else len(case.ranks)):
            needed = case.needed(group)
            for way, last in zip(self._ways, self._last, strict=True):
                last[group] = Route(needed[::way, ::way]).last[::way]
        self._fixed: tuple[Numbers, Numbers, Wave] | None = None
        self._known: tuple[int, Wave] | None = None            # the wave of a step
        self._upstreams = self._neighbours(self.keys)

    def _neighbours(self, places: int) -> dict[int, Integers]:
        """Give for each of some places the one before it, either way round."""
        return {way: (np.arange(places) - way) % places for way in (1, -1)}

    @property
    def constant(self) -> bool:
        """See `Steps.constant`."""
        return self._fixed is not None

    def alike(self, start: Numbers, heard: Numbers) -> Alike:
        """See `Steps.alike`. Local."""
        if not self.case.is_even or self.case.trouble.jitter:
            return Alike()
        first, later, wave = self.case.seconds_of(0), self.case.seconds_of(1), self._wave(0)
        alike = Alike(np.stack([start, heard, first, later, *wave.seconds, *wave.copying, *wave.nbytes]))
        self._fixed = alike.fold(first), alike.fold(later), wave.map(alike.fold)
        self._upstreams = self._neighbours(self._fixed[0].shape[1])
        return alike

    def _step(self, number: int, clock: Clock) -> None:
        if self._fixed:
            first, later, wave = self._fixed
            seconds = later if number else first
        else:
            seconds, wave = self.case.seconds_of(number), self._wave(0 if self.case.is_even else number)
        begun = clock.now
        self._compute(number, clock, seconds)
        if number == self.keys - 1:
            return
        clock.copy_for(self.case.copying(wave.copying.sum(axis=0)))
        until = []
        for way, moves, nbytes, taken in zip(self._ways, wave.moves, wave.nbytes, wave.seconds, strict=True):
            both = np.maximum(begun, begun[:, self._upstreams[way]])
            arrived = np.where(moves, both + taken, 0.0)
            until += [arrived, arrived[:, self._upstreams[-way]]]
            clock.carried += taken
            clock.sent += nbytes[:, self._upstreams[-way]]
        clock.wait_until(*until)

    def _wave(self, number: int) -> Wave:
        """Give what comes to each place in a step, for each way round; if all blocks are alike, of the first step."""
        if self._known and number == self._known[0]:
            return self._known[1]
        case = self.case
        sources, nbytes, moves = [], [], []
        for way, last, share in zip(self._ways, self._last, self._shares, strict=True):
            owners = self._upstream(way * (number + 1))
            sources.append(np.roll(case.ranks, way, 1))
            nbytes.append((case.block_bytes * share)[:, owners])
            moves.append(last[:, owners] > number)
        dests = np.broadcast_to(case.ranks, (len(sources), *case.ranks.shape))
        wave = case.wires.wave(np.stack(sources), dests, np.stack(nbytes), np.stack(moves), case.least)
        self._known = number, wave
        return wave


class GatherSteps(Steps):
    """All blocks at once; a rank takes one after the other, in the order of a ring."""

    def begin(self, clock: Clock) -> None:
        """See `Steps.begin`. Local."""
        self._begun = clock.now
        self._taken = clock.now                       # when the last block that a rank has sent was taken
        self._before = np.zeros(clock.now.shape)      # what comes to a rank before, one message after the other

    def _step(self, number: int, clock: Clock) -> None:
        case, hop = self.case, number + 1
        self._compute(number, clock, case.seconds_of(number))
        if hop == self.keys:
            clock.wait_until(self._taken)
            return
        wave = arriving(case, hop)
        clock.copy_for(case.copying(wave.copying))
        both = np.maximum(self._begun, np.roll(self._begun, hop, 1))
        arrived = np.where(wave.moves, both + self._before + wave.seconds, 0.0)
        self._before = self._before + wave.seconds
        self._taken = np.maximum(self._taken, np.roll(arrived, -hop, 1))
        clock.carried += wave.seconds
        clock.sent += np.roll(wave.nbytes, -hop, 1)
        clock.wait_until(arrived)


def arriving(case: Case, hop: int) -> Wave:
    """Give what comes to each place straight from the one that many hops upstream, if it is needed. Local."""
    sources = (np.arange(case.schedule.keys) - hop) % case.schedule.keys
    moves = np.broadcast_to(case.work(sources) > 0, case.ranks.shape)
    return case.wires.wave(case.ranks[:, sources], case.ranks, case.block_bytes[:, sources], moves, case.least)


class WindowSteps(Steps):
    """Blocks that are read where their owners have put them."""

    def begin(self, clock: Clock) -> None:
        """See `Steps.begin`. Local."""
        case = self.case
        clock.copy_for(case.copying(case.put_seconds))
        self._there = clock.now + case.machine.rates.inside.latency

    def _step(self, number: int, clock: Clock) -> None:
        case = self.case
        self._compute(number, clock, case.seconds_of(number))
        if number < self.keys - 1:
            clock.copy_for(np.full(clock.now.shape, case.copying(case.notice_seconds)))
            sources = self._upstream(number + 1)
            clock.wait_until(np.where(case.work(sources) > 0, self._there[:, sources], 0.0))


class BroadcastSteps(Steps):
    """Blocks down trees, in the order of their owners."""

    def begin(self, clock: Clock) -> None:
        """See `Steps.begin`. Local."""
        self._coming, self._passed_on = self._send(0, clock)
        clock.wait_until(self._coming)

    def _step(self, number: int, clock: Clock) -> None:
        case = self.case
        going = self._passed_on
        coming, self._copying = clock.now, np.zeros(clock.now.shape)
        if number < self.keys - 1:
            coming, self._passed_on = self._send(number + 1, clock)
        self._compute(number, clock, case.seconds_of(number))
        clock.copy_for(self._copying)
        clock.wait_until(coming, going)
        if number == self.keys - 1:
            clock.wait_until(self._passed_on)

    def _send(self, owner: int, clock: Clock) -> tuple[Numbers, Numbers]:
        """Send a block; say when each place has it, and when all have it that it sends it to."""
        case = self.case
        arrived, passed_on = clock.now.copy(), clock.now.copy()
        copying = np.zeros(clock.now.shape)
        needs = np.broadcast_to(case.work(np.full(self.keys, owner)) > 0, case.ranks.shape)
        for group in range(len(case.ranks)):
            members = (owner + np.flatnonzero(needs[group, (owner + self.places) % self.keys])) % self.keys
            members = np.concatenate([[owner], members[members != owner]])
            for parents, children in tree_levels(members):
                wave = case.wires.wave(case.ranks[group, parents], case.ranks[group, children],
                                       case.block_bytes[group, [owner] * len(parents)], None, case.least)
                first = np.maximum(clock.now[group, parents], arrived[group, parents])
                begun = np.maximum(np.maximum(first, passed_on[group, parents]), clock.now[group, children])
                done = begun + wave.seconds
                arrived[group, children] = done
                passed_on[group, parents] = done
                clock.carried[group, children] += wave.seconds
                clock.sent[group, parents] += wave.nbytes
                copying[group, children] += wave.copying
        self._copying = case.copying(copying)
        return arrived, passed_on


def tree_levels(members: Integers) -> list[tuple[Integers, Integers]]:
    """Give the hops of a block down its tree, in the order in which they come about: those that are sent at one time.

    A place sends first to the child that has most below it; see `Tree`. So a bit of the places is a turn, the highest
    first: in it all places that have the block send to the one that many places farther.

    Parameters
    ----------
    members : integer array
        By place in the tree.

    Returns
    -------
    list of (parents, children)
    """
    count = len(members)
    levels = []
    for bit in reversed(range(max(0, count - 1).bit_length())):
        hop = 1 << bit
        children = np.arange(hop, count, 2 * hop)
        if len(children):
            levels.append((members[children - hop], members[children]))
    return levels
