"""Canonical order: the same bits on any number of ranks, for any layout and any number of threads; without MPI.

Ranks are simulated: keys are cut into blocks of whole tiles that come in ascending order, queries are dealt in any way.
"""

from dataclasses import replace

import numpy as np
import oracle
import pytest
from cases import covering, make_layout, make_mask

from ringmpi import BackendError, Contiguous, Mask, OptionError
from ringmpi.backends import HOST_NAMES, open_backend
from ringmpi.backends.numba_ import amx, tile_workspace, workspace
from ringmpi.backends.numba_ import backend as numba_
from ringmpi.backends.numba_.vector import machine
from ringmpi.dtypes import DTYPES, TOLERANCE, accumulator
from ringmpi.score import Score, dropout_keys
from ringmpi.softmax import Gradient

SIZES = 1, 2, 3, 4, 5, 7, 8, 16
LAYOUTS = "striped", "uneven", "empty", "custom", "zigzag", "contiguous"
MASKS = "full", "causal", "window", "documents", "first", "all", "grid"
TILE = numba_.NumbaBackend.canonical_tile
N_Q, N_K = 900, 1300                 # 7 tiles of keys, the last one not whole: with 8 ranks some have none
NAMES = "out", "lse", "dq", "dk", "dv"
needs_tiles = pytest.mark.skipif(bool(amx.missing()), reason=f"no tiles: {amx.missing()}")


class Grid:
    """Queries and keys on a grid of 30 columns; a query sees keys up to 4 away in both directions: 9 intervals."""

    def bounds(self, queries, n_q, n_k):
        row, column = (np.asarray(queries) + n_k - n_q) // 30, (np.asarray(queries) + n_k - n_q) % 30
        lows = [(row + d) * 30 + np.maximum(column - 4, 0) for d in range(-4, 5)]
        highs = [(row + d) * 30 + np.minimum(column + 5, 30) for d in range(-4, 5)]
        return [(np.clip(a, 0, n_k), np.clip(b, 0, n_k)) for a, b in zip(lows, highs, strict=True)]


