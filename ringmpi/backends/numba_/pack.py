"""Packing: a tile of K, V or Q into the order in which the products read it, widened to what they multiply.

K is transposed so that keys lie across lanes: panels of a few vectors of keys, each depth × width. V keeps its rows,
cut into panels of up to `VECTORS` vectors of columns, each keys × width, padded with zeros. Q is rows. Where the
products take pairs of bfloat16, two steps of the depth share a uint32.

Transposing works on squares of lanes × lanes in registers: log2(lanes) shuffles for each vector.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .product import VECTORS
from .tuples import Strided
from .vector import Vectors, at, constant, dtype_of, loop, machine, unpack


def widen(x):  # type: ignore[no-untyped-def]
    """Give a float for stored bits: uint16 is bfloat16, int16 is float16, floats are themselves."""
    raise NotImplementedError("typed by Numba")


@overload(widen)
def _widen(x):  # type: ignore[no-untyped-def]
    if x is types.uint16:              # bfloat16 is the upper half of a float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return _widen_half if x is types.int16 else (lambda x: x)


def _widen_half(x):  # type: ignore[no-untyped-def]
    bits = np.uint32(np.uint32(x) & np.uint32(0xFFFF))
    rest = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    # 2^112 moves the exponent's bias, subnormals included; infinity and NaN keep their exponent.
    moved = np.float32(rest.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    moved = np.uint32(rest | np.uint32(0x7F800000)) if rest >= np.uint32(0x0F800000) else moved
    return np.uint32(moved | ((bits & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)


def weight(p, r, j):  # type: ignore[no-untyped-def]
    """Give number j of row r, where p may hold pairs of bfloat16."""
    raise NotImplementedError("typed by Numba")


@overload(weight)
def _weight(p, r, j):  # type: ignore[no-untyped-def]
    if p.dtype is types.uint32:
        return lambda p, r, j: widen(np.uint16(p[r, j // 2] >> np.uint32(j % 2 * 16)))
    return lambda p, r, j: p[r, j]


def lanes(array):  # type: ignore[no-untyped-def]
    """Elements of an array's dtype in a vector."""
    raise NotImplementedError("typed by Numba")


@overload(lanes)
def _lanes(array):  # type: ignore[no-untyped-def]
    count = machine().lanes(array.dtype)
    return lambda array: count


@numba.njit
def place_of(x, i, head):  # type: ignore[no-untyped-def]
    """Give the element of `Tokens` x at which head `head` of token i begins."""
    return i * x.token + head * x.head


