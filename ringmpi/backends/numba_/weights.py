"""A panel's products to weights while they are in registers: the scores of most tiles are never written.

What is to be subtracted from a row's scores must be known beforehand. It is what the row's earlier tiles left, as long
as no score is much larger (`softmax_rows.HEADROOM`), which is found out here. So the first tile of a row, the rare one
that raises its maximum, and those with masked columns go the long way: product, maxima, weights, each through memory.
A row has the same bits either way.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .product import ROWS, VECTORS, Registers, operands
from .score_rows import numbers_of
from .softmax_rows import HEADROOM, I16, add_sums
from .vector import Vectors, at, constant, data, dtype_of, store, to_bfloat16, unpack


@intrinsic
def weigh_products(context, a, b, work, p, row, row_keys, column, depth, prefetched, scale):  # type: ignore[no-untyped-def]
    """Make weights of rows row..row + ROWS in the columns of a panel, from `column` on; say if they can't be so made.

    a, b, depth and prefetched are as for `product.scores`, the others as for `softmax_rows.weigh`. All rows see all
    columns of the tile, and their row_max is finite. sums[row..row + ROWS] of the `ForwardWork` become the sums of the
    weights, lane by lane, of the panels from the tile's first to this one. If some scaled score is more than HEADROOM
    above its row's row_max, the answer is true and the weights are of no use.
    """
    return types.boolean(a, b, work, p, row, row_keys, column, depth, prefetched, scale), _emit


@intrinsic
def weigh_biased_products(context, a, b, work, p, row, row_keys, column, depth, prefetched, scale, score, start):  # type: ignore[no-untyped-def]
    """Do what `weigh_products` does, with the bias of a `ScoreArguments`; column 0 is column `start` of the block."""
    return types.boolean(a, b, work, p, row, row_keys, column, depth, prefetched, scale, score, start), _emit


def _emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    left, right = operands(context, builder, signature, values, 2)
    work = unpack(context, builder, signature.args[2], values[2])
    pairs = signature.args[3].dtype == types.uint32
    p = data(context, builder, signature.args[3], values[3])
    p = builder.bitcast(p, I16.as_pointer()) if pairs else p
    row, row_keys, column, depth = values[4:8]
    v = Vectors(builder, dtype_of(signature.args[2], "s"))
    biases: list[Any] = []
    if len(values) > 10:
        score = unpack(context, builder, signature.args[10], values[10])
        first = at(builder, score.bias, builder.add(values[11], column))
        biases = [at(builder, first, place) for place in numbers_of(builder, score.bias_at, row)]
    total = Registers(builder, right, v, VECTORS).multiply(left, depth, cgutils.unpack_tuple(builder, values[8], 2))

    scale = v.splat(values[9])
    is_first = builder.icmp_signed("==", column, constant(0))
    largest = v.number(float("-inf"))
    for i, products in enumerate(total):
        r = builder.add(row, constant(i))
        subtract = v.splat(builder.load(at(builder, work.row_max, r)))
        sums = at(builder, work.sums, builder.mul(r, constant(v.lanes)))
        place = builder.add(builder.mul(r, row_keys), column)
        summed = builder.select(is_first, v.number(0.0), v.load(sums))
        x = [builder.fmul(product, scale) for product in products]
        if biases:
            x = [builder.fadd(y, v.load(biases[i], constant(j * v.lanes))) for j, y in enumerate(x)]
        x = [builder.fsub(y, subtract) for y in x]
        largest = v.larger(functools.reduce(v.larger, x), largest)
        for j, y in enumerate(v.exps(x)):
            store(builder, to_bfloat16(builder, y) if pairs else y, p, builder.add(place, constant(j * v.lanes)))
            summed = builder.fadd(summed, y)
        v.store(summed, sums)
    return v.any(builder.fcmp_ordered(">", largest, v.number(HEADROOM)))


@intrinsic
def end_weights(context, work, row):  # type: ignore[no-untyped-def]
    """Add what `weigh_products` summed of a tile to row_sum of rows row..row + ROWS, of which none shrinks."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        work = unpack(context, builder, signature.args[0], values[0])
        v = Vectors(builder, dtype_of(signature.args[0], "s"))
        rows = [builder.add(values[1], constant(i)) for i in range(ROWS)]
        sums = [v.load(work.sums, builder.mul(r, constant(v.lanes))) for r in rows]
        add_sums(v, sums, at(builder, work.row_sum, values[1]))
        one = ir.Constant(v.element, 1.0)
        for r in rows:
            builder.store(one, at(builder, work.shrink, r))
        return context.get_dummy_value()

    return types.void(work, row), emit
