"""Which keys the rows of a rank have met: any such set, with the states of the rows, is a valid checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ShardError
from ..schedules.base import Work

TILE_ROWS = 512                # of all heads that share a head of the keys: more than are few for Numba
TILES = 8                      # of these in a piece


def cut_rows(rows: int, group: int) -> list[slice]:
    """Cut rows into pieces that are computed one after the other with a block; results have the same bits. Local.

    Parameters
    ----------
    rows : int
        Queries.
    group : int
        Heads of the queries that share a head of the keys.
    """
    piece = TILES * max(1, TILE_ROWS // group)
    edges = [*range(0, max(1, rows // piece) * piece, piece), rows]      # the last is the longest: no few are left over
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


class Folded:
    """What is left for each piece of the rows to meet of each block.

    Attributes
    ----------
    rows : list of slice
        The pieces.
    left : int64 array of shape (pieces, blocks, 2)
        The columns that are left of a block: from the first number to the second.
    """

    def __init__(self, rows: Sequence[slice], tokens: Sequence[int], left: NDArray[np.int64] | None = None) -> None:
        self.rows = list(rows)
        self._tokens = np.array(tokens, np.int64)
        if left is None:
            left = np.zeros((len(self.rows), len(tokens), 2), np.int64)
            left[:, :, 1] = self._tokens
        self.left = left

    def copy(self) -> Folded:
        """Give one that stays as this one is now. Local."""
        return Folded(self.rows, self._tokens.tolist(), self.left.copy())

    def check(self) -> None:
        """Raise `ShardError` unless what is left can be left of blocks of so many tokens. Local."""
        first, last = self.left[:, :, 0], self.left[:, :, 1]
        if not ((first >= 0) & (first <= last) & (last <= self._tokens)).all():
            raise ShardError("what a checkpoint says is left to compute is not of these blocks")

    def is_whole(self, source: int) -> bool:
        """Say whether all rows have still to meet all of a block. Local."""
        return bool((self.left[:, source] == (0, self._tokens[source])).all())

    def is_left(self, number: int, work: Work) -> bool:
        """Say whether a piece has still to meet something of what an item of work is about. Local."""
        start, stop = self._columns(work)
        first, last = self.left[number, work.source]
        return bool(max(first, start) < min(last, stop))

    def note(self, number: int, work: Work) -> None:
        """Note that a piece has met what an item of work is about: all of a block, or its beginning or end. Local."""
        start, stop = self._columns(work)
        columns = self.left[number, work.source]
        if start <= columns[0]:
            columns[0] = min(max(columns[0], stop), columns[1])
        elif stop >= columns[1]:
            columns[1] = max(min(columns[1], start), columns[0])

    def leaves(self, needed: NDArray[np.bool_]) -> bool:
        """Say whether any piece has still to meet anything of the blocks that this rank needs. Local."""
        return bool((self.left[:, needed, 0] < self.left[:, needed, 1]).any())

    def cut(self, source: int, part: int, columns: slice, rows: slice, begin: NDArray[np.int64],
            end: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Take what has been met away from an interval of columns of each row, in a part of a block. Local.

        Parameters
        ----------
        source : int
        part : int
            Its number.
        columns : slice
            Of the block, that are in the part.
        rows : slice
        begin, end : int64 arrays of shape (rows,)
            Of the part.
        """
        begin, end = begin.copy(), end.copy()
        offset = rows.start or 0
        for piece, (first, last) in zip(self.rows, self.left[:, source] - columns.start, strict=True):
            some = slice(max(0, piece.start - offset), max(0, piece.stop - offset))
            for edges in (begin, end):
                np.clip(edges[some], first, last, out=edges[some])
        return begin, end

    def table(self, folded: Folded) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give what is left for groups of rows, after this and a pass, and the group of each row. Local.

        Parameters
        ----------
        folded : Folded
            What the pass has left, of what this leaves.
        """
        return folded.left, np.repeat(np.arange(len(folded.rows)), [rows.stop - rows.start for rows in folded.rows])

    def _columns(self, work: Work) -> tuple[int, int]:
        start, stop, _ = work.columns.indices(int(self._tokens[work.source]))
        return start, stop
