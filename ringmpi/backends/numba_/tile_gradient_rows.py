"""32 × 32 products to weights and gradients of scores, on their way from tile to tile of the backward pass.

S and dP come transposed, a key a row, so that queries lie across lanes: what is known of a query is a lane, and a row
of P and of dS is, rounded, a row of what dV and dK are multiplied from. dQ takes the same dS in pairs of keys.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from .amx import ROWS, TILE, lanes, to_row
from .tile_squares import SIDE
from .vector import I32, Vectors, at, constant, load, loop, store, unpack

PLACE = TILE // 2           # float32 in a tile


@intrinsic
def differentiate_square(context, work, place, score, scale):  # type: ignore[no-untyped-def]
    """Make P and dS of the S and dP in `work.s`, of a score that is plain; all pairs are seen.

    `work` is a `TileGradientWork`, `place` a `SquarePlace`, `score` a `TileScore`; dS is `scale` times the gradient of
    the score.
    """
    return _differentiate(work, place, score, scale, masked=False, capped=False)


@intrinsic
def differentiate_masked_square(context, work, place, score, scale):  # type: ignore[no-untyped-def]
    """Do what `differentiate_square` does where not all pairs are seen; of the others both are 0."""
    return _differentiate(work, place, score, scale, masked=True, capped=False)


@intrinsic
def differentiate_capped_square(context, work, place, score, scale):  # type: ignore[no-untyped-def]
    """Do what `differentiate_masked_square` does, of a score that has a cap."""
    return _differentiate(work, place, score, scale, masked=True, capped=True)


def _differentiate(work: Any, place: Any, score: Any, scale: Any, masked: bool, capped: bool) -> Any:
    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        work, place, score = (unpack(context, builder, signature.args[i], values[i]) for i in range(3))
        pass_ = _Pass(Vectors(builder, types.float32), work, place, score, values[3], masked, capped)
        with loop(builder, constant(0), constant(SIDE // 2)) as pair:
            pass_.keys(pair)
        return context.get_dummy_value()

    return types.void(work, place, score, scale), emit


class _Pass:
    """Emits the pass over a square, two keys at a time."""

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
        source = b.add(b.mul(down, constant(2 * PLACE)), b.mul(row, constant(ROWS)))
        target = b.add(b.add(place.at, b.mul(down, place.down)), b.mul(row, constant(SIDE)))
        ds = []
        for k in (0, 1):
            key = b.add(b.add(place.key, b.shl(pair, constant(1))), constant(k))
            both = [self.numbers(b.add(source, constant(h * PLACE + k * ROWS)), key, h) for h in (0, 1)]
            p = to_row(b, *(x for x, _ in both))
            ds.append(to_row(b, *(y for _, y in both)))
            for array, x in ((self.work.p, p), (self.work.ds, ds[k])):
                store(b, x, at(b, array, target), constant(k * SIDE))

        # Pairs of keys, column by column, in the order in which `query_column` says.
        for half in (0, 1):
            numbers = [8 * (c // 8) + 4 * half + c % 8 // 2 + 2 * ROWS * (c % 2) for c in range(2 * ROWS)]
            place_of_pairs = b.add(b.add(place.pairs_at, b.mul(place.pairs_next, constant(half))),
                                   b.mul(pair, constant(2 * ROWS)))
            store(b, b.shuffle_vector(*ds, lanes(numbers)), self.work.ds_pairs, place_of_pairs)

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
            key = v.splat(b.trunc(key, I32))
            seen = b.and_(b.icmp_signed("<=", self.low[half], key), b.icmp_signed("<", key, self.high[half]))
            p, ds = v.where(seen, p, zero), v.where(seen, ds, zero)
        return p, ds
