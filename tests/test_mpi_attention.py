"""Ring attention on this run's ranks against a dense float64 softmax. Runs under mpiexec: see test_launch.py."""

import numpy as np
import oracle
import pytest
from cases import FACTORS, covering, draw_mask, make_layout, of_size
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import random_qkv

from ringmpi import BackendError, DtypeError, Grid, Mask, RingAttention, RingError, ShapeError, ring_attention
from ringmpi.dtypes import BFLOAT16, DTYPES, TOLERANCE
from ringmpi.layout import make

pytestmark = pytest.mark.mpi

CASES = covering(FACTORS)
LSE_BOUND = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6}


def check(comm, *, backend, dtype, layout, mask, heads, length, dim_v, n_q=None, seed=0, scale=None):
    n_q = length if n_q is None else n_q
    q, k, v = random_qkv(seed, n_q, length, *heads, 16, dim_v, dtype)
    q_layout, kv_layout = make_layout(layout, n_q, comm.size), make_layout(layout, length, comm.size)
    mine, theirs = q_layout.positions(comm.rank), kv_layout.positions(comm.rank)
    named = layout in ("striped", "zigzag")
    options = {"mask": Mask(**mask), "layout": layout if named else q_layout,
               "kv_layout": layout if named else kv_layout}
    with RingAttention(comm, backend=backend, timeout=60, scale=scale, schedule="ring", **options) as attention:
        out, lse = attention(q[mine], k[theirs], v[theirs], return_lse=True)
        trace = attention.trace
    assert out.dtype == q.dtype
    see = oracle.visible(n_q, length, **mask, rows=mine)
    rows = np.sort(np.random.default_rng(seed).permutation(len(mine))[:200])     # of the long ones, some
    want, want_lse = oracle.attend(q[mine[rows]], k, v, see[rows], 0.25 if scale is None else scale)
    unit = comm.allreduce(np.abs(want).max(initial=0.0), max) or 1.0
    assert oracle.error(out[rows], want, unit) <= TOLERANCE[dtype]
    assert oracle.error(lse[rows], want_lse) <= LSE_BOUND[dtype]
    assert trace.pairs == see.sum()
    assert len(trace.steps) == comm.size
    return out, lse


@pytest.mark.parametrize("number", range(len(CASES)))
def test_dense_softmax(comm, number):
    check(comm, **of_size(CASES[number], comm.size), seed=number)


