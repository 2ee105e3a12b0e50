"""The tile of a pass over weights: one packed tile of keys, some rows of one query head, and what is made of both.

    for each panel of keys:     S = Q·Kᵀ
    for each group of rows:     sums of the columns, or of the rows, of P; or the largest of S; or P itself

What is made is known by the type of the target. Sums go in the accumulator's dtype over a tile, and in float64 from
there on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.extending import overload

from .pack import lanes, pack_queries
from .product import ROWS
from .score_rows import apply_score
from .sum_rows import add_to_columns, add_to_rows, make_weights, next_reaching
from .tuples import Columns


class ColumnTarget(NamedTuple):
    """Sums of columns, (n_k, heads) float64."""

    column_sums: Any


class RowTarget(NamedTuple):
    """Sums of rows, (n_q, heads, 3) float64; the values of the keys, less `base`, in the accumulator's dtype."""

    row_sums: Any
    values: Any
    base: Any


class TopTarget(NamedTuple):
    """Scores and positions of the heaviest keys, (n_q, heads, n), and the positions of the keys of the block."""

    scores: Any
    positions: Any
    keys: Any


class WeightTarget(NamedTuple):
    """Weights, (n_q, heads, n_k)."""

    weights: Any


class WeightTiles(NamedTuple):
    """Packed tiles of keys, head by head; see `pack.pack_keys`. `tile`: keys of one. `tiles`: of a head."""

    keys: Any
    tile: Any
    tiles: Any


class WeightWork(NamedTuple):
    """What a thread works on: arrays for a tile of rows, made by `reduction.WeightScratch`.

    Attributes
    ----------
    queries : (rows, dim)
    s : (rows, keys)
        Products, and then scores or weights.
    lse : (rows,)
    low, high : (rows,) int64
        The columns that a row sees.
    groups : (rows, 4) int64
        See `forward_tile.find_groups`.
    columns, values : (keys,)
        Sums, and values, of the columns of a tile.
    mass, logs, moment : (rows + some,)
        Sums of the rows over a tile.
    """

    queries: Any
    s: Any
    lse: Any
    low: Any
    high: Any
    groups: Any
    columns: Any
    values: Any
    mass: Any
    logs: Any
    moment: Any


@numba.njit(error_model="numpy")
def load_weight_rows(block, lse, first, count, rows, head, work):  # type: ignore[no-untyped-def]
    """Take up queries first..first + count of a query head; the others up to `rows` see nothing."""
    pack_queries(block.q, first, count, head, 1, work.queries[:rows])
    for r in range(rows):
        work.low[r] = work.high[r] = 0
        work.lse[r] = 0
        if r < count:
            work.low[r] = block.begin[0, first + r]
            work.high[r] = max(block.begin[0, first + r], block.end[0, first + r])
            work.lse[r] = lse[first + r, head]


