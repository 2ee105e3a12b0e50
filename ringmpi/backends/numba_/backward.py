"""The backward pass of a block on a team of threads.

K and V are packed a piece at a time. A task is one key head × one chunk of the rows: it makes dQ of its rows, and sums
of dK and dV of its own, which are added up, chunk after chunk, at the end of a piece. So nothing is added by two
threads, and the result does not depend on which was faster.

In canonical order there are no chunks of a sum. dQ is made in one pass, whose tasks are chunks of the rows. dK and dV
are made in another, whose tasks are ranges of the keys: each takes up the sums of its keys and goes through all rows,
tile after tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...layout import Integers
from ..team import Task, Team
from .arguments import KernelArguments
from .compiled import add_sums, backward_keys, backward_on_tiles, pack_backward, pack_tiles_backward
from .product import ROWS
from .relative_arguments import RelativeSums
from .steps import PIECES_SPEED, TASKS, TILE_SPEED, Limits, equal_parts, speed, uncounted_task
from .tile_workspace import TileBackwardBuffers
from .tuples import BackwardTiles, ColumnRange, GradientArrays, GradientTiles, KeySums, RowRange, TileScore
from .workspace import BackwardBuffers

Tiles = BackwardTiles | GradientTiles
Array = Any
SUMS_BYTES = 2**23          # of sums of dK and dV, for each thread


@dataclass
class Backward:
    """The loop of `Backend.backward` over one block."""

    team: Team
    buffers: BackwardBuffers | TileBackwardBuffers
    block: KernelArguments
    limits: Limits
    gradient: GradientArrays
    dk: Any                    # arrays, or None
    dv: Any
    canonical: bool
    on_tiles: TileScore | None = None        # the score, where the CPU's tiles multiply; then so are the buffers
    dkey_bias: Any = None      # array, or None
    drelative: Any = None      # arrays, or None

    def run(self) -> Generator[int, None, None]:
        """Work through the block piece by piece; yields rows × keys done since the last yield."""
        block = self.block
        buffers = self.buffers
        tile = self.buffers.tile
        chunks = self._chunks()
        sums = 1 if self.canonical else chunks             # of a key
        first, last = block.in_tiles(tile) if self.canonical else (block.first, block.last)
        tiles = -(-(last - first) // tile)
        most = max(1, min(self.limits.packed_bytes // (block.heads * buffers.tile_bytes),
                          SUMS_BYTES * self.team.size // (block.heads * sums * buffers.sums_bytes)))
        keys_per_piece = -(-tiles // -(-tiles // most)) * tile
        for start in range(first, last, keys_per_piece):
            yield from self._piece(start, min(start + keys_per_piece, last), chunks)

    def _chunks(self) -> int:
        """As few chunks of rows as give each thread as much to do."""
        threads = self.team.size
        heads = self.block.heads
        most = max(1, min(-(-TASKS * threads // heads), -(-self.block.rows // ROWS)))
        return next((c for c in range(1, most) if c * heads % threads == 0), most)

    def _piece(self, start: int, stop: int, chunks: int) -> Generator[int, None, None]:
        """Do the backward pass of columns start..stop."""
        block = self.block
        tile = self.buffers.tile
        heads = self.block.heads
        before = np.append(0, np.cumsum(block.areas(start, stop, ROWS)))
        if not before[-1]:                # between two intervals
            return

        # Pack the tiles.
        count = -(-(stop - start) // tile)
        tiles = self.buffers.reserve(heads, count)
        yield from self.team.run([uncounted_task(partial(self._pack, start, stop, a, b, tiles))
                                  for a, b in block.slots(start, stop, tile, TASKS * self.team.size)])

        # Ranges of columns, with all rows.
        ranges = [ColumnRange(start, start + a * tile, min(start + b * tile, stop))
                  for a, b in equal_parts(count, -(-TASKS * self.team.size // heads))]
        if self.gradient.of_keys and not self.gradient.of_queries:
            yield from self._columns(ranges, tiles, self.buffers.reserve_sums(heads, count * tile + ROWS))
            return
        if not self.gradient.of_queries:
            yield from self._tables([ColumnRange(start, first, min(first + tile, stop))
                                     for first in range(start, stop, tile)], tiles)
            return

        # Chunks of rows that see about as much.
        inner = np.searchsorted(before, before[-1] * np.arange(1, chunks) // chunks) * ROWS
        edges = [0, *np.minimum(inner, block.rows).tolist(), block.rows]
        yield from self._rows([range(a, b) for a, b in itertools.pairwise(edges)], ranges, tiles)

    def _rows(self, chunks: list[range], ranges: list[ColumnRange], tiles: Tiles
              ) -> Generator[int, None, None]:
        """Differentiate all columns, with a task for each key head × chunk of rows."""
        block = self.block
        heads = self.block.heads
        start, stop = ranges[0].start, ranges[-1].stop
        seen = [block.seen(rows, start, stop) for rows in chunks]
        keys = self.buffers.tile * tiles.tiles + ROWS if self.gradient.of_keys else 0
        sums = self.buffers.reserve_sums(heads * len(chunks), keys)
        biases = self._bias_sums(heads * len(chunks), self.buffers.tile * tiles.tiles + ROWS)
        of_relative = [self._relative_sums() for _ in range(heads * len(chunks))]
        yield from self.team.run([
            Task(area, itertools.chain(
                [(partial(_clear, first - start, last - start, mine), 0)],
                self._steps(head, rows, ColumnRange(start, first, last), area, tiles, mine, bias, away)))
            for head in range(heads)
            for chunk, (rows, (area, first, last)) in enumerate(zip(chunks, seen, strict=True)) if area
            for mine in [KeySums(*(x[head * len(chunks) + chunk] for x in sums))]
            for bias in [None if biases is None else biases[head * len(chunks) + chunk]]
            for away in [of_relative[head * len(chunks) + chunk]]])
        for number, away in enumerate(of_relative):
            self._add_relative(number // len(chunks), away)
        if not self.gradient.of_keys:
            return
        if biases is not None and self.dkey_bias is not None:
            self._add_bias(start, stop, biases.reshape(heads, len(chunks), *biases.shape[1:]))

        # Add up the chunks' sums, in their order.
        spans = np.array([columns for _, *columns in seen], np.int64)
        yield from self.team.run([
            uncounted_task(partial(self._add, head, columns, spans,
                                   KeySums(*(x[head * len(chunks):(head + 1) * len(chunks)] for x in sums))))
            for head in range(heads) for columns in ranges])

    def _bias_sums(self, count: int, keys: int) -> Array | None:
        """Give cleared sums of the gradient of a bias, (count, heads of a group or 1, keys), if there is one.

        The kernels sum that up, be it wanted or not.
        """
        if not self.block.biased:
            return None
        apart = self.dkey_bias is not None and self.dkey_bias.shape[1] > 1
        return np.zeros((count, self.block.group if apart else 1, keys), self.block.acc_dtype)

    def _relative_sums(self) -> RelativeSums | None:
        """Give sums of the gradient of a bias by distance, if there is one: the kernels sum that up, wanted or not."""
        relative = self.block.relative
        return None if relative is None else RelativeSums(relative, self.block.group, self.block.acc_dtype)

    def _add_relative(self, head: int, away: RelativeSums | None) -> None:
        """Add sums of the gradient of a bias by distance, of the query heads of a key head, if they are wanted."""
        if away is not None and self.drelative is not None:
            away.add_to(self.drelative, slice(head * self.block.group, (head + 1) * self.block.group))

    def _add_bias(self, start: int, stop: int, sums: Array) -> None:
        """Add up the sums of the chunks, (key heads, chunks, heads of a group or 1, keys), and those of all heads."""
        of_heads = sums[..., :stop - start].sum(axis=1).reshape(-1, stop - start)
        self.dkey_bias[start:stop] += (of_heads if self.dkey_bias.shape[1] > 1 else of_heads.sum(axis=0)[None]).T

    def _columns(self, ranges: list[ColumnRange], tiles: Tiles, sums: KeySums) -> Generator[int, None, None]:
        """Differentiate all rows, with a task for each key head × range of columns."""
        rows = range(self.block.rows)
        tasks = []
        for columns in ranges:
            area, _, _ = self.block.seen(rows, columns.start, columns.stop)
            for head in range(self.block.heads if area else 0):
                mine = KeySums(*(x[head] for x in sums))
                bias = self._bias_of(head, columns)
                tasks.append(Task(area, itertools.chain(
                    [(partial(self._take_up, head, columns, mine), 0)],
                    self._steps(head, rows, columns, area, tiles, mine, bias, self._relative_sums()),
                    [(partial(self._put_back, head, columns, mine, bias), 0)])))
        yield from self.team.run(tasks)

    def _tables(self, columns: list[ColumnRange], tiles: Tiles) -> Generator[int, None, None]:
        """Sum up the gradient of a bias by distance alone: of each tile of columns with all rows, in their order."""
        rows, heads = range(self.block.rows), range(self.block.heads)
        discarded = self._bias_sums(1, columns[-1].stop - columns[0].origin + self.buffers.tile + ROWS)
        bias = None if discarded is None else discarded[0]
        none = KeySums(*(x[0] for x in self.buffers.reserve_sums(1, 0)))
        some = -(-TASKS * self.team.size // len(heads))
        for first in range(0, len(columns), some):
            sums = [(head, these, area, self._relative_sums()) for these in columns[first:first + some]
                    for area in [self.block.seen(rows, these.start, these.stop)[0]] if area for head in heads]
            yield from self.team.run([Task(area, self._steps(head, rows, these, area, tiles, none, bias, away))
                                      for head, these, area, away in sums])
            for head, _, _, away in sums:
                self._add_relative(head, away)

    def _steps(self, head: int, rows: range, columns: ColumnRange, area: int, tiles: Tiles,
               sums: KeySums, bias: Array | None = None, away: RelativeSums | None = None
               ) -> Iterator[tuple[Callable[[int], None], int]]:
        """Do the backward pass of some columns for some rows, step by step; `area` is seen of them all."""
        block = self.block
        tile = self.buffers.tile
        height = self.buffers.rows
        origin, first, last = columns.origin, columns.start, columns.stop

        # A step is some tiles of rows, or one tile of rows and some of its columns.
        pairs = self.limits.step_flop * speed(block.acc_dtype) / (5 * block.numbers)
        if isinstance(self.buffers, TileBackwardBuffers):
            pairs *= TILE_SPEED if len(self.buffers.pieces) == 1 else PIECES_SPEED
        tall = height * max(1, int(pairs * len(rows) / (area * height)))
        for row in range(rows.start, rows.stop, tall):
            some = range(row, min(row + tall, rows.stop))
            here, low, high = block.seen(some, first, last)
            wide = last - first + tile
            if tall == height and here:
                wide = max(1, int(pairs * (high - low) / (here * tile))) * tile
            starts = range(low - (low - origin) % tile, high, wide)
            for start in starts:
                stop = min(start + wide, high)
                done = here if len(starts) == 1 else block.seen(some, start, stop)[0]
                yield partial(self._differentiate, RowRange(head, 1, some.start, len(some)),
                              ColumnRange(origin, start, stop), tiles, sums, bias, away), done

    def _pack(self, start: int, stop: int, first: int, last: int, tiles: Tiles, thread: int) -> None:
        pack = pack_backward if self.on_tiles is None else pack_tiles_backward
        pack(self.block.arrays.k, self.block.arrays.v, start, stop, first, last, tiles)

    def _differentiate(self, rows: RowRange, columns: ColumnRange, tiles: Tiles, sums: KeySums, bias: Array | None,
                       away: RelativeSums | None, thread: int) -> None:
        if isinstance(self.buffers, TileBackwardBuffers):
            backward_on_tiles(self.gradient, self.block.arrays, self.on_tiles, rows, columns, tiles, sums,
                              self.buffers.scratch[thread], self.buffers.spare(thread, self.block))
            return
        mine = self.buffers.scratch[thread]
        backward_keys(self.gradient, self.block.arrays, self.block.score_arguments(mine.row_score, bias, away), rows,
                      columns, tiles, sums, mine.work)

    def _add(self, head: int, columns: ColumnRange, spans: Integers, sums: KeySums, thread: int) -> None:
        add_sums(self.dk, self.dv, sums, head, columns, spans)

    def _take_up(self, head: int, columns: ColumnRange, sums: KeySums, thread: int) -> None:
        """Set the sums of some keys to what there is of dk and dv."""
        for x, total in zip((self.dk, self.dv), sums, strict=True):
            mine = total[columns.start - columns.origin:columns.stop - columns.origin]
            mine[:, :x.shape[2]] = x[columns.start:columns.stop, head]
            mine[:, x.shape[2]:] = 0

    def _bias_of(self, head: int, columns: ColumnRange) -> Array | None:
        """Give sums of the gradient of a bias that go on from what there is, for some keys and the heads of a group."""
        if not self.block.biased:
            return None
        group, there = self.block.group, slice(columns.start - columns.origin, columns.stop - columns.origin)
        sums = np.zeros((group, there.stop + self.buffers.tile), self.block.acc_dtype)
        if self.dkey_bias is not None:
            sums[:, there] = self.dkey_bias[columns.start:columns.stop, head * group:(head + 1) * group].T
        return sums

    def _put_back(self, head: int, columns: ColumnRange, sums: KeySums, bias: Array | None, thread: int) -> None:
        if bias is not None and self.dkey_bias is not None:
            group, there = self.block.group, slice(columns.start - columns.origin, columns.stop - columns.origin)
            self.dkey_bias[columns.start:columns.stop, head * group:(head + 1) * group] = bias[:, there].T + 0
        for x, total in zip((self.dk, self.dv), sums, strict=True):
            mine = total[columns.start - columns.origin:columns.stop - columns.origin]
            np.add(mine[:, :x.shape[2]], 0, out=x[columns.start:columns.stop, head])        # no -0


def _clear(start: int, stop: int, sums: KeySums, thread: int) -> None:
    for x in sums:
        x[start:stop] = 0
