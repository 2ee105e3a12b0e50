"""The forward and the backward pass of a call: blocks come by, and a backend computes with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .call import Array, Call
from .engine import Engine
from .plan import Plan
from .schedules.base import Blocks, Work, block_sizes
from .softmax import Gradient
from .trace import Trace

Progress = Callable[[int, int], object]


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
        self.trace = trace
        self._progress = progress

    def forward(self) -> tuple[Array, Array]:
        """Attend; give `out` and `lse` with a batch axis, where the caller's arrays are."""
        call = self.call
        plan = self.plan
        backend = self.backend
        heads, dim, dim_v = plan.dims
        self._prepare_pass("forward")
        self.trace.flop_per_pair = 2 * heads * (dim + dim_v)
        with backend.current():
            self._accumulate()
            with self.agreed_on_gpu(), backend.current():
                for state, out, lse in zip(call.states, call.out, call.lse, strict=True):
                    backend.finish(state, plan.seen, out, lse)
                call.states = []                  # the next call's, of whichever object
                backend.synchronize()
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
        with backend.current():
            self._differentiate(gradients, Blocks((dk, dv), plan.shapes))

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
                gradient_sizes = block_sizes(plan.shapes, plan.accumulator) if way == "backward" else None
                self.engine.schedule.reserve(plan.route, block_sizes(plan.shapes, plan.dtype), gradient_sizes)
                if way == "forward":
                    seen = plan.sees | (self.call.sinks is not None)       # a sink is seen by all
                    plan.seen = backend.to_device(seen)
                    self.engine.states(plan.batch, len(seen), heads, dim_v, plan.accumulator)
            plan.ready.add(way)
        trace.setup_seconds = trace.now() - trace.compile_seconds

    def _accumulate(self) -> None:
        """Fold every block that comes by into the states of the queries."""
        call = self.call
        plan = self.plan
        backend = self.backend
        schedule = self.engine.schedule     # kept: if a callback closes the object, others must still hear of an error
        try:
            call.make_results(backend, plan.accumulator)
            heads, _, dim_v = plan.dims
            call.states = self.engine.states(plan.batch, call.q.shape[1], heads, dim_v, plan.accumulator)
            for state in call.states:
                backend.reset(state, call.sinks)
            for work in schedule.forward(Blocks((call.k, call.v), plan.shapes), plan.route, self.trace):
                k, v = work.arrays
                self._run(work, schedule.progress, (
                    backend.accumulate(call.states[i], call.q[i], k[i], v[i], begin, end, score)
                    for i, begin, end, score in plan.tasks(work.source, call.dropout_keys)))
        except BaseException as error:
            schedule.abandon(error)
            raise

    def _differentiate(self, gradients: list[Gradient], shares: Blocks) -> None:
        """Differentiate with every block that comes by, and bring the gradients of k and v home."""
        call = self.call
        plan = self.plan
        backend = self.backend
        schedule = self.engine.schedule           # kept: see `_accumulate`
        try:
            for work in schedule.backward(Blocks((call.k, call.v), plan.shapes), shares, plan.route, self.trace):
                k, v = work.arrays
                dk, dv = work.gradients
                self._run(work, schedule.progress, (
                    backend.backward(gradients[i], call.q[i], k[i], v[i], dk[i], dv[i], begin, end, score)
                    for i, begin, end, score in plan.tasks(work.source, call.dropout_keys)))
        except BaseException as error:
            schedule.abandon(error)
            raise

    def _run(self, work: Work, move_messages: Callable[[], None], loops: Iterable[Iterator[int]]) -> None:
        """Run the loops of a backend over an item of work, and let messages move between their tiles."""
        plan = self.plan
        start = time.perf_counter()
        for loop in loops:
            for pairs in loop:
                plan.prefetch_columns(work.following)
                move_messages()
                work.step.pairs += pairs
                if self._progress and pairs:
                    self._progress(pairs, plan.pairs)
        work.step.compute_seconds = time.perf_counter() - start

    def _gradient_of_sinks(self, sinks: NDArray[Any], gradients: list[Gradient]) -> NDArray[Any]:
        """Give ``-sum(exp(sink - lse) delta)`` over this rank's queries."""
        total = np.zeros(len(sinks))
        for gradient in gradients:
            lse, delta = (self.backend.to_numpy(x).astype(np.float64) for x in (gradient.lse, gradient.delta))
            with np.errstate(all="ignore"):
                total -= (np.exp(sinks - lse) * delta).sum(axis=0)
        return total.astype(sinks.dtype)

    def _to_caller(self, x: Array) -> Array:
        """Bring a result to where the caller's arrays are."""
        return x if self.call.on_gpu else self.backend.to_numpy(x)
