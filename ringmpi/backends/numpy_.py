"""The oracle: blockwise online softmax in NumPy, short enough to read in one sitting.

Every other backend is tested against this one, and this one against a dense float64 softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from ..layout import Integers
from ..softmax import State
from .base import Backend

ROWS, COLUMNS = 256, 1024    # a tile of scores: 1 MiB in float32 for one head, a few milliseconds of BLAS


class NumpyBackend(Backend):
    """Attention in NumPy; the matrix products are BLAS."""

    name = "numpy"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._pools = ThreadpoolController()

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, scale: float) -> Iterator[int]:
        """Fold one block of K and V into the running softmax; see `Backend.accumulate`. Local."""
        heads, kv_heads = q.shape[1], k.shape[1]
        group = heads // kv_heads
        factor = state.acc.dtype.type(scale)
        with self._pools.limit(limits=self.threads, user_api="blas"):
            for rows in _slices(0, len(q), ROWS):
                seeing = end[rows] > begin[rows]
                if not seeing.any():
                    continue
                first, last = begin[rows][seeing].min(), end[rows][seeing].max()
                for columns in _slices(int(first), int(last), COLUMNS):
                    low = np.clip(begin[rows], columns.start, columns.stop) - columns.start
                    high = np.clip(end[rows], columns.start, columns.stop) - columns.start
                    pairs = int((high - low).sum())
                    if not pairs:
                        continue
                    for h in range(kv_heads):
                        mine = rows, slice(h * group, (h + 1) * group)
                        tile = State(state.acc[mine], state.max[mine], state.sum[mine])
                        _fold(tile, q[mine], k[columns, h], v[columns, h], low, high, factor)
                    yield pairs


def _slices(start: int, stop: int, width: int) -> list[slice]:
    return [slice(i, min(i + width, stop)) for i in range(start, stop, width)]


def _fold(state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
          low: Integers, high: Integers, scale: Any) -> None:
    """Fold a tile: q (rows, group, dim), k (columns, dim), v (columns, dim_v), one key head."""
    dtype = state.acc.dtype
    q, k, v = (x.astype(dtype, copy=False) for x in (q, k, v))
    full = bool((low == 0).all() and (high == len(k)).all())
    with np.errstate(all="ignore"):       # NaN and infinity pass through to the rows that see them
        scores = (q.reshape(-1, q.shape[2]) @ k.T).reshape(*q.shape[:2], len(k))
        scores *= scale
        if not full:
            j = np.arange(len(k))
            hidden = (j < low[:, None]) | (j >= high[:, None])
            np.copyto(scores, -np.inf, where=hidden[:, None, :])
        top = np.maximum(state.max, scores.max(axis=2))
        shift = np.where(top == -np.inf, dtype.type(0), top)      # -inf - -inf would be NaN
        weights = np.exp(scores - shift[..., None], out=scores)
        shrink = np.exp(state.max - shift)
        state.acc *= shrink[..., None]
        state.sum *= shrink
        state.max[...] = top
        state.sum += weights.sum(axis=2)
        if full or np.isfinite(v).all():
            state.acc += (weights.reshape(-1, len(k)) @ v).reshape(state.acc.shape)
        else:                             # 0 × NaN is NaN: rows that do not see it must not multiply it
            for i, (a, b) in enumerate(zip(low, high, strict=True)):
                state.acc[i] += weights[i, :, a:b] @ v[a:b]