@settings(deadline=None, max_examples=15, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_any_case(comm, data):
    draw = data.draw
    length = draw(st.integers(0, 60))
    n_q, mask = draw(st.integers(0, 60)), draw_mask(draw, length)
    check(comm, backend=draw(st.sampled_from(FACTORS["backend"])), dtype=draw(st.sampled_from(FACTORS["dtype"])),
          layout=draw(st.sampled_from(FACTORS["layout"])), heads=draw(st.sampled_from(FACTORS["heads"])),
          dim_v=draw(st.integers(1, 20)), length=length, n_q=n_q, mask=mask, seed=draw(st.integers(0, 99)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_ranks_agree_with_one(comm, dtype):
    from mpi4py import MPI
    q, k, v = random_qkv(3, 1003, 1003, 4, 2, 16, 16, dtype)
    alone, alone_lse = ring_attention(q, k, v, comm=MPI.COMM_SELF, mask=Mask(causal=True), return_lse=True)
    mine = make("striped", 1003, comm.size).positions(comm.rank)
    out, lse = ring_attention(q[mine], k[mine], v[mine], comm=comm, mask=Mask(causal=True), layout="striped",
                              return_lse=True)
    assert oracle.error(out, alone[mine], np.abs(alone.astype(float)).max()) <= TOLERANCE[dtype]
    assert oracle.error(lse, alone_lse[mine]) <= LSE_BOUND[dtype]


def test_nan_reaches_the_rows_that_see_it_and_no_others(comm):
    q, k, v = random_qkv(4, 40, 40, 2, 1, 8, 8, "float32")
    v[17, 0, 2] = np.nan
    k[23, 0, 1] = np.inf
    mine = make("zigzag", 40, comm.size).positions(comm.rank)
    for backend in FACTORS["backend"]:
        out = ring_attention(q[mine], k[mine], v[mine], comm=comm, mask=Mask(causal=True), layout="zigzag",
                             backend=backend, scale=1.0)
        want, _ = oracle.attend(q[mine], k, v, oracle.visible(40, 40, causal=True, rows=mine), 1.0)
        assert (np.isnan(out) == np.isnan(want)).all()
        assert np.isfinite(out[mine < 17]).all()


def test_batch_axis(comm):
    cases = [random_qkv(seed, 30, 30, 4, 2, 8, 12, "float32") for seed in range(3)]
    mine = make("contiguous", 30, comm.size).positions(comm.rank)
    q, k, v = (np.stack([case[i][mine] for case in cases]) for i in range(3))
    out, lse = ring_attention(q, k, v, comm=comm, mask=Mask(causal=True), return_lse=True)
    assert out.shape == (3, len(mine), 4, 12)
    assert lse.shape == (3, len(mine), 4)
    for number, case in enumerate(cases):
        alone = ring_attention(*(x[mine] for x in case), comm=comm, mask=Mask(causal=True))
        assert oracle.error(out[number], alone) < 1e-6


def test_a_plan_serves_many_calls_and_new_shapes(comm):
    with RingAttention(comm, mask=Mask(causal=True)) as attention:
        for seed, each in ((0, 5), (1, 5), (2, 11), (3, 0), (4, 5)):
            q, k, v = random_qkv(seed, each * comm.size, each * comm.size, 2, 2, 8, 8, "float64")
            mine = slice(each * comm.rank, each * (comm.rank + 1))
            out = attention(q[mine], k[mine], v[mine])
            want, _ = oracle.attend(q[mine], k, v, oracle.visible(len(q), len(q), causal=True)[mine], 8**-0.5)
            assert oracle.error(out, want) < 1e-13


def test_a_call_like_the_last_agrees_once(comm, monkeypatch):
    from ringmpi.mpi.exchange import Exchange
    meetings, meet = [], Exchange._meet
    monkeypatch.setattr(Exchange, "_meet", lambda self, *arguments: meetings.append(1) or meet(self, *arguments))
    q, k, v = random_qkv(comm.rank, 5, 6, 4, 2, 8, 8, "float32")
    with RingAttention(comm, mask=Mask(causal=True), softcap=30.0, alibi=[0.1, 0.2, 0.3, 0.4]) as attention:
        first = attention(q, k, v)
        for _ in range(2):
            meetings.clear()
            assert (attention(q.copy(), k.copy(), v.copy()) == first).all()
            assert len(meetings) == 1
        meetings.clear()
        attention(q[:3], k, v)
        assert len(meetings) > 1                    # another plan


def test_nothing_of_a_call_is_taken_for_another_s(comm):
    """Calls that differ from the last in one thing give what a new object gives, whichever was before."""
    def heads_first(x):
        return np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)

    def unaligned(x):
        return np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)

    def arrays(n_q=4, n_k=6, heads=4, kv_heads=2, dim=8, dim_v=8, dtype="float32", change=lambda x: x):
        return [change(x) for x in random_qkv(comm.rank, n_q, n_k, heads, kv_heads, dim, dim_v, dtype)]

    calls = [(arrays(), {}), (arrays(n_q=5), {}), (arrays(n_q=4 + comm.rank), {}), (arrays(n_k=7), {}),
             (arrays(heads=2), {}), (arrays(kv_heads=4), {}), (arrays(dim=4), {}), (arrays(dim_v=5), {}),
             (arrays(dtype="float64"), {}), (arrays(change=heads_first), {}), (arrays(change=unaligned), {}),
             (arrays(change=lambda x: x[:, ::-1]), {}), (arrays(change=lambda x: np.stack([x, -x])), {}),
             (arrays(change=lambda x: x[None]), {}), (arrays(), {"seed": 7}), (arrays(heads=4), {"sinks": np.ones(4)})]
    options = {"mask": Mask(window=(5, 2)), "dropout": 0.2, "schedule": "ring", "threads": 1, "backend": "numba"}
    want = []
    for qkv, more in calls:
        with RingAttention(comm, **options) as attention:
            want.append(attention(*qkv, return_lse=True, **more))
    with RingAttention(comm, **options) as attention:
        for i in np.random.default_rng(0).permutation(np.repeat(np.arange(len(calls)), 2)):
            qkv, more = calls[i]
            for x, y in zip(attention(*qkv, return_lse=True, **more), want[i], strict=True):
                assert x.shape == y.shape
                assert x.dtype == y.dtype
                assert (x == y).all(), i


def test_a_call_after_a_good_one_is_checked_as_well(comm):
    q, k, v = random_qkv(comm.rank, 4, 6, 4, 2, 8, 8, "float32")
    last = comm.rank == comm.size - 1
    wrong = [(ShapeError, (q, k[:, :1], v)), (DtypeError, (q, k.astype(np.float64), v)),
             (ShapeError, (q, k[:, :, :4], v)), (DtypeError, (q, k, np.ma.masked_array(v))),
             (ShapeError, (q[:, :3], k, v))]
    with RingAttention(comm, mask=Mask(causal=True)) as attention:
        first = attention(q, k, v)
        for kind, arrays in wrong:
            with pytest.raises(RingError) as caught:
                attention(*(arrays if last else (q, k, v)))
            assert len(set(comm.allgather((type(caught.value), str(caught.value))))) == 1
            assert isinstance(caught.value, kind)
            assert (attention(q, k, v) == first).all()


def test_two_objects_on_one_communicator(comm):
    q, k, v = random_qkv(5, 12, 12, 2, 1, 8, 8, "float64")
    n = make("contiguous", 12, comm.size).positions(comm.rank)
    with RingAttention(comm) as full, RingAttention(comm, mask=Mask(causal=True)) as causal:
        first, second = full(q[n], k[n], v[n]), causal(q[n], k[n], v[n])
        full.close()
        again = causal(q[n], k[n], v[n])
    assert (again == second).all()
    for out, options in ((first, {}), (second, {"causal": True})):
        want, _ = oracle.attend(q[n], k, v, oracle.visible(12, 12, **options)[n], 8**-0.5)
        assert oracle.error(out, want) < 1e-13


def test_inputs_are_left_alone_and_need_not_be_contiguous(comm):
    q, k, v = (x.transpose(1, 0, 2).copy().transpose(1, 0, 2) for x in random_qkv(6, 10, 10, 2, 2, 8, 8, "float32"))
    for x in (q, k, v):
        x.flags.writeable = False
    before = [x.copy() for x in (q, k, v)]
    out = ring_attention(q, k, v, comm=comm)
    assert all((a == b).all() for a, b in zip((q, k, v), before, strict=True))
    alone = ring_attention(*before, comm=comm)
    assert (out == alone).all()


def test_a_communicator_of_the_caller(comm):
    half = comm.Split(comm.rank % 2, key=-comm.rank)
    q, k, v = random_qkv(7, 9, 9, 1, 1, 4, 4, "float64")
    mine = make("striped", 9, half.size).positions(half.rank)
    out = ring_attention(q[mine], k[mine], v[mine], comm=half, layout="striped")
    want, _ = oracle.attend(q[mine], k, v, np.ones((len(mine), 9), bool), 0.5)
    assert oracle.error(out, want) < 1e-13
    half.Free()


def test_causal_contiguous_sends_half(comm):
    q, k, v = random_qkv(8, 4 * comm.size, 4 * comm.size, 1, 1, 4, 4, "float32")
    mine = slice(4 * comm.rank, 4 * comm.rank + 4)
    full, causal = (RingAttention(comm, mask=mask, schedule="ring") for mask in (Mask(), Mask(causal=True)))
    full(q[mine], k[mine], v[mine])
    causal(q[mine], k[mine], v[mine])
    p, block = comm.size, 4 * 8 * 4
    assert comm.allreduce(full.trace.bytes_sent) == p * (p - 1) * block
    assert comm.allreduce(causal.trace.bytes_sent) == p * (p - 1) // 2 * block
    assert causal.trace.hops == comm.rank
    assert full.trace.hops == p - 1
    full.close()
    causal.close()


def test_messages_are_cut(comm, monkeypatch):
    monkeypatch.setattr("ringmpi.schedules.links.MESSAGE_BYTES", 100)
    check(comm, backend="numpy", dtype="float64", layout="uneven", mask={"causal": True}, heads=(4, 2), length=101,
          dim_v=7)


def test_trace(comm):
    with RingAttention(comm, backend="numpy", schedule="ring") as attention:
        q, k, v = random_qkv(9, 64, 64, 2, 2, 8, 8, "float32")
        attention(q, k, v)
        trace = attention.trace
    assert [step.source for step in trace.steps] == [(comm.rank - t) % comm.size for t in range(comm.size)]
    assert trace.flop == 64 * 64 * comm.size * 2 * 2 * 16
    assert trace.compute_seconds > 0
    assert trace.wait_seconds >= 0
    assert trace.as_dict()["hops"] == comm.size - 1
    assert len(trace.as_dict()["steps"]) == comm.size


def test_arrays_from_outside(comm):
    q, k, v = random_qkv(10, 6, 6, 1, 1, 4, 4, "bfloat16")
    out = ring_attention(q, k, v, comm=comm)

    class Foreign:
        def __init__(self, x):
            self.x = x

        def __array__(self, dtype=None, copy=None):
            return self.x

    assert (ring_attention(Foreign(q), Foreign(k), Foreign(v), comm=comm) == out).all()
    doubles = [x.astype(float) for x in (q, k, v)]
    assert (ring_attention(*map(memoryview, doubles), comm=comm) == ring_attention(*doubles, comm=comm)).all()
    assert out.dtype == BFLOAT16


def test_progress_is_told_every_pair(comm):
    told = []
    with RingAttention(comm, mask=Mask(causal=True)) as attention:
        q, k, v = random_qkv(11, 50, 50, 2, 2, 8, 8, "float32")
        attention(q, k, v, progress=lambda done, total: told.append((done, total)))
        assert sum(done for done, _ in told) == attention.trace.pairs == told[-1][1]


def test_dlpack_without_numpy(comm):
    q, k, v = random_qkv(12, 6, 6, 1, 1, 4, 4, "float32")

    class Foreign:
        def __init__(self, x, device=1):
            self.x, self.device = x, device

        def __dlpack__(self, **options):
            return self.x.__dlpack__(**options)

        def __dlpack_device__(self):
            return (self.device, 0)

    assert (ring_attention(Foreign(q), Foreign(k), Foreign(v), comm=comm) == ring_attention(q, k, v, comm=comm)).all()
    with pytest.raises(BackendError, match="k: the array is on a GPU"):
        ring_attention(q, Foreign(k, device=2), v, comm=comm)


def test_threads_may_differ_and_compiling_is_timed_apart(comm):
    """Ranks with different thread counts agree; the first call says what compiling took, the second has none."""
    n, rng = 64, np.random.default_rng(comm.rank)
    q, k, v = (rng.standard_normal((n, 2, 16)).astype("f4") for _ in range(3))
    with RingAttention(comm, backend="numba", threads=1 + comm.rank % 2) as attention:
        first = attention(q, k, v)
        compiled = attention.trace.compile_seconds
        second = attention(q, k, v)
        again = attention.trace.compile_seconds
        threads = attention.backend.threads
    everyone = comm.allgather((q, k, v))
    whole = [np.concatenate([shards[i] for shards in everyone]) for i in range(3)]
    want, _ = oracle.attend(q, *whole[1:], np.ones((n, n * comm.size), bool), 0.25)
    assert oracle.error(first, want) <= TOLERANCE["float32"]
    assert (first == second).all()
    assert compiled > 0
    assert again == 0
    assert threads == 1 + comm.rank % 2


@pytest.mark.parametrize("backend", FACTORS["backend"])
@pytest.mark.parametrize(("layout", "schedule"), [("contiguous", "ring"), ("striped", "gather"), ("zigzag", "auto")])
def test_a_grid(comm, backend, layout, schedule):
    """Two lines of a sphere meet at either end; time goes one way."""
    grid = {"shape": (3, 7, 10), "window": [(1, 1), 2, (3, 1)], "periodic": [False, False, True], "edges": "cut",
            "causal": True}
    q, k, v = random_qkv(1, 210, 210, 4, 2, 16, 12, "float64")
    dout = np.random.default_rng(2).standard_normal((210, 4, 12))
    mine = make_layout(layout, 210, comm.size).positions(comm.rank)
    options = {"mask": Grid(**grid), "layout": layout, "schedule": schedule}
    with RingAttention(comm, backend=backend, timeout=60, **options) as attention:
        out, lse = attention(q[mine], k[mine], v[mine], return_lse=True)
        gradients = attention.backward(dout[mine])
    want = oracle.dense(q, k, v, oracle.near(**grid), 0.25, dout=dout, dlse=np.zeros((210, 4)))
    assert oracle.error(out, want["out"][mine]) < 1e-13
    assert oracle.error(lse, want["lse"][mine]) < 1e-13
    for got, name in zip(gradients, ("dq", "dk", "dv"), strict=False):
        assert oracle.error(got, want[name][mine]) < 1e-12
