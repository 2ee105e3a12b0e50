"""What a job that streams has done, in a checkpoint: shards that are there, and the states of the piece it is at."""

from __future__ import annotations

import json
import os
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..backends.base import Backend
from ..checkpoint.calls import Keeping
from ..checkpoint.fingerprint import CHUNK_BYTES, fingerprint
from ..checkpoint.identity import difference
from ..errors import CommError, OptionError, OutputError, RankLost, RingError, RingTimeout, ShardError
from ..files.generations import Generation, NewGeneration, newest
from ..files.hdf5 import read_rows
from ..files.item_types import RAW_DTYPE
from ..files.manifest import Shard
from ..files.rows import row_ranges
from ..files.shards import digest
from ..layout import Contiguous
from ..phases import phase
from .inputs import Input
from .options import Options
from .pieces import Pieces
from .run import Run
from .stream_plan import Planner

# Options that say how a job is done, not what it gives.
OF_THE_WAY = ("layout", "memory_limit", "schedule", "gpu_transport", "allow_gpu_sharing", "backend", "stream")


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
    keeping : Keeping, optional
        Where; None: nothing is kept.
    problem, placement : dict
        What is computed, and by whom and how, as plain values.
    """

    def __init__(self, run: Run, keeping: Keeping | None, problem: dict[str, Any], placement: dict[str, Any]) -> None:
        self._run = run
        self._keeping = keeping
        self._problem = problem
        self._placement = placement
        self.newest: Path | None = None
        self._found: Generation | None = None

    def find(self, target: Path, planner: Planner) -> tuple[Done, Pieces | None]:
        """Say what has been done, and of which pieces if this job can go on in the middle of one.

        Raises
        ------
        ShardError, OptionError
            If a checkpoint is required, and there is none, it is damaged, or of another job; the same on every rank.
        """
        keeping = self._keeping
        if keeping is None or keeping.resume == "never":
            return Done(), None
        try:
            return self._find(keeping, target, planner)
        except (ShardError, OptionError) as error:
            if keeping.resume == "require":
                raise
            if self._run.comm.rank == 0:
                warnings.warn(f"no checkpoint is used, and all is computed: {error}", stacklevel=2)
            return Done(), None

    def _find(self, keeping: Keeping, target: Path, planner: Planner) -> tuple[Done, Pieces | None]:
        run = self._run
        found: Generation | None = None
        with run.comm.noting() as failures:
            found = newest(keeping.folder)
            if found is None and keeping.resume == "require":
                raise ShardError(f"{keeping.folder}: has no complete checkpoint to go on from")
        name = "" if found is None else found.path.name
        run.comm.exchange("", run.timeout, failures=failures, options={"checkpoint": name})
        if found is None:
            return Done(), None

        # What it is of, and whether its shards are there.
        different = difference(found.content["problem"], self._problem)
        if different:
            raise OptionError(f"{found.path}: expected a checkpoint of this job: {different}")
        pieces: Pieces | None = None
        with run.raise_on_all():
            done, pieces = _read(found, planner.sizes.n_q)
            for shard in done.shards[run.comm.rank::run.comm.size]:
                _check_shard(target.parent, shard)
            mine = found.content["shards"]
            if difference(found.content["placement"], self._placement):
                pieces = None
                done = replace(done, block=0, pairs=sum(part["pairs"] for part in mine) * (run.comm.rank == 0))
            elif len(mine) != run.comm.size or not planner.fits(pieces):
                raise ShardError(f"{found.path}: goes on in a piece for which there is no room in this job's limit")
            else:
                done = replace(done, pairs=mine[run.comm.rank]["pairs"])
        self.newest = found.path
        self._found = found
        return done, pieces

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
        keeping, run = self._keeping, self._run
        if keeping is None:
            return
        with phase(f"saving a checkpoint in {keeping.folder}"):
            made = self._prepare(keeping.folder)
            try:
                mine: dict[str, Any] = {}
                with run.raise_on_all():
                    mine = made.write(run.comm.rank, states) | {"pairs": done.pairs}
                shards = [json.loads(text) for text in run.allgather_text(json.dumps(mine))]
                with run.raise_on_all():
                    if run.comm.rank == 0:
                        made.publish({"ringmpi": __version__, "problem": self._problem, "placement": self._placement,
                                      "shards": shards, "pieces": pieces.as_dict(), "block": done.block,
                                      "output": [asdict(shard) for shard in done.shards]})
            except RingError as error:
                if not isinstance(error, (RingTimeout, RankLost, CommError)):      # all know that it is not complete
                    made.discard(run.comm.rank)
                raise
        self.newest = made.path

    def try_to_write(self, done: Done, pieces: Pieces, states: Sequence[NDArray[Any]] = ()) -> bool:
        """Write a generation, or warn that it can't be written: the job is worth more than that. Say which it was."""
        try:
            self.write(done, pieces, states)
        except OutputError as error:
            if self._run.comm.rank == 0:
                warnings.warn(f"{error}; no checkpoint was written, the last one is as it was", stacklevel=2)
            return False
        return self._keeping is not None

    def _prepare(self, folder: Path) -> NewGeneration:
        name = ""
        with self._run.raise_on_all():
            if self._run.comm.rank == 0:
                name = NewGeneration.prepare(folder, uuid.uuid4().hex[:12]).path.name
        return NewGeneration(folder / self._run.allgather_text(name)[0])


