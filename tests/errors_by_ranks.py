"""Largest error of the result and of each gradient against a dense float64 softmax, on this run's ranks.

    mpiexec -n P python tests/errors_by_ranks.py [TOKENS]

Random cotangents of out and lse, causal, striped, 4 heads on 2 key heads, dim 64; relative to the largest value.
"""

import sys

import numpy as np
import oracle
from mpi4py import MPI

from ringmpi import Mask, RingAttention, Striped

CASES = (("float64", None), ("float32", None), ("float32", "float64"), ("bfloat16", None), ("float16", None))


def main():
    comm, n = MPI.COMM_WORLD, int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    mine = Striped(n, comm.size).positions(comm.rank)
    for dtype, accumulator in CASES:
        q, k, v, _, _ = oracle.case(0, n, n, 4, 2, 64, 64, dtype)
        rng = np.random.default_rng(1)
        dout, dlse = rng.standard_normal((n, 4, 64)).astype(q.dtype), rng.standard_normal((n, 4))
        options = {"mask": Mask(causal=True), "layout": "striped", "accumulator": accumulator, "threads": 1}
        with RingAttention(comm, **options) as attention:
            out, lse = attention(q[mine], k[mine], v[mine], return_lse=True)
            grads = attention.backward(dout[mine], dlse[mine].astype(lse.dtype))
        shards = comm.gather((mine, out, *grads))
        if comm.rank == 0:
            want = oracle.dense(q, k, v, oracle.visible(n, n, causal=True), 0.125, dout=dout, dlse=dlse)
            errors = []
            for number, name in enumerate(("out", "dq", "dk", "dv"), 1):
                got = np.empty(want[name].shape)
                for shard in shards:
                    got[shard[0]] = shard[number]
                errors.append(f"{name} {oracle.error(got, want[name]):.1e}")
            print(f"{comm.size:2} ranks  {dtype:8} summed in {lse.dtype!s:7}  {'  '.join(errors)}", flush=True)       # noqa: T201


main()
