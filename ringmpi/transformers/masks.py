"""What a model of transformers says of its mask, and the mask of ringmpi that means the same.

transformers hands a function of four indices to whoever makes masks. It is put together of few functions of its own,
which are known here by their names and by what they close over; one that is not may mean anything, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ..errors import MaskError
from ..mask import Mask
from ..mask_base import BaseMask

MODULE = "transformers.masking_utils"
Integers = NDArray[np.int64]


class Structure(NamedTuple):
    """What a mask's function says, but for padding and packing, which are seen by flags and positions.

    Attributes
    ----------
    causal : bool
    window : (int or None, int or None)
        Keys before and after a query; None: any.
    chunk : int
        Tokens of a chunk, of which queries see their own alone; 0: there are none.
    """

    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    chunk: int = 0


@dataclass(eq=False)
class Said:
    """What a model says of its mask; it goes through the model in place of a tensor.

    Attributes
    ----------
    function : callable
        Of transformers: (batch, head, query, key) -> bool.
    padding : bool tensor of shape (batch, tokens), optional
        True where there is a token.
    """

    function: Callable[..., Any]
    padding: Tensor | None


def said_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
              mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None,
              **others: Any) -> Said:
    """Take what a model says of its mask; transformers calls it. Local."""
    return Said(mask_function, attention_mask)


def structure_of(function: Callable[..., Any]) -> Structure:
    """Recognise a mask's function. Local.

    Raises
    ------
    MaskError
        If it says what is not known here.
    """
    name = getattr(function, "__qualname__", repr(function)).replace(".<locals>", "")
    inside = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()),
                      strict=True)) if hasattr(function, "__code__") else {}
    if getattr(function, "__module__", "") == MODULE:
        if name == "causal_mask_function":
            return Structure(causal=True)
        if name in ("bidirectional_mask_function", "packed_sequence_mask_function.inner_mask"):
            return Structure()
        if name == "remap_positions_for_packed_sequence.inner_mask":
            return structure_of(inside["mask_function"])
        if name == "sliding_window_overlay.inner_mask":
            return Structure(window=(int(inside["sliding_window"]) - 1, None))
        if name == "sliding_window_bidirectional_overlay.inner_mask":
            return Structure(window=(int(inside["sliding_window"]),) * 2)
        if name == "chunked_overlay.inner_mask":
            return Structure(chunk=int(inside["chunk_size"]))
        if name == "and_masks.and_mask":
            return _all(list(map(structure_of, inside["mask_functions"])))
    raise MaskError("attention_mask: expected a causal or bidirectional mask, with a window, chunks, padding or packed "
                    f"documents, got one by {getattr(function, '__module__', '?')}.{name}, whose meaning is not known "
                    "here: what it shows to tokens of other ranks can't be said")


def _all(structures: Sequence[Structure]) -> Structure:
    """Give what holds if all of them do."""
    whole = Structure()
    for one in structures:
        window = tuple(b if a is None else a if b is None else min(a, b)
                       for a, b in zip(whole.window, one.window, strict=True))
        if whole.chunk and one.chunk and whole.chunk != one.chunk:
            raise MaskError(f"attention_mask: expected one size of chunks, got {whole.chunk} and {one.chunk}")
        whole = Structure(whole.causal or one.causal, (window[0], window[1]), whole.chunk or one.chunk)
    return whole


def make_mask(structure: Structure, length: int, padding: NDArray[np.bool_] | None, documents: Integers | None
              ) -> BaseMask | list[Mask] | None:
    """Make the mask of a whole sequence. Local.

    Parameters
    ----------
    structure : Structure
    length : int
        Tokens.
    padding : bool array of shape (batch, length), optional
        True where there is a token.
    documents : int64 array of shape (batch or 1, length), optional
        The number of each token's document.

    Returns
    -------
    Mask, or a list with one for each element of the batch, or None
    """
    causal, window, chunk = structure
    if documents is not None and (chunk or padding is not None):
        raise MaskError(f"attention_mask: expected {'chunks' if chunk else 'padding'} or packed documents, got both")
    plain = Mask(causal=causal, window=None if window == (None, None) else window)
    if padding is None and documents is None and not chunk:
        return None if plain == Mask() else plain
    if padding is None:
        padding = np.ones((1 if documents is None else len(documents), length), np.bool_)
    masks: list[Mask] = []
    for element, there in enumerate(padding):
        one: dict[str, Any] = {} if there.all() else {"key_mask": there}
        if documents is not None:
            one["document_ids"] = documents[element]
        if chunk:
            first = int(there.argmax())                     # behind what is padded on the left
            one["document_ids"] = (np.arange(length) - first) // chunk + -(-first // chunk)
        masks.append(replace(plain, **one))
    return masks[0] if all(mask == masks[0] for mask in masks) else masks
