"""A bias of the keys on this run's ranks against a dense float64 softmax: grids, layouts, masks. Runs under mpiexec."""

import numpy as np
import oracle
import pytest
from cases import FACTORS, covering, make_layout, of_size
from oracle import BIASES, random_qkv
from test_mpi_gradients import check, expect
from test_mpi_grids import HEADS, grids

from ringmpi import (
    BackendError,
    DtypeError,
    Mask,
    OptionError,
    RingAttention,
    ShapeError,
    ring_attention,
    ring_attention_backward,
)
from ringmpi.layout import make

pytestmark = pytest.mark.mpi

CASES = covering({"backend": FACTORS["backend"], "dtype": ["float64", "bfloat16"], "layout": FACTORS["layout"][1:5],
                  "mask": ["full", "causal", "window", "trees"], "heads": [(4, 4), (8, 2), (12, 4)],
                  "length": [1, "P-1", 103], "function": list(BIASES), "grid": range(0, 12, 2)}, seed=5)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_dense_softmax(comm, number):
    case = of_size(CASES[number], comm.size)
    possible = list(grids(comm.size, HEADS[case["heads"]]))
    grid = possible[case.pop("grid") * len(possible) // 12]
    check(comm, **case, dim_v=9, schedule=grid, seed=number)


def test_every_grid_in_one_case(comm):
    """With a batch, each element its own bias, twice in the same buffers, through every grid: equal to rounding."""
    q, k, v = (np.stack(x) for x in zip(*(random_qkv(seed, 40, 40, 12, 4, 8, 6, "float64") for seed in (0, 1)),
                                        strict=True))
    mine = make("zigzag", 40, comm.size).positions(comm.rank)
    dout = np.random.default_rng(3).standard_normal((2, 40, 12, 6))
    see = oracle.visible(40, 40, causal=True)
    for kind in ("left out", "left out by head"):
        bias = np.stack([oracle.key_bias(kind, 12, 40, seed) for seed in (0, 1)])
        given = bias[:, mine, 0] if bias.shape[2] == 1 else bias[:, mine]
        want = [oracle.dense(q[i], k[i], v[i], see, 8**-0.5, dout=dout[i], key_bias=bias[i]) for i in (0, 1)]
        for grid in grids(comm.size, 12):
            with RingAttention(comm, mask=Mask(causal=True), layout="zigzag", schedule=grid, timeout=60,
                               threads=1) as attention:
                for _ in range(2):
                    out = attention(q[:, mine], k[:, mine], v[:, mine], key_bias=given)
                    grads = attention.backward(dout[:, mine])
            assert grads.dkey_bias.shape == given.shape
            got = {"out": out, **grads._asdict()}
            for name, x in got.items():
                for i in (0, 1):
                    exact = want[i][name][mine].reshape(x[i].shape)
                    assert oracle.error(x[i], exact, np.abs(want[i][name]).max() or 1.0) < 1e-12, (kind, grid, name)


@pytest.mark.parametrize("kind", ["bias", "all and left out by head", "left out"])
def test_queries_that_all_ranks_have(comm, kind):
    q, k, v = random_qkv(5, 9, 60, 4, 2, 16, 8, "float64")
    kv_layout = make_layout("empty", 60, comm.size)
    mine = kv_layout.positions(comm.rank)
    dout = np.random.default_rng(6).standard_normal((9, 4, 8))
    bias, sinks = oracle.key_bias(kind, 4, 60), np.linspace(-1, 1, 4) if kind.startswith("all") else None
    with RingAttention(comm, layout="replicated", kv_layout=kv_layout, mask=Mask(causal=True), timeout=60) as attention:
        given = bias[mine, 0] if bias.shape[1] == 1 else bias[mine]
        out, lse = attention(q, k[mine], v[mine], sinks=sinks, key_bias=given, return_lse=True)
        got = attention.backward(dout)
    want = oracle.dense(q, k, v, oracle.visible(9, 60, causal=True), 0.25, dout=dout, sinks=sinks, key_bias=bias)
    assert oracle.error(out, want["out"]) < 1e-12
    assert oracle.error(lse, want["lse"]) < 1e-12
    assert oracle.error(got.dq, want["dq"]) < 1e-12
    for name in ("dk", "dv", "dkey_bias"):
        exact = want[name][mine].reshape(getattr(got, name).shape)
        assert oracle.error(getattr(got, name), exact, np.abs(want[name]).max()) < 1e-12, name
    assert hasattr(got, "dsinks") == (sinks is not None)


def test_what_is_left_out_may_be_anything(comm):
    """NaN and infinity in k and v of keys that are left out reach nothing: as if these were not there."""
    n = 12 * comm.size
    q, k, v = random_qkv(2, n, n, 4, 2, 8, 8, "float32")
    bias = oracle.key_bias("left out", 4, n)[:, 0]
    mine = make("striped", n, comm.size).positions(comm.rank)
    left_out = np.isneginf(bias)
    results = []
    for filled in (0.0, np.nan, np.inf):
        k[left_out], v[left_out] = filled, filled
        kept = k.tobytes(), v.tobytes()
        with RingAttention(comm, layout="striped", mask=Mask(window=7), timeout=60) as attention:
            out = attention(q[mine], k[mine], v[mine], key_bias=bias[mine])
            results.append([x.tobytes() for x in (out, *attention.backward(out))])
        assert kept == (k.tobytes(), v.tobytes())
    assert results[0] == results[1] == results[2]
    assert np.isfinite(np.frombuffer(results[0][0], "f4")).all()


def test_a_quadrature_of_an_integral(comm):
    """Keys with weights, by their logs: what a key twice as heavy gives is what the key given twice gives."""
    q, k, v = random_qkv(1, 20, 30, 2, 2, 8, 8, "float64")
    mine, twice = (make("contiguous", n, comm.size).positions(comm.rank) for n in (30, 60))
    rows = make("contiguous", 20, comm.size).positions(comm.rank)
    got = ring_attention(q[rows], k[mine], v[mine], key_bias=np.log(np.where(np.arange(30)[mine] < 9, 2.0, 1.0)),
                         comm=comm)
    again = np.r_[np.arange(30), np.arange(9)]
    again = np.concatenate([again, np.zeros(21, int)])[twice]
    bias = np.where(twice < 39, 0.0, -np.inf)
    want = ring_attention(q[rows], k[again], v[again], comm=comm, key_bias=bias)
    assert oracle.error(got, want, 1.0) < 1e-13


def test_the_functional_form_is_the_same(comm):
    q, k, v = random_qkv(4, 40, 40, 4, 2, 8, 12, "float32")
    dout = np.random.default_rng(0).standard_normal((40, 4, 12)).astype("f4")
    mine = make("zigzag", 40, comm.size).positions(comm.rank)
    bias = oracle.key_bias("left out by head", 4, 40)[mine]
    options = {"mask": Mask(causal=True), "layout": "zigzag"}
    with RingAttention(comm, **options) as attention:
        out, lse = attention(q[mine], k[mine], v[mine], key_bias=bias, return_lse=True)
        first, second = attention.backward(dout[mine]), attention.backward(dout[mine])
        again = attention.backward_of(dout[mine], q[mine], k[mine], v[mine], out, lse, key_bias=bias)
    alone = ring_attention_backward(dout[mine], q[mine], k[mine], v[mine], out, lse, comm=comm, key_bias=bias,
                                    **options)
    assert (ring_attention(q[mine], k[mine], v[mine], comm=comm, key_bias=bias, **options) == out).all()
    for other in (second, again, alone):
        assert all((a == b).all() for a, b in zip(first, other, strict=True))
    *_, dkey_bias = first
    assert (dkey_bias == first.dkey_bias).all()
    assert (dkey_bias.shape, dkey_bias.dtype) == (bias.shape, np.float32)


def test_what_travels(comm):
    """The bias beside the block in the accumulator's dtype, and its gradient home."""
    q, k, v = random_qkv(8, 2 * comm.size, 2 * comm.size, 2, 1, 4, 4, "bfloat16")
    mine = slice(2 * comm.rank, 2 * comm.rank + 2)
    for bias, numbers in ((np.zeros(2), 1), (np.zeros((2, 2)), 2)):
        with RingAttention(comm, schedule="ring") as attention:
            attention(q[mine], k[mine], v[mine], key_bias=bias)
            attention.backward(q[mine])
            assert attention.trace.bytes_sent == (comm.size - 1) * 2 * (8 * 2 + numbers * 4)
            assert attention.trace.gradient_bytes_sent == (comm.size - 1) * 2 * (8 + numbers) * 4


def test_bad_calls_are_errors_on_every_rank(comm):
    q, k, v = random_qkv(6, 5, 5, 2, 1, 4, 3, "float32")
    last, fine = comm.size - 1, np.zeros(5)
    with RingAttention(comm) as attention:
        for bad, kind, text in (
                (np.zeros(4), ShapeError, "key_bias: expected shape (5,) or (5, 2) to go with k, got (4,)"),
                (np.zeros((5, 1)), ShapeError, "key_bias: expected shape (5,) or (5, 2) to go with k, got (5, 1)"),
                (np.zeros((1, 5)), ShapeError, "key_bias: expected shape"),
                (np.zeros(5, int), DtypeError, "key_bias: expected dtype float64"),
                (np.array([0, 0, np.nan, 0, 0]), OptionError, "key_bias: expected numbers that are finite in float32"),
                (np.array([0, 0, np.inf, 0, 0]), OptionError, "key_bias: expected numbers that are finite"),
                (np.array([0, 0, -1e300, 0, 0]), OptionError, "key_bias: expected numbers that are finite")):
            expect(comm, lambda x=bad: attention(q, k, v, key_bias=x if comm.rank == last else fine), kind, text)
        if comm.size > 1:
            expect(comm, lambda: attention(q, k, v, key_bias=fine if comm.rank else None), ShapeError,
                   "rank 1: expected the same key_bias")
            other = np.zeros((5, 2)) if comm.rank else fine
            expect(comm, lambda: attention(q, k, v, key_bias=other), ShapeError, "rank 1: expected the same key_bias")
        again = attention(q, k, v, key_bias=fine)
        assert (again == attention(q, k, v)).all() or oracle.error(again, attention(q, k, v)) < 2e-6
    with RingAttention(comm, backend="numpy") as attention:
        attention.backend.biased = False
        expect(comm, lambda: attention(q, k, v, key_bias=fine), BackendError, "key_bias: backend numpy has none yet")
        del attention.backend.biased


@pytest.mark.parametrize("function", ["left out", "all and left out by head"])
def test_canonical_order(comm, function):
    check(comm, backend="numba", dtype="float64", layout="uneven", mask={"causal": True}, heads=(8, 2), length=401,
          dim_v=9, function=function, order="canonical", schedule="auto")
