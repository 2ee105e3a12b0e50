"""Every backend has the contract's methods, and computes what a dense float64 softmax computes."""

import inspect
import itertools

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import case, key_bias

from ringmpi import BackendError, DtypeError, OptionError
from ringmpi.backends import HOST_NAMES, open_backend, reason_missing
from ringmpi.backends.base import Backend
from ringmpi.backends.cuda.backend import CudaBackend
from ringmpi.backends.numba_ import amx
from ringmpi.backends.numba_ import backend as numba_
from ringmpi.backends.numba_.backend import NumbaBackend
from ringmpi.backends.numpy_ import NumpyBackend
from ringmpi.dtypes import DTYPES, TOLERANCE, accumulator
from ringmpi.score import Score
from ringmpi.softmax import State, finish

BACKENDS = list(HOST_NAMES)


@pytest.fixture(scope="module", params=[*BACKENDS, "tiles"])
def backend(request):
    """Every backend; and Numba's with bfloat16 on the CPU's tiles, few rows among them."""
    if request.param == "tiles" and amx.missing():
        pytest.skip(f"no tiles: {amx.missing()}")
    opened = open_backend("numba" if request.param == "tiles" else request.param, 2)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tiles":
            opened.settle("tiles", [opened.ways])
            patch.setattr(numba_, "_is_for_tiles", lambda block, dtype: True)
        yield opened
    opened.close()


def run(backend, q, k, v, begin, end, scale=0.3, blocks=1, kind=None):
    """Fold k and v in several blocks; rows see begin..end of the whole."""
    state = State.empty(len(q), q.shape[1], v.shape[2], accumulator(q.dtype, kind))
    edges = np.linspace(0, len(k), blocks + 1).astype(int)
    pairs = 0
    for a, b in itertools.pairwise(edges):
        pairs += sum(backend.accumulate(state, q, np.ascontiguousarray(k[a:b]), np.ascontiguousarray(v[a:b]),
                                        np.clip(begin, a, b) - a, np.clip(end, a, b) - a, Score(scale)))
    assert pairs == (end - begin).sum()
    out, lse = np.empty((*q.shape[:2], v.shape[2]), q.dtype), np.empty(q.shape[:2], state.acc.dtype)
    finish(state, end > begin, out, lse)
    return out, lse


def check(backend, q, k, v, begin, end, dtype, blocks=1):
    out, lse = run(backend, q, k, v, begin, end, blocks=blocks)
    j = np.arange(len(k))
    want, want_lse = oracle.attend(q, k, v, (j >= begin[:, None]) & (j < end[:, None]), 0.3)
    assert oracle.error(out, want) <= TOLERANCE[dtype]
    assert oracle.error(lse, want_lse) <= (1e-13 if dtype == "float64" else 2e-6)
    assert (out[end <= begin] == 0).all()
    assert (lse[end <= begin] == -np.inf).all()


@pytest.mark.parametrize("kind", [NumbaBackend, NumpyBackend, CudaBackend])
def test_backends_keep_the_contract(kind):
    theirs = {n: f for n, f in inspect.getmembers(kind, inspect.isfunction) if not n.startswith("_")}
    ours = {n: f for n, f in inspect.getmembers(Backend, inspect.isfunction) if not n.startswith("_")}
    assert theirs.keys() == ours.keys()
    for method, function in ours.items():
        assert str(inspect.signature(theirs[method])) == str(inspect.signature(function))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (3, 1)])
def test_dense_softmax(backend, dtype, heads, kv_heads):
    check(backend, *case(0, 301, 1003, heads, kv_heads, 24, 40, dtype), dtype, blocks=3)


@settings(deadline=None, max_examples=40)
@given(n_q=st.integers(0, 300), n_k=st.integers(0, 300), heads=st.sampled_from([(1, 1), (4, 2)]),
       dim=st.integers(1, 40), dim_v=st.integers(1, 40), dtype=st.sampled_from(sorted(DTYPES)), seed=st.integers(0, 99),
       blocks=st.integers(1, 4))
