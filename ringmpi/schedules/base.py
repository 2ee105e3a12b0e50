"""The contract of a carrier: which member of a group computes with which block at which step, and what travels.

A carrier yields items of work, each while the blocks of later ones are on their way. It moves bytes, and knows
neither backend nor mask: of the mask it is told which member needs which block. Members are numbered by their place in
the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..mpi.comm import Comm
from ..mpi.notices import NOTICE_TAG
from ..trace import Step, Trace
from .grid import Grid
from .group import Group
from .links import Array, Link, Shape, Transfer
from .mover import Mover
from .waits import LEAVE, PAUSE, Vote

# For each of two ways round: that many for blocks, and for gradients that are passed on; one for those that come home.
TAGS = NOTICE_TAG // 6


@dataclass(frozen=True, eq=False)
class Route:
    """Who computes with which block, and how far away that is.

    Attributes
    ----------
    needed : bool array of shape (size, size)
        ``needed[member, source]``: member computes with the block of source.
    tokens : sequence of int
        Of each member's block; where a carrier that cuts blocks shall reserve, or say its steps, before it has any.
    """

    needed: NDArray[np.bool_]
    tokens: Sequence[int] = ()

    @cached_property
    def first(self) -> list[int]:
        """For each member's block, hops downstream to the first other that computes with it; 0 if none does."""
        hops: list[int] = self._by_hop.argmax(axis=0).tolist()
        return hops

    @cached_property
    def last(self) -> list[int]:
        """For each member's block, hops downstream to the last other that computes with it; 0 if none does."""
        by_hop = self._by_hop
        hops: list[int] = np.where(by_hop.any(axis=0), len(by_hop) - 1 - by_hop[::-1].argmax(axis=0), 0).tolist()
        return hops

    @property
    def _by_hop(self) -> NDArray[np.bool_]:
        """``[hop, owner]``: the member that many hops downstream of the owner is another one and needs its block."""
        ranks = np.arange(len(self.needed))
        by_hop: NDArray[np.bool_] = self.needed[(ranks + ranks[:, None]) % len(ranks), ranks]
        by_hop[0] = False
        return by_hop


@dataclass(frozen=True, eq=False)
class Blocks:
    """A block on each member: arrays, this member's, and the shapes of all.

    Attributes
    ----------
    own : sequence of arrays
        This member's block, in the memory of the links: C-contiguous on GPUs, on the host with any gaps.
    shapes : for each member, the shapes of its arrays
        Their dtypes are the same on all.
    """

    own: Sequence[Array]
    shapes: Sequence[Sequence[Shape]]

    @cached_property
    def dtypes(self) -> list[np.dtype[Any]]:
        """Of each array."""
        return [x.dtype for x in self.own]

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Bytes of each array of each member's block."""
        return block_sizes(self.shapes, self.dtypes)


@dataclass(frozen=True)
class Work:
    """An item of work: the queries of this member with keys and values of a member.

    Attributes
    ----------
    step : Step
        Takes the figures.
    source : int
        The member whose block it is.
    arrays : tuple of arrays
        The block, valid until the next item is asked for.
    gradients : tuple of arrays
        In a backward pass, arrays to add this member's share to before the next item is asked for.
    columns : slice
        The tokens of the block that are in `arrays`, and in `gradients`.
    following : int, optional
        The `source` of this member's next item; None after the last.
    """

    step: Step
    source: int
    arrays: tuple[Array, ...]
    gradients: tuple[Array, ...]
    columns: slice
    following: int | None


class Message(NamedTuple):
    """What a member of a group sends to another in a step, in one message or several."""

    source: int
    dest: int
    owner: int                  # whose block, or the gradients of whose block
    nbytes: int
    gradients: bool = False


