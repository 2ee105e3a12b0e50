"""The forward pass on the tile unit: units of 32 rows × 192 keys, three of them at work at a time.

    unit t:        S = Q·K           tile unit
    unit t - 1:    P and its sums    vector units, in steps between the products of the others
    unit t - 2:    acc += P·V        tile unit

Some packed tiles, which fit the second-level cache, meet a block of rows one after the other, whose acc and Q stay in
the first; then they meet the next block of the task. What no row of a block sees of a tile is left out, in strips of 32
keys; what not every row of it sees is hidden in S. A unit of scores is 24 KiB, of weights 12; there are two of each.

Values that are not finite are zeros in the packed tile; where a row sees them they are added one by one. So they reach
nothing else. Numbers below the smallest normal one, 2^-126, count as 0, products and sums too: so the tile unit does.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from .amx import BYTES, DEPTH, ROWS, TILE, TILE_BYTES, dot_tile, load_tile, store_tile, zero_tile
from .forward_tile import address
from .pack import place_of, widen
from .tile_pack import EXPONENT, pack_interleaved, pack_rows, pack_transposed, steps
from .tile_rows import (
    BLOCK,
    KEYS,
    QUAD,
    SQUARE,
    STRIPS,
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
    weigh_quad,
)
from .tuples import TilePlaces, Unit
from .vector import at

GROUP_BYTES = 2**19                         # of packed tiles that a block of rows meets one after the other
S_SIZE = BLOCK * KEYS                       # numbers of a unit
P_SIZE = BLOCK * KEYS
QUADS = BLOCK // QUAD


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
def add_four(context, a, a_below, b, b_beside):  # type: ignore[no-untyped-def]
    """Add the four products of two tiles of A, `a_below` bytes apart, and two of B to the four tiles of sums."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        places = []
        for start, further in (values[:2], values[2:]):
            first = builder.inttoptr(start, BYTES)
            places += [first, at(builder, first, further)]
        for tile in (4, 6, 7, 5):
            load_tile(builder, tile, places[tile - 4])
        for total, x, y in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
            dot_tile(builder, total, x, y)
        return context.get_dummy_value()

    return types.void(a, a_below, b, b_beside), emit


def _four(builder: Any, values: Any) -> list[Any]:
    start, below = values
    first = builder.inttoptr(start, BYTES)
    second = at(builder, first, below)
    return [first, at(builder, first, TILE_BYTES), second, at(builder, second, TILE_BYTES)]


