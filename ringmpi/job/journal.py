"""What a job that streams has done, in a checkpoint: shards that are there, and the states of the piece it is at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.calls import Kept
from ..checkpoint.fingerprint import CHUNK_BYTES, fingerprint
from ..checkpoint.identity import add_up, describe_input, difference, name_of
from ..checkpoint.saving import write_generation
from ..checkpoint.search import Keeping, Search, unless_required
from ..engine import Engine
from ..errors import ShardError
from ..files.generations import NewGeneration
from ..files.hdf5 import read_rows
from ..files.item_types import RAW_DTYPE
from ..files.manifest import Shard, check_shards
from ..files.rows import row_ranges
from ..files.shards import folder_of_shards, verify_shard
from ..files.states import Generation, are_counts
from ..layout import Contiguous
from ..problem import Problem
from .inputs import Input, Sizes
from .outputs import Rows
from .pieces import Pieces
from .run import Run
from .stream_plan import Planner


@dataclass(frozen=True)
class Done:
    """What has been done; the same on all ranks but for `pairs`.

    Attributes
    ----------
    shards : list of Shard
        Of pieces that are complete, in the order of their rows.
    block : int
        The block that the piece after them has yet to meet; 0: it has met none.
    pairs : int
        That this rank has computed.
    """

    shards: list[Shard] = field(default_factory=list)
    block: int = 0
    pairs: int = 0

    @property
    def rows(self) -> int:
        """Queries whose results are in shards: the first ones."""
        return self.shards[-1].stop if self.shards else 0


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
        self._folder = Path(os.path.realpath(target.parent))
        self._shards = folder_of_shards(target).name
        self._problem = problem
        self._placement = placement
        self._found: Generation | None = None

    @property
    def kept(self) -> Kept:
        """What has no use when OUT.h5 is there. Local."""
        return Kept(self._keeping.folder, name_of(self._problem))

    def find(self, planner: Planner) -> tuple[Done, Pieces | None]:
        """Say what has been done, and of which pieces if this job can go on with them.

        Raises
        ------
        ShardError, OptionError
            If a checkpoint is required, and there is none, it is damaged, or of another job; the same on every rank.
        """
        run, keeping = self._run, self._keeping
        done, pieces = Done(), None
        if keeping.resume != "never":
            with unless_required(keeping, run.comm, run.timeout):
                self._found = Search(run.comm, run.timeout, keeping).generation(lambda: self._problem)
                if self._found is not None:
                    done, pieces = self._take(self._found, planner)
        return done, pieces

    def _take(self, found: Generation, planner: Planner) -> tuple[Done, Pieces | None]:
        """Take what a generation says, when it is sure that it can have been, and that all of it is there."""
        comm = self._run.comm
        done = Done()
        with self._run.raise_on_all():
            done, pieces = self._read(found, planner.sizes)
            for shard in done.shards[comm.rank::comm.size]:
                verify_shard(found.path, self._folder, shard)
            mine = found.content["shards"]
            if not difference(found.content["placement"], self._placement) and planner.fits(pieces, done.rows):
                if len(mine) != comm.size or done.block * pieces.block >= planner.sizes.n_k + pieces.block:
                    raise _strange(found)
                self._verify_states(found, done, planner.states_bytes(pieces, done.rows, comm.rank))
                return replace(done, pairs=mine[comm.rank]["pairs"]), pieces
        everyone = sum(part["pairs"] for part in mine)
        return replace(done, block=0, pairs=everyone * (comm.rank == 0)), None

    def _read(self, found: Generation, sizes: Sizes) -> tuple[Done, Pieces]:
        """Read what has been done, if it makes sense."""
        content = found.content
        try:
            shards = [Shard(**shard) for shard in content["output"]]
            pieces = Pieces(**content["pieces"])
            pairs = [part["pairs"] for part in content["shards"]]
            right = (are_counts([content["block"], *pieces.as_dict().values(), *pairs])
                     and check_shards(shards) <= sizes.n_q and sum(pairs) <= sizes.n_q * sizes.n_k
                     and all(shard.file.split("/")[0] == self._shards for shard in shards))
        except (KeyError, TypeError, ValueError, AttributeError):
            right = False
        if not right:
            raise _strange(found)
        return Done(shards, content["block"]), pieces

    def _verify_states(self, found: Generation, done: Done, expected: int) -> None:
        """Raise `ShardError` unless the states of the piece that was left are there, where one was."""
        rank = self._run.comm.rank
        size = found.content["shards"][rank]["size"]
        if size != (expected if done.block else 0):
            raise _strange(found)
        found.verify(rank)

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

    q, k and v are read once for it, some MiB at a time.

    Parameters
    ----------
    rows : dict
        See `rows_of_results`.
    """
    comm = run.comm
    sizes = data.sizes
    with run.timer.phase("read", f"reading {data.path}"):
        prints = np.zeros(3, np.uint64)
        with comm.noting() as failures:
            prints = np.array([_fingerprint(dataset, rows["out"][1], comm.rank, comm.size, engine)
                               for dataset in (data.q, data.k, data.v)], np.uint64)
        total = add_up(prints, comm, run.timeout, failures)
    numbers = {"tokens of q": sizes.n_q, "tokens of k and v": sizes.n_k, "heads": sizes.heads,
               "kv_heads": sizes.kv_heads, "dim": sizes.dim, "dim_v": sizes.dim_v, "dtype": sizes.dtype,
               "accumulator": str(rows["lse"][1])}
    return {**describe_input(problem, numbers, data.sinks, total, engine.backend, comm, run.timeout),
            "stream": True, "output": os.path.realpath(target)}


def _fingerprint(dataset: h5py.Dataset, dtype: np.dtype[Any], rank: int, size: int, engine: Engine) -> int:
    """Give this rank's part of the fingerprint of a dataset."""
    even = Contiguous.even(len(dataset), size)
    start = even.starts[rank]
    total = 0
    for first, last in row_ranges((even.counts[rank], *dataset.shape[1:]), dtype, CHUNK_BYTES):
        x = read_rows(dataset, start + first, start + last, RAW_DTYPE)
        total += fingerprint(x[None], np.arange(start + first, start + last), engine.backend)
    return total % 2**64


def _strange(found: Generation) -> ShardError:
    return ShardError(f"{found.path}: does not say what has been done as this version of ringmpi does")
