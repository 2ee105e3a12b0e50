"""The window carrier: shared memory that is given back, and who may use it. Runs under mpiexec."""

import gc
import os
import re
import time

import numpy as np
import pytest
from test_mpi_gradients import expect
from test_mpi_link import World

from ringmpi import OptionError, RankLost, RingAttention, RingTimeout, Schedule
from ringmpi.mpi.comm import private_comm
from ringmpi.schedules import shared_memory
from ringmpi.schedules.base import Blocks, Route
from ringmpi.schedules.grid import Grid
from ringmpi.schedules.shared_memory import Segment, Windows
from ringmpi.trace import Trace

pytestmark = pytest.mark.mpi


def open_files():
    """The shared memory that this process has open, or mapped."""
    files = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
             if os.path.exists(f"/proc/self/fd/{number}")]
    with open("/proc/self/maps") as maps:
        return sum("memfd:ringmpi" in file for file in files), sum("memfd:ringmpi" in line for line in maps)


def passes(comm, x):
    with RingAttention(comm, schedule=Schedule(keys=comm.size, carrier="window"), timeout=60) as attention:
        for tokens in (x, x[:3], x):
            out = attention(tokens, tokens, tokens)
            attention.backward(out)
        assert attention.trace.bytes_sent == attention.trace.gradient_bytes_sent == 0
        return open_files()


def test_memory_is_given_back(comm):
    """One segment a rank and one window on each other's, however many calls; none once the object is closed."""
    gc.collect()
    before = np.array(open_files())                       # what other tests keep after an error
    x = np.random.default_rng(comm.rank).standard_normal((700, 2, 8)).astype("f4")
    during = [passes(comm, x) for _ in range(2)]
    many = comm.size if comm.size > 1 else 0
    assert (during - before == (many and many + 1, many)).all()      # its own file, and Python's copy for each mapping
    assert (open_files() == before).all()


def test_gradients_are_the_same_bits_each_time(comm):
    """Whoever is late."""
    x = np.random.default_rng(comm.rank).standard_normal((50, 2, 8)).astype("f4")
    results = []
    with RingAttention(comm, schedule=Schedule(keys=comm.size, carrier="window"), timeout=60, threads=1) as attention:
        for turn in range(4):
            out = attention(x, x, x, progress=lambda *_, turn=turn: time.sleep(0.01 * (comm.rank == turn)))
            results.append(attention.backward(out, progress=lambda *_, turn=turn: time.sleep(0.01 * (
                comm.rank == turn))))
    assert all(np.array_equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_ranks_on_several_nodes_are_refused(comm, monkeypatch):
    if comm.size < 2:
        pytest.skip("takes two")
    size, x = comm.size, np.ones((3, 2, 8), "f4")
    monkeypatch.setattr(private_comm(comm), "nodes", [rank // (size - 1) for rank in range(size)])
    window = Schedule(keys=size, carrier="window")
    with RingAttention(comm, schedule=window, timeout=60) as attention:
        expect(comm, lambda: attention(x, x, x), OptionError, f"schedule {window}: expected the ranks that share keys "
               f"to be on one node, got ranks {', '.join(map(str, range(size)))} on 2 nodes; 1x1x{size}:ring would do")


def test_gpus_are_refused(comm):
    world = World(comm, "host", 0, carrier="window")
    grid = Schedule(keys=comm.size, carrier="window")
    with pytest.raises(OptionError, match="expected arrays in host memory and ranks that compute on CPUs, got GPUs; "
                                          f"1x1x{comm.size}:ring would do"):
        world.carrier.check(Grid(grid, (0,) * comm.size), True)


def test_memory_that_can_not_be_shared_is_an_agreed_error(comm, monkeypatch):
    """On one rank: no memory of this kind, or it can't open that of another."""
    if comm.size < 2:
        pytest.skip("takes two")
    x, last = np.ones((3, 2, 8), "f4"), comm.size - 1

    def fail(*_):
        raise PermissionError(13, "not allowed")

    for name, what in (("_mapped", "share memory"), ("_opened", "open the memory of rank 0")):
        with monkeypatch.context() as patch:
            if comm.rank == last:
                patch.setattr(shared_memory, name, fail)
            with RingAttention(comm, schedule=f"1x1x{comm.size}:window", timeout=60) as attention:
                expect(comm, lambda attention=attention: attention(x, x, x), OptionError,
                       f"rank {last}: carrier window: this rank can't {what} ([Errno 13] not allowed); the ring would")


def test_a_handle_of_something_else(comm):
    """As if the owner were in another container."""
    segment, other = Segment(), Segment()
    segment.reserve(10)
    other.reserve(10)
    handle = segment.handle()
    handle[1] = other.handle()[1]
    with pytest.raises(OSError, match="is not its memory"):
        Windows().memory(0, handle)


@pytest.mark.parametrize("backward", [False, True])
def test_a_rank_that_does_not_come_is_named(comm, backward):
    """Rank 1 stops: in a backward pass after its first step, before it adds to the gradients of others."""
    if comm.size < 2:
        pytest.skip("takes two")
    world, said = World(comm.Dup(), "host", 1, timeout=0.5, carrier="window"), ""
    start = time.perf_counter()
    comm.Barrier()
    try:
        if backward:
            each = Blocks([np.ones((1, 5, 2), "f4")], [[(1, 5, 2)]] * comm.size)
            for work in world.carrier.backward(each, each, Route(np.ones((comm.size, comm.size), bool)), Trace()):
                if comm.rank == 1 and work.step.step == 1:
                    time.sleep(2)
        elif comm.rank != 1:
            world.pass_round([5] * comm.size)
    except (RingTimeout, RankLost) as error:
        said = str(error)
        world.carrier.abandon(error)
    everyone = comm.allgather(said)
    assert time.perf_counter() - start < 10
    what = "read a block|added to the gradients" if backward else "its block there"
    pattern = rf"window step \d of \d: waited for rank 1 to have ({what})"
    assert any(re.search(pattern, text) for text in everyone), everyone
    assert all(everyone[:1] + everyone[2:]), everyone


def test_memory_that_is_gone_in_mid_pass(comm, monkeypatch):
    """Its owner was killed, say: word of it is waited for, as for a message."""
    if comm.size < 2:
        pytest.skip("takes two")

    def gone(handle):
        raise FileNotFoundError(2, "No such file")

    world, said = World(comm.Dup(), "host", 1, timeout=0.5, carrier="window"), ""
    if comm.rank == 1:
        monkeypatch.setattr(shared_memory, "_opened", gone)
    comm.Barrier()
    try:
        world.pass_round([5] * comm.size)
    except (RingTimeout, RankLost) as error:
        said = str(error)
        world.carrier.abandon(error)
    everyone = comm.allgather(said)
    assert "window step 0 of" in everyone[1] or "window step 1 of" in everyone[1], everyone
    assert "waited for rank 0, whose shared memory is gone, for 0.5 s" in everyone[1], everyone
    assert everyone[0], everyone
