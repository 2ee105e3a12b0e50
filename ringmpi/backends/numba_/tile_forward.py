"""The forward pass of float32 in pieces on the tile unit: units of 32 rows × 192 keys, three of them at work at a time.

    unit t:        S = Q·K           tile unit
    unit t - 1:    P and its sums    vector units, in steps between the products of the others
    unit t - 2:    acc += P·V        tile unit

The product of a unit is summed by itself before it is added to acc, so that long sums keep their digits. What no row
of a block sees of a tile is left out, in strips of 32 keys; what not every row of it sees is hidden in S. For bfloat16
see `tile_strips`; packing, rows and odd numbers are here for both.

Odd numbers are zeros in the packed tiles; what they give is added one by one, where a row sees them. So they reach
nothing else, and what a row becomes does not depend on where its block or its keys were cut. Odd are values that are
not finite; for float32, which goes in three pieces, see `pieces`. Numbers below the smallest normal one, 2^-126, count
as 0, products and sums too: so the tile unit does.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from .amx import BYTES, DEPTH, ROWS, TILE, TILE_BYTES, dot_tile, load_passing_tile, load_tile, store_tile, zero_tile
from .forward_tile import address
from .pack import place_of, widen
from .pieces import FINITE, LIFT, MOST_FACTOR, MOST_VALUE, is_odd, span_of, tile_size
from .tile_pack import pack_interleaved, pack_rows, pack_transposed, steps
from .tile_rows import (
    BLOCK,
    KEYS,
    PAIR,
    SQUARE,
    STRIPS,
    add_part,
    add_single_at,
    add_sums,
    any_shrinks,
    cap_scores,
    find_tops,
    hide,
    integer_at,
    raise_block,
    row_from_tiles,
    row_to_tiles,
    scale_row,
    single_at,
    weigh_few,
)
from .tuples import Factors, Sizes, Span, TilePlaces, Unit
from .vector import at

SMALL = np.float32(2.0**-100)
S_SIZE = BLOCK * KEYS                       # numbers of a unit
P_SIZE = BLOCK * KEYS


@intrinsic
def zero_four(context):  # type: ignore[no-untyped-def]
    """Fill the four tiles of sums, 2 × 2, with zeros."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        for tile in range(4):
            zero_tile(builder, tile)
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def load_four(context, address, below):  # type: ignore[no-untyped-def]
    """Load the four tiles of sums: two that follow each other from an address on, two `below` bytes later."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        for tile, place in enumerate(_four(builder, values)):
            load_tile(builder, tile, place)
        return context.get_dummy_value()

    return types.void(address, below), emit


@intrinsic
def store_four(context, address, below):  # type: ignore[no-untyped-def]
    """Store the four tiles of sums; see `load_four`."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        for tile, place in enumerate(_four(builder, values)):
            store_tile(builder, tile, place)
        return context.get_dummy_value()

    return types.void(address, below), emit


@intrinsic
def load_two(context, a, a_below):  # type: ignore[no-untyped-def]
    """Load two tiles of A, `a_below` bytes apart, for `add_four`."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        first = builder.inttoptr(values[0], BYTES)
        load_tile(builder, 4, first)
        load_tile(builder, 5, at(builder, first, values[1]))
        return context.get_dummy_value()

    return types.void(a, a_below), emit


@intrinsic
def add_four(context, b, b_beside):  # type: ignore[no-untyped-def]
    """Add the four products of the two tiles of A and two of B, `b_beside` bytes apart, to the four tiles of sums."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        first = builder.inttoptr(values[0], BYTES)
        load_tile(builder, 6, first)
        load_tile(builder, 7, at(builder, first, values[1]))
        for total, x, y in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
            dot_tile(builder, total, x, y)
        return context.get_dummy_value()

    return types.void(b, b_beside), emit


