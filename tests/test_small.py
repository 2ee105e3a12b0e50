"""Calls like the last: what is kept from one to the next serves those alone that it fits, and spares what it is for."""

import gc
import sys

import numpy as np
import pytest
from test_kernels import data, ranges

from ringmpi import Mask
from ringmpi.backends import open_backend
from ringmpi.backends.numba_ import backend as numba_
from ringmpi.backends.numba_ import forward, seen
from ringmpi.score import Score
from ringmpi.softmax import State, combine, finish

FEW, MANY = 3, 260


def fold(backend, q, k, v, begin, end, score, accumulator=np.float32):
    state = State.empty(len(q), q.shape[1], v.shape[2], accumulator)
    pairs = sum(backend.accumulate(state, q, k, v, begin, end, score))
    assert pairs == (end - begin).sum()
    return state.acc, state.row_max, state.row_sum


def unaligned(x):
    return np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)


def blocks(n_q):
    """Blocks each of which differs from the first in one thing."""
    def block(n_q=n_q, n_k=300, heads=4, kv_heads=2, dim=16, dim_v=16, dtype="float32", kind="causal", score=None,
              accumulator=np.float32, change=lambda x: x):
        arrays = [change(x) for x in data(n_q, n_q, n_k, heads, kv_heads, dim, dim_v, dtype)]
        return (*arrays, *ranges(kind, n_q, n_k), score or Score(0.2), accumulator)

    def heads_first(x):
        return np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)

    return [block(), block(n_q=n_q + 1), block(n_k=301), block(heads=8), block(kv_heads=1), block(kv_heads=4),
            block(dim=8), block(dim_v=24), block(dtype="bfloat16"), block(dtype="float64", accumulator=np.float64),
            block(kind="window"), block(kind="random"), block(score=Score(0.3)), block(score=Score(-0.2)),
            block(score=Score(0.2, softcap=2.0)),
            block(change=unaligned), block(change=heads_first), block(change=lambda x: x[:, ::-1]),
            block(kind="documents")]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_q", [FEW, MANY])
def test_what_is_kept_serves_blocks_like_it_alone(n_q, threads):
    kept = open_backend("numba", threads)
    cases = blocks(n_q)
    order = np.random.default_rng(n_q).permutation(np.repeat(np.arange(len(cases)), 2))
    got = {int(i): fold(kept, *cases[i]) for i in order}
    for i, case in enumerate(cases):
        alone = open_backend("numba", threads)
        for x, y in zip(got[i], fold(alone, *case), strict=True):
            assert (x == y).all(), i
        alone.close()
    kept.close()


@pytest.mark.parametrize("n_q", [FEW, MANY])
def test_a_block_is_cut_once(n_q, monkeypatch):
    cuts = []
    for name in ("_cut_keys", "_cut_rows"):
        made = getattr(forward.Forward, name)
        monkeypatch.setattr(forward.Forward, name, lambda self, made=made: cuts.append(1) or made(self))
    backend, case = open_backend("numba", 1), blocks(n_q)[0]
    first = fold(backend, *case)
    for _ in range(3):
        q, k, v, begin, end, *more = case
        again = fold(backend, q.copy(), k.copy(), v.copy(), begin.copy(), end.copy(), *more)
        assert all((x == y).all() for x, y in zip(first, again, strict=True))
    assert len(cuts) == 1
    monkeypatch.setattr(numba_, "STEP_FLOP", 1)                # other limits, other cuts
    fold(backend, *case)
    assert len(cuts) == 2
    backend.release()
    fold(backend, *case)
    assert len(cuts) == 3
    backend.close()


def test_what_the_caller_does_with_the_ranges_later_changes_nothing():
    backend, (q, k, v, begin, end, *more) = open_backend("numba", 1), blocks(MANY)[0]
    mine = begin.copy(), end.copy()
    first = fold(backend, q, k, v, *mine, *more)
    mine[1][:] = 1
    fold(backend, q, k, v, *mine, *more)
    again = fold(backend, q, k, v, begin, end, *more)
    assert all((x == y).all() for x, y in zip(first, again, strict=True))
    backend.close()


def test_only_so_much_is_kept():
    kept = seen.SeenBefore()
    for n in range(1, 3 * seen.KEPT_BLOCKS):
        kept.find(np.zeros(n, np.int64), np.full(n, 7))
        assert len(kept._kept) <= seen.KEPT_BLOCKS
    many = np.zeros(seen.KEPT_QUERIES + 1, np.int64)
    assert kept.find(many, many) is not kept.find(many, many)


