"""The score of a query and a key, and what becomes of its weight: all that stands between q · k and the softmax.

A score function changes products or weights one by one, so it goes with every mask, layout and schedule. What it needs
to know of a pair is the head and the two global positions, never which rank has them or which block they are in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .layout import Integers
from .relative import Relative

Array = NDArray[Any]
# Philox-2x32 of Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*: ten rounds.
MULTIPLIER, WEYL, ROUNDS = 0xD256D193, 0x9E3779B9, 10
MOST_POSITION = 2**31        # where positions matter: a counter has 32 bits for each of the two


@dataclass(frozen=True, eq=False)
class Score:
    r"""How a query weighs the keys of one block.

    For query head h, query position i and key position j, in this order::

        x = scale q·k
        x = softcap tanh(x / softcap)               if softcap     (Gemma Team 2024)
        x = x - slopes[h] |i - j|                   if slopes      (ALiBi: Press, Smith & Lewis 2022)
        x = x + key_bias[j, h]                      if key_bias
        x = x + relative, by h and i - j            if relative    (T5: Raffel et al. 2020)
        weight = exp(x - lse)                       what the sum, lse and the maximum are made of
        weight = weight * (0 or 1 / (1 - dropout))  if dropout     what the values are multiplied by; see `gain`

    A weight is dropped iff ``random_words(dropout_keys[h], i, j) < threshold``.

    Attributes
    ----------
    scale : float
    softcap : float
        Bound of \|x\|; 0 for none.
    slopes : float64 array of shape (heads,), optional
    dropout : float
        Probability that a weight is dropped, ``0 <= dropout < 1``.
    dropout_keys : uint32 array of shape (heads,)
        The random generator's key for each head; empty without dropout.
    queries, keys : int64 arrays of shapes (n_q,) and (n_k,)
        Global positions within ±2^31; those of the queries are as the mask aligns them with the keys. Empty without
        slopes, dropout and a relative bias.
    key_bias : array of shape (n_k, heads) or (n_k, 1), accumulator dtype, optional
        Of the keys of a block: finite, or -inf for a key that is left out. One for all heads if there is one.
    relative : Relative, optional
        Tables of what is added by how far the query is from the key; `queries` and `keys` have coordinates for it.
    """

    scale: float
    softcap: float = 0.0
    slopes: Array | None = None
    dropout: float = 0.0
    dropout_keys: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    queries: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    keys: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    key_bias: Array | None = None
    relative: Relative | None = None

    @property
    def plain(self) -> bool:
        """Whether the score is ``scale q·k`` and every weight counts."""
        return not self.has_functions and self.key_bias is None and self.relative is None

    @property
    def has_functions(self) -> bool:
        """Whether there is softcap, slopes or dropout."""
        return bool(self.softcap) or self.slopes is not None or self.dropout > 0

    @property
    def positional(self) -> bool:
        """Whether positions matter."""
        return self.slopes is not None or self.dropout > 0 or self.relative is not None

    @property
    def threshold(self) -> int:
        """Random words below it drop their weight."""
        return int(self.dropout * 2**32)

    @property
    def gain(self) -> float:
        """Factor of the weights that are kept: one over the share of the random words that keep a weight."""
        return 2**32 / (2**32 - self.threshold)

    def of_keys(self, keys: Integers) -> Score:
        """Give the score for a block whose keys have these positions. Local."""
        return replace(self, keys=keys) if self.positional else self

    def of_dropout_keys(self, dropout_keys: NDArray[np.uint32]) -> Score:
        """Give the score for the element of the batch that has these dropout keys. Local."""
        return replace(self, dropout_keys=dropout_keys) if self.dropout else self

    def of_key_bias(self, key_bias: Array | None) -> Score:
        """Give the score for a block, or columns of one, whose keys have this bias; itself without. Local."""
        return self if key_bias is None else replace(self, key_bias=key_bias)

    def of_relative(self, relative: Relative | None) -> Score:
        """Give the score with a bias by distance; itself without. Local."""
        return self if relative is None else replace(self, relative=relative)

    def of_columns(self, columns: slice | Integers) -> Score:
        """Give the score for some of the keys of its block. Local."""
        some = self.of_keys(self.keys[columns]) if self.positional else self
        return some.of_key_bias(None if self.key_bias is None else self.key_bias[columns])


def dropout_keys(seed: int, batch: int, heads: int) -> NDArray[np.uint32]:
    """Give the random generator's keys, of shape (batch, heads). Local.

    They are consecutive from a hash of the seed on, so all differ: the upper half of SplitMix64 (Steele, Lea & Flood
    2014). A key has 32 bits, so two seeds share some key with probability 2 batch heads / 2^32.
    """
    x = (seed + 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor % 2**64
    first = (x ^ x >> 31) >> 32
    return ((first + np.arange(batch * heads, dtype=np.uint64)) % 2**32).astype(np.uint32).reshape(batch, heads)


def random_words(dropout_key: ArrayLike, i: ArrayLike, j: ArrayLike) -> NDArray[np.uint32]:
    """Give the random word of each (dropout key, query position, key position), by broadcasting. Local.

    Philox-2x32-10 with counter (j, i), each modulo 2^32, and key `dropout_key`; the first word of two.
    """
    mask = np.uint64(2**32 - 1)
    low, high = (np.asarray(x).astype(np.int64).astype(np.uint64) & mask for x in (j, i))
    key = np.asarray(dropout_key).astype(np.uint64)
    for _ in range(ROUNDS):
        product = low * np.uint64(MULTIPLIER)
        low, high = (product >> np.uint64(32)) ^ key ^ high, product & mask
        key = (key + np.uint64(WEYL)) & mask
    return np.broadcast_to(low, np.broadcast_shapes(low.shape, high.shape)).astype(np.uint32)
