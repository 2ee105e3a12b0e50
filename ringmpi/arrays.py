"""Arrays from outside: NumPy and CuPy, and whatever speaks the buffer protocol, DLPack or CUDA's array interface."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import device
from .dtypes import BFLOAT16
from .errors import BackendError, DtypeError, RingError

HOST = (1, 3)                  # kDLCPU of DLPack, and kDLCUDAHost, which is page-locked
CUDA = (2, 13)                 # kDLCUDA, kDLCUDAManaged


class Refused:
    """Stands for what could not be taken: `as_array` raises its error where all ranks hear of it.

    Parameters
    ----------
    error : RingError
    """

    def __init__(self, error: RingError) -> None:
        self.error = error


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

    Whatever `x` raises when it is asked, tensors and traced arrays raise all kinds, becomes an error of ours.

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
    try:
        return _view(x, name)
    except (RingError, MemoryError):
        raise
    except Exception as error:
        raise DtypeError(f"{name}: expected an array, got {type(x).__name__}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Give the first line of an error of another library, and its class if it says nothing. Local."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _view(x: Any, name: str) -> Any:
    if isinstance(x, Refused):
        raise x.error
    if isinstance(x, np.ma.MaskedArray):
        raise DtypeError(f"{name}: expected an array without a mask of its own; fill it, or say what is seen by mask=")
    if isinstance(x, np.ndarray):
        return x
    _check_tracer(x, name)
    _check_tensor(x, name)
    kind = _device_kind(x, name)
    if kind in CUDA:
        reason = device.reason_missing()
        if reason:
            raise BackendError(f"{name}: the array is on a GPU, which can't be used: {reason}; or copy it to the host")
        return device.view(x)
    if kind not in HOST:
        raise BackendError(f"{name}: the array is on a device that is neither the host nor a CUDA GPU; copy it to the "
                           "host")
    if str(getattr(x, "dtype", "")) == "torch.bfloat16":     # a dtype that NumPy and DLPack can't name
        return np.asarray(x.view(sys.modules["torch"].int16)).view(BFLOAT16)
    return np.asarray(x) if hasattr(x, "__array__") or not hasattr(x, "__dlpack__") else np.from_dlpack(x)


def _check_tracer(x: Any, name: str) -> None:
    """Refuse what JAX has in place of an array while it traces a function: it has no numbers."""
    jax: Any = sys.modules.get("jax")
    if hasattr(jax, "core") and isinstance(x, jax.core.Tracer):
        raise DtypeError(f"{name}: expected an array, got a tracer of JAX ({type(x).__name__}), which has no numbers "
                         "yet; within jit and grad take ringmpi.jax.ring_attention")


def _check_tensor(x: Any, name: str) -> None:
    """Refuse a tensor whose memory is not what it stands for, which DLPack does not always notice."""
    if getattr(x, "requires_grad", False):
        raise DtypeError(f"{name}: expected an array, got a tensor that requires a gradient, which "
                         "ringmpi.torch gives; or detach() it")
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "Tensor") or not isinstance(x, torch.Tensor):
        return
    if x.layout != torch.strided:
        raise DtypeError(f"{name}: expected an array, got a tensor of layout {x.layout}; to_dense() it")
    if x.is_neg() or x.is_conj():
        raise DtypeError(f"{name}: expected an array, got a tensor whose signs are not applied yet; "
                         "resolve_conj().resolve_neg() it")
    if x.numel() and not x.data_ptr():
        raise DtypeError(f"{name}: expected an array, got a tensor without memory of its own (fake, distributed, on "
                         "device meta, or of zeros that are not written out)")


def _device_kind(x: Any, name: str) -> int:
    """Give the kind of device that `x` is on, as DLPack numbers them."""
    if not hasattr(x, "__dlpack_device__"):
        return CUDA[0] if hasattr(x, "__cuda_array_interface__") else HOST[0]
    try:
        return int(x.__dlpack_device__()[0])       # what every library answers first, whatever it refuses then
    except Exception as error:
        raise DtypeError(f"{name}: expected an array on one device, got {type(x).__name__} that does not say where it "
                         f"is (deleted, or on several?): {first_line(error)}") from error
