"""The parts of a link one by one, the fake device they are tested with, and what MPI says about CUDA. One process."""

import ctypes
import gc
import inspect
import math
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from fake_device import FakeArray, FakeDevice

from ringmpi import environment
from ringmpi.device import Device
from ringmpi.dtypes import BFLOAT16
from ringmpi.schedules import gpu_transport as transport
from ringmpi.schedules.device_links import DirectLink, StagedLink
from ringmpi.schedules.gpu_transport import cuda_awareness
from ringmpi.schedules.links import DirectTransfer, HostLink, Peer, chunks
from ringmpi.schedules.shared_memory import LockedMemory, Segment
from ringmpi.schedules.staging import AHEAD, IncomingChannel, OutgoingChannel, StagedReceive, StagedSend

# The fake device: that it is like a device, and finds mistakes.


def test_the_fake_is_used_as_a_device_is():
    fake, real = (dict(inspect.getmembers(kind, inspect.isfunction)) for kind in (FakeDevice, Device))
    assert {"message_buffer", "pinned", "upload", "download", "caller_stream", "new_stream", "record",
            "follow"} <= set(fake) & set(real)
    for name in {name for name in set(fake) & set(real) if not name.startswith("_")}:
        assert list(inspect.signature(fake[name]).parameters) == list(inspect.signature(real[name]).parameters), name


def test_an_event_comes_after_all_that_was_before_it_on_its_stream():
    for seed in range(20):
        device, order = FakeDevice(seed), []
        stream = device.new_stream()
        for number in range(5):
            device.put(partial(order.append, number), stream)
        event = device.record(stream)
        device.put(partial(order.append, 5), stream)
        assert not order
        while not event.done:
            pass
        assert order[:5] == [0, 1, 2, 3, 4]


def test_streams_go_at_their_own_pace():
    orders = set()
    for seed in range(40):
        device, order = FakeDevice(seed), []
        streams = [device.new_stream(), device.new_stream()]
        for name, stream in zip("ab", streams, strict=True):
            device.put(partial(order.append, name), stream)
        for stream in streams:
            stream.synchronize()
        orders.add("".join(order))
    assert orders == {"ab", "ba"}


def copied(seed, waits):
    """Write on one stream and copy to the host on another, which waits for the first or does not."""
    device = FakeDevice(seed)
    source, target, other = device.message_buffer(8), device.pinned(8), device.new_stream()
    source.fill(1)
    if waits:
        device.follow(other, device.record(device.caller_stream()))
    device.download(target, source, other)
    other.synchronize()
    return target.tolist() == [1] * 8


def test_a_missing_event_gives_wrong_bytes():
    assert all(copied(seed, waits=True) for seed in range(40))
    assert not all(copied(seed, waits=False) for seed in range(40))


def test_a_copy_reads_its_source_late():
    device = FakeDevice(0)
    source, target = np.ones(8, np.uint8), device.message_buffer(8)
    device.upload(target, source, device.caller_stream())
    source[:] = 7
    assert target.get().tolist() == [7] * 8


def test_a_stream_that_is_stuck_is_found():
    device = FakeDevice(0)
    device.caller_stream().speed = 0
    with pytest.raises(RuntimeError, match="never happens"):
        device.caller_stream().synchronize()


def test_device_memory_is_no_host_memory_and_begins_as_nan():
    device = FakeDevice(0)
    for dtype in ("f2", "f4", "f8"):
        x = device.empty((2, 3), dtype)
        assert np.isnan(x.get()).all()
    with pytest.raises(TypeError, match="get"):
        np.asarray(x)
    with pytest.raises(TypeError):
        memoryview(x)
    assert not hasattr(x, "__dlpack__")
    assert (device.pinned(3) == 0xFF).all()


