"""Scores to weights of bfloat16 for the tile unit: four rows of a strip of 32 keys at a time, between its products.

What is subtracted from a row's scores is `ABOVE` more than the largest of the first strip that the row sees, and stays.
So weights are made as soon as there are scores: nobody waits for a maximum. A unit's weights of a row sum to at most
`MOST`, or what is subtracted is raised by the unit's own largest score, which is rare; see `tile_strips`. The weights
are as exact whatever is subtracted: floating point has no scale. What is done to a row depends on that row alone, and
a key that it does not see adds 0 to its sums.

A strip's scores are four tiles: rows 0 to 15 × keys 0 to 15 and 16 to 31, then rows 16 to 31. `shift` is what is added
to a scaled score: -row_max, or 0 where that is -inf.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .amx import BYTES, DEPTH, I16, I32, ROWS, TILE, TILE_BYTES, load_tile, store_tile, to_row
from .tile_rows import ABOVE, BLOCK, HIDDEN, KEYS, QUAD, SQUARE, STRIPS, pointers
from .vector import LOG2E, Vectors, at, call, constant, store, unpack

MOST = KEYS * math.exp(-ABOVE)         # that a row's weights of a unit sum to: those of as many of the strip's largest
STRIP_BYTES = 4 * TILE_BYTES
QUARTERS = BLOCK // QUAD    # steps of the softmax of a strip

# 2^f for 0 <= f < 1 is 1 + f (c1 + f (c2 + ...)): minimax of the relative error, 8.2e-8, with the constant held at 1.
EXP2 = (0.69315131, 0.24016445, 0.05579991, 0.00901703, 0.00186713)
LEAST = -126.0              # the exponent of the smallest normal number


@intrinsic
def weigh_quad(context, places, s, p, row, in_block, scale):  # type: ignore[no-untyped-def]
    """Weights of QUAD rows from row `in_block` of a block, whose first is `row`: at p, rounded, and added to the sums.

    s is the address of the strip's scores, p that of its weights of the block's first 16 rows. The scaled score is
    rounded as the maximum was, so that the difference is right, however large they are.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        s, p, row, in_block, scale = values[1:]
        v = Vectors(b, types.float32)
        scale = v.splat(scale)
        half, r = b.lshr(in_block, constant(4)), b.and_(in_block, constant(ROWS - 1))
        scores = at(b, b.inttoptr(s, v.element.as_pointer()), b.add(b.mul(half, constant(2 * SQUARE)),
                                                                    b.mul(r, constant(ROWS))))
        weights = at(b, b.inttoptr(p, I16.as_pointer()), b.add(b.mul(half, constant(STRIPS * TILE)),
                                                               b.mul(r, constant(DEPTH))))
        sums = at(b, work.sums, b.mul(in_block, constant(ROWS)))
        shift = at(b, work.shift, b.add(row, in_block))
        for i in range(QUAD):
            add = v.splat(b.load(at(b, shift, i)))
            scaled = [b.fmul(v.load(scores, i * ROWS + side * SQUARE), scale) for side in (0, 1)]
            halves = [_exp2(v, b.fmul(b.fadd(x, add), v.number(LOG2E))) for x in scaled]
            store(b, to_row(b, *halves), weights, constant(i * DEPTH))
            v.store(b.fadd(v.load(sums, i * ROWS), b.fadd(*halves)), sums, i * ROWS)
        return context.get_dummy_value()

    return types.void(places, s, p, row, in_block, scale), emit


@intrinsic
def find_strip_tops(context, places, s, fresh):  # type: ignore[no-untyped-def]
    """Raise `tops`, lane by lane, by the scores of a strip at an address; or begin so."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        v = Vectors(b, types.float32)
        scores = b.inttoptr(values[1], v.element.as_pointer())
        for r in range(BLOCK):
            first = r // ROWS * 2 * SQUARE + r % ROWS * ROWS
            top = v.larger(v.load(scores, first), v.load(scores, first + SQUARE))
            old = b.select(values[2], v.number(HIDDEN), v.load(work.tops, r * ROWS))
            v.store(v.larger(top, old), work.tops, r * ROWS)
        return context.get_dummy_value()

    return types.void(places, s, fresh), emit


@intrinsic
def raise_rows(context, places, row, scale, fresh):  # type: ignore[no-untyped-def]
    """Raise what is subtracted from a block's rows from `row` on whose `tops` are beyond it: `row_max` and `shift`.

    Of those that have seen nothing, if `fresh`, else of those whose `totals` are beyond MOST. `shrink` becomes the
    factor of what was summed before, with which `row_sum` is multiplied. scale >= 0.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        row, scale, fresh = values[1:]
        v = Vectors(b, types.float32)
        hidden = v.number(HIDDEN)
        for half in range(0, BLOCK, ROWS):
            row_max, shift = (at(b, at(b, x, row), half) for x in (work.row_max, work.shift))
            tops = v.across([v.load(work.tops, (half + i) * ROWS) for i in range(ROWS)], v.larger, hidden)
            scaled, old = b.fmul(tops, v.splat(scale)), v.load(row_max)
            some = b.select(fresh, b.fcmp_ordered("==", old, hidden), _beyond(v, v.load(work.shrink, BLOCK + half)))
            new = v.where(b.and_(some, b.fcmp_ordered(">", scaled, old)), b.fadd(scaled, v.number(ABOVE)), old)
            subtract = v.where(b.fcmp_ordered("==", new, hidden), v.number(0.0), new)        # -inf - -inf would be NaN
            shrink, row_sum = v.exp(b.fsub(old, subtract)), at(b, at(b, work.row_sum, row), half)
            v.store(new, row_max)
            v.store(shrink, work.shrink, half)
            v.store(b.fmul(v.load(row_sum), shrink), row_sum)
            v.store(b.fneg(subtract), shift)
        return context.get_dummy_value()

    return types.void(places, row, scale, fresh), emit


