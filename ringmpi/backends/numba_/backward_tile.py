"""The tile of the backward pass: one packed tile of keys differentiated for one tile of rows (flash attention 2).

    for each panel of keys:                 S = Q·Kᵀ, dP = dO·Vᵀ
    for each group of rows:                 P and dS from S and dP, in place
    for each panel of columns of K:         dQ += dS·K
    for each panel of columns of dO and Q:  dV += Pᵀ·dO, dK += dSᵀ·Q

The rows of a tile are loaded once for many tiles of keys, and dQ stays with them. dK and dV are summed apart by each
task, in rows as wide as whole vectors, since several tasks may have the same keys. K, Q and dO are packed a second
time, as values are, for the last three products; there what is not finite becomes 0: NaN has made S or dP, and so dS,
NaN where it is seen, and where it is not seen 0 times it must be 0.
"""

from __future__ import annotations

import numba
import numpy as np

from .backward_rows import differentiate, differentiate_biased, differentiate_scored
from .forward_tile import address, score_panels
from .pack import lanes, pack_keys, pack_queries, pack_values, panels
from .product import ROWS, VECTORS, add_product, add_transposed_product
from .relative_rows import add_tile
from .tuples import Columns, Contiguous, Prefetch, Strided
from .vector import machine

MOST_ROWS = 32 * ROWS
MOST_KEYS = 192