@pytest.mark.parametrize(("dtype", "columns"), [("u1", 3), ("f2", 3), ("f4", 2), ("c16", 1), (BFLOAT16, 4), ("f8", 0)])
@pytest.mark.parametrize("skipped", [0, 1])
def test_rows_are_copied_as_the_fake_copies_them(dtype, columns, skipped):
    """By the real device's method over CuPy's `take`, on words that are as wide as the memory is aligned."""
    fake, seen = FakeDevice(0), []

    def take(source, rows, axis, out):
        assert source.data.ptr % source.itemsize == out.data.ptr % source.itemsize == 0
        seen.append(source.itemsize)
        out.host[...] = np.take(source.host, rows, axis=axis)

    real = SimpleNamespace(_cupy=SimpleNamespace(take=take), array=lambda x: x)
    noise = np.random.default_rng(0).integers(0, 256, 6 * columns * np.dtype(dtype).itemsize, np.uint8)
    source = FakeArray(fake, noise.view(dtype).reshape(6, columns)[skipped:])
    rows = np.array([4, 0, 2, 4])
    targets = [fake.empty((4, columns), dtype) for _ in range(2)]
    Device.take_rows(real, targets[0], source, rows)
    fake.take_rows(targets[1], source, rows)
    assert targets[1].get().tobytes() == source.host[rows].tobytes() == targets[0].host.tobytes()
    assert seen == ([] if not columns else [math.gcd(8, columns * np.dtype(dtype).itemsize, source.data.ptr)])


def test_pages_are_locked_as_long_as_the_memory_is_there():
    """And unlocked before it goes, whatever CUDA says to that."""
    class Failure(Exception):
        pass

    locked = {}

    def unregister(address):
        assert ctypes.string_at(address, 1) == b"x"          # still mapped
        del locked[address]
        raise Failure

    runtime = SimpleNamespace(hostRegister=lambda address, nbytes, flags: locked.update({address: (nbytes, flags)}),
                              hostUnregister=unregister, CUDARuntimeError=Failure)
    cuda = SimpleNamespace(runtime=runtime, Device=lambda index: nullcontext())
    segment = Segment()
    segment.reserve(5000)
    Device.lock_pages(SimpleNamespace(_cupy=SimpleNamespace(cuda=cuda), index=0), segment.memory)
    assert locked == {segment.memory.ctypes.data: (8192, 1)}
    segment.memory[0] = ord("x")
    part = segment.memory[10:20]
    del segment
    assert locked
    del part
    assert not locked


@pytest.mark.parametrize("dtype", ["f4", "c16", BFLOAT16])
def test_an_array_is_made_contiguous_whatever_its_dtype(dtype):
    """CuPy is shown bfloat16 as bits, and there are no bits of 16 bytes."""
    fake = FakeDevice(0)
    cupy = SimpleNamespace(ascontiguousarray=lambda x: FakeArray(fake, np.ascontiguousarray(x.host)))
    x = FakeArray(fake, np.arange(6).reshape(2, 3).astype(dtype).T)
    got = Device.contiguous(SimpleNamespace(_cupy=cupy), x)
    assert got.dtype == dtype
    assert (got.host == x.host).all()
    assert got.flags.c_contiguous
    assert Device.contiguous(SimpleNamespace(), got) is got


def test_kernels_run_on_their_stream():
    device = FakeDevice(0)
    x, seen = device.empty((3,), "f4"), []
    x.fill(2)
    device.launch(lambda grid, block, shared, arguments: seen.append((grid, block, shared, arguments[0].host.sum())),
                  (1, 2), 32, 64, [x, np.int64(1)], device.caller_stream())
    assert not seen
    device.caller_stream().synchronize()
    assert seen == [((1, 2), 32, 64, 6.0)]


def test_arrays_can_do_what_the_library_asks():
    device = FakeDevice(0)
    slot = device.message_buffer(24)
    view = slot[8:24].view(np.dtype("f4")).reshape((2, 2))
    view[...] = np.arange(4).reshape(2, 2)
    other = device.empty((2, 2), "f4")
    other[...] = view
    assert isinstance(view, FakeArray)
    assert other.get().tolist() == [[0, 1], [2, 3]]
    assert (view.nbytes, view.shape, view.data.ptr) == (16, (2, 2), slot.data.ptr + 8)


# The transfers, with messages that are done when the test says so.

class FakeRequest:
    def __init__(self, finished=False):
        self.finished = finished

    def Test(self):
        return self.finished

    Get_status = Test


