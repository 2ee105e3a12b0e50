"""The product of the tile unit: C = A·B or C = C + A·B for 32 × 32 numbers of C, two tiles by two.

At each step of the depth, 32 bfloat16, two tiles of A and two of B are loaded for four products, so that the loads take
half of the time of the products where they come from the first-level cache.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from .amx import TILE, dot_tile, load_tile, store_tile, zero_tile
from .vector import at, constant, loop, unpack

SIDE = 32                   # numbers of C
A, B = (4, 5), (6, 7)       # tiles; C is tiles 0 to 3, row by row
FLOAT_BYTES = 4


@intrinsic
def square(context, a, b, c, depth):  # type: ignore[no-untyped-def]
    """C = A·B over `depth` tiles; a and b are `Strided` of bfloat16 bits, c is a `Square`.

    Tiles of A, and of B, that follow each other along the depth lie side by side, and `row` elements after them those
    of the other 16 rows of A, or columns of B.
    """
    return _square(a, b, c, depth, fresh=True)


@intrinsic
def add_square(context, a, b, c, depth):  # type: ignore[no-untyped-def]
    """C = C + A·B; else as `square`."""
    return _square(a, b, c, depth, fresh=False)


def _square(a: Any, b: Any, c: Any, depth: Any, fresh: bool) -> Any:
    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        a, b, c = (unpack(context, builder, signature.args[i], values[i]) for i in range(3))
        corners = [at(builder, at(builder, at(builder, c.array, c.at), builder.mul(c.down, constant(i))),
                      builder.mul(c.right, constant(j))) for i in (0, 1) for j in (0, 1)]
        row_bytes = builder.mul(c.row, constant(FLOAT_BYTES))
        for tile, corner in enumerate(corners):
            if fresh:
                zero_tile(builder, tile)
            else:
                load_tile(builder, tile, corner, row_bytes)

        left, right = ([at(builder, x.array, x.at), at(builder, x.array, builder.add(x.at, x.row))] for x in (a, b))
        with loop(builder, constant(0), values[3]) as step:
            place = builder.mul(step, constant(TILE))
            for tile, pointer in zip((B[0], A[0], B[1], A[1]), (right[0], left[0], right[1], left[1]), strict=True):
                load_tile(builder, tile, at(builder, pointer, place))
            for i in (0, 1):
                for j in (0, 1):
                    dot_tile(builder, 2 * i + j, A[i], B[j])
        for tile, corner in enumerate(corners):
            store_tile(builder, tile, corner, row_bytes)
        return context.get_dummy_value()

    return types.void(a, b, c, depth), emit
