"""The forward pass of a range of rows over a range of packed tiles on the tile unit, unit by unit.

Some packed tiles, which fit the second-level cache, meet a block of 32 rows one after the other, whose acc and Q stay
in the first; then they meet the next block of the task.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numba.extending import overload

from .amx import DEPTH, configure, release
from .forward_tile import visible
from .pieces import all_pieces, pieces_of, tile_size
from .tile_forward import add_odd, advance, factors_of, places_of, round_sums, unit_of
from .tile_pack import steps
from .tile_rows import BLOCK, KEYS, any_fresh, integer_at
from .tile_strips import advance_strips
from .tuples import Unit

GROUP_BYTES = 2**19                         # of packed tiles that a block of rows meets one after the other


class Course(NamedTuple):
    """The units of a range: `tiles` packed ones, the first from column `first` on, × `blocks` of rows."""

    first: Any
    tiles: Any
    blocks: Any
    together: Any


class Inner(NamedTuple):
    """The columns that every row of a block sees: low <= column < high."""

    block: Any
    low: Any
    high: Any


@numba.njit(error_model="numpy")
def course_of(block, rows, columns, tile, work):  # type: ignore[no-untyped-def]
    """Say which tiles rows see something of, and how many of these go together."""
    a, b = visible(work.low, work.high, rows.n_rows, columns.start, columns.stop)
    a -= (a - columns.origin) % tile
    bytes_of_tile = KEYS // DEPTH * 4 * tile_size(block.k.array) * (steps(block.k.shape[2]) + steps(block.v.shape[2]))
    return Course(a, -(-(b - a) // tile), -(-rows.n_rows // BLOCK), max(1, GROUP_BYTES // bytes_of_tile))


@numba.njit(error_model="numpy")
def course_unit(i, course, rows, columns, packed, places, work, inner):  # type: ignore[no-untyped-def]
    """Give unit i of a course, and the `Inner` of its block; one without strips where there is nothing to see."""
    if i >= course.tiles * course.blocks:
        return Unit(0, 0, 0, 0, 0, False, False, False), inner
    first = i // (course.together * course.blocks) * course.together
    size = min(course.together, course.tiles - first)
    inside = i - first * course.blocks
    at = course.first + (first + inside % size) * packed.tile
    slot = rows.head * packed.tiles + (at - columns.origin) // packed.tile
    number, n = inside // size, min(packed.tile, columns.stop - at)
    odd = work.uneven[number] or not packed.finite[slot]
    if inner.block != number:
        inner = inner_of(number, places)
    if inner.low <= at and at + n <= inner.high and n % DEPTH == 0 and not any_fresh(places, number * BLOCK):
        return Unit(number, at, slot, 0, n // DEPTH, False, odd, False), inner
    return unit_of(places, number, at, n, slot, odd), inner


@numba.njit(error_model="numpy")
def inner_of(block, places):  # type: ignore[no-untyped-def]
    """Say what every row of a block sees."""
    low, high = integer_at(places.low, block * BLOCK), integer_at(places.high, block * BLOCK)
    for r in range(block * BLOCK + 1, (block + 1) * BLOCK):
        low, high = max(low, integer_at(places.low, r)), min(high, integer_at(places.high, r))
    return Inner(block, low, high)


def fold_units(block, rows, columns, group, packed, work, sizes, capping):  # type: ignore[no-untyped-def]
    """Fold a range of columns of a block into a range of rows of a head that the work space holds."""
    raise NotImplementedError("typed by Numba")


@overload(fold_units)
def _fold_units(block, rows, columns, group, packed, work, sizes, capping):  # type: ignore[no-untyped-def]
    if pieces_of(block.types[block.fields.index("k")].types[0].dtype) == 1:
        return _fold_whole
    return _fold_pieces


def _fold_whole(block, rows, columns, group, packed, work, sizes, capping):  # type: ignore[no-untyped-def]
    """bfloat16: one step more than there are units."""
    places = places_of(work, packed, all_pieces(block.k.array))
    course = course_of(block, rows, columns, packed.tile, work)
    scale = max(block.scale, np.float32(1e-45))               # 0 · -inf would be NaN
    depth, width = steps(block.k.shape[2]), steps(block.v.shape[2])
    configure()
    before = Unit(0, 0, 0, 0, 0, False, False, False)
    inner = Inner(-1, 0, 0)
    number = first = 0
    for i in range(course.tiles * course.blocks + 1):
        new, inner = course_unit(i, course, rows, columns, packed, places, work, inner)
        if new.first == new.last and i < course.tiles * course.blocks:
            continue
        first = advance_strips(new, before, number, first, places, depth, width, scale, capping)
        if before.first < before.last and not packed.finite[before.slot]:
            add_odd(before, (number + 1) % 2, rows.head, work, block.v)
        before = new
        number += 1
    release()


def _fold_pieces(block, rows, columns, group, packed, work, sizes, capping):  # type: ignore[no-untyped-def]
    """float32 in pieces: two steps more."""
    places = places_of(work, packed, all_pieces(block.k.array))
    course = course_of(block, rows, columns, packed.tile, work)
    factors = factors_of(block, rows, group)
    scale = max(block.scale, np.float32(1e-45))               # 0 · -inf would be NaN
    depth, width = steps(block.k.shape[2]), steps(block.v.shape[2])
    configure()
    scored = weighed = Unit(0, 0, 0, 0, 0, False, False, False)
    inner = Inner(-1, 0, 0)
    number = 0
    for i in range(course.tiles * course.blocks + 2):
        new, inner = course_unit(i, course, rows, columns, packed, places, work, inner)
        if new.first == new.last and i < course.tiles * course.blocks:
            continue
        advance(new, scored, weighed, number, places, factors, depth, width, scale, capping)
        if weighed.first < weighed.last and not packed.finite[weighed.slot]:
            add_odd(weighed, number % 2, rows.head, work, block.v)
        if sizes.small and weighed.first < weighed.last:
            round_sums(weighed.block, work, 2 * width)
        weighed, scored = scored, new
        number += 1
    release()
