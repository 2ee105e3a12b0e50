"""The plan for shards of some shapes: whose queries and keys a rank computes with, and what it sees of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .bounds import Bounds
from .excerpts import Excerpt, excerpts, runs, touched
from .intervals import Interval, part_of_rows, stack
from .layout import Integers, Layout
from .parts import Part
from .relative import Relative
from .schedules.base import Route, Work
from .schedules.grid import Grid, HeadShare
from .schedules.head_exchange import Tokens
from .score import Score
from .tiles import KeyPlan, TablePlan

KEPT_BYTES = 2**20                # of the columns of all blocks, which are kept for the next call
Array = Any                       # of NumPy, or of CuPy on a GPU
T = TypeVar("T")
Columns = list[list[Interval]]    # for each part of a block, the columns of it that rows see in each interval


class Task(NamedTuple):
    """What a backend has to do: an element of the batch, columns of a block, and what the rows see of these.

    begin and end are as `Backend.accumulate` takes them.
    """

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
    bounds : list of Bounds
        What the rows see, for each mask that elements of the batch have.
    row_counts : list of int
        Rows of each rank that shares queries, in their order.
    parts : list
        For each rank that shares keys, the parts of its block: of this rank's all, of another's what travels.
    shapes : list
        For each rank that shares keys, the shapes of its k and v, or of k alone if that has v in it, and of its bias if
        there is one; as far as they travel.
    share : HeadShare
        The heads that this rank computes with.
    q_tokens, kv_tokens : Tokens
        Of the ranks that share heads.
    score : Score
        Of the rows, still without the keys and dropout keys of a block, and without what a call brings.
    relative : bool
        Whether calls bring a bias by distance.
    of_tables : TablePlan, optional
        In canonical order, what goes for the gradient of that.
    accumulator : dtype
    dtype : dtype
        Of q, k and v.
    dims : (int, int, int)
        heads that this rank computes with, dim, dim_v.
    replicated : bool
        Whether all ranks have the same queries: each folds its own keys into all rows.
    member : int
        Of those that share keys, this rank.
    whole : bool, optional
        Whether blocks travel as they are; None where they always do.
    sections : int
        Into which each block is cut: those travel that members other than its owner need. 1: blocks travel as they are.
    of_keys : KeyPlan, optional
        In canonical order, what goes for the gradients of keys and values, and how tokens get into blocks.
    bias_tokens : Tokens, optional
        Those of a bias of the keys, of the ranks that share heads; None without one.
    left_out : Layout, optional
        That of the caller's keys, if a bias leaves some of them out.
    route : Route
        Which rank that shares keys computes with which block; agreed on once the plans are made.
    sent : list of slice, optional
        The columns of this rank's block that travel; None: all of them.
    seen : list of arrays of shape (own rows,), bool
        For each element of the batch, which of the first rows, which this rank finishes, have a result, where the
        backend computes, once there has been a forward pass.
    ready : set of str
        What the backend and the carrier have been made ready for: ``"forward"``, ``"backward"``.
    """

    key: bytes
    grid: Grid
    bounds: list[Bounds]
    row_counts: list[int]
    parts: Sequence[Sequence[Part | Excerpt]]
    shapes: list[list[tuple[int, ...]]]
    share: HeadShare
    q_tokens: Tokens
    kv_tokens: Tokens
    score: Score
    accumulator: np.dtype[Any]
    dtype: np.dtype[Any]
    dims: tuple[int, int, int]
    replicated: bool
    member: int = 0
    whole: bool | None = None
    sections: int = 1
    of_keys: KeyPlan | None = None
    bias_tokens: Tokens | None = None
    left_out: Layout | None = None
    relative: bool = False
    of_tables: TablePlan | None = None
    sent: list[slice] | None = None
    route: Route = field(init=False)
    seen: list[Array] = field(default_factory=list)
    ready: set[str] = field(default_factory=set)
    _kept: dict[tuple[int, int], Columns] = field(default_factory=dict)      # by the number of the bounds, and source
    _unseen: set[tuple[int, int, int, int]] = field(default_factory=set)     # and pieces of rows: start, stop

    @property
    def batch(self) -> int:
        """Elements of the batch."""
        return self.shapes[0][0][0]

    @property
    def plain(self) -> bool:
        """Whether scores are; see `Score.plain`."""
        return self.score.plain and self.bias_tokens is None and not self.relative

    @cached_property
    def _without_bias(self) -> int:
        """Arrays of a block besides the bias: k and v, or k alone."""
        return len(self.shapes[0]) - (self.bias_tokens is not None)

    @cached_property
    def in_keys(self) -> bool:
        """Whether values are the first numbers of keys."""
        return self._without_bias == 1

    @cached_property
    def block_tokens(self) -> list[Tokens]:
        """Of each array of a block."""
        return [self.kv_tokens] * self._without_bias + ([self.bias_tokens] if self.bias_tokens else [])

    @cached_property
    def block_dtypes(self) -> list[np.dtype[Any]]:
        """Of each array of a block: a bias has the accumulator's, as all gradients have."""
        return [self.dtype] * self._without_bias + ([self.accumulator] if self.bias_tokens else [])

    @property
    def rows(self) -> int:
        """The queries that this rank computes with."""
        return self.bounds[0].rows

    @cached_property
    def own_rows(self) -> int:
        """How many of them, the first, this rank finishes."""
        return sum(self.q_tokens.counts)

    @cached_property
    def pairs(self) -> int:
        """Visible query-key pairs of this rank, all batches."""
        return sum(len(bounds.elements) * int(pairs.sum())
                   for bounds, pairs in zip(self.bounds, self._pairs, strict=True))

    @property
    def needs(self) -> NDArray[np.bool_]:
        """Which sections of blocks of keys this rank needs, and then what `of_keys` and `of_tables` need."""
        return np.concatenate([self._survey[1].ravel(), *(other.needs for other in (self.of_keys, self.of_tables)
                                                          if other)])

    def take_needs(self, needs: NDArray[np.bool_]) -> None:
        """Take what each rank that shares keys needs, in the order of the group: the routes of blocks. Local."""
        size = len(self.parts)
        needed = needs[:, :size * self.sections].reshape(len(needs), size, self.sections)
        self._cut_blocks(needed)
        self.route = Route(np.any(needed, axis=2, keepdims=True)[:, :, 0], [shapes[0][1] for shapes in self.shapes])
        if self.of_keys:
            self.of_keys.route = Route(needs[:, size:2 * size], [part.columns.stop for part in self.of_keys.sources])
        if self.of_tables:
            self.of_tables.route = Route(needs[:, 2 * size:], self.route.tokens)

    def _cut_blocks(self, needed: NDArray[np.bool_]) -> None:
        """Let only those sections of blocks travel that others need, if they are half of the largest block at most.

        An owner copies what travels: that and the buffers then take no more memory than buffers for whole blocks.
        """
        if self.sections == 1:
            return
        members = np.arange(len(needed))
        others = needed.copy()
        others[members, members] = False
        tokens = [shapes[0][1] for shapes in self.shapes]
        kept = [runs(some, count) for some, count in zip(np.any(others, axis=0, keepdims=True)[0], tokens, strict=True)]
        counts = [sum(run.stop - run.start for run in some) for some in kept]
        if 2 * max(counts) > max(tokens):
            return
        self.sent = kept[self.member]
        self.parts = [parts if source == self.member else list(excerpts(parts, kept[source]))
                      for source, parts in enumerate(self.parts)]
        self.shapes = [[(shape[0], count, *shape[2:]) for shape in shapes]
                       for shapes, count in zip(self.shapes, counts, strict=True)]
        self._kept = {}

    @property
    def _pairs(self) -> Integers:
        """Visible pairs of the rows with each block, ``[bounds, source]``."""
        return self._survey[0]

    @cached_property
    def _survey(self) -> tuple[Integers, NDArray[np.bool_]]:
        """Visible pairs of the rows with each block, and which sections of it they see: ``[source, section]``."""
        pairs = np.zeros((len(self.bounds), len(self.parts)), np.int64)
        sees = np.zeros((len(self.parts), self.sections), np.bool_)
        for number, bounds in enumerate(self.bounds):
            for rows in bounds.pieces(slice(None)):
                seen = bounds.of(rows)
                for source, parts in enumerate(self.parts):
                    columns = self._left(source, rows, self._make_columns(source, seen))
                    count = sum(int((end - begin).sum()) for intervals in columns for begin, end in intervals)
                    pairs[number, source] += count
                    if not sees[source].all():
                        # of its own block a rank need not say what it sees
                        sees[source] |= count > 0 if source == self.member else touched(parts, columns, self.sections)
                    if not count:
                        self._unseen.add((number, source, rows.start, rows.stop))
        return pairs, sees

    @property
    def sees(self) -> list[NDArray[np.bool_]]:
        """For each of the bounds, which of the rows that this rank finishes see any key."""
        return [bounds.sees[:self.own_rows] for bounds in self.bounds]

    def of_elements(self, each: Sequence[T]) -> list[T]:
        """Give for each element of the batch what there is for its bounds. Local."""
        found = {number: one for bounds, one in zip(self.bounds, each, strict=True) for number in bounds.elements}
        return [found[number] for number in range(self.batch)]

    def pieces(self, rows: slice) -> list[slice]:
        """Cut rows into pieces for which what they see is made at a time. Local."""
        return [rows] if self._all_kept else min(self.bounds, key=lambda bounds: bounds.most_rows).pieces(rows)

    @cached_property
    def _all_kept(self) -> bool:
        """Whether what all rows see is there at once."""
        return all(bounds.kept for bounds in self.bounds)

    def prefetch_columns(self, source: int | None) -> None:
        """Have the columns of the next block ready: a GPU computes now, and would wait for them later. Local."""
        if source is not None:
            for number, bounds in enumerate(self.bounds):
                if bounds.kept:
                    self._whole(number, source)

    def tasks(self, work: Work, rows: slice, dropout_keys: NDArray[np.uint32], relative: Relative | None = None
              ) -> Iterator[Task]:
        """Give what a backend has to do with some rows, and the block or columns of a block that came by. Local.

        Parameters
        ----------
        work : Work
        rows : slice
        dropout_keys : uint32 array of shape (batch, all heads)
        relative : Relative, optional
            Of all heads.
        """
        source = work.source
        of_call = self.score
        if relative is not None:
            of_call = of_call.of_relative(relative.of_heads(self.share.queries))
        bias = work.arrays[-1] if self.bias_tokens else None
        first, last, _ = work.columns.indices(self.parts[source][-1].columns.stop)
        for which, bounds in enumerate(self.bounds):
            for part, intervals in zip(self.parts[source], self._columns(which, source, rows), strict=True):
                cut = slice(max(first, part.columns.start), min(last, part.columns.stop))
                if cut.start >= cut.stop or not intervals:
                    continue
                inside = slice(cut.start - part.columns.start, cut.stop - part.columns.start)
                there = slice(cut.start - first, cut.stop - first)
                score = _placed(of_call, bounds, part, inside, rows)
                begin, end = stack(intervals)
                if cut != part.columns:
                    begin, end = (np.clip(x, inside.start, inside.stop) - inside.start for x in (begin, end))
                for number in bounds.elements:
                    of_element = score.of_dropout_keys(dropout_keys[number, self.share.queries])
                    yield Task(number, there, begin, end,
                               of_element.of_key_bias(None if bias is None else bias[number, there]))

    def _columns(self, number: int, source: int, rows: slice) -> Columns:
        """Give the columns of each part of a block that some rows see, by the bounds of a number."""
        bounds = self.bounds[number]
        if (number, source, rows.start, rows.stop) in self._unseen:
            return [[] for _ in self.parts[source]]
        columns = ([part_of_rows(intervals, rows) for intervals in self._whole(number, source)] if bounds.kept
                   else self._make_columns(source, bounds.of(rows)))
        return self._left(source, rows, columns)

    def _left(self, source: int, rows: slice, columns: Columns) -> Columns:
        """Take away what rows have met of a block before."""
        return columns

    def _whole(self, number: int, source: int) -> Columns:
        """Give the columns of a block for all rows; those of small blocks are kept, else those of two."""
        if (number, source) not in self._kept:
            while not self._keeps and len(self._kept) >= 2 * len(self.bounds):
                self._kept.pop(next(iter(self._kept)))
            self._kept[number, source] = self._make_columns(source, self.bounds[number].of(slice(None)))
        return self._kept[number, source]

    def _make_columns(self, source: int, seen: Sequence[Interval]) -> Columns:
        """Turn intervals of positions into columns of each part of a block; none that are empty for all rows."""
        return [[(begin, end) for low, high in seen
                 if ((end := part.count_below(high)) > (begin := part.count_below(low))).any()]
                for part in self.parts[source]]

    @cached_property
    def _keeps(self) -> bool:
        """Whether the columns of all blocks take little memory."""
        intervals = sum(len(bounds.of(slice(None))) for bounds in self.bounds if bounds.kept)
        return 16 * self.rows * intervals * sum(map(len, self.parts)) <= KEPT_BYTES


def _placed(score: Score, bounds: Bounds, part: Part | Excerpt, inside: slice, rows: slice) -> Score:
    """Give a score for some rows and columns of a part of a block."""
    if not score.positional:
        return score
    return replace(score, queries=bounds.positions(rows)).of_keys(part.positions()[inside])
