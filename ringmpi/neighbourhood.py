"""Windows over grids: points of one to four axes, flattened in C order, that see the points near them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import MaskError, OptionError
from .intervals import Interval, compact
from .layout import Integers
from .mask_base import BaseMask, natural
from .relative import MOST_AXES, Axis

EDGES = "cut", "shifted"


class Grid(BaseMask):
    """What a point of a grid sees: the points within a window around it, axis by axis. Taken wherever a mask is. Local.

    Queries and keys are the points of the grid, flattened in C order (the last axis is contiguous).

    Parameters
    ----------
    shape : int or sequence of int
        Points along each of one to four axes.
    window : int, None, or a sequence with one of int, (int or None, int or None) or None for each axis
        ``(before, after)``: how many points before and after it along an axis a point sees; n means (n, n); None is no
        limit. A number alone is for every axis. A window may be wider than the grid, and sees no point twice.
    periodic : bool or sequence of bool
        Along which axes the last point is beside the first (longitude on a globe).
    edges : {"cut", "shifted"}
        At an edge of an axis that is not periodic the window is cut off, or shifted inwards, so that every point sees
        as many (as NATTEN does; Hassani et al. 2023).
    causal : bool
        Nothing after the point along the first axis (time), in spite of the window; what is beside it at the same time
        is seen.

    Raises
    ------
    OptionError
        If a number makes no sense, there are more or fewer for the axes, or two options do not go together.
    """

    def __init__(self, shape: Any, window: Any, periodic: Any = False, edges: str = EDGES[0],
                 causal: bool = False) -> None:
        sizes = _each(shape, 1)
        if not 1 <= len(sizes) <= MOST_AXES:
            raise OptionError(f"grid: expected a shape of 1 to {MOST_AXES} axes, got {shape!r}")
        self.shape = tuple(natural("grid shape", size) for size in sizes)
        axes = len(self.shape)
        each, around = _each(window, axes), _each(periodic, axes)
        for name, given in (("window", each), ("periodic", around)):
            if len(given) != axes:
                raise OptionError(f"grid: expected a {name} for each of {axes} axes, got {len(given)}")
        if not all(isinstance(one, (bool, np.bool_)) for one in around):
            raise OptionError(f"grid: periodic expects True or False for each axis, got {periodic!r}")
        if edges not in EDGES:
            raise OptionError(f"grid: edges expects one of {', '.join(EDGES)}, got {edges!r}")
        if causal and around[0]:
            raise OptionError("grid: causal goes along the first axis, which is periodic: expected one or the other")
        self.sides = tuple(_sides(one) for one in each)
        self.periodic = tuple(bool(one) for one in around)
        self.edges = edges
        self.causal = bool(causal)

    def __repr__(self) -> str:
        """Write it as it is made. Local."""
        return (f"Grid({self.shape}, {list(self.sides)}, periodic={self.periodic}, edges={self.edges!r}, "
                f"causal={self.causal})")

    def describe(self) -> dict[str, Any]:
        """Give the options as plain values. Local."""
        return {"grid": "x".join(map(str, self.shape)), "sides": [list(pair) for pair in self.sides],
                "periodic": list(self.periodic), "edges": self.edges, "causal": self.causal}

    def check(self, n_q: int, n_k: int) -> None:
        """Raise `MaskError` unless queries and keys are the points of the grid. Local."""
        points = math.prod(self.shape)
        if (n_q, n_k) != (points, points):
            raise MaskError(f"grid: expected as many queries and keys as {'x'.join(map(str, self.shape))} has points, "
                            f"{points}, got {n_q} and {n_k}")

    def check_growing(self) -> None:
        """Raise `OptionError`: a grid has all its points. Local."""
        raise OptionError("grid: its points are a sequence that is there as a whole, and this one grows; "
                          "expected a Mask")

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Its axes."""
        return tuple(map(Axis, self.shape, self.periodic))

    @property
    def most(self) -> int:
        """How many intervals a point has at most."""
        widths = [size if None in pair else min(size, sum(pair) + 1)  # type: ignore[arg-type]
                  for size, pair in zip(self.shape, self.sides, strict=True)]
        return max(1, math.prod(widths[:-1])) * (2 if self.periodic[-1] else 1)

    def bounds(self, queries: ArrayLike, n_q: int, n_k: int) -> list[Interval]:
        """Give the intervals of key positions that the queries see; see `BaseMask.bounds`. Local.

        One for each line of points that the window has along the last axis, and on a periodic one two.
        """
        numbers = np.asarray(queries, np.int64)
        if not len(numbers):
            return [(numbers, numbers)]
        *before, last = (self._runs(axis, place) for axis, place in enumerate(np.unravel_index(numbers, self.shape)))
        size = self.shape[-1]
        found = []
        for line in self._lines(before, np.zeros_like(numbers)):
            there = line >= 0
            found += [(np.where(there, line * size + low, 0), np.where(there, line * size + high, 0))
                      for low, high in last]
        return compact(found)

    def _runs(self, axis: int, place: Integers) -> list[Interval]:
        """Give what points at some places along an axis see along it: an interval, or two where it is periodic."""
        size = self.shape[axis]
        before, after = self.sides[axis]
        causal = self.causal and axis == 0
        first = place * 0 if before is None else place - before
        stop = place + 1 if causal else place * 0 + size if after is None else place + after + 1
        if self.periodic[axis]:
            wide = (before is None) | (after is None) | (stop - first >= size)
            first, stop = np.where(wide, 0, first % size), np.where(wide, size, first % size + (stop - first))
            return [(np.zeros_like(place), np.maximum(stop - size, 0)), (first, np.minimum(stop, size))]
        if self.edges == "shifted" and not causal:
            width = np.minimum(stop - first, size)
            first = np.clip(first, 0, size - width)
            return [(first, first + width)]
        return [(np.maximum(first, 0), np.minimum(stop, size))]

    def _lines(self, runs: Sequence[list[Interval]], line: Integers) -> Iterator[Integers]:
        """Give the lines along the last axis that points see by what they see along the others, in order; -1: none."""
        if not runs:
            yield line
            return
        size = self.shape[len(self.shape) - 1 - len(runs)]
        for place in _places(runs[0]):
            yield from self._lines(runs[1:], np.where((line >= 0) & (place >= 0), line * size + place, -1))


def _places(runs: list[Interval]) -> Iterator[Integers]:
    """Give the first number in the intervals of each point, then the second, and so on; -1 where there are no more."""
    counts = [high - low for low, high in runs]
    for number in range(int(np.sum(counts, axis=0).max(initial=0))):
        place, left = np.full_like(counts[0], -1), np.full_like(counts[0], number)
        for (low, _), count in zip(runs, counts, strict=True):
            place = np.where((left >= 0) & (left < count), low + left, place)
            left = left - count
        yield place


def _each(value: Any, axes: int) -> list[Any]:
    """Give what is said of each axis, or of all alike."""
    return list(value) if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str) else [value] * axes


def _sides(window: Any) -> tuple[int | None, int | None]:
    """Take a window along one axis."""
    pair = _each(window, 2)
    if len(pair) != 2:
        raise OptionError(f"grid: a window along an axis expects (before, after) or one integer, got {window!r}")
    before, after = (None if side is None else natural("grid window", side) for side in pair)
    return before, after
