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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...softmax import State
from ..team import Task, Team
from .arguments import KernelArguments
from .compiled import combine_rows, forward_keys, pack_forward
from .product import ROWS
from .steps import TASKS, Limits, speed, uncounted_task
from .tuples import ColumnRange, ForwardTiles, RowRange, StateArrays, forward_numbers, ranges_of
from .workspace import PackedKV

Array = NDArray[Any]


def heads_together(block: KernelArguments, packed: PackedKV) -> int:
    """Give how many key heads of a block of few rows one task has. Local."""
    most: int = packed.rows // (-(-block.rows // ROWS) * ROWS)
    heads: int = block.heads
    return min(heads, most)


def most_columns(packed: PackedKV, heads: int, limits: Limits) -> int:
    """Give the columns, in whole tiles, whose bytes a step may read. Local."""
    return max(1, limits.step_bytes // (packed.tile_bytes * heads)) * packed.tile


class Piece(NamedTuple):
    """What a thread does of a block before it looks for more.

    Attributes
    ----------
    cost : int
        What all of it sees.
    part : int
        Of the states, where the keys are split.
    steps : list of (array, int)
        What `forward_keys` takes, and about what it sees.
    """

    cost: int
    part: int
    steps: list[tuple[NDArray[np.int64], int]]


class Round(NamedTuple):
    """Columns start..stop of a block: the tiles to pack, as `pack_forward` counts them, and what then is done.

    There are none to pack if each thread packs the heads that it has by itself.
    """

    start: int
    stop: int
    tiles: int
    packs: list[tuple[int, int]]
    pieces: list[Piece]


@dataclass
class Forward:
    """The loop of `Backend.accumulate` over one block."""

    team: Team
    packed: PackedKV
    scratch: list[Any]                  # of each thread: a ForwardScratch
    block: KernelArguments
    limits: Limits
    state: State
    canonical: bool
    cuts: dict[Any, Any]                # those of what the queries see; see `Seen`
    rows_together = ROWS                # a task has a multiple of them
    speed = 1.0                         # beside that of the vector units

    def run(self) -> Generator[int, None, None]:
        """Fold the block into the state; yields rows × keys done since the last yield."""
        block, packed = self.block, self.packed
        few = self._is_few()
        key = (type(self), self.canonical, few, self.team.size, block.heads, block.group, block.numbers,
               block.arrays.k.shape[0], block.acc_dtype, packed.rows, packed.tile, packed.tile_bytes, *self.limits)
        if key not in self.cuts:
            self.cuts[key] = self._cut_keys() if few else self._cut_rows()
        return self._few_rows(*self.cuts[key]) if few else self._many_rows(self.cuts[key])

    def _is_few(self) -> bool:
        """Whether a packed tile would be used once."""
        return bool(self.block.rows <= self.packed.rows) and not self.canonical

    def _cut_rows(self) -> list[Round]:
        """Cut the rows, and the keys into what the buffer holds."""
        block = self.block
        packed = self.packed
        tile = self.packed.tile
        # Tiles of rows: as high as the work space, but enough of them for all threads; a thread alone needs but one.
        least = TASKS * self.team.size if self.team.size > 1 else 1
        count = max(-(-block.rows // packed.rows), -(-least // block.heads))
        height = -(-block.rows // (count * self.rows_together)) * self.rows_together
        step = self._step(min(height, block.rows))

        first, last = block.in_tiles(tile) if self.canonical else (block.first, block.last)
        keys_per_piece = max(1, self.limits.packed_bytes // (block.heads * packed.tile_bytes)) * tile
        rounds: list[Round] = []
        tiles = -(-(last - first) // tile)
        if self._heads_apart(tiles, last - first):
            return [Round(first, last, tiles, [], self._pieces(first, last, height, step, apart=True))]
        for start in range(first, last, keys_per_piece):
            stop = min(start + keys_per_piece, last)
            tiles = -(-(stop - start) // tile)
            parts = max(least, TASKS * block.heads * tiles * packed.tile_bytes // self.limits.step_bytes)
            pieces = self._pieces(start, stop, height, step)
            rounds.append(Round(start, stop, tiles, block.slots(start, stop, tile, parts), pieces))
        return rounds

    def _many_rows(self, rounds: list[Round]) -> Generator[int, None, None]:
        """Pack tiles for all, then fold them into tiles of rows."""
        block = self.block
        state = StateArrays(self.state.acc, self.state.row_max, self.state.row_sum)
        for each in rounds:
            tiles: ForwardTiles | int = each.tiles
            if each.packs:
                tiles = self.packed.reserve(block.heads, each.tiles)
                yield from self.team.run([uncounted_task(partial(self._pack, each.start, each.stop, a, b, tiles))
                                          for a, b in each.packs])
            yield from self.team.run([self._task(state, piece, tiles) for piece in each.pieces])

    def _cut_keys(self) -> tuple[int, list[Piece]]:
        """Split the keys; give the number of states that takes, and what is done."""
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
        pieces = []
        for i, (start, stop) in enumerate(itertools.pairwise(edges)):
            area = int(block.areas(start, stop, block.rows)[0])
            for head in range(0, block.heads if area else 0, together):
                heads = min(together, block.heads - head)
                pieces.append(self._piece(i, RowRange(head, heads, 0, block.rows), range(start, stop, step),
                                          area * heads, start))
        return count, pieces

    def _few_rows(self, count: int, pieces: list[Piece]) -> Generator[int, None, None]:
        """Pack each tile where it is used, if at all; combine the states, unless there is one alone."""
        whole = self.state.acc, self.state.row_max, self.state.row_sum
        states = [StateArrays(*whole)]
        if count > 1:
            parts = State(*(np.empty((count, *x.shape), x.dtype) for x in whole))
            parts.reset()
            states = [StateArrays(parts.acc[i], parts.row_max[i], parts.row_sum[i]) for i in range(count)]
        yield from self.team.run([self._task(states[piece.part], piece, 0) for piece in pieces])
        if count > 1:
            combine_rows(*whole, parts.acc, parts.row_max, parts.row_sum)

    def _step(self, rows: int) -> int:
        """Columns that `rows` rows take about the operations of a step for, in whole tiles."""
        flop = 2 * rows * self.packed.tile * self.block.numbers
        return max(1, int(self.limits.step_flop * self.speed * speed(self.block.acc_dtype) / flop)) * self.packed.tile

    def _piece(self, part: int, rows: RowRange, starts: range, area: int, origin: int) -> Piece:
        """Make the piece that folds a range of columns into rows, step by step; `area` is seen of them all."""
        count = len(starts)
        columns = [ColumnRange(origin, start, min(start + starts.step, starts.stop), start == starts[0],
                               start == starts[-1]) for start in starts]
        shares = [area * (i + 1) // count - area * i // count for i in range(count)]      # about what each step sees
        return Piece(area, part, [(ranges_of([(rows, step)]), share)
                                  for step, share in zip(columns, shares, strict=True)])

    def _heads_apart(self, tiles: int, columns: int) -> bool:
        """Say whether each thread is to take whole heads, and to pack them where it uses them, in its own cache."""
        block, size = self.block, self.team.size
        return (0 < tiles <= self.packed.cached and block.rows * columns <= self._most_work()
                and (size == 1 or block.heads >= 2 * size))

    def _most_work(self) -> float:
        """Rows × columns of a step."""
        work: float = self.limits.step_flop * self.speed * speed(self.block.acc_dtype) / (2 * self.block.numbers)
        return work

    def _pieces(self, start: int, stop: int, height: int, step: int, apart: bool = False) -> list[Piece]:
        """Cut what the rows see of columns start..stop, `height` rows of a head and `step` columns at a time.

        With `apart`, the pieces are of whole heads, and these are packed there.
        """
        block = self.block
        tile = self.packed.tile
        areas = block.areas(start, stop, height)
        tiles = np.flatnonzero(areas)
        areas = areas[tiles]
        first, last, columns = (x[tiles] for x in block.spans(start, stop, height))
        first = start + (first - start) // tile * tile                   # whole tiles, as they are packed
        last = np.minimum(start - (start - last) // tile * tile, stop)
        rows = np.minimum(height, block.rows - tiles * height)
        if not apart and (columns > step).any():
            steps = step * np.maximum(1, (last - first) // columns)      # there are gaps between intervals
            return [self._piece(0, RowRange(head, 1, i * height, n), range(a, b, wide), area, start)
                    for head in range(block.heads)
                    for i, n, a, b, wide, area in zip(*(x.tolist() for x in (tiles, rows, first, last, steps, areas)),
                                                      strict=True)]
        one = np.ones_like(tiles)
        ranges = np.stack([0 * one, one, tiles * height, rows, start * one, first, last, one, one, 0 * one], axis=1)
        if apart:
            ranges[:1, -1] = stop
        every = np.tile(ranges, (block.heads, 1))
        every[:, 0] = np.repeat(np.arange(block.heads), len(tiles))
        return self._together(every, np.tile(rows * columns, block.heads), np.tile(areas, block.heads),
                              len(tiles) if apart else 1)

    def _together(self, ranges: NDArray[np.int64], work: NDArray[np.int64], areas: NDArray[np.int64], least: int
                  ) -> list[Piece]:
        """Make pieces of one step each, of as many ranges as make no step too long, nor the pieces too few for all.

        Each has a multiple of `least` ranges; `work` is the rows × columns that each takes, `areas` what is seen.
        """
        if not len(ranges):
            return []
        work = np.cumsum(work)
        most = self._most_work()
        if self.team.size > 1:
            most = min(most, int(work[-1]) / (TASKS * self.team.size))
        number = np.repeat((work[least - 1::least] - 1) // max(1, int(most)), least)     # of the piece of each range
        edges = np.flatnonzero(np.diff(number, prepend=-1, append=-2)).tolist()
        return [Piece(cost, 0, [(ranges[a:b], cost)])
                for a, b in itertools.pairwise(edges) for cost in (int(areas[a:b].sum()),)]

    def _pack(self, start: int, stop: int, first: int, last: int, tiles: ForwardTiles, thread: int) -> None:
        pack_forward(self.block.arrays.k, self.block.arrays.v, start, stop, first, last, tiles)

    def _task(self, state: StateArrays, piece: Piece, tiles: ForwardTiles | int) -> Task:
        """Make a task of a piece; `tiles` are those for all, or how many the thread has of its own, 0 for one."""
        return Task(piece.cost, [(partial(self._fold, state, ranges, tiles), share) for ranges, share in piece.steps])

    def _fold(self, state: StateArrays, ranges: NDArray[np.int64], tiles: ForwardTiles | int, thread: int) -> None:
        mine = self.scratch[thread]
        packed: Any = tiles
        if isinstance(tiles, int):
            packed = mine.own(tiles) if tiles else mine.private
        forward_keys(forward_numbers(state, self.block.arrays, packed, mine.work),
                     self.block.score_arguments(mine.row_score), ranges)