@intrinsic
def transpose_square(context, x, y):  # type: ignore[no-untyped-def]
    """Write a square of lanes × lanes of x, transposed and widened, to y; both are `Strided`."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        stored, dtype = (dtype_of(kind, "array") for kind in signature.args)
        x, y = (unpack(context, builder, kind, value) for kind, value in zip(signature.args, values, strict=True))
        source, target = x.array, y.array
        if dtype == types.uint32:         # pairs move as they are
            stored = dtype = types.float32
            source, target = (builder.bitcast(p, ir.FloatType().as_pointer()) for p in (source, target))
        v = Vectors(builder, dtype)
        source, target = at(builder, source, x.at), at(builder, target, y.at)
        rows = [v.widen(stored, source, builder.mul(x.row, constant(i))) for i in range(v.lanes)]
        for i, row in enumerate(v.transpose(rows)):
            v.store(row, target, builder.mul(y.row, constant(i)))
        return context.get_dummy_value()

    return types.void(x, y), emit


@numba.njit(error_model="numpy")
def pack_keys(k, start, n, head, out, out_at):  # type: ignore[no-untyped-def]
    """Keys start..start+n of `head`, k `Tokens`, to panels in `out`; absent keys are zeros."""
    depth = k.shape[2]
    side = lanes(out)
    wide = VECTORS * side
    for j in range(0, -(-n // wide) * wide, side):
        place = out_at + j // wide * wide * depth + j % wide
        whole = depth - depth % side if j + side <= n else 0
        for d in range(0, whole, side):
            transpose_square(Strided(k.array, place_of(k, start + j, head) + d, k.token),
                             Strided(out, place + d * wide, wide))
        for d in range(whole, depth):
            for c in range(side):
                x = widen(k.array[place_of(k, start + j + c, head) + d]) if j + c < n else widen(out.dtype.type(0))
                out[place + d * wide + c] = x


@numba.njit(error_model="numpy")
def pack_queries(q, first, count, head, group, out):  # type: ignore[no-untyped-def]
    """Rows first..first+count of key head `head`, q `Tokens`, to out (rows, depth).

    Row r is query r // group of head r % group.
    """
    dim = q.shape[2]
    for r in range(len(out)):
        row = out[r]
        if r >= count:
            row[:] = 0
            continue
        at = place_of(q, (first + r) // group, head * group + (first + r) % group)
        given = q.array[at:at + dim]
        for d in range(dim):
            row[d] = widen(given[d])


def pack_values(v, start, n, head, out, out_at, keys):  # type: ignore[no-untyped-def]
    """Values start..start+n of `head`, v `Tokens`, to panels of `keys` rows; say if all are finite."""
    raise NotImplementedError("typed by Numba")


@overload(pack_values)
def _pack_values(v, start, n, head, out, out_at, keys):  # type: ignore[no-untyped-def]
    return _pack_value_pairs if out.dtype is types.uint32 else _pack_value_rows


def _pack_value_rows(v, start, n, head, out, out_at, keys):  # type: ignore[no-untyped-def]
    dim_v = v.shape[2]
    side = lanes(out)
    source = place_of(v, start, head)
    place = out_at
    finite = True
    for first, width in panels(dim_v, side):
        whole = min(width, dim_v - first) // side * side
        finite &= copy_rows(Strided(v.array, source + first, v.token), Strided(out, place, width), n, whole)
        for j in range(n if whole < width else 0):
            for c in range(whole, width):
                x = widen(v.array[source + j * v.token + first + c]) if first + c < dim_v else out.dtype.type(0)
                out[place + j * width + c] = x
                finite &= x - x == 0
        place += keys * width
    return finite


@intrinsic
def copy_rows(context, x, y, n, columns):  # type: ignore[no-untyped-def]
    """Copy n rows of `columns` numbers, whole vectors, widened, from x to y, both `Strided`; say if all are finite."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        stored, dtype = (dtype_of(kind, "array") for kind in signature.args[:2])
        x, y = (unpack(context, builder, signature.args[i], values[i]) for i in (0, 1))
        x_at, y_at = at(builder, x.array, x.at), at(builder, y.array, y.at)
        n, columns = values[2:]
        v = Vectors(builder, dtype)
        zero = v.number(0.0)
        checks = [cgutils.alloca_once(builder, v.kind) for _ in range(4)]       # NaN where 0 × number is
        for check in checks:
            builder.store(zero, check)

        def copy(j, check):  # type: ignore[no-untyped-def]
            source, target = at(builder, x_at, builder.mul(j, x.row)), at(builder, y_at, builder.mul(j, y.row))
            with loop(builder, constant(0), builder.udiv(columns, constant(v.lanes))) as i:
                place = builder.mul(i, constant(v.lanes))
                numbers = v.widen(stored, source, place)
                v.store(numbers, target, place)
                builder.store(v.fma(numbers, zero, builder.load(check)), check)

        blocks = builder.udiv(n, constant(4))
        with loop(builder, constant(0), blocks) as i:
            for u, check in enumerate(checks):
                copy(builder.add(builder.mul(i, constant(4)), constant(u)), check)
        with loop(builder, builder.mul(blocks, constant(4)), n) as j:
            copy(j, checks[0])
        total = builder.load(checks[0])
        for check in checks[1:]:
            total = builder.fadd(total, builder.load(check))
        total = v.sum(total)
        return builder.fcmp_ordered("==", total, total)

    return types.boolean(x, y, n, columns), emit


def _pack_value_pairs(v, start, n, head, out, out_at, keys):  # type: ignore[no-untyped-def]
    dim_v = v.shape[2]
    side = lanes(out)
    infinite = False
    place = out_at
    for first, width in panels(dim_v, side):
        columns = min(width, dim_v - first)
        for j in range(0, n, 2):
            row, source = out[place + j // 2 * width:place + (j // 2 + 1) * width], place_of(v, start + j, head) + first
            for c in range(columns):
                low = np.uint32(v.array[source + c])
                high = np.uint32(v.array[source + v.token + c]) if j + 1 < n else np.uint32(0)
                row[c] = np.uint32(low | (high << np.uint32(16)))
                for x in (widen(np.uint16(low)), widen(np.uint16(high))):
                    infinite |= x - x != 0
            for c in range(width - columns):
                row[columns + c] = np.uint32(0)
        place += keys // 2 * width
    return not infinite


@numba.njit
def panels(dim_v, side):  # type: ignore[no-untyped-def]
    """Yield (first column, width) of the panels of V: as few as can be, as equal as can be, in whole vectors."""
    vectors = -(-dim_v // side)
    count = -(-vectors // VECTORS)
    first = 0
    for p in range(count):
        width = (vectors // count + (p < vectors % count)) * side
        yield first, width
        first += width
