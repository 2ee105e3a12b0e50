"""The gather gives what the ring gives, bit for bit; which schedules there are. Runs under mpiexec."""

import time

import numpy as np
import pytest
from test_mpi_gradients import expect

from ringmpi import Mask, OptionError, RingAttention, RingError, Schedule, Zigzag, ring_attention
from ringmpi.mpi import pace
from ringmpi.mpi.comm import private_comm
from ringmpi.mpi.notices import QUESTION
from ringmpi.schedules.spec import CARRIERS

pytestmark = pytest.mark.mpi

AS_THE_RING = ("ring", "gather")             # carriers that promise its bits
MASKS = {"all": {}, "causal": {"causal": True}, "window": {"causal": True, "window": (5, 0)},
         "documents": {"causal": True, "documents": [0, 3, 11, 12]}, "nothing": {"window": (0, 0), "q_offset": 1000}}


def shard(random, rank, counts, heads, dim, batch, dtype):
    x = random.standard_normal((batch, sum(counts), heads, dim)).astype(dtype)
    start = sum(counts[:rank])
    return x[:, start:start + counts[rank]]


def movers(attention):
    return attention._engine.movers(attention._plan.grid)


def passes(comm, schedule, mask, layout, dtype, sinks):
    """Attend and differentiate twice; give all results."""
    random = np.random.default_rng(11)
    counts = {"uneven": [(5 * rank + 3) % 7 for rank in range(comm.size)], "striped": None, "zigzag": None}[layout]
    if counts is None:
        length = 6 * comm.size + 1
        counts = [len(range(rank, length, comm.size)) for rank in range(comm.size)]
        if layout == "zigzag":
            counts = Zigzag(length, comm.size).counts
    options = dict(MASKS[mask])
    if "documents" in options:
        options["documents"] = [*(x for x in options["documents"] if x < sum(counts)), sum(counts)]
    q, k, v, dout = (shard(random, comm.rank, counts, heads, dim, 2, dtype)
                     for heads, dim in ((4, 8), (2, 8), (2, 6), (4, 6)))
    given = random.standard_normal(4).astype("f4") if sinks else None
    results = []
    with RingAttention(comm, mask=Mask(**options), layout="contiguous" if layout == "uneven" else layout,
                       schedule=schedule, timeout=60, threads=1) as attention:
        for _ in range(2):
            results += attention(q, k, v, sinks=given, return_lse=True)
            results += attention.backward(dout)
    return results


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["uneven", "striped", "zigzag"])
@pytest.mark.parametrize(("dtype", "sinks"), [("f4", False), ("f8", True)])
def test_the_same_as_the_ring(comm, mask, layout, dtype, sinks):
    """Bit for bit where blocks are taken in its order; else to rounding."""
    results = {carrier: passes(comm, Schedule(keys=comm.size, carrier=carrier), mask, layout, dtype, sinks)
               for carrier in CARRIERS}
    for carrier, got in results.items():
        pairs = list(zip(got, results["ring"], strict=True))
        assert all(x.dtype == y.dtype for x, y in pairs)
        if carrier in AS_THE_RING:
            assert all(np.array_equal(x, y) for x, y in pairs)
        else:
            bound = 64 * np.finfo(dtype).eps
            assert all(np.allclose(x, y, bound, bound * np.abs(y[np.isfinite(y)]).max(initial=1)) for x, y in pairs)
        assert all((x == y).all() for x, y in zip(got[:len(got) // 2], got[len(got) // 2:], strict=True)), carrier


def test_a_schedule_is_one_of_those_there_are_and_the_same_everywhere(comm):
    x = np.ones((3, 2, 8), "f4")
    for wrong in ("tree", "2x2", "1x1x2:tree", 3, None):
        expect(comm, lambda wrong=wrong: ring_attention(x, x, x, comm=comm, schedule=wrong), OptionError, "schedule: ")
    size = comm.size
    expect(comm, lambda: ring_attention(x, x, x, comm=comm, schedule=Schedule(2, 3, size)), OptionError,
           f"schedule 2x3x{size}:ring: expected heads x queries x keys to be the number of ranks, {size}, "
           f"got {6 * size}")
    if size > 2:
        expect(comm, lambda: ring_attention(x, x, x, comm=comm, schedule="heads"), OptionError,
               f"to divide the 2 heads; {2 - size % 2}x1x{size // (2 - size % 2)}:ring would do")
    if size > 1:
        expect(comm, lambda: ring_attention(x, x, x, comm=comm, schedule=CARRIERS[comm.rank == 1]), OptionError,
               f"schedule is 1x1x{size}:gather here and 1x1x{size}:ring on rank 0")


@pytest.mark.parametrize("carrier", CARRIERS)
def test_an_object_that_a_callback_closes(comm, carrier):
    """The call ends as it would have, and keeps nothing for a backward pass."""
    schedule = Schedule(keys=comm.size, carrier=carrier)
    x = np.random.default_rng(comm.rank).standard_normal((9, 2, 8)).astype("f4")
    schedule = Schedule(keys=comm.size, carrier=carrier)
    with RingAttention(comm, schedule=schedule, timeout=60) as attention:
        want = attention(x, x, x)
    attention = RingAttention(comm, schedule=schedule, timeout=60)
    got = attention(x, x, x, progress=lambda *_: attention.close())
    assert (got == want).all()
    assert attention._last is None
    expect(comm, lambda: attention.backward(x), RingError, "closed")


def test_a_wait_for_very_many_ranks(comm, monkeypatch):
    """What is said to the others is of any length; what they can't read is no reason to give up."""
    ring = private_comm(comm)
    monkeypatch.setattr(pace, "ASK_SECONDS", 0.02)
    ring.exchange("", 60)
    if comm.rank == 0 and comm.size > 1:
        ring._waiter.notices._tell_all(QUESTION, "no JSON")
        arrived = comm.irecv(source=comm.size - 1, tag=7)
        ring.wait([arrived], 60, lambda: "waits", peers=lambda: list(range(comm.size)) * 1000)
    elif comm.rank == comm.size - 1 and comm.size > 1:
        time.sleep(0.3)
        comm.send(1, dest=0, tag=7)
    ring.exchange("", 60)
    assert not ring.lost


def test_the_gather_has_buffers_only_for_what_a_rank_needs(comm):
    if comm.size < 3:
        pytest.skip("takes three")
    x = np.ones((20, 2, 8), "f4")
    with RingAttention(comm, mask=Mask(causal=True, window=(4, 0)), schedule="gather", timeout=60) as attention:
        attention.backward(attention(x, x, x))
        blocks, shares, coming_home = (len(link._slots) for link in movers(attention).carrier.links)
    assert (blocks, shares, coming_home) == (comm.rank > 0, comm.rank > 0, comm.rank < comm.size - 1)
    assert attention.trace.hops == (comm.rank > 0)
