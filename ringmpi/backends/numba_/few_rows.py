"""A few rows that meet each key once: they read K and V as they came, so that memory is the limit.

    for each strip of keys, for each head:      S = Q·K       then P and sums, as `forward_tile.weigh_groups` does
    for each strip of values, for each head:    acc += P·V

Rows of a head go up to four together, so that a number is converted once for all of them. Each line of memory is asked
for ahead, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .pack import lanes, place_of, widen
from .product import ROWS, Operand, operands
from .tuples import Strided
from .vector import Vectors, at, cases, constant, dot_pairs, load, loop, machine, prefetch, splat, store

STRIP = 16              # keys of a head that rows meet before those of the next head: the tokens lie in a page each
AHEAD = 16              # tokens that are asked for ahead
TOGETHER = (4, 2, 1)    # rows
MOST = 16               # rows of a head; packed tiles are as fast from about here on
LINE = 64               # bytes that memory gives at a time


@intrinsic
def dot_keys(context, q, k, s, rows, count, depth):  # type: ignore[no-untyped-def]
    """s[i, j] = q[i] · k[j] for i < rows and j < count: a number of `TOGETHER`, and whole vectors of columns.

    The three are `Strided`. Keys that are not there are as the last. A key is read once, along its numbers; products
    are summed across lanes a vector of them at a time.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        q, k, s = operands(context, builder, signature, values, 3)
        for together in _cases(builder, values[3], Vectors(builder, s.dtype).lanes):
            _Dots(builder, q, k, s, together).emit(values[4], values[5])
        return context.get_dummy_value()

    return types.void(q, k, s, rows, count, depth), emit


class _Dots:
    """Emits products of some rows and keys."""

    def __init__(self, builder: ir.IRBuilder, q: Operand, k: Operand, s: Operand, rows: int) -> None:
        self.b = builder
        self.v = Vectors(builder, s.dtype)
        self.q, self.k, self.s = q, k, s
        self.rows = [at(builder, q.pointer, builder.mul(q.row, constant(r))) for r in range(rows)]
        self.pairs = k.dtype == types.uint32
        self.keys = self.v.lanes // rows

    def emit(self, count: Any, depth: Any) -> None:
        """Emit a loop over the keys, as many at a time as give a vector of products."""
        b, v = self.b, self.v
        whole = b.udiv(depth, constant(v.lanes))
        with loop(b, constant(0), b.sdiv(b.add(count, constant(self.keys - 1)), constant(self.keys))) as block:
            first = b.mul(block, constant(self.keys))
            keys = []
            for i in range(self.keys):
                number = b.add(first, constant(i))
                number = b.select(b.icmp_signed("<", number, count), number, b.sub(count, constant(1)))
                keys.append(at(b, self.k.pointer, b.mul(number, self.k.row)))
            sums = [self._sums(keys[i:i + 4], whole) for i in range(0, self.keys, 4)]
            total = cgutils.alloca_once_value(b, v.across(
                [x for r in range(len(self.rows)) for some in sums for x in some[r]], b.fadd, v.number(0.0)))
            with loop(b, b.mul(whole, constant(v.lanes)), depth) as place:
                self._add_one(keys, place, total)
            self._store(b.load(total), first)

    def _sums(self, keys: list[Any], whole: Any) -> list[list[Any]]:
        """Emit the products with a few keys over `whole` vectors of the depth; give vectors to sum, row by row."""
        b, v = self.b, self.v
        totals = [[cgutils.alloca_once(b, v.kind) for _ in keys] for _ in self.rows]
        for total in (x for row in totals for x in row):
            b.store(v.number(0.0), total)

        def step(place: Any) -> None:
            given = [load(b, row, place, v.bits if self.pairs else v.kind) for row in self.rows]
            for i, key in enumerate(keys):
                y = load(b, key, place, v.bits) if self.pairs else v.widen(self.k.dtype, key, place)
                for x, row in zip(given, totals, strict=True):
                    b.store(self._multiply_add(x, y, b.load(row[i])), row[i])

        def ask(place: Any) -> None:
            for key in keys:
                _ask(b, at(b, key, b.add(place, b.mul(self.k.row, constant(AHEAD)))))

        _by_lines(v, self.k.dtype, whole, step, ask)
        return [[b.load(x) for x in row] for row in totals]

    def _add_one(self, keys: list[Any], place: Any, total: Any) -> None:
        """Emit the products of one number of each row and key."""
        v, b = self.v, self.b
        stored = types.float32 if self.pairs else self.k.dtype
        x = v.gather(self.s.dtype, [row for row in self.rows for _ in keys], place)
        y = v.gather(stored, keys * len(self.rows), place)
        b.store(self._multiply_add(x, y, b.load(total)), total)

    def _multiply_add(self, x: Any, y: Any, total: Any) -> Any:
        return dot_pairs(self.b, total, x, y) if self.pairs else self.v.fma(x, y, total)

    def _store(self, total: Any, first: Any) -> None:
        """Emit the stores of a vector of products, each row's share of the lanes to its columns from `first` on."""
        for r in range(len(self.rows)):
            mine = ir.Constant(ir.VectorType(ir.IntType(32), self.keys), [r * self.keys + i for i in range(self.keys)])
            place = self.b.add(self.b.mul(self.s.row, constant(r)), first)
            store(self.b, self.b.shuffle_vector(total, total, mine), self.s.pointer, place)


