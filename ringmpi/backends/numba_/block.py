"""One block of K and V as the kernels take it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import BFLOAT16
from ...layout import Integers
from ...score import Score
from .score_rows import Shape
from .vector import machine

Array = NDArray[Any]


class Block:
    """The arguments of a backend's loop, for kernels whose accumulator is `kind`.

    bfloat16 and float16 go as bits, uint16 and int16; with `pairs`, q and k are uint32 pairs of bfloat16 along dim.
    """

    def __init__(self, kind: np.dtype[Any], q: Array, k: Array, v: Array, begin: Integers, end: Integers, score: Score,
                 pairs: bool = False) -> None:
        self.kind = kind
        self.numbers = q.shape[2] + v.shape[2]
        self.begin, self.end = (np.array(x, np.int64) for x in (begin, end))
        self.scale = kind.type(score.scale if score.plain else 1)
        self.q, self.k, self.v = (plain(x) for x in (q, k, v))
        if pairs:
            self.q, self.k = self.q.view(np.uint32), self.k.view(np.uint32)
        self.heads = k.shape[1]
        self.group = q.shape[1] // self.heads
        self.rows = len(q) * self.group
        seeing = end > begin
        self.first, self.last = int(begin[seeing].min()), int(end[seeing].max())
        self._shape = None if score.plain else self._shaped(score)

    def _shaped(self, score: Score) -> tuple[Any, ...]:
        """Give the first fields of a `Shape`; what the score does not have is zeros."""
        number, integer = self.kind.type, np.dtype(f"i{self.kind.itemsize}")
        heads, (n_q, n_k) = self.q.shape[1], (len(self.q), len(self.k))
        keys = np.zeros(n_k + machine().vector_bytes // self.kind.itemsize, integer)
        if score.positional:
            keys[:n_k] = score.keys
        return (number(score.scale / (score.softcap or 1)), number(score.softcap), score.slopes is not None,
                np.int64(score.threshold), number(score.gain if score.dropout else 0),
                np.zeros(heads, self.kind) if score.slopes is None else np.array(score.slopes, self.kind),
                np.array(score.streams, np.uint32).astype(integer) if score.dropout else np.zeros(heads, integer),
                np.array(score.queries, integer) if score.positional else np.zeros(n_q, integer), keys)

    def shape(self, traits: tuple[Array, ...]) -> Shape | None:
        """Give the score for a thread whose rows' traits go to these arrays; None if it is plain."""
        return Shape(*self._shape, *traits) if self._shape else None

    def areas(self, start: int, stop: int, height: int) -> NDArray[np.int64]:
        """Rows × keys seen among columns start..stop, for each tile of `height` rows of a key head."""
        seen = np.clip(self.end, start, stop) - np.clip(self.begin, start, stop)
        edges = np.minimum(np.arange(0, self.rows + height, height), self.rows)
        query, rest = edges // self.group, edges % self.group          # a tile may end among the heads of a query
        before = self.group * np.append(0, np.cumsum(seen))[query] + rest * np.append(seen, 0)[query]
        areas: NDArray[np.int64] = np.diff(before)
        return areas

    def seen(self, rows: range, start: int, stop: int) -> tuple[int, int, int]:
        """Rows × keys that some rows see among columns start..stop, and the first and last of these columns."""
        queries = np.arange(rows.start, rows.stop) // self.group
        low, high = (np.clip(x[queries], start, stop) for x in (self.begin, self.end))
        some = high > low
        if not some.any():
            return 0, start, start
        return int((high - low).sum()), int(low[some].min()), int(high[some].max())


def speed(kind: np.dtype[Any]) -> float:
    """Operations of this CPU's vectors on numbers of `kind`, beside AVX-512's on float32. Local."""
    return machine().vector_bytes / 64 * 4 / kind.itemsize


def plain(x: Array) -> Array:
    """Contiguous and writable, as the kernels expect it; bfloat16 as uint16, float16 as int16."""
    x = np.ascontiguousarray(x)
    x = x.view({BFLOAT16: np.uint16, np.dtype(np.float16): np.int16}.get(x.dtype, x.dtype))
    return x if x.flags.writeable else np.asarray(_Writable(x))


class _Writable:
    """Shows a read-only array as a writable one, to kernels that only read it."""

    def __init__(self, x: Array) -> None:
        self.base = x
        self.__array_interface__ = {**x.__array_interface__, "data": (x.ctypes.data, False)}
