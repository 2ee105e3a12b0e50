"""The register-blocked product: C = A·B or C = s·C + A·B for a few rows of C, with all of C in registers.

Registers. A block of C is `ROWS` × 4 vectors where there are 32 registers (24 accumulators, 4 vectors of B, the
broadcast of A) and `ROWS` × 2 where there are 16 (12 + 2 + 1). At each step of the depth, vectors of B and scalars of A
are loaded and every accumulator gets one multiply-add: 24 for 10 loads, so the multiply-add units are the limit. They
also do the scalar additions, so addresses are reckoned once in `UNROLLED` steps.

Caches. B is a *panel*: depth × (vectors · lanes), contiguous, read in order; all row groups of a tile pass over it
while it is in cache. A is a few rows, C is touched once a call.

Elements are float32 or float64, or uint32 for a pair of bfloat16: then a step of the depth is a pair, and C is
float32. C is summed from zero and then added, so rounding grows with the depth of one panel, not of the sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector import Vectors, at, cases, constant, dot_pairs, load, loop, machine, prefetch, splat, unpack

ROWS = 6
UNROLLED = 4            # steps of the depth in a round of the loop of a product
VECTORS = 4 if machine().registers >= 32 else 2     # widest panel


@intrinsic
def scores(context, a, b, c, depth, prefetched, vectors):  # type: ignore[no-untyped-def]
    """C[ROWS, n] = A[ROWS, depth] · B[depth, n] for n = vectors·lanes, 1 <= vectors <= VECTORS.

    A and C are `Strided`, the panel B is `Contiguous` with rows of VECTORS·lanes; `prefetched` is a `Prefetch`.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        a, b, c = operands(context, builder, signature, values, 3)
        for width in cases(builder, values[5], range(1, VECTORS + 1)):
            block = Registers(builder, b, Vectors(builder, c.dtype), width, VECTORS)
            total = block.multiply(a, values[3], cgutils.unpack_tuple(builder, values[4], 2))
            for i, row in enumerate(total):
                start = builder.mul(c.row, constant(i))
                for j, x in enumerate(row):
                    block.vectors.store(x, c.pointer, builder.add(start, constant(j * block.vectors.lanes)))
        return context.get_dummy_value()

    return types.void(a, b, c, depth, prefetched, vectors), emit


@intrinsic
def add_product(context, a, b, c, depth, prefetched, shrink, vectors):  # type: ignore[no-untyped-def]
    """C[ROWS, n] = shrink[ROWS]·C + A[ROWS, depth] · B[depth, n] for n = vectors·lanes, 1 <= vectors <= VECTORS.

    `shrink` is `Contiguous`, the others are as `scores` takes them.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        a, b, c = operands(context, builder, signature, values, 3)
        factors = unpack(context, builder, signature.args[5], values[5])
        factors_at = at(builder, factors.array, factors.at)
        for width in cases(builder, values[6], range(1, VECTORS + 1)):
            block = Registers(builder, b, Vectors(builder, c.dtype), width)
            total = block.multiply(a, values[3], cgutils.unpack_tuple(builder, values[4], 2))
            block.add(c, total, [builder.load(at(builder, factors_at, i)) for i in range(ROWS)])
        return context.get_dummy_value()

    return types.void(a, b, c, depth, prefetched, shrink, vectors), emit


@intrinsic
def add_transposed_product(context, a, b, c, depth, prefetched, vectors):  # type: ignore[no-untyped-def]
    """C[ROWS, n] = C + A[depth, ROWS]ᵀ · B[depth, n]; else as `add_product`, of floats alone."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        a, b, c = operands(context, builder, signature, values, 3)
        for width in cases(builder, values[5], range(1, VECTORS + 1)):
            block = Registers(builder, b, Vectors(builder, c.dtype), width)
            block.add(c, block.multiply(a, values[3], cgutils.unpack_tuple(builder, values[4], 2), transposed=True))
        return context.get_dummy_value()

    return types.void(a, b, c, depth, prefetched, vectors), emit


class Operand(NamedTuple):
    """A `Contiguous` or `Strided` argument: where it starts, elements between its rows if any, dtype of its array."""

    pointer: Any
    row: Any
    dtype: types.Type


def operands(context: Any, builder: Any, signature: Any, values: Any, count: int) -> list[Operand]:
    """Give the first `count` arguments as operands."""
    result = []
    for kind, value in zip(signature.args[:count], values[:count], strict=True):
        x = unpack(context, builder, kind, value)
        result.append(Operand(at(builder, x.array, x.at), getattr(x, "row", None), kind.types[0].dtype))
    return result


class Registers:
    """A block of C in registers, ROWS × `width` vectors, for a panel B that is as wide, or `pitch` vectors wide."""

    def __init__(self, builder: ir.IRBuilder, b: Operand, vectors: Vectors, width: int, pitch: int = 0) -> None:
        self.builder = builder
        self.b = b
        self.width = width
        self.pitch = pitch or width
        self.vectors = vectors

    def multiply(self, a: Operand, depth: Any, prefetched: Any, transposed: bool = False) -> list[list[Any]]:
        """Emit A·B, or Aᵀ·B, over the depth, asking for an address a step; give the accumulators."""
        builder, v = self.builder, self.vectors
        zero = v.number(0.0)
        ahead, stride = prefetched
        total = [[cgutils.alloca_once(builder, v.kind) for _ in range(self.width)] for _ in range(ROWS)]
        for row in total:
            for x in row:
                builder.store(zero, x)

        pairs = self.b.dtype == types.uint32
        kind = v.bits if pairs else v.kind
        along = constant(1) if transposed else a.row            # from a number of A to that of the next row of C
        across = a.row if transposed else constant(1)           # to that of the next step

        def multiply_add(step: Any, offset: int) -> None:
            source = at(builder, self.b.pointer, builder.mul(step, constant(self.pitch * v.lanes)))
            panel = [load(builder, source, (offset * self.pitch + j) * v.lanes, kind) for j in range(self.width)]
            column = at(builder, a.pointer, builder.mul(builder.add(step, constant(offset)), across))
            for i in range(ROWS):
                x = splat(builder, builder.load(at(builder, column, builder.mul(along, constant(i)))), v.lanes)
                for j in range(self.width):
                    old = builder.load(total[i][j])
                    new = dot_pairs(builder, old, x, panel[j]) if pairs else v.fma(x, panel[j], old)
                    builder.store(new, total[i][j])

        blocks = builder.sdiv(depth, constant(UNROLLED))
        with loop(builder, constant(0), blocks) as block:
            step = builder.mul(block, constant(UNROLLED))
            for offset in range(UNROLLED):
                if offset % 2 == 0:
                    prefetch(builder, builder.add(ahead, builder.mul(builder.add(step, constant(offset)), stride)))
                multiply_add(step, offset)
        with loop(builder, builder.mul(blocks, constant(UNROLLED)), depth) as step:
            multiply_add(step, 0)
        return [[builder.load(x) for x in row] for row in total]

    def add(self, c: Operand, total: list[list[Any]], shrink: list[Any] | None = None) -> None:
        """Emit C = C + total, or shrink·C + total with a number for each row."""
        builder, v = self.builder, self.vectors
        for i, row in enumerate(total):
            start = builder.mul(c.row, constant(i))
            factor = v.splat(shrink[i]) if shrink else None
            for j, x in enumerate(row):
                place = builder.add(start, constant(j * v.lanes))
                old = v.load(c.pointer, place)
                v.store(v.fma(old, factor, x) if shrink else builder.fadd(old, x), c.pointer, place)
