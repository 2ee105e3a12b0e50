"""The keys that score most for each query: their order, the same whoever has found them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layout import Integers

NO_KEY = np.iinfo(np.int64).max           # the position of a place that no key has taken, behind every key


def new_tops(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[NDArray[Any], Integers]:
    """Make scores and positions of queries that have met no key yet. Local."""
    return np.full(shape, -np.inf, dtype), np.full(shape, NO_KEY, np.int64)


def best(scores: NDArray[Any], positions: Integers, count: int) -> tuple[NDArray[Any], Integers]:
    """Give the first `count` keys along the last axis, of more: by score, the highest first, then by position. Local.

    NaN counts as infinity, so that it is not overlooked.
    """
    rank = np.where(np.isnan(scores), -np.inf, -scores)
    order = np.lexsort((positions, rank), axis=-1)[..., :count]
    return np.take_along_axis(scores, order, -1), np.take_along_axis(positions, order, -1)


def merge(scores: NDArray[Any], positions: Integers, other_scores: NDArray[Any], other_positions: Integers) -> None:
    """Put the best of two such arrays into the first. Local."""
    both = best(np.concatenate([scores, other_scores], -1), np.concatenate([positions, other_positions], -1),
                scores.shape[-1])
    scores[...], positions[...] = both
