"""Values that are the first numbers of the keys: as values apart, in fewer bytes. Runs under mpiexec."""

import numpy as np
import oracle
import pytest
from cases import make_layout

import ringmpi
from ringmpi.call import Direction, Inputs

pytestmark = pytest.mark.mpi

DIM, DIM_V = 24, 16


def shards(comm, n=53):
    """Queries of 4 heads and keys of one, and this rank's of them, uneven."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((n, 4, DIM)), rng.standard_normal((n, 1, DIM))
    layout = make_layout("uneven", n, comm.size)
    mine = layout.positions(comm.rank)
    return q, k, q[mine], k[mine], mine, layout


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("carrier", ["ring", "gather", "two-way", "broadcast", "window"])
def test_the_bits_of_values_apart(comm, backend, carrier):
    q, k, q_mine, k_mine, mine, layout = shards(comm)
    schedule = ringmpi.Schedule(keys=comm.size, carrier=carrier)
    with ringmpi.RingAttention(comm, layout=layout, schedule=schedule, mask=ringmpi.Mask(causal=True),
                               backend=backend) as attention:
        together = attention(q_mine, k_mine, dim_v=DIM_V)
        sent = sum(step.bytes_sent for step in attention.trace.steps)
        apart = attention(q_mine, k_mine, k_mine[..., :DIM_V])
        sent_apart = sum(step.bytes_sent for step in attention.trace.steps)
        again = attention(q_mine, k_mine, dim_v=DIM_V)
    assert np.array_equal(together, apart)
    assert np.array_equal(together, again)
    assert sent * (DIM + DIM_V) == sent_apart * DIM
    want, _ = oracle.attend(q, k, k[..., :DIM_V], oracle.visible(len(q), len(k), causal=True), DIM**-0.5)
    assert oracle.error(together, want[mine], np.abs(want).max()) <= 1e-13


def summed(dk, dv):
    """The gradient of keys that have values in them, by those of both."""
    dk = dk.copy()
    dk[..., :dv.shape[-1]] += dv
    return dk


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("schedule", ["ring", "gather", "two-way", "window", "heads", "queries"])
def test_gradients(comm, backend, schedule):
    """What comes home is one array, with the gradient of values in it; two intervals, sinks, a bias and so on."""
    q, k, q_mine, k_mine, mine, layout = shards(comm)
    if schedule in ("two-way", "window"):
        schedule = ringmpi.Schedule(keys=comm.size, carrier=schedule)
    if schedule == "heads":
        q, q_mine = (np.tile(x, (1, comm.size, 1)) for x in (q, q_mine))
    mask = {"causal": True, "window": (9, 0), "first": 3}
    dout = np.random.default_rng(1).standard_normal((len(q), q.shape[1], DIM_V))
    for function in ("plain", "all and left out by head"):
        score, sinks = oracle.functions(function, q.shape[1], np.arange(len(q)), np.arange(len(k)))
        bias = score.get("key_bias")
        given = {"sinks": sinks, "key_bias": None if bias is None else bias[mine]}
        options = {"layout": layout, "schedule": schedule, "mask": ringmpi.Mask(**mask), "backend": backend,
                   "softcap": score.get("softcap"), "alibi": score.get("slopes"), "dropout": score.get("dropout", 0.0)}
        with ringmpi.RingAttention(comm, **options) as attention:
            attention(q_mine, k_mine, k_mine[..., :DIM_V], **given)
            attention.backward(dout[mine])
            apart = [sum(getattr(step, name) for step in attention.trace.steps)
                     for name in ("bytes_sent", "gradient_bytes_sent")]
            out, lse = attention(q_mine, k_mine, dim_v=DIM_V, return_lse=True, **given)
            got = attention.backward(dout[mine])
            together = [sum(getattr(step, name) for step in attention.trace.steps)
                        for name in ("bytes_sent", "gradient_bytes_sent")]
            again = attention.backward_of(dout[mine], q_mine, k_mine, None, out, lse, dim_v=DIM_V, **given)
        want = oracle.dense(q, k, k[..., :DIM_V], oracle.visible(len(q), len(k), **mask), DIM**-0.5, dout=dout,
                            sinks=sinks, **score)
        want["dk"] = summed(want["dk"], want["dv"])
        assert got.dv is None
        for name in ("dq", "dk", *(["dkey_bias"] if bias is not None else [])):
            assert oracle.error(getattr(got, name), want[name][mine], np.abs(want[name]).max()) <= 1e-12, name
            assert np.array_equal(getattr(got, name), getattr(again, name))
        if bias is None:
            assert [x * (DIM + DIM_V) for x in together] == [x * DIM for x in apart]


@pytest.mark.parametrize("bias", [False, True])
def test_canonical_order(comm, bias):
    """Results and gradients have the bits of one rank, and gradients are those of values apart, added once."""
    from mpi4py import MPI
    q, k, _, _, mine, layout = shards(comm, 300)
    key_bias = np.random.default_rng(2).standard_normal((300, 4)) if bias else None
    dout = np.random.default_rng(1).standard_normal((300, 4, DIM_V))
    found = []
    for where, layout_, rows in ((comm, layout, mine), (MPI.COMM_SELF, "contiguous", slice(None))):
        given = {"key_bias": None if key_bias is None else key_bias[rows]}
        with ringmpi.RingAttention(where, layout=layout_, order="canonical", backend="numba",
                                   mask=ringmpi.Mask(causal=True)) as attention:
            out = attention(q[rows], k[rows], dim_v=DIM_V, **given)
            found.append((out, *(x for x in attention.backward(dout[rows]) if x is not None)))
            if where == comm:
                attention(q[rows], k[rows], k[rows][..., :DIM_V], **given)
                apart = attention.backward(dout[rows])
    assert np.array_equal(found[0][1], apart.dq)
    assert np.array_equal(found[0][2], summed(apart.dk, apart.dv))
    for x, whole in zip(*found, strict=True):
        assert np.array_equal(x, whole[mine])


def test_torch(comm):
    """The gradient of values in keys reaches the keys, and so does a second derivative."""
    torch = pytest.importorskip("torch")
    import ringmpi.torch
    _, _, q, k, _, layout = shards(comm)
    grads = []
    for in_keys in (False, True):
        tensors = [torch.tensor(x, requires_grad=True) for x in (q, k)]
        values = {"dim_v": DIM_V} if in_keys else {"v": tensors[1][..., :DIM_V]}
        out = ringmpi.torch.ring_attention(*tensors, comm=comm, layout=layout, **values)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), tensors)
        grads.append([x.detach() for x in (*first, *second)])
    for x, y in zip(*grads, strict=True):
        assert torch.allclose(x, y, rtol=1e-11, atol=1e-11 * float(y.abs().max() if y.numel() else 0))


@pytest.mark.parametrize("schedule", ["heads", "queries", "replicated"])
def test_shared_heads_and_queries(comm, schedule):
    _, _, q, k, _, layout = shards(comm)
    q = np.tile(q, (1, comm.size, 1))
    options = {"layout": layout, "schedule": schedule}
    if schedule == "replicated":
        q, options = np.ones((3, 4, DIM)), {"layout": schedule, "kv_layout": layout}
    with ringmpi.RingAttention(comm, backend="numpy", **options) as attention:
        out = attention(q, k, dim_v=DIM_V)
        got = attention.backward(out)
        assert np.array_equal(out, attention(q, k, k[..., :DIM_V]))
        want = attention.backward(out)
    assert np.allclose(got.dq, want.dq, rtol=1e-12, atol=1e-12)
    assert np.allclose(got.dk, summed(want.dk, want.dv), rtol=1e-12, atol=1e-12)


def test_what_is_refused(comm):
    _, _, q, k, _, layout = shards(comm)

    def expect(text, function, error=ringmpi.OptionError):
        with pytest.raises(error, match=text) as caught:
            function()
        assert len(set(comm.allgather(str(caught.value)))) == 1

    odd = comm.rank == comm.size - 1
    with ringmpi.RingAttention(comm, layout=layout) as attention:
        expect("v: expected values, or in their place dim_v, .* got neither", lambda: attention(q, k, k if not odd else
                                                                                                None))
        expect("got both", lambda: attention(q, k, k, dim_v=3))
        for bad in (0, DIM + 1, 2.5):
            expect("dim_v: expected an integer >= 1 and < 25", lambda x=bad: attention(q, k, dim_v=x))
        expect("v_dot: expected none, as values are in the keys", lambda: attention._differentiate_along(
            0, Direction(None, None, k[..., :3]), Inputs(q, k, None, None, 0, q[..., :3].copy(), q[..., 0].copy(), 3)))
        if comm.size > 1:
            expect(r"values \(0 by v, 1 by dim_v\)", lambda: attention(q, k, **({"v": k[..., :3]} if odd else
                                                                             {"dim_v": 3})), ringmpi.ShapeError)
