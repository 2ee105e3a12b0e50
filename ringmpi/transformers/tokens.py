"""The tokens of a forward pass, of which each rank has some: their positions, and what they see."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import OptionError, RingError
from ..layout import resolve
from ..torch import SequenceParallel
from .masks import Integers, Said, Structure, make_mask, structure_of

# What layers hand on that does not change what attention is, or is in the mask already.
IDLE = {"use_cache", "cache_position", "cache", "output_hidden_states", "return_dict", "num_items_in_batch",
        "shift_labels", "labels", "logits_to_keep", "position_embeddings", "sliding_window"}
FORWARDS = 8                # of which what is known is kept: layers see other masks, and some are computed once more
_kept: weakref.WeakKeyDictionary[SequenceParallel, OrderedDict[tuple[Any, ...], Known]] = (
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


def known_tokens(sequence: SequenceParallel, query: Tensor, said: Any, position_ids: Tensor | None, causal: bool,
                 others: dict[str, Any]) -> Known:
    """Find out what tokens there are and what they see: once for the layers of a forward pass. Collective over *comm*.

    Parameters
    ----------
    sequence : SequenceParallel
    query : tensor of shape (batch, heads, n_q, dim)
    said : Said, optional
        What the model says of its mask.
    position_ids : int64 tensor of shape (batch or 1, n_q)
    causal : bool
        Whether the layer is, if nothing is said.
    others : mapping
        What else it hands on.

    Raises
    ------
    OptionError, MaskError, ShapeError
        The same on every rank.
    """
    kept = _kept.setdefault(sequence, OrderedDict())
    wrong: RingError | None = None
    odd = [name for name, x in others.items() if name not in IDLE and x is not None and x is not False]
    if odd:
        wrong = OptionError('attention: expected nothing that attn_implementation="ringmpi" does not know, got '
                            f"{', '.join(odd)} from the model")
    key = (id(said), id(position_ids), None if position_ids is None else position_ids._version,      # if written to
           f"{causal} {others.get('sliding_window')}" if said is None else "")
    if key in kept:
        if wrong:
            sequence.refuse(wrong)
        kept.move_to_end(key)
        return kept[key]
    comm = sequence.private
    structure = Structure()
    padded: bool | None = None
    mine = np.zeros(0, np.uint8)
    batch, length = len(query), query.shape[2]
    with comm.noting() as failures:
        if wrong:
            raise wrong
        structure = _structure(said, causal, others)
        if sequence.mask is not None:
            raise OptionError("sequence_parallel: expected no mask for a model of transformers, which says itself what "
                              "its tokens see")
        positions, flags = _numbers(position_ids, said, batch, length)
        head = np.array([length, len(positions), len(flags)])
        padded = bool(len(flags)) if length else None
        mine = np.concatenate([x.reshape(-1).view(np.uint8) for x in (head, positions, flags)])
    rows = comm.exchange("attention of transformers", sequence.timeout, mine, failures=failures,
                         options={"mask": str(structure), "batch": batch, "attention_mask is given": padded})
    found = _known(sequence, structure, rows, (said, position_ids))
    kept[key] = found
    if len(kept) > FORWARDS:
        kept.popitem(last=False)
    return found


def _structure(said: Any, causal: bool, others: dict[str, Any]) -> Structure:
    """Give what the mask is, but for padding and packing."""
    if isinstance(said, Said):
        return structure_of(said.function)
    if said is not None:
        raise OptionError(f"attention_mask: expected one of shape (batch, tokens), or none, got {type(said).__name__} "
                          f"{tuple(getattr(said, 'shape', ()))}: a mask of queries and keys is of one rank's tokens, "
                          "and does not say what those of others see")
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
                          "model makes up if it is given none; take what ringmpi.transformers.shard gives (for "
                          "documents that end just where shards do, in another layout)")


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
