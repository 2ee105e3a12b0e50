"""Recompute rows of a result in float64, from file to file, and measure the error."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends import open_backend, tolerance
from ..dtypes import TOLERANCE
from ..environment import affinity
from ..errors import ShapeError
from ..files.manifest import Manifest
from ..files.single import SingleFile
from ..intervals import Interval
from ..relative import Relative
from ..score import Score
from ..softmax import State, finish
from .inputs import Input, open_input, read_key_bias
from .options import Options

TOKENS_AT_A_TIME = 8192      # keys and values
TINY = np.finfo(np.float32).tiny

Array = NDArray[np.float64]


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


def audit(source: Path, result: Manifest | SingleFile, options: Options, rows: int, seed: int) -> Audit:
    """Compare sampled rows of a result with attention in float64 on its input. Local.

    Parameters
    ----------
    source : path
        Input of `ringmpi attend`.
    result : Manifest or SingleFile
        Its output.
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
    with open_input(source, options) as data:
        check_belongs(result, data)
        sample = np.sort(np.random.default_rng(seed).permutation(data.sizes.n_q)[:rows])
        found = [_recompute(each, sample, options) for each in data.elements()]
    out, lse = (_read_sample(sample, result.shapes[name], functools.partial(result.rows, name))
                for name in ("out", "lse"))
    audits = [_compare(exact, out if data.sizes.batch is None else out[:, number],
                       lse if data.sizes.batch is None else lse[:, number], result, options, data.sizes.dtype)
              for number, exact in enumerate(found)]
    return Audit(len(sample), *(max((getattr(each, name) for each in audits), default=0.0)
                                for name in ("out_error", "lse_error", "out_relative")))


def _compare(exact: _Exact, out: Array, lse: Array, result: Manifest | SingleFile, options: Options, dtype: str
             ) -> Audit:
    """Compare rows of a result with what they should be."""
    # What rounding explains of an element: the shift of its scores, and the bound of the dtype that it is stored in.
    shift = _score_rounding(exact, options.softcap or 0.0, float(np.finfo(result.dtypes["lse"]).eps))
    bound = tolerance(result.record.get("backend"))[dtype]
    out_bound = (bound + shift)[..., None] * exact.spread + TINY
    lse_bound = TOLERANCE[result.dtypes["lse"]] * np.maximum(1, np.abs(exact.lse)) + shift
    return Audit(len(out), _largest_error(out, exact.out, out_bound), _largest_error(lse, exact.lse, lse_bound),
                 _largest_error(out, exact.out, exact.spread + TINY))


class _Exact(NamedTuple):
    """Attention in float64 on the sampled rows.

    Attributes
    ----------
    out : array of shape (rows, heads, dim_v)
    spread : array of shape (rows, heads, dim_v)
        The weighted sums of the |v|.
    lse : array of shape (rows, heads)
    largest_score : array of shape (rows, heads)
        A bound of the scaled |scores|: the length of the query times that of the longest key.
    largest_bias : array of shape (rows, heads) or float
        A bound of what ALiBi subtracts from a score; 0 without it.
    largest_key_bias : array of shape (rows, heads) or (heads,)
        A bound of the bias of keys that have any weight; 0 without.
    largest_relative : array of shape (rows, heads) or float
        The same of a bias by distance.
    """

    out: Array
    spread: Array
    lse: Array
    largest_score: Array
    largest_bias: Array | float
    largest_key_bias: Array
    largest_relative: Array | float


def check_belongs(result: Manifest | SingleFile, data: Input) -> None:
    """Raise `ShapeError` unless a result has the shapes, dtype and axes of this input's. Local."""
    sizes = data.sizes
    batch = () if sizes.batch is None else (sizes.batch,)
    want = {"out": (sizes.n_q, *batch, sizes.heads, sizes.dim_v), "lse": (sizes.n_q, *batch, sizes.heads)}
    if result.shapes != want or result.dtypes["out"] != sizes.dtype or result.axes != data.axes:
        raise ShapeError(f"{result.path}: expected {want} of {sizes.dtype} in the order {data.axes} for this input, "
                         f"got {result.shapes} of {result.dtypes['out']} in the order {result.axes}")


def _recompute(data: Input, sample: NDArray[np.int64], options: Options) -> _Exact:
    """Attend in float64 from the sampled rows of q."""
    sizes = data.sizes
    scale = 1 / math.sqrt(sizes.dim) if options.scale is None else options.scale
    positions = data.mask.positions(sample, sizes.n_q, sizes.n_k)
    relative = data.by_distance(np.dtype(np.float64))
    score = Score(scale, options.softcap or 0.0, data.alibi, queries=positions, relative=relative)
    bounds = data.mask.bounds(sample, sizes.n_q, sizes.n_k)
    q = _read_sample(sample, data.q.shape, data.q.read)
    out, lse, longest_key, key_bias = _attend(q, data, bounds, score)

    largest_score = abs(scale) * _lengths(q) * longest_key
    largest_bias: Array | float = 0.0
    if data.alibi is not None:
        reach = np.maximum(positions, sizes.n_k - positions)[:, None]
        largest_bias = np.abs(data.alibi) * reach
    largest_relative: Array | float = 0.0
    if relative is not None:
        alone = data.alibi is None and data.key_bias is None
        largest_relative = _bound_relative(relative, positions, bounds, largest_score if alone else np.inf)
    return _Exact(out[..., :sizes.dim_v], out[..., sizes.dim_v:], lse, largest_score, largest_bias,
                  key_bias.bound(largest_score, data.alibi is not None or relative is not None), largest_relative)


