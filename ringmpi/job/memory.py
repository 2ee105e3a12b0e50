"""How much memory a rank will need, and about how long it will take, from the sizes alone."""

from __future__ import annotations

import numpy as np

from ..backends import GPU_NAMES, backend_class, check_canonical, open_backend
from ..backends.base import Backend
from ..dtypes import DTYPES, accumulator
from ..environment import cycles_per_second, resident_bytes, vector_bytes
from ..layout import Contiguous
from ..mask import Mask
from ..schedules.grid import share_heads
from ..schedules.movers import carrier_class
from ..schedules.spec import Schedule, check_heads
from .inputs import Sizes
from .options import Options

MPI_BYTES = 18 * 2**20         # measured with the mpich wheel, from 2 to 8 ranks
SAMPLES = 2**20                # queries whose keys are counted, where there are more


def predict_memory(sizes: Sizes, ranks: int, options: Options, resident: int | None = None) -> dict[str, int]:
    """Predict the arrays of the rank with most tokens, in bytes; the peak is `total`. Local.

    Parameters
    ----------
    sizes : Sizes
    ranks : int
    options : Options
        Any layout but contiguous copies a shard three times while it is redistributed.
    resident : int, optional
        Bytes of this process, if MPI and the modules are loaded; by default they are guessed.

    Returns
    -------
    dict of str to int
        Bytes of each array while attention is computed, and `total`: the largest sum of any phase, this process and
        its libraries included. With the CUDA backend: of each array in the GPU's memory, and their sum; CUDA's own
        memory comes on top.
    """
    n_q, n_k = -(-sizes.n_q // ranks), -(-sizes.n_k // ranks)
    item = DTYPES[sizes.dtype].itemsize
    acc_dtype = accumulator(DTYPES[sizes.dtype], options.accumulator)
    wide = acc_dtype.itemsize
    shapes = (n_q, sizes.heads, sizes.dim), (n_k, sizes.kv_heads, sizes.dim), (n_k, sizes.kv_heads, sizes.dim_v)
    canonical = options.order == "canonical"
    backend = _class_of(options.backend, canonical)
    schedule = options.grid(ranks)
    check_heads(schedule, sizes.heads, sizes.kv_heads if canonical else 0)
    buffers = carrier_class(schedule.carrier).buffer_blocks(schedule.keys, options.backend in GPU_NAMES)
    scratch = backend.scratch_bytes(*shapes, DTYPES[sizes.dtype], acc_dtype)
    if options.backend in GPU_NAMES:
        arrays = {**_arrays(sizes, n_q, n_k, item, wide, buffers, schedule), **scratch}
        return {**arrays, "total": sum(arrays.values())}
    base = (resident_bytes() + MPI_BYTES if resident is None else resident) + backend.library_bytes
    parts = {
        **_arrays(sizes, n_q, n_k, item, wide, buffers, schedule),
        "columns": 8 * 8 * n_q * schedule.heads * schedule.queries,
        **scratch,
    }
    if canonical and ranks > 1:       # what is packed, received and put in order
        parts["K/V in tiles"] = 3 * (parts["k"] + parts["v"])
    copies = 0 if options.layout == "contiguous" or ranks == 1 else 3
    q, k, v, out = (parts[name] for name in ("q", "k", "v", "out"))
    phases = (sum(parts.values()), (1 + copies) * q, q + (1 + copies) * k, q + k + (1 + copies) * v,
              (1 + copies) * out + parts["lse"])
    return {**parts, "process and libraries": base, "total": max(phases) + base}


def predict_seconds(pairs: list[int], sizes: Sizes, threads: list[int], backend: str) -> float:
    """Predict roughly how long the slowest rank computes, in seconds; 0 for a backend of which nothing is known. Local.

    Parameters
    ----------
    pairs : list of int
        Visible pairs of each rank.
    sizes : Sizes
    threads : list of int
        CPU threads of each rank.
    backend : str
    """
    lane_flop = backend_class(backend).lane_flop
    if not lane_flop:
        return 0.0
    lanes = vector_bytes() / accumulator(DTYPES[sizes.dtype], None).itemsize
    speed = lanes * lane_flop * cycles_per_second()
    flop = 2 * sizes.heads * (sizes.dim + sizes.dim_v)
    return max(flop * mine / (speed * number) for mine, number in zip(pairs, threads, strict=True))


def count_pairs(mask: Mask, sizes: Sizes, ranks: int, layout: str) -> list[int]:
    """Count the visible pairs of each rank, by a sample of the queries where there are many. Local."""
    step = max(1, sizes.n_q // SAMPLES)
    queries = np.arange(0, sizes.n_q, step)
    seen = sum((high - low for low, high in mask.bounds(queries, sizes.n_q, sizes.n_k)), np.zeros_like(queries)) * step
    if layout == "contiguous":
        starts = np.searchsorted(queries, Contiguous.even(sizes.n_q, ranks).starts)
        sums = np.concatenate([[0], np.cumsum(seen)])
        return [int(pairs) for pairs in np.diff(sums[[*starts, len(seen)]])]
    return [int(seen.sum()) // ranks + 1] * ranks


def _arrays(sizes: Sizes, n_q: int, n_k: int, item: int, wide: int, buffers: int, schedule: Schedule
            ) -> dict[str, int]:
    """Give the bytes of what every backend has, where it computes."""
    q = n_q * sizes.heads * sizes.dim * item
    kv = n_k * sizes.kv_heads * (sizes.dim + sizes.dim_v) * item
    out, lse = n_q * sizes.heads * sizes.dim_v * item, n_q * sizes.heads * wide
    acc = n_q * sizes.heads * sizes.dim_v * wide
    shares = share_heads(sizes.heads, sizes.kv_heads, schedule.heads)
    inside = kv * schedule.heads * max(share.kv_heads for share in shares) // sizes.kv_heads   # some with several ranks
    arrays = {
        "q": q,
        "k": n_k * sizes.kv_heads * sizes.dim * item,
        "v": n_k * sizes.kv_heads * sizes.dim_v * item,
        "out": out,
        "lse": lse,
        "acc": schedule.queries * acc,
        "max and sum": schedule.queries * 2 * lse,
        "K/V buffers": buffers * inside,
    }
    if schedule.queries > 1:                     # the rows, and what is packed and received: queries, then states
        arrays["queries of others"] = 2 * schedule.queries * q + 2 * (schedule.queries - 1) * (acc + 2 * lse)
    if schedule.heads > 1:                       # by heads, and what is packed and received
        arrays["exchange of heads"] = 3 * (q + inside) + out + lse
    return arrays


def _class_of(name: str, canonical: bool) -> type[Backend]:
    """Give the class of a backend; one for CPUs is opened, so that its modules count in the memory of this process."""
    if name in GPU_NAMES:
        if canonical:
            check_canonical(name)
        return backend_class(name)
    opened = open_backend(name, 1, canonical=canonical)
    opened.close()
    return type(opened)
