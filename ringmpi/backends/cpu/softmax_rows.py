"""A group of rows of scores to weights: largest score, 2^(score·scale - maximum), their sum, in two passes.

Cost: a vector of scores takes a load and a maximum in the first pass and about 14 instructions in the second, beside
(dim + dim_v) multiply-adds in the products: 6 % at dim 128. The rows of a group go side by side, which hides the latency of
the exponential and of the sums across lanes. Registers: a sum and a maximum for each row, and a dozen constants.

The vectors that not all of the rows see are masked by comparing lane numbers, with no branch for each element.
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
def weigh_rows(context, s, p, row, row_keys, first, inner_first, inner_last, last, low, high, start,  # type: ignore[no-untyped-def]
               top, norm, shrink, scale):
    """Turn the scores of rows row..row + ROWS into weights, and update the rows' maxima and sums.

    s (rows, row_keys) are scores before scaling. Columns first <= j < last of p become ``exp(scale·s - maximum)``: float
    as s (p may be s), or bfloat16 where p is uint32, a pair each. Row r sees ``low[r] <= start + j < high[r]``, all of
    inner_first..inner_last among them; the weights of what it does not see are 0. The four are multiples of the lanes.
    top[r] is the largest scaled score so far, norm[r] the sum of weights so far; shrink[r] becomes the factor of what was
    summed before. scale >= 0. NaN is passed over by the maximum and carried by the sum.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        s, p, low, high, top, norm, shrink = (data(context, builder, signature.args[i], values[i])
                                              for i in (0, 1, 8, 9, 11, 12, 13))
        row, row_keys, start, scale = (values[i] for i in (2, 3, 10, 14))
        pairs = signature.args[1].dtype == types.uint32
        if pairs:
            p = builder.bitcast(p, I16.as_pointer())
        rows = [builder.add(row, constant(i)) for i in range(ROWS)]
        places = [builder.mul(r, row_keys) for r in rows]
        seen = [[builder.sub(builder.load(at(builder, edge, r)), start) for edge in (low, high)] for r in rows]
        v = Vectors(builder, signature.args[0].dtype)
        group = _Group(v, [at(builder, s, x) for x in places], [at(builder, p, x) for x in places], values[4:8], seen, pairs)
        old = [builder.load(at(builder, top, r)) for r in rows]
        for r, (new, factor, total) in zip(rows, group.weigh(old, scale), strict=True):
            builder.store(new, at(builder, top, r))
            builder.store(factor, at(builder, shrink, r))
            place = at(builder, norm, r)
            builder.store(builder.fadd(builder.fmul(builder.load(place), factor), total), place)
        return context.get_dummy_value()

    return types.void(s, p, row, row_keys, first, inner_first, inner_last, last, low, high, start,
                      top, norm, shrink, scale), emit


class _Group:
    """Emits the two passes over the columns of a group of rows: `s` to `p`, pointers to each row."""

    def __init__(self, vectors: Vectors, s: list[Any], p: list[Any], edges: Any, seen: list[list[Any]],
                 pairs: bool) -> None:
        self.v, self.s, self.p, self.edges, self.seen, self.pairs = vectors, s, p, edges, seen, pairs

    def weigh(self, old: list[Any], scale: Any) -> list[tuple[Any, Any, Any]]:
        """Emit both passes; give (new maximum, factor of what was summed before, sum) of each row."""
        v, b = self.v, self.v.builder
        hidden, zero = v.number(float("-inf")), v.number(0.0)

        def largest(i: int, j: Any, total: Any, masked: bool) -> Any:
            x = v.load(self.s[i], j)
            return v.larger(v.where(v.inside(j, *self.seen[i]), x, hidden) if masked else x, total)

        log2e = ir.Constant(v.element, LOG2E)
        factor = v.splat(b.fmul(scale, log2e))
        minus, results = [], []
        for total, before in zip(self._over(hidden, largest), old, strict=True):
            top = b.fmul(v.top(total), scale)
            top = b.select(b.fcmp_ordered(">", top, before), top, before)
            blind = b.fcmp_ordered("==", top, ir.Constant(v.element, float("-inf")))
            shift = b.select(blind, ir.Constant(v.element, 0.0), b.fmul(top, log2e))      # -inf - -inf would be NaN
            minus.append(v.splat(b.fneg(shift)))
            shrink = v.exp2(v.splat(b.fsub(b.fmul(before, log2e), shift)))
            results.append((top, b.extract_element(shrink, ir.Constant(I32, 0))))

        def weigh(i: int, j: Any, total: Any, masked: bool) -> Any:
            x = v.exp2(v.fma(v.load(self.s[i], j), factor, minus[i]))
            if masked:
                x = v.where(v.inside(j, *self.seen[i]), x, zero)
            store(b, to_bfloat16(b, x) if self.pairs else x, self.p[i], j)
            return b.fadd(total, x)

        sums = self._over(zero, weigh)
        return [(top, shrink, v.sum(total)) for (top, shrink), total in zip(results, sums, strict=True)]

    def _over(self, start: Any, step: Any) -> list[Any]:
        """Emit ``total[i] = step(i, j, total[i], masked)`` over the vectors and the rows; masked but in the middle."""
        v, b = self.v, self.v.builder
        totals = [cgutils.alloca_once(b, v.kind) for _ in self.s]
        for total in totals:
            b.store(start, total)
        for part, masked in ((0, True), (1, False), (2, True)):
            first, last = self.edges[part:part + 2]
            with loop(b, constant(0), b.sdiv(b.sub(last, first), constant(v.lanes))) as i:
                j = b.add(first, b.mul(i, constant(v.lanes)))
                for r, total in enumerate(totals):
                    b.store(step(r, j, b.load(total), masked), total)
        return [b.load(total) for total in totals]


@intrinsic
def power_of_2(context, x):  # type: ignore[no-untyped-def]
    """2^x for a number x <= 0, as the rows have it."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        v = Vectors(builder, signature.args[0])
        return builder.extract_element(v.exp2(v.splat(values[0])), ir.Constant(I32, 0))

    return x(x), emit
