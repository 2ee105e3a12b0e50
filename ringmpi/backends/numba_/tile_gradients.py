"""The backward pass on the CPU's tiles: a packed tile of keys differentiated for a tile of rows.

    for each square of 32 keys × 32 rows:        Sᵀ = K·Qᵀ, dPᵀ = V·dOᵀ, Pᵀ and dSᵀ from them, as bfloat16
    for each 32 rows, over the keys they see:    dQᵀ += Kᵀ·dSᵀ
    for each 32 keys, over the rows they see:    dV += Pᵀ·dO, dK += dSᵀ·Q

Sums are float32; those of dQ stay with the tile of rows, those of dK and dV are each task's own, as in `backward_tile`.
Rows, keys and numbers are padded to whole squares; what is beyond the last one is not seen.

bfloat16 is multiplied as it is, P and dS are rounded to it; float32 is multiplied in three pieces, and so are its P and
dS (`pieces`). Of them all a tile has its pieces side by side. Rows and keys that are *odd* see nothing here, and are
not seen: see `tile_gradient_odd`.
"""

from __future__ import annotations

import numba

from .amx import ROWS, TILE
from .tile_gradient_rows import (
    PLACE,
    differentiate_capped_square,
    differentiate_masked_square,
    differentiate_square,
    query_lane,
)
from .tile_squares import SIDE, add_square, square
from .tuples import Square, SquarePlace, Strided


@numba.njit
def size_of(packed):  # type: ignore[no-untyped-def]
    """Give the bfloat16 of a tile of A or B with all its pieces."""
    return len(packed.pieces) * TILE


