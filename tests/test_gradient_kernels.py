"""The backward pass of the Numba kernels: shapes around tiles and vectors, pieces, timing, accuracy, scores."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import oracle
import pytest
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from oracle import dense, functions
from test_kernels import NARROW, data, make_late, ranges

from ringmpi.backends import open_backend
from ringmpi.backends.numba_ import amx, backward, vector
from ringmpi.backends.numba_ import backend as numba_
from ringmpi.backends.numba_.backward_tile import backward_tile_shape
from ringmpi.backends.numba_.product import ROWS, VECTORS
from ringmpi.backends.numba_.tile_gradient_load import gradient_tile_shape
from ringmpi.dtypes import DTYPES, accumulator
from ringmpi.environment import cache_bytes
from ringmpi.score import Score, random_words
from ringmpi.softmax import Gradient, State

HERE = Path(__file__).parent
TILES = 2.0**-7             # error of gradients on the CPU's tiles: weights and ds are rounded to bfloat16
BOUND = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 5e-6, "float16": 5e-6}      # dq, dk, dv are not rounded


def known(q, k, v, begin, end, scale, seed=0, **score):
    """Random dout, lse and delta as a forward pass would leave them, and dense float64 gradients."""
    rng = np.random.default_rng(seed)
    dout, kind = rng.standard_normal((*q.shape[:2], v.shape[2])).astype(q.dtype), accumulator(q.dtype)
    j = np.arange(len(k))
    want = dense(q, k, v, (j >= begin[:, None]) & (j < end[:, None]), scale, dout=dout, **score)
    delta = (want["out"] * dout.astype("f8")).sum(axis=2)
    return Gradient(dout, want["lse"].astype(kind), delta.astype(kind), np.zeros(q.shape, kind)), want


def differentiate(gradient, q, k, v, begin, end, scale, threads=2, **score):
    """Gradients of Numba, from 0."""
    kind = gradient.dq.dtype
    gradient.dq.fill(0)
    dk, dv, backend = np.zeros(k.shape, kind), np.zeros(v.shape, kind), open_backend("numba", threads)
    try:
        pairs = sum(backend.backward(gradient, q, k, v, dk, dv, begin, end, Score(scale, **score)))
    finally:
        backend.close()
    assert pairs == (end - begin).sum()
    return {"dq": gradient.dq.copy(), "dk": dk, "dv": dv}


def zeros(x):
    """Zeros of the accumulator's dtype, as many."""
    return np.zeros(x.shape, accumulator(x.dtype))


def check(q, k, v, begin, end, scale=0.2, seed=0, threads=2, bound=1.0, **score):
    gradient, want = known(q, k, v, begin, end, scale, seed, **score)
    got = differentiate(gradient, q, k, v, begin, end, scale, threads, **score)
    dtype = next(name for name, kind in DTYPES.items() if kind == q.dtype)
    largest = {name: np.abs(want[name]).max(initial=0) for name in got}
    on_tiles = dtype == "bfloat16" and numba_.NumbaBackend.products == "tiles"
    for name, x in got.items():                          # of one key dq and dk are 0, but for rounding
        unit = max(largest[name], max(largest.values()) / 10)
        assert oracle.error(x, want[name], unit) <= bound * (TILES if on_tiles else BOUND[dtype]), name
    return got


@pytest.fixture
def on_tiles(monkeypatch):
    """bfloat16 multiplied on the CPU's tiles."""
    if amx.missing():
        pytest.skip(f"no tiles: {amx.missing()}")
    monkeypatch.setattr(numba_.NumbaBackend, "products", "tiles")


@pytest.fixture
def in_pieces(monkeypatch):
    """float32 multiplied on the CPU's tiles, in pieces."""
    if amx.missing():
        pytest.skip(f"no tiles: {amx.missing()}")
    monkeypatch.setattr(numba_.NumbaBackend, "float32_products", "pieces")


@pytest.fixture(params=["float32", "pieces", "tiles"])
def either(request):
    """A dtype: float32, multiplied as it is or in pieces, or bfloat16 that is multiplied on the CPU's tiles."""
    if request.param == "tiles":
        request.getfixturevalue("on_tiles")
        return "bfloat16"
    if request.param == "pieces":
        request.getfixturevalue("in_pieces")
    return "float32"


