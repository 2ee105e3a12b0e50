"""A cache of keys and values on this run's ranks against one dense softmax. Runs under mpiexec."""

import copy
import itertools
import pickle
import tracemalloc
import weakref
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np
import oracle
import pytest
from oracle import random_qkv
from test_mpi_gradients import expect

from ringmpi import (
    BackendError,
    Contiguous,
    DtypeError,
    Grid,
    KVCache,
    Mask,
    OptionError,
    OutputError,
    RankLost,
    ResourceError,
    RingAttention,
    RingError,
    Schedule,
    ShapeError,
    ShardError,
    ring_attention,
)
from ringmpi.call import SUMMED_BYTES, checksum
from ringmpi.dtypes import DTYPES, TOLERANCE
from ringmpi.kv.decoder import Decoder
from ringmpi.layout import make
from ringmpi.mpi.waiting import Waiter
from ringmpi.schedules.links import assign

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


def test_a_step_that_cannot_be_prepared(comm, monkeypatch):
    """Fails on all ranks, and leaves nothing of the tokens before."""
    q, k, v = tokens(3, 20)
    old = tokens(4, 20)
    with KVCache(comm, backend="numba", **SIZES) as cache:
        cache.append(*old[1:], replicated=True)
        cache.attend(old[0][-1:])
        cache.crop(0)
        cache.append(k, v, replicated=True)
        backend = type(cache._core.backend)
        bind = backend.bind

        def fail(*_):
            raise MemoryError("made up")

        monkeypatch.setattr(backend, "bind", fail)
        with pytest.raises((MemoryError, RingError)):
            cache.attend(q[-1:])
        monkeypatch.setattr(backend, "bind", bind)
        want, _ = dense(q[-1:], k, v, causal=True)
        assert oracle.error(cache.attend(q[-1:]), want, np.abs(want).max()) <= TOLERANCE["float32"]


def test_memory_goes_with_its_tokens(comm):
    """What a step has prepared does not keep chunks that were cropped, or the cache once it is closed."""
    q, k, v = tokens(3, 40 * comm.size)
    cache = KVCache(comm, **SIZES)
    for _ in range(2):
        cache.append(k, v, replicated=True)
        cache.attend(q[-1:])
        held = [weakref.ref(x) for chunk in cache._core.contents.store.chunks for x in (chunk.k, chunk.v)]
        cache.crop(0)
        assert not any(x() is not None for x in held)
    cache.append(k, v, replicated=True)
    cache.attend(q[-1:])
    held = [weakref.ref(x) for chunk in cache._core.contents.store.chunks for x in (chunk.k, chunk.v)]
    cache.close()
    assert not any(x() is not None for x in held)
    expect(comm, lambda: cache.crop(0), RingError, "closed")


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
                                  {"causal": True, "documents": [0, 20, 41, 50]}, {"window": (5, 3)},
                                  {"causal": True, "window": (9, 0), "spans": [(2, 44), (47, 50)]},
                                  {"causal": True, "documents": [0, 20, 41, 45, 50], "parents": [-1, 0, 0, 2],
                                   "prompts": [(-1, -1), (-1, -1), (21, 23), (30, 40)]}])
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


BIASED = [("left out by head", {"causal": True}, None),
          ("left out", {"causal": True, "window": (20, 0), "first": 3}, None),
          ("bias", {"causal": True, "documents": [0, 20, 41, 75]}, 2), ("left out by head", {"window": (9, 7)}, 2)]


@pytest.mark.parametrize(("kind", "mask", "batch"), BIASED)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_bias_of_the_keys(comm, path, backend, kind, mask, batch):
    """A prompt, steps, a draft that is taken back, saved and opened; some queries see only keys that are left out."""
    length, prompt = 75, 61
    elements = range(batch or 1)
    q, k, v = (np.stack(x) for x in zip(*(tokens(i, length, "float64") for i in elements), strict=True))
    bias = np.stack([oracle.key_bias(kind, 4, length, i, np.float64) for i in elements])
    see = oracle.visible(length, length, **mask)
    sinks = np.array([0.5, -1, 2, 0])
    want = {given: [oracle.dense(q[i], k[i], v[i], see, 0.25, key_bias=bias[i], sinks=given and sinks)
                    for i in elements] for given in (None, True)}
    left_out = np.isneginf(bias).all(axis=2)
    k[left_out], v[left_out] = np.nan, np.nan
    numbers = bias if bias.shape[2] > 1 else bias[..., 0]

    def given(x, rows):
        return x[:, rows] if batch else x[0, rows]

    def check(got, rows, with_sinks=None):
        for name, x in zip(("out", "lse"), got, strict=True):
            exact = np.stack([one[name][rows] for one in want[with_sinks]])
            assert oracle.error(x if batch else x[None], exact, 1.0) < 1e-12

    def step(cache, rows):
        got = cache.attend(*(given(x, rows) for x in (q, k, v)), key_bias=given(numbers, rows), return_lse=True)
        if "window" not in mask or mask["window"][1] == 0:         # else it does not see what is yet to come
            check(got, rows)

    mine = make("striped", prompt, comm.size).positions(comm.rank)
    sizes = {**SIZES, "dtype": "float64", "batch": batch, "key_bias": True if numbers.ndim == 2 else 4}
    with KVCache(comm, mask=Mask(**mask), backend=backend, **sizes) as cache:
        first = slice(0, 24)                  # which are left out
        cache.append(given(k, first), given(v, first), key_bias=given(numbers, first), replicated=True)
        for at in range(24, 30):
            step(cache, slice(at, at + 1))
        cache.crop(0)
        cache.append(given(k, mine), given(v, mine), key_bias=given(numbers, mine), layout="striped")
        if "window" not in mask or mask["window"][1] == 0:
            check(cache.attend(given(q, mine), sharded=True, layout="striped", return_lse=True), mine)
        for at in range(prompt, 66):
            step(cache, slice(at, at + 1))
        step(cache, slice(66, 70))
        cache.crop(68)
        cache.save(path)
    with KVCache.open(path, comm, mask=Mask(**mask), backend=backend) as cache:
        assert cache.key_bias == sizes["key_bias"] + 0
        step(cache, slice(68, length))
        last = slice(length - 9, length)
        for with_sinks in (None, True):
            check(cache.attend(given(q, last), return_lse=True, sinks=with_sinks and sinks), last, with_sinks)
            own = last.start + Contiguous.even(9, comm.size).positions(comm.rank)
            got = cache.attend(given(q, own), sharded=True, return_lse=True, sinks=with_sinks and sinks)
            check(got, own, with_sinks)
        if batch:
            cache.reorder([1, 0])
            want[None].reverse()
            q = q[::-1]
            check(cache.attend(given(q, last), return_lse=True), last)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize(("batch", "biased"), [(None, False), (2, True)])
