"""The keys and values that a rank holds of a cache: chunks that are filled one after the other, and never moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Bound
from ..layout import Integers
from ..schedules.links import assign

Array = Any                       # of NumPy, or of CuPy on a GPU
Empty = Callable[[tuple[int, ...], Any], Array]
PARTS = 64                        # of what is taken at once, of which a chunk is one at most, if chunks are small
PIECE_BYTES = 2**22               # of keys and values that are put in another order at a time


@dataclass(eq=False)
class Chunk:
    """Some tokens of a cache, in arrays with room for more.

    Attributes
    ----------
    k, v : arrays of shape (batch, room, kv_heads, dim) and (batch, room, kv_heads, dim_v)
        v may be a view of the first numbers of k.
    places : int64 array of shape (room,)
        Positions; they increase, from chunk to chunk too.
    bias : array of shape (batch, room, heads or 1), accumulator dtype, optional
        Of the keys.
    in_keys : bool
        Whether v is in k.
    used : int
    bound, seen, bound_by
        What a decoder has prepared to meet it with, for each interval of the mask, whether something is seen of it, and
        whose that is; they go with the chunk.
    """

    k: Array
    v: Array
    places: Integers
    bias: Array = None
    in_keys: bool = False
    used: int = 0
    bound: list[list[Bound]] = field(default_factory=list)
    seen: list[bool] = field(default_factory=list)
    bound_by: Any = None

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Keys, values unless these are in the keys, and a bias if there is one."""
        return (self.k, *([] if self.in_keys else [self.v]), *([] if self.bias is None else [self.bias]))

    @property
    def positions(self) -> Integers:
        """Of the tokens there are."""
        return self.places[:self.used]

    def unbind(self) -> None:
        """Let go of what a decoder has prepared. Local."""
        self.bound = []
        self.seen = []
        self.bound_by = None


