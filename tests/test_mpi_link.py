"""Blocks travel unharmed by every carrier over every link, with GPUs that lag behind at will. Runs under mpiexec."""

import itertools
import re
import time
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from fake_device import FakeDevice

from ringmpi import BackendError, OptionError, RankLost, RingError, RingTimeout
from ringmpi.mpi.comm import load, private_comm
from ringmpi.mpi.notices import NOTICE_TAG
from ringmpi.mpi.waiting import stranded
from ringmpi.schedules.base import Blocks, Route
from ringmpi.schedules.device_links import DirectLink, StagedLink
from ringmpi.schedules.gpu_transport import Transport, choose
from ringmpi.schedules.group import Group
from ringmpi.schedules.links import HostLink
from ringmpi.schedules.movers import carrier_class
from ringmpi.schedules.spec import CARRIERS
from ringmpi.trace import Trace

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch):
    """A fake device takes its turns when it is asked."""
    monkeypatch.setattr("ringmpi.mpi.pace.LONGEST_PAUSE", 2e-5)


CHUNK = 64                 # bytes; of the links of these tests
LINKS = ("host", "direct", "staged", "shared", "mixed")
WAYS = [(kind, carrier) for kind in LINKS for carrier in CARRIERS
        if kind == "host" or not carrier_class(carrier).host_only]
FAULTY = [(kind, carrier) for kind, carrier in WAYS if kind != "mixed" or carrier == "gather"]
# Tokens of 8 bytes of K and 16 of V: nothing, less than a chunk, one byte about it, and more chunks than buffers.
TOKENS = (0, 1, 2, 3, 5, 8, 13, 24)


def add(x, y):
    x += y


