"""Ring attention for JAX: under ``jit`` and ``grad``, on the CPU.

A call is a primitive with an ordered effect: XLA calls back into Python, once each time and in the order of the
program, whether somebody uses the result or not. That is what keeps the ranks together: none may leave out, repeat or
exchange calls that the others make. JAX's own callbacks will not do: those that are ordered are refused within
derivatives, and the others may be dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .attention import RingAttention
from .call import Inputs
from .errors import BackendError, DtypeError, OptionError
from .keywords import explained

try:
    import jax
    import jax.numpy as jnp
    from jax import Array
    from jax._src import effects
    from jax.core import ShapedArray
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir
    REGISTRIES = (effects.lowerable_effects, effects.ordered_effects, effects.control_flow_allowed_effects,
                  effects.custom_derivatives_allowed_effects, effects.remat_allowed_effects)
except (ImportError, AttributeError) as error:
    raise ImportError(f"ringmpi.jax needs JAX 0.10, as pip install 'ringmpi[jax]' gives it: {error}") from error


class _Collective(effects.Effect):  # type: ignore[misc]
    """That all ranks make the same calls, in the same order."""

    def __str__(self) -> str:
        return "ringmpi"


_EFFECT = _Collective()
for _registry in REGISTRIES:
    _registry.add_type(_Collective)


@dataclass(frozen=True, eq=False)
class _Way:
    """Where a call goes: the caller's object, or what one is to be made of for the call."""

    attention: RingAttention | None
    comm: Any
    options: dict[str, Any]

    def sums(self, dtype: Any) -> Any:
        """Give the dtype of sums."""
        wished = self.options.get("accumulator") if self.attention is None else self.attention._problem.accumulator
        return np.dtype(np.float64 if dtype == np.float64 else wished or np.float32)

    def forward(self, trains: bool, given: tuple[bool, bool], *arrays: Any) -> tuple[Any, ...]:
        """Attend: out, lse, and the number of the call."""
        with _opened(self) as attention:
            out, lse = attention._call(_inputs(given, arrays), True, False, None, trains=trains)
            return out, lse, np.array(attention._last_number, np.int32)

    def backward(self, given: tuple[bool, bool], dout: Any, dlse: Any, out: Any, lse: Any, number: Any, *arrays: Any
                 ) -> tuple[Any, ...]:
        """Differentiate: dq, dk, dv, and the gradients of what is there of sinks and key_bias."""
        inputs = _inputs(given, arrays)._replace(out=out, lse=lse)
        with _opened(self) as attention:
            grads = attention._differentiate_call(int(number), dout, dlse, inputs)
        return *grads[:3], *(np.asarray(x, y.dtype) for x, y in zip(grads[3:], arrays[4:], strict=True))


class _opened:
    """Give the caller's object, or one for a block."""

    def __init__(self, way: _Way) -> None:
        self._own = None if way.attention is not None else RingAttention(way.comm, **way.options)
        self._attention = way.attention or self._own

    def __enter__(self) -> RingAttention:
        return self._attention  # type: ignore[return-value]

    def __exit__(self, *error: object) -> None:
        if self._own is not None:
            self._own.close()


def _inputs(given: tuple[bool, bool], arrays: tuple[Any, ...]) -> Inputs:
    """Give what a call takes of its operands: q, k, v, the seed, and what is there of sinks and key_bias."""
    q, k, v, seed, *others = arrays
    sinks, key_bias = (others.pop(0) if there else None for there in given)
    return Inputs(q, k, v, sinks, int(seed), key_bias=key_bias)


# Calls `function(*operands)` on the host, with the operands where they are; parameters: function, and results, what it
# gives.
_callback = Primitive("ringmpi")
_callback.multiple_results = True


@_callback.def_impl  # type: ignore[untyped-decorator]
def _(*operands: Any, function: Any, results: tuple[Any, ...]) -> Any:
    jax.effects_barrier()                     # what is on its way on threads of XLA comes first, on all ranks
    return [jnp.asarray(x) for x in function(*map(np.asarray, operands))]


