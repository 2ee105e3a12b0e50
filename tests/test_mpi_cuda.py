"""The CUDA backend on this run's ranks, over lazy devices that run the real kernels on the CPU. Runs under mpiexec."""

import json

import numpy as np
import oracle
import pytest
from cases import make_layout, make_mask
from emulate import EmulatedDevice
from fake_device import FakeArray
from foreign import CUDA, cuda_tensor
from mpi4py import MPI
from oracle import random_qkv
from test_library import on_cpu

from ringmpi import (
    BackendError,
    Contiguous,
    Grid,
    KVCache,
    Mask,
    OptionError,
    RingAttention,
    Schedule,
    analysis,
    device,
    redistribute,
    ring_attention,
)
from ringmpi.backends.cuda import library
from ringmpi.dtypes import DTYPES, TENSOR_TOLERANCE
from ringmpi.files.hdf5 import create_dataset, write_file, write_rows
from ringmpi.files.shards import read_manifest
from ringmpi.job.attend import attend
from ringmpi.job.audit import audit
from ringmpi.job.options import Options
from ringmpi.job.report import RecordPaths
from ringmpi.schedules.gpu_transport import cuda_awareness
from ringmpi.schedules.shared_memory import LockedMemory
from ringmpi.schedules.spec import NAMES
from ringmpi.score import dropout_keys

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", params=["emulated", pytest.param("real", marks=pytest.mark.gpu)])
def made(request, comm):
    """A GPU of its own for each rank, emulated; with `-m gpu` the first real one for all."""
    return EmulatedDevice(seed=comm.rank) if request.param == "emulated" else device.open_device(0)


@pytest.fixture
def gpu(monkeypatch, made):
    monkeypatch.setattr("ringmpi.schedules.device_links.CHUNK_BYTES", 5000)
    if not isinstance(made, EmulatedDevice):
        return made
    monkeypatch.setattr(device, "reason_missing", lambda: None)
    monkeypatch.setattr(device, "count", lambda: 8)
    monkeypatch.setattr(device, "view", lambda x: x)
    monkeypatch.setattr(device, "index_of", lambda x: 3)
    monkeypatch.setattr(device, "open_device", lambda index: made)
    return made


@pytest.fixture
def emulated(gpu):
    if not isinstance(gpu, EmulatedDevice):
        pytest.skip("of emulated GPUs only")
    return gpu


def check(comm, gpu, dtype, layout, mask, transport, on_gpu, length=151, seed=0, schedule="ring", shares=True):
    q, k, v = random_qkv(seed, length, length, 4, 2, 16, 16, dtype)
    spec = make_layout(layout, length, comm.size)
    mine = spec.positions(comm.rank)
    arrays = [x[mine] for x in (q, k, v)]
    options = {"mask": Mask(**make_mask(mask, length)), "backend": "auto" if on_gpu else "cuda", "timeout": 100,
               "layout": layout if layout in ("striped", "zigzag") else spec, "gpu_transport": transport,
               "allow_gpu_sharing": not isinstance(gpu, EmulatedDevice), "schedule": schedule}
    with RingAttention(comm, **options) as attention:
        for _ in range(2):                     # the second in the same buffers
            given = [gpu.array(x) for x in arrays] if on_gpu else arrays
            out, lse = attention(*given, return_lse=True)
            there = isinstance(out, np.ndarray)
            out, lse = (x.get() if on_gpu else x for x in (out, lse))
        used, gpus, pairs = attention.transport, attention.gpus, comm.allreduce(attention.trace.pairs)
        sharing = attention.schedule.heads
        name = attention.backend.name
    expected = comm.allgather(gpu.uuid)
    all_see = oracle.visible(length, length, **make_mask(mask, length))
    see = all_see[mine]
    want, want_lse = oracle.attend(q[mine], k, v, see, 0.25)
    unit = comm.allreduce(np.abs(want).max(initial=0.0), max) or 1.0
    assert out.dtype == q.dtype
    assert there is not on_gpu
    assert oracle.error(out, want, unit) <= TENSOR_TOLERANCE[dtype]
    assert oracle.error(lse, want_lse) <= (1e-13 if dtype == "float64" else 2e-6)
    assert pairs == all_see.sum() * sharing
    assert used.name == transport
    assert used.shares_memory is (shares and transport == "staged" and comm.size > 1)
    assert gpus == expected
    assert name == "cuda"


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_call_that_is_left_and_gone_on_with(comm, gpu, folder, dtype, on_gpu):
    """The same bits; other layouts are refused."""
    q, k, v = random_qkv(0, 151, 151, 4, 2, 16, 16, dtype)
    mine = make_layout("striped", 151, comm.size).positions(comm.rank)
    arrays = [gpu.array(x[mine]) if on_gpu else x[mine] for x in (q, k, v)]
    options = {"mask": Mask(causal=True), "backend": "auto" if on_gpu else "cuda", "timeout": 100, "schedule": "ring",
               "layout": "striped", "allow_gpu_sharing": not isinstance(gpu, EmulatedDevice)}
    with RingAttention(comm, **options) as attention:
        want = attention(*arrays)
        assert attention(*arrays, stop=lambda: comm.rank == 0) is None
        attention.save(folder / "c")
    with RingAttention.restore(folder / "c", comm, **options) as attention:
        got = attention(*arrays)
    got, want = (x.get() if on_gpu else x for x in (got, want))
    assert got.tobytes() == want.tobytes()
    other = make_layout("zigzag", 151, comm.size).positions(comm.rank)
    arrays = [gpu.array(x[other]) if on_gpu else x[other] for x in (q, k, v)]
    if comm.size > 1:
        with RingAttention.restore(folder / "c", comm, **options | {"layout": "zigzag"}) as attention, pytest.raises(
                OptionError, match=r"on GPUs expected the ranks that wrote the checkpoint.*layout is striped there"):
            attention(*arrays)


