"""The forward pass of bfloat16 on the tile unit: units of 32 rows × 192 keys, in strips of 32 keys.

    strip j of unit t:        S = Q·K            tile unit
    strips before it:         P and its sums     vector units, in steps between the products of the others
    unit t - 1:               acc += P·V         tile unit, some columns after some strips

Scores are forgotten as soon as they are weights: at most `RING` strips of them are there, 12 KiB, which stay in the
first-level cache, as do the weights of two units. What is subtracted from a row's scores is known beforehand
(`tile_strip_rows`). Whether a unit's weights became too large for that is seen by their sums once they are all there,
before they meet the values: then it is raised, and the unit's weights are made again.
"""

from __future__ import annotations

import numba

from .amx import DEPTH, ROWS, TILE_BYTES
from .tile_forward import P_SIZE, S_SIZE, add_passing, load_four, load_two, shrink_block, store_four, zero_four
from .tile_rows import BLOCK, KEYS, QUAD, SQUARE, STRIPS, cap_scores, integer_at
from .tile_strip_rows import (
    QUARTERS,
    STRIP_BYTES,
    add_totals,
    find_strip_tops,
    hide_in_strip,
    keep_tiles,
    raise_rows,
    take_tiles,
    total_rows,
    weigh_quad,
)

RING = 3


