"""The dtypes that attention is defined for: their names, their accumulators, and how large an error they allow."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from .errors import DtypeError

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
FLOAT64: np.dtype[Any] = np.dtype(np.float64)
FLOAT32: np.dtype[Any] = np.dtype(np.float32)
DTYPES: dict[str, np.dtype[Any]] = {"float64": FLOAT64, "float32": FLOAT32, "bfloat16": BFLOAT16,
                                    "float16": np.dtype(np.float16)}

# Bounds of max |out - exact| / max |exact|. They hold the accumulator's error and, for 16-bit results, one rounding
# (the unit roundoff is 2^-8 for bfloat16 and 2^-11 for float16). bfloat16 is allowed two roundings, since its products
# in pairs round the weights too; so do float16's products on tensor cores.
TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2.0**-7 + 2e-6, "float16": 2.0**-11 + 2e-6}
TENSOR_TOLERANCE = {**TOLERANCE, "float16": 2.0**-10 + 2e-6}


def check_dtype(dtype: DTypeLike, what: str) -> np.dtype[Any]:
    """Return `dtype` as a NumPy dtype, or raise `DtypeError` if attention is not defined for it. Local."""
    expected = f"{what}: expected dtype {', '.join(DTYPES)}"
    try:
        given = DTYPES[dtype] if isinstance(dtype, str) and dtype in DTYPES else np.dtype(dtype)
    except TypeError:
        raise DtypeError(f"{expected}, got {dtype!r}") from None
    if given not in DTYPES.values():
        raise DtypeError(f"{expected}, got {given}; convert it first")
    return given


def accumulator(dtype: np.dtype[Any], request: DTypeLike | None = None) -> np.dtype[Any]:
    """Give the dtype of scores, weights and sums for inputs of `dtype`. Local.

    float64 for float64, else float32, or float64 on `request`.

    Raises
    ------
    DtypeError
        If `request` is narrower than the rule gives, or no accumulator at all.
    """
    rule = FLOAT64 if dtype == FLOAT64 else FLOAT32
    if request is None:
        return rule
    try:
        wanted = np.dtype(request)
    except TypeError:
        wanted = np.dtype(object)
    if wanted not in (FLOAT64, rule):
        raise DtypeError(f"accumulator: expected {' or '.join(sorted({'float64', str(rule)}))} for {dtype} input, "
                         f"got {request!r}")
    return wanted
