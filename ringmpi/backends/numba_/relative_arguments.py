"""A bias by distance as the kernels take it: its tables, coordinates, and the sums of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...relative import MOST_AXES, Relative
from ...score import Score
from .tuples import RelativeArguments
from .vector import machine

Array = NDArray[Any]


class RelativeSums:
    """Sums of the gradient of a bias by distance for a task: of the query heads of a key head."""

    def __init__(self, relative: Relative, group: int, acc_dtype: np.dtype[Any]) -> None:
        self.lanes = _lanes(acc_dtype)
        self.widths = [table.shape[1] + 2 * self.lanes for table in relative.tables]
        self.at = group * np.cumsum([0, *self.widths[:-1]])
        self.group = group
        self.sums = np.zeros(group * sum(self.widths), acc_dtype)
        self.totals = np.zeros(group * sum(self.widths))

    def add_to(self, drelative: Sequence[NDArray[np.float64]], heads: slice) -> None:
        """Add them to the gradient of some heads."""
        lanes = self.lanes
        for target, start, width in zip(drelative, self.at.tolist(), self.widths, strict=True):
            x = self.totals[start:start + self.group * width].reshape(self.group, width)
            x[:, lanes] += x[:, :lanes].sum(axis=1)
            x[:, -lanes - 1] += x[:, -lanes:].sum(axis=1)
            target[heads] += x[:, lanes:-lanes][:, ::-1]


class SharedRelative:
    """What all threads share of a `RelativeArguments`: of a block's queries, and vectors with some of first..last."""

    def __init__(self, score: Score, n_k: int, first: int, last: int, acc_dtype: np.dtype[Any]) -> None:
        lanes = _lanes(acc_dtype)
        first = max(first - lanes + 1, 0)                # from where on a vector may have a column that is seen
        relative = score.relative or Relative((), (), (), ())
        tables = [np.pad(table[:, ::-1].astype(acc_dtype), ((0, 0), (lanes, lanes)), "edge")
                  for table in relative.tables]
        widths = np.array([table.shape[1] for table in tables], np.int64)
        shape = len(tables), n_k + lanes
        keys, low, high, in_a_row = (np.zeros(shape, kind) for kind in (np.int64, np.int64, np.int64, np.uint8))
        along = relative.coordinates(score.keys[first:last]) if tables else ()
        for axis, coordinates in enumerate(along):
            # Some more keys, that nobody sees, go on where the last one is.
            more = np.concatenate([coordinates, coordinates[-1:] + np.arange(1, lanes)])
            keys[axis, first:last + lanes - 1] = more
            low[axis, first:last] = _of_vectors(np.minimum, more, lanes)
            high[axis, first:last] = _of_vectors(np.maximum, more, lanes)
            breaks = np.concatenate([[0], np.cumsum(np.diff(more) != 1)])
            in_a_row[axis, first:last] = breaks[lanes - 1:] == breaks[:last - first]
        self._fields = {
            "axes": len(tables), "tables": np.concatenate([np.empty(0, acc_dtype), *(x.reshape(-1) for x in tables)]),
            "table_at": np.cumsum([0, *(x.size for x in tables)]), "table_step": widths, "middle": widths // 2,
            "last": widths - lanes,
            "queries": np.concatenate(relative.coordinates(score.queries)) if tables else np.empty(0, np.int64),
            "keys": keys.reshape(-1), "keys_step": shape[1], "low": low.reshape(-1), "high": high.reshape(-1),
            "in_a_row": in_a_row.reshape(-1)}
        self._no_sums = np.empty(0, acc_dtype), np.empty(0), 0, np.zeros(len(tables), np.int64)

    def arguments(self, of_rows: Sequence[Array], sums: RelativeSums | None) -> RelativeArguments:
        """Give them for a thread that keeps its rows' part in these arrays, with a task's sums if there are any."""
        shift, place, sums_place = of_rows
        there = self._no_sums if sums is None else (sums.sums, sums.totals, sums.group, sums.at)
        return RelativeArguments(**self._fields, sums=there[0], totals=there[1], members=there[2],
                                 sums_at=there[3], shift=shift, place=place, sums_place=sums_place,
                                 rows=len(shift) // MOST_AXES)


def _of_vectors(least_or_most: np.ufunc, x: Array, lanes: int) -> Array:
    """Give the least, or most, of each `lanes` numbers that follow each other; `lanes` is a power of 2."""
    step = 1
    while step < lanes:
        x = least_or_most(x[:-step], x[step:])
        step *= 2
    return x


def _lanes(acc_dtype: np.dtype[Any]) -> int:
    return machine().vector_bytes // acc_dtype.itemsize
