"""Calls that do not go together, waits that say for whom, and what objects share. Runs under mpiexec."""

import gc
import itertools
import logging
import re
import time

import numpy as np
import pytest

from ringmpi import (
    Mask,
    OptionError,
    RankLost,
    RingAttention,
    RingError,
    RingTimeout,
    redistribute,
    ring_attention,
)
from ringmpi.errors import InternalError, ResourceError
from ringmpi.mpi import clocks, pace
from ringmpi.mpi.comm import private_comm
from ringmpi.mpi.exchange import HEADER_BYTES, RECORD_BYTES, SMALL, Exchange
from ringmpi.passes import Pass

pytestmark = pytest.mark.mpi
X = np.random.default_rng(0).standard_normal((16, 2, 8)).astype("f4")


def said(comm, call):
    """What a call raises on each rank; "" where it raises nothing."""
    try:
        call()
    except (RingError, MemoryError) as error:
        return comm.allgather(f"{type(error).__name__}: {error}")
    return comm.allgather("")


def other_order(comm, first, second):
    """Make two calls; the last rank makes them in the opposite order."""
    calls = (second, first) if comm.rank == comm.size - 1 else (first, second)

    def both():
        for call in calls:
            call()
    return said(comm, both)


@pytest.mark.parametrize(("first", "second", "text"), [
    ({"scale": 0.3}, {"scale": 0.1, "softcap": 3.0}, "scale is"),
    ({}, {"mask": Mask(causal=True)}, "calls in the same order"),
    ({}, {}, "by the order in which they were made"),            # layers of a model, which differ in nothing else
])
def test_objects_called_in_another_order(comm, first, second, text):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    with RingAttention(comm, **first) as a, RingAttention(comm, **second) as b:
        right = a(X, X, X), b(X, X, X)
        outcomes = other_order(comm, lambda: a(X, X, X), lambda: b(X, X, X))
        assert len(set(outcomes)) == 1
        assert outcomes[0].startswith("OptionError")
        assert text in outcomes[0]
        assert (a(X, X, X) == right[0]).all()                    # nothing is lost
        assert (b(X, X, X) == right[1]).all()


