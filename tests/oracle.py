"""The truth: a dense float64 softmax, and a dense boolean mask written straight from the definitions."""

import itertools

import numpy as np

from ringmpi.softmax import DTYPES


def visible(n_q, n_k, *, causal=False, window=None, documents=None, prefix=None, first=0, q_offset=None):
    """Dense boolean mask of shape (n_q, n_k)."""
    offset = n_k - n_q if q_offset is None else q_offset
    i, j = np.arange(n_q)[:, None] + offset, np.arange(n_k)[None, :]
    see = np.ones((n_q, n_k), bool)
    if causal:
        see &= (j <= i) | (j < (prefix or 0))
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        near = np.ones((n_q, n_k), bool)
        if left is not None:
            near &= j >= i - left
        if right is not None:
            near &= j <= i + right
        see &= near | (j < first)
    if documents is not None:
        number = np.full(n_k, -1)
        for d, (a, b) in enumerate(itertools.pairwise(documents)):
            number[a:b] = d
        aligned = i[:, 0]
        inside = (aligned >= 0) & (aligned < n_k)
        mine = np.where(inside, number[np.clip(aligned, 0, max(n_k - 1, 0))] if n_k else -2, -2)
        see &= mine[:, None] == number[None, :]
    return see


def case(seed, n_q, n_k, heads, kv_heads, dim, dim_v, dtype):
    """Random q, k and v, and for each query an interval of keys that it sees, maybe empty."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in
               ((n_q, heads, dim), (n_k, kv_heads, dim), (n_k, kv_heads, dim_v)))
    begin = rng.integers(0, n_k + 1, n_q)
    return q, k, v, begin, np.maximum(begin, rng.integers(0, n_k + 1, n_q))


def attend(q, k, v, see, scale):
    """Dense softmax attention in float64: out (n_q, heads, dim_v), lse (n_q, heads). Rows that see nothing: 0, -inf."""
    group = q.shape[1] // k.shape[1]
    out = np.zeros((len(q), q.shape[1], v.shape[2]))
    lse = np.full(q.shape[:2], -np.inf)
    rows = see.any(axis=1)
    with np.errstate(all="ignore"):
        for h in range(q.shape[1]):
            a, b, c = (x.astype(np.float64) for x in (q[:, h], k[:, h // group], v[:, h // group]))
            scores = np.where(see, a @ b.T * scale, -np.inf)
            top = scores.max(axis=1, initial=-np.inf)[rows, None]
            weights = np.exp(scores[rows] - top)
            norm = weights.sum(axis=1, keepdims=True)
            if np.isfinite(c).all():
                out[rows, h] = weights @ c / norm
            else:                                  # what a row does not see must not reach it
                for i, w, n in zip(np.flatnonzero(rows), weights, norm[:, 0], strict=True):
                    out[i, h] = w[see[i]] @ c[see[i]] / n
            lse[rows, h] = (top + np.log(norm))[:, 0]
    return out, lse


def error(got, want, scale=None):
    """Largest |got - want| over the largest |want|; equal infinities, and NaN in the same places, are no error."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not want.size:
        return 0.0
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    finite = np.abs(want[np.isfinite(want)])
    unit = scale or finite.max(initial=0.0) or 1.0
    with np.errstate(invalid="ignore"):
        wrong = np.where(same, 0.0, np.abs(got - want) / unit)
    return float(np.inf if np.isnan(wrong).any() else wrong.max())
