"""Which instances of the CUDA kernels there are for a dtype, dims and a number of rows, and which fits a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ...dtypes import BFLOAT16
from ...errors import BackendError
from .sources import Kernel, Kind

CANONICAL_TILE = 192          # as in rows.cuh: a multiple of the keys, and of the rows, that come and go in tiles
FLOAT64_GRADIENT_TILES = (4, 1, 16, 2), (2, 1, 16, 2), (2, 1, 16, 1), (1, 1, 16, 1)
MANY_ROWS = 2**30
PLAIN = Kind()
SLICE_FLOAT64 = 128           # columns of a result that fit a thread's registers beside the rest, in float64
TYPES = {np.dtype(np.float64): "double", np.dtype(np.float32): "float", BFLOAT16: "bfloat16",
         np.dtype(np.float16): "float16"}


class Dims(NamedTuple):
    """Columns of a tile, multiples of 16."""

    qk: int
    v: int


class Tile(NamedTuple):
    """What a block of threads works on at a time.

    Attributes
    ----------
    lanes : int
        Warps, pairs of warps, or without tensor cores rows of 16 threads.
    height : int
        Rows of each: of 16 for a warp, of one for a row of threads.
    others : int
        Rows or keys that come and go in tiles.
    stages : int
        Tiles of those in shared memory.
    """

    lanes: int
    height: int
    others: int
    stages: int = 1


def forward_kernels(dtype: np.dtype[Any], dim: int, dim_v: int, rows: int, align: int, kind: Kind = PLAIN
                    ) -> list[Kernel]:
    """List the forward kernels for `rows` rows of a key head, the one that should be fastest first. Local.

    Parameters
    ----------
    dtype : dtype
        Of q, k and v.
    dim, dim_v : int
    rows : int
        Queries times the heads that share a key head.
    align : int
        Bytes that every row of q, k and v is aligned to, and a multiple of: 2, 4, 8 or 16.
    kind : Kind
    """
    dims = Dims(_sixteens(dim), _sixteens(dim_v))
    if kind.canonical:
        rows = MANY_ROWS
    if dtype == np.float32:
        return [_simt(dims, tile, align, kind) for tile in _simt_tiles(dims.v, rows, kind)]
    if dtype == np.float64:
        dims = Dims(dims.qk, min(dims.v, SLICE_FLOAT64))
        tall = [(8, 1, 16, 2)] if rows > 64 else []         # two warps to a scheduler, where they fit
        tiles = [(1, 1, 32, 3), (1, 1, 16, 2), (1, 1, 16, 1)] if rows <= 16 else [
            *tall, (4, 1, 32, 2), (4, 1, 16, 2), (2, 1, 16, 2), (2, 1, 16, 1), (1, 1, 16, 1)]
    elif rows <= 16:
        tiles = [(1, 1, 32, 3), (1, 1, 32, 2)]
    elif max(dims) > 128:
        tiles = [(8, 1, 32, 2), (4, 1, 32, 2), (4, 1, 16, 2)]
    elif max(dims) > 64 and kind.crowded:                         # two rows of 16 to a warp are too many for registers
        tiles = [(8, 1, 32, 2), (4, 1, 32, 2)]
    elif rows <= 64:
        tiles = [(4, 1, 64, 2), (4, 1, 32, 2)]
    else:
        wide = (4, 2, 64, 2) if not kind.alone else (4, 2, 48, 2) if max(dims) > 64 else (4, 2, 96, 2)
        tiles = [wide, (4, 2, 64, 2), (4, 2, 32, 2)]
    most = CANONICAL_TILE if not kind.narrow else 16 if dtype == np.float64 else 32
    return [_tensor(dtype, dims, tile, align, kind) for tile in itertools.starmap(Tile, tiles) if tile.others <= most]


def _simt_tiles(dim_v: int, rows: int, kind: Kind) -> list[Tile]:
    """List tiles for the forward pass in float32, the fastest first."""
    # What a thread's registers hold.
    tallest = 4 if dim_v > 128 or (kind.relative and kind.crowded and dim_v > 64) else 8
    if rows <= 16:
        lanes, height = (2, 1) if rows <= 2 else (16 // tallest, tallest)
        return [Tile(lanes, height, 32), Tile(lanes, height, 16)]
    wide = [Tile(16, 8, 80)] if kind.alone and 64 < dim_v <= 128 else []
    tall = [*wide, Tile(16, 8, 64), Tile(16, 8, 32)] if tallest == 8 else []
    tiles = [*tall, Tile(16, 4, 32), Tile(16, 4, 16), Tile(16, 2, 16)]
    return [tile for tile in tiles if not kind.narrow or tile.others <= 32]


def _sixteens(n: int) -> int:
    return -(-n // 16) * 16


def _tensor(dtype: np.dtype[Any], dims: Dims, tile: Tile, align: int, kind: Kind) -> Kernel:
    """Give an instance of accumulate_tensor.cu."""
    rows = 16 * tile.height * tile.lanes
    pad, pad_v = (4, 2) if dtype == np.float64 else (8, 8)
    numbers = rows * (dims.qk + pad) + tile.stages * tile.others * (sum(dims) + pad + pad_v)
    blocks = 8 if tile.lanes == 1 else 2 if tile.lanes == 4 and dtype != np.float64 else 1
    arguments = TYPES[dtype], *dims, *tile, align, *kind.flags()
    return Kernel("accumulate_tensor.cu", _named("accumulate", arguments), rows, tile.others, 32 * tile.lanes,
                  numbers * dtype.itemsize, dims.v, blocks)


def _simt(dims: Dims, tile: Tile, align: int, kind: Kind) -> Kernel:
    """Give an instance of accumulate_simt.cu."""
    rows = tile.height * tile.lanes
    numbers = (rows + tile.others) * _padded(dims.qk) + tile.others * dims.v + rows * _padded_weights(tile.others)
    arguments = *dims, *tile[:3], align, *kind.flags()
    return Kernel("accumulate_simt.cu", _named("accumulate", arguments), rows, tile.others, 16 * tile.lanes,
                  4 * numbers, dims.v, 8 if tile.lanes < 16 else 1)


def dq_kernels(dtype: np.dtype[Any], dim: int, dim_v: int, rows: int, align: int, kind: Kind = PLAIN) -> list[Kernel]:
    """List the kernels for dq; as `forward_kernels`, but `align` is dout's too. Local."""
    dims = Dims(_sixteens(dim), _sixteens(dim_v))
    if kind.canonical:
        rows = MANY_ROWS
    if dtype == np.float32:
        few = [Tile(8, 2, 32), Tile(8, 2, 16)]
        chosen = few if rows <= 16 else _simt_gradient_tiles(max(dims), kind)
        return [_simt_gradient("dq", dims, tile, align, kind) for tile in chosen]
    columns = _slice(dims.qk, SLICE_FLOAT64) if dtype == np.float64 else dims.qk
    if dtype == np.float64:
        tiles = [*FLOAT64_GRADIENT_TILES]
    elif max(dims) <= 64:
        tiles = [(4, 2, 64, 2), (4, 2, 32, 2)] if kind.alone and rows > 16 else [(4, 2, 32, 2)]
    elif max(dims) <= 128:
        tiles = [(4, 1, 64, 2) if kind.narrow else (4, 2, 32, 2), (4, 1, 32, 2)]
    else:
        tiles = [(8, 1, 32, 2), (4, 1, 32, 2), (2, 1, 16, 2)]
    if rows <= 16:
        tiles = [(1, 1, *tile[2:]) for tile in tiles]
    if _in_pairs(dtype, dims):
        return [_paired_gradient("dq", dims.qk, columns, Tile(*tile), align, kind) for tile in tiles]
    return [_tensor_gradient("dq", dtype, dims, (columns,), Tile(*tile), align, kind) for tile in tiles]


