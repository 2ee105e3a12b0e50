"""The weights of a few chosen queries over all keys, some keys at a time: each rank has those of its own keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_host_array
from ..backends.base import Backend
from ..bounds import Bounds
from ..call import Array, Call
from ..errors import OptionError
from ..layout import Integers, Layout
from ..score import Score

PIECE_BYTES = 2**26        # of weights at a time


@dataclass
class ChosenRows:
    """Chosen queries, the same on all ranks, and the keys of this rank.

    Attributes
    ----------
    call : Call
        Has the keys.
    q, lse : arrays of shape (batch, chosen, heads, dim) and (batch, chosen, heads)
    bounds : list of Bounds
        What they see, for each mask that elements of the batch have.
    layout : Layout
        Of the keys.
    rank : int
    score : Score
        Without their positions and bias.
    """

    call: Call
    q: Array
    lse: Array
    bounds: list[Bounds]
    layout: Layout
    rank: int
    score: Score

    def pieces(self, backend: Backend) -> Iterator[tuple[Integers, NDArray[Any]]]:
        """Yield positions of keys, (m,), and the weights that they have, (batch, chosen, heads, m). Local."""
        k = self.call.k
        positions = self.layout.positions(self.rank)
        step = max(1, PIECE_BYTES // max(1, self.lse.nbytes))
        for start in range(0, len(positions), step):
            stop = min(start + step, len(positions))
            weights = np.zeros((*self.lse.shape, stop - start), self.lse.dtype)
            for bounds in self.bounds:
                score = with_queries(self.score, bounds.positions(slice(None))).of_keys(positions[start:stop])
                for low, high in bounds.of(slice(None)):
                    begin, end = (np.clip(self.layout.count_below(edge, self.rank), start, stop) - start
                                  for edge in (low, high))
                    for i in bounds.elements:
                        bias = None if self.call.key_bias is None else self.call.key_bias[i, start:stop]
                        for _ in backend.row_weights(weights[i], self.q[i], k[i, start:stop], self.lse[i], begin, end,
                                                     score.of_key_bias(bias)):
                            pass
            yield positions[start:stop], weights


def check_chosen(chosen: Any) -> Integers:
    """Take the positions of chosen queries, or raise `OptionError`. Local."""
    numbers = as_host_array(chosen if hasattr(chosen, "dtype") else np.asarray(chosen), "chosen")
    if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu":
        raise OptionError(f"chosen: expected positions of queries, integers in one axis, got {numbers.dtype} of shape "
                          f"{numbers.shape}")
    return numbers.astype(np.int64)


def check_range(chosen: Integers, length: int) -> None:
    """Raise `OptionError`, the same on all ranks, unless there are all these queries. Local."""
    wrong = (chosen < 0) | (chosen >= length)
    if wrong.any():
        raise OptionError(f"chosen: expected positions from 0 to {length - 1}, got {chosen[wrong.argmax()]}")


def held(positions: Integers, chosen: Integers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give which of the chosen queries a rank holds, and where, by the positions of its queries. Local."""
    places = np.searchsorted(positions, chosen)
    inside = places < len(positions)
    inside[inside] = positions[places[inside]] == chosen[inside]
    which = np.flatnonzero(inside)
    return which, places[which]


def put_together(shares: Sequence[NDArray[np.uint8]], found: Sequence[NDArray[np.int64]], like: Array, count: int
                 ) -> Array:
    """Make an array of all chosen rows, (batch, chosen, ...), of what each rank has of them. Local."""
    whole = np.empty((len(like), count, *like.shape[2:]), like.dtype)
    for share, which in zip(shares, found, strict=True):
        whole[:, which] = share.view(like.dtype).reshape(len(like), len(which), *like.shape[2:])
    return whole


def with_queries(score: Score, positions: Integers) -> Score:
    """Give the score of queries at some positions. Local."""
    return replace(score, queries=positions) if score.positional else score
