"""Second derivatives and the JVP on this run's ranks, against torch's own of a dense softmax. Runs under mpiexec."""

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")

from cases import make_layout, make_mask  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

import ringmpi  # noqa: E402
import ringmpi.torch  # noqa: E402
from ringmpi.call import Direction, Inputs  # noqa: E402
from ringmpi.dtypes import DTYPES  # noqa: E402
from ringmpi.layout import Replicated  # noqa: E402
from ringmpi.score import dropout_keys, random_words  # noqa: E402

# Of torch's own forward mode.
pytestmark = [pytest.mark.mpi, pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")]

SCALE = 0.4
BOUND = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 2.0**-5}
NAMES = ("dout", "dlse", "q", "k", "v", "sinks", "key_bias", "relative")


def dense(q, k, v, sinks, see, key_bias=None, *, softcap=0.0, slopes=None, dropout=0.0, dropout_keys=None, queries=None,
          keys=None, relative=None, away=None):
    """Attention by torch alone, from the definitions: out and lse of queries (n_q, heads, dim)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * SCALE
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        far = torch.from_numpy(np.abs(queries[:, None] - keys).astype(float))
        scores = scores - torch.as_tensor(slopes)[:, None, None] * far
    if key_bias is not None:
        scores = scores + key_bias.T[:, None]
    if relative is not None:
        reach = relative.shape[1] // 2
        scores = scores + relative[:, torch.from_numpy(np.clip(away[0], -reach, reach) + reach)]
    scores = scores.masked_fill(~torch.from_numpy(see), -torch.inf)
    blind = (scores == -torch.inf).all(dim=2, keepdim=True)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=2)
        blind = torch.zeros_like(blind)
    scores = scores.masked_fill(blind, 0.0)
    weights = torch.softmax(scores, dim=2).masked_fill(blind, 0.0)[:, :, :len(k)]
    if dropout:
        words = random_words(np.asarray(dropout_keys)[:, None, None], queries[:, None], keys)
        threshold = int(dropout * 2**32)
        weights = weights * torch.from_numpy((words >= threshold) / (1 - threshold / 2**32))
    lse = torch.logsumexp(scores, dim=2).T
    return torch.einsum("hij,jhd->ihd", weights, v), torch.where(blind[:, :, 0].T, -torch.inf, lse)


def twice(arrays, cotangents, directions, see, score):
    """Second derivatives by torch: of the gradients along directions, by dout, dlse and the inputs."""
    given, starts, along = ([None if x is None else torch.from_numpy(x.astype(np.float64)) for x in some]
                            for some in (arrays, cotangents, directions))
    inputs, along = ([x for x in some if x is not None] for some in (given, along))
    for x in (*inputs, *starts):
        x.requires_grad_()
    results = dense(*given[:4], see, given[4], relative=given[5], **score)
    first = torch.autograd.grad(results, inputs, starts, create_graph=True)
    second = torch.autograd.grad(first, [*starts, *inputs], along, allow_unused=True)
    names = [name for name, x in zip(NAMES, [*starts, *given], strict=True) if x is not None]
    return {name: np.zeros(x.shape) if y is None else y.numpy()
            for name, x, y in zip(names, [*starts, *inputs], second, strict=True)}


def check(comm, function="all", layout="contiguous", mask="causal", *, schedule="ring", backend="numpy", n_q=None,
          length=61, heads=(4, 2), dtype="float64", batch=None, seed=0, in_keys=False):
    """The second derivative and the JVP of a call on the ranks, of shards of random arrays."""
    rng = np.random.default_rng(seed)
    n_q, size = length if n_q is None else n_q, comm.size
    dtype_of = DTYPES[dtype]

    def random(*shape):
        return rng.standard_normal((batch or 1, *shape)).astype(dtype_of)

    q, q_dot = (random(n_q, heads[0], 6) for _ in range(2))
    k, k_dot = (random(length, heads[1], 6) for _ in range(2))
    v, v_dot, dout = *(random(length, heads[1], 5) for _ in range(2)), random(n_q, heads[0], 5)
    dlse = rng.standard_normal((batch or 1, n_q, heads[0]))
    options = make_mask(mask, length, n_q)
    positions = ringmpi.Mask(**options).positions(np.arange(n_q), n_q, length)
    score, sinks = oracle.functions(function, heads[0], positions, np.arange(length), seed)
    sinks_dot = None if sinks is None else rng.standard_normal(heads[0])
    bias = score.pop("key_bias", None)
    bias = None if bias is None else bias + random(*bias.shape).astype(np.float64)         # of each element its own
    bias_dot = None if bias is None else rng.standard_normal(bias.shape)
    table, = score.pop("relative", [None])
    table_dot = None if table is None else rng.standard_normal(table.shape)
    if in_keys:
        v, v_dot = k[..., :5], k_dot[..., :5]
    q_layout, kv_layout = make_layout(layout, n_q, size), make_layout(layout, length, size)
    specs = [layout if layout in ("striped", "zigzag") else x for x in (q_layout, kv_layout)]
    if schedule == "replicated":
        q_layout, specs[0], schedule = Replicated(n_q, size), "replicated", "auto"
    mine, theirs = q_layout.positions(comm.rank), kv_layout.positions(comm.rank)

    def shard(x, part):
        return np.ascontiguousarray(x[:, part] if batch else x[0, part])

    def of_keys(x):
        return None if x is None else shard(x if x.shape[2] > 1 else x[..., 0], theirs)

    with ringmpi.RingAttention(comm, mask=ringmpi.Mask(**options), scale=SCALE, softcap=score.get("softcap"),
                               layout=specs[0], kv_layout=specs[1], alibi=score.get("slopes"),
                               dropout=score.get("dropout", 0.0), schedule=schedule, backend=backend,
                               timeout=60) as attention:
        inputs = Inputs(shard(q, mine), shard(k, theirs), None if in_keys else shard(v, theirs), sinks, seed,
                        dim_v=5 if in_keys else None, key_bias=of_keys(bias), relative=table)
        along = Direction(shard(q_dot, mine), shard(k_dot, theirs), None if in_keys else shard(v_dot, theirs),
                          sinks_dot, of_keys(bias_dot), table_dot)
        out, lse, out_dot, lse_dot = attention.jvp(*inputs[:3], *along[:3], dim_v=inputs.dim_v, sinks=sinks,
                                                   sinks_dot=sinks_dot, seed=seed, key_bias=inputs.key_bias,
                                                   key_bias_dot=along.key_bias, relative=table, relative_dot=table_dot)
        got = attention._differentiate_twice(0, shard(dout, mine), shard(dlse, mine).astype(lse.dtype), along,
                                             inputs._replace(out=out, lse=lse))
        trace, taken = attention.trace, attention.schedule
    got = {name: x for name, x in zip(NAMES, got, strict=True) if x is not None}
    for name in sorted({"sinks", "relative"} & set(got)):
        got[name] = comm.allreduce(got[name].astype(float))
    assert np.array_equal(got["dout"], out_dot)
    assert np.array_equal(got["dlse"], lse_dot)
    assert all(got[name].dtype == dtype_of for name in {"dout", "q", "k", "v"} & set(got))

    see = oracle.visible(n_q, length, **options)
    want, keys = [], dropout_keys(seed, batch or 1, heads[0])
    for i in range(batch or 1):
        ours = score | ({"dropout_keys": keys[i]} if "dropout_keys" in score else {})
        biases = (None, None) if bias is None else (bias[i], bias_dot[i])
        want.append(twice((q[i], k[i], v[i], sinks, biases[0], table), (dout[i], dlse[i]),
                          (q_dot[i], k_dot[i], v_dot[i], sinks_dot, biases[1], table_dot), see, ours))
        if in_keys:
            want[-1]["k"][..., :5] += want[-1].pop("v")
    largest = max(np.abs(x[name]).max(initial=0) for x in want for name in {"q", "k", "v"} & set(x))
    for name, x in got.items():
        whole = np.stack([one[name] for one in want])
        part = (whole.sum(axis=0) if name in ("sinks", "relative") else of_keys(whole) if name == "key_bias" else
                shard(whole, theirs if name in "kv" else mine))
        assert x.shape == part.shape
        least = largest if name in ("q", "k", "v", "relative") else 0.0            # sums that cancel
        error = oracle.error(x, part, max(np.abs(whole).max(initial=0), least) or 1.0)
        assert error <= BOUND[dtype], (name, error)
    blind = ~see[mine].any(axis=1)
    assert (got["q"][..., blind, :, :] == 0).all()
    return trace, taken


def test_gradgradcheck():
    from mpi4py import MPI
    rng = torch.Generator().manual_seed(0)
    shapes = (1, 4, 2, 3), (1, 4, 1, 3), (1, 4, 1, 2), (2,), (1, 4, 2), (2, 5)
    inputs = [torch.randn(shape, dtype=torch.float64, generator=rng).requires_grad_() for shape in shapes]
    with ringmpi.RingAttention(MPI.COMM_SELF, mask=ringmpi.Mask(causal=True), backend="numpy", softcap=2.0, dropout=0.2,
                               alibi=[0.1, 0.4]) as attention:
        def attend(*x):
            return ringmpi.torch.ring_attention(*x[:3], sinks=x[3], key_bias=x[4], relative=x[5], attention=attention,
                                                seed=3, return_lse=True)

        assert torch.autograd.gradgradcheck(attend, inputs)
        assert torch.autograd.gradcheck(attend, inputs, check_forward_ad=True)


@pytest.mark.parametrize("function", oracle.FUNCTIONS + oracle.BIASES + oracle.DISTANCES[:-1])
def test_score_functions(comm, function):
    check(comm, function, "striped", "causal")


@pytest.mark.parametrize("function", ["plain", "all and left out by head", "all and relative"])
@pytest.mark.parametrize("schedule", ["ring", "queries", "heads"])
def test_values_that_are_the_first_numbers_of_keys(comm, function, schedule):
    check(comm, function, "uneven", "causal", in_keys=True, batch=2, schedule=schedule,
          heads=(2 * comm.size, 2) if schedule == "heads" else (4, 2))


@pytest.mark.parametrize(("layout", "mask"), [("uneven", "window"), ("empty", "documents"), ("zigzag", "all"),
                                              ("custom", "trees"), ("contiguous", "first"), ("uneven", "full")])
def test_layouts_and_masks(comm, layout, mask):
    check(comm, "all", layout, mask, heads=(3, 1), seed=2)


@pytest.mark.parametrize(("n_q", "length"), [(29, 61), (61, 1), (0, 7), (7, 0), (200, 600)])
def test_numbers_of_tokens(comm, n_q, length):
    check(comm, "sinks", "uneven", "causal", n_q=n_q, length=length, backend="numba")


@pytest.mark.parametrize("schedule", ["gather", "queries", "heads", "mesh", "replicated", "two-way", "broadcast",
                                      "window"])
def test_schedules(comm, schedule):
    """Heads, queries and keys shared; heads of the keys that several ranks have."""
    if schedule in ("two-way", "broadcast", "window"):
        schedule = ringmpi.Schedule(keys=comm.size, carrier=schedule)
    heads = (2 * comm.size, 2) if schedule == "heads" else (4, 2)
    for function in ("all", "left out", "all and left out by head", "left out by head and relative"):
        _, taken = check(comm, function, "striped", "causal", schedule=schedule, heads=heads, batch=2)
        assert taken.ranks == comm.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrower_dtypes(comm, dtype):
    check(comm, "softcap", "striped", "causal", dtype=dtype)


def test_what_travels(comm):
    """Keys, values and their tangents twice, and the sums for keys and values home; nothing that grows as n x n."""
    trace, _ = check(comm, "plain", "contiguous", "full", length=24 * comm.size)
    block = 24 * 2 * (6 + 5) * 8
    assert sum(step.bytes_sent for step in trace.steps) == 2 * 2 * (comm.size - 1) * block
    assert sum(step.gradient_bytes_sent for step in trace.steps) == (comm.size - 1) * block
    assert trace.pairs == 2 * 24 * 24 * comm.size


def test_nan_reaches_what_sees_it_and_nothing_else(comm):
    """Of a value, of a tangent of a key, and of a row of dout, which one rank has."""
    layout, n = "striped", 40
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((n, heads, 6)) for heads in (4, 4, 2, 2, 2, 2, 4)]
    mine = make_layout(layout, n, comm.size).positions(comm.rank)
    for place, bad in ((4, 7), (3, 11), (6, 30)):
        spoilt = [x.copy() for x in arrays]
        spoilt[place][bad, 1] = np.nan
        q, q_dot, k, k_dot, v, v_dot, dout = (x[mine] for x in spoilt)
        with ringmpi.RingAttention(comm, mask=ringmpi.Mask(causal=True), layout=layout, backend="numpy") as attention:
            out, lse, out_dot, _ = attention.jvp(q, k, v, q_dot, k_dot, v_dot)
            got = attention._differentiate_twice(0, dout, None, Direction(q_dot, k_dot, v_dot),
                                                 Inputs(q, k, v, None, 0, out, lse))
        if place == 6:
            for x in got[3:5]:
                assert np.array_equal(np.isnan(x).all(axis=2), np.outer(mine <= bad, [True, False]))
                assert np.array_equal(np.isnan(x).any(axis=2), np.outer(mine <= bad, [True, False]))
            continue
        sees = mine >= bad
        for x in (out_dot, got[2]):
            assert np.isnan(x[sees][:, 2:]).any(axis=2).all()
            assert np.isfinite(x[~sees]).all()
            assert np.isfinite(x[:, :2]).all()


def own(comm, n, seed=0, layout="striped"):
    """Random q, k and v, as tensors that require gradients, and this rank's tokens of them."""
    rng = torch.Generator().manual_seed(seed)
    whole = [torch.randn(n, heads, dim, generator=rng, dtype=torch.float64).requires_grad_()
             for heads, dim in ((4, 6), (2, 6), (2, 5))]
    mine = torch.from_numpy(make_layout(layout, n, comm.size).positions(comm.rank))
    return whole, [x.detach()[mine].requires_grad_() for x in whole], mine


