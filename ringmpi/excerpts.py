"""What travels of a block: the columns that members other than its owner see, by sections of the block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .intervals import Interval
from .layout import Integers
from .parts import Part

MOST_SECTIONS = 256           # of a block ...
MOST_BITS = 2**15             # ... of all blocks, that a rank says what it needs of ...
MOST_OF_ALL = 2**26           # ... and of all blocks and ranks


class Excerpt(NamedTuple):
    """Some columns of a part of a block, as they lie in what travels of the block.

    Attributes
    ----------
    columns : slice
        Of what travels.
    part : Part
    starts, stops : int64 array of shape (runs,)
        The runs of columns of the part that travel, disjoint and ascending.
    """

    columns: slice
    part: Part | Excerpt
    starts: Integers
    stops: Integers

    def count_below(self, x: Integers) -> Integers:
        """Count the columns that stand before positions. Local."""
        below = self.part.count_below(x)
        before = np.cumsum(self.stops - self.starts) - (self.stops - self.starts)       # in earlier runs
        run = np.searchsorted(self.starts, below, side="right") - 1
        if not len(self.starts):
            return np.zeros_like(below)
        within = np.minimum(below, self.stops[run]) - self.starts[run]
        return np.where(run < 0, 0, before[run] + within)

    def positions(self) -> Integers:
        """Give the positions of the columns. Local."""
        positions = self.part.positions()
        return np.concatenate([positions[:0], *(positions[start:stop] for start, stop in zip(
            self.starts, self.stops, strict=True))])


def sections(members: int) -> int:
    """Say into how many sections each block is cut, where so many members have one. Local."""
    return max(1, min(MOST_SECTIONS, MOST_BITS // members, MOST_OF_ALL // members**2))


def edges(tokens: int, count: int) -> Integers:
    """Give the edges of so many sections of a block. Local."""
    return np.arange(count + 1) * tokens // count


def touched(parts: Sequence[Part | Excerpt], columns: Sequence[Sequence[Interval]], count: int) -> NDArray[np.bool_]:
    """Say which sections of a block have a column that some row sees. Local.

    Parameters
    ----------
    parts : sequence of Part
        All of the block.
    columns : for each part, sequence of (begin, end)
        What rows see of it.
    count : int
        Sections.
    """
    changes = np.zeros(count + 1, np.int64)                  # of how many intervals are open
    ends = edges(parts[-1].columns.stop, count)[1:]
    for part, intervals in zip(parts, columns, strict=True):
        for begin, end in intervals:
            begin, end = _widest(begin, end)
            first = np.searchsorted(ends, begin + part.columns.start, side="right")
            last = np.searchsorted(ends, end + part.columns.start, side="left")
            changes += np.bincount(first, minlength=count + 1) - np.bincount(last + 1, minlength=count + 1)[:count + 1]
    return np.cumsum(changes[:-1]) > 0


def _widest(begin: Integers, end: Integers) -> Interval:
    """Give the intervals that are not empty; one alone if it covers all others, as that of the last causal query."""
    some = end > begin
    if not some.any():
        return begin[:0], end[:0]
    widest = int((end - begin).argmax())
    if begin[widest] == begin[some].min() and end[widest] == end[some].max():
        return begin[widest:widest + 1], end[widest:widest + 1]
    return begin[some], end[some]


def runs(kept: NDArray[np.bool_], tokens: int) -> list[slice]:
    """Give the runs of columns of a block in the sections that are kept. Local."""
    at = edges(tokens, len(kept))
    changes = np.flatnonzero(np.diff(kept.astype(np.int8), prepend=0, append=0))
    return [slice(int(at[first]), int(at[last])) for first, last in changes.reshape(-1, 2) if at[first] < at[last]]


def excerpts(parts: Sequence[Part | Excerpt], kept: Sequence[slice]) -> list[Excerpt]:
    """Give what travels of the parts of a block, of which some runs of columns do. Local."""
    found: list[Excerpt] = []
    start = 0
    for part in parts:
        cut = [(max(run.start, part.columns.start), min(run.stop, part.columns.stop)) for run in kept]
        inside = np.array([pair for pair in cut if pair[0] < pair[1]], np.int64).reshape(-1, 2) - part.columns.start
        stop = start + int((inside[:, 1] - inside[:, 0]).sum())
        found.append(Excerpt(slice(start, stop), part, inside[:, 0], inside[:, 1]))
        start = stop
    return found
