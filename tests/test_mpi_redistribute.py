"""`redistribute` there and back is the identity, on GPUs too, which are lazy fakes. Runs under mpiexec."""

import itertools
import re

import numpy as np
import pytest
from fake_device import FakeArray, FakeDevice
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ringmpi import BackendError, Contiguous, Custom, OptionError, RingError, ShapeError, device, redistribute
from ringmpi.dtypes import DTYPES
from ringmpi.layout import make
from ringmpi.mpi.exchange import Exchange
from ringmpi.mpi.waiting import stranded
from ringmpi.schedules.device_links import DeviceLink

pytestmark = pytest.mark.mpi
TRANSPORTS = ("direct", "staged")


@st.composite
def layouts(draw, length, size):
    kind = draw(st.sampled_from(["contiguous", "uneven", "striped", "zigzag", "custom"]))
    seed = draw(st.integers(0, 99))
    owner = np.random.default_rng(seed).integers(0, size, length)
    if kind == "custom":
        return Custom([np.flatnonzero(owner == rank) for rank in range(size)])
    if kind == "uneven":
        return Contiguous(np.bincount(owner, minlength=size))
    return draw(st.sampled_from([kind, make(kind, length, size)]))


def said(comm, call):
    """What a call raises on each rank."""
    try:
        call()
    except RingError as error:
        return comm.allgather(f"{type(error).__name__}: {error}")
    return comm.allgather("no error")


@pytest.fixture(scope="module")
def gpu(comm):
    """A lazy device for each rank, in place of its GPU; chunks are so small that there are many."""
    patch = pytest.MonkeyPatch()
    made = FakeDevice(comm.rank)
    patch.setattr("ringmpi.mpi.pace.LONGEST_PAUSE", 2e-5)
    patch.setattr("ringmpi.schedules.device_links.CHUNK_BYTES", 50)
    patch.setattr(device, "reason_missing", lambda: None)
    patch.setattr(device, "view", lambda x: x)
    patch.setattr(device, "index_of", lambda x: 0)
    patch.setattr(device, "open_device", lambda index: made)
    yield made
    patch.undo()


def placed(gpu, x):
    """Have `x` on the GPU some time; a transposed array stays one."""
    array = FakeArray(gpu, np.zeros_like(x))
    array[...] = x
    return array