def skip_unless_mpi_takes(gpu, transport):
    if transport == "direct" and not isinstance(gpu, EmulatedDevice) and not cuda_awareness()[0]:
        pytest.skip(cuda_awareness()[1])


def skip_unless_heads_divide(comm, schedule):
    if schedule == "heads" and 4 % comm.size:
        pytest.skip("the ranks do not divide the heads")


@pytest.mark.parametrize("transport", ["direct", "staged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_transports_with_every_dtype(comm, gpu, dtype, transport):
    skip_unless_mpi_takes(gpu, transport)
    check(comm, gpu, dtype, "striped", "causal", transport, on_gpu=True)


def test_chunks_are_messages_where_a_rank_cannot_lock_the_pages_of_others(comm, gpu, monkeypatch):
    def fail(_):
        raise BackendError("cudaErrorNotSupported")

    if comm.rank == comm.size - 1:
        monkeypatch.setattr(gpu, "lock_pages", fail)
    monkeypatch.delitem(gpu.cache, LockedMemory, raising=False)      # what was locked before
    mine = comm.Dup()
    check(mine, gpu, "bfloat16", "striped", "causal", "staged", on_gpu=True, shares=False)
    mine.Free()


@pytest.mark.parametrize("layout", ["contiguous", "uneven", "empty", "zigzag", "custom"])
@pytest.mark.parametrize("mask", ["full", "documents", "all"])
def test_layouts_and_masks(comm, gpu, layout, mask):
    transport = "staged" if mask == "all" or not isinstance(gpu, EmulatedDevice) else "direct"
    check(comm, gpu, "bfloat16", layout, mask, transport, on_gpu=layout != "uneven", seed=1)


@pytest.mark.parametrize("transport", ["direct", "staged"])
@pytest.mark.parametrize(("layout", "mask", "schedule"), [
    ("empty", "causal", "gather"), ("zigzag", "window", "gather"), ("striped", "causal", "queries"),
    ("uneven", "documents", "heads"), ("zigzag", "causal", "mesh")])
def test_other_schedules(comm, gpu, layout, mask, transport, schedule):
    skip_unless_mpi_takes(gpu, transport)
    skip_unless_heads_divide(comm, schedule)
    check(comm, gpu, "float32", layout, mask, transport, on_gpu=True, schedule=schedule)


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_queries_that_all_ranks_have(comm, gpu, dtype, on_gpu):
    """By a call, forward and backward, and by a cache, in steps and sharded; with sinks, in units of the GPU's own."""
    q, k, v = random_qkv(8, 40, 40, 4, 2, 16, 16, dtype)
    sinks = np.array([0.5, -1, 2, 0], "f4")
    there = (lambda x: gpu.array(np.ascontiguousarray(x))) if on_gpu else lambda x: x
    back = (lambda x: x.get()) if on_gpu else lambda x: x
    spec = make_layout("zigzag", 40, comm.size)
    mine = spec.positions(comm.rank)
    last = slice(38, 40)
    see = oracle.visible(40, 40, causal=True)
    sharing = not isinstance(gpu, EmulatedDevice)
    want = oracle.dense(q[last], k, v, see[last], 0.25, sinks=sinks, dout=q[last])
    bound = {"float32": 5e-6, "bfloat16": 2.0**-6}[dtype]
    with RingAttention(comm, layout="replicated", kv_layout=spec, mask=Mask(causal=True), backend="cuda", timeout=100,
                       gpu_transport="staged", allow_gpu_sharing=sharing) as attention:
        out, lse = attention(*map(there, (q[last], k[mine], v[mine])), sinks=sinks, return_lse=True)
        dq, dk, dv, _ = attention.backward(there(q[last]))
    for x, name, rows in ((out, "out", slice(None)), (dq, "dq", slice(None)), (dk, "dk", mine), (dv, "dv", mine)):
        assert oracle.error(back(x), want[name][rows], np.abs(want[name]).max()) <= bound, name
    assert oracle.error(back(lse), want["lse"]) <= 2e-6
    with KVCache(comm, kv_heads=2, dim=16, dtype=dtype, backend="cuda", timeout=100,
                 allow_gpu_sharing=sharing) as cache:
        prompt = make_layout("striped", 38, comm.size).positions(comm.rank)
        cache.append(there(k[prompt]), there(v[prompt]), layout="striped")
        out = cache.attend(there(q[prompt]), sharded=True, layout="striped")
        rows, _ = oracle.attend(q[prompt], k, v, see[prompt], 0.25)
        assert oracle.error(back(out), rows, np.abs(rows).max(initial=0) or 1.0) <= bound
        out, lse = cache.attend(*map(there, (q[last], k[last], v[last])), sinks=sinks, return_lse=True)
        assert isinstance(out, np.ndarray) is not on_gpu
    assert oracle.error(back(out), want["out"], np.abs(want["out"]).max()) <= bound
    assert oracle.error(back(lse), want["lse"]) <= 2e-6


@pytest.mark.parametrize("on_gpu", [True, False])
def test_queries_that_should_be_the_same(comm, gpu, on_gpu):
    """On GPUs too: by calls, their gradients, and caches."""
    if comm.size == 1:
        pytest.skip("takes two")
    odd = comm.rank == comm.size - 1
    there = gpu.array if on_gpu else lambda x: x
    x = np.ones((2, 2, 16), "f4")
    q, k, wrong = there(x), there(x), there(x + odd)
    sharing = not isinstance(gpu, EmulatedDevice)
    with RingAttention(comm, layout="replicated", backend="cuda", timeout=100, gpu_transport="staged",
                       allow_gpu_sharing=sharing) as attention:
        assert "the same queries and sinks" in everywhere(comm, lambda: attention(wrong, k, k))
        attention(q, k, k)
        assert "the same dout, dlse, out and lse" in everywhere(comm, lambda: attention.backward(wrong))
    with KVCache(comm, kv_heads=2, dim=16, backend="cuda", timeout=100, allow_gpu_sharing=sharing) as cache:
        assert "k (checksum)" in everywhere(comm, lambda: cache.append(wrong, k, replicated=True))
        cache.append(k, k, replicated=True)
        assert "q (checksum)" in everywhere(comm, lambda: cache.attend(wrong))


def test_a_cache_of_a_batch(comm, gpu, monkeypatch, folder):
    """In several chunks and pieces, and more queries than at a time: what a cache on the host gives."""
    path = str(folder / "cache.h5")
    monkeypatch.setattr("ringmpi.kv.prompt.PIECE_BYTES", 2**13)
    monkeypatch.setattr("ringmpi.kv.store.PIECE_BYTES", 2**12)
    monkeypatch.setattr("ringmpi.kv.saving.BLOCK_BYTES", 2**13)
    monkeypatch.setattr("ringmpi.kv.steps.STATE_BYTES", 2**14)
    monkeypatch.setattr("ringmpi.kv.contents.ROOM", 20)
    q, k, v = (np.stack([x, 2 * x]) for x in random_qkv(12, 120, 120, 4, 2, 16, 16, "float32"))
    last = make_layout("striped", 30, comm.size).positions(comm.rank) + 90
    results = {}
    for backend, there, back in (("numpy", lambda x: x, lambda x: x), ("cuda", gpu.array, lambda x: x.get())):
        options = {"backend": backend, "timeout": 100, "allow_gpu_sharing": not isinstance(gpu, EmulatedDevice)}
        with KVCache(comm, kv_heads=2, dim=16, batch=2, **options) as cache:
            for at in range(0, 120, 40):
                cache.append(*(there(np.ascontiguousarray(x[:, at:at + 40])) for x in (k, v)), replicated=True)
            cache.reorder([1, 0])
            cache.save(path, force=True)
        with KVCache.open(path, comm, **options) as cache:
            results[backend] = [back(cache.attend(there(np.ascontiguousarray(q[:, 90:])))),
                                back(cache.attend(there(np.ascontiguousarray(q[:, last])), sharded=True,
                                                  layout="striped"))]
    for want, got in zip(*results.values(), strict=True):
        assert oracle.error(got, want, np.abs(want).max(initial=0) or 1.0) <= TENSOR_TOLERANCE["float32"]


@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_few_tokens(comm, gpu, length):
    check(comm, gpu, "float32", "contiguous", "causal", "staged", on_gpu=False, length=length)


def test_a_batch(comm, gpu):
    q, k, v = random_qkv(2, 60, 60, 4, 2, 16, 16, "float32")
    mine = make_layout("contiguous", 30, comm.size).positions(comm.rank)
    batch = [np.stack((x[:30], x[30:]))[:, mine] for x in (q, k, v)]
    out = ring_attention(*(gpu.array(x) for x in batch), comm=comm, timeout=100, allow_gpu_sharing=True).get()
    for got, rows in zip(out, (slice(0, 30), slice(30, 60)), strict=True):
        want, _ = oracle.attend(q[rows][mine], k[rows], v[rows], np.ones((len(mine), 30), bool), 0.25)
        assert oracle.error(got, want, np.abs(q).max()) <= 2e-6


@pytest.mark.parametrize(("dtype", "layout", "mask", "transport", "function", "on_gpu", "schedule"), [
    ("float64", "striped", "causal", "direct", "plain", True, "ring"),
    ("float32", "contiguous", "causal", "staged", "all", False, "ring"),
    ("bfloat16", "empty", "documents", "direct", "softcap", False, "gather"),
    ("float16", "zigzag", "all", "staged", "dropout", True, "ring"),
    ("float32", "custom", "full", "direct", "sinks", True, "ring"),
    ("float64", "uneven", "first", "staged", "alibi", True, "gather"),
    ("float32", "striped", "causal", "direct", "all", True, "queries"),
    ("bfloat16", "zigzag", "causal", "staged", "plain", True, "heads"),
    ("float32", "striped", "causal", "direct", "plain", True, "broadcast"),
    ("bfloat16", "contiguous", "causal", "staged", "sinks", False, "broadcast")])
def test_gradients(comm, gpu, dtype, layout, mask, transport, function, on_gpu, schedule):
    """Twice, in the same buffers; on a batch of two."""
    skip_unless_mpi_takes(gpu, transport)
    skip_unless_heads_divide(comm, schedule)
    n, heads = 83, 4
    spec, sees = make_layout(layout, n, comm.size), make_mask(mask, n)
    mine = spec.positions(comm.rank)
    cases = [random_qkv(seed, n, n, heads, 2, 16, 24, dtype) for seed in (4, 5)]
    rng = np.random.default_rng(6)
    dout = rng.standard_normal((2, n, heads, 24)).astype(DTYPES[dtype])
    dlse = rng.standard_normal((2, n, heads)).astype("f8" if dtype == "float64" else "f4")
    score, sinks = oracle.functions(function, heads, np.arange(n), np.arange(n))
    options = {"mask": Mask(**sees), "backend": "auto" if on_gpu else "cuda", "timeout": 100,
               "layout": layout if layout in ("striped", "zigzag") else spec, "gpu_transport": transport,
               "allow_gpu_sharing": not isinstance(gpu, EmulatedDevice), "softcap": score.get("softcap"),
               "alibi": score.get("slopes"), "dropout": score.get("dropout", 0.0),
               "schedule": schedule if schedule in NAMES else Schedule(keys=comm.size, carrier=schedule)}
    there = gpu.array if on_gpu else lambda x: x
    q, k, v, dout_, dlse_ = (there(np.ascontiguousarray(x[:, mine])) for x in
                             (*(np.stack(x) for x in zip(*cases, strict=True)), dout, dlse))
    with RingAttention(comm, **options) as attention:
        for _ in range(2):
            attention(q, k, v, sinks=sinks, seed=9)
            got = attention.backward(dout_, dlse_)
        kinds = [type(x) for x in got[:3]]
    got = [x.get() if on_gpu else x for x in got[:3]] + [comm.allreduce(x) for x in got[3:]]
    bound = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 2.0**-6, "float16": 2.0**-9}[dtype]
    see, dsinks = oracle.visible(n, n, **sees), 0.0
    for number, arrays in enumerate(cases):
        if "dropout_keys" in score:
            score["dropout_keys"] = dropout_keys(9, 2, heads)[number]
        want = oracle.dense(*arrays, see, 0.25, dout=dout[number], dlse=dlse[number], sinks=sinks, **score)
        dsinks = dsinks + want["dsinks"]
        for x, name in zip(got, ("dq", "dk", "dv"), strict=False):
            assert x.dtype == DTYPES[dtype]
            assert oracle.error(x[number], want[name][mine], np.abs(want[name]).max()) <= bound, name
    assert all((kind is np.ndarray) is not on_gpu for kind in kinds)
    if sinks is not None:
        assert oracle.error(got[3], dsinks) <= bound


@pytest.mark.parametrize(("dtype", "layout", "transport", "kind", "on_gpu", "bias_there", "schedule"), [
    ("float32", "striped", "direct", "left out by head", True, True, "ring"),
    ("bfloat16", "empty", "staged", "all and left out by head", False, False, "gather"),
    ("float32", "zigzag", "staged", "left out", True, False, "queries"),
    ("bfloat16", "contiguous", "direct", "bias by head", True, True, "heads"),
    ("float64", "uneven", "staged", "bias", True, True, "two-way")])
def test_a_bias_of_the_keys(comm, gpu, dtype, layout, transport, kind, on_gpu, bias_there, schedule):
    """On the host or beside the keys; twice, in the same buffers, on a batch of two, with NaN in what is left out."""
    skip_unless_mpi_takes(gpu, transport)
    skip_unless_heads_divide(comm, schedule)
    n, heads = 61, 4
    spec = make_layout(layout, n, comm.size)
    mine = spec.positions(comm.rank)
    cases = [random_qkv(seed, n, n, heads, 2, 16, 16, dtype) for seed in (4, 5)]
    scores = [oracle.functions(kind, heads, np.arange(n), np.arange(n), seed) for seed in (4, 5)]
    sinks = scores[0][1]
    bias = np.stack([score["key_bias"] for score, _ in scores])
    bias[:, :5] = -np.inf
    dout = np.random.default_rng(6).standard_normal((2, n, heads, 16)).astype(DTYPES[dtype])
    want = [oracle.dense(*arrays, oracle.visible(n, n, causal=True), 0.25, dout=dout[i], sinks=sinks, **score | {
        "key_bias": bias[i]} | ({"dropout_keys": dropout_keys(9, 2, heads)[i]} if "dropout" in score else {}))
        for i, (arrays, (score, _)) in enumerate(zip(cases, scores, strict=True))]
    for (_, k, v), of_keys in zip(cases, bias, strict=True):
        left_out = np.isneginf(of_keys).all(axis=1)
        k[left_out], v[left_out] = np.nan, np.inf
    score = scores[0][0]
    options = {"mask": Mask(causal=True), "backend": "auto" if on_gpu else "cuda", "timeout": 100,
               "layout": layout if layout in ("striped", "zigzag") else spec, "gpu_transport": transport,
               "allow_gpu_sharing": not isinstance(gpu, EmulatedDevice), "softcap": score.get("softcap"),
               "alibi": score.get("slopes"), "dropout": score.get("dropout", 0.0),
               "schedule": schedule if schedule in NAMES else Schedule(keys=comm.size, carrier=schedule)}
    there = gpu.array if on_gpu else lambda x: x
    q, k, v, dout_ = (there(np.ascontiguousarray(x[:, mine])) for x in
                      (*(np.stack(x) for x in zip(*cases, strict=True)), dout))
    given = bias[:, mine, 0] if bias.shape[2] == 1 else bias[:, mine]
    given = gpu.array(np.ascontiguousarray(given)) if bias_there else given
    with RingAttention(comm, **options) as attention:
        for _ in range(2):
            out, lse = attention(q, k, v, sinks=sinks, key_bias=given, seed=9, return_lse=True)
            got = attention.backward(dout_)
        again = attention.backward_of(dout_, q, k, v, out, lse, sinks=sinks, key_bias=given, seed=9)
    assert isinstance(got.dkey_bias, np.ndarray) is not on_gpu
    assert got.dkey_bias.shape == given.shape
    got = {"out": out, "lse": lse, **got._asdict()}
    bound = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 2.0**-6}[dtype]
    for name, x in got.items():
        x = x.get() if on_gpu and name != "dsinks" else x
        if name == "dsinks":
            assert oracle.error(comm.allreduce(x), want[0][name] + want[1][name]) <= bound
            continue
        for i in (0, 1):
            exact = want[i][name][mine].reshape(x[i].shape)
            unit = max(np.abs(np.where(np.isfinite(want[i][name]), want[i][name], 0)).max(), 1e-300)
            assert oracle.error(x[i], exact, unit) <= (2e-6 if name == "lse" else bound), name
    for name, x in again._asdict().items():
        assert (x == got[name] if name == "dsinks" or not on_gpu else x.get() == got[name].get()).all(), name