def test_a_gradient_penalty_trains_through_torch(comm):
    """A loss with gradients in it, by q, k, v and by what the loss itself is made of."""
    whole, parts, mine = own(comm, 21)
    see = np.tril(np.ones((21, 21), bool))

    def penalty(q, k, v, attend):
        out, lse = attend(q, k, v)
        loss = (out.sin().sum(dim=(1, 2)) + lse.square().sum(dim=1)).sum()
        grads = torch.autograd.grad(loss, (q, k, v), create_graph=True)
        return loss + sum(x.pow(3).sum() for x in grads)

    with ringmpi.RingAttention(comm, mask=ringmpi.Mask(causal=True), layout="striped", scale=SCALE) as attention:
        penalty(*parts, lambda *x: ringmpi.torch.ring_attention(*x, attention=attention, return_lse=True)).backward()
    penalty(*whole, lambda *x: dense(*x, None, see)).backward()
    for x, y in zip(parts, whole, strict=True):
        assert torch.allclose(x.grad, y.grad[mine], rtol=1e-9, atol=1e-10)


def test_forward_mode(comm):
    whole, parts, mine = own(comm, 17, seed=1)
    see = np.ones((17, 17), bool)
    tangents = [torch.cos(3 * x.detach()) for x in whole]
    want = torch.func.jvp(lambda *x: dense(*x, None, see), tuple(x.detach() for x in whole), tuple(tangents))[1]
    with forward_ad.dual_level():
        q, k, v = (forward_ad.make_dual(x, y[mine]) for x, y in zip(parts, tangents, strict=True))
        results = ringmpi.torch.ring_attention(q, k, v, comm=comm, layout="striped", scale=SCALE, return_lse=True)
        got = [forward_ad.unpack_dual(x).tangent for x in results]
        assert all(torch.allclose(x, y[mine], atol=1e-12) for x, y in zip(got, want, strict=True))
        with pytest.raises(ringmpi.RingError, match="a derivative in a direction alone, got a gradient of one"):
            got[0].sum().backward()