def test_any_shape(backend, n_q, n_k, heads, dim, dim_v, dtype, seed, blocks):
    check(backend, *case(seed, n_q, n_k, *heads, dim, dim_v, dtype), dtype, blocks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_accumulator_on_request(backend, dtype):
    q, k, v, begin, end = case(5, 50, 400, 2, 1, 16, 16, dtype)
    state = State.empty(50, 2, 16, accumulator(q.dtype, "float64"))
    for _ in backend.accumulate(state, q, k, v, begin, end, Score(0.3)):
        pass
    out, lse = np.empty((50, 2, 16)), np.empty((50, 2))
    finish(state, end > begin, out, lse)
    j = np.arange(400)
    want, want_lse = oracle.attend(q, k, v, (j >= begin[:, None]) & (j < end[:, None]), 0.3)
    assert oracle.error(out, want) < 1e-13
    assert oracle.error(lse, want_lse) < 1e-13


@pytest.mark.parametrize("scores", [1e4, -1e4])
def test_large_scores_do_not_overflow(backend, scores):
    q, k, v, _, _ = case(1, 40, 600, 2, 2, 8, 8, "float64")
    q, k, v = (x.astype(np.float32) for x in (q * scores, k, v))
    begin, end = np.zeros(40, int), np.full(40, 600)
    out, lse = run(backend, q, k, v, begin, end, blocks=5)
    want, want_lse = oracle.attend(q, k, v, np.ones((40, 600), bool), 0.3)
    # a score of 1e4 in float32 is known to 1e-3, so weights are too
    assert oracle.error(out, want) < 2e-2
    assert oracle.error(lse, want_lse) < 1e-6


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("n_q", [4, 250])
def test_the_largest_values_are_right_or_not_finite(backend, dtype, signs, n_q):
    """Right where largest value × keys is in range; beyond it, in any number of blocks, right or not finite."""
    rng, n_k = np.random.default_rng(3), 300
    most = float(np.finfo(accumulator(DTYPES[dtype])).max)
    q, k = (rng.standard_normal((n, 2, 8)).astype(DTYPES[dtype]) for n in (n_q, n_k))
    sign = np.where(rng.random((n_k, 2, 8)) < 0.5, -1, 1) if signs else np.ones((n_k, 2, 8))
    begin, end = np.zeros(n_q, np.int64), np.full(n_q, n_k)
    for factor in (0.99 / n_k, 0.01, 0.5, 0.99):
        v = (sign * most * factor).astype(DTYPES[dtype])
        want, _ = oracle.attend(q, k, (v.astype(np.float64) / most), np.ones((n_q, n_k), bool), 0.3)
        for blocks in (1, 3):
            out, _ = run(backend, q, k, v, begin, end, blocks=blocks)
            finite, bound = np.isfinite(out.astype(np.float64)), TOLERANCE[dtype] * np.abs(want).max()
            assert finite.all() or factor * n_k > 1
            assert np.abs(out.astype(np.float64) / most - want)[finite].max(initial=0.0) <= bound
            if dtype != "float64":
                exact, _ = run(backend, q, k, v, begin, end, blocks=blocks, kind="float64")
                assert np.abs(exact.astype(np.float64) / most - want).max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_reach_the_rows_that_see_them_and_no_others(backend, dtype, bad, where):
    q, k, v, begin, end = case(2, 90, 300, 4, 2, 8, 8, dtype)
    arrays = {"q": q, "k": k, "v": v}
    arrays[where][40, 1, 3] = bad
    out, lse = run(backend, q, k, v, begin, end, blocks=2)
    j = np.arange(300)
    see = (j >= begin[:, None]) & (j < end[:, None])
    want, want_lse = oracle.attend(q, k, v, see, 0.3)
    assert oracle.error(out, want) <= TOLERANCE[dtype]
    assert oracle.error(lse, want_lse) <= (1e-13 if dtype == "float64" else 2e-6)
    touched = ~np.isfinite(out.astype(float)).all(axis=(1, 2))
    assert not touched[~(see[:, 40] if where != "q" else np.arange(90) == 40)].any()
    assert touched.any() or bad == -np.inf or where == "q"


def test_all_scores_minus_infinity_is_not_blindness(backend):
    q, k, v, begin, end = case(3, 6, 5, 1, 1, 4, 4, "float32")
    begin[:], end[:] = 0, 5
    end[2] = 0
    q[...], k[...] = 1, -np.inf
    out, lse = run(backend, q, k, v, begin, end)
    assert (out[2] == 0).all()
    assert np.isnan(out[[0, 1, 3, 4, 5]]).all()
    assert (lse == -np.inf).all()


def test_no_array_of_all_scores(backend):
    import tracemalloc
    n = 3000
    q, k, v, _, _ = case(4, n, n, 1, 1, 8, 8, "float32")
    begin, end = np.zeros(n, int), np.full(n, n)
    run(backend, q, k, v, begin, end)
    tracemalloc.start()
    try:
        run(backend, q, k, v, begin, end)
        assert tracemalloc.get_traced_memory()[1] < 4 * n * n / 3
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("dtype", "heads", "n_k", "score"), [
    ("float32", 8, 700, Score(0.3)), ("bfloat16", 2, 700, Score(0.3)), ("float64", 4, 5000, Score(-0.3)),
    ("float32", 4, 90, Score(0.3, softcap=2.0)), ("float16", 32, 40, Score(0.3)),
    ("float32", 8, 700, Score(0.3, key_bias=key_bias("left out by head", 8, 700))),
    ("bfloat16", 4, 300, Score(0.3, softcap=2.0, key_bias=key_bias("left out", 4, 300)))])
