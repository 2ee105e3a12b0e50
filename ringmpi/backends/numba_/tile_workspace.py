"""What the kernels on the tile unit write to, made once: packed tiles of K and V, and the rows of a thread."""

from __future__ import annotations

import numpy as np

from ...dtypes import FLOAT32
from ...environment import cache_bytes
from .amx import DEPTH, ROWS, TILE
from .arguments import KernelArguments
from .product import ROWS as GROUP
from .product import VECTORS
from .tile_gradient_load import gradient_tile_shape
from .tile_gradient_rows import PLACE
from .tile_rows import BLOCK, KEYS, SQUARE, STRIPS
from .tile_squares import SIDE
from .tuples import BackwardTiles, GradientTiles, KeySums, SpareWork, TileGradientWork, TileWork
from .vector import machine
from .workspace import Arena, Array, BackwardMemory, BackwardScratch, PackedKV, aligned, in_vectors

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
    pieces : int
        That a number is in: 1 of bfloat16, 3 of float32.
    """

    def __init__(self, dim: int, dim_v: int, threads: int, tile: int = 0, pieces: int = 1) -> None:
        widths = -(-dim // DEPTH) * DEPTH, -(-dim_v // DEPTH) * DEPTH
        rows, tile = (tile, tile) if tile else gradient_tile_shape(*widths, pieces, cache_bytes(2))
        self.pieces = tuple(range(pieces))
        sizes = tuple(tile * width * pieces for width in (*widths, widths[0]))
        super().__init__(rows, tile, GradientTiles, np.uint16, (*sizes, tile), FLOAT32, widths)
        self.scratch = [_work(*widths, rows, tile, pieces) for _ in range(threads)]
        spares = threads if pieces > 1 else 0
        self._spares = [_Spare(dim, dim_v, -(-rows // GROUP) * GROUP, tile) for _ in range(spares)]

    def reserve(self, heads: int, tiles: int) -> BackwardTiles | GradientTiles:
        """Give tiles for the kernels; see `BackwardMemory.reserve`."""
        packed = super().reserve(heads, tiles)
        return packed._replace(pieces=self.pieces) if isinstance(packed, GradientTiles) else packed

    def spare(self, thread: int, block: KernelArguments) -> SpareWork | None:
        """Give what a thread needs for odd rows and keys of a block; None where no number is odd."""
        return self._spares[thread].work_for(block) if self._spares else None


class _Spare:
    """Makes a thread's `SpareWork`."""

    def __init__(self, dim: int, dim_v: int, rows: int, tile: int) -> None:
        panel = VECTORS * machine().vector_bytes // FLOAT32.itemsize
        tile = -(-tile // panel) * panel              # whole panels are written
        self._scratch = BackwardScratch(dim, dim_v, FLOAT32, rows, tile)
        widths = in_vectors(dim, FLOAT32), in_vectors(dim_v, FLOAT32)
        sizes = tile * dim, tile * dim_v, tile * widths[0]
        self._packed = BackwardTiles(*(aligned(size, np.float32) for size in sizes), tile, 1)
        self._sums = KeySums(*(aligned((tile + GROUP, width), np.float32) for width in widths))

    def work_for(self, block: KernelArguments) -> SpareWork:
        """Give it for a block."""
        return SpareWork(self._packed, self._scratch.work, self._sums, block.any_score(self._scratch.row_score))


def _work(width: int, width_v: int, rows: int, keys: int, pieces: int) -> TileGradientWork:
    """Make what a thread needs for a tile of rows."""
    item, both = 2 * pieces, width + width_v
    arena = Arena(rows * ((2 * item + 12) * both + 3 * item * keys + 64) + 4 * keys + 64 * PLACE,
                  len(TileGradientWork._fields))

    def bits(numbers: int) -> Array:
        return arena.take(numbers * pieces, np.uint16)

    lse, delta = (arena.take(rows, np.float32) for _ in range(2))
    low, high = (arena.take(rows, np.int64) for _ in range(2))
    low_here, high_here = (arena.take(rows, np.int32) for _ in range(2))
    return TileGradientWork(
        s=arena.take(16 * PLACE, np.float32), queries=bits(rows * width), douts=bits(rows * width_v),
        p=bits(rows * keys), ds=bits(rows * keys), ds_pairs=bits(rows * keys), dq=arena.take(rows * width, np.float32),
        query_pairs=bits(rows * width), dout_pairs=bits(rows * width_v), lse=lse, delta=delta, low=low, high=high,
        odd=arena.take(rows, np.bool_), low_here=low_here, high_here=high_here, key_here=arena.take(keys, np.int32),
        seen=arena.take((rows // SIDE, 4), np.int64), dq_lines=arena.take((rows, width), np.float32),
        lines=arena.take(rows * max(width, width_v), np.uint16 if pieces == 1 else np.float32))
