"""The truth: a dense float64 softmax, and a dense boolean mask written straight from the definitions."""

import itertools
import math

import numpy as np

from ringmpi.dtypes import DTYPES
from ringmpi.relative import Axis, Relative
from ringmpi.score import dropout_keys, random_words


def visible(n_q, n_k, *, causal=False, window=None, documents=None, prefix=None, first=0, q_offset=None,
            spans=None, prompts=None, parents=None, document_ids=None, q_documents=None, keys=None, key_mask=None,
            rows=slice(None)):
    """Dense boolean mask of shape (n_q, n_k), or of some of its rows."""
    positions, numbers = places(n_q, n_k, documents, document_ids, q_documents, q_offset)
    i, number, j = positions[rows][:, None], numbers[rows], np.arange(n_k)[None, :]
    see = np.ones((len(i), n_k), bool)
    if causal:
        see &= (j <= i) | (j < (prefix or 0))
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        near = np.ones_like(see)
        if left is not None:
            near &= j >= i - left
        if right is not None:
            near &= j <= i + right
        see &= near | (j < first)
    if documents is not None:
        same = np.zeros_like(see)
        for d, (a, b) in enumerate(itertools.pairwise(documents)):
            member = j[0]
            member = (a <= member) & (member < b)                    # the last one may go on beyond the keys
            if prompts is not None:
                member |= (prompts[d][0] <= j[0]) & (j[0] < prompts[d][1])
            above = -1 if parents is None else parents[d]
            while above >= 0:
                member |= (documents[above] <= j[0]) & (j[0] < documents[above + 1])
                above = parents[above]
            same |= (number == d)[:, None] & member
        see &= same
    if document_ids is not None:
        see &= (number[:, None] == np.asarray(document_ids)) & (number[:, None] >= 0)
    for a, b in () if spans is None else spans:
        see |= (a <= i) & (i < b) & (a <= j) & (j < b)
    if keys is not None:
        see &= j < keys
    if key_mask is not None:
        see &= np.asarray(key_mask, bool)
    return see


def places(n_q, n_k, documents=None, document_ids=None, q_documents=None, q_offset=None):
    """Position of each query among the keys, and the number of its document, -1 for none."""
    positions = np.arange(n_q) + (n_k - n_q if q_offset is None else q_offset)
    numbers = np.full(n_q, -1)
    if q_documents is not None:
        t = np.arange(n_q)
        positions = t + documents[-1] - q_documents[-1]
        for d, (a, b) in enumerate(itertools.pairwise(q_documents)):
            inside = (a <= t) & (t < b)
            positions = np.where(inside, documents[d + 1] - (b - t), positions)
            numbers[inside] = d
    elif document_ids is not None:
        inside = (positions >= 0) & (positions < n_k)
        numbers[inside] = np.asarray(document_ids)[positions[inside]]
    else:
        for d, (a, b) in enumerate(itertools.pairwise([] if documents is None else documents)):
            numbers[(a <= positions) & (positions < b)] = d
    return positions, numbers


