"""The register-blocked product: C = A·B or C = s·C + A·B for a few rows of C, with all of C in registers.

Registers. A block of C is `ROWS` × 4 vectors where there are 32 registers (24 accumulators, 4 vectors of B, the
broadcast of A) and `ROWS` × 2 where there are 16 (12 + 2 + 1). At each step of the depth, vectors of B and scalars of A
are loaded and every accumulator gets one multiply-add: 24 for 10 loads, so the multiply-add units are the limit. They
also do the scalar additions, so addresses are reckoned once in `UNROLLED` steps.

Caches. B is a *panel*: depth × (vectors · lanes), contiguous, read in order; all row groups of a tile pass over it
while it is in cache. A is a few rows, C is touched once a call.

Elements are float32 or float64, or uint32 for a pair of bfloat16: then a step of the depth is a pair, and C is
float32. C is summed from zero and then added, so rounding grows with the depth of one panel, not of the sequence.

`dot_keys` and `add_values` are for a few rows that meet each key once: they read K and V as they came, so that memory
is the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector import Vectors, at, constant, dot_pairs, load, loop, machine, prefetch, splat, unpack

ROWS = 6
UNROLLED = 4            # steps of the depth in a round of the loop of a product
AHEAD = 16              # rows of V that `add_values` asks for ahead
STRIP = 16              # keys of a head that few rows meet before those of the next head: the tokens lie in a page each
VECTORS = 4 if machine().registers >= 32 else 2     # widest panel


@intrinsic
def scores(context, a, b, c, depth, prefetched):  # type: ignore[no-untyped-def]
    """C[ROWS, VECTORS·lanes] = A[ROWS, depth] · B[depth, VECTORS·lanes].

    A and C are `Strided`, the panel B is `Contiguous`; `prefetched` is a `Prefetch`.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        a, b, c = operands(context, builder, signature, values, 3)
        block = Registers(builder, b, Vectors(builder, c.dtype), VECTORS)
        total = block.multiply(a, values[3], cgutils.unpack_tuple(builder, values[4], 2))
        for i, row in enumerate(total):
            start = builder.mul(c.row, constant(i))
            for j, x in enumerate(row):
                block.vectors.store(x, c.pointer, builder.add(start, constant(j * block.vectors.lanes)))
        return context.get_dummy_value()

    return types.void(a, b, c, depth, prefetched), emit


@intrinsic
def add_product(context, a, b, c, depth, prefetched, shrink, vectors):  # type: ignore[no-untyped-def]
    """C[ROWS, n] = shrink[ROWS]·C + A[ROWS, depth] · B[depth, n] for n = vectors·lanes, 1 <= vectors <= VECTORS.

    `shrink` is `Contiguous`, the others are as `scores` takes them.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        a, b, c = operands(context, builder, signature, values, 3)
        factors = unpack(context, builder, signature.args[5], values[5])
        factors_at = at(builder, factors.array, factors.at)
        for width in _widths(builder, values[6]):
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
        for width in _widths(builder, values[5]):
            block = Registers(builder, b, Vectors(builder, c.dtype), width)
            block.add(c, block.multiply(a, values[3], cgutils.unpack_tuple(builder, values[4], 2), transposed=True))
        return context.get_dummy_value()

    return types.void(a, b, c, depth, prefetched, vectors), emit


@intrinsic
def dot_keys(context, q, k, s, count, depth):  # type: ignore[no-untyped-def]
    """s[:lanes] = scores of a row q of `depth` numbers with keys k; q and s are `Contiguous`, k is `Strided`.

    Only `count` keys are there; the last stands in for the others. A key is read once, along its numbers; `lanes` keys
    at a time share the loads of the row and are summed across lanes together.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        q, k, s = operands(context, builder, signature, values, 3)
        count, depth = values[3:]
        pairs = k.dtype == types.uint32
        v = Vectors(builder, s.dtype)

        # Where each key is; one accumulator for each.
        keys = []
        for i in range(v.lanes):
            beyond = builder.icmp_signed(">=", constant(i), count)
            number = builder.select(beyond, builder.sub(count, constant(1)), constant(i))
            keys.append(at(builder, k.pointer, builder.mul(number, k.row)))
        total = [cgutils.alloca_once(builder, v.kind) for _ in keys]
        for x in total:
            builder.store(v.number(0.0), x)

        # Whole vectors of the depth: a load of the row, and a load and a multiply-add for each key.
        whole = builder.udiv(depth, constant(v.lanes))
        with loop(builder, constant(0), whole) as i:
            place = builder.mul(i, constant(v.lanes))
            x = load(builder, q.pointer, place, v.bits if pairs else v.kind)
            for t, key in zip(total, keys, strict=True):
                later = at(builder, key, builder.add(place, builder.mul(k.row, constant(v.lanes))))
                prefetch(builder, builder.ptrtoint(later, constant(0).type))
                y = load(builder, key, place, v.bits) if pairs else v.widen(k.dtype, key, place)
                old = builder.load(t)
                builder.store(dot_pairs(builder, old, x, y) if pairs else v.fma(x, y, old), t)
        v.store(v.across([builder.load(t) for t in total], builder.fadd, v.number(0.0)), s.pointer)

        # What is left of the depth, a number of each key at a time.
        with loop(builder, builder.mul(whole, constant(v.lanes)), depth) as place:
            x = splat(builder, builder.load(at(builder, q.pointer, place)), v.lanes)
            y = v.gather(types.float32 if pairs else k.dtype, keys, place)
            old = v.load(s.pointer)
            v.store(dot_pairs(builder, old, x, y) if pairs else v.fma(x, y, old), s.pointer)
        return context.get_dummy_value()

    return types.void(q, k, s, count, depth), emit


