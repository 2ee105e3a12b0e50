"""Backends by name; each is imported only when it is opened."""

from __future__ import annotations

import importlib
import importlib.util
from typing import cast

from .. import device
from ..errors import BackendError, OptionError
from .base import Backend

_CLASSES = {"numba": ("numba_.backend", "NumbaBackend"), "numpy": ("numpy_", "NumpyBackend"),
            "cuda": ("cuda.backend", "CudaBackend")}
HOST_NAMES = ("numba", "numpy")          # in the order of preference
NAMES = ("auto", *_CLASSES)


def reason_missing(name: str) -> str | None:
    """Say why backend `name` cannot run here; None if it can. Local."""
    if name == "numba" and importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install numba"
    if name == "cuda":
        return device.reason_missing()
    return None


def check_name(name: str) -> None:
    """Raise `OptionError` unless `name` is one of `NAMES`. Local."""
    if name not in NAMES:
        raise OptionError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")


def open_backend(name: str, threads: int, gpu: device.Device | None = None) -> Backend:
    """Open a backend; ``"auto"`` takes the first for host arrays that can run here. Local.

    Parameters
    ----------
    name : str
    threads : int
    gpu : Device, optional
        For ``"cuda"``; the first one by default.

    Raises
    ------
    OptionError
        If there is no backend of that name.
    BackendError
        If this machine cannot run it.
    """
    check_name(name)
    if name == "auto":
        name = next(n for n in HOST_NAMES if reason_missing(n) is None)
    reason = reason_missing(name)
    if reason:
        raise BackendError(f"backend {name}: {reason}")
    module, kind = _CLASSES[name]
    return cast(Backend, getattr(importlib.import_module(f".{module}", __package__), kind)(threads, gpu))
