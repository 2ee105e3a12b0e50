"""Queries that all ranks have: what each rank has made of the same rows is put together, the same bits on all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .backends.base import Backend
from .call import Array
from .engine import Engine
from .mpi.exchange import NOTHING
from .softmax import Gradient, State
from .trace import Exchange, Trace

Rows = TypeVar("Rows", State, Gradient)
SHARED_BYTES = 2**26    # that a rank takes at a time to put together what all ranks have made of the same rows


class Replicated:
    """Puts together what the ranks have made of rows that all have. Collective over the engine's communicator.

    Parameters
    ----------
    engine : Engine
    size : int
        Ranks.
    rows : int
        That all have.
    trace : Trace
        Takes the figures.
    """

    def __init__(self, engine: Engine, size: int, rows: int, trace: Trace) -> None:
        self._engine = engine
        self._backend = engine.backend
        self._size = size
        self._rows = rows
        self._trace = trace

    def combine(self, states: Sequence[State], sinks: NDArray[Any] | None) -> None:
        """Put together what each rank has made of rows that all have; `states` take it."""
        for rows in self._some_rows([x for state in states for x in arrays_of(state)]):
            self._combine_states([part_of(state, rows) for state in states], sinks)

    def sum(self, what: str, total: Array) -> None:
        """Sum up what each rank has of an array of shape (batch, rows, ...), the same on all."""
        for element in total:
            for rows in self._some_rows([element]):
                self._sum_rows(what, element[rows])

    def _combine_states(self, states: Sequence[State], sinks: NDArray[Any] | None) -> None:
        """Put together what each rank has made of some rows."""
        everyone = self._of_all_ranks("states", [x for state in states for x in arrays_of(state)])
        for state in states:
            self._backend.reset(state, sinks)
        for parts in everyone:
            combine_parts(self._backend, states, parts)

    def _sum_rows(self, what: str, total: Array) -> None:
        """Sum up what each rank has of some rows."""
        everyone = self._of_all_ranks(what, [total])
        self._backend.clear(total)
        for (part,) in everyone:
            self._backend.add(total, part)

    def _of_all_ranks(self, what: str, arrays: Sequence[Array]) -> list[list[Array]]:
        """Give such arrays of each rank, in the order of the ranks: what is made of them is the same on all."""
        record = Exchange(what, self._trace.now())
        mine = np.concatenate([NOTHING, *(self._backend.to_numpy(x).reshape(-1).view(np.uint8) for x in arrays)])
        start = time.perf_counter()
        rows = self._engine.share(mine)
        record.wait_seconds = time.perf_counter() - start
        record.bytes_sent = record.bytes_received = mine.size * (len(rows) - 1)
        self._trace.exchanges.append(record)
        edges = np.cumsum([x.nbytes for x in arrays])
        return [[self._backend.to_device(part.view(x.dtype).reshape(x.shape))
                 for part, x in zip(np.split(row, edges)[:-1], arrays, strict=True)] for row in rows]

    def _some_rows(self, arrays: Sequence[Array]) -> Iterator[slice]:
        """Cut the rows of arrays, so that those of all ranks, and two of one while they are summed up, take little."""
        row_bytes = sum(x.nbytes for x in arrays) // max(1, self._rows) * (self._size + 2)
        step = max(1, SHARED_BYTES // max(1, row_bytes))
        return (slice(start, start + step) for start in range(0, self._rows, step))


def arrays_of(state: State) -> tuple[Array, Array, Array]:
    """Give what a state consists of, as it travels. Local."""
    return state.acc, state.row_max, state.row_sum


def part_of(whole: Rows, rows: slice) -> Rows:
    """Give some rows of a state or a gradient; itself if they are all. Local."""
    arrays = list(vars(whole).values())
    if not rows.start and rows.stop == len(arrays[0]):
        return whole
    parts: list[Any] = [x if x is None else x[rows] for x in arrays]
    return type(whole)(*parts)


def combine_parts(backend: Backend, states: Sequence[State], parts: Sequence[Array]) -> None:
    """Fold what another rank has made of the same rows into their states. Local."""
    for number, state in enumerate(states):
        acc, row_max, row_sum = parts[3 * number:3 * number + 3]
        backend.combine(state, State(acc[None], row_max[None], row_sum[None]))
