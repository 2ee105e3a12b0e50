"""Where each rank stands in a grid of heads x queries x keys ranks, and which heads it has there."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .group import Group
from .spec import Schedule

AXES = ("heads", "queries", "keys")


@dataclass(frozen=True)
class Grid:
    """A schedule's grid on the ranks of a communicator. Local.

    Ranks are placed in the order of their nodes, whatever numbers the launcher has dealt: along the first of `axes`
    neighbours are next to each other. Those that share heads are placed by their numbers, so that their tokens are in
    order.

    Parameters
    ----------
    schedule : Schedule
    nodes : tuple of int
        For each rank, a number of the node that it is on.
    axes : tuple of str
        The three axes; the one along which most bytes move first.
    """

    schedule: Schedule
    nodes: tuple[int, ...]
    axes: tuple[str, ...] = ("heads", "keys", "queries")
    _places: dict[int, dict[str, int]] = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.schedule, self.nodes, self.axes)))       # every call asks for it
        order = sorted(range(len(self.nodes)), key=lambda rank: (self.nodes[rank], rank))
        axes = tuple(reversed(self.axes))
        sizes = [range(getattr(self.schedule, axis)) for axis in axes]
        shared: dict[tuple[int, int], list[int]] = {}           # ranks by their place on the other axes
        for rank, at in zip(order, itertools.product(*sizes), strict=True):
            place = dict(zip(axes, at, strict=True))
            shared.setdefault((place["queries"], place["keys"]), []).append(rank)
        object.__setattr__(self, "_places", {
            rank: {"heads": heads, "queries": queries, "keys": keys}
            for (queries, keys), ranks in shared.items() for heads, rank in enumerate(sorted(ranks))})

    def __hash__(self) -> int:
        return self._hash

    def ranks(self) -> NDArray[np.int64]:
        """Give all ranks by their places, ``[heads, queries, keys]``. Local."""
        ranks = np.empty([getattr(self.schedule, axis) for axis in AXES], np.int64)
        for rank, place in self._places.items():
            ranks[place["heads"], place["queries"], place["keys"]] = rank
        return ranks

    def group(self, axis: str, rank: int) -> Group:
        """Give the ranks that differ from `rank` in their place on one axis only, in the order of the places. Local."""
        mine = self._places[rank]
        members = [other for other, place in self._places.items()
                   if all(place[name] == mine[name] for name in AXES if name != axis)]
        return Group(tuple(sorted(members, key=lambda other: self._places[other][axis])), rank)


@dataclass(frozen=True)
class HeadShare:
    """The heads that one of the ranks has which share them.

    Attributes
    ----------
    queries : slice
        Of the query heads.
    keys : list of slice
        Of the heads of keys and values, one slice after the other; where query heads of several ranks use a head, or
        the groups of query heads do not end where the shares do, a head is in several.
    """

    queries: slice
    keys: list[slice]

    @property
    def heads(self) -> int:
        """How many query heads."""
        return int(self.queries.stop - self.queries.start)

    @property
    def kv_heads(self) -> int:
        """How many heads of keys and values."""
        return sum(part.stop - part.start for part in self.keys)


def share_heads(heads: int, kv_heads: int, ranks: int) -> list[HeadShare]:
    """Deal out heads to the ranks that share them, with the heads of keys that go with them. Local.

    Each has ``heads / ranks``, next to each other. Within a share, equally many query heads use each head of the keys.
    """
    each, group = heads // ranks, heads // kv_heads
    step = math.gcd(each, group)
    shares = []
    for first in range(0, heads, each):
        used = [head // group for head in range(first, first + each, step)]
        cuts = [0, *(i for i in range(1, len(used)) if used[i] != used[i - 1] + 1), len(used)]
        shares.append(HeadShare(slice(first, first + each),
                                [slice(used[a], used[b - 1] + 1) for a, b in itertools.pairwise(cuts)]))
    return shares