class KVStore:
    """Keys and values of some positions. Local.

    Parameters
    ----------
    shapes : ((int, ...), (int, ...))
        (batch, kv_heads, dim) and (batch, kv_heads, dim_v).
    in_keys : bool
        Whether values are the first numbers of keys.
    dtype : dtype
    bias : (int, dtype)
        Numbers of each key, 0 for none, and their dtype.
    empty : callable
        Makes an array of a shape and a dtype where it is computed with.
    room : int
        Tokens of the first chunk.
    most : int, optional
        Tokens of the largest chunk, unless many come at once; by default each is as large as all before it.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], in_keys: bool, dtype: np.dtype[Any],
                 bias: tuple[int, np.dtype[Any]], empty: Empty, room: int, most: int | None = None) -> None:
        self.chunks: list[Chunk] = []
        self.changes = 0                  # how often there came to be other positions, or biases elsewhere
        self.mixed = False                # whether a move broke off that left elements with tokens of several
        self._shapes = shapes[:1] if in_keys else shapes
        self._dim_v = shapes[1][2]
        self._dtype = dtype
        self._bias = bias
        self._empty = empty
        self._room = room
        self._most = most
        self._token_bytes = sum(math.prod(shape) for shape in self._shapes) * dtype.itemsize

    @property
    def tokens(self) -> int:
        """Tokens there are."""
        return sum(chunk.used for chunk in self.chunks)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and of a bias, with the room for more."""
        return sum(x.nbytes for chunk in self.chunks for x in chunk.arrays)

    @property
    def positions(self) -> Integers:
        """Of all tokens, increasing."""
        return np.concatenate([np.empty(0, np.int64), *(chunk.positions for chunk in self.chunks)])

    def append(self, positions: Integers, *arrays: Array) -> None:
        """Take tokens whose positions are beyond those there are. Local.

        Parameters
        ----------
        positions : int64 array of shape (n,)
        *arrays : arrays of shape (batch, n, ...)
            Those of a chunk.
        """
        done = 0
        self.changes += 1
        while done < len(positions):
            chunk = self._with_room(len(positions) - done)
            count = min(len(positions) - done, len(chunk.places) - chunk.used)
            there, here = slice(chunk.used, chunk.used + count), slice(done, done + count)
            for target, x in zip(chunk.arrays, arrays, strict=True):
                assign(target[:, there], x[:, here])
            chunk.places[there] = positions[here]
            chunk.used += count
            done += count

    def make_room(self, tokens: int) -> None:
        """Make sure that so many tokens more find room, in one chunk if it may be so large. Local."""
        if tokens:
            self._with_room(tokens)

    def _with_room(self, wanted: int) -> Chunk:
        """Give the last chunk if it has room, else a new one."""
        if not self.chunks or self.chunks[-1].used == len(self.chunks[-1].places):
            room = max(self._room, self.tokens if self._most is None else 0, wanted)
            room = max(1, room if self._most is None else min(room, max(self._most, wanted // PARTS)))
            k, *v = (self._empty((batch, room, heads, dim), self._dtype) for batch, heads, dim in self._shapes)
            numbers, dtype = self._bias
            bias = self._empty((len(k), room, numbers), dtype) if numbers else None
            self.chunks.append(Chunk(k, v[0] if v else k[..., :self._dim_v], np.empty(room, np.int64), bias, not v))
        return self.chunks[-1]

    def truncate(self, length: int) -> None:
        """Forget the tokens from a position on. Local."""
        self.changes += 1
        for chunk in self.chunks:
            chunk.used = int(np.searchsorted(chunk.positions, length))
        self.chunks = [chunk for chunk in self.chunks if chunk.used]
        self.mixed = self.mixed and bool(self.chunks)

    def drop(self, start: int, stop: int) -> None:
        """Give back the memory of chunks all of whose positions are within a range; the others stay whole. Local."""
        self.changes += 1
        self.chunks = [chunk for chunk in self.chunks
                       if not (chunk.used and start <= chunk.places[0] and chunk.positions[-1] < stop)]

    def reorder(self, elements: NDArray[np.int64]) -> None:
        """Let each element of the batch have what another one had, in place. Local."""
        changed = [(int(target), int(source)) for target, source in enumerate(elements) if target != source]
        if not changed:
            return
        # Before anything is moved there is room for the largest piece: only an interrupt, or a GPU, can break it off.
        pieces = [x for piece in self.pieces(PIECE_BYTES) for x in piece[:len(self._shapes)]]
        most = max((math.prod(x.shape[1:]) for x in pieces), default=0)
        room = [self._empty((most,), self._dtype) for _ in changed]
        biases = [(chunk.bias, chunk.bias[elements]) for chunk in self.chunks if chunk.bias is not None]
        self.mixed = True
        for bias, other in biases:
            bias[...] = other
        self.changes += len(biases)
        for x in pieces:
            before = [flat[:math.prod(x.shape[1:])].reshape(x.shape[1:]) for flat in room]
            for copy, (_, source) in zip(before, changed, strict=True):
                assign(copy, x[source])
            for copy, (target, _) in zip(before, changed, strict=True):
                assign(x[target], copy)
        self.mixed = False

    def pieces(self, nbytes: int) -> Iterator[tuple[Array, ...]]:
        """Yield all tokens, in place: of so many bytes at most, or of one token; see `Chunk.arrays`. Local."""
        for chunk in self.chunks:
            step = max(1, nbytes // max(1, self._token_bytes))
            for start in range(0, chunk.used, step):
                tokens = slice(start, min(start + step, chunk.used))
                yield tuple(x[:, tokens] for x in chunk.arrays)

    def views(self, first: int, last: int) -> Iterator[tuple[Array, ...]]:
        """Yield the tokens from one to another, as they are numbered on this rank, in place. Local."""
        start = 0
        for chunk in self.chunks:
            tokens = slice(max(0, first - start), min(chunk.used, last - start))
            if tokens.start < tokens.stop:
                yield tuple(x[:, tokens] for x in chunk.arrays)
            start += chunk.used