@pytest.mark.parametrize("n_q", [1, 5, 6, 7, 13, 200, 389])
@pytest.mark.parametrize("kind", ["causal", "window", "documents", "random"])
def test_shapes_around_tiles(n_q, kind, either):
    for seed, (n_k, heads, kv_heads) in enumerate([(1, 2, 2), (129, 3, 1), (1000, 2, 1)]):
        q, k, v = data(seed, n_q, n_k, heads, kv_heads, 24, 20, either)
        check(q, k, v, *ranges(kind, n_q, n_k, seed), seed=seed, threads=1 + seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 80, 100, 257, 512])
def test_any_dim(dtype, dim):
    for n_q in (3, 210):
        q, k, v = data(dim, n_q, 150, 2, 1, dim, 513 - dim, dtype)
        check(q, k, v, *ranges("causal", n_q, 150), scale=dim**-0.5)


@pytest.mark.parametrize("kind", ["plain", "softcap", "alibi", "all"])
@pytest.mark.parametrize("dim", [1, 3, 16, 31, 33, 80, 257, 512])
def test_any_dim_on_tiles(on_tiles, dim, kind):
    """Whole and part squares; scores with positions go another way, and are as exact as ever."""
    for n_q in (3, 210):
        q, k, v = data(dim, n_q, 150, 2, 1, dim, 513 - dim, "bfloat16")
        score, _ = functions(kind, 2, np.arange(n_q), np.arange(150))
        bound = 1.0 if kind in ("plain", "softcap") else BOUND["bfloat16"] / TILES
        check(q, k, v, *ranges("causal", n_q, 150), scale=dim**-0.5, bound=bound, **score)


@pytest.mark.parametrize("kind", ["plain", "softcap", "alibi"])
@pytest.mark.parametrize("dim", [1, 3, 16, 31, 33, 80, 257, 512])
def test_any_dim_in_pieces(in_pieces, dim, kind):
    """Whole and part squares, as exact as multiply-adds."""
    for n_q in (3, 210):
        q, k, v = data(dim, n_q, 150, 2, 1, dim, 513 - dim, "float32")
        score, _ = functions(kind, 2, np.arange(n_q), np.arange(150))
        check(q, k, v, *ranges("causal", n_q, 150), scale=dim**-0.5, **score)


def test_pieces_are_taken(in_pieces, monkeypatch):
    """Else what is compared here would be one and the same."""
    q, k, v = data(0, 100, 300, 2, 1, 64, 64, "float32")
    begin, end = ranges("causal", 100, 300)
    gradient, _ = known(q, k, v, begin, end, 0.2)
    got = differentiate(gradient, q, k, v, begin, end, 0.2)
    monkeypatch.setattr(numba_.NumbaBackend, "float32_products", "fma")
    want = differentiate(gradient, q, k, v, begin, end, 0.2)
    assert all((got[name] != want[name]).any() for name in got)


def test_few_pairs_take_multiply_adds(in_pieces, monkeypatch):
    """Where splitting takes longer than it saves; they are compiled beforehand too."""
    from ringmpi.backends.numba_ import compiled as compiled_
    monkeypatch.setattr(numba_, "PIECE_USES", 640)
    backend = open_backend("numba", 1)
    backend.prepare(np.dtype("f4"), np.dtype("f4"), 16, 16, backward=True)
    backend.close()
    before = [len(f.signatures) for f in (compiled_.backward_keys, compiled_.backward_on_tiles)]
    for n, same in ((100, True), (1400, False)):
        q, k, v = data(0, n, n, 1, 1, 16, 16, "float32")
        begin, end = np.zeros(n, int), np.full(n, n)
        gradient, _ = known(q, k, v, begin, end, 0.2)
        got = differentiate(gradient, q, k, v, begin, end, 0.2)
        with monkeypatch.context() as fma:
            fma.setattr(numba_.NumbaBackend, "float32_products", "fma")
            want = differentiate(gradient, q, k, v, begin, end, 0.2)
        assert all((got[name] == want[name]).all() == same for name in got)
    assert [len(f.signatures) for f in (compiled_.backward_keys, compiled_.backward_on_tiles)] == before


