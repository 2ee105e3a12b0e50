"""Attention as an operator of torch, `ringmpi::attend`, which graphs of `torch.compile` contain whole.

An operator takes tensors and plain values, so it names its context by a number. It has one derivative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..call import Inputs
from .function import cotangents_of, like, on_host, plain, tensor_of
from .sequence import Scores, by_number

NUMBER, SEED = range(2)                    # facts of a call that its backward pass needs


@torch.library.custom_op("ringmpi::attend", mutates_args=())  # type: ignore[untyped-decorator]
def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, drawn: Tensor | None, sequence: int, mask: int,
           scale: float | None, dropout: float, softcap: float | None, trains: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attend: out, lse and facts for the backward pass. Collective over the context's communicator.

    Parameters
    ----------
    q, k, v : tensors of shape (batch, n_q, heads, dim), (batch, n_k, kv_heads, dim), (batch, n_k, kv_heads, dim_v)
    sinks : tensor of shape (heads,), optional
    drawn : int64 tensor of shape (), optional
        What this rank has drawn for dropout: in the graph, so that each call has a number of its own.
    sequence : int
        The number of the `SequenceParallel`.
    mask, scale, dropout, softcap
        See `Scores`.
    trains : bool
        Whether there will be a backward pass.
    """
    context = by_number(sequence)
    attention = context.attention(Scores(mask, scale, dropout, softcap))
    seed = 0 if drawn is None else context.agree_on_seed(drawn)
    inputs = Inputs(plain(q, "q"), plain(k, "k"), plain(v, "v"), on_host(sinks, "sinks"), seed)
    out, lse = attention._call(inputs, True, False, None, trains=trains, recorded=trains)
    return tensor_of(out), tensor_of(lse), torch.from_numpy(np.array([attention._last_number, seed]))


@attend.register_fake  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, drawn: Tensor | None, sequence: int, mask: int,
      scale: float | None, dropout: float, softcap: float | None, trains: bool) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.float64 if q.dtype == torch.float64 else by_number(sequence).sums
    return (q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=sums),
            torch.empty(2, dtype=torch.int64))


@torch.library.custom_op("ringmpi::attend_backward", mutates_args=())  # type: ignore[untyped-decorator]
def attend_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
                    out: Tensor, lse: Tensor, facts: Tensor, sequence: int, mask: int, scale: float | None,
                    dropout: float, softcap: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate: dq, dk, dv, and dsinks, which is empty without sinks. Collective over the same communicator."""
    attention = by_number(sequence).attention(Scores(mask, scale, dropout, softcap))
    number, seed = facts.tolist()
    inputs = Inputs(plain(q, "q"), plain(k, "k"), plain(v, "v"), on_host(sinks, "sinks"), seed, plain(out, "out"),
                    plain(lse, "lse"))
    grads = attention._differentiate_call(number, *cotangents_of(out, dout, dlse), inputs)
    dq, dk, dv = (tensor_of(x) for x in grads[:3])
    return dq, dk, dv, q.new_empty(0) if sinks is None else like(grads[-1], sinks)


@attend_backward.register_fake  # type: ignore[untyped-decorator]
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor,
      lse: Tensor, facts: Tensor, sequence: int, mask: int, scale: float | None, dropout: float,
      softcap: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape),
            q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward pass needs."""
    q, k, v, sinks, _, *ctx.numbers, _ = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate; on all ranks if on one."""
    q, k, v, sinks, out, lse, facts = ctx.saved_tensors
    dq, dk, dv, dsinks = attend_backward(dout, dlse, q, k, v, sinks, out, lse, facts, *ctx.numbers)
    return dq, dk, dv, None if sinks is None else dsinks, *[None] * 7


attend.register_autograd(_differentiate, setup_context=_keep)