def test_values_that_are_the_first_numbers_of_keys(comm, path, backend, batch, biased):
    """Kept once: prompt, steps, crop, save, open and reorder; what values apart give."""
    q, k, _ = (np.stack(x) for x in zip(*(tokens(i, 75, "float64") for i in range(batch or 1)), strict=True))
    bias = np.stack([oracle.key_bias("left out", 4, 75, i, np.float64)[:, 0] for i in range(batch or 1)])
    want = [oracle.dense(q[i], k[i], k[i][..., :8], oracle.visible(75, 75, causal=True), 0.25,
                         key_bias=bias[i][:, None] if biased else None) for i in range(batch or 1)]

    def given(x, rows):
        return x[:, rows] if batch else x[0, rows]

    def more(rows):
        return {"key_bias": given(bias, rows)} if biased else {}

    def check(got, rows):
        for name, x in zip(("out", "lse"), got, strict=True):
            assert oracle.error(x if batch else x[None], np.stack([one[name][rows] for one in want]), 1.0) < 1e-12

    def step(cache, rows):
        check(cache.attend(given(q, rows), given(k, rows), **more(rows), return_lse=True), rows)

    mine = make("striped", 61, comm.size).positions(comm.rank)
    with KVCache(comm, **SIZES, dtype="float64", backend=backend, batch=batch, values_in_keys=True,
                 key_bias=biased) as cache:
        cache.append(given(k, mine), **more(mine), layout="striped")
        assert cache.nbytes == sum(x.nbytes for chunk in cache._core.contents.store.chunks for x in (
            chunk.k, *([chunk.bias] if biased else [])))
        check(cache.attend(given(q, mine), sharded=True, layout="striped", return_lse=True), mine)
        for at in range(61, 66):
            step(cache, slice(at, at + 1))
        step(cache, slice(66, 70))
        cache.crop(68)
        cache.save(path)
        expect(comm, lambda: cache.append(given(k, mine), given(k, mine), **more(mine)), OptionError, "expected no v")
    with h5py.File(path) as file:
        assert "v" not in file
    with KVCache.open(path, comm, backend=backend) as cache:
        assert cache.values_in_keys
        step(cache, slice(68, 75))
        if batch:
            cache.reorder([1, 0])
            want.reverse()
            q = q[::-1]
            check(cache.attend(given(q, slice(66, 75)), return_lse=True), slice(66, 75))
    expect(comm, lambda: KVCache(comm, kv_heads=2, dim=8, dim_v=9, values_in_keys=True), OptionError, "values_in_keys")


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize(("mask", "biased", "batch"), [({"causal": True}, False, None),
                                                       ({"causal": True, "window": (20, 0), "first": 3}, True, 2)])
