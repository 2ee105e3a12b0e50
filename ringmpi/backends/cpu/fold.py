"""The compiled functions that Python calls: pack tiles of a block, fold a range of keys into a tile of rows.

They are compiled on the first call for a dtype and cached on disk. Numba's cache looks at the file of a function
alone, so the digest of all the files that the machine code comes from is part of its key.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba

from ...environment import launched_rank
from . import pack, product, softmax_rows, tile, vector
from .pack import lanes, pack_keys, pack_values
from .product import ROWS
from .tile import (
    address,
    any_sees,
    find_groups,
    fold_direct,
    fold_scores,
    load_rows,
    part,
    score_panels,
    store_rows,
    visible,
)

_warned: list[bool] = []
SOURCES = (vector, product, softmax_rows, pack, tile)


def _digest() -> str:
    """Digest of the sources of the machine code, this file among them, and of the vectors it is for."""
    paths = [Path(__file__), *(Path(str(module.__file__)) for module in SOURCES)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths) + repr(vector.machine()).encode()).hexdigest()


def _build(digest: str) -> tuple[Any, Any]:
    """Make the two functions; nothing is compiled yet. `digest` makes the key of their cache."""

    def pack_tiles(k, v, start, stop, first, last, packed):  # type: ignore[no-untyped-def]
        """Pack tiles first..last of columns start..stop, counted head by head."""
        digest                          # noqa: B018 (a free variable is part of the key of Numba's cache)
        keys, values, finite, tile, tiles = packed
        for slot in range(first, last):
            head, at = slot // tiles, start + slot % tiles * tile
            n = min(tile, stop - at)
            pack_keys(k, at, n, head, keys, slot * tile * k.shape[2])
            finite[slot] = pack_values(v, at, n, head, values, slot * (len(values) // len(finite)), tile)

    def fold_keys(state, q, k, v, begin, end, scale, rows, columns, packed, private, work):  # type: ignore[no-untyped-def]
        """Fold columns (origin, start, stop, fresh, final) of a block into rows (head, heads, first, count).

        The tiles are in `packed`, from column `origin` on; where `private`, it has room for one and each is packed
        here. The rows stay in the work space from a `fresh` call to the `final` one, which merges them into the state.
        Several heads go tile by tile, since the keys of a token lie side by side.
        """
        digest                          # noqa: B018
        acc, top, norm = state
        head, heads, first, count = rows
        origin, start, stop, fresh, final = columns
        keys, values, finite, tile, tiles = packed
        group, whole = acc.shape[1] // v.shape[1], -(-count // ROWS) * ROWS
        for h in range(heads if fresh else 0):
            load_rows(q, begin, end, first, count, whole, head + h, group, top, part(work, h * whole))
        a, b = visible(work.low, work.high, whole, start, stop)
        for at in range(a - (a - origin) % tile, b, tile):
            n = min(tile, stop - at)
            for h in range(head, head + heads):
                mine = part(work, (h - head) * whole)
                find_groups(whole, mine.low, mine.high, at, n, lanes(acc), mine.groups)
                if not any_sees(whole, mine.groups):
                    continue
                if private and count <= ROWS:
                    fold_direct(count, n, mine, k, v, at, h, scale)
                    continue
                slot = 0 if private else h * tiles + (at - origin) // tile
                keys_at, values_at = slot * tile * k.shape[2], slot * (len(values) // len(finite))
                if private:
                    pack_keys(k, at, n, h, keys, keys_at)
                score_panels(whole, n, mine, keys, keys_at, address(values) + values_at * values.itemsize)
                if private:
                    finite[0] = pack_values(v, at, n, h, values, 0, tile)
                ahead = address(k) + (at + n) * k.shape[1] * k.shape[2] * k.itemsize if private else \
                    address(keys) + (keys_at + tile * k.shape[2]) * keys.itemsize
                fold_scores(whole, mine, values, values_at, finite[slot], v, at, n, h, tile, scale, ahead)
        for h in range(heads if final else 0):
            store_rows(acc, top, norm, first, count, head + h, group, part(work, h * whole))

    return pack_tiles, fold_keys


def compile_for(function: Any, *arguments: Any) -> None:
    """Call a function for the first time; where its machine code can't be saved, go on without. Local."""
    try:
        function(*arguments)
    except OSError as error:              # a full disk, a quota: by now it is compiled
        _warn(error)
        function(*arguments)


def _warn(error: Exception) -> None:
    """Say once, on the launcher's rank 0, that there is no cache."""
    if launched_rank() == 0 and not _warned:
        _warned.append(True)
        warnings.warn(f"kernels are compiled anew in every process: {error}; set NUMBA_CACHE_DIR to a folder "
                      "that can be written", RuntimeWarning, stacklevel=3)


def _compiled(functions: tuple[Any, ...]) -> Iterator[Any]:
    """Wrap functions for Numba, with a cache on disk where there is a folder to write to."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}
    for function in functions:
        try:
            yield numba.njit(**options)(function)
        except RuntimeError as error:
            _warn(error)
            options["cache"] = False
            yield numba.njit(**options)(function)


pack_tiles, fold_keys = _compiled(_build(_digest()))
