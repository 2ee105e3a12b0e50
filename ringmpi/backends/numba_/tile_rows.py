"""Scores to weights for the tile unit: rows of a block of 32, four at a time, in pieces that go between its products.

The vector units make weights of one unit's scores while the tile unit multiplies for others, so the softmax comes in
steps: `find_tops` once a strip of scores is there, `raise_block` once all are; `weigh_few` makes weights of a few rows
for a strip, between products; `add_sums` adds up. `hide` and `cap_scores` go over scores before, where they must.

What is subtracted from a row's scores is `ABOVE` more than the largest of the keys where it was last raised, and stays
until a score is beyond it; so acc and sums are hardly ever rescaled. The weights, at most 1, are 256 times smaller than
usual and as exact: floating point has no scale. What is done to a row depends on that row alone. Where a row sees
nothing its scores are -inf and its weights 0, which adds nothing to any sum: its bits do not depend on which keys the
others of its block see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .amx import DEPTH, I16, I64, ROWS, SINGLES, TILE
from .pieces import joined_row, split
from .tuples import TilePlaces
from .vector import Vectors, at, constant, load, loop, splat, store, unpack

QUAD = 4                    # rows that go side by side; PAIR where they go in pieces, which takes more registers
PAIR = 2
BLOCK = 2 * ROWS            # rows of a block: two tiles
KEYS = 192                  # keys of a unit: as in canonical order
STRIPS = KEYS // DEPTH      # of 32 keys
SQUARE = ROWS * ROWS       # numbers in a tile of scores or sums
ABOVE = 8 * math.log(2)
HIDDEN = float("-inf")


@intrinsic
def find_tops(context, places, s_at, tile, fresh):  # type: ignore[no-untyped-def]
    """Raise the largest scores of a block's rows, lane by lane, by two tiles of scores from `tile` on; or begin so."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        v = Vectors(b, types.float32)
        first = at(b, at(b, work.s, values[1]), b.mul(values[2], constant(SQUARE)))
        for half in (0, 1):
            with loop(b, constant(0), constant(ROWS // QUAD)) as i:
                quad = b.mul(i, constant(QUAD * ROWS))
                scores = at(b, at(b, first, half * KEYS * ROWS), quad)
                tops = at(b, at(b, work.tops, half * SQUARE), quad)
                for r in range(0, QUAD * ROWS, ROWS):
                    top = v.larger(v.load(scores, r), v.load(scores, r + SQUARE))
                    old = b.select(values[3], v.number(HIDDEN), v.load(tops, r))
                    v.store(v.larger(top, old), tops, r)
        return context.get_dummy_value()

    return types.void(places, s_at, tile, fresh), emit


@intrinsic
def raise_block(context, places, row, line, scale):  # type: ignore[no-untyped-def]
    """Raise what is subtracted from the scores of a block of rows, `row_max` from `row` on, if one of them is beyond.

    From `line` on `shrink` becomes the factor of what was summed before, and `shift` what to subtract. scale >= 0.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        v = Vectors(b, types.float32)
        hidden, zero = v.number(HIDDEN), v.number(0.0)
        for half in range(0, BLOCK, ROWS):
            row_max, shrink, shift = (at(b, at(b, x, i), half) for x, i in (
                (work.row_max, values[1]), (work.shrink, values[2]), (work.shift, values[2])))
            tops = v.across([v.load(work.tops, (half + i) * ROWS) for i in range(ROWS)], v.larger, hidden)
            scaled, old = b.fmul(tops, v.splat(values[3])), v.load(row_max)
            new = v.where(b.fcmp_ordered(">", scaled, old), b.fadd(scaled, v.number(ABOVE)), old)
            subtract = v.where(b.fcmp_ordered("==", new, hidden), zero, new)         # -inf - -inf would be NaN
            for x, place in ((new, row_max), (v.exp(b.fsub(old, subtract)), shrink), (subtract, shift)):
                v.store(x, place)
        return context.get_dummy_value()

    return types.void(places, row, line, scale), emit


@intrinsic
def weigh_few(context, places, s_at, p_at, line, in_block, strip, scale):  # type: ignore[no-untyped-def]
    """Weights of PAIR rows from row `in_block` of a block on, for a strip of keys: in p, and added to the sums.

    The scaled score is rounded as the maximum was, so that it gives no more than 1, however large.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        s_at, p_at, line, in_block, strip, scale = values[1:]
        v = Vectors(b, types.float32)
        scale = v.splat(scale)
        offset = b.add(s_at, b.mul(strip, constant(2 * SQUARE)))
        scores = [at(b, place, offset) for place in _score_rows(b, work.s, in_block)]
        pieces = signature.args[0].types[TilePlaces._fields.index("pieces")].count
        weights = at(b, _weight_row(b, work.p, in_block, pieces), b.add(p_at, b.mul(strip, constant(pieces * TILE))))
        sums = _sums(b, work.sums, in_block)
        shift = at(b, at(b, work.shift, line), in_block)
        subtract = [v.splat(b.load(at(b, shift, i))) for i in range(PAIR)]
        for i in range(PAIR):
            halves = [v.exp(b.fsub(b.fmul(v.load(scores[i], half * SQUARE), scale), subtract[i])) for half in (0, 1)]
            for piece, pair in enumerate(zip(*(split(b, half) for half in halves), strict=True)):
                store(b, joined_row(b, *pair), weights, constant(piece * TILE + i * DEPTH))
            v.store(b.fadd(v.load(sums[i]), b.fadd(*halves)), sums[i])
        return context.get_dummy_value()

    return types.void(places, s_at, p_at, line, in_block, strip, scale), emit


@intrinsic
def add_sums(context, places, row, line):  # type: ignore[no-untyped-def]
    """Shrink `row_sum` of a block of rows, add what their weights sum to, lane by lane, and clear that."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        v = Vectors(b, types.float32)
        for half in range(0, BLOCK, ROWS):
            lanes = [at(b, work.sums, (half + i) * ROWS) for i in range(ROWS)]
            total = v.across([v.load(place) for place in lanes], b.fadd, v.number(0.0))
            row_sum, shrink = at(b, at(b, work.row_sum, values[1]), half), at(b, at(b, work.shrink, values[2]), half)
            v.store(b.fadd(b.fmul(v.load(row_sum), v.load(shrink)), total), row_sum)
            for place in lanes:
                v.store(v.number(0.0), place)
        return context.get_dummy_value()

    return types.void(places, row, line), emit


@intrinsic
def any_shrinks(context, places, line):  # type: ignore[no-untyped-def]
    """Whether a factor of a block's rows, from `line` on, is not 1."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        v = Vectors(b, types.float32)
        place = at(b, work.shrink, values[1])
        others = [b.fcmp_unordered("!=", v.load(place, i), v.number(1.0)) for i in (0, ROWS)]
        return b.icmp_unsigned("!=", b.bitcast(b.or_(*others), I16), ir.Constant(I16, 0))

    return types.boolean(places, line), emit


@intrinsic
def any_fresh(context, places, row):  # type: ignore[no-untyped-def]
    """Whether a row of a block, from `row` on, has seen nothing."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        v = Vectors(b, types.float32)
        place = at(b, work.row_max, values[1])
        return v.any(b.or_(*(b.fcmp_ordered("==", v.load(place, i), v.number(HIDDEN)) for i in (0, ROWS))))

    return types.boolean(places, row), emit


@intrinsic
def hide(context, places, s_at, in_block, tile, low, high):  # type: ignore[no-untyped-def]
    """Of a row of a tile of scores, 16 columns of a unit, keep what stands in low <= column < high; -inf else."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        s_at, in_block, tile, low, high = values[1:]
        v = Vectors(b, types.float32)
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        place = at(b, at(b, _score_rows(b, work.s, in_block)[0], s_at), b.mul(tile, constant(SQUARE)))
        mask = v.inside(b.mul(tile, constant(ROWS)), low, high)
        v.store(v.where(mask, v.load(place), v.number(HIDDEN)), place)
        return context.get_dummy_value()

    return types.void(places, s_at, in_block, tile, low, high), emit


@intrinsic
def cap_scores(context, places, s_at, ratio, cap):  # type: ignore[no-untyped-def]
    """Make cap·tanh(ratio·x) of a tile of scores."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        v = Vectors(b, types.float32)
        s = at(b, pointers(b, unpack(context, b, signature.args[0], values[0])).s, values[1])
        ratio, cap = (v.splat(x) for x in values[2:])
        with loop(b, constant(0), constant(ROWS)) as i:
            place = at(b, s, b.mul(i, constant(ROWS)))
            v.store(b.fmul(v.tanh(b.fmul(v.load(place), ratio)), cap), place)
        return context.get_dummy_value()

    return types.void(places, s_at, ratio, cap), emit


@intrinsic
def scale_row(context, places, acc_at, factor, tiles):  # type: ignore[no-untyped-def]
    """Multiply a row of `tiles` tiles by a factor."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        v = Vectors(b, types.float32)
        acc = at(b, pointers(b, unpack(context, b, signature.args[0], values[0])).acc, values[1])
        factor = v.splat(values[2])
        with loop(b, constant(0), values[3]) as i:
            place = at(b, acc, b.mul(i, constant(SQUARE)))
            v.store(b.fmul(v.load(place), factor), place)
        return context.get_dummy_value()

    return types.void(places, acc_at, factor, tiles), emit


@intrinsic
def row_to_tiles(context, row, tiles, count, factor):  # type: ignore[no-untyped-def]
    """Copy a row of `count` numbers times a factor to tiles, 16 to each; `row` and `tiles` are addresses of float32."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        _copy_row(builder, values, (1, SQUARE // ROWS), lambda x, factor, zero: builder.fmul(x, factor))
        return context.get_dummy_value()

    return types.void(row, tiles, count, factor), emit


@intrinsic
def row_from_tiles(context, tiles, row, count, factor):  # type: ignore[no-untyped-def]
    """Copy it back, divided by the factor; -0 becomes 0."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        _copy_row(builder, values, (SQUARE // ROWS, 1),
                  lambda x, factor, zero: builder.fadd(builder.fdiv(x, factor), zero))
        return context.get_dummy_value()

    return types.void(tiles, row, count, factor), emit


@intrinsic
def add_part(context, places, column, tile, tiles):  # type: ignore[no-untyped-def]
    """Add four tiles of `part` to acc: column pair `column` of a block of rows that begins with a tile."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        b = builder
        v = Vectors(b, types.float32)
        work = pointers(b, unpack(context, b, signature.args[0], values[0]))
        column, tile, tiles = values[1:]
        part = at(b, work.part, b.mul(b.and_(column, constant(1)), constant(4 * SQUARE)))
        first = at(b, work.acc, b.mul(b.add(tile, b.shl(column, constant(1))), constant(SQUARE)))
        for half, acc in enumerate((first, at(b, first, b.mul(tiles, constant(SQUARE))))):
            with loop(b, constant(0), constant(2 * ROWS)) as i:
                place = b.mul(i, constant(ROWS))
                v.store(b.fadd(v.load(acc, place), v.load(at(b, part, half * 2 * SQUARE), place)), acc, place)
        return context.get_dummy_value()

    return types.void(places, column, tile, tiles), emit


@intrinsic
def integer_at(context, address, i):  # type: ignore[no-untyped-def]
    """Give int64 number i from an address on."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.load(at(builder, builder.inttoptr(values[0], I64.as_pointer()), values[1]))

    return types.int64(address, i), emit


@intrinsic
def single_at(context, address, i):  # type: ignore[no-untyped-def]
    """Give float32 number i from an address on."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.load(at(builder, builder.inttoptr(values[0], ir.FloatType().as_pointer()), values[1]))

    return types.float32(address, i), emit


@intrinsic
def add_single_at(context, address, i, x):  # type: ignore[no-untyped-def]
    """Add to float32 number i from an address on."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        place = at(builder, builder.inttoptr(values[0], ir.FloatType().as_pointer()), values[1])
        builder.store(builder.fadd(builder.load(place), values[2]), place)
        return context.get_dummy_value()

    return types.void(address, i, x), emit


def pointers(builder: ir.IRBuilder, places: TilePlaces) -> TilePlaces:
    """Make pointers of addresses."""
    words = {"queries": I16, "p": I16, "keys": I16, "values": I16, "low": I64, "high": I64}
    return TilePlaces(*(builder.inttoptr(x, words.get(name, ir.FloatType()).as_pointer()) if name != "pieces" else x
                        for name, x in zip(TilePlaces._fields, places, strict=True)))


def _copy_row(builder: ir.IRBuilder, values: Any, spread: tuple[int, int], change: Callable[..., Any]) -> None:
    """Copy `count` numbers, each 16 of them `spread` times 16 after those before; `change` gets them, a factor, 0."""
    b, single = builder, ir.FloatType()
    places = [b.inttoptr(x, single.as_pointer()) for x in values[:2]]
    whole, rest = b.lshr(values[2], constant(4)), b.and_(values[2], constant(ROWS - 1))
    factors = splat(b, values[3], ROWS)
    with loop(b, constant(0), whole) as i:
        source, target = (at(b, x, b.mul(i, constant(n * ROWS))) for x, n in zip(places, spread, strict=True))
        store(b, change(load(b, source, constant(0), SINGLES), factors, ir.Constant(SINGLES, [0.0] * ROWS)), target,
              constant(0))
    source, target = (at(b, x, b.mul(whole, constant(n * ROWS))) for x, n in zip(places, spread, strict=True))
    with loop(b, constant(0), rest) as i:
        b.store(change(b.load(at(b, source, i)), values[3], ir.Constant(single, 0.0)), at(b, target, i))


def _score_rows(builder: ir.IRBuilder, s: Any, in_block: Any) -> list[Any]:
    """Give where QUAD rows of scores begin; a column tile of theirs is SQUARE numbers further on."""
    b = builder
    half, row = b.lshr(in_block, constant(4)), b.and_(in_block, constant(ROWS - 1))
    first = at(b, s, b.add(b.mul(half, constant(KEYS // ROWS * SQUARE)), b.mul(row, constant(ROWS))))
    return [at(b, first, i * ROWS) for i in range(QUAD)]


def _weight_row(builder: ir.IRBuilder, p: Any, in_block: Any, pieces: int) -> Any:
    """Give where a row of weights begins; a strip is `pieces` tiles further on."""
    b = builder
    half, row = b.lshr(in_block, constant(4)), b.and_(in_block, constant(ROWS - 1))
    return at(b, p, b.add(b.mul(half, constant(STRIPS * pieces * TILE)), b.mul(row, constant(DEPTH))))


def _sums(builder: ir.IRBuilder, sums: Any, in_block: Any) -> Sequence[Any]:
    """Give where the sums of QUAD rows are, 16 lanes each."""
    b = builder
    return [at(b, sums, b.mul(b.add(in_block, constant(i)), constant(ROWS))) for i in range(QUAD)]
