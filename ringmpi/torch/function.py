"""Ring attention for PyTorch: differentiable by autograd, on tensors of the CPU or of a GPU, which are not copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Refused, first_line
from ..attention import RingAttention
from ..call import Direction, Inputs
from ..dtypes import BFLOAT16
from ..errors import DtypeError, OptionError, RingError
from ..keywords import explained
from ..layout import Layout
from ..mpi.comm import TIMEOUT
from ..schedules.redistribution import redistribute_with_layouts

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("ringmpi.torch needs PyTorch: pip install 'ringmpi[torch]'") from error


@torch.compiler.disable  # type: ignore[untyped-decorator]
@explained(RingAttention)
def ring_attention(q: Tensor, k: Tensor, v: Tensor | None = None, *, comm: Any = None,
                   attention: RingAttention | None = None, dim_v: int | None = None, sinks: Tensor | None = None,
                   key_bias: Tensor | None = None, relative: Tensor | Sequence[Tensor] | None = None, seed: int = 0,
                   return_lse: bool = False, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Attend, and be differentiated by autograd: by all that are tensors. Collective over *comm*.

    Forward and backward are collective: when one rank runs the backward pass all must, in the same order. So the loss
    of every rank must depend on its `out`, if only by ``0 * out.sum()``, and tensors that require a gradient must be
    there on all ranks or on none: else the call is an error. Where no rank wants those of k, v and key_bias, they cost
    nothing (on the host, and not in canonical order). ``torch.compile`` leaves the call as it is,
    between two graphs.

    On the host gradients can be differentiated once more (``torch.autograd.grad(..., create_graph=True)``), by all that
    they depend on, and ``torch.autograd.forward_ad`` gives the derivative of `out` and `lse` in a direction. These are
    collective too, and go block by block: no n x n memory, but more time than a backward pass (docs/derivatives.rst).
    On GPUs and with ``order="canonical"`` they are an error on all ranks before any block moves, and so is a third
    derivative everywhere.

    Parameters
    ----------
    q, k, v : tensors
        This rank's shards, of shapes ([batch,] n_q, heads, dim), ([batch,] n_k, kv_heads, dim) and ([batch,] n_k,
        kv_heads, dim_v), of one dtype: float64, float32, bfloat16 or float16. All on the CPU or all on one GPU.
        Torch's (heads, tokens, dim) is ``x.transpose(-3, -2)``, which CPUs read where it is; see `RingAttention`.
    comm : MPI.Intracomm
        Or `attention`.
    attention : RingAttention, optional
        Keeps its buffers and plan from call to call; for training loops. It must live until the last backward pass.
    dim_v : int, optional
        In place of `v`: values are the first `dim_v` numbers of each key, on the host. Their gradient is part of that
        of `k`.
    sinks : tensor of shape (heads,), optional
        Learned attention sinks. Their gradient is this rank's queries' share: sum it over the ranks, as that of every
        parameter that all ranks have.
    key_bias : tensor of shape ([batch,] n_k) or ([batch,] n_k, heads), optional
        Added to the scores of this rank's keys, -inf to leave one out; its gradient is whole. See `RingAttention`.
    relative : tensor of shape (heads, 2 reach + 1), or a tuple or list of one for each axis of a `Grid`, optional
        Added to the scores by the distance of query and key. Their gradient is this rank's share, as that of the sinks.
    seed : int
        Of dropout; the same on all ranks. Take another one for each layer and step, ``layer + layers * step`` say.
    return_lse : bool
        Return the log-sum-exp of the scores too, differentiable.
    **options
        With `comm`: what `RingAttention` takes, `mask`, `layout` and `dropout` for example.

    Returns
    -------
    out : tensor of shape ([batch,] n_q, heads, dim_v), dtype of `q`
        Where `q` is.
    lse : tensor of shape ([batch,] n_q, heads), accumulator dtype
        With `return_lse`.

    Raises
    ------
    RingError
        One of its children, the same on every rank; from the backward pass too.

    Examples
    --------
    ::

        with ringmpi.RingAttention(comm, mask=ringmpi.Mask(causal=True), layout="striped") as attention:
            for batch in batches:
                out = ringmpi.torch.ring_attention(q, k, v, attention=attention)
                ...
                loss.backward()
    """
    if (comm is None) == (attention is None) or (options and attention is not None):
        raise OptionError("ring_attention: expected either comm, and options, or attention, which has its own")
    several = isinstance(relative, (tuple, list))
    tables = () if relative is None else relative if several else (relative,)
    out, lse = _Attend.apply(q, k, v, sinks, key_bias, _Source(comm, attention, options), seed, dim_v,
                             torch.is_grad_enabled(), several, *tables)
    return (out, lse) if return_lse else out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def redistribute(x: Tensor, *, comm: Any, source: str | Layout = "contiguous", target: str | Layout = "striped",
                 timeout: float = TIMEOUT, gpu_transport: str = "auto") -> Tensor:
    """Move the tokens of a sharded tensor from one layout to another, differentiably. Collective over *comm*.

    Its backward pass moves the gradient back, and is collective too. ``torch.compile`` leaves the call as it is. The
    rest is as for `ringmpi.redistribute`.

    Parameters
    ----------
    x : tensor of shape (tokens, ...), any dtype, on the CPU or on a GPU
        This rank's shard, laid out as `source` says.
    comm : MPI.Intracomm
    source, target : str or Layout
    timeout : float
        Seconds to wait for the other ranks.
    gpu_transport : {"auto", "direct", "staged"}
        As of `RingAttention`.

    Returns
    -------
    tensor of shape (tokens, ...), dtype of `x`
        This rank's shard under `target`, where `x` is.

    Raises
    ------
    RingError
        One of its children, the same on every rank.
    """
    result: Tensor = _Redistribute.apply(x, comm, source, target, timeout, gpu_transport)
    return result


