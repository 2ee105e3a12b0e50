"""How much memory a rank will need, from the sizes alone: what a dry run says."""

from __future__ import annotations

from .backends import open_backend
from .environment import resident_bytes
from .job import Options, Sizes
from .softmax import DTYPES, accumulator

# MPI, and for Numba the machine code: measured with the mpich wheel and Numba 0.68, from 2 to 8 ranks.
LIBRARY_BYTES = {"numpy": 18 * 2**20, "numba": 64 * 2**20}
SCORE_BYTES = {"numpy": 2**25 - 2**23, "numba": 2**23}       # of a thread, and what NumPy makes of them on the way
PACKED_BYTES = {"numpy": 0, "numba": 2**25}       # at a time, or one tile of each key head


def predict(sizes: Sizes, ranks: int, options: Options) -> dict[str, int]:
    """Predict the arrays of the rank with most tokens, in bytes; the peak is `total`. Local.

    Parameters
    ----------
    sizes : Sizes
    ranks : int
    options : Options
        Any layout but contiguous copies a shard three times while it is redistributed.

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
        arrays = _arrays(sizes, n_q, n_k, item, wide, ranks)
        if wide == 8 > item:           # float64 on request: the kernels take operands of that type
            arrays["q, k and v widened"] = (arrays["q"] + arrays["k"] + arrays["v"]) // item * wide
        return {**arrays, "total": sum(arrays.values())}
    name, base = _resident_with(options.backend)
    parts = {
        **_arrays(sizes, n_q, n_k, item, wide, ranks),
        "columns": 8 * 8 * n_q,
        "scores": SCORE_BYTES[name],
        "packed K and V": min(PACKED_BYTES[name], n_k * sizes.kv_heads * (sizes.dim + sizes.dim_v) * wide),
    }
    copies = 0 if options.layout == "contiguous" or ranks == 1 else 3
    q, k, v, out = (parts[name] for name in ("q", "k", "v", "out"))
    phases = (sum(parts.values()), (1 + copies) * q, q + (1 + copies) * k, q + k + (1 + copies) * v,
              (1 + copies) * out + parts["lse"])
    return {**parts, "process and libraries": base, "total": max(phases) + base}


def _arrays(sizes: Sizes, n_q: int, n_k: int, item: int, wide: int, ranks: int) -> dict[str, int]:
    """Give the bytes of what every backend has, where it computes."""
    return {
        "q": n_q * sizes.heads * sizes.dim * item,
        "k": n_k * sizes.kv_heads * sizes.dim * item,
        "v": n_k * sizes.kv_heads * sizes.dim_v * item,
        "out": n_q * sizes.heads * sizes.dim_v * item,
        "lse": n_q * sizes.heads * wide,
        "acc": n_q * sizes.heads * sizes.dim_v * wide,
        "max and sum": 2 * n_q * sizes.heads * wide,
        "two K/V buffers": 2 * n_k * sizes.kv_heads * (sizes.dim + sizes.dim_v) * item if ranks > 1 else 0,
    }


def _resident_with(backend: str) -> tuple[str, int]:
    """Name of the backend; memory of this process with its modules loaded, and of what a dry run does not load."""
    opened = open_backend(backend, 1)
    opened.close()
    return opened.name, resident_bytes() + LIBRARY_BYTES[opened.name]
