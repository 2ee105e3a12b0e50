"""Values that are the first numbers of the keys: the bits of values apart, and fewer bytes. Runs under mpiexec."""

import numpy as np
import oracle
import pytest
from cases import make_layout

import ringmpi

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


@pytest.mark.parametrize("schedule", ["heads", "queries", "replicated"])
def test_shared_heads_and_queries(comm, schedule):
    _, _, q, k, _, layout = shards(comm)
    q = np.tile(q, (1, comm.size, 1))
    options = {"layout": layout, "schedule": schedule}
    if schedule == "replicated":
        q, options = q[:0], {"layout": schedule, "kv_layout": layout}
    with ringmpi.RingAttention(comm, backend="numpy", **options) as attention:
        assert np.array_equal(attention(q, k, dim_v=DIM_V), attention(q, k, k[..., :DIM_V]))


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
        expect("dim_v: expected no stop=", lambda: attention(q, k, dim_v=3, stop=lambda: False))
        out = attention(q, k, dim_v=DIM_V)
        expect("dim_v: expected v in a call that is differentiated", lambda: attention.backward(out))
        if comm.size > 1:
            expect(r"values \(0 by v, 1 by dim_v\)", lambda: attention(q, k, **({"v": k[..., :3]} if odd else
                                                                             {"dim_v": 3})), ringmpi.ShapeError)
    with ringmpi.RingAttention(comm, layout=layout, order="canonical", backend="numba") as attention:
        expect("dim_v: expected order fastest", lambda: attention(q, k, dim_v=3))
