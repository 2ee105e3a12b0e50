"""The forward pass of few queries over keys that stay where they are, step after step: what decoding repeats.

What the kernels take is made once. A step that reads no more than one yields for is a single call of machine code; a
longer one goes the way of any other block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...layout import Integers
from ...softmax import State
from ..base import Bound
from .arguments import KernelArguments
from .compiled import forward_keys
from .forward import heads_together, most_columns
from .steps import TASKS, Limits
from .tuples import ColumnRange, RowRange, StateArrays, forward_numbers, ranges_of
from .workspace import ForwardScratch, PackedKV

Array = NDArray[Any]


class BoundBlock(Bound):
    """A block of few rows; see `Backend.bind`. Local.

    Parameters
    ----------
    block : KernelArguments
        With a score without positions; its queries, begin and end, and the bias of its keys, are written to here.
    q : array
        Those queries.
    state : State
    packed : PackedKV
    scratch : ForwardScratch
    threads : int
    limits : Limits
    key_bias : array of shape (n_k, heads or 1), optional
        That of the score, where it stays too.
    loop : Bound
        The same block, for a longer step.
    check : callable
        Raises an error unless the scratch is free.
    """

    def __init__(self, block: KernelArguments, q: Array, state: State, packed: PackedKV, scratch: ForwardScratch,
                 threads: int, limits: Limits, key_bias: Array | None, loop: Bound, check: Callable[[], None]) -> None:
        self._q, self._begin, self._end = q, block.arrays.begin, block.arrays.end
        self._rows = RowRange(0, block.heads, 0, block.rows)
        self._numbers = forward_numbers(StateArrays(state.acc, state.row_max, state.row_sum), block.arrays,
                                        scratch.private, scratch.work)
        self._most = most_columns(packed, block.heads, limits)
        if threads > 1:
            self._most = min(self._most, TASKS * packed.tile)        # more is cut among the threads
        if block.rows > packed.rows or heads_together(block, packed) < block.heads:
            self._most = 0
        self._score = block.score_arguments(scratch.row_score)
        self._key_bias = key_bias
        self._ranges: NDArray[np.int64] | None = None
        self._loop = loop
        self._check = check

    def see(self, begin: Integers, end: Integers) -> None:
        """Take what the queries see from now on; see `Bound.see`. Local."""
        self._begin[:] = begin
        self._end[:] = end
        first, last = int(begin.min()), int(end.max())
        self._loop.see(begin, end)
        if self._score is not None and self._key_bias is not None:        # keys have come, or others in their place
            bias = self._score.bias.reshape(self._key_bias.shape[1], -1)
            bias[:, first:last] = self._key_bias[first:last].T
        some = last - first <= self._most
        self._ranges = ranges_of([(self._rows, ColumnRange(first, first, last))]) if some else None

    def fold(self, q: Array) -> Iterable[int]:
        """Fold what is seen into the state; see `Bound.fold`. Local."""
        if self._ranges is None:
            return self._loop.fold(q)
        self._check()
        self._q[...] = q
        forward_keys(self._numbers, self._score, self._ranges)
        return ()
