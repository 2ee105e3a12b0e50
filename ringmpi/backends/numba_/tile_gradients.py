"""The backward pass of bfloat16 on the CPU's tiles: a packed tile of keys differentiated for a tile of rows.

    for each square of 32 keys × 32 rows:        Sᵀ = K·Qᵀ, dPᵀ = V·dOᵀ, Pᵀ and dSᵀ from them, rounded to bfloat16
    for each 32 rows, over the keys they see:    dQᵀ += Kᵀ·dSᵀ
    for each 32 keys, over the rows they see:    dV += Pᵀ·dO, dK += dSᵀ·Q

Sums are float32; those of dQ stay with the tile of rows, those of dK and dV are each task's own, as in `backward_tile`.
As there, K, Q and dO are cleaned for the last three products: what is not finite becomes 0. Rows, keys and numbers are
padded to whole squares; what is beyond the last one is not seen.
"""

from __future__ import annotations

import numba
import numpy as np

from .amx import DEPTH, ROWS, TILE
from .pack import place_of, transpose_square
from .tile_gradient_rows import (
    PLACE,
    differentiate_capped_square,
    differentiate_masked_square,
    differentiate_square,
)
from .tile_pack import ALL, FINITE, interleave_rows, pack_interleaved, pack_rows, steps, transpose_words
from .tile_squares import SIDE, add_square, square
from .tuples import Contiguous, Square, SquarePlace, Strided

MOST_ROWS = 256
MOST_KEYS = 128


