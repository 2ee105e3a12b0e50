"""Which axis of a dataset is which: files have theirs in any order, arrays of ringmpi have tokens first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError, ShapeError

IN_MEMORY = ("tokens", "batch", "heads", "dim")
HIDDEN = "hidden"              # heads and dim as one axis, the numbers of a head side by side
OTHERS = len(IN_MEMORY)        # axes of other names come last, in their own order
USUAL = ("tokens", "heads", "dim")
LABELS = {"tokens": "token", "batch": "batch", "heads": "head", "dim": "dim", HIDDEN: HIDDEN}

Array = NDArray[Any]


@dataclass(frozen=True)
class Axes:
    """The axes of a dataset, in its order; rows in memory are (tokens, [batch,] heads, dim), as far as it has these.

    Parameters
    ----------
    names : tuple of str
        Of tokens, batch, heads and dim; hidden is heads and dim as one axis.
    """

    names: tuple[str, ...] = USUAL

    @classmethod
    def parse(cls, text: str | None, heads: int | None = None) -> Axes:
        """Read the axes of q, k and v: ``"batch,heads,tokens,dim"``; without a text (tokens, heads, dim). Local.

        Parameters
        ----------
        text : str, optional
        heads : int, optional
            How many there are of queries in a hidden axis; without a text the axes are (tokens, hidden) then.

        Raises
        ------
        OptionError
            If they are none, or heads are given where the axes say how many there are, or the other way round.
        """
        if text is None:
            return cls(USUAL if heads is None else ("tokens", HIDDEN))
        names = tuple(text.split(","))
        parts = [part for name in names for part in (("heads", "dim") if name == HIDDEN else (name,))]
        if sorted(parts) not in (sorted(USUAL), sorted(IN_MEMORY)):
            raise OptionError(f"axes: expected an order of tokens, heads and dim, or of batch too, or with hidden in "
                              f"place of heads and dim (tokens,hidden), got {text!r}")
        if (HIDDEN in names) != (heads is not None):
            raise OptionError(f"axes: expected --heads N with hidden, and only then: the number of query heads in it, "
                              f"got {text!r} {'without' if heads is None else f'and --heads {heads}'}")
        return cls(names)

    def __str__(self) -> str:
        return ",".join(self.names)

    @classmethod
    def plain(cls, ndim: int) -> Axes:
        """Give the axes of rows that are in a file as they are in memory, whatever they are. Local."""
        return cls(("tokens", *map(str, range(1, ndim))))

    @property
    def tokens(self) -> int:
        """Which axis is that of the tokens."""
        return self.names.index("tokens")

    @property
    def in_memory(self) -> tuple[str, ...]:
        """What the axes of rows in memory are."""
        return tuple(sorted(self._parts, key=lambda name: IN_MEMORY.index(name) if name in IN_MEMORY else OTHERS))

    @property
    def as_in_memory(self) -> bool:
        """Whether the numbers of rows are in the file in the order that they have in memory."""
        return self._parts == self.in_memory

    @property
    def labels(self) -> tuple[str, ...]:
        """What people call the axes, each by a singular."""
        return tuple(LABELS[name] for name in self.names)

    def without(self, *names: str) -> Axes:
        """Give the axes that are left without some of those in memory."""
        if HIDDEN in self.names and {"heads", "dim"} & set(names):
            return Axes(self._parts).without(*names)
        return Axes(tuple(name for name in self.names if name not in names))

    def shape_in_memory(self, shape: Sequence[int], heads: int = 0) -> tuple[int, ...]:
        """Give the shape in memory of all tokens of a dataset; of a hidden axis it is said how many heads it has."""
        sizes = dict(zip(self.names, shape, strict=True))
        if HIDDEN in sizes:
            if heads < 1 or sizes[HIDDEN] % heads:
                raise ShapeError(f"expected a hidden axis of {heads} heads, got {sizes[HIDDEN]} numbers")
            sizes |= {"heads": heads, "dim": sizes[HIDDEN] // heads}
        return tuple(sizes[name] for name in self.in_memory)

    def shape_in_file(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Give the shape of a dataset for rows of a shape in memory."""
        sizes = dict(zip(self.in_memory, shape, strict=True))
        sizes[HIDDEN] = sizes.get("heads", 0) * sizes.get("dim", 0)
        return tuple(sizes[name] for name in self.names)

    def start_of(self, token: int, element: int = 0) -> list[int]:
        """Give where the rows from a token on begin in a dataset, or those of an element of the batch."""
        places = {"tokens": token, "batch": element}
        return [places.get(name, 0) for name in self.names]

    def to_file(self, rows: Array) -> Array:
        """Give rows in the order of the file, C-contiguous; `rows` themselves if they are."""
        order = [self.in_memory.index(name) for name in self._parts]
        return np.ascontiguousarray(rows.transpose(order)).reshape(self.shape_in_file(rows.shape))

    def from_file(self, box: Array, rows: Array) -> None:
        """Copy what was read in the order of the file into rows, bit for bit."""
        order = [self.in_memory.index(name) for name in self._parts]
        bits = f"u{rows.dtype.itemsize}"
        view = rows.view(bits).transpose(order)
        view[...] = box.view(bits).reshape(view.shape)

    @property
    def _parts(self) -> tuple[str, ...]:
        """The axes in the file's order, hidden taken apart."""
        return tuple(part for name in self.names for part in (("heads", "dim") if name == HIDDEN else (name,)))


def axes_of_results(axes: Axes) -> dict[str, Axes]:
    """Give the axes of `out` and `lse` for queries of these axes. Local."""
    return {"out": axes, "lse": axes.without("dim")}


def axes_said(content: Mapping[str, Any]) -> Axes:
    """Read the axes of `out` that a file says of itself; those of an older version say none. Local.

    Raises
    ------
    ValueError
        If they are none.
    """
    names = content.get("axes", USUAL)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError("its axes have no names")
    return Axes.parse(",".join(names), 1 if HIDDEN in names else None)
