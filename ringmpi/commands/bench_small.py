"""`bench small`: calls of few tokens, again and again, as a layer of a model makes them, beside the cores' own peak.

The peak is that of multiply-adds in registers, on all threads of a rank, in turns with the calls.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import numpy as np

from ..attention import RingAttention
from ..backends.numba_.peak import multiply_add_peak
from ..checks import check_threads
from ..dtypes import accumulator, check_dtype
from ..mask import Mask
from ..mpi import comm as mpi
from ..mpi.world import comm_world
from .bench_cases import spread
from .bench_decode import in_turns

PEAK_SECONDS = 0.01


def measure_small(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure calls of each shape; give the rows of the table on rank 0, none elsewhere. Collective over COMM_WORLD."""
    world = comm_world(arguments.timeout)
    comm = mpi.private_comm(world, arguments.timeout, exclusive=True)
    threads = check_threads(arguments.threads) or comm.threads
    rows = [_measure(world, comm, arguments, threads, shape, heads)
            for shape, heads in itertools.product(arguments.shape, arguments.heads)]
    return rows if comm.rank == 0 else []


def _measure(world: Any, comm: mpi.Comm, arguments: argparse.Namespace, threads: int, shape: tuple[int, int],
             heads: tuple[int, int]) -> dict[str, Any]:
    """Measure one case, and give its row. Collective over *comm*."""
    items = check_dtype(arguments.dtype, "--dtype")
    rng = np.random.default_rng(comm.rank)
    q, k, v = (rng.standard_normal((tokens, many, arguments.dim), np.float32).astype(items)
               for tokens, many in zip((*shape, shape[1]), (heads[0], heads[1], heads[1]), strict=True))
    peaks: list[float] = []
    kind = accumulator(items).name

    def peak() -> None:
        peaks.append(multiply_add_peak(kind, threads, PEAK_SECONDS))

    with RingAttention(world, mask=Mask(causal=arguments.causal), threads=threads, backend="numba",
                       schedule=arguments.schedule, timeout=arguments.timeout,
                       layout="striped" if arguments.causal else "contiguous") as attention:
        times = in_turns(comm, {"call": lambda: attention(q, k, v, keep=False), "peak": peak}, arguments.repeat,
                         arguments.timeout)["call"]
        seconds = statistics.median(times)
        flop, most = comm.allgather([float(attention.trace.flop), statistics.median(peaks)], arguments.timeout).sum(0)
        return {"queries": shape[0], "keys": shape[1], "heads": f"{heads[0]}/{heads[1]}", "dim": arguments.dim,
                "mask": "causal" if arguments.causal else "full", "dtype": arguments.dtype, "ranks": comm.size,
                "threads": threads, "schedule": str(attention.schedule), "us": 1e6 * seconds,
                "spread": spread(times, seconds), "GFLOP/s": flop / seconds / 1e9, "peak GFLOP/s": most / 1e9,
                "of peak": flop / seconds / most}
