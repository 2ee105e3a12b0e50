"""The attention tile: one packed tile of keys folded into one tile of rows (flash attention, forward).

    for each panel of keys:    S = Q·K            rows that see nothing of the panel are left out
    for each row:              P, maximum, sum    from S, in place
    for each panel of values:  acc = shrink·acc + P·V

Cache budget, float32 at dim 128 with AVX-512: a panel of K or V is 128 × 64 numbers, 32 KiB, in L1 while all row
groups pass over it, and each step of a product asks for a little of the next panel. Q, S and acc of 192 rows take
288 KiB and the tile of K and V 128 KiB, in L2. `tile_shape` says so for other sizes.

Rows go by in groups of `ROWS`. A group works on the union of what its rows see of the tile; only the vectors that not
every row sees in full are masked, by comparing lane numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from .pack import lanes, pack_queries, panels, weight, widen
from .product import ROWS, VECTORS, add_product, add_values, dot_keys, scores
from .score_rows import drop, turn
from .softmax_rows import exponential, raise_maxima, weigh
from .vector import machine


class Work(NamedTuple):
    """What a thread works on: arrays for a tile of rows, made by `workspace.Rows`.

    Attributes
    ----------
    queries : (rows, depth)
        Q, as the products take it.
    s, p : (rows, keys)
        Scores and weights: one array, but where bfloat16 is multiplied in pairs; then p is uint32 (rows, keys / 2).
    acc : (rows, width)
        Sum of weights times values; width is dim_v in whole vectors.
    top, norm, shrink, shift : (rows + a vector,)
        See `softmax_rows.raise_maxima`.
    low, high : (rows,) int64
        The columns that a row sees.
    groups : (rows, 4) int64
        See `find_groups`.
    """

    queries: Any
    s: Any
    p: Any
    acc: Any
    top: Any
    norm: Any
    shrink: Any
    shift: Any
    low: Any
    high: Any
    groups: Any


MOST_ROWS, MOST_KEYS = 32 * ROWS, 128


def tile_shape(depth: int, width: int, item: int, cache: int) -> tuple[int, int]:
    """Rows and keys of a tile for keys of `depth` and values of `width` numbers of `item` bytes.

    The keys are a multiple of the widest panel; their K and V fill at most a quarter of a cache of `cache` bytes, and
    Q, S and acc of the rows what is left of its half.
    """
    wide = VECTORS * machine().vector_bytes // item
    keys = max(wide, min(MOST_KEYS, cache // 4 // ((depth + width) * item)) // wide * wide)
    rows = (cache // 2 - keys * (depth + width) * item) // ((depth + width + keys) * item)
    return max(8 * ROWS, min(MOST_ROWS, rows // ROWS * ROWS)), keys


@numba.njit(error_model="numpy")
def score_panels(rows, n, queries, s, groups, keys, keys_at, ahead):  # type: ignore[no-untyped-def]
    """S of a packed tile of keys, panel by panel; each asks for the next, the last for address `ahead`."""
    depth, wide = queries.shape[1], VECTORS * lanes(s)
    share = -(-wide * ROWS // rows) * keys.itemsize               # bytes of the next panel that a step asks for
    for panel in range(0, n, wide):
        following = address(keys) + (keys_at + (panel + wide) * depth) * keys.itemsize if panel + wide < n else ahead
        for g in range(0, rows, ROWS):
            if groups[g, 0] < panel + wide and groups[g, 1] > panel:
                scores(queries, g * depth, depth, keys, keys_at + panel * depth, s, g * s.shape[1] + panel, s.shape[1],
                       depth, following + g // ROWS * depth * share, share)


@numba.njit(error_model="numpy")
def fold_direct(count, n, work, k, v, start, head, scale, shape):  # type: ignore[no-untyped-def]
    """Fold keys start..start + n of a head, as they came, into the first `count` rows, at most ROWS."""
    queries, s, _, acc, top, norm, shrink, shift, low, high, groups = work
    depth, dim_v, side = queries.shape[1], v.shape[2], lanes(acc)
    row, v_row, whole = k.shape[1] * depth, v.shape[1] * dim_v, dim_v - dim_v % side
    first, last = groups[0, 0] // side * side, -(-groups[0, 1] // side) * side
    for j in range(first, last, side):
        for r in range(count):
            dot_keys(queries, r * depth, k, (start + j) * row + head * depth, row, min(side, n - j), depth,
                     s, r * s.shape[1] + j)
    if shape is not None:
        turn(s, 0, first, last, start, shape)
    raise_maxima(s, 0, s.shape[1], first, groups[0, 2], groups[0, 3], last, low, high, start,
                 top, norm, shrink, shift, scale)
    weigh(s, 0, s.shape[1], first, groups[0, 2], groups[0, 3], last, low, high, start, s, norm, shift, scale)
    if shape is not None:
        drop(s, 0, first, last, start, shape)
    for r in range(count):
        a, b = max(low[r] - start, 0), min(high[r] - start, n)
        if a < b:
            add_values(s, r * s.shape[1] + a, v, (start + a) * v_row + head * dim_v, v_row, b - a, whole,
                       acc, r * acc.shape[1], shrink[r])
            for c in range(whole, dim_v):
                total = acc[r, c] * shrink[r]
                for j in range(a, b):
                    total += s[r, j] * widen(v[start + j, head, c])
                acc[r, c] = total


@numba.njit(error_model="numpy")
def fold_scores(rows, work, values, values_at, finite, v, start, n, head, tile, scale, shape, ahead):  # type: ignore[no-untyped-def]
    """Fold a tile of n keys whose products are in S into the first `rows` rows (a multiple of ROWS) of the work space.

    values[values_at:] is a tile as `pack_values` made it, of `tile` keys; v[start:start + n, head] are the values as
    they came, for rows that must not multiply what they do not see. The last panel asks for address `ahead`.
    """
    _, s, p, acc, top, norm, shrink, shift, low, high, groups = work
    columns, side = acc.shape[1], lanes(acc)
    step = s.size * s.itemsize // (p.size * p.itemsize)          # 1, or 2 where p holds pairs
    for g in range(0, rows, ROWS):
        if groups[g, 0] < groups[g, 1]:
            first, last = groups[g, 0] // side * side, -(-groups[g, 1] // side) * side
            if shape is not None:
                turn(s, g, first, last, start, shape)
            raise_maxima(s, g, s.shape[1], first, groups[g, 2], groups[g, 3], last, low, high, start,
                         top, norm, shrink, shift, scale)
            weigh(s, g, s.shape[1], first, groups[g, 2], groups[g, 3], last, low, high, start, p, norm, shift, scale)
            if shape is not None:
                drop(p, g, first, last, start, shape)
    place = values_at
    for column, width in panels(columns, side):
        following = address(values) + (place + tile // step * width) * values.itemsize
        if column + width >= columns:
            following = ahead
        share = -(-width * ROWS // rows) * values.itemsize
        for g in range(0, rows, ROWS):
            first, last = groups[g, 0], groups[g, 1]
            if first < last and (finite or is_even(groups[g])):
                first //= step
                add_product(p, g * p.shape[1] + first, p.shape[1], values, place + first * width,
                            acc, g * columns + column, columns, -(-last // step) - first,
                            following + g // ROWS * (tile // step) * share, share, shrink, g, width // side)
        place += tile // step * width
    if not finite:
        for g in range(0, rows, ROWS):
            if groups[g, 0] < groups[g, 1] and not is_even(groups[g]):
                for r in range(g, g + ROWS):
                    add_seen(acc[r], shrink[r], p, r, v, start, head, max(low[r] - start, 0), min(high[r] - start, n))


@numba.njit
def address(array):  # type: ignore[no-untyped-def]
    """Address of an array's first element."""
    return np.int64(array.ctypes.data)


