"""A group of rows of scores to weights: largest score, e^(score·scale - maximum), their sum, in two passes.

The maximum is that of an earlier tile until a score is more than `HEADROOM` above it, since whatever is subtracted
cancels in the end. So most tiles rescale nothing, and `weights` has a shorter way for them, to the same bits.

Cost: a vector of scores takes a load and a maximum in the first pass and about 14 instructions in the second, beside
(dim + dim_v) multiply-adds in the products: 6 % at dim 128. The rows of a group go side by side, which hides the
latency of the exponential and of the sums across lanes. Registers: a sum for each row, and a dozen constants.

The vectors that not all of the rows see are masked by comparing lane numbers, with no branch for each element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .product import ROWS
from .vector import Vectors, at, constant, data, dtype_of, loop, store, to_bfloat16, unpack

I16, I32 = ir.IntType(16), ir.IntType(32)
HEADROOM = 4 * math.log(2)       # a scaled score may be so far above row_max: weights up to 16, and few rows to rescale


@intrinsic
def raise_maxima(context, work, row, row_keys, columns, scale):  # type: ignore[no-untyped-def]
    """First pass over the scores of rows row..row + ROWS: raise their maxima.

    Of the `ForwardWork`, s (rows, row_keys) are scores before scaling, and row r sees columns with
    ``low[r] <= start + j < high[r]``; see `Columns`. row_max[r] becomes the largest scaled score if that is more than
    HEADROOM above it, as it is above -inf; NaN is passed over. shift[r] becomes what to subtract from scaled scores,
    and shrink[r] the factor of what was summed before, row_sum[r] among it. A vector of numbers after the last row may
    be touched. scale >= 0.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        work = unpack(context, builder, signature.args[0], values[0])
        columns = unpack(context, builder, signature.args[3], values[3])
        group = Group(Vectors(builder, dtype_of(signature.args[0], "s")), work, values[1], values[2], columns)
        group.raise_maxima(values[4])
        return context.get_dummy_value()

    return types.void(work, row, row_keys, columns, scale), emit


