"""The plan for shards of some shapes: whose queries and keys a rank computes with, and what it sees of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .intervals import Interval
from .layout import Integers, Layout
from .parts import Part
from .schedules.base import Route, Work
from .schedules.grid import Grid, HeadShare
from .schedules.head_exchange import Tokens
from .score import Score
from .tiles import KeyPlan

KEPT_BYTES = 2**20                # of the columns of all blocks, which are kept for the next call
Array = Any                       # of NumPy, or of CuPy on a GPU


class Task(NamedTuple):
    """What a backend has to do: an element of the batch, columns of a block, and what the rows see of these."""

    element: int
    columns: slice
    begin: Integers
    end: Integers
    score: Score


@dataclass
class Plan:
    """A plan for shards of some shapes on this rank.

    The rows are the queries that this rank computes with: its own, or those of the ranks that share heads with it,
    and then those of the ranks that share queries with it.

    Attributes
    ----------
    key : bytes
        Of the shapes of all ranks that it is for.
    grid : Grid
    bounds : list of (lo, hi)
        Intervals of key positions that the rows see; see `Mask.bounds`.
    row_counts : list of int
        Rows of each rank that shares queries, in their order.
    parts : list
        For each rank that shares keys, the parts of its block.
    shapes : list
        For each rank that shares keys, the shapes of its k and v, and of its bias if there is one.
    share : HeadShare
        The heads that this rank computes with.
    q_tokens, kv_tokens : Tokens
        Of the ranks that share heads.
    score : Score
        Of the rows, still without the keys and dropout keys of a block.
    accumulator : dtype
    dtype : dtype
        Of q, k and v.
    dims : (int, int, int)
        heads that this rank computes with, dim, dim_v.
    replicated : bool
        Whether all ranks have the same queries: each folds its own keys into all rows.
    of_keys : KeyPlan, optional
        In canonical order, what goes for the gradients of keys and values, and how tokens get into blocks.
    bias_tokens : Tokens, optional
        Those of a bias of the keys, of the ranks that share heads; None without one.
    left_out : Layout, optional
        That of the caller's keys, if a bias leaves some of them out.
    route : Route
        Which rank that shares keys computes with which block; agreed on once the plans are made.
    seen : array of shape (own rows,), bool
        Which of the first rows, which this rank finishes, have a result, where the backend computes, once there has
        been a forward pass.
    ready : set of str
        What the backend and the carrier have been made ready for: ``"forward"``, ``"backward"``.
    """

    key: bytes
    grid: Grid
    bounds: list[Interval]
    row_counts: list[int]
    parts: list[list[Part]]
    shapes: list[list[tuple[int, ...]]]
    share: HeadShare
    q_tokens: Tokens
    kv_tokens: Tokens
    score: Score
    accumulator: np.dtype[Any]
    dtype: np.dtype[Any]
    dims: tuple[int, int, int]
    replicated: bool
    of_keys: KeyPlan | None = None
    bias_tokens: Tokens | None = None
    left_out: Layout | None = None
    route: Route = field(init=False)
    seen: Array = None
    ready: set[str] = field(default_factory=set)
    _prefetched: tuple[int, list[list[Interval]]] = (-1, [])
    _kept: dict[int, list[list[Interval]]] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Elements of the batch."""
        return self.shapes[0][0][0]

    @property
    def plain(self) -> bool:
        """Whether scores are; see `Score.plain`."""
        return self.score.plain and self.bias_tokens is None

    @property
    def block_tokens(self) -> list[Tokens]:
        """Of each array of a block."""
        return [self.kv_tokens] * 2 + ([self.bias_tokens] if self.bias_tokens else [])

    @property
    def block_dtypes(self) -> list[np.dtype[Any]]:
        """Of each array of a block: a bias has the accumulator's, as all gradients have."""
        return [self.dtype] * 2 + ([self.accumulator] if self.bias_tokens else [])

    @cached_property
    def rows(self) -> int:
        """The queries that this rank computes with."""
        return len(self.bounds[0][0])

    @cached_property
    def own_rows(self) -> int:
        """How many of them, the first, this rank finishes."""
        return sum(self.q_tokens.counts)

    @cached_property
    def pairs(self) -> int:
        """Visible query-key pairs of this rank, all batches."""
        return self.batch * int(self._pairs.sum())

    @property
    def needs(self) -> NDArray[np.bool_]:
        """Which of the blocks that come by this rank needs: of keys, then of queries if any come by."""
        return np.concatenate([self._pairs > 0, *([self.of_keys.needs] if self.of_keys else [])])

    def take_needs(self, needs: NDArray[np.bool_]) -> None:
        """Take what each rank that shares keys needs, in the order of the group: the routes of blocks. Local."""
        size = len(self.parts)
        self.route = Route(needs[:, :size], [parts[-1].columns.stop for parts in self.parts])
        if self.of_keys:
            self.of_keys.route = Route(needs[:, size:], [part.columns.stop for part in self.of_keys.sources])

    @cached_property
    def _pairs(self) -> Integers:
        """Visible pairs of the rows with each block."""
        return np.array([sum(int((end - begin).sum()) for columns in self._columns(source) for begin, end in columns)
                         for source in range(len(self.parts))], np.int64)

    @property
    def sees(self) -> NDArray[np.bool_]:
        """Which of the rows that this rank finishes see any key."""
        seen = np.zeros(self.own_rows, bool)
        for low, high in self.bounds:
            seen |= (high > low)[:self.own_rows]
        return seen

    def prefetch_columns(self, source: int | None) -> None:
        """Have the columns of the next block ready: a GPU computes now, and would wait for them later. Local."""
        if source is not None and self._prefetched[0] != source:
            self._prefetched = source, self._columns(source)

    def tasks(self, work: Work, rows: slice, dropout_keys: NDArray[np.uint32]) -> Iterator[Task]:
        """Give what a backend has to do with some rows, and the block or columns of a block that came by. Local.

        Parameters
        ----------
        work : Work
        rows : slice
        dropout_keys : uint32 array of shape (batch, all heads)
        """
        source = work.source
        bias = work.arrays[2] if self.bias_tokens else None
        columns = self._prefetched[1] if self._prefetched[0] == source else self._columns(source)
        first, last, _ = work.columns.indices(self.parts[source][-1].columns.stop)
        for part, intervals in zip(self.parts[source], columns, strict=True):
            cut = slice(max(first, part.columns.start), min(last, part.columns.stop))
            if cut.start >= cut.stop:
                continue
            inside = slice(cut.start - part.columns.start, cut.stop - part.columns.start)
            score = self._score_of(part, inside, rows)
            for begin, end in intervals:
                if cut != part.columns:
                    begin, end = (np.clip(x, inside.start, inside.stop) - inside.start for x in (begin, end))
                there = slice(cut.start - first, cut.stop - first)
                for number in range(self.batch):
                    of_element = score.of_dropout_keys(dropout_keys[number, self.share.queries])
                    yield Task(number, there, begin[rows], end[rows],
                               of_element.of_key_bias(None if bias is None else bias[number, there]))

    def _columns(self, source: int) -> list[list[Interval]]:
        """Turn each interval of positions into columns of each part of a block; those of small shards are kept."""
        if source in self._kept:
            return self._kept[source]
        columns = [[(part.count_below(low), part.count_below(high)) for low, high in self.bounds]
                   for part in self.parts[source]]
        if self._keeps:
            self._kept[source] = columns
        return columns

    @cached_property
    def _keeps(self) -> bool:
        """Whether the columns of all blocks take little memory."""
        return 16 * self.rows * len(self.bounds) * sum(map(len, self.parts)) <= KEPT_BYTES

    def _score_of(self, part: Part, inside: slice, rows: slice) -> Score:
        """Give the score for some rows and columns of a part of a block."""
        if not self.score.positional:
            return self.score
        return replace(self.score, queries=self.score.queries[rows]).of_keys(part.positions()[inside])
