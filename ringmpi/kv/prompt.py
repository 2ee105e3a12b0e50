"""Queries of which each rank has its own, a long prompt say: they attend to a cache as in a call of `RingAttention`.

The tokens of a cache lie in chunks. They are taken piece by piece, each a block for the ranks to share, and folded
into the same states one after the other; so no rank makes one array of what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays import as_array
from ..attention import RingAttention
from ..call import Array, Call, Inputs
from ..errors import OptionError, ShapeError
from ..forward import ForwardPass
from ..layout import Custom, Integers, Layout
from ..left_out import bits_of, seen_by_heads
from ..mpi.threads import check_thread
from ..plan import Plan
from ..schedules.base import Blocks, Work
from ..schedules.cost import fewest_bytes
from .core import Core
from .sizes import Sizes

PIECE_BYTES = 2**26            # of keys and values of a rank, which are on their way at a time


class Held(Custom):
    """Positions that the ranks hold of a cache: there may be holes, and more tokens will follow. Local."""

    name = "cache"
    grows = True

    def __init__(self, positions: Sequence[Integers], length: int) -> None:
        Layout.__init__(self, [len(held) for held in positions])
        self._positions = list(positions)
        self.length = length


def attend_prompt(core: Core, check_open: Callable[[], None], q: Any, brings_tokens: bool, layout: str | Layout,
                  sinks: Any, relative: Any) -> tuple[Array, Array]:
    """Attend over the positions that the ranks hold. Collective over *comm*.

    Parameters
    ----------
    core : Core
    check_open : callable
        Raises an error if the cache is closed.
    q, layout, sinks, relative
        See `KVCache.attend`.
    brings_tokens : bool
        Whether there are k and v too, which is an error.

    Returns
    -------
    out, lse : arrays
        As the caller's are.
    """
    sizes, backend, contents = core.sizes, core.backend, core.contents
    n_q, heads = 0, 0
    pieces: list[tuple[Array, ...]] = []
    with core.comm.one_call():
        check_thread()
        with core.comm.noting() as failures:
            check_open()
            if brings_tokens:
                raise OptionError("KVCache.attend: expected k and v with queries that all ranks have; append sharded "
                                  "tokens by append() first")
            shape = np.shape(as_array(q, "q"))
            if len(shape) != 3 + (sizes.batch is not None):
                raise ShapeError(f"q: expected shape ([batch,] n_q, heads, {sizes.dim}), got {shape}")
            n_q, heads = int(shape[-3]), int(shape[-2])
            pieces += contents.store.pieces(PIECE_BYTES)

        # What each rank asks, and which tokens it has in which pieces.
        mine = np.array([n_q, heads, len(pieces), *(k.shape[1] for k, *_ in pieces)], np.int64)
        rows = core.comm.exchange("KVCache.attend (sharded)", core.timeout,
                                  np.concatenate([mine, contents.store.positions]).view(np.uint8),
                                  failures=failures, options=core.options)
        numbers = [row.view(np.int64) for row in rows]
        asked = sum(int(row[0]) for row in numbers)
        heads = int(numbers[0][1])                # the same schedule on all ranks, even if they differ
        contents.check_window(asked)
        held = held_pieces([row[3 + row[2]:] for row in numbers], [row[3:3 + row[2]] for row in numbers],
                           contents.length)
        with core.comm.raise_on_all(core.timeout), backend.current():
            given = as_array(q, "q")
            query = sizes.given(sizes.check_array("q", given, backend))
            nothing = [backend.empty((batch, 0, *rest), sizes.dtype) for batch, *rest in sizes.shapes]
            if sizes.in_keys:
                nothing.pop()
            if sizes.key_bias:
                nothing.append(np.empty((len(nothing[0]), 0, sizes.key_bias), core.accumulator))
            pieces += [tuple(nothing)] * (len(held) - len(pieces))
    item, wide = sizes.dtype.itemsize, core.accumulator.itemsize
    schedule = fewest_bytes(core.comm.size, queries=asked * heads * (sizes.dim * item + (sizes.dim_v + 2) * wide),
                            keys=sum(sum(piece.counts) for piece in held) * sizes.kv_heads
                            * (sizes.dim if sizes.in_keys else sizes.dim + sizes.dim_v) * item)
    with closing(PromptAttention(core.given, layout=layout, kv_layout=held[0], schedule=schedule,
                                 **core.passed_on)) as attention:
        out, lse = attention.attend(query, [tuple(map(sizes.given, piece)) for piece in pieces], held, sinks,
                                    relative, sizes)
    with backend.current():
        return (out, lse) if not isinstance(given, np.ndarray) else (backend.to_numpy(out), backend.to_numpy(lse))


def held_pieces(positions: Sequence[Integers], sizes: Sequence[Integers], length: int) -> list[Held]:
    """Give what the ranks hold in each piece; at least one. Local.

    Parameters
    ----------
    positions : for each rank, int64 array
    sizes : for each rank, int64 array
        Tokens of each of its pieces; it may have fewer pieces than others.
    length : int
        Of the sequence.
    """
    split = [np.split(held, np.cumsum(theirs)) for held, theirs in zip(positions, sizes, strict=True)]
    most = max(1, *(len(theirs) for theirs in sizes))
    nothing = np.empty(0, np.int64)
    return [Held([parts[number] if number < len(parts) else nothing for parts in split], length)
            for number in range(most)]


class PromptAttention(RingAttention):
    """Attention to keys and values in several pieces. Collective over *comm*."""

    def attend(self, q: Any, pieces: Sequence[tuple[Array, ...]], layouts: Sequence[Layout], sinks: Any,
               relative: Any, sizes: Sizes) -> tuple[Array, Array]:
        """Attend; give `out` and `lse`. Collective over *comm*.

        Parameters
        ----------
        q, sinks, relative
            See `RingAttention.__call__`.
        pieces : sequence of tuples of arrays
            This rank's, those of `Chunk.arrays`; as many on all ranks. A bias has an axis of numbers of a key.
        layouts : sequence of Layout
            Of each piece.
        sizes : Sizes
            Of the cache.
        """
        with self._comm.one_call():
            self._last = None
            self._start()
            call: Call | None = None
            with self._comm.noting() as failures:
                k, *others = pieces[0]
                bias: Array = others.pop() if sizes.key_bias else None
                if sizes.key_bias == 1:
                    bias = bias[..., 0]
                inputs = Inputs(q, k, others[0] if others else None, sinks, key_bias=bias, relative=relative,
                                dim_v=sizes.dim_v if sizes.in_keys else None)
                call = Call.check(inputs, 0.0, self._problem.accumulator, self._problem.mask)
            call, records = self._agree(call, failures, "forward")
            plans = []
            for layout in layouts:
                self._problem = replace(self._problem, kv_layout=layout)
                plans.append(self._make_plan(records.of_keys(layout.counts)))
            if self.backend.device:
                with self._comm.raise_on_all(self.timeout), self.backend.current():
                    call.to_device(self.backend, plans[0].accumulator)
            run = PromptPass(call, list(zip(plans, pieces, layouts, strict=True)), self._engine, self.trace)
            out, lse = run.forward()
            return call.given(out), call.given(lse)


class PromptPass(ForwardPass):
    """A forward pass over several pieces, one after the other."""

    def __init__(self, call: Call, pieces: Sequence[tuple[Plan, tuple[Array, ...], Layout]], engine: Any,
                 trace: Any) -> None:
        super().__init__(call, pieces[0][0], engine, trace, None)
        self._pieces = pieces

    def _find_seen(self) -> None:
        """Find which rows see a key of any piece that the bias of their head does not leave out."""
        call = self.call
        call.seen = ()
        if call.key_bias is None or call.sinks is not None:
            return
        for plan, (*_, bias), layout in self._pieces:
            bits = self.engine.share(bits_of(bias if call.batched else bias[None]))
            found = seen_by_heads(plan, layout, bits, call.key_bias.shape[2])
            call.seen = [some | more for some, more in zip(call.seen or found, found, strict=True)]

    def _works(self, keys: Sequence[Array]) -> Iterator[Work]:
        """Yield the work with every block of every piece; `keys` are those of the first, and where they should be."""
        first = self.plan
        for number, (plan, piece, _) in enumerate(self._pieces):
            self.plan = plan
            if number:
                keys = [x if self.call.batched else x[None] for x in piece]
                keys = [self.backend.to_device(x) for x in keys] if self.backend.device else keys
            yield from self._carry(Blocks(keys, plan.shapes))
        self.plan = first