def cancelling(q, k, v, dout):
    """Scores and products dout·v of which all but the last digits cancel: between the first and the last number.

    Between two that are side by side multiply-adds would round a large sum once, and the tile unit each of its 32.
    """
    for x, y in ((q, k), (dout, v)):
        x[:, :, -1] = x[:, :, 0]
        y[:, :, 0] += 1000
        y[:, :, -1] -= 1000


def some_odd(q, k, v, dout):
    """Rows and keys of all sizes beside others, a whole tile among them."""
    q[3::17] *= np.float32(1e-12)
    q[5::31] *= np.float32(1e13)
    k[200:400] *= np.float32(1e-9)
    k[450::13] *= np.float32(1e-37)
    v[7::40] *= np.float32(1e-20)
    v[9::40] *= np.float32(1e-44)
    dout[2::11] *= np.float32(1e-36)
    dout[20:60] = 0


EXTREMES = {
    "scores of 1e4": lambda q, k, v, dout: q.__imul__(np.float32(2e3)),
    "cancelling": cancelling,
    "q up": lambda q, k, v, dout: (q.__imul__(np.float32(1e30)), k.__imul__(np.float32(1e-30))),
    "k up": lambda q, k, v, dout: (q.__imul__(np.float32(1e-30)), k.__imul__(np.float32(1e30))),
    "dout down": lambda q, k, v, dout: dout.__imul__(np.float32(1e-33)),
    "dout and v down": lambda q, k, v, dout: (dout.__imul__(np.float32(1e-11)), v.__imul__(np.float32(1e-5))),
    "v up, dout down": lambda q, k, v, dout: (v.__imul__(np.float32(1e34)), dout.__imul__(np.float32(1e-34))),
    "some odd": some_odd,
}


@pytest.mark.parametrize("kind", EXTREMES)
def test_pieces_of_extremes_are_as_exact_as_multiply_adds(kind, in_pieces, monkeypatch):
    """Beyond float32's bound only where multiply-adds are too, and no more than they."""
    rng = np.random.default_rng(5)
    q, k, v = data(5, 230, 600, 4, 2, 40, 36, "float32")
    dout = rng.standard_normal((*q.shape[:2], 36)).astype("f4")
    with np.errstate(under="ignore"):
        EXTREMES[kind](q, k, v, dout)
    begin, end = ranges("window", 230, 600)
    j = np.arange(600)
    want = dense(q, k, v, (j >= begin[:, None]) & (j < end[:, None]), 0.2, dout=dout)
    delta = (want["out"] * dout.astype("f8")).sum(axis=2)
    with np.errstate(under="ignore"):
        gradient = Gradient(dout, want["lse"].astype("f4"), delta.astype("f4"), np.zeros(q.shape, "f4"))
    errors = {}
    for way in ("pieces", "fma"):
        monkeypatch.setattr(numba_.NumbaBackend, "float32_products", way)
        got = differentiate(gradient, q, k, v, begin, end, 0.2)
        errors[way] = {name: oracle.error(x, want[name]) for name, x in got.items()}
    for name, x in errors["pieces"].items():
        assert x <= max(BOUND["float32"], 1.5 * errors["fma"][name]), (name, errors)


