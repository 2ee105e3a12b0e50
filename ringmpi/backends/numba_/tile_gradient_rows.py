"""32 × 32 products to weights and gradients of scores, on their way from tile to tile of the backward pass.

S and dP come transposed, a key a row, so that queries lie across lanes: what is known of a query is a lane, and a row
of P and of dS is, rounded, a row of what dV and dK are multiplied from. dQ takes the same dS in pairs of keys.

Rows of float32 are not rounded: P and dS are split in three pieces (`pieces`) while they are in registers. Pieces come
in pairs of lanes at no cost, so the even queries of a square are in its first 16 lanes; see `query_lane`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
from numba import types
from numba.extending import intrinsic

from .amx import ROWS, TILE, lanes, to_row
from .pieces import joined_pairs, split
from .tile_squares import SIDE
from .vector import Vectors, at, constant, load, store, unpack

PLACE = TILE // 2           # float32 in a tile


class Places(NamedTuple):
    """Elements at which two keys of a square go: their rows of p and ds, and their pairs for each 16 queries."""

    row: Any
    pairs: list[Any]


@intrinsic
def differentiate_keys(context, work, place, score, scale, pieces, pair):  # type: ignore[no-untyped-def]
    """Make P and dS of keys 2·pair and 2·pair + 1 of a square, of a score that is plain; all pairs are seen.

    `work` is a `TileGradientWork`, `place` a `SquarePlace`, `score` a `TileScore`; dS is `scale` times the gradient of
    the score. `pieces` is the tuple of their numbers.
    """
    return _differentiate(work, place, score, scale, pieces, pair, masked=False, capped=False)


@intrinsic
def differentiate_masked_keys(context, work, place, score, scale, pieces, pair):  # type: ignore[no-untyped-def]
    """Do what `differentiate_keys` does where not all pairs are seen; of the others both are 0."""
    return _differentiate(work, place, score, scale, pieces, pair, masked=True, capped=False)


@intrinsic
def differentiate_capped_keys(context, work, place, score, scale, pieces, pair):  # type: ignore[no-untyped-def]
    """Do what `differentiate_masked_keys` does, of a score that has a cap."""
    return _differentiate(work, place, score, scale, pieces, pair, masked=True, capped=True)


@numba.njit
def query_lane(r, pieces):  # type: ignore[no-untyped-def]
    """Give the place of row r among rows side by side, 16 lanes after the other."""
    return r if len(pieces) == 1 else r // SIDE * SIDE + r % 2 * ROWS + r % SIDE // 2


@numba.njit
def query_column(r, pieces):  # type: ignore[no-untyped-def]
    """Give the column of dQᵀ that row r is: the pass over squares leaves them in the order of its shuffles."""
    if len(pieces) == 1:
        return r // SIDE * SIDE + r // 4 % 2 * ROWS + r // 8 % 4 * 4 + r % 4
    return query_lane(r, pieces)


def _differentiate(work: Any, place: Any, score: Any, scale: Any, pieces: Any, pair: Any, masked: bool,
                   capped: bool) -> Any:
    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        work, place, score = (unpack(context, builder, signature.args[i], values[i]) for i in range(3))
        pass_ = _Pass(Vectors(builder, types.float32), work, place, score, values[3], masked, capped)
        pass_.put = _put_rounded if len(pieces) == 1 else _put_pieces
        pass_.keys(values[5])
        return context.get_dummy_value()

    return types.void(work, place, score, scale, pieces, pair), emit


def _put_rounded(builder: Any, work: Any, place: Places, numbers: list[list[tuple[Any, Any]]]) -> None:
    """Store P and dS of two keys and 2 × 16 queries, rounded."""
    b, ds = builder, []
    for k, both in enumerate(numbers):
        ds.append(to_row(b, *(y for _, y in both)))
        for array, x in ((work.p, to_row(b, *(x for x, _ in both))), (work.ds, ds[k])):
            store(b, x, at(b, array, place.row), constant(k * SIDE))

    # Pairs of keys, column by column, in the order in which `query_column` says.
    for half in (0, 1):
        order = [8 * (c // 8) + 4 * half + c % 8 // 2 + 2 * ROWS * (c % 2) for c in range(2 * ROWS)]
        store(b, b.shuffle_vector(*ds, lanes(order)), work.ds_pairs, place.pairs[half])


def _put_pieces(builder: Any, work: Any, place: Places, numbers: list[list[tuple[Any, Any]]]) -> None:
    """Store P and dS of two keys and 2 × 16 queries in three pieces."""
    p, ds = ([[split(builder, both[i]) for both in key] for key in numbers] for i in (0, 1))
    for array, keys in ((work.p, p), (work.ds, ds)):
        for k, halves in enumerate(keys):
            for piece, both in enumerate(zip(*halves, strict=True)):
                store(builder, joined_pairs(builder, *both), at(builder, array, place.row),
                      constant(piece * TILE + k * SIDE))
    for half in (0, 1):
        for piece, both in enumerate(zip(*(key[half] for key in ds), strict=True)):
            store(builder, joined_pairs(builder, *both), at(builder, work.ds_pairs, place.pairs[half]),
                  constant(piece * TILE))


class _Pass:
    """Emits the pass over two keys of a square, which `put` stores."""

    put: Any

    def __init__(self, vectors: Vectors, work: Any, place: Any, score: Any, scale: Any, masked: bool, capped: bool
                 ) -> None:
        b = vectors.builder
        self.v = vectors
        self.work, self.place = work, place
        self.masked, self.capped = masked, capped
        self.scale = vectors.splat(scale)
        self.ratio, self.cap = vectors.splat(score.ratio), vectors.splat(score.cap)
        halves = [b.add(place.row, constant(ROWS * h)) for h in (0, 1)]
        self.lse = [vectors.load(work.lse, half) for half in halves]
        self.delta = [b.fmul(vectors.load(work.delta, half), self.scale) for half in halves]
        if masked:
            self.low, self.high = ([load(b, x, half, vectors.bits) for half in halves]
                                   for x in (work.low_here, work.high_here))

    def keys(self, pair: Any) -> None:
        """Emit rows 2·pair and 2·pair + 1 of the square."""
        b = self.v.builder
        place = self.place
        down, row = b.lshr(pair, constant(3)), b.shl(b.and_(pair, constant(7)), constant(1))
        source = b.add(place.s, b.add(b.mul(down, constant(2 * PLACE)), b.mul(row, constant(ROWS))))
        first = b.add(place.key, b.shl(pair, constant(1)))
        numbers = [[self.numbers(b.add(source, constant(h * PLACE + k * ROWS)), b.add(first, constant(k)), h)
                    for h in (0, 1)] for k in (0, 1)]
        pairs = [b.add(b.add(place.pairs_at, b.mul(place.pairs_next, constant(half))), b.mul(pair, constant(2 * ROWS)))
                 for half in (0, 1)]
        self.put(b, self.work, Places(b.add(b.add(place.at, b.mul(down, place.down)), b.mul(row, constant(SIDE))),
                                      pairs), numbers)

    def numbers(self, source: Any, key: Any, half: int) -> tuple[Any, Any]:
        """Emit P and dS of a key and 16 queries."""
        v, b = self.v, self.v.builder
        zero = v.number(0.0)
        x = b.fmul(v.load(self.work.s, source), self.ratio)
        t = v.tanh(x) if self.capped else None
        if t:
            x = b.fmul(t, self.cap)
        p = v.exp(v.smaller(zero, b.fsub(x, self.lse[half])))
        slope = v.fma(v.load(self.work.s, b.add(source, constant(4 * PLACE))), self.scale, b.fneg(self.delta[half]))
        ds = b.fmul(p, slope)
        if t:
            ds = b.fmul(ds, b.fsub(v.number(1.0), b.fmul(t, t)))
        if self.masked:
            key = v.splat(b.load(at(b, self.work.key_here, key)))
            seen = b.and_(b.icmp_signed("<=", self.low[half], key), b.icmp_signed("<", key, self.high[half]))
            p, ds = v.where(seen, p, zero), v.where(seen, ds, zero)
        return p, ds