class Wire:
    """Takes messages; keeps what was in their buffers when they were started."""

    def __init__(self):
        self.requests, self.buffers, self.calls = [], [], []

    def post(self, buffer, call=None):
        self.requests.append(FakeRequest())
        self.buffers.append(buffer)
        self.calls.append(call)
        return self.requests[-1]

    @property
    def peer(self):
        return Peer(0, self.post, "for rank 0")


@pytest.fixture(autouse=True)
def _no_mpi(monkeypatch):
    library = SimpleNamespace(REQUEST_NULL=FakeRequest(True), Exception=OSError)
    for module in ("links", "staging"):
        monkeypatch.setattr(f"ringmpi.schedules.{module}.load", lambda: library)


def advance(transfer, times=400):
    for _ in range(times):
        transfer.advance()


def test_a_message_waits_for_its_event():
    device, wire = FakeDevice(0), Wire()
    device.caller_stream().speed = 0
    messages = DirectTransfer(chunks(device.message_buffer(10), 10, 4), wire.peer,
                              device.record(device.caller_stream()), "(why)")
    advance(messages)
    assert (messages.advance(), messages.done(), messages.waiting_for(), wire.buffers) == (False, False, "(why)", [])
    device.caller_stream().speed = 1
    advance(messages)
    assert (messages.advance(), messages.done(), messages.waiting_for()) == (True, False, "")
    assert [buffer.nbytes for buffer in wire.buffers] == [4, 4, 2]
    assert messages.requests == wire.requests
    for request in messages.requests:
        request.finished = True
    assert messages.done()


def test_chunks_on_their_way_out_are_as_many_as_there_are_buffers():
    """While the wire stands still, the others are copied; a buffer is used again when its message is done."""
    device, wire = FakeDevice(0), Wire()
    channel, slot = OutgoingChannel(device, [4] * 3, False), device.message_buffer(22)
    slot[...] = np.arange(22)
    device.caller_stream().synchronize()
    way = StagedSend(channel, chunks(slot, 22, 4), wire.peer)
    for sent in range(3, 7):
        advance(way)
        assert len(wire.requests) == sent
        assert [buffer.tolist() for buffer in wire.buffers[-3:]] == [
            list(range(4 * i, min(4 * i + 4, 22))) for i in range(sent - 3, sent)]
        assert not way.done()
        assert way.waiting_for() == ""
        wire.requests[sent - 3].finished = True
    for request in wire.requests:
        request.finished = True
    assert way.advance()
    assert way.done()


def test_chunks_on_their_way_in_are_as_many_as_there_are_buffers():
    """All buffers are open for messages at once; one is opened again when its bytes are in the slot."""
    device, wire = FakeDevice(0), Wire()
    channel, slot = IncomingChannel(device, [4] * 3, True), device.message_buffer(22)
    way = StagedReceive(channel, chunks(slot, 22, 4), wire.peer)
    way.advance()
    assert len(wire.requests) == 3
    channel.stream.speed = 0
    for chunk in range(3):
        wire.buffers[chunk][:] = range(4 * chunk, 4 * chunk + 4)
        wire.requests[chunk].finished = True
    advance(way)
    assert len(wire.requests) == 3
    assert way.waiting_for() == "(0 of 6 chunks copied in by this rank's GPU so far)"
    channel.stream.speed = 1
    advance(way)
    assert [buffer.nbytes for buffer in wire.buffers[3:]] == [4, 4, 2]
    assert slot.host[:12].tolist() == list(range(12))
    for chunk in range(3, 6):
        wire.buffers[chunk][:] = range(4 * chunk, min(4 * chunk + 4, 22))
        wire.requests[chunk].finished = True
    advance(way)
    assert way.done()
    assert slot.host.tolist() == list(range(22))


def test_shared_chunks_stay_until_they_are_stored():
    """Tokens alone are sent. A buffer is used again when the token `AHEAD` after its own has been asked for."""
    device, wire = FakeDevice(0), Wire()
    channel, slot = OutgoingChannel(device, [4] * 3, True), device.message_buffer(22)
    slot[...] = np.arange(22)
    device.caller_stream().synchronize()
    way = StagedSend(channel, chunks(slot, 22, 4), wire.peer, shared=True)
    for asked in range(AHEAD + 6):
        advance(way)
        assert len(wire.requests) == min(3 + max(asked - AHEAD, 0), 6) + (AHEAD if asked >= 3 + AHEAD else 0)
        assert not way.done()
        for chunk in range(max(asked - AHEAD, 0), min(3 + max(asked - AHEAD, 0), 6)):
            whole = range(4 * chunk, min(4 * chunk + 4, 22))
            assert channel.buffer(chunk, len(whole)).tolist() == list(whole)
        wire.requests[asked].finished = True
    assert way.advance()
    assert way.done()
    assert set(wire.calls) == {"Issend"}
    assert {buffer.nbytes for buffer in wire.buffers} == {48}


