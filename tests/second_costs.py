"""What a second derivative costs beside a backward pass, measured. docs/derivatives.rst has the figures.

    mpiexec -n P python tests/second_costs.py [TOKENS] [ROUNDS]

One thread a rank, float32, 8 heads on 2, dim 64, causal, striped. Each is timed in turns, on the slowest rank, and the
medians are given; memory is the peak that each adds to what the process had before, on the rank that took most.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

import ringmpi
from ringmpi.call import Direction, Inputs

HEADS, KV_HEADS, DIM = 8, 2, 64


def peak(function):
    """Bytes that a call adds to the process's memory, at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(name):
    """What Linux says of this process's memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def main(tokens, rounds):
    """Measure, and print on rank 0."""
    comm = MPI.COMM_WORLD
    mine = len(ringmpi.Striped(tokens, comm.size).positions(comm.rank))
    rng = np.random.default_rng(comm.rank)
    q, k, v, q_dot, k_dot, v_dot = (rng.standard_normal((mine, heads, DIM), "f4") for heads in (HEADS, KV_HEADS,
                                                                                                KV_HEADS) * 2)
    with ringmpi.RingAttention(comm, mask=ringmpi.Mask(causal=True), layout="striped", threads=1) as attention:
        out, lse = attention(q, k, v, return_lse=True)
        inputs, along = Inputs(q, k, v, out=out, lse=lse), Direction(q_dot, k_dot, v_dot)
        calls = {"forward": lambda: attention(q, k, v),
                 "backward": lambda: attention.backward_of(out, q, k, v, out, lse),
                 "jvp": lambda: attention._differentiate_along(0, along, inputs),
                 "second derivative": lambda: attention._differentiate_twice(0, out, None, along, inputs)}
        memory = {name: comm.allreduce(peak(call), MPI.MAX) for name, call in calls.items()}
        seconds = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                comm.Barrier()
                start = time.perf_counter()
                call()
                seconds[name].append(comm.allreduce(time.perf_counter() - start, MPI.MAX))
    if comm.rank == 0:
        unit = statistics.median(seconds["backward"])
        print(f"{tokens} tokens, {comm.size} ranks; n x n of all heads in float32: {4 * HEADS * tokens**2 / 2**20:.0f} "
              f"MiB; this rank's inputs and tangents {2 * sum(x.nbytes for x in (q, k, v)) / 2**20:.0f} MiB")
        for name, times in seconds.items():
            print(f"{name:18} {statistics.median(times):7.3f} s ({min(times):.3f} to {max(times):.3f}), "
                  f"{statistics.median(times) / unit:5.2f} of backward, peak {memory[name] / 2**20:6.1f} MiB")


if __name__ == "__main__":
    main(*(int(x) for x in (sys.argv[1:] + ["8192", "5"][len(sys.argv) - 1:])))