@pytest.mark.parametrize(("dtype", "layout", "transport", "on_gpu", "schedule"), [
    ("float32", "striped", "direct", True, "ring"), ("bfloat16", "uneven", "staged", False, "heads")])
def test_a_bias_by_distance(comm, gpu, dtype, layout, transport, on_gpu, schedule):
    """With many intervals for each query, in a launch for each block."""
    skip_unless_mpi_takes(gpu, transport)
    skip_unless_heads_divide(comm, schedule)
    n, heads, shape, periodic = 60, 4, (3, 4, 5), (True, False, True)
    mine = make_layout(layout, n, comm.size).positions(comm.rank)
    arrays = random_qkv(8, n, n, heads, 2, 16, 16, dtype)
    rng = np.random.default_rng(8)
    dout = rng.standard_normal((n, heads, 16)).astype(DTYPES[dtype])
    tables = [rng.standard_normal((heads, width)).astype(np.float32) for width in (3, 5, 3)]
    options = {"mask": Grid(shape, (1, 2, 1), periodic), "backend": "auto" if on_gpu else "cuda", "timeout": 100,
               "layout": make_layout(layout, n, comm.size), "gpu_transport": transport,
               "allow_gpu_sharing": not isinstance(gpu, EmulatedDevice), "schedule": schedule}
    there = gpu.array if on_gpu else lambda x: x
    q, k, v, dout_ = (there(np.ascontiguousarray(x[mine])) for x in (*arrays, dout))
    with RingAttention(comm, **options) as attention:
        assert attention.backend.name == "cuda" or on_gpu
        out, lse = attention(q, k, v, relative=tables, return_lse=True)
        got = {"out": out, "lse": lse} | attention.backward(dout_)._asdict()
    see = oracle.near(shape, (1, 2, 1), periodic, "cut", False)
    want = oracle.dense(*arrays, see, 0.25, dout=dout, relative=tables, away=oracle.distances(
        shape, periodic, np.arange(n), np.arange(n)))
    bound = {"float32": 5e-6, "bfloat16": 2.0**-6}[dtype]
    largest = np.abs(want["dq"]).max()
    for name in ("out", "lse", "dq", "dk", "dv"):
        x = got[name].get() if on_gpu else got[name]
        assert oracle.error(x, want[name][mine], np.abs(want[name]).max()) <= (2e-6 if name == "lse" else bound), name
    for x, exact in zip(got["drelative"], want["drelative"], strict=True):
        assert oracle.error(comm.allreduce(x.astype(np.float64)), exact, max(largest, np.abs(exact).max())) <= bound


