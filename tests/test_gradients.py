"""Score functions, and the backward pass of one block: every backend against a dense float64 softmax."""

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_block import BOUND, run
from oracle import BIASES, DISTANCES, FUNCTIONS, case, dense, functions

from ringmpi.backends import HOST_NAMES, open_backend
from ringmpi.backends.numba_ import amx
from ringmpi.backends.numba_ import backend as numba_
from ringmpi.backends.numba_.forward import Forward
from ringmpi.dtypes import DTYPES, TOLERANCE


@pytest.fixture(scope="module", params=[*HOST_NAMES, "tiles"])
def backend(request):
    """Every backend, and numba once more with bfloat16 on the CPU's tiles."""
    on_tiles = request.param == "tiles"
    if on_tiles and amx.missing():
        pytest.skip(f"no tiles: {amx.missing()}")
    opened = open_backend("numba" if on_tiles else request.param, 2)
    opened.settle("tiles" if on_tiles else "widen", [opened.ways])
    yield opened
    opened.close()


def check(backend, q, k, v, begin, end, dtype, kind="plain", scale=0.3, blocks=1, seed=0, bound=None):
    """Forward and backward against the dense softmax, with random cotangents and positions."""
    rng = np.random.default_rng(seed)
    queries, keys = np.sort(rng.choice(3000, len(q), replace=False)), np.sort(rng.choice(3000, len(k), replace=False))
    if "neighbours" in kind:
        queries, keys = np.arange(len(q)) + 100, np.arange(len(k))
    score, sinks = functions(kind, q.shape[1], queries, keys, seed)
    dout = rng.standard_normal((*q.shape[:2], v.shape[2])).astype(q.dtype)
    dlse = rng.standard_normal(q.shape[:2])
    got = run(backend, q, k, v, begin, end, scale, score, sinks, blocks, dout, dlse)
    see = oracle.sees(begin, end, len(k))
    want = dense(q, k, v, see, scale, sinks=sinks, dout=dout, dlse=dlse, **score)
    largest = max(np.abs(want[name]).max(initial=0.0) for name in ("dq", "dk", "dv"))      # of few pairs one may cancel
    tables = {f"drelative {i}": pair for i, pair in enumerate(zip(got.pop("drelative", ()), want.pop("drelative", ()),
                                                                  strict=True))}
    for name, (x, exact) in tables.items():
        got[name], want[name] = x, exact
    for name, x in got.items():
        unit = max(largest, np.abs(want[name]).max(initial=0.0)) if name in tables else largest
        error = oracle.error(x, want[name], unit if name.startswith("d") else None)
        most = bound or (BOUND[dtype] if name.startswith("d") else TOLERANCE[dtype] * (2 if kind != "plain" else 1))
        if name == "lse":
            most = 1e-13 if dtype == "float64" else 2e-6
        assert error <= most, (name, error)
    unseen = ~see.any(axis=1)
    assert (got["dq"][unseen] == 0).all()
    assert (got["dk"][~see.any(axis=0)] == 0).all()
    assert (got["dv"][~see.any(axis=0)] == 0).all()
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (3, 1)])
def test_dense_softmax(backend, dtype, kind, heads, kv_heads):
    check(backend, *case(0, 201, 403, heads, kv_heads, 24, 40, dtype), dtype, kind, blocks=3)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2)])
def test_a_bias_of_the_keys(backend, dtype, kind, heads, kv_heads):
    got = check(backend, *case(0, 201, 403, heads, kv_heads, 24, 40, dtype), dtype, kind, blocks=3)
    left_out = np.isneginf(functions(kind, heads, [], np.arange(403))[0]["key_bias"])
    assert got["dkey_bias"].shape == left_out.shape
    assert (got["dkey_bias"][left_out] == 0).all()
    assert (got["dk"][left_out.all(axis=1)] == 0).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2)])
def test_a_bias_by_distance(backend, dtype, kind, heads, kv_heads):
    check(backend, *case(0, 201, 403, heads, kv_heads, 24, 40, dtype), dtype, kind, blocks=3)


@pytest.mark.parametrize("kind", ["plain", "all", *BIASES[:1], "left out by head and relative", "axes and relative"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2)])
@pytest.mark.parametrize(("n_q", "n_k", "count"), [(3, 403, 9), (31, 700, 5), (401, 300, 2), (201, 403, 40)])
def test_many_intervals(backend, kind, heads, kv_heads, n_q, n_k, count):
    q, k, v, *_ = case(0, n_q, n_k, heads, kv_heads, 24, 40, "float32")
    check(backend, q, k, v, *oracle.many_intervals(count, n_q, n_k, count), "float32", kind, blocks=2)


def test_where_the_tile_unit_may_multiply_each_interval_is_a_pass(monkeypatch):
    loops = []
    run_all = Forward.run
    monkeypatch.setattr(Forward, "run", lambda self: loops.append(self.block.arrays.begin.shape) or run_all(self))
    monkeypatch.setattr(numba_.NumbaBackend, "_on_tiles", lambda *given: True)
    for name in ("_is_for_tiles", "_is_worth_pieces"):               # but it does not
        monkeypatch.setattr(numba_, name, lambda block, dtype: False)
    opened = open_backend("numba", 1)
    q, k, v, *_ = case(0, 40, 300, 2, 1, 24, 40, "float32")
    check(opened, q, k, v, *oracle.many_intervals(2, 40, 300, 4), "float32")
    assert loops == [(1, 40)] * 4
    opened.close()


