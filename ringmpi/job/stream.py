"""A job whose keys, queries and results need not fit in memory: `ringmpi attend --stream`.

Queries come in pieces, dealt out among all ranks. By each piece go all blocks of keys that it sees: every rank reads
its share of a block while the one before goes round. Then the results of the piece are written, and they are progress.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..attention import RingAttention
from ..bounds import bounds_of
from ..call import RECORD, Call, Inputs, Records
from ..checkpoint.watch import Watch
from ..dtypes import DTYPES, accumulator
from ..environment import resident_bytes
from ..errors import InternalError, Interrupted, OptionError, OutputError
from ..files.manifest import Shard
from ..files.shards import Output
from ..left_out import bits_of, seen_by_heads
from ..passes import Pass
from ..plan import Plan
from ..replicated import part_of
from ..schedules.waits import LEAVE, PAUSE
from ..softmax import State
from ..trace import Exchange, Step, Trace
from .checkpoints import Checkpoints
from .done import Done
from .inputs import Input, axes_of
from .journal import Journal, describe_job
from .options import Options
from .outputs import rows_of_results
from .pieces import Block, Groups, Pieces
from .run import Run
from .stream_files import BlockReader, read_piece, write_piece
from .stream_plan import Planner, schedule_to_stream, usual_limit

Array = NDArray[Any]


def check_streamable(options: Options) -> None:
    """Refuse what a job that streams can't do. Local.

    Raises
    ------
    OptionError
        If there is a batch axis.
    """
    if "batch" in axes_of(options).names:
        raise OptionError("stream: there is no batch axis yet; give a file for each element, or leave --stream out")


def with_limit(run: Run, options: Options) -> Options:
    """Give the options of a job that streams a limit of memory, if they have none. Collective over *comm*.

    That is `usual_limit` where it is least.
    """
    check_streamable(options)
    if options.memory_limit is not None:
        return options
    mine = usual_limit(run.comm.local_size)
    return replace(options, memory_limit=int(run.comm.allgather(np.array([mine]), run.timeout).min()))


class BlockPass(Pass):
    """A forward pass over one block of keys, of queries that have met others before and go on after it."""

    def fold(self) -> None:
        """Fold the block, each rank's share of it, into the states of the engine. Collective."""
        call, plan = self.call, self.plan
        self._prepare_pass("forward")
        with self.backend.current(), self._abandoned_on_error():
            heads, _, dim_v = plan.dims
            states = self.engine.states(plan.batch, plan.rows, heads, dim_v, plan.accumulator)
            self._meet(states, [call.q], call.keys)


