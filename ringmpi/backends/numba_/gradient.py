"""The tile of the backward pass: one packed tile of keys differentiated for one tile of rows (flash attention 2).

    for each panel of keys:                 S = Q·Kᵀ, dP = dO·Vᵀ
    for each group of rows:                 P and dS from S and dP, in place
    for each panel of columns of K:         dQ += dS·K
    for each panel of columns of dO and Q:  dV += Pᵀ·dO, dK += dSᵀ·Q

The rows of a tile are loaded once for many tiles of keys, and dQ stays with them. dK and dV are summed apart by each
task, in rows as wide as whole vectors, since several tasks have the same keys. K, Q and dO are packed a second time, as
values are, for the last three products; there what is not finite becomes 0: NaN has made S or dP, and so dS, NaN where
it is seen, and where it is not seen 0 times it must be 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from .gradient_rows import differentiate, differentiate_shaped
from .pack import lanes, pack_keys, pack_queries, pack_values, panels
from .product import ROWS, VECTORS, add_product, add_turned
from .tile import address, score_panels
from .vector import machine


class BackWork(NamedTuple):
    """What a thread works on: arrays for a tile of rows, made by `workspace.BackRows`.

    Attributes
    ----------
    queries, douts : (rows, dim), (rows, dim_v)
        Q and dO, as the products take them from the left.
    query_panels, dout_panels : (rows · width,), (rows · width_v,)
        The same from the right, as values are packed.
    s, dp : (rows, keys + some)
        S and P, dP and dS.
    dq : (rows, width)
    ones, lse, delta : (rows,)
    low, high : (rows,) int64
        The columns that a row sees.
    groups : (rows, 4) int64
        See `tile.find_groups`.
    spans : (groups of keys, 2) int64
        See `find_spans`.
    """

    queries: Any
    douts: Any
    query_panels: Any
    dout_panels: Any
    s: Any
    dp: Any
    dq: Any
    ones: Any
    lse: Any
    delta: Any
    low: Any
    high: Any
    groups: Any
    spans: Any


MOST_ROWS, MOST_KEYS = 32 * ROWS, 192


def gradient_tile_shape(dim: int, dim_v: int, item: int, cache: int) -> tuple[int, int]:
    """Rows and keys of a tile, for keys and values of so many numbers of `item` bytes.

    The keys are a multiple of the widest panel. K (twice), V, dK and dV fill at most a quarter of a cache of `cache`
    bytes, and Q, dO (both twice), dQ, S and dP what is left of three quarters.
    """
    wide = VECTORS * machine().vector_bytes // item
    key = (3 * dim + 2 * dim_v) * item
    keys = max(wide, min(MOST_KEYS, cache // 4 // key) // wide * wide)
    rows = (cache * 3 // 4 - keys * key) // ((3 * dim + 2 * dim_v + 2 * keys) * item)
    return max(8 * ROWS, min(MOST_ROWS, rows // ROWS * ROWS)), keys


@numba.njit(error_model="numpy")
def pack_tile(k, v, start, n, head, slot, packed):  # type: ignore[no-untyped-def]
    """Pack keys start..start + n of a head: K and V as keys, and K as values."""
    keys, values, turned, tile, _ = packed
    dim, dim_v, side = k.shape[2], v.shape[2], lanes(keys)
    size = tile * -(-dim // side) * side
    pack_keys(k, start, n, head, keys, slot * tile * dim)
    pack_keys(v, start, n, head, values, slot * tile * dim_v)
    if not pack_values(k, start, n, head, turned, slot * size, tile):
        clean(turned[slot * size:(slot + 1) * size])


@numba.njit(error_model="numpy")
def clean(x):  # type: ignore[no-untyped-def]
    """Put 0 for what is not finite."""
    for i in range(len(x)):
        if x[i] - x[i] != 0:
            x[i] = 0


@numba.njit(error_model="numpy")
def turn_rows(x, rows, out, height):  # type: ignore[no-untyped-def]
    """Pack rows of x, of which the first `rows` are used, as `pack_values` does, panels of `height` rows; cleaned."""
    place, columns = 0, x.shape[1]
    for first, width in panels(columns, lanes(x)):
        for r in range(rows):
            source, target = x[r, first:min(first + width, columns)], out[place + r * width:place + (r + 1) * width]
            for c in range(len(source)):
                number = source[c]
                target[c] = number if number - number == 0 else x.dtype.type(0)
            for c in range(len(source), width):
                target[c] = 0
        place += height * width


@numba.njit(error_model="numpy")
def load_back(q, dout, lse, delta, begin, end, first, count, rows, head, group, work):  # type: ignore[no-untyped-def]
    """Set the work space to rows first..first + count of a key head; the others up to `rows` see nothing."""
    pack_queries(q, first, count, head, group, work.queries[:rows])
    pack_queries(dout, first, count, head, group, work.douts[:rows])
    turn_rows(work.queries, rows, work.query_panels, len(work.s))
    turn_rows(work.douts, rows, work.dout_panels, len(work.s))
    work.dq[:rows] = 0
    for r in range(rows):
        work.low[r] = work.high[r] = 0
        if r < count:
            i, h = (first + r) // group, head * group + (first + r) % group
            work.low[r], work.high[r], work.delta[r] = begin[i], max(begin[i], end[i]), delta[i, h]
            # dO that is not finite makes delta so, and must reach dV: by the weights.
            work.lse[r] = lse[i, h] if delta[i, h] - delta[i, h] == 0 else np.nan


@numba.njit(error_model="numpy")
def store_back(dq, first, count, head, group, scale, work):  # type: ignore[no-untyped-def]
    """Add the work space's dQ to dq."""
    for r in range(count):
        target, source = dq[(first + r) // group, head * group + (first + r) % group], work.dq[r]
        for c in range(len(target)):
            target[c] += source[c] * scale


@numba.njit(error_model="numpy")
def differentiate_tile(rows, n, work, packed, slot, sums_k, sums_v, sums_at, start, scale, shape):  # type: ignore[no-untyped-def]
    """Differentiate a tile of n keys, columns from `start` on, for `rows` rows: add to dQ and to the task's dK and dV.

    `work.groups` says what is seen. The sums are rows from `sums_at` on.
    """
    keys, values, turned, tile, _ = packed
    s, dp, groups, side = work.s, work.dp, work.groups, lanes(work.s)
    dim, dim_v, width = work.queries.shape[1], work.douts.shape[1], work.dq.shape[1]
    keys_at, values_at, turned_at = slot * tile * dim, slot * tile * dim_v, slot * tile * width
    score_panels(rows, n, work.queries, s, groups, keys, keys_at, address(values) + values_at * keys.itemsize)
    score_panels(rows, n, work.douts, dp, groups, values, values_at, address(turned) + turned_at * keys.itemsize)
    low, high = find_spans(rows, groups, work.spans)
    outer_first, outer_last = low // side * side, -(-high // side) * side
    for g in range(0, rows, ROWS):
        first = inner_first = inner_last = last = outer_first
        if groups[g, 0] < groups[g, 1]:
            first, last = groups[g, 0] // side * side, -(-groups[g, 1] // side) * side
            inner_first, inner_last = groups[g, 2], groups[g, 3]
        if shape is None:
            differentiate(s, dp, g, s.shape[1], outer_first, first, inner_first, inner_last, last, outer_last,
                          work.low, work.high, start, work.lse, work.delta, scale)
        else:
            differentiate_shaped(s, dp, g, s.shape[1], outer_first, first, inner_first, inner_last, last, outer_last,
                                 work.low, work.high, start, work.lse, work.delta, shape.ratio, shape.cap,
                                 shape.sloped, shape.threshold, shape.gain, shape.slope, shape.stream,
                                 shape.position, shape.keys)
    add_queries(rows, work, turned, turned_at, tile)
    add_keys(low, high, s, work.dout_panels, work.spans, sums_v, sums_at)
    add_keys(low, high, dp, work.query_panels, work.spans, sums_k, sums_at)


@numba.njit(error_model="numpy")
def find_spans(rows, groups, spans):  # type: ignore[no-untyped-def]
    """Say which rows see the keys of each group of ROWS: spans[g] = first, last. Give the groups' first and last key.

    Some row in first..last sees one of the keys, no other row does.
    """
    low, high = groups[0, 0], 0
    for g in range(0, rows, ROWS):
        if groups[g, 0] < groups[g, 1]:
            low, high = min(low, groups[g, 0]), max(high, groups[g, 1])
    low, high = low // ROWS, -(-high // ROWS)
    for k in range(low, high):
        spans[k, 0], spans[k, 1] = rows, 0
    for g in range(0, rows, ROWS):
        for k in range(groups[g, 0] // ROWS, -(-groups[g, 1] // ROWS)):
            spans[k, 0], spans[k, 1] = min(spans[k, 0], g), g + ROWS
    return low * ROWS, high * ROWS


@numba.njit(error_model="numpy")
def add_queries(rows, work, turned, turned_at, tile):  # type: ignore[no-untyped-def]
    """Add dS·K to dQ, each group of rows over the keys that it sees."""
    ds, dq, groups, side = work.dp, work.dq, work.groups, lanes(work.dp)
    place, columns = turned_at, dq.shape[1]
    for column, width in panels(columns, side):
        following = address(turned) + (place + tile * width) * turned.itemsize
        share = -(-width * ROWS // rows) * turned.itemsize
        for g in range(0, rows, ROWS):
            first, last = groups[g, 0], groups[g, 1]
            if first < last:
                add_product(ds, g * ds.shape[1] + first, ds.shape[1], turned, place + first * width,
                            dq, g * columns + column, columns, last - first,
                            following + g // ROWS * tile * share, share, work.ones, g, width // side)
        place += tile * width


@numba.njit(error_model="numpy")
def add_keys(low, high, a, b, spans, sums, sums_at):  # type: ignore[no-untyped-def]
    """Add Aᵀ·B to rows of `sums`, each group of keys over the rows that see it; A is P or dS, B panels of dO or Q."""
    place, columns, side = 0, sums.shape[1], lanes(a)
    for column, width in panels(columns, side):
        for k in range(low, high, ROWS):
            first, last = spans[k // ROWS]
            if first < last:
                at = (sums_at + k) * columns + column
                share = -(-ROWS * columns // (last - first)) * sums.itemsize
                add_turned(a, first * a.shape[1] + k, a.shape[1], b, place + first * width, sums, at, columns,
                           last - first, address(sums) + (at + ROWS * columns) * sums.itemsize, share, width // side)
        place += len(a) * width
