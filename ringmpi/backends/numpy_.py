"""The oracle: blockwise online softmax in NumPy, short enough to read in one sitting.

Every other backend is tested against this one, and this one against a dense float64 softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from ..device import Device
from ..layout import Integers
from ..softmax import State
from .base import Backend
from .cpu.team import Task, Team

ROWS, COLUMNS = 512, 2048    # a tile of scores: 4 MiB in float32, a few milliseconds of BLAS on each thread


class NumpyBackend(Backend):
    """Attention in NumPy: a thread for each tile, whose products are BLAS; with few tiles BLAS has the others."""

    name = "numpy"

    def __init__(self, threads: int, device: Device | None = None) -> None:
        super().__init__(threads)
        self._team = Team(threads)

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, scale: float) -> Iterator[int]:
        """Fold one block of K and V into the running softmax; see `Backend.accumulate`. Local."""
        group = q.shape[1] // k.shape[1]
        queries = max(1, ROWS // group)
        rooms = [np.empty(queries * group * COLUMNS, state.acc.dtype) for _ in range(self.threads)]
        tiles = [(rows, head, int((end[rows] - begin[rows]).sum()))
                 for rows in _slices(0, len(q), queries) for head in range(k.shape[1])]
        tasks = [Task(area, _steps(state, q, k, v, begin, end, scale, rows, head, rooms))
                 for rows, head, area in tiles if area]
        done = counted = 0
        with _blas_threads(max(1, self.threads // max(1, len(tasks)))), closing(self._team.run(tasks)) as steps:
            for area in steps:
                done += area
                yield done // k.shape[1] - counted
                counted = done // k.shape[1]

    def close(self) -> None:
        """End the threads. Local."""
        self._team.close()


class _BlasLimit:
    """BLAS's threads belong to the process: the first loop to begin sets their number, the last to end restores it."""

    def __init__(self) -> None:
        self._lock, self._users = Lock(), 0
        self._limit: Any = None
        self._pools: Any = None

    @contextmanager
    def __call__(self, threads: int) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._pools = self._pools or ThreadpoolController()          # looks for libraries once
                self._limit = self._pools.limit(limits=threads, user_api="blas")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._limit.restore_original_limits()


_blas_threads = _BlasLimit()


def _steps(state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], begin: Integers, end: Integers,
           scale: float, rows: slice, head: int, rooms: list[NDArray[Any]]
           ) -> Iterator[tuple[Callable[[int], None], int]]:
    """Fold all columns into `rows` of one key head, one tile after the other."""
    group = q.shape[1] // k.shape[1]
    mine = rows, slice(head * group, (head + 1) * group)
    part = State(state.acc[mine], state.max[mine], state.sum[mine])
    seeing = end[rows] > begin[rows]
    width = min(COLUMNS, max(128, COLUMNS * 256 // (q.shape[2] + v.shape[2])))
    for columns in _slices(int(begin[rows][seeing].min()), int(end[rows][seeing].max()), width):
        low, high = (np.clip(edge[rows], columns.start, columns.stop) - columns.start for edge in (begin, end))
        pairs = int((high - low).sum())
        if pairs:
            yield partial(_fold, part, q[mine], k[columns, head], v[columns, head], low, high, scale, rooms), pairs


def _slices(start: int, stop: int, width: int) -> list[slice]:
    return [slice(i, min(i + width, stop)) for i in range(start, stop, width)]


def _fold(state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
          low: Integers, high: Integers, scale: float, rooms: list[NDArray[Any]], thread: int) -> None:
    """Fold a tile: q (rows, group, dim), k (columns, dim), v (columns, dim_v), one key head; scores go to a room."""
    dtype = state.acc.dtype
    q, k, v = (x.astype(dtype, copy=False) for x in (q, k, v))
    full = bool((low == 0).all() and (high == len(k)).all())
    with np.errstate(all="ignore"):       # NaN and infinity pass through to the rows that see them
        flat = rooms[thread][:q.shape[0] * q.shape[1] * len(k)].reshape(-1, len(k))
        scores = np.matmul((q * dtype.type(scale)).reshape(-1, q.shape[2]), k.T, out=flat).reshape(*q.shape[:2], -1)
        if not full:
            j = np.arange(len(k))
            hidden = (j < low[:, None]) | (j >= high[:, None])
            np.copyto(scores, -np.inf, where=hidden[:, None, :])
        top = np.maximum(state.max, scores.max(axis=2))
        shift = np.where(top == -np.inf, dtype.type(0), top)      # -inf - -inf would be NaN
        scores -= shift[..., None]
        weights = np.exp(scores, out=scores)
        shrink = np.exp(state.max - shift)
        state.acc *= shrink[..., None]
        state.sum *= shrink
        state.max[...] = top
        state.sum += weights.sum(axis=2)
        if full or np.isfinite(v).all():
            state.acc += (flat @ v).reshape(state.acc.shape)
        else:                             # 0 × NaN is NaN: rows that do not see it must not multiply it
            for i, (a, b) in enumerate(zip(low, high, strict=True)):
                state.acc[i] += weights[i, :, a:b] @ v[a:b]
