"""Packing for the tile unit: into tiles of A and of B as `amx` describes them; a tile is 1 KiB.

bfloat16 goes as it came, float32 in three pieces (see `pieces`), whose tiles lie side by side.

* *rows*: A of numbers along the product's depth. 16 tokens × 32 numbers, as they are.
* *transposed*: B of numbers along the product's depth, as keys are to scores. 16 tokens × 32 numbers, pairs of numbers
  of the 16 tokens side by side.
* *interleaved*: B of tokens along the product's depth, as values are to weights. 32 tokens × 16 numbers, pairs of
  tokens side by side.

What is absent is zeros: tokens after the last, numbers after the last, and numbers that are *odd*: what multiplies by
tiles cannot take them; a `Span` says which. Lanes are 16, whatever the CPU's vectors, so that any CPU can pack.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .amx import DEPTH, I16, I32, ROWS, SINGLES, TILE, lanes
from .pack import place_of
from .pieces import joined_row, odd_singles, odd_words, split, tile_size
from .tuples import Contiguous, Strided
from .vector import at, constant, dtype_of, load, loop, store, unpack

WORD_ROW = ir.VectorType(I16, DEPTH)
PAIR_ROW = ir.VectorType(I32, ROWS)


@intrinsic
def copy_row(context, x, y, numbers, span):  # type: ignore[no-untyped-def]
    """One row of a tile of A, at `y`, `Contiguous`, from up to 32 numbers at `x`, `Strided`; say if none is odd."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        source = _Square(context, builder, signature, values, constant(1), values[2], 1)
        y = unpack(context, builder, signature.args[1], values[1])
        for piece, row in enumerate(source.row(0)):
            store(builder, row, at(builder, y.array, y.at), constant(piece * TILE))
        return source.is_even()

    return types.boolean(x, y, numbers, span), emit


