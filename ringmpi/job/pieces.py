"""Which queries and which keys a job that streams computes at a time, and how they are dealt out.

Queries come in pieces, as large as fit, so that there are few: each piece has all keys that it sees go round again.
Keys and values come in blocks, of which each rank has read its share when it is their turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..intervals import Interval
from ..layout import Contiguous, Integers, Layout, make
from .inputs import Sizes


class Groups(Layout):
    """Tokens ``start ..`` of a longer sequence, dealt out group by group: full ones of one layout, and a last one.

    Parameters
    ----------
    start : int
    full : Layout
        How a full group is dealt out.
    number : int
        Of full groups.
    rest : Layout
        How the last one is.
    length : int
        Of the whole sequence.
    """

    name = "grouped"

    def __init__(self, start: int, full: Layout, number: int, rest: Layout, length: int) -> None:
        super().__init__([number * many + few for many, few in zip(full.counts, rest.counts, strict=True)])
        self.start = start
        self.full = full
        self.number = number
        self.rest = rest
        self.stop = start + self.length
        self.length = length

    def positions(self, rank: int) -> Integers:
        """Give the positions in the whole sequence; see `Layout.positions`. Local."""
        starts = self.start + self.full.length * np.arange(self.number, dtype=np.int64)
        last = self.start + self.full.length * self.number + self.rest.positions(rank)
        return np.concatenate([(starts[:, None] + self.full.positions(rank)).reshape(-1), last])

    def count_below(self, x: ArrayLike, rank: int) -> Integers:
        """Count the tokens before positions in the whole sequence; see `Layout.count_below`. Local."""
        inside = np.clip(np.asarray(x, np.int64) - self.start, 0, self.stop - self.start)
        number = np.minimum(inside // max(1, self.full.length), self.number)
        inside = inside - number * self.full.length
        below = np.where(number < self.number, self.full.count_below(inside, rank), self.rest.count_below(inside, rank))
        return np.asarray(number * self.full.counts[rank] + below, np.int64)

    def describe(self) -> str:
        """Say what the layout is; see `Layout.describe`. Local."""
        return (f"tokens {self.start}..{self.stop} of {self.length}: {self.number} of {self.full.describe()}, "
                f"{self.rest.describe()}")

    def groups(self) -> list[tuple[int, Layout]]:
        """Give the first token and the layout of each group. Local."""
        some = [(self.start + number * self.full.length, self.full) for number in range(self.number)]
        last = self.start + self.number * self.full.length
        return [*some, (last, self.rest)] if last < self.stop else some


class Block(Contiguous):
    """Tokens ``start ..`` of a longer sequence, of which each rank has some in a row.

    Parameters
    ----------
    counts : sequence of int
        Of each rank.
    start : int
    length : int
        Of the whole sequence.
    """

    name = "block"

    def __init__(self, counts: Sequence[int], start: int, length: int) -> None:
        super().__init__(counts)
        self.starts = tuple(start + below for below in self.starts)
        self.length = length

    def describe(self) -> str:
        """Say what the layout is; see `Layout.describe`. Local."""
        return f"{super().describe()}, from {self.starts[0]}"


@dataclass(frozen=True)
class Pieces:
    """What is computed at a time; the same on all ranks.

    Attributes
    ----------
    start : int
        The first query; those before it have been computed.
    group, piece, block : int
        Tokens of all ranks: queries that are dealt out together, queries of a piece, keys of a block.
    tile : int
        Each rank's share of a block has a multiple of it, but for the last.
    """

    start: int
    group: int
    piece: int
    block: int
    tile: int = 1

    def of_queries(self, sizes: Sizes, ranks: int, layout: str) -> list[Groups]:
        """Give the pieces, in order. Local."""
        found = []
        for start in range(self.start, sizes.n_q, self.piece):
            number, rest = divmod(min(self.piece, sizes.n_q - start), self.group)
            found.append(Groups(start, make(layout, self.group, ranks), number, make(layout, rest, ranks), sizes.n_q))
        return found

    def of_keys(self, sizes: Sizes, ranks: int) -> list[Block]:
        """Give the blocks, in order. Local."""
        return [Block(self._shares(min(self.block, sizes.n_k - start), ranks), start, sizes.n_k)
                for start in range(0, sizes.n_k, self.block)]

    def _shares(self, length: int, ranks: int) -> list[int]:
        tiles = -(-length // self.tile)
        edges = [min(length, self.tile * (tiles * rank // ranks)) for rank in range(ranks + 1)]
        return [stop - start for start, stop in itertools.pairwise(edges)]

    def as_dict(self) -> dict[str, int]:
        """Give them as plain numbers. Local."""
        return asdict(self)

    def seen(self, bounds: Sequence[Interval], n_k: int) -> NDArray[np.bool_]:
        """Say which blocks hold keys of some intervals. Local."""
        number = -(-n_k // self.block)
        edges = np.zeros(number + 1, np.int64)
        for low, high in bounds:
            some = high > low
            np.add.at(edges, low[some] // self.block, 1)
            np.add.at(edges, (high[some] - 1) // self.block + 1, -1)
        return np.asarray(np.cumsum(edges)[:-1] > 0)
