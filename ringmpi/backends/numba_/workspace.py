"""What the Numba kernels write to, made once: packed tiles of K and V, and the rows that a thread works on.

`PackedKV` and `ForwardScratch` are for the forward pass, `BackwardBuffers` and `BackwardScratch` for the backward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...environment import cache_bytes
from ...relative import MOST_AXES
from .backward_tile import backward_tile_shape
from .forward_tile import forward_tile_shape
from .product import ROWS
from .tuples import BackwardTiles, BackwardWork, ForwardTiles, ForwardWork, GradientTiles, KeySums
from .vector import machine

Array = NDArray[Any]
LINE = 64            # bytes of a cache line, and of the longest vector
LARGE_PAGE = 2**21
APART = 1088         # bytes between two arrays of one size, so that their rows are in other lines of the cache
SPARE = 16           # numbers after the rows' own: a vector of them is stored at once


def aligned(shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
    """Make an array, not initialised, that begins with a cache line: vectors across two lines take two loads."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + LINE, np.uint8)
    start = -buffer.ctypes.data % LINE
    return buffer[start:start + size].view(dtype).reshape(shape)


class Arena:
    """Arrays that lie side by side in memory of large pages, which NumPy asks for from 4 MiB on.

    What a thread works on fits the second-level cache; on small pages, which lie anywhere, some of it pushes out the
    rest. What it reads from memory takes two hundred small pages for a tile of keys.
    """

    def __init__(self, nbytes: int, arrays: int) -> None:
        self._buffer = aligned(max(nbytes + arrays * (APART + LINE) + LARGE_PAGE, 2 * LARGE_PAGE), np.uint8)
        self._at = -self._buffer.ctypes.data % LARGE_PAGE

    def take(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """Give the next array, not initialised."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        start = self._at
        self._at += -(-size // LINE) * LINE + APART
        return self._buffer[start:start + size].view(dtype).reshape(shape)


def in_vectors(numbers: int, acc_dtype: np.dtype[Any]) -> int:
    """Give `numbers` in whole vectors."""
    lanes = machine().vector_bytes // acc_dtype.itemsize
    return -(-numbers // lanes) * lanes


class PackedKV:
    """Memory for packed tiles of K and V in the forward pass, a number of tiles for each key head.

    Parameters
    ----------
    depth, dim_v : int
        Numbers (or pairs) of a key; columns of a value.
    acc_dtype : dtype
    pairs : bool
        Whether bfloat16 is multiplied in pairs, which are uint32.
    keys : int
        Of a tile; 0: as many as fit the cache.
    """

    def __init__(self, depth: int, dim_v: int, acc_dtype: np.dtype[Any], pairs: bool, keys: int) -> None:
        self.words = np.dtype(np.uint32) if pairs else acc_dtype
        self.width = in_vectors(dim_v, acc_dtype)
        cache = cache_bytes(2)
        self.rows, self.tile = forward_tile_shape(depth, self.width, acc_dtype.itemsize, cache, keys)
        self._sizes = self.tile * depth, self.tile * self.width // (2 if pairs else 1)
        self.cached = cache // 4 // self.tile_bytes          # tiles that fit beside what else a thread works on
        self._arrays: tuple[Array, ...] = (np.empty(0, self.words), np.empty(0, self.words), np.empty(0, np.bool_))

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of one key head."""
        return sum(self._sizes) * self.words.itemsize

    def reserve(self, heads: int, tiles: int, private: bool = False) -> ForwardTiles:
        """Give tiles for the kernels; the memory grows, and never shrinks."""
        slots = heads * tiles
        if len(self._arrays[2]) < slots:
            self._arrays = (*(aligned(slots * size, self.words) for size in self._sizes), aligned(slots, np.bool_))
        keys, values, finite = self._arrays
        return ForwardTiles(keys[:slots * self._sizes[0]], values[:slots * self._sizes[1]], finite[:slots], self.tile,
                            tiles, private)


class ForwardScratch:
    """What a thread needs to fold tiles into a tile of rows, and packed tiles of its own."""

    def __init__(self, depth: int, dim_v: int, acc_dtype: np.dtype[Any], pairs: bool, keys: int) -> None:
        packed = PackedKV(depth, dim_v, acc_dtype, pairs, keys)
        n = packed.rows
        scores = aligned((n, packed.tile), acc_dtype)
        weights = aligned((n, packed.tile // 2), np.uint32) if pairs else scores
        row_max, row_sum, shrink, shift = (np.zeros(n + SPARE, acc_dtype) for _ in range(4))
        self._packed = packed
        self.private = packed.reserve(1, 1, private=True)
        self.row_score = row_score(n, acc_dtype)
        self.work = ForwardWork(
            queries=aligned((n, depth), packed.words), s=scores, p=weights, acc=aligned((n, packed.width), acc_dtype),
            row_max=row_max, row_sum=row_sum, shrink=shrink, shift=shift,
            low=aligned(n, np.int64), high=aligned(n, np.int64), groups=aligned((n, 4), np.int64),
            sums=aligned(in_vectors(1, acc_dtype) * n, acc_dtype), eager=aligned(n, np.bool_))

    def own(self, tiles: int) -> ForwardTiles:
        """Give tiles for one head at a time, whichever that is, which the thread packs for itself."""
        return self._packed.reserve(1, tiles)._replace(tiles=0)


def row_score(rows: int, acc_dtype: np.dtype[Any]) -> tuple[Array, ...]:
    """Make what a score needs to know of each row of the work space: for the last fields of a `ScoreArguments`."""
    integer = np.dtype(f"i{acc_dtype.itemsize}")
    places = aligned(rows, np.int64), aligned(rows, np.int64), *(aligned(MOST_AXES * rows, np.int64) for _ in range(3))
    return aligned(rows, acc_dtype), aligned(rows, integer), aligned(rows, integer), *places


class BackwardMemory:
    """Packed tiles of K and V, and sums of dK and dV, in the backward pass.

    Parameters
    ----------
    rows, tile : int
        Rows, and keys, of a tile.
    kind : type
        Of a named tuple: an array for each of `sizes`, then keys of a tile and tiles of a head.
    stored : dtype
        Of packed tiles.
    sizes : tuple of int
        Numbers of each array for a tile of a key head.
    acc_dtype : dtype
    widths : tuple of int
        Numbers of a key, and of a value, in the sums.
    """

    def __init__(self, rows: int, tile: int, kind: type[BackwardTiles | GradientTiles], stored: DTypeLike,
                 sizes: tuple[int, ...], acc_dtype: np.dtype[Any], widths: tuple[int, int]) -> None:
        self.rows = rows
        self.tile = tile
        self.widths = widths
        self.tile_bytes = sum(sizes) * np.dtype(stored).itemsize
        self.sums_bytes = tile * sum(widths) * acc_dtype.itemsize
        self._kind = kind
        self._sizes = sizes
        self._packed: tuple[Array, ...] = tuple(np.empty(0, stored) for _ in sizes)
        self._sums: tuple[Array, ...] = tuple(np.empty(0, acc_dtype) for _ in widths)

    def reserve(self, heads: int, tiles: int) -> BackwardTiles | GradientTiles:
        """Give tiles for the kernels; the memory grows, and never shrinks."""
        sizes = [heads * tiles * size for size in self._sizes]
        if len(self._packed[0]) < sizes[0]:
            stored = self._packed[0].dtype
            self._packed = ()                          # the old memory goes before the new comes
            arena = Arena(sum(sizes) * stored.itemsize, len(sizes))
            self._packed = tuple(arena.take(size, stored) for size in sizes)
        return self._kind(*(x[:size] for x, size in zip(self._packed, sizes, strict=True)), self.tile, tiles)

    def reserve_sums(self, count: int, keys: int) -> KeySums:
        """Give sums of dK and dV, each (count, keys, width), not initialised; the memory grows, and never shrinks."""
        if len(self._sums[0]) < count * keys * self.widths[0]:
            acc_dtype = self._sums[0].dtype
            self._sums = ()
            arena = Arena(count * keys * sum(self.widths) * acc_dtype.itemsize, 2)
            self._sums = tuple(arena.take(count * keys * width, acc_dtype) for width in self.widths)
        return KeySums(*(x[:count * keys * width].reshape(count, keys, width)
                         for x, width in zip(self._sums, self.widths, strict=True)))


class BackwardBuffers(BackwardMemory):
    """What the backward pass takes, and what each of `threads` threads works on.

    Parameters
    ----------
    dim, dim_v : int
        Numbers of a key and a value.
    acc_dtype : dtype
    threads : int
    tile : int
        Rows and keys of a tile; 0: as many as fit the cache.
    """

    def __init__(self, dim: int, dim_v: int, acc_dtype: np.dtype[Any], threads: int, tile: int = 0) -> None:
        widths = in_vectors(dim, acc_dtype), in_vectors(dim_v, acc_dtype)
        rows, tile = (tile, tile) if tile else backward_tile_shape(*widths, acc_dtype.itemsize, cache_bytes(2))
        super().__init__(rows, tile, BackwardTiles, acc_dtype, (tile * dim, tile * dim_v, tile * widths[0]), acc_dtype,
                         widths)
        self.scratch = [BackwardScratch(dim, dim_v, acc_dtype, rows, tile) for _ in range(threads)]


class BackwardScratch:
    """What a thread needs for the backward pass of a tile of rows."""

    def __init__(self, dim: int, dim_v: int, acc_dtype: np.dtype[Any], rows: int, tile: int) -> None:
        width, width_v = in_vectors(dim, acc_dtype), in_vectors(dim_v, acc_dtype)
        keys = tile + LINE // acc_dtype.itemsize       # lines of a column fall into different sets of the cache

        def numbers(*shape: int) -> Array:
            return aligned(shape, acc_dtype)

        def integers(*shape: int) -> Array:
            return aligned(shape, np.int64)

        self.work = BackwardWork(
            queries=numbers(rows, dim), douts=numbers(rows, dim_v),
            query_panels=numbers(rows * width), dout_panels=numbers(rows * width_v),
            s=numbers(rows, keys), dp=numbers(rows, keys), dq=numbers(rows, width),
            ones=numbers(rows), lse=numbers(rows), delta=numbers(rows),
            low=integers(rows), high=integers(rows), groups=integers(rows, 4), spans=integers(tile // ROWS + 1, 2))
        self.work.ones.fill(1)
        self.row_score = row_score(rows, acc_dtype)
