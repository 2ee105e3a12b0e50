"""Views of larger arrays on several ranks: the bits of copies, and packed only where a block is sent. Under mpiexec."""

import numpy as np
import pytest
from test_strided import backwards, longer, torch_order

from ringmpi import Mask, RingAttention, Schedule
from ringmpi.dtypes import DTYPES
from ringmpi.schedules.spec import CARRIERS

pytestmark = pytest.mark.mpi

WHOLE = ("ring", "gather", "broadcast")             # carriers that send a block as it is


def passes(comm, schedule, mask, given):
    """Everything that comes out of two calls, and the bytes that this rank has packed at most."""
    results = []
    schedule = Schedule(keys=comm.size, carrier=schedule)
    with RingAttention(comm, schedule=schedule, mask=Mask(**mask), timeout=60, threads=1) as attention:
        for _ in range(2):
            out, lse = attention(*given, return_lse=True)
            dout = np.random.default_rng(comm.rank).standard_normal(out.shape).astype(out.dtype)
            results += [out, lse, *attention.backward(dout)]
        packed = sum(link._packing.nbytes for link in attention._engine.movers(attention._plan.grid).carrier.links)
    return results, packed


@pytest.mark.parametrize("schedule", CARRIERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [{}, {"causal": True}])
def test_views_give_the_bits_of_copies(comm, schedule, dtype, mask):
    rng = np.random.default_rng(comm.rank)
    q, k, v = (rng.standard_normal((2, 5 + comm.rank, heads, dim)).astype(DTYPES[dtype])
               for heads, dim in ((4, 8), (2, 8), (2, 6)))
    want, packed = passes(comm, schedule, mask, (q, k, v))
    assert packed == 0
    others = comm.size - 1 - (comm.rank if mask else 0)               # that need this rank's block
    for make, copied in ((longer, False), (torch_order, False), (backwards, True)):
        got, packed = passes(comm, schedule, mask, [make(x) for x in (q, k, v)])
        assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True)), make.__name__
        if schedule in WHOLE:
            assert packed == (k.nbytes + v.nbytes if others and not copied else 0), make.__name__


@pytest.mark.parametrize("schedule", CARRIERS)
def test_one_array_of_a_block_may_have_gaps(comm, schedule):
    rng = np.random.default_rng(comm.rank)
    q, k, v = (rng.standard_normal((2, 5, 2, 8), np.float32) for _ in range(3))
    want, _ = passes(comm, schedule, {}, (q, k, v))
    got, packed = passes(comm, schedule, {}, (q, k, torch_order(v) if comm.rank % 2 else v))
    assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))
    assert schedule not in WHOLE or packed == (v.nbytes if comm.rank % 2 else 0)
