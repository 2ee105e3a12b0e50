"""Queries of the ranks that share them, and their results home: each computes with the queries of all of them.

This rank's own rows come first, then those of the others in the order in which they are heard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..trace import Trace
from .group_exchange import GroupExchange
from .links import Array, assign

Empty = Callable[[tuple[int, ...], Any], Array]


class QueryExchange(GroupExchange):
    """An exchange of queries among the ranks that share them, and of their results; see `GroupExchange`."""

    def rows(self, counts: Sequence[int]) -> dict[int, slice]:
        """Say where each member's rows are, this one's first, from how many each has. Local."""
        rows = {}
        start = 0
        for member in (self.group.index, *self.others):
            rows[member] = slice(start, start + counts[member])
            start += counts[member]
        return rows

    def ask(self, arrays: Sequence[Array], counts: Sequence[int], empty: Empty, trace: Trace) -> list[Array]:
        """Start to exchange queries; give arrays that hold this rank's rows so far. Collective over the group.

        Parameters
        ----------
        arrays : sequence of arrays of shape (batch, n, ...)
            Of this rank.
        counts : sequence of int
            Rows of each member.
        empty : callable
            Makes an array of a shape and a dtype where the arrays are.
        trace : Trace

        Returns
        -------
        list of arrays of shape (batch, all rows, ...)
            The arrays given, if this rank shares queries with no other. `hear` fills in the rows of the others.
        """
        if self.group.size == 1:
            return list(arrays)
        gathered = [empty((len(x), sum(counts), *x.shape[2:]), x.dtype) for x in arrays]
        kinds = [[((len(x), n, *x.shape[2:]), x.dtype) for x in arrays] for n in counts]
        self.start("queries", [arrays], kinds, trace)
        for target, x in zip(gathered, arrays, strict=True):
            assign(target[:, :x.shape[1]], x)
        return gathered

    def hear(self, gathered: Sequence[Array], counts: Sequence[int]) -> None:
        """Fill in the rows of the other members. Local, but for the wait."""
        if self.group.size == 1:
            return
        rows = self.rows(counts)
        for member in self.others:
            for target, x in zip(gathered, self.take(member), strict=True):
                assign(target[:, rows[member]], x)
        self.end()

    def bring_home(self, what: str, results: Sequence[Array], counts: Sequence[int],
                   combine: Callable[[tuple[Array, ...]], None], trace: Trace) -> None:
        """Send each member what was made of its rows, and combine what the others made of this rank's.

        Collective over the group. In the order in which members are heard, so results do not depend on who is late.

        Parameters
        ----------
        what : str
            Is sent: "states".
        results : sequence of arrays of shape (all rows, ...)
        counts
            See `ask`.
        combine : callable
            Takes what a member has made of this rank's rows, in arrays of shape (n, ...).
        trace : Trace
        """
        if self.group.size == 1:
            return
        rows = self.rows(counts)
        own = counts[self.group.index]
        kinds = [[((own, *x.shape[1:]), x.dtype) for x in results]] * self.group.size
        self.start(what, [[x[rows[member]] for x in results] for member in range(self.group.size)], kinds, trace)
        for member in self.others:
            combine(self.take(member))
        self.end()
