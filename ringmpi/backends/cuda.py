"""The GPU path: the CUDA C++ kernels of kernels/, chosen, launched and watched from here.

A block is one launch: the kernel takes the state from the GPU's memory, folds all that each row sees of the block, and
puts it back; float64 with dim_v beyond 128 takes a launch for each 128 columns, and a merge. Where there are too few
tiles of rows to fill the GPU (decoding), the columns are split into parts, each with a state of its own, which a second
kernel folds into the state. While kernels run, `accumulate` yields, so that the caller can keep messages moving.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..device import Device, open_device
from ..environment import hopper_kernel
from ..errors import BackendError
from ..layout import Integers
from ..score import Score
from ..softmax import BFLOAT16, State
from . import hopper
from .base import Backend
from .sources import Kernel, compiler_options, kernels_folder

Array = Any
MOST_DIM = 256
SLICE_FLOAT64 = 128           # columns of V that fit a thread's registers beside the rest, in float64
# Queries, of two heads each, and keys: each of the kernels that a number of rows may choose is among theirs; in the
# last all of Hopper's warpgroups go through some full tiles together, and through the end of the keys.
TO_PROVE = ((1, 94), (8, 106), (25, 140), (65, 220))
TO_PROVE_ON_HOPPER = (*TO_PROVE, (100, 1000))
PROOF_SECONDS = 100.0         # for a case of milliseconds
POLL_SECONDS = 2e-5           # between two looks at a running kernel
MOST_PARTS = 1024
TYPES = {np.dtype(np.float64): "double", np.dtype(np.float32): "float", BFLOAT16: "bfloat16",
         np.dtype(np.float16): "float16"}


def kernels(dtype: np.dtype[Any], dim: int, dim_v: int, rows: int, align: int) -> list[Kernel]:
    """List the kernels for `rows` rows of a key head, the one that should be fastest first. Local.

    Parameters
    ----------
    dtype : dtype
        Of q, k and v.
    dim, dim_v : int
    rows : int
        Queries times the heads that share a key head.
    align : int
        Bytes that every row of q, k and v is aligned to, and a multiple of: 2, 4, 8 or 16.
    """
    wide, wide_v = _sixteens(dim), _sixteens(dim_v)
    if dtype == np.float32:
        return [_simple(wide, wide_v, *shape, align) for shape in _shapes_float32(wide_v, rows)]
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
    return [_tensor(dtype, wide, wide_v, *shape, align) for shape in shapes]


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
            align: int) -> Kernel:
    """Give an instance of accumulate_tensor.cu."""
    rows = 16 * height * warps
    pad, pad_v = (4, 2) if dtype == np.float64 else (8, 8)
    numbers = rows * (dim + pad) + stages * keys * (dim + pad + dim_v + pad_v)
    blocks = 8 if warps == 1 else 2 if warps == 4 and dtype != np.float64 else 1
    name = f"accumulate<{TYPES[dtype]}, {dim}, {dim_v}, {warps}, {height}, {keys}, {stages}, {align}>"
    return Kernel("accumulate_tensor.cu", name, rows, keys, 32 * warps, numbers * dtype.itemsize, dim_v, blocks)


def _simple(dim: int, dim_v: int, lanes: int, height: int, keys: int, align: int) -> Kernel:
    """Give an instance of accumulate_float.cu."""
    rows, padded = height * lanes, -(-dim // 32) * 32 + 4
    numbers = (rows + keys) * padded + keys * dim_v + rows * (keys + 16 if keys % 32 == 0 else keys)
    name = f"accumulate<{dim}, {dim_v}, {lanes}, {height}, {keys}, {align}>"
    return Kernel("accumulate_float.cu", name, rows, keys, 16 * lanes, 4 * numbers, dim_v, 8 if lanes < 16 else 1)


def best(candidates: Sequence[Kernel], shared_bytes: int, shared_bytes_processor: int) -> Kernel:
    """Choose the first kernel whose blocks fit a multiprocessor as meant, else the first that fits at all. Local.

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