class Stream:
    """A job that streams. Collective over *comm*, all of it.

    Parameters
    ----------
    run, attention, data, options, output
    checkpoints : Checkpoints
        Of the job: where they are kept, and whether to stop.

    Attributes
    ----------
    rows : dict
        See `rows_of_results`.
    """

    def __init__(self, run: Run, attention: RingAttention, data: Input, options: Options, output: Output,
                 checkpoints: Checkpoints) -> None:
        self._run = run
        self._attention = attention
        self._data = data
        self._options = options
        self._output = output
        self._checkpoints = checkpoints
        self._journal: Journal | None = None
        self._engine = attention._engine
        self._backend = attention.backend
        self._pairs = 0
        self._wide = accumulator(DTYPES[data.sizes.dtype], options.accumulator)
        self.rows = rows_of_results(data.sizes, options.accumulator)
        self._reading = Exchange("blocks from the file")
        self.total = Trace(steps=[Step(number, number) for number in range(run.comm.size)], exchanges=[self._reading])

    def attend(self) -> list[Shard]:
        """Attend; give the shards of all ranks.

        Raises
        ------
        Interrupted
            If a rank was asked to stop, the same on every rank: then there is a checkpoint.
        """
        run = self._run
        sizes = self._data.sizes
        options = self._options
        attention = self._attention
        attention.schedule = schedule_to_stream(options, run.comm.size)
        planner = self._planner()             # before the input is read for its fingerprints
        done, pieces = self._find(planner)
        if pieces is None:
            with run.raise_on_all():
                pieces = planner.plan(done.rows)
        self._pieces = pieces
        self._report(done.pairs)
        keeping = self._checkpoints.keeping
        self._watch = Watch(self._checkpoints.stop, keeping.every if keeping else None, self._save,
                            run.comm.rank == 0)
        with run.raise_on_all():
            self._blocks = pieces.of_keys(sizes, run.comm.size)
            self._reader = BlockReader(self._data.keys, self._blocks, run.comm.rank)
        try:
            for piece in pieces.of_queries(sizes, run.comm.size, options.layout):
                if piece.start >= done.rows:
                    done = self._attend_piece(piece, done)
        finally:
            self._reader.close()
        attention.trace = self.total
        return done.shards

    def _find(self, planner: Planner) -> tuple[Done, Pieces | None]:
        """Say what has been done by a job before this one, if any of it is kept; see `Journal.find`."""
        run = self._run
        options = self._options
        keeping = self._checkpoints.keeping
        if keeping is None:
            return Done(), None
        problem = describe_job(run, self._data, self._output.path, self._attention._problem, self._engine, self.rows)
        placement = {"ranks": run.comm.size, "schedule": str(self._attention.schedule), "layout": options.layout,
                     "memory_limit": options.memory_limit, "nodes": run.comm.nodes}
        self._journal = Journal(run, keeping, self._output.path, problem, placement)
        self._checkpoints.kept = self._journal.kept
        return self._journal.find(planner)

    def _report(self, pairs: int, _: int = 0) -> None:
        """Say that so many more pairs are done. Local."""
        self._pairs += pairs
        self._run.comm.report_progress(self._pairs, self._pairs)

    def _planner(self) -> Planner:
        """Make what plans pieces, by the rank whose process is largest when all is compiled, which may take much."""
        run = self._run
        sizes = self._data.sizes
        options = self._options
        with run.timer.phase("attend", "compiling kernels"):
            self.total.compile_seconds += self._engine.prepare(
                self.rows["out"][1], self._wide, sizes.dim, sizes.dim_v,
                plain=options.softcap is None and not (options.alibi or options.key_bias), relative=options.relative,
                several=self._data.mask.most > 1, backward=False)
        process = int(run.comm.allgather(np.array([resident_bytes()]), run.timeout).max())
        return Planner(sizes, run.comm.size, options, type(self._backend), process, self._data.mask.most)

    def _attend_piece(self, piece: Groups, done: Done) -> Done:
        """Attend with the queries of a piece, and write its results."""
        run = self._run
        sizes = self._data.sizes
        backend = self._backend
        n_q, n_k = sizes.n_q, sizes.n_k
        sees, mine = np.zeros(0, bool), np.zeros(len(self._blocks), bool)
        with run.comm.noting() as failures:
            [bounds] = bounds_of(self._data.mask, piece.positions(run.comm.rank), (n_q, n_k), 1)
            sees = bounds.sees | (self._data.sinks is not None)
            for rows in bounds.pieces(slice(None)):
                mine |= self._pieces.seen(bounds.of(rows), n_k)
            del bounds
        every = run.comm.exchange("", run.timeout, np.packbits(mine), failures=failures)
        seen = np.unpackbits(np.bitwise_or.reduce(every), count=len(self._blocks))
        left = [number for number in np.flatnonzero(seen).tolist() if number >= done.block]
        if left:
            self._reader.begin(left[0])
        q = read_piece(run, self._data.q, piece)
        [state] = self._engine.states(1, len(q), sizes.heads, sizes.dim_v, self._wide)
        arrays = [state.acc, state.row_max, state.row_sum]
        if sizes.key_bias:                    # what its blocks say is as much part of the states
            sees = np.full((len(q), sizes.key_bias), self._data.sinks is not None)
            arrays.append(sees)
        if done.block and self._journal is not None:
            self._journal.read(arrays)
        else:
            backend.reset(state, None if self._data.sinks is None else self._data.sinks.astype(self._wide))
        with run.timer.phase("attend", "attending"):
            for number, following in itertools.zip_longest(left, left[1:]):
                keys = self._take(number, following, replace(done, block=number), arrays)
                done = self._fold(q, keys, piece, number, done, sees)
        del q
        shards = self._write(piece, state, sees)
        done = Done([*done.shards, *shards], 0, done.pairs)
        self._watch.pause(done)
        return done

    def _take(self, number: int, following: int | None, done: Done, states: Sequence[Array]
              ) -> list[Array]:
        """Take this rank's share of a block, let the next be read, and do what any rank wishes for before it."""
        run = self._run
        keys: list[Array] = []
        start = time.perf_counter()
        with run.comm.noting() as failures:
            keys = self._reader.take(number)
        self._reading.wait_seconds += time.perf_counter() - start
        wish = np.array([self._watch.after_step()], np.uint8)
        every = run.comm.exchange("", run.timeout, wish, failures=failures)
        wished = int(np.bitwise_or.reduce([row[0] for row in every]))
        if wished & LEAVE:
            self._leave(done, states)
        if following is not None:
            self._reader.begin(following)
        if wished & PAUSE:
            self._watch.pause(done, states)
        return keys

    def _save(self, done: Done, states: Sequence[Array] = ()) -> None:
        """Write a checkpoint, if any are kept: then what it refers to stays, whatever becomes of this job.

        States that have met no block yet are not kept: the piece begins again.
        """
        if self._journal is None:
            return
        states = states if done.block else ()
        try:
            self._journal.write(done, self._pieces, states)
        except OutputError:                   # all know that there is none
            raise
        except BaseException:                 # another rank may have made it complete
            self._output.keep()
            raise
        self._output.keep(done.shards if self._run.comm.rank == 0 else ())

    def _leave(self, done: Done, states: Sequence[Array]) -> None:
        """Write a checkpoint, and end the job on all ranks."""
        self._save(done, states)
        keeping = self._checkpoints.keeping
        raise Interrupted(f"stopped on request: {done.rows / max(1, self._data.sizes.n_q):.0%} of the queries are "
                          f"done, and what is computed of further ones is in the checkpoint in "
                          f"{keeping.folder if keeping else ''}; the same command goes on from there")

    def _fold(self, q: Array, keys: Sequence[Array], piece: Groups, number: int, done: Done,
              sees: NDArray[np.bool_]) -> Done:
        """Let the queries of a piece meet a block; with a bias note which see a key that it does not leave out."""
        trace = Trace()
        call, plan = self._plan_block(q, keys, piece, self._blocks[number])
        if call.key_bias is not None:
            bits = self._engine.share(bits_of(call.key_bias))
            [found] = seen_by_heads(plan, self._blocks[number], bits, sees.shape[1])
            sees |= found[:, :sees.shape[1]]
        BlockPass(call, plan, self._engine, trace, self._report).fold()
        self._add(trace)
        return replace(done, block=number + 1, pairs=done.pairs + trace.pairs)

    def _plan_block(self, q: Array, keys: Sequence[Array], piece: Groups, block: Block) -> tuple[Call, Plan]:
        """Plan what the queries of a piece see of a block, and agree on who needs what of it."""
        run, attention = self._run, self._attention
        problem = replace(attention._problem, layout=piece, kv_layout=block)
        call: Call | None = None
        plan: Plan | None = None
        needs = np.zeros(run.comm.size, bool)
        with run.comm.noting() as failures:
            call = Call.check(self._inputs(q, keys), 0.0, self._options.accumulator, self._data.mask)
            table = np.repeat(call.record().view(RECORD), run.comm.size)
            table["n_q"], table["n_k"] = piece.counts, block.counts
            records = Records([table.view(np.uint8)])
            layouts = problem.resolve(records)
            grid = problem.grid(attention.schedule, run.comm.nodes, records)
            plan = problem.plan(records, layouts, grid, run.comm.rank, whole=True)
            needs = plan.needs
        every = run.comm.exchange("", run.timeout, np.packbits(needs), failures=failures)
        if call is None or plan is None:
            raise InternalError("a plan is missing")
        plan.take_needs(np.unpackbits(np.stack(every), axis=1, count=len(needs)).astype(bool))
        return call, plan

    def _inputs(self, q: Array, keys: Sequence[Array]) -> Inputs:
        """Give the inputs of a pass over a block, of which there is what `Input.keys` says."""
        sizes = self._data.sizes
        k, *others = keys
        key_bias = others.pop() if sizes.key_bias else None
        return Inputs(q, k, others[0] if others else None, self._data.sinks, key_bias=key_bias,
                      relative=self._data.relative, dim_v=sizes.dim_v if sizes.in_keys else None)

    def _add(self, trace: Trace) -> None:
        """Add what a block has cost to what all have."""
        total = self.total
        total.flop_per_pair = trace.flop_per_pair
        total.compile_seconds += trace.compile_seconds
        for whole, step in zip(total.steps, trace.steps, strict=False):
            for name in ("pairs", "compute_seconds", "wait_seconds", "bytes_sent", "bytes_received"):
                setattr(whole, name, getattr(whole, name) + getattr(step, name))

    def _write(self, piece: Groups, state: State, sees: NDArray[np.bool_]) -> list[Shard]:
        """Normalise the states of a piece, some rows at a time, and write them."""
        def finish(rows: slice) -> tuple[Array, Array]:
            count = rows.stop - rows.start
            out, lse = (np.empty((count, *shape), dtype) for shape, dtype in self.rows.values())
            seen = sees[rows] if sees.ndim == 1 else np.broadcast_to(sees[rows], lse.shape)
            self._backend.finish(part_of(state, rows), seen, out, lse)
            return out, lse

        return write_piece(self._run, self._output, piece, finish, self.rows)