@intrinsic
def add_passing(context, b, b_beside):  # type: ignore[no-untyped-def]
    """Do what `add_four` does, with tiles of B that are not needed again soon."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        first = builder.inttoptr(values[0], BYTES)
        load_passing_tile(builder, 6, first)
        load_passing_tile(builder, 7, at(builder, first, values[1]))
        for total, x, y in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
            dot_tile(builder, total, x, y)
        return context.get_dummy_value()

    return types.void(b, b_beside), emit


def _four(builder: Any, values: Any) -> list[Any]:
    start, below = values
    first = builder.inttoptr(start, BYTES)
    second = at(builder, first, below)
    return [first, at(builder, first, TILE_BYTES), second, at(builder, second, TILE_BYTES)]


@numba.njit(error_model="numpy")
def pack_unit(k, v, start, n, head, slot, packed, sizes):  # type: ignore[no-untyped-def]
    """Pack keys and values start..start+n of a head as tile number `slot`; `finite` says if none of them is odd."""
    slots = len(packed.finite)
    even = pack_transposed(k, start, n, head, span_of(k.array), packed.keys, slot * (len(packed.keys) // slots))
    values = Span(FINITE.low, FINITE.high, sizes.factor)
    even &= pack_interleaved(v, start, n, head, values, packed.values, slot * (len(packed.values) // slots),
                             STRIPS * tile_size(v.array))
    packed.finite[slot] = even


@numba.njit
def places_of(work, packed, pieces):  # type: ignore[no-untyped-def]
    """Give the addresses of what a thread works on; for `pieces` see `TilePlaces`."""
    return TilePlaces(address(work.queries), address(work.s), address(work.p), address(work.acc), address(work.part),
                      address(work.tops), address(work.sums), address(work.row_max), address(work.row_sum),
                      address(work.shrink), address(work.shift), address(work.low), address(work.high),
                      address(packed.keys), address(packed.values), pieces)


@numba.njit
def factors_of(block, rows, group):  # type: ignore[no-untyped-def]
    """Say where the numbers of Q and K of a range of rows of a head are."""
    q, k = block.q, block.k
    return Factors(address(q.array) + rows.head * group * q.head * 4, q.token, q.head,
                   address(k.array) + rows.head * k.head * 4, k.token, k.shape[2], rows.first, group)


@numba.njit(error_model="numpy")
def unit_of(places, block, start, n, slot, odd):  # type: ignore[no-untyped-def]
    """Say what a block of rows sees of n columns from `start` on, packed as tile `slot`, as a `Unit`."""
    first, last, inner_first, inner_last = n, 0, 0, n
    fresh = False
    for r in range(block * BLOCK, (block + 1) * BLOCK):
        a, b = max(integer_at(places.low, r) - start, 0), min(integer_at(places.high, r) - start, n)
        if a < b:
            first, last = min(first, a), max(last, b)
            fresh |= single_at(places.row_max, r) == -np.inf
        inner_first, inner_last = max(inner_first, a), min(inner_last, b)
    if first >= last:
        return Unit(block, start, slot, 0, 0, False, False, False)
    first_strip, last_strip = first // DEPTH, -(-last // DEPTH)
    partial = inner_first > first_strip * DEPTH or inner_last < last_strip * DEPTH
    return Unit(block, start, slot, first_strip, last_strip, partial, odd, fresh)


@numba.njit(error_model="numpy")
def advance(new, scored, weighed, number, places, factors, depth, width, scale, capping):  # type: ignore[no-untyped-def]
    """Do one step of the pipeline: scores of unit `new`, weights of `scored`, the product with values of `weighed`.

    `number` is that of the step; `depth` and `width` are tiles of a key's numbers, and pairs of tiles of a value's. A
    unit without strips is none.
    """
    mine, other = number % 2, (number + 1) % 2
    if weighed.first < weighed.last and any_shrinks(places, mine * BLOCK):
        shrink_block(weighed, mine, places, 2 * width)
    pieces = len(places.pieces)
    size = pieces * TILE_BYTES
    most = BLOCK // PAIR * (scored.last - scored.first)
    slots = ((new.last - new.first) * depth + (weighed.last - weighed.first) * width) * (pieces * (pieces + 1) // 2)
    credit = done = 0

    deep = depth * size                                         # of the numbers of 16 rows or keys
    queries = places.queries + 2 * new.block * deep
    keys = places.keys + new.slot * (KEYS // ROWS) * deep
    scores = places.s + mine * S_SIZE * 4
    for j in range(new.first, new.last):
        zero_four()
        for d in range(depth):
            for piece in range(pieces):
                load_two(queries + d * size + piece * TILE_BYTES, deep)
                for other_piece in range(pieces - piece):
                    add_four(keys + 2 * j * deep + d * size + other_piece * TILE_BYTES, deep)
                    credit += most
                    while credit >= slots:
                        soften(done, scored, other, places, scale)
                        done += 1
                        credit -= slots
        store_four(scores + 2 * j * TILE_BYTES, KEYS // ROWS * TILE_BYTES)
        if j > new.first:
            end_strip(j - 1, new, mine, places, factors, capping)
    if new.first < new.last:
        end_strip(new.last - 1, new, mine, places, factors, capping)
        raise_block(places, new.block * BLOCK, mine * BLOCK, scale)

    wide = STRIPS * size                                        # of the keys of 16 columns or rows
    weights = places.p + mine * P_SIZE * 2 * pieces
    values = places.values + weighed.slot * 2 * width * wide
    for c in range(width if weighed.first < weighed.last else 0):
        zero_four()
        for j in range(weighed.first, weighed.last):
            for piece in range(pieces):
                load_two(weights + j * size + piece * TILE_BYTES, wide)
                for other_piece in range(pieces - piece):
                    add_four(values + 2 * c * wide + j * size + other_piece * TILE_BYTES, wide)
                    credit += most
                    while credit >= slots:
                        soften(done, scored, other, places, scale)
                        done += 1
                        credit -= slots
        store_four(places.part + c % 2 * 4 * TILE_BYTES, 2 * TILE_BYTES)
        if c > 0:
            add_part(places, c - 1, 4 * weighed.block * width, 2 * width)
    if weighed.first < weighed.last:
        add_part(places, width - 1, 4 * weighed.block * width, 2 * width)

    if most:
        if slots == 0:
            soften_all(most, scored, other, places, scale)
        add_sums(places, scored.block * BLOCK, other * BLOCK)


@numba.njit(error_model="numpy", forceinline=True)
def soften(number, unit, half, places, scale):  # type: ignore[no-untyped-def]
    """Do step `number` of a unit's softmax."""
    weigh_few(places, half * S_SIZE, half * P_SIZE * len(places.pieces), half * BLOCK, number * PAIR % BLOCK,
              unit.first + number * PAIR // BLOCK, scale)


@numba.njit(error_model="numpy")
def soften_all(count, unit, half, places, scale):  # type: ignore[no-untyped-def]
    """Do the softmax of a unit alone."""
    for number in range(count):
        soften(number, unit, half, places, scale)


@numba.njit(error_model="numpy", forceinline=True)
def end_strip(strip, unit, half, places, factors, capping):  # type: ignore[no-untyped-def]
    """Do what the scores of a strip need before their weights are made."""
    if unit.odd:
        add_odd_scores(strip, unit, half, places, factors)
    if capping[1] != 0:
        cap_strip(strip, half, places, capping)
    if unit.partial:
        hide_strip(strip, unit, half, places)
    find_tops(places, half * S_SIZE, 2 * strip, strip == unit.first)


@numba.njit(error_model="numpy")
def add_odd_scores(strip, unit, half, places, factors):  # type: ignore[no-untyped-def]
    """Add to scores, where a row sees the key, the products of float32 of which one is not in the tiles."""
    for r in range(BLOCK):
        row = unit.block * BLOCK + r
        low, high = integer_at(places.low, row) - unit.start, integer_at(places.high, row) - unit.start
        query, member = (factors.first + row) // factors.group, (factors.first + row) % factors.group
        q_at = query * factors.q_token + member * factors.q_head
        for j in range(max(low, strip * DEPTH), min(high, (strip + 1) * DEPTH)):
            k_at = (unit.start + j) * factors.k_token
            total = np.float32(0)
            for d in range(factors.dim):
                x, y = single_at(factors.q, q_at + d), single_at(factors.k, k_at + d)
                if not (abs(x) < MOST_FACTOR and abs(y) < MOST_FACTOR):
                    total += x * y
            tile = r // ROWS * (KEYS // ROWS) + j // ROWS
            add_single_at(places.s, half * S_SIZE + tile * SQUARE + r % ROWS * ROWS + j % ROWS, total)


@numba.njit(error_model="numpy")
def cap_strip(strip, half, places, capping):  # type: ignore[no-untyped-def]
    """Cap scores."""
    ratio, cap = capping
    for top in (0, KEYS // ROWS):
        for tile in range(2 * strip, 2 * strip + 2):
            cap_scores(places, half * S_SIZE + (top + tile) * SQUARE, ratio, cap)


@numba.njit(error_model="numpy")
def hide_strip(strip, unit, half, places):  # type: ignore[no-untyped-def]
    """Make -inf of the scores that a row does not see."""
    for r in range(BLOCK):
        row = unit.block * BLOCK + r
        low, high = integer_at(places.low, row) - unit.start, integer_at(places.high, row) - unit.start
        for tile in range(2 * strip, 2 * strip + 2):
            if low > tile * ROWS or high < (tile + 1) * ROWS:
                hide(places, half * S_SIZE, r, tile, low, high)


@numba.njit(error_model="numpy")
def shrink_block(unit, half, places, tiles):  # type: ignore[no-untyped-def]
    """Rescale the rows of acc whose maximum has risen."""
    for r in range(BLOCK):
        factor = single_at(places.shrink, half * BLOCK + r)
        if factor != 1:
            scale_row(places, (2 * unit.block + r // ROWS) * tiles * SQUARE + r % ROWS * ROWS, factor, tiles)


@numba.njit(error_model="numpy")
def add_odd(unit, half, head, work, v):  # type: ignore[no-untyped-def]
    """Add weights times the values of `head` that are not in the packed tile, where a row sees them."""
    tiles, size = 2 * steps(v.shape[2]), tile_size(v.array)
    p = work.p[half * P_SIZE * (size // TILE):]
    for j in range(unit.first * DEPTH, min(unit.last * DEPTH, v.shape[0] - unit.start)):
        key = unit.start + j
        place = place_of(v, key, head)
        for c in range(v.shape[2]):
            x = v.array[place + c]
            if not is_odd(x):
                continue
            for r in range(BLOCK):
                row = unit.block * BLOCK + r
                if work.low[row] <= key < work.high[row]:
                    weight = np.float32(0)
                    for at in range((r // ROWS * STRIPS + j // DEPTH) * size + r % ROWS * DEPTH + j % DEPTH,
                                    (r // ROWS * STRIPS + j // DEPTH + 1) * size, TILE):
                        weight += widen(p[at])
                    acc_at = ((2 * unit.block + r // ROWS) * tiles + c // ROWS) * SQUARE + r % ROWS * ROWS + c % ROWS
                    work.acc[acc_at] += weight * widen(x)


@numba.njit(error_model="numpy")
def sizes_of(v, first, last, acc):  # type: ignore[no-untyped-def]
    """Say how large the values of columns first..last and the sums of a state are, of float32."""
    large = small = False
    for j in range(first, last):
        for h in range(v.shape[1]):
            place = place_of(v, j, h)
            for x in v.array[place:place + v.shape[2]]:
                size = abs(x)
                large |= MOST_VALUE <= size < np.inf
                small |= 0 < size < SMALL
    for rows in acc:
        for row in rows:
            for x in row:
                size = abs(x)
                large |= MOST_VALUE * 2**20 <= size < np.inf
                small |= 0 < size < SMALL
    return Sizes(np.float32(1) if large else LIFT, small and not large)


@numba.njit(error_model="numpy")
def round_sums(block, work, tiles):  # type: ignore[no-untyped-def]
    """Make multiples of 2^-149 of the sums of a block of rows that stand for less than 2^-126, as a state has them."""
    whole = np.float32(1.5 * 2.0**-94)                   # 2^-149 and 2^-126, lifted: the last digit of this is theirs
    for i in range(2 * block * tiles * SQUARE, 2 * (block + 1) * tiles * SQUARE):
        x = work.acc[i]
        if abs(x) < np.float32(2.0**-94):
            work.acc[i] = (x + whole) - whole


@numba.njit
def row_address(acc, query, head):  # type: ignore[no-untyped-def]
    """Address of a row's first number, the others after it."""
    return address(acc) + query * acc.strides[0] + head * acc.strides[1]


@numba.njit(error_model="numpy")
def load_tile_rows(block, state, rows, group, work, sizes):  # type: ignore[no-untyped-def]
    """Take up rows of a key head into the work space; those after the last see nothing."""
    tiles = 2 * steps(block.v.shape[2])
    height = -(-rows.n_rows // BLOCK) * BLOCK
    size = 2 * steps(block.k.shape[2]) * tile_size(block.q.array)
    span = span_of(block.q.array)
    for first in range(0, rows.n_rows, BLOCK):
        place = first // BLOCK * size
        if rows.n_rows - first < BLOCK:
            work.queries[place:place + size] = 0
        work.uneven[first // BLOCK] = not pack_rows(block.q, rows.first + first, min(BLOCK, rows.n_rows - first),
                                                    rows.head, group, span, work.queries, place)
    if rows.n_rows < height or state.acc.shape[2] < tiles * ROWS:
        work.acc[:height * tiles * ROWS] = 0
    work.sums[:] = 0
    for r in range(height):
        if r >= rows.n_rows:
            work.low[r] = work.high[r] = 0
            work.row_max[r] = -np.inf
            work.row_sum[r] = work.shift[r] = 0
            continue
        query, member = divmod(rows.first + r, group)
        h = rows.head * group + member
        work.low[r] = block.begin[0, query]
        work.high[r] = max(block.begin[0, query], block.end[0, query])
        work.row_max[r] = state.row_max[query, h]
        work.row_sum[r] = state.row_sum[query, h]
        work.shift[r] = -work.row_max[r] if work.row_max[r] != -np.inf else 0
        place = r // ROWS * tiles * SQUARE + r % ROWS * ROWS
        row_to_tiles(row_address(state.acc, query, h), address(work.acc) + 4 * place, state.acc.shape[2], sizes.factor)


@numba.njit(error_model="numpy")
def store_tile_rows(state, rows, group, work, sizes):  # type: ignore[no-untyped-def]
    """Put the work space back into the state; rows that saw nothing stay as they are."""
    tiles = 2 * steps(state.acc.shape[2])
    for r in range(rows.n_rows):
        if work.low[r] >= work.high[r]:
            continue
        query, member = divmod(rows.first + r, group)
        h = rows.head * group + member
        place = r // ROWS * tiles * SQUARE + r % ROWS * ROWS
        row_from_tiles(address(work.acc) + 4 * place, row_address(state.acc, query, h), state.acc.shape[2],
                       sizes.factor)
        state.row_sum[query, h] = work.row_sum[r]
        state.row_max[query, h] = work.row_max[r]
