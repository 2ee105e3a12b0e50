"""The arithmetic of the Numba backend: fold one block of K and V into a tile of queries.

The columns of a block go by in tiles that stay in cache. K is turned once a tile so that keys lie across
vector lanes; then both products (scores = query × keys, acc += weights × values) are the same loop, eight
multiply-adds for each load and store of the result. Each row works on its own columns only: partial tiles
cost what is visible, and what a row does not see cannot reach it.

The fast-math flags let LLVM reorder sums; none lets it assume that NaN or infinity do not occur.
"""

from __future__ import annotations

import warnings
from typing import Any

import numba
import numpy as np
from numba.extending import overload

COLUMNS = 128           # keys of a tile: 32 KiB of K and of V at dim 64 in float32
LANES = 16              # running maxima side by side, so that the search for the largest score is vector code
LOG2E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.42860682030941723212e-6      # n × high is exact for |n| < 2^9


def jit(*flags: str) -> Any:
    """Compile on first call, cached on disk where there is a folder to write to. Local."""
    def decorate(function: Any) -> Any:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(flags) or False}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError as error:
            warnings.warn(f"kernels are compiled anew in every process: {error}; set NUMBA_CACHE_DIR to a folder "
                          "that can be written", RuntimeWarning, stacklevel=3)
            return numba.njit(**options)(function)
    return decorate


def widen(x):  # type: ignore[no-untyped-def]
    """Give a float for stored bits: uint16 is bfloat16, int16 is float16, floats are themselves."""
    raise NotImplementedError("typed by Numba")


@overload(widen)
def _widen(x):  # type: ignore[no-untyped-def]
    if x is numba.types.uint16:        # bfloat16 is the upper half of a float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return _widen_half if x is numba.types.int16 else (lambda x: x)


