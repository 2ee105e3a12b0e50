"""Masks: which keys a query sees, as half-open intervals of global key positions.

Disjoint intervals for each query, any number of them, whatever is combined, so every mask works with every layout
and every schedule, and no kernel knows what a mask is.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import MaskError, OptionError
from .keywords import explained
from .layout import Integers

Interval = tuple[Integers, Integers]
FAR = 2**61                   # farther than any sequence is long; sums of two stay within int64


def _whole(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise OptionError(f"mask: {name} expects an integer, got {value!r}")
    if number < -FAR or (number > FAR and name == "q_offset"):
        raise OptionError(f"mask: {name} expects an integer within ±2^61, got {number}")
    return int(number)


def _natural(name: str, value: Any) -> int:
    number = _whole(name, value)
    if number < 0:
        raise OptionError(f"mask: {name} expects an integer >= 0, got {number}")
    return min(number, FAR)


@dataclass(frozen=True, eq=False)
class Mask:
    """What a query at aligned position i sees of the keys j. Local.

    Query number t stands at ``i = t + offset``; `q_offset` sets the offset, by default the last query is
    aligned with the last key (``offset = n_k - n_q``, as in flash-attn). Query i sees key j iff all hold::

        j <= i  or  j < prefix                      (if causal)
        i - left <= j <= i + right  or  j < first   (if window)
        j is in the document of i                   (if documents)

    Parameters
    ----------
    causal : bool
        No key after the query.
    window : int, (int or None, int or None), optional
        ``(left, right)``: how many keys before and after i are visible; None is no limit; n means (n, n).
    documents : integer array of shape (n_documents + 1,), optional
        Offsets of packed documents in the keys, as flash-attn's ``cu_seqlens``: from 0, never decreasing; a document
        may be empty. Tokens from the last offset on are padding, in no document: as queries they see nothing (out 0,
        lse -inf), as keys nobody sees them. In a `KVCache` the last document may end beyond the keys there are, and a
        query may stand there too (`q_offset`): it sees those of its document.
    prefix : int, optional
        Keys before `prefix` are visible in spite of `causal` (prefix-LM). Widens only `causal`.
    first : int
        The first keys are visible in spite of `window` (attention sinks). Widens only `window`.
    q_offset : int, optional
        Position of query 0 among the keys, instead of aligning the ends.

    Raises
    ------
    OptionError
        If a number is negative or no integer.
    MaskError
        If the document offsets do not start at 0, or decrease.
    """

    causal: bool = False
    window: Any = None
    documents: Any = None
    prefix: int | None = None
    first: int = 0
    q_offset: int | None = None

    def __post_init__(self) -> None:
        fix = object.__setattr__
        fix(self, "causal", bool(self.causal))
        fix(self, "window", self._checked_window())
        fix(self, "documents", self._checked_documents())
        fix(self, "prefix", None if self.prefix is None else _natural("prefix", self.prefix))
        fix(self, "first", _natural("first", self.first))
        fix(self, "q_offset", None if self.q_offset is None else _whole("q_offset", self.q_offset))

    def _checked_window(self) -> tuple[int | None, int | None] | None:
        if self.window is None:
            return None
        pair = self.window if isinstance(self.window, Sequence) else (self.window, self.window)
        if len(pair) != 2:
            raise OptionError(f"mask: window expects (left, right) or one integer, got {self.window!r}")
        left, right = (None if side is None else _natural("window", side) for side in pair)
        return (left, right)

    def _checked_documents(self) -> Integers | None:
        if self.documents is None:
            return None
        offsets = np.asarray(self.documents)
        if offsets.ndim != 1 or offsets.size == 0 or offsets.dtype.kind not in "iu":
            raise MaskError("documents: expected integer offsets of shape (n_documents + 1,), "
                            f"got {offsets.dtype} of shape {offsets.shape}")
        if offsets[0] != 0 or np.any(offsets[1:] < offsets[:-1]):
            raise MaskError("documents: offsets must start at 0 and never decrease, "
                            f"got {np.array2string(offsets, threshold=8)}")
        offsets = offsets.astype(np.int64)
        offsets.flags.writeable = False
        return offsets

    def describe(self) -> dict[str, Any]:
        """Give the options as plain values, document offsets as their number and digest. Local."""
        options = asdict(self)
        if self.documents is not None:
            digest = hashlib.sha256(self.documents.tobytes()).hexdigest()
            options["documents"] = f"{len(self.documents) - 1} documents, sha256 {digest}"
        return options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(str(self.describe()))

    def check(self, n_k: int) -> None:
        """Raise `MaskError` unless the mask fits `n_k` keys. Local."""
        if self.documents is not None and self.documents[-1] > n_k:
            raise MaskError(f"documents: the last offset must be at most the number of keys, {n_k}, got "
                            f"{self.documents[-1]}")

    def offset(self, n_q: int, n_k: int) -> int:
        """Position of query 0 among the keys. Local."""
        return n_k - n_q if self.q_offset is None else self.q_offset

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
        i = np.asarray(queries, np.int64) + self.offset(n_q, n_k)
        low, high = self._document(i, n_k)
        if self.causal:
            high = np.minimum(high, np.maximum(i + 1, self.prefix or 0))
        if self.window is None:
            return [_interval(low, high)]
        left, right = self.window
        near = (low if left is None else np.maximum(low, i - left),
                high if right is None else np.minimum(high, i + right + 1))
        if not self.first:
            return [_interval(*near)]
        return [_interval(low, np.minimum(high, self.first)), _interval(np.maximum(near[0], self.first), near[1])]

    def _document(self, i: Integers, n_k: int) -> Interval:
        if self.documents is None:
            return np.zeros_like(i), np.full_like(i, n_k)
        offsets = self.documents
        number = np.searchsorted(offsets, i, side="right")            # of offsets up to i: empty documents are passed
        inside = (number > 0) & (number < len(offsets))
        edges = np.concatenate([[0], offsets, [0]])
        low, high = (np.where(inside, edges[n], 0) for n in (number, number + 1))
        return np.minimum(low, n_k), np.minimum(high, n_k)


Mask.__init__ = explained()(Mask.__init__)  # type: ignore[method-assign]      # the one that dataclass makes


def _interval(low: Integers, high: Integers) -> Interval:
    return low, np.maximum(low, high)
