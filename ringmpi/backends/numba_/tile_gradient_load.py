"""What the backward pass on tiles reads and writes: packed tiles of keys, rows of Q, dO and dQ; and which are odd.

A row or a key of float32 is *odd* where its largest number leaves the range in which three pieces are as exact as
float32, unless all are 0: of Q, K and V 2^-20 to 2^40, of dO 2^-40 to 2^40; and where a number, or lse or delta, is not
finite. The tile unit takes what is below 2^-126 for 0: so a number in pieces is off by 2^-125 at most, however small it
is, and each product, and each addition to a sum, by 2^-126. That is nothing beside the largest number of its row, and
so beside what the row's products are known to in float32, 2^-24 of the sizes of their factors:

    score:    (6 dim · 2^-126 + 2 dim · 2^-125 · 2^40) · 2^20, 2^-56 of dim 128, where a weight needs 2^-24
    P:        2^-125, of weights that sum to 1, the largest of which is 1 / n at least
    dP:       6 dim_v · 2^-126 + dim_v · 2^-125 (|dO| + |V|), of |dO| |V| of 2^-60 and more
    dS:       2^-125, of the largest, |dO| |V| scale / n
    dV, dK, dQ: 6 n · 2^-126 and n times the errors above times |dO|, |Q|, |K|

With dO, V, Q and K of 2^-20, a scale of 2^-4 and 2^13 keys dS is 2^-57 and dQ, dK are 2^-77, so that 2^-125 is 2^-48 of
them. In the corner of all ranges at once, and there alone, it is more than 2^-24. A weight far below the others of its
row loses no more than they do, and adds as little.

Odd rows and keys go another way, pair by pair (`tile_gradient_odd`), so no row and no key depends on which others stand
beside it.
"""

from __future__ import annotations

import numba
import numpy as np

from .amx import DEPTH, ROWS
from .pack import place_of, transpose_square, widen
from .pieces import ALL, FINITE
from .tile_gradient_rows import PLACE, query_column, query_lane
from .tile_gradients import size_of
from .tile_pack import interleave_rows, pack_interleaved, pack_rows, steps, transpose_words
from .tile_squares import SIDE
from .tuples import Contiguous, Strided

MOST_ROWS = 256
MOST_KEYS = 128
LOWEST, LOWEST_DOUT, HIGHEST = (int(np.float32(2.0**e).view(np.uint32)) for e in (-20, -40, 40))
LEAST_SCALE = 2.0**-20
MOST_DELTA = np.float32(2.0**100)


