"""Keys that a bias of -inf leaves out: which queries see others, by a bit that all ranks give for each key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import Layout
from .plan import Plan

Bits = NDArray[np.uint8]


def bits_of(key_bias: NDArray[Any]) -> Bits:
    """Say which keys of this rank are not left out, a bit for each. Local.

    Parameters
    ----------
    key_bias : array of shape (batch, n_k, heads or 1)
        On the host.
    """
    return np.packbits(np.moveaxis(~np.isneginf(key_bias), 1, 2), axis=2).reshape(-1)


def seen_by_heads(plan: Plan, layout: Layout, bits: Sequence[Bits], heads: int) -> list[NDArray[np.bool_]]:
    """Say which rows see any key that is not left out. Local.

    Parameters
    ----------
    plan : Plan
    layout : Layout
        Of the keys, which may be some of a longer sequence.
    bits : for each rank, what `bits_of` gives
    heads : int
        That have a bias of their own; 1 if it is that of all.

    Returns
    -------
    for each element of the batch, a bool array of shape (rows, heads)
        Of the rows and heads that this rank finishes.
    """
    own = slice(plan.own_rows)
    tables = [part.reshape(plan.batch, heads, -(-count // 8)) for part, count in zip(bits, layout.counts, strict=True)]
    mine = range(1) if heads == 1 else range(plan.share.queries.start, plan.share.queries.stop)
    positions = [layout.positions(rank) for rank in range(len(tables))]
    first = min((int(there[0]) for there in positions if len(there)), default=0)
    last = max((int(there[-1]) + 1 for there in positions if len(there)), default=0)
    found = []
    for element, bounds in enumerate(plan.of_elements(plan.bounds)):
        seen = np.zeros((plan.own_rows, len(mine)), bool)
        for column, head in enumerate(mine):
            # Keys from the first to before a position that are not left out.
            below = np.zeros(last - first + 1, np.int32 if last - first < 2**31 else np.int64)
            for table, there in zip(tables, positions, strict=True):
                below[1:][there - first] = np.unpackbits(table[element, head], count=len(there))
            np.cumsum(below, out=below)
            for rows in bounds.pieces(own):
                for edges in bounds.of(rows):
                    low, high = (np.clip(edge, first, last) - first for edge in edges)
                    seen[rows, column] |= np.greater(below[high], below[low])
        found.append(np.ascontiguousarray(np.broadcast_to(seen, (plan.own_rows, plan.dims[0]))))
    return found
