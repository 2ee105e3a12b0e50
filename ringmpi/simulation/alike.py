"""Ranks that do the same at the same time: one of them stands for all."""

from __future__ import annotations

import numpy as np

from ..schedules.spec import divisors
from .wires import Integers, Numbers


class Alike:
    """Which ranks stand for which: some of the groups for all, and of these the first places for all. Local.

    Parameters
    ----------
    features : array of shape (n, groups, keys), optional
        All that tells ranks apart. Without it each stands for itself.
    """

    def __init__(self, features: Numbers | None = None) -> None:
        self._groups: Integers | None = None
        if features is None:
            return
        rows = features.transpose(1, 0, 2)
        self._groups, self._inverse = np.zeros(1, np.int64), np.zeros(1, np.int64)
        if len(rows) > 1:
            _, self._groups, self._inverse = np.unique(rows.reshape(len(rows), -1), axis=0, return_index=True,
                                                       return_inverse=True)
        some, keys = rows[self._groups], rows.shape[2]
        self._width = next(width for width in divisors(keys)
                           if (some.reshape(*some.shape[:2], -1, width) == some[:, :, None, :width]).all())
        self._times = keys // self._width

    def fold(self, x: Numbers) -> Numbers:
        """Give, of an array of shape (..., groups, keys), those that stand for all. Local."""
        return x if self._groups is None else x[..., self._groups, :self._width]

    def unfold(self, x: Numbers) -> Numbers:
        """Give each rank what the one has that stands for it. Local."""
        return x if self._groups is None else np.tile(x, self._times)[self._inverse.ravel()]
