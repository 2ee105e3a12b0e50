"""Canonical order: blocks that begin at multiples of a tile, and what a rank's keys meet in such blocks of queries.

Sums of fixed tiles in a fixed order have the same bits on any number of ranks; see `Backend.accumulate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bounds import Bounds, bounds_of
from .intervals import Interval, part_of_rows, stack
from .layout import Contiguous, Integers
from .mask_base import BaseMask
from .parts import Part
from .relative import Relative
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


class Visitors:
    """Blocks that come by; `_pairs` has the visible pairs of each with what is here, ``[source, bounds]``."""

    _pairs: Any

    @property
    def needs(self) -> NDArray[np.bool_]:
        """Which of the blocks have any visible pair with what is here."""
        needs: NDArray[np.bool_] = (self._pairs > 0).any(axis=1)
        return needs


@dataclass
class KeyPlan(Visitors):
    """What the keys of this rank meet in the second half of a backward pass: blocks of queries in ascending order.

    Attributes
    ----------
    mask : BaseMask
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

    mask: BaseMask
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
    _kept: dict[int, list[Bounds]] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Elements of the batch."""
        return self.shapes[0][0][0]

    @property
    def pairs(self) -> int:
        """Visible query-key pairs of this rank's keys, all batches."""
        counts = [len(bounds.elements) for bounds in self._make_bounds(0)]
        return int((self._pairs @ counts).sum())

    @cached_property
    def _pairs(self) -> Integers:
        """Visible pairs of each block with the keys, ``[source, bounds]``."""
        return np.array([[_count(self.parts, bounds) for bounds in self._make_bounds(source)]
                         for source in range(len(self.sources))], np.int64)

    def prefetch_columns(self, source: int | None) -> None:
        """Have what the next block sees ready. Local."""
        if source is not None and source not in self._kept:
            self._kept = {source: self._make_bounds(source)}
            for bounds in self._kept[source]:
                bounds.prepare()

    def tasks(self, work: Work, dropout_keys: NDArray[np.uint32], relative: Relative | None = None) -> Iterator[Task]:
        """Give what a backend has to do with a block of queries that came by. Local.

        A key meets the queries in ascending order, in whichever interval they see it.

        Parameters
        ----------
        work : Work
        dropout_keys : uint32 array of shape (batch, all heads)
        relative : Relative, optional
            Of all heads.
        """
        of_call = _of_heads(self.score, relative, self.heads)
        for bounds in self._kept.get(work.source) or self._make_bounds(work.source):
            for piece in bounds.pieces(slice(None), self.tile):
                for part, intervals in zip(self.parts, _columns(self.parts, bounds, piece), strict=True):
                    for some in self._cuts(intervals):
                        rows = slice(piece.start + some.start, piece.start + some.stop)
                        score = _placed(of_call, bounds, part, rows)
                        begin, end = stack(part_of_rows(intervals, some))
                        for number in bounds.elements:
                            yield Task(number, rows, part.columns, begin, end,
                                       score.of_dropout_keys(dropout_keys[number, self.heads]))

    def _cuts(self, intervals: Sequence[Interval]) -> list[slice]:
        """Cut the queries of a block tile by tile if a key may be in several of their intervals."""
        count = len(intervals[0][0])
        some = [(begin[end > begin], end[end > begin]) for begin, end in intervals]
        reach = sorted((begin.min(), end.max()) for begin, end in some if len(begin))
        apart = all(first[1] <= second[0] for first, second in itertools.pairwise(reach))
        step = max(1, count) if apart else self.tile
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def _make_bounds(self, source: int) -> list[Bounds]:
        """Say what the queries of a block see."""
        return bounds_of(self.mask, self.sources[source].positions(), self.lengths, self.batch)


