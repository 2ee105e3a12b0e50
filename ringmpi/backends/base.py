"""The contract of a backend: the arithmetic of one K/V block, nothing about ranks, files or masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..device import Device
from ..layout import Integers
from ..softmax import State, finish


class Backend:
    """What every backend does. Local; no backend imports MPI.

    Parameters
    ----------
    threads : int
        CPU threads to compute with, at least 1.
    device : Device, optional
        The GPU to compute on, for a backend that does.

    Raises
    ------
    BackendError
        If this machine cannot run the backend; the message says what is missing.
    """

    name = "base"
    compiles = False                  # whether `prepare` may take long
    device: Device | None = None      # the GPU whose memory all arrays below are in; None: the host's memory

    def __init__(self, threads: int, device: Device | None = None) -> None:
        self.threads = threads

    def current(self) -> AbstractContextManager[None]:
        """Make the backend's GPU the current one for a while; nothing on the host. Local."""
        return self.device.current() if self.device else nullcontext()

    def prepare(self, dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int) -> None:
        """Make ready for such inputs and that accumulator: compile, or load what was compiled. Local.

        Raises
        ------
        BackendError
            If the backend can't compute with them.
        """

    def place(self, x: Any) -> Any:
        """Give `x`, a NumPy or GPU array, C-contiguous where the backend computes; `x` itself if it is there. Local."""
        return np.ascontiguousarray(x)

    def gather(self, shape: Sequence[int], dtype: np.dtype[Any], read: Callable[[int, NDArray[Any]], None]) -> Any:
        """Make an array where the backend computes, and have `read` fill it, in one piece or several. Local.

        Parameters
        ----------
        shape, dtype
        read : callable
            Given the number of a row and a NumPy array to put the rows from there on into.
        """
        x = np.empty(shape, dtype)
        read(0, x)
        return x

    def fetch(self, x: Any) -> NDArray[Any]:
        """Give a result as a NumPy array. Local."""
        return np.asarray(x)

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Any:
        """Make an array where the backend computes, not initialised. Local."""
        return np.empty(shape, dtype)

    def new_state(self, n_q: int, heads: int, dim_v: int, dtype: DTypeLike) -> State:
        """Make the state of queries that have seen no key yet. Local."""
        state = State(*(self.empty(shape, dtype) for shape in ((n_q, heads, dim_v), (n_q, heads), (n_q, heads))))
        self.reset(state)
        return state

    def reset(self, state: State) -> None:
        """Let a state forget every key. Local."""
        state.reset()

    def finish(self, state: State, seen: Any, out: Any, lse: Any) -> None:
        """Normalise a state into `out` and `lse`; see `softmax.finish`. Local."""
        finish(state, seen, out, lse)

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
            ``0 <= begin <= end <= n_k``; NumPy, whatever the backend.
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

    def complete(self) -> None:
        """Wait until what was asked for has been done: no more than launching comes back from a GPU at once. Local."""

    def close(self) -> None:
        """Give threads and buffers back. Local."""
