"""The arithmetic of second derivatives on the host, in NumPy, whichever backend has made the forward pass.

In blocks, as everything else: no array of ``n_q × n_k`` is made. Not a path for speed: a tile has 5 products forward
and 10 backward, where a backward pass has 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..layout import Integers
from ..relative import Relative
from ..score import Score
from .numpy_ import Tile, _blas_threads, _finite, _slices
from .strided import for_products

Array = NDArray[Any]
ROWS = 256                 # of a tile of scores, over the query heads of a key head: half a MiB in float32
COLUMNS = 512


class Rows(NamedTuple):
    """Queries, with a tangent of each.

    Attributes
    ----------
    q, q_dot : arrays of shape (n_q, heads, dim)
    lse : array of shape (n_q, heads), accumulator dtype
        See `softmax.Gradient`.
    """

    q: Array
    q_dot: Array
    lse: Array

    def part(self, rows: slice, heads: slice) -> Rows:
        """Give some rows and heads. Local."""
        return Rows(*(x[rows, heads] for x in self))


class Keys(NamedTuple):
    """Keys and values of a block, with a tangent of each.

    Attributes
    ----------
    k, v, k_dot, v_dot : arrays of shapes (n_k, kv_heads, dim) and (n_k, kv_heads, dim_v)
    bias_dot : array of shape (n_k, heads) or (n_k, 1), accumulator dtype, optional
        The tangent of the score's bias of the keys, if there is one.
    """

    k: Array
    v: Array
    k_dot: Array
    v_dot: Array
    bias_dot: Array | None = None

    def part(self, tile: Tile, head: int) -> Keys:
        """Give a tile's columns of a head, and the tangent of their bias for its query heads. Local."""
        k, v, k_dot, v_dot = (x[tile.columns, head] for x in self[:4])
        return Keys(k, v, k_dot, v_dot, None if self.bias_dot is None else tile.of_bias(self.bias_dot))

    def wide(self, dtype: np.dtype[Any]) -> Keys:
        """Give them in the accumulator's dtype, as products take them. Local."""
        k, v, k_dot, v_dot = _wide(self[:4], dtype)
        return Keys(k, v, k_dot, v_dot, self.bias_dot)


@dataclass
class Tangent:
    """The derivative of the results of some queries in a direction, as it is summed up; zeros at first.

    Attributes
    ----------
    out_dot : array of shape (n_q, heads, dim_v), accumulator dtype
        Of the weights times the values, before lse changes: ``sum(m p (t v + v_dot))``.
    lse_dot : array of shape (n_q, heads), accumulator dtype
        ``sum(p t)``: the mean change of a row's scores.
    """

    out_dot: Array
    lse_dot: Array


@dataclass
class SecondGradient:
    """What the backward pass knows of queries, how it changes in a direction, and how dq does.

    Attributes
    ----------
    dout, delta
        See `softmax.Gradient`.
    lse_dot, delta_dot : arrays of shape (n_q, heads), accumulator dtype
        The changes of lse and delta.
    dq : array of shape (n_q, heads, dim), accumulator dtype
        The change of dq so far.
    """

    dout: Array
    delta: Array
    lse_dot: Array
    delta_dot: Array
    dq: Array

    def part(self, rows: slice, heads: slice) -> SecondGradient:
        """Give some rows and heads. Local."""
        return SecondGradient(*(x[rows, heads] for x in vars(self).values()))