@_callback.def_effectful_abstract_eval  # type: ignore[untyped-decorator]
def _(*operands: Any, function: Any, results: tuple[Any, ...]) -> tuple[Any, set[Any]]:
    return results, {_EFFECT}


def _lower(ctx: Any, *operands: Any, function: Any, results: tuple[Any, ...]) -> Any:
    """Emit the call back, between the token of the call before and that of the next."""
    given, token, _ = mlir.emit_python_callback(
        ctx, lambda *arrays: tuple(map(np.asarray, function(*map(np.asarray, arrays)))), ctx.tokens_in.get(_EFFECT),
        list(operands), ctx.avals_in, ctx.avals_out, has_side_effect=True, returns_token=True)
    ctx.set_tokens_out(ctx.tokens_in.update_tokens(mlir.TokenSet({_EFFECT: token})))
    return given


def _refuse_batching(*_: Any, **__: Any) -> None:
    raise OptionError("ringmpi.jax.ring_attention: expected no vmap, as ranks make one call and not many; give the "
                      "arrays a batch axis, (batch, tokens, heads, dim)")


def _refuse_derivatives(*_: Any, **__: Any) -> None:
    raise OptionError("ringmpi.jax.ring_attention: expected one derivative, in reverse mode, got another; "
                      "ringmpi.RingAttention.jvp and ringmpi.torch have those")


mlir.register_lowering(_callback, _lower, platform="cpu", cacheable=False)
batching.primitive_batchers[_callback] = _refuse_batching
ad.primitive_jvps[_callback] = _refuse_derivatives


@explained(RingAttention)
def ring_attention(q: Array, k: Array, v: Array, *, attention: RingAttention | None = None, comm: Any = None,
                   sinks: Array | None = None, key_bias: Array | None = None, seed: Any = 0, return_lse: bool = False,
                   **options: Any) -> Array | tuple[Array, Array]:
    """Attend, within ``jax.jit`` or not, and be differentiated by ``jax.grad``. Collective over *comm*.

    All ranks make the same calls in the same order, the backward pass of ``grad`` is one too, and none of them is left
    out or exchanged with another by the compiler, even if a rank does not use what it gives. They run where XLA calls
    back, on threads of its own: MPI must have been initialised with ``MPI_THREAD_SERIALIZED`` or more, as mpi4py does.
    Wait for results (``jax.block_until_ready``) before the program makes MPI calls of its own.

    JAX copies operands and results once each, which is little beside what is computed with them. An error of a call is
    on all ranks; of one within ``jit`` it is JAX's own, with ours in its text.

    Parameters
    ----------
    q, k, v : arrays of shape ([batch,] n_q, heads, dim), ([batch,] n_k, kv_heads, dim), ([batch,] n_k, kv_heads, dim_v)
        This rank's shards, of one dtype: float64 (with ``jax_enable_x64``), float32, bfloat16 or float16, on the CPU.
    attention : RingAttention, optional
        Keeps its buffers and plan from call to call; it must live as long as what is compiled with it.
    comm : MPI.Intracomm, optional
        Without `attention`: each call makes an object of its own.
    sinks : array of shape (heads,), optional
        See `RingAttention.__call__`; its gradient is this rank's share, to be summed over the ranks.
    key_bias : array of shape ([batch,] n_k) or ([batch,] n_k, heads), optional
        See `RingAttention.__call__`.
    seed : int or integer array
        Of dropout, ``0 <= seed < 2**32``; it may be traced.
    return_lse : bool
        Return the log-sum-exp of the scores too, differentiable.
    **options
        With `comm`: what `RingAttention` takes.

    Returns
    -------
    out : array of shape ([batch,] n_q, heads, dim_v), dtype of `q`
    lse : array of shape ([batch,] n_q, heads), accumulator dtype
        With `return_lse`.

    Raises
    ------
    OptionError, DtypeError
        Where it is traced: for what this rank asks for. What ranks must agree on is found where it runs.

    Examples
    --------
    ::

        with ringmpi.RingAttention(comm, mask=ringmpi.Mask(causal=True)) as attention:
            @jax.jit
            def loss(q, k, v):
                return (ringmpi.jax.ring_attention(q, k, v, attention=attention) ** 2).sum()
            dq, dk, dv = jax.grad(loss, (0, 1, 2))(q, k, v)
    """
    if (comm is None) == (attention is None) or (options and attention is not None):
        raise OptionError("ring_attention: expected either comm, and options, or attention, which has its own")
    way = _Way(attention, comm, options)
    arrays = [jnp.asarray(x) for x in (q, k, v)]
    if way.sums(arrays[0].dtype) == np.float64 and not jax.config.jax_enable_x64:
        raise DtypeError("ring_attention: expected jax_enable_x64 for an accumulator of float64, as JAX has no lse of "
                         'that dtype without; jax.config.update("jax_enable_x64", True)')
    if jax.default_backend() != "cpu" and any(_platforms(x) - {"cpu"} for x in arrays):
        raise BackendError("ring_attention: expected arrays on the CPU; on a GPU take ringmpi.ring_attention outside "
                           "jit, which reads JAX's arrays where they are")
    out, lse = _attend(way, *arrays, _optional(sinks), _optional(key_bias), _seed(seed))
    return (out, lse) if return_lse else out