@numba.njit
def columns_of(g, start, work):  # type: ignore[no-untyped-def]
    """Give the columns of a tile that a group of rows works on."""
    side = lanes(work.s)
    groups = work.groups
    return Columns(groups[g, 0] // side * side, groups[g, 2], groups[g, 3], -(-groups[g, 1] // side) * side, start)


@numba.njit(error_model="numpy")
def reduce_tile(tile, first, count, head, work, target, scale, score):  # type: ignore[no-untyped-def]
    """Do with the products of a tile what the target wants."""
    begin_tile(tile, work, target)
    s = work.s
    for g in range(0, tile.rows, ROWS):
        if work.groups[g, 0] < work.groups[g, 1]:
            columns = columns_of(g, tile.start, work)
            if score is not None:
                apply_score(s, g, s.shape[1], columns, score)
            reduce_group(tile, g, first, count, head, columns, work, target, scale)
    end_tile(tile, first, count, head, work, target)


def begin_tile(tile, work, target):  # type: ignore[no-untyped-def]
    """Clear what a tile is summed up in."""
    raise NotImplementedError("typed by Numba")


@overload(begin_tile)
def _begin_tile(tile, work, target):  # type: ignore[no-untyped-def]
    return {ColumnTarget: _begin_columns, RowTarget: _begin_rows}.get(target.instance_class, _nothing)


def _nothing(tile, work, target):  # type: ignore[no-untyped-def]
    pass


def _begin_columns(tile, work, target):  # type: ignore[no-untyped-def]
    for j in range(len(work.columns)):
        work.columns[j] = 0


def _begin_rows(tile, work, target):  # type: ignore[no-untyped-def]
    for j in range(len(work.values)):
        work.values[j] = target.values[tile.start + j] if j < tile.n else 0
    for r in range(tile.rows):
        work.mass[r] = work.logs[r] = work.moment[r] = 0


def reduce_group(tile, g, first, count, head, columns, work, target, scale):  # type: ignore[no-untyped-def]
    """Do with the scores of a group of rows what the target wants."""
    raise NotImplementedError("typed by Numba")


@overload(reduce_group)
def _reduce_group(tile, g, first, count, head, columns, work, target, scale):  # type: ignore[no-untyped-def]
    return {ColumnTarget: _add_to_columns, RowTarget: _add_to_rows, TopTarget: _keep_tops,
            WeightTarget: _write_weights}[target.instance_class]


def _add_to_columns(tile, g, first, count, head, columns, work, target, scale):  # type: ignore[no-untyped-def]
    add_to_columns(work, g, work.s.shape[1], columns, scale)


def _add_to_rows(tile, g, first, count, head, columns, work, target, scale):  # type: ignore[no-untyped-def]
    add_to_rows(work, g, work.s.shape[1], columns, scale)


def _write_weights(tile, g, first, count, head, columns, work, target, scale):  # type: ignore[no-untyped-def]
    make_weights(work, g, work.s.shape[1], columns, scale)
    for r in range(g, min(g + ROWS, count)):
        row = target.weights[first + r, head]
        for j in range(max(work.low[r] - tile.start, 0), min(work.high[r] - tile.start, tile.n)):
            row[tile.start + j] = work.s[r, j]


def _keep_tops(tile, g, first, count, head, columns, work, target, scale):  # type: ignore[no-untyped-def]
    for r in range(g, min(g + ROWS, count)):
        low, high = max(work.low[r] - tile.start, 0), min(work.high[r] - tile.start, tile.n)
        if low < high:
            keep_row(r, low, high, tile.start, target.scores[first + r, head], target.positions[first + r, head],
                     target.keys, work, scale)


@numba.njit(error_model="numpy")
def keep_row(r, low, high, start, scores, positions, keys, work, scale):  # type: ignore[no-untyped-def]
    """Put the columns low..high of a row among the best if they are; most vectors hold none and are passed by."""
    s = work.s
    side = lanes(s)
    last = len(scores) - 1
    j = low // side * side
    while True:
        j = next_reaching(s, r * s.shape[1], j, high, scale, scores[last])
        if j >= high:
            return
        for c in range(max(j, low), min(j + side, high)):
            insert(s[r, c] * scale, keys[start + c], scores, positions)
        j += side


@numba.njit(error_model="numpy")
def insert(x, position, scores, positions):  # type: ignore[no-untyped-def]
    """Put a score where it belongs, in the order of `heaviest.best`; the last one goes."""
    m = len(scores)
    while m > 0 and is_before(x, position, scores[m - 1], positions[m - 1]):
        m -= 1
        if m + 1 < len(scores):
            scores[m + 1] = scores[m]
            positions[m + 1] = positions[m]
    if m < len(scores):
        scores[m] = x
        positions[m] = position


@numba.njit(error_model="numpy")
def is_before(x, position, other, other_position):  # type: ignore[no-untyped-def]
    """Whether a key comes before another: by score, NaN as infinity, then by position."""
    a = math.inf if x != x else x
    b = math.inf if other != other else other
    return a > b or (a == b and position < other_position)


def end_tile(tile, first, count, head, work, target):  # type: ignore[no-untyped-def]
    """Add the sums of a tile to those of the target."""
    raise NotImplementedError("typed by Numba")


@overload(end_tile)
def _end_tile(tile, first, count, head, work, target):  # type: ignore[no-untyped-def]
    return {ColumnTarget: _end_columns, RowTarget: _end_rows}.get(target.instance_class, _no_end)


def _no_end(tile, first, count, head, work, target):  # type: ignore[no-untyped-def]
    pass


def _end_columns(tile, first, count, head, work, target):  # type: ignore[no-untyped-def]
    for j in range(tile.n):
        target.column_sums[tile.start + j, head] += np.float64(work.columns[j])


def _end_rows(tile, first, count, head, work, target):  # type: ignore[no-untyped-def]
    for r in range(count):
        row = target.row_sums[first + r, head]
        mass = np.float64(work.mass[r])
        row[0] += mass
        row[1] -= np.float64(work.logs[r])
        row[2] += np.float64(work.moment[r]) + mass * target.base
