"""What is computed, and the plan of it for shards of some shapes: what a call needs to know of all ranks' blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .call import Records
from .checks import check_dropout, check_mask, check_scale, check_slopes, check_softcap
from .dtypes import accumulator
from .errors import OptionError, ShapeError
from .layout import Integers, Layout, check_spec, resolve
from .mask import Interval, Mask
from .schedules.base import Route
from .score import MOST_POSITION, Score

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
        Of this rank's queries, still without the keys and dropout keys of a block.
    accumulator : dtype
    dtype : dtype
        Of q, k and v.
    dims : (int, int, int)
        heads, dim, dim_v.
    route : Route
        Which rank computes with which block; agreed on once the plans are made.
    seen : array of shape (n_q,), bool
        Which queries have a result, where the backend computes, once there has been a forward pass.
    ready : set of str
        What the backend and the schedule have been made ready for: ``"forward"``, ``"backward"``.
    """

    key: bytes
    kv_layout: Layout
    bounds: list[Interval]
    shapes: list[list[tuple[int, ...]]]
    score: Score
    accumulator: np.dtype[Any]
    dtype: np.dtype[Any]
    dims: tuple[int, int, int]
    route: Route = field(init=False)
    seen: Array = None
    ready: set[str] = field(default_factory=set)
    _prefetched: tuple[int, list[Interval]] = (-1, [])

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

    @property
    def needs(self) -> NDArray[np.bool_]:
        """Whose blocks this rank's queries see any key of."""
        return np.array([any((end > begin).any() for begin, end in self.columns(source))
                         for source in range(len(self.shapes))])

    def columns(self, source: int) -> list[Interval]:
        """Turn each interval of positions into columns of the block of rank `source`. Local."""
        if self._prefetched[0] == source:
            return self._prefetched[1]
        return [(self.kv_layout.count_below(low, source), self.kv_layout.count_below(high, source))
                for low, high in self.bounds]

    def prefetch_columns(self, source: int | None) -> None:
        """Have the columns of the next block ready: a GPU computes now, and would wait for them later. Local."""
        if source is not None and self._prefetched[0] != source:
            self._prefetched = source, self.columns(source)

    def tasks(self, source: int, dropout_keys: NDArray[np.uint32]) -> Iterator[tuple[int, Integers, Integers, Score]]:
        """Give what a backend has to do with the block of rank `source`: (element of the batch, begin, end, score)."""
        score = self.score_of(source)
        for begin, end in self.columns(source):
            for number in range(self.batch):
                yield number, begin, end, score.of_dropout_keys(dropout_keys[number])

    def score_of(self, source: int) -> Score:
        """Give the score for the block of rank `source`. Local."""
        return self.score.of_keys(self.kv_layout.positions(source)) if self.score.positional else self.score


@dataclass(frozen=True)
class Problem:
    """What is computed, by the caller's options; the same on all ranks."""

    mask: Mask
    layout: str | Layout
    kv_layout: str | Layout
    scale: float | None
    softcap: float | None
    alibi: NDArray[np.float64] | None
    dropout: float
    accumulator: DTypeLike | None

    @classmethod
    def check(cls, mask: Any, layout: Any, kv_layout: Any, scale: Any, softcap: Any, alibi: Any, dropout: Any,
              accumulator: Any) -> Problem:
        """Take a caller's options, or raise `OptionError`. Local."""
        kv_layout = layout if kv_layout is None else kv_layout
        for spec in (layout, kv_layout):
            check_spec(spec)
        return cls(check_mask(mask), layout, kv_layout, check_scale(scale), check_softcap(softcap), check_slopes(alibi),
                   check_dropout(dropout), accumulator)

    def describe(self) -> dict[str, Any]:
        """Give the options as plain values. Local."""
        layouts = {"layout": self.layout, "kv_layout": self.kv_layout}
        return {**self.mask.describe(), "scale": self.scale, "accumulator": self.accumulator, "softcap": self.softcap,
                "alibi": None if self.alibi is None else self.alibi.tolist(), "dropout": self.dropout,
                **{name: x if isinstance(x, str) else x.describe() for name, x in layouts.items()}}

    def resolve(self, records: Records) -> tuple[Layout, Layout]:
        """Give the layouts of the shards that were brought, and check what depends on them. Local.

        Parameters
        ----------
        records : Records
            What each rank brings.

        Raises
        ------
        OptionError, ShapeError, MaskError
            The same on all ranks.
        """
        q_layout = resolve(self.layout, records.n_q, "q")
        kv_layout = resolve(self.kv_layout, records.n_k, "k and v")
        self.mask.check(kv_layout.length)
        self._check_range(np.finfo(accumulator(records.dtype, self.accumulator)))
        heads = records.common("heads")
        if self.alibi is not None and len(self.alibi) != heads:
            raise ShapeError(f"alibi: expected a slope for each of {heads} heads, got {len(self.alibi)}")
        farthest = max(kv_layout.length, q_layout.length) + abs(self.mask.offset(q_layout.length, kv_layout.length))
        if (self.alibi is not None or self.dropout) and farthest >= MOST_POSITION:
            raise OptionError(f"alibi and dropout: expected positions below 2^31, got {farthest}")
        return q_layout, kv_layout

    def _check_range(self, kind: np.finfo[Any]) -> None:
        """Raise `OptionError` unless the accumulator's dtype holds the options, and what they are multiplied by."""
        scale, most = abs(self.scale or 0.0), float(kind.max)
        if scale > most:
            raise OptionError(f"scale: {self.scale} is not finite in the accumulator's dtype, {kind.dtype}")
        if self.softcap is not None and not max(float(kind.tiny), scale / most) <= self.softcap <= most:
            raise OptionError(f"softcap: {self.softcap} is too small or too large for the accumulator's dtype, "
                              f"{kind.dtype}")
        if self.alibi is not None and np.abs(self.alibi).max(initial=0.0) > most / MOST_POSITION:
            raise OptionError(f"alibi: {self.alibi.tolist()} is too large for the accumulator's dtype, {kind.dtype}")

    def plan(self, records: Records, layouts: tuple[Layout, Layout], rank: int) -> Plan:
        """Make the plan of `rank`, but for the route, which is agreed on. Local."""
        batch, heads, kv_heads, dim, dim_v = map(records.common, ("batch", "heads", "kv_heads", "dim", "dim_v"))
        q_layout, kv_layout = layouts
        positions = q_layout.positions(rank)
        bounds = self.mask.bounds(positions, q_layout.length, kv_layout.length)
        score = Score(1 / math.sqrt(dim) if self.scale is None else self.scale, self.softcap or 0.0, self.alibi,
                      self.dropout)
        if score.positional:
            score = replace(score, queries=positions + self.mask.offset(q_layout.length, kv_layout.length))
        shapes: list[list[tuple[int, ...]]] = [
            [(batch, n, kv_heads, dim), (batch, n, kv_heads, dim_v)] for n in kv_layout.counts]
        return Plan(records.key, kv_layout, bounds, shapes, score, accumulator(records.dtype, self.accumulator),
                    records.dtype, (heads, dim, dim_v))
