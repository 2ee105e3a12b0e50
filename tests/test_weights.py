"""What backends make of weights: sums of columns and rows, heaviest keys, weights; against dense float64 weights."""

import numpy as np
import oracle
import pytest
from oracle import case, functions, of_score

from ringmpi.analysis.groups import members
from ringmpi.backends import open_backend
from ringmpi.backends.heaviest import NO_KEY, best, new_tops
from ringmpi.dtypes import BFLOAT16
from ringmpi.score import Score

BOUND = {"float64": 2e-13, "float32": 2e-5, "bfloat16": 2e-5, "float16": 2e-5}       # of sums of weights up to 1
BACKENDS = [("numpy", 1), ("numpy", 3), ("numba", 1), ("numba", 3)]


def dense(q, k, see, scale, score):
    """Weights and scores, (n_q, heads, n_k), and lse, in float64."""
    n_k = len(k)
    every = np.broadcast_to(np.eye(n_k)[:, None], (n_k, k.shape[1], n_k))
    got = oracle.dense(q, k, every, see, scale, **score)
    with np.errstate(divide="ignore"):
        return got["out"], np.log(got["out"]) + got["lse"][..., None], got["lse"]


def run(loop):
    return sum(loop)


@pytest.fixture(params=BACKENDS, ids=lambda x: f"{x[0]}-{x[1]}")
def backend(request):
    name, threads = request.param
    opened = open_backend(name, threads)
    yield opened
    opened.close()


@pytest.mark.parametrize(("dtype", "shape", "kind"), [
    ("float32", (70, 900, 4, 2, 16), "plain"), ("float64", (33, 260, 3, 1, 9), "all"),
    ("bfloat16", (300, 130, 2, 2, 24), "softcap"), ("float32", (1, 7, 1, 1, 8), "alibi"),
    ("float16", (40, 300, 2, 1, 16), "plain"), ("float32", (70, 900, 4, 2, 16), "axes and relative"),
    ("bfloat16", (60, 300, 4, 2, 16), "all and relative"), ("float64", (40, 200, 2, 2, 8), "near relative")])
