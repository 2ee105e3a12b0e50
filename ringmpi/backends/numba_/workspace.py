"""What the Numba kernels write to, made once: packed tiles of K and V, and the rows that a thread works on.

`Packed` and `Rows` are for the forward pass, `BackRoom` and `BackRows` for the backward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...environment import cache_bytes
from .gradient import BackWork, gradient_tile_shape
from .product import ROWS
from .tile import Work, tile_shape
from .vector import machine

Array = NDArray[Any]
LINE = 64            # bytes of a cache line, and of the longest vector
SPARE = 16           # numbers after the rows' own: a vector of them is stored at once


def aligned(shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
    """Make an array, not initialised, that begins with a cache line: vectors across two lines take two loads."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    room = np.empty(size + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start:start + size].view(kind).reshape(shape)


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
            self._arrays = (*(aligned(slots * size, self.words) for size in self._sizes), aligned(slots, np.bool_))
        keys, values, finite = self._arrays
        return keys[:slots * self._sizes[0]], values[:slots * self._sizes[1]], finite[:slots], self.tile, tiles


class Rows:
    """What a thread needs to fold tiles into a tile of rows, and one tile of its own; see `tile.Work`."""

    def __init__(self, depth: int, dim_v: int, kind: np.dtype[Any], pairs: bool) -> None:
        packed = Packed(depth, dim_v, kind, pairs)
        n = packed.rows
        scores = aligned((n, packed.tile), kind)
        weights = aligned((n, packed.tile // 2), np.uint32) if pairs else scores
        self.private = packed.reserve(1, 1)
        self.traits = traits(n, kind)
        self.work = Work(aligned((n, depth), packed.words), scores, weights, aligned((n, packed.width), kind),
                         *(np.zeros(n + SPARE, kind) for _ in range(4)), *(aligned(n, np.int64) for _ in range(2)),
                         aligned((n, 4), np.int64))


def traits(rows: int, kind: np.dtype[Any]) -> tuple[Array, ...]:
    """Room for what a score needs to know of each row; see `score_rows.Shape`."""
    integer = np.dtype(f"i{kind.itemsize}")
    return aligned(rows, kind), aligned(rows, integer), aligned(rows, integer)


class BackRoom:
    """Packed tiles, sums of dK and dV, and what each of `threads` threads works on.

    Parameters
    ----------
    dim, dim_v : int
        Numbers of a key and a value.
    kind : dtype
        Of the accumulator.
    threads : int
    """

    def __init__(self, dim: int, dim_v: int, kind: np.dtype[Any], threads: int) -> None:
        lanes = machine().vector_bytes // kind.itemsize
        self.kind, self.widths = kind, tuple(-(-x // lanes) * lanes for x in (dim, dim_v))
        self.rows, self.tile = gradient_tile_shape(*self.widths, kind.itemsize, cache_bytes(2))
        self.threads = [BackRows(dim, dim_v, self.widths, kind, self.rows, self.tile) for _ in range(threads)]
        self._sizes = self.tile * dim, self.tile * dim_v, self.tile * self.widths[0]
        self._packed: tuple[Array, ...] = tuple(np.empty(0, kind) for _ in self._sizes)
        self._sums: tuple[Array, ...] = tuple(np.empty(0, kind) for _ in self.widths)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a packed tile of one key head."""
        return sum(self._sizes) * self.kind.itemsize

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums for a tile."""
        return self.tile * sum(self.widths) * self.kind.itemsize

    def reserve(self, heads: int, tiles: int) -> tuple[Any, ...]:
        """Give (keys, values, keys as values, keys of a tile, tiles of a head) for the kernels; never shrinks."""
        sizes = [heads * tiles * size for size in self._sizes]
        if len(self._packed[0]) < sizes[0]:
            self._packed = ()                          # the old memory goes before the new comes
            self._packed = tuple(aligned(size, self.kind) for size in sizes)
        return *(x[:size] for x, size in zip(self._packed, sizes, strict=True)), self.tile, tiles

    def reserve_sums(self, count: int, keys: int) -> tuple[Array, ...]:
        """Give sums of dK and dV, each (count, keys, width), not initialised; grows, never shrinks."""
        if len(self._sums[0]) < count * keys * self.widths[0]:
            self._sums = ()
            self._sums = tuple(aligned(count * keys * width, self.kind) for width in self.widths)
        return tuple(x[:count * keys * width].reshape(count, keys, width)
                     for x, width in zip(self._sums, self.widths, strict=True))


class BackRows:
    """What a thread needs to differentiate tiles for a tile of rows; see `gradient.BackWork`."""

    def __init__(self, dim: int, dim_v: int, widths: tuple[int, ...], kind: np.dtype[Any], rows: int,
                 tile: int) -> None:
        keys = tile + LINE // kind.itemsize            # lines of a column fall into different sets of the cache
        shapes: tuple[Any, ...] = ((rows, dim), (rows, dim_v), rows * widths[0], rows * widths[1], (rows, keys),
                                   (rows, keys), (rows, widths[0]), rows, rows, rows)
        arrays = [aligned(shape, kind) for shape in shapes]
        arrays[7].fill(1)
        integers = [aligned(shape, np.int64) for shape in (rows, rows, (rows, 4), (tile // ROWS + 1, 2))]
        self.work, self.traits = BackWork(*arrays, *integers), traits(rows, kind)
