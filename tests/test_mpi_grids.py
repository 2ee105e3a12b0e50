"""Every grid of ranks and every carrier against a dense float64 softmax; how grids are placed. Runs under mpiexec."""

import itertools
import tracemalloc
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from cases import FACTORS, covering, make_layout, of_size
from oracle import functions, random_qkv
from test_gradients import BOUND
from test_mpi_gradients import LEVELS, check, expect

from ringmpi import (
    Mask,
    OptionError,
    RingAttention,
    Schedule,
    ring_attention,
    ring_attention_backward,
)
from ringmpi.backends import open_backend
from ringmpi.dtypes import TOLERANCE
from ringmpi.engine import Engine
from ringmpi.layout import make
from ringmpi.mpi.comm import private_comm
from ringmpi.passes import Pass
from ringmpi.schedules.grid import Grid, share_heads
from ringmpi.schedules.group import Group
from ringmpi.schedules.group_exchange import GroupExchange
from ringmpi.schedules.links import HostLink
from ringmpi.schedules.spec import CARRIERS, divisors
from ringmpi.score import dropout_keys
from ringmpi.trace import Trace

pytestmark = pytest.mark.mpi

HEADS = {(4, 4): 4, (8, 2): 8, (3, 1): 3, (12, 4): 12}


def grids(size, heads):
    """Every grid of so many ranks, with every carrier that it has a use for."""
    for h, a in itertools.product(divisors(size), divisors(size)):
        if size % (h * a) == 0 and heads % h == 0:
            for carrier in CARRIERS[:1 if h * a == size else None]:
                yield Schedule(h, a, size // h // a, carrier)


CASES = covering({**LEVELS, "heads": list(HEADS), "grid": range(12)}, seed=7)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_dense_softmax(comm, number):
    case = of_size(CASES[number], comm.size)
    possible = list(grids(comm.size, HEADS[case["heads"]]))
    grid = possible[case.pop("grid") * len(possible) // 12]
    check(comm, **case, schedule=grid, seed=number)


def test_every_grid_in_one_case(comm):
    """With a batch, twice in the same buffers, through every grid: equal to rounding."""
    q, k, v = (np.stack(x) for x in zip(*(random_qkv(seed, 40, 40, 12, 4, 8, 6, "float64") for seed in (0, 1)),
                                        strict=True))
    mine = make("zigzag", 40, comm.size).positions(comm.rank)
    dout = np.random.default_rng(3).standard_normal((2, 40, 12, 6))[:, mine]
    results = {}
    for grid in grids(comm.size, 12):
        with RingAttention(comm, mask=Mask(causal=True), layout="zigzag", schedule=grid, timeout=60,
                           threads=1) as attention:
            for _ in range(2):
                out = attention(q[:, mine], k[:, mine], v[:, mine])
                results[grid] = out, *attention.backward(dout)
            assert attention.schedule == grid
    want, *others = results.values()
    assert all(np.abs(x - y).max(initial=0) < 1e-13 for got in others for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", FACTORS["backend"])
@pytest.mark.parametrize(("dtype", "n_q", "layout"), [("float64", 1, "uneven"), ("float32", 9, "striped"),
                                                      ("bfloat16", 3, "empty"), ("float64", 0, "zigzag")])
def test_queries_that_all_ranks_have(comm, backend, dtype, n_q, layout):
    """Forward and backward against the dense softmax, the same bits on all ranks; with all score functions."""
    q, k, v = random_qkv(5, n_q, 60, 4, 2, 16, 8, dtype)
    rng = np.random.default_rng(6)
    dout = rng.standard_normal((n_q, 4, 8)).astype(q.dtype)
    kv_layout = make_layout(layout, 60, comm.size)
    mine = kv_layout.positions(comm.rank)
    score, sinks = functions("all", 4, np.arange(n_q) + 60 - n_q, np.arange(60), 3)
    if "dropout_keys" in score:
        score["dropout_keys"] = dropout_keys(3, 1, 4)[0]
    with RingAttention(comm, backend=backend, layout="replicated", kv_layout=kv_layout, mask=Mask(causal=True),
                       softcap=score.get("softcap"), alibi=score.get("slopes"), dropout=score.get("dropout", 0.0),
                       timeout=60) as attention:
        for _ in range(2):
            out, lse = attention(q, k[mine], v[mine], sinks=sinks, seed=3, return_lse=True)
            dq, dk, dv, *dsinks = attention.backward(dout)
    want = oracle.dense(q, k, v, oracle.visible(n_q, 60, causal=True), 0.25, dout=dout, sinks=sinks, **score)
    for got, name, rows in ((out, "out", slice(None)), (dq, "dq", slice(None)), (dk, "dk", mine), (dv, "dv", mine)):
        unit = np.abs(want[name]).max(initial=0) or 1.0
        assert oracle.error(got, want[name][rows], unit) <= (BOUND if name != "out" else TOLERANCE)[dtype] * 2
    assert oracle.error(lse, want["lse"]) <= (1e-13 if dtype == "float64" else 2e-6)
    if dsinks:
        assert oracle.error(comm.allreduce(dsinks[0].astype(float)), want["dsinks"],
                            np.abs(want["dsinks"]).max(initial=0) or 1.0) <= BOUND[dtype]
    assert len(set(comm.allgather((out.tobytes(), lse.tobytes(), dq.tobytes())))) == 1


def test_what_all_ranks_made_is_had_in_parts(comm, monkeypatch):
    """Many queries that all ranks have take no more memory on more ranks; the bits are those of one part."""
    q, k, v = (np.stack([x, 2 * x]) for x in random_qkv(5, 64, 40 * comm.size, 4, 2, 16, 8, "float32"))
    mine = make("striped", 40 * comm.size, comm.size).positions(comm.rank)
    most, results = [], []
    share = Engine.share

    def noted(engine, x):
        most.append(x.nbytes)
        return share(engine, x)
    monkeypatch.setattr(Engine, "share", noted)
    for nbytes in (2**26, 2**13):
        monkeypatch.setattr("ringmpi.replicated.SHARED_BYTES", nbytes)
        with RingAttention(comm, backend="numpy", layout="replicated", kv_layout="striped", timeout=60) as attention:
            out, lse = attention(q, k[:, mine], v[:, mine], sinks=np.arange(4.0), return_lse=True)
            results.append([x.tobytes() for x in (out, lse, *attention.backward(out)[:1])])
        assert max(most) * comm.size <= max(nbytes, 2 * 4 * 40 * comm.size)
        most.clear()
    assert results[0] == results[1]


def test_what_all_ranks_made_takes_the_memory_that_it_may(comm, monkeypatch):
    """Copies of it, what is sent and what is summed up too: what a pass takes does not grow by more."""
    n = 2048
    q, k, v = (np.ones((n if x == "q" else 4 * comm.size, 2, 64), "f4") for x in "qkv")
    mine = make("contiguous", 4 * comm.size, comm.size).positions(comm.rank)
    peaks = []
    for nbytes in (2**13, 2**20):
        monkeypatch.setattr("ringmpi.replicated.SHARED_BYTES", nbytes)
        with RingAttention(comm, backend="numpy", layout="replicated", kv_layout="contiguous", timeout=60) as attention:
            attention.backward(attention(q, k[mine], v[mine]))
            for work in (lambda: attention(q, k[mine], v[mine]), lambda: attention.backward(q)):
                tracemalloc.start()
                work()
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
    assert max(peaks[2] - peaks[0], peaks[3] - peaks[1]) < 2**20 + 2**17


def test_queries_of_an_empty_batch(comm):
    q, k, v = np.zeros((0, 3, 4, 8)), np.zeros((0, 5, 2, 8)), np.zeros((0, 5, 2, 6))
    with RingAttention(comm, layout="replicated", timeout=60) as attention:
        assert attention(q, k, v).shape == (0, 3, 4, 6)
        assert [x.shape for x in attention.backward(np.zeros((0, 3, 4, 6)))] == [q.shape, k.shape, v.shape]


def test_queries_that_should_be_the_same(comm):
    x = np.ones((3, 2, 8), "f4")
    odd = comm.rank == comm.size - 1
    if comm.size > 1:
        expect(comm, lambda: ring_attention(x + odd, x, x, comm=comm, layout="replicated"), OptionError,
               "the same queries and sinks, where all ranks have them")
        expect(comm, lambda: ring_attention(x, x, x, comm=comm, layout="replicated", sinks=x[0, :, 0] + odd),
               OptionError, "the same queries and sinks, where all ranks have them")
        expect(comm, lambda: ring_attention(x[odd:], x, x, comm=comm, layout="replicated"), OptionError, "the same")
    expect(comm, lambda: ring_attention(x, x, x, comm=comm, kv_layout="replicated"), OptionError, "layout: expected")
    expect(comm, lambda: ring_attention(x, x, x, comm=comm, layout="replicated", schedule="ring"), OptionError,
           'expected "auto" or "queries"')


def test_gradients_that_should_be_the_same(comm):
    """Of queries that all ranks have: no rank gets gradients of its own, and the next call is right."""
    if comm.size == 1:
        pytest.skip("takes two")
    x, lse = np.ones((3, 2, 8), "f4"), np.zeros((3, 2), "f4")
    odd = comm.rank == comm.size - 1
    with RingAttention(comm, layout="replicated", timeout=60) as attention:
        out, log = attention(x, x, x, return_lse=True)
        want = attention.backward(x, lse)
        for dout, dlse in ((x + odd, lse), (x, lse + odd), (x, lse if odd else None)):
            expect(comm, lambda dout=dout, dlse=dlse: attention.backward(dout, dlse), OptionError,
                   f"rank {comm.size - 1}: expected the same dout, dlse, out and lse, where all ranks have the queries")
            expect(comm, lambda dout=dout, dlse=dlse: attention.backward_of(dout, x, x, x, out, log, dlse=dlse),
                   OptionError, "the same dout, dlse, out and lse")
            attention(x, x, x)
        got = attention.backward(x, lse)
    expect(comm, lambda: ring_attention_backward(x + odd, x, x, x, out, log, comm=comm, layout="replicated"),
           OptionError, "the same dout, dlse, out and lse")
    expect(comm, lambda: ring_attention_backward(x, x, x, x, out + odd, log, comm=comm, layout="replicated"),
           OptionError, "the same dout, dlse, out and lse")
    assert all((mine == theirs).all() for mine, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_heads_of_several_ranks_are_added_without_a_whole_copy(backend):
    """As where ranks share heads, and have the same heads of the keys."""
    opened = open_backend(backend, 1)
    whole, piece = np.ones((2, 1000, 8, 32), "f4"), np.ones((2, 1000, 3, 32), "f4")
    tracemalloc.start()
    Pass._add_heads(SimpleNamespace(backend=opened), whole, slice(2, 4), piece[:, :, 1:])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    opened.close()
    assert (whole.sum(axis=(0, 1, 3)) == np.where(np.isin(np.arange(8), (2, 3)), 2, 1) * 2 * 1000 * 32).all()
    assert peak < piece.nbytes // 4


class Fresh:
    """Arrays for each member, made anew whenever they are asked for: an address may come back with others."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def __len__(self):
        return self._size

    def __getitem__(self, member):
        if member >= self._size:
            raise IndexError
        return [np.full(3 + member, 10 * self._rank + member)]


def test_what_goes_to_one_member_is_not_taken_for_what_goes_to_another(comm):
    private = private_comm(comm)
    group = Group(range(comm.size), comm.rank)
    exchange = GroupExchange(private, group, HostLink)
    exchange.timeout = 60
    kinds = [[((3 + comm.rank,), np.dtype(int))]] * comm.size
    exchange.start("numbers", Fresh(comm.rank, comm.size), kinds, Trace())
    for member in exchange.others:
        (got,) = exchange.take(member)
        assert (got == 10 * member + comm.rank).all()
    exchange.end()
    exchange.start("alike", [[np.full(4, comm.rank)]], [[((4,), np.dtype(int))]] * comm.size, Trace())
    assert all((exchange.take(member)[0] == member).all() for member in exchange.others)
    exchange.end()


def test_what_a_mesh_sends(comm):
    """The formula: a block of keys goes to b - 1 ranks; queries to a - 1, and as many states home."""
    grid = max(grids(comm.size, 1), key=lambda grid: (min(grid.queries, grid.keys), grid.keys))
    q, k, v = random_qkv(0, 8 * comm.size, 8 * comm.size, 4, 2, 16, 8, "float32")
    mine = make("contiguous", len(q), comm.size).positions(comm.rank)
    with RingAttention(comm, schedule=grid, timeout=60) as attention:
        attention(q[mine], k[mine], v[mine])
        trace = attention.trace
    assert trace.bytes_sent == (grid.keys - 1) * 8 * 2 * (16 + 8) * 4
    assert trace.exchanged_bytes_sent == (grid.queries - 1) * 8 * 4 * (16 + 8 + 2) * 4
    assert sum(exchange.bytes_received for exchange in trace.exchanges) == trace.exchanged_bytes_sent
    assert len(trace.steps) == grid.keys


def test_neighbours_are_on_one_node(comm):
    """However a launcher deals ranks out to nodes, a ring crosses from node to node as often as there are nodes."""
    for nodes in (1, 2, 4):
        dealt = tuple(rank % nodes for rank in range(8))
        for axes in itertools.permutations(("heads", "queries", "keys")):
            ring = Grid(Schedule(keys=8), dealt, axes).group("keys", 3).ranks
            assert sum(dealt[a] != dealt[b] for a, b in zip(ring, ring[1:] + ring[:1], strict=True)) == nodes % 8 * (
                nodes > 1)
    inner = Grid(Schedule(2, 2, 2), tuple(rank % 2 for rank in range(8)), ("keys", "heads", "queries"))
    assert [{rank % 2 for rank in inner.group(axis, 0).ranks} for axis in ("keys", "heads", "queries")] == [
        {0}, {0}, {0, 1}]


def test_a_ring_follows_the_nodes(comm, monkeypatch):
    """Blocks come from the neighbour on the same node, and results are right."""
    private = private_comm(comm)
    monkeypatch.setattr(private, "nodes", [rank % 2 for rank in range(comm.size)])
    order = sorted(range(comm.size), key=lambda rank: (rank % 2, rank))
    q, k, v = random_qkv(2, 30, 30, 2, 2, 8, 8, "float64")
    mine = make("striped", 30, comm.size).positions(comm.rank)
    with RingAttention(comm, layout="striped", mask=Mask(causal=True), schedule="ring", timeout=60) as attention:
        attention(q[mine], k[mine], v[mine])
        sources = [step.source for step in attention.trace.steps]
    place = order.index(comm.rank)
    assert sources == [order[(place - hop) % comm.size] for hop in range(comm.size)]
    check(comm, **of_size({name: levels[0] for name, levels in LEVELS.items()} | {"length": 103}, comm.size))


@pytest.mark.parametrize("nodes", [(0, 1, 0, 0, 0, 1, 0, 0), (2, 1, 0, 2, 1, 0, 2, 1)])
def test_ranks_that_share_keys_have_the_same_heads(comm, monkeypatch, nodes):
    """Where those that share heads are on several nodes, in another order than that of their numbers."""
    for schedule in (Schedule(2, 1, 4), Schedule(2, 2, 2), Schedule(4, 2, 1), Schedule(4, 1, 2)):
        for axes in itertools.permutations(("heads", "queries", "keys")):
            grid = Grid(schedule, nodes, axes)
            heads = [grid.group("heads", rank).index for rank in range(8)]
            for rank, axis in itertools.product(range(8), ("queries", "keys")):
                assert {heads[other] for other in grid.group(axis, rank).ranks} == {heads[rank]}
    monkeypatch.setattr(private_comm(comm), "nodes", nodes[:comm.size])
    for grid in (grid for grid in grids(comm.size, 4) if grid.heads == 2 and grid.carrier == "ring"):
        check(comm, backend="numpy", dtype="float64", layout="uneven", mask={"causal": True}, heads=(4, 2), length=40,
              dim_v=8, schedule=grid)


def test_heads_are_dealt_out_whole(comm):
    """Each query head to one rank, with its head of the keys beside it, whatever their numbers."""
    for heads, kv_heads, ranks in ((8, 8, 4), (8, 2, 2), (8, 2, 8), (12, 4, 6), (12, 3, 4), (6, 3, 2), (15, 5, 3)):
        group, dealt = heads // kv_heads, []
        for share in share_heads(heads, kv_heads, ranks):
            keys = [head for part in share.keys for head in range(part.start, part.stop)]
            assert (len(keys), share.heads) == (share.kv_heads, heads // ranks)
            each = share.heads // share.kv_heads
            dealt += [(share.queries.start + i, keys[i // each]) for i in range(share.heads)]
        assert dealt == [(head, head // group) for head in range(heads)]


def test_the_covering_has_every_backend():
    assert {case["backend"] for case in CASES} == set(FACTORS["backend"])
