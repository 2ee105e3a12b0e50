"""Tokens for heads and back: ranks that share heads have a part of the tokens outside, and of the heads inside.

DeepSpeed-Ulysses (Jacobs et al. 2023). Inside, the tokens of the members come one after the other, as the members do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..trace import Trace
from .grid import HeadShare
from .group_exchange import GroupExchange
from .links import Array, assign

Empty = Callable[[tuple[int, ...], Any], Array]
Place = Callable[[Array, slice, Array], None]


class Tokens(NamedTuple):
    """The tokens and heads of an array, as they are dealt out among the ranks that share heads.

    Attributes
    ----------
    counts : sequence of int
        Tokens that each member has outside.
    parts : for each member, slices of the heads
        That it has inside, one after the other; several members may have a head.
    """

    counts: Sequence[int]
    parts: Sequence[Sequence[slice]]

    @classmethod
    def of_queries(cls, counts: Sequence[int], shares: Sequence[HeadShare]) -> Tokens:
        """Give those of queries. Local."""
        return cls(counts, [[share.queries] for share in shares])

    @classmethod
    def of_keys(cls, counts: Sequence[int], shares: Sequence[HeadShare]) -> Tokens:
        """Give those of keys and values. Local."""
        return cls(counts, [share.keys for share in shares])

    @classmethod
    def of_bias(cls, counts: Sequence[int], shares: Sequence[HeadShare], numbers: int) -> Tokens:
        """Give those of a bias of the keys: so many numbers for each, 1 or as many as heads of the queries. Local."""
        return cls(counts, [[share.queries if numbers > 1 else slice(0, 1)] for share in shares])

    @property
    def repeats(self) -> bool:
        """Whether a head is inside with several members, or several times."""
        parts = [part for theirs in self.parts for part in theirs]
        return int(sum(part.stop - part.start for part in parts)) > int(max(part.stop for part in parts))

    def rows(self, member: int) -> slice:
        """Say where a member's tokens are inside. Local."""
        start = sum(self.counts[:member])
        return slice(start, start + self.counts[member])

    def heads(self, member: int) -> int:
        """Say how many heads a member has inside. Local."""
        return sum(part.stop - part.start for part in self.parts[member])


class HeadExchange(GroupExchange):
    """An exchange of tokens for heads, or back, among the ranks that share heads; see `GroupExchange`."""

    def to_heads(self, what: str, given: Sequence[tuple[Array, Tokens]], empty: Empty, trace: Trace) -> list[Array]:
        """Give away heads for tokens. Collective over the group.

        Parameters
        ----------
        what : str
            Is exchanged.
        given : sequence of (array of shape (batch, n, heads, ...), Tokens)
            This rank's tokens, all heads.
        empty : callable
            Makes an array of a shape and a dtype where the arrays are.
        trace : Trace

        Returns
        -------
        list of arrays of shape (batch, all tokens, heads of this rank, ...)
            Those given themselves, if this rank shares heads with no other.
        """
        if self.group.size == 1:
            return [x for x, _ in given]
        index = self.group.index
        outgoing = [[x[:, :, part] for x, tokens in given for part in tokens.parts[member]]
                    for member in range(self.group.size)]
        incoming = [[((len(x), tokens.counts[member], part.stop - part.start, *x.shape[3:]), x.dtype)
                     for x, tokens in given for part in tokens.parts[index]] for member in range(self.group.size)]
        self.start(what, outgoing, incoming, trace)
        inside = [empty((len(x), sum(tokens.counts), tokens.heads(index), *x.shape[3:]), x.dtype)
                  for x, tokens in given]
        for member in (index, *self.others):
            pieces = iter(outgoing[index] if member == index else self.take(member))
            for target, (_, tokens) in zip(inside, given, strict=True):
                first = 0
                for piece in itertools.islice(pieces, len(tokens.parts[index])):
                    assign(target[:, tokens.rows(member), first:first + piece.shape[2]], piece)
                    first += piece.shape[2]
        self.end()
        return inside

    def to_tokens(self, what: str, given: Sequence[tuple[Array, Tokens]], targets: Sequence[tuple[Array, Place]],
                  trace: Trace) -> None:
        """Give away tokens for heads. Collective over the group.

        Parameters
        ----------
        what, trace
            See `to_heads`.
        given : sequence of (array of shape (batch, all tokens, heads of this rank, ...), Tokens)
        targets : sequence of (array of shape (batch, n, heads, ...), callable)
            Take this rank's tokens, all heads; the callable is given the array, a slice of the heads and what a member
            has of them, and puts it there, or adds it.
        """
        index = self.group.index
        outgoing = [[x[:, tokens.rows(member)] for x, tokens in given] for member in range(self.group.size)]
        incoming = [[((len(x), tokens.counts[index], tokens.heads(member), *x.shape[3:]), x.dtype)
                     for x, tokens in given] for member in range(self.group.size)]
        self.start(what, outgoing, incoming, trace)
        for member in (index, *self.others):
            pieces = outgoing[index] if member == index else self.take(member)
            for (target, place), piece, (_, tokens) in zip(targets, pieces, given, strict=True):
                first = 0
                for part in tokens.parts[member]:
                    stop = first + part.stop - part.start
                    place(target, part, piece[:, :, first:stop])
                    first = stop
        self.end()
