"""Where the attention went: sums over the weights of a call, which are never all there at once.

A weight is ``exp(score - lse)``, before dropout; with sinks those of a query sum to less than 1. Every function takes
this rank's shards of q, k and lse, as `ringmpi.ring_attention` takes and returns them, and the options of
`ringmpi.RingAttention`: `mask`, `layout`, `kv_layout`, `scale`, `softcap`, `alibi`, `accumulator`, `schedule`,
`memory_limit`, `backend`, `threads`, `timeout` and the others. Without lse (None) a pass of its own reckons it, with
`sinks`, a score of each head, if there are any. They compute on CPUs, with Numba or NumPy; arrays on GPUs,
``backend="cuda"`` and ``order="canonical"`` are errors.

Formulas, examples and costs are in docs/analysis.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..attention import RingAttention, Tables
from ..call import Array
from ..keywords import explained
from ..layout import Integers
from .weights import Top, Weights

__all__ = ["Top", "Weights", "entropy", "key_mass", "mass_by_group", "max_score", "mean_position", "rows", "top"]


@explained(RingAttention)
def key_mass(q: ArrayLike, k: ArrayLike, lse: ArrayLike | None, *, comm: Any, groups: ArrayLike | None = None,
             n_groups: int | None = None, sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None,
             relative: Tables | None = None, **options: Any) -> NDArray[np.float64]:
    """Give how much weight each key received from each query head, summed over all queries. Collective over *comm*.

    Parameters
    ----------
    q : array of shape ([batch,] n_q, heads, dim)
        This rank's queries; see `ringmpi.RingAttention.__call__`.
    k : array of shape ([batch,] n_k, kv_heads, dim), dtype of `q`
        This rank's keys.
    lse : array of shape ([batch,] n_q, heads), accumulator dtype, or None
        Log-sum-exp of the scores, as attention returned it with ``return_lse=True``.
    comm : MPI.Intracomm
    groups : int array of shape (n_q,), optional
        The group of each of this rank's queries, ``0 <= group < n_groups``, or -1 for none: sums for each group.
    n_groups : int
        With `groups`; the same on all ranks.
    sinks : array of shape (heads,), optional
        Without `lse`, which holds them.
    key_bias : array of shape ([batch,] n_k) or ([batch,] n_k, heads), float, optional
        Of this rank's keys, as the call had it, with `lse` too: a key that is left out weighs nothing.
    relative : array of shape (heads, 2 reach + 1), or a tuple or list of one for each axis of a `Grid`, optional
        As the call had it, with `lse` too.
    **options
        See `ringmpi.RingAttention`.

    Returns
    -------
    float64 array of shape ([batch,] n_k, heads), or with `groups` ([batch,] n_k, heads, n_groups)
        Of this rank's keys, from the queries of all ranks: ``sum over i of exp(score[i, j] - lse[i])``.

    Raises
    ------
    RingError
        One of its children, the same on every rank.
    """
    with Weights(comm, **options) as weights:
        return weights.key_mass(q, k, lse, groups=groups, n_groups=n_groups, sinks=sinks, key_bias=key_bias,
                                relative=relative)


@explained(RingAttention)
def rows(q: ArrayLike, k: ArrayLike, lse: ArrayLike | None, chosen: ArrayLike, *, comm: Any,
         sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None, relative: Tables | None = None,
         **options: Any) -> Iterator[tuple[Integers, Array]]:
    """Give the weights of a few chosen queries over all keys, some keys at a time. Collective over *comm*.

    The call is collective, the iteration is not. To write all weights to a dataset of shape (chosen, heads, n_k), each
    rank does ``for positions, weights in rows(...): dataset[..., positions] = weights``.

    Parameters
    ----------
    q, k, lse, comm, sinks, key_bias, relative, **options
        See `key_mass`.
    chosen : int array of shape (chosen,)
        Positions of queries in the whole sequence, the same on all ranks.

    Returns
    -------
    iterator of (int64 array of shape (m,), array of shape ([batch,] chosen, heads, m))
        Positions of some of this rank's keys, ascending, and the weights that they have, in the accumulator's dtype; 0
        where a query does not see a key.

    Raises
    ------
    OptionError
        If there is no such query; the same on every rank.
    RingError
        See `key_mass`.
    """
    weights = Weights(comm, **options)
    try:
        found = weights.rows(q, k, lse, chosen, sinks=sinks, key_bias=key_bias, relative=relative)
    except BaseException:
        weights.close()
        raise
    return _until_the_end(weights, found)


@explained(RingAttention)
def top(q: ArrayLike, k: ArrayLike, n: int, lse: ArrayLike | None = None, *, comm: Any,
        sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None, relative: Tables | None = None,
        **options: Any) -> Top:
    """Give the n heaviest keys of each query, with their weights and positions. Collective over *comm*.

    Keys of the same score come in the order of their positions, so the result is the same on any number of ranks. A
    score that is NaN comes first. Keys that `key_bias` leaves out are not among them.

    Parameters
    ----------
    q, k, comm, sinks, key_bias, relative, **options
        See `key_mass`.
    n : int
        At least 1; meant to be small.
    lse : array, optional
        See `key_mass`.

    Returns
    -------
    Top
        Of this rank's queries.

    Raises
    ------
    RingError
        See `key_mass`.
    """
    with Weights(comm, **options) as weights:
        return weights.top(q, k, n, lse, sinks=sinks, key_bias=key_bias, relative=relative)


@explained(RingAttention)
def max_score(q: ArrayLike, k: ArrayLike, *, comm: Any, key_bias: ArrayLike | None = None,
              relative: Tables | None = None, **options: Any) -> Array:
    """Give the largest score of each head, of all pairs that are seen. Collective over *comm*.

    Scores are scaled, after `softcap`, `alibi` and biases; sinks do not count.

    Parameters
    ----------
    q, k, comm, key_bias, relative, **options
        See `key_mass`.

    Returns
    -------
    array of shape ([batch,] heads), accumulator dtype
        The same on all ranks; -inf where nothing is seen, or only what is left out; NaN if some
        score is.

    Raises
    ------
    RingError
        See `key_mass`.
    """
    with Weights(comm, **options) as weights:
        return weights.max_score(q, k, key_bias=key_bias, relative=relative)


@explained(RingAttention)
def entropy(q: ArrayLike, k: ArrayLike, lse: ArrayLike | None, *, comm: Any, sinks: ArrayLike | None = None,
            key_bias: ArrayLike | None = None, relative: Tables | None = None, **options: Any
            ) -> NDArray[np.float64]:
    """Give the entropy of each query's weights, in nats. Collective over *comm*.

    Parameters
    ----------
    q, k, lse, comm, sinks, key_bias, relative, **options
        See `key_mass`.

    Returns
    -------
    float64 array of shape ([batch,] n_q, heads)
        ``-sum over j of p log p`` of this rank's queries, with p the weights; 0 for a query that sees no key, or
        only keys that are left out. What a sink weighs is left out.

    Raises
    ------
    RingError
        See `key_mass`.
    """
    with Weights(comm, **options) as weights:
        return weights.entropy(q, k, lse, sinks=sinks, key_bias=key_bias, relative=relative)


@explained(RingAttention)
def mean_position(q: ArrayLike, k: ArrayLike, lse: ArrayLike | None, *, comm: Any, sinks: ArrayLike | None = None,
                  key_bias: ArrayLike | None = None, relative: Tables | None = None, **options: Any
                  ) -> NDArray[np.float64]:
    """Give the mean position of the keys that each query looked at, by their weights. Collective over *comm*.

    Parameters
    ----------
    q, k, lse, comm, sinks, key_bias, relative, **options
        See `key_mass`.

    Returns
    -------
    float64 array of shape ([batch,] n_q, heads)
        ``sum of p j / sum of p`` of this rank's queries, over the positions j of all keys; NaN for a query that sees no
        key, or only keys that are left out.

    Raises
    ------
    RingError
        See `key_mass`.
    """
    with Weights(comm, **options) as weights:
        return weights.mean_position(q, k, lse, sinks=sinks, key_bias=key_bias, relative=relative)


@explained(RingAttention)
def mass_by_group(q: ArrayLike, k: ArrayLike, lse: ArrayLike | None, groups: ArrayLike, n_groups: int, *, comm: Any,
                  sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None, relative: Tables | None = None,
                  **options: Any) -> NDArray[np.float64]:
    """Give how much each query looked at the keys of each group: documents, segments. Collective over *comm*.

    Parameters
    ----------
    q, k, lse, comm, sinks, key_bias, relative, **options
        See `key_mass`.
    groups : int array of shape (n_k,)
        The group of each of this rank's keys, ``0 <= group < n_groups``, or -1 for none.
    n_groups : int
        The same on all ranks.

    Returns
    -------
    float64 array of shape ([batch,] n_q, heads, n_groups)
        Sums of the weights of this rank's queries.

    Raises
    ------
    RingError
        See `key_mass`.
    """
    with Weights(comm, **options) as weights:
        return weights.mass_by_group(q, k, lse, groups, n_groups, sinks=sinks, key_bias=key_bias,
                                     relative=relative)


def _until_the_end(weights: Weights, found: Iterator[tuple[Integers, Array]]) -> Iterator[tuple[Integers, Array]]:
    """Yield pieces of rows, and close what computes them at the end."""
    with weights:
        yield from found
