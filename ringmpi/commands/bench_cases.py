"""What `bench kernel` measures on CPUs and on a GPU: one block to attend to in each case, timed in turns with peers.

Runs are interleaved, so that a noisy minute strikes all of them alike; times are medians.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend
from ..dtypes import accumulator, check_dtype
from ..mask import Mask
from .options import MASKS

GRID = {"dtype": ("float32", "float64", "bfloat16", "float16"), "dim": (64, 128, 80), "mask": MASKS,
        "shape": ((16384, 16384), (1, 2**20), (16, 2**18))}
WINDOW = 4096               # keys that a query sees with the mask `window`
DOCUMENT = 512              # tokens of a document, on average
FEW = 16                    # queries, at most, where memory can be the limit

Timed = Callable[[], float]      # runs once; gives seconds


@dataclass
class Case:
    """A block to attend to: arrays, which keys each query sees, and what that costs."""

    dtype: str
    dim: int
    mask: str
    shape: tuple[int, int]
    heads: int
    kv_heads: int

    def __post_init__(self) -> None:
        n_q, n_k = self.shape
        dtype = check_dtype(self.dtype, "--dtype")
        rng = np.random.default_rng(0)
        self.q, self.k, self.v = (rng.standard_normal((n, h, self.dim), np.float32).astype(dtype) for n, h in
                                  ((n_q, self.heads), (n_k, self.kv_heads), (n_k, self.kv_heads)))
        self.scale = self.dim**-0.5

        # Which keys each query sees, and how many bytes of K and V that is.
        self.offsets = _document_offsets(n_k)
        mask = {"full": Mask(), "causal": Mask(causal=True), "window": Mask(window=(WINDOW - 1, 0)),
                "documents": Mask(documents=self.offsets)}[self.mask]
        (self.begin, self.end), = mask.bounds(np.arange(n_q), n_q, n_k)
        self.visible = slice(int(self.begin.min()), int(self.end.max()))
        self.bytes = self.k[self.visible].nbytes + self.v[self.visible].nbytes

        self.dout = rng.standard_normal(self.q.shape, np.float32).astype(dtype)

    def flop(self, direction: str) -> int:
        """Count floating-point operations on visible pairs: two products forward, five backward."""
        product = 2 * self.heads * self.dim * int((self.end - self.begin).sum())
        return product * (2 if direction == "forward" else 5)

    def columns(self, direction: str) -> dict[str, Any]:
        """Give the columns of a table that say which case this is."""
        return {"pass": direction, "dtype": self.dtype, "dim": self.dim, "mask": self.mask,
                "queries": self.shape[0], "keys": self.shape[1], "heads": f"{self.heads}/{self.kv_heads}"}

    def __str__(self) -> str:
        return f"{self.dtype} dim {self.dim} {self.mask} {self.shape[0]}x{self.shape[1]}"


def _document_offsets(n_k: int) -> NDArray[np.int64]:
    cuts = np.random.default_rng(1).choice(np.arange(1, n_k), max(0, n_k // DOCUMENT - 1), replace=False)
    return np.concatenate([[0], np.sort(cuts), [n_k]])


def chosen(arguments: argparse.Namespace) -> Iterator[tuple[str, int, str, tuple[int, int]]]:
    """Give dtype, dim, mask and shape of each case that is asked for."""
    yield from itertools.product(*(grid if arguments.all else getattr(arguments, name)
                                   for name, grid in GRID.items()))


def prepare(backend: Backend, dtype: str, dim: int, passes: Sequence[str], plain: bool = True) -> None:
    """Compile what the passes need, for plain scores or others; a backward pass begins with a forward pass."""
    items = check_dtype(dtype, "--dtype")
    for direction in {"forward", *passes}:
        backend.prepare(items, accumulator(items), dim, dim, plain=plain, backward=direction == "backward")


def timed(call: Callable[[], object]) -> Timed:
    """Give a run of `call` by the host's clock."""
    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    return run


def interleave(runs: Mapping[str, Timed], repeat: int, yardstick: Callable[[], None]) -> dict[str, list[float]]:
    """Run all of `runs` in turns, and the yardstick after each turn; give seconds by name. The first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            seconds = run()
            if turn > 0:
                times[name].append(seconds)
        yardstick()
    return times


def spread(times: Sequence[float], median: float) -> float | None:
    """Give the distance between the slowest and the fastest run, over the median; None for a single run."""
    return (max(times) - min(times)) / median if len(times) > 1 else None
