"""The compiled functions that Python calls: pack tiles of a block, fold or differentiate a range of keys.

They are compiled on the first call for a dtype and cached on disk. Numba's cache looks at the file of a function
alone, so the digest of all the files that the machine code comes from is part of its key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba

from ...environment import launched_rank
from . import gradient, gradient_rows, pack, product, score_rows, softmax_rows, tile, vector
from .cache import KernelCache, warn_once
from .gradient import differentiate_tile, load_back, pack_tile, store_back
from .pack import lanes, pack_keys, pack_values
from .product import ROWS
from .score_rows import load_traits, shape_part
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

SOURCES = (vector, product, softmax_rows, score_rows, gradient_rows, pack, tile, gradient)


def _digest() -> str:
    """Digest of the sources of the machine code, this file among them, and of the vectors it is for."""
    paths = [Path(__file__), *(Path(str(module.__file__)) for module in SOURCES)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths) + repr(vector.machine()).encode()).hexdigest()


def _forward(digest: str) -> tuple[Any, ...]:
    """Make the functions of the forward pass; nothing is compiled yet. `digest` makes the key of their cache."""

    def pack_tiles(k, v, start, stop, first, last, packed):  # type: ignore[no-untyped-def]
        """Pack tiles first..last of columns start..stop, counted head by head."""
        digest                          # noqa: B018 (a free variable is part of the key of Numba's cache)
        keys, values, finite, tile, tiles = packed
        for slot in range(first, last):
            head, at = slot // tiles, start + slot % tiles * tile
            n = min(tile, stop - at)
            pack_keys(k, at, n, head, keys, slot * tile * k.shape[2])
            finite[slot] = pack_values(v, at, n, head, values, slot * (len(values) // len(finite)), tile)

    def fold_keys(state, q, k, v, begin, end, scale, shape, rows, columns, packed, private, work):  # type: ignore[no-untyped-def]
        """Fold columns (origin, start, stop, fresh, final) of a block into rows (head, heads, first, count).

        The tiles are in `packed`, from column `origin` on; where `private`, it has room for one and each is packed
        here. The rows stay in the work space from a `fresh` call to the `final` one, which merges them into the state.
        `shape` is None for a plain score, else the scale is 1. Several heads go tile by tile, since the keys of a token
        lie side by side.
        """
        digest                          # noqa: B018
        acc, top, norm = state
        head, heads, first, count = rows
        origin, start, stop, fresh, final = columns
        keys, values, finite, tile, tiles = packed
        group, whole = acc.shape[1] // v.shape[1], -(-count // ROWS) * ROWS
        for h in range(heads if fresh else 0):
            load_rows(q, begin, end, first, count, whole, head + h, group, top, part(work, h * whole))
            load_traits(first, count, whole, head + h, group, shape_part(shape, h * whole))
        a, b = visible(work.low, work.high, whole, start, stop)
        for at in range(a - (a - origin) % tile, b, tile):
            n = min(tile, stop - at)
            for h in range(head, head + heads):
                mine, score = part(work, (h - head) * whole), shape_part(shape, (h - head) * whole)
                find_groups(whole, mine.low, mine.high, at, n, lanes(acc), mine.groups)
                if not any_sees(whole, mine.groups):
                    continue
                if private and count <= ROWS:
                    fold_direct(count, n, mine, k, v, at, h, scale, score)
                    continue
                slot = 0 if private else h * tiles + (at - origin) // tile
                keys_at, values_at = slot * tile * k.shape[2], slot * (len(values) // len(finite))
                if private:
                    pack_keys(k, at, n, h, keys, keys_at)
                score_panels(whole, n, mine.queries, mine.s, mine.groups, keys, keys_at,
                             address(values) + values_at * values.itemsize)
                if private:
                    finite[0] = pack_values(v, at, n, h, values, 0, tile)
                ahead = address(k) + (at + n) * k.shape[1] * k.shape[2] * k.itemsize if private else \
                    address(keys) + (keys_at + tile * k.shape[2]) * keys.itemsize
                fold_scores(whole, mine, values, values_at, finite[slot], v, at, n, h, tile, scale, score, ahead)
        for h in range(heads if final else 0):
            store_rows(acc, top, norm, first, count, head + h, group, part(work, h * whole))

    return pack_tiles, fold_keys


def _backward(digest: str) -> tuple[Any, ...]:
    """Make the functions of the backward pass, as `_forward` does."""

    def pack_twice(k, v, start, stop, first, last, packed):  # type: ignore[no-untyped-def]
        """Pack tiles first..last of columns start..stop, counted head by head, for `differentiate_keys`."""
        digest                          # noqa: B018
        tile, tiles = packed[3:]
        for slot in range(first, last):
            at = start + slot % tiles * tile
            pack_tile(k, v, at, min(tile, stop - at), slot // tiles, slot, packed)

    def differentiate_keys(gradient, q, begin, end, scale, shape, rows, columns, packed, sums,  # type: ignore[no-untyped-def]
                           slope, work):
        """Differentiate columns (origin, start, stop) of a block for rows (head, group, first, count) of a key head.

        `packed` has the tiles from column `origin` on. dQ, times `slope`, is added to that of the gradient (dout, lse,
        delta, dq); dK, which is not yet multiplied, and dV to `sums`, whose first row is that of `origin`.
        """
        digest                          # noqa: B018
        dout, lse, delta, dq = gradient
        head, group, first, count = rows
        origin, start, stop = columns
        sums_k, sums_v = sums
        tile, tiles = packed[3:]
        height = len(work.s)
        for r in range(first, first + count, height):
            some = min(height, first + count - r)
            whole = -(-some // ROWS) * ROWS
            load_back(q, dout, lse, delta, begin, end, r, some, whole, head, group, work)
            load_traits(r, some, whole, head, group, shape)
            a, b = visible(work.low, work.high, whole, start, stop)
            for at in range(a - (a - origin) % tile, b, tile):
                n = min(tile, stop - at)
                find_groups(whole, work.low, work.high, at, n, lanes(dq), work.groups)
                if any_sees(whole, work.groups):
                    differentiate_tile(whole, n, work, packed, head * tiles + (at - origin) // tile, sums_k, sums_v,
                                       at - origin, at, scale, shape)
            store_back(dq, r, some, head, group, slope, work)

    def add_sums(dk, dv, sums_k, sums_v, slope, head, start, stop, origin, spans):  # type: ignore[no-untyped-def]
        """Add the sums of all chunks of a key head to rows start..stop of dk and dv.

        A chunk of rows saw columns spans[chunk] alone; sums (chunks, keys, width) begin at column `origin`.
        """
        digest                          # noqa: B018
        for chunk in range(len(spans)):
            for j in range(max(start, spans[chunk, 0]), min(stop, spans[chunk, 1])):
                x, y = sums_k[chunk, j - origin], sums_v[chunk, j - origin]
                for c in range(dk.shape[2]):
                    dk[j, head, c] += x[c] * slope
                for c in range(dv.shape[2]):
                    dv[j, head, c] += y[c]

    return pack_twice, differentiate_keys, add_sums


def compile_for(function: Any, *arguments: Any) -> None:
    """Call a function for the first time; where its machine code can't be saved, go on without. Local."""
    try:
        function(*arguments)
    except OSError as error:              # a full disk, a quota: by now it is compiled
        _warn(error)
        function(*arguments)


def _warn(error: Exception) -> None:
    """Say once, on the launcher's rank 0, that there is no cache."""
    if launched_rank() == 0:
        warn_once(f"kernels are compiled anew in every process: {error}; set NUMBA_CACHE_DIR to a folder "
                  "that can be written")


def _compiled(functions: tuple[Any, ...]) -> Iterator[Any]:
    """Wrap functions for Numba, with a cache on disk where there is a folder to write to."""
    for function in functions:
        compiled: Any = numba.njit(nogil=True, error_model="numpy")(function)
        try:
            compiled._cache = KernelCache(function)       # as enable_caching does, with Numba's own
        except RuntimeError as error:
            _warn(error)
        yield compiled


pack_tiles, fold_keys, pack_twice, differentiate_keys, add_sums = _compiled(
    _forward(_digest()) + _backward(_digest()))
