"""Gradients and score functions on this run's ranks against a dense float64 softmax. Runs under mpiexec."""

import itertools

import numpy as np
import oracle
import pytest
from cases import FACTORS, covering, draw_mask, make_layout, of_size
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from one_block import BOUND
from oracle import FUNCTIONS, functions, random_qkv

from ringmpi import (
    BackendError,
    DtypeError,
    Mask,
    OptionError,
    RingAttention,
    RingError,
    ShapeError,
    ring_attention,
    ring_attention_backward,
)
from ringmpi.backends.numba_ import amx
from ringmpi.dtypes import TOLERANCE
from ringmpi.layout import make
from ringmpi.score import dropout_keys

pytestmark = pytest.mark.mpi

LEVELS = {**FACTORS, "function": list(FUNCTIONS), "length": [1, 2, "P-1", 103, 301]}
NAMES = ("dq", "dk", "dv", "dsinks")
CASES = covering(LEVELS, seed=1)


def check(comm, *, backend, dtype, layout, mask, heads, length, dim_v, function="plain", n_q=None, seed=0, bound=None,
          accumulator=None, schedule="ring", order="fastest", products="auto"):
    """One forward and backward pass; gives the errors of the gradients."""
    n_q = length if n_q is None else n_q
    q, k, v = random_qkv(seed, n_q, length, *heads, 16, dim_v, dtype)
    rng = np.random.default_rng(seed + 1)
    dout, dlse = rng.standard_normal((n_q, heads[0], dim_v)).astype(q.dtype), rng.standard_normal((n_q, heads[0]))
    q_layout, kv_layout = make_layout(layout, n_q, comm.size), make_layout(layout, length, comm.size)
    mine, theirs = q_layout.positions(comm.rank), kv_layout.positions(comm.rank)
    named = layout in ("striped", "zigzag")
    positions = Mask(**mask).positions(np.arange(n_q), n_q, length)
    score, sinks = functions(function, heads[0], positions, np.arange(length), seed)
    if "dropout_keys" in score:
        score["dropout_keys"] = dropout_keys(seed, 1, heads[0])[0]
    options = {"mask": Mask(**mask), "layout": layout if named else q_layout, "softcap": score.get("softcap"),
               "kv_layout": layout if named else kv_layout, "alibi": score.get("slopes"),
               "dropout": score.get("dropout", 0.0), "accumulator": accumulator, "schedule": schedule,
               "order": order, "bfloat16_products": products}
    with RingAttention(comm, backend=backend, timeout=60, **options) as attention:
        bias = score.get("key_bias")
        given = None if bias is None else bias[theirs, 0] if bias.shape[1] == 1 else bias[theirs]
        relative = score.get("relative", [None])[0]
        out, lse = attention(q[mine], k[theirs], v[theirs], sinks=sinks, key_bias=given, relative=relative, seed=seed,
                             return_lse=True)
        got = attention.backward(dout[mine], dlse[mine].astype(lse.dtype))._asdict()
        pairs, grid = attention.trace.pairs, attention.schedule
    see = oracle.visible(n_q, length, **mask)
    want = oracle.dense(q, k, v, see, 0.25, dout=dout, dlse=dlse, sinks=sinks, **score)
    errors = {"out": oracle.error(out, want["out"][mine], np.abs(want["out"]).max(initial=0) or 1.0) / 2,
              "lse": oracle.error(lse, want["lse"][mine])}
    summed = [name for name in ("dsinks", "drelative") if name in got]
    got |= {name: comm.allreduce(got[name].astype(float)) for name in summed}
    if relative is not None:
        want["drelative"], = want["drelative"]
    largest = max(np.abs(want[name]).max(initial=0) for name in NAMES[:3])
    for name, x in got.items():
        part = want[name] if name in summed else want[name][mine if name == "dq" else theirs].reshape(x.shape)
        # of few keys dq and dk are small differences of numbers as large as dv's, and of `out`, which is rounded
        unit = max(np.abs(want[name]).max(initial=0), 0 if name in summed else largest / 3)
        errors[name] = oracle.error(x, part, unit or 1.0)
    bound = bound or BOUND[dtype]
    assert all(errors[name] <= (TOLERANCE[dtype] if name == "out" else bound if name in got else
                                1e-13 if dtype == "float64" else 2e-6) for name in errors), errors
    assert all(x.dtype == q.dtype for name, x in got.items() if name in NAMES[:3])
    assert (got["dq"][~see[mine].any(axis=1)] == 0).all()
    assert (got["dk"][~see[:, theirs].any(axis=0)] == 0).all()
    assert (got["dv"][~see[:, theirs].any(axis=0)] == 0).all()
    visits = 1 + (order == "canonical")            # of a pair: for its query's sake, and for its key's
    assert pairs == see[mine].sum() + (visits - 1) * see[:, theirs].sum() or grid.queries > 1 or grid.heads > 1
    assert comm.allreduce(pairs) == see.sum() * grid.heads * visits
    return errors


