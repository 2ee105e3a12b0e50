"""The backward pass of a call, beside the forward pass: blocks come by with their gradients, which come home."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .call import Array
from .forward import ForwardPass, put_heads
from .gradients import AnyGradients, named
from .replicated import part_of
from .schedules.base import Blocks
from .schedules.links import assign
from .softmax import Gradient


class Pass(ForwardPass):
    """One pass of a call, forward or backward; see `ForwardPass`."""

    _sums_of_relative: Sequence[NDArray[np.float64]] = ()

    def backward(self, dout: Array, dlse: Array | None) -> AnyGradients:
        """Differentiate; give gradients as the caller has q, k and v, and sinks and a bias if there are any."""
        call = self.call
        plan = self.plan
        backend = self.backend
        shapes_of_keys = [] if call.frozen else self._shapes_of_keys()
        self._prepare_pass("backward")
        backend.differentiated_by = "own"

        # The gradients of this rank's arrays, which are summed up in the accumulator's dtype.
        with self.engine.raise_on_all(), backend.current():
            dout = backend.to_device(dout)
            dlse = None if dlse is None else backend.to_device(dlse)
            dq, *of_keys = (backend.empty(shape, plan.accumulator) for shape in (call.q.shape, *shapes_of_keys))
            lse = self._known_lse()
            gradients = [backend.new_gradient(dout[i], call.out[i], lse[i], dlse if dlse is None else dlse[i],
                                              dq[i]) for i in range(plan.batch)]
            for x in of_keys:
                backend.clear(x)
            self._sums_of_relative = [] if call.relative is None else call.relative.new_sums()
        with backend.current(), self._abandoned_on_error():
            self._differentiate_call(dout, gradients, (dq, *of_keys))
        self.trace.kernels = backend.differentiated_by

        # What the caller gets: in the dtype of q, k and v, and where they are.
        with self.agreed_on_gpu(), backend.current():
            of_bias = [of_keys.pop()] if of_keys and call.key_bias is not None else []
            dq, *of_keys = (call.given(self._to_caller(backend.astype(x, call.q.dtype))) for x in (dq, *of_keys))
            dk, dv = (*of_keys, None, None)[:2]
            dsinks = None if call.sinks is None else self._gradient_of_sinks(call.sinks, gradients)
            dkey_bias = self._to_caller(self._gradient_of_bias(of_bias[0])) if of_bias else None
            backend.synchronize()
        return named((dq, dk, dv), dsinks=dsinks, dkey_bias=dkey_bias,
                     drelative=None if call.relative is None else call.relative.gradient(self._sums_of_relative))

    def _shapes_of_keys(self) -> list[tuple[int, ...]]:
        """Give the shapes of the gradients of this rank's block."""
        return [x.shape for x in self.call.keys]

    def _gradient_of_bias(self, total: Array) -> Array:
        """Give what was summed up as the caller has the bias."""
        return total.reshape(self.call.bias_shape)

    def _differentiate_call(self, dout: Array, gradients: Sequence[Gradient], results: Sequence[Array]) -> None:
        """Sum up gradients of this rank's arrays: dq, and those of the arrays of its block."""
        call = self.call
        if self.movers.heads.group.size * len(self.plan.row_counts) > 1:
            self._differentiate_for_all(dout, gradients, results)
            return
        dq, *of_keys = results
        self._differentiate(call.q, gradients, call.keys, of_keys or None)
        if self.plan.replicated:
            self._replicated().sum("dq", dq)

    def _differentiate(self, q: Array, gradients: Sequence[Gradient], keys: Sequence[Array],
                       shares: Sequence[Array] | None, rows: Sequence[Array] = ()) -> None:
        """Differentiate with every block that comes by, and bring the gradients of k and v home.

        Parameters
        ----------
        q : array of shape (batch, rows, heads, dim)
        gradients : sequence of Gradient
            Of the rows, one for each element of the batch.
        keys, shares : sequences of arrays
            This rank's block, and their gradients; without these, dq alone is summed up.
        rows : sequence of arrays
            What `QueryExchange.hear` fills in.
        """
        plan = self.plan
        call = self.call
        backend = self.backend
        of_relative = self._of_relative()
        works = self._carry(Blocks(keys, plan.shapes), None if shares is None else Blocks(shares, plan.shapes))
        for work, part in self._cut_rows(works, rows):
            k, v = self._keys_and_values(work.arrays)
            dk, dv, *of_bias = self._with_dv(work.gradients) if work.gradients else (None, None)
            self._run(work, (
                backend.backward(part_of(gradients[i], part), q[i, part], k[i, columns], v[i, columns],
                                 None if dk is None else dk[i, columns], None if dv is None else dv[i, columns],
                                 begin, end, score, of_bias[0][i, columns] if of_bias else None, of_relative)
                for i, columns, begin, end, score in plan.tasks(work, part, call.dropout_keys, call.relative)))
            if plan.in_keys and dk is not None:
                backend.add(self._first_numbers(dk), dv)

    def _of_relative(self) -> list[NDArray[np.float64]] | None:
        """Give what the gradient of a bias by distance of this rank's heads is added to, if there is one."""
        return [x[self.plan.share.queries] for x in self._sums_of_relative] or None

    def _with_dv(self, shares: Sequence[Array]) -> Sequence[Array]:
        """Give what the gradients of a block's k and v, and bias, are added to: a dv of its own, if v is in k."""
        if not self.plan.in_keys:
            return shares
        dk, *of_bias = shares
        dv = self.backend.empty((*dk.shape[:3], self.plan.dims[2]), dk.dtype)
        self.backend.clear(dv)
        return dk, dv, *of_bias

    def _differentiate_for_all(self, dout: Array, gradients: Sequence[Gradient], results: Sequence[Array]) -> None:
        """Differentiate the rows, heads and keys that this rank has in the grid, and bring all home."""
        call = self.call
        plan = self.plan
        backend = self.backend
        heads, queries = self.movers.heads, self.movers.queries
        acc_dtype = plan.accumulator
        delta = self._delta(gradients)

        # What travels, the wider dtype first; the result too, if all ranks have a library whose kernels want it.
        wants_out = (backend.wants_out(plan.dtype, acc_dtype, *plan.dims[1:], plan.plain)
                     and all(x.out is not None for x in gradients))
        sent_out = [call.out] if backend.device and self._all(wants_out) else []
        given = [(x, plan.q_tokens) for x in (self._known_lse(), delta, call.q, dout, *sent_out)]
        inside = heads.to_heads("heads", [*given, *zip(call.keys, plan.block_tokens, strict=True)], backend.empty,
                                self.trace)
        asked, keys = inside[:len(given)], inside[len(given):]
        rows = queries.ask(asked, plan.row_counts, backend.empty, self.trace)
        lse, delta, q, dout, *out = rows
        dq, *of_keys = (backend.empty(x.shape, acc_dtype) for x in (q, *(() if call.frozen else keys)))
        for x in (dq, *of_keys):
            backend.clear(x)
        self._differentiate(q, [Gradient(dout[i], lse[i], delta[i], dq[i], *(x[i] for x in out))
                                for i in range(plan.batch)], keys, of_keys or None, rows)
        own = slice(plan.own_rows)
        queries.bring_home("dq", list(dq), plan.row_counts, lambda parts: self._add(dq[:, own], parts), self.trace)
        tokens_of_keys = plan.block_tokens[:len(of_keys)]
        places = [self._add_heads if tokens.repeats else put_heads for tokens in tokens_of_keys]
        heads.to_tokens("gradients", [(dq[:, own], plan.q_tokens), *zip(of_keys, tokens_of_keys, strict=True)],
                        list(zip(results, (put_heads, *places), strict=True)), self.trace)

    def _all(self, mine: bool) -> bool:
        """Say whether something is so on all ranks."""
        return all(bool(theirs[0]) for theirs in self.engine.share(np.array([mine], np.uint8)))

    def _known_lse(self) -> Array:
        """Give lse by which weights are made again; see `Backend.lse_for_weights`."""
        return self.call.lse if self.call.key_bias is None else self.backend.lse_for_weights(self.call.lse)

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
