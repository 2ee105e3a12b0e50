"""A cache of keys and values on this run's ranks against one dense softmax. Runs under mpiexec."""

import copy
import pickle
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import oracle
import pytest
from oracle import random_qkv
from test_mpi_gradients import expect

from ringmpi import (
    Contiguous,
    DtypeError,
    KVCache,
    Mask,
    OptionError,
    OutputError,
    ResourceError,
    RingError,
    ShapeError,
    ShardError,
    ring_attention,
)
from ringmpi.call import SUMMED_BYTES, checksum
from ringmpi.dtypes import DTYPES, TOLERANCE
from ringmpi.layout import make

pytestmark = pytest.mark.mpi

SIZES = {"kv_heads": 2, "dim": 16, "dim_v": 8}


def tokens(seed, n, dtype="float32", heads=4):
    return random_qkv(seed, n, n, heads, 2, 16, 8, dtype)


def dense(q, k, v, positions=None, **mask):
    """Out and lse of queries that are the last of a sequence, or at `positions`."""
    n_q, n_k = len(q), len(k)
    see = oracle.visible(n_k, n_k, **mask)
    see = see[n_k - n_q:] if positions is None else see[positions]
    return oracle.attend(q, k, v, see, 0.25)


def expect_same(comm, x):
    """All ranks have the same bits."""
    assert len(set(comm.allgather(x.tobytes()))) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_prefill_and_steps(comm, dtype, backend):
    """A prompt, sharded, then token by token: what one causal pass gives, on all ranks alike."""
    length, prompt = 75, 61
    q, k, v = tokens(1, length, dtype)
    want, want_lse = dense(q, k, v, causal=True)
    mine = make("striped", prompt, comm.size).positions(comm.rank)
    unit = np.abs(want).max()
    with KVCache(comm, dtype=dtype, backend=backend, **SIZES) as cache:
        cache.append(k[mine], v[mine], layout="striped")
        out, lse = cache.attend(q[mine], sharded=True, layout="striped", return_lse=True)
        assert oracle.error(out, want[mine], unit) <= TOLERANCE[dtype]
        assert oracle.error(lse, want_lse[mine]) <= 2e-6
        for at in range(prompt, length):
            here = slice(at, at + 1)
            out, lse = cache.attend(q[here], k[here], v[here], return_lse=True)
            assert out.dtype == q.dtype
            assert oracle.error(out, want[here], unit) <= TOLERANCE[dtype]
            assert oracle.error(lse, want_lse[here]) <= 2e-6
            expect_same(comm, out)
            expect_same(comm, lse)
        assert cache.length == length
        assert comm.allreduce(cache.tokens) == length


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"causal": True, "window": (9, 0), "first": 3},
                                  {"causal": True, "documents": [0, 20, 41, 50]}, {"window": (5, 3)}])
@pytest.mark.parametrize("sharded", [False, True])
def test_masks_and_scores(comm, mask, sharded):
    q, k, v = tokens(2, 50, "float64")
    slopes, sinks = np.array([0.3, 0.1, 0.02, 0.0]), np.array([0.5, -1, 2, 0])
    layout = make("zigzag", 50, comm.size)
    mine = layout.positions(comm.rank)
    rows = np.arange(43, 50)
    see = oracle.visible(50, 50, **mask)[rows]
    want = oracle.dense(q[rows], k, v, see, 0.25, sinks=sinks, softcap=2.0, slopes=slopes,
                        queries=rows, keys=np.arange(50))
    with KVCache(comm, dtype="float64", mask=Mask(**mask), softcap=2.0, alibi=slopes, **SIZES) as cache:
        cache.append(k[mine], v[mine], layout="zigzag")
        if sharded:
            own = Contiguous.even(7, comm.size).positions(comm.rank)
            out, lse = cache.attend(q[rows[own]], sharded=True, sinks=sinks, return_lse=True)
        else:
            own = np.arange(7)
            out, lse = cache.attend(q[rows], sinks=sinks, return_lse=True)
    assert oracle.error(out, want["out"][own]) < 1e-13
    assert oracle.error(lse, want["lse"][own]) < 1e-13


