"""What is computed: the caller's options, the same on all ranks, and the plan that they make of some shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .call import Records
from .checks import check_dropout, check_mask, check_scale, check_slopes, check_softcap
from .dtypes import accumulator
from .errors import OptionError, ShapeError
from .layout import REPLICATED, Layout, Replicated, check_spec, resolve
from .mask import Mask
from .plan import Plan, increasing
from .schedules.grid import Grid, share_heads
from .schedules.group import Group
from .schedules.head_exchange import Tokens
from .schedules.spec import Schedule, check_heads
from .score import MOST_POSITION, Score


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
        replicated = isinstance(layout, str) and layout == REPLICATED
        if kv_layout is None:
            kv_layout = "contiguous" if replicated else layout
        for spec in (kv_layout,) if replicated else (layout, kv_layout):
            check_spec(spec)
        return cls(check_mask(mask), layout, kv_layout, check_scale(scale), check_softcap(softcap), check_slopes(alibi),
                   check_dropout(dropout), accumulator)

    @property
    def replicated(self) -> bool:
        """Whether all ranks have the same queries."""
        return isinstance(self.layout, str) and self.layout == REPLICATED

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
        if not kv_layout.grows:               # else the last document may go on
            self.mask.check(kv_layout.length)
        self.check_range(np.finfo(accumulator(records.dtype, self.accumulator)))
        heads = records.common("heads")
        if self.alibi is not None and len(self.alibi) != heads:
            raise ShapeError(f"alibi: expected a slope for each of {heads} heads, got {len(self.alibi)}")
        farthest = max(kv_layout.length, q_layout.length) + abs(self.mask.offset(q_layout.length, kv_layout.length))
        if (self.alibi is not None or self.dropout) and farthest >= MOST_POSITION:
            raise OptionError(f"alibi and dropout: expected positions below 2^31, got {farthest}")
        return q_layout, kv_layout

    def check_range(self, kind: np.finfo[Any]) -> None:
        """Raise `OptionError` unless an accumulator's dtype holds the options, and what multiplies them. Local."""
        scale, most = abs(self.scale or 0.0), float(kind.max)
        if scale > most:
            raise OptionError(f"scale: {self.scale} is not finite in the accumulator's dtype, {kind.dtype}")
        if self.softcap is not None and not max(float(kind.tiny), scale / most) <= self.softcap <= most:
            raise OptionError(f"softcap: {self.softcap} is too small or too large for the accumulator's dtype, "
                              f"{kind.dtype}")
        if self.alibi is not None and np.abs(self.alibi).max(initial=0.0) > most / MOST_POSITION:
            raise OptionError(f"alibi: {self.alibi.tolist()} is too large for the accumulator's dtype, {kind.dtype}")

    def grid(self, schedule: Schedule, nodes: Sequence[int], records: Records) -> Grid:
        """Place a schedule on the ranks. Local.

        The axis along which a rank sends most bytes has its ranks next to each other: heads, which nothing hides, then
        queries and their results or keys.

        Raises
        ------
        OptionError
            If the ranks that share heads can't share those there are; the same on all ranks.
        """
        heads, kv_heads, dim, dim_v = map(records.common, ("heads", "kv_heads", "dim", "dim_v"))
        check_heads(schedule, heads)
        item = records.dtype.itemsize
        wide = accumulator(records.dtype, self.accumulator).itemsize
        queries = sum(records.n_q) * heads * (dim * item + (dim_v + 2) * wide) * (schedule.queries - 1)
        keys = sum(records.n_k) * kv_heads * (dim + dim_v) * item * (schedule.keys - 1)
        axes = ("heads", "queries", "keys") if queries > keys else ("heads", "keys", "queries")
        return Grid(schedule, tuple(nodes), axes)

    def plan(self, records: Records, layouts: tuple[Layout, Layout], grid: Grid, rank: int) -> Plan:
        """Make the plan of `rank`, but for the route, which is agreed on. Local."""
        batch, heads, kv_heads, dim, dim_v = map(records.common, ("batch", "heads", "kv_heads", "dim", "dim_v"))
        q_layout, kv_layout = layouts
        beside = grid.group("heads", rank)
        queries, keys = grid.group("queries", rank), grid.group("keys", rank)
        shares = share_heads(heads, kv_heads, beside.size)
        share = shares[beside.index]

        # The rows: of this rank's place on the axis of the queries, then of those upstream.
        replicated = isinstance(q_layout, Replicated)
        if replicated:
            queries = Group((rank,), rank)
        places = [queries.upstream(hop) for hop in range(queries.size)]
        row_ranks = [r for place in places for r in grid.group("heads", queries.ranks[place]).ranks]
        row_counts = [sum(q_layout.counts[r] for r in grid.group("heads", other).ranks) for other in queries.ranks]
        positions = np.concatenate([q_layout.positions(r) for r in row_ranks])
        bounds = self.mask.bounds(positions, q_layout.length, kv_layout.length)
        score = Score(1 / math.sqrt(dim) if self.scale is None else self.scale, self.softcap or 0.0,
                      None if self.alibi is None else self.alibi[share.queries], self.dropout)
        if score.positional:
            score = replace(score, queries=positions + self.mask.offset(q_layout.length, kv_layout.length))

        # The keys: a block for each rank that shares them.
        parts = [increasing(kv_layout, grid.group("heads", other).ranks) for other in keys.ranks]
        shapes: list[list[tuple[int, ...]]] = [
            [(batch, part[-1].columns.stop, share.kv_heads, width) for width in (dim, dim_v)] for part in parts]
        return Plan(records.key, grid, kv_layout, bounds, row_counts, parts, shapes, share,
                    Tokens.of_queries([q_layout.counts[r] for r in beside.ranks], shares),
                    Tokens.of_keys([kv_layout.counts[r] for r in beside.ranks], shares), score,
                    accumulator(records.dtype, self.accumulator), records.dtype, (share.heads, dim, dim_v), replicated)