@pytest.mark.parametrize("intervals", [1, 6])
def test_dense_weights(backend, dtype, shape, kind, intervals):
    n_q, n_k, heads, kv_heads, dim = shape
    q, k, _, begin, end = case(7, n_q, n_k, heads, kv_heads, dim, 1, dtype)
    begin[: n_q // 2], end[: n_q // 2] = 0, n_k                  # whole tiles too
    if intervals > 1:
        begin, end = oracle.many_intervals(1, n_q, n_k, intervals)
    score, _ = functions(kind, heads, np.arange(n_q), np.arange(n_k))
    score = {name: x for name, x in score.items() if not name.startswith("dropout")}
    j = np.arange(n_k)
    see = oracle.sees(begin, end, n_k)
    p, x, lse64 = dense(q, k, see, 0.3, score)
    lse = lse64.astype(np.float64 if dtype == "float64" else np.float32)
    of_block = Score(0.3, **of_score(score, lse.dtype))
    unit = BOUND[dtype]

    columns = np.ones((n_k, heads))
    assert run(backend.column_sums(columns, q, k, lse, begin, end, of_block)) == see.sum()
    assert np.abs(columns - 1 - p.sum(axis=0).T).max() <= unit * max(1, n_q / 20)

    sums = np.ones((n_q, heads, 3))
    values = np.arange(n_k) * 3.0 + 2**30
    assert run(backend.row_sums(sums, q, k, lse, values, begin, end, of_block)) == see.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(p * np.log(p), axis=2)
    assert np.abs(sums[..., 0] - 1 - p.sum(axis=2)).max() <= unit
    assert np.abs(sums[..., 1] - 1 - entropy).max() <= 10 * unit
    means = (sums[..., 2] - 1) - 2**30 * (sums[..., 0] - 1)
    assert np.abs(means - p @ (values - 2**30)).max() <= unit * 3 * n_k + 2e-6

    weights = np.full((n_q, heads, n_k), 7, lse.dtype)
    assert run(backend.row_weights(weights, q, k, lse, begin, end, of_block)) == see.sum()
    assert (weights[~np.broadcast_to(see[:, None], weights.shape)] == 7).all()
    assert np.abs(np.where(see[:, None], weights - p, 0)).max() <= unit

    # Of two halves, the second first, as if they were blocks of other ranks.
    scores, positions = new_tops((n_q, heads, 5), lse.dtype)
    half = n_k // 2
    for part in (slice(half, n_k), slice(0, half)):
        low, high = (np.clip(edge, part.start, part.stop) - part.start for edge in (begin, end))
        run(backend.row_tops(scores, positions, q, k[part], j[part], low, high, of_block.of_columns(part)))
    check_tops(scores, positions, x, see, 2e-12 if dtype == "float64" else 1e-4)


def check_tops(scores, positions, x, see, bound):
    """The keys are those that score most, within rounding; nothing is there twice."""
    n = scores.shape[-1]
    shown = np.where(see[:, None], x, -np.inf)
    want = -np.sort(-shown, axis=-1)[..., :n]
    want = np.pad(want, [(0, 0), (0, 0), (0, n - want.shape[-1])], constant_values=-np.inf)
    some = np.minimum(see.sum(axis=1), n)[:, None, None] > np.arange(n)
    some = np.broadcast_to(some, scores.shape)
    assert (positions[~some] == NO_KEY).all()
    bound *= max(1, np.abs(want[some]).max(initial=0))
    at = np.take_along_axis(shown, np.where(some, positions, 0), -1)
    assert np.abs(scores[some] - want[some]).max(initial=0) <= bound
    assert np.abs(scores[some] - at[some]).max(initial=0) <= bound
    order = np.sort(positions, axis=-1)
    assert (np.diff(order, axis=-1)[order[..., 1:] < NO_KEY] > 0).all()


def test_groups_of_tokens():
    numbers = np.array([2, 0, 0, -1, 2, 1])
    found = [(group, np.arange(6)[some].tolist()) for group, some in members(numbers)]
    assert found == [(0, [1, 2]), (1, [5]), (2, [0, 4])]
    assert not list(members(numbers[:0]))


def test_ties_go_by_position(backend):
    """Small integers: scores are exact, and many are equal; also with 0 keys, and more places than keys."""
    rng = np.random.default_rng(1)
    q, k = (rng.integers(-1, 2, (n, 2, 4)).astype("f4") for n in (50, 400))
    begin, end = np.zeros(50, int), np.arange(50) * 8
    keys = np.sort(rng.permutation(4000)[:400])
    scores, positions = new_tops((50, 2, 6), np.dtype("f4"))
    for part in (slice(150, 400), slice(0, 150)):
        low, high = (np.clip(edge, part.start, part.stop) - part.start for edge in (begin, end))
        run(backend.row_tops(scores, positions, q, k[part], keys[part], low, high, Score(-0.5)))
    x = np.einsum("ihd,jhd->ihj", q, k) * np.float32(-0.5)
    see = np.arange(400) < end[:, None]
    want = best(np.where(see[:, None], x, -np.inf).astype("f4"),
                np.where(see[:, None], np.broadcast_to(keys, x.shape), NO_KEY), 6)
    assert (scores == want[0]).all()
    assert (positions == want[1]).all()


def test_no_key_that_is_not_seen(backend):
    """Not a NaN of it, nor an infinity; a NaN that is seen comes through, and first."""
    q, k, _, _, _ = case(3, 20, 300, 2, 1, 8, 1, "float32")
    k[100] = np.nan
    k[200] = np.inf
    lse = np.full((20, 2), 5, "f4")
    begin, end = np.full(20, 0), np.where(np.arange(20) < 10, 100, 150)
    columns, sums = np.zeros((300, 2)), np.zeros((20, 2, 3))
    run(backend.column_sums(columns, q, k, lse, begin, end, Score(0.3)))
    run(backend.row_sums(sums, q, k, lse, np.arange(300.0), begin, end, Score(0.3)))
    assert np.isnan(columns[100]).all()
    assert np.isfinite(np.delete(columns, 100, axis=0)).all()
    assert np.isfinite(sums[:10]).all()
    assert np.isnan(sums[10:]).all()
    scores, positions = new_tops((20, 2, 2), np.dtype("f4"))
    run(backend.row_tops(scores, positions, q, k, np.arange(300), begin, end, Score(0.3)))
    assert np.isfinite(scores[:10]).all()
    assert np.isnan(scores[10:, :, 0]).all()
    assert (positions[10:, :, 0] == 100).all()
    assert np.isfinite(scores[10:, :, 1]).all()


def test_weights_far_below_the_largest(backend):
    """A weight of 0 adds 0 to the entropy; a weight is never more than 1, however the lse is rounded."""
    q, k = np.full((9, 1, 4), 40, "f4"), np.zeros((40, 1, 4), "f4")
    k[3] = 30
    k[5] = -np.finfo("f4").max
    lse = np.full((9, 1), 4 * 40 * 30 - 0.5, "f4")
    sums, weights = np.zeros((9, 1, 3)), np.zeros((9, 1, 40), "f4")
    begin, end = np.zeros(9, int), np.full(9, 40)
    run(backend.row_sums(sums, q, k, lse, np.arange(40.0), begin, end, Score(1.0)))
    run(backend.row_weights(weights, q, k, lse, begin, end, Score(1.0)))
    assert (sums == [1, 0, 3]).all()
    assert (weights[:, 0] == (np.arange(40) == 3)).all()


def test_the_bits_do_not_depend_on_threads():
    q, k, _, begin, end = case(5, 500, 900, 4, 2, 16, 1, "float32")
    found = []
    for threads in (1, 2, 5):
        backend = open_backend("numba", threads)
        columns, sums, lse = np.zeros((900, 4)), np.zeros((500, 4, 3)), np.full((500, 4), 6, "f4")
        run(backend.column_sums(columns, q, k, lse, begin, end, Score(0.3)))
        run(backend.row_sums(sums, q, k, lse, np.arange(900.0), begin, end, Score(0.3)))
        backend.close()
        found.append(columns.tobytes() + sums.tobytes())
    assert len(set(found)) == 1


def test_cuda_says_that_it_can_not():
    from ringmpi.backends.cuda.backend import CudaBackend
    assert not CudaBackend.gives_weights


def test_bfloat16_is_taken_as_it_is(backend):
    """As float32 with the same numbers."""
    q, k, _, begin, end = case(5, 30, 70, 2, 2, 8, 1, "bfloat16")
    assert q.dtype == BFLOAT16
    lse = np.full((30, 2), 3, "f4")
    found = []
    for dtype in (BFLOAT16, np.float32):
        columns = np.zeros((70, 2))
        run(backend.column_sums(columns, q.astype(dtype), k.astype(dtype), lse, begin, end, Score(0.3)))
        found.append(columns.tobytes())
    assert found[0] == found[1]
