"""The register-blocked product: C = A·B or C = s·C + A·B for a few rows of C, with all of C in registers.

Registers. A block of C is `ROWS` × 4 vectors where there are 32 registers (24 accumulators, 4 vectors of B, the
broadcast of A) and `ROWS` × 2 where there are 16 (12 + 2 + 1). At each step of the depth, vectors of B and scalars of A
are loaded and every accumulator gets one multiply-add: 24 for 10 loads, so the multiply-add units are the limit.

Caches. B is a *panel*: depth × (vectors · lanes), contiguous, read in order; all row groups of a tile pass over it
while it is in cache. A is a few rows, C is touched once a call.

Elements are float32 or float64, or uint32 for a pair of bfloat16: then a step of the depth is a pair, and C is
float32. C is summed from zero and then added, so rounding grows with the depth of one panel, not of the sequence.

`dot_keys` and `add_values` are for a few rows that meet each key once: they read K and V as they came, so that memory
is the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector import Vectors, at, constant, data, dot_pairs, load, loop, machine, prefetch, splat

ROWS = 6
AHEAD = 16              # rows of V that `add_values` asks for ahead
VECTORS = 4 if machine().registers >= 32 else 2     # widest panel


@intrinsic
def scores(context, a, a_at, a_row, b, b_at, c, c_at, c_row, depth, ahead, stride):  # type: ignore[no-untyped-def]
    """C[ROWS, VECTORS·lanes] = A[ROWS, depth] · B[depth, VECTORS·lanes].

    `*_at` is the element where an operand starts in its array, `*_row` the elements from one row to the next; a panel
    of B has none but its width. Step i prefetches address ahead + i·stride, for a later call.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        a, b, c = _pointers(context, builder, signature, values, (0, 3, 5))
        block = _Registers(builder, signature.args[5].dtype, VECTORS)
        total = block.multiply(a, values[2], b, signature.args[3].dtype, *values[8:11])
        for i, row in enumerate(total):
            start = builder.mul(values[7], constant(i))
            for j, x in enumerate(row):
                block.vectors.store(x, c, builder.add(start, constant(j * block.vectors.lanes)))
        return context.get_dummy_value()

    return types.void(a, a_at, a_row, b, b_at, c, c_at, c_row, depth, ahead, stride), emit


@intrinsic
def add_product(context, a, a_at, a_row, b, b_at, c, c_at, c_row, depth, ahead, stride,  # type: ignore[no-untyped-def]
                shrink, shrink_at, vectors):
    """C[ROWS, n] = shrink[ROWS]·C + A[ROWS, depth] · B[depth, n] for n = vectors·lanes, 1 <= vectors <= VECTORS."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        a, b, c, shrink = _pointers(context, builder, signature, values, (0, 3, 5, 11))
        for block in _widths(builder, signature.args[5].dtype, values[13]):
            total = block.multiply(a, values[2], b, signature.args[3].dtype, *values[8:11])
            block.add(total, c, values[7], [builder.load(at(builder, shrink, i)) for i in range(ROWS)])
        return context.get_dummy_value()

    return types.void(a, a_at, a_row, b, b_at, c, c_at, c_row, depth, ahead, stride,
                      shrink, shrink_at, vectors), emit


@intrinsic
def add_turned(context, a, a_at, a_row, b, b_at, c, c_at, c_row, depth, ahead, stride,  # type: ignore[no-untyped-def]
               vectors):
    """C[ROWS, n] = C + A[depth, ROWS]ᵀ · B[depth, n]; else as `add_product`, of floats alone."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        a, b, c = _pointers(context, builder, signature, values, (0, 3, 5))
        for block in _widths(builder, signature.args[5].dtype, values[11]):
            total = block.multiply(a, values[2], b, signature.args[3].dtype, *values[8:11], True)
            block.add(total, c, values[7])
        return context.get_dummy_value()

    return types.void(a, a_at, a_row, b, b_at, c, c_at, c_row, depth, ahead, stride, vectors), emit


