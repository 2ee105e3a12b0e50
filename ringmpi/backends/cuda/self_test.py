"""Self-tests of a GPU's kernels before they are used: small blocks, compared with NumPy's results in float64."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...relative import Axis, Relative
from ...score import Score, dropout_keys
from ..base import Backend
from ..numpy_ import NumpyBackend

Arrays = list[NDArray[Any]]
HEADS = 2                     # of one key head
FEW_QUERIES = 16
SECONDS = 100.0               # for a case of milliseconds


@dataclass(frozen=True)
class SelfTest:
    """A block with a slanting end, random numbers of a dtype, and maybe all score functions at once.

    Attributes
    ----------
    n_q, n_k, dim, dim_v : int
    dtype, accumulator : dtype
    plain : bool
        Whether scores are plain, but for a bias.
    backward : bool
        Whether the gradient is tested, else the result.
    whole : bool
        Whether delta is what the result gives, and nothing else.
    biased : bool
        Whether the keys have a bias that leaves some of them out: for all heads with few queries, else for each.
    relative : bool
        Whether there is a bias by distance: with few queries along the axes of a grid.
    several : bool
        Whether queries have several intervals, some of which are empty.
    """

    n_q: int
    n_k: int
    dim: int
    dim_v: int
    dtype: np.dtype[Any]
    accumulator: np.dtype[Any]
    plain: bool
    backward: bool
    whole: bool = False
    biased: bool = False
    relative: bool = False
    several: bool = False

    def error(self, backend: Backend) -> float:
        """Give the largest error, in units of the largest value of an array. Local.

        Raises
        ------
        TimeoutError
            If the backend does not come to an end.
        """
        # Random inputs, and what NumPy makes of them in float64.
        rng = np.random.default_rng(self.n_q)
        inputs = [rng.standard_normal(shape).astype(self.dtype) for shape in (
            (self.n_q, HEADS, self.dim), (self.n_k, 1, self.dim), (self.n_k, 1, self.dim_v),
            (self.n_q, HEADS, self.dim_v))]
        with closing(NumpyBackend(1)) as numpy:
            exact = replace(self, dtype=np.dtype(np.float64), accumulator=np.dtype(np.float64))
            wide = [x.astype(np.float64) for x in inputs]
            want = exact.forward(numpy, *wide[:3])
            if self.backward:
                out, lse = want
                want = exact.gradient(numpy, *wide, out, lse)
                got = self.gradient(backend, *inputs, out.astype(self.dtype), lse.astype(self.accumulator))
            else:
                got = self.forward(backend, *inputs[:3])
        # The largest of errors, one of which is NaN, is NaN.
        with np.errstate(all="ignore"):
            errors = [np.abs(x.astype(np.float64) - y).max() / np.abs(y).max() for x, y in zip(got, want, strict=True)]
        return float(np.max(errors))

    def forward(self, backend: Backend, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> Arrays:
        """Give the result and lse. Local."""
        state = backend.new_state(self.n_q, HEADS, self.dim_v, self.accumulator)
        backend.reset(state, None if self.plain else np.linspace(-1, 1, HEADS))
        q, k, v = (backend.to_device(x) for x in (q, k, v))
        self._finish(backend.accumulate(state, q, k, v, *self._columns(), self._score(backend)))
        out = backend.empty((self.n_q, HEADS, self.dim_v), self.dtype)
        lse = backend.empty((self.n_q, HEADS), self.accumulator)
        backend.finish(state, backend.to_device(np.ones(self.n_q, bool)), out, lse)
        return [backend.to_numpy(x) for x in (out, lse)]

    def gradient(self, backend: Backend, *inputs: NDArray[Any]) -> Arrays:
        """Give the gradients of q, k and v, and of a bias, from q, k, v, dout, out and lse. Local."""
        q, k, v, dout, out, lse = (backend.to_device(x) for x in inputs)
        lse = backend.lse_for_weights(lse) if self.biased else lse
        shapes = [q.shape, k.shape, v.shape] + [(self.n_k, self._bias_heads)] * self.biased
        dq, dk, dv, *of_bias = made = [backend.empty(shape, self.accumulator) for shape in shapes]
        dlse = None if self.whole else lse                   # any will do
        gradient = backend.new_gradient(dout, out, lse, dlse, dq)
        for x in (dk, dv, *of_bias):
            backend.clear(x)
        launches = [(dq, None, None), (None, dk, dv, *of_bias)] if backend.canonical else [(dq, dk, dv, *of_bias)]
        score = self._score(backend)
        of_distances = score.relative.new_sums() if score.relative else None
        for of_q, of_k, of_v, *more in launches:
            self._finish(backend.backward(replace(gradient, dq=of_q), q, k, v, of_k, of_v, *self._columns(), score,
                                          more[0] if more else None, of_distances))
        backend.add(dk, dk)
        return [*(backend.to_numpy(backend.astype(x, self.dtype)) for x in made), *(of_distances or ())]

    def _columns(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        begin, end = np.zeros(self.n_q, np.int64), self.n_k - 1 - np.arange(self.n_q)[::-1]
        if not self.several:
            return begin, end
        # The second begins where the first ends, the third behind a gap; every seventh query has no second.
        first, second, third = end // 5, np.where(np.arange(self.n_q) % 7, end // 2, end // 5), end // 2 + 3
        return np.stack([begin, first, np.minimum(third, end)]), np.stack([first, second, end])

    def _score(self, backend: Backend) -> Score:
        scale = 1 / math.sqrt(self.dim)
        score = Score(scale) if self.plain else Score(
            scale, 2.0, np.array([0.02, 0.01]), 0.2, dropout_keys(0, 1, HEADS)[0], np.arange(self.n_q) + 40,
            np.arange(self.n_k))
        if self.relative:
            score = replace(score, queries=np.arange(self.n_q) + 40, keys=np.arange(self.n_k)).of_relative(
                self._distances())
        if not self.biased:
            return score
        bias = np.random.default_rng(self.n_k).standard_normal((self.n_k, self._bias_heads)).astype(np.float32)
        bias[bias > 1] = -np.inf
        return score.of_key_bias(backend.to_device(bias.astype(self.accumulator)))

    def _distances(self) -> Relative:
        """Give a bias by distance whose tables end within the block."""
        rng = np.random.default_rng(self.n_k)
        tables = [rng.standard_normal((HEADS, width)).astype(self.accumulator) for width in (5, 31)]
        if self.n_q < FEW_QUERIES:
            return Relative.of_axes(tables, [Axis(self.n_k, False), Axis(8, True)])
        return Relative.of_positions(tables[1])

    @property
    def _bias_heads(self) -> int:
        return 1 if self.n_q < FEW_QUERIES else HEADS

    @staticmethod
    def _finish(loop: Iterator[int]) -> None:
        latest = time.monotonic() + SECONDS
        for _ in loop:
            if time.monotonic() > latest:
                raise TimeoutError
