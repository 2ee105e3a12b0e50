"""Layouts: which token positions a rank holds.

A layout splits the positions ``0 .. length-1`` into ``size`` strictly increasing sequences, one for each
rank. Some may be empty and all may differ in size. Two questions answer everything else: `positions` and
`count_below`. All integers are int64.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import OptionError, ShapeError

Integers: TypeAlias = NDArray[np.int64]


class Layout:
    """What every layout answers. Local.

    Attributes
    ----------
    counts : tuple of int
        Tokens on each rank.
    length : int
        Tokens in all.
    size : int
        Number of ranks.
    """

    name = "layout"
    grows = False             # whether more tokens will follow

    def __init__(self, counts: Sequence[int]) -> None:
        try:
            self.counts = tuple(operator.index(n) for n in counts)
        except TypeError:
            raise OptionError(f"{self.name} layout: expected an integer for each rank, got {counts!r}") from None
        if not self.counts or min(self.counts) < 0:
            raise OptionError(f"{self.name} layout: expected one count >= 0 for each rank, got {self.counts}")
        self.size = len(self.counts)
        self.length = sum(self.counts)

    def positions(self, rank: int) -> Integers:
        """Global positions of the tokens on `rank`, strictly increasing; shape ``(counts[rank],)``. Local."""
        raise NotImplementedError

    def count_below(self, x: ArrayLike, rank: int) -> Integers:
        """Count the tokens of `rank` that stand before global position `x`, elementwise. Local.

        As a block's positions increase, this turns an interval of positions into an interval of columns.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Say what the layout is, in a string that is equal iff the layouts are. Local."""
        counts = hashlib.sha256(np.asarray(self.counts).tobytes()).hexdigest()[:16]
        return f"{self.name} of {self.length} tokens over {self.size} ranks, counts sha256 {counts}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(self.describe())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(length={self.length}, size={self.size})"


