"""What the queries of a block see, and how passes over such blocks are cut: made once, kept for the next of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...layout import Integers

KEPT_QUERIES = 1024         # times intervals, at most of a block whose cut is kept: what more take is not Python's time
KEPT_BLOCKS = 64            # whose cuts are kept


class Seen:
    """Which columns of a block its queries see.

    Attributes
    ----------
    begin, end : (intervals, n_q) int64
        Copies.
    first, last : int
        The columns that some query sees; both 0 if there are none.
    pairs : int
        Of queries and columns that they see.
    cuts : dict
        What passes over blocks with these queries have made, by all else that it depends on.
    """

    def __init__(self, begin: Integers, end: Integers) -> None:
        self.begin, self.end = (np.array(x, np.int64, order="C", ndmin=2) for x in (begin, end))
        seeing = self.end > self.begin
        some = bool(seeing.any())
        self.first = int(self.begin[seeing].min()) if some else 0
        self.last = int(self.end[seeing].max()) if some else 0
        self.pairs = int((self.end - self.begin)[seeing].sum())
        self.cuts: dict[Any, Any] = {}

    def intervals(self) -> list[Seen]:
        """Give what the queries see in each interval that any of them has."""
        if len(self.begin) == 1:
            return [self]
        each = [Seen(begin, end) for begin, end in zip(self.begin, self.end, strict=True)]
        return [seen for seen in each if seen.pairs]


class SeenBefore:
    """What queries have seen lately, to be found by its content. Local."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bytes, bytes], Seen] = {}

    def find(self, begin: Integers, end: Integers) -> Seen:
        """Give what queries see, with the cuts that were made of it; nobody else changes it."""
        if begin.size > KEPT_QUERIES:
            return Seen(begin, end)
        key = begin.shape[-1], begin.tobytes(), end.tobytes()
        seen = self._kept.get(key)
        if seen is None:
            if len(self._kept) >= KEPT_BLOCKS:
                self._kept.clear()
            seen = self._kept[key] = Seen(begin, end)
        return seen

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
