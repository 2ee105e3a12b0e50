"""A mask for each element of a batch, and intervals that are made piece by piece. Runs under mpiexec."""

import numpy as np
import oracle
import pytest
from cases import make_layout, make_mask
from oracle import random_qkv

from ringmpi import Grid, KVCache, Mask, MaskError, OptionError, RingAttention, ring_attention
from ringmpi import bounds as module

pytestmark = pytest.mark.mpi

N = 60
# What the elements of a batch see, as the oracle knows it; None: the window over a grid below.
ELEMENTS = [{"causal": True}, {"window": (7, 2), "keys": 41}, None, {"causal": True}, {"keys": 0},
            {"causal": True, "key_mask": np.arange(N) % 7 > 2}]
GRID = Grid((6, 10), (1, 2), periodic=(False, True))


def seen(mask):
    if mask is not None:
        return oracle.visible(N, N, **mask)
    x, y = np.divmod(np.arange(N), 10)
    apart = abs(y[:, None] - y)
    return (abs(x[:, None] - x) <= 1) & (np.minimum(apart, 10 - apart) <= 2)


def passes(comm, masks, see, layout, function="plain", **options):
    """Check one forward and backward pass with arrays that have a batch axis against a dense softmax."""
    arrays = [random_qkv(seed, N, N, 4, 2, 8, 12, "float64") for seed in range(len(see))]
    rng = np.random.default_rng(9)
    dout, dlse = rng.standard_normal((len(see), N, 4, 12)), rng.standard_normal((len(see), N, 4))
    shards = make_layout(layout, N, comm.size)
    mine = shards.positions(comm.rank)
    score, sinks = oracle.functions(function, 4, np.arange(N), np.arange(N), 3)
    score.pop("dropout", None)
    given = {"softcap": score.get("softcap"), "alibi": score.get("slopes")}
    q, k, v = (np.stack([x[i][mine] for x in arrays]) for i in range(3))
    with RingAttention(comm, mask=masks, layout=layout if layout == "striped" else shards, **given,
                       **options) as attention:
        out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
        dq, dk, dv, *_ = attention.backward(dout[:, mine], dlse[:, mine])
        pairs = attention.trace.pairs
    for number, x in enumerate(arrays):
        want = oracle.dense(*x, see[number], 8**-0.5, dout=dout[number], dlse=dlse[number], sinks=sinks, **score)
        got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        for name, part in got.items():
            assert oracle.error(part[number], want[name][mine]) < 1e-12, (number, name)
    return comm.allreduce(pairs)


@pytest.mark.parametrize("options", [{"layout": "striped"}, {"layout": "uneven", "schedule": "ring"},
                                     {"layout": "contiguous", "function": "all", "backend": "numpy"},
                                     {"layout": "contiguous", "order": "canonical"}], ids=str)
def test_a_mask_for_each_element(comm, options):
    masks = [GRID if mask is None else Mask(**mask) for mask in ELEMENTS]
    passes(comm, masks, [seen(mask) for mask in ELEMENTS], **options)


def test_keys_of_each_element(comm):
    lengths = [60, 0, 17, 60]
    see = [oracle.visible(N, N, window=(9, 3), keys=length) for length in lengths]
    passes(comm, Mask(window=(9, 3), keys=lengths), see, "striped")
    there = np.arange(N) % 5 > 0
    passes(comm, Mask(causal=True, keys=lengths, key_mask=there),
           [oracle.visible(N, N, causal=True, keys=length, key_mask=there) for length in lengths], "contiguous")


def test_errors_are_the_same_on_all_ranks(comm):
    q, k, v = (np.zeros((2, 3, 1, 4)) for _ in range(3))
    rows = 3 * comm.size
    for mask, error, text in (
            ([Mask()], MaskError, "got 1 masks and a batch of 2"), ([Mask(), 3], OptionError, "got 3 for element 1"),
            ([Mask(), [Mask()]], OptionError, "for element 1"),
            ([Mask(), Mask(keys=rows + 1)], MaskError, r"element 1 of the batch"),
            ([Mask(keys=[1, 2]), Mask()], OptionError, "for several for element 0"),
            (Mask(keys=[1, 2, 3]), MaskError, "got 3 and a batch of 2"),
            (Mask(key_mask=[True]), MaskError, f"each of {rows} keys, got 1")):
        with pytest.raises(error, match=text):
            ring_attention(q, k, v, comm=comm, mask=mask)
    with pytest.raises(MaskError, match="without a batch axis"):
        ring_attention(q[0], k[0], v[0], comm=comm, mask=[Mask()])
    for mask in ([Mask()], Mask(keys=3), Mask(key_mask=[True])):
        with pytest.raises(OptionError, match="this one grows"):
            KVCache(comm, kv_heads=1, dim=4, mask=mask)


@pytest.mark.parametrize("mask", [[], Mask(keys=[]), [Mask(causal=True)] * 0], ids=str)
def test_a_batch_of_none(comm, mask):
    x = np.ones((0, 5, 2, 4))
    with RingAttention(comm, mask=mask) as attention:
        assert attention(x, x, x).shape == x.shape
        assert [dx.shape for dx in attention.backward(x)] == [x.shape] * 3


