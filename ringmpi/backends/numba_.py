"""The CPU fast path: register-blocked Numba kernels that release the interpreter lock, on a team of threads.

Two ways through a block, after what there is to reuse:

* *Many rows.* K and V are packed once, in parallel, as many tiles at a time as the buffer holds; then each task is a
  tile of rows of one key head × all packed keys.
* *Few rows* (decoding). A packed tile would be used once, so each task packs it in its own cache, or reads keys as they
  came: a range of keys of one key head × all rows, into a state of its own; the states are merged at the end.

A row is a query and a head: the heads of a group share the packed keys. Results depend on the number of threads, not on
which of them was faster.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device import Device
from ..errors import BackendError
from ..layout import Integers
from ..score import Score
from ..softmax import BFLOAT16, State, merge
from .base import Backend
from .cpu.fold import compile_for, fold_keys, pack_tiles
from .cpu.peak import multiply_add_peak
from .cpu.product import ROWS
from .cpu.team import Task, Team
from .cpu.vector import machine
from .cpu.workspace import Packed, Rows

Array = NDArray[Any]
PACKED_BYTES = 2**25        # of packed K and V at a time
STEP_FLOP = 6e8             # between two yields: a few milliseconds of a core, in float32 with AVX-512
STEP_BYTES = 2**24          # the same where memory is the limit
TASKS = 4                   # for each thread, at least, so that none waits long for the last


class NumbaBackend(Backend):
    """Attention in Numba on `threads` threads, the caller's among them."""

    name = "numba"
    compiles = True

    def __init__(self, threads: int, device: Device | None = None) -> None:
        super().__init__(threads)
        self._team = Team(threads)
        self._key: Any = None
        self._rows: list[Rows] = []
        self._packed: Packed | None = None
        self._busy = False

    def prepare(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int, *,
                plain: bool = True, backward: bool = False) -> None:
        """Compile the kernels, or load them; see `Backend.prepare`. Local."""
        for some in (1, 2):               # an odd dim has no pairs
            x, none = np.zeros((1, 1, some), dtype), np.zeros(1, np.int64)
            state = State.empty(1, 1, some, accumulator)
            block = _Block(state, x, x, x, none, none + 1, 1.0)
            rows, packed = Rows(*block.key), Packed(*block.key).reserve(1, 1)
            compile_for(pack_tiles, block.k, block.v, 0, 1, 0, 1, packed)
            compile_for(fold_keys, (state.acc, state.max, state.sum), block.q, block.k, block.v, block.begin, block.end,
                        block.scale, (0, 1, 0, 1), (0, 0, 1, True, True), packed, True, rows.work)

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Fold one block of K and V into the running softmax; see `Backend.accumulate`. Local."""
        if not (end > begin).any():
            return
        if self._busy:
            raise BackendError("backend numba: the loop over an earlier block has not ended; finish or close it first")
        self._busy = True
        try:
            block = _Block(state, q, k, v, begin, end, score.scale)
            packed = self._reserve(block)
            way = self._few_rows if block.rows <= packed.rows else self._many_rows
            area = counted = 0
            with closing(way(block, packed)) as steps:
                for done in steps:
                    area += done
                    pairs = area // q.shape[1]
                    yield pairs - counted
                    counted = pairs
        finally:
            self._busy = False

    def _reserve(self, block: _Block) -> Packed:
        """Make the work space for blocks like this one, unless the last one was."""
        if self._packed is None or self._key != block.key:
            self._rows, self._packed = [], None       # the old memory goes before the new comes
            self._rows, self._packed = [Rows(*block.key) for _ in range(self.threads)], Packed(*block.key)
            self._key = block.key
        return self._packed

    def _many_rows(self, block: _Block, packed: Packed) -> Generator[int, None, None]:
        """Pack tiles for all, then fold them into tiles of rows."""
        least = TASKS * self.threads
        count = max(-(-block.rows // packed.rows), -(-least // block.heads))
        height = -(-block.rows // (count * ROWS)) * ROWS
        room = max(1, PACKED_BYTES // (block.heads * packed.tile_bytes)) * packed.tile
        for start in range(block.first, block.last, room):
            stop = min(start + room, block.last)
            tiles = -(-(stop - start) // packed.tile)
            arrays = packed.reserve(block.heads, tiles)
            slots = np.linspace(0, block.heads * tiles, min(block.heads * tiles, least) + 1).astype(int).tolist()
            yield from self._team.run([self._pack(block, start, stop, a, b, arrays)
                                       for a, b in itertools.pairwise(slots)])
            areas = block.areas(start, stop, height)
            step = block.step(min(height, block.rows), packed)
            yield from self._team.run([
                self._fold(block, block.state, (head, 1, i * height, min(height, block.rows - i * height)),
                           range(start, stop, step), stop, area, arrays)
                for head in range(block.heads) for i, area in enumerate(areas) if area])

    def _few_rows(self, block: _Block, packed: Packed) -> Generator[int, None, None]:
        """Split the keys, pack each tile where it is used, merge."""
        tiles = -(-(block.last - block.first) // packed.tile)
        together = min(block.heads, packed.rows // (-(-block.rows // ROWS) * ROWS))       # heads of a task
        count = min(-(-TASKS * self.threads * together // block.heads), -(-tiles // TASKS))
        edges = [block.first + i * tiles // count * packed.tile for i in range(count)] + [block.last]
        step = min(block.step(block.rows * together, packed),
                   max(1, STEP_BYTES // (packed.tile_bytes * together)) * packed.tile)
        parts = block.parts(count)
        tasks = []
        for i, (start, stop) in enumerate(itertools.pairwise(edges)):
            area = block.areas(start, stop, block.rows)[0]
            part = State(parts.acc[i], parts.max[i], parts.sum[i]) if count > 1 else block.state
            for head in range(0, block.heads if area else 0, together):
                heads = min(together, block.heads - head)
                tasks.append(self._fold(block, part, (head, heads, 0, block.rows), range(start, stop, step), stop,
                                        area * heads, None))
        yield from self._team.run(tasks)
        if count > 1:
            merge(block.state, parts)

    def _pack(self, block: _Block, start: int, stop: int, first: int, last: int, packed: tuple[Any, ...]) -> Task:
        return Task(last - first, [(lambda thread: pack_tiles(block.k, block.v, start, stop, first, last, packed), 0)])

    def _fold(self, block: _Block, state: State, rows: tuple[int, int, int, int], starts: range, stop: int, area: int,
              packed: tuple[Any, ...] | None) -> Task:
        """Fold columns starts[0]..stop into rows (head, heads, first, count), step by step; `area` is seen."""
        def call(thread: int, start: int) -> None:
            mine = self._rows[thread]
            fold_keys((state.acc, state.max, state.sum), block.q, block.k, block.v, block.begin, block.end, block.scale,
                      rows, (starts[0], start, min(start + starts.step, stop), start == starts[0], start == starts[-1]),
                      packed or mine.private, packed is None, mine.work)

        count = len(starts)
        shares = [area * (i + 1) // count - area * i // count for i in range(count)]      # about what each step sees
        return Task(area, [(partial(call, start=start), share) for start, share in zip(starts, shares, strict=True)])

    def close(self) -> None:
        """End the threads. Local."""
        self._team.close()


class _Block:
    """The arguments of `accumulate` as the kernels take them.

    bfloat16 and float16 go as bits, uint16 and int16. Where the CPU multiplies pairs of bfloat16, q and k are uint32
    pairs along dim. The scale is positive: its sign goes to q.
    """

    def __init__(self, state: State, q: Array, k: Array, v: Array, begin: Integers, end: Integers,
                 scale: float) -> None:
        kind = state.acc.dtype
        pairs = q.dtype == BFLOAT16 and kind == np.float32 and q.shape[2] % 2 == 0 and pairs_pay()
        self.numbers = q.shape[2] + v.shape[2]
        self.state = state
        self.begin, self.end = (np.array(x, np.int64) for x in (begin, end))
        self.scale = kind.type(abs(scale))
        self.q, self.k, self.v = (_plain(x) for x in (-q if scale < 0 else q, k, v))
        if pairs:
            self.q, self.k = self.q.view(np.uint32), self.k.view(np.uint32)
        self.heads = k.shape[1]
        self.group = q.shape[1] // self.heads
        self.rows = len(q) * self.group
        self.key = self.k.shape[2], v.shape[2], kind, pairs
        seeing = end > begin
        self.first, self.last = int(begin[seeing].min()), int(end[seeing].max())

    def areas(self, start: int, stop: int, height: int) -> list[int]:
        """Rows × keys seen among columns start..stop, for each tile of `height` rows of a key head."""
        seen = np.clip(self.end, start, stop) - np.clip(self.begin, start, stop)
        edges = np.minimum(np.arange(0, self.rows + height, height), self.rows)
        query, rest = edges // self.group, edges % self.group          # a tile may end among the heads of a query
        before = self.group * np.append(0, np.cumsum(seen))[query] + rest * np.append(seen, 0)[query]
        areas: list[int] = np.diff(before).tolist()
        return areas

    def step(self, rows: int, packed: Packed) -> int:
        """Columns that `rows` rows take about STEP_FLOP for, in whole tiles."""
        speed = machine().vector_bytes / 64 * 4 / self.scale.itemsize
        return max(1, int(STEP_FLOP * speed / (2 * rows * packed.tile * self.numbers))) * packed.tile

    def parts(self, count: int) -> State:
        """Give `count` empty states of the same queries, along a leading axis."""
        parts = State(*(np.empty((count, *x.shape), x.dtype) for x in (self.state.acc, self.state.max, self.state.sum)))
        parts.reset()
        return parts


@functools.cache
def pairs_pay() -> bool:
    """Say whether multiplying pairs of bfloat16 is faster here than widening them first. Local.

    Both occur: some CPUs do twice the arithmetic in pairs, some half. Measured, the best of ten turns of 0.2 ms each,
    since other ranks may be busy on the same cores.
    """
    if not machine().pairs:
        return False
    turns = [[multiply_add_peak(kind, 1, 2e-4) for kind in ("pairs", "float32")] for _ in range(10)]
    in_pairs, widened = (max(column) for column in zip(*turns, strict=True))
    return bool(in_pairs > widened)


def _plain(x: Array) -> Array:
    """Contiguous and writable, as the kernels expect it; bfloat16 as uint16, float16 as int16."""
    x = np.ascontiguousarray(x)
    x = x.view({BFLOAT16: np.uint16, np.dtype(np.float16): np.int16}.get(x.dtype, x.dtype))
    return x if x.flags.writeable else np.asarray(_Writable(x))


class _Writable:
    """Shows a read-only array as a writable one, to kernels that only read it."""

    def __init__(self, x: Array) -> None:
        self.base = x
        self.__array_interface__ = {**x.__array_interface__, "data": (x.ctypes.data, False)}
