"""The forward and the backward pass of a call: heads and queries are exchanged, blocks come by, a backend computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .backends.base import ended
from .call import Array, Call
from .engine import Engine
from .mpi.exchange import NOTHING
from .plan import Plan
from .schedules.base import Blocks, Work, block_sizes
from .schedules.links import assign
from .softmax import Gradient, State
from .tiles import KeyPlan
from .trace import Exchange, Trace

Progress = Callable[[int, int], object]
Rows = TypeVar("Rows", State, Gradient)
SHARED_BYTES = 2**26    # of what all ranks have made of the same rows, on a rank at a time
FEW_ROWS = 128          # for one head of the keys; computing with fewer takes as long as reading keys and values


class Pass:
    """One pass of a call, forward or backward. Collective over the engine's communicator.

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
        self._begin_forward()
        with self.backend.current():
            with self._abandoned_on_error():
                states = self._fold()
            return self._results(states)

    def _begin_forward(self) -> None:
        """Make ready for a forward pass. Collective."""
        heads, dim, dim_v = self.plan.dims
        self._prepare_pass("forward")
        self.trace.flop_per_pair = 2 * heads * (dim + dim_v)

    def _results(self, states: Sequence[State]) -> tuple[Array, Array]:
        """Bring states home, and make results of them, where the caller's arrays are."""
        call = self.call
        shares_heads = self.movers.heads.group.size > 1
        with self._abandoned_on_error():
            own = self._bring_home(states)
            if shares_heads:
                self._finish_for_all(own)
        with self.agreed_on_gpu(), self.backend.current():
            if not shares_heads:
                self._finish(own, call.out, call.lse)
            self.backend.synchronize()
            return self._to_caller(call.out), self._to_caller(call.lse)

    def backward(self, dout: Array, dlse: Array | None) -> tuple[Array, ...]:
        """Differentiate; give dq, dk and dv as the caller has q, k and v, and dsinks if there are sinks."""
        call = self.call
        plan = self.plan
        backend = self.backend
        heads, dim, dim_v = plan.dims
        self._prepare_pass("backward")
        self.trace.flop_per_pair = heads * (6 * dim + 4 * dim_v)

        # The gradients of this rank's arrays, which are summed up in the accumulator's dtype.
        with self.engine.raise_on_all(), backend.current():
            dout = backend.to_device(dout)
            dlse = None if dlse is None else backend.to_device(dlse)
            dq, dk, dv = (backend.empty(x.shape, plan.accumulator) for x in (call.q, call.k, call.v))
            gradients = [backend.new_gradient(dout[i], call.out[i], call.lse[i], dlse if dlse is None else dlse[i],
                                              dq[i]) for i in range(plan.batch)]
            for x in (dk, dv):
                backend.clear(x)
        with backend.current(), self._abandoned_on_error():
            self._differentiate_call(dout, gradients, (dq, dk, dv))

        # What the caller gets: in the dtype of q, k and v, and where they are.
        with self.agreed_on_gpu(), backend.current():
            results = [call.given(self._to_caller(backend.astype(x, call.q.dtype))) for x in (dq, dk, dv)]
            if call.sinks is not None:
                results.append(self._gradient_of_sinks(call.sinks, gradients))
            backend.synchronize()
        return tuple(results)

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
        if way not in plan.ready:
            heads, dim, dim_v = plan.dims
            trace.compile_seconds += self.engine.prepare(plan.dtype, plan.accumulator, dim, dim_v,
                                                         plain=plan.score.plain, backward=way == "backward")
            with self.engine.raise_on_all(), backend.current():
                self._reserve(way)
                if way == "forward":
                    seen = plan.sees | (self.call.sinks is not None)       # a sink is seen by all
                    plan.seen = backend.to_device(seen)
                    self.engine.states(plan.batch, plan.rows, heads, dim_v, plan.accumulator)
            plan.ready.add(way)
        trace.setup_seconds = trace.now() - trace.compile_seconds

    def _reserve(self, way: str) -> None:
        """Make the carrier's buffers."""
        plan = self.plan
        gradient_sizes = block_sizes(plan.shapes, [plan.accumulator] * 2) if way == "backward" else None
        self.movers.carrier.reserve(plan.route, block_sizes(plan.shapes, [plan.dtype] * 2), gradient_sizes)

    def _keys(self) -> Sequence[Array]:
        """Give this rank's block of keys and values, all heads."""
        return self.call.k, self.call.v

    def _fold(self) -> list[State]:
        """Fold every block that comes by into the states of the rows, and give them."""
        call = self.call
        plan = self.plan
        backend = self.backend
        movers = self.movers
        heads, _, dim_v = plan.dims
        call.make_results(backend, plan.accumulator)
        k, v = self._keys()
        q, k, v = movers.heads.to_heads("heads", [(call.q, plan.q_tokens), (k, plan.kv_tokens), (v, plan.kv_tokens)],
                                        backend.empty, self.trace)
        rows = [q]
        if len(plan.row_counts) > 1:
            rows = movers.queries.ask(rows, plan.row_counts, backend.empty, self.trace)
        states = call.states = self.engine.states(plan.batch, plan.rows, heads, dim_v, plan.accumulator)
        self._begin_states(states)
        for work, part in self._parts_of(self._rounds(self._works((k, v)), rows)):
            k, v = work.arrays
            self._run(work, (
                backend.accumulate(_part(states[i], part), rows[0][i, part], k[i, columns], v[i, columns], begin, end,
                                   score)
                for i, columns, begin, end, score in self.plan.tasks(work, part, call.dropout_keys)))
        return states

    def _begin_states(self, states: Sequence[State]) -> None:
        """Let states be as they are before the first block."""
        self._reset(states, None if self.plan.replicated else self.call.sinks)

    def _parts_of(self, rounds: Iterator[tuple[Work, slice]]) -> Iterator[tuple[Work, slice]]:
        """Cut the rows that are computed at a time, if they are to be cut."""
        return rounds

    def _bring_home(self, states: Sequence[State]) -> list[State]:
        """Put together what several ranks have made of the same rows; give the states that this rank finishes."""
        plan = self.plan
        own = [_part(state, slice(plan.own_rows)) for state in states]
        if plan.replicated:
            self._combine_over_ranks(own, self.call.sinks)
        elif len(plan.row_counts) > 1:
            arrays = [x for state in states for x in _arrays(state)]
            self.movers.queries.bring_home("states", arrays, plan.row_counts,
                                           lambda parts: self._combine(own, parts), self.trace)
        return own

    def _works(self, keys: Sequence[Array]) -> Iterator[Work]:
        """Yield the work of a forward pass with every block that comes by; `keys` are this rank's k and v."""
        plan = self.plan
        return self.movers.carrier.forward(Blocks(keys, plan.shapes), plan.route, self.trace)

    def _of_all_ranks(self, what: str, arrays: Sequence[Array]) -> list[list[Array]]:
        """Give such arrays of each rank, in the order of the ranks: what is made of them is the same on all."""
        record = Exchange(what, self.trace.now())
        mine = np.concatenate([NOTHING, *(self.backend.to_numpy(x).reshape(-1).view(np.uint8) for x in arrays)])
        start = time.perf_counter()
        rows = self.engine.share(mine)
        record.wait_seconds = time.perf_counter() - start
        record.bytes_sent = record.bytes_received = mine.size * (len(rows) - 1)
        self.trace.exchanges.append(record)
        edges = np.cumsum([x.nbytes for x in arrays])
        return [[self.backend.to_device(part.view(x.dtype).reshape(x.shape))
                 for part, x in zip(np.split(row, edges)[:-1], arrays, strict=True)] for row in rows]

    def _combine_over_ranks(self, states: Sequence[State], sinks: NDArray[Any] | None) -> None:
        """Put together what each rank has made of rows that all have; `states` take it."""
        for rows in self._some_rows([x for state in states for x in _arrays(state)]):
            some = [_part(state, rows) for state in states]
            everyone = self._of_all_ranks("states", [x for state in some for x in _arrays(state)])
            for state in some:
                self.backend.reset(state, sinks)
            for parts in everyone:
                self._combine(some, parts)

    def _sum_over_ranks(self, what: str, total: Array) -> None:
        """Sum up what each rank has of an array of shape (batch, rows, ...), the same on all."""
        for element in total:
            for rows in self._some_rows([element]):
                everyone = self._of_all_ranks(what, [element[rows]])
                self.backend.clear(element[rows])
                for (part,) in everyone:
                    self.backend.add(element[rows], part)

    def _some_rows(self, arrays: Sequence[Array]) -> Iterator[slice]:
        """Cut the rows of arrays, so that those of all ranks take little memory."""
        row_bytes = sum(x.nbytes for x in arrays) // max(1, self.plan.rows) * self.movers.carrier.comm.size
        step = max(1, SHARED_BYTES // max(1, row_bytes))
        return (slice(start, start + step) for start in range(0, self.plan.rows, step))

    def _reset(self, states: Sequence[State], sinks: NDArray[Any] | None) -> None:
        """Let states forget every key; a sink counts where its queries belong."""
        plan = self.plan
        for state in states:
            self.backend.reset(_part(state, slice(plan.own_rows)), None if sinks is None else sinks[plan.share.queries])
            if plan.rows > plan.own_rows:
                self.backend.reset(_part(state, slice(plan.own_rows, plan.rows)))

    def _combine(self, states: Sequence[State], parts: Sequence[Array]) -> None:
        """Fold what another rank has made of this rank's rows into their states."""
        for number, state in enumerate(states):
            acc, row_max, row_sum = parts[3 * number:3 * number + 3]
            self.backend.combine(state, State(acc[None], row_max[None], row_sum[None]))

    def _finish(self, states: Sequence[State], out: Array, lse: Array) -> None:
        """Normalise states into results, and let go of them."""
        for state, out_i, lse_i in zip(states, out, lse, strict=True):
            self.backend.finish(state, self.plan.seen, out_i, lse_i)
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

    def _differentiate_call(self, dout: Array, gradients: Sequence[Gradient], results: Sequence[Array]) -> None:
        """Sum up dq, dk and dv of this rank's arrays."""
        call = self.call
        if self.movers.heads.group.size * len(self.plan.row_counts) > 1:
            self._differentiate_for_all(dout, gradients, results)
            return
        dq, dk, dv = results
        self._differentiate(call.q, gradients, (call.k, call.v), (dk, dv))
        if self.plan.replicated:
            self._sum_over_ranks("dq", dq)

    def _differentiate(self, q: Array, gradients: Sequence[Gradient], keys: Sequence[Array],
                       shares: Sequence[Array] | None, rows: Sequence[Array] = ()) -> None:
        """Differentiate with every block that comes by, and bring the gradients of k and v home.

        Parameters
        ----------
        q : array of shape (batch, rows, heads, dim)
        gradients : sequence of Gradient
            Of the rows, one for each element of the batch.
        keys, shares : (array, array)
            k and v of this rank, and their gradients; without these, dq alone is summed up.
        rows : sequence of arrays
            What `QueryExchange.hear` fills in.
        """
        plan = self.plan
        backend = self.backend
        carrier, blocks = self.movers.carrier, Blocks(keys, plan.shapes)
        works = carrier.forward(blocks, plan.route, self.trace) if shares is None else carrier.backward(
            blocks, Blocks(shares, plan.shapes), plan.route, self.trace)
        for work, part in self._rounds(works, rows):
            k, v = work.arrays
            dk, dv = work.gradients or (None, None)
            self._run(work, (
                backend.backward(_part(gradients[i], part), q[i, part], k[i, columns], v[i, columns],
                                 None if dk is None else dk[i, columns], None if dv is None else dv[i, columns],
                                 begin, end, score)
                for i, columns, begin, end, score in plan.tasks(work, part, self.call.dropout_keys)))

    def _differentiate_for_all(self, dout: Array, gradients: Sequence[Gradient], results: Sequence[Array]) -> None:
        """Differentiate the rows, heads and keys that this rank has in the grid, and bring all home."""
        call = self.call
        plan = self.plan
        backend = self.backend
        heads, queries = self.movers.heads, self.movers.queries
        acc_dtype = plan.accumulator
        delta = self._delta(gradients)

        # What travels, the wider dtype first.
        given = [(x, plan.q_tokens) for x in (call.lse, delta, call.q, dout)]
        *asked, k, v = heads.to_heads("heads", [*given, (call.k, plan.kv_tokens), (call.v, plan.kv_tokens)],
                                      backend.empty, self.trace)
        rows = queries.ask(asked, plan.row_counts, backend.empty, self.trace)
        lse, delta, q, dout = rows
        dq, dk, dv = (backend.empty(x.shape, acc_dtype) for x in (q, k, v))
        for x in (dq, dk, dv):
            backend.clear(x)
        self._differentiate(q, [Gradient(dout[i], lse[i], delta[i], dq[i]) for i in range(plan.batch)], (k, v),
                            (dk, dv), rows)
        own = slice(plan.own_rows)
        queries.bring_home("dq", list(dq), plan.row_counts, lambda parts: self._add(dq[:, own], parts), self.trace)
        place = self._add_heads if plan.kv_tokens.repeats else put_heads
        heads.to_tokens("gradients", [(dq[:, own], plan.q_tokens), (dk, plan.kv_tokens), (dv, plan.kv_tokens)],
                        list(zip(results, (put_heads, place, place), strict=True)), self.trace)

    def _delta(self, gradients: Sequence[Gradient]) -> Array:
        """Give delta of all elements of the batch in one array."""
        delta = self.backend.empty(self.call.lse.shape, self.plan.accumulator)
        for target, gradient in zip(delta, gradients, strict=True):
            assign(target, gradient.delta)
        return delta

    def _add(self, targets: Iterable[Array], parts: Iterable[Array]) -> None:
        for target, part in zip(targets, parts, strict=True):
            self.backend.add(target, part)

    def _add_heads(self, target: Array, part: slice, piece: Array) -> None:
        """Add a piece to some heads of an array."""
        self.backend.add(target[:, :, part], piece)

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

    def _run(self, work: Work, loops: Iterable[Iterator[int]], plan: Plan | KeyPlan | None = None) -> None:
        """Run the loops of a backend over an item of work, and let messages move between their tiles."""
        plan = plan or self.plan
        move_messages = self.movers.progress
        start = time.perf_counter()
        for loop in loops:
            with ended(loop):
                for pairs in loop:
                    plan.prefetch_columns(work.following)
                    move_messages()
                    work.step.pairs += pairs
                    if self._progress and pairs:
                        self._progress(pairs, self._pairs)
        work.step.compute_seconds += time.perf_counter() - start

    def _gradient_of_sinks(self, sinks: NDArray[Any], gradients: Sequence[Gradient]) -> NDArray[Any]:
        """Give ``-sum(exp(sink - lse) delta)`` over this rank's queries; of those that all have, on rank 0 only."""
        total = np.zeros(len(sinks))
        if self.plan.replicated and self.movers.carrier.comm.rank:
            return total.astype(sinks.dtype)
        for gradient in gradients:
            lse, delta = (self.backend.to_numpy(x).astype(np.float64) for x in (gradient.lse, gradient.delta))
            with np.errstate(all="ignore"):
                total -= (np.exp(sinks - lse) * delta).sum(axis=0)
        return total.astype(sinks.dtype)

    def _to_caller(self, x: Array) -> Array:
        """Bring a result to where the caller's arrays are."""
        return x if self.call.on_gpu else self.backend.to_numpy(x)


def _arrays(state: State) -> tuple[Array, Array, Array]:
    return state.acc, state.row_max, state.row_sum


def _part(whole: Rows, rows: slice) -> Rows:
    """Give some rows of a state or a gradient."""
    return type(whole)(*(x[rows] for x in vars(whole).values()))


def put_heads(target: Array, part: slice, piece: Array) -> None:
    """Put a piece into some heads of an array."""
    assign(target[:, :, part], piece)
