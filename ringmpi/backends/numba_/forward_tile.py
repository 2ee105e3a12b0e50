"""The attention tile: one packed tile of keys folded into one tile of rows (flash attention, forward).

    for each panel of keys:    S = Q·K            rows that see nothing of the panel are left out
                               or P, sum          in registers, where all is seen and the maximum holds: `weights`
    for each other row:        P, maximum, sum    from S, in place
    for each panel of values:  acc = shrink·acc + P·V

Cache budget, float32 at dim 128 with AVX-512: a panel of K or V is 128 × 64 numbers, 32 KiB, in L1 while all row
groups pass over it, and each step of a product asks for a little of the next panel. Q, S and acc of 192 rows take
288 KiB and the tile of K and V 128 KiB, in L2. `forward_tile_shape` says so for other sizes.

Rows go by in groups of `ROWS`. A group works on the union of what its rows see of the tile; only the vectors that not
every row sees in full are masked, by comparing lane numbers.
"""

from __future__ import annotations

import numba
import numpy as np

from .few_rows import multiply_direct, score_direct
from .pack import lanes, pack_keys, pack_queries, pack_values, panels, place_of, weight, widen
from .product import ROWS, VECTORS, add_product, scores
from .score_rows import apply_dropout, apply_score
from .softmax_rows import multiply_add, raise_maxima, weigh
from .tuples import Columns, Contiguous, ForwardWork, Prefetch, Strided
from .vector import machine
from .weights import end_weights, weigh_biased_products, weigh_products

MOST_ROWS = 32 * ROWS
MOST_KEYS = 128


