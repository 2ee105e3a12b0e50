"""What the kernels on the tile unit write to, made once: packed tiles of K and V, and the rows of a thread."""

from __future__ import annotations

import numpy as np

from ...dtypes import FLOAT32
from ...environment import cache_bytes
from .amx import DEPTH, ROWS, TILE
from .tile_gradient_rows import PLACE
from .tile_gradients import gradient_tile_shape
from .tile_rows import BLOCK, KEYS, SQUARE, STRIPS
from .tile_squares import SIDE
from .tuples import GradientTiles, TileGradientWork, TileWork
from .workspace import Array, BackwardMemory, PackedKV, aligned

MOST_BLOCKS = 16            # of rows, that meet a packed tile while it is in cache
ASIDE = 256                 # numbers between two arrays, so that the same rows of them are in other lines of the cache


class PackedTiles(PackedKV):
    """Memory for packed tiles of K and V, a number of tiles for each key head.

    Parameters
    ----------
    dim, dim_v : int
    pieces : int
        Of bfloat16, that a number is: 1, or 3 for float32.
    """

    def __init__(self, dim: int, dim_v: int, pieces: int) -> None:
        self.pieces = pieces
        self.words = np.dtype(np.uint16)
        self.depth, self.width = -(-dim // DEPTH), -(-dim_v // DEPTH)          # in tiles, and in pairs of tiles
        self.rows, self.tile = MOST_BLOCKS * BLOCK, KEYS
        self.cached = 0                                  # each thread packs none of its own
        self._sizes = KEYS // ROWS * self.depth * TILE * pieces, 2 * self.width * STRIPS * TILE * pieces
        self._arrays = np.empty(0, np.uint16), np.empty(0, np.uint16), np.empty(0, np.bool_)


class TileScratch:
    """What a thread needs to fold packed tiles into some blocks of rows."""

    def __init__(self, dim: int, dim_v: int, pieces: int) -> None:
        packed = PackedTiles(dim, dim_v, pieces)
        n = packed.rows

        def singles(*shape: int) -> Array:
            return aligned(int(np.prod(shape)), np.float32)

        self.work = TileWork(
            queries=aligned(n * packed.depth * DEPTH * pieces, np.uint16), uneven=np.zeros(n // BLOCK, np.bool_),
            s=singles(2, BLOCK, KEYS), p=aligned(2 * BLOCK * KEYS * pieces + ASIDE, np.uint16)[ASIDE:],
            acc=singles(n // ROWS, 2 * packed.width, SQUARE), part=singles(2, 4, SQUARE),
            tops=singles(BLOCK, ROWS), sums=singles(BLOCK, ROWS), row_max=singles(n), row_sum=singles(n),
            shrink=singles(2, BLOCK), shift=singles(n), low=aligned(n, np.int64), high=aligned(n, np.int64))


class TileBackwardBuffers(BackwardMemory):
    """What the backward pass on tiles takes, and what each of `threads` threads works on.

    Parameters
    ----------
    dim, dim_v : int
        Numbers of a key and a value.
    threads : int
    tile : int
        Rows and keys of a tile, in whole squares; 0: as many as fit the cache.
    """

    def __init__(self, dim: int, dim_v: int, threads: int, tile: int = 0) -> None:
        widths = -(-dim // DEPTH) * DEPTH, -(-dim_v // DEPTH) * DEPTH
        rows, tile = (tile, tile) if tile else gradient_tile_shape(*widths, cache_bytes(2))
        super().__init__(rows, tile, GradientTiles, np.uint16, (tile * widths[0], tile * widths[1], tile * widths[0]),
                         FLOAT32, widths)
        self.scratch = [_work(*widths, rows, tile) for _ in range(threads)]


def _work(width: int, width_v: int, rows: int, keys: int) -> TileGradientWork:
    """Make what a thread needs for a tile of rows."""
    def bits(numbers: int) -> Array:
        return aligned(numbers, np.uint16)

    lse, delta = (aligned(rows, np.float32) for _ in range(2))
    low, high = (aligned(rows, np.int64) for _ in range(2))
    low_here, high_here = (aligned(rows, np.int32) for _ in range(2))
    return TileGradientWork(
        lines=bits(rows * max(width, width_v)), queries=bits(rows * width), douts=bits(rows * width_v),
        query_pairs=bits(rows * width), dout_pairs=bits(rows * width_v), s=aligned(8 * PLACE, np.float32),
        p=bits(rows * keys), ds=bits(rows * keys), ds_pairs=bits(rows * keys), dq=aligned(rows * width, np.float32),
        dq_lines=aligned((rows, width), np.float32), lse=lse, delta=delta, low=low, high=high, low_here=low_here,
        high_here=high_here, seen=aligned((rows // SIDE, 4), np.int64))
