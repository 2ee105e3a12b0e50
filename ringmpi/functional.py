"""Ring attention as functions: for one call."""

from __future__ import annotations

from typing import Any, Literal, overload

from numpy.typing import ArrayLike

from .attention import RingAttention, Tables
from .call import Array
from .gradients import AnyGradients
from .keywords import explained


@overload
def ring_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike | None = None, *, comm: Any, dim_v: int | None = None,
                   sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None,
                   relative: Tables | None = None, seed: int = 0,
                   return_lse: Literal[False] = False, **options: Any) -> Array: ...


@overload
def ring_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike | None = None, *, comm: Any, dim_v: int | None = None,
                   sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None,
                   relative: Tables | None = None, seed: int = 0,
                   return_lse: Literal[True], **options: Any) -> tuple[Array, Array]: ...


@explained(RingAttention)
def ring_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike | None = None, *, comm: Any, dim_v: int | None = None,
                   sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None,
                   relative: Tables | None = None, seed: int = 0,
                   return_lse: bool = False, **options: Any) -> Array | tuple[Array, Array]:
    """Attend once; for many calls make a `RingAttention`. Collective over *comm*.

    Parameters
    ----------
    q, k, v : arrays
        This rank's shards, of shapes ([batch,] n_q, heads, dim), ([batch,] n_k, kv_heads, dim) and
        ([batch,] n_k, kv_heads, dim_v); see `RingAttention.__call__`.
    comm : MPI.Intracomm
    dim_v : int, optional
        In place of `v`: values are the first `dim_v` numbers of each key.
    sinks : array of shape (heads,), optional
        A score of each head that joins the softmax, with no value.
    key_bias : array of shape ([batch,] n_k) or ([batch,] n_k, heads), optional
        Added to the scores of this rank's keys; -inf leaves a key out.
    relative : array of shape (heads, 2 reach + 1), or a tuple or list of one for each axis of a `Grid`, optional
        Added to the scores by the distance of query and key.
    seed : int
        Of dropout.
    return_lse : bool
        Return the log-sum-exp of the scores too.
    **options
        `mask`, `layout`, `kv_layout`, `scale`, `softcap`, `alibi`, `dropout`, `backend`, `threads`, `timeout`,
        `accumulator`, `gpu_transport`, `allow_gpu_sharing`, `gpu_kernels`, `bfloat16_products`, `schedule`,
        `memory_limit`, `order`: see `RingAttention`.

    Returns
    -------
    out : array of shape ([batch,] n_q, heads, dim_v), dtype of `q`
    lse : array of shape ([batch,] n_q, heads), accumulator dtype
        With `return_lse`.

    Raises
    ------
    RingError
        One of its children, the same on every rank.
    """
    with RingAttention(comm, **options) as attention:
        if return_lse:
            return attention(q, k, v, dim_v=dim_v, sinks=sinks, key_bias=key_bias, relative=relative, seed=seed,
                             return_lse=True)
        return attention(q, k, v, dim_v=dim_v, sinks=sinks, key_bias=key_bias, relative=relative, seed=seed)


@explained(RingAttention)
def ring_attention_backward(dout: ArrayLike, q: ArrayLike, k: ArrayLike, v: ArrayLike | None, out: ArrayLike,
                            lse: ArrayLike, *, comm: Any, dlse: ArrayLike | None = None, dim_v: int | None = None,
                            sinks: ArrayLike | None = None, key_bias: ArrayLike | None = None,
                            relative: Tables | None = None, seed: int = 0,
                            **options: Any) -> AnyGradients:
    """Give the gradients of a `ring_attention`; for many make a `RingAttention`. Collective over *comm*.

    Parameters
    ----------
    dout : array of shape ([batch,] n_q, heads, dim_v), dtype of `q`
        Gradient of `out`.
    q, k, v, dim_v, sinks, key_bias, relative, seed
        As they were given to `ring_attention`.
    out, lse
        As it returned them, with `return_lse`.
    comm : MPI.Intracomm
    dlse : array of shape ([batch,] n_q, heads), accumulator dtype, optional
        Gradient of `lse`.
    **options
        As they were given to `ring_attention`.

    Returns
    -------
    dq, dk, dv : arrays of the shapes and dtype of q, k and v
        With `dim_v` dv is None: it is in the first numbers of dk.
    dsinks : array of shape (heads,), accumulator dtype
        With `sinks`: this rank's share; see `RingAttention.backward`.
    dkey_bias : array of the shape of key_bias, accumulator dtype
        With `key_bias`.
    drelative : array of the shape of relative, or a tuple of such arrays, accumulator dtype
        With `relative`: this rank's share, as that of the sinks.

    Raises
    ------
    RingError
        One of its children, the same on every rank.
    """
    with RingAttention(comm, **options) as attention:
        return attention.backward_of(dout, q, k, v, out, lse, dlse=dlse, dim_v=dim_v, sinks=sinks,
                                     key_bias=key_bias, relative=relative, seed=seed)
