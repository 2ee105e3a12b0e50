"""The backward pass on the CPU's tiles: a packed tile of keys differentiated for a tile of rows.

    for each square of 32 keys × 32 rows:        Sᵀ = K·Qᵀ, dPᵀ = V·dOᵀ; meanwhile Pᵀ and dSᵀ of the square before
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
from .forward_tile import address
from .tile_forward import add_four, load_two, store_four, zero_four
from .tile_gradient_rows import (
    PLACE,
    differentiate_capped_keys,
    differentiate_keys,
    differentiate_masked_keys,
    query_lane,
)
from .tile_squares import SIDE, add_square, ask
from .tuples import Square, SquarePlace, Strided

LINE = 64                   # bytes of a cache line


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
    blocks = tile.rows // SIDE
    slots = (depth + depth_v) * (len(pieces) * (len(pieces) + 1) // 2)
    following = after(slot + 1, sums_at + keys, blocks * keys // 2, packed, sums)
    waiting, steps, asked = SquarePlace(0, 0, 0, 0, 0, 0, 0, False), 0, 0

    # The products of a square, and P and dS of the one before between them; then those of the last alone.
    for b in range(blocks):
        first, last, inner_first, inner_last = work.seen[b]
        for k in range(first // SIDE, -(-last // SIDE)):
            inner = inner_first <= k * SIDE and (k + 1) * SIDE <= inner_last
            place = SquarePlace(b * SIDE, k * SIDE, (2 * k * (height // SIDE) + b) * size, height // SIDE * size,
                                (2 * b * (keys // SIDE) + k) * size, keys // SIDE * size, 8 * PLACE - waiting.s, inner)
            credit = done = 0
            for product in range(2):
                deep = depth_v if product else depth
                below = 2 * deep * size
                a = address(packed.values if product else packed.keys) + (slot * keys // ROWS + 2 * k) * below
                x = address(work.douts if product else work.queries) + 2 * b * below
                zero_four()
                for d in range(deep):
                    for piece in range(len(pieces)):
                        load_two(a + 2 * (d * size + piece * TILE), below)
                        for other in range(len(pieces) - piece):
                            add_four(x + 2 * (d * size + other * TILE), below)
                            credit += steps
                            while credit >= slots:
                                differentiate_pair(work, waiting, score, gradient.scale, pieces, done)
                                ask_for(following, asked)
                                asked += 1
                                done += 1
                                credit -= slots
                store_four(address(work.s) + 4 * (place.s + 4 * product * PLACE), 8 * PLACE)
            waiting, steps = place, SIDE // 2
    for pair in range(steps):
        differentiate_pair(work, waiting, score, gradient.scale, pieces, pair)
    if gradient.of_queries:
        add_to_queries(tile.rows, work, packed, keys_at)
    if gradient.of_keys:
        add_to_keys(tile.rows, work, packed, sums, sums_at)


@numba.njit(error_model="numpy")
def after(slot, sums_at, steps, packed, sums):  # type: ignore[no-untyped-def]
    """Give address and bytes of each part of a packed tile and of the sums of its keys, and what goes in a step."""
    slots = len(packed.odd) // packed.tile
    key, value = 2 * len(packed.keys) // slots, 2 * len(packed.values) // slots
    row, row_v = 4 * sums.dk.shape[1], 4 * sums.dv.shape[1]
    return (part_of(packed.keys, slot * key, key, steps), part_of(packed.k_turned, slot * key, key, steps),
            part_of(packed.values, slot * value, value, steps),
            part_of(sums.dk, sums_at * row, packed.tile * row, steps),
            part_of(sums.dv, sums_at * row_v, packed.tile * row_v, steps))


@numba.njit(error_model="numpy")
def part_of(array, at, size, steps):  # type: ignore[no-untyped-def]
    """Give the address and the bytes of a part of an array, and the bytes of one of so many steps, in whole lines."""
    return address(array) + at, size, -(-size // (LINE * steps)) * LINE


@numba.njit(error_model="numpy", forceinline=True)
def ask_for(parts, step):  # type: ignore[no-untyped-def]
    """Ask for what goes in a step of some parts: what is to be read soon comes from far in time."""
    for first, size, each in parts:
        for place in range(first + step * each, first + min((step + 1) * each, size), LINE):
            ask(place)


@numba.njit(error_model="numpy", forceinline=True)
def differentiate_pair(work, place, score, scale, pieces, pair):  # type: ignore[no-untyped-def]
    """Make P and dS of two keys of a square."""
    if score.cap != 0:
        differentiate_capped_keys(work, place, score, scale, pieces, pair)
    elif place.inner:
        differentiate_keys(work, place, score, scale, pieces, pair)
    else:
        differentiate_masked_keys(work, place, score, scale, pieces, pair)


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