class Contiguous(Layout):
    """Rank r holds ``counts[r]`` tokens in a row; any counts, zero included."""

    name = "contiguous"

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__(counts)
        self.starts = tuple(int(n) for n in np.concatenate([[0], np.cumsum(self.counts)[:-1]]))

    @classmethod
    def even(cls, length: int, size: int) -> Contiguous:
        """Split `length` tokens over `size` ranks as evenly as whole tokens allow. Local."""
        edges = [length * rank // size for rank in range(size + 1)]
        return cls([b - a for a, b in itertools.pairwise(edges)])

    def positions(self, rank: int) -> Integers:
        return np.arange(self.starts[rank], self.starts[rank] + self.counts[rank], dtype=np.int64)

    def count_below(self, x: ArrayLike, rank: int) -> Integers:
        return np.clip(np.asarray(x, np.int64) - self.starts[rank], 0, self.counts[rank])


class Striped(Layout):
    """Token i on rank ``i mod size``: balances a causal mask (Brandon et al. 2023, *Striped Attention*)."""

    name = "striped"

    def __init__(self, length: int, size: int) -> None:
        super().__init__([(length - rank + size - 1) // size if rank < length else 0 for rank in range(size)])

    def positions(self, rank: int) -> Integers:
        return np.arange(rank, self.length, self.size, dtype=np.int64)

    def count_below(self, x: ArrayLike, rank: int) -> Integers:
        return np.clip((np.asarray(x, np.int64) - rank + self.size - 1) // self.size, 0, self.counts[rank])


class Zigzag(Layout):
    """Chunks r and ``2 size - 1 - r`` of ``2 size`` nearly equal chunks: balances a causal mask too."""

    name = "zigzag"

    def __init__(self, length: int, size: int) -> None:
        self.edges = tuple(length * chunk // (2 * size) for chunk in range(2 * size + 1))
        super().__init__([sum(b - a for a, b in self._chunks(rank)) for rank in range(size)])

    def _chunks(self, rank: int) -> list[tuple[int, int]]:
        last = len(self.edges) - 2
        return [(self.edges[c], self.edges[c + 1]) for c in (rank, last - rank)]

    def positions(self, rank: int) -> Integers:
        return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in self._chunks(rank)])

    def count_below(self, x: ArrayLike, rank: int) -> Integers:
        (a, b), (c, d) = self._chunks(rank)
        x = np.asarray(x, np.int64)
        return np.asarray(np.clip(x - a, 0, b - a) + np.clip(x - c, 0, d - c), np.int64)


class Custom(Layout):
    """Any split. Every rank passes the positions of *all* ranks.

    Parameters
    ----------
    positions : sequence of ``size`` integer arrays
        ``positions[r]``, shape ``(counts[r],)``, strictly increasing: what rank r holds. Together they hold
        every position of ``0 .. length-1`` once.

    Raises
    ------
    OptionError
        If a sequence does not increase, or a position is missing or held twice.
    """

    name = "custom"

    def __init__(self, positions: Sequence[ArrayLike]) -> None:
        self._positions = [self._checked(rank, held) for rank, held in enumerate(positions)]
        super().__init__([len(held) for held in self._positions])
        held = np.sort(np.concatenate(self._positions))
        wrong = np.flatnonzero(held != np.arange(self.length))
        if wrong.size:
            raise OptionError(f"custom layout: expected each position 0..{self.length - 1} on exactly one rank; "
                              f"position {wrong[0]} is missing or held twice")

    @staticmethod
    def _checked(rank: int, held: ArrayLike) -> Integers:
        given = np.asarray(held)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise OptionError(f"custom layout: expected a 1-D integer array for each rank, got {given.dtype} "
                              f"of shape {given.shape} for rank {rank}")
        if np.any(given[1:] <= given[:-1]):
            raise OptionError(f"custom layout: positions of rank {rank} do not strictly increase; sort them")
        return given.astype(np.int64)

    def positions(self, rank: int) -> Integers:
        return self._positions[rank]

    def count_below(self, x: ArrayLike, rank: int) -> Integers:
        return np.asarray(np.searchsorted(self._positions[rank], np.asarray(x, np.int64)), np.int64)

    def describe(self) -> str:
        digest = hashlib.sha256()
        for held in self._positions:
            digest.update(held.tobytes())
        return f"{super().describe()}, positions sha256 {digest.hexdigest()[:16]}"


class Replicated(Layout):
    """Every rank holds all tokens: no split, and only for queries."""

    name = "replicated"

    def __init__(self, length: int, size: int) -> None:
        super().__init__([length] * size)
        self.length = length

    def positions(self, rank: int) -> Integers:
        return np.arange(self.length, dtype=np.int64)

    def count_below(self, x: ArrayLike, rank: int) -> Integers:
        return np.clip(np.asarray(x, np.int64), 0, self.length)


NAMES = ("contiguous", "striped", "zigzag")
REPLICATED = Replicated.name


def check_spec(spec: str | Layout) -> None:
    """Raise `OptionError` unless `spec` is one of `NAMES` or a `Layout`. Local."""
    if not isinstance(spec, Layout) and spec not in NAMES:
        raise OptionError(f"layout: expected one of {', '.join(NAMES)} or a Layout, got {spec!r}")


def make(spec: str | Layout, length: int, size: int) -> Layout:
    """Make the layout of `length` tokens over `size` ranks; ``"contiguous"`` splits evenly. Local.

    Raises
    ------
    OptionError
        If `spec` is no layout, or one of other tokens or ranks.
    """
    check_spec(spec)
    if isinstance(spec, Layout):
        if (spec.length, spec.size) != (length, size):
            raise OptionError(f"layout: expected {length} tokens over {size} ranks, got {spec!r}")
        return spec
    if spec == "contiguous":
        return Contiguous.even(length, size)
    return (Striped if spec == "striped" else Zigzag)(length, size)


def resolve(spec: str | Layout, counts: Sequence[int], what: str = "tokens") -> Layout:
    """Give the layout of shards that hold `counts` tokens; ``"contiguous"`` takes any counts. Local.

    Parameters
    ----------
    spec : str or Layout
        One of `NAMES`, or a layout object; `REPLICATED` if all ranks hold all tokens.
    counts : sequence of int
        Tokens that each rank brought.
    what : str
        What the tokens are (``"q"``, ``"k and v"``), for the message.

    Raises
    ------
    OptionError
        If `spec` is no layout, or one of other ranks.
    ShapeError
        If the layout gives the ranks other counts than they brought.
    """
    if isinstance(spec, str) and spec == "contiguous":
        return Contiguous(counts)
    if isinstance(spec, str) and spec == REPLICATED:
        for rank, got in enumerate(counts):
            if got != counts[0]:
                raise ShapeError(f"rank {rank}: expected the same tokens of {what} on every rank, {counts[0]} as on "
                                 f"rank 0, got {got}")
        return Replicated(counts[0], len(counts))
    layout = spec if isinstance(spec, Layout) and spec.size == len(counts) else make(spec, sum(counts), len(counts))
    for rank, (want, got) in enumerate(zip(layout.counts, counts, strict=True)):
        if want != got:
            raise ShapeError(
                f"rank {rank}: the {layout.name} layout of {layout.length} tokens over {layout.size} ranks expects "
                f"{want} tokens of {what}, got {got}; redistribute them, or name the layout they have")
    return layout
