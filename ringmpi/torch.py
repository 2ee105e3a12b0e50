"""Ring attention for PyTorch: differentiable by autograd, on tensors of the CPU or of a GPU, which are not copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .arrays import Refused, first_line
from .attention import RingAttention
from .call import Inputs
from .dtypes import BFLOAT16
from .errors import DtypeError, OptionError, RingError
from .keywords import explained
from .layout import Layout
from .mpi.comm import TIMEOUT
from .schedules.redistribution import redistribute_with_layouts

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("ringmpi.torch needs PyTorch: pip install 'ringmpi[torch]'") from error


@torch.compiler.disable  # type: ignore[untyped-decorator]
@explained(RingAttention)
def ring_attention(q: Tensor, k: Tensor, v: Tensor, *, comm: Any = None, attention: RingAttention | None = None,
                   sinks: Tensor | None = None, key_bias: Tensor | None = None, seed: int = 0,
                   return_lse: bool = False, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Attend, and be differentiated by autograd: by `q`, `k`, `v`, `sinks` and `key_bias`. Collective over *comm*.

    Forward and backward are collective: when one rank runs the backward pass all must, in the same order. So the loss
    of every rank must depend on its `out`, if only by ``0 * out.sum()``. A second derivative is not there, and asking
    for one is an error. ``torch.compile`` leaves the call as it is, between two graphs.

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
    sinks : tensor of shape (heads,), optional
        Learned attention sinks. Their gradient is this rank's queries' share: sum it over the ranks, as that of every
        parameter that all ranks have.
    key_bias : tensor of shape ([batch,] n_k) or ([batch,] n_k, heads), optional
        Added to the scores of this rank's keys, -inf to leave one out; its gradient is whole. See `RingAttention`.
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
    out, lse = _Attend.apply(q, k, v, sinks, key_bias, _Source(comm, attention, options), seed, torch.is_grad_enabled())
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
        result, old, new = redistribute_with_layouts(_plain(x, "x"), comm, source, target, timeout, gpu_transport)
        ctx.comm, ctx.back = comm, (new, old, timeout, gpu_transport)
        moved = _tensor(result)
        return moved.clone() if new == old else moved      # else it would share x's memory, untracked

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Move back."""
        return _Redistribute.apply(gradient, ctx.comm, *ctx.back), None, None, None, None, None


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
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_bias: Tensor | None,
                source: _Source, seed: int, records: bool) -> tuple[Tensor, Tensor]:
        """Attend; keep what the backward pass needs."""
        with source.open() as attention:
            inputs = Inputs(_plain(q, "q"), _plain(k, "k"), _plain(v, "v"), _on_host(sinks, "sinks"), seed,
                            key_bias=_on_host(key_bias, "key_bias"))
            out, lse = attention._call(inputs, True, False, None, trains=records and any(ctx.needs_input_grad))
        result, log = _tensor(out), _tensor(lse)
        ctx.source, ctx.seed, ctx.number = source, seed, attention._last_number
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, key_bias, result, log)
        return result, log

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate; on all ranks if on one."""
        if torch.is_grad_enabled():           # create_graph: what follows would count as constant
            raise RingError("ring_attention: there is no second derivative; leave out create_graph")
        q, k, v, sinks, key_bias, out, lse = ctx.saved_tensors
        with ctx.source.open() as attention:
            inputs = Inputs(_plain(q, "q"), _plain(k, "k"), _plain(v, "v"), _on_host(sinks, "sinks"), ctx.seed,
                            _plain(out, "out"), _plain(lse, "lse"), _on_host(key_bias, "key_bias"))
            dout = torch.zeros_like(out) if dout is None else _plain(dout, "dout")
            dlse = None if dlse is None else _plain(dlse, "dlse")
            grads = attention._differentiate_call(ctx.number, dout, dlse, inputs)
        dq, dk, dv = (_tensor(x) for x in grads[:3])
        dsinks, dkey_bias = (None if x is None else _tensor(getattr(grads, name)).to(x.device, x.dtype)
                             for name, x in (("dsinks", sinks), ("dkey_bias", key_bias)))
        return dq, dk, dv, dsinks, dkey_bias, None, None, None


def _plain(x: Any, name: str, move: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """Give a tensor without its graph, its signs applied, moved by `move`.

    For what is no tensor, or does not let that be done, give what `as_array` refuses: on all ranks, and not on one
    while the others wait.
    """
    try:
        return move(x.detach().resolve_conj().resolve_neg())
    except Exception as error:      # noqa: BLE001 (a library may refuse by any)
        return Refused(DtypeError(f"{name}: expected a tensor, got {type(x).__name__}: {first_line(error)}"))


def _on_host(x: Tensor | None, name: str) -> Any:
    return None if x is None else _plain(x, name, lambda x: x.cpu())


def _tensor(x: Any) -> Tensor:
    """View an array of NumPy or CuPy as a tensor; bfloat16 by its bits, which NumPy has no name for."""
    bits = x.view(np.int16) if x.dtype == BFLOAT16 else x
    tensor = torch.from_numpy(bits) if isinstance(bits, np.ndarray) else torch.from_dlpack(bits)
    return tensor.view(torch.bfloat16) if bits is not x else tensor
