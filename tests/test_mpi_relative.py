"""A bias by distance on this run's ranks against a dense float64 softmax: layouts, masks, grids. Runs under mpiexec."""

import itertools

import numpy as np
import oracle
import pytest
from cases import FACTORS, covering, make_layout, of_size
from one_block import BOUND
from oracle import DISTANCES, distances, random_qkv
from test_mpi_gradients import check, expect
from test_mpi_grids import HEADS, grids

from ringmpi import (
    BackendError,
    DtypeError,
    Grid,
    Mask,
    OptionError,
    RingAttention,
    ShapeError,
    ring_attention,
    ring_attention_backward,
)
from ringmpi.layout import make

pytestmark = pytest.mark.mpi

CASES = covering({"backend": FACTORS["backend"], "dtype": ["float64", "float32", "bfloat16"],
                  "layout": FACTORS["layout"], "mask": ["full", "causal", "window", "documents", "trees"],
                  "heads": [(4, 4), (8, 2), (12, 4)], "length": [1, "P-1", 103], "function": list(DISTANCES[:-1]),
                  "grid": range(0, 12, 2)}, seed=6)
GRIDS = (Grid((4, 6), (1, 2), periodic=True), Grid((4, 6), (None, 3), periodic=(False, True)),
         Grid((3, 4, 5), (1, 2, 1), periodic=(True, True, False), edges="shifted"), Grid(24, 9, periodic=True),
         Grid((5, 4), (2, 1), periodic=(False, True), causal=True))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_dense_softmax(comm, number):
    case = of_size(CASES[number], comm.size)
    possible = list(grids(comm.size, HEADS[case["heads"]]))
    grid = possible[case.pop("grid") * len(possible) // 12]
    check(comm, **case, dim_v=9, schedule=grid, seed=number)


def dense_of_grid(mask, q, k, v, tables, dout):
    """The dense softmax of a grid's points, by tables for each axis, or one by positions."""
    points = np.arange(len(q))
    away = (distances(mask.shape, mask.periodic, points, points) if isinstance(tables, tuple) else
            [points[:, None] - points])
    see = oracle.near(mask.shape, list(mask.sides), mask.periodic, mask.edges, mask.causal)
    given = list(tables) if isinstance(tables, tuple) else [tables]
    return oracle.dense(q, k, v, see, 8**-0.5, dout=dout, relative=given, away=away)


@pytest.mark.parametrize("backend", FACTORS["backend"])
@pytest.mark.parametrize("mask", GRIDS, ids=lambda mask: "x".join(map(str, mask.shape)))
def test_tables_of_a_grid(comm, mask, backend):
    """Of reaches from 0 to more than there is, on axes that go round or do not; the other layout by positions too."""
    length = int(np.prod(mask.shape))
    q, k, v = random_qkv(1, length, length, 4, 2, 8, 6, "float64")
    dout, rng = np.random.default_rng(3).standard_normal((length, 4, 6)), np.random.default_rng(4)
    for layout, reach in itertools.product(("contiguous", "striped", "empty"), (0, 1, 2, 30)):
        tables = tuple(rng.standard_normal((4, 2 * max(reach - axis, 0) + 1)) for axis in range(len(mask.shape)))
        which = make_layout(layout, length, comm.size)
        mine = which.positions(comm.rank)
        for relative in (tables, tables[0]):
            with RingAttention(comm, mask=mask, layout=which, backend=backend, timeout=60) as attention:
                out = attention(q[mine], k[mine], v[mine], relative=relative)
                got = attention.backward(dout[mine])._asdict()
            want = dense_of_grid(mask, q, k, v, relative, dout)
            given = got.pop("drelative")
            assert isinstance(given, tuple) == isinstance(relative, tuple)
            for x, exact in zip(given if isinstance(given, tuple) else (given,), want["drelative"], strict=True):
                # a reach of 0 has sums that cancel
                assert oracle.error(comm.allreduce(x), exact, max(np.abs(exact).max(), 1.0)) < 1e-12
            for name, x in {"out": out, **got}.items():
                assert oracle.error(x, want[name][mine], np.abs(want[name]).max()) < 1e-12, name


@pytest.mark.parametrize("backend", FACTORS["backend"])
@pytest.mark.parametrize("schedule", ["ring", "gather", "heads", "queries"])
def test_with_all_else_on_a_grid(comm, backend, schedule):
    """Many intervals at once, tables for each axis, sinks, a bias that leaves keys out, and values in keys."""
    mask = GRIDS[1]
    length, heads = int(np.prod(mask.shape)), 4 * comm.size if schedule == "heads" else 4
    q, k, _ = random_qkv(1, length, length, heads, comm.size if schedule == "heads" else 2, 8, 6, "float64")
    rng = np.random.default_rng(3)
    dout, sinks = rng.standard_normal((length, heads, 6)), rng.standard_normal(heads)
    tables = [rng.standard_normal((heads, width)) for width in (3, 5)]
    which = make_layout("uneven", length, comm.size)
    mine = which.positions(comm.rank)
    points = np.arange(length)
    see = oracle.near(mask.shape, list(mask.sides), mask.periodic, mask.edges, mask.causal)
    for kind in ("left out", "left out by head"):
        bias = oracle.key_bias(kind, heads, length, dtype=np.float64)
        given = {"sinks": sinks, "relative": tables, "key_bias": bias[mine] if "head" in kind else bias[mine, 0]}
        with RingAttention(comm, mask=mask, layout=which, schedule=schedule, backend=backend, timeout=60) as attention:
            out, lse = attention(q[mine], k[mine], dim_v=6, return_lse=True, **given)
            got = attention.backward(dout[mine])
            again = attention.backward_of(dout[mine], q[mine], k[mine], None, out, lse, dim_v=6, **given)
        want = oracle.dense(q, k, k[..., :6], see, 8**-0.5, dout=dout, key_bias=bias, sinks=sinks, relative=tables,
                            away=distances(mask.shape, mask.periodic, points, points))
        want["dk"][..., :6] += want["dv"]
        assert got._fields == ("dq", "dk", "dv", "dsinks", "dkey_bias", "drelative")
        for name, x in {"out": out, "lse": lse, "dq": got.dq, "dk": got.dk, "dkey_bias": got.dkey_bias}.items():
            exact = want[name][mine].reshape(x.shape)
            assert oracle.error(x, exact, np.abs(want[name][np.isfinite(want[name])]).max()) < 1e-12, name
        for x, exact in zip((got.dsinks, *got.drelative), (want["dsinks"], *want["drelative"]), strict=True):
            assert oracle.error(comm.allreduce(x), exact, np.abs(exact).max()) < 1e-12
        assert all(np.array_equal(a, b) for a, b in zip(got, again, strict=True)
                   if isinstance(a, np.ndarray))


@pytest.mark.parametrize("backend", FACTORS["backend"])
def test_queries_that_all_ranks_have(comm, backend):
    q, k, v = random_qkv(5, 9, 60, 4, 2, 16, 8, "float64")
    kv_layout = make_layout("empty", 60, comm.size)
    mine = kv_layout.positions(comm.rank)
    dout, table = (np.random.default_rng(seed).standard_normal(shape) for seed, shape in ((6, (9, 4, 8)), (7, (4, 21))))
    with RingAttention(comm, layout="replicated", kv_layout=kv_layout, mask=Mask(causal=True), timeout=60,
                       backend=backend) as attention:
        out = attention(q, k[mine], v[mine], relative=table)
        got = attention.backward(dout)
    away = np.arange(51, 60)[:, None] - np.arange(60)
    want = oracle.dense(q, k, v, oracle.visible(9, 60, causal=True), 0.25, dout=dout, relative=[table], away=[away])
    assert oracle.error(out, want["out"]) < 1e-12
    assert oracle.error(got.dq, want["dq"]) < 1e-12
    assert oracle.error(comm.allreduce(got.drelative), want["drelative"][0]) < 1e-12
    for name in ("dk", "dv"):
        assert oracle.error(getattr(got, name), want[name][mine], np.abs(want[name]).max()) < 1e-12, name


def test_the_functional_form_is_the_same(comm):
    """With sinks and a bias of keys too, whose gradients have their names; and the same bits each time."""
    q, k, v = random_qkv(4, 40, 40, 4, 2, 8, 12, "float32")
    rng = np.random.default_rng(0)
    dout, table = (rng.standard_normal(shape).astype("f4") for shape in ((40, 4, 12), (4, 15)))
    mine = make("zigzag", 40, comm.size).positions(comm.rank)
    options = {"mask": Mask(causal=True), "layout": "zigzag"}
    for names in itertools.product((False, True), repeat=2):
        given = {name: x for name, x, some in (("sinks", np.ones(4), names[0]), ("key_bias", np.zeros(len(mine)),
                                                                                 names[1])) if some}
        given["relative"] = table
        with RingAttention(comm, **options) as attention:
            out, lse = attention(q[mine], k[mine], v[mine], return_lse=True, **given)
            first, second = attention.backward(dout[mine]), attention.backward(dout[mine])
            again = attention.backward_of(dout[mine], q[mine], k[mine], v[mine], out, lse, **given)
        alone = ring_attention_backward(dout[mine], q[mine], k[mine], v[mine], out, lse, comm=comm, **given, **options)
        assert (ring_attention(q[mine], k[mine], v[mine], comm=comm, **given, **options) == out).all()
        assert first._fields == ("dq", "dk", "dv", *(f"d{name}" for name in given))
        for other in (second, again, alone):
            assert all((a == b).all() for a, b in zip(first, other, strict=True))
        assert (first.drelative.shape, first.drelative.dtype) == (table.shape, np.float32)


def test_sums_over_many_pairs(comm):
    """Of a few numbers, each of very many pairs, in float32."""
    n = 512 * comm.size
    q, k, v = random_qkv(8, n, n, 2, 1, 16, 16, "float32")
    mine = make("striped", n, comm.size).positions(comm.rank)
    dout, table = np.random.default_rng(1).random((n, 2, 16), "f4"), np.array([[0.5, 0, -0.5]] * 2)
    with RingAttention(comm, layout="striped", timeout=60) as attention:
        attention(q[mine], k[mine], v[mine], relative=table)
        got = comm.allreduce(attention.backward(dout[mine]).drelative.astype(float))
    want = oracle.dense(q, k, v, np.ones((n, n), bool), 0.25, dout=dout, relative=[table],
                        away=[np.arange(n)[:, None] - np.arange(n)])
    assert oracle.error(got, want["drelative"][0]) < BOUND["float32"]


def test_canonical_order(comm):
    """The same bits as one rank alone, whatever the layout, and right; rank 0 has all of the gradient by the table."""
    from mpi4py import MPI
    q, k, v = random_qkv(8, 300, 300, 4, 2, 16, 16, "float32")
    table = np.random.default_rng(1).standard_normal((4, 41))
    options = {"mask": Mask(window=(150, 20)), "order": "canonical", "timeout": 60}
    dout = np.random.default_rng(2).standard_normal((300, 4, 16)).astype("f4")
    with RingAttention(MPI.COMM_SELF, **options) as attention:
        alone = attention(q, k, v, relative=table)
        gradient = attention.backward(dout).drelative
    want = oracle.dense(q, k, v, oracle.visible(300, 300, window=(150, 20)), 0.25, dout=dout, relative=[table],
                        away=[np.arange(300)[:, None] - np.arange(300)])
    assert oracle.error(gradient, want["drelative"][0]) < BOUND["float32"]
    for layout in ("contiguous", "striped"):
        mine = make(layout, 300, comm.size).positions(comm.rank)
        with RingAttention(comm, layout=layout, **options) as attention:
            out = attention(q[mine], k[mine], v[mine], relative=table)
            assert (out == alone[mine]).all()
            assert (attention.backward(dout[mine]).drelative == (0 if comm.rank else gradient)).all()
    with RingAttention(comm, layout="striped", **options) as attention:
        out = attention(q[mine], k[mine], v[mine], relative=table)
        attention.backend.sums_tables = False
        expect(comm, lambda: attention.backward(out), BackendError, "relative: expected a forward pass alone")
        del attention.backend.sums_tables


def test_canonical_order_from_the_middle_of_a_tile(comm):
    """The first key that any query sees is not the first of a vector."""
    q, k, v = random_qkv(8, 60, 300, 4, 2, 16, 16, "float64")
    table, away = np.random.default_rng(1).standard_normal((4, 41)), np.arange(240, 300)[:, None] - np.arange(300)
    q_mine, mine = (make("striped", n, comm.size).positions(comm.rank) for n in (60, 300))
    for window in ((20, 0), (0, 5)):
        got = ring_attention(q[q_mine], k[mine], v[mine], comm=comm, layout="striped", mask=Mask(window=window),
                             relative=table, order="canonical")
        want = oracle.dense(q, k, v, oracle.visible(60, 300, window=window), 0.25, relative=[table], away=[away])
        assert oracle.error(got, want["out"][q_mine], np.abs(want["out"]).max()) < 1e-12


def test_bad_calls_are_errors_on_every_rank(comm):
    q, k, v = random_qkv(6, 6, 6, 2, 1, 4, 3, "float32")
    last, fine = comm.size - 1, np.zeros((2, 5))
    wrong = fine.copy()
    with RingAttention(comm) as attention:
        for bad, kind, text in (
                (np.zeros((2, 4)), ShapeError, "relative: expected shape (2, 2 reach + 1), an odd number"),
                (np.zeros((2, 0)), ShapeError, "relative: expected shape (2, 2 reach + 1)"),
                (np.zeros((1, 5)), ShapeError, "relative: expected shape (2, 2 reach + 1)"),
                (np.zeros(5), ShapeError, "relative: expected shape (2, 2 reach + 1)"),
                (np.zeros((2, 5), int), DtypeError, "relative: expected dtype float64"),
                ((fine,), ShapeError, "relative: expected one table, an array, as tables for each axis go with a mask"),
                (np.full((2, 5), 1e300), OptionError, "relative: expected numbers that are finite in float32"),
                *((np.where(np.arange(5) == 2, x, fine), OptionError, "relative: expected numbers that are finite")
                  for x in (np.nan, np.inf, -np.inf))):
            expect(comm, lambda x=bad: attention(q, k, v, relative=x if comm.rank == last else fine), kind, text)
        if comm.size > 1:
            wrong[1, 3] = 1e-30
            expect(comm, lambda: attention(q, k, v, relative=fine if comm.rank else None), ShapeError,
                   "rank 1: expected the same relative (0 none")
            expect(comm, lambda: attention(q, k, v, relative=wrong if comm.rank else fine), OptionError,
                   "rank 1: expected the same numbers in relative")
        again = attention(q, k, v, relative=fine)
        assert oracle.error(again, attention(q, k, v)) < 2e-6
    with RingAttention(comm, mask=Grid((2, 3 * comm.size), 1)) as attention:
        expect(comm, lambda: attention(q, k, v, relative=(fine,)), ShapeError,
               "relative: expected a table for each of 2 axes of the mask's grid, or one alone by positions, got a "
               "tuple of 1")
        expect(comm, lambda: attention(q, k, v, relative=[fine, fine[:, 1:]]), ShapeError, "relative[1]: expected")
    with RingAttention(comm, backend="numpy") as attention:
        attention.backend.relative = False
        expect(comm, lambda: attention(q, k, v, relative=fine), BackendError, "relative: backend numpy has none yet")
        del attention.backend.relative
