"""Canonical order on this run's ranks: the bits of one rank, in any layout. Runs under mpiexec."""

import math

import numpy as np
import oracle
import pytest
from cases import covering, make_layout, make_mask, of_size
from mpi4py import MPI
from test_mpi_gradients import LEVELS, check, expect

import ringmpi
from ringmpi import Mask, OptionError, RingAttention, Schedule, ring_attention, ring_attention_backward
from ringmpi.dtypes import DTYPES, accumulator
from ringmpi.mpi.comm import private_comm
from ringmpi.schedules.broadcast import Broadcast
from ringmpi.schedules.spec import CARRIERS, divisors

pytestmark = pytest.mark.mpi

NAMES = "out", "lse", "dq", "dk", "dv", "dsinks", "dkey_bias", "drelative"
SUMMED = {"dsinks", "drelative"}
SHARDED = {"out": 0, "lse": 0, "dq": 0, "dk": 1, "dv": 1, "dkey_bias": 1}         # as the queries are, or as the keys
# Each case has a mask, a dtype and layouts of its own; a tile has 192 tokens, so 3 ranks of 4 have some of 600.
CASES = [
    {"mask": "full", "dtype": "float32", "layout": "striped"},
    {"mask": "causal", "dtype": "float64", "layout": "uneven", "heads": (4, 4), "function": "all"},
    {"mask": "window", "dtype": "bfloat16", "layout": "empty", "kv_layout": "striped", "batch": 2},
    {"mask": "documents", "dtype": "float32", "layout": "zigzag", "kv_layout": "custom", "function": "alibi"},
    {"mask": "all", "dtype": "bfloat16", "layout": "custom", "heads": (6, 1), "function": "sinks"},
    {"mask": "first", "dtype": "float32", "layout": "contiguous", "kv_layout": "uneven", "batch": 2, "function": "all"},
    {"mask": "causal", "dtype": "float16", "layout": "striped", "function": "dropout"},
    {"mask": "window", "dtype": "float64", "layout": "striped", "kv_layout": "uneven", "bias": "left out"},
    {"mask": "trees", "dtype": "float64", "layout": "uneven", "heads": (8, 2), "function": "all", "batch": 2,
     "bias": "left out by head"},
    {"mask": "causal", "dtype": "float32", "layout": "striped", "function": "sinks", "relative": 81},
    {"mask": "trees", "dtype": "bfloat16", "layout": "empty", "kv_layout": "zigzag", "heads": (8, 2), "batch": 2,
     "function": "all", "bias": "left out by head", "relative": 5},
    {"mask": "window", "dtype": "float64", "layout": "uneven", "relative": 1801},
]


class Problem:
    """Whole arrays and options, the same on all ranks."""

    def __init__(self, mask, dtype, layout, kv_layout=None, heads=(4, 2), function="plain", batch=None, bias=None,
                 relative=None, lengths=(610, 790), dims=(16, 24), seed=0):
        n_q, n_k = self.lengths = lengths
        rng = np.random.default_rng(seed)
        shapes = (n_q, heads[0], dims[0]), (n_k, heads[1], dims[0]), (n_k, heads[1], dims[1]), (n_q, heads[0], dims[1])
        self.q, self.k, self.v, self.dout = (
            rng.standard_normal(shape if batch is None else (batch, *shape)).astype(DTYPES[dtype]) for shape in shapes)
        self.dlse = rng.standard_normal(self.dout.shape[:-1]).astype(accumulator(self.q.dtype))
        self.layouts = layout, kv_layout or layout
        self.bias = None
        if bias:
            biases = [oracle.key_bias(bias, heads[0], n_k, seed + i) for i in range(batch or 1)]
            self.bias = np.stack(biases) if batch else biases[0]
            self.bias = self.bias if "by head" in bias else self.bias[..., 0]
        self.relative = None if relative is None else rng.standard_normal((heads[0], relative))
        wanted = ("softcap", "alibi", "dropout", "sinks") if function == "all" else (function,)
        self.sinks = rng.standard_normal(heads[0]) if "sinks" in wanted else None
        self.options = {"mask": Mask(**make_mask(mask, n_k, n_q)), "timeout": 60, "backend": "numba",
                        "softcap": 1.5 if "softcap" in wanted else None, "dropout": 0.3 if "dropout" in wanted else 0.0,
                        "alibi": 2.0 ** -np.arange(1, heads[0] + 1) / 64 if "alibi" in wanted else None}

    def held(self, rank, size, alone=False):
        """The tokens of the queries, and those of the keys, on a rank."""
        kinds = ("contiguous",) * 2 if alone else self.layouts
        return [make_layout(kind, n, size) for kind, n in zip(kinds, self.lengths, strict=True)]

    def passes(self, comm, **options):
        """Both passes on a communicator: results by name, each as this rank has it; and the layouts."""
        layouts = self.held(comm.rank, comm.size, comm.size == 1)
        mine, theirs = (layout.positions(comm.rank) for layout in layouts)
        axis = self.q.ndim - 3
        q, dout, dlse = (x.take(mine, axis) for x in (self.q, self.dout, self.dlse))
        k, v = (x.take(theirs, axis) for x in (self.k, self.v))
        options = {"order": "canonical", "layout": layouts[0], "kv_layout": layouts[1], **self.options, **options}
        with RingAttention(comm, **options) as attention:
            bias = None if self.bias is None else self.bias.take(theirs, axis)
            out, lse = attention(q, k, v, sinks=self.sinks, key_bias=bias, relative=self.relative, seed=5,
                                 return_lse=True)
            got = {"out": out, "lse": lse, **attention.backward(dout, dlse)._asdict()}
            self.trace, self.schedule = attention.trace, attention.schedule
        for name in sorted(SUMMED & set(got)):
            tables = got[name] if isinstance(got[name], tuple) else [got[name]]
            got[name] = np.concatenate([comm.allreduce(x) for x in tables], axis=-1)
        return got, (mine, theirs)

    def compare(self, comm, **options):
        """Which results have, on all ranks, the bits that one rank computes."""
        want, _ = self.passes(MPI.COMM_SELF, threads=1, **{x: y for x, y in options.items() if x == "order"})
        got, held = self.passes(comm, **options)
        axis = self.q.ndim - 3
        same = [np.array_equal(x, want[name] if name in SUMMED else want[name].take(held[SHARDED[name]], axis))
                for name, x in got.items()]
        return dict(zip(got, np.all(comm.allgather(same), axis=0).tolist(), strict=True))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_bits_of_one_rank(comm, number):
    """For other threads on each rank too."""
    problem = Problem(**CASES[number], seed=number)
    same = problem.compare(comm, threads=1 + comm.rank % 2)
    assert all(same.values()), same
    assert problem.schedule == Schedule(keys=comm.size, carrier="broadcast")