def test_what_only_sees_infinite_products_is_nan_and_what_sees_no_key_is_0(backend):
    """A query that sees only keys that are left out, and one whose products are -inf, each with its own bias."""
    q, k, v = (np.ones((n, 1, 8)) for n in (4, 30, 30))
    k[10:20] = -np.inf
    begin, end = np.array([0, 10, 0, 20]), np.array([10, 20, 20, 30])
    bias = np.linspace(-1, 1, 30)[:, None]
    bias[:10] = -np.inf
    got = run(backend, q, k, v, begin, end, 0.3, {"key_bias": bias}, dout=q)
    assert (got["out"][0] == 0).all()
    assert np.isnan(got["out"][1:3]).all()
    assert np.isfinite(got["out"][3]).all()
    assert got["lse"][:3, 0].tolist() == [-np.inf] * 3
    assert (got["dq"][0] == 0).all()
    assert np.isnan(got["dq"][1:3]).all()
    assert np.isfinite(got["dq"][3]).all()


@settings(deadline=None, max_examples=40)
@given(n_q=st.integers(0, 300), n_k=st.integers(0, 300), heads=st.sampled_from([(1, 1), (4, 2)]),
       dim=st.integers(1, 40), dim_v=st.integers(1, 40), dtype=st.sampled_from(sorted(DTYPES)), seed=st.integers(0, 99),
       blocks=st.integers(1, 4), kind=st.sampled_from(FUNCTIONS + BIASES + DISTANCES))
def test_any_shape(backend, n_q, n_k, heads, dim, dim_v, dtype, seed, blocks, kind):
    check(backend, *case(seed, n_q, n_k, *heads, dim, dim_v, dtype), dtype, kind, blocks=blocks, seed=seed)


def check_float64_accumulator(backend, dtype, n_q, n_k):
    """Narrower inputs, all score functions: what is not rounded at the end is as exact as float64."""
    q, k, v, begin, end = case(5, n_q, n_k, 2, 1, 16, 16, dtype)
    dout = np.random.default_rng(0).standard_normal((n_q, 2, 16)).astype(q.dtype)
    score, sinks = functions("all", 2, np.arange(n_q), np.arange(n_k))
    j = np.arange(n_k)
    want = dense(q, k, v, (j >= begin[:, None]) & (j < end[:, None]), 0.3, sinks=sinks, dout=dout, **score)
    got = run(backend, q, k, v, begin, end, 0.3, score, sinks, dout=dout, kind="float64")
    bound = {"float32": 2e-7, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]      # out is rounded, and delta by it
    for name, x in got.items():
        assert oracle.error(x, want[name]) <= (1e-13 if name in ("lse", "dv") else bound), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_accumulator_on_request(backend, dtype):
    check_float64_accumulator(backend, dtype, 50, 400)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_reaches_the_pairs_that_see_it_and_no_others(backend, dtype, where):
    q, k, v, begin, end = case(2, 90, 300, 4, 2, 8, 8, dtype)
    dout = np.random.default_rng(0).standard_normal((90, 4, 8)).astype(q.dtype)
    see = (np.arange(300) >= begin[:, None]) & (np.arange(300) < end[:, None])
    row = int(np.flatnonzero(see.sum(axis=1) > 20)[3])
    {"q": q, "k": k, "v": v, "dout": dout}[where][40 if where in "kv" else row, 1, 3] = np.nan
    got = run(backend, q, k, v, begin, end, 0.3, {}, dout=dout, blocks=2)
    nan = {name: np.isnan(x).any(axis=2) for name, x in got.items() if name != "lse"}
    if where in ("q", "dout"):                     # a row of head 1, whose keys are those of key head 0
        rows, keys = np.zeros((90, 4), bool), np.zeros((300, 2), bool)
        rows[row, 1] = True
        keys[see[row], 0] = True
    else:                                          # a key of key head 1, which heads 2 and 3 have
        rows = np.repeat([[False, False, True, True]], 90, axis=0) & see[:, 40, None]
        keys = np.zeros((300, 2), bool)
        keys[see[see[:, 40]].any(axis=0), 1] = True
    assert (nan["dq"] == rows).all()
    assert (nan["dk"] == keys).all()
    if where != "v":
        assert (nan["dv"] == keys).all()


@pytest.mark.parametrize("kind", ["plain", "all", "bias by head"])
def test_central_differences(kind):
    """The oracle of the oracle: what backward says is how the result changes."""
    q, k, v, begin, end = case(8, 6, 9, 4, 2, 5, 3, "float64")
    score, sinks = functions(kind, 4, np.arange(6), np.arange(9))
    rng = np.random.default_rng(0)
    dout, dlse = rng.standard_normal((6, 4, 3)), rng.standard_normal((6, 4))
    backend = open_backend("numpy", 1)

    def loss(q, k, v):
        got = run(backend, q, k, v, begin, end, 0.3, score, sinks)
        return (got["out"] * dout).sum() + (np.where(np.isfinite(got["lse"]), got["lse"], 0) * dlse).sum()

    got = run(backend, q, k, v, begin, end, 0.3, score, sinks, dout=dout, dlse=dlse)
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        for _ in range(20):
            at, step = tuple(rng.integers(n) for n in x.shape), 1e-5
            middle = x[at]
            x[at] = middle + step
            more = loss(q, k, v)
            x[at] = middle - step
            less = loss(q, k, v)
            x[at] = middle
            assert abs((more - less) / (2 * step) - got[name][at]) < 1e-8
    backend.close()
