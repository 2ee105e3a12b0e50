"""The CPU fast path: Numba kernels that release the interpreter lock, on a pool of threads.

A task is one key head × a tile of queries × all columns of the block: it needs no lock, and the caller's
thread stays free to keep MPI moving. The arithmetic is in `numba_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layout import Integers
from ..softmax import BFLOAT16, State
from .base import Backend
from .numba_kernels import fold

ROWS = 256              # queries of a task: packing a tile of K costs 1/256 of computing with it
POLL_SECONDS = 0.002    # how often the caller gets to move messages


class NumbaBackend(Backend):
    """Attention in Numba on `threads` threads."""

    name = "numba"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ringmpi")

    def accumulate(self, state: State, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any],
                   begin: Integers, end: Integers, scale: float) -> Iterator[int]:
        """Fold one block of K and V into the running softmax; see `Backend.accumulate`. Local."""
        q, k, v = (_bits(x) for x in (q, k, v))
        factor = state.acc.dtype.type(scale)
        tasks: dict[Future[None], int] = {}
        try:
            for start in range(0, len(q), ROWS):
                stop = min(start + ROWS, len(q))
                pairs = int((end[start:stop] - begin[start:stop]).sum())
                for head in range(k.shape[1] if pairs else 0):
                    task = self._pool.submit(fold, state.acc, state.max, state.sum, q, k, v,
                                             begin, end, factor, start, stop, head)
                    tasks[task] = pairs if head == 0 else 0
            while tasks:
                done, _ = wait(tasks, POLL_SECONDS, FIRST_COMPLETED)
                for task in done:
                    task.result()
                yield sum(tasks.pop(task) for task in done)
        finally:                      # an abandoned loop: nobody may write to the state any more
            for task in tasks:
                task.cancel()
            wait(tasks)

    def close(self) -> None:
        """End the threads. Local."""
        self._pool.shutdown()


def _bits(x: NDArray[Any]) -> NDArray[Any]:
    """Show 16-bit floats to Numba as integers: uint16 for bfloat16, int16 for float16."""
    if x.dtype == BFLOAT16:
        return x.view(np.uint16)
    return x.view(np.int16) if x.dtype == np.float16 else x