def test_bits_do_not_depend_on_calls_before(comm):
    """Blocks travel in part, but as they are in a call that may be left: each call has the plan that it needs."""
    n = 400 * comm.size
    mask = Mask(key_mask=(np.arange(n) < 400) | (np.arange(n) % 400 < 10))
    schedule = f"2x1x{comm.size // 2}:two-way" if comm.size % 2 == 0 else f"1x1x{comm.size}:two-way"
    q, k, v = random_qkv(comm.rank, 7, 400, 2, 2, 8, 8, "float64")
    with RingAttention(comm, mask=mask, schedule=schedule) as attention:
        first = attention(q, k, v)
        stopped = attention(q, k, v, stop=lambda: False)
        assert oracle.error(stopped, first) < 1e-13
        assert (attention(q, k, v) == first).all()
    if comm.size % 2 == 0:                    # groups of keys that send different columns agree nevertheless
        with RingAttention(comm, mask=mask, schedule=f"1x2x{comm.size // 2}:ring") as attention:
            attention(q, k, v)
            with pytest.raises(OptionError, match="no queries travel"):
                attention(q, k, v, stop=lambda: False)


@pytest.mark.parametrize("kind", ["causal", "trees", "holes", "grid"])
@pytest.mark.parametrize("options", [{"schedule": "ring"}, {"schedule": "broadcast", "order": "canonical"},
                                     {"schedule": "gather", "backend": "numpy"}], ids=str)
def test_intervals_made_piece_by_piece(comm, monkeypatch, kind, options):
    """The result is that of intervals that are there at once, and no more are made at a time than a piece has."""
    made, bounds = [], (Grid if kind == "grid" else Mask).bounds
    mask = GRID if kind == "grid" else Mask(**make_mask(kind, N))
    see = seen(None) if kind == "grid" else oracle.visible(N, N, **make_mask(kind, N))
    options = options | {"schedule": f"1x1x{comm.size}:{options['schedule']}"}
    at_once = passes(comm, mask, [see], "contiguous", **options)
    monkeypatch.setattr(module, "LEAST_ROWS", 3)
    monkeypatch.setattr(module, "PIECE_BYTES", 0)
    monkeypatch.setattr(type(mask), "bounds", lambda self, queries, *n: made.append(len(queries)) or bounds(
        self, queries, *n))
    assert passes(comm, mask, [see], "contiguous", **options) == at_once
    assert max(made) <= (192 if "order" in options else 3)            # a tile in canonical order


@pytest.mark.parametrize("carrier", ["ring", "two-way", "gather", "broadcast", "window"])
@pytest.mark.parametrize("mask", [{"window": (9, 3)}, {"window": (0, 11), "first": 2}], ids=str)
def test_only_what_others_see_travels(comm, carrier, mask):
    """Forward and backward, with shards of unequal lengths that are sent in part."""
    shards = make_layout("uneven", 700, comm.size)
    mine = shards.positions(comm.rank)
    q, k, v = random_qkv(1, 700, 700, 2, 1, 8, 4, "float64")
    rng = np.random.default_rng(2)
    dout, dlse = rng.standard_normal((700, 2, 4)), rng.standard_normal((700, 2))
    want = oracle.dense(q, k, v, oracle.visible(700, 700, **mask), 8**-0.5, dout=dout, dlse=dlse)
    with RingAttention(comm, mask=Mask(**mask), layout=shards, schedule=f"1x1x{comm.size}:{carrier}") as attention:
        out = attention(q[mine], k[mine], v[mine])
        gradients = attention.backward(dout[mine], dlse[mine])
        stopped = attention(q[mine], k[mine], v[mine], stop=lambda: False)           # whole blocks travel
        again = attention(q[mine], k[mine], v[mine])
    for name, got in zip(("out", "dq", "dk", "dv", "out", "out"), (out, *gradients, stopped, again), strict=True):
        assert oracle.error(got, want[name][mine]) < 1e-12, name


def test_the_halo_is_all_that_is_sent(comm):
    """Shards of 100 tokens, so that a section is a token or none: 9 before and 3 after, to each neighbour."""
    n = 100 * comm.size
    x = np.ones((100, 1, 8))
    with RingAttention(comm, mask=Mask(window=(9, 3)), schedule="gather") as attention:
        attention(x, x, x[..., :4])
        sent = attention.trace.bytes_sent
        attention.backward(x[..., :4])
        gradients = attention.trace.gradient_bytes_sent
    before, after = (comm.rank < comm.size - 1) * 9, (comm.rank > 0) * 3
    assert attention.trace.pairs > 0
    assert sent == (before + after) * ((before > 0) + (after > 0)) * 12 * 8, n
    other = [(rank < comm.size - 1) * 9 + (rank > 0) * 3 for rank in (comm.rank - 1, comm.rank + 1)]
    assert gradients == (other[0] * (comm.rank > 0) + other[1] * (comm.rank < comm.size - 1)) * 12 * 8
