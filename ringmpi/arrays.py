"""Arrays from outside: NumPy and CuPy, and whatever speaks the buffer protocol, DLPack or CUDA's array interface."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import device
from .dtypes import BFLOAT16
from .errors import BackendError, DtypeError

HOST = (1, 3)                  # kDLCPU of DLPack, and kDLCUDAHost, which is page-locked
CUDA = (2, 13)                 # kDLCUDA, kDLCUDAManaged


def as_host_array(x: Any, name: str) -> NDArray[Any]:
    """View `x` as a NumPy array; refuse one on a GPU. Local.

    Raises
    ------
    BackendError, DtypeError
        As `as_array` does, and if `x` lives on a GPU.
    """
    x = as_array(x, name)
    if not isinstance(x, np.ndarray):
        raise BackendError(f"{name}: expected an array on the host, got one on a GPU; copy it")
    return x


def as_array(x: Any, name: str) -> Any:
    """View `x` as a NumPy array, or on a GPU as a CuPy array, without a copy where its producer allows that. Local.

    Parameters
    ----------
    x : array
        NumPy, CuPy, torch, JAX, or anything with the buffer protocol, ``__array__``, DLPack or
        ``__cuda_array_interface__``. A GPU array is ready for what comes on the current stream of CuPy.
    name : str
        What to call it in an error.

    Raises
    ------
    BackendError
        If `x` lives on a GPU and CuPy is not here, or on a device that is no CUDA GPU.
    DtypeError
        If `x` can't be read as an array.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise DtypeError(f"{name}: expected an array without a mask of its own; fill it, or say what is seen by mask=")
    if isinstance(x, np.ndarray):
        return x
    if getattr(x, "requires_grad", False):
        raise DtypeError(f"{name}: expected an array, got a tensor that requires a gradient, which "
                         "ringmpi.torch gives; or detach() it")
    kind = _dlpack_device(x)
    if hasattr(x, "__cuda_array_interface__") or kind in CUDA:
        reason = device.reason_missing()
        if reason:
            raise BackendError(f"{name}: the array is on a GPU, which can't be used: {reason}; or copy it to the host")
        try:
            return device.view(x)
        except Exception as error:
            raise DtypeError(f"{name}: expected an array, got {type(x).__name__}: {error}") from error
    if kind not in (None, *HOST):
        raise BackendError(f"{name}: the array is on a device that is neither the host nor a CUDA GPU; copy it to the "
                           "host")
    try:
        if str(getattr(x, "dtype", "")) == "torch.bfloat16":     # a dtype that NumPy and DLPack can't name
            return np.asarray(x.view(sys.modules["torch"].int16)).view(BFLOAT16)
        return np.asarray(x) if hasattr(x, "__array__") or _dlpack_device(x) is None else np.from_dlpack(x)
    except Exception as error:
        raise DtypeError(f"{name}: expected an array, got {type(x).__name__}: {error}") from error


def _dlpack_device(x: Any) -> int | None:
    """Kind of device that DLPack says `x` is on; None if it doesn't speak DLPack."""
    return int(x.__dlpack_device__()[0]) if hasattr(x, "__dlpack_device__") else None
