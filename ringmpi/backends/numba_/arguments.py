"""One block of K and V as the kernels take it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import BFLOAT16
from ...score import Score
from ..strided import in_place
from .relative_arguments import RelativeSums, SharedRelative
from .seen import Seen
from .tuples import BlockArrays, ScoreArguments, Tokens
from .vector import machine

Array = NDArray[Any]
STORED = {BFLOAT16: np.dtype(np.uint16), np.dtype(np.float16): np.dtype(np.int16)}


class KernelArguments:
    """The arguments of a backend's loop, for kernels that accumulate in `acc_dtype`.

    With `pairs`, q and k are uint32 pairs of bfloat16 along dim. The arrays are read where they are; see `tokens`.

    Attributes
    ----------
    arrays : BlockArrays
    acc_dtype : dtype
    numbers : int
        dim + dim_v: a pair of a row and a key takes as many multiply-adds in the forward pass.
    heads, group : int
        Key heads, and query heads of each.
    rows : int
        Queries × group: the rows of a key head.
    first, last : int
        The columns that some query sees.
    pairs : int
        Of rows of a key head and columns that they see.
    biased : bool
        Whether the score has a bias of the keys.
    capping : tuple of two numbers
        scale / softcap and softcap; scale and 0 without.
    """

    def __init__(self, acc_dtype: np.dtype[Any], q: Array, k: Array, v: Array, seen: Seen, score: Score,
                 pairs: bool = False) -> None:
        self.acc_dtype = acc_dtype
        self.numbers = q.shape[2] + v.shape[2]
        self.heads = k.shape[1]
        self.group = q.shape[1] // self.heads
        self.rows = len(q) * self.group
        self.first, self.last = seen.first, seen.last
        self.pairs = seen.pairs * self.group
        stored = np.dtype(np.uint32) if pairs else None
        scale = acc_dtype.type(score.scale if score.plain else 1)
        self.arrays = BlockArrays(tokens(q, stored), tokens(k, stored), tokens(v), seen.begin, seen.end, scale)
        self.capping = acc_dtype.type(score.scale / (score.softcap or 1)), acc_dtype.type(score.softcap)
        self.biased = score.key_bias is not None
        self.relative = score.relative
        self._given = score
        self._plain = score.plain
        self._relative: SharedRelative | None = None
        self._any_score: dict[str, Any] | None = None

    def _shared_score(self, score: Score) -> dict[str, Any]:
        """Give the fields of `ScoreArguments` that all threads share; what the score does not have is zeros."""
        number = self.acc_dtype.type
        integer = np.dtype(f"i{self.acc_dtype.itemsize}")
        heads = self.arrays.q.shape[1]
        n_q, n_k = self.arrays.q.shape[0], self.arrays.k.shape[0]
        slopes = np.zeros(heads, self.acc_dtype)
        if score.slopes is not None:
            slopes[:] = score.slopes
        dropout_keys = np.zeros(heads, integer)
        if score.dropout:
            dropout_keys[:] = np.array(score.dropout_keys, np.uint32).astype(integer)
        queries = np.zeros(n_q, integer)
        spare = machine().vector_bytes // self.acc_dtype.itemsize
        keys = np.zeros(n_k + spare, integer)
        if score.positional:
            queries[:] = score.queries
            keys[:n_k] = score.keys
        bias = np.zeros((1, n_k + spare if score.key_bias is not None else 1), self.acc_dtype)
        if score.key_bias is not None:
            bias = np.zeros((score.key_bias.shape[1], n_k + spare), self.acc_dtype)
            seen = slice(self.first, self.last)              # of a block it may be little
            bias[:, seen] = score.key_bias[seen].T
        return {"ratio": self.capping[0], "cap": self.capping[1], "sloped": score.slopes is not None,
                "biased": score.key_bias is not None, "bias": bias.reshape(-1),
                "only_biased": score.key_bias is not None and replace(score, key_bias=None).plain,
                "bias_step": bias.shape[1] if len(bias) > 1 else 0,
                "threshold": np.int64(score.threshold), "gain": number(score.gain if score.dropout else 0),
                "slopes": slopes, "dropout_keys": dropout_keys, "queries": queries, "keys": keys}

    def score_arguments(self, row_score: tuple[Array, ...], bias_sums: Array | None = None,
                        relative_sums: RelativeSums | None = None) -> ScoreArguments | None:
        """Give the score for a thread that keeps its rows' part of it in these arrays; None if it is plain.

        `bias_sums`, of shape (query heads of a key head or 1, keys), are a task's sums of the gradient of a bias, and
        `relative_sums` those of one by distance.
        """
        return None if self._plain else self.any_score(row_score, bias_sums, relative_sums)

    def any_score(self, row_score: tuple[Array, ...], bias_sums: Array | None = None,
                  relative_sums: RelativeSums | None = None) -> ScoreArguments:
        """Do what `score_arguments` does, for a plain score too."""
        if self._any_score is None or self._relative is None:
            self._relative = SharedRelative(self._given, self.arrays.k.shape[0], self.first, self.last, self.acc_dtype)
            self._any_score = self._shared_score(self._given)           # at last: other threads look for it
        slope, dropout_key, position, bias_at, sums_at, *of_relative = row_score
        sums = self._any_score["bias"][:1] if bias_sums is None else bias_sums.reshape(-1)
        return ScoreArguments(**self._any_score, bias_sums=sums, slope=slope, dropout_key=dropout_key,
                              sums_step=0 if bias_sums is None or len(bias_sums) == 1 else bias_sums.shape[1],
                              position=position, bias_at=bias_at, sums_at=sums_at,
                              relative=self._relative.arguments(of_relative, relative_sums))

    def in_tiles(self, tile: int) -> tuple[int, int]:
        """Give the columns that some query sees, in whole tiles of the block."""
        return self.first // tile * tile, min(-(-self.last // tile) * tile, self.arrays.k.shape[0])

    def areas(self, start: int, stop: int, height: int) -> NDArray[np.int64]:
        """Rows × keys seen among columns start..stop, for each tile of `height` rows of a key head."""
        seen = (np.clip(self.arrays.end, start, stop) - np.clip(self.arrays.begin, start, stop)).sum(axis=0)
        edges = np.minimum(np.arange(0, self.rows + height, height), self.rows)
        query, rest = edges // self.group, edges % self.group          # a tile may end among the heads of a query
        before = self.group * np.append(0, np.cumsum(seen))[query] + rest * np.append(seen, 0)[query]
        areas: NDArray[np.int64] = np.diff(before)
        return areas

    def spans(self, start: int, stop: int, height: int
              ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Say which columns of start..stop some row sees, for each tile of `height` rows.

        They are the first, the last, and how many there are from the first to the last in all intervals together.
        """
        low, high = np.clip(self.arrays.begin, start, stop), np.clip(self.arrays.end, start, stop)
        blind = low >= high
        low[blind], high[blind] = stop, start
        queries = np.arange(0, self.rows, height) // self.group
        ends = (np.minimum(np.arange(height, self.rows + height, height), self.rows) - 1) // self.group
        # the last query of a tile may be the first of the next one
        first = np.minimum(np.minimum.reduceat(low, queries, axis=1), low[:, ends])
        last = np.maximum(np.maximum.reduceat(high, queries, axis=1), high[:, ends])
        return first.min(axis=0), last.max(axis=0), np.maximum(last - first, 0).sum(axis=0)

    def seen(self, rows: range, start: int, stop: int) -> tuple[int, int, int]:
        """Rows × keys that some rows see among columns start..stop, and the first and last of these columns."""
        first, last = rows.start // self.group, -(-rows.stop // self.group)
        low, high = (np.clip(x[:, first:last], start, stop) for x in (self.arrays.begin, self.arrays.end))
        some = high > low
        if not some.any():
            return 0, start, start
        of_queries = (high - low).sum(axis=0)
        count = self.group * of_queries.sum()           # less what belongs to other rows of the first and last query
        count -= (rows.start - first * self.group) * of_queries[0] + (last * self.group - rows.stop) * of_queries[-1]
        return int(count), int(low.min(where=some, initial=stop)), int(high.max(where=some, initial=start))

    def slots(self, start: int, stop: int, tile: int, most: int) -> list[tuple[int, int]]:
        """Cut those tiles of columns start..stop that some row sees, counted head by head, into about `most` parts."""
        count = -(-(stop - start) // tile)
        low, high = (np.clip(x, start, stop) - start for x in (self.arrays.begin, self.arrays.end))
        some = high > low
        changes = (np.bincount(low[some] // tile, minlength=count + 1)
                   - np.bincount(-(-high[some] // tile), minlength=count + 1))
        seen = np.tile(np.cumsum(changes[:-1]) > 0, self.heads)
        edges = np.flatnonzero(np.diff(seen, prepend=False, append=False)).reshape(-1, 2).tolist()
        share = -(-int(seen.sum()) // most)
        return [(at, min(at + share, last)) for first, last in edges for at in range(first, last, share)]


def writable(x: Array) -> Array:
    """Show an array as one that can be written, to kernels that only read it: contiguous. Local."""
    x = np.ascontiguousarray(x)
    return np.asarray(_Flat(x, x.size)).reshape(x.shape)


def tokens(x: Array, stored: np.dtype[Any] | None = None) -> Tokens:
    """Give `x`, of shape (tokens, heads, numbers), as the kernels read it, where it is; see `in_place`.

    bfloat16 becomes uint16 bits, float16 int16 bits; or both become what is `stored`, pairs for example.
    """
    stored = stored or STORED.get(x.dtype, x.dtype)
    flags = x.flags
    plain = flags.c_contiguous and flags.aligned and flags.writeable and stored.itemsize == x.itemsize
    if plain:                             # by far the most common, and seen at once
        _, heads, numbers = x.shape
        return Tokens(x.reshape(-1).view(stored), x.shape, heads * numbers, numbers)
    x = in_place(in_place(x).view(stored))
    token, head = (stride // stored.itemsize for stride in x.strides[:2])
    count = (len(x) - 1) * token + (x.shape[1] - 1) * head + x.shape[2]
    return Tokens(np.asarray(_Flat(x, count)), x.shape, token, head)


class _Flat:
    """Shows `count` numbers of an array from its first on, whatever its strides, writable to kernels that only read."""

    def __init__(self, x: Array, count: int) -> None:
        self.base = x
        self.__array_interface__ = {"version": 3, "shape": (count,), "typestr": x.dtype.str,
                                    "data": (x.ctypes.data, False)}
