"""The GPU path: the CUDA C++ kernels of kernels/, chosen, launched and watched from here.

A block is one launch: the kernel takes the state from the GPU's memory, folds all that each row sees of the block, and
puts it back; float64 with dim_v beyond 128 takes a launch for each 128 columns, and a merge. Where there are too few
tiles of rows to fill the GPU (decoding), the columns are split into parts, each with a state of its own, which a second
kernel folds into the state. The gradient of a block is a launch for dq, and one or two for dk and dv. While kernels
run, `accumulate` and `backward` yield, so that the caller can keep messages moving.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...device import Device, open_device
from ...environment import hopper_kernel
from ...errors import BackendError
from ...layout import Integers
from ...score import Score
from ...softmax import Gradient, State
from ..base import Backend
from . import hopper
from .instances import TYPES, best, kernels, key_gradients, query_gradients
from .self_test import Proof
from .sources import Kernel, compiler_options, kernels_folder

Array = Any
MOST_DIM = 256
# Queries, of two heads each, and keys: each of the kernels that a number of rows may choose is among theirs; in the
# last all of Hopper's warpgroups go through some full tiles together, and through the end of the keys.
TO_PROVE = ((1, 94), (8, 106), (25, 140), (65, 220))
TO_PROVE_ON_HOPPER = (*TO_PROVE, (100, 1000))
TO_PROVE_BACKWARD = ((7, 106), (75, 220))
POLL_SECONDS = 2e-5           # between two looks at a running kernel
MOST_PARTS = 1024
NULL = np.uint64(0)           # in place of an array


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
        self.hopper = hopper_kernel()         # for good once settled: what is proven must be what runs
        self.ways = int(self.hopper)
        self._buffers: dict[str, Array] = {}

    def settle(self, wished: str, ways: Sequence[int]) -> None:
        """Use the kernel for Hopper GPUs where all ranks are asked to; see `Backend.settle`. Local."""
        self.hopper = all(ways)

    def prepare(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int, *,
                plain: bool = True, backward: bool = False) -> None:
        """Compile the kernels, or load them, and prove each on a small case; see `Backend.prepare`. Local."""
        if max(dim, dim_v) > MOST_DIM:
            raise BackendError(f"backend cuda: expected dim and dim_v up to {MOST_DIM}, got {dim} and {dim_v}; "
                               "take backend='numba'")
        proven = self.device.cache.setdefault("proven kernels", set())
        case = dim, dim_v, dtype, accumulator, plain, backward
        if (case, self.hopper) in proven:
            return
        what = (f"on {self.device.name} the {'backward ' if backward else ''}kernel for {dtype}, dim {dim}, dim_v "
                f"{dim_v}{'' if plain else ', with score functions,'}")
        advice = "please report it, and take backend='numba' meanwhile"
        bound = {8: 1e-12, 4: 2e-5, 2: 5e-2 if backward else 2e-2}[dtype.itemsize]
        sizes = TO_PROVE_BACKWARD if backward else TO_PROVE_ON_HOPPER if self.hopper and plain else TO_PROVE
        for n_q, n_k in sizes:
            try:
                with self.device.current():
                    error = Proof(n_q, n_k, *case).error(self)
            except TimeoutError as late:
                raise BackendError(f"backend cuda: {what} does not end; {advice}") from late
            if not error <= bound:
                raise BackendError(f"backend cuda: {what} gives a wrong result (error {error:.2g}, bound {bound:.0g}); "
                                   f"{advice}")
        proven.add((case, self.hopper))

    def to_device(self, x: Any) -> Any:
        """Give `x` as a C-contiguous array in the GPU's memory; see `Backend.place`. Local."""
        if isinstance(x, np.ndarray):
            return self.device.array(x)
        x = self.device.contiguous(x)
        if x.size and x.data.ptr % _alignment(x):       # what begins askew would need kernels of its own
            askew, x = x, self.device.empty(x.shape, x.dtype)
            self.device.copy(x, askew, self.device.caller_stream())
        return x

    def read_rows(self, shape: Sequence[int], dtype: np.dtype[Any], read: Callable[[int, NDArray[Any]], None]) -> Any:
        """Fill an array in the GPU's memory, by way of page-locked memory; see `Backend.gather`. Local."""
        return self.device.read_rows(shape, dtype, read)

    def to_numpy(self, x: Any) -> NDArray[Any]:
        """Copy a result to the host; see `Backend.fetch`. Local."""
        return self.device.host(x)

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Any:
        """Make an array in the GPU's memory; see `Backend.empty`. Local."""
        return self.device.empty(shape, dtype)

    def reset(self, state: State, sinks: NDArray[Any] | None = None) -> None:
        """Let a state forget every key; see `Backend.reset`. Local."""
        rows, (_, heads, dim_v), kind = state.row_max.size, state.acc.shape, state.acc.dtype
        kernel = self._kernel("state.cu", f"reset<{TYPES[kind]}>")
        with self.device.current():
            placed = NULL if sinks is None or not rows else self.device.array(np.ascontiguousarray(sinks, kind))
        self._launch_over(kernel, rows * dim_v, (state.acc, state.row_max, state.row_sum, placed, np.int64(rows),
                                                 np.int32(heads), np.int32(dim_v)))

    def finish(self, state: State, seen: Any, out: Any, lse: Any) -> None:
        """Normalise a state into `out` and `lse`; see `Backend.finish`. Local."""
        rows, (_, heads, dim_v) = state.row_max.size, state.acc.shape
        kernel = self._kernel("state.cu", f"finish<{TYPES[out.dtype]}, {TYPES[state.acc.dtype]}>")
        self._launch_over(kernel, rows * dim_v, (state.acc, state.row_max, state.row_sum, seen, out, lse,
                                                 np.int64(rows), np.int32(heads), np.int32(dim_v)))

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Fold one block of K and V into the running softmax; see `Backend.accumulate`. Local."""
        yield from self._done(lambda: self._fold(state, q, k, v, begin, end, score), begin, end)

    def backward(self, gradient: Gradient, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], dk: NDArray[Any],
                 dv: NDArray[Any], begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Add to the gradients what one block of K and V gives; see `Backend.backward`. Local."""
        yield from self._done(lambda: self._differentiate(gradient, q, k, v, dk, dv, begin, end, score), begin, end)

    def _done(self, launch: Callable[[], None], begin: Integers, end: Integers) -> Iterator[int]:
        """Launch what does a block, and yield until it is done."""
        pairs = int(end.sum()) - int(begin.sum())
        if pairs == 0:
            return
        device = self.device
        with device.current():
            launch()
            done = device.record(device.caller_stream())
        while not done.done:
            yield 0
            time.sleep(POLL_SECONDS)
        yield pairs

    def new_gradient(self, dout: Any, out: Any, lse: Any, dlse: Any, dq: Any) -> Gradient:
        """Begin the backward pass of queries; see `Backend.new_gradient`. Local."""
        gradient = Gradient(dout, lse, self.empty(lse.shape, lse.dtype), dq)
        kernel = self._kernel("state.cu", f"row_delta<{TYPES[dout.dtype]}, {TYPES[lse.dtype]}>")
        self._launch_over(kernel, 32 * lse.size, (gradient.delta, dout, out, NULL if dlse is None else dlse,
                                                  np.int64(lse.size), np.int32(dout.shape[2])))
        self.clear(dq)
        return gradient

    def clear(self, x: Any) -> None:
        """Fill an array with zeros; see `Backend.clear`. Local."""
        self._launch_over(self._kernel("state.cu", f"clear<{TYPES[x.dtype]}>"), x.size, (x, np.int64(x.size)))

    def add(self, x: Any, y: Any) -> None:
        """Add `y` to `x`; see `Backend.add`. Local."""
        self._launch_over(self._kernel("state.cu", f"add<{TYPES[x.dtype]}>"), x.size, (x, y, np.int64(x.size)))

    def astype(self, x: Any, dtype: np.dtype[Any]) -> Any:
        """Give `x` in `dtype`; see `Backend.rounded`. Local."""
        if x.dtype == dtype:
            return x
        made = self.empty(x.shape, dtype)
        kernel = self._kernel("state.cu", f"rounded<{TYPES[dtype]}, {TYPES[x.dtype]}>")
        self._launch_over(kernel, x.size, (made, x, np.int64(x.size)))
        return made

    def _fold(self, state: State, q: Array, k: Array, v: Array, begin: Integers, end: Integers, score: Score) -> None:
        """Launch what folds a block: of the columns that any row sees, in one part or several."""
        kind = state.acc.dtype
        q, k, v = self._widened(kind, q=q, k=k, v=v)
        seen = _seen(begin, end)
        k, v = k[seen], v[seen]
        (n_q, heads, dim), (n_k, kv_heads, dim_v) = q.shape, v.shape
        kernel = self._choose(q, k, v, score)
        parts, width = self._split(kernel, n_q * heads // kv_heads, kv_heads, n_k)
        fresh = parts > 1 or dim_v > kernel.columns
        _refuse_many(n_q * heads, n_k + width)
        columns, packed = self._upload(begin, end, seen, score, kind, heads)
        target = self._parts(parts, state) if fresh else state
        for start in range(0, dim_v, kernel.columns):
            on_hopper = kernel.file == hopper.FILE
            keys = hopper.maps(self.device, k, v) if on_hopper else (k, _from(v, start))
            self._launch(
                kernel.file, kernel.name, (-(-n_q * (heads // kv_heads) // kernel.rows), kv_heads, parts),
                kernel.threads, kernel.shared_bytes,
                (_from(target.acc, start), target.row_max, target.row_sum, q, *keys, *columns, np.int32(n_q),
                 np.int32(n_k), np.int32(kv_heads), np.int32(heads // kv_heads), np.int32(dim),
                 np.int32(min(kernel.columns, dim_v - start)), np.int32(dim_v), kind.type(score.scale), np.int32(width),
                 np.int32(fresh), *(() if on_hopper else (packed,))))
        if fresh:
            self._launch("state.cu", f"combine<{TYPES[kind]}>", (n_q * heads,), 256, 0,
                         (state.acc, state.row_max, state.row_sum, target.acc, target.row_max, target.row_sum,
                          np.int32(parts), np.int64(n_q * heads), np.int32(dim_v)))

    def _choose(self, q: Array, k: Array, v: Array, score: Score) -> Kernel:
        if self.hopper and hopper.takes(self.device, q, k, v, score):
            return hopper.instance(q.dtype, q.shape[2], v.shape[2])
        rows = len(q) * q.shape[1] // k.shape[1]
        align = _common_alignment(q, k, v)
        return self._best(kernels(q.dtype, q.shape[2], v.shape[2], rows, align, plain=score.plain))

    def _best(self, candidates: Sequence[Kernel]) -> Kernel:
        return best(candidates, self.device.shared_bytes, self.device.shared_bytes_processor)

    def _differentiate(self, gradient: Gradient, q: Array, k: Array, v: Array, dk: Array, dv: Array, begin: Integers,
                       end: Integers, score: Score) -> None:
        """Launch what differentiates a block: of the columns that any row sees, first for dq, then for dk and dv."""
        kind = gradient.dq.dtype
        q, k, v, dout = self._widened(kind, q=q, k=k, v=v, dout=gradient.dout)
        seen = _seen(begin, end)
        k, v, dk, dv = k[seen], v[seen], dk[seen], dv[seen]
        (n_q, heads, dim), (n_k, kv_heads, dim_v) = q.shape, v.shape
        rows, align = n_q * (heads // kv_heads), _common_alignment(q, k, v, dout)
        _refuse_many(n_q * heads + 1024, n_k + 1024)               # the last tiles reach beyond
        columns, packed = self._upload(begin, end, seen, score, kind, heads)
        inputs = dout, gradient.lse, gradient.delta, q, k, v, *columns
        sizes = (np.int32(n_q), np.int32(n_k), np.int32(kv_heads), np.int32(heads // kv_heads), np.int32(dim),
                 np.int32(dim_v), kind.type(score.scale), packed)
        kernel = self._best(query_gradients(q.dtype, dim, dim_v, rows, align, plain=score.plain))
        self._launch(kernel.file, kernel.name, (-(-rows // kernel.rows), kv_heads, -(-dim // kernel.columns)),
                     kernel.threads, kernel.shared_bytes, (gradient.dq, *inputs, *sizes))
        # Where one launch gives both, it has all columns of both.
        for candidates, width in zip(key_gradients(q.dtype, dim, dim_v, align, plain=score.plain), (dim, dim_v),
                                     strict=False):
            kernel = self._best(candidates)
            sights = self._sights(kernel.rows, rows, *columns, heads // kv_heads)
            self._launch(kernel.file, kernel.name, (-(-n_k // kernel.keys), kv_heads, -(-width // kernel.columns)),
                         kernel.threads, kernel.shared_bytes, (dk, dv, *inputs, sights, *sizes))

    def _sights(self, tile: int, rows: int, begin: Array, end: Array, group: int) -> Array:
        """Reckon what the rows of each tile see."""
        tiles = -(-rows // tile)
        sights = self._buffer("sights", 4 * tiles, np.dtype(np.int32))
        self._launch_over(self._kernel("state.cu", "sights"), 32 * tiles, (
            sights, begin, end, np.int32(rows // group), np.int32(group), np.int32(tile), np.int32(tiles)))
        return sights

    def _split(self, kernel: Kernel, rows: int, kv_heads: int, n_k: int) -> tuple[int, int]:
        """Give the number of parts that fill the GPU, and the columns of each, in whole tiles."""
        room = self.device.processors * max(1, min(kernel.blocks, self.device.shared_bytes_processor
                                                   // (kernel.shared_bytes + 2048)))
        tiles = -(-rows // kernel.rows) * kv_heads
        parts = max(1, min(room // tiles, -(-n_k // (4 * kernel.keys)), MOST_PARTS))
        width = -(-n_k // (parts * kernel.keys)) * kernel.keys
        return -(-n_k // width), width

    def _upload(self, begin: Integers, end: Integers, seen: slice, score: Score, kind: np.dtype[Any], heads: int
                ) -> tuple[tuple[Array, Array], Any]:
        """Copy to the GPU, at once, the intervals, counted from the first column seen, in 32 bits, and the score.

        Empty intervals may lie anywhere. A plain score is nothing but its scale.
        """
        packed = np.empty(0, np.int32) if score.plain else _packed(score, seen, kind, heads, len(begin))
        words = np.empty(len(packed) + 2 * len(begin), np.int32)
        words[:len(packed)] = packed
        for row, x in zip(words[len(packed):].reshape(2, -1), (begin, end), strict=True):
            np.subtract(x, seen.start, out=row, casting="unsafe")
        placed = self.device.array(words)
        columns = placed[len(packed):]
        return (columns[:len(begin)], columns[len(begin):]), NULL if score.plain else placed

    def _parts(self, count: int, state: State) -> State:
        """Give room for `count` states like `state`, one after the other."""
        kind = state.acc.dtype
        sizes = [count * x.size for x in (state.acc, state.row_max, state.row_sum)]
        room = self._buffer("parts", sum(sizes), kind)
        edges = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
        return State(*(room[a:b] for a, b in itertools.pairwise(edges)))

    def _widened(self, kind: np.dtype[Any], **arrays: Array) -> list[Array]:
        """Give the arrays themselves, or copies in float64 where that is what is summed in."""
        return [self._wide(name, x) if kind == np.float64 and x.dtype != kind else x for name, x in arrays.items()]

    def _wide(self, name: str, x: Array) -> Array:
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

    def synchronize(self) -> None:
        """Wait for the GPU; see `Backend.complete`. Local."""
        self.device.record(self.device.caller_stream()).synchronize()

    def release(self) -> None:
        """Give the buffers back. Local."""
        self._buffers.clear()

    def close(self) -> None:
        """Give the buffers back. Local."""
        self.release()


def _alignment(x: Array) -> int:
    """Give the bytes, 16 at most, that every row of an array is a multiple of."""
    return math.gcd(16, x.shape[-1] * x.itemsize)


def _from(x: Array, start: int) -> Array:
    """View an array from number `start` on."""
    return x.reshape(-1)[start:]


def _common_alignment(*arrays: Array) -> int:
    """Give the bytes, 16 at most, that every row of some arrays is aligned to, and a multiple of."""
    return math.gcd(*(_alignment(x) for x in arrays), *(x.data.ptr for x in arrays))


def _seen(begin: Integers, end: Integers) -> slice:
    """Give the columns from the first to the last that any row sees."""
    seeing = end > begin
    return slice(int(begin.min(where=seeing, initial=2**62)), int(end.max(where=seeing, initial=0)))


def _packed(score: Score, seen: slice, kind: np.dtype[Any], heads: int, n_q: int) -> NDArray[np.int32]:
    """Give the PackedScore of score.cuh, and what follows it, in words of 32 bits."""
    head = np.zeros(1, [("softcap", kind), ("gain", kind), ("threshold", np.uint32), ("sloped", np.int32)])
    head[0] = score.softcap, score.gain if score.dropout else 0, score.threshold, score.slopes is not None
    n_k = seen.stop - seen.start
    slopes = np.zeros(heads, kind) if score.slopes is None else score.slopes.astype(kind)
    dropout_keys = score.dropout_keys if score.dropout else np.zeros(heads, np.uint32)
    queries, keys = (score.queries, score.keys[seen]) if score.positional else (np.zeros(n_q), np.zeros(n_k))
    positions = queries.astype(np.int64).astype(np.int32), keys.astype(np.int64).astype(np.int32)
    parts = head, slopes, dropout_keys, *positions
    return np.concatenate([np.ascontiguousarray(part).view(np.int32) for part in parts])


def _refuse_many(rows: int, keys: int) -> None:
    """Kernels number rows and keys in 32 bits."""
    if max(rows, keys) >= 2**31:
        raise BackendError(f"backend cuda: expected fewer than 2^31 rows and keys in a block, got {rows} and {keys}; "
                           "use more ranks")
