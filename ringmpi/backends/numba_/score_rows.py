"""Score functions on a group of rows: products to scores before the softmax, weights to dropped weights after it.

One vector takes about 25 instructions for a softcap (half of them a division's), 5 for slopes, 2 for a bias, 8 for one
by distance where keys follow each other, and 100 for dropout: Philox is ten products of 32 by 32 bits. Which of them
there are is known at run time alone, so each vector asks; the branches always go the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .product import ROWS
from .relative_rows import RelativeEmitter, load_row_places, relative_from
from .tuples import ScoreArguments
from .vector import I64, Vectors, at, constant, data, loop, unpack


class ScoreEmitter:
    """Emits score functions of a vector of keys, from column j on, for rows of a group.

    `score` is a `ScoreArguments` with pointers; of the row's numbers, which go to every lane, only those that are asked
    for are loaded.
    """

    def __init__(self, vectors: Vectors, score: Any, row: Any, start: Any) -> None:
        self.v = vectors
        self.score = score
        self.keys = at(vectors.builder, score.keys, start)
        self.position = splats(vectors, score.position, row)
        self.bias = [at(vectors.builder, at(vectors.builder, score.bias, place), start)
                     for place in numbers_of(vectors.builder, score.bias_at, row)]
        self.relative = RelativeEmitter(vectors, score.relative, row, start)

    def apply(self, s: list[Any], j: Any, slope: list[Any]) -> list[tuple[Any, Any]]:
        """Turn products of each row into scores; give their derivative by scale·product too."""
        x, derivatives = zip(*(self._of_row(products, i, j, slope) for i, products in enumerate(s)), strict=True)
        return list(zip(self.relative.add(list(x), j), derivatives, strict=True))

    def _of_row(self, s: Any, i: int, j: Any, slope: list[Any]) -> tuple[Any, Any]:
        """Turn products of row i into scores, but for a bias by distance; give their derivative too."""
        v, b, score = self.v, self.v.builder, self.score
        x = b.fmul(s, v.splat(score.ratio))

        def capped() -> list[Any]:
            bounded = v.tanh(x)
            return [b.fmul(bounded, v.splat(score.cap)), b.fsub(v.number(1.0), b.fmul(bounded, bounded))]

        has_cap = b.fcmp_unordered("!=", score.cap, ir.Constant(v.element, 0.0))
        x, derivative = self._if(has_cap, capped, [x, v.number(1.0)])

        def sloped() -> list[Any]:
            k = self._positions(j)
            later = b.icmp_signed(">", self.position[i], k)
            distance = b.select(later, b.sub(self.position[i], k), b.sub(k, self.position[i]))      # up to 2^32
            return [b.fsub(x, b.fmul(slope[i], b.uitofp(distance, v.kind)))]

        x, = self._if(score.sloped, sloped, [x])
        x, = self._if(score.biased, lambda: [self.with_bias(x, i, j)], [x])
        return x, derivative

    def with_bias(self, x: Any, i: int, j: Any) -> Any:
        """Add the bias of the keys."""
        return self.v.builder.fadd(x, self.v.load(self.bias[i], j))

    def drop(self, x: list[Any], i: int, j: Any, dropout_key: list[Any]) -> list[Any]:
        """Multiply vectors by 0 or the gain; as they are where the gain is 0."""
        v, b, score = self.v, self.v.builder, self.score

        def dropped() -> list[Any]:
            words = v.random_words(dropout_key[i], self.position[i], self._positions(j))
            limit = v.splat(score.threshold if v.integer == I64 else b.trunc(score.threshold, v.integer))
            factor = v.where(b.icmp_unsigned(">=", words, limit), v.splat(score.gain), v.number(0.0))
            return [b.fmul(y, factor) for y in x]

        return self._if(b.fcmp_unordered("!=", score.gain, ir.Constant(v.element, 0.0)), dropped, x)

    def _positions(self, j: Any) -> Any:
        b = self.v.builder
        result = b.load(b.bitcast(at(b, self.keys, j), self.v.bits.as_pointer()))
        result.align = 1
        return result

    def _if(self, condition: Any, make: Callable[[], list[Any]], otherwise: list[Any]) -> list[Any]:
        b = self.v.builder
        slots = [cgutils.alloca_once(b, self.v.kind) for _ in otherwise]
        for slot, x in zip(slots, otherwise, strict=True):
            b.store(x, slot)
        with b.if_then(condition):
            for slot, x in zip(slots, make(), strict=True):
                b.store(x, slot)
        return [b.load(slot) for slot in slots]


@intrinsic
def apply_score(context, s, row, row_keys, columns, score):  # type: ignore[no-untyped-def]
    """Turn products into scores, in place: rows row..row + ROWS of s (rows, row_keys), all of `columns`."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        s = data(context, builder, signature.args[0], values[0])
        columns, score = (unpack(context, builder, signature.args[i], values[i]) for i in (3, 4))
        v = Vectors(builder, signature.args[0].dtype)
        emitter = ScoreEmitter(v, score, values[1], columns.start)
        slope = splats(v, score.slope, values[1])
        for j, places in _each(v, values[1], values[2], columns):
            scores = emitter.apply([v.load(s, place) for place in places], j, slope)
            for (x, _), place in zip(scores, places, strict=True):
                v.store(x, s, place)
        return context.get_dummy_value()

    return types.void(s, row, row_keys, columns, score), emit


