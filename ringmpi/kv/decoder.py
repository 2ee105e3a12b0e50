"""Queries that all ranks have: each rank folds its own tokens, then the states of all are put together."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, Ended
from ..call import Array
from ..engine import Engine
from ..errors import InternalError
from ..intervals import Interval
from ..layout import Integers
from ..mpi.comm import Comm
from ..problem import Problem
from ..score import Score
from ..softmax import State
from .query import Query
from .sizes import Sizes
from .store import Chunk, KVStore

KEPT_BYTES = 2**20           # of buffers that are kept for the next step


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
    sizes : Sizes
        Of the cache.
    """

    def __init__(self, comm: Comm, engine: Engine, problem: Problem, acc_dtype: np.dtype[Any], sizes: Sizes) -> None:
        self._comm = comm
        self._engine = engine
        self._problem = problem
        self._acc_dtype = acc_dtype
        self._sizes = sizes
        self._step: _Step | None = None

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
        if self._step is None or self._step.shape != query.q.shape:
            self.close()                            # the old memory goes before the new comes
            self._step = _Step(self._engine.backend, self._problem, query.q.shape, self._sizes, self._acc_dtype,
                               self._comm.size)
        step = self._step
        step.look_at(store, length, query)
        for fold in step.folds(query.q, store):
            with Ended(fold):
                for _ in fold:
                    self._comm.progress([], self._comm.name, lambda: True)
        step.find_seen(store)
        return step.payload(query.q.dtype)

    def close(self) -> None:
        """Let go of what is kept for the next step. Local."""
        if self._step is not None:
            self._step.let_go()
            self._step = None

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
        step = self._step
        if step is None:
            raise InternalError("combine before accumulate")
        if step.nbytes > KEPT_BYTES:
            self.close()
        return step.merge(query, rows)