def test_a_bias_by_distance(comm, backend, mask, biased, batch):
    """A prompt, steps with one table, another, and none, a draft that is taken back: each step has its own."""
    length, prompt = 75, 61
    elements, rng = range(batch or 1), np.random.default_rng(5)
    q, k, v = (np.stack(x) for x in zip(*(tokens(i, length, "float64") for i in elements), strict=True))
    bias = np.stack([oracle.key_bias("left out", 4, length, i, np.float64) for i in elements])
    tables = [rng.standard_normal((4, width)) for width in (1, 21, 301)] + [None]
    away = [np.arange(length)[:, None] - np.arange(length)]
    see, sinks = oracle.visible(length, length, **mask), np.array([0.5, -1, 2, 0])

    def given(x, rows):
        return x[:, rows] if batch else x[0, rows]

    def check(got, rows, table, with_sinks=None):
        for i, (out, lse) in enumerate(zip(*(x if batch else x[None] for x in got), strict=True)):
            want = oracle.dense(q[i], k[i], v[i], see, 0.25, sinks=with_sinks, key_bias=bias[i] if biased else None,
                                **({} if table is None else {"relative": [table], "away": away}))
            assert oracle.error(out, want["out"][rows], 1.0) < 1e-12
            assert oracle.error(lse, want["lse"][rows], 1.0) < 1e-12

    def more(rows):
        return {"key_bias": given(bias[..., 0], rows)} if biased else {}

    mine = make("striped", prompt, comm.size).positions(comm.rank)
    with KVCache(comm, mask=Mask(**mask), backend=backend, dtype="float64", batch=batch, key_bias=biased,
                 **SIZES) as cache:
        cache.append(given(k, mine), given(v, mine), layout="striped", **more(mine))
        for table in tables:
            check(cache.attend(given(q, mine), sharded=True, layout="striped", relative=table, return_lse=True), mine,
                  table)
        for number in range(2):
            for at in (prompt, prompt + 1, slice(prompt + 2, prompt + 6)):
                here = at if isinstance(at, slice) else slice(at, at + 1)
                new = [given(x, here) for x in (k, v)]
                for table in tables[number::2]:                  # with the same keys
                    got = cache.attend(given(q, here), *new, **(more(here) if new else {}), relative=table,
                                       sinks=sinks, return_lse=True)
                    check(got, here, table, sinks)
                    expect_same(comm, got[0])
                    new = []
            cache.crop(prompt)


