"""What one core can do: multiply-adds in registers, and bytes read from memory. The yardsticks of `ringmpi bench`."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from ...errors import BackendError
from .amx import NUMBER, ROWS, TILE, configure, dot_tile, missing, release, zero_tile
from .vector import Vectors, at, constant, data, dot_pairs, loop, machine

CHAINS = 12             # independent sums: more than latency × units, fewer than the registers


@intrinsic
def _multiply(context, out, rounds):  # type: ignore[no-untyped-def]
    """CHAINS multiply-adds a round, on registers alone; `out` takes the sums, so that they are not optimised away."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        pairs = signature.args[0].dtype == types.uint32
        v = Vectors(builder, types.float32 if pairs else signature.args[0].dtype)
        pointer = data(context, builder, signature.args[0], values[0])
        x = v.load(builder.bitcast(pointer, v.element.as_pointer()))
        total = [cgutils.alloca_once_value(builder, x) for _ in range(CHAINS)]
        with loop(builder, constant(0), values[1]):
            for t in total:
                old = builder.load(t)
                builder.store(dot_pairs(builder, old, builder.bitcast(x, v.bits), builder.bitcast(x, v.bits))
                              if pairs else v.fma(x, x, old), t)
        for i, t in enumerate(total):
            store = builder.bitcast(at(builder, pointer, i * v.lanes), v.kind.as_pointer())
            builder.store(builder.load(t), store).align = 1
        return context.get_dummy_value()

    return types.void(out, rounds), emit


@numba.njit(nogil=True)
def _spin(out, rounds):  # type: ignore[no-untyped-def]
    _multiply(out, rounds)


@intrinsic
def _multiply_tiles(context, rounds):  # type: ignore[no-untyped-def]
    """Four products of tiles a round."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        for tile in range(NUMBER):
            zero_tile(builder, tile)
        with loop(builder, constant(0), values[0]):
            for total, a, b in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
                dot_tile(builder, total, a, b)
        return context.get_dummy_value()

    return types.void(rounds), emit


@numba.njit(nogil=True)
def _spin_tiles(out, rounds):  # type: ignore[no-untyped-def]
    configure()
    _multiply_tiles(rounds)
    release()


@intrinsic
def _sum(context, x, start, stop):  # type: ignore[no-untyped-def]
    """Sum of x[start:stop] with 8 vectors a step; stop - start is a multiple of that."""
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        v = Vectors(builder, signature.args[0].dtype)
        pointer = at(builder, data(context, builder, signature.args[0], values[0]), values[1])
        total = [cgutils.alloca_once(builder, v.kind) for _ in range(8)]
        for t in total:
            builder.store(v.number(0.0), t)
        step = constant(8 * v.lanes)
        with loop(builder, constant(0), builder.udiv(builder.sub(values[2], values[1]), step)) as i:
            for j, t in enumerate(total):
                place = builder.add(builder.mul(i, step), constant(j * v.lanes))
                builder.store(builder.fadd(builder.load(t), v.load(pointer, place)), t)
        result = builder.load(total[0])
        for t in total[1:]:
            result = builder.fadd(result, builder.load(t))
        return v.sum(result)

    return x.dtype(x, start, stop), emit


@numba.njit(nogil=True)
def _read(x, start, stop):  # type: ignore[no-untyped-def]
    return _sum(x, start, stop)


def multiply_add_peak(kind: str, threads: int, seconds: float = 0.05) -> float:
    """Measure multiply-adds in registers on `threads` cores at once, in FLOP/s. Local.

    Parameters
    ----------
    kind : {"float32", "float64", "pairs", "tiles"}
        `pairs` is the product of bfloat16 pairs; only where `machine().pairs`. `tiles` is that of the tile unit; only
        where `amx.missing` is empty.
    threads : int
    seconds : float
        About how long to measure.

    Raises
    ------
    BackendError
        If there are no tiles, and it is they.
    """
    if kind == "tiles" and missing():          # which asks for them
        raise BackendError(f"no tiles: {missing()}")
    dtype = np.dtype({"pairs": "u4", "tiles": "u2"}.get(kind, kind))
    spin = _spin_tiles if kind == "tiles" else _spin
    flop = CHAINS * 2 * machine().vector_bytes // dtype.itemsize * (2 if kind == "pairs" else 1)
    if kind == "tiles":
        flop = 4 * 2 * ROWS * TILE
    one = 0x3F803F80 if kind == "pairs" else 1
    arrays = [np.full(CHAINS * 64 // dtype.itemsize, one, dtype) for _ in range(threads)]
    spin(arrays[0], 1)
    rounds = 1000
    with ThreadPoolExecutor(threads) as pool:
        while True:
            for array in arrays:
                array[:] = one
            start = time.perf_counter()
            list(pool.map(spin, arrays, [rounds] * threads))
            taken = time.perf_counter() - start
            if taken > seconds:
                return flop * rounds * threads / taken
            rounds *= 4


def read_bandwidth(threads: int, x: NDArray[np.float32]) -> float:
    """Measure reading memory on `threads` cores at once, in bytes/s; `x` is far larger than the caches. Local."""
    _read(x, 0, 4096)
    return x.nbytes / min(read_once(threads, x) for _ in range(3))


def read_once(threads: int, x: NDArray[np.float32]) -> float:
    """Read an array on `threads` cores at once; give the seconds. Local."""
    edges = np.linspace(0, len(x) // 4096, threads + 1).astype(np.int64) * 4096
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_read, [x[:0]] * threads, [0] * threads, [0] * threads))        # the threads are there
        start = time.perf_counter()
        list(pool.map(_read, [x] * threads, edges[:-1], edges[1:]))
        return time.perf_counter() - start
