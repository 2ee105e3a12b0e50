"""Canonical order: blocks that begin at multiples of a tile, and what a rank's keys meet in such blocks of queries.

Sums of fixed tiles in a fixed order have the same bits on any number of ranks; see `Backend.accumulate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .intervals import Interval
from .layout import Contiguous, Integers
from .mask import Mask
from .parts import Part
from .schedules.base import Route, Work
from .schedules.grid import Grid
from .schedules.head_exchange import Tokens
from .schedules.token_exchange import Move
from .score import Score


class Tiled(Contiguous):
    """Blocks that begin at multiples of a tile, as equal as whole tiles allow, in an order of the ranks.

    Parameters
    ----------
    length : int
        Tokens in all.
    tile : int
    ranks : sequence of int
        In the order of their blocks.
    """

    name = "tiled"

    def __init__(self, length: int, tile: int, ranks: Sequence[int]) -> None:
        tiles = -(-length // tile)
        edges = [min(tiles * number // len(ranks) * tile, length) for number in range(len(ranks) + 1)]
        places = [ranks.index(rank) for rank in range(len(ranks))]
        super().__init__([edges[place + 1] - edges[place] for place in places])
        self.starts = tuple(edges[place] for place in places)

    @classmethod
    def on(cls, grid: Grid, rank: int, length: int, tile: int) -> Tiled:
        """Give blocks in the order in which ranks that share keys are numbered, as one that shares none. Local."""
        members = grid.group("keys", rank).ranks
        return cls(length, tile, [other for member in members for other in grid.group("heads", member).ranks])

    def describe(self) -> str:
        """Say what the layout is; see `Layout.describe`. Local."""
        return f"{super().describe()}, from {self.starts}"


class Task(NamedTuple):
    """What a backend has to do: an element of the batch, rows of a block of queries, and what they see of some keys."""

    element: int
    rows: slice
    columns: slice
    begin: Integers
    end: Integers
    score: Score


@dataclass
class KeyPlan:
    """What the keys of this rank meet in the second half of a backward pass: blocks of queries in ascending order.

    Attributes
    ----------
    mask : Mask
    lengths : (int, int)
        Queries and keys in all.
    tile : int
    sources : list of Part
        For each rank that shares keys, the queries of its block.
    parts : list of Part
        Of the keys that this rank computes with.
    shapes : list
        For each rank that shares keys, the shapes of lse, delta, q and dout of its block.
    q_tokens, kv_tokens : Tokens
        Of the ranks that share heads: of the queries in blocks, and of the keys where they are.
    heads : slice
        Of the queries, those that this rank computes with.
    score : Score
        Still without the positions of queries and keys, and without dropout keys.
    keys, queries : Move
        From the caller's layouts into blocks.
    bias_tokens, of_heads : Tokens
        Of the ranks that share heads, of a bias of the keys where they are, and of its gradient for each head.
    route : Route
        Which rank that shares keys computes with which block of queries; agreed on once the plans are made.
    """

    mask: Mask
    lengths: tuple[int, int]
    tile: int
    sources: list[Part]
    parts: list[Part]
    shapes: list[list[tuple[int, ...]]]
    q_tokens: Tokens
    kv_tokens: Tokens
    heads: slice
    score: Score
    keys: Move
    queries: Move
    bias_tokens: Tokens
    of_heads: Tokens
    route: Route = field(init=False)
    _prefetched: tuple[int, list[list[Interval]]] = (-1, [])

    @property
    def batch(self) -> int:
        """Elements of the batch."""
        return self.shapes[0][0][0]

    @property
    def pairs(self) -> int:
        """Visible query-key pairs of this rank's keys, all batches."""
        return self.batch * int(self._pairs.sum())

    @property
    def needs(self) -> NDArray[np.bool_]:
        """Which of the blocks that come by see any key of this rank."""
        needs: NDArray[np.bool_] = self._pairs > 0
        return needs

    @cached_property
    def _pairs(self) -> Integers:
        """Visible pairs of each block with the keys."""
        return np.array([sum(int((end - begin).sum()) for intervals in self._columns(source)
                             for begin, end in intervals) for source in range(len(self.sources))], np.int64)

    def prefetch_columns(self, source: int | None) -> None:
        """Have the columns that the next block sees ready. Local."""
        if source is not None and self._prefetched[0] != source:
            self._prefetched = source, self._columns(source)

    def tasks(self, work: Work, dropout_keys: NDArray[np.uint32]) -> Iterator[Task]:
        """Give what a backend has to do with a block of queries that came by. Local.

        A key meets the queries in ascending order, in whichever interval they see it.

        Parameters
        ----------
        work : Work
        dropout_keys : uint32 array of shape (batch, all heads)
        """
        source = work.source
        seen = self._prefetched[1] if self._prefetched[0] == source else self._columns(source)
        score = self.score
        if score.positional:
            score = replace(score, queries=self.mask.positions(self._queries(source), *self.lengths))
        for part, intervals in zip(self.parts, seen, strict=True):
            of_part = score.of_keys(part.positions()) if score.positional else score
            for rows in self._cuts(intervals):
                of_rows = replace(of_part, queries=of_part.queries[rows]) if score.positional else score
                for begin, end in intervals:
                    for number in range(self.batch):
                        yield Task(number, rows, part.columns, begin[rows], end[rows],
                                   of_rows.of_dropout_keys(dropout_keys[number, self.heads]))

    def _cuts(self, intervals: Sequence[Interval]) -> list[slice]:
        """Cut the queries of a block tile by tile if a key may be in several of their intervals."""
        count = len(intervals[0][0])
        some = [(begin[end > begin], end[end > begin]) for begin, end in intervals]
        reach = sorted((begin.min(), end.max()) for begin, end in some if len(begin))
        apart = all(first[1] <= second[0] for first, second in itertools.pairwise(reach))
        step = max(1, count) if apart else self.tile
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def _queries(self, source: int) -> Integers:
        """Give the positions of the queries of a block."""
        return self.sources[source].positions()

    def _columns(self, source: int) -> list[list[Interval]]:
        """Give, for each part of the keys, the columns of it that the queries of a block see in each interval."""
        bounds = self.mask.bounds(self._queries(source), *self.lengths)
        return [[(part.count_below(low), part.count_below(high)) for low, high in bounds] for part in self.parts]
