"""Masks: which keys a query sees, as half-open intervals of global key positions.

Disjoint intervals for each query, any number of them, whatever is combined, so every mask works with every layout
and every schedule, and no kernel knows what a mask is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .documents import Documents, NumberedTokens
from .errors import MaskError, OptionError
from .intervals import Interval, compact, intersect, unite, within
from .keywords import explained
from .layout import Integers
from .mask_base import BaseMask, natural, whole

# Options that are arrays, which a job reads from the datasets of these names.
ARRAYS = ("documents", "q_documents", "document_ids", "prompts", "parents", "spans", "key_mask")
RANGES = ("prompts", "spans")  # of them, whose items are half-open ranges


def _integers(name: str, value: Any, shape: str) -> Integers | None:
    """Take an array of integers of a shape that is written as ``(n, 2)``, or None."""
    if value is None:
        return None
    axes = shape.strip("(),").split(", ")
    try:
        array = np.asarray(value)
    except ValueError as error:                # rows of unequal lengths
        raise MaskError(f"{name}: expected integers of shape {shape}: {error}") from None
    if array.size == 0:
        array = array.astype(np.int64).reshape(0, *map(int, axes[1:])) if array.ndim <= len(axes) else array
    if array.dtype.kind not in "iu" or array.ndim != len(axes) or (len(axes) > 1 and array.shape[1] != int(axes[1])):
        raise MaskError(f"{name}: expected integers of shape {shape}, got {array.dtype} of shape {array.shape}")
    if array.max(initial=0) > np.iinfo(np.int64).max:
        raise MaskError(f"{name}: expected integers below 2^63, got {array.max()}")
    integers: Integers = array.astype(np.int64)
    integers.flags.writeable = False
    return integers


def _offsets(name: str, value: Any) -> Integers | None:
    """Take offsets that start at 0 and never decrease, or None."""
    offsets = _integers(name, value, "(n_documents + 1,)")
    if offsets is not None and (offsets.size == 0 or offsets[0] != 0 or np.any(offsets[1:] < offsets[:-1])):
        raise MaskError(f"{name}: offsets must start at 0 and never decrease, got "
                        f"{np.array2string(offsets, threshold=8)}")
    return offsets


def _spans(value: Any) -> Integers | None:
    """Take half-open ranges that do not overlap, in ascending order and without empty ones, or None."""
    spans = _integers("spans", value, "(n_spans, 2)")
    if spans is None:
        return None
    low, high = spans.T
    if (low < 0).any() or (high < low).any():
        wrong = np.flatnonzero((low < 0) | (high < low))[0]
        raise MaskError(f"spans: expected 0 <= start <= stop, got {spans[wrong].tolist()}")
    some = spans[high > low]
    ordered: Integers = some[np.argsort(some[:, 0], kind="stable")]
    overlap = np.flatnonzero(ordered[1:, 0] < ordered[:-1, 1])
    if len(overlap):
        one, other = ordered[overlap[0]:overlap[0] + 2].tolist()
        raise MaskError(f"spans: expected ranges that do not overlap, got {one} and {other}")
    ordered.flags.writeable = False
    return ordered


def _keys(value: Any) -> int | Integers | None:
    """Take a number of keys, or one for each element of a batch, or None."""
    if value is None:
        return None
    if not isinstance(value, (Sequence, np.ndarray)) or (isinstance(value, np.ndarray) and not value.ndim):
        return natural("keys", value)
    lengths = _integers("keys", value, "(batch,)")
    if lengths is not None and lengths.min(initial=0) < 0:
        raise OptionError(f"mask: keys expects integers >= 0, got {lengths.min()}")
    return lengths


def _flags(value: Any) -> NDArray[np.bool_] | None:
    """Take which keys there are, as booleans or 0 and 1, or None."""
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except ValueError as error:                # rows of unequal lengths
        raise MaskError(f"key_mask: expected booleans of shape (n_k,): {error}") from None
    if array.ndim != 1 or not (array.dtype.kind == "b" or array.size == 0 or
                               (array.dtype.kind in "iu" and np.isin(array, (0, 1)).all())):
        raise MaskError(f"key_mask: expected booleans of shape (n_k,), True for keys that may be seen, got "
                        f"{array.dtype} of shape {array.shape}")
    flags: NDArray[np.bool_] = array.astype(np.bool_)
    flags.flags.writeable = False
    return flags


@dataclass(frozen=True, eq=False)
class Mask(BaseMask):
    """What a query at aligned position i sees of the keys j. Local.

    Query number t stands at ``i = t + offset``; `q_offset` sets the offset, by default the last query is
    aligned with the last key (``offset = n_k - n_q``, as in flash-attn). Query i sees key j iff all hold::

        j <= i  or  j < prefix                      (if causal)
        i - left <= j <= i + right  or  j < first   (if window)
        j is in the document of i, in one that it goes on from, or in its prompt      (if documents)

    and whatever else holds, if i and j are in one of the spans. Nobody sees a key that `keys` or `key_mask` leave out.

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
        Position of query 0 among the keys, instead of aligning the ends. With documents, and another number of queries
        than of keys, it has to be said, or `q_documents`.
    spans : integer array of shape (n_spans, 2), optional
        Half-open ranges of positions that do not overlap. Inside a span everybody sees everybody, whatever the rest
        says: an image within causal text, the question of each document.
    prompts : integer array of shape (n_documents, 2), optional
        A half-open range of keys that each document sees besides itself, -1 and -1 for none: many answers to one
        prompt, which is there once, see it and not each other. `causal` and `window` hold for them by their positions.
    parents : integer array of shape (n_documents,), optional
        The document that each goes on from, -1 for a root: a document sees its ancestors too.
    document_ids : integer array of shape (n_k,), optional
        Instead of `documents` a number for each key: equal numbers are one document, in however many places; below 0
        is padding.
    q_documents : integer array of shape (n_documents + 1,), optional
        Offsets of the documents in the queries, as flash-attn's ``cu_seqlens_q``, where they differ from those in the
        keys: the last query of a document is aligned with its last key.
    keys : int, or integer array of shape (batch,), optional
        How many keys there are, or how many for each element of the batch: those from there on are padding, which
        nobody sees.
    key_mask : bool array of shape (n_k,), optional
        False for keys that nobody sees. Each run of others costs a pass over them: `key_bias` is faster if they are
        many.

    Raises
    ------
    OptionError
        If a number is negative or no integer, or two options do not go together.
    MaskError
        If the document offsets do not start at 0, or decrease; if spans overlap; if prompts or parents are not those
        of the documents, or a document would be its own ancestor; if `key_mask` is not of booleans.
    """

    causal: bool = False
    window: Any = None
    documents: Any = None
    prefix: int | None = None
    first: int = 0
    q_offset: int | None = None
    spans: Any = None
    prompts: Any = None
    parents: Any = None
    document_ids: Any = None
    q_documents: Any = None
    keys: Any = None
    key_mask: Any = None

    def __post_init__(self) -> None:
        fix = object.__setattr__
        fix(self, "causal", bool(self.causal))
        fix(self, "window", self._checked_window())
        fix(self, "documents", _offsets("documents", self.documents))
        fix(self, "prefix", None if self.prefix is None else natural("prefix", self.prefix))
        fix(self, "first", natural("first", self.first))
        fix(self, "q_offset", None if self.q_offset is None else whole("q_offset", self.q_offset))
        fix(self, "spans", _spans(self.spans))
        fix(self, "prompts", _integers("prompts", self.prompts, "(n_documents, 2)"))
        fix(self, "parents", _integers("parents", self.parents, "(n_documents,)"))
        fix(self, "document_ids", _integers("document_ids", self.document_ids, "(n_k,)"))
        fix(self, "q_documents", _offsets("q_documents", self.q_documents))
        fix(self, "keys", _keys(self.keys))
        fix(self, "key_mask", _flags(self.key_mask))
        self._check_together()
        _ = self._packed                      # prompts and parents are checked there

    def _check_together(self) -> None:
        """Raise `OptionError` about options of documents that do not go together."""
        for name in ("prompts", "parents", "q_documents"):
            if getattr(self, name) is not None and self.documents is None:
                raise OptionError(f"mask: {name} belongs to documents: expected their offsets, documents=, got none")
        for one, other in (("documents", "document_ids"), ("q_documents", "q_offset")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise OptionError(f"mask: expected {one} or {other}, got both")
        if self.q_documents is not None and len(self.q_documents) != len(self.documents):
            raise MaskError(f"q_documents: expected an offset for each of documents, {len(self.documents)}, got "
                            f"{len(self.q_documents)}")

    def _checked_window(self) -> tuple[int | None, int | None] | None:
        if self.window is None:
            return None
        pair = self.window if isinstance(self.window, Sequence) else (self.window, self.window)
        if len(pair) != 2:
            raise OptionError(f"mask: window expects (left, right) or one integer, got {self.window!r}")
        left, right = (None if side is None else natural("window", side) for side in pair)
        return (left, right)

    def describe(self) -> dict[str, Any]:
        """Give the options as plain values, document offsets as their number and digest. Local."""
        options = {part.name: getattr(self, part.name) for part in fields(self)}
        for name in ARRAYS:
            if options[name] is not None:
                array = options[name]
                number = len(array) - 1 if name in ("documents", "q_documents") else len(array)
                digest = hashlib.sha256(array.tobytes()).hexdigest()
                options[name] = f"{number} {name}, sha256 {digest}"
        if self.per_element:
            options["keys"] = self.keys.tolist()
        return options

    def check(self, n_q: int, n_k: int) -> None:
        """Raise `MaskError` unless the mask fits so many queries and keys. Local."""
        for name, last, most, of in (("documents", self.documents, n_k, "keys"),
                                     ("q_documents", self.q_documents, n_q, "queries")):
            if last is not None and last[-1] > most:
                raise MaskError(f"{name}: the last offset must be at most the number of {of}, {most}, got {last[-1]}")
        if self.document_ids is not None and len(self.document_ids) != n_k:
            raise MaskError(f"document_ids: expected one for each of {n_k} keys, got {len(self.document_ids)}")
        if self.key_mask is not None and len(self.key_mask) != n_k:
            raise MaskError(f"key_mask: expected one for each of {n_k} keys, got {len(self.key_mask)}")
        if self.keys is not None and np.max(self.keys, initial=0) > n_k:
            raise MaskError(f"keys: expected at most the {n_k} keys there are, got {np.max(self.keys)}")
        if self.prompts is not None and self.prompts.max(initial=0) > n_k:
            raise MaskError(f"prompts: expected ranges of {n_k} keys, got one that ends at {self.prompts.max()}")
        if self.spans is not None and self.spans.max(initial=0) > n_k:
            raise MaskError(f"spans: expected ranges of {n_k} keys, got one that ends at {self.spans.max()}")
        if self._packed is not None and n_q != n_k and self.q_offset is None and self.q_documents is None:
            raise MaskError(f"documents: expected as many queries as keys, got {n_q} and {n_k}; say where the queries "
                            f"are: q_documents=, or q_offset={n_k - n_q} if the last one stands at the last key")

    def check_growing(self) -> None:
        """Raise `OptionError` unless the mask has a meaning for a sequence that grows. Local."""
        for name in ("document_ids", "q_documents", "keys", "key_mask"):
            if getattr(self, name) is not None:
                raise OptionError(f"mask: {name} is of a sequence that is there as a whole, and this one grows; "
                                  "expected documents, whose last one may go on")

    @property
    def left(self) -> int | None:
        """How many keys before it a query may see at most, but for the `first`; None: any."""
        return None if self.window is None or self.q_offset is not None or self.spans is not None else self.window[0]

    @property
    def most(self) -> int:
        """How many intervals a query has at most."""
        both = (2 if self.window is not None and self.first else 1) + (self._packed.most - 1 if self._packed else 0)
        both += 0 if self.spans is None else 2
        return both if self._runs is None else both * max(1, len(self._runs[0]))

    @property
    def per_element(self) -> bool:
        """Whether elements of a batch have masks of their own, by `keys`."""
        return self.keys is not None and not isinstance(self.keys, int)

    def of_elements(self, batch: int) -> list[tuple[BaseMask, Sequence[int]]]:
        """Give the masks of a batch, and which of its elements each is for; see `BaseMask.of_elements`. Local."""
        if not self.per_element:
            return [(self, range(batch))]
        lengths, numbers = np.unique(self.keys, return_inverse=True)
        return [(replace(self, keys=int(length)), np.flatnonzero(numbers == number).tolist())
                for number, length in enumerate(lengths)]

    def check_batch(self, batch: int | None) -> None:
        """Raise `MaskError` unless `keys` fits a batch; see `BaseMask.check_batch`. Local."""
        if self.per_element and batch != len(self.keys):
            raise MaskError(f"keys: expected a number for each element of the batch, got {len(self.keys)} and "
                            f"{'arrays without a batch axis' if batch is None else f'a batch of {batch}'}")

    @cached_property
    def _packed(self) -> Documents | NumberedTokens | None:
        """The documents, if there are any."""
        if self.document_ids is not None:
            return NumberedTokens(self.document_ids)
        return None if self.documents is None else Documents(self.documents, self.prompts, self.parents)

    @cached_property
    def _runs(self) -> Interval | None:
        """The stretches of keys that there are, by `key_mask` and `keys`: their starts and stops; None: all keys."""
        keys = None if self.per_element else self.keys                   # else each of `of_elements` has its own
        if self.key_mask is None:
            return None if keys is None else (np.zeros(1, np.int64), np.array([keys], np.int64))
        edges = np.flatnonzero(np.diff(self.key_mask.astype(np.int8), prepend=0, append=0))
        starts, stops = edges[::2], edges[1::2]
        if keys is None:
            return starts, stops
        there = starts < keys
        return starts[there], np.minimum(stops[there], keys)

    def positions(self, queries: ArrayLike, n_q: int, n_k: int) -> Integers:
        """Give the positions of queries among the keys; see `BaseMask.positions`. Local."""
        numbers = np.asarray(queries, np.int64)
        if self.q_documents is None:
            return numbers + (n_k - n_q if self.q_offset is None else self.q_offset)
        _, ends = self._numbered(numbers)
        return numbers + ends

    def farthest(self, n_q: int, n_k: int) -> int:
        """Give a number that no position is beyond, of a key or a query, on either side. Local."""
        if self.q_documents is not None:
            return n_q + n_k
        return max(n_q, n_k) + abs(n_k - n_q if self.q_offset is None else self.q_offset)

    def bounds(self, queries: ArrayLike, n_q: int, n_k: int) -> list[Interval]:
        """Give the intervals of key positions that the queries see; see `BaseMask.bounds`. Local."""
        i = self.positions(queries, n_q, n_k)
        seen = self._near(i, n_k)
        if self._packed is not None:
            number = self._packed.of_positions(i) if self.q_documents is None else self._numbered(queries)[0]
            seen = intersect(self._packed.seen(number, n_k), seen)
        if self.spans is not None:
            seen = unite(seen, self._span(i, n_k))
        if self._runs is not None:
            seen = within(seen, self._runs)
        return seen if len(seen) <= 2 else compact(seen)

    def _near(self, i: Integers, n_k: int) -> list[Interval]:
        """Give what `causal` and `window` let be seen."""
        low, high = np.zeros_like(i), np.full_like(i, n_k)
        if self.causal:
            high = np.minimum(high, np.maximum(i + 1, self.prefix or 0))
        if self.window is None:
            return [_interval(low, high)]
        left, right = self.window
        near = (low if left is None else np.maximum(low, np.minimum(i - left, n_k)),
                high if right is None else np.minimum(high, i + right + 1))
        if not self.first:
            return [_interval(*near)]
        return [_interval(low, np.minimum(high, self.first)),
                _interval(np.maximum(near[0], min(self.first, n_k)), near[1])]

    def _numbered(self, queries: ArrayLike) -> Interval:
        """Give, by `q_documents`, the document of each query, -1 for none, and how far its keys are on."""
        numbers = np.asarray(queries, np.int64)
        which = np.searchsorted(self.q_documents, numbers, side="right") - 1
        outside = which == len(self.q_documents) - 1
        ends = self.documents - self.q_documents                       # of document d: of offset d + 1
        return np.where(outside, -1, which), ends[np.where(outside, which, which + 1)]

    def _span(self, i: Integers, n_k: int) -> Interval:
        """Give the span that each position is in."""
        which = np.searchsorted(self.spans[:, 0], i, side="right") - 1
        low, high = np.append(self.spans, [[0, 0]], axis=0)[which].T   # -1: the empty one
        inside = i < high
        return np.where(inside, np.minimum(low, n_k), 0), np.where(inside, np.minimum(high, n_k), 0)


Mask.__init__ = explained()(Mask.__init__)  # type: ignore[method-assign]      # the one that dataclass makes


def _interval(low: Integers, high: Integers) -> Interval:
    return low, np.maximum(low, high)