class _Redistribute(torch.autograd.Function):  # type: ignore[misc]
    """Redistribution as autograd knows it: linear, its adjoint is the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Any, source: str | Layout, target: str | Layout, timeout: float,
                gpu_transport: str) -> Tensor:
        """Move; keep the layouts."""
        result, old, new = redistribute_with_layouts(plain(x, "x"), comm, source, target, timeout, gpu_transport)
        ctx.comm, ctx.back = comm, (new, old, timeout, gpu_transport)
        moved = tensor_of(result)
        return moved.clone() if new == old else moved      # else it would share x's memory, untracked

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Move back."""
        return _Redistribute.apply(gradient, ctx.comm, *ctx.back), None, None, None, None, None


OF_KEYS = (1, 2, 4)           # k, v and key_bias among the arguments of `_Attend`


class _Source:
    """Where a pass gets its `RingAttention` from: the caller's, or one for this pass."""

    def __init__(self, comm: Any, attention: RingAttention | None, options: dict[str, Any]) -> None:
        self._comm, self._attention, self._options = comm, attention, options

    @contextmanager
    def open(self) -> Iterator[RingAttention]:
        """Give it, and close it if it is for this pass alone. Collective over *comm*."""
        if self._attention is not None:
            yield self._attention
        else:
            with RingAttention(self._comm, **self._options) as attention:
                yield attention