def dkdv_kernels(dtype: np.dtype[Any], dim: int, dim_v: int, align: int, kind: Kind = PLAIN) -> list[list[Kernel]]:
    """List the kernels for dk and dv together, or those for dk and those for dv; as `dq_kernels`. Local."""
    dims = Dims(_sixteens(dim), _sixteens(dim_v))
    if dtype == np.float32:
        return [[_simt_gradient("dkdv", dims, tile, align, kind) for tile in _simt_gradient_tiles(max(dims), kind)]]
    if _in_pairs(dtype, dims):
        columns = _slice(dims.qk, SLICE_FLOAT64)
        return [[_paired_gradient("dkdv", dims.qk, columns, Tile(*tile), align, kind)
                 for tile in FLOAT64_GRADIENT_TILES]]
    if dtype == np.float64:
        tiles = [*FLOAT64_GRADIENT_TILES]
    elif max(dims) <= 64:
        tiles = [(4, 2, 32, 2)]
    elif max(dims) <= 128:
        tiles = [(4, 1, 64, 2), (4, 1, 32, 2)] if kind.alone else [(4, 1, 32, 2)]
    else:
        tiles = [(8, 1, 32, 2), (4, 1, 32, 2), (2, 1, 16, 2)]
    # Columns of dk and of dv: all of both in one launch, if a thread's registers hold them.
    most = 128 if dtype == np.float64 else 256
    launches = [tuple(dims)] if sum(dims) <= most else [(_slice(dims.qk, most), 0), (0, _slice(dims.v, most))]
    return [[_tensor_gradient("dkdv", dtype, dims, columns, Tile(*tile), align, kind) for tile in tiles]
            for columns in launches]


