"""Score functions on a group of rows: products to scores before the softmax, weights to dropped weights after it.

One vector takes about 25 instructions for a softcap (half of them a division's), 5 for slopes and 100 for dropout:
Philox is ten products of 32 by 32 bits. Which of them there are is known at run time alone, so each vector asks; the
branches always go the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .product import ROWS
from .vector import I64, Vectors, at, constant, data, loop


class Shape(NamedTuple):
    """A score that is not plain, as the kernels take it; integers are as wide as the accumulator's numbers.

    Attributes
    ----------
    ratio, cap : number
        scale / softcap and softcap; scale and 0 without.
    sloped : bool
    threshold, gain : int64 and number
        Of dropout; gain is 0 without.
    slopes, streams : (heads,)
    queries, keys : (n_q,), (n_k + a vector,)
        Positions.
    slope, stream, position : (rows,)
        Of a thread: those of the rows that it works on.
    """

    ratio: Any
    cap: Any
    sloped: Any
    threshold: Any
    gain: Any
    slopes: Any
    streams: Any
    queries: Any
    keys: Any
    slope: Any
    stream: Any
    position: Any


class Shaper:
    """Emits score functions of one vector: of row i, whose numbers are splats, and of keys from j on."""

    def __init__(self, vectors: Vectors, keys: Any, position: list[Any]) -> None:
        self.v, self.keys = vectors, keys
        self.position = position

    def score(self, s: Any, i: int, j: Any, ratio: Any, cap: Any, sloped: Any, slope: list[Any]) -> tuple[Any, Any]:
        """Turn products into scores; give their derivative by scale·product too."""
        v, b = self.v, self.v.builder
        x = b.fmul(s, v.splat(ratio))

        def capped() -> list[Any]:
            bounded = v.tanh(x)
            return [b.fmul(bounded, v.splat(cap)), b.fsub(v.number(1.0), b.fmul(bounded, bounded))]

        x, derivative = self._if(b.fcmp_unordered("!=", cap, ir.Constant(v.element, 0.0)), capped, [x, v.number(1.0)])

        def biased() -> list[Any]:
            k = self._positions(j)
            later = b.icmp_signed(">", self.position[i], k)
            distance = b.select(later, b.sub(self.position[i], k), b.sub(k, self.position[i]))      # up to 2^32
            return [b.fsub(x, b.fmul(slope[i], b.uitofp(distance, v.kind)))]

        return self._if(sloped, biased, [x])[0], derivative

    def dropped(self, x: list[Any], i: int, j: Any, threshold: Any, gain: Any, stream: list[Any]) -> list[Any]:
        """Multiply vectors by 0 or the gain; as they are where the gain is 0."""
        v, b = self.v, self.v.builder

        def drop() -> list[Any]:
            words = v.random_words(stream[i], self.position[i], self._positions(j))
            limit = v.splat(threshold if v.integer == I64 else b.trunc(threshold, v.integer))
            factor = v.where(b.icmp_unsigned(">=", words, limit), v.splat(gain), v.number(0.0))
            return [b.fmul(y, factor) for y in x]

        return self._if(b.fcmp_unordered("!=", gain, ir.Constant(v.element, 0.0)), drop, x)

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
def turn_products(context, s, row, row_keys, first, last, start, ratio, cap, sloped,  # type: ignore[no-untyped-def]
                  slope, position, keys):
    """Turn products into scores, in place: rows row..row + ROWS, columns first..last (whole vectors) of s.

    Column j is key start + j; the other arguments are those of `Shape`.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        s, slope, position, keys = (data(context, builder, signature.args[i], values[i]) for i in (0, 9, 10, 11))
        v = Vectors(builder, signature.args[0].dtype)
        shaper = Shaper(v, at(builder, keys, values[5]), splats(v, position, values[1]))
        slopes = splats(v, slope, values[1])
        for i, j, place in _each(v, *values[1:5]):
            x, _ = shaper.score(v.load(s, place), i, j, *values[6:9], slopes)
            v.store(x, s, place)
        return context.get_dummy_value()

    return types.void(s, row, row_keys, first, last, start, ratio, cap, sloped, slope, position, keys), emit


@intrinsic
def drop_weights(context, p, row, row_keys, first, last, start, threshold, gain,  # type: ignore[no-untyped-def]
                 stream, position, keys):
    """Multiply weights by 0 or the gain, in place; the arguments are those of `turn_products`."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        p, stream, position, keys = (data(context, builder, signature.args[i], values[i]) for i in (0, 8, 9, 10))
        v = Vectors(builder, signature.args[0].dtype)
        shaper = Shaper(v, at(builder, keys, values[5]), splats(v, position, values[1]))
        streams = splats(v, stream, values[1])
        for i, j, place in _each(v, *values[1:5]):
            x, = shaper.dropped([v.load(p, place)], i, j, *values[6:8], streams)
            v.store(x, p, place)
        return context.get_dummy_value()

    return types.void(p, row, row_keys, first, last, start, threshold, gain, stream, position, keys), emit


@numba.njit
def turn(s, row, first, last, start, shape):  # type: ignore[no-untyped-def]
    """Turn products of a group of rows into scores, in place."""
    turn_products(s, row, s.shape[1], first, last, start, shape.ratio, shape.cap, shape.sloped,
                  shape.slope, shape.position, shape.keys)


@numba.njit
def drop(p, row, first, last, start, shape):  # type: ignore[no-untyped-def]
    """Drop weights of a group of rows, where there is dropout."""
    if shape.gain != 0:
        drop_weights(p, row, p.shape[1], first, last, start, shape.threshold, shape.gain,
                     shape.stream, shape.position, shape.keys)


@numba.njit
def load_traits(first, count, rows, head, group, shape):  # type: ignore[no-untyped-def]
    """Set what the score needs to know of each row; see `load_rows`."""
    if shape is not None:
        for r in range(rows):
            i, h = (first + min(r, count - 1)) // group, head * group + (first + min(r, count - 1)) % group
            shape.slope[r], shape.stream[r], shape.position[r] = shape.slopes[h], shape.streams[h], shape.queries[i]


@numba.njit
def shape_part(shape, row):  # type: ignore[no-untyped-def]
    """Give the score of the rows of the work space from `row` on."""
    if shape is None:
        return None
    ratio, cap, sloped, threshold, gain, slopes, streams, queries, keys, slope, stream, position = shape
    return Shape(ratio, cap, sloped, threshold, gain, slopes, streams, queries, keys,
                 slope[row:], stream[row:], position[row:])


def splats(v: Vectors, numbers: Any, row: Any) -> list[Any]:
    """Load the numbers of rows row..row + ROWS, each to every lane."""
    b = v.builder
    return [v.splat(b.load(at(b, numbers, b.add(row, constant(i))))) for i in range(ROWS)]


def _each(v: Vectors, row: Any, row_keys: Any, first: Any, last: Any) -> Iterator[tuple[int, Any, Any]]:
    """Emit a loop over the vectors of columns first..last, and give (i, column, place) for each row i of a group."""
    b = v.builder
    places = [b.mul(b.add(row, constant(i)), row_keys) for i in range(ROWS)]
    with loop(b, constant(0), b.sdiv(b.sub(last, first), constant(v.lanes))) as n:
        j = b.add(first, b.mul(n, constant(v.lanes)))
        for i, place in enumerate(places):
            yield i, j, b.add(place, j)