@intrinsic
def dot_keys(context, q, q_at, k, k_at, k_row, count, depth, s, s_at):  # type: ignore[no-untyped-def]
    """s[s_at:][:lanes] = scores of a row of `depth` numbers with keys `k_row` elements apart.

    Only `count` keys are there; the last stands in for the others. A key is read once, along its numbers; `lanes` keys
    at a time share the loads of the row and are summed across lanes together.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        q, k, s = _pointers(context, builder, signature, values, (0, 2, 7))
        row, count, depth = values[4:7]
        stored = signature.args[2].dtype
        v = Vectors(builder, signature.args[7].dtype)
        keys = []
        for i in range(v.lanes):
            beyond = builder.icmp_signed(">=", constant(i), count)
            number = builder.select(beyond, builder.sub(count, constant(1)), constant(i))
            keys.append(at(builder, k, builder.mul(number, row)))
        total = [cgutils.alloca_once(builder, v.kind) for _ in keys]
        for x in total:
            builder.store(v.number(0.0), x)
        pairs = stored == types.uint32
        whole = builder.udiv(depth, constant(v.lanes))
        with loop(builder, constant(0), whole) as i:
            place = builder.mul(i, constant(v.lanes))
            x = load(builder, q, place, v.bits if pairs else v.kind)
            for t, key in zip(total, keys, strict=True):
                later = at(builder, key, builder.add(place, builder.mul(row, constant(v.lanes))))
                prefetch(builder, builder.ptrtoint(later, constant(0).type))
                y = load(builder, key, place, v.bits) if pairs else v.widen(stored, key, place)
                old = builder.load(t)
                builder.store(dot_pairs(builder, old, x, y) if pairs else v.fma(x, y, old), t)
        v.store(v.across([builder.load(t) for t in total], builder.fadd, v.number(0.0)), s)
        with loop(builder, builder.mul(whole, constant(v.lanes)), depth) as place:
            x = splat(builder, builder.load(at(builder, q, place)), v.lanes)
            y = v.gather(types.float32 if pairs else stored, keys, place)
            old = v.load(s)
            v.store(dot_pairs(builder, old, x, y) if pairs else v.fma(x, y, old), s)
        return context.get_dummy_value()

    return types.void(q, q_at, k, k_at, k_row, count, depth, s, s_at), emit


@intrinsic
def add_values(context, p, p_at, v, v_at, v_row, count, columns, c, c_at, shrink):  # type: ignore[no-untyped-def]
    """c[c_at:][:columns] = shrink·c + p[p_at:][:count] · V; rows of V are `v_row` elements apart.

    The columns are whole vectors.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        p, values_, c = _pointers(context, builder, signature, values, (0, 2, 7))
        row, count, shrink = values[4], values[5], values[9]
        stored = signature.args[2].dtype
        v = Vectors(builder, signature.args[7].dtype)
        left = builder.udiv(values[6], constant(v.lanes))
        first = constant(0)
        for width in (8, 4, 2, 1):              # vectors of C in registers
            blocks = builder.udiv(left, constant(width))
            with loop(builder, constant(0), blocks) as block:
                at_column = builder.mul(builder.add(first, builder.mul(block, constant(width))), constant(v.lanes))
                places = [builder.add(at_column, constant(j * v.lanes)) for j in range(width)]
                total = [cgutils.alloca_once(builder, v.kind) for _ in places]
                for x in total:
                    builder.store(v.number(0.0), x)
                with loop(builder, constant(0), count) as j:
                    weight, source = v.splat(builder.load(at(builder, p, j))), at(builder, values_, builder.mul(j, row))
                    later = at(builder, source, builder.mul(row, constant(AHEAD)))
                    for x, place in zip(total, places, strict=True):
                        prefetch(builder, builder.ptrtoint(at(builder, later, place), constant(0).type))
                        builder.store(v.fma(weight, v.widen(stored, source, place), builder.load(x)), x)
                for x, place in zip(total, places, strict=True):
                    v.store(v.fma(v.load(c, place), v.splat(shrink), builder.load(x)), c, place)
            done = builder.mul(blocks, constant(width))
            first, left = builder.add(first, done), builder.sub(left, done)
        return context.get_dummy_value()

    return types.void(p, p_at, v, v_at, v_row, count, columns, c, c_at, shrink), emit


