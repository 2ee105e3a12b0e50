"""Packing for the tile unit: bfloat16 as it came, into tiles of A and of B as `amx` describes them; a tile is 1 KiB.

* *rows*: A of numbers along the product's depth. 16 tokens × 32 numbers, as they are.
* *transposed*: B of numbers along the product's depth, as keys are to scores. 16 tokens × 32 numbers, pairs of numbers
  of the 16 tokens side by side.
* *interleaved*: B of tokens along the product's depth, as values are to weights. 32 tokens × 16 numbers, pairs of
  tokens side by side.

What is absent is zeros: tokens after the last, numbers after the last. Lanes are 16, whatever the CPU's vectors, so
that any CPU can pack.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .amx import DEPTH, I16, I32, ROWS, TILE, lanes
from .pack import place_of
from .tuples import Contiguous, Strided
from .vector import at, constant, load, loop, store, unpack

WORD_ROW = ir.VectorType(I16, DEPTH)
PAIR_ROW = ir.VectorType(I32, ROWS)
EXPONENT = 0x7F80           # of a bfloat16; all ones for infinity and NaN


@intrinsic
def transpose_words(context, x, y, rows, numbers):  # type: ignore[no-untyped-def]
    """One tile of B, at `y`, `Contiguous`, from up to 16 rows of up to 32 bfloat16 (uint16) at `x`, `Strided`."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        source = _Square(context, builder, signature.args[0], values[0], *values[2:], ROWS)
        y = unpack(context, builder, signature.args[1], values[1])
        words = [builder.bitcast(source.row(i), PAIR_ROW) for i in range(ROWS)]
        for i, row in enumerate(_transposed(builder, words)):
            store(builder, row, at(builder, y.array, y.at), constant(i * DEPTH))
        return context.get_dummy_value()

    return types.void(x, y, rows, numbers), emit


@intrinsic
def interleave_rows(context, x, y, other, rows, numbers):  # type: ignore[no-untyped-def]
    """Two tiles of B from up to 32 rows of up to 32 bfloat16 (uint16) at `x`, `Strided`; say if all are finite.

    The first 16 columns go to `y`, `Contiguous`, the others to `other` elements after it.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        source = _Square(context, builder, signature.args[0], values[0], *values[3:], DEPTH)
        y = unpack(context, builder, signature.args[1], values[1])
        target = at(builder, y.array, y.at)
        exponent = ir.Constant(WORD_ROW, [EXPONENT] * DEPTH)
        odd: Any = ir.Constant(ir.VectorType(ir.IntType(1), DEPTH), [0] * DEPTH)
        for i in range(0, DEPTH, 2):
            pair = source.row(i), source.row(i + 1)
            for x in pair:
                odd = builder.or_(odd, builder.icmp_unsigned("==", builder.and_(x, exponent), exponent))
            for half in (0, 1):
                numbers = [ROWS * half + c // 2 + DEPTH * (c % 2) for c in range(DEPTH)]
                store(builder, builder.shuffle_vector(*pair, lanes(numbers)),
                      at(builder, target, values[2]) if half else target, constant(i // 2 * DEPTH))
        return builder.icmp_unsigned("==", builder.bitcast(odd, I32), ir.Constant(I32, 0))

    return types.boolean(x, y, other, rows, numbers), emit


@intrinsic
def copy_words(context, x, y, numbers):  # type: ignore[no-untyped-def]
    """One row of A, at `y`, `Contiguous`, from up to 32 bfloat16 (uint16) at `x`, `Strided`."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        rows = builder.select(builder.icmp_signed(">", values[2], constant(0)), constant(1), constant(0))
        source = _Square(context, builder, signature.args[0], values[0], rows, values[2], 1)
        y = unpack(context, builder, signature.args[1], values[1])
        store(builder, source.row(0), at(builder, y.array, y.at), constant(0))
        return context.get_dummy_value()

    return types.void(x, y, numbers), emit