def test_chunks_batch_crop_and_reorder(comm):
    """Appends of all sizes, in a batch, in chunks; forgotten and reordered as a search of beams does."""
    cases = [tokens(seed, 640, "float64") for seed in range(3)]
    q, k, v = (np.stack(x) for x in zip(*cases, strict=True))
    cache = KVCache(comm, dtype="float64", batch=3, **SIZES)
    at = 0
    for n in (300, 0, 1, 17, 250, 40):
        if n == 250:
            mine = make("contiguous", n, comm.size).positions(comm.rank) + at
            cache.append(k[:, mine], v[:, mine])
        else:
            cache.append(k[:, at:at + n], v[:, at:at + n], replicated=True)
        at += n
    assert cache.length == at == 608
    assert len(cache._store.chunks) > 1 or comm.size > 2
    out = cache.attend(q[:, 600:608])
    want = [dense(q[i, 600:608], k[i, :608], v[i, :608], causal=True)[0] for i in range(3)]
    assert max(oracle.error(x, y) for x, y in zip(out, want, strict=True)) < 1e-13
    cache.crop(555)
    cache.reorder([2, 2, 0])
    out = cache.attend(q[:, 555:556], k[:, 555:556], v[:, 555:556])
    for i, source in enumerate((2, 2, 0)):
        keys, values = (np.concatenate([x[source, :555], x[i, 555:556]]) for x in (k, v))
        assert oracle.error(out[i], dense(q[i, 555:556], keys, values, causal=True)[0]) < 1e-13
    cache.close()
    expect(comm, lambda: cache.attend(q[:, :1]), RingError, "closed")


