"""Filters of compressed datasets that are read: those that h5py brings, and on request those of hdf5plugin.

A filter is a library that the data of a file chooses. So those are named here that may be, and no other is looked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import h5py

from ..errors import OptionError

OWN = {1: "deflate", 2: "shuffle", 3: "fletcher32", h5py.h5z.FILTER_SZIP: "szip", 32000: "lzf"}
PLUGINS = {32001: "blosc", 32004: "lz4", 32008: "bshuf", 32015: "zstd", 32026: "blosc2"}       # that lose no bit

Filters = Mapping[int, str]


def filters_of_plugins() -> Filters:
    """Register the filters of the package hdf5plugin in this process; give those that may be read, and our own. Local.

    Raises
    ------
    OptionError
        If it is not installed, or can't be loaded.
    """
    try:
        import hdf5plugin
        registered = hdf5plugin.get_config().registered_filters
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise OptionError(f"hdf5plugin: expected the package hdf5plugin, got none that can be loaded ({error}); "
                          "pip install hdf5plugin, or leave the option out") from error
    return OWN | {number: name for number, name in PLUGINS.items() if name in registered}


def refusal(number: int, name: str, filters: Filters) -> str:
    """Say why a filter is not in `filters`, and what to do about it; nothing if it is, and can be read. Local."""
    if number in filters:
        if number != h5py.h5z.FILTER_SZIP or h5py.h5z.filter_avail(number):
            return ""
        return "szip is not in this build of HDF5; copy it with another filter (h5repack -f GZIP=4)"
    remedy = "say --hdf5plugin, if you trust the file with that package, or " if number in PLUGINS else ""
    return (f"unknown filter {number} ({name}); known are {', '.join(filters.values())}; {remedy}copy it with one of "
            "these (h5repack -f GZIP=4)")