def _widen_half(x):  # type: ignore[no-untyped-def]
    bits = np.uint32(np.uint32(x) & np.uint32(0xFFFF))
    rest = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    # 2^112 moves the exponent's bias, subnormals included; infinity and NaN keep their exponent.
    moved = np.float32(rest.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    moved = np.uint32(rest | np.uint32(0x7F800000)) if rest >= np.uint32(0x0F800000) else moved
    return np.uint32(moved | ((bits & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)


def exponential(x):  # type: ignore[no-untyped-def]
    """e^x to about one unit in the last place, for x <= 0; results below the normal range are 0."""
    raise NotImplementedError("typed by Numba")


@overload(exponential)
def _exponential(x):  # type: ignore[no-untyped-def]
    return _exponential_32 if x is numba.types.float32 else _exponential_64


def _exponential_32(x):  # type: ignore[no-untyped-def]
    # Cody & Waite reduction, then the polynomial of Cephes' expf.
    one = np.float32(1.0)
    y = x if x > np.float32(-87.33) else np.float32(-87.33)
    n = np.floor(y * np.float32(LOG2E) + np.float32(0.5))
    f = (y - n * np.float32(LN2_HIGH)) - n * np.float32(LN2_LOW)
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    p = p * f * f + f + one
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    result = p * power if x > np.float32(-87.33) else np.float32(0.0)
    return result if x == x else x      # NaN stays NaN


def _exponential_64(x):  # type: ignore[no-untyped-def]
    # The same with Taylor's polynomial: at |f| <= log(2)/2 its 14th term is 4e-18.
    y = x if x > -708.3 else -708.3
    n = np.floor(y * LOG2E + 0.5)
    f = (y - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
    p = 1.6059043836821613e-10
    p = p * f + 2.08767569878681e-09
    p = p * f + 2.505210838544172e-08
    p = p * f + 2.755731922398589e-07
    p = p * f + 2.7557319223985893e-06
    p = p * f + 2.48015873015873e-05
    p = p * f + 0.0001984126984126984
    p = p * f + 0.001388888888888889
    p = p * f + 0.008333333333333333
    p = p * f + 0.041666666666666664
    p = p * f + 0.16666666666666666
    p = p * f + 0.5
    p = p * f * f + f + 1.0
    power = np.int64((np.int64(n) + np.int64(1023)) << np.int64(52)).view(np.float64)
    result = p * power if x > -708.3 else 0.0
    return result if x == x else x


@jit("contract", "reassoc", "nsz")
def add_product(a, first, last, b, n, c):  # type: ignore[no-untyped-def]
    """c[:n] += a[first:last] @ b[first:last, :n]."""
    j = first
    while j + 8 <= last:
        a0, a1, a2, a3, a4, a5, a6, a7 = a[j], a[j+1], a[j+2], a[j+3], a[j+4], a[j+5], a[j+6], a[j+7]
        for x in range(n):
            c[x] += (((a0 * b[j, x] + a1 * b[j+1, x]) + (a2 * b[j+2, x] + a3 * b[j+3, x]))
                     + ((a4 * b[j+4, x] + a5 * b[j+5, x]) + (a6 * b[j+6, x] + a7 * b[j+7, x])))
        j += 8
    while j < last:
        for x in range(n):
            c[x] += a[j] * b[j, x]
        j += 1


@jit("contract")
def largest(s, n, lanes):  # type: ignore[no-untyped-def]
    """Largest of s[:n]; NaN is passed over (the sum of the weights will carry it)."""
    for u in range(LANES):
        lanes[u] = -np.inf
    for x in range(n // LANES):
        for u in range(LANES):
            y = s[x * LANES + u]
            lanes[u] = y if y > lanes[u] else lanes[u]
    for x in range(n - n % LANES, n):
        lanes[0] = s[x] if s[x] > lanes[0] else lanes[0]
    top = lanes[0]
    for u in range(1, LANES):
        top = lanes[u] if lanes[u] > top else top
    return top


@jit("contract")
def weigh(s, n, shift):  # type: ignore[no-untyped-def]
    """s[:n] = e^(s - shift). Its own function: the range reduction must not be reordered."""
    for x in range(n):
        s[x] = exponential(s[x] - shift)


@jit("contract", "reassoc", "nsz")
def total(s, n):  # type: ignore[no-untyped-def]
    """Sum of s[:n]."""
    result = s.dtype.type(0)
    for x in range(n):
        result += s[x]
    return result


@jit()
def fold_row(acc, top, norm, i, h, query, keys, values, n, a, b, scale, scores, lanes):  # type: ignore[no-untyped-def]
    """Fold columns a..b of a packed tile of n keys into row i, head h of the state."""
    for x in range(n):
        scores[x] = 0
    add_product(query, 0, len(query), keys, n, scores)
    for x in range(n):
        scores[x] *= scale
    for x in range(a):
        scores[x] = -np.inf
    for x in range(n - b):
        scores[b + x] = -np.inf
    old = top[i, h]
    new = max(old, largest(scores, n, lanes))
    shift = new if new > -np.inf else acc.dtype.type(0)        # -inf - -inf would be NaN
    weigh(scores, n, shift)
    row = acc[i, h]
    if new > old:
        shrink = acc.dtype.type(np.exp(old - shift))
        for x in range(len(row)):
            row[x] *= shrink
        norm[i, h] *= shrink
        top[i, h] = new
    norm[i, h] += total(scores, n)
    add_product(scores, a, b, values, len(row), row)     # a..b alone: 0 × NaN is NaN


@jit()
def fold(acc, top, norm, q, k, v, begin, end, scale, start, stop, head):  # type: ignore[no-untyped-def]
    """Fold a block into queries start..stop and the query heads of key head `head`.

    acc (n_q, heads, dim_v), top and norm (n_q, heads): the state. q (n_q, heads, dim), k (n_k, kv_heads, dim),
    v (n_k, kv_heads, dim_v): stored bits, see `widen`. Row i sees columns begin[i] <= j < end[i].
    """
    group = acc.shape[1] // k.shape[1]
    dim, dim_v = q.shape[2], v.shape[2]
    keys, values = np.empty((dim, COLUMNS), acc.dtype), np.empty((COLUMNS, dim_v), acc.dtype)
    query, scores, lanes = np.empty(dim, acc.dtype), np.empty(COLUMNS, acc.dtype), np.empty(LANES, acc.dtype)
    first, last = len(k), 0
    for i in range(start, stop):
        if end[i] > begin[i]:
            first, last = min(first, begin[i]), max(last, end[i])
    for c in range(first, last, COLUMNS):
        n = min(COLUMNS, last - c)
        seen = False
        for i in range(start, stop):
            seen = seen or (max(begin[i], c) < min(end[i], c + n))
        if not seen:
            continue
        for j in range(n):
            for d in range(dim):
                keys[d, j] = widen(k[c + j, head, d])
            for d in range(dim_v):
                values[j, d] = widen(v[c + j, head, d])
        for i in range(start, stop):
            a, b = max(begin[i] - c, 0), min(end[i] - c, n)
            if a >= b:
                continue
            for h in range(head * group, (head + 1) * group):
                for d in range(dim):
                    query[d] = widen(q[i, h, d])
                fold_row(acc, top, norm, i, h, query, keys, values, n, a, b, scale, scores, lanes)
