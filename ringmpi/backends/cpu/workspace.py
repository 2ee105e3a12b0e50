"""What the Numba kernels write to, made once: packed tiles of K and V, and the rows that a thread works on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...environment import cache_bytes
from .tile import Work, tile_shape
from .vector import machine

Array = NDArray[Any]
SPARE = 16           # numbers after the rows' own: a vector of them is stored at once


class Packed:
    """Room for packed tiles of K and V, a number of tiles for each key head.

    Parameters
    ----------
    depth, dim_v : int
        Numbers (or pairs) of a key; columns of a value.
    kind : dtype
        Of the accumulator.
    pairs : bool
        Whether bfloat16 is multiplied in pairs, which are uint32.
    """

    def __init__(self, depth: int, dim_v: int, kind: np.dtype[Any], pairs: bool) -> None:
        lanes = machine().vector_bytes // kind.itemsize
        self.words = np.dtype(np.uint32) if pairs else kind
        self.width = -(-dim_v // lanes) * lanes
        self.rows, self.tile = tile_shape(depth, self.width, kind.itemsize, cache_bytes(2))
        self._sizes = self.tile * depth, self.tile * self.width // (2 if pairs else 1)
        self._arrays: tuple[Array, ...] = (np.empty(0, self.words), np.empty(0, self.words), np.empty(0, np.bool_))

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of one key head."""
        return sum(self._sizes) * self.words.itemsize

    def reserve(self, heads: int, tiles: int) -> tuple[Any, ...]:
        """Give (keys, values, finite, keys of a tile, tiles of a head) for the kernels; grows, never shrinks."""
        slots = heads * tiles
        if len(self._arrays[2]) < slots:
            self._arrays = (*(np.empty(slots * size, self.words) for size in self._sizes), np.empty(slots, np.bool_))
        keys, values, finite = self._arrays
        return keys[:slots * self._sizes[0]], values[:slots * self._sizes[1]], finite[:slots], self.tile, tiles


class Rows:
    """What a thread needs to fold tiles into a tile of rows, and one tile of its own; see `tile.Work`."""

    def __init__(self, depth: int, dim_v: int, kind: np.dtype[Any], pairs: bool) -> None:
        packed = Packed(depth, dim_v, kind, pairs)
        n = packed.rows
        scores = np.empty((n, packed.tile), kind)
        weights = np.empty((n, packed.tile // 2), np.uint32) if pairs else scores
        self.private = packed.reserve(1, 1)
        self.work = Work(np.empty((n, depth), packed.words), scores, weights, np.empty((n, packed.width), kind),
                         *(np.zeros(n + SPARE, kind) for _ in range(4)), *(np.empty(n, np.int64) for _ in range(2)),
                         np.empty((n, 4), np.int64))