@intrinsic
def add_values(context, p, v, c, rows, count, columns):  # type: ignore[no-untyped-def]
    """c[:rows, :columns] += p[:rows, :count] · V; the three are `Strided`. `rows` is of `TOGETHER`.

    The columns are whole vectors.
    """
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        p, numbers, c = operands(context, builder, signature, values, 3)
        count, columns = values[4:]
        v = Vectors(builder, c.dtype)
        for together in _cases(builder, values[3], v.lanes):
            first, left = constant(0), builder.udiv(columns, constant(v.lanes))
            for width in (8, 4, 2, 1):              # vectors of C in registers
                if width * together > machine().registers // 2:
                    continue
                blocks = builder.udiv(left, constant(width))
                with loop(builder, constant(0), blocks) as block:
                    column = builder.mul(builder.add(first, builder.mul(block, constant(width))), constant(v.lanes))
                    _add_columns(v, p, numbers, c, together, count, column, width)
                done = builder.mul(blocks, constant(width))
                first, left = builder.add(first, done), builder.sub(left, done)
        return context.get_dummy_value()

    return types.void(p, v, c, rows, count, columns), emit


def _add_columns(v: Vectors, p: Operand, numbers: Operand, c: Operand, rows: int, count: Any, column: Any, width: int
                 ) -> None:
    """Emit what `add_values` does to `width` vectors of some rows, from a column on."""
    b = v.builder
    per_line = _vectors_per_line(v, numbers.dtype)
    weights = [at(b, p.pointer, b.mul(p.row, constant(r))) for r in range(rows)]
    totals = [[cgutils.alloca_once(b, v.kind) for _ in range(width)] for _ in range(rows)]
    for x in (x for row in totals for x in row):
        b.store(v.number(0.0), x)
    start = at(b, numbers.pointer, column)
    with loop(b, constant(0), count) as j:
        source = at(b, start, b.mul(j, numbers.row))
        later = at(b, source, b.mul(numbers.row, constant(AHEAD)))
        factors = [splat(b, b.load(at(b, weight, j)), v.lanes) for weight in weights]
        for i in range(width):
            if i % per_line == 0:
                _ask(b, at(b, later, i * v.lanes))
            x = v.widen(numbers.dtype, source, constant(i * v.lanes))
            for factor, row in zip(factors, totals, strict=True):
                b.store(v.fma(factor, x, b.load(row[i])), row[i])
    for r, row in enumerate(totals):
        for i, x in enumerate(row):
            place = b.add(b.add(b.mul(c.row, constant(r)), column), constant(i * v.lanes))
            v.store(b.fadd(v.load(c.pointer, place), b.load(x)), c.pointer, place)


def _by_lines(v: Vectors, stored: Any, vectors: Any, step: Callable[[Any], None], ask: Callable[[Any], None]) -> None:
    """Emit a step for each vector of a row of numbers, and what asks for a line before those of each line."""
    b = v.builder
    per_line = _vectors_per_line(v, stored)
    lines = b.udiv(vectors, constant(per_line))
    with loop(b, constant(0), lines) as i:
        first = b.mul(i, constant(per_line * v.lanes))
        ask(first)
        for u in range(per_line):
            step(b.add(first, constant(u * v.lanes)))
    if per_line > 1:
        with loop(b, b.mul(lines, constant(per_line)), vectors) as i:
            step(b.mul(i, constant(v.lanes)))


