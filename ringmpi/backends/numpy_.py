"""The oracle: blockwise online softmax in NumPy, short enough to read in one sitting.

Every other backend is tested against this one, and this one against a dense float64 softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from ..device import Device
from ..layout import Integers
from ..relative import Relative
from ..score import Score, random_words
from ..softmax import Gradient, State
from .base import Backend, Shape
from .numpy_weights import add_columns, add_rows, keep_tops, write_weights
from .strided import for_products
from .team import Task, Team

# A tile of scores: 4 MiB in float32, a few milliseconds of BLAS on each thread.
ROWS = 512
COLUMNS = 2048


class NumpyBackend(Backend):
    """Attention in NumPy: a thread for each tile, whose products are BLAS; with few tiles BLAS has the others."""

    name = "numpy"
    biased = True
    relative = True
    gives_weights = True
    separable = True
    lane_flop = 4 * 0.4               # the second factor is the share reached: docs/performance.rst

    def __init__(self, threads: int, device: Device | None = None) -> None:
        super().__init__(threads)
        self._team = Team(threads)

    @classmethod
    def scratch_bytes(cls, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any], acc_dtype: np.dtype[Any]
                      ) -> dict[str, int]:
        """Predict the scores of a thread, and what NumPy makes of them on the way; see `Backend`. Local."""
        return {"scores": 2**25 - 2**23, "packed K and V": 0}

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Fold one block of K and V into the running softmax; see `Backend.accumulate`. Local."""
        block = _Block(q, k, v, begin, end, score)
        queries = max(1, ROWS // block.group)
        scratch = [np.empty(queries * block.group * COLUMNS, state.acc.dtype) for _ in range(self.threads)]
        tiles = [(rows, head, block.pairs(rows))
                 for rows in _slices(0, len(q), queries) for head in range(k.shape[1])]
        yield from self._run([Task(area, _forward_steps(state, block, rows, head, scratch))
                              for rows, head, area in tiles if area], k.shape[1])

    def backward(self, gradient: Gradient, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], dk: Any, dv: Any,
                 begin: Integers, end: Integers, score: Score, dkey_bias: Any = None,
                 drelative: Sequence[NDArray[np.float64]] | None = None) -> Iterator[int]:
        """Add to the gradients what one block of K and V gives; see `Backend.backward`. Local."""
        area = int((end - begin).sum())       # all rows of a key head add to the same dk: one task
        block = _Block(q, k, v, begin, end, score)
        of_heads = None if dkey_bias is None else np.zeros((len(k), q.shape[1]), dkey_bias.dtype)
        yield from self._run([Task(area, _backward_steps(gradient, block, dk, dv, of_heads, drelative, head))
                              for head in range(k.shape[1]) if area], k.shape[1])
        if of_heads is not None:
            dkey_bias += of_heads if dkey_bias.shape[1] > 1 else of_heads.sum(axis=1, keepdims=True)

    def column_sums(self, sums: NDArray[np.float64], q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any],
                    begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Add up what each key weighs for all queries; see `Backend.column_sums`. Local."""
        return self._reduce(add_columns(sums, lse), _Block(q, k, k, begin, end, score), max(1, len(q)))

    def row_sums(self, sums: NDArray[np.float64], q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any],
                 values: NDArray[np.float64], begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Add up sums over the keys for each query; see `Backend.row_sums`. Local."""
        return self._reduce(add_rows(sums, lse, values), _Block(q, k, k, begin, end, score))

    def row_tops(self, scores: NDArray[Any], positions: Integers, q: NDArray[Any], k: NDArray[Any], keys: Integers,
                 begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Keep the keys that score most for each query; see `Backend.row_tops`. Local."""
        return self._reduce(keep_tops(scores, positions, keys), _Block(q, k, k, begin, end, score))

    def row_weights(self, weights: NDArray[Any], q: NDArray[Any], k: NDArray[Any], lse: NDArray[Any],
                    begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Write the weights of some queries; see `Backend.row_weights`. Local."""
        return self._reduce(write_weights(weights, lse), _Block(q, k, k, begin, end, score))

    def _reduce(self, reduce: Callable[..., None], block: _Block, queries: int = 0) -> Iterator[int]:
        """Do something with each tile: in a task for each key head and so many queries, by default those of a tile."""
        tasks = [Task(area, _tile_steps(reduce, block, rows, head))
                 for rows in _slices(0, len(block.q), queries or max(1, ROWS // block.group))
                 for area in (block.pairs(rows),) if area
                 for head in range(block.k.shape[1])]
        yield from self._run(tasks, block.k.shape[1])

    def _run(self, tasks: list[Task], heads: int) -> Iterator[int]:
        """Do the tasks; their costs are pairs, each counted once for each of the heads."""
        done = counted = 0
        with _blas_threads(max(1, self.threads // max(1, len(tasks)))), closing(self._team.run(tasks)) as steps:
            for area in steps:
                done += area
                yield done // heads - counted
                counted = done // heads

    def close(self) -> None:
        """End the threads. Local."""
        self._team.close()


class _BlasLimit:
    """BLAS's threads belong to the process: the first loop to begin sets their number, the last to end restores it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
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


class _Block(NamedTuple):
    """One block of K and V and the queries that it meets: the arguments of both loops."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    begin: Integers
    end: Integers
    score: Score

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return int(self.q.shape[1] // self.k.shape[1])

    def heads(self, head: int) -> slice:
        """Give the query heads of a key head."""
        return slice(head * self.group, (head + 1) * self.group)

    def pairs(self, rows: slice) -> int:
        """Count what rows see."""
        return int((self.end[..., rows] - self.begin[..., rows]).sum())

    def tiles(self, rows: slice, head: int) -> Iterator[tuple[Tile, int]]:
        """Yield each tile of these rows in which some row sees something of an interval, and the pairs seen."""
        width = min(COLUMNS, max(128, COLUMNS * 256 // (self.q.shape[2] + self.v.shape[2])))
        for begin, end in zip(*(np.atleast_2d(edge)[:, rows] for edge in (self.begin, self.end)), strict=True):
            seeing = end > begin
            if not seeing.any():
                continue
            for columns in _slices(int(begin[seeing].min()), int(end[seeing].max()), width):
                low, high = (np.clip(edge, columns.start, columns.stop) - columns.start for edge in (begin, end))
                pairs = int((high - low).sum())
                if pairs:
                    yield Tile(self.score, rows, self.heads(head), columns, low, high), pairs


def _forward_steps(state: State, block: _Block, rows: slice, head: int, scratch: list[NDArray[Any]]
                   ) -> Iterator[tuple[Callable[[int], None], int]]:
    """Fold all columns into `rows` of one key head, one tile after the other."""
    mine = rows, block.heads(head)
    part = State(state.acc[mine], state.row_max[mine], state.row_sum[mine])
    for tile, pairs in block.tiles(rows, head):
        keys = tile.columns, head
        yield partial(_forward_tile, part, block.q[mine], block.k[keys], block.v[keys], tile, scratch), pairs


def _backward_steps(gradient: Gradient, block: _Block, dk: NDArray[Any], dv: NDArray[Any], dbias: NDArray[Any] | None,
                    drelative: Sequence[NDArray[np.float64]] | None, head: int
                    ) -> Iterator[tuple[Callable[[int], None], int]]:
    """Do the backward pass of one key head, one tile after the other."""
    for rows in _slices(0, len(block.q), max(1, ROWS // block.group)):
        mine = rows, block.heads(head)
        part = Gradient(gradient.dout[mine], gradient.lse[mine], gradient.delta[mine], gradient.dq[mine])
        for tile, pairs in block.tiles(rows, head):
            keys = tile.columns, head
            sums = (None if dk is None else (dk[keys], dv[keys]),
                    None if dbias is None else dbias[tile.columns, block.heads(head)], drelative or ())
            yield partial(_backward_tile, part, block.q[mine], block.k[keys], block.v[keys], *sums, tile), pairs


def _tile_steps(reduce: Callable[..., None], block: _Block, rows: slice, head: int
                ) -> Iterator[tuple[Callable[[int], None], int]]:
    """Do something with the tiles of some rows of one key head, one after the other."""
    height = max(1, ROWS // block.group)
    for some in _slices(rows.start, rows.stop, height):
        for tile, pairs in block.tiles(some, head):
            yield partial(reduce, block.q[some, tile.heads], block.k[tile.columns, head], tile), pairs


def _slices(start: int, stop: int, width: int) -> list[slice]:
    return [slice(i, min(i + width, stop)) for i in range(start, stop, width)]


@dataclass(frozen=True)
class Tile:
    """A tile of scores (rows, heads of a group, columns): where it is, and what of it is seen."""

    score: Score
    rows: slice
    heads: slice
    columns: slice
    low: Integers
    high: Integers

    @cached_property
    def full(self) -> bool:
        """Whether every row sees every column."""
        return bool((self.low == 0).all() and (self.high == self.columns.stop - self.columns.start).all())

    @cached_property
    def hidden(self) -> NDArray[np.bool_]:
        """What is not seen, (rows, 1, columns)."""
        j = np.arange(self.columns.stop - self.columns.start)
        return ((j < self.low[:, None]) | (j >= self.high[:, None]))[:, None, :]

    def apply_score(self, x: NDArray[Any]) -> NDArray[Any] | None:
        """Turn scaled products into scores, in place; give the derivative if it is not 1."""
        score = self.score
        derivative = None
        if score.softcap:
            x /= x.dtype.type(score.softcap)
            derivative = np.cosh(x)
            derivative **= -2              # 1 - tanh² would cancel
            np.tanh(x, out=x)
            x *= x.dtype.type(score.softcap)
        if score.slopes is not None:
            i, j = self._positions()
            x -= score.slopes[self.heads, None].astype(x.dtype) * np.abs(i - j).astype(x.dtype)
        if score.key_bias is not None:
            x += self.of_bias(score.key_bias).T
        if score.relative is not None:
            self.add_relative(x, score.relative)
        return derivative

    def add_relative(self, x: NDArray[Any], relative: Relative) -> None:
        """Add a bias by distance to what there is of each pair, (rows, heads, columns): the score's or its tangent."""
        for table, entries in zip(relative.tables, self._entries(relative), strict=True):
            x += np.moveaxis(table[self.heads].astype(x.dtype)[:, entries], 0, 1)

    def sum_relative(self, totals: Sequence[NDArray[np.float64]], x: NDArray[Any]) -> None:
        """Add what there is of each pair, 0 where it is not seen, to the entries of the score's bias by distance.

        `totals` are like its tables, of all heads.
        """
        relative = self.score.relative
        for total, entries in zip(totals, [] if relative is None else self._entries(relative), strict=True):
            for sums, of_head in zip(total[self.heads], np.moveaxis(x, 1, 0), strict=True):
                sums += np.bincount(entries.ravel(), of_head.ravel(), len(sums))

    def _entries(self, relative: Relative) -> list[Integers]:
        """Give the number of each pair's entry in each table of a bias by distance, (rows, columns)."""
        along = zip(relative.tables, *map(relative.coordinates, (self.score.queries[self.rows],
                                                                 self.score.keys[self.columns])), strict=True)
        return [np.clip(i[:, None] - j, -(table.shape[1] // 2), table.shape[1] // 2) + table.shape[1] // 2
                for table, i, j in along]

    def of_bias(self, x: NDArray[Any]) -> NDArray[Any]:
        """View what belongs to the tile of a bias of the block's keys, (n_k, heads or 1): (columns, heads or 1)."""
        return x[self.columns, self.heads if x.shape[1] > 1 else slice(None)]

    def dropout_factor(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Give what dropout multiplies each weight by, (rows, heads, columns): 0 or the gain."""
        score = self.score
        words = random_words(score.dropout_keys[self.heads, None], *self._positions())
        factors: NDArray[Any] = np.where(words >= score.threshold, dtype.type(score.gain), dtype.type(0))
        return factors

    def _positions(self) -> tuple[Integers, Integers]:
        """Positions of the rows, (rows, 1, 1), and of the columns."""
        return self.score.queries[self.rows, None, None], self.score.keys[self.columns]


def _forward_tile(state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], tile: Tile,
                  scratch: list[NDArray[Any]], thread: int) -> None:
    """Fold a tile of one key head: q (rows, group, dim), k (columns, dim), v (columns, dim_v).

    The scores go to the thread's scratch.
    """
    dtype = state.acc.dtype
    q, k, v = (for_products(x, dtype) for x in (q, k, v))
    with np.errstate(all="ignore"):       # NaN and infinity pass through to the rows that see them
        # Scores of the tile, -inf where a row does not see the column.
        flat = scratch[thread][:q.shape[0] * q.shape[1] * len(k)].reshape(-1, len(k))
        scaled = (q * dtype.type(tile.score.scale)).reshape(-1, q.shape[2])
        scores = np.matmul(scaled, k.T, out=flat).reshape(*q.shape[:2], -1)
        tile.apply_score(scores)
        if not tile.full:
            np.copyto(scores, -np.inf, where=tile.hidden)

        # The online softmax: a new maximum shrinks what was summed up to now.
        row_max = np.maximum(state.row_max, scores.max(axis=2))
        shift = np.where(row_max == -np.inf, dtype.type(0), row_max)      # -inf - -inf would be NaN
        scores -= shift[..., None]
        weights = np.exp(scores, out=scores)
        shrink = np.exp(state.row_max - shift)
        state.acc *= shrink[..., None]
        state.row_sum *= shrink
        state.row_max[...] = row_max
        state.row_sum += weights.sum(axis=2)

        # Dropout changes what the values are multiplied by, not the sum of the weights.
        if tile.score.dropout:
            weights *= tile.dropout_factor(dtype)
        if tile.full or np.isfinite(v).all():
            state.acc += (flat @ v).reshape(state.acc.shape)
        else:                             # 0 × NaN is NaN: rows that do not see it must not multiply it
            for i, (a, b) in enumerate(zip(tile.low, tile.high, strict=True)):
                state.acc[i] += weights[i, :, a:b] @ v[a:b]


def _backward_tile(gradient: Gradient, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   of_keys: tuple[NDArray[Any], NDArray[Any]] | None, dbias: NDArray[Any] | None,
                   drelative: Sequence[NDArray[np.float64]], tile: Tile, thread: int) -> None:
    """Add what a tile of one key head gives to dq (rows, group, dim).

    And to dk (columns, dim) and dv (columns, dim_v), dbias, of shape (columns, group), and drelative, of
    (heads, entries) each, if they are wanted.
    """
    dtype = gradient.dq.dtype
    columns = len(k)
    q, k, v, dout = (for_products(x, dtype) for x in (q, k, v, gradient.dout))
    lse, delta = gradient.lse[..., None], gradient.delta[..., None]
    scale = dtype.type(tile.score.scale)
    with np.errstate(all="ignore"):
        # Scores and dout · v of the tile.
        weights = ((q * scale).reshape(-1, q.shape[2]) @ k.T).reshape(*q.shape[:2], columns)
        ds = (dout.reshape(-1, dout.shape[2]) @ v.T).reshape(weights.shape)
        derivative = tile.apply_score(weights)

        # The weights once more. Rounding alone can put a score above lse, by much where scores are huge.
        weights -= lse
        np.minimum(weights, 0, out=weights)
        np.exp(weights, out=weights)

        # The gradients of scale q · k, and the weights that the values were multiplied by.
        factor = tile.dropout_factor(dtype) if tile.score.dropout else dtype.type(1)
        ds *= factor
        ds -= delta
        ds *= weights
        if dbias is not None:
            dbias += ds.sum(axis=0, where=True if tile.full else ~tile.hidden).T
        if drelative:
            tile.sum_relative(drelative, ds if tile.full else np.where(tile.hidden, 0, ds))
        if derivative is not None:
            ds *= derivative
        ds *= scale
        weights *= factor

        # If dout is not finite, neither is delta. The product below takes dout's NaN and infinity as 0, so the NaN
        # that belongs in dv goes there by way of the weights.
        np.copyto(weights, np.nan, where=~np.isfinite(delta))
        if not tile.full:
            np.copyto(weights, 0, where=tile.hidden)
            np.copyto(ds, 0, where=tile.hidden)

        flat, flat_ds = weights.reshape(-1, columns), ds.reshape(-1, columns)
        if of_keys is not None:
            dk, dv = of_keys
            dv += flat.T @ _finite(dout).reshape(-1, dout.shape[2])
            dk += flat_ds.T @ _finite(q).reshape(-1, q.shape[2])
        gradient.dq[...] += (flat_ds @ _finite(k)).reshape(q.shape)


def _finite(x: NDArray[Any]) -> NDArray[Any]:
    """Give `x` with 0 for NaN and infinity: they have made the gradients of their scores NaN already."""
    finite = np.isfinite(x)
    return x if finite.all() else np.where(finite, x, x.dtype.type(0))