@intrinsic
def total_rows(context, places):  # type: ignore[no-untyped-def]
    """Make totals of what the weights of a block's rows sum to, lane by lane, and clear that.

    Say if one is beyond MOST, as NaN is. The totals of a block are in `shrink`, after its factors.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        v = Vectors(b, types.float32)
        beyond = []
        for half in range(0, BLOCK, ROWS):
            lanes = [(half + i) * ROWS for i in range(ROWS)]
            total = v.across([v.load(work.sums, i) for i in lanes], b.fadd, v.number(0.0))
            v.store(total, work.shrink, BLOCK + half)
            beyond.append(_beyond(v, total))
            for i in lanes:
                v.store(v.number(0.0), work.sums, i)
        return v.any(b.or_(*beyond))

    return types.boolean(places), emit


@intrinsic
def add_totals(context, places, row):  # type: ignore[no-untyped-def]
    """Add the totals to `row_sum` of a block of rows from `row` on."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        v = Vectors(b, types.float32)
        for half in range(0, BLOCK, ROWS):
            row_sum = at(b, at(b, work.row_sum, values[1]), half)
            v.store(b.fadd(v.load(row_sum), v.load(work.shrink, BLOCK + half)), row_sum)
        return context.get_dummy_value()

    return types.void(places, row), emit


@intrinsic
def hide_in_strip(context, s, in_block, low, high):  # type: ignore[no-untyped-def]
    """Of a row of a strip at an address keep the scores of columns low <= column < high; -inf else."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        s, in_block, low, high = values
        v = Vectors(b, types.float32)
        half, r = b.lshr(in_block, constant(4)), b.and_(in_block, constant(ROWS - 1))
        first = at(b, b.inttoptr(s, v.element.as_pointer()), b.add(b.mul(half, constant(2 * SQUARE)),
                                                                   b.mul(r, constant(ROWS))))
        for side in (0, 1):
            mask = v.inside(constant(side * ROWS), low, high)
            v.store(v.where(mask, v.load(first, side * SQUARE), v.number(HIDDEN)), first, side * SQUARE)
        return context.get_dummy_value()

    return types.void(s, in_block, low, high), emit


@intrinsic
def keep_tiles(context, address):  # type: ignore[no-untyped-def]
    """Store the four tiles of sums and the two of A."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        first = builder.inttoptr(values[0], BYTES)
        for tile in range(6):
            store_tile(builder, tile, at(builder, first, tile * TILE_BYTES))
        return context.get_dummy_value()

    return types.void(address), emit


@intrinsic
def take_tiles(context, address):  # type: ignore[no-untyped-def]
    """Load them again; see `keep_tiles`."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        first = builder.inttoptr(values[0], BYTES)
        for tile in range(6):
            load_tile(builder, tile, at(builder, first, tile * TILE_BYTES))
        return context.get_dummy_value()

    return types.void(address), emit


def _beyond(v: Vectors, total: Any) -> Any:
    return v.builder.fcmp_unordered(">", total, v.number(MOST))


def _exp2(v: Vectors, y: Any) -> Any:
    """Give 2^y: exactly 1 at 0, 0 below the normal numbers, NaN for NaN, in AVX-512's own instructions for such.

    Lanes below the normal numbers are left out, for they would take a hundred times as long.
    """
    b, every, current, downwards = v.builder, ir.Constant(I16, -1), ir.Constant(I32, 4), ir.Constant(I32, 1)
    f = call(b, "llvm.x86.avx512.mask.reduce.ps.512", v.kind, [y, downwards, y, every, current])     # y - floor(y)
    p = v.number(EXP2[-1])
    for term in (*reversed(EXP2[:-1]), 1.0):
        p = v.fma(p, f, v.number(term))
    normal = b.bitcast(b.fcmp_unordered(">=", y, v.number(LEAST)), I16)                              # NaN is
    return call(b, "llvm.x86.avx512.mask.scalef.ps.512", v.kind, [p, y, v.number(0.0), normal, current])