def dbias_kernels(dtype: np.dtype[Any], dim: int, dim_v: int, align: int, kind: Kind) -> list[Kernel]:
    """List the kernels for the gradient of a bias of the keys; as `dq_kernels`. Local."""
    return _bias_kernels("dbias", dtype, dim, dim_v, align, kind)


def drelative_kernels(dtype: np.dtype[Any], dim: int, dim_v: int, align: int, kind: Kind) -> list[Kernel]:
    """List the kernels for the gradient of a bias by distance; as `dq_kernels`. Local."""
    return _bias_kernels("drelative", dtype, dim, dim_v, align, kind)


def _bias_kernels(gradient: str, dtype: np.dtype[Any], dim: int, dim_v: int, align: int, kind: Kind) -> list[Kernel]:
    dims = Dims(_sixteens(dim), _sixteens(dim_v))
    if dtype == np.float32:
        return [_simt_gradient(gradient, dims, tile, align, kind) for tile in _simt_gradient_tiles(max(dims), kind)]
    if dtype == np.float64:
        tiles = [*FLOAT64_GRADIENT_TILES]
    elif max(dims) <= 128:
        tiles = [(4, 2, 32, 2), (4, 1, 32, 2)]
    else:
        tiles = [(8, 1, 32, 2), (4, 1, 32, 2), (2, 1, 16, 2)]
    return [_tensor_gradient(gradient, dtype, dims, (), Tile(*tile), align, kind) for tile in tiles]


def _in_pairs(dtype: np.dtype[Any], dims: Dims) -> bool:
    """Say whether pairs of warps differentiate: where a warp's registers hold too little, and each can have half."""
    return dtype == np.float64 and dims.qk == dims.v > 64 and _slice(dims.qk, SLICE_FLOAT64) % 32 == 0