def test_shared_chunks_are_stored_from_where_their_tokens_say():
    """No more tokens are asked for than `AHEAD` of what is stored; the last ones are waited for."""
    device, there, back = FakeDevice(0), Wire(), Wire()
    out, slot = OutgoingChannel(device, [4] * 4, True), device.message_buffer(22)
    slot[...] = np.arange(22)
    device.caller_stream().synchronize()
    send = StagedSend(out, chunks(slot, 22, 4), there.peer, shared=True)
    channel, target = IncomingChannel(device, [4] * 4, False), device.message_buffer(22)
    way = StagedReceive(channel, chunks(target, 22, 4), back.peer, shared=True)
    for number in range(6 + AHEAD):
        advance(send)
        channel.stream.speed = 0
        advance(way)
        assert len(back.requests) == min(number + AHEAD, 6 + AHEAD)
        assert not way.done()
        back.buffers[number][:] = there.buffers[number]
        for wire in (there, back):
            wire.requests[number].finished = True
        advance(way)
        assert len(back.requests) == min(number + AHEAD, 6 + AHEAD)          # nothing is stored meanwhile
        channel.stream.speed = 1
        advance(way)
    advance(send)
    assert way.done()
    assert send.done()
    assert target.host.tolist() == list(range(22))


def test_locked_memory_is_used_again_once_it_is_given_back():
    """Larger ones take the place of smaller ones, here and where others have mapped them."""
    device = FakeDevice(0)
    memory = LockedMemory.of(device)
    assert LockedMemory.of(device) is memory
    first, second = memory.take(100), memory.take(5000)
    theirs = [memory.there(one.handle()) for one in (first, second)]
    assert all(memory.there(one.handle()) is x for one, x in zip((first, second), theirs, strict=True))
    assert sorted(device.locked.values()) == [4096, 4096, 8192, 8192]
    first.memory[7] = 7
    assert theirs[0][7] == 7
    theirs.clear()
    memory.give_back(first)
    assert memory.take(9000) is first
    assert memory.there(first.handle())[7] == 7
    assert sorted(device.locked.values()) == [8192, 8192, 12288, 12288]


def test_memory_that_is_under_way_is_not_used_again():
    """What a GPU may still write to after an error."""
    device, wire = FakeDevice(0), Wire()
    device.caller_stream().speed = 0
    link, memories = StagedLink(device, 4, [True]), []
    for size, sends in ((10, False), (22, True), (22, False)):
        link.reserve([size])
        memories.append(link._channels[1]._memory)
        if sends:
            link.send(0, [size], wire.peer)
            kept = link.cancel()
    assert np.shares_memory(memories[0], memories[1])        # of the channels that the link had before
    assert not np.shares_memory(memories[1], memories[2])
    kept.clear()


def test_transfers_of_one_direction_take_turns():
    """The second begins when the first is done, and waits for its own event."""
    device, wire = FakeDevice(0), Wire()
    channel, slots = OutgoingChannel(device, [4] * 2, False), [device.message_buffer(6) for _ in range(2)]
    ways = [StagedSend(channel, chunks(slot, 6, 4), wire.peer) for slot in slots]
    for way in (ways[0], ways[1], ways[0], ways[1]):
        advance(way)
    assert len(wire.requests) == 2
    assert ways[1].requests == []
    assert not ways[1].done()
    for request in wire.requests:
        request.finished = True
    for way in ways:
        advance(way)
    assert ways[0].done()
    assert len(wire.requests) == 4
    assert [buffer.nbytes for buffer in wire.buffers] == [4, 2, 4, 2]