def test_backward_of_objects_called_in_another_order(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    with RingAttention(comm) as a, RingAttention(comm) as b:
        out = a(X, X, X)
        b(X, X, 2 * X)
        outcomes = other_order(comm, lambda: a.backward(out), lambda: b.backward(out))
    assert len(set(outcomes)) == 1
    assert "OptionError" in outcomes[0]


def test_backward_of_calls_in_another_order(comm):
    """One object for all layers: its calls are told apart by their number."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    torch = pytest.importorskip("torch")
    import ringmpi.torch
    with RingAttention(comm) as attention:
        xs = [torch.tensor(X * factor, requires_grad=True) for factor in (1, 2)]
        outs = [ringmpi.torch.ring_attention(x, x, x, attention=attention) for x in xs]
        outcomes = other_order(comm, *(lambda out=out: out.sum().backward() for out in outs))
    assert len(set(outcomes)) == 1
    assert "the same number of the call that is differentiated on every rank" in outcomes[0]


def test_different_calls(comm):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    with RingAttention(comm) as attention:
        outcomes = other_order(comm, lambda: attention(X, X, X), lambda: redistribute(X, comm=comm))
        assert len(set(outcomes)) == 1
        assert f"rank {comm.size - 1}: expected the same call on every rank, got redistribute here and forward" in (
            outcomes[0])
        with pytest.raises(OptionError, match="expected the same call"):
            redistribute(X, comm=comm) if comm.rank else RingAttention(comm)
        assert attention(X, X, X).shape == X.shape


@pytest.mark.parametrize("late", ["the first", "the last"])
@pytest.mark.parametrize("place", ["before", "within"])
def test_a_timeout_names_the_rank_that_is_missing(comm, late, place):
    """Whether it comes late to a call, or stops in the ring, where the others need its share of their gradients."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    missing = 0 if late == "the first" else comm.size - 1
    mine = comm.Dup()
    outcome = ""
    naps = iter([4.0])

    def stop(done, total):
        if place == "within" and comm.rank == missing:
            time.sleep(next(naps, 0))
    with RingAttention(mine, timeout=1.5) as attention:
        out = attention(X, X, X)
        attention.backward(out)
        if place == "before" and comm.rank == missing:
            time.sleep(4)
        start = time.perf_counter()
        try:
            attention.backward(out, progress=stop)
        except (RingTimeout, RankLost) as error:
            outcome = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
    for rank, (taken, text) in enumerate(comm.allgather((seconds, outcome))):
        if rank != missing:
            assert taken < 3.5, text
            assert re.search(rf"no word from rank {missing} on \S+ for \d", text), text
            assert not re.search(r"no word from.*; rank \d on", text), text


def test_a_long_wait_is_logged_by_one_rank(comm, caplog, monkeypatch):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    monkeypatch.setattr(pace, "LOG_SECONDS", 0.5)
    monkeypatch.setattr(pace, "ASK_SECONDS", 0.1)
    ring = private_comm(comm)
    comm.Barrier()
    if comm.rank == comm.size - 1:
        time.sleep(0.9)
    with caplog.at_level(logging.WARNING, "ringmpi"):
        ring.allgather([0], 60, "forward")
    lines = comm.allgather([record.getMessage() for record in caplog.records])
    assert [len(line) for line in lines] == [1, *[0] * (comm.size - 1)]
    assert f"no word from rank {comm.size - 1} on" in lines[0][0]


def test_a_communicator_is_freed_with_notices_unread(comm, monkeypatch):
    monkeypatch.setattr(pace, "ASK_SECONDS", 0.01)
    for _ in range(20):
        mine = comm.Dup()
        ring = private_comm(mine)
        if comm.rank == 0:
            time.sleep(0.03)                 # the others ask where it is, and nobody reads that
        ring.allgather([0], 60)
        mine.Free()
        assert ring.lost.startswith("the caller has freed")


@pytest.mark.parametrize(("error", "kind", "text"), [
    (MemoryError("no more"), ResourceError, "out of memory: no more"),
    (ZeroDivisionError("odd"), InternalError, "ZeroDivisionError: odd\nTraceback"),
])
def test_errors_that_nobody_foresaw(comm, error, kind, text):
    ring = private_comm(comm)

    def fail():
        with ring.raise_on_all(60):
            if comm.rank == comm.size - 1:
                raise error
    outcomes = said(comm, fail)
    assert len(set(outcomes)) == 1
    assert outcomes[0].startswith(f"{kind.__name__}: rank {comm.size - 1}: {text}")
    assert kind.exit_code == {ResourceError: 4, InternalError: 70}[kind]


def test_payloads_of_any_size(comm):
    ring = private_comm(comm)
    for sizes in ([0], [1], [223], [224], [225], [5000], [0, 300, 224]):
        mine = np.full(sizes[comm.rank % len(sizes)], comm.rank, np.uint8)
        rows = ring.exchange("", 60, mine)
        assert [row.tolist() for row in rows] == [[rank] * sizes[rank % len(sizes)] for rank in range(comm.size)]
    texts = ring.allgather_text("é" * comm.rank * 100, 60)
    assert texts == ["é" * rank * 100 for rank in range(comm.size)]


def test_objects_share_buffers_and_give_them_back(comm):
    with RingAttention(comm, backend="numpy") as a, RingAttention(comm, backend="numpy", scale=0.5) as b:
        assert a.backend is b.backend
        right = a(X, X, X), b(X, X, X)
        assert a._engine.movers(a._plan.grid) is b._engine.movers(b._plan.grid)
        a.close()
        assert (b(X, X, X) == right[1]).all()
    with pytest.raises(RingError, match="closed"):
        a(X, X, X)
    (workspace,) = {id(x): x for x in private_comm(comm).shared.values() if x.backend is a.backend}.values()
    assert workspace.users == 0
    assert not workspace._movers
    assert workspace._states == (None, [])
    with RingAttention(comm, backend="numpy", threads=1 + comm.rank % 2) as c:       # not the same on all ranks
        assert (c(X, X, X) == right[0]).all()


def test_clocks_are_compared(comm, monkeypatch):
    ring = private_comm(comm)
    clock = time.perf_counter
    shift = 100.0 * comm.rank                        # ranks of one node have one clock
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: clock() + shift)
    offset = clocks.clock_offset(ring, 60)
    monkeypatch.undo()
    assert abs(offset + shift) < 0.5


def test_steps_have_times(comm):
    with RingAttention(comm) as attention:
        before = time.perf_counter()
        attention(X, X, X)
        trace = attention.trace
        assert before <= trace.started <= time.perf_counter()
        times = [x for step in trace.steps for x in (step.compute_start, step.wait_start)]
        assert times == sorted(times)
        assert trace.setup_seconds <= times[0]
        assert times[-1] + trace.steps[-1].wait_seconds <= time.perf_counter() - trace.started
        assert {"compute_start", "wait_start"} <= set(trace.as_dict()["steps"][0])


def test_progress_of_all_ranks(comm):
    ring = private_comm(comm)
    ring.report_progress(comm.rank + 1, 10)
    ring.report_progress(10, 10)
    deadline = time.perf_counter() + 30
    while comm.rank == 0 and ring.progress_of_all() != (10 * comm.size,) * 2 and time.perf_counter() < deadline:
        ring.report_progress(10, 10)
    if comm.rank == 0:
        assert ring.progress_of_all() == (10 * comm.size, 10 * comm.size)
    comm.Barrier()


def test_only_a_communicator_is_one(comm):
    from mpi4py import MPI
    with pytest.raises(RingError, match=r"MPI\.COMM_NULL: this rank is no member of it"):
        ring_attention(X, X, X, comm=MPI.COMM_NULL)