def test_odd_rows_beside_tiles_that_are_no_whole_panels(in_pieces):
    """Odd rows go by multiply-adds, which write whole panels of scores."""
    widths = [(a, b) for a in range(32, 257, 32) for b in range(32, 257, 32)
              if gradient_tile_shape(a, b, 3, cache_bytes(2))[1] % 64]
    assert widths
    for dim, dim_v in widths[::max(1, len(widths) // 4)]:
        q, k, v = data(dim, 257, 200, 1, 1, dim, dim_v, "float32")
        q[::2] *= np.float32(2.0**-30)
        k[3] *= np.float32(2.0**-30)
        check(q, k, v, np.zeros(257, int), np.full(257, 200), scale=dim**-0.5)


def test_small_numbers_of_pieces_vanish_below_what_float32_knows():
    """What P and dS lose to pieces below 2^-126, by NumPy: nothing beside their rows.

    Six products of pieces cut off are as exact as float32's.
    """
    rng = np.random.default_rng(6)

    def pieces(x):
        """Three pieces; the tile unit takes what is not normal for 0."""
        parts, rest = [], x.astype("f4")
        for _ in range(3):
            upper = (rest.view("u4") & np.uint32(0xFFFF0000)).view("f4")
            parts.append(np.where(np.abs(upper) < np.finfo("f4").tiny, 0, upper).astype("f8"))
            rest = rest - upper
        return parts

    def product(x, y):
        x, y = pieces(x), pieces(y)
        total = np.zeros((x[0].shape[0], y[0].shape[1]), "f4")
        for a, b in ((0, 2), (0, 1), (0, 0), (2, 0), (1, 0), (1, 1)):
            total += (x[a] @ y[b]).astype("f4")
        return total

    q, k, v, dout = (rng.standard_normal((n, 64)).astype("f4") for n in (300, 500, 500, 300))
    q *= np.float32(20)                                    # weights below e^-100
    s = q.astype("f8") @ k.T.astype("f8") / 8
    exact = np.exp(s - s.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    assert exact.min() < 2.0**-126
    p = exact.astype("f4")
    dp = dout.astype("f8") @ v.T.astype("f8")
    ds = p * (dp - (p * dp).sum(axis=1, keepdims=True))
    for weights in (p, ds.astype("f4")):
        assert np.abs(sum(pieces(weights)) - weights).max() <= 2.0**-125
    for x, y in ((q, k.T), (dout, v.T), (p.T, dout), (ds.astype("f4").T, q), (ds.astype("f4"), k)):
        want = x.astype("f8") @ y.astype("f8")
        assert np.abs(product(x, y) - want).max() <= 2e-7 * (np.abs(x).astype("f8") @ np.abs(y)).max()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_any_sign_of_the_scale(scale, kind):
    for dtype in DTYPES:
        q, k, v = data(0, 50, 300, 2, 2, 16, 16, dtype)
        score, _ = functions(kind, 2, np.arange(50), np.arange(300))
        got = check(q, k, v, *ranges("random", 50, 300), scale=scale, **score)
        assert (got["dq"] == 0).all() == (scale == 0)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_pieces_of_keys(kind, monkeypatch, either):
    """One tile at a time, one step for each: the sums of all are those of the whole."""
    q, k, v = data(0, 300, 2000, 4, 2, 32, 40, either)
    begin, end = ranges("window", 300, 2000)
    score, _ = functions(kind, 4, np.arange(300), np.arange(2000))
    gradient, _ = known(q, k, v, begin, end, 0.2, **score)
    whole = differentiate(gradient, q, k, v, begin, end, 0.2, **score)
    monkeypatch.setattr(numba_, "PACKED_BYTES", 1)
    monkeypatch.setattr(numba_, "STEP_FLOP", 1)
    pieces = check(q, k, v, begin, end, **score)
    assert all(oracle.error(pieces[name], whole[name]) < 2e-6 for name in whole)
    monkeypatch.undo()
    monkeypatch.setattr(backward, "SUMS_BYTES", 1)
    check(q, k, v, begin, end, threads=3, **score)


def test_steps_are_short(monkeypatch, either):
    """Between two yields lie a few tiles, whatever there is to do."""
    q, k, v = data(0, 400, 3000, 1, 1, 16, 16, either)
    begin, end = np.zeros(400, int), np.full(400, 3000)
    gradient, _ = known(q, k, v, begin, end, 0.2)
    monkeypatch.setattr(numba_, "STEP_FLOP", 1e7)
    backend = open_backend("numba", 1)
    steps = list(backend.backward(gradient, q, k, v, zeros(k), zeros(v), begin, end, Score(0.2)))
    backend.close()
    flop = 10 * 16 * np.array(steps)
    assert flop.sum() == 10 * 16 * 400 * 3000
    in_pieces = numba_.NumbaBackend.float32_products == "pieces"
    faster = backward.TILE_SPEED if either == "bfloat16" else backward.PIECES_SPEED if in_pieces else 1
    assert flop.max() < 4e7 * faster
    assert np.median(flop[flop > 0]) > 1e6


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_timing(threads, heads, monkeypatch, either):
    q, k, v = data(0, 400, 3000, heads, heads, 16, 16, either)
    begin, end = ranges("causal", 400, 3000)
    gradient, _ = known(q, k, v, begin, end, 0.2)
    first = differentiate(gradient, q, k, v, begin, end, 0.2, threads)
    make_late(monkeypatch)
    for _ in range(3):
        again = differentiate(gradient, q, k, v, begin, end, 0.2, threads)
        assert all((again[name] == first[name]).all() for name in first)


def test_gradients_are_added_to_what_is_there(either):
    q, k, v = data(0, 70, 500, 2, 1, 16, 24, either)
    begin, end = ranges("random", 70, 500)
    gradient, _ = known(q, k, v, begin, end, 0.2)
    got = differentiate(gradient, q, k, v, begin, end, 0.2)
    backend, more = open_backend("numba", 2), [zeros(k) + 1, zeros(v) + 1]
    gradient.dq.fill(1)
    sum(backend.backward(gradient, q, k, v, *more, begin, end, Score(0.2)))
    backend.close()
    for name, x in zip(("dq", "dk", "dv"), (gradient.dq, *more), strict=True):
        assert np.abs(x - 1 - got[name]).max() < 1e-5
        assert (x[got[name] == 0] == 1).all()


def test_nothing_to_do(either):
    for n_q, n_k in ((0, 5), (5, 0), (5, 5)):
        q, k, v = data(0, n_q, n_k, 2, 1, 8, 8, either)
        got = check(q, k, v, np.full(n_q, n_k // 2), np.full(n_q, n_k // 2))
        assert all((x == 0).all() for x in got.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_what_is_not_seen_adds_nothing(where, bad, either):
    """Numbers that are not finite, in rows and keys that no pair is made of."""
    q, k, v = data(1, 100, 700, 2, 1, 20, 36, either)
    begin, end = ranges("window", 100, 700)
    begin[::7] = end[::7]
    end = np.minimum(end, 690)
    begin = np.minimum(begin, end)
    gradient, _ = known(q, k, v, begin, end, 0.2)
    clean = differentiate(gradient, q, k, v, begin, end, 0.2)
    unseen = ~((np.arange(700)[None] >= begin[:, None]) & (np.arange(700)[None] < end[:, None])).any(axis=0)
    if where in "kv":
        {"k": k, "v": v}[where][unseen] = bad
    else:
        {"q": q, "dout": gradient.dout}[where][begin == end] = bad
        gradient.delta[begin == end] = np.nan
    got = differentiate(gradient, q, k, v, begin, end, 0.2)
    assert unseen.any()
    assert all((got[name] == clean[name]).all() for name in got)


@pytest.mark.parametrize("where", ["k", "v"])
def test_a_key_that_is_not_finite_spoils_what_sees_it_alone(where, either):
    """In the same tile, the same panel, the same group of rows: others keep every bit."""
    q, k, v = data(1, 12, 200, 1, 1, 20, 36, either)
    begin, end = np.zeros(12, int), np.where(np.arange(12) % 2, 200, 100)
    gradient, _ = known(q, k, v, begin, end, 0.2)
    clean = differentiate(gradient, q, k, v, begin, end, 0.2)
    {"k": k, "v": v}[where][150, 0, 3] = np.nan
    got = differentiate(gradient, q, k, v, begin, end, 0.2)
    assert (got["dq"][::2] == clean["dq"][::2]).all()
    assert np.isnan(got["dq"][1::2]).all()
    assert np.isnan(got["dk"][150]).all()
    if where == "v":                             # delta was not reckoned anew
        odd = np.arange(200) == 150              # in pieces this key goes another way, for which there is no NaN
        assert (got["dv"][~odd] == clean["dv"][~odd]).all()
        assert oracle.error(got["dv"], clean["dv"]) <= BOUND["float32"]


@pytest.mark.parametrize("where", ["q", "dout"])
def test_a_row_that_is_not_finite_spoils_what_it_sees_alone(where, either):
    q, k, v = data(1, 12, 200, 1, 1, 20, 36, either)
    begin, end = np.zeros(12, int), np.full(12, 200)
    end[4] = 50
    gradient, _ = known(q, k, v, begin, end, 0.2)
    clean = differentiate(gradient, q, k, v, begin, end, 0.2)
    {"q": q, "dout": gradient.dout}[where][4, 0, 3] = gradient.delta[4] = np.nan
    got = differentiate(gradient, q, k, v, begin, end, 0.2)
    for name in ("dk", "dv"):
        assert np.isnan(got[name][:50]).all()
        assert (got[name][50:] == clean[name][50:]).all()
    assert np.isnan(got["dq"][4]).all()
    assert (np.delete(got["dq"], 4, axis=0) == np.delete(clean["dq"], 4, axis=0)).all()


def test_read_only_and_strided_arrays(either):
    q, k, v = data(0, 30, 200, 2, 2, 16, 16, either)
    begin, end = ranges("causal", 30, 200)
    gradient, _ = known(q, k, v, begin, end, 0.2)
    want = differentiate(gradient, q, k, v, begin, end, 0.2)
    for x in (q, k, v, begin, end, gradient.dout, gradient.lse, gradient.delta):
        x.flags.writeable = False
    mirrored = np.ascontiguousarray(v[:, :, ::-1])[:, :, ::-1]
    gradient.dout = np.asfortranarray(gradient.dout)
    got = differentiate(gradient, q, np.asfortranarray(k), mirrored, begin, end, 0.2)
    assert all((got[name] == want[name]).all() for name in want)


def test_a_block_makes_nothing_anew(either):
    import tracemalloc
    q, k, v = data(0, 600, 4000, 2, 2, 64, 64, either)
    begin, end = np.zeros(600, int), np.full(600, 4000)
    backend, dk, dv = open_backend("numba", 2), zeros(k), zeros(v)
    gradient = Gradient(zeros(q), *np.zeros((2, 600, 2), np.float32), zeros(q))
    sum(backend.backward(gradient, q, k, v, dk, dv, begin, end, Score(0.1)))
    tracemalloc.start()
    try:
        sum(backend.backward(gradient, q, k, v, dk, dv, begin, end, Score(0.1)))
        assert tracemalloc.get_traced_memory()[1] < k.nbytes / 10
    finally:
        tracemalloc.stop()
        backend.close()


def test_work_space_does_not_grow_with_the_tokens(either):
    """Beyond the bounds keys come in pieces."""
    backend = open_backend("numba", 2)
    nbytes = {}
    for n in (40_000, 80_000):
        q, k, v = data(0, 2, n, 2, 2, 64, 64, either)
        begin, end = np.zeros(2, int), np.full(2, n)
        gradient = Gradient(zeros(q), *np.zeros((2, 2, 2), np.float32), zeros(q))
        sum(backend.backward(gradient, q, k, v, zeros(k), zeros(v), begin, end, Score(0.1)))
        nbytes[n] = sum(x.nbytes for x in (*backend._buffers._packed, *backend._buffers._sums))
    backend.close()
    assert max(nbytes.values()) <= 1.1 * (numba_.PACKED_BYTES + 2 * backward.SUMS_BYTES)


def test_one_loop_at_a_time(either):
    from ringmpi.errors import BackendError
    q, k, v = data(0, 30, 200, 2, 2, 16, 16, either)
    begin, end = np.zeros(30, int), np.full(30, 200)
    gradient, _ = known(q, k, v, begin, end, 0.2)
    backend = open_backend("numba", 2)
    loop = backend.backward(gradient, q, k, v, zeros(k), zeros(v), begin, end, Score(0.2))
    next(loop)
    state = State.empty(30, 2, 16, np.float32)
    with pytest.raises(BackendError, match="has not ended"):
        next(backend.accumulate(state, q, k, v, begin, end, Score(0.2)))
    loop.close()
    assert sum(backend.accumulate(state, q, k, v, begin, end, Score(0.2))) == 30 * 200
    backend.close()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_accuracy(dtype):
    """Over a long sequence the error is that of the products, not of the sums."""
    for n_q, n_k in ((300, 8192), (8192, 300)):
        q, k, v = data(7, n_q, n_k, 1, 1, 128, 128, dtype)
        check(q, k, v, np.zeros(n_q, int), np.full(n_q, n_k), 128**-0.5, bound=0.6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_scores(dtype):
    """A row that sees one key has weight 1 there, however large the score; lse and score are rounded alike."""
    q, k, v = data(11, 60, 500, 2, 1, 8, 8, dtype)
    q *= 1e9 if dtype == "float32" else 1e18
    begin = np.arange(60) * 5
    got = {}
    for scale in (1.0, -1.0):
        gradient, want = known(q, k, v, begin, begin + 1, scale)
        got = differentiate(gradient, q, k, v, begin, begin + 1, scale)
        backend, state = open_backend("numba", 2), State.empty(60, 2, 8, dtype)
        sum(backend.accumulate(state, q, k, v, begin, begin + 1, Score(scale)))
        backend.close()
        gradient.lse = state.row_max + np.log(state.row_sum)
        got = differentiate(gradient, q, k, v, begin, begin + 1, scale)
        assert oracle.error(got["dv"], want["dv"]) <= BOUND[dtype]
    # Were lse a little less than the score, e^(score - lse) would be no number: a weight is never more than 1.
    gradient.lse -= np.abs(gradient.lse) / 1000
    got = differentiate(gradient, q, k, v, begin, begin + 1, scale)
    assert oracle.error(got["dv"], want["dv"]) <= BOUND[dtype]


def test_tile_shape_fits_the_cache():
    lanes = vector.machine().vector_bytes // 4
    for cache in (2**18, 2**20, 2**21):
        for dim in (16, 128, 512):
            rows, keys = backward_tile_shape(dim, dim, 4, cache)
            assert rows % ROWS == keys % (VECTORS * lanes) == 0
            assert rows >= 8 * ROWS
            if rows > 8 * ROWS:
                assert 4 * (rows * (5 * dim + 2 * keys) + 5 * keys * dim) <= cache * 3 / 4


def emitted(name, kind):
    """Compile a word of the vector vocabulary for arrays, a vector at a time."""
    numbers, words = {"float32": (types.float32, types.int32), "float64": (types.float64, types.int64)}[kind]

    @intrinsic
    def word(context, x, y, z, out, at):
        def emit(context, builder, signature, values):
            v = vector.Vectors(builder, numbers)
            pointers = [vector.data(context, builder, signature.args[i], values[i]) for i in range(4)]
            if name == "tanh":
                v.store(v.tanh(v.load(pointers[0], values[4])), pointers[3], values[4])
                return context.get_dummy_value()
            arguments = [vector.load(builder, p, values[4], v.bits) for p in pointers[:3]]
            vector.store(builder, v.random_words(*arguments), pointers[3], values[4])
            return context.get_dummy_value()

        return types.void(x, y, z, out, at), emit

    lanes = vector.machine().lanes(numbers)

    @numba.njit
    def run(x, y, z, out):
        for at in range(0, len(out), lanes):
            word(x, y, z, out, at)

    assert isinstance(vector.Vectors(ir.IRBuilder(), numbers).bits, ir.VectorType)
    return run, np.dtype(str(words))


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_tanh_is_good_to_the_last_bits(kind):
    run, _ = emitted("tanh", kind)
    sizes = np.logspace(-37 if kind == "float32" else -300, 3, 2**14)
    x = np.concatenate([sizes, -sizes, np.linspace(-3, 3, 2**14)]).astype(kind)
    out = np.empty_like(x)
    run(x, x, x, out)
    want = np.tanh(x.astype(np.longdouble))
    assert (np.abs(out - want) <= 3 * np.finfo(kind).eps * np.abs(want)).all()
    x = np.resize(np.array([np.inf, -np.inf, np.nan, 0, 1e30, -1e30], kind), 48)
    out = np.empty_like(x)
    run(x, x, x, out)
    assert np.array_equal(out, np.tanh(x), equal_nan=True)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_random_words_are_those_of_numpy(kind):
    run, integer = emitted("words", kind)
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**32, 4096).astype(np.uint32)
    i, j = (rng.integers(-2**31, 2**31, 4096) for _ in range(2))
    out = np.empty(4096, integer)
    run(keys.astype(integer), i.astype(integer), j.astype(integer), out)
    assert (out.astype(np.uint32) == random_words(keys, i, j)).all()
    assert kind == "float32" or (out >> 32 == 0).all()


@pytest.mark.parametrize("n_q", [2, 4, 300])       # keys as they came, packed by each task, packed for all
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_what_numpy_drops(dtype, n_q):
    """With equal scores and values e_j the result says which weights are left."""
    kind = accumulator(DTYPES[dtype])
    q, k, v = np.zeros((n_q, 2, 4), DTYPES[dtype]), np.zeros((200, 1, 4), DTYPES[dtype]), np.eye(200)[:, None]
    score, _ = functions("dropout", 2, np.arange(n_q) - 2**31, np.arange(200) * 10**7)
    backend, state = open_backend("numba", 2), State.empty(n_q, 2, 200, kind)
    sum(backend.accumulate(state, q, k, v.astype(DTYPES[dtype]), np.zeros(n_q, int), np.full(n_q, 200),
                           Score(1.0, **score)))
    backend.close()
    words = random_words(score["dropout_keys"][:, None], score["queries"][:, None, None], score["keys"])
    assert ((state.acc > 0) == (words >= int(0.3 * 2**32))).all()
    assert np.unique(state.acc).tolist() == [0, kind.type(Score(1.0, **score).gain)]
    assert (state.row_sum == 200).all()


@pytest.mark.parametrize("n_q", [2, 4, 300])       # keys as they came, packed by each task, packed for all
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_slopes_at_the_ends_of_the_positions(dtype, n_q):
    """Distances up to 2^32 - 1 are right."""
    q, k, v = data(4, n_q, 100, 2, 1, 8, 8, dtype)
    queries, keys = np.linspace(-2**31, 2**31 - 1, n_q).astype(int), np.linspace(-2**31, 2**31 - 1, 100).astype(int)
    score = {"slopes": np.array([1e-9, 3e-10]), "queries": queries, "keys": keys}
    begin, end = np.zeros(n_q, int), np.full(n_q, 100)
    backend, state = open_backend("numba", 2), State.empty(n_q, 2, 8, dtype)
    sum(backend.accumulate(state, q, k, v, begin, end, Score(0.3, **score)))
    backend.close()
    want = dense(q, k, v, np.ones((n_q, 100), bool), 0.3, **score)
    assert oracle.error(state.row_max + np.log(state.row_sum), want["lse"]) <= (1e-13 if dtype == "float64" else 2e-6)
    check(q, k, v, begin, end, 0.3, **score)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("way", [*DTYPES, "tiles", "pieces"])
def test_prepare_compiles_all_that_a_pass_needs(way, back, plain, request):
    from ringmpi.backends.numba_ import compiled as compiled_
    if way in ("tiles", "pieces"):
        request.getfixturevalue({"tiles": "on_tiles", "pieces": "in_pieces"}[way])
    dtype = {"tiles": "bfloat16", "pieces": "float32"}.get(way, way)
    every = [getattr(compiled_, name) for name in ("add_sums", "backward_keys", "backward_on_tiles", "forward_keys",
                                                   "pack_backward", "pack_forward", "pack_tiles_backward")]
    backend, kind = open_backend("numba", 2), accumulator(DTYPES[dtype])
    backend.prepare(DTYPES[dtype], kind, 8, 8, plain=plain, backward=back)
    compiled = [len(f.signatures) for f in every]
    for n_q, dim, dim_v in [(2, 16, 16), (300, 16, 16), (2, 7, 3), (300, 7, 3)]:
        q, k, v = data(0, n_q, 50, 2, 1, dim, dim_v, dtype)
        q.flags.writeable = False
        functions_of, _ = functions("plain" if plain else "all" if n_q < 300 else "softcap", 2, np.arange(n_q),
                                    np.arange(50))
        score, whole = Score(0.1, **functions_of), np.full(n_q, 50)
        if back:
            dout, numbers = np.ones((n_q, 2, dim_v), DTYPES[dtype]), np.zeros((2, n_q, 2), kind)
            sum(backend.backward(Gradient(dout, *numbers, np.zeros(q.shape, kind)), q, k, v, np.zeros(k.shape, kind),
                                 np.zeros(v.shape, kind), 0 * whole, whole, score))
        else:
            sum(backend.accumulate(State.empty(n_q, 2, dim_v, kind), q, k, v, 0 * whole, whole, score))
    assert [len(f.signatures) for f in every] == compiled
    backend.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", sorted(NARROW)[:1])        # each takes the minute that compiling for it takes
def test_narrower_vectors_pass_the_same_tests(width):
    if os.uname().machine != "x86_64":
        pytest.skip("names of x86 CPUs")
    environment = os.environ | {"NUMBA_CPU_NAME": NARROW[width], "NUMBA_CPU_FEATURES": ""}
    tests = [str(HERE / "test_gradients.py"), __file__]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k",
               "(numba and 8-2 and (float32 or float64)) or around_tiles or (any_dim and float32) or tanh or words"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=HERE.parent,
                         check=False)
    assert run.returncode == 0, run.stdout[-3000:]