def _pointers(context: Any, builder: Any, signature: Any, values: Any, numbers: tuple[int, ...]) -> list[Any]:
    """Where each array argument starts: argument n at the element that argument n + 1 says."""
    return [at(builder, data(context, builder, signature.args[n], values[n]), values[n + 1]) for n in numbers]


class _Registers:
    """A block of C in registers: ROWS × `width` vectors of `dtype`."""

    def __init__(self, builder: ir.IRBuilder, dtype: types.Type, width: int) -> None:
        self.builder, self.width = builder, width
        self.vectors = Vectors(builder, dtype)

    def multiply(self, a: Any, a_row: Any, b: Any, stored: types.Type, depth: Any,
                 ahead: Any, stride: Any, turned: bool = False) -> list[list[Any]]:
        """Emit A·B over the depth, asking for address ahead + stride a step; give the accumulators.

        Rows of A are `a_row` elements apart; where it is `turned`, its columns are.
        """
        builder, v, zero = self.builder, self.vectors, self.vectors.number(0.0)
        total = [[cgutils.alloca_once(builder, v.kind) for _ in range(self.width)] for _ in range(ROWS)]
        for row in total:
            for x in row:
                builder.store(zero, x)
        rows = [at(builder, a, constant(i) if turned else builder.mul(a_row, constant(i))) for i in range(ROWS)]
        pairs = stored == types.uint32
        kind = v.bits if pairs else v.kind
        with loop(builder, constant(0), depth) as step:
            prefetch(builder, builder.add(ahead, builder.mul(step, stride)))
            start = builder.mul(step, constant(self.width * v.lanes))
            place = builder.mul(step, a_row) if turned else step
            panel = [load(builder, b, builder.add(start, constant(j * v.lanes)), kind) for j in range(self.width)]
            for i in range(ROWS):
                x = splat(builder, builder.load(at(builder, rows[i], place)), v.lanes)
                for j in range(self.width):
                    old = builder.load(total[i][j])
                    new = dot_pairs(builder, old, x, panel[j]) if pairs else v.fma(x, panel[j], old)
                    builder.store(new, total[i][j])
        return [[builder.load(x) for x in row] for row in total]

    def add(self, total: list[list[Any]], c: Any, c_row: Any, shrink: list[Any] | None = None) -> None:
        """Emit C = C + total, or shrink·C + total with a number for each row."""
        builder, v = self.builder, self.vectors
        for i, row in enumerate(total):
            start = builder.mul(c_row, constant(i))
            factor = v.splat(shrink[i]) if shrink else None
            for j, x in enumerate(row):
                place = builder.add(start, constant(j * v.lanes))
                old = v.load(c, place)
                v.store(v.fma(old, factor, x) if shrink else builder.fadd(old, x), c, place)


def _widths(builder: ir.IRBuilder, dtype: types.Type, vectors: Any) -> Iterator[_Registers]:
    """Emit a switch over the number of vectors in a panel; gives the block of C for each, where its code goes."""
    done = builder.append_basic_block("done")
    cases = builder.switch(builder.trunc(vectors, ir.IntType(8)), done)
    for width in range(1, VECTORS + 1):
        case = builder.append_basic_block(f"vectors{width}")
        cases.add_case(ir.Constant(ir.IntType(8), width), case)
        builder.position_at_end(case)
        yield _Registers(builder, dtype, width)
        builder.branch(done)
    builder.position_at_end(done)