def random_qkv(seed, n_q, n_k, heads, kv_heads, dim, dim_v, dtype):
    """Random q, k and v; `seed` may be a generator."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in
            ((n_q, heads, dim), (n_k, kv_heads, dim), (n_k, kv_heads, dim_v))]


def case(seed, n_q, n_k, heads, kv_heads, dim, dim_v, dtype):
    """Random q, k and v, and for each query an interval of keys that it sees, maybe empty."""
    rng = np.random.default_rng(seed)
    q, k, v = random_qkv(rng, n_q, n_k, heads, kv_heads, dim, dim_v, dtype)
    begin = rng.integers(0, n_k + 1, n_q)
    return q, k, v, begin, np.maximum(begin, rng.integers(0, n_k + 1, n_q))


INTERVALS = ("full", "causal", "none", "one key", "window")


def intervals(kind, n_q, n_k):
    """For each query the interval of keys that it sees, by the name of a shape."""
    i = np.arange(n_q)
    return {"full": (0 * i, 0 * i + n_k), "causal": (0 * i, np.minimum(i + 1, n_k)), "none": (0 * i, 0 * i),
            "one key": (i % n_k, i % n_k + 1), "window": (np.clip(i - 9, 0, n_k), np.clip(i + 1, 0, n_k)),
            "two ends": (np.where(i < n_q // 2, 0, n_k - 1), np.where(i < n_q // 2, 1, n_k))}[kind]


def many_intervals(seed, n_q, n_k, count):
    """Begin and end of so many intervals of each query, disjoint and ascending; some touch, some are empty."""
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.integers(0, n_k + 1, (2 * count, n_q)), axis=0)
    begin, end = edges[::2].copy(), edges[1::2].copy()
    touching = rng.random((count - 1, n_q)) < 0.2
    end[:-1][touching] = begin[1:][touching]
    none = rng.random((count, n_q)) < 0.3
    none[:, rng.random(n_q) < 0.1] = True
    end[none] = begin[none]
    return begin, end


def sees(begin, end, n_k):
    """Dense boolean mask of queries that see begin..end, be it one interval or several."""
    j = np.arange(n_k)
    begin, end = (np.atleast_2d(x)[..., None] for x in (begin, end))
    return ((j >= begin) & (j < end)).any(axis=0)


def attend(q, k, v, see, scale):
    """Dense softmax attention in float64: out (n_q, heads, dim_v), lse (n_q, heads). Rows that see nothing: 0, -inf."""
    got = dense(q, k, v, see, scale)
    return got["out"], got["lse"]


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


FUNCTIONS = ("plain", "softcap", "alibi", "dropout", "sinks", "all")
BIASES = ("bias", "bias by head", "left out", "left out by head", "all and left out by head")
DISTANCES = ("relative", "relative of neighbours", "near relative", "far relative", "all and relative",
             "left out by head and relative", "axes and relative")


def key_bias(kind, heads, n_k, seed=0, dtype=np.float32):
    """A bias of the keys, (n_k, 1) or (n_k, heads), with two keys of five left out if `kind` says so."""
    rng = np.random.default_rng(seed + 77)
    bias = rng.standard_normal((n_k, heads if "by head" in kind else 1)).astype(dtype)
    if "left out" in kind:
        bias[rng.random(bias.shape) < 0.4] = -np.inf
        bias[:n_k // 3] = -np.inf
    return bias


def functions(kind, heads, queries, keys, seed=0):
    """Arguments of `dense` and `Score` for a score function, by name, and sinks: strong enough to be seen."""
    wanted = FUNCTIONS[1:-1] if kind.startswith("all") else (kind,)
    rng = np.random.default_rng(seed)
    score, sinks = {}, rng.standard_normal(heads)
    if "softcap" in wanted:
        score["softcap"] = 1.5
    if "alibi" in wanted:
        score["slopes"] = 2.0 ** -np.arange(1, heads + 1) / 64
    if "dropout" in wanted:
        score |= {"dropout": 0.3, "dropout_keys": dropout_keys(seed, 1, heads)[0]}
    if "relative" in kind:
        score["relative"], score["away"] = relative(kind, heads, queries, keys, seed)
    if {"slopes", "dropout", "relative"} & set(score):
        score |= {"queries": np.asarray(queries, np.int64), "keys": np.asarray(keys, np.int64)}
    if kind.removesuffix(" and relative") in BIASES:
        score["key_bias"] = key_bias(kind, heads, len(keys), seed)
    return score, sinks if "sinks" in wanted else None


SHAPE, PERIODIC = (4, 6, 125), (True, False, True)          # of a grid of 3000 points


def relative(kind, heads, queries, keys, seed=0):
    """Tables by distance, and distances: of a reach of 40, or 0, or more than there is, or of the axes of a grid."""
    rng = np.random.default_rng(seed + 78)
    if "axes" in kind:
        return ([rng.standard_normal((heads, width)) for width in (3, 21, 51)],
                distances(SHAPE, PERIODIC, queries, keys))
    width = 1 if "near" in kind else 7001 if "far" in kind else 81
    return [rng.standard_normal((heads, width))], [np.asarray(queries)[:, None] - np.asarray(keys)[None]]


def of_score(score, kind):
    """What `functions` gives as arguments of `Score`, in the accumulator's dtype."""
    given = {name: x for name, x in score.items() if name != "away"}
    if "key_bias" in given:
        given["key_bias"] = given["key_bias"].astype(kind)
    if "relative" in given:
        tables = [table.astype(kind) for table in given["relative"]]
        given["relative"] = (Relative.of_positions(tables[0]) if len(tables) == 1 else
                             Relative.of_axes(tables, list(map(Axis, SHAPE, PERIODIC))))
    return given


def distances(shape, periodic, queries, keys):
    """Differences of coordinates along each axis of a grid, (n_q, n_k) each, the shortest way round."""
    found = []
    for i, j, size, around in zip(np.unravel_index(queries, shape), np.unravel_index(keys, shape), shape, periodic,
                                  strict=True):
        away = i[:, None] - j[None]
        if around:
            ways = np.stack([away, away + size, away - size])        # of two as short the one that is positive
            best = np.lexsort((-ways, np.abs(ways)), axis=0)[0]
            away = np.take_along_axis(ways, best[None], axis=0)[0]
        found.append(away)
    return found