class Carrier(Mover):
    """What all carriers have in common; see `Mover`.

    Parameters
    ----------
    comm : Comm
    group : Group
        The members, each of which has a block.
    new_link : callable
        Makes a `Link`, of the same kind on every rank.
    clear : callable
        Fills an array with zeros.
    add : callable
        Adds the second array to the first.

    Attributes
    ----------
    stopped : bool
        Whether the last pass was left before its end, because a rank asked for it.
    """

    name = ""
    path_text = ""              # how a block reaches n other ranks, for display: "in {} hops"
    host_only = False           # whether it moves no blocks in the memory of GPUs
    in_place = False            # whether blocks are read where their owners have put them, and none is sent

    def __init__(self, comm: Comm, group: Group, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None]) -> None:
        super().__init__(comm, group)
        self.stopped = False
        self._clear = clear
        self._add = add
        self._step = Step(0, comm.rank)
        self._ask: Callable[[], int] | None = None          # what this rank asks for after the step, if it may
        self._pause: Callable[[], None] | None = None
        self._vote: Vote | None = None

    @classmethod
    def check(cls, grid: Grid, on_gpu: bool) -> None:
        """Raise `OptionError`, the same on all ranks, unless blocks can be carried so. Local.

        Parameters
        ----------
        grid : Grid
        on_gpu : bool
            Whether ranks compute on GPUs.
        """

    def connect(self) -> None:
        """Make sure that the members can reach each other. Collective over *comm*.

        Raises
        ------
        OptionError
            If some can't; the same on every rank.
        """

    def reserve(self, route: Route, sizes: Sequence[Sequence[int]],
                gradient_sizes: Sequence[Sequence[int]] | None = None) -> None:
        """Make the buffers of a pass, unless those there are large enough. Local.

        Parameters
        ----------
        route : Route
        sizes, gradient_sizes
            For each member, the bytes of the arrays of its block, and of their gradients in a backward pass.
        """
        raise NotImplementedError

    def forward(self, blocks: Blocks, route: Route, trace: Trace, stop: Callable[[], int] | None = None,
                pause: Callable[[], None] | None = None) -> Iterator[Work]:
        """Yield this member's work with every block that it needs. Collective over *comm*.

        Every rank must take all its items, or call `abandon`.

        Parameters
        ----------
        blocks : Blocks
            K and V. Not changed.
        route : Route
        trace : Trace
            A `Step` for each step is added, idle ones included.
        stop : callable, optional
            Asked once a step, when this rank has computed, on every rank or on none: True leaves the loop after the
            step, the same on all ranks. What was yielded by then has been computed everywhere, and the communicator is
            as good as before. `waits.PAUSE` goes on after a pause.
        pause : callable, optional
            Called on all ranks between two steps, if a rank has asked for a pause; it may be collective.

        Raises
        ------
        RingTimeout, RankLost
            If another rank does not send or take a block in time, or is gone. The communicator is lost then.
        """
        self._pause = pause
        if self.group.size == 1 and stop is None:
            return self._alone(blocks.own, (), route, trace)
        return self._run(blocks, None, route, trace, stop)

    def backward(self, blocks: Blocks, gradients: Blocks, route: Route, trace: Trace,
                 stop: Callable[[], int] | None = None) -> Iterator[Work]:
        """Yield this member's work with every block that it needs, and bring what is added to its gradients home.

        Collective over *comm*.

        Parameters
        ----------
        blocks, route, trace
            See `forward`.
        gradients : Blocks
            The gradient of this member's block, which the shares of all ranks are added to.
        stop : callable, optional
            See `forward`. The gradients are of no use then.

        Raises
        ------
        RingTimeout, RankLost
            See `forward`.
        """
        self._pause = None
        if self.group.size == 1 and stop is None:
            return self._alone(blocks.own, gradients.own, route, trace)
        return self._run(blocks, gradients, route, trace, stop)

    def _alone(self, own: Sequence[Array], gradients: Sequence[Array], route: Route, trace: Trace) -> Iterator[Work]:
        """Yield the work of a member that is the only one: nothing travels, whatever the carrier, nor is waited for."""
        self.stopped = False
        step = self._step = Step(0, self.group.rank, trace.now())
        trace.steps.append(step)
        self.comm.place = f", {self.name} step 0 of 1"
        if route.needed[0, 0]:
            yield Work(step, 0, tuple(own), tuple(gradients), slice(None), None)
        step.wait_start = trace.now()

    def _run(self, blocks: Blocks, gradients: Blocks | None, route: Route, trace: Trace,
             stop: Callable[[], int] | None) -> Iterator[Work]:
        """Run a pass, forward without gradients; see `forward` and `backward`."""
        raise NotImplementedError

    @staticmethod
    def steps(route: Route, sizes: Sequence[Sequence[int]],
              gradient_sizes: Sequence[Sequence[int]] | None = None) -> list[list[Message]]:
        """Say what all members send at each step, from the sizes alone. Local, and without MPI.

        Parameters
        ----------
        route : Route
        sizes, gradient_sizes
            See `reserve`.
        """
        raise NotImplementedError

    @staticmethod
    def buffer_blocks(ranks: int, on_gpu: bool) -> int:
        """Say how many blocks of K and V a rank has buffers for in a forward pass, at most. Local."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Give up what is under way, because of an error; what MPI may still write to is kept. Local."""
        super().cancel()
        self._forget()
        if self._vote:
            self.comm.keep_alive([self._vote])

    def _forget(self) -> None:
        """Let go of what the pass was about."""

    def source_of(self, number: int) -> int:
        """Give the member whose block step `number` is about: here as a ring has it, one farther upstream. Local."""
        return self.group.upstream(number)

    def _steps(self, trace: Trace, stop: Callable[[], int] | None) -> Iterator[Step]:
        """Yield one step after the other, each with the block of `source_of`; no more once a rank has asked.

        What `_wait` waits for at the end of a step includes the answer of all ranks.
        """
        size = self.group.size
        self.stopped = False
        for number in range(size):
            step = self._step = Step(number, self.group.ranks[self.source_of(number)], trace.now())
            trace.steps.append(step)
            self.comm.place = f", {self.name} step {number} of {size}"
            self._ask = stop if number < size - 1 else None
            self._vote = None
            yield step
            if self._leaves():
                self.stopped = True
                return
            if self._pause and self._vote and self._vote.says(PAUSE):
                self._pause()

    def _leaves(self) -> bool:
        """Say, after the wait at the end of a step, whether it is the last because a rank asked for that."""
        return self._vote is not None and self._vote.says(LEAVE)

    def _work(self, step: Step, route: Route, arrays: tuple[Array, ...], gradients: tuple[Array, ...]) -> Work:
        """Make the item of work of a step."""
        following = self._next_needed(route, self._sources_from(step.step + 1))
        return Work(step, self.source_of(step.step), arrays, gradients, slice(None), following)

    def _sources_from(self, number: int) -> Iterator[int]:
        """Give the members whose blocks come by from a step on, in the order in which this one computes with them."""
        return (self.source_of(hop) for hop in range(number, self.group.size))

    def _next_needed(self, route: Route, sources: Iterable[int]) -> int | None:
        """Give the first of some members whose block this one needs."""
        return next((source for source in sources if route.needed[self.group.index, source]), None)

    def _wait(self, transfers: Sequence[Transfer | Vote]) -> float:
        """Wait at the end of a step for some transfers and for the answer of all ranks; see `Mover._wait`."""
        if self._ask and not self._vote:
            self._vote = Vote(self.comm, self._ask())
        return super()._wait([*transfers, *([self._vote] if self._vote else [])])

    def _wait_to_begin(self, transfers: Sequence[Transfer]) -> float:
        """Wait for some transfers before a step's work; see `Mover._wait`."""
        return super()._wait(transfers)

    def _where(self) -> str:
        return f"{self.comm.name()}, {self.name} step {self._step.step} of {self.group.size}"


def block_sizes(shapes: Sequence[Sequence[Shape]], dtypes: Sequence[np.dtype[Any]]) -> list[list[int]]:
    """Give the bytes of each array of each member's block, from the shapes and dtypes of the arrays. Local."""
    return [[math.prod(shape) * dtype.itemsize for shape, dtype in zip(theirs, dtypes, strict=True)]
            for theirs in shapes]


def largest(sizes: Sequence[Sequence[int]]) -> int:
    """Give the bytes of the largest block of any member. Local."""
    return max(map(sum, sizes))
