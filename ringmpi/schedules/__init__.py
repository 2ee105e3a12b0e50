"""Schedules: in which order blocks pass by, and how they move. They never import a backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from ..errors import OptionError

if TYPE_CHECKING:
    from .base import Schedule

_CLASSES = {"ring": "Ring", "gather": "Gather"}      # each in the module of its name
NAMES = tuple(_CLASSES)


def check_schedule(name: Any) -> str:
    """Return the name of a schedule, or raise `OptionError` unless it is one of `NAMES`. Local."""
    if name not in NAMES:
        raise OptionError(f"schedule: expected one of {', '.join(NAMES)}, got {name!r}")
    return str(name)


def schedule_class(name: str) -> type[Schedule]:
    """Give the class of a schedule, imported only when it is needed. Local."""
    return cast("type[Schedule]", getattr(importlib.import_module(f".{name}", __package__), _CLASSES[name]))


def make(name: str, comm: Any, new_link: Callable[[], Any], clear: Callable[[Any], None],
         add: Callable[[Any, Any], None]) -> Schedule:
    """Make a schedule; see `base.Schedule` for the parameters. Local."""
    return schedule_class(name)(comm, new_link, clear, add)