class CudaBackend(Backend):
    """Attention on one GPU."""

    name = "cuda"
    compiles = True

    def __init__(self, threads: int, device: Device | None = None) -> None:
        super().__init__(threads)
        self.device: Device = device or open_device(0)
        if self.device.capability < (8, 0):
            raise BackendError(f"backend cuda: expected a GPU of compute capability 8.0 or later, got "
                               f"{self.device.name} with {'.'.join(map(str, self.device.capability))}")
        self.hopper = hopper_kernel()         # for good: what is proven must be what runs
        self._buffers: dict[str, Array] = {}

    def prepare(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int, *,
                plain: bool = True, backward: bool = False) -> None:
        """Compile the kernels, or load them, and prove each on a small case; see `Backend.prepare`. Local."""
        if max(dim, dim_v) > MOST_DIM:
            raise BackendError(f"backend cuda: expected dim and dim_v up to {MOST_DIM}, got {dim} and {dim_v}; "
                               "take backend='numba'")
        proven = self.device.cache.setdefault("proven kernels", set())
        case = dtype, accumulator, dim, dim_v, self.hopper
        if case in proven:
            return
        with self.device.current():
            for n_q, n_k in TO_PROVE_ON_HOPPER if self.hopper else TO_PROVE:
                error = self._error_of_small_case(n_q, n_k, dtype, accumulator, dim, dim_v)
                bound = {8: 1e-12, 4: 1e-5, 2: 2e-2}[dtype.itemsize]
                if not error <= bound:
                    raise BackendError(f"backend cuda: on {self.device.name} the kernel for {dtype}, dim {dim}, dim_v "
                                       f"{dim_v} gives a wrong result (error {error:.2g}, bound {bound:.0g}); please "
                                       "report it, and take backend='numba' meanwhile")
        proven.add(case)

    def _error_of_small_case(self, n_q: int, n_k: int, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int,
                             dim_v: int) -> float:
        """Give the largest error of a case with a slanting end, in units of the largest value, by a dense softmax."""
        rng = np.random.default_rng(n_q)
        q, k, v = (rng.standard_normal((n, heads, width)).astype(dtype)
                   for n, heads, width in ((n_q, 2, dim), (n_k, 1, dim), (n_k, 1, dim_v)))
        begin, end = np.zeros(n_q, np.int64), n_k - 1 - np.arange(n_q)[::-1]
        scale = 1 / math.sqrt(dim)
        state = self.new_state(n_q, 2, dim_v, accumulator)
        placed = [self.place(x) for x in (q, k, v)]
        latest = time.monotonic() + PROOF_SECONDS
        for _ in self.accumulate(state, placed[0], placed[1], placed[2], begin, end, Score(scale)):
            if time.monotonic() > latest:
                raise BackendError(f"backend cuda: on {self.device.name} the kernel for {dtype}, dim {dim}, dim_v "
                                   f"{dim_v} does not end; please report it, and take backend='numba' meanwhile")
        out, lse = self.empty((n_q, 2, dim_v), dtype), self.empty((n_q, 2), accumulator)
        self.finish(state, self.place(np.ones(n_q, bool)), out, lse)
        got = self.fetch(out).astype(np.float64)
        scores = q.astype(np.float64) @ k[:, 0].astype(np.float64).T * scale
        weights = np.exp(np.where(np.arange(n_k) < end[:, None, None], scores, -np.inf))
        want = weights @ v[:, 0].astype(np.float64) / weights.sum(axis=2, keepdims=True)
        return float(np.abs(got - want).max() / np.abs(want).max())

    def place(self, x: Any) -> Any:
        """Give `x` as a C-contiguous array in the GPU's memory; see `Backend.place`. Local."""
        if isinstance(x, np.ndarray):
            return self.device.array(x)
        x = self.device.contiguous(x)
        if x.size and x.data.ptr % _alignment(x):       # what begins askew would need kernels of its own
            askew, x = x, self.device.empty(x.shape, x.dtype)
            self.device.copy(x, askew, self.device.caller_stream())
        return x

    def gather(self, shape: Sequence[int], dtype: np.dtype[Any], read: Callable[[int, NDArray[Any]], None]) -> Any:
        """Fill an array in the GPU's memory, by way of page-locked memory; see `Backend.gather`. Local."""
        return self.device.gather(shape, dtype, read)

    def fetch(self, x: Any) -> NDArray[Any]:
        """Copy a result to the host; see `Backend.fetch`. Local."""
        return self.device.host(x)

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Any:
        """Make an array in the GPU's memory; see `Backend.empty`. Local."""
        return self.device.empty(shape, dtype)

    def reset(self, state: State, sinks: NDArray[Any] | None = None) -> None:
        """Let a state forget every key; see `Backend.reset`. Local."""
        rows, dim_v = state.max.size, state.acc.shape[2]
        kernel = self._kernel("state.cu", f"reset<{TYPES[state.acc.dtype]}>")
        self._launch_over(kernel, rows * dim_v, (state.acc, state.max, state.sum, np.int64(rows), np.int32(dim_v)))

    def finish(self, state: State, seen: Any, out: Any, lse: Any) -> None:
        """Normalise a state into `out` and `lse`; see `Backend.finish`. Local."""
        rows, (_, heads, dim_v) = state.max.size, state.acc.shape
        kernel = self._kernel("state.cu", f"finish<{TYPES[out.dtype]}, {TYPES[state.acc.dtype]}>")
        self._launch_over(kernel, rows * dim_v, (state.acc, state.max, state.sum, seen, out, lse, np.int64(rows),
                                                 np.int32(heads), np.int32(dim_v)))

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Fold one block of K and V into the running softmax; see `Backend.accumulate`. Local."""
        pairs = int(end.sum()) - int(begin.sum())
        if pairs == 0:
            return
        device = self.device
        with device.current():
            self._fold(state, q, k, v, begin, end, score.scale)
            done = device.record(device.caller_stream())
        while not done.done:
            yield 0
            time.sleep(POLL_SECONDS)
        yield pairs

    def _fold(self, state: State, q: Array, k: Array, v: Array, begin: Integers, end: Integers, scale: float) -> None:
        """Launch what folds a block: of the columns that any row sees, in one part or several."""
        kind = state.acc.dtype
        if kind == np.float64 and q.dtype != kind:
            q, k, v = (self._widened(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        seeing = end > begin
        first, last = int(begin.min(where=seeing, initial=len(k))), int(end.max(where=seeing, initial=0))
        k, v = k[first:last], v[first:last]
        (n_q, heads, dim), (n_k, kv_heads, dim_v) = q.shape, v.shape
        kernel = self._choose(q, k, v)
        parts, width = self._split(kernel, n_q * heads // kv_heads, kv_heads, n_k)
        fresh = parts > 1 or dim_v > kernel.columns
        if max(n_q * heads, n_k + width) >= 2**31:
            raise BackendError(f"backend cuda: expected fewer than 2^31 rows and keys in a block, got {n_q * heads} "
                               f"and {n_k}; use more ranks")
        columns = self._upload_columns(begin, end, first)
        target = self._parts(parts, state) if fresh else state
        for start in range(0, dim_v, kernel.columns):
            keys = hopper.maps(self.device, k, v) if kernel.file == hopper.FILE else (k, _from(v, start))
            self._launch(
                kernel.file, kernel.name, (-(-n_q * (heads // kv_heads) // kernel.rows), kv_heads, parts),
                kernel.threads, kernel.shared_bytes,
                (_from(target.acc, start), target.max, target.sum, q, *keys, *columns, np.int32(n_q),
                 np.int32(n_k), np.int32(kv_heads), np.int32(heads // kv_heads), np.int32(dim),
                 np.int32(min(kernel.columns, dim_v - start)), np.int32(dim_v), kind.type(scale), np.int32(width),
                 np.int32(fresh)))
        if fresh:
            self._launch("state.cu", f"merge_parts<{TYPES[kind]}>", (n_q * heads,), 256, 0,
                         (state.acc, state.max, state.sum, target.acc, target.max, target.sum, np.int32(parts),
                          np.int64(n_q * heads), np.int32(dim_v)))

    def _choose(self, q: Array, k: Array, v: Array) -> Kernel:
        if self.hopper and hopper.takes(self.device, q, k, v):
            return hopper.instance(q.dtype, q.shape[2], v.shape[2])
        align = math.gcd(_alignment(q), _alignment(v), *(x.data.ptr for x in (q, k, v)))
        rows = len(q) * q.shape[1] // k.shape[1]
        return best(kernels(q.dtype, q.shape[2], v.shape[2], rows, align), self.device.shared_bytes,
                    self.device.shared_bytes_processor)

    def _split(self, kernel: Kernel, rows: int, kv_heads: int, n_k: int) -> tuple[int, int]:
        """Give the number of parts that fill the GPU, and the columns of each, in whole tiles."""
        room = self.device.processors * max(1, min(kernel.blocks, self.device.shared_bytes_processor
                                                   // (kernel.shared_bytes + 2048)))
        tiles = -(-rows // kernel.rows) * kv_heads
        parts = max(1, min(room // tiles, -(-n_k // (4 * kernel.keys)), MOST_PARTS))
        width = -(-n_k // (parts * kernel.keys)) * kernel.keys
        return -(-n_k // width), width

    def _upload_columns(self, begin: Integers, end: Integers, first: int) -> tuple[Array, Array]:
        """Copy the intervals to the GPU, counted from column `first`, in 32 bits; empty ones may lie anywhere."""
        both = np.empty((2, len(begin)), np.int32)
        for row, x in zip(both, (begin, end), strict=True):
            np.subtract(x, first, out=row, casting="unsafe")
        placed = self.device.array(both)
        return placed[0], placed[1]

    def _parts(self, count: int, state: State) -> State:
        """Give room for `count` states like `state`, one after the other."""
        kind = state.acc.dtype
        sizes = [count * x.size for x in (state.acc, state.max, state.sum)]
        room = self._buffer("parts", sum(sizes), kind)
        edges = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
        return State(*(room[a:b] for a, b in itertools.pairwise(edges)))

    def _widened(self, name: str, x: Array) -> Array:
        """Give a copy of `x` in float64."""
        wide = self._buffer(name, x.size, np.dtype(np.float64)).reshape(x.shape)
        self._launch_over(self._kernel("state.cu", f"widen<{TYPES[x.dtype]}>"), x.size, (wide, x, np.int64(x.size)))
        return wide

    def _buffer(self, name: str, size: int, dtype: np.dtype[Any]) -> Array:
        """Give an array that is kept from call to call, and grows."""
        key = f"{name} {dtype}"
        if key not in self._buffers or self._buffers[key].size < size:
            self._buffers.pop(key, None)
            self._buffers[key] = self.empty((size,), dtype)
        return self._buffers[key][:size]

    def _kernel(self, file: str, name: str) -> Any:
        """Compile a kernel once."""
        if (file, name) not in self.device.cache:
            path, options = kernels_folder() / file, compiler_options()
            with self.device.current():
                self.device.cache[file, name] = (
                    self.device.compile_for(hopper.ARCHITECTURE, path, name, options) if file == hopper.FILE
                    else self.device.compile(path, [name], options)[0])
        return self.device.cache[file, name]

    def _launch(self, file: str, name: str, grid: tuple[int, ...], threads: int, shared_bytes: int,
                arguments: Sequence[Any]) -> None:
        self.device.launch(self._kernel(file, name), grid, threads, shared_bytes, arguments,
                           self.device.caller_stream())

    def _launch_over(self, kernel: Any, count: int, arguments: Sequence[Any]) -> None:
        """Launch a kernel whose threads share `count` numbers."""
        if count:
            blocks = min(-(-count // 256), 32 * self.device.processors)
            with self.device.current():
                self.device.launch(kernel, (blocks,), 256, 0, arguments, self.device.caller_stream())

    def complete(self) -> None:
        """Wait for the GPU; see `Backend.complete`. Local."""
        self.device.record(self.device.caller_stream()).synchronize()

    def close(self) -> None:
        """Give the buffers back. Local."""
        self._buffers.clear()


def _alignment(x: Array) -> int:
    """Give the bytes, 16 at most, that every row of an array is a multiple of."""
    return math.gcd(16, x.shape[-1] * x.itemsize)


def _from(x: Array, start: int) -> Array:
    """View an array from number `start` on."""
    return x.reshape(-1)[start:]
