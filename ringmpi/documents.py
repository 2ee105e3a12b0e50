"""Packed documents: which stretches of the keys a token's document sees."""

from __future__ import annotations

import numpy as np

from .errors import MaskError
from .intervals import Interval
from .layout import Integers

MOST_PAIRS = 2**24             # of a document and an ancestor: 256 MiB


class Stretches:
    """Intervals that belong to numbers from 0 on, each number's put in order and joined where they meet. Local.

    Parameters
    ----------
    count : int
        Numbers there are.
    owners, lows, highs : int64 array of shape (n,)

    Attributes
    ----------
    most : int
        Intervals of the number that has most, at least 1.
    """

    def __init__(self, count: int, owners: Integers, lows: Integers, highs: Integers) -> None:
        order = np.lexsort((lows, owners))
        owners, lows, highs = (x[order] for x in (owners, lows, highs))
        # One goes on from those before it of the same number unless they all end before it begins.
        ends, place = np.unique(highs, return_inverse=True)
        reach = ends[np.maximum.accumulate(place + owners * len(ends)) - owners * len(ends)]
        new = np.ones(len(owners), np.bool_)
        new[1:] = (owners[1:] != owners[:-1]) | (lows[1:] > reach[:-1])
        begins = np.flatnonzero(new)
        last = np.append(begins[1:], len(owners))[:len(begins)] - 1
        owners, lows, highs = owners[begins], lows[begins], reach[last]
        self.most = max(1, int(np.bincount(owners, minlength=1).max()))
        self._none = count                           # a number that has no interval
        self._first = np.searchsorted(owners, np.arange(count + 2))
        self._lows, self._highs = (np.concatenate([x, [0]]) for x in (lows, highs))

    def seen(self, numbers: Integers, n_k: int) -> list[Interval]:
        """Give the intervals of each of some numbers, of `n_k` keys; -1 has none. Local."""
        some = np.where(numbers < 0, self._none, numbers)
        first, stop = self._first[some], self._first[some + 1]
        found = []
        for more in range(max(1, int((stop - first).max(initial=0)))):
            which = np.where(first + more < stop, first + more, len(self._lows) - 1)
            found.append((np.minimum(self._lows[which], n_k), np.minimum(self._highs[which], n_k)))
        return found


class Documents(Stretches):
    """Documents packed one behind the other, and which of them, or which other keys, each sees besides itself. Local.

    Parameters
    ----------
    offsets : int64 array of shape (n_documents + 1,)
    prompts : int64 array of shape (n_documents, 2), optional
        A half-open range of keys for each, -1 and -1 for none.
    parents : int64 array of shape (n_documents,), optional
        The document that each goes on from, -1 for none.

    Raises
    ------
    MaskError
        If there are not as many, a range is none, or a document is its own ancestor.
    """

    def __init__(self, offsets: Integers, prompts: Integers | None = None, parents: Integers | None = None) -> None:
        self.offsets = offsets
        number = len(offsets) - 1
        pieces = [(np.arange(number), offsets[:-1], offsets[1:])]
        if prompts is not None:
            _check_prompts(prompts, number)
            some = np.flatnonzero(prompts[:, 1] > prompts[:, 0])
            pieces.append((some, prompts[some, 0], prompts[some, 1]))
        if parents is not None:
            children, ancestors = _ancestors(parents, number)
            pieces.append((children, offsets[ancestors], offsets[ancestors + 1]))
        super().__init__(number, *(np.concatenate(parts) for parts in zip(*pieces, strict=True)))

    def of_positions(self, positions: Integers) -> Integers:
        """Give the number of the document at each position among the keys, -1 for none. Local."""
        number = np.searchsorted(self.offsets, positions, side="right") - 1           # empty documents are passed
        return np.where((number >= 0) & (number < len(self.offsets) - 1), number, -1)


class NumberedTokens(Stretches):
    """Documents given by a number for each token; one whose number comes again lies in several places. Local.

    Parameters
    ----------
    numbers : int64 array of shape (n_k,)
        Below 0 for padding, which is in no document.
    """

    def __init__(self, numbers: Integers) -> None:
        known, which = np.unique(numbers, return_inverse=True)
        self._of_tokens = np.append(np.where(numbers < 0, -1, which), -1)
        begins = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
        owners = self._of_tokens[begins]
        lows, highs = begins, np.append(begins[1:], len(numbers))
        there = owners >= 0
        super().__init__(len(known), owners[there], lows[there], highs[there])

    def of_positions(self, positions: Integers) -> Integers:
        """Give the number of the document at each position among the keys, -1 for none. Local."""
        outside = len(self._of_tokens) - 1
        return self._of_tokens[np.where((positions >= 0) & (positions < outside), positions, outside)]


def _check_prompts(prompts: Integers, number: int) -> None:
    """Raise `MaskError` unless there is a range of keys, or -1 and -1, for each of so many documents."""
    if len(prompts) != number:
        raise MaskError(f"prompts: expected a range of keys for each of {number} documents, got {len(prompts)}")
    low, high = prompts.T
    wrong = np.flatnonzero(((low < 0) | (high < low)) & ~((low == -1) & (high == -1)))
    if len(wrong):
        raise MaskError("prompts: expected 0 <= start <= stop, or -1 and -1 for none, got "
                        f"{prompts[wrong[0]].tolist()} for document {wrong[0]}")


def _ancestors(parents: Integers, number: int) -> tuple[Integers, Integers]:
    """Give all pairs of a document and one that it goes on from, directly or not."""
    if len(parents) != number:
        raise MaskError(f"parents: expected one for each of {number} documents, got {len(parents)}")
    wrong = np.flatnonzero((parents < -1) | (parents >= number))
    if len(wrong):
        raise MaskError(f"parents: expected the number of a document, 0 .. {number - 1}, or -1 for none, got "
                        f"{parents[wrong[0]]} for document {wrong[0]}")
    far = parents                                # twice as many generations up, each time
    for _ in range(number.bit_length()):
        far = np.where(far >= 0, far[far], -1)
    if (far >= 0).any():
        raise MaskError("parents: expected trees, got a document that would be its own ancestor, above document "
                        f"{np.flatnonzero(far >= 0)[0]}")
    children, ancestors = np.flatnonzero(parents >= 0), parents[parents >= 0]
    pairs = [(children, ancestors)]
    while len(children):
        above = parents[ancestors]
        children, ancestors = children[above >= 0], above[above >= 0]
        pairs.append((children, ancestors))
        if sum(len(some) for some, _ in pairs) > MOST_PAIRS:
            raise MaskError(f"parents: expected at most {MOST_PAIRS:,} pairs of a document and an ancestor, got more; "
                            "make documents that go on from one alone part of it")
    return np.concatenate([some for some, _ in pairs]), np.concatenate([some for _, some in pairs])