def forward_tile_shape(depth: int, width: int, item: int, cache: int, keys: int = 0) -> tuple[int, int]:
    """Rows and keys of a tile for keys of `depth` and values of `width` numbers of `item` bytes.

    The keys, unless they are given, are a multiple of the widest panel; their K and V fill at most a quarter of a cache
    of `cache` bytes, and Q, S and acc of the rows what is left of its half.
    """
    wide = VECTORS * machine().vector_bytes // item
    keys = keys or max(wide, min(MOST_KEYS, cache // 4 // ((depth + width) * item)) // wide * wide)
    rows = (cache // 2 - keys * (depth + width) * item) // ((depth + width + keys) * item)
    return max(8 * ROWS, min(MOST_ROWS, rows // ROWS * ROWS)), keys


@numba.njit(error_model="numpy")
def fold_packed(tile, slot, work, block, packed, score):  # type: ignore[no-untyped-def]
    """Fold packed tile number `slot` into rows of its head."""
    score_packed(tile, slot, work, block, packed, score)
    weigh_groups(tile, work, work.p, block.scale, score)
    multiply_packed(tile, slot, work, block, packed)


@numba.njit(error_model="numpy")
def score_packed(tile, slot, work, block, packed, score):  # type: ignore[no-untyped-def]
    """S of packed tile number `slot`, which is packed here first if it is private; weights of the groups in `eager`."""
    k, v = block.k, block.v
    keys_at = slot * packed.tile * k.shape[2]
    values_at = slot * (len(packed.values) // len(packed.finite))
    if packed.private:
        pack_keys(k, tile.start, tile.n, tile.head, packed.keys, keys_at)
    find_eager(tile, work, score)
    keys = Contiguous(packed.keys, keys_at)
    weigh_panels(tile, work, work.p, keys, address(packed.values) + values_at * packed.values.itemsize, block.scale,
                 score)
    for g in range(0, tile.rows, ROWS):
        if work.eager[g]:
            end_weights(work, g)
    if packed.private:
        packed.finite[slot] = pack_values(v, tile.start, tile.n, tile.head, packed.values, values_at, packed.tile)


@numba.njit(error_model="numpy")
def score_panels(rows, n, queries, s, groups, keys, ahead):  # type: ignore[no-untyped-def]
    """S of a packed tile of n keys, panel by panel; each asks for the next, the last for address `ahead`."""
    depth = queries.shape[1]
    wide = VECTORS * lanes(s)
    item = keys.array.itemsize
    share = -(-wide * ROWS // rows) * item                        # bytes of the next panel that a step asks for
    for panel in range(0, n, wide):
        following = address(keys.array) + (keys.at + (panel + wide) * depth) * item if panel + wide < n else ahead
        for g in range(0, rows, ROWS):
            if groups[g, 0] < panel + wide and groups[g, 1] > panel:
                score_panel(g, panel, queries, s, groups, keys, Prefetch(following + g // ROWS * depth * share, share))


@numba.njit(error_model="numpy")
def score_panel(g, panel, queries, s, groups, keys, prefetched):  # type: ignore[no-untyped-def]
    """S of a group of rows and the columns from `panel` on: those vectors of the panel of which some row sees any."""
    depth = queries.shape[1]
    side = lanes(s)
    first = max(groups[g, 0] - panel, 0) // side
    last = min(-(-(groups[g, 1] - panel) // side), VECTORS)
    scores(Strided(queries, g * depth, depth), Contiguous(keys.array, keys.at + panel * depth + first * side),
           Strided(s, g * s.shape[1] + panel + first * side, s.shape[1]), depth, prefetched, last - first)


@numba.njit(error_model="numpy")
def find_eager(tile, work, score):  # type: ignore[no-untyped-def]
    """Say which groups' scores can become weights at once: all is seen, and there is something to subtract."""
    whole = tile.n % (VECTORS * lanes(work.s)) == 0
    if score is not None:
        whole = whole and score.only_biased
    for g in range(0, tile.rows, ROWS):
        eager = whole and work.groups[g, 2] == 0 and work.groups[g, 3] == tile.n
        for r in range(g, g + ROWS):
            eager &= work.row_max[r] - work.row_max[r] == 0
        work.eager[g] = eager


@numba.njit(error_model="numpy")
def weigh_panels(tile, work, p, keys, ahead, scale, score):  # type: ignore[no-untyped-def]
    """Do what `score_panels` does, but make weights of the groups in `eager`; those that rise too high leave it."""
    queries = work.queries
    s = work.s
    groups = work.groups
    depth = queries.shape[1]
    wide = VECTORS * lanes(s)
    item = keys.array.itemsize
    share = -(-wide * ROWS // tile.rows) * item                   # bytes of the next panel that a step asks for
    for panel in range(0, tile.n, wide):
        following = address(keys.array) + (keys.at + (panel + wide) * depth) * item if panel + wide < tile.n else ahead
        for g in range(0, tile.rows, ROWS):
            prefetched = Prefetch(following + g // ROWS * depth * share, share)
            first = panel
            if work.eager[g]:
                a = Strided(queries, g * depth, depth)
                b = Contiguous(keys.array, keys.at + panel * depth)
                if score is None:
                    too_high = weigh_products(a, b, work, p, g, s.shape[1], panel, depth, prefetched, scale)
                else:
                    too_high = weigh_biased_products(a, b, work, p, g, s.shape[1], panel, depth, prefetched,
                                                     score.ratio, score, tile.start)
                if not too_high:
                    continue
                work.eager[g] = False
                first = 0
            for j in range(first, panel + wide, wide):
                if groups[g, 0] < j + wide and groups[g, 1] > j:
                    score_panel(g, j, queries, s, groups, keys, prefetched)


@numba.njit(error_model="numpy")
def weigh_groups(tile, work, p, scale, score):  # type: ignore[no-untyped-def]
    """Products in S to weights in `p`, for each group of rows that sees something."""
    s = work.s
    groups = work.groups
    side = lanes(work.acc)
    for g in range(0, tile.rows, ROWS):
        if groups[g, 0] < groups[g, 1] and not work.eager[g]:
            columns = Columns(groups[g, 0] // side * side, groups[g, 2], groups[g, 3], -(-groups[g, 1] // side) * side,
                              tile.start)
            if score is not None:
                apply_score(s, g, s.shape[1], columns, score)
            raise_maxima(work, g, s.shape[1], columns, scale)
            weigh(work, p, g, s.shape[1], columns, scale)
            if score is not None:  # noqa: SIM102 (Numba leaves out what is below where the score is None)
                if score.gain != 0:
                    apply_dropout(p, g, p.shape[1], columns, score)


@numba.njit(error_model="numpy")
def multiply_packed(tile, slot, work, block, packed):  # type: ignore[no-untyped-def]
    """Add P·V to acc, V of packed tile number `slot`.

    Where it is not all finite, rows take the values as they came and multiply only what they see. A sum is made of the
    same operations either way; with pairs, where it can't be, all rows go the same way. The last panel asks for the
    keys of the next tile.
    """
    k, v = block.k, block.v
    p = work.p
    acc = work.acc
    groups = work.groups
    side = lanes(work.acc)
    values = packed.values
    rows = tile.rows
    columns = acc.shape[1]
    finite = packed.finite[slot]
    item = packed.values.itemsize
    step = work.s.size * work.s.itemsize // (p.size * p.itemsize)          # 1, or 2 where p holds pairs
    depth = packed.tile // step
    if packed.private:
        ahead = address(k.array) + place_of(k, tile.start + tile.n, tile.head) * k.array.itemsize
    else:
        ahead = address(packed.keys) + (slot + 1) * packed.tile * k.shape[2] * packed.keys.itemsize

    place = slot * (len(values) // len(packed.finite))
    for column, width in panels(columns, side):
        following = address(values) + (place + depth * width) * item if column + width < columns else ahead
        share = -(-width * ROWS // rows) * item
        for g in range(0, rows, ROWS):
            first, last = groups[g, 0], groups[g, 1]
            if first < last and (finite or (step == 1 and is_even(groups, g))):
                first //= step
                add_product(Strided(p, g * p.shape[1] + first, p.shape[1]), Contiguous(values, place + first * width),
                            Strided(acc, g * columns + column, columns), -(-last // step) - first,
                            Prefetch(following + g // ROWS * depth * share, share), Contiguous(work.shrink, g),
                            width // side)
        place += depth * width
    if not finite:
        for g in range(0, rows, ROWS):
            if groups[g, 0] < groups[g, 1] and not (step == 1 and is_even(groups, g)):
                for r in range(g, g + ROWS):
                    add_seen(r, tile, work, v)


@numba.njit(error_model="numpy")
def add_seen(r, tile, work, v):  # type: ignore[no-untyped-def]
    """Row r of acc = shrink·acc + P·V over the columns that it sees alone, one at a time: 0 × NaN is NaN."""
    row = work.acc[r]
    shrink = work.shrink[r]
    p = work.p
    a, b = max(work.low[r] - tile.start, 0), min(work.high[r] - tile.start, tile.n)
    for c in range(v.shape[2]):
        total = row.dtype.type(0)
        for j in range(a, b):
            value = widen(v.array[place_of(v, tile.start + j, tile.head) + c])
            total = multiply_add(weight(p, r, j), row.dtype.type(value), total)
        row[c] = multiply_add(row[c], shrink, total)


@numba.njit(error_model="numpy")
def fold_direct(tile, rows, work, block, score):  # type: ignore[no-untyped-def]
    """Fold a tile of keys and values, as they came, into few rows of several heads; see `few_rows`."""
    for g in range(0, tile.rows, ROWS):
        work.eager[g] = False
    score_direct(rows, tile, work, block.k)
    weigh_groups(tile, work, work.s, block.scale, score)
    multiply_direct(rows, tile, work, block.v)


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
        groups[g, 0] = first
        groups[g, 1] = last
        groups[g, 2] = inner_first
        groups[g, 3] = inner_last


@numba.njit
def is_even(groups, g):  # type: ignore[no-untyped-def]
    """Whether every row of a group sees all that any of them sees."""
    return groups[g, 0] == groups[g, 2] and groups[g, 1] == groups[g, 3]


@numba.njit(error_model="numpy")
def load_forward_rows(block, state, first, count, rows, head, group, work):  # type: ignore[no-untyped-def]
    """Take up rows first..first + count of a key head into the work space; the others up to `rows` do as the last.

    What a row has summed goes on where it stood, so that the sum does not depend on where calls begin and end.
    """
    dim_v = state.acc.shape[2]
    pack_queries(block.q, first, count, head, group, work.queries[:rows])
    for r in range(rows):
        query, member = divmod(first + min(r, count - 1), group)
        h = head * group + member
        work.low[r] = block.begin[0, query]
        work.high[r] = max(block.begin[0, query], block.end[0, query])
        work.row_max[r] = state.row_max[query, h]
        work.row_sum[r] = state.row_sum[query, h]
        row, sums = work.acc[r], state.acc[query, h]
        for c in range(dim_v):
            row[c] = sums[c]
        row[dim_v:] = 0


@numba.njit(error_model="numpy")
def store_forward_rows(block, state, first, count, head, group, work):  # type: ignore[no-untyped-def]
    """Put the work space back into the state; rows that saw nothing stay as they are."""
    for r in range(count):
        i, h = (first + r) // group, head * group + (first + r) % group
        if not sees_any(block, i):
            continue
        row, new = state.acc[i, h], work.acc[r]
        for c in range(len(row)):
            row[c] = new[c] + 0          # -0 becomes 0: what others of the group saw may have made 0 of it, or not
        state.row_sum[i, h] = work.row_sum[r]
        state.row_max[i, h] = work.row_max[r]


@numba.njit
def see_interval(block, number, first, count, rows, group, work):  # type: ignore[no-untyped-def]
    """Let rows first..first + count see what is in an interval; the others up to `rows` do as the last."""
    begin, end = block.begin[number], block.end[number]
    query, member = divmod(first, group)
    for r in range(rows):
        work.low[r] = begin[query]
        work.high[r] = max(begin[query], end[query])
        if r + 1 < count:
            member += 1
            if member == group:
                query, member = query + 1, 0


@numba.njit
def sees_any(block, query):  # type: ignore[no-untyped-def]
    """Whether a query sees anything."""
    seen = False
    for number in range(len(block.begin)):
        seen |= block.begin[number, query] < block.end[number, query]
    return seen


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
def work_from(work, row):  # type: ignore[no-untyped-def]
    """Give the work space from a row on."""
    return ForwardWork(work.queries[row:], work.s[row:], work.p[row:], work.acc[row:], work.row_max[row:],
                       work.row_sum[row:], work.shrink[row:], work.shift[row:], work.low[row:], work.high[row:],
                       work.groups[row:], work.sums[row * lanes(work.s):], work.eager[row:])