def test_a_bias_by_distance_in_canonical_order(comm, gpu):
    """A result for any number of ranks; no gradient."""
    q, k, v = random_qkv(9, 50, 300, 2, 1, 16, 16, "float32")
    mine, of_keys = (make_layout("striped", n, comm.size).positions(comm.rank) for n in (50, 300))
    table = np.random.default_rng(9).standard_normal((2, 41)).astype(np.float32)
    options = {"mask": Mask(window=(70, 0)), "backend": "cuda", "timeout": 100, "layout": "striped",
               "order": "canonical", "allow_gpu_sharing": not isinstance(gpu, EmulatedDevice)}
    with RingAttention(comm, **options) as attention:
        out = attention(q[mine], k[of_keys], v[of_keys], relative=table)
        with pytest.raises(BackendError, match="relative: expected a forward pass alone"):
            attention.backward(out)
    alone = ring_attention(q, k, v, comm=MPI.COMM_SELF, relative=table, **options | {"layout": "contiguous"})
    assert out.tobytes() == alone[mine].tobytes()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_bias_in_a_call_that_is_left(comm, gpu, folder, on_gpu):
    q, k, v = random_qkv(0, 61, 61, 4, 2, 16, 16, "float32")
    mine = make_layout("striped", 61, comm.size).positions(comm.rank)
    there = gpu.array if on_gpu else lambda x: x
    arrays = [there(x[mine]) for x in (q, k, v)]
    bias = oracle.key_bias("left out by head", 4, 61)[mine]
    options = {"mask": Mask(causal=True), "backend": "auto" if on_gpu else "cuda", "timeout": 100, "schedule": "ring",
               "layout": "striped", "allow_gpu_sharing": not isinstance(gpu, EmulatedDevice)}
    with RingAttention(comm, **options) as attention:
        want = attention(*arrays, key_bias=bias)
        assert attention(*arrays, key_bias=bias, stop=lambda: comm.rank == 0) is None
        attention.save(folder / "c")
    with RingAttention.restore(folder / "c", comm, **options) as attention:
        got = attention(*arrays, key_bias=bias)
    got, want = (x.get() if on_gpu else x for x in (got, want))
    assert got.tobytes() == want.tobytes()


