"""What is computed: the caller's options, the same on all ranks, and the plan that they make of some shards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .bounds import bounds_of
from .call import Records
from .checks import check_dropout, check_mask, check_order, check_scale, check_slopes, check_softcap
from .dtypes import accumulator
from .errors import OptionError, ShapeError
from .excerpts import sections
from .layout import REPLICATED, Layout, Replicated, check_spec, resolve
from .mask_base import BaseMask
from .parts import Part, increasing
from .plan import Plan
from .schedules.grid import Grid, HeadShare, share_heads
from .schedules.group import Group
from .schedules.head_exchange import Tokens
from .schedules.spec import ORDERS, Schedule, check_heads
from .schedules.token_exchange import Move
from .schedules.traffic import Shape, axes
from .score import MOST_POSITION, Score
from .tiles import KeyPlan, TablePlan, Tiled

MANY_INTERVALS = 1024          # of a query: each takes a pass over a block
SAMPLED_RANKS = 16             # whose queries, and whose keys, tell what is seen, where there are more ...
SAMPLED_QUERIES = 64           # ... and so many queries of each


@dataclass(frozen=True)
class Problem:
    """What is computed, by the caller's options; the same on all ranks."""

    mask: BaseMask
    layout: str | Layout
    kv_layout: str | Layout
    scale: float | None
    softcap: float | None
    alibi: NDArray[np.float64] | None
    dropout: float
    accumulator: DTypeLike | None
    order: str = ORDERS[0]

    @classmethod
    def check(cls, mask: Any, layout: Any, kv_layout: Any, scale: Any, softcap: Any, alibi: Any, dropout: Any,
              accumulator: Any, order: Any = ORDERS[0]) -> Problem:
        """Take a caller's options, or raise `OptionError`. Local."""
        replicated = isinstance(layout, str) and layout == REPLICATED
        if kv_layout is None:
            kv_layout = "contiguous" if replicated else layout
        for spec in (kv_layout,) if replicated else (layout, kv_layout):
            check_spec(spec)
        return cls(check_mask(mask), layout, kv_layout, check_scale(scale), check_softcap(softcap), check_slopes(alibi),
                   check_dropout(dropout), accumulator, check_order(order, ORDERS))

    @property
    def replicated(self) -> bool:
        """Whether all ranks have the same queries."""
        return isinstance(self.layout, str) and self.layout == REPLICATED

    @property
    def canonical(self) -> bool:
        """Whether sums are made in canonical order."""
        return self.order == "canonical"

    def describe(self) -> dict[str, Any]:
        """Give the options as plain values. Local."""
        layouts = {"layout": self.layout, "kv_layout": self.kv_layout}
        return {**self.mask.describe(), "scale": self.scale, "accumulator": self.accumulator, "softcap": self.softcap,
                "alibi": None if self.alibi is None else self.alibi.tolist(), "dropout": self.dropout,
                "order": self.order, **{name: x if isinstance(x, str) else x.describe() for name, x in layouts.items()}}

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
            self.mask.check(q_layout.length, kv_layout.length)
        self.mask.check_batch(records.common("batch") if records.common("batched") else None)
        self.check_range(np.finfo(accumulator(records.dtype, self.accumulator)))
        heads = records.common("heads")
        if self.alibi is not None and len(self.alibi) != heads:
            raise ShapeError(f"alibi: expected a slope for each of {heads} heads, got {len(self.alibi)}")
        farthest = self.mask.farthest(q_layout.length, kv_layout.length)
        if (self.alibi is not None or self.dropout or records.common("relative")) and farthest >= MOST_POSITION:
            raise OptionError(f"alibi, dropout and relative: expected positions below 2^31, got {farthest}")
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

    def warn_of_intervals(self) -> None:
        """Warn if a query may have very many intervals. Local."""
        if self.mask.most > MANY_INTERVALS:
            warnings.warn(f"mask: a query may see up to {self.mask.most} stretches of keys, each of which takes "
                          "time; where key_mask leaves out many, key_bias=-inf is faster", RuntimeWarning,
                          stacklevel=2)

    def shape(self, records: Records) -> Shape:
        """Say what is computed as far as its cost goes by it, but for what the mask lets be seen. Local."""
        heads, kv_heads, dim, dim_v, batch = map(records.common, ("heads", "kv_heads", "dim", "dim_v", "batch"))
        replicated = self.replicated
        return Shape(records.n_q[0] if replicated else sum(records.n_q), sum(records.n_k), heads, kv_heads, dim, dim_v,
                     records.dtype.itemsize, accumulator(records.dtype, self.accumulator).itemsize, batch,
                     most_q=max(records.n_q), most_k=max(records.n_k), replicated=replicated,
                     canonical=self.canonical, bias=records.common("key_bias"),
                     in_keys=bool(records.common("in_keys")))

    def grid(self, schedule: Schedule, nodes: Sequence[int], records: Records) -> Grid:
        """Place a schedule on the ranks: the axis first along which a rank sends most bytes. Local.

        Raises
        ------
        OptionError
            If the ranks that share heads can't share those there are; the same on all ranks.
        """
        check_heads(schedule, records.common("heads"), records.common("kv_heads") if self.canonical else 0)
        return Grid(schedule, tuple(nodes), axes(self.shape(records), schedule))

    def plan(self, records: Records, layouts: tuple[Layout, Layout], grid: Grid, rank: int, tile: int = 0,
             whole: bool = False) -> Plan:
        """Make the plan of `rank`, but for the route, which is agreed on. Local.

        Parameters
        ----------
        records, layouts, grid, rank
        tile : int
            In canonical order, the tokens of a tile: keys come in blocks of whole tiles, whatever their layout.
        whole : bool
            Whether blocks of keys travel as they are, not only what other ranks need of them.
        """
        batch, heads, kv_heads, dim, dim_v = map(records.common, ("batch", "heads", "kv_heads", "dim", "dim_v"))
        q_layout, kv_layout = layouts
        if tile:
            kv_layout = Tiled.on(grid, rank, kv_layout.length, tile)
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
        bounds = bounds_of(self.mask, positions, (q_layout.length, kv_layout.length), batch)
        score = self.score(dim, share)

        # The keys: a block for each rank that shares them.
        uncut = bool(tile) or keys.size == 1
        parts = [increasing(kv_layout, grid.group("heads", other).ranks) for other in keys.ranks]
        widths = (dim,) if records.common("in_keys") else (dim, dim_v)
        shapes: list[list[tuple[int, ...]]] = [
            [(batch, part[-1].columns.stop, share.kv_heads, width) for width in widths] for part in parts]
        bias_tokens, bias = None, records.common("key_bias")
        if bias:
            bias_tokens = Tokens.of_bias([kv_layout.counts[r] for r in beside.ranks], shares, bias)
            for shape in shapes:
                shape.append((batch, shape[0][1], share.heads if bias > 1 else 1))
        return Plan(records.key, grid, bounds, row_counts, parts, shapes, share,
                    Tokens.of_queries([q_layout.counts[r] for r in beside.ranks], shares),
                    Tokens.of_keys([kv_layout.counts[r] for r in beside.ranks], shares), score,
                    accumulator(records.dtype, self.accumulator), records.dtype, (share.heads, dim, dim_v), replicated,
                    keys.index, None if uncut else whole, 1 if uncut or whole else sections(keys.size),
                    self._plan_of_keys(records, layouts, grid, rank, kv_layout, tile) if tile else None,
                    bias_tokens, layouts[1] if records.leave_out else None, records.common("relative") > 0,
                    self._plan_of_tables(records, layouts, grid, rank, parts, tile)
                    if tile and records.common("relative") else None)

    def score(self, dim: int, share: HeadShare) -> Score:
        """Give the score of some heads, without positions. Local."""
        return Score(1 / math.sqrt(dim) if self.scale is None else self.scale, self.softcap or 0.0,
                     None if self.alibi is None else self.alibi[share.queries], self.dropout)

    def _plan_of_keys(self, records: Records, layouts: tuple[Layout, Layout], grid: Grid, rank: int, blocks: Layout,
                      tile: int) -> KeyPlan:
        """Plan, in canonical order, what the keys where they are meet: the queries in blocks of whole tiles."""
        batch, heads, kv_heads, dim, dim_v = map(records.common, ("batch", "heads", "kv_heads", "dim", "dim_v"))
        q_layout, kv_layout = layouts
        beside, keys = grid.group("heads", rank), grid.group("keys", rank)
        shares = share_heads(heads, kv_heads, beside.size)
        share = shares[beside.index]
        tiled = Tiled.on(grid, rank, q_layout.length, tile)
        lengths = q_layout.length, kv_layout.length
        sources = [_whole(tiled, grid.group("heads", other).ranks) for other in keys.ranks]
        shapes: list[list[tuple[int, ...]]] = []
        for source in sources:
            rows = batch, source.columns.stop, share.heads
            shapes.append([rows, rows, (*rows, dim), (*rows, dim_v)])
        return KeyPlan(self.mask, lengths, tile, sources, increasing(kv_layout, beside.ranks), shapes,
                       Tokens.of_queries([tiled.counts[r] for r in beside.ranks], shares),
                       Tokens.of_keys([kv_layout.counts[r] for r in beside.ranks], shares), share.queries,
                       self.score(dim, share), Move.between(kv_layout, blocks, rank),
                       Move.between(q_layout, tiled, rank),
                       Tokens.of_bias([kv_layout.counts[r] for r in beside.ranks], shares, records.common("key_bias")),
                       Tokens.of_queries([kv_layout.counts[r] for r in beside.ranks], shares))

    def _plan_of_tables(self, records: Records, layouts: tuple[Layout, Layout], grid: Grid, rank: int,
                        parts: Sequence[Sequence[Part]], tile: int) -> TablePlan:
        """Plan, in canonical order, what the queries in blocks of whole tiles meet: the keys in such blocks."""
        batch, heads, kv_heads, dim = map(records.common, ("batch", "heads", "kv_heads", "dim"))
        q_layout, kv_layout = layouts
        beside = grid.group("heads", rank)
        share = share_heads(heads, kv_heads, beside.size)[beside.index]
        queries = _whole(Tiled.on(grid, rank, q_layout.length, tile), beside.ranks).positions()
        return TablePlan(bounds_of(self.mask, queries, (q_layout.length, kv_layout.length), batch), tile,
                         int(queries[0]) // tile if len(queries) else 0, parts, share.queries, self.score(dim, share))


def _whole(layout: Tiled, ranks: Sequence[int]) -> Part:
    """Give the tokens of ranks whose blocks follow each other as one part."""
    return Part(slice(0, sum(layout.counts[rank] for rank in ranks)), list(ranks), layout)


def masked(shape: Shape, mask: BaseMask, q_layout: Layout, kv_layout: Layout) -> Shape:
    """Say what a mask lets be seen on some layouts, by samples of ranks and queries. Local."""
    masks = [one for one, _ in mask.of_elements(1)]
    size = len(q_layout.counts)
    ranks = np.unique(np.linspace(0, size - 1, min(size, SAMPLED_RANKS)).astype(int)).tolist()
    pairs, needed, length = [], [], max(1, kv_layout.length)
    for rank in ranks:
        positions = q_layout.positions(rank)
        step = max(1, len(positions) // SAMPLED_QUERIES)
        positions = np.unique(np.concatenate([positions[::step], positions[-1:]]))
        bounds = [pair for one in masks for pair in one.bounds(positions, q_layout.length, kv_layout.length)]
        seen = sum((high - low for low, high in bounds), np.zeros(len(positions))) / max(1, len(masks))
        pairs.append(float(seen.mean()) * q_layout.counts[rank] if len(positions) else 0.0)
        needed += [len(positions) > 0 and any(
            (kv_layout.count_below(high, other) > kv_layout.count_below(low, other)).any() for low, high in bounds)
            for other in ranks if other != rank]
    mean = sum(pairs) / len(pairs)
    seen_share = mean / max(1.0, float(np.mean([q_layout.counts[rank] for rank in ranks]))) / length
    return replace(shape, seen=min(1.0, seen_share), uneven=max(pairs) / mean if mean else 1.0,
                   reach=float(np.mean(needed)) if needed else 1.0,
                   scattered=size > 1 and len(increasing(kv_layout, (0, 1))) > 1)
