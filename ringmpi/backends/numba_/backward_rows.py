"""A group of rows of products to weights and gradients of scores, in one pass: S becomes P, dP becomes dS, in place.

Cost: a vector of pairs takes about 20 instructions, beside 5 dim multiply-adds in the products: 6 % at dim 64. What a
row does not see becomes 0 in both, whatever stood there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .score_rows import ScoreEmitter, splats
from .softmax_rows import Group
from .vector import Vectors, at, dtype_of, unpack


@intrinsic
def differentiate(context, work, row, row_keys, columns, outer, scale):  # type: ignore[no-untyped-def]
    """Make p = ``exp(scale·s - lse)`` of s and ``scale·p (dp - delta)`` of dp, for a group of rows of a `BackwardWork`.

    Both are 0 in columns outer[0]..outer[1], multiples of the lanes, that a row does not see; see `Columns`. A weight
    is never more than 1, be lse rounded.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        rows, work = _rows(context, builder, signature, values)
        v = rows.v
        lse, delta = splats(v, work.lse, values[1]), splats(v, work.delta, values[1])
        scale = v.splat(values[5])

        def both(i: int, j: Any, s: Any, dp: Any) -> tuple[Any, Any]:
            p = rows.weight(builder.fmul(s, scale), lse[i])
            return p, builder.fmul(builder.fmul(p, builder.fsub(dp, delta[i])), scale)

        rows.over(both)
        return context.get_dummy_value()

    return types.void(work, row, row_keys, columns, outer, scale), emit


@intrinsic
def differentiate_scored(context, work, row, row_keys, columns, outer, scale, score):  # type: ignore[no-untyped-def]
    """Do what `differentiate` does with the score of a `ScoreArguments`: dp becomes the gradient of the product."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        rows, work = _rows(context, builder, signature, values)
        v = rows.v
        scale = v.splat(values[5])
        score = unpack(context, builder, signature.args[6], values[6])
        emitter = ScoreEmitter(v, score, values[1], rows.start)
        lse, delta, slope, dropout_key = (
            splats(v, x, values[1]) for x in (work.lse, work.delta, score.slope, score.dropout_key))

        def both(i: int, j: Any, s: Any, dp: Any) -> tuple[Any, Any]:
            x, derivative = emitter.apply(s, i, j, slope)
            p = rows.weight(x, lse[i])
            dropped, dp = emitter.drop([p, dp], i, j, dropout_key)
            ds = builder.fmul(builder.fmul(p, builder.fsub(dp, delta[i])), derivative)
            return dropped, builder.fmul(ds, scale)

        rows.over(both)
        return context.get_dummy_value()

    return types.void(work, row, row_keys, columns, outer, scale, score), emit


def _rows(context: Any, builder: Any, signature: Any, values: Any) -> tuple[_Rows, Any]:
    """Give the pass that the arguments (work, row, row_keys, columns, outer) ask for, and the work with pointers."""
    work, columns = (unpack(context, builder, signature.args[i], values[i]) for i in (0, 3))
    outer = cgutils.unpack_tuple(builder, values[4], 2)
    vectors = Vectors(builder, dtype_of(signature.args[0], "s"))
    return _Rows(vectors, work, values[1], values[2], columns, outer), work


class _Rows:
    """Emits the pass over two arrays of a group of rows."""

    def __init__(self, vectors: Vectors, work: Any, row: Any, row_keys: Any, columns: Any, outer: list[Any]) -> None:
        self.v = vectors
        self.start = columns.start
        self.group = Group(vectors, work, row, row_keys, columns)
        self.edges = [outer[0], *self.group.edges, outer[1]]
        self.dp = [at(vectors.builder, work.dp, place) for place in self.group.places]

    def weight(self, x: Any, lse: Any) -> Any:
        """Give e^(x - lse), at most 1."""
        v = self.v
        return v.exp(v.smaller(v.number(0.0), v.builder.fsub(x, lse)))

    def over(self, both: Callable[[int, Any, Any, Any], tuple[Any, Any]]) -> None:
        """Emit ``s, dp = both(i, j, s, dp)`` over the vectors and the rows."""
        v = self.v
        zero = self.v.number(0.0)
        for number, part in enumerate(("unseen", "masked", "seen", "masked", "unseen")):
            with self.group.columns(*self.edges[number:number + 2]) as j:
                for i, (s, dp) in enumerate(zip(self.group.s, self.dp, strict=True)):
                    x = y = zero
                    if part != "unseen":
                        x, y = both(i, j, v.load(s, j), v.load(dp, j))
                    if part == "masked":
                        inside = v.inside(j, *self.group.seen[i])
                        x, y = v.where(inside, x, zero), v.where(inside, y, zero)
                    v.store(x, s, j)
                    v.store(y, dp, j)
