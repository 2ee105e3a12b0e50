"""What rows see: intervals of key positions, made for a piece of the rows at a time where they are many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .intervals import Interval, part_of_rows
from .layout import Integers
from .mask import Mask
from .mask_base import BaseMask

PIECE_BYTES = 2**24           # of intervals: more of them are made piece by piece, each time that they are needed
LEAST_ROWS = 64               # of a piece, however many intervals they have


def rows_of_piece(mask: BaseMask) -> int:
    """Say for how many rows the intervals are made at a time. Local."""
    return max(LEAST_ROWS, PIECE_BYTES // (16 * mask.most))


def bounds_of(mask: BaseMask, queries: Integers, lengths: tuple[int, int], batch: int) -> list[Bounds]:
    """Give what rows see, for each mask that elements of the batch have. Local."""
    masks = mask.of_elements(batch) or [(Mask(), ())]                # a batch of none
    return [Bounds(one, queries, lengths, elements) for one, elements in masks]


class Bounds:
    """What some rows see of the keys, in the elements of the batch that share a mask. Local.

    Parameters
    ----------
    mask : BaseMask
    queries : int64 array of shape (rows,)
        Global numbers of the rows' queries.
    lengths : (int, int)
        Queries and keys in all.
    elements : sequence of int
        Of the batch.

    Attributes
    ----------
    rows : int
        The rows there are.
    most_rows : int
        Of a piece.
    kept : bool
        Whether all intervals are made once, for they take little memory.
    several : bool
        Whether a row may have several.
    """

    def __init__(self, mask: BaseMask, queries: Integers, lengths: tuple[int, int], elements: Sequence[int]) -> None:
        self.elements = elements
        self._mask = mask
        self._queries = queries
        self._lengths = lengths
        self.rows = len(queries)
        self.most_rows = rows_of_piece(mask)
        self.kept = self.rows <= self.most_rows
        self.several = mask.most > 1

    def pieces(self, rows: slice, tile: int = 1) -> list[slice]:
        """Cut rows into pieces, each of whole tiles but the last, for which intervals are made at a time. Local."""
        start, stop, _ = rows.indices(self.rows)
        if self.kept or start >= stop:
            return [slice(start, stop)]
        step = max(1, self.most_rows // tile) * tile
        return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]

    def of(self, rows: slice) -> list[Interval]:
        """Give the intervals that some rows see; see `Mask.bounds`. Local."""
        if self.kept:
            return part_of_rows(self._every, rows)
        return self._mask.bounds(self._queries[rows], *self._lengths)

    def prepare(self) -> None:
        """Make the intervals, if they are kept. Local."""
        if self.kept:
            self.of(slice(0))

    def positions(self, rows: slice) -> Integers:
        """Give the positions of rows among the keys. Local."""
        return self._mask.positions(self._queries[rows], *self._lengths)

    @cached_property
    def sees(self) -> NDArray[np.bool_]:
        """Which of the rows see any key."""
        sees = np.zeros(self.rows, np.bool_)
        for piece in self.pieces(slice(None)):
            for low, high in self.of(piece):
                sees[piece] |= high > low
        return sees

    @cached_property
    def _every(self) -> list[Interval]:
        return self._mask.bounds(self._queries, *self._lengths)