def describe_job(run: Run, data: Input, options: Options, target: Path, backend: Backend, rows: dict[str, Any]
                 ) -> dict[str, Any]:
    """Say what is computed, of which numbers, and where it goes, as plain values. Collective over *comm*.

    q, k and v are read once for it, some MiB at a time.
    """
    prints = [0, 0, 0]                    # modulo 2^64
    with run.timer.phase("read", f"reading {data.path}"):
        with run.comm.noting() as failures:
            for number, dataset in enumerate((data.q, data.k, data.v)):
                part = Contiguous.even(len(dataset), run.comm.size)
                start, count = part.starts[run.comm.rank], part.counts[run.comm.rank]
                for first, last in row_ranges((count, *dataset.shape[1:]), rows["out"][1], CHUNK_BYTES):
                    x = read_rows(dataset, start + first, start + last, RAW_DTYPE)
                    prints[number] += fingerprint(x[None], np.arange(start + first, start + last), backend)
        mine = np.array([x % 2**64 for x in prints], np.uint64)
        every = run.comm.exchange("", run.timeout, mine.view(np.uint8), failures=failures)
    total = np.stack([row.view(np.uint64) for row in every]).sum(axis=0, dtype=np.uint64)
    asked = {name: str(value) for name, value in asdict(options).items() if name not in OF_THE_WAY}
    more = {name: None if x is None else x.tolist() for name, x in (("alibi", data.alibi), ("sinks", data.sinks))}
    return {**asked, **more, **data.mask.describe(), **asdict(data.sizes), "stream": True,
            "output": os.path.realpath(target), "backend": backend.name, "bfloat16_products": backend.products,
            **{f"{name} (by its fingerprint)": f"{int(x):016x}" for name, x in zip("qkv", total, strict=True)}}


def _read(found: Generation, n_q: int) -> tuple[Done, Pieces]:
    """Take what a generation says has been done, if it can have been."""
    content = found.content
    try:
        shards = [Shard(**shard) for shard in content["output"]]
        pieces = Pieces(**content["pieces"])
        stops = [0, *(shard.stop for shard in shards)]
        numbers = [content["block"], pieces.start, *(shard["pairs"] for shard in content["shards"])]
        right = (all(type(x) is int and x >= 0 for x in numbers)
                 and all(type(x) is int and x > 0 for x in (pieces.group, pieces.piece, pieces.block, pieces.tile))
                 and all(shard.start == stop for shard, stop in zip(shards, stops, strict=False))
                 and stops[-1] <= n_q)
    except (KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise ShardError(f"{found.path}: does not say what has been done as this version of ringmpi does")
    return Done(shards, content["block"]), pieces


def _check_shard(folder: Path, shard: Shard) -> None:
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.size or digest(path) != shard.sha256:
        raise ShardError(f"{path}: is gone or damaged, which the checkpoint says is complete")