@numba.njit(error_model="numpy")
def advance_strips(new, before, number, first, places, depth, width, scale, capping):  # type: ignore[no-untyped-def]
    """Do step `number`: scores of unit `new`, weights of all of it but the last strip, the product of `before`.

    `before` is the unit of the step before, whose last strip is still scores, number `first` of the ring; `depth` and
    `width` are tiles of a key's numbers, and pairs of tiles of a value's. A unit without strips is none. Give the
    number in the ring of the last strip of `new`.
    """
    mine = number % 2
    strips, waiting = new.last - new.first, 1 if before.first < before.last else 0
    chunks = width * waiting
    most = QUARTERS * (waiting + max(strips - 1, 0))
    slots = strips * depth + chunks * (before.last - before.first)
    credit = done = chunk = 0

    deep, wide = depth * TILE_BYTES, STRIPS * TILE_BYTES        # of 16 rows or keys; of the keys of 16 columns or rows
    queries = places.queries + 2 * new.block * deep
    keys = places.keys + new.slot * (KEYS // ROWS) * deep
    weights = places.p + (1 - mine) * P_SIZE * 2
    values = places.values + before.slot * 2 * width * wide
    sums = places.acc + 4 * before.block * width * TILE_BYTES
    for j in range(max(strips, 1)):
        if j < strips:
            there = QUARTERS * (waiting + j)                    # steps whose scores are there
            while done < there - QUARTERS * (RING - 1):
                soften(done, new, before, mine, first, places, depth, width, scale, capping)
                done += 1
            zero_four()
            for d in range(depth):
                load_two(queries + d * TILE_BYTES, deep)
                add_passing(keys + 2 * (new.first + j) * deep + d * TILE_BYTES, deep)
                credit += most
                while credit >= slots and done < there:
                    soften(done, new, before, mine, first, places, depth, width, scale, capping)
                    done += 1
                    credit -= slots
            scores = places.s + (first + waiting + j) % RING * STRIP_BYTES
            store_four(scores, 2 * TILE_BYTES)
            end_strip(scores, new.first + j, new, places, scale, capping)

        while chunk < chunks and (chunk + 1) * strips <= (j + 1) * chunks:
            while done < QUARTERS:                              # the last weights of that unit
                soften(done, new, before, mine, first, places, depth, width, scale, capping)
                done += 1
            place = sums + 2 * chunk * TILE_BYTES
            load_four(place, 2 * width * TILE_BYTES)
            for i in range(before.first, before.last):
                load_two(weights + i * TILE_BYTES, wide)
                add_passing(values + 2 * chunk * wide + i * TILE_BYTES, wide)
                credit += most
                while credit >= slots and done < QUARTERS * (waiting + j):
                    soften(done, new, before, mine, first, places, depth, width, scale, capping)
                    done += 1
                    credit -= slots
            store_four(place, 2 * width * TILE_BYTES)
            chunk += 1
    while done < most:
        soften(done, new, before, mine, first, places, depth, width, scale, capping)
        done += 1
    return (first + waiting + strips - 1) % RING


@numba.njit(error_model="numpy", forceinline=True)
def soften(done, new, before, mine, first, places, depth, width, scale, capping):  # type: ignore[no-untyped-def]
    """Do step `done` of the softmax: first come those of the last strip of `before`, if there is such a unit."""
    turn = done // QUARTERS
    waiting = before.first < before.last
    old = waiting and turn == 0
    half, block, strip = (1 - mine, before.block, before.last - 1) if old else (mine, new.block,
                                                                               new.first + turn - waiting)
    weigh_quad(places, places.s + (first + turn) % RING * STRIP_BYTES,
               places.p + (half * P_SIZE * 2 + strip * TILE_BYTES), block * BLOCK, done % QUARTERS * QUAD, scale)
    if old and done == QUARTERS - 1:
        end_unit(before, 1 - mine, places, depth, width, scale, capping)


@numba.njit(error_model="numpy", forceinline=True)
def end_strip(scores, strip, unit, places, scale, capping):  # type: ignore[no-untyped-def]
    """Do what the scores of a strip need before their weights are made."""
    if capping[1] != 0 or unit.partial:
        change_strip(scores, strip, unit, places, capping)
    if unit.fresh:
        find_strip_tops(places, scores, True)
        raise_rows(places, unit.block * BLOCK, scale, True)


@numba.njit(error_model="numpy")
def change_strip(scores, strip, unit, places, capping):  # type: ignore[no-untyped-def]
    """Cap scores, and hide what a row does not see."""
    if capping[1] != 0:
        for tile in range(4):
            cap_scores(places, (scores - places.s) // 4 + tile * SQUARE, capping[0], capping[1])
    if unit.partial:
        start = unit.start + strip * DEPTH
        for r in range(BLOCK):
            row = unit.block * BLOCK + r
            low, high = integer_at(places.low, row) - start, integer_at(places.high, row) - start
            if low > 0 or high < DEPTH:
                hide_in_strip(scores, r, low, high)


@numba.njit(error_model="numpy")
def end_unit(unit, half, places, depth, width, scale, capping):  # type: ignore[no-untyped-def]
    """Add up what the weights of a unit sum to, now that they are all there."""
    if total_rows(places):
        mend_unit(unit, half, places, depth, width, scale, capping)
    add_totals(places, unit.block * BLOCK)


@numba.njit(error_model="numpy")
def mend_unit(unit, half, places, depth, width, scale, capping):  # type: ignore[no-untyped-def]
    """Raise what is subtracted from the rows whose weights are too large; make all weights of the unit again.

    The other rows' have the same bits as before. What is in tiles stays.
    """
    keep_tiles(places.part)
    deep = depth * TILE_BYTES
    queries = places.queries + 2 * unit.block * deep
    keys = places.keys + unit.slot * (KEYS // ROWS) * deep
    for j in range(unit.first, unit.last):
        scores = places.s + S_SIZE * 4 + j * STRIP_BYTES
        zero_four()
        for d in range(depth):
            load_two(queries + d * TILE_BYTES, deep)
            add_passing(keys + 2 * j * deep + d * TILE_BYTES, deep)
        store_four(scores, 2 * TILE_BYTES)
        change_strip(scores, j, unit, places, capping)
        find_strip_tops(places, scores, j == unit.first)
    raise_rows(places, unit.block * BLOCK, scale, False)
    shrink_block(unit, 0, places, 2 * width)
    for j in range(unit.first, unit.last):
        for in_block in range(0, BLOCK, QUAD):
            weigh_quad(places, places.s + S_SIZE * 4 + j * STRIP_BYTES,
                       places.p + (half * P_SIZE * 2 + j * TILE_BYTES), unit.block * BLOCK, in_block, scale)
    total_rows(places)
    take_tiles(places.part)
