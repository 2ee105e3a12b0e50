"""What the backward pass on the CPU's tiles writes to, made once; see `workspace`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...environment import cache_bytes
from .amx import DEPTH
from .tile_gradient_rows import PLACE
from .tile_gradients import gradient_tile_shape
from .tile_squares import SIDE
from .tuples import GradientTiles, TileGradientWork
from .workspace import Array, BackwardMemory, aligned

FLOAT32: np.dtype[Any] = np.dtype(np.float32)


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
