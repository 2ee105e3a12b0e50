"""The register-blocked product: C = A·B or C = s·C + A·B for a few rows of C, with all of C in registers.

Registers. A block of C is `ROWS` × 4 vectors where there are 32 registers (24 accumulators, 4 vectors of B, the
broadcast of A) and `ROWS` × 2 where there are 16 (12 + 2 + 1). At each step of the depth, vectors of B and scalars of A
are loaded and every accumulator gets one multiply-add: 24 for 10 loads, so the multiply-add units are the limit.

Caches. B is a *panel*: depth × (vectors · lanes), contiguous, read in order; all row groups of a tile pass over it while it
is in cache. A is a few rows, C is touched once a call.

Elements are float32 or float64, or uint32 for a pair of bfloat16: then a step of the depth is a pair, and C is
float32. C is summed from zero and then added, so rounding grows with the depth of one panel, not of the sequence.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector import Vectors, at, constant, data, dot_pairs, load, loop, machine, prefetch, splat

ROWS = 6
VECTORS = 4 if machine().registers >= 32 else 2     # widest panel


@intrinsic
def scores(context, a, a_at, a_row, b, b_at, c, c_at, c_row, depth, ahead, ahead_at, stride):  # type: ignore[no-untyped-def]
    """C[ROWS, VECTORS·lanes] = A[ROWS, depth] · B[depth, VECTORS·lanes].

    `*_at` is the element where an operand starts in its array, `*_row` the elements from one row to the next; a panel
    of B has none but its width. Step i prefetches element ahead_at + i·stride of `ahead`, for a later call.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        a, b, c, ahead = _pointers(context, builder, signature, values, (0, 3, 5, 9))
        block = _Block(builder, signature.args[5].dtype, VECTORS)
        total = block.multiply(a, values[2], b, signature.args[3].dtype, values[8], ahead, values[11])
        for i, row in enumerate(total):
            start = builder.mul(values[7], constant(i))
            for j, x in enumerate(row):
                block.vectors.store(x, c, builder.add(start, constant(j * block.vectors.lanes)))
        return context.get_dummy_value()

    return types.void(a, a_at, a_row, b, b_at, c, c_at, c_row, depth, ahead, ahead_at, stride), emit


@intrinsic
def add_product(context, a, a_at, a_row, b, b_at, c, c_at, c_row, depth, ahead, ahead_at, stride, shrink, shrink_at, vectors):  # type: ignore[no-untyped-def]
    """C[ROWS, n] = shrink[ROWS]·C + A[ROWS, depth] · B[depth, n], where n = vectors·lanes and 1 <= vectors <= VECTORS."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        a, b, c, ahead, shrink = _pointers(context, builder, signature, values, (0, 3, 5, 9, 12))
        choice = builder.trunc(values[14], ir.IntType(8))
        done = builder.append_basic_block("done")
        cases = builder.switch(choice, done)
        for width in range(1, VECTORS + 1):
            case = builder.append_basic_block(f"vectors{width}")
            cases.add_case(ir.Constant(ir.IntType(8), width), case)
            builder.position_at_end(case)
            block = _Block(builder, signature.args[5].dtype, width)
            total = block.multiply(a, values[2], b, signature.args[3].dtype, values[8], ahead, values[11])
            for i, row in enumerate(total):
                factor = block.vectors.splat(builder.load(at(builder, shrink, i)))
                start = builder.mul(values[7], constant(i))
                for j, x in enumerate(row):
                    place = builder.add(start, constant(j * block.vectors.lanes))
                    old = block.vectors.load(c, place)
                    block.vectors.store(block.vectors.fma(old, factor, x), c, place)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(a, a_at, a_row, b, b_at, c, c_at, c_row, depth, ahead, ahead_at, stride,
                      shrink, shrink_at, vectors), emit


def _pointers(context: Any, builder: Any, signature: Any, values: Any, numbers: tuple[int, ...]) -> list[Any]:
    """Where each array argument starts: argument n at the element that argument n + 1 says."""
    return [at(builder, data(context, builder, signature.args[n], values[n]), values[n + 1]) for n in numbers]


class _Block:
    """A block of C in registers: ROWS × `width` vectors of `dtype`."""

    def __init__(self, builder: ir.IRBuilder, dtype: types.Type, width: int) -> None:
        self.builder, self.width = builder, width
        self.vectors = Vectors(builder, dtype)

    def multiply(self, a: Any, a_row: Any, b: Any, stored: types.Type, depth: Any,
                 ahead: Any, stride: Any) -> list[list[Any]]:
        """Emit A·B over the depth; give the accumulators."""
        builder, v, zero = self.builder, self.vectors, self.vectors.number(0.0)
        total = [[cgutils.alloca_once_value(builder, zero) for _ in range(self.width)] for _ in range(ROWS)]
        for row in total:
            for x in row:
                builder.store(zero, x)
        rows = [at(builder, a, builder.mul(a_row, constant(i))) for i in range(ROWS)]
        pairs = stored == types.uint32
        kind = v.bits if pairs else v.kind
        with loop(builder, constant(0), depth) as step:
            prefetch(builder, at(builder, ahead, builder.mul(step, stride)))
            start = builder.mul(step, constant(self.width * v.lanes))
            panel = [load(builder, b, builder.add(start, constant(j * v.lanes)), kind) for j in range(self.width)]
            for i in range(ROWS):
                x = splat(builder, builder.load(at(builder, rows[i], step)), v.lanes)
                for j in range(self.width):
                    old = builder.load(total[i][j])
                    new = dot_pairs(builder, old, x, panel[j]) if pairs else v.fma(x, panel[j], old)
                    builder.store(new, total[i][j])
        return [[builder.load(x) for x in row] for row in total]
