"""Attend to a block by a backend, forward and backward, in several blocks of keys."""

import itertools

import numpy as np
from oracle import of_score

from ringmpi.dtypes import accumulator
from ringmpi.score import Score

BOUND = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 2.0**-6, "float16": 2.0**-9}       # of gradients


def run(backend, q, k, v, begin, end, scale, score, sinks=None, blocks=1, dout=None, dlse=None, kind=None):
    """Forward and backward of k and v in several blocks; rows see begin..end of the whole. A dict as `dense` gives."""
    kind = accumulator(q.dtype, kind)
    score = of_score(score, kind)
    state = backend.new_state(len(q), q.shape[1], v.shape[2], kind)
    backend.reset(state, sinks)
    q_, edges = backend.to_device(q), np.linspace(0, len(k), blocks + 1).astype(int)
    cuts = []
    for a, b in itertools.pairwise(edges):
        mine = Score(scale, **(score | {name: score[name][a:b] for name in ("keys", "key_bias") if name in score}))
        mine = mine.of_key_bias(None if mine.key_bias is None else backend.to_device(
            mine.key_bias.astype(kind)))
        cuts.append((a, b, backend.to_device(k[a:b]), backend.to_device(v[a:b]), np.clip(begin, a, b) - a,
                     np.clip(end, a, b) - a, mine))
    pairs = sum(sum(backend.accumulate(state, q_, *cut[2:])) for cut in cuts)
    assert pairs == (end - begin).sum()
    out, lse = backend.empty((*q.shape[:2], v.shape[2]), q.dtype), backend.empty(q.shape[:2], kind)
    begin, end = np.atleast_2d(begin, end)
    seen = np.full(len(q), True) if sinks is not None else (end > begin).any(axis=0)
    if "key_bias" in score and sinks is None:
        below = np.concatenate([np.zeros((1, score["key_bias"].shape[1]), int), np.cumsum(~np.isneginf(
            score["key_bias"]), axis=0)])
        seen = np.broadcast_to((below[end] > below[begin]).any(axis=0), q.shape[:2])
    backend.finish(state, backend.to_device(seen), out, lse)
    got = {"out": backend.to_numpy(out), "lse": backend.to_numpy(lse)}
    if dout is not None:
        biases = []
        if "key_bias" in score:
            lse = backend.lse_for_weights(lse)
        gradient = backend.new_gradient(backend.to_device(dout), out, lse, None if dlse is None else backend.to_device(
            dlse.astype(kind)), backend.empty(q.shape, kind))
        dk, dv = [], []
        sums = score["relative"].new_sums() if "relative" in score else None
        for a, b, k_, v_, low, high, mine in cuts:
            ours = backend.empty(k[a:b].shape, kind), backend.empty(v[a:b].shape, kind)
            ours += () if mine.key_bias is None else (backend.empty(mine.key_bias.shape, kind),)
            for x in ours:
                backend.clear(x)
            pairs = sum(backend.backward(gradient, q_, k_, v_, *ours[:2], low, high, mine,
                                         ours[2] if ours[2:] else None, sums))
            biases += [backend.to_numpy(x) for x in ours[2:]]
            assert pairs == (high - low).sum()
            dk.append(backend.to_numpy(ours[0]))
            dv.append(backend.to_numpy(ours[1]))
        got |= {"dq": backend.to_numpy(gradient.dq), "dk": np.concatenate(dk), "dv": np.concatenate(dv)}
        if biases:
            got["dkey_bias"] = np.concatenate(biases)
        if sums is not None:
            drelative = score["relative"].gradient(sums)
            got["drelative"] = drelative if isinstance(drelative, tuple) else (drelative,)
    return got
