"""The attention of transformers' models, over a sequence that is split over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..torch.sdpa import attend, autocast
from ..torch.sequence import Scores, current
from .cache import pending
from .masks import Said, said_mask
from .models import NAME
from .tokens import known_tokens


def register() -> None:
    """Make ``attn_implementation="ringmpi"`` known to transformers. Local.

    Models of it then run within `ringmpi.torch.sequence_parallel`, each rank with its part of the tokens; `shard` gives
    what they are to be called with. Causal and bidirectional masks, windows, chunks, padding on either side and packed
    documents are taken from the model and the batch; softcap, sinks and grouped heads are too. Anything else that a
    layer says is an error on all ranks; what layers do not say is for `shard` to look at, which gets the model.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    AttentionInterface.register(NAME, ring_attention_forward)
    AttentionMaskInterface.register(NAME, said_mask)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def ring_attention_forward(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
                           attention_mask: Said | Tensor | None, dropout: float = 0.0, scaling: float | None = None,
                           is_causal: bool | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
                           position_ids: Tensor | None = None, **others: Any) -> tuple[Tensor, None]:
    """Attend, as a layer of transformers asks for it. Collective over the communicator of the context.

    Parameters
    ----------
    module : torch.nn.Module
        The layer.
    query : tensor of shape (batch, heads, n_q, dim)
    key, value : tensors of shape (batch, kv_heads, n_k, dim) and (batch, kv_heads, n_k, dim_v)
    attention_mask : Said, optional
    dropout, scaling, is_causal, softcap
        See `ringmpi.torch.scaled_dot_product_attention` and `RingAttention`.
    s_aux : tensor of shape (heads,), optional
        Sinks.
    position_ids : int64 tensor of shape (batch or 1, n_q)
        Of this rank's tokens in their sequence, by which what the model has done with them is checked.

    Returns
    -------
    tensor of shape (batch, n_q, heads, dim_v), None
    """
    sequence = current()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    known = known_tokens(sequence, query, attention_mask, position_ids, causal, others)
    scores = Scores(known.mask, scaling, float(dropout), softcap)
    layer = pending(key)
    query, key, value = autocast(query, key, value)
    if layer is not None:
        return layer.attend(query, key, value, known, scores, s_aux), None
    if key.shape[2] != query.shape[2] or (known.plain and known.first):
        sequence.refuse(OptionError("expected the keys of a sequence from its first token on, or a RingCache, got "
                                    f"{key.shape[2]} keys for {query.shape[2]} queries from position {known.first} on: "
                                    "transformers' own caches have those of this rank alone"))
    if known.replicated:
        sequence.refuse(OptionError("position_ids: expected those of this rank's tokens, got the same on all ranks, "
                                    "which a model makes up if it is given none; take what ringmpi.transformers.shard "
                                    "gives, or a RingCache for tokens that all ranks have"))
    return attend(sequence, query, key, value, scores, s_aux), None
