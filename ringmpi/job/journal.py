"""The checkpoints of a job that streams: what each is of, writing one, and going on from one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.calls import Kept
from ..checkpoint.fingerprint import CHUNK_BYTES, fingerprint
from ..checkpoint.identity import add_up, describe_input, problem_name
from ..checkpoint.saving import write_generation
from ..checkpoint.search import Keeping, Search, unless_required
from ..engine import Engine
from ..files.axes import Axes
from ..files.generations import NewGeneration
from ..files.rows import row_ranges
from ..files.states import Generation
from ..files.tokens import Tokens
from ..layout import Contiguous
from ..problem import Problem
from ..relative import Relative
from .done import Done, done_of
from .inputs import Input
from .outputs import Rows
from .pieces import Pieces
from .run import Run
from .stream_plan import Planner


class Journal:
    """Writes generations of a checkpoint, and goes on from one. Collective over *comm*, all of it.

    Parameters
    ----------
    run : Run
    keeping : Keeping
        Where.
    target : path
        Of OUT.h5.
    problem, placement : dict
        What is computed, and by whom and how, as plain values.
    """

    def __init__(self, run: Run, keeping: Keeping, target: Path, problem: dict[str, Any], placement: dict[str, Any]
                 ) -> None:
        self._run = run
        self._keeping = keeping
        self._target = target
        self._problem = problem
        self._placement = placement
        self._found: Generation | None = None

    @property
    def kept(self) -> Kept:
        """What has no use when OUT.h5 is there. Local."""
        return Kept(self._keeping.folder, problem_name(self._problem))

    def find(self, planner: Planner) -> tuple[Done, Pieces | None]:
        """Say what has been done, and of which pieces if this job can go on with them.

        Raises
        ------
        ShardError, OptionError
            If a checkpoint is required, and there is none, it is damaged, or of another job; the same on every rank.
        """
        run, keeping = self._run, self._keeping
        if keeping.resume != "never":
            with unless_required(keeping, run.comm, run.timeout):
                self._found = Search(run.comm, run.timeout, keeping).generation(lambda: self._problem)
                return self._take(planner)
        return Done(), None

    def _take(self, planner: Planner) -> tuple[Done, Pieces | None]:
        """Take what has been found, if all ranks find that it makes sense and is there."""
        done: tuple[Done, Pieces | None] = Done(), None
        with self._run.raise_on_all():
            if self._found is not None:
                done = done_of(self._found, planner, self._target, self._placement, self._run.comm.rank)
        return done

    def read(self, states: Sequence[NDArray[Any]]) -> None:
        """Read the states of the piece that was left into arrays.

        Raises
        ------
        ShardError
            If they are damaged; the same on every rank.
        """
        with self._run.raise_on_all():
            if self._found is not None:
                self._found.read(self._run.comm.rank, states)

    def write(self, done: Done, pieces: Pieces, states: Sequence[NDArray[Any]] = ()) -> None:
        """Write a generation.

        Raises
        ------
        OutputError
            If a rank can't; the same on every rank. The last one is as it was.
        """
        run = self._run

        def write(made: NewGeneration) -> dict[str, Any]:
            return {**made.write(run.comm.rank, states), "pairs": done.pairs}

        content = {"problem": self._problem, "placement": self._placement, "pieces": pieces.as_dict(),
                   "block": done.block, "output": [asdict(shard) for shard in done.shards]}
        write_generation(run.comm, run.timeout, self._keeping.folder, content, write)


def describe_job(run: Run, data: Input, target: Path, problem: Problem, engine: Engine, rows: dict[str, Rows]
                 ) -> dict[str, Any]:
    """Say what is computed, of which numbers, and where it goes, as plain values. Collective over *comm*.

    q, k, v and a bias of the keys are read once for it, some MiB at a time.

    Parameters
    ----------
    rows : dict
        See `rows_of_results`.
    """
    comm = run.comm
    sizes = data.sizes
    with run.timer.phase("read", f"reading {data.path}"):
        datasets = [data.q, data.k, data.v, *([] if data.key_bias is None else [data.key_bias])]
        prints = np.zeros(len(datasets), np.uint64)
        relative: Relative | None = None
        with comm.noting() as failures:
            relative = data.by_distance(rows["lse"][1])
            prints = np.array([_fingerprint(tokens, comm.rank, comm.size, engine) for tokens in datasets], np.uint64)
        total = add_up(prints, comm, run.timeout, failures)
    numbers = {"tokens of q": sizes.n_q, "tokens of k and v": sizes.n_k, "heads": sizes.heads,
               "kv_heads": sizes.kv_heads, "dim": sizes.dim, "dim_v": sizes.dim_v, "dtype": sizes.dtype,
               "accumulator": str(rows["lse"][1])}
    written = {} if data.axes == Axes() else {"axes": data.axes.names}         # shards that are done are in their order
    of_input = describe_input(problem, numbers, data.sinks, relative, total, engine.backend, comm, run.timeout)
    return {**of_input, **written,
            "stream": True, "output": os.path.realpath(target)}


def _fingerprint(tokens: Tokens, rank: int, size: int, engine: Engine) -> int:
    """Give this rank's part of the fingerprint of a dataset."""
    even = Contiguous.even(len(tokens), size)
    start = even.starts[rank]
    total = 0
    for first, last in row_ranges((even.counts[rank], *tokens.shape[1:]), tokens.dtype, CHUNK_BYTES):
        x = tokens.read(start + first, start + last)
        total += fingerprint(x.reshape(1, len(x), 1, -1), np.arange(start + first, start + last), engine.backend)
    return total % 2**64