def _slice(wide: int, most: int) -> int:
    """Give the columns of a slice, a multiple of 16: even slices reach beyond the last column by 16 at most.

    That is as far as the kernels may read beyond a row of a tile: what follows the tile is longer.
    """
    return _sixteens(-(-wide // -(-wide // most)))


def _simt_gradient_tiles(widest: int, kind: Kind) -> list[Tile]:
    """List tiles for the backward pass in float32, where a row of a tile has so many columns."""
    short = [Tile(16, 2, 16), Tile(8, 2, 16)]
    if widest > 128:
        return short
    tall = [Tile(16, 4, 64)] if widest <= 64 else [Tile(16, 8, 32)] if kind.alone else []
    return [*tall, Tile(16, 4, 32), *short]


def _tensor_gradient(gradient: str, dtype: np.dtype[Any], dims: Dims, columns: tuple[int, ...], tile: Tile, align: int,
                     kind: Kind) -> Kernel:
    """Give an instance of gradient_tensor.cu."""
    own = 16 * tile.height * tile.lanes
    coming = tile.stages * tile.others
    pad = 4 if dtype == np.float64 else 8
    row_stats = 0 if gradient == "dq" else 2 * max(4, dtype.itemsize) + 8
    sums = own * tile.others * max(4, dtype.itemsize) if gradient == "drelative" else 0
    shared_bytes = (own + coming) * (sum(dims) + 2 * pad) * dtype.itemsize + coming * row_stats + sums
    blocks = 2 if tile.lanes == 4 and dtype != np.float64 and max(dims) <= 128 else 1
    rows, keys = (own, tile.others) if gradient == "dq" else (tile.others, own)
    arguments = TYPES[dtype], *dims, *columns, *tile, align, *kind.flags()
    return Kernel("gradient_tensor.cu", _named(f"gradient_{gradient}", arguments), rows, keys, 32 * tile.lanes,
                  shared_bytes, max(columns, default=0), blocks)


def _paired_gradient(gradient: str, dim: int, columns: int, tile: Tile, align: int, kind: Kind) -> Kernel:
    """Give an instance of gradient_paired.cu."""
    single = _tensor_gradient(gradient, np.dtype(np.float64), Dims(dim, dim), (columns,), tile, align, kind)
    handed = (2 if gradient == "dq" else 1) * 16 * tile.height * tile.lanes * tile.others * 8
    arguments = TYPES[np.dtype(np.float64)], dim, columns, *tile, align, *kind.flags()
    return replace(single, file="gradient_paired.cu", name=_named(f"gradient_{gradient}", arguments),
                   threads=2 * single.threads, shared_bytes=single.shared_bytes + handed)


def _simt_gradient(gradient: str, dims: Dims, tile: Tile, align: int, kind: Kind) -> Kernel:
    """Give an instance of gradient_simt.cu."""
    own = tile.height * tile.lanes
    coming = tile.stages * tile.others
    weights = {"dq": 1, "dkdv": 2}.get(gradient, 0) * own * _padded_weights(tile.others)
    row_stats = 0 if gradient == "dq" else 4 * coming
    sums = own * tile.others if gradient == "drelative" else 0
    numbers = (own + coming) * sum(_padded(dim) for dim in dims) + weights + row_stats + sums
    rows, keys = (own, tile.others) if gradient == "dq" else (tile.others, own)
    return Kernel("gradient_simt.cu", _named(f"gradient_{gradient}", (*dims, *tile, align, *kind.flags())), rows, keys,
                  16 * tile.lanes, 4 * numbers, max(dims), 1)


def _padded(dim: int) -> int:
    """Numbers to a row of a tile, as lanes.cuh has it."""
    return -(-dim // 32) * 32 + 4


def _padded_weights(keys: int) -> int:
    """Numbers to a row of weights, as lanes.cuh has it."""
    return keys + 16 if keys % 32 == 0 else keys


def _named(kernel: str, arguments: Iterable[Any]) -> str:
    """Give the C++ name of an instance."""
    return f"{kernel}<{', '.join(map(str, arguments))}>"


def best(candidates: Sequence[Kernel], shared_bytes: int, shared_bytes_processor: int) -> Kernel:
    """Choose the first kernel of which a multiprocessor holds as many blocks as it is meant to. Local.

    More than two are not asked for. If there is no such kernel, the first that a block of threads has the shared memory
    for is chosen.

    Raises
    ------
    BackendError
        If there is not enough shared memory for any.
    """
    static = 2048             # what a block has besides: its own, and the driver's 1 KiB
    fitting = [kernel for kernel in candidates if kernel.shared_bytes + static <= shared_bytes]
    for kernel in fitting:
        if min(kernel.blocks, 2) * (kernel.shared_bytes + static) <= shared_bytes_processor:
            return kernel
    if fitting:
        return fitting[0]
    raise BackendError(f"backend cuda: the kernels need {min(k.shared_bytes for k in candidates)} bytes of shared "
                       f"memory, this GPU gives {shared_bytes} to a block; take a smaller dim, or backend='numba'")
