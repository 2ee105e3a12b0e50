"""The CPU fast path: register-blocked Numba kernels that release the interpreter lock, on a team of threads.

Two ways through a block, after what there is to reuse:

* *Many rows.* K and V are packed once, in parallel, as many tiles at a time as the buffer holds; then each task is a
  tile of rows of one key head × all packed keys.
* *Few rows* (decoding). A packed tile would be used once, so each task packs it in its own cache, or reads keys as they
  came: a range of keys of one key head × all rows, into a state of its own; the states are merged at the end.

A row is a query and a head: the heads of a group share the packed keys. The backward pass has one way, `cpu.backward`.

Which thread was faster never matters. With many rows their number does not either: the result has the same bits on any.
With few rows the ranges of keys, and in the backward pass the chunks of rows, are as many as the threads ask for, and
so the order of sums, and the last bits, go by the number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...device import Device
from ...dtypes import BFLOAT16
from ...errors import BackendError
from ...layout import Integers
from ...score import Score
from ...softmax import Gradient, State, combine
from ..base import Backend
from ..products import PRODUCTS, bits
from ..team import Task, Team
from .backward import Backward, Limits
from .block import Block, plain, speed
from .fold import add_sums, compile_for, differentiate_keys, fold_keys, pack_tiles, pack_twice
from .product import ROWS
from .vector import machine
from .workspace import BackRoom, Packed, Rows

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
        self.ways = bits(PRODUCTS if machine().pairs else ["widen"])
        self._team = Team(threads)
        self._key: Any = None
        self._rows: list[Rows] = []
        self._packed: Packed | None = None
        self._back_key: Any = None
        self._back: BackRoom | None = None
        self._busy = False

    def prepare(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int, *,
                plain: bool = True, backward: bool = False) -> None:
        """Compile the kernels, or load them; see `Backend.prepare`. Local."""
        score = Score(1.0) if plain else Score(1.0, softcap=1.0)
        for some in (1,) if backward or not plain else (1, 2):                # an odd dim has no pairs
            x, none = np.zeros((1, 1, some), dtype), np.zeros(1, np.int64)
            if backward:
                self._prepare_backward(x, none, score, accumulator)
                continue
            block = self._block(accumulator, x, x, x, none, none + 1, score)
            state, key = State.empty(1, 1, some, accumulator), _key(block)
            rows, packed = Rows(*key), Packed(*key).reserve(1, 1)
            compile_for(pack_tiles, block.k, block.v, 0, 1, 0, 1, packed)
            sums = state.acc, state.row_max, state.row_sum
            compile_for(fold_keys, sums, block.q, block.k, block.v, block.begin,
                        block.end, block.scale, block.shape(rows.traits), (0, 1, 0, 1), (0, 0, 1, True, True), packed,
                        True, rows.work)

    def _prepare_backward(self, x: Array, none: Integers, score: Score, kind: np.dtype[Any]) -> None:
        block, room, slope = Block(kind, x, x, x, none, none + 1, score), BackRoom(1, 1, kind, 1), kind.type(1)
        packed, sums, mine = room.reserve(1, 1), room.reserve_sums(1, room.tile + ROWS), room.threads[0]
        one, many = np.zeros((1, 1), kind), np.zeros((1, 1, 1), kind)
        compile_for(pack_twice, block.k, block.v, 0, 1, 0, 1, packed)
        compile_for(differentiate_keys, (block.q, one, one, many), block.q, block.begin, block.end, block.scale,
                    block.shape(mine.traits), (0, 1, 0, 1), (0, 0, 1), packed, tuple(y[0] for y in sums), slope,
                    mine.work)
        compile_for(add_sums, many, many, *sums, slope, 0, 0, 1, 0, np.zeros((1, 2), np.int64))

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Fold one block of K and V into the running softmax; see `Backend.accumulate`. Local."""
        def steps() -> Generator[int, None, None]:
            block = self._block(state.acc.dtype, q, k, v, begin, end, score)
            packed = self._reserve(block)
            way = self._few_rows if block.rows <= packed.rows else self._many_rows
            return way(state, block, packed)

        yield from self._run(steps, begin, end, q.shape[1])

    def backward(self, gradient: Gradient, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], dk: NDArray[Any],
                 dv: NDArray[Any], begin: Integers, end: Integers, score: Score) -> Iterator[int]:
        """Add to the gradients what one block of K and V gives; see `Backend.backward`. Local."""
        def steps() -> Generator[int, None, None]:
            kind = gradient.dq.dtype
            block = Block(kind, q, k, v, begin, end, score)
            key = q.shape[2], v.shape[2], kind
            if self._back is None or self._back_key != key:
                self._back = None                         # the old memory goes before the new comes
                self._back, self._back_key = BackRoom(*key, self.threads), key
            arrays = plain(gradient.dout), plain(gradient.lse), plain(gradient.delta), gradient.dq
            return Backward(self._team, self._back, block, Limits(PACKED_BYTES, STEP_FLOP), arrays,
                            kind.type(score.scale), dk, dv).run()

        yield from self._run(steps, begin, end, q.shape[1])

    def _run(self, begin_loop: Callable[[], Generator[int, None, None]], begin: Integers, end: Integers,
             heads: int) -> Iterator[int]:
        """Do the steps of a loop, one loop at a time; from rows × keys of all heads to pairs."""
        if not (end > begin).any():
            return
        if self._busy:
            raise BackendError("backend numba: the loop over an earlier block has not ended; finish or close it first")
        self._team.check()
        self._busy = True
        try:
            area = counted = 0
            with closing(begin_loop()) as steps:
                for done in steps:
                    area += done
                    yield area // heads - counted
                    counted = area // heads
        finally:
            self._busy = False

    def _block(self, kind: np.dtype[Any], q: Array, k: Array, v: Array, begin: Integers, end: Integers,
               score: Score) -> Block:
        """Give a block for the forward pass: its scale is positive, for maxima of products; the sign goes to q."""
        if score.scale < 0:
            q, score = -q, replace(score, scale=-score.scale)
        pairs = self.products == "pairs" and score.plain and q.dtype == BFLOAT16 and kind == np.float32
        return Block(kind, q, k, v, begin, end, score, pairs and q.shape[2] % 2 == 0)

    def _reserve(self, block: Block) -> Packed:
        """Make the work space for blocks like this one, unless the last one was."""
        key = _key(block)
        if self._packed is None or self._key != key:
            self._rows, self._packed = [], None       # the old memory goes before the new comes
            self._rows, self._packed = [Rows(*key) for _ in range(self.threads)], Packed(*key)
            self._key = key
        return self._packed

    def _many_rows(self, state: State, block: Block, packed: Packed) -> Generator[int, None, None]:
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
            areas = block.areas(start, stop, height).tolist()
            step = _step(block, min(height, block.rows), packed)
            yield from self._team.run([
                self._fold(block, state, (head, 1, i * height, min(height, block.rows - i * height)),
                           range(start, stop, step), stop, area, arrays)
                for head in range(block.heads) for i, area in enumerate(areas) if area])

    def _few_rows(self, state: State, block: Block, packed: Packed) -> Generator[int, None, None]:
        """Split the keys, pack each tile where it is used, merge."""
        tiles = -(-(block.last - block.first) // packed.tile)
        together = min(block.heads, packed.rows // (-(-block.rows // ROWS) * ROWS))       # heads of a task
        count = min(-(-TASKS * self.threads * together // block.heads), -(-tiles // TASKS))
        edges = [block.first + i * tiles // count * packed.tile for i in range(count)] + [block.last]
        step = min(_step(block, block.rows * together, packed),
                   max(1, STEP_BYTES // (packed.tile_bytes * together)) * packed.tile)
        parts = State(*(np.empty((count, *x.shape), x.dtype) for x in (state.acc, state.row_max, state.row_sum)))
        parts.reset()
        tasks = []
        for i, (start, stop) in enumerate(itertools.pairwise(edges)):
            area = int(block.areas(start, stop, block.rows)[0])
            part = State(parts.acc[i], parts.row_max[i], parts.row_sum[i]) if count > 1 else state
            for head in range(0, block.heads if area else 0, together):
                heads = min(together, block.heads - head)
                tasks.append(self._fold(block, part, (head, heads, 0, block.rows), range(start, stop, step), stop,
                                        area * heads, None))
        yield from self._team.run(tasks)
        if count > 1:
            combine(state, parts)

    def _pack(self, block: Block, start: int, stop: int, first: int, last: int, packed: tuple[Any, ...]) -> Task:
        return Task(last - first, [(lambda thread: pack_tiles(block.k, block.v, start, stop, first, last, packed), 0)])

    def _fold(self, block: Block, state: State, rows: tuple[int, int, int, int], starts: range, stop: int, area: int,
              packed: tuple[Any, ...] | None) -> Task:
        """Fold columns starts[0]..stop into rows (head, heads, first, count), step by step; `area` is seen."""
        def call(thread: int, start: int) -> None:
            mine = self._rows[thread]
            columns = starts[0], start, min(start + starts.step, stop), start == starts[0], start == starts[-1]
            fold_keys((state.acc, state.row_max, state.row_sum), block.q, block.k, block.v, block.begin, block.end,
                      block.scale, block.shape(mine.traits), rows, columns,
                      packed or mine.private, packed is None, mine.work)

        count = len(starts)
        shares = [area * (i + 1) // count - area * i // count for i in range(count)]      # about what each step sees
        return Task(area, [(partial(call, start=start), share) for start, share in zip(starts, shares, strict=True)])

    def release(self) -> None:
        """Give the work space back. Local."""
        self._rows = []
        self._key = self._packed = None
        self._back_key = self._back = None

    def close(self) -> None:
        """End the threads, and give the work space back. Local."""
        self.release()
        self._team.close()


def _key(block: Block) -> tuple[int, int, np.dtype[Any], bool]:
    """Give what the work space depends on: numbers or pairs of a key, of a value, their dtype, whether pairs."""
    return block.k.shape[2], block.v.shape[2], block.kind, block.k.dtype == np.uint32


def _step(block: Block, rows: int, packed: Packed) -> int:
    """Columns that `rows` rows take about STEP_FLOP for, in whole tiles."""
    return max(1, int(STEP_FLOP * speed(block.kind) / (2 * rows * packed.tile * block.numbers))) * packed.tile