def test_other_bits_without_it(comm):
    """So that these tests can see."""
    if comm.size == 1:
        pytest.skip("one rank has its own bits")
    same = Problem("causal", "float32", "striped", function="sinks").compare(comm, order="fastest", threads=1)
    assert not any(same.values()), same


COVERING = covering({**LEVELS, "backend": ["numba"], "length": [1, 2, "P-1", 301]}, seed=9)


def check_dense(comm, number):
    """Compare with a dense softmax, with heads that ranks share where they can."""
    case = of_size(COVERING[number], comm.size)
    heads = math.gcd(comm.size, case["heads"][1]) if number % 2 else 1
    check(comm, **case, seed=number, order="canonical", schedule=Schedule(heads, 1, comm.size // heads, "broadcast"))


@pytest.mark.parametrize("number", range(0, len(COVERING), 7))
def test_dense_softmax(comm, number):
    check_dense(comm, number)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_that_ranks_share(comm, dtype):
    """Whatever their number, and with the blocks in another order than the ranks."""
    problem = Problem("causal", dtype, "striped", "uneven", heads=(12, 12), function="all", lengths=(410, 430),
                      relative=21)
    for heads in divisors(comm.size):
        if 12 % heads == 0:
            same = problem.compare(comm, schedule=f"{heads}x1x{comm.size // heads}:broadcast")
            assert all(same.values()), (heads, same)
            assert problem.schedule.heads == heads
    same = problem.compare(comm, schedule="heads" if 12 % comm.size == 0 else "auto")
    assert all(same.values()), same


def test_blocks_follow_the_nodes(comm, monkeypatch):
    """Where the order of the ranks in the broadcast is not that of their numbers."""
    monkeypatch.setattr(private_comm(comm), "nodes", [(2, 1, 0)[rank % 3] for rank in range(comm.size)])
    problem = Problem("causal", "float32", "zigzag", function="sinks")
    same = problem.compare(comm)
    assert all(same.values()), same
    order = sorted(range(comm.size), key=lambda rank: ((2, 1, 0)[rank % 3], rank))
    assert [step.source for step in problem.trace.steps] == 2 * order


class Grid(Mask):
    """Queries and keys on a grid of 30 columns; a query sees keys up to 4 away: a key is in any of its 9 intervals."""

    def bounds(self, queries, n_q, n_k):
        row, column = np.divmod(np.asarray(queries) + n_k - n_q, 30)
        lows = [(row + d) * 30 + np.maximum(column - 4, 0) for d in range(-4, 5)]
        highs = [(row + d) * 30 + np.minimum(column + 5, 30) for d in range(-4, 5)]
        return [(np.clip(a, 0, n_k), np.clip(b, 0, n_k)) for a, b in zip(lows, highs, strict=True)]


def test_a_key_in_several_intervals(comm):
    problem = Problem("full", "float32", "striped", "uneven")
    problem.options["mask"] = Grid()
    problem.relative = np.random.default_rng(1).standard_normal((4, 201))
    same = problem.compare(comm)
    assert all(same.values()), same


def test_tables_of_a_grid(comm):
    """Those of each axis; what one rank has is right."""
    n, mask = 600, ringmpi.Grid((20, 30), (4, 9), periodic=(False, True))
    problem = Problem("full", "float64", "striped", "uneven", lengths=(n, n))
    problem.options["mask"] = mask
    problem.relative = tuple(np.random.default_rng(1).standard_normal((4, width)) for width in (5, 61))
    same = problem.compare(comm)
    assert all(same.values()), same
    points = np.arange(n)
    want = oracle.dense(problem.q, problem.k, problem.v,
                        oracle.near(mask.shape, list(mask.sides), mask.periodic, mask.edges, mask.causal), 0.25,
                        dout=problem.dout, dlse=problem.dlse, relative=problem.relative,
                        away=oracle.distances(mask.shape, mask.periodic, points, points))
    got, _ = problem.passes(comm)
    exact = np.concatenate(want["drelative"], axis=-1)
    assert oracle.error(got["drelative"], exact) < 1e-12


def test_what_is_sent_is_what_steps_says(comm):
    """Blocks of keys forward; backward blocks of keys, then of queries with dout, lse and delta."""
    problem = Problem("window", "float32", "zigzag", "uneven", heads=(4, 2))
    mine, theirs = (layout.positions(comm.rank) for layout in problem.held(comm.rank, comm.size))
    q, k, v, dout = problem.q[mine], problem.k[theirs], problem.v[theirs], problem.dout[mine]
    done = []
    with RingAttention(comm, order="canonical", layout=problem.held(0, comm.size)[0], kv_layout="contiguous",
                       **problem.options) as attention:
        attention(q, k, v)
        forward = attention.trace
        attention.backward(dout, progress=lambda pairs, total: done.append((pairs, total)))
        backward, plan = attention.trace, attention._plan
    item = np.dtype("f4").itemsize
    keys = Broadcast.steps(plan.route, [[2 * n * 16 * item, 2 * n * 24 * item] for n in plan.route.tokens])
    queries = Broadcast.steps(plan.of_keys.route, [[4 * n * x * item for x in (1, 1, 16, 24)]
                                                   for n in plan.of_keys.route.tokens])
    for trace, said in ((forward, keys), (backward, keys + queries)):
        assert [(step.bytes_sent, step.bytes_received) for step in trace.steps] == [
            tuple(sum(x.nbytes for x in these if (x.source, x.dest)[end] == comm.rank) for end in (0, 1))
            for these in said]
    assert sum(pairs for pairs, _ in done) == backward.pairs == (done[0][1] if done else 0)
    assert comm.allreduce(backward.pairs) == 2 * comm.allreduce(forward.pairs)
    assert comm.allreduce(backward.flop) == comm.allreduce(forward.pairs) * 4 * (6 * 16 + 4 * 24)
    starts = np.cumsum([0, *plan.route.tokens])
    assert all(start % 192 == 0 or start == problem.lengths[1] for start in starts)


def test_functions_and_the_other_order_on_one_communicator(comm):
    """Objects of both orders share no work space, whichever computes last."""
    problem = Problem("causal", "float32", "striped")
    want, (mine, theirs) = problem.passes(comm)
    q, k, v, dout, dlse = (x[rows] for x, rows in ((problem.q, mine), (problem.k, theirs), (problem.v, theirs),
                                                   (problem.dout, mine), (problem.dlse, mine)))
    options = {"comm": comm, "layout": "striped", "order": "canonical", **problem.options}
    with RingAttention(comm, layout="striped", **problem.options) as other:
        other.backward(other(q, k, v))
        out, lse = ring_attention(q, k, v, return_lse=True, **options)
        gradients = ring_attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    assert all(np.array_equal(x, y) for x, y in zip((out, lse, *gradients), want.values(), strict=True))


def test_a_batch_of_none(comm):
    x = np.zeros((0, 5, 4, 8), np.float32)
    with RingAttention(comm, order="canonical", timeout=60) as attention:
        out = attention(x, x, x, sinks=np.zeros(4))
        *_, dsinks = attention.backward(out)
    assert not dsinks.any()


def test_what_has_no_canonical_order(comm):
    """The same error on all ranks, which says what would do."""
    x, size = np.ones((3, 3, 8), "f4"), comm.size

    def refused(text, k=x, **options):
        expect(comm, lambda: ring_attention(x, k, k, comm=comm, **{"order": "canonical", **options}), OptionError, text)

    refused("order: expected one of fastest, canonical, got 'sorted'", order="sorted")
    refused("layout=\"replicated\"; take another layout", layout="replicated")
    refused("expected a backend whose sums have a fixed order, numba or cuda, got numpy", backend="numpy")
    if size == 1:
        return
    for carrier in CARRIERS:
        if carrier != "broadcast":
            refused(f"with the carrier broadcast, got 1x1x{size}:{carrier}; 1x1x{size}:broadcast would do",
                    schedule=Schedule(keys=size, carrier=carrier))
    refused(f"shares no queries, with the carrier broadcast, got 1x{size}x1:ring; 1x1x{size}:broadcast",
            schedule="queries")
    refused(f"order is {'fastest'} here and canonical on rank 0", order=("fastest" if comm.rank == 1 else "canonical"))
    if size == 3:
        refused("to divide the 1 heads of the keys, each of which one rank sums up in canonical order; "
                "1x1x3:broadcast would do", k=x[:, :1], schedule="heads")
