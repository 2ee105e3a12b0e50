"""The attention of transformers' models, over a sequence that is split over ranks."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import OptionError
from ..layout import resolve
from ..torch.sdpa import attend
from ..torch.sequence import Scores, SequenceParallel, current
from .cache import pending
from .masks import Integers, Said, Structure, make_mask, said_mask, structure_of

NAME = "ringmpi"
# What layers hand on that does not change what attention is, or is in the mask already.
IDLE = {"use_cache", "cache_position", "cache", "output_hidden_states", "return_dict", "num_items_in_batch",
        "shift_labels", "labels", "logits_to_keep", "output_router_logits", "position_embeddings", "sliding_window"}
FORWARDS = 8                # whose positions and masks are kept: of layers of several kinds, and of checkpoints
_kept: weakref.WeakKeyDictionary[SequenceParallel, OrderedDict[tuple[int, int, str], Known]] = (
    weakref.WeakKeyDictionary())


@dataclass(frozen=True)
class Known:
    """What the ranks know of the tokens of a forward pass, once they have told each other.

    Attributes
    ----------
    structure : Structure
    mask : int
        The number of the mask that it is, with padding and packing.
    first : int
        The position of the first token.
    replicated : bool
        Whether all ranks have the same tokens.
    plain : bool
        Whether there is neither padding nor packing.
    of : tuple
        What it was found from, which keeps its place in memory.
    """

    structure: Structure
    mask: int
    first: int
    replicated: bool
    plain: bool
    of: tuple[Any, ...]


def register() -> None:
    """Make ``attn_implementation="ringmpi"`` known to transformers. Local.

    Models of it then run within `ringmpi.torch.sequence_parallel`, each rank with its part of the tokens; `shard` gives
    what they are to be called with. Causal and bidirectional masks, windows, chunks, padding on either side and packed
    documents are taken from the model and the batch; softcap, sinks and grouped heads are too. Anything else is an
    error on all ranks.
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
    known = _find(sequence, query, attention_mask, position_ids, causal, others)
    scores = Scores(known.mask, scaling, float(dropout), softcap)
    layer = pending(key)
    if layer is not None:
        return layer.attend(query, key, value, known, scores, s_aux), None
    if known.replicated:
        sequence.refuse(OptionError("position_ids: expected those of this rank's tokens, got the same on all ranks; "
                                    "ringmpi.transformers.shard gives them, and a RingCache is for tokens that all have"))
    return attend(sequence, query, key, value, scores, s_aux), None


def _find(sequence: SequenceParallel, query: Tensor, said: Any, position_ids: Tensor | None, causal: bool,
          others: dict[str, Any]) -> Known:
    """Find out what tokens there are and what they see: once for the layers of a forward pass. Collective."""
    kept = _kept.setdefault(sequence, OrderedDict())
    key = id(said), id(position_ids), f"{causal} {others.get('sliding_window')}" if said is None else ""
    if key in kept:
        kept.move_to_end(key)
        return kept[key]
    comm = sequence._comm
    structure = Structure()
    mine = np.zeros(0, np.uint8)
    batch, length = len(query), query.shape[2]
    with comm.noting() as failures:
        structure = _structure(said, causal, others)
        if sequence.mask is not None:
            raise OptionError("sequence_parallel: expected no mask for a model of transformers, which says itself what "
                              "its tokens see")
        positions, flags = _numbers(position_ids, said, batch, length)
        head = np.array([length, len(positions), len(flags)])
        mine = np.concatenate([x.reshape(-1).view(np.uint8) for x in (head, positions, flags)])
    rows = comm.exchange("attention of transformers", sequence.timeout, mine, failures=failures,
                         options={"mask": str(structure), "batch": batch})
    found = _known(sequence, structure, rows, (said, position_ids))
    kept[key] = found
    if len(kept) > FORWARDS:
        kept.popitem(last=False)
    return found


def _structure(said: Any, causal: bool, others: dict[str, Any]) -> Structure:
    """Give what the mask is, but for padding and packing; refuse what is not known."""
    odd = [name for name, x in others.items() if name not in IDLE and x is not None and x is not False]
    if odd:
        raise OptionError(f"attention: expected nothing else that says what to attend to, got {', '.join(odd)}; "
                          f'there is no {odd[0]} with attn_implementation="{NAME}"')
    if isinstance(said, Said):
        return structure_of(said.function)
    if said is not None:
        raise OptionError(f"attention_mask: expected one of shape (batch, tokens), or none, got {type(said).__name__} "
                          f"{tuple(getattr(said, 'shape', ()))}: a mask of queries and keys is of one rank's tokens, and "
                          "does not say what those of others see")
    window = others.get("sliding_window")
    return Structure(causal, (None, None) if window is None else
                     (int(window) - 1, None) if causal else (int(window),) * 2)


