"""The forward pass of a call: heads and queries are exchanged, blocks come by, a backend computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from .backends.base import Ended
from .call import Array, Call
from .engine import Engine
from .left_out import bits_of, seen_by_heads
from .plan import Plan
from .replicated import Replicated, arrays_of, combine_parts, part_of
from .schedules.base import Blocks, Work, block_sizes
from .schedules.links import assign
from .softmax import State
from .tiles import KeyPlan, TablePlan
from .trace import Trace

Progress = Callable[[int, int], object]
FEW_ROWS = 128          # for one head of the keys; computing with fewer takes as long as reading keys and values


class ForwardPass:
    """A forward pass of a call, and what every pass does. Collective over the engine's communicator.

    Parameters
    ----------
    call : Call
    plan : Plan
    engine : Engine
    trace : Trace
        Takes the figures.
    progress : callable, optional
        Called with the visible pairs done since the last time, and with all there are.
    """

    def __init__(self, call: Call, plan: Plan, engine: Engine, trace: Trace, progress: Progress | None) -> None:
        self.call = call
        self.plan = plan
        self.engine = engine
        self.backend = engine.backend
        self.movers = engine.movers(plan.grid)     # kept: if a callback closes the object, others must hear of an error
        self.trace = trace
        self._progress = progress
        self._pairs = plan.pairs                   # that there are to do

    def forward(self) -> tuple[Array, Array]:
        """Attend; give `out` and `lse` with a batch axis, where the caller's arrays are."""
        self._prepare_pass("forward")
        with self.backend.current():
            with self._abandoned_on_error():
                self._find_seen()
                own = self._bring_home(self._fold())
            return self._results(own)

    def _results(self, own: Sequence[State]) -> tuple[Array, Array]:
        """Make results of the states that this rank finishes, where the caller's arrays are."""
        call = self.call
        with self.agreed_on_gpu(), self.backend.current():
            if self.movers.heads.group.size == 1:
                self._finish(own, call.out, call.lse)
            self.backend.synchronize()
            return self._to_caller(call.out), self._to_caller(call.lse)

    def agreed_on_gpu(self) -> AbstractContextManager[None]:
        """Let all ranks fail if one does: a GPU's memory runs out sooner than the host's, and its errors come late."""
        return self.engine.raise_on_all() if self.backend.device else nullcontext()

    @contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        """Tell the other ranks, which wait for this one, of an error."""
        try:
            yield
        except BaseException as error:
            self.movers.abandon(error)
            raise

    def _prepare_pass(self, way: str) -> None:
        """Compile what such a pass needs, and make its buffers, the first time. Collective."""
        plan = self.plan
        backend = self.backend
        trace = self.trace
        heads, dim, dim_v = plan.dims
        trace.flop_per_pair = heads * (2 * (dim + dim_v) if way == "forward" else 6 * dim + 4 * dim_v)
        if way not in plan.ready:
            trace.compile_seconds += self.engine.prepare(plan.dtype, plan.accumulator, dim, dim_v,
                                                         plain=plan.score.plain, relative=bool(plan.relative),
                                                         biased=plan.bias_tokens is not None,
                                                         several=any(bounds.several for bounds in plan.bounds),
                                                         backward=way == "backward")
            with self.engine.raise_on_all(), backend.current():
                self._reserve(way)
                if way == "forward":
                    has_sinks = self.call.sinks is not None                # which are seen by all
                    plan.seen = plan.of_elements([backend.to_device(sees | has_sinks) for sees in plan.sees])
                    self.engine.states(plan.batch, plan.rows, heads, dim_v, plan.accumulator)
            plan.ready.add(way)
        trace.setup_seconds = trace.now() - trace.compile_seconds

    def _reserve(self, way: str) -> None:
        """Make the carrier's buffers."""
        plan = self.plan
        gradients = [plan.accumulator] * len(plan.block_dtypes)
        self.movers.carrier.reserve(plan.route, block_sizes(plan.shapes, plan.block_dtypes),
                                    block_sizes(plan.shapes, gradients) if way == "backward" else None)

    def _find_seen(self) -> None:
        """Find which rows see a key that the bias of their head does not leave out, if it leaves some out."""
        call = self.call
        call.seen = ()
        if self.plan.left_out is not None and call.key_bias is not None and call.sinks is None:
            bits = self.engine.share(bits_of(self.backend.to_numpy(call.key_bias)))
            call.seen = [self.backend.to_device(sees) for sees in
                         seen_by_heads(self.plan, self.plan.left_out, bits, call.key_bias.shape[2])]

    def _keys(self) -> Sequence[Array]:
        """Give this rank's block of keys and values, all heads, and their bias if there is one."""
        return self.call.keys

    def _fold(self) -> list[State]:
        """Fold every block that comes by into the states of the rows, and give them."""
        call = self.call
        plan = self.plan
        backend = self.backend
        movers = self.movers
        heads, _, dim_v = plan.dims
        call.make_results(backend, plan.accumulator)
        given = [(call.q, plan.q_tokens), *zip(self._keys(), plan.block_tokens, strict=True)]
        q, *keys = movers.heads.to_heads("heads", given, backend.empty, self.trace)
        rows = [q]
        if len(plan.row_counts) > 1:
            rows = movers.queries.ask(rows, plan.row_counts, backend.empty, self.trace)
        states = call.states = self.engine.states(plan.batch, plan.rows, heads, dim_v, plan.accumulator)
        self._reset(states, None if plan.replicated else call.sinks)
        self._meet(states, rows, keys)
        return states

    def _meet(self, states: Sequence[State], rows: Sequence[Array], keys: Sequence[Array]) -> None:
        """Fold every block that comes by into states of rows; `keys` are the arrays of this rank's block."""
        for work, part in self._cut_rows(self._works(keys), rows):
            k, v = self._keys_and_values(work.arrays)
            self._run(work, (
                self.backend.accumulate(part_of(states[i], part), rows[0][i, part], k[i, columns], v[i, columns], begin,
                                        end, score)
                for i, columns, begin, end, score in self.plan.tasks(work, part, self.call.dropout_keys,
                                                                     self.call.relative)))

    def _keys_and_values(self, arrays: Sequence[Array]) -> tuple[Array, Array]:
        """Give k and v of a block's arrays: v may be the first numbers of k."""
        k = arrays[0]
        return k, self._first_numbers(k) if self.plan.in_keys else arrays[1]

    def _first_numbers(self, x: Array) -> Array:
        """View the first numbers of each key, or of its gradient, which are a value's too."""
        return x[..., :self.plan.dims[2]]

    def _bring_home(self, states: Sequence[State]) -> list[State]:
        """Put together what several ranks have made of the same rows; give the states that this rank finishes.

        Where ranks share heads, they are finished here.
        """
        plan = self.plan
        own = [part_of(state, slice(plan.own_rows)) for state in states]
        if plan.replicated:
            self._replicated().combine(own, self.call.sinks)
        elif len(plan.row_counts) > 1:
            arrays = [x for state in states for x in arrays_of(state)]
            self.movers.queries.bring_home("states", arrays, plan.row_counts,
                                           lambda parts: combine_parts(self.backend, own, parts), self.trace)
        if self.movers.heads.group.size > 1:
            self._finish_for_all(own)
        return own

    def _works(self, keys: Sequence[Array]) -> Iterator[Work]:
        """Yield the work of a forward pass with every block that comes by; `keys` are this rank's block."""
        plan = self.plan
        return self._carry(Blocks(keys, plan.shapes))

    def _carry(self, keys: Blocks, shares: Blocks | None = None) -> Iterator[Work]:
        """Yield the work with every block that comes by, and bring gradients home.

        This rank's own work is with all of its block, whatever travels of it.

        Parameters
        ----------
        keys : Blocks
            k and v, or what else of each key travels.
        shares : Blocks, optional
            The gradients of what is to be differentiated, that are summed up: a backward pass.
        """
        plan, carrier = self.plan, self.movers.carrier
        sent = keys, shares
        if plan.sent is not None:
            sent = Blocks(self._excerpt(keys.own), keys.shapes), shares and Blocks(self._cleared(shares), shares.shapes)
        works = (carrier.forward(sent[0], plan.route, self.trace) if sent[1] is None else
                 carrier.backward(sent[0], sent[1], plan.route, self.trace))
        for work in works:
            own = plan.sent is not None and work.source == plan.member
            yield replace(work, arrays=tuple(keys.own), gradients=tuple(shares.own if shares else ())) if own else work
        if plan.sent is not None and shares is not None and sent[1] is not None:
            for x, home in zip(shares.own, sent[1].own, strict=True):
                for place, columns in self._places():
                    for element, part in zip(x, home, strict=True):
                        self.backend.add(element[columns], part[place])

    def _excerpt(self, arrays: Sequence[Array]) -> list[Array]:
        """Copy the columns of this rank's block that travel."""
        count = self.plan.shapes[self.plan.member][0][1]
        copies = []
        for x in arrays:
            copies.append(self.backend.empty((len(x), count, *x.shape[2:]), x.dtype))
            for place, columns in self._places():
                assign(copies[-1][:, place], x[:, columns])
        return copies

    def _cleared(self, shares: Blocks) -> list[Array]:
        """Make arrays of zeros for the gradients of the columns that travel."""
        arrays = [self.backend.empty(shape, dtype)
                  for shape, dtype in zip(shares.shapes[self.plan.member], shares.dtypes, strict=True)]
        for x in arrays:
            self.backend.clear(x)
        return arrays

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """Yield where runs of columns of this rank's block are in what travels, and in the block."""
        start = 0
        for columns in self.plan.sent or ():
            stop = start + columns.stop - columns.start
            yield slice(start, stop), columns
            start = stop

    def _replicated(self) -> Replicated:
        """Give what puts results of rows together that all ranks have."""
        return Replicated(self.engine, self.movers.carrier.comm.size, self.plan.rows, self.trace)

    def _reset(self, states: Sequence[State], sinks: NDArray[Any] | None) -> None:
        """Let states forget every key; a sink counts where its queries belong."""
        plan = self.plan
        for state in states:
            own = part_of(state, slice(plan.own_rows))
            self.backend.reset(own, None if sinks is None else sinks[plan.share.queries])
            if plan.rows > plan.own_rows:
                self.backend.reset(part_of(state, slice(plan.own_rows, plan.rows)))

    def _finish(self, states: Sequence[State], out: Array, lse: Array) -> None:
        """Normalise states into results, and let go of them."""
        seen = self.call.seen or self.plan.seen
        for state, seen_i, out_i, lse_i in zip(states, seen, out, lse, strict=True):
            self.backend.finish(state, seen_i, out_i, lse_i)
        self.call.states = []                  # the next call's, of whichever object

    def _finish_for_all(self, states: Sequence[State]) -> None:
        """Normalise states of some heads, and bring results to the ranks that have their tokens."""
        plan = self.plan
        heads, _, dim_v = plan.dims
        out = self.backend.empty((plan.batch, plan.own_rows, heads, dim_v), plan.dtype)
        lse = self.backend.empty((plan.batch, plan.own_rows, heads), plan.accumulator)
        self._finish(states, out, lse)
        self.movers.heads.to_tokens("results", [(lse, plan.q_tokens), (out, plan.q_tokens)],
                                    [(self.call.lse, put_heads), (self.call.out, put_heads)], self.trace)

    def _cut_rows(self, works: Iterator[Work], rows: Sequence[Array]) -> Iterator[tuple[Work, slice]]:
        """Yield each item of work with pieces of the rows to compute, for which what they see is made at a time."""
        for work, part in self._rounds(works, rows):
            for piece in self.plan.pieces(part):
                yield work, piece

    def _rounds(self, works: Iterator[Work], rows: Sequence[Array]) -> Iterator[tuple[Work, slice]]:
        """Yield each item of work with the rows to compute; this rank's own first, while those of others come."""
        plan = self.plan
        everything = slice(plan.rows)
        heads, _, _ = plan.dims
        heard = len(plan.row_counts) == 1
        if not heard and plan.own_rows * heads < FEW_ROWS * plan.share.kv_heads:
            self.movers.queries.hear(rows, plan.row_counts)
            heard = True
        for work in works:
            if heard:
                yield work, everything
                continue
            yield work, slice(plan.own_rows)
            self.movers.queries.hear(rows, plan.row_counts)
            heard = True
            yield work, slice(plan.own_rows, plan.rows)
        if not heard:
            self.movers.queries.hear(rows, plan.row_counts)

    def _run(self, work: Work, loops: Iterable[Iterator[int]], plan: Plan | KeyPlan | TablePlan | None = None) -> None:
        """Run the loops of a backend over an item of work, and let messages move between their tiles."""
        plan = plan or self.plan
        move_messages = self.movers.progress
        start = time.perf_counter()
        for loop in loops:
            with Ended(loop):
                for pairs in loop:
                    plan.prefetch_columns(work.following)
                    move_messages()
                    work.step.pairs += pairs
                    if self._progress and pairs:
                        self._progress(pairs, self._pairs)
        work.step.compute_seconds += time.perf_counter() - start

    def _to_caller(self, x: Array) -> Array:
        """Bring a result to where the caller's arrays are."""
        return x if self.call.on_gpu else self.backend.to_numpy(x)


def put_heads(target: Array, part: slice, piece: Array) -> None:
    """Put a piece into some heads of an array."""
    assign(target[:, :, part], piece)