def _seed(seed: Any) -> Array:
    """Give the seed as JAX has one: 32 bits."""
    if not isinstance(seed, jax.core.Tracer):
        number = np.asarray(seed)
        if number.ndim or number.dtype.kind not in "iu" or not 0 <= number < 2**32:
            raise OptionError(f"seed: expected an integer, 0 <= seed < 2**32, got {seed!r}")
        return jnp.asarray(number.astype(np.uint32))
    if seed.ndim or seed.dtype.kind not in "iu":
        raise OptionError(f"seed: expected an integer, got {seed.dtype} of shape {seed.shape}")
    return seed.astype(jnp.uint32)


def _optional(x: Any) -> Any:
    return None if x is None else jnp.asarray(x)


def _platforms(x: Array) -> set[str]:
    """Give where an array is; nothing of one that is traced."""
    return set() if isinstance(x, jax.core.Tracer) else {device.platform for device in x.devices()}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(way: _Way, q: Array, k: Array, v: Array, sinks: Array | None, key_bias: Array | None, seed: Array) -> Any:
    out, lse, _ = _forward(way, False, q, k, v, sinks, key_bias, seed)
    return out, lse


def _forward(way: _Way, trains: bool, q: Array, k: Array, v: Array, sinks: Array | None, key_bias: Array | None,
             seed: Array) -> Any:
    given = sinks is not None, key_bias is not None
    results = (ShapedArray((*q.shape[:-1], v.shape[-1]), q.dtype), ShapedArray(q.shape[:-1], way.sums(q.dtype)),
               ShapedArray((), np.dtype(np.int32)))
    operands = [x for x in (q, k, v, seed, sinks, key_bias) if x is not None]
    return _callback.bind(*operands, function=partial(way.forward, trains, given), results=results)


def _keep(way: _Way, *operands: Any) -> Any:
    out, lse, number = _forward(way, True, *operands)
    return (out, lse), (*operands, out, lse, number)


def _differentiate(way: _Way, kept: Any, cotangents: Any) -> Any:
    q, k, v, sinks, key_bias, seed, out, lse, number = kept
    dout, dlse = cotangents
    given = sinks is not None, key_bias is not None
    inputs = [x for x in (q, k, v, seed, sinks, key_bias) if x is not None]
    differentiated = [x for x in (q, k, v, sinks, key_bias) if x is not None]
    grads = _callback.bind(dout, dlse, out, lse, number, *inputs, function=partial(way.backward, given),
                           results=tuple(ShapedArray(x.shape, x.dtype) for x in differentiated))
    dq, dk, dv, *others = grads
    dsinks, dkey_bias = (others.pop(0) if there else None for there in given)
    return dq, dk, dv, dsinks, dkey_bias, np.zeros(seed.shape, jax.dtypes.float0)


_attend.defvjp(_keep, _differentiate)