@pytest.mark.parametrize("several", [False, True])
def test_a_bias_by_distance_and_values_in_keys_through_torch(comm, several):
    """A penalty on gradients of tables, by all else; tables for the axes of a grid, and forward mode."""
    mask, n = ringmpi.Grid((4, 6), (2, 2), periodic=(True, False)), 24
    whole, parts, mine = own(comm, n, seed=3)
    rng, points = torch.Generator().manual_seed(5), np.arange(n)
    tables = [torch.randn(4, width, generator=rng, dtype=torch.float64) for width in ((5, 3) if several else (11,))]
    away = (oracle.distances(mask.shape, mask.periodic, points, points) if several else
            [points[:, None] - points])
    see = torch.from_numpy(oracle.near(mask.shape, list(mask.sides), mask.periodic, mask.edges, mask.causal))

    def exact(q, k, *given):
        added = sum(x[:, torch.from_numpy(np.clip(d, -(x.shape[1] // 2), x.shape[1] // 2) + x.shape[1] // 2)]
                    for x, d in zip(given, away, strict=True))
        scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, dim=1)) * SCALE + added
        scores = scores.masked_fill(~see, -torch.inf)
        values = k[..., :5].repeat_interleave(2, dim=1)
        return torch.einsum("hij,jhd->ihd", torch.softmax(scores, 2), values), torch.logsumexp(scores, 2).T

    def penalty(attend, *x):
        out, lse = attend(*x)
        loss = out.sin().sum() + lse.square().sum()
        grads = torch.autograd.grad(loss, x, create_graph=True)
        return loss + sum(g.pow(2).sum() for g in grads[:2]) + sum((g * g.detach().cos()).sum() for g in grads[2:])

    def ours(q, k, *given, attention):
        return ringmpi.torch.ring_attention(q, k, dim_v=5, relative=given if several else given[0], return_lse=True,
                                            attention=attention)

    with ringmpi.RingAttention(comm, mask=mask, layout="striped", scale=SCALE) as attention:
        # Each rank's share of the gradient by a table has a cotangent of its own, as every rank's loss counts.
        x = [*parts[:2], *(table.clone().requires_grad_() for table in tables)]
        out, lse = ours(*x, attention=attention)
        grads = torch.autograd.grad(out.sin().sum() + lse.square().sum(), x, create_graph=True)
        cotangents = [torch.from_numpy(comm.allreduce(g.detach().numpy())).cos() for g in grads[2:]]
        loss = (out.sin().sum() + lse.square().sum() + sum(g.pow(2).sum() for g in grads[:2])
                + sum((g * c).sum() for g, c in zip(grads[2:], cotangents, strict=True)))
        loss.backward()
        y = [*whole[:2], *(table.clone().requires_grad_() for table in tables)]
        penalty(exact, *y).backward()
        for a, b in zip(x[:2], y[:2], strict=True):
            assert torch.allclose(a.grad, b.grad[mine], rtol=1e-9, atol=1e-9)
        for a, b in zip(x[2:], y[2:], strict=True):
            assert np.allclose(comm.allreduce(a.grad.numpy()), b.grad.numpy(), rtol=1e-9, atol=1e-9)

        # Forward.
        tangents = [torch.cos(3 * z.detach()) for z in y]
        want = torch.func.jvp(exact, tuple(z.detach() for z in y), tuple(tangents))[1]
        with forward_ad.dual_level():
            some = [(z.detach(), t if number > 1 else t[mine])
                    for number, (z, t) in enumerate(zip(x, tangents, strict=True))]
            results = ours(*(forward_ad.make_dual(*pair) for pair in some), attention=attention)
            for result, exact_dot in zip(results, want, strict=True):
                assert torch.allclose(forward_ad.unpack_dual(result).tangent, exact_dot[mine], atol=1e-11)


def test_a_third_derivative_is_an_error_and_never_zero(comm):
    _, (q, k, v), _ = own(comm, 9)
    out = ringmpi.torch.ring_attention(q, k, v, comm=comm, layout="striped")
    first, = torch.autograd.grad(out.pow(3).sum(), q, create_graph=True)
    second, = torch.autograd.grad(first.pow(2).sum(), k, create_graph=True)
    with pytest.raises(ringmpi.RingError, match="expected at most two derivatives, got a third"):
        second.sum().backward()


def expect(comm, error, text, function):
    """Every rank raises the same."""
    with pytest.raises(error, match=text) as caught:
        function()
    assert len(set(comm.allgather(str(caught.value)))) == 1


def test_what_is_not_honoured_is_one_error_on_all_ranks(comm, monkeypatch):
    _, (q, k, v), mine = own(comm, 12)
    arrays = [x.detach().numpy() for x in (q, k, v)]
    canonical = {"order": "canonical", "layout": "striped", "backend": "numba"}
    out = ringmpi.torch.ring_attention(q, k, v, comm=comm, **canonical)
    gradient, = torch.autograd.grad(out.sin().sum(), q, create_graph=True)          # which is as right as ever
    expect(comm, ringmpi.OptionError, 'order "canonical": expected a forward or backward pass',
           lambda: gradient.sin().sum().backward())
    odd = comm.rank == comm.size - 1
    bad = {"q_dot: expected shape": (arrays[0][:, :1], arrays[1], arrays[2]),
           "v_dot: expected dtype": (None, None, arrays[2].astype("f4")),
           "k_dot: expected shape": (None, "k", None)}
    with ringmpi.RingAttention(comm, layout="striped") as attention:
        for text, tangents in bad.items():
            expect(comm, ringmpi.RingError, text,
                   lambda x=tangents: attention.jvp(*arrays, *(x if odd else arrays)))
        expect(comm, ringmpi.OptionError, "sinks_dot: expected none",
               lambda: attention.jvp(*arrays, *arrays, sinks_dot=np.ones(4)))
        expect(comm, ringmpi.OptionError, "key_bias_dot: expected none",
               lambda: attention.jvp(*arrays, *arrays, key_bias_dot=np.ones(len(mine))))
        expect(comm, ringmpi.ShapeError, "key_bias_dot: expected shape", lambda: attention.jvp(
            *arrays, *arrays, key_bias=np.ones(len(mine)), key_bias_dot=np.ones(len(mine) + odd)))
        expect(comm, ringmpi.ShapeError, "sinks_dot: expected shape",
               lambda: attention.jvp(*arrays, *arrays, sinks=np.ones(4), sinks_dot=np.ones(3 if odd else 4)))
        table = np.zeros((4, 5))
        for bad, kind, text in ((table[:, 1:], ringmpi.ShapeError, "relative_dot: expected shape"),
                                ((table, table), ringmpi.ShapeError, "relative_dot: expected one table, an array")):
            expect(comm, kind, text, lambda x=bad: attention.jvp(*arrays, *arrays, relative=table,
                                                                 relative_dot=x if odd else table))
        expect(comm, ringmpi.OptionError, "relative_dot: expected none",
               lambda: attention.jvp(*arrays, *arrays, relative_dot=table))
        expect(comm, ringmpi.OptionError, "v_dot: expected none",
               lambda: attention.jvp(*arrays[:2], None, *arrays, dim_v=3))
        if comm.size > 1:
            expect(comm, ringmpi.OptionError, "and tangents of those, of sinks and of relative",
                   lambda: attention.jvp(*arrays, *arrays, relative=table, relative_dot=table + odd))
        monkeypatch.setitem(attention._options, "backend", "cuda")
        expect(comm, ringmpi.BackendError, "expected arrays on the host and a backend that computes there",
               lambda: attention.jvp(*arrays, *arrays))
    if comm.size > 1:
        with ringmpi.RingAttention(comm, layout="replicated") as attention:
            same = np.ones((3, 2, 4))
            expect(comm, ringmpi.OptionError, "and tangents of those",
                   lambda: attention.jvp(same, same, same, same * (1 + odd), None, None))
