"""A bias by distance on a group of rows: scores get numbers of tables, and sums of their gradients go where these are.

A place in a table goes by the coordinate of a key less that of a row. So a vector of keys whose coordinates follow each
other, as in most layouts along the last axis, gets a vector of the table as it stands; one of keys that all are as far,
or all beyond the reach, gets one number. Other keys are looked up one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils

from .product import ROWS
from .tuples import RelativeArguments
from .vector import I32, I64, Vectors, at, constant, load, loop, splat


class RelativeEmitter:
    """Emits a bias by distance of a vector of keys, from column j on, for each row of a group, and its gradient's sums.

    `relative` is a `RelativeArguments` with pointers.
    """

    def __init__(self, vectors: Vectors, relative: Any, row: Any, start: Any) -> None:
        self.v = vectors
        self.relative = relative
        self.row = row
        self.start = start

    def add(self, x: list[Any], j: Any) -> list[Any]:
        """Add the bias to the scores of each row."""
        v, b, relative = self.v, self.v.builder, self.relative
        totals = [cgutils.alloca_once(b, v.kind) for _ in x]
        for total, scores in zip(totals, x, strict=True):
            b.store(scores, total)
        for kind, axis, i, place in self._places(j):
            table = at(b, relative.tables, self._of_row(relative.place, axis, i))
            if kind == "in a row":
                numbers = v.load(table, place)
            elif kind == "one":
                numbers = v.splat(b.load(at(b, table, place)))
            else:
                numbers = v.look_up(table, place)
            b.store(b.fadd(b.load(totals[i]), numbers), totals[i])
        return [b.load(total) for total in totals]

    def sum(self, x: list[Any], j: Any) -> None:
        """Emit the sums of what each row has: 0 where it does not see a key."""
        v, b, relative = self.v, self.v.builder, self.relative
        for kind, axis, i, place in self._places(j):
            sums = at(b, relative.sums, self._of_row(relative.sums_place, axis, i))
            if kind == "in a row":
                v.store(b.fadd(v.load(sums, place), x[i]), sums, place)
            elif kind == "one":
                self._add_number(v.sum(x[i]), sums, place)
            else:
                with loop(b, constant(0), constant(v.lanes)) as lane:
                    number, where = (b.extract_element(y, b.trunc(lane, I32)) for y in (x[i], place))
                    self._add_number(number, sums, where)

    def _add_number(self, x: Any, sums: Any, place: Any) -> None:
        b = self.v.builder
        target = at(b, sums, place)
        b.store(b.fadd(b.load(target), x), target)

    def _of_row(self, numbers: Any, axis: Any, i: int) -> Any:
        """Load what row i has along an axis."""
        b = self.v.builder
        place = b.add(b.mul(axis, self.relative.rows), b.add(self.row, constant(i)))
        return b.load(at(b, numbers, place))

    def _places(self, j: Any) -> Iterator[tuple[str, Any, int, Any]]:
        """Give, for each axis and row i, where its numbers for a vector of keys are, and in which of three ways.

        The first of a run "in a row", the only "one", or "each" lane's. What is emitted meanwhile is done if it is so.
        """
        v, b, relative = self.v, self.v.builder, self.relative
        with loop(b, constant(0), relative.axes) as axis:
            at_key = b.add(b.mul(axis, relative.keys_step), b.add(self.start, j))
            low, high, last = (b.load(at(b, x, place)) for x, place in (
                (relative.low, at_key), (relative.high, at_key), (relative.last, axis)))
            in_a_row = b.icmp_unsigned("!=", b.load(at(b, relative.in_a_row, at_key)), ir.Constant(ir.IntType(8), 0))
            with b.if_else(in_a_row) as (following, others):
                with following:
                    for i in range(ROWS):
                        shift = self._of_row(relative.shift, axis, i)
                        yield "in a row", axis, i, _clip(b, b.add(low, shift), constant(0), last)
                with others:
                    edges = constant(v.lanes), b.sub(last, constant(1))
                    coordinates = load(b, relative.keys, at_key, ir.VectorType(I64, v.lanes))
                    for i in range(ROWS):
                        shift = self._of_row(relative.shift, axis, i)
                        first, stop = (_clip(b, b.add(edge, shift), *edges) for edge in (low, high))
                        with b.if_else(b.icmp_signed("==", first, stop)) as (same, apart):
                            with same:
                                yield "one", axis, i, first
                            with apart:
                                places = b.add(coordinates, splat(b, shift, v.lanes))
                                yield "each", axis, i, _clip(b, places, *(splat(b, edge, v.lanes) for edge in edges))


def _clip(builder: Any, x: Any, low: Any, high: Any) -> Any:
    """Cut off integers, of a scalar or of lanes."""
    x = builder.select(builder.icmp_signed("<", x, low), low, x)
    return builder.select(builder.icmp_signed(">", x, high), high, x)


@numba.njit
def load_row_places(relative, r, i, h, member):  # type: ignore[no-untyped-def]
    """Set what row r of the work space needs to know: of query i and head h, which is a member of a key head's."""
    n_q = len(relative.queries) // max(1, relative.axes)
    for axis in range(relative.axes):
        row = axis * relative.rows + r
        relative.shift[row] = relative.middle[axis] - relative.queries[axis * n_q + i]
        relative.place[row] = relative.table_at[axis] + h * relative.table_step[axis]
        relative.sums_place[row] = relative.sums_at[axis] + member * relative.table_step[axis]


@numba.njit
def relative_from(relative, row):  # type: ignore[no-untyped-def]
    """Give the bias of the rows of the work space from `row` on."""
    return RelativeArguments(relative.axes, relative.tables, relative.table_at, relative.table_step, relative.middle,
                             relative.last, relative.queries, relative.keys, relative.keys_step, relative.low,
                             relative.high, relative.in_a_row, relative.sums, relative.totals, relative.members,
                             relative.sums_at, relative.shift[row:], relative.place[row:], relative.sums_place[row:],
                             relative.rows)


@numba.njit(error_model="numpy")
def add_tile(relative, rows, start, n):  # type: ignore[no-untyped-def]
    """Add the sums of a tile, of the rows of the work space and columns start..start + n, to the totals; clear them."""
    for axis in range(relative.axes):
        keys, places = axis * relative.keys_step + start, axis * relative.rows
        low, high = relative.low[keys], relative.high[keys]
        for j in range(keys, keys + n):
            low, high = min(low, relative.low[j]), max(high, relative.high[j])
        least = most = relative.shift[places]
        for r in range(places, places + rows):
            least, most = min(least, relative.shift[r]), max(most, relative.shift[r])

        # What may have been added to: from where a vector begins to where one ends, and the numbers beside the ends.
        last, size = relative.last[axis], relative.table_step[axis]
        first = max(min(low + least, last) - 1, 0)
        stop = min(max(high + most, 0) + size - last + 1, size)
        for member in range(relative.members):
            sums = relative.sums_at[axis] + member * size
            for place in range(sums + first, sums + stop):
                relative.totals[place] += relative.sums[place]
                relative.sums[place] = 0
