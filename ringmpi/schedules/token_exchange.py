"""Tokens from one layout to another within a call, of several arrays at once; see `redistribution` for whole calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..device import Device
from ..layout import Integers, Layout
from ..trace import Trace
from .group_exchange import GroupExchange
from .links import Array, assign
from .row_exchange import row_numbers

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

    def move(self, what: str, arrays: Sequence[Array], move: Move, device: Device | None, trace: Trace) -> list[Array]:
        """Move the tokens of some arrays. Collective over the group.

        Parameters
        ----------
        what : str
            Is moved.
        arrays : sequence of arrays of shape (batch, n, ...)
            Of this rank before.
        move : Move
        device : Device, optional
            The GPU that the arrays are on; None: the host.
        trace : Trace

        Returns
        -------
        list of arrays of shape (batch, n, ...)
            Of this rank afterwards; those given themselves if it keeps what it has.
        """
        if move.stays:
            return list(arrays)
        index = self.group.index
        outgoing = [[_taken(x, rows, device) for x in arrays] for rows in move.going]
        incoming = [[((len(x), count, *x.shape[2:]), x.dtype) for x in arrays] for count in move.counts]
        self.start(what, outgoing, incoming, trace)
        empty = np.empty if device is None else device.empty
        shapes = [(len(x), sum(move.counts), *x.shape[2:]) for x in arrays]
        moved = [empty(shape, x.dtype) for shape, x in zip(shapes, arrays, strict=True)]
        pieces = ((member, outgoing[index] if member == index else self.take(member))
                  for member in (index, *self.others))
        if device is None or all(isinstance(rows, slice) for rows in move.coming):
            for member, theirs in pieces:
                for target, piece in zip(moved, theirs, strict=True):
                    _put(target, move.coming[member], piece)
        else:
            _put_in_order(moved, pieces, move, device)
        self.end()
        return moved


def _put(target: Array, rows: Rows, piece: Array) -> None:
    """Put tokens into an array."""
    if isinstance(rows, slice):
        assign(target[:, rows], piece)
    else:
        bits = f"u{target.dtype.itemsize}"
        target.view(bits)[:, rows] = piece.view(bits)


def _put_in_order(targets: Sequence[Array], pieces: Iterable[tuple[int, Sequence[Array]]], move: Move, device: Device
                  ) -> None:
    """Put the tokens of all members into arrays on a GPU: one after the other first, and then in their order."""
    gathered = [device.empty(x.shape, x.dtype) for x in targets]
    order = np.empty(targets[0].shape[:2], np.int64)
    done = 0
    for member, theirs in pieces:
        count = len(order) * move.counts[member]
        order[:, move.coming[member]] = np.arange(done, done + count).reshape(len(order), move.counts[member])
        for x, piece in zip(gathered, theirs, strict=True):
            assign(_lines(x)[done:done + count].reshape(piece.shape), piece)
        done += count
    for target, x in zip(targets, gathered, strict=True):
        device.take_rows(_lines(target), _lines(x), order.reshape(-1))


def _taken(x: Array, rows: Rows, device: Device | None) -> Array:
    """Give tokens of an array: a view if they are equally far apart."""
    if device is None or isinstance(rows, slice):
        return x[:, rows]
    taken = device.empty((len(x), len(rows), *x.shape[2:]), x.dtype)
    numbers = np.arange(len(x))[:, None] * x.shape[1] + rows
    device.take_rows(_lines(taken), _lines(device.contiguous(x)), numbers.reshape(-1))
    return taken


def _lines(x: Array) -> Array:
    """View a contiguous array with one axis for elements of the batch and tokens."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _as_slice(rows: Integers) -> Rows:
    """Give numbers that increase as a slice, if they do so in equal steps."""
    if len(rows) < 2:
        return slice(int(rows[0]), int(rows[0]) + 1) if len(rows) else slice(0)
    steps = np.diff(rows)
    return slice(int(rows[0]), int(rows[-1]) + 1, int(steps[0])) if (steps == steps[0]).all() else rows
