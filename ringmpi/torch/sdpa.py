"""Attention as torch calls it, `scaled_dot_product_attention`, over a sequence that is split over ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arrays import first_line
from ..errors import DtypeError, OptionError, RingError, ShapeError
from . import operator
from .function import ring_attention
from .sequence import CAUSAL, FULL, GIVEN, Scores, SequenceParallel, current


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                                 dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                                 enable_gqa: bool = False, *, sequence: SequenceParallel | None = None) -> Tensor:
    """Attend as `torch.nn.functional.scaled_dot_product_attention` does, over all ranks. Collective over *comm*.

    To be called within `sequence_parallel`, with this rank's tokens, by all its ranks. It is differentiable, twice on
    the host, and under ``torch.compile`` it is an operator of its own, within the graph; there once. With
    ``torch.autocast`` it computes in the dtype of that, as torch's does.

    Parameters
    ----------
    query : tensor of shape (batch, heads, n_q, dim)
        This rank's queries; any number of leading axes, none too. On CPUs tensors are read where they are: the
        ``transpose(1, 2)`` of a projection is not copied. So for `key` and `value`.
    key : tensor of shape (batch, kv_heads, n_k, dim)
    value : tensor of shape (batch, kv_heads, n_k, dim_v)
    attn_mask : None
        A mask of this rank's own tokens says too little: give ``sequence_parallel(..., mask=)`` one of ringmpi's.
    dropout_p : float
        Which weights are dropped follows from torch's generator on rank 0, whatever the number of ranks and the layout
        are.
    is_causal : bool
        Query i sees keys 0 .. i, by positions in the whole sequence. A mask of the context governs where there is one,
        and must then be causal.
    scale : float, optional
        ``1/sqrt(dim)`` by default.
    enable_gqa : bool
        Allow fewer heads of keys than of queries.
    sequence : SequenceParallel, optional
        The context, if it is not the innermost one.

    Returns
    -------
    tensor of shape (batch, heads, n_q, dim_v), dtype of `query`
        ``transpose(1, 2)`` of it is contiguous.

    Raises
    ------
    RingError
        One of its children, the same on every rank.
    """
    sequence = sequence or current()
    mask = GIVEN if sequence.mask is not None else CAUSAL if is_causal else FULL
    scores = Scores(mask)
    try:
        scores = Scores(mask, scale, float(dropout_p))
        wrong = _find_wrong(query, key, value, attn_mask, is_causal, enable_gqa, sequence)
    except (AttributeError, TypeError, ValueError) as error:
        wrong = DtypeError(f"scaled_dot_product_attention: expected tensors: {first_line(error)}")
    if wrong is not None:
        sequence.refuse(wrong, scores)
    return attend(sequence, query, key, value, scores).transpose(-3, -2)


def attend(sequence: SequenceParallel, query: Tensor, key: Tensor, value: Tensor, scores: Scores,
           sinks: Tensor | None = None) -> Tensor:
    """Attend; tensors are (..., heads, tokens, dim), the result (..., tokens, heads, dim). Collective over *comm*."""
    lead = query.shape[:-3]
    q, k, v = (_of_tokens(x) for x in autocast(query, key, value))
    # Each call drops other weights, and one that is computed once more, with the generator as it was, the same.
    drawn = torch.randint(2**63 - 1, ()) if scores.dropout else None
    if torch.compiler.is_compiling():
        trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks))
        out, _, _ = operator.attend(q, k, v, sinks, drawn, sequence.number, *scores, trains)
    else:
        seed = 0 if drawn is None else sequence.agree_on_seed(drawn)
        out = ring_attention(q, k, v, attention=sequence.attention(scores), sinks=sinks, seed=seed)
    return out.reshape(*lead, *out.shape[-3:]) if len(lead) != 1 else out


def _of_tokens(x: Tensor) -> Tensor:
    """Give (batch, tokens, heads, dim) of (..., heads, tokens, dim)."""
    return (x if x.ndim == 4 else x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])).transpose(1, 2)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as torch's own attention is cast under autocast. Local."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in tensors)


def _find_wrong(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool,
                sequence: SequenceParallel) -> RingError | None:
    """Say what a call asks for that there is not."""
    if attn_mask is not None:
        return OptionError("attn_mask: expected None, as a mask over this rank's tokens does not say what it means for "
                           "those of others; take sequence_parallel(..., mask=ringmpi.Mask(...)), by positions in the "
                           "whole sequence")
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if not (len(shapes[0]) == len(shapes[1]) == len(shapes[2]) >= 3) or not (
            shapes[0][:-3] == shapes[1][:-3] == shapes[2][:-3]):
        return ShapeError("scaled_dot_product_attention: expected query, key and value of shape (batch, heads, tokens, "
                          f"dim), of one batch, got {shapes[0]}, {shapes[1]} and {shapes[2]}")
    if query.shape[-3] != key.shape[-3] and not enable_gqa:
        return ShapeError(f"scaled_dot_product_attention: expected as many heads of key and value as of query, got "
                          f"{key.shape[-3]} and {query.shape[-3]}; say enable_gqa=True")
    masks = sequence.mask if isinstance(sequence.mask, (list, tuple)) else [sequence.mask]
    if is_causal and sequence.mask is not None and not all(getattr(mask, "causal", False) for mask in masks):
        return OptionError("is_causal: expected a mask of sequence_parallel that is causal, or none, got "
                           f"{sequence.mask!r}")
    return None