@numba.njit
def find_groups(rows, low, high, start, n, side, groups):  # type: ignore[no-untyped-def]
    """Say what each group sees of a tile of n columns: groups[g] = first, last, inner first, inner last.

    Some row sees something of first..last only; every row sees all of inner first..inner last, which are whole vectors.
    """
    for g in range(0, rows, ROWS):
        first, last, inner_first, inner_last = n, 0, 0, n
        for r in range(g, g + ROWS):
            a, b = max(low[r] - start, 0), min(high[r] - start, n)
            if a < b:
                first, last = min(first, a), max(last, b)
            inner_first, inner_last = max(inner_first, a), min(inner_last, b)
        inner_first, inner_last = -(-inner_first // side) * side, max(inner_last, 0) // side * side
        if inner_first >= inner_last:
            inner_first = inner_last = -(-last // side) * side
        groups[g, 0], groups[g, 1], groups[g, 2], groups[g, 3] = first, last, inner_first, inner_last


@numba.njit
def is_even(group):  # type: ignore[no-untyped-def]
    """Whether every row of a group sees all that any of them sees."""
    return group[0] == group[2] and group[1] == group[3]


@numba.njit(error_model="numpy")
def add_seen(row, shrink, p, r, v, start, head, a, b):  # type: ignore[no-untyped-def]
    """Row = shrink·row + P[r]·V over columns a..b alone, one at a time: 0 × NaN is NaN."""
    for c in range(v.shape[2]):
        total = row.dtype.type(0)
        for j in range(a, b):
            total += weight(p, r, j) * widen(v[start + j, head, c])
        row[c] = row[c] * shrink + total


@numba.njit(error_model="numpy")
def load_rows(q, begin, end, first, count, rows, head, group, top_so_far, work):  # type: ignore[no-untyped-def]
    """Set the work space to rows first..first + count of a key head; the others up to `rows` see what the last does."""
    queries, _, _, acc, top, norm, _, _, low, high, _ = work
    pack_queries(q, first, count, head, group, queries[:rows])
    for r in range(rows):
        i, h = (first + min(r, count - 1)) // group, head * group + (first + min(r, count - 1)) % group
        low[r], high[r], top[r], norm[r] = begin[i], max(begin[i], end[i]), top_so_far[i, h], 0
        for c in range(acc.shape[1]):
            acc[r, c] = 0


@numba.njit(error_model="numpy")
def store_rows(state_acc, state_top, state_norm, first, count, head, group, work):  # type: ignore[no-untyped-def]
    """Merge the work space into the state; rows that saw nothing stay as they are."""
    _, _, _, acc, top, norm, _, _, low, high, _ = work
    for r in range(count):
        if low[r] >= high[r]:
            continue
        i, h = (first + r) // group, head * group + (first + r) % group
        shrink = exponential(state_top[i, h] - (top[r] if top[r] > -np.inf else top.dtype.type(0)))
        row, new = state_acc[i, h], acc[r]
        for c in range(len(row)):
            row[c] = row[c] * shrink + new[c]
        state_norm[i, h] = state_norm[i, h] * shrink + norm[r]
        state_top[i, h] = top[r]


@numba.njit
def visible(low, high, rows, start, stop):  # type: ignore[no-untyped-def]
    """First and last column of start..stop that any row sees."""
    first, last = stop, start
    for r in range(rows):
        a, b = max(low[r], start), min(high[r], stop)
        if a < b:
            first, last = min(first, a), max(last, b)
    return first, last


@numba.njit
def any_sees(rows, groups):  # type: ignore[no-untyped-def]
    """Whether any group sees anything of the tile."""
    seen = False
    for g in range(0, rows, ROWS):
        seen |= groups[g, 0] < groups[g, 1]
    return seen


@numba.njit
def part(work, row):  # type: ignore[no-untyped-def]
    """Give the work space from a row on."""
    queries, s, p, acc, top, norm, shrink, shift, low, high, groups = work
    return Work(queries[row:], s[row:], p[row:], acc[row:], top[row:], norm[row:], shrink[row:], shift[row:],
                low[row:], high[row:], groups[row:])
