"""The backward pass of a block on a team of threads.

K and V are packed a piece at a time. A task is one key head × one chunk of the rows: it makes dQ of its rows, and sums
of dK and dV of its own, which are added up, chunk after chunk, at the end of a piece. So nothing is added by two
threads, and the result does not depend on which was faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...layout import Integers
from ..team import Task, Team
from .block import Block, speed
from .fold import add_sums, differentiate_keys, pack_twice
from .product import ROWS
from .workspace import BackRoom

Array = NDArray[Any]
SUMS_BYTES = 2**23          # of sums of dK and dV, for each thread
TASKS = 4                   # for each thread, where they can't be a multiple of the threads


@dataclass
class Limits:
    """Bounds: bytes of packed K and V at a time, floating-point operations between two yields."""

    packed_bytes: int
    step_flop: float


@dataclass
class Backward:
    """The loop of `Backend.backward` over one block."""

    team: Team
    room: BackRoom
    block: Block
    limits: Limits
    gradient: tuple[Array, ...]         # dout, lse, delta, dq
    scale: Any                          # of dQ and dK
    dk: Array
    dv: Array

    def run(self) -> Generator[int, None, None]:
        """Differentiate piece by piece; yields rows × keys done since the last yield."""
        block, tile = self.block, self.room.tile
        chunks = self._chunks()
        tiles = -(-(block.last - block.first) // tile)
        most = max(1, min(self.limits.packed_bytes // (block.heads * self.room.tile_bytes),
                          SUMS_BYTES * self.team.size // (block.heads * chunks * self.room.sums_bytes)))
        size = -(-tiles // -(-tiles // most)) * tile
        for start in range(block.first, block.last, size):
            yield from self._piece(start, min(start + size, block.last), chunks)

    def _chunks(self) -> int:
        """As few chunks of rows as give each thread as much to do."""
        threads, heads = self.team.size, self.block.heads
        most = max(1, min(-(-TASKS * threads // heads), -(-self.block.rows // ROWS)))
        return next((c for c in range(1, most) if c * heads % threads == 0), most)

    def _piece(self, start: int, stop: int, chunks: int) -> Generator[int, None, None]:
        """Differentiate columns start..stop."""
        block, tile, heads = self.block, self.room.tile, self.block.heads
        before = np.append(0, np.cumsum(block.areas(start, stop, ROWS)))
        if not before[-1]:                # between two intervals
            return
        tiles = -(-(stop - start) // tile)
        packed = self.room.reserve(heads, tiles)
        sums = self.room.reserve_sums(heads * chunks, tiles * tile + ROWS)
        slots = _parts(heads * tiles, TASKS * self.team.size)
        yield from self.team.run([_task(partial(self._pack, start, stop, a, b, packed)) for a, b in slots])

        inner = np.searchsorted(before, before[-1] * np.arange(1, chunks) // chunks) * ROWS
        edges = [0, *np.minimum(inner, block.rows).tolist(), block.rows]
        seen = [block.seen(range(a, b), start, stop) for a, b in itertools.pairwise(edges)]
        spans = np.array([columns for _, *columns in seen], np.int64)
        tasks = []
        for head in range(heads):
            for chunk, (area, first, last) in enumerate(seen):
                if area:
                    mine = tuple(x[head * chunks + chunk] for x in sums)
                    rows = range(edges[chunk], edges[chunk + 1])
                    tasks.append(Task(area, self._steps(head, rows, start, first, last, area, packed, mine)))
        yield from self.team.run(tasks)
        yield from self.team.run([
            _task(partial(self._add, head, start, start + a * tile, min(start + b * tile, stop), spans,
                          tuple(x[head * chunks:(head + 1) * chunks] for x in sums)))
            for head in range(heads) for a, b in _parts(tiles, -(-TASKS * self.team.size // heads))])

    def _steps(self, head: int, rows: range, origin: int, first: int, last: int, area: int, packed: tuple[Any, ...],
               sums: tuple[Array, ...]) -> Iterator[tuple[Callable[[int], None], int]]:
        """Differentiate columns first..last of the piece from `origin` on for some rows, step by step."""
        block, tile, height = self.block, self.room.tile, self.room.rows
        yield partial(_clear, first - origin, last - origin, sums), 0
        pairs = self.limits.step_flop * speed(block.kind) / (5 * block.numbers)         # of a step
        tall = height * max(1, int(pairs * len(rows) / (area * height)))                # some tiles of rows, or one ...
        wide = max(1, int(pairs / (height * tile))) * tile if tall == height else last - first + tile   # ... by pieces
        for row in range(rows.start, rows.stop, tall):
            some = range(row, min(row + tall, rows.stop))
            _, low, high = block.seen(some, first, last)
            for start in range(low - (low - origin) % tile, high, wide):
                stop = min(start + wide, high)
                done, _, _ = block.seen(some, start, stop)
                yield partial(self._differentiate, (head, block.group, some.start, len(some)), (origin, start, stop),
                              packed, sums), done

    def _pack(self, start: int, stop: int, first: int, last: int, packed: tuple[Any, ...], thread: int) -> None:
        pack_twice(self.block.k, self.block.v, start, stop, first, last, packed)

    def _differentiate(self, rows: tuple[int, ...], columns: tuple[int, ...], packed: tuple[Any, ...],
                       sums: tuple[Array, ...], thread: int) -> None:
        block, mine = self.block, self.room.threads[thread]
        differentiate_keys(self.gradient, block.q, block.begin, block.end, block.scale, block.shape(mine.traits), rows,
                           columns, packed, sums, self.scale, mine.work)

    def _add(self, head: int, origin: int, start: int, stop: int, spans: Integers, sums: tuple[Array, ...],
             thread: int) -> None:
        add_sums(self.dk, self.dv, *sums, self.scale, head, start, stop, origin, spans)


def _task(call: Callable[[int], None]) -> Task:
    """Give a task of one step whose pairs do not count."""
    return Task(0, [(call, 0)])


def _clear(start: int, stop: int, sums: tuple[Array, ...], thread: int) -> None:
    for x in sums:
        x[start:stop] = 0


def _parts(count: int, most: int) -> list[tuple[int, int]]:
    """Cut a number of things into parts, as equal as can be."""
    edges = np.linspace(0, count, min(count, most) + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))
