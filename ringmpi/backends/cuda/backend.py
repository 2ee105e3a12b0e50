"""The GPU path: the CUDA C++ kernels of kernels/, chosen, launched and watched from here.

A block is one launch: the kernel takes the state from the GPU's memory, folds all that each row sees of the block, in
one interval or several, and puts it back; float64 with dim_v beyond 128 takes a launch for each 128 columns. Where
there are too few tiles of rows to fill the GPU (decoding), the columns are split into parts, each with a state of its
own, which a second kernel folds into the state. The gradient of a block is a launch for dq, one or two for dk and dv,
and one each for that of a bias of the keys and of one by distance. While kernels run, `accumulate` and `backward`
yield, so that the caller can keep messages moving.

In canonical order one instance of a kernel takes every block, whatever its rows and wherever its arrays begin; columns
are never split into parts; and a block is launched from a multiple of `CANONICAL_TILE` on.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...device import Device, open_device, version
from ...dtypes import TENSOR_TOLERANCE
from ...environment import hopper_kernel
from ...errors import BackendError
from ...layout import Integers
from ...score import Score
from ...softmax import Gradient, State
from ..base import Backend, Shape
from . import hopper, library
from .arguments import Placed, from_number, gradient_inputs, problem, rows_of, score_type, state_arrays
from .instances import (
    CANONICAL_TILE,
    TYPES,
    best,
    dbias_kernels,
    dkdv_kernels,
    dq_kernels,
    drelative_kernels,
    forward_kernels,
)
from .self_test import SelfTest
from .sources import Kernel, Kind, compiler_options, kernels_folder

Array = Any
MOST_DIM = 256
# Sizes of the self-tests: queries, with two heads each, and keys. The forward kernels are chosen by the number of rows;
# these choose every one of them. With 100 queries all warpgroups of the kernel for Hopper have full tiles in common,
# and then one that is full for none.
FORWARD_TESTS = ((1, 94), (8, 106), (25, 140), (65, 220))
HOPPER_TESTS = (*FORWARD_TESTS, (100, 1000))
BACKWARD_TESTS = ((7, 106), (75, 220))
TAKE_NUMBA = "take backend='numba'"
LIBRARY_TEST = 900, 1700     # more pairs than `library.FEWEST_PAIRS`
POLL_SECONDS = 2e-5           # between two looks at a running kernel
MOST_PARTS = 1024
MOST_SUMS = 2**23             # for a bias by distance, of all warps: 64 MiB
NULL = np.uint64(0)           # in place of an array


class CudaBackend(Backend):
    """Attention on one GPU."""

    name = "cuda"
    compiles = True
    tolerance = TENSOR_TOLERANCE
    canonical_tile = CANONICAL_TILE
    biased = True
    relative = True

    def __init__(self, threads: int, device: Device | None = None) -> None:
        super().__init__(threads)
        self.device: Device = device or open_device(0)
        if self.device.capability < (8, 0):
            raise BackendError(f"backend cuda: expected a GPU of compute capability 8.0 or later, got "
                               f"{self.device.name} with {'.'.join(map(str, self.device.capability))}")
        # For good once settled: what is tested must be what runs.
        self.hopper = hopper_kernel() and self.device.capability == hopper.CAPABILITY
        self.ways = int(self.hopper)
        self._buffers: dict[str, Array] = {}

    @classmethod
    def scratch_bytes(cls, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any], acc_dtype: np.dtype[Any]
                      ) -> dict[str, int]:
        """Predict the copies of q, k and v in float64 where that is asked for; see `Backend`. Local."""
        if acc_dtype != np.float64 or dtype == acc_dtype:
            return {}
        return {"q, k and v widened": sum(math.prod(shape) for shape in (q, k, v)) * acc_dtype.itemsize}

    @classmethod
    def describe(cls) -> str:
        """Describe CuPy, the driver and whose kernels may differentiate; see `Backend.describe`. Local."""
        return f"{version()}; {library.describe()}"

    def settle(self, wished: str, ways: Sequence[int]) -> None:
        """Use the kernel for Hopper GPUs where all ranks have it; see `Backend.settle`. Local."""
        self.hopper = all(ways)

    def prepare(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int, *,
                plain: bool = True, biased: bool = False, relative: bool = False, several: bool = False,
                backward: bool = False, weights: bool = False) -> None:
        """Compile the kernels, or load them, and test each on a small case; see `Backend.prepare`. Local."""
        if max(dim, dim_v) > MOST_DIM:
            raise BackendError(f"backend cuda: expected dim and dim_v up to {MOST_DIM}, got {dim} and {dim_v}; "
                               f"{TAKE_NUMBA}")
        tested = self.device.cache.setdefault("tested kernels", set())
        for number in (False, True) if several else (False,):         # some block may be met in one interval
            kind = Kind(plain, self.canonical, biased, relative, number)
            case = dim, dim_v, dtype, accumulator, kind, backward
            if (case, self._asks_hopper) not in tested:
                self._test_kernels(*case)
                tested.add((case, self._asks_hopper))
        if backward and plain and not biased and not relative and self._may_ask(dtype, accumulator, dim, dim_v):
            self._find_library(dtype, dim)

    @property
    def _asks_hopper(self) -> bool:
        """Whether the kernel for Hopper is to take what it can: it has no canonical order."""
        return self.hopper and not self.canonical

    def _test_kernels(self, dim: int, dim_v: int, dtype: np.dtype[Any], accumulator: np.dtype[Any], kind: Kind,
                      backward: bool) -> None:
        """Run every kernel that such inputs may choose, and compare with NumPy."""
        with_these = ((not kind.plain, "score functions"), (kind.biased, "a bias of the keys"),
                      (kind.relative, "a bias by distance"), (kind.several, "several intervals"))
        kernel = (f"on {self.device.name} the {'backward ' if backward else ''}kernel for {dtype}, dim {dim}, dim_v "
                  f"{dim_v}{''.join(f', with {name},' for wanted, name in with_these if wanted)}")
        simple = kind.plain and not kind.adds and not kind.several
        for_hopper = self._asks_hopper and simple and not backward and dtype in hopper.TYPES
        advice = f"please report it, and {'set RINGMPI_HOPPER=0' if for_hopper else TAKE_NUMBA} meanwhile"
        bound = {8: 1e-12, 4: 2e-5, 2: 5e-2 if backward else 2e-2}[dtype.itemsize]
        sizes = BACKWARD_TESTS if backward else HOPPER_TESTS if self._asks_hopper and simple else FORWARD_TESTS
        for n_q, n_k in sizes:
            test = SelfTest(n_q, n_k, dim, dim_v, dtype, accumulator, kind.plain, backward, biased=kind.biased,
                            relative=kind.relative, several=kind.several)
            try:
                with self.device.current():
                    error = test.error(self)
            except TimeoutError as late:
                raise BackendError(f"backend cuda: {kernel} does not end; {advice}") from late
            except BackendError as failed:
                raise BackendError(f"backend cuda: {kernel} fails; {advice}: {failed}") from failed
            if not error <= bound:
                raise BackendError(f"backend cuda: {kernel} gives a wrong result (error {error:.2g}, bound "
                                   f"{bound:.0g}); {advice}")

    def _find_library(self, dtype: np.dtype[Any], dim: int) -> None:
        """Look for a kernel of torch that gives right gradients on this device."""
        test = SelfTest(*LIBRARY_TEST, dim, dim, dtype, np.dtype(np.float32), True, True, whole=True)

        def error() -> float:
            with self.device.current():
                return test.error(self)
        missing = self._library.prove(dtype, dim, error)
        if missing and self.gpu_kernels == "library":
            raise BackendError(f"gpu_kernels: 'library' is not there on {self.device.name} for {dtype}, dim {dim}: "
                               f"{missing}; take 'auto' or 'own'")

    @property
    def _library(self) -> library.Library:
        """What is known of torch's kernels on this device."""
        found: library.Library = self.device.cache.setdefault(library.FOUND, library.Library(self.device))
        return found

    def wants_out(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int, plain: bool) -> bool:
        """Say whether torch's kernels would take such arrays; see `Backend.wants_out`. Local."""
        return plain and self._may_ask(dtype, accumulator, dim, dim_v) and self._library.kernel(dtype, dim) is not None

    def _may_ask(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int) -> bool:
        """Say whether torch's kernels are asked for, and may be there for such arrays."""
        wanted = library.is_wanted(self.gpu_kernels) and not self.canonical
        return wanted and library.fits(dtype, accumulator, dim, dim_v)

    def to_device(self, x: Any) -> Any:
        """Give `x` as a C-contiguous array in the GPU's memory; see `Backend.to_device`. Local."""
        if isinstance(x, np.ndarray):
            return self.device.array(x)
        x = self.device.contiguous(x)
        if x.size and x.data.ptr % _alignment(x):       # what begins askew would need kernels of its own
            aligned = self.device.empty(x.shape, x.dtype)
            self.device.copy(aligned, x, self.device.caller_stream())
            return aligned
        return x

    def read_rows(self, shape: Sequence[int], dtype: np.dtype[Any], read: Callable[[int, NDArray[Any]], None]) -> Any:
        """Fill an array in the GPU's memory, by way of page-locked memory; see `Backend.read_rows`. Local."""
        return self.device.read_rows(shape, dtype, read)

    def to_numpy(self, x: Any) -> NDArray[Any]:
        """Copy a result to the host; see `Backend.to_numpy`. Local."""
        return self.device.host(x)

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Any:
        """Make an array in the GPU's memory; see `Backend.empty`. Local."""
        return self.device.empty(shape, dtype)

    def reset(self, state: State, sinks: NDArray[Any] | None = None) -> None:
        """Let a state forget every key; see `Backend.reset`. Local."""
        rows = state.row_max.size
        _, heads, dim_v = state.acc.shape
        acc_dtype = state.acc.dtype
        kernel = self._kernel("state.cu", f"reset<{TYPES[acc_dtype]}>")
        with self.device.current():
            placed = NULL if sinks is None or not rows else self.device.array(np.ascontiguousarray(sinks, acc_dtype))
        self._launch_over(kernel, rows * dim_v, (state_arrays(state, dim_v), placed, np.int64(rows), np.int32(heads)))

    def combine(self, state: State, parts: State) -> None:
        """Fold states into one; see `Backend.combine`. Local."""
        rows = state.row_max.size
        acc_dtype = state.acc.dtype
        dim_v = state.acc.shape[-1]
        arguments = state_arrays(state, dim_v), state_arrays(parts, dim_v), np.int32(len(parts.acc)), np.int64(rows)
        kernel = self._kernel("state.cu", f"combine<{TYPES[acc_dtype]}>")
        if rows:
            with self.device.current():
                self.device.launch(kernel, (rows,), 256, 0, arguments, self.device.caller_stream())

    def finish(self, state: State, seen: Any, out: Any, lse: Any) -> None:
        """Normalise a state into `out` and `lse`; see `Backend.finish`. Local."""
        rows = state.row_max.size
        _, heads, dim_v = state.acc.shape
        kernel = self._kernel("state.cu", f"finish<{TYPES[out.dtype]}, {TYPES[state.acc.dtype]}>")
        rows_each = 1 if seen.ndim == 2 else heads               # that a number of `seen` stands for
        self._launch_over(kernel, rows * dim_v, (state_arrays(state, dim_v), seen, out, lse, np.int64(rows),
                                                 np.int32(rows_each)))

    def lse_for_weights(self, lse: Any) -> Any:
        """Give lse with inf for -inf; see `Backend.lse_for_weights`. Local."""
        made = self.empty(lse.shape, lse.dtype)
        kernel = self._kernel("state.cu", f"lse_for_weights<{TYPES[lse.dtype]}>")
        self._launch_over(kernel, lse.size, (made, lse, np.int64(lse.size)))
        return made

    def without_left_out(self, x: Any, left_out: NDArray[np.bool_]) -> Any:
        """Give 0 for what is not finite of keys that are left out; see `Backend.without_left_out`. Local."""
        chosen = self.device.array(left_out)
        found = self.empty((1,), np.dtype(np.int32))
        self.clear(found)
        sizes = np.int64(x.size), np.int64(math.prod(x.shape[2:]))
        finding = self._kernel("state.cu", f"find_not_finite<{TYPES[x.dtype]}>")
        self._launch_over(finding, x.size, (found, x, chosen, *sizes))
        if not self.to_numpy(found)[0]:
            return x
        made = self.empty(x.shape, x.dtype)
        self.device.copy(made, x, self.device.caller_stream())
        clearing = self._kernel("state.cu", f"clear_rows<{TYPES[x.dtype]}>")
        self._launch_over(clearing, x.size, (made, chosen, *sizes))
        return made

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Fold one block of K and V into the running softmax; see `Backend.accumulate`. Local."""
        yield from self._done(partial(self._fold, state, q, k, v, score), begin, end)

    def backward(self, gradient: Gradient, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], dk: Any, dv: Any,
                 begin: Integers, end: Integers, score: Score, dkey_bias: Any = None,
                 drelative: Sequence[NDArray[np.float64]] | None = None) -> Iterator[int]:
        """Add to the gradients what one block of K and V gives; see `Backend.backward`. Local."""
        self.wanted_gradients(gradient, dk, dv)
        totals = None if drelative is None else self._entries(score)
        yield from self._done(partial(self._differentiate, gradient, q, k, v, dk, dv, score, dkey_bias, totals), begin,
                              end)
        if totals is not None and drelative is not None:
            with self.device.current():
                of_heads = self.to_numpy(totals)
            edges = np.cumsum([table.shape[1] for table in drelative])
            for target, total in zip(drelative, np.split(of_heads, edges[:-1], axis=1), strict=True):
                target += total

    def _done(self, launch: Callable[[Integers, Integers], None], begin: Integers, end: Integers) -> Iterator[int]:
        """Launch what does a block, of the intervals in which some row sees a key, and yield until it is done."""
        pairs = int(end.sum()) - int(begin.sum())
        if pairs == 0:
            return
        device = self.device
        begin, end = np.atleast_2d(begin, end)
        if len(begin) > 1:
            some = (end > begin).any(axis=1)
            begin, end = begin[some], end[some]
        with device.current():
            launch(begin, end)
            done = device.record(device.caller_stream())
        while not done.done:
            yield 0
            time.sleep(POLL_SECONDS)
        yield pairs

    def new_gradient(self, dout: Any, out: Any, lse: Any, dlse: Any, dq: Any) -> Gradient:
        """Begin the backward pass of queries; see `Backend.new_gradient`. Local."""
        gradient = Gradient(dout, lse, self.empty(lse.shape, lse.dtype), dq, out if dlse is None else None)
        kernel = self._kernel("state.cu", f"row_delta<{TYPES[dout.dtype]}, {TYPES[lse.dtype]}>")
        self._launch_over(kernel, 32 * lse.size, (gradient.delta, dout, out, NULL if dlse is None else dlse,
                                                  np.int64(lse.size), np.int32(dout.shape[2])))
        self.clear(dq)
        return gradient

    def clear(self, x: Any) -> None:
        """Fill an array with zeros; see `Backend.clear`. Local."""
        with self.device.current():
            self.device.clear(x, self.device.caller_stream())

    def add(self, x: Any, y: Any) -> None:
        """Add `y` to `x`; see `Backend.add`. Local."""
        if x.flags.c_contiguous and y.flags.c_contiguous:
            self._launch_over(self._kernel("state.cu", f"add<{TYPES[x.dtype]}>"), x.size, (x, y, np.int64(x.size)))
            return
        kernel = self._kernel("state.cu", f"add_rows<{TYPES[x.dtype]}>")
        self._launch_over(kernel, x.size, (x, *rows_of(x), y, *rows_of(y), np.int64(x.size)))

    def astype(self, x: Any, dtype: np.dtype[Any]) -> Any:
        """Give `x` in `dtype`; see `Backend.astype`. Local."""
        if x.dtype == dtype:
            return x
        made = self.empty(x.shape, dtype)
        kernel = self._kernel("state.cu", f"rounded<{TYPES[dtype]}, {TYPES[x.dtype]}>")
        self._launch_over(kernel, x.size, (made, x, np.int64(x.size)))
        return made

    def _fold(self, state: State, q: Array, k: Array, v: Array, score: Score, begin: Integers, end: Integers) -> None:
        """Launch what folds a block: the kernel for Hopper, which knows one interval, for each of a few."""
        if 1 < len(begin) <= hopper.MOST_INTERVALS and self._takes_hopper(q, k, v, score):
            for number in range(len(begin)):
                self._launch_forward(state, q, k, v, score, begin[number:number + 1], end[number:number + 1])
            return
        self._launch_forward(state, q, k, v, score, begin, end)

    def _takes_hopper(self, q: Array, k: Array, v: Array, score: Score) -> bool:
        return self._asks_hopper and hopper.takes(self.device, q, k, v, score)

    def _launch_forward(self, state: State, q: Array, k: Array, v: Array, score: Score, begin: Integers, end: Integers
                        ) -> None:
        """Launch what folds a block: of the columns that any row sees, in one part or several."""
        acc_dtype = state.acc.dtype
        q, k, v = self._operands(acc_dtype, q=q, k=k, v=v)
        seen = self._seen(begin, end, len(k))
        k = k[seen]
        v = v[seen]
        score = _of_columns(score, seen)
        n_q, heads, _ = q.shape
        n_k, kv_heads, dim_v = v.shape
        rows = n_q * heads // kv_heads

        # Where there is not one launch for all columns, each has states of its own, which are combined afterwards. In
        # canonical order each begins with the maximum and the sum of the state, and the last one puts back its own.
        kernel = self._choose(q, k, v, score, len(begin))
        parts, width = self._split(kernel, rows, kv_heads, n_k)
        fresh = not self.canonical and (parts > 1 or dim_v > kernel.columns)
        _refuse_many(n_q * heads, n_k + width)
        placed = self._upload(begin, end, seen, score, acc_dtype, heads)
        target = self._parts(parts, state) if fresh else state
        grid = -(-rows // kernel.rows), kv_heads, parts
        for start in range(0, dim_v, kernel.columns):
            keys = hopper.maps(self.device, k, v) if kernel.file == hopper.FILE else (k, from_number(v, start))
            of_launch = target if fresh or start + kernel.columns >= dim_v else self._with_copies(target)
            self._launch_tiles(kernel, grid, (
                state_arrays(of_launch, dim_v, start, width, fresh), q, *keys,
                problem(q, v, placed, score, acc_dtype, min(kernel.columns, dim_v - start))))
        if fresh:
            self.combine(state, target)

    def _choose(self, q: Array, k: Array, v: Array, score: Score, intervals: int) -> Kernel:
        if intervals == 1 and self._takes_hopper(q, k, v, score):
            return hopper.instance(q.dtype, q.shape[2], v.shape[2])
        rows = len(q) * q.shape[1] // k.shape[1]
        align = _common_alignment(q, k, v)
        return self._best(forward_kernels(q.dtype, q.shape[2], v.shape[2], rows, align, self._kind(score, intervals)))

    def _kind(self, score: Score, intervals: int) -> Kind:
        return Kind(not score.has_functions, self.canonical, score.key_bias is not None, score.relative is not None,
                    intervals > 1)

    def _best(self, candidates: Sequence[Kernel]) -> Kernel:
        return best(candidates, self.device.shared_bytes, self.device.shared_bytes_processor)

    def _differentiate(self, gradient: Gradient, q: Array, k: Array, v: Array, dk: Array, dv: Array, score: Score,
                       dkey_bias: Array, drelative: Array, begin: Integers, end: Integers) -> None:
        """Launch torch's kernels for what they can do of a block, and ours for the rest."""
        case = q.dtype, gradient.lse.dtype, q.shape[2], v.shape[2]
        kernel = self._library.kernel(q.dtype, q.shape[2]) if library.takes(gradient, score) and self._may_ask(
            *case) else None
        pieces, rest = library.cut_all(begin, end) if kernel else ([], [])
        if kernel is None or not pieces:
            self._launch_backward(gradient, q, k, v, dk, dv, begin, end, score, dkey_bias, drelative)
            return
        for piece in pieces:
            try:
                self._library.differentiate(kernel, piece, gradient, q, k, v, dk, dv, score.scale)
                self.differentiated_by = kernel.name
            except BackendError as error:
                if self.gpu_kernels == "library" or self._library.on_trial:
                    raise
                self._library.give_up(q.dtype, q.shape[2], error)
                rest.append(piece.intervals(begin.shape[1]))
        for interval in rest:
            low, high = np.atleast_2d(*interval)
            self._launch_backward(gradient, q, k, v, dk, dv, low, high, score, dkey_bias, drelative)

    def _launch_backward(self, gradient: Gradient, q: Array, k: Array, v: Array, dk: Array, dv: Array, begin: Integers,
                         end: Integers, score: Score, dkey_bias: Array, drelative: Array) -> None:
        """Launch what differentiates a block: of the columns that any row sees, first for dq, then for the keys."""
        acc_dtype = gradient.lse.dtype
        kind = self._kind(score, len(begin))
        q, k, v, dout = self._operands(acc_dtype, q=q, k=k, v=v, dout=gradient.dout)
        seen = self._seen(begin, end, len(k))
        k, v, dk, dv, dkey_bias = (x if x is None else x[seen] for x in (k, v, dk, dv, dkey_bias))
        score = _of_columns(score, seen)
        n_q, heads, dim = q.shape
        n_k, kv_heads, dim_v = v.shape
        rows = n_q * (heads // kv_heads)
        align = _common_alignment(q, k, v, dout)
        _refuse_many(n_q * heads + 1024, n_k + 1024)               # the last tiles reach beyond
        placed = self._upload(begin, end, seen, score, acc_dtype, heads)
        inputs = gradient_inputs(q, k, v, dout, gradient.lse, gradient.delta)
        block = problem(q, v, placed, score, acc_dtype)

        # dq: blocks of threads over the rows. dk and dv: over the keys, in one launch, which has all columns of both,
        # or in one for each.
        if gradient.dq is not None:
            kernel = self._best(dq_kernels(q.dtype, dim, dim_v, rows, align, kind))
            self._launch_tiles(kernel, (-(-rows // kernel.rows), kv_heads, -(-dim // kernel.columns)),
                               (gradient.dq, inputs, block))
        launches = dkdv_kernels(q.dtype, dim, dim_v, align, kind) if dk is not None else []
        for candidates, width in zip(launches, (dim, dim_v), strict=False):
            kernel = self._best(candidates)
            visible = self._visible_columns(kernel.rows, rows, placed, heads // kv_heads)
            self._launch_tiles(kernel, (-(-n_k // kernel.keys), kv_heads, -(-width // kernel.columns)),
                               (dk, dv, inputs, visible, block))
        if dkey_bias is not None:
            kernel = self._best(dbias_kernels(q.dtype, dim, dim_v, align, kind))
            visible = self._visible_columns(kernel.rows, n_q, placed, 1)
            with self._of_each_head(dkey_bias, heads) as target:
                self._launch_tiles(kernel, (-(-n_k // kernel.keys), heads), (target, inputs, visible, block))
        if drelative is not None:
            kernel = self._best(drelative_kernels(q.dtype, dim, dim_v, align, kind))
            visible = self._visible_columns(kernel.rows, n_q, placed, 1)
            # Each warp has sums of its own, which bounds how many blocks of threads there are.
            warps = kernel.threads // 32
            blocks = max(1, min(-(-n_k // kernel.keys), MOST_SUMS // (warps * drelative.size)))
            parts = self._buffer("sums by distance", blocks * warps * drelative.size, drelative.dtype)
            self.clear(parts)
            self._launch_tiles(kernel, (blocks, heads), (parts, inputs, visible, block))
            self._launch_over(self._kernel("state.cu", "add_parts"), drelative.size, (
                drelative, parts, np.int32(blocks * warps), np.int64(drelative.size)))

    def _entries(self, score: Score) -> Array:
        """Give zeros for the gradient of a bias by distance: of each head, the entries of all tables."""
        tables = score.relative.tables if score.relative else ()
        totals = self.empty((len(tables[0]), sum(table.shape[1] for table in tables)), np.float64)
        self.clear(totals)
        return totals

    @contextmanager
    def _of_each_head(self, dkey_bias: Array, heads: int) -> Iterator[Array]:
        """Give what to add the gradient of each head's bias to, which goes to that of all if they have the same."""
        n_k, numbers = dkey_bias.shape
        if numbers == heads:
            yield dkey_bias
            return
        of_heads = self._buffer("gradient of a bias", n_k * heads, dkey_bias.dtype)
        self.clear(of_heads)
        yield of_heads
        kernel = self._kernel("state.cu", f"add_heads<{TYPES[dkey_bias.dtype]}>")
        self._launch_over(kernel, n_k, (dkey_bias, of_heads, np.int64(n_k), np.int32(heads)))

    def _visible_columns(self, tile: int, rows: int, placed: Placed, group: int) -> Array:
        """Work out what the rows of each tile see in each interval."""
        tiles = -(-rows // tile)
        intervals = len(placed.begin)
        count = intervals * tiles
        visible = self._buffer("visible columns", 4 * count, np.dtype(np.int32))
        self._launch_over(self._kernel("state.cu", "visible_columns"), 32 * count, (
            visible, placed.begin, placed.end, np.int32(rows // group), np.int32(group), np.int32(tile),
            np.int32(tiles), np.int32(intervals)))
        return visible

    def _split(self, kernel: Kernel, rows: int, kv_heads: int, n_k: int) -> tuple[int, int]:
        """Give the number of parts that fill the GPU, and the columns of each, in whole tiles."""
        if self.canonical:
            return 1, n_k
        blocks = min(kernel.blocks, self.device.shared_bytes_processor // (kernel.shared_bytes + 2048))
        resident_blocks = self.device.processors * max(1, blocks)
        tiles = -(-rows // kernel.rows) * kv_heads
        parts = max(1, min(resident_blocks // tiles, -(-n_k // (4 * kernel.keys)), MOST_PARTS))
        width = -(-n_k // (parts * kernel.keys)) * kernel.keys
        return -(-n_k // width), width

    def _seen(self, begin: Integers, end: Integers, n_k: int) -> slice:
        """Give the columns from the first to the last that any row sees; in canonical order in whole tiles."""
        seeing = end > begin
        first, last = int(begin.min(where=seeing, initial=2**62)), int(end.max(where=seeing, initial=0))
        if self.canonical:
            first = first // CANONICAL_TILE * CANONICAL_TILE
            last = min(-(-last // CANONICAL_TILE) * CANONICAL_TILE, n_k)
        return slice(first, last)

    def _upload(self, begin: Integers, end: Integers, seen: slice, score: Score, acc_dtype: np.dtype[Any], heads: int
                ) -> Placed:
        """Copy to the GPU, at once, the intervals, counted from the first column seen, in 32 bits, and the score.

        Empty intervals may lie anywhere. A score without functions is nothing but its scale, and maybe a bias: of the
        keys, which is there, or by distance.
        """
        functions = score.has_functions
        packed = _packed(score, seen, acc_dtype, heads, begin.shape[1]) if functions else np.empty(0, np.int32)
        coordinates = _coordinates(score, seen)
        words = np.empty(len(packed) + 2 * begin.size + len(coordinates), np.int32)
        words[:len(packed)] = packed
        edges = [len(packed) + part * begin.size for part in range(3)]
        for first, x in zip(edges, (begin, end), strict=False):
            np.subtract(x, seen.start, out=words[first:first + begin.size].reshape(begin.shape), casting="unsafe")
        words[edges[2]:] = coordinates
        placed = self.device.array(words)
        of_begin, of_end = (placed[a:b].reshape(*begin.shape) for a, b in itertools.pairwise(edges))
        tables = NULL
        if score.relative:
            tables = self.device.array(np.concatenate([x.astype(acc_dtype).reshape(-1) for x in score.relative.tables]))
        return Placed(of_begin, of_end, placed if functions else NULL, tables,
                      placed[edges[2]:] if score.relative else NULL)

    def _parts(self, count: int, state: State) -> State:
        """Give memory for `count` states like `state`, along a leading axis."""
        arrays = state.acc, state.row_max, state.row_sum
        buffer = self._buffer("parts", sum(count * x.size for x in arrays), state.acc.dtype)
        edges = itertools.pairwise(itertools.accumulate((count * x.size for x in arrays), initial=0))
        return State(*(buffer[a:b].reshape(count, *x.shape) for (a, b), x in zip(edges, arrays, strict=True)))

    def _with_copies(self, state: State) -> State:
        """Give a state with the same acc, and with a maximum and a sum of its own."""
        shape = 2, *state.row_max.shape
        copies = self._buffer("maxima and sums", math.prod(shape), state.acc.dtype).reshape(shape)
        for number, source in enumerate((state.row_max, state.row_sum)):
            self.device.copy(copies[number], source, self.device.caller_stream())
        return State(state.acc, copies[0], copies[1])

    def _operands(self, acc_dtype: np.dtype[Any], **arrays: Array) -> list[Array]:
        """Give the arrays themselves, or copies in float64 where that is what is summed in.

        In canonical order copies of those that begin askew, too, which would have kernels of their own.
        """
        return [self._operand(acc_dtype, name, x) for name, x in arrays.items()]

    def _operand(self, acc_dtype: np.dtype[Any], name: str, x: Array) -> Array:
        if acc_dtype == np.float64 and x.dtype != acc_dtype:
            return self._wide(name, x)
        if not self.canonical or not x.data.ptr % _alignment(x):
            return x
        copy = self._buffer(name, x.size, x.dtype).reshape(x.shape)
        self.device.copy(copy, x, self.device.caller_stream())
        return copy

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
            path = kernels_folder() / file
            options = compiler_options()
            with self.device.current():
                self.device.cache[file, name] = (
                    self.device.compile_for(hopper.ARCHITECTURE, path, name, options) if file == hopper.FILE
                    else self.device.compile(path, [name], options)[0])
        return self.device.cache[file, name]

    def _launch_tiles(self, kernel: Kernel, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        """Launch a kernel over tiles."""
        self.device.launch(self._kernel(kernel.file, kernel.name), grid, kernel.threads, kernel.shared_bytes, arguments,
                           self.device.caller_stream())

    def _launch_over(self, kernel: Any, count: int, arguments: Sequence[Any]) -> None:
        """Launch a kernel whose threads share `count` numbers."""
        if count:
            blocks = min(-(-count // 256), 32 * self.device.processors)
            with self.device.current():
                self.device.launch(kernel, (blocks,), 256, 0, arguments, self.device.caller_stream())

    def synchronize(self) -> None:
        """Wait for the GPU; see `Backend.synchronize`. Local."""
        self.device.record(self.device.caller_stream()).synchronize()

    def release(self) -> None:
        """Give the buffers back. Local."""
        self._buffers.clear()

    def close(self) -> None:
        """Give the buffers back. Local."""
        self.release()


def _of_columns(score: Score, seen: slice) -> Score:
    """Give a score whose bias is that of some columns; its positions stay those of the block."""
    return score if score.key_bias is None else score.of_key_bias(score.key_bias[seen])


def _alignment(x: Array) -> int:
    """Give the bytes, 16 at most, that every row of an array is a multiple of."""
    return math.gcd(16, x.shape[-1] * x.itemsize)


def _common_alignment(*arrays: Array) -> int:
    """Give the bytes, 16 at most, that every row of some arrays is aligned to, and a multiple of."""
    return math.gcd(*(_alignment(x) for x in arrays), *(x.data.ptr for x in arrays))


def _packed(score: Score, seen: slice, acc_dtype: np.dtype[Any], heads: int, n_q: int) -> NDArray[np.int32]:
    """Give the PackedScore of score.cuh, and the arrays that follow it, in words of 32 bits."""
    # What the score does not use is 0.
    header = np.zeros(1, score_type(acc_dtype))
    header[0] = score.softcap, score.gain if score.dropout else 0, score.threshold, score.slopes is not None
    n_k = seen.stop - seen.start
    slopes = np.zeros(heads, acc_dtype) if score.slopes is None else score.slopes.astype(acc_dtype)
    dropout_keys = score.dropout_keys if score.dropout else np.zeros(heads, np.uint32)
    queries, keys = (score.queries, score.keys[seen]) if score.positional else (np.zeros(n_q), np.zeros(n_k))
    positions = queries.astype(np.int64).astype(np.int32), keys.astype(np.int64).astype(np.int32)
    parts = header, slopes, dropout_keys, *positions
    return np.concatenate([np.ascontiguousarray(part).view(np.int32) for part in parts])


def _coordinates(score: Score, seen: slice) -> NDArray[np.int32]:
    """Give the coordinates for a bias by distance: for each axis those of the queries, then those of the keys."""
    if score.relative is None:
        return np.empty(0, np.int32)
    along = zip(*map(score.relative.coordinates, (score.queries, score.keys[seen])), strict=True)
    return np.concatenate([x for pair in along for x in pair]).astype(np.int32)


def _refuse_many(rows: int, keys: int) -> None:
    """Kernels number rows and keys in 32 bits."""
    if max(rows, keys) >= 2**31:
        raise BackendError(f"backend cuda: expected fewer than 2^31 rows and keys in a block, got {rows} and {keys}; "
                           "use more ranks")
