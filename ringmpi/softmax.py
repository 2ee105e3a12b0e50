"""The running softmax of a query shard: its state, how states are combined and finished, and its gradient.

The recurrence is that of Milakov & Gimelshein 2018 (*Online normalizer calculation for softmax*) and
Rabe & Staats 2021; folding blocks is associative and commutative up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


@dataclass
class State:
    """Running softmax of a query shard.

    Scores and their maximum are in natural units here, and in a state of the CUDA backend in units of ln 2, with 2^x
    for exp: a state is read by the backend that made it, no other.

    Attributes
    ----------
    acc : array of shape (n_q, heads, dim_v), accumulator dtype
        Sum of exp(score - row_max) times the values, not normalised.
    row_max : array of shape (n_q, heads), accumulator dtype
        Largest scaled score so far, or a little more, or that of an earlier time, as long as exp has room above it;
        -inf before the first.
    row_sum : array of shape (n_q, heads), accumulator dtype
        Sum of exp(score - row_max) so far.
    """

    acc: NDArray[Any]
    row_max: NDArray[Any]
    row_sum: NDArray[Any]

    @classmethod
    def empty(cls, n_q: int, heads: int, dim_v: int, dtype: DTypeLike) -> State:
        """Make the state of queries that have seen no key yet. Local."""
        state = cls(np.empty((n_q, heads, dim_v), dtype), np.empty((n_q, heads), dtype), np.empty((n_q, heads), dtype))
        state.reset()
        return state

    def reset(self, sinks: NDArray[Any] | None = None) -> None:
        """Forget every key. Local.

        `sinks`, of shape (heads,), are scores that each row of a head has besides those of its keys, with value 0.
        """
        self.acc.fill(0)
        self.row_max[...] = -np.inf if sinks is None else sinks
        self.row_sum.fill(0 if sinks is None else 1)


@dataclass
class Gradient:
    """What the backward pass knows of a query shard, and the gradient that it sums up.

    Attributes
    ----------
    dout : array of shape (n_q, heads, dim_v), dtype of q
        Gradient of the result.
    lse : array of shape (n_q, heads), accumulator dtype
        Log-sum-exp of the scores, of all keys and the sink: a weight is ``exp(score - lse)``.
    delta : array of shape (n_q, heads), accumulator dtype
        ``sum(dout · out) - dlse``: the gradient of a score is ``weight (dout · v - delta)``.
    dq : array of shape (n_q, heads, dim), accumulator dtype
        Gradient of the queries so far.
    out : array of shape (n_q, heads, dim_v), dtype of q, optional
        The result, where delta is ``sum(dout · out)`` and nothing else.
    """

    dout: Any
    lse: Any
    delta: Any
    dq: Any
    out: Any = None


def row_delta(dout: NDArray[Any], out: NDArray[Any], dlse: NDArray[Any] | None, delta: NDArray[Any]) -> None:
    """Write ``sum(dout · out) - dlse`` to `delta`, (n_q, heads), summed in its dtype. Local."""
    rows = max(1, 2**20 // max(1, dout[0].size if len(dout) else 1))      # at a time: widened copies stay small
    with np.errstate(all="ignore"):
        for start in range(0, len(dout), rows):
            x, y = (a[start:start + rows].astype(delta.dtype, copy=False) for a in (dout, out))
            np.einsum("ihd,ihd->ih", x, y, out=delta[start:start + rows])
        if dlse is not None:
            delta -= dlse


def combine(state: State, parts: State) -> None:
    """Fold `parts`, states of the same queries that saw other keys, into `state`. Local.

    Parameters
    ----------
    state : State
        Updated in place.
    parts : State
        Arrays with a leading axis: one state after the other.
    """
    row_max = np.maximum(state.row_max, parts.row_max.max(axis=0))
    shift = np.where(row_max == -np.inf, row_max.dtype.type(0), row_max)      # -inf - -inf would be NaN
    with np.errstate(all="ignore"):       # NaN and infinity pass through to the rows that saw them
        shrink = np.exp(state.row_max - shift)
        factors = np.exp(parts.row_max - shift)
        state.acc *= shrink[..., None]
        state.acc += (factors[..., None] * parts.acc).sum(axis=0)
        state.row_sum *= shrink
        state.row_sum += (factors * parts.row_sum).sum(axis=0)
    state.row_max[...] = row_max


def finish(state: State, seen: NDArray[np.bool_], out: NDArray[Any], lse: NDArray[Any]) -> None:
    """Normalise: ``out = acc / row_sum`` and ``lse = row_max + log(row_sum)``. Local.

    Parameters
    ----------
    state : State
        Destroyed: `acc` is divided in place.
    seen : bool array of shape (n_q,), or (n_q, heads) on the host
        Which queries see any key, that their head's bias does not leave out. The others have out 0 and lse -inf; a
        query that does see keys, all with score -inf, has out NaN, as a dense softmax has.
    out : array of shape (n_q, heads, dim_v), any dtype
        Written.
    lse : array of shape (n_q, heads), accumulator dtype
        Written.
    """
    blind = ~seen
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        np.divide(state.acc, state.row_sum[..., None], out=state.acc)
        state.acc[blind] = 0
        out[...] = state.acc
        np.log(state.row_sum, out=lse)
        lse += state.row_max
    lse[blind] = -np.inf
