"""Going on with other ranks, or in another layout: blocks of keys stay what they were, rows bring their states along.

A rank holds some of the old blocks, one after the other, and each row sees only what is left of each of them for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError, ShardError
from ..files.states import Generation, are_counts
from ..layout import Contiguous, Custom, Integers, Layout, make
from ..parts import Part
from ..plan import Plan
from ..schedules.head_exchange import Tokens
from .folded import Folded

NONE = np.empty(0, np.int64)
MOST_BLOCKS = 2**17            # as many as ranks
MOST_TABLE_BYTES = 2**26       # of what is left for the rows of a rank


@dataclass(frozen=True)
class Before:
    """Who had which tokens when a checkpoint was written, and what its blocks are."""

    q_layout: Layout
    blocks: Layout
    groups: list[int]

    @classmethod
    def of(cls, generation: Generation, n_q: int, n_k: int) -> Before:
        """Read it from a manifest, or raise an error that says why others can't go on. Local.

        Raises
        ------
        OptionError, ShardError
            The same on all ranks.
        """
        there: Mapping[str, Any] = generation.content["placement"]
        wrong = ShardError(f"{generation.path}: what it says of its ranks makes no sense")
        try:
            schedule, blocks, counts = there["schedule"], there["blocks"], there["n_q"]
            numbers = blocks["n_k"]
            groups = [shard["groups"] for shard in generation.content["shards"]]
            names = there["layout"], blocks["layout"]
        except (KeyError, TypeError):
            raise wrong from None
        if not all(isinstance(text, str) for text in (schedule, *names)) or not all(map(are_counts, (
                counts, numbers, groups))):
            raise wrong
        if not (sum(counts) == n_q and sum(numbers) == n_k and len(groups) == len(counts)
                and 0 < len(numbers) <= MOST_BLOCKS
                and all(0 < number <= rows + 1 for number, rows in zip(groups, counts, strict=True))):
            raise wrong
        try:
            layouts = _layout(names[0], counts), _layout(names[1], numbers)
        except OptionError as error:
            raise OptionError(f"{generation.path}: {error}") from None
        if not schedule.startswith("1x1x"):
            raise OptionError(f"{generation.path}: other ranks can go on only from a schedule that shares no heads, "
                              f"got {schedule}; go on with the {len(counts)} ranks that wrote it")
        if [list(layout.counts) for layout in layouts] != [counts, numbers]:
            raise wrong
        return cls(*layouts, groups)


def _layout(text: str, counts: Sequence[int]) -> Layout:
    """Make a layout by its name, or its description."""
    name = text.split(" ")[0]
    if name == "contiguous":
        return Contiguous(counts)
    if name not in ("striped", "zigzag"):
        raise OptionError(f"other ranks can go on from layouts contiguous, striped and zigzag, got {name}; go on with "
                          "the ranks that wrote it")
    return make(name, sum(counts), len(counts))


class Moved:
    """Rows and blocks that come from other ranks: what each row had met of each block then.

    Parameters
    ----------
    before : Before
    positions : int64 array of shape (rows,)
        Of this rank's rows.
    members : sequence of int
        The ranks that share keys, in their order: all there are.
    rank : int

    Attributes
    ----------
    layout : Layout
        Of k and v on the ranks that go on. They hold whole blocks; here their tokens are in ascending order.
    places : int array
        Of each of this rank's tokens, its place in its blocks, one after the other.
    """

    def __init__(self, before: Before, positions: Integers, members: Sequence[int], rank: int) -> None:
        blocks, size = before.blocks, len(members)
        self._before = before
        self._positions = positions
        self._held = [range(place * blocks.size // size, (place + 1) * blocks.size // size) for place in range(size)]
        tokens = [np.concatenate([NONE, *map(blocks.positions, self._held[members.index(other)])])
                  for other in range(size)]
        self._mine = self._held[members.index(rank)]
        self.layout = Custom([np.sort(x) for x in tokens])
        self.places = np.argsort(tokens[rank])
        self._groups = np.zeros(len(positions), np.int64)        # of each row: those of a group had met the same
        self._left = np.zeros((0, blocks.size, 2), np.int64)     # of each group; see `Folded.left`

    def plan(self, plan: Plan) -> Plan:
        """Give a plan for these blocks. Local."""
        blocks = self._before.blocks
        parts = [_parts(blocks, numbers) for numbers in self._held]
        shapes: list[list[tuple[int, ...]]] = [
            [(shape[0], part[-1].columns.stop, *shape[2:]) for shape in plan.shapes[0]] for part in parts]
        counts = [sum(blocks.counts[number] for number in self._mine)]
        tokens = Tokens(counts, plan.kv_tokens.parts)
        of_bias = None if plan.bias_tokens is None else Tokens(counts, plan.bias_tokens.parts)
        moved = replace(plan, parts=parts, shapes=shapes, kv_tokens=tokens, bias_tokens=of_bias, ready=set(),
                        _kept={}, _unseen=set())
        moved.route = plan.route
        return moved

    def take(self, generation: Generation, states: Sequence[tuple[NDArray[Any], ...]], rank: int, size: int) -> None:
        """Read the states of this rank's rows from the files of those that had them, and check a share of the files.

        Parameters
        ----------
        generation : Generation
        states : for each element of the batch, (acc, row_max, row_sum)
            On the host; written.
        rank, size : int
            Of the ranks that go on, each checks some files.

        Raises
        ------
        ShardError
            If a file is missing, damaged or makes no sense.
        """
        before = self._before
        for number in range(rank, before.q_layout.size, size):
            generation.verify(number)
        tables: list[Integers] = []
        taken = 0
        for number in range(before.q_layout.size):
            below = before.q_layout.count_below(self._positions, number)
            rows = np.flatnonzero(before.q_layout.count_below(self._positions + 1, number) > below)
            if not len(rows):
                continue
            taken += 16 * before.groups[number] * before.blocks.size
            if taken > MOST_TABLE_BYTES:
                raise ShardError(f"{generation.path}: expected at most {MOST_TABLE_BYTES:,} bytes of what is left to a "
                                 "rank, got more: go on with the ranks that wrote it, or begin anew")
            left, groups = self._read(generation, number, states, rows, below[rows])
            self._groups[rows] = groups + sum(len(table) for table in tables)
            tables.append(left)
        self._left = np.concatenate([self._left, *tables])

    def _read(self, generation: Generation, number: int, states: Sequence[tuple[NDArray[Any], ...]], rows: Integers,
              there: Integers) -> tuple[Integers, Integers]:
        """Read some rows of a file; give its table of what is left, and the groups of the rows."""
        before = self._before
        count, groups, blocks = before.q_layout.counts[number], before.groups[number], before.blocks
        sizes = [x.itemsize * count * math.prod(x.shape[1:]) for state in states for x in state]
        sizes += [8 * groups * blocks.size * 2, 8 * count]
        data = generation.view(number, sum(sizes))
        pieces = iter(np.split(data, np.cumsum(sizes)[:-1]))
        for state in states:
            for x in state:
                x[rows] = next(pieces).view(x.dtype).reshape(count, *x.shape[1:])[there]
        left, of_rows = (np.frombuffer(piece.tobytes(), np.int64) for piece in pieces)
        Folded([slice(0, 0)] * groups, blocks.counts, left.reshape(groups, blocks.size, 2)).check()
        if count and not 0 <= of_rows.min() <= of_rows.max() < groups:
            raise ShardError(f"{generation.path}: what rank {number} says of its rows makes no sense")
        return left.reshape(groups, blocks.size, 2), of_rows[there]

    def is_whole(self, source: int) -> bool:
        """Say whether all rows have still to meet all of a member's blocks. Local."""
        tokens = self._before.blocks.counts
        return all((self._left[:, number] == (0, tokens[number])).all() for number in self._held[source])

    def cut(self, source: int, part: int, columns: slice, rows: slice, begin: Integers, end: Integers
            ) -> tuple[Integers, Integers]:
        """Take what had been met away from an interval of columns of each row; see `Folded.cut`. Local."""
        if not self._held[source]:
            return begin, end
        first, last = self._left[self._groups[rows], self._held[source][part]].T
        return np.clip(begin, first, last), np.clip(end, first, last)

    def table(self, folded: Folded) -> tuple[Integers, Integers]:
        """Give what is left of the blocks for groups of rows, and the group of each row; see `Folded.table`. Local."""
        tables = [self._left[:0]]
        groups = np.zeros(len(self._positions), np.int64)
        for rows, left in zip(folded.rows, folded.left, strict=True):
            used, inverse = np.unique(self._groups[rows], return_inverse=True)
            groups[rows] = inverse + sum(len(table) for table in tables)
            table = self._left[used]
            for numbers, (first, last) in zip(self._held, left, strict=True):
                start = 0
                for number in numbers:
                    table[:, number, 0] = np.maximum(table[:, number, 0], first - start)
                    table[:, number, 1] = np.minimum(table[:, number, 1], last - start)
                    start += self._before.blocks.counts[number]
            table[table[..., 0] >= table[..., 1]] = 0
            tables.append(table)
        return np.concatenate([*tables, self._left[:0] if len(groups) else _nothing(self._before.blocks)]), groups


def _parts(blocks: Layout, numbers: Sequence[int]) -> list[Part]:
    """Give a part for each block; an empty one if there is none."""
    edges = np.cumsum([0, *(blocks.counts[number] for number in numbers)]).tolist()
    parts = [Part(slice(edges[i], edges[i + 1]), [number], blocks) for i, number in enumerate(numbers)]
    return parts or [Part(slice(0, 0), [0], Contiguous([0]))]


def _nothing(blocks: Layout) -> Integers:
    """Give a table of one group, for a rank without rows."""
    return np.zeros((1, blocks.size, 2), np.int64)
