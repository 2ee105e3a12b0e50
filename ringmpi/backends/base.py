"""The contract of a backend: the arithmetic of one K/V block, nothing about ranks, files or masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layout import Integers
from ..softmax import State


class Backend:
    """What every backend does. Local; no backend imports MPI.

    Parameters
    ----------
    threads : int
        CPU threads to compute with, at least 1.

    Raises
    ------
    BackendError
        If this machine cannot run the backend; the message says what is missing.
    """

    name = "base"
    compiles = False        # whether `prepare` may take long

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def prepare(self, dtype: np.dtype[Any], accumulator: np.dtype[Any]) -> None:
        """Make ready for inputs of `dtype` and that accumulator: compile, or load what was compiled. Local."""

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, scale: float) -> Iterator[int]:
        """Fold one block of K and V into the running softmax of `q`. Local.

        Row i sees columns ``begin[i] <= j < end[i]`` and nothing else: not a NaN, not an infinity. A row that
        sees nothing is left as it was. No array of ``n_q × n_k`` is made.

        Parameters
        ----------
        state : State
            Of the queries; C-contiguous arrays, updated in place. Its dtype is the accumulator's.
        q : array of shape (n_q, heads, dim)
        k : array of shape (n_k, kv_heads, dim), dtype of `q`
            `heads` is a multiple of `kv_heads`; query head h uses key head ``h // (heads // kv_heads)``.
        v : array of shape (n_k, kv_heads, dim_v), dtype of `q`
        begin, end : int64 arrays of shape (n_q,)
            ``0 <= begin <= end <= n_k``.
        scale : float
            Factor of the scores ``q · k``.

        One loop at a time: the iterator must end or be closed before the next call.

        Yields
        ------
        int
            Visible pairs done since the last yield; all of them together at the end. Between two yields lie a
            few milliseconds, so that the caller can keep messages moving.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Give threads and buffers back. Local."""
