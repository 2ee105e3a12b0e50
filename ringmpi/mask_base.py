"""The contract of a mask: which keys a query sees, as half-open intervals of global key positions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import OptionError
from .intervals import Interval
from .layout import Integers
from .relative import Axis

FAR = 2**61                   # farther than any sequence is long; sums of two stay within int64


class BaseMask:
    """What every mask does. Disjoint intervals for each query, any number of them. Local."""

    def describe(self) -> dict[str, Any]:
        """Give the options as plain values, arrays as their number and digest. Local."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BaseMask) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(str(self.describe()))

    def check(self, n_q: int, n_k: int) -> None:
        """Raise `MaskError` unless the mask fits so many queries and keys. Local."""
        raise NotImplementedError

    def check_growing(self) -> None:
        """Raise `OptionError` unless the mask has a meaning for a sequence that grows. Local."""
        raise OptionError("mask: this one is of a sequence that is there as a whole, and this one grows; "
                          "expected a ringmpi.Mask")

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the grid whose points queries and keys are, if they are."""
        return ()

    @property
    def left(self) -> int | None:
        """How many keys before it a query may see at most, but for the `first`; None: any."""
        return None

    @property
    def first(self) -> int:
        """How many of the first keys are visible whatever `left` says."""
        return 0

    @property
    def most(self) -> int:
        """How many intervals a query has at most."""
        raise NotImplementedError

    @property
    def per_element(self) -> bool:
        """Whether elements of a batch have masks of their own."""
        return False

    def of_elements(self, batch: int) -> list[tuple[BaseMask, Sequence[int]]]:
        """Give the masks of a batch, and which of its elements each is for. Local."""
        return [(self, range(batch))]

    def check_batch(self, batch: int | None) -> None:
        """Raise `MaskError` unless the mask fits a batch of so many elements; None: there is no batch axis. Local."""

    def positions(self, queries: ArrayLike, n_q: int, n_k: int) -> Integers:
        """Give the positions of queries among the keys. Local.

        Parameters
        ----------
        queries : integer array of shape (n,)
            Their global numbers ``0 .. n_q-1``.
        n_q, n_k : int
            Queries and keys in all.
        """
        return np.asarray(queries, np.int64) + (n_k - n_q)

    def farthest(self, n_q: int, n_k: int) -> int:
        """Give a number that no position is beyond, of a key or a query, on either side. Local."""
        return max(n_q, n_k) + abs(n_k - n_q)

    def bounds(self, queries: ArrayLike, n_q: int, n_k: int) -> list[Interval]:
        """Give the intervals of key positions that the queries see. Local.

        Parameters
        ----------
        queries : integer array of shape (n,)
            Global numbers ``0 .. n_q-1`` of the queries asked about.
        n_q, n_k : int
            Queries and keys in all.

        Returns
        -------
        list of (lo, hi)
            Pairs of int64 arrays of shape (n,), within ``0 .. n_k``: a query sees ``lo <= j < hi`` of each. There may
            be any number of pairs, each with an interval for every query. The intervals of a query are disjoint, for
            a key in two of them would count twice, and ascend; one that is empty has ``hi == lo``.
        """
        raise NotImplementedError


def whole(name: str, value: Any) -> int:
    """Take an integer, or raise `OptionError`. Local."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise OptionError(f"mask: {name} expects an integer, got {value!r}")
    if number < -FAR or (number > FAR and name == "q_offset"):
        raise OptionError(f"mask: {name} expects an integer within ±2^61, got {number}")
    return int(number)


def natural(name: str, value: Any) -> int:
    """Take an integer from 0 on, cut off where nothing is longer, or raise `OptionError`. Local."""
    number = whole(name, value)
    if number < 0:
        raise OptionError(f"mask: {name} expects an integer >= 0, got {number}")
    return min(number, FAR)
