"""Backends by name; each is imported only when it is opened."""

from __future__ import annotations

import importlib
import importlib.util
from typing import cast

from .. import device
from ..errors import BackendError, OptionError
from .base import GPU_KERNELS, Backend

_CLASSES = {"numba": ("numba_.backend", "NumbaBackend"), "numpy": ("numpy_", "NumpyBackend"),
            "cuda": ("cuda.backend", "CudaBackend")}
HOST_NAMES = ("numba", "numpy")          # in the order of preference
GPU_NAMES = ("cuda",)                    # likewise: "auto" takes the first for arrays on a GPU
NAMES = ("auto", *HOST_NAMES, *GPU_NAMES)


def reason_missing(name: str) -> str | None:
    """Say why backend `name` cannot run here; None if it can. Local."""
    if name == "numba" and importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install numba"
    return device.reason_missing() if name in GPU_NAMES else None


def check_name(name: str) -> None:
    """Raise `OptionError` unless `name` is one of `NAMES`. Local."""
    if name not in NAMES:
        raise OptionError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")


def backend_class(name: str) -> type[Backend]:
    """Give the class of a backend that can run here, which answers for what it is without being opened. Local."""
    module, kind = _CLASSES[name]
    return cast(type[Backend], getattr(importlib.import_module(f".{module}", __package__), kind))


def tolerance(name: str | None) -> dict[str, float]:
    """Give `Backend.tolerance` of a backend, whether or not it can run here; unknown names count as CPUs. Local."""
    return (backend_class(name) if name in GPU_NAMES else Backend).tolerance


def choose_gpu_early(name: str) -> None:
    """Make this rank's GPU current before MPI starts, for a backend that computes on one. Local."""
    if name in GPU_NAMES:
        device.choose_early()     # UCX takes the network card next to the GPU that is current when MPI starts


def check_canonical(name: str) -> None:
    """Raise `OptionError` unless backend `name`, which can run here, has a canonical order. Local."""
    if not backend_class(name).canonical_tile:
        raise OptionError("canonical order: expected a backend whose sums have a fixed order, numba or cuda, got "
                          f"{name}; take numba, for arrays on the host")


def check_gpu_kernels(name: str) -> None:
    """Raise `OptionError` unless `name` is one of `GPU_KERNELS`. Local."""
    if name not in GPU_KERNELS:
        raise OptionError(f"gpu_kernels: expected one of {', '.join(GPU_KERNELS)}, got {name!r}")


def open_backend(name: str, threads: int, gpu: device.Device | None = None, canonical: bool = False,
                 gpu_kernels: str = "auto") -> Backend:
    """Open a backend; ``"auto"`` takes the first for host arrays that can run here. Local.

    Parameters
    ----------
    name : str
    threads : int
    gpu : Device, optional
        For a backend that computes on one; the first one by default.
    canonical : bool
        Whether it is to compute in canonical order; see `Backend.accumulate`.
    gpu_kernels : str
        Whose kernels are to differentiate on a GPU: one of `GPU_KERNELS`.

    Raises
    ------
    OptionError
        If there is no backend of that name, or it has no canonical order.
    BackendError
        If this machine cannot run it.
    """
    check_name(name)
    if name == "auto":
        name = next(n for n in HOST_NAMES if reason_missing(n) is None)
    reason = reason_missing(name)
    if reason:
        raise BackendError(f"backend {name}: {reason}")
    if canonical:
        check_canonical(name)
    backend = backend_class(name)(threads, gpu)
    backend.canonical = canonical
    backend.gpu_kernels = gpu_kernels
    return backend