@settings(deadline=None, max_examples=40, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_there_and_back(comm, data):
    length = data.draw(st.integers(0, 50))
    source, target = (data.draw(layouts(length, comm.size)) for _ in range(2))
    dtype = data.draw(st.sampled_from([*DTYPES.values(), np.dtype("u1"), np.dtype("i8,f4")]))
    shape = data.draw(st.sampled_from([(), (3,), (2, 5), (0, 4)]))
    noise = np.random.default_rng(length).integers(0, 255, (length, *shape, dtype.itemsize), np.uint8)
    whole = noise.view(dtype)[..., 0]
    old, new = (make(x, length, comm.size) for x in (source, target))
    shard = whole[old.positions(comm.rank)]
    there = redistribute(shard, comm=comm, source=source, target=target)
    assert there.dtype == dtype
    assert there.tobytes() == whole[new.positions(comm.rank)].tobytes()
    back = redistribute(there, comm=comm, source=new, target=old)
    assert back.tobytes() == shard.tobytes()


def test_bad_input_is_the_same_error_everywhere(comm):
    with pytest.raises(OptionError, match="layout: expected one of"):
        redistribute(np.zeros(4), comm=comm, target="spiral")
    with pytest.raises(OptionError, match=f"over {comm.size} ranks"):
        redistribute(np.zeros(4), comm=comm, target=make("striped", 5, comm.size))
    with pytest.raises(ShapeError, match="fixed size"):
        redistribute(np.array([None] * 3), comm=comm)
    with pytest.raises(ShapeError, match="scalar"):
        redistribute(np.float64(3), comm=comm)
    if comm.size > 1:
        with pytest.raises(ShapeError, match="rank 0: the striped layout"):
            redistribute(np.zeros((5 + (comm.rank == 0) * 9, 2)), comm=comm, source="striped", target="zigzag")
        with pytest.raises(OptionError, match=r"dtype of x is float32 here and float64 on rank 0"):
            redistribute(np.zeros(3, "f8" if comm.rank == 0 else "f4"), comm=comm)
        with pytest.raises(OptionError, match="target is zigzag here and striped on rank 0"):
            redistribute(np.zeros(3), comm=comm, target="striped" if comm.rank == 0 else "zigzag")
    assert len(redistribute(np.arange(3), comm=comm)) == 3


@pytest.mark.parametrize("transport", TRANSPORTS)
@settings(deadline=None, max_examples=15, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_there_and_back_on_gpus(comm, gpu, transport, data):
    length = data.draw(st.integers(0, 50))
    source, target = (data.draw(layouts(length, comm.size)) for _ in range(2))
    dtype = data.draw(st.sampled_from([*DTYPES.values(), np.dtype("u1"), np.dtype("?"), np.dtype("c16")]))
    shape = data.draw(st.sampled_from([(), (3,), (2, 5), (0, 4)]))
    noise = np.random.default_rng(length).integers(0, 255, (length, *shape, dtype.itemsize), np.uint8)
    whole = noise.view(dtype)[..., 0]
    old, new = (make(x, length, comm.size) for x in (source, target))
    shard = whole[old.positions(comm.rank)]
    options = {"comm": comm, "timeout": 60, "gpu_transport": transport}
    there = redistribute(placed(gpu, shard), source=source, target=target, **options)
    waiting = sum(len(stream.queue) for stream in gpu.streams) if old != new else 0
    back = redistribute(there, source=new, target=old, **options)
    assert isinstance(there, FakeArray)
    assert there.dtype == dtype
    assert waiting == 0                        # all was done when the call returned
    assert there.get().tobytes() == whole[new.positions(comm.rank)].tobytes()
    assert back.get().tobytes() == shard.tobytes()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_is_not_contiguous(comm, gpu, transport):
    whole = np.random.default_rng(0).integers(0, 2**15, (5, 4 * comm.size), np.int16).view(DTYPES["bfloat16"])
    mine = whole[:, 4 * comm.rank:4 * comm.rank + 4].T
    there = redistribute(placed(gpu, mine), comm=comm, gpu_transport=transport)
    assert there.get().tobytes() == whole.T[comm.rank::comm.size].tobytes()


def test_equal_layouts_give_the_array_itself(comm, gpu):
    x = placed(gpu, np.arange(4 + comm.rank))
    same = redistribute(x, comm=comm, target=Contiguous([4 + rank for rank in range(comm.size)]))
    assert same is x


def test_how_gpus_exchange_is_agreed_on_once(comm, gpu, monkeypatch):
    if comm.size == 1:
        pytest.skip("one rank exchanges nothing")
    counted = itertools.count()
    original = Exchange._allgather
    monkeypatch.setattr(Exchange, "_allgather", lambda *x: (next(counted), original(*x))[1])
    for request in ("auto", "staged"):
        redistribute(placed(gpu, np.arange(4)), comm=comm, gpu_transport=request)
        start = next(counted)
        redistribute(placed(gpu, np.arange(4)), comm=comm, gpu_transport=request)
        assert next(counted) - start - 1 == 3


def test_gpus_that_do_not_agree(comm, gpu):
    last = comm.size - 1
    x, there = np.arange(4), placed(gpu, np.arange(4))
    if last:
        outcomes = said(comm, lambda: redistribute(there if comm.rank == last else x, comm=comm))
        assert len(set(outcomes)) == 1
        assert f"OptionError: rank {last}: expected the same options" in outcomes[0]
        assert "place of x is a GPU here and the host on rank 0" in outcomes[0]
        outcomes = said(comm, lambda: redistribute(there, comm=comm, gpu_transport=TRANSPORTS[comm.rank == last]))
        assert set(outcomes) == {f"OptionError: rank {last}: expected the same options on every rank, and calls in the "
                                 "same order; gpu_transport is staged here and direct on rank 0"}
    outcomes = said(comm, lambda: redistribute(there, comm=comm, gpu_transport="pigeon"))
    assert len(set(outcomes)) == 1
    assert "OptionError: rank 0: gpu_transport: expected one of auto, direct, staged, got 'pigeon'" in outcomes[0]


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("kind", [MemoryError, BackendError])
def test_a_gpu_that_fails_on_one_rank_is_an_error_on_all(comm, gpu, monkeypatch, call, kind):
    """Of three copies of rows, the first two pack, and the last unpacks."""
    calls = itertools.count(1)
    original = gpu.take_rows

    def fail(*arguments):
        if next(calls) == call:
            raise kind("none is left")
        original(*arguments)
    last = comm.size - 1
    there = placed(gpu, np.arange(4))
    if comm.rank == last:
        monkeypatch.setattr(gpu, "take_rows", fail)
    outcomes = said(comm, lambda: redistribute(there, comm=comm))
    monkeypatch.undo()
    text = {MemoryError: "ResourceError: rank {}: out of memory: none is left",
            BackendError: "BackendError: rank {}: none is left"}[kind].format(last)
    assert set(outcomes) == {text}
    moved = redistribute(there, comm=comm)             # nobody was left in it
    assert (moved.get() == np.arange(4 * comm.size)[comm.rank::comm.size] % 4).all()


def test_a_gpu_that_fails_at_the_end_is_an_error_on_all(comm, gpu, monkeypatch):
    class Failed:
        @property
        def done(self):
            raise BackendError("the GPU failed: no more")

    last = comm.size - 1
    there = placed(gpu, np.arange(2 * comm.size))
    if comm.rank == last:
        records = itertools.count(1)               # one for each message, and one at the end
        original = gpu.record
        monkeypatch.setattr(gpu, "record", lambda stream: Failed() if next(records) == comm.size else original(stream))
    outcomes = said(comm, lambda: redistribute(there, comm=comm, gpu_transport="direct"))
    monkeypatch.undo()
    assert set(outcomes) == {f"BackendError: rank {last}: the GPU failed: no more"}
    assert len(redistribute(there, comm=comm)) == 2 * comm.size


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_gpu_that_is_stuck_is_an_error_in_time_and_says_so(comm, gpu, monkeypatch, transport):
    """On rank 0 nothing on the caller's stream comes about any more."""
    mine = comm.Dup()
    x = placed(gpu, np.arange(24.0))
    with gpu.new_stream() as stream:
        stream.speed = 1.0 if comm.rank else 0.0
        outcomes = said(comm, lambda: redistribute(x, comm=mine, timeout=0.5, gpu_transport=transport))
    if comm.size == 1:
        assert re.match("RingTimeout: .*redistribute: waited for this rank's GPU to put rows in order", outcomes[0])
        assert any(isinstance(kept, DeviceLink) for kept in stranded())
        return
    nbytes = 8 * len(range(1, 24, comm.size))
    obstacle = {"direct": r"\(not sent yet: this rank's GPU still writes the buffer\)",
                "staged": rf"\(0 of {-(-nbytes // 50)} chunks copied out by this rank's GPU so far\)"}[transport]
    assert all(outcome.startswith(("RingTimeout", "RankLost")) for outcome in outcomes), outcomes
    assert re.search(f"redistribute: waited .*for rank 1 to take {nbytes} bytes {obstacle}", outcomes[0]), outcomes
