"""Links within an HDF5 file: followed one by one, and never out of it."""

from __future__ import annotations

import itertools
from typing import Any

import h5py

from ..errors import ShardError

MOST_SOFT_LINKS = 10           # on the way to one object
SHOWN_NAMES = 20               # of a file, in an error


def resolve_path(file: h5py.File, path: str) -> Any:
    """Give the object at `path`, link by link. Local.

    Raises
    ------
    ShardError
        If there is none, or the way leads through an external link, more than ten soft links, or something that is no
        group.
    """
    where = f"{file.filename}: {path!r}"
    here: Any = file
    soft_links = 0
    parts = _split(path)
    while parts:
        part = parts.pop(0)
        if not isinstance(here, h5py.Group):
            raise ShardError(f"{where}: {here.name!r} is no group")
        try:
            link = here.get(part, getlink=True)
        except (KeyError, TypeError, ValueError):
            link = None
        if link is None:
            raise ShardError(f"{where}: no such dataset; the file has {_names(file)}")
        if isinstance(link, h5py.ExternalLink):
            raise ShardError(f"{where}: refused: an external link to {link.filename!r}; inputs must not lead outside "
                             "their file")
        if isinstance(link, h5py.SoftLink):
            soft_links += 1
            if soft_links > MOST_SOFT_LINKS:
                raise ShardError(f"{where}: refused: more than ten soft links")
            here = file if link.path.startswith("/") else here
            parts = _split(link.path) + parts
        else:
            here = here[part]
    return here


def _names(file: h5py.File) -> str:
    names = sorted(itertools.islice(file, SHOWN_NAMES))
    return ", ".join(names) + (" ..." if len(file) > SHOWN_NAMES else "") or "none"


def _split(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]