def gradient_tile_shape(dim: int, dim_v: int, cache: int) -> tuple[int, int]:
    """Rows and keys of a tile, for keys and values of so many numbers, in whole squares.

    K (twice), V, dK and dV fill at most an eighth of a cache of `cache` bytes; Q and dO (both twice), dQ, P and dS
    (twice) what is left of three quarters.
    """
    key = (2 * 2 + 4) * dim + (2 + 4) * dim_v
    keys = max(SIDE, min(MOST_KEYS, cache // 8 // key // SIDE * SIDE))
    rows = (cache * 3 // 4 - keys * key) // ((2 * 2 + 4) * dim + 2 * 2 * dim_v + 3 * 2 * keys)
    return max(2 * SIDE, min(MOST_ROWS, rows // SIDE * SIDE)), keys


@numba.njit(error_model="numpy")
def pack_gradient_tile(k, v, start, n, head, slot, packed):  # type: ignore[no-untyped-def]
    """Pack keys start..start + n of a head: K and V as rows, and K turned, in tiles of keys; see `GradientTiles`."""
    depth, depth_v = steps(k.shape[2]), steps(v.shape[2])
    column = packed.tile * ROWS                             # elements from 16 numbers of K to the next
    size = packed.tile * depth * DEPTH
    pack_rows(k, start, n, head, 1, ALL, packed.keys, slot * size)
    pack_rows(v, start, n, head, 1, ALL, packed.values, slot * packed.tile * depth_v * DEPTH)
    turned = packed.k_turned[slot * size:(slot + 1) * size]
    pack_interleaved(k, start, n, head, FINITE, turned, 0, column)
    for c in range(2 * depth):
        for j in range(0, n, DEPTH):
            place = c * column + j // DEPTH * TILE
            transpose_words(Strided(turned, place, DEPTH), Contiguous(turned, place), ROWS, DEPTH, ALL)


@numba.njit(error_model="numpy")
def load_gradient_rows(block, gradient, first, count, rows, head, group, work):  # type: ignore[no-untyped-def]
    """Take up rows first..first + count of a key head into the work space; the others up to `rows` see nothing."""
    load_factor(block.q, first, count, rows, head, group, work.lines, work.queries, work.query_pairs)
    load_factor(gradient.dout, first, count, rows, head, group, work.lines, work.douts, work.dout_pairs)
    dim = gradient.dq.shape[2]
    for r in range(rows):
        work.low[r] = work.high[r] = 0
        work.lse[r] = work.delta[r] = 0
        row = work.dq_lines[query_column(r)]
        row[:] = 0
        if r < count:
            i, h = (first + r) // group, head * group + (first + r) % group
            delta = gradient.delta[i, h]
            if gradient.of_queries:
                for c in range(dim):
                    row[c] = gradient.dq[i, h, c]
            work.low[r] = block.begin[i]
            work.high[r] = max(block.begin[i], block.end[i])
            work.delta[r] = delta
            # dO that is not finite makes delta so, and must reach dV: by the weights.
            work.lse[r] = gradient.lse[i, h] if delta - delta == 0 else np.nan
    if gradient.of_queries:
        columns = work.dq_lines.shape[1]
        for r in range(0, rows, ROWS):
            for c in range(0, columns, ROWS):
                transpose_square(Strided(work.dq_lines, r * columns + c, columns),
                                 Strided(work.dq, dq_place(work, r, c), ROWS))


@numba.njit(error_model="numpy")
def load_factor(x, first, count, rows, head, group, lines, across, pairs):  # type: ignore[no-untyped-def]
    """Pack rows of Q or dO, by way of `lines`: `across` as keys are, `pairs` as values are, and cleaned."""
    numbers = x.shape[2]
    depth = steps(numbers)
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
        for r in range(0, rows, ROWS):
            transpose_words(Strided(lines, r * width + d * DEPTH, width),
                            Contiguous(across, (r // ROWS * depth + d) * TILE), ROWS, DEPTH, ALL)
        for r in range(0, rows, DEPTH):
            interleave_rows(Strided(lines, r * width + d * DEPTH, width),
                            Contiguous(pairs, 2 * d * column + r // DEPTH * TILE), column, DEPTH, DEPTH, FINITE)


@numba.njit(error_model="numpy")
def store_gradient_rows(gradient, first, count, rows, head, group, work):  # type: ignore[no-untyped-def]
    """Put the work space's dQ back into the gradient."""
    columns = work.dq_lines.shape[1]
    for r in range(0, rows if gradient.of_queries else 0, ROWS):
        for c in range(0, columns, ROWS):
            transpose_square(Strided(work.dq, dq_place(work, r, c), ROWS),
                             Strided(work.dq_lines, r * columns + c, columns))
    for r in range(count if gradient.of_queries else 0):
        target, source = gradient.dq[(first + r) // group, head * group + (first + r) % group], work.dq_lines[
            query_column(r)]
        for c in range(len(target)):
            target[c] = source[c] + np.float32(0)           # 0 of one sign: what vanished may have left the other


@numba.njit
def query_column(r):  # type: ignore[no-untyped-def]
    """Give the column of dQᵀ that row r is: the pass over squares leaves them in the order of its shuffles."""
    return r // SIDE * SIDE + r // 4 % 2 * ROWS + r // 8 % 4 * 4 + r % 4


@numba.njit
def dq_place(work, r, c):  # type: ignore[no-untyped-def]
    """Give the element of `work.dq` at which the tile of columns r and numbers c of dQᵀ begins."""
    return (c // ROWS * (len(work.lse) // ROWS) + r // ROWS) * PLACE


@numba.njit(error_model="numpy")
def differentiate_packed(tile, slot, work, packed, sums, sums_at, gradient, score):  # type: ignore[no-untyped-def]
    """Add what packed tile number `slot` gives to dQ and to the task's sums, whose rows from `sums_at` on are its keys.

    `score` is a `TileScore`; `find_seen` has said what is seen.
    """
    height, keys = len(work.lse), packed.tile
    depth, depth_v = len(work.queries) // (height * DEPTH), len(work.douts) // (height * DEPTH)
    keys_at = slot * keys * depth * DEPTH
    values_at = slot * keys * depth_v * DEPTH
    for b in range(tile.rows // SIDE):
        first, last, inner_first, inner_last = work.seen[b]
        for k in range(first // SIDE, -(-last // SIDE)):
            square(Strided(packed.keys, keys_at + 2 * k * depth * TILE, depth * TILE),
                   Strided(work.queries, 2 * b * depth * TILE, depth * TILE), Square(work.s, 0, ROWS, 2 * PLACE, PLACE),
                   depth)
            square(Strided(packed.values, values_at + 2 * k * depth_v * TILE, depth_v * TILE),
                   Strided(work.douts, 2 * b * depth_v * TILE, depth_v * TILE),
                   Square(work.s, 4 * PLACE, ROWS, 2 * PLACE, PLACE), depth_v)
            place = SquarePlace(b * SIDE, k * SIDE, (2 * k * (height // SIDE) + b) * TILE, height // SIDE * TILE,
                                (2 * b * (keys // SIDE) + k) * TILE, keys // SIDE * TILE)
            if score.cap != 0:
                differentiate_capped_square(work, place, score, gradient.scale)
            elif inner_first <= k * SIDE and (k + 1) * SIDE <= inner_last:
                differentiate_square(work, place, score, gradient.scale)
            else:
                differentiate_masked_square(work, place, score, gradient.scale)
    if gradient.of_queries:
        add_to_queries(tile.rows, work, packed, keys_at)
    if gradient.of_keys:
        add_to_keys(tile.rows, work, sums, sums_at)


@numba.njit(error_model="numpy")
def find_seen(rows, start, n, work):  # type: ignore[no-untyped-def]
    """Say what rows see of columns start..start + n, as numbers from 0; say whether any sees something.

    low_here and high_here are of each row. seen[b] = first, last, inner_first, inner_last: of 32 rows some see
    something of first..last only, and every one sees all of inner_first..inner_last.
    """
    some = False
    for b in range(rows // SIDE):
        first, last, inner_first, inner_last = n, 0, 0, n
        for r in range(b * SIDE, (b + 1) * SIDE):
            low, high = min(max(work.low[r] - start, 0), n), min(max(work.high[r] - start, 0), n)
            work.low_here[r], work.high_here[r] = low, high
            if low < high:
                first, last = min(first, low), max(last, high)
            inner_first, inner_last = max(inner_first, low), min(inner_last, high)
        work.seen[b, 0], work.seen[b, 1] = min(first, last), last
        work.seen[b, 2], work.seen[b, 3] = inner_first, inner_last
        some |= last > 0
    return some


@numba.njit(error_model="numpy")
def add_to_queries(rows, work, packed, keys_at):  # type: ignore[no-untyped-def]
    """Add Kᵀ·dSᵀ to dQᵀ, for each 32 rows over the keys that they see."""
    height = len(work.lse)
    column = packed.tile // SIDE * TILE                     # elements from 16 numbers, or rows, to the next
    right = height // ROWS * PLACE
    for b in range(rows // SIDE):
        first, last = work.seen[b, 0] // SIDE, -(-work.seen[b, 1] // SIDE)
        for c in range(0, work.dq_lines.shape[1] // ROWS if first < last else 0, 2):
            add_square(Strided(packed.k_turned, keys_at + c * column + first * TILE, column),
                       Strided(work.ds_pairs, 2 * b * column + first * TILE, column),
                       Square(work.dq, c * right + 2 * b * PLACE, ROWS, right, PLACE), last - first)


@numba.njit(error_model="numpy")
def add_to_keys(rows, work, sums, sums_at):  # type: ignore[no-untyped-def]
    """Add Pᵀ·dO and dSᵀ·Q to the sums, for each 32 keys over the rows from the first to the last that see them."""
    column = len(work.lse) // SIDE * TILE                   # elements from 16 numbers, or keys, to the next
    low = high = 0
    for b in range(rows // SIDE):
        if work.seen[b, 0] < work.seen[b, 1]:
            low = min(low, work.seen[b, 0]) if high else work.seen[b, 0]
            high = max(high, work.seen[b, 1])
    for k in range(low // SIDE, -(-high // SIDE)):
        first, last = rows, 0
        for b in range(rows // SIDE):
            if sees(work, b, k):
                first, last = min(first, b), b + 1
        for b in range(first, last):
            if not sees(work, b, k):
                for half in (2 * k, 2 * k + 1):
                    work.p[half * column + b * TILE:half * column + (b + 1) * TILE] = 0
                    work.ds[half * column + b * TILE:half * column + (b + 1) * TILE] = 0
        if first < last:
            add_turned(work.p, work.dout_pairs, sums.dv, sums_at + k * SIDE, k, column, first, last)
            add_turned(work.ds, work.query_pairs, sums.dk, sums_at + k * SIDE, k, column, first, last)


@numba.njit
def sees(work, b, k):  # type: ignore[no-untyped-def]
    """Say whether the square of 32 rows b and 32 keys k was made."""
    return work.seen[b, 0] // SIDE <= k < -(-work.seen[b, 1] // SIDE)


@numba.njit(error_model="numpy")
def add_turned(a, b, sums, row, k, column, first, last):  # type: ignore[no-untyped-def]
    """Add A·B over rows 32·first..32·last to 32 rows of `sums` from `row` on; A is P or dS, B is dO or Q in pairs."""
    width = sums.shape[1]
    for c in range(0, width // ROWS, 2):
        add_square(Strided(a, 2 * k * column + first * TILE, column),
                   Strided(b, c * column + first * TILE, column),
                   Square(sums, row * width + c * ROWS, width, ROWS * width, ROWS), last - first)