def test_auto_follows_the_arrays(comm, gpu):
    arrays = random_qkv(3, 20, 20, 2, 2, 16, 16, "float32")
    outs, names = [], []
    with RingAttention(comm, timeout=100, gpu_transport="staged", allow_gpu_sharing=True) as attention:
        for on_gpu in (False, True, True, False):
            out = attention(*(gpu.array(x) if on_gpu else x for x in arrays))
            outs.append(out.get() if on_gpu else out)
            names.append(attention.backend.name)
    assert names == ["numba", "cuda", "cuda", "numba"]
    for out in outs[1:]:
        assert oracle.error(out, outs[0]) <= 2e-6


@pytest.mark.parametrize("transport", ["direct", "staged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "c16"])
def test_redistribute(comm, gpu, dtype, transport):
    """Uneven shards of rows of 15 items, so that chunks and words end anywhere; and back."""
    skip_unless_mpi_takes(gpu, transport)
    counts = [200 * rank % 501 for rank in range(comm.size)]
    whole = np.arange(15 * sum(counts)).reshape(-1, 3, 5).astype(DTYPES.get(dtype, dtype))
    start, old = sum(counts[:comm.rank]), Contiguous(counts)
    there = redistribute(gpu.array(whole[start:start + counts[comm.rank]]), comm=comm, gpu_transport=transport)
    back = redistribute(there, comm=comm, source="striped", target=old, gpu_transport=transport)
    assert not isinstance(there, np.ndarray)
    assert there.get().tobytes() == whole[comm.rank::comm.size].tobytes()
    assert back.get().tobytes() == whole[start:start + counts[comm.rank]].tobytes()


def test_tensors_that_require_a_gradient(comm, emulated, monkeypatch):
    """As torch's on a GPU, which raise RuntimeError where `hasattr` looks for CUDA's interface."""
    torch = pytest.importorskip("torch")
    import ringmpi.torch
    q, k, v = random_qkv(7, 20, 20, 4, 2, 16, 16, "float32")
    host = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    there = [x.detach().clone().requires_grad_() for x in host]
    ringmpi.torch.ring_attention(*host, comm=comm, mask=Mask(causal=True), backend="numpy").square().sum().backward()
    monkeypatch.setattr(torch.Tensor, "__dlpack_device__", lambda x: (CUDA, 0))
    monkeypatch.setattr(torch.Tensor, "__cuda_array_interface__", cuda_tensor(torch).__cuda_array_interface__)
    monkeypatch.setattr(torch, "from_dlpack", lambda x: torch.from_numpy(x.host))
    monkeypatch.setattr(device, "view", lambda x: FakeArray(emulated, x.numpy()))
    with pytest.raises(RuntimeError, match="requires grad"):
        hasattr(there[0], "__cuda_array_interface__")
    out = ringmpi.torch.ring_attention(*there, comm=comm, mask=Mask(causal=True), gpu_transport="staged")
    out.square().sum().backward()
    for x, y in zip(there, host, strict=True):
        assert oracle.error(x.grad.numpy(), y.grad.numpy()) <= 5e-6
    said = everywhere(comm, lambda: ring_attention(*there, comm=comm))
    assert "DtypeError: rank 0: q: expected an array, got a tensor that requires a gradient, which" in said


def outcome(call):
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "no error"


def everywhere(comm, call):
    said = comm.allgather(outcome(call))
    assert len(set(said)) == 1, said
    return said[0]


def test_arrays_on_different_sides_are_refused(comm, gpu):
    q, k, v = random_qkv(4, 8, 8, 2, 2, 16, 16, "float32")
    mixed = everywhere(comm, lambda: ring_attention(q, gpu.array(k), v, comm=comm, timeout=60))
    assert "BackendError: rank 0: q, k and v: expected all on the host or all on one GPU, got q on the host" in mixed
    if comm.size > 1:
        arrays = [gpu.array(x) for x in (q, k, v)] if comm.rank == 1 else [q, k, v]
        said = everywhere(comm, lambda: ring_attention(*arrays, comm=comm, timeout=60))
        assert "ShapeError: rank 1: expected the same place (0 the host, 1 a GPU) on every rank, got 1 here" in said
    named = everywhere(comm, lambda: ring_attention(*(gpu.array(x) for x in (q, k, v)), comm=comm, backend="numpy",
                                                    timeout=60))
    assert "BackendError: backend numpy computes on CPUs, and the arrays are on GPUs" in named


def test_a_gpu_that_ranks_share_is_refused_unless_allowed(comm, emulated, monkeypatch):
    monkeypatch.setattr(emulated, "uuid", "GPU-one")
    arrays = random_qkv(5, 8, 8, 2, 2, 16, 16, "float32")
    options = {"comm": comm, "backend": "cuda", "timeout": 60, "gpu_transport": "staged"}
    said = everywhere(comm, lambda: ring_attention(*arrays, **options))
    allowed = everywhere(comm, lambda: ring_attention(*arrays, **options, allow_gpu_sharing=True))
    assert allowed == "no error"
    if comm.size == 1:
        assert said == "no error"
    else:
        assert "BackendError: backend cuda: expected a GPU for each rank, got GPU-one for ranks 0, 1" in said


def test_options_that_make_no_sense(comm, gpu):
    arrays = random_qkv(6, 8, 8, 2, 2, 16, 16, "float32")
    said = everywhere(comm, lambda: ring_attention(*arrays, comm=comm, gpu_transport="pigeon", timeout=60))
    assert said == ("OptionError: rank 0: gpu_transport: expected one of auto, direct, staged, got 'pigeon'"
                    + "".join(f" [also on rank {', '.join(map(str, range(1, comm.size)))}]" if comm.size > 1 else ""))
    wide = random_qkv(7, 8, 8, 1, 1, 264, 16, "float32")
    said = everywhere(comm, lambda: ring_attention(*wide, comm=comm, backend="cuda", timeout=60,
                                                    allow_gpu_sharing=True))
    assert "BackendError: rank 0: backend cuda: expected dim and dim_v up to 256, got 264 and 16" in said


def test_a_gpu_that_computes_wrongly_is_found_out(comm, emulated, monkeypatch):
    right = emulated.launch

    def wrong(kernel, grid, threads, shared_bytes, arguments, stream):
        if kernel[0].startswith("finish") and comm.rank == comm.size - 1:
            state = arguments[0].value
            state["row_sum"] = state["row_max"]
        right(kernel, grid, threads, shared_bytes, arguments, stream)
    monkeypatch.setattr(emulated, "launch", wrong)
    monkeypatch.setattr(emulated, "cache", {})      # nothing is proven yet, nor on this communicator
    arrays = random_qkv(8, 8, 8, 2, 2, 16, 16, "float32")
    mine = comm.Dup()
    said = everywhere(comm, lambda: ring_attention(*arrays, comm=mine, backend="cuda", timeout=60))
    mine.Free()
    assert "gives a wrong result" in said
    assert f"rank {comm.size - 1}: " in said


@pytest.mark.parametrize("what", ["synchronize", "to_device"])
def test_a_gpu_that_fails_on_one_rank_is_an_error_on_all(comm, emulated, monkeypatch, what):
    def fail(*_):
        raise MemoryError("none is left")
    arrays = random_qkv(10, 9, 9, 2, 2, 16, 16, "float32")
    with RingAttention(comm, backend="cuda", timeout=60, gpu_transport="staged") as attention:
        first = attention(*arrays)
        with monkeypatch.context() as patch:
            if comm.rank == comm.size - 1:
                patch.setattr(attention.backend, what, fail)
            said = everywhere(comm, lambda: attention(*arrays))
        again = attention(*arrays)             # nobody was left in the ring
    assert said == f"ResourceError: rank {comm.size - 1}: out of memory: none is left"
    assert (again == first).all()


def test_without_a_gpu_the_error_says_why(comm, monkeypatch):
    monkeypatch.setattr(device, "reason_missing", lambda: "no GPU: none is visible")
    said = everywhere(comm, lambda: RingAttention(comm, backend="cuda", timeout=60))
    assert "BackendError: rank 0: backend cuda: no GPU: none is visible" in said


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_from_file_to_file(comm, gpu, monkeypatch, folder, layout):
    early = []
    monkeypatch.setattr(device, "choose_early", lambda: early.append(True))
    monkeypatch.setattr(device, "PIECE_BYTES", 3000)
    if comm.rank == 0:
        with write_file(folder / "in.h5") as file:
            for name, x in zip("qkv", random_qkv(9, 90, 90, 4, 2, 16, 24, "bfloat16"), strict=True):
                write_rows(create_dataset(file, name, x.shape, x.dtype), 0, x)
    comm.barrier()
    options = Options(causal=True, layout=layout, backend="cuda", gpu_transport="staged", allow_gpu_sharing=True)
    report = attend(folder / "in.h5", folder / "out.h5", options, timeout=100, records=RecordPaths(folder / "run.json"))
    comm.barrier()
    result = audit(folder / "in.h5", read_manifest(folder / "out.h5"), options, rows=90, seed=0)
    record = json.loads((folder / "run.json").read_text())
    expected = comm.allgather(gpu.uuid)
    assert result.passed, str(result)
    assert report.pairs == 90 * 91 // 2
    assert record["backend"] == "cuda"
    assert record["gpus"] == expected
    assert record["gpu_transport"] == "staged"
    within = "; within a node through shared memory" if comm.size > 1 else ""
    assert record["gpu_transport_reason"] == f"asked for by gpu_transport=staged{within}"
    assert early == [True]


def test_all_ranks_take_the_kernel_for_hopper_or_none(comm, emulated, monkeypatch):
    for asked, taken in (([True] * comm.size, True), ([True] * (comm.size - 1) + [False], False)):
        monkeypatch.setenv("RINGMPI_HOPPER", str(int(asked[comm.rank])))
        with RingAttention(comm, backend="cuda") as attention:
            assert attention.backend.hopper is taken


PROVEN = []                    # the `Library` of this process's device, once its kernel has been tested
CALLS = []                     # of that kernel


@pytest.fixture
def torch_on_cpu(comm, emulated, monkeypatch):
    """Torch's kernel for CPUs in the place of those for GPUs, for blocks of any size; skipped where torch is not."""
    kernel = on_cpu(change=lambda grads: CALLS.append(1))
    monkeypatch.setattr(library, "kernels", lambda gpu: [kernel])
    monkeypatch.setattr(library, "FEWEST_PAIRS", 1)
    monkeypatch.setattr(library, "LEAST", 1)
    PROVEN[:] = PROVEN or [library.Library(emulated)]
    monkeypatch.setitem(emulated.cache, library.FOUND, PROVEN[0])
    return kernel.name


@pytest.mark.parametrize("dlse_on", [(), (0,)])
@pytest.mark.parametrize(("layout", "schedule", "causal"), [
    ("striped", "ring", True), ("zigzag", "ring", True), ("uneven", "gather", True), ("empty", "queries", False),
    ("contiguous", "queries", False), ("contiguous", "heads", True)])
def test_gradients_by_a_library(comm, emulated, torch_on_cpu, layout, schedule, causal, dlse_on):
    """Where queries or heads travel the result goes with them, unless a rank has a cotangent of lse."""
    skip_unless_heads_divide(comm, schedule)
    length = 93
    q, k, v = random_qkv(5, length, length, 4, 2, 16, 16, "bfloat16")
    rng = np.random.default_rng(6)
    dout, dlse = rng.standard_normal(q.shape).astype(q.dtype), rng.standard_normal(q.shape[:2]).astype("f4")
    spec = make_layout(layout, length, comm.size)
    mine = spec.positions(comm.rank)
    for rank in range(comm.size):
        if rank not in dlse_on:
            dlse[spec.positions(rank)] = 0
    given = emulated.array(dlse[mine]) if comm.rank in dlse_on else None
    with RingAttention(comm, mask=Mask(causal=causal), layout=layout if layout in ("striped", "zigzag") else spec,
                       timeout=100, schedule=schedule, gpu_kernels="library") as attention:
        for _ in range(2):                         # the first tests kernels
            CALLS.clear()
            emulated.launched.clear()
            attention(*(emulated.array(x[mine]) for x in (q, k, v)))
            grads = attention.backward(emulated.array(dout[mine]), given)[:3]
        kernels = attention.trace.kernels
    see = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
    want = oracle.dense(q, k, v, see, 0.25, dout=dout, dlse=dlse)
    largest = max(np.abs(want[name]).max() for name in ("dq", "dk", "dv"))
    for name, x in zip(("dq", "dk", "dv"), grads, strict=True):
        assert oracle.error(x.get(), want[name][mine], largest) <= 2.0**-6, name
    ours = [name for name, *_ in emulated.launched if name.startswith("gradient")]
    travels = schedule in ("queries", "heads") and comm.size > 1
    if dlse_on and (travels or comm.rank in dlse_on):
        assert not CALLS
    elif layout in ("striped", "contiguous"):
        assert CALLS
        assert not ours
    assert kernels == (torch_on_cpu if CALLS else "own")


def test_a_library_that_one_rank_does_not_have(comm, emulated, torch_on_cpu, monkeypatch):
    """The others take it; that rank does not, and is right all the same, or if it was asked for all raise one error."""
    if comm.rank == comm.size - 1:
        monkeypatch.setitem(emulated.cache, library.FOUND, library.Library(emulated))
        monkeypatch.setattr(library, "kernels", lambda gpu: [])
    x = np.ones((8, 2, 32), DTYPES["float16"])

    def differentiate(wish):
        with RingAttention(comm, timeout=100, schedule="ring", gpu_kernels=wish) as attention:
            attention(*[emulated.array(x)] * 3)
            return attention.backward(emulated.array(x))
    said = everywhere(comm, lambda: differentiate("library"))
    assert f"rank {comm.size - 1}: gpu_kernels: 'library' is not there" in said
    _, _, dv = differentiate("auto")[:3]
    assert np.allclose(dv.get().astype(float), 1, atol=1e-2)


def test_sums_of_weights_are_refused(comm, emulated):
    """The same error on all ranks, for arrays on the host and on a GPU; the communicator is as good as before."""
    q, k, _ = random_qkv(1, 8, 8, 2, 1, 16, 16, "float32")
    lse = np.zeros((8, 2), "f4")
    with pytest.raises(BackendError, match="backend cuda sums up no weights yet; take backend='numba'"):
        analysis.entropy(q, k, lse, comm=comm, backend="cuda", timeout=60)
    with pytest.raises(BackendError, match="backend cuda sums up no weights yet; take backend='numba'"):
        analysis.key_mass(emulated.array(q), emulated.array(k), lse, comm=comm, timeout=60)
    assert analysis.key_mass(q, k, lse, comm=comm, timeout=60).shape == (8, 2)
