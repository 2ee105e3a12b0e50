"""Intervals of numbers: for each of n rows any number of them, half open, disjoint and ascending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from .layout import Integers

Interval: TypeAlias = tuple[Integers, Integers]
"""Ends (low, high), int64 of shape (n,) each: an interval for each row, empty where they are equal."""


def intersect(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Give what is in an interval of both. Local."""
    pairs = ((np.maximum(low, a), np.minimum(high, b)) for low, high in some for a, b in others)
    return [(low, np.maximum(low, high)) for low, high in pairs]


def within(some: Sequence[Interval], stretches: Interval) -> list[Interval]:
    """Give what is in an interval and in one of many stretches, the same for all rows. Local.

    Parameters
    ----------
    some : sequence of Interval
    stretches : (starts, stops)
        int64 arrays of shape (stretches,), disjoint and ascending, none of them empty.
    """
    starts, stops = stretches
    found = []
    for low, high in some:
        first = np.searchsorted(stops, low, side="right")
        last = np.searchsorted(starts, high, side="left")
        for more in range(max(1, int((last - first).max(initial=0)))):
            there = first + more < last
            which = np.where(there, first + more, -1)
            begin = np.where(there, np.maximum(low, np.append(starts, 0)[which]), low)
            found.append((begin, np.where(there, np.minimum(high, np.append(stops, 0)[which]), begin)))
    return found


def unite(some: Sequence[Interval], other: Interval) -> list[Interval]:
    """Give what is in one of `some` intervals or in the `other`. Local."""
    low, high = other
    before = [(a, np.maximum(a, np.minimum(b, low))) for a, b in some]
    after = [(np.minimum(b, np.maximum(a, high)), b) for a, b in some]
    wide = high > low                            # an empty one cuts nothing
    before = [(a, np.where(wide, x, b)) for (a, x), (_, b) in zip(before, some, strict=True)]
    after = [(np.where(wide, x, b), b) for (x, _), (_, b) in zip(after, some, strict=True)]
    return [*before, other, *after]


def compact(some: Sequence[Interval]) -> list[Interval]:
    """Join intervals that touch, and give no more of them than the row with most has, at least one. Local."""
    count = len(some[0][0])
    rows = np.arange(count)
    lows, highs = (np.zeros((len(some) + 1, count), np.int64) for _ in range(2))
    last = np.zeros(count, np.int64)             # filled of `lows` and `highs`, whose first is for none
    for low, high in some:
        there = high > low
        touching = there & (last > 0) & (highs[last, rows] == low)
        last += there & ~touching
        lows[last[there & ~touching], rows[there & ~touching]] = low[there & ~touching]
        highs[last[there], rows[there]] = high[there]
    most = int(last.max(initial=1))
    for number in range(1, most + 1):            # what a row has fewer is empty, behind its last
        missing = last < number
        lows[number, missing] = highs[number, missing] = highs[number - 1, missing]
    return [(lows[number], highs[number]) for number in range(1, max(1, most) + 1)]


def stack(some: Sequence[Interval]) -> Interval:
    """Give the ends of one interval, or those of several in arrays of shape (intervals, n). Local."""
    if len(some) == 1:
        return some[0]
    low, high = (np.stack(ends) for ends in zip(*some, strict=True))
    return low, high


def part_of_rows(some: Sequence[Interval], rows: slice) -> list[Interval]:
    """Give the intervals of some rows. Local."""
    return [(low[rows], high[rows]) for low, high in some]
