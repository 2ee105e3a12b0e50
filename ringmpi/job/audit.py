"""Recompute rows of a result in float64, from file to file, and measure the error."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import open_backend
from ..dtypes import TENSOR_TOLERANCE, TOLERANCE
from ..environment import cores
from ..errors import ShapeError
from ..files.hdf5 import read_rows
from ..files.manifest import Manifest
from ..mask import Interval
from ..score import Score
from ..softmax import State, finish
from .attend import Options, datasets, make_mask, read_heads

PIECE_TOKENS = 8192          # keys at a time


@dataclass(frozen=True)
class Audit:
    r"""The largest errors over the sampled rows, each in units of what rounding explains for that element.

    A score is a sum of products, so rounding shifts it by up to ``2 eps |scale| |q| |k|``, and with it the weights
    by that factor; the rest is the bound of the dtype, relative to the weighted sum of the \|v\|.

    Attributes
    ----------
    rows : int
    out_error, lse_error : float
        Largest error over what rounding explains; at most 1 is a pass.
    out_relative : float
        Largest \|out - exact\| over the weighted sum of \|v\| of its element.
    """

    rows: int
    out_error: float
    lse_error: float
    out_relative: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains both errors; it never explains NaN."""
        return self.out_error <= 1 and self.lse_error <= 1

    def __str__(self) -> str:
        return (f"{'passed' if self.passed else 'FAILED'}: {self.rows} rows recomputed in float64: largest error in "
                f"out {self.out_relative:.1e} of the weighted sum of |v|, which is {self.out_error:.2f} of what "
                f"rounding explains; in lse {self.lse_error:.2f} of it")


def audit(source: Path, result: Manifest, options: Options, rows: int, seed: int) -> Audit:
    """Compare sampled rows of a result with attention in float64 on its input. Local.

    Parameters
    ----------
    source : path
        Input of `ringmpi attend`.
    result : Manifest
        Of its output.
    options : Options
        Of the run.
    rows : int
        How many rows to sample; all if there are fewer.
    seed : int
        Of the sample.

    Raises
    ------
    ShardError, ShapeError
        If the files do not belong together.
    """
    with datasets(source, options) as (file, (q, k, v), sizes):
        mask, of_heads = make_mask(file, options, sizes.n_k), read_heads(file, options, sizes.heads)
        want = {"out": (sizes.n_q, sizes.heads, sizes.dim_v), "lse": (sizes.n_q, sizes.heads)}
        if result.shapes != want or result.dtypes["out"] != sizes.dtype:
            raise ShapeError(f"{result.path}: expected {want} of {sizes.dtype} for this input, got {result.shapes} of "
                             f"{result.dtypes['out']}")
        sample = np.sort(np.random.default_rng(seed).permutation(sizes.n_q)[:rows])
        scale = 1 / math.sqrt(sizes.dim) if options.scale is None else options.scale
        queries = _sampled(sample, q.shape, functools.partial(read_rows, q, raw=options.raw_dtype))
        positions = sample + mask.offset(sizes.n_q, sizes.n_k)
        slopes, sinks = of_heads["alibi"], of_heads["sinks"]
        score = Score(scale, options.softcap or 0.0, slopes, queries=positions)
        bounds = mask.bounds(sample, sizes.n_q, sizes.n_k)
        exact, exact_lse, longest = _exact(queries, k, v, options.raw_dtype, bounds, score, sinks)
    given, given_lse = (_sampled(sample, result.shapes[name], functools.partial(result.rows, name))
                        for name in ("out", "lse"))
    out, spread = exact[..., :sizes.dim_v], exact[..., sizes.dim_v:]
    eps = float(np.finfo(result.dtypes["lse"]).eps)
    most = abs(scale) * _norms(queries) * longest                 # of a score, (rows, heads)
    shift = 2 * eps * most + 4 * eps * (options.softcap or 0.0)
    if slopes is not None:            # of far keys more than this makes their weights nothing
        reach = np.maximum(positions, sizes.n_k - positions)[:, None]
        shift = shift + 2 * eps * np.minimum(np.abs(slopes) * reach, 2 * most + 40)
    tiny = np.finfo(np.float32).tiny
    own = TOLERANCE[result.dtypes["lse"]]
    bound = (TENSOR_TOLERANCE if result.record.get("backend") == "cuda" else TOLERANCE)[sizes.dtype]
    return Audit(len(sample), _largest(given, out, (bound + shift)[..., None] * spread + tiny),
                 _largest(given_lse, exact_lse, own * np.maximum(1, np.abs(exact_lse)) + shift),
                 _largest(given, out, spread + tiny))


def _sampled(sample: NDArray[np.int64], shape: tuple[int, ...], read: Callable[[int, int], Any]
             ) -> NDArray[np.float64]:
    """Rows of the sample, one read each, in float64."""
    rows = [read(i, i + 1).astype(np.float64) for i in sample.tolist()]
    return np.concatenate([np.empty((0, *shape[1:])), *rows])


def _exact(q: NDArray[np.float64], k: Any, v: Any, raw: str | None, bounds: list[Interval], score: Score,
           sinks: NDArray[np.float64] | None) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Attention in float64 with values (v, |v|) side by side; and the longest key of each query head."""
    n_k, dim_v, group = len(k), v.shape[2], q.shape[1] // k.shape[1]
    longest = np.zeros(q.shape[1])
    state = State.empty(len(q), q.shape[1], 2 * dim_v, np.float64)
    state.reset(sinks)
    seen = np.full(len(q), sinks is not None)
    backend = open_backend("numpy", len(cores()))
    for start in range(0, n_k, PIECE_TOKENS):
        stop = min(start + PIECE_TOKENS, n_k)
        keys, values = (read_rows(x, start, stop, raw).astype(np.float64) for x in (k, v))
        values = np.concatenate([values, np.abs(values)], axis=2)
        longest = np.maximum(longest, _norms(keys).max(axis=0).repeat(group))
        for low, high in bounds:
            begin, end = (np.clip(x, start, stop) - start for x in (low, high))
            seen |= end > begin
            for _ in backend.accumulate(state, q, keys, values, begin, end, score.of_keys(np.arange(start, stop))):
                pass
    out, lse = np.empty_like(state.acc), np.empty_like(state.row_max)
    finish(state, seen, out, lse)
    backend.close()
    return out, lse, longest


def _norms(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths; 0 for what is not finite: it gives NaN or weight 0 in both results, and excuses no error."""
    lengths = np.linalg.norm(x, axis=2)
    return np.where(np.isfinite(lengths), lengths, 0.0)


def _largest(given: NDArray[np.float64], exact: NDArray[np.float64], unit: Any) -> float:
    """Largest error in units of `unit`; equal infinities and NaN in the same places are no error."""
    same = (given == exact) | (np.isnan(given) & np.isnan(exact))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(given - exact) / unit)
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0.0))
