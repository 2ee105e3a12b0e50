"""Passes over the weights of a call: what belongs to keys comes home as gradients do, what belongs to queries stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..backends.heaviest import merge, new_tops
from ..call import Array
from ..forward import ForwardPass, put_heads
from ..layout import Integers
from ..plan import Task
from ..replicated import SHARED_BYTES
from ..schedules.base import Blocks, Work, block_sizes
from ..schedules.head_exchange import Tokens
from ..schedules.links import Shape
from ..score import Score
from .groups import Groups, members

MASS, ENTROPY, POSITION = range(3)          # of the sums of `Backend.row_sums`
Made = TypeVar("Made")
Loops = Callable[[Work, slice, Task], Iterator[Iterator[int]]]


@dataclass
class Inside:
    """What this rank computes with: the rows, and its block of keys. All arrays have a batch axis."""

    rows: list[Array]
    block: list[Array]

    @property
    def q(self) -> Array:
        """Queries."""
        return self.rows[-1]

    @property
    def lse(self) -> Array:
        """Log-sum-exp of the queries."""
        return self.rows[-2]


class WeightsPass(ForwardPass):
    """A pass over the weights of a call, whose `lse` is given; see `ForwardPass`. Collective."""

    def key_mass(self, groups: Groups) -> NDArray[np.float64]:
        """Give what each key of this rank weighs for the queries of each group, (batch, n_k, heads, groups)."""
        call, plan = self.call, self.plan
        batch, _, heads, _ = call.q.shape
        shapes = [[(*shape[:2], plan.dims[0], groups.total)] for shape, *_ in plan.shapes]

        def make() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            result = np.zeros((batch, call.k.shape[1], heads, groups.total))
            if self.movers.heads.group.size == 1:
                return result, result
            return result, np.zeros((batch, plan.parts[plan.member][-1].columns.stop, plan.dims[0], groups.total))

        result, sums = self._get_ready([plan.dtype], make, shapes)
        numbers = np.broadcast_to(groups.numbers[:, None], call.lse.shape)
        inside = self._enter([(numbers, plan.q_tokens)], [])
        of_queries, *_ = inside.rows
        blocks, of_keys = Blocks(inside.block, self._shapes(len(inside.block))), Blocks([sums], shapes)

        def loops(work: Work, part: slice, task: Task) -> Iterator[Iterator[int]]:
            i, columns, begin, end, score = task
            (k,), (target,) = self._without_bias(work), work.gradients
            for group, rows in members(of_queries[i, part, 0]):
                yield self.backend.column_sums(
                    target[i, columns, :, group], inside.q[i, part][rows], k[i, columns], inside.lse[i, part][rows],
                    begin[..., rows], end[..., rows], _of_rows(score, rows))

        with self._abandoned_on_error():
            self._go_through(self._carry(blocks, of_keys), inside, loops)
            if sums is not result:
                tokens = Tokens(plan.kv_tokens.counts, plan.q_tokens.parts)
                self.movers.heads.to_tokens("sums", [(sums, tokens)], [(result, put_heads)], self.trace)
        return result

    def row_sums(self) -> NDArray[np.float64]:
        """Give the sums of `Backend.row_sums` of this rank's queries, (batch, n_q, heads, 3); values are positions."""
        sums = self._get_ready([self.plan.dtype], lambda: self._zeros(3))

        def loops(work: Work, part: slice, task: Task) -> Iterator[Iterator[int]]:
            i, columns, begin, end, score = task
            values = self._positions(work)[columns].astype(np.float64)
            yield self.backend.row_sums(sums[i, part], inside.q[i, part], self._without_bias(work)[-1][i, columns],
                                        inside.lse[i, part], values, begin, end, score)

        inside = self._enter([], [])
        result: NDArray[np.float64] = self._of_rows(inside, loops, [sums], _add)[0]
        return result

    def mass_by_group(self, groups: Groups) -> NDArray[np.float64]:
        """Give what the keys of each group weigh for each of this rank's queries, (batch, n_q, heads, groups)."""
        call = self.call
        sums = self._get_ready([np.dtype(np.int64), self.plan.dtype], lambda: self._zeros(groups.total))
        numbers = np.ascontiguousarray(np.broadcast_to(groups.numbers[:, None], call.k.shape[:3]))

        def loops(work: Work, part: slice, task: Task) -> Iterator[Iterator[int]]:
            i, columns, begin, end, score = task
            of_keys, k = (x[i, columns] for x in self._without_bias(work))
            for group, keys in members(of_keys[:, 0]):
                some = np.arange(keys.start, keys.stop) if isinstance(keys, slice) else keys
                low, high = (np.searchsorted(some, edge) for edge in (begin, end))
                made = np.zeros((low.shape[-1], sums.shape[2], 3))
                yield self.backend.row_sums(made, inside.q[i, part], k[keys], inside.lse[i, part],
                                            np.zeros(len(some)), low, high, score.of_columns(keys))
                sums[i, part, :, group] += made[..., MASS]

        inside = self._enter([], [(numbers, self.plan.kv_tokens)])
        result: NDArray[np.float64] = self._of_rows(inside, loops, [sums], _add)[0]
        return result

    def tops(self, count: int) -> tuple[Array, Integers]:
        """Give the highest scores of this rank's queries, and the positions of these keys: (batch, n_q, heads, n)."""
        plan = self.plan
        scores, positions = self._get_ready(
            [plan.dtype], lambda: new_tops((plan.batch, plan.rows, plan.dims[0], count), plan.accumulator))

        def loops(work: Work, part: slice, task: Task) -> Iterator[Iterator[int]]:
            i, columns, begin, end, score = task
            yield self.backend.row_tops(scores[i, part], positions[i, part], inside.q[i, part],
                                        self._without_bias(work)[-1][i, columns], self._positions(work)[columns], begin,
                                        end, score)

        def combine(targets: Sequence[Array], parts: Sequence[Array]) -> None:
            merge(*targets, *parts)

        inside = self._enter([], [])
        scores, positions = self._of_rows(inside, loops, [scores, positions], combine)
        return scores, positions

    def max_score(self) -> Array:
        """Give the largest score of each head over all ranks, (batch, heads); NaN if one is."""
        mine = self.tops(1)[0][..., 0].max(axis=1, initial=-np.inf)
        shares = self.engine.share(np.ascontiguousarray(mine).reshape(-1).view(np.uint8))
        most: Array = np.stack([share.view(mine.dtype) for share in shares]).max(axis=0)
        return most.reshape(mine.shape)

    def _zeros(self, width: int) -> NDArray[np.float64]:
        """Make sums of the rows that this rank computes with."""
        return np.zeros((self.plan.batch, self.plan.rows, self.plan.dims[0], width))

    def _enter(self, of_queries: Sequence[tuple[Array, Tokens]], of_keys: Sequence[tuple[Array, Tokens]]) -> Inside:
        """Exchange tokens for heads, and start to exchange queries.

        What is given goes before lse and q, and before k and the bias, if there is one.
        """
        call, plan = self.call, self.plan
        rows = [*of_queries, (call.lse, plan.q_tokens), (call.q, plan.q_tokens)]
        with self._abandoned_on_error():
            given = [*rows, *of_keys, (call.k, plan.kv_tokens)]
            if plan.bias_tokens is not None:
                given.append((call.key_bias, plan.bias_tokens))
            arrays = self.movers.heads.to_heads("heads", given, self.backend.empty, self.trace)
            asked = arrays[:len(rows)]
            if len(plan.row_counts) > 1:
                asked = self.movers.queries.ask(asked, plan.row_counts, self.backend.empty, self.trace)
        return Inside(list(asked), list(arrays[len(rows):]))

    def _shapes(self, count: int) -> list[list[Shape]]:
        """Give the shapes of so many arrays of each member's block: groups of keys, if any, k, and a bias, if any."""
        return [[k[:3]] * (count - 1 - len(bias)) + [k, *bias] for k, _, *bias in self.plan.shapes]

    def _without_bias(self, work: Work) -> Sequence[Array]:
        """Give the arrays of a block that came by but for the bias: groups of keys, if any, and k."""
        return work.arrays if self.plan.bias_tokens is None else work.arrays[:-1]

    def _get_ready(self, dtypes: Sequence[np.dtype[Any]], make: Callable[[], Made],
                   sums: Sequence[Sequence[Shape]] | None = None) -> Made:
        """Compile what such a pass needs, make its buffers, and give what is made: before anything travels.

        Parameters
        ----------
        dtypes : sequence of dtype
            Of the arrays of a block, but for the bias.
        make : callable
            Makes the arrays of results.
        sums : for each member, the shapes of the sums that come home, optional
        """
        plan, trace = self.plan, self.trace
        heads, dim, _ = plan.dims
        trace.flop_per_pair = 2 * heads * dim
        trace.compile_seconds += self.engine.prepare(plan.dtype, plan.accumulator, dim, dim, plain=plan.plain,
                                                     weights=True)
        if plan.bias_tokens is not None:
            dtypes = [*dtypes, plan.accumulator]
        sizes = [block_sizes(self._shapes(len(dtypes)), dtypes)]
        if sums is not None:
            sizes.append(block_sizes(sums, [np.dtype(np.float64)]))
        made: list[Made] = []
        with self.engine.raise_on_all():
            self.movers.carrier.reserve(plan.route, *sizes)
            made.append(make())
        trace.setup_seconds = trace.now() - trace.compile_seconds
        return made[0]

    def _go_through(self, works: Iterator[Work], inside: Inside, loops: Loops) -> None:
        """Run the loops of each task of each block that comes by."""
        for work, part in self._cut_rows(works, inside.rows):
            tasks = self.plan.tasks(work, part, self.call.dropout_keys, self.call.relative)
            self._run(work, (loop for task in tasks for loop in loops(work, part, task)))

    def _of_rows(self, inside: Inside, loops: Loops, results: Sequence[Array],
                 combine: Callable[[Sequence[Array], Sequence[Array]], None]) -> list[Array]:
        """Make something of each row, all of whose keys come by; give what is made of this rank's queries.

        Parameters
        ----------
        inside, loops
        results : sequence of arrays of shape (batch, rows, heads, ...)
            What the loops make.
        combine : callable
            Takes such arrays of the same rows, and puts into the first what others have made of other keys.
        """
        plan, heads = self.plan, self.movers.heads
        blocks = Blocks(inside.block, self._shapes(len(inside.block)))
        with self._abandoned_on_error():
            self._go_through(self._carry(blocks), inside, loops)
            own = [x[:, :plan.own_rows] for x in results]
            if plan.replicated:
                self._combine_replicated(own, combine)
            elif len(plan.row_counts) > 1:
                rows = [x.swapaxes(0, 1) for x in results]
                self.movers.queries.bring_home(
                    "sums", [np.ascontiguousarray(x) for x in rows], plan.row_counts,
                    lambda parts: combine(own, [x.swapaxes(0, 1) for x in parts]), self.trace)
            if heads.group.size == 1:
                return own
            made = [np.empty((*self.call.lse.shape, x.shape[3]), x.dtype) for x in own]
            heads.to_tokens("results", [(np.ascontiguousarray(x), plan.q_tokens) for x in own],
                            [(x, put_heads) for x in made], self.trace)
            return made

    def _combine_replicated(self, own: Sequence[Array],
                            combine: Callable[[Sequence[Array], Sequence[Array]], None]) -> None:
        """Put together what all ranks have made of rows that all have, in the order of the ranks: the same on all."""
        size = self.movers.carrier.comm.size
        step = max(1, SHARED_BYTES // max(1, size * sum(x[:, :1].nbytes for x in own)))
        for start in range(0, own[0].shape[1], step):
            self._combine_rows([x[:, start:start + step] for x in own], combine)

    def _combine_rows(self, own: Sequence[Array], combine: Callable[[Sequence[Array], Sequence[Array]], None]) -> None:
        """Do that with some of the rows."""
        mine = [np.ascontiguousarray(x) for x in own]
        shares = [self.engine.share(x.reshape(-1).view(np.uint8)) for x in mine]
        for rank in range(len(shares[0])):
            parts = [share[rank].view(x.dtype).reshape(x.shape) for share, x in zip(shares, mine, strict=True)]
            if rank == 0:
                for target, x in zip(own, parts, strict=True):
                    target[...] = x
            else:
                combine(own, parts)

    def _positions(self, work: Work) -> Integers:
        """Give the positions of the keys of a block that came by."""
        positions = np.concatenate([part.positions() for part in self.plan.parts[work.source]])
        return positions[work.columns]


def _add(targets: Sequence[Array], parts: Sequence[Array]) -> None:
    for target, x in zip(targets, parts, strict=True):
        target += x


def _of_rows(score: Score, rows: slice | NDArray[np.int64]) -> Score:
    """Give the score of some of the rows."""
    return replace(score, queries=score.queries[rows]) if score.positional else score
