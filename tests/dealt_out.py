"""Canonical order without MPI: ranks are simulated, one after the other, on any backend.

Keys are cut into blocks of whole tiles that come in ascending order, queries are dealt in any way.
"""

from dataclasses import replace

import numpy as np
import oracle
from cases import make_layout, make_mask

from ringmpi import Contiguous, Mask
from ringmpi.dtypes import accumulator
from ringmpi.intervals import stack
from ringmpi.score import Score, dropout_keys
from ringmpi.softmax import Gradient

NAMES = "out", "lse", "dq", "dk", "dv"


class Grid:
    """Queries and keys on a grid of 30 columns; a query sees keys up to 4 away in both directions: 9 intervals."""

    def bounds(self, queries, n_q, n_k):
        row, column = (np.asarray(queries) + n_k - n_q) // 30, (np.asarray(queries) + n_k - n_q) % 30
        lows = [(row + d) * 30 + np.maximum(column - 4, 0) for d in range(-4, 5)]
        highs = [(row + d) * 30 + np.minimum(column + 5, 30) for d in range(-4, 5)]
        return [(np.clip(a, 0, n_k), np.clip(b, 0, n_k)) for a, b in zip(lows, highs, strict=True)]


class Problem:
    """Arrays and options of an attention, the same however it is dealt out."""

    def __init__(self, dtype, mask, heads=(4, 2), dims=(16, 24), scored=False, seed=0, lengths=(900, 1300), scale=0.25,
                 kind=None):
        rng = np.random.default_rng(seed)
        self.n_q, self.n_k = lengths
        self.q, self.k, self.v = oracle.random_qkv(rng, *lengths, *heads, *dims, dtype)
        self.acc = accumulator(self.q.dtype, kind)
        self.dout = rng.standard_normal((self.n_q, heads[0], dims[1])).astype(self.q.dtype)
        self.dlse = rng.standard_normal((self.n_q, heads[0])).astype(self.acc)
        self.mask = Grid() if mask == "grid" else Mask(**make_mask(mask, self.n_k, self.n_q))
        self.score, self.sinks = Score(scale), None
        if scored:
            self.sinks = rng.standard_normal(heads[0])
            self.score = Score(scale, 3.0, 2.0 ** -np.arange(1, heads[0] + 1), 0.2,
                               dropout_keys=dropout_keys(7, 1, heads[0])[0])

    def score_of(self, queries, keys):
        if not self.score.positional:
            return self.score
        return replace(self.score, queries=queries + self.n_k - self.n_q, keys=keys)

    def seen(self, queries):
        bounds = self.mask.bounds(queries, self.n_q, self.n_k)
        return np.any([end > begin for begin, end in bounds], axis=0) | (self.sinks is not None)

    def intervals(self, queries, layout, rank):
        """Columns of a rank's keys that queries see: for each interval (begin, end)."""
        return [tuple(layout.count_below(x, rank) for x in pair)
                for pair in self.mask.bounds(queries, self.n_q, self.n_k)]


def tiles(length, size, tile):
    """Give a layout of contiguous blocks of whole tiles, as equal as can be."""
    edges = np.minimum(np.arange(size + 1) * -(-length // tile) // size * tile, length)
    return Contiguous(np.diff(edges))


def compute(backend, problem, size, kind):
    """Give out, lse, dq, dk and dv as `size` ranks would compute them."""
    def cut(length):
        return tiles(length, size, backend.canonical_tile) if backend.canonical else Contiguous.even(length, size)

    got = of_queries(backend, problem, make_layout(kind, problem.n_q, size), cut(problem.n_k))
    return got | of_keys(backend, problem, got, make_layout(kind, problem.n_k, size), cut(problem.n_q))


def of_queries(backend, p, layout, blocks):
    """Give out, lse, delta and dq: queries dealt out by a layout meet blocks of keys."""
    got = {"out": np.empty(p.dout.shape, p.q.dtype), "lse": np.empty(p.dlse.shape, p.acc),
           "delta": np.empty(p.dlse.shape, p.acc), "dq": np.empty(p.q.shape, p.acc)}
    for rank in range(layout.size):
        mine = layout.positions(rank)
        q, dout, dlse, seen = (backend.to_device(x) for x in (p.q[mine], p.dout[mine], p.dlse[mine], p.seen(mine)))
        out, lse, dq = (backend.empty(got[name][mine].shape, got[name].dtype) for name in ("out", "lse", "dq"))
        state = backend.new_state(len(mine), q.shape[1], p.v.shape[2], p.acc)
        backend.reset(state, p.sinks)
        for k, v, begin, end, score in steps(backend, p, mine, blocks):
            sum(backend.accumulate(state, q, k, v, begin, end, score))
        backend.finish(state, seen, out, lse)
        gradient = backend.new_gradient(dout, out, lse, dlse, dq)
        for k, v, begin, end, score in steps(backend, p, mine, blocks):
            others = (None, None) if backend.canonical else cleared(backend, p, k, v)
            sum(backend.backward(gradient, q, k, v, *others, begin, end, score))
        for name, x in {"out": out, "lse": lse, "delta": gradient.delta, "dq": dq}.items():
            got[name][mine] = backend.to_numpy(x)
    return got


def of_keys(backend, p, known, layout, blocks):
    """Give dk and dv: keys dealt out by a layout meet blocks of queries."""
    got = {"dk": np.empty(p.k.shape, p.acc), "dv": np.empty(p.v.shape, p.acc)}
    for rank in range(layout.size):
        mine = layout.positions(rank)
        k, v = (backend.to_device(x[mine]) for x in (p.k, p.v))
        dk, dv = cleared(backend, p, k, v)
        for source in range(blocks.size):
            for queries in parts(p, blocks.positions(source), backend.canonical_tile):
                q, dout, lse, delta = (backend.to_device(x[queries])
                                       for x in (p.q, p.dout, known["lse"], known["delta"]))
                gradient = Gradient(dout, lse, delta, None if backend.canonical else cleared(backend, p, q)[0])
                seen = stack(p.intervals(queries, layout, rank))
                sum(backend.backward(gradient, q, k, v, dk, dv, *seen, p.score_of(queries, mine)))
        got["dk"][mine], got["dv"][mine] = backend.to_numpy(dk), backend.to_numpy(dv)
    return got


def cleared(backend, p, *arrays):
    """Give zeros for the gradients of arrays."""
    made = [backend.empty(x.shape, p.acc) for x in arrays]
    for x in made:
        backend.clear(x)
    return made


def steps(backend, p, queries, blocks):
    """What queries meet: (k, v, begin, end, score), blocks in ascending order, and intervals within them."""
    for source in range(blocks.size):
        keys = blocks.positions(source)
        k, v = (backend.to_device(x[keys]) for x in (p.k, p.v))
        yield k, v, *stack(p.intervals(queries, blocks, source)), p.score_of(queries, keys)


def parts(p, queries, tile):
    """Cut a block of queries into tiles where a key may be in several intervals."""
    return np.split(queries, range(tile, len(queries), tile)) if isinstance(p.mask, Grid) else [queries]


def bits(x):
    """The bits of an array, NaN aside: one is as good as another."""
    x = np.where(np.isnan(x), x.dtype.type(np.nan), x).astype(x.dtype)
    return x.view(f"u{x.dtype.itemsize}")


def same(got, want):
    """Which results have the same bits."""
    return {name: np.array_equal(bits(got[name]), bits(want[name])) for name in NAMES}


def assert_same(got, want):
    found = same(got, want)
    assert all(found.values()), found
