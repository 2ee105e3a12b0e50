"""Which instances of the CUDA kernels there are for a dtype, dims and a number of rows, and which fits a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...dtypes import BFLOAT16
from ...errors import BackendError
from .sources import Kernel

SLICE_FLOAT64 = 128           # columns of a result that fit a thread's registers beside the rest, in float64
TYPES = {np.dtype(np.float64): "double", np.dtype(np.float32): "float", BFLOAT16: "bfloat16",
         np.dtype(np.float16): "float16"}


def kernels(dtype: np.dtype[Any], dim: int, dim_v: int, rows: int, align: int, *, plain: bool = True) -> list[Kernel]:
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
    plain : bool
        See `Score.plain`. Score functions take registers: tiles with them have fewer keys.
    """
    wide, wide_v = _sixteens(dim), _sixteens(dim_v)
    if dtype == np.float32:
        return [_simple(wide, wide_v, *shape, align, plain) for shape in _shapes_float32(wide_v, rows)
                if plain or shape[2] <= 32]
    if dtype == np.float64:
        wide_v = min(wide_v, SLICE_FLOAT64)
        shapes = [(1, 1, 32, 3), (1, 1, 16, 2), (1, 1, 16, 1)] if rows <= 16 else [
            (4, 1, 32, 2), (4, 1, 16, 2), (2, 1, 16, 2), (2, 1, 16, 1), (1, 1, 16, 1)]
    elif rows <= 16:
        shapes = [(1, 1, 32, 3), (1, 1, 32, 2)]
    elif max(wide, wide_v) > 128:
        shapes = [(8, 1, 32, 2), (4, 1, 32, 2), (4, 1, 16, 2)]
    else:
        height = 1 if rows <= 64 else 2
        shapes = [(4, height, 64, 2), (4, height, 32, 2)]
    most = 64 if plain else 16 if dtype == np.float64 else 32
    return [_tensor(dtype, wide, wide_v, *shape, align, plain) for shape in shapes if shape[2] <= most]