@numba.njit(error_model="numpy")
def differentiate_packed(tile, slot, work, packed, sums, sums_at, gradient, score):  # type: ignore[no-untyped-def]
    """Add what packed tile number `slot` gives to dQ and to the task's sums, whose rows from `sums_at` on are its keys.

    `score` is a `TileScore`; `find_seen` has said what is seen.
    """
    height, keys, size, pieces = len(work.lse), packed.tile, size_of(packed), packed.pieces
    depth, depth_v = len(work.queries) * ROWS // (height * size), len(work.douts) * ROWS // (height * size)
    keys_at = slot * keys // ROWS * depth * size
    values_at = slot * keys // ROWS * depth_v * size
    for b in range(tile.rows // SIDE):
        first, last, inner_first, inner_last = work.seen[b]
        for k in range(first // SIDE, -(-last // SIDE)):
            square(Strided(packed.keys, keys_at + 2 * k * depth * size, depth * size),
                   Strided(work.queries, 2 * b * depth * size, depth * size), Square(work.s, 0, ROWS, 2 * PLACE, PLACE),
                   depth, pieces)
            square(Strided(packed.values, values_at + 2 * k * depth_v * size, depth_v * size),
                   Strided(work.douts, 2 * b * depth_v * size, depth_v * size),
                   Square(work.s, 4 * PLACE, ROWS, 2 * PLACE, PLACE), depth_v, pieces)
            place = SquarePlace(b * SIDE, k * SIDE, (2 * k * (height // SIDE) + b) * size, height // SIDE * size,
                                (2 * b * (keys // SIDE) + k) * size, keys // SIDE * size)
            if score.cap != 0:
                differentiate_capped_square(work, place, score, gradient.scale, pieces)
            elif inner_first <= k * SIDE and (k + 1) * SIDE <= inner_last:
                differentiate_square(work, place, score, gradient.scale, pieces)
            else:
                differentiate_masked_square(work, place, score, gradient.scale, pieces)
    if gradient.of_queries:
        add_to_queries(tile.rows, work, packed, keys_at)
    if gradient.of_keys:
        add_to_keys(tile.rows, work, packed, sums, sums_at)


@numba.njit(error_model="numpy")
def find_seen(rows, start, n, slot, work, packed):  # type: ignore[no-untyped-def]
    """Say what rows see of columns start..start + n, packed tile number `slot`, as numbers from 0.

    low_here and high_here are of each row, key_here its number of each key, -1 if it is odd. seen[b] = first, last,
    inner_first, inner_last: of 32 rows some see something of first..last only, and every one sees all of
    inner_first..inner_last. Say whether there are pairs to make here, and whether there are pairs of what is odd.
    """
    some = odd_row = odd_key = False
    for j in range(n):
        odd = packed.odd[slot * packed.tile + j] != 0
        work.key_here[j] = -1 if odd else j
        odd_key |= odd
    work.key_here[n:] = -1
    for b in range(rows // SIDE):
        first, last, inner_first, inner_last = n, 0, 0, 0 if odd_key else n
        for r in range(b * SIDE, (b + 1) * SIDE):
            low, high = min(max(work.low[r] - start, 0), n), min(max(work.high[r] - start, 0), n)
            if work.odd[r]:
                odd_row |= low < high
                low = high = 0
            lane = query_lane(r, packed.pieces)
            work.low_here[lane], work.high_here[lane] = low, high
            if low < high:
                first, last = min(first, low), max(last, high)
            inner_first, inner_last = max(inner_first, low), min(inner_last, high)
        work.seen[b, 0], work.seen[b, 1] = min(first, last), last
        work.seen[b, 2], work.seen[b, 3] = inner_first, inner_last
        some |= last > 0
    return some, odd_row or (some and odd_key)


@numba.njit(error_model="numpy")
def add_to_queries(rows, work, packed, keys_at):  # type: ignore[no-untyped-def]
    """Add Kᵀ·dSᵀ to dQᵀ, for each 32 rows over the keys that they see."""
    height, size = len(work.lse), size_of(packed)
    column = packed.tile // SIDE * size                     # elements from 16 numbers, or rows, to the next
    right = height // ROWS * PLACE
    for b in range(rows // SIDE):
        first, last = work.seen[b, 0] // SIDE, -(-work.seen[b, 1] // SIDE)
        for c in range(0, work.dq_lines.shape[1] // ROWS if first < last else 0, 2):
            add_square(Strided(packed.k_turned, keys_at + c * column + first * size, column),
                       Strided(work.ds_pairs, 2 * b * column + first * size, column),
                       Square(work.dq, c * right + 2 * b * PLACE, ROWS, right, PLACE), last - first, packed.pieces)


@numba.njit(error_model="numpy")
def add_to_keys(rows, work, packed, sums, sums_at):  # type: ignore[no-untyped-def]
    """Add Pᵀ·dO and dSᵀ·Q to the sums, for each 32 keys over the rows from the first to the last that see them."""
    size = size_of(packed)
    column = len(work.lse) // SIDE * size                   # elements from 16 numbers, or keys, to the next
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
                    work.p[half * column + b * size:half * column + (b + 1) * size] = 0
                    work.ds[half * column + b * size:half * column + (b + 1) * size] = 0
        if first < last:
            add_turned(work.p, work.dout_pairs, sums.dv, sums_at + k * SIDE, k, column, first, last, packed)
            add_turned(work.ds, work.query_pairs, sums.dk, sums_at + k * SIDE, k, column, first, last, packed)


@numba.njit
def sees(work, b, k):  # type: ignore[no-untyped-def]
    """Say whether the square of 32 rows b and 32 keys k was made."""
    return work.seen[b, 0] // SIDE <= k < -(-work.seen[b, 1] // SIDE)


@numba.njit(error_model="numpy")
def add_turned(a, b, sums, row, k, column, first, last, packed):  # type: ignore[no-untyped-def]
    """Add A·B over rows 32·first..32·last to 32 rows of `sums` from `row` on; A is P or dS, B is dO or Q in pairs."""
    width, size = sums.shape[1], size_of(packed)
    for c in range(0, width // ROWS, 2):
        add_square(Strided(a, 2 * k * column + first * size, column),
                   Strided(b, c * column + first * size, column),
                   Square(sums, row * width + c * ROWS, width, ROWS * width, ROWS), last - first, packed.pieces)
