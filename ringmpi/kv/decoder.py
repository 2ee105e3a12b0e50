"""Queries that all ranks have: each rank folds its own tokens, then the states of all are put together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..call import Array
from ..engine import Engine
from ..mpi.comm import Comm
from ..problem import Problem
from ..score import Score
from ..softmax import State
from .store import KVStore


class Query(NamedTuple):
    """What is asked of a cache, checked.

    Attributes
    ----------
    q : array of shape (batch, n_q, heads, dim)
        Where it is computed with.
    on_gpu : bool
        Whether the caller's array is on a GPU.
    sinks : array of shape (heads,), accumulator dtype, optional
    first, total : int
        Which of all queries are in q, for the mask: from the first on, of so many.
    """

    q: Array
    on_gpu: bool
    sinks: NDArray[Any] | None
    first: int
    total: int

    def parts(self, rows: int) -> Iterator[Query]:
        """Cut it into parts of so many queries at most; at least one. Local."""
        for start in range(0, max(1, self.total), rows):
            yield self._replace(q=self.q[:, start:start + rows], first=start)


class Decoder:
    """Computes with the tokens of a rank. Local.

    Parameters
    ----------
    comm : Comm
        Is given time while a rank computes.
    engine : Engine
    problem : Problem
        Mask and scores.
    acc_dtype : dtype
        Of the accumulator.
    dim_v : int
    """

    def __init__(self, comm: Comm, engine: Engine, problem: Problem, acc_dtype: np.dtype[Any], dim_v: int) -> None:
        self._comm = comm
        self._engine = engine
        self._problem = problem
        self._acc_dtype = acc_dtype
        self._dim_v = dim_v

    def accumulate(self, query: Query, store: KVStore, length: int) -> NDArray[np.uint8]:
        """Fold this rank's tokens into the states of the queries. Local.

        Parameters
        ----------
        query : Query
        store : KVStore
            This rank's tokens.
        length : int
            Of the sequence.

        Returns
        -------
        uint8 array
            The states, and then which queries see any key: what `combine` takes.
        """
        problem = self._problem
        backend = self._engine.backend
        batch, n_q, heads, dim = query.q.shape
        numbers = np.arange(query.first, query.first + n_q, dtype=np.int64)
        bounds = problem.mask.bounds(numbers, query.total, length)
        score = Score(1 / math.sqrt(dim) if problem.scale is None else problem.scale, problem.softcap or 0.0,
                      problem.alibi, queries=numbers + problem.mask.offset(query.total, length))
        states = self._engine.states(batch, n_q, heads, self._dim_v, self._acc_dtype)
        for state in states:
            backend.reset(state)
        seen = np.zeros(n_q, np.uint8)
        for chunk in store.chunks:
            keyed = score.of_keys(chunk.positions)
            for low, high in bounds:
                begin, end = (np.searchsorted(chunk.positions, x) for x in (low, high))
                if not (end > begin).any():
                    continue
                seen |= end > begin
                for i, state in enumerate(states):
                    for _ in backend.accumulate(state, query.q[i], chunk.k[i, :chunk.used], chunk.v[i, :chunk.used],
                                                begin, end, keyed):
                        self._comm.progress([], self._comm.name, lambda: True)
        parts = [backend.to_numpy(x) for state in states for x in (state.acc, state.row_max, state.row_sum)]
        return np.concatenate([*(x.reshape(-1).view(np.uint8) for x in parts), seen])

    def combine(self, query: Query, rows: Sequence[NDArray[np.uint8]]) -> tuple[Array, Array]:
        """Put together what all ranks have made of the queries, in their order: the same bits everywhere. Local.

        Parameters
        ----------
        query : Query
        rows : sequence of uint8 array
            What `accumulate` gave on each rank.

        Returns
        -------
        out : array of shape (batch, n_q, heads, dim_v), dtype of q
            Where it is computed, as lse is.
        lse : array of shape (batch, n_q, heads), accumulator dtype
        """
        backend = self._engine.backend
        batch, n_q, heads, _ = query.q.shape
        everyone = np.stack(rows)
        states, seen = np.split(everyone, [everyone.shape[1] - n_q], axis=1)
        numbers = states.view(self._acc_dtype)
        has_result = backend.to_device(np.asarray(seen.any(axis=0) | (query.sinks is not None)))
        out = backend.empty((batch, n_q, heads, self._dim_v), query.q.dtype)
        lse = backend.empty((batch, n_q, heads), self._acc_dtype)
        shapes = (n_q, heads, self._dim_v), (n_q, heads), (n_q, heads)
        edges = np.cumsum([math.prod(shape) for shape in shapes * batch])[:-1]
        parts = iter(np.split(numbers, edges, axis=1))
        # By the backend: what a state holds between its calls, and in which units, is its own affair.
        for i, state in enumerate(self._engine.states(batch, n_q, heads, self._dim_v, self._acc_dtype)):
            backend.reset(state, query.sinks)
            backend.combine(state, State(*(backend.to_device(next(parts).reshape(len(rows), *shape))
                                           for shape in shapes)))
            backend.finish(state, has_result, out[i], lse[i])
        return out, lse
