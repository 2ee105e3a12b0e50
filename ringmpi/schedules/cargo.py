"""What goes one way round a ring: each member's block, or some columns of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Blocks, block_sizes
from .links import Array, Link, Shape


@dataclass(frozen=True, eq=False)
class Cargo:
    """Blocks, or some columns of each, as they are cut into messages.

    Attributes
    ----------
    own : sequence of C-contiguous arrays
        What this member has of it. One after the other they hold what arrays of `shapes` hold.
    sizes : for each member, the bytes of its arrays
        Of those that `own` are on that member.
    shapes : for each member, the shapes of its arrays
        As somebody computes with them.
    dtypes : sequence of dtype
        Of those.
    """

    own: Sequence[Array]
    sizes: Sequence[Sequence[int]]
    shapes: Sequence[Sequence[Shape]]
    dtypes: Sequence[np.dtype[Any]]

    @classmethod
    def whole(cls, blocks: Blocks) -> Cargo:
        """Take blocks as they are. Local."""
        return cls(blocks.own, blocks.sizes, blocks.shapes, blocks.dtypes)

    @classmethod
    def some(cls, blocks: Blocks, index: int, columns: Sequence[slice]) -> Cargo:
        """Take some columns of each member's block; an element of a batch is an array of its own. Local.

        Parameters
        ----------
        blocks : Blocks
        index : int
            The number of this member.
        columns : sequence of slice
            For each member.
        """
        own = [x[:, columns[index]] for x in blocks.own]
        shapes = [[(shape[0], part.stop - part.start, *shape[2:]) for shape in theirs]
                  for theirs, part in zip(blocks.shapes, columns, strict=True)]
        elements = [[shape[1:] for shape in theirs for _ in range(shape[0])] for theirs in shapes]
        pieces = [x[i] for x in own for i in range(len(x))]
        return cls(pieces, block_sizes(elements, [x.dtype for x in pieces]), shapes, blocks.dtypes)

    def reversed(self) -> Cargo:
        """Give the same for a group of the same ranks in the opposite order. Local."""
        return Cargo(self.own, self.sizes[::-1], self.shapes[::-1], self.dtypes)

    def views(self, link: Link, number: int, member: int) -> tuple[Array, ...]:
        """View what is in a slot as arrays of a member. Local."""
        return link.views(number, self.shapes[member], self.dtypes)


NOTHING = Cargo((), (), (), ())


def halves(tokens: Sequence[int]) -> tuple[list[slice], list[slice]]:
    """Cut the columns of each member's block into two halves, the first the longer one. Local."""
    cuts = [math.ceil(n / 2) for n in tokens]
    return [slice(0, cut) for cut in cuts], [slice(cut, n) for cut, n in zip(cuts, tokens, strict=True)]
