"""float32 as three pieces of bfloat16, for the tile unit: split, joined to words, and which products of pieces count.

A float32 has 24 bits, a bfloat16 8. Cut off, not rounded: hi is the upper half of x, mid that of x - hi, lo that of
what is left. From 2^-103 on x = hi + mid + lo exactly; below, pieces under 2^-126 count as 0, which loses less than
2^-125. All have the sign of x, and nothing overflows. Of the nine products of x·y six are summed: hi·hi, hi·mid, hi·lo,
mid·hi, mid·mid, lo·hi. What is left out is below 2^-21 of x·y, and 2^-24 of it on the average. Products of two pieces
are exact in float32.

So there are numbers that are *odd* (`Span`), which go another way: they are zeros in the tiles, and what they give is
added one by one. The bounds (for scales up to `MOST_SCALE`; n keys, of up to 4096 numbers):

* A number of Q or K is odd from 2^60 on: sums of products stay finite, and what a product loses to small pieces is
  below 2^-125 (|q| + |k|), of a score below 2^-125 · 2^72 · 2^20 = 2^-33, where a weight is known to 2^-24.
* A number of V is odd below 2^-64, unless it is 0, and where it is not finite. A row's largest weight is at least 2^-8
  (`tile_rows.ABOVE`); each addition to a sum loses at most 2^-126, and so does each piece of a weight. So what a result
  loses is below n · 2^-115, or n · 2^-51 of the smallest value but 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import overload

from .amx import DEPTH, I32, ROWS, SINGLES, TILE, WORDS, lanes
from .tuples import Span
from .vector import splat

PIECES = 3
MOST_SCALE = 2.0**20
MOST_FACTOR = np.float32(2**60)
LEAST_VALUE = np.float32(2**-64)
ALL = Span(0, 256)                      # nothing is odd
FINITE = Span(0, 255)                   # infinity and NaN are
FACTORS = Span(0, 127 + 60)             # of numbers of Q and K in pieces
VALUES = Span(127 - 64, 255)            # of numbers of V in pieces
INTEGERS = ir.VectorType(I32, ROWS)


def split(builder: ir.IRBuilder, x: Any) -> list[Any]:
    """Split 16 float32 into what is left before each piece is taken: its upper half is that piece."""
    b, rests = builder, [x]
    for _ in range(PIECES - 1):
        upper = b.and_(b.bitcast(rests[-1], INTEGERS), ir.Constant(INTEGERS, [-1 << 16] * ROWS))
        rests.append(b.fsub(rests[-1], b.bitcast(upper, SINGLES)))
    return rests


def joined_row(builder: ir.IRBuilder, low: Any, high: Any) -> Any:
    """Give the upper halves of 2 × 16 float32 side by side: half a row of A each, as 32 int16."""
    return _upper(builder, low, high, [2 * i + 1 for i in range(DEPTH)])


def joined_pairs(builder: ir.IRBuilder, even: Any, odd: Any) -> Any:
    """Give the upper halves of 2 × 16 float32 in turns: a row of B, as 32 int16."""
    return _upper(builder, even, odd, [i // 2 * 2 + 1 + DEPTH * (i % 2) for i in range(DEPTH)])


def products_of(pieces: int) -> list[tuple[int, int]]:
    """Give the products of pieces that count: the piece of A, and of B; those of one piece of A follow each other."""
    return [(a, b) for a in range(pieces) for b in range(pieces - a)]


def odd_words(builder: ir.IRBuilder, x: Any, span: Span) -> Any:
    """Mask of the bfloat16 that are odd, of 32 int16."""
    return _odd(builder, x, span, 7)


def odd_singles(builder: ir.IRBuilder, x: Any, span: Span) -> Any:
    """Mask of the float32 that are odd, of 16."""
    return _odd(builder, builder.bitcast(x, INTEGERS), span, 23)


def tile_size(array):  # type: ignore[no-untyped-def]
    """Give the bfloat16 that a tile of an array's numbers takes, all pieces of them."""
    raise NotImplementedError("typed by Numba")


@overload(tile_size)
def _tile_size(array):  # type: ignore[no-untyped-def]
    size = TILE * pieces_of(array.dtype)
    return lambda array: size


def spans_of(array):  # type: ignore[no-untyped-def]
    """Give the spans of numbers of an array's dtype: those of Q and K, and those of V."""
    raise NotImplementedError("typed by Numba")


@overload(spans_of)
def _spans_of(array):  # type: ignore[no-untyped-def]
    factors, values = (FACTORS, VALUES) if pieces_of(array.dtype) > 1 else (ALL, FINITE)
    return lambda array: (factors, values)


def is_odd(value):  # type: ignore[no-untyped-def]
    """Whether a number of V is odd: a float32, or the bits of a bfloat16."""
    raise NotImplementedError("typed by Numba")


@overload(is_odd)
def _is_odd(value):  # type: ignore[no-untyped-def]
    if value is types.uint16:
        return lambda value: value & np.uint16(0x7F80) == np.uint16(0x7F80)
    return lambda value: value != 0 and not (LEAST_VALUE <= abs(value) < np.inf)


def all_pieces(array):  # type: ignore[no-untyped-def]
    """Give a tuple of as many numbers as an array's numbers have pieces."""
    raise NotImplementedError("typed by Numba")


@overload(all_pieces)
def _all_pieces(array):  # type: ignore[no-untyped-def]
    pieces = tuple(range(pieces_of(array.dtype)))
    return lambda array: pieces


def pieces_of(dtype: Any) -> int:
    """Give the pieces of numbers of a Numba dtype: float32, or uint16 (bfloat16)."""
    return PIECES if dtype == types.float32 else 1


def pieces_in(dtype: np.dtype[Any]) -> int:
    """Give the pieces of numbers of a NumPy dtype: float32 or bfloat16."""
    return PIECES if dtype == np.float32 else 1


def _upper(builder: ir.IRBuilder, x: Any, y: Any, numbers: list[int]) -> Any:
    return builder.shuffle_vector(builder.bitcast(x, WORDS), builder.bitcast(y, WORDS), lanes(numbers))


def _odd(builder: ir.IRBuilder, x: Any, span: Span, digits: int) -> Any:
    """Mask of the numbers with `digits` bits after the exponent that are odd."""
    b, kind = builder, x.type

    def all_lanes(number: Any) -> Any:
        return splat(b, b.trunc(number, kind.element), kind.count)

    bits = b.and_(x, ir.Constant(kind, [(256 << digits) - 1] * kind.count))
    exponent = b.lshr(bits, ir.Constant(kind, [digits] * kind.count))
    inside = b.and_(b.icmp_unsigned(">=", exponent, all_lanes(span.low)),
                    b.icmp_unsigned("<", exponent, all_lanes(span.high)))
    return b.and_(b.not_(inside), b.icmp_unsigned("!=", bits, ir.Constant(kind, None)))