@pytest.mark.parametrize("width", [1, 20, 200])
def test_rows_meet_the_tiles_that_they_see_alone(width, monkeypatch):
    """Of a narrow window, tiles of rows × keys are no more than the window's tiles, and those at its edges."""
    n, met = 3000, []
    run = forward.forward_keys
    monkeypatch.setattr(forward, "forward_keys", lambda numbers, score, x: met.append(x) or run(numbers, score, x))
    q, k, v = data(0, n, n, 2, 2, 16, 16, "float32")
    (begin, end), = Mask(window=(width, 0)).bounds(np.arange(n), n, n)
    for threads in (1, 2):
        backend = open_backend("numba", threads)
        met.clear()
        fold(backend, q, k, v, begin, end, Score(0.2))
        every = np.concatenate(met)
        tile = backend._packed.tile
        columns = every[:, 6] - every[:, 5]
        assert (columns <= every[:, 3] + width + 2 * tile).all()
        assert every[:, 3].sum() == 2 * n
        assert len(met) < len(every)                    # several of them in one call of machine code
        backend.close()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_states_are_combined_and_finished_as_the_reference_does(dtype):
    from ringmpi.dtypes import DTYPES
    acc_dtype = np.float64 if dtype == "float64" else np.float32
    rng = np.random.default_rng(3)
    states = []
    for _ in range(2):
        acc, row_max, row_sum = (rng.standard_normal((3, 9, 2, *more)).astype(acc_dtype) for more in ((5,), (), ()))
        row_sum = np.abs(row_sum) + 1
        row_max[:, 1], row_sum[:, 1], acc[:, 1] = -np.inf, 0, 0          # sees nothing anywhere
        row_max[0, 2], row_sum[0, 2], acc[0, 2] = -np.inf, 0, 0          # sees nothing here
        row_max[1, 3] = np.nan
        row_max[1, 4], row_sum[1, 4], acc[1, 4] = np.inf, np.nan, np.nan
        acc[1, 5] = np.inf
        rng = np.random.default_rng(3)
        states.append(State(acc, row_max, row_sum))
    visible = np.arange(9) != 1
    backend = open_backend("numba", 1)
    results = []
    for parts, join, end in zip(states, (backend.combine, combine), (backend.finish, finish), strict=True):
        whole = State(*(x[0].copy() for x in vars(parts).values()))
        join(whole, State(*(x[1:] for x in vars(parts).values())))
        out, lse = np.empty((9, 2, 5), DTYPES[dtype]), np.empty((9, 2), acc_dtype)
        end(whole, visible, out, lse)
        results.append((out.astype(np.float64), lse))
    (out, lse), (want, want_lse) = results
    error = {"float32": 1e-6, "float64": 1e-15, "bfloat16": 2.0**-8}[dtype]
    assert np.isnan(want).any()             # the test is about those too
    assert np.isinf(want_lse).any()
    np.testing.assert_allclose(out, want, rtol=error, atol=error)
    np.testing.assert_allclose(lse, want_lse, rtol=error, atol=error)
    backend.close()


def calls_of_python(call):
    """How many functions of Python a call runs; none of them because garbage is collected meanwhile."""
    count = 0
    gc.collect()
    gc.disable()

    def count_calls(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(count_calls)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


OPTIONS = [{}, {"scale": 0.3, "memory_limit": "1GiB", "timeout": 60.0, "accumulator": "float32"},
           {"mask": Mask(causal=True, window=(500, 500), documents=np.arange(0, 65), prefix=3, q_offset=2)}]


@pytest.mark.parametrize("shape", [(1, 64, 1), (256, 256, 8)])
def test_a_second_call_runs_little_python_whatever_the_options(shape):
    from mpi4py import MPI

    from ringmpi import RingAttention
    n_q, n_k, heads = shape
    q, k, v = data(0, n_q, n_k, heads, heads, 64, 64, "float32")
    counts = []
    for options in OPTIONS:
        with RingAttention(MPI.COMM_SELF, threads=1, backend="numba", **options) as attention:
            for _ in range(2):
                attention(q, k, v)
            counts.append(calls_of_python(lambda: attention(q, k, v)))
    assert max(counts) <= 250
    assert len(set(counts)) == 1
