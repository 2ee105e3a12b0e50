"""What a call needs to know of all ranks and of each block; made once, used while the shapes stay the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import Layout
from .mask import Interval, Mask
from .ring import Block
from .score import Score
from .softmax import State

Array = Any                       # of NumPy, or of CuPy on a GPU


@dataclass
class Plan:
    """A plan for shards of some shapes on this rank.

    Attributes
    ----------
    key : bytes
        Of the shapes of all ranks that it is for.
    kv_layout : Layout
    bounds : list of (lo, hi)
        Intervals of key positions that this rank's queries see; see `Mask.bounds`.
    shapes : list
        For each rank, the shapes of its k and v.
    score : Score
        Of this rank's queries, still without the keys and streams of a block.
    accumulator : dtype
    dtype : dtype
        Of q, k and v.
    dims : (int, int, int)
        heads, dim, dim_v.
    hops, firsts : list of int
        Where the last and the first other rank that computes with a block is; see `ring.travel`, `first_hops`.
    seen : array of shape (n_q,), bool
        Which queries have a result, where the backend computes; with `states`.
    states : list of State
        One for each element of the batch, once there has been a forward pass.
    ready : set of str
        What the backend and the ring have been made ready for: ``"forward"``, ``"backward"``.
    """

    key: bytes
    kv_layout: Layout
    bounds: list[Interval]
    shapes: list[list[tuple[int, ...]]]
    score: Score
    accumulator: np.dtype[Any]
    dtype: np.dtype[Any]
    dims: tuple[int, int, int]
    hops: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    seen: Array = None
    states: list[State] = field(default_factory=list)
    ready: set[str] = field(default_factory=set)
    _ahead: tuple[int, list[Interval]] = field(default_factory=lambda: (-1, []))

    @classmethod
    def make(cls, key: bytes, rank: int, mask: Mask, q_layout: Layout, kv_layout: Layout, score: Score,
             sizes: tuple[int, ...], dtype: np.dtype[Any], accumulator: np.dtype[Any]) -> Plan:
        """Plan for `rank`; `sizes` are batch, heads, kv_heads, dim and dim_v. Local."""
        batch, heads, kv_heads, dim, dim_v = sizes
        positions = q_layout.positions(rank)
        bounds = mask.bounds(positions, q_layout.length, kv_layout.length)
        if score.positional:
            score = replace(score, queries=positions + mask.offset(q_layout.length, kv_layout.length))
        shapes: list[list[tuple[int, ...]]] = [[(batch, n, kv_heads, dim), (batch, n, kv_heads, dim_v)]
                                               for n in kv_layout.counts]
        return cls(key, kv_layout, bounds, shapes, score, accumulator, dtype, (heads, dim, dim_v))

    @property
    def batch(self) -> int:
        """Elements of the batch."""
        return self.shapes[0][0][0]

    @property
    def pairs(self) -> int:
        """Visible query-key pairs of this rank, all batches."""
        return self.batch * int(sum((high - low).sum() for low, high in self.bounds))

    @property
    def sees(self) -> NDArray[np.bool_]:
        """Which of this rank's queries see any key."""
        seen = np.zeros(len(self.bounds[0][0]), bool)
        for low, high in self.bounds:
            seen |= high > low
        return seen

    def block_bytes(self, dtype: np.dtype[Any]) -> int:
        """Bytes of the largest block of any rank, in a dtype."""
        return max(sum(math.prod(shape) for shape in theirs) for theirs in self.shapes) * dtype.itemsize

    def columns(self, source: int) -> list[Interval]:
        """Turn each interval of positions into columns of the block of rank `source`. Local."""
        if self._ahead[0] == source:
            return self._ahead[1]
        return [(self.kv_layout.count_below(low, source), self.kv_layout.count_below(high, source))
                for low, high in self.bounds]

    def look_ahead(self, block: Block) -> None:
        """Have the columns of the block after this one ready: a GPU computes now, and would wait for them later."""
        source = (block.source - 1) % len(self.hops)
        if self._ahead[0] != source and self.hops[source] > block.step.step:
            self._ahead = source, self.columns(source)

    def score_of(self, source: int) -> Score:
        """Give the score for the block of rank `source`. Local."""
        return self.score.of_keys(self.kv_layout.positions(source)) if self.score.positional else self.score