class _Attend(torch.autograd.Function):  # type: ignore[misc]
    """Attention as autograd knows it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor | None, sinks: Tensor | None, key_bias: Tensor | None,
                source: _Source, seed: int, dim_v: int | None, records: bool, several: bool, *tables: Tensor
                ) -> tuple[Tensor, Tensor]:
        """Attend; keep what the backward pass needs."""
        with source.open() as attention:
            inputs = Inputs(plain(q, "q"), plain(k, "k"), _given(v, "v"), on_host(sinks, "sinks"), seed, dim_v=dim_v,
                            key_bias=on_host(key_bias, "key_bias"), relative=_relative(tables, several))
            recorded = records and any(ctx.needs_input_grad)
            out, lse = attention._call(inputs, True, False, None, trains=recorded, recorded=recorded)
        result, log = tensor_of(out), tensor_of(lse)
        frozen = not any(ctx.needs_input_grad[place] for place in OF_KEYS)
        ctx.call = _Call(source, seed, attention._last_number, dim_v, several, frozen)
        ctx.set_materialize_grads(False)
        saved = q, k, v, sinks, key_bias, result, log, *tables
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)         # which torch lets go of when `jvp` is done
        return result, log

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate; on all ranks if on one. With create_graph the gradients know what they are made of."""
        grads = _Differentiate.apply(ctx.call, dout, dlse, *ctx.saved_tensors)
        return *grads[:5], None, None, None, None, None, *grads[5:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Differentiate in a direction."""
        direction = *tangents[:5], *tangents[10:]
        out_dot, lse_dot = _DifferentiateAlong.apply(ctx.call, len(direction), *direction, *ctx.saved_tensors)
        return out_dot, lse_dot


class _Call(NamedTuple):
    """A call of which a derivative is asked, and what it was given: arrays of tensors."""

    source: _Source
    seed: int
    number: int
    dim_v: int | None
    several: bool
    frozen: bool

    def inputs(self, q: Tensor, k: Tensor, v: Tensor | None, sinks: Tensor | None, key_bias: Tensor | None, out: Tensor,
               lse: Tensor, *tables: Tensor) -> Inputs:
        """Give what went in and came out."""
        return Inputs(plain(q, "q"), plain(k, "k"), _given(v, "v"), on_host(sinks, "sinks"), self.seed,
                      plain(out, "out"), plain(lse, "lse"), self.dim_v, on_host(key_bias, "key_bias"),
                      _relative(tables, self.several))

    def direction(self, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None, sinks_dot: Tensor | None,
                  bias_dot: Tensor | None, *tables_dot: Tensor | None) -> Direction:
        """Give a direction, of a tangent for each of what went in."""
        return Direction(_given(q_dot, "q_dot"), _given(k_dot, "k_dot"), _given(v_dot, "v_dot"),
                         on_host(sinks_dot, "sinks_dot"), on_host(bias_dot, "key_bias_dot"),
                         _relative(tables_dot, self.several, "relative_dot"))


class _Differentiate(torch.autograd.Function):  # type: ignore[misc]
    """The backward pass as autograd knows it: of what makes out and lse, and of dout and dlse."""

    @staticmethod
    def forward(ctx: Any, call: _Call, dout: Tensor | None, dlse: Tensor | None, *saved: Tensor
                ) -> tuple[Tensor | None, ...]:
        """Differentiate; give dq, dk, dv, dsinks, dkey_bias and those of the tables of a bias by distance."""
        _, _, _, sinks, key_bias, out, _, *tables = saved
        with call.source.open() as attention:
            cotangents = cotangents_of(out, dout, dlse)
            grads = attention._differentiate_call(call.number, *cotangents, call.inputs(*saved), frozen=call.frozen)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dout, dlse, *saved)
        dq, dk, dv = (None if x is None else tensor_of(x) for x in grads[:3])
        dsinks, dkey_bias = (like(getattr(grads, name), x) if hasattr(grads, name) else None
                             for name, x in (("dsinks", sinks), ("dkey_bias", key_bias)))
        of_tables = getattr(grads, "drelative", ())
        of_tables = of_tables if isinstance(of_tables, tuple) else (of_tables,)
        return dq, dk, dv, dsinks, dkey_bias, *map(like, of_tables, tables)

    @staticmethod
    def backward(ctx: Any, *direction: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate once more."""
        dout, dlse, *_ = ctx.saved_tensors
        grads = _DifferentiateTwice.apply(ctx.call, len(direction), *direction, *ctx.saved_tensors)
        by_dout, by_dlse, by_q, by_k, by_v, by_sinks, by_bias, *by_tables = grads
        return (None, by_dout if dout is not None else None, by_dlse if dlse is not None else None, by_q, by_k, by_v,
                by_sinks, by_bias, None, None, *by_tables)


class _DifferentiateTwice(torch.autograd.Function):  # type: ignore[misc]
    """The second derivative, which has none itself."""

    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        """Give the gradients by dout, dlse, q, k, v, sinks, key_bias and tables of the gradients in a direction.

        `given` are so many cotangents of the gradients, dout, dlse, and what the call saved.
        """
        dout, dlse, *saved = given[count:]
        _, _, _, sinks, key_bias, out, _, *tables = saved
        with call.source.open() as attention:
            grads = attention._differentiate_twice(call.number, *cotangents_of(out, dout, dlse),
                                                   call.direction(*given[:count]), call.inputs(*saved))
        of_tables = grads[7] if call.several else grads[7:]
        return (*(None if x is None else tensor_of(x) for x in grads[:5]),
                *(None if x is None else like(grad, x) for x, grad in zip((sinks, key_bias), grads[5:7], strict=True)),
                *map(like, of_tables, tables))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        """Refuse."""
        raise RingError("ring_attention: expected at most two derivatives, got a third, and there is none; leave out "
                        "create_graph when you ask for the second, and take torch.autograd.functional.vhp, not hvp")


class _DifferentiateAlong(torch.autograd.Function):  # type: ignore[misc]
    """The derivative in a direction, forward; it has none itself."""

    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give out_dot and lse_dot; `given` are so many tangents, and what the call saved."""
        with call.source.open() as attention:
            out_dot, lse_dot = attention._differentiate_along(
                call.number, call.direction(*given[:count]), call.inputs(*given[count:]))
        return tensor_of(out_dot), tensor_of(lse_dot)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        """Refuse."""
        raise RingError("ring_attention: expected a derivative in a direction alone, got a gradient of one; take "
                        "torch.autograd.grad twice, the first time with create_graph=True")


def cotangents_of(out: Tensor, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, Any]:
    """Give the arrays that a backward pass starts from; dout is zeros if only lse has a cotangent. Local."""
    return (torch.zeros_like(out) if dout is None else plain(dout, "dout"),
            None if dlse is None else plain(dlse, "dlse"))


def like(x: Any, given: Tensor) -> Tensor:
    """Give an array of this rank's share of a gradient as sinks, or a bias, were given."""
    return tensor_of(x).to(given.device, given.dtype)


def plain(x: Any, name: str, move: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """Give a tensor without its graph, its signs applied, moved by `move`.

    For what is no tensor, or does not let that be done, give what `as_array` refuses: on all ranks, and not on one
    while the others wait.
    """
    try:
        return move(x.detach().resolve_conj().resolve_neg())
    except Exception as error:      # noqa: BLE001 (a library may refuse by any)
        return Refused(DtypeError(f"{name}: expected a tensor, got {type(x).__name__}: {first_line(error)}"))


def _given(x: Tensor | None, name: str) -> Any:
    return None if x is None else plain(x, name)


def on_host(x: Tensor | None, name: str) -> Any:
    """Give a tensor as `plain` does, copied to the host if it is not there; None stays. Local."""
    return None if x is None else plain(x, name, lambda x: x.cpu())


def _relative(tables: Sequence[Tensor | None], several: bool, name: str = "relative") -> Any:
    """Give a bias by distance as it is given to a `RingAttention`: a table, or `several`, or none."""
    taken = tuple(on_host(table, f"{name}[{number}]" if several else name)
                  for number, table in enumerate(tables))
    return taken if several else taken[0] if taken else None


def tensor_of(x: Any) -> Tensor:
    """View an array of NumPy or CuPy as a tensor; bfloat16 by its bits, which NumPy has no name for."""
    bits = x.view(np.int16) if x.dtype == BFLOAT16 else x
    tensor = torch.from_numpy(bits) if isinstance(bits, np.ndarray) else torch.from_dlpack(bits)
    return tensor.view(torch.bfloat16) if bits is not x else tensor