def _numbers(position_ids: Tensor | None, said: Any, batch: int, length: int) -> tuple[Integers, NDArray[np.uint8]]:
    """Give the positions and the flags of this rank's tokens: (batch or 1, tokens), (batch or 0, tokens)."""
    if position_ids is None:
        raise OptionError("position_ids: expected those of this rank's tokens, got none from the model; whether it has "
                          "counted from 0 on every rank can't be seen")
    if position_ids.ndim != 2 or position_ids.shape[1] != length:
        raise OptionError(f"position_ids: expected a shape of (batch, {length}), got {tuple(position_ids.shape)}")
    positions = position_ids.detach().cpu().numpy().astype(np.int64)
    if (positions == positions[:1]).all():
        positions = positions[:1]
    padding = said.padding if isinstance(said, Said) else None
    flags = np.zeros((0, length), np.uint8)
    if padding is not None and padding.shape[1] >= length:
        flags = padding.detach()[:, -length:].cpu().numpy().astype(np.uint8)
        if padding.shape[1] > length and not padding.all():
            raise OptionError("attention_mask: expected no padding in a sequence that is in a RingCache; take elements "
                              "of one length")
    elif padding is not None:
        raise OptionError(f"attention_mask: expected a flag for each of {length} tokens, got {padding.shape[1]}")
    return positions, flags


def _known(sequence: SequenceParallel, structure: Structure, rows: list[NDArray[np.uint8]], of: tuple[Any, ...]
           ) -> Known:
    """Put together what all ranks have told. All find the same, or raise the same error."""
    numbers: list[Integers] = []
    flags: list[NDArray[np.bool_]] = []
    for row in rows:
        length, some, elements = row[:24].view(np.int64).tolist()
        end = 24 + 8 * length * some
        numbers.append(row[24:end].view(np.int64).reshape(some, length))
        flags.append(row[end:].reshape(elements, length).astype(np.bool_))
    replicated = len(rows) > 1 and numbers[0].size > 0 and all(np.array_equal(x, numbers[0]) for x in numbers)
    if not replicated:
        _check_counted(numbers)
        layout = resolve(sequence.layout, [x.shape[1] for x in numbers], "this rank's part of the batch")
        where = [layout.positions(rank) for rank in range(len(rows))]
    else:
        numbers, flags = numbers[:1], flags[:1]
        where = [np.arange(numbers[0].shape[1])]
    length = sum(map(len, where))
    positions = np.zeros((max(map(len, numbers)), length), np.int64)
    padding = np.ones((max(map(len, flags)), length), np.bool_)
    for columns, own, there in zip(where, numbers, flags, strict=True):
        positions[:, columns] = own
        if len(there):
            padding[:, columns] = there
    padded = not padding.all()
    documents = _documents(positions, padding if padded else None)
    mask = sequence.number_of(make_mask(structure, length, padding if padded else None, documents))
    return Known(structure, mask, int(positions[0, 0]) if length else 0, replicated, not padded and documents is None,
                 of)


def _check_counted(numbers: list[Integers]) -> None:
    """Refuse positions that a model has made up: each rank's tokens from 0 on."""
    some = [x for x in numbers if x.shape[1]]
    if len(some) > 1 and all((x == np.arange(x.shape[1])).all() for x in some):
        raise OptionError("position_ids: expected those in the whole sequence, got 0, 1, 2, ... on every rank, which a "
                          "model makes up if it is given none; take what ringmpi.transformers.shard gives")


def _documents(positions: Integers, padding: NDArray[np.bool_] | None) -> Integers | None:
    """Find packed documents, each of which begins at position 0; refuse positions that are not those of a sequence.

    Parameters
    ----------
    positions : int64 array of shape (batch or 1, length)
    padding : bool array of shape (batch, length), optional
        Where there is some there is one document, and positions of padding may be any.

    Returns
    -------
    int64 array of shape (batch or 1, length), or None for one document
    """
    begins = positions[:, 1:] != positions[:, :-1] + 1
    odd = begins & (positions[:, 1:] != 0) if padding is None else begins & padding[:, 1:] & padding[:, :-1]
    if odd.any():
        element, token = np.argwhere(odd)[0]
        got = positions[min(element, len(positions) - 1), token:token + 2]
        raise OptionError(f"position_ids: expected {got[0] + 1} after {got[0]} for token {token + 1} of the sequence"
                          f"{', or 0 where a document begins' if padding is None else ''}, got {got[1]}; take what "
                          "ringmpi.transformers.shard gives")
    if padding is not None or not begins.any():
        return None
    documents = np.zeros(positions.shape, np.int64)
    np.cumsum(begins, axis=1, out=documents[:, 1:])
    return documents
