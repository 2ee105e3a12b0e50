"""A forward pass that can be left after any step, and that can go on where another was left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..call import Array, Call
from ..canonical import CanonicalPass
from ..engine import Engine
from ..forward import Progress
from ..layout import Layout, resolve
from ..passes import Pass
from ..schedules.base import Blocks, Work
from ..schedules.token_exchange import Move
from ..softmax import State
from ..trace import Trace
from .folded import Folded
from .moved import Moved
from .plan import ResumablePlan

Outcome = tuple[Array, Array] | None


class Wishes(Protocol):
    """What a rank wishes for while it computes."""

    def stop(self) -> bool:
        """Say whether to leave, at once: asked before each piece of the rows. Local."""

    def after_step(self) -> int:
        """Say what to do after a step: `waits.LEAVE`, `waits.PAUSE` or 0. Local."""

    def pause(self, states: Sequence[State], folded: Folded) -> None:
        """Do what is to be done between two steps. Collective over *comm*."""


class ResumablePass(Pass):
    """A forward pass in which each step's rows are computed piece by piece.

    Parameters
    ----------
    call, plan, engine, trace, progress
        See `Pass`.
    folded : Folded
        What the states have met; updated.
    wishes : Wishes
    goes_on : bool
        Whether the states of the engine have met something already.
    pairs : int
        That there are in all, for `progress`.
    kv_layout : str or Layout
        Of the caller's k and v.
    """

    def __init__(self, call: Call, plan: ResumablePlan, engine: Engine, trace: Trace, progress: Progress | None,
                 folded: Folded, wishes: Wishes, goes_on: bool, pairs: int, kv_layout: str | Layout) -> None:
        super().__init__(call, plan, engine, trace, progress)
        self.plan: ResumablePlan = plan
        self._pairs = pairs
        self._kv_layout = kv_layout
        self._folded = folded
        self._wishes = wishes
        self._goes_on = goes_on
        self._states: Sequence[State] = ()

    def attend(self) -> Outcome:
        """Attend; give None, on all ranks, if it was left before its end: then the engine's states are as they are."""
        self._prepare_pass("forward")
        with self.backend.current():
            with self._abandoned_on_error():
                self._find_seen()
                states = self._fold()
                needed = self.plan.route.needed[self.movers.carrier.group.index]
                mine = np.array([self._folded.leaves(needed)], np.uint8)
                if any(row[0] for row in self.engine.share(mine)):
                    return None
                own = self._bring_home(states)
            return self._results(own)

    def _keys(self) -> Sequence[Array]:
        """Give this rank's block of keys and values: its own, or those blocks that it goes on with."""
        moved = self.plan.before
        keys = super()._keys()
        if not isinstance(moved, Moved):
            return keys
        exchange = self.movers.tokens
        layout = resolve(self._kv_layout, [int(row.view(np.int64)[0]) for row in self.engine.share(
            np.array([keys[0].shape[1]]).view(np.uint8))], "k and v")
        move = Move.between(layout, moved.layout, exchange.comm.rank)
        keys = exchange.move("blocks", keys, move, self.backend.device, self.trace)
        blocks = [self.backend.empty(x.shape, x.dtype) for x in keys]
        for target, x in zip(blocks, keys, strict=True):
            bits = f"u{x.dtype.itemsize}"
            target.view(bits)[:, moved.places] = x.view(bits)
        return blocks

    def _reset(self, states: Sequence[State], sinks: NDArray[Any] | None) -> None:
        """Let states be as they are before the first block that is left."""
        self._states = states
        if not self._goes_on:
            super()._reset(states, sinks)

    def _works(self, keys: Sequence[Array]) -> Iterator[Work]:
        """Yield the work with every block that is left, until a rank asks to leave."""
        plan = self.plan
        return self.movers.carrier.forward(Blocks(keys, plan.shapes), plan.route, self.trace, self._wishes.after_step,
                                           self._pause)

    def _rounds(self, works: Iterator[Work], rows: Sequence[Array]) -> Iterator[tuple[Work, slice]]:
        """Cut the rows into pieces; once this rank is to stop, it only keeps in step with the others."""
        folded = self._folded
        for work, everything in super()._rounds(works, rows):
            left = [number for number in range(len(folded.rows)) if folded.is_left(number, work)]
            parts = [([number], folded.rows[number]) for number in left]
            if left and not self.plan.comes_apart(work, folded.rows):
                parts = [(left, everything)]
            for numbers, part in parts:
                if self._wishes.stop():
                    break
                yield work, part
                for number in numbers:
                    folded.note(number, work)

    def _pause(self) -> None:
        self._wishes.pause(self._states, self._folded)


class ResumableCanonicalPass(ResumablePass, CanonicalPass):
    """The same in canonical order."""


def pass_of(canonical: bool) -> Callable[..., ResumablePass]:
    """Give the class of a pass. Local."""
    return ResumableCanonicalPass if canonical else ResumablePass


@contextmanager
def on_host(states: Sequence[State], backend: Any) -> Iterator[list[tuple[NDArray[Any], ...]]]:
    """Give acc, row_max and row_sum of each state on the host, to be written within a block. Local."""
    arrays = [tuple(backend.to_numpy(x) for x in (state.acc, state.row_max, state.row_sum)) for state in states]
    yield arrays
    if backend.device:                    # these are copies
        for state, written in zip(states, arrays, strict=True):
            for x, y in zip((state.acc, state.row_max, state.row_sum), written, strict=True):
                x[...] = backend.to_device(y)
