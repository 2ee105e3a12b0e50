"""A mask for each element of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike

from .errors import MaskError, OptionError
from .intervals import Interval
from .mask_base import BaseMask


class BatchMask(BaseMask):
    """A mask for each element of a batch; what a list of masks becomes. Local.

    Parameters
    ----------
    masks : sequence of BaseMask
        Those that are equal are computed together.

    Raises
    ------
    OptionError
        If something in it is no mask, or is itself one for each element.
    """

    def __init__(self, masks: Sequence[BaseMask]) -> None:
        for number, mask in enumerate(masks):
            if not isinstance(mask, BaseMask):
                raise OptionError(f"mask: expected a mask for each element of the batch, got {mask!r} for element "
                                  f"{number}")
            if mask.per_element:
                raise OptionError("mask: expected a mask for one element of the batch, got one for several for element "
                                  f"{number}; keys= is a number there")
        self._size = len(masks)
        self._elements: dict[BaseMask, list[int]] = {}
        for number, mask in enumerate(masks):
            self._elements.setdefault(mask, []).append(number)

    def describe(self) -> dict[str, Any]:
        """Give the options of each mask, and the elements that have it. Local."""
        return {"masks": [{**mask.describe(), "elements": list(numbers)} for mask, numbers in self._elements.items()]}

    def check(self, n_q: int, n_k: int) -> None:
        """Raise `MaskError` unless the masks fit so many queries and keys. Local."""
        for mask, numbers in self._elements.items():
            try:
                mask.check(n_q, n_k)
            except MaskError as error:
                raise MaskError(f"{error} [element {numbers[0]} of the batch]") from None

    def check_batch(self, batch: int | None) -> None:
        """Raise `MaskError` unless there are as many masks as elements. Local."""
        if batch != self._size:
            raise MaskError(f"mask: expected a mask for each element of the batch, got {self._size} masks and "
                            f"{'arrays without a batch axis' if batch is None else f'a batch of {batch}'}")

    @property
    def most(self) -> int:
        """How many intervals a query has at most."""
        return max((mask.most for mask in self._elements), default=1)

    @property
    def per_element(self) -> bool:
        """Whether elements of a batch have masks of their own."""
        return True

    def of_elements(self, batch: int) -> list[tuple[BaseMask, Sequence[int]]]:
        """Give the masks, and which elements each is for. Local."""
        return list(self._elements.items())

    def farthest(self, n_q: int, n_k: int) -> int:
        """Give a number that no position is beyond. Local."""
        return max((mask.farthest(n_q, n_k) for mask in self._elements), default=0)

    def bounds(self, queries: ArrayLike, n_q: int, n_k: int) -> list[Interval]:
        """Not there: each mask has its own; see `of_elements`."""
        raise NotImplementedError("a mask for each element has no intervals of its own")
