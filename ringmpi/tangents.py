"""Derivatives of a call in a direction: of its results (the JVP), and of its gradients, in two rounds of blocks.

Let L = dq·q_dot + dk·k_dot + dv·v_dot + dsinks·sinks_dot + dkey_bias·key_bias_dot + drelative·relative_dot be what the
second derivative of a loss starts from: the gradients that a backward pass has given, times the cotangents of these,
which make the direction.
With p the weights, the sink's p_s among them, m what dropout multiplies them by, and t the change of the scores in the
direction,

    lse_dot = sum(p t) + p_s sinks_dot          out_dot = sum(m p (t v + v_dot)) - lse_dot out

are the changes of the results, and as backward is the adjoint of that, L = dout·out_dot + dlse·lse_dot. So out_dot and
lse_dot are the gradients of L by dout and dlse: the first round. Its gradients by the inputs are, as mixed derivatives
go in any order, the changes of dq, dk, dv, dsinks, dkey_bias and drelative in the direction while dout and dlse stay:
the second round differentiates the formulas of the backward pass (`Tangents.backward`), with delta_dot =
sum(dout · out_dot), and

    dsinks_dot = -sum(p_s ((sinks_dot - lse_dot) delta + delta_dot))

k, v, a bias and their tangents travel in both; in the second the sums for them come home as gradients do. Each pair
costs 15 products of a tile, where a backward pass has 5, so nothing is kept of one round for the other but numbers of
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .backends.tangents import Keys, Rows, SecondGradient, Tangent, Tangents
from .call import Array, Direction
from .errors import InternalError
from .forward import put_heads
from .passes import Pass
from .plan import Task
from .schedules.base import Blocks, Work, block_sizes
from .softmax import row_delta

Made = TypeVar("Made")
READY = "tangents"                  # in `Plan.ready`
Loop = Callable[[int, slice, Keys, tuple[Array, ...], Task], Iterator[int]]


class TangentPass(Pass):
    """Derivatives of a call in its direction, on the host, in any order but canonical; see `Pass`."""

    def attend(self) -> tuple[Array, Array, Array, Array]:
        """Give out and lse, and out_dot and lse_dot, as the caller's arrays are."""
        out, lse = map(self.call.given, self.forward())
        flop = self.trace.flop_per_pair
        out_dot, lse_dot = self.jvp()
        self.trace.flop_per_pair = (flop + self.trace.flop_per_pair) // 2        # a pair is visited twice
        return out, lse, out_dot, lse_dot

    def jvp(self) -> tuple[Array, Array]:
        """Give out_dot and lse_dot as the caller has out and lse."""
        self._prepare(rounds=1)
        with self._abandoned_on_error():
            out_dot, lse_dot = self._results_dot()
        return self.call.given(self.backend.astype(out_dot, self.call.q.dtype)), self.call.given(lse_dot)

    def differentiate_twice(self, dout: Array, dlse: Array | None) -> tuple[Any, ...]:
        """Give out_dot and lse_dot, and how dq, dk, dv, dsinks, dkey_bias and drelative change in the direction.

        dv is None if values are in the keys, and the last three without sinks and biases.
        """
        call = self.call
        self._prepare(rounds=2)
        with self.engine.raise_on_all():
            results = [np.zeros(x.shape, self.plan.accumulator) for x in (call.q, *call.keys)]
            delta = np.empty_like(call.lse)
            delta_dot = np.empty_like(call.lse)
            self._sums_of_relative = [] if call.relative is None else call.relative.new_sums()
        with self._abandoned_on_error():
            out_dot, lse_dot = self._results_dot()
            for i in range(len(delta)):
                row_delta(dout[i], call.out[i], None if dlse is None else dlse[i], delta[i])
                row_delta(dout[i], out_dot[i], None, delta_dot[i])
            rows = [self._known_lse(), delta, lse_dot, delta_dot, call.q, self._direction.q, dout]
            self._gradients_dot(rows, results)
        of_bias = None if call.key_bias is None else results.pop()
        out_dot, dq, dk, *dv = (call.given(self.backend.astype(x, call.q.dtype)) for x in (out_dot, *results))
        return (out_dot, call.given(lse_dot), dq, dk, dv[0] if dv else None,
                None if call.sinks is None else self._sinks_dot(call.sinks, delta, lse_dot, delta_dot),
                None if of_bias is None else self._gradient_of_bias(of_bias),
                None if call.relative is None else call.relative.gradient(self._sums_of_relative))

    @property
    def _direction(self) -> Direction:
        if self.call.direction is None:
            raise InternalError("a call without a direction")
        return self.call.direction

    def _prepare(self, rounds: int) -> None:
        """Make the buffers, the first time. Collective."""
        plan = self.plan
        heads, dim, dim_v = plan.dims
        self._pairs *= rounds
        self.trace.flop_per_pair = 2 * heads * ((3 * dim + 2 * dim_v) if rounds == 1 else (5 * dim + 5 * dim_v // 2))
        if READY not in plan.ready:
            with self.engine.raise_on_all():
                dtypes = self._of_travelling(plan.block_dtypes)
                self.movers.carrier.reserve(plan.route, block_sizes(self._shapes, dtypes),
                                            block_sizes(plan.shapes, [plan.accumulator] * len(plan.block_dtypes)))
            plan.ready.add(READY)
        self.trace.setup_seconds = self.trace.now()

    @property
    def _shapes(self) -> list[list[tuple[int, ...]]]:
        return [self._of_travelling(shapes) for shapes in self.plan.shapes]

    def _of_travelling(self, of_block: Sequence[Made]) -> list[Made]:
        """Give of the arrays that travel what there is for those of a block.

        They are keys, values unless they are in the keys, the tangents of both, and of a bias its tangent and itself.
        """
        of_keys, of_bias = of_block[:self._apart], of_block[self._apart:]
        return [*of_keys, *of_keys, *of_bias, *of_bias]

    @property
    def _apart(self) -> int:
        """Arrays of a block besides a bias: keys and values, or keys alone."""
        return 1 if self.plan.in_keys else 2

    def _results_dot(self) -> tuple[Array, Array]:
        """Give the changes of this rank's results, in the accumulator's dtype: the first round."""
        call = self.call
        plan = self.plan
        (lse, q, q_dot), keys = self._inside([self._known_lse(), call.q, self._direction.q])
        out_dot = np.zeros((*q.shape[:3], plan.dims[2]), plan.accumulator)
        lse_dot = np.zeros(lse.shape, plan.accumulator)

        def loop(i: int, part: slice, block: Keys, shares: tuple[Array, ...], task: Task) -> Iterator[int]:
            return self._tangents.forward(Tangent(out_dot[i, part], lse_dot[i, part]),
                                          Rows(q[i, part], q_dot[i, part], lse[i, part]), block, *task[2:])

        blocks = Blocks(keys, self._shapes)
        self._meet_tangents(self._carry(blocks), (lse, q, q_dot), loop)
        results = [np.empty(call.out.shape, plan.accumulator), np.empty_like(call.lse)]
        self._outside("tangents", [out_dot, lse_dot], results)

        # What the sinks' tangents add; and how a sum of weights changes what it divides.
        out_dot, lse_dot = results
        with np.errstate(all="ignore"):
            if call.sinks is not None:
                lse_dot += np.exp(call.sinks - call.lse) * self._direction.sinks
            out_dot -= lse_dot[..., None] * call.out
        return out_dot, lse_dot

    def _gradients_dot(self, rows: Sequence[Array], results: Sequence[Array]) -> None:
        """Sum up the changes of the gradients of this rank's arrays: the second round.

        Parameters
        ----------
        rows : sequence of arrays
            lse, delta, lse_dot, delta_dot, q, q_dot and dout of this rank: the wider dtype first.
        results : sequence of arrays
            For dq, dk, dv, and dkey_bias if there is a bias.
        """
        plan = self.plan
        rows, keys = self._inside(rows)
        lse, delta, lse_dot, delta_dot, q, q_dot, dout = rows
        apart = self._apart
        dq, *of_keys = (np.zeros(x.shape, plan.accumulator) for x in (q, *keys[:apart], *keys[2 * apart + 1:]))
        of_relative = self._of_relative()

        def loop(i: int, part: slice, block: Keys, shares: tuple[Array, ...], task: Task) -> Iterator[int]:
            gradient = SecondGradient(*(x[i, part] for x in (dout, delta, lse_dot, delta_dot, dq)))
            dk, *others = (x[i, task.columns] for x in shares)
            dv = self._first_numbers(dk) if plan.in_keys else others.pop(0)
            return self._tangents.backward(gradient, Rows(q[i, part], q_dot[i, part], lse[i, part]), block, dk, dv,
                                           *task[2:], others[0] if others else None, of_relative)

        blocks, sums = Blocks(keys, self._shapes), Blocks(of_keys, plan.shapes)
        self._meet_tangents(self._carry(blocks, sums), rows, loop)
        self._outside("second derivatives", [dq], results[:1])
        places = [self._add_heads if tokens.repeats else put_heads for tokens in plan.block_tokens]
        self.movers.heads.to_tokens("second derivatives", list(zip(of_keys, plan.block_tokens, strict=True)),
                                    list(zip(results[1:], places, strict=True)), self.trace)

    @property
    def _tangents(self) -> Tangents:
        relative_dot = self._direction.relative
        return Tangents(self.backend.threads,
                        None if relative_dot is None else relative_dot.of_heads(self.plan.share.queries))

    def _inside(self, rows: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Exchange tokens for heads, and ask for the queries of others; give arrays of rows, and this rank's block."""
        plan, call, direction = self.plan, self.call, self._direction
        keys = [(x, plan.kv_tokens) for some in ((call.k, call.v), (direction.k, direction.v))
                for x in some[:self._apart]]
        if plan.bias_tokens is not None:
            keys += [(x, plan.bias_tokens) for x in (direction.key_bias, call.key_bias)]
        inside = self.movers.heads.to_heads("heads", [*((x, plan.q_tokens) for x in rows), *keys], self.backend.empty,
                                            self.trace)
        gathered, block = inside[:len(rows)], inside[len(rows):]
        if len(plan.row_counts) > 1:
            gathered = self.movers.queries.ask(gathered, plan.row_counts, self.backend.empty, self.trace)
        return gathered, block

    def _meet_tangents(self, works: Iterator[Work], rows: Sequence[Array], loop: Loop) -> None:
        """Run a loop over every block that comes by."""
        for work, part in self._cut_rows(works, rows):
            self._run(work, (
                loop(task.element, part, self._keys_of([x[task.element, task.columns] for x in work.arrays]),
                     work.gradients, task)
                for task in self.plan.tasks(work, part, self.call.dropout_keys, self.call.relative)))

    def _keys_of(self, arrays: Sequence[Array]) -> Keys:
        """Give keys, values and tangents of a block's arrays: values may be the first numbers of keys."""
        apart = self._apart
        (k, v), (k_dot, v_dot) = (self._keys_and_values(some) for some in (arrays[:apart], arrays[apart:2 * apart]))
        return Keys(k, v, k_dot, v_dot, *arrays[2 * apart:2 * apart + 1])

    def _outside(self, what: str, sums: Sequence[Array], results: Sequence[Array]) -> None:
        """Add up what several ranks have made of the same rows, and exchange heads for tokens."""
        plan = self.plan
        own = [x[:, :plan.own_rows] for x in sums]
        if len(plan.row_counts) > 1:
            targets = [part for x in own for part in x]
            self.movers.queries.bring_home(what, [part for x in sums for part in x], plan.row_counts,
                                           lambda parts: self._add(targets, parts), self.trace)
        self.movers.heads.to_tokens(what, [(x, plan.q_tokens) for x in own], [(x, put_heads) for x in results],
                                    self.trace)
        for x in results if plan.replicated else ():
            self._replicated().sum(what, x)

    def _sinks_dot(self, sinks: NDArray[Any], delta: Array, lse_dot: Array, delta_dot: Array) -> NDArray[Any]:
        """Give how the gradient of the sinks changes, over this rank's queries; of those that all have, on rank 0."""
        if self.plan.replicated and self.movers.carrier.comm.rank:
            return np.zeros_like(sinks)
        with np.errstate(all="ignore"):
            weights = np.exp(sinks - self.call.lse.astype(np.float64))
            each = weights * ((self._direction.sinks - lse_dot) * delta + delta_dot)
        total: NDArray[Any] = -each.sum(axis=(0, 1))
        return total.astype(sinks.dtype)