def link_maker(kind, comm, device):
    """Give what makes links: within a node "shared" has memory that ranks share, and "mixed" has nodes of two ranks."""
    if kind == "mixed" and comm.size < 3:
        pytest.skip("is as 'shared'")
    pair = [rank // 2 == comm.rank // 2 for rank in range(comm.size)]
    neighbours = {"staged": (), "shared": [True] * comm.size, "mixed": pair}
    if kind in neighbours:
        return partial(StagedLink, device, CHUNK, neighbours[kind])
    return HostLink if kind == "host" else partial(DirectLink, device)


class World:
    """A carrier over one kind of link, and a consumer that reads its blocks late."""

    def __init__(self, comm, kind, seed, timeout=60.0, carrier="ring"):
        self.comm, self.kind = comm, kind
        self.device = None if kind == "host" else FakeDevice(seed * 100 + comm.rank)
        private = private_comm(comm)
        self.carrier = carrier_class(carrier)(private, Group.everyone(private), link_maker(kind, comm, self.device),
                                              lambda x: x.fill(0), add)
        self.carrier.timeout = timeout
        self.link = self.carrier.links[0]
        self.random = np.random.default_rng(seed)       # the same on all ranks

    def blocks(self, tokens):
        """The blocks of all ranks: K of shape (2, n, 1) and V of shape (2, n, 2), float32 of random bytes."""
        return [tuple(self.random.integers(0, 256, (2, n, 4 * width), np.uint8).view("f4") for width in (1, 2))
                for n in tokens]

    def there(self, x):
        """Give an array of the ring's memory that holds `x`, or soon will."""
        if self.kind == "host":
            return x.copy()
        array = self.device.empty(x.shape, x.dtype)
        array[...] = x
        return array

    def read(self, arrays):
        """Copy arrays as a kernel would: some time, on the stream of the caller."""
        copies = [np.empty(x.shape, x.dtype) for x in arrays] if self.kind == "host" else [
            self.device.empty(x.shape, x.dtype) for x in arrays]
        for copy, x in zip(copies, arrays, strict=True):
            copy[...] = x
        return copies

    def pass_round(self, tokens, needed=None, each=lambda number: None, stop=None):
        """Move random blocks; give what was read in each item of work, what was sent, and the trace."""
        blocks, trace, items = self.blocks(tokens), Trace(), []
        mine = [self.there(x) for x in blocks[self.comm.rank]]
        route = Route(np.ones((self.comm.size, self.comm.size), bool) if needed is None else needed)
        for work in self.carrier.forward(Blocks(mine, [[x.shape for x in pair] for pair in blocks]), route, trace,
                                          stop):
            each(work.step.step)
            items.append((work, self.read(work.arrays)))
            self.carrier.progress()
        if self.device:
            self.device.caller_stream().synchronize()
        return read_items(items), blocks, trace


def staged(comm, reason):
    """The transport staged, where all ranks are on one node."""
    return Transport("staged", f"{reason}; within a node through shared memory", True) if comm.size > 1 else Transport(
        "staged", reason)


def messages_left(comm):
    """Whether a message of a block or a gradient has not been received: the next with its tag would be taken for it."""
    comm.Barrier()
    status = load().Status()
    left = private_comm(comm).comm.Iprobe(status=status) and status.tag != NOTICE_TAG
    comm.Barrier()
    return left


def order(carrier, comm):
    """The owners of the blocks that a rank computes with, step by step."""
    return (number if carrier == "broadcast" else (comm.rank - number) % comm.size for number in range(comm.size))


class Item(NamedTuple):
    """What was read in an item of work."""

    step: int
    source: int
    following: int | None
    columns: slice
    arrays: list


def read_items(items):
    """Give what copies hold now, when all streams are done."""
    return [Item(work.step.step, work.source, work.following, work.columns,
                 [x if isinstance(x, np.ndarray) else x.host for x in copies]) for work, copies in items]


def same(got, blocks):
    """Whether what was read of blocks is what they hold."""
    return all(x.tobytes() == y[:, item.columns].tobytes()
               for item in got for x, y in zip(item.arrays, blocks[item.source], strict=True))


def whole(got, tokens):
    """Whether each block that was read was read once, whole."""
    read = Counter()
    for item in got:
        read[item.source] += len(range(*item.columns.indices(tokens[item.source])))
    return all(count == tokens[source] for source, count in read.items())


def sources_of(got):
    """The members whose blocks were read, in this order."""
    return list(dict.fromkeys(item.source for item in got))


@pytest.mark.parametrize(("kind", "carrier"), WAYS)
@pytest.mark.parametrize("seed", range(3))
def test_every_block_reaches_every_rank(comm, kind, carrier, seed):
    """Several rounds on the same buffers, which grow."""
    world = World(comm, kind, seed, carrier=carrier)
    outcomes = []
    for turn in range(6):
        tokens = [TOKENS[(turn + 3 * rank + seed) % (4 if turn < 2 else 8)] for rank in range(comm.size)]
        got, blocks, trace = world.pass_round(tokens)
        outcomes.append((same(got, blocks) and whole(got, tokens), got, [step.bytes_received for step in trace.steps],
                         [step.bytes_sent for step in trace.steps], tokens))
    upstream = [(comm.rank - number) % comm.size for number in range(comm.size)]
    downstream = [(comm.rank + number) % comm.size for number in range(comm.size)]
    for right, got, received, sent, tokens in outcomes:
        assert right
        if carrier == "broadcast":
            assert sources_of(got) == list(order(carrier, comm))
            coming = [24 * n * (source != comm.rank) for source, n in enumerate(tokens)]
            assert received == [sum(coming[:2]), *coming[2:], 0][:comm.size]
            continue
        sources = zip(upstream, downstream, strict=True) if carrier == "two-way" else [upstream]
        assert sources_of(got) == list(dict.fromkeys(itertools.chain(*sources)))
        assert [item.following for item in got] == [*(item.source for item in got[1:]), None]
        passing = [24 * tokens[source] for source in upstream]
        if carrier == "two-way":
            passing = [24 * ((tokens[one] + 1) // 2 + tokens[other] // 2)
                       for one, other in zip(upstream, downstream, strict=True)]
        if carrier_class(carrier).in_place:
            passing = [0] * comm.size
        assert received == [*passing[1:], 0]
        assert sent == [*([passing[0]] * (comm.size - 1) if carrier == "gather" else passing[:-1]), 0]


@pytest.mark.parametrize(("kind", "carrier"), WAYS)
def test_blocks_go_no_farther_than_they_must(comm, kind, carrier):
    """And what goes where is what `steps` says."""
    size, rank = comm.size, comm.rank
    world = World(comm, kind, 5, carrier=carrier)
    outcomes = []
    for turn in range(6):
        needed = world.random.random((size, size)) < (0.0, 0.3, 0.6, 0.3, 0.6, 1.0)[turn]
        tokens = [TOKENS[(other + turn) % 8] for other in range(size)]
        got, blocks, trace = world.pass_round(tokens, needed)
        messages = world.carrier.steps(Route(needed, tokens), [[8 * n, 16 * n] for n in tokens])
        outcomes.append((same(got, blocks) and whole(got, tokens), sorted(sources_of(got)),
                         np.flatnonzero(needed[rank]).tolist(), trace, messages))
    for right, sources, wanted, trace, messages in outcomes:
        assert right
        assert sources == wanted
        for step, said in zip(trace.steps, messages, strict=True):
            assert step.bytes_sent == sum(x.nbytes for x in said if x.source == rank)
            assert step.bytes_received == sum(x.nbytes for x in said if x.dest == rank)


@pytest.mark.parametrize(("kind", "carrier"), WAYS)
def test_a_pass_stops_after_the_same_step_on_all_ranks(comm, kind, carrier):
    """One rank asks; the next pass is as if nothing had been."""
    size, last = comm.size, comm.size - 1
    world = World(comm, kind, 9, carrier=carrier)
    tokens = [TOKENS[(2 * rank + 5) % 8] for rank in range(size)]
    outcomes, left = [], []
    for at in range(size + 1):
        asked = iter(range(size + 1))
        got, blocks, trace = world.pass_round(tokens, stop=lambda asked=asked, at=at: next(asked) >= at and
                                              comm.rank == last)
        outcomes.append((same(got, blocks), len({item.step for item in got}), len(trace.steps), world.carrier.stopped))
        left.append(messages_left(comm))
        got, blocks, _ = world.pass_round(tokens)
        outcomes.append((same(got, blocks) and whole(got, tokens), len(sources_of(got)), size, world.carrier.stopped))
    everyone = comm.allgather(outcomes)
    assert all(theirs == outcomes for theirs in everyone)
    assert not any(comm.allgather(any(left)))
    for at, (stopped, after) in enumerate(zip(outcomes[::2], outcomes[1::2], strict=True)):
        assert stopped == (True, min(at + 1, size), min(at + 1, size), at < size - 1)
        assert after == (True, size, size, False)


@pytest.mark.parametrize(("kind", "carrier"), [way for way in WAYS if way[0] != "host"])
def test_the_callers_stream_may_change_between_calls(comm, kind, carrier):
    world = World(comm, kind, 6, carrier=carrier)
    tokens = [TOKENS[(3 + rank) % 8] for rank in range(comm.size)]
    right = []
    for speed in (0.05, 1.0, 0.05, 1.0):
        stream = world.device.new_stream()
        stream.speed = speed
        with stream:
            blocks, trace = world.blocks(tokens), Trace()
            mine = [world.there(x) for x in blocks[comm.rank]]
            shapes = [[x.shape for x in pair] for pair in blocks]
            route = Route(np.ones((comm.size, comm.size), bool))
            items = [(work, world.read(work.arrays))
                     for work in world.carrier.forward(Blocks(mine, shapes), route, trace)]
        right.append((items, blocks))
    for stream in world.device.streams:
        stream.synchronize()
    assert all(same(read_items(items), blocks) and whole(read_items(items), tokens) for items, blocks in right)


@pytest.mark.parametrize(("kind", "carrier"), WAYS)
def test_one_rank_alone_has_no_buffers(comm, kind, carrier):
    if comm.size > 1:
        pytest.skip("is for one rank")
    world = World(comm, kind, 0, carrier=carrier)
    got, blocks, trace = world.pass_round([24])
    assert same(got, blocks)
    assert world.link._slots == []
    assert trace.bytes_sent == 0


# What goes wrong, and what every rank makes of it.

def attempt(world, **options):
    """Pass a round as `RingAttention` does; say what came of it, how long it took, and if buffers in use are kept."""
    start, kept = time.perf_counter(), True
    try:
        world.pass_round([24] * world.comm.size, **options)
        said = "no error"
    except (MemoryError, RingError) as error:
        used, slots = world.link.transfers, world.link._slots
        world.carrier.abandon(error)
        said = f"{type(error).__name__}: {error}"
        kept = not used or any(slots is one for one in stranded())
    return said, time.perf_counter() - start, kept


def outcomes_of(comm, kind, each, timeout=60.0, carrier="ring"):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    mine = comm.Dup()
    world = World(mine, kind, 7, timeout, carrier)
    comm.Barrier()               # else a rank may hear that another gave up before it knows that all have come
    return comm.allgather(attempt(world, each=lambda number: each(world, number))), world


@pytest.mark.parametrize(("kind", "carrier"), FAULTY)
def test_a_rank_that_fails_is_not_waited_for(comm, kind, carrier):
    def each(world, number):
        if comm.rank == 0 and number == 0:
            raise MemoryError("no more")

    outcomes, _ = outcomes_of(comm, kind, each, carrier=carrier)
    for rank, (said, seconds, kept) in enumerate(outcomes):
        assert seconds < 10, outcomes
        assert kept
        if rank == 0:
            assert said == "MemoryError: no more", outcomes
        elif said != "no error":           # had all it needed
            where = f"rank {rank} on .*, {carrier} step . of {comm.size}(: waited .*|, computing)"
            assert re.match(f"RankLost: {where}; rank 0 gave up", said), said


@pytest.mark.parametrize(("kind", "carrier"), FAULTY)
def test_a_rank_that_stops_is_an_error_in_time(comm, kind, carrier):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    world = World(comm.Dup(), kind, 7, 0.3, carrier)
    if comm.rank == 0:
        time.sleep(0.8)
    outcomes = comm.allgather(attempt(world))
    assert any("RingTimeout: " in said for said, _, _ in outcomes), outcomes          # whoever is first
    assert any("no word from rank 0 on " in said for said, _, _ in outcomes), outcomes
    for rank, (said, seconds, kept) in enumerate(outcomes):
        assert seconds < 10, outcomes
        assert kept
        if rank:
            where = rf"rank {rank} on .*, {carrier} step .* waited for "
            assert re.match(f"(RingTimeout|RankLost): {where}", said), outcomes


@pytest.mark.parametrize("kind", ["direct", "staged", "shared"])
def test_a_gpu_that_is_stuck_is_an_error_in_time_and_says_so(comm, kind):
    """On rank 0 nothing on the caller's stream comes about any more: its block is never written."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    world = World(comm.Dup(), kind, 8, 0.3)
    if comm.rank == 0:
        world.device.caller_stream().speed = 0
    outcomes = comm.allgather(attempt(world))
    obstacle = {"direct": r"\(not sent yet: this rank's GPU still writes the buffer\)",
                "staged": (out := r"\(0 of 9 chunks copied out by this rank's GPU so far\)"), "shared": out}[kind]
    for said, seconds, kept in outcomes:
        assert kept
        assert said.startswith(("RingTimeout", "RankLost")), outcomes
        assert seconds < 10, outcomes
    assert re.search(f"for rank 1 to take 576 bytes {obstacle}(; | for 0.3 s)", outcomes[0][0]), outcomes


@pytest.mark.parametrize("kind", ["direct", "staged", "shared"])
def test_a_kernel_that_never_ends_is_an_error_in_time(comm, kind):
    """On rank 0 the first kernel hangs: the buffer it reads can't take the third block."""
    if comm.size < 3:
        pytest.skip("needs three ranks")

    def each(world, number):
        if comm.rank == 0 and number == 0:
            while world.link._own_block_ready is None or not world.link._own_block_ready.done:
                pass
            world.device.caller_stream().speed = 0

    outcomes, world = outcomes_of(comm, kind, each, timeout=0.5)
    obstacle = {"direct": "(not asked for yet: this rank's GPU still reads the buffer)",
                "staged": (into := "(0 of 9 chunks copied in by this rank's GPU so far)"), "shared": into}[kind]
    assert f"576 bytes from rank {comm.size - 1} {obstacle}" in outcomes[0][0], outcomes
    for said, seconds, kept in outcomes:
        assert kept
        assert said.startswith(("RingTimeout", "RankLost", "no error")), outcomes     # some had all they needed
        assert seconds < 10, outcomes
    if comm.rank == 0:
        assert world.link._slots == []


# The choice of the transport.

def test_local_ranks(comm):
    mine = private_comm(comm)
    assert (mine.local_rank, mine.local_size, mine.leader) == (comm.rank, comm.size, 0)
    half = comm.Split(comm.rank % 2, -comm.rank)
    theirs = private_comm(half)
    found = theirs.local_rank, theirs.local_size, half.Get_rank(), half.Get_size()
    half.Free()
    assert found[:2] == found[2:]


def test_a_request_wins_over_the_variable(comm, monkeypatch):
    monkeypatch.setenv("RINGMPI_GPU_TRANSPORT", "direct")
    chosen = [choose(private_comm(comm), request, 60, FakeDevice()) for request in ("staged", "auto", "direct")]
    monkeypatch.setenv("RINGMPI_GPU_TRANSPORT", "staged")
    chosen.append(choose(private_comm(comm), "auto", 60, FakeDevice()))
    assert chosen[0] == staged(comm, "asked for by gpu_transport=staged")
    assert chosen[1].name == "direct"
    assert chosen[1].reason.startswith("asked for by RINGMPI_GPU_TRANSPORT=direct; MPI is not CUDA-aware")
    assert chosen[2].reason.startswith("asked for by gpu_transport=direct; ")
    assert chosen[3] == staged(comm, "asked for by RINGMPI_GPU_TRANSPORT=staged")


def test_all_ranks_take_the_same_transport(comm, monkeypatch):
    monkeypatch.delenv("RINGMPI_GPU_TRANSPORT", raising=False)
    last = comm.size - 1
    chosen = []
    for proven in (lambda rank: True, lambda rank: rank != last, lambda rank: False):
        monkeypatch.setattr("ringmpi.schedules.gpu_transport.cuda_awareness",
                            lambda proven=proven: (proven(comm.rank), f"MPI says {proven(comm.rank)}"))
        chosen.append(choose(private_comm(comm), "auto", 60, FakeDevice()))
    everyone = comm.allgather(chosen)
    assert all(theirs == chosen for theirs in everyone)
    assert chosen[0] == Transport("direct", "MPI says True")
    assert chosen[1] == staged(comm, f"MPI says False{f' (on rank {last})' if last else ''}")
    assert chosen[2] == staged(comm, "MPI says False")


@pytest.mark.parametrize(("request_", "variable", "text"), [
    ("auto", "teleport", "RINGMPI_GPU_TRANSPORT: expected one of auto, direct, staged, got 'teleport'"),
    ("quick", "", "gpu_transport: expected one of auto, direct, staged, got 'quick'")])
def test_a_transport_that_there_is_not(comm, monkeypatch, request_, variable, text):
    """On the last rank alone: the others hear of it."""
    bad = comm.rank == comm.size - 1
    monkeypatch.setenv("RINGMPI_GPU_TRANSPORT", variable if bad else "")
    with pytest.raises(OptionError) as caught:
        choose(private_comm(comm), request_ if bad else "auto", 60, FakeDevice())
    everyone = comm.allgather(str(caught.value))
    assert set(everyone) == {f"rank {comm.size - 1}: {text}"}


def test_transports_that_differ(comm, monkeypatch):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    monkeypatch.setenv("RINGMPI_GPU_TRANSPORT", "direct" if comm.rank else "staged")
    with pytest.raises(OptionError, match="gpu_transport is direct here and staged on rank 0"):
        choose(private_comm(comm), "auto", 60, FakeDevice())


# Memory that the ranks of a node share.

@pytest.fixture(params=["no memfd_create", "no place", "no /proc", "pages can't be locked",
                        "pages of others can't be locked", "other numbers"])
def refused(request, comm, monkeypatch):
    """A device of the last rank, where memory can't be shared; whose text says why."""
    device = FakeDevice()
    if comm.rank != comm.size - 1:
        return device, ""

    def refuse(text, error=OSError):
        def fail(*_):
            raise error(text)
        return fail

    module = "ringmpi.schedules.shared_memory"
    if request.param == "no memfd_create":
        monkeypatch.delattr("os.memfd_create")
        return device, "can't share memory: this system has no memfd_create"
    if request.param == "no place":
        monkeypatch.setattr(f"{module}.os.ftruncate", refuse("no space left"))
        return device, "can't share memory: no space left"
    if request.param == "no /proc":
        monkeypatch.setattr(f"{module}._opened", refuse("no such process"))
        return device, "can't open the memory of rank 0: no such process"
    if request.param == "pages can't be locked":
        device.lock_pages = refuse("not supported", BackendError)
        return device, "can't share memory: not supported"
    if request.param == "other numbers":
        monkeypatch.setattr(f"{module}._opened", lambda wanted: np.zeros(wanted[-1], np.uint8))
        device.lock_pages = lambda memory: None
        return device, "does not find in the memory of rank 0 what its GPU wrote"
    locked = iter((device.lock_pages, refuse("not supported", BackendError)))
    device.lock_pages = lambda memory: next(locked)(memory)
    return device, "can't open the memory of rank 0: not supported"


def test_memory_that_one_rank_cannot_share_is_shared_by_none(comm, refused):
    if comm.size == 1:
        pytest.skip("needs two ranks")
    device, why = refused
    mine = comm.Dup()
    chosen = choose(private_comm(mine), "staged", 60, device)
    again = choose(private_comm(mine), "staged", 60, FakeDevice())      # what has been agreed on stays
    everyone = comm.allgather((chosen, again, chosen.neighbours(private_comm(mine)), why))
    mine.Free()
    last = comm.size - 1
    for theirs, later, neighbours, _ in everyone:
        assert theirs == later == everyone[0][0]
        assert not theirs.shares_memory
        assert neighbours == ()
        assert theirs.reason.startswith("asked for by gpu_transport=staged; by MPI within a node too, as "
                                        f"rank {last} {everyone[last][3]}")


def test_ranks_that_are_alone_on_their_nodes_share_nothing(comm, monkeypatch):
    """And of several on a node each shares with those there."""
    chosen = {}
    for here in (1, 2):
        mine = comm.Dup()
        monkeypatch.setattr("ringmpi.mpi.comm.boot_id", lambda here=here: str(comm.rank // here))
        private = private_comm(mine)
        transport = choose(private, "staged", 60, FakeDevice())
        chosen[here] = transport, transport.neighbours(private)
        mine.Free()
    alone = Transport("staged", "asked for by gpu_transport=staged")
    assert chosen[1] == (alone, ())
    pair = [rank // 2 == comm.rank // 2 for rank in range(comm.size)]
    assert chosen[2] == (staged(comm, alone.reason), tuple(pair) if sum(pair) > 1 else ())


def test_pages_are_locked_once_for_all_links(comm):
    """This rank's own, and those of the ranks that it receives from; for links one after another too."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    found, device = [], None
    for carrier in ("ring", "ring", "gather", "ring"):
        world = World(comm, "shared", 3, carrier=carrier)
        device = device or world.device
        found.append([])
        for link in world.carrier.links:
            link._device = device
        world.device = device
        for tokens in (1, 8, 3):
            world.pass_round([tokens] * comm.size)
            found[-1].append(sorted(device.locked.values()))
        del world, link
    upstream, everyone = [4096] * 2, [4096] * comm.size
    assert found == [[upstream] * 3] * 2 + [[everyone] * 3] * 2


@pytest.mark.parametrize("kind", ["shared", "mixed"])
def test_a_segment_that_cannot_be_opened_any_more_is_an_error_on_all_ranks(comm, kind, monkeypatch):
    """Of the last rank, at the first token that comes."""
    def fail(_):
        raise OSError("too many open files")

    if comm.rank == comm.size - 1:
        monkeypatch.setattr("ringmpi.schedules.shared_memory._opened", fail)
    if kind == "mixed" and comm.size % 2:
        pytest.skip("the last rank shares nothing")
    outcomes, _ = outcomes_of(comm, kind, lambda world, number: None)
    for rank, (said, seconds, kept) in enumerate(outcomes):
        assert seconds < 10, outcomes
        assert kept
        if rank == comm.size - 1:
            assert re.match("ResourceError: this rank can't open the memory of rank .: too many open files", said), said
        elif said != "no error":
            assert f"rank {comm.size - 1} gave up: this rank can't open the memory of rank" in said, outcomes


def test_errors_are_the_rings_own():
    assert issubclass(RingTimeout, RingError)
    assert issubclass(RankLost, RingError)
