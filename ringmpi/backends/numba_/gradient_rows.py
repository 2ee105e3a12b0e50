"""A group of rows of products to weights and gradients of scores, in one pass: S becomes P, dP becomes dS, in place.

Cost: a vector of pairs takes about 20 instructions, beside 5 dim multiply-adds in the products: 6 % at dim 64. What a
row does not see becomes 0 in both, whatever stood there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from .score_rows import Shaper, splats
from .softmax_rows import Group
from .vector import Vectors, at, data


@intrinsic
def differentiate(context, s, dp, row, row_keys, outer_first, first, inner_first, inner_last,  # type: ignore[no-untyped-def]
                  last, outer_last, low, high, start, lse, delta, scale):
    """Turn s to ``exp(scale·s - lse)`` and dp to ``s (dp - delta)``, for rows row..row + ROWS.

    Both are 0 in columns outer_first..outer_last that a row does not see; it sees none outside first..last, and all of
    inner_first..inner_last. The six are multiples of the lanes. A weight is never more than 1, be lse rounded.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        s, dp, low, high, lse, delta = (data(context, builder, signature.args[i], values[i])
                                        for i in (0, 1, 10, 11, 13, 14))
        v = Vectors(builder, signature.args[0].dtype)
        rows = _Rows(v, s, dp, values[2:4], values[4:10], low, high, values[12])
        lses, deltas, scale = splats(v, lse, values[2]), splats(v, delta, values[2]), v.splat(values[15])

        def both(i: int, j: Any, s: Any, dp: Any) -> tuple[Any, Any]:
            p = rows.weight(builder.fmul(s, scale), lses[i])
            return p, builder.fmul(p, builder.fsub(dp, deltas[i]))

        rows.over(both)
        return context.get_dummy_value()

    return types.void(s, dp, row, row_keys, outer_first, first, inner_first, inner_last, last, outer_last,
                      low, high, start, lse, delta, scale), emit


@intrinsic
def differentiate_shaped(context, s, dp, row, row_keys, outer_first, first,  # type: ignore[no-untyped-def]
                         inner_first, inner_last, last, outer_last, low, high, start, lse, delta,
                         ratio, cap, sloped, threshold, gain, slope, stream, position, keys):
    """Do what `differentiate` does with the score of a `Shape`: dp becomes the gradient of scale·product."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        s, dp, low, high, lse, delta, slope, stream, position, keys = (
            data(context, builder, signature.args[i], values[i]) for i in (0, 1, 10, 11, 13, 14, 20, 21, 22, 23))
        v = Vectors(builder, signature.args[0].dtype)
        rows = _Rows(v, s, dp, values[2:4], values[4:10], low, high, values[12])
        shaper = Shaper(v, at(builder, keys, values[12]), splats(v, position, values[2]))
        lses, deltas, slopes, streams = (splats(v, x, values[2]) for x in (lse, delta, slope, stream))

        def both(i: int, j: Any, s: Any, dp: Any) -> tuple[Any, Any]:
            x, derivative = shaper.score(s, i, j, *values[15:18], slopes)
            p = rows.weight(x, lses[i])
            kept, dp = shaper.dropped([p, dp], i, j, *values[18:20], streams)
            return kept, builder.fmul(builder.fmul(p, builder.fsub(dp, deltas[i])), derivative)

        rows.over(both)
        return context.get_dummy_value()

    return types.void(s, dp, row, row_keys, outer_first, first, inner_first, inner_last, last, outer_last,
                      low, high, start, lse, delta, ratio, cap, sloped, threshold, gain,
                      slope, stream, position, keys), emit


class _Rows:
    """Emits the pass over two arrays of a group of rows."""

    def __init__(self, vectors: Vectors, s: Any, dp: Any, rows: Any, edges: Any, low: Any, high: Any,
                 start: Any) -> None:
        self.v, self.edges = vectors, edges
        self.group = Group(vectors, s, *rows, edges[1:5], low, high, start)
        self.dp = [at(vectors.builder, dp, place) for place in self.group.places]

    def weight(self, x: Any, lse: Any) -> Any:
        """Give e^(x - lse), at most 1."""
        v = self.v
        return v.exp(v.smaller(v.number(0.0), v.builder.fsub(x, lse)))

    def over(self, both: Callable[[int, Any, Any, Any], tuple[Any, Any]]) -> None:
        """Emit ``s, dp = both(i, j, s, dp)`` over the vectors and the rows."""
        v, zero = self.v, self.v.number(0.0)
        for part, kind in enumerate(("unseen", "masked", "seen", "masked", "unseen")):
            with self.group.columns(*self.edges[part:part + 2]) as j:
                for i, (s, dp) in enumerate(zip(self.group.s, self.dp, strict=True)):
                    x = y = zero
                    if kind != "unseen":
                        x, y = both(i, j, v.load(s, j), v.load(dp, j))
                    if kind == "masked":
                        inside = v.inside(j, *self.group.seen[i])
                        x, y = v.where(inside, x, zero), v.where(inside, y, zero)
                    v.store(x, s, j)
                    v.store(y, dp, j)
