"""A group of rows of products to weights and gradients of scores, in one pass: S becomes P, dP becomes dS, in place.

Cost: a vector of pairs takes about 20 instructions, beside 5 dim multiply-adds in the products: 6 % at dim 64. What a
row does not see becomes 0 in both, whatever stood there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .score_rows import ScoreEmitter, numbers_of, splats
from .softmax_rows import Group
from .vector import Vectors, at, constant, dtype_of, unpack


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
def differentiate_scored(context, work, row, row_keys, columns, outer, scale, score, sums_at):  # type: ignore[no-untyped-def]
    """Do what `differentiate` does with the score of a `ScoreArguments`: dp becomes the gradient of the product.

    If it has a bias, the gradient of that, ``p (dp - delta)`` where seen, is added to its sums, in which `sums_at` is
    the place of the tile's first key.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        rows, work, score, emitter, sums = _scored_rows(context, builder, signature, values)
        v = rows.v
        scale = v.splat(values[5])
        lse, delta, slope, dropout_key = (
            splats(v, x, values[1]) for x in (work.lse, work.delta, score.slope, score.dropout_key))

        away: list[Any] = []

        def both(i: int, j: Any, score: tuple[Any, Any], dp: Any) -> tuple[Any, Any]:
            x, derivative = score
            p = rows.weight(x, lse[i])
            dropped, dp = emitter.drop([p, dp], i, j, dropout_key)
            ds = builder.fmul(p, builder.fsub(dp, delta[i]))
            sums.take(ds, i, j)
            away.append(rows.seen(ds, i, j))
            return dropped, builder.fmul(builder.fmul(ds, derivative), scale)

        def add(j: Any) -> None:
            with builder.if_then(score.biased):
                sums.add(j)
            sums.forget()
            emitter.relative.sum(away, j)
            away.clear()

        rows.over(both, add, lambda s, j: emitter.apply(s, j, slope))
        return context.get_dummy_value()

    return types.void(work, row, row_keys, columns, outer, scale, score, sums_at), emit


@intrinsic
def differentiate_biased(context, work, row, row_keys, columns, outer, scale, score, sums_at):  # type: ignore[no-untyped-def]
    """Do what `differentiate_scored` does where there is a bias alone, to the same bits."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        rows, work, score, emitter, sums = _scored_rows(context, builder, signature, values)
        v = rows.v
        scale = v.splat(values[5])
        lse, delta = splats(v, work.lse, values[1]), splats(v, work.delta, values[1])

        def both(i: int, j: Any, s: Any, dp: Any) -> tuple[Any, Any]:
            p = rows.weight(emitter.with_bias(builder.fmul(s, v.splat(score.ratio)), i, j), lse[i])
            ds = builder.fmul(p, builder.fsub(dp, delta[i]))
            sums.take(ds, i, j)
            return p, builder.fmul(ds, scale)

        def add(j: Any) -> None:
            sums.add(j)
            sums.forget()

        rows.over(both, add)
        return context.get_dummy_value()

    return types.void(work, row, row_keys, columns, outer, scale, score, sums_at), emit


class _BiasSums:
    """Emits what adds a vector of each row of a group to sums of the gradient of a bias."""

    def __init__(self, rows: _Rows, score: Any, row: Any, sums_at: Any) -> None:
        builder = rows.v.builder
        self._rows = rows
        self._same = builder.icmp_signed("==", score.sums_step, constant(0))
        self._places = [at(builder, at(builder, score.bias_sums, place), sums_at)
                        for place in numbers_of(builder, score.sums_at, row)]
        self._taken: list[Any] = []

    def take(self, x: Any, i: int, j: Any) -> None:
        """Take what row i has of the columns from j on."""
        self._taken.append(self._rows.seen(x, i, j))

    def add(self, j: Any) -> None:
        """Emit the sums of what was taken: in one place for all rows, or in one for each."""
        v, b = self._rows.v, self._rows.v.builder
        with b.if_else(self._same) as (together, apart):
            with together:
                total = functools.reduce(b.fadd, self._taken)
                v.store(b.fadd(v.load(self._places[0], j), total), self._places[0], j)
            with apart:
                for x, place in zip(self._taken, self._places, strict=True):
                    v.store(b.fadd(v.load(place, j), x), place, j)

    def forget(self) -> None:
        """Begin with other columns."""
        self._taken = []


def _rows(context: Any, builder: Any, signature: Any, values: Any) -> tuple[_Rows, Any]:
    """Give the pass that the arguments (work, row, row_keys, columns, outer) ask for, and the work with pointers."""
    work, columns = (unpack(context, builder, signature.args[i], values[i]) for i in (0, 3))
    outer = cgutils.unpack_tuple(builder, values[4], 2)
    vectors = Vectors(builder, dtype_of(signature.args[0], "s"))
    return _Rows(vectors, work, values[1], values[2], columns, outer), work


def _scored_rows(context: Any, builder: Any, signature: Any, values: Any
                 ) -> tuple[_Rows, Any, Any, ScoreEmitter, _BiasSums]:
    """Give what `_rows` gives, the score, and what emits scores and sums of the gradient of a bias."""
    rows, work = _rows(context, builder, signature, values)
    score = unpack(context, builder, signature.args[6], values[6])
    return (rows, work, score, ScoreEmitter(rows.v, score, values[1], rows.start),
            _BiasSums(rows, score, values[1], values[7]))


class _Rows:
    """Emits the pass over two arrays of a group of rows."""

    def __init__(self, vectors: Vectors, work: Any, row: Any, row_keys: Any, columns: Any, outer: list[Any]) -> None:
        self.v = vectors
        self.start = columns.start
        self.group = Group(vectors, work, row, row_keys, columns)
        self.edges = [outer[0], *self.group.edges, outer[1]]
        self.masked = False                # whether some rows may not see some of the columns at hand
        self.dp = [at(vectors.builder, work.dp, place) for place in self.group.places]

    def weight(self, x: Any, lse: Any) -> Any:
        """Give e^(x - lse), at most 1."""
        v = self.v
        return v.exp(v.smaller(v.number(0.0), v.builder.fsub(x, lse)))

    def seen(self, x: Any, i: int, j: Any) -> Any:
        """Give x of row i and the columns from j on, 0 where they are not seen."""
        return self.v.where(self.v.inside(j, *self.group.seen[i]), x, self.v.number(0.0)) if self.masked else x

    def over(self, both: Callable[[int, Any, Any, Any], tuple[Any, Any]],
             after: Callable[[Any], None] | None = None,
             before: Callable[[list[Any], Any], list[Any]] | None = None) -> None:
        """Emit ``s, dp = both(i, j, s, dp)`` over the vectors and the rows, and ``after(j)`` for each vector seen.

        With `before`, both is given what ``before(s of all rows, j)`` makes of s.
        """
        v = self.v
        zero = self.v.number(0.0)
        for number, part in enumerate(("unseen", "masked", "seen", "masked", "unseen")):
            self.masked = part == "masked"
            with self.group.columns(*self.edges[number:number + 2]) as j:
                made: list[Any] = []
                if before is not None and part != "unseen":
                    made = before([v.load(s, j) for s in self.group.s], j)
                for i, (s, dp) in enumerate(zip(self.group.s, self.dp, strict=True)):
                    x = y = zero
                    if part != "unseen":
                        x, y = both(i, j, made[i] if made else v.load(s, j), v.load(dp, j))
                    v.store(self.seen(x, i, j), s, j)
                    v.store(self.seen(y, i, j), dp, j)
                if after is not None and part != "unseen":
                    after(j)
