"""Arrays from outside: NumPy, and whatever speaks the buffer protocol or DLPack on the host."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BackendError, DtypeError
from .softmax import BFLOAT16

HOST = 1                       # kDLCPU of DLPack


def as_array(x: Any, name: str) -> NDArray[Any]:
    """View `x` as a NumPy array, without a copy where its producer allows that. Local.

    Parameters
    ----------
    x : array
        NumPy, torch or JAX on the host, or anything with the buffer protocol, ``__array__`` or DLPack.
    name : str
        What to call it in an error.

    Raises
    ------
    BackendError
        If `x` lives on a GPU.
    DtypeError
        If `x` can't be read as an array.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise DtypeError(f"{name}: expected an array without a mask of its own; fill it, or say what is seen by mask=")
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "__cuda_array_interface__") or _dlpack_device(x) not in (None, HOST):
        raise BackendError(f"{name}: the array is on a GPU and this version has no CUDA backend; copy it to the host")
    try:
        if str(getattr(x, "dtype", "")) == "torch.bfloat16":     # a dtype that NumPy and DLPack can't name
            return np.asarray(x.detach().view(sys.modules["torch"].int16)).view(BFLOAT16)
        return np.asarray(x) if hasattr(x, "__array__") or _dlpack_device(x) is None else np.from_dlpack(x)
    except Exception as error:
        raise DtypeError(f"{name}: expected an array, got {type(x).__name__}: {error}") from error


def _dlpack_device(x: Any) -> int | None:
    """Kind of device that DLPack says `x` is on; None if it doesn't speak DLPack."""
    return int(x.__dlpack_device__()[0]) if hasattr(x, "__dlpack_device__") else None
