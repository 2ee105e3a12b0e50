"""Parts of a block: the tokens of some ranks, whose positions increase, so that intervals of positions are columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .layout import Integers, Layout


class Part(NamedTuple):
    """Columns of a block whose positions increase: the tokens of some ranks.

    Attributes
    ----------
    columns : slice
    ranks : list of int
    layout : Layout
        That the tokens are in.
    """

    columns: slice
    ranks: list[int]
    layout: Layout

    def count_below(self, x: Integers) -> Integers:
        """Count the columns that stand before positions. Local."""
        first, *others = self.ranks
        count = self.layout.count_below(x, first)
        for rank in others:
            count = count + self.layout.count_below(x, rank)
        return count

    def positions(self) -> Integers:
        """Give the positions of the columns. Local."""
        return np.concatenate([self.layout.positions(rank) for rank in self.ranks])


def increasing(layout: Layout, ranks: Sequence[int]) -> list[Part]:
    """Cut the tokens of some ranks, one after the other, into as few parts as have increasing positions. Local."""
    if len(ranks) == 1:                   # whose positions need not be made
        return [Part(slice(0, layout.counts[ranks[0]]), list(ranks), layout)]
    parts: list[Part] = []
    last = -1
    stops = itertools.accumulate(layout.counts[rank] for rank in ranks)
    for rank, stop in zip(ranks, stops, strict=True):
        positions = layout.positions(rank)
        columns = slice(stop - layout.counts[rank], stop)
        if parts and not (len(positions) and positions[0] < last):
            parts[-1] = Part(slice(parts[-1].columns.start, columns.stop), [*parts[-1].ranks, rank], layout)
        else:
            parts.append(Part(columns, [rank], layout))
        last = int(positions[-1]) if len(positions) else last
    return parts