def _bound_relative(relative: Relative, positions: NDArray[np.int64], bounds: list[Interval],
                    largest_score: Array | float) -> Array:
    """Bound the size of biases by distance that count: one far below that of a key which is seen has no weight."""
    most = sum(np.abs(table).max(axis=1) for table in relative.tables)
    top = sum(table.max(axis=1) for table in relative.tables)
    near = np.full((len(positions), len(relative.tables[0])), -np.inf)
    for low, high in bounds:
        some = low < high
        of_nearest = relative.of_pairs(positions[some], np.clip(positions[some], low[some], high[some] - 1))
        near[some] = np.maximum(near[some], of_nearest)
    found: Array = np.minimum(most, np.maximum(np.abs(near) + 2 * largest_score + 40, np.abs(top)))
    return found


def _score_rounding(exact: _Exact, softcap: float, eps: float) -> Array:
    """Bound by how much rounding shifts the scores of each row."""
    shift = 2 * eps * exact.largest_score + 4 * eps * softcap
    # A key whose bias is larger than this has no weight, however its score is rounded.
    largest_that_counts = 2 * exact.largest_score + 40
    shift += 2 * eps * (np.minimum(exact.largest_bias, largest_that_counts) + exact.largest_key_bias
                        + exact.largest_relative)
    return shift


def _read_sample(sample: NDArray[np.int64], shape: tuple[int, ...], read: Callable[[int, int], Any]) -> Array:
    """Read the rows of the sample one by one, as float64."""
    rows = [read(i, i + 1).astype(np.float64) for i in sample.tolist()]
    return np.concatenate([np.empty((0, *shape[1:])), *rows])


def _attend(q: Array, data: Input, bounds: list[Interval], score: Score) -> tuple[Array, Array, Array, _BiasSeen]:
    """Attend in float64 to values (v, |v|) side by side.

    Give out, lse, the longest key of each query head, and what there is to know of the bias of the keys.
    """
    heads = q.shape[1]
    group = heads // data.sizes.kv_heads
    longest = np.zeros(heads)
    state = State.empty(len(q), heads, 2 * data.sizes.dim_v, np.float64)
    state.reset(data.sinks)
    seen = np.full((len(q), heads), data.sinks is not None)
    biases = _BiasSeen(np.zeros(heads), np.full((len(q), heads), -np.inf))
    backend = open_backend("numpy", len(affinity()))

    # Some keys at a time: there may be more than fit in memory.
    for start in range(0, data.sizes.n_k, TOKENS_AT_A_TIME):
        stop = min(start + TOKENS_AT_A_TIME, data.sizes.n_k)
        keys, values = (x.read(start, stop).astype(np.float64) for x in (data.k, data.v))
        key_bias: Array | None = None
        kept = np.ones((stop - start, 1), bool)
        if data.key_bias is not None:
            key_bias = read_key_bias(data.key_bias, start, stop).astype(np.float64).reshape(stop - start, -1)
            biases.take(key_bias)
            kept = ~np.isneginf(key_bias)
            left_out = ~kept.any(axis=1)             # what is there is of no account, NaN too
            keys[left_out] = values[left_out] = 0
        values = values[..., :data.sizes.dim_v]
        values = np.concatenate([values, np.abs(values)], axis=2)
        longest = np.maximum(longest, _lengths(keys).max(axis=0).repeat(group))
        below = np.cumsum(kept, axis=0)
        below = np.concatenate([np.zeros((1, below.shape[1])), below])        # keys before each that are not left out
        for low, high in bounds:
            begin, end = (np.clip(x, start, stop) - start for x in (low, high))
            seen |= below[end] > below[begin]
            if key_bias is not None:
                biases.see(key_bias, begin, end)
            block_score = score.of_keys(np.arange(start, stop)).of_key_bias(key_bias)
            for _ in backend.accumulate(state, q, keys, values, begin, end, block_score):
                pass

    out, lse = np.empty_like(state.acc), np.empty_like(state.row_max)
    finish(state, seen, out, lse)
    backend.close()
    return out, lse, longest, biases


@dataclass
class _BiasSeen:
    """How large the biases of keys are: the largest size of each head's, and the largest that each row sees."""

    most: Array
    largest: Array

    def take(self, bias: Array) -> None:
        """Take a block's, (n_k, heads or 1)."""
        self.most = np.maximum(self.most, np.abs(np.where(np.isneginf(bias), 0, bias)).max(axis=0))

    def see(self, bias: Array, begin: NDArray[np.int64], end: NDArray[np.int64]) -> None:
        """Let rows see columns begin..end of it."""
        for row, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
            if first < last:
                self.largest[row] = np.maximum(self.largest[row], bias[first:last].max(axis=0))

    def bound(self, largest_score: Array, sloped: bool) -> Array:
        """Bound the size of biases that count: a key far below the largest has no weight, unless slopes have a say."""
        if sloped:
            return self.most
        return np.minimum(self.most, np.where(np.isneginf(self.largest), self.most, np.abs(self.largest))
                          + 2 * largest_score + 40)


def _lengths(x: Array) -> Array:
    """Lengths of vectors; 0 for one that is not finite: it gives NaN or weight 0 in both results, excusing no error."""
    lengths = np.linalg.norm(x, axis=2)
    return np.where(np.isfinite(lengths), lengths, 0.0)


def _largest_error(given: Array, exact: Array, unit: Array) -> float:
    """Give the largest error in units of `unit`; equal infinities, and NaN in the same places, are no error."""
    same = (given == exact) | (np.isnan(given) & np.isnan(exact))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(given - exact) / unit)
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0.0))
