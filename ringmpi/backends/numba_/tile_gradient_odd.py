"""Pairs of odd rows and keys in the backward pass of pieces: float32's own kernels make them, tile by tile.

The tiles of a call are worked through as ever; in each, what is not odd comes first, then the pairs of odd rows, then
those of the other rows and odd keys. So what a pair adds, and when, depends on its own row and key alone.
"""

from __future__ import annotations

import numba

from .backward_tile import backward_packed, load_backward_rows, pack_tile, store_backward_rows
from .forward_tile import any_sees, find_groups
from .pack import lanes
from .product import ROWS
from .score_rows import load_row_scores
from .tile_gradient_load import store_gradient_rows, take_up_queries
from .tuples import Tile


@numba.njit(error_model="numpy")
def differentiate_odd(tile, first, count, group, slot, block, gradient, work, packed, sums, sums_at, spare):  # type: ignore[no-untyped-def]
    """Add what pairs of odd rows or keys give, of rows first..first + count and a packed tile, to dQ and the sums.

    `spare` is a `SpareWork`, in which all that is odd is packed anew.
    """
    height, mine = -(-count // ROWS) * ROWS, spare.work
    store_gradient_rows(gradient, first, count, tile.rows, tile.head, group, work, packed)
    pack_tile(block.k, block.v, tile.start, tile.n, tile.head, 0, spare.packed)
    load_backward_rows(block, gradient, first, count, height, tile.head, group, mine)
    load_row_scores(first, count, height, tile.head, group, spare.score)
    if gradient.of_keys:
        copy_sums(sums, sums_at, spare.sums, 0, tile.n)

    for r in range(count):
        if not work.odd[r]:
            mine.low[r] = mine.high[r] = 0
    differentiate_spare(height, tile, gradient, spare)

    odd = packed.odd[slot * packed.tile:slot * packed.tile + tile.n]
    j = 0
    while j < tile.n:
        stop = j + 1
        if odd[j]:
            while stop < tile.n and odd[stop]:
                stop += 1
            for r in range(count):
                mine.low[r] = max(work.low[r], tile.start + j)
                mine.high[r] = 0 if work.odd[r] else min(work.high[r], tile.start + stop)
                mine.high[r] = max(mine.low[r], mine.high[r])
            differentiate_spare(height, tile, gradient, spare)
        j = stop

    if gradient.of_keys:
        copy_sums(spare.sums, 0, sums, sums_at, tile.n)
    store_backward_rows(gradient, first, count, tile.head, group, mine)
    take_up_queries(gradient, first, count, tile.rows, tile.head, group, work, packed)


@numba.njit(error_model="numpy")
def differentiate_spare(height, tile, gradient, spare):  # type: ignore[no-untyped-def]
    """Do what `backward_packed` does for what the spare rows see of the spare tile."""
    mine = spare.work
    find_groups(height, mine.low, mine.high, tile.start, tile.n, lanes(mine.s), mine.groups)
    if any_sees(height, mine.groups):
        backward_packed(Tile(height, tile.head, tile.start, tile.n), 0, mine, spare.packed, spare.sums, 0, gradient,
                        spare.score)


@numba.njit(error_model="numpy")
def copy_sums(x, x_at, y, y_at, n):  # type: ignore[no-untyped-def]
    """Copy n rows of sums of dK and dV, as many of their columns as both have."""
    for j in range(n):
        for c in range(min(x.dk.shape[1], y.dk.shape[1])):
            y.dk[y_at + j, c] = x.dk[x_at + j, c]
        for c in range(min(x.dv.shape[1], y.dv.shape[1])):
            y.dv[y_at + j, c] = x.dv[x_at + j, c]
