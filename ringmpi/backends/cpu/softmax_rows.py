"""A group of rows of scores to weights: largest score, 2^(score·scale - maximum), their sum, in two passes.

Cost: a vector of scores takes a load and a maximum in the first pass and about 14 instructions in the second, beside
(dim + dim_v) multiply-adds in the products: 6 % at dim 128. The rows of a group go side by side, which hides the latency of
the exponential and of the sums across lanes. Registers: a sum and a maximum for each row, and a dozen constants.

Rows that do not see all of the columns are masked by comparing lane numbers, with no branch for each element.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .product import ROWS
from .vector import Vectors, at, constant, data, loop, store, to_bfloat16

LOG2E = 1.4426950408889634
I16, I32 = ir.IntType(16), ir.IntType(32)


@intrinsic
def weigh_rows(context, s, p, row, row_keys, first, last, low, high, start, top, norm, shrink, scale, masked):  # type: ignore[no-untyped-def]
    """Turn the scores of rows row..row + ROWS into weights, and update the rows' maxima and sums.

    s (rows, row_keys) are scores before scaling. Columns first <= j < last (multiples of the lanes) of p become
    ``exp(scale·s - maximum)``: float as s (p may be s), or bfloat16 where p is uint32, a pair each. Where `masked`, row r
    sees only ``low[r] <= start + j < high[r]``, and its other weights are 0. top[r] is the largest scaled score so far,
    norm[r] the sum of weights so far; shrink[r] becomes the factor of what was summed before. scale >= 0.
    NaN is passed over by the maximum and carried by the sum.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        s, p, low, high, top, norm, shrink = (data(context, builder, signature.args[i], values[i])
                                              for i in (0, 1, 6, 7, 9, 10, 11))
        row, row_keys, first, last, start = (values[i] for i in (2, 3, 4, 5, 8))
        pairs = signature.args[1].dtype == types.uint32
        if pairs:
            p = builder.bitcast(p, I16.as_pointer())
        rows = [builder.add(row, constant(i)) for i in range(ROWS)]
        places = [builder.mul(r, row_keys) for r in rows]
        v = Vectors(builder, signature.args[0].dtype)
        group = _Group(v, [at(builder, s, x) for x in places], [at(builder, p, x) for x in places], first, last, pairs)
        old = [builder.load(at(builder, top, r)) for r in rows]
        results = [[cgutils.alloca_once(builder, v.element) for _ in range(3)] for _ in rows]
        with builder.if_else(values[13]) as (then, otherwise):
            with then:
                seen = [[builder.sub(builder.load(at(builder, edge, r)), start) for edge in (low, high)] for r in rows]
                group.weigh(old, values[12], seen, results)
            with otherwise:
                group.weigh(old, values[12], None, results)
        for r, (new, factor, total) in zip(rows, results, strict=True):
            builder.store(builder.load(new), at(builder, top, r))
            builder.store(builder.load(factor), at(builder, shrink, r))
            place = at(builder, norm, r)
            old_norm = builder.fmul(builder.load(place), builder.load(factor))
            builder.store(builder.fadd(old_norm, builder.load(total)), place)
        return context.get_dummy_value()

    return types.void(s, p, row, row_keys, first, last, low, high, start, top, norm, shrink, scale, masked), emit


class _Group:
    """Emits the two passes over columns first..last of a group of rows: `s` to `p`, pointers to each row."""

    def __init__(self, vectors: Vectors, s: list[Any], p: list[Any], first: Any, last: Any, pairs: bool) -> None:
        self.v, self.s, self.p, self.first, self.last, self.pairs = vectors, s, p, first, last, pairs

    def weigh(self, old: list[Any], scale: Any, seen: list[list[Any]] | None, results: list[list[Any]]) -> None:
        """Emit both passes; store (new maximum, factor of what was summed before, sum) of each row."""
        v, b = self.v, self.v.builder
        hidden, zero = v.number(float("-inf")), v.number(0.0)

        def largest(i: int, j: Any, total: Any) -> Any:
            x = v.load(self.s[i], j)
            return v.larger(v.where(v.inside(j, *seen[i]), x, hidden) if seen else x, total)

        log2e = ir.Constant(v.element, LOG2E)
        factor = v.splat(b.fmul(scale, log2e))
        minus = []
        for total, before, (new, shrink, _) in zip(self._over(hidden, largest), old, results, strict=True):
            top = b.fmul(v.top(total), scale)
            top = b.select(b.fcmp_ordered(">", top, before), top, before)
            blind = b.fcmp_ordered("==", top, ir.Constant(v.element, float("-inf")))
            shift = b.select(blind, ir.Constant(v.element, 0.0), b.fmul(top, log2e))      # -inf - -inf would be NaN
            minus.append(v.splat(b.fneg(shift)))
            b.store(top, new)
            b.store(b.extract_element(v.exp2(v.splat(b.fsub(b.fmul(before, log2e), shift))), ir.Constant(I32, 0)), shrink)

        def weigh(i: int, j: Any, total: Any) -> Any:
            x = v.exp2(v.fma(v.load(self.s[i], j), factor, minus[i]))
            if seen:
                x = v.where(v.inside(j, *seen[i]), x, zero)
            store(b, to_bfloat16(b, x) if self.pairs else x, self.p[i], j)
            return b.fadd(total, x)

        for total, (_, _, norm) in zip(self._over(zero, weigh), results, strict=True):
            b.store(v.sum(total), norm)

    def _over(self, start: Any, step: Any) -> list[Any]:
        """Emit ``total[i] = step(i, j, total[i])`` over vectors and rows."""
        v, b = self.v, self.v.builder
        totals = [cgutils.alloca_once(b, v.kind) for _ in self.s]
        for total in totals:
            b.store(start, total)
        with loop(b, constant(0), b.udiv(b.sub(self.last, self.first), constant(v.lanes))) as i:
            j = b.add(self.first, b.mul(i, constant(v.lanes)))
            for r, total in enumerate(totals):
                b.store(step(r, j, b.load(total)), total)
        return [b.load(total) for total in totals]


@intrinsic
def power_of_2(context, x):  # type: ignore[no-untyped-def]
    """2^x for a number x <= 0, as the rows have it."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        v = Vectors(builder, signature.args[0])
        return builder.extract_element(v.exp2(v.splat(values[0])), ir.Constant(I32, 0))

    return x(x), emit
