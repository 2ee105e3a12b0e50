"""What a rank holds of a cache's sequence, and how it grows: tokens dealt out, dropped by a window, cropped, undone."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..call import Array
from ..errors import OptionError, RingError
from ..layout import Layout
from ..mask_base import BaseMask
from .sizes import Sizes
from .store import Empty, KVStore

DEALT = 16                    # tokens in a row that a rank keeps of those that all ranks bring
ROOM = 256                    # tokens on a rank that a cache without a capacity begins with


class Contents:
    """The sequence so far, and this rank's tokens of it. Local; the same calls on every rank.

    Parameters
    ----------
    sizes : Sizes
    mask : BaseMask
        Keys that no later query sees through its window are dropped, but for those that the sizes let `crop` go back
        by.
    rank, size : int
        Tokens that all ranks have are dealt out by them.
    empty : callable
        Makes an array of a shape and a dtype where it is computed with.
    acc_dtype : dtype
        Of a bias of the keys.

    Attributes
    ----------
    length : int
        Tokens that were appended.
    dropped : int
        Keys before it may be gone, except the first that the mask shows.
    store : KVStore
    """

    def __init__(self, sizes: Sizes, mask: BaseMask, rank: int, size: int, empty: Empty,
                 acc_dtype: np.dtype[Any]) -> None:
        self.length = 0
        self.dropped = 0
        self._reordered = 0           # a checksum of what `reorder` was told
        self._capacity = sizes.capacity
        self._first = mask.first
        left = mask.left
        self._left = left
        self._kept = None if left is None else left + sizes.rollback        # tokens before the last that were appended
        self._rank, self._size = rank, size
        most = None if self._kept is None else max(4 * DEALT, -(-self._kept // (4 * size)))
        room = ROOM if sizes.capacity is None else -(-sizes.capacity // (size * DEALT)) * DEALT
        self.store = KVStore(sizes.shapes, sizes.in_keys, sizes.dtype, (sizes.key_bias, acc_dtype), empty, room, most)

    @property
    def alike(self) -> dict[str, Any]:
        """What local calls have made of the cache, and must be the same on every rank."""
        return {"length": self.length, "order of the batch (checksum)": self._reordered}

    def seen(self, length: int) -> int:
        """Say how many of the first tokens a query after so many may see, whatever the window drops. Local."""
        return length if self._left is None else self._first

    def check_whole(self) -> None:
        """Raise `RingError` if `reorder` broke off half way. Local."""
        if self.store.mixed:
            raise RingError("this KVCache is of no use any more: reorder() was interrupted, and left elements with "
                            "tokens of several; crop(0), or open what was saved")

    def check_capacity(self, count: int) -> None:
        """Raise `OptionError` unless so many tokens have room. Local."""
        if self._capacity is not None and self.length + count > self._capacity:
            raise OptionError(f"KVCache: expected at most {self._capacity} tokens, its capacity, got {self.length} and "
                              f"{count} more; make a larger one, or crop it")

    def check_window(self, n_q: int) -> None:
        """Raise `OptionError` if queries would see keys that were dropped. Local."""
        if self._left is not None and self.dropped and self.length - n_q - self._left < self.dropped:
            most = self.length - self._left - self.dropped
            raise OptionError(f"KVCache.attend: expected {f'at most {most} queries' if most > 0 else 'no queries'}, "
                              f"got {n_q}: the first would see keys before {self.dropped}, which the window has "
                              "dropped; append the tokens that were cropped, or crop(0), or make the cache with a "
                              "larger rollback=")

    def take(self, arrays: Sequence[Array], total: int, layout: Layout | None) -> None:
        """Keep this rank's share of `total` new tokens, by their layout, or of those that all ranks have. Local.

        The arrays are those of a chunk.
        """
        start = self.length
        if layout is None:
            positions = np.arange(start, start + total, dtype=np.int64)
            mine = (positions // DEALT) % self._size == self._rank
            for first, last in _runs(mine):
                self.store.append(positions[first:last], *(x[:, first:last] for x in arrays))
        else:
            self.store.append(start + layout.positions(self._rank), *arrays)
        self.length = start + total
        if self._kept is not None and total and start - self._kept > self.dropped:
            self.dropped = start - self._kept
            self.store.drop(self._first, self.dropped)

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. Local."""
        if length > self.length:
            raise OptionError(f"KVCache.crop: expected a length up to {self.length}, got {length}")
        if 0 < length < self.dropped:
            raise OptionError(f"KVCache.crop: expected a length from {self.dropped} on, got {length}: a window has "
                              "dropped the keys before; make the cache with a larger rollback=")
        self.store.truncate(length)
        self.length = length
        self.dropped = min(self.dropped, length)
        if not length:                # nothing is left whose order could differ
            self._reordered = 0

    def reorder(self, elements: NDArray[np.int64]) -> None:
        """Let each element of the batch have what another one had. Local."""
        self.store.reorder(elements)
        self._reordered = zlib.crc32(elements.tobytes(), self._reordered)


class Undone:
    """Takes back what was appended within a block that ends with an error. Local."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._before = contents.length, contents.dropped, contents.store.chunks

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if error is not None:
            contents = self._contents
            contents.length, contents.dropped, contents.store.chunks = self._before
            contents.store.truncate(contents.length)


def _runs(mine: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Give where runs of True begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mine.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