@numba.njit(error_model="numpy")
def steps(numbers):  # type: ignore[no-untyped-def]
    """Tiles, side by side, that hold so many numbers along the depth."""
    return -(-numbers // DEPTH)


@numba.njit(error_model="numpy")
def pack_rows(x, first, count, head, group, out, out_at):  # type: ignore[no-untyped-def]
    """Rows first..first+count of key head `head`, x `Tokens` of bits, to tiles of A: for 16 rows all their depth.

    Row r is token r // group of head r % group. Rows go up to a whole tile.
    """
    numbers = x.shape[2]
    depth = steps(numbers)
    for r in range(-(-count // ROWS) * ROWS):
        place = out_at + r // ROWS * depth * TILE + r % ROWS * DEPTH
        source = place_of(x, (first + min(r, count - 1)) // group, head * group + (first + min(r, count - 1)) % group)
        for d in range(depth):
            copy_words(Strided(x.array, source + d * DEPTH, 0), Contiguous(out, place + d * TILE),
                       min(DEPTH, numbers - d * DEPTH) if r < count else 0)


@numba.njit(error_model="numpy")
def pack_transposed(x, start, n, head, out, out_at):  # type: ignore[no-untyped-def]
    """Tokens start..start+n of `head`, x `Tokens` of bits, to tiles of B: for 16 tokens all their depth.

    Tokens go up to 32.
    """
    numbers = x.shape[2]
    depth = steps(numbers)
    for j in range(0, -(-n // DEPTH) * DEPTH, ROWS):
        for d in range(depth):
            transpose_words(Strided(x.array, place_of(x, start + j, head) + d * DEPTH, x.token),
                            Contiguous(out, out_at + (j // ROWS * depth + d) * TILE), min(max(n - j, 0), ROWS),
                            min(numbers - d * DEPTH, DEPTH))


@numba.njit(error_model="numpy")
def pack_interleaved(x, start, n, head, out, out_at, column):  # type: ignore[no-untyped-def]
    """Tokens start..start+n of `head`, x `Tokens` of bits, to tiles of B; say if all are finite.

    For 16 numbers all tokens, 32 of them a tile; `column` elements after, the next 16 numbers. Numbers go up to 32.
    """
    numbers = x.shape[2]
    finite = True
    for c in range(0, numbers, DEPTH):
        for j in range(0, n, DEPTH):
            finite &= interleave_rows(Strided(x.array, place_of(x, start + j, head) + c, x.token),
                                      Contiguous(out, out_at + c // ROWS * column + j // DEPTH * TILE), column,
                                      min(n - j, DEPTH), min(numbers - c, DEPTH))
    return finite


class _Square:
    """Rows of 32 bfloat16; where not all are there they are copied first, with zeros for the absent.

    Parameters
    ----------
    kind, value
        Of a `Strided` of uint16.
    rows, numbers : int64
        That are there.
    most : int
        Rows of the square.
    """

    def __init__(self, context: Any, builder: ir.IRBuilder, kind: Any, value: Any, rows: Any, numbers: Any, most: int
                 ) -> None:
        b = builder
        x = unpack(context, b, kind, value)
        source = at(b, x.array, x.at)
        with b.goto_entry_block():
            spare = b.alloca(ir.ArrayType(WORD_ROW, most))
            base, stride = b.alloca(source.type), b.alloca(x.row.type)
        b.store(source, base)
        b.store(x.row, stride)
        whole = b.and_(b.icmp_signed("==", rows, constant(most)), b.icmp_signed("==", numbers, constant(DEPTH)))
        with cgutils.if_unlikely(b, b.not_(whole)):
            b.store(ir.Constant(ir.ArrayType(WORD_ROW, most), None), spare)
            first = b.bitcast(spare, source.type)
            with loop(b, constant(0), rows) as i, loop(b, constant(0), numbers) as c:
                b.store(b.load(at(b, source, b.add(b.mul(i, x.row), c))),
                        at(b, first, b.add(b.mul(i, constant(DEPTH)), c)))
            b.store(first, base)
            b.store(constant(DEPTH), stride)
        self._builder = b
        self._base, self._stride = b.load(base), b.load(stride)

    def row(self, i: int) -> Any:
        """Give row i, as 32 int16."""
        b = self._builder
        return load(b, self._base, b.mul(self._stride, constant(i)), WORD_ROW)


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