class Problem:
    """Arrays and options of an attention, the same however it is dealt out."""

    def __init__(self, dtype, mask, heads=(4, 2), dims=(16, 24), scored=False, seed=0, lengths=(N_Q, N_K)):
        rng = np.random.default_rng(seed)
        self.n_q, self.n_k = lengths
        self.q, self.k, self.v = oracle.random_qkv(rng, *lengths, *heads, *dims, dtype)
        self.dout = rng.standard_normal((self.n_q, heads[0], dims[1])).astype(self.q.dtype)
        self.dlse = rng.standard_normal((self.n_q, heads[0])).astype(accumulator(self.q.dtype))
        self.mask = Grid() if mask == "grid" else Mask(**make_mask(mask, self.n_k))
        self.score, self.sinks = Score(0.25), None
        if scored:
            self.sinks = rng.standard_normal(heads[0])
            self.score = Score(0.25, 3.0, 2.0 ** -np.arange(1, heads[0] + 1), 0.2,
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


def tiles(length, size):
    """Give a layout of contiguous blocks of whole tiles, as equal as can be."""
    edges = np.minimum(np.arange(size + 1) * -(-length // TILE) // size * TILE, length)
    return Contiguous(np.diff(edges))


def compute(problem, size, kind, threads, canonical=True, products="auto"):
    """Give out, lse, dq, dk and dv as `size` ranks would compute them."""
    backend = open_backend("numba", threads, canonical=canonical)
    backend.settle(products, [backend.ways])
    cut = tiles if canonical else Contiguous.even
    try:
        got = of_queries(backend, problem, make_layout(kind, problem.n_q, size), cut(problem.n_k, size))
        return got | of_keys(backend, problem, got, make_layout(kind, problem.n_k, size), cut(problem.n_q, size))
    finally:
        backend.close()


def of_queries(backend, p, layout, blocks):
    """Give out, lse, delta and dq: queries dealt out by a layout meet blocks of keys."""
    acc = accumulator(p.q.dtype)
    got = {"out": np.empty(p.dout.shape, p.q.dtype), "lse": np.empty(p.dlse.shape, acc),
           "delta": np.empty(p.dlse.shape, acc), "dq": np.empty(p.q.shape, acc)}
    for rank in range(layout.size):
        mine = layout.positions(rank)
        q, dout, out, lse, dq = p.q[mine], p.dout[mine], got["out"][mine], got["lse"][mine], got["dq"][mine]
        state = backend.new_state(len(q), q.shape[1], p.v.shape[2], acc)
        backend.reset(state, p.sinks)
        for keys, begin, end in steps(p, mine, blocks):
            sum(backend.accumulate(state, q, p.k[keys], p.v[keys], begin, end, p.score_of(mine, keys)))
        backend.finish(state, p.seen(mine), out, lse)
        gradient = backend.new_gradient(dout, out, lse, p.dlse[mine], dq)
        for keys, begin, end in steps(p, mine, blocks):
            k, v = p.k[keys], p.v[keys]
            others = (None, None) if backend.canonical else (np.zeros(k.shape, acc), np.zeros(v.shape, acc))
            sum(backend.backward(gradient, q, k, v, *others, begin, end, p.score_of(mine, keys)))
        for name, x in {"out": out, "lse": lse, "delta": gradient.delta, "dq": dq}.items():
            got[name][mine] = x
    return got


def of_keys(backend, p, known, layout, blocks):
    """Give dk and dv: keys dealt out by a layout meet blocks of queries."""
    acc = accumulator(p.q.dtype)
    got = {"dk": np.empty(p.k.shape, acc), "dv": np.empty(p.v.shape, acc)}
    for rank in range(layout.size):
        mine = layout.positions(rank)
        k, v = p.k[mine], p.v[mine]
        dk, dv = np.zeros(k.shape, acc), np.zeros(v.shape, acc)
        for source in range(blocks.size):
            for queries in parts(p, blocks.positions(source)):
                q = p.q[queries]
                gradient = Gradient(p.dout[queries], known["lse"][queries], known["delta"][queries],
                                    None if backend.canonical else np.zeros(q.shape, acc))
                for begin, end in p.intervals(queries, layout, rank):
                    sum(backend.backward(gradient, q, k, v, dk, dv, begin, end, p.score_of(queries, mine)))
        got["dk"][mine], got["dv"][mine] = dk, dv
    return got


def steps(p, queries, blocks):
    """What queries meet: (keys of a block, begin, end), blocks in ascending order, and intervals within them."""
    for source in range(blocks.size):
        for begin, end in p.intervals(queries, blocks, source):
            yield blocks.positions(source), begin, end


def parts(p, queries):
    """Cut a block of queries into tiles where a key may be in several intervals."""
    return np.split(queries, range(TILE, len(queries), TILE)) if isinstance(p.mask, Grid) else [queries]


def bits(x):
    """The bits of an array, NaN aside: one is as good as another."""
    x = np.where(np.isnan(x), x.dtype.type(np.nan), x).astype(x.dtype)
    return x.view(f"u{x.dtype.itemsize}")


def assert_same(got, want):
    for name in NAMES:
        assert np.array_equal(bits(got[name]), bits(want[name])), name


def check_sizes(problem, kinds, sizes=SIZES, **options):
    """Compare all sizes with one rank: out, lse, dq, dk and dv, bit by bit."""
    want = compute(problem, 1, "contiguous", 1, **options)
    for number, size in enumerate(sizes):
        for kind in kinds(number):
            assert_same(compute(problem, size, kind, 1 + number % 3, **options), want)
    return want


def one_of(number):
    return [LAYOUTS[number % len(LAYOUTS)]]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_same_bits_on_any_number_of_ranks(dtype, mask):
    check_sizes(Problem(dtype, mask, seed=MASKS.index(mask)), one_of, products="widen")


@needs_tiles
@pytest.mark.parametrize("mask", MASKS)
def test_same_bits_on_tiles(mask):
    check_sizes(Problem("bfloat16", mask, seed=MASKS.index(mask)), one_of, products="tiles")


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", covering({
    "dtype": list(DTYPES), "mask": MASKS, "heads": [(4, 4), (8, 2), (3, 1)], "dims": [(64, 64), (17, 33)],
    "scored": [False, True]}), ids=lambda case: "-".join(map(str, case.values())))
def test_same_bits_however_dealt_out(case):
    check_sizes(Problem(**case), lambda _: LAYOUTS[:3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(3, 1), (7, 7)])
def test_score_functions_and_sinks(heads, dtype):
    check_sizes(Problem(dtype, "first", heads, (17, 9), scored=True), one_of, (2, 5, 16))


@needs_tiles
def test_softcap_and_dims_on_tiles():
    """Where queries and keys share key heads unequally, and numbers fill no tile."""
    problem = Problem("bfloat16", "first", (3, 1), (33, 65))
    problem.score = Score(0.25, 3.0)
    check_sizes(problem, one_of, (2, 5, 16), products="tiles")