def _vectors_per_line(v: Vectors, stored: Any) -> int:
    """Give the vectors of stored numbers in a line of memory; one if they are longer."""
    return max(1, LINE * 8 // int(stored.bitwidth * v.lanes))


def _ask(builder: ir.IRBuilder, pointer: Any) -> None:
    prefetch(builder, builder.ptrtoint(pointer, constant(0).type))


def _cases(builder: ir.IRBuilder, rows: Any, lanes: int) -> Iterator[int]:
    """Emit a switch over how many rows go together; gives each number where its code goes."""
    return cases(builder, rows, [number for number in TOGETHER if number <= lanes])


@numba.njit
def together(left, most):  # type: ignore[no-untyped-def]
    """Give how many of the rows that are left go together, up to `most`."""
    for number in TOGETHER:
        if number <= most and number <= left:
            return number
    return 1


@numba.njit(error_model="numpy")
def score_direct(rows, tile, work, k):  # type: ignore[no-untyped-def]
    """S of a tile, `STRIP` keys at a time, in the order in which they lie in memory."""
    queries = work.queries
    s = work.s
    depth = k.shape[2]
    first, last = seen_by_any(tile, work.groups)
    strips = -(-(last - first) // STRIP)
    for number in range(strips * rows.heads):
        strip, head = nearest_first(number, strips, rows.heads, k)
        j = first + strip * STRIP
        keys = Strided(k.array, place_of(k, tile.start + j, tile.head + head), k.token)
        r, end = head * rows.n_rows, (head + 1) * rows.n_rows
        while r < end:
            some = together(end - r, lanes(s))
            dot_keys(Strided(queries, r * depth, depth), keys, Strided(s, r * s.shape[1] + j, s.shape[1]), some,
                     min(STRIP, last - j), depth)
            r += some


@numba.njit(error_model="numpy")
def multiply_direct(rows, tile, work, v):  # type: ignore[no-untyped-def]
    """Add P, which is in S, times values to acc, `STRIP` values at a time, in the order in which they lie in memory."""
    s = work.s
    acc = work.acc
    dim_v = v.shape[2]
    whole = dim_v - dim_v % lanes(acc)
    shrink_rows(rows.heads * rows.n_rows, tile, work)
    first, last = seen_by_any(tile, work.groups)
    strips = -(-(last - first) // STRIP)
    for number in range(strips * rows.heads):
        strip, head = nearest_first(number, strips, rows.heads, v)
        start = first + strip * STRIP
        r, end = head * rows.n_rows, (head + 1) * rows.n_rows
        while r < end:
            a, b = seen_of_strip(r, start, tile, work)
            some = together(end - r, lanes(acc))
            for i in range(r + 1, r + some):
                if seen_of_strip(i, start, tile, work) != (a, b):
                    some = 1
            if a < b:
                values = Strided(v.array, place_of(v, tile.start + a, tile.head + head), v.token)
                add_values(Strided(s, r * s.shape[1] + a, s.shape[1]), values, Strided(acc, r * acc.shape[1],
                           acc.shape[1]), some, b - a, whole)
                for i in range(r, r + some if whole < dim_v else r):
                    for c in range(whole, dim_v):
                        total = acc[i, c]
                        for j in range(a, b):
                            total += s[i, j] * widen(v.array[values.at + (j - a) * v.token + c])
                        acc[i, c] = total
            r += some


@numba.njit(error_model="numpy")
def shrink_rows(count, tile, work):  # type: ignore[no-untyped-def]
    """Shrink what rows that see something of the tile have summed; most maxima hold, and leave nothing to do."""
    for r in range(count):
        if work.shrink[r] != 1 and max(work.low[r], tile.start) < min(work.high[r], tile.start + tile.n):
            row, shrink = work.acc[r], work.shrink[r]
            for c in range(len(row)):
                row[c] *= shrink


@numba.njit
def seen_of_strip(r, start, tile, work):  # type: ignore[no-untyped-def]
    """Give the columns of the strip from `start` on that a row sees."""
    return (max(work.low[r] - tile.start, start), min(work.high[r] - tile.start, tile.n, start + STRIP))


@numba.njit
def seen_by_any(tile, groups):  # type: ignore[no-untyped-def]
    """Give the first column, of a whole strip, and the last that any group sees of a tile."""
    first, last = tile.n, 0
    for g in range(0, tile.rows, ROWS):
        if groups[g, 0] < groups[g, 1]:
            first, last = min(first, groups[g, 0]), max(last, groups[g, 1])
    return first // STRIP * STRIP, last


@numba.njit
def nearest_first(number, strips, heads, x):  # type: ignore[no-untyped-def]
    """Give strip and head of a number: heads of a token that lie side by side go before the next tokens."""
    if x.token >= x.head:
        return number // heads, number % heads
    return number % strips, number // strips
