"""What is computed, and the plan of it for shards of some shapes: what a call needs to know of all ranks' blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .checks import check_dropout, check_mask, check_scale, check_slopes, check_softcap, column
from .dtypes import DTYPES, accumulator
from .errors import OptionError, ShapeError
from .layout import Layout, check_spec, resolve
from .mask import Interval, Mask
from .schedules.ring import Block
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
        Of this rank's queries, still without the positions of keys and the dropout keys of a block.
    accumulator : dtype
    dtype : dtype
        Of q, k and v.
    dims : (int, int, int)
        heads, dim, dim_v.
    hops, firsts : list of int
        Where the last and the first other rank that computes with a block is; see `ring.travel`, `first_hops`.
    seen : array of shape (n_q,), bool
        Which queries have a result, where the backend computes, once there has been a forward pass.
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
    ready: set[str] = field(default_factory=set)
    _ahead: tuple[int, list[Interval]] = field(default_factory=lambda: (-1, []))

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

    def resolve(self, records: NDArray[np.int64]) -> tuple[Layout, Layout]:
        """Give the layouts of the shards that were brought, and check what depends on them. Local.

        Parameters
        ----------
        records : int64 array
            What each rank brings; see `checks.RECORD`.

        Raises
        ------
        OptionError, ShapeError, MaskError
            The same on all ranks.
        """
        q_layout = resolve(self.layout, column(records, "tokens of q").tolist(), "q")
        kv_layout = resolve(self.kv_layout, column(records, "tokens of k and v").tolist(), "k and v")
        self.mask.check(kv_layout.length)
        self._check_range(np.finfo(accumulator(_dtype(records), self.accumulator)))
        heads = int(column(records, "heads")[0])
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

    def plan(self, key: bytes, records: NDArray[np.int64], layouts: tuple[Layout, Layout], rank: int) -> Plan:
        """Make the plan of `rank`, but for how far blocks go, which is agreed. Local."""
        q_layout, kv_layout = layouts
        batch, heads, kv_heads, dim, dim_v = (int(column(records, name)[0]) for name in
                                              ("batch", "heads", "kv_heads", "dim", "dim_v"))
        dtype = _dtype(records)
        positions = q_layout.positions(rank)
        bounds = self.mask.bounds(positions, q_layout.length, kv_layout.length)
        score = Score(1 / math.sqrt(dim) if self.scale is None else self.scale, self.softcap or 0.0, self.alibi,
                      self.dropout)
        if score.positional:
            score = replace(score, queries=positions + self.mask.offset(q_layout.length, kv_layout.length))
        shapes: list[list[tuple[int, ...]]] = [[(batch, n, kv_heads, dim), (batch, n, kv_heads, dim_v)]
                                               for n in kv_layout.counts]
        return Plan(key, kv_layout, bounds, shapes, score, accumulator(dtype, self.accumulator), dtype,
                    (heads, dim, dim_v))


def _dtype(records: NDArray[np.int64]) -> np.dtype[Any]:
    """Of q, k and v."""
    return list(DTYPES.values())[int(column(records, "dtype")[0])]
