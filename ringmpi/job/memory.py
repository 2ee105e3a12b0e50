"""How much memory a rank will need, and about how long it will take, from the sizes alone."""

from __future__ import annotations

import numpy as np

from ..backends import open_backend
from ..dtypes import DTYPES, accumulator
from ..environment import cycles_per_second, resident_bytes, vector_bytes
from ..layout import Contiguous
from ..mask import Mask
from .attend import Options, Sizes

# MPI, and for Numba the machine code: measured with the mpich wheel and Numba 0.68, from 2 to 8 ranks.
LIBRARY_BYTES = {"numpy": 18 * 2**20, "numba": 64 * 2**20}
SCORE_BYTES = {"numpy": 2**25 - 2**23, "numba": 2**23}       # of a thread, and what NumPy makes of them on the way
PACKED_BYTES = {"numpy": 0, "numba": 2**25}       # at a time, or one tile of each key head


# Flop of a vector unit's lane in a cycle, and the share of it that the kernels reach: README has measurements.
LANE_FLOP = {"numpy": 4 * 0.4, "numba": 4 * 0.75}
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
        Bytes of each array while the ring runs, and `total`: the largest sum of any phase, this process and
        its libraries included. With the CUDA backend: of each array in the GPU's memory, and their sum; CUDA's own
        memory comes on top.
    """
    n_q, n_k = -(-sizes.n_q // ranks), -(-sizes.n_k // ranks)
    item = DTYPES[sizes.dtype].itemsize
    wide = accumulator(DTYPES[sizes.dtype], options.accumulator).itemsize
    if options.backend == "cuda":
        arrays = _arrays(sizes, n_q, n_k, item, wide, 2 if ranks > 1 else 0)
        if wide == 8 > item:           # float64 on request: the kernels take operands of that type
            arrays["q, k and v widened"] = (arrays["q"] + arrays["k"] + arrays["v"]) // item * wide
        return {**arrays, "total": sum(arrays.values())}
    name, base = _resident_with(options.backend)
    base = base if resident is None else resident + LIBRARY_BYTES[name] - LIBRARY_BYTES["numpy"]
    parts = {
        **_arrays(sizes, n_q, n_k, item, wide, min(ranks - 1, 2)),      # its own K and V are sent from where they are
        "columns": 8 * 8 * n_q,
        "scores": SCORE_BYTES[name],
        "packed K and V": min(PACKED_BYTES[name], n_k * sizes.kv_heads * (sizes.dim + sizes.dim_v) * wide),
    }
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
    if backend not in LANE_FLOP:
        return 0.0
    lanes = vector_bytes() / accumulator(DTYPES[sizes.dtype], None).itemsize
    speed = lanes * LANE_FLOP[backend] * cycles_per_second()
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


def _arrays(sizes: Sizes, n_q: int, n_k: int, item: int, wide: int, buffers: int) -> dict[str, int]:
    """Give the bytes of what every backend has, where it computes."""
    return {
        "q": n_q * sizes.heads * sizes.dim * item,
        "k": n_k * sizes.kv_heads * sizes.dim * item,
        "v": n_k * sizes.kv_heads * sizes.dim_v * item,
        "out": n_q * sizes.heads * sizes.dim_v * item,
        "lse": n_q * sizes.heads * wide,
        "acc": n_q * sizes.heads * sizes.dim_v * wide,
        "max and sum": 2 * n_q * sizes.heads * wide,
        "K/V buffers": buffers * n_k * sizes.kv_heads * (sizes.dim + sizes.dim_v) * item,
    }


def _resident_with(backend: str) -> tuple[str, int]:
    """Name of the backend; memory of this process with its modules loaded, and of what a dry run does not load."""
    opened = open_backend(backend, 1)
    opened.close()
    return opened.name, resident_bytes() + LIBRARY_BYTES[opened.name]
