"""Recompute rows of a result in float64, from file to file, and measure the error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import open_backend
from .environment import cores
from .errors import ShapeError
from .hdf5 import open_dataset, open_file, read_rows
from .job import Options, datasets, make_mask
from .softmax import TOLERANCE, State, finish

PIECE_TOKENS = 8192          # keys at a time


@dataclass(frozen=True)
class Audit:
    r"""The largest errors over the sampled rows.

    Attributes
    ----------
    rows : int
    out_error : float
        Largest |out - exact| over the largest weighted sum of |v|, the scale of its rounding.
    lse_error : float
        Largest |lse - exact| over max(1, |exact|).
    bound : float
        What rounding explains, for the dtype.
    """

    rows: int
    out_error: float
    lse_error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether both errors are explained by rounding; NaN is not."""
        return self.out_error <= self.bound and self.lse_error <= max(self.bound, TOLERANCE["float32"])

    def __str__(self) -> str:
        return (f"{'passed' if self.passed else 'FAILED'}: {self.rows} rows recomputed in float64: largest error "
                f"{self.out_error:.1e} in out, {self.lse_error:.1e} in lse; bound {self.bound:.1e}")


def audit(source: Path, target: Path, recorded: dict[str, Any], rows: int, seed: int) -> Audit:
    """Compare sampled rows of `target` with attention in float64 on `source`. Local.

    Parameters
    ----------
    source, target : path
        Input and output of `ringmpi attend`.
    recorded : dict
        Options of the run.
    rows : int
        How many rows to sample; all if there are fewer.
    seed : int
        Of the sample.

    Raises
    ------
    ShardError, ShapeError
        If the files do not belong together.
    """
    options = Options.from_record(recorded)
    with datasets(source, options) as (file, (q, k, v), sizes), open_file(target) as result:
        mask = make_mask(file, options, sizes.n_k)
        out, lse = (open_dataset(result, name) for name in ("out", "lse"))
        if out.shape != (sizes.n_q, sizes.heads, sizes.dim_v) or lse.shape != (sizes.n_q, sizes.heads):
            raise ShapeError(f"{target}: expected out of shape {(sizes.n_q, sizes.heads, sizes.dim_v)} for this input, "
                             f"got {out.shape}")
        sample = np.sort(np.random.default_rng(seed).permutation(sizes.n_q)[:rows])
        scale = 1 / math.sqrt(sizes.dim) if options.scale is None else options.scale
        exact, exact_lse = _exact(_rows(q, sample).astype(np.float64), k, v, mask, sample, sizes.n_q, scale)
        given, given_lse = (_rows(x, sample).astype(np.float64) for x in (out, lse))
    spread = np.abs(exact[..., sizes.dim_v:]).max(initial=0, where=np.isfinite(exact[..., sizes.dim_v:]))
    return Audit(len(sample), _largest(given, exact[..., :sizes.dim_v], spread or 1.0),
                 _largest(given_lse, exact_lse, np.maximum(1, np.abs(exact_lse))), TOLERANCE[sizes.dtype])


def _rows(dataset: Any, sample: NDArray[np.int64]) -> NDArray[Any]:
    return np.concatenate([read_rows(dataset, 0, 0), *(read_rows(dataset, i, i + 1) for i in sample.tolist())])


def _exact(q: NDArray[np.float64], k: Any, v: Any, mask: Any, sample: NDArray[np.int64], n_q: int,
           scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attention in float64 with values (v, |v|) side by side."""
    n_k, dim_v = len(k), v.shape[2]
    state = State.empty(len(q), q.shape[1], 2 * dim_v, np.float64)
    seen = np.zeros(len(q), bool)
    backend = open_backend("numpy", len(cores()))
    bounds = mask.bounds(sample, n_q, n_k)
    for start in range(0, n_k, PIECE_TOKENS):
        stop = min(start + PIECE_TOKENS, n_k)
        keys, values = (read_rows(x, start, stop).astype(np.float64) for x in (k, v))
        values = np.concatenate([values, np.abs(values)], axis=2)
        for low, high in bounds:
            begin, end = (np.clip(x, start, stop) - start for x in (low, high))
            seen |= end > begin
            for _ in backend.accumulate(state, q, keys, values, begin, end, scale):
                pass
    out, lse = np.empty_like(state.acc), np.empty_like(state.max)
    finish(state, seen, out, lse)
    return out, lse


def _largest(given: NDArray[np.float64], exact: NDArray[np.float64], unit: Any) -> float:
    """Largest error in units of `unit`; equal infinities and NaN in the same places are no error."""
    same = (given == exact) | (np.isnan(given) & np.isnan(exact))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(given - exact) / unit)
    return float(error.max(initial=0.0))