def _shapes_float32(wide_v: int, rows: int) -> list[tuple[int, int, int]]:
    """Row lanes, rows of a thread, keys."""
    tallest = 8 if wide_v <= 128 else 4        # what a thread's registers hold
    if rows <= 16:
        lanes, height = (2, 1) if rows <= 2 else (16 // tallest, tallest)
        return [(lanes, height, 32), (lanes, height, 16)]
    tall = [(16, 8, 64), (16, 8, 32)] if tallest == 8 else []
    return [*tall, (16, 4, 32), (16, 4, 16), (16, 2, 16)]


def _sixteens(n: int) -> int:
    return -(-n // 16) * 16


def _tensor(dtype: np.dtype[Any], dim: int, dim_v: int, warps: int, height: int, keys: int, stages: int,
            align: int, plain: bool) -> Kernel:
    """Give an instance of accumulate_tensor.cu."""
    rows = 16 * height * warps
    pad, pad_v = (4, 2) if dtype == np.float64 else (8, 8)
    numbers = rows * (dim + pad) + stages * keys * (dim + pad + dim_v + pad_v)
    blocks = 8 if warps == 1 else 2 if warps == 4 and dtype != np.float64 else 1
    name = f"accumulate<{TYPES[dtype]}, {dim}, {dim_v}, {warps}, {height}, {keys}, {stages}, {align}, " \
           f"{_flag(plain)}>"
    return Kernel("accumulate_tensor.cu", name, rows, keys, 32 * warps, numbers * dtype.itemsize, dim_v, blocks)


def _simple(dim: int, dim_v: int, lanes: int, height: int, keys: int, align: int, plain: bool) -> Kernel:
    """Give an instance of accumulate_float.cu."""
    rows, padded = height * lanes, -(-dim // 32) * 32 + 4
    numbers = (rows + keys) * padded + keys * dim_v + rows * (keys + 16 if keys % 32 == 0 else keys)
    name = f"accumulate<{dim}, {dim_v}, {lanes}, {height}, {keys}, {align}, {_flag(plain)}>"
    return Kernel("accumulate_float.cu", name, rows, keys, 16 * lanes, 4 * numbers, dim_v, 8 if lanes < 16 else 1)


def query_gradients(dtype: np.dtype[Any], dim: int, dim_v: int, rows: int, align: int, *, plain: bool = True
                    ) -> list[Kernel]:
    """List the kernels for dq; as `kernels`, but `align` is dout's too. Local."""
    wide, wide_v = _sixteens(dim), _sixteens(dim_v)
    widest = max(wide, wide_v)
    if dtype == np.float32:
        lanes = [(8, 2, 32), (8, 2, 16)] if rows <= 16 else _lanes(widest)
        return [_simple_gradient("queries", wide, wide_v, *shape, align, plain) for shape in lanes]
    columns = _slice(wide, SLICE_FLOAT64) if dtype == np.float64 else wide
    if dtype == np.float64:
        shapes = [(4, 1, 16, 2), (2, 1, 16, 2), (1, 1, 16, 1)]
    elif widest <= 64:
        shapes = [(4, 2, 32, 2)]
    elif widest <= 128:
        shapes = [(4, 2, 32, 2) if plain else (4, 1, 64, 2), (4, 1, 32, 2)]
    else:
        shapes = [(8, 1, 32, 2), (4, 1, 32, 2), (2, 1, 16, 2)]
    if rows <= 16:
        shapes = [(1, 1, *shape[2:]) for shape in shapes]
    return [_tensor_gradient("queries", dtype, wide, wide_v, (columns,), *shape, align, plain) for shape in shapes]


def key_gradients(dtype: np.dtype[Any], dim: int, dim_v: int, align: int, *, plain: bool = True) -> list[list[Kernel]]:
    """List the kernels for dk and dv together, or those for dk and those for dv; as `query_gradients`. Local."""
    wide, wide_v = _sixteens(dim), _sixteens(dim_v)
    widest = max(wide, wide_v)
    if dtype == np.float32:
        return [[_simple_gradient("keys", wide, wide_v, *shape, align, plain) for shape in _lanes(widest)]]
    most = 128 if dtype == np.float64 else 256                  # columns that fit a thread's registers
    columns, columns_v = _slice(wide, most), _slice(wide_v, most)
    both = wide + wide_v <= most
    if dtype == np.float64:
        shapes = [(4, 1, 16, 2), (2, 1, 16, 2), (1, 1, 16, 1)]
    elif widest <= 64:
        shapes = [(4, 2, 32, 2)]
    else:
        shapes = [(8, 1, 32, 2), (4, 1, 32, 2), (2, 1, 16, 2)] if widest > 128 else [(4, 1, 32, 2)]
    return [[_tensor_gradient("keys", dtype, wide, wide_v, slices, *shape, align, plain) for shape in shapes]
            for slices in ([(columns, columns_v)] if both else [(columns, 0), (0, columns_v)])]


def _slice(wide: int, most: int) -> int:
    """Give the columns of a slice, a multiple of 16: even slices reach beyond the last column by 16 at most.

    That is as far as the kernels may read beyond a row of a tile: what follows the tile is longer.
    """
    return _sixteens(-(-wide // -(-wide // most)))


def _lanes(widest: int) -> list[tuple[int, int, int]]:
    """Row lanes, rows of a thread, others, where a row of a tile has so many columns."""
    shapes = [(16, 4, 64), (16, 4, 32), (16, 2, 16), (8, 2, 16)]
    return shapes[0 if widest <= 64 else 1 if widest <= 128 else 2:]


def _tensor_gradient(what: str, dtype: np.dtype[Any], dim: int, dim_v: int, columns: tuple[int, ...], warps: int,
                     height: int, others: int, places: int, align: int, plain: bool) -> Kernel:
    """Give an instance of gradient_tensor.cu."""
    own, pad = 16 * height * warps, 4 if dtype == np.float64 else 8
    known = 2 * max(4, dtype.itemsize) + 8 if what == "keys" else 0
    shared_bytes = (own + places * others) * (dim + dim_v + 2 * pad) * dtype.itemsize + places * others * known
    numbers = ", ".join(map(str, (dim, dim_v, *columns, warps, height, others, places, align)))
    blocks = 2 if warps == 4 and dtype != np.float64 and max(dim, dim_v) <= 128 else 1
    rows, keys = (own, others) if what == "queries" else (others, own)
    return Kernel("gradient_tensor.cu", f"gradient_{what}<{TYPES[dtype]}, {numbers}, {_flag(plain)}>", rows, keys,
                  32 * warps, shared_bytes, max(columns), blocks)


def _simple_gradient(what: str, dim: int, dim_v: int, lanes: int, height: int, others: int, align: int, plain: bool
                     ) -> Kernel:
    """Give an instance of gradient_float.cu."""
    own, places, padded = height * lanes, 1, sum(-(-x // 32) * 32 + 4 for x in (dim, dim_v))
    weights = (2 if what == "keys" else 1) * own * (others + 16 if others % 32 == 0 else others)
    known = 4 * others * places if what == "keys" else 0
    numbers = ", ".join(map(str, (dim, dim_v, lanes, height, others, places, align)))
    rows, keys = (own, others) if what == "queries" else (others, own)
    return Kernel("gradient_float.cu", f"gradient_{what}<{numbers}, {_flag(plain)}>", rows, keys, 16 * lanes,
                  4 * ((own + places * others) * padded + weights + known), max(dim, dim_v), 1)


def _flag(plain: bool) -> str:
    """Say whether a kernel has score functions."""
    return "false" if plain else "true"


def best(candidates: Sequence[Kernel], shared_bytes: int, shared_bytes_processor: int) -> Kernel:
    """Choose the first kernel of which a multiprocessor holds two blocks, if meant, else the first that fits. Local.

    Raises
    ------
    BackendError
        If none fits.
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