def test_slots_and_staging_buffers_go_without_a_collector():
    """A cycle would keep a GPU's memory until Python collects it, and the larger ones would come on top."""
    device, wire = FakeDevice(0), Wire()
    link = StagedLink(device, chunk_bytes=4)
    link.reserve([10, 10])
    kept = [weakref.ref(x) for x in (*link._slots, *link._channels)]
    link.receive(1, [10], wire.peer)
    while not link.incoming[0].done():
        link.advance()
        for request in wire.requests:
            request.finished = True
    link.end_step()
    wire.buffers.clear()
    gc.disable()
    try:
        link.reserve([100, 100])
        assert [one() for one in kept] == [None] * 4
    finally:
        gc.enable()


def links_under_way():
    """Links of every kind with a block on its way in, and the wire it is on."""
    for kind in (HostLink, lambda: DirectLink(FakeDevice(0)), lambda: StagedLink(FakeDevice(0), chunk_bytes=4),
                 lambda: StagedLink(FakeDevice(0), 4, [False, True])):
        link, wire = kind(), Wire()
        link.reserve([22, 22])
        link.receive(1, [22], wire.peer)
        link.advance()
        yield link, wire


def test_what_is_under_way_is_kept_when_a_pass_is_abandoned():
    for link, wire in links_under_way():
        slots, way, channels = link._slots, link.incoming[0], getattr(link, "_channels", [])
        assert wire.requests
        assert all(any(request is one for one in way.requests) for request in wire.requests)
        kept = link.cancel()
        assert all(any(thing is one for one in kept) for thing in (slots, way, *channels))
        assert all(any(request is one for one in way.requests) for request in wire.requests)
        assert link.cancel() == link.transfers == link._slots == []


def test_buffers_stay_until_more_or_larger_ones_are_needed():
    for link, wire in links_under_way():
        for request in wire.requests:
            request.finished = True
        while not link.incoming[0].done():
            link.advance()
            for request in wire.requests:
                request.finished = True
        link.end_step()
        slots = list(link._slots)
        link.reserve([10])
        assert all(a is b for a, b in zip(link._slots, slots, strict=True))
        second = link._slots[1]
        link.reserve([100, 5, 3])
        assert [slot.nbytes for slot in link._slots] == [100, 22, 3]
        assert link._slots[1] is second
        assert link.cancel() == []


def test_a_step_ends_without_the_transfers_that_go_on():
    for link, wire in links_under_way():
        way = link.incoming[0]
        link.end_step()
        assert link.incoming == [way]
        assert wire.requests


def test_a_block_without_bytes_has_no_messages():
    device, wire = FakeDevice(0), Wire()
    empty = device.message_buffer(0)
    for way in (*(StagedSend(OutgoingChannel(device, [], shared), chunks(empty, 0, 4), wire.peer, shared=shared)
                  for shared in (False, True)),
                *(StagedReceive(IncomingChannel(device, [], not shared), chunks(empty, 0, 4), wire.peer, shared=shared)
                  for shared in (False, True)),
                DirectTransfer(chunks(empty, 0, 4), wire.peer)):
        assert way.advance()
        assert way.done()
    assert wire.requests == []


# What MPI says about CUDA.

class FakeInfo(dict):
    Get = dict.get

    def Free(self):
        self.clear()


def mpi_library(monkeypatch, vendor="Open MPI v5.0.11", kinds=None, old=None, new=None, **variables):
    """Put an MPI library in place that says `vendor`, memory kinds, and answers to the older and newer query."""
    for name in ("MPICH_GPU_SUPPORT_ENABLED", "I_MPI_OFFLOAD", "I_MPI_OFFLOAD_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    known = {"mpi_memory_alloc_kinds": kinds} if kinds else {}
    alone = SimpleNamespace(Get_info=lambda: FakeInfo(known))
    monkeypatch.setattr(transport, "load", lambda: SimpleNamespace(
        Get_library_version=lambda: vendor, COMM_SELF=alone, __file__="MPI.so"))
    symbols = {}
    if old is not None:
        symbols["MPIX_Query_cuda_support"] = lambda: old
    if new is not None:
        def query(kind, answer):
            assert kind == 0
            answer._obj.value = new
            return 0
        symbols["MPIX_GPU_query_support"] = query
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(**symbols))


