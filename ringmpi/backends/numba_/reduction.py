"""The passes over the weights of a block on a team of threads: sums of columns or rows, the heaviest keys, weights.

Keys are packed a piece at a time. For sums of columns a task is a range of the columns of one query head, and goes
through all rows; for all else it is a range of the rows, and goes through all columns. So nothing is added by two
threads, and no result depends on their number.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...environment import cache_bytes
from ..team import Task, Team
from .arguments import KernelArguments
from .compiled import pack_weight_keys, reduce_keys
from .forward_tile import forward_tile_shape
from .steps import TASKS, Limits, equal_parts, speed, uncounted_task
from .sum_tile import ColumnTarget, WeightTiles, WeightWork
from .tuples import ColumnRange, RowRange
from .workspace import SPARE, aligned, in_vectors, row_score


class WeightScratch:
    """What a thread needs for a tile of rows."""

    def __init__(self, dim: int, acc_dtype: np.dtype[Any], rows: int, tile: int) -> None:
        mass, logs, moment = (aligned(rows + SPARE, acc_dtype) for _ in range(3))
        self.work = WeightWork(
            queries=aligned((rows, dim), acc_dtype), s=aligned((rows, tile), acc_dtype), lse=aligned(rows, acc_dtype),
            low=aligned(rows, np.int64), high=aligned(rows, np.int64), groups=aligned((rows, 4), np.int64),
            columns=aligned(tile, acc_dtype), values=aligned(tile, acc_dtype), mass=mass, logs=logs, moment=moment)
        self.row_score = row_score(rows, acc_dtype)


class WeightMemory:
    """Packed tiles of keys, and what each of `threads` threads works on."""

    def __init__(self, dim: int, acc_dtype: np.dtype[Any], threads: int) -> None:
        self.rows, self.tile = forward_tile_shape(dim, in_vectors(1, acc_dtype), acc_dtype.itemsize, cache_bytes(2))
        self.tile_bytes = self.tile * dim * acc_dtype.itemsize
        self.scratch = [WeightScratch(dim, acc_dtype, self.rows, self.tile) for _ in range(threads)]
        self._keys: NDArray[Any] = np.empty(0, acc_dtype)

    def reserve(self, heads: int, tiles: int) -> WeightTiles:
        """Give tiles for the kernels; the memory grows, and never shrinks."""
        size = heads * tiles * self.tile_bytes // self._keys.itemsize
        if len(self._keys) < size:
            self._keys = aligned(size, self._keys.dtype)
        return WeightTiles(self._keys[:size], self.tile, tiles)


@dataclass
class Reduction:
    """A pass over the weights of one block."""

    team: Team
    memory: WeightMemory
    block: KernelArguments
    limits: Limits
    lse: NDArray[Any]
    target: Any

    def run(self) -> Generator[int, None, None]:
        """Work through the block piece by piece; yields rows × keys done since the last yield."""
        block, memory = self.block, self.memory
        keys_per_piece = max(1, self.limits.packed_bytes // (block.heads * memory.tile_bytes)) * memory.tile
        for start in range(block.first, block.last, keys_per_piece):
            yield from self._piece(start, min(start + keys_per_piece, block.last))

    def _piece(self, start: int, stop: int) -> Generator[int, None, None]:
        """Pack columns start..stop, and go through them with all rows."""
        block, size = self.block, self.team.size
        count = -(-(stop - start) // self.memory.tile)
        tiles = self.memory.reserve(block.heads, count)
        yield from self.team.run([uncounted_task(partial(self._pack, start, stop, a, b, tiles))
                                  for a, b in block.slots(start, stop, self.memory.tile, TASKS * size)])
        cut = self._ranges_of_columns if isinstance(self.target, ColumnTarget) else self._ranges_of_rows
        heads = block.heads * block.group
        tasks = [(each, sum(cost for _, _, cost in each)) for each in cut(start, count, stop, heads)]
        yield from self.team.run([Task(area, self._steps(head, start, each, tiles))
                                  for each, area in tasks if area for head in range(heads)])

    @property
    def _pairs(self) -> int:
        """Rows × columns of a step."""
        return int(self.limits.step_flop * speed(self.block.acc_dtype) / self.block.numbers)

    def _ranges_of_columns(self, start: int, count: int, stop: int, heads: int) -> list[list[tuple[range, range, int]]]:
        """Cut the columns into tasks: for each its steps, as rows, columns and what is seen of them."""
        tile, height = self.memory.tile, self.memory.rows
        parts = max(-(-TASKS * self.team.size // heads), -(-count * tile * height // self._pairs))
        ranges = [range(start + a * tile, min(start + b * tile, stop)) for a, b in equal_parts(count, parts)]
        tall = max(1, self._pairs // (len(ranges[0]) * height)) * height
        return [[self._step(rows, columns) for rows in _cut(self._queries, tall)] for columns in ranges]

    def _ranges_of_rows(self, start: int, count: int, stop: int, heads: int) -> list[list[tuple[range, range, int]]]:
        """Cut the rows into tasks, as `_ranges_of_columns` does the columns."""
        tile, height = self.memory.tile, self.memory.rows
        wide = max(1, self._pairs // (tile * height)) * tile
        columns = [range(start, stop)[i:i + wide] for i in range(0, stop - start, wide)]
        return [[self._step(rows, some) for some in columns] for rows in _cut(self._queries, height)]

    @property
    def _queries(self) -> int:
        return int(self.block.arrays.q.shape[0])

    def _step(self, rows: range, columns: range) -> tuple[range, range, int]:
        begin, end = (np.clip(x[:, rows.start:rows.stop], columns.start, columns.stop)
                      for x in (self.block.arrays.begin, self.block.arrays.end))
        return rows, columns, int(np.maximum(end - begin, 0).sum())

    def _steps(self, head: int, origin: int, steps: list[tuple[range, range, int]], tiles: WeightTiles
               ) -> Iterator[tuple[Any, int]]:
        for rows, columns, cost in steps:
            if cost:
                yield partial(self._reduce, RowRange(head, 1, rows.start, len(rows)),
                              ColumnRange(origin, columns.start, columns.stop), tiles), cost

    def _pack(self, start: int, stop: int, first: int, last: int, tiles: WeightTiles, thread: int) -> None:
        pack_weight_keys(self.block.arrays.k, start, stop, first, last, tiles)

    def _reduce(self, rows: RowRange, columns: ColumnRange, tiles: WeightTiles, thread: int) -> None:
        mine = self.memory.scratch[thread]
        reduce_keys(self.block.arrays, self.block.score_arguments(mine.row_score), self.lse, self.target, rows, columns,
                    tiles, mine.work)


def _cut(count: int, height: int) -> list[range]:
    """Cut so many rows, `height` at a time."""
    return [range(i, min(i + height, count)) for i in range(0, count, height)]
