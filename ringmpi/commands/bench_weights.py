"""`bench weights`: sums over the weights of a call, in turns with its forward pass."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from ..analysis import Weights
from ..dtypes import check_dtype
from ..layout import make
from ..mask import Mask
from ..mpi import comm as mpi
from ..mpi.world import comm_world
from .bench_cases import spread
from .bench_decode import in_turns

FORWARD = "forward"


def measure_weights(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what is asked of weights; give the rows of the table on rank 0, none elsewhere.

    Collective over COMM_WORLD.
    """
    world = comm_world(arguments.timeout)
    comm = mpi.private_comm(world, arguments.timeout, exclusive=True)
    items = check_dtype(arguments.dtype, "--dtype")
    rng = np.random.default_rng(comm.rank)
    layout = "striped" if arguments.causal else "contiguous"
    tokens = make(layout, arguments.tokens, comm.size).counts[comm.rank]
    heads, kv_heads = arguments.heads
    q, k, v = (rng.standard_normal((tokens, many, arguments.dim), np.float32).astype(items)
               for many in (heads, kv_heads, kv_heads))
    with Weights(world, mask=Mask(causal=arguments.causal), layout=layout, threads=arguments.threads,
                 backend=arguments.backend, schedule=arguments.schedule, timeout=arguments.timeout) as weights:
        _, lse = weights(q, k, v, return_lse=True, keep=False)
        calls: dict[str, Callable[[], Any]] = {
            FORWARD: lambda: weights(q, k, v, keep=False), "key_mass": lambda: weights.key_mass(q, k, lse),
            f"top {arguments.top}": lambda: weights.top(q, k, arguments.top, lse),
            "entropy": lambda: weights.entropy(q, k, lse), "max_score": lambda: weights.max_score(q, k)}
        times = in_turns(comm, calls, arguments.repeat, arguments.timeout)
        schedule = str(weights.schedule)
    forward = statistics.median(times[FORWARD])
    rows = [{"what": name, "tokens": arguments.tokens, "heads": f"{heads}/{kv_heads}", "dim": arguments.dim,
             "mask": "causal" if arguments.causal else "full", "dtype": arguments.dtype, "ranks": comm.size,
             "schedule": schedule, "seconds": statistics.median(mine), "spread": spread(mine, statistics.median(mine)),
             "over forward": statistics.median(mine) / forward} for name, mine in times.items()]
    return rows if comm.rank == 0 else []