class Tangents:
    """Derivatives of the two passes in a direction, for one block of K and V at a time. Local.

    With z = scale q·k, x the score that it becomes, x' and x'' its derivatives by z, p the weight before dropout and m
    what dropout multiplies it by::

        z_dot = scale (q_dot·k + q·k_dot)     t = x' z_dot + bias_dot + relative_dot     p_dot = p (t - lse_dot)

    Parameters
    ----------
    threads : int
        Of BLAS.
    relative_dot : Relative, optional
        The tangent of the scores' bias by distance, if there is one.
    """

    def __init__(self, threads: int, relative_dot: Relative | None = None) -> None:
        self._threads = threads
        self._relative_dot = relative_dot

    def forward(self, sums: Tangent, rows: Rows, keys: Keys, begin: Integers, end: Integers, score: Score
                ) -> Iterator[int]:
        """Add to the tangents of the results what one block gives.

        A row gets nothing from what it does not see, be it NaN.

        Parameters
        ----------
        sums : Tangent
            Updated in place.
        rows, keys
        begin, end, score
            See `Backend.accumulate`.

        Yields
        ------
        int
            See `Backend.accumulate`.
        """
        for tile, head in self._tiles(rows.q, keys.k, begin, end, score):
            mine = tile.rows, tile.heads
            _forward_tile(Tangent(sums.out_dot[mine], sums.lse_dot[mine]), rows.part(*mine),
                          keys.part(tile, head), self._relative_dot, tile)
            yield _pairs(tile, head)

    def backward(self, gradient: SecondGradient, rows: Rows, keys: Keys, dk: Array, dv: Array, begin: Integers,
                 end: Integers, score: Score, dkey_bias: Array | None = None,
                 drelative: Sequence[NDArray[np.float64]] | None = None) -> Iterator[int]:
        """Add to the tangents of dq, dk, dv and the bias's gradient what one block gives; dout and dlse are constant.

        ::

            ds = p (m (dout · v) - delta)               ds_dot = p_dot (m (dout · v) - delta)
                                                                 + p (m (dout · v_dot) - delta_dot)
            dz = x' ds                                  dz_dot = x' ds_dot + x'' z_dot ds
            dq += scale (dz_dot k + dz k_dot)           dk += scale (dz_dotᵀ q + dzᵀ q_dot)     dv += (m p_dot)ᵀ dout
            dkey_bias += sum of ds_dot over the queries         drelative += sums of ds_dot over pairs that are as far

        Parameters
        ----------
        gradient : SecondGradient
            dq is updated in place.
        rows, keys
        dk, dv : arrays of shapes (n_k, kv_heads, dim) and (n_k, kv_heads, dim_v), accumulator dtype
            Updated in place.
        begin, end, score
            See `Backend.accumulate`.
        dkey_bias : array of shape (n_k, heads) or (n_k, 1), accumulator dtype, if there is a bias
            Updated in place.
        drelative : sequence of float64 arrays like the tables, if there is a bias by distance
            Updated in place.

        Yields
        ------
        int
            See `Backend.accumulate`.
        """
        for tile, head in self._tiles(rows.q, keys.k, begin, end, score):
            mine, columns = (tile.rows, tile.heads), (tile.columns, head)
            of_scores = _backward_tile(gradient.part(*mine), rows.part(*mine), keys.part(tile, head),
                                       self._relative_dot, dk[columns], dv[columns], tile)
            if dkey_bias is not None:
                target, sums = tile.of_bias(dkey_bias), of_scores.sum(axis=0).T
                target += sums if target.shape[1] > 1 else sums.sum(axis=1, keepdims=True)
            if drelative is not None:
                tile.sum_relative(drelative, of_scores)
            yield _pairs(tile, head)

    def _tiles(self, q: Array, k: Array, begin: Integers, end: Integers, score: Score) -> Iterator[tuple[Tile, int]]:
        """Yield each tile in which some row sees something, for each head of the keys; limit BLAS meanwhile."""
        group = q.shape[1] // k.shape[1]
        with _blas_threads(self._threads):
            for rows in _slices(0, len(q), max(1, ROWS // group)):
                for some in zip(*(np.atleast_2d(edge)[:, rows] for edge in (begin, end)), strict=True):
                    for columns in _slices(int(some[0].min()), int(some[1].max()), COLUMNS):
                        low, high = (np.clip(edge, columns.start, columns.stop) - columns.start for edge in some)
                        for head in range(k.shape[1]) if (high > low).any() else ():
                            yield Tile(score, rows, slice(head * group, (head + 1) * group), columns, low, high), head


def _pairs(tile: Tile, head: int) -> int:
    """Give the pairs seen in a tile, which count once for all heads."""
    return 0 if head else int((tile.high - tile.low).sum())


class _Weights(NamedTuple):
    """The weights of a tile, (rows, heads of a group, columns), and how they and their scores change."""

    p: Array                 # 0 where a pair is not seen
    z_dot: Array
    t: Array
    slope: Array | float     # x'
    bend: Array | float      # x'' / x'

    @classmethod
    def of(cls, tile: Tile, rows: Rows, keys: Keys, relative_dot: Relative | None) -> _Weights:
        """Make them again from the scores and lse."""
        dtype = rows.lse.dtype
        scale = dtype.type(tile.score.scale)
        q, q_dot = rows.q * scale, rows.q_dot * scale
        p, z_dot = _scores(q, keys.k), _scores(q_dot, keys.k)
        z_dot += _scores(q, keys.k_dot)
        bend: Array | float = 0.0
        if tile.score.softcap:
            bend = np.tanh(p / dtype.type(tile.score.softcap))
            bend *= dtype.type(-2 / tile.score.softcap)
        slope = tile.apply_score(p)
        p -= rows.lse[..., None]
        np.minimum(p, 0, out=p)              # rounding alone can put a score above lse
        np.exp(p, out=p)
        t = z_dot if slope is None else z_dot * slope
        if keys.bias_dot is not None:
            t = t + keys.bias_dot.T
        if relative_dot is not None:
            t = t.copy()                     # z_dot it may be
            tile.add_relative(t, relative_dot)
        _hide(tile, p, z_dot, t)
        return cls(p, z_dot, t, 1.0 if slope is None else slope, bend)


def _forward_tile(sums: Tangent, rows: Rows, keys: Keys, relative_dot: Relative | None, tile: Tile) -> None:
    """Add what a tile of one key head gives to out_dot and lse_dot."""
    dtype = sums.lse_dot.dtype
    rows, keys = Rows(*_wide(rows, dtype)), keys.wide(dtype)
    with np.errstate(all="ignore"):          # NaN and infinity pass through to the rows that see them
        weights = _Weights.of(tile, rows, keys, relative_dot)
        change = weights.p * weights.t
        sums.lse_dot += change.sum(axis=2)
        p = weights.p
        if tile.score.dropout:
            factor = tile.dropout_factor(dtype)
            change, p = change * factor, p * factor
        sums.out_dot += _times_values(tile, change, keys.v)
        sums.out_dot += _times_values(tile, p, keys.v_dot)


def _backward_tile(gradient: SecondGradient, rows: Rows, keys: Keys, relative_dot: Relative | None, dk: Array,
                   dv: Array, tile: Tile) -> Array:
    """Add what a tile of one key head gives to the changes of dq, dk and dv; give ds_dot, 0 where a pair is not seen.

    That is of shape (rows, heads of the group, columns).
    """
    dtype = gradient.dq.dtype
    rows, keys = Rows(*_wide(rows, dtype)), keys.wide(dtype)
    dout, = _wide([gradient.dout], dtype)
    delta, lse_dot, delta_dot = (x[..., None] for x in (gradient.delta, gradient.lse_dot, gradient.delta_dot))
    with np.errstate(all="ignore"):
        weights = _Weights.of(tile, rows, keys, relative_dot)
        dp, dp_dot = _scores(dout, keys.v), _scores(dout, keys.v_dot)
        factor = tile.dropout_factor(dtype) if tile.score.dropout else dtype.type(1)
        dp *= factor
        dp_dot *= factor

        # Gradients of the scores and of the products, and their changes; see `Tangents.backward`.
        dp -= delta
        p_dot = weights.p * (weights.t - lse_dot)
        ds = weights.p * dp
        ds_dot = p_dot * dp + weights.p * (dp_dot - delta_dot)
        dz_dot = ds_dot + weights.bend * weights.z_dot * ds
        scale = weights.slope * dtype.type(tile.score.scale)
        dz_dot *= scale
        dz = ds * scale
        p_dot *= factor

        # The products take NaN and infinity as 0: they have made dz_dot NaN already. For dv it goes by delta.
        np.copyto(p_dot, np.nan, where=~np.isfinite(delta))
        _hide(tile, p_dot, dz, dz_dot, ds_dot)
        dv += _flat(p_dot).T @ _flat(_finite(dout))
        dk += _flat(dz_dot).T @ _flat(_finite(rows.q)) + _flat(dz).T @ _flat(_finite(rows.q_dot))
        dq = _flat(dz_dot) @ _finite(keys.k) + _flat(dz) @ _finite(keys.k_dot)
        gradient.dq[...] += dq.reshape(rows.q.shape)
        of_scores: Array = ds_dot
        return of_scores


def _wide(arrays: Sequence[Array], dtype: np.dtype[Any]) -> Iterator[Array]:
    """Give arrays in the accumulator's dtype, as products take them."""
    return (for_products(x, dtype) for x in arrays)


def _flat(x: Array) -> Array:
    """View (rows, heads of a group, ...) as a matrix."""
    return x.reshape(-1, x.shape[2])


def _scores(x: Array, y: Array) -> Array:
    """Multiply rows (rows, group, dim) by columns (columns, dim): (rows, group, columns)."""
    products: Array = (_flat(x) @ y.T).reshape(*x.shape[:2], len(y))
    return products


def _hide(tile: Tile, *arrays: Array) -> None:
    """Put 0 where a pair is not seen."""
    for x in () if tile.full else arrays:
        np.copyto(x, 0, where=tile.hidden)


def _times_values(tile: Tile, weights: Array, values: Array) -> Array:
    """Multiply weights by values; a row gets no NaN from what it does not see."""
    if tile.full or np.isfinite(values).all():
        return (_flat(weights) @ values).reshape(*weights.shape[:2], -1)
    result = np.empty((*weights.shape[:2], values.shape[1]), values.dtype)
    for i, (low, high) in enumerate(zip(tile.low, tile.high, strict=True)):
        result[i] = weights[i, :, low:high] @ values[low:high]
    return result