class _Step:
    """What does not change from one step to the next, with queries of one shape. Local.

    Parameters
    ----------
    backend : Backend
    problem : Problem
    shape : (batch, n_q, heads, dim)
    sizes : Sizes
    acc_dtype : dtype
    ranks : int
    """

    def __init__(self, backend: Backend, problem: Problem, shape: tuple[int, int, int, int], sizes: Sizes,
                 acc_dtype: np.dtype[Any], ranks: int) -> None:
        batch, n_q, heads, _ = shape
        dim_v = sizes.dim_v
        rows, numbers = n_q * heads, n_q * heads * (dim_v + 2)
        self._backend = backend
        self._problem = problem
        self.shape = shape
        self._shapes = (batch, n_q, heads, dim_v), (batch, n_q, heads)

        # What is sent: states, as `Backend.merge` takes them, and then which queries see any key; with a bias, one that
        # it does not leave out, for each element and head.
        nbytes = batch * numbers * acc_dtype.itemsize
        self._biased = bool(sizes.key_bias)
        count = batch * rows if self._biased else n_q
        self._tail = slice(nbytes, nbytes + count)
        self._sent = np.zeros(-(-(nbytes + count) // 8) * 8, np.uint8)
        self._host_states = [State(x[:rows * dim_v].reshape(n_q, heads, dim_v),
                                   *x[rows * dim_v:].reshape(2, n_q, heads))
                             for x in self._sent[:nbytes].view(acc_dtype).reshape(batch, numbers)]
        for state in self._host_states:
            state.reset()
        self._blank = self._sent.copy()
        self._states = (self._host_states if backend.device is None else
                        [backend.new_state(n_q, heads, dim_v, acc_dtype) for _ in range(batch)])

        # What is received.
        self._received = np.zeros((ranks, self._sent.size), np.uint8)
        self._numbers = self._received.view(acc_dtype)
        self._seen = np.zeros((ranks, count), np.uint8)
        self._bounds: Sequence[Interval] = ()

        self._bound: weakref.WeakSet[Chunk] = weakref.WeakSet()
        self._looked_at: Any = None
        self._moved = False                         # whether chunks are bound to positions of queries
        self._out: Array = None                     # the results to come, out and lse
        self._lse: Array = None

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers, about."""
        return self._received.nbytes

    def look_at(self, store: KVStore, length: int, query: Query) -> None:
        """Find what the queries see of a store, unless it is as it was."""
        first, total = query.first, query.total
        now = store.changes, length, first, total, query.tables
        if now == self._looked_at:
            return
        self._looked_at = None
        n_q = self.shape[1]
        numbers = np.arange(first, first + n_q, dtype=np.int64)
        bounds = self._problem.mask.bounds(numbers, total, length)
        score = self._score(self._problem.mask.positions(numbers, total, length)).of_relative(query.relative)
        moves = score.positional or self._moved
        self._moved = score.positional
        seen = np.zeros(n_q, np.bool_)
        for chunk in store.chunks:
            if moves or chunk.bound_by is not self or len(chunk.bound) != len(bounds):
                self._bind(chunk, len(bounds), score)
            for number, (low, high) in enumerate(bounds):
                begin, end = (chunk.positions.searchsorted(x) for x in (low, high))
                sees = end > begin
                chunk.seen[number] = bool(sees.any())
                if chunk.seen[number]:
                    seen |= sees
                    for bound in chunk.bound[number]:
                        bound.see(begin, end)
        self._blank[self._tail] = np.broadcast_to(seen[:, None], self._shapes[1]).reshape(-1) if self._biased else seen
        self._bounds = bounds
        self._looked_at = now

    def _score(self, positions: Integers) -> Score:
        """Give the score of queries at these positions."""
        problem = self._problem
        scale = 1 / math.sqrt(self.shape[3]) if problem.scale is None else problem.scale
        return Score(scale, problem.softcap or 0.0, problem.alibi, queries=positions)

    def _bind(self, chunk: Chunk, intervals: int, score: Score) -> None:
        """Prepare to meet a chunk as often as there are intervals; what that takes goes with the chunk."""
        _, n_q, heads, _ = self.shape
        chunk.unbind()                              # until all is there
        score = score.of_keys(chunk.places)
        biases = itertools.repeat(None) if chunk.bias is None else chunk.bias
        scores = [score.of_key_bias(bias) for bias, _ in zip(biases, self._states, strict=False)]
        chunk.bound = [[self._backend.bind(state, chunk.k[i], chunk.v[i], n_q, heads, scores[i])
                        for i, state in enumerate(self._states)] for _ in range(intervals)]
        chunk.seen = [False] * intervals
        chunk.bound_by = self
        self._bound.add(chunk)

    def let_go(self) -> None:
        """Take from the chunks what was prepared to meet them with: it keeps this step's memory."""
        for chunk in self._bound:
            if chunk.bound_by is self:
                chunk.unbind()

    def folds(self, q: Array, store: KVStore) -> Iterator[Iterable[int]]:
        """Let the states forget every key, and give what folds those that are seen, to be ended one by one."""
        self._sent[:] = self._blank
        if self._backend.device is not None:
            for state in self._states:
                self._backend.reset(state)
        for chunk in store.chunks:
            for elements, sees in zip(chunk.bound, chunk.seen, strict=True):
                for i, bound in enumerate(elements if sees else ()):
                    yield bound.fold(q[i])

    def find_seen(self, store: KVStore) -> None:
        """Find which queries see a key that a bias does not leave out, if there is one; most states show it."""
        met = np.stack([state.row_max for state in self._host_states]) > -np.inf if self._biased else np.ones(1, bool)
        if met.all():
            return
        for chunk, (low, high) in itertools.product(store.chunks, self._bounds):
            begin, end = (chunk.positions.searchsorted(x) for x in (low, high))
            for element, bias in zip(met, chunk.bias, strict=True):
                below = np.zeros((chunk.used + 1, bias.shape[1]), np.int64)
                np.cumsum(~np.isneginf(bias[:chunk.used]), axis=0, out=below[1:])
                element |= np.greater(below[np.maximum(begin, end)], below[begin])
        self._sent[self._tail] = met.reshape(-1)

    def payload(self, dtype: np.dtype[Any]) -> NDArray[np.uint8]:
        """Give what the other ranks are to know; make room for results, while errors are agreed on."""
        self._out = self._backend.empty(self._shapes[0], dtype)
        self._lse = self._backend.empty(self._shapes[1], self._numbers.dtype)
        if self._backend.device is not None:
            for there, here in zip(self._states, self._host_states, strict=True):
                for x, target in zip(vars(there).values(), vars(here).values(), strict=True):
                    target[...] = self._backend.to_numpy(x)
        return self._sent

    def merge(self, query: Query, rows: Sequence[NDArray[np.uint8]]) -> tuple[Array, Array]:
        """Put together what all ranks sent; see `Decoder.combine`."""
        self._received[:] = rows                    # one after the other: no array is made of them
        self._seen[:] = self._received[:, self._tail]
        out, lse = self._out, self._lse
        self._out = self._lse = None                # they are the caller's
        if not self._biased:
            self._backend.merge(self._numbers, query.sinks, self._seen, out, lse)
            return out, lse
        seen = self._seen.reshape(-1, *self._shapes[1])
        self._backend.merge(self._numbers, query.sinks, np.asarray(seen.any(axis=(1, 3)), np.uint8), out, lse)
        if query.sinks is None:
            blind = ~seen.any(axis=0)
            out[blind] = 0
            lse[blind] = -np.inf
        return out, lse
