"""A call in canonical order: tokens come in blocks of whole tiles, ascending, whatever layouts the caller has.

Forward, and for dq, blocks of keys come by this rank's queries, which stay where they are. For dk and dv, blocks of
queries come by this rank's keys. So each sum is made by one rank, in the order of positions. For the gradient of a bias
by distance blocks of keys come once more, by tiles of queries, whose sums are added up in a fixed tree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .call import Array
from .errors import BackendError, InternalError
from .forward import put_heads
from .passes import Pass
from .relative import Relative
from .schedules.base import Blocks, Work, block_sizes
from .schedules.head_exchange import Tokens
from .softmax import Gradient
from .tiles import KeyPlan, TablePlan, add_up


class CanonicalPass(Pass):
    """One pass of a call in canonical order; see `Pass`."""

    _dsinks: NDArray[Any] | None = None

    @property
    def _of_keys(self) -> KeyPlan:
        if self.plan.of_keys is None:
            raise InternalError("a plan without blocks of tiles")
        return self.plan.of_keys

    def _prepare_pass(self, way: str) -> None:
        """Compile what such a pass needs, and make its buffers, the first time. Collective."""
        if way == "backward" and self.call.relative is not None and not self.backend.sums_tables:
            raise BackendError('relative: expected a forward pass alone with order "canonical", as backend '
                               f'{self.backend.name} sums its gradient up in no canonical order yet; take '
                               'order="fastest"')
        super()._prepare_pass(way)

    def _reserve(self, way: str) -> None:
        """Make the carrier's buffers: for keys, and backward for queries too."""
        plan, of_keys = self.plan, self._of_keys
        self.movers.carrier.reserve(plan.route, block_sizes(plan.shapes, plan.block_dtypes))
        if way == "backward":
            kinds = [plan.accumulator] * 2 + [plan.dtype] * 2
            self.movers.carrier.reserve(of_keys.route, block_sizes(of_keys.shapes, kinds))
            if plan.of_tables:
                self.movers.carrier.reserve(plan.of_tables.route, block_sizes(plan.shapes, plan.block_dtypes))

    def _keys(self) -> Sequence[Array]:
        """Give this rank's block of keys and values, all heads, and their bias if there is one: whole tiles."""
        return self.movers.tokens.move("keys", self.call.keys, self._of_keys.keys, self.backend.device,
                                       self.trace)

    def _differentiate_call(self, dout: Array, gradients: Sequence[Gradient], results: Sequence[Array]) -> None:
        """Sum up dq where the queries are, and then dk and dv where the keys are."""
        dq, *of_keys = results
        of_tables = self.plan.of_tables
        self._pairs += self._of_keys.pairs + (of_tables.pairs if of_tables else 0)
        self.trace.flop_per_pair //= 3 if of_tables else 2               # as often a pair is visited
        delta = self._delta(gradients)
        self._of_queries(dout, delta, dq)
        self._of_all_keys(dout, delta, of_keys)

    def _of_queries(self, dout: Array, delta: Array, dq: Array) -> None:
        """Sum up dq: blocks of keys come by."""
        call, plan = self.call, self.plan
        given = [(x, plan.q_tokens) for x in (self._known_lse(), delta, call.q, dout)]
        given += zip(self._keys(), plan.block_tokens, strict=True)
        lse, delta, q, dout, *keys = self._inside(given)
        (sums,) = self._sums([dq], [q.shape])
        self._differentiate(q, [Gradient(dout[i], lse[i], delta[i], sums[i]) for i in range(plan.batch)], keys, None)
        self._outside([(sums, plan.q_tokens)], [dq])

    def _of_all_keys(self, dout: Array, delta: Array, results: Sequence[Array]) -> None:
        """Sum up dk and dv, and the gradient of a bias: blocks of queries come by."""
        call, of_keys = self.call, self._of_keys
        backend = self.backend
        rows = self.movers.tokens.move("queries", (self._known_lse(), delta, call.q, dout), of_keys.queries,
                                       backend.device, self.trace)
        if call.sinks is not None:
            self._dsinks = self._sum_of_sinks(call.sinks, *rows[:2])
        tokens = self._tokens_of_keys(of_keys.bias_tokens)
        inside = self._inside([*((x, of_keys.q_tokens) for x in rows), *zip(call.keys, tokens, strict=True)])
        keys = inside[len(rows):]
        shapes = [x.shape for x in keys]
        if call.key_bias is not None:
            shapes[-1] = (*shapes[-1][:2], self.plan.dims[0])
        sums = self._sums(results, shapes)
        targets = self._with_dv(sums)
        blocks = Blocks(inside[:len(rows)], of_keys.shapes)
        for work in self.movers.carrier.forward(blocks, of_keys.route, self.trace):
            self._run(work, self._loops(work, keys, targets), of_keys)
        if self.plan.in_keys:
            backend.add(self._first_numbers(sums[0]), targets[1])
        tokens = self._tokens_of_keys(of_keys.of_heads)
        self._outside(list(zip(sums, tokens, strict=True)), results)
        if self.plan.of_tables is not None and call.relative is not None:
            self._of_all_tables(inside[:len(rows)], self.plan.of_tables, call.relative)

    def _of_relative(self) -> None:
        """Sum up no gradient of a bias by distance with dq."""

    def _of_all_tables(self, rows: Sequence[Array], of_tables: TablePlan, relative: Relative) -> None:
        """Sum up the gradient of a bias by distance, on rank 0: blocks of keys come by tiles of queries."""
        plan = self.plan
        keys = self._inside(list(zip(self._keys(), plan.block_tokens, strict=True)))
        heads, batch, tile = plan.dims[0], plan.batch, of_tables.tile
        widths = [table.shape[1] for table in relative.tables]
        count = -(-rows[0].shape[1] // tile)
        with self.engine.raise_on_all():
            sums = np.zeros((count, batch, heads * sum(widths)))
        lse, delta, q, dout = rows

        def loops(work: Work) -> Iterator[Iterator[int]]:
            k, v = self._keys_and_values(work.arrays)
            for i, part, columns, begin, end, score in of_tables.tasks(work, self.call.dropout_keys, relative):
                gradient = Gradient(dout[i, part], lse[i, part], delta[i, part], None)
                if plan.bias_tokens:
                    score = score.of_key_bias(work.arrays[-1][i, columns])
                yield self.backend.backward(gradient, q[i, part], k[i, columns], v[i, columns], None, None, begin, end,
                                            score, drelative=_tables(sums[part.start // tile, i], heads, widths))

        for work in self.movers.carrier.forward(Blocks(keys, plan.shapes), of_tables.route, self.trace):
            self._run(work, loops(work), of_tables)
        self._add_up_tables(sums, of_tables.first, widths)

    def _add_up_tables(self, sums: NDArray[np.float64], first: int, widths: Sequence[int]) -> None:
        """Add up the sums of the tiles of all ranks, (tiles, batch, numbers), in a fixed tree."""
        tiles = sum(-(-part.columns.stop // self._of_keys.tile) for part in self._of_keys.sources)
        mine = {(0, first + number): x for number, x in enumerate(sums)}
        add_up(mine, tiles)
        heads = self.plan.share.queries
        told = np.array([len(mine), heads.start, heads.stop, *itertools.chain(*mine)], np.int64)
        shares = self.engine.share(np.concatenate([told.view(np.uint8), *(x.reshape(-1).view(np.uint8)
                                                                          for x in mine.values())]))
        every: dict[tuple[int, int], dict[tuple[int, int], NDArray[np.float64]]] = {}
        for share in shares if self.movers.carrier.comm.rank == 0 else ():
            count, *of_heads = share[:24].view(np.int64).tolist()
            names = share[24:24 + 16 * count].view(np.int64).reshape(-1, 2).tolist()
            numbers = share[24 + 16 * count:].view(np.float64).reshape(count, *sums.shape[1:])
            there = every.setdefault((of_heads[0], of_heads[1]), {})
            there.update({(level, number): x for (level, number), x in zip(names, numbers, strict=True)})
        for (start, stop), of_tiles in every.items():
            add_up(of_tiles, tiles)
            for x in of_tiles.values():                              # one, or none of no tiles
                for total, table in zip(self._sums_of_relative, _tables(x.sum(axis=0), stop - start, widths),
                                        strict=True):
                    total[start:stop] = table

    def _tokens_of_keys(self, of_bias: Tokens) -> list[Tokens]:
        """Give the tokens of each array of a block, with those of a bias."""
        count = len(self.call.keys)
        return [self._of_keys.kv_tokens] * count if self.call.key_bias is None else [
            *[self._of_keys.kv_tokens] * (count - 1), of_bias]

    def _loops(self, work: Work, keys: Sequence[Array], sums: Sequence[Array]) -> Iterator[Iterator[int]]:
        """Give the loops of the backend over a block of queries; `sums` are the gradients of its k, v and bias."""
        lse, delta, q, dout = work.arrays
        k, v = self._keys_and_values(keys)
        of_bias = keys[-1] if self.call.key_bias is not None else None
        for i, rows, columns, begin, end, score in self._of_keys.tasks(work, self.call.dropout_keys,
                                                                        self.call.relative):
            gradient = Gradient(dout[i, rows], lse[i, rows], delta[i, rows], None)
            score = score.of_key_bias(None if of_bias is None else of_bias[i, columns])
            dk, dv, *dbias = (x[i, columns] for x in sums)
            yield self.backend.backward(gradient, q[i, rows], k[i, columns], v[i, columns], dk, dv, begin, end, score,
                                        *dbias)

    def _inside(self, given: Sequence[tuple[Array, Any]]) -> list[Array]:
        """Exchange tokens for heads, among ranks that share these."""
        return self.movers.heads.to_heads("heads", given, self.backend.empty, self.trace)

    def _shapes_of_keys(self) -> list[tuple[int, ...]]:
        """Give the shapes of the gradients of this rank's block: that of a bias has all heads, added at last."""
        shapes = super()._shapes_of_keys()
        if self.call.key_bias is not None:
            shapes[-1] = (*shapes[-1][:2], self.call.q.shape[2])
        return shapes

    def _gradient_of_bias(self, total: Array) -> Array:
        """Give what was summed up as the caller has the bias: of all heads together if they have the same."""
        if self.call.key_bias is not None and self.call.key_bias.shape[2] == 1:
            heads = [total[:, :, head:head + 1] for head in range(total.shape[2])]
            for other in heads[1:]:                     # one head after the other, always
                self.backend.add(heads[0], other)
            total = self.backend.to_device(heads[0])
        return super()._gradient_of_bias(total)

    def _sums(self, results: Sequence[Array], shapes: Sequence[tuple[int, ...]]) -> list[Array]:
        """Give cleared arrays for the gradients of arrays inside: the results themselves, if no heads are shared."""
        sums = []
        for result, shape in zip(results, shapes, strict=True):
            target = result
            if self.movers.heads.group.size > 1:
                target = self.backend.empty(shape, result.dtype)
                self.backend.clear(target)
            sums.append(target)
        return sums

    def _outside(self, sums: Sequence[tuple[Array, Any]], results: Sequence[Array]) -> None:
        """Exchange heads for tokens; nothing to do if no heads are shared."""
        if self.movers.heads.group.size > 1:
            self.movers.heads.to_tokens("gradients", sums, [(x, put_heads) for x in results], self.trace)

    def _sum_of_sinks(self, sinks: NDArray[Any], lse: Array, delta: Array) -> NDArray[Any]:
        """Give ``-sum(exp(sink - lse) delta)`` over all queries: of each tile, and of these in a fixed tree."""
        of_keys = self._of_keys
        if not of_keys.batch:
            return np.zeros(len(sinks))
        tiles = []
        lse, delta = self.backend.to_numpy(lse), self.backend.to_numpy(delta)
        for start in range(0, lse.shape[1], of_keys.tile):
            rows = slice(start, start + of_keys.tile)
            x, y = (part[:, rows].astype(np.float64) for part in (lse, delta))
            with np.errstate(all="ignore"):
                tiles.append(-(np.exp(sinks - x) * y).sum(axis=1))
        shape = -1, of_keys.batch, len(sinks)
        mine = np.array(tiles, np.float64).reshape(shape)
        shares = self.engine.share(mine.reshape(-1).view(np.uint8))
        order = [rank for source in of_keys.sources for rank in source.ranks]
        sums = np.concatenate([shares[rank].view(np.float64).reshape(shape) for rank in order])
        while len(sums) > 1:
            pairs = len(sums) // 2 * 2
            sums = np.concatenate([sums[:pairs:2] + sums[1:pairs:2], sums[pairs:]])
        total: NDArray[Any] = sums.sum(axis=(0, 1))
        return total

    def _gradient_of_sinks(self, sinks: NDArray[Any], gradients: Sequence[Gradient]) -> NDArray[Any]:
        """Give the gradient of the sinks: all of it on rank 0, and 0 elsewhere."""
        if self.movers.carrier.comm.rank or self._dsinks is None:
            return np.zeros_like(sinks)
        return self._dsinks.astype(sinks.dtype)


def _tables(numbers: NDArray[np.float64], heads: int, widths: Sequence[int]) -> list[NDArray[np.float64]]:
    """View the numbers of tables of some heads as these, (heads, width) each."""
    edges = np.cumsum([0, *(heads * width for width in widths)]).tolist()
    return [numbers[start:stop].reshape(heads, width)
            for start, stop, width in zip(edges, edges[1:], widths, strict=False)]
