"""The forward pass of a block on a team of threads.

Two ways through a block, after what there is to reuse:

* *Many rows.* K and V are packed once, in parallel, as many tiles at a time as the buffer holds; then each task is a
  tile of rows of one key head × all packed keys.
* *Few rows* (decoding). A packed tile would be used once, so each task packs it in its own cache, or reads keys as they
  came: a range of keys of one key head × all rows, into a state of its own; the states are merged at the end.

A row is a query and a head: the heads of a group share the packed keys.

In canonical order every block goes the way of many rows, and its tiles begin at multiples of their keys: what is done
to a row then depends on nothing but the row and its keys, one tile after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...softmax import State, combine
from ..team import Task, Team
from .arguments import KernelArguments
from .compiled import forward_keys, pack_forward
from .product import ROWS
from .steps import TASKS, Limits, equal_parts, speed, uncounted_task
from .tuples import ColumnRange, ForwardTiles, RowRange, StateArrays, forward_numbers
from .workspace import ForwardScratch, PackedKV

Array = NDArray[Any]


def heads_together(block: KernelArguments, packed: PackedKV) -> int:
    """Give how many key heads of a block of few rows one task has. Local."""
    most: int = packed.rows // (-(-block.rows // ROWS) * ROWS)
    heads: int = block.heads
    return min(heads, most)


def most_columns(packed: PackedKV, heads: int, limits: Limits) -> int:
    """Give the columns, in whole tiles, whose bytes a step may read. Local."""
    return max(1, limits.step_bytes // (packed.tile_bytes * heads)) * packed.tile


@dataclass
class Forward:
    """The loop of `Backend.accumulate` over one block."""

    team: Team
    packed: PackedKV
    scratch: list[ForwardScratch]       # of each thread
    block: KernelArguments
    limits: Limits
    state: State
    canonical: bool

    def run(self) -> Generator[int, None, None]:
        """Fold the block into the state; yields rows × keys done since the last yield."""
        few = self.block.rows <= self.packed.rows and not self.canonical
        return self._few_rows() if few else self._many_rows()

    def _many_rows(self) -> Generator[int, None, None]:
        """Pack tiles for all, then fold them into tiles of rows."""
        block = self.block
        packed = self.packed
        tile = self.packed.tile
        # Tiles of rows: as high as the work space, but enough of them for all threads.
        least = TASKS * self.team.size
        count = max(-(-block.rows // packed.rows), -(-least // block.heads))
        height = -(-block.rows // (count * ROWS)) * ROWS
        step = self._step(min(height, block.rows))
        state = StateArrays(self.state.acc, self.state.row_max, self.state.row_sum)

        first, last = block.in_tiles(tile) if self.canonical else (block.first, block.last)
        keys_per_piece = max(1, self.limits.packed_bytes // (block.heads * packed.tile_bytes)) * tile
        for start in range(first, last, keys_per_piece):
            stop = min(start + keys_per_piece, last)
            tiles = packed.reserve(block.heads, -(-(stop - start) // tile))
            yield from self.team.run([uncounted_task(partial(self._pack, start, stop, a, b, tiles))
                                      for a, b in equal_parts(block.heads * tiles.tiles, least)])
            areas = block.areas(start, stop, height).tolist()
            yield from self.team.run([
                self._task(state, RowRange(head, 1, i * height, min(height, block.rows - i * height)),
                           range(start, stop, step), area, tiles)
                for head in range(block.heads) for i, area in enumerate(areas) if area])

    def _few_rows(self) -> Generator[int, None, None]:
        """Split the keys, pack each tile where it is used, combine."""
        block = self.block
        packed = self.packed
        tile = self.packed.tile
        # Ranges of keys, whole tiles: enough for all threads, but some tiles in each; a thread alone needs but one.
        tiles = -(-(block.last - block.first) // tile)
        together = heads_together(block, packed)
        count = 1
        if self.team.size > 1:
            count = min(-(-TASKS * self.team.size * together // block.heads), -(-tiles // TASKS))
        edges = [block.first + i * tiles // count * tile for i in range(count)] + [block.last]
        step = min(self._step(block.rows * together), most_columns(packed, together, self.limits))

        # A state for each range, unless there is one alone.
        whole = self.state.acc, self.state.row_max, self.state.row_sum
        parts = State(*(np.empty((count, *x.shape), x.dtype) for x in whole))
        parts.reset()
        tasks = []
        for i, (start, stop) in enumerate(itertools.pairwise(edges)):
            area = int(block.areas(start, stop, block.rows)[0])
            state = StateArrays(parts.acc[i], parts.row_max[i], parts.row_sum[i]) if count > 1 else StateArrays(*whole)
            for head in range(0, block.heads if area else 0, together):
                heads = min(together, block.heads - head)
                tasks.append(self._task(state, RowRange(head, heads, 0, block.rows), range(start, stop, step),
                                        area * heads))
        yield from self.team.run(tasks)
        if count > 1:
            combine(self.state, parts)

    def _step(self, rows: int) -> int:
        """Columns that `rows` rows take about the operations of a step for, in whole tiles."""
        flop = 2 * rows * self.packed.tile * self.block.numbers
        return max(1, int(self.limits.step_flop * speed(self.block.acc_dtype) / flop)) * self.packed.tile

    def _pack(self, start: int, stop: int, first: int, last: int, tiles: ForwardTiles, thread: int) -> None:
        pack_forward(self.block.arrays.k, self.block.arrays.v, start, stop, first, last, tiles)

    def _task(self, state: StateArrays, rows: RowRange, starts: range, area: int,
              tiles: ForwardTiles | None = None) -> Task:
        """Make a task that folds a range of columns into rows, step by step; `area` is seen of them all."""
        count = len(starts)
        columns = [ColumnRange(starts[0], start, min(start + starts.step, starts.stop), start == starts[0],
                               start == starts[-1]) for start in starts]
        shares = [area * (i + 1) // count - area * i // count for i in range(count)]      # about what each step sees
        return Task(area, [(partial(self._fold, state, rows, step, tiles), share)
                           for step, share in zip(columns, shares, strict=True)])

    def _fold(self, state: StateArrays, rows: RowRange, columns: ColumnRange, tiles: ForwardTiles | None,
              thread: int) -> None:
        mine = self.scratch[thread]
        forward_keys(forward_numbers(state, self.block.arrays, tiles or mine.private, mine.work),
                     self.block.score_arguments(mine.row_score), rows, columns)
