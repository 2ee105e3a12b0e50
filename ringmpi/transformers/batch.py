"""A batch of a model, and this rank's part of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, ShapeError
from ..layout import make
from ..torch import SequenceParallel
from .models import check_model

IGNORED = -100                # a label that no loss is made of


def shard(sequence: SequenceParallel, model: Any, *, input_ids: Tensor | None = None,
          inputs_embeds: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
          labels: Tensor | None = None, untested: bool = False) -> dict[str, Tensor]:
    """Give what a model of transformers is to be called with on this rank, of a batch that all ranks have. Local.

    Positions come with the tokens, as a model would number the tokens of a rank from 0. And labels are shifted here, by
    the order of the whole sequence: within a shard the last token has its successor on another rank, and in a striped
    layout all have. The loss of a rank is then its share: the sum over the ranks is the loss of the model.

    Parameters
    ----------
    sequence : SequenceParallel
    model : transformers.PreTrainedModel
        That is to be called: one whose sequence can be split, as `ringmpi.transformers.models` says.
    input_ids : int64 tensor of shape (batch, tokens)
        Or `inputs_embeds`, of shape (batch, tokens, hidden).
    attention_mask : tensor of shape (batch, tokens), optional
        Not 0 where there is a token, 0 where there is padding, on either side.
    position_ids : int64 tensor of shape (batch or 1, tokens), optional
        Of packed documents, say, each from 0; by default 0, 1, 2, ...
    labels : int64 tensor of shape (batch, tokens), optional
        Of a causal language model: the tokens themselves, -100 where no loss is made.
    untested : bool
        Allow a model of a kind that the tests do not compare with one process.

    Returns
    -------
    dict
        ``input_ids`` (or ``inputs_embeds``), ``position_ids``, ``attention_mask`` if one was given, and with labels
        ``shift_labels``, ``num_items_in_batch``, and ``labels`` of -100 alone: a model that does not go by the others
        has no loss, not a wrong one.

    Raises
    ------
    OptionError
        If the model can't be split, may not be without `untested`, or has no ``attn_implementation="ringmpi"``; or
        neither or both of input_ids and inputs_embeds are given.
    ShapeError
        If others do not fit, or there are fewer tokens than ranks.
    """
    check_model(model, untested)
    if (input_ids is None) == (inputs_embeds is None):
        raise OptionError("shard: expected either input_ids or inputs_embeds")
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if tokens is None or tokens.ndim < 2:
        raise ShapeError("shard: expected input_ids of shape (batch, tokens)")
    batch, length = tokens.shape[:2]
    if min(make(sequence.layout, length, sequence.size).counts) == 0:
        raise ShapeError(f"shard: expected a token for each of {sequence.size} ranks at least, got {length}")
    for name, x in (("attention_mask", attention_mask), ("position_ids", position_ids), ("labels", labels)):
        if x is not None and (x.ndim != 2 or x.shape[1] != length or x.shape[0] not in
                              ((1, batch) if name == "position_ids" else (batch,))):
            raise ShapeError(f"shard: expected {name} of shape ({batch}, {length}), got {tuple(x.shape)}")
    part = {"input_ids" if inputs_embeds is None else "inputs_embeds": sequence.shard(tokens)}
    part["position_ids"] = (sequence.positions(length)[None].to(tokens.device) if position_ids is None
                            else sequence.shard(position_ids))
    if attention_mask is not None:
        part["attention_mask"] = sequence.shard(attention_mask)
    if labels is not None:
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        part["shift_labels"] = sequence.shard(shifted)
        part["labels"] = torch.full_like(part["shift_labels"], IGNORED)
        part["num_items_in_batch"] = (shifted != IGNORED).sum()
    return part
