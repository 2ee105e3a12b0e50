"""The window: ranks of one node read each other's blocks in memory that they share, and no block is sent.

Each rank puts its own block there, and says so to the ranks that need it; each that has read it says so to the owner,
who may overwrite it then. In a backward pass ranks add to the owner's gradients where they are, one after the other:
the turn goes from each to the next, in the order of a ring, so the result does not depend on who is late. What is said
are messages of a few bytes, so a wait says for whom.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..errors import OptionError
from ..mpi.comm import Comm
from ..trace import Step, Trace
from .base import TAGS, Blocks, Carrier, Message, Route, Work
from .grid import Grid
from .group import Group
from .links import Array, HostLink, Link, Transfer, assign, views
from .shared_memory import HANDLE_SHAPE, PAGE, Segment, Windows

OWN_LIMITS = errno.EMFILE, errno.ENFILE, errno.ENOMEM
HANDLE = [HANDLE_SHAPE], [np.dtype(np.uint64)]
HANDLE_BYTES = 8 * HANDLE_SHAPE[0]


class Window(Carrier):
    """Blocks that are read where their owners have put them; see `Carrier`. For ranks of one node, and host memory."""

    name = "window"
    path_text = "read in place by {} ranks"
    host_only = True
    in_place = True

    def __init__(self, comm: Comm, group: Group, new_link: Callable[[], Link], clear: Callable[[Array], None],
                 add: Callable[[Array, Array], None]) -> None:
        super().__init__(comm, group, new_link, clear, add)
        self._there = HostLink()              # says whose block is there, and where
        self._turns = HostLink()              # passes the turn to add to the gradients of a block
        self._read = HostLink()               # says that a block has been read
        self._segment: Segment | None = None
        self._windows = Windows()

    def _forget(self) -> None:
        self._segment = None
        self._windows = Windows()

    @property
    def links(self) -> list[Link]:
        """Every link that may have something under way."""
        return [self._there, self._turns, self._read]

    @classmethod
    def check(cls, grid: Grid, on_gpu: bool) -> None:
        """Raise `OptionError` unless the ranks that share keys are on one node, and compute on CPUs. Local."""
        other = f"{grid.schedule.with_carrier('ring')} would do"
        if on_gpu:
            raise OptionError(f"schedule {grid.schedule}: expected arrays in host memory and ranks that compute on "
                              f"CPUs, got GPUs; {other}")
        for rank in range(grid.schedule.ranks):
            ranks = grid.group("keys", rank).ranks
            nodes = len({grid.nodes[member] for member in ranks})
            if nodes > 1:
                raise OptionError(f"schedule {grid.schedule}: expected the ranks that share keys to be on one node, "
                                  f"got ranks {', '.join(map(str, sorted(ranks)))} on {nodes} nodes; {other}")

    def connect(self) -> None:
        """Make sure that the members can open each other's memory. Collective over *comm*.

        Raises
        ------
        OptionError
            If some can't; the same on every rank.
        """
        if self.group.size == 1:
            return
        segment, handle = None, np.zeros(HANDLE_BYTES, np.uint8)
        with self.comm.noting() as failures, self._explained("share memory"):
            segment = Segment()
            segment.reserve(1)
            handle = segment.handle().view(np.uint8)
        handles = self.comm.exchange("", self.timeout, handle, failures=failures)
        with self.comm.raise_on_all(self.timeout):
            for rank in self.group.ranks:
                with self._explained(f"open the memory of rank {rank}"):
                    Windows().memory(rank, handles[rank].view(np.uint64))

    def reserve(self, route: Route, sizes: Sequence[Sequence[int]],
                gradient_sizes: Sequence[Sequence[int]] | None = None) -> None:
        """Make shared memory for what others need of this member; see `Carrier.reserve`. Local."""
        size, index = self.group.size, self.group.index
        if size == 1:
            return
        if self._users(route, index):
            self._segment = self._segment or Segment()
            self._segment.reserve(_gradients_at(sizes[index]) + (sum(gradient_sizes[index]) if gradient_sizes else 0))
        self._there.reserve([HANDLE_BYTES] * size)
        self._turns.reserve([1] * size)
        self._read.reserve([1] * size)

    def _run(self, blocks: Blocks, gradients: Blocks | None, route: Route, trace: Trace,
             stop: Callable[[], int] | None) -> Iterator[Work]:
        group = self.group
        needed = route.needed[group.index]

        # Begin: this member's block where others read it; all that is to be heard of the others' blocks.
        self.reserve(route, blocks.sizes, gradients.sizes if gradients else None)
        self._windows.keep([rank for rank, wanted in zip(group.ranks, needed, strict=True) if wanted])
        shared = self._put(blocks, gradients, route)
        there = self._announce(route)

        for step in self._steps(trace, stop):
            number, source, following = step.step, group.upstream(step.step), group.upstream(step.step + 1)
            self._expect_reader(step, route)
            if number == 0 and needed[source]:
                yield self._work(step, route, tuple(blocks.own), shared)
            elif needed[source]:
                yield self._work(step, route, *self._views(source, blocks, gradients))

            # First what others wait for, once it is known whether all leave; then the next block, and the turn.
            step.wait_start = trace.now()
            step.wait_seconds = self._wait([]) if stop else 0.0
            if number and needed[source]:
                self._say_read(step, source)
            awaited: list[Transfer] = [there[following]] if following in there and number + 1 < group.size else []
            if gradients and not self._leaves():
                self._pass_turn_on(step, route)
                awaited += self._expect_turn(number + 1, route, before=number + 1)
            step.wait_seconds += self._wait(awaited)

        # Nobody reads or adds any more. A turn that was given for a step that nobody comes to is taken, and of no use.
        if gradients and self.stopped:
            for hop in range(step.step + 1, group.size):
                self._expect_turn(hop, route, before=step.step)
        step.wait_seconds += self._wait([transfer for link in self.links for transfer in link.transfers])
        for link in self.links:
            link.end_step()
        if gradients and self._users(route, group.index):
            for x, y in zip(gradients.own, shared, strict=True):
                assign(x, y)

    def _put(self, blocks: Blocks, gradients: Blocks | None, route: Route) -> tuple[Array, ...]:
        """Copy this member's block, and its gradients so far, to where others reach them; give the gradients there."""
        index = self.group.index
        if self._segment is None or not self._users(route, index):
            return tuple(gradients.own) if gradients else ()
        memory = self._segment.memory
        for x, y in zip(views(memory, blocks.shapes[index], blocks.dtypes), blocks.own, strict=True):
            assign(x, y)
        if gradients is None:
            return ()
        shared = views(memory[_gradients_at(blocks.sizes[index]):], gradients.shapes[index], gradients.dtypes)
        for x, y in zip(shared, gradients.own, strict=True):
            assign(x, y)
        return shared

    def _views(self, source: int, blocks: Blocks, gradients: Blocks | None) -> tuple[tuple[Array, ...], ...]:
        """Give the block of another member where it is, and its gradients."""
        memory = self._memory(source)
        arrays = views(memory, blocks.shapes[source], blocks.dtypes)
        if gradients is None:
            return arrays, ()
        start = _gradients_at(blocks.sizes[source])
        return arrays, views(memory[start:], gradients.shapes[source], gradients.dtypes)

    def _memory(self, source: int) -> Array:
        """Give the shared memory of another member; wait for word of it if that is gone."""
        rank = self.group.ranks[source]
        handle, = self._there.views(source, *HANDLE)
        try:
            return self._windows.memory(rank, handle)
        except OSError as error:
            if error.errno not in OWN_LIMITS:          # it has given up, or ended: it could be opened when we connected
                self.comm.wait([], self.timeout,
                               lambda: f"{self._where()}: waited for rank {rank}, whose shared memory is gone,",
                               lambda: False, lambda: [rank])
            raise

    def _announce(self, route: Route) -> dict[int, Transfer]:
        """Say to all that need it that this member's block is there; give what is to be heard of others."""
        group, link = self.group, self._there
        if self._segment is not None:
            handle, = link.views(group.index, *HANDLE)
            handle[:] = self._segment.handle()
        there = {}
        for hop in range(1, group.size):
            source, dest = group.upstream(hop), group.downstream(hop)
            if route.needed[group.index, source]:
                link.receive(source, [HANDLE_BYTES],
                             self._peer("Irecv", source, 0, "for rank {} to have its block there"))
                there[source] = link.incoming[-1]
            if route.needed[dest, group.index]:
                link.send(group.index, [HANDLE_BYTES],
                          self._peer("Isend", dest, 0, "for rank {} to hear that a block is there"), written=True)
        return there

    def _expect_reader(self, step: Step, route: Route) -> None:
        """Ask to hear when a member has read this one's block, in the step in which it does."""
        reader = self.group.downstream(step.step)
        if step.step and route.needed[reader, self.group.index]:
            self._read.receive(reader, [1], self._peer("Irecv", reader, 2 * TAGS, "for rank {} to have read a block"))

    def _say_read(self, step: Step, source: int) -> None:
        """Say that this member has read a block, and added to its gradients."""
        taker = self._peer("Isend", source, 2 * TAGS, "for rank {} to hear that its block has been read")
        self._read.send(self.group.index, [1], taker, written=True)

    def _expect_turn(self, hop: int, route: Route, before: int) -> list[Transfer]:
        """Ask for the turn to add to the gradients of a step's block; give what is to be waited for.

        Only if who gives it has done so, or will, at the end of a step before another.
        """
        group = self.group
        source = group.upstream(hop)
        if hop == group.size or not route.needed[group.index, source]:
            return []
        earlier = [user for user in self._users(route, source) if (user - source) % group.size < hop]
        giver = earlier[-1] if earlier else source
        if (giver - source) % group.size >= before:
            return []
        what = f"for rank {{}} to have added to the gradients of rank {group.ranks[source]}'s block"
        self._turns.receive(hop, [1], self._peer("Irecv", giver, TAGS + hop % TAGS, what))
        return [self._turns.incoming[-1]]

    def _pass_turn_on(self, step: Step, route: Route) -> None:
        """Let the next member that needs this step's block add to its gradients."""
        group, number = self.group, step.step
        source = group.upstream(number)
        if number and not route.needed[group.index, source]:
            return
        later = [user for user in self._users(route, source) if (user - source) % group.size > number]
        if later:
            hop = (later[0] - source) % group.size
            taker = self._peer("Isend", later[0], TAGS + hop % TAGS, "for rank {} to take its turn")
            self._turns.send(0, [1], taker, written=True)

    def _users(self, route: Route, owner: int) -> list[int]:
        """Give the other members that need a member's block, in the order of the steps."""
        size = self.group.size
        users = ((owner + hop) % size for hop in range(1, size))
        return [user for user in users if route.needed[user, owner]]

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn an error of the system into one that says what would do."""
        try:
            yield
        except OSError as error:
            raise OptionError(f"carrier window: this rank can't {what} ({error}); the ring would do") from error

    @staticmethod
    def steps(route: Route, sizes: Sequence[Sequence[int]],
              gradient_sizes: Sequence[Sequence[int]] | None = None) -> list[list[Message]]:
        """Say that no blocks are sent; see `Carrier.steps`. Local, and without MPI."""
        return [[] for _ in sizes]

    @staticmethod
    def buffer_blocks(ranks: int, on_gpu: bool) -> int:
        """Say how many blocks of K and V a rank has buffers for in a forward pass, at most. Local."""
        return int(ranks > 1)


def _gradients_at(sizes: Sequence[int]) -> int:
    """Say where in shared memory the gradients of a block of so many bytes begin: on a page of their own."""
    return -(-sum(sizes) // PAGE) * PAGE
