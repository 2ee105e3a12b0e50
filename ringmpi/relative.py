"""A bias by distance: tables of what a pair's score gets for how far the query is from the key, along each axis.

Positions have one coordinate, themselves; those of a grid have one for each axis. What kernels do is the same: along
each axis a difference of coordinates, cut off at both ends, is the number of an entry. They know no periods: a table
for an axis that goes round is unrolled here, so that it has an entry for every difference there is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .layout import Integers

Array = NDArray[Any]
MOST_AXES = 4


class Axis(NamedTuple):
    """An axis of a grid: how many points, and whether the last is beside the first."""

    size: int
    periodic: bool


@dataclass(frozen=True, eq=False)
class Relative:
    """A bias of each pair of a query and a key by their distance.

    For head h, and the coordinates i of the query and j of the key along each axis::

        sum over axes of tables[axis][h, clip(i - j, -reach, reach) + reach]

    Attributes
    ----------
    tables : tuple of arrays of shape (heads, 2 reach + 1), accumulator dtype
        For each axis, with a reach of its own.
    sizes : tuple of int
        Of the axes of the grid that positions count in C order; empty: a position is its one coordinate.
    entries : tuple of int64 arrays of shape (2 reach + 1,), optional
        Which entry of the table that was given each entry is; without, those of the one table are as they were given.
    widths : tuple of int
        Of the tables that were given.
    """

    tables: tuple[Array, ...]
    sizes: tuple[int, ...]
    entries: tuple[Integers, ...]
    widths: tuple[int, ...]

    @classmethod
    def of_positions(cls, table: Array) -> Relative:
        """Make one of a table, (heads, 2 reach + 1), by the differences of positions. Local."""
        return cls((table,), (), (), (table.shape[1],))

    @classmethod
    def of_axes(cls, tables: Sequence[Array], axes: Sequence[Axis]) -> Relative:
        """Make one of a table for each axis of a grid, by the differences of coordinates along it. Local.

        On a periodic axis a difference is the shortest way round; half way round an even number of points it is n / 2,
        not -n / 2.
        """
        entries = []
        for table, axis in zip(tables, axes, strict=True):
            reach, last = table.shape[1] // 2, max(axis.size - 1, 0)
            if not axis.periodic:
                last = min(last, reach)
            away = np.arange(-last, last + 1)
            if axis.periodic and axis.size:
                away = (away + (axis.size - 1) // 2) % axis.size - (axis.size - 1) // 2
            entries.append(np.clip(away, -reach, reach) + reach)
        rolled = cls(tuple(tables), tuple(axis.size for axis in axes), tuple(entries),
                     tuple(table.shape[1] for table in tables))
        return rolled.with_tables(tables)

    def with_tables(self, given: Sequence[Array]) -> Relative:
        """Give one of other tables, of the shapes of those that were given. Local."""
        unrolled = [np.ascontiguousarray(table[:, which])
                    for table, which in zip(given, self.entries, strict=True)] if self.sizes else given
        return replace(self, tables=tuple(unrolled))

    def of_heads(self, heads: slice) -> Relative:
        """Give that of some heads. Local."""
        return replace(self, tables=tuple(table[heads] for table in self.tables))

    def coordinates(self, positions: Integers) -> tuple[Integers, ...]:
        """Give the coordinates of positions along each axis. Local."""
        return np.unravel_index(positions, self.sizes) if self.sizes else (positions,)

    def of_pairs(self, queries: Integers, keys: Integers) -> Array:
        """Give what is added to the scores of pairs, (n, heads), by their positions, (n,). Local."""
        total = np.zeros((len(queries), len(self.tables[0])), self.tables[0].dtype)
        for table, i, j in zip(self.tables, self.coordinates(queries), self.coordinates(keys), strict=True):
            reach = table.shape[1] // 2
            total += table[:, np.clip(i - j, -reach, reach) + reach].T
        return total

    def new_sums(self) -> list[NDArray[np.float64]]:
        """Give zeros for the gradient, like the tables. Local."""
        return [np.zeros(table.shape) for table in self.tables]

    def gradient(self, sums: Sequence[NDArray[np.float64]]) -> Array | tuple[Array, ...]:
        """Give a gradient by the tables as that by those that were given, one or a tuple. Local."""
        if not self.sizes:
            return sums[0].astype(self.tables[0].dtype)
        given = []
        for table, total, which, width in zip(self.tables, sums, self.entries, self.widths, strict=True):
            rolled = np.zeros((width, len(total)))
            np.add.at(rolled, which, total.T)
            given.append(np.ascontiguousarray(rolled.T).astype(table.dtype))
        return tuple(given)

    def digest(self) -> str:
        """Give a digest of all of it. Local."""
        found = hashlib.sha256(repr((self.sizes, self.widths, [table.shape for table in self.tables])).encode())
        for table in self.tables:
            found.update(table.data)
        return found.hexdigest()

    def checksum(self) -> int:
        """Give a number below 2^60 that is the same if all of it is. Local."""
        return int(self.digest()[:15], 16)