def test_tables_that_do_not_go_with_the_cache(comm):
    q, k, v = tokens(1, 4)
    odd = comm.rank == comm.size - 1
    good = np.zeros((4, 5))
    with KVCache(comm, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        for sharded in (False, True):
            for bad, kind, text in ((good[:2], ShapeError, "relative: expected shape (4, 2 reach + 1)"),
                                    (good + np.nan, OptionError, "relative: expected numbers that are finite"),
                                    ((good, good), ShapeError, "relative: expected one table")):
                expect(comm, lambda x=bad, y=sharded: cache.attend(q, relative=x if odd else good, sharded=y), kind,
                       text)
            if comm.size > 1:
                expect(comm, lambda y=sharded: cache.attend(q, relative=good + odd, sharded=y), OptionError, "relative")
                expect(comm, lambda y=sharded: cache.attend(q, relative=None if odd else good, sharded=y),
                       ShapeError if sharded else OptionError, "relative (0 none")
        assert cache.length == 4
        want, _ = dense(q, k, v, causal=True)
        assert oracle.error(cache.attend(q, relative=good), want, np.abs(want).max()) <= TOLERANCE["float32"]


def test_a_bias_that_does_not_go_with_the_cache(comm):
    q, k, v = tokens(1, 4)
    odd = comm.rank == comm.size - 1
    expect(comm, lambda: KVCache(comm, key_bias=3, **SIZES), OptionError, "KVCache: key_bias: expected True")
    expect(comm, lambda: KVCache(comm, key_bias=True, backend="cuda", **SIZES), BackendError, "key_bias: backend cuda")
    with KVCache(comm, **SIZES) as cache:
        expect(comm, lambda: cache.append(k, v, key_bias=np.zeros(4) if odd else None), OptionError,
               "expected no key_bias")
    with KVCache(comm, key_bias=4, **SIZES) as cache:
        for bad, kind, text in ((None, OptionError, "expected key_bias with k and v"),
                                (np.zeros(4), ShapeError, "key_bias: expected shape (4, 4)"),
                                (np.full((4, 4), np.nan), OptionError, "key_bias: expected numbers that are finite")):
            expect(comm, lambda bad=bad: cache.append(k, v, key_bias=bad if odd else np.zeros((4, 4)), replicated=True),
                   kind, text)
            expect(comm, lambda bad=bad: cache.attend(q, k, v, key_bias=bad if odd else np.zeros((4, 4))), kind, text)
        assert cache.length == 0
        cache.append(k, v, key_bias=np.zeros((4, 4)), replicated=True)
        expect(comm, lambda: cache.attend(q[:, :2]), ShapeError, "q: expected 4 heads")
        if comm.size > 1:
            expect(comm, lambda: cache.attend(q, k, v, key_bias=np.full((4, 4), float(odd))), OptionError, "key_bias")


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
    assert len(cache._core.contents.store.chunks) > 1 or comm.size > 2
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


@pytest.mark.parametrize("rollback", [0, 64])
def test_a_window_gives_memory_back(comm, rollback):
    """However long a sequence gets, a rank holds what the window shows and little more; results stay right."""
    q, k, v = tokens(3, 6000)
    most = 0
    with KVCache(comm, mask=Mask(causal=True, window=(100, 0), first=4), rollback=rollback, **SIZES) as cache:
        for at in range(0, 6000, 50):
            here = slice(at, at + 50)
            cache.append(k[here], v[here], replicated=True)
            most = max(most, cache.nbytes)
            if at % 1000 == 950:
                out = cache.attend(q[here])
                want, _ = dense(q[here], k[:at + 50], v[:at + 50], causal=True, window=(100, 0), first=4)
                assert oracle.error(out, want, np.abs(want).max()) <= TOLERANCE["float32"]
        assert most < 2 * (100 + 50 + 4 + rollback) * 2 * (16 + 8) * 4 + 6 * 64 * 2 * (16 + 8) * 4
        mine = make("contiguous", 40, comm.size).positions(comm.rank)
        out = cache.attend(q[5960 + mine], sharded=True)
        want, _ = dense(q[5960:], k, v, causal=True, window=(100, 0), first=4)
        assert oracle.error(out, want[mine], np.abs(want).max()) <= TOLERANCE["float32"]
        expect(comm, lambda: cache.attend(q[-51 - rollback:]), OptionError,
               f"expected at most {50 + rollback} queries, got {51 + rollback}: the first would")
        expect(comm, lambda: cache.crop(20), OptionError, "a window has dropped the keys before")
        cache.crop(0)                                    # and anew
        cache.append(k[:7], v[:7], replicated=True)
        want, _ = dense(q[:7], k[:7], v[:7], causal=True, window=(100, 0), first=4)
        assert oracle.error(cache.attend(q[:7]), want, np.abs(want).max()) <= TOLERANCE["float32"]


@pytest.mark.parametrize("first", [0, 3])
def test_a_draft_is_taken_back(comm, first):
    """As speculative decoding does: tokens one by one, some cropped, others in their place; no key is missed."""
    mask = {"causal": True, "window": (20, 0), "first": first}
    q, k, v = tokens(18, 500, "float64")
    drafts = tokens(19, 500, "float64")
    rng = np.random.default_rng(20)
    with KVCache(comm, dtype="float64", mask=Mask(**mask), rollback=8, **SIZES) as cache:
        cache.append(k[:100], v[:100], replicated=True)
        at, held = 100, 0
        while at < 480:
            wrong = int(rng.integers(0, 9))
            for here in range(at, at + wrong):
                cache.attend(*(x[here:here + 1] for x in drafts))
            cache.crop(at)
            taken = int(rng.integers(1, 5))
            here = slice(at, at + taken)
            at += taken
            out = cache.attend(q[here], k[here], v[here])
            assert oracle.error(out, dense(q[here], k[:at], v[:at], **mask)[0]) < 1e-13
            held = max(held, comm.allreduce(cache.tokens))
        assert held < 20 + 8 + first + 4 + 3 * 64 * comm.size
        cache.crop(at - 20)
        here = slice(at - 20, at - 19)
        expect(comm, lambda: cache.attend(q[here], k[here], v[here]), OptionError, "a larger rollback=")
    for wrong in (-1, 2.0, None, True):
        expect(comm, lambda wrong=wrong: KVCache(comm, rollback=wrong, **SIZES), OptionError, "rollback: expected")
    if comm.size > 1:
        expect(comm, lambda: KVCache(comm, rollback=comm.rank, **SIZES), OptionError, "rollback is 1 here and 0")


def test_nothing_appended_drops_nothing(comm):
    """The last token sees after it what it saw before."""
    q, k, v = tokens(21, 200, "float64")
    mask = {"causal": True, "window": (20, 0)}
    last = slice(199, 200)
    want, _ = dense(q[last], k, v, **mask)
    with KVCache(comm, dtype="float64", mask=Mask(**mask), rollback=0, **SIZES) as cache:
        for at in range(200):
            cache.append(k[at:at + 1], v[at:at + 1], replicated=True)
        cache.append(k[:0], v[:0], replicated=True)
        assert oracle.error(cache.attend(q[last]), want) < 1e-13
        assert oracle.error(cache.attend(q[last], k[:0], v[:0]), want) < 1e-13


@pytest.fixture
def path(folder):
    return str(folder / "cache.h5")


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


def test_sizes_that_are_asked_of_a_file(comm, path):
    """None asks for nothing, as if it were not given; what is no integer is refused as anywhere."""
    _, k, v = tokens(23, 10)
    with KVCache(comm, dtype=None, batch=1, **SIZES) as cache:
        assert cache.dtype == "float32"
        cache.append(k[None], v[None], replicated=True)
        cache.save(path)
    for given in (dict.fromkeys(("kv_heads", "dim", "dim_v", "dtype", "batch", "capacity")),
                  {"kv_heads": np.int8(2), "dim_v": np.array(8), "dtype": np.float32, "batch": 1}):
        with KVCache.open(path, comm, **given) as cache:
            assert (cache.kv_heads, cache.dim, cache.dim_v, cache.batch, cache.dtype) == (2, 16, 8, 1, "float32")
    for name, wrong in itertools.product(("kv_heads", "dim", "dim_v", "batch"),
                                         (True, 2.0, "2", np.array([2, 2]), 0)):
        expect(comm, lambda name=name, wrong=wrong: KVCache.open(path, comm, **{name: wrong}), OptionError,
               f"KVCache: {name}: expected an integer >= 1")
    expect(comm, lambda: KVCache.open(path, comm, dim=8), OptionError, "expected a cache with dim 8, got 16")
    expect(comm, lambda: KVCache.open(path, comm, dtype=3), DtypeError, "dtype")


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


def damage(path, whole, other, kind):
    """Make one of many kinds of damaged files of a whole one, or of two."""
    Path(path).write_bytes(whole)
    name, _, what = kind.partition(" ")
    if name == "cut":
        Path(path).write_bytes(whole[:len(whole) // 2])
        return
    with h5py.File(path, "r+") as file:
        x = file[name][()]
        if what == "flipped":
            bits = np.atleast_1d(x).view(np.uint8).reshape(-1) if name != "cache" else np.frombuffer(x, np.uint8).copy()
            bits[len(bits) // 2] ^= 4
            x = np.bytes_(bits.tobytes()) if name == "cache" else x
        elif what == "of another":
            with h5py.File(other) as source:
                x = source[name][()]
        elif what == "shorter":
            x = x[:-1]
        elif what == "of other heads":
            x = np.concatenate([x, x], axis=-2)
        elif what == "of other items":
            x = x.astype("f8") if x.dtype.kind == "f" else x.astype("f4")
        elif what == "in other order":
            x = x[::-1]
        if what == "without seal":
            del file.attrs["cache_sha256"]
        else:
            del file[name]
        if what == "elsewhere":
            file[name] = h5py.ExternalLink(other, name)
        elif what not in ("missing", "without seal"):
            file[name] = x


def test_a_file_whose_parts_do_not_belong_together(comm, path, monkeypatch):
    """Each of its parts damaged, missing, of another size or of another save is one error on all ranks."""
    monkeypatch.setattr("ringmpi.kv.saving.BLOCK_BYTES", 2**13)
    other = f"{path}.other"
    for name, seed in ((other, 14), (path, 5)):
        _, k, v = tokens(seed, 400)
        with KVCache(comm, **SIZES) as cache:
            cache.append(k, v, replicated=True)
            cache.save(name)
    whole = Path(path).read_bytes()
    kinds = ["cut", "cache without seal", "cache flipped", "cache of another", "cache missing", "cache elsewhere"]
    kinds += [f"{name} {what}" for name in ("k", "v", "positions", "digests") for what in
              ("flipped", "of another", "shorter", "of other items", "in other order", "missing", "elsewhere")
              if (name, what) != ("positions", "of another")]          # which are the same
    kinds += ["k of other heads", "v of other heads"]
    for kind in kinds:
        if comm.rank == 0:
            damage(path, whole, other, kind)
        comm.Barrier()
        expect(comm, lambda: KVCache.open(path, comm), ShardError, path)
    comm.Barrier()
    if comm.rank == 0:
        Path(path).write_bytes(whole)
    comm.Barrier()
    KVCache.open(path, comm).close()
    if comm.size > 1:
        expect(comm, lambda: KVCache.open(other if comm.rank else path, comm), OptionError, "what the file says is")


@pytest.mark.parametrize("mask", [{"causal": True}, {"causal": True, "window": (40, 0), "first": 2, "q_offset": 3},
                                  {"q_offset": 3}])
def test_many_queries_that_all_ranks_have(comm, monkeypatch, mask):
    """In parts, so that what all ranks made of them takes little memory; the last failure undoes the tokens too."""
    q, k, v = tokens(17, 90)
    sinks = np.array([0.5, -1, 2, 0], "f4")
    rows = np.arange(90 - 70, 90)
    results = []
    for nbytes in (2**26, 2**13):
        monkeypatch.setattr("ringmpi.kv.steps.STATE_BYTES", nbytes)
        with KVCache(comm, backend="numpy", mask=Mask(**mask), **SIZES) as cache:
            for at in range(0, 80, 10):
                cache.append(k[at:at + 10], v[at:at + 10], replicated=True)
            accumulate, calls = Decoder.accumulate, []

            def late(decoder, query, store, length, accumulate=accumulate, calls=calls):
                calls.append(query.q.nbytes)
                if query.first and comm.rank == comm.size - 1:
                    raise MemoryError("of one rank")
                return accumulate(decoder, query, store, length)
            with monkeypatch.context() as patch:
                patch.setattr(Decoder, "accumulate", late)
                if nbytes < 2**26:
                    expect(comm, lambda: cache.attend(q[rows], k[80:], v[80:]), ResourceError, "of one rank")
                    assert max(calls) <= 2**14
            out, lse = cache.attend(q[rows], k[80:], v[80:], sinks=sinks, return_lse=True)
            assert cache.length == 90
        results.append((out, lse))
    for x, y in zip(*results, strict=True):
        assert oracle.error(x, y) <= TOLERANCE["float32"]
    expect_same(comm, results[1][0])


def test_states_take_the_memory_that_they_may(comm, monkeypatch):
    """Copies of them too, and nothing of it is kept for the next step."""
    q, k, v = (np.ones((n, 2, 64), "f4") for n in (3000, 12 * comm.size, 12 * comm.size))
    peaks = []
    monkeypatch.setattr("ringmpi.kv.decoder.KEPT_BYTES", 2**14)
    with KVCache(comm, kv_heads=2, dim=64, mask=Mask(), backend="numba") as cache:
        cache.append(k, v, replicated=True)
        for nbytes in (2**16, 2**22):
            monkeypatch.setattr("ringmpi.kv.steps.STATE_BYTES", nbytes)
            cache.attend(q)
            tracemalloc.start()
            out = cache.attend(q)
            kept, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            peaks.append(peak)
            assert kept < out.nbytes * 65 // 64 + 2**17
    assert peaks[1] - peaks[0] < 2**22


@pytest.mark.parametrize("part", [0, -1])
def test_no_memory_for_results_is_one_error_everywhere(comm, monkeypatch, part):
    """Of the first part of many queries, or of the last, on one rank; the tokens that came with them are undone."""
    monkeypatch.setattr("ringmpi.kv.steps.STATE_BYTES", 2**16)
    monkeypatch.setattr("ringmpi.kv.steps.SMALL_BYTES", 2**12)
    q, k, v = tokens(22, 200)
    combine, firsts = Decoder.combine, []

    def fail(decoder, query, rows):
        firsts.append(query.first)
        if len(firsts) == wrong and comm.rank == comm.size - 1:
            raise MemoryError("of one rank")
        return combine(decoder, query, rows)

    with KVCache(comm, timeout=20, **SIZES) as cache:
        cache.append(k[:100], v[:100], replicated=True)
        monkeypatch.setattr(Decoder, "combine", fail)
        wrong = -1
        want = cache.attend(q[100:], k[100:], v[100:])
        assert len(firsts) > 1
        cache.crop(100)
        wrong = [1, len(firsts)][part]
        firsts.clear()
        expect(comm, lambda: cache.attend(q[100:], k[100:], v[100:]), ResourceError, "of one rank")
        assert cache.length == 100
        assert (cache.attend(q[100:], k[100:], v[100:]) == want).all()


def test_names_that_are_none(comm):
    _, k, v = tokens(5, 4)
    odd = comm.rank == comm.size - 1
    with KVCache(comm, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        for name in (None, 3, b"x", "", "a\0b", 2.5):
            wrong = name if odd else "never"
            expect(comm, lambda wrong=wrong: cache.save(wrong), OptionError, "path: expected the name of a file")
            expect(comm, lambda wrong=wrong: KVCache.open(wrong if odd else __file__, comm),
                   (OptionError if comm.size == 1 else ShardError), "")
            expect(comm, lambda name=name: KVCache.open(name, comm), OptionError, "path: expected the name of a file")
        expect(comm, lambda: cache.save("/nowhere/cache.h5"), OutputError, "no such folder")
    assert not Path("never").exists()


def test_an_empty_cache_is_saved(comm, path):
    with KVCache(comm, **SIZES) as cache:
        cache.save(path)
    with KVCache.open(path, comm) as cache:
        assert (cache.length, cache.tokens) == (0, 0)


def test_integers_of_numpy(comm):
    """As sizes often are; what is no integer is refused, with the same words everywhere."""
    q, k, v = tokens(5, 6)
    sizes = {name: np.int64(size) for name, size in SIZES.items()}
    with KVCache(comm, capacity=np.uint32(6), threads=np.int8(1), **sizes) as cache:
        cache.append(k, v, replicated=True)
        cache.crop(np.int16(5))
        assert cache.attend(q[-1:]).shape == (1, 4, 8)
        for wrong in (2.0, "2", True, None, np.bool_(True), -1):
            expect(comm, lambda wrong=wrong: cache.crop(wrong), OptionError, "crop: length: expected an integer")
    assert Schedule(heads=np.int64(2), keys=np.array(3)) == Schedule(heads=2, keys=3)
    assert Mask(window=np.int64(3), first=np.uint8(2)) == Mask(window=3, first=2)
    expect(comm, lambda: Contiguous([3, 2.0]), OptionError, "contiguous layout: expected an integer for each rank")
    for wrong in (2.0, True, "2"):
        for make_it in (lambda wrong=wrong: Schedule(queries=wrong), lambda wrong=wrong: Mask(window=wrong),
                        lambda wrong=wrong: KVCache(comm, kv_heads=wrong, dim=4),
                        lambda wrong=wrong: ring_attention(q, k, v, comm=comm, dropout=0.5, seed=wrong),
                        lambda wrong=wrong: ring_attention(q, k, v, comm=comm, threads=wrong)):
            expect(comm, make_it, OptionError, "integer")


def test_documents_longer_than_the_cache(comm):
    """The last one may go on: steps and sharded queries see it so far, as a pass over the whole sequence does."""
    q, k, v = tokens(15, 60, "float64")
    documents = [0, 10, 30, 30, 55, 70]
    see = oracle.visible(60, 60, causal=True, documents=documents)
    mask = Mask(causal=True, documents=documents)
    want, _ = oracle.attend(q, k, v, see, 0.25)
    with KVCache(comm, dtype="float64", mask=mask, **SIZES) as cache:
        cache.append(k[:22], v[:22], replicated=True)
        mine = make("striped", 22, comm.size).positions(comm.rank)
        out = cache.attend(q[mine], sharded=True, layout="striped")
        assert oracle.error(out, want[mine]) < 1e-13
        for at in range(22, 60):
            out = cache.attend(q[at:at + 1], k[at:at + 1], v[at:at + 1])
            assert oracle.error(out, want[at:at + 1]) < 1e-13
        mine = make("contiguous", 60, comm.size).positions(comm.rank)
        assert oracle.error(cache.attend(q[mine], sharded=True), want[mine]) < 1e-13
        ahead = Mask(documents=[0, 10, 70], q_offset=58)          # positions that are still to come
    with KVCache(comm, dtype="float64", mask=ahead, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        alike = cache.attend(q[:4])
        see = oracle.visible(4, 60, documents=[0, 10, 70], q_offset=58)
        assert oracle.error(alike, oracle.attend(q[:4], k, v, see, 0.25)[0]) < 1e-13
        mine = make("contiguous", 4, comm.size).positions(comm.rank)
        assert oracle.error(cache.attend(q[mine], sharded=True), alike[mine]) < 1e-13


@pytest.mark.parametrize("mask", [Grid((4, 5), 1), Mask(document_ids=[0] * 50),
                                  Mask(documents=[0, 5, 10], q_documents=[0, 1, 2])])
def test_masks_of_a_whole_sequence_are_refused(comm, mask):
    expect(comm, lambda: KVCache(comm, mask=mask, **SIZES), OptionError, "grows; expected")


@pytest.mark.parametrize(("batch", "few"), [(None, True), (2, False)])
def test_memory_is_that_of_a_piece(comm, path, monkeypatch, batch, few):
    """What is made besides the cache does not grow with it: sharded queries, save, open and reorder."""
    monkeypatch.setattr("ringmpi.kv.prompt.PIECE_BYTES", 2**18)
    monkeypatch.setattr("ringmpi.kv.store.PIECE_BYTES", 2**16)
    monkeypatch.setattr("ringmpi.kv.saving.BLOCK_BYTES", 2**16)
    monkeypatch.setattr("ringmpi.backends.numpy_.ROWS", 16)
    monkeypatch.setattr("ringmpi.backends.numpy_.COLUMNS", 256)
    length, n_q = 4800 * comm.size, 6 if few else 40
    rng = np.random.default_rng(16)
    q, k, v = (rng.standard_normal(([batch] if batch else []) + [n, 2, 64], "f4") for n in (n_q, length, length))
    mine = make("contiguous", n_q, comm.size).positions(comm.rank)
    peaks = {}
    monkeypatch.setattr("ringmpi.kv.prompt.fewest_bytes",
                        lambda size, queries, keys: Schedule(queries=size) if few else Schedule(keys=size))

    def measured(name, work):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        result = work()
        peaks[name] = tracemalloc.get_traced_memory()[1] - before
        return result

    with KVCache(comm, kv_heads=2, dim=64, batch=batch, backend="numpy") as cache:
        cache.append(k[..., :32, :, :], v[..., :32, :, :], replicated=True)
        cache.attend(q[..., mine, :, :][..., :0, :, :], sharded=True)          # imports
        cache.crop(0)
        for at in range(0, length, 480):
            here = slice(at, at + 480)
            cache.append(k[..., here, :, :], v[..., here, :, :], replicated=True)
        assert len(cache._core.contents.store.chunks) > 3
        size = cache.nbytes // 2
        asked = q[..., mine, :, :]
        want = cache.attend(q)[..., mine, :, :]
        tracemalloc.start()
        got = measured("attend", lambda: cache.attend(asked, sharded=True))
        if batch:
            measured("reorder", lambda: cache.reorder([1, 0]))
            measured("reorder", lambda: cache.reorder([1, 0]))
        measured("save", lambda: cache.save(path))
        tracemalloc.stop()
    assert oracle.error(got, want, np.abs(want).max(initial=0) or 1.0) <= TOLERANCE["float32"]
    positions = 8 * length * (2 + 4)
    bound = {"attend": positions + 2**20, "save": positions + 2**19, "reorder": 2**17 + 2**16}
    assert all(peak < bound[name] < size for name, peak in peaks.items()), (peaks, bound, size)
    with KVCache.open(path, comm, backend="numpy") as cache:
        assert oracle.error(cache.attend(q), np.asarray(comm.bcast(cache.attend(q)))) == 0
        again = cache.attend(asked, sharded=True)
    assert oracle.error(again, want, np.abs(want).max(initial=0) or 1.0) <= TOLERANCE["float32"]


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
    for options, text in (({"kv_heads": 0}, "kv_heads: expected"), ({"batch": 0}, "batch: expected"),
                          ({"capacity": -1}, "capacity: expected"), ({"dim": 2.5}, "dim: expected")):
        expect(comm, lambda options=options: KVCache(comm, **{**SIZES, **options}), OptionError, text)
    with pytest.raises(TypeError, match="here that is mask="):
        KVCache(comm, **SIZES, causal=True)


def test_an_error_on_one_rank_is_heard_by_all(comm, monkeypatch, path):
    """What does not fit, or fails, on one rank is one error on all of them, and the cache is as it was."""
    length = 16 * comm.size
    q, k, v = tokens(8, length)
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

        def fail(store, *_):
            raise MemoryError("of one rank")

        with monkeypatch.context() as patch:
            if odd:
                patch.setattr("ringmpi.kv.store.KVStore.pieces", fail)
                patch.setattr("ringmpi.kv.store.KVStore.views", fail)
            expect(comm, lambda: cache.attend(q, sharded=True), ResourceError, "of one rank")
            expect(comm, lambda: cache.save(path), ResourceError, "of one rank")
        assert not list(Path(path).parent.iterdir())
        cache.save(path)
        assert (cache.attend(q[-1:]) == want).all()
        assert cache.length == length
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


def test_no_memory_to_reorder_loses_nothing(comm, monkeypatch):
    """On one rank: all hear of it in the next call, and it may be tried again there."""
    q, k, v = (np.stack([x, 2 * x, 3 * x]) for x in tokens(24, 40))
    odd = comm.rank == comm.size - 1
    with KVCache(comm, batch=3, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        cache.attend(q[:, -1:])

        def fail(*_):
            raise MemoryError("of one rank")

        with monkeypatch.context() as patch:
            if odd:
                patch.setattr(cache._core.contents.store, "_empty", fail)
            with pytest.raises(MemoryError) if odd else nullcontext():
                cache.reorder([2, 0, 0])
        if comm.size > 1:
            for call in (lambda: cache.attend(q[:, -1:]), lambda: cache.append(k, v), lambda: cache.save("never")):
                expect(comm, call, OptionError, "order of the batch")
        if odd:
            cache.reorder([2, 0, 0])
        again = cache.attend(q[[2, 0, 0], -1:])
        for i, source in enumerate((2, 0, 0)):
            wanted, _ = dense(q[source, -1:], k[source], v[source], causal=True)
            assert oracle.error(again[i], wanted, np.abs(wanted).max()) <= TOLERANCE["float32"]


def test_a_reorder_that_is_interrupted(comm, monkeypatch):
    """Half way, on one rank: all hear of it, again and again, until the cache is emptied."""
    q, k, v = (np.stack([x, 2 * x]) for x in tokens(25, 16 * comm.size))
    odd = comm.rank == comm.size - 1
    moved = []

    def interrupt(target, source):
        moved.append(target)
        if len(moved) == 3:
            raise KeyboardInterrupt
        assign(target, source)

    with KVCache(comm, batch=2, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        with monkeypatch.context() as patch:
            if odd:
                patch.setattr("ringmpi.kv.store.assign", interrupt)
            with pytest.raises(KeyboardInterrupt) if odd else nullcontext():
                cache.reorder([1, 0])
        for call in 2 * (lambda: cache.attend(q[:, -1:]), lambda: cache.append(k, v), lambda: cache.save("never"),
                         lambda: cache.attend(q[:, -1:], sharded=True)):
            expect(comm, call, RingError, f"rank {comm.size - 1}: this KVCache is of no use any more")
        if odd:
            for local in (lambda: cache.crop(5), lambda: cache.reorder([1, 0])):
                with pytest.raises(RingError, match="of no use"):
                    local()
        cache.crop(0)
        cache.append(k, v, replicated=True)
        for i, out in enumerate(cache.attend(q[:, -1:])):
            wanted, _ = dense(q[i, -1:], k[i], v[i], causal=True)
            assert oracle.error(out, wanted, np.abs(wanted).max()) <= TOLERANCE["float32"]


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_an_interrupt_leaves_no_loop_behind(comm, monkeypatch, backend):
    """Ctrl-C within a loop of the backend: a rank that is alone goes on, and others on another communicator."""
    monkeypatch.setattr("ringmpi.backends.numpy_.ROWS", 16)
    q, k, v = tokens(26, 600)
    causal, want = Mask(causal=True), dense(q[-200:], k, v, causal=True)[0]

    def interrupt(*_):
        raise KeyboardInterrupt

    held = []

    def check(out):
        assert oracle.error(out, want, np.abs(want).max()) <= TOLERANCE["float32"]

    alone = comm.Split(comm.rank)
    with KVCache(alone, backend=backend, threads=2, **SIZES) as cache, \
            RingAttention(alone, backend=backend, threads=2, mask=causal) as attention:
        cache.append(k[:400], v[:400], replicated=True)
        attention(q, k, v)
        works = (lambda: cache.attend(q[-200:], k[400:], v[400:]), lambda: cache.attend(q[200:400], sharded=True),
                 lambda: attention(q, k, v), lambda: attention.backward(q[..., :8]))
        for work in works:
            with monkeypatch.context() as patch:
                for name in ("progress", "heed_notices"):          # one of them is called between tiles
                    patch.setattr(Waiter, name, interrupt)
                with pytest.raises(KeyboardInterrupt) as caught:
                    work()
            held.append(caught)                # with its frames, as a console does
            assert cache.length == 400
            check(attention(q, k, v)[-200:])
        check(cache.attend(q[-200:], k[400:], v[400:]))
    alone.Free()
    lost = comm.Dup()
    with KVCache(lost, backend=backend, timeout=20, **SIZES) as cache:
        cache.append(k[:400], v[:400], replicated=True)
        comm.Barrier()                            # a rank that is still in this would hear of the interrupt there
        with monkeypatch.context() as patch:
            if comm.rank == 0:
                for name in ("progress", "heed_notices"):          # one of them is called between tiles
                    patch.setattr(Waiter, name, interrupt)
            with pytest.raises((KeyboardInterrupt, RankLost) if comm.rank else KeyboardInterrupt):
                cache.attend(q[-200:], k[400:], v[400:])
        assert cache.length == 400
    other = comm.Dup()
    with KVCache(other, backend=backend, **SIZES) as cache:
        cache.append(k, v, replicated=True)
        check(cache.attend(q[-200:]))
    other.Free()


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