@dataclass
class TablePlan(Visitors):
    """What a block of queries, in whole tiles, meets in blocks of keys that come by: tile by tile of the queries.

    Attributes
    ----------
    bounds : list of Bounds
        What the queries see, for each mask that elements of the batch have.
    tile : int
    first : int
        Number of the first tile of this rank's queries.
    parts : list
        For each rank that shares keys, the parts of its block.
    heads : slice
        Of the queries, those that this rank computes with.
    score : Score
        Still without positions and dropout keys.
    route : Route
        Which rank that shares keys computes with which block; agreed on once the plans are made.
    """

    bounds: list[Bounds]
    tile: int
    first: int
    parts: Sequence[Sequence[Part]]
    heads: slice
    score: Score
    route: Route = field(init=False)

    @property
    def pairs(self) -> int:
        """Visible query-key pairs of the queries, all batches."""
        return int((self._pairs @ [len(bounds.elements) for bounds in self.bounds]).sum())

    @cached_property
    def _pairs(self) -> Integers:
        """Visible pairs of the queries with each block, ``[source, bounds]``."""
        return np.array([[_count(parts, bounds) for bounds in self.bounds] for parts in self.parts], np.int64)

    def prefetch_columns(self, source: int | None) -> None:
        """Have what the next block is seen of ready: it is made tile by tile. Local."""

    def tasks(self, work: Work, dropout_keys: NDArray[np.uint32], relative: Relative | None) -> Iterator[Task]:
        """Give what a backend has to do with a block of keys that came by; see `KeyPlan.tasks`. Local."""
        of_call, parts = _of_heads(self.score, relative, self.heads), self.parts[work.source]
        for bounds in self.bounds:
            for start in range(0, bounds.rows, self.tile):
                rows = slice(start, min(start + self.tile, bounds.rows))
                for part, intervals in zip(parts, _columns(parts, bounds, rows), strict=True):
                    begin, end = stack(intervals)
                    score = _placed(of_call, bounds, part, rows) if (end > begin).any() else of_call
                    for number in bounds.elements if (end > begin).any() else ():
                        yield Task(number, rows, part.columns, begin, end,
                                   score.of_dropout_keys(dropout_keys[number, self.heads]))


def add_up(sums: dict[tuple[int, int], NDArray[np.float64]], tiles: int) -> None:
    """Add up sums of tiles in a fixed tree over so many, as far as they are there. Local.

    Parameters
    ----------
    sums : dict
        By level and number: at level 0 those of tiles. Those that can be added are replaced by what they make; all of
        them together are number 0 of the last level.
    tiles : int
    """
    level, count = 0, tiles
    while count > 1:
        for number in [number for of_level, number in sums if of_level == level and number % 2 == 0]:
            if number + 1 == count:
                sums[level + 1, number // 2] = sums.pop((level, number))
            elif (level, number + 1) in sums:
                sums[level + 1, number // 2] = sums.pop((level, number)) + sums.pop((level, number + 1))
        level, count = level + 1, -(-count // 2)


def _of_heads(score: Score, relative: Relative | None, heads: slice) -> Score:
    """Give the score of some heads with the bias by distance of a call."""
    return score if relative is None else score.of_relative(relative.of_heads(heads))


def _placed(score: Score, bounds: Bounds, part: Part, rows: slice) -> Score:
    """Give the score for rows and a part of the keys."""
    return replace(score, queries=bounds.positions(rows)).of_keys(part.positions()) if score.positional else score


def _columns(parts: Sequence[Part], bounds: Bounds, rows: slice) -> list[list[Interval]]:
    """Give, for each part of some keys, the columns of it that rows see in each interval."""
    return [[(part.count_below(low), part.count_below(high)) for low, high in bounds.of(rows)] for part in parts]


def _count(parts: Sequence[Part], bounds: Bounds) -> int:
    """Count the visible pairs of a block of queries with parts of keys."""
    return sum(int((end - begin).sum()) for rows in bounds.pieces(slice(None))
               for intervals in _columns(parts, bounds, rows) for begin, end in intervals)