def test_a_bound_block_is_met_again_and_again(backend, dtype, heads, n_k, score):
    """The bits of `accumulate`, whatever queries come, and however many keys they see by then."""
    if backend.products == "tiles":
        pytest.skip("few rows are bound, which are not for tiles")
    rng = np.random.default_rng(1)
    k, v = (rng.standard_normal((n_k, 2, dim)).astype(DTYPES[dtype]) for dim in (24, 20))
    states = [State.empty(3, heads, 20, accumulator(k.dtype)) for _ in range(2)]
    block = backend.bind(states[0], k, v, 3, heads, score)
    for begin, end in [([0, 5, 9], [1, 5, 33]), ([7, 0, 0], [n_k // 2, n_k // 2 + 1, 40]), ([0] * 3, [n_k] * 3)]:
        if score.key_bias is not None:        # as where other keys have come in their place
            score.key_bias[:] = score.key_bias[::-1].copy()
        block.see(np.array(begin), np.array(end))
        for _ in range(2):
            q = rng.standard_normal((3, heads, 24)).astype(k.dtype)
            for state in states:
                state.reset()
            for _ in block.fold(q):
                pass
            for _ in backend.accumulate(states[1], q, k, v, np.array(begin), np.array(end), score):
                pass
            for name, x in vars(states[0]).items():
                np.testing.assert_array_equal(x, vars(states[1])[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [False, True])
def test_merged_states_are_those_of_all_keys(backend, dtype, sinks):
    """Parts that saw nothing, rows that no part saw, NaN in one row: what combine and finish of the contract give."""
    rng = np.random.default_rng(2)
    kind = accumulator(DTYPES[dtype])
    batch, n_q, heads, dim_v, parts = 2, 3, 4, 20, 3
    acc = rng.standard_normal((parts, batch, n_q, heads, dim_v)).astype(kind)
    row_max, row_sum = (rng.uniform(1, 30, (parts, batch, n_q, heads)).astype(kind) for _ in range(2))
    seen = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0]], np.uint8)
    for x, blank in ((acc, 0), (row_sum, 0), (row_max, -np.inf)):
        x[np.broadcast_to(seen[:, None] == 0, (parts, batch, n_q))] = blank
    acc[0, 1, 0, 2, 3] = np.nan
    scores = rng.standard_normal(heads).astype(kind) if sinks else None
    flat = np.concatenate([np.concatenate([x[:, i].reshape(parts, -1) for x in (acc, row_max, row_sum)], axis=1)
                           for i in range(batch)], axis=1)
    padded = np.ascontiguousarray(np.pad(flat, ((0, 0), (0, 2))))
    found = np.empty((batch, n_q, heads, dim_v), DTYPES[dtype]), np.empty((batch, n_q, heads), kind)
    wanted = [x.copy() for x in found]
    backend.merge(padded, scores, seen, *found)
    Backend(1).merge(padded, scores, seen, *wanted)
    for x, y in zip(found, wanted, strict=True):
        tolerance = {"rtol": 4 * TOLERANCE[dtype], "atol": 4 * TOLERANCE[dtype]}
        np.testing.assert_allclose(x.astype("f8"), y.astype("f8"), **tolerance)
    assert np.isnan(found[0].astype("f8")).sum() == 1
    assert (found[0][:, 2] == 0).all()
    assert sinks or (found[1][:, 2] == -np.inf).all()


def test_an_abandoned_loop_writes_no_more(backend):
    n = 4000
    q, k, v, _, _ = case(6, n, n, 2, 2, 16, 16, "float32")
    state = State.empty(n, 2, 16, np.float32)
    loop = backend.accumulate(state, q, k, v, np.zeros(n, int), np.full(n, n), Score(0.3))
    next(loop)
    loop.close()
    before = state.acc.copy()
    for _ in range(20):
        other = State.empty(1, 2, 16, np.float32)
        sum(backend.accumulate(other, q[:1], k, v, np.array([0]), np.array([n]), Score(0.3)))
    assert (state.acc == before).all()


def test_names():
    with pytest.raises(OptionError, match="expected one of auto"):
        open_backend("fortran", 1)
    assert open_backend("auto", 1).name == "numba"


def test_a_missing_backend_says_why(monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in reason_missing("numba")
    with pytest.raises(BackendError, match="numba is not installed"):
        open_backend("numba", 1)
    assert open_backend("auto", 1).name == "numpy"


def test_accumulators():
    assert accumulator(np.dtype("f8")) == np.float64
    assert accumulator(DTYPES["bfloat16"]) == np.float32
    with pytest.raises(DtypeError, match="accumulator"):
        accumulator(np.dtype("f8"), "float32")
    with pytest.raises(DtypeError, match="accumulator"):
        accumulator(np.dtype("f4"), "nonsense")