def gradient_tile_shape(dim: int, dim_v: int, pieces: int, cache: int) -> tuple[int, int]:
    """Rows and keys of a tile, for keys and values of so many numbers, of `pieces` pieces each, in whole squares.

    K (twice), V, dK and dV fill at most an eighth of a cache of `cache` bytes; Q and dO (both twice), dQ, P and dS
    (twice) what is left of three quarters.
    """
    item = 2 * pieces
    key = (2 * item + 4) * dim + (item + 4) * dim_v
    keys = max(SIDE, min(MOST_KEYS, cache // 8 // key // SIDE * SIDE))
    rows = (cache * 3 // 4 - keys * key) // ((2 * item + 4) * dim + 2 * item * dim_v + 3 * item * keys)
    return max(2 * SIDE, min(MOST_ROWS, rows // SIDE * SIDE)), keys


@numba.njit(error_model="numpy")
def pack_gradient_tile(k, v, start, n, head, slot, packed):  # type: ignore[no-untyped-def]
    """Pack keys start..start + n of a head: K and V as rows, and K turned, in tiles of keys; see `GradientTiles`."""
    depth, depth_v = steps(k.shape[2]), steps(v.shape[2])
    tile = size_of(packed)
    column = packed.tile // DEPTH * tile                    # elements from 16 numbers of K to the next
    size = packed.tile // ROWS * depth * tile
    pack_rows(k, start, n, head, 1, ALL, packed.keys, slot * size)
    pack_rows(v, start, n, head, 1, ALL, packed.values, slot * packed.tile // ROWS * depth_v * tile)
    turned = packed.k_turned[slot * size:(slot + 1) * size]
    pack_interleaved(k, start, n, head, FINITE, turned, 0, column)
    for c in range(2 * depth):
        for j in range(0, n, DEPTH):
            for piece in packed.pieces:
                place = c * column + j // DEPTH * tile + piece * ROWS * DEPTH
                transpose_words(Strided(turned, place, DEPTH), Contiguous(turned, place), ROWS, DEPTH, ALL)
    odd = packed.odd[slot * packed.tile:(slot + 1) * packed.tile]
    for j in range(packed.tile):
        odd[j] = j < n and len(packed.pieces) > 1 and (
            leaves(top_of(k, start + j, head), LOWEST) or leaves(top_of(v, start + j, head), LOWEST))


@numba.njit(error_model="numpy")
def top_of(x, i, head):  # type: ignore[no-untyped-def]
    """Give the bits of the largest number of a token, without its sign; NaN is larger than all."""
    place = place_of(x, i, head)
    top = np.uint32(0)
    for number in x.array[place:place + x.shape[2]]:
        top = max(top, np.float32(widen(number)).view(np.uint32) & np.uint32(0x7FFFFFFF))
    return top


@numba.njit
def leaves(top, lowest):  # type: ignore[no-untyped-def]
    """Say whether numbers whose largest has these bits are out of the range; zeros are not."""
    return top != 0 and not lowest <= top <= HIGHEST


@numba.njit(error_model="numpy")
def load_gradient_rows(block, gradient, first, count, rows, head, group, work, packed):  # type: ignore[no-untyped-def]
    """Take up rows first..first + count of a key head into the work space; the others up to `rows` see nothing."""
    load_factor(block.q, first, count, rows, head, group, work.lines, work.queries, work.query_pairs, packed)
    load_factor(gradient.dout, first, count, rows, head, group, work.lines, work.douts, work.dout_pairs, packed)
    for r in range(rows):
        lane = query_lane(r, packed.pieces)
        work.low[r] = work.high[r] = 0
        work.lse[lane] = work.delta[lane] = 0
        work.odd[r] = False
        if r < count:
            i, h = (first + r) // group, head * group + (first + r) % group
            lse, delta = gradient.lse[i, h], gradient.delta[i, h]
            work.low[r] = block.begin[0, i]
            work.high[r] = max(block.begin[0, i], block.end[0, i])
            if len(packed.pieces) > 1:
                work.odd[r] = is_odd_row(block, gradient, i, h, lse, delta)
            if not work.odd[r]:
                work.delta[lane] = delta
                # dO that is not finite makes delta so, and must reach dV: by the weights.
                work.lse[lane] = lse if delta - delta == 0 else np.nan
    take_up_queries(gradient, first, count, rows, head, group, work, packed)


@numba.njit(error_model="numpy")
def is_odd_row(block, gradient, i, h, lse, delta):  # type: ignore[no-untyped-def]
    """Say whether a query is odd. Without dO its delta, of lse alone, is as large as what dO and V give."""
    top = top_of(gradient.dout, i, h)
    size = abs(delta)
    return (leaves(top_of(block.q, i, h), LOWEST) or leaves(top, LOWEST_DOUT) or lse - lse != 0
            or not size <= MOST_DELTA or (top == 0 and 0 < size < np.float32(2.0**-60)))


@numba.njit(error_model="numpy")
def take_up_queries(gradient, first, count, rows, head, group, work, packed):  # type: ignore[no-untyped-def]
    """Take up dQ."""
    if not gradient.of_queries:
        return
    dim, columns = gradient.dq.shape[2], work.dq_lines.shape[1]
    for r in range(rows):
        row = work.dq_lines[query_column(r, packed.pieces)]
        row[:] = 0
        if r < count:
            i, h = (first + r) // group, head * group + (first + r) % group
            for c in range(dim):
                row[c] = gradient.dq[i, h, c]
    for r in range(0, rows, ROWS):
        for c in range(0, columns, ROWS):
            transpose_square(Strided(work.dq_lines, r * columns + c, columns),
                             Strided(work.dq, dq_place(work, r, c), ROWS))


@numba.njit(error_model="numpy")
def load_factor(x, first, count, rows, head, group, lines, across, pairs, packed):  # type: ignore[no-untyped-def]
    """Pack rows of Q or dO, by way of `lines`: `across` as keys are, `pairs` as values are, and cleaned."""
    numbers = x.shape[2]
    depth, tile = steps(numbers), size_of(packed)
    width = depth * DEPTH
    column = len(pairs) // (2 * depth)                       # elements from 16 numbers to the next
    for r in range(rows):
        line = lines[r * width:(r + 1) * width]
        n = 0
        if r < count:
            n = numbers
            source = place_of(x, (first + r) // group, head * group + (first + r) % group)
            for c in range(n):
                line[c] = x.array[source + c]
        for c in range(n, width):
            line[c] = 0
    for d in range(depth):
        for r in range(0, rows, SIDE):
            for half in range(2):
                # Side by side in the order that `query_lane` says.
                row, step = (r + half * ROWS, 1) if len(packed.pieces) == 1 else (r + half, 2)
                transpose_words(Strided(lines, row * width + d * DEPTH, step * width),
                                Contiguous(across, ((r // ROWS + half) * depth + d) * tile), ROWS, DEPTH, ALL)
            interleave_rows(Strided(lines, r * width + d * DEPTH, width),
                            Contiguous(pairs, 2 * d * column + r // DEPTH * tile), column, DEPTH, DEPTH, FINITE)


@numba.njit(error_model="numpy")
def store_gradient_rows(gradient, first, count, rows, head, group, work, packed):  # type: ignore[no-untyped-def]
    """Put the work space's dQ back into the gradient."""
    columns = work.dq_lines.shape[1]
    for r in range(0, rows if gradient.of_queries else 0, ROWS):
        for c in range(0, columns, ROWS):
            transpose_square(Strided(work.dq, dq_place(work, r, c), ROWS),
                             Strided(work.dq_lines, r * columns + c, columns))
    for r in range(count if gradient.of_queries else 0):
        target, source = gradient.dq[(first + r) // group, head * group + (first + r) % group], work.dq_lines[
            query_column(r, packed.pieces)]
        for c in range(len(target)):
            target[c] = source[c] + np.float32(0)           # 0 of one sign: what vanished may have left the other


@numba.njit
def dq_place(work, r, c):  # type: ignore[no-untyped-def]
    """Give the element of `work.dq` at which the tile of columns r and numbers c of dQᵀ begins."""
    return (c // ROWS * (len(work.lse) // ROWS) + r // ROWS) * PLACE
