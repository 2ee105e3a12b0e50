"""Exact attention over long sequences on a ring of MPI ranks.

Importing the package imports nothing else: NumPy, MPI, Numba and h5py come when a name first needs them.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import RingAttention
    from .errors import (
        BackendError,
        CommError,
        DtypeError,
        InternalError,
        LaunchError,
        MaskError,
        OptionError,
        OutputError,
        RankLost,
        ResourceError,
        RingError,
        RingTimeout,
        ShapeError,
        ShardError,
    )
    from .functional import ring_attention, ring_attention_backward
    from .kv.cache import KVCache
    from .layout import Contiguous, Custom, Layout, Striped, Zigzag
    from .mask import Mask
    from .neighbourhood import Grid
    from .schedules.redistribution import redistribute
    from .schedules.spec import Schedule
    from .trace import Step, Trace

_HOME = {
    "attention": ("RingAttention",),
    "functional": ("ring_attention", "ring_attention_backward"),
    "errors": ("BackendError", "CommError", "DtypeError", "InternalError", "LaunchError", "MaskError", "OptionError",
               "OutputError", "RankLost", "ResourceError", "RingError", "RingTimeout", "ShapeError", "ShardError"),
    "kv.cache": ("KVCache",),
    "layout": ("Contiguous", "Custom", "Layout", "Striped", "Zigzag"),
    "mask": ("Mask",),
    "neighbourhood": ("Grid",),
    "schedules.redistribution": ("redistribute",),
    "schedules.spec": ("Schedule",),
    "trace": ("Step", "Trace"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "BackendError", "CommError", "Contiguous", "Custom", "DtypeError", "Grid", "InternalError", "KVCache",
    "LaunchError", "Layout", "Mask", "MaskError", "OptionError", "OutputError", "RankLost", "ResourceError",
    "RingAttention", "RingError", "RingTimeout", "Schedule", "ShapeError", "ShardError", "Step", "Striped", "Trace",
    "Zigzag", "redistribute", "ring_attention", "ring_attention_backward",
]

try:
    __version__ = version("ringmpi")
except PackageNotFoundError:          # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in ("analysis", "torch"):     # modules with names of their own; the second needs PyTorch
        return importlib.import_module(f".{name}", __name__)
    if name in _MODULE:
        return getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
