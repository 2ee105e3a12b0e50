"""Tokens from one layout to another within a call, of several arrays at once; see `redistribution` for whole calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..layout import Integers, Layout
from ..trace import Trace
from .group_exchange import GroupExchange
from .links import Array, assign
from .row_exchange import row_numbers

Empty = Callable[[tuple[int, ...], Any], Array]
Rows = slice | Integers


class Move(NamedTuple):
    """Which tokens of this rank go where, and which come from where.

    Attributes
    ----------
    going, coming : list of (slice or int array)
        For each rank, which of this rank's tokens before go there, and which of those afterwards come from there.
    counts : list of int
        Tokens that come from each rank.
    stays : bool
        Whether this rank keeps what it has.
    """

    going: list[Rows]
    coming: list[Rows]
    counts: list[int]
    stays: bool

    @classmethod
    def between(cls, old: Layout, new: Layout, rank: int) -> Move:
        """Give the move from one layout to another, as a rank sees it. Local."""
        going, coming = row_numbers(old, new, rank), row_numbers(new, old, rank)
        counts = [len(rows) for rows in coming]
        stays = counts[rank] == old.counts[rank] == new.counts[rank]
        return cls([_as_slice(rows) for rows in going], [_as_slice(rows) for rows in coming], counts, stays)


class TokenExchange(GroupExchange):
    """An exchange of tokens among all ranks; see `GroupExchange`."""

    def move(self, what: str, arrays: Sequence[Array], move: Move, empty: Empty, trace: Trace) -> list[Array]:
        """Move the tokens of some arrays. Collective over the group.

        Parameters
        ----------
        what : str
            Is moved.
        arrays : sequence of arrays of shape (batch, n, ...)
            Of this rank before.
        move : Move
        empty : callable
            Makes an array of a shape and a dtype where the arrays are.
        trace : Trace

        Returns
        -------
        list of arrays of shape (batch, n, ...)
            Of this rank afterwards; those given themselves if it keeps what it has.
        """
        if move.stays:
            return list(arrays)
        index = self.group.index
        outgoing = [[x[:, rows] for x in arrays] for rows in move.going]
        incoming = [[((len(x), count, *x.shape[2:]), x.dtype) for x in arrays] for count in move.counts]
        self.start(what, outgoing, incoming, trace)
        moved = [empty((len(x), sum(move.counts), *x.shape[2:]), x.dtype) for x in arrays]
        for member in (index, *self.others):
            pieces = outgoing[index] if member == index else self.take(member)
            for target, piece in zip(moved, pieces, strict=True):
                _put(target, move.coming[member], piece)
        self.end()
        return moved


def _put(target: Array, rows: Rows, piece: Array) -> None:
    """Put tokens into an array."""
    if isinstance(rows, slice):
        assign(target[:, rows], piece)
    else:
        bits = f"u{target.dtype.itemsize}"
        target.view(bits)[:, rows] = piece.view(bits)


def _as_slice(rows: Integers) -> Rows:
    """Give numbers that increase as a slice, if they do so in equal steps."""
    if len(rows) < 2:
        return slice(int(rows[0]), int(rows[0]) + 1) if len(rows) else slice(0)
    steps = np.diff(rows)
    return slice(int(rows[0]), int(rows[-1]) + 1, int(steps[0])) if (steps == steps[0]).all() else rows