def dense(q, k, v, see, scale, *, softcap=0.0, slopes=None, dropout=0.0, dropout_keys=None, queries=None, keys=None,
          key_bias=None, relative=None, away=None, sinks=None, dout=None, dlse=None):
    """Dense attention in float64, and its gradient where `dout` is given, from the definitions, head by head.

    A dict of out and lse, and of dq, dk, dv, dsinks, dkey_bias and drelative. Rows that see nothing, or only keys that
    are left out: 0, -inf. `relative` are tables, one or for each axis, and `away` differences along these, (n_q, n_k).
    """
    group, (n_q, heads), dim_v = q.shape[1] // k.shape[1], q.shape[:2], v.shape[2]
    got = {"out": np.zeros((n_q, heads, dim_v)), "lse": np.full((n_q, heads), -np.inf)}
    if dout is not None:
        got |= {"dq": np.zeros(q.shape), "dk": np.zeros(k.shape), "dv": np.zeros(v.shape), "dsinks": np.zeros(heads)}
        if key_bias is not None:
            got["dkey_bias"] = np.zeros(key_bias.shape)
        if relative is not None:
            got["drelative"] = [np.zeros(table.shape) for table in relative]
    entries = [np.clip(d, -(table.shape[1] // 2), table.shape[1] // 2) + table.shape[1] // 2
               for table, d in zip(relative or (), away or (), strict=True)]
    whole = see
    for h in range(heads):
        bias = np.zeros(len(k)) if key_bias is None else key_bias[:, h % key_bias.shape[1]].astype(np.float64)
        see = whole & (bias > -np.inf)
        rows = see.any(axis=1) | (sinks is not None)
        # The scores, and how they change with the product of q and k.
        a, b, c = (x.astype(np.float64) for x in (q[:, h], k[:, h // group], v[:, h // group]))
        with np.errstate(all="ignore"):
            x, slope = a @ b.T * scale, scale
        if softcap:
            slope = scale / np.cosh(x / softcap)**2
            x = softcap * np.tanh(x / softcap)
        if slopes is not None:
            x = x - slopes[h] * np.abs(queries[:, None] - keys[None])
        x = x + bias
        for table, entry in zip(relative or (), entries, strict=True):
            x = x + table[h].astype(np.float64)[entry]
        x = np.where(see, x, -np.inf)
        if sinks is not None:
            x = np.concatenate([x, np.full((n_q, 1), sinks[h])], axis=1)

        # The weights, and what dropout leaves of them.
        p, m = np.zeros(x.shape), np.ones((n_q, len(k)))
        with np.errstate(all="ignore"):
            top = x[rows].max(axis=1, keepdims=True, initial=-np.inf)
            norm = np.exp(x[rows] - top).sum(axis=1, keepdims=True)
            p[rows] = np.exp(x[rows] - top) / norm
            got["lse"][rows, h] = (top + np.log(norm))[:, 0]
        if dropout:
            m = (random_words(dropout_keys[h], queries[:, None], keys[None]) >= int(dropout * 2**32)) \
                / (1 - int(dropout * 2**32) / 2**32)
        got["out"][:, h] = product(p[:, :len(k)] * m, c, see)

        # The gradients.
        if dout is None:
            continue
        g = dout[:, h].astype(np.float64)
        delta = (g * got["out"][:, h]).sum(axis=1) - (0 if dlse is None else dlse[:, h])
        dx = p[:, :len(k)] * (m * (g @ c.T) - delta[:, None])
        got["dq"][:, h] = (dx * slope) @ b
        got["dk"][:, h // group] += (dx * slope).T @ a
        got["dv"][:, h // group] += (p[:, :len(k)] * m).T @ g
        if key_bias is not None:
            got["dkey_bias"][:, h % key_bias.shape[1]] += np.where(see, dx, 0).sum(axis=0)
        for number, entry in enumerate(entries):
            np.add.at(got["drelative"][number][h], entry, np.where(see, dx, 0))
        if sinks is not None:
            got["dsinks"][h] = -(p[:, -1] * delta).sum()
    return got


def product(weights, values, see):
    """Weights times values; NaN and infinity in a value reach the rows that see it and no others."""
    if np.isfinite(values).all():
        return weights @ values
    with np.errstate(all="ignore"):
        return np.array([w[seen] @ values[seen] for w, seen in zip(weights, see, strict=True)])


def near(shape, window, periodic, edges, causal):
    """Dense boolean mask of a grid's points, point by point and axis by axis."""
    points = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=-1)
    see = np.ones((len(points), len(points)), bool)
    for axis, size in enumerate(shape):
        before, after = window[axis] if isinstance(window[axis], tuple) else (window[axis],) * 2
        for number, point in enumerate(points):
            here = point[axis]
            first = 0 if before is None else here - before
            last = here if causal and axis == 0 else size - 1 if after is None else here + after
            seen = range(first, last + 1)
            if periodic[axis]:
                seen = range(size) if None in (before, after) else {other % size for other in seen}
            elif edges == "shifted" and not (causal and axis == 0):
                width = min(len(seen), size)
                start = min(max(first, 0), size - width)
                seen = range(start, start + width)
            see[number] &= np.isin(points[:, axis], list(seen))
    return see