def test_a_call_takes_few_exchanges(comm, monkeypatch):
    """One for each call, and one more for the arrays of a backward pass."""
    if comm.size == 1:
        pytest.skip("one rank exchanges nothing")
    counted = itertools.count()
    original = Exchange._allgather
    monkeypatch.setattr(Exchange, "_allgather", lambda *x: (next(counted), original(*x))[1])

    def exchanges(call):
        start = next(counted)
        call()
        return next(counted) - start - 1

    with RingAttention(comm) as attention:
        out = attention(X, X, X)
        attention.backward(out)
        assert exchanges(lambda: attention(X, X, X)) == 1
        assert exchanges(lambda: attention.backward(out)) == 2
    assert exchanges(lambda: redistribute(X, comm=comm)) == 1
    assert exchanges(lambda: RingAttention(comm).close()) == 1


def test_one_call_at_a_time(comm):
    """Objects share their buffers: a call within a call, or in another thread, is an error."""
    mine = comm.Dup()
    inner = RingAttention(mine, backend="numpy")
    with RingAttention(mine, backend="numpy") as outer:
        outcomes = said(comm, lambda: outer(X, X, X, progress=lambda *_: inner(X, X, X)))
    assert any("another call on this communicator is under way" in text for text in outcomes)
    mine.Free()


def test_an_object_closed_on_one_rank(comm):
    mine = comm.Dup()
    attention = RingAttention(mine, timeout=20)
    if comm.rank == comm.size - 1:
        attention.close()
    outcomes = said(comm, lambda: attention(X, X, X))
    assert len(set(outcomes)) == 1
    assert f"rank {comm.size - 1}: this RingAttention is closed" in outcomes[0]
    attention.close()
    mine.Free()


def test_an_object_that_is_dropped_gives_its_share_back(comm):
    mine = comm.Dup()
    attention = RingAttention(mine, backend="numpy")
    attention(X, X, X)
    (workspace,) = private_comm(mine).shared.values()
    assert workspace.users == 1
    del attention
    gc.collect()
    assert workspace.users == 0
    mine.Free()


def test_an_interrupt_between_two_exchanges_is_told(comm, monkeypatch):
    """A notebook goes on after Ctrl-C: its next call must not be taken for the one that the others are in."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    mine = comm.Dup()
    with RingAttention(mine, timeout=20) as attention:
        attention(X, X, X)
        if comm.rank == 0:
            def interrupt(*_):
                raise KeyboardInterrupt
            monkeypatch.setattr(Pass, "_prepare_pass", interrupt)
        outcomes = []
        for _ in range(2):
            try:
                attention(X, X, X)
                outcomes.append("no error")
            except (RingError, KeyboardInterrupt) as error:
                outcomes.append(type(error).__name__)
            monkeypatch.undo()
    everyone = comm.allgather(outcomes)
    assert everyone[0] == ["KeyboardInterrupt", "CommError"]
    assert all("no error" not in both[1:] for both in everyone), everyone
    assert all(both[0] in ("RankLost", "no error") for both in everyone[1:]), everyone


def test_a_rank_that_computes_says_so(comm, monkeypatch):
    """It is asked in its last step, in which no message of its own is under way."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    monkeypatch.setattr(pace, "ASK_SECONDS", 0.05)
    ring = private_comm(comm)
    comm.Barrier()
    text = ""
    if comm.rank == comm.size - 1:
        stop = time.perf_counter() + 1.0
        while time.perf_counter() < stop:
            ring.progress([], str, lambda: True)
            time.sleep(0.01)
        ring.exchange("", 60)
    else:
        original = ring._waiter.notices.missing
        texts = []
        monkeypatch.setattr(pace, "LOG_SECONDS", 0.6)
        monkeypatch.setattr(ring._waiter, "_log", lambda what, since: texts.append(original(since, ())))
        ring.exchange("", 60)
        text = texts[0]
    texts = comm.allgather(text)
    assert all(f"rank {comm.size - 1} on" in said and "computing" in said for said in texts[:-1]), texts


def test_records_grow_and_shrink_alike(comm):
    """Payloads come through whatever their sizes, and the size of the next record is the same on every rank."""
    ring = private_comm(comm)
    sizes = np.random.default_rng(0).integers(0, 2, (40, comm.size)) * 900 + 3          # some fit, some don't
    for number, wanted in enumerate([*sizes, *[[5000] * comm.size] * 2, *[[40000] * comm.size] * 2]):
        rows = ring.exchange("", 60, np.full(wanted[ring.rank], number + ring.rank, np.uint8))
        assert [(len(row), set(row.tolist())) for row in rows] == [
            (size, {(number + rank) % 256}) for rank, size in enumerate(wanted)]
    sent = comm.allgather(ring._mine.size)
    assert set(sent) == {HEADER_BYTES + 5000 if comm.size > 1 else RECORD_BYTES}
    for _ in range(SMALL):
        ring.exchange("", 60)
    assert set(comm.allgather(ring._mine.size)) == {RECORD_BYTES}
    assert "differs" in said(comm, lambda: ring.exchange("x", 60, options={"x": "differs" if comm.rank else 0}))[0] or (
        comm.size == 1)
