"""Sums over the weights of a block in NumPy, tile by tile: what the backend's loops over weights do with each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layout import Integers
from .heaviest import NO_KEY, merge
from .strided import for_products

Array = NDArray[Any]


def tile_scores(q: Array, k: Array, tile: Any, dtype: np.dtype[Any]) -> Array:
    """Give the scores of a tile of one key head, (rows, group, columns): q (rows, group, dim), k (columns, dim)."""
    q, k = (for_products(x, dtype) for x in (q, k))
    with np.errstate(all="ignore"):       # NaN and infinity pass through to the rows that see them
        scores: Array = ((q * dtype.type(tile.score.scale)).reshape(-1, q.shape[2]) @ k.T).reshape(*q.shape[:2], len(k))
        tile.apply_score(scores)
    return scores


def tile_weights(q: Array, k: Array, lse: Array, tile: Any) -> tuple[Array, Array]:
    """Give the weights of a tile, and their logarithms; both are 0 where nothing is seen.

    Rounding alone can put a score above lse, by much where scores are huge: a weight is at most 1.
    """
    logarithms = tile_scores(q, k, tile, lse.dtype)
    with np.errstate(all="ignore"):
        logarithms -= lse[..., None]
        np.minimum(logarithms, 0, out=logarithms)
        weights = np.exp(logarithms)
    if not tile.full:
        np.copyto(weights, 0, where=tile.hidden)
        np.copyto(logarithms, 0, where=tile.hidden)
    return weights, logarithms


def add_columns(sums: NDArray[np.float64], lse: Array) -> Callable[..., None]:
    """Make what `Backend.column_sums` does with a tile. Local."""
    def add(q: Array, k: Array, tile: Any, thread: int) -> None:
        weights, _ = tile_weights(q, k, lse[tile.rows, tile.heads], tile)
        sums[tile.columns, tile.heads] += weights.sum(axis=0, dtype=np.float64).T
    return add


def add_rows(sums: NDArray[np.float64], lse: Array, values: NDArray[np.float64]) -> Callable[..., None]:
    """Make what `Backend.row_sums` does with a tile. Local."""
    base = values[0] if len(values) else 0.0
    less = (values - base).astype(lse.dtype)

    def add(q: Array, k: Array, tile: Any, thread: int) -> None:
        weights, logarithms = tile_weights(q, k, lse[tile.rows, tile.heads], tile)
        mine = sums[tile.rows, tile.heads]
        mass = weights.sum(axis=2, dtype=np.float64)
        mine[..., 0] += mass
        mine[..., 2] += weights @ less[tile.columns] + base * mass
        np.copyto(logarithms, 0, where=weights == 0)             # 0 log 0 is 0
        weights *= logarithms
        mine[..., 1] -= weights.sum(axis=2, dtype=np.float64)
    return add


def keep_tops(scores: Array, positions: Integers, keys: Integers) -> Callable[..., None]:
    """Make what `Backend.row_tops` does with a tile. Local."""
    def keep(q: Array, k: Array, tile: Any, thread: int) -> None:
        x = tile_scores(q, k, tile, scores.dtype)
        here = np.broadcast_to(keys[tile.columns], x.shape).copy()
        if not tile.full:
            np.copyto(x, -np.inf, where=tile.hidden)
            np.copyto(here, NO_KEY, where=tile.hidden)
        merge(scores[tile.rows, tile.heads], positions[tile.rows, tile.heads], x, here)
    return keep


def write_weights(weights: Array, lse: Array) -> Callable[..., None]:
    """Make what `Backend.row_weights` does with a tile. Local."""
    def write(q: Array, k: Array, tile: Any, thread: int) -> None:
        made, _ = tile_weights(q, k, lse[tile.rows, tile.heads], tile)
        target = weights[tile.rows, tile.heads, tile.columns]
        np.copyto(target, made, where=True if tile.full else ~tile.hidden)
    return write