@intrinsic
def apply_dropout(context, p, row, row_keys, columns, score):  # type: ignore[no-untyped-def]
    """Multiply weights by 0 or the gain, in place; the arguments are those of `apply_score`."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        p = data(context, builder, signature.args[0], values[0])
        columns, score = (unpack(context, builder, signature.args[i], values[i]) for i in (3, 4))
        v = Vectors(builder, signature.args[0].dtype)
        emitter = ScoreEmitter(v, score, values[1], columns.start)
        dropout_key = splats(v, score.dropout_key, values[1])
        for j, places in _each(v, values[1], values[2], columns):
            for i, place in enumerate(places):
                x, = emitter.drop([v.load(p, place)], i, j, dropout_key)
                v.store(x, p, place)
        return context.get_dummy_value()

    return types.void(p, row, row_keys, columns, score), emit


@numba.njit
def load_row_scores(first, count, rows, head, group, score):  # type: ignore[no-untyped-def]
    """Set what the score needs to know of each row; see `forward_tile.load_forward_rows`."""
    if score is not None:
        for r in range(rows):
            i, h = (first + min(r, count - 1)) // group, head * group + (first + min(r, count - 1)) % group
            score.slope[r] = score.slopes[h]
            score.dropout_key[r] = score.dropout_keys[h]
            score.position[r] = score.queries[i]
            score.bias_at[r] = h * score.bias_step
            score.sums_at[r] = (h - head * group) * score.sums_step
            load_row_places(score.relative, r, i, h, h - head * group)


def score_arguments_from(score, row):  # type: ignore[no-untyped-def]
    """Give the score of the rows of the work space from `row` on; None if it is plain."""
    raise NotImplementedError("typed by Numba")


@overload(score_arguments_from)
def _score_arguments_from(score, row):  # type: ignore[no-untyped-def]
    return (lambda score, row: None) if isinstance(score, types.NoneType) else _rows_from


def _rows_from(score, row):  # type: ignore[no-untyped-def]
    return ScoreArguments(score.ratio, score.cap, score.sloped, score.biased, score.only_biased, score.threshold,
                          score.gain, score.slopes, score.dropout_keys, score.queries, score.keys, score.bias,
                          score.bias_step, score.bias_sums, score.sums_step, score.slope[row:], score.dropout_key[row:],
                          score.position[row:], score.bias_at[row:], score.sums_at[row:],
                          relative_from(score.relative, row))


def splats(v: Vectors, numbers: Any, row: Any) -> list[Any]:
    """Load the numbers of rows row..row + ROWS, each to every lane."""
    return [v.splat(number) for number in numbers_of(v.builder, numbers, row)]


def numbers_of(builder: Any, numbers: Any, row: Any) -> list[Any]:
    """Load the numbers of rows row..row + ROWS."""
    return [builder.load(at(builder, numbers, builder.add(row, constant(i)))) for i in range(ROWS)]


def _each(v: Vectors, row: Any, row_keys: Any, columns: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Emit a loop over the vectors of `columns`, and give the column, and its place for each row of a group."""
    b = v.builder
    places = [b.mul(b.add(row, constant(i)), row_keys) for i in range(ROWS)]
    with loop(b, constant(0), b.sdiv(b.sub(columns.last, columns.first), constant(v.lanes))) as n:
        j = b.add(columns.first, b.mul(n, constant(v.lanes)))
        yield j, [b.add(place, j) for place in places]