def test_other_tokens_in_the_place_of_those_that_were_cropped(comm):
    """As many tokens on each rank as before, at other positions: a step sees what there is."""
    length = 4 * comm.size
    with KVCache(comm, **SIZES, threads=1, mask=Mask(causal=True, q_offset=length // 2)) as cache:
        for seed, layout in enumerate(["contiguous", "striped"]):
            q, k, v = tokens(seed, length)
            cache.crop(0)
            mine = make(layout, length, comm.size).positions(comm.rank)
            cache.append(k[mine], v[mine], layout=layout)
            out = cache.attend(q[:1])
            wanted, _ = dense(q[:1], k, v, positions=[length // 2], causal=True)
            np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_a_window_gives_memory_back(comm):
    """However long a sequence gets, a rank holds what the window shows and little more; results stay right."""
    q, k, v = tokens(3, 6000)
    most = 0
    with KVCache(comm, mask=Mask(causal=True, window=(100, 0), first=4), **SIZES) as cache:
        for at in range(0, 6000, 50):
            here = slice(at, at + 50)
            cache.append(k[here], v[here], replicated=True)
            most = max(most, cache.nbytes)
            if at % 1000 == 950:
                out = cache.attend(q[here])
                want, _ = dense(q[here], k[:at + 50], v[:at + 50], causal=True, window=(100, 0), first=4)
                assert oracle.error(out, want, np.abs(want).max()) <= TOLERANCE["float32"]
        assert most < 2 * (100 + 50 + 4) * 2 * (16 + 8) * 4 + 6 * 64 * 2 * (16 + 8) * 4
        mine = make("contiguous", 40, comm.size).positions(comm.rank)
        out = cache.attend(q[5960 + mine], sharded=True)
        want, _ = dense(q[5960:], k, v, causal=True, window=(100, 0), first=4)
        assert oracle.error(out, want[mine], np.abs(want).max()) <= TOLERANCE["float32"]
        expect(comm, lambda: cache.attend(q[-51:]), OptionError, "expected at most 50 queries, got 51: the first would")
        expect(comm, lambda: cache.crop(20), OptionError, "a window has dropped the keys before")


@pytest.fixture
def path(comm):
    """One for all ranks: pytest's own folders are not made for several processes that share them."""
    folder = tempfile.mkdtemp() if comm.rank == 0 else None
    yield str(Path(comm.bcast(folder)) / "cache.h5")
    comm.Barrier()
    if folder:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("dtype", "batch"), [("bfloat16", None), ("float32", 2)])
def test_saved_and_opened_on_other_ranks(comm, path, dtype, batch):
    q, k, v = (x if batch is None else np.stack([x, 2 * x]) for x in tokens(4, 90, dtype))
    axis = 0 if batch is None else 1
    last = [x.take([89], axis) for x in (q, k, v)]
    with KVCache(comm, dtype=dtype, batch=batch, **SIZES) as cache:
        mine = make("striped", 89, comm.size).positions(comm.rank)
        cache.append(k.take(mine, axis), v.take(mine, axis), layout="striped")
        cache.save(path)
        want = cache.attend(*last)
        expect(comm, lambda: cache.save(path), OutputError, "exists")
        cache.save(path, force=True)
        cache.crop(89)
        cache.save(path, force=True)
    half = comm.Split(comm.rank % 2)
    for ranks in (comm, half):
        with KVCache.open(path, ranks, kv_heads=2, dtype=dtype) as cache:
            assert (cache.length, cache.batch, cache.dim_v) == (89, batch, 8)
            assert ranks.allreduce(cache.tokens) == 89
            out = cache.attend(*last)
            assert oracle.error(out, want.astype(float), 1.0) <= TOLERANCE[dtype]
    half.Free()
    expect(comm, lambda: KVCache.open(path, comm, kv_heads=4), OptionError, "expected a cache with kv_heads 4, got 2")
    expect(comm, lambda: KVCache.open(path, comm, dtype="float64"), OptionError, "expected a cache with dtype float64")
    expect(comm, lambda: KVCache.open(path, comm, capacity=50), OptionError, "expected at most 50 tokens")


def test_keys_that_were_dropped_are_not_asked_for_by_another_mask(comm, path):
    """A window has dropped keys; a file of what is left is of use to masks that do not show them."""
    q, k, v = tokens(11, 2000)
    with KVCache(comm, mask=Mask(causal=True, window=(9, 0), first=2), **SIZES) as cache:
        for at in range(0, 2000, 100):
            cache.append(k[at:at + 100], v[at:at + 100], replicated=True)
        want = cache.attend(q[-1:])
        assert comm.allreduce(cache.tokens) < 2000
        cache.save(path)
    with KVCache.open(path, comm, mask=Mask(causal=True, window=(9, 0), first=2)) as cache:
        assert oracle.error(cache.attend(q[-1:]), want) <= TOLERANCE["float32"]
    for mask in (None, Mask(causal=True, window=(None, 0)), Mask(causal=True, window=(9, 0), first=1500),
                 Mask(causal=True, window=(9, 0), q_offset=50)):
        expect(comm, lambda mask=mask: KVCache.open(path, comm, mask=mask), OptionError, "this mask shows them")


def test_a_damaged_file(comm, path):
    _, k, v = tokens(5, 400)
    with KVCache(comm, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        cache.save(path)
    whole = None
    if comm.rank == 0:
        with h5py.File(path) as file:
            at = file["v"].id.get_chunk_info(0).byte_offset
        whole = Path(path).read_bytes()
    for kind in ("flipped", "cut", "no cache", "other numbers", "another length", "fewer positions"):
        if comm.rank == 0:
            damaged = bytearray(whole)
            if kind == "flipped":
                damaged[at + 1000] ^= 4
            elif kind == "cut":
                del damaged[len(damaged) // 2:]
            elif kind == "another length":
                damaged[damaged.index(b'"length": 400') + 10] ^= 1
            Path(path).write_bytes(damaged)
            if kind == "fewer positions":
                with h5py.File(path, "r+") as file:
                    for name in ("k", "v", "positions"):
                        part = file[name][10:]
                        del file[name]
                        file[name] = part
            if kind in ("no cache", "other numbers"):
                with h5py.File(path, "r+") as file:
                    text = bytes(file["cache"][()])
                    del file["cache"]
                    if kind == "other numbers":
                        file["cache"] = np.bytes_(text.replace(b'"dim": 16', b'"dim": 24'))
        comm.Barrier()
        expect(comm, lambda: KVCache.open(path, comm), ShardError, "")


def test_bad_input_is_one_error_everywhere_and_changes_nothing(comm):
    q, k, v = tokens(6, 30)
    one = slice(29, 30)
    with KVCache(comm, capacity=29, **SIZES) as cache:
        cache.append(k[:29], v[:29], replicated=True)
        want = cache.attend(q[one])
        odd = comm.rank == comm.size - 1
        for call, kind, text in (
                (lambda: cache.append(k[one], v[one], replicated=True), OptionError, "at most 29 tokens, its capacity"),
                (lambda: cache.attend(q[one], k[one], v[one]), OptionError, "at most 29 tokens, its capacity"),
                (lambda: cache.attend(q[one, :3] if odd else q[one]), ShapeError, "heads a multiple of 2"),
                (lambda: cache.attend(q[one, :, :8] if odd else q[one]), ShapeError, "heads, 16)"),
                (lambda: cache.attend(q[one].astype("f8") if odd else q[one]), DtypeError, "float32, got float64"),
                (lambda: cache.append(k[one], v[:2]), ShapeError, "as many tokens as k has, 1, got 2"),
                (lambda: cache.append(k[one], None), OptionError, "got only one of them"),
                (lambda: cache.attend(q[one], k[one], v[one], sharded=True), OptionError, "append sharded tokens"),
                (lambda: cache.attend(q[one], sinks=np.ones(3)), ShapeError, "sinks")):
            expect(comm, call, kind, text)
        if comm.size > 1:
            expect(comm, lambda: cache.attend(q[one] + odd), OptionError, "q (checksum)")
            expect(comm, lambda: cache.attend(q[odd:odd + 2 - odd]), OptionError, "shape of q")
        assert (cache.attend(q[one]) == want).all()
        assert cache.length == 29
    for options, text in (({"kv_heads": 0}, "kv_heads expects"), ({"batch": 0}, "batch expects"),
                          ({"capacity": -1}, "capacity expects"), ({"dim": 2.5}, "dim expects")):
        expect(comm, lambda options=options: KVCache(comm, **{**SIZES, **options}), OptionError, text)
    with pytest.raises(TypeError, match="here that is mask="):
        KVCache(comm, **SIZES, causal=True)


def test_an_error_on_one_rank_is_heard_by_all(comm, monkeypatch):
    """What does not fit, or fails, on one rank is one error on all of them, and the cache is as it was."""
    q, k, v = tokens(8, 12)
    odd = comm.rank == comm.size - 1
    with KVCache(comm, timeout=20, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        want = cache.attend(q[-1:])
        new = k[:2] if odd else None
        expect(comm, lambda: cache.attend(q[-1:], new, new, sharded=True), OptionError, "append sharded tokens")
        expect(comm, lambda: cache.append(k, v, layout=None if odd else "contiguous"), OptionError, "layout: expected")
        sinks = np.array([0.0, 1.0, 2.0, 3.0 + 1e-6 * odd])
        if comm.size > 1:
            expect(comm, lambda: cache.attend(q[-1:], sinks=sinks), OptionError, "sinks is [0.0, 1.0, 2.0, 3.0")
            pair = (k[:2], v[:2]) if odd else ()
            expect(comm, lambda: cache.attend(q[-1:], *pair), OptionError, "tokens is 2 here and not given on rank 0")

        def whole(store):
            raise MemoryError("of one rank")

        with monkeypatch.context() as patch:
            if odd:
                patch.setattr("ringmpi.kv.store.KVStore.whole", whole)
            expect(comm, lambda: cache.attend(q, sharded=True), ResourceError, "of one rank")
            expect(comm, lambda: cache.save("never"), ResourceError, "of one rank")
        assert (cache.attend(q[-1:]) == want).all()
        assert cache.length == 12
    expect(comm, lambda: KVCache(comm, **SIZES, dtype="f99" if odd else "float32"), DtypeError, "dtype: expected")


def test_ranks_that_reorder_differently_hear_of_it(comm):
    """What is local, and must be the same everywhere, is seen by the next call."""
    q, k, v = (np.stack([x, 2 * x]) for x in tokens(12, 10))
    if comm.size == 1:
        pytest.skip("takes two")
    with KVCache(comm, batch=2, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        cache.reorder([0, 0] if comm.rank else [1, 0])
        for call in (lambda: cache.attend(q), lambda: cache.attend(q, sharded=True), lambda: cache.save("never"),
                     lambda: cache.append(k, v)):
            expect(comm, call, OptionError, "order of the batch")


def test_tokens_on_all_ranks_are_no_layout_to_append(comm):
    """`layout="replicated"` is of queries: taken for a layout of keys, each token would be there on every rank."""
    _, k, v = tokens(9, 5)
    with KVCache(comm, **SIZES) as cache:
        expect(comm, lambda: cache.append(k, v, layout="replicated"), OptionError, "layout: expected one of contiguous")
        assert cache.length == 0


def test_a_closed_cache_is_not_saved(comm, path):
    """Its tokens are gone: a file would be replaced by one without any."""
    _, k, v = tokens(10, 20)
    with KVCache(comm, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        cache.save(path)
    expect(comm, lambda: cache.save(path, force=True), RingError, "closed")
    with KVCache.open(path, comm) as cache:
        assert comm.allreduce(cache.tokens) == cache.length == 20


def test_a_checksum_copies_no_more_than_it_sums_up():
    """Of keys in another order, as torch has them, too; and it is that of their order."""
    x = np.random.default_rng(0).standard_normal((8, 4096, 64)).astype("f4")
    tracemalloc.start()
    got = checksum(x.swapaxes(0, 1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got == checksum(np.ascontiguousarray(x.swapaxes(0, 1))) != checksum(x)
    assert peak < 3 * SUMMED_BYTES


def test_sharded_queries_of_different_heads(comm):
    """One error, though by their own heads the ranks would take different schedules."""
    if comm.size == 1:
        pytest.skip("takes two")
    _, k, v = tokens(13, 40)
    with KVCache(comm, timeout=20, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        q = np.ones((1, 200 if comm.rank else 2, 16), "f4")
        expect(comm, lambda: cache.attend(q, sharded=True), ShapeError, "the same heads on every rank")


def test_a_cache_is_one_object(comm):
    with KVCache(comm, **SIZES) as cache:
        for take in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="a KVCache can't be"):
                take(cache)


def test_beside_one_call(comm):
    """Every step of a decoder is a row of one causal pass."""
    q, k, v = tokens(7, 40, "float64")
    mine = make("contiguous", 40, comm.size).positions(comm.rank)
    whole = np.concatenate(comm.allgather(ring_attention(q[mine], k[mine], v[mine], comm=comm,
                                                         mask=Mask(causal=True))))
    with KVCache(comm, dtype="float64", **SIZES) as cache:
        rows = [cache.attend(q[i:i + 1], k[i:i + 1], v[i:i + 1])[0] for i in range(40)]
    assert np.abs(np.stack(rows) - whole).max() < 1e-13