@pytest.mark.skipif(not machine().pairs, reason="no AVX512_BF16")
def test_pairs_of_bfloat16():
    check_sizes(Problem("bfloat16", "causal"), one_of, (2, 5), products="pairs")


@pytest.mark.parametrize("products", ["widen", *["pairs"] * machine().pairs, *["tiles"] * (not amx.missing())])
@pytest.mark.parametrize("mask", ["full", "window"])
def test_numbers_that_are_not_finite(mask, products):
    """Rows that see a NaN go another way than rows that don't, whichever rows stand beside them."""
    problem = Problem("bfloat16", mask)
    problem.v[[5, 700]] = np.nan
    problem.v[333, 0, 3] = np.inf
    problem.k[[900, 1290], 1] = -np.inf
    problem.q[7] = np.nan
    want = check_sizes(problem, one_of, (2, 3, 7), products=products)
    assert np.isnan(want["out"].astype(float)).any()
    assert mask == "full" or np.isfinite(want["out"].astype(float)).any()


def test_few_queries_and_keys():
    """One query, or one key; no thread splits them."""
    for lengths in ((1, 3000), (7, 3000), (3000, 1), (200, 5)):
        check_sizes(Problem("float32", "full", lengths=lengths), one_of, (2, 3, 16))


def test_numbers_that_vanish():
    """Products below the smallest number leave 0 of either sign: it must not tell what was seen beside them."""
    problem = Problem("float32", "window")
    problem.v *= np.float32(1e-42)
    problem.v[::3] = -1e-45
    check_sizes(problem, one_of, (2, 3, 7))


@needs_tiles
def test_numbers_that_vanish_on_tiles():
    """The same where products of numbers that do not vanish do."""
    problem = Problem("bfloat16", "window")
    for x, size in ((problem.q, 1e-25), (problem.k, 1e-25), (problem.v, 1e-10), (problem.dout, 1e-10),
                    (problem.dlse, 1e-20)):
        x *= x.dtype.type(size)
    check_sizes(problem, one_of, (2, 3, 7), products="tiles")


@pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=needs_tiles)])
def test_cuts_of_the_work_do_not_matter(tiles, monkeypatch):
    """Neither the size of the cache nor that of buffers, pieces and steps shows in the result."""
    problem = Problem("bfloat16" if tiles else "float32", "first", scored=not tiles)
    products = "tiles" if tiles else "auto"
    want = compute(problem, 1, "contiguous", 1, products=products)
    for module in (workspace, tile_workspace):
        monkeypatch.setattr(module, "cache_bytes", lambda level: 2**18)
    monkeypatch.setattr(numba_, "PACKED_BYTES", 1)
    monkeypatch.setattr(numba_, "STEP_FLOP", 1)
    assert_same(compute(problem, 3, "uneven", 2, products=products), want)


def test_right_too():
    """The results are those of the normal order, up to rounding, and out is that of a dense softmax."""
    problem = Problem("float32", "causal")
    got, normal = (compute(problem, 3, "striped", 2, canonical) for canonical in (True, False))
    want, _ = oracle.attend(problem.q, problem.k, problem.v, oracle.visible(N_Q, N_K, causal=True), 0.25)
    assert oracle.error(got["out"], want) <= TOLERANCE["float32"]
    for name in NAMES:
        assert oracle.error(got[name], normal[name]) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_other_bits_without_it(name):
    """The normal order has other bits on other numbers of ranks: this test file can see that."""
    problem = Problem("float32", "causal")
    one, three = (compute(problem, size, "striped", 1, canonical=False)[name] for size in (1, 3))
    assert not np.array_equal(one, three)


@pytest.mark.parametrize("name", [name for name in HOST_NAMES if name != "numba"])
def test_backends_without_it(name):
    with pytest.raises(OptionError, match=r"canonical order: .* numba, got "):
        open_backend(name, 1, canonical=True)


@pytest.mark.parametrize("canonical", [False, True])
def test_gradients_asked_for_together(canonical):
    """Canonical order makes dq, or dk and dv; the normal one all three. What can't be had is an error, not left out."""
    q, k, v = oracle.random_qkv(0, 9, 9, 1, 1, 8, 8, "float32")
    numbers = np.zeros((9, 1), np.float32)
    backend = open_backend("numba", 1, canonical=canonical)
    for dq, dk, dv in ([(q, k, v), (None, None, None)] if canonical else [(q, None, None), (None, k, v)]):
        with pytest.raises(BackendError, match="expected arrays for dq"):
            next(backend.backward(Gradient(q, numbers, numbers, dq), q, k, v, dk, dv, np.zeros(9, int), np.full(9, 9),
                                  Score(1.0)))
    backend.close()
