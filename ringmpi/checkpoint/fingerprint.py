"""Fingerprints of sharded arrays: the same whatever ranks hold the tokens, and in whatever order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend

CHUNK_BYTES = 2**22
SEED = 0x9E3779B97F4A7C15
Words = NDArray[np.uint64]


def fingerprint(x: Any, positions: NDArray[np.int64], backend: Backend) -> int:
    """Give this rank's part of a fingerprint: those of all ranks add up to it, modulo 2^64. Local.

    It finds what comes about by mistake. Who tries can make other arrays with the same one.

    Parameters
    ----------
    x : array of shape (batch, tokens, heads, dim)
        Where the backend computes.
    positions : int64 array of shape (tokens,)
    backend : Backend
    """
    total = 0
    width = x.shape[2] * x.shape[3] * x.dtype.itemsize
    word = np.dtype(np.uint32 if width % 4 == 0 else np.uint16)
    weights = mixed(np.arange(width // word.itemsize, dtype=np.uint64)) | np.uint64(1)
    step = max(1, CHUNK_BYTES // max(1, width))
    with np.errstate(over="ignore"):
        for element in range(x.shape[0]):
            for start in range(0, x.shape[1], step):
                tokens = np.ascontiguousarray(backend.to_numpy(x[element, start:start + step]))
                bits = tokens.reshape(len(tokens), -1).view(np.uint8).view(word)
                places = positions[start:start + step].astype(np.uint64) * np.uint64(x.shape[0]) + np.uint64(element)
                sums: Words = (bits.astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
                total += int(mixed(sums ^ mixed(places)).sum(dtype=np.uint64))
    return total % 2**64


def mixed(x: Words) -> Words:
    """Mix the bits of numbers (Steele, Lea & Flood 2014, *SplitMix*). Local."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(SEED)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
