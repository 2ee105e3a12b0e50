"""Backends by name; each is imported only when it is opened."""

from __future__ import annotations

import importlib
import importlib.util
from typing import cast

from ..errors import BackendError, OptionError
from .base import Backend

_CLASSES = {"numba": "NumbaBackend", "numpy": "NumpyBackend"}      # in the order of preference
NAMES = ("auto", *_CLASSES)


def reason_missing(name: str) -> str | None:
    """Say why backend `name` cannot run here; None if it can. Local."""
    if name == "numba" and importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install numba"
    return None


def check_name(name: str) -> None:
    """Raise `OptionError` unless `name` is one of `NAMES`. Local."""
    if name not in NAMES:
        raise OptionError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")


def open_backend(name: str, threads: int) -> Backend:
    """Open a backend; ``"auto"`` takes the first that can run here. Local.

    Raises
    ------
    OptionError
        If there is no backend of that name.
    BackendError
        If this machine cannot run it.
    """
    check_name(name)
    if name == "auto":
        name = next(n for n in _CLASSES if reason_missing(n) is None)
    reason = reason_missing(name)
    if reason:
        raise BackendError(f"backend {name}: {reason}")
    module = importlib.import_module(f".{name}_", __package__)
    return cast(Backend, getattr(module, _CLASSES[name])(threads))
