"""A group of rows of products to weights that are summed up: by columns, by rows, or just written.

Cost: a vector of pairs takes about 15 instructions, beside dim multiply-adds in the product: 20 % at dim 64. The rows
of a group go side by side, which hides the latency of the exponential. What a row does not see is 0 in all sums.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .product import ROWS
from .score_rows import splats
from .softmax_rows import Group, add_sums
from .vector import Vectors, at, constant, data, dtype_of, loop, unpack

LEAST = -1000.0          # what counts for the logarithm of a weight that is 0: their product must not be NaN


@intrinsic
def add_to_columns(context, work, row, row_keys, columns, scale):  # type: ignore[no-untyped-def]
    """Add the weights ``exp(scale·s - lse)`` of rows row..row + ROWS of a `WeightWork` to its `columns`."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        work, rows = _rows(context, builder, signature, values)
        for j, _, weights in rows.each():
            total = functools.reduce(builder.fadd, weights)
            rows.v.store(builder.fadd(rows.v.load(work.columns, j), total), work.columns, j)
        return context.get_dummy_value()

    return types.void(work, row, row_keys, columns, scale), emit


@intrinsic
def add_to_rows(context, work, row, row_keys, columns, scale):  # type: ignore[no-untyped-def]
    """Add the sums over `columns` of p, p log p and p times `values` to mass, logs and moment of a group of rows."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        work, rows = _rows(context, builder, signature, values)
        v = rows.v
        totals = [[cgutils.alloca_once(builder, v.kind) for _ in range(ROWS)] for _ in range(3)]
        for x in (x for sums in totals for x in sums):
            builder.store(v.number(0.0), x)
        for j, logarithms, weights in rows.each():
            numbers = v.load(work.values, j)
            for i, (y, p) in enumerate(zip(logarithms, weights, strict=True)):
                mass, logs, moment = (sums[i] for sums in totals)
                builder.store(builder.fadd(builder.load(mass), p), mass)
                builder.store(v.fma(p, v.larger(v.number(LEAST), y), builder.load(logs)), logs)
                builder.store(v.fma(p, numbers, builder.load(moment)), moment)
        for sums, target in zip(totals, (work.mass, work.logs, work.moment), strict=True):
            add_sums(v, [builder.load(x) for x in sums], at(builder, target, values[1]))
        return context.get_dummy_value()

    return types.void(work, row, row_keys, columns, scale), emit


@intrinsic
def make_weights(context, work, row, row_keys, columns, scale):  # type: ignore[no-untyped-def]
    """Make weights of the products of a group of rows, in place."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        _, rows = _rows(context, builder, signature, values)
        for j, _, weights in rows.each():
            for s, p in zip(rows.group.s, weights, strict=True):
                rows.v.store(p, s, j)
        return context.get_dummy_value()

    return types.void(work, row, row_keys, columns, scale), emit


@intrinsic
def next_reaching(context, s, place, first, last, scale, least):  # type: ignore[no-untyped-def]
    """Give the first of the vectors of columns first, first + lanes, ... below `last` in which a score is not below.

    That is, ``scale·s`` is NaN or at least `least`, which may be NaN. The row begins with element `place` of s. `last`
    or more: there is none.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        v = Vectors(builder, signature.args[0].dtype)
        row = at(builder, data(context, builder, signature.args[0], values[0]), values[1])
        first, last = values[2:4]
        scale, least = (v.splat(x) for x in values[4:])
        result = cgutils.alloca_once_value(builder, last)
        lanes = constant(v.lanes)
        count = builder.sdiv(builder.add(builder.sub(last, first), constant(v.lanes - 1)), lanes)
        done = builder.append_basic_block("done")
        with loop(builder, constant(0), count) as i:
            j = builder.add(first, builder.mul(i, lanes))
            reached = builder.fcmp_unordered(">=", builder.fmul(v.load(row, j), scale), least)
            with builder.if_then(v.any(reached), likely=False):
                builder.store(j, result)
                builder.branch(done)
        builder.branch(done)
        builder.position_at_end(done)
        return builder.load(result)

    return types.int64(s, place, first, last, scale, least), emit


def _rows(context: Any, builder: Any, signature: Any, values: Any) -> tuple[Any, _Rows]:
    """Give the work with pointers and the pass that the arguments (work, row, row_keys, columns, scale) ask for."""
    work, columns = (unpack(context, builder, signature.args[i], values[i]) for i in (0, 3))
    vectors = Vectors(builder, dtype_of(signature.args[0], "s"))
    return work, _Rows(vectors, work, values[1], values[2], columns, values[4])


class _Rows:
    """Emits the pass over the products of a group of rows."""

    def __init__(self, vectors: Vectors, work: Any, row: Any, row_keys: Any, columns: Any, scale: Any) -> None:
        self.v = vectors
        self.group = Group(vectors, work, row, row_keys, columns)
        self._lse = splats(vectors, work.lse, row)
        self._scale = vectors.splat(scale)

    def each(self) -> Iterator[tuple[Any, list[Any], list[Any]]]:
        """Emit loops over the vectors of columns; give the first column, and of all rows log p and p, at most 1."""
        v, b = self.v, self.v.builder
        zero = v.number(0.0)
        for part, masked in ((0, True), (1, False), (2, True)):
            with self.group.columns(*self.group.edges[part:part + 2]) as j:
                scores = [b.fmul(v.load(s, j), self._scale) for s in self.group.s]
                logarithms = [v.smaller(zero, b.fsub(x, lse)) for x, lse in zip(scores, self._lse, strict=True)]
                weights = v.exps(logarithms)
                if masked:
                    inside = [v.inside(j, *seen) for seen in self.group.seen]
                    weights, logarithms = ([v.where(mask, x, zero) for mask, x in zip(inside, these, strict=True)]
                                           for these in (weights, logarithms))
                yield j, logarithms, weights