@intrinsic
def transpose_words(context, x, y, rows, numbers, span):  # type: ignore[no-untyped-def]
    """One tile of B, at `y`, `Contiguous`, from up to 16 rows of up to 32 numbers at `x`, `Strided`.

    Say if no number is odd.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        source = _Square(context, builder, signature, values, *values[2:4], ROWS)
        y = unpack(context, builder, signature.args[1], values[1])
        rows = [source.row(i) for i in range(ROWS)]
        for piece, words in enumerate(zip(*rows, strict=True)):
            for i, row in enumerate(_transposed(builder, [builder.bitcast(x, PAIR_ROW) for x in words])):
                store(builder, row, at(builder, y.array, y.at), constant(piece * TILE + i * DEPTH))
        return source.is_even()

    return types.boolean(x, y, rows, numbers, span), emit


@intrinsic
def interleave_rows(context, x, y, other, rows, numbers, span):  # type: ignore[no-untyped-def]
    """Two tiles of B from up to 32 rows of up to 32 numbers at `x`, `Strided`; say if none is odd.

    The first 16 columns go to `y`, `Contiguous`, the others to `other` elements after it.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        source = _Square(context, builder, signature, values, *values[3:5], DEPTH)
        y = unpack(context, builder, signature.args[1], values[1])
        target = at(builder, y.array, y.at)
        for i in range(0, DEPTH, 2):
            for piece, pair in enumerate(zip(source.row(i), source.row(i + 1), strict=True)):
                for half in (0, 1):
                    numbers = [ROWS * half + c // 2 + DEPTH * (c % 2) for c in range(DEPTH)]
                    store(builder, builder.shuffle_vector(*pair, lanes(numbers)),
                          at(builder, target, values[2]) if half else target, constant(piece * TILE + i // 2 * DEPTH))
        return source.is_even()

    return types.boolean(x, y, other, rows, numbers, span), emit


@numba.njit(error_model="numpy")
def steps(numbers):  # type: ignore[no-untyped-def]
    """Tiles, side by side, that hold so many numbers along the depth."""
    return -(-numbers // DEPTH)


@numba.njit(error_model="numpy")
def pack_rows(x, first, count, head, group, span, out, out_at):  # type: ignore[no-untyped-def]
    """Rows first..first+count of key head `head`, x `Tokens`, to tiles of A: for 16 rows all their depth.

    Row r is token r // group of head r % group. Rows go up to a whole tile. Say if no number is odd.
    """
    numbers = x.shape[2]
    depth, size = steps(numbers), tile_size(x.array)
    even = True
    for r in range(-(-count // ROWS) * ROWS):
        place = out_at + r // ROWS * depth * size + r % ROWS * DEPTH
        row = first + min(r, count - 1)
        source = place_of(x, row // group, head * group + row % group)
        for d in range(depth):
            even &= copy_row(Strided(x.array, source + d * DEPTH, 0), Contiguous(out, place + d * size),
                             min(DEPTH, numbers - d * DEPTH) if r < count else 0, span)
    return even


@numba.njit(error_model="numpy")
def pack_transposed(x, start, n, head, span, out, out_at):  # type: ignore[no-untyped-def]
    """Tokens start..start+n of `head`, x `Tokens`, to tiles of B: for 16 tokens all their depth; say if none is odd.

    Tokens go up to 32.
    """
    numbers = x.shape[2]
    depth, size = steps(numbers), tile_size(x.array)
    even = True
    for j in range(0, -(-n // DEPTH) * DEPTH, ROWS):
        for d in range(depth):
            even &= transpose_words(Strided(x.array, place_of(x, start + j, head) + d * DEPTH, x.token),
                                    Contiguous(out, out_at + (j // ROWS * depth + d) * size),
                                    min(max(n - j, 0), ROWS), min(numbers - d * DEPTH, DEPTH), span)
    return even


@numba.njit(error_model="numpy")
def pack_interleaved(x, start, n, head, span, out, out_at, column):  # type: ignore[no-untyped-def]
    """Tokens start..start+n of `head`, x `Tokens`, to tiles of B; say if no number is odd.

    For 16 numbers all tokens, 32 of them a tile; `column` elements after, the next 16 numbers. Numbers go up to 32.
    """
    numbers = x.shape[2]
    size = tile_size(x.array)
    even = True
    for c in range(0, numbers, DEPTH):
        for j in range(0, n, DEPTH):
            even &= interleave_rows(Strided(x.array, place_of(x, start + j, head) + c, x.token),
                                    Contiguous(out, out_at + c // ROWS * column + j // DEPTH * size), column,
                                    min(n - j, DEPTH), min(numbers - c, DEPTH), span)
    return even


class _Square:
    """Rows of 32 numbers; where not all are there they are copied first, with zeros for the absent.

    Parameters
    ----------
    signature, values
        Of an intrinsic whose first argument is a `Strided` of uint16 (bfloat16) or float32, and whose last a `Span`.
    rows, numbers : int64
        That are there.
    most : int
        Rows of the square.
    """

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, values: Any, rows: Any, numbers: Any,
                 most: int) -> None:
        b = builder
        x = unpack(context, b, signature.args[0], values[0])
        self._builder, self._span = b, unpack(context, b, signature.args[-1], values[-1])
        self._single = dtype_of(signature.args[0], "array") == types.float32
        self._odd: Any = None
        source = at(b, x.array, x.at)
        square = ir.ArrayType(ir.ArrayType(source.type.pointee, DEPTH), most)
        with b.goto_entry_block():
            spare = b.alloca(square)
            base, stride = b.alloca(source.type), b.alloca(x.row.type)
        b.store(source, base)
        b.store(x.row, stride)
        whole = b.and_(b.icmp_signed("==", rows, constant(most)), b.icmp_signed("==", numbers, constant(DEPTH)))
        with cgutils.if_unlikely(b, b.not_(whole)):
            b.store(ir.Constant(square, None), spare)
            first = b.bitcast(spare, source.type)
            with loop(b, constant(0), rows) as i, loop(b, constant(0), numbers) as c:
                b.store(b.load(at(b, source, b.add(b.mul(i, x.row), c))),
                        at(b, first, b.add(b.mul(i, constant(DEPTH)), c)))
            b.store(first, base)
            b.store(constant(DEPTH), stride)
        self._base, self._stride = b.load(base), b.load(stride)

    def row(self, i: int) -> list[Any]:
        """Give row i, its odd numbers 0, as 32 int16 for each piece."""
        b = self._builder
        place = at(b, self._base, b.mul(self._stride, constant(i)))
        if not self._single:
            return [self._even(load(b, place, constant(0), WORD_ROW), odd_words)]
        halves = [split(b, self._even(load(b, place, constant(half), SINGLES), odd_singles)) for half in (0, ROWS)]
        return [joined_row(b, low, high) for low, high in zip(*halves, strict=True)]

    def is_even(self) -> Any:
        """Whether no number of the rows that were given is odd."""
        b, kind = self._builder, ir.IntType(self._odd.type.count)
        return b.icmp_unsigned("==", b.bitcast(self._odd, kind), ir.Constant(kind, 0))

    def _even(self, x: Any, find: Any) -> Any:
        odd = find(self._builder, x, self._span)
        self._odd = odd if self._odd is None else self._builder.or_(self._odd, odd)
        return self._builder.select(odd, ir.Constant(x.type, None), x)


def _transposed(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """Turn 16 vectors of 16 words, in four steps of exchanging halves."""
    half = ROWS // 2
    while half:
        upper = lanes([t if not t & half else t - half + ROWS for t in range(ROWS)])
        lower = lanes([t + half if not t & half else t + ROWS for t in range(ROWS)])
        for i in range(ROWS):
            if not i & half:
                pair = rows[i], rows[i + half]
                rows[i], rows[i + half] = (builder.shuffle_vector(*pair, mask) for mask in (upper, lower))
        half //= 2
    return rows