@intrinsic
def weigh(context, work, p, row, row_keys, columns, scale):  # type: ignore[no-untyped-def]
    """Second pass: in `columns` p becomes ``exp(scale·s - shift)``, 0 where unseen; row_sum grows by it.

    The scaled score is rounded as the maximum was, so that it gives exactly 1, however large.

    p is float as s, and may be s, or uint32: a pair of bfloat16 each. The other arguments are those of `raise_maxima`.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        work = unpack(context, builder, signature.args[0], values[0])
        columns = unpack(context, builder, signature.args[4], values[4])
        p = data(context, builder, signature.args[1], values[1])
        group = Group(Vectors(builder, dtype_of(signature.args[0], "s")), work, values[2], values[3], columns)
        group.weigh(p, signature.args[1].dtype == types.uint32, values[5])
        return context.get_dummy_value()

    return types.void(work, p, row, row_keys, columns, scale), emit


class Group:
    """Emits a pass over the columns of a group of rows: of a work space's s, low and high, as pointers."""

    def __init__(self, vectors: Vectors, work: Any, row: Any, row_keys: Any, columns: Any) -> None:
        b = vectors.builder
        rows = [b.add(row, constant(i)) for i in range(ROWS)]
        self.v = vectors
        self.work = work
        self.row = row
        self.edges = columns[:4]
        self.places = [b.mul(r, row_keys) for r in rows]
        self.s = [at(b, work.s, place) for place in self.places]
        self.seen = [[b.sub(b.load(at(b, edge, r)), columns.start) for edge in (work.low, work.high)] for r in rows]

    def raise_maxima(self, scale: Any) -> None:
        """Emit the first pass and the update of the rows' numbers, side by side in lanes."""
        v, b, work = self.v, self.v.builder, self.work
        hidden, zero = v.number(float("-inf")), v.number(0.0)

        def largest(i: int, j: Any, total: Any, masked: bool) -> Any:
            x = v.load(self.s[i], j)
            return v.larger(v.where(v.inside(j, *self.seen[i]), x, hidden) if masked else x, total)

        maxima = self._over(hidden, largest)
        row_max, row_sum, shrink, shift = (
            at(b, x, self.row) for x in (work.row_max, work.row_sum, work.shrink, work.shift))
        for chunk in _chunks(v.lanes):
            old = v.load(row_max, chunk[0])
            new = b.fmul(v.across([maxima[i] for i in chunk], v.larger, hidden), v.splat(scale))
            new = v.where(b.fcmp_ordered(">", b.fsub(new, old), v.number(HEADROOM)), new, old)
            subtract = v.where(b.fcmp_ordered("==", new, hidden), zero, new)         # -inf - -inf would be NaN
            factor = v.exp(b.fsub(old, subtract))
            sums = b.fmul(v.load(row_sum, chunk[0]), factor)
            for x, place in ((new, row_max), (sums, row_sum), (factor, shrink), (subtract, shift)):
                v.store_first(x, len(chunk), at(b, place, chunk[0]))

    def weigh(self, p: Any, pairs: bool, scale: Any) -> None:
        """Emit the second pass."""
        v, b, zero = self.v, self.v.builder, self.v.number(0.0)
        p = b.bitcast(p, I16.as_pointer()) if pairs else p
        weights = [at(b, p, place) for place in self.places]
        row_sum, shift = (at(b, x, self.row) for x in (self.work.row_sum, self.work.shift))
        subtract = [v.splat(b.load(at(b, shift, i))) for i in range(ROWS)]
        scale = v.splat(scale)

        def weigh(i: int, j: Any, total: Any, masked: bool) -> Any:
            x = v.exp(b.fsub(b.fmul(v.load(self.s[i], j), scale), subtract[i]))
            if masked:
                x = v.where(v.inside(j, *self.seen[i]), x, zero)
            store(b, to_bfloat16(b, x) if pairs else x, weights[i], j)
            return b.fadd(total, x)

        sums = self._over(zero, weigh)
        add_sums(v, sums, row_sum)

    def _over(self, start: Any, step: Any) -> list[Any]:
        """Emit ``total[i] = step(i, j, total[i], masked)`` over the vectors and the rows; masked but in the middle."""
        v, b = self.v, self.v.builder
        totals = [cgutils.alloca_once(b, v.kind) for _ in self.s]
        for total in totals:
            b.store(start, total)
        for part, masked in ((0, True), (1, False), (2, True)):
            first, last = self.edges[part:part + 2]
            with self.columns(first, last) as j:
                for r, total in enumerate(totals):
                    b.store(step(r, j, b.load(total), masked), total)
        return [b.load(total) for total in totals]

    @contextmanager
    def columns(self, first: Any, last: Any) -> Iterator[Any]:
        """Emit a loop over the vectors of columns first..last; gives the column that each starts with."""
        v, b = self.v, self.v.builder
        with loop(b, constant(0), b.sdiv(b.sub(last, first), constant(v.lanes))) as i:
            yield b.add(first, b.mul(i, constant(v.lanes)))


def add_sums(v: Vectors, sums: list[Any], row_sum: Any) -> None:
    """Add the lanes of each of ROWS vectors to the numbers at `row_sum`."""
    for chunk in _chunks(v.lanes):
        total = v.across([sums[i] for i in chunk], v.builder.fadd, v.number(0.0))
        place = at(v.builder, row_sum, chunk[0])
        v.store_first(v.builder.fadd(v.load(place), total), len(chunk), place)


def _chunks(lanes: int) -> list[range]:
    """Rows of a group, as many at a time as there are lanes."""
    return [range(i, min(i + lanes, ROWS)) for i in range(0, ROWS, lanes)]


@intrinsic
def multiply_add(context, x, y, z):  # type: ignore[no-untyped-def]
    """x·y + z of numbers, rounded as the products' vectors are."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        v = Vectors(builder, signature.args[0])
        return builder.extract_element(v.fma(*(v.splat(number) for number in values)), ir.Constant(I32, 0))

    return x(x, y, z), emit
