"""Canonical order on GPUs of this run's ranks: lazy devices that run the kernels on the CPU. Runs under mpiexec."""

import numpy as np
import pytest
import test_mpi_canonical
from emulate import EmulatedDevice
from test_mpi_cuda import gpu, made, skip_unless_mpi_takes

from ringmpi import RingAttention, Schedule

__all__ = ["gpu", "made"]

pytestmark = pytest.mark.mpi

SHORT = {"heads": (2, 1), "dims": (16, 16), "lengths": (230, 410)}       # two tiles of queries, three of keys
CASES = [
    {"mask": "causal", "dtype": "float32", "layout": "striped"},
    {"mask": "window", "dtype": "bfloat16", "layout": "empty", "kv_layout": "striped", "function": "all"},
    {"mask": "documents", "dtype": "float64", "layout": "uneven", "kv_layout": "custom"},
    {"mask": "window", "dtype": "float64", "layout": "striped", "dims": (96, 96)},
    {"mask": "first", "dtype": "float16", "layout": "zigzag", "function": "sinks", "batch": 2, "lengths": (195, 200)},
    {"mask": "window", "dtype": "bfloat16", "layout": "striped", "kv_layout": "uneven", "batch": 2, "bias": "left out"},
    {"mask": "causal", "dtype": "float32", "layout": "uneven", "function": "softcap", "bias": "left out by head"},
]


class Problem(test_mpi_canonical.Problem):
    """Whole arrays and options, for GPUs."""

    def __init__(self, gpu, **options):
        super().__init__(**{**SHORT, **options})
        self.options |= {"backend": "cuda", "timeout": 200,
                         "allow_gpu_sharing": not isinstance(gpu, EmulatedDevice)}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_bits_of_one_rank(comm, gpu, number):
    problem = Problem(gpu, **CASES[number], seed=number)
    same = problem.compare(comm)
    assert all(same.values()), same
    assert problem.schedule == Schedule(keys=comm.size, carrier="broadcast")


def test_heads_that_ranks_share(comm, gpu):
    problem = Problem(gpu, mask="causal", dtype="float32", layout="striped", kv_layout="uneven",
                      heads=(comm.size, comm.size), lengths=(60, 210))
    same = problem.compare(comm, schedule=Schedule(heads=comm.size, carrier="broadcast"))
    assert all(same.values()), same


def test_arrays_on_gpus(comm, gpu):
    """They travel as they are; what the other tests bring from the host goes by way of it."""
    skip_unless_mpi_takes(gpu, "direct")
    problem = Problem(gpu, **CASES[0])
    want, (mine, theirs) = problem.passes(comm)
    q, k, v, dout, dlse = (gpu.array(x[rows]) for x, rows in (
        (problem.q, mine), (problem.k, theirs), (problem.v, theirs), (problem.dout, mine), (problem.dlse, mine)))
    options = problem.options | {"backend": "auto", "gpu_transport": "direct", "layout": "striped"}
    with RingAttention(comm, order="canonical", **options) as attention:
        got = attention(q, k, v, return_lse=True)
        got = *got, *attention.backward(dout, dlse)
    assert all(np.array_equal(x.get(), y) for x, y in zip(got, want.values(), strict=True))


def test_other_bits_without_it(comm, gpu):
    """So that these tests can see."""
    if comm.size == 1:
        pytest.skip("one rank has its own bits")
    same = Problem(gpu, mask="causal", dtype="float32", layout="striped").compare(comm, order="fastest")
    assert not any(same.values()), same
