"""Gradients come home whole by every carrier and link, with GPUs that lag behind at will. Runs under mpiexec."""

import re
import time

import numpy as np
import pytest
from fake_device import FakeDevice
from test_mpi_link import TOKENS, WAYS, link_maker, messages_left

from ringmpi import RankLost, RingTimeout
from ringmpi.mpi.comm import private_comm
from ringmpi.mpi.waiting import stranded
from ringmpi.schedules.base import Blocks, Route
from ringmpi.schedules.group import Group
from ringmpi.schedules.movers import carrier_class
from ringmpi.trace import Trace

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch):
    """A fake device takes its turns when it is asked."""
    monkeypatch.setattr("ringmpi.mpi.pace.LONGEST_PAUSE", 2e-5)


class World:
    """A carrier and its gradients over one kind of link."""

    def __init__(self, comm, kind, seed, timeout=60.0, carrier="ring"):
        self.comm, self.kind = comm, kind
        self.device = None if kind == "host" else FakeDevice(seed * 100 + comm.rank)
        new_link = link_maker(kind, comm, self.device)
        private = private_comm(comm)
        self.carrier = carrier_class(carrier)(private, Group.everyone(private), new_link, self.clear, self.add)
        self.carrier.timeout = timeout
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

    def pass_round(self, tokens, needed, dtype, each=lambda step: None, stop=None):
        """Each rank adds numbers to the gradients of what it needs; give ours, what they should be, and the trace."""
        rank, size = self.comm.rank, self.comm.size
        shapes = [[(2, n, 1), (2, n, 2)] for n in tokens]
        shares = [[[self.random.integers(0, 99, shape).astype(dtype) for shape in shapes[source]]
                   for source in range(size)] for _ in range(size)]
        new = np.empty if self.kind == "host" else self.device.empty
        mine, arrays = ([new(shape, kind) for shape in shapes[rank]] for kind in (dtype, np.float32))
        for x in (*mine, *arrays):
            self.clear(x)
        trace = Trace()
        for work in self.carrier.backward(Blocks(arrays, shapes), Blocks(mine, shapes), Route(needed), trace, stop):
            for x, share in zip(work.gradients, shares[rank][work.source], strict=True):
                self.add(x, share[:, work.columns])
            self.carrier.progress()
            each(work.step.step)
        if self.device:
            self.device.caller_stream().synchronize()
        want = [sum((shares[other][rank][i] for other in range(size) if needed[other, rank]), np.zeros(x.shape, dtype))
                for i, x in enumerate(mine)]
        return [host(x) for x in mine], want, trace


def host(x):
    return x if isinstance(x, np.ndarray) else x.host


@pytest.mark.parametrize(("kind", "carrier"), WAYS)
@pytest.mark.parametrize("seed", range(4))
def test_the_sum_of_all_shares_comes_home(comm, kind, carrier, seed):
    """Several rounds on the same buffers, which grow; in some nobody needs a block, or but few do."""
    world, size, outcomes = World(comm, kind, seed, carrier=carrier), comm.size, []
    for turn in range(6):
        tokens = [TOKENS[(turn + 3 * rank + seed) % (4 if turn < 2 else 8)] for rank in range(size)]
        needed = world.random.random((size, size)) < (0.0, 0.3, 0.6, 1.0, 0.3, 1.0)[turn]
        dtype = np.dtype(np.float64 if turn % 2 else np.float32)
        got, want, trace = world.pass_round(tokens, needed, dtype)
        sizes = [[2 * n * dtype.itemsize, 4 * n * dtype.itemsize] for n in tokens]
        messages = world.carrier.steps(Route(needed, tokens), [[8 * n, 16 * n] for n in tokens], sizes)
        outcomes.append(([(a == b).all() for a, b in zip(got, want, strict=True)], trace.steps, messages))
    for right, steps, messages in outcomes:
        assert all(right)
        for step, said in zip(steps, messages, strict=True):
            assert step.gradient_bytes_sent == sum(x.nbytes for x in said if x.source == comm.rank and x.gradients)


@pytest.mark.parametrize(("kind", "carrier"), WAYS)
def test_a_pass_that_stops_leaves_nothing_behind(comm, kind, carrier):
    """After it gradients come home as if it had not been."""
    world, size, right = World(comm, kind, 1, carrier=carrier), comm.size, []
    tokens = [TOKENS[(3 * rank + 4) % 8] for rank in range(size)]
    for at in range(size):
        needed, asked = world.random.random((size, size)) < 0.7, iter(range(size))
        _, _, trace = world.pass_round(tokens, needed, np.dtype("f4"),
                                       stop=lambda asked=asked, at=at: next(asked) == at and comm.rank == 0)
        right.append(len(trace.steps) == at + 1)
        right.append(not messages_left(comm))
        got, want, _ = world.pass_round(tokens, needed, np.dtype("f4"))
        right.append(all((a == b).all() for a, b in zip(got, want, strict=True)))
    assert all(right)


def test_sums_come_in_while_a_rank_computes(comm):
    """No more is done than what a kernel does between its tiles."""
    if comm.size < 3:
        pytest.skip("takes three")
    world = World(comm, "staged", 2)
    there = []

    def compute(step):
        latest = time.monotonic() + 20
        while step > 1 and not world.carrier.links[1].incoming[0].done() and time.monotonic() < latest:
            world.carrier.progress()
        there.append(step < 2 or world.carrier.links[1].incoming[0].done())

    world.pass_round([24] * comm.size, np.ones((comm.size, comm.size), bool), np.dtype("f4"), compute)
    assert all(there)


@pytest.mark.parametrize(("kind", "carrier"), WAYS)
def test_nothing_that_is_under_way_is_freed_after_an_error(comm, kind, carrier):
    if comm.size == 1:
        pytest.skip("takes two")
    other = comm.Dup()
    world, before = World(other, kind, 3, carrier=carrier), len(stranded())
    comm.Barrier()                    # else a rank may hear of the failure before it knows that all have come

    def fail(step):
        raise ValueError("on purpose")

    try:
        world.pass_round([24] * comm.size, np.ones((comm.size, comm.size), bool), np.dtype("f4"), fail)
    except (ValueError, RankLost) as error:
        slots = [link._slots for link in world.carrier.links if link.transfers]
        world.carrier.abandon(error)
    assert not any(link._slots for link in world.carrier.links)
    assert slots
    assert all(any(one is kept for kept in stranded()[before:]) for one in slots)


def test_how_far_blocks_go(comm):
    route = Route(np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]], bool))
    assert route.first == [2, 2, 0, 1]
    assert route.last == [2, 2, 0, 1]


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