def backward_tile_shape(dim: int, dim_v: int, item: int, cache: int) -> tuple[int, int]:
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
    tile = packed.tile
    dim, dim_v = k.shape[2], v.shape[2]
    side = lanes(packed.keys)
    size = tile * -(-dim // side) * side
    pack_keys(k, start, n, head, packed.keys, slot * tile * dim)
    pack_keys(v, start, n, head, packed.values, slot * tile * dim_v)
    if not pack_values(k, start, n, head, packed.k_as_values, slot * size, tile):
        clean(packed.k_as_values[slot * size:(slot + 1) * size])


@numba.njit(error_model="numpy")
def clean(x):  # type: ignore[no-untyped-def]
    """Put 0 for what is not finite."""
    for i in range(len(x)):
        if x[i] - x[i] != 0:
            x[i] = 0


@numba.njit(error_model="numpy")
def pack_rows_finite(x, rows, out, height):  # type: ignore[no-untyped-def]
    """Pack rows of x, of which the first `rows` are used, as `pack_values` does, panels of `height` rows; cleaned."""
    columns = x.shape[1]
    place = 0
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
def load_backward_rows(block, gradient, first, count, rows, head, group, work):  # type: ignore[no-untyped-def]
    """Take up rows first..first + count of a key head into the work space; the others up to `rows` see nothing."""
    pack_queries(block.q, first, count, head, group, work.queries[:rows])
    pack_queries(gradient.dout, first, count, head, group, work.douts[:rows])
    if gradient.of_keys:
        pack_rows_finite(work.queries, rows, work.query_panels, len(work.s))
        pack_rows_finite(work.douts, rows, work.dout_panels, len(work.s))
    work.dq[:rows] = 0
    for r in range(rows):
        work.low[r] = work.high[r] = 0
        if r < count:
            i, h = (first + r) // group, head * group + (first + r) % group
            delta = gradient.delta[i, h]
            if gradient.of_queries:
                for c in range(gradient.dq.shape[2]):
                    work.dq[r, c] = gradient.dq[i, h, c]
            work.low[r] = block.begin[0, i]
            work.high[r] = max(block.begin[0, i], block.end[0, i])
            work.delta[r] = delta
            # dO that is not finite makes delta so, and must reach dV: by the weights.
            work.lse[r] = gradient.lse[i, h] if delta - delta == 0 else np.nan


@numba.njit(error_model="numpy")
def store_backward_rows(gradient, first, count, head, group, work):  # type: ignore[no-untyped-def]
    """Put the work space's dQ back into the gradient."""
    for r in range(count if gradient.of_queries else 0):
        target, source = gradient.dq[(first + r) // group, head * group + (first + r) % group], work.dq[r]
        for c in range(len(target)):
            target[c] = source[c]


@numba.njit(error_model="numpy")
def backward_packed(tile, slot, work, packed, sums, sums_at, gradient, score):  # type: ignore[no-untyped-def]
    """Add what packed tile number `slot` gives to dQ and to the task's sums, whose rows from `sums_at` on are its keys.

    `work.groups` says what is seen.
    """
    s, dp = work.s, work.dp
    groups = work.groups
    side = lanes(work.s)
    item = packed.keys.itemsize
    keys_at = slot * packed.tile * work.queries.shape[1]
    values_at = slot * packed.tile * work.douts.shape[1]
    k_as_values_at = slot * packed.tile * work.dq.shape[1]
    score_panels(tile.rows, tile.n, work.queries, s, groups, Contiguous(packed.keys, keys_at),
                 address(packed.values) + values_at * item)
    score_panels(tile.rows, tile.n, work.douts, dp, groups, Contiguous(packed.values, values_at),
                 address(packed.k_as_values) + k_as_values_at * item)

    # S to P and dP to dS, with 0 in all columns that some group sees and a row does not.
    low, high = find_spans(tile.rows, groups, work.spans)
    outer = low // side * side, -(-high // side) * side
    for g in range(0, tile.rows, ROWS):
        first = inner_first = inner_last = last = outer[0]
        if groups[g, 0] < groups[g, 1]:
            first, last = groups[g, 0] // side * side, -(-groups[g, 1] // side) * side
            inner_first, inner_last = groups[g, 2], groups[g, 3]
        columns = Columns(first, inner_first, inner_last, last, tile.start)
        if score is None:
            differentiate(work, g, s.shape[1], columns, outer, gradient.scale)
        elif score.only_biased:
            differentiate_biased(work, g, s.shape[1], columns, outer, gradient.scale, score, sums_at)
        else:
            differentiate_scored(work, g, s.shape[1], columns, outer, gradient.scale, score, sums_at)
    if score is not None:
        add_tile(score.relative, tile.rows, tile.start, tile.n)

    if gradient.of_queries:
        add_queries(tile.rows, work, Contiguous(packed.k_as_values, k_as_values_at), packed.tile)
    if gradient.of_keys:
        add_keys(low, high, s, work.dout_panels, work.spans, sums.dv, sums_at)
        add_keys(low, high, dp, work.query_panels, work.spans, sums.dk, sums_at)


@numba.njit(error_model="numpy")
def find_spans(rows, groups, spans):  # type: ignore[no-untyped-def]
    """Say which rows see the keys of each group of ROWS: spans[g] = first, last. Give the groups' first and last key.

    Some row in first..last sees one of the keys, no other row does.
    """
    low = groups[0, 0]
    high = 0
    for g in range(0, rows, ROWS):
        if groups[g, 0] < groups[g, 1]:
            low, high = min(low, groups[g, 0]), max(high, groups[g, 1])
    low, high = low // ROWS, -(-high // ROWS)
    for k in range(low, high):
        spans[k, 0] = rows
        spans[k, 1] = 0
    for g in range(0, rows, ROWS):
        for k in range(groups[g, 0] // ROWS, -(-groups[g, 1] // ROWS)):
            spans[k, 0] = min(spans[k, 0], g)
            spans[k, 1] = g + ROWS
    return low * ROWS, high * ROWS


@numba.njit(error_model="numpy")
def add_queries(rows, work, k_as_values, keys):  # type: ignore[no-untyped-def]
    """Add dS·K to dQ, each group of rows over the keys that it sees; K is a packed tile of `keys` keys."""
    ds, dq = work.dp, work.dq
    groups = work.groups
    side = lanes(work.dp)
    columns = dq.shape[1]
    item = k_as_values.array.itemsize
    place = k_as_values.at
    for column, width in panels(columns, side):
        following = address(k_as_values.array) + (place + keys * width) * item
        share = -(-width * ROWS // rows) * item
        for g in range(0, rows, ROWS):
            first, last = groups[g, 0], groups[g, 1]
            if first < last:
                add_product(Strided(ds, g * ds.shape[1] + first, ds.shape[1]),
                            Contiguous(k_as_values.array, place + first * width),
                            Strided(dq, g * columns + column, columns), last - first,
                            Prefetch(following + g // ROWS * keys * share, share), Contiguous(work.ones, g),
                            width // side)
        place += keys * width


@numba.njit(error_model="numpy")
def add_keys(low, high, a, b, spans, sums, sums_at):  # type: ignore[no-untyped-def]
    """Add Aᵀ·B to rows of `sums`, each group of keys over the rows that see it; A is P or dS, B panels of dO or Q."""
    columns = sums.shape[1]
    side = lanes(a)
    place = 0
    for column, width in panels(columns, side):
        for k in range(low, high, ROWS):
            first, last = spans[k // ROWS, 0], spans[k // ROWS, 1]
            if first < last:
                at = (sums_at + k) * columns + column
                share = -(-ROWS * columns // (last - first)) * sums.itemsize
                add_transposed_product(
                    Strided(a, first * a.shape[1] + k, a.shape[1]), Contiguous(b, place + first * width),
                    Strided(sums, at, columns), last - first,
                    Prefetch(address(sums) + (at + ROWS * columns) * sums.itemsize, share), width // side)
        place += len(a) * width