CRAY = "MPI VERSION    : CRAY MPICH version 8.1.30.8 (ANL base 3.4a2)"
INTEL = "Intel(R) MPI Library 2021.14 for Linux* OS"

LIBRARIES = {
    "nothing to ask": ({}, False, "not known to be CUDA-aware: it has neither"),
    "kinds": ({"kinds": "mpi,system,cuda"}, True, "mpi_memory_alloc_kinds is mpi,system,cuda"),
    "kind of memory": ({"kinds": "mpi, cuda:device"}, True, "CUDA-aware"),
    "other kinds of memory": ({"kinds": "system,cuda:host,cuda:managed,rocm:device"}, False, "not known"),
    "kinds win": ({"kinds": "cuda", "old": 0, "new": 0}, True, "mpi_memory_alloc_kinds"),
    "no such kind, but a query": ({"kinds": "mpi,system", "new": 1}, True, "MPIX_GPU_query_support says yes"),
    "Open MPI": ({"old": 1}, True, "MPI is CUDA-aware: MPIX_Query_cuda_support says yes"),
    "Open MPI without": ({"old": 0}, False, "MPI is not CUDA-aware: MPIX_Query_cuda_support says no"),
    "MPICH": ({"vendor": "MPICH Version: 5.0", "old": 0, "new": 1}, True, "MPIX_GPU_query_support says yes"),
    "MPICH without": ({"vendor": "MPICH Version: 5.0", "old": 1, "new": 0}, False, "MPIX_GPU_query_support says no"),
    "Cray not told": ({"vendor": CRAY, "kinds": "cuda", "new": 1}, False, "MPICH_GPU_SUPPORT_ENABLED is not 1"),
    "Cray told no": ({"vendor": CRAY, "new": 1, "MPICH_GPU_SUPPORT_ENABLED": "0"}, False, "is not 1"),
    "Cray told": ({"vendor": CRAY, "new": 1, "MPICH_GPU_SUPPORT_ENABLED": "1"}, True, "query_support says yes"),
    "Cray told in vain": ({"vendor": CRAY, "new": 0, "MPICH_GPU_SUPPORT_ENABLED": "1"}, False, "says no"),
    "Cray told, silent": ({"vendor": CRAY, "MPICH_GPU_SUPPORT_ENABLED": "1"}, False, "not known"),
    "not Cray's": ({"MPICH_GPU_SUPPORT_ENABLED": "1"}, False, "not known"),
    "Intel not told": ({"vendor": INTEL, "old": 1}, False, "I_MPI_OFFLOAD is not set, I_MPI_OFFLOAD_MODE is not set"),
    "Intel told no": ({"vendor": INTEL, "I_MPI_OFFLOAD": "0", "I_MPI_OFFLOAD_MODE": "cuda"}, False, "not told"),
    "Intel told which?": ({"vendor": INTEL, "I_MPI_OFFLOAD": "1"}, False, "is 1, I_MPI_OFFLOAD_MODE is not"),
    "Intel told": ({"vendor": INTEL, "I_MPI_OFFLOAD": "1", "I_MPI_OFFLOAD_MODE": "cuda"}, True, "told to take CUDA"),
    "not Intel's": ({"I_MPI_OFFLOAD": "1", "I_MPI_OFFLOAD_MODE": "cuda"}, False, "not known"),
}


@pytest.mark.parametrize("case", LIBRARIES)
def test_only_a_proof_counts(monkeypatch, case):
    options, proven, text = LIBRARIES[case]
    mpi_library(monkeypatch, **options)
    assert cuda_awareness()[0] is proven
    assert text in cuda_awareness()[1]


def test_a_query_that_fails_is_no_proof(monkeypatch):
    mpi_library(monkeypatch)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(MPIX_GPU_query_support=lambda kind, answer: 5))
    assert not cuda_awareness()[0]


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, None), ({"SLURM_LOCALID": "3"}, 3), ({"MPI_LOCALRANKID": "2"}, 2), ({"PMI_LOCAL_RANK": "x"}, None),
    ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 1), ({"MV2_COMM_WORLD_LOCAL_RANK": "5"}, 5)])
def test_the_launchers_local_rank(monkeypatch, variables, expected):
    for name in environment.LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.launched_local_rank() == expected