@intrinsic
def add_values(context, p, v, c, count, columns, shrink):  # type: ignore[no-untyped-def]
    """c[:columns] = shrink·c + p[:count] · V; p and c are `Contiguous`, V is `Strided`.

    The columns are whole vectors.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        p, rows, c = operands(context, builder, signature, values, 3)
        count, columns, shrink = values[3:]
        v = Vectors(builder, c.dtype)
        left = builder.udiv(columns, constant(v.lanes))
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
                    weight = v.splat(builder.load(at(builder, p.pointer, j)))
                    source = at(builder, rows.pointer, builder.mul(j, rows.row))
                    later = at(builder, source, builder.mul(rows.row, constant(AHEAD)))
                    for x, place in zip(total, places, strict=True):
                        prefetch(builder, builder.ptrtoint(at(builder, later, place), constant(0).type))
                        builder.store(v.fma(weight, v.widen(rows.dtype, source, place), builder.load(x)), x)
                for x, place in zip(total, places, strict=True):
                    v.store(v.fma(v.load(c.pointer, place), v.splat(shrink), builder.load(x)), c.pointer, place)
            done = builder.mul(blocks, constant(width))
            first = builder.add(first, done)
            left = builder.sub(left, done)
        return context.get_dummy_value()

    return types.void(p, v, c, count, columns, shrink), emit


class _Operand(NamedTuple):
    """A `Contiguous` or `Strided` argument: where it starts, elements between its rows if any, dtype of its array."""

    pointer: Any
    row: Any
    dtype: types.Type


def operands(context: Any, builder: Any, signature: Any, values: Any, count: int) -> list[_Operand]:
    """Give the first `count` arguments as operands."""
    result = []
    for kind, value in zip(signature.args[:count], values[:count], strict=True):
        x = unpack(context, builder, kind, value)
        result.append(_Operand(at(builder, x.array, x.at), getattr(x, "row", None), kind.types[0].dtype))
    return result


class Registers:
    """A block of C in registers, ROWS × `width` vectors, for a panel B that is as wide."""

    def __init__(self, builder: ir.IRBuilder, b: _Operand, vectors: Vectors, width: int) -> None:
        self.builder = builder
        self.b = b
        self.width = width
        self.vectors = vectors

    def multiply(self, a: _Operand, depth: Any, prefetched: Any, transposed: bool = False) -> list[list[Any]]:
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
            source = at(builder, self.b.pointer, builder.mul(step, constant(self.width * v.lanes)))
            panel = [load(builder, source, (offset * self.width + j) * v.lanes, kind) for j in range(self.width)]
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

    def add(self, c: _Operand, total: list[list[Any]], shrink: list[Any] | None = None) -> None:
        """Emit C = C + total, or shrink·C + total with a number for each row."""
        builder, v = self.builder, self.vectors
        for i, row in enumerate(total):
            start = builder.mul(c.row, constant(i))
            factor = v.splat(shrink[i]) if shrink else None
            for j, x in enumerate(row):
                place = builder.add(start, constant(j * v.lanes))
                old = v.load(c.pointer, place)
                v.store(v.fma(old, factor, x) if shrink else builder.fadd(old, x), c.pointer, place)


def _widths(builder: ir.IRBuilder, vectors: Any) -> Iterator[int]:
    """Emit a switch over the number of vectors in a panel; gives each number where its code goes."""
    done = builder.append_basic_block("done")
    cases = builder.switch(builder.trunc(vectors, ir.IntType(8)), done)
    for width in range(1, VECTORS + 1):
        case = builder.append_basic_block(f"vectors{width}")
        cases.add_case(ir.Constant(ir.IntType(8), width), case)
        builder.position_at_end(case)
        yield width
        builder.branch(done)
    builder.position_at_end(done)
