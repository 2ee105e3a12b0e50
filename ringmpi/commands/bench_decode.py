"""`bench decode`: a step of a cache, beside reading its keys and values once, and beside two bare MPI calls.

All ranks read at the same time: they share what leads to memory. The bare calls are Allgathers of what a step tells the
other ranks: a record, and the states of the queries.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..checks import check_threads
from ..dtypes import accumulator, check_dtype
from ..kv.cache import KVCache
from ..mpi import comm as mpi
from ..mpi.exchange import RECORD_BYTES
from ..mpi.world import comm_world
from .bench_cases import spread

FROM_MEMORY = 2**26         # bytes of keys and values of a rank from which on reading them is reading memory
SECONDS = 0.02              # of calls in a run, about
PIECE = 4096                # tokens that are appended at a time


def measure_decode(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a step with each number of keys; give the rows of the table on rank 0, none elsewhere.

    Collective over COMM_WORLD.
    """
    world = comm_world(arguments.timeout)
    comm = mpi.private_comm(world, arguments.timeout, exclusive=True)
    threads = check_threads(arguments.threads) or comm.threads
    rows = [_compare(world, comm, arguments, threads, dtype, keys)
            for dtype in arguments.dtype for keys in arguments.keys]
    return rows if comm.rank == 0 else []


def _compare(world: Any, comm: mpi.Comm, arguments: argparse.Namespace, threads: int, dtype: str, keys: int
             ) -> dict[str, Any]:
    """Measure one case, its three runs in turns, and give its row. Collective over *comm*."""
    kv_heads = arguments.kv_heads or arguments.heads
    numbers = check_dtype(dtype, "--dtype")
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, arguments.heads, arguments.dim), np.float32).astype(numbers)
    nbytes = 2 * keys * kv_heads * arguments.dim * numbers.itemsize
    with KVCache(world, kv_heads=kv_heads, dim=arguments.dim, dtype=dtype, capacity=keys * comm.size,
                 threads=threads, backend="numba", timeout=arguments.timeout) as cache:
        for start in range(0, keys, PIECE):
            shape = 2, min(PIECE, keys - start), kv_heads, arguments.dim
            cache.append(*rng.standard_normal(shape, np.float32).astype(numbers))
        states = arguments.heads * (arguments.dim + 2) * accumulator(numbers).itemsize
        runs = {"step": lambda: cache.attend(q), "bare": _bare_calls(world, states)}
        if nbytes >= FROM_MEMORY:
            runs["read"] = _reading(nbytes, threads)
        times = in_turns(comm, runs, arguments.repeat, arguments.timeout)
    medians = {name: statistics.median(column) for name, column in times.items()}
    step, read = medians["step"], medians.get("read")
    return {"dtype": dtype, "keys a rank": keys, "heads": f"{arguments.heads}/{kv_heads}", "dim": arguments.dim,
            "ranks": comm.size, "threads": threads, "step us": 1e6 * step, "spread": spread(times["step"], step),
            "read us": read and 1e6 * read, "x read": read and step / read,
            "2 Allgathers us": 1e6 * medians["bare"], "x Allgathers": step / medians["bare"]}


def _bare_calls(world: Any, nbytes: int) -> Callable[[], object]:
    """Give two Allgathers, of a record and of so many bytes."""
    arrays = [(np.zeros(n, np.uint8), np.zeros((world.Get_size(), n), np.uint8)) for n in (RECORD_BYTES, nbytes)]

    def call() -> None:
        for mine, everyone in arrays:
            world.Allgather(mine, everyone)

    return call


def _reading(nbytes: int, threads: int) -> Callable[[], object]:
    """Give a call that reads so many bytes of memory once."""
    from ..backends.numba_.peak import read_once
    memory = np.ones(nbytes // 4, np.float32)
    return lambda: read_once(threads, memory)


def in_turns(comm: mpi.Comm, runs: dict[str, Callable[[], object]], repeat: int, timeout: float
             ) -> dict[str, list[float]]:
    """Run all in turns; give the seconds of each on the slowest rank, its median in each turn. The first warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            once = _time(comm, run, 2, timeout)
            count = min(1000, max(2, int(SECONDS / once)))
            if turn:
                times[name].append(_time(comm, run, count, timeout))
    return times


def _time(comm: mpi.Comm, run: Callable[[], object], count: int, timeout: float) -> float:
    """Give the median of so many calls, on the slowest rank; all begin together."""
    taken = []
    for _ in range(count):
        comm.exchange("", timeout)
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return float(comm.allgather([statistics.median(taken)], timeout).max())
