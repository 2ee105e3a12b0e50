"""Checks of what a caller brings: the arrays of one rank, of all ranks together, and the options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DtypeError, OptionError, ShapeError
from .mask import Mask
from .mpi import TIMEOUT
from .softmax import DTYPES, check_dtype

Array = NDArray[Any]

# What must be equal on all ranks before the first message; then come tokens of q and of k, and the GPU they are on.
RECORD = ("failed", "batch axis", "batch", "heads", "kv_heads", "dim", "dim_v", "dtype", "place (0 the host, 1 a GPU)")


def check_arrays(q: Array, k: Array, v: Array) -> bool:
    """Check that q, k and v go together; say whether they have a batch axis. Local.

    Raises
    ------
    ShapeError, DtypeError
        If they do not; the text says what was expected and what was got.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dtype(x.dtype, name)
        if x.dtype != q.dtype:
            raise DtypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}; convert it first")
    check_shapes(q.shape, k.shape, v.shape)
    return q.ndim == 4


def check_records(records: NDArray[np.int64]) -> None:
    """Check that the arrays of all ranks go together: one row of `RECORD` for each rank. Local.

    Raises
    ------
    ShapeError, DtypeError
        If one differs from that of rank 0.
    """
    for name, column in zip(RECORD, records.T, strict=False):
        for rank in np.flatnonzero(column != column[0]):
            got, want = (list(DTYPES)[x] if name == "dtype" else x for x in (column[rank], column[0]))
            raise (DtypeError if name == "dtype" else ShapeError)(
                f"rank {rank}: expected the same {name} on every rank, got {got} here and {want} on rank 0")


def check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Check that arrays of these shapes go together. Local.

    Raises
    ------
    ShapeError
        If they do not; the text says what was expected and what was got.
    """
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) not in (3, 4) or len(shape) != len(q):
            raise ShapeError(f"{name}: expected shape ([batch,] tokens, heads, dim) as for q, got {shape}")
    *batch, n_k, kv_heads, dim = k
    heads = q[-2]
    if q[-1] != dim or dim == 0:
        raise ShapeError(f"q and k: expected the same dim, at least 1, got {q[-1]} and {dim}")
    if v[:-1] != k[:-1] or v[-1] == 0:
        raise ShapeError(f"v: expected shape {(*batch, n_k, kv_heads, 'dim_v')} to go with k, got {v}")
    if list(q[:-3]) != batch:
        raise ShapeError(f"q and k: expected the same batch, got {q[:-3]} and {tuple(batch)}")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ShapeError(f"heads: expected a multiple of kv_heads, got {heads} heads and {kv_heads} kv_heads")


def check_timeout(timeout: Any) -> tuple[float, str]:
    """Return a timeout to work with, and what is wrong with the one given (nothing: empty). Local.

    Even the error about a timeout must be agreed on within one.
    """
    if isinstance(timeout, (int, float, np.number)) and timeout > 0:
        return float(timeout), ""
    return TIMEOUT, f"timeout: expected seconds > 0, got {timeout!r}"


def check_mask(mask: Any) -> Mask:
    """Return the mask, which may be None, or raise `OptionError`. Local."""
    if mask is None:
        return Mask()
    if not isinstance(mask, Mask):
        raise OptionError(f"mask: expected a ringmpi.Mask, got {mask!r}")
    return mask


def check_scale(scale: Any) -> float | None:
    """Return the scale as a finite number, or None for the default, or raise `OptionError`. Local."""
    if scale is None:
        return None
    try:
        value = float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(f"scale: expected a finite number, got {scale!r}")
    return value


def check_threads(threads: Any) -> int | None:
    """Return a number of threads, or None for the default, or raise `OptionError`. Local."""
    if threads is None:
        return None
    if not isinstance(threads, (int, np.integer)) or threads < 1:
        raise OptionError(f"threads: expected an integer >= 1, got {threads!r}")
    return int(threads)