@numba.njit(error_model="numpy")
def pack_unit(k, v, start, n, head, slot, packed):  # type: ignore[no-untyped-def]
    """Pack keys and values start..start+n of a head as tile number `slot`."""
    size = len(packed.values) // len(packed.finite)
    pack_transposed(k, start, n, head, packed.keys, slot * (len(packed.keys) // len(packed.finite)))
    finite = pack_interleaved(v, start, n, head, packed.values, slot * size, STRIPS * TILE)
    packed.finite[slot] = finite
    if not finite:
        for i in range(slot * size, (slot + 1) * size):
            if is_odd(packed.values[i]):
                packed.values[i] = np.uint16(0)


@numba.njit(error_model="numpy")
def is_odd(bits):  # type: ignore[no-untyped-def]
    """Whether a bfloat16 is infinite or NaN."""
    return bits & np.uint16(EXPONENT) == np.uint16(EXPONENT)


@numba.njit
def places_of(work, packed):  # type: ignore[no-untyped-def]
    """Give the addresses of what a thread works on."""
    return TilePlaces(address(work.queries), address(work.s), address(work.p), address(work.acc), address(work.tops),
                      address(work.sums), address(work.row_max), address(work.row_sum), address(work.shrink),
                      address(work.shift), address(work.low), address(work.high), address(packed.keys),
                      address(packed.values))


@numba.njit(error_model="numpy")
def unit_of(places, block, start, n, slot):  # type: ignore[no-untyped-def]
    """Say what a block of rows sees of n columns from `start` on, packed as tile `slot`, as a `Unit`."""
    first, last, inner_first, inner_last = n, 0, 0, n
    for r in range(block * BLOCK, (block + 1) * BLOCK):
        a, b = max(integer_at(places.low, r) - start, 0), min(integer_at(places.high, r) - start, n)
        if a < b:
            first, last = min(first, a), max(last, b)
        inner_first, inner_last = max(inner_first, a), min(inner_last, b)
    if first >= last:
        return Unit(block, start, slot, 0, 0, False)
    first_strip, last_strip = first // DEPTH, -(-last // DEPTH)
    partial = inner_first > first_strip * DEPTH or inner_last < last_strip * DEPTH
    return Unit(block, start, slot, first_strip, last_strip, partial)


@numba.njit(error_model="numpy")
def advance(new, scored, weighed, number, places, depth, width, scale, capping):  # type: ignore[no-untyped-def]
    """Do one step of the pipeline: scores of unit `new`, weights of `scored`, the product with values of `weighed`.

    `number` is that of the step; `depth` and `width` are tiles of a key's numbers, and pairs of tiles of a value's. A
    unit without strips is none.
    """
    mine, other = number % 2, (number + 1) % 2
    if weighed.first < weighed.last and any_shrinks(places, mine * BLOCK):
        shrink_block(weighed, mine, places, 2 * width)
    most = QUADS * (scored.last - scored.first)
    slots = (new.last - new.first) * depth + (weighed.last - weighed.first) * width
    credit = done = 0

    deep = depth * TILE_BYTES                                   # of the numbers of 16 rows or keys
    queries = places.queries + 2 * new.block * deep
    keys = places.keys + new.slot * (KEYS // ROWS) * deep
    scores = places.s + mine * S_SIZE * 4
    for j in range(new.first, new.last):
        zero_four()
        for d in range(depth):
            add_four(queries + d * TILE_BYTES, deep, keys + 2 * j * deep + d * TILE_BYTES, deep)
            credit += most
            while credit >= slots:
                soften(done, scored, other, places, scale)
                done += 1
                credit -= slots
        store_four(scores + 2 * j * TILE_BYTES, KEYS // ROWS * TILE_BYTES)
        if j > new.first:
            end_strip(j - 1, new, mine, places, capping)
    if new.first < new.last:
        end_strip(new.last - 1, new, mine, places, capping)
        raise_block(places, new.block * BLOCK, mine * BLOCK, scale)

    wide = STRIPS * TILE_BYTES                                  # of the keys of 16 columns or rows
    weights = places.p + mine * P_SIZE * 2
    values = places.values + weighed.slot * 2 * width * wide
    sums = places.acc + 4 * weighed.block * width * TILE_BYTES
    for c in range(width if weighed.first < weighed.last else 0):
        load_four(sums + 2 * c * TILE_BYTES, 2 * width * TILE_BYTES)
        for j in range(weighed.first, weighed.last):
            add_four(weights + j * TILE_BYTES, wide, values + 2 * c * wide + j * TILE_BYTES, wide)
            credit += most
            while credit >= slots:
                soften(done, scored, other, places, scale)
                done += 1
                credit -= slots
        store_four(sums + 2 * c * TILE_BYTES, 2 * width * TILE_BYTES)

    if most:
        if slots == 0:
            soften_all(most, scored, other, places, scale)
        add_sums(places, scored.block * BLOCK, other * BLOCK)


@numba.njit(error_model="numpy", forceinline=True)
def soften(number, unit, half, places, scale):  # type: ignore[no-untyped-def]
    """Do step `number` of a unit's softmax."""
    weigh_quad(places, half * S_SIZE, half * P_SIZE, half * BLOCK, number % QUADS * QUAD,
               unit.first + number // QUADS, scale)


@numba.njit(error_model="numpy")
def soften_all(count, unit, half, places, scale):  # type: ignore[no-untyped-def]
    """Do the softmax of a unit alone."""
    for number in range(count):
        soften(number, unit, half, places, scale)


@numba.njit(error_model="numpy", forceinline=True)
def end_strip(strip, unit, half, places, capping):  # type: ignore[no-untyped-def]
    """Do what the scores of a strip need before their weights are made."""
    if capping[1] != 0:
        cap_strip(strip, half, places, capping)
    if unit.partial:
        hide_strip(strip, unit, half, places)
    find_tops(places, half * S_SIZE, 2 * strip, strip == unit.first)


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
    tiles = 2 * steps(v.shape[2])
    for j in range(unit.first * DEPTH, unit.last * DEPTH):
        key = unit.start + j
        if key >= v.shape[0]:
            break
        place = place_of(v, key, head)
        for c in range(v.shape[2]):
            bits = v.array[place + c]
            if not is_odd(bits):
                continue
            for r in range(BLOCK):
                row = unit.block * BLOCK + r
                if work.low[row] <= key < work.high[row]:
                    p = work.p[half * P_SIZE + (r // ROWS * STRIPS + j // DEPTH) * TILE + r % ROWS * DEPTH + j % DEPTH]
                    acc_at = ((2 * unit.block + r // ROWS) * tiles + c // ROWS) * SQUARE + r % ROWS * ROWS + c % ROWS
                    work.acc[acc_at] += widen(p) * widen(bits)


@numba.njit
def row_address(acc, query, head):  # type: ignore[no-untyped-def]
    """Address of a row's first number, the others after it."""
    return address(acc) + query * acc.strides[0] + head * acc.strides[1]


@numba.njit(error_model="numpy")
def load_tile_rows(block, state, rows, group, work):  # type: ignore[no-untyped-def]
    """Take up rows of a key head into the work space; those after the last see nothing."""
    tiles = 2 * steps(block.v.shape[2])
    height = -(-rows.n_rows // BLOCK) * BLOCK
    depth = steps(block.k.shape[2])
    if rows.n_rows < height:
        work.queries[:height * depth * DEPTH] = 0
    pack_rows(block.q, rows.first, rows.n_rows, rows.head, group, work.queries, 0)
    if rows.n_rows < height or state.acc.shape[2] < tiles * ROWS:
        work.acc[:height * tiles * ROWS] = 0
    work.sums[:] = 0
    for r in range(height):
        if r >= rows.n_rows:
            work.low[r] = work.high[r] = 0
            work.row_max[r] = -np.inf
            work.row_sum[r] = 0
            continue
        query, member = divmod(rows.first + r, group)
        h = rows.head * group + member
        work.low[r] = block.begin[query]
        work.high[r] = max(block.begin[query], block.end[query])
        work.row_max[r] = state.row_max[query, h]
        work.row_sum[r] = state.row_sum[query, h]
        place = r // ROWS * tiles * SQUARE + r % ROWS * ROWS
        row_to_tiles(row_address(state.acc, query, h), address(work.acc) + 4 * place, state.acc.shape[2])


@numba.njit(error_model="numpy")
def store_tile_rows(state, rows, group, work):  # type: ignore[no-untyped-def]
    """Put the work space back into the state; rows that saw nothing stay as they are."""
    tiles = 2 * steps(state.acc.shape[2])
    for r in range(rows.n_rows):
        if work.low[r] >= work.high[r]:
            continue
        query, member = divmod(rows.first + r, group)
        h = rows.head * group + member
        place = r // ROWS * tiles * SQUARE + r % ROWS * ROWS
        row_from_tiles(address(work.acc) + 4 * place, row_address(state.acc, query, h), state.acc.shape[2])
        state.row_sum[query, h] = work.row_sum[r]
        state.row_max[query, h] = work.row_max[r]
