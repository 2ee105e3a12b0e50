"""Gradients come home whole over every link, with GPUs that lag behind at will. Runs under mpiexec."""

import re
import time

import numpy as np
import pytest
from fake_device import FakeDevice
from test_mpi_link import CHUNK, LINKS, TOKENS

from ringmpi import RankLost, RingTimeout
from ringmpi.mpi.comm import private_comm
from ringmpi.mpi.waiting import stranded
from ringmpi.schedules.gradient_ring import Homeward, first_hops
from ringmpi.schedules.links import DirectLink, HostLink, StagedLink
from ringmpi.schedules.ring import Ring, travel
from ringmpi.trace import Trace

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch):
    """A fake device takes its turns when it is asked."""
    monkeypatch.setattr("ringmpi.mpi.pace.LONGEST_PAUSE", 2e-5)


class World:
    """A ring and its gradients over one kind of link."""

    def __init__(self, comm, kind, seed, timeout=60.0):
        self.comm, self.kind = comm, kind
        self.device = None if kind == "host" else FakeDevice(seed * 100 + comm.rank)
        new_link = {"host": HostLink, "direct": lambda *x: DirectLink(self.device, *x),
                    "staged": lambda *x: StagedLink(self.device, *x, chunk_bytes=CHUNK)}[kind]
        self.ring = Ring(private_comm(comm), timeout, new_link())
        self.homeward = Homeward(private_comm(comm), new_link, self.clear, self.add)
        self.random = np.random.default_rng(seed)       # the same on all ranks

    def work(self, call):
        """Do something where the arrays are: at once, or some time, on the stream of the caller."""
        if self.device:
            self.device.put(lambda: (call(), None)[1])
        else:
            call()

    def clear(self, x):
        x = host(x)
        self.work(lambda: x.fill(0))

    def add(self, x, y):
        x, y = host(x), y if isinstance(y, np.ndarray) else y.host
        self.work(lambda: np.add(x, y, out=x))

    def pass_round(self, tokens, needed, dtype, each=lambda step: None):
        """Each rank adds numbers to the gradients of what it needs; give ours, what they should be, and the trace."""
        rank, size = self.comm.rank, self.comm.size
        shapes = [[(n, 2), (n, 4)] for n in tokens]
        shares = [[[self.random.integers(0, 99, shape).astype(dtype) for shape in shapes[source]]
                   for source in range(size)] for _ in range(size)]
        new = np.empty if self.kind == "host" else self.device.empty
        mine, arrays = ([new(shape, kind) for shape in shapes[rank]] for kind in (dtype, np.float32))
        for x in (*mine, *arrays):
            self.clear(x)
        hops, trace = travel(needed), Trace()
        self.homeward.take(mine, shapes, hops, first_hops(needed))
        for block in self.ring.circulate(arrays, shapes, hops, trace, self.homeward):
            if needed[rank, block.source]:
                for x, share in zip(block.gradients, shares[rank][block.source], strict=True):
                    self.add(x, share)
            self.ring.progress()
            each(block.step.step)
        if self.device:
            self.device.caller_stream().synchronize()
        want = [sum((shares[other][rank][i] for other in range(size) if needed[other, rank]), np.zeros(x.shape, dtype))
                for i, x in enumerate(mine)]
        return [host(x) for x in mine], want, trace


def host(x):
    return x if isinstance(x, np.ndarray) else x.host


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("seed", range(4))
def test_the_sum_of_all_shares_comes_home(comm, kind, seed):
    """Several rounds on the same buffers, which grow; in some nobody needs a block, or but few do."""
    world, size, outcomes = World(comm, kind, seed), comm.size, []
    for turn in range(6):
        tokens = [TOKENS[(turn + 3 * rank + seed) % (4 if turn < 2 else 8)] for rank in range(size)]
        needed = world.random.random((size, size)) < (0.0, 0.3, 0.6, 1.0, 0.3, 1.0)[turn]
        dtype = np.dtype(np.float64 if turn % 2 else np.float32)
        got, want, trace = world.pass_round(tokens, needed, dtype)
        sent = comm.allreduce(trace.gradient_bytes_sent)
        messages = [hop - first + 1 if hop else 0
                    for hop, first in zip(travel(needed), first_hops(needed), strict=True)]
        outcomes.append(([(a == b).all() for a, b in zip(got, want, strict=True)], sent,
                         sum(6 * n * m * dtype.itemsize for n, m in zip(tokens, messages, strict=True))))
    for right, sent, expected in outcomes:
        assert all(right)
        assert sent == expected


def test_sums_come_in_while_a_rank_computes(comm):
    """No more is done than what a kernel does between its tiles."""
    if comm.size < 3:
        pytest.skip("takes three")
    world = World(comm, "staged", 2)
    there = []

    def compute(step):
        latest = time.monotonic() + 20
        while step > 1 and not world.homeward._chain.incoming.done() and time.monotonic() < latest:
            world.ring.progress()
        there.append(step < 2 or world.homeward._chain.incoming.done())

    world.pass_round([24] * comm.size, np.ones((comm.size, comm.size), bool), np.dtype("f4"), compute)
    assert all(there)


@pytest.mark.parametrize("kind", LINKS)
def test_nothing_that_is_under_way_is_freed_after_an_error(comm, kind):
    if comm.size == 1:
        pytest.skip("takes two")
    other = comm.Dup()
    world, before = World(other, kind, 3), len(stranded())
    comm.Barrier()                    # else a rank may hear of the failure before it knows that all have come
    links = [world.ring._link, *world.homeward.links]

    def fail(step):
        raise ValueError("on purpose")

    try:
        world.pass_round([24] * comm.size, np.ones((comm.size, comm.size), bool), np.dtype("f4"), fail)
    except (ValueError, RankLost) as error:
        world.ring.abandon(error)
    assert not any(link._slots for link in links)
    assert len(stranded()) >= before + 2          # the slots of what comes home among them


def test_first_hops(comm):
    needed = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]], bool)
    assert first_hops(needed) == [2, 2, 0, 1]
    assert travel(needed) == [2, 2, 0, 1]


def test_a_rank_that_does_not_come_is_named(comm):
    if comm.size == 1:
        pytest.skip("takes two")
    half = comm.Dup()
    world, said = World(half, "host", 1, timeout=0.5), ""
    if comm.rank != 1:
        try:
            world.pass_round([5] * comm.size, np.ones((comm.size, comm.size), bool), np.dtype("f4"))
        except (RingTimeout, RankLost) as error:
            said = str(error)
    everyone = comm.allgather(said)
    assert not everyone[1]
    assert all(re.search(r"ring step \d of \d: waited for", text) for text in everyone[:1] + everyone[2:]), everyone
