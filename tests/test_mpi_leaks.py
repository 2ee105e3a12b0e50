"""Ten thousand calls leak neither communicators nor requests nor memory. Runs under mpiexec."""

import numpy as np
import pytest

from ringmpi import Mask, RingAttention, ring_attention
from ringmpi.environment import resident_bytes

pytestmark = pytest.mark.mpi


def test_ten_thousand_calls(comm):
    q = np.ones((3, 2, 8), "f4")

    def calls(number):
        for _ in range(number):
            ring_attention(q, q, q, comm=comm, mask=Mask(causal=True), backend="numpy")

    calls(200)
    before = resident_bytes()
    calls(9800)
    assert resident_bytes() - before < 8 * 2**20


def test_communicators_are_freed_with_the_callers(comm):
    """MPICH has 2048 communicators at most: one for each round would be too many if they were kept."""
    q = np.ones((3, 2, 8), "f4")
    for _ in range(2200):
        mine = comm.Dup()
        with RingAttention(mine, backend="numpy") as attention:
            attention(q, q, q)
        mine.Free()
