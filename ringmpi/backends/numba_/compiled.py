"""The functions that Python calls and Numba compiles: pack tiles of a block, and both passes over a range of keys.

They are compiled on the first call for a dtype and cached on disk. Numba's cache looks at the file of a function
alone, so the digest of all the files that the machine code comes from is part of its key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np

from ...environment import launched_rank
from . import (
    amx,
    backward_rows,
    backward_tile,
    few_rows,
    forward_tile,
    pack,
    pieces,
    product,
    relative_rows,
    score_rows,
    softmax_rows,
    sum_rows,
    sum_tile,
    tile_forward,
    tile_gradient_load,
    tile_gradient_odd,
    tile_gradient_rows,
    tile_gradients,
    tile_pack,
    tile_rows,
    tile_squares,
    tile_strip_rows,
    tile_strips,
    tile_units,
    tuples,
    vector,
    weights,
)
from .amx import configure, release
from .backward_tile import backward_packed, load_backward_rows, pack_tile, store_backward_rows
from .cache import KernelCache, warn_once
from .few_rows import MOST
from .forward_tile import (
    address,
    any_sees,
    find_groups,
    fold_direct,
    fold_packed,
    load_forward_rows,
    score_panels,
    see_interval,
    store_forward_rows,
    visible,
    work_from,
)
from .pack import lanes, pack_keys, pack_values
from .product import ROWS
from .score_rows import load_row_scores, score_arguments_from
from .sum_tile import load_weight_rows, reduce_tile
from .tile_forward import load_tile_rows, pack_unit, sizes_of, store_tile_rows
from .tile_gradient_load import load_gradient_rows, pack_gradient_tile, store_gradient_rows
from .tile_gradient_odd import differentiate_odd
from .tile_gradients import differentiate_packed, find_seen
from .tile_squares import SIDE
from .tile_units import fold_units
from .tuples import (
    BlockArrays,
    ColumnRange,
    Contiguous,
    ForwardTiles,
    ForwardWork,
    RowRange,
    StateArrays,
    Tile,
    TileWork,
    Tokens,
)

SOURCES = (vector, tuples, product, softmax_rows, relative_rows, score_rows, backward_rows, weights, pack, few_rows,
           forward_tile, backward_tile, amx, pieces, tile_pack, tile_rows, tile_forward, tile_strip_rows, tile_strips,
           tile_units, tile_squares, tile_gradient_rows, tile_gradients, tile_gradient_load, tile_gradient_odd,
           sum_rows, sum_tile)


def _digest() -> str:
    """Digest of the sources of the machine code, this file among them, and of the vectors it is for."""
    paths = [Path(__file__), *(Path(str(module.__file__)) for module in SOURCES)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths) + repr(vector.machine()).encode()).hexdigest()


@numba.njit(error_model="numpy")
def fold_range(rows, columns, state, block, packed, work, score):  # type: ignore[no-untyped-def]
    """Fold a range of columns of a block into a range of rows: what these see of it in one interval after the other.

    The rows stay in the work space from a `fresh` call to the `final` one, which puts them back into the state.
    Several heads go tile by tile, since the keys of a token lie side by side.
    """
    n_rows = rows.n_rows
    intervals = len(block.begin)
    group = state.acc.shape[1] // block.v.shape[1]
    direct = packed.private and n_rows <= MOST
    height = n_rows if direct else -(-n_rows // ROWS) * ROWS
    whole = -(-height * rows.heads // ROWS) * ROWS
    for h in range(rows.heads if columns.fresh else 0):
        mine = work_from(work, h * height)
        filled = height if h + 1 < rows.heads else whole - h * height
        load_forward_rows(block, state, rows.first, n_rows, filled, rows.head + h, group, mine)
        load_row_scores(rows.first, n_rows, filled, rows.head + h, group, score_arguments_from(score, h * height))

    for number in range(intervals):
        for h in range(rows.heads if intervals > 1 else 0):
            filled = height if h + 1 < rows.heads else whole - h * height
            see_interval(block, number, rows.first, n_rows, filled, group, work_from(work, h * height))
        fold_interval(rows, columns, height, whole, direct, block, packed, work, score)

    for h in range(rows.heads if columns.final else 0):
        store_forward_rows(block, state, rows.first, n_rows, rows.head + h, group, work_from(work, h * height))


@numba.njit(error_model="numpy")
def fold_interval(rows, columns, height, whole, direct, block, packed, work, score):  # type: ignore[no-untyped-def]
    """Fold what rows in the work space see of a range of columns in an interval, tile by tile.

    A head has `height` rows there, all of them `whole`.
    """
    tile = packed.tile
    origin = columns.origin
    a, b = visible(work.low, work.high, height, columns.start, columns.stop)
    for at in range(a - (a - origin) % tile, b, tile):
        n = min(tile, columns.stop - at)
        find_groups(whole, work.low, work.high, at, n, lanes(work.acc), work.groups)
        if not any_sees(whole, work.groups):
            continue
        if direct:
            fold_direct(Tile(whole, rows.head, at, n), rows, work, block, score)
            continue
        for h in range(rows.heads):
            slot = 0 if packed.private else (rows.head + h) * packed.tiles + (at - origin) // tile
            fold_packed(Tile(height, rows.head + h, at, n), slot, work_from(work, h * height), block, packed,
                        score_arguments_from(score, h * height))


@numba.njit(error_model="numpy")
def pack_slot(k, v, start, stop, number, head, slot, packed):  # type: ignore[no-untyped-def]
    """Pack tile `number` of columns start..stop of a head into a slot."""
    at = start + number * packed.tile
    n = min(packed.tile, stop - at)
    pack_keys(k, at, n, head, packed.keys, slot * packed.tile * k.shape[2])
    size = len(packed.values) // len(packed.finite)
    packed.finite[slot] = pack_values(v, at, n, head, packed.values, slot * size, packed.tile)


def _forward(digest: str) -> tuple[Any, ...]:
    """Make the functions of the forward pass; nothing is compiled yet. `digest` makes the key of their cache."""

    def pack_forward(k, v, start, stop, first, last, packed):  # type: ignore[no-untyped-def]
        """Pack tiles first..last of columns start..stop, counted head by head."""
        digest                          # noqa: B018 (a free variable is part of the key of Numba's cache)
        for slot in range(first, last):
            pack_slot(k, v, start, stop, slot % packed.tiles, slot // packed.tiles, slot, packed)

    def forward_keys(numbers, score, ranges):  # type: ignore[no-untyped-def]
        """Fold ranges of columns of a block into ranges of rows, one after the other; see `fold_range`.

        `numbers` is what `tuples.forward_numbers` gives, `ranges` what `tuples.ranges_of` gives; `score` is None for
        a plain score.
        """
        digest                          # noqa: B018
        state = StateArrays(*numbers[:3])
        block = BlockArrays(Tokens(*numbers[3:7]), Tokens(*numbers[7:11]), Tokens(*numbers[11:15]), numbers[15],
                            numbers[16], numbers[17])
        packed = ForwardTiles(*numbers[18:24])
        work = ForwardWork(*numbers[24:])
        for x in ranges:
            for slot in range(-(-(x[9] - x[4]) // packed.tile) if x[9] else 0):
                pack_slot(block.k, block.v, x[4], x[9], slot, x[0], slot, packed)
            fold_range(RowRange(x[0], x[1], x[2], x[3]), ColumnRange(x[4], x[5], x[6], x[7] != 0, x[8] != 0), state,
                       block, packed, work, score)

    def merge_states(states, sinks, has_sinks, seen, out, lse):  # type: ignore[no-untyped-def]
        """Combine the states of all parts, and finish them; see `Backend.merge`. `out` is in their dtype."""
        digest                          # noqa: B018
        batch, n_q, heads, dim_v = out.shape
        rows = n_q * heads
        zero = states.dtype.type(0)
        hidden = states.dtype.type(-np.inf)
        for i in range(batch):
            acc_at = i * rows * (dim_v + 2)
            max_at = acc_at + rows * dim_v
            for r in range(rows):
                query, h = r // heads, r % heads
                most = sinks[h] if has_sinks else hidden
                visible = has_sinks
                for p in range(len(states)):
                    visible |= seen[p, query] != 0
                    x = states[p, max_at + r]
                    most = x if x > most or x != x else most
                shift = zero if most == hidden else most             # -inf - -inf would be NaN
                total = np.exp(sinks[h] - shift) if has_sinks else zero
                row = out[i, query, h]
                row[:] = zero
                for p in range(len(states)):
                    factor = np.exp(states[p, max_at + r] - shift)
                    total += factor * states[p, max_at + rows + r]
                    part = states[p, acc_at + r * dim_v:acc_at + (r + 1) * dim_v]
                    for c in range(dim_v):
                        row[c] += factor * part[c]
                for c in range(dim_v):
                    row[c] = row[c] / total if visible else zero
                lse[i, query, h] = most + np.log(total) if visible else hidden

    def finish_rows(acc, row_max, row_sum, seen, out, lse):  # type: ignore[no-untyped-def]
        """Normalise a state; see `softmax.finish`. `out` is in its dtype, and may be `acc`."""
        digest                          # noqa: B018
        n_q, heads, dim_v = acc.shape
        zero = acc.dtype.type(0)
        hidden = acc.dtype.type(-np.inf)
        for i in range(n_q):
            for h in range(heads):
                row, sums = out[i, h], acc[i, h]
                if seen[i]:
                    total = row_sum[i, h]
                    for c in range(dim_v):
                        row[c] = sums[c] / total
                    lse[i, h] = row_max[i, h] + np.log(total)
                else:
                    row[:] = zero
                    lse[i, h] = hidden

    def combine_rows(acc, row_max, row_sum, parts_acc, parts_max, parts_sum):  # type: ignore[no-untyped-def]
        """Fold states of the same queries that saw other keys into one; see `softmax.combine`."""
        digest                          # noqa: B018
        n_q, heads, dim_v = acc.shape
        zero = acc.dtype.type(0)
        hidden = acc.dtype.type(-np.inf)
        for i in range(n_q):
            for h in range(heads):
                most = row_max[i, h]
                for p in range(len(parts_max)):
                    x = parts_max[p, i, h]
                    most = x if x > most or x != x else most
                shift = zero if most == hidden else most             # -inf - -inf would be NaN
                row = acc[i, h]
                shrink = np.exp(row_max[i, h] - shift)
                total = shrink * row_sum[i, h]
                for c in range(dim_v):
                    row[c] *= shrink
                for p in range(len(parts_max)):
                    factor = np.exp(parts_max[p, i, h] - shift)
                    total += factor * parts_sum[p, i, h]
                    part = parts_acc[p, i, h]
                    for c in range(dim_v):
                        row[c] += factor * part[c]
                row_sum[i, h] = total
                row_max[i, h] = most

    return pack_forward, forward_keys, merge_states, finish_rows, combine_rows


def _forward_on_tiles(digest: str) -> tuple[Any, ...]:
    """Make the functions of the forward pass on the tile unit, as `_forward` does."""

    def survey_values(v, first, last, acc):  # type: ignore[no-untyped-def]
        """Give the factor of values and sums for `pack_units` and `forward_units`, and whether some are small."""
        digest                          # noqa: B018
        return sizes_of(v, first, last, acc)

    def pack_units(k, v, start, stop, first, last, packed, sizes):  # type: ignore[no-untyped-def]
        """Pack tiles first..last of columns start..stop, counted head by head, for `forward_units`."""
        digest                          # noqa: B018
        for slot in range(first, last):
            at = start + slot % packed.tiles * packed.tile
            pack_unit(k, v, at, min(packed.tile, stop - at), slot // packed.tiles, slot, packed, sizes)

    def forward_units(numbers, capping, ranges, sizes):  # type: ignore[no-untyped-def]
        """Do what `forward_keys` does, for rows of one head each, on the tile unit; `capping` is (scale / cap, cap)."""
        digest                          # noqa: B018
        state = StateArrays(*numbers[:3])
        block = BlockArrays(Tokens(*numbers[3:7]), Tokens(*numbers[7:11]), Tokens(*numbers[11:15]), numbers[15],
                            numbers[16], numbers[17])
        packed = ForwardTiles(*numbers[18:24])
        work = TileWork(*numbers[24:])
        group = state.acc.shape[1] // block.v.shape[1]
        for x in ranges:
            rows, columns = RowRange(x[0], x[1], x[2], x[3]), ColumnRange(x[4], x[5], x[6], x[7] != 0, x[8] != 0)
            if columns.fresh:
                load_tile_rows(block, state, rows, group, work, sizes)
            fold_units(block, rows, columns, group, packed, work, sizes, capping)
            if columns.final:
                store_tile_rows(state, rows, group, work, sizes)

    return survey_values, pack_units, forward_units


def _backward(digest: str) -> tuple[Any, ...]:
    """Make the functions of the backward pass, as `_forward` does."""

    def pack_backward(k, v, start, stop, first, last, packed):  # type: ignore[no-untyped-def]
        """Pack tiles first..last of columns start..stop, counted head by head, for `backward_keys`."""
        digest                          # noqa: B018
        for slot in range(first, last):
            at = start + slot % packed.tiles * packed.tile
            pack_tile(k, v, at, min(packed.tile, stop - at), slot // packed.tiles, slot, packed)

    def backward_keys(gradient, block, score, rows, columns, packed, sums, work):  # type: ignore[no-untyped-def]
        """Add what a range of columns of a block gives to dQ of a range of rows, and to `sums` of dK and dV.

        The first row of the sums is that of column `origin`. Tiles of rows begin with the first row.
        """
        digest                          # noqa: B018
        head = rows.head
        tile = packed.tile
        origin = columns.origin
        group = block.q.shape[1] // block.k.shape[1]
        height = len(work.s)
        for first in range(rows.first, rows.first + rows.n_rows, height):
            count = min(height, rows.first + rows.n_rows - first)
            whole = -(-count // ROWS) * ROWS
            load_backward_rows(block, gradient, first, count, whole, head, group, work)
            load_row_scores(first, count, whole, head, group, score)
            for number in range(len(block.begin)):
                if len(block.begin) > 1:
                    see_interval(block, number, first, count, count, group, work)
                a, b = visible(work.low, work.high, whole, columns.start, columns.stop)
                for at in range(a - (a - origin) % tile, b, tile):
                    n = min(tile, columns.stop - at)
                    find_groups(whole, work.low, work.high, at, n, lanes(gradient.dq), work.groups)
                    if any_sees(whole, work.groups):
                        slot = head * packed.tiles + (at - origin) // tile
                        backward_packed(Tile(whole, head, at, n), slot, work, packed, sums, at - origin, gradient,
                                        score)
            store_backward_rows(gradient, first, count, head, group, work)

    def add_sums(dk, dv, sums, head, columns, spans):  # type: ignore[no-untyped-def]
        """Add the sums of all chunks of a key head to a range of rows of dk and dv.

        A chunk of rows saw columns spans[chunk] alone; its sums begin at column `origin`.
        """
        digest                          # noqa: B018
        for chunk in range(len(spans)):
            for j in range(max(columns.start, spans[chunk, 0]), min(columns.stop, spans[chunk, 1])):
                x, y = sums.dk[chunk, j - columns.origin], sums.dv[chunk, j - columns.origin]
                for c in range(dk.shape[2]):
                    dk[j, head, c] += x[c]
                for c in range(dv.shape[2]):
                    dv[j, head, c] += y[c]

    return pack_backward, backward_keys, add_sums


def _backward_on_tiles(digest: str) -> tuple[Any, ...]:
    """Make the functions of the backward pass on the CPU's tiles, as `_forward` does."""

    def pack_tiles_backward(k, v, start, stop, first, last, packed):  # type: ignore[no-untyped-def]
        """Pack tiles first..last of columns start..stop, counted head by head, for `backward_on_tiles`."""
        digest                          # noqa: B018
        for slot in range(first, last):
            at = start + slot % packed.tiles * packed.tile
            pack_gradient_tile(k, v, at, min(packed.tile, stop - at), slot // packed.tiles, slot, packed)

    def backward_on_tiles(gradient, block, score, rows, columns, packed, sums, work, spare):  # type: ignore[no-untyped-def]
        """Do what `backward_keys` does; `score` is a `TileScore`, `spare` a `SpareWork`, or None for bfloat16."""
        digest                          # noqa: B018
        head = rows.head
        tile = packed.tile
        origin = columns.origin
        group = block.q.shape[1] // block.k.shape[1]
        height = len(work.lse)
        configure()
        for first in range(rows.first, rows.first + rows.n_rows, height):
            count = min(height, rows.first + rows.n_rows - first)
            whole = -(-count // SIDE) * SIDE
            load_gradient_rows(block, gradient, first, count, whole, head, group, work, packed)
            a, b = visible(work.low, work.high, whole, columns.start, columns.stop)
            for at in range(a - (a - origin) % tile, b, tile):
                n = min(tile, columns.stop - at)
                slot, here = head * packed.tiles + (at - origin) // tile, Tile(whole, head, at, n)
                some, odd = find_seen(whole, at, n, slot, work, packed)
                if some:
                    differentiate_packed(here, slot, work, packed, sums, at - origin, gradient, score)
                if spare is not None:           # noqa: SIM102 (without, none of this is compiled)
                    if odd:
                        differentiate_odd(here, first, count, group, slot, block, gradient, work, packed, sums,
                                          at - origin, spare)
            store_gradient_rows(gradient, first, count, whole, head, group, work, packed)
        release()

    return pack_tiles_backward, backward_on_tiles


def _reductions(digest: str) -> tuple[Any, ...]:
    """Make the functions of the passes over weights, as `_forward` does."""

    def pack_weight_keys(k, start, stop, first, last, packed):  # type: ignore[no-untyped-def]
        """Pack tiles first..last of columns start..stop, counted head by head, for `reduce_keys`."""
        digest                          # noqa: B018
        for slot in range(first, last):
            at = start + slot % packed.tiles * packed.tile
            pack_keys(k, at, min(packed.tile, stop - at), slot // packed.tiles, packed.keys,
                      slot * packed.tile * k.shape[2])

    def reduce_keys(block, score, lse, target, rows, columns, packed, work):  # type: ignore[no-untyped-def]
        """Do with the weights of a range of queries and columns what the target wants; `rows` are of a query head.

        Tiles of rows begin with the first row.
        """
        digest                          # noqa: B018
        head = rows.head
        tile = packed.tile
        size = tile * block.k.shape[2]
        first_slot = head // (block.q.shape[1] // block.k.shape[1]) * packed.tiles
        height = len(work.s)
        for first in range(rows.first, rows.first + rows.n_rows, height):
            count = min(height, rows.first + rows.n_rows - first)
            whole = -(-count // ROWS) * ROWS
            load_weight_rows(block, lse, first, count, whole, head, work)
            load_row_scores(first, count, whole, head, 1, score)
            for number in range(len(block.begin)):
                if len(block.begin) > 1:
                    see_interval(block, number, first, count, count, 1, work)
                a, b = visible(work.low, work.high, whole, columns.start, columns.stop)
                for at in range(a - (a - columns.origin) % tile, b, tile):
                    n = min(tile, columns.stop - at)
                    find_groups(whole, work.low, work.high, at, n, lanes(work.s), work.groups)
                    if any_sees(whole, work.groups):
                        place = (first_slot + (at - columns.origin) // tile) * size
                        score_panels(whole, n, work.queries, work.s, work.groups, Contiguous(packed.keys, place),
                                     address(packed.keys) + (place + size) * packed.keys.itemsize)
                        reduce_tile(Tile(whole, head, at, n), first, count, head, work, target, block.scale, score)

    return pack_weight_keys, reduce_keys


def compile_for(function: Any, *arguments: Any) -> None:
    """Call a function for the first time; where its machine code can't be saved, go on without. Local."""
    try:
        function(*arguments)
    except OSError as error:              # a full disk, a quota: by now it is compiled
        _warn(error)
        function(*arguments)


def _warn(error: Exception) -> None:
    """Say once, on the launcher's rank 0, that there is no cache."""
    if launched_rank() == 0:
        warn_once(f"kernels are compiled anew in every process: {error}; set NUMBA_CACHE_DIR to a folder "
                  "that can be written")


def _compiled(functions: tuple[Any, ...]) -> Iterator[Any]:
    """Wrap functions for Numba, with a cache on disk where there is a folder to write to.

    They, and what they call, count no references to arrays: the caller holds them all, and an atomic addition for each
    tuple in a loop was half of the time of few rows and a third of narrow windows. So they can allocate nothing, and
    `a[:] = b` is a loop.
    """
    options: Any = {"nogil": True, "error_model": "numpy", "_nrt": False}       # the last is not in Numba's annotations
    for function in functions:
        compiled: Any = numba.njit(**options)(function)
        try:
            compiled._cache = KernelCache(function)       # as enable_caching does, with Numba's own
        except RuntimeError as error:
            _warn(error)
        yield compiled


(pack_forward, forward_keys, merge_states, finish_rows, combine_rows, pack_backward, backward_keys, add_sums,
 survey_values, pack_units, forward_units, pack_tiles_backward, backward_on_tiles, pack_weight_keys,
 reduce_keys) = _compiled(_forward(_digest()) + _backward(_digest()) + _forward_on_tiles(_digest())
                          + _backward_on_tiles(_digest()) + _reductions(_digest()))