@pytest.mark.parametrize("number", range(len(CASES)))
def test_dense_softmax(comm, number):
    check(comm, **of_size(CASES[number], comm.size), seed=number)


@settings(deadline=None, max_examples=15, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_any_case(comm, data):
    draw = data.draw
    length = draw(st.integers(0, 60))
    mask = draw_mask(draw, length)
    check(comm, backend=draw(st.sampled_from(FACTORS["backend"])), dtype=draw(st.sampled_from(FACTORS["dtype"])),
          layout=draw(st.sampled_from(FACTORS["layout"])), heads=draw(st.sampled_from(FACTORS["heads"])),
          function=draw(st.sampled_from(FUNCTIONS)), dim_v=draw(st.integers(1, 20)), length=length,
          n_q=draw(st.integers(0, 60)), mask=mask, seed=draw(st.integers(0, 99)))


@pytest.mark.parametrize("backend", FACTORS["backend"])
def test_float64_accumulator(comm, backend):
    """Of float32 inputs: what is summed is exact to the rounding of out, which delta goes by."""
    check(comm, backend=backend, dtype="float32", layout="striped", mask={"causal": True}, heads=(4, 2), length=301,
          dim_v=16, function="all", accumulator="float64", bound=2e-7)


@pytest.mark.skipif(bool(amx.missing()), reason=f"no tiles: {amx.missing()}")
@pytest.mark.parametrize("order", ["fastest", "canonical"])
@pytest.mark.parametrize("function", ["plain", "softcap", "all"])
def test_on_tiles(comm, function, order):
    """bfloat16 on the CPU's tiles, where the score has no positions; the bounds are the same."""
    check(comm, backend="numba", dtype="bfloat16", layout="striped", mask={"causal": True}, heads=(8, 2), length=301,
          dim_v=9, function=function, order=order, products="tiles", schedule="auto")


@pytest.mark.parametrize("backend", FACTORS["backend"])
def test_dropout_is_the_same_on_any_ranks_in_any_layout(comm, backend):
    from mpi4py import MPI
    q, k, v = random_qkv(3, 90, 90, 4, 2, 8, 8, "float64")
    options = {"mask": Mask(causal=True), "dropout": 0.4, "backend": backend, "seed": 11, "return_lse": True}
    alone, lse = ring_attention(q, k, v, comm=MPI.COMM_SELF, **options)
    same, other = [], True
    for layout in ("contiguous", "striped", "zigzag"):
        mine = make(layout, 90, comm.size).positions(comm.rank)
        out, some = ring_attention(q[mine], k[mine], v[mine], comm=comm, layout=layout, **options)
        same.append(oracle.error(out, alone[mine], 1.0) < 1e-13 and oracle.error(some, lse[mine]) < 1e-13)
        out = ring_attention(q[mine], k[mine], v[mine], comm=comm, layout=layout, mask=Mask(causal=True), dropout=0.4,
                             backend=backend, seed=12)
        other &= not len(mine) or np.abs(out - alone[mine]).max() > 1e-3
    assert all(same)
    assert other


def test_batch_axis(comm):
    cases = [random_qkv(seed, 30, 30, 4, 2, 8, 12, "float64") for seed in range(3)]
    mine = make("striped", 30, comm.size).positions(comm.rank)
    q, k, v = (np.stack([case[i][mine] for case in cases]) for i in range(3))
    dout = np.random.default_rng(9).standard_normal((3, 30, 4, 12))
    see, sinks = oracle.visible(30, 30, causal=True), np.array([0.1, -1, 2, 0])
    with RingAttention(comm, mask=Mask(causal=True), layout="striped", dropout=0.2, backend="numpy") as attention:
        attention(q, k, v, seed=5, sinks=sinks)
        grads = attention.backward(dout[:, mine])
    total = comm.allreduce(grads[3])
    keys, want_sinks = dropout_keys(5, 3, 4), 0.0
    for number, case in enumerate(cases):
        want = oracle.dense(*case, see, 8**-0.5, dout=dout[number], sinks=sinks, dropout=0.2, dropout_keys=keys[number],
                            queries=np.arange(30), keys=np.arange(30))
        for got, name in zip(grads, NAMES[:3], strict=False):
            assert oracle.error(got[number], want[name][mine], np.abs(want[name]).max()) < 1e-12
        want_sinks = want_sinks + want["dsinks"]
    assert oracle.error(total, want_sinks) < 1e-12


def test_the_functional_form_is_the_same(comm):
    q, k, v = random_qkv(4, 40, 40, 4, 2, 8, 12, "float32")
    dout = np.random.default_rng(0).standard_normal((40, 4, 12)).astype("f4")
    mine = make("zigzag", 40, comm.size).positions(comm.rank)
    options = {"mask": Mask(causal=True), "layout": "zigzag", "softcap": 3.0}
    with RingAttention(comm, **options) as attention:
        out, lse = attention(q[mine], k[mine], v[mine], return_lse=True)
        first, second = attention.backward(dout[mine]), attention.backward(dout[mine])
        again = attention.backward_of(dout[mine], q[mine], k[mine], v[mine], out, lse)
    alone = ring_attention_backward(dout[mine], q[mine], k[mine], v[mine], out, lse, comm=comm, **options)
    for other in (second, again, alone):
        assert all((a == b).all() for a, b in zip(first, other, strict=True))


def test_causal_contiguous_sends_each_gradient_only_as_far_as_it_must(comm):
    q, k, v = random_qkv(8, 4 * comm.size, 4 * comm.size, 1, 1, 4, 4, "float32")
    mine = slice(4 * comm.rank, 4 * comm.rank + 4)
    with (RingAttention(comm, schedule="ring") as full,
          RingAttention(comm, mask=Mask(causal=True), schedule="ring") as causal):
        for attention in (full, causal):
            attention(q[mine], k[mine], v[mine])
            attention.backward(q[mine])
        p, block = comm.size, 4 * 8 * 4
        sent = [comm.allreduce(x.trace.gradient_bytes_sent) for x in (full, causal)]
        moved = comm.allreduce(causal.trace.bytes_sent)
    assert sent == [p * (p - 1) * block, p * (p - 1) // 2 * block]
    assert moved == p * (p - 1) // 2 * block


def test_gradients_of_narrow_inputs_travel_wide(comm):
    q, k, v = random_qkv(8, 2 * comm.size, 2 * comm.size, 1, 1, 4, 4, "bfloat16")
    mine = slice(2 * comm.rank, 2 * comm.rank + 2)
    with RingAttention(comm, schedule="ring") as attention:
        attention(q[mine], k[mine], v[mine])
        attention.backward(q[mine])
        assert attention.trace.gradient_bytes_sent == (comm.size - 1) * 2 * 8 * 4
        assert attention.trace.bytes_sent == (comm.size - 1) * 2 * 8 * 2


def test_messages_are_cut(comm, monkeypatch):
    monkeypatch.setattr("ringmpi.schedules.links.MESSAGE_BYTES", 100)
    check(comm, backend="numpy", dtype="float64", layout="uneven", mask={"causal": True}, heads=(4, 2), length=101,
          dim_v=7)


def said(comm, call):
    """What each rank's call raises, on every rank: type and text."""
    try:
        call()
    except RingError as error:
        return comm.allgather((type(error), str(error)))
    return comm.allgather((None, ""))


def expect(comm, call, kind, *texts):
    """The same error on every rank."""
    outcomes = said(comm, call)
    assert all(outcome == outcomes[0] for outcome in outcomes), outcomes
    assert outcomes[0][0] is kind, outcomes
    assert all(text in outcomes[0][1] for text in texts), outcomes


def test_ranks_that_do_not_do_the_same_pass_say_so(comm):
    """The commonest mistake in training: one rank's result does not need a gradient."""
    q, k, v = random_qkv(6, 5, 5, 2, 1, 4, 3, "float32")
    if comm.size == 1:
        pytest.skip("takes two")
    with RingAttention(comm, timeout=20) as attention:
        out, lse = attention(q, k, v, return_lse=True)
        passes = [lambda: attention(q, k, v), lambda: attention.backward(out),
                  lambda: attention.backward_of(out, q, k, v, out, lse)]
        for first, second in itertools.permutations(passes[:2]):
            attention(q, k, v)
            expect(comm, first if comm.rank else second, OptionError, "expected the same call")
        expect(comm, passes[0] if comm.rank else passes[2], OptionError, "expected the same call")
        again = attention(q, k, v)
    assert (again == out).all()


def test_bad_calls_are_errors_on_every_rank(comm):
    q, k, v = random_qkv(6, 5, 5, 2, 1, 4, 3, "float32")
    last = comm.size - 1
    with RingAttention(comm) as attention:
        expect(comm, lambda: attention.backward(q), RingError, "backward: expected a call before it")
        out, lse = attention(q, k, v, return_lse=True)
        bad = out[:4] if comm.rank == last else out
        expect(comm, lambda: attention.backward(bad), ShapeError, f"rank {last}: dout: expected shape (5, 2, 3)",
               "got (4, 2, 3)")
        bad = out.astype(float) if comm.rank == last else out
        expect(comm, lambda: attention.backward(bad), DtypeError, f"rank {last}: dout: expected dtype float32")
        expect(comm, lambda: attention.backward(out, lse[:2]), ShapeError, "dlse: expected shape (5, 2)")
        fine = attention.backward(out, lse)
        assert len(fine) == 3
        attention(q[:3], k[:3], v[:3])
        expect(comm, lambda: attention.backward(out), ShapeError, "dout: expected shape (3, 2, 3)")
        expect(comm, lambda: attention.backward_of(out, q, k, v, out[:2], lse), ShapeError, "out: expected shape")
        expect(comm, lambda: attention.backward_of(out, q, k, v, out, lse.astype(float)), DtypeError, "lse: expected")
        attention(q, k, v)
        expect(comm, lambda: attention(q, k, v, sinks=np.zeros(3, "f4")), ShapeError, "sinks: expected shape (2,)")
        expect(comm, lambda: attention.backward(out), RingError, "it failed")
        if comm.size > 1:
            some = np.zeros(2, "f4") if comm.rank == last else None
            expect(comm, lambda: attention(q, k, v, sinks=some), ShapeError, f"rank {last}: expected the same sinks")
    expect(comm, lambda: attention.backward(out), RingError, "closed")
    for name, value, text in (("softcap", 0, "softcap: expected a finite number > 0"),
                              ("softcap", "x", "softcap"), ("dropout", 1.0, "0 <= dropout < 1"),
                              ("dropout", -0.1, "dropout"), ("alibi", [[1.0]], "alibi: expected a finite slope"),
                              ("alibi", [np.inf], "alibi")):
        expect(comm, lambda n=name, x=value: RingAttention(comm, **{n: x}), OptionError, text)
    with RingAttention(comm, alibi=[1.0, 2.0, 3.0]) as attention:
        expect(comm, lambda: attention(q, k, v), ShapeError, "alibi: expected a slope for each of 2 heads, got 3")
    with RingAttention(comm, dropout=0.5) as attention:
        expect(comm, lambda: attention(q, k, v, seed=-1), OptionError, "seed: expected an integer")
        if comm.size > 1:
            expect(comm, lambda: attention(q, k, v, seed=comm.rank), OptionError, "expected the same seed")
    for name, value, text in (("softcap", 1e-300, "softcap: 1e-300 is too small"), ("scale", 1e300, "scale"),
                              ("alibi", [1e300, 1], "alibi"), ("softcap", 1e300, "softcap")):
        with RingAttention(comm, **{name: value}) as attention:
            expect(comm, lambda a=attention: a(q, k, v), OptionError, text)
    with RingAttention(comm) as attention:
        for bad in (np.inf, -np.inf, np.nan, 1e300):
            expect(comm, lambda x=bad: attention(q, k, v, sinks=np.array([0, x])), OptionError, "expected finite")
        out, lse = attention(q, k, v, return_lse=True, keep=False)
        expect(comm, lambda: attention.backward(out), RingError, "did not keep its arrays")
    if comm.size > 1:
        expect(comm, lambda: RingAttention(comm, dropout=0.1 * comm.rank), OptionError, "dropout is 0.1 here")
    for offset in (2**31, -2**31):
        with RingAttention(comm, alibi=[1.0, 2.0], mask=Mask(q_offset=offset)) as attention:
            expect(comm, lambda a=attention: a(q, k, v), OptionError, "expected positions below 2^31")
    with RingAttention(comm) as attention:
        attention(q, k, v)

        class Elsewhere:
            __cuda_array_interface__ = None

        expect(comm, lambda: attention.backward(Elsewhere()), BackendError, "dout: the array is on a GPU")
