"""The product of the tile unit: C = C + A·B for 32 × 32 numbers of C, two tiles by two.

At each step of the depth, 32 bfloat16, two tiles of A and two of B are loaded for four products, so that the loads take
half of the time of the products where they come from the first-level cache. Of numbers in three pieces six products
count (see `pieces`), in an order in which two pieces follow each other that one tile of A or B has in common: 14 loads
for 24 products.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from .amx import TILE, dot_tile, load_tile, store_tile
from .vector import at, constant, loop, prefetch, unpack

SIDE = 32                   # numbers of C
A, B = (4, 5), (6, 7)       # tiles; C is tiles 0 to 3, row by row
ORDER = {1: [(0, 0)], 3: [(0, 2), (0, 1), (0, 0), (2, 0), (1, 0), (1, 1)]}      # pieces of A and B, by their number
FLOAT_BYTES = 4


@intrinsic
def ask(context, address):  # type: ignore[no-untyped-def]
    """Ask for the line of an address to come to the second-level cache; any address is allowed."""
    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        prefetch(builder, values[0])
        return context.get_dummy_value()

    return types.void(address), emit


@intrinsic
def add_square(context, a, b, c, depth, pieces):  # type: ignore[no-untyped-def]
    """C = C + A·B over `depth` tiles; a and b are `Strided` of bfloat16 bits, c is a `Square`.

    Tiles of A, and of B, that follow each other along the depth lie side by side, each with all its pieces, of which
    `pieces` is the tuple of numbers; `row` elements after them those of the other 16 rows of A, or columns of B.
    """
    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        a, b, c = (unpack(context, builder, signature.args[i], values[i]) for i in range(3))
        corners = [at(builder, at(builder, at(builder, c.array, c.at), builder.mul(c.down, constant(i))),
                      builder.mul(c.right, constant(j))) for i in (0, 1) for j in (0, 1)]
        row_bytes = builder.mul(c.row, constant(FLOAT_BYTES))
        for tile, corner in enumerate(corners):
            load_tile(builder, tile, corner, row_bytes)

        left, right = ([at(builder, x.array, x.at), at(builder, x.array, builder.add(x.at, x.row))] for x in (a, b))
        with loop(builder, constant(0), values[3]) as step:
            place = builder.mul(step, constant(len(pieces) * TILE))
            tiles = [[at(builder, x, place) for x in both] for both in (left, right)]
            _add_products(builder, tiles[0], tiles[1], len(pieces))
        for tile, corner in enumerate(corners):
            store_tile(builder, tile, corner, row_bytes)
        return context.get_dummy_value()

    return types.void(a, b, c, depth, pieces), emit


def _add_products(builder: Any, left: list[Any], right: list[Any], pieces: int) -> None:
    """Add the products of a step: of two tiles of A and two of B, which all are there in pieces."""
    held: tuple[int | None, int | None] = None, None
    for piece_a, piece_b in ORDER[pieces]:
        for i in (0, 1):
            if piece_b != held[1]:
                load_tile(builder, B[i], at(builder, right[i], piece_b * TILE))
            if piece_a != held[0]:
                load_tile(builder, A[i], at(builder, left[i], piece_a * TILE))
        held = piece_a, piece_b
        for i in (0, 1):
            for j in (0, 1):
                dot_tile(builder, 2 * i + j, A[i], B[j])
